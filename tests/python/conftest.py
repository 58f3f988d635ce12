"""Fixtures on trained weights: random ones hide singular Grams, outlier channels and much else."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable

import pytest
import timm
import timm.optim
import torch
from filelock import FileLock  # torch brings it
from finetuning import float32_muon
from safetensors.torch import load_file, save_file
from secateur.data.loader import ImageLoader, loader
from secateur.files.container import replacing
from torch import Tensor, nn
from torch.nn import functional

MakeModel = Callable[[], nn.Module]


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    """Start every test from the same generator and number of threads."""
    torch.manual_seed(0)
    torch.set_num_threads(2)


def digits_architecture(**more: object) -> nn.Module:
    """Build the untrained model of `make_digits_model`: odd heads (3 of 31), class token, 65 tokens."""
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=93, num_heads=3, depth=3, num_classes=10, **more
    )


def train_on_digits(model: nn.Module, epochs: int = 9) -> None:
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


@pytest.fixture(scope="session")
def make_digits_model(pytestconfig: pytest.Config) -> MakeModel:
    """Return a function that gives a fresh copy of a ViT trained on digits, in evaluation mode.

    Width 93, 3 heads of 31, 3 blocks, FFN 372, 32 x 32 images in patches of 4, class token, 10 classes.
    """
    return _trained(pytestconfig)


@pytest.fixture(scope="session")
def make_normed_model(pytestconfig: pytest.Config) -> MakeModel:
    """Return a function that gives a fresh copy of the same model, trained alike, with norms inside of its layers.

    These are LayerNorms of queries and keys, of the values that the projection takes, and of the FFN's hidden units.
    """
    return _trained(pytestconfig, qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True)


def _trained(pytestconfig: pytest.Config, **more: object) -> MakeModel:
    """Weights are kept in pytest's cache folder under a digest of the code that makes them."""
    made_by = digits_architecture, train_on_digits, float32_muon
    source = "".join(map(inspect.getsource, made_by)) + timm.__version__ + repr(more)
    folder = pytestconfig.cache.mkdir("secateur")
    path = folder / f"digits-{hashlib.sha256(source.encode()).hexdigest()[:16]}.safetensors"
    with FileLock(path.with_suffix(".lock")):  # one worker trains, the others wait
        if not path.is_file():
            torch.manual_seed(0)
            torch.set_num_threads(2)
            model = digits_architecture(**more)
            with float32_muon():
                train_on_digits(model)
            with replacing(path) as temporary:
                save_file(model.state_dict(), temporary)
    weights = load_file(path)

    def make() -> nn.Module:
        model = digits_architecture(**more)
        model.load_state_dict(weights)
        return model.eval()

    images, targets = next(iter(loader("digits", make(), batch_size=1024)))
    with torch.inference_mode():
        accuracy = (make()(images).argmax(dim=1) == targets).double().mean().item()
    assert accuracy >= 0.85, f"the model of the fixtures is not trained: {accuracy:.1%} of the held-out digits"
    return make


@pytest.fixture
def digits_model(make_digits_model: MakeModel) -> nn.Module:
    """Return a fresh copy of the trained model."""
    return make_digits_model()


@pytest.fixture(scope="session")
def digits_images(make_digits_model: MakeModel) -> Tensor:
    """Return 64 held-out digits, normalised for `digits_model`: (64, 3, 32, 32) float32."""
    return next(iter(loader("digits", make_digits_model(), batch_size=64)))[0]


@pytest.fixture(scope="session")
def digits_loader(make_digits_model: MakeModel) -> ImageLoader:
    """Return the held-out half of the digits, 899 images in batches of 64."""
    return loader("digits", make_digits_model(), batch_size=64)
