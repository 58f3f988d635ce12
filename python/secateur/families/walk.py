"""The walk over a model's modules that families share: collects members of groups and checks exact classes."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import get_model_args
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..anatomy import Indices, Member, NormSite, Part, Role, parameter_name, unit_entries
from ..timm_models import DESCRIBING, ENTRY_POINTS
from .base import NORMS, current_arguments, refuse_computed, unsupported
from .classes import decoded

__all__ = ["Walk", "has", "identity", "macs_of", "unread"]


class Walk:
    """Collects members of groups, and refuses modules of classes that it does not know."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def rows(self, name: str, members: list[Member], role: Role, part: Part, entries: Indices) -> None:
        """Add the rows of a linear layer's or convolution's weight, and of its bias, as members."""
        layer: Any = self.linear(name)
        members.append(Member(f"{name}.weight", 0, entries, part, role))
        if layer.bias is not None:
            members.append(Member(f"{name}.bias", 0, entries, part, role))

    def columns(self, name: str, members: list[Member], part: Part, entries: Indices) -> None:
        """Add the inputs of a linear layer or convolution as members."""
        self.linear(name)
        members.append(Member(f"{name}.weight", 1, entries, part, "reader"))

    def linear(self, name: str) -> Any:
        """Return a linear layer or convolution; refuse other classes, which keep their weights elsewhere."""
        layer: Any = self.model.get_submodule(name)
        if type(layer) not in (nn.Linear, nn.Conv2d):
            raise unsupported(name, layer, "nn.Linear")
        refuse_computed(name, layer)
        return layer

    def norm(self, name: str, members: list[Member], part: Part, entries: Indices) -> bool | None:
        """Add a norm over channels, and return whether it is centred; None if there is no norm."""
        norm = self.model.get_submodule(name)
        if type(norm) is nn.Identity:
            return None
        if type(norm) not in NORMS:
            raise unsupported(name, norm, "LayerNorm or RmsNorm")
        self.norm_members(name, norm, members, part, entries)
        return NORMS[type(norm)]

    def norm_members(self, name: str, norm: nn.Module, members: list[Member], part: Part, entries: Indices) -> None:
        """Add the scale and shift of a norm, if it has them, as members."""
        refuse_computed(name, norm)
        for parameter in ("weight", "bias"):
            if getattr(norm, parameter, None) is not None:
                members.append(Member(f"{name}.{parameter}", 0, entries, part, "norm"))

    def parameter(self, module: str, name: str, axis: int, members: list[Member], size: int) -> None:
        """Add a parameter over a residual stream's channels: a token, a position embedding, a LayerScale."""
        refuse_computed(module, self.model.get_submodule(module), name)
        members.append(Member(parameter_name(module, name), axis, unit_entries(size), "stream", "elementwise"))

    def inner(self, name: str, size: int) -> NormSite | None:
        """Return the norm over a layer's values or hidden units, or None."""
        norm = self.model.get_submodule(name)
        return NormSite(name, size, NORMS[type(norm)], pooled=False) if type(norm) in NORMS else None


def has(model: nn.Module, name: str) -> bool:
    """Return whether a model has this attribute, and it is not None."""
    return getattr(model, name, None) is not None


def macs_of(module: nn.Module, input_size: tuple[int, ...]) -> int:
    """Count the MACs for one input by tracing only shapes; a module's weights are neither read nor copied.

    A module that does not take such an input is counted as if each weight were used once.
    """
    state = {k: torch.empty_like(v, device="meta", dtype=torch.float32) for k, v in module.state_dict().items()}
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            torch.func.functional_call(module, state, (torch.empty(1, *input_size, device="meta"),))
    except Exception:  # code of users may raise anything
        return sum(weight.numel() for weight in module.parameters() if weight.ndim > 1)
    return int(counter.get_total_flops()) // 2


def unread(name: str, head: nn.Module) -> str:
    """Return why the width before a head of the user's own cannot be cut."""
    return f"{name}: expected nn.Linear or none, got {type(head).__name__}, whose inputs cannot be cut"


def identity(model: nn.Module) -> tuple[str, dict[str, Any], bool]:
    """Return how to build the model's dense form, as timm recorded it; just the class for a model built by hand."""
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    recorded: Any = getattr(model, "_model_args", None)
    from_entry = architecture in ENTRY_POINTS and recorded is not None
    if from_entry:
        architecture = None if recorded.get("handmade") else recorded["dense"]
    if not architecture or recorded is None:
        # A class that replaces the library's names it.
        return getattr(type(model), "dense_class", type(model)).__name__, {}, True
    # timm does not publish the drop rates with a model, but further training needs them.
    drop = {name: value for name, value in recorded.items() if "drop" in name}
    arguments = get_model_args(model, drop)
    if from_entry:
        # The dense model's arguments are one of its own; what was given beside them goes before.
        beside = {name: value for name, value in arguments.items() if name not in DESCRIBING}
        arguments = {**decoded(recorded["arguments"]), **beside}
    # Modules may have been replaced by hand.
    now = current_arguments(model)
    return architecture, {name: now.get(name, value) for name, value in arguments.items()}, False
