"""The command line: each command is the function of its name, from files to files."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import timm
import torch
import typer
from rich.console import Console
from torch import nn

from .. import __version__, check
from ..budgets.target import Target
from ..core.bindings import cmake_dir
from ..data.loader import default_split, loader
from ..errors import Error, InvalidArgument
from ..exports.native import load as load_
from ..exports.native import save as save_
from ..families.registry import inspect as inspect_
from ..files.container import KEY, little_endian
from ..files.safetensors import read_table, read_tensors
from ..latency.bench import bench as bench_
from ..latency.measure import measure_latency
from ..plans.make import plan as plan_
from ..plans.plan import Plan
from ..plans.prune import prune as prune_
from ..runtime import generators
from ..runtime.devices import place_for
from ..runtime.ranks import first, joined
from ..searches.objectives import AccuracyCritical, LatencySensitive, MemoryConstrained
from ..searches.result import check_figure
from ..searches.search import search as search_
from ..statistics.calibrate import calibrate as calibrate_
from ..statistics.statistics import Statistics
from ..training.evaluate import evaluate as evaluate_
from ..training.finetune import finetune as finetune_

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ..searches.objectives import Objective
    from ..statistics.settings import Collect

app = typer.Typer(
    help="Structured pruning of vision transformers: cut a trained timm model to a smaller dense one.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 failed, 2 wrong usage.

    A failure is one line on stderr; with SECATEUR_TRACEBACK=1 in the environment it is the traceback.
    """
    try:
        app(args=None if argv is None else list(argv), prog_name="secateur")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception as error:
        if os.environ.get("SECATEUR_TRACEBACK") == "1":
            raise
        text = " ".join(str(error).split())
        kind = "" if isinstance(error, (Error, OSError)) else f"{type(error).__name__}: "
        sys.stderr.write(f"secateur: {kind}{text}\n")
        return 1
    return 0


# --- What several commands take ---------------------------------------------------------------------------------------


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"expected a JSON object, got {text!r} ({error})") from error
    if not isinstance(value, dict):
        raise typer.BadParameter(f"expected a JSON object, got {text!r}")
    return value


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _file_to_write(option: typer.CallbackParam, path: Path | None) -> Path | None:
    """Refuse it before hours of work, not after."""
    return None if path is None else check.writable(str(option.opts[0]), path)


def _use_threads(count: int | None) -> int | None:
    if count is not None:
        torch.set_num_threads(count)
    return count


_MODEL = "The model"
Model = Annotated[str | None, typer.Option("--model", help="A timm model name.", rich_help_panel=_MODEL)]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        help="A file of secateur's, or with --model a .safetensors state dict for it.",
        rich_help_panel=_MODEL,
    ),
]
Pretrained = Annotated[
    bool | None,
    typer.Option(
        "--pretrained/--no-pretrained",
        help="Fetch timm's weights, or go on with random ones.",
        show_default=False,
        rich_help_panel=_MODEL,
    ),
]
Classes = Annotated[int | None, typer.Option("--num-classes", min=0, help="Of --model.", rich_help_panel=_MODEL)]
Kwargs = Annotated[
    str | None,
    typer.Option("--model-kwargs", metavar="JSON", help='More arguments, as {"img_size": 32}.', rich_help_panel=_MODEL),
]
_DATA = "The images"
Data = Annotated[
    str,
    typer.Option(
        "--data", help="An image folder, a .tar, hfds:NAME, hfids:NAME (streamed), or digits.", rich_help_panel=_DATA
    ),
]
Split = Annotated[str | None, typer.Option("--split", help="Sub-folder or split name.", rich_help_panel=_DATA)]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, rich_help_panel=_DATA)]
MaxImages = Annotated[
    int | None, typer.Option("--max-images", min=1, help="Exactly so many, drawn by --seed.", rich_help_panel=_DATA)
]
Workers = Annotated[
    int, typer.Option("--workers", min=0, help="Processes that decode while the model computes.", rich_help_panel=_DATA)
]
Unreadable = Annotated[
    int,
    typer.Option(
        "--max-unreadable", min=0, help="Leave out so many images that cannot be decoded.", rich_help_panel=_DATA
    ),
]
Stats = Annotated[Path, typer.Option("--stats", help="What calibrate wrote.")]
Method = Annotated[str, typer.Option("--method", help="snp, refit or project.")]
Groups = Annotated[
    str | None, typer.Option("--groups", help="Kinds or groups that may be cut: qk,v,ffn,width,heads,block.")
]
Freeze = Annotated[str, typer.Option("--freeze", help="Kinds, groups or patterns that stay whole.")]
MinKeep = Annotated[str | None, typer.Option("--min-keep", metavar="JSON", help="Fewest units to keep.")]
RoundTo = Annotated[str | None, typer.Option("--round-to", metavar="N|JSON", help="Kept counts are multiples of it.")]
Seed = Annotated[int, typer.Option("--seed", min=0)]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Of torch.", callback=_use_threads)]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, ...")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else.")]
Out = Annotated[Path, typer.Option("--out", help="The file to write.", callback=_file_to_write)]
Resume = Annotated[
    Path | None,
    typer.Option("--resume", help="Checkpoint: read where it exists, and written.", callback=_file_to_write),
]
Every = Annotated[int | None, typer.Option("--checkpoint-every", min=1)]
Loose = Annotated[bool, typer.Option("--strict/--no-strict", help="Refuse other weights of the same dimensions, too.")]


