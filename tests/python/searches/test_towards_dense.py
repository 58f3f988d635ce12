"""Pruning towards the dense stream: its closed forms, what is exact, what it loses, going on, and several ranks."""

from __future__ import annotations

import copy
import signal

import numpy as np
import pytest
import secateur as sc
import torch
from asymmetric import by_folds, layers_of, taken_by
from finetuning import quiet
from launch import on_ranks, run_script
from models import images, make
from secateur.anatomy import Anatomy
from secateur.data.loader import loader
from secateur.families.registry import family_of
from secateur.runtime.ranks import Ranks
from secateur.searches.sequential_file import SequentialFile
from secateur.statistics.measurements import Work, measurements
from secateur.statistics.paired import Sums
from secateur.statistics.rows import RowWeights
from torch.nn import functional as F  # noqa: N812

HALF = {"qk": 0.5, "v": 0.5, "ffn": 0.5}
SPLITS = [2, 5, 1, 6]


def measured(model, x):
    anatomy = sc.inspect(model)
    work = Work(model, family_of(model), anatomy, [x], sc.calibrate(model, [x], collect="scores"))
    (sums,) = measurements.named("rows").take(work)
    return anatomy, sums


def weights_of(model, x) -> tuple[Anatomy, RowWeights]:
    anatomy, sums = measured(model, x)
    return anatomy, RowWeights(model, anatomy, family_of(model).prefix_tokens(model), sums)


def same(first, second):
    mine, theirs = first.state_dict(), second.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in mine.items())


@pytest.mark.parametrize(
    "kind", ["plain", "registers_layer_scale", "rms_norm", "identity_head", "distilled", "no_pool"]
)
def test_row_weights_by_hand(kind):
    """½ v̄/v + ½ g/ḡ, g by a perturbation of the stream after the layer, one image and one token at a time."""
    model = make(kind).double()
    x = images(model, 11, 3).double()
    anatomy, rows = weights_of(model, x)
    prefix = model.num_prefix_tokens
    for name, module in family_of(model).layers(model).items():
        block, layer = int(name.split(".")[1]), name.split(".")[2]
        streams, squares = [], []
        for number, image in enumerate(x):
            entering = {}
            handle = model.blocks[block].register_forward_pre_hook(lambda _m, a, e=entering: e.update(x=a[0]))
            with torch.no_grad():
                model(image[None])
            handle.remove()
            attention, _ = layers_of(model.blocks[block])
            stream = entering["x"] if layer == "attn" else attention(entering["x"])
            after = module(stream).detach().requires_grad_()
            rest = layers_of(model.blocks[block])[1](after) if layer == "attn" else after
            for other in model.blocks[block + 1 :]:
                rest = other(rest)
            output = model.forward_head(model.norm(rest))
            flat = output.reshape(-1, output.shape[-1])
            generator = torch.Generator().manual_seed(number)
            if model.num_classes:
                drawn = torch.multinomial((flat.detach() / 2).softmax(-1), 1, generator=generator)[:, 0]
                loss = -sum((flat / 2).log_softmax(-1)[row, y] for row, y in enumerate(drawn))
            else:
                loss = (flat * torch.randn(flat.shape, dtype=torch.float64, generator=generator)).sum()
            (gradient,) = torch.autograd.grad(loss, after)
            streams.append(after.detach()[0])
            squares.append(gradient[0].square().sum(-1))
        stream, square = torch.stack(streams), torch.stack(squares)
        norm = model.get_submodule(anatomy.layers[name].input_norm)
        centred = kind != "rms_norm"
        v = stream.var(-1, unbiased=False) if centred else stream.square().mean(-1)
        v = v + norm.eps
        g = torch.empty_like(v)
        g[:, :prefix], g[:, prefix:] = square[:, :prefix].mean(), square[:, prefix:].mean()
        expected = 0.5 / (v * (1 / v).mean()) + 0.5 * g / g.mean()
        torch.testing.assert_close(rows.of(name, stream), expected, rtol=1e-8, atol=1e-10)
        assert float(expected.mean()) == pytest.approx(1)


