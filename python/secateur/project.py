"""The basis in which a cut costs least, for queries and keys, values and the residual stream; float64 on the CPU.

A head may be turned to any basis without changing the model (W_q ← A W_q, W_k ← B W_k with AᵀB = I leaves the scores as
they are), and so may a residual stream that only norms read. Where to cut is then a question of rank, not of neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .regression import RANK_TOLERANCE, square_root

__all__ = [
    "HeadBasis",
    "improve",
    "query_key_bases",
    "residual_basis",
    "score_errors",
    "stock_basis",
    "value_bases",
    "value_errors",
]

_SWEEPS = 2
_CG_STEPS = 10


class HeadBasis(NamedTuple):
    """New queries ``query`` @ q and keys ``key`` @ k, each (heads, rank, d), best directions first."""

    query: Tensor
    key: Tensor

    def first(self, rank: int) -> HeadBasis:
        """The leading directions."""
        return HeadBasis(self.query[:, :rank], self.key[:, :rank])


def query_key_bases(query_gram: Tensor, key_gram: Tensor) -> HeadBasis:
    """Bases whose leading r directions keep the scores best, for queries and keys of different images.

    With G = RᵀR for each Gram and R_q R_kᵀ = U Σ Vᵀ, queries are turned by Σ^{-½} Vᵀ R_k and keys by Σ^{-½} Uᵀ R_q;
    dropping the directions past r costs Σ_{j>r} σ_j². Keys are centred over tokens: softmax does not see their mean.

    Args:
        query_gram: (heads, d, d), Σ q qᵀ.
        key_gram: (heads, d, d), Σ (k − k̄)(k − k̄)ᵀ.

    Returns:
        All d directions; those of no singular value are zero.
    """
    query_root, key_root = square_root(query_gram), square_root(key_gram)
    left, values, right = torch.linalg.svd(query_root @ key_root.mT)
    kept = values > RANK_TOLERANCE * values[..., :1]
    scale = torch.where(kept, values, 1).rsqrt() * kept
    return HeadBasis(scale[..., None] * (right @ key_root), scale[..., None] * (left.mT @ query_root))


def score_errors(basis: HeadBasis, query_grams: Tensor, key_grams: Tensor) -> Tensor:
    """Error of the centred scores when the first r directions stay, for every r from 0 to d.

    Σ over images of ‖Q Kᵀ − Q (A_rᵀ B_r) Kᵀ‖², over the sum of ‖Q Kᵀ‖². The basis is complete.

    Args:
        basis: all directions.
        query_grams: of single images, (images, heads, d, d).
        key_grams: the same for centred keys.

    Returns:
        (heads, d + 1); [:, 0] is 1 where all scores lie within the basis.
    """
    pairs = ((basis.query @ query_grams @ basis.query.mT) * (basis.key @ key_grams @ basis.key.mT)).sum(0)
    # What the directions from r on give is the sum of the trailing block.
    blocks = pairs.flip(-1, -2).cumsum(-1).cumsum(-2).flip(-1, -2).diagonal(dim1=-2, dim2=-1).clamp_min(0)
    total = (query_grams * key_grams).sum((0, -2, -1))
    errors = torch.cat([blocks, torch.zeros_like(blocks[:, :1])], 1)
    return errors / torch.where(total > 0, total, 1)[:, None]


def improve(basis: HeadBasis, query_grams: Tensor, key_grams: Tensor) -> HeadBasis:
    """Lower the error on single images by alternating least squares, as far as images that were left out agree.

    The error Σ_b tr(Δ G_q,b Δᵀ G_k,b) of AᵀB = I + Δ is quadratic in either factor. Half of the images are fitted, and
    a head keeps its new basis only if the error on the other half fell; then all are fitted.

    Args:
        basis: r directions, the start.
        query_grams: of single images, (images, heads, d, d).
        key_grams: the same for centred keys.
    """
    if len(query_grams) < 2:
        return basis
    even, odd = slice(0, None, 2), slice(1, None, 2)
    trial = _alternate(basis, query_grams[even], key_grams[even])
    before = _error(basis, query_grams[odd], key_grams[odd])
    better = _error(trial, query_grams[odd], key_grams[odd]) < before
    if not bool(better.any()):
        return basis
    fitted = _alternate(basis, query_grams, key_grams)
    chosen = better[:, None, None]
    return HeadBasis(torch.where(chosen, fitted.query, basis.query), torch.where(chosen, fitted.key, basis.key))


def _alternate(basis: HeadBasis, query_grams: Tensor, key_grams: Tensor) -> HeadBasis:
    query, key = basis
    for _ in range(_SWEEPS):
        query = _least_squares(query, key, query_grams, key_grams)
        key = _least_squares(key, query, key_grams, query_grams)
    return HeadBasis(query, key)


def _least_squares(start: Tensor, other: Tensor, grams: Tensor, other_grams: Tensor) -> Tensor:
    """X with least Σ_b ‖…‖² for a fixed other side: Σ_b G_b Xᵀ M_b = Σ_b G_b G'_b Yᵀ, by conjugate gradients."""
    inner = other @ other_grams @ other.mT
    right = (grams @ (other_grams @ other.mT)).sum(0)
    outer_mean, inner_mean = _inverse(grams.mean(0)), _inverse(inner.mean(0))

    def normal(x: Tensor) -> Tensor:
        return (grams @ x @ inner).sum(0)

    def precondition(x: Tensor) -> Tensor:
        return outer_mean @ x @ inner_mean

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum((-2, -1), keepdim=True)

    x = start.mT
    residual = right - normal(x)
    step = precondition(residual)
    size = dot(residual, step)
    for _ in range(_CG_STEPS):
        image = normal(step)
        curvature = dot(step, image)
        # A head that has arrived stands still.
        length = torch.where(curvature > 0, size / torch.where(curvature > 0, curvature, 1), 0)
        x = x + length * step
        residual = residual - length * image
        conditioned = precondition(residual)
        following = dot(residual, conditioned)
        step = conditioned + torch.where(size > 0, following / torch.where(size > 0, size, 1), 0) * step
        size = following
    return x.mT


