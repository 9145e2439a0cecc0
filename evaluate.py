"""Evaluate by the ALOE protocol: held-out personas, a cold start with "Hello", K turns, a verdict on each.

    python evaluate.py tiny=tiny trained=runs/NAME/checkpoints/iteration_000024/policy
    python evaluate.py ours=CKPT gpt=https://api.openai.com/v1#gpt-4o --method self_critic --subject-key-env MY_KEY

A subject is NAME=FOLDER, NAME=HUB_ID or NAME=URL#MODEL (any OpenAI-compatible endpoint). All meet the same users, so
that each is compared with the first one persona by persona. Written to --out: results.json, results.csv, curves.png and
episodes.jsonl (whole dialogues). docs/evaluation.md explains the figures.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np

import second_world
import subjects
import train_rlpa
from command_line import exits
from command_line.flags import field_comments
from dialogue import Dialogue
from metrics import LEVEL, RESAMPLES, Array, Estimate, Summary, compare, estimate, perplexity_samples, shown, summarize
from model import resolve_checkpoint
from plain_text import clean_text
from records.log import episode_record
from records.metrics import DISTINCT, GUARDS, PROFILE_GUARDS, guards, rates, tally
from records.perplexity import Text, read_texts, text_scores
from rewards import VERDICTS
from scenarios import SCENARIOS, choose_personas, make_dialogues
from simulator import ChatClient, Persona, Tape
from subjects import METHODS, RLPA
from train_rlpa import Config, Play, World

PASSED = (  # flags that go to the rollout as they are; their help stands in train_rlpa.Config
    "simulator_url",
    "simulator_model",
    "judge_url",
    "judge_model",
    "profile_judge",
    "api_key_env",
    "request_timeout",
    "max_retries",
    "max_concurrency",
    "requests_per_minute",
    "tokens_per_minute",
    "outage_budget",
    "max_new_tokens",
    "history_profile",
    "decode_batch_size",
    "kv_gib",
    "reply_steps",
    "record",
    "replay",
    "price_in",
    "price_out",
    "dtype",
    "kernels",
    "threads",
    "seed",
)
OWN_FILES = ("results.json", "metrics.jsonl", "episodes.jsonl")  # a folder that holds one is not written to
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
    perplexities: Array  # (1 + R,) of the text of --perplexity and its resamples; NaN if it was not measured


# ---------------------------------------------------------------------------------------------------------------------
# Playing and measuring


def subject_config(target: str | Path, args: argparse.Namespace) -> Config:
    """Return how a URL or a checkpoint's folder plays: the trainer's defaults < the folder's `rlpa.json` < flags."""
    given = {name: value for name in PASSED if (value := getattr(args, name)) is not None}
    own = train_rlpa.checkpoint_defaults(target) if isinstance(target, Path) else {}
    fixed = {"max_turns": args.turns, "profile_target": "persona"}
    if args.world == "second":
        fixed["simulator_model"] = second_world.MODEL_NAME
    config = Config(**{**own, **given, **fixed})
    if args.world == "second" and (config.simulator_url or config.judge_url):
        raise ValueError("--world second has a user and a judge of its own; drop --simulator-url and --judge-url")
    return config


def is_url(target: str) -> bool:
    """Tell an endpoint from a checkpoint."""
    return target.startswith(("http://", "https://"))


def play(
    name: str,
    player: ChatClient | Path,
    config: Config,
    method: str,
    personas: list[Persona],
    args: argparse.Namespace,
    env: World,
    perplexities: Array,
) -> Played:
    """Play all personas with one endpoint or checkpoint and measure it."""
    start = time.perf_counter()
    dialogues = make_dialogues(personas, args.change_turn if args.scenario == "conflict" else None)
    how = Play(1, args.temperature, (args.seed, "evaluate"))
    env.counts.clear()
    calls_before = calls_of(player, env)
    with subjects.progress(dialogues, args.turns, name, show=not args.quiet):
        by = subjects.play_checkpoint if isinstance(player, Path) else subjects.play_endpoint
        by(player, method, dialogues, how, config, env)
    measured = measure(dialogues, args.turns, method == RLPA)
    summary = summarize(measured, args.seed, args.change_turn if args.scenario == "conflict" else None)
    summary = replace(summary, figures=summary.figures | corpus_figures(dialogues, perplexities))
    calls = calls_of(player, env) - calls_before
    note = train_rlpa.calls_note(calls, config)
    calls = {**calls, **train_rlpa.cost(calls, config)}
    counts = counts_of(dialogues, args.turns)
    seconds = time.perf_counter() - start
    return Played(name, dialogues, measured, summary, seconds, counts, calls, note, perplexities)


