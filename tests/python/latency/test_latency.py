"""Latency: tables and what they predict, budgets in time, the rounds that make a target true, files, refusals."""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import secateur as sc
import torch
from models import make
from secateur.anatomy.fingerprint import Fingerprint
from secateur.budgets.allocate import allocate
from secateur.families.base import Family
from secateur.families.registry import family_of
from secateur.families.vision_transformer.family import PlainViT
from secateur.latency import measure as timing
from secateur.latency import table as latency
from secateur.latency.levels import levels_for, random_cuts
from secateur.latency.machine import Machine
from secateur.latency.predict import Latency
from secateur.latency.runtimes.registry import RUNTIMES
from secateur.latency.table import Grid, LatencyTable, Layer
from secateur.methods.base import Method
from secateur.plans import on_the_clock
from secateur.surgery.structure import Structure
from timm.models.vision_transformer import VisionTransformer


def allocated(*args, **kwargs):
    return allocate(*args, **kwargs).sizes


# The fixtures set two threads for every test.
HERE = replace(Machine.here(torch.device("cpu")), threads=2)
NONE = {"groups": None, "freeze": (), "min_keep": {}, "round_to": None}


def small(width=24, depth=2, heads=2, ratio=2.5, classes=5):
    """A model of heads of width / heads; 16 patches and a class token."""
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=16, patch_size=4, embed_dim=width, depth=depth, num_heads=heads, mlp_ratio=ratio, num_classes=classes
    ).eval()


def table_of(anatomy, attention, ffn, rest=0.0, scale=1.0, overhead=0.0, batch_size=4, machine=HERE):
    """A table by functions of (width, qk, v), (width, ffn) and the width, at every third size or so."""
    kinds = {kind: [g for g in anatomy.groups if g.kind == kind] for kind in ("qk", "v", "ffn", "width")}

    def layer(names, seconds):
        axes = {name: levels(kinds[name][0].size) for name in names}
        values = [seconds(*corner) for corner in itertools.product(*axes.values())]
        shape = [len(each) for each in axes.values()]
        blocks = range(len(kinds["ffn"])) if len(names) > 1 else ()
        places = tuple({name: f"blocks.{block}.{name}" for name in names if name != "width"} for block in blocks)
        return Layer(places, Grid(axes, np.array(values, float).reshape(shape)))

    return LatencyTable(
        model=Fingerprint.without_weights(anatomy),
        input_size=anatomy.input_size,
        batch_size=batch_size,
        dtype="float32",
        runtime="torch",
        runtime_version=torch.__version__,
        machine=machine,
        layers=(
            layer(("width", "qk", "v"), attention),
            layer(("width", "ffn"), ffn),
            layer(("width",), lambda w: rest),
        ),
        scale=scale,
        overhead=overhead,
    )


def levels(size):
    return tuple(sorted({1, *range(3, size, 3), size}))


# --- Interpolation ----------------------------------------------------------------------------------------------------


def test_interpolation_by_hand():
    grid = Grid({"width": (8, 16), "ffn": (10, 20, 40)}, np.array([[1.0, 2.0, 3.0], [2.0, 6.0, 7.0]]))
    assert grid.at({"width": 8, "ffn": 20}) == 2.0
    assert grid.at({"width": 8, "ffn": 15}) == 1.5
    assert grid.at({"width": 8, "ffn": 25}) == 2.25
    assert grid.at({"width": 12, "ffn": 20}) == 4.0
    assert grid.at({"width": 12, "ffn": 30}) == 0.5 * 2.5 + 0.5 * 6.5
    assert grid.at({"width": 8, "ffn": 5}) == 0.5  # on the line through the least two
    assert grid.at({"width": 16, "ffn": 1}) == 0.0  # which would be below zero here
    np.testing.assert_allclose(grid.at({"width": 12, "ffn": [10, 30, 40]}), [1.5, 4.5, 5.0])


def test_a_product_of_lines_is_met_everywhere():
    axes = {"width": (4, 9, 21), "qk": (1, 5, 8), "v": (2, 7, 8)}
    grid = Grid(
        axes, np.array([w * (3 + q) * (1 + 2 * v) for w, q, v in itertools.product(*axes.values())]).reshape(3, 3, 3)
    )
    for w, q, v in itertools.product((4, 7, 13, 21), (1, 2, 6, 8), (2, 3, 7, 8)):
        assert grid.at({"width": w, "qk": q, "v": v}) == pytest.approx(w * (3 + q) * (1 + 2 * v))


def test_noise_does_not_make_larger_faster():
    generator = np.random.default_rng(0)
    for _ in range(20):
        noisy = Grid({"qk": (1, 2, 5, 8), "v": (1, 4, 8)}, generator.random((4, 3)))
        smooth = noisy.monotone().seconds
        assert (np.diff(smooth, axis=0) >= 0).all()
        assert (np.diff(smooth, axis=1) >= 0).all()
        assert noisy.seconds.min() <= smooth.min() <= smooth.max() <= noisy.seconds.max()
        rising = Grid(noisy.axes, smooth)
        np.testing.assert_array_equal(rising.monotone().seconds, smooth)


@pytest.mark.parametrize(
    ("axes", "seconds"),
    [
        ({"qk": (1, 2)}, [1.0]),
        ({"qk": (2, 1)}, [1.0, 2.0]),
        ({"qk": (0, 1)}, [1.0, 2.0]),
        ({"qk": ()}, []),
        ({"qk": (1, 2)}, [1.0, float("nan")]),
    ],
)
def test_what_is_no_grid(axes, seconds):
    with pytest.raises(sc.InvalidArgument, match="grid: expected finite seconds at rising sizes"):
        Grid(axes, np.array(seconds))


# --- Prediction -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "depth", "heads"), [(24, 1, 2), (39, 3, 3), (40, 2, 4)])
def test_a_prediction_is_the_sum_of_its_layers(width, depth, heads):
    anatomy = sc.inspect(small(width, depth, heads))
    attention, ffn = (lambda w, q, v: w * (1 + q + 2 * v)), (lambda w, f: 3 * w * f)
    table = table_of(anatomy, attention, ffn, rest=1000, scale=1e-3, overhead=0.25)
    head = width // heads
    hidden = anatomy.group("blocks.0.ffn").size
    dense = depth * (attention(width, head, head) + ffn(width, hidden)) + 1000
    assert table.predict(anatomy) == pytest.approx(0.25 + 1e-3 * dense)
    sizes = {"blocks.0.qk": 5, "blocks.0.v": 7, f"blocks.{depth - 1}.ffn": 11, "width": 17}
    blocks = [[head, head, hidden] for _ in range(depth)]
    blocks[0][:2] = 5, 7
    blocks[-1][2] = 11
    expected = sum(attention(17, q, v) + ffn(17, f) for q, v, f in blocks) + 1000
    assert table.predict(anatomy, sizes) == pytest.approx(0.25 + 1e-3 * expected)


