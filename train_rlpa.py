"""RLPA in one file: a chat model learns, by PPO against a simulated user, to infer who it is talking to.

    torchrun train_rlpa.py --ckpt                       the tiny checkpoint in the embedded world, on a CPU
    torchrun train_rlpa.py --ckpt Qwen/Qwen2.5-3B-Instruct --simulator-url URL --judge-url URL --personas FILE

Read it from top to bottom: each function stands below the one that calls it first.

    main → launch → train → run → run_iteration     one iteration:
      play_batch        the user speaks (HTTP), the policy answers n times, each answer is scored, the best one goes on
      pack              each dialogue becomes a tree of tokens, and each token is computed once (packing.py)
      add_statistics    log π_old, log π_ref and V, all computed before the first optimizer step
      add_advantages    rewards on tokens → GAE; or, without a critic, each candidate against the others of its turn
      update            clipped PPO loss for the policy, clipped value loss for the critic, divided by global counts
    run_evaluation                          held-out personas, sampled and greedily

What differs from textbook PPO:
  1. Whole dialogues are played first, so log π_old, log π_ref and V are computed once, before any step.
  2. Every turn has n candidates from one prompt. All are trained on, and the best one continues the dialogue.
  3. Advantages are whitened over all action tokens of the global batch, not per mini-batch.
  4. Losses are divided by the global count of action tokens. Mini-batches keep their dialogues in all epochs.

Beside it: dialogue.py (ids), scheduler.py (many dialogues at once), sampler.py, rewards.py, model.py, kernels/.
What differs from the published code: docs/differences.md. Metrics: docs/metrics.md. Exit codes: docs/failures.md.
Letters: T tree tokens in a micro-batch, N action tokens (sampled ids), D hidden, V vocabulary, n candidates per turn.
"""

from __future__ import annotations

import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read as torch is loaded: its idle threads sleep, and never spin

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from command_line.exits import lasting_output, tell
from command_line.flags import parse_args
from config import Config
from dialogue import Candidate, ChatTokenizer, Dialogue, open_turn, stream_seed
from dry_run.plan import dry_run
from endpoints.wire import ChatError
from kernels import linear_logprob, ppo_head
from kernels.backend import use_triton
from learners import processes, sharding
from learners.learner import Learner, trained_parameters
from learners.loading import choose_dtype
from model import Critic, Qwen2ForCausalLM, ValueHead
from packing import Batch, Packed, Span, critic_values, make_batches, pack, policy_hidden
from records.iteration import IterationMeter, play_metrics, retention
from records.log import RunLog, claim_folder
from records.merge import merge
from records.outages import Stopped, Unavailable, check_batch, save_and_stop
from records.progress import evaluation_line, finish, progress_line, record_episodes, start_log
from records.state import State, go_on_after_restart, resume_point, save_checkpoint, setup
from rewards import read_candidate, score_candidate
from sampler import Draw, make_sampler
from scheduler import Ask, Sample, Scheduler, Waits
from simulator import Environment, Said, heard, next_message, open_environment
from untrusted.plain_text import say
from worlds.personas import Persona