def calls_of(player: ChatClient | Path, env: World) -> Counter:
    """Return the calls so far of user, judge and, if it is an endpoint, the subject."""
    counts = train_rlpa.endpoint_counts(env)
    if isinstance(player, ChatClient):
        counts.update(train_rlpa.client_counts("subject", player))
    return counts


def find_target(name: str, target: str) -> str | Path:
    """Return a URL as it is and else a checkpoint's folder; ValueError if there is none."""
    try:
        return target if is_url(target) else resolve_checkpoint(target)
    except ValueError as error:
        reason = str(error).removeprefix("--ckpt ")
        raise ValueError(f"subject {name}={reason}; an endpoint is http://HOST/v1#MODEL or https://…") from None


def open_client(name: str, target: str, args: argparse.Namespace, tape: Tape | None) -> ChatClient:
    """Open the client of an endpoint, URL#MODEL; ValueError for a bad URL or a key that is not there."""
    url, _, model = target.partition("#")
    config = subject_config(target, args)
    return ChatClient(
        url,
        model,
        args.subject_key_env or None,
        read_timeout=config.request_timeout,
        total_timeout=config.request_timeout,
        max_retries=config.max_retries,
        max_concurrency=config.max_concurrency,
        temperature=args.temperature,
        max_tokens=config.max_new_tokens,
        tape=tape,
        name=f"subject {name}",
    )


def measure(dialogues: list[Dialogue], turns: int, writes_profile: bool) -> dict[str, Array]:
    """Return each measurement (P, K); NaN for dropped dialogues, for turns that were not played, and for what a method
    without a profile does not have."""
    names = ("AL", "max_f1", "tokens", "f1", "evidence_f1", "valid", *GUARDS, *VERDICTS)
    measured = {name: np.full((len(dialogues), turns), np.nan) for name in names}
    for i, dialogue in enumerate(dialogues):
        for t, turn in enumerate(dialogue.turns if dialogue.dropped is None else []):
            reply = turn.winner
            values = {"AL": 100 * reply.response_reward, "max_f1": reply.ledger["max_f1"], **reply.verdicts}
            before = [earlier.winner.response for earlier in dialogue.turns[:t]]
            values |= {"tokens": subjects.tokens_of(reply), **guards(reply, before, turn.user_text)}
            if not writes_profile:
                values |= dict.fromkeys(PROFILE_GUARDS, math.nan)
            else:
                values |= {"f1": reply.profile_reward, "evidence_f1": reply.ledger["evidence_f1"]}
                values |= {"valid": reply.failure is None}
            for name, value in values.items():
                measured[name][i, t] = value
    return measured


def corpus_figures(dialogues: list[Dialogue], perplexities: Array) -> dict[str, Estimate]:
    """Return the figures that are not means over personas: distinct-n of all replies (no interval), and perplexity."""
    found = rates(tally(dialogues))
    figures = {f"distinct_{n}": Estimate(found[f"distinct_{n}"], math.nan, math.nan) for n in DISTINCT}
    return figures | {"perplexity": estimate(perplexities)}


def perplexities_of(player: ChatClient | Path, config: Config, texts: list[Text], seed: int) -> Array:
    """Return a checkpoint's perplexity (1 + R,) on texts and their resamples; NaN for an endpoint, or without texts."""
    if not texts or not isinstance(player, Path):
        return np.full(1 + RESAMPLES, np.nan)
    return perplexity_samples(text_scores(*subjects.load_checkpoint(player, config), texts), seed)


def difference(one: Played, other: Played, seed: int) -> Summary:
    """Return `one` − `other` on the personas and the texts that both have."""
    summary = compare(one.measurements, other.measurements, seed)
    return replace(
        summary, figures=summary.figures | {"perplexity": estimate(one.perplexities - other.perplexities)}
    )


def counts_of(dialogues: list[Dialogue], turns: int) -> dict[str, int]:
    """Count what went wrong, by who failed, and who counted the tokens."""
    counts = Counter(clean_text(f"dropped ({d.dropped})") for d in dialogues if d.dropped is not None)
    kept = [d for d in dialogues if d.dropped is None]
    counts["ended early (no more positions)"] = sum(len(d.turns) < turns for d in kept)
    by_words = sum(subjects.counted_by(turn.winner) == "words" for d in kept for turn in d.turns)
    counts["turns whose tokens are words (the endpoint sent no usage)"] = by_words
    return {name: n for name, n in counts.items() if n}


