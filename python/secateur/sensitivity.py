"""How much the output moves when one part of the model is slightly wrong: forward passes with that part disturbed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from .anatomy import Anatomy
from .statistics import Float

__all__ = ["DISTURBED_IMAGES", "measure"]

DISTURBED_IMAGES = 128
# Of the standard deviation: small enough for the divergence to grow with its square, far above rounding.
_SHARE = 0.1

Disturbance = Callable[[Tensor], Tensor]


@torch.inference_mode()
def measure(model: nn.Module, anatomy: Anatomy, batches: Sequence[Tensor]) -> dict[str, Float]:
    """Disturb one group after the other and compare the outputs; the model is in evaluation mode.

    A group's part of the model (queries; what proj or fc2 writes; what every norm reads) gets a tenth of its own values
    at other tokens and images added: noise of its own covariance. Divided by that share squared, the divergence is
    what an error of all its variance would do if the output moved linearly.

    Args:
        model: on any device.
        anatomy: its description.
        batches: images (B, C, H, W), as the model takes them.

    Returns:
        Group name to (sum over images of the divergence per share of variance, images).
    """
    wanted = [_output(model, images) for images in batches]
    images = sum(map(len, batches))
    found: dict[str, Float] = {}
    for group, places in _places(anatomy).items():
        total = 0.0
        generator = torch.Generator().manual_seed(0)
        with _disturbed(model, places, generator):
            for batch, target in zip(batches, wanted, strict=True):
                total += _divergence(model, target, _output(model, batch))
        found[group] = np.array([total / _SHARE**2, float(images)])
    return found


def _places(anatomy: Anatomy) -> dict[str, list[tuple[str, slice, bool]]]:
    """Group to the modules whose outputs are disturbed: name, channels, whether about their mean."""
    places: dict[str, list[tuple[str, slice, bool]]] = {}
    for site in anatomy.attention:
        # Scores are products: queries count from zero, as in the error of the scores.
        query = (site.qkv, slice(0, site.heads * site.qk_dim)) if site.q_norm is None else (site.q_norm, slice(None))
        places[site.qk] = [(*query, False)]
        places[site.v] = [(site.proj, slice(None), True)]
    for ffn in anatomy.ffn:
        places[ffn.ffn] = [(ffn.fc2, slice(None), True)]
    if "width" in anatomy.sizes and anatomy.norms:
        places["width"] = [(norm.name, slice(None), True) for norm in anatomy.norms]
    return places


@contextmanager
def _disturbed(
    model: nn.Module, places: Sequence[tuple[str, slice, bool]], generator: torch.Generator
) -> Iterator[None]:
    def hook(channels: slice, centred: bool) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def disturb(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            part = output[..., channels]
            rows = part.reshape(-1, part.shape[-1])
            order = torch.randperm(len(rows), generator=generator).to(rows.device)
            noise = rows[order] - rows.mean(0) if centred else rows[order]
            changed = output.clone()
            changed[..., channels] += _SHARE * noise.reshape(part.shape)
            return changed

        return disturb

    handles = [
        model.get_submodule(name).register_forward_hook(hook(channels, centred)) for name, channels, centred in places
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _output(model: nn.Module, images: Tensor) -> Tensor:
    output: Tensor = model(images)
    return output.double()


def _divergence(model: nn.Module, wanted: Tensor, found: Tensor) -> float:
    """Summed over images: of class probabilities, or of features relative to their variance."""
    if getattr(model, "num_classes", 0):
        first, second = wanted.log_softmax(-1), found.log_softmax(-1)
        each = (first.exp() * (first - second)).sum(-1)
        return float(each.reshape(len(wanted), -1).mean(1).sum())
    spread = (wanted - wanted.flatten(0, -2).mean(0)).square().mean() if wanted.ndim > 1 else wanted.square().mean()
    return float((wanted - found).square().mean() / spread * len(wanted))
