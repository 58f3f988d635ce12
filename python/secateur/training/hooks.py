"""What takes part in the training loop besides the model: terms of the loss, parameters and a state of its own."""

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

# Nested dicts, lists and tuples of tensors, numbers, texts, bools and None.
State: TypeAlias = "dict[str, Any]"
_METHODS = ("settings", "begin", "loss", "after_backward", "after_step", "state", "load_state")


@dataclass
class Batch:
    """Images on their device, as the model takes them, and how they were mixed.

    ``images`` (B, C, H, W); ``targets`` as the loader has them, None where it has none; ``shares`` (B, B), where images
    were mixed, holds each one's shares of those that came in. ``together`` counts the images of all ranks;
    ``uneven`` says that some rank's batch is empty, and not all are.
    """

    images: Tensor
    targets: Tensor | None
    shares: Tensor | None
    together: int = 0
    uneven: bool = False


class LoopHook(Protocol):
    """Takes part in `finetune`; a subclass overrides what it needs, for every method here changes nothing.

    Each step calls ``loss``, then ``after_backward``, then ``after_step``; a step without images on any rank calls
    none. The hook's state is saved with each checkpoint and loaded with it, so that a run that was interrupted ends
    with the same bits as one that was not.

    On several ranks every rank has a hook of its own, and all must stay the same. The loop sees to the hook's
    parameters: all ranks start from the first rank's, and gradients are averaged over the images of all ranks. What
    a hook computes from parameters, gradients and step numbers is then the same everywhere; what it computes from a
    batch it must average over the ranks itself. The first rank's state is saved, and every rank loads it. Random
    numbers differ between ranks.
    """

    name: str
    """Its state is saved under this; the hooks of one run have different names."""

    def settings(self) -> Mapping[str, Any]:
        """What must not change between a checkpoint and its continuation, and is the same on all ranks: JSON values."""
        return {}

    def begin(self, model: nn.Module) -> AbstractContextManager[Iterable[nn.Parameter]]:  # noqa: ARG002
        """Return a context in which the model is trained, and evaluated after each pass.

        It yields the hook's own parameters, on the model's device, new ones for each run. The optimizer trains them
        with the learning rate of the model's and without weight decay; they count in the norm that is clipped, and are
        averaged with the weights where ``ema`` is taken. At its end, also after an error, the model must have the
        modules and module hooks that it came with.

        Raises:
            Unsupported: the hook does not know what to do with this model; nothing is changed.
        """
        return nullcontext(())

    def loss(self, batch: Batch, base: Tensor) -> Tensor:  # noqa: ARG002
        """Return the loss to minimise, a scalar, the mean over the images of this rank.

        ``base`` is the loss so far: of labels and teacher, and of the hooks before this one.
        """
        return base

    def after_backward(self) -> None:
        """Read or change the gradients: the mean over ranks, without a loss scale, not yet clipped.

        With ``amp="float16"`` they may be infinite; the step is then left out, and ``after_step`` called all the same.
        """

    def after_step(self, step: int) -> None:
        """Read or change weights and parameters when ``step`` steps have been taken."""

    def state(self) -> State:
        """Return all that the hook needs to go on, with its parameters."""
        return {}

    def load_state(self, state: State) -> None:
        """Take up a state that `state` returned in a run of the same settings; called after `begin`.

        Parameters are copied into, for the optimizer holds them.

        Raises:
            InvalidArgument: it does not fit; nothing is changed.
        """


class Hooks:
    """The hooks of one run, in order.

    Raises:
        InvalidArgument: one is no hook, has no name, or the name of another.
    """

    def __init__(self, hooks: Iterable[LoopHook] = ()) -> None:
        self._hooks = {hook.name: hook for hook in _checked(hooks)}
        found = {name: dict(hook.settings()) for name, hook in self._hooks.items()}
        # What identifies a run with them, as a file holds it; of one without any, None.
        self.settings: dict[str, Any] | None = json.loads(json.dumps(found)) if found else None
        self.parameters: list[nn.Parameter] = []

    @contextmanager
    def hold(self, model: nn.Module, ranks: Ranks) -> Iterator[None]:
        """Have all of them begin, and end in reverse order; all ranks must call it."""
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
        """Return what they make of a loss, one after the other."""
        for name, hook in self._hooks.items():
            loss = hook.loss(batch, loss)
            if not isinstance(loss, Tensor) or loss.ndim > 0:
                got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
                raise InvalidArgument(f"hooks: expected a scalar tensor from the loss of {name!r}, got {got}")
        return loss

    def after_backward(self) -> None:
        """Call theirs."""
        for hook in self._hooks.values():
            hook.after_backward()

    def after_step(self, step: int) -> None:
        """Call theirs."""
        for hook in self._hooks.values():
            hook.after_step(step)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds of them; nothing of a run without any."""
        return {"hooks": {name: hook.state() for name, hook in self._hooks.items()}} if self._hooks else {}

    def load_state(self, rest: Mapping[str, Any]) -> None:
        """Take up what `state` returned."""
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