# ---------------------------------------------------------------------------------------------------------------------
# Results: terminal, JSON, CSV


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
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("subject", "personas", "metric", "turn", "value", "low", "high"))
        for name, summary in {**{p.name: p.summary for p in played}, **compared}.items():
            writer.writerows((name, summary.personas, *row) for row in csv_rows(summary))
    with (folder / "episodes.jsonl").open("w") as file:
        for p in played:
            for dialogue in p.dialogues:
                file.write(json.dumps({"kind": p.name, **evaluated_record(dialogue)}) + "\n")


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


# ---------------------------------------------------------------------------------------------------------------------
# Figure


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


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; ValueError if anything is amiss."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = exits.refuse
    parser.add_argument("subjects", nargs="+", metavar="NAME=SUBJECT", help="folder, hub id or URL#MODEL; see above")
    parser.add_argument(
        "--method",
        nargs="+",
        choices=METHODS,
        default=[RLPA],
        help="rlpa: profile and response, as trained; the others are prompts without a profile. Each subject plays by"
        " each. A checkpoint trained in the embedded world cannot follow prompts: use them with real chat models",
    )
    scenarios = "; ".join(f"{name}: {what}" for name, what in SCENARIOS.items())
    parser.add_argument("--scenario", choices=SCENARIOS, default="vanilla", help=scenarios)
    parser.add_argument(
        "--world",
        choices=("first", "second"),
        default="first",
        help="embedded user and rule judge. first: those of training; second: ones that no training meets, with other"
        " phrases, a chatty and impatient temper, late and evasive answers, and stricter rules: does what was learned"
        " transfer? (second_world.py)",
    )
    parser.add_argument(
        "--perplexity",
        type=Path,
        metavar="FILE",
        help="text to report each checkpoint's perplexity on, to see what training has cost: JSONL of"
        ' {"messages": [...]} or {"text": ...}, or plain text; of the tiny world tiny/sft_heldout.jsonl',
    )
    parser.add_argument("--personas", default="", help="JSONL file; without one: synthetic personas")
    parser.add_argument("--split", choices=("heldout", "unseen"), default="heldout", help="of the synthetic personas")
    parser.add_argument("--num-personas", type=int, default=0, help="the first so many [0: the whole file, or 100]")
    parser.add_argument("--turns", type=int, help="K, turns per dialogue [10; 70 with --scenario long]")
    parser.add_argument("--change-turn", type=int, default=6, help="first turn with changed preferences [6]")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the subjects; 0 is greedy [1]")
    parser.add_argument("--subject-key-env", default="", help="environment variable with the key of URL subjects")
    parser.add_argument("--out", type=Path, help="folder for the results [runs/evaluate_DATE-TIME]")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    comments = field_comments(Config)
    defaults = {f.name: f.default for f in fields(Config)}
    for name in PASSED:  # None: not given, so that a checkpoint's own setting holds
        text = f"{comments[name]} [{defaults[name]}]".replace("%", "%%")
        parser.add_argument(train_rlpa.flag(name), type=type(defaults[name]), help=text)
    args = parser.parse_intermixed_args(argv)  # subjects may stand between flags
    args.seed = args.seed or 0
    args.turns = args.turns if args.turns is not None else 70 if args.scenario == "long" else 10
    args.out = args.out or Path(f"runs/evaluate_{time.strftime('%Y-%m-%d_%H-%M-%S')}")
    check_args(args)
    return args


def check_args(args: argparse.Namespace) -> None:
    """Raise ValueError for values that argparse lets through."""
    for name, least, most in (("turns", 1, 10_000), ("num_personas", 0, 100_000), ("temperature", 0, math.inf)):
        if not getattr(args, name) >= least:
            raise ValueError(f"{train_rlpa.flag(name)} {getattr(args, name)} must be at least {least}")
        if getattr(args, name) > most:
            raise ValueError(f"{train_rlpa.flag(name)} {getattr(args, name)} must be at most {most}")
    if args.scenario == "conflict" and args.change_turn < 2:
        raise ValueError(f"--change-turn {args.change_turn} must be at least 2: recovery is to the turn before")
    if args.scenario == "conflict" and args.change_turn > args.turns:
        raise ValueError(
            f"--scenario conflict changes the persona at turn {args.change_turn} of {args.turns}; give --turns"
            f" {args.change_turn} or more, or a --change-turn from 2 to {args.turns}"
            if args.turns > 1
            else f"--scenario conflict changes the persona at turn {args.change_turn} of 1; give --turns 2 or more"
        )
    exits.check_prices(args.price_in, args.price_out)
    names = [name for name, _ in map(split_subject, args.subjects)]
    if repeated := [name for name, n in Counter(names).items() if n > 1]:
        raise ValueError(f"subject name {repeated[0]!r} is used more than once")
    if taken := next((name for name in OWN_FILES if (args.out / name).exists()), None):
        raise ValueError(f"--out {args.out} holds {taken} of an earlier run already; choose another folder")


