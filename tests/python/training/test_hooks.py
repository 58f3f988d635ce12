"""Hooks of the training loop: what they are told and when, what is trained for them, and that all of it resumes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import secateur
import torch
from finetuning import Breaking, Killed, batches, float32_muon, quiet, same, tiny, weights
from launch import on_ranks
from safetensors.torch import load_file
from secateur import LoopHook, finetune
from secateur.errors import InvalidArgument, Unsupported
from secateur.files import container
from secateur.training.hooks import Batch, State
from torch import Tensor, nn
from torch.nn import functional


class Gain(LoopHook):
    """One factor for each class on the logits, pulled to zero; counts its steps and the norms of its gradients."""

    def __init__(self, name: str = "gain", pull: float = 0.125, start: float = 1.0) -> None:
        self.name, self.pull, self.start = name, pull, start
        self.calls: list[object] = []
        self.norms: list[float] = []

    def settings(self) -> Mapping[str, object]:
        return {"pull": self.pull, "shape": (3,)}

    @contextmanager
    def begin(self, model: nn.Module) -> Iterator[list[nn.Parameter]]:
        head = model.get_submodule("head")
        self.gain = nn.Parameter(torch.full((3,), self.start, dtype=next(model.parameters()).dtype))
        handle = head.register_forward_hook(lambda _module, _inputs, output: output * self.gain)
        self.calls.append("begin")
        try:
            yield [self.gain]
        finally:
            self.calls.append("end")
            handle.remove()

    def loss(self, batch: Batch, base: Tensor) -> Tensor:
        self.calls.append(("loss", tuple(batch.images.shape), None if batch.targets is None else len(batch.targets)))
        return base + self.pull * self.gain.square().sum()

    def after_backward(self) -> None:
        assert self.gain.grad is not None
        self.norms.append(float(self.gain.grad.norm()))
        self.calls.append("gradient")

    def after_step(self, step: int) -> None:
        self.calls.append(step)

    def state(self) -> State:
        return {"gain": self.gain, "norms": self.norms}

    def load_state(self, state: State) -> None:
        with torch.no_grad():
            self.gain.copy_(state["gain"])
        self.norms = list(state["norms"])


class Nothing(LoopHook):
    name = "nothing"


def module_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("clip", [None, 0.05])
def test_two_steps_of_sgd_by_hand(clip: float | None) -> None:
    """A hook's parameters are trained with the model's, without weight decay, and count in the norm that is clipped."""
    model, expected, hook = quiet().double(), quiet().double(), Gain()
    source = [(images.double(), targets) for images, targets in batches(2, 3)]
    options = {"opt": "momentum", "lr": 0.5, "min_lr": 0.5, "warmup": 0, "weight_decay": 0.25, "clip_grad": clip}
    found = finetune(model, source, hooks=[hook], **options)

    gain = torch.ones(3, dtype=torch.float64, requires_grad=True)
    expected.train()
    every = [*expected.parameters(), gain]
    decayed = [each.ndim > 1 and each is not expected.pos_embed and each is not expected.cls_token for each in every]
    moving = [torch.zeros_like(each) for each in every]
    norms, losses = [], []
    for images, targets in source:
        loss = functional.cross_entropy(expected(images) * gain, targets) + 0.125 * gain.square().sum()
        gradients = torch.autograd.grad(loss, every)
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        factor = 1.0 if clip is None else min(1.0, clip / (float(norm) + 1e-6))
        with torch.no_grad():
            for parameter, gradient, decay, momentum in zip(every, gradients, decayed, moving, strict=True):
                momentum.mul_(0.9).add_(factor * gradient + 0.25 * decay * parameter)
                parameter -= 0.5 * momentum
        norms.append(float(gradients[-1].norm()))
        losses.append(float(loss.detach()))
    torch.testing.assert_close(hook.gain.detach(), gain.detach(), rtol=0, atol=1e-12)
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=1e-12)
    assert hook.norms == pytest.approx(norms, rel=1e-9)
    assert found.history[0]["loss"] == pytest.approx(sum(losses) / 2, rel=1e-9)


def test_when_a_hook_is_called() -> None:
    model, hook = quiet(), Gain()
    seen: list[bool] = []

    class Watch(Nothing):
        name = "watch"

        def loss(self, batch: Batch, base: Tensor) -> Tensor:
            del batch
            hook.calls.append("after")  # the hooks' order is that of the list
            return 2 * base

    model.register_forward_hook(lambda module, *_: seen.append(module.training))
    images = [images for images, _ in batches(2, 5)]
    finetune(model, images, teacher=quiet(), alpha=1.0, mixup=0.5, hooks=[hook, Watch()])
    step = [("loss", (5, 3, 8, 8), None), "after", "gradient"]
    assert hook.calls == ["begin", *step, 1, *step, 2, "end"]
    assert seen == [True, True]


@pytest.mark.parametrize("options", [{}, {"ema": 0.5, "val_loader": batches(1, 5, 9)}])
def test_a_hook_that_does_nothing_changes_no_bit(options: dict[str, object]) -> None:
    plain, hooked = tiny(), tiny()
    expected = finetune(plain, batches(), **options)
    assert finetune(hooked, batches(), hooks=[Nothing()], **options) == expected
    assert same(weights(hooked), weights(plain))


def test_parameters_are_averaged_with_the_weights_and_validated_so() -> None:
    """A run of n steps with the decay 0 ends with what it trained, at any other with the average of its steps."""
    path: list[Tensor] = []

    class Recorded(Gain):
        def after_step(self, step: int) -> None:
            super().after_step(step)
            path.append(self.gain.detach().clone())

    validation = batches(1, 5, 9)
    hook, model = Recorded(), quiet()
    found = finetune(model, batches(3), hooks=[hook], ema=0.6, lr=0.05, val_loader=validation)
    average = torch.ones(3)
    for step, value in enumerate(path):  # timm's warm-up of the decay, from the second step on
        decay = min(0.6, 1 - (1 + step) ** (-2 / 3)) if step else 0.0
        average = decay * average + (1 - decay) * value
    torch.testing.assert_close(hook.gain.detach(), average, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(average, path[-1], rtol=1e-3)
    images, targets = validation[0]
    with torch.no_grad():
        loss = functional.cross_entropy(model(images) * hook.gain, targets)
    assert found.history[0]["val_loss"] == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize("opt", ["adamw", "muon", "sgd"])
@pytest.mark.parametrize(("every", "after"), [(3, 4), (2, 9), (5, 5)])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path, opt: str, every: int, after: int) -> None:
    options = {"epochs": 2, "opt": opt, "lr": 1e-2, "ema": 0.7, "mixup": 0.3, "seed": 3}
    expected, whole = tiny(), Gain(start=0.5)
    with float32_muon():
        uninterrupted = finetune(expected, batches(), hooks=[whole, Nothing()], **options)
        path = tmp_path / "run.safetensors"
        options |= {"resume": path, "checkpoint_every": every}
        with pytest.raises(Killed):
            finetune(tiny(), Breaking(batches(), after), hooks=[Gain(start=0.5), Nothing()], **options)
        model, hook = tiny(), Gain(start=0.5)
        found = finetune(model, batches(), hooks=[hook, Nothing()], **options)
        again, done = tiny(), Gain(start=0.5)
        finetune(again, Breaking(batches(), 0), hooks=[done, Nothing()], **options)
    assert (found.resumed, found.history) == (after // every * every, uninterrupted.history)
    for other, its in ((model, hook), (again, done)):
        assert same(weights(other), weights(expected))
        assert torch.equal(its.gain, whole.gain)
        assert its.norms == whole.norms


def test_a_checkpoint_without_hooks_says_nothing_of_them(tmp_path: Path) -> None:
    finetune(tiny(), batches(1), resume=tmp_path / "run")
    header, tensors = container.read(tmp_path / "run", "fine-tuning")
    assert "hooks" not in header["settings"]
    assert "hooks" not in header["rest"]
    assert not [name for name in tensors if name.startswith("hooks")]


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        (
            [Gain()],
            [Gain(pull=0.5)],
            r"hooks={'gain': {'pull': 0.125.*}} where it is {'gain': {'pull': 0.5.*}} now",
        ),
        ([Gain()], [], r"hooks={'gain': .*} where it is None now"),
        ([], [Gain()], r"hooks=None where it is {'gain': .*} now"),
        ([Gain()], [Gain("other")], r"hooks={'gain': .*} where it is {'other': .*} now"),
    ],
)
def test_a_checkpoint_of_other_hooks_is_refused(
    tmp_path: Path, before: list[LoopHook], after: list[LoopHook], text: str
) -> None:
    path = tmp_path / "run"
    finetune(tiny(), batches(2), hooks=before, resume=path)
    model = tiny()
    mine = weights(model)
    with pytest.raises(InvalidArgument, match=f"^resume: expected a checkpoint of this run, got one with {text}$"):
        finetune(model, batches(2), hooks=after, resume=path)
    assert same(weights(model), mine)
    assert module_hooks(model) == 0


def test_a_state_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    class Picky(Gain):
        def load_state(self, state: State) -> None:
            raise InvalidArgument(f"resume: expected another gain, got {len(state['gain'])}")

    finetune(tiny(), batches(2), hooks=[Gain()], resume=tmp_path / "run")
    model = tiny()
    mine = weights(model)
    with pytest.raises(InvalidArgument, match="^resume: expected another gain, got 3$"):
        finetune(model, batches(2), hooks=[Picky()], resume=tmp_path / "run")
    assert same(weights(model), mine)


@pytest.mark.parametrize("where", ["loss", "after_backward", "after_step", "state"])
def test_the_model_is_left_without_hooks_after_an_error(where: str, tmp_path: Path) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("broken")

    model, hook = tiny(), Gain()
    broken = Nothing()
    setattr(broken, where, fail)
    with pytest.raises(RuntimeError, match="^broken$"):
        finetune(model, batches(2), hooks=[hook, broken], resume=tmp_path / "run")
    assert hook.calls[-1] == "end"
    assert module_hooks(model) == 0
    assert all(parameter.grad is None for parameter in [*model.parameters(), hook.gain])


def test_a_hook_that_refuses_the_model_ends_the_run_before_it_starts() -> None:
    class Refusing(Nothing):
        @contextmanager
        def begin(self, model: nn.Module) -> Iterator[list[nn.Parameter]]:
            raise Unsupported(f"model: expected no {type(model).__name__}, got one")
            yield []

    model, hook = tiny(), Gain()
    before, training = weights(model), model.training
    with pytest.raises(Unsupported, match="^model: expected no VisionTransformer, got one$"):
        finetune(model, batches(2), hooks=[hook, Refusing()])
    assert hook.calls == ["begin", "end"]
    assert same(weights(model), before)
    assert (module_hooks(model), model.training) == (0, training)


class Half:
    """No subclass of ours, and not all that a hook has."""

    name = "half"

    def loss(self, batch: Batch, base: Tensor) -> Tensor:
        del batch
        return base

    def __repr__(self) -> str:
        return "Half()"


def with_(hook: LoopHook, **values: object) -> LoopHook:
    for name, value in values.items():
        setattr(hook, name, value)
    return hook


@contextmanager
def _beginning_with(*values: object) -> Iterator[tuple[object, ...]]:
    yield values


@pytest.mark.parametrize(
    ("hooks", "text"),
    [
        (Nothing(), "hooks: expected a list of hooks, got Nothing"),
        ([Nothing], "hooks: expected instances of LoopHook, got the class Nothing"),
        ([Half()], "hooks: expected instances of LoopHook, got Half() without settings"),
        ([Nothing(), Nothing()], "hooks: expected a name for each that no other has, got 'nothing'"),
        ([with_(Nothing(), name="")], "hooks: expected a name for each that no other has, got ''"),
        (
            [with_(Nothing(), begin=lambda _: _beginning_with(torch.ones(2)))],
            "hooks: expected 'nothing' to begin with parameters to train, got others",
        ),
        (
            [with_(Nothing(), loss=lambda _, base: base.expand(2))],
            "hooks: expected a scalar tensor from the loss of 'nothing', got shape (2,)",
        ),
        (
            [with_(Nothing(), loss=lambda _, base: float(base.detach()))],
            "hooks: expected a scalar tensor from the loss of 'nothing', got a float",
        ),
    ],
)
def test_refusals(hooks: object, text: str) -> None:
    model = tiny()
    before = weights(model)
    with pytest.raises(InvalidArgument, match=f"^{re.escape(text)}$"):
        finetune(model, batches(2), hooks=hooks)
    assert same(weights(model), before)


def test_a_state_that_no_file_can_hold_is_refused(tmp_path: Path) -> None:
    hook = with_(Nothing(), state=lambda: {"set": {1}})
    with pytest.raises(Unsupported, match=r"^hooks: expected hooks whose state can be saved, got a set in hooks\.noth"):
        finetune(tiny(), batches(2), hooks=[hook], resume=tmp_path / "run")


def test_the_guides_example(tmp_path: Path) -> None:
    guide = (Path(__file__).parents[3] / "docs/guides/fine_tuning.md").read_text()
    (example,) = [block for block in re.findall(r"```python\n(.*?)```", guide, re.DOTALL) if "LoopHook" in block]
    moved = {}
    for strength in ("1e-3", "10.0"):
        model = tiny()
        before = weights(model)
        code = example.replace("1e-3", strength).replace("run.safetensors", str(tmp_path / strength))
        scope = {"sc": secateur, "model": model, "training": batches()}
        exec(code.replace("steps=1000", "steps=7"), scope)
        moved[strength] = sum(float((tensor - before[name]).norm()) for name, tensor in weights(model).items())
        # Once more goes on from the end.
        again = tiny()
        exec(code.replace("steps=1000", "steps=7"), {**scope, "model": again})
        assert same(weights(again), weights(model))
    assert moved["10.0"] < moved["1e-3"]


RANKED = """
import json, os, sys
import torch
from safetensors.torch import save_file
from finetuning import Breaking, Killed, batches, quiet, weights
from secateur import finetune
from secateur.errors import InvalidArgument
from test_hooks import Gain

