"""How many tokens a VisionTransformer computes at each place: what it may merge, and the last block alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from timm.layers import PatchEmbed
from torch import nn

from ...anatomy import Group
from ...anatomy import costs as cost
from .reduced import merges, pools_tokens

__all__ = [
    "Merging",
    "channels_of_images",
    "classifies",
    "is_pooled",
    "pooled_products",
    "why_not_pooled",
]


class Merging:
    """The tokens at the place that an inspection has reached, and the groups of those that could still be merged."""

    def __init__(self, model: Any) -> None:
        self._model = model
        prefix, patches = int(model.num_prefix_tokens), int(model.patch_embed.num_patches)
        self.refused = _why_not_merged(model, patches)
        self.groups: list[Group] = []
        self.after: dict[str, cost.Tokens] = {}
        self._tokens = cost.Tokens(prefix, patches)
        self._merged = merges(model)

    @property
    def all(self) -> int:
        """Number of tokens where none is merged."""
        return self._tokens.prefix + self._tokens.patches

    @property
    def here(self) -> cost.Count:
        """Number of tokens here."""
        return self._tokens if self._tokens.merges else self.all

    def attention(self, index: int, layer: str, width: str | int) -> list[cost.Product]:
        """Go past the attention of block ``index``; return what merging costs.

        ``width`` is the group of the residual width, or a number if it cannot be cut.
        """
        if self.refused is not None:
            return []
        before = self._tokens
        name, units = f"blocks.{index}.tokens", before.patches // 2
        merge = cost.Merge(name, units, layer)
        self._tokens = replace(before, merges=(*before.merges, merge))
        self.after[name] = self._tokens
        # With images smaller than before, all that a block gets may be merged.
        self.groups.append(Group(name, "tokens", index, max(1, units - self._merged[index]), ()))
        return [cost.MatchingProduct(layer, before, merge, width)]


def _why_not_merged(model: Any, patches: int) -> str | None:
    if model.attn_pool is not None:
        return f"attn_pool: {type(model.attn_pool).__name__} does not know how many tokens each has become"
    if model.global_pool not in ("token", "avg"):
        return f"global_pool: {model.global_pool!r} is neither of class tokens nor an average"
    return None if patches > 1 else f"patch_embed: {patches} patches"


def why_not_pooled(model: Any) -> str | None:
    """Return why the output depends on more than the prefix tokens of the last block, or None."""
    if model.attn_pool is not None:
        return f"attn_pool: {type(model.attn_pool).__name__} reads all tokens"
    if not pools_tokens(model):
        return f"global_pool: {model.global_pool!r} reads all tokens"
    return None if len(model.blocks) else "no blocks"


def is_pooled(model: Any) -> bool:
    """Return whether the last block computes prefix tokens only, as the model is now."""
    return why_not_pooled(model) is None and hasattr(model.blocks[-1], "pooled")


def classifies(model: Any) -> bool:
    """Return whether a head reads prefix tokens alone."""
    return why_not_pooled(model) is None and type(model.head) is not nn.Identity


def pooled_products(
    products: Iterable[cost.Product], model: Any, qkv: str, groups: dict[str, str], width: str | int
) -> tuple[cost.Product, ...]:
    """Return the products when the last block computes prefix tokens only, and keys and values of all.

    Args:
        products: those of a model whose last block computes all tokens.
        model: the model.
        qkv: name of the last block's linear layer of queries, keys and values.
        groups: kind to group of the last block's attention; empty if it has none.
        width: the group of the residual width, or a number if it cannot be cut.
    """
    block, prefix = f"blocks.{len(model.blocks) - 1}.", int(model.num_prefix_tokens)
    found: list[cost.Product] = []
    for product in products:
        if not product.module.startswith(block):
            found.append(product)
        elif isinstance(product, cost.AttentionProduct):
            found.append(replace(product, queries=prefix))
        elif isinstance(product, cost.WeightProduct) and product.module == qkv:
            layer = qkv.rpartition(".")[0]
            places: tuple[tuple[cost.Count, str], ...] = (
                (prefix, groups["qk"]),
                (product.positions, groups["qk"]),
                (product.positions, groups["v"]),
            )
            found += [cost.PartProduct(qkv, at, (groups["heads"], part, width, layer)) for at, part in places]
        elif isinstance(product, cost.WeightProduct):
            found.append(replace(product, positions=prefix))
        # Tokens that are not computed are not compared.
    return tuple(found)


def channels_of_images(model: Any) -> int:
    """Return how many channels the first convolution reads, which may have been replaced."""
    proj = model.patch_embed.proj
    known = type(model.patch_embed) is PatchEmbed and isinstance(proj, nn.Conv2d)
    return int(proj.in_channels if known else model.in_chans)
