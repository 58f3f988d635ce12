"""Methods bound to a model."""

from __future__ import annotations

from typing import Any

import secateur as sc
from secateur.methods.base import Bound, Prepared
from secateur.methods.registry import method_named, options_of
from torch import nn


def prepared(model: nn.Module, stats: sc.Statistics, method: str, **options: Any) -> Prepared:
    """Bind a method to a calibrated model."""
    found = method_named(method)
    return found.prepare(Bound(model, sc.inspect(model), stats, options_of(found, options)))
