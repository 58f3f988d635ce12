"""Saves a pruned model in one self-describing .safetensors file: how to build it, and its weights."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import timm
import torch
from torch import nn

from .. import check, core
from ..anatomy import tensor_of
from ..data.model_input import input_dtype
from ..errors import Error, InvalidArgument
from ..families.base import classifiers
from ..families.classes import decoded, encoded
from ..families.registry import family_named, family_of
from ..files import container
from ..surgery.structure import Structure
from ..timm_models import ENTRY_POINTS
from .base import Checked, Exporter, ExportReport, largest_difference, register
from .changes import Changes, difference_of, settings_of

# Entries about the source of weights, which are dropped: a pruned model must never be taken for the dense one.
_WEIGHT_SOURCES = ("url", "file", "hf_hub_id", "hf_hub_filename", "source", "state_dict", "custom_load")
# A block takes memory even without weights.
_MAX_DEPTH = 512
# Where the dense model has to be built for its buffers.
_MOST_LARGER = 200


def save(
    model: nn.Module,
    path: str | Path,
    *,
    factory: tuple[str, Mapping[str, Any]] | None = None,
    head: Literal["keep", "omit"] = "keep",
) -> None:
    """Write the model, pruned or dense, to one file from which ``load`` rebuilds it. Nothing is pickled.

    Before anything is written, the model is rebuilt without weights, as ``load`` will, and compared. What was changed
    by hand since the model was built comes back as well: a linear classifier, fewer blocks, other input channels, norms
    and activations that were replaced or removed, dropout and drop-path rates, switches such as ``fused_attn``.

    Args:
        model: a supported model, on any device.
        path: the file; it is written completely or not at all.
        factory: for a model that was not made by ``timm.create_model``: how to build its dense form, as (name, kwargs),
            where name is a timm model name or "VisionTransformer" or "VisionTransformerDistilled". Arguments may be
            classes of norms, activations and layers of torch and timm, or ``functools.partial`` of them.
        head: "omit" writes the model without its classifier, for one that a file cannot hold; it comes back with an
            Identity, to be put in place again by the caller.

    Raises:
        InvalidArgument: the recorded arguments or the factory build another model (a module or a setting was changed by
            hand that a file cannot hold), they cannot be written as JSON, or the folder does not exist.
        Unsupported: the model is not of a supported family.
    """
    path = check.writable("path", path)
    if head not in ("keep", "omit"):
        raise InvalidArgument(f"head: expected 'keep' or 'omit', got {head!r}")
    if head == "omit":
        model = _headless(model)
    family_of(model)
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            where = name or "the model itself"
            warnings.warn(
                f"model: expected no forward hooks, which a file cannot hold, got some at {where}; saved without them",
                stacklevel=2,
            )
            break
    header, tensors = described(model, factory)
    container.write(path, "model", header, tensors)


def described(model: nn.Module, factory: Any = None) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return what a file says of a model, after the model was rebuilt from that and compared, and its tensors.

    Raises:
        InvalidArgument: as ``save``.
        Unsupported: as ``save``.
    """
    family = family_of(model)
    anatomy = family.inspect(model)
    tensors = model.state_dict()
    # Buffers that were cut cannot be recomputed.
    tensors |= {name: tensor_of(model, name) for name in anatomy.buffers if name not in tensors}
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise InvalidArgument(f"model: expected weights, got none in {name} (device meta)")
    architecture, arguments = anatomy.architecture, anatomy.arguments
    handmade = factory is not None or anatomy.handmade
    if handmade:
        architecture, arguments = _checked(factory or getattr(model, "secateur_factory", None), architecture)
    written: dict[str, Any] = {}
    for argument, value in arguments.items():
        try:
            written[argument] = encoded(value)
        except ValueError as error:
            raise InvalidArgument(
                f"factory: expected (name, kwargs) of JSON values or classes of norms, activations and layers of torch "
                f"and timm, got {argument} = {error}"
            ) from error
    dense = _built(anatomy.family, architecture, written)
    now, then = family.arguments(model), family.arguments(dense)
    changed = {name: encoded(value) for name, value in now.items() if then.get(name) != value}
    if changed:
        written |= changed
        dense = _built(anatomy.family, architecture, written)
    heads = classifiers(model)
    for name in heads:
        module = model.get_submodule(name)
        if type(module) not in (nn.Linear, nn.Identity, type(dict(dense.named_modules()).get(name))):
            raise InvalidArgument(
                f"model: expected a linear layer at {name}, got {type(module).__name__}, which a file cannot hold; "
                f"save(…, head='omit'), and put it back after loading"
            )
    absent = {name for group in family.inspect(dense).groups if group.name in anatomy.absent for name in group.modules}
    changes = Changes.of(model, dense, heads, absent)
    changes.replace(dense)
    structure = Structure.of(model, anatomy, dict(dense.named_parameters()))
    header = {
        "family": anatomy.family,
        "architecture": architecture,
        "arguments": written,
        "handmade": handmade,
        **structure.to_dict(),
        "changes": changes.to_dict(),
        "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
        "pretrained_cfg": _of_dense(without_sources(getattr(model, "pretrained_cfg", None)), architecture),
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
    }
    recorded = f"model: expected what {architecture} with its recorded arguments is"
    try:
        rebuilt = skeleton(header)
    except InvalidArgument as error:
        raise InvalidArgument(f"{recorded}, got one that they cannot be cut to ({error})") from error
    changes = replace(changes, settings=settings_of(model, rebuilt))
    changes.set(rebuilt)
    header["changes"] = changes.to_dict()
    difference = difference_of(model, rebuilt)
    if difference:
        raise InvalidArgument(
            f"{recorded}, got {difference}; put back what it builds before saving, and change it again after loading"
        )
    return header, tensors


