"""mixup and cutmix by timm, for batches of any size and for images with or without targets."""

from __future__ import annotations

import torch
from timm.data import Mixup
from torch import Tensor
from torch.nn import functional

__all__ = ["Mixing"]


class Mixing:
    """Mixes each image of a batch with the one at the same place from the other end.

    mixup (Zhang et al., 2018, arXiv:1710.09412) adds a share of the other image, cutmix (Yun et al., 2019,
    arXiv:1905.04899) pastes a rectangle of it; with both, each batch draws one of the two. Shares follow
    Beta(alpha, alpha) and come from NumPy's global generator, as timm has it.
    """

    def __init__(self, mixup: float, cutmix: float) -> None:
        self._mixup, self._cutmix = mixup, cutmix

    def images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mixed images (B, C, H, W), a copy, and each one's shares (B, B) of those that came in.

        timm mixes an even number: the last image of an odd batch stays whole.
        """
        mixed, shares = images.clone(), torch.eye(len(images), device=images.device)
        even = len(images) - len(images) % 2
        if even:
            mix = Mixup(self._mixup, self._cutmix, label_smoothing=0.0, num_classes=even)
            # With every image a class of its own, the soft targets are the shares; the classes' number comes later.
            _, shares[:even, :even] = mix(mixed[:even], torch.arange(even, device=images.device))
        return mixed, shares

    @staticmethod
    def targets(targets: Tensor, shares: Tensor, classes: int) -> Tensor:
        """Return probabilities (B, classes) of images mixed in these shares: targets are indices or probabilities."""
        dense = targets if targets.is_floating_point() else functional.one_hot(targets.long(), classes)
        return shares.to(targets.device) @ dense.to(shares.dtype)