class _Output:
    """Either text for people or one JSON object."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self.fields: dict[str, Any] = {}
        self._lines: list[Any] = []

    def show(self, *lines: Any, **fields: Any) -> None:
        self._lines += lines
        self.fields |= fields

    def flush(self) -> None:
        # Of several ranks one speaks.
        if not self.fields and not self._lines:
            return
        if self._as_json:
            sys.stdout.write(json.dumps(self.fields) + "\n")
            return
        console = Console()
        for line in self._lines:
            console.print(line, highlight=False, markup=False, soft_wrap=isinstance(line, str))


@contextlib.contextmanager
def _output(as_json: bool) -> Iterator[_Output]:
    """Collect what a command has to say; whatever a library prints meanwhile goes to stderr."""
    output = _Output(as_json)
    with contextlib.redirect_stdout(sys.stderr):
        yield output
    output.flush()


@contextlib.contextmanager
def _option(name: str) -> Iterator[None]:
    """Say which option a file was given by when it cannot be read."""
    try:
        yield
    except (Error, OSError) as error:
        raise InvalidArgument(f"{name}: {str(error).removeprefix('path: ')}") from error


def _model(
    name: str | None,
    file: Path | None,
    pretrained: bool | None,
    classes: int | None,
    kwargs: str | None,
    *,
    weights: bool = True,
    prefix: str = "",
) -> nn.Module:
    """Build or load a model; ``weights`` where random ones would make no sense unless asked for."""
    option = f"--{prefix.removesuffix('-') or 'checkpoint'}"
    if name is None:
        if file is None:
            raise typer.BadParameter(f"expected --{prefix}checkpoint FILE or --{prefix}model NAME")
        if pretrained is not None or classes is not None or kwargs is not None:
            raise typer.BadParameter("--pretrained, --num-classes and --model-kwargs need --model")
        with _option(option):
            return load_(file)
    if file is not None and pretrained:
        raise typer.BadParameter("expected --checkpoint or --pretrained, got both")
    if weights and file is None and pretrained is None:
        raise typer.BadParameter("expected --checkpoint FILE or --pretrained (or --no-pretrained for random weights)")
    arguments = {} if kwargs is None else _json_object(kwargs)
    if classes is not None:
        arguments["num_classes"] = classes
    try:
        # Random weights are the same in every process: what one command made of them, another finds again.
        with generators.kept():
            torch.default_generator.manual_seed(0)
            model: nn.Module = timm.create_model(name, pretrained=bool(pretrained), **arguments)
    except Exception as error:  # timm, the hub and the network raise what they like; it is this model that failed
        raise InvalidArgument(f"model: expected a model that timm can build, got {name!r} ({error})") from error
    if file is not None:
        _load_state(model, name, file, option)
    return model.eval()


def _load_state(model: nn.Module, name: str, file: Path, option: str) -> None:
    with _option(option):
        little_endian(file)
    try:
        with file.open("rb") as opened:
            # Of any program: metadata are any strings, in a header of at most 8 MiB.
            metadata, entries = read_table(opened)
            own = KEY in metadata
            state = {} if own else read_tensors(opened, entries)
    except (ValueError, OSError, RuntimeError) as error:
        raise InvalidArgument(f"{option}: expected a .safetensors file, got {str(file)!r} ({error})") from error
    if own:
        raise InvalidArgument(f"{option}: expected a plain state dict with --model, got a file of secateur's own")
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise InvalidArgument(f"{option}: expected the parameters of {name!r}, got others ({error})") from error


def _objective(max_drop: float | None, params: float | None, macs: float | None, latency: float | None) -> Objective:
    """The one that is named by the requirement."""
    given = [
        name
        for name, value in (("max-drop", max_drop), ("params", params), ("macs", macs), ("latency", latency))
        if value is not None
    ]
    if len(given) != 1:
        got = " and ".join(f"--{name}" for name in given) or "none"
        raise typer.BadParameter(f"expected one of --max-drop, --params, --macs and --latency, got {got}")
    if max_drop is not None:
        return AccuracyCritical(max_drop)
    return MemoryConstrained(params) if params is not None else LatencySensitive(macs=macs, latency=latency)


def _number_or_object(text: str) -> int | dict[str, int]:
    try:
        return int(text)
    except ValueError:
        return _json_object(text)


# --- The commands -----------------------------------------------------------------------------------------------------


def _version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"secateur {__version__}\n")
        raise typer.Exit


def _cmake_dir(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"{cmake_dir()}\n")
        raise typer.Exit


@app.callback()
def _root(
    _show: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
    _where: Annotated[
        bool,
        typer.Option("--cmake-dir", callback=_cmake_dir, is_eager=True, help="Print secateur_DIR for C++ programs."),
    ] = False,
) -> None:
    pass


@app.command()
def inspect(
    model: Model = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = None,
    num_classes: Classes = None,
    model_kwargs: Kwargs = None,
    as_json: Json = False,
) -> None:
    """Show what can be cut out of a model, and what it costs."""
    with _output(as_json) as output:
        net = _model(model, checkpoint, pretrained, num_classes, model_kwargs, weights=False)
        anatomy = inspect_(net)
        output.show(str(anatomy), **anatomy.to_dict())


@app.command()
def calibrate(
    data: Data,
    out: Out,
    model: Model = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = None,
    num_classes: Classes = None,
    model_kwargs: Kwargs = None,
    split: Split = None,
    batch_size: BatchSize = 64,
    max_images: MaxImages = 1024,
    workers: Workers = 0,
    max_unreadable: Unreadable = 0,
    collect: Annotated[str, typer.Option(help='"scores", or "all" for moments too.')] = "all",
    gamma: Annotated[int, typer.Option(min=1, help="Leading singular directions that count.")] = 8,
    token_fraction: Annotated[float, typer.Option(help="Share of the tokens that feed the moments.")] = 1.0,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Also measure how much the output moves with each group.")
    ] = False,
    head_gradients: Annotated[
        bool, typer.Option("--head-gradients", help="Also score heads by gradients, for plan --head-score michel.")
    ] = False,
    resume: Resume = None,
    checkpoint_every: Every = None,
    device: Device = None,
    seed: Seed = 0,
    _threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Collect a model's statistics over images; labels are not used. Reads the training split unless told."""
    with _output(as_json) as output, joined() as ranks:
        net = _model(model, checkpoint, pretrained, num_classes, model_kwargs)
        net.to(place_for(net, ranks.device(device)))
        split = split or default_split(data, train=True)
        # Folders are sorted by class: the first images would be of a few classes only.
        shuffle = not data.startswith("hfids:")
        images = loader(
            data,
            net,
            split=split,
            batch_size=batch_size,
            workers=workers,
            max_images=max_images,
            shuffle=shuffle,
            seed=seed,
            max_unreadable=max_unreadable,
        )
        kind: Collect = collect  # type: ignore[assignment]  # the function checks it
        stats = calibrate_(
            net,
            images,
            max_images=max_images,
            collect=kind,
            gamma=gamma,
            token_fraction=token_fraction,
            sensitivity=sensitivity,
            head_gradients=head_gradients,
            resume=resume,
            checkpoint_every=checkpoint_every,
        )
        with ranks.together():
            if ranks.rank == 0:
                stats.save(out)
                text = f"{stats.images:,} images of {images.description} -> {out}"
                output.show(text, images=stats.images, file=str(out))


