from __future__ import annotations

import importlib
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from secateur.errors import InvalidArgument
from secateur.latency.bench import bench
from torch import Tensor, nn

# The package's attribute of this name is the function.
module = importlib.import_module("secateur.latency.bench")
stopwatch = importlib.import_module("secateur.latency.stopwatch")


class Sleeper(nn.Module):
    """Takes a known time and remembers what it saw."""

    def __init__(self, seconds: float, log: list[str] | None = None, name: str = "") -> None:
        super().__init__()
        self.seconds, self.log, self.name = seconds, log, name
        self.shapes: set[tuple[int, ...]] = set()
        self.seen: set[tuple[bool, bool, int]] = set()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        if self.log is not None:
            self.log.append(self.name)
        self.shapes.add(tuple(images.shape))
        self.seen.add((self.training, torch.is_inference_mode_enabled(), torch.get_num_threads()))
        time.sleep(self.seconds)
        return images


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what Sleepers sleep is time, whatever else the machine does."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(stopwatch, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(sys.modules[__name__], "time", SimpleNamespace(sleep=sleep))


def test_known_times_and_their_ratio(clock: None) -> None:
    found = bench(Sleeper(0.02), Sleeper(0.05), batch_size=4, input_size=8, repeats=5, warmup=0)
    assert found.milliseconds == pytest.approx(20)
    assert found.reference_milliseconds == pytest.approx(50)
    assert found.images_per_second == pytest.approx(4 / (found.milliseconds / 1e3))
    assert found.speedup == pytest.approx(2.5)
    assert found.quartiles[0] <= found.milliseconds <= found.quartiles[1]
    assert found.speedup_quartiles is not None
    assert found.speedup_quartiles[0] <= found.speedup <= found.speedup_quartiles[1]
    assert (found.batch_size, found.input_size, found.repeats, found.device) == (4, (3, 8, 8), 5, "cpu")


def test_the_clock_is_the_one_on_the_wall() -> None:
    """As long as it slept at least; on a busy machine that can be much longer."""
    found = bench(Sleeper(0.02), batch_size=4, input_size=8, repeats=3, warmup=0)
    assert 20 <= found.milliseconds < 2000


def test_speedup_is_the_median_of_paired_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    # The machine slows down fourfold half-way: unpaired medians would say something else.
    model, reference = Sleeper(0), Sleeper(0)
    times = {id(model): iter([1.0, 1.0, 4.0, 4.0, 5.0]), id(reference): iter([2.0, 2.0, 8.0, 8.0, 15.0])}
    monkeypatch.setattr(module, "warm", lambda *_: 1)
    monkeypatch.setattr(stopwatch, "_sample", lambda which, *_: next(times[id(which)]))
    found = bench(model, reference, batch_size=10, repeats=5)
    assert found.speedup == 2.0
    assert found.speedup_quartiles == (2.0, 2.0)
    assert (found.milliseconds, found.reference_milliseconds) == (4000.0, 8000.0)
    assert found.quartiles == (1000.0, 4000.0)
    assert (found.images_per_second, found.reference_images_per_second) == (2.5, 1.25)


def test_models_take_turns() -> None:
    log: list[str] = []
    bench(Sleeper(0.03, log, "m"), Sleeper(0.03, log, "r"), repeats=4, warmup=1, input_size=4)
    # For each model a first batch, the warm-up and one that is timed to size the samples; then the pairs.
    assert "".join(log) == "mmm" + "rrr" + "mr" + "rm" + "mr" + "rm"


def test_short_batches_are_repeated_to_fill_a_sample(clock: None) -> None:
    log: list[str] = []
    found = bench(Sleeper(0.0021, log, "m"), repeats=3, warmup=0, input_size=4)
    assert found.milliseconds == pytest.approx(2.1)
    assert len(log) - 2 == 3 * 10  # of 20 ms


def test_state_is_restored_and_inference_is_what_is_timed(digits_model: nn.Module) -> None:
    model = Sleeper(0.0).train()
    digits_model.train()
    digits_model.blocks[0].eval()
    modes = [each.training for each in digits_model.modules()]
    generator = torch.get_rng_state()
    found = bench(model, digits_model, batch_size=2, input_size=32, repeats=2, warmup=0, threads=1)
    assert model.seen == {(False, True, 1)}
    assert found.threads == 1
    assert torch.get_num_threads() == 2
    assert model.training
    assert [each.training for each in digits_model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generator)


def test_input_size_is_the_models_own(digits_model: nn.Module) -> None:
    assert bench(digits_model, batch_size=3, repeats=1, warmup=0).input_size == (3, 32, 32)
    model = Sleeper(0)
    for size, expected in ((5, (3, 5, 5)), ((5, 6), (3, 5, 6)), ((1, 5, 6), (1, 5, 6))):
        model.shapes.clear()
        assert bench(model, batch_size=3, input_size=size, repeats=1).input_size == expected
        assert model.shapes == {(3, *expected)}


