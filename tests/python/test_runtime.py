"""Whose threads the core works on: its own, or those of torch's OpenMP."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys

import numpy as np
import pytest
import secateur as sc
import torch

runtime = sc.core.runtime


@pytest.fixture
def three_threads():
    before = runtime.threads()
    runtime.set_threads(3)
    yield
    runtime.set_threads(before)
    sc.core.use_torch_threads()


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


def _in_a_child(queue):
    queue.put(sums())


@pytest.mark.skipif(sys.platform == "win32", reason="fork")
def test_a_forked_child_works_on_threads_of_its_own(three_threads):
    """OpenMP's do not live on in a child: to wait for them would take forever."""
    runtime.set_team("openmp")
    expected = sums()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_a_child, args=(queue,))
    child.start()
    results = queue.get(timeout=60)
    child.join(60)
    child.kill()
    assert child.exitcode == 0
    for left, right in zip(expected, results, strict=True):
        np.testing.assert_array_equal(left, right)


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
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout == "team: expected OpenMP (libgomp) loaded in this process, got none\n"
