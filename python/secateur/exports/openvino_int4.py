"""OpenVINO's models with linear layers of 4 bits, by NNCF."""

from __future__ import annotations

from math import gcd
from typing import Any

import numpy as np
from torch import nn

from ..errors import InvalidArgument
from ..runtime.openvino import WEIGHTED
from ..runtime.quiet import quiet

__all__ = ["decompressed", "in_int4", "refuse_groups"]


def refuse_groups(model: nn.Module, size: int) -> None:
    """Refuse groups that do not divide a layer's inputs, and odd ones, with which OpenVINO computes something else.

    Raises:
        InvalidArgument: it is so; the text names a layer and the sizes that would do.
    """
    inputs = {name: layer.in_features for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    wrong = [name for name, count in inputs.items() if count % (size or 2)]
    if size % 2 == 0 and not wrong:
        return
    common = gcd(*inputs.values())
    would = [str(each) for each in range(2, common + 1, 2) if common % each == 0] + ["0"] * (common % 2 == 0)
    instead = f"{', '.join(would)} would do" if would else "none would do: plan with round_to=32, or use int8"
    got = f"{size} (odd)" if size % 2 else f"{size}"
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        got += f" where {wrong[0]}{more} {'have' if more else 'has'} {inputs[wrong[0]]}"
    raise InvalidArgument(f"group_size: expected an even divisor of every linear layer's inputs, got {got}; {instead}")


def in_int4(model: Any, group_size: int) -> Any:
    """Return a copy whose linear layers hold weights of 4 bits; NNCF gives the last one and convolutions 8."""
    import nncf

    mode = nncf.CompressWeightsMode.INT4_SYM
    with quiet("nncf"):
        return nncf.compress_weights(model.clone(), mode=mode, group_size=group_size or -1)


def decompressed(model: Any) -> Any:
    """Return a copy whose weights are the float32 numbers that its integers stand for."""
    import openvino

    model = model.clone()
    for each in model.get_ordered_ops():
        source = each.input_value(1) if each.get_type_name() in WEIGHTED else None
        if source is None or source.get_node().get_type_name() == "Constant" or not _is_constant(source.get_node()):
            continue
        (weights,) = openvino.Core().compile_model(openvino.Model([source], []), "CPU")([]).values()
        constant = openvino.op.Constant(np.array(weights, np.float32))
        each.input(1).replace_source_output(constant.output(0))
    return model


def _is_constant(operator: Any) -> bool:
    """Whether it depends on constants alone."""
    waiting, seen = [operator], set()
    while waiting:
        each = waiting.pop()
        if each.get_type_name() == "Parameter":
            return False
        if (name := each.get_friendly_name()) not in seen:
            seen.add(name)
            waiting += [value.get_node() for value in each.input_values()]
    return True
