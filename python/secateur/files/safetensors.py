"""Reads safetensors files. Everything is checked before memory is allocated, and only the tensors stay in memory.

safetensors' own `safe_open` (0.8.0) keeps about 56 bytes for every tensor that it reads, and also maps the file.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from io import BufferedReader
from typing import Any

import torch

MAX_HEADER = 1 << 23  # bytes; safetensors itself would accept a hundred million
MAX_TENSORS = 1 << 14
_MAX_STRINGS = 8 * MAX_TENSORS  # each tensor has five
_MAX_MEMORY = 48 << 20  # bytes that a header takes while it is read
_MAX_RANK = 64  # torch and numpy have no more
_METADATA = "__metadata__"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
if hasattr(torch, "float8_e8m0fnu"):  # torch 2.7
    _DTYPES["F8_E8M0"] = torch.float8_e8m0fnu


@dataclass(frozen=True, slots=True)
class Entry:
    """The header's entry of one tensor; ``begin`` and ``size`` are bytes in the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    size: int


def memory_of(text: str) -> int:
    """Estimate from above the memory that the values of a JSON text take besides its characters."""
    # An empty list takes 64 bytes, each of its entries 8, a number 28, a string 49, a dict 64 and 100 per entry.
    of = {"[": 72, "{": 64, ",": 36, ":": 100, '"': 26}
    return sum(size * text.count(character) for character, size in of.items())


def header_size(file: BufferedReader) -> int:
    """Return the size of the header in bytes, as stored in the file; 0 if the file is too short."""
    size = int.from_bytes(_at(file, 0, 8), "little")
    return size if size <= _length(file) else 0


def read_table(file: BufferedReader) -> tuple[dict[str, str], list[Entry]]:
    """Return the header's metadata, and its entry of each tensor, sorted by name.

    Every byte after the header belongs to one tensor, and every tensor lies within the file.

    Raises:
        ValueError: it is not a safetensors file, or its header has more than `MAX_HEADER` bytes, or more strings than
            `MAX_TENSORS` tensors need.
    """
    size, length = int.from_bytes(_at(file, 0, 8), "little"), _length(file)
    if size > length - 8:
        raise ValueError(f"{length:,} bytes, where a header and its size are expected")
    if size > MAX_HEADER:
        raise ValueError(f"a header of {size:,} bytes, more than {MAX_HEADER:,}")
    header = _parsed(_at(file, 8, size))
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("metadata that are not strings")
    entries = [_entry(name, each, 8 + size) for name, each in header.items()]
    end = 8 + size
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.size)):
        if entry.begin != end:
            raise ValueError(f"{entry.name:.99}: data at byte {entry.begin:,}, where {end:,} is expected")
        end += entry.size
    if end != length:
        raise ValueError(f"{length:,} bytes, where the header says {end:,}")
    return metadata, sorted(entries, key=lambda entry: entry.name)


def read_tensors(file: BufferedReader, entries: list[Entry]) -> dict[str, torch.Tensor]:
    """Return the tensors of these entries by name, in the same order, in new memory.

    Raises:
        ValueError: the file has become shorter since its table was read.
        RuntimeError: torch cannot allocate them.
    """
    found = {}
    for entry in sorted(entries, key=lambda entry: entry.begin):
        found[entry.name] = tensor = torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
        if entry.size == 0:
            continue
        file.seek(entry.begin)
        # NumPy has no bfloat16, and a tensor without axes has no byte view.
        if file.readinto(tensor.reshape(-1).view(torch.uint8).numpy().data) != entry.size:
            raise ValueError(f"{entry.name:.99}: fewer than {entry.size:,} bytes")
    return {entry.name: found[entry.name] for entry in entries}


def _at(file: BufferedReader, place: int, size: int) -> bytes:
    file.seek(place)
    return file.read(size)


def _length(file: BufferedReader) -> int:
    return os.fstat(file.fileno()).st_size


def _parsed(data: bytes) -> dict[str, Any]:
    """Parse the header, after checking its strings, sizes and nesting before JSON creates objects."""
    if data[:1] != b"{":
        raise ValueError("a header that is no JSON object")
    # Any quotation mark that remains begins or ends a string.
    strings = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    count = strings.count(b'"') // 2
    if count > _MAX_STRINGS:
        raise ValueError(f"a header of {count:,} strings, more than {_MAX_STRINGS:,}")
    outside = b"".join(strings.split(b'"')[::2])
    if outside.translate(None, b"{}[]:,0123456789 \t\r\n") or re.search(rb"\d{20}", outside):
        raise ValueError("a header that holds more than strings and sizes")
    # The bytes, the text and its strings; one character beyond ASCII can make a whole text wide.
    memory = memory_of(outside.decode()) + 52 * count + (3 if data.isascii() else 9) * len(data)
    if memory > _MAX_MEMORY:
        raise ValueError(f"a header that takes about {memory:,} bytes in memory, more than {_MAX_MEMORY:,}")
    del strings, outside
    text = data.decode()
    del data
    try:
        header: dict[str, Any] = json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("a header that is nested too deeply") from error
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a header that has a name twice")
    return found


def _entry(name: str, said: Any, data: int) -> Entry:
    name.encode()  # half a surrogate pair is not a valid name
    if not isinstance(said, dict) or said.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name:.99}: no dtype, shape and data_offsets")
    dtype, shape, offsets = said["dtype"], said["shape"], said["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{name:.99}: the dtype {str(dtype)[:40] if isinstance(dtype, str) else 'that is no string'}")
    if not _sizes(shape) or len(shape) > _MAX_RANK or not _sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{name:.99}: a shape or data_offsets that are not sizes")
    begin, end = offsets
    size = _DTYPES[dtype].itemsize * math.prod(shape)
    if end - begin != size:
        raise ValueError(f"{name:.99}: data_offsets {begin:,} to {end:,}, where dtype and shape say {size:,} bytes")
    return Entry(name, _DTYPES[dtype], tuple(shape), data + begin, size)


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, int) and value < 1 << 63 for value in values)
