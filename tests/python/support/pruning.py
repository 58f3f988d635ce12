"""Plans of chosen units, and the bars that a model pruned by one is held to."""

from __future__ import annotations

import copy

import numpy as np
import reference
import secateur as sc
import torch
from secateur.anatomy.fingerprint import Fingerprint


def plan_of(model, keep):
    anatomy = sc.inspect(model)
    sizes = {name: indices.shape[1] for name, indices in keep.items()}
    return sc.Plan(
        method="random",
        options={},
        fingerprint=Fingerprint.of(model, anatomy),
        keep=keep,
        params=(anatomy.params, anatomy.params_at(sizes)),
        macs=(anatomy.macs, anatomy.macs_at(sizes)),
    )


def random_keep(model, seed, kinds=("qk", "v", "ffn", "width", "heads"), fraction=None):
    groups = {g.name: (g.heads, g.size) for g in sc.inspect(model).groups if g.kind in kinds}
    return reference.random_keep(np.random.default_rng(seed), groups, fraction)


def set_fused(model, fused):
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused


@torch.no_grad()
def check(dense, keep, x, layout="exact"):
    """Prune a copy and hold it to the bars: 1e-10 in float64, 4 times the dense model's own error in float32."""
    double = copy.deepcopy(dense).double()
    masked = reference.masked(double, keep)
    expected = reference.outputs_to_compare(masked(x.double()), masked, keep)
    scale = float(expected.abs().max())

    sc.prune(double, plan_of(double, keep), layout=layout)
    for fused in (True, False):
        set_fused(double, fused)
        assert float((double(x.double()) - expected).abs().max()) <= 1e-10 * max(1.0, scale)

    single, masked = copy.deepcopy(dense), masked.float()  # to the bit what it was before
    own = reference.outputs_to_compare(masked(x), masked, keep).double() - expected
    sc.prune(single, plan_of(single, keep), layout=layout)
    bar = max(4 * float(own.abs().max()), 64 * torch.finfo(torch.float32).eps * scale)
    assert float((single(x).double() - expected).abs().max()) <= bar
    return double
