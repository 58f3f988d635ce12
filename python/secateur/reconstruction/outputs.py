"""Trains a whole model until its output and its residual stream are close to the dense one's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy
from ..errors import InvalidArgument
from ..families.base import Family, classifies
from ..runtime.progress import progress
from ..runtime.ranks import Ranks
from ..statistics.measurements.base import divergence
from ..statistics.outputs import as_tensor
from ..statistics.passes import batches_of
from ..statistics.rows import RowWeights
from .best import Course, train
from .images import HeldBack, batched, shuffled

__all__ = ["Outputs"]

# Images among which the next is drawn.
_SHUFFLED = 256
# Errors below this share of a stream, or this many nats, are rounding.
_LEAST = 1e-9
_OUTPUT = "output"


class Outputs:
    """Compares a model with the dense one on a loader's images, and trains it.

    The loss of a classifier is the divergence KL(dense || pruned) of its probabilities; without classes it is the
    squared error of features. Training adds the squared error of the residual stream before each layer, of prefix
    tokens alone where tokens are merged. Each part is divided by what it is at the start.

    Args:
        dense: the dense model.
        model: the model.
        family: their family.
        anatomy: description of the dense model.
        loader: batches of images, read anew in each pass.
        max_images: the largest number of images.
        held: which images are held back.
        batch_size: images in a step.
        seed: the seed of the order.
    """

    def __init__(
        self,
        dense: nn.Module,
        model: nn.Module,
        family: Family,
        anatomy: Anatomy,
        loader: Iterable[Any],
        max_images: int | None,
        held: HeldBack,
        *,
        batch_size: int,
        seed: int,
    ) -> None:
        self._dense, self._model, self._loader, self._limit = dense, model, loader, max_images
        self._held, self._batch_size = held, batch_size
        self._order = torch.Generator().manual_seed(seed)
        self._prefix = family.prefix_tokens(dense)
        self._norms = _norms_between(anatomy, family.inspect(model))
        self._wanted: Tensor | None = None
        self._sums: list[float] = []
        self.images = 0

    def loss(self) -> float:
        """Return the loss on the images held back: nats, or the share of the features' variance.

        The first time, all images are counted, and the dense model's outputs are kept.

        Raises:
            InvalidArgument: too few images, or other outputs than the dense model's.
        """
        found, wanted, sums = [], [], []
        with torch.inference_mode():
            for images in self._images(True):
                sums.append(float(images.double().sum()))
                found.append(as_tensor(self._model(images)))
                if self._wanted is None:
                    wanted.append(as_tensor(self._dense(images)))
            if self._wanted is None:
                if not wanted:
                    raise InvalidArgument(
                        f"loader: expected at least {self._held.every} images, of which one is held back, "
                        f"got {self.images}"
                    )
                if found[0].shape != wanted[0].shape:
                    raise InvalidArgument(
                        f"dense: expected outputs of shape {tuple(found[0].shape)} as the model's, "
                        f"got {tuple(wanted[0].shape)}"
                    )
                self._wanted, self._sums = torch.cat(wanted), sums
            if sums != self._sums:
                raise InvalidArgument(
                    "loader: expected the same images in the same order in each pass, neither shuffled nor augmented, "
                    "got others"
                )
            # All at once, since the variance is that of all images.
            return float(divergence(self._model, self._wanted.double(), torch.cat(found).double()).mean())

    def train(self, epochs: int, lr: float, rows: RowWeights, before: float) -> Course | None:
        """Train all parameters that require a gradient for up to ``epochs`` passes; ``before`` is the loss now."""
        parameters = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        if not parameters or epochs == 0:
            return None
        steps = -(-(self.images - self._held.count(self.images)) // self._batch_size)
        scales: dict[str, float] = {}

        def loss(batch: Tensor) -> Tensor:
            with _streams(self._dense, self._norms) as wanted, torch.no_grad():
                target = as_tensor(self._dense(batch))
            with _streams(self._model, self._norms) as found:
                output = as_tensor(self._model(batch))
            parts = {name: self._of_streams(wanted[name], found[name], self._norms[name], rows) for name in found}
            if not scales:
                scales[_OUTPUT] = max(float(self._of_outputs(target, output).detach()), _LEAST)
                # Before the first layer that differs there is nothing to make up for.
                scales.update({name: value for name, part in parts.items() if (value := float(part.detach())) > _LEAST})
            streams = [part / scales[name] for name, part in parts.items() if name in scales]
            mean = sum(streams) / max(1, len(streams))
            return self._of_outputs(target, output) / scales[_OUTPUT] + mean

        with progress(epochs * steps, "reconstruct", unit="steps") as advance:

            def batches() -> Iterator[Callable[[], Tensor]]:
                each = (image for batch in self._images(False) for image in batch)
                for batch in batched(shuffled(each, _SHUFFLED, self._order), self._batch_size):
                    yield partial(loss, torch.stack(batch))
                    advance(1)

            return train(parameters, epochs, lr, steps, batches, self.loss, before)

    def _images(self, held: bool) -> Iterator[Tensor]:
        """Yield the images of each batch that are held back, or the others; never none."""
        for start, images, seen in batches_of(self._dense, self._loader, self._limit, 0, Ranks()):
            self.images = seen
            chosen = [place for place in range(len(images)) if self._held.holds(start + place) is held]
            if chosen:
                yield images[chosen]

    def _of_outputs(self, wanted: Tensor, found: Tensor) -> Tensor:
        if classifies(self._model):
            return divergence(self._model, wanted, found).mean()
        return (found - wanted).square().mean()

    def _of_streams(self, wanted: Tensor, found: Tensor, layer: str, rows: RowWeights) -> Tensor:
        """Return the squared error as a share of the stream, tokens weighted; zero where all tokens may be merged."""
        count = found.shape[1] if found.shape == wanted.shape else self._prefix
        if count == 0:
            return found.new_zeros(())
        found, wanted, weights = found[:, :count], wanted[:, :count], rows.of(layer, wanted)[:, :count].to(found.dtype)
        share: Tensor = (weights * (found - wanted).square().sum(-1)).sum() / (weights * wanted.square().sum(-1)).sum()
        return share


def _norms_between(dense: Anatomy, model: Anatomy) -> Mapping[str, str]:
    """Return the norms that see the residual stream in both models, with the layer before each."""
    names = list(dense.layers)
    found = {}
    for before, name in pairwise(names):
        layer, mine = dense.layers[name], model.layers.get(name)
        if mine is not None and layer.input_norm is not None and not layer.post_norm:
            found[layer.input_norm] = before
    # A stream of another width has another basis.
    return found if dense.stream_widths == model.stream_widths else {}


@contextmanager
def _streams(model: nn.Module, norms: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Yield what enters norms in the passes of a block, by the norm's name."""
    found: dict[str, Tensor] = {}

    def noted(name: str) -> Callable[[nn.Module, Sequence[Tensor]], None]:
        return lambda _module, args: found.__setitem__(name, args[0])

    with ExitStack() as stack:
        for name in norms:
            stack.callback(model.get_submodule(name).register_forward_pre_hook(noted(name)).remove)
        yield found
