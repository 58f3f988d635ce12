"""An entry of the attention table, and the registry that finds it by the exact class of a module."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...anatomy import Group, Layer, parameter_name
from ...anatomy.costs import AttentionProduct, PartProduct, Product, WeightProduct
from ...errors import InvalidArgument, Unsupported
from ...registry import Registry
from .parts import Parts, UnitKind

__all__ = ["Attention", "Call", "Described", "attention_entry", "register"]


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments with which a model calls an attention module, for ``images`` images at once.

    Only the shapes of tensors count, so those of the meta device will do.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    images: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the module's input."""
        return tuple(self.args[0].shape)

    def given(self, index: int, name: str) -> Any:
        """Return an argument by its position or its name, None if it is not given."""
        return self.args[index] if len(self.args) > index else self.kwargs.get(name)


@dataclass(frozen=True, eq=False)
class Described:
    """What an attention module can lose.

    ``groups`` are those of kind "qk", "v" and "heads", named after the module, which has no group of kind "layer" here.
    ``products`` are its costs, ``layer`` says where its tensors are observed; None where neither scores nor values are
    what other classes have. ``refused`` maps each kind that it cannot lose to the reason. ``buffers`` maps each buffer
    that loses entries to its shape; ``prepare`` adds those that the library's class does not have.
    """

    groups: tuple[Group, ...]
    products: tuple[Product, ...]
    layer: Layer | None
    refused: Mapping[str, str]
    buffers: Mapping[str, tuple[int, ...]]


class Attention(ABC):
    """What is known of some attention classes; a subclass registers itself with ``register``.

    ``modules`` maps each of the library's classes to the class that a module becomes when it is cut, None where its own
    holds any sizes. They are accepted by exact class, since a subclass may compute anything. ``once`` names modules
    within that run once for all images.
    """

    name: ClassVar[str]
    modules: ClassVar[Mapping[type[nn.Module], type[nn.Module] | None]]
    once: ClassVar[tuple[str, ...]] = ()

    def accepts(self, module: nn.Module) -> bool:
        """Return whether this entry describes the module."""
        return type(module) in self.modules or type(module) in self.modules.values()

    @abstractmethod
    def parts(self, module: Any, call: Call) -> Parts:
        """Return which rows, columns and other entries belong to the units of each kind, by names within the module."""

    def keys(self, module: Any, call: Call, positions: Mapping[str, int]) -> int:
        """Return the number of keys that a query sees; ``positions`` counts at how many places layers are applied."""
        del module, positions
        return call.shape[-2]

    def queries(self, module: Any, call: Call, positions: Mapping[str, int], parts: Parts) -> int:
        """Return the number of queries for one image, in all windows."""
        del module, call
        return positions[parts.writer]

    def prepare(self, module: Any, call: Call) -> None:
        """Add the buffers that members name and the library's class does not have; called before a cut.

        They are no part of the module's state until it is cut.
        """
        del module, call

    @abstractmethod
    def fit(self, module: Any, sizes: Mapping[str, int]) -> None:
        """Make the module compute with parameters and buffers that were just cut.

        Args:
            module: a module whose tensors have ``sizes``; it remains the same object.
            sizes: units that remain, by kind: "qk" and "v" per head, "heads"; kinds without a group keep their size.
                It is called after every cut of a model, also where the module lost nothing.
        """

    def describe(self, module: nn.Module, name: str, call: Call, block: int | None = None) -> Described:
        """Describe what a module called ``name`` can lose.

        Args:
            module: a module of one of the entry's classes. It is not changed.
            name: its name in the model, with which all other names begin.
            call: how the model calls it.
            block: the number of the block that it is in.

        Raises:
            Unsupported: a module within it is of a class that is not known, or its tensors are computed by hooks.
        """
        try:
            parts = self.parts(module, call)
        except Unsupported as error:
            raise Unsupported(f"{name}.{error}") from error
        kinds: tuple[UnitKind, ...] = ("qk", "v", "heads")
        groups: dict[str, str] = {kind: f"{name}.{kind}" for kind in kinds if kind not in parts.refused}
        for kind in parts.refused.keys() & {"qk", "v"} if "heads" in groups else ():
            # What cannot leave unit by unit leaves with its head.
            whole = [replace(m, entries=m.entries.reshape(1, parts.heads, -1)) for m in parts.members[kind]]
            parts.members["heads"].extend(whole)
        within = groups.get("heads")
        made = []
        for kind in (each for each in kinds if each in groups):
            group = groups[kind]
            members = tuple(replace(m, tensor=parameter_name(name, m.tensor)) for m in parts.members[kind])
            if kind == "heads":
                made.append(Group(group, "heads", block, parts.heads, members))
            elif kind in parts.tied:  # all heads keep the same units
                made.append(Group(group, kind, block, parts.sizes[kind], members))
            else:
                size, heads = parts.sizes[kind], parts.heads
                made.append(Group(group, kind, block, size, members, heads, within=within))
        positions = _positions(module, call, self.once)
        for tap in parts.taps.values():
            # Where a bias is apart, timm takes the weight without calling the layer; it sees the same tokens.
            positions.setdefault(tap.module, positions[parts.writer])
        return Described(
            groups=tuple(made),
            products=self._products(module, name, call, parts, groups, positions),
            layer=self._layer(module, name, call, parts, groups) if parts.scored else None,
            refused=dict(parts.refused),
            buffers={parameter_name(name, each): shape for each, shape in parts.buffers.items()},
        )

    def _products(
        self,
        module: Any,
        name: str,
        call: Call,
        parts: Parts,
        groups: Mapping[str, str],
        positions: Mapping[str, int],
    ) -> tuple[Product, ...]:
        def factor(kind: str) -> int | str:
            kind = parts.in_place_of.get(kind, kind)
            return groups.get(kind, parts.heads if kind == "heads" else parts.sizes[kind])

        heads, qk, v = map(factor, ("heads", "qk", "v"))
        products: list[Product] = []
        for each, places in positions.items():
            if each in parts.depthwise:
                # Its kernels are shared by all heads or each head's own: as many products.
                kind, weight = parts.depthwise[each], module.get_submodule(each).weight
                places = places * weight.numel() // (parts.heads * parts.sizes[kind])
                products.append(PartProduct(parameter_name(name, each), places, (heads, factor(kind))))
            else:
                products.append(WeightProduct(parameter_name(name, each), places))
        queries = self.queries(module, call, positions, parts) * parts.shared_by
        keys = self.keys(module, call, positions)
        products.append(AttentionProduct(name, queries, keys, heads, qk, v))
        # A rotary pair is one unit, but two channels.
        products += [PartProduct(name, queries * keys, (heads, qk)) for _ in range(1, parts.channels)]
        for each, places, kinds in parts.products:
            where = parameter_name(name, each) if each else name
            products.append(PartProduct(where, places, tuple(map(factor, kinds))))
        return tuple(products)

    def _layer(self, module: Any, name: str, call: Call, parts: Parts, groups: Mapping[str, str]) -> Layer:
        taps, inner = {}, parts.inner_site
        for part, tap in parts.taps.items():
            group = groups.get("qk" if part in ("query", "key") else "v", name)
            stored = (
                parameter_name(name, parts.writer) if part == "output" else f"{name} v" if part == "value" else group
            )
            label = name if part in ("query", "key") else stored
            windows = call.shape[0] // call.images
            each = {"maps_per_image": windows} if part in ("query", "key") else {"view": _joined(tap.view, windows)}
            taps[part] = replace(tap, name=stored, label=label, module=parameter_name(name, tap.module), **each)
        return Layer(
            name=name,
            kind="attention",
            groups=groups,
            taps=taps,
            writer=parameter_name(name, parts.writer),
            branch=name,
            norms={part: parameter_name(name, norm) for part, norm in parts.norms.items()},
            inner=None if inner is None else replace(inner, name=parameter_name(name, inner.name)),
            fixed=dict(parts.fixed),
            softmax_scale=parts.scale,
            layout="stock" if type(module) in self.modules else "exact",
        )


