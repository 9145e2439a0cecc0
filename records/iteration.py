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
from learners.processes import all_sum, gather, world_size
from packing import Packed
from records.metrics import rates, sum_counters, tally
from records.perplexity import HELDOUT_FILE, perplexity, read_texts, text_scores
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
        metrics = play_metrics(dialogues, env, self.calls, config) | batch_statistics(packed)
        metrics |= +sum_counters(gather(env.counts))  # +: without zeros
        if state.critic:
            metrics["explained_variance"] = explained_variance(packed)
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
    """Return the metrics of dialogues and of the calls made since `before`, over all ranks."""
    calls = sum_counters(gather(env.calls() - before))
    return rates(sum_counters(gather(tally(dialogues)))) | calls | cost(calls, config)


def batch_statistics(packed: list[Packed]) -> dict[str, float]:
    """Return statistics of a batch's action tokens: their number, KL to the reference, sampler's gap."""
    sums = torch.zeros(3, dtype=torch.double)
    for p in packed:
        kl, gap = (p.old_logprobs - p.ref_logprobs).sum(), (p.old_logprobs - p.sampler_logprobs).abs().sum()
        sums += torch.tensor([len(p.targets), kl.item(), gap.item()], dtype=torch.double)
    count, kl, gap = all_sum(sums).tolist()
    n = count or math.nan
    return {"kl_ref": kl / n, "sampler_trainer_logprob_gap": gap / n, "action_tokens": count}


def explained_variance(packed: list[Packed]) -> float:
    """Return 1 − Var(R − V) / Var(R) of the critic over a batch's action tokens."""
    sums = torch.zeros(5, dtype=torch.double)
    for p in packed:
        error = p.returns - p.values
        parts = (len(p.targets), error.sum(), (error**2).sum(), p.returns.sum(), (p.returns**2).sum())
        sums += torch.tensor([float(part) for part in parts], dtype=torch.double)
    count, error, error2, returns, returns2 = all_sum(sums).tolist()
    n = count or math.nan
    variance = returns2 / n - (returns / n) ** 2
    return 1 - (error2 / n - (error / n) ** 2) / variance if variance > 1e-12 else 0.0


def retention(state: State) -> dict[str, float]:
    """Return the policy's perplexity on the text that the checkpoint brought along; {} if it brought none."""
    path = Path(state.config.ckpt) / HELDOUT_FILE
    if not path.is_file():
        return {}
    return {"perplexity_sft": perplexity(text_scores(state.policy.sampled, state.chat, read_texts(path)))}
