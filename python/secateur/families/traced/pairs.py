"""FFN layers of timm's models: pairs of linear layers or 1x1 convolutions whose hidden units nothing else uses.

A layer is taken if its module is of a class that is known exactly, and if a run without values shows that the model
uses it as that class is written: for tokens of images, and none of its weights anywhere else.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Any, NamedTuple

from timm.layers import BatchNormAct2d, ConvMlp, GatedMlp, GlobalResponseNormMlp, GluMlp, Mlp, SwiGLU
from timm.layers.grn import GlobalResponseNorm
from timm.models import (
    efficientformer,
    efficientformer_v2,
    efficientvit_msra,
    fastvit,
    levit,
    pvt_v2,
    swiftformer,
    tiny_vit,
    visformer,
)
from torch import Tensor, nn

from ...anatomy import Anatomy, Group, Indices, Layer, Member, NormSite, Tap, unit_entries
from ...data.model_input import data_config
from ...errors import InvalidArgument, Unsupported
from ..base import refuse_computed, unsupported
from ..walk import Walk, identity
from .flow import Used, flow

__all__ = ["KNOWN", "accepts", "inspect"]


class _Form(NamedTuple):
    """Where a class of FFN layers keeps what it computes.

    ``branches`` compute the hidden units, which ``writer`` reads; ``norms`` are over them; ``depthwise`` convolutions
    look at each alone, as the activations do: modules whose names begin with those of ``acts``. ``batch_norm``
    normalises what the writer returns, and takes its bias where the layer can be fused.
    """

    branches: tuple[str, ...] = ("fc1",)
    writer: str = "fc2"
    norms: tuple[str, ...] = ()
    depthwise: tuple[str, ...] = ()
    acts: tuple[str, ...] = ("act",)
    batch_norm: str | None = None


_CONV_NORM = _Form(("fc1.conv",), "fc2.conv", ("fc1.bn", "mid.bn"), ("mid.conv",), ("fc1.bn.act", "mid.bn.act"))
# A gated unit of GluMlp has two rows.
_FORMS: Mapping[type[nn.Module], _Form] = {
    Mlp: _Form(norms=("norm",)),
    ConvMlp: _Form(norms=("norm",)),
    GluMlp: _Form(norms=("norm",)),
    SwiGLU: _Form(("fc1_g", "fc1_x"), norms=("norm",)),
    GlobalResponseNormMlp: _Form(),
    GatedMlp: _Form(norms=("norm",)),
    efficientformer.ConvMlpWithNorm: _Form(norms=("norm1",)),
    efficientformer_v2.ConvMlpWithNorm: _CONV_NORM,
    efficientvit_msra.ConvMlp: _Form(("pw1.conv",), "pw2.conv", ("pw1.bn",), batch_norm="pw2.bn"),
    fastvit.ConvMlp: _Form(),
    levit.LevitMlp: _Form(("ln1.linear",), "ln2.linear", ("ln1.bn",), batch_norm="ln2.bn"),
    pvt_v2.MlpWithDepthwiseConv: _Form(depthwise=("dwconv",), acts=("act", "relu")),
    swiftformer.Mlp: _Form(),
    tiny_vit.NormMlp: _Form(),
    visformer.SpatialMlp: _Form(("conv1",), "conv3", acts=("act1",)),
}
KNOWN = "Mlp, ConvMlp, GluMlp, SwiGLU, GlobalResponseNormMlp, GatedMlp or another class of docs/families.md"
_NOTHING = (nn.Identity, nn.Dropout)
_LIKE = ("mlp", "ffn", "feedforward", "glu")
_HEADS = ("head", "pre_logits")


def accepts(model: nn.Module) -> bool:
    """Return whether a model is timm's, by exact class, and has FFN layers; not one in timm's wrappers for features."""
    cls = type(model)
    whole = hasattr(cls, "reset_classifier") or hasattr(model, "pretrained_cfg")
    ours = cls.__module__.startswith("timm.models.") and whole
    wrapped = cls.__module__.startswith("timm.models._")
    if not ours or wrapped or getattr(sys.modules[cls.__module__], cls.__name__, None) is not cls:
        return False
    return next(_ffn_layers(model), None) is not None


def inspect(model: nn.Module, family: str) -> Anatomy:
    """Find a model's FFN layers, which are cut, and those that are not, with reasons.

    Raises:
        Unsupported: there is none to cut, or the model cannot run without values.
    """
    return _Inspection(model).anatomy(family)


def _ffn_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield modules that are FFN layers by their class or its name, outermost only; not those of classifiers."""
    within = ""
    for name, module in model.named_modules():
        cls = type(module)
        inside = bool(within) and name.startswith(f"{within}.")
        if not name or inside or any(part in _HEADS for part in name.split(".")):
            continue
        if cls in _FORMS or (any(word in cls.__name__.lower() for word in _LIKE) and any(_linear(module))):
            within = name
            yield name, module