def split_subject(text: str) -> tuple[str, str]:
    """Split NAME=SUBJECT; ValueError if it is not of that form, or a URL names no model."""
    name, _, target = text.partition("=")
    if not name or not target:
        raise ValueError(f"subject {text!r} is not of the form NAME=FOLDER, NAME=HUB_ID or NAME=URL#MODEL")
    if name != clean_text(name):  # it stands in tables, figures and files
        raise ValueError(f"subject name {name!r} holds line breaks, control characters or spaces at its ends")
    if is_url(target) and not target.partition("#")[2]:
        raise ValueError(f"subject {text!r} names no model; write {text}#MODEL")
    return name, target


def evaluate(args: argparse.Namespace) -> list[Played]:
    """Play all subjects by all methods, then print and write what came of it."""
    own_user = not args.simulator_url
    personas = choose_personas(args.personas, args.split, args.num_personas, args.scenario, own_user, args.seed)
    targets = {name: find_target(name, target) for name, target in map(split_subject, args.subjects)}
    configs = {name: subject_config(target, args) for name, target in targets.items()}
    texts = read_texts(args.perplexity) if args.perplexity else []
    played = []
    with ExitStack() as stack:  # whatever can be wrong with a flag is found before anything is played
        common = next(iter(configs.values()))  # how the user's and the judge's endpoints are asked
        tape = stack.enter_context(train_rlpa.open_tape(common))
        players: dict[str, ChatClient | Path] = {
            name: open_client(name, target, args, tape) if isinstance(target, str) else target
            for name, target in targets.items()
        }
        for client in (player for player in players.values() if isinstance(player, ChatClient)):
            stack.enter_context(closing(client))
        env = stack.enter_context(train_rlpa.open_world(common, tape))
        perplexities = {n: perplexities_of(p, configs[n], texts, args.seed) for n, p in players.items()}
        make_out(args.out)
        if args.world == "second":
            env.rule_verdicts = second_world.rule_verdicts
        for name, player in players.items():
            for method in args.method:
                row = name if len(args.method) == 1 else f"{name}/{method}"
                played.append(play(row, player, configs[name], method, personas, args, env, perplexities[name]))
    first = played[0]
    compared = {f"{p.name} - {first.name}": difference(p, first, args.seed) for p in played[1:]}
    write_results(args.out, args, played, compared)
    draw(args.out / "curves.png", played, args)
    report(played, compared, args)  # last: a reader that goes away (… | head) costs no result
    return played


def make_out(folder: Path) -> None:
    """Make the folder of the results; ValueError if that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {folder} cannot be made a folder: {error.strerror}") from None


def report(played: list[Played], compared: dict[str, Summary], args: argparse.Namespace) -> None:
    """Print the tables, and what went wrong."""
    size = f"{len(played[0].dialogues)} personas x {args.turns} turns"
    print(f"\n{args.scenario}, {args.world} world: {size}; value [{LEVEL:.0f} % interval]\n")
    print(figures_table([p.name for p in played], [p.summary for p in played]), end="\n\n")
    print(turns_table(played, args.turns), end="\n\n")
    if compared:
        print("Differences on the same personas:\n")
        print(figures_table(list(compared), list(compared.values())), end="\n\n")
    for p in played:
        notes = "; ".join(f"{name}: {n}" for name, n in p.counts.items())
        print(f"{p.name}: {p.seconds:.1f} s" + (f"; {notes}" if notes else ""))
        print(f"{p.name}: {p.calls_note}")
    print(f"results: {args.out}")


def run(argv: Sequence[str] | None) -> int:
    """Evaluate as the command line says; 75 if an outage left no dialogue of a subject, ValueError if an error did."""
    played = evaluate(parse_args(argv))
    if lost := [p for p in played if not p.summary.personas]:
        causes = "; ".join(f"{p.name}: {', '.join(p.counts)}" for p in lost)
        if "outage)" not in causes:
            raise ValueError(f"no dialogue was left of {causes}; check the endpoints' URLs, models and keys")
        again = "evaluate again, with another --out, when they answer; what --record has kept is not asked again"
        print(f"evaluate.py: no dialogue was left of {causes}; {again}", file=sys.stderr)
        return os.EX_TEMPFAIL
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code (command_line/exits.py)."""
    return exits.run("evaluate.py", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
