"""The table of docs/results/learning.md: runs that differ in their seed, before → after, mean ± standard deviation.

    python -m studies summary runs/seed0 runs/seed1 runs/seed2 --curve docs/results/learning.png
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from command_line import exits
from records.plots import plot_curve
from rewards import VERDICTS
from untrusted.files import check_value, parse_json, read_lines
from untrusted.plain_text import say

KINDS = ("heldout/sampled", "heldout/greedy", "unseen/sampled", "unseen/greedy")
ROWS = {
    "recall": "recall of revealed facts",
    "recall_unseen_values": "… of those with a value never seen in training",
    "f1_over_max": "profile F1 ÷ honest maximum",
    "worst_turn": "… at its worst turn",
    "unsupported_lines": "unsupported lines per turn",
    "response_reward": "Response Reward",
    **{name: f"… {name.replace('_', ' ')}" for name in VERDICTS},
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
    records = [parse_json(line, f"{path}, line {number}") for number, line in enumerate(read_lines(path), 1)]
    for number, record in enumerate(records, 1):
        check_value(record, dict, f"{path}, line {number}")
        shape = dict.fromkeys(record, float) | {"iteration": int, "kind": str}
        check_value(record, shape, f"{path}, line {number}")
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


def print_summary(argv: Sequence[str]) -> None:
    """Print the table of the runs, and draw all their curves in one picture if --curve names it."""
    parser = exits.Parser("python -m studies summary", "Compare runs that differ in their seed.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders of train_rlpa.py")
    parser.add_argument("--curve", type=Path, help="picture to draw their curves to, which ends in .png")
    args = parser.parse_args(argv)
    say(table([read_records(run) for run in args.runs]).rstrip())
    if args.curve:
        try:
            plot_curve(args.curve, *args.runs)
        except ImportError as error:  # here the picture is what was asked for
            raise ValueError(f"--curve {args.curve} cannot be drawn: {error}") from None
