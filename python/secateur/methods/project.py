"""Score-preserving projection: the best rank of every head and of the residual stream, not the best subset of neurons.

Each head's queries and keys, its values, and the residual stream are turned to the basis in which the cut costs least,
and what reads them is refitted by least squares over the calibration rows; the function of the dense model is the same
in every basis. Queries and keys behind norms of their own are turned in front of these. Where no change of basis is
allowed (a norm or gate between values and projection; FFN hidden units behind their activation; query/key norms without
a scale, or of a block that normalises what it adds) original neurons are selected and refitted, as the method "refit"
does.

The residual stream's rotation is that of SliceGPT (Ashkboos et al., ICLR 2024, arXiv:2401.15024), made label-free for
vision transformers' norms of any eps and kept in timm's own norm classes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ..anatomy.anatomy import Anatomy
from ..anatomy.groups import Group, Indices
from ..anatomy.layers import AttentionSite, Stream
from ..errors import InvalidArgument, Unsupported
from ..statistics.statistics import Float, Statistics
from .linalg.bases import (
    HeadBasis,
    NormedHeads,
    behind_norms,
    improve,
    length_errors,
    query_key_bases,
    residual_basis,
    score_errors,
    stock_basis,
    value_bases,
    value_errors,
)
from .linalg.regression import Moment, choose_ridge, ridged_cholesky, sketch, solve
from .refit import HEAD_SCORES, Moments, Refit
from .weights import Draft

NAME = "project"
OPTIONS: Mapping[str, tuple[str, ...]] = {"head_score": HEAD_SCORES}


def prepare(model: nn.Module, anatomy: Anatomy, statistics: Statistics, options: Mapping[str, str]) -> Projection:
    """Bind the method to a model.

    Raises:
        InvalidArgument: statistics without moments.
    """
    return Projection(model, anatomy, statistics, "greedy", options["head_score"])


class Projection(Refit):
    """The method bound to a model and its statistics."""

    def _errors(self, group: Group) -> Float | None:
        if group.kind == "width":
            return self._width_errors()
        return super()._errors(group)

    # Queries and keys

    def _turns(self, site: AttentionSite) -> bool:
        """Can queries and keys be turned? Behind norms, if it is known what enters these."""
        return (site.q_norm is None and site.k_norm is None) or self._normed(site) is not None

    def _score_errors(self, site: AttentionSite) -> Float | None:
        if not self._turns(site):
            return super()._score_errors(site)
        basis, normed = self._basis(site), self._normed(site)
        errors = score_errors(basis, *self._image_grams(site)).mean(0)
        if normed is not None:
            errors = errors + length_errors(basis, *normed).mean(0)
        found: Float = np.minimum.accumulate(np.clip(errors.numpy(), 0.0, 1.0))
        return found

    def _basis(self, site: AttentionSite) -> HeadBasis:
        grams = (self._statistics.gram(site.qk, "query_gram"), self._statistics.gram(site.qk, "key_gram"))
        return query_key_bases(*map(torch.from_numpy, grams))

    def _image_grams(self, site: AttentionSite) -> tuple[Tensor, Tensor]:
        query, key = self._statistics.image_grams(site.qk)
        return torch.from_numpy(query), torch.from_numpy(key)

    def _queries_and_keys(self, draft: Draft, site: AttentionSite, count: int) -> Indices:
        if not self._turns(site):
            return super()._queries_and_keys(draft, site, count)
        basis, normed = improve(self._basis(site).first(count), *self._image_grams(site)), self._normed(site)
        query, key = basis
        if normed is not None:
            heads = behind_norms(basis, *normed)
            query, key = heads.query, heads.key
            self._set_norms(draft, site, heads)
            if site.qk_normed == "layer":
                # The mean over the old channels leaves through the weights, and the new norm takes none off.
                query, key = (turn - turn.mean(-1, keepdim=True) for turn in (query, key))
        span = site.heads * site.qk_dim
        weight, bias = draft.weight(site.qkv).clone(), draft.bias(site.qkv).clone()
        for part, turn in ((slice(0, span), query), (slice(span, 2 * span), key)):
            weight[part] = _turned(turn, weight[part], site.heads)
            bias[part] = _turned(turn, bias[part, None], site.heads)[:, 0]
        if normed is None:
            # Softmax does not see what the keys' bias adds to a row of scores; a norm sees it.
            bias[span : 2 * span] = 0
        draft.set(site.qkv, weight)
        draft.set(site.qkv, bias, "bias")
        return _leading(site.heads, count)

    def _set_norms(self, draft: Draft, site: AttentionSite, heads: NormedHeads) -> None:
        rank = heads.gain.shape[1]
        for name, shift in ((site.q_norm, heads.shift), (site.k_norm, torch.zeros_like(heads.shift))):
            assert name is not None
            for value, parameter in ((heads.gain, "weight"), (shift, "bias")):
                draft.set_per_head(name, F.pad(value, [0, site.qk_dim - rank]), parameter)
            draft.eps[name] = float(getattr(self._model.get_submodule(name), "eps")) * site.qk_dim / rank  # noqa: B009
            if site.qk_normed == "layer":
                draft.uncentred.append(name)

    # Values

    def _value_errors(self, site: AttentionSite) -> Float | None:
        if site.between is not None:
            return super()._value_errors(site)
        weight, moments = self._writer_metric(site.proj, site.scale), Moments(self._statistics, site.proj)
        errors = value_errors(weight, moments.covariance, site.heads)
        found: Float = np.clip(errors.numpy(), 0.0, 1.0)
        return found

    def _values(self, draft: Draft, site: AttentionSite, count: int, heads: Tensor) -> Indices:
        if site.between is not None:
            return super()._values(draft, site, count, heads)
        moments = Moments(self._statistics, site.proj)
        metric = self._writer_metric(site.proj, site.scale)
        basis = value_bases(metric, moments.covariance, site.heads, count, heads.tolist())
        weight = draft.weight(site.proj)
        # What is lost without a refit, W − W T⁺ T, is regressed on what is kept.
        own = weight.unflatten(1, (site.heads, site.v_dim))[:, heads].flatten(1)
        turned = _blocks(basis, heads, site.heads)
        plain = own @ torch.block_diag(*torch.linalg.pinv(turned[heads], rtol=1e-12))
        lost = (weight - plain @ basis).mT
        few = sketch(lost)

        def moment(covariance: Tensor, wanted: Tensor) -> Moment:
            seen = basis @ covariance
            return Moment(seen @ basis.mT, seen @ wanted)

        ridge = choose_ridge([moment(fold, few) for fold in moments.folds])
        refitted = plain + solve(moment(moments.covariance, lost), ridge).mT
        rows = slice(2 * site.heads * site.qk_dim, None)
        qkv_weight, qkv_bias = draft.weight(site.qkv).clone(), draft.bias(site.qkv).clone()
        # Rows of the attention map sum to one, so the values' bias passes through it.
        bias = draft.bias(site.proj) + weight @ moments.mean - refitted @ basis @ (moments.mean - qkv_bias[rows])
        qkv_weight[rows] = _turned(turned, qkv_weight[rows], site.heads)
        qkv_bias[rows] = 0
        columns = torch.zeros_like(weight).unflatten(1, (site.heads, site.v_dim))
        columns[:, heads, :count] = refitted.unflatten(1, (len(heads), count))
        draft.set(site.qkv, qkv_weight)
        draft.set(site.qkv, qkv_bias, "bias")
        draft.set(site.proj, columns.flatten(1))
        draft.set(site.proj, bias, "bias")
        return _leading(site.heads, count)

    # Residual width

    def _stream(self) -> Stream:
        stream = self._anatomy.stream
        if isinstance(stream, str):
            raise Unsupported(f"width: expected a residual stream that can be turned, got one that cannot ({stream})")
        return stream

    def _norm_moments(self, gone: Collection[str] = ()) -> dict[str, Moments]:
        """Of the norms that stay when the layers ``gone`` do not."""
        staying = [name for name in self._stream().readers if self._anatomy.layer_holding(name) not in gone]
        return {name: Moments(self._statistics, name) for name in staying}

    def _width_errors(self) -> Float:
        size = self._anatomy.sizes["width"]
        moments = self._norm_moments()
        basis = residual_basis([found.second for found in moments.values()])
        centred = int(self._stream().centred)
        lost = np.zeros(size + 1)
        for found in moments.values():
            lost[centred:] += _unexplained(basis.mT @ found.covariance @ basis).numpy()[: size + 1 - centred]
        lost /= size * len(moments)
        lost[: 1 + centred] = 1.0
        lost[-1] = 0.0
        return np.minimum.accumulate(np.clip(lost, 0.0, 1.0))

    def _width(self, draft: Draft, count: int, gone: Collection[str]) -> Indices:
        stream = self._stream()
        size = self._anatomy.sizes["width"]
        moments = self._norm_moments(gone)
        # One channel of a LayerNorm is its mean: it holds one direction less than it has channels.
        rank = count - 1 if stream.centred else count
        if rank < 1:
            raise InvalidArgument("width: expected at least 2 channels of a model of LayerNorms, got 1")
        basis = residual_basis([found.second for found in moments.values()])[:, :rank]
        channels = stock_basis(count) if stream.centred else torch.eye(count, dtype=torch.float64)
        write = channels @ (basis - basis.mean(0) if stream.centred else basis).mT
        for module, scale in stream.writers.items():
            self._turn_writer(draft, module, scale, write)
        for token in stream.tokens:
            draft.set("", F.pad(draft.weight("", token) @ write.mT, [0, size - count]), token)
        near = self._last_ridge
        for norm, readers in stream.readers.items():
            if norm not in moments:
                continue
            matrix, offset, near = _readout(moments[norm], basis, count, near)
            self._turn_readers(draft, norm, readers, matrix @ channels.mT, offset)
            draft.eps[norm] = float(getattr(self._model.get_submodule(norm), "eps")) * size / count  # noqa: B009
        return _leading(1, count)

    def _turn_writer(self, draft: Draft, module: str, scale: str | None, write: Tensor) -> None:
        factor = draft.scale(scale)
        weight, bias = draft.weight(module), draft.bias(module)
        scaled = write * factor
        leaving = len(weight) - len(write)
        draft.set(module, F.pad(scaled @ weight.flatten(1), [0, 0, 0, leaving]).reshape(weight.shape))
        draft.set(module, F.pad(scaled @ bias, [0, leaving]), "bias")
        if scale is not None:
            draft.set(scale, torch.ones_like(draft.weight(scale, "gamma")), "gamma")

    def _turn_readers(self, draft: Draft, norm: str, readers: tuple[str, ...], read: Tensor, offset: Tensor) -> None:
        """Fold the norm's scale and shift and the change of basis into the layers behind it."""
        module = self._model.get_submodule(norm)
        size = len(offset)
        gain, shift = draft.affine(norm, size)
        for reader in readers:
            matrix = draft.weight(reader)
            draft.set(reader, draft.bias(reader) + matrix @ (shift + gain * offset), "bias")
            draft.set(reader, F.pad(matrix @ (gain[:, None] * read), [0, size - read.shape[1]]))
        if getattr(module, "weight", None) is not None:
            draft.set(norm, torch.ones_like(gain))
        if getattr(module, "bias", None) is not None:
            draft.set(norm, torch.zeros_like(shift), "bias")


