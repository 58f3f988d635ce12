#!/usr/bin/env bash
# pnnx ends with status 0 and writes all of its files for timm's ViT, and ncnn does not load them.
#
# Versions: pnnx 20261020, ncnn 1.0.20261020, torch 2.14.1, timm 1.0.31, Python 3.11.
# timm's attention reshapes queries, keys and values to five axes and takes them apart by unbind. ncnn has neither
# operator; pnnx writes both as if it had ("Tensor.reshape", "torch.unbind"), says "ignore" of their parameters on
# stderr, and succeeds. Neither the status nor the files tell; ncnn.layer_to_index of the .param file's first words does.
#
# Output seen:
#   pnnx: status 0, files written
#   unknown to ncnn: Tensor.reshape, torch.unbind
#   load_param: -1
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 timm==1.0.31 pnnx==20261020 ncnn==1.0.20261020
cat > "$folder/probe.py" <<'PYTHON'
import subprocess
import warnings
from pathlib import Path

import ncnn
import pnnx
import timm
import torch

warnings.simplefilter("ignore")
vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, num_heads=3, depth=1).eval()
torch.jit.trace(vit, torch.randn(1, 3, 32, 32), check_trace=False).save("vit.pt")
done = subprocess.run([pnnx.EXEC_PATH, "vit.pt", "inputshape=[1,3,32,32]"], capture_output=True)
files = [Path("vit.ncnn.param"), Path("vit.ncnn.bin")]
print(f"pnnx: status {done.returncode}, files {'written' if all(file.is_file() for file in files) else 'missing'}")
kinds = {line.split()[0] for line in files[0].read_text().splitlines()[2:]}
print("unknown to ncnn:", ", ".join(sorted(kind for kind in kinds if ncnn.layer_to_index(kind) < 0)))
print("load_param:", ncnn.Net().load_param(str(files[0])))
PYTHON
found="$(cd "$folder" && venv/bin/python probe.py 2> log)"
echo "$found"
expected="$(printf 'pnnx: status 0, files written\nunknown to ncnn: Tensor.reshape, torch.unbind\nload_param: -1')"
[ "$found" = "$expected" ] || { tail -5 "$folder/log"; echo "this has changed" >&2; exit 1; }