@lasting_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line and return the exit code (docs/failures.md); an error is one line on stderr."""
    signals: list[int] = []
    parsed = processes.attempt(lambda: parse_args(argv, __doc__))
    try:
        with processes.catch_signals(signals), processes.joined_processes(parsed) as store:
            return launch(processes.together(lambda: parsed), store, signals)
    except (ValueError, OSError, processes.LostProcess, Unavailable) as error:
        if not isinstance(error, processes.AgreedError | Unavailable) or os.environ.get("RANK", "0") == "0":
            tell("train_rlpa.py", str(error))
        return {processes.LostProcess: 1, Unavailable: os.EX_TEMPFAIL}.get(type(error), 2)


def launch(config: Config, store: dist.Store | None, signals: list[int]) -> int:
    """Claim the run folder, open user and judge, and train; returns the exit code.

    store: torchrun's, on rank 0 alone. It outlives the processes that torchrun restarts.
    """
    config = processes.on_rank_0(lambda: choose_dtype(go_on_after_restart(config, store)))
    if config.dry_run or config.merge:
        if processes.rank() == 0:
            say((dry_run if config.dry_run else merge)(config).rstrip())
        return 0
    with ExitStack() as stack:
        claim = claim_folder(config.run_dir, bool(config.resume), config.overwrite)
        processes.together(lambda: stack.enter_context(claim) if processes.rank() == 0 else None)
        if store:
            store.set("run_dir", config.run_dir)
        place = processes.rank(), processes.world_size()
        env = processes.together(lambda: stack.enter_context(open_environment(config, *place)))
        env.signals = signals
        return train(config, env)


def train(config: Config, env: Environment) -> int:
    """Run the whole training, fresh or from a checkpoint on; returns the exit code.

    A signal or an unreachable endpoint discards the current rollout. An update that has begun is finished. Then the
    state is saved.
    """
    folder = processes.on_rank_0(lambda: resume_point(config)) if config.resume else None
    mesh = sharding.make_mesh() if config.shard else None
    state = processes.together(lambda: setup(config, env, folder, mesh))
    log = processes.together(lambda: start_log(state) if processes.rank() == 0 else None)
    try:
        before, after = run(state, log)
    except (Stopped, Unavailable) as end:
        return save_and_stop(end, state, log)
    if log:
        finish(state, log, before, after)
    return 0


def run(state: State, log: RunLog | None) -> tuple[dict, dict]:
    """Run all iterations; returns the dialogues of the first evaluation ({} if resumed) and of the last."""
    before, played = {}, {}
    shown = {"desc": "iterations", "unit": "it", "disable": processes.rank() != 0}
    with tqdm(total=state.num_iterations, initial=state.iteration, **shown) as bar:
        while True:  # a run can be resumed here, and between an iteration and its evaluation
            if not state.evaluated:
                played = conclude_iteration(state, log)
                before = before if state.iteration else played
            if state.iteration == state.num_iterations:
                return before, played
            metrics, dialogues = run_iteration(state)
            if log:
                log.metrics(state.iteration, "train", metrics)
                say(progress_line(state, metrics))
            if state.config.episodes_every and state.iteration % state.config.episodes_every == 0:
                record_episodes(state, log, {"train": dialogues})
            state.mark(log, evaluated=False)
            bar.update()


def run_iteration(state: State) -> tuple[dict[str, float], list[Dialogue]]:
    """Run one iteration: play, pack, statistics, advantages, update. Returns metrics and this rank's dialogues."""
    config, env, policy, critic = state.config, state.env, state.policy, state.critic
    meter = IterationMeter(env)
    play = Play(config.num_candidates, config.temperature, (config.seed, "train", state.iteration))
    with sharding.gathered(policy.sampled):
        dialogues = play_batch(policy.sampled, state.chat, lambda: persona_batch(state), play, config, env)
    with env.timers("statistics"), processes.computing():
        packed = [p for p in (pack(d, config) for d in dialogues) if p is not None]
        batches = make_batches(packed, config)  # they hold the same Packed objects, which are filled in below
        add_statistics(batches, policy.model, state.ref_policy, critic and critic.model, config, policy.sampled)
        for p in packed:
            add_advantages(p, config) if critic else add_group_advantages(p, config)
        scale = whiten_advantages(packed, config.advantage)
        if config.sampler_correction:
            scale |= correct_for_sampler(packed, config.sampler_correction)
    with env.timers("update"), processes.computing():
        per_iteration = config.num_epochs * len(batches)
        progress = (state.updates, state.schedule_iterations * per_iteration)
        train_policy = state.iteration >= config.critic_warmup
        metrics = update(policy, critic, batches, config, progress, train_policy, state.ref_policy)
    state.iteration += 1
    state.updates += per_iteration
    if sampler_is_exact(policy.sampled, config):  # then |ratio − 1| before the first step shows the gap
        metrics["sampler_trainer_logprob_gap"] = metrics.get("ratio_dev_first", math.nan)
    return meter.metrics(state, dialogues, packed, train_policy) | scale | metrics, dialogues


# ------------------------------------------------------------------------- Rollout: every dialogue is played to its end


@dataclass
class Play:
    """How dialogues are played: training samples n candidates per turn, evaluation one."""

    num_candidates: int
    temperature: float
    stream: tuple  # key prefix of the random streams


def play_batch(
    policy: Qwen2ForCausalLM, chat: ChatTokenizer, batch: Callable[[], list[Dialogue]], play: Play, config: Config,
    env: Environment,
) -> list[Dialogue]:  # fmt: skip
    """Play this rank's dialogues of a batch, and replay the batch while fewer than --quorum of all dialogues survive.

    Raises Unavailable on every rank after --quorum-retries, and at once if an endpoint is out of reach.
    """
    for trial in range(config.quorum_retries + 1):
        dialogues = batch()
        stream = (*play.stream, "again", trial) if trial else play.stream  # new seeds, else --replay fails again
        rollout(policy, chat, dialogues, replace(play, stream=stream), config, env)
        complaint = check_batch(dialogues, config, env)
        if not complaint:
            return dialogues
        env.counts["batches_discarded"] += processes.rank() == 0
    raise Unavailable(complaint)


