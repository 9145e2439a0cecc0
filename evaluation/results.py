"""What an evaluation prints and writes: tables on the terminal, results.json, results.csv and episodes.jsonl."""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dialogue import Dialogue
from evaluation import subjects
from evaluation.figures import LEVEL, RESAMPLES, Array, Estimate, Summary, shown
from records.checkpoints import write_text
from records.log import episode_record
from records.metrics import DISTINCT, GUARDS
from rewards import VERDICTS
from untrusted.plain_text import clean_text, say

LABELS = {
    "AVG": "AVG",
    "IR": "IR",
    "R2": "R²",
    "N-IR": "N-IR",
    "N-R2": "N-R²",
    "f1": "profile F1",
    "max_f1": "… honest maximum",
    "f1_over_max": "… evidence F1 ÷ maximum",
    **{name: name.replace("_", " ") for name in VERDICTS},
    "valid": "format valid",
    "tokens": "tokens per turn",
    **{name: name.replace("_", " ") for name in GUARDS},
    **{f"distinct_{n}": f"distinct-{n}" for n in DISTINCT},
    "perplexity": "perplexity",
    "recovery_AL": "turns to recover, AL",
    "recovery_f1_over_max": "turns to recover, F1 ÷ max",
}


@dataclass
class Played:
    """One row of the evaluation: who played by which method, how, and what came of it."""

    name: str
    dialogues: list[Dialogue]
    measurements: dict[str, Array]
    summary: Summary
    seconds: float
    counts: dict[str, int]
    calls: dict[str, float]  # of user, judge and subject, with their tokens and cost
    calls_note: str
    complaint: str  # what user, judge or subject said last instead of a reply; empty: nothing
    perplexities: Array  # (1 + R,) of the text of --perplexity and its resamples; NaN if it was not measured


def report(played: list[Played], compared: dict[str, Summary], args: argparse.Namespace) -> None:
    """Print the tables, and what went wrong."""
    size = f"{len(played[0].dialogues)} personas x {args.turns} turns"
    say(f"\n{args.scenario}, {args.world} world: {size}; value [{LEVEL:.0f} % interval]\n")
    say(figures_table([p.name for p in played], [p.summary for p in played]) + "\n")
    say(turns_table(played, args.turns) + "\n")
    if compared:
        say("Differences on the same personas:\n")
        say(figures_table(list(compared), list(compared.values())) + "\n")
    for p in played:
        notes = "; ".join(f"{clean_text(name)}: {n}" for name, n in p.counts.items())
        say(f"{p.name}: {p.seconds:.1f} s" + (f"; {notes}" if notes else ""))
        say(f"{p.name}: {p.calls_note}")
    say(f"results: {clean_text(str(args.out))}")


def table(rows: list[list[str]]) -> str:
    """Align cells in columns, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )


def figures_table(names: list[str], summaries: list[Summary]) -> str:
    """Write a column per subject (or comparison) and a row per figure; blocks of four columns fit a terminal."""
    if len(names) > 4:
        return figures_table(names[:4], summaries[:4]) + "\n\n" + figures_table(names[4:], summaries[4:])
    rows = [["", *names], ["personas", *(str(s.personas) for s in summaries)]]
    for name, label in LABELS.items():
        if name in summaries[0].figures:
            estimates = [summary.figures[name] for summary in summaries]
            if not all(math.isnan(e.value) for e in estimates):
                rows.append([label, *map(str, estimates)])
    return table(rows)


def turns_table(played: list[Played], turns: int) -> str:
    """Write AL(k), profile F1 and its maximum turn by turn; of a long dialogue only every tenth turn and the first."""
    shown_turns = range(turns) if turns <= 12 else [0, *range(9, turns, 10)]
    rows = [["turn", *(str(k + 1) for k in shown_turns)]]
    for p in played:
        seen = np.isfinite(p.measurements["AL"]).sum(0)
        rows.append([f"{p.name}: dialogues", *(str(seen[k]) for k in shown_turns)])
        for name, label in (("AL", "AL(k)"), ("f1", "F1"), ("max_f1", "honest maximum"), ("f1_over_max", "F1 ÷ max")):
            rows.append([f"{p.name}: {label}", *(shown(p.summary.curves[name][k].value) for k in shown_turns)])
    return table(rows)


def plain(estimate: Estimate) -> dict[str, float | str | None]:
    """Return an estimate for JSON: null where nothing was measured, "never" for infinity."""
    return {
        end: None if math.isnan(x) else "never" if math.isinf(x) else round(x, 6)
        for end, x in asdict(estimate).items()
    }


def summary_record(summary: Summary) -> dict:
    """Return a summary for JSON."""
    return {
        "personas": summary.personas,
        "figures": {name: plain(e) for name, e in summary.figures.items()},
        "turns": {name: [plain(e) for e in curve] for name, curve in summary.curves.items()},
    }


def write_results(
    folder: Path, args: argparse.Namespace, played: list[Played], compared: dict[str, Summary]
) -> None:
    """Write results.json, results.csv and episodes.jsonl."""
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    settings["perplexity"] = args.perplexity and str(args.perplexity)
    results = {
        "settings": settings | {"resamples": RESAMPLES, "interval_percent": LEVEL},
        "subjects": {
            p.name: summary_record(p.summary)
            | {"counts": p.counts, "calls": p.calls, "seconds": round(p.seconds, 2)}
            for p in played
        },
        "differences": {name: summary_record(summary) for name, summary in compared.items()},
    }
    write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
    rows = io.StringIO()
    writer = csv.writer(rows)
    writer.writerow(("subject", "personas", "metric", "turn", "value", "low", "high"))
    for name, summary in {**{p.name: p.summary for p in played}, **compared}.items():
        writer.writerows((name, summary.personas, *row) for row in csv_rows(summary))
    write_text(folder / "results.csv", rows.getvalue())
    episodes = [{"kind": p.name, **evaluated_record(dialogue)} for p in played for dialogue in p.dialogues]
    write_text(folder / "episodes.jsonl", "".join(json.dumps(episode) + "\n" for episode in episodes))


def csv_rows(summary: Summary) -> list[tuple]:
    """Return (metric, turn or "", value, low, high) for every estimate; "" where nothing was measured."""
    found = [(name, "", e) for name, e in summary.figures.items()]
    found += [(name, k, e) for name, curve in summary.curves.items() for k, e in enumerate(curve, 1)]
    return [(name, k, *("" if x is None else x for x in plain(e).values())) for name, k, e in found]


def evaluated_record(dialogue: Dialogue) -> dict:
    """Return a dialogue for episodes.jsonl, with the tokens that others counted."""
    record = episode_record(dialogue)
    for turn, kept in zip(dialogue.turns, record["turns"], strict=True):
        for candidate, kept_candidate in zip(turn.candidates, kept["candidates"], strict=True):
            kept_candidate["tokens"] = subjects.tokens_of(candidate)
    return record
