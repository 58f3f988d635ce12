from __future__ import annotations

import math
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import secateur as sc
import torch
from secateur import check
from secateur.errors import InvalidArgument
from small_vits import small_batches, small_vit

NO_NUMBERS = [True, False, "3", None, math.nan, math.inf, -math.inf, 1j, [1], np.bool_(True), torch.tensor(1)]


@pytest.mark.parametrize("value", [*NO_NUMBERS, 1.0, 1.5, 2, np.float64(4), np.int64(2)])
def test_what_is_no_integer(value: object) -> None:
    text = re.escape(f"steps: expected an integer of at least 3, got {value!r}")
    with pytest.raises(InvalidArgument, match=f"^{text}$"):
        check.integer("steps", value, 3)


def test_integers() -> None:
    assert check.integer("steps", 1) == 1
    assert check.integer("warmup", 0, 0) == 0
    found = check.integer("steps", np.int32(7))
    assert type(found) is int
    assert found == 7
    assert check.integer("max_images", None, optional=True) is None
    with pytest.raises(InvalidArgument, match=r"^max_images: expected an integer of at least 1, got '5'$"):
        check.integer("max_images", "5", optional=True)


@pytest.mark.parametrize("value", [*NO_NUMBERS, -0.1, 1.1, 10**400])
def test_what_is_no_fraction(value: object) -> None:
    text = re.escape(f"alpha: expected a fraction in [0, 1], got {value!r}")
    with pytest.raises(InvalidArgument, match=f"^{text}$"):
        check.fraction("alpha", value)


def test_fractions_and_their_ends() -> None:
    assert [check.fraction("alpha", value) for value in (0, 0.5, 1, Fraction(1, 4))] == [0.0, 0.5, 1.0, 0.25]
    assert type(check.fraction("alpha", np.float32(0.5))) is float
    with pytest.raises(InvalidArgument, match=r"^x: expected a fraction in \(0, 1\], got 0$"):
        check.fraction("x", 0, open_low=True)
    with pytest.raises(InvalidArgument, match=r"^x: expected a fraction in \[0, 1\), got 1.0$"):
        check.fraction("x", 1.0, open_high=True)
    assert check.fraction("x", 1, open_low=True) == 1
    assert check.fraction("x", 0, open_high=True) == 0


@pytest.mark.parametrize("value", [*NO_NUMBERS, -1, 10**400])
def test_what_is_no_number(value: object) -> None:
    text = re.escape(f"lr: expected a number of at least 0, got {value!r}")
    with pytest.raises(InvalidArgument, match=f"^{text}$"):
        check.number("lr", value)


def test_numbers_and_their_limits() -> None:
    assert check.number("lr", 0) == 0
    assert check.number("lr", 1e30) == 1e30
    assert check.number("lr", 2, high=2) == 2
    with pytest.raises(InvalidArgument, match=r"^lr: expected a number of more than 0, got 0$"):
        check.number("lr", 0, open_low=True)
    with pytest.raises(InvalidArgument, match=r"^lr: expected a number of at least 1 and at most 2, got 2.5$"):
        check.number("lr", 2.5, low=1, high=2)


def test_choices_are_named() -> None:
    check.choice("streams", "memory", ("memory", "recompute"))
    with pytest.raises(InvalidArgument, match=r"^streams: expected 'memory' or 'recompute', got 'disk'$"):
        check.choice("streams", "disk", ("memory", "recompute"))
    with pytest.raises(InvalidArgument, match=r"^allocation: expected 'a', 'b' or 'c', got \['a'\]$"):
        check.choice("allocation", ["a"], ("a", "b", "c"))


def test_files_that_can_be_written(tmp_path: Path) -> None:
    assert check.writable("out", str(tmp_path / "new")) == tmp_path / "new"
    (tmp_path / "old").write_text("")
    assert check.writable("out", tmp_path / "old") == tmp_path / "old"
    for path in (tmp_path, tmp_path / "none" / "file", tmp_path / "old" / "file", Path()):
        text = re.escape(f"out: expected a file in an existing folder, got {path}")
        with pytest.raises(InvalidArgument, match=f"^{text}$"):
            check.writable("out", path)
    with pytest.raises(InvalidArgument, match=r"^out: expected a file in an existing folder, got 3$"):
        check.writable("out", 3)


def test_numbers_of_numpy_are_numbers(tmp_path):
    model = small_vit()
    path = tmp_path / "statistics"
    stats = sc.calibrate(
        model, small_batches(), gamma=np.int64(4), token_fraction=np.float32(0.5), max_images=np.int32(12), resume=path
    )
    stats.save(path)
    assert sc.Statistics.load(path).settings == stats.settings
    plan = sc.plan(model, stats, method="snp", target=sc.Target(macs=np.float32(0.7)), round_to=np.int64(1))
    plan.save(tmp_path / "plan.json")
    assert sc.Plan.load(tmp_path / "plan.json").options["target"]["macs"] == pytest.approx(0.7)
    for objective in (
        sc.AccuracyCritical(np.float32(20)),
        sc.MemoryConstrained(np.float64(0.5)),
        sc.LatencySensitive(latency=np.float32(0.5), batch_size=np.int64(2), repeats=np.int16(3)),
    ):
        assert all(type(value) in (float, int, str, type(None)) for value in vars(objective).values())
