#!/usr/bin/env bash
# coremltools does not fuse attention whose softmax scale is given, even where it is the one that torch takes by itself.
#
# Versions: coremltools 9.0, torch 2.14.1, Python 3.11.
# Core ML's operator for attention (iOS 18) has no scale. coremltools asks whether a scale is given, not which: with
# scale=None there is one operator, with scale=1/sqrt(d), the same number, two products and a softmax. Code that always
# passes its scale gets no fused attention; without it, and with scaled queries, it does.
#
# Output seen:
#   scale None: fused 1, softmax 0
#   scale 1/sqrt(d): fused 0, softmax 1
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 coremltools==9.0
cat > "$folder/probe.py" <<'PYTHON'
from collections import Counter

import coremltools as ct
import torch
from torch.nn import functional as F


class Attention(torch.nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, scale=self.scale)


heads = tuple(torch.randn(1, 3, 17, 16) for _ in range(3))
for name, scale in (("None", None), ("1/sqrt(d)", 16**-0.5)):
    program = torch.export.export(Attention(scale).eval(), heads).run_decompositions({})
    package = ct.convert(program, convert_to="mlprogram", minimum_deployment_target=ct.target.iOS18)
    (block,) = package.get_spec().mlProgram.functions["main"].block_specializations.values()
    kinds = Counter(operation.type for operation in block.operations)
    print(f"scale {name}: fused {kinds['scaled_dot_product_attention']}, softmax {kinds['softmax']}")
PYTHON
found="$(cd "$folder" && venv/bin/python probe.py 2> log)"
echo "$found"
[ "$found" = "$(printf 'scale None: fused 1, softmax 0\nscale 1/sqrt(d): fused 0, softmax 1')" ] || { tail -5 "$folder/log"; echo "this has changed" >&2; exit 1; }
