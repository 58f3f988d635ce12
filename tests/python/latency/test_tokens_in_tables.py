"""Latency tables and targets that know how many tokens there are, and both forms of the last block."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import secateur as sc
import timm
from secateur.latency import measure as timing
from secateur.latency.table import LatencyTable
from secateur.plans import on_the_clock
from secateur.surgery.structure import Structure
from timm.models.vision_transformer import VisionTransformer


def by_tokens(model):
    """Seconds of a whole model by a clock that counts weights times tokens, and something for each merging."""
    seconds, tokens = 7e5, model.num_prefix_tokens + model.patch_embed.num_patches
    for number, block in enumerate(model.blocks):
        attention, ffn = (
            sum(p.numel() for part in parts for p in part.parameters())
            for parts in ((block.attn, block.norm1), (block.mlp, block.norm2))
        )
        merged = getattr(block, "merge", 0)
        seconds += 1000.0 * tokens * attention + (3000.0 * tokens if merged else 0)
        pooled = hasattr(block, "pooled") and number == len(model.blocks) - 1
        tokens = 1 if pooled else tokens - merged
        seconds += 1000.0 * tokens * ffn
    return seconds


@pytest.fixture
def clock_of_tokens(monkeypatch):
    """The same clock for layers and models."""

    def in_turn(models, inputs, loops, repeats, advance):
        times = []
        for model, x in zip(models, inputs, strict=True):
            out = model(x)
            if x.ndim == 4:
                times.append(by_tokens(model) if len(model.blocks) else 7e5)
            elif type(model).__name__ == "_Merging":
                assert out.shape[1] == x.shape[1] - x.shape[1] // 10
                times.append(3000.0 * x.shape[1])
            else:
                assert out.shape[1] in (x.shape[1], 1)
                times.append(1000.0 * sum(p.numel() for p in model.parameters()) * x.shape[1])
        return np.tile(times, (repeats, 1))

    def ratio(model, _table, sizes):
        cut = copy.deepcopy(model)
        Structure(sizes, last_block="pooled").apply(cut)
        found = by_tokens(cut) / by_tokens(model)
        return found, (found, found)

    monkeypatch.setattr(timing, "in_turn", in_turn)
    monkeypatch.setattr(on_the_clock, "measured_ratio", ratio)


def test_a_target_for_latency_merges_tokens(clock_of_tokens, digits_model, digits_images):
    """By the measured losses, together with channels; not where they stay, nor with a table that does not know them."""
    stats = sc.calibrate(digits_model, [digits_images], sensitivity=True)
    dense = by_tokens(digits_model)
    target = {"target": sc.Target(latency=0.4), "round_to": 3}
    found = sc.plan(digits_model, stats, **target)
    merged = [name for name in found.keep if name.endswith(".tokens")]
    assert merged
    assert found.latency.measured <= 0.4
    cut = copy.deepcopy(digits_model)
    sc.prune(cut, found)
    assert by_tokens(cut) / dense == pytest.approx(found.latency.measured, rel=1e-9)
    assert 0.36 < by_tokens(cut) / dense <= 0.4
    table = sc.measure_latency(digits_model, groups=("qk", "v", "ffn"), repeats=1)
    for more in ({"freeze": ("tokens",)}, {"groups": ("qk", "v", "ffn")}, {"latency_table": table}):
        whole = sc.plan(digits_model, stats, **target, **more)
        assert not any(name.endswith(".tokens") for name in whole.keep)
        assert whole.latency.measured <= 0.4
    with pytest.raises(sc.InvalidArgument, match=r"^latency_table: expected one that knows tokens"):
        sc.plan(digits_model, stats, **target, groups=("ffn", "tokens"), latency_table=table)


def test_a_target_that_only_merging_reaches(clock_of_tokens, digits_model, digits_images):
    """And one that needs nothing but the last block for prefix tokens alone, which is measured."""
    stats = sc.calibrate(digits_model, [digits_images], sensitivity=True)
    found = sc.plan(digits_model, stats, target=sc.Target(latency=0.8), groups=("tokens",))
    assert 0.7 < found.latency.measured <= 0.8
    with pytest.raises(
        sc.InvalidArgument, match=r"target: expected latency >= 0\.\d+ \(the least these groups reach\)"
    ):
        sc.plan(digits_model, stats, target=sc.Target(latency=0.05), groups=("tokens",))
    pooled = copy.deepcopy(digits_model)
    sc.prune(pooled)
    ratio = by_tokens(pooled) / by_tokens(digits_model)
    assert ratio < 0.95
    found = sc.plan(digits_model, stats, target=sc.Target(latency=1.03 * ratio))
    assert not found.keep
    assert found.latency.measured == pytest.approx(ratio)


def test_width_and_tokens_in_one_table(clock_of_tokens, digits_model):
    table = sc.measure_latency(digits_model, groups=("ffn", "width", "tokens"), repeats=1)
    assert {"width", "tokens"} == set(table.layers[-2].grid.axes)
    anatomy = sc.inspect(digits_model)
    sizes = {"width": 64, "blocks.0.tokens": anatomy.sizes["blocks.0.tokens"] - 9}
    assert 0.4 < table.predict(anatomy, sizes) / table.predict(anatomy) < 0.9


def test_forms_of_the_last_block_are_known_or_refused(clock_of_tokens, digits_model):
    anatomy = sc.inspect(digits_model)
    table = sc.measure_latency(digits_model, groups=("ffn",), repeats=1)
    times = [table.predict(anatomy, {}, form) for form in ("whole", "pooled")]
    assert times[0] == table.predict(anatomy) > times[1] == table.predict(anatomy, {})
    with pytest.raises(sc.InvalidArgument, match=r"^last_block: expected one of"):
        table.predict(anatomy, {}, "pool")
    sc.prune(digits_model)
    pooled = sc.measure_latency(digits_model, groups=("ffn",), repeats=1)
    assert pooled.predict(sc.inspect(digits_model)) == pytest.approx(times[1])
    with pytest.raises(sc.InvalidArgument, match=r"^latency_table: expected one that knows a last block that is whole"):
        pooled.predict(anatomy)


def test_tokens_by_hand(clock_of_tokens):
    """The table predicts the clock for any schedule, and what merging takes."""
    total = by_tokens
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=80, patch_size=8, embed_dim=24, depth=4, num_heads=2, num_classes=5
    )
    anatomy = sc.inspect(model)
    assert anatomy.default_last_block == "pooled"
    table = sc.measure_latency(model, groups=("ffn", "tokens"), grid={"ffn": [20]}, repeats=1)
    assert table.knows_tokens
    assert table.predict(anatomy) == pytest.approx(total(model))
    for merges, ffn in (((0, 0, 0), 96), ((10, 10, 10), 96), ((5, 0, 20), 20), ((40, 20, 5), 50)):
        sizes = {f"blocks.{n}.tokens": anatomy.sizes[f"blocks.{n}.tokens"] - merge for n, merge in enumerate(merges)}
        sizes["blocks.1.ffn"] = ffn
        cut = copy.deepcopy(model)
        keep = {name: size for name, size in sizes.items() if size < anatomy.sizes[name]}
        Structure(keep, last_block="pooled").apply(cut)
        assert [getattr(block, "merge", 0) for block in cut.blocks] == [*merges, 0]
        assert table.predict(anatomy, sizes) == pytest.approx(total(cut), rel=1e-6), merges
        arrays = {"blocks.1.ffn": np.array([20, ffn])}
        assert table.seconds(anatomy, sizes, arrays)[1] == pytest.approx(total(cut), rel=1e-6)
    # A removed layer compares no keys, so the blocks after it have more tokens.
    gone = table.seconds(anatomy, {"blocks.1.tokens": 40}, {"blocks.1.attn": np.array([0, 1])})
    one_by_one = [table.predict(anatomy, {"blocks.1.tokens": 40, "blocks.1.attn": size}) for size in (0, 1)]
    np.testing.assert_allclose(gone, one_by_one)


def test_a_table_without_tokens_does_not_predict_merged_ones(monkeypatch, tmp_path):
    monkeypatch.setattr(timing, "in_turn", lambda models, _x, _loops, repeats, _: np.ones((repeats, len(models))))
    model = VisionTransformer(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=5).eval()
    anatomy = sc.inspect(model)
    table = sc.measure_latency(model, groups=("ffn",), repeats=1)
    table.save(tmp_path / "table.json")
    for each in (table, LatencyTable.load(tmp_path / "table.json")):
        assert not each.knows_tokens
        with pytest.raises(sc.InvalidArgument, match=r"^latency_table: expected one that knows tokens"):
            each.predict(anatomy, {"blocks.0.tokens": 3})
    known = sc.measure_latency(model, groups=("ffn", "tokens"), repeats=1)
    known.save(tmp_path / "known.json")
    sizes = {"blocks.0.tokens": 3}
    assert LatencyTable.load(tmp_path / "known.json").predict(anatomy, sizes) == known.predict(anatomy, sizes)
