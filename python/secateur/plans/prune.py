"""Cut a model as a plan says."""

from __future__ import annotations

import torch
from torch import nn

from .. import core
from ..anatomy.fingerprint import Fingerprint
from ..errors import InvalidArgument
from ..families.registry import family_of
from ..surgery.cut import cut
from ..surgery.stock_layout import check_layout, pad_heads
from ..surgery.structure import set_norms
from ..surgery.verify import verify_cut
from .plan import Plan
from .report import Report


@core.host_by_default()
def prune(model: nn.Module, plan: Plan, *, layout: str = "exact", strict: bool = True) -> Report:
    """Cut the model in place as planned. Gradients are dropped; build optimizers afterwards.

    A parameter that owns its storage is compacted inside it, and the storage is shrunk; one that shares it (a
    state_dict you hold, a mapped file) or lives on another device gets a new one, and the old values stay with their
    other owner. The extra memory is never more than the largest new tensor.

    Args:
        model: the model that was planned for.
        plan: what to keep.
        layout: "exact": attention modules that lose anything become ours, which take the kept sizes as they are.
            "stock": all attention modules are timm's own afterwards, those of an earlier round too. Queries, keys and
            values have one size per head, the larger; what is missing is zeros, which the report counts. The query
            weights are multiplied by √(size / dense size), so that timm's 1/√size is the dense model's scale. Plans
            leave out the zeros in their own ``params`` and ``macs``.
        strict: refuse other weights than the plan was made for, by their checksums, for which a GPU's weights are read
            through the host; if false, the same dimensions are enough for a plan that only selects, and no weight
            leaves its device.

    Raises:
        InvalidArgument: another model than the plan's, or a plan whose indices do not fit; nothing is changed.
        Unsupported: the model is of no supported family, or its stock layout would compute something else: query/key
            norms over cut channels, an inner norm over padded values, an attention pool over a cut width. Or the model
            is of a family whose cuts are verified, and the cut model would not compute what the dense one does with the
            same units masked; the text names the groups that do not fit. Nothing is changed.
    """
    check_layout(layout)
    if not isinstance(plan, Plan):
        raise InvalidArgument(f"plan: expected a Plan, got {type(plan).__name__}")
    family = family_of(model)
    anatomy = family.inspect(model)
    strict = strict or bool(plan.weights)
    plan.fingerprint.require(Fingerprint.of(model, anatomy, weights=strict), "model", strict=strict)
    sizes = plan.check(anatomy)
    if layout == "stock":
        sizes = family.stock_sizes(model, anatomy, sizes)
    if family.verified:
        verify_cut(model, family, anatomy, plan.keep)
    # Inference tensors could never be trained; those of a model that was made as such stay what they are.
    inference = any(parameter.is_inference() for parameter in model.parameters())
    with torch.inference_mode(inference):
        cut(model, family, anatomy, plan.keep, plan.weights)
    set_norms(model, plan.eps, plan.uncentred)
    after = family.inspect(model)
    if layout == "stock":
        with torch.inference_mode(inference):
            pad_heads(model, after, sizes)
        family.make_stock(model, {layer.name: sizes[layer.groups["qk"]] for layer in after.attention})
        after = family.inspect(model)
    # A caller's autocast has kept what it cast of the weights before.
    torch.clear_autocast_cache()
    return Report(
        params=(anatomy.params, after.params),
        macs=(anatomy.macs, after.macs),
        groups={group.name: (group.size, after.sizes.get(group.name, 0)) for group in anatomy.groups},
    )
