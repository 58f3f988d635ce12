"""Models of other libraries that timm has too: by what name, and of which sizes.

Nothing is imported: a model's classes say what library it is of, and its configuration or layers what it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
from torch import nn

__all__ = ["same_in_timm"]

# Words in timm's names, by width and depth.
_WORDS = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large", (1280, 32): "huge"}
_WORDS |= {(1408, 40): "giant", (1536, 40): "giant", (1152, 27): "so400m"}
_SWINS = {(96, (2, 2, 6, 2)): "tiny", (96, (2, 2, 18, 2)): "small", (128, (2, 2, 18, 2)): "base"}
_SWINS |= {(192, (2, 2, 18, 2)): "large"}
_RESNETS: dict[tuple[bool, tuple[int, ...]], str] = {(True, (2, 2, 2, 2)): "18", (True, (3, 4, 6, 3)): "34"}
_RESNETS |= {(False, (3, 4, 6, 3)): "50"}
_RESNETS |= {(False, (2, 2, 2, 2)): "26", (False, (3, 4, 23, 3)): "101", (False, (3, 8, 36, 3)): "152"}
# Where timm has other weights of the same name as well.
_TAGS = {"vit_mae": "mae", "clip": "openai"}
# transformers' types whose parts for images have a configuration of their own.
_NESTED = ("vision_config", "encoder", "backbone_config")


def same_in_timm(model: nn.Module, accepts: Callable[[nn.Module], bool]) -> str | None:
    """Return what to say of a model of another library that timm has as well; None for models of no such library."""
    bases = [f"{base.__module__}.{base.__qualname__}" for base in type(model).__mro__]
    if any(base.startswith("transformers.") for base in bases):
        config = _vision(getattr(model, "config", None))
        found = _of_transformers(config)
        return f"of transformers; {_advice(found, getattr(config, 'model_type', ''), accepts)}"
    if any(base.startswith("torchvision.models.") for base in bases):
        found = _of_torchvision(model)
        return f"of torchvision; {_advice(found, type(model).__name__, accepts, state_dict=True)}"
    if any(base.endswith(".DinoVisionTransformer") for base in bases):
        return f"of DINOv2's own code; {_advice(_of_dinov2(model), 'dinov2', accepts)}"
    return None


def _advice(
    found: tuple[str, str] | None, kind: object, accepts: Callable[[nn.Module], bool], *, state_dict: bool = False
) -> str:
    """Say what to do with (timm's name, arguments), or ("", a constructor's call), or else with a kind of model."""
    if found is None:
        word = str(kind).lower().replace("_", "")
        known = any(word in name.replace("_", "") for name in (*timm.list_modules(), *timm.list_models()))
        return "timm has its own class of this model" if word and known else "not timm's class"
    name, how = found
    if not name:
        return f"timm has its own class of this model, which takes the same weights by other names: {how}"
    architecture = name.partition(".")[0]
    model = timm.create_model(architecture, pretrained=False, device="meta")
    if not accepts(model):
        return f"in timm it is {architecture}, of a class that is not supported either ({type(model).__name__})"
    call = f'timm.create_model("{name}"{f", {how}" if how else ""})'
    if state_dict:
        return f"{call} has the same weights by the same names: load_state_dict(model.state_dict())"
    return f"timm has this model with the same weights, by other names: {call}"


def _vision(config: Any) -> Any:
    """Return the configuration of the part for images."""
    for nested in _NESTED:
        inner = getattr(config, nested, None)
        if getattr(inner, "model_type", None):
            config = inner
    return config


def _of_transformers(config: Any) -> tuple[str, str] | None:
    """Return timm's name and arguments of what a configuration of transformers describes."""
    kind = str(getattr(config, "model_type", "")).removesuffix("_vision_model")
    try:
        if kind in ("swin", "swinv2"):
            return _swin(kind, config)
        if kind == "resnet":
            return _resnet(config)
        word = _WORDS.get((int(config.hidden_size), int(config.num_hidden_layers)), "")
        patch, side = _side(config.patch_size), _side(config.image_size)
    except (AttributeError, TypeError, ValueError):  # another kind of model
        return None
    quick = "_quickgelu" if getattr(config, "hidden_act", "") == "quick_gelu" else ""
    stems = {
        "vit": f"vit_{word}_patch{patch}",
        "vit_msn": f"vit_{word}_patch{patch}",
        "vit_mae": f"vit_{word}_patch{patch}",
        "ijepa": f"vit_{word}_patch{patch}_gap",
        "deit": f"deit_{word}_distilled_patch{patch}",
        "beit": f"beit_{word}_patch{patch}",
        "clip": f"vit_{word}_patch{patch}_clip{quick}",
        "siglip": f"vit_{word}_patch{patch}_siglip",
        "dinov2": f"vit_{word}_patch{patch}_dinov2",
        "dinov2_with_registers": f"vit_{word}_patch{patch}_reg{getattr(config, 'num_register_tokens', 4)}_dinov2",
        "dinov3_vit": f"vit_{word}_patch{patch}_dinov3",
    }
    if kind not in stems:
        return None
    found = _named(stems[kind], side) if word else None
    tagged = f"{found[0]}.{_TAGS[kind]}" if found is not None and kind in _TAGS else ""
    if found is not None and tagged in timm.list_pretrained(f"{found[0]}.*"):
        return tagged, found[1]
    if found is None and kind in ("vit", "vit_msn", "deit"):
        cls = "VisionTransformerDistilled" if kind == "deit" else "VisionTransformer"
        ratio = float(config.intermediate_size) / float(config.hidden_size)
        sizes = f"img_size={side}, patch_size={patch}, embed_dim={config.hidden_size}, depth="
        sizes += f"{config.num_hidden_layers}, num_heads={config.num_attention_heads}, mlp_ratio={ratio:g}"
        return "", f"{cls}({sizes})"
    return found


