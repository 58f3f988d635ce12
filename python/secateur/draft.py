"""Float64 copies of the weights that a plan changes; the model itself is not touched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .anatomy import Anatomy, Indices, kept_along_axes, parameter_name

__all__ = ["Draft"]


class Draft:
    """The dense-shaped weights of a model as they will be before the cut, by parameter name."""

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        self._model, self._anatomy = model, anatomy
        self._changed: dict[str, Tensor] = {}

    def weight(self, module: str, parameter: str = "weight") -> Tensor:
        """A parameter as drafted so far, float64 on the CPU; the model itself is module ''."""
        name = parameter_name(module, parameter)
        if name not in self._changed:
            return self._model.get_parameter(name).detach().to("cpu", torch.float64)
        return self._changed[name]

    def bias(self, module: str) -> Tensor:
        """A layer's bias, zeros where it has none."""
        layer: Any = self._model.get_submodule(module)
        name = parameter_name(module, "bias")
        if name in self._changed or layer.bias is not None:
            return self.weight(module, "bias")
        return torch.zeros(len(layer.weight), dtype=torch.float64)

    def set(self, module: str, value: Tensor, parameter: str = "weight") -> None:
        """Draft new values; a bias that the layer does not have is added, unless it is zero."""
        name = parameter_name(module, parameter)
        present = getattr(self._model.get_submodule(module), parameter, None)
        if present is None and name not in self._changed and not bool(value.any()):
            return
        self._changed[name] = value

    def scale(self, module: str | None) -> Tensor | float:
        """What a LayerScale multiplies by; 1 where there is none."""
        return 1.0 if module is None else self.weight(module, "gamma")

    def finish(self, keep: Mapping[str, Indices]) -> dict[str, Tensor]:
        """The changed parameters with only what is kept, in the model's types."""
        found = {}
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
            else:
                axes = kept_along_axes(self._anatomy, name, keep)
                dtype = present.dtype
            for dim, indices in axes.items():
                value = value.index_select(dim, indices)
            found[name] = value.to(dtype).contiguous()
        return found
