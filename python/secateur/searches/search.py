"""Search for the model of an objective: plan, prune a copy, fine-tune it where asked, measure; grow or roll back."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from .. import check
from ..anatomy.fingerprint import Fingerprint
from ..budgets.allocate import check_target
from ..budgets.target import Target
from ..data.model_input import images_in, model_input, split_batch
from ..errors import InvalidArgument
from ..families.registry import family_of
from ..files import container
from ..latency.bench import bench
from ..methods.registry import method_named, options_of
from ..plans.make import plan
from ..plans.plan import Plan
from ..plans.prune import prune
from ..runtime.devices import borrowed
from ..runtime.progress import progress
from ..statistics.calibrate import calibrate
from ..statistics.statistics import Statistics
from ..surgery.structure import Structure
from ..training import checkpoint as resumption
from ..training.evaluate import evaluate, full_precision
from ..training.finetune import finetune as finetune_
from ..training.finetune import refuse_wrapped
from .objectives import AccuracyCritical, LatencySensitive, Measures, MemoryConstrained, Objective, settings_of
from .result import Round, SearchResult
from .stepper import Stepper

if TYPE_CHECKING:
    import os

    from ..anatomy import Anatomy

__all__ = ["search"]

Tuning: TypeAlias = Mapping[str, Any] | Callable[[nn.Module], object]

_KIND = "search"
_OBJECTIVES = (AccuracyCritical, MemoryConstrained, LatencySensitive)
# What search itself gives to finetune.
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
    round_to: int | Mapping[str, int] | None = None,
    allocation: str | None = None,
    finetune: Tuning | None = None,
    train_loader: Iterable[Any] | None = None,
    calibration_loader: Iterable[Any] | None = None,
    resume: str | os.PathLike[str] | None = None,
    **options: Any,
) -> SearchResult:
    """Find the model that an objective asks for; after AAP (Zhao, Jain and Zhao, 2023, arXiv:2303.08595).

    Each round plans for one scalar T, prunes a copy, fine-tunes it where asked, and measures it. A model that is kept
    is cut further, at T + λ; behind one that is not, the search goes back to the last that was kept, b, and tries
    T_b + λ_b / 2, then T_b + λ_b / 4. After the third miss it halves λ once more and starts from b at T_b; if that
    misses, b's predecessor takes its place. It ends after ``rounds``, or when a miss leaves nothing to go back to. The
    answer is the last accepted model. `AccuracyCritical` accepts what it keeps. `MemoryConstrained` and
    `LatencySensitive` keep what has not lost more than the budget asks for, and accept what is within the budget and
    no less accurate than what they accepted before: they close in on the budget from both sides.

    T is the fraction of the dense model's parameters (or MACs, as the objective says) that has to go, from 0, the dense
    model. AAP compares the scores of layer l with T · w_l, where w_l is the layer's share of the cost: a neuron leaves
    if its score for each unit of cost is at most T. That is what ``plan`` does for a target with ``allocation="error"``
    (a group shrinks while the loss for each unit of cost is below one price for all groups), with the price found for
    the fraction to remove. The fraction orders the same models as the price, from dense to small, but means the same
    for every model and method, those without an error included. Where T is more than can be cut, the round is a miss.

    Without fine-tuning every round prunes a copy of ``model`` by the statistics given. With it, as in AAP, a round
    prunes the fine-tuned model that was kept; statistics of other weights do not fit, so that model is calibrated anew.
    Memory: a copy of the model, with fine-tuning one for each round that the search may come back to.

    Args:
        model: the dense model, a supported classifier of timm's on any device; it is not changed.
        stats: what ``calibrate`` measured on it.
        objective: `AccuracyCritical`, `MemoryConstrained` or `LatencySensitive`.
        loader: validation batches, the same images in every pass: (images, targets) for ``evaluate``; without targets
            the accuracy is the agreement with the dense model's answers.
        method: as for ``plan``.
        rounds: at most so many, besides the measurement of the dense model.
        step: the first λ, in (0, 1).
        groups: as for ``plan``.
        freeze: as for ``plan``.
        min_keep: as for ``plan``.
        round_to: as for ``plan``.
        allocation: as for ``plan``.
        finetune: arguments of ``finetune``, such as {"epochs": 1, "lr": 1e-4}: every round's copy is trained on
            ``train_loader`` with the dense model as teacher (or another ``teacher``, or None). Or a function that
            trains the model it is given in place. With ``checkpoint_every`` among the arguments, and ``resume``, a
            round's training is itself resumed, from a file NAME.roundN.safetensors that is there while it lasts.
        train_loader: as for ``finetune``, with arguments of it.
        calibration_loader: batches for ``calibrate``, the same images in every pass; as many of them are read as
            ``stats`` has. Needed with fine-tuning.
        resume: a file written after every round. Where it exists, the search goes on from it, and ends with the history
            and the bits of one that was never interrupted (but for measured latencies), provided that it comes with the
            same model, statistics, loaders and arguments; ``rounds`` may be more.
        **options: the method's own.

    Raises:
        InvalidArgument: an argument that does not fit, a budget that cannot be met or not in so many rounds, or a
            ``resume`` file that is damaged or another search's.
        Unsupported: the model is of no supported family, or does not allow a cut.
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
    if allocation not in (None, "uniform", "error"):
        raise InvalidArgument(f"allocation: expected 'uniform' or 'error', got {allocation!r}")
    limits: dict[str, Any] = {"groups": _listed(groups), "freeze": _listed(freeze)}
    limits |= {"min_keep": min_keep, "round_to": round_to}
    method_options = asdict(options_of(method_named(method), options))
    anatomy = family_of(model).inspect(model)
    if getattr(model, "num_classes", None) == 0:
        raise InvalidArgument("model: expected a classifier, got one without classes")
    fingerprint = Fingerprint.of(model, anatomy)
    stats.settings.fingerprint.require(fingerprint, "model", strict=True)
    _check_budget(anatomy, objective, rounds, step, limits)

    cutting = _Cutting(
        model, anatomy, stats, objective.cost, {"method": method, **limits, "allocation": allocation, **method_options}
    )
    tuning = None if finetune is None else _Tuning(model, finetune, train_loader, calibration_loader)
    course = _Course(cutting, tuning, objective, loader, Stepper(step))
    settings = {
        "objective": settings_of(objective),
        "method": method,
        "options": method_options,
        **{name: _plain(value) for name, value in limits.items()},
        "allocation": allocation,
        "step": step,
        "finetune": None if tuning is None else tuning.described,
    }
    file = None if path is None else _File(path, settings, _origin(course))
    resumed = 0
    if file is not None and file.path.is_file():
        resumed = course.resume(file, rounds)
    else:
        # What plan refuses, it refuses before the first measurement.
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


