"""A folder from which timm builds the model without secateur."""

from __future__ import annotations

import json
import runpy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import timm
import timm.models
from timm.layers import Attention
from torch import Tensor, nn

from ..data.model_input import data_config
from ..errors import InvalidArgument, Unsupported, first_line
from ..families.base import NORMS
from ..families.classes import public_name
from ..families.registry import family_of
from ..families.vision_transformer.alike import Sizes
from ..runtime.quiet import quiet
from .alike import alike
from .base import Checked, Exporter, ExportReport, largest_difference, register, written_whole
from .changes import Changes, difference_of, settings_of

__all__ = ["PlainTimm"]

# Functions of timm's whose own arguments are the defaults of these classes.
_NAMES = {"VisionTransformer": "vit_base_patch16_224", "VisionTransformerDistilled": "deit_base_distilled_patch16_224"}
# They change no output and are no part of what timm writes.
_FREE = frozenset({"fused_attn", "grad_checkpointing", "distilled_training"})


@dataclass(frozen=True)
class Options(Checked):
    """How the dense model is built, and how the folder is checked."""

    factory: Any = field(default=None, metadata={"help": "how to build the dense model, as for save"})


@register
class PlainTimm(Exporter):
    """timm's own kind of folder, config.json and model.safetensors, with the few lines that build the model of it."""

    name = "timm"
    folder = True
    # What the folder holds.
    layout = "stock"
    Options: ClassVar[type] = Options

    def export(self, model: nn.Module, path: Path, options: Any) -> ExportReport:
        """Write the folder: ``timm.create_model("local-dir:FOLDER", pretrained=True, …)`` reads it, as load.py does.

        Args:
            model: in evaluation mode, on the CPU; its blocks are alike.
            path: the folder.
            options: ``Options``.

        Raises:
            InvalidArgument: a model made by hand without ``factory``.
            Unsupported: timm's class cannot hold the model; the text names the first module that differs.
            Error: timm computes something else.
        """
        plain, sizes = alike(model, self.name)
        architecture, arguments = _recorded(model, options.factory)
        now = family_of(plain).arguments(plain)
        arguments |= {key: list(value) if isinstance(value, tuple) else value for key, value in now.items()}
        arguments |= {"embed_dim": sizes.width, "num_heads": sizes.heads, "mlp_ratio": sizes.mlp_ratio}
        code = _Code.of(plain, sizes, arguments)
        for key, value in arguments.items():
            if not _is_json(value):
                raise Unsupported(f"arguments: expected numbers and names for timm, got {key} = {value!r}")
        twin = _built(architecture, arguments, code)
        # What attention is fused or not is up to the machine; drop rates are among the arguments.
        settings = settings_of(plain, twin)
        free = {n: {k: v for k, v in found.items() if k in _FREE} for n, found in settings.items()}
        Changes(settings=free).set(twin)
        for block in twin.blocks:
            block.attn.__class__ = Attention
        if (unlike := difference_of(plain, twin)) is not None:
            raise Unsupported(f"model: expected what timm's {architecture} can be, got {unlike}")
        twin.to(next(plain.parameters()).dtype).load_state_dict(plain.state_dict(), strict=True)
        twin._model_args = arguments
        twin.pretrained_cfg = _described(model, twin, architecture)
        engine = f"timm {timm.__version__}"
        with written_whole(path) as folder:
            timm.models.save_for_hf(twin, str(folder), model_args=arguments, safe_serialization=True)
            (folder / "load.py").write_text(code.text(), encoding="utf-8")
            with quiet("timm"):
                loaded: nn.Module = runpy.run_path(str(folder / "load.py"))["load"]()
            dtype = next(loaded.parameters()).dtype

            def run(images: Tensor) -> Any:
                return loaded(images.to(dtype))

            difference = largest_difference(model, run, options.batch_sizes, engine)
            names = sorted(file.name for file in folder.iterdir() if file.is_file())
            size = sum((folder / name).stat().st_size for name in names)
        files = tuple(path / name for name in names)
        details = {"architecture": architecture, "head_dim": sizes.head_dim}
        return ExportReport(self.name, files, size, timm.__version__, engine, options.batch_sizes, difference, details)


