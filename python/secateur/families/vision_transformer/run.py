"""Runs parts of a VisionTransformer: one layer, one block, or all blocks from one on."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import nn

from ...anatomy import LastBlock
from ...errors import Unsupported
from ..absent import is_absent
from .reduced import merges, norm_before_ffn, pooled_output, run_merging
from .tokens import Attends, merge_tokens

__all__ = ["alone", "blocks", "from_block", "layers", "merging"]


def alone(model: VisionTransformer, block: int | None) -> nn.Module:
    """Return a copy of the model with only that block, or with no block.

    Raises:
        Unsupported: the model merges tokens.
    """
    _refuse_merging(model)
    blocks = nn.Sequential(*(() if block is None else (copy.deepcopy(model.blocks[block]),)))
    # The memo makes deepcopy use these blocks and never touch the others.
    return copy.deepcopy(model, {id(model.blocks): blocks})


def layers(model: VisionTransformer, last_block: LastBlock = "whole") -> dict[str, nn.Module]:
    """Return attention and FFN layers by name, as timm's blocks run them, without dropping paths.

    If ``last_block`` is "pooled", the last block's attention returns prefix tokens alone.

    Raises:
        Unsupported: the model merges tokens.
    """
    _refuse_merging(model)
    found: dict[str, nn.Module] = {}
    block: Any
    for index, block in enumerate(model.blocks):
        post_norm = isinstance(block, ResPostBlock)
        if not is_absent(block.attn):
            attention = (block.attn, block.norm1) if post_norm else (block.norm1, block.attn, block.ls1)
            pooled = last_block == "pooled" and index == len(model.blocks) - 1
            found[f"blocks.{index}.attn"] = (
                _ForPrefix(block, model.num_prefix_tokens) if pooled else _Residual(*attention)
            )
        if not is_absent(block.mlp):
            ffn = (block.mlp, block.norm2) if post_norm else (block.norm2, block.mlp, block.ls2)
            found[f"blocks.{index}.mlp"] = _Residual(*ffn)
    return found


def merging(model: VisionTransformer, block: int) -> nn.Module:
    """Return what merges a tenth of the tokens in a block."""
    return _Merging(norm_before_ffn(model.blocks[block]) or nn.Identity(), model.num_prefix_tokens)


def blocks(model: VisionTransformer) -> list[nn.Module]:
    """Return the blocks, first to last; none if tokens merge, since those that enter a block have sizes then."""
    return [] if any(merges(model)) else list(model.blocks)


def from_block(model: Any, index: int, x: torch.Tensor, merged: Mapping[int, int]) -> torch.Tensor:
    """Return the model's output, given the input of a block, (B, N, width), before which no token was merged.

    ``merged`` is how many tokens each block merges. All tokens are computed in the last block.
    """
    size: torch.Tensor | None = None
    for number, block in enumerate(model.blocks[index:], index):
        merge = merged.get(number, 0)
        if merge or size is not None:
            x, size = run_merging(block, x, size, merge, model.num_prefix_tokens)
        else:
            x = block(x)
    output: torch.Tensor = pooled_output(model, model.norm(x), size)
    return output


def _refuse_merging(model: VisionTransformer) -> None:
    for index, merge in enumerate(merges(model)):
        if merge:
            raise Unsupported(f"latency: expected blocks that merge no tokens, got {merge} merged in block {index}")


class _Merging(nn.Module):
    """Merges tokens that are alike."""

    def __init__(self, norm: nn.Module, prefix: int) -> None:
        super().__init__()
        self.norm, self.prefix = norm, prefix

    def extra_repr(self) -> str:
        """Return what differs between modules, for print(model)."""
        return f"prefix={self.prefix}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, N, width) to (B, N - N // 10, width)."""
        found, _ = merge_tokens(x, None, self.norm(x), x.size(1) // 10, self.prefix)
        return found


class _ForPrefix(Attends):
    """Applies a block's attention for prefix tokens alone, and adds the result to these."""

    def __init__(self, block: Any, prefix: int) -> None:
        super().__init__()
        post_norm = isinstance(block, ResPostBlock)
        self.attn, self.prefix = block.attn, prefix
        self.before: nn.Module = nn.Identity() if post_norm else block.norm1
        self.after: nn.Module = block.norm1 if post_norm else block.ls1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, N, width) to (B, prefix, width)."""
        y = self.attend(self.before(x), self.prefix)
        out: torch.Tensor = x[:, : self.prefix] + self.after(y)
        return out


class _Residual(nn.Module):
    """Applies modules one after the other and adds the result to the input."""

    def __init__(self, *branch: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(*branch)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, N, width) to the same shape."""
        out: torch.Tensor = x + self.branch(x)
        return out