class _Cutting:
    """Copies of models, cut to what T leaves of the dense model's cost."""

    def __init__(
        self, model: nn.Module, anatomy: Anatomy, stats: Statistics, cost: str, arguments: Mapping[str, Any]
    ) -> None:
        self.model, self.anatomy, self.stats = model, anatomy, stats
        self._cost, self._arguments = cost, dict(arguments)

    def plan_of(self, base: nn.Module, stats: Statistics, share: float) -> Plan:
        """Plan for a share of the base model's cost."""
        return plan(base, stats, target=Target(**{self._cost: share}), **self._arguments)

    def cut(self, base: nn.Module, stats: Callable[[], Statistics], threshold: float) -> tuple[nn.Module, Plan | None]:
        """Return a pruned copy, and its plan; no plan where nothing is cut.

        Raises:
            _TooMuchError: T is more than the base model can lose.
        """
        anatomy = family_of(base).inspect(base)
        share = (1 - threshold) * getattr(self.anatomy, self._cost) / getattr(anatomy, self._cost)
        if share >= 1:
            return copy.deepcopy(base), None
        if share <= 0:
            raise _TooMuchError
        limits = {name: self._arguments[name] for name in ("groups", "freeze", "min_keep", "round_to")}
        try:
            # All arguments were checked on the dense model: what is refused now is the target.
            check_target(anatomy, Target(**{self._cost: share}), **_filled(limits))
        except InvalidArgument as error:
            raise _TooMuchError from error
        chosen = self.plan_of(base, stats(), share)
        pruned = copy.deepcopy(base)
        prune(pruned, chosen)
        return pruned, chosen


