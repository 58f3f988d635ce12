"""Searches: their traces against ones computed by hand, what they answer, refuse, and end with after a kill."""

from __future__ import annotations

import copy
import importlib
import json
import re
import signal
from itertools import islice
from types import SimpleNamespace

import pytest
import secateur as sc
import torch
from finetuning import Breaking, Killed, batches, same, tiny, weights
from launch import run_script
from models import images, make
from searching import ALL, TUNING, calibration, tuned
from secateur.data.loader import loader as data_loader
from secateur.searches.objectives import Measures
from secateur.searches.stepper import Stepper

# `secateur.search` is the function.
module = importlib.import_module("secateur.searches.course")
FAST = {"method": "snp", "groups": ALL, "round_to": 1}


def labelled(model, count=3, size=5):
    generator = torch.Generator().manual_seed(1)
    return [(images(model, size, seed), torch.randint(0, 7, (size,), generator=generator)) for seed in range(count)]


@pytest.fixture
def plain():
    """A random model of odd sizes, its statistics and validation batches."""
    model = make("plain")
    return model, sc.calibrate(model, [images(model, 6)]), labelled(model)


def scripted(monkeypatch, accuracies, speedups=()):
    """Have the rounds measure these, one after the other; return how often each was asked for."""
    asked = SimpleNamespace(accuracies=0, speedups=0)

    def evaluate(model, loader):
        asked.accuracies += 1
        return SimpleNamespace(top1=accuracies[asked.accuracies - 1])

    def bench(model, reference, **_):
        asked.speedups += 1
        return SimpleNamespace(speedup=speedups[asked.speedups - 1])

    monkeypatch.setattr(module, "evaluate", evaluate)
    monkeypatch.setattr(module, "bench", bench)
    return asked


def trace(result):
    """(base, T, step, accepted, move) of every round."""
    return [(row.base, row.threshold, row.step, row.accepted, row.move) for row in result.history]


# --- The rule for T and its step --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rounds", "last"),
    [
        # (base, T, λ) of each round, whether it is kept, and the move behind it; λ starts at 8.
        # Round 3: λ_b/2 = 4, T = 8 + 4. Round 4: λ_b/4 = 2. Third miss: λ = 2/2, T = T_b = 8, and 1 is forgotten.
        (
            [
                (None, 0, 8, True, "grow"),
                (0, 8, 8, True, "grow"),
                (1, 16, 8, False, "halve"),
                (1, 12, 4, False, "halve"),
                (1, 10, 2, False, "return"),
                (1, 8, 1, True, "grow"),
                (5, 9, 1, True, "grow"),
                (6, 10, 1, False, "halve"),
                (6, 9.5, 0.5, True, "grow"),
                (8, 10, 0.5, False, "halve"),
                (8, 9.75, 0.25, True, "grow"),
            ],
            (10, 10, 0.25),
        ),
        # The return to T_b misses as well: 1's predecessor, 0, takes its place, with λ_0/2, λ_0/4; its third miss goes
        # back to the dense model, and one more leaves nothing.
        (
            [
                (None, 0, 8, True, "grow"),
                (0, 8, 8, True, "grow"),
                (1, 16, 8, False, "halve"),
                (1, 12, 4, False, "halve"),
                (1, 10, 2, False, "return"),
                (1, 8, 1, False, "halve"),
                (0, 4, 4, False, "halve"),
                (0, 2, 2, False, "return"),
                (0, 0, 1, False, "end"),
            ],
            None,
        ),
        # A kept round starts the count of misses again, with the λ that it was reached by.
        (
            [
                (None, 0, 8, True, "grow"),
                (0, 8, 8, False, "halve"),
                (0, 4, 4, True, "grow"),
                (2, 8, 4, False, "halve"),
                (2, 6, 2, False, "halve"),
                (2, 5, 1, True, "grow"),
                (5, 6, 1, False, "halve"),
                (5, 5.5, 0.5, False, "halve"),
                (5, 5.25, 0.25, False, "return"),
                (5, 5, 0.125, True, "grow"),
            ],
            (9, 5.125, 0.125),
        ),
    ],
)
def test_the_rule_by_hand(rounds, last):
    stepper = Stepper(8)
    for base, threshold, step, kept, move in rounds:
        assert not stepper.over
        assert (stepper.base, stepper.threshold, stepper.step) == (base, threshold, step)
        assert stepper.tell(kept) == move
    assert stepper.over == (last is None)
    if last is not None:
        assert (stepper.base, stepper.threshold, stepper.step) == last