def test_costs_along_sizes_are_totals_one_by_one():
    anatomy = sc.inspect(small(39, 3, 3))
    table = table_of(anatomy, lambda w, q, v: w + max(q, v) ** 2, lambda w, f: f // 8, rest=3, scale=0.5, overhead=2)
    cost = Latency(table, anatomy, slope=1.5, offset=0.25)
    base = {"width": 30, "blocks.1.qk": 6, "blocks.1.v": 9}
    for names in (["blocks.1.qk", "blocks.1.v"], ["blocks.2.ffn"], ["blocks.0.v"], ["width"]):
        sizes = [1, 4, 6, 13]
        expected = [cost.total({**base, **dict.fromkeys(names, size)}) for size in sizes]
        np.testing.assert_allclose(cost.along(base, dict.fromkeys(names, sizes)), expected)
        assert cost.total(base) == pytest.approx(1.5 * table.predict(anatomy, base) + 0.25 * table.predict(anatomy))
    assert cost.dense == pytest.approx(table.predict(anatomy))


def test_wrong_predictions():
    model = small()
    anatomy = sc.inspect(model)
    table = table_of(anatomy, lambda w, q, v: 1, lambda w, f: 1)
    with pytest.raises(sc.InvalidArgument, match="group: expected one of .*, got 'blocks.7.ffn'"):
        table.predict(anatomy, {"blocks.7.ffn": 3})
    with pytest.raises(sc.InvalidArgument, match=r"latency_table: .* ffn of 1…60, got 61"):
        table.predict(anatomy, {"blocks.1.ffn": 61})
    narrow = replace(table, layers=tuple(replace(each, grid=only_dense_width(each.grid)) for each in table.layers))
    assert narrow.predict(anatomy) == table.predict(anatomy)
    with pytest.raises(sc.InvalidArgument, match=r"latency_table: .* width of 24 alone, got 16"):
        narrow.predict(anatomy, {"width": 16})


def only_dense_width(grid):
    return Grid({**grid.axes, "width": grid.axes["width"][-1:]}, grid.seconds[-1:])


def test_uneven_sizes_by_hand():
    """Between the two grids by the share of the sizes that are uneven; the greatest even size is beyond the uneven."""
    even = Grid({"qk": (8, 16), "v": (8, 16)}, np.array([[1.0, 2.0], [3.0, 4.0]]))
    uneven = Grid({"qk": (7, 15), "v": (7, 15)}, np.array([[10.0, 20.0], [30.0, 40.0]]))
    layer = Layer((), even, uneven)
    assert layer.at({"qk": 12, "v": 8}) == 2.0  # multiples of 4
    assert layer.at({"qk": 15, "v": 7}) == 30.0
    assert layer.at({"qk": 11, "v": 15}) == 30.0
    assert layer.at({"qk": 15, "v": 8}) == 17.0
    assert layer.at({"qk": 16, "v": 15}) == 0.5 * 3.875 + 0.5 * 42.5
    np.testing.assert_allclose(layer.at({"qk": [12, 15], "v": 8}), [2.0, 17.0])
    with pytest.raises(sc.InvalidArgument, match=r"qk of 1…16, got 17"):
        layer.at({"qk": 17, "v": 7})
    # An axis of one level in both is not uneven, whatever its size is.
    single = Layer((), Grid({"width": (39,), "ffn": (4, 8)}, np.array([[1.0, 2.0]])))
    assert single.at({"width": 39, "ffn": 5}) == 1.25
    single = replace(single, uneven=Grid({"width": (39,), "ffn": (7,)}, np.array([[9.0]])))
    assert single.uneven_axes == ("ffn",)
    assert single.at({"width": 39, "ffn": 8}) == 2.0
    assert single.at({"width": 39, "ffn": 3}) == 9.0


@pytest.fixture
def table_of_heads():
    """Of two blocks, by (width, qk, v, heads) and (width, ffn), with 7 seconds around them."""
    anatomy = sc.inspect(small(24, 2, 4))
    table = table_of(anatomy, lambda w, q, v: 0, lambda w, f: w * f, rest=7)
    axes = {"width": (12, 24), "qk": (1, 6), "v": (1, 6), "heads": (1, 2, 4)}
    seconds = [w * (5 + h * (q + v)) for w, q, v, h in itertools.product(*axes.values())]
    attention = Layer(
        tuple(
            {**{kind: f"blocks.{i}.{kind}" for kind in ("qk", "v", "heads")}, "present": f"blocks.{i}.attn"}
            for i in (0, 1)
        ),
        Grid(axes, np.array(seconds, float).reshape([len(each) for each in axes.values()])),
    )
    ffn = replace(
        table.layers[1], places=tuple({"ffn": f"blocks.{i}.ffn", "present": f"blocks.{i}.mlp"} for i in (0, 1))
    )
    return anatomy, replace(table, layers=(attention, ffn, table.layers[2]))


def test_heads_and_absent_layers_by_hand(table_of_heads):
    anatomy, table = table_of_heads
    hidden = anatomy.group("blocks.0.ffn").size
    dense = 2 * 24 * (5 + 4 * 12) + 2 * 24 * hidden + 7
    assert table.predict(anatomy) == dense
    assert table.predict(anatomy, {"blocks.1.heads": 3}) == dense - 24 * 12
    assert table.predict(anatomy, {"blocks.1.heads": 3, "blocks.1.qk": 2}) == dense - 24 * 12 - 24 * 3 * 4
    assert table.predict(anatomy, {"blocks.0.attn": 0}) == dense - 24 * (5 + 4 * 12)
    assert table.predict(anatomy, {"blocks.0.mlp": 0, "blocks.0.ffn": 0}) == dense - 24 * hidden
    # What is not there costs nothing whatever its sizes are.
    absent = {"blocks.0.attn": 0, "blocks.1.mlp": 0}
    sizes = {"blocks.0.qk": 3, "blocks.0.heads": 1, "blocks.1.ffn": 2}
    assert table.predict(anatomy, {**absent, **sizes}) == table.predict(anatomy, absent)
    gone = {f"blocks.{i}.{layer}": 0 for i in (0, 1) for layer in ("attn", "mlp")}
    assert table.predict(anatomy, {**gone, "width": 13}) == 7


def test_costs_along_heads_and_layers_are_totals_one_by_one(table_of_heads, tmp_path):
    anatomy, table = table_of_heads
    table.save(tmp_path / "table.json")
    cost = Latency(LatencyTable.load(tmp_path / "table.json"), anatomy, slope=1.2, offset=0.1)
    base = {"width": 20, "blocks.1.qk": 4, "blocks.0.heads": 3, "blocks.1.mlp": 0}
    for names, sizes in (
        (["blocks.1.heads"], [1, 2, 3, 4]),
        (["blocks.0.heads", "blocks.1.heads"], [1, 3]),
        (["blocks.0.attn"], [0, 1]),
        (["blocks.0.attn", "blocks.0.mlp"], [0, 1]),
        (["blocks.1.ffn"], [1, 30]),
        (["blocks.0.qk", "blocks.0.v"], [1, 5]),
    ):
        expected = [cost.total({**base, **dict.fromkeys(names, size)}) for size in sizes]
        np.testing.assert_allclose(cost.along(base, dict.fromkeys(names, sizes)), expected)


def test_heads_are_an_axis_of_one_level_unless_they_are_asked_for():
    model = small(48, 2, 6)
    anatomy = sc.inspect(model)
    family = family_of(model)
    found = timing._distinct(family, model, anatomy, levels_for(anatomy, ("qk", "v"), None))
    attention, pooled, ffn, alone, _ = found
    assert attention.axes["heads"] == (6,)
    assert attention.places[1]["present"] == "blocks.1.attn"
    assert attention.places[1]["heads"] == "blocks.1.heads"
    assert attention.places[1]["last_block"] == "whole"
    assert pooled.places == ({**attention.places[1], "last_block": "pooled"},)
    assert ffn.places[0] == {"ffn": "blocks.0.ffn", "present": "blocks.0.mlp"}
    assert alone.places == ({**ffn.places[1], "last_block": "pooled"},)
    attention, *_ = timing._distinct(family, model, anatomy, levels_for(anatomy, ("qk", "heads", "block"), None))
    assert attention.axes["heads"] == (1, 2, 3, 4, 6)
    assert attention.uneven["heads"] == attention.axes["heads"]
    assert attention.axes["v"] == attention.uneven["v"] == (8,)
    attention, *_, rest = timing._distinct(family, model, anatomy, levels_for(anatomy, None, None))
    assert {axis: len(levels) for axis, levels in attention.axes.items()}["heads"] == 3
    assert "present" not in attention.axes
    assert set(rest.axes) == {"width"}
    cuts = random_cuts(anatomy, levels_for(anatomy, ("qk", "v", "heads", "block"), None))
    assert all(not name.endswith((".attn", ".mlp", ".ffn")) for sizes in cuts for name in sizes)
    assert any(sizes["blocks.0.heads"] < 6 for sizes in cuts)


# --- Choosing ---------------------------------------------------------------------------------------------------------


def staircase(w, q, v):
    """Steps of four per head, with the smaller padded."""
    return 4.0 * -(-max(q, v) // 4) + 0.1 * (q + v)


def steps(w, f):
    return 2.0 * -(-f // 12) + 0.01 * f


def random_losses(anatomy, seed):
    """Falling losses, convex or not, one row for each group."""
    generator = np.random.default_rng(seed)
    found = {}
    for group in anatomy.groups:
        loss = np.concatenate([np.cumsum(generator.random(group.size) ** 3)[::-1], [0.0]])
        found[group.name] = loss * generator.random()
    return found


@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("seed", range(4))
def test_the_choice_is_nearly_the_best_where_cost_is_a_staircase(fraction, seed):
    """Against every choice there is, with costs that are not linear."""
    anatomy = sc.inspect(small(24, 2, 2))
    table = table_of(anatomy, staircase, steps, rest=1)
    cost = Latency(table, anatomy)
    losses = random_losses(anatomy, seed)
    limits = {**NONE, "round_to": {"qk": 3, "v": 3, "ffn": 6}}
    kept = allocated(anatomy, sc.Target(latency=fraction), **limits, losses=lambda g: losses[g.name], latency=cost)
    assert cost.total(kept) <= fraction * cost.dense
    heads, hidden = (3, 6, 9, 12), tuple(range(6, 61, 6))
    found = []
    for a, b, f, g in itertools.product(heads, heads, hidden, hidden):
        seconds = staircase(24, a, a) + staircase(24, b, b) + steps(24, f) + steps(24, g) + 1
        if seconds <= fraction * (2 * staircase(24, 12, 12) + 2 * steps(24, 60) + 1):
            sizes = {"blocks.0.qk": a, "blocks.0.v": a, "blocks.1.qk": b, "blocks.1.v": b}
            sizes |= {"blocks.0.ffn": f, "blocks.1.ffn": g}
            found.append(sum(losses[name][size] for name, size in sizes.items()))
    loss = sum(losses[name][size] for name, size in kept.items() if name != "width")
    worst = sum(losses[name][1] for name in kept)
    assert loss - min(found) <= 0.08 * worst


@pytest.mark.parametrize("with_losses", [False, True])
@pytest.mark.parametrize("groups", [None, ("ffn",), ("qk",), ("qk", "v", "ffn", "width")])
def test_every_budget_holds_and_nothing_more_fits(with_losses, groups):
    anatomy = sc.inspect(small(40, 3, 5))
    table = table_of(anatomy, lambda w, q, v: w * (staircase(w, q, v) + 1), lambda w, f: w * steps(w, f), rest=2)
    cost = Latency(table, anatomy)
    losses = random_losses(anatomy, 0)
    limits = {**NONE, "groups": groups, "round_to": 1}
    share = 0.98 if groups == ("qk",) else 0.85
    target = sc.Target(latency=share, macs=0.9, params=0.95)
    chosen = allocated(
        anatomy, target, **limits, losses=(lambda g: losses[g.name]) if with_losses else None, latency=cost
    )

    def holds(sizes):
        return (
            cost.total(sizes) <= share * cost.dense
            and anatomy.macs_at(sizes) <= 0.9 * anatomy.macs
            and anatomy.params_at(sizes) <= 0.95 * anatomy.params
        )

    assert holds(chosen)
    for group in anatomy.groups:
        if group.kind in (groups or ("qk", "v", "ffn")) and chosen[group.name] < group.size:
            if group.kind == "width":
                continue
            both = ("qk", "v") if group.kind in ("qk", "v") and groups != ("qk",) else (group.kind,)
            wider = {f"blocks.{group.block}.{kind}": chosen[group.name] + 1 for kind in both}
            assert not holds({**chosen, **wider}), group.name


@pytest.mark.parametrize("seed", range(3))
def test_a_budget_holds_where_queries_and_values_go_apart(seed):
    """The smaller of the two is padded, so that what one costs depends on the other."""
    anatomy = sc.inspect(small(24, 2, 2))
    cost = Latency(table_of(anatomy, lambda w, q, v: float(max(q, v)), lambda w, f: 0.01 * f), anatomy)
    losses = random_losses(anatomy, seed)
    limits = {**NONE, "groups": ("qk", "v"), "round_to": {"qk": 1, "v": 2}}
    kept = allocated(anatomy, sc.Target(latency=0.7), **limits, losses=lambda g: losses[g.name], latency=cost)
    assert 0.6 * cost.dense < cost.total(kept) <= 0.7 * cost.dense


def test_latency_and_macs_lead_to_different_choices():
    """A cost that only the FFN has is not paid by the attention."""
    anatomy = sc.inspect(small(24, 2, 2))
    losses = random_losses(anatomy, 1)
    cost = Latency(table_of(anatomy, lambda w, q, v: 1, lambda w, f: f), anatomy)
    kept = allocated(anatomy, sc.Target(latency=0.6), **NONE, losses=lambda g: losses[g.name], latency=cost)
    assert all(kept[f"blocks.{block}.{kind}"] == 12 for block in (0, 1) for kind in ("qk", "v"))
    assert cost.total(kept) <= 0.6 * cost.dense


def test_an_infeasible_target_names_what_can_be_reached():
    anatomy = sc.inspect(small(24, 2, 2))
    cost = Latency(table_of(anatomy, staircase, steps, rest=5), anatomy)
    limits = {**NONE, "round_to": 1}
    with pytest.raises(sc.InvalidArgument, match=r"target: expected latency >= 0\.\d+ .* got latency = 0.01") as error:
        allocated(anatomy, sc.Target(latency=0.01), **limits, latency=cost)
    reachable = float(str(error.value).split(">= ")[1].split()[0])
    allocated(anatomy, sc.Target(latency=reachable), **limits, latency=cost)
    with pytest.raises(sc.InvalidArgument):
        allocated(anatomy, sc.Target(latency=reachable - 1e-3), **limits, latency=cost)


# --- On the clock -----------------------------------------------------------------------------------------------------


class Clock:
    """A machine whose times are the table's, bent."""

    def __init__(self, cost, bend):
        self.cost, self.bend, self.seen = cost, bend, []

    def __call__(self, sizes):
        self.seen.append(dict(sizes))
        ratio = self.bend(self.cost.total(sizes) / self.cost.dense)
        return ratio, (0.9 * ratio, 1.1 * ratio)


def rounds(bend, target=0.6, depth=4):
    anatomy = sc.inspect(small(48, depth, 2, 8.0))
    table = table_of(anatomy, lambda w, q, v: 8.0 * (q + v), lambda w, f: float(f), rest=1)
    clock = Clock(Latency(table, anatomy), bend)

    def choose(cost, fraction):
        limits = {**NONE, "round_to": 1}
        return allocated(anatomy, sc.Target(latency=fraction), **limits, latency=cost)

    sizes, report = on_the_clock.meet(target, table, anatomy, choose, clock)
    assert sizes in clock.seen
    assert report.measured == clock.bend(clock.cost.total(sizes) / clock.cost.dense)
    return clock, report


def test_a_true_table_needs_one_round():
    clock, report = rounds(lambda ratio: ratio)
    assert (len(clock.seen), report.rounds) == (1, 1)
    assert report.predicted == report.measured
    assert 0.57 <= report.measured <= 0.6
    assert report.quartiles == (0.9 * report.measured, 1.1 * report.measured)


@pytest.mark.parametrize("factor", [0.8, 1.12, 1.4])
def test_a_table_that_is_wrong_by_a_factor_is_corrected_at_once(factor):
    clock, report = rounds(lambda ratio: factor * ratio)
    assert (len(clock.seen), report.rounds) == (2, 2)
    assert 0.57 <= report.measured <= 0.6
    assert report.predicted == pytest.approx(report.measured, rel=1e-3)


def test_a_table_that_is_wrong_by_an_offset_takes_some_rounds():
    """The third round goes by the line through the first two, which is the truth."""
    clock, report = rounds(lambda ratio: 0.35 + 0.65 * ratio)
    assert 0.585 <= report.measured <= 0.6
    assert (len(clock.seen), report.rounds) == (3, 3)
    assert report.predicted == pytest.approx(report.measured)


def test_after_three_rounds_the_best_is_given_with_a_warning():
    values = iter([0.9, 0.7, 0.8])
    anatomy = sc.inspect(small(48, 4, 2, 8.0))
    table = table_of(anatomy, lambda w, q, v: 8.0 * (q + v), lambda w, f: float(f), rest=1)
    seen = []

    def choose(cost, fraction):
        return allocated(anatomy, sc.Target(latency=fraction), **{**NONE, "round_to": 1}, latency=cost)

    def measure(sizes):
        seen.append(sizes)
        return next(values), (0.1, 0.9)

    with pytest.warns(UserWarning, match=r"target: expected latency = 0.6, got 0.700 measured after 3 rounds"):
        sizes, report = on_the_clock.meet(0.6, table, anatomy, choose, measure)
    assert (len(seen), report.rounds, report.measured) == (3, 2, 0.7)
    assert sizes == seen[1]


def test_of_those_that_keep_the_target_the_slowest_is_given():
    ratios = iter([0.5, 0.55, 0.4])
    clock, report = rounds(lambda ratio: ratio)
    anatomy, table = clock.cost.anatomy, clock.cost.table

    def choose(cost, fraction):
        return allocated(anatomy, sc.Target(latency=fraction), **{**NONE, "round_to": 1}, latency=cost)

    _, report = on_the_clock.meet(0.6, table, anatomy, choose, lambda sizes: (next(ratios), (0.0, 1.0)))
    assert (report.rounds, report.measured) == (2, 0.55)


def test_what_was_measured_can_show_that_a_target_is_out_of_reach():
    with pytest.raises(sc.InvalidArgument, match=r"target: expected latency >= 0\.\d+ .*, got latency = 0.6"):
        rounds(lambda ratio: 0.65 + 0.35 * ratio)


def test_where_the_table_is_near_its_least_the_whole_target_is_used():
    """Between what can be reached and the margin that is aimed below the target."""
    anatomy = sc.inspect(small(24, 2, 2))
    table = table_of(anatomy, staircase, steps, rest=5)
    cost = Latency(table, anatomy)
    least = cost.total({g.name: 1 for g in anatomy.groups if g.kind not in ("width", "tokens")}) / cost.dense
    choose = lambda c, fraction: allocated(  # noqa: E731
        anatomy, sc.Target(latency=fraction), **{**NONE, "round_to": 1}, latency=c
    )
    _, report = on_the_clock.meet(1.005 * least, table, anatomy, choose, Clock(cost, lambda ratio: ratio))
    assert report.measured <= 1.005 * least


def test_a_target_of_one_cuts_and_times_nothing():
    anatomy = replace(sc.inspect(small()), default_last_block="whole")
    table = table_of(anatomy, staircase, steps)
    choose = lambda c, fraction: allocated(  # noqa: E731
        anatomy, sc.Target(latency=fraction), **NONE, latency=c
    )
    sizes, report = on_the_clock.meet(1.0, table, anatomy, choose, lambda sizes: pytest.fail("measured"))
    assert sizes == anatomy.sizes
    assert report.measured == 1.0


# --- plan -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits_table(make_digits_model):
    """By MACs: what a machine would take that does nothing else."""
    anatomy = sc.inspect(make_digits_model())
    return table_of(
        anatomy, lambda w, q, v: w * (2 * q + 2 * v) * 3 + 65 * 3 * (q + v), lambda w, f: 2 * w * f, rest=100.0
    )


@pytest.fixture(scope="module")
def digits_stats(make_digits_model, digits_images):
    return sc.calibrate(make_digits_model(), [digits_images[:16]], sensitivity="noise")


@pytest.mark.parametrize(("method", "allocation"), [("snp", None), ("project", "uniform"), ("project", "error")])
def test_a_plan_reports_and_keeps_what_was_predicted_and_measured(
    digits_model, digits_stats, digits_table, monkeypatch, tmp_path, method, allocation
):
    def measured(model, table, sizes, repeats=15):
        assert model is digits_model
        cut = make_shape(digits_model, sizes)
        assert sc.inspect(cut).sizes == sizes
        return 1.2 * Latency(digits_table, sc.inspect(model)).total(sizes) / table.predict(sc.inspect(model)), (
            0.4,
            0.6,
        )

    monkeypatch.setattr(on_the_clock, "measured_ratio", measured)
    digits_table.save(tmp_path / "table.json")
    before = {name: value.clone() for name, value in digits_model.state_dict().items()}
    chosen = sc.plan(
        digits_model,
        digits_stats,
        method=method,
        target=sc.Target(latency=0.5, macs=0.45),
        allocation=allocation,
        round_to=1,
        latency_table=tmp_path / "table.json",
    )
    report = chosen.latency
    assert report.rounds <= 3
    assert report.measured <= 0.5
    assert chosen.macs[1] <= 0.45 * chosen.macs[0]
    assert f"measured {report.measured:.3f}" in str(chosen)
    assert f"{report.predicted:.3f} of the dense" in str(chosen)
    assert all(torch.equal(value, before[name]) for name, value in digits_model.state_dict().items())
    chosen.save(tmp_path / "plan.json")
    loaded = sc.Plan.load(tmp_path / "plan.json")
    assert loaded.latency == report
    assert loaded.to_dict() == chosen.to_dict()
    cut = sc.prune(digits_model, loaded)
    assert cut.macs == chosen.macs


def make_shape(model, sizes):

    cut = copy.deepcopy(model)
    Structure(sizes).apply(cut)
    return cut


def test_a_plan_without_a_latency_has_none(digits_model, digits_stats, tmp_path):
    chosen = sc.plan(digits_model, digits_stats, method="snp", target=sc.Target(macs=0.5))
    assert chosen.latency is None
    assert "latency" not in str(chosen)
    chosen.save(tmp_path / "plan.json")
    assert sc.Plan.load(tmp_path / "plan.json").latency is None


def test_a_table_of_another_machine_is_named_and_not_measured_against(
    digits_model, digits_stats, digits_table, monkeypatch
):
    monkeypatch.setattr(on_the_clock, "measured_ratio", lambda *_: pytest.fail("measured"))
    other = replace(digits_table, machine=replace(HERE, processor="Abacus 3000", threads=7))
    with pytest.warns(
        UserWarning, match=r"latency_table: expected one of this machine, got one of Abacus 3000, 7 threads"
    ):
        chosen = sc.plan(digits_model, digits_stats, method="snp", target=sc.Target(latency=0.5), latency_table=other)
    assert chosen.latency.measured is None
    assert chosen.latency.predicted <= 0.5
    assert chosen.latency.machine == other.machine
    assert "not measured" in str(chosen)


@pytest.mark.parametrize("fields", ["processor", "threads", "device", "pytorch"])
def test_every_difference_of_machines_is_named(fields):
    other = replace(HERE, **{fields: 99 if fields == "threads" else "another"})
    assert HERE.difference(HERE) is None
    assert fields in HERE.difference(other)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"target": sc.Target(macs=0.5)}, "latency_table: expected none without Target"),
        ({"target": None, "ratios": {"ffn": 0.5}}, "latency_table: expected none without Target"),
        ({"latency_table": 5}, "latency_table: expected a LatencyTable or its file, got 5"),
        (
            {"latency_table": "nowhere.json"},
            "latency_table: expected a secateur latency table, got nowhere.json, which",
        ),
        ({"batch_size": 5}, "latency_table: expected one measured at batch_size 5, got one at 4"),
        ({"batch_size": 0}, "batch_size: expected an integer of at least 1, got 0"),
        ({"groups": ("head",)}, "groups: expected qk, v, heads, layer, ffn, width, tokens or a group"),
        ({"freeze": ("blocks.9.*",)}, "freeze: expected a kind, group name or pattern"),
        ({"target": sc.Target(latency=0.01)}, r"target: expected latency >= 0\.\d+ .*, got latency = 0.01"),
        ({"freeze": ("qk", "v", "ffn")}, r"target: expected latency >= 1 .*, got latency = 0.5"),
        ({"min_keep": {"ffn": 372, "qk": 31, "v": 31}}, r"target: expected latency >= 1 .*, got latency = 0.5"),
        ({"target": sc.Target(latency=0.5, macs=0.001)}, r"target: expected macs >= 0\.\d+ .*, got macs = 0.001, lat"),
    ],
)
def test_refused_before_any_work(digits_model, digits_stats, digits_table, monkeypatch, arguments, text):
    monkeypatch.setattr(on_the_clock, "measured_ratio", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(on_the_clock, "measure_latency", lambda *_, **__: pytest.fail("measured"))
    monkeypatch.setattr(Method, "prepare", lambda *_: pytest.fail("scored"))
    given = {"target": sc.Target(latency=0.5), "latency_table": digits_table, **arguments}
    with pytest.raises(sc.InvalidArgument, match=text):
        sc.plan(digits_model, digits_stats, **given)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"freeze": ("blocks.9.*",)}, "freeze: expected a kind, group name or pattern"),
        ({"target": sc.Target(latency=0.5, params=0.001)}, r"target: expected params >= 0\.\d+ .*, got params = 0.001"),
    ],
)
def test_no_table_is_measured_for_what_cannot_be(digits_model, digits_stats, monkeypatch, arguments, text):
    monkeypatch.setattr(on_the_clock, "measure_latency", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(sc.InvalidArgument, match=text):
        sc.plan(digits_model, digits_stats, **{"target": sc.Target(latency=0.5), **arguments})


def test_a_table_of_another_model_is_refused(digits_model, digits_stats, digits_table):
    anatomy = sc.inspect(digits_model)
    target = sc.Target(latency=0.5)
    for other, text in (
        (table_of(sc.inspect(small()), staircase, steps), "latency_table: expected the same model, got architecture"),
        (replace(digits_table, input_size=(3, 48, 48)), r"latency_table: expected input size \(3, 32, 32\), got"),
        (
            replace(digits_table, model=replace(digits_table.model, sizes={**anatomy.fixed_sizes, "width": 96})),
            "latency_table: expected the same model, got size of group width = 93 where it was 96",
        ),
    ):
        with pytest.raises(sc.InvalidArgument, match=text):
            sc.plan(digits_model, digits_stats, method="snp", target=target, latency_table=other)
        with pytest.raises(sc.InvalidArgument, match=text):
            other.predict(anatomy)
    # Other weights are as fast.
    other_weights = {**digits_table.model.digests, "head.weight": "00"}
    replace(digits_table, model=replace(digits_table.model, digests=other_weights)).predict(anatomy)


def test_frozen_names_may_come_from_an_iterator():
    model = small()
    stats = sc.calibrate(model, [torch.randn(4, 3, 16, 16)])
    elsewhere = replace(HERE, processor="Abacus 3000")
    table = table_of(sc.inspect(model), staircase, steps, machine=elsewhere)
    with pytest.warns(UserWarning, match="without measuring") as warned:
        plan = sc.plan(
            model,
            stats,
            method="snp",
            target=sc.Target(latency=0.9),
            groups=iter(["ffn"]),
            freeze=(name for name in ["blocks.0.*"]),
            latency_table=table,
            round_to=1,
        )
    assert set(plan.keep) == {"blocks.1.ffn"}
    assert [each.filename for each in warned] == [__file__]


@pytest.mark.parametrize("value", [0, -0.5, 1.5, "half", True, float("nan")])
def test_wrong_targets(value):
    with pytest.raises(sc.InvalidArgument, match=r"target.latency: expected a fraction in \(0, 1\], got"):
        sc.Target(latency=value)


# --- Files ------------------------------------------------------------------------------------------------------------


def test_a_table_comes_back_from_its_file(tmp_path):
    anatomy = sc.inspect(small(39, 2, 3))
    table = table_of(anatomy, staircase, steps, rest=0.1, scale=0.9, overhead=-0.01)
    table.save(tmp_path / "table.json")
    found = LatencyTable.load(tmp_path / "table.json")
    assert found.machine == table.machine
    assert (found.batch_size, found.dtype, found.compiled, found.input_size) == (4, "float32", False, (3, 16, 16))
    sizes = {"blocks.0.qk": 5, "blocks.1.ffn": 31, "width": 22}
    assert found.predict(anatomy, sizes) == table.predict(anatomy, sizes)
    found.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "table.json").read_bytes()
    assert HERE.processor in str(found)
    assert "4x3x16x16 float32, by torch, on" in str(found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.json", "table.json"]


def test_uneven_sizes_come_back_from_a_file_and_older_files_have_none(tmp_path):
    anatomy = sc.inspect(small(24, 2, 2))
    table = table_of(anatomy, staircase, steps)
    ffn = replace(table.layers[1], uneven=Grid({"width": (24,), "ffn": (7, 59)}, np.array([[3.0, 300.0]])))
    uneven = replace(table, layers=(table.layers[0], ffn, table.layers[2]))
    uneven.save(tmp_path / "table.json")
    sizes = {"blocks.0.ffn": 31}
    assert LatencyTable.load(tmp_path / "table.json").predict(anatomy, sizes) == uneven.predict(anatomy, sizes)
    assert uneven.predict(anatomy, sizes) > table.predict(anatomy, sizes)
    outer = json.loads((tmp_path / "table.json").read_text())
    outer["format"] = 1
    for layer in outer["table"]["layers"]:
        del layer["uneven"]
    outer["sha256"] = latency._digest(outer["table"])
    (tmp_path / "older.json").write_text(json.dumps(outer))
    assert LatencyTable.load(tmp_path / "older.json").predict(anatomy, sizes) == table.predict(anatomy, sizes)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda outer: outer.update(secateur="plan"), "got another kind of file"),
        (lambda outer: outer.update(format=99), "got format 99, newer than 5: update secateur"),
        (lambda outer: outer["table"].update(scale=3.0), "got one that does not match its checksum"),
        (lambda outer: outer.pop("table"), "expected a secateur latency table"),
        (lambda outer: outer.update(format="x"), "expected a secateur latency table"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, change, text):
    path = tmp_path / "table.json"
    table_of(sc.inspect(small()), staircase, steps).save(path)
    outer = json.loads(path.read_text())
    change(outer)
    path.write_text(json.dumps(outer))
    with pytest.raises(sc.InvalidArgument, match=f"^table.json: .*{text}"):
        LatencyTable.load(path)


