"""Merged tokens: the pruned model against token merging written from its formulas, in loops and in float64."""

from __future__ import annotations

import copy
import math
import warnings

import numpy as np
import onnxruntime
import pytest
import secateur as sc
import torch
from models import KINDS, images, make
from pruning import plan_of, random_keep, set_fused
from secateur.families.registry import family_of
from secateur.families.vision_transformer.tokens import merge_tokens
from secateur.methods.registry import method_named
from timm.models.vision_transformer import ResPostBlock
from torch.utils.flop_counter import FlopCounterMode

MERGEABLE = [kind for kind in (*KINDS, "post_norm") if "tokens" not in sc.inspect(make(kind)).refused]


def merging(model, *counts, last_block="whole", **keep):
    """A copy of the model that merges ``counts`` tokens in its blocks."""
    groups = [group for group in sc.inspect(model).groups if group.kind == "tokens"]
    keep |= {
        group.name: np.arange(group.size - count)[None] for group, count in zip(groups, counts, strict=True) if count
    }
    pruned = copy.deepcopy(model)
    sc.prune(pruned, plan_of(pruned, keep), last_block=last_block)
    return pruned


def merged_by_hand(x, sizes, features, count, prefix):
    """One image's tokens, (N, C), after merging: the definition, token by token."""
    numbers = list(range(prefix, len(x)))
    even, odd = numbers[::2], numbers[1::2]
    best = []
    for i in even:
        distances = []
        for j in odd:
            s, t = float(sizes[i]), float(sizes[j])
            far = 1 - float(torch.cosine_similarity(features[i], features[j], dim=0))
            distances.append(far * math.sqrt(s * t / (s + t)))
        best.append((min(distances, default=math.inf), i, odd[int(np.argmin(distances))] if odd else -1))
    best.sort(key=lambda found: found[0])
    gone = {i: j for _, i, j in best[: min(count, len(numbers) // 2)]}
    tokens, weights = [], []
    for j in range(len(x)):
        if j in gone:
            continue
        group = [j, *(i for i in gone if gone[i] == j)]
        total = sum(float(sizes[i]) for i in group)
        tokens.append(sum(float(sizes[i]) * x[i] for i in group) / total)
        weights.append(total)
    return torch.stack(tokens), torch.tensor(weights, dtype=x.dtype)


@torch.no_grad()
def by_hand(dense, image, counts):
    """The output for one image, (1, 3, H, W), of a dense model with tokens merged in its blocks."""
    x = dense.norm_pre(dense._pos_embed(dense.patch_embed(image)))
    sizes = torch.ones(x.shape[1], dtype=x.dtype)
    for block, count in zip(dense.blocks, counts, strict=True):
        post = isinstance(block, ResPostBlock)
        attn = block.attn
        h = x if post else block.norm1(x)
        q, k, v = attn.qkv(h)[0].reshape(-1, 3, attn.num_heads, attn.head_dim).permute(1, 2, 0, 3)
        q, k = attn.q_norm(q), attn.k_norm(k)
        y = ((q @ k.transpose(1, 2) * attn.scale + sizes.log()).softmax(-1) @ v).transpose(0, 1).flatten(1)
        y = attn.norm(y)[None]
        y = attn.proj(y if attn.gate is None else y * attn.gate(h).sigmoid())
        x = x + (block.norm1(y) if post else block.ls1(y))
        read = x if post else block.norm2(x)
        tokens, sizes = merged_by_hand(x[0], sizes, read[0], count, dense.num_prefix_tokens)
        x = tokens[None]
        x = x + (block.norm2(block.mlp(x)) if post else block.ls2(block.mlp(block.norm2(x))))
    x = dense.norm(x)
    if dense.global_pool != "avg":
        return dense.forward_head(x)
    first = 0 if dense.pool_include_prefix else dense.num_prefix_tokens
    mean = sum(float(s) * token for s, token in zip(sizes[first:], x[0, first:], strict=True)) / float(
        sizes[first:].sum()
    )
    return dense.head(dense.fc_norm(mean[None]))


@pytest.mark.parametrize("kind", MERGEABLE)
@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (9, 5)])
@torch.no_grad()
def test_every_kind_is_token_merging(kind, counts):
    dense = make(kind).double()
    if kind == "hybrid":
        counts = (1, 0)
    x = images(dense, 3).double()
    expected = torch.cat([by_hand(dense, image[None], counts) for image in x])
    scale = max(1.0, float(expected.abs().max()))
    for last_block in ("whole", None):
        pruned = merging(dense, *counts, last_block=last_block)
        for fused in (True, False):
            set_fused(pruned, fused)
            assert float((pruned(x) - expected).abs().max()) <= 1e-10 * scale
            assert float((pruned(x[:1]) - expected[:1]).abs().max()) <= 1e-10 * scale
    if counts[0]:
        # In the last block, only patches change, and a class token sees them no more.
        assert float((expected - dense(x)).abs().max()) > 1e-4 * scale, "merging changes the output"


@pytest.mark.parametrize("patches", [2, 3, 7, 20])
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("count", [1, 2, 100])
def test_merging_over_odd_counts_and_sizes(patches, prefix, batch, count):
    generator = torch.Generator().manual_seed(patches)
    x = torch.randn(batch, prefix + patches, 6, dtype=torch.float64, generator=generator)
    features = torch.randn(batch, prefix + patches, 3, dtype=torch.float64, generator=generator)
    sizes = torch.randint(1, 9, x.shape[:2], generator=generator).double()
    for given, known in ((None, torch.ones_like(sizes)), (sizes, sizes)):
        tokens, found = merge_tokens(x, given, features, count, prefix)
        assert tokens.shape[1] == prefix + patches - min(count, patches // 2)
        for one in range(batch):
            expected, weights = merged_by_hand(x[one], known[one], features[one], count, prefix)
            assert torch.allclose(tokens[one], expected, rtol=0, atol=1e-12)
            assert torch.equal(found[one], weights)
            # What is merged is neither lost nor counted twice.
            mass = (known[one, :, None] * x[one])[prefix:].sum(0)
            assert torch.allclose((found[one, :, None] * tokens[one])[prefix:].sum(0), mass, atol=1e-12)
        assert torch.equal(tokens[:, :prefix], x[:, :prefix])


def test_ties_and_zeros_merge_as_many_tokens():
    """Equal tokens, such as those of a white image: any of the best pairs will do, and nothing becomes NaN."""
    for features in (torch.ones(2, 9, 3), torch.zeros(2, 9, 3)):
        x = torch.arange(9.0)[None, :, None].expand(2, 9, 4)
        tokens, sizes = merge_tokens(x, None, features, 3, 1)
        assert tokens.shape == (2, 6, 4)
        assert sizes.sum(1).tolist() == [9, 9]
        assert torch.allclose((tokens[..., 0] * sizes).sum(1), x[..., 0].sum(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_types(dtype):
    dense = make("plain")
    x = images(dense, 2)
    expected = merging(dense.double(), 3, 2)(x.double())
    found = merging(dense.to(dtype), 3, 2)(x.to(dtype))
    assert found.dtype == dtype
    assert float((found.double() - expected).abs().max()) <= 40 * torch.finfo(dtype).eps * float(expected.abs().max())


@pytest.mark.parametrize("kind", ["plain", "fc_norm", "distilled", "swiglu_packed", "gate", "post_norm"])
@pytest.mark.parametrize("layout", ["exact", "stock"])
@torch.no_grad()
def test_with_all_else_cut(kind, layout):
    """Channels of a merged model, tokens of a cut one, and both at once are the same model."""
    dense = make(kind).double()
    x = images(dense, 2).double()
    other = random_keep(dense, 5, ("qk", "v", "ffn", "heads"), fraction=0.6)
    tokens = {f"blocks.{index}.tokens": np.arange(8)[None] for index in range(2)}
    once, first, last = (copy.deepcopy(dense) for _ in range(3))
    report = sc.prune(once, plan_of(dense, {**other, **tokens}), layout=layout)
    for pruned, rounds in ((first, (tokens, other)), (last, (other, tokens))):
        for keep in rounds:
            sc.prune(pruned, plan_of(pruned, keep), layout=layout)
    assert torch.allclose(once(x), first(x), rtol=0, atol=1e-12)
    assert torch.equal(once(x), last(x))
    assert report.macs[1] == sc.inspect(first).macs == sc.inspect(last).macs
    assert report.groups["blocks.1.tokens"] == (10, 8)
    if layout == "stock":
        assert {type(block.attn).__name__ for block in once.blocks} == {"Attention"}


@torch.no_grad()
def test_merging_further_adds_up():
    dense = make("plain", depth=4).double()
    x = images(dense, 2).double()
    twice = merging(merging(dense, 1, 0, 2, 0), 2, 1, 0, 3)
    assert torch.equal(twice(x), merging(dense, 3, 1, 2, 3)(x))
    assert sc.inspect(twice).merged == {f"blocks.{index}.tokens": count for index, count in enumerate((3, 1, 2, 3))}


@pytest.mark.parametrize("gone", ["blocks.0.attn", "blocks.1.mlp", "blocks.1.attn"])
@torch.no_grad()
def test_without_a_layer(gone):
    """A block without attention merges nothing."""
    dense = make("plain", depth=3).double()
    x = images(dense, 2).double()
    pruned = merging(dense, 3, 2, 1, **{gone: np.empty((1, 0), np.int64)})
    without = merging(dense, 0, 0, 0, **{gone: np.empty((1, 0), np.int64)})
    counts = [0 if gone == f"blocks.{index}.attn" else count for index, count in enumerate((3, 2, 1))]
    again = merging(without, *(c for i, c in enumerate(counts) if gone != f"blocks.{i}.attn"))
    assert torch.equal(pruned(x), again(x))
    assert sc.inspect(pruned).macs == sc.inspect(again).macs < sc.inspect(without).macs


@pytest.mark.parametrize("counts", [(0, 0, 0), (1, 0, 0), (4, 3, 2), (9, 9, 9), (0, 0, 5)])
@pytest.mark.parametrize("kind", ["plain", "fc_norm", "registers_layer_scale", "distilled"])
@pytest.mark.parametrize("last_block", ["whole", "pooled"])
def test_macs_are_those_of_the_operations(counts, kind, last_block):
    dense = make(kind, depth=3)
    anatomy = sc.inspect(dense)
    if last_block == "pooled" and anatomy.pooled_products is None:
        return
    pruned = merging(dense, *counts, last_block=last_block)
    set_fused(pruned, False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        pruned(images(dense, 1))
    sizes = {f"blocks.{index}.tokens": 10 - count for index, count in enumerate(counts)}
    # The weighted average of tokens is a product for torch, but no linear layer or attention.
    average = dense.embed_dim * (20 - sum(counts)) if kind == "fc_norm" and any(counts) else 0
    if (kind, counts) == ("fc_norm", (9, 9, 9)):
        average = dense.embed_dim * (20 - 9 - 5 - 3)
    assert counter.get_total_flops() // 2 - average == anatomy.macs_at(sizes, last_block) == sc.inspect(pruned).macs


def test_macs_of_many_sizes_at_once():
    anatomy = sc.inspect(make("plain", depth=3))
    random = np.random.default_rng(0)
    sizes = {f"blocks.{index}.tokens": random.integers(1, 11, 50) for index in range(3)}
    sizes |= {"blocks.1.attn": random.integers(0, 2, 50), "blocks.0.ffn": random.integers(1, 40, 50)}
    found = anatomy.macs_at(sizes)
    one_by_one = [anatomy.macs_at({name: int(each[i]) for name, each in sizes.items()}) for i in range(50)]
    assert found.tolist() == one_by_one
    assert all(isinstance(each, int) for each in one_by_one)


@pytest.mark.parametrize("kind", ["map_pool", "max_pool", "no_pool"])
def test_what_cannot_merge_is_refused_by_name(kind):
    model = make(kind)
    anatomy = sc.inspect(model)
    assert not anatomy.tokens
    reason = "attn_pool" if kind == "map_pool" else "global_pool"
    assert anatomy.refused["tokens"].startswith(reason)
    with pytest.raises(
        sc.Unsupported, match=rf"^ratios: expected kinds that this model can lose, got 'tokens' \({reason}"
    ):
        sc.plan(model, method="magnitude", ratios={"tokens": 0.2})


def test_masks_and_other_pooling_are_refused_by_name():
    pruned = merging(make("plain"), 2, 0)
    x = images(pruned)
    with pytest.raises(sc.InvalidArgument, match="^attn_mask: expected none in a model that merges tokens, got one$"):
        pruned(x, attn_mask=torch.ones(21, 21, dtype=torch.bool))
    with pytest.raises(sc.InvalidArgument, match="^is_causal: expected none in a model that merges tokens, got one$"):
        pruned(x, is_causal=True)
    pruned.reset_classifier(5, "max")
    with pytest.raises(sc.InvalidArgument, match="^global_pool: expected 'token' or 'avg' in a model that merges"):
        pruned(x)
    pruned.reset_classifier(5, "avg")
    assert pruned(x).shape == (2, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError):  # torch's own text, since it is torch that reads the code
            torch.jit.script(pruned)


@torch.no_grad()
def test_features_of_patches_are_whole():
    dense = make("registers_layer_scale")
    pruned = merging(dense, 3, 2, last_block=None)
    x = images(dense)
    assert torch.equal(pruned.forward_features(x), dense.forward_features(x))
    for found, expected in zip(pruned.forward_intermediates(x)[1], dense.forward_intermediates(x)[1], strict=True):
        assert torch.equal(found, expected)


@torch.no_grad()
def test_other_image_sizes():
    """With fewer patches than are to be merged, half of them are."""
    model = make("dynamic_size").double()
    pruned = merging(model, 9, 1)
    for size in ((12, 15), (6, 9), (9, 3), (3, 3)):
        x = torch.randn(2, 3, *size, dtype=torch.float64)
        expected = torch.cat([by_hand(model, image[None], (9, 1)) for image in x])
        assert torch.allclose(pruned(x), expected, rtol=0, atol=1e-10)


def test_it_trains_and_checkpoints_give_the_same_gradients():
    pruned = merging(make("registers_layer_scale"), 3, 2, last_block=None).double().train()
    x = images(pruned, 3).double()
    gradients = []
    for checkpointing in (False, True):
        pruned.set_grad_checkpointing(checkpointing)
        pruned.zero_grad()
        pruned(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in pruned.parameters()])
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(*gradients, strict=True))
    assert all(float(each.abs().max()) > 0 for each in gradients[0])
    # Along a random direction, as a difference of losses says.
    generator = torch.Generator().manual_seed(0)
    parameters = list(pruned.parameters())
    direction = [torch.randn(p.shape, dtype=torch.float64, generator=generator) for p in parameters]
    losses = []
    for step in (1e-6, -1e-6):
        moved = copy.deepcopy(pruned)
        with torch.no_grad():
            for parameter, way in zip(moved.parameters(), direction, strict=True):
                parameter.add_(step * way)
            losses.append(float(moved(x).square().sum()))
    slope = sum(float((way * g).sum()) for way, g in zip(direction, gradients[0], strict=True))
    assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(slope, rel=1e-4)


@torch.no_grad()
def test_export_and_compile():
    pruned = merging(make("distilled"), 3, 2, last_block=None).eval()
    x = images(pruned, 4)
    program = torch.export.export(pruned, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for batch in (2, 3, 7):
        other = images(pruned, batch, seed=batch)
        assert torch.allclose(program.module()(other), pruned(other), rtol=0, atol=1e-5)
    compiled = torch.compile(pruned, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), pruned(x), rtol=0, atol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize("kind", ["no_class_token", "registers_layer_scale"])
def test_onnx_with_any_batch(kind, tmp_path):
    """One file merges in onnxruntime as the model does here, image by image, with heads and channels cut as well."""
    dense = make(kind)
    keep = random_keep(dense, 1, ("qk", "v", "ffn", "heads"), fraction=0.6)
    pruned, whole = (merging(dense, *counts, last_block=None, **keep) for counts in ((3, 2), (0, 0)))
    path = tmp_path / "model.onnx"
    sc.export(pruned, path, batch_sizes=(1, 2, 7))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 3, 8):
        x = images(dense, batch, seed=batch)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            expected, unmerged = pruned(x), whole(x)
        assert torch.allclose(torch.from_numpy(found), expected, rtol=0, atol=1e-4)
        # Merging has an effect that is far larger than the tolerance.
        assert float((expected - unmerged).abs().max()) > 1e-2


@pytest.mark.parametrize("method", sc.methods())
def test_every_method_plans_tokens(method, digits_model, digits_images, tmp_path):
    model = digits_model
    stats = sc.calibrate(model, [digits_images[:32]], gradients=True)
    channels = {"ffn": 0.2} if "ffn" in method_named(method).cuts else {"heads": 0.34}
    plan = sc.plan(model, stats, method=method, ratios={"blocks.1.tokens": 0.25, **channels})
    size = sc.inspect(model).sizes["blocks.1.tokens"]
    assert plan.keep["blocks.1.tokens"].tolist() == [list(range(size - round(size / 4)))]
    plan.save(tmp_path / "plan.json")
    report = sc.prune(model, sc.Plan.load(tmp_path / "plan.json"))
    assert report.macs[1] == plan.macs[1] == sc.inspect(model).macs
    sc.save(model, tmp_path / "model.safetensors")
    loaded = sc.load(tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(digits_images), model(digits_images))
    assert "tokens after" in str(sc.inspect(loaded))


@torch.no_grad()
def test_passes_from_a_block_merge_as_a_cut_would():
    dense = make("fc_norm", depth=3).double()
    x = images(dense, 2).double()
    family = family_of(dense)
    entering = []
    with torch.no_grad():
        handle = dense.blocks[1].register_forward_pre_hook(lambda _m, args: entering.append(args[0]))
        dense(x)
        handle.remove()
    sizes = {"blocks.1.tokens": 6, "blocks.2.tokens": 9}
    found = family.from_block(dense, 1, entering[0], sizes)
    assert torch.allclose(found, merging(dense, 0, 4, 1)(x), rtol=0, atol=1e-12)
    assert family.blocks(merging(dense, 0, 4, 1)) == []


def test_calibration_and_tables_of_a_merged_model(digits_model, digits_images):
    pruned = merging(digits_model, *(2 for _ in digits_model.blocks), last_block=None)
    stats = sc.calibrate(pruned, [digits_images[:32]], sensitivity=True)
    plan = sc.plan(pruned, stats, target=sc.Target(macs=0.7))
    assert plan.macs[1] <= 0.7 * plan.macs[0]
    sc.prune(pruned, plan)
    assert sc.inspect(pruned).merged["blocks.0.tokens"] == 2
    with pytest.raises(sc.Unsupported, match="^latency: expected blocks that merge no tokens, got 2 merged in"):
        sc.measure_latency(pruned)
    assert sc.measure_latency(digits_model, groups=["tokens"], repeats=1).knows_tokens