def test_models_that_may_come_back_are_kept():
    stepper = Stepper(8)
    for kept in (True, True, True, False, False):
        stepper.tell(kept)
    assert stepper.reachable == {0, 1, 2}
    stepper.tell(False)  # the third: 2 is cut once more, then it is forgotten
    assert stepper.reachable == {0, 1, 2}
    stepper.tell(False)
    assert stepper.reachable == {0, 1}


# --- What the objectives accept ---------------------------------------------------------------------------------------


def test_what_is_accepted():
    dense = Measures(1000, 8000, 90.0, 1.0)

    def judge(objective, params=1000, macs=8000, accuracy=90.0, latency=1.0, best=None):
        best = None if best is None else Measures(1, 1, best)
        return tuple(objective.judge(Measures(params, macs, accuracy, latency), dense, best))

    critical = sc.AccuracyCritical(1.0)
    assert judge(critical, accuracy=89.0) == (True, True)
    assert judge(critical, accuracy=88.99) == (False, False)
    assert judge(critical, accuracy=91.0) == (True, True)
    assert judge(critical, accuracy=89.0, best=95.0) == (True, True)  # smaller counts, not better
    for objective, name, unit in (
        (sc.MemoryConstrained(0.5), "params", 10),
        (sc.LatencySensitive(macs=0.5), "macs", 80),
        (sc.LatencySensitive(latency=0.5), "latency", 0.01),
    ):
        assert judge(objective, **{name: 51 * unit}) == (True, False)  # over the budget: on the way
        assert judge(objective, **{name: 50 * unit}) == (True, True)
        assert judge(objective, **{name: 49 * unit}) == (False, True)
        assert judge(objective, **{name: 49 * unit}, accuracy=20.0) == (False, True)
        assert judge(objective, **{name: 49 * unit}, accuracy=80.0, best=80.0) == (False, True)
        assert judge(objective, **{name: 49 * unit}, accuracy=79.9, best=80.0) == (False, False)


@pytest.mark.parametrize(
    ("make_objective", "text"),
    [
        (lambda: sc.AccuracyCritical(-1), "objective.max_drop: expected a number of at least 0, got -1"),
        (lambda: sc.AccuracyCritical(cost="flops"), "objective.cost: expected 'params' or 'macs', got 'flops'"),
        (lambda: sc.MemoryConstrained(0), "objective.params: expected a fraction in"),
        (lambda: sc.MemoryConstrained(1.5), "objective.params: expected a fraction in"),
        (lambda: sc.LatencySensitive(), "objective: expected either macs or latency, got neither"),
        (lambda: sc.LatencySensitive(macs=0.5, latency=0.5), "objective: expected either macs or latency, got both"),
        (lambda: sc.LatencySensitive(latency=2), "objective.latency: expected a fraction in"),
        (lambda: sc.LatencySensitive(latency=0.5, repeats=0), "objective.repeats: expected an integer"),
    ],
)
def test_wrong_objectives(make_objective, text):
    with pytest.raises(sc.InvalidArgument, match=text):
        make_objective()


# --- Whole searches, by hand ------------------------------------------------------------------------------------------


def test_accuracy_critical_by_hand(plain, monkeypatch):
    """One point may go: 89.0 of 90.0 is accepted, 88.9 is not. T comes back twice, and is measured once."""
    asked = scripted(monkeypatch, [90.0, 89.5, 88.0, 88.9, 88.5, 89.0])
    model, stats, val = plain
    found = sc.search(model, stats, objective=sc.AccuracyCritical(1.0), loader=val, rounds=7, step=0.125, **FAST)
    assert trace(found) == [
        (None, 0, 0.125, True, "grow"),  # 90.0, the dense model
        (0, 0.125, 0.125, True, "grow"),  # 89.5
        (1, 0.25, 0.125, False, "halve"),  # 88.0, the first miss
        (1, 0.1875, 0.0625, False, "halve"),  # 88.9, the second
        (1, 0.15625, 0.03125, False, "return"),  # 88.5, the third
        (1, 0.125, 0.015625, True, "grow"),  # as round 1
        (5, 0.140625, 0.015625, True, "grow"),  # 89.0
        (6, 0.15625, 0.015625, False, "halve"),  # as round 4
    ]
    assert [row.top1 for row in found.history] == [90.0, 89.5, 88.0, 88.9, 88.5, 89.5, 89.0, 88.5]
    assert asked.accuracies == 6
    assert (found.round, found.accepted) == (6, True)
    assert sc.inspect(found.model).params == found.history[6].params == found.plan.params[1]
    assert 0.84 < found.history[6].params / found.history[0].params <= 1 - 0.140625


