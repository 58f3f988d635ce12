"""load_dense: the model of a checkpoint as people have it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import nn

from .. import check, core
from ..errors import Error, InvalidArgument
from ..exports.native import load
from ..files import documents
from ..plans.plan import Plan
from ..runtime import generators
from ..statistics.statistics import Statistics
from ..timm_models import DESCRIBING, ENTRY_POINTS
from .compare import classes_in, named_as, require_fit
from .contents import Contents, is_own, read
from .description import Description, checked_arguments, described, from_settings, said_by

__all__ = ["built", "load_dense", "loaded", "source_of", "stated"]

_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
_SOURCES = {"hf-hub": "hf-hub", "hf_hub": "hf-hub", "local-dir": "local-dir"}
_MOST_PARAMETERS = 1 << 36


def load_dense(
    path: str | Path,
    *,
    model: str | Path | Plan | Statistics | None = None,
    num_classes: int | None = None,
    use_ema: bool = False,
    **arguments: Any,
) -> nn.Module:
    """Load the model of a checkpoint as it is, in evaluation mode on the CPU: every parameter of it, or none.

    Nothing in the file is run: it is read by ``torch.load(weights_only=True)``, with argparse.Namespace, in which
    timm's train.py keeps its arguments, as the one class let in. A file that needs others is refused, with the line
    that converts it.

    Args:
        path: a ``.pth``, ``.pt``, ``.pth.tar``, ``.ckpt``, ``.bin`` or ``.safetensors`` file: a state dict, a
            checkpoint of timm's train.py, of Lightning and other training programs, or a file of ``save``; or a folder
            with timm's config.json; or "hf-hub:NAME" or "local-dir:FOLDER", as timm names them. Prefixes that all
            names have ("module.", "model.", "_orig_mod.") are left out.
        model: which model it is, where the file does not say: a timm name, or a file of secateur that is about the
            model (a plan, statistics, a pruned model), or a plan or statistics themselves.
        num_classes: number of classes; by default what the shape of the classifier says.
        use_ema: take the moving average of the weights ("state_dict_ema", "model_ema").
        arguments: more arguments of timm.create_model, such as ``img_size``; they go before those in the file.

    Raises:
        InvalidArgument: no such file, or one that is damaged, of another kind, needs classes or does not say its model;
            or its parameters are not the model's in names and shapes: the text names them, and says what to pass.
    """
    if num_classes is not None:
        check.integer("num_classes", num_classes, 0)
        arguments = {**arguments, "num_classes": num_classes}
    return loaded(path, None if model is None else stated(model), arguments, use_ema=use_ema)


def stated(model: object) -> Description:
    """Return the description that an argument ``model`` stands for.

    Raises:
        InvalidArgument: a name that timm does not know, or a file that says nothing about a model.
    """
    if isinstance(model, (Plan, Statistics)):
        return described(model, f"a {type(model).__name__}")
    if isinstance(model, Path) or (isinstance(model, str) and not timm.is_model(model) and Path(model).is_file()):
        found = said_by(model)
        if found is None:
            raise InvalidArgument(f"model: expected a plan, statistics or model file of secateur, got {str(model)!r}")
        return found
    if not isinstance(model, str) or (source_of(model) is None and not timm.is_model(model)):
        raise InvalidArgument(f"model: expected a model that timm can build, got {model!r}")
    name, _, tag = model.partition(".") if source_of(model) is None else (model, "", "")
    return Description(name, {}, "its name", tag or None, from_file=False)


def source_of(name: object) -> str | None:
    """Return "hf-hub" or "local-dir" where a name begins with it, in a spelling that timm takes, else None."""
    prefix, colon, _ = str(name).partition(":")
    return _SOURCES.get(prefix.lower()) if colon else None


@torch.inference_mode(False)  # inference tensors cannot be trained
def loaded(
    path: str | Path,
    model: Description | None,
    arguments: Mapping[str, Any],
    *,
    use_ema: bool = False,
    like: Description | None = None,
) -> nn.Module:
    """Load a checkpoint as ``load_dense`` does; ``like`` describes its model unless ``model`` or the file does.

    Raises:
        InvalidArgument: as ``load_dense``.
    """
    kind = source_of(path)
    if kind is not None or Path(path).is_dir():
        if model is not None or use_ema:
            raise InvalidArgument(f"path: expected neither model nor use_ema (--use-ema) with {str(path)!r}, got one")
        return _from_hub(str(path), arguments) if kind == "hf-hub" else _from_folder(str(path), arguments)
    path = Path(path)
    if not path.is_file():
        raise InvalidArgument(f"path: expected a checkpoint, got {path}, which is not a file")
    if is_own(path):
        if model is not None or arguments or use_ema:
            raise InvalidArgument(
                "path: expected a plain state dict with --model, --num-classes, --model-kwargs or --use-ema, got a "
                "file of secateur's own, which says them"
            )
        return load(path)
    held = read(path, use_ema=use_ema)
    found = _chosen(held, path.name, model, like)
    found.require()
    return _filled(held.state, found, arguments, path.name)


def _chosen(held: Contents, source: str, model: Description | None, like: Description | None) -> Description:
    """Return the model of a checkpoint: what the user says goes before other files, and these before the checkpoint."""
    if model is not None and source_of(model.name) is not None:
        raise InvalidArgument(
            f"model: expected a timm name for {source}, got {model.name!r}, whose weights are its own"
        )
    before = model or (like if like is not None and like.problem is None else None)
    own = from_settings(held.architecture, held.settings, source, name=None if before is None else before.name)
    if before is not None:
        # What a plan or a model file says is whole; a name says no arguments.
        of_name = own is not None and not before.from_file
        arguments = own.arguments if own is not None and of_name else before.arguments
        return replace(before, arguments=arguments, data={} if own is None else own.data)
    found = own or like
    if found is None:
        said = "" if held.architecture is None else f" but {held.architecture[:80]!r}, which timm does not know"
        raise InvalidArgument(f"model: expected a timm name (--model NAME), since {source} names none{said}")
    return found


def _filled(state: dict[str, torch.Tensor], said: Description, given: Mapping[str, Any], source: str) -> nn.Module:
    """Build the model and load the state, after the two were compared without memory for the model."""
    arguments = {**said.arguments, **given}
    empty = built(said, arguments, device="meta")
    named, prefix = named_as(state, empty, source)
    classes = classes_in(named, empty)
    if "num_classes" not in given and classes not in (None, empty.num_classes):
        arguments["num_classes"] = classes
        empty = built(said, arguments, device="meta")
    require_fit(
        state,
        named,
        prefix,
        empty,
        source,
        name=said.name,
        rebuilt=lambda more: built(said, {**arguments, **more}, device="meta"),
    )
    model = built(said, arguments)
    model.load_state_dict(named, strict=True)
    return model.eval()


@core.host_by_default()
def built(
    said: Description, arguments: Mapping[str, Any], *, pretrained: bool = False, device: str | None = None
) -> nn.Module:
    """Build a model by timm, on the CPU; random weights are the same in every process.

    Raises:
        InvalidArgument: timm cannot build it, or it would be larger than any model.
    """
    name = said.weights_name if pretrained else said.name
    where: dict[str, Any] = {} if device is None else {"device": torch.device(device)}
    overlay = dict(said.data) or None
    try:
        # What one command makes of random weights, another finds again.
        with generators.kept():
            torch.default_generator.manual_seed(0)
            model: nn.Module = timm.create_model(
                name, pretrained=pretrained, pretrained_cfg_overlay=overlay, **arguments, **where
            )
    except Exception as error:  # timm, the hub and the network raise what they like; it is this model that failed
        text = " ".join(str(error).split())
        raise InvalidArgument(f"model: expected a model that timm can build, got {name!r} ({text})") from error
    size = sum(parameter.numel() for parameter in model.parameters())
    if size > _MOST_PARAMETERS:
        raise InvalidArgument(f"model: expected at most {_MOST_PARAMETERS:,} parameters, got {size:,} by {said.source}")
    return model


def _from_folder(path: str, given: Mapping[str, Any]) -> nn.Module:
    """Load a folder of timm's: a config.json, and weights."""
    folder = Path(_identifier(path) if source_of(path) else path)
    if not folder.is_dir():
        raise InvalidArgument(f"path: expected a folder with timm's config.json, got {folder}, which is not a folder")
    config = folder / "config.json"
    if not config.is_file():
        raise InvalidArgument(f"path: expected a folder with timm's config.json, got {folder}, which has none")
    said = _configured(_read_config(config, f"{folder.name}/config.json"), f"{folder.name}/config.json")
    weights = next((folder / each for each in _WEIGHTS if (folder / each).is_file()), None)
    if weights is None:
        raise InvalidArgument(f"path: expected a folder with {' or '.join(_WEIGHTS[:2])}, got {folder} with neither")
    # timm reads the configuration once more: what it says about images belongs to the model.
    named = replace(said, name=f"local-dir:{folder}", arguments={})
    return _filled(read(weights).state, named, given, f"{folder.name}/{weights.name}")


