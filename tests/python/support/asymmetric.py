"""The refit towards the dense stream, written from its formulas in float64, with rows one by one and no shortcuts."""

from __future__ import annotations

import torch
from secateur.methods.linalg.regression import Moment, choose_ridge
from torch import Tensor, nn


def ridged(x: Tensor, y: Tensor, w: Tensor, prior: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """W and b of least Σ w ‖y − W x − b‖² + ridge · (mean weighted variance of x) · Σw · ‖W − prior‖², by lstsq."""
    mx, my = ((w[:, None] * each).sum(0) / w.sum() for each in (x, y))
    rows = (x - mx) * w.sqrt()[:, None]
    rest = (y - my - (x - mx) @ prior.T) * w.sqrt()[:, None]
    level = (ridge * rows.square().sum() / x.shape[1]).sqrt()
    regressors = torch.cat([rows, level * torch.eye(x.shape[1], dtype=x.dtype)])
    wanted = torch.cat([rest, torch.zeros(x.shape[1], y.shape[1], dtype=x.dtype)])
    weight = prior + torch.linalg.lstsq(regressors, wanted, driver="gelsd").solution.T
    return weight, my - weight @ mx


def by_folds(x: Tensor, y: Tensor, w: Tensor, prior: Tensor) -> tuple[Tensor, Tensor, float | None]:
    """The same with the ridge by which even images predict odd ones best and the other way round; None: no change.

    x (images, tokens, n), y (images, tokens, m), w (images, tokens). All weights count alike in each fold. Only the
    choice between ridges that are about as good is left to `choose_ridge`, which has tests of its own.
    """
    w = w.clone()
    folds, moments = [], []
    for k in (0, 1):
        w[k::2] *= w[k::2].numel() / w[k::2].sum()
        a, b, s = x[k::2].flatten(0, 1), y[k::2].flatten(0, 1), w[k::2].flatten()
        ma, mb = ((s[:, None] * each).sum(0) / s.sum() for each in (a, b))
        rest = b - mb - (a - ma) @ prior.T
        moments.append(Moment(*((a - ma).T @ (s[:, None] * each) / s.sum() for each in (a - ma, rest))))
        folds.append((a, b, s, a - ma, rest))
    ridge = choose_ridge(moments)
    gained = 0.0
    for (a, b, s, _, _), (_, _, t, held, rest), asked in zip(folds, folds[::-1], moments[::-1], strict=True):
        weight, _ = ridged(a, b, s, prior, ridge)
        lost = (rest - held @ (weight - prior).T).square().sum(1) - rest.square().sum(1)
        # Each fold's error counts as a share of what it asks for.
        gained -= float((t * lost).sum() / t.sum() / asked.xy.square().sum())
    flat = x.flatten(0, 1), y.flatten(0, 1), w.flatten()
    if gained <= 0:
        mx, my = ((flat[2][:, None] * each).sum(0) / flat[2].sum() for each in flat[:2])
        return prior, my - prior @ mx, None
    return (*ridged(*flat, prior, ridge), ridge)


def layers_of(block: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Attention and FFN of a timm block, as functions of the stream."""

    class Layer(nn.Module):
        def __init__(self, *modules: nn.Module) -> None:
            super().__init__()
            self.modules_ = nn.Sequential(*modules)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.modules_(x)

    return Layer(block.norm1, block.attn, block.ls1), Layer(block.norm2, block.mlp, block.ls2)


def taken_by(module: nn.Module, run: nn.Module, x: Tensor) -> Tensor:
    """The input of a module in a forward pass."""
    found = []
    handle = module.register_forward_pre_hook(lambda _module, args: found.append(args[0].detach()))
    try:
        run(x)
    finally:
        handle.remove()
    return found[0]
