"""MViTv2: convolutions pool queries, keys and values, which have norms of their own after it."""

# No `from __future__ import annotations` here: torch.jit.script reads the annotations as objects.

from typing import TYPE_CHECKING, Any

import torch
from timm.models import mvitv2
from torch import nn

from ...anatomy import Part
from ...errors import Unsupported
from .base import Call, register
from .forward import Resized, Sized
from .parts import Parts, fit_head_norms

__all__ = ["MultiScale"]

_LETTERS: dict[Part, str] = {"query": "q", "key": "k", "value": "v"}
_RESIDUAL = "residual_pooling adds queries to values, channel by channel: they leave with kind 'v'"


class PrunedMultiScaleAttention(Sized, mvitv2.MultiScaleAttention):
    """timm's ``MultiScaleAttention`` with heads of any sizes, whose convolutions and norms are each head's own."""

    if TYPE_CHECKING:
        has_cls_token: bool
        residual_pooling: bool
        rel_pos_type: str
        rel_pos_h: Any
        rel_pos_w: Any

    def forward(self, x: torch.Tensor, feat_size: Any) -> tuple[torch.Tensor, list[int]]:
        """Attend over (B, N, C), whose tokens are ``feat_size`` (height, width); return the size after it as well."""
        q, k, v = self.split(self.qkv(x))
        q, q_size = self.pooled(q, feat_size, self.pool_q, self.norm_q)
        k, k_size = self.pooled(k, feat_size, self.pool_k, self.norm_k)
        v, _ = self.pooled(v, feat_size, self.pool_v, self.norm_v)
        scores = (q * self.scale) @ k.transpose(-2, -1)
        if self.rel_pos_type == "spatial":
            scores = self.with_positions(scores, q, q_size, k_size)
        y = scores.softmax(dim=-1) @ v
        if self.residual_pooling:
            y = y + q
        return self.proj(y.transpose(1, 2).flatten(2)), q_size

    def pooled(self, x: torch.Tensor, size: Any, pool: Any, norm: Any) -> tuple[torch.Tensor, list[int]]:
        """Pool (B, heads, N, d) by a convolution of all heads' channels, then normalise within each head."""
        size = [int(size[0]), int(size[1])]
        if pool is not None:
            first = int(self.has_cls_token)
            # While no channel is gone, all heads share the kernels: each is then an image of its own.
            images = len(x) * (x.shape[1] if pool.in_channels == x.shape[3] else 1)
            tokens = pool(x[:, :, first:].transpose(2, 3).reshape(images, -1, size[0], size[1]))
            size = [tokens.shape[2], tokens.shape[3]]
            tokens = tokens.reshape(len(x), x.shape[1], x.shape[3], -1).transpose(2, 3)
            x = torch.cat([x[:, :, :first], tokens], dim=2)
        return x if norm is None else norm(x), size

    def with_positions(
        self, scores: torch.Tensor, q: torch.Tensor, q_size: list[int], k_size: list[int]
    ) -> torch.Tensor:
        """Add what each head's queries make of the relative positions of its own channels."""
        first = int(self.has_cls_token)
        queries = q[:, :, first:].unflatten(2, q_size)
        added = []
        for axis, table, letters in (
            (0, self.rel_pos_h, "bnyxc,nykc->bnyxk"),
            (1, self.rel_pos_w, "bnyxc,nxkc->bnyxk"),
        ):
            steps = max(k_size[axis] / q_size[axis], 1.0), max(q_size[axis] / k_size[axis], 1.0)
            of_queries = torch.arange(q_size[axis], device=q.device)[:, None] * steps[0]
            of_keys = torch.arange(k_size[axis], device=q.device)[None] * steps[1]
            places = (of_queries - of_keys + (k_size[axis] - 1) * steps[1]).long()
            by_head = table[places].unflatten(-1, (-1, self.qk_dim)).movedim(2, 0)
            added.append(torch.einsum(letters, queries, by_head.expand(self.num_heads, -1, -1, -1)))
        bias = (added[0][..., None] + added[1][..., None, :]).flatten(4, 5).flatten(2, 3)
        return scores + nn.functional.pad(bias, (first, 0, first, 0))


@register
class MultiScale(Resized):
    """MViTv2, whose heads share the kernels of their convolutions, their norms and their relative positions.

    A cut gives each head its own. Where queries are added to the values, all four parts of a channel are one unit.
    """

    name = "multi scale"
    modules = {mvitv2.MultiScaleAttention: PrunedMultiScaleAttention}

    def parts(self, module: Any, call: Call) -> Parts:
        """The rows of one linear layer, with what all heads share of a channel."""
        if module.mode != "conv":
            raise Unsupported(f"mode: expected 'conv', got {module.mode!r}")
        parts = self.new(module)
        parts.fused()
        parts.read()
        for part, letter in _LETTERS.items():
            if getattr(module, f"pool_{letter}") is not None:
                parts.own_kernels(part, f"pool_{letter}")
                parts.head_norm(part, f"norm_{letter}")
        if module.rel_pos_type == "spatial":
            parts.per_head("query", "rel_pos_h", 1)
            parts.per_head("query", "rel_pos_w", 1)
            (rows, columns), keys = self.map(module, call, "q"), self.map(module, call, "k")
            parts.products.append(("", rows * columns * sum(keys), ("heads", "qk")))
        if module.residual_pooling:
            parts.members["v"] += parts.members["qk"]
            parts.members["qk"] = []
            parts.refused["qk"] = _RESIDUAL
            parts.in_place_of["qk"] = "v"
        parts.scored = False  # what meets is behind a norm
        return parts

    def map(self, module: Any, call: Call, letter: str) -> list[int]:
        """Return the size (height, width) of a map after pooling."""
        size, pool = call.given(1, "feat_size"), getattr(module, f"pool_{letter}")
        if pool is None:
            return [int(side) for side in size]
        sides = zip(size, pool.kernel_size, pool.stride, pool.padding, strict=True)
        return [(int(side) + 2 * padding - kernel) // stride + 1 for side, kernel, stride, padding in sides]

    def keys(self, module: Any, call: Call, positions: Any) -> int:
        """All places of the pooled map, and the class token."""
        rows, columns = self.map(module, call, "k")
        return rows * columns + int(module.has_cls_token)

    def resize(self, module: Any, heads: int, qk: int, v: int) -> None:
        """Set timm's names of the sizes."""
        qk = v if module.residual_pooling else qk
        module.head_dim, module.qk_dim, module.dim_out = qk, qk, heads * v
        fit_head_norms(module, ("norm_q", "norm_k"), heads, qk)
        fit_head_norms(module, ("norm_v",), heads, v)
