"""Prunes a model as a plan says."""

from __future__ import annotations

import torch
from torch import nn

from .. import core
from ..anatomy.fingerprint import Fingerprint
from ..errors import InvalidArgument
from ..families.registry import family_of
from ..families.wrapped import refuse_live_wrapper
from ..surgery.cut import cut
from ..surgery.stock_layout import chosen_layout, pad_heads
from ..surgery.structure import check_last_block, set_norms
from ..surgery.verify import verify_cut
from .plan import Plan
from .report import Report


@core.host_by_default()
def prune(
    model: nn.Module,
    plan: Plan | None = None,
    *,
    layout: str = "exact",
    engine: str | None = None,
    last_block: str | None = None,
    strict: bool = True,
) -> Report:
    """Cut the model in place as planned. Gradients are dropped; build optimizers afterwards.

    A parameter that owns its storage is compacted in place and the storage is shrunk. One that shares its storage (with
    a state_dict you hold, or a mapped file) or lives on another device gets a new storage, and the other owner keeps
    the old values. The extra memory is never more than the largest new tensor.

    Args:
        model: the model that was planned for.
        plan: what to keep; None cuts nothing, for the layout and the last block alone.
        layout: "exact": attention modules that lose anything become secateur's own, which hold any sizes. "stock": all
            attention modules are timm's own afterwards, also those cut in an earlier round. Queries, keys and values
            have the same size per head, the larger of the two, padded with zeros, which the report counts. The query
            weights are multiplied by √(size / dense size), so that timm's 1/√size amounts to the dense model's scale.
            The ``params`` and ``macs`` of plans do not count the zeros, and merging tokens makes blocks secateur's.
            "auto": the one of the two that suits ``engine``, as was measured and its exporter or runtime says.
        engine: with ``layout="auto"``, what the model will run in or be exported to: the name of a runtime of
            ``bench`` or of a format of ``export``, which need not be installed. "torch" by default.
        last_block: "pooled": the last block computes queries, projection and FFN for the prefix tokens only, and keys
            and values for all, which changes the model's output by rounding alone. ``forward_features`` and
            ``forward_intermediates`` still return all tokens. "whole": it computes all tokens. The default is "pooled"
            for classifiers with token pooling, which use no other tokens, and "whole" for other models and in the stock
            layout, since the last block and the model are then of secateur's classes. Plans count the default of the
            exact layout.
        strict: refuse weights other than those the plan was made for. Their checksums are compared, for which weights
            on a GPU are copied to the host; if false, the same dimensions are enough for a plan that only selects, and
            no weight leaves its device.

    Raises:
        InvalidArgument: not the plan's model, or a plan whose indices do not fit; no such layout or engine; or an
            engine without ``layout="auto"``. Nothing is changed.
        Unsupported: the model is not of a supported family; or ``last_block="pooled"`` for a model whose output depends
            on all tokens; or its stock layout would compute something else (query/key
            norms over cut channels, an inner norm over padded values, an attention pool over a cut width); or its
            family's cuts are verified, and the cut model differs from the dense one with the same units masked (the
            text names the groups that do not fit). Nothing is changed.
    """
    layout = chosen_layout(layout, engine)
    if not isinstance(plan, (Plan, type(None))):
        raise InvalidArgument(f"plan: expected a Plan, got {type(plan).__name__}")
    family = family_of(model)
    anatomy = family.inspect(model)
    refuse_live_wrapper(model)
    # timm's own block has no pooled form.
    usual = "whole" if layout == "stock" else anatomy.default_last_block
    wanted = usual if last_block is None else check_last_block(last_block)
    if wanted == "pooled" and anatomy.pooled_products is None:
        # Refused by name, and nothing is changed.
        family.set_last_block(model, wanted)
    sizes = dict(anatomy.sizes)
    if plan is not None:
        strict = strict or bool(plan.weights)
        plan.fingerprint.require(Fingerprint.of(model, anatomy, weights=strict), "model", strict=strict)
        sizes = plan.check(anatomy)
    if layout == "stock":
        sizes = family.stock_sizes(model, anatomy, sizes)
    if family.verified and plan is not None:
        verify_cut(model, family, anatomy, plan.keep)
    # Inference tensors cannot be trained, so make them only if the model already has them.
    inference = any(parameter.is_inference() for parameter in model.parameters())
    if plan is not None:
        with torch.inference_mode(inference):
            cut(model, family, anatomy, plan.keep, plan.weights)
        set_norms(model, plan.eps, plan.uncentred)
    family.set_last_block(model, wanted)
    after = family.inspect(model)
    if layout == "stock":
        with torch.inference_mode(inference):
            pad_heads(model, after, sizes)
        family.make_stock(model, {layer.name: sizes[layer.groups["qk"]] for layer in after.attention})
        after = family.inspect(model)
    # A caller's autocast may have cached casts of the old weights.
    torch.clear_autocast_cache()
    return Report(
        params=(anatomy.params, after.params),
        macs=(anatomy.macs, after.macs),
        groups={group.name: (group.size, after.sizes.get(group.name, 0)) for group in anatomy.groups},
    )
