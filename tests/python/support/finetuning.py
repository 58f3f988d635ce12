"""Small models and batches for the tests of `finetune`, and a loader that breaks off."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from unittest import mock

import timm
import timm.optim.muon
import torch
from torch import Tensor, nn


def tiny(**arguments: object) -> nn.Module:
    """Build a ViT of 5 tokens with dropout and stochastic depth, so that a lost generator state shows."""
    torch.manual_seed(3)
    chosen = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    noise = {"proj_drop_rate": 0.2, "drop_path_rate": 0.2}
    name = arguments.pop("name", "vit_tiny_patch16_224")
    return timm.create_model(name, **{**chosen, **noise, **arguments})


def quiet(**arguments: object) -> nn.Module:
    return tiny(proj_drop_rate=0.0, drop_path_rate=0.0, **arguments)


def batches(count: int = 5, size: int = 4, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 3, 8, 8, generator=generator), torch.randint(0, 3, (size,), generator=generator))
        for _ in range(count)
    ]


def float32_muon() -> AbstractContextManager[object]:
    """Have timm's muon orthogonalise in float32: most processors emulate its bfloat16, and train for that mostly."""
    muon = timm.optim.muon
    chosen = partial(muon.zeropower_via_newtonschulz, dtype=torch.float32)
    return mock.patch.object(muon, "zeropower_via_newtonschulz", chosen)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Killed(Exception):
    pass


class Breaking:
    """A loader that stops the process, or so it seems, before a certain batch."""

    def __init__(self, source: object, after: int) -> None:
        self.source, self.left = source, after

    def __len__(self) -> int:
        return len(self.source)

    def __getattr__(self, name: str) -> object:
        if name in ("set_epoch", "description") and hasattr(self.source, name):
            return getattr(self.source, name)
        raise AttributeError(name)

    def __iter__(self) -> object:
        for batch in self.source:
            if self.left == 0:
                raise Killed
            self.left -= 1
            yield batch
