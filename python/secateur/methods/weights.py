"""Drafts of the weights that a plan changes, in float64, by part of a layer; the model itself is not changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy, Group, Indices, Layer, Member, Part, kept_along_axes, parameter_name
from ..errors import NumericalError

__all__ = ["Weights"]


class Weights:
    """The drafted weights of a model, in their shape before the cut, with what stays of them and how norms change.

    ``keep`` maps groups to the units that stay. ``eps`` maps norms to their new eps; ``uncentred`` lists the norms that
    no longer subtract the mean.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        self.keep: dict[str, Indices] = {}
        self.eps: dict[str, float] = {}
        self.uncentred: list[str] = []
        self._model, self._anatomy = model, anatomy
        self._changed: dict[str, Tensor] = {}

    def weight(self, module: str, parameter: str = "weight") -> Tensor:
        """Return a parameter as drafted so far, float64 on the CPU; the model itself is module ''."""
        name = parameter_name(module, parameter)
        if name not in self._changed:
            return self._model.get_parameter(name).detach().to("cpu", torch.float64)
        return self._changed[name]

    def matrix(self, module: str) -> Tensor:
        """Return the weight of a linear layer or 1x1 convolution, (outputs, inputs)."""
        weight = self.weight(module)
        return weight.reshape(weight.shape[:2])

    def set_matrix(self, module: str, value: Tensor) -> None:
        """Draft new values for the weight of a linear layer or 1x1 convolution, (outputs, inputs)."""
        self.set(module, value.reshape(self.weight(module).shape))

    def bias(self, module: str) -> Tensor:
        """Return a layer's bias, or zeros if it has none."""
        layer: Any = self._model.get_submodule(module)
        name = parameter_name(module, "bias")
        if name in self._changed or layer.bias is not None:
            return self.weight(module, "bias")
        return torch.zeros(len(layer.weight), dtype=torch.float64)

    def shift(self, layer: Layer, value: Tensor) -> None:
        """Draft a new bias for a layer's writer; it goes into the batch norm that follows, if that has to take it."""
        if layer.batch_norm is None:
            self.set(layer.writer, value, "bias")
            return
        norm: Any = self._model.get_submodule(layer.batch_norm)
        gain = self.weight(layer.batch_norm) / (norm.running_var.cpu().double() + norm.eps).sqrt()
        self.set(layer.batch_norm, self.weight(layer.batch_norm, "bias") + gain * value, "bias")

    def rows(self, group: Group, part: Part) -> Tensor:
        """Return the rows that compute a part of a layer's units, head after head: (heads · size, inputs)."""
        member = _writer(group, part)
        return self.weight(member.module)[_places(member)]

    def set_rows(self, group: Group, part: Part, value: Tensor) -> None:
        """Draft new values for these rows."""
        member = _writer(group, part)
        weight = self.weight(member.module).clone()
        weight[_places(member)] = value
        self.set(member.module, weight)

    def row_bias(self, group: Group, part: Part) -> Tensor:
        """Return the bias of a part, (heads · size,), or zeros if there is none."""
        member = _writer(group, part)
        return self.bias(member.module)[_places(member)]

    def set_row_bias(self, group: Group, part: Part, value: Tensor) -> None:
        """Draft new values for this bias; a bias that the layer does not have is added, unless it is zero."""
        member = _writer(group, part)
        bias = self.bias(member.module).clone()
        bias[_places(member)] = value
        self.set(member.module, bias, "bias")

    def heads(self, group: Group) -> Tensor:
        """Return the heads of a group that stay as decided so far, sorted."""
        if group.within in self.keep:
            return torch.from_numpy(self.keep[group.within][0])
        return torch.arange(group.heads)

    def largest(self, module: str) -> float:
        """Return the largest number that the type of a layer's parameters can hold."""
        return torch.finfo(self._model.get_parameter(parameter_name(module, "weight")).dtype).max

    def affine(self, norm: str, size: int) -> tuple[Tensor, Tensor]:
        """Return a norm's scale and shift, (size,); ones and zeros where it has none."""
        module = self._model.get_submodule(norm)
        gain, shift = (
            None if getattr(module, name, None) is None else self.weight(norm, name) for name in ("weight", "bias")
        )
        return (
            torch.ones(size, dtype=torch.float64) if gain is None else gain,
            torch.zeros(size, dtype=torch.float64) if shift is None else shift,
        )

    def set(self, module: str, value: Tensor, parameter: str = "weight") -> None:
        """Draft new values; a bias that the layer does not have is added, unless it is zero."""
        name = parameter_name(module, parameter)
        present = getattr(self._model.get_submodule(module), parameter, None)
        if present is None and name not in self._changed and not bool(value.any()):
            return
        self._changed[name] = value

    def set_per_head(self, module: str, values: Tensor, parameter: str = "weight") -> None:
        """Draft a query/key norm's parameter, (heads, size), even if all heads shared one entry before."""
        present = getattr(self._model.get_submodule(module), parameter, None)
        shared = present is not None and present.numel() < values.numel()
        self.set(module, values if shared else values.flatten(), parameter)

    def per_head(self, module: str, heads: int, size: int, parameter: str = "weight") -> Tensor:
        """Return a query/key norm's parameter, (heads, size); zeros for a bias that is not there."""
        if getattr(self._model.get_submodule(module), parameter, None) is None:
            return torch.zeros(heads, size, dtype=torch.float64)
        value = self.weight(module, parameter)
        return value.expand(heads, size) if value.numel() == size else value.view(heads, size)

    def scale(self, module: str | None) -> Tensor | float:
        """Return the factor of a LayerScale; 1 if there is none."""
        return 1.0 if module is None else self.weight(module, "gamma")

    def finish(self) -> dict[str, Tensor]:
        """Return the changed parameters, cut to what is kept, in the model's types.

        Raises:
            NumericalError: a value that is not a finite number in its type.
        """
        found, keep = {}, self.keep
        gone = {name for name, indices in keep.items() if indices.shape[1] == 0}
        for name, value in sorted(self._changed.items()):
            if self._anatomy.layer_holding(name) in gone:
                continue
            module, _, parameter = name.rpartition(".")
            present = getattr(self._model.get_submodule(module), parameter, None)
            weight = parameter_name(module, "weight")
            if present is None:
                axes = {d: i for d, i in kept_along_axes(self._anatomy, weight, keep).items() if d == 0}
                dtype = self._model.get_parameter(weight).dtype
            elif value.ndim > present.ndim:
                axes, value, dtype = {}, self._of_heads(name, value, keep), present.dtype
            else:
                axes = kept_along_axes(self._anatomy, name, keep)
                dtype = present.dtype
            for dim, indices in axes.items():
                value = value.index_select(dim, indices)
            found[name] = value.to(dtype).contiguous()
            if not bool(found[name].isfinite().all()):
                worst = float(value.abs().nan_to_num(nan=torch.inf).max())
                raise NumericalError(f"{name}: expected weights that {dtype} can hold, got some up to {worst:g}")
        return found

    def _of_heads(self, name: str, values: Tensor, keep: Mapping[str, Indices]) -> Tensor:
        """Return what stays of (heads, size) values of a parameter that all heads shared."""
        group = self._anatomy.members_of[name][0][0]
        kept = torch.from_numpy(keep[group.name])
        return values.gather(1, kept)[self.heads(group)].flatten()


def _writer(group: Group, part: Part) -> Member:
    """Return the one layer that computes a part."""
    (member,) = group.of("writer", part)
    return member


def _places(member: Member) -> Tensor:
    return torch.from_numpy(member.entries.flatten())
