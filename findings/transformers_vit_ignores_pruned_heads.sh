#!/usr/bin/env bash
# transformers 5 accepts pruned_heads in the configuration of a ViT, saves it, and builds every head.
#
# Versions: transformers 5.24.0, torch 2.14.1, Python 3.11.
# In transformers 4 a model was built without the heads that its configuration lists. In 5, ViT's attention no longer
# looks there, and nothing warns. head_dim, which is no field of ViTConfig, is kept as any other name is, and decides the
# size of heads.
#
# Output seen (rows of the query's weight in a ViT of width 24 and 3 heads):
#   plain 24, pruned_heads={0: [1]} 24, head_dim=5 15
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 torch==2.14.1
cat > "$folder/probe.py" <<'PYTHON'
import transformers


def rows(**more):
    config = transformers.ViTConfig(
        hidden_size=24, num_attention_heads=3, num_hidden_layers=1, intermediate_size=48, image_size=16, **more
    )
    model = transformers.ViTForImageClassification(config)
    return model.vit.layers[0].attention.q_proj.weight.shape[0]


print(f"plain {rows()}, pruned_heads={{0: [1]}} {rows(pruned_heads={0: [1]})}, head_dim=5 {rows(head_dim=5)}")
PYTHON
found="$(cd "$folder" && venv/bin/python probe.py 2> log)" || { tail -5 "$folder/log"; exit 1; }
echo "$found"
[ "$found" = "plain 24, pruned_heads={0: [1]} 24, head_dim=5 15" ] || { tail -5 "$folder/log"; echo "this has changed" >&2; exit 1; }
