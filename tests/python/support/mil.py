"""Computes what a Core ML package says, in torch, from Core ML's description of its operators: Core ML is on macOS."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


def sliced(x, begin, end, stride=None, begin_mask=None, end_mask=None, squeeze_mask=None):
    index = []
    for axis in range(x.ndim):
        step = 1 if stride is None else int(stride[axis])
        first = None if begin_mask is not None and begin_mask[axis] else int(begin[axis])
        last = None if end_mask is not None and end_mask[axis] else int(end[axis])
        index.append(first if squeeze_mask is not None and squeeze_mask[axis] else slice(first, last, step))
    return x[tuple(index)]


def convolved(x, weight, bias=None, strides=(1, 1), pad_type="valid", pad=(0, 0, 0, 0), dilations=(1, 1), groups=1):
    assert pad_type in ("valid", "custom")
    top, bottom, left, right = (int(each) for each in (pad if pad_type == "custom" else (0, 0, 0, 0)))
    x = F.pad(x, (left, right, top, bottom))
    return F.conv2d(x, weight, bias, [*map(int, strides)], 0, [*map(int, dilations)], int(groups))


def pooled(x, kernel_sizes, strides, pad_type, pad, ceil_mode):
    assert pad_type == "custom"
    assert not ceil_mode
    top, bottom, left, right = map(int, pad)
    x = F.pad(x, (left, right, top, bottom), value=-torch.inf)
    return F.max_pool2d(x, [*map(int, kernel_sizes)], [*map(int, strides)])


def padded(x, pad, mode, constant_val):
    assert mode == "constant"
    widths = [int(each) for pair in reversed(list(zip(pad[::2], pad[1::2], strict=True))) for each in pair]
    return F.pad(x, widths, value=float(constant_val))


def attended(query, key, value, attn_mask=None):
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return (scores if attn_mask is None else scores + attn_mask).softmax(-1) @ value


def divided(x, y):
    found = x / y
    return found if torch.is_floating_point(torch.as_tensor(x)) else found.round().long()


def gathered(x, indices, axis=0, batch_dims=0, validate_indices=False):
    assert not batch_dims
    return x.select(int(axis), int(indices))


def activated(x, mode):
    assert mode == "EXACT"
    return F.gelu(x)


def joined(values, axis, interleave=False):
    assert not interleave
    return torch.cat([each.reshape(-1) if each.ndim == 0 else each for each in values], int(axis))


OPERATORS = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "real_div": divided,
    "equal": lambda x, y: x == y,
    "select": lambda cond, a, b: torch.where(cond, a, b),
    "cast": lambda x, dtype: x.to({"fp16": torch.float16, "fp32": torch.float32, "int32": torch.int64}[dtype]),
    "clip": lambda x, alpha, beta: x.clamp(float(alpha), float(beta)),
    "relu": lambda x: x.relu(),
    "gelu": activated,
    "conv": convolved,
    "max_pool": pooled,
    "pad": padded,
    "concat": joined,
    "gather": gathered,
    "slice_by_index": sliced,
    "split": lambda x, split_sizes, axis: x.split([*map(int, split_sizes)], int(axis)),
    "shape": lambda x: torch.tensor(x.shape),
    "reshape": lambda x, shape: x.reshape([*map(int, shape)]),
    "squeeze": lambda x, axes: x.squeeze([*map(int, axes)]),
    "transpose": lambda x, perm: x.permute([*map(int, perm)]),
    "tile": lambda x, reps: x.repeat([*map(int, reps)]),
    "linear": lambda x, weight, bias=None: F.linear(x, weight, bias),
    "matmul": lambda x, y, transpose_x=False, transpose_y=False: (
        (x.transpose(-1, -2) if transpose_x else x) @ (y.transpose(-1, -2) if transpose_y else y)
    ),
    "softmax": lambda x, axis: x.softmax(int(axis)),
    "reduce_mean": lambda x, axes, keep_dims: x.mean([*map(int, axes)], bool(keep_dims)),
    "layer_norm": lambda x, axes, gamma, beta, epsilon: F.layer_norm(
        x, [x.shape[int(axis)] for axis in axes], gamma, beta, float(epsilon)
    ),
    "scaled_dot_product_attention": attended,
}


def outputs(package, images: Tensor) -> list[Tensor]:
    """What the package computes, read from its files alone."""
    import coremltools
    from coremltools.converters.mil.frontend.milproto.load import load

    spec = coremltools.models.MLModel(str(package), skip_model_load=True).get_spec()
    weights = str(package / "Data" / "com.apple.CoreML" / "weights")
    function = load(spec, spec.specificationVersion, weights).functions["main"]
    (name,) = function.inputs
    known = {name: images}

    def value(var):
        if isinstance(var, (list, tuple)):
            return [value(each) for each in var]
        if var.name in known:
            return known[var.name]
        assert var.val is not None, var.name
        return var.val if isinstance(var.val, str) else torch.as_tensor(var.val)

    for operation in function.operations:
        if operation.op_type == "const":
            continue
        given = {key: value(var) for key, var in operation.inputs.items() if var is not None}
        made = OPERATORS[operation.op_type](**given)
        made = made if isinstance(made, (list, tuple)) else [made]
        for var, each in zip(operation.outputs, made, strict=True):
            # Batches are symbols.
            sizes = [pair for pair in zip(var.shape, each.shape, strict=True) if isinstance(pair[0], int)]
            assert all(said == is_ for said, is_ in sizes), var.name
            known[var.name] = each
    return [known[var.name] for var in function.outputs]
