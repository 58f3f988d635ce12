"""How a model uses its FFN layers, seen in a run without values, and the MACs of all else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from ...anatomy import Group
from ...anatomy.costs import FixedProduct, Product, WeightProduct
from .run import Following, follow, pointwise, tensors_in

__all__ = ["Flow", "Used", "flow"]

# A prime, so that an axis of another meaning is hardly ever a multiple of it.
_IMAGES = 11


class Used(NamedTuple):
    """The hidden units of an FFN layer, and the names within it of what reads them and of its activations."""

    group: Group
    writer: str
    acts: tuple[str, ...]


class Flow(Following):
    """Finds what depends on images, who uses the weights of FFN layers, and counts MACs by module.

    ``reasons`` maps layers that cannot be cut to the reason, ``folded`` the others to the number of parts that each
    image has along the first axis of their input, one after the other.
    """

    def __init__(self, model: nn.Module, images: Tensor, layers: Mapping[str, Used]) -> None:
        super().__init__()
        self.folded: dict[str, int] = {}
        self.reasons: dict[str, str] = {}
        self._layers = layers
        owners = {member.tensor: layer for layer, used in layers.items() for member in used.group.members}
        tensors = (*model.named_parameters(), *model.named_buffers())
        self._owners = {id(tensor): (owners[name], name) for name, tensor in tensors if name in owners}
        self._own = {id(tensor) for _, tensor in tensors}
        self._writers = {f"{layer}.{used.writer}": layer for layer, used in layers.items()}
        # Storages, which views share and which stay alive as long as one of their tensors does.
        self._seen = {_storage(images)}
        self._alive: list[Any] = [images]
        self._macs: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        taken, made, here = tensors_in((args, kwargs)), tensors_in(out), self.where[-1]
        self._alive.append((taken, made))
        of_images = any(_storage(tensor) in self._seen for tensor in taken)
        if of_images:
            self._seen.update(map(_storage, made))
        for tensor in taken:
            layer, name = self._owners.get(id(tensor), ("", ""))
            if layer and name.rpartition(".")[0] != here:
                self._refuse(layer, f"{here or 'model'}: it uses {name} itself")
        within = next((each for each in self.where if each in self._layers), None)
        if within is not None and here.startswith(tuple(f"{within}.{act}" for act in self._layers[within].acts)):
            alone = pointwise(func) and all(t.numel() == 1 for t in taken if id(t) in self._own)
            if not alone:
                self._refuse(within, f"{here}: {func.overloadpacket.__name__} does not act on each unit alone")
        if func.overloadpacket in flop_registry:
            macs = flop_registry[func.overloadpacket](*args, **kwargs, out_val=out) // 2
            # Some position embeddings are computed again for each image.
            each = of_images or made[0].shape[:1] == (_IMAGES,)
            self._macs[here] = self._macs.get(here, 0) + (macs // _IMAGES if each else macs)
        return out

    def left(self, name: str, args: tuple[Any, ...], out: Any) -> None:
        """Note how an FFN layer's hidden units are laid out when they enter the layer that uses them."""
        del out
        layer = self._writers.get(name)
        if layer is None:
            return
        (hidden,) = args
        if _storage(hidden) not in self._seen:
            self._refuse(layer, f"{layer}: what enters it does not depend on the images")
        elif len(hidden) % _IMAGES:
            self._refuse(layer, f"{layer}: its input of {tuple(hidden.shape)} does not begin with the images")
        elif layer in self.folded:
            self._refuse(layer, f"{layer}: it runs several times")
        else:
            self.folded[layer] = len(hidden) // _IMAGES

    def products(self, cut: Mapping[str, int]) -> Iterator[Product]:
        """Yield what is multiplied; for the modules ``cut``, mapped to the numbers of their weights, with these."""
        for name, macs in self._macs.items():
            yield WeightProduct(name, macs // cut[name]) if name in cut else FixedProduct(name, macs)

    def finish(self) -> None:
        """Refuse layers that never ran."""
        for layer in self._layers:
            if layer not in self.folded:
                self._refuse(layer, f"{layer}: the model does not run it")

    def _refuse(self, layer: str, reason: str) -> None:
        self.reasons.setdefault(layer, reason)


def flow(model: nn.Module, input_size: tuple[int, int, int], layers: Mapping[str, Used]) -> Flow:
    """Run a model without values and see how it uses these FFN layers, by the names of their modules.

    Raises:
        Unsupported: the model cannot run without values.
    """
    found, _ = follow(model, (_IMAGES, *input_size), partial(Flow, layers=layers))
    found.finish()
    return found


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
