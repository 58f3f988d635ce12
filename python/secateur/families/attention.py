"""Fused attention for heads of any sizes."""

# No `from __future__ import annotations` here: torch.jit.script reads the annotations as objects.

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812

__all__ = ["attend_padded", "plain_attention"]


def _copied(x: torch.Tensor, zeros: int) -> torch.Tensor:
    """Return (..., d) in new memory, with zeros after the last channel: (..., d + zeros)."""
    return F.pad(x, [0, zeros]) if zeros > 0 else x.clone(memory_format=torch.contiguous_format)


# torch.fx calls this as it is: what it does depends on the device and type with which the traced model runs.
@torch.fx.wrap
def pad_to_one_size(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, qk_dim: int, v_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Return q, k and v with zeros after their last channel, in one size that fused kernels take, and that size."""
    # Fused kernels need one size for q, k and v; padding with zeros changes neither scores nor values.
    size = max(qk_dim, v_dim)
    step = 16 // v.element_size()
    if v.is_cuda and (qk_dim % step != 0 or v_dim % step != 0):
        # CUDA's kernels read 16 bytes at a time, even from unaligned rows (pytorch/pytorch#183484), so copy.
        size = (size + step - 1) // step * step
        q, k = _copied(q, size - qk_dim), _copied(k, size - qk_dim)
        v = _copied(v, size - v_dim)
    elif qk_dim < v_dim:
        q, k = F.pad(q, [0, size - qk_dim]), F.pad(k, [0, size - qk_dim])
    elif v_dim < qk_dim:
        v = F.pad(v, [0, size - v_dim])
    return q, k, v, size


@torch.fx.wrap
def cut_padding(y: torch.Tensor, v_dim: int, size: int) -> torch.Tensor:
    """Return the first v_dim of ``size`` channels."""
    return y[..., :v_dim] if v_dim < size else y


def attend_padded(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qk_dim: int,
    v_dim: int,
    attn_mask: torch.Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float,
) -> torch.Tensor:
    """Attend with torch's fused kernel, whatever the sizes of heads are.

    Args:
        q: (B, heads, L, qk_dim).
        k: (B, heads, N, qk_dim).
        v: (B, heads, N, v_dim).
        qk_dim: query/key channels per head; a number, since torch.fx knows no shapes.
        v_dim: value channels per head.
        attn_mask: as for torch's kernel.
        dropout: rate of dropped attention weights.
        is_causal: as for torch's kernel.
        scale: multiplies the scores.

    Returns:
        (B, L, heads, v_dim).
    """
    q, k, v, size = pad_to_one_size(q, k, v, qk_dim, v_dim)
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal, scale=scale
    ).transpose(1, 2)
    # After the transpose, so that gradients have the same strides as without padding: torch keeps cuDNN's
    # plans for the first gradients of a shape and misreads others (since pytorch/pytorch#141147).
    return cut_padding(y, v_dim, size)


@contextmanager
def plain_attention(model: torch.nn.Module) -> Iterator[None]:
    """Let the attention of all of timm's and secateur's modules be two products and a softmax while the block runs."""
    found: list[Any] = [module for module in model.modules() if getattr(module, "fused_attn", None) is True]
    try:
        for module in found:
            module.fused_attn = False
        yield
    finally:
        for module in found:
            module.fused_attn = True
