"""The stock layout: timm's own attention classes, computing what the exact layout does, or a refusal by name."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import onnxruntime
import pytest
import reference
import secateur as sc
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launch import run_script
from models import BASE, KINDS, images, make
from pruning import check, plan_of, random_keep, set_fused
from safetensors.torch import save_file
from secateur.data.loader import loader
from secateur.families.vision_transformer.modules import PrunedAttention
from secateur.files import container
from secateur.surgery import stock_layout as layout
from timm.layers import Attention, AttentionPoolLatent, LayerNorm, Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

# Fractions of the query/key and value neurons that stay, per head of 13: odd counts, either larger, or one size.
FRACTIONS = {"qk < v": (0.4, 0.7), "qk > v": (0.7, 0.4), "equal": (0.55, 0.55), "v whole": (0.4, None)}


def uneven_keep(model, seed, qk, v, rest=("ffn", "width", "heads"), others=0.7):
    keep = random_keep(model, seed, ("qk",), qk) | random_keep(model, seed, rest, others)
    return keep if v is None else keep | random_keep(model, seed, ("v",), v)


def refusal(model, keep):
    """The module that timm's classes cannot hold after the cut, or None; from the model and the plan alone."""
    for index, block in enumerate(model.blocks):
        dense = block.attn.head_dim
        qk, v = (keep.get(f"blocks.{index}.{kind}", np.zeros((1, dense))).shape[1] for kind in ("qk", "v"))
        if qk < dense and not isinstance(block.attn.q_norm, nn.Identity):
            return f"blocks.{index}.attn.q_norm: "
        if v < qk and not isinstance(block.attn.norm, nn.Identity):
            return f"blocks.{index}.attn.norm: "
    if model.attn_pool is not None and "width" in keep and keep["width"].shape[1] < model.embed_dim:
        return "attn_pool: "
    return None


