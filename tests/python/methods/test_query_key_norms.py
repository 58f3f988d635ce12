"""Queries and keys behind norms of their own: turned in front of these, or selected and the norms rescaled."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import reference
import secateur as sc
import torch
from models import BASE, images, make
from prepared import prepared
from secateur.families.vision_transformer.modules import HeadNorm
from secateur.methods.linalg import bases as project
from timm.layers import RmsNorm
from timm.models.vision_transformer import ResPostBlock, VisionTransformer

HEADS, DIM = 2, 7


def normalised(x, kind, eps):
    """LayerNorm or RMSNorm over the last axis, from its formula."""
    x = x - x.mean(-1, keepdim=True) if kind == "layer" else x
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def centred_scores(q, k):
    scores = q @ k.mT
    return scores - scores.mean(-1, keepdim=True)


def second(x, kind):
    x = x - x.mean(-1, keepdim=True) if kind == "layer" else x
    return x.mT @ x


class Heads:
    """Random queries and keys, (heads, tokens, d), behind norms with scales and shifts of both signs."""

    def __init__(self, kind, eps, rank=DIM, tokens=50):
        generator = torch.Generator().manual_seed(rank)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.kind, self.eps = kind, eps
        self.q, self.k = (
            (draw(HEADS, tokens, rank) + 1) * torch.tensor([3.0, *[1.0] * (rank - 1)]) @ draw(HEADS, rank, DIM)
            for _ in range(2)
        )
        self.gains, self.shifts = [draw(HEADS, DIM) for _ in range(2)], [draw(HEADS, DIM) for _ in range(2)]
        self.outputs = [
            normalised(x, kind, eps) * gain[:, None] + shift[:, None]
            for x, gain, shift in zip((self.q, self.k), self.gains, self.shifts, strict=True)
        ]

    def basis(self):
        q, k = self.outputs
        k = k - k.mean(1, keepdim=True)
        return project.query_key_bases(q.mT @ q, k.mT @ k)

    def normed(self):
        return [
            project.Normed(second(x, self.kind), gain, shift)
            for x, gain, shift in zip((self.q, self.k), self.gains, self.shifts, strict=True)
        ]

    def turned_scores(self, rank):
        """What the new heads compute behind RMS norms over ``rank`` channels, whose eps is d / rank as large."""
        found = project.behind_norms(self.basis().first(rank), *self.normed())
        x = (self.q, self.k)
        if self.kind == "layer":
            x = tuple(each - each.mean(-1, keepdim=True) for each in x)
        q, k = (
            normalised(each @ turn.mT, "rms", self.eps * DIM / rank) * found.gain[:, None]
            for each, turn in zip(x, (found.query, found.key), strict=True)
        )
        return centred_scores(q + found.shift[:, None], k)


@pytest.mark.parametrize("eps", [1e-6, 0.3])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_all_directions_leave_the_scores_as_they_are(kind, eps):
    heads = Heads(kind, eps)
    expected = centred_scores(*heads.outputs)
    # A LayerNorm's input has one direction less than channels.
    for rank in (DIM, *([DIM - 1] if kind == "layer" else [])):
        assert float((heads.turned_scores(rank) - expected).abs().max()) <= 1e-9 * float(expected.abs().max())


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("rank", [3, 4, 5])
def test_what_leaves_still_counts_as_length(kind, rank):
    heads = Heads(kind, 1e-6)
    expected, found = centred_scores(*heads.outputs), heads.turned_scores(rank)
    slopes = (found * expected).sum((-2, -1)) / found.square().sum((-2, -1))
    assert float((slopes - 1).abs().max()) < 0.1
    assert float((found - expected).square().sum()) < 0.5 * float(expected.square().sum())


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("rank", [1, 3, 4])
def test_as_many_directions_as_there_are_suffice(kind, rank):
    heads = Heads(kind, 1e-3, rank=rank)
    expected = centred_scores(*heads.outputs)
    for kept in range(rank, DIM + 1):
        assert float((heads.turned_scores(kept) - expected).abs().max()) <= 1e-7 * float(expected.abs().max())


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_missed_lengths_fall_to_zero(kind):
    heads = Heads(kind, 1e-6)
    missed = project.length_errors(heads.basis(), *heads.normed())
    assert missed.shape == (HEADS, DIM + 1)
    assert bool((missed[:, [0, -1]] == 0).all())
    assert bool((missed[:, 1:-1].diff() <= 1e-12).all())
    assert bool((missed[:, 1] > 1e-3).all())
    low = Heads(kind, 1e-6, rank=3)
    assert float(project.length_errors(low.basis(), *low.normed())[:, 3:].abs().max()) <= 1e-9


@pytest.mark.parametrize("rank", [2, 5])
def test_missed_lengths_of_normal_vectors(rank):
    """What norms over fewer channels do to scores that are else exact: those of the kept directions."""
    heads = Heads("rms", 0.0, tokens=3000)
    generator = torch.Generator().manual_seed(0)
    heads.q, heads.k = (torch.randn(HEADS, 3000, DIM, generator=generator, dtype=torch.float64) for _ in range(2))
    heads.gains, heads.shifts = [torch.ones(HEADS, DIM)] * 2, [torch.zeros(HEADS, DIM)] * 2
    heads.gains, heads.shifts = ([x.double() for x in each] for each in (heads.gains, heads.shifts))
    heads.outputs = [normalised(x, "rms", 0.0) for x in (heads.q, heads.k)]
    basis = heads.basis()
    part = basis.first(rank)
    wanted = centred_scores(heads.outputs[0] @ part.query.mT, heads.outputs[1] @ part.key.mT)
    share = (heads.turned_scores(rank) - wanted).square().sum((-2, -1)) / wanted.square().sum((-2, -1))
    predicted = project.length_errors(basis, *heads.normed())[:, rank]
    assert bool((share / predicted > 0.6).all())
    assert bool((share / predicted < 1.4).all())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["qk_norm", "qk_rms_norm"])
def test_a_cut_to_the_rank_of_the_heads_changes_nothing(kind):
    """Also where the norms' eps is not small against what they divide by."""
    model = make(kind).double()
    generator = torch.Generator().manual_seed(1)
    for block in model.blocks:
        attn, heads = block.attn, 3
        attn.q_norm.eps, attn.k_norm.eps = 0.2, 0.05
        spans = torch.randn(2 * heads, 13, 4, generator=generator, dtype=torch.float64) / 2
        inner = torch.randn(2 * heads, 4, 40, generator=generator, dtype=torch.float64) / 6
        rows = (spans @ inner).flatten(0, 1)
        attn.qkv.weight[: len(rows)], attn.qkv.bias[: len(rows)] = rows[:, :39], rows[:, 39]
    x = images(model, 9).double()
    expected = model(x)
    plan = sc.plan(model, sc.calibrate(model, [x]), method="project", ratios={"qk": 1 - 4 / 13})
    sc.prune(model, plan)
    assert {model.blocks[i].attn.q_norm.size for i in range(2)} == {4}
    assert float((model(x) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


# On a trained model


@torch.no_grad()
def scores_of(model, x):
    """Every block's centred scores, from what leaves the norms."""
    found = {}
    handles = [
        getattr(block.attn, name).register_forward_hook(
            lambda _m, _a, out, key=(index, name): found.__setitem__(key, out)
        )
        for index, block in enumerate(model.blocks)
        for name in ("q_norm", "k_norm")
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return [centred_scores(found[index, "q_norm"], found[index, "k_norm"]) for index in range(len(model.blocks))]


def cut(model, stats, method, fraction, block=0):
    pruned = copy.deepcopy(model)
    plan = sc.plan(model, stats, method=method, ratios={f"blocks.{block}.qk": fraction})
    sc.prune(pruned, plan)
    return pruned, plan


def shares_lost(model, stats, x, method, fraction):
    """Of each block's scores, cut alone, so that what enters it is what entered it before."""
    lost = []
    for block, expected in enumerate(scores_of(model, x)):
        found = scores_of(cut(model, stats, method, fraction, block)[0], x)[block]
        lost.append(float((found - expected).square().sum() / expected.square().sum()))
    return lost


@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.75])
def test_trained_scores_stay_what_they_were(trained_normed, fraction):
    lost = {method: np.array(shares_lost(*trained_normed, method, fraction)) for method in ("project", "refit", "snp")}
    assert (lost["project"] <= {0.3: 0.01, 0.5: 0.03, 0.75: 0.2}[fraction]).all()
    assert (lost["project"] <= 0.5 * lost["refit"]).all()
    assert (lost["refit"] < lost["snp"]).all()


@pytest.mark.parametrize("method", ["project", "refit"])
def test_the_temperature_stays(trained_normed, method):
    """The best multiple of the new scores is the new scores: norms over fewer channels divide by other lengths."""
    model, stats, x = trained_normed
    for block, expected in enumerate(scores_of(model, x)):
        found = scores_of(cut(model, stats, method, 0.5, block)[0], x)[block]
        slope = (found * expected).sum((0, 2, 3)) / found.square().sum((0, 2, 3))
        assert float((slope - 1).abs().max()) < 0.15


def test_predicted_errors_are_of_the_size_of_those_found(trained_normed):
    model, stats, x = trained_normed
    anatomy = sc.inspect(model)
    method = prepared(model, stats, "project")
    for fraction in (0.5, 0.75, 0.9):
        found = shares_lost(model, stats, x, "project", fraction)
        for block, share in enumerate(found):
            errors = method.errors(anatomy.group(f"blocks.{block}.qk"))
            predicted = errors[cut(model, stats, "project", fraction, block)[1].keep[f"blocks.{block}.qk"].shape[1]]
            assert share / 10 < predicted < 4 * share
            # Above what the cut scores themselves lose, there is what the norms' lengths do.
            group = f"blocks.{block}.qk"
            basis = project.query_key_bases(
                *(torch.from_numpy(stats.gram(group, f"{p}_gram")) for p in ("query", "key"))
            )
            grams = map(torch.from_numpy, stats.image_grams(group))
            alone = project.score_errors(basis, *grams).mean(0)
            assert fraction < 0.9 or predicted > float(alone[3]) + 0.003


@torch.no_grad()
def test_one_direction_less_than_a_layer_norm_has_channels_is_exact(trained_normed):
    model, stats, x = trained_normed
    pruned, plan = cut(model, stats, "project", 1 / 31)
    assert plan.keep["blocks.0.qk"].shape[1] == 30
    assert float((pruned(x) - model(x)).abs().max()) <= 1e-6 * float(model(x).abs().max())


@torch.no_grad()
def test_cut_again_saved_and_loaded(trained_normed, tmp_path):
    model, stats, x = trained_normed
    once, plan = cut(model, stats, "project", 0.3)
    assert plan.uncentred == ("blocks.0.attn.q_norm", "blocks.0.attn.k_norm")
    assert not once.blocks[0].attn.q_norm.centred
    plan.save(tmp_path / "plan.json")
    loaded = sc.Plan.load(tmp_path / "plan.json")
    assert loaded.uncentred == plan.uncentred
    assert loaded.eps == plan.eps
    again = copy.deepcopy(model)
    sc.prune(again, loaded)
    assert torch.equal(again(x), once(x))

    sc.save(once, tmp_path / "once.safetensors")
    assert torch.equal(sc.load(tmp_path / "once.safetensors")(x), once(x))

    # Of what was turned, the second cut turns the rest: the same rank as from one cut, and nearly the same scores.
    more = sc.calibrate(once, [x])
    twice = copy.deepcopy(once)
    second_plan = sc.plan(once, more, method="project", ratios={"blocks.0.qk": 0.3})
    assert second_plan.uncentred == ()
    sc.prune(twice, second_plan)
    sc.save(twice, tmp_path / "twice.safetensors")
    assert torch.equal(sc.load(tmp_path / "twice.safetensors")(x), twice(x))
    expected = scores_of(model, x)[0]
    assert float((scores_of(twice, x)[0] - expected).square().sum() / expected.square().sum()) <= 0.03


@torch.no_grad()
def test_block_by_block(make_normed_model, digits_images):
    model = make_normed_model()
    plain = copy.deepcopy(model)
    ratios = {"qk": 0.5}
    sc.prune(plain, sc.plan(model, sc.calibrate(model, [digits_images]), method="project", ratios=ratios))
    expected, at_once = model(digits_images), plain(digits_images)
    sc.prune_sequential(model, [digits_images], "project", ratios=ratios)
    assert not any(block.attn.k_norm.centred for block in model.blocks)
    lost = [float((found - expected).square().mean()) for found in (model(digits_images), at_once)]
    assert lost[0] <= 1.5 * lost[1]
    assert lost[1] <= 0.01 * float(expected.var())


def test_whole_heads_leave_with_their_norms(trained_normed):
    model, _, x = trained_normed
    # The middle head, which nothing reads; one direction less than a LayerNorm has channels is all there is.
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.blocks[1].attn.proj.weight[:, 31:62] = 0
    stats = sc.calibrate(model, [x])
    pruned = []
    for ratios in ({"blocks.1.heads": 0.34}, {"blocks.1.heads": 0.34, "blocks.1.qk": 1 / 31}):
        plan = sc.plan(model, stats, method="project", ratios=ratios)
        assert plan.keep["blocks.1.heads"].tolist() == [[0, 2]]
        pruned.append(copy.deepcopy(model))
        sc.prune(pruned[-1], plan)
    with torch.no_grad():
        outputs = [each(x) for each in pruned]
        assert float((outputs[0] - outputs[1]).abs().max()) <= 1e-6 * float(outputs[0].abs().max())
    for method in ("project", "refit"):
        plan = sc.plan(model, stats, method=method, ratios={"blocks.1.qk": 0.4, "blocks.1.heads": 0.34})
        pruned = copy.deepcopy(model)
        sc.prune(pruned, plan)
        assert pruned.blocks[1].attn.q_norm.weight.shape == (2 * 19,)
        with torch.no_grad():
            expected = reference.substituted(model, plan)(x)
            assert float((pruned(x) - expected).abs().max()) <= 1e-10 * max(1.0, float(expected.abs().max()))


# Where nothing can be turned, and what is refused


@torch.no_grad()
@pytest.mark.parametrize("kind", ["without_scale", "post_norm"])
def test_neurons_are_selected_where_norms_cannot_be_turned(kind):
    more = {"qk_norm": True, "block_fn": ResPostBlock, "norm_layer": RmsNorm}
    model = (
        make("qk_norm_without_scale")
        if kind == "without_scale"
        else reference.randomise(VisionTransformer(**BASE, **more)).eval()
    )
    model, x = model.double(), images(model, 9).double()
    stats = sc.calibrate(model, [x])
    plans = [sc.plan(model, stats, method=method, ratios={"qk": 0.4}) for method in ("project", "refit")]
    assert plans[0].uncentred == ()
    assert all(np.array_equal(plans[0].keep[name], plans[1].keep[name]) for name in plans[1].keep)
    expected = reference.substituted(model, plans[0])(x)
    sc.prune(model, plans[0])
    assert isinstance(model.blocks[0].attn.q_norm, HeadNorm)
    assert float((model(x) - expected).abs().max()) <= 1e-10 * max(1.0, float(expected.abs().max()))


def test_other_norms_are_refused(trained_normed):
    model, stats, _ = trained_normed
    _, plan = cut(model, stats, "project", 0.5)
    for field, value in (
        ("uncentred", ("blocks.1.attn.q_norm",)),  # of a layer that stays whole
        ("uncentred", ("blocks.0.norm1",)),
        ("uncentred", ("nothing",)),
        ("eps", {"blocks.1.attn.q_norm": 1e-6}),
        ("eps", {"blocks.0.attn.q_norm": -1.0}),
    ):
        wrong, untouched = copy.deepcopy(model), copy.deepcopy(plan)
        object.__setattr__(untouched, field, value)
        with pytest.raises(sc.InvalidArgument, match=rf"plan\.{field}"):
            sc.prune(wrong, untouched)
        assert all(torch.equal(a, b) for a, b in zip(wrong.parameters(), model.parameters(), strict=True))
