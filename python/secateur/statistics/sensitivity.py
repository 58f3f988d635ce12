"""How much the output moves when one part of the model is slightly wrong, or missing; and by gradients, for heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import core
from ..anatomy.anatomy import Anatomy
from ..families.base import Family
from .statistics import Float

__all__ = ["DISTURBED_IMAGES", "head_gradients", "measure"]

DISTURBED_IMAGES = 128
# What enters every block is held for so many images at once; gradients need several times the memory.
_CHUNK, _GRADIENT_CHUNK = 32, 8
# Of the standard deviation: small enough for the divergence to grow with its square, far above rounding.
_SHARE = 0.1

_Change = Callable[[Tensor, torch.Generator], Tensor]


class _Trial(NamedTuple):
    """One quantity to measure: what becomes of which modules' outputs, in a block or in all of the model."""

    name: str
    block: int | None
    changes: list[tuple[str, _Change]]
    share: float


@torch.inference_mode()
def measure(
    model: nn.Module, family: Family, anatomy: Anatomy, batches: Sequence[Tensor], rank: int = 0, ranks: int = 1
) -> dict[str, Float]:
    """Disturb or remove one part after the other and compare the outputs; the model is in evaluation mode.

    A group's part of the model (queries; what proj or fc2 writes; what every norm reads) gets a tenth of its own values
    at other tokens and images added: noise of its own covariance. Divided by that share squared, the divergence is
    what an error of all its variance would do if the output moved linearly. Whole layers are removed, or replaced by
    the mean of what they add. What stands before a disturbed block is not run again.

    Args:
        model: on any device.
        family: of the model.
        anatomy: its description.
        batches: images (B, C, H, W), as the model takes them.
        rank: of several processes that share out the parts of the model, each with all images.
        ranks: how many they are.

    Returns:
        By "group/what" a sum over images, and their number: "divergence" of each group, per share of variance (of a
        layer: when it is removed); and "mean_kept", the same of a layer that its mean replaces. Of this rank's parts.
    """
    trials = _trials(anatomy)[rank::ranks]
    if not trials:
        return {}
    generators = {trial.name: torch.Generator().manual_seed(0) for trial in trials}
    totals = dict.fromkeys(generators, 0.0)
    blocks = family.blocks(model)
    chunks = [chunk for batch in batches for chunk in batch.split(_CHUNK)]
    for chunk in chunks:
        entering: list[Tensor] = []
        with _hooked([block.register_forward_pre_hook(_noted(entering)) for block in blocks]):
            wanted = _output(model(chunk))
        for trial in trials:
            with _changed(model, trial.changes, generators[trial.name]):
                found = (
                    model(chunk)
                    if trial.block is None
                    else family.from_block(model, trial.block, entering[trial.block])
                )
            totals[trial.name] += _divergence(model, wanted, _output(found)) / trial.share**2
    for site in anatomy.attention:
        # What is lost with a head is a share of what the projection writes, as with values.
        if f"{site.v}/divergence" in totals:
            totals[f"{site.heads_group}/divergence"] = totals[f"{site.v}/divergence"]
    images = float(sum(map(len, chunks)))
    return {name: np.array([total, images]) for name, total in totals.items()}


def head_gradients(
    model: nn.Module, anatomy: Anatomy, batches: Sequence[Tensor], rank: int = 0, ranks: int = 1
) -> dict[str, Float]:
    """Importance of heads by Michel et al. (2019, arXiv:1905.10650), E |Att_h · ∂L/∂Att_h|.

    L is the cross-entropy of the model's own answer, half the squared features where there is no classifier. The model
    is in evaluation mode; gradients of its parameters are neither needed nor left.

    Args:
        model: on any device.
        anatomy: its description.
        batches: images (B, C, H, W), as the model takes them.
        rank: of several processes that share out these images.
        ranks: how many they are.

    Returns:
        "group/gradient" of each group of heads: sums over this rank's images and, last, their number, (heads + 1,).
    """
    sums = {f"{site.heads_group}/gradient": np.zeros(site.heads + 1) for site in anatomy.attention}
    for images in [chunk for batch in batches for chunk in batch.split(_GRADIENT_CHUNK)][rank::ranks]:
        for name, found in _of_single_images(model, anatomy, images).items():
            sums[name] += np.append(found, len(images))
    return sums


