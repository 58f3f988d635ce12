"""Statistics compared with each other."""

from __future__ import annotations

import numpy as np


def assert_close(first, second, tolerance=1e-12):
    assert first.settings == second.settings
    assert first.tensors.keys() == second.tensors.keys()
    for name, array in first.tensors.items():
        scale = max(1e-300, float(np.abs(array).max()))
        np.testing.assert_allclose(array, second.tensors[name], rtol=0, atol=tolerance * scale, err_msg=name)
