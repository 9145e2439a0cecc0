"""The table of the kernel benchmarks, from one dict per measurement."""

from __future__ import annotations

import itertools

COLUMNS = ("kernel", "shape", "direction", "implementation", "median ms", "rate", "of floor", "extra MiB", "error")
FOOTNOTES = (
    "direction: forward, without gradients; both, forward and backward.",
    "rate: TFLOP/s or GB/s of the work that the kernel's docstring counts, whatever an implementation really does.",
    "of floor: time of the bare products of that work (heads) or of a copy of the same bytes, over the median. Eager"
    " has all logits and needs a product less where the kernel computes them twice, so it may pass 1.",
    "extra MiB: peak beyond inputs and what is returned (outputs; in `both` gradients).",
    "error: largest of |result - fp64 truth| over eager's, among outputs and gradients; 1 is as exact as eager.",
    "ppo_head: peers have no such loss; they get its slope as upstream gradient of each log-prob (and KL), hence"
    " compute the same gradients, without the loss. linear_kl: Liger and fla return means, fla of the other direction.",
)


def rate(row: dict) -> str:
    """Say how much of the work was done in a second."""
    per_second = row["work"] / row["seconds"]
    return f"{per_second / 1e12:.3g} TF/s" if row["unit"] == "FLOP" else f"{per_second / 1e9:.3g} GB/s"


def cells(row: dict) -> list[str]:
    """Return a row's cells."""
    error = "" if row["error"] is None else f"{row['error']:.2f}"
    name = [row[column] for column in COLUMNS[:4]]
    numbers = f"{row['seconds'] * 1e3:.4g}", rate(row), f"{row['floor'] / row['seconds']:.2f}"
    return [*name, *numbers, f"{row['extra_bytes'] / 2**20:,.1f}", error]


def work_order(row: dict) -> tuple:
    """Sort by kernel, shape and direction; eager first, ours second, then the peers."""
    first = ("eager", "compile", "ours")
    place = first.index(row["implementation"]) if row["implementation"] in first else len(first)
    return row["kernel"], row["shape"], row["direction"] == "both", place, row["implementation"]


def ratios(rows: list[dict]) -> list[str]:
    """Say how our time and memory compare with each other implementation's, one line per kernel, shape, direction."""
    lines = []
    for key, group in itertools.groupby(sorted(rows, key=work_order), lambda row: work_order(row)[:3]):
        by_name = {row["implementation"]: row for row in group}
        ours = by_name.pop("ours", None)
        if ours and by_name:
            others = (
                f"{name} {ours['seconds'] / row['seconds']:.2f} / "
                + (f"{ours['extra_bytes'] / row['extra_bytes']:.2f}" if row["extra_bytes"] else "-")
                for name, row in by_name.items()
            )
            lines.append(f"{key[0]} {ours['shape']} {ours['direction']}: " + ", ".join(others))
    return lines


def render(rows: list[dict], notes: list[str]) -> str:
    """Lay out the table in Markdown, with what it means and what is missing below."""
    table = [list(COLUMNS)] + [cells(row) for row in sorted(rows, key=work_order)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in table]
    lines = ["| " + " | ".join(row) + " |" for row in padded]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    ours = ratios(rows)
    if ours:
        lines += ["", "Ours over each other: time / extra memory", *(f"- {line}" for line in ours)]
    return "\n".join([*lines, "", "Notes", *(f"- {note}" for note in (*FOOTNOTES, *notes))])
