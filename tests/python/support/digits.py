"""ViTs trained on handwritten digits. Their weights are in tests/data/trained, in float16: the same on every machine.

    python tests/python/support/digits.py FOLDER

trains them anew, half a minute each. Training adds up in another order on another processor, and nine passes later the
weights are others; a test that then fails or passes says more about chance than about secateur.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import timm.optim
import torch
from finetuning import float32_muon
from safetensors.torch import load_file, save_file
from secateur.data.loader import loader
from torch import nn
from torch.nn import functional

MakeModel = Callable[[], nn.Module]

TRAINED = Path(__file__).parents[2] / "data" / "trained"
# What is beyond the plain model.
MODELS: dict[str, dict[str, Any]] = {
    "digits": {},
    "digits_normed": {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
}


def architecture(**more: object) -> nn.Module:
    """Build it untrained: odd heads (3 of 31), class token, 65 tokens."""
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=93, num_heads=3, depth=3, num_classes=10, **more
    )


def train(model: nn.Module, epochs: int = 9) -> None:
    """Train in place; the plain loop of torch, so that no test of secateur's own training depends on itself."""
    images, targets = next(iter(loader("digits", model, split="train", batch_size=1024)))
    generator = torch.Generator().manual_seed(0)
    # The default of 0.02 hides positions from the first layers for many epochs, and this is to take seconds.
    nn.init.trunc_normal_(model.pos_embed, std=0.5, a=-2, b=2, generator=generator)
    optimizer = timm.optim.create_optimizer_v2(model, opt="muon", lr=1e-2, weight_decay=0.05)
    starts = range(0, len(images), 32)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1e-2, total_steps=epochs * len(starts), pct_start=0.15, cycle_momentum=False
    )
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for start in starts:
            batch = order[start : start + 32]
            shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
            logits = model(torch.roll(images[batch], shift, (2, 3)))
            loss = functional.cross_entropy(logits, targets[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    model.eval()


def trained(name: str) -> nn.Module:
    """Train the model of that name."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    model = architecture(**MODELS[name])
    with float32_muon():
        train(model)
    return model


def maker(name: str) -> MakeModel:
    """Return a function that gives a fresh copy of a trained model, in evaluation mode."""
    weights = load_file(TRAINED / f"{name}.safetensors")

    def make() -> nn.Module:
        model = architecture(**MODELS[name])
        model.load_state_dict(weights)
        return model.eval()

    return make


def accuracy(model: nn.Module) -> float:
    """Of the held-out half of the digits."""
    images, targets = next(iter(loader("digits", model, batch_size=1024)))
    with torch.inference_mode():
        return (model(images).argmax(dim=1) == targets).double().mean().item()


def main() -> None:
    folder = Path(sys.argv[1])
    for name in MODELS:
        weights = {key: tensor.half() for key, tensor in trained(name).state_dict().items()}
        save_file(weights, folder / f"{name}.safetensors")


if __name__ == "__main__":
    main()
