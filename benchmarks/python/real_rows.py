"""The rows of bench_real.py: each makes a model of the dense one, for a budget, from one draw of calibration images."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peers
import secateur as sc
import torch
from counts import INNER, Budget, allocations, sizes_at, uniform
from pictures import Batches, Pictures
from secateur.anatomy.kinds import KINDS
from tome import spread, tome
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from secateur.anatomy import Anatomy

SPEED_THREADS = 2
SPEED_BATCH = 16


@dataclass
class Seconds:
    """Time that something took: by the clock, and of all the process's threads."""

    wall: float = 0.0
    cpu: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.wall + other.wall, self.cpu + other.cpu)

    @contextmanager
    def measured(self) -> Iterator[None]:
        begun = time.perf_counter(), time.process_time()
        yield
        self.wall += time.perf_counter() - begun[0]
        self.cpu += time.process_time() - begun[1]


class Draw:
    """One draw of calibration images, and what is measured on it once for all rows and budgets."""

    def __init__(self, name: str, dense: nn.Module, pictures: Pictures, cache: Path) -> None:
        self.name, self.dense, self.pictures, self.cache = name, dense, pictures, cache
        self.batches = Batches(pictures)
        self._spent: dict[str, Seconds] = {}

    @cached_property
    def anatomy(self) -> Anatomy:
        return sc.inspect(self.dense)

    @cached_property
    def statistics(self) -> sc.Statistics:
        """Those of the cache, where this code has calibrated this model on these images before."""
        if self._file.is_file():
            return sc.Statistics.load(self._file)
        found = sc.calibrate(self.dense, self.batches, max_images=None, sensitivity=True)
        self.cache.mkdir(parents=True, exist_ok=True)
        found.save(self._file)
        return found

    @cached_property
    def _file(self) -> Path:
        found = hashlib.sha256(self.pictures.digest.encode())
        for tensor in self.dense.state_dict().values():
            found.update(tensor.numpy())
        package = Path(sc.__file__).parent
        for path in sorted([*package.rglob("*.py"), *package.glob("_core.*")]):
            found.update(path.read_bytes())
        return self.cache / f"statistics-{found.hexdigest()[:24]}.safetensors"

    @cached_property
    def peers(self) -> peers.Calibration:
        # It takes slices of the images, which are normalised only then.
        images: Any = self.pictures
        return peers.Calibration(self.dense, images, self.pictures.labels)

    @cached_property
    def forward(self) -> None:
        """A pass of the dense model over the images, as a measure of time."""
        with torch.inference_mode():
            for images, _ in self.batches:
                self.dense(images)

    def spent(self, names: Iterable[str]) -> Seconds:
        """What it takes to measure these, which are measured now if they have not been: "peers.grams", for one."""
        total = Seconds()
        for name in names:
            if name not in self._spent:
                self._spent[name] = self._measured(name)
            total += self._spent[name]
        return total

    def _measured(self, name: str) -> Seconds:
        found, part = Seconds(), self
        with found.measured():
            for each in name.split("."):
                part = getattr(part, each)
        if name == "statistics":
            # What they took when they were not yet in the cache.
            beside = self._file.with_suffix(".json")
            if beside.is_file():
                return Seconds(*json.loads(beside.read_text()))
            beside.write_text(json.dumps([found.wall, found.cpu]))
        return found


@dataclass(frozen=True)
class Way:
    """How a row's model is made; ``needs`` are the parts of a draw that it shares with other rows and budgets."""

    note: str
    make: Callable[[Draw, Budget], peers.Outcome]
    needs: tuple[str, ...] = ()
    # Whether it knows other budgets than MACs.
    latency: bool = False
    # Whether secateur knows what it makes: it can be saved, and has an anatomy.
    known: bool = True
    # Whether it looks at calibration images.
    calibrated: bool = True


def planned(draw: Draw, budget: Budget, *, method: str, **arguments: Any) -> peers.Outcome:
    """One plan and one cut, from the draw's statistics."""
    model = copy.deepcopy(draw.dense)
    plan = sc.plan(model, draw.statistics, method=method, **_target(budget), **arguments)
    with torch.no_grad():
        sc.prune(model, plan)
    return peers.Outcome(model)


def sequential(draw: Draw, budget: Budget, *, tokens: bool = False, reconstruct: bool = False) -> peers.Outcome:
    """What `prune_sequential` does by default, with the kinds named; this is the only place that calls it.

    With ``tokens`` the kind of that name is in the budget together with the channels, by the same argument ``groups``.
    With ``reconstruct`` the model is then trained on the same images, without labels.
    """
    kinds = (*INNER, "tokens") if tokens else INNER
    if tokens and "tokens" not in KINDS:
        raise sc.Unsupported('this version of secateur has no kind "tokens"')
    model = copy.deepcopy(draw.dense)
    sc.prune_sequential(model, draw.batches, groups=kinds, max_images=None, **_target(budget))
    if not reconstruct:
        return peers.Outcome(model)
    found = sc.reconstruct(model, draw.dense, draw.batches)
    return peers.Outcome(model, detail={"held_back": [found.loss_before, found.loss], "passes": found.passes})


def _target(budget: Budget) -> dict[str, Any]:
    more = {"batch_size": SPEED_BATCH} if budget.quantity == "latency" else {}
    return {"target": sc.Target(**{budget.quantity: budget.kept}), **more}


