"""Measures how much the output depends on prefix tokens and on patches, and what norms divide tokens by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ... import core
from ...anatomy import Layer
from ...families.base import classifies
from ..outputs import differentiable, double
from ..rows import after_layers, spread
from ..settings import Float
from .base import Work, hooked, register

__all__ = ["Rows"]

# Small, because gradients need several times the memory of a forward pass.
_CHUNK = 8
# Softer than the model's own probabilities, which are nearly certain on images like those it was trained on.
_TEMPERATURE = 2.0


@register
class Rows:
    """For each layer, what ``statistics.rows.RowWeights`` makes of tokens; no labels.

    The sums are "layer/rows": ‖g‖² over prefix tokens, ‖g‖² over patches, 1 / v over all tokens, the numbers of prefix
    tokens and of patches, and the number of images. g is the gradient of log p(y) by the residual stream after the
    layer; y is drawn from the model's own probabilities at temperature 2 or, without a classifier, from a normal
    distribution around its features. v is the token's variance over channels there. The draws depend on an image's
    number alone. Gradients of the model's parameters are neither needed nor changed.
    """

    name = "rows"

    def take(self, work: Work) -> Iterator[Mapping[str, Float]]:
        """Measure this rank's share of the images in one round, with one forward and one backward pass."""
        layers = [work.anatomy.layers[name] for name in work.family.layers(work.model)]
        sums = {layer.name: np.zeros(6) for layer in layers}
        prefix = work.family.prefix_tokens(work.model)
        start = 0
        for number, images in enumerate(chunk for batch in work.batches for chunk in batch.split(_CHUNK)):
            if number % work.ranks == work.rank:
                for name, found in _of_images(work.model, layers, images, start, prefix).items():
                    sums[name] += found
            start += len(images)
        yield {f"{name}/rows": found for name, found in sums.items()}


def _of_images(model: nn.Module, layers: Sequence[Layer], images: Tensor, start: int, prefix: int) -> dict[str, Float]:
    written: dict[str, Tensor] = {}
    streams: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            # If all weights are frozen, the first output does not require a gradient by itself.
            written[name] = output if output.requires_grad else output.requires_grad_()
            return written[name]

        return hook

    hooks = [model.get_submodule(layer.branch).register_forward_hook(keep(layer.name)) for layer in layers]
    hooks += after_layers(model, layers, streams.__setitem__)
    with torch.inference_mode(False), torch.enable_grad(), hooked(hooks):
        output = double(differentiable(model)(images.clone()))
        with core.subnormals_flushed(images.device):
            outputs = [written[layer.name] for layer in layers]
            gradients = torch.autograd.grad(_log_likelihood(model, output, start), outputs)
    found = {}
    for layer, gradient in zip(layers, gradients, strict=True):
        energy = gradient.double().square().sum(-1)
        tokens = energy.shape[1]
        inverse = spread(model, layer, streams[layer.name]).reciprocal()
        found[layer.name] = np.array(
            [
                float(energy[:, :prefix].sum()),
                float(energy[:, prefix:].sum()),
                float(inverse.sum()),
                len(images) * prefix,
                len(images) * (tokens - prefix),
                len(images),
            ]
        )
    return found


def _log_likelihood(model: nn.Module, output: Tensor, start: int) -> Tensor:
    """Return −log p(y) summed over images, for y drawn with each image's own generator."""
    rows = output.reshape(len(output), -1, output.shape[-1])
    classes = classifies(model)
    drawn = []
    for number, image in enumerate(rows.detach().cpu(), start):
        generator = torch.Generator().manual_seed(number)
        if classes:
            chances = (image / _TEMPERATURE).softmax(-1)
            drawn.append(torch.multinomial(chances, 1, generator=generator)[:, 0])
        else:
            drawn.append(torch.randn(image.shape, dtype=image.dtype, generator=generator))
    wanted = torch.stack(drawn).to(output.device)
    if classes:
        return functional.cross_entropy(rows.flatten(0, 1) / _TEMPERATURE, wanted.flatten(), reduction="sum")
    # The gradient of ‖f + ε − f‖² / 2 by the mean f is −ε.
    return -(rows * wanted).sum()