def test_what_is_no_table(tmp_path):
    for content in (b"{broken", b"[]", b"\xff\xfe\x00"):
        (tmp_path / "table.json").write_bytes(content)
        with pytest.raises(sc.InvalidArgument, match="table.json: expected a secateur latency table"):
            LatencyTable.load(tmp_path / "table.json")
    with pytest.raises(
        sc.InvalidArgument, match="path: expected a secateur latency table, got .*, which is not a file"
    ):
        LatencyTable.load(tmp_path)
    with pytest.raises(sc.InvalidArgument, match="expected a file in an existing folder"):
        table_of(sc.inspect(small()), staircase, steps).save(tmp_path / "none" / "table.json")


# --- Measuring --------------------------------------------------------------------------------------------------------


@pytest.fixture
def by_weights(monkeypatch):
    """A clock that counts: one second for every weight a module applies, so that measured tables can be computed."""

    def seconds(module):
        return float(sum(p.numel() for p in module.parameters()))

    def in_turn(models, inputs, loops, repeats, advance):
        for model, images in zip(models, inputs, strict=True):
            model(images)
        return np.tile([seconds(model) for model in models], (repeats, 1))

    monkeypatch.setattr(timing, "in_turn", in_turn)


@pytest.mark.parametrize(
    "kind", ["plain", "registers_layer_scale", "qk_norm", "swiglu_split", "gate", "map_pool", "distilled"]
)
def test_a_measured_table_predicts_its_clock(by_weights, kind):
    """Every layer is the model's own, cut as prune cuts it: their parameters add up to those of the pruned model."""
    model = make(kind)
    anatomy = sc.inspect(model)
    # One kind at many sizes; the others, whose layers differ and not their sizes, at few.
    grid = {"qk": [1, 5, 9], "v": [1, 5, 9], "ffn": [1, 33], "width": [1, 20]}
    if kind != "plain":
        grid = {"qk": [9], "v": [1], "ffn": [33], "width": [20]}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    table = sc.measure_latency(model, batch_size=2, grid=grid, repeats=2)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    # The last block of a classifier by its class token is measured in both forms.
    assert len(table.layers) == (3 if kind == "map_pool" else 5)
    whole = {"width": 39, "qk": 13, "v": 13}
    axes = {name: (*grid[name], size) for name, size in whole.items()}
    assert table.layers[0].grid.axes == {**axes, "heads": (1, 2, 3)}
    assert table.predict(anatomy) == pytest.approx(anatomy.params, rel=1e-6)
    # At every size, since a weight's count is linear in each; a shared norm is given to each head once it is cut.
    sizes = {"blocks.0.qk": 5, "blocks.0.v": 9, "blocks.1.heads": 2, "blocks.1.ffn": 20, "width": 25}
    for last_block in (None, "whole", "pooled"):
        assert table.predict(anatomy, sizes, last_block) == pytest.approx(
            anatomy.params_at(sizes), rel=0.02 if kind == "qk_norm" else 1e-6
        )


