"""Reads per-block files of fractions removed, also with the names of SNP's authors (Shim et al., ECCV 2024)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from ..anatomy import Anatomy
from ..errors import InvalidArgument, Unsupported
from ..files import documents
from .limits import removed_fraction


def shipped_configurations() -> list[str]:
    """Return the names of the published per-block ratio files that ship with the package."""
    folder = resources.files(__package__) / "configs"
    return sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))


def fractions_from_file(anatomy: Anatomy, source: str | Path) -> dict[str, float]:
    """Read the fraction removed of each group from a per-block file.

    Keys are group names, or the names that SNP's authors use (Shim et al., ECCV 2024): matmul_{2i} is block i's
    query/key, matmul_{2i+1} its value, blocks_i_mlp_fc1 its FFN, and the last add is the residual width; index 0 has no
    number.
    """
    shipped = resources.files(__package__) / "configs" / f"{source}.json"
    if isinstance(source, str) and source in shipped_configurations():
        values = json.loads(shipped.read_text())
    else:
        path = Path(source)
        if not path.is_file():
            names = ", ".join(shipped_configurations())
            raise InvalidArgument(f"ratios: expected a dict, one of {names}, or a file, got {str(source)!r}")
        try:
            values = documents.read_json(path)
        except ValueError as error:
            raise InvalidArgument(f"ratios: expected JSON in {source}, got {error}") from error
    if not isinstance(values, dict):
        raise InvalidArgument(f"ratios: expected a JSON object in {source}, got {type(values).__name__}")
    values.pop("source", None)
    group_of = _published_names(anatomy)
    if not any(key in group_of for key in values):
        group_of = {name: name for name in anatomy.sizes}
    _check_file_keys(anatomy, source, values, group_of)
    return {group_of[key]: removed_fraction(anatomy, key, group_of[key], value) for key, value in values.items()}


def _check_file_keys(anatomy: Anatomy, source: str | Path, values: Mapping[str, Any], names: Mapping[str, str]) -> None:
    for key in values:
        if "width" in anatomy.refused and (key == "width" or key.startswith("add_")):
            raise Unsupported(f"ratios: {source} cuts the width ({anatomy.refused['width']})")
        if key not in names:
            raise InvalidArgument(f"ratios: expected keys of this model in {source}, got the extra key {key!r}")
    for key, name in names.items():
        if key not in values and anatomy.group(name).traits.in_target:
            raise InvalidArgument(f"ratios: expected the key {key!r} in {source}, got none")


# By kind; {0} is twice the block's index, {1} is one more, {2} is the block's index.
_PUBLISHED: Mapping[str, str] = {"qk": "matmul_{0}", "v": "matmul_{1}", "ffn": "blocks_{2}_mlp_fc1", "width": "add_{0}"}


def _published_names(anatomy: Anatomy) -> dict[str, str]:
    blocks = len({group.block for group in anatomy.groups if group.block is not None})
    found = {}
    for group in anatomy.groups:
        if group.kind in _PUBLISHED:
            index = blocks if group.block is None else group.block
            name = _PUBLISHED[group.kind].format(2 * index, 2 * index + 1, index)
            found["matmul" if name == "matmul_0" else name] = group.name
    return found
