"""Builds a pruned model for timm.create_model, from arguments that JSON can hold."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.models import build_model_with_cfg, get_pretrained_cfg, is_model
from torch import Tensor, nn

from ..data.model_input import input_dtype
from ..errors import InvalidArgument
from ..families.classes import decoded
from ..timm_models import DESCRIBING, ENTRY_POINTS
from .native import skeleton, without_sources

__all__ = ["created"]

# What timm takes from the configuration of the weights unless it is given.
_CONFIGURED = ("num_classes", "global_pool", "in_chans", "img_size")
_DEFAULTS: Mapping[str, Any] = {"handmade": False, "sizes": {}, "changes": {}}


def created(name: str, pretrained: bool, kwargs: Mapping[str, Any]) -> nn.Module:
    """Build the model of an entry point, as timm's own do.

    ``num_classes``, ``img_size`` and all others but those that describe the cut go before the ``arguments`` of the
    dense model.

    Raises:
        InvalidArgument: no dense model or sizes, or some that do not fit it.
    """
    given = {**_DEFAULTS, **{each: kwargs[each] for each in DESCRIBING if each in kwargs}}
    others = {each: value for each, value in kwargs.items() if each not in DESCRIBING}
    if not isinstance(given.get("dense"), str) or not isinstance(given.get("arguments", {}), Mapping):
        raise InvalidArgument(f"dense: expected the dense model's name and arguments, got {given.get('dense')!r}")
    if not isinstance(given["sizes"], Mapping):
        raise InvalidArgument(f"sizes: expected those of groups by name, got {given['sizes']!r}")
    given["precision"] = getattr(torch, str(given.get("precision", "float32")), None)
    if not isinstance(given["precision"], torch.dtype) or not given["precision"].is_floating_point:
        raise InvalidArgument(f"precision: expected a type of floating-point numbers, got {kwargs['precision']!r}")
    given["arguments"] = decoded(given.get("arguments", {}))
    for each in _CONFIGURED:
        if each in given["arguments"]:
            others.setdefault(each, given["arguments"][each])
    if not others.get("pretrained_cfg") and is_model(given["dense"]):
        # What the dense model says of images, not its weights.
        found = get_pretrained_cfg(given["dense"])
        config = without_sources(found.to_dict()) if found is not None else None
        others["pretrained_cfg"] = {**(config or {}), "architecture": name, "tag": None}
    features = {"out_indices": others.pop("out_indices", 3), "feature_cls": "getter"}
    model: nn.Module = build_model_with_cfg(
        partial(_cut, ENTRY_POINTS[name], given),
        name,
        pretrained,
        pretrained_filter_fn=_fitted,
        feature_cfg=features,
        **others,
    )
    return model


def _cut(
    family: str,
    given: Mapping[str, Any],
    *,
    device: Any = None,
    dtype: torch.dtype | None = None,
    num_classes: int | None = None,
    img_size: Any = None,
    **others: Any,
) -> nn.Module:
    arguments = {**given["arguments"], **others}
    # Sizes of groups of tokens count from the patches of the images that they were written for.
    merging = any(name.endswith(".tokens") for name in given["sizes"])
    if img_size is not None and not merging:
        arguments["img_size"] = _pair(img_size)
    header = {"family": family, "architecture": given["dense"], **given, "arguments": arguments}
    place = torch.get_default_device() if device is None else torch.device(device)
    model: Any = skeleton(header, place).train()
    if merging and img_size is not None and _pair(img_size) != model.patch_embed.img_size:
        model.set_input_size(img_size=_pair(img_size))
    if num_classes not in (None, model.num_classes):
        model.reset_classifier(num_classes)
    # timm records what it was called with; the dense model's arguments are among that.
    model._model_args = {}
    if given["handmade"]:
        model.secateur_factory = (given["dense"], arguments)
    wanted = dtype or given["precision"]
    result: nn.Module = model if wanted == input_dtype(model) else model.to(wanted)
    return result


def _pair(size: Any) -> tuple[int, ...]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _fitted(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Resample what depends on the size of images, by the function that timm has for models of this class."""
    for cls in type(model).__mro__:
        fit = getattr(sys.modules[cls.__module__], "checkpoint_filter_fn", None)
        if fit is not None:
            fitted: dict[str, Tensor] = fit(state, model)
            return fitted
    return state
