"""Runs killed by the system at random points end, started again, as runs that were not."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("kill_points.py")


@pytest.mark.skipif(sys.platform == "win32", reason="fork and kill -9")
@pytest.mark.parametrize("points", [2, pytest.param(13, marks=pytest.mark.faults)])
def test_runs_killed_at_random_points_are_resumed(tmp_path: Path, points: int) -> None:
    """So many kills of each of calibrate, finetune, search and save; of the last, 52."""
    seed = random.randrange(2**32)
    command = [sys.executable, str(SCRIPT), str(tmp_path), str(points), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    found = json.loads(done.stdout)
    assert [found[name]["killed"] for name in ("calibrate", "finetune", "search", "save")] == [points] * 4
    if points > 2:
        assert all(found[name]["left_a_file"] > 0 for name in ("calibrate", "finetune", "search", "save"))
    sys.stdout.write(done.stdout)