def _noted(inputs: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    return lambda _module, args: inputs.append(args[0])


def _trials(anatomy: Anatomy) -> list[_Trial]:
    trials: list[_Trial] = []

    def disturbed(group: str, block: int | None, *places: tuple[str, _Change]) -> None:
        trials.append(_Trial(f"{group}/divergence", block, list(places), _SHARE))

    def removed(group: str, block: int | None, branch: str) -> None:
        trials.append(_Trial(f"{group}/divergence", block, [(branch, _nothing)], 1.0))
        trials.append(_Trial(f"{group}/mean_kept", block, [(branch, _mean)], 1.0))

    for site in anatomy.attention:
        block = anatomy.group(site.v).block
        # Scores are products: queries count from zero, as in the error of the scores.
        query = (site.qkv, slice(0, site.heads * site.qk_dim)) if site.q_norm is None else (site.q_norm, slice(None))
        disturbed(site.qk, block, (query[0], _noise(query[1], centred=False)))
        disturbed(site.v, block, (site.proj, _noise(slice(None), centred=True)))
        removed(site.layer, block, site.branch)
    for ffn in anatomy.ffn:
        block = anatomy.group(ffn.ffn).block
        disturbed(ffn.ffn, block, (ffn.fc2, _noise(slice(None), centred=True)))
        removed(ffn.layer, block, ffn.branch)
    if "width" in anatomy.sizes and anatomy.norms:
        disturbed("width", None, *((norm.name, _noise(slice(None), centred=True)) for norm in anatomy.norms))
    return trials


def _noise(channels: slice, *, centred: bool) -> _Change:
    def disturb(output: Tensor, generator: torch.Generator) -> Tensor:
        part = output[..., channels]
        rows = part.reshape(-1, part.shape[-1])
        order = torch.randperm(len(rows), generator=generator).to(rows.device)
        noise = rows[order] - rows.mean(0) if centred else rows[order]
        changed = output.clone()
        changed[..., channels] += _SHARE * noise.reshape(part.shape)
        return changed

    return disturb


def _nothing(output: Tensor, _generator: torch.Generator) -> Tensor:
    return torch.zeros_like(output)


def _mean(output: Tensor, _generator: torch.Generator) -> Tensor:
    return output.mean((0, 1), keepdim=True).expand_as(output)


@contextmanager
def _hooked(handles: Sequence[torch.utils.hooks.RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _changed(model: nn.Module, changes: Sequence[tuple[str, _Change]], generator: torch.Generator) -> Iterator[None]:
    def hook(change: _Change) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        return lambda _module, _args, output: change(output, generator)

    with _hooked([model.get_submodule(name).register_forward_hook(hook(change)) for name, change in changes]):
        yield


def _of_single_images(model: nn.Module, anatomy: Anatomy, images: Tensor) -> dict[str, Float]:
    """Sums over images of |Σ over tokens and channels of Att_h · ∂L/∂Att_h|, (heads,) of each layer."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            # The first of them has no gradient of its own where all weights are frozen.
            outputs[name] = args[0] if args[0].requires_grad else args[0].requires_grad_()
            return (outputs[name], *args[1:])

        return hook

    hooks = [model.get_submodule(s.proj).register_forward_pre_hook(keep(s.heads_group)) for s in anatomy.attention]
    with torch.inference_mode(False), torch.enable_grad(), _hooked(hooks):
        logits = _output(model(images.clone()))
        if getattr(model, "num_classes", 0):
            own = logits.detach().argmax(-1)
            loss = functional.cross_entropy(logits.flatten(0, -2), own.flatten(), reduction="sum")
        else:
            loss = logits.square().sum() / 2
        with core.subnormals_flushed(images.device):
            gradients = torch.autograd.grad(loss, list(outputs.values()))
    found = {}
    for site, gradient in zip(anatomy.attention, gradients, strict=True):
        products = (outputs[site.heads_group].detach() * gradient).double()
        each = products.unflatten(-1, (site.heads, site.v_dim)).sum((1, 3))
        found[f"{site.heads_group}/gradient"] = each.abs().sum(0).cpu().numpy()
    return found


def _output(output: Tensor) -> Tensor:
    return output.double()


def _divergence(model: nn.Module, wanted: Tensor, found: Tensor) -> float:
    """Summed over images: of class probabilities, or of features relative to their variance."""
    if getattr(model, "num_classes", 0):
        first, second = wanted.log_softmax(-1), found.log_softmax(-1)
        each = (first.exp() * (first - second)).sum(-1)
        return float(each.reshape(len(wanted), -1).mean(1).sum())
    spread = (wanted - wanted.flatten(0, -2).mean(0)).square().mean() if wanted.ndim > 1 else wanted.square().mean()
    return float((wanted - found).square().mean() / spread * len(wanted))
