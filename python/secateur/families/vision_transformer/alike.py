"""Whether all blocks of a vision transformer have the same sizes, as the classes of libraries want it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from timm.layers import GluMlp, Mlp, SwiGLU

from ...errors import Unsupported

__all__ = ["Sizes", "sizes_of_all_blocks"]


@dataclass(frozen=True)
class Sizes:
    """The sizes of every block: ``hidden`` are the channels that the first linear layer of an FFN gives."""

    width: int
    depth: int
    heads: int
    head_dim: int
    hidden: int

    @property
    def mlp_ratio(self) -> float:
        """What timm multiplies the width by. Of hidden / width, its int is one short for some sizes."""
        return (self.hidden + 0.5) / self.width


def sizes_of_all_blocks(model: Any, name: str) -> Sizes:
    """Return the sizes of a model's blocks.

    Args:
        model: of the family.
        name: who wants them to be alike, for error texts.

    Raises:
        Unsupported: a block merges tokens, lacks a layer, keeps more queries than values or the other way round, or has
            other sizes than the first; the text names it.
    """
    found = [_sizes(f"blocks.{index}", block, name) for index, block in enumerate(model.blocks)]
    for index, sizes in enumerate(found):
        for what, size in sizes.items():
            if size != found[0][what]:
                raise Unsupported(
                    f"blocks.{index}.{what}: expected {found[0][what]}, as in blocks.0, for {name}, got {size}"
                )
    attn, ffn = found[0]["attn"], found[0]["mlp"]
    return Sizes(int(model.embed_dim), len(found), attn.heads, attn.head_dim, ffn.hidden)


@dataclass(frozen=True)
class _Attention:
    heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.heads} {'head' if self.heads == 1 else 'heads'} of {self.head_dim}"


@dataclass(frozen=True)
class _Ffn:
    hidden: int

    def __str__(self) -> str:
        return f"{self.hidden} hidden channels"


def _sizes(name: str, block: Any, library: str) -> dict[str, Any]:
    if getattr(block, "merge", 0):
        raise Unsupported(f"{name}: expected a block that merges no tokens for {library}, got one that does")
    for child in ("attn", "mlp"):
        if hasattr(getattr(block, child), "absent"):
            raise Unsupported(f"{name}.{child}: expected a layer for {library}, got none: it was removed")
    attn, mlp = block.attn, block.mlp
    qk, v = getattr(attn, "qk_dim", attn.head_dim), getattr(attn, "v_dim", attn.head_dim)
    if qk != v:
        raise Unsupported(
            f"{name}.attn: expected as many queries as values in a head for {library}, got {qk} and {v}; "
            "prune(layout='stock') fills the gap with zeros"
        )
    # What is neither is refused by the family.
    first = mlp.fc1_g if type(mlp) is SwiGLU else mlp.fc1 if type(mlp) in (Mlp, GluMlp) else None
    hidden = 0 if first is None else int(first.out_features)
    return {"attn": _Attention(int(attn.num_heads), int(v)), "mlp": _Ffn(hidden)}
