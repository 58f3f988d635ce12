"""Whether the residual stream of a VisionTransformer can be cut, and changed to another basis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ...anatomy import NormSite, Stream
from ..walk import has, unread

__all__ = ["described_stream", "refused_head"]


def refused_head(model: nn.Module) -> dict[str, str]:
    """Return why the width cannot be cut, by its name, if a classifier is neither a linear layer nor an Identity."""
    for name in ("head", "head_dist"):
        head = getattr(model, name, None)
        if isinstance(head, nn.Module) and type(head) not in (nn.Linear, nn.Identity):
            return {"width": unread(name, head)}
    return {}


def described_stream(
    model: Any,
    refused: Mapping[str, str],
    norms: Sequence[NormSite],
    writers: Mapping[str, str | None],
    readers: dict[str, tuple[str, ...]],
) -> Stream | str:
    """Return what a change of the stream's basis has to rotate, or the reason that forbids one.

    Args:
        model: the model.
        refused: why kinds cannot be cut.
        norms: the norms that read the stream.
        writers: the linear layers that write to it, with the LayerScale after each.
        readers: the linear layers after each norm; the classifiers after the last one are added.
    """
    if "width" in refused:
        return refused["width"]
    for name in ("norm_pre", "patch_embed.norm"):
        norm = model.get_submodule(name) if name != "patch_embed.norm" else getattr(model.patch_embed, "norm", None)
        if norm is not None and type(norm) is not nn.Identity:
            return f"{name}: {type(norm).__name__} writes to the residual stream, channel by channel"
    if model.attn_pool is not None:
        return f"attn_pool: {type(model.attn_pool).__name__} keeps a residual stream of its own"
    if model.global_pool not in ("", "token", "avg"):
        return f"global_pool: {model.global_pool!r} takes maxima channel by channel"
    last = [name for name in ("norm", "fc_norm") if type(model.get_submodule(name)) is not nn.Identity]
    if len(last) != 1:
        return f"{' and '.join(last) or 'final_norm=False'}: the classifier reads the residual stream as it is"
    heads = [name for name in ("head", "head_dist") if hasattr(model, name)]
    if any(type(model.get_submodule(name)) is nn.Identity for name in heads):
        return "head: Identity, so the channels of the residual stream are the features"
    kinds = {site.centred for site in norms}
    if len(kinds) != 1:
        return "norms: both LayerNorm and RMSNorm read the residual stream"
    readers[last[0]] = tuple(heads)
    tokens = [name for name in ("cls_token", "reg_token", "dist_token", "pos_embed") if has(model, name)]
    return Stream(kinds.pop(), writers, tuple(tokens), readers)
