"""What stands in a block where an attention or FFN layer was removed, and how the block goes past it."""

# No `from __future__ import annotations` here: torch.jit.script reads the annotations as objects.

from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import nn

__all__ = ["Absent", "go_past", "is_absent", "is_traced", "watched"]


class Absent(nn.Module):
    """An attention or FFN layer that was removed: it has no parameters, and adds nothing to the residual stream.

    It is called like the layer that it replaces, so that loops over layers and residual connections written elsewhere,
    such as ``x + block.attn(block.norm1(x))``, remain right. A block goes past it without calling it, unless it is
    watched.
    """

    absent: Final[bool] = True

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:  # noqa: ARG002
        """Return zeros of the shape of x, (B, N, C) or (B, H, W, C)."""
        return zeros_after(x)


@torch.fx.wrap
def zeros_after(x: torch.Tensor) -> torch.Tensor:
    """Return zeros of the same shape, which a gradient reaches: whoever watches them (as Grad-CAM does) expects one."""
    return torch.zeros_like(x) + x[..., :0].sum(-1, keepdim=True)


def is_absent(layer: object) -> bool:
    """Return whether a layer was removed."""
    return isinstance(layer, Absent)


def is_traced(x: object) -> bool:
    """Return whether torch.fx runs the code with a symbol for x: every module's output may be asked for later."""
    return isinstance(x, torch.fx.Proxy)


def watched(modules: Iterable[nn.Module]) -> bool:
    """Return whether any of the modules has hooks."""
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules)


def go_past(block: Any, x: torch.Tensor, layer: str) -> torch.Tensor:
    """Return x after a removed layer of the block, "attn" or "mlp": the same.

    Its norm, an identity by now, passes x on. Layer, scale and dropped paths are run if they have hooks; if the block
    is traced or compiled, without their result being used, so that it costs nothing unless it is asked for.
    """
    number = 1 if layer == "attn" else 2
    norm: nn.Module = getattr(block, f"norm{number}")
    names = (layer, f"ls{number}", f"drop_path{number}")
    branch: list[nn.Module] = [getattr(block, name) for name in names if hasattr(block, name)]
    shown = torch.compiler.is_compiling() or is_traced(x)
    if not shown:
        x = norm(x)
        return x + _through(branch, x) if watched(branch) else x
    # The norm last, because tools take the last tensor in a block for what it returns.
    _through(branch, x)
    passed: torch.Tensor = norm(x)
    return passed


def _through(modules: Iterable[nn.Module], x: torch.Tensor) -> torch.Tensor:
    for module in modules:
        x = module(x)
    return x
