"""Models of other libraries that timm has too: by what name, and of which sizes.

Nothing is imported: a model's classes say what library it is of, and its configuration or layers what it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import timm
from torch import nn

__all__ = ["NOT_IN_TIMM", "same_in_timm"]

NOT_IN_TIMM = "not timm's class"

# Words in timm's names, by width and depth.
_WORDS = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large", (1280, 32): "huge"}
_WORDS |= {(1408, 40): "giant", (1536, 40): "giant", (1664, 48): "gigantic", (1152, 27): "so400m", (4096, 40): "7b"}
_SWINS = {(96, (2, 2, 6, 2)): "tiny", (96, (2, 2, 18, 2)): "small", (128, (2, 2, 18, 2)): "base"}
_SWINS |= {(192, (2, 2, 18, 2)): "large"}
_RESNETS: dict[tuple[bool, tuple[int, ...]], str] = {(True, (2, 2, 2, 2)): "18", (True, (3, 4, 6, 3)): "34"}
_RESNETS |= {(False, (3, 4, 6, 3)): "50"}
_RESNETS |= {(False, (2, 2, 2, 2)): "26", (False, (3, 4, 23, 3)): "101", (False, (3, 8, 36, 3)): "152"}
# transformers' types that timm has, as templates of its names.
_STEMS = {
    "vit": "vit_{word}_patch{patch}",
    "vit_msn": "vit_{word}_patch{patch}",
    "vit_mae": "vit_{word}_patch{patch}",
    "ijepa": "vit_{word}_patch{patch}_gap",
    "deit": "deit_{word}_distilled_patch{patch}",
    "beit": "beit_{word}_patch{patch}",
    "clip": "vit_{word}_patch{patch}_clip",
    "siglip": "vit_{word}_patch{patch}_siglip",
    "dinov2": "vit_{word}_patch{patch}_dinov2",
    "dinov2_with_registers": "vit_{word}_patch{patch}_reg{registers}_dinov2",
    "dinov3_vit": "vit_{word}_patch{patch}_dinov3",
}
# Those that timm can build in any size, and what is special about them there.
_PLAIN: dict[str, dict[str, Any]] = {"vit": {}, "vit_msn": {}, "vit_mae": {}, "deit": {}}
_PLAIN |= {"ijepa": {"class_token": False, "global_pool": "avg", "fc_norm": False}}
# The activations of timm's models of these names; "gelu" for others.
_ACTIVATIONS = {"clip": ("gelu", "quick_gelu"), "siglip": ("gelu", "gelu_pytorch_tanh"), "dinov3_vit": ("gelu", "silu")}
# What a ResNet of torchvision is made of, besides an identity in place of its classifier.
_LAYERS = ("Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d", "AdaptiveAvgPool2d", "Linear")
# transformers' types whose parts for images have a configuration of their own.
_NESTED = ("vision_config", "encoder", "backbone_config")


class _Model(NamedTuple):
    """A model of timm: a name of `create_model`, or a class where ``known`` is false, and its arguments."""

    name: str
    arguments: dict[str, Any]
    known: bool = True

    def built(self) -> Any:
        """Return the model of a name, without weights."""
        return timm.create_model(self.name.partition(".")[0], pretrained=False, device="meta", **self.arguments)

    def __str__(self) -> str:
        told = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        if not self.known:
            return f"timm.models.{self.name}({told})"
        return f'timm.create_model("{self.name}"{f", {told}" if told else ""})'


class _Sizes(NamedTuple):
    """What two vision transformers of the same weights have in common."""

    width: int
    depth: int
    heads: int
    hidden: int
    gated: bool
    registers: int


def same_in_timm(model: nn.Module) -> str | None:
    """Return what to say of a model of another library that timm has as well; None for models of no such library."""
    bases = [f"{base.__module__}.{base.__qualname__}" for base in type(model).__mro__]
    if any(base.startswith("transformers.") for base in bases):
        config, part = _vision(getattr(model, "config", None))
        subject = "its part for images" if part else "this model"
        kind = getattr(config, "model_type", "") if hasattr(config, "num_channels") else ""
        return f"of transformers; {_advice(_tried(_of_transformers, config), kind, subject)}"
    if any(base.startswith("torchvision.models.") for base in bases):
        twin = _tried(_of_torchvision, model)
        if twin is not None:
            return f"of torchvision; {twin} has the same weights by the same names: load_state_dict(model.state_dict())"
        return f"of torchvision; {_advice(None, type(model).__name__)}"
    for base in bases:
        if base.endswith(".DinoVisionTransformer"):
            version = "3" if base.startswith("dinov3.") else "2"
            found = _tried(_of_dinov3 if version == "3" else _of_dinov2, model)
            return f"of DINOv{version}'s own code; {_advice(found, f'dinov{version}')}"
    return None


def _tried(find: Callable[[Any], _Model | None], model: Any) -> _Model | None:
    try:
        return find(model)
    except (AttributeError, TypeError, ValueError, KeyError, IndexError, ZeroDivisionError):  # another kind of model
        return None


def _advice(found: _Model | None, kind: object, subject: str = "this model") -> str:
    """Say what to do with a model of timm, or else with a kind of model."""
    if found is None:
        return f"timm has its own class of {subject}" if _is_known(str(kind).lower()) else NOT_IN_TIMM
    if not found.known:
        return f"timm has its own class of {subject}, which takes the same weights by other names: {found}"
    return f"timm has {subject} with the same weights, by other names: {found}"


def _is_known(kind: str) -> bool:
    """Return whether timm has models of that name: at the beginning of its own names, or a word in them."""
    word = kind.removesuffix("_vision_model").replace("_", "")
    names = (*timm.list_modules(), *timm.list_models())
    in_names = any(name.replace("_", "").startswith(word) or word in name.split("_") for name in names)
    return kind in _STEMS or (bool(word) and in_names)


def _vision(config: Any) -> tuple[Any, bool]:
    """Return the configuration of the part for images, and whether there are other parts."""
    part = False
    for nested in _NESTED:
        inner = getattr(config, nested, None)
        if getattr(inner, "model_type", None):
            config, part = inner, True
    return config, part


def _of_transformers(config: Any) -> _Model | None:
    """Return timm's model of what a configuration of transformers describes."""
    kind = str(config.model_type).removesuffix("_vision_model")
    if kind in ("swin", "swinv2"):
        return _swin(kind, config)
    if kind == "resnet":
        return _resnet(config)
    activation = config.hidden_act
    if kind not in _STEMS or activation not in _ACTIVATIONS.get(kind, ("gelu",)):
        return None
    width, depth, heads = int(config.hidden_size), int(config.num_hidden_layers), int(config.num_attention_heads)
    gated = bool(getattr(config, "use_gated_mlp", False) or getattr(config, "use_swiglu_ffn", False))
    if kind.startswith("dinov2"):
        hidden = int(width * config.mlp_ratio)
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden
    else:
        hidden = int(config.intermediate_size)
    if min(width, depth, heads, hidden) < 1:
        return None
    registers = int(getattr(config, "num_register_tokens", 0))
    sizes = _Sizes(width, depth, heads, hidden, gated, registers)
    patch, side, channels = _side(config.patch_size), _side(config.image_size), int(config.num_channels)
    bias = bool(getattr(config, "qkv_bias", True))

    stem = _STEMS[kind].format(word=_word(sizes), patch=patch, registers=registers)
    stem += "_quickgelu" if activation == "quick_gelu" else "_qkvb" if getattr(config, "query_bias", False) else ""
    found = _named(stem, sizes, side, channels) if bias else None
    if found is not None:
        # Where timm has other weights of the same name as well; only OpenAI's CLIP and its like are of this activation.
        tag = "mae" if kind == "vit_mae" else "openai" if activation == "quick_gelu" else ""
        tagged = f"{found.name}.{tag}"
        return found._replace(name=tagged) if tag and tagged in timm.list_pretrained(f"{found.name}.*") else found
    if kind not in _PLAIN:
        return None
    arguments: dict[str, Any] = {
        "img_size": side,
        "patch_size": patch,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
    }
    arguments |= {"mlp_ratio": _ratio(hidden, width)} | ({} if bias else {"qkv_bias": False})
    arguments |= ({} if channels == 3 else {"in_chans": channels}) | _PLAIN[kind]
    return _Model("VisionTransformerDistilled" if kind == "deit" else "VisionTransformer", arguments, known=False)


