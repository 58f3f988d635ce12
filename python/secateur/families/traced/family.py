"""The family of models that are followed from operation to operation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.layers import BlurPool2d
from timm.models.efficientnet import EfficientNet
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.resnet import ResNet
from torch import nn

from ...anatomy import Anatomy
from ..base import Family, fit_modules
from ..registry import register
from . import channels, pairs

__all__ = ["Traced"]


@register
class Traced(Family):
    """Some CNNs by channels, and the FFN layers of any other timm model that are of classes it knows.

    ResNet includes ResNeXt, SENet, antialiased and deep-stem variants; EfficientNet MobileNetV2 and MnasNet;
    MobileNetV3 MobileNetV4, in whose hybrids attention stays as it is.
    """

    name = "traced"
    models = (ResNet, EfficientNet, MobileNetV3)
    others = f"a model of timm with FFN layers of {pairs.KNOWN}"
    verified = True

    def accepts(self, model: nn.Module) -> bool:
        """Return whether the model is of one of these classes, or of timm and has FFN layers."""
        return super().accepts(model) or pairs.accepts(model)

    def inspect(self, model: nn.Module) -> Anatomy:
        """Follow the model's channels, or find its FFN layers, in images of its own size, or of 224 x 224 pixels.

        Raises:
            Unsupported: tensors that are tied or computed by hooks, a model that cannot run without values, or one in
                which nothing can be cut.
        """
        if type(model) in self.models:
            return channels.inspect(model, self.name)
        return pairs.inspect(model, self.name)

    def adapt(self, model: nn.Module, anatomy: Anatomy, sizes: Mapping[str, int]) -> None:
        """Make modules, and what the model says about its channels, fit parameters and buffers that were just cut."""
        del sizes
        if type(model) not in self.models:
            for name in dict.fromkeys(member.module for group in anatomy.groups for member in group.members):
                fit_modules(model.get_submodule(name))
            return
        fit_modules(model)
        for module in model.modules():
            if isinstance(module, BlurPool2d) and module.channels is not None:
                module.channels = len(module.get_buffer("filt"))
        found = channels.widths(model)
        described: Any = model
        described.num_features, described.head_hidden_size = found["global_pool"]
        if type(model) is MobileNetV3:  # a convolution follows the pool
            described.head_hidden_size = found["classifier"][0]
        for info in described.feature_info:
            if info["module"] in found:
                info["num_chs"] = found[info["module"]][info.get("hook_type") != "forward_pre"]
