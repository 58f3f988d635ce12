"""Brings a state dict to a model's names, or says in one line how the two differ and what would make them fit."""

from __future__ import annotations

import json
import logging
import math
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import InvalidArgument
from .contents import first

__all__ = ["classes_in", "named_as", "require_fit", "without_prefixes"]

_log = logging.getLogger(__name__)
_State = dict[str, torch.Tensor]
# torch.optim.swa_utils.AveragedModel counts its updates beside the weights.
_COUNTERS = ("n_averaged",)


def without_prefixes(state: _State, wanted: Mapping[str, Any]) -> tuple[_State, str]:
    """Return the state without what wrappers put before every name ("module.", "model.", "_orig_mod."), and that."""
    removed = ""
    while True:
        rest = {name: tensor for name, tensor in state.items() if name not in _COUNTERS or name in wanted}
        heads = {name.partition(".")[0] for name in rest if "." in name}
        mine = {name.partition(".")[0] for name in wanted}
        known = heads <= mine and any(name in wanted for name in rest)
        if len(heads) != 1 or not all("." in name for name in rest) or known:
            return state, removed
        (head,) = heads
        state, removed = {name.partition(".")[2]: tensor for name, tensor in rest.items()}, f"{removed}{head}."


def classifiers_of(model: nn.Module) -> tuple[str, ...]:
    """Return timm's names of a model's classifiers, there or not."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier")
    return (names,) if isinstance(names, str) else tuple(names or ())


def classes_in(state: Mapping[str, torch.Tensor], model: nn.Module) -> int | None:
    """Return the number of classes of a state's classifier, by its shape; None if it has none."""
    weights = [state[name] for name in (f"{each}.weight" for each in classifiers_of(model)) if name in state]
    found = {len(weight) for weight in weights if weight.ndim >= 2}
    return found.pop() if len(found) == 1 else None


