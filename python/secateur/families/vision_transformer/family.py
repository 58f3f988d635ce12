"""The family of timm's VisionTransformer with plain blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ...anatomy import Anatomy, LastBlock
from ..base import Family
from ..registry import register
from . import fit, run
from .inspect import Inspection
from .reduced import REDUCED

__all__ = ["PlainViT"]


@register
class PlainViT(Family):
    """VisionTransformer and VisionTransformerDistilled with plain blocks."""

    name = "vision_transformer"
    models = (VisionTransformer, VisionTransformerDistilled)

    def accepts(self, model: nn.Module) -> bool:
        """Return whether the model's class is one of these, or secateur's with fewer tokens."""
        return super().accepts(model) or type(model) in REDUCED

    def build(self, architecture: str, arguments: Mapping[str, Any], device: torch.device) -> nn.Module:
        """Build the dense model, on the meta device without timm's initial values, which take half of the time."""
        if device.type != "meta" or "weight_init" in arguments:
            return super().build(architecture, arguments, device)
        model: Any
        try:
            model = super().build(architecture, {**arguments, "weight_init": "skip"}, device)
        except TypeError:
            # Another architecture, which will be refused for what it is.
            return super().build(architecture, arguments, device)
        # As if nothing had been skipped: timm's record of the arguments, and what init_weights does if it is called.
        getattr(model, "_model_args", {}).pop("weight_init", None)
        model.weight_init_mode = ""
        built: nn.Module = model
        return built

    def arguments(self, model: nn.Module) -> dict[str, Any]:
        """Return arguments as the modules have them now: depth, sizes of images and patches, channels, classes."""
        vit: Any = _vit(model)
        found = {**super().arguments(model), "depth": len(vit.blocks)}
        embed = vit.patch_embed
        if type(embed) is PatchEmbed:
            found |= {"in_chans": embed.proj.in_channels, "patch_size": _one(embed.proj.kernel_size)}
        if embed.img_size is not None:
            found["img_size"] = tuple(embed.img_size)
        return found

    def inspect(self, model: nn.Module) -> Anatomy:
        """Describe the model, or raise Unsupported naming the module and the reason."""
        return Inspection(_vit(model)).anatomy(self.name)

    def adapt(self, model: nn.Module, anatomy: Anatomy, sizes: Mapping[str, int]) -> None:
        """Make modules and attributes fit parameters that were just cut."""
        fit.adapt(_vit(model), anatomy, sizes)

    def stock_sizes(self, model: nn.Module, anatomy: Anatomy, sizes: Mapping[str, int]) -> dict[str, int]:
        """Return the sizes after a cut to ``sizes`` whose attention modules are timm's own."""
        return fit.stock_sizes(_vit(model), anatomy, sizes)

    def make_stock(self, model: nn.Module, head_dims: Mapping[str, int]) -> None:
        """Make the attention modules timm's own, as the same objects."""
        fit.make_stock(_vit(model), head_dims)

    def last_block(self, model: nn.Module) -> LastBlock:
        """Return whether the last block was made to compute prefix tokens only, whatever the model pools now."""
        blocks = _vit(model).blocks
        return "pooled" if len(blocks) > 0 and hasattr(blocks[-1], "pooled") else "whole"

    def set_last_block(self, model: nn.Module, last_block: LastBlock, *, strict: bool = True) -> None:
        """Make the last block compute prefix tokens only, or all."""
        fit.set_last_block(_vit(model), last_block, strict)

    def alone(self, model: nn.Module, block: int | None) -> nn.Module:
        """Return a copy of the model with only that block, or with no block."""
        return run.alone(_vit(model), block)

    def layers(self, model: nn.Module, last_block: LastBlock = "whole") -> Mapping[str, nn.Module]:
        """Return attention and FFN layers by name, as timm's blocks run them, without dropping paths."""
        return run.layers(_vit(model), last_block)

    def merging(self, model: nn.Module, block: int) -> nn.Module:
        """Return what merges a tenth of the tokens in a block."""
        return run.merging(_vit(model), block)

    def prefix_tokens(self, model: nn.Module) -> int:
        """Return the number of class, distillation and register tokens."""
        return int(_vit(model).num_prefix_tokens)

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """Return the blocks, first to last."""
        return run.blocks(_vit(model))

    def from_block(
        self, model: nn.Module, index: int, x: torch.Tensor, sizes: Mapping[str, int] | None = None
    ) -> torch.Tensor:
        """Return the model's output, given the input of a block, (B, N, width)."""
        anatomy = self.inspect(model) if sizes else None
        merges = {} if anatomy is None else fit.merges_at(anatomy, sizes or {})
        return run.from_block(_vit(model), index, x, merges)


def _one(size: tuple[int, ...]) -> int | tuple[int, ...]:
    """Return one number for equal ones, as timm's patch_size is given."""
    return size[0] if len(set(size)) == 1 else size


def _vit(model: nn.Module) -> VisionTransformer:
    assert isinstance(model, VisionTransformer)
    return model
