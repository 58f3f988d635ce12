"""What the classes of cut attention modules share: heads of any sizes, the dense model's scale."""

# No `from __future__ import annotations` here: torch.jit.script reads the annotations as objects.

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Optional

import torch
from torch import nn

from ..attention import attend_padded
from ..base import fit_modules
from .base import Attention
from .parts import Parts, fit_bias, fit_head_norms, rows_of

__all__ = ["Resized", "Sized"]


class Sized(nn.Module):
    """A mixin for a library's attention class: ``num_heads`` heads of ``qk_dim`` and ``v_dim`` channels.

    ``scale`` remains the dense model's.
    """

    qk_dim: int
    v_dim: int

    if TYPE_CHECKING:
        num_heads: int
        scale: float
        qkv: Any
        proj: Any
        proj_drop: Any
        q_bias: Any
        k_bias: Any
        v_bias: Any

    def of_heads(self, x: torch.Tensor, size: int) -> torch.Tensor:
        """(B, N, heads · size) to (B, heads, N, size)."""
        y: torch.Tensor = x.unflatten(-1, (-1, size)).transpose(1, 2)
        return y

    def split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Split (B, N, heads · (2 qk_dim + v_dim)): queries, keys and values in turn, each head by head."""
        qk, v = self.num_heads * self.qk_dim, self.num_heads * self.v_dim
        q, k, value = qkv.split([qk, qk, v], dim=-1)
        return self.of_heads(q, self.qk_dim), self.of_heads(k, self.qk_dim), self.of_heads(value, self.v_dim)

    def split_by_head(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Split (B, N, heads · (2 qk_dim + v_dim)): head by head, each with its queries, keys and values."""
        x = qkv.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        q, k, v = x.split([self.qk_dim, self.qk_dim, self.v_dim], dim=-1)
        return q, k, v

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: Optional[torch.Tensor] = None,  # noqa: UP045
        is_causal: bool = False,
        scale: Optional[float] = None,  # noqa: UP045
    ) -> torch.Tensor:
        """Attend, (B, heads, N, d) to (B, N, heads · v_dim); ``bias`` is added to the scores."""
        scale = self.scale if scale is None else scale
        drop = getattr(self, "attn_drop", None)
        if getattr(self, "fused_attn", False):
            rate = drop.p if drop is not None and self.training else 0.0
            return attend_padded(q, k, v, self.qk_dim, self.v_dim, bias, rate, is_causal, scale).flatten(2)
        attn = (q * scale) @ k.transpose(-2, -1)
        if is_causal:
            attn = attn.masked_fill(torch.ones_like(attn, dtype=torch.bool).triu(1), -torch.inf)
        if bias is not None:
            attn = attn.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else attn + bias
        attn = attn.softmax(dim=-1)
        attn = attn if drop is None else drop(attn)
        return (attn @ v).transpose(1, 2).flatten(2)

    def project(self, y: torch.Tensor) -> torch.Tensor:
        """The output projection, with its dropout where the library's class has one."""
        drop = getattr(self, "proj_drop", None)
        out: torch.Tensor = self.proj(y)
        return out if drop is None else drop(out)


class Resized(Attention):
    """An entry whose modules become ``Sized`` when they are cut.

    Subclasses say which attributes hold the number of heads, their sizes, and which modules are norms of queries and
    keys. ``resize`` does what else a class needs.
    """

    heads_in: ClassVar[tuple[str, ...]] = ("num_heads",)
    head_norms: ClassVar[tuple[str, ...]] = ()
    biases: ClassVar[tuple[str, ...]] = ()

    def sizes(self, module: Any) -> tuple[int, int, int]:
        """Return (heads, qk, v) of a module, cut or not."""
        heads = int(getattr(module, self.heads_in[0]))
        if hasattr(module, "qk_dim"):
            return heads, module.qk_dim, module.v_dim
        dim = self.head_dim(module, heads)
        return heads, dim, dim

    def head_dim(self, module: Any, heads: int) -> int:
        """Return the channels per head of the library's own class."""
        return rows_of(module, "qkv") // (3 * heads)

    def new(self, module: Any) -> Parts:
        """Return an empty collection for a module, with its scale."""
        return Parts(module, *self.sizes(module), scale=float(getattr(module, "scale", 1.0)))

    def keep_heads(self, parts: Parts, module: Any, given: Iterable[Any]) -> None:
        """Refuse to remove heads where an argument has entries for each of them, such as a bias shared by layers."""
        heads = int(getattr(module, self.heads_in[0]))
        for tensor in given:
            if torch.is_tensor(tensor) and tensor.ndim >= 3 and tensor.shape[-3] == heads > 1:
                parts.refused["heads"] = "the model computes a tensor with entries for each head, for many layers"

    def fit(self, module: Any, sizes: Mapping[str, int]) -> None:
        """Set the sizes of the module and its class."""
        heads, qk, v = self.sizes(module)
        heads, qk, v = sizes.get("heads", heads), sizes.get("qk", qk), sizes.get("v", v)
        own = self.modules.get(type(module))
        if own is not None:
            module.__class__ = own
        for name in self.heads_in:
            setattr(module, name, heads)
        if type(module) not in self.modules:  # the library's own computes them
            module.qk_dim, module.v_dim = qk, v
        fit_head_norms(module, self.head_norms, heads, qk)
        for name in self.biases:
            fit_bias(getattr(module, name), heads)
        fit_modules(module)
        self.resize(module, heads, qk, v)

    def resize(self, module: Any, heads: int, qk: int, v: int) -> None:
        """Set what else depends on the sizes."""
