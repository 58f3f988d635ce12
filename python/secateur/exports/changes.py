"""What users changed in a model by hand since it was built, as far as a file can hold it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import timm.layers
import torch
from torch import nn

from ..errors import InvalidArgument
from ..families.base import NORMS
from ..families.classes import ACTIVATIONS, is_plain, named, public_name

__all__ = ["SETTINGS", "Changes", "difference_of", "plain_attributes", "settings_of"]

# Modules without parameters that matter only in training; they may be put where there was none, and taken away.
_DROPS = (nn.Dropout, timm.layers.DropPath, timm.layers.PatchDropout)
# What may differ from the built model in modules of one class: written, and set again.
_RATES = ("p", "drop_prob", "scale_by_keep", "prob", "ordered", "num_prefix_tokens")
_SWITCHES = ("inplace", "fused_attn", "grad_checkpointing", "distilled_training")
_OF_ACTIVATIONS = ("approximate", "negative_slope", "alpha", "beta", "threshold", "min_val", "max_val")
_COMPUTED = ("eps", "momentum", "scale", "global_pool", "pool_include_prefix")
_SIZES = ("strict_img_size", "dynamic_img_size", "dynamic_img_pad")
SETTINGS = frozenset((*_RATES, *_SWITCHES, *_OF_ACTIVATIONS, *_COMPUTED, *_SIZES))
# They follow from modules, whatever users have made of them; or tell how a model was made.
_FOLLOWING = frozenset({"training", "num_classes", "in_chans", "secateur_factory"})
_LINEAR = "torch.nn.Linear"
# The argument by which a norm has no scale.
_AFFINE: Mapping[type[nn.Module], str] = {nn.LayerNorm: "elementwise_affine"}
_PLAIN = (bool, int, float, str, tuple, torch.Size, type(None))


@dataclass(frozen=True)
class Changes:
    """Modules that were replaced, biases that were left out, and settings that were changed.

    ``modules`` maps names to the class of what stands there now, with its arguments; ``unbiased`` names linear layers
    and convolutions that have lost their bias; ``settings`` maps modules to their changed attributes.
    """

    modules: Mapping[str, Any] = field(default_factory=dict)
    unbiased: tuple[str, ...] = ()
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, model: nn.Module, built: nn.Module, classifiers: Collection[str] = (), absent: Collection[str] = ()
    ) -> Changes:
        """Return the replaced modules and lost biases of a model.

        Args:
            model: the model.
            built: its dense form, built from its arguments.
            classifiers: names of the modules that classify.
            absent: names of modules that a cut took out.
        """
        theirs = dict(built.named_modules())
        modules, unbiased = {}, []
        for name, module in model.named_modules():
            twin = theirs.get(name)
            if twin is None or not name or name in absent:
                continue
            if type(module) is nn.Linear and name in classifiers:
                if type(twin) is not nn.Linear or twin.out_features != module.out_features:
                    modules[name] = {"class": _LINEAR, "arguments": {"out_features": module.out_features}}
            elif type(module) is not type(twin) and _may_replace(name, module, twin, classifiers):
                modules[name] = {"class": public_name(type(module))}
                if type(module) in NORMS and getattr(module, "weight", None) is None:
                    modules[name]["arguments"] = {_AFFINE.get(type(module), "affine"): False}
            alike = type(twin) is type(module) and isinstance(module, (nn.Linear, nn.Conv2d))
            if alike and module.bias is None and twin.bias is not None:
                unbiased.append(name)
        return cls(modules, tuple(unbiased))

    def replace(self, built: nn.Module) -> None:
        """Replace modules and drop biases of the dense model, as it was built.

        Raises:
            InvalidArgument: a module that is not there or cannot be replaced by such a one.
        """
        places = dict(built.named_modules())
        for name, described in self.modules.items():
            if name not in places or not name or not isinstance(described, Mapping):
                raise InvalidArgument(f"changes: expected modules of this model, got {name!r}")
            parent, _, leaf = name.rpartition(".")
            setattr(built.get_submodule(parent), leaf, _made(built, name, places[name], described))
        for name in self.unbiased:
            layer = places.get(name)
            if not isinstance(layer, (nn.Linear, nn.Conv2d)):
                raise InvalidArgument(f"changes: expected linear layers without bias, got {name!r}")
            layer.register_parameter("bias", None)

    def set(self, model: nn.Module) -> None:
        """Change settings of the model.

        Raises:
            InvalidArgument: a module or a setting that is not there.
        """
        places = dict(model.named_modules())
        for name, changed in self.settings.items():
            for what, value in changed.items():
                known = name in places and what in SETTINGS and isinstance(vars(places[name]).get(what), _PLAIN)
                if not known or what not in vars(places[name]) or not is_plain(value):
                    raise InvalidArgument(f"changes: expected settings of this model, got {name}.{what} = {value!r}")
                setattr(places[name], what, value)

    def to_dict(self) -> dict[str, Any]:
        """Return the changes as JSON values; nothing for none."""
        return {name: value for name, value in vars(self).items() if value}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Changes:
        """Build changes from their JSON values."""
        return cls(fields.get("modules", {}), tuple(fields.get("unbiased", ())), fields.get("settings", {}))


def settings_of(model: nn.Module, rebuilt: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the settings by which a model differs from its rebuilt form, by module, where a file can hold them.

    Whether attention is fused is always among them, since what timm builds depends on the machine.
    """
    theirs = dict(rebuilt.named_modules())
    found: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        twin = theirs.get(name)
        if twin is None or type(twin) is not type(module):
            continue
        changed = {
            what: getattr(module, what)
            for what, would in plain_attributes(twin).items()
            if what in SETTINGS
            and is_plain(getattr(module, what, twin))
            and (what == "fused_attn" or getattr(module, what) != would)
        }
        if changed:
            found[name] = changed
    return found


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Return what a module's forward pass may depend on, besides parameters, buffers and submodules."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, _PLAIN) and not name.startswith("_") and name not in _FOLLOWING
    }


