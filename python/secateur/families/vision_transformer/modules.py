"""Modules that replace timm's where a cut leaves shapes that timm's cannot hold."""

# No `from __future__ import annotations` here: torch.jit.script reads the annotations as objects.

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch
from timm.layers import Attention, AttentionPoolLatent, maybe_add_mask, resolve_self_attn_mask
from timm.models.vision_transformer import Block, ResPostBlock
from torch import nn
from torch.nn import functional as F  # noqa: N812

from ..absent import go_past, is_traced
from ..attention import attend_padded
from .tokens import Attends

# As in `tokens`: torch.fx knows each module's names by themselves.
torch.fx.wrap("maybe_add_mask")
torch.fx.wrap("resolve_self_attn_mask")


class HeadNorm(nn.Module):
    """LayerNorm or RMSNorm over each head's kept channels, with a separate scale and shift for each head.

    Args:
        heads: number of heads.
        size: channels per head.
        eps: added to the variance (or mean square).
        centred: LayerNorm if true, else RMSNorm.
        upcast: compute in float32 and cast back.
        weight: (heads · size,) or None.
        bias: (heads · size,) or None.
    """

    centred: bool
    upcast: Final[bool]
    eps: Final[float]
    heads: int
    size: Final[int]

    def __init__(
        self,
        heads: int,
        size: int,
        eps: float,
        centred: bool,
        upcast: bool,
        weight: nn.Parameter | None,
        bias: nn.Parameter | None,
    ) -> None:
        super().__init__()
        self.heads, self.size, self.eps, self.centred, self.upcast = heads, size, eps, centred, upcast
        self.weight = weight
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise (B, heads, N, size) over the last axis."""
        dtype = x.dtype
        if self.upcast:
            x = x.float()
        if self.centred:
            x = F.layer_norm(x, [self.size], None, None, self.eps)
        else:
            x = F.rms_norm(x, [self.size], None, self.eps)
        if self.weight is not None:
            x = x * self.weight.view(self.heads, 1, self.size)
        if self.bias is not None:
            x = x + self.bias.view(self.heads, 1, self.size)
        return x.to(dtype)

    def extra_repr(self) -> str:
        """Return the sizes, for print(model)."""
        return f"heads={self.heads}, size={self.size}, eps={self.eps}, centred={self.centred}"


def is_uncentred(norm: nn.Module) -> bool:
    """Return whether the norm is secateur's and does not subtract the mean."""
    return isinstance(norm, HeadNorm) and not norm.centred


class PrunedAttention(nn.Module):
    """Multi-head self-attention with qk_dim query/key and v_dim value channels per head.

    The attributes are those of timm's ``Attention``. The softmax scale stays the dense model's 1/√dense_head_dim, with
    which it was trained (Shim et al., SNP, ECCV 2024, prune the scores, not their temperature).

    ``qkv`` is Linear(C, heads · (2 qk_dim + v_dim)): queries, keys, values, each head by head; ``q_norm`` and
    ``k_norm`` are applied to (B, heads, N, qk_dim); ``norm``, ``gate`` and ``proj`` to (B, N, heads · v_dim).
    """

    num_heads: int
    head_dim: int
    attn_dim: int
    qk_dim: int
    v_dim: int
    scale: float
    fused_attn: bool

    if TYPE_CHECKING:  # torch.jit.script would read these as attributes' types
        qkv: nn.Linear
        q_norm: nn.Module
        k_norm: nn.Module
        attn_drop: nn.Dropout
        norm: nn.Module
        gate: nn.Linear | None
        proj: nn.Linear
        proj_drop: nn.Dropout

    @classmethod
    def adopt(cls, attn: Any, qk_dim: int, v_dim: int, q_norm: nn.Module, k_norm: nn.Module) -> None:
        """Convert timm's ``Attention`` (or this class) to this class in place, so that its hooks and modes stay."""
        attn.__class__ = cls
        attn.qk_dim, attn.v_dim = qk_dim, v_dim
        attn.head_dim = qk_dim
        attn.attn_dim = attn.num_heads * v_dim
        attn.q_norm, attn.k_norm = q_norm, k_norm

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        """Attend over (B, N, C); ``attn_mask`` and ``is_causal`` as in timm's ``Attention``."""
        B, N, _ = x.shape  # noqa: N806
        qk_all, v_all = self.num_heads * self.qk_dim, self.num_heads * self.v_dim
        q, k, v = self.qkv(x).split([qk_all, qk_all, v_all], dim=-1)
        q = self.q_norm(q.reshape(B, N, self.num_heads, self.qk_dim).transpose(1, 2))
        k = self.k_norm(k.reshape(B, N, self.num_heads, self.qk_dim).transpose(1, 2))
        v = v.reshape(B, N, self.num_heads, self.v_dim).transpose(1, 2)

        if self.fused_attn:
            dropout = self.attn_drop.p if self.training else 0.0
            y = attend_padded(q, k, v, self.qk_dim, self.v_dim, attn_mask, dropout, is_causal, self.scale)
        else:
            attn = (q * self.scale) @ k.transpose(-2, -1)
            attn = maybe_add_mask(attn, resolve_self_attn_mask(N, attn, attn_mask, is_causal))
            y = (self.attn_drop(attn.softmax(dim=-1)) @ v).transpose(1, 2)

        y = self.norm(y.reshape(B, N, v_all))
        if self.gate is not None:
            y = y * self.gate(x).sigmoid()
        out: torch.Tensor = self.proj_drop(self.proj(y))
        return out

    def extra_repr(self) -> str:
        """Return the sizes, for print(model)."""
        return f"num_heads={self.num_heads}, qk_dim={self.qk_dim}, v_dim={self.v_dim}, scale={self.scale:.6g}"


