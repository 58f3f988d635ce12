"""ncnn's files, converted by pnnx and checked in ncnn."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from .. import check
from ..data.model_input import input_dtype
from ..errors import Unsupported, first_line
from ..families.vision_transformer.modules import split_attention
from ..runtime.quiet import quiet
from .base import Checked, Exporter, ExportReport, random_images, register
from .locate import Run, located_difference

__all__ = ["Ncnn"]

_INPUT = "in0"  # pnnx's names
_NOT_LOADED = 3
# In a process of its own: of a file that it cannot run, ncnn may end the process. By default it computes in float16
# on some processors.
_RUN = f"""
import sys
import ncnn
import numpy as np

param, weights, images, outputs, threads = sys.argv[1:]
net = ncnn.Net()
net.opt.num_threads = int(threads)
for name in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_packed", "bf16_storage"):
    if hasattr(net.opt, "use_" + name):
        setattr(net.opt, "use_" + name, False)
if net.load_param(param) != 0 or net.load_model(weights) != 0:
    sys.exit({_NOT_LOADED})
given = ncnn.Mat(np.load(images), batch_index=0).clone()
extractor, found = net.create_extractor(), []
if extractor.input("{_INPUT}", given) != 0:
    sys.exit("ncnn takes no input {_INPUT}")
for name in net.output_names():
    status, output = extractor.extract(name)
    if status != 0:
        sys.exit(f"ncnn computes no {{name}} (status {{status}})")
    found.append(output.numpy(batch_index=0).copy())
np.savez(outputs, *found)
"""


@register
class Ncnn(Exporter):
    """A .param and a .bin file for batches of any size, compared with the model in ncnn on the processor, in float32.

    timm's attention is written as the exact layout's, in tensors of as many axes as ncnn has.
    """

    name = "ncnn"
    suffix = ".param"
    Options: ClassVar[type] = Checked

    def export(self, model: nn.Module, path: Path, options: Any) -> ExportReport:
        """Write both files.

        Args:
            model: in evaluation mode, on the CPU.
            path: the .param file; the .bin file is beside it.
            options: ``Checked``.

        Raises:
            InvalidArgument: a package that is missing.
            Unsupported: a model whose operators ncnn lacks, or that pnnx does not convert; or not float32.
            Error: ncnn computes something else; the text names the first module where it does.
        """
        ncnn = check.packages("format", "ncnn", "pnnx", "ncnn")
        if (dtype := input_dtype(model)) != torch.float32:
            found = str(dtype).removeprefix("torch.")
            raise Unsupported(f"dtype: expected float32 for ncnn, got {found}")
        engine = f"ncnn {ncnn.__version__}"
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            written = _converted(model, Path(folder))
            operators = _operators(written)
            difference = located_difference(
                model, _running(written), options.batch_sizes, engine, lambda *given: _running(_converted(*given))
            )
            # The weights first: a model without them is worse than weights without a model.
            parts = [(written.with_suffix(".bin"), path.with_suffix(".bin")), (written, path)]
            files = tuple(part.replace(place) for part, place in parts)[::-1]
        size = sum(file.stat().st_size for file in files)
        details = {
            "attention_fused": operators["SDPA"] + operators["MultiHeadAttention"],
            "attention_not_fused": operators["Softmax"],
            "operators": operators.total() - operators["Input"] - operators["MemoryData"],
        }
        version = f"pnnx {_pnnx_version()}"
        return ExportReport(self.name, files, size, version, engine, options.batch_sizes, difference, details)


def _converted(model: nn.Module, folder: Path) -> Path:
    """Return the .param file that pnnx wrote; the .bin file is beside it.

    Raises:
        Unsupported: torch cannot trace the model, pnnx does not convert it, or ncnn lacks an operator.
    """
    import pnnx

    # Of one image: the file then takes batches of any size.
    example = random_images(model, 1)
    with split_attention(model), quiet(), torch.no_grad():
        try:
            traced: Any = torch.jit.trace(model, example, check_trace=False)
            traced.save(str(folder / "model.pt"))
        except Exception as error:  # torch raises what it likes
            raise Unsupported(f"model: expected one that torch.jit.trace takes, got {first_line(error)}") from error
    shape = ",".join(map(str, example.shape))
    # Names without a folder: pnnx splits its arguments at "=".
    command = [pnnx.EXEC_PATH, "model.pt", f"inputshape=[{shape}]", "fp16=0"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)  # noqa: S603
    written = folder / "model.ncnn.param"
    if done.returncode or not written.is_file() or not written.with_suffix(".bin").is_file():
        raise Unsupported(f"model: expected one that pnnx converts, got {_last_line(done.stderr, done.returncode)}")
    _refuse_unknown(written, traced, done.stderr)
    return written


def _refuse_unknown(written: Path, traced: Any, log: str) -> None:
    """Refuse operators that ncnn does not have; pnnx writes them all the same."""
    import ncnn

    unknown = {kind: count for kind, count in _operators(written).items() if ncnn.layer_to_index(kind) < 0}
    if not unknown:
        return
    got = ", ".join(f"{kind} ({count})" for kind, count in unknown.items())
    told = [line.strip() for line in log.splitlines() if re.search(r"not supported|unsupported|exceeds", line)]
    where = _of_many_axes(traced)
    got += f" in {where}" if where else ""
    raise Unsupported(f"model: expected operators that ncnn has, got {got}{f'; pnnx: {told[0]}' if told else ''}")


def _of_many_axes(traced: Any) -> str | None:
    """Return the first module that makes a tensor of more than four axes, as ncnn cannot."""
    for node in traced.inlined_graph.nodes():
        for output in node.outputs():
            sizes = output.type().sizes() if output.type().kind() == "TensorType" else None
            if sizes is not None and len(sizes) > 4:
                return str(node.scopeName()).rpartition("__module.")[2] or None
    return None


def _operators(path: Path) -> Counter[str]:
    # After a magic number and the numbers of layers and blobs, each line is one operator.
    return Counter(line.split()[0] for line in path.read_text(encoding="utf-8").splitlines()[2:] if line.strip())


def _running(path: Path) -> Run:
    def run(images: Tensor) -> list[Any]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            program, given, outputs = folder / "run.py", folder / "images.npy", folder / "outputs.npz"
            program.write_text(_RUN, encoding="utf-8")
            np.save(given, images.numpy())
            parts = (path, path.with_suffix(".bin"), given, outputs, torch.get_num_threads())
            command = [sys.executable, str(program), *map(str, parts)]
            places = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            done = subprocess.run(command, env=places, capture_output=True, text=True, errors="replace", check=False)  # noqa: S603
            if done.returncode == _NOT_LOADED:
                raise RuntimeError(f"a file that it does not load: {_last_line(done.stderr, None)}")
            if done.returncode:
                raise RuntimeError(_last_line(done.stderr, done.returncode))
            with np.load(outputs) as found:
                return [found[key] for key in found.files]

    return run


def _last_line(text: str, status: int | None) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if status is not None and status < 0:
        return f"a process that ended by signal {-status}"
    return lines[-1] if lines else f"status {status}"


def _pnnx_version() -> str:
    import pnnx

    return str(getattr(pnnx, "__version__", "unknown"))
