"""Query/key neurons cut behind norms of their own: what each method's scores are worth, on models trained here.

pip install ".[bench]" && python benchmarks/python/bench_query_norms.py
A ViT of 4 blocks and 3 heads of 24 is trained on scikit-learn's digits, with LayerNorms and with RMSNorms on queries
and keys; then query/key neurons alone are cut. Divergence from the dense model's class probabilities in 1e-3 nats, and
top-1.
"""

from __future__ import annotations

import argparse
import copy
from functools import partial

import peers
import secateur as sc
import timm
import torch
from conftest import processor
from rich.console import Console
from rich.table import Table
from secateur.budgets.limits import kept_count
from timm.layers import RmsNorm
from torch import nn

REMOVED = (0.25, 0.5, 0.75)
OURS = ("project", "refit", "snp")
PEERS = ("magnitude", "taylor", "vbp")


def trained(norm: type[nn.Module] | None, epochs: int) -> nn.Module:
    more = {} if norm is None else {"norm_layer": norm}
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=72, depth=4, num_heads=3, num_classes=10,
        qk_norm=True, **more,
    )  # fmt: skip
    # timm's 0.02 hides positions from the first layers for many epochs.
    nn.init.trunc_normal_(model.pos_embed, std=0.5)
    batches = list(sc.data.loader("digits", model, split="train", batch_size=32))
    sc.finetune(model, batches, epochs=epochs, lr=2e-3)
    return model.eval()


def measure(name: str, norm: type[nn.Module] | None, epochs: int) -> Table:
    torch.manual_seed(0)
    model = trained(norm, epochs)
    test = list(sc.data.loader("digits", model, batch_size=64))
    images = torch.cat([x for x, _ in test])
    pairs = list(sc.data.loader("digits", model, split="train", batch_size=64))
    calibration = peers.Calibration(model, *(torch.cat(each) for each in zip(*pairs, strict=True)))
    statistics = sc.calibrate(model, pairs, max_images=None)
    dense, anatomy = peers.logits(model, images), sc.inspect(model)

    view = Table(title=f"{name}: dense {sc.evaluate(model, test).top1:.2f} %; 1e-3 nats (top-1, %)")
    for column in ("removed", *OURS, *PEERS):
        view.add_column(column, justify="right")
    for fraction in REMOVED:
        sizes = {g.name: kept_count(g.size, fraction * (g.kind == "qk"), g.multiple) for g in anatomy.groups}
        cells = []
        for method in (*OURS, *PEERS):
            if method in OURS:
                pruned = copy.deepcopy(model)
                sc.prune(pruned, sc.plan(model, statistics, method=method, ratios={"qk": fraction}))
            else:
                pruned = peers.PEERS[method].prune(calibration, sizes).model
            assert sc.inspect(pruned).sizes == sizes, f"{method}: other counts than asked for"
            lost = 1e3 * peers.divergence(dense, peers.logits(pruned, images))
            cells.append(f"{lost:.1f} ({sc.evaluate(pruned, test).top1:.2f})")
        view.add_row(f"{fraction:.0%}", *cells)
    return view


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console(width=120)
    console.print(f"{processor()}, {options.threads} threads, torch {torch.__version__}, timm {timm.__version__}")
    for name, norm in (("LayerNorm", None), ("RMSNorm", partial(RmsNorm, eps=1e-6))):
        console.print(measure(name, norm, options.epochs))


if __name__ == "__main__":
    main()
