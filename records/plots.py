"""The learning curve of a run, drawn from its metrics.jsonl."""

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


def plot_curve(folder: Path) -> None:
    """Draw curve.png from metrics.jsonl: training (all candidates, sampled) and held-out evaluations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), constrained_layout=True)
    styles = {"train": ("-", 0.35), "heldout/sampled": ("o-", 1.0), "heldout/greedy": ("s--", 0.8)}
    for axis, (title, names) in zip(axes.flat, CURVES, strict=True):
        for color, (name, label) in enumerate(names.items()):
            for kind, (style, alpha) in styles.items():
                points = [(r["iteration"], r[name]) for r in records if r["kind"] == kind and name in r]
                if points:
                    axis.plot(
                        *zip(*points, strict=True),
                        style,
                        color=f"C{color}",
                        alpha=alpha,
                        markersize=3.5,
                        label=f"{label}, {kind}",
                    )
        axis.set(title=title, xlabel="iteration", ylim=(0, None))
        axis.grid(alpha=0.25)
        if axis.lines:
            axis.legend(fontsize=7)
    figure.suptitle(f"RLPA: {folder.name}")
    figure.savefig(folder / "curve.png", dpi=120)
    plt.close(figure)
