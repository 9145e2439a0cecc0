"""SFT and DPO on dialogues with the simulated user: what RLPA's data is worth when it is collected once, beforehand.

    python -m studies.offline --method sft --ckpt                      collects, then fine-tunes the tiny checkpoint
    python -m studies.offline --method dpo --ckpt --data runs/NAME     learns from the same dialogues
    python -m studies.offline --method warmup --ckpt FOLDER            teaches a chat model the form, before RLPA

collect   The starting policy plays what a run of `train_rlpa.py` of so many --num-iterations plays: the same personas
          in the same order, turns, candidates, rewards, and the best candidate goes on. The budget is printed and kept.
sft       Best-of-n fine-tuning (RAFT, arXiv 2304.06767): cross-entropy on the tokens of each turn's best candidate.
          With --min-reward only on those that earned as much, which is rejection sampling.
dpo       arXiv 2305.18290: of each turn whose candidates earned differently, best and worst are a pair w, l with the
          same prefix. Loss −log σ(β (log π(w)/π_ref(w) − log π(l)/π_ref(l))), π_ref the starting policy.
warmup    Cross-entropy on scripted dialogues of the embedded world (tiny/scripts.py), of which so many are attentive. A
          model that writes no profile earns nothing, and RL has nothing to choose from.

All learn from the trainer's token trees, so that each prefix is computed once for all turns and both of a pair, and
their sums are divided by the count of a mini-batch, tokens or pairs. Written to --run-dir: dialogues.jsonl (token ids
too), collection.json (settings and budget), metrics.jsonl, and policy/, a checkpoint in Hugging Face layout.
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from tqdm import tqdm

import train_rlpa
from command_line import exits
from command_line.flags import check_settings, checkpoint_defaults, make_parser, new_folder
from config import Amount, Config, Count, Natural, flag
from dialogue import Candidate, Dialogue, Turn, open_turn, stream_seed
from endpoints.calls import calls_note
from kernels import linear_logprob
from learners.folder import resolve_checkpoint
from learners.learner import Learner
from learners.loading import choose_dtype
from learners.weights import save_pretrained
from model import Qwen2Config, Qwen2ForCausalLM
from packing import Batch, Packed, collate, microbatches, pack, policy_hidden
from records.checkpoints import write_text
from records.log import RunLog, claim_folder
from records.outages import Unavailable
from records.progress import settings_record
from records.state import State, save_texts, setup, writing
from rewards import REWARD_PARTS, read_candidate
from simulator import Environment, open_environment
from tiny.scripts import ATTENTIVE, FORGETFUL, scripted_dialogue
from train_rlpa import Play, lr_share, optimizer_step
from untrusted.files import from_json, parse_json, read_json, read_lines
from untrusted.plain_text import clean_text, say, shorten

METHODS = ("sft", "dpo", "warmup")
LR_FACTORS = {"sft": 3.0, "dpo": 1 / 3}  # learning rate ÷ the checkpoint's own, which is PPO's: good for the tiny one
WARMUP_LR = 1e-4
ATTENTIVE_SHARE = 0.3  # of a warm-up's dialogues; the others are forgetful, so that RL has something to teach
WEIGHTS = [f"{name}_weight" for name in REWARD_PARTS]
COLLECTED = (  # settings that decide what the dialogues are and earn; with --data they are those of its collection
    "ckpt", "personas", "num_personas", "num_iterations", "rollout_batch_size", "max_turns", "num_candidates",
    "max_new_tokens", "max_user_tokens", "temperature", "first_user_message", "history_profile", "profile_target",
    "profile_judge", *WEIGHTS,
)  # fmt: skip
ENDPOINTS = (
    "simulator_url", "simulator_model", "user_mode", "judge_url", "judge_model", "api_key_env", "request_timeout",
    "max_retries", "max_concurrency", "requests_per_minute", "tokens_per_minute", "outage_budget", "record", "replay",
    "price_in", "price_out", "reply_steps", "decode_batch_size", "kv_gib",
)  # fmt: skip
LEARNING = (
    "method", "data", "run_dir", "seed", "num_epochs", "minibatch_size", "microbatch_tokens", "lr", "warmup_share",
    "min_lr_share", "max_grad_norm", "min_reward", "beta", "eval_personas", "eval_dialogues", "eval_every", "dtype",
    "checkpointing", "kernels", "threads",
)  # fmt: skip


@dataclass
class Offline(Config):
    """The trainer's settings, of which those named above are flags here, and what offline learning adds."""

    method: str = ""  # sft: cross-entropy on each turn's best candidate; dpo: its best against its worst; warmup
    data: str = ""  # run folder of this program whose dialogues are learned from again; empty: they are collected
    num_epochs: Count = 2  # passes over the dialogues
    lr: Amount = 5e-7  # peak; not given: 3 times the checkpoint's with sft, a third with dpo, 1e-4 with warmup
    min_reward: float = 0.0  # sft: a turn's best candidate is learned from if it earned so much
    beta: float = 0.5  # dpo: weight of log-ratios; with 0.1 the tiny checkpoint unlearned the format
    eval_every: Natural = 1  # epochs between held-out evaluations; 0: only before and after
    advantage: Literal["rloo"] = "rloo"  # so that the trainer's setup loads no critic
    kl_coef: Amount = 0.0  # nor a reference: its log-probs are computed before the first step

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"--method is {self.method!r}; it takes {' or '.join(METHODS)}")
        if self.num_candidates == 1:
            raise ValueError("--num-candidates 1 leaves nothing to choose from; offline learning needs 2 or more")
        super().__post_init__()
        if self.data and self.method == "warmup":
            raise ValueError(f"--data {self.data} needs --method sft or dpo: a warm-up writes its own dialogues")
        if self.min_reward and self.method != "sft":
            raise ValueError(f"--min-reward {self.min_reward} needs --method sft: dpo learns from differences")
        if self.beta != Offline.beta and self.method != "dpo":
            raise ValueError(f"--beta {self.beta} needs --method dpo")
        if self.beta <= 0:
            raise ValueError(f"--beta is {self.beta}; it must be above 0")
        most = sum(getattr(self, name) for name in WEIGHTS)
        if self.min_reward > most:
            weights = " + ".join(map(flag, WEIGHTS))
            raise ValueError(f"--min-reward is {self.min_reward}; a turn earns at most {weights}, {most}")


