"""Fixtures on trained weights: random ones hide singular Grams, outlier channels and much else."""

from __future__ import annotations

import pytest
import secateur as sc
import torch
from digits import MakeModel, maker
from secateur.data.loader import ImageLoader, loader
from torch import Tensor, nn

# Folders whose tests are of what threads compute, or of how many there are. In the others torch alone would use a
# second one, on models so small that it takes a third more processor time.
TWO_THREADS = {"calibration", "core", "latency", "reconstruction", "runtime", "statistics", "surgery"}


@pytest.fixture(autouse=True)
def _deterministic(request: pytest.FixtureRequest) -> None:
    """Start every test from the same generator and number of threads."""
    torch.manual_seed(0)
    torch.set_num_threads(2 if request.path.parent.name in TWO_THREADS else 1)


@pytest.fixture(scope="session")
def make_digits_model() -> MakeModel:
    """Return a function that gives a fresh copy of a ViT trained on digits, in evaluation mode.

    Width 93, 3 heads of 31, 3 blocks, FFN 372, 32 x 32 images in patches of 4, class token, 10 classes.
    """
    return maker("digits")


@pytest.fixture(scope="session")
def make_normed_model() -> MakeModel:
    """Return a function that gives a fresh copy of the same model, trained alike, with norms inside of its layers.

    These are LayerNorms of queries and keys, of the values that the projection takes, and of the FFN's hidden units.
    """
    return maker("digits_normed")


@pytest.fixture(scope="session")
def digits_statistics(make_digits_model: MakeModel, digits_loader: ImageLoader) -> sc.Statistics:
    """Return those of 512 held-out digits, with sensitivities; nobody may change them."""
    return sc.calibrate(make_digits_model(), digits_loader, max_images=512, sensitivity="noise")


@pytest.fixture(scope="session")
def trained_double(make_digits_model: MakeModel, digits_images: Tensor) -> tuple[nn.Module, sc.Statistics]:
    """Return the trained model in float64 and all statistics of `digits_images`; nobody may change them."""
    model = make_digits_model().double()
    return model, sc.calibrate(model, digits_images.double().split(16), sensitivity="noise", gradients=True)


@pytest.fixture(scope="session")
def trained_normed(make_normed_model: MakeModel, digits_images: Tensor) -> tuple[nn.Module, sc.Statistics, Tensor]:
    """Return it in float64, its statistics over 48 held-out digits, and 16 more; nobody may change them."""
    model = make_normed_model().double()
    return model, sc.calibrate(model, [digits_images[:48].double()], sensitivity="noise"), digits_images[48:].double()


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