def _side(value: Any) -> int:
    sides = (value,) if isinstance(value, int) else tuple(value)
    if len(set(sides)) != 1:
        raise ValueError("not square")
    return int(sides[0])


def _named(stem: str, side: int) -> tuple[str, str] | None:
    """Return the name that begins so and exists, and the argument for another side of images."""
    for name in (f"{stem}_{side}", stem, f"{stem}_224"):
        if timm.is_model(name):
            known: Any = timm.get_pretrained_cfg(name)
            own = side if known is None else known.input_size[-1]
            return name, "" if own == side else f"img_size={side}"
    return None


def _swin(kind: str, config: Any) -> tuple[str, str] | None:
    word = _SWINS.get((int(config.embed_dim), tuple(config.depths)))
    patch, side, window = _side(config.patch_size), _side(config.image_size), _side(config.window_size)
    name = f"{kind}_{word}_patch{patch}_window{window}_{side}"
    name = name if kind == "swin" else f"{kind}_{word}_window{window}_{side}"
    return (name, "") if word and timm.is_model(name) else None


def _resnet(config: Any) -> tuple[str, str] | None:
    number = _RESNETS.get((config.layer_type == "basic", tuple(config.depths)))
    return (f"resnet{number}", "") if number else None


def _of_torchvision(model: Any) -> tuple[str, str] | None:
    """Return timm's name of a ResNet of torchvision, whose weights have the same names."""
    if type(model).__name__ != "ResNet":
        return None
    try:
        depths = tuple(len(getattr(model, f"layer{stage}")) for stage in (1, 2, 3, 4))
        number = _RESNETS[type(model.layer1[0]).__name__ == "BasicBlock", depths]
        groups, width, classes = model.groups, model.base_width, model.fc.out_features
    except (AttributeError, KeyError, TypeError):
        return None
    name = f"resnet{number}"
    if groups > 1:
        name = f"resnext{number}_{groups}x{width}d"
    elif width != 64:
        name = f"wide_resnet{number}_{width // 64}"
    how = "" if classes == 1000 else f"num_classes={classes}"
    return (name, how) if timm.is_model(name) else None


def _of_dinov2(model: Any) -> tuple[str, str] | None:
    try:
        word = _WORDS.get((int(model.embed_dim), int(model.n_blocks)))
        registers = f"_reg{model.num_register_tokens}" if model.num_register_tokens else ""
        name = f"vit_{word}_patch{int(model.patch_size)}{registers}_dinov2"
    except (AttributeError, TypeError):
        return None
    return (name, "") if timm.is_model(name) else None