def check_refused(model, keep, text):
    """Nothing is changed: classes, objects, values, and what the model computes."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    types = [(type(module), module.extra_repr()) for module in model.modules()]
    model(images(model)).sum().backward()
    with pytest.raises(sc.Unsupported, match=f"^{text}expected .*stock layout.* got .*use layout='exact'"):
        sc.prune(model, plan_of(model, keep), layout="stock")
    assert [(type(module), module.extra_repr()) for module in model.modules()] == types
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert any(parameter.grad is not None for parameter in model.parameters())


def is_stock(model):
    """Every attention module is timm's own, by exact class, with timm's own scale and nothing of ours left."""
    for block in model.blocks:
        attn = block.attn
        assert type(attn) is Attention
        assert attn.attn_dim == attn.num_heads * attn.head_dim == attn.proj.in_features
        assert attn.qkv.out_features == 3 * attn.attn_dim
        assert attn.scale == attn.head_dim**-0.5
        plain = vars(Attention(6, 2))
        assert {name for name in vars(attn) if not name.startswith("_")} <= set(plain)
    assert model.attn_pool is None or type(model.attn_pool) is AttentionPoolLatent
    return not any(type(module).__module__.startswith("secateur") for module in model.modules())


def both(model, plan):
    """The model in both layouts."""
    exact, stock = copy.deepcopy(model), copy.deepcopy(model)
    sc.prune(exact, plan)
    sc.prune(stock, plan, layout="stock")
    return exact, stock


@torch.no_grad()
def distance(first, second, x):
    found = 0.0
    for fused in (True, False):
        set_fused(first, fused)
        set_fused(second, fused)
        found = max(found, float((first(x) - second(x)).abs().max()))
    return found


# All sizes where they decide whether timm's classes can hold the result, elsewhere two in turn.
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        (kind, sizes)
        for n, kind in enumerate(KINDS)
        for m, sizes in enumerate(FRACTIONS)
        if kind.startswith(("qk_", "inner_", "map_")) or (m - n) % 4 in (0, 2)
    ],
)
def test_every_kind_is_exact_or_refused(kind, sizes):
    dense = make(kind)
    keep = uneven_keep(dense, 3, *FRACTIONS[sizes])
    text = refusal(dense, keep)
    if text is not None:
        check_refused(dense, keep, text)
        keep = {name: kept for name, kept in keep.items() if name.endswith("ffn")}
        if "norm" not in text:
            keep = uneven_keep(dense, 3, *FRACTIONS[sizes], rest=("ffn",))
        elif dense.attn_pool is None:
            keep |= random_keep(dense, 3, ("width",), 0.7)
        assert refusal(dense, keep) is None
    pruned = check(dense, keep, images(dense), layout="stock")
    assert is_stock(pruned)
    exact, stock = both(dense.double(), plan_of(dense, keep))
    assert distance(exact, stock, images(dense).double()) <= 1e-10


def test_norms_that_lose_nothing_are_no_hindrance():
    """Whole queries behind a norm with fewer values; an inner norm with more values than queries."""
    dense = make("qk_norm")
    pruned = check(dense, random_keep(dense, 1, ("v", "ffn", "width"), 0.4), images(dense), layout="stock")
    assert is_stock(pruned)
    assert type(pruned.blocks[0].attn.q_norm) is type(dense.blocks[0].attn.q_norm)
    for kind in ("inner_norms", "inner_rms_norms"):
        dense = make(kind)
        pruned = check(dense, uneven_keep(dense, 1, 0.4, 0.7), images(dense), layout="stock")
        assert pruned.blocks[0].attn.norm.normalized_shape == (2 * 9,)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    seed=st.integers(0, 2**31 - 1),
    cut=st.sets(st.sampled_from(["qk", "v", "ffn", "width", "heads"]), min_size=1),
)
def test_random_plans(kind, seed, cut):
    dense = make(kind, seed)
    keep = random_keep(dense, seed, cut)
    text = refusal(dense, keep)
    if text is None:
        assert is_stock(check(dense, keep, images(dense, seed=seed), layout="stock"))
    else:
        check_refused(dense, keep, text)


@pytest.mark.parametrize("sizes", FRACTIONS)
def test_trained_model(digits_model, digits_images, sizes):
    keep = uneven_keep(digits_model, 2, *FRACTIONS[sizes])
    assert is_stock(check(digits_model, keep, digits_images[:8], layout="stock"))


@pytest.mark.parametrize("method", ["project", "refit"])
@pytest.mark.parametrize("kind", ["plain", "no_qkv_bias", "no_proj_bias", "rms_norm", "gate", "registers_layer_scale"])
def test_plans_that_change_weights(kind, method):
    """The plan's own biases, where the dense model has none, are padded and scaled like the rest."""
    dense = make(kind).double()
    stats = sc.calibrate(dense, [images(dense, 6, seed).double() for seed in range(3)])
    for qk, v in ((0.6, 0.3), (0.3, 0.6), (0.4, 0.4)):
        plan = sc.plan(dense, stats, method=method, ratios={"qk": qk, "v": v, "ffn": 0.4, "width": 0.2})
        exact, stock = both(dense, plan)
        assert is_stock(stock)
        x = images(dense).double()
        assert distance(exact, stock, x) <= 1e-10
        if method == "project" and kind == "no_qkv_bias":
            assert stock.blocks[0].attn.qkv.bias.shape == (3 * stock.blocks[0].attn.attn_dim,)
        shaped = reference.substituted(dense, plan)
        with torch.no_grad():
            expected = reference.outputs_to_compare(shaped(x), shaped, plan.keep)
            assert float((stock(x) - expected).abs().max()) <= 1e-10 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("method", ["project", "refit"])
