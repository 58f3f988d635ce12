"""Models that users changed by hand after they were built, drawn at random from what people do to them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import reference
import secateur as sc
import timm
import torch
from pruning import plan_of
from reference import randomise
from timm.layers import DropPath, GluMlp, PatchDropout, QuickGELU, RmsNorm, SwiGLU
from timm.models.vision_transformer import ResPostBlock
from torch import nn

__all__ = ["CHANGES", "Swish", "TwoTasks", "described", "drawn", "inputs_of"]

_VIT = {"img_size": (12, 15), "patch_size": 3, "embed_dim": 39, "num_heads": 3, "mlp_ratio": 1.7, "num_classes": 7}
_SWIN = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depths": (1, 2), "num_heads": (2, 3), "window_size": 4}


class Swish(nn.Module):
    """A module that only its user knows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (1.5 * x).sigmoid()


class TwoTasks(nn.Module):
    """A head with two outputs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, 3), nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.first(x), self.second(x)], -1)


def _vit(**more: Any) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **_VIT | {"depth": 3} | more)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": _vit,
    "average": partial(_vit, global_pool="avg"),
    "scaled": partial(_vit, init_values=0.1, reg_tokens=2, drop_path_rate=0.2),
    "classes": partial(_vit, norm_layer=partial(nn.LayerNorm, eps=1e-5), act_layer=nn.SiLU),
    "rms": partial(_vit, norm_layer=RmsNorm, act_layer=QuickGELU, mlp_layer=SwiGLU),
    "gated": partial(_vit, mlp_layer=partial(GluMlp, act_layer=nn.Sigmoid, gate_last=False), mlp_ratio=2.0),
    "post": partial(_vit, block_fn=ResPostBlock, qk_norm=True),
    "rates": partial(_vit, drop_rate=0.1, proj_drop_rate=0.1, patch_drop_rate=0.1, attn_drop_rate=0.2),
    "features": lambda: _vit(features_only=True, out_indices=(0, 1)).model,  # type: ignore[attr-defined]
    "distilled": lambda: timm.create_model("deit_tiny_distilled_patch16_224", **_VIT, depth=3),
    "swin": lambda: timm.create_model("swin_tiny_patch4_window7_224", **_SWIN, num_classes=7),
    "resnet": lambda: timm.create_model("resnet10t", num_classes=7, in_chans=3, stem_width=8, channels=(8, 12, 16, 20)),
}
_VITS = tuple(name for name in MODELS if name not in ("swin", "resnet"))


def _head(model: nn.Module) -> tuple[nn.Module, str]:
    """The module that holds the classifier, and its name there."""
    for place, name in ((model, "fc"), (model, "head")):
        head = getattr(place, name, None)
        if isinstance(head, (nn.Linear, nn.Identity)):
            return place, name
    return model.get_submodule("head"), "fc"


def _put_head(make: Callable[[int], nn.Module]) -> Callable[[Any, random.Random], None]:
    def change(model: Any, _dice: random.Random) -> None:
        place, name = _head(model)
        setattr(place, name, make(int(model.num_features)))
        if hasattr(model, "head_dist"):
            model.head_dist = make(int(model.num_features))

    return change


def _each(model: nn.Module, kind: type, dice: random.Random) -> Any:
    """One module of this class, drawn; None if there is none."""
    found = [module for module in model.modules() if type(module) is kind]
    return dice.choice(found) if found else None


def _conv(channels: int, *, bias: bool = True) -> Callable[[Any, random.Random], None]:
    def change(model: Any, _dice: random.Random) -> None:
        old = model.patch_embed.proj
        model.patch_embed.proj = nn.Conv2d(channels, old.out_channels, old.kernel_size, old.stride, bias=bias)

    return change


def _rate(value: float) -> Callable[[Any, random.Random], None]:
    def change(model: Any, dice: random.Random) -> None:
        dropout = _each(model, nn.Dropout, dice)
        if dropout is not None:
            dropout.p = value
        path = _each(model, DropPath, dice)
        if path is not None:
            path.drop_prob = value

    return change


def _set(value: object, *names: str) -> Callable[[Any, random.Random], None]:
    def change(model: Any, _dice: random.Random) -> None:
        place = model
        for name in names[:-1]:
            place = getattr(place, name) if not name.isdigit() else place[int(name)]
        setattr(place, names[-1], value() if callable(value) else value)

    return change


def _unfused(model: Any, dice: random.Random) -> None:
    attns = [module for module in model.modules() if hasattr(module, "fused_attn")]
    if attns:
        dice.choice(attns).fused_attn = False


def _frozen(model: Any, _dice: random.Random) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("blocks.0" not in name and "layer1" not in name)


def _other_sizes(model: Any, _dice: random.Random) -> None:
    model.set_input_size((18, 12))


def _fewer(model: Any, _dice: random.Random) -> None:
    model.blocks = model.blocks[:2]


def _without_first(model: Any, _dice: random.Random) -> None:
    del model.blocks[0]


def _eps(model: Any, dice: random.Random) -> None:
    norms = [module for module in model.modules() if hasattr(module, "eps")]
    dice.choice(norms).eps = 3e-4


def _pooled(model: Any, _dice: random.Random) -> None:
    model.reset_classifier(4, "avg")


def _checkpointed(model: Any, _dice: random.Random) -> None:
    model.set_grad_checkpointing(True)


# What is done, and to which models it can be.
CHANGES: dict[str, tuple[Callable[[Any, random.Random], None], tuple[str, ...]]] = {
    "head of five": (_put_head(lambda width: nn.Linear(width, 5)), (*_VITS, "swin", "resnet")),
    "head without bias": (_put_head(lambda width: nn.Linear(width, 3, bias=False)), (*_VITS, "swin", "resnet")),
    "no head": (_put_head(lambda _width: nn.Identity()), (*_VITS, "swin", "resnet")),
    "head of two layers": (
        _put_head(lambda width: nn.Sequential(nn.Dropout(0.1), nn.Linear(width, 5))),
        (*_VITS, "swin"),
    ),
    "head of two tasks": (_put_head(TwoTasks), (*_VITS, "swin")),
    "one channel": (_conv(1), (*_VITS, "swin")),
    "five channels without bias": (_conv(5, bias=False), (*_VITS, "swin")),
    "two blocks": (_fewer, _VITS),
    "without the first block": (_without_first, _VITS),
    "other images": (_other_sizes, tuple(name for name in _VITS if name != "distilled")),
    "rates": (_rate(0.35), tuple(MODELS)),
    "a dropped path": (_set(lambda: DropPath(0.25), "blocks", "1", "drop_path1"), _VITS),
    "no dropped path": (_set(nn.Identity, "blocks", "1", "drop_path2"), _VITS),
    "dropped patches": (_set(lambda: PatchDropout(0.3, 2), "patch_drop"), _VITS),
    "a head's dropout": (_set(lambda: nn.Dropout(0.2), "head_drop"), tuple(n for n in _VITS if n != "distilled")),
    "not fused": (_unfused, (*_VITS, "swin")),
    "frozen": (_frozen, tuple(MODELS)),
    "eps": (_eps, tuple(MODELS)),
    "average pooling": (_pooled, tuple(name for name in _VITS if name not in ("distilled", "features"))),
    "checkpoints": (_checkpointed, tuple(MODELS)),
    "no last norm": (_set(nn.Identity, "norm"), _VITS),
    "a norm after pooling": (_set(lambda: nn.LayerNorm(39, eps=1e-4), "fc_norm"), ("plain", "scaled", "rates")),
    "another norm": (_set(lambda: RmsNorm(39), "blocks", "1", "norm1"), ("plain", "average", "scaled", "rates")),
    "relu": (_set(nn.ReLU, "blocks", "0", "mlp", "act"), tuple(n for n in _VITS if n not in ("gated", "rms"))),
    "approximate": (_set(lambda: nn.GELU("tanh"), "blocks", "1", "mlp", "act"), ("plain", "average", "post")),
    "own activation": (_set(Swish, "blocks", "1", "mlp", "act"), ("plain", "average", "rates", "distilled")),
}
_LAYOUTS = ("dense", "exact", "exact", "stock")
_DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16)


def drawn(seed: int) -> tuple[str, nn.Module]:
    """A model of odd sizes with some changes, cut or not, and what was done to it in words."""
    dice = random.Random(seed)
    kind = dice.choice(list(MODELS))
    torch.manual_seed(seed)
    model = MODELS[kind]()
    possible = [name for name, (_, models) in CHANGES.items() if kind in models]
    names = dice.sample(possible, dice.choice((1, 1, 2, 3)))
    # One head, one first convolution, and blocks that are still there.
    for group in ("head of", "channel", "block", "norm", "dropped path"):
        same = [
            name for name in names if group in name or (group == "head of" and name in ("no head", "average pooling"))
        ]
        names = [name for name in names if name not in same[1:]]
    if "two blocks" in names or "without the first block" in names:
        names = [name for name in names if name != "average pooling"]
    for name in names:
        CHANGES[name][0](model, dice)
    randomise(model, seed).eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
            module.running_var.uniform_(0.5, 2)
            assert module.running_mean is not None
            module.running_mean.normal_()
    layout = dice.choice(_LAYOUTS)
    if layout == "stock" and (kind in ("resnet", "post") or "own activation" in names):
        layout = "exact"
    if layout != "dense":
        anatomy = sc.inspect(model)
        kinds = ("qk", "v", "ffn", "heads", "layer", "conv") if layout == "exact" else ("qk", "v", "ffn")
        groups = {
            group.name: (group.heads, group.size)
            for group in anatomy.groups
            if group.kind in kinds and (group.kind != "layer" or dice.random() < 0.2)
        }
        keep = reference.random_keep(np.random.default_rng(seed), groups, 0.6)
        layers = [name for name in groups if name in anatomy.layers]
        # At least one of each stays.
        gone = [name for name in layers if not name.startswith(("blocks.1.", "layers.1.blocks.1."))]
        keep |= {name: np.zeros((1, 0), dtype=np.int64) for name in gone}
        sc.prune(model, plan_of(model, keep), layout=layout)
    dtype = dice.choice(_DTYPES)
    return f"{seed}: {kind}, {', '.join(names)}; {layout}, {dtype}", model.to(dtype)


def inputs_of(model: Any) -> torch.Tensor:
    """Two images that the model takes."""
    size = sc.inspect(model).input_size
    images = torch.rand(2, *size, generator=torch.Generator().manual_seed(3)) * 2 - 1
    return images.to(next(model.parameters()).dtype)


def described(model: nn.Module) -> dict[str, Any]:
    """Everything by which two models can differ that JSON can hold: outputs, weights, modules, settings, gradients."""
    modules = {}
    for name, module in model.named_modules():
        plain = {
            what: value if not isinstance(value, tuple) else list(value)
            for what, value in vars(module).items()
            if isinstance(value, (bool, int, float, str, tuple, type(None)))
            and not what.startswith("_")
            # The last two follow from what stands in the model, and users forget to set them.
            and what not in ("training", "secateur_factory", "num_classes", "in_chans")
        }
        modules[name] = [f"{type(module).__module__}.{type(module).__qualname__}", module.extra_repr(), plain]
    with torch.no_grad():
        output = model(inputs_of(model))
    state = {name: _digest(value) for name, value in model.state_dict().items()}
    buffers = {name: _digest(value) for name, value in model.named_buffers()}
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    return {"modules": modules, "output": _digest(output), "state": state, "buffers": buffers, "frozen": frozen}


def _digest(value: torch.Tensor) -> str:
    data = value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(data).hexdigest()[:16]}"
