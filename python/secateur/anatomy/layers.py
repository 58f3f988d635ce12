"""The layers of a model: where their tensors are seen, and how they write to the residual stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Layout = Literal["exact", "stock"]


@dataclass(frozen=True)
class AttentionSite:
    """Where one attention layer's queries, keys and values can be read during a forward pass.

    ``qkv`` outputs (B, N, heads · (2 qk_dim + v_dim)): queries, keys, values, of what ``norm`` outputs, None where no
    norm of the residual stream is in front. ``q_norm`` and ``k_norm``, where there are any, output
    (B, heads, N, qk_dim) and are what the scores see; ``qk_normed`` says of which kind both are, None unless both are
    of one and have a scale. ``proj`` takes (B, N, heads · v_dim), of the norm ``inner`` if one is right in front.
    ``softmax_scale`` multiplies the scores. ``layout`` is "stock" where the module is the library's own class, cut or
    not, and "exact" where it is ours. ``qk``, ``v``, ``heads_group`` and ``layer`` name the groups; ``branch`` is the
    module whose output the layer adds to the residual stream, a norm's if ``post_norm``.
    """

    name: str
    qk: str
    v: str
    heads_group: str
    layer: str
    heads: int
    qk_dim: int
    v_dim: int
    softmax_scale: float
    layout: Layout
    qkv: str
    q_norm: str | None
    k_norm: str | None
    proj: str
    branch: str
    norm: str | None = None
    qk_normed: Literal["layer", "rms"] | None = None
    scale: str | None = None
    between: str | None = None
    inner: NormSite | None = None
    post_norm: bool = False

    @property
    def writer(self) -> str:
        """The linear layer that the layer ends in."""
        return self.proj


@dataclass(frozen=True)
class FfnSite:
    """Where one FFN's hidden units, after the activation, enter the second layer: (B, N, size); LayerScale follows.

    ``inner`` is the norm right in front of that, if there is one. ``ffn`` and ``layer`` name the groups; ``branch`` is
    the module whose output is added to the residual stream.
    """

    name: str
    ffn: str
    layer: str
    size: int
    fc2: str
    branch: str
    scale: str | None = None
    inner: NormSite | None = None
    post_norm: bool = False

    @property
    def writer(self) -> str:
        """The linear layer that the layer ends in."""
        return self.fc2


@dataclass(frozen=True)
class Source:
    """What adds to the residual stream at one place: linear layers with the LayerScale that follows, and parameters."""

    writers: Mapping[str, str | None]
    tokens: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stream:
    """The residual stream, where every reader of it is a norm: then an orthogonal change of its basis changes nothing.

    ``writers`` are the linear layers and convolutions that add to it, each with the LayerScale that follows or None;
    ``tokens`` the parameters (1, N, width) that do; ``readers`` maps each norm to the linear layers behind it. Norms
    are LayerNorms if ``centred``, else RMSNorms.
    """

    centred: bool
    writers: Mapping[str, str | None]
    tokens: tuple[str, ...]
    readers: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class NormSite:
    """A norm over the ``size`` channels of the residual stream, or over a layer's values or hidden units.

    ``centred`` for LayerNorm, not for RMSNorm; ``pooled`` where it comes after pooling.
    """

    name: str
    size: int
    centred: bool
    pooled: bool
