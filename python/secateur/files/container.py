"""The file format: safetensors whose metadata holds a JSON header and SHA-256 checksums. Nothing is unpickled."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..check import writable
from ..errors import Error, InvalidArgument, Unsupported, first_line
from .safetensors import MAX_HEADER, MAX_TENSORS, header_size, memory_of, read_table, read_tensors

KEY = "secateur"
FORMAT = 1
_PIECE = 32768  # elements: below this, torch copies on one thread
_DEVICE_PIECE = 1 << 20  # elements: enough to make a copy from a device worthwhile
# Limits on the memory a file may take besides its size: far above secateur's files, and a bound for hostile ones.
_MAX_TEXT = 10 << 20  # bytes of a JSON file
_MAX_VALUES = 44 << 20  # bytes of the JSON's values in Python


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; it replaces ``path`` if the block succeeds, else it is removed."""
    writable("path", path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # the process's default; safetensors would deny access to all other users
        yield temporary
        temporary.chmod(stat.S_IMODE(mode))
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except SafetensorError as error:  # a full disk, or a folder that is not writable
        raise OSError(f"{path}: expected to be written, got {error}") from error
    finally:
        with suppress(OSError):  # a read-only folder refuses this too
            temporary.unlink(missing_ok=True)


@contextmanager
def understood(expected: str) -> Iterator[None]:
    """Refuse a file whose checksums are right but whose fields are not as secateur writes them.

    Raises:
        InvalidArgument: in the block, something was missing or had another type, shape or range.
    """
    try:
        yield
    except Error:
        raise
    except KeyError as error:
        raise InvalidArgument(f"{expected}, got one without {error}") from error
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = first_line(error)
        raise InvalidArgument(f"{expected}, got one whose fields cannot be understood ({reason})") from error


def parse(text: str) -> Any:
    """Return the values of a JSON text.

    Raises:
        ValueError: it is not JSON, is nested too deeply, or would take more memory than any secateur header.
    """
    if len(text) > _MAX_TEXT or memory_of(text) > _MAX_VALUES:
        raise ValueError(
            f"JSON of {len(text):,} characters and about {memory_of(text):,} bytes in memory, "
            f"more than {_MAX_TEXT:,} or {_MAX_VALUES:,}"
        )
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"text that is not JSON (line {error.lineno}, column {error.colno})") from error


