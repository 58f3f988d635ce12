"""The structure of a pruned model: sizes, layouts, and settings of modules that differ from the dense model's."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import torch
from torch import nn

from .. import check
from ..anatomy import Anatomy, Indices, LastBlock
from ..errors import InvalidArgument
from ..families.registry import family_of
from .cut import cut
from .stock_layout import LAYOUTS

__all__ = ["Structure", "check_last_block", "set_norms"]

# Limit on the units of all groups, checked before the weights in a file are read. ViT-22B has 1.8 million.
_MAX_UNITS = 1 << 21
_LINEAR = (nn.Linear, nn.Conv2d)


@dataclass(frozen=True)
class Structure:
    """How a pruned model differs from the dense one, apart from values; the dense model has its group sizes only.

    ``sizes`` maps groups to their sizes, 0 for removed layers; a stock attention layer's sizes include its padding.
    ``layouts`` maps attention modules to "exact", which is the default, or "stock"; ``scales`` maps those in the exact
    layout to their softmax scale. ``eps`` maps norms to their eps, ``uncentred`` names query/key norms that no longer
    subtract the mean, ``biases`` names the biases that the dense model does not have. ``last_block`` is "pooled" if the
    last block computes only the tokens that the output depends on.
    """

    sizes: Mapping[str, int]
    layouts: Mapping[str, str] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)
    eps: Mapping[str, float] = field(default_factory=dict)
    uncentred: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    last_block: str = "whole"

    @classmethod
    def of(cls, model: nn.Module, anatomy: Anatomy, dense: Collection[str]) -> Structure:
        """Read the structure of a model.

        Args:
            model: a pruned or dense model.
            anatomy: description of the model.
            dense: the names of the dense model's parameters.
        """
        norms = [*(norm.name for norm in anatomy.norms), *anatomy.head_norms]
        return cls(
            sizes=anatomy.remains,
            layouts={layer.name: layer.layout for layer in anatomy.attention if layer.layout is not None},
            scales={layer.name: layer.softmax_scale for layer in anatomy.attention if layer.layout == "exact"},
            eps={name: getattr(model.get_submodule(name), "eps") for name in norms},  # noqa: B009
            uncentred=tuple(name for name in anatomy.head_norms if _is_uncentred(model.get_submodule(name))),
            biases=tuple(
                f"{name}.bias"
                for name, module in model.named_modules()
                if isinstance(module, _LINEAR) and module.bias is not None and f"{name}.bias" not in dense
            ),
            last_block=family_of(model).last_block(model),
        )

    def apply(self, model: nn.Module) -> None:
        """Give the dense model this structure in place, whatever its weights and device are.

        Raises:
            InvalidArgument: an unknown group or module, a size that a group cannot be cut to, a layout that is unknown
                or cannot hold the sizes, or a setting that its module does not have.
            Unsupported: the stock layout cannot hold a module.
        """
        family = family_of(model)
        # Inspection stores the position of every unit, so limit them first: a hostile file could ask for too many.
        _refuse_large(sum(parameter.shape[0] for parameter in model.parameters() if parameter.ndim > 1) // 2)
        anatomy = family.inspect(model)
        # Tokens have no positions, but those that stay are listed where some are merged.
        listed = [group for group in anatomy.groups if not group.of_tokens or group.name in self.sizes]
        _refuse_large(sum(group.heads * group.size for group in listed))
        keep = self._keep(anatomy)
        stock = self._stock_head_dims(anatomy)
        last_block = check_last_block(self.last_block)
        cut(model, family, anatomy, keep, {})
        family.make_stock(model, stock)
        if last_block != "whole":
            family.set_last_block(model, last_block, strict=False)
        if self.scales:
            self._set_scales(model, family.inspect(model))
        set_norms(model, self.eps, self.uncentred)
        for name in self.biases:
            layer = model.get_submodule(name.removesuffix(".bias"))
            if not isinstance(layer, _LINEAR):
                raise InvalidArgument(f"biases: expected those of linear layers, got {name!r}")
            weight = layer.weight
            layer.bias = nn.Parameter(torch.zeros(len(weight), dtype=weight.dtype, device=weight.device))

    def _keep(self, anatomy: Anatomy) -> dict[str, Indices]:
        keep: dict[str, Indices] = {}
        for name, size in self.sizes.items():
            group = anatomy.group(name)
            if not group.least <= size <= group.size:
                raise InvalidArgument(f"sizes[{name!r}]: expected {group.least}…{group.size}, got {size}")
            keep[name] = np.tile(np.arange(size, dtype=np.int64), (group.heads, 1))
        return keep

    def _stock_head_dims(self, anatomy: Anatomy) -> dict[str, int]:
        sizes = {**anatomy.sizes, **self.sizes}
        layers = {layer.name: layer for layer in anatomy.attention}
        found: dict[str, int] = {}
        for name, layout in self.layouts.items():
            if name not in layers:
                raise InvalidArgument(f"layouts: expected attention modules of this model, got {name!r}")
            if layout not in LAYOUTS:
                raise InvalidArgument(f"layouts[{name!r}]: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
            if layout == "stock":
                qk, v = (sizes[layers[name].groups[kind]] for kind in ("qk", "v"))
                if qk != v:
                    raise InvalidArgument(f"layouts[{name!r}]: expected 'exact' for heads of {qk} and {v}, got 'stock'")
                found[name] = qk
        return found

    def _set_scales(self, model: nn.Module, anatomy: Anatomy) -> None:
        """Set softmax scales; after an earlier stock layout, a model's scale differs from the dense one's."""
        for name, value in self.scales.items():
            if name not in anatomy.layers or anatomy.layers[name].layout != "exact":
                raise InvalidArgument(f"softmax_scales: expected attention modules of the exact layout, got {name!r}")
            attn: Any = model.get_submodule(name)
            attn.scale = check.number(f"softmax_scales[{name!r}]", value, open_low=True)

    def to_dict(self) -> dict[str, Any]:
        """Return the structure as JSON values, with the names used in files."""
        return {
            "sizes": dict(self.sizes),
            "layouts": dict(self.layouts),
            "softmax_scales": dict(self.scales),
            "eps": dict(self.eps),
            "uncentred": list(self.uncentred),
            "biases": list(self.biases),
            **({} if self.last_block == "whole" else {"last_block": self.last_block}),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Structure:
        """Build a structure from its JSON values; earlier versions wrote fewer of them.

        Raises:
            KeyError: there are no sizes.
        """
        return cls(
            sizes=fields["sizes"],
            layouts=fields.get("layouts", {}),
            scales=fields.get("softmax_scales", {}),
            eps=fields.get("eps", {}),
            uncentred=tuple(fields.get("uncentred", ())),
            biases=tuple(fields.get("biases", ())),
            last_block=fields.get("last_block", "whole"),
        )


def check_last_block(last_block: object) -> LastBlock:
    """Refuse an unknown way to run the last block.

    Raises:
        InvalidArgument: there is no such way.
    """
    for known in get_args(LastBlock):
        if last_block == known:
            found: LastBlock = known
            return found
    raise InvalidArgument(f"last_block: expected one of {', '.join(get_args(LastBlock))}, got {last_block!r}")


def set_norms(model: nn.Module, eps: Mapping[str, float], uncentred: Collection[str]) -> None:
    """Set the eps of norms, and make query/key norms stop subtracting the mean.

    Raises:
        InvalidArgument: a norm in ``uncentred`` does not belong to cut queries or keys.
    """
    norm: Any
    for name, value in eps.items():
        norm = model.get_submodule(name)
        norm.eps = value
    for name in uncentred:
        norm = model.get_submodule(name)
        if not isinstance(getattr(norm, "centred", None), bool):
            raise InvalidArgument(f"uncentred: expected norms of cut queries and keys, got {name!r}")
        norm.centred = False


def _refuse_large(units: int) -> None:
    if units > _MAX_UNITS:
        raise InvalidArgument(f"arguments: expected a model of at most {_MAX_UNITS:,} units in all, got {units:,}")


def _is_uncentred(norm: nn.Module) -> bool:
    # Only secateur's norms have this attribute; for timm's own norms the class decides.
    return getattr(norm, "centred", None) is False
