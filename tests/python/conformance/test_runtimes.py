"""What holds for every engine that is registered."""

from __future__ import annotations

import pytest
import secateur as sc
import torch
from engines import installed
from models import images, make
from secateur.families.registry import family_of
from secateur.latency.agreement import difference, largest
from secateur.latency.runtimes.registry import RUNTIMES
from torch import nn

NAMES = [name for name in RUNTIMES.names() if installed(name)]


def pruned(kind="plain"):
    model = make(kind)
    stats = sc.calibrate(model, [images(model, 8)])
    return sc.prune(model, sc.plan(model, stats, method="snp", ratios={"qk": 0.5, "v": 0.3, "ffn": 0.4})) and model


def layer():
    return family_of(model := make("gate")).layers(model)["blocks.1.attn"].eval()


def convolutions():
    torch.manual_seed(0)
    body = (nn.Conv2d(3, 7, 3, groups=1), nn.BatchNorm2d(7), nn.ReLU(), nn.Conv2d(7, 9, 3, stride=2))
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 4)).eval()


MODELS = {"pruned": (pruned, (3, 12, 15)), "a layer": (layer, (21, 39)), "convolutions": (convolutions, (3, 12, 15))}


def inputs(size, number, seed=0):
    return torch.randn(number, *size, generator=torch.Generator().manual_seed(seed))


def agrees(runtime, found, expected):
    return difference(found, expected) <= getattr(RUNTIMES.named(runtime), "tolerance", 1e-4) * largest(expected)


@pytest.mark.parametrize("runtime", NAMES)
@pytest.mark.parametrize("kind", MODELS)
def test_it_computes_what_the_module_does(runtime, kind):
    make_model, size = MODELS[kind]
    model = make_model()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for number in (1, 3) if kind == "a layer" else (2,):
        with torch.inference_mode():
            run = RUNTIMES.named(runtime).prepare(model, inputs(size, number))
            for seed in (0, 1):  # not what it computed of the example
                x = inputs(size, number, seed)
                before, expected = x.clone(), model(x)
                assert agrees(runtime, run(x), expected)
                assert torch.equal(x, before)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("runtime", NAMES)
def test_two_that_are_ready_do_not_disturb_each_other(runtime):
    """As they are timed: in turn."""
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(5, size), nn.GELU(), nn.Linear(size, 3)).eval() for size in (4, 9)]
    x = torch.randn(2, 5)
    with torch.inference_mode():
        runs = [RUNTIMES.named(runtime).prepare(model, x) for model in models]
        for _ in range(2):
            for model, run in zip(models, runs, strict=True):
                assert agrees(runtime, run(x), model(x))


@pytest.mark.parametrize("runtime", NAMES)
def test_it_has_a_name_and_a_version(runtime):
    found = RUNTIMES.named(runtime)
    assert found.name == runtime
    assert isinstance(found.version, str)
    assert found.version


@pytest.mark.parametrize("runtime", NAMES)
def test_it_is_timed_and_a_table_measured(runtime):
    model = pruned()
    found = sc.bench(model, batch_size=2, repeats=2, warmup=1, runtime=runtime, threads=2)
    assert found.runtime == runtime
    assert found.milliseconds > 0
    assert found.threads == 2
    assert torch.get_num_threads() == 1
    table = sc.measure_latency(model, groups=(), repeats=1, runtime=runtime)
    assert table.machine.threads == 1
    assert (table.runtime, table.runtime_version) == (runtime, RUNTIMES.named(runtime).version)
    assert table.predict(sc.inspect(model)) > 0
