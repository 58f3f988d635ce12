"""Files of ratios per block, in the names of SNP's authors too (Shim et al., ECCV 2024)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from ..anatomy.anatomy import Anatomy
from ..anatomy.groups import Group
from ..errors import InvalidArgument, Unsupported
from ..files import documents
from .limits import removed_fraction


def shipped_configurations() -> list[str]:
    """Names of the published per-block ratio files that ship with the package."""
    folder = resources.files(__package__) / "configs"
    return sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))


def fractions_from_file(anatomy: Anatomy, source: str | Path) -> dict[str, float]:
    """Read a per-block file: group names, or the names that SNP's authors use (Shim et al., ECCV 2024).

    There matmul_{2i} is block i's query/key, matmul_{2i+1} its value, blocks_i_mlp_fc1 its FFN, and the last add the
    residual width; index 0 has no number.
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
    published = [group for group in anatomy.groups if group.kind not in ("heads", "block")]
    group_of = {_published_name(anatomy, group): group.name for group in published}
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
        if key not in values and anatomy.group(name).kind in ("qk", "v", "ffn"):
            raise InvalidArgument(f"ratios: expected the key {key!r} in {source}, got none")


def _published_name(anatomy: Anatomy, group: Group) -> str:
    if group.block is None:
        index = 2 * len({g.block for g in anatomy.groups if g.block is not None})
        return f"add_{index}" if group.kind == "width" else group.name
    if group.kind == "ffn":
        return f"blocks_{group.block}_mlp_fc1"
    index = 2 * group.block + (group.kind == "v")
    return f"matmul_{index}" if index else "matmul"
