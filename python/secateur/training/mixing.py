"""mixup and cutmix by timm, for batches of any size and for images with or without targets."""

from __future__ import annotations

import torch
from timm.data import Mixup
from torch import Tensor
from torch.nn import functional

__all__ = ["Mixing"]


class Mixing:
    """Mixes each image of a batch with its counterpart from the other end of the batch.

    mixup (Zhang et al., 2018, arXiv:1710.09412) adds a share of the other image, cutmix (Yun et al., 2019,
    arXiv:1905.04899) pastes a rectangle of it; with both, one of them is drawn for each batch. Shares follow
    Beta(alpha, alpha) and are drawn from NumPy's global generator, as in timm.
    """

    def __init__(self, mixup: float, cutmix: float) -> None:
        self._mixup, self._cutmix = mixup, cutmix

    def images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mixed copies of images (B, C, H, W), and for each the shares (B, B) of the original ones.

        timm mixes an even number of images, so the last image of an odd batch is not mixed.
        """
        mixed, shares = images.clone(), torch.eye(len(images), device=images.device)
        even = len(images) - len(images) % 2
        if even:
            mix = Mixup(self._mixup, self._cutmix, label_smoothing=0.0, num_classes=even)
            # With each image as its own class, the soft targets are the shares; the number of classes is needed later.
            _, shares[:even, :even] = mix(mixed[:even], torch.arange(even, device=images.device))
        return mixed, shares

    @staticmethod
    def targets(targets: Tensor, shares: Tensor, classes: int) -> Tensor:
        """Return probabilities (B, classes) for images mixed by these shares, from indices or probabilities."""
        dense = targets if targets.is_floating_point() else functional.one_hot(targets.long(), classes)
        return shares.to(targets.device) @ dense.to(shares.dtype)
