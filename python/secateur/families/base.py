"""The interface of a family of models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from inspect import signature
from typing import Any, ClassVar

import timm
import torch
from timm.layers import LayerNorm, LayerNormFp32, RmsNorm, RmsNormFp32
from torch import nn

from ..anatomy import Anatomy, LastBlock
from ..errors import InvalidArgument, Unsupported

__all__ = [
    "NORMS",
    "Family",
    "classifiers",
    "classifies",
    "current_arguments",
    "fit_modules",
    "image_channels",
    "refuse_computed",
    "refuse_tied",
    "unsupported",
]

# Norms over channels by exact class, and whether they are centred (LayerNorm) or not (RMSNorm).
NORMS: Mapping[type[nn.Module], bool] = {
    nn.LayerNorm: True,
    LayerNorm: True,
    LayerNormFp32: True,
    RmsNorm: False,
    RmsNormFp32: False,
}
# Further arguments of timm.create_model, which would read files or return something other than the model.
_NOT_ARCHITECTURE = ("checkpoint_path", "cache_dir", "features_only", "scriptable", "exportable", "device", "dtype")


class Family(ABC):
    """A family of models; a subclass registers itself with ``families.register``.

    ``name`` is written to files. ``models`` are accepted by exact class, since a subclass may compute anything;
    ``others`` says in an error's text what else is, if ``accepts`` takes more. With
    ``verified``, ``prune`` compares every cut model with the dense one before it returns.
    """

    name: ClassVar[str]
    models: ClassVar[tuple[type[nn.Module], ...]]
    others: ClassVar[str] = ""
    verified: ClassVar[bool] = False

    def accepts(self, model: nn.Module) -> bool:
        """Return whether the model's class belongs to this family."""
        return type(model) in self.models

    @abstractmethod
    def inspect(self, model: nn.Module) -> Anatomy:
        """Describe the model, or raise Unsupported naming the module and the reason."""

    def build(self, architecture: str, arguments: Mapping[str, Any], device: torch.device) -> nn.Module:
        """Build the dense model, given a timm model name or the name of one of the family's classes, without downloads.

        Raises:
            InvalidArgument: an argument that would make timm read or download weights.
            Unsupported: neither timm nor the family knows the architecture.
        """
        for name in arguments:
            if name in _NOT_ARCHITECTURE or name.startswith("pretrained"):
                raise InvalidArgument(f"arguments: expected those of the architecture, got {name!r}")
        for cls in self.models:
            if architecture == cls.__name__:
                if "device" in signature(cls).parameters:
                    return cls(**arguments, device=device)
                with device:
                    return cls(**arguments)
        if not timm.is_model(architecture):
            names = " or ".join(cls.__name__ for cls in self.models)
            raise Unsupported(
                f"architecture: expected one that timm {timm.__version__} knows, {names}, got {architecture!r}"
            )
        model: nn.Module = timm.create_model(architecture, pretrained=False, **arguments, device=device)
        return model

    def arguments(self, model: nn.Module) -> dict[str, Any]:
        """Return arguments of the dense model as its modules have them now, whatever it was built with.

        Modules may have been replaced by hand: a classifier, the first convolution.
        """
        return current_arguments(model)

    def adapt(self, model: nn.Module, anatomy: Anatomy, sizes: Mapping[str, int]) -> None:
        """Make modules and attributes fit parameters that were just cut from ``anatomy`` to ``sizes``."""
        del anatomy, sizes
        fit_modules(model)

    def stock_sizes(self, model: nn.Module, anatomy: Anatomy, sizes: Mapping[str, int]) -> dict[str, int]:
        """Return the sizes in the stock layout after a cut to ``sizes``, or raise Unsupported naming the module."""
        if any(layer.layout is not None for layer in anatomy.layers.values()):
            raise Unsupported(f"layout: expected 'exact' for {type(model).__name__}, got 'stock'")
        return dict(sizes)

    def make_stock(self, model: nn.Module, head_dims: Mapping[str, int]) -> None:
        """Make attention modules the library's own; their parameters already have the given size per head."""
        if head_dims:
            raise Unsupported(f"layout: expected 'exact' for {type(model).__name__}, got 'stock'")

    def last_block(self, model: nn.Module) -> LastBlock:
        """Return whether the last block was made to compute only what is pooled, whatever the model pools now."""
        del model
        return "whole"

    def set_last_block(self, model: nn.Module, last_block: LastBlock, *, strict: bool = True) -> None:
        """Make the last block compute only the tokens that the output depends on ("pooled"), or all ("whole").

        With ``strict`` false, "pooled" may wait for another pooling.

        Raises:
            Unsupported: the output depends on all tokens; the text names the reason.
        """
        del strict
        if last_block != "whole":
            raise Unsupported(f"last_block: expected 'whole' for {type(model).__name__}, got {last_block!r}")

    def alone(self, model: nn.Module, block: int | None) -> nn.Module:
        """Return a copy of the model with only that block, or with no block.

        Raises:
            Unsupported: models of this family cannot be timed layer by layer.
        """
        del block
        raise Unsupported(f"latency: expected a model that can be timed layer by layer, got {type(model).__name__}")

    def layers(self, model: nn.Module, last_block: LastBlock = "whole") -> Mapping[str, nn.Module]:
        """Return attention and FFN layers by name, with norm and residual sum: (B, N, width) to the same. Not copied.

        With ``last_block`` "pooled", the last block's attention returns the tokens that the output depends on alone,
        whatever the model's last block is.

        Raises:
            Unsupported: models of this family cannot be timed layer by layer.
        """
        del last_block
        raise Unsupported(f"latency: expected a model that can be timed layer by layer, got {type(model).__name__}")

    def merging(self, model: nn.Module, block: int) -> nn.Module:
        """Return what merges tokens in a block: (B, N, width) to fewer tokens, about a tenth. Not copied.

        Raises:
            Unsupported: models of this family do not merge tokens.
        """
        del block
        raise Unsupported(f"tokens: expected a model that can merge some, got {type(model).__name__}")

    def prefix_tokens(self, model: nn.Module) -> int:
        """Return the number of tokens before those of patches: class, distillation and register tokens."""
        del model
        return 0

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """Return the blocks, first to last, for passes that start at a block; none if passes run the whole model."""
        del model
        return []

    def from_block(
        self, model: nn.Module, index: int, x: torch.Tensor, sizes: Mapping[str, int] | None = None
    ) -> torch.Tensor:
        """Return the model's output, given the input of one of its ``blocks``.

        ``sizes`` of groups of kind "tokens" merge tokens in blocks from ``index`` on, as a cut to them would.
        """
        del sizes
        raise AssertionError(f"{type(model).__name__} has no block {index} that takes {tuple(x.shape)}")


