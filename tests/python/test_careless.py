"""What users do besides: compiled blocks, kept losses, hooks, other devices by default, numbers of NumPy's."""

from __future__ import annotations

import copy
import re
import subprocess
import sys

import models
import numpy as np
import pytest
import secateur as sc
import torch
import torch.nn.utils.prune
from secateur.methods.linalg.heads import head_errors
from secateur.methods.linalg.regression import ridged_cholesky
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

SIZES = {"img_size": 12, "patch_size": 4, "embed_dim": 27, "depth": 3, "num_heads": 3, "num_classes": 5}


def vit(seed=0, **more):
    torch.manual_seed(seed)
    model = VisionTransformer(**SIZES | {"mlp_ratio": 2.2} | more).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batches(count=16, side=12):
    images = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))
    return [images[: count // 2], images[count // 2 :]]


def test_blocks_that_are_compiled_are_measured_as_they_are_written():
    model = vit()
    compiled = copy.deepcopy(model)
    for block in compiled.blocks:
        block.compile(backend="eager")
    wanted = sc.calibrate(model, batches(), sensitivity=True)
    found = sc.calibrate(compiled, batches(), sensitivity=True)
    for group in [group for group in sc.inspect(model).groups if group.kind == "block"]:
        assert wanted.removal(group.name)[0] > 0
        assert found.removal(group.name) == wanted.removal(group.name)
    assert all(block._compiled_call_impl is not None for block in compiled.blocks)  # and again afterwards
    with torch.no_grad():
        assert torch.equal(compiled(batches()[0]), model(batches()[0]))


@pytest.mark.parametrize("method", ["snp", "project"])
def test_names_may_come_from_an_iterator(method):
    model = vit()
    stats = sc.calibrate(model, batches(), sensitivity=True)
    limits = {"groups": ("qk", "v", "ffn"), "freeze": ["blocks.0.*"]}
    once = {name: (each for each in names) for name, names in limits.items()}
    target = sc.Target(macs=0.7)
    wanted = sc.plan(model, stats, method=method, target=target, round_to=1, **limits)
    found = sc.plan(model, stats, method=method, target=target, round_to=1, **once)
    assert {name: kept.tolist() for name, kept in found.keep.items()} == {
        name: kept.tolist() for name, kept in wanted.keep.items()
    }
    twins = [copy.deepcopy(model) for _ in range(2)]
    reports = [
        sc.prune_sequential(
            twin, batches(), method, target, round_to=1, **{name: make(names) for name, names in limits.items()}
        )
        for twin, make in zip(twins, (list, iter), strict=True)
    ]
    assert reports[0].groups == reports[1].groups
    assert not any(name.startswith("blocks.0.") for name in found.keep)


@pytest.mark.parametrize("method", ["refit", "project"])
@pytest.mark.parametrize("share", [0.5, 0.75])
def test_biases_that_a_method_adds_are_within_the_budget(method, share):
    model = vit(qkv_bias=False, proj_bias=False)
    stats = sc.calibrate(model, batches())
    plan = sc.plan(model, stats, method=method, target=sc.Target(params=share), round_to=1)
    assert any(name not in dict(model.named_parameters()) for name in plan.weights)
    sc.prune(model, plan)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == plan.params[1] <= share * plan.params[0]
    assert count > share * plan.params[0] - 200  # a step of every kind is less


def test_a_budget_that_is_a_count_of_parameters_ends():
    """Shares such as 14085 / 46965 times their divisor are an ulp below a whole number, or above it."""
    model = vit(embed_dim=40, num_heads=2, depth=2, qkv_bias=False, proj_bias=False)
    stats = sc.calibrate(model, batches())
    dense = sum(parameter.numel() for parameter in model.parameters())
    for wanted in range(dense * 3 // 5, dense * 3 // 5 + 40):
        plan = sc.plan(model, stats, method="refit", target=sc.Target(params=wanted / dense), round_to=1)
        assert plan.params[1] <= wanted
    # The least that the groups reach has no room for the biases.
    with pytest.raises(sc.InvalidArgument, match="the least these groups reach") as refused:
        sc.plan(model, stats, method="refit", target=sc.Target(params=1e-3))
    least = float(re.search(r"params >= (\S+) ", str(refused.value))[1])
    with pytest.raises(sc.InvalidArgument, match=rf"target: expected room for \d+ biases .* got params = {least:g}$"):
        sc.plan(model, stats, method="refit", target=sc.Target(params=least))


@pytest.mark.parametrize("loss", ["kept", "gone"])
@pytest.mark.parametrize("layout", ["exact", "stock"])
def test_a_model_that_was_trained_trains_on_after_the_cut(loss, layout):
    """A loss that somebody holds keeps the nodes that take its parameters' gradients."""
    model = vit(qkv_bias=True)
    images, targets = torch.cat(batches()), torch.arange(16) % 5
    kept = nn.functional.cross_entropy(model.train()(images), targets)
    kept.backward()
    if loss == "gone":
        del kept
    model.eval()
    plan = sc.plan(model, sc.calibrate(model, batches()), method="project", ratios={"qk": 0.4, "v": 0.4, "ffn": 0.5})
    sc.prune(model, plan, layout=layout)
    sc.finetune(model, [(images, targets)], steps=1)
    nn.functional.cross_entropy(model(images), targets).backward()
    assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())


def test_pruned_and_loaded_within_inference_mode_a_model_can_be_trained(tmp_path):
    model = vit()
    plan = sc.plan(model, sc.calibrate(model, batches()), method="project", ratios={"v": 0.4, "ffn": 0.5})
    with torch.inference_mode():
        sc.prune(model, plan)
        sc.save(model, tmp_path / "small", factory=("VisionTransformer", SIZES | {"mlp_ratio": 2.2}))
        loaded = sc.load(tmp_path / "small")
    for each in (model, loaded):
        each(batches()[0]).sum().backward()


def test_a_model_that_was_made_in_inference_mode_is_pruned_there(tmp_path):
    with torch.inference_mode():
        model = vit()
        plan = sc.plan(model, sc.calibrate(model, batches()), method="project", ratios={"qk": 0.5, "ffn": 0.5})
        sc.prune(model, plan)
        found = model(batches()[0])
        sc.save(model, tmp_path / "small", factory=("VisionTransformer", SIZES | {"mlp_ratio": 2.2}))
        assert torch.equal(sc.load(tmp_path / "small")(batches()[0]), found)
        other = vit()
        sc.prune_sequential(other, batches(), "refit", ratios={"ffn": 0.3})
        assert bool(other(batches()[0]).isfinite().all())
    third = vit()
    with torch.inference_mode():
        sc.prune_sequential(third, batches(), "refit", ratios={"ffn": 0.3})
    third(batches()[0]).sum().backward()


def test_switches_of_training_do_not_keep_a_model_from_being_saved(tmp_path):
    model = VisionTransformerDistilled(**SIZES)
    model.set_distilled_training(True)
    sc.save(model, tmp_path / "model", factory=("VisionTransformerDistilled", SIZES))


@pytest.mark.parametrize(
    ("built", "more"),
    [
        ({"global_pool": "avg", "reg_tokens": 2}, {"pool_include_prefix": True}),
        ({}, {"dynamic_img_size": True}),
        ({"dynamic_img_size": True}, {"dynamic_img_pad": True}),
        ({"pos_embed": "none"}, {"img_size": 16}),
    ],
)
def test_what_would_compute_something_else_is_not_saved(tmp_path, built, more):
    model = VisionTransformer(**SIZES | built | more).eval()
    (name,) = more
    with pytest.raises(
        sc.InvalidArgument, match=r"model: expected what VisionTransformer with its recorded arguments is"
    ):
        sc.save(model, tmp_path / "other", factory=("VisionTransformer", SIZES | built))
    assert not list(tmp_path.iterdir())
    sc.save(model, tmp_path / "same", factory=("VisionTransformer", SIZES | built | more))
    assert getattr(sc.load(tmp_path / "same"), name, more[name]) == more[name]


def test_what_users_hang_on_a_model_is_no_reason_to_refuse(tmp_path):
    model = vit()
    model.class_names = ("a", "b")
    model.blocks[0].note = "first"
    model.train()
    sc.save(model, tmp_path / "model", factory=("VisionTransformer", SIZES | {"mlp_ratio": 2.2}))
    images = batches()[0]
    assert torch.equal(sc.load(tmp_path / "model")(images), model.eval()(images))


def test_hooks_are_not_lost_without_a_word(tmp_path):
    model = vit()
    model.blocks[1].register_forward_hook(lambda *_: None)
    with pytest.warns(
        UserWarning, match=r"model: expected no forward hooks, .* got some at blocks\.1; saved without them"
    ):
        sc.save(model, tmp_path / "model", factory=("VisionTransformer", SIZES | {"mlp_ratio": 2.2}))
    assert (tmp_path / "model").is_file()


def test_layers_behind_layer_scales_that_half_precision_cannot_undo():
    model = vit(init_values=1e-5)
    with torch.no_grad():
        for block in model.blocks:
            for scale in (block.ls1, block.ls2):
                scale.gamma.copy_(3e-5 * torch.randn_like(scale.gamma))
        model.blocks[1].ls1.gamma.normal_()
        model.blocks[1].attn.proj.bias.add_(1.0)
    images = torch.cat(batches())
    for dtype in (torch.float16, torch.float32):
        half = copy.deepcopy(model).to(dtype)
        stats = sc.calibrate(half, batches())
        for method in ("refit", "project"):
            pruned = copy.deepcopy(half)
            plan = sc.plan(pruned, stats, method=method, ratios={"blocks.1.attn": 1})
            assert all(bool(value.isfinite().all()) for value in plan.weights.values())
            sc.prune(pruned, plan)
            assert bool(pruned(images.to(dtype)).isfinite().all())


def test_the_width_alone_may_be_cut_by_its_loss():
    model = vit()
    stats = sc.calibrate(model, batches(), sensitivity=True)
    for more in ({"groups": ("width",)}, {"groups": ("width", "qk"), "freeze": ("qk",)}):
        plan = sc.plan(model, stats, method="project", target=sc.Target(macs=0.6), round_to=1, **more)
        assert set(plan.keep) == {"width"}
        assert plan.macs[1] <= 0.6 * plan.macs[0]
    whole = sc.plan(model, stats, method="project", target=sc.Target(macs=1.0), freeze=("*",))
    assert not whole.keep


def test_a_width_that_cannot_be_turned_may_stay():
    model = models.make("no_final_norm").float()
    images = [models.images(model, 8).float()]
    stats = sc.calibrate(model, images, sensitivity=True)
    if "width" in sc.inspect(model).refused:
        pytest.skip("this model's width cannot be named")
    plan = sc.plan(
        model,
        stats,
        method="project",
        target=sc.Target(macs=0.8),
        groups=("ffn", "width"),
        freeze=("width",),
        round_to=1,
    )
    assert "width" not in plan.keep


def test_one_channel_of_layer_norms_is_refused_with_words():
    model = vit()
    stats = sc.calibrate(model, batches())
    with pytest.raises(sc.InvalidArgument, match="width: expected at least 2 channels of a model of LayerNorms, got 1"):
        sc.plan(model, stats, method="project", ratios={"width": 0.98})
    assert sc.plan(model, stats, method="project", ratios={"width": 0.93}).keep["width"].shape[1] == 2


def test_values_that_do_not_vary_are_no_reason_to_hang():
    covariance = torch.full((6, 6), -1e-20, dtype=torch.float64)
    covariance[0, 1] = covariance[1, 0] = 1.0
    weight = torch.ones(4, 6, dtype=torch.float64)
    assert head_errors(weight, covariance, torch.arange(3)).tolist() == [0, 0, 0, 0]
    factor, added = ridged_cholesky(torch.zeros(3, 3, dtype=torch.float64), -1.0)
    assert added > 0
    assert bool(factor.isfinite().all())
    with pytest.raises(sc.NumericalError, match="covariance: expected finite values"):
        ridged_cholesky(torch.full((2, 2), torch.nan, dtype=torch.float64), 1.0)


def test_what_is_left_after_exchanges_is_spent():
    """No step of any group that lowers the loss fits any more."""
    model = vit()
    stats = sc.calibrate(model, batches(), sensitivity=True)
    anatomy = sc.inspect(model)
    from secateur.methods.registry import method_named

    prepared = method_named("snp").prepare(model, anatomy, stats, {"similarity": "weights", "head_score": "neurons"})
    losses = {g.name: stats.sensitivity(g.name) * prepared.errors(g) for g in anatomy.groups if g.kind == "ffn"}
    for share in np.linspace(0.6, 0.95, 29):
        plan = sc.plan(model, stats, target=sc.Target(macs=float(share)), groups=("ffn",), round_to=1)
        sizes = {**anatomy.sizes, **{name: kept.shape[1] for name, kept in plan.keep.items()}}
        for name, loss in losses.items():
            for wider in range(sizes[name] + 1, len(loss)):
                if loss[wider] < loss[sizes[name]]:
                    assert anatomy.macs_at({**sizes, name: wider}) > share * anatomy.macs, (share, name)
                    break


def test_numbers_of_numpy_are_numbers(tmp_path):
    model = vit()
    path = tmp_path / "statistics"
    stats = sc.calibrate(
        model, batches(), gamma=np.int64(4), token_fraction=np.float32(0.5), max_images=np.int32(12), resume=path
    )
    stats.save(path)
    assert sc.Statistics.load(path).settings == stats.settings
    plan = sc.plan(model, stats, target=sc.Target(macs=np.float32(0.7)), round_to=np.int64(1))
    plan.save(tmp_path / "plan.json")
    assert sc.Plan.load(tmp_path / "plan.json").options["target"]["macs"] == pytest.approx(0.7)
    for objective in (
        sc.AccuracyCritical(np.float32(20)),
        sc.MemoryConstrained(np.float64(0.5)),
        sc.LatencySensitive(latency=np.float32(0.5), batch_size=np.int64(2), repeats=np.int16(3)),
    ):
        assert all(type(value) in (float, int, str, type(None)) for value in vars(objective).values())


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.uint8, torch.uint16, torch.uint64])
def test_class_indices_of_any_integer_type(dtype):
    model = vit()
    images, targets = torch.cat(batches()), torch.arange(16) % 5
    wanted = sc.evaluate(model, [(images, targets)])
    assert sc.evaluate(model, [(images, targets.to(dtype))]) == wanted
    twin = copy.deepcopy(model)
    first = sc.finetune(model, [(images, targets)], steps=2)
    second = sc.finetune(twin, [(images, targets.to(dtype))], steps=2)
    assert first.history == second.history
    with pytest.raises(sc.InvalidArgument, match="loader: expected class indices from 0 to 4, got"):
        sc.evaluate(model, [(images, (targets + 100).to(dtype))])


