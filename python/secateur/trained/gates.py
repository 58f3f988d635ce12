"""Gates on units, learnt with the model under an l1 term: Vision Transformer Pruning."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

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
class _Place:
    """Where gates multiply: what a module takes or outputs.

    ``index`` says which gate each entry of its last axis has, and holds the number of gates where it has none; with
    ``tap``, of the last two axes (heads, head_dim) of what is seen there.
    """

    module: str
    at: str
    index: Tensor
    tap: Tap | None = None


@dataclass(frozen=True, eq=False)
class _Gated:
    """The gates of one group: where they multiply, and the weights that they are folded into."""

    group: Group
    count: int
    places: tuple[_Place, ...]
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
        self._run: set[tuple[str, str]] = set()
        with ExitStack() as stack:
            for handle in self._multiplied(model, like.device):
                stack.callback(handle.remove)
            yield list(self._gates.values())

    def _multiplied(self, model: nn.Module, device: torch.device) -> Iterator[torch.utils.hooks.RemovableHandle]:
        """Put one hook on each end of a module, which multiplies all that is seen there."""
        self._ends: dict[tuple[str, str], list[tuple[_Place, nn.Parameter]]] = {}
        for site in self._sites:
            for place in site.places:
                moved = replace(place, index=place.index.to(device))
                self._ends.setdefault((place.module, place.at), []).append((moved, self._gates[site.group.name]))
        for (name, at), found in self._ends.items():
            module, multiply = model.get_submodule(name), self._multiply((name, at), found)
            if at == "input":
                yield module.register_forward_pre_hook(lambda _m, args, f=multiply: (f(args[0]), *args[1:]))
            else:
                yield module.register_forward_hook(lambda _m, _args, output, f=multiply: f(output))

    def _multiply(self, end: tuple[str, str], found: list[tuple[_Place, nn.Parameter]]) -> Callable[[Tensor], Tensor]:
        def multiplied(x: Tensor) -> Tensor:
            self._run.add(end)
            for place, gate in found:
                factors = torch.cat([gate, gate.new_ones(1)])[place.index].to(x.dtype)
                x = x * factors if place.tap is None else _through(place.tap, x, factors)
            return x

        return multiplied

    def loss(self, batch: Batch, base: Tensor) -> Tensor:
        """Add the l1 term.

        Raises:
            Unsupported: the model did not run a module whose units have gates, which then would learn nothing.
        """
        del batch
        idle = sorted(self._ends.keys() - self._run)
        if idle:
            raise Unsupported(f"{idle[0][0]}: expected a module that every forward pass runs, got one that it did not")
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
    folded: dict[Part, list[Member]] = {}
    for part in _SCORES:
        norm = layer.norms.get(part)
        members = [each for each in group.members if each.part == part and (each.role == "norm") == (norm is not None)]
        if not any(each.parameter == "weight" for each in members):
            raise Unsupported(f"{norm}: expected a norm with a scale, which gates are folded into, got none")
        folded[part] = members
    shared = any(member.shared for members in folded.values() for member in members)
    count = group.size if shared else group.heads * group.size
    places = []
    for part, members in folded.items():
        tap, member = layer.taps[part], next(each for each in members if each.parameter == "weight")
        if tap.module == member.module and (member.role != "norm" or member.shared or group.heads == 1):
            places.append(_Place(tap.module, tap.at, _gate_numbers(anatomy, group, member, count)))
            continue
        # Of a head's channels in the order of its entries: which unit is each?
        channels = np.argsort(member.entries.reshape(group.heads, -1), axis=1, kind="stable") // member.copies
        heads = 0 if shared else torch.arange(group.heads)[:, None]
        places.append(_Place(tap.module, tap.at, torch.from_numpy(channels) + group.size * heads, tap))
    return _Gated(group, count, tuple(places), tuple(each for members in folded.values() for each in members))


def _of_columns(anatomy: Anatomy, group: Group, layer: Layer) -> _Gated:
    """Gates on what the layer's last linear layer takes."""
    columns = f"{layer.writer}.weight"
    (member,) = [each for each in group.members if each.tensor == columns and each.role == "reader"]
    count = group.heads * group.size
    place = _Place(layer.writer, "input", _gate_numbers(anatomy, group, member, count))
    return _Gated(group, count, (place,), (member,))


def _gate_numbers(anatomy: Anatomy, group: Group, member: Member, count: int) -> Tensor:
    """The gate of each entry along a member's axis; ``count`` where it has none."""
    index = torch.full((anatomy.shapes[member.tensor][member.axis],), count)
    numbers = torch.arange(count).view(-1, group.size, 1)
    index[torch.from_numpy(member.entries)] = numbers.expand(member.entries.shape)
    return index


def _through(tap: Tap, x: Tensor, factors: Tensor) -> Tensor:
    """Multiply what a tap sees of x, in a copy."""
    x = x.clone()
    seen = tap.read(x)
    if seen.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():
        raise Unsupported(f"{tap.module}: expected queries and keys that can be seen in place for gates, got a copy")
    seen.mul_(factors)
    return x


# Where the gates of a kind act.
_SITES: Mapping[Kind, Callable[[Anatomy, Group, Layer], _Gated]] = {
    "qk": _of_scores,
    "v": _of_columns,
    "ffn": _of_columns,
}
