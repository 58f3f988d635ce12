"""Fewer tokens: attention for some queries or over merged tokens, and the merging itself."""

# No `from __future__ import annotations` here: torch.jit.script reads the annotations as objects.

from typing import TYPE_CHECKING, Any

import torch
from timm.layers import maybe_add_mask, resolve_self_attn_mask
from torch import nn
from torch.nn import functional as F  # noqa: N812

from ..attention import attend_padded

# torch.fx calls these as they are: what they do depends on what is given when the traced model runs.
torch.fx.wrap("maybe_add_mask")
torch.fx.wrap("resolve_self_attn_mask")


def fused_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qk_dim: int,
    v_dim: int,
    attn_mask: torch.Tensor | None,
    log_size: torch.Tensor | None,
    dropout: float,
    scale: float,
) -> torch.Tensor:
    """As ``attend_padded``, with ``log_size``, (B, N), added to the scores of each key unless it is None."""
    if log_size is not None:
        if q.is_cpu:
            # This kernel reads one row for all heads and queries, without a copy of q, k or v.
            attn_mask = log_size[:, None, None].to(q.dtype)
        else:
            # Other kernels would take a mask of all scores, or none: as one more channel of keys.
            q = F.pad(q, [0, 1], value=1 / scale)
            k = torch.cat([k, log_size[:, None, :, None].expand(-1, k.size(1), -1, -1).to(k.dtype)], -1)
            qk_dim += 1
    return attend_padded(q, k, v, qk_dim, v_dim, attn_mask, dropout, False, scale)


@torch.fx.wrap
def mask_of_first(attn_mask: torch.Tensor | None, queries: int) -> torch.Tensor | None:
    """Return the mask, (…, N, N) or (…, 1, N), for the first queries alone."""
    return attn_mask if attn_mask is None or attn_mask.size(-2) == 1 else attn_mask[..., :queries, :]


def is_plain_linear(layer: nn.Module) -> bool:
    """Return whether a linear layer is computed by its weight alone: neither replaced, adapted nor quantized."""
    return type(layer) is nn.Linear and not hasattr(layer.weight, "__tensor_flatten__")