def test_plans_that_change_a_trained_models_weights(digits_model, digits_images, method):
    """In float32, at most four times the reference's own error."""
    x = digits_images[:8]
    stats = sc.calibrate(digits_model, [digits_images[8:]])
    plan = sc.plan(digits_model, stats, method=method, ratios={"qk": 0.6, "v": 0.3, "ffn": 0.4, "width": 0.1})
    shaped = reference.substituted(digits_model, plan)
    sc.prune(digits_model, plan, layout="stock")
    with torch.no_grad():
        expected = copy.deepcopy(shaped).double()(x.double())
        own = float((shaped(x) - expected).abs().max())
        assert float((digits_model(x) - expected).abs().max()) <= 4 * own


@pytest.mark.parametrize("layouts", [("exact", "stock"), ("stock", "exact"), ("stock", "stock")])
@pytest.mark.parametrize("kind", ["plain", "no_qkv_bias", "swiglu_packed", "gate", "distilled"])
@pytest.mark.parametrize("sizes", ["qk < v", "qk > v", "equal"])
def test_pruned_twice(kind, layouts, sizes):
    """The temperature of the dense model survives layouts in any order. Zeros come after a head's own units."""
    dense = make(kind).double()
    qk, v = FRACTIONS[sizes]
    first = uneven_keep(dense, 1, qk, v)
    expected = copy.deepcopy(dense)
    sc.prune(expected, plan_of(dense, first))
    # The other way round, so that what was padded first is cut more than what was not.
    second = uneven_keep(expected, 2, v, qk, others=0.8)
    model = copy.deepcopy(dense)
    sc.prune(model, plan_of(dense, first), layout=layouts[0])
    sc.prune(model, plan_of(model, second), layout=layouts[1])
    sc.prune(expected, plan_of(expected, second))
    if layouts[1] == "stock":
        assert is_stock(model)
    else:
        assert all(type(block.attn) is PrunedAttention for block in model.blocks)
    assert distance(expected, model, images(dense).double()) <= 1e-10


@pytest.mark.parametrize("sizes", FRACTIONS)
def test_a_model_of_the_exact_layout_is_turned_into_stock(digits_model, digits_images, sizes):
    """By a plan that cuts nothing. What shares the old weights' storages keeps its values."""
    keep = uneven_keep(digits_model, 2, *FRACTIONS[sizes])
    sc.prune(digits_model, plan_of(digits_model, keep))
    model = copy.deepcopy(digits_model)
    held = model.state_dict()
    parameters = dict(model.named_parameters())
    report = sc.prune(model, plan_of(model, {}), layout="stock")
    assert is_stock(model)
    assert all(torch.equal(value, digits_model.state_dict()[name]) for name, value in held.items())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert report.params[0] == sum(p.numel() for p in digits_model.parameters()) <= report.params[1]
    assert report.groups["blocks.0.qk"][1] == max(digits_model.blocks[0].attn.qk_dim, digits_model.blocks[0].attn.v_dim)
    x = digits_images[:8].double()
    assert distance(model.double(), digits_model.double(), x) <= 2e-5  # float32 query weights, rounded once
    again = {name: value.clone() for name, value in model.state_dict().items()}
    sc.prune(model, plan_of(model, {}), layout="stock")
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


def test_nothing_cut_changes_no_bit():
    for kind in KINDS:
        model = make(kind)
        with torch.no_grad():
            before = model(images(model))
            sc.prune(model, plan_of(model, random_keep(model, 0, fraction=1.0)), layout="stock", last_block="whole")
            assert torch.equal(model(images(model)), before)
        assert is_stock(model)