def _from_hub(name: str, given: Mapping[str, Any]) -> nn.Module:
    """Load a model of a hub: its files are those of a folder, and are read as these are."""
    repository, _, revision = _identifier(name).partition("@")

    def fetched(file: str) -> Path:
        return Path(hf_hub_download(repository, file, revision=revision or None))

    try:
        fields = _read_config(fetched("config.json"), f"config.json of {name}")
        said = _configured(fields, f"config.json of {name}")
        file = str((fields.get("pretrained_cfg") or fields).get("hf_hub_filename") or _WEIGHTS[1])
        try:
            weights = fetched(_as_safetensors(file))
        except EntryNotFoundError:
            weights = fetched(file)
    except Error:
        raise
    except Exception as error:  # the hub and the network raise what they like
        text = " ".join(str(error).split())
        raise InvalidArgument(f"path: expected a timm model of a hub, got {name!r} ({text:.300})") from error
    return _filled(read(weights).state, replace(said, name=name, arguments={}), given, name)


def _as_safetensors(file: str) -> str:
    """Return what timm's hub calls the safetensors file beside a file of weights."""
    if not file.endswith(".bin"):
        return file
    return f"{file.removesuffix('.bin').replace('pytorch_model', 'model')}.safetensors"


def _identifier(name: str) -> str:
    """Return what follows the source in a name.

    Raises:
        InvalidArgument: nothing does.
    """
    found = name.partition(":")[2]
    if not found:
        raise InvalidArgument(f"path: expected a name after {name!r}, got none")
    return found