def parse_args(argv: Sequence[str] | None = None) -> Offline:
    """Read flags: defaults < the checkpoint's `rlpa.json` < settings of --data < flags. ValueError if one is bad."""
    parser = make_parser(Offline, __doc__, COLLECTED + ENDPOINTS + LEARNING)
    parser.prog = "python -m studies.offline"
    given = vars(parser.parse_args(argv))
    exits.check_prices(given.get("price_in"), given.get("price_out"))
    for name in ("personas", "eval_personas", "data"):
        if given.get(name):
            given[name] = str(Path(given[name]).resolve())
    if given.get("ckpt"):
        given["ckpt"] = str(resolve_checkpoint(given["ckpt"]).resolve())
    saved = read_collection(Path(given["data"]))["settings"] if given.get("data") else {}
    for name in given.keys() & set(COLLECTED) if saved else ():
        if (before := saved.get(name, getattr(Config, name))) != given[name]:  # absent: the setting is newer
            raise ValueError(
                f"{flag(name)} {given[name]} differs from {before}, with which --data {given['data']} was"
                f" collected; drop it, or collect anew"
            )
    chosen = {**saved, **given}
    if not chosen.get("ckpt"):
        raise ValueError("no checkpoint; give --ckpt FOLDER_OR_HUB_ID, or --ckpt without a value for the tiny one")
    own = {"lr": Config.lr} | checkpoint_defaults(Path(chosen["ckpt"]))
    own = {name: own[name] for name in (*COLLECTED, "minibatch_size", "eval_dialogues", "lr") if name in own}
    method = chosen.get("method")
    own["lr"] = WARMUP_LR if method == "warmup" else own["lr"] * LR_FACTORS.get(method, 1.0)
    config = Offline(**{**own, **chosen})
    config.run_dir = config.run_dir or new_folder(f"{config.method}_")
    if (Path(config.run_dir) / "metrics.jsonl").exists():
        raise ValueError(f"--run-dir {config.run_dir} holds a run already; choose another folder")
    return config


