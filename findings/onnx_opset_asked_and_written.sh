#!/usr/bin/env bash
# torch.onnx.export writes another opset than the one asked for, and returns as if it had not.
#
# Versions: torch 2.14.1, onnx 1.23.2, onnxscript 0.7.2, Python 3.11.
# The exporter builds opset 18 and converts. Where the conversion fails, it logs the failure, writes the file in
# opset 18, and returns an ONNXProgram: no exception, no warning of Python's. opset_version=17 and 20 are honoured;
# of 12, which older runtimes need, the file of a Linear, LayerNorm and GELU has opset 18. Only reading opset_import
# of the file tells.
#
# Output seen:
#   asked 12, written 18
#   asked 17, written 17
#   asked 20, written 20
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 onnx==1.23.2 onnxscript==0.7.2
cat > "$folder/probe.py" <<'PYTHON'
import warnings

import onnx
import torch

warnings.simplefilter("ignore", DeprecationWarning)
warnings.simplefilter("ignore", FutureWarning)
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.GELU()).eval()
for asked in (12, 17, 20):
    program = torch.onnx.export(model, (torch.randn(2, 4),), "model.onnx", opset_version=asked, dynamo=True, verbose=False)
    assert program is not None
    (written,) = [each.version for each in onnx.load("model.onnx").opset_import if each.domain == ""]
    print(f"asked {asked}, written {written}")
PYTHON
found="$(cd "$folder" && venv/bin/python probe.py 2> log)"
echo "$found"
[ "$found" = "$(printf 'asked 12, written 18\nasked 17, written 17\nasked 20, written 20')" ] || { tail -5 "$folder/log"; echo "this has changed" >&2; exit 1; }