@pytest.mark.parametrize("labels", [["a"] * 16, {"y": 1}, torch.tensor(3), torch.zeros(5)])
def test_calibrate_does_not_look_at_labels(labels):
    model = vit()
    images = torch.cat(batches())
    found = sc.calibrate(model, [(images, labels)])
    wanted = sc.calibrate(model, [images])
    assert np.array_equal(found.importance("blocks.0.qk"), wanted.importance("blocks.0.qk"))
    with pytest.raises(sc.InvalidArgument, match="loader: expected"):
        sc.evaluate(model, [(images, labels)])


def test_parameters_that_hooks_compute_are_refused_by_name():
    for module, parameter, name in (
        ("", "pos_embed", "pos_embed"),
        ("blocks.1.ls2", "gamma", r"blocks\.1\.ls2\.gamma"),
    ):
        model = vit(init_values=0.1)
        torch.nn.utils.prune.random_unstructured(model.get_submodule(module), parameter, 0.3)
        with pytest.raises(sc.Unsupported, match=rf"^{name}: expected a parameter, got a tensor that a hook computes"):
            sc.inspect(model)


def test_a_model_of_no_size_is_refused_with_words():
    model = VisionTransformer(**SIZES | {"img_size": None, "pos_embed": "none", "no_embed_class": True})
    with pytest.raises(sc.Unsupported, match="patch_embed: expected a size of images"):
        sc.inspect(model)