# ---------------------------------------------------------------------------------------------------------------------
# The collection


def collect(state: State, folder: Path) -> tuple[list[Dialogue], dict[str, float]]:
    """Play RLPA's dialogues with the starting policy; returns them and what they cost, and writes both down."""
    config, env, collected = state.config, state.env, []
    start, calls_before = time.perf_counter(), env.calls()
    path = folder / "dialogues.jsonl"
    with exits.writing(path), path.open("w", encoding="utf-8") as file:
        for i in tqdm(range(state.num_iterations), desc="collecting", unit="it"):
            dialogues = scripted_batch(state, i) if config.method == "warmup" else played_batch(state, i)
            file.writelines(json.dumps(asdict(dialogue)) + "\n" for dialogue in dialogues)
            collected += dialogues
    budget = budget_of(collected) | (env.calls() - calls_before)
    budget["seconds"] = round(time.perf_counter() - start, 1)
    collection = {"settings": {name: getattr(config, name) for name in COLLECTED}, "budget": budget}
    # Last of all: where it stands, the dialogues are whole.
    write_text(folder / "collection.json", json.dumps(collection, indent=1) + "\n")
    return collected, budget


def played_batch(state: State, i: int) -> list[Dialogue]:
    """Play the dialogues of RLPA's iteration i."""
    config, batch = state.config, partial(train_rlpa.persona_batch, replace(state, iteration=i))
    play = Play(config.num_candidates, config.temperature, (config.seed, "train", i))
    return train_rlpa.play_batch(state.policy.model, state.chat, batch, play, config, state.env)


def scripted_batch(state: State, i: int) -> list[Dialogue]:
    """Write as many dialogues as an iteration plays: each turn has one candidate, what the script says."""
    config, chat, dialogues = state.config, state.chat, []
    for index in range(i * config.rollout_batch_size, (i + 1) * config.rollout_batch_size):
        rng = random.Random(stream_seed(config.seed, "scripted", index))
        habits = ATTENTIVE if rng.random() < ATTENTIVE_SHARE else FORGETFUL
        dialogue = Dialogue(index, f"scripted-{index}", ())
        for said, text in scripted_dialogue(rng, config.max_turns, habits):
            turn, ids = open_turn(dialogue, said, chat, config.history_profile), [*chat.encode(text), chat.im_end]
            turn.candidates = [read_candidate(ids, [0.0] * len(ids), "stop", dialogue, chat)]
        dialogues.append(dialogue)
    return dialogues


def budget_of(dialogues: list[Dialogue]) -> dict[str, float]:
    """Count what was sampled, dropped dialogues included."""
    turns = [turn for dialogue in dialogues for turn in dialogue.turns]
    candidates = [candidate for turn in turns for candidate in turn.candidates]
    return {
        "dialogues": len(dialogues),
        "dialogues_dropped": sum(dialogue.dropped is not None for dialogue in dialogues),
        "turns": len(turns),
        "candidates": len(candidates),
        "sampled_tokens": sum(len(candidate.token_ids) for candidate in candidates),
    }