def classifiers(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules that timm calls the classifier; several in distilled models."""
    get: Any = getattr(model, "get_classifier", None)
    found = get() if get is not None else ()
    heads = tuple(found) if isinstance(found, (tuple, list)) else (found,)
    return tuple(name for name, module in model.named_modules() if any(module is head for head in heads))


def classifies(model: nn.Module) -> bool:
    """Return whether the output is logits: of a linear classifier, not features or what a head of the user's makes."""
    heads = [model.get_submodule(name) for name in classifiers(model)]
    if not heads:
        return bool(getattr(model, "num_classes", 0))
    return all(type(head) is nn.Linear for head in heads)


def current_arguments(model: nn.Module) -> dict[str, Any]:
    """Return the numbers of classes and of input channels, as far as timm's names of modules tell them."""
    found: dict[str, Any] = {}
    heads = [model.get_submodule(name) for name in classifiers(model)]
    if heads and type(heads[0]) in (nn.Linear, nn.Identity):
        found["num_classes"] = heads[0].out_features if isinstance(heads[0], nn.Linear) else 0
    if hasattr(model, "in_chans"):
        found["in_chans"] = image_channels(model)
    return found


def image_channels(model: Any) -> int:
    """Return how many channels the first convolution reads, by timm's name of it; it may have been replaced by hand."""
    first = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv")
    conv = dict(model.named_modules()).get(first) if isinstance(first, str) else None
    return int(conv.in_channels if isinstance(conv, nn.Conv2d) else model.in_chans)


def fit_modules(model: nn.Module) -> None:
    """Set the attributes of linear layers, convolutions and norms to the shapes of their parameters."""
    module: Any
    for module in model.modules():
        if type(module) is nn.Linear:
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.Conv2d):
            if module.groups > 1 and module.groups == module.in_channels:  # depthwise: each group is one channel
                module.groups = len(module.weight) * module.groups // module.out_channels
            module.out_channels, module.in_channels = len(module.weight), module.weight.shape[1] * module.groups
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.num_features = len(module.running_mean)
        elif type(module) in NORMS and getattr(module, "weight", None) is not None:
            module.normalized_shape = tuple(module.weight.shape)


def unsupported(name: str, module: nn.Module, expected: str) -> Unsupported:
    """Return the error for a module of a class that the family does not know."""
    return Unsupported(f"{name}: expected {expected}, got {type(module).__name__}")


def refuse_computed(name: str, module: nn.Module, *parameters: str) -> None:
    """Refuse tensors that are computed anew before each forward pass, whatever the module's class.

    torch.nn.utils.prune, weight_norm and spectral_norm keep the class but compute the weight.

    Raises:
        Unsupported: a tensor is not a parameter.
    """
    for parameter in parameters or ("weight", "bias"):
        if getattr(module, parameter, None) is not None and parameter not in module._parameters:
            raise Unsupported(
                f"{f'{name}.{parameter}' if name else parameter}: expected a parameter, got a tensor that a hook "
                "computes (torch.nn.utils.prune, weight_norm or spectral_norm; make it permanent first)"
            )


def refuse_tied(model: nn.Module) -> None:
    """Refuse parameters that two modules share.

    Raises:
        Unsupported: there are some.
    """
    seen: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = seen.setdefault(id(parameter), name)
        if first != name:
            raise Unsupported(f"{name}: expected a parameter of its own, got one tied to {first}")
