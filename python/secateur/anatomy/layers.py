"""The layers of a model: where their tensors are seen, and how they write to the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from .groups import Part

Layout = Literal["exact", "stock"]
RowNorm = Literal["none", "rms", "layer"]
LayerKind = Literal["attention", "ffn"]


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _with_tokens(x: Tensor) -> Tensor:
    """(B, C) as one token an image; (B, …, C) with all places as tokens."""
    return x[:, None] if x.ndim == 2 else x.flatten(1, -2)


@dataclass(frozen=True, eq=False)
class Tap:
    """Where a tensor is seen in a forward pass.

    It is the ``channels`` of the last axis, or all, of what ``module`` takes or outputs. ``view`` makes of that what is
    observed: (B · maps_per_image, N, heads, head_dim) of queries and keys, else (B, N, channels).
    ``name`` is what its sums are stored under, ``label`` what errors call it; of a ``norm``'s input x, x̂ = x √D / ‖x‖
    is observed, centred first for "layer".
    """

    name: str
    label: str
    module: str
    at: Literal["input", "output"]
    size: int
    channels: slice | None = None
    view: Callable[[Tensor], Tensor] = _as_it_is
    maps_per_image: int = 1
    norm: RowNorm = "none"

    def read(self, x: Tensor) -> Tensor:
        """What is observed of what the module takes or outputs."""
        return self.view(x if self.channels is None else x[..., self.channels])


@dataclass(frozen=True)
class NormSite:
    """A norm over the ``size`` channels of a residual stream, or over a layer's values or hidden units.

    ``centred`` for LayerNorm, not for RMSNorm; ``pooled`` where it comes after pooling. ``stream`` names the group of
    the stream's channels.
    """

    name: str
    size: int
    centred: bool
    pooled: bool
    stream: str = "width"

    @property
    def tap(self) -> Tap:
        """Its input, as the norm sees it."""
        return Tap(
            self.name,
            self.name,
            self.name,
            "input",
            self.size,
            view=_with_tokens,
            norm="layer" if self.centred else "rms",
        )


@dataclass(frozen=True, eq=False)
class Layer:
    """One attention or FFN layer with its groups, and what stands around them.

    ``name`` is the group of kind "layer" that removes it; ``groups`` maps a kind ("qk", "v", "heads"; "ffn") to its
    group. ``taps`` say where its parts are seen: "query", "key", "value" and "output", which the projection takes; or
    "hidden", which the second linear layer takes. ``writer`` is the linear layer that it ends in, ``scale`` the
    LayerScale after it, ``branch`` the module whose output is added to the residual ``stream``, a norm's if
    ``post_norm``. ``input_norm`` is the norm of the stream in front, ``norms`` those of queries and keys, which are
    ``score_norm``, None unless both are of one kind and have a scale; ``inner`` is a norm right in front of the writer.
    ``fixed`` maps parts whose basis must not be rotated to the reason. ``softmax_scale`` multiplies the scores.
    ``layout`` of attention is "stock" where the module is the library's own class, cut or not, else "exact".
    """

    name: str
    kind: LayerKind
    groups: Mapping[str, str]
    taps: Mapping[Part, Tap]
    writer: str
    branch: str
    stream: str = "width"
    scale: str | None = None
    input_norm: str | None = None
    norms: Mapping[Part, str] = field(default_factory=dict)
    score_norm: Literal["layer", "rms"] | None = None
    inner: NormSite | None = None
    fixed: Mapping[Part, str] = field(default_factory=dict)
    post_norm: bool = False
    softmax_scale: float = 1.0
    layout: Layout | None = None

    @property
    def before_writer(self) -> Tap:
        """Where the input of its writer is seen."""
        return self.taps["output" if self.kind == "attention" else "hidden"]


@dataclass(frozen=True)
class Source:
    """What adds to the residual stream at one place: linear layers with the LayerScale that follows, and parameters."""

    writers: Mapping[str, str | None]
    tokens: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stream:
    """A residual stream whose consumers are all norms: then an orthogonal change of its basis changes nothing.

    ``writers`` are the linear layers and convolutions that add to it, each with the LayerScale that follows or None;
    ``tokens`` the parameters (1, N, width) that do; ``readers`` maps each norm to the linear layers after it. Norms are
    LayerNorms if ``centred``, else RMSNorms.
    """

    centred: bool
    writers: Mapping[str, str | None]
    tokens: tuple[str, ...]
    readers: Mapping[str, tuple[str, ...]]