def test_what_is_padded_is_zero_and_what_is_cut_is_gone(digits_model):
    """Query/key 16 of 31 kept per head, value 22: rows 16 … 21 of every query and key head are the padding."""
    dense = copy.deepcopy(digits_model)
    keep = random_keep(digits_model, 7, ("qk",), 0.5) | random_keep(digits_model, 7, ("v",), 0.7)
    sc.prune(digits_model, plan_of(digits_model, keep), layout="stock")
    qkv = digits_model.blocks[1].attn.qkv
    before, after = (
        attn.qkv.weight.detach().view(3, 3, -1, 93) for attn in (dense.blocks[1].attn, digits_model.blocks[1].attn)
    )
    assert after.shape[2] == 22
    assert not after[:2, :, 16:].any()
    assert not qkv.bias.detach().view(3, 3, 22)[:2, :, 16:].any()
    for head in range(3):
        index = torch.from_numpy(keep["blocks.1.qk"][head])
        assert torch.equal(after[1, head, :16], before[1, head, index])
        torch.testing.assert_close(after[0, head, :16], before[0, head, index] * (22 / 31) ** 0.5)
        assert torch.equal(after[2, head], before[2, head, torch.from_numpy(keep["blocks.1.v"][head])])


def _no_factor(monkeypatch):
    monkeypatch.setattr(layout, "_rescale_queries", lambda *_: None)


def _keys_too(monkeypatch):
    rescale = layout._rescale_queries

    def doubled(model, anatomy, layer, size):
        def with_keys(group):
            members = tuple(replace(member, part="query") for member in group.members)
            return replace(group, members=members)

        rescale(model, replace(anatomy, groups=tuple(map(with_keys, anatomy.groups))), layer, size)

    monkeypatch.setattr(layout, "_rescale_queries", doubled)


def _zeros_behind_the_last_head(monkeypatch):
    places = layout._places

    def moved(*arguments):
        return {dim: place.sort(descending=True).values for dim, place in places(*arguments).items()}

    monkeypatch.setattr(layout, "_places", moved)


def _garbage_for_zeros(monkeypatch):
    spread = layout._spread
    monkeypatch.setattr(layout, "_spread", lambda data, places: spread(data, places) + 1e-3)


