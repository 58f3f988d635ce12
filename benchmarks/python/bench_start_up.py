"""CPU time of starting: `secateur --help`, `secateur --version` and `import secateur`, beside an empty interpreter.

make bench, or python benchmarks/python/bench_start_up.py [--vs CHECKOUT] [--runs 15]
Every run is a new process, and each of the commands is run in turn in every round. With --vs the same commands of
another checkout run in the same rounds. Prints medians, and the medians of paired ratios.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]
COMMANDS = {
    "secateur --help": "sys.argv[1:] = ['--help']; runpy.run_module('secateur', run_name='__main__')",
    "secateur --version": "sys.argv[1:] = ['--version']; runpy.run_module('secateur', run_name='__main__')",
    "import secateur": "import secateur",
    "import torch, timm": "import torch, timm",
    "import secateur, all names": "import secateur; [getattr(secateur, name) for name in secateur.__all__]",
}
NOTHING = "an empty interpreter"
# The package of a checkout, whatever is installed, and the core of this one where the checkout has none of its own.
PRELUDE = """\
import importlib.machinery, runpy, sys
sys.meta_path[:] = [each for each in sys.meta_path if type(each).__name__ != "ScikitBuildRedirectingFinder"]
class Core:
    def find_spec(name, path=None, target=None):
        return importlib.machinery.PathFinder.find_spec(name, [{folder!r}]) if name == "secateur._core" else None
sys.meta_path.append(Core)
"""


@cache
def prelude() -> str:
    code = "import secateur._core; print(secateur._core.__file__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return PRELUDE.format(folder=str(Path(done.stdout.strip()).parent))


def seconds(code: str, checkout: Path) -> float:
    """User and system time of a new interpreter that runs some code with the package of a checkout."""
    command = [sys.executable, "-c", prelude() + code]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPATH": str(checkout / "python")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        raise RuntimeError(f"{code!r} with {checkout}: {done.stderr.strip()}")
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def check(checkout: Path) -> None:
    """Refuse to time another package than the one of the checkout."""
    code = f"import secateur; assert secateur.__file__.startswith({str(checkout / 'python')!r}), secateur.__file__"
    seconds(code, checkout)


def measure(checkouts: list[Path], runs: int) -> dict[tuple[str, Path], list[float]]:
    """CPU seconds of every command with every checkout, and of an empty interpreter, in turn."""
    cases = [("", HERE), *((code, checkout) for code in COMMANDS.values() for checkout in checkouts)]
    found: dict[tuple[str, Path], list[float]] = {case: [] for case in cases}
    for run in range(runs + 1):
        for case in cases:
            value = seconds(*case)
            # The first round fills the caches of files and of byte code.
            if run:
                found[case].append(value)
    return found


def test_start_up(paired):
    """Rows for make bench: each command beside an empty interpreter."""
    check(HERE)
    found = paired.benchmark.pedantic(measure, args=([HERE], 5), rounds=1)
    empty = [1e3 * value for value in found["", HERE]]
    for name, code in COMMANDS.items():
        paired.record(f"{name} ÷ {NOTHING}", [1e3 * value for value in found[code, HERE]], empty, "ms CPU")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vs", type=Path, metavar="CHECKOUT", help="another checkout to time in the same rounds")
    parser.add_argument("--runs", type=int, default=15)
    given = parser.parse_args()
    checkouts = [HERE] if given.vs is None else [HERE, given.vs.resolve()]
    for checkout in checkouts:
        check(checkout)
    found = measure(checkouts, given.runs)
    empty = found["", HERE]
    print(f"CPU seconds, medians of {given.runs} runs in turn, Python {sys.version.split()[0]}")
    print(f"{NOTHING:<28}{statistics.median(empty):>8.3f}")
    for name, code in COMMANDS.items():
        own = found[code, HERE]
        line = f"{name:<28}{statistics.median(own):>8.3f}   {ratio(own, empty):>7.2f} x {NOTHING}"
        if given.vs is not None:
            other = found[code, checkouts[1]]
            line += f"   {ratio(own, other):>6.3f} x the other checkout's {statistics.median(other):.3f}"
        print(line)


def ratio(first: list[float], second: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


if __name__ == "__main__":
    main()