def test_memory_constrained_by_hand(plain, monkeypatch):
    """At most 0.74 of the parameters: T = 0.25 is on the way, all that goes further is within the budget."""
    asked = scripted(monkeypatch, [90.0, 89.0, 80.0, 85.0, 84.0, 86.0, 86.0])
    model, stats, val = plain
    found = sc.search(model, stats, objective=sc.MemoryConstrained(0.74), loader=val, rounds=7, step=0.25, **FAST)
    assert trace(found) == [
        (None, 0, 0.25, False, "grow"),
        (0, 0.25, 0.25, False, "grow"),  # 0.75 of the parameters
        (1, 0.5, 0.25, True, "halve"),  # 80.0
        (1, 0.375, 0.125, True, "halve"),  # 85.0
        (1, 0.3125, 0.0625, False, "return"),  # 84.0: within the budget, but less accurate than round 3
        (1, 0.25, 0.03125, False, "grow"),  # as round 1
        (5, 0.28125, 0.03125, True, "halve"),  # 86.0
        (5, 0.265625, 0.015625, True, "halve"),  # 86.0 again: no less accurate, and larger
    ]
    assert asked.accuracies == 7
    assert found.round == 7
    assert sc.inspect(found.model).params <= 0.74 * sc.inspect(model).params
    for row in found.history[1:]:
        assert 0.98 * (1 - row.threshold) < row.params / found.history[0].params <= 1 - row.threshold


def test_latency_sensitive_by_hand(plain, monkeypatch):
    """Half the time, as measured; a T that comes back is measured again, and may come out otherwise."""
    asked = scripted(
        monkeypatch,
        [90.0, 89.0, 88.0, 70.0, 75.0, 70.0, 74.0, 75.0, 75.0],
        [1.25, 1.6, 4.0, 2.0, 4.0, 3.0, 2.5, 1.9],
    )
    model, stats, val = plain
    found = sc.search(model, stats, objective=sc.LatencySensitive(latency=0.5), loader=val, rounds=8, step=0.25, **FAST)
    assert trace(found) == [
        (None, 0, 0.25, False, "grow"),
        (0, 0.25, 0.25, False, "grow"),  # 0.8
        (1, 0.5, 0.25, False, "grow"),  # 0.625
        (2, 0.75, 0.25, True, "halve"),  # 0.25 of the time, 70.0 %
        (2, 0.625, 0.125, True, "grow"),  # 0.5, as much as may be: 75.0 %
        (4, 0.75, 0.125, False, "halve"),  # 0.25, but 70.0 %
        (4, 0.6875, 0.0625, False, "halve"),  # 0.33, but 74.0 %
        (4, 0.65625, 0.03125, True, "return"),  # 0.4, 75.0 %
        (4, 0.625, 0.015625, False, "grow"),  # 0.526 this time
    ]
    assert [round(row.latency, 3) for row in found.history] == [1.0, 0.8, 0.625, 0.25, 0.5, 0.25, 0.333, 0.4, 0.526]
    assert (asked.accuracies, asked.speedups) == (9, 8)
    assert found.round == 7
    assert sc.inspect(found.model).macs == found.history[7].macs == found.plan.macs[1]


def test_it_ends_when_nothing_is_left(plain, monkeypatch):
    """Training that ruins every model, the untouched one at T = 0 included."""
    scripted(monkeypatch, [90.0, 50.0, 50.0, 50.0, 50.0])
    model, stats, val = plain
    seen = []
    found = sc.search(
        model, stats, objective=sc.AccuracyCritical(1.0), loader=val, step=0.5,
        finetune=lambda each: seen.append(sc.inspect(each).params), calibration_loader=[images(model, 6)], **FAST,
    )  # fmt: skip
    assert trace(found) == [
        (None, 0, 0.5, True, "grow"),
        (0, 0.5, 0.5, False, "halve"),
        (0, 0.25, 0.25, False, "halve"),
        (0, 0.125, 0.125, False, "return"),
        (0, 0, 0.0625, False, "end"),
    ]
    assert seen == [row.params for row in found.history[1:]]
    assert seen[-1] == found.history[0].params
    assert not found.accepted
    assert (found.round, found.plan) == (0, None)
    assert "none of 4 rounds was accepted: the answer is the dense model" in str(found)
    assert found.model is not model
    assert same(weights(found.model), weights(model))