class Attends(nn.Module):
    """A block that runs its attention, of timm's class or secateur's, for some queries or over merged tokens."""

    if TYPE_CHECKING:  # torch.jit.script would read this as an attribute's type
        attn: Any

    def attend(
        self,
        x: torch.Tensor,
        queries: int,
        attn_mask: torch.Tensor | None = None,
        log_size: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the attention's output for the first tokens.

        Args:
            x: the attention's input, (B, N, C).
            queries: how many tokens the output is for; 0 is all.
            attn_mask: for all queries, as in timm's ``Attention``.
            log_size: (B, N), the logarithm of how many tokens each has become; None if no token was merged.

        Returns:
            (B, queries, C).
        """
        attn = self.attn
        B, N, _ = x.shape  # noqa: N806
        heads, qk_dim, v_dim = attn.num_heads, attn.head_dim, attn.attn_dim // attn.num_heads
        qk_all, v_all = heads * qk_dim, attn.attn_dim
        first = x
        plain = True
        if queries > 0:
            first = x[:, :queries]
            attn_mask = mask_of_first(attn_mask, queries)
            if not torch.jit.is_scripting():  # type: ignore[attr-defined]
                plain = is_plain_linear(attn.qkv)
        if queries > 0 and plain:
            weight, bias = attn.qkv.weight, attn.qkv.bias
            if bias is None:
                q = F.linear(first, weight[:qk_all])
                k, v = F.linear(x, weight[qk_all:]).split([qk_all, v_all], dim=-1)
            else:
                q = F.linear(first, weight[:qk_all], bias[:qk_all])
                k, v = F.linear(x, weight[qk_all:], bias[qk_all:]).split([qk_all, v_all], dim=-1)
        else:
            q, k, v = attn.qkv(x).split([qk_all, qk_all, v_all], dim=-1)
            if queries > 0:
                q = q[:, :queries]
        L = first.size(1)  # noqa: N806
        q = attn.q_norm(q.reshape(B, L, heads, qk_dim).transpose(1, 2))
        k = attn.k_norm(k.reshape(B, N, heads, qk_dim).transpose(1, 2))
        v = v.reshape(B, N, heads, v_dim).transpose(1, 2)
        if attn.fused_attn:
            dropout = attn.attn_drop.p if attn.training else 0.0
            y = fused_attention(q, k, v, qk_dim, v_dim, attn_mask, log_size, dropout, attn.scale)
        else:
            scores = (q * attn.scale) @ k.transpose(-2, -1)
            if log_size is not None:
                scores = scores + log_size[:, None, None].to(scores.dtype)
            scores = maybe_add_mask(scores, resolve_self_attn_mask(N, scores, attn_mask, False))
            y = (attn.attn_drop(scores.softmax(dim=-1)) @ v).transpose(1, 2)
        y = attn.norm(y.reshape(B, L, v_all))
        if attn.gate is not None:
            y = y * attn.gate(first).sigmoid()
        out: torch.Tensor = attn.proj_drop(attn.proj(y))
        return out


def _rows_at(place: torch.Tensor, stays: torch.Tensor, count: int) -> torch.Tensor:
    """Return the rows that stay, (count,), from where they go, by operations that ONNX has."""
    # Rows that do not stay write after the end.
    place = torch.where(stays, place, count)
    rows = torch.arange(place.size(0), device=place.device)
    return torch.zeros(count + 1, dtype=rows.dtype, device=rows.device).scatter(0, place, rows)[:count]


@torch.fx.wrap
def merge_tokens(
    x: torch.Tensor, size: torch.Tensor | None, features: torch.Tensor, merged: int, prefix: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the even patch tokens that are most like an odd one into it (Bolya et al., ToMe, ICLR 2023).

    ToMe compares keys by their cosine. Here tokens are compared by ``features``, and large ones merge later: the
    distance of two tokens of s and t patches, 1 - cosine, counts √(s t / (s + t)) times. (Ward's criterion, J. Am.
    Stat. Assoc. 1963, has no root.) Tokens that stay keep their order, so that neighbours in the image are compared
    again.

    Args:
        x: (B, N, C), of which the first ``prefix`` tokens stay as they are.
        size: (B, N), how many tokens each has become; None for 1 each.
        features: (B, N, d).
        merged: how many tokens to merge; at most half of the patch tokens are.
        prefix: number of tokens before the patches.

    Returns:
        The means, weighted by size, (B, N - merged, C), and their sizes, (B, N - merged).
    """
    B, N, C = x.shape  # noqa: N806
    half = (N - prefix) // 2
    precise = torch.promote_types(x.dtype, torch.float32)
    merged = min(merged, half)
    if merged <= 0:
        return x, x.new_ones(B, N, dtype=precise) if size is None else size
    left = N - merged
    with torch.no_grad():
        # Few operations: with one image, each costs as much as what it computes.
        metric = F.normalize(features[:, prefix:].to(precise), dim=-1)
        likeness = torch.bmm(metric[:, ::2], metric[:, 1::2].transpose(1, 2))
        if size is not None:
            inverse = size[:, prefix:].reciprocal()
            likeness = (likeness - 1) * (inverse[:, ::2, None] + inverse[:, None, 1::2]).rsqrt()
        best, partner = likeness.max(-1)
        chosen = best.topk(merged, dim=1, sorted=False)[1]
        # Rows of all images one after the other.
        even = torch.arange(prefix, B * N, N, device=x.device)[:, None]
        moves = torch.add(even, chosen, alpha=2).flatten()
        meets = torch.add(even + 1, partner.gather(1, chosen), alpha=2).flatten()
        stays = torch.ones(B * N, dtype=torch.bool, device=x.device).index_fill_(0, moves, 0)
        place = stays.cumsum(0) - 1
        target = place.index_select(0, meets)
        if torch.compiler.is_exporting():
            rows_left = _rows_at(place, stays, B * left)
        else:
            rows_left = stays.nonzero_static(size=B * left).flatten()
        sizes = x.new_ones(B * N, dtype=precise) if size is None else size.flatten()
        weight = sizes.index_select(0, moves)
        sizes = sizes.index_select(0, rows_left).index_add_(0, target, weight)
        share = (weight / sizes.index_select(0, target)).to(x.dtype)
    rows = x.reshape(B * N, C)
    # The mean is the odd token plus each one's share of the difference, so that only merged tokens are computed.
    change = (rows.index_select(0, moves) - rows.index_select(0, meets)) * share[:, None]
    rows = rows.index_select(0, rows_left).index_add_(0, target, change)
    return rows.view(B, left, C), sizes.view(B, left)