@pytest.mark.parametrize(("dtype", "compiled"), [("bfloat16", True), ("float64", False)])
def test_what_is_measured_is_of_the_type_and_backend_that_were_asked_for(by_weights, monkeypatch, dtype, compiled):
    counted, seen = timing.in_turn, set()

    def watched(models, inputs, *rest):
        for model, x in zip(models, inputs, strict=True):
            seen.add((type(model).__name__ == "OptimizedModule", str(x.dtype)))
        return counted(models, inputs, *rest)

    monkeypatch.setattr(timing, "in_turn", watched)
    model = make("plain")
    table = sc.measure_latency(
        model, dtype=dtype, compile=compiled, groups=("ffn",), grid={"ffn": [33]}, batch_size=2, repeats=1
    )
    assert seen == {(compiled, f"torch.{dtype}")}
    assert (table.compiled, table.dtype) == (compiled, dtype)
    anatomy = sc.inspect(model)
    for sizes in ({}, {"blocks.0.ffn": 33}):
        assert table.predict(anatomy, sizes) == pytest.approx(anatomy.params_at(sizes), rel=1e-6)
    assert next(model.parameters()).dtype == torch.float32


def test_unlike_blocks_are_measured_apart(by_weights):
    model = small(24, 3, 2)
    sc.prune(model, some_plan(model, {"blocks.1.ffn": 0.5, "blocks.2.qk": 0.25}))
    anatomy = sc.inspect(model)
    table = sc.measure_latency(model, repeats=1, grid={"qk": [1, 4], "v": [1, 4], "ffn": [1, 7], "width": [9]})
    assert [len(layer.places) for layer in table.layers] == [2, 1, 1, 1, 1, 0]
    assert table.layers[3].grid.axes["ffn"] == (1, 7, 30)
    assert table.predict(anatomy) == pytest.approx(anatomy.params, rel=1e-6)
    sizes = {"blocks.1.ffn": 11, "blocks.2.qk": 6, "blocks.0.ffn": 50, "width": 20}
    assert table.predict(anatomy, sizes) == pytest.approx(anatomy.params_at(sizes), rel=1e-6)


