"""What one iteration is measured by: its dialogues, its batch, its calls, its time."""

from __future__ import annotations

import math
import time
from collections import Counter
from pathlib import Path

import torch

from config import Config, has_own_trunk
from dialogue import Dialogue
from dry_run.memory import peak_flops, update_flops
from endpoints.calls import cost
from learners.folder import HELDOUT_FILE
from learners.processes import all_sum, gather, world_size
from packing import Packed
from records.metrics import rates, sum_counters, tally
from records.perplexity import parse_texts, perplexity, text_scores
from records.state import State
from simulator import Environment


class IterationMeter:
    """Counts and times an iteration, from its making on."""

    def __init__(self, env: Environment) -> None:
        env.timers.seconds.clear()
        env.counts.clear()
        self.env, self.calls, self.start = env, env.calls(), time.perf_counter()

    def metrics(
        self, state: State, dialogues: list[Dialogue], packed: list[Packed], train_policy: bool
    ) -> dict[str, float]:
        """Return the metrics of an iteration that is over, over all ranks (docs/metrics.md), without the update's."""
        config, env = state.config, self.env
        models = bool(state.critic), bool(state.ref_policy)
        metrics = play_metrics(dialogues, env, self.calls, config) | batch_statistics(packed, *models)
        pairs = sum(int((p.position_ids + 1).sum()) for p in packed)  # a token attends to its ancestors and itself
        sizes = [sum(len(p.token_ids) for p in packed), sum(p.row_tokens for p in packed), pairs]
        tree_tokens, row_tokens, pairs = all_sum(torch.tensor(sizes, dtype=torch.double)).tolist()
        seconds = time.perf_counter() - self.start
        metrics |= {"tree_tokens": tree_tokens, "tree_saving": row_tokens / max(1, tree_tokens)}
        metrics |= {"seconds": seconds, "sampled_tokens_per_second": metrics["action_tokens"] / seconds}
        card = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        if train_policy and (peak := peak_flops(card)):
            work = tree_tokens, metrics["action_tokens"], pairs, has_own_trunk(config)
            flops = config.num_epochs * update_flops(state.policy.model.config, *work)
            metrics["mfu"] = flops / (env.timers.seconds["update"] * peak * world_size())
        return metrics | {f"seconds_{phase}": spent for phase, spent in env.timers.seconds.items()}


def play_metrics(dialogues: list[Dialogue], env: Environment, before: Counter, config: Config) -> dict[str, float]:
    """Return the metrics of dialogues, with what was counted and the calls made since `before`, over all ranks."""
    calls, counts = sum_counters(gather(env.calls() - before)), +sum_counters(gather(env.counts))  # +: without zeros
    env.warn_of_rules(counts)
    return rates(sum_counters(gather(tally(dialogues)))) | counts | calls | cost(calls, config)


def batch_statistics(packed: list[Packed], critic: bool, reference: bool) -> dict[str, float]:
    """Return statistics of a batch's action tokens over all ranks.

    action_tokens: their number; sampler_trainer_logprob_gap: mean |log π_old − sampler's|; kl_ref, with a reference:
    mean log π_old − log π_ref; explained_variance, with a critic: 1 − Var(R − V) / Var(R).
    """
    sums = torch.zeros(7, dtype=torch.double)
    for p in packed:
        kl, gap = p.old_logprobs - p.ref_logprobs, p.old_logprobs - p.sampler_logprobs
        parts = [torch.tensor(len(p.targets)), kl.sum(), gap.abs().sum()]
        if critic:
            error = p.returns - p.values
            parts += [error.sum(), (error**2).sum(), p.returns.sum(), (p.returns**2).sum()]
        sums[: len(parts)] += torch.tensor([part.item() for part in parts], dtype=torch.double)
    count, kl, gap, *moments = all_sum(sums).tolist()
    n = count or math.nan
    found = {"sampler_trainer_logprob_gap": gap / n, "action_tokens": count}
    found |= {"kl_ref": kl / n} if reference else {}
    if critic:
        error, error2, returns, returns2 = (moment / n for moment in moments)
        variance = returns2 - returns**2
        found["explained_variance"] = 1 - (error2 - error**2) / variance if variance > 1e-12 else 0.0
    return found


def retention(state: State) -> dict[str, float]:
    """Return the policy's perplexity on the text that the checkpoint brought along; {} if it brought none."""
    if HELDOUT_FILE not in state.files:
        return {}
    texts = parse_texts(state.files[HELDOUT_FILE], where := str(Path(state.config.ckpt) / HELDOUT_FILE))
    return {"perplexity_sft": perplexity(text_scores(state.policy.sampled, state.chat, texts, where))}
