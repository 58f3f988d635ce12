"""SNP's scores against their definition, the SVD of every N×N score map in float64 (Shim et al., ECCV 2024)."""

from __future__ import annotations

import numpy as np
import pytest
import secateur as sc
import timm
import torch
from scores import literal_scores, queries_and_keys

GAMMA = 8


def same_lowest_half(mine, theirs):
    """Per head, the half that would be pruned; neurons within 1e-5 of the threshold may be on either side."""
    half = mine.shape[-1] // 2
    for ours, exact in zip(mine.reshape(-1, mine.shape[-1]), theirs.reshape(-1, mine.shape[-1]), strict=True):
        threshold = np.sort(exact)[half - 1 : half + 1].mean()
        clear = np.abs(exact - threshold) > 1e-5
        chosen = np.argsort(ours, kind="stable")[:half]
        lowest = np.isin(np.arange(len(ours)), chosen)
        np.testing.assert_array_equal(lowest[clear], (exact < threshold)[clear])


def check(q, k, least=1.0, gamma=GAMMA):
    """All that the definition asks of a batch; at least ``least`` of its heads and images are well defined."""
    exact, defined = literal_scores(q, k, gamma)
    assert defined.double().mean() >= least
    # A head counts where all of its images do.
    heads = defined.all(0).numpy()
    scorer = sc.core.AttentionScorer(*q.shape[2:], gamma)
    scorer.update(q, k)
    mine, theirs = scorer.scores()[heads], exact.mean(0).numpy()[heads]
    assert len(mine) > 0
    error = np.abs(mine - theirs).max()
    assert error <= 1e-5
    assert error <= 1e-3 * theirs.std()
    same_lowest_half(mine, theirs)


def random_pair(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))


# Heads as wide as ViTs have them and odd ones; fewer tokens than neurons, and more.
@pytest.mark.parametrize(("tokens", "dim"), [(197, 64), (65, 31), (50, 64), (20, 33), (5, 16), (40, 80), (30, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_random_data(tokens, dim, dtype):
    q, k = random_pair(3, tokens, 5, dim)
    check(q.to(dtype), k.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("which", ["q", "k", "both"])
def test_an_offset_of_1000(which, dtype):
    q, k = random_pair(2, 90, 4, 31, seed=1)
    check((q + 1000 * (which != "k")).to(dtype), (k + 1000 * (which != "q")).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scales", [(1e-12, 1e12), (1e12, 1e12), (1e-12, 1e-12)])
def test_scales(scales, dtype):
    q, k = random_pair(2, 60, 4, 20, seed=2)
    check((q * scales[0]).to(dtype), (k * scales[1]).to(dtype))


def test_zero_and_duplicate_neurons():
    q, k = random_pair(2, 70, 9, 24, seed=3)
    q[:, :, 0, 3] = 0
    k[:, :, 1, 5] = 0
    for x in (q, k):
        x[:, :, 2, 7] = x[:, :, 2, 8]
        x[:, :, 3, 1:4] = x[:, :, 3, :1]
    check(q, k)


def test_a_randomly_initialised_vit():
    model = timm.create_model("vit_tiny_patch16_224", img_size=48, patch_size=8, embed_dim=132, num_heads=4, depth=3)
    for q, k in queries_and_keys(model.eval(), torch.randn(6, 3, 48, 48)):
        check(q, k)


def test_a_trained_vit(digits_model, digits_images):
    for q, k in queries_and_keys(digits_model, digits_images[:24]):
        check(q, k, least=0.95)
        check(q, k, least=0.95, gamma=16)
        # The offsets of trained heads on top: what every token shares.
        check(q + 1000, k + 1000, least=0.5)
