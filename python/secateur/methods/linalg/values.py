"""The directions of each head's values that matter most to the projection; float64 on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .bases import SWEEPS, pseudo_inverse
from .regression import square_root

# Share of the largest variance left in a head's values; below it, other heads' kept values already hold them.
_HELD = 1e-9


def value_bases(weight: Tensor, covariance: Tensor, heads: int, rank: int, staying: Sequence[int] = ()) -> Tensor:
    """Choose what to keep of each head's values, given that the projection is refitted over all heads.

    Each head starts from the directions that matter most to its own part of the output, U_rᵀ W_h with U from the SVD of
    W_h C_h^½. Two sweeps then choose again for each head the directions that the other heads' kept values do not
    already hold: in the same way, from what is left of output and values after regression on those.

    Args:
        weight: the projection's, (outputs, heads · d), in the metric that errors are measured in.
        covariance: of its input, (heads · d, heads · d).
        heads: number of heads.
        rank: r, at most the number of outputs and d.
        staying: the heads that keep anything, by default all. Their values then also have to represent the other heads'
            part of the output.

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
    """The kept directions T_h of each staying head, and their moments with each other, all values and the output."""

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
        """Choose a head's directions anew: those that matter most to the part of the output that other heads leave."""
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
        # The directions of heads that have not been visited yet are still zero.
        parts = seen.unflatten(1, (-1, self._size))[:, self._staying]
        gram = torch.einsum("rhd,hsd->rhs", parts, self.bases).flatten(1)
        self._gram[own] = gram
        self._gram[:, own] = gram.mT


def _solved(gram: Tensor, right: Tensor) -> Tensor:
    """Return G⁺ times the right side; directions below 1e-8 of the largest contribute little or nothing."""
    ridged = gram.clone()
    ridged.diagonal().add_(1e-9 * gram.diagonal().max() + torch.finfo(gram.dtype).tiny)
    factor, info = torch.linalg.cholesky_ex(ridged)
    found: Tensor = torch.cholesky_solve(right, factor) if int(info) == 0 else pseudo_inverse(gram) @ right
    return found


def _leading(weight: Tensor, covariance: Tensor, rank: int) -> Tensor:
    """Return the input directions along which the output varies most, (rank, inputs); zeros if there are fewer."""
    return _of_cross(weight @ covariance, covariance, rank)


def _of_cross(cross: Tensor, covariance: Tensor, rank: int) -> Tensor:
    """Return the same from the covariance of output and input, (outputs, inputs), and that of the input.

    With C = E v Eᵀ and C_yx E v^{-½} = U Σ Vᵀ, U_rᵀ C_yx C⁺ is Σ_r V_rᵀ v^{-½} Eᵀ.
    """
    values, vectors = torch.linalg.eigh(covariance)
    held = values > _HELD * values[-1].clamp_min(torch.finfo(values.dtype).tiny)
    whitened = vectors * (torch.where(held, values, 1).rsqrt() * held)
    # Σ and V come from the smaller matrix on the inputs' side; MKL's QR of the whole is slow on shared cores.
    # After squaring, singular values below 1e-8 of the largest are rounding; their directions hold 1e-16 of the output.
    turned = cross @ whitened
    squares, right = torch.linalg.eigh(turned.mT @ turned)
    count = min(rank, len(cross))
    strengths, leading = squares.clamp_min(0).sqrt().flip(0)[:count], right.flip(1)[:, :count]
    basis = torch.zeros(rank, len(covariance), dtype=cross.dtype)
    basis[:count] = strengths[:, None] * (whitened @ leading).mT
    return basis


def value_errors(weight: Tensor, covariance: Tensor, heads: int) -> Tensor:
    """Bound the projection's relative error when each head keeps r directions, for every r: (d + 1,).

    Each head is treated on its own, before the refit over all heads, which can only lower the error.
    """
    size = len(covariance) // heads
    total = (weight @ covariance * weight).sum()
    parts = [slice(head * size, (head + 1) * size) for head in range(heads)]
    roots = square_root(torch.stack([covariance[part, part] for part in parts]))
    columns = weight.unflatten(1, (heads, size)).transpose(0, 1)
    # Squared singular values of the weight times the root, from matrices of the inputs' size, however many outputs.
    energy = torch.linalg.eigvalsh(roots @ (columns.mT @ columns) @ roots.mT).clamp_min(0).sum(0)
    lost = torch.cat([energy.cumsum(0).flip(0), energy.new_zeros(1)])
    share: Tensor = lost / torch.where(total > 0, total, 1)
    return share
