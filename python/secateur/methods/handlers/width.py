"""Handlers of the channels of a residual stream: they are rotated to those that its norms see most of."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ...anatomy import Group, Indices, Stream
from ...errors import InvalidArgument, Unsupported
from ...statistics.settings import Float
from ..base import Handler
from ..linalg.regression import Moment, choose_ridge, ridged_cholesky, sketch, solve
from ..linalg.stream import residual_basis, stock_basis
from ..weights import Weights
from .fit import Fit, Moments
from .rotation import leading

__all__ = ["RotatedChannels"]


class RotatedChannels(Handler):
    """Rotates the whole stream to one orthogonal basis, and refits the consumers of every norm.

    The rotation is that of SliceGPT (Ashkboos et al., ICLR 2024, arXiv:2401.15024), without labels, for norms with any
    eps, and within timm's own norm classes.
    """

    def __init__(self, fit: Fit) -> None:
        self._fit = fit

    def _stream(self, group: Group) -> Stream:
        stream = self._fit.anatomy.streams.get(group.name, "not described")
        if isinstance(stream, str):
            raise Unsupported(
                f"{group.name}: expected a residual stream that can be rotated, got one that cannot ({stream})"
            )
        return stream

    def _norm_moments(self, stream: Stream, gone: Collection[str] = ()) -> dict[str, Moments]:
        """Return the moments of the norms that stay when the layers ``gone`` are removed."""
        staying = [name for name in stream.readers if self._fit.anatomy.layer_holding(name) not in gone]
        return {name: self._fit.moments(name) for name in staying}

    def errors(self, group: Group) -> Float | None:
        """Return the share lost of the variance that the norms see, as the mean over all norms."""
        stream = self._stream(group)
        moments = self._norm_moments(stream)
        basis = residual_basis([found.second for found in moments.values()])
        centred = int(stream.centred)
        lost = np.zeros(group.size + 1)
        for found in moments.values():
            lost[centred:] += unexplained(basis.mT @ found.covariance @ basis).numpy()[: group.size + 1 - centred]
        lost /= group.size * len(moments)
        lost[: 1 + centred] = 1.0
        lost[-1] = 0.0
        return np.minimum.accumulate(np.clip(lost, 0.0, 1.0))

    def cut(self, weights: Weights, group: Group, count: int) -> Indices:
        """Rotate the stream, keep its leading directions, and refit the consumers of its norms."""
        stream, size = self._stream(group), group.size
        moments = self._norm_moments(stream, weights.keep)
        # A LayerNorm subtracts the mean, so it holds one direction fewer than it has channels.
        rank = count - 1 if stream.centred else count
        if rank < 1:
            raise InvalidArgument(f"{group.name}: expected at least 2 channels of a model of LayerNorms, got 1")
        basis = residual_basis([found.second for found in moments.values()])[:, :rank]
        channels = stock_basis(count) if stream.centred else torch.eye(count, dtype=torch.float64)
        write = channels @ (basis - basis.mean(0) if stream.centred else basis).mT
        for module, scale in stream.writers.items():
            _rotate_writer(weights, module, scale, write)
        for token in stream.tokens:
            weights.set("", F.pad(weights.weight("", token) @ write.mT, [0, size - count]), token)
        near = self._fit.last_ridge
        for name, readers in stream.readers.items():
            if name not in moments:
                continue
            matrix, offset, near = _readout(moments[name], basis, count, near)
            self._rotate_readers(weights, name, readers, matrix @ channels.mT, offset)
            norm: Any = self._fit.model.get_submodule(name)
            weights.eps[name] = float(norm.eps) * size / count
        return leading(1, count)

    def _rotate_readers(
        self, weights: Weights, norm: str, readers: tuple[str, ...], read: Tensor, offset: Tensor
    ) -> None:
        """Fold the norm's scale and shift and the change of basis into the layers after it."""
        module = self._fit.model.get_submodule(norm)
        size = len(offset)
        gain, shift = weights.affine(norm, size)
        for reader in readers:
            matrix = weights.weight(reader)
            weights.set(reader, weights.bias(reader) + matrix @ (shift + gain * offset), "bias")
            weights.set(reader, F.pad(matrix @ (gain[:, None] * read), [0, size - read.shape[1]]))
        if getattr(module, "weight", None) is not None:
            weights.set(norm, torch.ones_like(gain))
        if getattr(module, "bias", None) is not None:
            weights.set(norm, torch.zeros_like(shift), "bias")


def _rotate_writer(weights: Weights, module: str, scale: str | None, write: Tensor) -> None:
    factor = weights.scale(scale)
    weight, bias = weights.weight(module), weights.bias(module)
    scaled = write * factor
    leaving = len(weight) - len(write)
    weights.set(module, F.pad(scaled @ weight.flatten(1), [0, 0, 0, leaving]).reshape(weight.shape))
    weights.set(module, F.pad(scaled @ bias, [0, leaving]), "bias")
    if scale is not None:
        weights.set(scale, torch.ones_like(weights.weight(scale, "gamma")), "gamma")


def _readout(moments: Moments, basis: Tensor, count: int, near: float) -> tuple[Tensor, Tensor, float]:
    """Fit the dense norm's output x̂ ≈ matrix @ φ + offset from the pruned norm's output φ; also return the ridge.

    φ has ``count`` channels of mean square one, in the kept basis, where x̂ has D: φ = Qᵀx̂ / ρ, ρ² = E‖Qᵀx̂‖² / count.
    The part of x̂ outside the basis is regressed on the part within.
    """
    scale = ((moments.second @ basis) * basis).sum().div(count).sqrt()
    few = sketch(torch.eye(len(basis), dtype=torch.float64))

    def moment(covariance: Tensor, wanted: Tensor | None = None) -> Moment:
        seen = basis.mT @ covariance
        kept = seen @ basis
        if wanted is None:
            return Moment(kept, seen - kept @ basis.mT)
        return Moment(kept, seen @ wanted - kept @ (basis.mT @ wanted))

    ridge = choose_ridge([moment(fold, few) for fold in moments.folds], near)
    matrix = basis + solve(moment(moments.covariance), ridge).mT
    return scale * matrix, moments.mean - matrix @ (basis.mT @ moments.mean), ridge


def unexplained(covariance: Tensor) -> Tensor:
    """Return the variance of all inputs that the first r do not explain, for every r from 0 to their number.

    With C = L Lᵀ, the remainder of C after regression on the first r is L₂ L₂ᵀ, with L₂ the trailing block of L.
    """
    # Sums of float32 activations: anything below 1e-7 of the largest is rounding error, of either sign.
    factor, _ = ridged_cholesky(covariance, 1e-7 * float(covariance.diagonal().max()) + 1e-30)
    columns = factor.square().sum(0)
    return torch.cat([columns.flip(0).cumsum(0).flip(0), columns.new_zeros(1)])