@torch.inference_mode(False)  # inference tensors cannot be trained
def load(path: str | Path, *, verify: bool = True) -> nn.Module:
    """Rebuild a model that ``save`` wrote, on the CPU, bit for bit, in evaluation mode.

    Args:
        path: the file.
        verify: also check the weights against their checksum, in addition to the header and the table of tensors.

    Raises:
        InvalidArgument: no such file, or one that is truncated or damaged, another program's, or of a newer format.
        Unsupported: the installed timm does not know the architecture.
    """
    header, tensors = container.read(path, "model", verify=verify)
    expected = f"{Path(path).name}: expected a model that timm {timm.__version__} can build"
    try:
        with container.understood(expected):
            model = skeleton(header)
            frozen, config, handmade = set(header["frozen"]), header["pretrained_cfg"], header["handmade"]
    except InvalidArgument as error:
        raise InvalidArgument(f"{expected}, got {str(error).removeprefix(f'{expected}, got ')}") from error
    built = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    buffers = {name: tuple(b.shape) for name, b in model.named_buffers() if name in tensors and name not in built}
    built |= buffers
    for name in sorted(built.keys() | tensors.keys()):
        found = tuple(tensors[name].shape) if name in tensors else None
        if built.get(name) != found:
            raise InvalidArgument(f"{expected}, got {name} of shape {found} where it builds {built.get(name)}")
    model.load_state_dict({n: t for n, t in tensors.items() if n not in buffers}, strict=True, assign=True)
    for name in buffers:
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, tensors[name])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    _compute_buffers(model, header)
    if config is not None:
        restored: Any = decoded(config)
        model.pretrained_cfg = model.default_cfg = restored
    if handmade:
        factory: Any = (header["architecture"], decoded(header["arguments"]))
        model.secateur_factory = factory
    return model.eval()


def _compute_buffers(model: nn.Module, header: Mapping[str, Any]) -> None:
    """Set buffers that are not part of the state, such as position indices, to the dense model's values."""
    missing = {name for name, buffer in model.named_buffers() if buffer.is_meta}
    if not missing:
        return
    described = header["family"], header["architecture"], header["arguments"]
    # A file may describe a far larger model than the one it holds.
    size, held = (sum(p.numel() for p in each.parameters()) for each in (_built(*described), model))
    if size > _MOST_LARGER * held:
        raise InvalidArgument(
            f"arguments: expected a dense model of at most {_MOST_LARGER} times what the file holds, got {size:,} "
            f"parameters for {held:,}"
        )
    dense = dict(_built(*described, device="cpu").named_buffers())
    for name in missing:
        module, _, leaf = name.rpartition(".")
        buffer = dense[name]
        # Cast like the weights, as Module.to does.
        cast = buffer.to(input_dtype(model)) if buffer.is_floating_point() else buffer
        setattr(model.get_submodule(module), leaf, cast)


