"""The processes of a torchrun job: they meet, fail together, and exchange numbers."""

from __future__ import annotations

import os
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from .. import check
from ..errors import Error, InvalidArgument, NumericalError, Unsupported

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["Ranks", "first", "joined"]

# A rank that dies is noticed at once by its closed connection; this limit is for one that hangs. It is long because
# all others wait while the first rank validates.
_PATIENCE = 3600.0
_PATIENCE_VARIABLE = "SECATEUR_RANK_TIMEOUT"
_meetings = count()
_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Ranks:
    """The ranks of a job; a process on its own has ``size`` 1, and nothing is sent.

    ``lost`` says that a rank did not answer, so nothing more can be done together.
    """

    def __init__(self, group: distributed.ProcessGroup | None = None) -> None:
        self._group = group
        self.lost = False
        self.rank = 0 if group is None else distributed.get_rank(group)
        self.size = 1 if group is None else distributed.get_world_size(group)

    @contextmanager
    def together(self, numbers: int = 0) -> Iterator[list[float]]:
        """Run a block that succeeds on all ranks or raises on all of them.

        Yields as many zeros as ``numbers`` to write into; after the block they are the sums over ranks, in float64.

        Raises:
            Error: the block raised on another rank (the text names the rank, and the class is the same if it is
                secateur's), or a rank died or did not answer in time.
        """
        totals = [0.0] * numbers
        failure: Exception | None = None
        try:
            yield totals
        except Exception as error:
            if self._group is None:
                raise
            failure = error
        if self._group is None:
            return
        said = torch.tensor([float(failure is not None), *totals], dtype=torch.float64)
        with self._answering():
            distributed.all_reduce(said, group=self._group)
        failed, *sums = said.tolist()
        if failed:
            texts = self.gather(None if failure is None else (type(failure).__name__, str(failure)))
            if failure is not None:
                raise failure
            rank, (name, text) = next((rank, each) for rank, each in enumerate(texts) if each is not None)
            ours = {kind.__name__: kind for kind in (InvalidArgument, NumericalError, Unsupported)}
            raise ours.get(name, Error)(f"rank {rank}: {text if name in ours else f'{name}: {text}'}")
        totals[:] = sums

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, on every rank."""
        if self._group is None:
            return [value]
        found: list[Any] = [None] * self.size
        with self._answering():
            distributed.all_gather_object(found, value, group=self._group)
        return found

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors on the CPU by their sums over ranks, in their own types; all ranks pass the same number."""
        if self._group is not None:
            with self._answering():
                for tensor in tensors:
                    distributed.all_reduce(tensor, group=self._group)

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # gloo's error for a closed or silent connection
            self.lost = True
            raise Error(
                f"ranks: expected all {self.size} to answer within {_patience():g} s, got one that died or hangs"
            ) from error

    def agree(self, **values: Any) -> None:
        """Refuse values that are not the same on every rank.

        Raises:
            InvalidArgument: a value differs; raised on all ranks.
        """
        all_values = self.gather(values)
        for name, value in all_values[0].items():
            for rank, other in enumerate(all_values):
                if other[name] != value:
                    raise InvalidArgument(
                        f"{name}: expected the same on every rank, got {value!r} on rank 0 "
                        f"and {other[name]!r} on rank {rank}"
                    )

    def parallel(self, model: nn.Module) -> Callable[..., Any]:
        """Return a callable to use instead of the model, so that gradients are averaged over the ranks.

        The parameters and buffers of the first rank's model are copied to all ranks.
        """
        return model if self._group is None else DistributedDataParallel(model)

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace gradients by their mean over ranks, as a backward pass of `parallel` does; a missing one is zero."""
        if self._group is not None:
            for parameter in parameters:
                found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                # Row-major, because raw memory is added; divided first, because the sum may overflow float16.
                parameter.grad = (found / self.size).contiguous()
                distributed.all_reduce(parameter.grad)

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors by those of the first rank."""
        if self._group is not None:
            for tensor in tensors:
                distributed.broadcast(tensor.detach(), 0)

    def device(self, device: torch.device | str | None) -> torch.device | str | None:
        """Return the actual device: "cuda" on several ranks is the GPU of the local rank."""
        if self._group is None or str(device) != "cuda" or "LOCAL_RANK" not in os.environ:
            return device
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


@contextmanager
def joined() -> Iterator[Ranks]:
    """Meet the other ranks: of the current process group, or of torchrun's environment, or none.

    A process group made here is destroyed at the end, but not the caller's. A rank has an hour to answer, or the
    seconds in the environment variable SECATEUR_RANK_TIMEOUT.
    """
    launched = all(name in os.environ for name in _ENVIRONMENT) and int(os.environ["WORLD_SIZE"]) > 1
    ours = distributed.is_available() and launched and not distributed.is_initialized()
    if ours:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        store, rank, size = _store(_patience())
        # A second group must not read the addresses of the first.
        store = distributed.PrefixStore(f"secateur/{next(_meetings)}", store)
        patience = timedelta(seconds=_patience())
        distributed.init_process_group(backend, timeout=patience, store=store, rank=rank, world_size=size)
    try:
        if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
            yield Ranks()
            return
        # Numbers and errors use a CPU group, whatever the gradients use.
        group: Any = distributed.new_group(backend="gloo", timeout=timedelta(seconds=_patience()))
        try:
            yield Ranks(group)
        finally:
            distributed.destroy_process_group(group)
    finally:
        if ours:
            distributed.destroy_process_group()


def _patience() -> float:
    """Return the seconds that a rank has to answer."""
    text = os.environ.get(_PATIENCE_VARIABLE, str(_PATIENCE))
    try:
        return check.number(_PATIENCE_VARIABLE, float(text), open_low=True)
    except ValueError as error:
        raise InvalidArgument(f"{_PATIENCE_VARIABLE}: expected seconds, more than 0, got {text!r}") from error


@cache
def _store(patience: float) -> tuple[Any, int, int]:
    """Return the store where the ranks meet; it stays open, since one rank may return while another is still in it."""
    found: tuple[Any, int, int] = next(distributed.rendezvous("env://", timeout=timedelta(seconds=patience)))
    return found


def first() -> bool:
    """Return whether this process is the one that writes and prints: rank 0, or a process on its own."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank() == 0
    return not all(name in os.environ for name in _ENVIRONMENT) or int(os.environ["RANK"]) == 0
