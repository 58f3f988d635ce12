"""What a checkpoint holds: a state dict, wherever it is in the file, and the settings of the program that wrote it."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import Error, InvalidArgument
from ..files.container import KEY, little_endian
from ..files.pickled import is_pickled, read_pickled
from ..files.safetensors import MAX_TENSORS, read_table, read_tensors

__all__ = ["Contents", "first", "is_own", "read", "table_of"]

# Where programs put the weights, and their moving average, in the order of preference.
_STATES = ("state_dict", "model", "model_state_dict", "model_state", "module", "net", "weights")
_AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
_SETTINGS = ("args", "hyper_parameters", "hparams", "config")
_FIRST = 5


@dataclass(frozen=True)
class Contents:
    """A state dict, where in the file it was ("" for the whole file), and the settings that the file holds.

    ``settings`` are mappings as the file has them, of any values; ``architecture`` is timm's name of the model.
    """

    state: dict[str, torch.Tensor]
    place: str
    settings: tuple[dict[Any, Any], ...] = ()
    architecture: str | None = None


def first(names: Any) -> str:
    """Return the first five names in one line."""
    names = [str(name)[:80] for name in names]
    return ", ".join(names[:_FIRST]) + (", ..." if len(names) > _FIRST else "")


def is_own(path: Path) -> bool:
    """Return whether it is a safetensors file that secateur wrote, of any kind."""
    try:
        with path.open("rb") as file:
            return KEY in read_table(file)[0]
    except (ValueError, OSError):
        return False


def read(path: Path, *, use_ema: bool = False) -> Contents:
    """Read a file of torch.save or a safetensors file; nothing in it is run.

    Raises:
        InvalidArgument: it is neither, is damaged, needs classes, or has no state dict of dense tensors.
        Unsupported: this machine is big-endian.
    """
    expected = f"path: expected a checkpoint of torch.save or a .safetensors file, got {str(path)!r}"
    little_endian(path)
    try:
        with path.open("rb") as file:
            head = file.read(9)
        if not head:
            raise ValueError("it is empty")
        # By content, as suffixes vary; no pickle and no archive has this byte here.
        if head[8:] == b"{" or (path.suffix == ".safetensors" and not is_pickled(head)):
            with path.open("rb") as file:
                loaded = read_tensors(file, read_table(file)[1])
        elif is_pickled(head):
            loaded = read_pickled(path)
        else:
            raise ValueError("it is neither")
        found = _found(loaded, use_ema)
        _check(found.state, path.stat().st_size)
    except Error:
        raise
    except (ValueError, OSError, RuntimeError) as error:
        raise InvalidArgument(f"{expected} ({error})") from error
    return found


def table_of(value: Any) -> dict[Any, Any] | None:
    """Return the entries of a dict or a Namespace, by exact class; None for anything else."""
    if type(value) in (dict, OrderedDict):
        return dict(value)
    # Its own dict, whatever its entries are called.
    return dict(vars(value)) if type(value) is argparse.Namespace else None


def _found(loaded: Any, use_ema: bool) -> Contents:
    top = table_of(loaded)
    if top is None:
        raise ValueError(f"it holds a {type(loaded).__name__}, where a dict is expected")
    averages = [key for key in _AVERAGES if _is_state(top.get(key))]
    settings = tuple(table for table in (table_of(top.get(key)) for key in _SETTINGS) if table is not None)
    name = top.get("arch")
    architecture = name if type(name) is str else None
    if use_ema:
        if not averages:
            raise ValueError(
                f"it holds no moving average of the weights (state_dict_ema), only {first(top)}: leave out use_ema "
                "(--use-ema)"
            )
        return Contents(table_of(top[averages[0]]) or {}, averages[0], settings, architecture)
    if _is_state(top):
        return Contents(top, "")
    others = [key for key in top if _is_state(top[key])]
    key = next((key for key in _STATES if key in others), others[0] if len(others) == 1 else None)
    if key is not None and key not in averages:
        return Contents(table_of(top[key]) or {}, str(key), settings, architecture)
    hint = "; for the moving average pass use_ema=True (--use-ema)" if averages else ""
    raise ValueError(f"it holds no state dict, only {first(top) or 'nothing'}{hint}")


def _is_state(value: Any) -> bool:
    """Return whether it maps names to tensors; one that also holds other values is none."""
    table = table_of(value)
    return bool(table) and all(
        type(name) is str and isinstance(tensor, torch.Tensor) for name, tensor in (table or {}).items()
    )


def _check(state: dict[str, torch.Tensor], size: int) -> None:
    """Refuse tensors that are not plain numbers in memory, or that stand for more numbers than the file has.

    Raises:
        ValueError: there is one.
    """
    if len(state) > MAX_TENSORS:
        raise ValueError(f"it holds more than {MAX_TENSORS:,} tensors")
    total = 0
    for name, tensor in state.items():
        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
        if not plain or tensor.is_quantized or tensor.device.type != "cpu":
            raise ValueError(f"{name:.80}: expected a dense tensor with values, got another kind")
        bytes_held = tensor.numel() * tensor.element_size()
        total += bytes_held
        if bytes_held > tensor.untyped_storage().nbytes():
            raise ValueError(f"{name:.80}: it has a tensor of {tensor.numel():,} numbers that repeats fewer")
    # Tied parameters are there twice.
    if total > 2 * size:
        raise ValueError(f"it holds tensors of {total:,} bytes in a file of {size:,}")