def some_plan(model, ratios):
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return sc.plan(model, sc.calibrate(model, [images], collect="scores"), method="snp", ratios=ratios)


def test_groups_that_stay_whole_are_measured_at_their_size_alone(by_weights):
    model = small(48, 2, 3)
    table = sc.measure_latency(model, groups=("ffn",), repeats=1)
    assert table.layers[0].grid.axes == {"width": (48,), "qk": (16,), "v": (16,), "heads": (3,)}
    assert table.layers[2].grid.axes == {"width": (48,), "ffn": (32, 64, 96, 120)}
    with pytest.raises(sc.InvalidArgument, match=r"latency_table: .* qk of 16 alone, got 8"):
        table.predict(sc.inspect(model), {"blocks.0.qk": 8})


def test_a_model_that_takes_longer_than_its_layers(by_weights, monkeypatch):
    """Found on the dense model and on some that are cut at random, which holds for all between."""
    counted = timing.in_turn

    def slower(models, inputs, loops, repeats, advance):
        times = counted(models, inputs, loops, repeats, advance)
        whole = [images.ndim == 4 and len(model.blocks) > 0 for model, images in zip(models, inputs, strict=True)]
        return np.where(whole, 1.3 * times + 5000, times)

    monkeypatch.setattr(timing, "in_turn", slower)
    model = small(24, 2, 2)
    anatomy = sc.inspect(model)
    table = sc.measure_latency(model, repeats=1, groups=("ffn",), grid={"ffn": [20]})
    assert table.scale == pytest.approx(1.3)
    for sizes in ({}, {"blocks.0.ffn": 20}, {"blocks.1.ffn": 44}):
        assert table.predict(anatomy, sizes) == pytest.approx(1.3 * anatomy.params_at(sizes) + 5000)