RANK, OUT = int(os.environ["RANK"]), sys.argv[1]
torch.set_num_threads(1)
options = dict(epochs=2, opt="momentum", lr=0.05, ema=0.5)

def shard(count):
    return [(images[2 * RANK : 2 * RANK + 2], targets[2 * RANK : 2 * RANK + 2]) for images, targets in batches(count)]

def keep(model, hook, result, name):
    save_file({**weights(model), "gain": hook.gain.detach().clone()}, f"{OUT}/{name}{RANK}.safetensors")
    with open(f"{OUT}/{name}{RANK}.json", "w") as file:
        json.dump([result.history, result.resumed, hook.norms], file)

model, hook = quiet(), Gain(start=1.0 - 0.5 * RANK)  # the first rank's counts
keep(model, hook, finetune(model, shard(3), hooks=[hook], **options), "end")
more = dict(resume=f"{OUT}/run", checkpoint_every=2)
try:
    finetune(quiet(), Breaking(shard(3), 4), hooks=[Gain()], **options, **more)
except Killed:
    pass
model, hook = quiet(), Gain(start=1.0 - 0.5 * RANK)
keep(model, hook, finetune(model, shard(3), hooks=[hook], **options, **more), "resumed")
for hooks in ([Gain(pull=0.5 + RANK)], [Gain()] * RANK):
    try:
        finetune(quiet(), shard(3), hooks=hooks, **options)
    except InvalidArgument as error:
        assert str(error).startswith("hooks: expected the same on every rank, got "), error
    else:
        raise AssertionError
"""


def test_two_ranks_are_one_with_twice_the_batch(tmp_path: Path) -> None:
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n" + RANKED
    for code, text in on_ranks(script, tmp_path):
        assert code == 0, text
    model, hook = quiet(), Gain()
    expected = finetune(model, batches(3), hooks=[hook], epochs=2, opt="momentum", lr=0.05, ema=0.5)
    for name in ("end", "resumed"):
        first, second = (load_file(tmp_path / f"{name}{rank}.safetensors") for rank in range(2))
        assert same(first, second)
        history, resumed, norms = json.loads((tmp_path / f"{name}1.json").read_text())
        assert resumed == (0 if name == "end" else 4)
        assert norms == pytest.approx(hook.norms, rel=1e-4)
        for found, wanted in zip(history, expected.history, strict=True):
            assert found == pytest.approx(wanted, rel=1e-4)
        torch.testing.assert_close(first.pop("gain"), hook.gain.detach(), rtol=1e-4, atol=1e-5)
        for key, tensor in model.state_dict().items():
            torch.testing.assert_close(first[key], tensor, rtol=1e-4, atol=1e-5)
    ends = [load_file(tmp_path / f"{name}0.safetensors") for name in ("end", "resumed")]
    assert same(*ends)