@pytest.mark.parametrize("sabotage", [_no_factor, _keys_too, _zeros_behind_the_last_head, _garbage_for_zeros])
def test_a_broken_build_is_caught(sabotage, monkeypatch):
    dense = make("plain")
    keep = uneven_keep(dense, 5, 0.4, 0.7)
    check(dense, keep, images(dense), layout="stock")
    sabotage(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        check(dense, keep, images(dense), layout="stock")


@pytest.mark.parametrize("kind", ["plain", "no_class_token", "gate", "swiglu_split", "map_pool", "distilled"])
@pytest.mark.parametrize("sizes", ["qk < v", "equal"])
def test_the_report_counts_what_torch_multiplies(kind, sizes):
    model = make(kind)
    rest = ("ffn",) if kind == "map_pool" else ("ffn", "width")
    plan = plan_of(model, uneven_keep(model, 1, *FRACTIONS[sizes], rest=rest))
    planned = sc.inspect(model).macs_at(plan.check(sc.inspect(model)), "whole")
    report = sc.prune(model, plan, layout="stock")
    anatomy = sc.inspect(model)
    assert report.params[1] == anatomy.params == sum(p.numel() for p in model.parameters())
    set_fused(model, False)
    model.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        model(images(model, 1))
    assert report.macs[1] == anatomy.macs == counter.get_total_flops() // 2
    assert (report.macs[1] > planned) is (report.params[1] > plan.params[1]) is (sizes != "equal")
    assert {name: after for name, (_, after) in report.groups.items()} == anatomy.sizes
    assert report.blocks[0]["qk"] == report.blocks[0]["v"] == (13, model.blocks[0].attn.head_dim)


def plainly_built(model):
    """A model of the same shapes from timm's constructors alone."""
    attn, hidden = model.blocks[0].attn, model.blocks[0].mlp.fc1.out_features
    built = VisionTransformer(
        img_size=model.patch_embed.img_size,
        patch_size=model.patch_embed.patch_size[0],
        embed_dim=model.embed_dim,
        depth=0,
        num_heads=attn.num_heads,
        num_classes=model.num_classes,
    )
    for _ in model.blocks:
        block = Block(model.embed_dim, 1, norm_layer=partial(LayerNorm, eps=1e-6))
        block.attn = Attention(model.embed_dim, attn.num_heads, attn_head_dim=attn.head_dim, qkv_bias=True)
        block.mlp = Mlp(model.embed_dim, hidden)
        built.blocks.append(block)
    return built.eval()


def test_the_weights_fit_a_model_of_timms_own(digits_model, digits_images):
    keep = uneven_keep(digits_model, 4, 0.4, 0.7)
    sc.prune(digits_model, plan_of(digits_model, keep), layout="stock", last_block="whole")
    built = plainly_built(digits_model)
    built.load_state_dict(digits_model.state_dict(), strict=True)
    with torch.no_grad():
        for fused in (True, False):
            set_fused(digits_model, fused)
            set_fused(built, fused)
            assert torch.equal(built(digits_images), digits_model(digits_images))


def test_parameters_stay_the_same_objects_in_storages_of_their_size(digits_model):
    before = dict(digits_model.named_parameters())
    digits_model.blocks[1].attn.qkv.weight.requires_grad_(False)
    digits_model.train()
    calls = []
    digits_model.blocks[0].attn.register_forward_hook(lambda *_: calls.append(1))
    sc.prune(digits_model, plan_of(digits_model, uneven_keep(digits_model, 4, 0.7, 0.4)), layout="stock")
    for name, parameter in digits_model.named_parameters():
        assert parameter is before[name]
        assert parameter.is_contiguous()
        assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()
        assert parameter.requires_grad is (name != "blocks.1.attn.qkv.weight")
    assert all(module.training for module in digits_model.modules())
    digits_model(torch.randn(1, 3, 32, 32))
    assert calls == [1]


@pytest.fixture
def stock(digits_model):
    """The trained model with all but heads cut, uneven query/key and value sizes, in timm's classes."""
    keep = uneven_keep(digits_model, 7, 0.5, 0.7, rest=("ffn", "width"))
    sc.prune(digits_model, plan_of(digits_model, keep), layout="stock")
    return digits_model


def rebuilt(model, x, path):
    sc.save(model, path)
    again = sc.load(path)
    with torch.no_grad():
        for fused in (False, True):
            set_fused(model, fused)
            set_fused(again, fused)
            assert torch.equal(model(x), again(x))
    assert [type(module) for module in model.modules()] == [type(module) for module in again.modules()]
    assert sc.inspect(again).to_dict() == sc.inspect(model).to_dict()
    return again


def test_the_same_bits_in_a_fresh_process(stock, digits_images, tmp_path):
    sc.save(stock, tmp_path / "stock.safetensors")
    save_file({"x": digits_images}, tmp_path / "images.safetensors")
    script = (
        "import sys, torch, secateur\n"
        "from safetensors.torch import load_file, save_file\n"
        "torch.set_num_threads(2)\n"
        "with torch.no_grad():\n"
        "    y = secateur.load(sys.argv[1])(load_file(sys.argv[2])['x'])\n"
        "save_file({'y': y}, sys.argv[3])\n"
    )
    paths = [str(tmp_path / f"{name}.safetensors") for name in ("stock", "images", "logits")]
    code, _, errors = run_script(script, *paths)
    assert code == 0, errors
    with torch.no_grad():
        expected = {"y": stock(digits_images)}
    save_file(expected, tmp_path / "expected.safetensors")
    assert (tmp_path / "logits.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


def test_files_say_which_layout_each_module_has(stock, digits_images, tmp_path):
    """After a second round some modules are ours, with the scale of the size that they were padded to."""
    path = tmp_path / "model.safetensors"
    rebuilt(stock, digits_images, path)
    header, _ = container.read(path, "model")
    assert header["layouts"] == dict.fromkeys(("blocks.0.attn", "blocks.1.attn", "blocks.2.attn"), "stock")
    assert header["softmax_scales"] == {}
    assert header["sizes"]["blocks.0.qk"] == header["sizes"]["blocks.0.v"] == 22

    keep = {"blocks.1.qk": random_keep(stock, 1, ("qk",), 0.5)["blocks.1.qk"]}
    sc.prune(stock, plan_of(stock, keep))
    assert [type(block.attn) for block in stock.blocks] == [Attention, PrunedAttention, Attention]
    again = rebuilt(stock, digits_images, path)
    header, _ = container.read(path, "model")
    assert header["layouts"]["blocks.1.attn"] == "exact"
    assert header["softmax_scales"] == {"blocks.1.attn": 22**-0.5}
    assert again.blocks[1].attn.scale == 22**-0.5
    sc.prune(again, plan_of(again, {}), layout="stock")
    assert is_stock(rebuilt(again, digits_images, path))


def test_files_that_do_not_say_are_of_the_exact_layout(digits_model, digits_images, tmp_path):
    """As the first files were."""
    path = tmp_path / "model.safetensors"
    sc.prune(digits_model, plan_of(digits_model, uneven_keep(digits_model, 7, 0.5, 0.7)))
    sc.save(digits_model, path)
    header, tensors = container.read(path, "model")
    del header["layouts"], header["softmax_scales"]
    container.write(path, "model", header, tensors)
    with torch.no_grad():
        assert torch.equal(sc.load(path)(digits_images), digits_model(digits_images))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"layouts": {"blocks.9.attn": "stock"}}, "layouts: expected attention modules of this model"),
        ({"softmax_scales": {"blocks.0": 1.0}}, "softmax_scales: expected attention modules of the exact layout"),
        ({"softmax_scales": {"blocks.0.attn": "1"}}, r"softmax_scales\['blocks.0.attn'\]: expected a number"),
        ({"layouts": {"blocks.0.attn": "padded"}}, r"layouts\['blocks.0.attn'\]: expected one of exact, stock"),
        (
            {"layouts": {"blocks.0.attn": "stock"}},
            r"layouts\['blocks.0.attn'\]: expected 'exact' for heads of 16 and 22",
        ),
    ],
)
def test_files_of_impossible_layouts(digits_model, tmp_path, change, text):
    path = tmp_path / "model.safetensors"
    sc.prune(digits_model, plan_of(digits_model, uneven_keep(digits_model, 7, 0.5, 0.7)))
    sc.save(digits_model, path)
    header, tensors = container.read(path, "model")
    container.write(path, "model", header | change, tensors)
    with pytest.raises(sc.InvalidArgument, match=f"model.safetensors: expected a model .*{text}"):
        sc.load(path)