@app.command()
def plan(
    stats: Stats,
    out: Out,
    model: Model = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = None,
    num_classes: Classes = None,
    model_kwargs: Kwargs = None,
    method: Method = "snp",
    target_macs: Annotated[float | None, typer.Option(help="MACs to keep, as a fraction.")] = None,
    target_params: Annotated[float | None, typer.Option(help="Parameters to keep, as a fraction.")] = None,
    target_latency: Annotated[
        float | None, typer.Option(help="Time of a batch to keep, as a fraction; measured before it is believed.")
    ] = None,
    latency_table: Annotated[
        Path | None, typer.Option(help="What bench --table wrote; without, one is measured first.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="That --target-latency is about; the table's, or else 1.")
    ] = None,
    ratios: Annotated[
        str | None,
        typer.Option(help='Removed fractions: {"qk": 0.5, ...}, a shipped configuration\'s name, or a file.'),
    ] = None,
    groups: Groups = None,
    freeze: Freeze = "",
    min_keep: MinKeep = None,
    round_to: RoundTo = None,
    allocation: Annotated[
        str | None, typer.Option(help="Of a target: uniform, or error (needs calibrate --sensitivity).")
    ] = None,
    similarity: Annotated[str | None, typer.Option(help="Of SNP: weights or activations.")] = None,
    selection: Annotated[str | None, typer.Option(help="Of refit: greedy, snp or energy.")] = None,
    head_score: Annotated[
        str | None, typer.Option(help="Of whole heads: neurons or michel; error with refit and project.")
    ] = None,
    strict: Loose = True,
    device: Device = None,
    _threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Choose what stays, for a budget (--target-macs, --target-params, --target-latency) or by --ratios."""
    kinds = None if groups is None else _names(groups)
    if kinds == []:
        raise typer.BadParameter("expected --groups of kinds or groups, got none")
    targets = target_macs, target_params, target_latency
    if (ratios is None) == (targets == (None, None, None)):
        raise typer.BadParameter("expected either --ratios, or --target-macs, --target-params and/or --target-latency")
    if target_latency is None and (latency_table is not None or batch_size is not None):
        raise typer.BadParameter("--latency-table and --batch-size need --target-latency")
    with _output(as_json) as output:
        net = _model(model, checkpoint, pretrained, num_classes, model_kwargs)
        with _option("--stats"):
            collected = Statistics.load(stats)
        net.to(place_for(net, device))
        given: dict[str, Any] = {"similarity": similarity, "selection": selection, "head_score": head_score}
        given = {name: value for name, value in given.items() if value is not None}
        chosen = plan_(
            net,
            collected,
            method=method,
            target=Target(*targets) if ratios is None else None,
            ratios=_json_object(ratios) if ratios is not None and ratios.lstrip().startswith("{") else ratios,
            groups=kinds,
            freeze=_names(freeze),
            min_keep=None if min_keep is None else _json_object(min_keep),
            round_to=None if round_to is None else _number_or_object(round_to),
            strict=strict,
            allocation=allocation,
            latency_table=latency_table,
            batch_size=batch_size,
            **given,
        )
        chosen.save(out)
        kept = {name: int(keep.shape[1]) for name, keep in chosen.keep.items()}
        output.show(
            f"{chosen} -> {out}",
            method=chosen.method,
            params=list(chosen.params),
            macs=list(chosen.macs),
            kept=kept,
            latency=chosen.to_dict()["latency"],
            loss=chosen.to_dict()["loss"],
            file=str(out),
        )


@app.command()
def prune(
    plan: Annotated[Path, typer.Option("--plan", help="What plan wrote.")],
    out: Out,
    model: Model = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = None,
    num_classes: Classes = None,
    model_kwargs: Kwargs = None,
    layout: Annotated[
        str,
        typer.Option(
            "--layout",
            help="exact: attention of the sizes that stay; stock: timm's own attention modules, padded with zeros.",
        ),
    ] = "exact",
    strict: Loose = True,
    as_json: Json = False,
) -> None:
    """Cut a model as planned and save what is left."""
    with _output(as_json) as output:
        net = _model(model, checkpoint, pretrained, num_classes, model_kwargs)
        with _option("--plan"):
            wanted = Plan.load(plan)
        report = prune_(net, wanted, layout=layout, strict=strict)
        save_(net, out)
        output.show(str(report), f"-> {out}", **report.to_dict(), file=str(out))


@app.command()
def search(
    data: Data,
    stats: Stats,
    out: Out,
    model: Model = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = None,
    num_classes: Classes = None,
    model_kwargs: Kwargs = None,
    split: Split = None,
    batch_size: BatchSize = 64,
    max_images: MaxImages = None,
    workers: Workers = 0,
    max_unreadable: Unreadable = 0,
    max_drop: Annotated[
        float | None, typer.Option(help="Fewest parameters, with at most so many points of accuracy lost.")
    ] = None,
    params: Annotated[float | None, typer.Option(help="Most accurate with this fraction of the parameters.")] = None,
    macs: Annotated[float | None, typer.Option(help="Most accurate with this fraction of the MACs.")] = None,
    latency: Annotated[float | None, typer.Option(help="Most accurate in this fraction of the measured time.")] = None,
    method: Method = "project",
    rounds: Annotated[int, typer.Option(min=1)] = 12,
    step: Annotated[float, typer.Option(help="Fraction that the first round removes.")] = 0.1,
    groups: Groups = None,
    freeze: Freeze = "",
    min_keep: MinKeep = None,
    round_to: RoundTo = None,
    allocation: Annotated[str | None, typer.Option(help="uniform, or error (needs calibrate --sensitivity).")] = None,
    finetune: Annotated[
        str | None, typer.Option(metavar="JSON", help='Train every round\'s model: {"epochs": 1, "lr": 1e-4}.')
    ] = None,
    train_data: Annotated[
        str | None, typer.Option(help="To train and calibrate on; --data by default.", rich_help_panel=_DATA)
    ] = None,
    train_split: Annotated[str | None, typer.Option(rich_help_panel=_DATA)] = None,
    resume: Resume = None,
    history: Annotated[
        Path | None, typer.Option("--history", help="JSON file for the rounds.", callback=_file_to_write)
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help=".png, .svg or .pdf (needs matplotlib).", callback=_file_to_write)
    ] = None,
    device: Device = None,
    seed: Seed = 0,
    _threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Find the smallest model of an accuracy (--max-drop), or the most accurate of a budget, and save it."""
    objective = _objective(max_drop, params, macs, latency)
    kinds = None if groups is None else _names(groups)
    tuning = None if finetune is None else _json_object(finetune)
    if plot is not None:
        check_figure(plot)
    with _output(as_json) as output:
        net = _model(model, checkpoint, pretrained, num_classes, model_kwargs)
        net.to(place_for(net, device))
        with _option("--stats"):
            collected = Statistics.load(stats)

        shuffle = max_images is not None and not data.startswith("hfids:")
        reading: dict[str, Any] = {
            "batch_size": batch_size,
            "workers": workers,
            "seed": seed,
            "max_unreadable": max_unreadable,
        }
        validation = loader(data, net, split=split, max_images=max_images, shuffle=shuffle, **reading)
        training = calibration = None
        if tuning is not None:
            source = train_data or data
            part = train_split or default_split(source, train=True)
            training = loader(source, net, split=part, shuffle=True, train=True, **reading)
            calibration = loader(source, net, split=part, shuffle=True, max_images=collected.images, **reading)
        found = search_(
            net,
            collected,
            objective=objective,
            loader=validation,
            method=method,
            rounds=rounds,
            step=step,
            groups=kinds,
            freeze=_names(freeze),
            min_keep=None if min_keep is None else _json_object(min_keep),
            round_to=None if round_to is None else _number_or_object(round_to),
            allocation=allocation,
            finetune=tuning,
            train_loader=training,
            calibration_loader=calibration,
            resume=resume,
        )
        save_(found.model, out)
        if history is not None:
            found.save_history(history)
        if plot is not None:
            found.plot(plot)
        output.show(str(found), f"-> {out}", **found.to_dict(), file=str(out))


@app.command()
def evaluate(
    data: Data,
    model: Model = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = None,
    num_classes: Classes = None,
    model_kwargs: Kwargs = None,
    split: Split = None,
    batch_size: BatchSize = 64,
    max_images: MaxImages = None,
    workers: Workers = 0,
    max_unreadable: Unreadable = 0,
    device: Device = None,
    seed: Seed = 0,
    _threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure accuracy and loss."""
    with _output(as_json) as output:
        net = _model(model, checkpoint, pretrained, num_classes, model_kwargs)
        shuffle = max_images is not None and not data.startswith("hfids:")
        images = loader(
            data,
            net,
            split=split,
            batch_size=batch_size,
            workers=workers,
            max_images=max_images,
            shuffle=shuffle,
            seed=seed,
            max_unreadable=max_unreadable,
        )
        found = evaluate_(net, images, device=device)
        output.show(str(found), **asdict(found))


@app.command()
def finetune(
    data: Data,
    out: Out,
    model: Model = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = None,
    num_classes: Classes = None,
    model_kwargs: Kwargs = None,
    split: Split = None,
    batch_size: BatchSize = 64,
    max_images: MaxImages = None,
    workers: Workers = 0,
    max_unreadable: Unreadable = 0,
    augment: Annotated[
        str | None,
        typer.Option(metavar="JSON", help="Arguments of timm's create_transform.", rich_help_panel=_DATA),
    ] = None,
    val_data: Annotated[str | None, typer.Option(help="Evaluated after each pass.", rich_help_panel=_DATA)] = None,
    val_split: Annotated[str | None, typer.Option(rich_help_panel=_DATA)] = None,
    teacher: Annotated[
        Path | None, typer.Option(help="The dense model: a file of secateur's, or a state dict for --teacher-model.")
    ] = None,
    teacher_model: Annotated[str | None, typer.Option(help="A timm model name.")] = None,
    teacher_pretrained: Annotated[bool | None, typer.Option("--teacher-pretrained", show_default=False)] = None,
    teacher_kwargs: Annotated[str | None, typer.Option(metavar="JSON")] = None,
    epochs: Annotated[int | None, typer.Option(min=1)] = None,
    steps: Annotated[int | None, typer.Option(min=1)] = None,
    opt: Annotated[str, typer.Option(help="An optimizer of timm's.")] = "adamw",
    lr: float = 5e-4,
    min_lr: float | None = None,
    warmup: Annotated[int | None, typer.Option(min=0, help="In steps; a twentieth by default.")] = None,
    weight_decay: float = 0.05,
    clip_grad: Annotated[float, typer.Option(help="0 for no limit.")] = 1.0,
    temperature: float = 2.0,
    alpha: Annotated[float | None, typer.Option(help="The teacher's share in the loss.")] = None,
    label_smoothing: float = 0.0,
    mixup: Annotated[float, typer.Option(help="Alpha; 0 for none.")] = 0.0,
    cutmix: Annotated[float, typer.Option(help="Alpha; 0 for none.")] = 0.0,
    ema: Annotated[float | None, typer.Option(help="Decay of an average of the weights, which is saved.")] = None,
    amp: Annotated[str | None, typer.Option(help="Mixed precision: bfloat16 or float16.")] = None,
    resume: Resume = None,
    checkpoint_every: Every = None,
    device: Device = None,
    seed: Seed = 0,
    _threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Train a model, with the dense one as teacher where given, and save it.

    Under torchrun (torchrun --nproc-per-node N -m secateur finetune ...) each process takes batches of its own.
    """
    if epochs is not None and steps is not None:
        raise typer.BadParameter("expected --epochs or --steps, got both")
    transform = {} if augment is None else _json_object(augment)
    with _output(as_json) as output:
        net = _model(model, checkpoint, pretrained, num_classes, model_kwargs)
        master = None
        if teacher is not None or teacher_model is not None:
            master = _model(teacher_model, teacher, teacher_pretrained, None, teacher_kwargs, prefix="teacher-")
        images = loader(
            data,
            net,
            split=split,
            batch_size=batch_size,
            workers=workers,
            max_images=max_images,
            shuffle=True,
            train=True,
            seed=seed,
            max_unreadable=max_unreadable,
            **transform,
        )
        validation = None
        if val_data is not None:
            validation = loader(
                val_data, net, split=val_split, batch_size=batch_size, workers=workers, max_unreadable=max_unreadable
            )
        found = finetune_(
            net,
            images,
            teacher=master,
            epochs=epochs,
            steps=steps,
            opt=opt,
            lr=lr,
            min_lr=min_lr,
            warmup=warmup,
            weight_decay=weight_decay,
            clip_grad=clip_grad or None,
            temperature=temperature,
            alpha=alpha,
            label_smoothing=label_smoothing,
            mixup=mixup,
            cutmix=cutmix,
            ema=ema,
            amp=amp,
            val_loader=validation,
            resume=resume,
            checkpoint_every=checkpoint_every,
            seed=seed,
            device=device,
        )
        if first():
            save_(net, out)
            output.show(f"{found} -> {out}", **asdict(found), file=str(out))


@app.command()
def bench(
    model: Model = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = None,
    num_classes: Classes = None,
    model_kwargs: Kwargs = None,
    reference: Annotated[
        Path | None, typer.Option(help="Measured in turn: a file of secateur's, or a state dict for --reference-model.")
    ] = None,
    reference_model: Annotated[str | None, typer.Option(help="A timm model name.")] = None,
    reference_kwargs: Annotated[str | None, typer.Option(metavar="JSON")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="32 by default; of --table 1.")] = None,
    input_size: Annotated[int | None, typer.Option(min=1, help="Side in pixels; the model's own by default.")] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="15 by default; of --table 7.")] = None,
    warmup: Annotated[int, typer.Option(min=0)] = 3,
    table: Annotated[
        Path | None,
        typer.Option(
            "--table",
            help="Measure the layers at many sizes instead, and write what plan --latency-table reads.",
            callback=_file_to_write,
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of --table: float32, float16, bfloat16 or float64.")] = None,
    groups: Annotated[str | None, typer.Option(help="Of --table: kinds that plans will cut; all by default.")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Time what torch.compile makes of the models.")] = False,
    threads: Threads = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Time inference, with --reference in paired runs; with --table, layer by layer, for plan --target-latency."""
    if table is not None and (reference is not None or reference_model is not None or input_size is not None):
        raise typer.BadParameter("--table goes without --reference and --input-size: it is about one model as it is")
    if table is None and (dtype is not None or groups is not None):
        raise typer.BadParameter("--dtype and --groups need --table")
    with _output(as_json) as output:
        net = _model(model, checkpoint, pretrained, num_classes, model_kwargs, weights=False)
        if table is not None:
            measured = measure_latency(
                net,
                batch_size=1 if batch_size is None else batch_size,
                dtype=dtype,
                device=device,
                compile=compiled,
                groups=None if groups is None else _names(groups),
                repeats=7 if repeats is None else repeats,
            )
            measured.save(table)
            output.show(f"{measured} -> {table}", machine=measured.machine.to_dict(), file=str(table))
            return
        other = None
        if reference is not None or reference_model is not None:
            other = _model(reference_model, reference, None, None, reference_kwargs, weights=False, prefix="reference-")
        found = bench_(
            net,
            other,
            batch_size=32 if batch_size is None else batch_size,
            input_size=input_size,
            repeats=15 if repeats is None else repeats,
            warmup=warmup,
            threads=threads,
            device=device,
            compile=compiled,
        )
        output.show(str(found), **asdict(found))


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the pruned model.")] = Path("demo"),
    quick: Annotated[bool, typer.Option("--quick", help="A few steps only, to see that it works.")] = False,
    _threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Train, prune to half the MACs, fine-tune, measure, save and reload, on scikit-learn's handwritten digits."""
    from .demo import demo as demo_

    with _output(as_json) as output:
        found = demo_(out, **({"steps": 60, "finetune_steps": 6, "max_images": 192, "repeats": 3} if quick else {}))
        output.show(found.table(), **found.to_dict())
