"""Disks that are full or cannot be written: one clear error, and the files that were there stay as they were."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import secateur as sc
from finetuning import batches, quiet
from secateur.cli.app import main


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system of its own, where this process may have one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("only root can mount a file system")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(path: Path) -> None:
    """Leave no byte."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass


def images() -> list[object]:
    return [batch.clamp(-1, 1) for batch, _ in batches(4)]


def calibrated(**arguments: object) -> sc.Statistics:
    return sc.calibrate(quiet(), images(), **arguments)


def save_plan(path: Path) -> None:
    sc.plan(quiet(), calibrated(), ratios={"ffn": 0.5}, method="refit").save(path)


WRITERS: dict[str, Callable[[Path], object]] = {
    "statistics": lambda path: calibrated().save(path),
    "calibrate": lambda path: calibrated(resume=path, checkpoint_every=1),
    "plan": save_plan,
    "model": lambda path: sc.save(quiet(), path),
    "finetune": lambda path: sc.finetune(quiet(), batches(), resume=path),
    "search": lambda path: sc.search(
        quiet(), calibrated(), objective=sc.MemoryConstrained(1), loader=batches(2), rounds=2, step=0.5, resume=path
    ),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk(tmp_path: Path, kind: str) -> None:
    with mounted(tmp_path / "small", "size=16k") as folder:
        path = folder / "file"
        if not (resumed := kind in ("calibrate", "finetune", "search")):
            path.write_bytes(b"what was there before")
        fill(folder / "ballast")
        with pytest.raises(OSError, match="No space left on device"):
            WRITERS[kind](path)
        if not resumed:
            assert path.read_bytes() == b"what was there before"
        # Nothing half-written under any other name, too.
        assert {item.name for item in folder.iterdir()} == {"ballast"} | (set() if resumed else {"file"})


@pytest.mark.parametrize("kind", WRITERS)
def test_a_folder_that_cannot_be_written(tmp_path: Path, kind: str) -> None:
    with mounted(tmp_path / "fixed", "ro") as folder:
        text = rf"^(path|resume): expected a folder that can be written, got {folder}$"
        with pytest.raises(sc.InvalidArgument, match=text):
            WRITERS[kind](folder / "file")
        assert not list(folder.iterdir())


def test_a_disk_that_fills_while_calibrating(tmp_path: Path) -> None:
    """The last checkpoint stays, and the run goes on from it where there is room."""
    with mounted(tmp_path / "small", "size=512k") as folder:
        path, ballast = folder / "stats", folder / "ballast"

        def filling(source: list[object]) -> Iterator[object]:
            for index, batch in enumerate(source):
                if index == 3:
                    fill(ballast)
                yield batch

        with pytest.raises(OSError, match="No space left on device"):
            sc.calibrate(quiet(), filling(images()), resume=path, checkpoint_every=2)
        assert sc.Statistics.load(path).images == 8
        ballast.unlink()
        assert sc.calibrate(quiet(), images(), resume=path).images == 16
        assert [item.name for item in folder.iterdir()] == ["stats"]


def test_the_command_says_so_in_one_line_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sc.save(quiet(), tmp_path / "model")
    with mounted(tmp_path / "fixed", "ro") as folder:
        command = ["calibrate", "--checkpoint", str(tmp_path / "model"), "--data", "no such data"]
        code = main([*command, "--out", str(folder / "stats")])
    assert code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"secateur: --out: expected a folder that can be written, got {folder}"