def test_a_file_whose_norms_timms_class_does_not_have(tmp_path):
    path = tmp_path / "model.safetensors"
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=39, num_heads=3, depth=1, qk_norm=True)
    sc.prune(model, plan_of(model, random_keep(model, 1, ("qk", "v"), 0.5)))
    sc.save(model, path)
    header, tensors = container.read(path, "model")
    container.write(path, "model", header | {"layouts": {"blocks.0.attn": "stock"}}, tensors)
    with pytest.raises(sc.Unsupported, match=r"blocks\.0\.attn\.q_norm: expected .* got HeadNorm"):
        sc.load(path)


@pytest.mark.parametrize("kind", ["plain", "no_class_token", "inner_norms", "qk_norm", "map_pool", "distilled"])
def test_hand_built_kinds_come_back(kind, tmp_path):
    model = make(kind)
    keep = uneven_keep(model, 1, 0.4, 0.7)
    if kind == "qk_norm":
        keep = random_keep(model, 1, ("v", "ffn", "width"), 0.6)
    elif kind == "map_pool":
        del keep["width"]
    sc.prune(model, plan_of(model, keep), layout="stock")
    kwargs = {**BASE, **KINDS[kind]}
    name = "VisionTransformerDistilled" if kwargs.pop("distilled", False) else "VisionTransformer"
    sc.save(model, tmp_path / "model.safetensors", factory=(name, kwargs))
    again = rebuilt(sc.load(tmp_path / "model.safetensors"), images(model), tmp_path / "again.safetensors")
    with torch.no_grad():
        assert torch.equal(model(images(model)), again(images(model)))
    assert is_stock(again)


