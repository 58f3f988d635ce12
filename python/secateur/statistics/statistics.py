"""Sums over calibration images, kept in two folds; saved, merged, and consumed by every method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from .. import core
from ..anatomy.fingerprint import Fingerprint
from ..errors import InvalidArgument
from ..files import container
from .agreement import Agreement, agreement_of
from .collectors import collectors
from .settings import FOLDS, Float, Settings
from .sufficiency import images_for, median_excess

# The name of losses of whole schedules of merged tokens.
MERGED = "merged"
# The observation that counts images unless every attention layer has one map per image.
IMAGES = "calibration"


@dataclass(frozen=True)
class Moments:
    """First two moments of row vectors: ``mean`` (d,) and ``second`` (d, d) = E[x xᵀ], float64, over ``rows`` rows."""

    rows: int
    mean: Float
    second: Float

    @property
    def covariance(self) -> Float:
        """The centred second moment, (d, d)."""
        covariance: Float = np.outer(self.mean, self.mean)
        return np.subtract(self.second, covariance, out=covariance)


class Statistics:
    """What calibration measured, as sums over images in two folds (even and odd images).

    Arrays are float64, symmetric matrices packed (upper triangle, row by row). ``tensors`` maps ``fold/group/what`` to
    its array, for example ``even/blocks.0.qk/score_sum`` (heads, qk_dim). Outside the folds, ``sample/…`` holds float32
    Grams of the first images one by one, and ``sensitivity/…`` holds sums and, last, the number of images.
    """

    def __init__(self, settings: Settings, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
        self.settings = settings
        self.tensors = dict(tensors)

    @classmethod
    def of_nothing(cls, fingerprint: Fingerprint) -> Statistics:
        """Return statistics of no images, for methods that need only the weights."""
        return cls(Settings(fingerprint, 8, "scores", 1.0, "", {}), {})

    @property
    def images(self) -> int:
        """Number of images seen."""
        return sum(self.images_by_fold)

    @property
    def images_by_fold(self) -> tuple[int, int]:
        """Number of images seen in each fold."""
        counts = [name.split("/")[1] for name in self.tensors if name.startswith("even/") and name.endswith("/images")]
        if not counts:
            return 0, 0
        first = IMAGES if IMAGES in counts else counts[0]
        even, odd = (int(self.tensors[f"{fold}/{first}/images"][0]) for fold in FOLDS)
        return even, odd

    @property
    def groups(self) -> list[str]:
        """Names of the observations."""
        return list(dict.fromkeys(name.split("/")[1] for name in self.tensors))

    def importance(self, group: str, fold: str | None = None) -> Float:
        """Return the mean query/key importance per image, (heads, qk_dim): SNP's ω (Shim et al., ECCV 2024).

        Raises:
            InvalidArgument: unknown query/key group, or no image in the fold.
        """
        images = int(self._sum(group, "images", fold)[0])
        if images == 0:
            raise InvalidArgument(f"fold: expected one with images, got {fold!r} with none")
        return self._sum(group, "score_sum", fold) / images

    def gram(
        self, group: str, which: Literal["query_gram", "key_gram", "score_gram"], fold: str | None = None
    ) -> Float:
        """Return sums over images of QᵀQ, K_cᵀK_c (keys centred per image) or their elementwise product, (heads, d, d).

        Raises:
            InvalidArgument: not collected, or an unknown matrix.
        """
        if which not in ("query_gram", "key_gram", "score_gram"):
            raise InvalidArgument(f"which: expected query_gram, key_gram or score_gram, got {which!r}")
        return unpack(self._sum(group, which, fold))

    def moments(self, group: str, fold: str | None = None, out: Float | None = None) -> Moments:
        """Return moments of values ("blocks.0.v"), hidden units, a projection's or a norm's input ("blocks.0.norm1").

        For a norm's input x, the moments are those of x̂ = x √D / ‖x‖, after centring for LayerNorm. Those of other
        inputs are weighted means where tokens have weights (``calibrate(row_weights=True)``). The second moment
        is written to ``out``, contiguous float64 (d, d), if given: allocating memory for many large ones would take as
        long as using them.

        Raises:
            InvalidArgument: not collected.
        """
        rows, mean = self._rows(group, fold), self.mean(group, fold)
        second = unpack(self._sum(group, "second_moment", fold), out, self._weight(group, fold))
        return Moments(rows, mean, second)

    def mean(self, group: str, fold: str | None = None) -> Float:
        """Return only the mean of what ``moments`` returns, (d,).

        Raises:
            InvalidArgument: not collected.
        """
        found: Float = self._sum(group, "sum", fold) / self._weight(group, fold)
        return found

    def image_grams(self, group: str) -> tuple[Float, Float]:
        """Return QᵀQ and K_cᵀK_c (keys centred per image) of each of the first 64 images: two of (images, heads, d, d).

        Raises:
            InvalidArgument: not collected.
        """
        found = []
        for what in ("query_gram", "key_gram"):
            name = f"sample/{group}/{what}"
            if name not in self.tensors:
                raise InvalidArgument(f"group: expected {what} of images of {group!r}, got statistics without it")
            found.append(unpack(self.tensors[name].astype(np.float64)))
        return found[0], found[1]

    def sensitivity(self, group: str) -> float:
        """Return how much the output changes when a group's part of the model is off by a small share of its variance.

        It is the mean over images of the divergence between the undisturbed and the disturbed model's class
        probabilities (Kullback-Leibler, in nats), divided by that share. Without a classifier it is the relative
        squared change of the features.

        Raises:
            InvalidArgument: not collected (``calibrate(sensitivity=True)``).
        """
        return float(self._per_image(group, "divergence")[0])

    def removal(self, layer: str) -> tuple[float, float]:
        """Return how much the output changes when an attention or FFN layer adds nothing, or only its mean.

        ``layer`` is a name such as "blocks.0.attn". The unit is that of ``sensitivity``.

        Raises:
            InvalidArgument: not collected (``calibrate(sensitivity=True)``).
        """
        return float(self._per_image(layer, "divergence")[0]), float(self._per_image(layer, "mean_kept")[0])

    def losses(self, group: str, cut: str) -> dict[int, float]:
        """Return how much the output changes when a method cuts this group alone, for each size that was measured.

        It is the mean over images of the divergence between the class probabilities of the dense and the cut model
        (Kullback-Leibler, in nats); without a classifier it is the relative squared change of the features.

        Args:
            group: the group's name.
            cut: which cuts, such as "cut:project".

        Returns:
            By the number of units that stay, in ascending order; empty if none was measured.
        """
        start = f"sensitivity/{group}/{cut}@"
        found = {int(name.removeprefix(start)): sums for name, sums in self.tensors.items() if name.startswith(start)}
        return {size: float(found[size][0] / found[size][-1]) for size in sorted(found)}

    def gradients(self, group: str, what: Literal["taylor", "fisher", "gate"]) -> Float:
        """Return the mean over images of what gradients say about each unit, (heads, size).

        "taylor" and "fisher" are squared; see ``statistics.gradients.Gradients``.

        Raises:
            InvalidArgument: not collected (``calibrate(gradients=True)``).
        """
        if not self.settings.gradients or f"{FOLDS[0]}/{group}:gradients/{what}" not in self.tensors:
            raise InvalidArgument(f"stats: expected the gradients of {group!r}, got none: calibrate(gradients=True)")
        mean: Float = self._sum(f"{group}:gradients", what, None) / self.images
        return mean

    def head_importance(self, group: str) -> Float:
        """Return E |Att_h · ∂L/∂Att_h| for each head of a group of heads ("blocks.0.heads"), (heads,).

        Michel et al., 2019, arXiv:1905.10650. Over all images and of their loss with ``calibrate(gradients=True)``;
        else over the first 128, and L is the cross-entropy of the model's own prediction.

        Raises:
            InvalidArgument: not collected (``calibrate(head_gradients=True)`` or ``calibrate(gradients=True)``).
        """
        if self.settings.gradients:
            found: Float = self.gradients(group, "gate")[0]
            return found
        return self._per_image(group, "gradient")

    def _per_image(self, group: str, what: str) -> Float:
        name = f"sensitivity/{group}/{what}"
        if name not in self.tensors:
            which = ("gradients", "head_gradients") if what == "gradient" else ("sensitivity", "sensitivity")
            raise InvalidArgument(f"stats: expected the {which[0]} of {group!r}, got none: calibrate({which[1]}=True)")
        sums = self.tensors[name]
        mean: Float = sums[:-1] / sums[-1]
        return mean

    @property
    def merged(self) -> list[tuple[tuple[int, ...], float]]:
        """How many tokens each block merges, and how much the output changes, for the schedules that were measured.

        The unit is that of ``losses``; schedules that merge more come later.
        """
        start = "sensitivity/" + merged_name(())
        found = []
        for name, sums in self.tensors.items():
            if name.startswith(start):
                found.append((tuple(map(int, name.removeprefix(start).split("-"))), float(sums[0] / sums[1])))
        return sorted(found, key=lambda each: (sum(each[0]), each[0]))

    @property
    def cuts(self) -> list[str]:
        """The cuts whose losses were measured, such as "cut:project"."""
        measured = [name.rpartition("/")[2].partition("@") for name in self.tensors if name.startswith("sensitivity/")]
        return sorted({cut for cut, at, _ in measured if at and cut != MERGED})

    @property
    def sensitive(self) -> bool:
        """Whether the sensitivity of the groups to disturbances was measured."""
        return any(name.startswith("sensitivity/") and name.endswith("/divergence") for name in self.tensors)

    def agreement(self, other: Statistics | None = None) -> dict[str, Agreement]:
        """Compare the query/key importance with another calibration's, or one fold's with the other's.

        Raises:
            InvalidArgument: ``other`` is of another model.
        """
        if other is not None and not isinstance(other, Statistics):
            raise InvalidArgument(f"other: expected Statistics, got {type(other).__name__}")
        if other is not None:
            self.settings.fingerprint.require(other.settings.fingerprint, "other", strict=True)
        found = {}
        for group in self.groups:
            if f"even/{group}/score_sum" in self.tensors:
                if other is None:
                    pair = (self.importance(group, "even"), self.importance(group, "odd"))
                else:
                    pair = (self.importance(group), other.importance(group))
                found[group] = agreement_of(*pair)
        return found

    @cached_property
    def excess(self) -> float:
        """How much more fits err on other images than the best fits, as a share of what those leave.

        It is the median over up to four groups with second moments; 0 if there are none. Each is estimated from the two
        folds, see ``statistics.sufficiency``.
        """
        return median_excess(self.tensors, FOLDS)

    def images_needed(self) -> int:
        """Return about how many images suffice: with that many, fits err 2 % more on others than the best ones.

        If it is below ``images``, more will hardly help. It is 0 without second moments in both folds, from which
        nothing can be told, and a rough guess from a few dozen images.
        """
        return images_for(self.images, self.excess)

    @staticmethod
    def merge(parts: Sequence[Statistics]) -> Statistics:
        """Add the sums of several calibrations of one model over different images.

        Raises:
            InvalidArgument: nothing to merge, or different models, settings or observations.
        """
        if not isinstance(parts, Sequence) or not all(isinstance(part, Statistics) for part in parts):
            raise InvalidArgument(f"parts: expected a list of Statistics, got {parts!r}")
        if not parts:
            raise InvalidArgument("parts: expected at least one Statistics, got none")
        first = parts[0]
        for part in parts[1:]:
            first.settings.fingerprint.require(part.settings.fingerprint, "parts", strict=True)
            for name, mine in vars(first.settings).items():
                found = getattr(part.settings, name)
                if found != mine:
                    raise InvalidArgument(f"parts: expected {name} = {mine!r} in all, got {found!r}")
            if part.tensors.keys() != first.tensors.keys():
                raise InvalidArgument("parts: expected the same observations in all, got different ones")
        summed = {name: _merged(name, [part.tensors[name] for part in parts]) for name in first.tensors}
        return Statistics(first.settings, summed)

    def save(self, path: str | Path) -> None:
        """Write one .safetensors file with checksums.

        Raises:
            InvalidArgument: the folder does not exist.
        """
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in self.tensors.items()}
        container.write(path, "statistics", self.settings.to_dict(), tensors)

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read a file that ``save`` wrote.

        Raises:
            InvalidArgument: not a statistics file, or a damaged one.
        """
        fields, tensors = container.read(path, "statistics")
        with container.understood("path: expected a secateur statistics file"):
            counts = [name for name in tensors if name.startswith("even/") and name.endswith("/images")]
            if not counts or not all(name.count("/") == 2 for name in tensors):
                raise ValueError("expected sums by fold, group and name, got others")
            found = cls(Settings.from_dict(fields), {name: tensor.numpy() for name, tensor in tensors.items()})
            if found.images < 1:
                raise ValueError("expected at least one image, got none")
            return found

    def _rows(self, group: str, fold: str | None) -> int:
        rows = int(self._sum(group, "rows", fold)[0])
        if rows == 0:
            raise InvalidArgument(f"group: expected one that was observed, got {group!r} with no rows")
        return rows

    def _weight(self, group: str, fold: str | None) -> float:
        """Return what the rows weigh together: each is 1 unless tokens have weights."""
        rows = self._rows(group, fold)
        return float(self._sum(group, "weight", fold)[0]) if f"{FOLDS[0]}/{group}/weight" in self.tensors else rows

    def _sum(self, group: str, what: str, fold: str | None) -> Float:
        if fold is not None and fold not in FOLDS:
            raise InvalidArgument(f"fold: expected even, odd or None, got {fold!r}")
        folds = FOLDS if fold is None else (fold,)
        try:
            parts = [self.tensors[f"{name}/{group}/{what}"] for name in folds]
            total: Float = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        except KeyError as error:
            raise InvalidArgument(
                f"group: expected {what} of {group!r}, got statistics of {self.settings.collect!r} without it"
            ) from error
        return total

    def __repr__(self) -> str:
        return (
            f"Statistics({self.settings.fingerprint.architecture}, {self.images} images, "
            f"collect={self.settings.collect!r}, gamma={self.settings.gamma})"
        )


def merged_name(merged: Sequence[int]) -> str:
    """Return the name of a schedule's losses, given how many tokens each block merges."""
    return f"tokens/{MERGED}@{'-'.join(map(str, merged))}"


def _merged(name: str, arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Add up sums over images; let the collector merge arrays that are not sums."""
    for collector in collectors:
        found = collector.merge(name, arrays)
        if found is not None:
            return found
    total: npt.NDArray[Any] = np.sum(arrays, axis=0)
    return total


def unpack(packed: Float, out: Float | None = None, divisor: float = 1.0) -> Float:
    """Expand packed upper triangles (..., d(d+1)/2) to symmetric matrices (..., d, d), into ``out`` if given."""
    size = int((np.sqrt(8 * packed.shape[-1] + 1) - 1) / 2)
    full = np.empty((*packed.shape[:-1], size, size)) if out is None else out
    core.unpack(np.ascontiguousarray(packed), full, divisor)
    return full
