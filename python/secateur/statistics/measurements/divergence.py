"""Measures how much the output changes when one part of the model is slightly wrong, or removed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ...anatomy import Anatomy
from ..outputs import double
from ..settings import Float
from .base import Work, divergence, hooked, register

__all__ = ["Divergence"]

# The inputs of all blocks are held for this many images at once.
_CHUNK = 32
# Share of the standard deviation: small enough for the divergence to grow with its square, far above rounding.
_SHARE = 0.1

_Change = Callable[[Tensor, torch.Generator], Tensor]


@register
class Divergence:
    """Disturbs or removes one part of the model at a time, and compares the outputs.

    To a group's part of the model (queries; the outputs of proj or fc2; the inputs of a stream's norms), a tenth of its
    own values at other tokens and images is added: noise with its own covariance. The divergence over that share
    squared is what an error as large as its whole variance would cause if the output changed linearly. Whole layers are
    removed, or replaced by the mean of their output. Blocks before a disturbed one are not run again.

    The sums are "divergence" for each group, per share of variance (for a layer: when it is removed), and "mean_kept",
    for a layer that its mean replaces.
    """

    name = "divergence"

    @torch.inference_mode()
    def take(self, work: Work) -> Iterator[Mapping[str, Float]]:
        """Measure this rank's share of the model's parts, in one round."""
        model, family, anatomy = work.model, work.family, work.anatomy
        trials = _trials(anatomy)[work.rank :: work.ranks]
        generators = {trial.name: torch.Generator().manual_seed(0) for trial in trials}
        totals = dict.fromkeys(generators, 0.0)
        blocks = family.blocks(model)
        chunks = [chunk for batch in work.batches for chunk in batch.split(_CHUNK)]
        for chunk in chunks:
            entering: list[Tensor] = []
            with hooked([block.register_forward_pre_hook(_noted(entering)) for block in blocks]):
                wanted = double(model(chunk))
            for trial in trials:
                with _changed(model, trial.changes, generators[trial.name]):
                    found = (
                        model(chunk)
                        if trial.block is None or not blocks
                        else family.from_block(model, trial.block, entering[trial.block])
                    )
                totals[trial.name] += float(divergence(model, wanted, double(found)).sum()) / trial.share**2
        for layer in anatomy.attention:
            # As with values, the loss of a head is a share of the projection's output.
            value, heads = (f"{layer.groups[kind]}/divergence" for kind in ("v", "heads"))
            if value in totals:
                totals[heads] = totals[value]
        images = float(sum(map(len, chunks)))
        yield {name: np.array([total, images]) for name, total in totals.items()}


class _Trial(NamedTuple):
    """One quantity to measure: how to change which modules' outputs, in one block or in the whole model."""

    name: str
    block: int | None
    changes: list[tuple[str, _Change]]
    share: float


def _noted(inputs: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    return lambda _module, args: inputs.append(args[0])


def _trials(anatomy: Anatomy) -> list[_Trial]:
    trials: list[_Trial] = []

    def disturbed(group: str, block: int | None, *places: tuple[str, _Change]) -> None:
        trials.append(_Trial(f"{group}/divergence", block, list(places), _SHARE))

    def removed(group: str, block: int | None, branch: str) -> None:
        trials.append(_Trial(f"{group}/divergence", block, [(branch, _nothing)], 1.0))
        trials.append(_Trial(f"{group}/mean_kept", block, [(branch, _mean)], 1.0))

    for layer in anatomy.layers_of("attention"):
        block = anatomy.block_of(layer)
        query = layer.taps["query"]
        # Scores are products, so queries are not centred, as in the error of the scores.
        disturbed(layer.groups["qk"], block, (query.module, _noise(query.channels, centred=False)))
        disturbed(layer.groups["v"], block, (layer.writer, _noise(None, centred=True)))
        if layer.name in anatomy.sizes:
            removed(layer.name, block, layer.branch)
    for layer in anatomy.layers_of("ffn"):
        block = anatomy.block_of(layer)
        disturbed(layer.groups["ffn"], block, (layer.writer, _noise(None, centred=True, axis=layer.channel_axis)))
        if layer.name in anatomy.sizes:
            removed(layer.name, block, layer.branch)
    for width in anatomy.widths:
        norms = [norm for norm in anatomy.norms if norm.stream == width.name]
        if norms:
            disturbed(width.name, None, *((norm.name, _noise(None, centred=True)) for norm in norms))
    return trials


def _noise(channels: slice | None, *, centred: bool, axis: int = -1) -> _Change:
    def disturb(output: Tensor, generator: torch.Generator) -> Tensor:
        part = output.movedim(axis, -1) if channels is None else output[..., channels]
        rows = part.reshape(-1, part.shape[-1])
        order = torch.randperm(len(rows), generator=generator).to(rows.device)
        noise = rows[order] - rows.mean(0) if centred else rows[order]
        changed = output.clone()
        (changed.movedim(axis, -1) if channels is None else changed[..., channels]).add_(
            _SHARE * noise.reshape(part.shape)
        )
        return changed

    return disturb


def _nothing(output: Tensor, _generator: torch.Generator) -> Tensor:
    return torch.zeros_like(output)


def _mean(output: Tensor, _generator: torch.Generator) -> Tensor:
    return output.mean(tuple(range(output.ndim - 1)), keepdim=True).expand_as(output)


@contextmanager
def _changed(model: nn.Module, changes: Sequence[tuple[str, _Change]], generator: torch.Generator) -> Iterator[None]:
    def hook(change: _Change) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        return lambda _module, _args, output: change(output, generator)

    with hooked([model.get_submodule(name).register_forward_hook(hook(change)) for name, change in changes]):
        yield