def _word(sizes: _Sizes) -> str:
    word = _WORDS.get((sizes.width, sizes.depth), "")
    return f"{word}_plus" if sizes.gated and word in ("small", "huge") else word


def _ratio(hidden: int, width: int) -> float:
    """Return the shortest number of which timm makes that many hidden channels: it rounds down."""
    if hidden % width == 0:
        return hidden / width
    middle = (hidden + 0.5) / width
    return next(ratio for digits in range(1, 18) if int(width * (ratio := float(f"{middle:.{digits}g}"))) == hidden)


def _side(value: Any) -> int | tuple[int, ...]:
    sides = (value, value) if isinstance(value, int) else tuple(int(side) for side in value)
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"no sides: {value}")
    return int(sides[0]) if len(set(sides)) == 1 else sides


def _named(stem: str, sizes: _Sizes, side: int | tuple[int, ...], channels: int) -> _Model | None:
    """Return the model whose name begins so and that has these sizes, with arguments for other images."""
    for name in (f"{stem}_{side}", stem, f"{stem}_224"):
        if timm.is_model(name):
            found = _Model(name, {} if channels == 3 else {"in_chans": channels})
            built = found.built()
            if _side(built.patch_embed.img_size) != side:
                found.arguments["img_size"] = side
            return found if _sizes(built) == sizes else None
    return None


