"""Count the instructions of every kernel under callgrind, and compare with instructions.json.

A count is the same whatever else the machine does: it shows a slower kernel where clocks cannot. Counts are compared
for the instruction sets that callgrind can run, so without AVX-512. Another compiler than the recorded one gets more
room.

make instructions, or python benchmarks/cpp/instructions.py build/bench/benchmarks/cpp/count_kernels [--update]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

RECORD = Path(__file__).with_name("instructions.json")
ISAS = ("baseline", "avx2")
# More instructions than recorded, as a fraction, by whether the compiler is the recorded one.
ROOM = {True: 0.05, False: 0.5}


def ask(program: Path, what: str, isa: str = "baseline") -> list[str]:
    """What count_kernels says."""
    environment = os.environ | {"SECATEUR_ISA": isa}
    result = subprocess.run([program, what], env=environment, capture_output=True, text=True, check=False)
    return result.stdout.splitlines() if result.returncode == 0 else []


def count(program: Path, isa: str, workload: str) -> int:
    """Instructions of one run of the workload, on one thread."""
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", "--collect-atstart=no"]
    command += ["--toggle-collect=secateur_counted", str(program), workload]
    environment = os.environ | {"SECATEUR_ISA": isa}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = re.search(r"Collected : (\d+)", result.stderr)
    if found is None or int(found[1]) == 0:
        message = f"workload: expected callgrind to count {workload!r}, got {result.stderr!r}"
        raise ValueError(message)
    return int(found[1])


def main() -> int:
    """Returns 1 when a kernel takes more instructions than recorded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path, help="count_kernels of a release build")
    parser.add_argument("--update", action="store_true", help="record these counts")
    arguments = parser.parse_args()

    compiler = " ".join(ask(arguments.program, "--compiler"))
    wanted = [(isa, workload) for isa in ISAS for workload in ask(arguments.program, "--list", isa)]
    counts: dict[str, dict[str, int]] = {}
    with ThreadPoolExecutor(os.cpu_count()) as runs:
        found = list(runs.map(lambda each: count(arguments.program, *each), wanted))
    for (isa, workload), instructions in zip(wanted, found, strict=True):
        counts.setdefault(isa, {})[workload] = instructions
    if arguments.update:
        RECORD.write_text(json.dumps({"compiler": compiler, "counts": counts}, indent=2) + "\n", encoding="utf-8")
        return 0

    record = json.loads(RECORD.read_text(encoding="utf-8"))
    room = ROOM[compiler == record["compiler"]]
    bad = 0
    for isa, found in counts.items():
        recorded = record["counts"].get(isa, {})
        for workload in recorded.keys() - found.keys():
            bad += 1
            print(f"{isa:9} {workload:58} {'gone':>12}")
        for workload, instructions in found.items():
            before = recorded.get(workload)
            change = "new" if before is None else f"{instructions / before - 1:+.1%}"
            worse = before is None or instructions > before * (1 + room)
            bad += worse
            print(f"{isa:9} {workload:58} {instructions:>12,} {change:>8}{'  <- not as recorded' if worse else ''}")
    if bad:
        print(f"instructions: expected what {RECORD.name} has, at up to {1 + room:.0%} of its counts, got {bad} not")
    return 1 if bad or not counts else 0


if __name__ == "__main__":
    sys.exit(main())
