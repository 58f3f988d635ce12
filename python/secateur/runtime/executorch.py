"""ExecuTorch as the exporter and the runtime share it: what lowers a program, and what runs it."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import check
from ..errors import InvalidArgument, Unsupported, first_line
from .quiet import quiet

__all__ = ["Engine", "engine", "in_int8", "instructions", "lowered"]

_BINDINGS = "executorch.extension.pybindings.portable_lib"
# Programs and methods that are loaded are instances of these.
_LOADED = ("ExecuTorchModule", "ExecuTorchProgram", "ExecuTorchMethod")
# They warn of what others do.
_LOGGERS = ("torch.utils._pytree", "torch.export", "executorch", "root", "torchao")


class Engine:
    """ExecuTorch's Python runtime; one instance in a process."""

    def __init__(self, version: str) -> None:
        first = _BINDINGS not in sys.modules
        runtime = import_module("executorch.runtime").Runtime.get()
        self.version = version
        self._runtime = runtime
        self._bindings = import_module(_BINDINGS)
        # If others have imported ExecuTorch, they may have loaded programs.
        self._references = self._counted() if first else -1

    def load(self, program: bytes | Path) -> Callable[[Tensor], Any]:
        """Load a program from a file or from its bytes; return what runs it, for a tensor or a list of them."""
        loaded = self._runtime.load_program(program)
        return partial(_run, loaded.load_method("forward"), loaded)

    def use_torchs_threads(self) -> None:
        """Let the pool that all programs of this process share have as many threads as torch.

        Raises:
            Unsupported: it has another number, and programs may be loaded, which hold the pool's address.
        """
        wanted, has = torch.get_num_threads(), self._bindings._threadpool_get_thread_count()
        if wanted == has:
            return
        if self._counted() != self._references:
            gc.collect()
        if self._counted() != self._references:
            raise Unsupported(
                f"threads: expected {has}, which ExecuTorch has while its programs are loaded in this process, "
                f"got {wanted}"
            )
        self._bindings._unsafe_reset_threadpool(wanted)

    def _counted(self) -> int:
        """Each instance refers to its class, and pybind11's are seen by nothing else."""
        return sum(sys.getrefcount(getattr(self._bindings, name)) for name in _LOADED)


def _run(method: Any, program: Any, images: Tensor) -> Any:
    del program  # held by who calls: its bytes are those of the method's constants
    outputs = method.execute((images.contiguous(),))
    return outputs[0] if len(outputs) == 1 else outputs


_engines: dict[str, Engine] = {}


def engine(argument: str) -> Engine:
    """Return the engine.

    Args:
        argument: for the error text, "format" or "runtime".

    Raises:
        InvalidArgument: it is not installed, or does not work with this torch.
    """
    check.packages(argument, "executorch", "executorch")
    try:
        version = str(import_module("executorch.version").__version__).split("+")[0]
    except ImportError:  # without its files, a folder of this name is a package to Python
        version = "none"
    if version not in _engines:
        try:
            with quiet(*_LOGGERS):
                _engines[version] = Engine(version)
        except Exception as error:  # a library of another torch is an ImportError, an operator of it is not
            found = f"{version} ({first_line(error)})"
            raise InvalidArgument(
                f"{argument}: expected an ExecuTorch that runs with torch {torch.__version__}, got {found}"
            ) from error
    return _engines[version]


def in_int8(program: torch.export.ExportedProgram, images: list[Tensor]) -> Any:
    """Return a module that rounds as linear layers of 8 bits do, with ranges seen on the images."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    config = get_symmetric_quantization_config(is_per_channel=True)
    # Of the residual sums a ViT's class token does not survive 8 bits: linear layers alone.
    quantizer = XNNPACKQuantizer().set_operator_type(torch.ops.aten.linear.default, config)
    with quiet("torch.utils._pytree"), torch.no_grad():
        observed = prepare_pt2e(program.module(), quantizer)
        for image in images:
            observed(image)
        return convert_pt2e(observed)


def lowered(program: torch.export.ExportedProgram) -> Any:
    """Return ExecuTorch's program, with all that XNNPACK takes given to it."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    with quiet(*_LOGGERS), torch.no_grad():
        # Of what returns a list of tensors, ExecuTorch asks how long the first is, and fixes the batch by that.
        program = program.run_decompositions(_PARTS)
        return to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()


def _in_parts(x: Tensor, sizes: Sequence[int], dim: int = 0) -> list[Tensor]:
    ends = [*accumulate(sizes)]
    return [torch.ops.aten.slice.Tensor(x, dim, end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _in_equal_parts(x: Tensor, size: int, dim: int = 0) -> list[Tensor]:
    whole = int(x.shape[dim])
    return _in_parts(x, [min(size, whole - start) for start in range(0, whole, size)], dim)


def _in_chunks(x: Tensor, chunks: int, dim: int = 0) -> list[Tensor]:
    return _in_equal_parts(x, -(-int(x.shape[dim]) // chunks), dim)


_PARTS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.split_with_sizes.default: _in_parts,
    torch.ops.aten.split.Tensor: _in_equal_parts,
    torch.ops.aten.chunk.default: _in_chunks,
}


def instructions(program: Any) -> Counter[str]:
    """Return how many times the program calls each of its operators, and XNNPACK as "delegate"."""
    (plan,) = program.executorch_program.execution_plan
    found: Counter[str] = Counter()
    for each in (instruction.instr_args for chain in plan.chains for instruction in chain.instructions):
        kind = type(each).__name__
        if kind == "KernelCall":
            found[plan.operators[each.op_index].name] += 1
        elif kind == "DelegateCall":
            found["delegate"] += 1
    return found
