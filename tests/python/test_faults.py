"""Runs killed by the system at random points end, started again, as runs that were not."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
from launch import SUPPORT, run_script


@pytest.mark.skipif(sys.platform == "win32", reason="fork and kill -9")
@pytest.mark.parametrize("points", [2, pytest.param(13, marks=pytest.mark.faults)])
def test_runs_killed_at_random_points_are_resumed(tmp_path: Path, points: int) -> None:
    """So many kills of each of calibrate, finetune, gates, search and save; of the last, 65."""
    seed = random.randrange(2**32)
    script = (SUPPORT / "kill_points.py").read_text()
    code, out, errors = run_script(script, tmp_path, points, seed, timeout=1800)
    assert code == 0, f"seed {seed}: {errors}"
    found = json.loads(out)
    jobs = ("calibrate", "finetune", "gates", "search", "save")
    assert [found[name]["killed"] for name in jobs] == [points] * len(jobs)
    if points > 2:
        assert all(found[name]["left_a_file"] > 0 for name in jobs)
    sys.stdout.write(out)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("rounds", [60, pytest.param(10_000, marks=pytest.mark.faults)])
def test_nothing_grows_with_rounds_of_work(tmp_path: Path, rounds: int) -> None:
    """Calibrate, plan, prune, save, load: no memory, file, thread or object is left of a round."""
    script = (SUPPORT / "rounds_of_work.py").read_text()
    code, out, errors = run_script(script, tmp_path, rounds, timeout=7200)
    assert code == 0, errors
    found = json.loads(out)
    early, late = found["early"], found["late"]
    assert late["files"] == early["files"]
    assert late["threads"] == early["threads"]
    # A model of one round has some 700 objects and 100 kB of weights; caches fill in the first rounds.
    assert late["objects"] <= early["objects"] + 500, found
    assert late["memory"] <= early["memory"] + (8 << 20), found
    assert {item.name for item in tmp_path.iterdir()} <= {"stats", "plan.json", "plan.weights.safetensors", "model"}
    sys.stdout.write(out)