def _sizes(model: Any) -> _Sizes:
    block = model.blocks[0]
    token = getattr(model, "reg_token", None)
    gated, registers = type(block.mlp).__name__ != "Mlp", 0 if token is None else token.shape[1]
    heads, hidden = block.attn.num_heads, block.mlp.fc2.in_features
    return _Sizes(model.embed_dim, len(model.blocks), heads, hidden, gated, registers)


def _swin(kind: str, config: Any) -> _Model | None:
    word = _SWINS[int(config.embed_dim), tuple(config.depths)]
    patch, side, window = _side(config.patch_size), _side(config.image_size), _side(config.window_size)
    name = f"{kind}_{word}{f'_patch{patch}' if kind == 'swin' else ''}_window{window}_{side}"
    channels = int(config.num_channels)
    if not timm.is_model(name) or patch != 4 or config.hidden_act != "gelu" or not config.qkv_bias:
        return None
    found = _Model(name, {} if channels == 3 else {"in_chans": channels})
    heads = tuple(stage.blocks[0].attn.num_heads for stage in found.built().layers)
    same = tuple(config.num_heads) == heads and config.mlp_ratio == 4 and not config.use_absolute_embeddings
    return found if same else None


def _resnet(config: Any) -> _Model | None:
    basic = config.layer_type == "basic"
    widths, channels = tuple(width if basic else 4 * width for width in (64, 128, 256, 512)), int(config.num_channels)
    same = (config.embedding_size, tuple(config.hidden_sizes), config.hidden_act) == (64, widths, "relu")
    # Strides of other convolutions, with weights of the same shapes.
    if not same or config.downsample_in_first_stage or config.downsample_in_bottleneck:
        return None
    return _Model(f"resnet{_RESNETS[basic, tuple(config.depths)]}", {} if channels == 3 else {"in_chans": channels})


def _of_torchvision(model: Any) -> _Model | None:
    """Return timm's model of a ResNet of torchvision, whose weights have the same names."""
    if type(model).__name__ != "ResNet":
        return None
    depths = tuple(len(getattr(model, f"layer{stage}")) for stage in (1, 2, 3, 4))
    name = f"resnet{_RESNETS[type(model.layer1[0]).__name__ == 'BasicBlock', depths]}"
    if model.groups > 1:
        name = f"{name.replace('resnet', 'resnext')}_{model.groups}x{model.base_width}d"
    elif model.base_width != 64:
        name = f"wide_{name}_{model.base_width // 64}"
    classes, channels = 0 if type(model.fc) is nn.Identity else model.fc.out_features, model.conv1.in_channels
    arguments = {"num_classes": classes} if classes != 1000 else {}
    found = _Model(name, arguments | ({"in_chans": channels} if channels != 3 else {}))
    return found if timm.is_model(name) and _same_layers(model, found.built()) else None


def _same_layers(model: Any, twin: Any) -> bool:
    """Return whether layers changed by hand, dilated or of other strides are the same in timm's model."""
    kinds = {type(layer).__name__ for name, layer in model.named_modules() if not [*layer.children()] and name != "fc"}
    own, other = ({name: value.shape for name, value in each.state_dict().items()} for each in (model, twin))
    places = {"maxpool", *(name.rpartition(".")[0] for name in other)}
    return (
        kinds <= set(_LAYERS)
        and own == other
        and all(repr(model.get_submodule(place)) == repr(twin.get_submodule(place)) for place in places)
        and repr(model.avgpool) == repr(nn.AdaptiveAvgPool2d((1, 1)))
    )


def _of_dinov2(model: Any) -> _Model | None:
    sizes = _own_sizes(model, int(model.num_register_tokens))
    registers = f"_reg{sizes.registers}" if sizes.registers else ""
    stem = f"vit_{_word(sizes)}_patch{int(model.patch_size)}{registers}_dinov2"
    return _named(stem, sizes, _side(model.patch_embed.img_size), model.patch_embed.proj.in_channels)


def _of_dinov3(model: Any) -> _Model | None:
    sizes = _own_sizes(model, int(model.n_storage_tokens))
    bias = any(name.endswith("qkv.bias") for name, _ in model.named_parameters())
    stem = f"vit_{_word(sizes)}_patch{int(model.patch_size)}_dinov3{'_qkvb' if bias else ''}"
    return _named(stem, sizes, _side(model.patch_embed.img_size), model.patch_embed.proj.in_channels)


def _own_sizes(model: Any, registers: int) -> _Sizes:
    """Return the sizes of a model of DINO's own code, whose blocks may stand in chunks."""
    mlp: Any = next(module for name, module in model.named_modules() if name.endswith(".mlp"))
    gated = not hasattr(mlp, "fc2")
    hidden = (mlp.w3 if gated else mlp.fc2).in_features
    return _Sizes(int(model.embed_dim), int(model.n_blocks), int(model.num_heads), hidden, gated, registers)