class _TooMuchError(Exception):
    """No choice of sizes removes so much."""


class _Tuning:
    """What happens to a pruned copy, and to the statistics behind it."""

    def __init__(
        self,
        dense: nn.Module,
        how: Tuning,
        train_loader: Iterable[Any] | None,
        calibration_loader: Iterable[Any] | None,
    ) -> None:
        assert calibration_loader is not None
        self.train_loader, self.calibration_loader = train_loader, calibration_loader
        self._call = how if callable(how) else None
        self._arguments: dict[str, Any] = {} if callable(how) else {"teacher": dense, **how}
        self.teacher: nn.Module | None = self._arguments.get("teacher")

    @property
    def described(self) -> dict[str, Any] | str:
        """The arguments as JSON values; a function is any function."""
        if self._call is not None:
            return "function"
        return {name: _plain(value) for name, value in sorted(self._arguments.items()) if name != "teacher"}

    def train(self, model: nn.Module, resume: Path | None) -> None:
        """Train a copy in place."""
        if self._call is not None:
            self._call(model)
            return
        assert self.train_loader is not None
        keep = resume if self._arguments.get("checkpoint_every") is not None else None
        finetune_(model, self.train_loader, **self._arguments, resume=keep)

    def calibrate(self, model: nn.Module, like: Statistics) -> Statistics:
        """Collect the statistics of a trained copy, as they were collected of the dense model."""
        return calibrate(
            model,
            self.calibration_loader,
            max_images=like.images,
            collect=like.settings.collect,
            gamma=like.settings.gamma,
            token_fraction=like.settings.token_fraction,
            sensitivity=like.sensitive,
        )