def peer(draw: Draw, budget: Budget, *, name: str, grid: bool = False) -> peers.Outcome:
    """A method of peers.py, at one ratio for all kinds it cuts, or at the best of a grid of ratios.

    The best is nearest to the dense model, by divergence, on the eighth of the calibration images that peers hold out.
    """
    prune = peers.PEERS[name].prune
    if not grid:
        ratios = uniform(draw.anatomy, budget, name)
        outcome = prune(draw.peers, sizes_at(draw.anatomy, ratios))
        return peers.Outcome(outcome.model, outcome.as_is, {"ratios": ratios, **outcome.detail})
    held = draw.pictures[draw.peers.fitted :]
    best: tuple[float, peers.Outcome] | None = None
    for ratios in allocations(draw.anatomy, budget, name):
        outcome = prune(draw.peers, sizes_at(draw.anatomy, ratios))
        kl = peers.divergence(draw.peers.held_logits, peers.logits(outcome.model, held))
        if best is None or kl < best[0]:
            best = kl, peers.Outcome(outcome.model, outcome.as_is, {"ratios": ratios, **outcome.detail})
    if best is None:
        raise sc.Unsupported(f"{name}: no ratios of the grid reach {budget}")
    return best[1]


def merged(draw: Draw, budget: Budget, *, decreasing: bool = False) -> peers.Outcome:
    """Token merging alone."""
    macs = budget.kept * draw.anatomy.macs
    model, schedule = tome(draw.dense, macs, draw.pictures[:2], decreasing=decreasing)
    return peers.Outcome(model, detail={"merged": schedule})


def merged_by_secateur(draw: Draw, budget: Budget) -> peers.Outcome:
    """Token merging alone in ToMe's schedule, as many in each block, but of the tokens that secateur would choose."""
    groups = [group for group in draw.anatomy.groups if group.kind == "tokens"]
    patches = draw.anatomy.tokens[groups[0].name].patches
    left: dict[str, int] = {}
    for total in range(1, len(groups) * groups[0].size):
        merged = spread(total, len(groups), patches, decreasing=False)
        left = {group.name: group.size - count for group, count in zip(groups, merged, strict=True)}
        if draw.anatomy.macs_at(left, "whole") <= budget.kept * draw.anatomy.macs:
            break
    else:
        raise sc.Unsupported(f"merged: no schedule reaches {budget}")
    model = copy.deepcopy(draw.dense)
    ratios = {group.name: 1 - left[group.name] / group.size for group in groups}
    sc.prune(model, sc.plan(model, method="magnitude", ratios=ratios), last_block="whole")
    return peers.Outcome(model, detail={"merged": merged})


def unchanged(draw: Draw, _budget: Budget) -> peers.Outcome:
    return peers.Outcome(draw.dense)


_NEEDS = {
    "magnitude": (),
    "taylor": ("peers.taylor",),
    "vbp": ("peers.inputs", "peers.variances"),
    "corp": ("peers.inputs", "peers.grams"),
    "corp-paper": ("peers.inputs", "peers.grams"),
    "tp-taylor": (),
    "tp-magnitude": (),
}
_STATISTICS = ("statistics",)
WAYS: dict[str, Way] = {
    "dense": Way("as it came", unchanged, calibrated=False),
    "project": Way("one plan, default allocation", partial(planned, method="project"), _STATISTICS, latency=True),
    "project-uniform": Way(
        "one removed fraction for all groups", partial(planned, method="project", allocation="uniform"), _STATISTICS
    ),
    "refit": Way("one plan, default allocation", partial(planned, method="refit"), _STATISTICS, latency=True),
    "snp": Way("one plan, default allocation", partial(planned, method="snp"), _STATISTICS, latency=True),
    "magnitude": Way("one plan, default allocation", partial(planned, method="magnitude"), _STATISTICS, latency=True),
    **{
        f"peer-{name}" if name == "magnitude" else name: Way(each.note, partial(peer, name=name), _NEEDS[name])
        for name, each in peers.PEERS.items()
    },
    **{
        f"{name}-grid": Way(f"{name}, best of a grid of ratios", partial(peer, name=name, grid=True), _NEEDS[name])
        for name in ("taylor", "vbp", "tp-taylor", "tp-magnitude")
    },
    "tome": Way("token merging alone, as many in each block", merged, known=False, calibrated=False),
    "tome-falling": Way(
        "token merging alone, fewer from block to block",
        partial(merged, decreasing=True),
        known=False,
        calibrated=False,
    ),
    "merged": Way("as tome, but tokens compared by what the FFN reads", merged_by_secateur, calibrated=False),
    "ours": Way("prune_sequential, channels only", sequential, latency=True),
    "ours-tokens": Way("prune_sequential, channels and tokens", partial(sequential, tokens=True), latency=True),
    "ours-reconstructed": Way(
        "the same, then reconstruct on the calibration images", partial(sequential, tokens=True, reconstruct=True)
    ),
}


def made(way: Way, draw: Draw, budget: Budget) -> tuple[peers.Outcome, Seconds]:
    """The model, and the time it took, what it shares with other rows included as if it were alone."""
    shared, own = draw.spent(way.needs), Seconds()
    with ExitStack() as stack:
        if budget.quantity == "latency":
            before = torch.get_num_threads()
            torch.set_num_threads(SPEED_THREADS)
            stack.callback(torch.set_num_threads, before)
        with own.measured():
            outcome = way.make(draw, budget)
    return outcome, shared + own
