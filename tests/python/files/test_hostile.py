"""Hostile files: secateur's own errors alone come out, memory stays bounded, nothing runs, nothing else is written."""

from __future__ import annotations

import copy
import json
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import secateur as sc
import torch
from finetuning import quiet
from hostile import KINDS, STATISTICS, fields_of, peak, read, sealed, seeds, watched
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save_file
from secateur.files import container

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc")

MORE = 64 << 20
BINARY = ("header", "statistics", "checkpoint", "search", "sequential")
QUICK = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return seeds(tmp_path_factory.mktemp("seeds"))


def refused(kind: str, path: Path, text: str | None) -> None:
    """Read it: what is said holds ``text``; None where it may be taken. Memory, files and code are watched."""
    size = path.stat().st_size
    with peak() as used, watched(path.parent) as seen:
        said = read(kind, path)
    assert not seen
    assert used() <= size + MORE, f"{used():,} bytes for a file of {size:,}: {said}"
    assert text is None or (said is not None and text in said), said


@pytest.mark.parametrize("kind", KINDS)
def test_the_seeds_are_taken(files: dict[str, bytes], kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(files[kind])
    assert read(kind, path) is None
    tensors = load(files[kind]) if kind in BINARY else None
    sealed(kind, fields_of(kind, files[kind]), path, tensors)
    assert read(kind, path) is None


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@QUICK
def test_damaged_bytes(files: dict[str, bytes], kind: str, tmp_path: Path, data: st.DataObject) -> None:
    """Cut short, flipped, overwritten, repeated."""
    content = bytearray(files[kind])
    # The header, mostly: in the data every change is the checksum's to find.
    places = st.integers(0, len(content) - 1) | st.integers(0, min(400, len(content) - 1))
    for _ in range(data.draw(st.integers(1, 4))):
        place = min(data.draw(places), max(0, len(content) - 1))
        change = data.draw(st.sampled_from(["cut", "flip", "write", "repeat"]))
        if change == "cut":
            del content[place:]
        elif change == "flip" and content:
            content[place] ^= 1 << data.draw(st.integers(0, 7))
        elif change == "write":
            content[place : place + 8] = data.draw(st.binary(min_size=1, max_size=8))
        elif change == "repeat":
            content[place:place] = content[place : place + data.draw(st.integers(1, 300))]
    path = tmp_path / "file"
    path.write_bytes(content)
    refused(kind, path, None)


VALUES: list[Any] = [
    *(None, True, -1, 0, 1, 2**31, 2**63, 10**30, 1e308, -0.5, "", "x" * 1000, "../../etc/passwd", "\x00", "\ud800"),
    *([], {}, [[]], [1, [2, {"a": None}]], {"": {"": []}}, [0] * 1000, {"blocks.0.qk": [[-1]]}, "hf-hub:evil/model"),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, item in items:
        found += places(item, (*path, key))
    return found


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@QUICK
def test_wrong_fields_under_right_checksums(
    files: dict[str, bytes], kind: str, tmp_path: Path, data: st.DataObject
) -> None:
    fields = copy.deepcopy(fields_of(kind, files[kind]))
    for _ in range(data.draw(st.integers(1, 2))):
        where = data.draw(st.sampled_from(places(fields)))
        value = data.draw(st.sampled_from(VALUES))
        if not where:
            fields = value
            break
        inner = fields
        for key in where[:-1]:
            inner = inner[key]
        if data.draw(st.booleans()) or not isinstance(inner, dict):
            inner[where[-1]] = value
        else:
            del inner[where[-1]]
    path = tmp_path / "file"
    try:
        sealed(kind, fields, path, load(files[kind]) if kind in BINARY else None)
    except (UnicodeEncodeError, ValueError):  # what the attacker's own tools refuse
        return
    refused(kind, path, None)


def raw(path: Path, header: bytes, data: bytes = b"", size: int | None = None) -> None:
    path.write_bytes(struct.pack("<Q", len(header) if size is None else size) + header + data)


@pytest.mark.parametrize("kind", ["header", "statistics", "checkpoint"])  # a search of two rounds holds no tensors
def test_headers_that_lie(files: dict[str, bytes], kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    length = int.from_bytes(files[kind][:8], "little")
    header, data = json.loads(files[kind][8 : 8 + length]), files[kind][8 + length :]
    names = [name for name in header if name != "__metadata__"]
    for size in (2**63, 2**64 - 1, 10**8, len(files[kind])):
        raw(path, files[kind][8 : 8 + length], data, size)
        refused(kind, path, "truncated, damaged or no safetensors")
    for changed in (
        {names[0]: {**header[names[0]], "data_offsets": [0, 2**62]}},
        {names[0]: {**header[names[0]], "data_offsets": header[names[-1]]["data_offsets"]}},
        {names[0]: {**header[names[0]], "shape": [2**40, 2**40]}},
        {names[0]: {**header[names[0]], "shape": [2**62, 0]}},
        {names[0]: {**header[names[0]], "dtype": "F128"}},
        {"x": {"dtype": "F32", "shape": [1 << 30], "data_offsets": [0, 1 << 32]}},
    ):
        raw(path, json.dumps({**header, **changed}).encode(), data)
        refused(kind, path, "expected a secateur")
    text = json.dumps(header)
    twice = "{" + text[1:-1] + "," + json.dumps({names[0]: header[names[0]]})[1:]
    raw(path, twice.encode(), data)
    refused(kind, path, None)
    # More tensors than any file has, of no bytes at all.
    empty = {f"{number}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for number in range(20000)}
    raw(path, json.dumps({"__metadata__": header["__metadata__"], **empty}).encode())
    refused(kind, path, "more than 16,384 tensors")
    raw(path, b" " * (9 << 20))
    refused(kind, path, "header is longer than 8,388,608 bytes")


NESTED = "[" * 200_000 + "]" * 200_000
MANY = "[" + "[]," * 2_000_000 + "[]]"
DIGITS = "[" + "9" * 100_000 + "]"


@pytest.mark.parametrize("text", [NESTED, MANY, DIGITS, '{"a":' * 100_000, "[1,", "\ufeff{}", '"' + "é" * 2_000_000])
def test_json_that_is_too_much(text: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    for kind in ("plan", "ratios", "table"):
        path.write_text(text)
        refused(kind, path, "expected")
    if len(text) < 1 << 20:
        for kind in BINARY:
            outer = {"format": 1, "kind": "model", "fields": text, "table_sha256": "", "data_sha256": ""}
            for content in (text, json.dumps(outer)):
                save_file({"a": torch.zeros(1)}, path, metadata={"secateur": content})
                refused(kind, path, "expected a secateur")


def test_large_json_files_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    for kind in ("plan", "ratios", "table"):
        with peak() as used:
            assert "got one of 1,099,511,627,776 bytes, more than 10,485,760" in str(read(kind, path))
        assert used() <= MORE


def test_models_that_would_be_too_large(files: dict[str, bytes], tmp_path: Path) -> None:
    """They are built without weights, but even so depth costs memory, and so do indices."""
    fields, tensors = fields_of("header", files["header"]), load(files["header"])
    path = tmp_path / "file"
    for arguments, text in (
        ({"depth": 10**6}, "expected a depth of at most 512, got 1000000"),
        ({"depth": 10**30}, "expected a depth of at most 512"),
        ({"depth": 60}, "where it builds"),
        ({"embed_dim": 10**6, "num_heads": 10**3}, "expected a model of at most 2,097,152 units"),
        ({"mlp_ratio": 1e9}, "expected a model of at most 2,097,152 units"),
        ({"img_size": [10**6, 10**6], "patch_size": 1}, "where it builds"),
        ({"pretrained": True}, "expected those of the architecture, got 'pretrained'"),
        ({"checkpoint_path": "/etc/passwd"}, "expected those of the architecture, got 'checkpoint_path'"),
        ({"pretrained_cfg": {"file": "/etc/passwd"}}, "expected those of the architecture, got 'pretrained_cfg'"),
    ):
        changed = {**fields, "arguments": {**fields["arguments"], **arguments}}
        sealed("header", changed, path, tensors)
        refused("header", path, text)
    for name in ("hf-hub:evil/model", "local-dir:/tmp", "../../x", "resnet50", "vit_tiny_patch16_224.augreg_in21k"):
        sealed("header", {**fields, "architecture": name}, path, tensors)
        refused("header", path, None if name.startswith("vit") else "expected")


def test_a_zip_is_not_opened(tmp_path: Path) -> None:
    """What torch.save writes is a pickle in a zip."""
    path = tmp_path / "file"
    torch.save({"a": torch.zeros(3)}, path)
    for kind in KINDS:
        refused(kind, path, "expected")


def test_headers_that_could_not_be_read_are_not_written(tmp_path: Path) -> None:
    many = {f"even/{number}/images": torch.ones(1).numpy() for number in range(20_000)}
    with pytest.raises(sc.InvalidArgument, match="expected at most 16,384 tensors"):
        sc.Statistics(STATISTICS.settings, many).save(tmp_path / "file")
    plan = sc.plan(quiet(), STATISTICS, ratios={"ffn": 0.5}, method="refit")
    keep = {"blocks.0.ffn": np.arange(2_000_000)[None]}
    with pytest.raises(sc.InvalidArgument, match=r"^plan: expected one that a file can hold, got JSON of 14,"):
        replace(plan, keep=keep).save(tmp_path / "file")
    # Every wide character is a backslash, which a text within a text within a text holds four times.
    labels, path = {"labels": "\u5bb6" * 930_000}, tmp_path / "wide"
    container.write(path, "statistics", labels, {})
    assert container.read(path, "statistics")[0] == labels
    path.unlink()
    with pytest.raises(sc.InvalidArgument, match="^header: expected at most"):
        container.write(path, "statistics", {"labels": "\u5bb6" * 940_000}, {})
    assert not list(tmp_path.iterdir())