def read_collection(folder: Path) -> dict:
    """Return settings and budget of a collection; ValueError if the folder holds none, or one that is not whole."""
    path = folder / "collection.json"
    if not path.is_file():
        raise ValueError(f"--data {folder}: {path.name} does not exist; give the run folder that collected dialogues")
    collection = read_json(path, {"settings": dict, "budget": dict[str, float]})
    if foreign := sorted(set(collection["settings"]) - set(COLLECTED)):
        raise ValueError(f"{path} sets {shorten(foreign[0], 40)!r}; a collection may only set {', '.join(COLLECTED)}")
    if lacking := sorted({*budget_of([]), "seconds"} - set(collection["budget"])):
        raise ValueError(f"{path}, 'budget' lacks {lacking[0]!r}")
    check_settings(collection["settings"], path)
    return collection


def load_dialogues(folder: str) -> list[Dialogue]:
    """Read the dialogues of a collection; ValueError that names the line if one is not whole."""
    dialogues, path = [], Path(folder) / "dialogues.jsonl"
    for number, line in enumerate(read_lines(path), 1):
        where = f"--data {folder}: line {number} of {path.name}"
        dialogues.append(from_json(parse_json(line, where), Dialogue, where))
        for turn in dialogues[-1].turns:
            check_turn(turn, where)
    return dialogues


def check_turn(turn: Turn, where: str) -> None:
    """Raise ValueError unless a turn can be learned from: a prompt, a chosen candidate, a log-prob of each token."""
    if turn.candidates and not (turn.prompt_ids and turn.chosen in range(len(turn.candidates))):
        raise ValueError(f"{where}: a turn has no prompt, or its chosen candidate {turn.chosen} is not there")
    for candidate in turn.candidates:
        if not candidate.token_ids or len(candidate.token_ids) != len(candidate.logprobs):
            raise ValueError(f"{where}: a candidate has {len(candidate.token_ids)} tokens, and"
                             f" {len(candidate.logprobs)} log-probs")  # fmt: skip


def check_tokens(dialogues: list[Dialogue], config: Offline, model: Qwen2Config) -> None:
    """Raise ValueError unless the model knows all tokens of dialogues, and has positions for them."""
    for turn in (turn for dialogue in dialogues for turn in dialogue.turns):
        for candidate in turn.candidates:
            ids = turn.prompt_ids + candidate.token_ids
            if min(ids) < 0 or max(ids) >= model.vocab_size or len(ids) > model.max_position_embeddings:
                raise ValueError(
                    f"--data {config.data}: a turn of {len(ids)} tokens, with ids from {min(ids)} to {max(ids)}, is not"
                    f" of --ckpt {config.ckpt} ({model.vocab_size} ids, {model.max_position_embeddings} positions)"
                )


# ---------------------------------------------------------------------------------------------------------------------
# What is learned from it


def teachers(turn: Turn, config: Offline) -> list[Candidate]:
    """Return a turn's candidates to learn from: [best] or, with dpo, [best, worst]; none if they teach nothing."""
    rewards = [c.reward if c.judged else math.inf for c in turn.candidates]
    best, worst = rewards[turn.chosen], min(rewards)
    if config.method != "dpo":
        return [turn.winner] if best >= config.min_reward else []
    return [turn.winner, turn.candidates[rewards.index(worst)]] if worst < best else []


def pack_teachers(dialogue: Dialogue, config: Offline) -> Packed | None:
    """Return the token tree of a dialogue and its teachers; None if it was dropped or has none.

    The winners are the tree's trunk: with sft a dialogue is one row, with dpo the losers branch off.
    """
    if dialogue.dropped is not None:
        return None
    turns = [replace(turn, candidates=teachers(turn, config), chosen=0) for turn in dialogue.turns]
    return pack(replace(dialogue, turns=turns), config)


def epoch_batches(packed: list[Packed], config: Offline, epoch: int) -> list[list[Batch]]:
    """Return the micro-batches of each mini-batch of an epoch, whose order is its own."""
    generator = torch.Generator().manual_seed(stream_seed(config.seed, "offline", epoch))
    order = torch.randperm(len(packed), generator=generator).tolist()
    shuffled, size = [packed[i] for i in order], config.minibatch_size
    minibatches = [shuffled[first : first + size] for first in range(0, len(shuffled), size)]
    return [[collate(part) for part in microbatches(m, config.microbatch_tokens)] for m in minibatches]