@contextmanager
def split_attention(model: nn.Module) -> Iterator[None]:
    """Let timm's attention modules compute as ``PrunedAttention`` does while the block runs: in at most four axes."""
    found: list[Any] = [module for module in model.modules() if type(module) is Attention]
    try:
        for attn in found:
            PrunedAttention.adopt(attn, attn.head_dim, attn.head_dim, attn.q_norm, attn.k_norm)
        yield
    finally:
        for attn in found:
            attn.__class__ = Attention
            for attribute in ("qk_dim", "v_dim"):
                vars(attn).pop(attribute, None)


class PrunedBlock(Attends, Block):
    """timm's ``Block`` that may lack its attention, its FFN, or both (``Absent``), or run for the first tokens alone.

    A block without both returns its input. It stays in the model, so that the numbers of all blocks, and timm's
    information about them, remain valid.
    """

    def forward(
        self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False, queries: int = 0
    ) -> torch.Tensor:
        """Add the outputs of the remaining layers to (B, N, C), for the first ``queries`` tokens unless that is 0.

        Other arguments as in timm's ``Block``. torch.fx traces all tokens.
        """
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            queries = 0 if is_traced(x) else queries
        if hasattr(self.attn, "absent"):
            if queries > 0:
                x = x[:, :queries]
            if not torch.jit.is_scripting():  # type: ignore[attr-defined]
                x = go_past(self, x, "attn")
        else:
            if queries > 0 and is_causal:
                # They see no token after them.
                x = x[:, :queries]
                queries = 0
            if queries > 0:
                y = self.attend(self.norm1(x), queries, attn_mask)
                x = x[:, :queries]
            else:
                y = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
            x = x + self.drop_path1(self.ls1(y))
        if hasattr(self.mlp, "absent"):
            if not torch.jit.is_scripting():  # type: ignore[attr-defined]
                x = go_past(self, x, "mlp")
        else:
            x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x


class PrunedResPostBlock(Attends, ResPostBlock):
    """As ``PrunedBlock``, for timm's ``ResPostBlock``, which normalises what it adds."""

    def forward(
        self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False, queries: int = 0
    ) -> torch.Tensor:
        """Add the outputs of the remaining layers to (B, N, C), for the first ``queries`` tokens unless that is 0.

        Other arguments as in timm's class. torch.fx traces all tokens.
        """
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            queries = 0 if is_traced(x) else queries
        if hasattr(self.attn, "absent"):
            if queries > 0:
                x = x[:, :queries]
            if not torch.jit.is_scripting():  # type: ignore[attr-defined]
                x = go_past(self, x, "attn")
        else:
            if queries > 0 and is_causal:
                x = x[:, :queries]
                queries = 0
            if queries > 0:
                y = self.attend(x, queries, attn_mask)
                x = x[:, :queries]
            else:
                y = self.attn(x, attn_mask=attn_mask, is_causal=is_causal)
            x = x + self.drop_path1(self.norm1(y))
        if hasattr(self.mlp, "absent"):
            if not torch.jit.is_scripting():  # type: ignore[attr-defined]
                x = go_past(self, x, "mlp")
        else:
            x = x + self.drop_path2(self.norm2(self.mlp(x)))
        return x


class PrunedAttentionPoolLatent(AttentionPoolLatent):
    """timm's latent attention pool for an input that is narrower than all its heads together.

    timm's class reshapes the attended values to the input's width, which is heads · head_dim only before a width cut.
    """

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Pool (B, N, C) into (B, out_features)."""
        B, N, _ = x.shape  # noqa: N806
        if self.pos_embed is not None:
            x = x + self.pos_embed.unsqueeze(0).to(x.dtype)
        q = self.q(self.latent.expand(B, -1, -1))
        q = q.reshape(B, self.latent_len, self.num_heads, self.head_dim).transpose(1, 2)
        k, v = self.kv(x).reshape(B, N, 2, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused_attn:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        else:
            attn = maybe_add_mask((q * self.scale) @ k.transpose(-2, -1), attn_mask)
            y = attn.softmax(dim=-1) @ v
        y = y.transpose(1, 2).reshape(B, self.latent_len, self.num_heads * self.head_dim)
        y = self.proj_drop(self.proj(y))
        if self.mlp is not None:
            y = y + self.mlp(self.norm(y))
        if self.pool == "token":
            y = y[:, 0]
        elif self.pool == "avg":
            y = y.mean(1)
        out: torch.Tensor = y
        return out
