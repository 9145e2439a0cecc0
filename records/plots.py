"""The learning curve of a run, or of several, drawn from their metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

CURVES = [
    (
        "What is revealed gets into the profile",
        {"recall": "recall of revealed facts", "f1_over_max": "F1 ÷ honest maximum"},
    ),
    (
        "Replies that pass all five verdicts",
        {"response_reward": "response reward", "engagement": "engagement", "relevance": "relevance"},
    ),
    ("Lines per profile that nothing supports", {"unsupported_lines": "unsupported lines"}),
    (
        "Guards",
        {
            "format_valid": "format valid",
            "reply_repeated": "replies repeated",
            "question_repeated": "questions repeated",
            "parroting": "parroting",
        },
    ),
]
STYLES = {"train": ("-", 0.35), "heldout/sampled": ("o-", 1.0), "heldout/greedy": ("s--", 0.8)}


def plot_curve(path: Path, *runs: Path) -> None:
    """Draw the metrics.jsonl of run folders over each other: training (all candidates) and held-out evaluations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    texts = [(run / "metrics.jsonl").read_text(encoding="utf-8") for run in runs]
    records = [[json.loads(line) for line in text.splitlines()] for text in texts]
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), constrained_layout=True)
    for axis, (title, names) in zip(axes.flat, CURVES, strict=True):
        for i, run in enumerate(records):
            draw_run(axis, run, names, labelled=i == 0)
        axis.set(title=title, xlabel="iteration", ylim=(0, None))
        axis.grid(alpha=0.25)
        if axis.lines:
            axis.legend(fontsize=7)
    figure.suptitle(f"RLPA: {', '.join(run.name for run in runs)}")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_run(axis, records: list[dict], names: dict[str, str], labelled: bool) -> None:
    """Draw one run's metrics in a panel: a colour per metric, a line style per kind of record."""
    for color, (name, label) in enumerate(names.items()):
        for kind, (style, alpha) in STYLES.items():
            points = [(r["iteration"], r[name]) for r in records if r["kind"] == kind and name in r]
            if points:
                (line,) = axis.plot(*zip(*points, strict=True), style, color=f"C{color}", alpha=alpha, markersize=3.5)
                line.set_label(f"{label}, {kind}" if labelled else None)
