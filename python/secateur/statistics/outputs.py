"""What models return, as tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Unsupported

__all__ = ["as_tensor", "differentiable", "double"]


def as_tensor(output: Any) -> Tensor:
    """Return a model's output itself, or all tensors of a sequence or mapping side by side, (B, K).

    Raises:
        Unsupported: it holds no tensors.
    """
    if isinstance(output, Tensor):
        return output
    parts = list(output.values()) if isinstance(output, Mapping) else output
    if not isinstance(parts, (list, tuple)) or not parts:
        raise Unsupported(f"model: expected outputs of tensors, got {type(output).__name__}")
    return torch.cat([as_tensor(part).flatten(1) for part in parts], 1)


def differentiable(model: nn.Module) -> Callable[[Tensor], Any]:
    """Return the model's forward pass, with copies of what was made in inference mode and cannot take part."""
    state = [*model.named_parameters(), *model.named_buffers()]
    copies = {name: value.clone() for name, value in state if value.is_inference()}
    if not copies:
        return model
    return lambda images: torch.func.functional_call(model, copies, (images,))


def double(output: Any) -> Tensor:
    """Return a model's output, `as_tensor`, in float64."""
    return as_tensor(output).double()
