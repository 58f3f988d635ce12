"""Which units stay: a Plan, made from statistics and a budget, bound to one model, saved as JSON."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from . import check, container, core
from .allocate import (
    Allocation,
    Target,
    allocate,
    check_target,
    counts_from_ratios,
    free_groups,
    limits_of,
)
from .anatomy import Anatomy, Group, Indices, kept_along_axes, parameter_name, units
from .cost import Cost
from .errors import InvalidArgument
from .evaluate import device_of
from .families import family_of
from .identity import Fingerprint
from .latency import Latency, LatencyReport, LatencyTable, meet
from .machine import Machine
from .score import Prepared, method_named
from .statistics import Float, Statistics

_FORMAT = 1
_WEIGHTS = "plan weights"


# Equal where they are the same object: arrays and tensors have no equality that is one bool.
@dataclass(frozen=True, eq=False)
class Plan:
    """Which units of which group stay, for one model.

    ``keep`` maps a group to sorted indices, (heads, kept) or (1, kept); groups that stay whole are not in it.
    ``weights`` maps parameters that do not keep their values to those they get, in their shape after the cut; biases
    that the model does not have are added. A group that was turned to another basis keeps its first units there.
    ``eps`` maps norms to the eps that they get, ``uncentred`` names the query/key norms that take the mean off no more.
    ``params`` and ``macs`` are (before, after). ``latency`` tells what was
    predicted and measured for a target for it, else it is None. ``loss``, where a target was shared out by errors, is
    the loss that is predicted (in nats, see ``Statistics.sensitivity``) and what no choice of sizes within the target
    can go below.
    """

    method: str
    options: Mapping[str, Any]
    fingerprint: Fingerprint
    keep: Mapping[str, Indices]
    params: tuple[int, int]
    macs: tuple[int, int]
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    eps: Mapping[str, float] = field(default_factory=dict)
    uncentred: tuple[str, ...] = ()
    latency: LatencyReport | None = None
    loss: tuple[float, float] | None = None

    def check(self, anatomy: Anatomy) -> dict[str, int]:
        """Check that every index list fits the model; return the size each group will have.

        Raises:
            InvalidArgument: an unknown group, or indices that are not sorted, unique, in range, or equally many a head.
        """
        sizes = dict(anatomy.sizes)
        for name, keep in self.keep.items():
            if name not in sizes:
                raise InvalidArgument(f"plan.keep: expected groups of this model, got {name!r}")
            group = anatomy.group(name)
            if not isinstance(keep, np.ndarray) or keep.dtype != np.int64:
                found = f"{keep.dtype} array" if isinstance(keep, np.ndarray) else type(keep).__name__
                raise InvalidArgument(f"plan.keep[{name!r}]: expected an int64 NumPy array, got {found}")
            if keep.ndim != 2 or keep.shape[0] != group.heads or not group.least <= keep.shape[1] <= group.size:
                raise InvalidArgument(
                    f"plan.keep[{name!r}]: expected ({group.heads}, {group.least}…{group.size}) indices, "
                    f"got shape {keep.shape}"
                )
            if (np.diff(keep) <= 0).any() or (keep < 0).any() or (keep >= group.size).any():
                raise InvalidArgument(
                    f"plan.keep[{name!r}]: expected sorted, unique indices below {group.size}, got others"
                )
            sizes[name] = keep.shape[1]
        anatomy.require_layers(sizes, "plan.keep")
        self._check_weights(anatomy)
        return sizes

    def _check_weights(self, anatomy: Anatomy) -> None:
        for name, value in self.weights.items():
            module, _, parameter = name.rpartition(".")
            source = name if name in anatomy.shapes else parameter_name(module, "weight")
            if source not in anatomy.shapes or (source != name and parameter != "bias"):
                raise InvalidArgument(f"plan.weights: expected parameters of this model, got {name!r}")
            layer = anatomy.layer_holding(name)
            if layer is not None and layer in self.keep and self.keep[layer].shape[1] == 0:
                raise InvalidArgument(f"plan.weights: expected parameters of layers that stay, got {name!r}")
            axes = kept_along_axes(anatomy, source, self.keep)
            shape = [len(axes[dim]) if dim in axes else size for dim, size in enumerate(anatomy.shapes[source])]
            expected = tuple(shape if source == name else shape[:1])
            if tuple(value.shape) != expected or not value.is_floating_point():
                raise InvalidArgument(
                    f"plan.weights[{name!r}]: expected numbers of shape {expected}, "
                    f"got {value.dtype} of {tuple(value.shape)}"
                )
        of_heads = {
            name for site in anatomy.attention if site.qk in self.keep for name in (site.q_norm, site.k_norm) if name
        }
        norms = {norm.name for norm in anatomy.norms} | of_heads
        for name, eps in self.eps.items():
            if name not in norms:
                raise InvalidArgument(
                    f"plan.eps: expected norms of the residual stream or of queries and keys that are cut, got {name!r}"
                )
            check.number(f"plan.eps[{name!r}]", eps)
        for name in self.uncentred:
            if name not in of_heads:
                raise InvalidArgument(f"plan.uncentred: expected norms of queries and keys that are cut, got {name!r}")

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; of weights their names, shapes and types."""
        return {
            "method": self.method,
            "options": dict(self.options),
            "fingerprint": self.fingerprint.to_dict(),
            "keep": {name: keep.tolist() for name, keep in self.keep.items()},
            "params": list(self.params),
            "macs": list(self.macs),
            "weights": {n: [str(w.dtype).removeprefix("torch."), *w.shape] for n, w in sorted(self.weights.items())},
            "eps": dict(self.eps),
            **({"uncentred": list(self.uncentred)} if self.uncentred else {}),
            "latency": None if self.latency is None else self.latency.to_dict(),
            "loss": None if self.loss is None else list(self.loss),
        }

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON with a checksum; the same plan gives the same bytes.

        Weights, where it has any, go to a second file beside it, NAME.weights.safetensors, which the JSON names by its
        checksum; it is written first.

        Raises:
            InvalidArgument: the folder does not exist, or the plan has more than some million indices.
        """
        path = Path(path)
        values = self.to_dict()
        if self.weights:
            values["weights_sha256"] = _digest(self.weights)
        fields = _canonical(values)
        try:
            values = container.parse(fields)
        except ValueError as error:  # what `load` would refuse
            raise InvalidArgument(f"plan: expected one that a file can hold, got {error}") from error
        if self.weights:
            container.write(_weights_path(path), _WEIGHTS, {}, self.weights)
        outer = {"secateur": "plan", "format": _FORMAT, "sha256": hashlib.sha256(fields.encode()).hexdigest()}
        with container.replacing(path) as temporary:
            temporary.write_text(_canonical({**outer, "plan": values}) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan that ``save`` wrote.

        Raises:
            InvalidArgument: no such file, another kind of file, a newer format, a checksum that does not match, or the
                file of its weights missing or another plan's.
        """
        path = Path(path)
        if not path.is_file():
            raise InvalidArgument(f"path: expected a secateur plan, got {path}, which is no file")
        try:
            outer = container.read_json(path)
            if not isinstance(outer, dict) or outer.get("secateur") != "plan":
                raise ValueError("another kind of file")
            if outer["format"] > _FORMAT:
                raise InvalidArgument(
                    f"{path.name}: expected format {_FORMAT} or older, got {outer['format']}: update secateur"
                )
            fields = outer["plan"]
            if outer["sha256"] != hashlib.sha256(_canonical(fields).encode()).hexdigest():
                raise ValueError("one that does not match its checksum")
            for name, kind in (("method", str), ("options", dict), ("keep", dict), ("eps", dict), ("uncentred", list)):
                if not isinstance(fields.get(name, kind()), kind):
                    raise TypeError(f"{name} of type {type(fields.get(name)).__name__}")
            return cls(
                method=fields["method"],
                options=fields["options"],
                fingerprint=Fingerprint.from_dict(fields["fingerprint"]),
                keep={name: np.asarray(keep, np.int64) for name, keep in fields["keep"].items()},
                params=(fields["params"][0], fields["params"][1]),
                macs=(fields["macs"][0], fields["macs"][1]),
                weights=_read_weights(path, fields),
                eps=fields.get("eps", {}),
                uncentred=tuple(map(str, fields.get("uncentred", ()))),
                latency=LatencyReport.from_dict(fields["latency"]) if fields.get("latency") else None,
                loss=(fields["loss"][0], fields["loss"][1]) if fields.get("loss") else None,
            )
        except InvalidArgument:
            raise
        except UnicodeDecodeError as error:
            raise InvalidArgument(f"{path.name}: expected a secateur plan, got a file that is no text") from error
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
            raise InvalidArgument(f"{path.name}: expected a secateur plan, got {error}") from error

    def __str__(self) -> str:
        params, macs = (" -> ".join(map(units, pair)) for pair in (self.params, self.macs))
        line = f"Plan({self.method}): {params} parameters, {macs} MACs, {len(self.keep)} groups cut"
        return line if self.latency is None else f"{line}, {self.latency}"