def _headless(model: nn.Module) -> nn.Module:
    """Return the model with Identity as classifier; modules and weights are shared, nothing is changed."""
    bare = copy.copy(model)
    names = classifiers(model)
    bare._modules = dict(model._modules)
    for name in names:
        parent, module = bare, model
        *path, leaf = name.split(".")
        for step in path:
            # A copy of what holds the classifier, so that the model keeps its own.
            module = module.get_submodule(step)
            shallow = copy.copy(module)
            shallow._modules = dict(module._modules)
            parent._modules[step] = shallow
            parent = shallow
        parent._modules[leaf] = nn.Identity()
    return bare


def _checked(factory: Any, architecture: str) -> tuple[str, Mapping[str, Any]]:
    if factory is None:
        raise InvalidArgument(
            f"factory: expected (name, kwargs) that build the dense {architecture}, got none; "
            "timm.create_model records them, a model built by hand does not"
        )
    if not isinstance(factory, (tuple, list)) or len(factory) != 2 or not isinstance(factory[1], Mapping):
        raise InvalidArgument(f"factory: expected (name, kwargs), got {factory!r}")
    return str(factory[0]), factory[1]


@core.host_by_default()
def skeleton(header: Mapping[str, Any], device: str | torch.device = "meta") -> nn.Module:
    """Build the model of a header, without weights on the meta device, elsewhere with initial values.

    Raises:
        InvalidArgument: a header that cannot be.
        Unsupported: an architecture or a family that is not known.
    """
    model = _built(header["family"], header["architecture"], header["arguments"], device)
    try:
        changes = Changes.from_dict(header.get("changes", {}))
        changes.replace(model)
        Structure.from_dict(header).apply(model)
        changes.set(model)
    except Error:
        raise
    except Exception as error:  # sizes from a file may be anything
        raise InvalidArgument(f"arguments: expected those of {header['architecture']}, got {error}") from error
    return model.eval()


@core.host_by_default()
def _built(
    family: str, architecture: str, arguments: Mapping[str, Any], device: str | torch.device = "meta"
) -> nn.Module:
    """Build the dense model, without weights by default."""
    arguments = {name: decoded(value) for name, value in arguments.items()}
    depth = arguments.get("depth", 1)
    if isinstance(depth, (int, float)) and depth > _MAX_DEPTH:
        raise InvalidArgument(f"arguments: expected a depth of at most {_MAX_DEPTH}, got {depth}")
    try:
        return family_named(family).build(architecture, arguments, torch.device(device))
    except Error:
        raise
    except Exception as error:  # timm's constructors can raise anything
        raise InvalidArgument(f"arguments: expected those of {architecture}, got {error}") from error


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def without_sources(config: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return timm's configuration as far as JSON can hold it, without where the dense weights are."""
    if not config:
        return None
    return {name: value for name, value in config.items() if name not in _WEIGHT_SOURCES and _is_json(value)}


def _of_dense(config: dict[str, Any] | None, architecture: str) -> dict[str, Any] | None:
    # That of a model that timm built from a folder names secateur's entry point.
    return config | {"architecture": architecture} if config and config.get("architecture") in ENTRY_POINTS else config


@dataclass(frozen=True)
class Options(Checked):
    """Options of the format "native"."""

    factory: Any = field(default=None, metadata={"help": "how to build the dense model, as for save"})


@register
class Native(Exporter):
    """secateur's own file, which ``save`` writes and ``load`` reads."""

    name = "native"
    Options: ClassVar[type] = Options

    def export(self, model: nn.Module, path: Path, options: Any) -> ExportReport:
        """Write the file, load it, and compare the two models bit for bit.

        Raises:
            InvalidArgument: as ``save``.
            Error: the loaded model computes something else.
        """
        save(model, path, factory=options.factory)
        difference = largest_difference(model, load(path), options.batch_sizes, "secateur")
        if difference > 0:
            raise Error(f"export: expected a loaded model of the same bits, got a difference of {difference:.3g}")
        version = f"format {container.FORMAT}"
        return ExportReport(
            self.name, (path,), path.stat().st_size, version, "secateur", options.batch_sizes, difference
        )
