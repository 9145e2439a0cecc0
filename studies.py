"""Studies in the embedded world: train over several seeds, evaluate on held-out personas, write a table and a figure.

    python studies.py methods                 RLPA against its base, prompting, SFT and DPO
    python studies.py all --seeds 0 1 2       every study below; what has been trained already is not trained again

A study compares rows; a row is a checkpoint per seed, all evaluated on the same personas. A figure is the mean over
seeds of each persona's score; its interval is a bootstrap over personas, and the spread of seeds stands beside it. Runs
go to --runs, one process each, --jobs at a time; tables and figures to --out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import numpy as np

import evaluate
import world
from evaluate import Played
from metrics import LEVEL, Array, Estimate, Summary, compare, shown, summarize
from runlog import GUARDS

ROOT = Path(__file__).parent
BASE = "base"  # the checkpoint that all runs start from
RUNS: dict[str, list[str]] = {  # what each run is called, and its flags beyond the tiny checkpoint's own
    "rlpa": [],
    "profile reward only": ["--response-weight", "0"],
    "response reward only": ["--profile-weight", "0"],
    "credit dialogue": ["--credit", "dialogue"],
    "kl k1": ["--kl-coef", "0.02", "--kl-estimator", "k1"],
    "kl k3": ["--kl-coef", "0.02", "--kl-estimator", "k3"],
    "kl exact": ["--kl-coef", "0.02", "--kl-estimator", "exact"],
    "rloo": ["--advantage", "rloo"],
    "grpo": ["--advantage", "grpo"],
    "ten turns": ["--max-turns", "10"],
}
OFFLINE: dict[str, list[str]] = {"sft": ["--method", "sft", "--min-reward", "1"], "dpo": ["--method", "dpo"]}
PROMPTED = {"reminder": "reminder"}  # the base, prompted: a row and its method in evaluate.py


@dataclass(frozen=True)
class Study:
    """What is compared, how it is evaluated, and what was to be seen."""

    rows: tuple[str, ...]  # the first is what the others are compared with
    flags: tuple[str, ...]  # of evaluate.py
    question: str


SHORT = ("--turns", "6", "--perplexity", str(ROOT / "tiny/sft_heldout.jsonl"))  # turns as the runs are trained on
STUDIES = {
    "methods": Study((BASE, "reminder", "sft", "dpo", "rlpa"), SHORT,
                     "Does RLPA beat prompting and offline fine-tuning on the same data budget?"),
    "ablation": Study(("rlpa", "profile reward only", "response reward only", BASE), SHORT,
                      "Are both rewards needed?"),
    "credit": Study(("rlpa", "credit dialogue"), SHORT,
                    "Does credit that goes on over turns help over each turn's own reward?"),
    "kl": Study(("rlpa", "kl k1", "kl k3", "kl exact"), SHORT,
                "What does a KL penalty of 0.02 cost, by each estimator? (rlpa has none)"),
    "estimators": Study(("rlpa", "rloo", "grpo"), SHORT, "Is the critic needed? (rlpa is GAE)"),
    "conflict": Study((BASE, "sft", "dpo", "ten turns"), ("--scenario", "conflict", "--turns", "10"),
                      "How fast does a profile follow preferences that change at turn 6?"),
    "long": Study((BASE, "rlpa", "ten turns"), ("--scenario", "long", "--num-personas", "24"),
                  "What is left of it over 70 turns?"),
    "transfer": Study((BASE, "sft", "dpo", "rlpa"), ("--world", "second", *SHORT),
                      "What carries over to a user and a judge that training has never met?"),
}  # fmt: skip
FIGURES = ("AVG", "f1", "f1_over_max", "max_f1", "valid", "recovery_AL", "recovery_f1_over_max", *GUARDS, "tokens")
WHOLE = ("distinct_2", "perplexity")

# ---------------------------------------------------------------------------------------------------------------------
# Training


def folder_of(run: str, seed: int, args: argparse.Namespace) -> Path:
    """Return the folder of a run."""
    return args.runs / f"{run.replace(' ', '_')}_{seed}"


def command_of(run: str, seed: int, args: argparse.Namespace) -> list[str]:
    """Return the command that makes a run."""
    common = ["--ckpt", args.ckpt, "--seed", str(seed), "--num-iterations", str(args.num_iterations)]
    where = ["--run-dir", str(folder_of(run, seed, args)), "--threads", "1"]
    if run in RUNS:
        ends = ["--eval-every", "0", "--save-every", str(args.num_iterations)]
        return [sys.executable, "train_rlpa.py", *common, *where, *ends, *RUNS[run]]
    collect = common if run == "sft" else ["--seed", str(seed), "--data", str(folder_of("sft", seed, args))]
    return [sys.executable, "offline.py", *collect, *where, *OFFLINE[run]]


def policy_of(run: str, seed: int, args: argparse.Namespace) -> Path:
    """Return the folder of a run's trained policy."""
    if run == BASE or run in PROMPTED:
        return Path(args.ckpt)
    folder = folder_of(run, seed, args)
    return folder / "policy" if run in OFFLINE else folder / f"checkpoints/iteration_{args.num_iterations:06d}/policy"


