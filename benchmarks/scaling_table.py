"""What Qwen-2.5 needs per GPU, and sends per iteration, on 1 to 64 GPUs: the table of docs/scaling.md.

    python -m benchmarks.scaling_table

Counted from shapes, as in dry_run/memory.py; nothing is measured. `row_work` and `tree_blocks`, which other benchmarks
use too, count a dialogue's work in the published procedure and the blocks of its tree attention on a CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

from dry_run.memory import (
    PEAK_FLOPS,
    Plan,
    Work,
    causal_pairs,
    peak,
    policy_parameters,
    root_parameters,
    tree_work,
    update_flops,
)
from model import Qwen2Config

QWEN = {
    "0.5B": Qwen2Config(151_936, 896, 4_864, 24, 14, 2, tie_word_embeddings=True),
    "1.5B": Qwen2Config(151_936, 1_536, 8_960, 28, 12, 2, tie_word_embeddings=True),
    "3B": Qwen2Config(151_936, 2_048, 11_008, 36, 16, 2, tie_word_embeddings=True),
    "7B": Qwen2Config(152_064, 3_584, 18_944, 28, 28, 4),
}
RANKS = (1, 2, 4, 8, 16, 64)
NVLINK, INFINIBAND = 450e9, 50e9  # bytes/s a GPU sends while it receives as many: H100's data sheet; 400 Gb/s a GPU


def row_work(
    system: int, user: Sequence[int], reply: Sequence[int], n: int, kept: Sequence[int] | None = None
) -> Work:
    """Count the published procedure: each candidate of each turn is a row of its own, with its whole history.

    kept: per turn, what an older reply leaves in the history (published: its bare response; the newest reply keeps its
    profile); None: all of it.

    >>> row_work(10, [5, 5], [20, 30], n=4)[:3]   # prompts of 15 and 40, four times; 4·50; 4·(35 + 70)
    (220, 200, 420)
    """
    kept = reply if kept is None else kept
    prefilled = decoded = prefill_pairs = decode_pairs = 0
    for t, length in enumerate(reply):
        prompt = system + sum(user[: t + 1]) + sum(kept[: max(0, t - 1)]) + (reply[t - 1] if t else 0)
        prefilled, prefill_pairs = prefilled + n * prompt, prefill_pairs + n * causal_pairs(0, prompt)
        decoded, decode_pairs = decoded + n * length, decode_pairs + n * causal_pairs(prompt, length)
    return Work(prefilled, decoded, prefilled + decoded, prefill_pairs, decode_pairs, prefill_pairs + decode_pairs)


def tree_blocks(
    system: int, user: Sequence[int], reply: Sequence[int], n: int, block: int = 256
) -> tuple[tuple[int, int | None], ...]:
    """Estimate how a dialogue's tree attention is cut on a CPU: its trunk, then branches in blocks of `block` tokens.

    >>> tree_blocks(10, [5, 5], [20, 30], n=4)   # the chosen path; three branches after 15 and three after 40 tokens
    ((70, None), (150, 40))
    """
    blocks: list[tuple[int, int | None]] = [(system + sum(user) + sum(reply), None)]
    depth = system
    for message, length in zip(user, reply, strict=True):
        depth += message
        for _ in range(n - 1):
            if len(blocks) == 1 or blocks[-1][0] + length > block:
                blocks.append((0, 0))
            blocks[-1] = (blocks[-1][0] + length, depth)
        depth += length
    return tuple(blocks)


class Traffic(NamedTuple):
    """Bytes that each GPU sends in one iteration; it receives as many."""

    statistics: float
    update: float
    refresh: float  # of the copy that samples


def traffic(config: Qwen2Config, plan: Plan, ranks: int, microbatches: int, steps: int) -> Traffic:
    """Count an iteration's bytes over a ring of `ranks`: so many micro-batches each, so many optimizer steps.

    Whole models: each step sums gradients in fp32, which passes every byte twice. Shards, each micro-batch: weights are
    gathered for the forward, and but for the root for the backward, and gradients are summed to their owners in fp32.
    """
    share, c = (ranks - 1) / ranks, plan.compute_bytes
    policy, critic = policy_parameters(config), plan.critic_parameters(config)
    if not plan.shards:
        return Traffic(0.0, 2 * share * steps * 4 * (policy + critic), 0.0)
    root, critic_root = root_parameters(config, head=True), root_parameters(config, head=False)
    own_trunk = critic if plan.separate_critic else 0
    reference = (policy - root) * plan.reference  # whose root stays gathered
    update = c * (2 * policy - root) + 4 * policy
    update += (c * (2 * critic - critic_root) + 4 * critic) * plan.separate_critic
    statistics = c * (policy * (c != 4 or not plan.separate_critic) + own_trunk + reference)
    return Traffic(share * microbatches * statistics, share * microbatches * update, share * c * policy)


def scaling_row(config: Qwen2Config, ranks: int, shard: bool, separate: bool, gb: float) -> tuple[float, bool, Traffic]:
    """Return the peak of one of `ranks` GPUs, whether it fits `gb`, and its traffic, at the lengths of `scaling_table`.

    The KV cache is that of the dialogues that decode at once; it may take what is left.
    """
    turns, n, reply = 10, 4, 320
    work = tree_work(50, [73] * turns, [reply] * turns, n)
    rows = min(64, -(-256 // ranks))
    plan = Plan(
        work.trained, work.decoded, several_microbatches=ranks < 4, compute_bytes=2, separate_critic=separate,
        cache_tokens=rows * (50 + turns * (73 + reply) + n * reply), gradients_in_rollout=False, checkpointing=True,
        shards=ranks * shard,
    )  # fmt: skip
    need = peak(config, plan)[1]
    moved = traffic(config, plan, ranks, -(-256 // ranks), 256 // max(4, ranks))
    return need, need * 1.1 <= gb * 1e9, moved


def scaling_table(gb: float = 80.0) -> str:
    """Write what Qwen-2.5 needs per GPU and sends per iteration, whole and with --shard, as a Markdown table.

    256 dialogues of 10 turns and 4 candidates, messages of 64 and replies of 320 tokens: one dialogue a micro-batch, 4
    or, from more GPUs on, one of each GPU a step; bf16 products, --checkpointing, a reference. Bold: fits `gb`, with a
    tenth for the allocator. Seconds: NVLink up to 8 GPUs, InfiniBand beyond, at full rate and nothing hidden; the
    update's FLOP at an H100's peak, with the forward that checkpointing repeats.
    """
    lines = [
        "| model | critic | GPUs | GB each: whole | --shard | GB sent each: whole | --shard | s: whole | --shard"
        " | s to compute |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    work = tree_work(50, [73] * 10, [320] * 10, 4)
    for name, config in QWEN.items():
        for separate, ranks in ((separate, ranks) for separate in (True, False) for ranks in RANKS):
            flops = 256 * 4 / 3 * update_flops(config, work.trained, work.decoded, work.train_pairs, separate)
            bytes_, sent, seconds = [], [], []
            for shard in (False, True):
                need, fits, moved = scaling_row(config, ranks, shard, separate, gb)
                bytes_.append(f"**{need / 1e9:.1f}**" if fits else f"{need / 1e9:.1f}")
                sent.append(f"{sum(moved) / 1e9:,.0f}")
                seconds.append(f"{sum(moved) / (NVLINK if ranks <= 8 else INFINIBAND):.1f}")
            compute = f"{flops / ranks / PEAK_FLOPS['H100']:.0f}"
            cells = [name, "separate" if separate else "shared", str(ranks), *bytes_, *sent, *seconds, compute]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(scaling_table())