@core.host_by_default()
def plan(
    model: nn.Module,
    stats: Statistics,
    *,
    method: str = "snp",
    target: Target | None = None,
    ratios: Mapping[str, float] | str | Path | None = None,
    groups: Iterable[str] | None = None,
    freeze: Iterable[str] = (),
    min_keep: Mapping[str, int] | None = None,
    round_to: int | Mapping[str, int] | None = None,
    allocation: str | None = None,
    latency_table: LatencyTable | str | Path | None = None,
    batch_size: int | None = None,
    strict: bool = True,
    **options: str,
) -> Plan:
    """Choose which units stay. The same model, statistics and arguments give the same plan, but for a latency's.

    ``Target(latency=)`` is met on the clock: the plan that a table of layer times predicts to take that fraction of the
    model's time is measured, on a copy, against the model in paired runs; the table is corrected by what was found, and
    a new plan made, until measured / target lies in [0.95, 1] or three rounds passed. ``plan.latency`` reports both. A
    table of another machine is warned of, and the plan made by the table alone.

    Args:
        model: the model that was calibrated; it is not changed.
        stats: what ``calibrate`` measured on it.
        method: the importance criterion; see ``methods()``.
        target: a budget; never exceeded, and missed by less than the
            smallest rounding step that is left, query/key and value of a layer stepping together. Exactly one of
            ``target`` and ``ratios`` is given.
        ratios: fraction removed by kind or group, {"qk": .5, "v": .5, "ffn": .5, "width": .1}, or a per-block file: the
            name of a shipped one ("snp_deit_t", "snp_deit_s_1.3g") or a path. {"blocks.3.attn": 1} removes a layer,
            {"block": .25} a quarter of all layers, those whose removal moves the output least.
        groups: kinds or names of groups that may be cut; with a target ("qk", "v", "ffn") unless given. "heads" are
            whole heads, as many in a layer as pays; "block" is whole attention and FFN layers, of which one of each
            stays, and with a target takes ``allocation="error"``.
        freeze: kinds, names or patterns ("blocks.0.*") of groups that stay whole.
        min_keep: fewest units to keep, by kind or group.
        round_to: kept counts are multiples of this (per head for query/key and value), an int or a dict by kind or
            group; unless given 8 per head and 32 otherwise with a target, 1 with ratios. A whole group may always stay.
        allocation: how a target is shared out: "uniform", one removed fraction for all groups, or "error", the counts
            of the least loss: a group's error at every size times the sensitivity of the output to it
            (``calibrate(sensitivity=True)``), added up. Unless given, "error" where the statistics allow it.
        latency_table: what ``measure_latency`` measured, or its file; it names batch size, type and backend. Without
            one, a target for latency has one measured first, eager and as the model is, for the groups that may be cut.
        batch_size: images in the batch that a target for latency is about; the table's, or else 1. A table of another
            batch size is refused.
        strict: refuse statistics of other weights; if false, the same dimensions are enough for a method that only
            selects.
        **options: the method's own. "snp" takes similarity="weights" (the paper's) or "activations"; "refit" takes
            selection="greedy", "snp" or "energy"; all take head_score="neurons" (the mean of a head's neuron scores) or
            "michel" (Michel et al., 2019), "refit" and "project" also "error", their default: what the refitted
            projection loses with the head.

    Raises:
        InvalidArgument: an argument that does not fit, an infeasible target, or statistics of another model.
        Unsupported: a kind of cut that this model does not allow.
    """
    if not isinstance(stats, Statistics):
        raise InvalidArgument(f"stats: expected Statistics from calibrate, got {type(stats).__name__}")
    check_budget(target, ratios, allocation, latency_table, batch_size)
    criterion = method_named(method)
    chosen = checked_options(options, method)
    anatomy = family_of(model).inspect(model)
    fingerprint = Fingerprint.of(model, anatomy)
    stats.settings.fingerprint.require(fingerprint, "model", strict=strict)
    if not strict and method != "snp":
        raise InvalidArgument(f"strict: expected True for {method!r}, which changes weights, got False")
    limits = limits_of(groups, freeze, min_keep, round_to)
    table = None
    if target is not None and target.latency is not None:
        table = table_for(model, anatomy, target, limits, latency_table, batch_size)
    with core.torch_threads():
        prepared = criterion.prepare(model, anatomy, stats, chosen)
        losses = None if target is None else _losses(anatomy, stats, prepared, limits, allocation)
    removal = None if not stats.sensitive else lambda group: _loss(stats, prepared, group)[0]
    wanted, added = target, 0
    while True:
        try:
            chosen_sizes, latency = sizes_for(
                model, anatomy, wanted, ratios, limits, losses=losses, removal=removal, table=table
            )
        except InvalidArgument as error:
            if added == 0:
                raise
            raise _no_room(target, added) from error
        sizes = chosen_sizes.sizes
        with core.torch_threads():
            decision = prepared.decide(sizes)
        found = sum(value.numel() for name, value in decision.weights.items() if name not in anatomy.shapes)
        params = anatomy.params_at(sizes) + found
        if target is None or target.params is None or params <= target.params * anatomy.params:
            break
        # Biases where there were none count, and which layers get them is known behind the choice alone.
        assert wanted is not None
        added = max(found, added + 1)  # always more: rounding may take a parameter for one too many
        left = target.params - added / anatomy.params
        if left <= 0:
            raise _no_room(target, added)
        wanted = replace(target, params=left)
    return Plan(
        method=method,
        options={**chosen, "target": None if target is None else vars(target), "gamma": stats.settings.gamma},
        fingerprint=fingerprint,
        keep=decision.keep,
        params=(anatomy.params, params),
        macs=(anatomy.macs, anatomy.macs_at(sizes)),
        weights=decision.weights,
        eps=decision.eps,
        uncentred=decision.uncentred,
        latency=latency,
        loss=None if math.isnan(chosen_sizes.loss) else (chosen_sizes.loss, chosen_sizes.bound),
    )


