"""Whole heads and whole layers: which of them go, what is lost with them, and what the others take over."""

from __future__ import annotations

import copy
import itertools
import warnings

import numpy as np
import pytest
import reference
import secateur as sc
import torch
from models import images, make
from secateur.methods.linalg.heads import eliminate_heads, head_errors
from secateur.searches.file import rebuilt, structure_of
from small_vits import small_batches, small_vit
from torch.nn import functional

EMPTY = np.empty((1, 0), np.int64)


def rows_of(model, module, x):
    """What enters a module, (B, N, channels)."""
    seen = []
    handle = model.get_submodule(module).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[0]


def doubled(model, x):
    return model.double(), x.double()


# Scores


def test_neurons_make_a_heads_score(digits_model, digits_images):
    stats = sc.calibrate(digits_model, [digits_images])
    kept = sc.plan(digits_model, stats, method="snp", ratios={"heads": 0.4}).keep
    for index, block in enumerate(digits_model.blocks):
        rows = block.attn.qkv.weight.detach()[2 * 93 :].double().numpy()
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        cosines = np.abs(rows @ rows.T)
        own = np.kron(np.eye(3), np.ones((31, 31)))
        similarity = ((1 - cosines) * (1 - own)).sum(1).reshape(3, 31).mean(1)
        importance = stats.importance(f"blocks.{index}.qk").mean(1)
        score = importance / importance.sum() + similarity / similarity.sum()
        np.testing.assert_array_equal(kept[f"blocks.{index}.heads"], [np.sort(np.argsort(-score)[:2])])


@pytest.mark.parametrize("kind", ["digits", "qk_norm", "gate", "identity_head", "no_pool", "distilled"])
def test_gradient_scores_are_michels(request, kind):
    """|Att_h · ∂L/∂Att_h| of every image by itself, L by its own answer; frozen weights or not."""
    if kind == "digits":
        model, x = request.getfixturevalue("digits_model"), request.getfixturevalue("digits_images")[:11]
    else:
        model = make(kind)
        x = images(model, 11)
    model, x = doubled(model, x)
    expected = []
    for image in x:
        seen = {}
        handles = [
            block.attn.proj.register_forward_pre_hook(lambda m, args, i=i, to=seen: to.update({i: args[0]}))
            for i, block in enumerate(model.blocks)
        ]
        out = model(image[None])
        for handle in handles:
            handle.remove()
        if kind == "identity_head":
            loss = (out**2).sum() / 2
        else:
            loss = functional.cross_entropy(out.flatten(0, -2), out.argmax(-1).flatten(), reduction="sum")
        gradients = torch.autograd.grad(loss, [seen[i] for i in range(len(model.blocks))])
        heads = model.blocks[0].attn.num_heads
        expected.append(
            [
                (seen[i] * gradient).unflatten(-1, (heads, -1)).sum((0, 1, 3)).abs().numpy(force=True)
                for i, gradient in enumerate(gradients)
            ]
        )
    expected = np.mean(expected, axis=0)
    for frozen in (False, True):
        model.requires_grad_(not frozen)
        stats = sc.calibrate(model, [x[:7], x[7:]], head_gradients=True)
        assert not stats.sensitive
        found = [stats.head_importance(f"blocks.{i}.heads") for i in range(len(model.blocks))]
        np.testing.assert_allclose(found, expected, rtol=1e-8)
        assert all(parameter.grad is None for parameter in model.parameters())
    plan = sc.plan(model, stats, method="snp", ratios={"heads": 0.4}, head_score="michel")
    for index, scores in enumerate(expected):
        np.testing.assert_array_equal(plan.keep[f"blocks.{index}.heads"], [np.sort(np.argsort(-scores)[:2])])


