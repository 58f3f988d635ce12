"""Hooks that take part in the training loop: with terms of the loss, parameters and a state of their own."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from torch import Tensor, nn

from ..errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from ..runtime.ranks import Ranks

__all__ = ["Batch", "Hooks", "LoopHook", "State"]

# Nested dicts, lists and tuples of tensors, numbers, strings, bools and None.
State: TypeAlias = "dict[str, Any]"
_METHODS = ("settings", "begin", "loss", "after_backward", "after_step", "state", "load_state")


@dataclass
class Batch:
    """Images on their device, in the model's type, and how they were mixed.

    ``images`` is (B, C, H, W); ``targets`` are the loader's, or None if it has none; ``shares`` (B, B), if images were
    mixed, holds for each image the shares of the original ones. ``together`` is the number of images of all ranks;
    ``uneven`` says that the batch is empty on some ranks but not on all.
    """

    images: Tensor
    targets: Tensor | None
    shares: Tensor | None
    together: int = 0
    uneven: bool = False


class LoopHook(Protocol):
    """Takes part in `finetune`; a subclass overrides the methods that it needs, since by default they change nothing.

    Each step calls ``loss``, then ``after_backward``, then ``after_step``; a step without images on any rank calls
    none. The hook's state is saved in each checkpoint and loaded from it, so that an interrupted run ends with the same
    bits as an uninterrupted one.

    On several ranks, every rank has its own hook, and all must stay identical. The loop synchronises the hook's
    parameters: all ranks start from the first rank's, and gradients are averaged over the images of all ranks. Anything
    a hook computes from parameters, gradients and step numbers is then the same on every rank; anything it computes
    from a batch, it must average over the ranks itself. The first rank's state is saved, and every rank loads it.
    Random numbers differ between ranks.
    """

    name: str
    """The name under which its state is saved; the hooks of one run have different names."""

    def settings(self) -> Mapping[str, Any]:
        """Return what must not change between a checkpoint and its continuation: JSON values, the same on all ranks."""
        return {}

    def begin(self, model: nn.Module) -> AbstractContextManager[Iterable[nn.Parameter]]:  # noqa: ARG002
        """Return a context in which the model is trained, and evaluated after each pass.

        It yields the hook's own parameters, on the model's device, new ones for each run. The optimizer trains them
        with the model's learning rate and without weight decay; they are included in the gradient norm for clipping and
        in the average of ``ema``. When it ends, even after an error, the model must have its original modules and
        module hooks.

        Raises:
            Unsupported: the hook cannot handle this model; nothing is changed.
        """
        return nullcontext(())

    def loss(self, batch: Batch, base: Tensor) -> Tensor:  # noqa: ARG002
        """Return the loss to minimise, a scalar, the mean over the images of this rank.

        ``base`` is the loss so far: from labels and teacher, and from the hooks before this one.
        """
        return base

    def after_backward(self) -> None:
        """Read or change the gradients: the mean over ranks, without a loss scale, not yet clipped.

        With ``amp="float16"`` they may be infinite; the step is then skipped, but ``after_step`` is still called.
        """

    def after_step(self, step: int) -> None:
        """Read or change weights and parameters after ``step`` steps in total."""

    def state(self) -> State:
        """Return everything that the hook needs to continue, including its parameters."""
        return {}

    def load_state(self, state: State) -> None:
        """Load a state that `state` returned in a run with the same settings; called after `begin`.

        Copy into the parameters instead of replacing them, since the optimizer holds them.

        Raises:
            InvalidArgument: the state does not fit; nothing is changed.
        """


class Hooks:
    """The hooks of one run, in order.

    Raises:
        InvalidArgument: one is not a hook, has no name, or has the name of another.
    """

    def __init__(self, hooks: Iterable[LoopHook] = ()) -> None:
        self._hooks = {hook.name: hook for hook in _checked(hooks)}
        found = {name: dict(hook.settings()) for name, hook in self._hooks.items()}
        # Identifies a run with these hooks, as a file holds it; None without hooks.
        self.settings: dict[str, Any] | None = json.loads(json.dumps(found)) if found else None
        self.parameters: list[nn.Parameter] = []

    @contextmanager
    def hold(self, model: nn.Module, ranks: Ranks) -> Iterator[None]:
        """Begin all hooks, and end them in reverse order; all ranks must call it."""
        with ExitStack() as stack:
            with ranks.together():
                for name, hook in self._hooks.items():
                    found = list(stack.enter_context(hook.begin(model)))
                    if not all(isinstance(each, nn.Parameter) and each.requires_grad for each in found):
                        raise InvalidArgument(f"hooks: expected {name!r} to begin with parameters to train, got others")
                    self.parameters += found
            ranks.share(self.parameters)
            try:
                yield
            finally:
                self.parameters = []

    def loss(self, batch: Batch, loss: Tensor) -> Tensor:
        """Return the loss after all hooks have changed it in turn."""
        for name, hook in self._hooks.items():
            loss = hook.loss(batch, loss)
            if not isinstance(loss, Tensor) or loss.ndim > 0:
                got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
                raise InvalidArgument(f"hooks: expected a scalar tensor from the loss of {name!r}, got {got}")
        return loss

    def after_backward(self) -> None:
        """Call it on each hook."""
        for hook in self._hooks.values():
            hook.after_backward()

    def after_step(self, step: int) -> None:
        """Call it on each hook."""
        for hook in self._hooks.values():
            hook.after_step(step)

    def state(self) -> dict[str, Any]:
        """Return the hooks' entry in a checkpoint; empty without hooks."""
        return {"hooks": {name: hook.state() for name, hook in self._hooks.items()}} if self._hooks else {}

    def load_state(self, rest: Mapping[str, Any]) -> None:
        """Load what `state` returned."""
        for name, hook in self._hooks.items():
            hook.load_state(rest["hooks"][name])


def _checked(hooks: Iterable[LoopHook]) -> list[LoopHook]:
    found: dict[str, LoopHook] = {}
    if not hasattr(hooks, "__iter__"):
        raise InvalidArgument(f"hooks: expected a list of hooks, got {type(hooks).__name__}")
    for hook in hooks:
        missing = [name for name in _METHODS if not callable(getattr(hook, name, None))]
        if missing or isinstance(hook, type):
            what = f"the class {hook.__name__}" if isinstance(hook, type) else f"{hook!r} without {missing[0]}"
            raise InvalidArgument(f"hooks: expected instances of LoopHook, got {what}")
        name = getattr(hook, "name", None)
        if not isinstance(name, str) or not name or name in found:
            raise InvalidArgument(f"hooks: expected a name for each that no other has, got {name!r}")
        found[name] = hook
    return list(found.values())
