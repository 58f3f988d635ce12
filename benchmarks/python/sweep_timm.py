"""Sweeps over timm: what secateur does with a small model of each class that has attention or FFN layers.

    python benchmarks/python/sweep_timm.py            # one entry per class, made small where its builder allows
    python benchmarks/python/sweep_timm.py --all      # every timm entry with attention or FFN layers, as timm builds it
    python benchmarks/python/sweep_timm.py --docs     # writes the table into docs/families.md

Each row: inspect, calibrate, plan for 80 % of the MACs (or, where that cannot be reached, 30 % of the FFN units less),
prune, compare with the masked dense model in float64 (``prune`` does it, to 1e-10), save, and load in a fresh process.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import secateur as sc
import timm
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/python/support"))
import timm_ffn  # noqa: E402

BEGIN, END = "<!-- sweep -->", "<!-- /sweep -->"
_LOADED = """
import sys, torch, secateur as sc
images, expected = torch.load(sys.argv[1] + ".pt")
with torch.no_grad():
    sys.exit(not torch.equal(sc.load(sys.argv[1] + ".safetensors")(images), expected))
"""
_LIKE = ("attention", "attn", "mlp", "ffn")


def entries(everything: bool) -> Iterator[tuple[str, dict, int | None]]:
    """Names of timm, arguments and sizes of images."""
    if not everything:
        yield from timm_ffn.MODELS.values()
        yield from ((name, {}, None) for name, _ in timm_ffn.REFUSED.values())
        return
    for name in timm.list_models(exclude_filters=["secateur_*"]):
        modules = timm.create_model(name, device="meta").modules()
        if any(word in type(module).__name__.lower() for module in modules for word in _LIKE):
            yield name, {}, None


def row(name: str, arguments: dict, size: int | None) -> tuple[str, ...]:
    """The class, the entry, what was cut, the share of MACs, and whether the file is the same model; or a reason."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **arguments)
    model = timm_ffn.live(model, size or model.pretrained_cfg["input_size"][1])
    head = (type(model).__name__, name)
    try:
        anatomy = sc.inspect(model)
        images = timm_ffn.images(model, 4)
        stats = sc.calibrate(model, [images])
        kinds = ", ".join(dict.fromkeys(group.kind for group in anatomy.groups if group.traits.in_target))
        try:
            plan = sc.plan(model, stats, method="refit", target=sc.Target(macs=0.8))
        except sc.errors.Error:
            plan = sc.plan(model, stats, method="snp", ratios={"ffn": 0.3})
        report = sc.prune(model, plan)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            path = f"{folder}/model"
            sc.save(model, f"{path}.safetensors")
            torch.save((images, model(images)), f"{path}.pt")
            done = subprocess.run([sys.executable, "-c", _LOADED, path], check=False, capture_output=True)
        uncut = [reason for part, reason in anatomy.refused.items() if "." in part]
        rest = f"{len(uncut)} FFN layers stay: {uncut[0]}" if uncut else ""
        share = f"{report.macs[1] / report.macs[0]:.0%}"
        return (*head, kinds, share, "yes" if done.returncode == 0 else "NO", rest)
    except sc.errors.Error as error:
        return (*head, "refused", "–", "–", str(error).partition("to cut: ")[2] or str(error))
    except Exception as error:
        return (*head, "FAILED", "–", "–", f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--all", action="store_true", help="every timm entry with attention or FFN layers")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/families.md")
    parser.add_argument("--only", default="", help="only entries whose name contains this")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    lines = ["| class | entry | cut | MACs left | same in a new process | stays |", "|---|---|---|---|---|---|"]
    print(*lines, sep="\n")
    failed = 0
    for name, arguments, size in entries(chosen.all):
        if chosen.only in name:
            found = row(name, arguments, size)
            failed += found[2] == "FAILED" or found[4] == "NO"
            lines.append("| " + " | ".join(found) + " |")
            print(lines[-1], flush=True)
    if chosen.docs:
        page = ROOT / "docs/families.md"
        before, _, rest = page.read_text().partition(BEGIN)
        page.write_text("\n".join([before + BEGIN, "", *lines, "", END]) + rest.partition(END)[2])
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
