"""One search, round by round."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data.model_input import images_in, model_input, split_batch
from ..errors import InvalidArgument
from ..families.registry import family_of
from ..latency.bench import bench
from ..plans.plan import Plan
from ..runtime.devices import borrowed
from ..statistics.statistics import Statistics
from ..training.evaluate import evaluate, full_precision
from .cutting import Cutting, TooMuchError, Tuned
from .file import SearchFile
from .objectives import LatencySensitive, Measures, Objective
from .result import Round, SearchResult
from .stepper import Stepper

if TYPE_CHECKING:
    pass


class Course:
    """One search, from its current round to its end."""

    def __init__(
        self, cutting: Cutting, tuning: Tuned | None, objective: Objective, loader: Iterable[Any], stepper: Stepper
    ) -> None:
        self.cutting, self.tuning, self.objective, self.stepper = cutting, tuning, objective, stepper
        self.history: list[Round] = []
        self.loader = loader
        self.labelled = has_targets(loader, cutting.model)
        # With fine-tuning, the models that may still be cut; and always the last accepted one if it exists.
        self._models: dict[int, nn.Module] = {}
        self._answer: tuple[int, nn.Module, Plan | None] | None = None
        self._stats: tuple[int, Statistics] = (0, cutting.stats)

    def resume(self, file: SearchFile, rounds: int) -> int:
        """Continue from a file, and return the number of rounds in it."""
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
        """Measure the dense model as round 0."""
        self._advance(self._measure(self.cutting.model, dense=True))

    def next_round(self, file: SearchFile | None) -> None:
        """Run a round: plan, prune, train, measure, move on, and write the checkpoint."""
        number, base, threshold = len(self.history), self.stepper.base, self.stepper.threshold
        assert base is not None
        own = None if file is None else file.of_round(number)
        known = self._known(threshold)
        if known is not None:
            self._advance(known)
        else:
            try:
                model, chosen = self.cutting.cut(self._model_of(base), lambda: self._stats_of(base), threshold)
            except TooMuchError:
                self._advance(None)
            else:
                if self.tuning is not None:
                    self.tuning.train(model, own)
                self._advance(self._measure(model))
                self._models[number] = model
                if self._answer_round == number:
                    # Plans are for the dense model and cannot hold fine-tuned weights.
                    self._answer = (number, model, chosen if self.tuning is None else None)
        self._forget()
        self.write(file)
        if own is not None:
            own.unlink(missing_ok=True)

    def write(self, file: SearchFile | None) -> None:
        """Write the checkpoint."""
        if file is not None:
            file.write(self.history, self._models, self.cutting.model)

    def result(self, objective: Objective, resumed: int) -> SearchResult:
        """Return the answer and the history."""
        number = self._answer_round
        if number == 0:
            model, chosen = copy.deepcopy(self.cutting.model), None
        elif self._answer is not None and self._answer[0] == number:
            _, model, chosen = self._answer
        else:
            # The model was in an earlier process, without fine-tuning; the same plan makes the same bits.
            threshold = self.history[number].threshold
            model, chosen = self.cutting.cut(self.cutting.model, lambda: self.cutting.stats, threshold)
        return SearchResult(model, chosen, objective, tuple(self.history), number, resumed)

    @property
    def _answer_round(self) -> int:
        """Return the last accepted round; an untrained copy with nothing cut is the dense model, and counts as none."""
        accepted = [
            number
            for number, row in enumerate(self.history)
            if number and row.accepted and (self.tuning is not None or row.threshold > 0)
        ]
        return accepted[-1] if accepted else 0

    def _advance(self, found: Measures | None) -> None:
        """Judge the measurements and record the round; None if nothing could be measured."""
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
        """Drop the models that are no longer needed: without fine-tuning all of them, since they can be made again."""
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
        """Return the measurements of an earlier round at this T, if any: the same plan makes the same model."""
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
    """Batches of images with the dense model's predicted classes as targets; the loader may shuffle."""

    def __init__(self, dense: nn.Module, loader: Iterable[Any]) -> None:
        self._dense, self._loader = dense, loader
        self.images = images_in(loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        with borrowed(self._dense) as place:
            for batch in self._loader:
                images, _ = split_batch(batch, labels=False, model=self._dense)
                with torch.inference_mode():
                    logits = full_precision(self._dense(model_input(self._dense, images, place)))
                yield images, logits.argmax(dim=1)


def has_targets(loader: Iterable[Any], model: nn.Module | None = None) -> bool:
    """Return whether the batches have labels.

    Raises:
        InvalidArgument: the loader has no batch.
    """
    for batch in loader:
        targets = split_batch(batch, model=model)[1]
        # An image of a data set without classes has -1.
        return targets is not None and (targets.is_floating_point() or bool((targets != -1).any()))
    raise InvalidArgument("loader: expected at least one batch, got none")
