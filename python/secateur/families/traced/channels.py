"""Convolutional networks of timm: which channels are tied is read from the operations that the model runs.

It runs once on the meta device, where tensors have shapes and no values, and every operation that torch dispatches is
followed: the graph has torch's operators, as that of `torch.export`, at a tenth of its time. An operation that is not
known exactly keeps all that it takes as it is. Dependency graphs for pruning: Fang et al., DepGraph, CVPR 2023.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, count
from math import prod
from operator import mul
from posixpath import commonpath, dirname
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from ...anatomy import Anatomy, Group, Indices, Member, Part, Role
from ...anatomy.costs import FixedProduct, Product, WeightProduct
from ...errors import Unsupported
from ..base import image_channels, refuse_computed, refuse_tied
from ..walk import identity
from .run import Following, follow, pointwise, tensors_in

__all__ = ["inspect", "widths"]

# Two images: with one, a view that mixes images and channels would look like one that does not.
_BATCH = 2
# With one channel, a depthwise convolution or a view is no longer what it was: no group is cut to less.
_LEAST = 2
_RETURNED = "the model returns it"

_aten = torch.ops.aten
_POOLS = {_aten.max_pool2d_with_indices, _aten.adaptive_max_pool2d, _aten.avg_pool2d, _aten._adaptive_avg_pool2d}
_POOLS |= {_aten.reflection_pad2d, _aten.replication_pad2d}
_REDUCTIONS = {_aten.mean, _aten.sum, _aten.amax, _aten.amin}
_VIEWS = {_aten.view, _aten._unsafe_view, _aten.unsqueeze, _aten.squeeze}
_NORMS = {_aten.native_batch_norm, _aten._native_batch_norm_legit, _aten._native_batch_norm_legit_no_training}
_SUMS = {_aten.add, _aten.add_, _aten.sub, _aten.sub_}


def inspect(model: nn.Module, family: str) -> Anatomy:
    """Follow a model's channels, in images of its ``pretrained_cfg["input_size"]``, or of 224 x 224 pixels.

    Raises:
        Unsupported: tensors that are tied or computed by hooks, a model that cannot run without values, or one in
            which no channels can be followed.
    """
    walk = _run(model)
    groups, refused = walk.groups()
    if not groups:
        reason = next(iter(refused.values()), "it has none that are written and read")
        raise Unsupported(f"model: expected {type(model).__name__} with channels to cut: {reason}")
    architecture, arguments, handmade = identity(model)
    cut = {member.tensor for group in groups for member in group.members}
    return Anatomy(
        family=family,
        architecture=architecture,
        arguments=arguments,
        input_size=_input_size(model),
        groups=groups,
        layers={},
        norms=(),
        products=tuple(walk.products),
        shapes={name: tuple(tensor.shape) for name, tensor in model.named_parameters()},
        buffers={name: tuple(tensor.shape) for name, tensor in model.named_buffers() if name in cut},
        refused=refused,
        handmade=handmade,
    )


def widths(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Map each module to the number of channels that enter it and that it returns."""
    return _run(model).channels


def _input_size(model: Any) -> tuple[int, int, int]:
    _, height, width = (getattr(model, "pretrained_cfg", None) or {}).get("input_size") or (0, 224, 224)
    return image_channels(model), height, width


class _Value(NamedTuple):
    axis: int | None
    units: Indices  # entry i along the axis is of units[i]; where the axis is None, only what units are in it is known


class _Weight(NamedTuple):
    tensor: str
    axes: tuple[int | None, ...]  # of dimensions of a view of a parameter or buffer; None for those of size 1


class _Lost(Exception):
    """An operation cannot be followed."""


