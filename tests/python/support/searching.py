"""A search with fine-tuning, small enough to be run again and again."""

from __future__ import annotations

import secateur as sc
from finetuning import batches, tiny

ALL = ("qk", "v", "ffn", "width")
TUNING = {"epochs": 1, "lr": 1e-3, "warmup": 0, "alpha": 0.5}
SEARCH = {"objective": sc.AccuracyCritical(100.0), "rounds": 3, "step": 0.125, "groups": ALL, "round_to": 1}


def calibration():
    return [x.clamp(-1, 1) for x, _ in batches(3, 6, seed=5)]


def tuned(rounds=3, train=None, tuning=TUNING, objective=None, **arguments):
    """A search with fine-tuning in every round, on a model of 16 channels."""
    model = tiny().eval()
    return sc.search(
        model, sc.calibrate(model, calibration(), sensitivity="noise"), loader=batches(4, 6, seed=9), finetune=tuning,
        train_loader=batches() if train is None else train, calibration_loader=calibration(),
        **{**SEARCH, "rounds": rounds, **({} if objective is None else {"objective": objective})}, **arguments,
    )  # fmt: skip
