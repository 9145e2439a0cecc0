"""What a run says and shows: its settings at the start, a line per iteration and evaluation, transcripts at the end."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import torch

from command_line.exits import decorative
from config import RUN_FORMAT, Config, has_own_trunk
from dialogue import Dialogue
from endpoints.calls import ENDPOINTS, calls_note
from endpoints.wire import shown_url
from learners.processes import gather, world_size
from records import checkpoints
from records.log import FINISHED, RunLog, episode_record, show_transcripts
from records.metrics import sum_counters
from records.state import State
from rewards import REWARD_PARTS
from simulator import is_live, is_planned
from untrusted.plain_text import clean_text, say


def lost_note(m: dict[str, float]) -> str:
    """Say how many dialogues were dropped and who failed; nothing if none was."""
    if not m["dialogues_dropped"]:
        return ""
    who = ", ".join(f"{name.removeprefix('dropped_')} {n:.0f}" for name, n in m.items() if name.startswith("dropped_"))
    advice = "; nothing left, check --simulator-url and --judge-url" if m["dialogues_dropped"] == m["dialogues"] else ""
    return f" | dropped {m['dialogues_dropped']:.0f} of {m['dialogues']:.0f} dialogues ({who}{advice})"


def progress_line(state: State, m: dict[str, float]) -> str:
    """Write an iteration in one readable line."""
    split = " ".join(
        f"{k} {m.get(f'seconds_{k}', 0):.1f}" for k in ("sampling", "waiting", "rewards", "statistics", "update")
    )
    parts = " ".join(f"{name} {m[f'{name}_reward']:.3f}" for name in REWARD_PARTS)
    kept, prefilled = m.get("tokens_kept", 0), m.get("tokens_prefilled", 0)  # absent: none
    reused = kept / max(1, kept + prefilled)
    mfu = f" mfu {m['mfu']:.2f}" if "mfu" in m else ""
    kl = f" kl {m['kl_ref']:.3f}" if "kl_ref" in m else ""
    ev = f" ev {m['explained_variance']:.2f}" if "explained_variance" in m else ""
    return (
        f"{state.iteration:4d}/{state.num_iterations} reward {m['reward']:.3f} ({parts})"
        f" recall {m['recall']:.2f} f1/max {m['f1_over_max']:.2f} unsupported {m['unsupported_lines']:.2f}"
        f" valid {m['format_valid']:.2f} |{kl}"
        f" clip {m.get('clip_frac', 0):.3f}{ev} | {m['seconds']:.1f}s ({split})"
        f" {m['sampled_tokens_per_second']:.0f} tok/s, saved by tree"
        f" x{m['tree_saving']:.1f}, KV {reused:.0%}{mfu}{lost_note(m)}"
    ).replace(" nan", " -")  # nothing to measure: no fact was disclosed


def evaluation_line(name: str, m: dict[str, float]) -> str:
    """Write an evaluation in one readable line."""
    return (
        f"     {name:16s} recall {m['recall']:.3f} f1/max {m['f1_over_max']:.3f}"
        f" unsupported {m['unsupported_lines']:.2f} response {m['response_reward']:.3f}"
        f" valid {m['format_valid']:.3f}{lost_note(m)}"
    ).replace(" nan", " -")


def start_log(state: State) -> RunLog:
    """Say what is about to run, write its settings, and open its records."""
    announce(state)
    kept = {"schedule_iterations": state.schedule_iterations}  # a larger --num-iterations shall not stretch it
    uninterrupted = replace(state.config, resume="", overwrite=False, **kept)
    settings = {"format": RUN_FORMAT} | settings_record(uninterrupted)
    (Path(state.config.run_dir) / FINISHED).unlink(missing_ok=True)
    checkpoints.write_text(Path(state.config.run_dir) / "config.json", json.dumps(settings, indent=1) + "\n")
    return RunLog(state.config.run_dir, state.logs, state.config.tensorboard)


def settings_record(config: Config) -> dict:
    """Return settings as files hold them: without the queries of addresses, which may hold a key."""
    return asdict(config) | {name: shown_url(getattr(config, name)) for name in ("simulator_url", "judge_url")}


def finish(
    state: State, log: RunLog, before: dict[str, list[Dialogue]], after: dict[str, list[Dialogue]]
) -> None:
    """Draw the curves of a finished run, and show what it has come to."""
    log.close()
    log.draw()
    show_transcripts(before, after)
    policy = f"; policy: {log.folder / 'checkpoints' / state.saved / 'policy'}" if state.saved else ""
    say(clean_text(f"run folder: {log.folder}; curve: {log.folder / 'curve.png'}{policy}"))
    with decorative("the sum of all calls"):  # older records of the run may be damaged
        records = map(json.loads, (log.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        calls = sum_counters([Counter({k: v for k, v in r.items() if k.startswith(ENDPOINTS)}) for r in records])
        say(f"calls of the run: {calls_note(calls, state.config)}")


def record_episodes(state: State, log: RunLog | None, played: dict[str, list[Dialogue]]) -> None:
    """Write dialogues of all ranks to episodes.jsonl."""
    for kind, dialogues in played.items():
        records = [record for part in gather([episode_record(d) for d in dialogues]) for record in part]
        if log:
            log.episodes(state.iteration, kind, records)


def announce(state: State) -> None:
    """Say what is about to run."""
    config, millions = state.config, sum(p.numel() for p in state.policy.model.parameters()) / 1e6
    critic = "and a critic of that size" if has_own_trunk(config) else "the critic is a head on them"
    critic = critic if state.critic else f"{config.advantage}: no critic"
    if config.lora_rank:
        trained = sum(m.numel() for x in (state.policy, state.critic) if x for m in x.masters.values()) / 1e6
        critic += f"; {trained:.2f} M are trained, in adapters of rank {config.lora_rank}"
    sets = ", ".join(f"{len(personas)} {name}" for name, personas in state.eval_sets.items())
    batch = f"{config.rollout_batch_size} dialogues x {config.max_turns} turns x {config.num_candidates} candidates"
    mode = "planned" if is_planned(config) else "plain"
    lines = (
        f"RLPA: policy {config.ckpt} ({millions:.2f} M parameters, {critic})",
        f"{world_size()} process(es), {torch.get_num_threads()} thread(s) each",
        f"{len(state.personas)} training personas, {sets}",
        f"user {shown_url(config.simulator_url) or 'embedded'} ({config.simulator_model}, {mode}),"
        f" judge {shown_url(config.judge_url) or 'by rule'}",
        f"{state.num_iterations} iterations x {batch} -> {config.run_dir}",
    )
    if (ends := state.schedule_iterations) < state.num_iterations:
        lowest = f"from iteration {ends + 1} on, learning rates stay at {config.min_lr_share:g} of their peaks"
        lines += (f"{lowest}; --schedule-iterations 0 stretches their fall over all {state.num_iterations}",)
    if is_live(config) and config.reply_steps < 0:
        lines += ("--reply-steps is 0: user or judge is a live endpoint, and replies are used as they come; so this run"
                  " does not repeat to the bit (with --reply-steps 16 it may)",)  # fmt: skip
    say("\n      ".join(map(clean_text, lines)))