def test_without_training_the_dense_model_again_counts_as_none(plain, monkeypatch):
    """A fourth round at T = 0 has the dense model's accuracy: met, but nothing was found."""
    asked = scripted(monkeypatch, [90.0, 50.0, 50.0, 50.0])
    model, stats, val = plain
    found = sc.search(model, stats, objective=sc.AccuracyCritical(0.0), loader=val, rounds=4, step=0.5, **FAST)
    assert trace(found)[4] == (0, 0, 0.0625, True, "grow")
    assert asked.accuracies == 4
    assert not found.accepted
    assert same(weights(found.model), weights(model))


def test_more_than_can_be_cut_is_a_miss(plain, monkeypatch):
    """T = 1.2, then 0.9: no choice of sizes removes so much; nothing is measured for it."""
    asked = scripted(monkeypatch, [90.0, 90.0, 90.0])
    model, stats, val = plain
    found = sc.search(
        model, stats, objective=sc.AccuracyCritical(1.0), loader=val, rounds=4, step=0.6, min_keep={"width": 30}, **FAST
    )
    assert [(row.threshold, row.accepted, row.params is None) for row in found.history] == [
        (0, True, False),
        (0.6, True, False),
        (1.2, False, True),
        (pytest.approx(0.9), False, True),
        (pytest.approx(0.75), True, False),
    ]
    assert asked.accuracies == 3
    assert found.round == 4
    assert sc.inspect(found.model).sizes["width"] >= 30
    line = next(line for line in str(found).splitlines() if " 1.2 " in line)
    assert line.split() == ["2", "1", "1.2", "0.6", "-", "-", "-", "-", "-", "no", "halve"]


# --- Real models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["snp", "refit", "project"])
def test_at_most_one_point_of_a_trained_model(digits_model, digits_images, digits_loader, method):
    stats = sc.calibrate(digits_model, [digits_images], sensitivity="noise")
    val = list(islice(digits_loader, 6))
    before = weights(digits_model)
    found = sc.search(
        digits_model, stats, objective=sc.AccuracyCritical(1.0), loader=val, method=method, rounds=3, step=0.3,
        round_to=1,
    )  # fmt: skip
    assert same(weights(digits_model), before)
    dense, top1 = (sc.evaluate(model, val).top1 for model in (digits_model, found.model))
    assert dense - top1 <= 1.0
    assert found.accepted
    assert sc.inspect(found.model).params <= 0.9 * sc.inspect(digits_model).params
    row = found.history[found.round]
    assert (row.top1, row.params) == (top1, sc.inspect(found.model).params)
    # Every round's size is what its T says, within a rounding step; what was accepted lost no more than a point.
    for each in found.history:
        assert 0 <= (1 - each.threshold) - each.params / found.history[0].params < 0.01
        assert each.accepted == (dense - each.top1 <= 1.0)
    # The plan makes the same model, bit for bit.
    again = copy.deepcopy(digits_model)
    sc.prune(again, found.plan)
    assert same(weights(again), weights(found.model))


@pytest.mark.parametrize(
    "objective",
    [
        pytest.param(sc.MemoryConstrained(0.4), id="params"),
        pytest.param(sc.LatencySensitive(macs=0.4), id="macs"),
        pytest.param(sc.LatencySensitive(latency=0.9, repeats=2), id="latency", marks=pytest.mark.alone),
    ],
)
def test_a_budget_is_met_by_the_most_accurate(digits_model, digits_images, digits_loader, objective):
    stats = sc.calibrate(digits_model, [digits_images])
    val = list(islice(digits_loader, 4))
    found = sc.search(digits_model, stats, objective=objective, loader=val, method="snp", rounds=6, step=0.3)
    dense = found.history[0]
    within = [
        row
        for row in found.history
        if row.params is not None
        and (row.params / dense.params <= 0.4 if isinstance(objective, sc.MemoryConstrained) else True)
        and (row.macs / dense.macs <= 0.4 if getattr(objective, "macs", None) else True)
        and (row.latency <= 0.9 if getattr(objective, "latency", None) else True)
    ]
    assert found.history[found.round] in within
    assert found.history[found.round].top1 == max(row.top1 for row in within)
    assert all((row.latency is None) == (objective != sc.LatencySensitive(latency=0.9, repeats=2)) for row in within)


