"""Plans that change weights: exact against the dense-shaped model, free where units are redundant."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import reference
import secateur as sc
import torch
from models import BASE, KINDS, images, make
from prepared import prepared
from secateur.families.vision_transformer.modules import PrunedAttention
from secateur.methods.handlers.width import unexplained
from secateur.methods.linalg import bases as project
from secateur.methods.linalg import stream, values
from small_vits import small_batches, small_vit
from torch import nn

# What a change of the residual stream's basis is refused for, and the word that names it.
FIXED_STREAM = {
    "max_pool": "global_pool",
    "norm_pre": "norm_pre",
    "patch_norm": "patch_embed.norm",
    "identity_head": "Identity",
    "no_final_norm": "final_norm",
    "no_final_norm_with_head": "final_norm",
    "map_pool": "attn_pool",
    "map_pool_prefix": "attn_pool",
}
KINDS_CUT = ("qk", "v", "ffn", "width")


def calibrated(model, batches=3, **options):
    return sc.calibrate(model, [images(model, 6, seed) for seed in range(batches)], **options)


def planned(model, method, kinds, fraction=0.4, stats=None):
    stats = stats or calibrated(model)
    return sc.plan(model, stats, method=method, ratios=dict.fromkeys(kinds, fraction))


@torch.no_grad()
def check(dense, method, kinds, x, fraction=0.4, stats=None):
    """A plan for the float64 model and one for the float32 model, each held to its bar."""
    double = copy.deepcopy(dense).double()
    plan = planned(double, method, kinds, fraction, stats)
    wanted = reference.substituted(double, plan)
    expected = reference.outputs_to_compare(wanted(x.double()), wanted, plan.keep)
    scale = max(1.0, float(expected.abs().max()))
    sc.prune(double, plan)
    for fused in (True, False):
        for module in double.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused
        assert float((double(x.double()) - expected).abs().max()) <= 1e-10 * scale

    single = copy.deepcopy(dense)
    plan = planned(single, method, kinds, fraction)
    shaped = reference.substituted(single, plan)
    expected = reference.outputs_to_compare(copy.deepcopy(shaped).double()(x.double()), shaped, plan.keep)
    own = reference.outputs_to_compare(shaped(x), shaped, plan.keep).double() - expected
    sc.prune(single, plan)
    bar = max(4 * float(own.abs().max()), 64 * torch.finfo(torch.float32).eps * scale)
    assert float((single(x).double() - expected).abs().max()) <= bar
    return double


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["project", "refit"])
def test_every_kind_is_exact_or_refused(kind, method):
    dense = make(kind)
    kinds = KINDS_CUT
    if method == "project" and kind in FIXED_STREAM:
        with pytest.raises(sc.Unsupported, match=FIXED_STREAM[kind]):
            planned(dense, method, ("width",))
        kinds = ("qk", "v", "ffn")
    pruned = check(dense, method, kinds, images(dense))
    assert sum(p.numel() for p in pruned.parameters()) == sc.inspect(pruned).params < sc.inspect(dense).params


@pytest.mark.parametrize("allocation", [None, "error"])
def test_a_target_says_why_the_width_cannot_be_turned(allocation):
    dense = make("norm_pre")
    stats = calibrated(dense, sensitivity="noise")
    for groups in (KINDS_CUT, ("width",)):
        with pytest.raises(sc.Unsupported, match="width: expected a residual stream that can be rotated.*norm_pre"):
            sc.plan(dense, stats, method="project", target=sc.Target(macs=0.7), groups=groups, allocation=allocation)


@pytest.mark.parametrize("method", ["project", "refit"])
@pytest.mark.parametrize("cut", KINDS_CUT)
def test_one_group_of_a_trained_model(digits_model, digits_images, method, cut):
    x = digits_images[:8]
    check_model = copy.deepcopy(digits_model)
    double = copy.deepcopy(check_model).double()
    stats = sc.calibrate(double, [digits_images[8:]])
    plan = sc.plan(double, stats, method=method, ratios={cut: 0.3})
    with torch.no_grad():
        wanted = reference.substituted(double, plan)
        expected = wanted(x.double())
        sc.prune(double, plan)
        assert float((double(x.double()) - expected).abs().max()) <= 1e-10 * max(1.0, float(expected.abs().max()))


def low_rank(weight, rank, generator):
    left = torch.randn(len(weight), rank, generator=generator, dtype=weight.dtype)
    return left @ torch.randn(rank, weight.shape[1], generator=generator, dtype=weight.dtype) / len(weight) ** 0.5


@pytest.mark.parametrize("kind", ["plain", "rms_norm", "registers_layer_scale", "no_qkv_bias", "distilled", "fc_norm"])
@torch.no_grad()
def test_what_is_redundant_costs_nothing(kind):
    """Heads of rank 5 of 13, twin FFN units, a stream within 30 of 39 directions: cut to that, nothing changes."""
    model = make(kind).double()
    generator = torch.Generator().manual_seed(1)
    held = torch.linalg.qr(torch.randn(39, 29, generator=generator, dtype=torch.float64))[0]
    within = held @ held.mT
    for block in model.blocks:
        weight = block.attn.qkv.weight.unflatten(0, (3, 3, 13))
        for part in weight.flatten(0, 1):
            part.copy_(low_rank(part, 5, generator))
        if block.attn.qkv.bias is not None:
            block.attn.qkv.bias.zero_()
        hidden = block.mlp.fc1.out_features // 2
        block.mlp.fc1.weight[hidden : 2 * hidden] = block.mlp.fc1.weight[:hidden]
        block.mlp.fc1.bias[hidden : 2 * hidden] = block.mlp.fc1.bias[:hidden]
    for name, parameter in model.named_parameters():
        if name.endswith((".proj.weight", ".fc2.weight", ".proj.bias", ".fc2.bias")):
            parameter.copy_((within @ parameter.reshape(39, -1)).view_as(parameter))
        elif name in ("cls_token", "reg_token", "dist_token", "pos_embed"):
            parameter.copy_(parameter @ within)
        elif name.endswith(".gamma"):
            parameter.fill_(0.3)
    x = images(model, 4, 99).double()
    before = model(x)
    stats = calibrated(model, batches=20)
    hidden = model.blocks[0].mlp.fc1.out_features
    sizes = {"qk": 8 / 13, "v": 8 / 13, "ffn": (hidden // 2) / hidden, "width": 8 / 39}
    # Twins need a ridge to be told from others that are nearly as redundant.
    for cut_kind, bar in (("qk", 1e-5), ("v", 1e-5), ("ffn", 5e-3), ("width", 1e-5)):
        pruned = copy.deepcopy(model)
        sc.prune(pruned, sc.plan(pruned, stats, method="project", ratios={cut_kind: sizes[cut_kind]}))
        assert float((pruned(x) - before).abs().max()) <= bar * float(before.abs().max()), cut_kind


@torch.no_grad()
def test_a_layernorm_stream_has_one_direction_less_than_channels():
    """The stock form of r directions in r + 1 channels: all D channels are the D − 1 directions that LayerNorm sees."""
    channels = stream.stock_basis(7)
    assert float((channels.mT @ channels - torch.eye(6)).abs().max()) < 1e-14
    assert float(channels.sum(0).abs().max()) < 1e-14
    generator = torch.Generator().manual_seed(0)
    for size, eps in ((39, 1e-6), (39, 0.3)):
        x = torch.randn(50, size, dtype=torch.float64, generator=generator)
        seen = x - x.mean(1, keepdim=True)
        # The stream lies in 20 of its directions: 21 channels hold it, with the eps in proportion.
        basis = torch.linalg.svd(seen[:20], full_matrices=False)[2].mT
        seen = seen @ basis @ basis.mT
        kept = stream.stock_basis(21) @ basis.mT
        small = nn.LayerNorm(21, eps=eps * size / 21, elementwise_affine=False).double()
        dense = nn.LayerNorm(size, eps=eps, elementwise_affine=False).double()
        found = small(seen @ kept.mT) @ kept * (size / 21) ** 0.5
        assert float((found - dense(seen)).abs().max()) < 1e-12


def scores_of(q, k, mask=None):
    centred = k - k.mean(1, keepdim=True)
    return torch.einsum("bnhd,bmhd->bhnm", q, centred)


def query_key(heads=2, dim=7, tokens=11, batch=6, seed=0, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(2, heads, dim, dim, generator=generator, dtype=torch.float64) * 0.7 ** torch.arange(dim)
    q, k = torch.randn(2, batch, tokens, heads, dim, generator=generator, dtype=torch.float64)
    return torch.einsum("bnhd,hde->bnhe", q, mix[0]) + offset, torch.einsum("bnhd,hde->bnhe", k, mix[1]) + offset


def grams(q, k):
    centred = k - k.mean(1, keepdim=True)
    return torch.einsum("bnhi,bnhj->bhij", q, q), torch.einsum("bnhi,bnhj->bhij", centred, centred)


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_score_errors_are_those_of_the_literal_scores(offset):
    """Every rank at once from the Grams, against N × N scores of the cut queries and keys."""
    q, k = query_key(offset=offset)
    query_grams, key_grams = grams(q, k)
    basis = project.query_key_bases(query_grams.sum(0), key_grams.sum(0))
    found = project.score_errors(basis, query_grams, key_grams)
    full = scores_of(q, k)
    for rank in range(8):
        cut = basis.first(rank)
        new = scores_of(torch.einsum("bnhd,hrd->bnhr", q, cut.query), torch.einsum("bnhd,hrd->bnhr", k, cut.key))
        error = (full - new).square().sum((0, 2, 3)) / full.square().sum((0, 2, 3))
        assert torch.allclose(found[:, rank], error, rtol=1e-7, atol=1e-9)
    assert float(found[:, 7].abs().max()) == 0


def test_the_pooled_basis_is_the_best_of_its_rank():
    """For queries and keys of different images no pair of rank-r maps does better: Eckart and Young."""
    q, k = query_key(heads=1, batch=1, tokens=40)
    query_grams, key_grams = grams(q, k)
    basis = project.query_key_bases(query_grams[0], key_grams[0])
    values = torch.linalg.svdvals(scores_of(q, k)[0, 0])
    for rank in range(1, 7):
        error = project.score_errors(basis, query_grams, key_grams)[0, rank]
        assert torch.allclose(error, values[rank:].square().sum() / values.square().sum(), rtol=1e-8, atol=1e-12)


def test_what_widths_leaveunexplained():
    """All widths from one factor, against a regression at each."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(60, 11, dtype=torch.float64, generator=generator)
    rows = rows * 0.8 ** torch.arange(11) + rows[:, :1]
    found = unexplained(rows.mT @ rows)
    assert found.shape == (12,)
    for width in range(12):
        kept, rest = rows[:, :width], rows[:, width:]
        missed = rest - kept @ torch.linalg.pinv(kept) @ rest if width else rest
        assert float(found[width]) == pytest.approx(float(missed.square().sum()), rel=1e-4, abs=1e-6)
    # Negative by rounding, and of no rank: still finite.
    assert bool(unexplained(rows.mT @ rows - 10 * torch.eye(11)).isfinite().all())
    assert bool((unexplained(torch.zeros(3, 3, dtype=torch.float64)) < 1e-20).all())