def _error(basis: HeadBasis, query_grams: Tensor, key_grams: Tensor) -> Tensor:
    missing = torch.eye(basis.query.shape[-1], dtype=basis.query.dtype) - basis.query.mT @ basis.key
    error: Tensor = ((missing.mT @ query_grams @ missing) * key_grams.mT).sum((0, -2, -1))
    return error


def _inverse(matrix: Tensor) -> Tensor:
    found: Tensor = torch.linalg.pinv(matrix, rtol=1e-8, hermitian=True)
    return found


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
    parts = [slice(head * size, (head + 1) * size) for head in staying or range(heads)]
    if rank == size:
        kept = [torch.eye(size, dtype=weight.dtype) for _ in parts]
    else:
        kept = [_leading(weight[:, part], covariance[part, part], rank) for part in parts]
    if len(parts) > 1 and rank < size:
        for _ in range(_SWEEPS):
            for head, part in enumerate(parts):
                others = torch.block_diag(*(kept[:head] + kept[head + 1 :]))
                index = torch.cat([torch.arange(p.start, p.stop) for p in parts[:head] + parts[head + 1 :]])
                kept[head] = _conditioned(weight, covariance, part, others, index, rank)
    joined = weight.new_zeros(len(parts) * rank, len(covariance))
    for position, (part, basis) in enumerate(zip(parts, kept, strict=True)):
        joined[position * rank : (position + 1) * rank, part] = basis
    return joined


def _conditioned(weight: Tensor, covariance: Tensor, part: slice, others: Tensor, index: Tensor, rank: int) -> Tensor:
    seen = others @ covariance[index]
    regress = _inverse(seen[:, index] @ others.mT)
    own = covariance[part, part] - seen[:, part].mT @ regress @ seen[:, part]
    cross = weight @ (covariance[:, part] - seen.mT @ regress @ seen[:, part])
    return _leading(cross @ torch.linalg.pinv(own, rtol=1e-9, hermitian=True), own, rank)


def _leading(weight: Tensor, covariance: Tensor, rank: int) -> Tensor:
    """The rank directions of the input that the output varies most along, (rank, inputs); zeros beyond the outputs."""
    left = torch.linalg.svd(weight @ square_root(covariance).mT, full_matrices=False)[0]
    directions = left[:, :rank].mT @ weight
    basis = torch.zeros(rank, weight.shape[1], dtype=weight.dtype)
    basis[: len(directions)] = directions
    return basis


def value_errors(weight: Tensor, covariance: Tensor, heads: int) -> Tensor:
    """Bound of the projection's relative error when each head keeps r directions, for every r: (d + 1,).

    Each head by itself, before the refit over all heads, which can only lower it.
    """
    size = len(covariance) // heads
    total = (weight @ covariance * weight).sum()
    lost = weight.new_zeros(size + 1)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        energy = torch.linalg.svdvals(weight[:, part] @ square_root(covariance[part, part]).mT).square()
        energy = torch.cat([energy, energy.new_zeros(size - len(energy))]) if len(energy) < size else energy[:size]
        lost[:-1] += energy.flip(0).cumsum(0).flip(0)
    share: Tensor = lost / torch.where(total > 0, total, 1)
    return share


def residual_basis(moments: list[Tensor]) -> Tensor:
    """Orthonormal directions of the residual stream, (D, D) columns, those that its norms see most of first.

    The eigenvectors of the mean of the norms' input moments x̂x̂ᵀ: every norm counts alike.
    """
    basis: Tensor = torch.linalg.eigh(torch.stack(moments).mean(0))[1]
    return basis.flip(1)


def stock_basis(size: int) -> Tensor:
    """(size, size − 1) orthonormal columns, each of which sums to zero: what LayerNorm leaves of that many channels."""
    vector = torch.full((size,), size**-0.5, dtype=torch.float64)
    vector[0] += 1.0
    # The Householder reflection that sends the constant direction to the first axis.
    reflection = torch.eye(size, dtype=torch.float64) - 2 * torch.outer(vector, vector) / vector.dot(vector)
    return reflection[:, 1:]