def check_budget(target: Any, ratios: Any, allocation: Any, latency_table: Any = None, batch_size: Any = None) -> None:
    """Refuse all but one target or ratios, and what they do not go with.

    Raises:
        InvalidArgument: both, neither, or something else.
    """
    if (target is None) == (ratios is None):
        raise InvalidArgument(f"target, ratios: expected exactly one, got {'neither' if target is None else 'both'}")
    if target is not None and not isinstance(target, Target):
        raise InvalidArgument(f"target: expected a Target, such as Target(macs=0.5), got {target!r}")
    if ratios is not None and not isinstance(ratios, (Mapping, str, Path)):
        raise InvalidArgument(f"ratios: expected a dict, a name or a path, got {ratios!r}")
    if allocation not in (None, "uniform", "error"):
        raise InvalidArgument(f"allocation: expected 'uniform' or 'error', got {allocation!r}")
    if allocation is not None and ratios is not None:
        raise InvalidArgument(f"allocation: expected none with ratios, got {allocation!r}")
    if target is None or target.latency is None:
        for name, value in (("latency_table", latency_table), ("batch_size", batch_size)):
            if value is not None:
                raise InvalidArgument(f"{name}: expected none without Target(latency=), got {value!r}")
    if not isinstance(latency_table, (LatencyTable, str, Path, type(None))):
        raise InvalidArgument(f"latency_table: expected a LatencyTable or its file, got {latency_table!r}")
    check.integer("batch_size", batch_size, optional=True)