def action_logprobs(policy: Qwen2ForCausalLM, batch: Batch, config: Offline) -> Tensor:
    """Return the log-probs (N,) of a micro-batch's action tokens, at the temperature that sampled them."""
    return linear_logprob(policy_hidden(policy, batch), policy.head_weight, batch.targets, config.temperature)[0]


@torch.no_grad()
def add_reference(packed: list[Packed], policy: Qwen2ForCausalLM, config: Offline) -> None:
    """Fill in the log-probs of the policy as it is now: the reference, whose weights nobody needs any more."""
    for part in microbatches(packed, config.microbatch_tokens):
        logprobs = action_logprobs(policy, collate(part).to(policy.head_weight), config).cpu()
        for p, own in zip(part, logprobs.split([len(p.targets) for p in part]), strict=True):
            p.ref_logprobs = own


# ---------------------------------------------------------------------------------------------------------------------
# Losses and epochs: sums, for the caller divides by the mini-batch's count


def sft_sums(logprobs: Tensor) -> dict[str, Tensor | int]:
    """Return the summed cross-entropy of action tokens and their count."""
    return {"loss": -logprobs.sum(), "count": len(logprobs)}


def dpo_sums(logprobs: Tensor, batch: Batch, config: Offline) -> dict[str, Tensor | int]:
    """Return the summed DPO loss of a micro-batch's pairs, their count, and sums of what a curve shows of them."""
    sizes = [span.stop - span.start for p in batch.dialogues for span in p.spans]
    logratios = (logprobs - batch.column("ref_logprobs")).split(sizes)
    winner, loser = torch.stack([part.sum() for part in logratios]).view(-1, 2).unbind(1)  # (P,) each
    margin = config.beta * (winner - loser)
    return {
        "loss": -logsigmoid(margin).sum(),
        "count": len(margin),
        "margin": margin.sum(),
        "accuracy": (margin > 0).sum(),
        "winner_logratio": winner.sum(),
        "loser_logratio": loser.sum(),
    }


def units(batch: Batch, config: Offline) -> int:
    """Count what a micro-batch's loss is a sum over: action tokens, or pairs."""
    return len(batch.targets) if config.method != "dpo" else sum(len(p.spans) for p in batch.dialogues) // 2


def minibatch_step(learner: Learner, minibatch: list[Batch], config: Offline, share: float) -> dict[str, float]:
    """Take one optimizer step on the mean loss of a mini-batch; returns its sums."""
    learner.optimizer.zero_grad()
    count, sums = sum(units(batch, config) for batch in minibatch), Counter()
    for batch in (batch.to(learner.model.head_weight) for batch in minibatch):
        logprobs = action_logprobs(learner.model, batch, config)
        parts = dpo_sums(logprobs, batch, config) if config.method == "dpo" else sft_sums(logprobs)
        (parts["loss"] / count).backward()
        sums.update({name: torch.as_tensor(value).item() for name, value in parts.items()})
    norm, taken = optimizer_step(learner, share, config.max_grad_norm)
    sums.update({"grad_norm": norm, "steps": 1, "updates_skipped": not taken})
    return sums


def run_epoch(state: State, packed: list[Packed], epoch: int) -> dict[str, float]:
    """Go through all dialogues once; returns means over tokens or pairs."""
    config, sums = state.config, Counter()
    batches, start = epoch_batches(packed, config, epoch), time.perf_counter()
    num_updates = config.num_epochs * len(batches)
    for minibatch in tqdm(batches, desc=f"epoch {epoch + 1}", unit="step", leave=False):
        sums.update(minibatch_step(state.policy, minibatch, config, lr_share(state.updates, num_updates, config)))
        state.updates += 1
    count, steps, skipped = (sums.pop(name) for name in ("count", "steps", "updates_skipped"))
    metrics = {"grad_norm": sums.pop("grad_norm") / steps} | {name: value / count for name, value in sums.items()}
    return metrics | {"updates_skipped": skipped, "steps": steps, "seconds": time.perf_counter() - start}