@pytest.mark.parametrize("kind", ["digits", "registers_layer_scale", "post_norm", "identity_head"])
def test_removal_is_what_the_output_moves_by(request, kind):
    if kind == "digits":
        model, x = request.getfixturevalue("digits_model"), request.getfixturevalue("digits_images")[:20]
    else:
        model = make(kind)
        x = images(model, 20)
    model, x = doubled(model, x)
    stats = sc.calibrate(model, [x[:9], x[9:]], sensitivity="noise")
    for index, (layer, branch) in itertools.product(range(2), (("attn", "drop_path1"), ("mlp", "drop_path2"))):
        name = f"blocks.{index}.{layer}"
        with torch.no_grad():
            dense = model(x)
            gone = reference.masked(model, {name: EMPTY})(x)
            means = []
            for part in (x[:9], x[9:]):
                module = model.get_submodule(f"blocks.{index}.{branch}")
                handle = module.register_forward_hook(lambda m, a, out: out.mean((0, 1)).expand_as(out))
                means.append(model(part))
                handle.remove()
        expected = []
        for other in (gone, torch.cat(means)):
            if kind == "identity_head":
                halves = [
                    (dense[s] - other[s]).square().mean()
                    / (dense[s] - dense[s].mean(0)).square().mean()
                    * len(dense[s])
                    for s in (slice(0, 9), slice(9, 20))
                ]
                expected.append(float(sum(halves)) / 20)
            else:
                first, second = dense.log_softmax(1), other.log_softmax(1)
                expected.append(float((first.exp() * (first - second)).sum(1).mean()))
        np.testing.assert_allclose(stats.removal(name), expected, rtol=1e-8)
        assert stats.sensitivity(name) == stats.removal(name)[0]


# Refitting what stays