def test_a_norm_that_is_never_run_is_refused():
    with pytest.raises(
        sc.Unsupported, match="fc_norm: expected none in a VisionTransformerDistilled, which leaves it out"
    ):
        sc.inspect(VisionTransformerDistilled(**SIZES, fc_norm=True))


def test_what_can_be_read_only_once_is_refused_before_anything_is_trained():
    model = vit()
    before = copy.deepcopy(model.state_dict())
    images, targets = torch.cat(batches()), torch.arange(16) % 5
    with pytest.raises(sc.InvalidArgument, match="val_loader: expected batches that can be read after every pass"):
        sc.finetune(model, [(images, targets)], epochs=2, val_loader=iter([(images, targets)]))
    stats = sc.calibrate(model, [images])
    with pytest.raises(sc.InvalidArgument, match=r"finetune\['checkpoint_every'\]: expected resume="):
        sc.search(
            model,
            stats,
            objective=sc.MemoryConstrained(0.5),
            loader=[(images, targets)],
            finetune={"steps": 1, "checkpoint_every": 1},
            train_loader=[(images, targets)],
            calibration_loader=[images],
        )
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_matrices_are_asked_for_by_their_names():
    stats = sc.calibrate(vit(), batches())
    with pytest.raises(sc.InvalidArgument, match="which: expected query_gram, key_gram or score_gram, got 'gram'"):
        stats.gram("blocks.0.qk", "gram")