def sizes_for(
    model: nn.Module,
    anatomy: Anatomy,
    target: Target | None,
    ratios: Mapping[str, float] | str | Path | None,
    limits: Mapping[str, Any],
    *,
    losses: Callable[[Group], Float] | None = None,
    removal: Callable[[Group], float] | None = None,
    table: LatencyTable | None = None,
) -> tuple[Allocation, LatencyReport | None]:
    """How many units of each group stay, and what a target for latency came to.

    Arguments are those of ``plan``; ``limits`` are groups, freeze, min_keep and round_to, and ``table`` is there for a
    target for latency.
    """
    if target is None:
        assert ratios is not None
        return Allocation(counts_from_ratios(anatomy, ratios, **limits, removal=removal)), None
    if target.latency is not None:
        assert table is not None
        return _sizes_on_the_clock(model, anatomy, target, limits, losses, table)
    with core.torch_threads():
        return allocate(anatomy, target, **limits, losses=losses), None


def table_for(
    model: nn.Module,
    anatomy: Anatomy,
    target: Target,
    limits: Mapping[str, Any],
    given: LatencyTable | str | Path | None,
    batch_size: int | None,
) -> LatencyTable:
    """The table that was given, or one measured now; a target that it says cannot be met is refused."""
    # Here, not above: timing cuts models, and what cuts models knows plans.
    from .timing import measure_latency

    free = check_target(anatomy, target, **limits)
    if given is None:
        table = measure_latency(model, batch_size=batch_size or 1, groups=dict.fromkeys(group.kind for group in free))
    else:
        table = given if isinstance(given, LatencyTable) else _loaded(given)
        table.require(anatomy, batch_size)
    # The smallest of everything: is every size in the table, and the target within reach? Before hours of work.
    allocate(anatomy, target, **limits, latency=Latency(table, anatomy), losses=lambda g: np.linspace(1, 0, g.size + 1))
    return table


