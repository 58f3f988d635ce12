"""Options that several commands share, and how their texts are read. Nothing here needs torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .. import check
from . import lazy

MODEL = "The model"
DATA = "The images"


def json_object(text: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        typer.BadParameter: it is something else.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"expected a JSON object, got {text!r} ({error})") from error
    if not isinstance(value, dict):
        raise typer.BadParameter(f"expected a JSON object, got {text!r}")
    return value


def names(text: str) -> list[str]:
    """Split names at commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def multiples(text: str | None) -> int | Literal["auto"] | dict[str, int] | None:
    """Parse --round-to: an integer, "auto", or else a JSON object; None if it is not given.

    Raises:
        typer.BadParameter: it is none of these.
    """
    if text is None:
        return None
    if text == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError:
        return json_object(text)


def file_to_write(option: typer.CallbackParam, path: Path | None) -> Path | None:
    """Refuse a path that cannot be written, before hours of work and not after.

    Raises:
        InvalidArgument: its folder is not there or takes no files, or it is a folder.
    """
    return None if path is None else check.writable(str(option.opts[0]), path)


def _set_threads(count: int | None) -> int | None:
    if count is not None:
        lazy.set_num_threads(count)
    return count


Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="NAME|FILE",
        help="Name of a timm model, or a plan, statistics or model file that says it; needed where no file does.",
        rich_help_panel=MODEL,
    ),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        metavar="FILE",
        help="Weights: a file of secateur, timm, Lightning or torch.save, .safetensors, or timm's folder or hub name.",
        rich_help_panel=MODEL,
    ),
]
Pretrained = Annotated[
    bool | None,
    typer.Option(
        "--pretrained/--no-pretrained",
        help="Fetch timm's weights, or use random ones.",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
Classes = Annotated[
    int | None,
    typer.Option(
        "--num-classes", min=0, help="Number of classes; by default what the file says.", rich_help_panel=MODEL
    ),
]
Kwargs = Annotated[
    str | None,
    typer.Option(
        "--model-kwargs",
        metavar="JSON",
        help='More arguments of the model, as {"img_size": 32}.',
        rich_help_panel=MODEL,
    ),
]
UseEma = Annotated[
    bool,
    typer.Option("--use-ema", help="Take the moving average of the weights in --checkpoint.", rich_help_panel=MODEL),
]
Data = Annotated[
    str,
    typer.Option(
        "--data", help="An image folder, a .tar, hfds:NAME, hfids:NAME (streamed), or digits.", rich_help_panel=DATA
    ),
]
Split = Annotated[str | None, typer.Option("--split", help="Sub-folder, or name of the split.", rich_help_panel=DATA)]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Images in a batch.", rich_help_panel=DATA)]
MaxImages = Annotated[
    int | None, typer.Option("--max-images", min=1, help="Use this many images, drawn by --seed.", rich_help_panel=DATA)
]
Workers = Annotated[
    int,
    typer.Option("--workers", min=0, help="Processes that decode images while the model runs.", rich_help_panel=DATA),
]
Unreadable = Annotated[
    int,
    typer.Option(
        "--max-unreadable", min=0, help="Skip up to this many images that cannot be decoded.", rich_help_panel=DATA
    ),
]
Stats = Annotated[Path, typer.Option("--stats", help="The statistics file that calibrate wrote.")]
Runtime = Annotated[
    str | None,
    typer.Option("--runtime", help="Engine that runs the timed models: torch (the default), torch.compile, ..."),
]
Method = Annotated[str, typer.Option("--method", help="The pruning method; `secateur methods` lists them.")]
MethodOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="NAME=VALUE",
        help="An option of the method, repeatable; `secateur methods NAME` lists them.",
    ),
]
Groups = Annotated[
    str | None,
    typer.Option("--groups", help="Kinds or groups that may be cut: qk, v, ffn, conv, heads, width, layer, tokens."),
]
Freeze = Annotated[str, typer.Option("--freeze", help="Kinds, groups or patterns that are not cut.")]
MinKeep = Annotated[
    str | None, typer.Option("--min-keep", metavar="JSON", help='Fewest units to keep, as {"ffn": 64}.')
]
RoundTo = Annotated[
    str | None,
    typer.Option(
        "--round-to",
        metavar="N|JSON|auto",
        help="Kept counts are multiples of this; auto: of the steps that a latency table found.",
    ),
]
StepsTable = Annotated[
    Path | None, typer.Option("--latency-table", help="The file of bench --table, for the steps of --round-to auto.")
]
Allocation = Annotated[
    str | None,
    typer.Option(
        "--allocation",
        help="How to share out a budget: measured (after calibrate --sensitivity), error (--noise), uniform.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of every random choice.")]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="Number of torch threads.", callback=_set_threads)
]
Device = Annotated[str | None, typer.Option("--device", help="Where to run: cpu, cuda, cuda:1, ...")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else.")]
Out = Annotated[Path, typer.Option("--out", help="The file to write.", callback=file_to_write)]
Resume = Annotated[
    Path | None,
    typer.Option("--resume", help="Checkpoint file: read if it exists, then written.", callback=file_to_write),
]
Every = Annotated[int | None, typer.Option("--checkpoint-every", min=1, help="Write --resume every this many batches.")]
Loose = Annotated[
    bool, typer.Option("--strict/--no-strict", help="Refuse files of other weights, even of the same sizes.")
]
