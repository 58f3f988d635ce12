"""Sums over images of what a first-order expansion of the loss says about every unit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .. import core
from ..anatomy import Anatomy, Group, Member, Tap
from ..errors import NumericalError, Unsupported
from .collectors import Position
from .measurements.base import hooked
from .objective import Objective, Share
from .outputs import differentiable
from .settings import FOLDS

__all__ = ["Gradients"]

# Small, because gradients need several times the memory of a forward pass.
_CHUNK = 16
# Sums over images of one batch, (images, channels), by module.
Products = dict[str, Tensor]


def observed(group: str) -> str:
    """Return under which name a group's sums are stored, apart from what collectors store of it."""
    return f"{group}:gradients"


class Gradients:
    """Per image, x · ∂L/∂x of every channel, summed over positions, and its squares summed over images.

    For a unit whose output is multiplied by 1, this is the derivative of the loss by that factor: the first-order
    estimate of what the loss gains when the unit leaves. The sums of each group are

    * "taylor", (heads, size): Σ_n Σ_rows (Σ_s w_s ∂L_n/∂w_s)², over the rows that compute the unit, each with its bias;
    * "fisher", (heads, size): Σ_n (Σ_l x_l · ∂L_n/∂x_l)², over the layers l that read the unit. Queries and keys are
      read by their product. A unit of kind "heads" is all values of a head;
    * "gate", (1, heads), for heads: Σ_n |x · ∂L_n/∂x|, as in Michel et al., 2019.
    """

    taps: tuple[Tap, ...] = ()

    def __init__(self, anatomy: Anatomy, objective: Objective) -> None:
        self._objective = objective
        self._groups = [_Sums(anatomy, group) for group in anatomy.groups if not group.traits.whole]
        self._groups = [each for each in self._groups if each.names]
        self._outputs = sorted({name for each in self._groups for name in each.outputs})
        self._inputs = sorted({name for each in self._groups for name in each.inputs})
        self._taps = [each.tap for each in self._groups if each.tap is not None]
        self._sums = {
            f"{fold}/{observed(each.group.name)}/{name}": np.zeros((each.group.heads, each.group.size))
            for fold in FOLDS
            for each in self._groups
            for name in each.names
        }

    def check(self, model: nn.Module, images: Tensor, share: Share) -> None:
        """Take the gradients of one image and forget them.

        Raises:
            InvalidArgument: the loss cannot be used.
        """
        self._scores(model, images[:1], share.part(0, 1))

    def add(self, model: nn.Module, images: Tensor, share: Share, first: int) -> None:
        """Add the images (B, C, H, W), the first of them number ``first``, with one forward and one backward pass.

        Raises:
            InvalidArgument: the loss cannot be used.
            NumericalError: a gradient that is not finite.
            Unsupported: a layer whose weights are used without calling it.
        """
        for start in range(0, len(images), _CHUNK):
            chunk = images[start : start + _CHUNK]
            found = self._scores(model, chunk, share.part(start, start + len(chunk)))
            fold = (first + start + torch.arange(len(chunk))) % 2
            for name, scores in found.items():
                for number, each in enumerate(FOLDS):
                    self._sums[f"{each}/{name}"] += scores[fold == number].sum(0).numpy()

    def update(self, position: Position, seen: object) -> None:
        """Do nothing: it observes no taps."""

    def wait(self) -> None:
        """Do nothing: no work is pending."""

    def state(self, position: Position) -> dict[str, npt.NDArray[Any]]:
        """Return the sums of both folds."""
        del position
        return {name: sums.copy() for name, sums in self._sums.items()}

    def load_state(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Continue from these sums."""
        self._sums = {name: state[name].copy() for name in self._sums}

    def _scores(self, model: nn.Module, images: Tensor, share: Share) -> dict[str, Tensor]:
        """Return the terms of all sums for each image, (B, heads, size), on the host in float64."""
        outputs, inputs, tapped = self._products(model, images, share)
        found: dict[str, Tensor] = {}
        for each in self._groups:
            scores = each.scores(outputs, inputs, tapped)
            if not all(bool(part.isfinite().all()) for part in scores.values()):
                raise NumericalError(f"{each.group.name}: expected finite gradients, got NaN or Inf")
            found |= {f"{observed(each.group.name)}/{name}": part for name, part in scores.items()}
        return found

    def _products(self, model: nn.Module, images: Tensor, share: Share) -> tuple[Products, Products, Products]:
        """Return x · ∂L/∂x of each image, summed over positions, for modules' outputs and inputs, and for the taps."""
        seen: dict[tuple[str, str], list[Tensor]] = {}
        # What changes its input in place would change what is kept.
        copies = any(getattr(module, "inplace", False) for module in model.modules())

        def leaves(name: str) -> Callable[[nn.Module, object, Tensor], Tensor]:
            def hook(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
                # If all weights are frozen, the first output does not require a gradient by itself.
                kept = output if output.requires_grad else output.requires_grad_()
                seen.setdefault(("output", name), []).append(kept)
                return kept.clone() if copies else kept

            return hook

        def enters(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
            def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                # Another name of the input, so that only what passes through this module counts.
                kept = args[0].view_as(args[0]) if args[0].requires_grad else args[0].detach().requires_grad_()
                seen.setdefault(("input", name), []).append(kept)
                return (kept, *args[1:])

            return hook

        handles: list[RemovableHandle] = []
        outputs = sorted({*self._outputs, *(tap.module for tap in self._taps if tap.at == "output")})
        inputs = sorted({*self._inputs, *(tap.module for tap in self._taps if tap.at == "input")})
        handles += [model.get_submodule(name).register_forward_hook(leaves(name)) for name in outputs]
        handles += [model.get_submodule(name).register_forward_pre_hook(enters(name)) for name in inputs]
        with torch.inference_mode(False), torch.enable_grad(), hooked(handles):
            with self._objective.autocast(images.device):
                found = differentiable(model)(images.clone())
            loss = self._objective.of(model, found, share, images.device)
            for place in (*(("output", name) for name in outputs), *(("input", name) for name in inputs)):
                if place not in seen:
                    raise Unsupported(f"{place[1]}: gradients need a module that is called in every forward pass")
            kept = [tensor for tensors in seen.values() for tensor in tensors]
            with core.subnormals_flushed(images.device):
                gradients = torch.autograd.grad(loss, kept, allow_unused=True)
        products: dict[str, Products] = {"output": {}, "input": {}}
        by_tap: dict[tuple[str, str], Tap] = {(tap.at, tap.module): tap for tap in self._taps}
        tapped: Products = {}
        pairs = zip([place for place, tensors in seen.items() for _ in tensors], kept, gradients, strict=True)
        for place, tensor, gradient in pairs:
            product = torch.zeros_like(tensor) if gradient is None else _product(tensor.detach(), gradient)
            tap = by_tap.get(place)
            if tap is not None:
                maps = tap.read(product)
                _add(tapped, tap.name, maps.reshape(len(images), -1, *maps.shape[2:]).sum(1).cpu().double())
            at, name = place
            if name in (self._outputs if at == "output" else self._inputs):
                module = model.get_submodule(name)
                _add(products[at], name, _over_positions(module, at, product, len(images)))
        return products["output"], products["input"], tapped


class _Sums:
    """Where the channels of one group's units are."""

    def __init__(self, anatomy: Anatomy, group: Group) -> None:
        self.group = group
        self.tap: Tap | None = None
        self._writers = [(each.module, _entries(each)) for each in group.of("writer")]
        self._readers = [(each.module, _entries(each)) for each in group.of("reader")]
        self._heads: str | None = None
        layer = anatomy.layers.get(anatomy.layer_of.get(group.name, ""))
        if layer is not None and layer.groups.get("qk") == group.name:
            self.tap = layer.taps["query"]
        if layer is not None and layer.groups.get("heads") == group.name:
            self._heads = layer.writer
        self.outputs = [module for module, _ in self._writers]
        self.inputs = [module for module, _ in self._readers] + ([self._heads] if self._heads else [])
        names = {"taylor": bool(self._writers), "fisher": bool(self.inputs or self.tap), "gate": bool(self._heads)}
        self.names = [name for name, there in names.items() if there]

    def scores(self, outputs: Products, inputs: Products, tapped: Products) -> dict[str, Tensor]:
        """Return each image's terms of the sums, (B, heads, size)."""
        shape = (self.group.heads, self.group.size)
        found: dict[str, Tensor] = {}
        if self._writers:
            rows = [outputs[module][:, entries] for module, entries in self._writers]
            found["taylor"] = _sum_of([each.square().sum(-1) for each in rows]).unflatten(1, shape)
        if self.tap is not None:
            found["fisher"] = tapped[self.tap.name].square()
        elif self._heads is not None:
            whole = inputs[self._heads].unflatten(1, (self.group.size, -1)).sum(-1)[:, None]
            found |= {"fisher": whole.square(), "gate": whole.abs()}
        elif self._readers:
            read = [_channels(inputs[module], entries) for module, entries in self._readers]
            found["fisher"] = _sum_of(read).square().unflatten(1, shape)
        return found


def _sum_of(tensors: list[Tensor]) -> Tensor:
    """Return the sum of tensors of one shape."""
    return torch.stack(tensors).sum(0)


def _entries(member: Member) -> Tensor:
    """Return the places of all units along the axis, (heads · size, entries)."""
    return torch.from_numpy(member.entries.reshape(-1, member.copies))


def _channels(products: Tensor, entries: Tensor) -> Tensor:
    """Return the sum over each unit's channels, (B, units)."""
    return products[:, entries].sum(-1)


def _product(tensor: Tensor, gradient: Tensor) -> Tensor:
    """Return the product; of half types in float32, since the sums over positions need more digits."""
    if tensor.dtype in (torch.float16, torch.bfloat16):
        return tensor.float() * gradient.float()
    return tensor * gradient


def _add(sums: Products, name: str, found: Tensor) -> None:
    sums[name] = sums[name] + found if name in sums else found


def _over_positions(module: nn.Module, at: str, product: Tensor, images: int) -> Tensor:
    """Return the sums over an image's positions, (B, channels) float64 on the host.

    As in its weight, the channels of a grouped convolution's input are those of one group; its groups are added up.
    """
    if isinstance(module, nn.Conv2d):
        product = product.movedim(1, -1)
    summed = product.reshape(images, -1, product.shape[-1]).sum(1).cpu().double()
    if isinstance(module, nn.Conv2d) and module.groups > 1 and at == "input":
        summed = summed.unflatten(1, (module.groups, -1)).sum(1)
    return summed
