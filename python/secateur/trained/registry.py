"""Trained methods by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from ..budgets.target import Target
from ..errors import InvalidArgument
from ..latency.table import LatencyTable
from ..registry import Registry
from .base import TrainedMethod, Wanted

__all__ = ["register", "trained_method", "trained_methods"]

registry: Registry[TrainedMethod] = Registry(
    "name", "secateur.trained", "secateur.trained", members=("attach", "decide", "losses", "paper", "kinds")
)
register = registry.register


def trained_methods() -> list[str]:
    """Names that ``trained_method`` takes."""
    return registry.names()


def trained_method(
    name: str,
    *,
    target: Target | None = None,
    ratios: Mapping[str, float] | str | Path | None = None,
    groups: Iterable[str] | None = None,
    freeze: Iterable[str] = (),
    min_keep: Mapping[str, int] | None = None,
    round_to: int | Literal["auto"] | Mapping[str, int] | None = None,
    allocation: str | None = None,
    latency_table: LatencyTable | str | Path | None = None,
    batch_size: int | None = None,
    runtime: str | None = None,
    **options: Any,
) -> TrainedMethod:
    """Make a method that learns what to remove while the model is trained.

    It is a hook of `finetune`, and has a plan when that has returned:

        gates = secateur.trained_method("gates", target=secateur.Target(macs=0.5))
        secateur.finetune(model, loader, teacher=dense, epochs=10, hooks=[gates])
        secateur.prune(model, gates.plan())
        secateur.finetune(model, loader, teacher=dense, epochs=10)

    With ``finetune(resume=)`` the method is resumed with the model, to the bit. One method is for one run at a time.

    Args:
        name: of the method; see ``trained_methods()``.
        target: the fractions kept, as for ``plan``. Exactly one of ``target`` and ``ratios`` is given.
        ratios: the fractions removed, as for ``plan``.
        groups: kinds or names of groups that may be cut, as for ``plan``.
        freeze: kinds, names or patterns of groups that stay whole, as for ``plan``.
        min_keep: fewest units to keep, as for ``plan``.
        round_to: multiples of kept counts, as for ``plan``.
        allocation: how a target is shared out: "uniform", one removed fraction for all groups, the default, or
            "error", by what the method has learnt of them.
        latency_table: for ``Target(latency=)``, as for ``plan``.
        batch_size: for ``Target(latency=)``, as for ``plan``.
        runtime: for ``Target(latency=)``, as for ``plan``.
        **options: the method's own, the fields of its ``Options``.

    Raises:
        InvalidArgument: no method of this name, or an argument that does not fit.
    """
    method = type(registry.named(name))
    names = [each.name for each in fields(method.Options)]
    for option in options:
        if option not in names:
            raise InvalidArgument(f"options: expected {', '.join(names) or 'none'}, got {option!r}")
    wanted = Wanted(target, ratios, groups, freeze, min_keep, round_to, allocation, latency_table, batch_size, runtime)
    return method(wanted, method.Options(**options))
