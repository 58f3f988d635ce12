"""The command line as a whole: its commands, one module each, and how it fails."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

import secateur as sc

from ..errors import Error
from .bench import bench
from .calibrate import calibrate
from .demo import demo
from .evaluate import evaluate
from .export import export
from .finetune import finetune
from .inspect import inspect
from .methods import methods
from .plan import plan
from .prune import prune
from .search import search

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["app", "main"]

app = typer.Typer(
    help="Structured pruning of vision transformers: cut a trained timm model to a smaller dense one.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (inspect, calibrate, plan, prune, search, evaluate, finetune, bench, export, methods, demo):
    app.command()(_command)


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


def _version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"secateur {sc.__version__}\n")
        raise typer.Exit


def _cmake_dir(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"{sc.core.cmake_dir()}\n")
        raise typer.Exit


@app.callback()
def _root(
    _show: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    _where: Annotated[
        bool,
        typer.Option("--cmake-dir", callback=_cmake_dir, is_eager=True, help="Print secateur_DIR for C++ programs."),
    ] = False,
) -> None:
    pass
