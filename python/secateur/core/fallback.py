"""Adds tensors to the core's accumulators from devices on which the core cannot compute.

The core computes on the CPU, and on CUDA devices if it was built with CUDA. Without that, torch multiplies on the CUDA
device in float64 and only results of the size of a Gram matrix are copied to the host: slower, but the same statistics.
Tensors on other devices, which may lack float64, are copied to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch

from ..errors import Error, Unsupported
from . import bindings as core

RowNorm = Literal["none", "rms", "layer"]

# The core's CUDA kernels hold a head in shared memory.
_CUDA_HEAD_DIM = 128
# The memory of torch's float64 copies at one time.
_CHUNK_BYTES = 64 << 20
# Squares of the largest values the core takes; above, and for NaN, the core itself decides.
_LARGEST_GRAM, _LARGEST_MOMENT = 1e120, 1e240


def update_scores(
    scorers: Sequence[core.AttentionScorer], q: torch.Tensor, k: torch.Tensor, *, wait: bool = True
) -> None:
    """Run ``core.AttentionScorer.update_in_turn(scorers, q, k)``, (images, tokens, heads, head_dim) on any device."""
    readable = _core_reads(q, head_dim=scorers[0].head_dim) and (q.device.type == "cpu" or q.dtype == k.dtype)
    if readable and _taken(lambda: core.AttentionScorer.update_in_turn(scorers, q, k, wait=wait), q):
        return
    for turn, scorer in enumerate(scorers[: len(q)]):
        _score_elsewhere(scorer, q[turn :: len(scorers)], k[turn :: len(scorers)])


def _score_elsewhere(scorer: core.AttentionScorer, q: torch.Tensor, k: torch.Tensor) -> None:
    if not _torch_multiplies(q):
        scorer.update(q.cpu(), k.cpu())
        return
    parts = [_grams(*pair) for pair in zip(_chunks(q), _chunks(k), strict=True)]
    query, key, mean = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    if all(_within(part, _LARGEST_GRAM) for part in (query, key, mean)):
        scorer.update_grams(query, key, mean, q.shape[1])
    else:
        # Let the core find the value that is not finite or too large, and name it.
        scorer.update(q.cpu(), k.cpu())


def update_moments(
    accumulators: Sequence[core.MomentAccumulator],
    x: torch.Tensor,
    *,
    norm: RowNorm = "none",
    stride: int = 1,
    phases: Sequence[int],
    wait: bool = True,
) -> None:
    """Run ``core.MomentAccumulator.update_in_turn(accumulators, x, ...)``, (images, tokens, dim) on any device."""

    def update() -> None:
        core.MomentAccumulator.update_in_turn(accumulators, x, norm=norm, stride=stride, phases=phases, wait=wait)

    if _core_reads(x) and _taken(update, x):
        return
    for turn, accumulator in enumerate(accumulators[: len(x)]):
        _multiply_elsewhere(accumulator, x[turn :: len(accumulators)], norm, stride, phases[turn])


def _multiply_elsewhere(
    accumulator: core.MomentAccumulator, x: torch.Tensor, norm: RowNorm, stride: int, phase: int
) -> None:
    rows = chosen_rows(x, stride, phase) if _torch_multiplies(x) else None
    if rows is not None:
        dim = rows.shape[1]
        total = torch.zeros(dim, dtype=torch.float64, device=x.device)
        second = torch.zeros(dim, dim, dtype=torch.float64, device=x.device)
        for chunk in _chunks(rows):
            values = _normalised(chunk.double(), norm)
            total += values.sum(0)
            second.addmm_(values.T, values)
        upper = torch.triu_indices(dim, dim, device=x.device)
        sums, packed = total.cpu(), second[upper[0], upper[1]].cpu()
        if _within(sums, _LARGEST_MOMENT) and _within(packed, _LARGEST_MOMENT):
            other = core.MomentAccumulator(dim, name=accumulator.name)
            other.load_state(
                {"rows": np.array([len(rows)]), "sum": sums.numpy(), "second_moment": packed.numpy()},
            )
            accumulator.merge(other)
            return
    accumulator.update(x.cpu(), norm=norm, stride=stride, phase=phase)


def chosen_rows(x: torch.Tensor, stride: int, phase: int) -> torch.Tensor:
    """Return the selected rows, (rows, dim): of image b, the tokens n with n = phase + b modulo stride."""
    if stride == 1:
        return x.reshape(x.shape[:-1].numel(), x.shape[-1])
    images, tokens = (torch.arange(size, device=x.device) for size in x.shape[:2])
    rows: torch.Tensor = x[(tokens - images[:, None] - phase) % stride == 0]
    return rows


def at_hand(x: torch.Tensor) -> torch.Tensor:
    """Return x itself if torch can multiply it in float64 there, else a copy on the host."""
    return x if x.device.type == "cpu" or _torch_multiplies(x) else x.cpu()


def _within(x: torch.Tensor, largest: float) -> bool:
    return bool((x.abs() <= largest).all())


def _taken(update: Callable[[], None], x: torch.Tensor) -> bool:
    """Return whether the core did it; not on devices that it has no code for or whose driver is too old."""
    try:
        update()
    except Unsupported:
        if not _torch_multiplies(x):
            raise
        return False
    except Error as error:
        if not (_torch_multiplies(x) and str(error).startswith("memory: ")):
            raise
        # The core has done nothing yet. torch's allocator may hold freed memory that it needs.
        torch.cuda.empty_cache()
        update()
    return True


def _core_reads(x: torch.Tensor, head_dim: int = 1) -> bool:
    if x.device.type == "cuda":
        return core.runtime.has_cuda() and head_dim <= _CUDA_HEAD_DIM
    return x.device.type == "cpu"


def _torch_multiplies(x: torch.Tensor) -> bool:
    return x.device.type == "cuda"


def _chunks(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield parts along the first axis that are small enough in float64."""
    size = max(1, _CHUNK_BYTES // max(1, 8 * x[:1].numel()))
    return iter(x.split(size))


def _grams(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return QᵀQ and K_cᵀK_c (images, heads, d, d), and the keys' mean (images, heads, d)."""
    q, k = (x.double().transpose(1, 2) for x in (q, k))
    mean = k.mean(2, keepdim=True)
    centred = k - mean
    return q.mT @ q, centred.mT @ centred, mean.squeeze(2)


def _normalised(rows: torch.Tensor, norm: RowNorm) -> torch.Tensor:
    """Return X √dim / ‖x‖, or that of x minus its mean; zeros if the norm is only the mean's rounding error."""
    if norm == "none":
        return rows
    dim = rows.shape[1]
    mean = rows.mean(1, keepdim=True) if norm == "layer" else rows.new_zeros(len(rows), 1)
    rows = rows - mean
    square = rows.square().sum(1, keepdim=True)
    least = dim * (dim * 2.0**-53 * mean).square()
    return rows * torch.where(square <= least, 0.0, (dim / square).sqrt())
