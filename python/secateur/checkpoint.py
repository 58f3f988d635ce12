"""One self-describing .safetensors file for a pruned model: how to build it, and its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from . import container, surgery
from .errors import InvalidArgument
from .families import family_named, family_of

# Where weights came from: a pruned model must never be taken for its dense source.
_WEIGHT_SOURCES = ("url", "file", "hf_hub_id", "hf_hub_filename", "source", "state_dict", "custom_load")


def save(model: nn.Module, path: str | Path, *, factory: tuple[str, Mapping[str, Any]] | None = None) -> None:
    """Write the model, pruned or dense, to one file that ``load`` rebuilds it from. No pickle.

    Args:
        model: a supported model, on any device.
        path: the file; it appears whole or not at all.
        factory: for a model that was not made by ``timm.create_model``: how its dense form is made, as (name, kwargs),
            where name is a timm model name or "VisionTransformer" or "VisionTransformerDistilled".

    Raises:
        InvalidArgument: how to build the model is not known or cannot be written as JSON, or the folder does not exist.
        Unsupported: the model is of no supported family.
    """
    family = family_of(model)
    if factory is not None:
        family.set_factory(model, *factory)
    anatomy = family.inspect(model)
    if not anatomy.rebuildable:
        raise InvalidArgument(
            f"factory: expected (name, kwargs) that build the dense {anatomy.architecture}, got none; "
            "timm.create_model records them, a model built by hand does not"
        )
    for argument, value in anatomy.arguments.items():
        if not _is_json(value):
            raise InvalidArgument(f"factory: expected (name, kwargs) of JSON values, got {argument} = {value!r}")
    header = {
        "family": anatomy.family,
        "architecture": anatomy.architecture,
        "arguments": dict(anatomy.arguments),
        "sizes": anatomy.sizes,
        "pretrained_cfg": _without_sources(getattr(model, "pretrained_cfg", None)),
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
    }
    container.write(path, "model", header, model.state_dict())


def load(path: str | Path, *, verify: bool = True) -> nn.Module:
    """Rebuild a model that ``save`` wrote, on the CPU, bit for bit, in evaluation mode.

    Args:
        path: the file.
        verify: check the weights against their checksum, not only the header and the table of tensors.

    Raises:
        InvalidArgument: no such file, truncated or damaged, another program's, or of a newer format.
        Unsupported: this timm does not know the architecture.
    """
    header, tensors = container.read(path, "model", verify=verify)
    name = Path(path).name
    try:
        family = family_named(header["family"])
        arguments = {key: _tuples(value) for key, value in header["arguments"].items()}
        model = family.build(header["architecture"], arguments, torch.device("meta"))
        surgery.shape(model, family, header["sizes"])
        missing = [key for key, _ in model.named_buffers() if key not in tensors]
        if missing:
            raise InvalidArgument(f"{name}: expected buffers {', '.join(missing)}, got none")
        model.load_state_dict(tensors, strict=True, assign=True)
    except (KeyError, TypeError, AttributeError, RuntimeError, AssertionError) as error:
        raise InvalidArgument(
            f"{name}: expected a model that timm {timm.__version__} can build, got {error}"
        ) from error
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    if header["pretrained_cfg"] is not None:
        config: Any = {k: _tuples(v) for k, v in header["pretrained_cfg"].items()}
        model.pretrained_cfg = model.default_cfg = config
    else:
        family.set_factory(model, header["architecture"], arguments)
    return model.eval()


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _without_sources(config: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not config:
        return None
    return {name: value for name, value in config.items() if name not in _WEIGHT_SOURCES and _is_json(value)}


def _tuples(value: Any) -> Any:
    """JSON has lists where timm's arguments have tuples."""
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return value