@dataclass(frozen=True)
class _Difference:
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    shapes: tuple[str, ...]
    kinds: tuple[str, ...]

    @classmethod
    def of(cls, state: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> _Difference:
        both = [name for name in wanted if name in state]
        return cls(
            tuple(name for name in wanted if name not in state),
            tuple(name for name in state if name not in wanted),
            tuple(name for name in both if state[name].shape != wanted[name].shape),
            tuple(n for n in both if state[n].is_floating_point() != wanted[n].is_floating_point()),
        )

    @property
    def exists(self) -> bool:
        """Whether there is any."""
        return any((self.missing, self.unexpected, self.shapes, self.kinds))

    @property
    def names(self) -> int:
        """How many names one has and the other has not."""
        return len(self.missing) + len(self.unexpected)


def named_as(state: _State, model: nn.Module, source: str) -> tuple[_State, str]:
    """Return the state under the model's names, as far as it has them, and the prefix that was removed.

    Names and layouts of the original publications are converted as timm does when it fetches weights.

    Args:
        state: tensors by name.
        model: the model, which may be on the meta device, with any number of classes.
        source: the file's name, for a warning.
    """
    wanted = model.state_dict()
    stripped, prefix = without_prefixes(state, wanted)
    difference = _Difference.of(stripped, wanted)
    converted = _converted(stripped, model) if difference.names else None
    if converted is None or _Difference.of(converted, wanted).names >= difference.names:
        return stripped, prefix
    # timm resamples a position embedding of another size in silence; another number of classes is its user's.
    if any(_resampled(stripped[name], converted.get(name)) for name in {*difference.shapes} - _of_head(model)):
        return stripped, prefix
    left = [name for name in stripped if name not in converted]
    if left and sum(map(torch.numel, converted.values())) < sum(map(torch.numel, stripped.values())):
        warnings.warn(
            f"path: expected the parameters of timm's {type(model).__name__}, got others in {source}, which timm "
            f"converts or leaves out: {first(left)}",
            stacklevel=4,
        )
    return converted, prefix


def require_fit(
    raw: _State,
    state: _State,
    prefix: str,
    model: nn.Module,
    source: str,
    *,
    name: str,
    rebuilt: Callable[[Mapping[str, Any]], nn.Module],
) -> None:
    """Refuse a state that does not fit the model in names, shapes and kinds of numbers.

    Args:
        raw: the state as the file has it.
        state: what ``named_as`` made of it, and ``prefix``.
        prefix: what was removed before every name.
        model: the model, which may be on the meta device.
        source: the file's name, for the text.
        name: the model's name.
        rebuilt: returns the model with more arguments, without memory; it may raise InvalidArgument.

    Raises:
        InvalidArgument: it does not; the text counts what differs, names the first, and the argument that would fit.
    """
    wanted = model.state_dict()
    difference = _Difference.of(state, wanted)
    if difference.exists:
        raise InvalidArgument(
            f"path: expected the parameters of {name!r}, got others in {source}: "
            f"{_text(difference, state, wanted)}; {_advice(difference, raw, state, model, prefix, rebuilt)}"
        )


def _converted(state: _State, model: nn.Module) -> _State | None:
    """Return what timm makes of the state of another program, or None if it makes nothing of it."""
    # timm keeps one such function beside each model that has weights of another layout.
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return None
    try:
        found = dict(convert(dict(state), model))
    except Exception as error:  # it was written for the layouts it knows, and may raise anything at others
        _log.debug("state dict not converted by timm: %s", error)
        return None
    return found if all(isinstance(tensor, torch.Tensor) for tensor in found.values()) else None


def _resampled(raw: torch.Tensor, made: torch.Tensor | None) -> bool:
    """Return whether a tensor has other values than the raw one, which may be of another shape or begin with more."""
    return made is not None and not torch.equal(made.flatten(), raw.flatten()[-made.numel() :])


def _of_head(model: nn.Module) -> set[str]:
    return {f"{name}.{part}" for name in classifiers_of(model) for part in ("weight", "bias")}


def _text(difference: _Difference, state: _State, wanted: Mapping[str, torch.Tensor]) -> str:
    parts = [
        f"{len(names)} {what} ({first(names)})"
        for what, names in (("missing", difference.missing), ("unexpected", difference.unexpected))
        if names
    ]
    if difference.shapes:
        shapes = [f"{n} {tuple(state[n].shape)} for {tuple(wanted[n].shape)}" for n in difference.shapes]
        parts.append(f"{len(shapes)} of another shape ({first(shapes)})")
    if difference.kinds:
        parts.append(f"{len(difference.kinds)} of another type ({first(difference.kinds)})")
    return ", ".join(parts)


def _advice(
    difference: _Difference,
    raw: _State,
    state: _State,
    model: nn.Module,
    prefix: str,
    rebuilt: Callable[[Mapping[str, Any]], nn.Module],
) -> str:
    """Return what to do instead, as far as names and shapes tell."""
    wanted = model.state_dict()
    flags = _flags(difference, state, model)
    if flags and _fits(state, flags, rebuilt):
        arguments = ", ".join(f"{name}={value}" for name, value in flags.items())
        classes = [f"--num-classes {flags['num_classes']}"] if "num_classes" in flags else []
        rest = json.dumps({name: value for name, value in flags.items() if name != "num_classes"})
        options = [*classes, *([f"--model-kwargs '{rest}'"] if rest != "{}" else [])]
        return f"pass {arguments} ({' '.join(options)})"
    heads: dict[str, list[str]] = {}
    for name in raw if not prefix else ():
        head, dot, rest = name.partition(".")
        if dot and rest in wanted:
            heads.setdefault(head + dot, []).append(name)
    head, mine = max(heads.items(), key=lambda each: len(each[1]), default=("", []))
    if len(mine) > len(wanted) / 2:
        others = [name for name in raw if name not in {*mine}]
        return (
            f"{len(mine)} names begin with {head!r}, others do not ({first(others)}): keep these alone, "
            f"torch.save({{n[{len(head)}:]: t for n, t in state.items() if n.startswith({head!r})}}, FILE)"
        )
    removed = f" (every name began with {prefix!r}, which was left out)" if prefix else ""
    if sum(name in wanted for name in state) < len(wanted) / 10:
        return f"it is of another architecture{removed}"
    return f"pass the name and all arguments that its model was built with (--model NAME --model-kwargs JSON){removed}"


def _fits(state: _State, flags: Mapping[str, Any], rebuilt: Callable[[Mapping[str, Any]], nn.Module]) -> bool:
    try:
        return not _Difference.of(state, rebuilt(flags).state_dict()).exists
    except InvalidArgument:
        return False


def _flags(difference: _Difference, state: _State, model: nn.Module) -> dict[str, int]:
    """Return the arguments by which the model would take these shapes."""
    built: Any = model
    wanted, config = model.state_dict(), getattr(model, "pretrained_cfg", None) or {}
    found: dict[str, int] = {}
    of_head, classes = _of_head(model), classes_in(state, model)
    if classes is not None and of_head & {*difference.shapes, *difference.unexpected}:
        found["num_classes"] = classes
    elif {*difference.missing} and {*difference.missing} <= of_head and not difference.unexpected:
        found["num_classes"] = 0
    first_conv = f"{config.get('first_conv')}.weight"
    if first_conv in difference.shapes and state[first_conv].ndim == 4:
        mine, theirs = state[first_conv].shape, wanted[first_conv].shape
        if mine[1] != theirs[1]:
            found["in_chans"] = mine[1]
        if mine[2] != theirs[2]:
            found["patch_size"] = mine[2]
    blocks = [_modules(each).get("blocks", 0) for each in (state, wanted)]
    if 0 < blocks[0] != blocks[1] > 0:
        found["depth"] = blocks[0]
    # A convolutional stem has none.
    grid = getattr(getattr(built, "patch_embed", None), "grid_size", None)
    if "pos_embed" in difference.shapes:
        if grid is not None and state["pos_embed"].ndim == 3:
            patches = state["pos_embed"].shape[1] - (wanted["pos_embed"].shape[1] - math.prod(grid))
            side = math.isqrt(max(0, patches))
            found["img_size"] = side * int(found.get("patch_size", built.patch_embed.patch_size[0]))
    elif "patch_size" in found and grid is not None:
        found["img_size"] = found["patch_size"] * grid[0]
    return found


def _modules(state: Mapping[str, Any]) -> dict[str, int]:
    """Return how many numbered modules each list of them has, by the list's name."""
    found: dict[str, int] = {}
    for name in state:
        parts = name.split(".")
        if len(parts) > 2 and parts[1].isdecimal() and len(parts[1]) < 5:
            found[parts[0]] = max(found.get(parts[0], 0), int(parts[1]) + 1)
    return found