def test_another_device_by_default_changes_nothing(tmp_path):
    def job():
        torch.manual_seed(0)
        model = copy.deepcopy(dense)
        stats = sc.calibrate(model, batches(), sensitivity=True, head_gradients=True)
        plan = sc.plan(
            model, stats, method="project", target=sc.Target(macs=0.6), groups=("qk", "v", "ffn", "width"), round_to=1
        )
        sc.prune(model, plan)
        snp = sc.plan(model, sc.calibrate(model, batches()), ratios={"ffn": 0.3})
        sc.prune(model, snp, layout="stock")
        sc.prune_sequential(model, batches(), "refit", ratios={"ffn": 0.3})
        assert sc.measure_latency(model, batch_size=1, groups=("ffn",), repeats=1).batch_size == 1
        assert sc.bench(model, copy.deepcopy(model), batch_size=2, repeats=2, warmup=1).speedup > 0
        return model.state_dict()

    dense = vit()
    wanted = job()
    images = batches()
    globals()["batches"], before = (lambda: images), batches
    torch.set_default_device("meta")  # as with "cuda": what is made without a device is elsewhere
    try:
        found = job()
    finally:
        torch.set_default_device(None)
        globals()["batches"] = before
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        assert torch.equal(value, found[name]), name


def test_training_under_autocast_is_of_the_present_weights():
    """autocast keeps its copies of weights until the outermost block ends."""
    images = torch.cat(batches())
    data = [(images, torch.arange(len(images)) % 5)] * 4
    settings = {"steps": 12, "lr": 1e-2, "warmup": 0, "ema": 0.5}
    wanted = vit()
    expected = sc.finetune(wanted, data, amp="bfloat16", **settings).history
    for amp in (None, "bfloat16"):
        model = vit()
        with torch.autocast("cpu", torch.bfloat16):
            found = sc.finetune(model, data, amp=amp, **settings).history
            inside = model(images)  # with gradients: of what is kept
        for entry, other in zip(found, expected, strict=True):
            assert entry["loss"] == pytest.approx(other["loss"], rel=0.02)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(inside, model(images))
    assert expected[-1]["loss"] < 0.8 * expected[0]["loss"]


