"""The checkpoint of a training run: what the next step needs, and how the run began, so that others are refused."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..data.model_input import images_in
from ..errors import InvalidArgument, Unsupported
from ..files import container

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

__all__ = ["Progress", "Settings", "length", "origin", "read", "state", "write"]

_KIND = "fine-tuning"


@dataclass(frozen=True)
class Settings:
    """What must not change between a checkpoint and its continuation, besides the settings of hooks."""

    steps: int
    opt: str
    lr: float
    min_lr: float
    warmup: int
    weight_decay: float
    clip_grad: float | None
    distilled: bool
    temperature: float
    alpha: float
    label_smoothing: float
    mixup: float
    cutmix: float
    ema: float | None
    amp: str | None
    ranks: int
    seed: int


@dataclass
class Progress:
    """The position of a run: ``batch`` batches into ``epoch``, whose losses so far sum to ``loss`` over ``images``."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    loss: float = 0.0
    images: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


def state(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and all buffers, including those that state_dict omits."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def origin(model: nn.Module, teacher: nn.Module | None, loader: Iterable[Any]) -> dict[str, Any]:
    """Describe how a run begins: digests of the weights, and what the loader tells about its batches."""
    batch_size = getattr(loader, "batch_size", None)
    return {
        "model": _digest(model),
        "teacher": None if teacher is None else _digest(teacher),
        "batches": length(loader),
        "batch_size": batch_size if isinstance(batch_size, int) else None,
        "images": images_in(loader),
    }


def length(loader: Iterable[Any]) -> int | None:
    """Return the number of batches in a pass, or None if the loader does not know."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return None


def write(
    path: Path,
    model: nn.Module,
    origin: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
    position: Mapping[str, Any],
    rest: Mapping[str, Any],
) -> None:
    """Write the file; ``rest`` holds nested values that may include tensors.

    Raises:
        Unsupported: ``rest`` holds other values.
    """
    tensors = {f"model.{name}": tensor for name, tensor in state(model).items()}
    header = {
        "origin": origin,
        "settings": settings,
        "progress": position,
        "rest": {key: _pack(value, tensors, key) for key, value in rest.items()},
    }
    container.write(path, _KIND, header, tensors)


def read(
    path: Path, model: nn.Module, origin: Mapping[str, Any] | None, settings: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Return the model's tensors, the position and the rest from a file that `write` wrote; nothing is changed.

    With ``origin`` None, any origin is accepted.

    Raises:
        InvalidArgument: the file is damaged, or belongs to another run, model, teacher or loader.
    """
    header, tensors = container.read(path, _KIND)
    with container.understood("resume: expected a checkpoint of this run"):
        return _matched(header, tensors, model, origin, settings)


def _matched(
    header: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    origin: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    # Without hooks, neither the file nor the settings have an entry for them.
    for name in {**settings, "hooks": None}:
        before, now = header["settings"].get(name), settings.get(name)
        if before != now:
            raise InvalidArgument(
                f"resume: expected a checkpoint of this run, got one with {name}={before!r} where it is {now!r} now"
            )
    mine = state(model)
    found = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    for name in sorted(mine.keys() | found.keys()):
        shapes = [tuple(each[name].shape) if name in each else None for each in (found, mine)]
        if shapes[0] != shapes[1]:
            raise InvalidArgument(
                f"resume: expected a checkpoint of this model, got {name} of shape {shapes[0]} "
                f"where the model has {shapes[1]}"
            )
    if origin is not None:
        _require(header.get("origin") or {}, origin)
    return found, header["progress"], {key: _unpack(value, tensors) for key, value in header["rest"].items()}


def _require(found: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of a run that began with other weights, another teacher or other batches."""
    for name in ("model", "teacher"):
        if found.get(name) != mine.get(name):
            raise InvalidArgument(
                f"resume: expected a checkpoint that began with this {name}, got one whose {name} had other weights"
            )
    for name in ("batches", "batch_size", "images"):
        before, now = found.get(name), mine.get(name)
        # A loader may not know some of it.
        if before is not None and now is not None and before != now:
            raise InvalidArgument(
                f"resume: expected a checkpoint of this loader, got one with {name}={before} where it is {now} now"
            )


def _digest(model: nn.Module) -> str:
    mine = state(model)
    lines = [f"{name} {mine[name].dtype} {value}" for name, value in container.digests(mine).items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _pack(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """Convert nested values to JSON that keeps tuples and integer keys; tensors become entries of ``tensors``."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _pack(item, tensors, f"{name}.{key}")] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_pack(item, tensors, f"{name}.{index}") for index, item in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": items}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    argument, what = ("hooks", "hooks") if name.startswith("hooks.") else ("opt", "an optimizer")
    raise Unsupported(f"{argument}: expected {what} whose state can be saved, got a {type(value).__name__} in {name}")


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unpack(item, tensors) for key, item in content}
    items = [_unpack(item, tensors) for item in content]
    return items if kind == "list" else tuple(items)