def test_the_residual_basis_holds_most_of_what_all_norms_see():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(40, 13, 13, generator=generator, dtype=torch.float64)[0] for _ in range(3)]
    moments = [part.mT @ part for part in rows]
    basis = stream.residual_basis(moments)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(13, dtype=torch.float64), rtol=0, atol=1e-12)
    held = torch.stack([((basis.mT @ moment @ basis).diagonal()) for moment in moments]).sum(0)
    # The first r directions can hold no more than the r largest eigenvalues of the sum.
    torch.testing.assert_close(held, torch.linalg.eigvalsh(sum(moments)).flip(0), rtol=1e-10, atol=0)


def test_alternating_least_squares_lowers_the_error_on_images():
    """Two directions that are strong in queries or in keys, never in both of one image: pooled, they seem to matter."""
    q, k = query_key(batch=24, dim=7)
    strong = torch.arange(24) % 3 == 0
    for x, here in ((q, strong), (k, ~strong)):
        x[..., 4:] *= torch.where(here, 6.0, 0.05)[:, None, None, None]
    query_grams, key_grams = grams(q, k)
    start = project.query_key_bases(query_grams.sum(0), key_grams.sum(0)).first(3)
    better = project.improve(start, query_grams, key_grams)
    before, after = (project._error(basis, query_grams, key_grams) for basis in (start, better))
    assert bool((after <= before * (1 + 1e-9)).all())
    assert float(after.sum()) < 0.98 * float(before.sum())