def train(run: str, seed: int, args: argparse.Namespace) -> None:
    """Make a run unless it is there; one that was cut off is made anew.

    Raises ValueError if it fails, or if the folder holds a run that another command made.
    """
    folder, start = folder_of(run, seed, args), time.perf_counter()
    made, command = folder.with_suffix(".json"), command_of(run, seed, args)[1:]
    if made.is_file() and folder.is_dir():
        if json.loads(made.read_text()) != command:
            raise ValueError(f"{folder} was made with other settings ({made}); choose another --runs")
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_suffix(".log")
    with log.open("w") as file:
        done = subprocess.run(command_of(run, seed, args), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    if done.returncode:
        raise ValueError(f"{run}, seed {seed}, ended with exit code {done.returncode}; see {log}")
    made.write_text(json.dumps(command) + "\n")
    print(f"{run}, seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)


def train_all(studies: Sequence[str], args: argparse.Namespace) -> None:
    """Make what the studies need, --jobs runs at a time; SFT before DPO, which learns from its dialogues."""
    wanted = {row: None for name in studies for row in STUDIES[name].rows if row in RUNS or row in OFFLINE}
    if "dpo" in wanted:
        wanted = {"sft": None} | wanted
    for rows in ([row for row in wanted if row != "dpo"], [row for row in wanted if row == "dpo"]):
        with ThreadPoolExecutor(args.jobs) as pool:
            for _ in pool.map(lambda job: train(*job, args), [(row, seed) for row in rows for seed in args.seeds]):
                pass


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def personas_file(args: argparse.Namespace) -> Path:
    """Write held-out personas that no run was tuned or evaluated on: those behind the first hundred."""
    path = args.runs / "personas.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    personas = world.generate_personas(200, 0, "heldout")[100:]
    path.write_text("".join(json.dumps({"facts": facts}) + "\n" for facts in personas))
    return path


def evaluate_rows(name: str, args: argparse.Namespace) -> dict[str, list[Played]]:
    """Evaluate a study's rows, each seed of them; returns row → one result per seed."""
    study, found = STUDIES[name], {}
    for row in study.rows:
        seeds = args.seeds if row in RUNS or row in OFFLINE else args.seeds[:1]
        subjects = [f"{row}_{seed}={policy_of(row, seed, args)}" for seed in seeds]
        out = args.runs / "evaluated" / name / row.replace(" ", "_")
        shutil.rmtree(out, ignore_errors=True)
        flags = ["--personas", str(personas_file(args)), "--out", str(out), "--quiet", *study.flags, *args.evaluate]
        print(f"{name}: evaluating {row}", flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.with_suffix(".log").open("w") as log, redirect_stdout(log):  # its own tables
            chosen = [*subjects, "--method", PROMPTED.get(row, "rlpa"), *flags]
            found[row] = evaluate.evaluate(evaluate.parse_args(chosen))
    return found


def over_seeds(played: list[Played]) -> dict[str, Array]:
    """Return each measurement (P, K), the mean over seeds of each persona's; NaN where no seed has one."""
    names = played[0].measurements
    stacks = {name: np.stack([p.measurements[name] for p in played]) for name in names}
    seen = {name: np.isfinite(stack) for name, stack in stacks.items()}
    sums = {name: np.where(seen[name], stack, 0.0).sum(0) for name, stack in stacks.items()}
    return {name: np.where(n := seen[name].sum(0), total / np.maximum(n, 1), np.nan) for name, total in sums.items()}


@dataclass
class Row:
    """One row of a study: its figures over all seeds, what they differ by from the first row's, and each seed's AVG."""

    name: str
    summary: Summary
    difference: Estimate | None  # of AVG
    seeds: list[float]
    whole: dict[str, float]  # figures that no persona has, mean over seeds


def rows_of(found: dict[str, list[Played]], change_turn: int | None) -> list[Row]:
    """Summarize a study."""
    measured = {row: over_seeds(played) for row, played in found.items()}
    first, rows = next(iter(measured.values())), []
    for row, played in found.items():
        difference = compare(measured[row], first, seed=0).figures["AVG"] if rows else None
        seeds = [p.summary.figures["AVG"].value for p in played]
        whole = {name: mean(p.summary.figures[name].value for p in played) for name in WHOLE}
        rows.append(Row(row, summarize(measured[row], 0, change_turn), difference, seeds, whole))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Results


def table(rows: list[Row]) -> str:
    """Write a study in Markdown: a row per figure, a column per row of the study."""
    lines = ["| | " + " | ".join(row.name for row in rows) + " |", "|---|" + "---|" * len(rows)]
    for name in FIGURES:
        cells = [str(row.summary.figures.get(name, "-")) for row in rows]
        lines += [f"| {evaluate.LABELS[name]} | " + " | ".join(cells) + " |"] * (set(cells) != {"-"})
    for name in WHOLE:
        cells = [shown(row.whole[name]) for row in rows]
        lines += [f"| {evaluate.LABELS[name]} | " + " | ".join(cells) + " |"] * (set(cells) != {"-"})
    differences = ["" if row.difference is None else str(row.difference) for row in rows]
    lines.append(f"| AVG − {rows[0].name}'s | " + " | ".join(differences) + " |")
    lines.append("| AVG of each seed | " + " | ".join(", ".join(f"{x:.1f}" for x in row.seeds) for row in rows) + " |")
    if any(len(row.seeds) > 1 for row in rows):
        spreads = [f"{stdev(row.seeds):.1f}" if len(row.seeds) > 1 else "-" for row in rows]
        lines.append("| … standard deviation | " + " | ".join(spreads) + " |")
    return "\n".join(lines)


def curves_table(rows: list[Row], turns: int) -> str:
    """Write AL(k) and evidence F1 ÷ maximum turn by turn; of a long dialogue every tenth turn and the first."""
    chosen = range(turns) if turns <= 12 else [0, *range(9, turns, 10)]
    lines = ["| turn | " + " | ".join(str(k + 1) for k in chosen) + " |", "|---|" + "---|" * len(chosen)]
    for row in rows:
        for name, label in (("AL", "AL(k)"), ("f1_over_max", "F1 ÷ max")):
            values = [row.summary.curves[name][k].value for k in chosen]
            if not all(np.isnan(values)):
                cells = " | ".join("-" if np.isnan(x) else f"{x:.3g}" for x in values)
                lines.append(f"| {row.name}: {label} | {cells} |")
    return "\n".join(lines)


def draw(path: Path, title: str, rows: list[Row]) -> None:
    """Draw AL(k) and evidence F1 ÷ maximum per turn, with intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    for i, row in enumerate(rows):
        for axis, name in zip(axes, ("AL", "f1_over_max"), strict=True):
            evaluate.draw_curve(axis, row.summary.curves[name], *evaluate.style(i), row.name)
    axes[0].set(xlabel="turn k", ylabel="AL(k)", title="Replies that pass all five verdicts, %", ylim=(0, 102))
    axes[1].set(xlabel="turn k", ylabel="F1 ÷ maximum", title="Profile against what was disclosed", ylim=(0, 1.05))
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def run_study(name: str, args: argparse.Namespace) -> None:
    """Evaluate a study whose runs are there, and write NAME.md, NAME.png and NAME.json."""
    study, found = STUDIES[name], evaluate_rows(name, args)
    change = 6 if "conflict" in study.flags else None
    rows, turns = rows_of(found, change), next(iter(found.values()))[0].measurements["AL"].shape[1]
    personas = rows[0].summary.personas
    about = f"{personas} held-out personas, {turns} turns, seeds {', '.join(map(str, args.seeds))}"
    text = [
        f"# {study.question}",
        f"`python studies.py {name}`: {about}, {args.num_iterations} iterations of the tiny checkpoint. A value is the"
        f" mean over seeds, in brackets its {LEVEL:.0f} % interval over personas; differences are paired by persona.",
        f"![curves]({name}.png)", table(rows), curves_table(rows, turns),
    ]  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{name}.md").write_text("\n\n".join(text) + "\n")
    draw(args.out / f"{name}.png", f"{study.question} ({about})", rows)
    record = {row.name: evaluate.summary_record(row.summary) | {"AVG of seeds": row.seeds} for row in rows}
    (args.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{text[0]}\n\n{table(rows)}\n\n{args.out / name}.md", flush=True)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = "; ".join(f"{name}: {study.question}" for name, study in STUDIES.items())
    parser.add_argument("studies", nargs="+", choices=[*STUDIES, "all"], metavar="STUDY", help=f"{names}; all")
    parser.add_argument("--ckpt", default=str(ROOT / "tiny"), help="checkpoint that all start from [tiny]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="[0 1 2]")
    parser.add_argument("--num-iterations", type=int, default=24, help="of each run [24]")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, a core each [all cores]")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/studies", help="folder of the runs [runs/studies]")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/studies", help="[docs/results/studies]")
    parser.add_argument("--evaluate", nargs=argparse.REMAINDER, default=[], help="further flags of evaluate.py, last")
    args = parser.parse_args(argv)
    if args.jobs < 1 or min(args.seeds) < 0 or args.num_iterations < 1:
        parser.error(
            f"--jobs {args.jobs} and --num-iterations {args.num_iterations} must be at least 1,"
            f" --seeds {args.seeds} 0 or more"
        )
    if not Path(args.ckpt).is_dir():
        parser.error(f"--ckpt {args.ckpt} is no folder")
    args.ckpt = str(Path(args.ckpt).resolve())
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Train and evaluate; what a user can mend is one line on stderr and exit code 2."""
    args = parse_args(argv)
    studies = list(STUDIES) if "all" in args.studies else list(dict.fromkeys(args.studies))
    try:
        train_all(studies, args)
        for name in studies:
            run_study(name, args)
    except ValueError as error:
        print(f"studies.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
