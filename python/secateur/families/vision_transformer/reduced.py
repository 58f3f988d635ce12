"""VisionTransformers that run fewer tokens: prefix tokens alone in the last block, or merged ones from a block on."""

# No `from __future__ import annotations` here: torch.jit.script reads the annotations as objects.

from typing import TYPE_CHECKING, Any

import torch
from timm.models._manipulate import checkpoint
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import nn

from ...errors import InvalidArgument
from ..absent import go_past, is_absent, is_traced, watched
from .modules import PrunedBlock, PrunedResPostBlock
from .tokens import Attends, merge_tokens

# As in `tokens`: torch.fx calls it as it is.
torch.fx.wrap("merge_tokens")

__all__ = [
    "REDUCED",
    "MergingBlock",
    "MergingResPostBlock",
    "ReducedVisionTransformer",
    "ReducedVisionTransformerDistilled",
    "merges",
    "norm_before_ffn",
    "pooled_output",
    "pools_tokens",
    "run_merging",
]


def norm_before_ffn(block: Any) -> nn.Module | None:
    """Return the norm whose output the FFN reads, by which tokens are compared; None if there is none."""
    return None if isinstance(block, ResPostBlock) or is_absent(block.mlp) else block.norm2


def run_merging(
    block: Any, x: torch.Tensor, size: torch.Tensor | None, merge: int, prefix: int, queries: int = 0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run a block whose tokens have sizes, and merge some more between its attention and its FFN.

    Args:
        block: of timm's classes or secateur's.
        x: (B, N, C).
        size: (B, N), how many tokens each has become; None for 1 each.
        merge: how many tokens to merge, compared by what the FFN would read; none in a block without attention.
        prefix: number of tokens before the patches, which are not merged.
        queries: run for the first tokens alone, without merging; 0 is all.

    Returns:
        (B, N', C) and (B, N').
    """
    post_norm = isinstance(block, ResPostBlock)
    if is_absent(block.attn):
        x = go_past(block, x[:, :queries] if queries else x, "attn")
    else:
        y = _attended(block, x if post_norm else block.norm1(x), size, queries)
        if queries:
            x = x[:, :queries]
        x = x + block.drop_path1(block.norm1(y) if post_norm else block.ls1(y))
        if merge and not queries:
            read, norm = x, norm_before_ffn(block)
            if norm is not None:
                with torch.no_grad():
                    # Not as a module: hooks of the norm expect what the FFN reads.
                    read = norm.forward(x)
            x, size = merge_tokens(x, size, read, merge, prefix)
    if is_absent(block.mlp):
        x = go_past(block, x, "mlp")
    else:
        y = block.norm2(block.mlp(x)) if post_norm else block.ls2(block.mlp(block.norm2(x)))
        x = x + block.drop_path2(y)
    return x, size


def _attended(block: Any, x: torch.Tensor, size: torch.Tensor | None, queries: int) -> torch.Tensor:
    """Return the output of a block's attention, called as a module if that has hooks or is traced."""
    if not queries and (is_traced(x) or watched([block.attn])):
        called: torch.Tensor = block.attn(x, attn_mask=None if size is None else sizes_as_mask(size, x))
        return called
    return Attends.attend(block, x, queries, None, None if size is None else size.log())


@torch.fx.wrap
def sizes_as_mask(size: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return the mask that adds the logarithm of how many tokens each has become, (B, 1, 1, N), in the type of x."""
    return size.log()[:, None, None].to(x.dtype)


class Sizes:
    """How many tokens each has become, (B, N) or None for 1 each, where a block is entered; the block sets ``left``."""

    def __init__(self, entering: torch.Tensor | None, prefix: int) -> None:
        self.entering, self.prefix = entering, prefix
        self.left = entering


class _Merges(nn.Module):
    """Merges ``merge`` tokens between attention and FFN, if its tokens may have sizes; comes before a block's class."""

    merge: int

    def forward(
        self,
        x: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        queries: int = 0,
        sizes: Sizes | None = None,
    ) -> torch.Tensor:
        """Merge tokens and set ``sizes.left`` if there are sizes; else keep all tokens."""
        if not isinstance(sizes, Sizes):
            unmerged: torch.Tensor = super().forward(x, attn_mask, is_causal, queries)
            return unmerged
        queries = 0 if is_traced(x) else queries
        x, sizes.left = run_merging(self, x, sizes.entering, self.merge, sizes.prefix, queries)
        return x

    def extra_repr(self) -> str:
        """Return the number of tokens that are merged, for print(model)."""
        return f"merge={self.merge}"


class MergingBlock(_Merges, PrunedBlock):
    """``PrunedBlock`` that merges tokens."""


class MergingResPostBlock(_Merges, PrunedResPostBlock):
    """``PrunedResPostBlock`` that merges tokens."""


if TYPE_CHECKING:
    _Model = VisionTransformer
else:
    _Model = nn.Module


class _Reduced(_Model):
    """Runs fewer tokens in ``forward`` alone.

    ``forward_features``, ``forward_intermediates`` and ``get_intermediate_layers`` run all tokens through all blocks,
    as in timm's class, because their users ask for patches.
    """

    merging: bool

    if TYPE_CHECKING:
        attn_pool: Any
        global_pool: Any

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        """Return the model's output for images, (B, 3, H, W).

        If a module of the last block, or the norm after it, has hooks, they see all tokens: that block runs whole.

        Raises:
            InvalidArgument: a mask, causal attention or another pooling in a model that merges tokens.
        """
        # As pools_tokens; torch.jit.script takes no function of a module.
        queries = self.num_prefix_tokens if self.attn_pool is None and self.global_pool == "token" else 0
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            if queries and (is_traced(x) or (not torch.compiler.is_compiling() and _hooked(self))):
                queries = 0
            if self.merging:
                return self._merging(x, attn_mask, is_causal, queries)
        else:
            assert not self.merging, "torch.jit.script: expected a model that merges no tokens"
        if queries == 0:
            return self.forward_head(self.forward_features(x, attn_mask, is_causal))
        checkpointing = self.grad_checkpointing and attn_mask is None and not is_causal
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        for block in self.blocks:
            if hasattr(block, "pooled"):
                if checkpointing and not torch.jit.is_scripting():  # type: ignore[attr-defined]
                    x = checkpoint(block, x, attn_mask, is_causal, queries)
                else:
                    x = block(x, attn_mask, is_causal, queries)
            elif checkpointing and not torch.jit.is_scripting():  # type: ignore[attr-defined]
                x = checkpoint(block, x)
            else:
                x = block(x, attn_mask, is_causal)
        return self.forward_head(self.norm(x))

    def _merging(self, x: torch.Tensor, attn_mask: torch.Tensor | None, is_causal: bool, queries: int) -> torch.Tensor:
        if self.attn_pool is not None or self.global_pool not in ("token", "avg"):
            raise InvalidArgument(
                f"global_pool: expected 'token' or 'avg' in a model that merges tokens, got {self.global_pool!r}"
            )
        x = without_mask(x, attn_mask, is_causal)
        size: torch.Tensor | None = None
        run = checkpoint if self.grad_checkpointing else _called
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        for block in self.blocks:
            some = queries if hasattr(block, "pooled") else 0
            if hasattr(block, "merge"):
                x, size = run(_merged, block, x, some, self.num_prefix_tokens, size)
            elif some:
                x = run(block, x, None, False, some)
            else:
                x = run(block, x)
        output: torch.Tensor = pooled_output(self, self.norm(x), size)
        return output


class ReducedVisionTransformer(_Reduced, VisionTransformer):
    """timm's ``VisionTransformer`` with fewer tokens."""

    dense_class = VisionTransformer


class ReducedVisionTransformerDistilled(_Reduced, VisionTransformerDistilled):
    """timm's ``VisionTransformerDistilled`` with fewer tokens."""

    dense_class = VisionTransformerDistilled


REDUCED = (ReducedVisionTransformer, ReducedVisionTransformerDistilled)


def pools_tokens(model: Any) -> bool:
    """Return whether the output depends on the prefix tokens of the last block alone."""
    return model.attn_pool is None and model.global_pool == "token"


def merges(model: Any) -> list[int]:
    """Return how many tokens each block merges."""
    return [getattr(block, "merge", 0) for block in model.blocks]


def pooled_output(model: Any, x: torch.Tensor, size: torch.Tensor | None) -> Any:
    """Return the model's output, given all tokens after the last norm, (B, N, C), and their sizes, (B, N) or None.

    An average is weighted by size.
    """
    if size is None or model.global_pool != "avg":
        return model.forward_head(x)
    if not model.pool_include_prefix:
        x, size = x[:, model.num_prefix_tokens :], size[:, model.num_prefix_tokens :]
    weight = (size / size.sum(1, keepdim=True)).to(x.dtype)
    x = (weight[:, None] @ x)[:, 0]
    return model.head(model.head_drop(model.fc_norm(x)))


@torch.fx.wrap
def without_mask(x: torch.Tensor, attn_mask: torch.Tensor | None, is_causal: bool) -> torch.Tensor:
    """Return x, or refuse what a model that merges tokens does not take.

    Raises:
        InvalidArgument: a mask or causal attention.
    """
    if attn_mask is not None or is_causal:
        what = "is_causal" if is_causal else "attn_mask"
        raise InvalidArgument(f"{what}: expected none in a model that merges tokens, got one")
    return x


def _called(function: Any, *arguments: Any) -> Any:
    return function(*arguments)


def _merged(
    block: nn.Module, x: torch.Tensor, queries: int, prefix: int, size: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run a block that returns tokens alone, as hooks expect, and return them with their sizes."""
    sizes = Sizes(size, prefix)
    x = block(x, queries=queries, sizes=sizes)
    return x, sizes.left


def _hooked(model: Any) -> bool:
    """Return whether anything watches the tokens that pooling leaves out."""
    parts = (*(block for block in model.blocks if hasattr(block, "pooled")), model.norm)
    return watched([model.blocks]) or any(watched(part.modules()) for part in parts)
