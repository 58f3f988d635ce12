"""A ViT of odd sizes and batches for it, where little else about the model matters."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

SMALL = {"img_size": 12, "patch_size": 4, "embed_dim": 27, "depth": 3, "num_heads": 3, "num_classes": 5}


def small_vit(seed: int = 0, **more: object) -> nn.Module:
    torch.manual_seed(seed)
    model = VisionTransformer(**SMALL | {"mlp_ratio": 2.2} | more).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def small_batches(count: int = 16, side: int = 12) -> list[Tensor]:
    images = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))
    return [images[: count // 2], images[count // 2 :]]
