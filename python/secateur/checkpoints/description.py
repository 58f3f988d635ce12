"""What a file says about its dense model: timm's name and arguments, taken only where they are plain and bounded."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
from timm.models import get_pretrained_cfg_value, is_model_pretrained

from ..anatomy.fingerprint import Fingerprint
from ..errors import InvalidArgument
from ..files import container, documents
from ..files.safetensors import read_table
from ..plans.plan import Plan
from ..statistics.statistics import Statistics
from .contents import table_of

__all__ = ["Description", "checked_arguments", "described", "from_settings", "said_by"]

# Arguments of timm.create_model that read files, fetch weights, or return something other than the model.
_REFUSED = {
    *("cache_dir", "checkpoint_path", "device", "dtype", "exportable", "feature_cls", "features_only", "model_name"),
    *("no_jit", "out_indices", "pruned", "scriptable"),
}
# Limits on what a file may ask for: far above any model, and a bound for hostile ones.
_MOST, _MOST_BLOCKS, _MOST_VALUES, _MOST_TEXT = 1 << 16, 512, 64, 200
# What programs call timm's arguments: timm's train.py, DeiT's main.py, and the usual hyper-parameters.
_NAMES = ("model", "model_name", "arch", "architecture", "backbone", "timm_model", "encoder", "name")
_ALIASES = {
    "num_classes": ("num_classes", "nb_classes", "n_classes"),
    "img_size": ("img_size", "image_size"),
    "in_chans": ("in_chans", "in_channels"),
    "global_pool": ("global_pool", "gp"),
    "drop_rate": ("drop_rate", "drop"),
    "drop_path_rate": ("drop_path_rate", "drop_path"),
    **{
        name: (name,)
        for name in (
            *("bn_momentum", "bn_eps", "class_token", "depth", "dynamic_img_size", "embed_dim", "init_values"),
            *("mlp_ratio", "num_heads", "patch_size", "reg_tokens", "window_size"),
        )
    },
}
_INTERPOLATIONS = ("bilinear", "bicubic", "nearest", "lanczos")
_OF_DATA = ("mean", "std", "interpolation", "crop_pct")


@dataclass(frozen=True)
class Description:
    """How to build a dense model: arguments of timm.create_model, and ``source``, what says so, for texts.

    ``problem`` says why a file about a model does not say this. ``data`` are entries of timm's pretrained_cfg about
    images. ``tag`` names timm's weights. Without ``from_file``, a user named the model, and gives arguments beside.
    """

    name: str
    arguments: Mapping[str, Any]
    source: str
    tag: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    problem: str | None = None
    from_file: bool = True

    @property
    def weights_name(self) -> str:
        """The name by which timm fetches the weights."""
        tagged = f"{self.name}.{self.tag}"
        return tagged if self.tag and is_model_pretrained(tagged) else self.name

    def require(self) -> None:
        """Refuse one that does not say how to build the model.

        Raises:
            InvalidArgument: it has a problem.
        """
        if self.problem is not None:
            raise InvalidArgument(f"model: expected a timm name (--model NAME), got {self.source}, {self.problem}")


def checked_arguments(given: Mapping[Any, Any], source: str) -> dict[str, Any]:
    """Return arguments from a file as timm.create_model takes them, without those that are None.

    Raises:
        InvalidArgument: one that is no argument of an architecture, not plain, or far beyond any model.
    """
    found = {}
    for name, value in given.items():
        if type(name) is not str or not name.isidentifier() or name in _REFUSED or name.startswith("pretrained"):
            raise InvalidArgument(f"arguments: expected those of an architecture, got {str(name)[:80]!r} in {source}")
        if value is not None:
            found[name] = _plain(value, name, source)
    return found


def _plain(value: Any, name: str, source: str, depth: int = 0) -> Any:
    if type(value) is bool or value is None:
        return value
    if type(value) in (int, float) and math.isfinite(value):
        blocks = type(value) is int and re.search("depth|layers", name) is not None
        if abs(value) <= (_MOST_BLOCKS if blocks else _MOST):
            return value
    elif type(value) is str and len(value) <= _MOST_TEXT and not value.startswith("<"):
        return value
    elif type(value) in (list, tuple) and len(value) <= _MOST_VALUES and depth < 2:
        return tuple(_plain(item, name, source, depth + 1) for item in value)
    elif type(value) is dict and len(value) <= _MOST_VALUES and depth < 2 and all(type(key) is str for key in value):
        return {key: _plain(item, name, source, depth + 1) for key, item in value.items()}
    shown = repr(value) if type(value) in (int, float, str) else type(value).__name__
    raise InvalidArgument(f"arguments: expected a plain value of {name}, got {shown[:80]} in {source}")


def described(value: Fingerprint | Plan | Statistics, source: str) -> Description:
    """Return what a fingerprint, or what has one, says."""
    if isinstance(value, Statistics):
        value = value.settings.fingerprint
    elif isinstance(value, Plan):
        value = value.fingerprint
    return _of(value.architecture, value.arguments, source, value.tag)


def said_by(path: str | Path) -> Description | None:
    """Return what a file of secateur says: a model, a plan, statistics or a latency table; None for any other file.

    Raises:
        InvalidArgument: a file of secateur that is damaged.
    """
    path = Path(path)
    kind = _kind(path)
    if kind == "statistics":
        return described(Statistics.load(path), path.name)
    if kind == "plan":
        return described(Plan.load(path), path.name)
    if kind != "model":
        return None
    header, _ = container.read(path, "model", verify=False)
    with container.understood(f"path: expected a secateur model file at {path.name}"):
        config = header["pretrained_cfg"] or {}
        return _of(str(header["architecture"]), dict(header["arguments"]), path.name, config.get("tag"))


def _kind(path: Path) -> str | None:
    """Return the kind of a file of secateur; None for any other."""
    try:
        with path.open("rb") as file:
            if file.read(1) == b"{":
                outer = documents.read_json(path)
            else:
                outer = container.parse(read_table(file)[0][container.KEY])
        kind = outer["secateur"] if "secateur" in outer else outer["kind"]
    except (ValueError, OSError, LookupError, TypeError):
        return None
    return kind if isinstance(kind, str) else None


def _of(architecture: str, arguments: Mapping[str, Any], source: str, tag: Any) -> Description:
    problem = None
    try:
        arguments = checked_arguments(arguments, source)
    except InvalidArgument as error:
        problem = f"which does not say it ({error})"
    if not timm.is_model(architecture):
        problem = f"which is about a model built by hand ({architecture[:80]})"
    return Description(architecture, arguments, source, tag if isinstance(tag, str) else None, problem=problem)


def from_settings(
    architecture: str | None, settings: tuple[dict[Any, Any], ...], source: str, *, name: str | None = None
) -> Description | None:
    """Return what the settings of a training program say, or None if no timm model is named.

    Settings are those of many programs, under the names that these use; values that are not plain are refused only
    where they would be used.

    Args:
        architecture: the name that the file has outside of its settings.
        settings: its tables, as ``contents.read`` returns them.
        source: what says so, for texts.
        name: the model that the user named; settings of another model are not taken.

    Raises:
        InvalidArgument: several models are named, or a value is not one that timm takes.
    """
    tables = [*settings]
    for table in settings:  # hyper-parameters in groups, as {"model": {"name": ...}}
        tables += [inner for inner in map(table_of, (table.get("model"), table.get("net"))) if inner is not None]
    every = (architecture, *(table.get(key) for table in tables for key in _NAMES))
    named = [each for each in every if isinstance(each, str) and _is_timm(each)]
    found = sorted(set(named), key=len, reverse=True)  # one with a tag says more
    if name is None and len({*map(_bare, found)}) > 1:
        raise InvalidArgument(
            f"model: expected one model in {source}, got {', '.join(found[:5])}: pass model= (--model NAME)"
        )
    if not found or (name is not None and _bare(name) not in map(_bare, found)):
        return None
    merged: dict[Any, Any] = {}
    for table in reversed(tables):
        merged |= {key: value for key, value in table.items() if type(key) is str and value is not None}
    size, given = _sizes(merged), {}
    for argument, aliases in _ALIASES.items():
        value = next((merged[alias] for alias in aliases if alias in merged), size.get(argument))
        if value is not None:
            given[argument] = value
    more = table_of(merged.get("model_kwargs"))
    arguments = checked_arguments({**given, **(more or {})}, source)
    bare, _, tag = (name or found[0]).partition(".")
    if not get_pretrained_cfg_value(bare, "fixed_input_size") and "img_size" not in (more or {}):
        arguments.pop("img_size", None)  # a size of images, and no argument of the model
    return Description(bare, arguments, source, tag or None, _of_data(merged))


def _is_timm(value: Any) -> bool:
    return type(value) is str and re.fullmatch(r"[\w.\-]{1,200}", value) is not None and timm.is_model(value)


def _bare(name: str) -> str:
    return name.partition(".")[0]


def _sizes(table: Mapping[Any, Any]) -> dict[str, Any]:
    """Return what ``input_size`` says: a side, or (channels, height, width)."""
    value: Any = table.get("input_size")
    if type(value) in (list, tuple) and len(value) == 3:
        return {"in_chans": value[0], "img_size": list(value[1:])}
    return {"img_size": value} if type(value) is int else {}


def _of_data(table: Mapping[Any, Any]) -> dict[str, Any]:
    """Return what the images were normalised and scaled by, where that is plain."""
    found: dict[str, Any] = {}
    for name in _OF_DATA:
        value: Any = table.get(name)
        if name in ("mean", "std") and type(value) in (list, tuple) and 0 < len(value) <= _MOST_VALUES:
            if all(type(each) in (int, float) and math.isfinite(each) for each in value):
                found[name] = tuple(float(each) for each in value)
        elif name == "crop_pct" and type(value) is float and 0 < value <= 1:
            found[name] = float(value)
        elif name == "interpolation" and type(value) is str and value in _INTERPOLATIONS:
            found[name] = value
    return found
