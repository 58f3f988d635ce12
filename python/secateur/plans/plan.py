"""The Plan: which units stay, made from statistics and a budget, bound to one model, saved as JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .. import check
from ..anatomy import Anatomy, Indices, kept_along_axes, parameter_name
from ..anatomy.fingerprint import Fingerprint
from ..anatomy.show import units
from ..errors import InvalidArgument
from ..files import container, documents
from .on_the_clock import LatencyReport

_FORMAT = 1
_WEIGHTS = "plan weights"


# Equal only if they are the same object: comparing arrays and tensors does not return one bool.
@dataclass(frozen=True, eq=False)
class Plan:
    """Which units of each group of one model stay, and how its weights change.

    ``keep`` maps a group to sorted indices, (heads, kept) or (1, kept); groups that stay whole are not in it.
    ``weights`` maps each changed parameter to its new values, in its shape after the cut; biases that the model does
    not have are added. A group that was rotated to another basis keeps its first units there. ``eps`` maps norms to
    their new eps, ``uncentred`` names the query/key norms that no longer subtract the mean. ``params`` and ``macs`` are
    (before, after). ``latency`` holds what was predicted and measured for a target for latency, else it is None.
    ``loss``, where a target was divided by errors, is the predicted loss (in nats, see ``Statistics.sensitivity``) and
    a lower bound for any choice of sizes within the target; ``measured`` is the loss of the whole plan on the images
    that ``plan`` was given, or None.
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
    measured: float | None = None

    def check(self, anatomy: Anatomy) -> dict[str, int]:
        """Check that every index list fits the model; return the size each group will have.

        Raises:
            InvalidArgument: an unknown group, or indices that are not sorted, unique, in range, or equally many in each
                head.
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
            name for layer in anatomy.attention if layer.groups["qk"] in self.keep for name in layer.norms.values()
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
        """Return the plan as JSON values; weights are listed by name, shape and type."""
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
            **({} if self.measured is None else {"measured": self.measured}),
        }

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON with a checksum; the same plan gives the same bytes.

        Weights, if any, are written first, to a second file beside it, NAME.weights.safetensors, whose checksum is in
        the JSON.

        Raises:
            InvalidArgument: the folder does not exist, or the plan has more indices (some millions) than a file can
                hold.
        """
        path = Path(path)
        values = self.to_dict()
        if self.weights:
            values["weights_sha256"] = _digest(self.weights)
        fields = _canonical(values)
        try:
            values = container.parse(fields)
        except ValueError as error:  # a plan that `load` would refuse
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
            InvalidArgument: no such file, another kind of file, a newer format, a checksum that does not match, or a
                weights file that is missing or belongs to another plan.
        """
        path = Path(path)
        if not path.is_file():
            raise InvalidArgument(f"path: expected a secateur plan, got {path}, which is not a file")
        try:
            outer = documents.read_json(path)
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
                measured=None if fields.get("measured") is None else float(fields["measured"]),
            )
        except InvalidArgument:
            raise
        except UnicodeDecodeError as error:
            raise InvalidArgument(f"{path.name}: expected a secateur plan, got a file that is not text") from error
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
            raise InvalidArgument(f"{path.name}: expected a secateur plan, got {error}") from error

    def __str__(self) -> str:
        params, macs = (" -> ".join(map(units, pair)) for pair in (self.params, self.macs))
        line = f"Plan({self.method}): {params} parameters, {macs} MACs, {len(self.keep)} groups cut"
        if self.measured is not None:
            predicted = "" if self.loss is None else f"{self.loss[0]:.3g} predicted, "
            line = f"{line}, loss {predicted}{self.measured:.3g} measured"
        return line if self.latency is None else f"{line}, {self.latency}"


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
