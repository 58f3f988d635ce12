"""Calibration and pruned models on one GPU: next to the bare forward pass, to torch, and to the device's ceilings.

pip install ".[bench]" && python benchmarks/python/bench_cuda.py
Prints tables for benchmarks/RESULTS.md. Needs a CUDA device; the core should be built with CUDA (SECATEUR_CUDA=ON), or
what is measured is the slower way through torch, and the first line says so.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

GAMMA = 8
SECTIONS = ("calibrate", "scoring", "speed", "large")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument(
        "--models", nargs="+", default=["deit_small_patch16_224", "vit_large_patch16_224"], help="calibrated, of timm"
    )
    parser.add_argument("--batch-size", type=int, default=256, help="of calibration")
    parser.add_argument("--batches", type=int, default=16, help="of one calibration")
    parser.add_argument("--repeats", type=int, default=15, help="paired runs; the median ratio counts")
    parser.add_argument("--speed-repeats", type=int, default=15, help="paired runs of pruned models")
    parser.add_argument("--compile-batches", type=int, nargs="*", default=[64, 256], help="of 64 and 256, compiled too")
    parser.add_argument("--compile-round-to", type=int, nargs="*", default=[8, 16], help="of 8 and 16, compiled too")
    parser.add_argument("--large-images", type=int, default=16384, help="of the large calibration")
    return parser.parse_args()


def paired(first: Callable[[], Any], second: Callable[[], Any], repeats: int) -> tuple[float, float, float]:
    """Median of first / second and both medians in seconds, run in turn, the device waited for."""
    import torch

    def seconds(run: Callable[[], Any]) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    for run in (first, second, first, second):
        run()
    pairs = [(seconds(first), seconds(second)) for _ in range(repeats)]
    return median(a / b for a, b in pairs), median(a for a, _ in pairs), median(b for _, b in pairs)


def row(*cells: object) -> None:
    print("|", " | ".join(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells), "|", flush=True)


def heading(title: str, *columns: str) -> None:
    print(f"\n{title}\n")
    row(*columns)
    print("|" + "---|" * len(columns))


def model_of(name: str) -> Any:
    import timm
    import torch

    torch.manual_seed(0)
    return timm.create_model(name).eval().cuda()


def images_of(model: Any, count: int) -> Any:
    import secateur as sc
    import torch

    # As normalised pixels are: warnings are for others.
    return torch.randn(count, *sc.inspect(model).input_size, device="cuda").clamp_(-2, 2)


def queries_and_keys(model: Any, batch: Any) -> tuple[Any, Any]:
    """Of the middle block, as they come out of the fused layer."""
    import torch

    seen: list[Any] = []
    block = model.blocks[len(model.blocks) // 2]
    handle = block.attn.qkv.register_forward_hook(lambda _m, _a, out: seen.append(out.clone()))
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        model(batch)
    handle.remove()
    return seen[0].unflatten(-1, (3, block.attn.num_heads, -1)).unbind(2)[:2]


def by_torch(q: Any, k: Any) -> Any:
    """Gram matrices in float64 and their singular value decompositions by torch, all on the device."""
    import torch

    q, k = q.transpose(1, 2).double(), k.transpose(1, 2).double()
    grams = q.mT @ q, k.mT @ k
    ridge = 64 * torch.finfo(torch.float64).eps
    left, right = (
        torch.linalg.cholesky(g + torch.diag_embed(ridge * g.diagonal(dim1=-2, dim2=-1) + 1e-300)) for g in grams
    )
    u, s, vh = torch.linalg.svd(left.mT @ right)
    cosines = (left @ u)[..., :GAMMA].abs() * (right @ vh.mT)[..., :GAMMA].abs()
    counted = s[..., None, :GAMMA] > 1e-7 * s[..., None, :1]
    norms = (grams[0].diagonal(dim1=-2, dim2=-1) * grams[1].diagonal(dim1=-2, dim2=-1)).sqrt()
    return ((cosines * counted).sum(-1) / norms).mean(0)


def ceilings(repeats: int) -> tuple[float, float]:
    """Bytes per second of a copy, and float64 operations per second of a matrix product, on this device."""
    import torch

    source, target = torch.empty(2, 1 << 28, dtype=torch.uint8, device="cuda")
    a = torch.randn(4096, 4096, dtype=torch.float64, device="cuda")
    _, copy, product = paired(lambda: target.copy_(source), lambda: a @ a, repeats)
    return 2 * source.numel() / copy, 2 * 4096.0**3 / product


def calibrations(options: argparse.Namespace) -> None:
    import secateur as sc
    import torch

    heading("calibrate ÷ bare forward pass, bf16 autocast", "model", "what", "ratio", "images/s", "forward images/s")
    cases: list[tuple[str, dict[str, Any]]] = [
        ('collect="scores"', {"collect": "scores"}),
        ('collect="all"', {}),
        ('collect="all", token_fraction=0.25', {"token_fraction": 0.25}),
    ]
    for name in options.models:
        model = model_of(name)
        batch = images_of(model, options.batch_size)
        count = options.batch_size * options.batches

        def forward(model: Any = model, batch: Any = batch) -> None:
            with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
                for _ in range(options.batches):
                    model(batch)

        for what, settings in cases:

            def calibrate(model: Any = model, batch: Any = batch, settings: Any = settings) -> None:
                with torch.autocast("cuda", torch.bfloat16):
                    sc.calibrate(model, [batch] * options.batches, max_images=None, gamma=GAMMA, **settings)

            ratio, ours, bare = paired(calibrate, forward, options.repeats)
            row(name, what, ratio, count / ours, count / bare)


def scoring(options: argparse.Namespace) -> None:
    import secateur as sc
    import torch
    from secateur.core.fallback import update_scores

    bandwidth, flops = ceilings(options.repeats)
    heading(
        f"scoring one layer; ceilings: copy {bandwidth:.4g} bytes/s, float64 product {flops:.4g} FLOP/s",
        "model",
        "torch Gram + SVD ÷ ours",
        "ours ms",
        "bytes/s of its ceiling",
        "Gram FLOP/s of its ceiling",
    )
    for name in options.models:
        model = model_of(name)
        q, k = queries_and_keys(model, images_of(model, options.batch_size))
        images, tokens, heads, dim = q.shape
        scorer = sc.core.AttentionScorer(heads, dim, GAMMA)
        update_scores([scorer], q, k)
        difference = (torch.from_numpy(scorer.scores()) - by_torch(q, k).cpu()).abs().max().item()
        if not difference <= 1e-5:
            raise SystemExit(f"bench_cuda: scores differ from torch's by {difference:.3g} in {name}")
        ratio, _, ours = paired(
            lambda q=q, k=k: by_torch(q, k),
            lambda q=q, k=k, scorer=scorer: update_scores([scorer], q, k),
            options.repeats,
        )
        read = 2 * q.numel() * q.element_size() / ours
        computed = 2.0 * images * heads * tokens * dim * (dim + 1) / ours  # both Grams, upper triangles
        row(name, ratio, ours * 1e3, read / bandwidth, computed / flops)


def speed(options: argparse.Namespace) -> None:
    import secateur as sc

    name = "deit_small_patch16_224"
    heading(f"pruned {name}, bfloat16", "macs", "round_to", "layout", "mode", "batch", "speedup", "quartiles")
    dense = model_of(name)
    stats = sc.calibrate(dense, [images_of(dense, 64)], gamma=GAMMA)
    fast = model_of(name).bfloat16()
    for macs in (0.5, 0.28):
        groups = ("qk", "v", "ffn") if macs == 0.5 else ("qk", "v", "ffn", "width")
        for round_to in (8, 16):
            target = sc.Target(macs=macs)
            plan = sc.plan(dense, stats, method="snp", target=target, groups=groups, round_to=round_to)
            for layout in ("exact", "stock"):
                model = model_of(name)
                sc.prune(model, plan, layout=layout)
                model.bfloat16()
                for batch in (64, 256):
                    for compiled in (False, True):
                        chosen = batch in options.compile_batches and round_to in options.compile_round_to
                        if compiled and not chosen:
                            continue
                        found = sc.bench(model, fast, batch_size=batch, repeats=options.speed_repeats, compile=compiled)
                        mode = "compiled" if compiled else "eager"
                        quartiles = f"{found.speedup_quartiles[0]:.3f} … {found.speedup_quartiles[1]:.3f}"
                        row(macs, round_to, layout, mode, batch, found.speedup, quartiles)


def large(options: argparse.Namespace) -> None:
    import secateur as sc
    import torch

    heading("one large calibration, bf16 autocast", "model", "images", "images/s", "peak GiB of the device")
    name = options.models[-1]
    model = model_of(name)
    batch = images_of(model, options.batch_size)
    count = options.large_images // options.batch_size

    def batches() -> Iterator[Any]:
        for _ in range(count):
            yield batch.normal_().clamp_(-2, 2)

    with torch.autocast("cuda", torch.bfloat16):
        sc.calibrate(model, [batch], max_images=None, gamma=GAMMA)
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        stats = sc.calibrate(model, batches(), max_images=None, gamma=GAMMA)
    row(name, stats.images, stats.images / (time.perf_counter() - start), torch.cuda.max_memory_allocated() / 2**30)


def main() -> None:
    options = arguments()
    import secateur as sc
    import timm
    import torch

    if not torch.cuda.is_available():
        print("bench_cuda: expected a CUDA device, got none", file=sys.stderr)
        raise SystemExit(1)
    way = "the core's kernels" if sc.core.runtime.has_cuda() else "torch: this core has no CUDA"
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, timm {timm.__version__}, Python"
        f" {platform.python_version()}; statistics through {way}"
    )
    sections = {"calibrate": calibrations, "scoring": scoring, "speed": speed, "large": large}
    for name in options.sections:
        sections[name](options)


if __name__ == "__main__":
    main()
