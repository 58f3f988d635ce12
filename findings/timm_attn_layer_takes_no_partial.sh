#!/usr/bin/env bash
# timm's VisionTransformer takes a class as attn_layer, and no functools.partial of one, which it takes for other layers.
#
# Versions: timm 1.0.31, torch 2.14.1, Python 3.11.
# Attention takes attn_head_dim, but VisionTransformer does not pass it on. functools.partial(Attention,
# attn_head_dim=24) is the usual way around; norm_layer, act_layer, mlp_layer and embed_layer take one. attn_layer ends
# in issubclass, which fails on a partial. A subclass whose __init__ gives the argument works.
#
# Output seen:
#   mlp_layer=partial: built
#   attn_layer=partial: TypeError
#   attn_layer=subclass: built
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet timm==1.0.31 torch==2.14.1
cat > "$folder/probe.py" <<'PYTHON'
from functools import partial

import timm
from timm.layers import Attention, Mlp


class Sized(Attention):
    def __init__(self, *given, **more):
        super().__init__(*given, attn_head_dim=24, **more)


for name, more in (
    ("mlp_layer=partial", {"mlp_layer": partial(Mlp, use_conv=False)}),
    ("attn_layer=partial", {"attn_layer": partial(Attention, attn_head_dim=24)}),
    ("attn_layer=subclass", {"attn_layer": Sized}),
):
    try:
        timm.create_model("vit_tiny_patch16_224", depth=1, **more)
        print(f"{name}: built")
    except Exception as error:
        print(f"{name}: {type(error).__name__}")
PYTHON
found="$(cd "$folder" && venv/bin/python probe.py 2> log)" || { tail -5 "$folder/log"; exit 1; }
echo "$found"
[ "$found" = "$(printf '%s\n' 'mlp_layer=partial: built' 'attn_layer=partial: TypeError' 'attn_layer=subclass: built')" ] ||
    { tail -5 "$folder/log"; echo "this has changed" >&2; exit 1; }
