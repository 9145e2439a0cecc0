"""Sampling, statistics and update of a real shape against their products: python -m benchmarks.floor smol|qwen05|FOLDER

    python -m benchmarks.floor smol --dialogues 16 --turns 4 --reply-tokens 96 --advantage grpo --dtype bfloat16
    python -m benchmarks.floor FOLDER --dialogues 8 --turns 3 --reply-tokens 80 --minibatch-size 8 --dtype float32

It records a rollout: random ids in trees of the given shape, whose log-probs are the policy's own. It samples as many
tokens, runs what `train_rlpa.run_iteration` runs behind a rollout, and times this machine's bare products in the same
run, at every shape that occurs. The floor is the time of torch's products, and of the attention's at their mean rate;
norms, gates, casts, AdamW and the optimizer's passes are not in it, and nor is attention while sampling. All other
flags are the trainer's. On a busy machine `--clock cpu` with
`--threads 1` compares CPU seconds, which other programs hardly touch.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

import train_rlpa
from benchmarks import measure
from command_line.flags import make_parser
from config import Config, has_own_trunk
from dialogue import Candidate, Dialogue, Turn
from kernels.ppo_head import WORKSPACE
from learners.learner import Learner, make_learner
from learners.loading import adapt, compute_dtype, keep_freed_memory, load_models, load_or_make_critic, set_threads
from model import Qwen2Config, Qwen2ForCausalLM, random_policy
from packing import Batch, make_batches, pack
from sampler import Sampler

SHAPES = {
    "smol": Qwen2Config(49_152, 576, 1536, 30, 9, 3, 8192, 1e5, 1e-5, tie_word_embeddings=True),
    "qwen05": Qwen2Config(151_936, 896, 4864, 24, 14, 2, tie_word_embeddings=True),
}
CLOCKS, Clock = {"wall": "perf_counter", "cpu": "process_time"}, Callable[[], float]
bare_products = cache(measure.product_seconds)
SYSTEM, MESSAGE = 90, 25  # tokens of a system prompt, and of a user message with its ChatML seams


def recorded_rollout(vocab_size: int, config: Config, reply: int) -> list[Dialogue]:
    """Make dialogues of random ids, whose candidates all have `reply` tokens and random rewards."""
    generator = torch.Generator().manual_seed(config.seed)

    def ids(count: int) -> list[int]:
        return torch.randint(vocab_size, (count,), generator=generator).tolist()

    dialogues = []
    for i in range(config.rollout_batch_size):
        dialogue, history = Dialogue(i, f"random-{i}", ()), ids(SYSTEM)
        for _ in range(config.max_turns):
            history = history + ids(MESSAGE)
            rewards = torch.rand(config.num_candidates, generator=generator).tolist()
            candidates = [Candidate(token_ids=ids(reply), logprobs=[0.0] * reply, stop_reason="length", reward=reward,
                                    parts={"response": reward}) for reward in rewards]  # fmt: skip
            dialogue.turns.append(Turn("", history, candidates, chosen=rewards.index(max(rewards))))
            history = history + dialogue.turns[-1].winner.token_ids
        dialogues.append(dialogue)
    return dialogues


def load(name: str, config: Config) -> tuple[Learner, Learner | None, Qwen2ForCausalLM | None]:
    """Load policy, critic and reference of a folder, or draw those of a shape."""
    if name not in SHAPES:
        return load_models(config, None)
    shape, dtype = SHAPES[name], compute_dtype(config, "cpu")
    policy, critic, ref_policy = random_policy(shape, config.seed), None, None
    if config.lora_rank:
        models, ref_policy = adapt(policy.to(dtype).requires_grad_(False), config, None)
        policy, critic = models["policy"], models.get("critic")
    else:
        critic = load_or_make_critic(config, policy, None) if config.advantage == "gae" else None
        ref_policy = random_policy(shape, config.seed).to(dtype).requires_grad_(False) if config.kl_coef else None
    critic = critic and make_learner(critic, config.critic_lr, config, dtype)
    return make_learner(policy, config.lr, config, dtype), critic, ref_policy


class Rollout:
    """One recorded rollout, and what an iteration does behind it."""

    def __init__(self, name: str, config: Config, reply: int) -> None:
        self.config = config
        self.policy, self.critic, self.ref_policy = load(name, config)
        set_threads(self.policy.model, config)
        keep_freed_memory()
        self.reply, dialogues = reply, recorded_rollout(self.shape.vocab_size, config, reply)
        self.prompts = [[turn.prompt_ids for turn in dialogue.turns] for dialogue in dialogues]
        self.packed = [pack(dialogue, config) for dialogue in dialogues]
        self.batches = make_batches(self.packed, config)
        self.statistics(replace(config, old_logprobs="trainer"))  # a warm-up, too
        for p in self.packed:
            p.sampler_logprobs = p.old_logprobs

    @property
    def shape(self) -> Qwen2Config:
        return self.policy.model.config

    def sampling(self) -> None:
        """Sample as many candidates of as many tokens, turn by turn; the first one of each turn goes on."""
        n, size = self.config.num_candidates, len(self.prompts)
        sampler = Sampler(self.policy.sampled, n=n, max_new_tokens=self.reply, stop_ids=[], batch_size=size,
                          max_rows=size)  # fmt: skip
        told = [list(prompts[0]) for prompts in self.prompts]
        for turn in range(self.config.max_turns):
            for key, ids in enumerate(told):
                sampler.start(key, ids, range(n * key, n * key + n))
            draws = []
            while sampler.running:
                draws += sampler.step()
            for draw in (draw for draw in draws if draw.candidate == 0):
                sampler.adopt(draw.key, 0)
                told[draw.key] += draw.token_ids + self.prompts[draw.key][turn][:MESSAGE]

    def statistics(self, config: Config) -> None:
        """Do what `run_iteration` does before the update."""
        critic = self.critic and self.critic.model
        train_rlpa.add_statistics(self.batches, self.policy.model, self.ref_policy, critic, config)
        for p in self.packed:
            train_rlpa.add_advantages(p, config) if critic else train_rlpa.add_group_advantages(p, config)
        train_rlpa.whiten_advantages(self.packed, config.advantage)

    def update(self) -> None:
        """Run PPO over the rollout."""
        progress = (0, self.config.num_epochs * len(self.batches))
        train_rlpa.update(self.policy, self.critic, self.batches, self.config, progress, True, self.ref_policy)


# ---------------------------------------------------------------------------------------------------------- the floor


def trunk_products(shape: Qwen2Config) -> list[tuple[int, int, int]]:
    """Return (inputs, outputs, how often) of the products that a layer has of each token."""
    D, K, I = shape.hidden_size, shape.num_key_value_heads * shape.head_dim, shape.intermediate_size  # noqa: E741
    return [(D, D, 2), (D, K, 2), (D, I, 2), (I, D, 1)]


class Products:
    """Seconds of the bare products of one micro-batch, and the FLOP that are counted for it."""

    def __init__(self, shape: Qwen2Config, batch: Batch, dtype: torch.dtype, clock: Clock, rank: int) -> None:
        T, N, L = len(batch.inputs[0][0]), len(batch.targets), shape.num_hidden_layers
        few = min(T, 2048)  # tokens that are timed
        rows = max(1, min(N, WORKSPACE["cpu"] // (4 * shape.vocab_size)))
        self.trunk, self.head = [0.0] * 3, [0.0] * 3  # forward, gradient of the input, gradient of the weight
        self.adapters, self.adapters_flop, flop = 0.0, 0, 0  # of a forward: two products, of rank columns and terms
        for inputs, outputs, often in trunk_products(shape):
            flop += 2 * T * inputs * outputs * often * L
            self.adapters_flop += 2 * T * (inputs + outputs) * rank * often * L
            for i, seconds in enumerate(bare_products(few, inputs, outputs, dtype, "cpu", clock)):
                self.trunk[i] += seconds * often * L * T / few
            for size in ((inputs, rank), (rank, outputs)) if rank else ():
                self.adapters += bare_products(few, *size, dtype, "cpu", clock)[0] * often * L * T / few
        for i, seconds in enumerate(bare_products(rows, shape.hidden_size, shape.vocab_size, dtype, "cpu", clock)):
            self.head[i] = seconds * N / rows
        self.head_flop, self.trunk_flop = 2 * N * shape.hidden_size * shape.vocab_size, flop
        pairs = int(batch.inputs[1].sum()) + T  # a token sees its ancestors and itself
        self.attention_flop = 4 * pairs * shape.hidden_size * L
        self.rate = 3 * (self.trunk_flop + self.head_flop) / (sum(self.trunk) + sum(self.head))  # FLOP/s

    def forward(self, head: bool) -> tuple[float, float]:
        """Return seconds and FLOP of a forward, with the head's logits or without."""
        flop = self.trunk_flop + self.attention_flop + head * self.head_flop + self.adapters_flop
        return self.trunk[0] + self.adapters + head * self.head[0] + self.attention_flop / self.rate, flop

    def update(self, head: bool) -> tuple[float, float]:
        """Return seconds and FLOP of forward and backward, whose attention has five products where the forward has two.

        The frozen base of adapters has no gradients of its weights.
        """
        kinds = 2 if self.adapters else 3
        flop = kinds * (self.trunk_flop + head * self.head_flop) + 3.5 * self.attention_flop + 3 * self.adapters_flop
        seconds = sum(self.trunk[:kinds]) + head * sum(self.head[:kinds]) + 3 * self.adapters
        return seconds + 3.5 * self.attention_flop / self.rate, flop


