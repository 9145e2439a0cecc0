"""Evaluate by the ALOE protocol: held-out personas, a cold start with "Hello", K turns, a verdict on each.

    python -m evaluation tiny=tiny trained=runs/NAME/checkpoints/iteration_000024/policy
    python -m evaluation ours=CKPT gpt=https://api.openai.com/v1#gpt-4o --method self_critic --subject-key-env MY_KEY

A subject is NAME=FOLDER, NAME=HUB_ID or NAME=URL#MODEL (any OpenAI-compatible endpoint). All meet the same users, so
that each is compared with the first one persona by persona. Written to --out: results.json, results.csv, curves.png and
episodes.jsonl (whole dialogues). docs/evaluation.md explains the figures.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import numpy as np

from command_line import exits
from command_line.flags import add_flags, checkpoint_defaults, new_folder
from config import Config, flag
from dialogue import Dialogue
from endpoints.calls import calls_note, cost
from endpoints.client import ChatClient
from endpoints.tape import Tape
from evaluation import subjects
from evaluation.drawing import draw
from evaluation.figures import (
    RESAMPLES,
    Array,
    Estimate,
    Summary,
    compare,
    estimate,
    perplexity_samples,
    summarize,
)
from evaluation.results import Played, report, write_results
from evaluation.scenarios import SCENARIOS, choose_personas, make_dialogues
from evaluation.subjects import METHODS, RLPA
from learners.folder import resolve_checkpoint
from records.metrics import DISTINCT, GUARDS, PROFILE_GUARDS, guards, rates, tally
from records.outages import check_refusals
from records.perplexity import Text, read_texts, text_scores
from rewards import VERDICTS
from simulator import Environment, open_environment
from train_rlpa import Play
from untrusted.plain_text import clean_text, say
from worlds import second
from worlds.personas import Persona

PASSED = (  # flags that go to the rollout as they are; their help stands in config.py
    "simulator_url", "simulator_model", "user_mode", "judge_url", "judge_model", "profile_judge", "api_key_env",
    "request_timeout", "max_retries", "max_concurrency", "requests_per_minute", "tokens_per_minute", "outage_budget",
    "max_new_tokens", "history_profile", "decode_batch_size", "kv_gib", "reply_steps", "record", "replay", "price_in",
    "price_out", "dtype", "kernels", "threads", "seed",
)  # fmt: skip
OWN_FILES = ("results.json", "results.csv", "episodes.jsonl", "curves.png", "metrics.jsonl")  # not written over

# ---------------------------------------------------------------------------------------------------------------------
# Playing and measuring


def subject_config(target: str | Path, args: argparse.Namespace) -> Config:
    """Return how a URL or a checkpoint's folder plays: the trainer's defaults < the folder's `rlpa.json` < flags."""
    given = {name: value for name in PASSED if (value := getattr(args, name)) is not None}
    own = checkpoint_defaults(target) if isinstance(target, Path) else {}
    fixed = {"max_turns": args.turns, "profile_target": "persona"}
    if args.world == "second":
        fixed["simulator_model"] = "rule-user-2"
    config = Config(**{**own, **given, **fixed})
    if args.world == "second" and (config.simulator_url or config.judge_url):
        raise ValueError("--world second has a user and a judge of its own; drop --simulator-url and --judge-url")
    return config


def is_url(target: str) -> bool:
    """Tell an endpoint from a checkpoint."""
    return target.lower().startswith(("http://", "https://"))