@pytest.mark.parametrize("method", ["snp", "project"])
@pytest.mark.parametrize("layout", ["exact", "stock"])
def test_pruning_under_autocast_is_seen_at_once(method, layout):
    model = vit()
    images = batches()[0]
    plan = sc.plan(model, sc.calibrate(model, batches()), method=method, ratios={"qk": 0.4, "v": 0.4, "ffn": 0.4})
    with torch.autocast("cpu", torch.bfloat16):
        model(images)  # keeps copies of the dense weights
        sc.prune(model, plan, layout=layout)
        found = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(found, model(images))


def test_a_pruned_model_is_saved_whatever_the_device_by_default(tmp_path):
    model = vit()
    plan = sc.plan(model, sc.calibrate(model, batches()), ratios={"qk": 0.4, "ffn": 0.4})
    sc.prune(model, plan)
    factory = ("VisionTransformer", SIZES | {"mlp_ratio": 2.2})
    with torch.device("meta"):
        sc.save(model, tmp_path / "model.safetensors", factory=factory)
        loaded = sc.load(tmp_path / "model.safetensors")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("workers", [0, 1])
def test_images_are_read_whatever_the_device_by_default(workers):
    model = vit(num_classes=10)
    loader = sc.data.loader("digits", model, batch_size=7, max_images=20, shuffle=True, workers=workers)
    wanted = list(loader)
    with torch.device("meta"):
        found = list(loader)
        again = sc.evaluate(model, loader)
    assert len(found) == 3
    for pair, other in zip(wanted, found, strict=True):
        assert all(torch.equal(first, second) for first, second in zip(pair, other, strict=True))
    assert again == sc.evaluate(model, loader)


def test_a_gpus_seed_of_before_training_stays():
    """In a fresh process, where torch keeps it until the GPU is used."""
    script = """
import torch, timm, secateur as sc
def seeds():
    kept = torch.cuda._lazy_seed_tracker.manual_seed_all_cb
    return kept[0].__closure__[0].cell_contents
torch.manual_seed(42)
before = seeds()
sizes = dict(img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=3)
model = timm.create_model("vit_tiny_patch16_224", **sizes)
sc.finetune(model, [(torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.long))], steps=2)
print(before, seeds(), torch.initial_seed())
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300)
    assert result.stdout.split() == ["42"] * 3


def test_plans_compare_by_identity():
    model = vit()
    stats = sc.calibrate(model, batches())
    first, second = (sc.plan(model, stats, ratios={"ffn": 0.3}) for _ in range(2))
    assert first == first
    assert first != second
    assert len({first, second}) == 2
