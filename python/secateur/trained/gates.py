"""Gates on units, learnt with the model under an l1 term: Vision Transformer Pruning."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from .. import check, core
from ..anatomy import Anatomy, Group, Kind, Layer, Member, Part, Tap
from ..errors import InvalidArgument, Unsupported
from ..methods.base import Decision
from ..methods.weights import Weights
from ..statistics.settings import Float
from ..training.hooks import Batch, State
from .base import TrainedMethod
from .registry import register

__all__ = ["Gates"]

_SCORES: tuple[Part, ...] = ("query", "key")


@dataclass(frozen=True)
class GatesOptions:
    """What the gates take."""

    l1: float = field(default=1e-4, metadata={"help": "Weight in the loss of the sum of the gates' absolute values."})

    def __post_init__(self) -> None:
        object.__setattr__(self, "l1", check.number("l1", self.l1))


@dataclass(frozen=True, eq=False)
class _Gated:
    """The gates of one group: where they multiply, and the weights that they are folded into.

    ``taps`` come with the gate (an index) of each of their last axes' entries.
    """

    group: Group
    count: int
    taps: tuple[tuple[Tap, Tensor], ...]
    folded: tuple[Member, ...]


@register
class Gates(TrainedMethod):
    """One factor on each query/key neuron, value neuron and FFN hidden unit, 1 at first, trained with the model.

    Units are ranked by |gate|. The loss has ``l1`` times the sum of all |gate| added, 1e-4 in the paper (Zhu, Tang and
    Han, 2021, Vision Transformer Pruning, arXiv:2104.08500), whose gates stand on the inputs of the linear layers;
    here they are on the units that are removed. A query/key gate multiplies the neuron's query and its key, as the
    scores see them: after their norm, where there is one. If one scale of that norm serves all heads, one gate does.
    Value gates multiply what the projection takes, FFN gates what the second linear layer takes.

    With ``allocation="error"`` a target is shared out by rank: the gates of all layers are sorted within their kind,
    and what is lost with a unit is the share of its kind's units whose gates are no larger.

    The plan's weights are those of the trained model with the gates folded in: into the scale and shift of the norms of
    queries and keys, else their rows, and into the columns of the linear layer that takes values or hidden units. A
    pruned model thus computes what the trained one does with the removed units' gates at zero; where a norm goes over
    cut units, it goes over those that stay.

    Raises:
        Unsupported: queries or keys have a norm without a scale; before anything is trained.
    """

    name = "gates"
    paper = "Zhu, Tang and Han, 2021, Vision Transformer Pruning, arXiv:2104.08500"
    Options = GatesOptions
    kinds = ("qk", "v", "ffn")

    @contextmanager
    def attach(self, model: nn.Module, anatomy: Anatomy, groups: list[Group]) -> Iterator[list[nn.Parameter]]:
        """Multiply the units of these groups by gates, which it yields; nothing stays on the model afterwards."""
        layers = {name: layer for layer in anatomy.layers.values() for name in layer.groups.values()}
        self._sites = [_SITES[group.kind](anatomy, group, layers[group.name]) for group in groups]
        like = next(model.parameters())
        dtype = torch.promote_types(like.dtype, torch.float32)
        # Flat: some optimizers would orthogonalise a matrix.
        self._gates = {
            site.group.name: nn.Parameter(torch.ones(site.count, dtype=dtype, device=like.device))
            for site in self._sites
        }
        with ExitStack() as stack:
            for handle in self._multiplied(model, like.device):
                stack.callback(handle.remove)
            yield list(self._gates.values())

    def _multiplied(self, model: nn.Module, device: torch.device) -> Iterator[torch.utils.hooks.RemovableHandle]:
        """Put one hook on each end of a module, which multiplies all that is seen there."""
        ends: dict[tuple[str, str], list[tuple[Tap, nn.Parameter, Tensor]]] = {}
        for site in self._sites:
            for tap, index in site.taps:
                gate = self._gates[site.group.name]
                ends.setdefault((tap.module, tap.at), []).append((tap, gate, index.to(device)))
        for (name, at), found in ends.items():
            module, multiply = model.get_submodule(name), _multiply(found)
            if at == "input":
                yield module.register_forward_pre_hook(lambda _m, args, f=multiply: (f(args[0]), *args[1:]))
            else:
                yield module.register_forward_hook(lambda _m, _args, output, f=multiply: f(output))

    def loss(self, batch: Batch, base: Tensor) -> Tensor:
        """Add the l1 term."""
        del batch
        every = torch.cat(list(self._gates.values()))
        return base + float(self.options.l1) * every.abs().sum()

    def state(self) -> State:
        """The gates by group."""
        return dict(self._gates)

    def load_state(self, state: State) -> None:
        """Take up gates.

        Raises:
            InvalidArgument: they are of other groups.
        """
        found = {name: tuple(gate.shape) for name, gate in state.items()}
        mine = {name: tuple(gate.shape) for name, gate in self._gates.items()}
        if found != mine:
            raise InvalidArgument(f"resume: expected gates of {mine}, got those of {found}")
        with torch.no_grad():
            for name, gate in self._gates.items():
                gate.copy_(state[name])

    def losses(self, group: Group) -> Float:
        """The sum of the removed units' ranks within their kind, each a share of the kind's units."""
        kind = [self._magnitudes(site.group).flatten() for site in self._sites if site.group.kind == group.kind]
        every = np.sort(np.concatenate(kind))
        ranks = np.sort(np.searchsorted(every, self._magnitudes(group), side="right") / len(every), axis=1)
        lost = np.concatenate([[0.0], np.cumsum(ranks.sum(axis=0))])
        return lost[::-1].copy()

    def decide(self, model: nn.Module, anatomy: Anatomy, sizes: Mapping[str, int]) -> Decision:
        """Keep the units of the largest gates in each group, and fold all gates into the weights."""
        for group in anatomy.groups:
            if sizes[group.name] < group.size and group.name not in self._gates:
                raise InvalidArgument(f"groups: expected groups that were trained with gates, got {group.name!r}")
        weights = Weights(model, anatomy)
        for site in self._sites:
            group = site.group
            if sizes[group.name] < group.size:
                weights.keep[group.name] = core.select(self._magnitudes(group), sizes[group.name])
            gate = self._gates[group.name].detach().to("cpu", torch.float64)
            for member in site.folded:
                value = weights.weight(member.module, member.parameter)
                shape = [1] * value.ndim
                shape[member.axis] = -1
                factor = torch.ones(value.shape[member.axis], dtype=torch.float64)
                entries = torch.from_numpy(member.entries)
                factor[entries] = gate.view(-1, group.size, 1).expand(entries.shape)
                weights.set(member.module, value * factor.view(shape), member.parameter)
        return Decision(dict(weights.keep), weights.finish())

    def _magnitudes(self, group: Group) -> Float:
        """|gate| of each unit, (heads, size)."""
        gate = self._gates[group.name].detach().to("cpu", torch.float64).abs()
        return gate.view(-1, group.size).expand(group.heads, -1).contiguous().numpy()


def _of_scores(anatomy: Anatomy, group: Group, layer: Layer) -> _Gated:
    """Gates on queries and keys as the scores see them."""
    del anatomy
    folded: list[Member] = []
    taps: list[tuple[Tap, Tensor]] = []
    heads = group.heads
    for part in _SCORES:
        norm = layer.norms.get(part)
        members = [each for each in group.members if each.part == part and (each.role == "norm") == (norm is not None)]
        if not any(each.parameter == "weight" for each in members):
            raise Unsupported(f"{norm}: expected a norm with a scale, which gates are folded into, got none")
        heads = 1 if any(each.shared for each in members) else heads
        folded += members
    for part in _SCORES:
        entries = next(each.entries for each in folded if each.part == part)
        # Of a head's channels in the order of its entries: which unit is each?
        channels = np.argsort(entries.reshape(group.heads, -1), axis=1, kind="stable") // entries.shape[2]
        index = torch.from_numpy(channels) + group.size * torch.arange(group.heads if heads > 1 else 1)[:, None]
        taps.append((layer.taps[part], index))
    return _Gated(group, heads * group.size, tuple(taps), tuple(folded))


def _of_columns(anatomy: Anatomy, group: Group, layer: Layer) -> _Gated:
    """Gates on what the layer's last linear layer takes."""
    columns = f"{layer.writer}.weight"
    (member,) = [each for each in group.members if each.tensor == columns and each.role == "reader"]
    index = torch.empty(anatomy.shapes[columns][member.axis], dtype=torch.long)
    units = torch.arange(group.heads * group.size).view(group.heads, group.size, 1)
    index[torch.from_numpy(member.entries)] = units.expand(member.entries.shape)
    return _Gated(group, units.numel(), ((layer.before_writer, index),), (member,))


# Where the gates of a kind act.
_SITES: Mapping[Kind, Callable[[Anatomy, Group, Layer], _Gated]] = {
    "qk": _of_scores,
    "v": _of_columns,
    "ffn": _of_columns,
}


def _multiply(found: list[tuple[Tap, nn.Parameter, Tensor]]) -> Callable[[Tensor], Tensor]:
    def multiplied(x: Tensor) -> Tensor:
        x = x.clone()
        for tap, gate, index in found:
            tap.read(x).mul_(gate[index])
        return x

    return multiplied