def test_without_a_reference_nothing_is_compared() -> None:
    found = bench(Sleeper(0), batch_size=1, input_size=4, repeats=2)
    assert found.speedup is None
    assert found.reference_images_per_second is None
    assert "reference" not in str(found)


def test_every_model_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one piece of code torch compiles a few versions, and then runs what comes as it is written."""
    compiled = torch.compile

    def without_code(run: nn.Module, **options: object) -> object:
        return compiled(run, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", without_code)
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for width in range(3, 7):
            models = [nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, size)) for size in (width, 2 * width)]
            bench(*models, batch_size=2, input_size=4, repeats=1, warmup=0, compile=True)


def test_each_model_is_run_by_its_own_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    ready: list[tuple[str, nn.Module]] = []

    def prepared(runtime: SimpleNamespace, model: nn.Module, _: Tensor, name: str) -> nn.Module:
        ready.append((f"{name} by {runtime.name}", model))
        return model

    monkeypatch.setattr(module, "prepared", prepared)
    monkeypatch.setattr(module, "chosen", lambda name, *_, **__: SimpleNamespace(name=name or "torch"))
    models = Sleeper(0), Sleeper(0)
    found = bench(*models, batch_size=1, input_size=4, repeats=1, runtime="a", reference_runtime="b")
    assert ready == [("model by a", models[0]), ("reference by b", models[1])]
    assert (found.runtime, found.reference_runtime) == ("a", "b")
    found = bench(*models, batch_size=1, input_size=4, repeats=1, runtime="a")
    assert ready[2:] == [("model by a", models[0]), ("reference by a", models[1])]
    assert found.reference_runtime == "a"
    assert bench(models[0], batch_size=1, input_size=4, repeats=1).reference_runtime is None


def test_text_is_one_line_of_the_figures() -> None:
    found = bench(Sleeper(0.01), Sleeper(0.02), batch_size=2, input_size=4, repeats=3)
    assert "\n" not in str(found)
    assert f"{found.images_per_second:,.1f} images/s" in str(found)
    assert f"{found.speedup:.2f}x" in str(found)
    assert "2x3x4x4 on cpu" in str(found)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"batch_size": 0}, "batch_size: expected an integer of at least 1, got 0"),
        ({"repeats": 0}, "repeats: expected an integer of at least 1, got 0"),
        ({"warmup": -1}, "warmup: expected an integer of at least 0, got -1"),
        ({"threads": 0}, "threads: expected an integer of at least 1, got 0"),
        ({"input_size": (1, 2, 3, 4)}, r"input_size: expected a side, .*, got \(1, 2, 3, 4\)"),
        ({"batch_size": "3"}, "batch_size: expected an integer of at least 1, got '3'"),
        ({"repeats": 1.5}, "repeats: expected an integer of at least 1, got 1.5"),
        ({"threads": 1.5}, "threads: expected an integer of at least 1, got 1.5"),
        ({"warmup": True}, "warmup: expected an integer of at least 0, got True"),
        ({"input_size": 8.5}, "input_size: expected a side, .*, got 8.5"),
        ({"input_size": True}, "input_size: expected a side, .*, got True"),
        ({"input_size": "88"}, "input_size: expected a side, .*, got '88'"),
        ({"device": "gpu"}, r"device: expected one that is there, got 'gpu' \(.*\)"),
        ({"reference": "vit"}, "reference: expected an nn.Module, got str"),
        ({"input_size": 0}, "input_size: expected a side, .*, got 0"),
        ({"reference_runtime": "torch"}, "reference_runtime: expected None without a reference, got 'torch'"),
        (
            {"reference": nn.Identity(), "reference_runtime": "none"},
            "reference_runtime: expected one of .*, got 'none'",
        ),
    ],
)
def test_refusals(arguments: dict[str, object], text: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{text}$"):
        bench(Sleeper(0), **arguments)


def test_a_model_that_does_not_take_the_input_is_named(digits_model: nn.Module) -> None:
    threads = torch.get_num_threads()
    with pytest.raises(
        InvalidArgument, match=r"^reference: expected a model that takes images of \(32, 3, 8, 8\), got one"
    ):
        bench(Sleeper(0), digits_model.train(), input_size=8, threads=1)
    assert digits_model.training
    assert torch.get_num_threads() == threads


def test_what_is_no_model() -> None:
    with pytest.raises(InvalidArgument, match=r"^model: expected an nn.Module, got str$"):
        bench("vit")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match=r"^reference: expected a model with weights, got one on the meta device"):
        bench(Sleeper(0), Sleeper(0).to("meta"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_every_precision(digits_model: nn.Module, dtype: torch.dtype) -> None:
    found = bench(Sleeper(0), digits_model.to(dtype), batch_size=2, input_size=32, repeats=1, warmup=0)
    assert found.reference_milliseconds > 0
