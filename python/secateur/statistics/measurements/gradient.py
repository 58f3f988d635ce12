"""Measures the importance of heads by gradients (Michel et al., 2019, arXiv:1905.10650)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from ... import core
from ...anatomy import Anatomy
from ..objective import own_answers
from ..outputs import differentiable
from ..settings import Float
from .base import Work, hooked, register

__all__ = ["Gradient"]

# Small, because gradients need several times the memory of a forward pass.
_CHUNK = 8


@register
class Gradient:
    """Scores each head by E |Att_h · ∂L/∂Att_h|.

    L is the cross-entropy of the model's own prediction, or half the squared features without a classifier. Gradients
    of the model's parameters are neither needed nor changed.
    """

    name = "gradient"

    def take(self, work: Work) -> Iterator[Mapping[str, Float]]:
        """Measure this rank's share of the images, in one round: "group/gradient" for each group of heads."""
        anatomy = work.anatomy
        sums = {f"{group}/gradient": np.zeros(anatomy.sizes[group] + 1) for group in _heads(anatomy)}
        chunks = [chunk for batch in work.batches for chunk in batch.split(_CHUNK)]
        for images in chunks[work.rank :: work.ranks] if sums else []:
            for name, found in _of_single_images(work.model, anatomy, images).items():
                sums[name] += np.append(found, len(images))
        yield sums


def _heads(anatomy: Anatomy) -> list[str]:
    return [layer.groups["heads"] for layer in anatomy.attention]


def _of_single_images(model: nn.Module, anatomy: Anatomy, images: Tensor) -> dict[str, Float]:
    """Return sums over images of |Σ over tokens and channels of Att_h · ∂L/∂Att_h|, (heads,) for each layer."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            # If all weights are frozen, the first input does not require a gradient by itself.
            outputs[name] = args[0] if args[0].requires_grad else args[0].requires_grad_()
            return (outputs[name], *args[1:])

        return hook

    hooks = [
        model.get_submodule(layer.writer).register_forward_pre_hook(keep(layer.groups["heads"]))
        for layer in anatomy.attention
    ]
    with torch.inference_mode(False), torch.enable_grad(), hooked(hooks):
        loss = own_answers(model, differentiable(model)(images.clone()))
        with core.subnormals_flushed(images.device):
            gradients = torch.autograd.grad(loss, list(outputs.values()))
    found = {}
    for group, gradient in zip(_heads(anatomy), gradients, strict=True):
        products = (outputs[group].detach() * gradient).double()
        # Sum over all windows of an image.
        each = (
            products.reshape(len(images), -1, products.shape[-1]).unflatten(-1, (anatomy.sizes[group], -1)).sum((1, 3))
        )
        found[f"{group}/gradient"] = each.abs().sum(0).cpu().numpy()
    return found
