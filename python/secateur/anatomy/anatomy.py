"""Describes what can be removed from a model and what is tied to it. Families build it, all other code consumes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from rich import box
from rich.table import Table

from ..errors import InvalidArgument
from . import costs as cost
from .groups import Group, Member, named, parameter_name
from .layers import LastBlock, Layer, LayerKind, NormSite, Source, Stream
from .show import render, units


@dataclass(frozen=True, eq=False)
class Anatomy:
    """What can be removed from a model: groups, layers, the places to observe them, and the exact costs.

    ``refused`` maps each kind that cannot be removed from this model to the reason. ``input_size`` is (channels,
    height, width). ``shapes`` maps each parameter to its shape, ``buffers`` each buffer that can lose entries.
    ``streams`` maps the channel group of each residual stream to how the stream can be rotated, or to the reason why it
    cannot. ``architecture`` and ``arguments`` rebuild the dense model; for a ``handmade`` model, whose construction was
    not recorded, they are its class name and empty. ``embedding`` is the source of the first block's input, None where
    a norm follows it. ``absent`` names the layers of the dense model that have been removed.

    ``last_block`` is "pooled" if the last block computes only the tokens that the output depends on, and
    ``default_last_block`` is what ``prune`` makes of it unless told otherwise; ``pooled_products`` are the products
    then, None where all tokens leave the model. ``tokens`` maps each group of kind "tokens" to the number of tokens
    after its block.
    """

    family: str
    architecture: str
    arguments: Mapping[str, Any]
    input_size: tuple[int, int, int]
    groups: tuple[Group, ...]
    layers: Mapping[str, Layer]
    norms: tuple[NormSite, ...]
    products: tuple[cost.Product, ...]
    shapes: Mapping[str, tuple[int, ...]]
    buffers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    handmade: bool = False
    streams: Mapping[str, Stream | str] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    embedding: Source | None = None
    last_block: LastBlock = "whole"
    default_last_block: LastBlock = "whole"
    pooled_products: tuple[cost.Product, ...] | None = None
    tokens: Mapping[str, cost.Tokens] = field(default_factory=dict)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Group name to its present size."""
        return {group.name: group.size for group in self.groups}

    @cached_property
    def merged(self) -> dict[str, int]:
        """Group of kind "tokens" to the number of tokens that its block merges now."""
        return {name: tokens.merges[-1].units - self.sizes[name] for name, tokens in self.tokens.items()}

    @property
    def fixed_sizes(self) -> dict[str, int]:
        """Group name to its present size, without groups of tokens of which none is merged: the weights' sizes."""
        return {name: size for name, size in self.sizes.items() if self.merged.get(name, 1)}

    @property
    def remains(self) -> dict[str, int]:
        """What remains of the dense model: group name to size, 0 for removed layers; no tokens that are all there."""
        return {**self.fixed_sizes, **dict.fromkeys(self.absent, 0)}

    def tokens_at(self, sizes: Mapping[str, cost.Size]) -> dict[str, cost.Size]:
        """Map each group of kind "tokens" to the number of tokens after its block, prefix tokens included."""
        return {name: tokens.at(self._size_in(sizes)) for name, tokens in self.tokens.items()}

    def counted(self, tokens: cost.Count) -> int:
        """Return a number of tokens as it is now."""
        return int(tokens.at(self._size_in({}))) if isinstance(tokens, cost.Tokens) else tokens

    @cached_property
    def tokens_of(self) -> dict[str, cost.Count]:
        """Layer name to the number of tokens that it maps, unless it is the last block's and that is pooled."""
        names = {layer.writer: layer.name for layer in self.layers.values()}
        weighed = [each for each in self.products if isinstance(each, cost.WeightProduct)]
        return {names[each.module]: each.positions for each in weighed if each.module in names}

    @cached_property
    def members_of(self) -> dict[str, tuple[tuple[Group, Member], ...]]:
        """Name of a parameter or buffer to its group members."""
        found: dict[str, list[tuple[Group, Member]]] = {}
        for group in self.groups:
            for member in group.members:
                found.setdefault(member.tensor, []).append((group, member))
        return {name: tuple(pairs) for name, pairs in found.items()}

    @cached_property
    def attention(self) -> tuple[Layer, ...]:
        """The attention layers, first to last."""
        return self.layers_of("attention")

    @cached_property
    def ffn(self) -> tuple[Layer, ...]:
        """The FFN layers, first to last."""
        return self.layers_of("ffn")

    def layers_of(self, kind: LayerKind) -> tuple[Layer, ...]:
        """Return the layers of one kind, first to last."""
        return tuple(layer for layer in self.layers.values() if layer.kind == kind)

    @cached_property
    def widths(self) -> tuple[Group, ...]:
        """The channels of residual streams, which many layers share."""
        return tuple(group for group in self.groups if group.traits.shared and not group.of_tokens)

    @property
    def stream_widths(self) -> dict[str, int]:
        """The sizes of residual streams by the names of their groups."""
        return {width.name: width.size for width in self.widths}

    @cached_property
    def head_norms(self) -> tuple[str, ...]:
        """The norms of queries and keys."""
        return tuple(name for layer in self.layers.values() for name in layer.norms.values())

    @cached_property
    def layer_of(self) -> dict[str, str]:
        """Group name to the name of its layer."""
        return {name: layer.name for layer in self.layers.values() for name in layer.groups.values()}

    def block_of(self, layer: Layer) -> int | None:
        """Return the number of the block that a layer is in, or None."""
        return self.group(next(iter(layer.groups.values()))).block

    @cached_property
    def layer_of_parameter(self) -> dict[str, str]:
        """Parameter name to the name of the layer that it is removed with."""
        return {name: layer for name in self.shapes if (layer := self.layer_holding(name)) is not None}

    def layer_holding(self, name: str) -> str | None:
        """Return the name of the layer that a module or parameter is removed with, or None."""
        while name:
            if name in self._removed_with:
                return self._removed_with[name]
            name = name.rpartition(".")[0]
        return None

    @cached_property
    def _removed_with(self) -> dict[str, str]:
        return {module: group.name for group in self.groups for module in group.modules}

    def require_layers(self, sizes: Mapping[str, int], argument: str) -> None:
        """Refuse sizes that would remove every attention layer or every FFN.

        Raises:
            InvalidArgument: no attention layer or no FFN would stay.
        """
        for what, layers in (("attention", self.attention), ("FFN", self.ffn)):
            if layers and not any(sizes.get(layer.name, 1) for layer in layers):
                raise InvalidArgument(f"{argument}: expected at least one {what} layer to stay, got none")

    def before(self, layer: str, gone: Container[str] = ()) -> Source | None:
        """Return what last writes to the residual stream before a layer, except the layers ``gone``.

        None if nothing can be added there because a norm follows.
        """
        names = list(self.layers)
        here = self.layers[layer]
        if here.post_norm:
            return None
        for name in reversed(names[: names.index(layer)]):
            other = self.layers[name]
            if other.stream == here.stream and name not in gone:
                return None if other.post_norm else Source({other.writer: other.scale})
        return self.embedding if here.stream == self.layers[names[0]].stream else None

    def group(self, name: str) -> Group:
        """Return the group called ``name``.

        Raises:
            InvalidArgument: there is none.
        """
        found = named(self.groups, name)
        if found is not None:
            return found
        raise InvalidArgument(f"group: expected one of {', '.join(self.sizes)}, got {name!r}")

    def numel(self, name: str, sizes: Mapping[str, cost.Size]) -> cost.Size:
        """Return the number of entries of a parameter or buffer when each group has the given size."""
        shape: list[cost.Size] = list(self.shapes[name] if name in self.shapes else self.buffers[name])
        extra: cost.Size = 1
        for group, member in self.members_of.get(name, ()):
            kept = sizes.get(group.name, group.size)
            heads = group.heads if group.within is None else sizes.get(group.within, group.heads)
            if member.shared:
                # A norm that all heads share is copied to each head once it is cut.
                shape[member.axis] = kept * member.copies
                extra = 1 + (kept != group.size) * (heads - 1)
            else:
                shape[member.axis] -= (group.size * group.heads - kept * heads) * member.copies
        layer = self.layer_of_parameter.get(name)
        return math.prod(shape, start=extra) * (1 if layer is None else sizes.get(layer, 1))

    def params_at(self, sizes: Mapping[str, cost.Size]) -> cost.Size:
        """Return the number of parameters when each named group has the given size, or array of sizes."""
        return sum(self.numel(name, sizes) for name in self.shapes)

    def macs_at(self, sizes: Mapping[str, cost.Size], last_block: LastBlock | None = None) -> cost.Size:
        """Return the MACs of one image when each named group has the given size, or array of sizes.

        The last block is as asked for, or else as ``prune`` makes it unless told otherwise.
        """
        pooled = (last_block or self.default_last_block) == "pooled" and self.pooled_products is not None
        return cost.macs(
            self.pooled_products if pooled and self.pooled_products is not None else self.products,
            lambda module, parameter: self.numel(parameter_name(module, parameter), sizes),
            self._size_in(sizes),
        )

    def _size_in(self, sizes: Mapping[str, cost.Size]) -> Callable[[str], cost.Size]:
        return lambda name: sizes.get(name, self.sizes[name])

    @cached_property
    def params(self) -> int:
        """Number of parameters."""
        return int(self.params_at({}))

    @cached_property
    def macs(self) -> int:
        """MACs of one image now: patch embedding, linear layers, attention products, matching of tokens, classifier."""
        return int(self.macs_at({}, self.last_block))

    def to_dict(self) -> dict[str, Any]:
        """Return the sizes and costs as JSON values."""
        return {
            "family": self.family,
            "architecture": self.architecture,
            "input_size": list(self.input_size),
            "params": self.params,
            "macs": self.macs,
            "groups": [
                {"name": g.name, "kind": g.kind, "block": g.block, "size": g.size, "heads": g.heads}
                for g in self.groups
            ],
            "tokens": {name: int(count) for name, count in self.tokens_at({}).items()},
            "last_block": self.last_block,
            "refused": dict(self.refused),
        }

    def __str__(self) -> str:
        size = "x".join(map(str, self.input_size))
        title = f"{self.architecture}: {units(self.params)} parameters, {units(self.macs)} MACs at {size}"
        channels = [group for group in self.groups if not group.traits.counted and not group.traits.shared]
        kinds = dict.fromkeys(group.kind for group in channels)
        per_head = {group.kind for group in channels if group.per_head}
        table = Table(box=box.SIMPLE)
        table.add_column("block")
        columns = [*(["heads"] if per_head else []), *(f"{k} per head" if k in per_head else k for k in kinds)]
        merging = any(self.merged.values())
        after = {self.group(name).block: str(count) for name, count in self.tokens_at({}).items()}
        for column in [*columns, *(["tokens after"] if merging else [])]:
            table.add_column(column, justify="right")
        rows: dict[str, dict[str, Group]] = {}
        for group in channels:
            # The filters of a CNN belong to no block.
            rows.setdefault(group.name if group.block is None else str(group.block), {})[group.kind] = group
        for name, found in rows.items():
            heads = next((str(group.heads) for group in found.values() if group.per_head), "")
            sizes = (str(found[kind].size) if kind in found else "" for kind in kinds)
            block = next(group.block for group in found.values())
            left = [after.get(block, "")] if merging else []
            table.add_row(name, *([heads] if per_head else []), *sizes, *left)
        widths = self.widths
        notes = [f"residual width {group.size}" + (f" ({group.name})" if len(widths) > 1 else "") for group in widths]
        notes += [f"without {', '.join(self.absent)}"] if self.absent else []
        notes += ["the last block computes prefix tokens only"] if self.last_block == "pooled" else []
        alike: dict[str, list[str]] = {}
        for kind, reason in self.refused.items():
            # Of many modules, the reason begins with the name of each.
            alike.setdefault(reason.removeprefix(f"{kind}: "), []).append(kind)
        notes += [f"{_few(kinds)} cannot be cut: {reason}" for reason, kinds in alike.items()]
        return "\n".join([title, render(table), *notes])


def _few(names: list[str], most: int = 6) -> str:
    """Join names; of very many the first ones, and how many there are besides."""
    shown = names if len(names) <= most else names[: most // 2]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
