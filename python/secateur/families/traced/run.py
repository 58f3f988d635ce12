"""Runs a model on the meta device, where tensors have shapes and no values, and follows every operation of torch's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ...errors import Unsupported

__all__ = ["POINTWISE", "Following", "follow", "pointwise", "tensors_in"]

_aten = torch.ops.aten
# What torch does not tag as pointwise in every version.
POINTWISE = {_aten.hardswish, _aten.hardswish_, _aten.mish, _aten.mish_, _aten._prelu_kernel, _aten.expand}


class Following(TorchDispatchMode):
    """Sees every operation; ``where`` holds the names of the modules that run, outermost first, the model's own ''."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.where: list[str] = [""]

    def left(self, name: str, args: tuple[Any, ...], out: Any) -> None:
        """Note what entered and left a module, which has just run."""


F = TypeVar("F", bound=Following)


def follow(model: nn.Module, shape: tuple[int, ...], start: Callable[[nn.Module, Tensor], F]) -> tuple[F, Any]:
    """Run a copy of a model without weights, hooks and training; return what followed it, and the output.

    Args:
        model: the model; it is not changed.
        shape: that of the images, (B, C, H, W).
        start: returns what follows, given the copy and the images.

    Raises:
        Unsupported: the model cannot run without values; the text names the module that ran.
    """
    memo: dict[int, Any] = {}
    # Modules also keep tensors that are neither, such as position indices.
    kept = (each for module in model.modules() for each in vars(module).values() if isinstance(each, Tensor))
    for tensor in (*model.parameters(), *model.buffers(), *kept):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    mode: Following = Following()
    try:
        with torch.inference_mode(False), torch.no_grad():
            probe: Any = copy.deepcopy(model, memo).eval()
            if hasattr(probe, "set_grad_checkpointing"):
                probe.set_grad_checkpointing(False)
            images = torch.empty(shape, dtype=next(probe.parameters()).dtype, device="meta")
            mode = found = start(probe, images)
            for name, module in probe.named_modules():
                _watch(found, name, module)
            with found:
                out = probe(images)
    except Exception as error:  # whatever a stranger's module raises
        where, reason = mode.where[-1] or "model", str(error).partition("\n")[0]
        raise Unsupported(f"{where}: cannot run without values: {reason}") from error
    return found, out


def _watch(mode: Following, name: str, module: Any) -> None:
    def leaving(_: nn.Module, args: Any, out: Any) -> None:
        mode.where.pop()
        mode.left(name, args, out)

    module._forward_hooks.clear()
    module._forward_pre_hooks.clear()
    module.register_forward_pre_hook(lambda *_: mode.where.append(name))
    module.register_forward_hook(leaving)


def pointwise(func: Any) -> bool:
    """Return whether an operation acts on each entry alone."""
    return torch.Tag.pointwise in func.tags or func.overloadpacket in POINTWISE


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors in nested containers."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
