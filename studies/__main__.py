"""Studies in the embedded world: train over several seeds, evaluate on held-out personas, write a table and a figure.

    python -m studies methods                 RLPA against its base, prompting, SFT and DPO
    python -m studies all --seeds 0 1 2       every study below; what has been trained already is not trained again
    python -m studies summary RUN RUN …       a table of training runs that differ in their seed (studies/summary.py)

A study compares rows; a row is a checkpoint per seed, all evaluated on the same personas. A figure is the mean over
seeds of each persona's score; its interval is a bootstrap over personas, and the spread of seeds stands beside it. Runs
go to --runs, one process each, --jobs at a time; tables and figures to --out.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import numpy as np

from command_line import exits
from evaluation.__main__ import evaluate
from evaluation.__main__ import parse_args as evaluation_args
from evaluation.drawing import draw_curve, style
from evaluation.figures import LEVEL, Array, Estimate, Summary, compare, shown, summarize
from evaluation.results import LABELS, Played, summary_record
from records.metrics import GUARDS
from studies.summary import print_summary
from untrusted.files import read_json
from untrusted.plain_text import clean_text, say
from worlds.first import generate_personas

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "tiny")
SEEDS, ITERATIONS = [0, 1, 2], 24
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
PROMPTED = {"reminder": "reminder"}  # the base, prompted: a row and its method of evaluation


@dataclass(frozen=True)
class Study:
    """What is compared, how it is evaluated, and what was to be seen."""

    rows: tuple[str, ...]  # the first is what the others are compared with
    flags: tuple[str, ...]  # of the evaluation
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
    start, iterations = str(policy_of(BASE, seed, args)), str(args.num_iterations)
    common = ["--ckpt", start, "--seed", str(seed), "--num-iterations", iterations]
    where = ["--run-dir", str(folder_of(run, seed, args)), "--threads", "1"]
    if run in RUNS:
        ends = ["--eval-every", "0", "--save-every", iterations]
        return [sys.executable, "train_rlpa.py", *common, *where, *ends, *RUNS[run]]
    collect = common if run == "sft" else ["--seed", str(seed), "--data", str(folder_of("sft", seed, args))]
    return [sys.executable, "-m", "studies.offline", *collect, *where, *OFFLINE[run]]


def policy_of(run: str, seed: int, args: argparse.Namespace) -> Path:
    """Return the folder of a run's trained policy."""
    if run == BASE or run in PROMPTED:
        return Path(args.ckpt).resolve()  # runs are started from another folder
    folder = folder_of(run, seed, args)
    return folder / "policy" if run in OFFLINE else folder / f"checkpoints/iteration_{args.num_iterations:06d}/policy"


def is_made(run: str, seed: int, args: argparse.Namespace) -> bool:
    """Tell whether a run is there and whole; ValueError if another command made what its folder holds."""
    folder = folder_of(run, seed, args)
    made = folder.with_suffix(".json")
    if not (made.is_file() and folder.is_dir()):
        return False
    if read_json(made, list[str]) != command_of(run, seed, args)[1:]:
        raise ValueError(f"{folder} was made with other settings ({made}); choose another --runs")
    return True


@dataclass
class Making:
    """A run that is being made."""

    run: str
    seed: int
    folder: Path
    process: subprocess.Popen
    start: float


def remove_begun(folder: Path) -> None:
    """Remove what an earlier start has left of a folder; ValueError if there was none, which FOLDER.log would show."""
    log = folder.with_suffix(".log")
    if folder.exists() and not log.is_file():
        raise ValueError(f"{folder} was not begun here, for {log.name} is missing; choose another --runs")
    shutil.rmtree(folder, ignore_errors=True)