@pytest.mark.parametrize(("heads", "size", "rows"), [(4, 3, 200), (5, 7, 90), (3, 9, 20), (1, 4, 30)])
def test_elimination_takes_the_head_that_least_squares_misses_least(heads, size, rows):
    """Against lstsq over the rows themselves, also where they are fewer than the channels."""
    generator = torch.Generator().manual_seed(heads)
    x = torch.randn(rows, heads * size, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(heads * size, heads * size, generator=generator, dtype=torch.float64)
    x = x - x.mean(0)
    weight = torch.randn(11, heads * size, generator=generator, dtype=torch.float64)
    y = x @ weight.mT

    def missed(staying):
        columns = [head * size + i for head in staying for i in range(size)]
        if not columns:
            return float(y.square().sum())
        fitted = x[:, columns] @ torch.linalg.lstsq(x[:, columns], y, driver="gelsd").solution
        return float((y - fitted).square().sum())

    order = eliminate_heads(weight, x.mT @ x / rows, heads, 1e-12).tolist()
    assert sorted(order) == list(range(heads))
    staying = list(range(heads))
    for head in order:
        costs = {each: missed([other for other in staying if other != each]) for each in staying}
        assert costs[head] <= min(costs.values()) + 1e-6 * missed([])
        staying.remove(head)
    errors = head_errors(weight, x.mT @ x / rows, torch.tensor(order))
    expected = [missed(order[heads - count :]) / missed([]) for count in range(heads + 1)]
    np.testing.assert_allclose(errors, expected, atol=1e-6)
    assert not head_errors(weight * 0, x.mT @ x, torch.tensor(order)).any()


@pytest.fixture(scope="module")
def many_rows(make_digits_model, digits_loader):
    """The trained model in float64, 320 images, and their statistics."""
    images = torch.cat([batch for batch, _ in itertools.islice(digits_loader, 5)])
    model, x = doubled(make_digits_model().requires_grad_(False), images)
    return model, x, sc.calibrate(model, [x])


@pytest.mark.parametrize("method", ["refit", "project"])
def test_the_projection_is_refitted_to_the_rows(many_rows, method):
    """Of the trained model: the new projection is least squares of the whole output on the staying heads' values."""
    model, x, stats = many_rows
    plan = sc.plan(model, stats, method=method, ratios={"heads": 0.34})
    pruned = copy.deepcopy(model)
    sc.prune(pruned, plan)
    # The first layer's input is the dense model's.
    z = rows_of(model, "blocks.0.attn.proj", x).flatten(0, 1)
    kept = plan.keep["blocks.0.heads"][0]
    seen = z.unflatten(1, (3, 31))[:, kept].flatten(1)
    y = model.blocks[0].attn.proj(z)
    design = torch.cat([seen, torch.ones(len(seen), 1, dtype=torch.float64)], 1)
    best = y - design @ torch.linalg.lstsq(design, y, driver="gelsd").solution
    found = y - pruned.blocks[0].attn.proj(rows_of(pruned, "blocks.0.attn.proj", x).flatten(0, 1))
    assert float(found.square().sum()) <= 1.02 * float(best.square().sum())
    costs = []
    for pair in itertools.combinations(range(3), 2):
        columns = torch.cat([z.unflatten(1, (3, 31))[:, pair].flatten(1), torch.ones(len(z), 1).double()], 1)
        rest = y - columns @ torch.linalg.lstsq(columns, y, driver="gelsd").solution
        rest = rest - rest.mean(1, keepdim=True)  # the next norm does not see it
        costs.append((float(rest.square().sum()), list(pair)))
    assert min(costs)[1] == kept.tolist()


@pytest.mark.parametrize("method", ["refit", "project"])
@pytest.mark.parametrize("kind", ["plain", "no_proj_bias", "gate", "registers_layer_scale"])
def test_a_head_that_repeats_another_costs_nothing(method, kind):
    model = make(kind)
    with torch.no_grad():
        for block in model.blocks:
            layer = block.attn.qkv
            for start in (0, 39, 78):
                layer.weight[start + 26 : start + 39] = layer.weight[start : start + 13]
                layer.bias[start + 26 : start + 39] = layer.bias[start : start + 13]
            if block.attn.gate is not None:
                block.attn.gate.weight[26:39] = block.attn.gate.weight[:13]
                block.attn.gate.bias[26:39] = block.attn.gate.bias[:13]
    x = images(model, 24)
    stats = sc.calibrate(model, [x])
    plan = sc.plan(model, stats, method=method, ratios={"heads": 0.34})
    assert all(1 in kept[0] and len(kept[0]) == 2 for name, kept in plan.keep.items() if name.endswith("heads"))
    pruned = copy.deepcopy(model)
    sc.prune(pruned, plan)
    with torch.no_grad():
        expected = model(x)
        assert float((pruned(x) - expected).abs().max()) < 1e-3 * float(expected.abs().max())
        plain = copy.deepcopy(model)
        sc.prune(plain, sc.plan(model, stats, method="snp", ratios={"heads": 0.34}))
        assert float((plain(x) - expected).abs().max()) > 1e-2 * float(expected.abs().max())


@pytest.mark.parametrize("head_score", ["error", "neurons", "michel"])
@pytest.mark.parametrize("method", ["refit", "project"])
def test_with_everything_else_cut_too_the_plan_means_what_it_says(trained_double, digits_images, method, head_score):
    """The dense-shaped model with the plan's weights, written apart from the library, computes the same."""
    (model, stats), x = trained_double, digits_images.double()
    ratios = {"heads": 0.34, "qk": 0.3, "v": 0.4, "ffn": 0.5, "width": 0.1, "blocks.1.attn": 1, "blocks.2.mlp": 1}
    plan = sc.plan(model, stats, method=method, ratios=ratios, head_score=head_score)
    assert not any(name.startswith(("blocks.1.attn", "blocks.1.norm1", "blocks.2.mlp")) for name in plan.weights)
    pruned = copy.deepcopy(model)
    report = sc.prune(pruned, plan)
    assert (report.params, report.macs) == (plan.params, plan.macs)
    with torch.no_grad():
        expected = reference.substituted(model, plan)(x)
        assert float((pruned(x) - expected).abs().max()) <= 1e-9 * float(expected.abs().max())


def test_fewer_heads_lose_less_refitted_than_cut(digits_model, digits_images, digits_statistics):
    dense = digits_model(digits_images).log_softmax(1).detach()
    lost = {}
    for method in ("snp", "refit", "project"):
        pruned = copy.deepcopy(digits_model)
        sc.prune(pruned, sc.plan(digits_model, digits_statistics, method=method, ratios={"heads": 0.34}))
        with torch.no_grad():
            lost[method] = float((dense.exp() * (dense - pruned(digits_images).log_softmax(1))).sum(1).mean())
    assert max(lost["refit"], lost["project"]) < 0.5 * lost["snp"]


# Layers


def with_mean(model, x, layer):
    """The dense model whose layer adds what it adds on the mean over the calibration rows."""
    _, index, child = layer.split(".")
    branch = model.get_submodule(f"blocks.{index}.drop_path{1 if child == 'attn' else 2}")
    seen = []
    handle = branch.register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        model(x)
    handle.remove()
    mean = seen[0].mean((0, 1))
    changed = copy.deepcopy(model)
    changed.get_submodule(f"blocks.{index}.drop_path{1 if child == 'attn' else 2}").register_forward_hook(
        lambda m, a, out: mean.expand_as(out)
    )
    return changed


@pytest.mark.parametrize(
    "kind", ["plain", "no_class_token", "registers_layer_scale", "distilled", "no_proj_bias", "hybrid", "max_pool"]
)
def test_a_layer_leaves_its_mean(kind):
    """Every layer and method, with the statistics of one calibration."""
    model = make(kind).double()
    x = images(model, 9).double()
    stats = sc.calibrate(model, [x])
    for layer in ("blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp"):
        with torch.no_grad():
            expected = with_mean(model, x, layer)(x)
            assert float((model(x) - expected).abs().max()) > 1e-3, layer
        for method in ("refit", "project"):
            pruned = copy.deepcopy(model)
            sc.prune(pruned, sc.plan(model, stats, method=method, ratios={layer: 1}))
            with torch.no_grad():
                error = float((pruned(x) - expected).abs().max())
            assert error <= 1e-6 * float(expected.abs().max()), (layer, method)


@pytest.mark.parametrize("kind", ["norm_pre", "post_norm", "patch_norm"])
def test_no_mean_is_left_where_a_norm_follows(kind):
    model = make(kind).double()
    x = images(model, 9).double()
    stats = sc.calibrate(model, [x])
    pruned = copy.deepcopy(model)
    sc.prune(pruned, sc.plan(model, stats, method="refit", ratios={"blocks.0.attn": 1}))
    with torch.no_grad():
        expected = reference.masked(model, {"blocks.0.attn": EMPTY})(x)
        assert float((pruned(x) - expected).abs().max()) <= 1e-9


def test_two_layers_in_a_row_leave_both_means(digits_model, digits_images):
    model, x = doubled(digits_model, digits_images)
    stats = sc.calibrate(model, [x])
    pruned = copy.deepcopy(model)
    sc.prune(pruned, sc.plan(model, stats, method="project", ratios={"blocks.1.attn": 1, "blocks.1.mlp": 1}))
    means = [rows_of(model, f"blocks.1.{name}", x).mean((0, 1)) for name in ("drop_path1", "drop_path2")]
    block = model.blocks[1]
    block.drop_path1.register_forward_hook(lambda m, a, out: means[0].expand_as(out))
    block.drop_path2.register_forward_hook(lambda m, a, out: means[1].expand_as(out))
    with torch.no_grad():
        expected = model(x)
        assert float((pruned(x) - expected).abs().max()) <= 1e-6 * float(expected.abs().max())


def test_a_fraction_of_all_layers_takes_those_that_matter_least(digits_model, digits_images):
    stats = sc.calibrate(digits_model, [digits_images], sensitivity="noise")
    removal = {
        group.name: stats.removal(group.name)[0] for group in sc.inspect(digits_model).groups if group.kind == "layer"
    }
    for fraction, count in ((0.2, 1), (0.34, 2)):
        plan = sc.plan(digits_model, stats, method="snp", ratios={"layer": fraction})
        assert set(plan.keep) == set(sorted(removal, key=removal.get)[:count])
    # One of each stays, whatever is asked for, and a name of its own is not overruled.
    plan = sc.plan(digits_model, stats, method="snp", ratios={"layer": 0.99})
    assert len(plan.keep) == 4
    assert all(sum(f"blocks.{i}.{layer}" in plan.keep for i in range(3)) == 2 for layer in ("attn", "mlp"))
    most = max(removal, key=removal.get)
    assert most in sc.plan(digits_model, stats, method="snp", ratios={"layer": 0.2, most: 1}).keep
    plain = sc.calibrate(digits_model, [digits_images])
    with pytest.raises(sc.InvalidArgument, match=r"ratios\['layer'\]: expected layers by name"):
        sc.plan(digits_model, plain, method="snp", ratios={"layer": 0.5})


# After the cut


@pytest.fixture
def cut(digits_model, digits_images):
    """A trained model without two layers and with fewer heads, and what it was."""
    stats = sc.calibrate(digits_model, [digits_images])
    ratios = {"heads": 0.34, "qk": 0.2, "blocks.0.mlp": 1, "blocks.2.attn": 1}
    pruned = copy.deepcopy(digits_model)
    sc.prune(pruned, sc.plan(digits_model, stats, method="project", ratios=ratios))
    return pruned


def test_files(cut, digits_images, tmp_path):
    sc.save(cut, tmp_path / "m.safetensors")
    again = sc.load(tmp_path / "m.safetensors")
    with torch.no_grad():
        assert torch.equal(again(digits_images), cut(digits_images))
    assert sc.inspect(again).absent == ("blocks.0.mlp", "blocks.2.attn")
    assert "without blocks.0.mlp, blocks.2.attn" in str(sc.inspect(again))


def test_a_search_goes_on_with_what_is_left(digits_model, digits_images):
    """What a search's file says of a model without heads and layers gives it back."""
    stats = sc.calibrate(digits_model, [digits_images])
    pruned = copy.deepcopy(digits_model)
    ratios = {"heads": 0.34, "width": 0.1, "blocks.0.mlp": 1}
    sc.prune(pruned, sc.plan(digits_model, stats, method="project", ratios=ratios))
    again = rebuilt(digits_model, structure_of(pruned, digits_model), pruned.state_dict())
    with torch.no_grad():
        assert torch.equal(again(digits_images), pruned(digits_images))


@pytest.mark.parametrize("layout", ["exact", "stock"])
def test_a_second_round(cut, digits_images, layout, tmp_path):
    x = digits_images.double()
    cut.double()
    stats = sc.calibrate(cut, [x], sensitivity="noise")
    with torch.no_grad():
        before = cut(x)
    target = sc.Target(macs=0.8)
    plan = sc.plan(cut, stats, method="project", target=target, groups=("qk", "v", "ffn", "heads", "layer", "width"))
    plan.save(tmp_path / "p.json")
    assert sc.Plan.load(tmp_path / "p.json").loss == plan.loss
    report = sc.prune(cut, sc.Plan.load(tmp_path / "p.json"), layout=layout)
    assert 0.7 * report.macs[0] < plan.macs[1] <= 0.8 * report.macs[0]
    with torch.no_grad():
        after = cut(x)
    assert float((after.argmax(1) == before.argmax(1)).double().mean()) > 0.9
    sc.save(cut, tmp_path / "m.safetensors")
    with torch.no_grad():
        assert torch.equal(sc.load(tmp_path / "m.safetensors")(x), after)


def test_block_by_block(digits_model, digits_images):
    pruned = copy.deepcopy(digits_model)
    ratios = {"heads": 0.34, "ffn": 0.5, "blocks.1.attn": 1, "blocks.2.mlp": 1}
    report = sc.prune_sequential(pruned, [digits_images], "project", ratios=ratios)
    assert report.groups["blocks.1.attn"] == (1, 0)
    assert report.groups["blocks.0.heads"] == (3, 2)
    assert sc.inspect(pruned).absent == ("blocks.1.attn", "blocks.2.mlp")
    assert report.params[1] == sum(parameter.numel() for parameter in pruned.parameters())
    again = copy.deepcopy(pruned)
    sc.prune_sequential(again, [digits_images], "refit", ratios={"qk": 0.5, "ffn": 0.2})
    empty = copy.deepcopy(digits_model)
    sc.prune_sequential(empty, [digits_images], "snp", ratios={"blocks.0.attn": 1, "blocks.0.mlp": 1})
    report = sc.prune_sequential(empty, [digits_images], "project", ratios={"width": 0.1, "v": 0.2})
    assert report.groups["width"] == (93, 84)
    with pytest.raises(sc.InvalidArgument, match="head_score: expected one that takes no gradients"):
        sc.prune_sequential(pruned, [digits_images], "project", ratios=ratios, head_score="michel")


def test_torch_takes_what_is_left(cut, digits_images):
    with torch.no_grad():
        expected = cut(digits_images[:3])
        exported = torch.export.export(cut, (digits_images[:3],)).module()
        torch.testing.assert_close(exported(digits_images[:3]), expected)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls its own compiler old
            torch.testing.assert_close(torch.jit.script(cut)(digits_images[:3]), expected)
        torch.testing.assert_close(
            cut.forward_intermediates(digits_images[:3])[0], cut.forward_features(digits_images[:3])
        )
        cut.set_grad_checkpointing(True)
    logits = cut.train()(digits_images[:3])
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in cut.parameters())


