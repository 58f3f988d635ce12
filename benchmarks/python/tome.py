"""Token merging (ToMe: Bolya et al., ICLR 2023, arXiv:2210.09461) on a timm ViT, written from the paper alone.

Between attention and FFN of each block: patch tokens are dealt alternately into two sets; each of the first set finds
the token of the second whose key, averaged over the heads, has the largest cosine with its own; the r best pairs become
one token each, the mean weighted by how many patches each token stands for. Attention is proportional: a key that
stands for s patches has log s added to its scores. No weight changes, and the class token is never merged.
"""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import secateur as sc
import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from tuning import attention


class MergingBlocks(nn.Module):
    """The blocks of a ViT, with ``schedule[i]`` tokens merged in block i; images (B, N, D) in, (B, N − Σr, D) out."""

    def __init__(self, blocks: nn.Sequential, schedule: list[int], prefix: int) -> None:
        super().__init__()
        self.blocks, self.schedule, self.prefix = blocks, schedule, prefix

    def forward(self, x: Tensor) -> Tensor:
        sizes = x.new_ones(*x.shape[:2], 1)
        block: Any
        for block, r in zip(self.blocks, self.schedule, strict=True):
            mixed, keys = _attend(block.attn, block.norm1(x), sizes)
            x = x + block.drop_path1(block.ls1(mixed))
            x, sizes = merge(x, sizes, keys.mean(1), r, self.prefix)
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return x


def _attend(module: Any, x: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Proportional attention; the projected output (B, N, D) and the keys (B, heads, N, d)."""
    packed = module.qkv(x).unflatten(2, (3, module.num_heads, module.head_dim)).permute(2, 0, 3, 1, 4)
    q, k, v = packed.unbind(0)
    q, k = module.q_norm(q), module.k_norm(k)
    bias = sizes.log()[:, None, None, :, 0]
    if module.fused_attn:
        x = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    else:
        x = (q * module.scale @ k.mT + bias).softmax(-1) @ v
    return module.proj(module.norm(x.transpose(1, 2).flatten(2))), k


def merge(x: Tensor, sizes: Tensor, metric: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor]:
    """Merge the r most similar pairs of tokens after the first ``prefix``, which keep their places.

    Args:
        x: tokens (B, N, D).
        sizes: how many patches each stands for, (B, N, 1).
        metric: what is compared by cosine, (B, N, d).
        r: at most half of the tokens that can be merged.
        prefix: number of class and register tokens in front.
    """
    r = min(r, (x.shape[1] - prefix) // 2)
    if r <= 0:
        return x, sizes
    metric = functional.normalize(metric[:, prefix:], dim=-1)
    # With one class token in front these are the even places, which are merged into the odd ones.
    best, partner = (metric[:, 1::2] @ metric[:, ::2].mT).max(-1)
    order = best.argsort(dim=-1, descending=True)
    gone, stays = order[:, :r, None], order[:, r:, None].sort(dim=1).values
    into = partner.gather(1, gone[..., 0])[..., None]

    def joined(values: Tensor) -> Tensor:
        front, first, second = values[:, :prefix], values[:, prefix + 1 :: 2], values[:, prefix::2]
        wide = values.shape[-1]
        moved = first.gather(1, gone.expand(-1, -1, wide))
        kept = first.gather(1, stays.expand(-1, -1, wide))
        return torch.cat([front, kept, second.scatter_add(1, into.expand(-1, -1, wide), moved)], 1)

    total = joined(sizes)
    return joined(x * sizes) / total, total


def counted_macs(model: nn.Module, images: Tensor) -> float:
    """MACs of an image in all matrix products and convolutions, counted while ``images`` (B, 3, H, W) pass."""
    with torch.inference_mode(), attention(model, fused=False), FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops() / 2 / len(images)


def spread(total: int, blocks: int, patches: int, *, decreasing: bool) -> list[int]:
    """``total`` merges, as many in each block, or fewer from block to block down to none: the paper's two schedules.

    A block merges at most half of the patch tokens it has left.
    """
    shares = [blocks - 1 - i if decreasing else 1 for i in range(blocks)]
    until = [sum(shares[:i]) * total // sum(shares) for i in range(blocks + 1)]
    schedule = []
    for before, after in pairwise(until):
        schedule.append(min(after - before, patches // 2))
        patches -= schedule[-1]
    return schedule


def tome(dense: nn.Module, macs: float, images: Tensor, *, decreasing: bool = False) -> tuple[nn.Module, list[int]]:
    """A copy of ``dense`` with the fewest merges whose counted MACs are at most ``macs``; and the merges by block.

    ``images`` (B, 3, H, W) are those that pass while MACs are counted, and on which no merge must change nothing.

    Raises:
        Unsupported: not a plain ViT that pools its class token; or a budget that merging cannot reach.
    """
    if type(dense) is not VisionTransformer or dense.global_pool != "token":
        raise sc.Unsupported("ToMe here is for a VisionTransformer that pools its class token")
    if any(type(b) is not Block or type(b.attn) is not Attention or b.attn.gate is not None for b in dense.blocks):
        raise sc.Unsupported("ToMe here is for timm's Block with its plain Attention")
    model = copy.deepcopy(dense)
    depth, prefix = len(dense.blocks), dense.num_prefix_tokens
    patches = dense.patch_embed.num_patches
    merging = MergingBlocks(model.blocks, [0] * depth, prefix)
    model.blocks = merging
    with torch.inference_mode():
        wanted, found = dense(images), model(images)
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max(), "ToMe without merges: another model"

    def cost(total: int) -> float:
        merging.schedule = spread(total, depth, patches, decreasing=decreasing)
        return counted_macs(model, images[:1])

    low, high = 0, depth * patches // 2
    if cost(high) > macs:
        raise sc.Unsupported(f"ToMe: expected a budget that merging reaches, got {macs:,.0f} MACs")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(middle) <= macs else (middle, high)
    if cost(low) > macs:
        low = high
    merging.schedule = spread(low, depth, patches, decreasing=decreasing)
    return model, merging.schedule