def _readout(moments: Moments, basis: Tensor, count: int, near: float) -> tuple[Tensor, Tensor, float]:
    """The dense norm's output x̂ from the pruned one's in the kept basis, φ: x̂ ≈ matrix @ φ + offset; and the ridge.

    φ has ``count`` channels of mean square one where x̂ has D: φ = Qᵀx̂ / ρ, ρ² = E‖Qᵀx̂‖² / count. What lies outside of
    the basis is regressed on what lies within.
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


def _unexplained(covariance: Tensor) -> Tensor:
    """Variance of all inputs that the first r do not explain, for every r from 0 to their number.

    With C = L Lᵀ, what is left of C after regression on the first r is the product of L's trailing block with itself.
    """
    # Sums of float32 activations: what lies below 1e-7 of the largest is rounding, of either sign.
    factor, _ = ridged_cholesky(covariance, 1e-7 * float(covariance.diagonal().max()) + 1e-30)
    columns = factor.square().sum(0)
    return torch.cat([columns.flip(0).cumsum(0).flip(0), columns.new_zeros(1)])


def _turned(turn: Tensor, rows: Tensor, heads: int) -> Tensor:
    """Each head's rows (heads · d, n) times its (rank, d); the rows past the rank are zero."""
    parts = rows.unflatten(0, (heads, -1))
    turned = torch.zeros_like(parts)
    turned[:, : turn.shape[1]] = turn @ parts
    return turned.flatten(0, 1)


def _blocks(matrix: Tensor, staying: Tensor, heads: int) -> Tensor:
    """The diagonal blocks of (staying heads · r, heads · d), as (heads, r, d); zeros for heads that leave."""
    parts = matrix.unflatten(0, (len(staying), -1)).unflatten(2, (heads, -1))
    found = matrix.new_zeros(heads, parts.shape[1], parts.shape[3])
    for index, head in enumerate(staying.tolist()):
        found[head] = parts[index, :, head]
    return found


def _leading(heads: int, count: int) -> Indices:
    return np.tile(np.arange(count, dtype=np.int64), (heads, 1))
