"""Files as an attacker would write them: any bytes, or any fields under checksums that are right."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import secateur as sc
import torch
from finetuning import batches, quiet
from safetensors.torch import save_file
from secateur.files import container
from secateur.latency import table as latency

__all__ = ["KINDS", "STATISTICS", "fields_of", "peak", "read", "sealed", "seeds", "watched"]

_MODEL = quiet()
_IMAGES = [images.clamp(-1, 1) for images, _ in batches(2)]
STATISTICS = sc.calibrate(_MODEL, _IMAGES)


def _model(path: Path) -> None:
    sc.load(path)


def _statistics(path: Path) -> None:
    sc.Statistics.load(path)


def _plan(path: Path) -> None:
    """Read it, and cut with it: what it says about the model is for `prune` to refuse."""
    sc.prune(quiet(), sc.Plan.load(path))


def _ratios(path: Path) -> None:
    sc.plan(_MODEL, STATISTICS, method="snp", ratios=path)


def _table(path: Path) -> None:
    sc.LatencyTable.load(path)


def _checkpoint(path: Path) -> None:
    sc.finetune(quiet(), batches(2), resume=path)


def _search(path: Path, rounds: int = 1) -> None:
    sc.search(
        _MODEL, STATISTICS, objective=sc.MemoryConstrained(1), loader=batches(2), rounds=rounds, step=0.5, resume=path
    )


def _sequential(path: Path) -> None:
    sc.prune_sequential(quiet(), _IMAGES, ratios={"qk": 0.5, "ffn": 0.5}, resume=path)


KINDS: dict[str, Callable[[Path], None]] = {
    "header": _model,
    "statistics": _statistics,
    "plan": _plan,
    "ratios": _ratios,
    "table": _table,
    "checkpoint": _checkpoint,
    "search": _search,
    "sequential": _sequential,
}
_NAMES = {
    "header": "model",
    "statistics": "statistics",
    "checkpoint": "fine-tuning",
    "search": "search",
    "sequential": "sequential",
}


def seeds(folder: Path) -> dict[str, bytes]:
    """A small file of each kind, as secateur writes it."""
    path = folder / "seed"
    sc.save(quiet(), path)
    found = {"header": path.read_bytes()}
    STATISTICS.save(path)
    found["statistics"] = path.read_bytes()
    sc.plan(_MODEL, STATISTICS, method="snp", ratios={"qk": 0.5, "ffn": 0.5}).save(path)
    found["plan"] = path.read_bytes()
    names = {f"blocks.{block}.{kind}": 0.5 for block in range(2) for kind in ("qk", "v", "ffn")}
    found["ratios"] = json.dumps({"source": "a test", **names}).encode()
    sc.measure_latency(_MODEL, groups=("ffn",), repeats=1).save(path)
    found["table"] = path.read_bytes()
    for kind in ("checkpoint", "search", "sequential"):
        path.unlink()
        KINDS[kind](path)
        found[kind] = path.read_bytes()
    path.unlink()
    return found


def fields_of(kind: str, data: bytes) -> Any:
    """What a valid file says, apart from checksums and tensors."""
    if kind in _NAMES:
        size = int.from_bytes(data[:8], "little")
        return json.loads(json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["secateur"])["fields"])
    outer = json.loads(data)
    return outer["plan"] if kind == "plan" else outer["table"] if kind == "table" else outer


def sealed(kind: str, fields: Any, path: Path, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write fields of any form with the checksums that make them secateur's."""
    if kind in _NAMES:
        text = json.dumps(fields)
        tensors = {"even/blocks.0.qk/images": torch.ones(1)} if tensors is None else tensors
        table = {name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
        outer = {
            "format": 1,
            "kind": _NAMES[kind],
            "fields": text,
            "table_sha256": container._table(_NAMES[kind], text, table),
            "data_sha256": container._data(tensors),
        }
        save_file(dict(tensors), path, metadata={"secateur": json.dumps(outer)})
        return
    if kind == "ratios":
        path.write_text(json.dumps(fields))
        return
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).hexdigest() if kind == "plan" else latency._digest(fields)
    name, inner = ("plan", "plan") if kind == "plan" else ("latency table", "table")
    path.write_text(json.dumps({"secateur": name, "format": 1, "sha256": digest, inner: fields}))


def read(kind: str, path: Path) -> str | None:
    """Read a file; what secateur says against it, None where it takes it. Anything else that is raised is a bug."""
    try:
        KINDS[kind](path)
    except sc.Error as error:
        return str(error)
    return None


# What reading a file has no business with.
_FORBIDDEN = ("os.exec", "os.fork", "os.posix_spawn", "os.system", "pickle.find_class", "socket.connect", "subprocess")
_seen: list[str] | None = None
_allowed = Path()


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if _seen is None:
        return
    if event.startswith(_FORBIDDEN):
        _seen.append(f"{event} {args}")
    writing = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    if writing and not str(args[0]).startswith(str(_allowed)):
        _seen.append(f"{event} {args}")


@contextmanager
def watched(folder: Path) -> Iterator[list[str]]:
    """Note what the block runs, connects to, unpickles, or writes outside of a folder."""
    global _seen, _allowed
    if not getattr(sys, "_secateur_audited", False):
        sys.addaudithook(_audit)
        sys._secateur_audited = True  # type: ignore[attr-defined]
    _allowed, _seen = folder, []
    try:
        yield _seen
    finally:
        _seen = None


@contextmanager
def peak() -> Iterator[Callable[[], int]]:
    """Bytes of memory that the process had at most since the block began, above what it had then."""
    status = Path("/proc/self/status")

    def of(name: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(name))
        return 1024 * int(line.split()[1])

    Path("/proc/self/clear_refs").write_text("5")  # VmHWM from here on
    before = of("VmRSS")
    yield lambda: of("VmHWM") - before
