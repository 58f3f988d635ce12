from __future__ import annotations

import time

import pytest
from secateur.runtime.progress import progress


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes what is captured for a terminal
    monkeypatch.setenv("COLUMNS", "160")


def test_silent_where_nobody_watches(capfd: pytest.CaptureFixture[str]) -> None:
    with progress(3, "calibrate") as advance:
        advance(3, note="loss 1.0")
    assert capfd.readouterr() == ("", "")


def test_a_terminal_sees_count_rate_and_remaining_time(terminal: None, capsys: pytest.CaptureFixture[str]) -> None:
    with progress(4000, "calibrate") as advance:
        for _ in range(3):
            time.sleep(0.15)
            advance(1000, note="loss 1.25")
    captured = capsys.readouterr()
    assert captured.out == ""
    for text in ("calibrate", "3,000/4,000 images", " images/s", "0:00:0", "loss 1.25"):
        assert text in captured.err


def test_unknown_length_and_other_units(terminal: None, capsys: pytest.CaptureFixture[str]) -> None:
    with progress(None, "finetune", unit="steps") as advance:
        time.sleep(0.15)
        advance(7)
        time.sleep(0.15)
    assert "7 steps" in capsys.readouterr().err


def test_the_display_ends_with_an_exception(terminal: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), progress(3) as advance:
        advance(1 // 0)
    assert capsys.readouterr().err.rstrip().endswith("\x1b[2K")  # the transient line is wiped


def test_a_bar_within_another_shares_its_display(terminal: None, capsys: pytest.CaptureFixture[str]) -> None:
    both = "\x1b[1A\x1b[2K"  # the cursor goes up for the second line
    captured = ""
    with progress(5, "search", unit="rounds") as outer:
        for _ in range(2):
            with progress(64, "evaluate") as inner:
                inner(32)
                # The display is drawn ten times a second, on a busy machine later.
                shown, end = "", time.monotonic() + 20
                while not (both in shown and "32/64 images" in shown) and time.monotonic() < end:
                    time.sleep(0.05)
                    shown += capsys.readouterr().err
            assert both in shown
            assert "32/64 images" in shown
            captured += shown
            outer(1)
    with progress(3, "prune"):
        pass
    captured += capsys.readouterr().err
    assert "2/5 rounds" in captured
    assert captured.count("\x1b[?25l") == 2  # one display for both bars, one more for the last
