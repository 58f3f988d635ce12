"""The layers of a model: where their tensors are seen, and how they write to the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from .groups import Part

Layout = Literal["exact", "stock"]
LastBlock = Literal["whole", "pooled"]
RowNorm = Literal["none", "rms", "layer"]
LayerKind = Literal["attention", "ffn"]


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _with_tokens(x: Tensor) -> Tensor:
    """Return (B, C) as one token per image, (B, …, C) with all positions as tokens."""
    return x[:, None] if x.ndim == 2 else x.flatten(1, -2)


@dataclass(frozen=True, eq=False)
class Tap:
    """Where a tensor is observed in a forward pass.

    It is the input or output of ``module``, restricted to ``channels`` of the last axis if given. ``view`` turns that
    into the observed tensor: (B · maps_per_image, N, heads, head_dim) for queries and keys, else (B, N, channels). Its
    sums are stored under ``name``; errors call it ``label``. For the input x of a ``norm``, x̂ = x √D / ‖x‖ is
    observed, after centring if the norm is "layer".
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
        """Return the observed tensor, given the module's input or output."""
        return self.view(x if self.channels is None else x[..., self.channels])


@dataclass(frozen=True)
class NormSite:
    """A norm over the ``size`` channels of a residual stream, or over a layer's values or hidden units.

    ``centred`` is true for LayerNorm, false for RMSNorm; ``pooled`` is true after pooling. ``stream`` names the group
    of the stream's channels.
    """

    name: str
    size: int
    centred: bool
    pooled: bool
    stream: str = "width"

    @property
    def tap(self) -> Tap:
        """The norm's input, normalised, as an observation."""
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
    """One attention or FFN layer with its groups and its surroundings.

    ``name`` is the group of kind "layer" that stands for the whole layer; ``groups`` maps a kind ("qk", "v", "heads";
    "ffn") to its group. ``taps`` says where its parts are observed: "query", "key", "value" and "output" (the input of
    the projection), or "hidden" (the input of the second linear layer). ``writer`` is its last linear layer, ``scale``
    the LayerScale after that, ``branch`` the module whose output is added to the residual ``stream`` (a norm if
    ``post_norm``). ``readers`` are the linear layers that read the layer's input, after ``input_norm`` if there is
    one; empty where something else reads it too. ``norms`` are those of queries and keys and
    ``score_norm`` is their type, None unless both have the same type and a scale; ``inner`` is a norm directly before
    the writer. ``fixed`` maps parts whose basis must not be rotated to the reason. ``softmax_scale`` multiplies the
    scores. The ``layout`` of attention is "stock" if the module is the library's own class, cut or not, else "exact".
    ``channel_axis`` is that of what the writer returns: 1 where it is a convolution. ``batch_norm`` normalises what a
    writer without a bias returns, and shifts it instead: the library fuses the two as if there were none.
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
    readers: tuple[str, ...] = ()
    norms: Mapping[Part, str] = field(default_factory=dict)
    score_norm: Literal["layer", "rms"] | None = None
    inner: NormSite | None = None
    fixed: Mapping[Part, str] = field(default_factory=dict)
    post_norm: bool = False
    softmax_scale: float = 1.0
    layout: Layout | None = None
    channel_axis: int = -1
    batch_norm: str | None = None

    @property
    def before_writer(self) -> Tap:
        """Where the writer's input is observed."""
        return self.taps["output"] if "output" in self.taps else self.taps["hidden"]


@dataclass(frozen=True)
class Source:
    """What adds to the residual stream at one place: linear layers, each with its LayerScale, and parameters."""

    writers: Mapping[str, str | None]
    tokens: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stream:
    """A residual stream that only norms consume, so that an orthogonal change of its basis changes nothing.

    ``writers`` are the linear layers and convolutions that add to it, each with the LayerScale after it or None;
    ``tokens`` are the parameters (1, N, width) that add to it; ``readers`` maps each norm to the linear layers after
    it. Norms are LayerNorms if ``centred``, else RMSNorms.
    """

    centred: bool
    writers: Mapping[str, str | None]
    tokens: tuple[str, ...]
    readers: Mapping[str, tuple[str, ...]]