@pytest.mark.parametrize(
    ("ratios", "text"),
    [
        ({"blocks.0.attn": 0.5}, r"ratios\['blocks.0.attn'\]: expected 0 or 1 for a layer, got 0.5"),
        ({f"blocks.{i}.mlp": 1 for i in range(3)}, "ratios: expected at least one FFN layer to stay, got none"),
        ({f"blocks.{i}.attn": 1 for i in range(3)}, "ratios: expected at least one attention layer to stay, got none"),
        ({"heads": 1.0}, r"ratios\['heads'\]: expected a fraction in \[0, 1\)"),
    ],
)
def test_ratios_that_leave_nothing(digits_model, digits_images, ratios, text):
    stats = sc.calibrate(digits_model, [digits_images[:8]])
    with pytest.raises(sc.InvalidArgument, match=text):
        sc.plan(digits_model, stats, method="snp", ratios=ratios)


def test_targets_need_to_tell_layers_apart(digits_model, digits_images):
    stats = sc.calibrate(digits_model, [digits_images[:8]])
    with pytest.raises(sc.InvalidArgument, match="groups: expected no 'layer' in a uniform allocation"):
        sc.plan(digits_model, stats, method="snp", target=sc.Target(macs=0.5), groups=("qk", "layer"))
    with pytest.raises(sc.InvalidArgument, match="stats: expected the gradients of 'blocks.0.heads'"):
        sc.plan(digits_model, stats, method="snp", ratios={"heads": 0.5}, head_score="michel")
    plan = sc.plan(digits_model, stats, method="snp", target=sc.Target(macs=0.5), groups=("heads", "ffn"))
    assert {plan.keep[f"blocks.{i}.heads"].shape[1] for i in range(3)} == {2}