def sampling_floor(rollout: Rollout, dtype: torch.dtype, clock: Clock) -> tuple[float, float]:
    """Return seconds and FLOP of the products of sampling: each new token of a prompt once, and every decode step."""
    shape, config, size = rollout.shape, rollout.config, len(rollout.prompts)
    rows, head = size * config.num_candidates, (shape.hidden_size, shape.vocab_size)
    new = [size * len(rollout.prompts[0][0])] + [size * (MESSAGE + 1)] * (config.max_turns - 1)  # tokens to prefill
    seconds = flop = 0.0
    for T, often in [*((T, 1) for T in new), (rows, (rollout.reply - 1) * config.max_turns)]:
        for inputs, outputs, each in trunk_products(shape):
            each *= shape.num_hidden_layers * often
            seconds += each * bare_products(T, inputs, outputs, dtype, "cpu", clock)[0]
            flop += 2 * T * inputs * outputs * each
        logits = size if often == 1 else rows  # of a prompt's last token
        seconds += often * bare_products(logits, *head, dtype, "cpu", clock)[0]
        flop += 2 * logits * head[0] * head[1] * often
    return seconds, flop


def floor(rollout: Rollout, dtype: torch.dtype, clock: Clock) -> dict[str, tuple[float, float]]:
    """Return seconds and FLOP of sampling, statistics, the update and all three, if all products were in `dtype`."""
    config, critic = rollout.config, rollout.critic and rollout.critic.model
    sampling = sampling_floor(rollout, dtype, clock)
    found, total = {"sampling": sampling, "statistics": [0.0, 0.0], "update": [0.0, 0.0]}, list(sampling)
    separate, shared = has_own_trunk(config), bool(critic) and not has_own_trunk(config)
    by_sampler = train_rlpa.sampler_is_exact(rollout.policy.sampled, config)
    left = train_rlpa.is_left_to_update(critic, config)
    for m, batch in ((m, batch) for m, minibatch in enumerate(rollout.batches) for batch in minibatch):
        own = not by_sampler and not (left and m == 0)  # the policy's log-probs are computed before the update
        heads = [own] * (own or shared) + [False] * separate + [True] * bool(rollout.ref_policy)
        products = Products(rollout.shape, batch, dtype, clock, config.lora_rank)
        parts = [("statistics", products.forward(head)) for head in heads]
        parts += [("update", products.update(head)) for head in [True] + [False] * separate] * config.num_epochs
        for name, part in parts:
            for i in range(2):
                found[name][i] += part[i]
                total[i] += part[i]
    return {name: tuple(part) for name, part in found.items()} | {"all": tuple(total)}