@dataclass(frozen=True)
class _Code:
    """Arguments that no JSON holds, and the Python that makes them."""

    head_dim: int | None
    norm: type[nn.Module] | None
    eps: float

    @classmethod
    def of(cls, plain: Any, sizes: Sizes, arguments: dict[str, Any]) -> _Code:
        norm = plain.blocks[0].norm1
        own = arguments.pop("norm_layer", None) is not None or getattr(norm, "eps", 1e-6) != 1e-6
        arguments.pop("attn_layer", None)
        return cls(
            None if sizes.heads * sizes.head_dim == sizes.width else sizes.head_dim,
            type(norm) if own and type(norm) in NORMS else None,
            float(getattr(norm, "eps", 1e-6)),
        )

    def arguments(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.head_dim is not None:
            found["attn_layer"] = _of_size(self.head_dim)
        if self.norm is not None:
            found["norm_layer"] = partial(self.norm, eps=self.eps)
        return found

    def text(self) -> str:
        imports, lines, given = {"pathlib", "timm"}, list[str](), ""
        if self.head_dim is not None:
            # timm takes a class here, and no functools.partial of one.
            lines += [
                "class Attention(timm.layers.Attention):",
                "    def __init__(self, *given, **more):",
                f"        super().__init__(*given, attn_head_dim={self.head_dim}, **more)",
                "",
                "",
            ]
            imports |= {"timm.layers"}
            given += ", attn_layer=Attention"
        if self.norm is not None:
            imports |= {"functools", public_name(self.norm).rpartition(".")[0]}
            given += f", norm_layer=functools.partial({public_name(self.norm)}, eps={self.eps!r})"
        return "\n".join(
            [
                '"""Builds the model of this folder with timm alone."""',
                "",
                *(f"import {name}" for name in sorted(imports)),
                "",
                "",
                *lines,
                "def load(folder=pathlib.Path(__file__).parent):",
                f'    return timm.create_model(f"local-dir:{{folder}}", pretrained=True{given}).eval()',
                "",
            ]
        )


def _of_size(head_dim: int) -> type[Attention]:
    class Sized(Attention):
        def __init__(self, *given: Any, **more: Any) -> None:
            super().__init__(*given, **{"attn_head_dim": head_dim, **more})

    return Sized


def _recorded(model: nn.Module, factory: Any) -> tuple[str, dict[str, Any]]:
    """Return the name of timm's function that builds the dense model, and its arguments."""
    anatomy = family_of(model).inspect(model)
    if not anatomy.handmade and factory is None:
        return anatomy.architecture, dict(anatomy.arguments)
    factory = factory or getattr(model, "secateur_factory", None)
    if not isinstance(factory, (tuple, list)) or len(factory) != 2 or not isinstance(factory[1], Mapping):
        raise InvalidArgument(
            f"factory: expected (name, kwargs) that build the dense {anatomy.architecture}, got {factory!r}; "
            "timm.create_model records them, a model built by hand does not"
        )
    return _NAMES.get(str(factory[0]), str(factory[0])), dict(factory[1])


def _described(model: nn.Module, twin: nn.Module, architecture: str) -> dict[str, Any]:
    """Return timm's description of the weights; of those that a model made by hand has, only the input is known."""
    own: Any = getattr(model, "pretrained_cfg", None)
    if own and "first_conv" in own:
        return {**own, "architecture": architecture}
    borrowed: Any = twin.pretrained_cfg
    layers = {key: borrowed[key] for key in ("first_conv", "classifier", "fixed_input_size") if key in borrowed}
    told = {key: data_config(model)[key] for key in ("input_size", "mean", "std", "interpolation", "crop_pct")}
    return {**layers, **told, **(own or {}), "architecture": architecture}


def _built(architecture: str, arguments: Mapping[str, Any], code: _Code) -> Any:
    try:
        return timm.create_model(architecture, pretrained=False, **arguments, **code.arguments()).eval()
    except Exception as error:  # timm raises what it likes
        raise Unsupported(f"model: expected one that timm builds, got {first_line(error)}") from error


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True