@pytest.mark.parametrize("method", ["snp", "refit", "project"])
@pytest.mark.parametrize("kind", ["plain", "qk_norm", "swiglu_packed", "inner_norms", "distilled", "no_qkv_bias"])
def test_every_method_on_odd_sizes(kind, method):
    model = make(kind)
    stats = sc.calibrate(model, [images(model, 6)])
    found = sc.search(
        model, stats, objective=sc.LatencySensitive(macs=0.7), loader=labelled(model), method=method, rounds=3,
        step=0.2, groups=ALL, round_to={"qk": 2, "v": 2, "ffn": 3, "width": 3},
    )  # fmt: skip
    assert found.accepted
    assert sc.inspect(found.model).macs <= 0.7 * sc.inspect(model).macs
    x = images(model, 3, 5)
    with torch.no_grad():
        assert bool(found.model(x).isfinite().all())


def test_without_labels_it_is_the_agreement_with_the_dense_model(digits_model, digits_images):
    class Shuffled:
        """Another order in every pass: answers must be those to the very images."""

        passes = 0

        def __iter__(self):
            self.passes += 1
            order = torch.randperm(64, generator=torch.Generator().manual_seed(self.passes))
            yield from digits_images[order].split(16)

    stats = sc.calibrate(digits_model, [digits_images])
    found = sc.search(
        digits_model, stats, objective=sc.AccuracyCritical(10.0), loader=Shuffled(), method="snp", rounds=3, step=0.25
    )
    with torch.no_grad():
        same_class = (found.model(digits_images).argmax(1) == digits_model(digits_images).argmax(1)).double().mean()
    assert found.accepted
    assert found.history[0].agreement == 100
    assert found.history[found.round].agreement == pytest.approx(100 * float(same_class), abs=1e-9)
    assert all(row.top1 is None for row in found.history)
    assert "agreement" in str(found)
    assert not digits_model.training


# --- With fine-tuning -------------------------------------------------------------------------------------------------


def test_each_round_cuts_the_trained_model_before_it():
    """Calibrate, plan, prune, fine-tune round after round through the public functions: the same bits."""
    found = tuned()
    dense = tiny().eval()
    model = copy.deepcopy(dense)
    params = sc.inspect(dense).params
    for number in (1, 2, 3):
        stats = sc.calibrate(model, calibration(), sensitivity="noise")
        left = (1 - 0.125 * number) * params / sc.inspect(model).params
        sc.prune(model, sc.plan(model, stats, method="project", target=sc.Target(params=left), groups=ALL, round_to=1))
        sc.finetune(model, batches(), teacher=dense, **TUNING)
        assert found.history[number].params == sc.inspect(model).params
        assert found.history[number].top1 == sc.evaluate(model, batches(4, 6, seed=9)).top1
    assert found.round == 3
    assert same(weights(found.model), weights(model))
    assert found.plan is None


@pytest.mark.parametrize("objective", [sc.AccuracyCritical(100.0), sc.MemoryConstrained(0.7)], ids=["drop", "params"])
def test_behind_a_miss_the_model_before_it_is_cut_again(monkeypatch, objective):
    """Two kept, one missed: the next round begins with the second's weights, not with those that missed.

    Of a budget the miss is accepted, and stays in memory as the answer for now.
    """
    rounds = []

    def evaluate(model, loader):
        rounds.append(weights(model))
        return SimpleNamespace(top1=-20.0 if len(rounds) == 4 else 90.0)

    monkeypatch.setattr(module, "evaluate", evaluate)
    found = tuned(4, objective=objective)
    assert found.history[3].accepted == isinstance(objective, sc.MemoryConstrained)
    assert [row.base for row in found.history] == [None, 0, 1, 2, 2]
    assert found.round == 4

    # The same by hand from round 2's weights: T = 0.25 + 0.0625.
    kept = tuned(2).model
    assert same(weights(kept), rounds[2])
    dense = tiny().eval()
    left = (1 - 0.3125) * sc.inspect(dense).params / sc.inspect(kept).params
    stats = sc.calibrate(kept, calibration(), sensitivity="noise")
    sc.prune(kept, sc.plan(kept, stats, method="project", target=sc.Target(params=left), groups=ALL, round_to=1))
    sc.finetune(kept, batches(), teacher=dense, **TUNING)
    assert same(weights(found.model), weights(kept))


# --- Killed and resumed -----------------------------------------------------------------------------------------------

SCRIPT = """
import os, signal
import torch
torch.set_num_threads(1)
from finetuning import batches
from searching import tuned

class Kill(list):
    seen = 0
    def __iter__(self):
        for batch in list.__iter__(self):
            if Kill.seen == {after}:
                os.kill(os.getpid(), signal.SIGKILL)
            Kill.seen += 1
            yield batch

tuned(4, Kill(batches()), {tuning!r}, resume={path!r})
"""


