"""Measures what cuts of a method really cost: each group alone is cut to a few sizes, and the outputs are compared."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from ..anatomy import Group, Kind
from ..errors import Unsupported
from ..families.base import Family
from ..methods.base import Bound, Method, Prepared
from ..statistics.measurements import Work
from ..statistics.measurements.base import divergence, hooked
from ..statistics.outputs import double
from ..statistics.settings import Float
from ..surgery.trial import cut_copy
from .sample import Sampler, summed

__all__ = [
    "Cuts",
    "Passed",
    "measured_name",
    "measured_sizes",
    "pruned_copy",
]

# Fractions of the units that stay. The loss of hidden units bends more, and they hold most of the cost.
_FRACTIONS: Mapping[Kind, tuple[float, ...]] = {"ffn": (1 / 8, 1 / 3, 7 / 12, 19 / 24), "width": (1 / 2, 3 / 4, 7 / 8)}
_USUAL = (1 / 4, 1 / 2, 3 / 4)


class Cuts:
    """Cuts each group alone to a few sizes, by the method's own closed form, and compares the outputs.

    The loss of a cut is the divergence of the class probabilities (Kullback-Leibler, in nats), or the relative squared
    change of the features of a model without a classifier. Blocks before the cut are not run again. The sums are called
    "group/cut:method@size".

    Args:
        method: the method that cuts.
        options: its options, a frozen dataclass.
        groups: names of the groups to cut; by default all.
        sampler: chooses the images; by default one of its own.
    """

    def __init__(
        self, method: Method, options: Any, groups: Collection[str] | None = None, sampler: Sampler | None = None
    ) -> None:
        self._method, self._options, self._groups = method, options, groups
        self._sampler = sampler or Sampler()
        self.name = measured_name(method, options)

    def take(self, work: Work) -> Iterator[Mapping[str, Float]]:
        """Measure, one block in each round; a rank cuts its share."""
        anatomy = work.anatomy
        trials = [
            (group, size, name)
            for group in anatomy.groups
            if not group.of_tokens and (self._groups is None or group.name in self._groups)
            for size in measured_sizes(group)
            if (name := f"{group.name}/{self.name}@{size}") not in work.done
        ]
        if not trials:
            return
        prepared = self._method.prepare(Bound(work.model, anatomy, work.statistics, self._options))
        trials = [trial for trial in trials if trial[0].kind in prepared.kinds]
        chosen = self._sampler.of(work)
        dense = [Passed.through(work.model, work.family, each.images) for each in chosen]
        for block in sorted({group.block for group, _, _ in trials}, key=lambda block: (block is None, block or 0)):
            found: dict[str, Float] = {}
            for group, size, name in [trial for trial in trials if trial[0].block == block][work.rank :: work.ranks]:
                # A residual stream that cannot be rotated is refused.
                with suppress(Unsupported):
                    cut = pruned_copy(work, prepared, {group.name: size})
                    losses = (each.loss(cut, work.family, group, each.output) for each in dense)
                    found[name] = summed(chosen, losses)
            yield found


@dataclass(frozen=True, eq=False)
class Passed:
    """Images (B, C, H, W), the float64 output of a model for them, and the input of each of its blocks."""

    images: Tensor
    output: Tensor
    inputs: list[Tensor]

    @classmethod
    def through(cls, model: nn.Module, family: Family, images: Tensor) -> Passed:
        """Run a model."""
        inputs: list[Tensor] = []

        def note(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs.append(args[0])

        with hooked([block.register_forward_pre_hook(note) for block in family.blocks(model)]):
            return cls(images, double(model(images)), inputs)

    def loss(self, model: nn.Module, family: Family, group: Group, wanted: Tensor) -> Tensor:
        """Return each image's loss, against the outputs ``wanted``, for a model that differs in one group only."""
        block = group.block
        if group.traits.whole and block is not None:
            # The mean of a removed layer is added before it, which may be in the block before.
            block = block - 1 if block > 0 else None
        if block is None or not self.inputs:
            return divergence(model, wanted, double(model(self.images)))
        return divergence(model, wanted, double(family.from_block(model, block, self.inputs[block])))


def measured_name(method: Method, options: Any) -> str:
    """Return the name under which a method's measured losses are kept; options other than its defaults are in it."""
    defaults = asdict(method.Options())
    changed = [f"{name}={value}" for name, value in sorted(asdict(options).items()) if value != defaults[name]]
    return f"cut:{method.name}" + (f"({','.join(changed)})" if changed else "")


def measured_sizes(group: Group) -> list[int]:
    """Return the sizes at which a group's loss is measured, in ascending order; a layer is measured when removed."""
    if group.traits.whole:
        return [0]
    fractions = _FRACTIONS.get(group.kind, _USUAL)
    sizes = {round(fraction * group.size / group.multiple) * group.multiple for fraction in fractions}
    return sorted(size for size in sizes if max(1, group.least) <= size < group.size)


def pruned_copy(work: Work, prepared: Prepared, sizes: Mapping[str, int]) -> nn.Module:
    """Return a copy of the model with some groups cut to these sizes, to run once; it shares what is not cut."""
    decision = prepared.decide({**work.anatomy.sizes, **sizes})
    return cut_copy(
        work.model,
        work.family,
        work.anatomy,
        decision.keep,
        decision.weights,
        eps=decision.eps,
        uncentred=decision.uncentred,
    )
