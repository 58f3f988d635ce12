"""What pruning costs: DeiT-Base, the plan given. Time, next to a copy and to Torch-Pruning, and memory.

make bench, or pytest --benchmark-enable benchmarks/python/bench_prune.py
The comparison with Torch-Pruning needs it: pip install "secateur[bench]".
"""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
from importlib.util import find_spec

import pytest
import secateur as sc
import timm
import torch
from timm.layers import Attention


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("deit_base_patch16_224").eval()


@pytest.fixture(scope="module")
def plan(model):
    """Half of everything inside the blocks: heads of 32, FFNs of 1536."""
    return plan_of(model, ("qk", "v", "ffn"))


def plan_of(model, kinds):
    stats = sc.calibrate(model, [torch.rand(4, 3, 224, 224) * 2 - 1], collect="scores")
    return sc.plan(model, stats, method="snp", ratios=dict.fromkeys(kinds, 0.5))


def works(model):
    with torch.inference_mode():
        return bool(model(torch.zeros(1, 3, 224, 224)).isfinite().all())


def test_prune(model, plan, paired):
    cut = copy.deepcopy(model)
    report = sc.prune(cut, plan)
    assert report.macs[1] <= 0.51 * report.macs[0]
    assert works(cut)
    weights = [(torch.empty_like(parameter), parameter.detach()) for parameter in model.parameters()]
    paired(
        "prune(DeiT-Base) ÷ one copy of its weights",
        lambda twin: sc.prune(twin, plan),
        lambda _: [copied.copy_(weight) for copied, weight in weights],
        fresh=lambda: copy.deepcopy(model),
    )


def by_torch_pruning(model, *, width):
    """Its ViT example, whole (``width``) or "bottleneck"; random importance, which costs it least."""
    import torch_pruning as tp

    attention = [module for module in model.modules() if isinstance(module, Attention)]
    inner = [] if width else [layer for block in model.blocks for layer in (block.attn.proj, block.mlp.fc2)]
    pruner = tp.pruner.MetaPruner(
        model,
        torch.zeros(1, 3, 224, 224),
        importance=tp.importance.RandomImportance(),
        pruning_ratio=0.5,
        ignored_layers=[model.head, *inner],
        num_heads={attn.qkv: attn.num_heads for attn in attention},
        prune_head_dims=True,
        round_to=2,
        unwrapped_parameters=[(model.cls_token, 2), (model.pos_embed, 2)],
    )
    for group in pruner.step(interactive=True):
        group.prune()
    for attn in attention:
        attn.num_heads = pruner.num_heads[attn.qkv]
        attn.head_dim = attn.qkv.out_features // (3 * attn.num_heads)
        attn.attn_dim = attn.num_heads * attn.head_dim


@pytest.mark.skipif(find_spec("torch_pruning") is None, reason='no Torch-Pruning: pip install "secateur[bench]"')
@pytest.mark.parametrize("width", [False, True], ids=["inner", "width"])
def test_prune_against_torch_pruning(model, paired, width):
    plan = plan_of(model, ("qk", "v", "ffn", "width") if width else ("qk", "v", "ffn"))
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    report = sc.prune(ours, plan)
    by_torch_pruning(theirs, width=width)
    assert works(ours)
    assert works(theirs)
    # The very same sizes, so that both have the same work to do; both really smaller.
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    assert report.macs[1] <= 0.51 * report.macs[0]
    del ours, theirs
    before, after = (f"{macs / 1e9:.1f}" for macs in report.macs)
    paired(
        f"Torch-Pruning: graph and prune ÷ prune(DeiT-Base), {before} → {after} GMACs",
        lambda twin: by_torch_pruning(twin, width=width),
        lambda twin: sc.prune(twin, plan),
        runs=9,
        fresh=lambda: copy.deepcopy(model),
    )


def test_peak_memory(plan, paired, tmp_path):
    """From outside, in fresh processes: the peak of resident memory while the model is cut."""
    plan.save(tmp_path / "plan.json")
    script = textwrap.dedent("""
        import copy, re, sys, timm, torch
        from pathlib import Path
        import secateur as sc
        torch.set_num_threads(int(sys.argv[2]))
        torch.manual_seed(0)
        model = timm.create_model("deit_base_patch16_224").eval()
        plan = sc.Plan.load(sys.argv[1])
        def mib(field):
            return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
        warm = timm.create_model("deit_tiny_patch16_224", depth=1).eval()
        stats = sc.calibrate(warm, [torch.zeros(1, 3, 224, 224)], collect="scores")
        sc.prune(warm, sc.plan(warm, stats, method="snp", ratios={"qk": 0.5, "v": 0.5, "ffn": 0.5}))
        Path("/proc/self/clear_refs").write_text("5")
        before = mib("VmRSS")
        sc.prune(model, plan)
        print(mib("VmHWM") - before, max(p.numel() * p.element_size() for p in model.parameters()) / 2**20)
    """)
    arguments = [sys.executable, "-c", script, str(tmp_path / "plan.json"), str(torch.get_num_threads())]
    pairs = []

    def measure():
        run = subprocess.run(arguments, capture_output=True, text=True, check=True)
        pairs.append(tuple(float(number) for number in run.stdout.split()))

    paired.benchmark.pedantic(measure, rounds=5)
    added, largest = zip(*pairs, strict=True)
    assert all(a <= b + 1 for a, b in pairs)
    paired.record("memory added by prune(DeiT-Base) ÷ its largest new tensor", added, largest, "MiB")
