"""The random generators of the process: Python's, NumPy's, torch's and those of CUDA devices."""

from __future__ import annotations

import random
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["get", "kept", "put", "seed"]


def get(*places: torch.device) -> dict[str, Any]:
    """Return the states as numbers and uint8 tensors; of ``places``, only CUDA devices count."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - transforms draw from the global generator
    state = {
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), *rest),
        "torch": torch.default_generator.get_state(),
    }
    cuda = [torch.cuda.get_rng_state(place) for place in places if place.type == "cuda"]
    return {**state, "cuda": cuda} if cuda else state


def put(state: Mapping[str, Any], *places: torch.device) -> None:
    """Restore the states that `get` returned, for the same number of CUDA devices or for none."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.default_generator.set_state(state["torch"])
    for place, device in zip((place for place in places if place.type == "cuda"), state.get("cuda", []), strict=False):
        torch.cuda.set_rng_state(device, place)


def seed(value: int, place: torch.device | None = None) -> None:
    """Seed the generators that transforms draw from and, with ``place``, those that a model on that device uses.

    torch.manual_seed would seed every GPU, permanently even those that are not in use yet.
    """
    random.seed(value)
    np.random.seed(value % 2**32)  # noqa: NPY002
    if place is None or place.type in ("cpu", "cuda"):
        torch.default_generator.manual_seed(value)
    else:
        torch.manual_seed(value)
    if place is not None and place.type == "cuda":
        with torch.cuda.device(place):
            torch.cuda.manual_seed(value)


@contextmanager
def kept(*places: torch.device) -> Iterator[None]:
    """Restore the generators after the block, even after an exception."""
    state = get(*places)
    try:
        yield
    finally:
        put(state, *places)
