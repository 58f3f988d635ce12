"""Trains some parameters, and keeps the values that did best on the images held back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from .. import core

__all__ = ["Course", "train"]

# Passes without a new best after which training stops.
_PATIENCE = 3


@dataclass(frozen=True)
class Course:
    """How the loss on the images held back went: before the first pass, then after each; the best one is kept."""

    losses: tuple[float, ...]

    @property
    def before(self) -> float:
        """The loss before the first pass."""
        return self.losses[0]

    @property
    def best(self) -> float:
        """The loss that was reached; never above the one before, and NaN only if that was."""
        return min((loss for loss in self.losses if not math.isnan(loss)), default=math.nan)


def train(
    parameters: Sequence[nn.Parameter],
    epochs: int,
    lr: float,
    steps: int,
    batches: Callable[[], Iterable[Callable[[], Tensor]]],
    held_back: Callable[[], float],
    before: float,
) -> Course:
    """Train with AdamW and a cosine of the learning rate; parameters end with the best values.

    Args:
        parameters: what is trained.
        epochs: the largest number of passes.
        lr: the highest learning rate, after a warm-up of a twentieth of all steps.
        steps: steps in each pass.
        batches: begins a pass; for each step, a function that returns its loss.
        held_back: returns the loss on the images held back.
        before: what it returns now.
    """
    losses = [before]
    best = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    warmup = epochs * steps // 20
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=max(1, epochs * steps - warmup),
        lr_min=lr / 100,
        warmup_t=warmup,
        warmup_lr_init=lr / (warmup + 1),
        warmup_prefix=True,
        t_in_epochs=False,
    )
    step, place = 0, parameters[0].device
    for epoch in range(1, epochs + 1):
        with torch.enable_grad(), core.subnormals_flushed(place):
            for loss_of in batches():
                schedule.step_update(step)
                optimizer.zero_grad()
                loss_of().backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                step += 1
        losses.append(held_back())
        reached = min((loss for loss in losses[:-1] if not math.isnan(loss)), default=math.inf)
        if losses[-1] < reached:
            best = [parameter.detach().clone() for parameter in parameters]
        elif not math.isfinite(losses[-1]) or epoch - losses.index(reached) >= _PATIENCE:
            break
    optimizer.zero_grad()
    with torch.no_grad():
        for parameter, value in zip(parameters, best, strict=True):
            parameter.copy_(value)
    return Course(tuple(losses))