def test_uneven_layers_take_longer_than_their_neighbours(by_weights, monkeypatch):
    """As on real machines, where rows that start at no multiple of 4 are read in pieces."""
    counted = timing.in_turn

    def slower(models, inputs, loops, repeats, advance):
        times = counted(models, inputs, loops, repeats, advance)
        factors = [1.5 if any(p.ndim == 2 and p.shape[0] % 4 for p in model.parameters()) else 1.0 for model in models]
        return times * factors

    monkeypatch.setattr(timing, "in_turn", slower)
    model = small(48, 2, 3, 4.0, classes=4)
    anatomy = sc.inspect(model)
    table = sc.measure_latency(model, repeats=1, groups=("qk", "v", "ffn"))
    attention, pooled, ffn, alone, rest = table.layers
    assert pooled.grid.axes == {"width": (48,), "qk": (8, 16), "v": (8, 16), "heads": (3,)}
    assert alone.grid.axes == {"width": (48,), "ffn": (64, 96, 192)}
    assert (pooled.uneven, alone.uneven) == (None, None)
    assert attention.grid.axes == {"width": (48,), "qk": (8, 16), "v": (8, 16), "heads": (3,)}
    assert attention.uneven.axes == {"width": (48,), "qk": (3, 7, 15), "v": (3, 7, 15), "heads": (3,)}
    assert ffn.uneven.axes == {"width": (48,), "ffn": (47, 119, 191)}
    assert rest.uneven is None
    for sizes in ({"blocks.0.ffn": 96}, {"blocks.1.qk": 12, "blocks.1.v": 12}):
        assert table.predict(anatomy, sizes) == pytest.approx(anatomy.params_at(sizes), rel=1e-6)
    for layer, sizes in (
        ("blocks.0.mlp.fc", {"blocks.0.ffn": 101}),
        ("blocks.1.attn", {"blocks.1.qk": 13, "blocks.1.v": 13}),
    ):
        norm = 2 * 48
        of_layer = norm + sum(anatomy.numel(name, sizes) for name in anatomy.shapes if name.startswith(layer))
        found = table.predict(anatomy, sizes, "whole")
        assert found == pytest.approx(anatomy.params_at(sizes) + 0.5 * of_layer, rel=1e-6)