def difference_of(model: nn.Module, built: nn.Module) -> str | None:
    """Describe the first thing that a rebuilt model would lack or have different; None if it is the same."""
    mine, theirs = dict(model.named_modules()), dict(built.named_modules())
    for name in dict.fromkeys([*mine, *theirs]):
        if name not in mine or name not in theirs:
            return f"{'no ' if name not in mine else ''}module {name}"
        module, twin = mine[name], theirs[name]
        if type(module) is not type(twin):
            first, second = type(module).__name__, type(twin).__name__
            if first == second:
                first, second = (public_name(type(each)) for each in (module, twin))
            return f"{first} at {name} where it builds {second}"
        if module.extra_repr() != twin.extra_repr():
            return f"{name} ({module.extra_repr()}) where it builds ({twin.extra_repr()})"
        # Only the rebuilt module's settings count; attributes that users add do not matter.
        for what, would in plain_attributes(twin).items():
            found = getattr(module, what, None)
            if found != would:
                return f"{name}.{what} ({found}) where it builds ({would})"
    shapes = [{k: tuple(v.shape) for k, v in m.state_dict().items()} for m in (model, built)]
    for name in dict.fromkeys([*shapes[0], *shapes[1]]):
        if shapes[0].get(name) != shapes[1].get(name):
            return f"{name} of shape {shapes[0].get(name)} where it builds {shapes[1].get(name)}"
    return None


def _may_replace(name: str, module: nn.Module, twin: nn.Module, classifiers: Collection[str]) -> bool:
    """Return whether a file can say that this module stands where the twin was built."""
    if name in classifiers:
        return type(module) is nn.Identity
    empty = (nn.Identity, *_DROPS)
    if type(module) in empty and type(twin) in empty:
        return True
    if type(module) in ACTIVATIONS and type(twin) in ACTIVATIONS:
        return True
    norms = (*NORMS, nn.Identity)
    # Only of norms over the whole width it is known how many channels they have when nothing is cut.
    wide = type(twin) in NORMS or "." not in name
    return type(module) in norms and type(twin) in norms and wide


def _made(built: nn.Module, name: str, twin: nn.Module, described: Mapping[str, Any]) -> nn.Module:
    """Make the module that a file describes, without weights, with the dense model's channels."""
    device = next(built.parameters()).device
    arguments = dict(described.get("arguments", {}))
    if not all(is_plain(value) for value in arguments.values()):
        raise InvalidArgument(f"changes: expected plain arguments of {name}, got {arguments!r}")
    width: Any = getattr(built, "num_features", None)
    if described.get("class") == _LINEAR:
        inputs = twin.in_features if type(twin) is nn.Linear else width
        return nn.Linear(int(inputs), int(arguments["out_features"]), device=device)
    drops = {public_name(cls): cls for cls in _DROPS}
    cls: Any = drops.get(str(described.get("class"))) or named(described.get("class"))
    if cls in NORMS:
        shape = getattr(twin, "normalized_shape", None) or width
        return cls(shape, **arguments, device=device)  # type: ignore[no-any-return]
    if cls not in (*_DROPS, *ACTIVATIONS):
        raise InvalidArgument(f"changes: expected a norm, an activation or a dropout at {name}, got {cls.__name__}")
    made: nn.Module = cls(**arguments)
    return made
