"""A folder as timm's own: config.json and model.safetensors, from which timm.create_model builds the pruned model."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import timm
import torch
from timm.models import PretrainedCfg, save_for_hf
from torch import nn

from ..data.model_input import data_config
from ..errors import Error, Unsupported
from ..families.base import classifiers
from ..runtime import generators
from ..timm_models import DESCRIBING, ENTRY_POINTS
from .base import Exporter, ExportReport, largest_difference, register, written_whole
from .changes import difference_of
from .native import Options, described, without_sources

__all__ = ["Hub"]

_FILES = ("config.json", "model.safetensors")
_CONFIG = {field.name for field in fields(PretrainedCfg)}


@register
class Hub(Exporter):
    """A folder for ``timm.create_model("local-dir:FOLDER")`` where secateur is imported, and to be put on a hub."""

    name = "hub"
    folder = True
    Options: ClassVar[type] = Options

    def export(self, model: nn.Module, path: Path, options: Any) -> ExportReport:
        """Write the folder, let timm build the model from it, and compare the two bit for bit.

        Raises:
            InvalidArgument: as ``save``.
            Unsupported: a family of a third party, weights of several types, or a buffer that sizes do not determine.
            Error: timm builds something else.
        """
        header, _ = described(model, options.factory)
        entry = next((name for name, family in ENTRY_POINTS.items() if family == header["family"]), None)
        if entry is None:
            known = ", ".join(ENTRY_POINTS.values())
            raise Unsupported(f"model: expected a family of secateur's own ({known}), got {header['family']}")
        described_by = {**header, "dense": header["architecture"], **_precision(model)}
        arguments = {name: described_by[name] for name in DESCRIBING if described_by.get(name)}
        with written_whole(path) as written, generators.kept():
            # timm writes what it built itself: its record of the arguments is what it will build from.
            twin = timm.create_model(entry, pretrained_cfg=_config(model, entry, header["arguments"]), **arguments)
            twin.load_state_dict(model.state_dict())
            save_for_hf(twin, str(written), safe_serialization=True, data_config=data_config(model))
            built = timm.create_model(f"local-dir:{written}", pretrained=True).eval()
            _compare(model, built)
            engine = f"timm {timm.__version__}"
            difference = largest_difference(model, built, options.batch_sizes, engine)
            if difference > 0:
                raise Error(f"export: expected a model of the same bits of timm, got a difference of {difference:.3g}")
        files = tuple(path / name for name in _FILES)
        size = sum(file.stat().st_size for file in files)
        return ExportReport(self.name, files, size, timm.__version__, engine, options.batch_sizes, difference)


def _precision(model: nn.Module) -> dict[str, str]:
    """Return the type of the weights where it is not timm's default."""
    found = {str(weight.dtype).removeprefix("torch.") for weight in model.parameters()}
    if len(found) != 1:
        raise Unsupported(f"model: expected weights of one type, got {', '.join(sorted(found)) or 'none'}")
    return {} if found == {"float32"} else {"precision": found.pop()}


def _config(model: Any, entry: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return timm's configuration of the pruned model, without a source of dense weights."""
    config = without_sources(getattr(model, "pretrained_cfg", None)) or {}
    config |= {"architecture": entry, "tag": None, "num_classes": arguments.get("num_classes", model.num_classes)}
    if not config.get("classifier"):
        config["classifier"] = classifiers(model)
    if not config.get("first_conv"):
        convs = (name for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
        config["first_conv"] = next(convs, None)
    return {name: value for name, value in config.items() if name in _CONFIG}


def _compare(model: nn.Module, built: nn.Module) -> None:
    other = difference_of(model, built)
    if other:
        raise Error(f"export: expected timm to build the same model, got {other}")
    theirs = {**dict(built.named_buffers()), **built.state_dict()}
    for name, tensor in {**dict(model.named_buffers()), **model.state_dict()}.items():
        if tensor.dtype != theirs[name].dtype or not torch.equal(tensor, theirs[name]):
            raise Unsupported(f"model: expected weights and buffers as timm's files hold them, got another {name}")
