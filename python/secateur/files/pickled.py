"""Reads files of torch.save without running anything in them: torch's weights_only, with argparse.Namespace let in."""

from __future__ import annotations

import argparse
import io
import pickletools
import re
import warnings
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

__all__ = ["ZIP", "is_pickled", "read_pickled"]

ZIP = b"PK\x03\x04"
_PROTOCOL = 3  # of pickles; torch's weights_only reads no later one
_MAGIC = b"\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # the number that older files of torch.save begin with
_MAX_CLASSES = 5  # named in one line
_MAX_RECORDS = 1 << 16
_MAX_PICKLE = 64 << 20  # bytes of the pickle without its tensors; an optimizer's takes less than one for a ViT
# A class needs more; timm's train.py saves its arguments as this one, which has no code of its own.
_ALLOWED: list[Any] = [argparse.Namespace]


def is_pickled(head: bytes) -> bool:
    """Return whether a file that begins so may be one of torch.save: a zip archive, or an older pickle."""
    return head.startswith((ZIP, b"\x80"))


def read_pickled(path: Path) -> Any:
    """Return what torch.save wrote: tensors on the CPU, and plain values. No code in it runs.

    Memory is bounded by the file's size: an archive holds its tensors as they are, not compressed.

    Raises:
        ValueError: it is damaged or no file of torch.save, or needs classes; the text names them and the line of
            Python that converts it.
    """
    with path.open("rb") as file:
        zipped = file.read(4) == ZIP
        if zipped:
            _check_archive(path)
        protocol = _protocol(path, zipped)
        if protocol > _PROTOCOL:
            what = f"a pickle of protocol {protocol}, which torch reads only by a way that"
            raise ValueError(f"it holds {what} could run any code; {_conversion(path)}")
        file.seek(0)
        try:
            with torch.serialization.safe_globals(_ALLOWED), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Detected pickle protocol 3", UserWarning)
                # The open file, not its path: torch goes by the suffix of a path.
                return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a hostile pickle can raise anything
            text = " ".join(str(error).split())
            classes = _classes(path, text, zipped)
            if classes:
                raise ValueError(_needs(path, classes)) from error
            raise ValueError(f"it is truncated, damaged or no file of torch.save ({text:.150})") from error


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except Exception as error:  # zipfile raises what its parts raise
        raise ValueError(f"it is a zip archive that is truncated or damaged ({error!s:.150})") from error
    names = {record.filename.partition("/")[2]: record for record in records}
    if "constants.pkl" in names:
        raise ValueError(
            "it is a TorchScript archive, which holds a program; save the state_dict of the model that it was made from"
        )
    if "data.pkl" not in names:
        raise ValueError("it is a zip archive that torch.save did not write")
    size = sum(record.file_size for record in records)
    if any(record.compress_type != zipfile.ZIP_STORED for record in records) or size > path.stat().st_size:
        raise ValueError("it is an archive that is compressed, which torch.save does not write")
    if len(records) > _MAX_RECORDS or names["data.pkl"].file_size > _MAX_PICKLE:
        raise ValueError(
            f"it is an archive of more than {_MAX_RECORDS:,} tensors, or {_MAX_PICKLE:,} bytes without them"
        )


def _protocol(path: Path, zipped: bool) -> int:
    """Return the protocol of the pickle; 0 for the first two, which do not say.

    Raises:
        ValueError: torch.save did not write it.
    """
    if zipped:
        with zipfile.ZipFile(path) as archive:
            name = next(each for each in archive.namelist() if each.partition("/")[2] == "data.pkl")
            with archive.open(name) as file:
                head = file.read(2)
        return head[1] if len(head) == 2 and head[0] == 0x80 else 0
    with path.open("rb") as file:
        head = file.read(32)
    if _MAGIC not in head:
        raise ValueError("it is truncated, or a pickle that torch.save did not write")
    return head[1]


def _classes(path: Path, error: str, zipped: bool) -> list[str]:
    """Return the classes and functions that torch does not let in, by name; none if something else is wrong."""
    named = re.search(r"(?:GLOBAL|global:?) (?:GLOBAL )?([\w.]+) was not an allowed", error)
    blocked = re.search(r"unsupported GLOBAL ([\w.]+) whose module", error)
    # The first that torch met says most about the file.
    found = [match[1] for match in (named, blocked) if match]
    if zipped:
        try:
            with torch.serialization.safe_globals(_ALLOWED):
                found += sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
        except Exception:  # it is about the text of an error that is raised anyway
            return found
    return list(dict.fromkeys(str(each)[:80] for each in found))


def _needs(path: Path, classes: list[str]) -> str:
    more = "" if len(classes) <= _MAX_CLASSES else f" and {len(classes) - _MAX_CLASSES} more"
    needed = f"{', '.join(classes[:_MAX_CLASSES])}{more}"
    return f"it needs {needed}, which is not loaded since that could run any code; {_conversion(path)}"


def _conversion(path: Path) -> str:
    loaded = f"torch.load({str(path)!r}, weights_only=False){_way_to_state(path)}"
    saved = str(path.with_suffix(".state.pth"))
    return f"if you trust the file, convert it: import torch; torch.save({loaded}, {saved!r})"


def _way_to_state(path: Path) -> str:
    """Return what leads from the unpickled object to the state dict, as far as the pickle's operations tell."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                name = next(each for each in archive.namelist() if each.endswith("/data.pkl"))
                return _way(io.BytesIO(archive.read(name)))
        with path.open("rb") as file:
            for _ in range(3):  # an older file begins with three small pickles
                for _each in pickletools.genops(file):
                    pass
            return _way(file)
    except Exception:  # it is about the text of an error that is raised anyway
        return ""


def _way(file: IO[bytes]) -> str:
    keys, is_dict = [], False
    for operation, argument, _ in pickletools.genops(file):
        if operation.name == "EMPTY_DICT" or "OrderedDict" in str(argument):
            is_dict = True
        elif operation.name in ("GLOBAL", "STACK_GLOBAL") and not is_dict:
            return ".state_dict()"
        elif "UNICODE" in operation.name:
            keys.append(argument)
    return next((f"[{key!r}]" for key in ("state_dict", "model", "model_state_dict") if key in keys), "")