def persona_batch(state: State) -> list[Dialogue]:
    """Return this rank's dialogues of the iteration: personas in an order shuffled anew for each pass.

    Dialogue i of the global batch goes to rank i mod world size, so the batch does not depend on the number of ranks.
    """
    config, count = state.config, len(state.personas)
    first = state.iteration * config.rollout_batch_size  # position in the sequence of shuffled passes
    size = config.rollout_batch_size if config.num_iterations else min(config.rollout_batch_size, count - first)
    orders: dict[int, list[int]] = {}  # by pass
    for number in range(first // count, (first + size - 1) // count + 1):
        generator = torch.Generator().manual_seed(stream_seed(config.seed, "order", number))
        orders[number] = torch.randperm(count, generator=generator).tolist()
    dialogues = []
    for i in range(processes.rank(), size, processes.world_size()):
        persona = state.personas[orders[(first + i) // count][(first + i) % count]]
        dialogues.append(Dialogue(i, persona.persona_id, persona.facts))
    return dialogues


def rollout(
    policy: Qwen2ForCausalLM, chat: ChatTokenizer, dialogues: list[Dialogue], play: Play, config: Config,
    env: Environment,
) -> None:  # fmt: skip
    """Play this rank's dialogues, if any, to their end; fills in `turns` and `dropped`.

    Raises Stopped on every rank if a signal has come to any: what was played is discarded, and no weight has changed.
    """
    outcome = None
    if dialogues:  # a rank may have none
        speaker = Speaker(policy, chat, play, config, env, len(dialogues))
        players = [play_dialogue(dialogue, speaker) for dialogue in dialogues]
        outcome = processes.attempt(lambda: Scheduler(speaker.sampler, config, env).run(players))
        env.counts.update(speaker.sampler.counts)
    processes.wait_for_ranks(config.outage_budget + config.collective_timeout, env.signals)
    processes.agree(outcome)
    if number := max(processes.gather(max(env.signals, default=0))):
        raise Stopped(number)


def play_dialogue(dialogue: Dialogue, speaker: Speaker) -> Waits:
    """Play one dialogue to its end. It yields whatever it waits for, and scheduler.py lets the others go on meanwhile.

    speaker: answers the user. Here it is the policy; evaluation has one that asks a model in messages.
    """
    play, config, env = speaker.play, speaker.config, speaker.env
    while len(dialogue.turns) < config.max_turns:
        dialogue.persona_facts = dialogue.changes.get(len(dialogue.turns), dialogue.persona_facts)  # users may change
        # The user speaks. Only the user sees the persona; the policy sees what is said.
        if dialogue.turns or not config.first_user_message:
            said = yield Ask(partial(next_message, dialogue, play.stream, config, env))
        else:
            said = heard(config.first_user_message, dialogue)
        if isinstance(said, ChatError):  # a lost dialogue is masked out and counted, never scored 0
            dialogue.dropped = f"simulator: {said.reason}"
            break
        env.counts.update(said.counts)
        # The policy answers n times, and each answer is scored as soon as it ends.
        candidates = yield from speaker.answer(dialogue, said)
        if not candidates:
            break
        # The best candidate goes on. One without a verdict is neither chosen nor trained on.
        turn = dialogue.turns[-1]
        turn.candidates = candidates
        judged = [c for c, candidate in enumerate(candidates) if candidate.judged]
        env.counts["candidates_unjudged"] += len(candidates) - len(judged)
        if not judged:
            dialogue.dropped = "judge: no verdict on any candidate"
            break
        turn.chosen = max(judged, key=lambda c: candidates[c].reward)  # ties: the lowest index
        speaker.adopt(dialogue.index, turn.chosen)  # its keys and values stay; the next prompt continues them
    speaker.forget(dialogue.index)


class Speaker:
    """The policy in dialogues: it samples n candidates per turn and keeps the keys and values of the chosen ones."""

    def __init__(
        self, policy: Qwen2ForCausalLM, chat: ChatTokenizer, play: Play, config: Config, env: Environment, size: int
    ) -> None:
        self.chat, self.play, self.config, self.env = chat, play, config, env
        self.sampler = make_sampler(policy, chat, config, play.num_candidates, play.temperature, size)
        self.adopt, self.forget = self.sampler.adopt, self.sampler.forget

    def answer(self, dialogue: Dialogue, said: Said) -> Generator[Sample, None, list[Candidate]]:
        """Open a turn and sample its candidates; [] if the dialogue has outgrown the model or the KV cache."""
        config, env, stream = self.config, self.env, self.play.stream
        ids = self.chat.encode(said)
        if len(ids) > config.max_user_tokens:
            env.counts["user_messages_cut"] += 1
            said = said.cut_to(self.chat.decode(ids[: config.max_user_tokens]).rstrip("\ufffd"))  # half a character
        turn = open_turn(dialogue, said, self.chat, config.history_profile, said.told)
        if len(dialogue.turns) > 1 and not self.sampler.fits(len(turn.prompt_ids)):
            dialogue.turns.pop()  # the turns so far are trained on; if the first does not fit, sampler.start raises
            env.counts["dialogues_ended_early"] += 1
            return []
        place, n = (dialogue.index, len(dialogue.turns)), self.play.num_candidates
        seeds = [stream_seed(*stream, "sample", *place, c) for c in range(n)]
        candidates: list[Candidate | None] = [None] * n

        def score(draw: Draw) -> Ask | None:
            sampled = (draw.token_ids, draw.logprobs, draw.stop_reason)
            candidate = read_candidate(*sampled, dialogue, self.chat, env.matches)
            candidates[draw.candidate] = candidate
            judge = env.judge_with(stream_seed(*stream, "judge", *place, draw.candidate))
            scoring = partial(score_candidate, candidate, dialogue, config, judge)
            waits = judge.ask and candidate.failure is None
            return Ask(scoring) if waits else scoring()  # a thread waits for an endpoint

        # The scheduler calls score(draw) for each candidate as it ends, and resumes here once all are scored.
        yield Sample(dialogue.index, turn.prompt_ids, seeds, score)
        return candidates


# -------------------------------------- Statistics: what the update needs of the models as they were while they sampled


@torch.no_grad()
def add_statistics(
    batches: list[list[Batch]], policy: Qwen2ForCausalLM, ref_policy: Qwen2ForCausalLM | None,
    critic: Critic | ValueHead | None, config: Config, sampled: Qwen2ForCausalLM | None = None,
) -> None:  # fmt: skip
    """Fill in old log-probs, reference log-probs and values, each computed once.

    It sets old_logprobs, ref_logprobs, values and ref_hidden of each dialogue. sampled: the model that sampled; with
    --shard a whole copy of the policy, otherwise the policy itself.
    """
    sampled = sampled or policy
    exact = sampler_is_exact(sampled, config)
    for m, batch in ((m, batch) for m, minibatch in enumerate(batches) for batch in minibatch):
        left = m == 0 and not exact and is_left_to_update(critic, config)
        found = statistics_of(batch.to(sampled.head_weight), policy, ref_policy, critic, config, exact or left)
        for name, values in found.items():
            batch.fill(name, values)
        for p in batch.dialogues:
            p.old_is_new = left


def sampler_is_exact(policy: Qwen2ForCausalLM, config: Config) -> bool:
    """Say whether log π_old is taken from the sampler. Weights and temperature are the same; only kernels may differ.

    In fp32 by torch they agree to 1e-6. In bf16 sampler and trainer round differently, and the ratio would not be 1.
    """
    if config.old_logprobs != "auto":
        return config.old_logprobs == "sampler"
    weight = policy.head_weight
    return weight.dtype == torch.float32 and not use_triton(weight) and not config.sampler_correction


def is_left_to_update(critic: Critic | ValueHead | None, config: Config) -> bool:
    """Say whether the first mini-batch's log π_old can come from its own update, whose forward is the same.

    No step has been taken then. Nothing before may need it: no KL, no correction; and no forward that runs anyhow.
    """
    needed = config.kl_coef or config.sampler_correction or isinstance(critic, ValueHead)
    return config.old_logprobs == "auto" and config.num_epochs == 1 and not needed


def statistics_of(
    batch: Batch, policy: Qwen2ForCausalLM, ref_policy: Qwen2ForCausalLM | None, critic: Critic | ValueHead | None,
    config: Config, by_sampler: bool,
) -> dict[str, Tensor]:  # fmt: skip
    """Return a micro-batch's statistics by their names in `Packed`, (N,) each; ref_hidden is (N, D).

    by_sampler: take log π_old from the sampler, maybe until the update; then the policy's trunk runs only for a shared
    critic.
    """
    hidden = None if by_sampler and not isinstance(critic, ValueHead) else policy_hidden(policy, batch)
    if by_sampler:
        old_logprobs = batch.column("sampler_logprobs")
    else:
        old_logprobs = linear_logprob(hidden, policy.head_weight, batch.targets, config.temperature)[0]
    found = {"old_logprobs": old_logprobs, "ref_logprobs": old_logprobs}  # without a reference the gap is 0
    if critic:
        found["values"] = critic_values(critic, batch, hidden)
    if ref_policy:
        ref_hidden, head = policy_hidden(ref_policy, batch), ref_policy.head_weight
        found["ref_logprobs"] = linear_logprob(ref_hidden, head, batch.targets, config.temperature)[0]
        if config.kl_estimator == "exact":  # the update needs only this, so the reference runs once per rollout
            found["ref_hidden"] = ref_hidden
    return found


# ----------------------------------------------------------------------------------------------------------- Advantages


def add_advantages(p: Packed, config: Config) -> None:
    """Fill in advantages and returns of one dialogue by GAE, last turn first; `add_group_advantages` needs no critic.

    With credit "turn", GAE ends at a turn's last token. With "dialogue", it continues at the first token of the next
    turn's chosen candidate. User tokens are skipped; γ_turn is the discount between turns.

    With `--gae-level turn` a candidate is one step (arXiv 2512.17008): R is the sum of its tokens' rewards, V the value
    before its first token, δ = R + γ_turn V_{next turn} − V. All its tokens get its advantage A and the return A + V.
    """
    gamma_turn = config.gamma_turn if config.credit == "dialogue" else 0.0
    values = p.values.tolist()
    advantages = [0.0] * len(values)
    next_value, next_advantage = 0.0, 0.0
    for t in sorted({span.turn for span in p.spans}, reverse=True):  # each turn needs what comes after it
        first_of_chosen = 0
        for span in (s for s in p.spans if s.turn == t):
            # Other candidates have no next turn. They bootstrap from the same next value, because a 0 would punish
            # them for not being chosen. Only the chosen one continues the sum of advantages.
            rewards, own_values = token_rewards(span, p, config), values[span.start : span.stop]
            ahead_advantage = gamma_turn * next_advantage if span.chosen else 0.0
            ahead = gamma_turn * next_value, ahead_advantage
            if config.gae_level == "turn":  # one step: its tokens share V before the first of them, and A
                values[span.start : span.stop] = own_values[:1] * len(rewards)
                found = gae([sum(rewards)], own_values[:1], *ahead, config.gamma, config.gae_lambda) * len(rewards)
            else:
                found = gae(rewards, own_values, *ahead, config.gamma, config.gae_lambda)
            advantages[span.start : span.stop] = found
            first_of_chosen = span.start if span.chosen else first_of_chosen
        next_value, next_advantage = values[first_of_chosen], advantages[first_of_chosen]
    p.advantages = torch.tensor(advantages)
    p.returns = p.advantages + torch.tensor(values)  # before whitening: the critic learns rewards, not deviations


def token_rewards(span: Span, p: Packed, config: Config) -> list[float]:
    """Place a candidate's reward on its tokens: −kl_coef · k1 on each, and every part on the last one.

    With `--reward-at segment` the Profile Reward stands where the profile ends. Without KL the sum is candidate.reward.
    """
    placed = [0.0] * (span.stop - span.start)
    if config.kl_estimator == "k1":
        k1 = (p.old_logprobs - p.ref_logprobs)[span.start : span.stop]  # old: rewards stay fixed during the update
        placed = (-config.kl_coef * k1).tolist()
    for name, value in span.candidate.parts.items():  # a format failure has earned 0 of each
        at_profile = name == "profile" and config.reward_at == "segment"
        place = span.candidate.profile_tokens - 1 if at_profile else -1
        placed[place] += getattr(config, f"{name}_weight") * value
    return placed


def gae(
    token_reward: Sequence[float], values: Sequence[float], next_value: float, next_advantage: float, gamma: float,
    lam: float,
) -> list[float]:  # fmt: skip
    """Return generalised advantage estimates (arXiv 1506.02438, eq. 16) of one run of tokens.

    δ_t = r_t + γ V_{t+1} − V_t and A_t = δ_t + γ λ A_{t+1}. After the last token come `next_value` and
    `next_advantage`, which the caller has discounted already; 0 and 0 at an end.

    >>> gae([0.0, 1.0], [0.5, 0.5], 0.0, 0.0, gamma=1.0, lam=1.0)
    [0.5, 0.5]
    >>> gae([0.0, 1.0], [0.5, 0.25], 0.0, 0.0, gamma=1.0, lam=0.0)
    [-0.25, 0.75]
    """
    advantages = [0.0] * len(values)
    ahead_value, ahead_advantage = next_value, lam * next_advantage
    for t in reversed(range(len(values))):
        delta = token_reward[t] + ahead_value - values[t]
        advantages[t] = delta + ahead_advantage
        ahead_value, ahead_advantage = gamma * values[t], gamma * lam * advantages[t]  # discounted for token t − 1
    return advantages


def add_group_advantages(p: Packed, config: Config) -> None:
    """Fill in advantages of one dialogue without a critic: a turn's candidates are each other's baseline.

    R is a candidate's reward. K = Σ_t (log π_old − log π_ref) over its tokens with k1, else 0. All tokens of candidate
    c get the same advantage

        rloo   A_c = (R_c − β K_c) − mean of R − β K over the others       (arXiv 2402.14740)
        grpo   A_c = (R_c − mean R) / (std R + 1e-4) − β (K_c − mean K over the others)       (arXiv 2402.03300)
    """
    kl = (config.kl_coef if config.kl_estimator == "k1" else 0.0) * (p.old_logprobs - p.ref_logprobs)
    p.advantages = torch.zeros(len(p.targets))
    for _, turn in itertools.groupby(p.spans, key=lambda span: span.turn):
        spans = list(turn)
        reward = torch.tensor([span.candidate.reward for span in spans], dtype=torch.double)
        penalty = against_others(torch.stack([kl[span.start : span.stop].double().sum() for span in spans]))
        if config.advantage == "rloo":
            reward = against_others(reward)
        else:  # The KL stays outside: with equal rewards the std is tiny and would blow up any difference.
            reward = (reward - reward.mean()) / (reward.std(correction=0) + 1e-4)
        for span, advantage in zip(spans, reward - penalty, strict=True):
            p.advantages[span.start : span.stop] = advantage


def against_others(x: Tensor) -> Tensor:
    """Return each element minus the mean of the others; 0 for one that is alone.

    >>> against_others(torch.tensor([3.0, 0.0, 0.0])).tolist()
    [3.0, -1.5, -1.5]
    """
    return len(x) / max(1, len(x) - 1) * (x - x.mean())


def whiten_advantages(packed: list[Packed], advantage: str = "gae") -> dict[str, float]:
    """Give all action tokens of the global batch mean 0 and standard deviation 1; returns what these were before.

    One learning rate then fits any scale of rewards. rloo is only scaled: subtracting a mean would give an advantage to
    a turn whose candidates earned the same. grpo is already scaled per turn, so it is only measured.
    """
    flat = torch.cat([p.advantages for p in packed]).double() if packed else torch.zeros(0, dtype=torch.double)
    sums = torch.stack([torch.tensor(float(len(flat))).double(), flat.sum(), (flat**2).sum()])
    count, total, squares = processes.all_sum(sums).tolist()  # of all ranks, so that their number does not matter
    mean = total / max(1, count)
    std = math.sqrt(max(0.0, squares / max(1, count) - mean**2))
    shift, scale = (mean if advantage == "gae" else 0.0), (1.0 if advantage == "grpo" else std + 1e-8)
    for p in packed:
        p.advantages = (p.advantages - shift) / scale
    return {"advantage_mean": mean, "advantage_std": std}


def correct_for_sampler(packed: list[Packed], most: float) -> dict[str, float]:
    """Multiply each token's advantage by w = min(C, π_old / π_sampler); returns all ranks' mean w and share above C.

    The ratio π / π_old starts at the trainer's log-probs, but the sampler's probabilities chose the tokens; w corrects
    for it (arXiv 2110.00641: the decoupled objective; truncated as in E. Ionides, 2008). PPO's loss is proportional to
    A, so w weighs it. No gradient flows through w. The value loss, the entropy and a KL in the loss have no weight.
    """
    sums = torch.zeros(3, dtype=torch.double)
    for p in packed:
        gap = p.old_logprobs - p.sampler_logprobs
        weights = gap.clamp(max=math.log(most)).exp()  # cut before exp: it cannot overflow
        p.advantages = p.advantages * weights
        sums += torch.stack([torch.tensor(len(gap)), weights.sum(), (gap > math.log(most)).sum()])
    count, total, truncated = processes.all_sum(sums).tolist()
    return {"sampler_weight": total / max(1, count), "sampler_weight_truncated": truncated / max(1, count)}


# --------------------------------------------------------------------------------------------------------------- Update


def update(
    policy: Learner, critic: Learner | None, batches: list[list[Batch]], config: Config, progress: tuple[int, int],
    train_policy: bool, ref_policy: Qwen2ForCausalLM | None = None,
) -> dict[str, float]:  # fmt: skip
    """Run PPO over one rollout batch; `progress` is (updates done so far, those of the schedule). Gives metrics."""
    totals: Counter = Counter()
    first: dict[str, float] = {}
    ratios: list[float] = []
    for epoch in range(config.num_epochs):
        for m, minibatch in enumerate(batches):
            # The sum of losses is divided once, by the action tokens of all ranks. A mean per micro-batch or rank would
            # make the gradient depend on their sizes.
            count = processes.all_sum(torch.tensor(float(sum(len(batch.targets) for batch in minibatch)))).item()
            if not count:  # no dialogue is in it: the batch is partial, or all were dropped
                continue
            share = lr_share(progress[0] + epoch * len(batches) + m, progress[1], config)
            sums = minibatch_update(policy, critic, minibatch, count, share, config, train_policy, ref_policy)
            ratios += [sums.pop("ratio_min"), sums.pop("ratio_max")]
            totals.update(sums)
            first = first or {"ratio_dev_first": sums["ratio_dev"] / sums["tokens"]}  # no step yet: ratio must be 1
    for learner in filter(None, (policy, critic)):  # the next rollout can use the gradients' memory
        learner.optimizer.zero_grad()
    if policy.sampled is not policy.model:  # with --shard a whole copy samples
        sharding.refresh(policy.sampled, policy.masters)
    if ratios:
        first |= {"ratio_min": min(ratios), "ratio_max": max(ratios)}
    tokens, steps = max(1.0, totals.pop("tokens", 0.0)), max(1.0, totals.pop("steps", 0.0))
    per = dict.fromkeys(("policy_grad_norm", "critic_grad_norm", "lr", "critic_lr"), steps) | {"updates_skipped": 1}
    return first | {name: value / per.get(name, tokens) for name, value in totals.items()}


def lr_share(update: int, num_updates: int, config: Config) -> float:
    """Return the share of the peak learning rate at an update: linear warm-up, then a cosine to `min_lr_share`.

    >>> [round(lr_share(u, 100, Config(ckpt="x")), 3) for u in (0, 2, 3, 99)]
    [0.333, 1.0, 1.0, 0.1]
    """
    warmup = math.ceil(config.warmup_share * num_updates)
    if update < warmup:
        return (update + 1) / warmup
    progress = (update - warmup) / max(1, num_updates - 1 - warmup)
    return config.min_lr_share + (1 - config.min_lr_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def minibatch_update(
    policy: Learner, critic: Learner | None, minibatch: list[Batch], count: float, share: float, config: Config,
    train_policy: bool, ref_policy: Qwen2ForCausalLM | None = None,
) -> dict[str, float]:  # fmt: skip
    """Take one optimizer step of policy and critic on one mini-batch; returns all ranks' sums and extreme ratios."""
    for learner in filter(None, (policy, critic)):
        learner.optimizer.zero_grad()
    losses = ("policy_loss", "value_loss") if critic else ("policy_loss",)
    names = (*losses, "approx_kl", "clip_frac", "entropy", "ratio_dev")
    exact_kl = config.kl_estimator == "exact" and config.kl_coef > 0
    sums = dict.fromkeys((*names, "kl_exact") if exact_kl else names, 0.0)
    low, high = math.inf, -math.inf
    for batch in minibatch:
        batch = batch.to(policy.sampled.head_weight)  # attention masks exist for one micro-batch at a time
        models = policy.model, critic and critic.model
        statistics = add_gradients(*models, batch, count, config, train_policy, ref_policy)
        for name in sums:
            sums[name] += statistics[name].item()
        if len(batch.targets):  # an empty one only pads the micro-batches of a sharded model
            low, high = min(low, statistics["ratio_min"].item()), max(high, statistics["ratio_max"].item())
    totals = processes.all_sum(torch.tensor(list(sums.values()), dtype=torch.double)).tolist()
    result = dict(zip(sums, totals, strict=True))
    lows, highs = zip(*processes.gather((low, high)), strict=True)
    result |= {"ratio_min": min(lows), "ratio_max": max(highs), "tokens": count, "steps": 1, "updates_skipped": 0}
    finite = all(math.isfinite(result[name]) for name in losses)  # one bad loss skips both steps, on all ranks
    for name, learner in (("critic", critic), ("policy", policy)):
        trained = learner and (name == "critic" or train_policy)
        norm, taken = 0.0, not trained  # where nothing is to be stepped, nothing is skipped
        if trained and finite:
            norm, taken = optimizer_step(learner, share, config.max_grad_norm)
        if learner:
            result[f"{name}_grad_norm"] = norm
            result |= {"lr" if name == "policy" else "critic_lr": learner.peak_lr * share} if trained else {}
            result["updates_skipped"] += not taken
    return result


def add_gradients(
    policy: Qwen2ForCausalLM, critic: Critic | ValueHead | None, batch: Batch, count: float, config: Config,
    train_policy: bool, ref_policy: Qwen2ForCausalLM | None,
) -> dict[str, Tensor]:  # fmt: skip
    """Add a micro-batch's gradients of (policy loss, value loss) ÷ count; returns its sums and extreme ratios.

    A shared trunk has one backward, of policy loss + value_coef · value loss. Separate trunks have one backward each,
    so that the activations of only one exist at a time.
    """
    with torch.set_grad_enabled(train_policy):  # critic warm-up: policy and shared trunk stand still
        hidden = policy_hidden(policy, batch)
        loss, statistics = policy_loss(hidden, policy.head_weight, ref_policy, batch, config)
    if not isinstance(critic, ValueHead) and train_policy:  # frees the policy's activations before the critic's
        (loss / count).backward()
    if critic is None:
        return statistics | {"policy_loss": loss.detach()}
    vf_loss = value_loss(critic_values(critic, batch, hidden), batch, config)
    total = vf_loss if isinstance(critic, Critic) else loss + config.value_coef * vf_loss
    (total / count).backward()
    return statistics | {"policy_loss": loss.detach(), "value_loss": vf_loss.detach()}


def policy_loss(
    hidden: Tensor, head: Tensor, ref_policy: Qwen2ForCausalLM | None, batch: Batch, config: Config
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the summed loss of a micro-batch's action tokens, and sums and extremes of its statistics.

    hidden: (N, D), by `policy_hidden`; head: the policy's head weight (V, D). The logits (N, V) never exist as a whole:
    `ppo_head` computes them chunk by chunk, calls `token_losses` on each chunk, and has the gradients ready.
    """
    exact_kl = config.kl_estimator == "exact" and config.kl_coef > 0
    per_token = tuple(batch.column(name) for name in ("old_logprobs", "advantages", "ref_logprobs"))
    first = any(p.old_is_new for p in batch.dialogues)
    loss, statistics = ppo_head(
        hidden, head, batch.targets, partial(first_losses if first else token_losses, config=config), per_token,
        reference=(batch.column("ref_hidden"), ref_policy.head_weight) if exact_kl else None,
        temperature=config.temperature, entropy_coef=config.entropy_coef, kl_coef=config.kl_coef,
    )  # fmt: skip
    if first:
        batch.fill("old_logprobs", found := statistics.pop("new_logprobs"))
        batch.fill("ref_logprobs", found)
    ratio = statistics.pop("ratio")  # only its extremes are kept
    sums = {name: values.sum() for name, values in statistics.items()}
    return loss, sums | ({"ratio_min": ratio.min(), "ratio_max": ratio.max()} if len(ratio) else {})


def first_losses(new_logprobs: Tensor, _: Tensor, *known: Tensor, config: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """Return what `token_losses` does where π_old is π as it is (`is_left_to_update`), and log π."""
    losses, statistics = token_losses(new_logprobs, new_logprobs.detach(), *known, config=config)
    return losses, statistics | {"new_logprobs": new_logprobs}


def token_losses(
    new_logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, ref_logprobs: Tensor, config: Config
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return PPO's loss of each action token, and statistics of each; all tensors are (N,).

    −min(ratio · A, clip(ratio, 1 − ε, 1 + ε_high) · A), with ratio = π(y) / π_old(y)      (arXiv 1707.06347, eq. 7)

    ε_high is ε, or above it for clip-higher (arXiv 2503.14476): unlikely tokens may rise more. Dual clip (arXiv
    1912.09729) bounds the loss by c · |A| where A < 0; without it, it grows with the ratio, and so does the gradient.

    >>> x = torch.tensor([0.0, 0.5])  # log-probs rose by 0 and by 0.5; the second ratio, 1.65, is clipped at 1.2
    >>> losses, statistics = token_losses(x, torch.zeros(2), torch.ones(2), torch.zeros(2), Config(ckpt="x"))
    >>> losses, statistics["clip_frac"]
    (tensor([-1.0000, -1.2000]), tensor([0., 1.]))
    """
    log_ratio = (new_logprobs - old_logprobs).clamp(-20, 20)  # no overflow; beyond ±20 there is no gradient
    ratio = log_ratio.exp()
    high = config.clip_eps_high or config.clip_eps
    clipped = ratio.clamp(1 - config.clip_eps, 1 + high)  # where min picks it, the gradient is 0
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    if config.dual_clip:
        bounded = (advantages < 0) & (ratio > config.dual_clip)  # beyond it the gradient is 0
        objective = torch.where(bounded, config.dual_clip * advantages, objective)
    losses = -objective
    if config.kl_estimator in KL_ESTIMATORS:  # k1 was subtracted from the reward; ppo_head adds the exact KL
        gap = (new_logprobs - ref_logprobs).clamp(-20, 20)
        losses = losses + config.kl_coef * KL_ESTIMATORS[config.kl_estimator](gap)
    deviation = (ratio - 1).abs()
    return losses, {
        "approx_kl": ratio - 1 - log_ratio,  # k3 of KL(old policy ‖ new policy)
        "clip_frac": (ratio != clipped).to(ratio.dtype),
        "ratio_dev": deviation,
        "ratio": ratio,
    }


# KL(policy ‖ reference) at a sampled token, from the gap log π(y) − log π_ref(y) (J. Schulman, 2020):
#   k1  gap                  Unbiased, noisy. As a loss its gradient has mean 0, so k1 is in the reward (token_rewards).
#   k3  exp(−gap) − 1 + gap  Unbiased, never negative. In the loss its gradient has the mean of ∇KL(reference ‖ policy).
# Those of the loss stand here; the exact KL is ppo_head's. tests/test_head_kernels.py shows these means.
KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k3": lambda gap: torch.expm1(-gap) + gap,
}


def value_loss(new_values: Tensor, batch: Batch, config: Config) -> Tensor:
    """Return the summed clipped value loss, ½ max((V − R)², (clip(V) − R)²), of a micro-batch's action tokens."""
    old_values, returns = batch.column("values"), batch.column("returns")
    # The clip keeps V near the values that gave the advantages; max takes the worse of the two.
    clipped = old_values + (new_values - old_values).clamp(-config.value_clip, config.value_clip)
    return 0.5 * torch.maximum((new_values - returns) ** 2, (clipped - returns) ** 2).sum()


def optimizer_step(learner: Learner, share: float, max_grad_norm: float) -> tuple[float, bool]:
    """Sum gradients over ranks, clip and step; a non-finite norm skips the step on every rank alike.

    Returns the gradient norm before clipping and whether the step was taken.
    """
    masters = learner.masters.values()  # a hook has added a bf16 parameter's gradients to its master (learner.py)
    processes.all_sum_gradients(m for m in masters if not isinstance(m, DTensor))  # sharded ones are sums already
    norm = torch.nn.utils.clip_grad_norm_(masters, max_grad_norm)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    if not math.isfinite(norm):  # the summed gradient is the same everywhere, and so is this decision
        return norm, False
    for group in learner.optimizer.param_groups:  # the schedule is a function of the update: nothing to resume
        group["lr"] = learner.peak_lr * share
    learner.optimizer.step()
    with torch.no_grad():
        for parameter, master in zip(trained_parameters(learner.model), masters, strict=True):
            if parameter is not master:  # the model computes with a bf16 copy of its fp32 master
                parameter.copy_(master)
    return norm, True


# --------------------------------------------------------------- After an iteration: held-out evaluation and checkpoint


def conclude_iteration(state: State, log: RunLog | None) -> dict[str, list[Dialogue]]:
    """Evaluate and save where due; returns the dialogues of the run's first and last evaluation, else {}."""
    i, config = state.iteration, state.config
    last, ends = i == state.num_iterations, i in (0, state.num_iterations)
    played, state.reward = {}, math.nan
    if ends or config.eval_every and i % config.eval_every == 0:
        with sharding.gathered(state.policy.sampled):
            played = run_evaluation(state, log, ends)
    played = played if ends else {}
    record_episodes(state, log, played)
    state.mark(log, evaluated=True)
    if last or i and config.save_every and i % config.save_every == 0:
        save_checkpoint(state)
    return played


def run_evaluation(state: State, log: RunLog | None, ends: bool) -> dict[str, list[Dialogue]]:
    """Evaluate the held-out set, sampled and greedily. At the `ends` of a run, evaluate every set."""
    played, retained = {}, retention(state) if log else {}
    for name, personas in state.eval_sets.items():
        if name != "heldout" and not ends:
            continue
        for how, temperature in (("sampled", 1.0), ("greedy", 0.0)):
            metrics, played[f"{name}/{how}"] = play_heldout(state, personas, temperature)
            if (name, how) == ("heldout", "sampled"):
                state.reward = metrics["reward"]  # decides which checkpoint is the best
            if log:
                log.metrics(state.iteration, f"{name}/{how}", metrics | (retained if name == "heldout" else {}))
                say(evaluation_line(f"{name}/{how}", metrics))
    return played


def play_heldout(state: State, personas: list[Persona], temperature: float) -> tuple[dict, list[Dialogue]]:
    """Play held-out personas, one candidate per turn; returns metrics over all ranks and this rank's dialogues."""
    config, env, meter = state.config, state.env, IterationMeter(state.env)
    own = list(enumerate(personas[: config.eval_dialogues]))[processes.rank() :: processes.world_size()]
    play = Play(1, temperature, (config.seed, "eval", state.iteration, temperature))
    dialogues = play_batch(
        state.policy.sampled, state.chat, lambda: [Dialogue(i, p.persona_id, p.facts) for i, p in own],
        play, config, env,
    )  # fmt: skip
    return play_metrics(dialogues, env, meter.calls, config), dialogues


if __name__ == "__main__":
    processes.leave(main())