def projected(weight, covariance, basis):
    refitted = weight @ covariance @ basis.mT @ torch.linalg.pinv(basis @ covariance @ basis.mT)
    lost = weight - refitted @ basis
    return float((lost @ covariance * lost).sum() / (weight @ covariance * weight).sum())


def test_value_sweeps_remove_what_heads_share():
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(500, 3, generator=generator, dtype=torch.float64)
    own = torch.randn(500, 15, generator=generator, dtype=torch.float64)
    z = torch.cat([shared + 0.1 * own[:, 3 * h : 3 * h + 3] for h in range(3)], 1)
    z = torch.cat([torch.cat([z[:, 3 * h : 3 * h + 3], own[:, 9 + 2 * h : 11 + 2 * h]], 1) for h in range(3)], 1)
    weight = torch.randn(8, 15, generator=generator, dtype=torch.float64)
    covariance = torch.cov(z.mT)
    parts = [slice(5 * head, 5 * head + 5) for head in range(3)]
    start = torch.block_diag(*(values._leading(weight[:, part], covariance[part, part], 2) for part in parts))
    basis = values.value_bases(weight, covariance, 3, 2)
    assert basis.shape == (6, 15)
    assert float((basis * (1 - torch.block_diag(*[torch.ones(2, 5)] * 3))).abs().max()) == 0
    assert projected(weight, covariance, basis) < 0.7 * projected(weight, covariance, start)
    bound = values.value_errors(weight, covariance, 3)
    assert bound.shape == (6,)
    assert float(bound[5]) == 0
    assert bool((bound.diff() <= 1e-12).all())