def _linear(module: nn.Module) -> Iterator[bool]:
    return (isinstance(each, (nn.Linear, nn.Conv2d)) for each in module.modules())


class _Pair(NamedTuple):
    group: Group
    form: _Form
    inner: NormSite | None
    image: bool  # channels are the second axis, not the last

    def used(self) -> Used:
        return Used(self.group, self.form.writer, self.form.acts)


class _Inspection(Walk):
    """Finds FFN layers one by one, then follows the model to see how it uses them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.refused: dict[str, str] = {}
        self.pairs: dict[str, _Pair] = {}
        self.shared = _shared(model)
        self.input_size = _input_size(model)

    def anatomy(self, family: str) -> Anatomy:
        """Describe the model, or raise Unsupported."""
        model, cls = self.model, type(self.model).__name__
        for name, module in _ffn_layers(model):
            try:
                self.pairs[name] = self.pair(name, module)
            except Unsupported as error:
                self.refused[name] = str(error)
        found = flow(model, self.input_size, {name: pair.used() for name, pair in self.pairs.items()})
        layers: dict[str, Layer] = {}
        for name, pair in list(self.pairs.items()):
            reason = found.reasons.get(name)
            if reason is not None:
                self.refused[name] = reason
                del self.pairs[name]
            else:
                layers[name] = _layer(name, pair, found.folded[name])
        if not self.pairs:
            reason = next(iter(self.refused.values()))
            raise Unsupported(f"model: expected {cls} with FFN layers of {KNOWN} to cut: {reason}")
        architecture, arguments, handmade = identity(model)
        groups = tuple(pair.group for pair in self.pairs.values())
        cut = {member.tensor for group in groups for member in group.members}
        shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
        weights = {name.removesuffix(".weight"): prod(shapes[name]) for name in cut if name.endswith(".weight")}
        return Anatomy(
            family=family,
            architecture=architecture,
            arguments=arguments,
            input_size=self.input_size,
            groups=groups,
            layers=layers,
            norms=(),
            products=tuple(found.products(weights)),
            shapes=shapes,
            buffers={name: tuple(tensor.shape) for name, tensor in model.named_buffers() if name in cut},
            refused={**_others(model), **self.refused},
            handmade=handmade,
        )

    def pair(self, name: str, module: Any) -> _Pair:
        """Describe one FFN layer, or raise Unsupported naming the module and the reason."""
        cls = type(module)
        if cls not in _FORMS:
            raise unsupported(name, module, KNOWN)
        form = _FORMS[cls]
        writer = f"{name}.{form.writer}"
        size = int(self.linear(writer).weight.shape[1])
        image = isinstance(self.linear(writer), nn.Conv2d)
        gated = cls is GluMlp
        rows = unit_entries(size, copies=2, stride=size) if gated else unit_entries(size)
        units, members, inner = unit_entries(size), list[Member](), None
        for child in ("drop", "drop1", "drop2", "gate"):
            part = getattr(module, child, None)
            if part is not None and type(part) not in _NOTHING:
                raise unsupported(f"{name}.{child}", part, "nn.Dropout or nn.Identity")
        if getattr(module, "spatial_conv", False):
            raise Unsupported(f"{name}.conv2: expected no grouped convolution of hidden units, got one")
        for branch in form.branches:
            self.whole(f"{name}.{branch}", rows.size)
            self.rows(f"{name}.{branch}", members, "writer", "hidden", rows)
        if cls is GlobalResponseNormMlp:
            if type(module.grn) is not GlobalResponseNorm:
                raise unsupported(f"{name}.grn", module.grn, "GlobalResponseNorm")
            self.norm_members(f"{name}.grn", module.grn, members, "output", units)
        for child in self.present(name, form.norms):
            norm = self.model.get_submodule(child)
            if type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d, BatchNormAct2d):
                self.batch_norm(child, norm, members, units)
            elif image:
                raise unsupported(child, norm, "nn.BatchNorm2d or nn.Identity")
            else:
                self.norm(child, members, "output", units)
                inner = self.inner(child, size)
        for child in self.present(name, form.depthwise):
            self.depthwise(child, size)
            self.rows(child, members, "elementwise", "hidden", units)
        self.whole(writer, size, reads=True)
        self.columns(writer, members, "output", units)
        for tensor in (member.tensor for member in members):
            if tensor in self.shared:
                raise Unsupported(f"{tensor}: expected a parameter of its own, got one tied to {self.shared[tensor]}")
        parent, _, child = name.rpartition(".")
        group = f"{parent}.ffn" if child == "mlp" else f"{name}.ffn"
        return _Pair(Group(group, "ffn", None, size, tuple(members)), form, inner, image)

    def present(self, name: str, children: tuple[str, ...]) -> Iterator[str]:
        """Yield the names of those modules of a layer that are there."""
        for child in children:
            module: Any = self.model.get_submodule(name)
            for part in child.split("."):
                module = getattr(module, part, None)
            if module is not None and type(module) is not nn.Identity:
                yield f"{name}.{child}"

    def depthwise(self, name: str, size: int) -> None:
        """Refuse a convolution that mixes hidden units."""
        layer = self.linear(name)
        if not isinstance(layer, nn.Conv2d) or not layer.groups == layer.in_channels == layer.out_channels == size:
            raise Unsupported(f"{name}: expected a depthwise convolution of {size} hidden units, got {layer}")

    def whole(self, name: str, size: int, *, reads: bool = False) -> None:
        """Refuse a layer that splits its inputs into groups, looks at neighbours or is of another size."""
        layer = self.linear(name)
        image = isinstance(layer, nn.Conv2d)
        if image and (layer.groups != 1 or layer.kernel_size != (1, 1)):
            raise Unsupported(f"{name}: expected a 1x1 convolution, got {layer}")
        if layer.weight.shape[int(reads)] != size:
            raise Unsupported(f"{name}: expected {size} hidden units, got a weight of {tuple(layer.weight.shape)}")

    def batch_norm(self, name: str, norm: Any, members: list[Member], units: Indices) -> None:
        """Add all that a batch norm has for each unit."""
        refuse_computed(name, norm)
        for tensor in ("weight", "bias", "running_mean", "running_var"):
            if getattr(norm, tensor) is not None:
                members.append(Member(f"{name}.{tensor}", 0, units, "hidden", "elementwise"))


def _layer(name: str, pair: _Pair, folded: int) -> Layer:
    writer, group = f"{name}.{pair.form.writer}", pair.group
    view = _tokens(pair.image, folded)
    return Layer(
        name=name,
        kind="ffn",
        groups={"ffn": group.name},
        taps={"hidden": Tap(group.name, writer, writer, "input", group.size, view=view)},
        writer=writer,
        branch=name,
        stream=name,
        inner=pair.inner,
        channel_axis=1 if pair.image else -1,
        batch_norm=None if pair.form.batch_norm is None else f"{name}.{pair.form.batch_norm}",
    )


def _tokens(image: bool, folded: int) -> Callable[[Tensor], Tensor]:
    """Return what brings hidden units to (B, N, units), where ``folded`` parts of an image are images of their own."""

    def view(x: Tensor) -> Tensor:
        if image:
            x = x.flatten(2).transpose(1, 2)
        x = x[:, None] if x.ndim == 2 else x.flatten(1, -2)
        if len(x) % folded:
            raise InvalidArgument(f"loader: expected images of the model's size, got {len(x)} parts, not {folded} each")
        return x.reshape(len(x) // folded, -1, x.shape[-1])

    return view


def _shared(model: nn.Module) -> dict[str, str]:
    """Map the names of parameters that have several to another one of the same parameter."""
    first: dict[int, str] = {}
    shared: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        if other != name:
            shared |= {name: other, other: name}
    return shared


def _others(model: nn.Module) -> dict[str, str]:
    """Say of each other kind why it is not cut."""
    cls = type(model).__name__
    classes = {type(each).__name__ for each in model.modules() if "attention" in type(each).__name__.lower()}
    inside = f"in {cls}, the FFN layers alone are known"
    attention = f"{inside}, not {', '.join(sorted(classes))}" if classes else inside
    return {**dict.fromkeys(("qk", "v", "heads"), attention), **dict.fromkeys(("width", "layer", "conv"), inside)}


def _input_size(model: nn.Module) -> tuple[int, int, int]:
    # Not every class keeps the size that it was built for.
    recorded = identity(model)[1].get("img_size")
    channels, height, width = data_config(model)["input_size"]
    if recorded is not None:
        height, width = (recorded, recorded) if isinstance(recorded, int) else recorded
    return int(channels), int(height), int(width)