def play(
    name: str,
    player: ChatClient | Path,
    config: Config,
    method: str,
    personas: list[Persona],
    args: argparse.Namespace,
    env: Environment,
    perplexities: Array,
) -> Played:
    """Play all personas with one endpoint or checkpoint and measure it."""
    start = time.perf_counter()
    dialogues = make_dialogues(personas, args.change_turn if args.scenario == "conflict" else None)
    how = Play(1, args.temperature, (args.seed, "evaluate"))
    env.counts.clear()
    env.subject = player if isinstance(player, ChatClient) else None
    calls_before = env.calls()
    with subjects.progress(dialogues, args.turns, name, show=not args.quiet):
        by = subjects.play_checkpoint if isinstance(player, Path) else subjects.play_endpoint
        by(player, method, dialogues, how, config, env)
    check_refusals(env)
    measured = measure(dialogues, args.turns, method == RLPA)
    summary = summarize(measured, args.seed, args.change_turn if args.scenario == "conflict" else None)
    summary = replace(summary, figures=summary.figures | corpus_figures(dialogues, perplexities))
    calls = env.calls() - calls_before
    note = calls_note(calls, config)
    calls = {**calls, **cost(calls, config)}
    counts = counts_of(dialogues, args.turns)
    counts |= {what: n for what, n in env.counts.items() if what.startswith("user_messages_")}  # docs/metrics.md
    env.warn_of_rules(env.counts)
    seconds = time.perf_counter() - start
    clients = filter(None, (env.user, env.judge, env.subject))
    whose = {"simulator": "simulator: ", "judge": "judge: "}
    complaint = "; ".join(whose.get(client.name, "") + client.complaint for client in clients if client.complaint)
    return Played(name, dialogues, measured, summary, seconds, counts, calls, note, complaint, perplexities)


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
            values = {"AL": 100 * reply.parts["response"], "max_f1": reply.ledger["max_f1"], **reply.verdicts}
            before = [earlier.winner.response for earlier in dialogue.turns[:t]]
            values |= {"tokens": subjects.tokens_of(reply), **guards(reply, before, turn.user_text)}
            if not writes_profile:
                values |= dict.fromkeys(PROFILE_GUARDS, math.nan)
            else:
                values |= {"f1": reply.parts["profile"], "evidence_f1": reply.ledger["evidence_f1"]}
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
# Command line


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; ValueError if anything is amiss."""
    parser = exits.Parser("python -m evaluation", __doc__)
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
        " transfer? (worlds/second.py)",
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
    add_flags(parser, Config, PASSED)
    args = parser.parse_intermixed_args(argv)  # subjects may stand between flags
    for name in PASSED:  # None: not given, so that a checkpoint's own setting holds
        setattr(args, name, getattr(args, name, None))
    args.seed = args.seed or 0
    args.turns = args.turns if args.turns is not None else 70 if args.scenario == "long" else 10
    args.out = args.out or Path(new_folder("evaluate_"))
    check_args(args)
    return args


def check_args(args: argparse.Namespace) -> None:
    """Raise ValueError for values that argparse lets through."""
    for name, least, most in (("turns", 1, 10_000), ("num_personas", 0, 100_000), ("temperature", 0, math.inf)):
        if not getattr(args, name) >= least:
            raise ValueError(f"{flag(name)} {getattr(args, name)} must be at least {least}")
        if getattr(args, name) > most:
            raise ValueError(f"{flag(name)} {getattr(args, name)} must be at most {most}")
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
    if taken := next((name for name in OWN_FILES if os.path.lexists(args.out / name)), None):
        raise ValueError(f"--out {args.out} holds {taken} already; choose another folder")


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
        env = stack.enter_context(open_environment(common))
        players: dict[str, ChatClient | Path] = {
            name: open_client(name, target, args, env.tape) if isinstance(target, str) else target
            for name, target in targets.items()
        }
        for client in (player for player in players.values() if isinstance(player, ChatClient)):
            stack.enter_context(closing(client))
        perplexities = {n: perplexities_of(p, configs[n], texts, args.seed) for n, p in players.items()}
        make_out(args.out)
        if args.world == "second":
            env.rule_verdicts = second.rule_verdicts
        for name, player in players.items():
            for method in args.method:
                row = name if len(args.method) == 1 else f"{name}/{method}"
                played.append(play(row, player, configs[name], method, personas, args, env, perplexities[name]))
    first = played[0]
    compared = {f"{p.name} - {first.name}": difference(p, first, args.seed) for p in played[1:]}
    write_results(args.out, args, played, compared)
    with exits.decorative(str(args.out / "curves.png")):
        draw(args.out / "curves.png", played, args)
    report(played, compared, args)  # last: a reader that goes away (… | head) costs no result
    return played


def make_out(folder: Path) -> None:
    """Make the folder of the results; ValueError if that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {folder} cannot be made a folder: {error.strerror}") from None


def run(argv: Sequence[str] | None) -> int:
    """Evaluate as the command line says; 75 if an outage left no dialogue of a subject, ValueError if an error did."""
    played = evaluate(parse_args(argv))
    if lost := [p for p in played if not p.summary.personas]:
        failed = "all dialogues failed"
        causes = "; ".join(f"subject {p.name}: {failed}, {', '.join(p.counts)}; {p.complaint}" for p in lost)
        if not any("outage)" in cause for p in lost for cause in p.counts):
            raise ValueError(causes)
        again = "evaluate again, with another --out, when they answer; what --record has kept is not asked again"
        say(f"evaluation: {clean_text(f'{causes}; {again}')}", sys.stderr)
        return os.EX_TEMPFAIL
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code (command_line/exits.py)."""
    return exits.run("evaluation", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