def test_value_sweeps_are_regressions_on_the_other_heads():
    """Each head from the whole covariance, as METHODS 2 writes it, against the moments that are kept up to date."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(300, 20, generator=generator, dtype=torch.float64)
    covariance = torch.cov((rows @ torch.randn(20, 20, generator=generator, dtype=torch.float64)).mT)
    weight = torch.randn(9, 20, generator=generator, dtype=torch.float64)
    parts = [torch.arange(5 * head, 5 * head + 5) for head in range(4)]

    def leading(matrix, spread):
        root = torch.linalg.cholesky(spread)
        return torch.linalg.svd(matrix @ root, full_matrices=False)[0][:, :2].mT @ matrix

    kept = [leading(weight[:, part], covariance[part][:, part]) for part in parts]
    for _ in range(2):
        for head, part in enumerate(parts):
            others = torch.zeros(6, 20, dtype=torch.float64)
            for place, other in enumerate([other for other in range(4) if other != head]):
                others[2 * place : 2 * place + 2, parts[other]] = kept[other]
            seen = others @ covariance
            left = covariance - seen.mT @ torch.linalg.solve(seen @ others.mT, seen)
            kept[head] = leading((weight @ left)[:, part] @ left[part][:, part].inverse(), left[part][:, part])
    found = values.value_bases(weight, covariance, 4, 2)
    for head, part in enumerate(parts):
        basis = found[2 * head : 2 * head + 2, part]
        # Up to signs.
        torch.testing.assert_close(basis.mT @ basis, kept[head].mT @ kept[head], rtol=1e-5, atol=1e-5)


def divergence(model, dense, x):
    with torch.no_grad():
        first, second = dense(x).log_softmax(1), model(x).log_softmax(1)
    return float((first.exp() * (first - second)).sum(1).mean())


def cut(model, stats, **arguments):
    model = copy.deepcopy(model)
    sc.prune(model, sc.plan(model, stats, **arguments))
    return model


@pytest.mark.parametrize("ratios", [{"qk": 0.7}, {"v": 0.6}, {"ffn": 0.5}, {"width": 0.3}])
def test_projection_loses_least_on_a_trained_model(digits_model, digits_statistics, digits_images, ratios):
    lost = {}
    for method in ("project", "refit", "snp"):
        pruned = cut(digits_model, digits_statistics, method=method, ratios=ratios)
        lost[method] = divergence(pruned, digits_model, digits_images)
    assert lost["project"] <= 1.02 * lost["refit"]
    assert lost["project"] < 0.5 * lost["snp"]


def test_the_allocation_by_error_loses_less_than_the_uniform_one(digits_model, digits_statistics, digits_images):
    for method, groups in (("project", KINDS_CUT), ("project", ("qk", "v", "ffn")), ("refit", ("qk", "v", "ffn"))):
        lost, macs = [], []
        for allocation in ("error", "uniform"):
            arguments = {"method": method, "target": sc.Target(macs=0.4), "groups": groups, "round_to": 3}
            plan = sc.plan(digits_model, digits_statistics, **arguments, allocation=allocation)
            macs.append(plan.macs[1] / plan.macs[0])
            model = copy.deepcopy(digits_model)
            sc.prune(model, plan)
            lost.append(divergence(model, digits_model, digits_images))
        assert lost[0] < lost[1], (method, groups, lost)
        assert all(0.38 < found <= 0.4 for found in macs)


@pytest.mark.parametrize("method", ["project", "refit", "snp"])
def test_what_the_output_depends_on_keeps_more(digits_model, digits_statistics, method):
    sizes = {}
    for factor in (1e-4, 1.0, 1e4):
        changed = sc.Statistics(digits_statistics.settings, digits_statistics.tensors)
        name = "sensitivity/blocks.1.ffn/divergence"
        changed.tensors[name] = changed.tensors[name] * [factor, 1.0]
        plan = sc.plan(digits_model, changed, method=method, target=sc.Target(macs=0.5), round_to=3)
        sizes[factor] = plan.keep["blocks.1.ffn"].shape[1] if "blocks.1.ffn" in plan.keep else 372
    assert sizes[1e-4] < sizes[1.0] < sizes[1e4]


def test_sensitivities_are_near_what_a_small_cut_does(digits_model, digits_statistics, digits_images):
    """Predicted loss, error times sensitivity, against the divergence that the cut causes: the same order."""
    method = prepared(digits_model, digits_statistics, "project")
    for name, kept in (("blocks.0.ffn", 200), ("blocks.1.v", 12), ("blocks.0.v", 16)):
        group = sc.inspect(digits_model).group(name)
        predicted = digits_statistics.sensitivity(name) * method.errors(group)[kept]
        found = divergence(
            cut(digits_model, digits_statistics, method="project", ratios={name: 1 - kept / group.size}),
            digits_model,
            digits_images,
        )
        # The errors of values are a bound, before the refit over all heads.
        assert predicted / 50 < found < 10 * predicted, (name, predicted, found)


def test_all_methods_know_their_errors(digits_model, digits_statistics):
    """Falling from the whole to nothing; with nothing cut, none is left."""
    anatomy = sc.inspect(digits_model)
    for method, kinds in (("project", KINDS_CUT), ("refit", ("qk", "v", "ffn"))):
        bound = prepared(digits_model, digits_statistics, method)
        for group in anatomy.groups:
            if group.kind in kinds:
                errors = bound.errors(group)
                assert errors.shape == (group.size + 1,)
                assert errors[-1] == 0
                assert errors[0] <= 1
                assert (np.diff(errors) <= 0).all()


def test_plan_file_with_weights(tmp_path, digits_model, digits_statistics, digits_images):
    plan = sc.plan(digits_model, digits_statistics, method="project", ratios=dict.fromkeys(KINDS_CUT, 0.25))
    path = tmp_path / "half.json"
    plan.save(path)
    first = path.read_bytes(), (tmp_path / "half.weights.safetensors").read_bytes()
    plan.save(path)
    assert first == (path.read_bytes(), (tmp_path / "half.weights.safetensors").read_bytes())
    models = [copy.deepcopy(digits_model) for _ in range(2)]
    sc.prune(models[0], plan)
    sc.prune(models[1], sc.Plan.load(path))
    with torch.no_grad():
        assert torch.equal(models[0](digits_images), models[1](digits_images))

    sc.plan(digits_model, digits_statistics, method="project", ratios={"v": 0.5}).save(tmp_path / "other.json")
    (tmp_path / "other.weights.safetensors").replace(tmp_path / "half.weights.safetensors")
    with pytest.raises(sc.InvalidArgument, match="another plan's"):
        sc.Plan.load(path)
    (tmp_path / "half.weights.safetensors").unlink()
    with pytest.raises(sc.InvalidArgument, match=r"half\.weights\.safetensors"):
        sc.Plan.load(path)


def test_weights_that_do_not_fit_are_refused_before_anything_changes(digits_model, digits_statistics):
    plan = sc.plan(digits_model, digits_statistics, method="project", ratios={"v": 0.5})
    before = {name: value.clone() for name, value in digits_model.state_dict().items()}
    name = "blocks.0.attn.proj.weight"
    for change, text in (
        ({"weights": {**plan.weights, name: plan.weights[name][1:]}}, "proj.weight"),
        ({"weights": {**plan.weights, "nothing.bias": torch.zeros(3)}}, "nothing.bias"),
        ({"eps": {"blocks.0.mlp": 1e-6}}, "blocks.0.mlp"),
        ({"eps": {"norm": -1.0}}, "plan.eps"),
    ):
        with pytest.raises(sc.InvalidArgument, match=text):
            sc.prune(digits_model, replace(plan, **change))
    with torch.no_grad():
        digits_model.blocks[0].attn.proj.bias[0] += 1
        with pytest.raises(sc.InvalidArgument, match="other weights"):
            sc.prune(digits_model, plan, strict=False)
        digits_model.blocks[0].attn.proj.bias.copy_(before["blocks.0.attn.proj.bias"])
    assert all(torch.equal(value, before[name]) for name, value in digits_model.state_dict().items())


@pytest.mark.parametrize("kind", ["plain", "no_qkv_bias", "no_proj_bias", "rms_norm", "registers_layer_scale"])
def test_a_projected_model_is_saved_loaded_and_cut_again(tmp_path, kind):
    model = make(kind)
    plan = planned(model, "project", KINDS_CUT, 0.3)
    sc.prune(model, plan)
    assert sum(p.numel() for p in model.parameters()) == plan.params[1]
    assert all(type(block.norm1).__module__.startswith(("timm", "torch")) for block in model.blocks)
    arguments = {k: v for k, v in {**BASE, **KINDS[kind]}.items() if k != "norm_layer"}
    if kind == "rms_norm":
        arguments["norm_layer"] = "rmsnorm"
    factory = ("VisionTransformer", arguments)
    sc.save(model, tmp_path / "model.safetensors", factory=factory)
    again = sc.load(tmp_path / "model.safetensors")
    x = images(model)
    with torch.no_grad():
        assert torch.equal(model(x), again(x))
    plan = planned(again, "project", KINDS_CUT, 0.2)
    with torch.no_grad():
        wanted = again(x)
        sc.prune(again, plan)
        assert bool(again(x).isfinite().all())
        assert isinstance(again.blocks[0].attn, PrunedAttention)
        assert float((again(x) - wanted).abs().max()) > 0
    assert json.loads(json.dumps(plan.to_dict()))["method"] == "project"


def test_dead_units_and_few_images_are_normal(digits_model, digits_images):
    """Fewer rows than dimensions and neurons that are never active: no error, no NaN, nothing wild."""
    with torch.no_grad():
        digits_model.blocks[0].mlp.fc1.weight[:50] = 0
        digits_model.blocks[0].mlp.fc1.bias[:50] = -20
        digits_model.blocks[1].attn.qkv.weight[:20] = 0
        digits_model.blocks[1].attn.qkv.bias[:20] = 0
    for count in (1, 2, 3):
        stats = sc.calibrate(digits_model, [digits_images[:count]], sensitivity="noise")
        for method in ("project", "refit"):
            kinds = KINDS_CUT if method == "project" else KINDS_CUT[:3]
            pruned = cut(digits_model, stats, method=method, ratios=dict.fromkeys(kinds, 0.4))
            with torch.no_grad():
                found, dense = pruned(digits_images), digits_model(digits_images)
            assert bool(found.isfinite().all())
            assert float(found.abs().max()) < 20 * float(dense.abs().max())


def test_bad_arguments(digits_model, digits_statistics, digits_images):
    target = sc.Target(macs=0.5)
    scores = sc.calibrate(digits_model, [digits_images[:4]], collect="scores")
    plain = sc.calibrate(digits_model, [digits_images[:4]])
    for stats, arguments, text in (
        (scores, {"method": "project", "target": target}, "stats: expected moments"),
        (plain, {"method": "project", "target": target, "allocation": "error"}, "sensitivities"),
        (
            digits_statistics,
            {"method": "refit", "selection": "snp", "target": target, "allocation": "error"},
            "allocation: expected a method",
        ),
        (
            digits_statistics,
            {"method": "snp", "target": target, "allocation": "best"},
            "allocation: expected 'measured'",
        ),
        (digits_statistics, {"method": "project", "ratios": {"v": 0.5}, "allocation": "error"}, "with ratios"),
        (digits_statistics, {"method": "refit", "target": target, "selection": "best"}, "selection"),
        (digits_statistics, {"method": "project", "target": target, "strict": False}, "strict"),
    ):
        with pytest.raises(sc.InvalidArgument, match=text):
            sc.plan(digits_model, stats, **arguments)


def test_a_width_that_cannot_be_turned_may_stay():
    model = make("no_final_norm").float()
    stats = sc.calibrate(model, [images(model, 8).float()], sensitivity="noise")
    arguments = {"target": sc.Target(macs=0.8), "groups": ("ffn", "width"), "freeze": ("width",), "round_to": 1}
    plan = sc.plan(model, stats, method="project", **arguments)
    assert "width" not in plan.keep


def test_one_channel_of_layer_norms_is_refused_with_words():
    model = small_vit()
    stats = sc.calibrate(model, small_batches())
    with pytest.raises(sc.InvalidArgument, match="width: expected at least 2 channels of a model of LayerNorms, got 1"):
        sc.plan(model, stats, method="project", ratios={"width": 0.98})
    assert sc.plan(model, stats, method="project", ratios={"width": 0.93}).keep["width"].shape[1] == 2
