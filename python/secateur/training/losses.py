"""Losses of the training loop."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T² KL(teacher || student) at temperature T, the mean over images of logits (B, classes)."""
    divergence = functional.kl_div(
        functional.log_softmax(student / temperature, dim=-1),
        functional.log_softmax(teacher / temperature, dim=-1),
        reduction="batchmean",
        log_target=True,
    )
    result: Tensor = temperature**2 * divergence
    return result
