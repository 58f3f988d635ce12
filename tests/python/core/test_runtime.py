"""Whose threads the core works on: its own, or those of torch's OpenMP."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys

import numpy as np
import pytest
import secateur as sc
import torch
from finetuning import batches, quiet
from launch import run_script

runtime = sc.core.runtime


@pytest.fixture
def three_threads():
    before = runtime.threads()
    runtime.set_threads(3)
    yield
    runtime.set_threads(before)
    runtime.set_team("own")


X = torch.randn(3, 50, 5, 24, generator=torch.Generator().manual_seed(0))
INVERSE = torch.linalg.inv(torch.cov(X.flatten(0, 1).flatten(1).T.double()) + torch.eye(120)).numpy()


def sums():
    """Everything that runs in parallel; nothing of torch's that would, for it cannot in a forked child."""
    scorer, accumulator = sc.core.AttentionScorer(5, 24, moments=True), sc.core.MomentAccumulator(24)
    scorer.update(X, X)
    accumulator.update(X, norm="layer")
    return [
        *scorer.state().values(),
        *accumulator.state().values(),
        sc.core.value_similarity(X[0, 0].numpy()),
        *sc.core.eliminate(INVERSE, np.ones((120, 3)), 40),
    ]


def test_the_team_changes_no_bit(three_threads):
    results = []
    for team in ("own", "openmp", "own"):
        runtime.set_team(team)
        results.append(sums())
    for other in results[1:]:
        for left, right in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(left, right)


def test_an_unknown_team_is_refused():
    with pytest.raises(sc.errors.InvalidArgument, match="team: expected 'own' or 'openmp', got 'tbb'"):
        runtime.set_team("tbb")


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize(("team", "more"), [("openmp", 0), ("own", 1)])
def test_whose_threads_they_are(team, more):
    """On torch's threads no other is started; there are as many of them as of torch's."""
    script = f"""
import os, numpy as np, torch, secateur as sc
torch.set_num_threads(2)
sc.core.runtime.set_threads(2)
torch.randn(1000, 1000) @ torch.randn(1000, 1000)
before = set(os.listdir("/proc/self/task"))
sc.core.runtime.set_team({team!r})
sc.core.MomentAccumulator(300).update(np.ones((1000, 300)))
print(len(set(os.listdir("/proc/self/task")) - before))
"""
    code, out, errors = run_script(script, fresh=True)
    assert code == 0, errors
    assert int(out) == more


def test_torch_threads_are_for_the_block(three_threads):
    with sc.core.torch_threads():
        assert (runtime.team(), runtime.threads()) == ("openmp", torch.get_num_threads())
    assert (runtime.team(), runtime.threads()) == ("own", 3)

    def fail():
        with sc.core.torch_threads():
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (runtime.team(), runtime.threads()) == ("own", 3)


def _in_a_child(queue):
    queue.put(sums())


@pytest.mark.skipif(sys.platform == "win32", reason="fork")
def test_a_forked_child_works_on_threads_of_its_own(three_threads):
    """OpenMP's do not live on in a child: to wait for them would take forever."""
    runtime.set_team("openmp")
    expected = sums()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_a_child, args=(queue,), daemon=True)
    child.start()
    try:
        results = queue.get(timeout=60)
    finally:
        child.join(10)
        child.kill()
    for left, right in zip(expected, results, strict=True):
        np.testing.assert_array_equal(left, right)


def calibrated():
    return sc.calibrate(quiet(), [images.clamp(-1, 1) for images, _ in batches(2)]).tensors


def _calibrated_in_a_child(queue):
    queue.put(calibrated())


@pytest.mark.skipif(sys.platform == "win32", reason="fork")
def test_a_forked_child_calibrates(three_threads):
    """After the parent has: torch's OpenMP threads do not live on in it. torch needs one thread there, as anywhere."""
    context = multiprocessing.get_context("fork")
    torch.set_num_threads(1)
    queue = context.Queue()
    expected = calibrated()
    child = context.Process(target=_calibrated_in_a_child, args=(queue,), daemon=True)
    child.start()
    try:
        found = queue.get(timeout=60)
    finally:
        child.join(10)
        child.kill()
    for name, array in expected.items():
        np.testing.assert_array_equal(array, found[name])


def test_the_core_alone_has_no_openmp_to_work_on():
    script = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_core", sys.argv[1])
core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)
try:
    core.runtime.set_team("openmp")
except Exception as error:
    print(error)
"""
    path = sc.core.AttentionScorer.__module__
    command = [sys.executable, "-c", script, sys.modules[path].__file__]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert result.stdout == "team: expected OpenMP (libgomp) loaded in this process, got none\n"


def test_subnormals_are_flushed_on_every_thread_and_kept_again():
    """In a fresh process, whose threads exist before: those that begin later would inherit it."""
    script = """
import torch, secateur as sc
torch.set_num_threads(3)
tiny = torch.full((3 << 16,), 1e-39)
share = lambda: float((tiny * 1.0 != 0).double().mean())
found = [share()]
cpu, gpu = torch.device("cpu"), torch.device("cuda")
with sc.core.subnormals_flushed(cpu):
    found.append(share())
    with sc.core.subnormals_flushed(cpu):
        found.append(share())
    found.append(share())
found.append(share())
with sc.core.subnormals_flushed(gpu):  # is left alone
    found.append(share())
print(*found)
"""
    code, out, errors = run_script(script, fresh=True)
    assert code == 0, errors
    assert out.split() == ["1.0", "0.0", "0.0", "0.0", "1.0", "1.0"]


def test_subnormals_of_no_thread_are_refused():
    with pytest.raises(sc.errors.InvalidArgument, match="threads: expected 1 to 1024, got 0"):
        runtime.flush_subnormals(True, 0)
