"""Fuzz the readers of files with atheris (pip install atheris).

    python fuzz_readers.py KIND [CORPUS …] [-max_total_time=600] [other options of libFuzzer]

KIND is header, statistics, plan, ratios, table, checkpoint or search. An input is a file's bytes; behind a first byte
of 0xff, which begins no file of secateur's, it is the JSON of a file's fields, to which right checksums are added.
Whatever is raised but secateur's errors, memory beyond the file's size and 64 MiB, code that is run and files that are
written elsewhere are crashes; libFuzzer keeps their inputs, and `corpus/KIND` keeps what was found before.
"""

from __future__ import annotations

import inspect
import json
import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1] / "python/support"))

import hostile
import torch

# What reads files, and what is made of them.
READERS = "anatomy budgets exports files latency plans searches statistics surgery training"
MARK = 0xFF


def instrument() -> None:
    """Count the branches of the readers. As modules they would be instrumented only without an editable install."""
    for name, module in list(sys.modules.items()):
        if not name.startswith(tuple(f"secateur.{each}." for each in READERS.split())):
            continue
        own = (each for each in vars(module).values() if inspect.isclass(each))
        classes = [each for each in own if each.__module__ == module.__name__]
        for holder in (module, *classes):
            for each in vars(holder).values():
                function = inspect.unwrap(getattr(each, "__func__", each))
                if inspect.isfunction(function) and function.__module__ == module.__name__:
                    atheris.instrument_func(function)


def main() -> None:
    kind, arguments = sys.argv[1], sys.argv[2:]
    folder = Path(tempfile.mkdtemp())
    path = folder / "file"
    torch.set_num_threads(1)
    instrument()
    known = hostile.seeds(folder)[kind]
    corpus = Path(tempfile.mkdtemp())
    (corpus / "file").write_bytes(known)
    (corpus / "fields").write_bytes(bytes([MARK]) + json.dumps(hostile.fields_of(kind, known)).encode())

    def one(data: bytes) -> None:
        if data[:1] == bytes([MARK]):
            try:
                hostile.sealed(kind, json.loads(data[1:]), path)
            except (ValueError, RecursionError):
                return
        else:
            path.write_bytes(data)
        with hostile.peak() as used, hostile.watched(folder) as seen:
            hostile.read(kind, path)
        assert not seen, seen
        assert used() <= path.stat().st_size + (64 << 20), f"{used():,} bytes"

    atheris.Setup([sys.argv[0], *arguments, str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