def _joined(view: Callable[[Tensor], Tensor], windows: int) -> Callable[[Tensor], Tensor]:
    """Let a view of (B · windows, N, C) be one of all tokens of an image, (B, windows · N, C)."""
    if windows == 1:
        return view

    def joined(x: Tensor) -> Tensor:
        y = view(x)
        return y.reshape(-1, windows * y.shape[1], y.shape[2])

    return joined


def _positions(module: nn.Module, call: Call, once: tuple[str, ...]) -> dict[str, int]:
    """Count at how many places of one image each linear layer and convolution is applied, by running only shapes."""

    def meta(x: Any) -> Any:
        return x.detach().to("meta") if isinstance(x, Tensor) else x

    made: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        made[id(tensor)] = meta(tensor)
        if isinstance(tensor, nn.Parameter):
            made[id(tensor)] = nn.Parameter(made[id(tensor)], tensor.requires_grad)
    bare, found = copy.deepcopy(module, made), dict[str, int]()

    def count(name: str, channels_last: bool) -> Any:
        def hook(_: Any, __: Any, out: Tensor) -> None:
            channels = out.shape[-1] if channels_last else out.shape[1]
            images = 1 if name.startswith(once) else call.images
            found[name] = found.get(name, 0) + out.numel() // channels // images

        return hook

    for name, child in bare.named_modules():
        if isinstance(child, (nn.Linear, nn.Conv2d)):
            child.register_forward_hook(count(name, isinstance(child, nn.Linear)))
    with torch.no_grad():
        bare(*map(meta, call.args), **{name: meta(value) for name, value in call.kwargs.items()})
    return found


entries: Registry[Attention] = Registry(
    "attention", "secateur.families.attentions", "secateur.attentions", members=("modules", "parts", "fit")
)
register = entries.register


def attention_entry(module: nn.Module) -> Attention | None:
    """Return the entry of a module's class, or None if the table has none.

    Raises:
        InvalidArgument: not an nn.Module.
    """
    if not isinstance(module, nn.Module):
        raise InvalidArgument(f"module: expected nn.Module, got {type(module).__name__}")
    return next((entry for entry in entries if entry.accepts(module)), None)