# ------------------------------------------------------------------------------------------------------- command line


def report(rollout: Rollout, repeats: int, clock: Clock) -> str:
    """Measure, and lay the figures out in Markdown."""
    parts = {"sampling": rollout.sampling, "statistics": lambda: rollout.statistics(rollout.config)}
    parts["update"] = rollout.update
    measured = {}
    for name, work in parts.items():
        timer = measure.Clock("cpu", clock)
        for _ in range(repeats):
            timer.time(work)
        measured[name] = timer.median()
    measured["all"] = sum(measured.values())
    own, floors = rollout.policy.sampled.head_weight.dtype, {}
    for dtype in (torch.float32, torch.bfloat16):
        if dtype == own or 2 * 512**3 / bare_products(512, 512, 512, dtype, "cpu", clock)[0] > 1e10:  # else: hours
            floors[dtype] = floor(rollout, dtype, clock)
    tokens = [sum(map(len, found)) for found in zip(*((p.token_ids, p.targets) for p in rollout.packed), strict=True)]
    lines = [
        f"{tokens[0]:,} tree tokens, {tokens[1]:,} action tokens, {torch.get_num_threads()} of {os.cpu_count()} cores,"
        f" load average {os.getloadavg()[0]:.1f}, torch {torch.__version__}",
        f"| {str(own)[6:]} | seconds | TFLOP |" + "".join(f" floor {str(dtype)[6:]} | ratio |" for dtype in floors),
        "|---" * (3 + 2 * len(floors)) + "|",
    ]
    for part, seconds in measured.items():
        cells = []
        for least, flop in (found[part] for found in floors.values()):
            rate = flop / least / 1e9 if least else 0.0
            cells += [f"{least:.2f} ({rate:.0f} GFLOP/s)", f"{seconds / least:.2f}" if least else ""]
        lines.append(f"| {part} | {seconds:.2f} | {floors[own][part][1] / 1e12:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Record a rollout, measure it and its floor, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", help=f"{', '.join(SHAPES)} with random weights, or a checkpoint's folder")
    parser.add_argument("--dialogues", type=int, default=4)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--reply-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than the shape has")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--profile", action="store_true", help="print torch's profile of an update instead")
    options, rest = parser.parse_known_args()
    sizes = dict(rollout_batch_size=options.dialogues, max_turns=options.turns)
    given = {"advantage": "grpo", "kl_coef": 0.0, "minibatch_size": options.dialogues}
    given |= vars(make_parser(Config, "").parse_args(rest)) | sizes
    folder = options.shape if options.shape in SHAPES else str(Path(options.shape).resolve())
    if options.layers:
        SHAPES[folder] = replace(SHAPES[folder], num_hidden_layers=options.layers)
    rollout = Rollout(options.shape, Config(**given, ckpt=folder), options.reply_tokens)
    if not options.profile:
        print(report(rollout, options.repeats, getattr(time, CLOCKS[options.clock])))
        return
    with torch.profiler.profile() as prof:
        rollout.update()
    print(prof.key_averages(group_by_input_shape=False).table(sort_by="self_cpu_time_total", row_limit=40))


if __name__ == "__main__":
    main()
