"""What calibration costs next to the bare forward pass, and scoring next to torch.

make bench, or pytest --benchmark-enable benchmarks/python/bench_calibrate.py
"""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import secateur as sc
import timm
import torch

GAMMA = 8


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("deit_small_patch16_224").eval()


@pytest.fixture(scope="module")
def batches():
    return list(torch.rand(64, 3, 224, 224).sub_(0.45).div_(0.225).split(16))


@pytest.fixture(scope="module")
def queries_and_keys(model, batches):
    seen = []
    handles = [b.attn.qkv.register_forward_hook(lambda _m, _a, o: seen.append(o.clone())) for b in model.blocks]
    with torch.inference_mode():
        model(batches[0])
    for handle in handles:
        handle.remove()
    return [qkv.unflatten(-1, (3, 6, 64)).unbind(2)[:2] for qkv in seen]


def by_definition(q, k):
    """The SVD of each N x N score map."""
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    u, s, vh = torch.linalg.svd(q @ k.mT)
    left = (u[..., :GAMMA].mT @ (q / q.norm(dim=2, keepdim=True))).abs()
    right = (vh[..., :GAMMA, :] @ (k / k.norm(dim=2, keepdim=True))).abs()
    counted = s[..., :GAMMA, None] > 1e-7 * s[..., :1, None]
    return (left * right * counted).sum(2).sum(0)


def by_lapack(q, k):
    """Gram matrices and LAPACK in float64."""
    q, k = q.transpose(1, 2).double(), k.transpose(1, 2).double()
    gq, gk = q.mT @ q, k.mT @ k
    ridge = 64 * torch.finfo(torch.float64).eps
    factors = [torch.linalg.cholesky(g + torch.diag_embed(ridge * g.diagonal(dim1=-2, dim2=-1))) for g in (gq, gk)]
    a, s, bh = torch.linalg.svd(factors[0].mT @ factors[1])
    left, right = (factors[0] @ a)[..., :GAMMA].abs(), (factors[1] @ bh.mT)[..., :GAMMA].abs()
    counted = s[..., None, :GAMMA] > 1e-7 * s[..., None, :1]
    norms = (gq.diagonal(dim1=-2, dim2=-1) * gk.diagonal(dim1=-2, dim2=-1)).sqrt()
    return ((left * right * counted).sum(-1) / norms).sum(0)


def ours(q, k):
    scorer = sc.core.AttentionScorer(q.shape[2], q.shape[3], GAMMA)
    scorer.update(q, k)
    return torch.from_numpy(scorer.scores()) * len(q)


@pytest.mark.parametrize(
    ("name", "theirs"), [("literal N×N SVD in torch", by_definition), ("Gram + LAPACK in torch", by_lapack)]
)
def test_scoring_against_torch(queries_and_keys, paired, name, theirs):
    q, k = queries_and_keys[6]
    expected = by_definition(q.double(), k.double()) / len(q)
    np.testing.assert_allclose(ours(q, k) / len(q), expected, atol=1e-5)
    np.testing.assert_allclose(theirs(q.double(), k.double()) / len(q), expected, atol=1e-5)
    paired(f"{name} ÷ ours, one layer, 16 images", lambda: theirs(q, k), lambda: ours(q, k))


@pytest.mark.parametrize("team", ["openmp", "own"])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ('collect="scores"', {"collect": "scores"}),
        ('collect="all", token_fraction=0.25', {"token_fraction": 0.25}),
        ('collect="all"', {}),
    ],
)
def test_calibrate_against_the_forward_pass(
    model, batches, queries_and_keys, paired, monkeypatch, name, arguments, team
):
    stats = sc.calibrate(model, batches[:1], gamma=GAMMA, **arguments)
    expected = by_definition(*(x.double() for x in queries_and_keys[3])) / 16
    np.testing.assert_allclose(stats.importance("blocks.3.qk"), expected, atol=1e-5)

    def forward():
        with torch.inference_mode():
            for batch in batches:
                model(batch)

    if team == "own":
        monkeypatch.setattr(sc.core, "torch_threads", nullcontext)
        sc.core.runtime.set_team("own")
    threads = "torch's threads" if team == "openmp" else "threads of its own"
    what = f"calibrate({name}) on {threads} ÷ forward"
    paired(what, lambda: sc.calibrate(model, batches, gamma=GAMMA, **arguments), forward)


def test_second_moment_against_torch(paired):
    x = torch.randn(3152, 1536)
    accumulator = sc.core.MomentAccumulator(1536)
    accumulator.update(x)
    exact = (x.double().T @ x.double()).numpy()
    ours_error = np.abs(accumulator.second_moment() - exact).max()
    assert ours_error <= 2 * np.abs((x.T @ x).double().numpy() - exact).max()
    paired("FFN second moment ÷ torch x.T @ x, (3152, 1536)", lambda: accumulator.update(x), lambda: x.T @ x)