@pytest.mark.parametrize("every", [None, 2])
def test_a_killed_search_ends_as_one_that_was_not(tmp_path, every):
    """Killed by the system in the training of round 3; with ``checkpoint_every`` that training goes on, too."""
    path = tmp_path / "search.safetensors"
    tuning = {**TUNING, **({} if every is None else {"checkpoint_every": every})}
    code = SCRIPT.format(after=13, tuning=tuning, path=str(path))
    ended, _, errors = run_script(code)
    assert ended == -signal.SIGKILL, errors
    left = {"search.safetensors"} | ({"search.round3.safetensors"} if every else set())
    assert {file.name for file in tmp_path.iterdir()} == left

    train = Breaking(batches(), 100)
    found = tuned(4, train, tuning, resume=path)
    whole = tuned(5)
    assert (found.resumed, found.round) == (2, 4)
    # Rounds 3 and 4 are 10 batches; the first two of round 3 are read, and passed over.
    assert train.left == 90
    assert found.history == whole.history[:5]
    assert [file.name for file in tmp_path.iterdir()] == ["search.safetensors"]

    # Once more is no more work, and more rounds go on from there.
    again = tuned(4, Breaking(batches(), 0), tuning, resume=path)
    assert (again.resumed, again.history) == (4, found.history)
    assert same(weights(again.model), weights(found.model))
    more = tuned(5, None, tuning, resume=path)
    assert more.history == whole.history
    assert same(weights(more.model), weights(whole.model))


@pytest.mark.parametrize("kind", ["no_qkv_bias", "no_proj_bias", "qk_norm", "rms_norm", "gate", "swiglu_packed"])
def test_trained_models_come_back_from_the_file(kind, tmp_path):
    """Sizes, added biases, changed eps, and values that no plan made; then the search goes on from them."""
    model = make(kind)
    stats, val = sc.calibrate(model, [images(model, 6)]), labelled(model)

    def train(each):
        with torch.no_grad():
            for parameter in each.parameters():
                parameter += 0.01

    arguments = {
        "objective": sc.AccuracyCritical(100.0), "loader": val, "step": 0.125, "groups": ALL, "finetune": train,
        "round_to": {"qk": 2, "v": 2, "ffn": 1, "width": 1}, "calibration_loader": [images(model, 6)],
    }  # fmt: skip
    whole = sc.search(model, stats, rounds=3, **arguments)
    path = tmp_path / "search.safetensors"
    sc.search(model, stats, rounds=2, resume=path, **arguments)
    found = sc.search(model, stats, rounds=2, resume=path, **arguments)
    with torch.no_grad():
        x = images(model, 3, 5)
        assert torch.equal(found.model(x), sc.search(model, stats, rounds=2, **arguments).model(x))
    found = sc.search(model, stats, rounds=3, resume=path, **arguments)
    assert (found.resumed, found.round) == (2, 3)
    assert found.history == whole.history
    assert same(weights(found.model), weights(whole.model))


@pytest.mark.parametrize("method", ["project", "snp"])
def test_interrupted_without_training(plain, tmp_path, method):
    model, stats, val = plain
    path = tmp_path / "search.safetensors"
    arguments = {"objective": sc.MemoryConstrained(0.8), "rounds": 4, "step": 0.125, "method": method, "groups": ALL}
    arguments["round_to"] = 1
    whole = sc.search(model, stats, loader=val, **arguments)
    for after in (0, 4, 8, 1):
        with pytest.raises(Killed):
            sc.search(model, stats, loader=Breaking(val, after + 1), resume=path, **arguments)
    found = sc.search(model, stats, loader=val, resume=path, **arguments)
    assert found.resumed > 0
    assert found.history == whole.history
    assert same(weights(found.model), weights(whole.model))
    assert found.plan.to_dict() == whole.plan.to_dict()
    done = sc.search(model, stats, loader=val, resume=path, **arguments)
    assert same(weights(done.model), weights(whole.model))
    with pytest.raises(sc.InvalidArgument, match="^resume: expected a file of at most 3 rounds, got 4$"):
        sc.search(model, stats, loader=val, resume=path, **{**arguments, "rounds": 3})


