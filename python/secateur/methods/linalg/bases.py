"""Bases of queries and keys where truncation hurts the scores least; float64 on the CPU.

A head can be rotated to any basis without changing the model (W_q ← A W_q, W_k ← B W_k with AᵀB = I preserves the
scores), and so can a residual stream that only norms consume. The cut then chooses a rank instead of neurons.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .regression import RANK_TOLERANCE, square_root

__all__ = [
    "HeadBasis",
    "Normed",
    "NormedHeads",
    "behind_norms",
    "improve",
    "length_errors",
    "query_key_bases",
    "score_errors",
]

SWEEPS = 2
_CG_STEPS = 10
# Share of the right side's squared norm, both preconditioned; smaller residuals do not improve a basis noticeably.
_CG_TOLERANCE = 1e-8


class HeadBasis(NamedTuple):
    """New queries ``query`` @ q and keys ``key`` @ k, each (heads, rank, d), best directions first."""

    query: Tensor
    key: Tensor

    def first(self, rank: int) -> HeadBasis:
        """Return the leading ``rank`` directions."""
        return HeadBasis(self.query[:, :rank], self.key[:, :rank])


def query_key_bases(query_gram: Tensor, key_gram: Tensor) -> HeadBasis:
    """Return bases whose leading r directions keep the scores best, for queries and keys of different images.

    With G = RᵀR for each Gram and R_q R_kᵀ = U Σ Vᵀ, queries are multiplied by Σ^{-½} Vᵀ R_k and keys by Σ^{-½} Uᵀ R_q;
    dropping the directions past r costs Σ_{j>r} σ_j². Keys are centred over tokens, because softmax ignores their mean.

    Args:
        query_gram: (heads, d, d), Σ q qᵀ.
        key_gram: (heads, d, d), Σ (k − k̄)(k − k̄)ᵀ.

    Returns:
        All d directions; those without a singular value are zero.
    """
    query_root, key_root = square_root(query_gram), square_root(key_gram)
    left, values, right = torch.linalg.svd(query_root @ key_root.mT)
    kept = values > RANK_TOLERANCE * values[..., :1]
    scale = torch.where(kept, values, 1).rsqrt() * kept
    return HeadBasis(scale[..., None] * (right @ key_root), scale[..., None] * (left.mT @ query_root))


def score_errors(basis: HeadBasis, query_grams: Tensor, key_grams: Tensor) -> Tensor:
    """Return the error of the centred scores when the first r directions stay, for every r from 0 to d.

    Σ over images of ‖Q Kᵀ − Q (A_rᵀ B_r) Kᵀ‖², over the sum of ‖Q Kᵀ‖². The basis is complete.

    Args:
        basis: all directions.
        query_grams: of single images, (images, heads, d, d).
        key_grams: the same for centred keys.

    Returns:
        (heads, d + 1); [:, 0] is 1 where all scores lie within the basis.
    """
    queries, keys = _Stack(query_grams), _Stack(key_grams)
    pairs = (queries.turned(basis.query) * keys.turned(basis.key)).sum(1)
    # The directions from r on contribute the sum of the trailing block.
    blocks = pairs.flip(-1, -2).cumsum(-1).cumsum(-2).flip(-1, -2).diagonal(dim1=-2, dim2=-1).clamp_min(0)
    total = (query_grams * key_grams).sum((0, -2, -1))
    errors = torch.cat([blocks, torch.zeros_like(blocks[:, :1])], 1)
    return errors / torch.where(total > 0, total, 1)[:, None]


def improve(basis: HeadBasis, query_grams: Tensor, key_grams: Tensor) -> HeadBasis:
    """Lower the error on single images by alternating least squares, as far as held-out images agree.

    The error Σ_b tr(Δ G_q,b Δᵀ G_k,b) of AᵀB = I + Δ is quadratic in either factor. Half of the images are fitted by
    one sweep, and a head gets a new basis only if the error on the other half fell; then all are fitted, by two.

    Args:
        basis: r directions, the start.
        query_grams: of single images, (images, heads, d, d).
        key_grams: the same for centred keys.
    """
    if len(query_grams) < 2:
        return basis
    even = _Stack(query_grams[0::2]), _Stack(key_grams[0::2])
    odd = _Stack(query_grams[1::2]), _Stack(key_grams[1::2])
    trial = _alternate(basis, *even, sweeps=1)
    better = _missed(trial, *odd) < _missed(basis, *odd)
    if not bool(better.any()):
        return basis
    fitted = _alternate(basis, _Stack(query_grams), _Stack(key_grams), sweeps=SWEEPS)
    chosen = better[:, None, None]
    return HeadBasis(torch.where(chosen, fitted.query, basis.query), torch.where(chosen, fitted.key, basis.key))


class Normed(NamedTuple):
    """Queries or keys after a norm over their channels: gain ∘ n + shift, where ‖n‖² = d up to the norm's eps.

    ``second`` (heads, d, d) is the second moment, up to a factor, of the vectors that the norm divides, after it has
    subtracted their mean over channels if it does; ``gain`` and ``shift`` are (heads, d).
    """

    second: Tensor
    gain: Tensor
    shift: Tensor


class NormedHeads(NamedTuple):
    """New queries ``query`` @ q and keys ``key`` @ k, (heads, rank, d), before RMS norms over the rank channels.

    Both norms have the scale ``gain``, the queries' norm also has the shift ``shift``, (heads, rank).
    """

    query: Tensor
    key: Tensor
    gain: Tensor
    shift: Tensor


def behind_norms(basis: HeadBasis, query: Normed, key: Normed) -> NormedHeads:
    """Rotate queries and keys before their norms so that the scores after the norms are those of ``basis``.

    A norm over fewer channels divides by another length. The length of the whole vector x is estimated from the kept
    part z: E‖x‖² given z is taken as zᵀ S z, with S = LᵀL for the regression x ≈ L z, plus its residual, spread over
    the kept directions. Any rotation O S^½ z with orthogonal O has that length. The singular vectors of S_q^-½ S_k^-½ =
    O_qᵀ D O_k define the rotations of both sides for which only a diagonal remains between queries and keys; the norms'
    scales hold it. With all directions kept, the function is the dense one.

    Args:
        basis: bases of the norms' outputs.
        query: the norm of the queries.
        key: the norm of the keys, whose shift softmax ignores.
    """
    _, rank, size = basis.query.shape
    parts = []
    for turn, side in ((basis.query, query), (basis.key, key)):
        seen = turn * side.gain[:, None]
        moment = seen @ side.second @ seen.mT
        inverse = torch.linalg.pinv(moment, rtol=RANK_TOLERANCE, hermitian=True)
        regression = side.second @ seen.mT @ inverse
        missing = (_trace(side.second) - _trace(regression @ moment @ regression.mT)).clamp_min(0)
        form = regression.mT @ regression + (missing / rank)[:, None, None] * inverse
        values, vectors = torch.linalg.eigh(form)
        kept = values > RANK_TOLERANCE * values[:, -1:]
        roots = torch.where(kept, values, 0).sqrt()[:, None]
        inverse_roots = (torch.where(kept, values, 1).rsqrt() * kept)[:, None]
        parts.append((seen, (vectors * roots) @ vectors.mT, (vectors * inverse_roots) @ vectors.mT))
    (queries, query_root, query_inverse), (keys, key_root, key_inverse) = parts
    left, values, right = torch.linalg.svd(query_inverse @ key_inverse)
    scale = (size / rank) ** 0.5
    gain = scale * values.sqrt()
    shift = scale * (right @ key_inverse @ basis.query @ query.shift[..., None])[..., 0]
    living = gain > RANK_TOLERANCE * gain[:, :1]
    shift = torch.where(living, shift / torch.where(living, gain, 1), 0)
    return NormedHeads(left.mT @ query_root @ queries, right @ key_root @ keys, gain, shift)


def length_errors(basis: HeadBasis, query: Normed, key: Normed) -> Tensor:
    """Return the share of the squared scores that `behind_norms` is expected to miss, for every rank r.

    A share m of the squared length lies in the d - r removed directions, and the kept ones do not tell its value for a
    single token. Its error is m² (1 / (d - r) + 1 / r) / 2 for each side if everything were normally distributed, and
    more where tokens differ more.

    Args:
        basis: all directions.
        query: the norm of the queries.
        key: that of the keys.

    Returns:
        (heads, d + 1), zeros at both ends.
    """
    heads, _, size = basis.query.shape
    missed = basis.query.new_zeros(heads, size + 1)
    rank = torch.arange(1, size, dtype=missed.dtype)
    for turn, side in ((basis.query, query), (basis.key, key)):
        root = square_root(side.second)
        directions, factor = torch.linalg.qr(root @ (turn * side.gain[:, None]).mT)
        sizes = factor.diagonal(dim1=-2, dim2=-1).abs()
        known = (root.mT @ directions).square().sum(-2) * (sizes > RANK_TOLERANCE * sizes.amax(-1, keepdim=True))
        whole = _trace(side.second)[:, None]
        left = 1 - known.cumsum(-1)[:, :-1] / torch.where(whole > 0, whole, 1)
        missed[:, 1:-1] += left.clamp_min(0).square() * (1 / (size - rank) + 1 / rank) / 2
    return missed


def _trace(matrices: Tensor) -> Tensor:
    found: Tensor = matrices.diagonal(dim1=-2, dim2=-1).sum(-1)
    return found


class _Stack:
    """Symmetric matrices G_b of single images, (images, heads, d, d), stacked for each head.

    A product with one matrix is then a few large products, much faster than many small ones.
    """

    def __init__(self, grams: Tensor) -> None:
        self.images, self.heads, self.size, _ = grams.shape
        self.rows = grams.transpose(0, 1).reshape(self.heads, self.images * self.size, self.size)

    @property
    def mean(self) -> Tensor:
        return self.rows.view(self.heads, self.images, self.size, self.size).mean(1)

    def times(self, x: Tensor) -> Tensor:
        """Return G_b X for each image, (heads, images, d, n), for one X (heads, d, n)."""
        return (self.rows @ x).view(self.heads, self.images, self.size, -1)

    def turned(self, x: Tensor) -> Tensor:
        """Return X G_b Xᵀ, (heads, images, n, n), for one X (heads, n, d)."""
        left = self.times(x.mT).transpose(2, 3).reshape(self.heads, -1, self.size)
        return (left @ x.mT).view(self.heads, self.images, x.shape[1], x.shape[1])


def _alternate(basis: HeadBasis, queries: _Stack, keys: _Stack, sweeps: int) -> HeadBasis:
    query, key = basis
    for _ in range(sweeps):
        query = _least_squares(query, key, queries, keys)
        key = _least_squares(key, query, keys, queries)
    return HeadBasis(query, key)


def _least_squares(start: Tensor, other: Tensor, own: _Stack, others: _Stack) -> Tensor:
    """Find X with least Σ_b ‖…‖² for a fixed other side, Σ_b G_b Xᵀ M_b = Σ_b G_b G'_b Yᵀ, by conjugate gradients."""
    inner = others.turned(other)
    right = own.rows.mT @ (others.rows @ other.mT)
    outer_mean, inner_mean = pseudo_inverse(own.mean), pseudo_inverse(inner.mean(1))
    inner = inner.flatten(1, 2)

    def normal(x: Tensor) -> Tensor:
        return own.times(x).transpose(1, 2).reshape(own.heads, own.size, -1) @ inner

    def precondition(x: Tensor) -> Tensor:
        return outer_mean @ x @ inner_mean

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum((-2, -1), keepdim=True)

    x = start.mT
    residual = right - normal(x)
    step = precondition(residual)
    size = dot(residual, step)
    enough = _CG_TOLERANCE * dot(right, precondition(right))
    for _ in range(_CG_STEPS):
        if not bool((size > enough).any()):
            break
        image = normal(step)
        curvature = dot(step, image)
        # A head that has converged stays as it is.
        length = torch.where(curvature > 0, size / torch.where(curvature > 0, curvature, 1), 0)
        x = x + length * step
        residual = residual - length * image
        conditioned = precondition(residual)
        following = dot(residual, conditioned)
        step = conditioned + torch.where(size > 0, following / torch.where(size > 0, size, 1), 0) * step
        size = following
    return x.mT


def _error(basis: HeadBasis, query_grams: Tensor, key_grams: Tensor) -> Tensor:
    return _missed(basis, _Stack(query_grams), _Stack(key_grams))


def _missed(basis: HeadBasis, queries: _Stack, keys: _Stack) -> Tensor:
    missing = torch.eye(queries.size, dtype=basis.query.dtype) - basis.query.mT @ basis.key
    error: Tensor = (queries.times(missing) * keys.times(missing.mT).mT).sum((1, 2, 3))
    return error


def pseudo_inverse(matrix: Tensor) -> Tensor:
    found: Tensor = torch.linalg.pinv(matrix, rtol=1e-8, hermitian=True)
    return found