def test_row_weights_do_not_depend_on_how_images_come():
    model = make("plain")
    x = images(model, 14, 3)
    _, whole = measured(model, x)
    anatomy = sc.inspect(model)
    stats = sc.calibrate(model, [x], collect="scores")
    works = [Work(model, family_of(model), anatomy, list(x.split(SPLITS)), stats, rank, 3) for rank in range(3)]
    parts = [sums for work in works for sums in measurements.named("rows").take(work)]
    for name, sums in whole.items():
        np.testing.assert_allclose(sum(part[name] for part in parts), sums, rtol=1e-4)


def test_massive_tokens_do_not_rule_the_weights():
    """A token a thousand times as long as the others counts for less than they do, and all weights are finite."""
    model = make("plain")
    _, rows = weights_of(model, images(model, 8, 3))
    stream = torch.randn(5, 21, 39)
    stream[:, 7] *= 1e3
    stream[:, 9] = 0
    weights = rows.of("blocks.1.mlp", stream)
    assert bool(weights.isfinite().all())
    assert bool((weights > 0).all())
    others = [token for token in range(1, 21) if token not in (7, 9)]
    assert bool((weights[:, 7] < weights[:, others].min(1).values).all())


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weighted_moments_by_hand(dtype, stride):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(14, 19, size, generator=generator).to(dtype) for size in (7, 5))
    x += 3
    w = torch.rand(14, 19, generator=generator).double()
    sums = Sums(7, 5, name="x", stride=stride)
    start = 0
    for size in SPLITS:
        part = slice(start, start + size)
        sums.update(start, x[part], y[part], w[part])
        start += size
    whole, folds = sums.moments(Ranks())
    taken = torch.tensor([[(t - i // 2) % stride == 0 for t in range(19)] for i in range(14)])
    mixed = []
    for k, fold in enumerate(folds):
        a, b, s = (each[k::2][taken[k::2]].double() for each in (x, y, w))
        assert fold.rows == len(s)
        s = s / s.sum()
        mixed.append((len(s), [s @ a, s @ b, a.T @ (s[:, None] * a), a.T @ (s[:, None] * b)]))
        ma, mb, aa, ab = mixed[-1][1]
        tolerance = {"rtol": 1e-11, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
        expected = (ma, mb, aa - torch.outer(ma, ma), ab - torch.outer(ma, mb))
        for found, wanted in zip((fold.x, fold.y, fold.xx, fold.xy), expected, strict=True):
            torch.testing.assert_close(found, wanted, **tolerance)
    count = sum(rows for rows, _ in mixed)
    ma, _, aa, _ = (sum(rows / count * part[i] for rows, part in mixed) for i in range(4))
    torch.testing.assert_close(whole.x, ma, **tolerance)
    torch.testing.assert_close(whole.xx, aa - torch.outer(ma, ma), **tolerance)


@pytest.mark.parametrize(
    "kind", ["plain", "registers_layer_scale", "rms_norm", "swiglu_split", "no_proj_bias", "qk_norm"]
)
def test_layers_after_a_cut_by_hand(kind):
    """Only the first FFN is cut: every weight of the block after it, by the formulas, from rows one by one."""
    model = make(kind).double()
    x = images(model, 16, 4).double()
    _, rows = weights_of(model, x)
    pruned = copy.deepcopy(model)
    sc.prune_sequential(pruned, list(x.split([3, 13])), "refit", ratios={"blocks.0.ffn": 0.6})
    with torch.no_grad():
        want, have = (each.blocks[0](each._pos_embed(each.patch_embed(x))) for each in (model, pruned))
        dense, fitted = model.blocks[1], pruned.blocks[1]
        expected = copy.deepcopy(dense)
        readers = (
            (expected.attn.qkv,),
            (expected.mlp.fc1_g, expected.mlp.fc1_x) if kind == "swiglu_split" else (expected.mlp.fc1,),
        )
        writers = expected.attn.proj, expected.mlp.fc2
        scales = (expected.ls1, expected.ls2) if kind == "registers_layer_scale" else (None, None)
        norms, asked = (expected.norm1, expected.norm2), []
        for number, name in enumerate(("blocks.1.attn", "blocks.1.mlp")):
            after = layers_of(dense)[number](want)
            w = rows.of(name, after)
            eye = torch.eye(39, dtype=torch.float64)
            read, shift, _ = by_folds(norms[number](have), norms[number](want), w, eye)
            for reader in readers[number]:
                bias = 0 if reader.bias is None else reader.bias
                reader.bias = torch.nn.Parameter(bias + reader.weight @ shift)
                reader.weight.copy_(reader.weight @ read)
            writer = writers[number]
            z = taken_by(writer, layers_of(expected)[number], have)
            gain = torch.ones(39) if scales[number] is None else scales[number].gamma
            weight, bias, ridge = by_folds(z, after - have, w, gain[:, None] * writer.weight)
            asked.append(ridge is not None)
            if scales[number] is not None:
                scales[number].gamma.fill_(1)
            writer.weight.copy_(weight)
            writer.bias = torch.nn.Parameter(bias)
            want, have = after, layers_of(expected)[number](have)
        assert any(asked)
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(fitted.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_a_cut_is_refitted_to_the_dense_stream_by_hand():
    """Both FFNs lose units: what stays of the second is fitted again, towards the same, from where it was whole."""
    model = make("plain").double()
    x = images(model, 24, 4).double()
    _, rows = weights_of(model, x)
    pruned, whole = copy.deepcopy(model), copy.deepcopy(model)
    batches = list(x.split([11, 13]))
    sc.prune_sequential(whole, batches, "refit", ratios={"blocks.0.ffn": 0.6})
    sc.prune_sequential(pruned, batches, "refit", ratios={"blocks.0.ffn": 0.6, "blocks.1.ffn": 0.4})
    fc1, before = pruned.blocks[1].mlp.fc1, whole.blocks[1].mlp.fc1
    kept = [int((before.weight - row).abs().sum(1).argmin()) for row in fc1.weight]
    assert torch.equal(fc1.weight, before.weight[kept])
    with torch.no_grad():
        want, have = (each.blocks[0](each._pos_embed(each.patch_embed(x))) for each in (model, pruned))
        after = model.blocks[1](want)
        attention, ffn = layers_of(pruned.blocks[1])
        have = attention(have)
        h = taken_by(pruned.blocks[1].mlp.fc2, ffn, have)
        prior = whole.blocks[1].mlp.fc2.weight[:, kept]
        weight, bias, _ = by_folds(h, after - have, rows.of("blocks.1.mlp", after), prior)
    torch.testing.assert_close(pruned.blocks[1].mlp.fc2.weight, weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pruned.blocks[1].mlp.fc2.bias, bias, rtol=1e-5, atol=1e-6)


def test_nothing_to_cut_changes_nothing(digits_model, digits_images):
    before = copy.deepcopy(digits_model)
    sc.prune_sequential(digits_model, [digits_images], ratios={"ffn": 0})
    assert same(digits_model, before)


def redundant(model):
    """Queries, keys and values of half the rank, and half of the hidden units constant."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for block in model.blocks:
            fc1 = block.mlp.fc1
            fc1.weight[torch.randperm(len(fc1.weight), generator=generator)[: len(fc1.weight) // 2]] = 0
            heads, size = block.attn.num_heads, block.attn.head_dim
            rows = block.attn.qkv.weight.view(3, heads, size, -1)
            shifts = block.attn.qkv.bias.view(3, heads, size)
            rank = size // 2
            for part in (0, 2):
                mix = torch.randn(heads, size, rank, dtype=rows.dtype, generator=generator)
                rows[part] = mix @ rows[part, :, :rank]
                shifts[part] = (mix @ shifts[part, :, :rank, None])[..., 0]
    return model


@pytest.mark.parametrize("kind", ["plain", "registers_layer_scale", "rms_norm", "no_class_token"])
def test_what_is_redundant_goes_without_loss(kind):
    model = redundant(make(kind).double())
    x = images(model, 24, 2).double()
    dense = copy.deepcopy(model)
    ratios = {"qk": 0.5, "v": 0.5, "ffn": 0.5}
    report = sc.prune_sequential(model, list(x.split(9)), "project", ratios=ratios)
    assert report.macs[1] < 0.6 * report.macs[0]
    fresh = images(model, 6, 8).double()
    with torch.no_grad():
        wanted = dense(fresh)
        assert float((model(fresh) - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


def streams_of(model, x):
    found = []
    handles = [block.register_forward_hook(lambda _m, _a, y: found.append(y.double())) for block in model.blocks]
    with torch.no_grad():
        logits = model(x).double()
    for handle in handles:
        handle.remove()
    return found, logits


@pytest.mark.parametrize("trained", ["digits", "digits_normed"])
@pytest.mark.parametrize("method", ["project", "refit"])
@pytest.mark.parametrize("cut", [0.3, 0.6])
def test_trained_models_stay_closer_to_the_dense_stream(make_digits_model, make_normed_model, trained, method, cut):
    """On the calibration images: never farther from the dense stream after the last block, nor from its logits."""
    model = (make_digits_model if trained == "digits" else make_normed_model)()
    batches = [x for x, _ in loader("digits", model, split="train", batch_size=64, max_images=256)]
    ratios = dict.fromkeys(("qk", "v", "ffn"), cut)
    at_once, by_layer = copy.deepcopy(model), copy.deepcopy(model)
    plan = sc.plan(at_once, sc.calibrate(at_once, batches), method=method, ratios=ratios)
    sc.prune_sequential(by_layer, batches, method, sizes_of=plan)
    sc.prune(at_once, plan)
    assert sc.inspect(at_once).sizes == sc.inspect(by_layer).sizes
    x = torch.cat(batches)
    wanted, logits = streams_of(model, x)
    lost = []
    for other in (by_layer, at_once):
        found, its = streams_of(other, x)
        # As the next norm sees it.
        first, second = (F.layer_norm(each, each.shape[-1:]) for each in (found[-1], wanted[-1]))
        divergence = F.kl_div(its.log_softmax(1), logits.log_softmax(1), log_target=True, reduction="batchmean")
        lost.append((float((first - second)[:, 0].square().mean()), float(divergence)))
    assert lost[0][0] <= lost[1][0]
    assert lost[0][1] <= lost[1][1]


@pytest.mark.parametrize("kind", ["plain", "gate", "swiglu_packed_norm", "qk_rms_norm", "post_norm", "distilled"])
def test_streams_are_kept_or_computed_anew(kind):
    """Layers and heads removed, and the width cut, where that is allowed: the same bits, and what is reported."""
    ratios = {"qk": 0.4, "v": 0.3, "ffn": 0.5, "blocks.1.heads": 0.34, "blocks.0.mlp": 1}
    ratios |= {} if kind == "post_norm" else {"width": 0.2}
    found = []
    for streams in ("memory", "recompute"):
        model = make(kind)
        batches = list(images(model, 14, 3).split(SPLITS))
        report = sc.prune_sequential(model, batches, ratios=ratios, streams=streams)
        assert report.params[1] == sum(p.numel() for p in model.parameters()) == sc.inspect(model).params
        assert report.macs[1] == sc.inspect(model).macs
        found.append(model)
    assert same(*found)
    assert bool(found[0](images(found[0], 3, 1)).isfinite().all())


class Killed(Exception):
    pass


@pytest.mark.parametrize("writes", [1, 2, 3])
def test_a_run_that_was_stopped_goes_on(digits_model, digits_images, tmp_path, monkeypatch, writes):
    arguments = {"method": "project", "ratios": {**HALF, "blocks.1.heads": 0.34, "width": 0.1}, "layout": "stock"}
    batches = list(digits_images[:40].split(9))
    whole = copy.deepcopy(digits_model)
    sc.prune_sequential(whole, batches, **arguments)
    write, left = SequentialFile.write, [writes]

    def stopped(self, progress):
        write(self, progress)
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    before = copy.deepcopy(digits_model)
    monkeypatch.setattr(SequentialFile, "write", stopped)
    with pytest.raises(Killed):
        sc.prune_sequential(digits_model, batches, **arguments, resume=tmp_path / "run")
    assert same(digits_model, before)
    left[0] = 100
    sc.prune_sequential(digits_model, batches, **arguments, resume=tmp_path / "run", streams="recompute")
    assert left[0] == 100 - (3 - writes)
    assert same(digits_model, whole)


KILLED = """
import os, signal, sys
import torch
import secateur as sc
from finetuning import quiet
from secateur.data import loader
from secateur.searches.sequential_file import SequentialFile

torch.set_num_threads(1)
write = SequentialFile.write
def killed(self, progress):
    write(self, progress)
    os.kill(os.getpid(), signal.SIGKILL)
if len(sys.argv) > 2:
    SequentialFile.write = killed
model = quiet(num_classes=10)
images = loader("digits", model, batch_size=4, max_images=29, shuffle=True)
sc.prune_sequential(model, images, "refit", ratios={"qk": 0.5, "v": 0.5, "ffn": 0.5}, resume=sys.argv[1] + "/run")
torch.save(model.state_dict(), sys.argv[1] + "/state")
"""


def test_a_process_killed_between_blocks(tmp_path):
    (tmp_path / "whole").mkdir()
    code, _, text = run_script(KILLED, tmp_path / "whole")
    assert code == 0, text
    assert run_script(KILLED, tmp_path, "die")[0] == -signal.SIGKILL
    assert not (tmp_path / "state").exists()
    code, _, text = run_script(KILLED, tmp_path)
    assert code == 0, text
    mine, theirs = (torch.load(folder / "state") for folder in (tmp_path, tmp_path / "whole"))
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


def test_a_file_of_another_run_is_refused(digits_model, digits_images, tmp_path):
    batches = [digits_images[:10], digits_images[10:20]]
    arguments = {"method": "refit", "ratios": HALF, "resume": tmp_path / "run"}
    sc.prune_sequential(copy.deepcopy(digits_model), batches, **arguments)
    other = copy.deepcopy(digits_model)
    with torch.no_grad():
        other.blocks[2].mlp.fc2.weight[0, 0] += 1
    for model, changed, text in (
        (other, {}, "resume: expected the file of this run, got one with another model"),
        (digits_model, {"method": "project"}, "method = 'refit' where it is 'project' now"),
        (digits_model, {"ratios": {**HALF, "v": 0.4}}, "ratios = "),
        (digits_model, {"selection": "energy"}, "options = "),
        (digits_model, {"token_fraction": 0.5}, "token_fraction = 1.0 where it is 0.5 now"),
        (digits_model, {"max_images": 15}, "max_images = 1024 where it is 15 now"),
        (digits_model, {"loader": batches[:1]}, "resume: expected a loader of 20 images, got 10"),
    ):
        before = copy.deepcopy(model)
        with pytest.raises(sc.InvalidArgument, match=text):
            sc.prune_sequential(model, **{"loader": batches, **arguments, **changed})
        assert same(model, before)
    data = bytearray((tmp_path / "run").read_bytes())
    data[-1] ^= 1
    (tmp_path / "run").write_bytes(data)
    with pytest.raises(sc.InvalidArgument, match="checksum"):
        sc.prune_sequential(digits_model, batches, **arguments)


def test_the_sizes_of_a_plan(digits_model, digits_images):
    plan = sc.plan(digits_model, sc.calibrate(digits_model, [digits_images]), method="snp", ratios=HALF)
    report = sc.prune_sequential(digits_model, [digits_images], "project", sizes_of=plan)
    assert report.macs[1] == plan.macs[1]
    assert all(sc.inspect(digits_model).sizes[name] == keep.shape[1] for name, keep in plan.keep.items())
    with pytest.raises(sc.InvalidArgument, match="sizes_of: expected the same model"):
        sc.prune_sequential(digits_model, [digits_images], sizes_of=plan)
    with pytest.raises(sc.InvalidArgument, match="expected neither with sizes_of"):
        sc.prune_sequential(digits_model, [digits_images], sizes_of=plan, ratios=HALF)


RANKS = """
import copy, os, sys
import torch
from torch import distributed
import secateur as sc
from finetuning import quiet
from secateur.data import loader

RANK, OUT = int(os.environ["RANK"]), sys.argv[1]
torch.set_num_threads(1)
ratios = {"qk": 0.5, "v": 0.5, "ffn": 0.5, "blocks.0.mlp": 1, "width": 0.1}
for index, (method, streams) in enumerate((("project", "memory"), ("refit", "recompute"))):
    model = quiet(num_classes=10)
    images = loader("digits", model, batch_size=4, max_images=37, shuffle=True)
    resume = f"{OUT}/run.{index}"
    first = copy.deepcopy(model)
    sc.prune_sequential(first, images, method, ratios=ratios, streams=streams, resume=resume)
    torch.save(first.state_dict(), f"{OUT}/{method}.{RANK}")
    # The file is read by the first rank alone.
    sc.prune_sequential(model, images, method, ratios=ratios, resume=resume)
    assert all(torch.equal(value, first.state_dict()[name]) for name, value in model.state_dict().items())
    assert not distributed.is_initialized()
model = quiet(num_classes=10)
try:
    sc.prune_sequential(model, [torch.zeros(2, 3, 8, 8 + RANK)], ratios=ratios)
except sc.InvalidArgument as error:
    print(error, file=sys.stderr)
"""


def test_several_ranks_prune_as_one(tmp_path):
    ended = on_ranks(RANKS, tmp_path)
    for code, text in ended:
        assert code == 0, text
        assert "loader: expected images (B, 3, 8, 8), got (2, 3, 8, 9)" in text
    torch.set_num_threads(1)
    ratios = {**HALF, "blocks.0.mlp": 1, "width": 0.1}
    for method in ("project", "refit"):
        dense = quiet(num_classes=10)
        source = loader("digits", dense, batch_size=4, max_images=37, shuffle=True)
        x = torch.cat([batch for batch, _ in source])
        one = copy.deepcopy(dense)
        sc.prune_sequential(one, source, method, ratios=ratios)
        states = [torch.load(tmp_path / f"{method}.{rank}") for rank in range(2)]
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
        two = copy.deepcopy(one)
        two.load_state_dict(states[0])
        with torch.no_grad():
            torch.testing.assert_close(two(x), one(x), rtol=1e-3, atol=1e-4)


def test_models_and_layers_come_back_as_they_were(digits_model, digits_images):
    """Training mode, hooks and the streams' memory are not left behind."""
    digits_model.train()
    digits_model.blocks[1].eval()
    sc.prune_sequential(digits_model, [digits_images[:16]], ratios=HALF)
    assert digits_model.training
    assert not digits_model.blocks[1].training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in digits_model.modules())
    assert not any(parameter.is_inference() for parameter in digits_model.parameters())
    digits_model(digits_images[:2]).sum().backward()
