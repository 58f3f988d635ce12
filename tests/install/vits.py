"""A small ViT, and the queries and keys of its layers in a file, as a program that runs it would have them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn


def vit(dtype: torch.dtype = torch.float32, **options: object) -> nn.Module:
    """Odd sizes: 3 heads of 13, FFN 156, 17 tokens."""
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 39, "num_heads": 3, "depth": 2, "num_classes": 5}
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **arguments | options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model.to(dtype).eval()


def images(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


@contextmanager
def observed(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Queries and keys of the forward passes in the block, (images, tokens, heads, head_dim)."""
    found: dict[str, Tensor] = {}

    def keep(name: str, attn: nn.Module, qkv: Tensor) -> None:
        qk = qkv[..., : 2 * attn.num_heads * getattr(attn, "qk_dim", attn.head_dim)]
        q, k = qk.unflatten(-1, (2, attn.num_heads, -1)).unbind(2)
        found.update({f"{name}.q": q.contiguous(), f"{name}.k": k.contiguous()})

    handles = [
        block.attn.qkv.register_forward_hook(
            lambda _module, _inputs, output, name=f"blocks.{index}", attn=block.attn: keep(name, attn, output)
        )
        for index, block in enumerate(model.blocks)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def buffers(model: nn.Module, batch: Tensor, path: Path) -> Path:
    with torch.inference_mode(), observed(model) as found:
        model(batch)
    save_file({name: tensor.clone() for name, tensor in found.items()}, path)
    return path
