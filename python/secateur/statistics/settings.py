"""The settings that statistics depend on besides the images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..anatomy.fingerprint import Fingerprint

__all__ = ["FOLDS", "SAMPLED_IMAGES", "Collect", "Float", "Settings"]

Float = npt.NDArray[np.float64]
Collect = Literal["scores", "all"]
FOLDS = ("even", "odd")
SAMPLED_IMAGES = 64


@dataclass(frozen=True)
class Settings:
    """The settings that the sums depend on besides the images; only sums with equal settings can be merged.

    ``data`` is the model's data configuration (input size, mean, std, interpolation), ``dtype`` the type of the
    queries and keys that were scored; ``row_weights`` says whether tokens have weights in the moments; ``gradients``
    names the loss whose gradients were gathered, if any.
    """

    fingerprint: Fingerprint
    gamma: int
    collect: Collect
    token_fraction: float
    dtype: str
    data: Mapping[str, Any]
    row_weights: bool = False
    gradients: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        fields = {**vars(self), "fingerprint": self.fingerprint.to_dict(), "data": dict(self.data)}
        if not self.row_weights:
            # Files without weights, or gradients, are those of versions that know none; they refuse the others.
            del fields["row_weights"]
        if not self.gradients:
            del fields["gradients"]
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Settings:
        """Build settings from their JSON values."""
        return cls(**{**fields, "fingerprint": Fingerprint.from_dict(fields["fingerprint"])})
