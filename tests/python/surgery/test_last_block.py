"""The last block for prefix tokens alone: the same output, fewer operations, all tokens where they are asked for."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import secateur as sc
import torch
from models import KINDS, images, make
from pruning import plan_of, random_keep, set_fused
from secateur.surgery.structure import Structure
from torch.utils.flop_counter import FlopCounterMode

TOKEN = [kind for kind in (*KINDS, "post_norm") if sc.inspect(make(kind)).pooled_products is not None]
OTHERS = [kind for kind in KINDS if kind not in TOKEN]


def pooled(model, keep=None, **how):
    found = copy.deepcopy(model)
    sc.prune(found, None if keep is None else plan_of(model, keep), **how)
    return found


def test_the_kinds_are_those_with_token_pooling():
    assert {"plain", "registers_layer_scale", "distilled", "qk_norm", "gate", "post_norm", "identity_head"} <= set(
        TOKEN
    )
    assert {"no_class_token", "fc_norm", "max_pool", "no_pool", "map_pool", "map_pool_prefix"} == set(OTHERS)


@pytest.mark.parametrize("kind", TOKEN)
@pytest.mark.parametrize("layout", ["exact", "stock"])
@torch.no_grad()
def test_the_output_is_that_of_the_whole_model(kind, layout):
    dense = make(kind).double()
    x = images(dense, 3).double()
    for keep in (None, random_keep(dense, 3, ("ffn", "heads"), fraction=0.6)):
        whole = pooled(dense, keep, layout=layout, last_block="whole")
        found = pooled(dense, keep, layout=layout, last_block="pooled")
        expected = whole(x)
        for fused in (False, True):
            set_fused(found, fused)
            assert float((found(x) - expected).abs().max()) <= 1e-10 * max(1.0, float(expected.abs().max()))
        assert torch.equal(found.forward_features(x), whole.forward_features(x))
        assert torch.equal(found.forward_intermediates(x)[1][-1], whole.forward_intermediates(x)[1][-1])
        before, after = sc.inspect(whole), sc.inspect(found)
        assert (before.last_block, after.last_block) == ("whole", "pooled")
        assert before.macs_at({}, "pooled") == after.macs < before.macs == after.macs_at({}, "whole")
        assert "the last block computes prefix tokens only" in str(after)
        assert after.to_dict()["last_block"] == "pooled"


@pytest.mark.parametrize("kind", ["plain", "distilled", "gate", "swiglu_split", "registers_layer_scale", "post_norm"])
@pytest.mark.parametrize("keep", [None, "cut", "blocks.1.attn", "blocks.1.mlp"])
def test_macs_are_those_of_the_operations(kind, keep):
    dense = make(kind)
    if keep == "cut":
        keep = random_keep(dense, 1, ("qk", "v", "ffn", "heads"), fraction=0.6)
    elif keep:
        keep = {keep: np.empty((1, 0), np.int64)}
    found = pooled(dense, keep, last_block="pooled")
    set_fused(found, False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        found(images(dense, 1))
    assert counter.get_total_flops() // 2 == sc.inspect(found).macs
    if keep:
        sizes = {name: kept.shape[1] for name, kept in keep.items()}
        assert sc.inspect(dense).macs_at(sizes, "pooled") == sc.inspect(found).macs


@pytest.mark.parametrize("kind", OTHERS)
def test_where_all_tokens_are_used_it_is_refused(kind):
    dense = make(kind)
    before = copy.deepcopy(dense.state_dict())
    plan = plan_of(dense, random_keep(dense, 0, fraction=0.5))
    with pytest.raises(sc.Unsupported, match=r"^last_block: expected 'whole' for this model \((global|attn)_pool: "):
        sc.prune(dense, plan, last_block="pooled")
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    sc.prune(dense, plan)
    assert sc.inspect(dense).last_block == "whole"
    with pytest.raises(sc.InvalidArgument, match="^last_block: expected one of whole, pooled, got 'half'$"):
        sc.prune(dense, last_block="half")


def test_the_default_is_for_classifiers():
    assert sc.inspect(pooled(make("plain"))).last_block == "pooled"
    assert sc.inspect(pooled(make("identity_head"))).last_block == "whole"
    assert sc.inspect(pooled(make("identity_head"), last_block="pooled")).last_block == "pooled"
    found = pooled(make("plain"))
    sc.prune(found, last_block="whole")
    assert sc.inspect(found).last_block == "whole"
    assert type(found) is type(make("plain"))
    assert [type(block) for block in found.blocks] == [type(block) for block in make("plain").blocks]


@torch.no_grad()
def test_masks_and_causal_attention():
    dense = make("registers_layer_scale").double()
    x = images(dense, 2).double()
    tokens = 24
    generator = torch.Generator().manual_seed(0)
    allowed = torch.rand(tokens, tokens, generator=generator) > 0.3
    allowed.fill_diagonal_(True)
    added = torch.randn(2, 3, tokens, tokens, generator=generator, dtype=torch.float64)
    keys = torch.rand(2, 1, 1, tokens, generator=generator) > 0.2
    found = pooled(dense)
    for fused in (True, False):
        set_fused(dense, fused)
        set_fused(found, fused)
        for mask in (allowed, added, keys, allowed[None, None].double().log()):
            assert torch.allclose(found(x, attn_mask=mask), dense(x, attn_mask=mask), rtol=0, atol=1e-10)
        assert torch.allclose(found(x, is_causal=True), dense(x, is_causal=True), rtol=0, atol=1e-10)


@torch.no_grad()
def test_hooks_see_all_tokens():
    dense = make("plain")
    found = pooled(dense)
    x = images(dense)
    expected = dense(x)
    for name in ("blocks.1", "blocks.1.attn", "blocks.1.attn.qkv", "blocks.1.mlp.fc2", "blocks.1.drop_path1", "norm"):
        seen = []
        handle = found.get_submodule(name).register_forward_hook(lambda _m, _a, output, seen=seen: seen.append(output))
        assert torch.allclose(found(x), expected, rtol=0, atol=1e-5)
        handle.remove()
        assert seen[0].shape[:2] == (2, 21), name
    # A hook elsewhere sees what the model computes, and the last block stays as it is.
    handle = found.blocks[0].register_forward_hook(lambda *_: None)
    with FlopCounterMode(display=False) as counter:
        found(x[:1])
    handle.remove()
    set_fused(found, False)
    with FlopCounterMode(display=False) as again:
        found(x[:1])
    assert counter.get_total_flops() <= again.get_total_flops()


@torch.no_grad()
def test_calibration_is_that_of_the_whole_model(digits_model, digits_images):
    found = pooled(digits_model)
    first = sc.calibrate(digits_model, [digits_images[:32]])
    second = sc.calibrate(found, [digits_images[:32]])
    ratios = {"qk": 0.4, "v": 0.3, "ffn": 0.5}
    one = sc.plan(digits_model, first, method="snp", ratios=ratios)
    two = sc.plan(found, second, method="snp", ratios=ratios)
    assert all(np.array_equal(kept, two.keep[name]) for name, kept in one.keep.items())
    assert one.macs[1] == two.macs[1]


@torch.no_grad()
def test_after_changes_that_timm_offers():
    found, dense = pooled(make("plain")), make("plain")
    for model in (found, dense):
        torch.manual_seed(0)
        model.reset_classifier(4, "avg")
    x = images(dense)
    assert torch.equal(found(x), dense(x))
    assert sc.inspect(found).last_block == "whole"
    found.reset_classifier(4, "token")
    dense.reset_classifier(4, "token")
    dense.head.load_state_dict(found.head.state_dict())
    assert torch.allclose(found(x), dense(x), rtol=0, atol=1e-5)
    found.set_input_size((6, 9))
    dense.set_input_size((6, 9))
    x = torch.randn(2, 3, 6, 9)
    assert torch.allclose(found(x), dense(x), rtol=0, atol=1e-5)
    assert sc.inspect(found).macs == sc.inspect(dense).macs_at({}, "pooled")


@pytest.mark.parametrize("kind", ["plain", "distilled", "qk_norm", "gate"])
def test_gradients_are_those_of_the_whole_model(kind):
    dense = make(kind).double().train()
    found = pooled(dense)
    x = images(dense, 3).double()
    for model in (dense, found):
        model(x).square().sum().backward()
    found.set_grad_checkpointing()
    expected = [parameter.grad.clone() for parameter in dense.parameters()]
    for _ in range(2):
        for wanted, parameter in zip(expected, found.parameters(), strict=True):
            assert torch.allclose(parameter.grad, wanted, rtol=0, atol=1e-10)
        found.zero_grad()
        found(x).square().sum().backward()


@pytest.mark.parametrize("kind", ["plain", "distilled", "qk_norm", "no_qkv_bias"])
@torch.no_grad()
def test_script_export_and_compile(kind):
    found = pooled(make(kind))
    x = images(found, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(found)
    assert torch.allclose(scripted(x), found(x), rtol=0, atol=1e-6)
    program = torch.export.export(found, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert torch.allclose(program.module()(x[:3]), found(x[:3]), rtol=0, atol=1e-6)
    compiled = torch.compile(found, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), found(x), rtol=0, atol=1e-6)
    torch.compiler.reset()


def test_a_file_holds_it(digits_model, digits_images, tmp_path):
    """Also in the stock layout; a file of earlier versions, which do not know it, is of a whole last block."""
    for layout in ("exact", "stock"):
        keep = random_keep(digits_model, 1, ("qk", "v", "ffn"), fraction=0.5)
        found = pooled(digits_model, keep, layout=layout, last_block="pooled")
        sc.save(found, tmp_path / "model.safetensors")
        loaded = sc.load(tmp_path / "model.safetensors")
        with torch.no_grad():
            assert torch.equal(loaded(digits_images), found(digits_images))
        assert sc.inspect(loaded).to_dict() == sc.inspect(found).to_dict()
    structure = Structure.of(found, sc.inspect(found), dict(digits_model.named_parameters()))
    fields = structure.to_dict()
    assert fields.pop("last_block") == "pooled"
    assert Structure.from_dict(fields).last_block == "whole"
    assert not [name for name in fields["sizes"] if name.endswith("tokens")]
