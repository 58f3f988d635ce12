#!/usr/bin/env bash
# onnxruntime's quantize_static quantizes products of two activations, although MatMulConstBOnly=True asks it not to.
#
# Versions: onnxruntime 1.32.0, onnx 1.23.2, Python 3.11.
# MatMulConstBOnly is read where operators become MatMulInteger or QLinearMatMul. In the format QDQ, which is the
# default and the recommended one, QDQMatMul does not look at it: queries times keys, and softmax times values, are
# rounded to 8 bits. quantize_dynamic keeps to it. Only nodes_to_quantize or nodes_to_exclude help in QDQ. In
# quantize_dynamic, nodes_to_quantize has a trap of its own: it replaces Gemm by a MatMul of another name first, so that
# a Gemm that is named is not quantized.
#
# Output seen:
#   asked for products with constants alone: dynamic 1 of 2, static QDQ 2 of 2
#   a Gemm that is named: dynamic 0 of 1, static QDQ 1 of 1
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnxruntime==1.32.0 onnx==1.23.2
cat > "$folder/probe.py" <<'PYTHON'
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, quantize_dynamic, quantize_static


class Images(CalibrationDataReader):
    def __init__(self):
        self.left = iter([{"x": np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)}])

    def get_next(self):
        return next(self.left, None)


def saved(nodes, weights):
    held = [numpy_helper.from_array(np.random.default_rng(1).standard_normal(s).astype(np.float32), n) for n, s in weights]
    given, found = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [4, 8]), ("y", [4, None])))
    graph = helper.make_graph(nodes, "g", [given], [found], held)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), "model.onnx")


def rounded(path):
    nodes = onnx.load(path).graph.node
    integers = sum(node.op_type == "MatMulInteger" for node in nodes)
    floats = {name for node in nodes if node.op_type == "DequantizeLinear" for name in node.output}
    return integers + sum(node.op_type in ("MatMul", "Gemm") and node.input[1] in floats for node in nodes)


def both(**more):
    quantize_dynamic("model.onnx", "dynamic.onnx", **more)
    quantize_static("model.onnx", "static.onnx", Images(), **more)
    return rounded("dynamic.onnx"), rounded("static.onnx")


saved(
    [
        helper.make_node("MatMul", ["x", "w"], ["q"], name="linear"),
        helper.make_node("Transpose", ["q"], ["k"], name="transpose", perm=[1, 0]),
        helper.make_node("MatMul", ["q", "k"], ["y"], name="attention"),
    ],
    [("w", (8, 6))],
)
dynamic, static = both(op_types_to_quantize=["MatMul"], extra_options={"MatMulConstBOnly": True})
print(f"asked for products with constants alone: dynamic {dynamic} of 2, static QDQ {static} of 2")
saved([helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="head", transB=1)], [("w", (6, 8)), ("b", (6,))])
dynamic, static = both(op_types_to_quantize=["MatMul", "Gemm"], nodes_to_quantize=["head"])
print(f"a Gemm that is named: dynamic {dynamic} of 1, static QDQ {static} of 1")
PYTHON
found="$(cd "$folder" && venv/bin/python probe.py 2> log)" || { tail -5 "$folder/log"; exit 1; }
echo "$found"
[ "$found" = "$(printf '%s\n' \
    'asked for products with constants alone: dynamic 1 of 2, static QDQ 2 of 2' \
    'a Gemm that is named: dynamic 0 of 1, static QDQ 1 of 1')" ] || { tail -5 "$folder/log"; echo "this has changed" >&2; exit 1; }