# ---------------------------------------------------------------------------------------------------------------------
# The run


def learn(config: Offline, env: Environment) -> None:
    """Collect or read dialogues, learn from them, evaluate, and write the policy."""
    dialogues = load_dialogues(config.data) if config.data else []
    state = setup(config, env)
    check_tokens(dialogues, config, state.policy.model.config)
    log = RunLog(config.run_dir, {}, tensorboard=False)
    write_text(log.folder / "config.json", json.dumps(settings_record(config), indent=1) + "\n")
    people = f", personas {config.personas}" if config.personas else ""  # files that --data may have named
    say(clean_text(f"{config.method}: policy {config.ckpt}{people} -> {config.run_dir}"))
    if config.data:
        budget = read_collection(Path(config.data))["budget"]
    else:
        dialogues, budget = collect(state, log.folder)
    log.metrics(0, "collection", budget)
    packed = [p for p in (pack_teachers(dialogue, config) for dialogue in dialogues) if p is not None]
    say(budget_line(budget, packed, config))
    if not packed:
        raise ValueError("no turn to learn from; lower --min-reward, or collect more (--num-iterations)")
    if config.method == "dpo":
        add_reference(packed, state.policy.model, config)
    train_rlpa.run_evaluation(state, log, ends=True)
    for epoch in range(config.num_epochs):
        metrics = run_epoch(state, packed, epoch)
        state.iteration = epoch + 1
        log.metrics(state.iteration, config.method, metrics)
        say(epoch_line(state, metrics))
        last = state.iteration == config.num_epochs
        if last or config.eval_every and state.iteration % config.eval_every == 0:
            train_rlpa.run_evaluation(state, log, ends=last)
    policy = log.folder / "policy"
    writing(policy, lambda: save_pretrained(state.policy.model, policy, weights=state.policy.masters))
    writing(policy, lambda: save_texts(state, policy))
    say(clean_text(f"policy: {policy}"))


def budget_line(budget: dict[str, float], packed: list[Packed], config: Offline) -> str:
    """Say what the dialogues cost and what is learned from them."""
    spans, tokens = sum(len(p.spans) for p in packed), sum(len(p.targets) for p in packed)
    taught = f"{spans // 2:,} pairs" if config.method == "dpo" else f"{spans:,} best candidates"
    return (
        f"{'collected' if not config.data else 'reused'} {budget['dialogues']:,} dialogues"
        f" ({budget['dialogues_dropped']} dropped), {budget['candidates']:,} candidates,"
        f" {budget['sampled_tokens']:,} sampled tokens, {budget['seconds']:.0f} s;"
        f" {calls_note(budget, config)}\nlearning from {taught}, {tokens:,} tokens"
    )


def epoch_line(state: State, m: dict[str, float]) -> str:
    """Write an epoch in one readable line."""
    dpo = f" accuracy {m['accuracy']:.3f} margin {m['margin']:.3f}" if "margin" in m else ""
    return (
        f"{state.iteration:4d}/{state.config.num_epochs} {state.config.method} loss {m['loss']:.4f}{dpo} | gradient"
        f" {m['grad_norm']:.2f}, {m['steps']:.0f} steps in {m['seconds']:.1f} s"
    )


def run(argv: Sequence[str] | None) -> int:
    """Learn as the command line says; returns the exit code."""
    if (processes := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise ValueError(f"WORLD_SIZE is {processes}; studies.offline runs in one process: start it with python -m")
    config = choose_dtype(parse_args(argv))
    try:
        with claim_folder(config.run_dir, resume=False, overwrite=False), open_environment(config) as env:
            learn(config, env)
    except Unavailable as error:
        exits.tell("studies.offline", str(error))
        return os.EX_TEMPFAIL
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code (command_line/exits.py, and 75: no answer of user or judge)."""
    return exits.run("studies.offline", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