def _loaded(path: str | Path) -> LatencyTable:
    try:
        return LatencyTable.load(path)
    except InvalidArgument as error:
        raise InvalidArgument(f"latency_table: {str(error).removeprefix('path: ')}") from error


def _sizes_on_the_clock(
    model: nn.Module,
    anatomy: Anatomy,
    target: Target,
    limits: Mapping[str, Any],
    losses: Callable[[Group], Float] | None,
    table: LatencyTable,
) -> tuple[Allocation, LatencyReport]:
    from .timing import measured_ratio

    assert target.latency is not None
    difference = table.machine.difference(Machine.here(device_of(model)))
    if difference is not None:
        warnings.warn(
            f"latency_table: expected one of this machine, got one of {table.machine}; this has {difference}. "
            "The plan is made for that machine by its table, and not measured.",
            stacklevel=5,
        )

    def choose(cost: Cost, fraction: float) -> dict[str, int]:
        with core.torch_threads():
            return allocate(anatomy, replace(target, latency=fraction), **limits, losses=losses, latency=cost).sizes

    def measure(sizes: Mapping[str, int]) -> tuple[float, tuple[float, float]]:
        return measured_ratio(model, table, sizes)

    sizes, report = meet(target.latency, table, anatomy, choose, measure if difference is None else None)
    return Allocation(sizes), report


def _no_room(target: Target | None, added: int) -> InvalidArgument:
    return InvalidArgument(
        f"target: expected room for {added:,} biases that the method adds, beside the least these groups reach, "
        f"got {target}"
    )


def _losses(
    anatomy: Anatomy, stats: Statistics, prepared: Prepared, limits: Mapping[str, Any], allocation: str | None
) -> Callable[[Group], Float] | None:
    """What a group is predicted to lose at each size, in the unit of the sensitivities; None to share out uniformly."""
    if allocation == "uniform" or (allocation is None and not stats.sensitive):
        return None
    if not stats.sensitive:
        raise InvalidArgument("stats: expected sensitivities (calibrate(sensitivity=True)), got statistics without")
    cut = free_groups(anatomy, limits)
    for group in cut:
        if prepared.errors(group) is None:
            if allocation is None and all(other.kind != "block" for other in cut):
                return None
            raise InvalidArgument(f"allocation: expected a method that knows the error of {group.name!r}, got none")

    return lambda group: _loss(stats, prepared, group)


def _loss(stats: Statistics, prepared: Prepared, group: Group) -> Float:
    errors = prepared.errors(group)
    assert errors is not None
    return stats.sensitivity(group.name) * errors


def checked_options(given: Mapping[str, str], method: str) -> dict[str, str]:
    """All options of a method, given or not.

    Raises:
        InvalidArgument: no such method, option or value.
    """
    allowed = method_named(method).OPTIONS
    for name, value in given.items():
        if name not in allowed:
            raise InvalidArgument(f"options: expected {', '.join(allowed) or 'none'}, got {name!r}")
        if value not in allowed[name]:
            raise InvalidArgument(f"{name}: expected one of {', '.join(allowed[name])}, got {value!r}")
    return {name: given.get(name, values[0]) for name, values in allowed.items()}


def _weights_path(path: Path) -> Path:
    return path.with_name(f"{path.stem if path.suffix == '.json' else path.name}.weights.safetensors")


def _read_weights(path: Path, fields: Mapping[str, Any]) -> dict[str, Tensor]:
    if not fields.get("weights"):
        return {}
    _, weights = container.read(_weights_path(path), _WEIGHTS)
    if _digest(weights) != fields["weights_sha256"]:
        raise InvalidArgument(f"{_weights_path(path).name}: expected the weights of {path.name}, got another plan's")
    return weights


def _digest(weights: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(_canonical(container.digests(weights)).encode()).hexdigest()


def _canonical(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, sort_keys=True, allow_nan=False, separators=(",", ":"))
