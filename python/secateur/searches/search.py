"""Searches for the model of an objective: plan, prune a copy, fine-tune it if asked, measure; go on or roll back."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from .. import check
from ..anatomy.fingerprint import Fingerprint
from ..budgets.allocate import check_target
from ..budgets.limits import AUTO, check_rounding
from ..budgets.target import Target
from ..data.loader import in_batches
from ..data.model_input import images_in
from ..errors import InvalidArgument
from ..families.base import classifies
from ..families.registry import family_of
from ..files import container
from ..latency.table import LatencyTable
from ..methods.registry import method_named, options_of
from ..plans.make import check_allocation, check_table
from ..plans.on_the_clock import loaded, with_steps
from ..runtime.progress import progress
from ..statistics import objective as objectives
from ..statistics.statistics import Statistics
from ..training import checkpoint as resumption
from ..training.finetune import finetune as finetune_
from ..training.finetune import refuse_wrapped
from .course import Course
from .cutting import Cutting, Tuned, Tuning, filled, plain
from .file import SearchFile
from .objectives import AccuracyCritical, LatencySensitive, MemoryConstrained, Objective, settings_of
from .result import SearchResult
from .stepper import Stepper

if TYPE_CHECKING:
    import os

    from ..anatomy import Anatomy

__all__ = ["search"]


_OBJECTIVES = (AccuracyCritical, MemoryConstrained, LatencySensitive)
# Arguments of finetune that search sets itself.
_NOT_OPTIONS = ("model", "loader", "val_loader", "resume", "hooks")


def search(
    model: nn.Module,
    stats: Statistics,
    *,
    objective: Objective,
    loader: Iterable[Any],
    method: str = "project",
    rounds: int = 12,
    step: float = 0.1,
    groups: Iterable[str] | None = None,
    freeze: Iterable[str] = (),
    min_keep: Mapping[str, int] | None = None,
    round_to: int | Literal["auto"] | Mapping[str, int] | None = None,
    allocation: str | None = None,
    latency_table: LatencyTable | str | Path | None = None,
    finetune: Tuning | None = None,
    train_loader: Iterable[Any] | None = None,
    calibration_loader: Iterable[Any] | None = None,
    resume: str | os.PathLike[str] | None = None,
    **options: Any,
) -> SearchResult:
    """Search for the model that an objective asks for, after AAP (Zhao, Jain and Zhao, 2023, arXiv:2303.08595).

    Each round plans for one scalar T, prunes a copy, fine-tunes it if asked, and measures it. If the model is kept, the
    next round cuts it further, at T + λ. If it is not, the search goes back to the last kept model, b, and tries T_b +
    λ_b / 2, then T_b + λ_b / 4. After the third miss it halves λ once more and starts from b at T_b; if that misses
    too, the model kept before b takes its place. The search ends after ``rounds``, or when a miss leaves nothing to go
    back to. The answer is the last accepted model. `AccuracyCritical` accepts the models that it keeps.
    `MemoryConstrained` and `LatencySensitive` keep models that have not lost more than the budget asks for, and accept
    models within the budget that are no less accurate than those accepted before: they approach the budget from both
    sides.

    T is the fraction of the dense model's parameters (or MACs, depending on the objective) to remove; 0 is the dense
    model. AAP compares the scores of layer l with T · w_l, where w_l is the layer's share of the cost: a neuron is
    removed if its score per unit of cost is at most T. ``plan`` does the same for a target with ``allocation="error"``
    (a group shrinks while the loss per unit of cost is below one price for all groups), and finds the price for the
    fraction to remove. The fraction orders models as the price does, from dense to small, but has the same meaning for
    every model and method, including methods without errors. If T is more than can be cut, the round is a miss.

    Without fine-tuning, every round prunes a copy of ``model`` by the given statistics. With it, as in AAP, a round
    prunes the kept fine-tuned model; since statistics of other weights do not fit, that model is calibrated again.
    Memory: one copy of the model; with fine-tuning, one for each round that the search may go back to.

    Args:
        model: the dense model, a supported timm classifier on any device; it is not changed.
        stats: what ``calibrate`` measured on it.
        objective: `AccuracyCritical`, `MemoryConstrained` or `LatencySensitive`.
        loader: validation batches, the same images in every pass: (images, targets) as for ``evaluate``; without
            targets the accuracy is the agreement with the dense model's predictions.
        method: as for ``plan``.
        rounds: the most rounds, besides the measurement of the dense model.
        step: the first λ, in (0, 1).
        groups: as for ``plan``.
        freeze: as for ``plan``.
        min_keep: as for ``plan``.
        round_to: as for ``plan``.
        allocation: as for ``plan``.
        latency_table: for ``round_to="auto"``, whose steps it has: the result of ``measure_latency``, or its file.
        finetune: arguments of ``finetune``, such as {"epochs": 1, "lr": 1e-4}: every round's copy is trained on
            ``train_loader`` with the dense model as teacher (or another ``teacher``, or None). Or a function that
            trains a model in place. With ``checkpoint_every`` among the arguments, and ``resume``, a round's training
            can itself be resumed, from a file NAME.roundN.safetensors that exists while it lasts.
        train_loader: training batches, as for ``finetune``; only with arguments of ``finetune``.
        calibration_loader: batches for ``calibrate``, the same images in every pass; as many images are read as
            ``stats`` has. Required with fine-tuning.
        resume: a file written after every round. If it exists, the search continues from it, and ends with the same
            history and the same bits as an uninterrupted one (except for measured latencies), provided that model,
            statistics, loaders and arguments are the same; ``rounds`` may be larger.
        **options: options of the method.

    Raises:
        InvalidArgument: an argument that does not fit, a budget that cannot be met, or not in this many rounds, or a
            ``resume`` file that is damaged or belongs to another search.
        Unsupported: the model is not of a supported family, or does not allow a cut.
        NumericalError: a pruned model's logits, or a loss in fine-tuning, are NaN or infinite.
    """
    if not isinstance(objective, _OBJECTIVES):
        raise InvalidArgument(
            f"objective: expected {', '.join(each.__name__ for each in _OBJECTIVES)}, got {objective!r}"
        )
    if not isinstance(stats, Statistics):
        raise InvalidArgument(f"stats: expected Statistics from calibrate, got {type(stats).__name__}")
    rounds = check.integer("rounds", rounds)
    step = check.fraction("step", step, open_low=True, open_high=True)
    _check_loader("loader", loader)
    _check_tuning(finetune, train_loader, calibration_loader)
    if isinstance(finetune, Mapping) and finetune.get("checkpoint_every") is not None and resume is None:
        raise InvalidArgument("finetune['checkpoint_every']: expected resume=, beside which it is written, got none")
    path = None if resume is None else check.writable("resume", resume)
    check_allocation(allocation)
    check_rounding(round_to, latency_table)
    check_table(latency_table)
    if latency_table is not None and round_to != AUTO:
        raise InvalidArgument(f'latency_table: expected none without round_to="auto", got {latency_table!r}')
    limits: dict[str, Any] = {"groups": _listed(groups), "freeze": _listed(freeze)}
    limits |= {"min_keep": min_keep, "round_to": round_to}
    method_options = asdict(options_of(method_named(method), options))
    anatomy = family_of(model).inspect(model)
    limits = with_steps(limits, loaded(latency_table), anatomy)
    loader = in_batches(loader, model)
    if calibration_loader is not None:
        needed = stats.settings.gradients if "gradients" in method_named(method).needs else ""
        again = objectives.Objective.named(needed)
        labels = again is not None and again.loss is not None
        calibration_loader = in_batches(calibration_loader, model, labels=labels)
    if not classifies(model):
        raise InvalidArgument("model: expected a classifier, got one without classes")
    fingerprint = Fingerprint.of(model, anatomy)
    stats.settings.fingerprint.require(fingerprint, "model", strict=True)
    _check_budget(anatomy, objective, rounds, step, limits)

    cutting = Cutting(
        model, anatomy, stats, objective.cost, {"method": method, **limits, "allocation": allocation, **method_options}
    )
    tuning = None if finetune is None else Tuned(model, finetune, train_loader, calibration_loader, again)
    course = Course(cutting, tuning, objective, loader, Stepper(step))
    settings = {
        "objective": settings_of(objective),
        "method": method,
        "options": method_options,
        **{name: plain(value) for name, value in limits.items()},
        "allocation": allocation,
        "step": step,
        "finetune": None if tuning is None else tuning.described,
    }
    file = None if path is None else SearchFile(path, settings, _origin(course))
    resumed = 0
    if file is not None and file.path.is_file():
        resumed = course.resume(file, rounds)
    else:
        # Let plan refuse what it must before the first measurement.
        cutting.plan_of(model, stats, 1.0)
    with progress(rounds, "search", unit="rounds") as advance:
        advance(resumed)
        if not course.history:
            course.measure_dense()
            course.write(file)
        while len(course.history) <= rounds and not course.stepper.over:
            course.next_round(file)
            last = course.history[-1]
            advance(1, note=f"T {last.threshold:.4g} {'accepted' if last.accepted else 'not accepted'}")
    return course.result(objective, resumed)


def _check_loader(argument: str, loader: object) -> None:
    if isinstance(loader, Iterator) or not isinstance(loader, Iterable):
        kind = f"{type(loader).__name__}{', an iterator' if isinstance(loader, Iterator) else ''}"
        raise InvalidArgument(f"{argument}: expected batches that can be read several times, got {kind}")


def _check_tuning(how: object, train_loader: object, calibration_loader: object) -> None:
    if how is None:
        for name, given in (("train_loader", train_loader), ("calibration_loader", calibration_loader)):
            if given is not None:
                raise InvalidArgument(f"{name}: expected none without finetune, got {type(given).__name__}")
        return
    _check_loader("calibration_loader", calibration_loader)
    if callable(how):
        if train_loader is not None:
            raise InvalidArgument("train_loader: expected none with a function, got one")
        return
    if not isinstance(how, Mapping):
        raise InvalidArgument(f"finetune: expected arguments of finetune or a function, got {how!r}")
    _check_loader("train_loader", train_loader)
    refuse_wrapped(train_loader, "train_loader")
    allowed = [name for name in inspect.signature(finetune_).parameters if name not in _NOT_OPTIONS]
    for name in how:
        if name not in allowed:
            raise InvalidArgument(f"finetune: expected {', '.join(allowed)}, got {name!r}")
    if not isinstance(how.get("teacher"), (nn.Module, type(None))):
        raise InvalidArgument(f"finetune: expected a teacher or None, got {how['teacher']!r}")


def _check_budget(anatomy: Anatomy, objective: Objective, rounds: int, step: float, limits: Mapping[str, Any]) -> None:
    """Refuse a budget that no plan can reach, or not with this many steps."""
    budget = None if isinstance(objective, AccuracyCritical) else getattr(objective, objective.cost)
    # The least latency that can be reached is not known in advance.
    check_target(anatomy, Target(**{objective.cost: 1.0 if budget is None else budget}), **filled(limits))
    if budget is not None:
        least = math.ceil((1 - budget) / step - 1e-9)
        if rounds < least:
            raise InvalidArgument(
                f"rounds: expected at least {least} to remove {1 - budget:.4g} in steps of {step:g}, got {rounds}"
            )


def _listed(names: Any) -> Any:
    """Return a sequence of names as a list, which can be read twice; plan refuses anything else."""
    return list(names) if isinstance(names, Iterable) and not isinstance(names, str) else names


def _origin(course: Course) -> dict[str, Any]:
    """Describe what a search starts with: digests of weights and statistics, and what the loaders tell."""
    tuning = course.tuning
    whole = resumption.origin(course.cutting.model, None if tuning is None else tuning.teacher, course.loader)
    tensors = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in course.cutting.stats.tensors.items()}
    found = {name: whole[name] for name in ("model", "teacher")}
    found["stats"] = hashlib.sha256(json.dumps(container.digests(tensors), sort_keys=True).encode()).hexdigest()
    loaders: dict[str, Iterable[Any] | None] = {"loader": course.loader}
    if tuning is not None:
        loaders |= {"train_loader": tuning.train_loader, "calibration_loader": tuning.calibration_loader}
    for name, loader in loaders.items():
        if loader is not None:
            size = getattr(loader, "batch_size", None)
            size = size if isinstance(size, int) else None
            found[name] = [resumption.length(loader), size, images_in(loader)]
    found["labels"] = course.labelled
    return found