def begin(run: str, seed: int, args: argparse.Namespace) -> Making:
    """Start the process of a run, anew if an earlier one was cut off; what it prints goes to FOLDER.log."""
    folder, start = folder_of(run, seed, args), time.perf_counter()
    remove_begun(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command_of(run, seed, args), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    return Making(run, seed, folder, process, start)


def finish(made: Making, args: argparse.Namespace) -> str:
    """Note how a run was made that has ended; returns what went wrong, "" if nothing did."""
    if code := made.process.returncode:
        return f"{made.run}, seed {made.seed}, ended with exit code {code}; see {made.folder.with_suffix('.log')}"
    command = command_of(made.run, made.seed, args)[1:]
    made.folder.with_suffix(".json").write_text(json.dumps(command) + "\n", encoding="utf-8")
    say(f"{made.run}, seed {made.seed}: {time.perf_counter() - made.start:.0f} s")
    return ""


def train(jobs: Sequence[tuple[str, int]], args: argparse.Namespace) -> None:
    """Make the runs (name, seed) that are not there yet, --jobs at a time.

    Raises ValueError for one that fails, after those under way have ended. Whatever else ends this ends them too.
    """
    waiting, running, failures = deque(job for job in jobs if not is_made(*job, args)), [], []
    try:
        while running or waiting and not failures:
            while waiting and len(running) < args.jobs and not failures:
                running.append(begin(*waiting.popleft(), args))
            time.sleep(0.1)
            ended = [one for one in running if one.process.poll() is not None]
            running = [one for one in running if one not in ended]
            failures += filter(None, (finish(one, args) for one in ended))
    finally:
        stop([one.process for one in running])
    if failures:
        raise ValueError("; ".join(failures))


def stop(processes: Sequence[subprocess.Popen], patience: float = 30.0) -> None:
    """Ask processes to end, and kill those that have not after `patience` seconds."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + patience
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def train_all(studies: Sequence[str], args: argparse.Namespace) -> None:
    """Make what the studies need; SFT before DPO, which learns from its dialogues."""
    wanted = {row: None for name in studies for row in STUDIES[name].rows if row in RUNS or row in OFFLINE}
    if "dpo" in wanted:
        wanted = {"sft": None} | wanted
    for rows in ([row for row in wanted if row != "dpo"], [row for row in wanted if row == "dpo"]):
        train([(row, seed) for row in rows for seed in args.seeds], args)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def personas_file(args: argparse.Namespace) -> Path:
    """Write held-out personas that no run was tuned or evaluated on: those behind the first hundred."""
    path = args.runs / "personas.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    personas = generate_personas(200, 0, "heldout")[100:]
    path.write_text("".join(json.dumps({"facts": facts}) + "\n" for facts in personas), encoding="utf-8")
    return path


def flags_of(name: str, args: argparse.Namespace) -> list[str]:
    """Return the flags of the evaluation that a study has: its own, and those of --evaluate behind them."""
    return [*STUDIES[name].flags, *args.evaluate]


def evaluate_rows(name: str, args: argparse.Namespace) -> dict[str, list[Played]]:
    """Evaluate a study's rows, each seed of them; returns row → one result per seed."""
    study, found = STUDIES[name], {}
    for row in study.rows:
        seeds = args.seeds if row in RUNS or row in OFFLINE else args.seeds[:1]
        subjects = [f"{row}_{seed}={policy_of(row, seed, args)}" for seed in seeds]
        out = args.runs / "evaluated" / name / row.replace(" ", "_")
        remove_begun(out)
        flags = ["--personas", str(personas_file(args)), "--out", str(out), "--quiet", *flags_of(name, args)]
        say(f"{name}: evaluating {row}")
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.with_suffix(".log").open("w", encoding="utf-8") as log, redirect_stdout(log):  # its own tables
            chosen = [*subjects, "--method", PROMPTED.get(row, "rlpa"), *flags]
            found[row] = evaluate(evaluation_args(chosen))
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
        lines += [f"| {LABELS[name]} | " + " | ".join(cells) + " |"] * (set(cells) != {"-"})
    for name in WHOLE:
        cells = [shown(row.whole[name]) for row in rows]
        lines += [f"| {LABELS[name]} | " + " | ".join(cells) + " |"] * (set(cells) != {"-"})
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
            draw_curve(axis, row.summary.curves[name], *style(i), row.name)
    axes[0].set(xlabel="turn k", ylabel="AL(k)", title="Replies that pass all five verdicts, %", ylim=(0, 102))
    axes[1].set(xlabel="turn k", ylabel="F1 ÷ maximum", title="Profile against what was disclosed", ylim=(0, 1.05))
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def shown_command(name: str, args: argparse.Namespace) -> str:
    """Write the command that reproduces a study: all flags that decide its figures and are not at their defaults."""
    flags = ["--ckpt", args.ckpt] * (args.ckpt != TINY)
    flags += ["--seeds", *map(str, args.seeds)] * (args.seeds != SEEDS)
    flags += ["--num-iterations", str(args.num_iterations)] * (args.num_iterations != ITERATIONS)
    flags += ["--evaluate", *args.evaluate] * bool(args.evaluate)
    return shlex.join(["python", "-m", "studies", name, *flags])


def run_study(name: str, args: argparse.Namespace) -> None:
    """Evaluate a study whose runs are there, and write NAME.md, NAME.png and NAME.json."""
    study, found = STUDIES[name], evaluate_rows(name, args)
    how = evaluation_args([f"{BASE}={args.ckpt}", *flags_of(name, args)])
    change = how.change_turn if how.scenario == "conflict" else None
    rows, turns = rows_of(found, change), next(iter(found.values()))[0].measurements["AL"].shape[1]
    personas = rows[0].summary.personas
    about = f"{personas} held-out personas, {turns} turns, seeds {', '.join(map(str, args.seeds))}"
    text = [
        f"# {study.question}",
        f"`{shown_command(name, args)}`: {about}, {args.num_iterations} iterations of"
        f" {'the tiny checkpoint' if args.ckpt == TINY else args.ckpt}. A value is the mean over seeds, in brackets its"
        f" {LEVEL:.0f} % interval over personas; differences are paired by persona.",
        f"![curves]({name}.png)", table(rows), curves_table(rows, turns),
    ]  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{name}.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    with exits.decorative(str(args.out / f"{name}.png")):
        draw(args.out / f"{name}.png", f"{study.question} ({about})", rows)
    record = {row.name: summary_record(row.summary) | {"AVG of seeds": row.seeds} for row in rows}
    (args.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    say(f"\n{text[0]}\n\n{table(rows)}\n\n{clean_text(str(args.out / name))}.md")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; ValueError if anything is amiss."""
    parser = exits.Parser("python -m studies", __doc__)
    names = "; ".join(f"{name}: {study.question}" for name, study in STUDIES.items())
    parser.add_argument("studies", nargs="+", choices=[*STUDIES, "all"], metavar="STUDY", help=f"{names}; all")
    parser.add_argument("--ckpt", default=TINY, help="checkpoint that all start from [tiny]")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="[0 1 2]")
    parser.add_argument("--num-iterations", type=int, default=ITERATIONS, help="of each run [24]")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, a core each [all cores]")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/studies", help="folder of the runs [runs/studies]")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/studies", help="[docs/results/studies]")
    parser.add_argument("--evaluate", nargs=argparse.REMAINDER, default=[], help="further flags of evaluation, last")
    args = parser.parse_args(argv)
    for flag, value, least in (("--jobs", args.jobs, 1), ("--num-iterations", args.num_iterations, 1),
                               ("--seeds", min(args.seeds), 0)):  # fmt: skip
        if value < least:
            raise ValueError(f"{flag} {value} must be at least {least}")
    if not Path(args.ckpt).is_dir():
        raise ValueError(f"--ckpt {args.ckpt} is no folder")
    args.studies = list(STUDIES) if "all" in args.studies else list(dict.fromkeys(args.studies))
    for name in args.studies:  # a bad flag of --evaluate is found now, not after hours of training
        evaluation_args([f"{BASE}={args.ckpt}", *flags_of(name, args)])
    return args


def run(argv: Sequence[str] | None) -> None:
    """Train and evaluate, or summarize runs, as the command line says."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["summary"]:
        return print_summary(argv[1:])
    args = parse_args(argv)
    train_all(args.studies, args)
    for name in args.studies:
        run_study(name, args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code (command_line/exits.py)."""
    return exits.run("studies", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