def test_another_search_is_refused(plain, tmp_path, monkeypatch):
    model, stats, val = plain
    path = tmp_path / "search.safetensors"
    arguments = {"objective": sc.MemoryConstrained(0.8), "rounds": 2, "step": 0.125, **FAST}
    sc.search(model, stats, loader=val, resume=path, **arguments)
    before = path.read_bytes()
    monkeypatch.setattr(module, "evaluate", lambda *_: pytest.fail("it began to work"))
    for change, text in (
        (
            {"objective": sc.MemoryConstrained(0.9)},
            "with objective: {'name': 'MemoryConstrained', 'params': 0.8} where",
        ),
        ({"objective": sc.LatencySensitive(macs=0.9)}, "with objective"),
        ({"step": 0.15}, "with step: 0.125 where it is 0.15 now"),
        ({"method": "refit"}, "with method: 'snp' where it is 'refit' now"),
        ({"similarity": "activations"}, "with options"),
        ({"groups": ("qk", "v", "ffn")}, "with groups"),
        ({"round_to": 2}, "with round_to: 1 where it is 2 now"),
        ({"loader": val[:2]}, "with loader: others"),
        ({"loader": [x for x, _ in val]}, "with labels: others"),
        ({"stats": sc.calibrate(model, [images(model, 7)])}, "with stats: others"),
        ({"finetune": lambda _: None, "calibration_loader": val}, "with finetune: None where it is 'function' now"),
    ):
        with pytest.raises(sc.InvalidArgument, match=f"^resume: expected the file of this search, got one {text}"):
            sc.search(**{"model": model, "stats": stats, "loader": val, "resume": path, **arguments, **change})
    other = make("plain")
    with torch.no_grad():
        other.head.bias[0] += 1  # no cut touches it: the statistics do not know
    with pytest.raises(sc.InvalidArgument, match="got one with model: others"):
        sc.search(other, stats, loader=val, resume=path, **arguments)
    for damaged in (before[:-9], before[:-3] + bytes([before[-3] ^ 1]) + before[-2:], b"nothing of ours"):
        path.write_bytes(damaged)
        with pytest.raises(sc.InvalidArgument, match=r"search\.safetensors: expected a secateur search file"):
            sc.search(model, stats, loader=val, resume=path, **arguments)


# --- Bad input, files -------------------------------------------------------------------------------------------------

LOADERS = {"calibration_loader": [], "train_loader": []}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"objective": 0.5}, "objective: expected AccuracyCritical, MemoryConstrained, LatencySensitive, got 0.5"),
        ({"stats": {}}, "stats: expected Statistics from calibrate, got dict"),
        ({"loader": 3}, "loader: expected batches that can be read several times, got int"),
        ({"loader": iter([])}, "loader: expected batches .*, got list_iterator, an iterator"),
        ({"loader": []}, "loader: expected at least one batch, got none"),
        ({"rounds": 0}, "rounds: expected an integer of at least 1, got 0"),
        ({"step": 0}, r"step: expected a fraction in \(0, 1\), got 0"),
        ({"step": 1.0}, r"step: expected a fraction in \(0, 1\), got 1.0"),
        (
            {"method": "magic"},
            "method: expected one of fisher, magnitude, michel, project, random, refit, snp, taylor, vbp, got 'magic'",
        ),
        ({"colour": "red"}, "options: expected"),
        ({"groups": "qk"}, "groups: expected a sequence of names, got 'qk'"),
        ({"groups": ["head"]}, "groups: expected"),
        ({"freeze": ["blocks.9.*"]}, "freeze: expected"),
        ({"min_keep": 3}, "min_keep: expected a dict"),
        ({"round_to": 0}, "round_to: expected an integer"),
        ({"allocation": "fair"}, "allocation: expected 'measured', 'error' or 'uniform', got 'fair'"),
        ({"allocation": "error"}, "stats: expected sensitivities"),
        ({"resume": "/no/such/folder/file"}, "resume: expected a file in an existing folder"),
        ({"objective": sc.MemoryConstrained(0.01)}, "target: expected params >="),
        ({"objective": sc.MemoryConstrained(0.7), "rounds": 2}, "rounds: expected at least 3 to remove 0.3 in"),
        ({"train_loader": []}, "train_loader: expected none without finetune, got list"),
        ({"calibration_loader": []}, "calibration_loader: expected none without finetune, got list"),
        ({"finetune": {"epochs": 1}}, "calibration_loader: expected batches .*, got NoneType"),
        ({"finetune": 3, "calibration_loader": []}, "finetune: expected arguments of finetune or a function, got 3"),
        ({"finetune": {"epochs": 1}, "calibration_loader": []}, "train_loader: expected batches"),
        ({"finetune": {"lrate": 1}, **LOADERS}, "finetune: expected .*, got 'lrate'"),
        ({"finetune": {"resume": 1}, **LOADERS}, "finetune: expected .*, got 'resume'"),
        ({"finetune": {"teacher": 1}, **LOADERS}, "finetune: expected a teacher"),
        ({"finetune": print, **LOADERS}, "train_loader: expected none with a function"),
    ],
)  # fmt: skip
def test_bad_input_before_any_work(plain, monkeypatch, change, text):
    model, stats, val = plain
    monkeypatch.setattr(module, "evaluate", lambda *_: pytest.fail("it began to work"))
    before = weights(model)
    arguments = {"objective": sc.AccuracyCritical(), "loader": val, "stats": stats, **change}
    with pytest.raises(sc.InvalidArgument, match=f"^{text}"):
        sc.search(model, **arguments)
    assert same(weights(model), before)