def digest(tensor: torch.Tensor) -> str:
    """Return the SHA-256 of a tensor's values, row-major, whatever its strides and device; copies only small pieces."""
    sha = hashlib.sha256()
    for piece in _pieces(tensor.detach()):
        sha.update(piece.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return the digest of each tensor by name, sorted; on as many threads as torch has."""
    names = sorted(tensors)
    # hashlib releases the GIL. Start with the largest, or one thread may finish long after the others.
    order = sorted(names, key=lambda name: -tensors[name].numel())
    threads = min(torch.get_num_threads(), len(names))
    if threads <= 1:
        return {name: digest(tensors[name]) for name in names}
    for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()  # other threads have their own streams
    with ThreadPoolExecutor(threads) as pool:
        found = dict(zip(order, pool.map(digest, (tensors[name] for name in order)), strict=True))
    return {name: found[name] for name in names}


def _pieces(data: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the tensor itself, or pieces in row-major order that are small enough to copy cheaply."""
    on_cpu = data.device.type == "cpu"
    most = _PIECE if on_cpu else _DEVICE_PIECE
    if (data.is_contiguous() and on_cpu) or data.numel() <= most:
        yield data
    elif data[0].numel() > most:
        for part in data:
            yield from _pieces(part)
    else:
        yield from data.split(most // data[0].numel())


def write(path: str | Path, kind: str, header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a file of this kind, completely or not at all.

    Args:
        path: the file; its folder must exist.
        kind: the kind of file, such as "model".
        header: JSON values.
        tensors: maps names to tensors, on any device and with any strides.

    Raises:
        InvalidArgument: the folder does not exist, the header holds a value that JSON cannot hold, or `read` would
            refuse the file.
        Unsupported: this machine is big-endian.
    """
    little_endian(path)
    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    try:
        fields = json.dumps(header, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"header: expected JSON values, got {error}") from error
    # Quotes and backslashes are escaped twice, and every tensor has an entry of its own.
    size = sum(map(len, flat)) + 128 * len(flat) + len(fields) + 3 * (fields.count('"') + fields.count("\\"))
    if len(flat) > MAX_TENSORS or size > MAX_HEADER or memory_of(fields) > _MAX_VALUES:
        raise InvalidArgument(
            f"header: expected at most {MAX_TENSORS:,} tensors and {MAX_HEADER:,} bytes, got {len(flat):,} tensors "
            f"and {size:,} bytes"
        )
    outer = {
        "format": FORMAT,
        "kind": kind,
        "fields": fields,
        "table_sha256": _table(kind, fields, {n: (str(t.dtype), tuple(t.shape)) for n, t in flat.items()}),
        "data_sha256": _data(flat),
    }
    with replacing(Path(path)) as temporary:
        save_file(flat, temporary, metadata={KEY: json.dumps(outer, sort_keys=True)})
        with temporary.open("rb") as file:
            try:
                read_table(file)
            except ValueError as error:
                raise InvalidArgument(f"header: expected one that can be read again, got {error}") from error


def read(path: str | Path, kind: str, *, verify: bool = True) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read the header and tensors of a file of this kind.

    Args:
        path: the file.
        kind: the kind it must be.
        verify: also check the tensors' values against their checksum.

    Raises:
        InvalidArgument: no such file, a truncated or damaged one, another program's, another kind, or a newer format.
        Unsupported: this machine is big-endian.
    """
    path = Path(path)
    expected = f"{path.name}: expected a secateur {kind} file"
    if not path.is_file():
        raise InvalidArgument(f"path: expected a secateur {kind} file, got {path}, which is not a file")
    little_endian(path)
    try:
        with path.open("rb") as file:
            if header_size(file) > MAX_HEADER:
                raise InvalidArgument(f"{expected}, got one whose header is longer than {MAX_HEADER:,} bytes")
            metadata, entries = read_table(file)
            if KEY not in metadata:
                raise InvalidArgument(f"{expected}, got a safetensors file that secateur did not write")
            outer = _outer(metadata.pop(KEY), expected, kind)
            if len(entries) > MAX_TENSORS:
                raise InvalidArgument(f"{expected}, got one of more than {MAX_TENSORS:,} tensors")
            table = {entry.name: (str(entry.dtype), entry.shape) for entry in entries}
            if outer["table_sha256"] != _table(kind, outer["fields"], table):
                raise InvalidArgument(f"{expected}, got one whose header does not match its checksum")
            tensors = read_tensors(file, entries)
    except Error:
        raise
    except (ValueError, OSError, RuntimeError) as error:
        raise InvalidArgument(f"{expected}, got one that is truncated, damaged or no safetensors ({error})") from error
    if verify and outer["data_sha256"] != _data(tensors):
        raise InvalidArgument(f"{expected}, got one whose data do not match their checksum")
    try:
        fields = parse(outer["fields"])
    except ValueError as error:
        raise InvalidArgument(f"{expected}, got {error}") from error
    if not isinstance(fields, dict):
        raise InvalidArgument(f"{expected}, got one whose header is damaged")
    return fields, tensors


def little_endian(path: str | Path) -> None:
    """Refuse a machine on which the bytes in memory, and so the checksums, differ from those in a file."""
    if sys.byteorder != "little":
        raise Unsupported(f"path: expected a little-endian machine for {Path(path).name}, got a big-endian one")


def _outer(text: str, expected: str, kind: str) -> dict[str, Any]:
    try:
        if not text.isascii():
            raise ValueError("text that secateur does not write")
        outer: dict[str, Any] = parse(text)
        found, version, checked = outer["kind"], outer["format"], (outer["fields"], outer["table_sha256"])
        well_formed = isinstance(version, int) and all(isinstance(value, str) and value.isascii() for value in checked)
    except (ValueError, KeyError, TypeError):
        well_formed = False
    if not well_formed:
        raise InvalidArgument(f"{expected}, got one whose header is damaged")
    if version > FORMAT:
        raise InvalidArgument(f"{expected} of format {FORMAT} or older, got format {version}: update secateur")
    if found != kind:
        raise InvalidArgument(f"{expected}, got a {found} file")
    return {"data_sha256": None, **outer}


def _table(kind: str, fields: str, table: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
    text = json.dumps([FORMAT, kind, fields, sorted((n, d, list(s)) for n, (d, s) in table.items())])
    return hashlib.sha256(text.encode()).hexdigest()


def _data(tensors: Mapping[str, torch.Tensor]) -> str:
    return hashlib.sha256("".join(digests(tensors).values()).encode()).hexdigest()