@pytest.mark.parametrize("method", ["snp", "refit", "project"])
def test_calibrated_planned_and_pruned_again(stock, digits_images, method, tmp_path):
    """Rows of zeros are what every method removes first: cutting just these changes nothing."""
    stats = sc.calibrate(stock, [digits_images])
    assert float(stats.importance("blocks.0.qk")[:, 16:].max()) == 0
    before = copy.deepcopy(stock)
    plan = sc.plan(stock, stats, method=method, ratios={"qk": 6 / 22})
    assert plan.keep["blocks.0.qk"].shape == (3, 16)
    exact, again = both(stock, plan)
    with torch.no_grad():
        if method != "refit":  # its scales of the kept neurons are close to one, not one
            torch.testing.assert_close(exact(digits_images), before(digits_images), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(exact(digits_images), again(digits_images), rtol=1e-4, atol=1e-4)
    assert is_stock(again)
    assert exact.blocks[0].attn.scale == 22**-0.5
    rebuilt(exact, digits_images, tmp_path / "exact.safetensors")


@pytest.mark.parametrize("opt", ["adamw", "muon", "lion"])
def test_finetuned_evaluated_and_reloaded(stock, digits_images, tmp_path, opt):
    """Padding gets no gradient: zero queries meet zero keys, zero values zero columns of the projection."""
    train = loader("digits", stock, split="train", batch_size=32, max_images=128)
    before = sc.evaluate(stock, train)
    rows = stock.blocks[0].attn.qkv.weight.detach().clone().view(3, 3, 22, -1)
    sc.finetune(stock, train, steps=12, lr=1e-4 if opt == "lion" else 1e-3, opt=opt)
    assert sc.evaluate(stock, train).loss < before.loss
    moved = stock.blocks[0].attn.qkv.weight.detach().view(3, 3, 22, -1) != rows
    assert moved[:2, :, :16].any(-1).all()
    assert moved[2].any(-1).all()
    assert not moved[:2, :, 16:].any()
    again = rebuilt(stock, digits_images, tmp_path / "tuned.safetensors")
    assert is_stock(again)


def test_padding_that_is_filled_is_kept(stock, digits_images, tmp_path):
    """It is a row like any other: whatever it holds, the model is a timm model of that size."""
    with torch.no_grad():
        for block in stock.blocks:
            block.attn.qkv.weight.add_(0.01)
    again = rebuilt(stock, digits_images, tmp_path / "filled.safetensors")
    keep = random_keep(again, 3, ("qk", "v"), fraction=0.6)
    exact, cut = both(again, plan_of(again, keep))
    assert cut.blocks[0].attn.head_dim == 13
    with torch.no_grad():
        torch.testing.assert_close(exact(digits_images), cut(digits_images), rtol=1e-4, atol=1e-4)


def test_compile(stock, digits_images):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(stock, backend="inductor")
        torch.testing.assert_close(compiled(digits_images), stock(digits_images), rtol=1e-4, atol=1e-4)


def test_export(stock, digits_images):
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(stock, (digits_images[:4],), dynamic_shapes=({0: batch},)).module()
        for size in (4, 7):
            torch.testing.assert_close(exported(digits_images[:size]), stock(digits_images[:size]))


def test_script(stock, digits_images):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(torch.jit.script(stock)(digits_images), stock(digits_images))


@pytest.mark.parametrize("name", ["exact", "stock"])
def test_onnx(digits_model, digits_images, tmp_path, name):
    sc.prune(digits_model, plan_of(digits_model, uneven_keep(digits_model, 7, 0.5, 0.7)), layout=name)
    path = tmp_path / "model.onnx"
    batch = torch.export.Dim("batch", min=1, max=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            digits_model, (digits_images[:4],), dynamo=True, dynamic_shapes=({0: batch},), verbose=False
        )
        program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in (4, 7):
        (found,) = session.run(None, {session.get_inputs()[0].name: digits_images[:size].numpy()})
        with torch.no_grad():
            expected = digits_model(digits_images[:size])
        assert float((torch.from_numpy(found) - expected).abs().max()) <= 1e-4


def operations(model, *inputs, **options):
    """The names of all operations of a forward pass."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as record:
        model(*inputs, **options)
    return [event.key for event in record.key_averages() for _ in range(event.count)]


FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"
SLOW = "aten::_scaled_dot_product_attention_math"


HEADS = [(1, 13), (13, 1), (5, 9), (9, 5), (8, 8), (13, 5), (5, 13), (13, 13)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("name", ["exact", "stock"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_layout_takes_the_slow_path(name, heads, dtype):
    """Fused attention has a kernel for one head size only; without it torch falls back to plain products, slower."""
    # Each of the three kinds with each value of every other axis.
    kind = ("plain", "no_class_token", "gate")[(HEADS.index(heads) + DTYPES.index(dtype) + (name == "stock")) % 3]
    model = make(kind).to(dtype)
    keep = random_keep(model, 1, ("qk",), heads[0] / 13) | random_keep(model, 1, ("v",), heads[1] / 13)
    sc.prune(model, plan_of(model, keep), layout=name)
    set_fused(model, True)
    tokens = 21 if model.cls_token is not None else 20
    for options in ({}, {"attn_mask": torch.zeros(tokens, tokens, dtype=dtype)}, {"is_causal": True}):
        found = operations(model, images(model, 3).to(dtype), **options)
        assert found.count(FLASH) == len(model.blocks)
        assert SLOW not in found


def test_the_slow_path_would_be_seen():
    """Where the sizes differ and nothing pads, torch takes it: the operations looked for are the right ones."""
    query, value = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 4)
    found = operations(nn.functional.scaled_dot_product_attention, query, query, value)
    assert SLOW in found
    assert FLASH not in found


def test_the_slow_path_is_not_taken_at_full_size(digits_model, digits_images):
    for name in ("exact", "stock"):
        model = copy.deepcopy(digits_model)
        sc.prune(model, plan_of(model, uneven_keep(model, 7, 0.5, 0.7)), layout=name)
        found = operations(model, digits_images)
        assert (found.count(FLASH), found.count(SLOW)) == (3, 0)


def test_block_by_block(digits_model, digits_images):
    """The layout is that of the end; what no layout can hold is refused before the first image is read."""
    ratios = {"qk": 0.5, "v": 0.3, "ffn": 0.3, "width": 0.1}
    exact, stock = copy.deepcopy(digits_model), copy.deepcopy(digits_model)
    sc.prune_sequential(exact, [digits_images], ratios=ratios)
    report = sc.prune_sequential(stock, [digits_images], ratios=ratios, layout="stock")
    assert is_stock(stock)
    assert report.params[1] == sum(p.numel() for p in stock.parameters())
    with torch.no_grad():
        torch.testing.assert_close(stock(digits_images), exact(digits_images), rtol=1e-4, atol=1e-4)

    def unread():
        raise AssertionError("an image was read")
        yield

    class Unread:
        def __iter__(self):
            return unread()

    with pytest.raises(sc.Unsupported, match=r"blocks\.0\.attn\.q_norm: expected"):
        sc.prune_sequential(make("qk_norm"), Unread(), ratios=ratios, layout="stock")
    with pytest.raises(sc.InvalidArgument, match="layout: expected one of exact, stock, auto, got 'flat'"):
        sc.prune_sequential(make("plain"), Unread(), ratios=ratios, layout="flat")
