#!/usr/bin/env bash
# torch.onnx.export makes of attention whose row masks everything an average of everything, or NaN; torch gives zeros.
#
# Versions: torch 2.14.1, onnx 1.23.2, onnxscript 0.7.2, onnxruntime 1.32.0, Python 3.11.
# Up to opset 22, scaled_dot_product_attention becomes MatMul, Add, Softmax and, for a boolean mask, IsNaN and Where,
# which are to put zeros where a row is NaN. But the mask has become the smallest finite number instead of -inf, so that
# Softmax of such a row is 1/n and never NaN. For a mask of numbers with -inf there is no IsNaN, and the row is NaN.
# From opset 23 on, the operator Attention gives zeros.
#
# Output seen (rows that mask everything, of two):
#   opset 20, boolean: torch zeros, onnxruntime an average
#   opset 20, -inf: torch zeros, onnxruntime NaN
#   opset 23, boolean: torch zeros, onnxruntime zeros
#   opset 23, -inf: torch zeros, onnxruntime zeros
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
cat > "$folder/probe.py" <<'PYTHON'
import onnxruntime
import torch
from torch.nn import functional

KEEP = torch.ones(4, 4, dtype=torch.bool)
KEEP[1] = False


class Masked(torch.nn.Module):
    def __init__(self, boolean):
        super().__init__()
        self.mask = KEEP if boolean else torch.zeros(4, 4).masked_fill(~KEEP, float("-inf"))

    def forward(self, x):
        return functional.scaled_dot_product_attention(x, x, x, attn_mask=self.mask)


def kind(row, values):
    if row.isnan().all():
        return "NaN"
    if not row.any():
        return "zeros"
    return "an average" if torch.allclose(row, values.mean(-2), atol=1e-5) else "another"


x = torch.randn(1, 1, 4, 8)
for opset in (20, 23):
    for boolean in (True, False):
        model = Masked(boolean).eval()
        torch.onnx.export(model, (x,), "m.onnx", input_names=["x"], opset_version=opset, dynamo=True, verbose=False)
        (found,) = onnxruntime.InferenceSession("m.onnx").run(None, {"x": x.numpy()})
        rows = kind(model(x)[0, 0, 1], x[0, 0]), kind(torch.from_numpy(found)[0, 0, 1], x[0, 0])
        print(f"opset {opset}, {'boolean' if boolean else '-inf'}: torch {rows[0]}, onnxruntime {rows[1]}")
PYTHON
found="$(cd "$folder" && venv/bin/python probe.py 2> log)" || { tail -5 "$folder/log"; exit 1; }
echo "$found"
[ "$(grep -c . <<< "$found")" = 4 ] && [ "$(grep '^opset' <<< "$found")" = "$(printf '%s\n' \
    'opset 20, boolean: torch zeros, onnxruntime an average' \
    'opset 20, -inf: torch zeros, onnxruntime NaN' \
    'opset 23, boolean: torch zeros, onnxruntime zeros' \
    'opset 23, -inf: torch zeros, onnxruntime zeros')" ] || { tail -5 "$folder/log"; echo "this has changed" >&2; exit 1; }