def test_a_plan_that_leaves_no_layer_is_refused(digits_model, digits_images):
    stats = sc.calibrate(digits_model, [digits_images[:8]])
    plan = sc.plan(digits_model, stats, method="snp", ratios={"blocks.0.mlp": 1, "ffn": 0.5})
    plan.keep["blocks.1.mlp"] = plan.keep["blocks.2.mlp"] = EMPTY
    before = copy.deepcopy(digits_model)
    with pytest.raises(sc.InvalidArgument, match="plan.keep: expected at least one FFN layer to stay, got none"):
        sc.prune(digits_model, plan)
    with torch.no_grad():
        assert torch.equal(digits_model(digits_images[:2]), before(digits_images[:2]))


def test_layers_behind_layer_scales_that_half_precision_cannot_undo():
    model = small_vit(init_values=1e-5)
    with torch.no_grad():
        for block in model.blocks:
            for scale in (block.ls1, block.ls2):
                scale.gamma.copy_(3e-5 * torch.randn_like(scale.gamma))
        model.blocks[1].ls1.gamma.normal_()
        model.blocks[1].attn.proj.bias.add_(1.0)
    images = torch.cat(small_batches())
    for dtype in (torch.float16, torch.float32):
        half = copy.deepcopy(model).to(dtype)
        stats = sc.calibrate(half, small_batches())
        for method in ("refit", "project"):
            pruned = copy.deepcopy(half)
            plan = sc.plan(pruned, stats, method=method, ratios={"blocks.1.attn": 1})
            assert all(bool(value.isfinite().all()) for value in plan.weights.values())
            sc.prune(pruned, plan)
            assert bool(pruned(images.to(dtype)).isfinite().all())
