"""The tables and the plot of bench_real.py, in Markdown and SVG."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from real_rows import SPEED_BATCH, WAYS

Row = dict[str, Any]


def right(row: Row) -> np.ndarray:
    """Which images the row classifies rightly."""
    bits = np.frombuffer(bytes.fromhex(row["right"]), dtype=np.uint8)
    return np.unpackbits(bits, count=row["images"]).astype(bool)


def standard_error(row: Row) -> float:
    """Of top-1, in points: that of a proportion."""
    share = row["top1"] / 100
    return 100 * math.sqrt(share * (1 - share) / row["images"])


def difference(first: Row, second: Row) -> tuple[float, float]:
    """Points of top-1 that ``first`` is above ``second``, and the standard error of the paired difference.

    Only images that one of them classifies rightly and the other does not count, as in McNemar's test.
    """
    gained, lost = (int(x.sum()) for x in (right(first) & ~right(second), right(second) & ~right(first)))
    count = first["images"]
    return 100 * (gained - lost) / count, 100 * math.sqrt(gained + lost - (gained - lost) ** 2 / count) / count


def summary(row: Row) -> str:
    """A line about a row that was just measured."""
    if "top1" in row:
        return f"top-1 {row['top1']:.2f} %, KL {row['kl']:.3f}, MACs {row['macs']:.4f}, {_minutes(row)}"
    return f"correlation {row['correlation']:.4f}, MACs {row['macs']:.4f}, {_minutes(row)}"


def _minutes(row: Row) -> str:
    return f"{row['minutes']:.1f} minutes" if "minutes" in row else "no time"


def last(rows: list[Row]) -> list[Row]:
    """Of the rows of one kind, the one measured last; sorted by budget, then as rows are listed, then by draw."""
    found = {(row["budget"], row["row"], row["draw"]): row for row in rows}
    places = {name: place for place, name in enumerate(WAYS)}

    def order(row: Row) -> tuple[Any, ...]:
        quantity, kept = row["budget"].split()
        return quantity != "macs", -float(kept), places.get(row["row"], len(places)), row["draw"]

    return sorted(found.values(), key=order)


def show(rows: list[Row], plot_to: Path | None = None) -> None:
    """Print the tables of one model's rows, and draw the plot."""
    rows = last(rows)
    if not rows:
        return
    whole = [row for row in rows if row["draw"] == "all"]
    machines = sorted({(row["processor"], row["torch"], row["timm"]) for row in rows})
    print(f"\n{rows[0]['model']}, {rows[0]['images']:,} validation images; " + "; ".join(map(str, machines)))
    print("commits " + ", ".join(sorted({row["commit"] for row in rows})) + "\n")
    if "top1" not in rows[0]:
        _table(["row", "kept", "heat-map correlation", "lowest 1 %", *_COST], [_heat_cells(row) for row in whole])
        return
    dense = next((row for row in whole if row["row"] == "dense"), None)
    columns = ["row", "kept", "top-1, %", "lost, paired", "top-5, %", "agreement, %", "KL"]
    _table([*columns, *_COST], [_cells(row, dense) for row in whole])
    for budget in dict.fromkeys(row["budget"] for row in whole):
        found = {row["row"]: row for row in whole if row["budget"] == budget}
        rivals = [found[name] for name in ("tome", "tome-falling") if name in found]
        for name in ("ours", "ours-tokens"):
            if name in found and rivals:
                rival = max(rivals, key=lambda row: row["top1"])
                points, error = difference(found[name], rival)
                print(f"{budget}: {name} above {rival['row']} by {points:+.2f} ± {error:.2f} points, paired")
    _spread(rows)
    if plot_to is not None:
        plot(whole, dense, plot_to)


_COST = ["params, M", "MACs", "images/s, batch 1", f"images/s, batch {SPEED_BATCH}", "minutes", "÷ forward passes"]


def _cost_cells(row: Row) -> list[str]:
    found = [f"{row['params'] / 1e6:.2f}", f"{row['macs']:.4f}"]
    for batch_size in (1, SPEED_BATCH):
        timed = row.get(f"speed_{batch_size}")
        found.append(f"{timed['images_per_second']:.1f} ({timed['ratio']:.2f}×)" if timed else "")
    found.append(f"{row['minutes']:.1f}" if "minutes" in row else "")
    found.append(f"{row['forwards']:.1f}" if "forwards" in row else "")
    return found


def _cells(row: Row, dense: Row | None) -> list[str]:
    lost = ""
    if dense is not None and row is not dense:
        points, error = difference(dense, row)
        lost = f"{points:.2f} ± {error:.2f}"
    return [
        row["row"],
        row["budget"],
        f"{row['top1']:.2f} ± {standard_error(row):.2f}",
        lost,
        f"{row['top5']:.2f}",
        f"{row['agreement']:.2f}",
        f"{row['kl']:.3f}",
        *_cost_cells(row),
    ]


def _heat_cells(row: Row) -> list[str]:
    correlation = f"{row['correlation']:.4f} ± {row['error']:.4f}"
    return [row["row"], row["budget"], correlation, f"{row['lowest']:.3f}", *_cost_cells(row)]


def _table(columns: list[str], rows: list[list[str]]) -> None:
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for cells in rows:
        print("| " + " | ".join(cells) + " |")
    print()


def _spread(rows: list[Row]) -> None:
    """Over the random draws of calibration images."""
    drawn: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["draw"] != "all":
            drawn.setdefault((row["budget"], row["row"]), []).append(row)
    for (budget, name), each in drawn.items():
        if len(each) > 1:
            top1 = [row["top1"] for row in each]
            values = ", ".join(f"{value:.2f}" for value in top1)
            mean, deviation = statistics.mean(top1), statistics.stdev(top1)
            print(f"{budget}: {name} over {len(each)} draws: {values}; mean {mean:.2f}, deviation {deviation:.2f}")


def plot(rows: list[Row], dense: Row | None, path: Path) -> None:
    """Draw top-1 against kept MACs, one line a row."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "secateur"  # the same numbers give the same file
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name in WAYS:
        found = [row for row in rows if row["row"] == name and row["budget"].startswith("macs") and name != "dense"]
        points = sorted((row["macs"], row["top1"], standard_error(row)) for row in found)
        if points:
            x, y, errors = zip(*points, strict=True)
            own = name.startswith("ours")
            line = "-" if own else "--"
            panel.errorbar(x, y, errors, fmt=line, marker="o", markersize=3, linewidth=2 if own else 1, label=name)
    if dense is not None:
        panel.axhline(dense["top1"], color="black", linewidth=0.8, label="dense")
    panel.set_xlabel("MACs, share of dense")
    panel.set_ylabel("top-1, %, no training")
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