def test_the_correction_is_by_least_squares_and_bounded(by_weights):
    anatomy = sc.inspect(small(24, 2, 2))
    table = table_of(anatomy, lambda w, q, v: q + v, lambda w, f: f, rest=20)
    total = table.predict(anatomy)
    cuts = [{"blocks.0.ffn": 20}, {"blocks.1.ffn": 10, "blocks.0.ffn": 5}, {"blocks.0.qk": 4, "blocks.0.v": 4}]
    saved = np.array([1 - table.predict(anatomy, sizes) / total for sizes in cuts])
    found = 0.8 * saved + [0.01, -0.02, 0.005]
    fitted = timing._calibrated(table, anatomy, 3.0, list(zip(cuts, 1 - found, strict=True)))
    assert fitted.predict(anatomy) == pytest.approx(3.0)
    slope = np.linalg.lstsq(saved[:, None], found, rcond=None)[0][0]
    predicted = [1 - fitted.predict(anatomy, sizes) / 3.0 for sizes in cuts]
    np.testing.assert_allclose(predicted, slope * saved)
    wild = timing._calibrated(table, anatomy, 3.0, [(sizes, 5.0) for sizes in cuts])
    assert wild.scale == pytest.approx(0.5 * 3.0 / total)
    assert timing._calibrated(table, anatomy, 3.0, []).scale == pytest.approx(3.0 / total)


