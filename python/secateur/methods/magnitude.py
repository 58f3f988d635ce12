"""Selection by the magnitude of weights, and at random: baselines for every other criterion."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch

from ..anatomy import Group, Kind
from ..statistics.settings import Float
from .base import Bound, Handler, Method
from .handlers.ranking import Ranking, Removal
from .registry import register
from .similarity import rows_of

__all__ = ["Magnitude", "Random"]


@register
class Magnitude(Method):
    """Keeps the units with the largest ℓ2 norm over all weights that compute the unit.

    The norm is over the query row and the key row of a query/key neuron, both rows of a gated FFN unit, or all weights
    of a filter; for a head, over its query, key and value rows. For the residual width it is averaged over the layers
    that write to it, after each layer's norms are scaled to sum to one. Whole layers are ranked by calibration
    measurements.
    """

    name = "magnitude"
    paper = "Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, arXiv:1608.08710, with the ℓ2 norm"
    source = "in its style"

    def handlers(self, bound: Bound) -> Mapping[Kind, Handler]:
        """Return rankings by norm."""

        def squares(group: Group) -> Float:
            """Return the sum of squares of each unit's weights, (heads, size)."""
            rows = torch.cat([rows_of(bound.model, group, member) for member in group.of("writer")], dim=1)
            return rows.square().sum(1).reshape(group.heads, group.size).numpy()

        def heads(group: Group) -> Float:
            layer = bound.anatomy.layers[bound.anatomy.layer_of[group.name]]
            inside = [bound.anatomy.group(name) for name in layer.groups.values() if name != group.name]
            total: Float = np.sum([squares(each).sum(1) for each in inside], axis=0)
            return np.sqrt(total)[None]

        def channels(group: Group) -> Float:
            shares = []
            for member in group.of("writer"):
                norms = rows_of(bound.model, group, member).square().sum(1).sqrt()
                shares.append((norms / norms.sum().clamp_min(torch.finfo(norms.dtype).tiny)).numpy())
            found: Float = np.mean(shares, axis=0)
            return found[None]

        units = Ranking(bound, lambda group: np.sqrt(squares(group)))
        return {
            "qk": units,
            "v": units,
            "ffn": units,
            "conv": units,
            "heads": Ranking(bound, heads),
            "width": Ranking(bound, channels),
            "layer": Removal(),
        }


@dataclass(frozen=True)
class Options:
    """Options of the method "random"."""

    seed: int = field(default=0, metadata={"help": "seed of the random numbers; each group has a generator of its own"})


@register
class Random(Method):
    """Keeps units drawn at random, as a baseline. The same seed keeps the same units."""

    name = "random"
    paper = "a baseline"
    source = "ours"
    Options: ClassVar[type] = Options

    def handlers(self, bound: Bound) -> Mapping[Kind, Handler]:
        """Return rankings by random numbers."""
        options: Options = bound.options

        def draw(group: Group) -> Float:
            # Seeded by the group's name, so that the other groups of a model do not change the draw.
            generator = np.random.default_rng([options.seed, zlib.crc32(group.name.encode())])
            return generator.random((group.heads, group.size))

        units = Ranking(bound, draw)
        kinds: tuple[Kind, ...] = ("qk", "v", "ffn", "conv", "heads", "width")
        return {**dict.fromkeys(kinds, units), "layer": Removal()}