@dataclass(frozen=True)
class _File:
    """The checkpoint: the history, and with fine-tuning the models that are still needed."""

    path: Path
    settings: Mapping[str, Any]
    origin: Mapping[str, Any]

    def of_round(self, number: int) -> Path:
        """Where the training of one round keeps its own."""
        return self.path.with_name(f"{self.path.stem}.round{number}.safetensors")

    def write(self, history: Iterable[Round], models: Mapping[int, nn.Module], dense: nn.Module) -> None:
        tensors: dict[str, Tensor] = {}
        shapes = {}
        for number, model in sorted(models.items()):
            tensors |= {f"{number}.{name}": value for name, value in model.state_dict().items()}
            shapes[str(number)] = _structure(model, dense).to_dict()
        header = {
            "settings": self.settings,
            "origin": self.origin,
            "history": [asdict(row) for row in history],
            "models": shapes,
        }
        container.write(self.path, _KIND, header, tensors)

    def read(self, dense: nn.Module) -> tuple[list[Round], dict[int, nn.Module]]:
        """Return history and models; nothing is changed.

        Raises:
            InvalidArgument: the file is damaged, or another search's.
        """
        header, tensors = container.read(self.path, _KIND)
        with container.understood("resume: expected the file of this search"):
            return self._matched(dense, header, tensors)

    def _matched(
        self, dense: nn.Module, header: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> tuple[list[Round], dict[int, nn.Module]]:
        # As JSON gives them back.
        mine = json.loads(json.dumps({"settings": self.settings, "origin": self.origin}))
        for what in ("settings", "origin"):
            for name, value in mine[what].items():
                found = header[what].get(name)
                if found != value:
                    shown = "others" if what == "origin" else f"{found!r} where it is {value!r} now"
                    raise InvalidArgument(f"resume: expected the file of this search, got one with {name}: {shown}")
        models = {}
        for number, shape in header["models"].items():
            state = {n.removeprefix(f"{number}."): t for n, t in tensors.items() if n.startswith(f"{number}.")}
            models[int(number)] = _rebuilt(dense, Structure.from_dict(shape), state)
        return [Round(**row) for row in header["history"]], models


class _Course:
    """One search, from where it is to its end."""

    def __init__(
        self, cutting: _Cutting, tuning: _Tuning | None, objective: Objective, loader: Iterable[Any], stepper: Stepper
    ) -> None:
        self.cutting, self.tuning, self.objective, self.stepper = cutting, tuning, objective, stepper
        self.history: list[Round] = []
        self.loader = loader
        self.labelled = _has_targets(loader)
        # With fine-tuning the models that may still be cut, and always the last accepted one if it is at hand.
        self._models: dict[int, nn.Module] = {}
        self._answer: tuple[int, nn.Module, Plan | None] | None = None
        self._stats: tuple[int, Statistics] = (0, cutting.stats)

    def resume(self, file: _File, rounds: int) -> int:
        """Take up a file, and return the rounds it brought."""
        history, models = file.read(self.cutting.model)
        if len(history) > rounds + 1:
            raise InvalidArgument(f"resume: expected a file of at most {rounds} rounds, got {len(history) - 1}")
        for row in history:
            self._advance(row.measures)
            if self.history[-1] != row:
                raise InvalidArgument(
                    f"resume: expected the history of this search, got a round {len(self.history) - 1} "
                    f"with {row} where it is {self.history[-1]}"
                )
        self._models = models
        answer = self._answer_round
        if answer in models:
            self._answer = (answer, models[answer], None)
        return len(history) - 1

    def measure_dense(self) -> None:
        """Round 0."""
        self._advance(self._measure(self.cutting.model, dense=True))

    def next_round(self, file: _File | None) -> None:
        """Plan, prune, train, measure, move on, and write."""
        number, base, threshold = len(self.history), self.stepper.base, self.stepper.threshold
        assert base is not None
        own = None if file is None else file.of_round(number)
        known = self._known(threshold)
        if known is not None:
            self._advance(known)
        else:
            try:
                model, chosen = self.cutting.cut(self._model_of(base), lambda: self._stats_of(base), threshold)
            except _TooMuchError:
                self._advance(None)
            else:
                if self.tuning is not None:
                    self.tuning.train(model, own)
                self._advance(self._measure(model))
                self._models[number] = model
                if self._answer_round == number:
                    # A plan is the dense model's, and holds no training.
                    self._answer = (number, model, chosen if self.tuning is None else None)
        self._forget()
        self.write(file)
        if own is not None:
            own.unlink(missing_ok=True)

    def write(self, file: _File | None) -> None:
        """Write the checkpoint."""
        if file is not None:
            file.write(self.history, self._models, self.cutting.model)

    def result(self, objective: Objective, resumed: int) -> SearchResult:
        """Return the answer."""
        number = self._answer_round
        if number == 0:
            model, chosen = copy.deepcopy(self.cutting.model), None
        elif self._answer is not None and self._answer[0] == number:
            _, model, chosen = self._answer
        else:
            # Of an earlier process, without fine-tuning: the same plan makes the same bits.
            threshold = self.history[number].threshold
            model, chosen = self.cutting.cut(self.cutting.model, lambda: self.cutting.stats, threshold)
        return SearchResult(model, chosen, objective, tuple(self.history), number, resumed)

    @property
    def _answer_round(self) -> int:
        """The last accepted round; an untrained copy with nothing cut is the dense model, and counts as none."""
        accepted = [
            number
            for number, row in enumerate(self.history)
            if number and row.accepted and (self.tuning is not None or row.threshold > 0)
        ]
        return accepted[-1] if accepted else 0

    def _advance(self, found: Measures | None) -> None:
        """Judge what was measured, and enter the round; None where nothing could be."""
        dense = self.history[0].measures if self.history else found
        assert dense is not None
        stepper = self.stepper
        threshold, step, base = stepper.threshold, stepper.step, stepper.base
        further = accepted = False
        if found is not None:
            best = next((row.measures for row in reversed(self.history[1:]) if row.accepted), None)
            further, accepted = self.objective.judge(found, dense, best)
        self.history.append(
            Round(
                threshold=threshold,
                step=step,
                base=base,
                params=None if found is None else found.params,
                macs=None if found is None else found.macs,
                top1=found.accuracy if found is not None and self.labelled else None,
                agreement=None if found is None or self.labelled else found.accuracy,
                latency=None if found is None else found.latency,
                accepted=accepted,
                move=stepper.tell(further),
            )
        )

    def _forget(self) -> None:
        """Let go of the models that are not needed any more; without fine-tuning none is, they can be made again."""
        needed = set() if self.tuning is None else self.stepper.reachable | {self._answer_round}
        self._models = {number: model for number, model in self._models.items() if number in needed}

    def _model_of(self, base: int) -> nn.Module:
        return self.cutting.model if self.tuning is None or base == 0 else self._models[base]

    def _stats_of(self, base: int) -> Statistics:
        if self.tuning is None or base == 0:
            return self.cutting.stats
        if self._stats[0] != base:
            self._stats = (base, self.tuning.calibrate(self._models[base], self.cutting.stats))
        return self._stats[1]

    def _known(self, threshold: float) -> Measures | None:
        """What this T gave before. A third miss comes back to one, and the same plan makes the same model."""
        if self.tuning is not None or self._timed:
            return None
        return next((row.measures for row in self.history if row.threshold == threshold), None)

    def _measure(self, model: nn.Module, dense: bool = False) -> Measures:
        anatomy = family_of(model).inspect(model)
        if dense and not self.labelled:
            accuracy = 100.0
        else:
            accuracy = evaluate(model, self.loader if self.labelled else _Answers(self.cutting.model, self.loader)).top1
        latency = None
        if self._timed:
            latency = 1.0 if dense else self._latency(model)
        return Measures(anatomy.params, anatomy.macs, accuracy, latency)

    @property
    def _timed(self) -> bool:
        return isinstance(self.objective, LatencySensitive) and self.objective.latency is not None

    def _latency(self, model: nn.Module) -> float:
        assert isinstance(self.objective, LatencySensitive)
        timing = self.objective
        found = bench(
            model,
            self.cutting.model,
            batch_size=timing.batch_size,
            repeats=timing.repeats,
            runtime=timing.runtime,
        )
        speedup = found.speedup
        assert speedup is not None
        return 1 / speedup


class _Answers:
    """Batches of images with the classes that the dense model gives them; the loader may shuffle."""

    def __init__(self, dense: nn.Module, loader: Iterable[Any]) -> None:
        self._dense, self._loader = dense, loader
        self.images = images_in(loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        with borrowed(self._dense) as place:
            for batch in self._loader:
                images, _ = split_batch(batch)
                with torch.inference_mode():
                    logits = full_precision(self._dense(model_input(self._dense, images, place)))
                yield images, logits.argmax(dim=1)


def _check_loader(argument: str, loader: object) -> None:
    if isinstance(loader, Iterator) or not isinstance(loader, Iterable):
        kind = f"{type(loader).__name__}{', an iterator' if isinstance(loader, Iterator) else ''}"
        raise InvalidArgument(f"{argument}: expected batches that can be read several times, got {kind}")


def _has_targets(loader: Iterable[Any]) -> bool:
    for batch in loader:
        return split_batch(batch)[1] is not None
    raise InvalidArgument("loader: expected at least one batch, got none")


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
    """Refuse what no plan can reach, or what so many steps cannot."""
    budget = None if isinstance(objective, AccuracyCritical) else getattr(objective, objective.cost)
    # A measured latency has no bound that could be known.
    check_target(anatomy, Target(**{objective.cost: 1.0 if budget is None else budget}), **_filled(limits))
    if budget is not None:
        least = math.ceil((1 - budget) / step - 1e-9)
        if rounds < least:
            raise InvalidArgument(
                f"rounds: expected at least {least} to remove {1 - budget:.4g} in steps of {step:g}, got {rounds}"
            )


def _filled(limits: Mapping[str, Any]) -> dict[str, Any]:
    return {**limits, "min_keep": limits["min_keep"] or {}}


def _listed(names: Any) -> Any:
    """A list that can be read twice; what is no sequence of names is left for plan to refuse."""
    return list(names) if isinstance(names, Iterable) and not isinstance(names, str) else names


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _origin(course: _Course) -> dict[str, Any]:
    """What a search begins with: digests of weights and statistics, and what the loaders tell."""
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


def _structure(model: nn.Module, dense: nn.Module) -> Structure:
    return Structure.of(model, family_of(model).inspect(model), dict(dense.named_parameters()))


def _rebuilt(dense: nn.Module, structure: Structure, state: Mapping[str, Tensor]) -> nn.Module:
    """Make a model of a file again: a copy of the dense one with its structure, and then its values."""
    model = copy.deepcopy(dense)
    structure.apply(model)
    model.load_state_dict(state)
    return model