def test_a_busy_machine_is_measured_for_longer(monkeypatch):
    """Until the median of the ratios is known well enough, or four times the repeats are spent."""
    seen = []

    def clock_of(spread):
        def in_turn(models, inputs, loops, repeats, advance):
            seen.append(repeats)
            return np.linspace(1 - spread, 1 + spread, repeats)[:, None] * [1.0, 0.0] + [0.0, 1.0]

        monkeypatch.setattr(timing, "in_turn", in_turn)
        model = small()
        layer = (family_of(model).layers(model)["blocks.0.attn"], torch.randn(1, 17, 24))
        return timing._Clock(layer, 7, RUNTIMES.named("torch"), lambda _: None).ratio(*layer)

    for spread, calls in ((0.01, 1), (0.055, 2), (0.5, 4)):
        seen.clear()
        assert clock_of(spread) == pytest.approx(1.0)
        assert seen == [7] * calls


def test_layers_are_what_timms_blocks_compute():
    for kind in ("plain", "registers_layer_scale", "gate"):
        model = make(kind)
        x = torch.randn(2, model.patch_embed.num_patches + model.num_prefix_tokens, 39)
        found = family_of(model).layers(model)
        torch.testing.assert_close(found["blocks.1.mlp"](found["blocks.1.attn"](x)), model.blocks[1](x))
        lone = family_of(model).alone(model, 1)
        assert len(lone.blocks) == 1
        torch.testing.assert_close(lone.blocks[0](x), model.blocks[1](x))
        assert len(family_of(model).alone(model, None).blocks) == 0


def test_a_family_without_layers_to_time_is_refused_by_name(monkeypatch):
    class Whole(PlainViT):
        alone, layers = Family.alone, Family.layers

    monkeypatch.setattr(timing, "family_of", lambda _: Whole())
    with pytest.raises(sc.Unsupported, match="^latency: expected a model that can be timed layer by layer, got Vision"):
        sc.measure_latency(small())


@pytest.mark.alone
def test_a_real_clock_gives_a_table_and_a_plan(digits_model, digits_images):
    """Loosely: this machine may be busy."""
    stats = sc.calibrate(digits_model, [digits_images[:8]], collect="scores")
    grid = {"qk": [16], "v": [16], "ffn": [96], "width": [48]}
    table = sc.measure_latency(digits_model, batch_size=8, grid=grid, repeats=3)
    assert table.machine == HERE
    anatomy = sc.inspect(digits_model)
    assert 0 < table.predict(anatomy, {"blocks.0.ffn": 96}) <= table.predict(anatomy) < 60
    ratio, (low, high) = timing.measured_ratio(digits_model, table, {"blocks.0.ffn": 32}, repeats=3)
    assert 0 < low <= ratio <= high
    assert sc.inspect(digits_model).sizes == anatomy.sizes
    chosen = sc.plan(digits_model, stats, method="snp", target=sc.Target(latency=1.0), latency_table=table)
    # The last block computes less, and nothing else has to.
    assert 0 < chosen.latency.measured <= 1.0


def test_without_a_table_one_is_measured_for_the_batch_and_the_groups(
    digits_model, digits_stats, digits_table, monkeypatch
):
    asked = {}

    def measured(model, **arguments):
        asked.update(arguments)
        return replace(digits_table, batch_size=arguments["batch_size"])

    monkeypatch.setattr(on_the_clock, "measure_latency", measured)
    monkeypatch.setattr(on_the_clock, "measured_ratio", lambda *_: (0.49, (0.48, 0.5)))
    chosen = sc.plan(digits_model, digits_stats, method="snp", target=sc.Target(latency=0.5), freeze=("v",))
    assert asked["batch_size"] == 1
    assert set(asked["groups"]) == {"qk", "ffn"}
    assert (chosen.latency.batch_size, chosen.latency.measured, chosen.latency.rounds) == (1, 0.49, 1)
    sc.plan(digits_model, digits_stats, method="snp", target=sc.Target(latency=0.5), batch_size=6)
    assert asked["batch_size"] == 6


def test_sequential_pruning_takes_a_latency(digits_model, digits_images, digits_table, monkeypatch):
    anatomy = sc.inspect(digits_model)
    monkeypatch.setattr(
        on_the_clock,
        "measured_ratio",
        lambda m, table, sizes: (table.predict(anatomy, sizes) / table.predict(anatomy), (0, 1)),
    )
    report = sc.prune_sequential(
        digits_model,
        [digits_images[:16]],
        "project",
        sc.Target(latency=0.6),
        allocation="uniform",
        latency_table=digits_table,
    )
    after = {name: size for name, (_, size) in report.groups.items()}
    assert 0.5 < digits_table.predict(anatomy, after) / digits_table.predict(anatomy) <= 0.6


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"batch_size": 0}, "batch_size: expected an integer of at least 1, got 0"),
        ({"repeats": 0}, "repeats: expected an integer of at least 1, got 0"),
        ({"dtype": "int8"}, "dtype: expected one of float32, float64, float16, bfloat16, got 'int8'"),
        ({"device": "gpu"}, "device: expected one that is there, got 'gpu'"),
        ({"groups": "qk"}, "groups: expected a sequence of kinds, got 'qk'"),
        ({"groups": ("head",)}, "groups: expected kinds of qk, v, heads, layer, ffn, width, tokens, got 'head'"),
        ({"grid": 5}, "grid: expected a dict of sizes by kind, got 5"),
        ({"grid": {"ffn": 5}}, r"grid\['ffn'\]: expected a sequence of sizes, got 5"),
        ({"grid": {"ffn": [0]}}, r"grid\['ffn'\]: expected an integer of at least 1, got 0"),
        ({"grid": {"blocks": [1]}}, "grid: expected kinds of qk, v, heads, layer, ffn, width, got 'blocks'"),
    ],
)
def test_wrong_measurements(arguments, text):
    with pytest.raises(sc.InvalidArgument, match=f"^{text}"):
        sc.measure_latency(small(), **arguments)
    with pytest.raises(sc.InvalidArgument, match="model: expected a model with weights"):
        sc.measure_latency(small().to("meta"))
