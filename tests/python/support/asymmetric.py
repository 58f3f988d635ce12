"""The refit towards the dense stream, written from its formulas in float64, with rows one by one and no shortcuts."""

from __future__ import annotations

import torch
from secateur.methods.linalg.regression import RIDGES
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

    x (images, tokens, n), y (images, tokens, m), w (images, tokens). All weights count alike in each fold.
    """
    w = w.clone()
    folds = []
    for k in (0, 1):
        w[k::2] *= w[k::2].numel() / w[k::2].sum()
        folds.append([each[k::2].flatten(0, 1) for each in (x, y)] + [w[k::2].flatten()])

    def error(ridge: float) -> float:
        total = 0.0
        for (a, b, s), (c, d, t) in (folds, folds[::-1]):
            weight, _ = ridged(a, b, s, prior, ridge)
            mc, md = ((t[:, None] * each).sum(0) / t.sum() for each in (c, d))
            held, wanted = c - mc, d - md
            lost = (wanted - held @ weight.T).square().sum(1) - (wanted - held @ prior.T).square().sum(1)
            # Each fold's error is a share of what it asks for, as moments.
            scale = ((t[:, None] * held).T @ (wanted - held @ prior.T) / t.sum()).square().sum()
            total += float((t * lost).sum() / t.sum() / scale)
        return total

    flat = [each.flatten(0, 1) for each in (x, y)]
    errors = [error(ridge) for ridge in RIDGES]
    best = min(range(len(RIDGES)), key=errors.__getitem__)
    if errors[best] >= 0:
        mx, my = ((w.flatten()[:, None] * each).sum(0) / w.sum() for each in flat)
        return prior, my - prior @ mx, None
    return (*ridged(*flat, w.flatten(), prior, RIDGES[best]), RIDGES[best])


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