def test_other_models_are_refused(plain, monkeypatch):
    model, stats, val = plain
    monkeypatch.setattr(module, "evaluate", lambda *_: pytest.fail("it began to work"))
    with pytest.raises(sc.InvalidArgument, match="^model: expected the same model, got other weights of"):
        sc.search(make("plain", seed=1), stats, objective=sc.AccuracyCritical(), loader=val)
    features = make("identity_head")
    with pytest.raises(sc.InvalidArgument, match="^model: expected a classifier"):
        sc.search(features, sc.calibrate(features, [images(features)]), objective=sc.AccuracyCritical(), loader=val)
    scores = sc.calibrate(model, [images(model)], collect="scores")
    with pytest.raises(sc.InvalidArgument, match="expected"):
        sc.search(model, scores, objective=sc.AccuracyCritical(), loader=val, method="project")


@pytest.fixture
def found(plain):
    model, stats, val = plain
    return sc.search(model, stats, objective=sc.MemoryConstrained(0.8), loader=val, rounds=3, step=0.125, **FAST)


def test_the_history_is_a_file(found, tmp_path):
    found.save_history(tmp_path / "history.json")
    read = json.loads((tmp_path / "history.json").read_text())
    assert read == json.loads(json.dumps(found.to_dict()))
    assert read["objective"] == {"name": "MemoryConstrained", "params": 0.8}
    assert (read["round"], read["accepted"]) == (found.round, True)
    assert [row["threshold"] for row in read["history"]] == [row.threshold for row in found.history]
    with pytest.raises(sc.InvalidArgument, match="path: expected a file in an existing folder"):
        found.save_history(tmp_path / "no" / "history.json")


def test_the_history_is_a_table(found):
    text = str(found)
    assert text.startswith("Search(most accurate with at most 0.8 of the parameters)")
    assert text.endswith(f"round {found.round} is the answer")
    rows = [line.split() for line in text.splitlines() if re.match(r"\s+\d+\s", line)]
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    assert [row[-2:] for row in rows] == [["yes" if r.accepted else "no", r.move] for r in found.history]


@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_the_history_is_a_plot(found, tmp_path, suffix, magic, monkeypatch):
    found.plot(tmp_path / f"search.{suffix}")
    assert (tmp_path / f"search.{suffix}").read_bytes().startswith(magic)
    with pytest.raises(sc.InvalidArgument, match="path: expected a .pdf, .png, .svg file, got 'search.gif'"):
        found.plot(tmp_path / "search.gif")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(sc.InvalidArgument, match="plot: expected matplotlib to be installed"):
        found.plot(tmp_path / f"other.{suffix}")


def test_all_objectives_are_drawn(plain, tmp_path, monkeypatch):
    model, stats, val = plain
    for objective in (
        sc.AccuracyCritical(50.0),
        sc.LatencySensitive(macs=0.8),
        sc.LatencySensitive(latency=0.9, repeats=1, batch_size=2),
    ):
        found = sc.search(model, stats, objective=objective, loader=val, rounds=3, step=0.4, **FAST)
        found.plot(tmp_path / "search.png")
        assert str(objective) in str(found)


def test_a_loader_of_data_is_read_as_it_is(digits_model, digits_images, tmp_path):
    """An ImageLoader serves all three purposes."""
    stats = sc.calibrate(digits_model, [digits_images[:32]])
    val = data_loader("digits", digits_model, batch_size=32, max_images=64)
    train = data_loader("digits", digits_model, split="train", train=True, shuffle=True, batch_size=16, max_images=32)
    found = sc.search(
        digits_model, stats, objective=sc.LatencySensitive(macs=0.6), loader=val, method="snp", rounds=2, step=0.45,
        finetune={"steps": 2, "lr": 1e-5}, train_loader=train,
        calibration_loader=data_loader("digits", digits_model, split="train", batch_size=16, max_images=32),
        resume=tmp_path / "search.safetensors",
    )  # fmt: skip
    assert found.round == 1
    assert sc.inspect(found.model).macs <= 0.6 * sc.inspect(digits_model).macs
