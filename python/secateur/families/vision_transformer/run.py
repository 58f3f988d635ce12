"""Runs parts of a VisionTransformer: one layer, one block, or all blocks from one on."""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import nn

__all__ = ["alone", "blocks", "from_block", "layers"]


def alone(model: VisionTransformer, block: int | None) -> nn.Module:
    """Return a copy of the model with only that block, or with no block."""
    blocks = nn.Sequential(*(() if block is None else (copy.deepcopy(model.blocks[block]),)))
    # The memo makes deepcopy use these blocks and never touch the others.
    return copy.deepcopy(model, {id(model.blocks): blocks})


def layers(model: VisionTransformer) -> dict[str, nn.Module]:
    """Return attention and FFN layers by name, as timm's blocks run them, without dropping paths."""
    found: dict[str, nn.Module] = {}
    block: Any
    for index, block in enumerate(model.blocks):
        post_norm = isinstance(block, ResPostBlock)
        if block.attn is not None:
            attention = (block.attn, block.norm1) if post_norm else (block.norm1, block.attn, block.ls1)
            found[f"blocks.{index}.attn"] = _Residual(*attention)
        if block.mlp is not None:
            ffn = (block.mlp, block.norm2) if post_norm else (block.norm2, block.mlp, block.ls2)
            found[f"blocks.{index}.mlp"] = _Residual(*ffn)
    return found


def blocks(model: VisionTransformer) -> list[nn.Module]:
    """Return the blocks, first to last."""
    return list(model.blocks)


def from_block(model: VisionTransformer, index: int, x: torch.Tensor) -> torch.Tensor:
    """Return the model's output, given the input of a block, (B, N, width)."""
    for block in model.blocks[index:]:
        x = block(x)
    output: torch.Tensor = model.forward_head(model.norm(x))
    return output


class _Residual(nn.Module):
    """Applies modules one after the other and adds the result to the input."""

    def __init__(self, *branch: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(*branch)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, N, width) to the same shape."""
        out: torch.Tensor = x + self.branch(x)
        return out
