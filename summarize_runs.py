"""Compare runs that differ in their seed: a table before → after (mean ± spread) and one figure with all curves.

python summarize_runs.py runs/seed0 runs/seed1 runs/seed2 --out docs/results/learning
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev

KINDS = ("heldout/sampled", "heldout/greedy", "unseen/sampled", "unseen/greedy")
ROWS = {
    "recall": "recall of revealed facts",
    "recall_unseen_values": "… of those with a value never seen in training",
    "f1_over_max": "profile F1 ÷ honest maximum",
    "worst_turn": "… at its worst turn",
    "unsupported_lines": "unsupported lines per turn",
    "response_reward": "Response Reward",
    "naturalness": "… naturalness",
    "relevance": "… relevance",
    "logical_consistency": "… logical consistency",
    "engagement": "… engagement",
    "informativeness": "… informativeness",
    "format_valid": "format valid",
    "disclosed_facts": "facts disclosed per turn (mean over turns)",
    "profile_lines": "lines per profile",
    "reply_words": "words per reply",
    "tokens_per_turn": "tokens per turn",
    "reply_repeated": "replies repeated",
    "question_repeated": "questions repeated",
}


def read_records(run: Path) -> list[dict]:
    """Read a run's metrics.jsonl; ValueError if it is not there."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give run folders of train_rlpa.py")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        turns = [value for name, value in record.items() if name.startswith("f1_over_max_turn")]
        record |= {"worst_turn": min(turns)} if turns else {}
    return records


def spread(values: list[float]) -> str:
    """Write mean ± standard deviation.

    >>> spread([0.5, 0.7]), spread([0.5])
    ('0.600 ± 0.141', '0.500')
    """
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def table(runs: list[list[dict]]) -> str:
    """Write a Markdown table: one row per metric, one column per evaluation, before → after."""
    lines = ["| metric | " + " | ".join(KINDS) + " |", "|---|" + "---|" * len(KINDS)]
    for name, label in ROWS.items():
        cells = []
        for kind in KINDS:
            series = [[r[name] for r in records if r["kind"] == kind and name in r] for records in runs]
            series = [s for s in series if s]
            cells.append(f"{spread([s[0] for s in series])} → {spread([s[-1] for s in series])}" if series else "")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(runs: list[list[dict]], path: Path) -> None:
    """Draw the held-out curves of all runs over the iterations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)
    panels = [
        ("recall", "recall of revealed facts"),
        ("response_reward", "Response Reward"),
        ("unsupported_lines", "unsupported lines per turn"),
    ]
    for axis, (name, label) in zip(axes, panels, strict=True):
        for kind, style in (("heldout/sampled", "o-"), ("heldout/greedy", "s--")):
            for i, records in enumerate(runs):
                points = [(r["iteration"], r[name]) for r in records if r["kind"] == kind and name in r]
                if not points:
                    continue
                axis.plot(
                    *zip(*points, strict=True),
                    style,
                    color="C0" if "sampled" in kind else "C1",
                    alpha=0.7,
                    markersize=3,
                    label=f"{kind}, {len(runs)} seeds" if i == 0 else None,
                )
        axis.set(title=label, xlabel="PPO iteration", ylim=(0, None))
        axis.grid(alpha=0.25)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Read the runs, write table and figure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders of train_rlpa.py")
    parser.add_argument("--out", type=Path, required=True, help="path without ending: writes .md and .png")
    args = parser.parse_args()
    try:
        runs = [read_records(run) for run in args.runs]
    except ValueError as error:
        parser.error(str(error))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".md").write_text(table(runs))
    draw(runs, args.out.with_suffix(".png"))
    print(table(runs))


if __name__ == "__main__":
    main()
