#!/usr/bin/env bash
# ExecuTorch fixes a dynamic batch at the example's size where an operator returns a list of tensors, and says nothing.
#
# Versions: executorch 1.5.1, torch 2.14.1, Python 3.11.
# Its check of dtypes takes the first tensor of the list for the list, and asks for its length: that is the batch, and
# torch adds the guard "batch == 2", which wins over Dim(min=1, max=8). split and chunk do so; unbind and tensor_split
# become slices before. The lowering succeeds, and the program refuses other batches when it runs.
#
# Output seen (the range of the batch after lowering):
#   split: 2 to 2
#   chunk: 2 to 2
#   tensor_split: 2 to 8
#   two slices: 2 to 8
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet executorch==1.5.1 torch==2.14.1
cat > "$folder/probe.py" <<'PYTHON'
import torch
from executorch.exir import to_edge_transform_and_lower

WAYS = {
    "split": lambda y: y.split([2, 4], -1),
    "chunk": lambda y: y.chunk(2, -1),
    "tensor_split": lambda y: y.tensor_split(2, -1),
    "two slices": lambda y: (y[:, :3], y[:, 3:]),
}


class Parts(torch.nn.Module):
    def __init__(self, way):
        super().__init__()
        self.way = way

    def forward(self, x):
        first, second = WAYS[self.way](x)
        return first.sum(-1) + second.sum(-1)


for way in WAYS:
    shapes = ({0: torch.export.Dim("batch", min=1, max=8)},)
    program = torch.export.export(Parts(way), (torch.randn(2, 6),), dynamic_shapes=shapes)
    (found,) = to_edge_transform_and_lower(program).exported_program().range_constraints.values()
    print(f"{way}: {found.lower} to {found.upper}")
PYTHON
found="$(cd "$folder" && venv/bin/python probe.py 2> log)" || { tail -5 "$folder/log"; exit 1; }
echo "$found"
[ "$found" = "$(printf '%s\n' 'split: 2 to 2' 'chunk: 2 to 2' 'tensor_split: 2 to 8' 'two slices: 2 to 8')" ] ||
    { tail -5 "$folder/log"; echo "this has changed" >&2; exit 1; }
