"""The directions of each head's values that the projection needs most; float64 on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .bases import SWEEPS, pseudo_inverse
from .regression import square_root

# Of the largest variance left to a head's values: below it they are other heads' kept values.
_HELD = 1e-9


def value_bases(weight: Tensor, covariance: Tensor, heads: int, rank: int, staying: Sequence[int] = ()) -> Tensor:
    """What to keep of each head's values, given that the projection is refitted over all heads.

    Each head starts from the directions that matter most to its own part of the output, U_rᵀ W_h with U from the SVD of
    W_h C_h^½. Two sweeps then give each head the directions that the other heads' kept values do not already hold: the
    same of what is left of output and values after regression on those.

    Args:
        weight: the projection's, (outputs, heads · d), in the metric that errors are measured in.
        covariance: of its input, (heads · d, heads · d).
        heads: number of heads.
        rank: r, at most the number of outputs and d.
        staying: the heads that keep anything; all unless given. The others' part of the output is then to be held too.

    Returns:
        T, (staying heads · r, heads · d), block-diagonal: a head's new values are T_h times its values.
    """
    size = len(covariance) // heads
    staying = list(staying) or list(range(heads))
    if rank == size:
        bases = torch.eye(size, dtype=weight.dtype).expand(len(staying), -1, -1)
    else:
        kept = _Kept(weight, covariance, size, staying, rank)
        for _ in range(SWEEPS if len(staying) > 1 else 0):
            for position in range(len(staying)):
                kept.renew(position)
        bases = kept.bases
    joined = weight.new_zeros(len(staying), rank, heads, size)
    for position, head in enumerate(staying):
        joined[position, :, head] = bases[position]
    return joined.flatten(0, 1).flatten(1)


class _Kept:
    """The directions kept of each staying head, T_h, and their moments with each other, all values and the output."""

    def __init__(self, weight: Tensor, covariance: Tensor, size: int, staying: Sequence[int], rank: int) -> None:
        self._staying, self._size, self._rank = list(staying), size, rank
        self._parts = [slice(head * size, (head + 1) * size) for head in staying]
        self._covariance, self._output = covariance, weight @ covariance
        count = len(staying) * rank
        self.bases = torch.zeros(len(staying), rank, size, dtype=weight.dtype)
        self._with_values = torch.zeros(count, len(covariance), dtype=weight.dtype)
        self._with_output = torch.zeros(len(weight), count, dtype=weight.dtype)
        self._gram = torch.zeros(count, count, dtype=weight.dtype)
        for head, part in enumerate(self._parts):
            self._put(head, _leading(weight[:, part], covariance[part, part], rank))

    def renew(self, head: int) -> None:
        """Give a head the directions that matter most to what the other heads' leave of the output."""
        part, own = self._parts[head], slice(head * self._rank, (head + 1) * self._rank)
        others = torch.ones(len(self._gram), dtype=torch.bool)
        others[own] = False
        seen = self._with_values[others][:, part]
        explained = _solved(self._gram[others][:, others], seen)
        left = self._covariance[part, part] - seen.mT @ explained
        cross = self._output[:, part] - self._with_output[:, others] @ explained
        self._put(head, _of_cross(cross, left, self._rank))

    def _put(self, head: int, basis: Tensor) -> None:
        own = slice(head * self._rank, (head + 1) * self._rank)
        self.bases[head] = basis
        seen = basis @ self._covariance[self._parts[head]]
        self._with_values[own] = seen
        self._with_output[:, own] = self._output[:, self._parts[head]] @ basis.mT
        # Of heads whose turn has not come the directions are still zero.
        parts = seen.unflatten(1, (-1, self._size))[:, self._staying]
        gram = torch.einsum("rhd,hsd->rhs", parts, self.bases).flatten(1)
        self._gram[own] = gram
        self._gram[:, own] = gram.mT


def _solved(gram: Tensor, right: Tensor) -> Tensor:
    """G⁺ times the right side; of directions below 1e-8 of the largest little or nothing."""
    ridged = gram.clone()
    ridged.diagonal().add_(1e-9 * gram.diagonal().max() + torch.finfo(gram.dtype).tiny)
    factor, info = torch.linalg.cholesky_ex(ridged)
    found: Tensor = torch.cholesky_solve(right, factor) if int(info) == 0 else pseudo_inverse(gram) @ right
    return found


def _leading(weight: Tensor, covariance: Tensor, rank: int) -> Tensor:
    """The rank directions of the input that the output varies most along, (rank, inputs); zeros beyond the outputs."""
    return _of_cross(weight @ covariance, covariance, rank)


def _of_cross(cross: Tensor, covariance: Tensor, rank: int) -> Tensor:
    """The same from the covariance of output and input, (outputs, inputs), and that of the input.

    With C = E v Eᵀ and C_yx E v^{-½} = U Σ Vᵀ, U_rᵀ C_yx C⁺ is Σ_r V_rᵀ v^{-½} Eᵀ.
    """
    values, vectors = torch.linalg.eigh(covariance)
    held = values > _HELD * values[-1].clamp_min(torch.finfo(values.dtype).tiny)
    whitened = vectors * (torch.where(held, values, 1).rsqrt() * held)
    # Σ and V of the whole from the inputs' side, of their size; MKL's QR of the whole spins where cores are shared.
    # Squared, singular values below 1e-8 of the largest are rounding, of directions that hold 1e-16 of the output.
    turned = cross @ whitened
    squares, right = torch.linalg.eigh(turned.mT @ turned)
    count = min(rank, len(cross))
    strengths, leading = squares.clamp_min(0).sqrt().flip(0)[:count], right.flip(1)[:, :count]
    basis = torch.zeros(rank, len(covariance), dtype=cross.dtype)
    basis[:count] = strengths[:, None] * (whitened @ leading).mT
    return basis


def value_errors(weight: Tensor, covariance: Tensor, heads: int) -> Tensor:
    """Bound of the projection's relative error when each head keeps r directions, for every r: (d + 1,).

    Each head by itself, before the refit over all heads, which can only lower it.
    """
    size = len(covariance) // heads
    total = (weight @ covariance * weight).sum()
    parts = [slice(head * size, (head + 1) * size) for head in range(heads)]
    roots = square_root(torch.stack([covariance[part, part] for part in parts]))
    columns = weight.unflatten(1, (heads, size)).transpose(0, 1)
    # Squared singular values of the weight times the root: of the inputs' size, whatever the number of outputs.
    energy = torch.linalg.eigvalsh(roots @ (columns.mT @ columns) @ roots.mT).clamp_min(0).sum(0)
    lost = torch.cat([energy.cumsum(0).flip(0), energy.new_zeros(1)])
    share: Tensor = lost / torch.where(total > 0, total, 1)
    return share
