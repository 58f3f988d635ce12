"""Merged tokens and a pooled last block: CPU time over the dense model's, against the same ratio of MACs.

pip install ".[bench]" && OMP_NUM_THREADS=1 python benchmarks/python/bench_tokens.py
DeiT-Small with random weights, 224 x 224 pixels, 16 tokens merged in every block; one thread, CPU time, the models in
turn, the median of the paired ratios. First the outputs are compared: pooled with dense, and merged with token merging
written from its formulas. The last column is the same for the blocks' linear layers by themselves, with as many tokens
as the model has left in each block, by the ratio of their own MACs: where it is above one, no way of merging avoids it.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import secateur as sc
import timm
import torch
from conftest import processor
from torch import Tensor, nn


def merged(model: nn.Module, count: int) -> tuple[nn.Module, float]:
    """Return a copy that merges ``count`` tokens in every block, and its share of the MACs."""
    found = copy.deepcopy(model)
    groups = {g.name: g.size for g in sc.inspect(found).groups if g.kind == "tokens"}
    ratios = {name: count / size for name, size in groups.items()} if count else {}
    report = sc.prune(found, sc.plan(found, method="magnitude", ratios=ratios))
    return found, report.macs[1] / report.macs[0]


@torch.inference_mode()
def by_hand(model: nn.Module, images: Tensor, count: int) -> Tensor:
    """Return the output with ``count`` tokens merged in every block, by plain operations."""
    vit = copy.deepcopy(model)
    x = vit._pos_embed(vit.patch_embed(images))
    size = torch.ones(*x.shape[:2], 1, dtype=x.dtype)
    for block in vit.blocks:
        B, N = x.shape[:2]  # noqa: N806
        attn = block.attn
        q, k, v = attn.qkv(block.norm1(x)).reshape(B, N, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) * attn.scale + size.log()[:, None, :, 0, None].transpose(-2, -1)
        x = x + attn.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        metric = nn.functional.normalize(block.norm2(x)[:, 1:], dim=-1)
        s, t = size[:, 1::2], size[:, 2::2].transpose(1, 2)
        near = (metric[:, ::2] @ metric[:, 1::2].transpose(1, 2) - 1) * (s * t / (s + t)).sqrt()
        best, partner = near.max(-1)
        weighted, left, sizes = x * size, [], []
        for image in range(B):
            gone = best[image].argsort(descending=True)[: min(count, (N - 1) // 2)]
            total, weight = weighted[image].clone(), size[image].clone()
            for i in gone.tolist():
                j = int(partner[image, i])
                total[2 + 2 * j] += weighted[image, 1 + 2 * i]
                weight[2 + 2 * j] += size[image, 1 + 2 * i]
            stays = torch.ones(N, dtype=torch.bool)
            stays[1 + 2 * gone] = False
            left.append(total[stays] / weight[stays])
            sizes.append(weight[stays])
        x, size = torch.stack(left), torch.stack(sizes)
        x = x + block.mlp(block.norm2(x))
    output: Tensor = vit.forward_head(vit.norm(x))
    return output


def compared(model: nn.Module, counts: tuple[int, ...]) -> None:
    """Stop unless every model computes, in float64, what it should."""
    dense = copy.deepcopy(model).double()
    images = torch.randn(2, 3, 224, 224, dtype=torch.float64)
    with torch.inference_mode():
        for count in counts:
            difference = float((merged(dense, count)[0](images) - by_hand(dense, images, count)).abs().max())
            assert difference <= 1e-10, f"{count} merged: a difference of {difference:.3g}"
        assert float((merged(dense, 0)[0](images) - dense(images)).abs().max()) <= 1e-10


class Linears(nn.Module):
    """The linear layers of all blocks, on as many rows as each gets when ``count`` tokens merge in every block."""

    def __init__(self, dense: nn.Module, count: int, *, pooled: bool) -> None:
        super().__init__()
        vit: Any = dense
        tokens = vit.patch_embed.num_patches + 1
        self.steps: list[tuple[nn.Linear, int]] = []
        self.inputs: dict[tuple[int, int, int], Tensor] = {}
        for number, block in enumerate(vit.blocks):
            last = pooled and number == len(vit.blocks) - 1
            after = 1 if last else tokens - min(count, (tokens - 1) // 2)
            qkv = block.attn.qkv
            if last:
                # Keys and values; the queries of one token hardly take time.
                qkv = nn.Linear(qkv.in_features, 2 * qkv.out_features // 3)
            self.steps += [(qkv, tokens), (block.attn.proj, after if last else tokens)]
            self.steps += [(block.mlp.fc1, after), (block.mlp.fc2, after)]
            tokens = after
        self.macs = sum(layer.weight.numel() * rows for layer, rows in self.steps)

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for layer, rows in self.steps:
            shape = len(images), rows, layer.in_features
            if shape not in self.inputs:  # in the first pass, which does not count
                self.inputs[shape] = torch.ones(shape)
            x = layer(self.inputs[shape])
        return x


@torch.inference_mode()
def ratios(models: Sequence[nn.Module], batch: int, pairs: int) -> np.ndarray:
    """Return each model's CPU time over the first one's, (pairs, models)."""
    images = torch.randn(batch, 3, 224, 224)
    times = np.empty((pairs + 1, len(models)))
    for pair in range(pairs + 1):
        for number, model in enumerate(models):
            start = time.process_time()
            model(images)
            times[pair, number] = time.process_time() - start
    found: np.ndarray = times[1:] / times[1:, :1]
    return found


def main() -> None:
    """Compare the outputs, then measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--pairs", type=int, default=15, help="pairs at batch 16; four times as many at batch 1")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dense = timm.create_model(arguments.model).eval()
    counts = (0, 8, 16)
    compared(dense, counts)
    cut = [merged(dense, count) for count in counts]
    print(f"{processor()}, one thread, torch {torch.__version__}, {arguments.model}")
    linears = [Linears(dense, 0, pooled=False), *(Linears(dense, count, pooled=True) for count in counts)]
    print(f"{'batch':>5} {'merged':>6} {'MACs':>6} {'time':>6} {'time/MACs':>9}  {'quartiles':<11}  linear")
    for batch in (16, 1):
        pairs = arguments.pairs * (4 if batch == 1 else 1)
        found = ratios([dense, *(model for model, _ in cut)], batch, pairs)
        alone = np.median(ratios(linears, batch, pairs), axis=0)
        for number, (count, (_, macs)) in enumerate(zip(counts, cut, strict=True), 1):
            low, middle, high = np.quantile(found[:, number], (0.25, 0.5, 0.75))
            spread = f"{low / macs:.3f}-{high / macs:.3f}"
            floor = alone[number] * linears[0].macs / linears[number].macs
            print(f"{batch:>5} {count:>6} {macs:>6.3f} {middle:>6.3f} {middle / macs:>9.3f}  {spread}  {floor:.3f}")


if __name__ == "__main__":
    main()
