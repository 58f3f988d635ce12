"""Saved, merged, compared; other models and damaged files refused."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import secateur as sc
import torch
from secateur.anatomy.fingerprint import Fingerprint
from secateur.methods.handlers import fit as refit
from secateur.statistics.statistics import unpack
from small_vits import small_batches, small_vit
from sums import assert_close


@pytest.fixture
def stats(digits_model, digits_images):
    return sc.calibrate(digits_model, [digits_images])


def test_save_and_load(stats, tmp_path):
    path = tmp_path / "stats.safetensors"
    stats.save(path)
    loaded = sc.Statistics.load(path)
    assert_close(stats, loaded, tolerance=0)
    assert loaded.images == 64
    assert repr(loaded) == "Statistics(vit_tiny_patch16_224, 64 images, collect='all', gamma=8)"


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_shards_merge_to_the_whole(digits_model, digits_images, parts):
    """Cut at even places, so that each image keeps its fold; float64 inputs, so that only order differs."""
    model, x = digits_model.double(), digits_images[:28].double()
    whole = sc.calibrate(model, [x])
    cuts = [2 * (14 * i // parts) for i in range(parts + 1)]
    shards = [sc.calibrate(model, [x[a:b]]) for a, b in pairwise(cuts)]
    merged = sc.Statistics.merge(shards)
    assert merged.images == 28
    assert_close(whole, merged)


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_shards_of_whole_batches_merge_to_the_whole_in_float32(digits_model, digits_images, parts):
    """Cut where a batch ends, at multiples of twice the stride: phases of tokens and Grams of images included."""
    torch.set_num_threads(1)
    batches = digits_images[:56].split(4)
    options = {"token_fraction": 0.5, "gamma": 3}
    whole = sc.calibrate(digits_model, batches, **options)
    cuts = [14 * i // parts for i in range(parts + 1)]
    shards = [sc.calibrate(digits_model, batches[a:b], **options) for a, b in pairwise(cuts)]
    assert len({shard.images for shard in shards}) <= 2
    merged = sc.Statistics.merge(shards)
    assert merged.images_by_fold == (28, 28)
    assert_close(whole, merged)
    for mine, theirs in zip(whole.image_grams("blocks.1.qk"), merged.image_grams("blocks.1.qk"), strict=True):
        assert np.array_equal(mine, theirs)


def test_merge_keeps_the_grams_of_the_first_images(digits_model, digits_images):
    """In the order of the parts, 64 at most."""
    parts = [sc.calibrate(digits_model, [digits_images[a:b]]) for a, b in ((0, 40), (0, 30), (30, 64))]
    queries = [part.image_grams("blocks.0.qk")[0] for part in parts]
    merged = sc.Statistics.merge(parts)
    assert merged.images == 104
    assert np.array_equal(merged.image_grams("blocks.0.qk")[0], np.concatenate([queries[0], queries[1][:24]]))


def test_sensitivities_are_added_by_images(digits_model, digits_images):
    """Each is a mean over the images it was measured on."""
    first, second = (
        sc.calibrate(digits_model, [digits_images[a:b]], sensitivity="noise", head_gradients=True)
        for a, b in ((0, 8), (8, 32))
    )
    merged = sc.Statistics.merge([first, second])
    for found in (lambda s: s.sensitivity("blocks.1.ffn"), lambda s: s.head_importance("blocks.1.heads")):
        np.testing.assert_allclose(found(merged), (8 * found(first) + 24 * found(second)) / 32, rtol=1e-12)


def test_merge_refuses_what_does_not_add(digits_model, digits_images, stats):
    with pytest.raises(sc.InvalidArgument, match="parts: expected at least one Statistics, got none"):
        sc.Statistics.merge([])
    for parts in (stats, [stats, "stats.safetensors"]):
        with pytest.raises(sc.InvalidArgument, match="parts: expected a list of Statistics, got"):
            sc.Statistics.merge(parts)
    with pytest.raises(sc.InvalidArgument, match="other: expected Statistics, got int"):
        stats.agreement(5)
    with pytest.raises(sc.InvalidArgument, match="fold: expected even, odd or None, got 'third'"):
        stats.importance("blocks.0.qk", "third")
    for changed, text in (
        ({"gamma": 3}, "parts: expected gamma = 8 in all, got 3"),
        ({"token_fraction": 0.5}, "parts: expected token_fraction = 1.0 in all, got 0.5"),
        ({"collect": "scores"}, "parts: expected collect = 'all' in all, got 'scores'"),
    ):
        other = sc.calibrate(digits_model, [digits_images], **changed)
        with pytest.raises(sc.InvalidArgument, match=text):
            sc.Statistics.merge([stats, other])
    other = sc.calibrate(digits_model.to(torch.bfloat16), [digits_images])
    with pytest.raises(sc.InvalidArgument, match="parts: expected the same model, got other weights of"):
        sc.Statistics.merge([stats, other])


def test_agreement(digits_model, digits_images, stats):
    assert all(a.spearman == pytest.approx(1) and a.overlap == 1 for a in stats.agreement(stats).values())
    own = stats.agreement()
    assert own.keys() == {"blocks.0.qk", "blocks.1.qk", "blocks.2.qk"}
    few = sc.calibrate(digits_model, [digits_images[:2]]).agreement()
    assert all(0.5 < a.spearman <= 1 and 0.5 < a.overlap <= 1 for a in own.values())
    assert np.mean([a.spearman for a in few.values()]) < np.mean([a.spearman for a in own.values()])


def test_agreement_is_the_rank_correlation(stats, digits_model, digits_images):
    from scipy.stats import spearmanr

    other = sc.calibrate(digits_model, [digits_images[:6]])
    found = stats.agreement(other)["blocks.1.qk"]
    pairs = zip(stats.importance("blocks.1.qk"), other.importance("blocks.1.qk"), strict=True)
    assert found.spearman == pytest.approx(np.mean([spearmanr(a, b).statistic for a, b in pairs]))


def test_a_fold_without_images_is_refused(digits_model, digits_images):
    one = sc.calibrate(digits_model, [digits_images[:1]])
    assert one.images_by_fold == (1, 0)
    with pytest.raises(sc.InvalidArgument, match="fold: expected one with images, got 'odd' with none"):
        one.importance("blocks.0.qk", "odd")
    with pytest.raises(sc.InvalidArgument, match="group: expected images of 'blocks.9.qk'"):
        one.importance("blocks.9.qk")


def test_a_damaged_fold_is_no_empty_one(digits_model, digits_images):
    """Without a fold the least ridge is taken: that is for the fold that has no images, and no other."""
    one = sc.calibrate(digits_model, [digits_images[:1]])
    assert list(refit.Moments(one, "blocks.0.ffn").folds) == []
    two = sc.calibrate(digits_model, [digits_images[:2]])
    assert len(list(refit.Moments(two, "blocks.0.ffn").folds)) == 2
    name = "odd/blocks.0.ffn/second_moment"
    two.tensors[name] = two.tensors[name].astype(np.float32)
    with pytest.raises(sc.InvalidArgument, match="packed: expected float64, got float32"):
        list(refit.Moments(two, "blocks.0.ffn").folds)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 31, 64, 65, 150])
def test_unpack(size):
    full = np.random.default_rng(size).normal(size=(2, size, size))
    full = full + full.transpose(0, 2, 1)
    rows, columns = np.triu_indices(size)
    assert np.array_equal(unpack(full[:, rows, columns]), full)
    out = np.full_like(full, np.nan)
    assert unpack(full[:, rows, columns], out) is out
    assert np.array_equal(out, full)


def test_damaged_files(stats, tmp_path):
    path = tmp_path / "stats.safetensors"
    stats.save(path)
    data = path.read_bytes()
    for position in (9, len(data) // 2, len(data) - 5):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(sc.InvalidArgument, match="expected a secateur statistics file, got one"):
            sc.Statistics.load(path)
    with pytest.raises(sc.InvalidArgument, match="which is not a file"):
        sc.Statistics.load(tmp_path / "none")
    with pytest.raises(sc.InvalidArgument, match="path: expected a file in an existing folder"):
        stats.save(tmp_path / "no_folder" / "stats.safetensors")


def test_matrices_are_asked_for_by_their_names():
    stats = sc.calibrate(small_vit(), small_batches())
    with pytest.raises(sc.InvalidArgument, match="which: expected query_gram, key_gram or score_gram, got 'gram'"):
        stats.gram("blocks.0.qk", "gram")


def test_statistics_of_nothing_hold_no_images(digits_model):
    nothing = sc.Statistics.of_nothing(Fingerprint.of(digits_model, sc.inspect(digits_model)))
    assert (nothing.images, nothing.images_by_fold, nothing.groups) == (0, (0, 0), [])
    assert repr(nothing) == "Statistics(vit_tiny_patch16_224, 0 images, collect='scores', gamma=8)"
