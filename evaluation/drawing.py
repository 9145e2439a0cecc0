"""The pictures of an evaluation: curves over turns with their intervals, or tokens against score."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from evaluation.figures import LEVEL, Estimate
from evaluation.results import Played

LINES, MARKERS = ("-", "--", "-.", ":"), "os^DvPX*<>hd"  # 12 pairs differ without colour


def style(i: int) -> tuple[str, str, str]:
    """Return colour, line and marker of subject i."""
    return f"C{i % 10}", LINES[(i + i // len(MARKERS)) % len(LINES)], MARKERS[i % len(MARKERS)]


def draw(path: Path, played: list[Played], args: argparse.Namespace) -> None:
    """Draw AL(k) and profile F1 per turn with bands, or tokens against score; lines differ without colour too."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    scatter = args.scenario == "efficiency"
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    for i, p in enumerate(played):
        color, line, marker = style(i)
        for axis, name in zip(axes, ("AVG", "f1") if scatter else ("AL", "f1"), strict=True):
            if scatter:
                draw_point(axis, p.summary.figures["tokens"], p.summary.figures[name], color, marker, p.name)
            else:
                draw_curve(axis, p.summary.curves[name], color, line, marker, p.name)
    if scatter:
        axes[0].set(xlabel="tokens per turn", ylabel="AVG", title="Response: tokens against score", ylim=(0, 100))
        axes[1].set(xlabel="tokens per turn", ylabel="profile F1", title="Profile: tokens against score", ylim=(0, 1))
    else:
        for i, p in enumerate(played):
            if not math.isnan(p.summary.figures["f1"].value):
                maximum = [e.value for e in p.summary.curves["max_f1"]]
                axes[1].plot(range(1, args.turns + 1), maximum, style(i)[1], color="0.4", lw=1)
        axes[1].plot([], [], color="0.4", lw=1, label="grey: honest maximum, line as above")
        axes[0].set(xlabel="turn k", ylabel="AL(k)", title="Replies that pass all five verdicts, %", ylim=(0, 102))
        axes[1].set(xlabel="turn k", ylabel="F1", title="Profile against the whole persona", ylim=(0, 1.02))
        for axis in axes:
            axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes:
        axis.grid(alpha=0.25)
        if args.scenario == "conflict":
            axis.axvline(args.change_turn, color="0.2", lw=1, ls=(0, (1, 3)), label="preferences change")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    what = f"{args.scenario}, {args.world} world"
    figure.suptitle(f"{what}, {len(played[0].dialogues)} personas, {LEVEL:.0f} % intervals")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_curve(axis, curve: list[Estimate], color: str, line: str, marker: str, label: str) -> None:
    """Draw a curve with its band; a curve that was never measured is left out."""
    turns, values = range(1, len(curve) + 1), [e.value for e in curve]
    if all(map(math.isnan, values)):
        return
    every = max(1, len(curve) // 10)
    axis.plot(turns, values, line, color=color, marker=marker, markersize=4, markevery=every, label=as_text(label))
    axis.fill_between(turns, [e.low for e in curve], [e.high for e in curve], color=color, alpha=0.15, lw=0)


def draw_point(axis, x: Estimate, y: Estimate, color: str, marker: str, label: str) -> None:
    """Draw a point with its intervals in both directions; one that was never measured is left out."""
    if math.isnan(x.value + y.value):
        return
    bars = [[[max(0.0, e.value - e.low)], [max(0.0, e.high - e.value)]] for e in (x, y)]
    axis.errorbar([x.value], [y.value], bars[1], bars[0], color=color, marker=marker, capsize=3, label=as_text(label))


def as_text(label: str) -> str:
    """Keep matplotlib from reading a subject's name as a formula."""
    return label.replace("$", r"\$")