def _read_config(path: Path, source: str) -> dict[str, Any]:
    """Return the entries of a config.json.

    Raises:
        InvalidArgument: it is damaged, or no object.
    """
    try:
        fields = documents.read_json(path)
    except (ValueError, OSError) as error:
        raise InvalidArgument(f"path: expected timm's config.json, got {source} ({error})") from error
    if not isinstance(fields, dict):
        raise InvalidArgument(f"path: expected an object in {source}, got {type(fields).__name__}")
    return fields


def _configured(fields: Mapping[str, Any], source: str) -> Description:
    """Return what timm's config.json says.

    Raises:
        InvalidArgument: it is another program's, names a model that timm does not have, or has other arguments.
    """
    architecture = fields.get("architecture")
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        others = fields.get("architectures")
        found = f"transformers' for {others[0]}" if isinstance(others, list) and others else f"{architecture!r}"
        raise InvalidArgument(
            f"path: expected timm's config.json with an architecture of timm, got {found:.120} in {source}"
        )
    arguments = fields.get("model_args") or {}
    if not isinstance(arguments, dict):
        raise InvalidArgument(
            f"path: expected model_args in {source} that are an object, got {type(arguments).__name__}"
        )
    if architecture in ENTRY_POINTS:
        # What describes the cut is checked where it is applied; the dense model's arguments are among it.
        dense = arguments.get("arguments")
        beside = {name: value for name, value in arguments.items() if name not in DESCRIBING}
        arguments = {**(dense if isinstance(dense, dict) else {}), **beside}
    return Description(architecture, checked_arguments(arguments, source), source)