class _Walk(Following):
    """Follows units from operation to operation. A tensor in neither table never changes, whatever is cut."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.weights = {id(t): _Weight(name, tuple(range(t.dim()))) for name, t in weights.items()}
        self.values: dict[int, _Value] = {}
        self.alive: list[Any] = []  # an id is a tensor's only as long as the tensor lives
        self.parents: list[int] = []  # of units: a tree for all that are one
        self.uses: dict[tuple[str, int], tuple[Indices, Role]] = {}  # whose the entries along an axis are
        self.frozen: list[tuple[Indices, str]] = []
        self.stuck: dict[str, str] = {}  # parameters and buffers that an operation takes that is not followed
        self.summed: list[Indices] = []
        self.products: list[Product] = []
        self.channels: dict[str, tuple[int, int]] = {}  # of what enters a module and of what it returns

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        taken, made = tensors_in((args, kwargs)), tensors_in(out)
        self.alive.append((taken, made))
        packet, counted, value = func.overloadpacket, len(self.products), None
        if any(id(tensor) in self.values or id(tensor) in self.weights for tensor in taken):
            try:
                value = self.follow(func, packet, args, taken, made)
            except _Lost:
                self.freeze(taken, f"{self.where[-1] or 'model'}: channels are not followed through {packet.__name__}")
        if counted == len(self.products) and packet in flop_registry:
            macs = flop_registry[packet](*args, **kwargs, out_val=out) // (2 * _BATCH)
            self.products.append(FixedProduct(self.where[-1], macs))
        for index, tensor in enumerate(made):
            self.values.pop(id(tensor), None)
            if isinstance(value, _Weight):
                self.weights[id(tensor)] = value
            elif value is not None:
                self.values[id(tensor)] = value if index == 0 else _Value(None, value.units)
        return out

    def left(self, name: str, args: tuple[Any, ...], out: Any) -> None:
        if args and all(isinstance(tensor, Tensor) and tensor.dim() > 1 for tensor in (args[0], out)):
            self.channels[name] = (args[0].shape[1], out.shape[1])

    def follow(self, func: Any, packet: Any, args: Any, taken: list[Tensor], made: list[Tensor]) -> _Value | _Weight:
        """What an operation makes of units."""
        x, weight = self.values.get(id(taken[0])), self.weights.get(id(taken[0]))
        _require(not any(id(tensor) in self.weights for tensor in made))  # the model changes a parameter
        if packet is _aten.convolution:
            return self.convolution(*args, out=made[0])
        if packet in (_aten.addmm, _aten.mm):
            return self.linear(*(args if packet is _aten.addmm else (None, *args)), out=made[0])
        if pointwise(func):
            return self.pointwise(taken, made[0], summed=packet in _SUMS)
        if weight is not None and packet in _VIEWS | {_aten.t}:
            axes = weight.axes[::-1] if packet is _aten.t else _squeezed(weight.axes, taken[0].shape, made[0].shape)
            return _Weight(weight.tensor, axes)
        if x is None or x.axis is None:
            raise _Lost
        if packet is _aten.cat:
            dim = (*args, 0)[1] % taken[0].dim()
            parts = [v.units for t in taken if (v := self.values.get(id(t))) is not None and v.axis == dim]
            _require(len(parts) == len(taken))
            return _Value(dim, np.concatenate(parts))
        if packet in _NORMS:
            _require(x.axis == 1)
            for tensor in (t for t in args[1:5] if t is not None):
                self.use(tensor, 0, x.units, "elementwise")
            return x
        if packet in _POOLS or packet is _aten.constant_pad_nd:
            _require(x.axis < taken[0].dim() - (2 if packet in _POOLS else len(args[1]) // 2))
            return x
        if packet in _REDUCTIONS:
            dims = (*args, None)[1]
            gone = {dim % taken[0].dim() for dim in ([dims] if isinstance(dims, int) else dims or ())}
            _require(bool(gone) and x.axis not in gone)
            return _Value(x.axis - sum(d < x.axis for d in gone) * (made[0].dim() < taken[0].dim()), x.units)
        if packet in _VIEWS:
            return _viewed(x, taken[0].shape, made[0].shape)
        raise _Lost

    def convolution(self, x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any, out: Tensor) -> _Value:
        transposed, groups, (rows, columns) = settings[3], settings[-1], weight.shape[:2]
        value = self.values.get(id(x))
        _require(not transposed and x.dim() == weight.dim() and (value is None or value.axis == 1))
        if groups > 1 and columns == 1:  # depthwise: each channel for itself
            if value is None:
                raise _Lost
            return self.written(weight, 0, bias, np.repeat(value.units, rows // groups), "elementwise", out)
        if value is not None:
            first, *others = value.units.reshape(groups, columns)
            for other in others:  # the same channels in each group
                self.unify(first, other)
            self.use(weight, 1, first, "reader")
        return self.written(weight, 0, bias, np.tile(self.fresh(rows // groups), groups), "writer", out)

    def linear(self, bias: Tensor | None, x: Tensor, weight: Tensor, *, out: Tensor) -> _Value:
        value = self.values.get(id(x))
        if value is not None:
            _require(value.axis == 1)
            self.use(weight, 0, value.units, "reader")
        return self.written(weight, 1, bias, self.fresh(weight.shape[1]), "writer", out)

    def written(self, weight: Tensor, dim: int, bias: Tensor | None, units: Indices, role: Role, out: Tensor) -> _Value:
        self.use(weight, dim, units, role)
        if bias is not None:
            self.use(bias, 0, units, role)
        module, _, name = self.weights[id(weight)].tensor.rpartition(".")
        self.products.append(WeightProduct(module, out.numel() // (_BATCH * len(units)), name))
        return _Value(1, units)

    def pointwise(self, taken: list[Tensor], out: Tensor, *, summed: bool) -> _Value:
        """Tie what meets; dimensions are counted from the last, as broadcasting does."""
        known = [(v.axis - t.dim(), v.units) for t in taken if (v := self.values.get(id(t))) and v.axis is not None]
        _require(bool(known))
        axis, units = max(known, key=lambda pair: len(pair[1]))
        _require(len(units) == out.shape[axis] and len(known) == sum(id(t) in self.values for t in taken))
        for tensor in taken:
            found = self.values.get(id(tensor))
            if found is not None and found.axis is not None:
                _require(found.axis - tensor.dim() == axis and len(found.units) == len(units))
                if self.unify(units, found.units) and summed:
                    self.summed.append(units)
            elif tensor.dim() >= -axis and tensor.shape[axis] > 1:
                self.use(tensor, axis, units, "elementwise")
        return _Value(out.dim() + axis, units)

    def use(self, tensor: Tensor, dim: int, units: Indices, role: Role) -> None:
        """Write down whose the entries along a dimension of a parameter or buffer are."""
        weight = self.weights.get(id(tensor))
        axis = weight.axes[dim] if weight is not None else None
        if weight is None or axis is None:
            raise _Lost
        present = self.uses.setdefault((weight.tensor, axis), (units, role))
        self.unify(present[0], units)
        _require(present[1] == role)

    def fresh(self, size: int) -> Indices:
        self.parents.extend(range(len(self.parents), len(self.parents) + size))
        return np.arange(len(self.parents) - size, len(self.parents))

    def root(self, unit: int) -> int:
        """The unit that stands for all that are one with it."""
        while self.parents[unit] != unit:
            self.parents[unit] = unit = self.parents[self.parents[unit]]
        return unit

    def unify(self, some: Indices, others: Indices) -> bool:
        """Make units one, pair by pair; true if any were two."""
        changed = False
        for pair in zip(some.tolist(), others.tolist(), strict=True):
            first, last = sorted(map(self.root, pair))
            self.parents[last] = first
            changed |= first != last
        return changed

    def freeze(self, tensors: Iterable[Tensor], reason: str) -> None:
        """Keep what these tensors hold as it is."""
        for tensor in tensors:
            if (value := self.values.get(id(tensor))) is not None:
                self.frozen.append((value.units, reason))
            if (weight := self.weights.get(id(tensor))) is not None:
                self.stuck.setdefault(weight.tensor, reason)

    def groups(self) -> tuple[tuple[Group, ...], dict[str, str]]:
        """Units that live in the same places are a group; and those that cannot be cut, by name, with the reason."""
        roots = np.array([self.root(unit) for unit in range(len(self.parents))], dtype=np.int64)
        stuck = [(units, self.stuck[name]) for (name, _), (units, _) in self.uses.items() if name in self.stuck]
        reasons = {root: reason for units, reason in [*stuck, *self.frozen[::-1]] for root in roots[units].tolist()}
        summed = {root for units in self.summed for root in roots[units].tolist()}
        places: dict[int, list[tuple[tuple[str, int], int]]] = {}
        for place, (units, _) in self.uses.items():
            for root, copies in zip(*np.unique(roots[units], return_counts=True), strict=True):
                places.setdefault(int(root), []).append((place, int(copies)))
        alike: dict[tuple[tuple[tuple[str, int], int], ...], list[int]] = {}
        for root in sorted(places):
            alike.setdefault(tuple(places[root]), []).append(root)
        groups: dict[str, Group] = {}
        refused: dict[str, str] = {}
        for where, found in alike.items():
            roles = {at: self.uses[at][1] for at, _ in where}
            writers = [tensor.rpartition(".")[0] for (tensor, _), role in roles.items() if role == "writer"]
            reason = next((reasons[root] for root in found if root in reasons), None)
            is_output = reason == _RETURNED and len(writers) == len(where)
            if len(found) < _LEAST or not writers or is_output or (reason is None and "reader" not in roles.values()):
                continue
            width = not summed.isdisjoint(found)
            name = next(name for name in _names(writers, width) if name not in groups and name not in refused)
            if reason is not None:
                refused[name] = reason
                continue
            part: Part = "stream" if width else "hidden"
            members = tuple(
                Member(*at, _entries(roots[self.uses[at][0]], found, n), part, roles[at]) for at, n in where
            )
            groups[name] = Group(name, "width" if width else "conv", None, len(found), members, fewest=_LEAST)
        return tuple(groups.values()), refused


def _run(model: nn.Module) -> _Walk:
    """Run a copy of a model without weights, hooks and training, and follow its channels."""
    for name, module in model.named_modules():
        for parameter in ("weight", "bias"):
            if isinstance(getattr(module, parameter, None), Tensor) and parameter not in module._buffers:
                refuse_computed(name, module, parameter)
    refuse_tied(model)
    walk, out = follow(model, (_BATCH, *_input_size(model)), _started)
    walk.freeze(tensors_in(out), _RETURNED)
    return walk


def _started(probe: nn.Module, images: Tensor) -> _Walk:
    del images
    return _Walk(dict((*probe.named_parameters(), *probe.named_buffers())))


def _entries(roots: Indices, units: Sequence[int], copies: int) -> Indices:
    """Where each unit is among ``roots``, as many places each: (1, units, copies)."""
    order = np.argsort(roots, kind="stable")
    found: Indices = order[np.searchsorted(roots[order], np.array(units))[:, None] + np.arange(copies)][None]
    return found


def _names(writers: list[str], width: bool) -> Iterator[str]:
    """Names for a group, best first: that of the part of the model that a width is of, or of what writes it first."""
    folders = [dirname(writer.replace(".", "/")) for writer in writers]
    common = next((path for start in range(len(folders)) if (path := commonpath(folders[start:]))), None)
    if width and common:
        yield f"{common.replace('/', '.')}.width"
    yield writers[0]
    yield from (f"{writers[0]}:{number}" for number in count(2))


def _squeezed(axes: tuple[int | None, ...], before: Sequence[int], after: Sequence[int]) -> tuple[int | None, ...]:
    """Follow a parameter's axes through a view in which only dimensions of size 1 come or go."""
    _require([size for size in before if size > 1] == [size for size in after if size > 1])
    long = iter([axis for axis, size in zip(axes, before, strict=True) if size > 1])
    return tuple(next(long) if size > 1 else None for size in after)


def _viewed(value: _Value, before: Sequence[int], after: Sequence[int]) -> _Value:
    """Follow a view that keeps the channels' dimension, or merges it with those that follow it."""
    axis, size = value.axis or 0, len(value.units)
    blocks = set(accumulate(before[axis + 1 :], mul, initial=size))
    for dim, extent in enumerate(after):
        if prod(after[:dim]) == prod(before[:axis]) and extent >= size and extent in blocks:
            return _Value(dim, np.repeat(value.units, extent // size))
    raise _Lost


def _require(followed: bool) -> None:
    if not followed:
        raise _Lost
