"""Throughput against plain baselines: `python -m benchmarks.throughput [decode|update|iteration|latency|growth|all]`.

decode      `generate` against that of `transformers`: the tiny checkpoint, and the 0.5B shape with random weights
update      policy and critic, forward, backward and step: token trees against one row per turn and candidate
iteration   a whole iteration against the published procedure (`published.py`), with and without a slow user
latency     a rollout with a slow user against the larger of its compute and one dialogue's chain of waiting
growth      time and memory of an iteration as dialogues get longer

Every ratio is of two measurements of one run, on the same models and data, whose results are asserted to be equal.
Peaks are those of a child process each. Run it alone on the machine, with OMP_NUM_THREADS=1 (0.5B: two are set here).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import train_rlpa
from command_line.flags import TINY_CHECKPOINT, checkpoint_defaults
from config import Config
from dialogue import Dialogue
from kernels import ppo_head
from learners.weights import load_policy, save_pretrained
from model import Qwen2Config, random_policy
from packing import Packed, make_batches, pack
from records.state import State, setup
from sampler import generate
from simulator import Environment, open_environment

ROOT, TINY = Path(__file__).parents[1], str(TINY_CHECKPOINT)
QWEN_05B = Qwen2Config(151_936, 896, 4864, 24, 14, 2, tie_word_embeddings=True)
LATENCY = 0.2  # seconds per reply of the slow user


class Row(NamedTuple):
    """One line of the table: two measurements and their ratio; `bar` is "" where none is set."""

    part: str
    what: str
    ours: float
    other: float
    unit: str
    ratio: float
    bar: str = ""  # ">= 4" or "<= 1.25", of the ratio

    def met(self) -> str:
        """Say whether the bar is met."""
        if not self.bar:
            return ""
        sign, limit = self.bar.split()
        return "yes" if (self.ratio >= float(limit) if sign == ">=" else self.ratio <= float(limit)) else "NO"


def render(rows: list[Row]) -> str:
    """Lay rows out in Markdown."""
    lines = ["| part | what | ours | other | unit | ratio | bar | met |", "|---|---|---|---|---|---|---|---|"]
    for r in rows:
        lines.append(
            f"| {r.part} | {r.what} | {r.ours:,.4g} | {r.other:,.4g} | {r.unit} | {r.ratio:.3g} | {r.bar} | {r.met()} |"
        )
    return "\n".join(lines)


def seconds_of(work: Callable) -> float:
    """Return the seconds that `work()` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def interleaved(works: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Return the median seconds of each, measured in turns, so that a busy moment meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(seconds_of(work))
    return {name: statistics.median(found) for name, found in times.items()}


def in_child(function: Callable, *args):
    """Return function(*args), computed in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def memory_status(field: str) -> float:
    """Return a field of this process's memory in MiB: VmRSS now, VmHWM its peak.

    Not `ru_maxrss`: that of a fresh process begins at its parent's.
    """
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def forget_peak() -> None:
    """Let VmHWM begin anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# decode


Decoder = Callable[[list[list[int]], int, float], list[list[int]]]  # prompts, new tokens, temperature → their ids


def ours_decoder(folder: str, dtype: torch.dtype = torch.float32) -> Decoder:
    """Load a policy; the function samples so many ids for each prompt, with no stop."""
    policy = load_policy(folder, dtype=dtype)

    def sample(prompts: list[list[int]], new_tokens: int, temperature: float) -> list[list[int]]:
        arguments = dict(max_new_tokens=new_tokens, stop_ids=[], temperature=temperature, seeds=range(len(prompts)))
        return [draw.token_ids for draw in generate(policy, prompts, **arguments)]

    return sample


def transformers_decoder(folder: str, kind: str, dtype: torch.dtype = torch.float32) -> Decoder:
    """Do what `ours_decoder` does with `transformers`, and a "dynamic" or "static" cache."""
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

    @torch.no_grad()
    def sample(prompts: list[list[int]], new_tokens: int, temperature: float) -> list[list[int]]:
        token_ids = torch.tensor(prompts)
        how = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0) if temperature else {"do_sample": False}
        how |= {"cache_implementation": "static"} if kind == "static" else {}
        how |= dict(max_new_tokens=new_tokens, min_new_tokens=new_tokens, eos_token_id=None, pad_token_id=0)
        found = policy.generate(input_ids=token_ids, attention_mask=torch.ones_like(token_ids), **how)
        return found[:, token_ids.shape[1] :].tolist()

    return sample


def random_prompts(vocab_size: int, batch: int, context: int) -> list[list[int]]:
    """Draw prompts of one length."""
    return torch.randint(3, vocab_size, (batch, context), generator=torch.Generator().manual_seed(0)).tolist()


def decode(
    batch: int = 32, context: int = 256, new_tokens: int = 64, repeats: int = 7, folder: str = TINY
) -> list[Row]:
    """Compare tokens/s: of whole calls, and of decode steps alone (less a call for one token)."""
    torch.set_num_threads(1)
    prompts = random_prompts(Qwen2Config.from_file(folder).vocab_size, batch, context)
    decoders = {"ours": ours_decoder(folder)}
    decoders |= {kind: transformers_decoder(folder, kind) for kind in ("dynamic", "static")}
    greedy = {name: sample(prompts[:4], 8, 0.0) for name, sample in decoders.items()}
    assert greedy["ours"] == greedy["dynamic"] == greedy["static"], "not the same model"
    works = {(name, n): lambda s=sample, n=n: s(prompts, n, 1.0) for name, sample in decoders.items()
             for n in (1, new_tokens)}  # fmt: skip
    interleaved(works, 1)
    found = interleaved(works, repeats)
    whole = {name: batch * new_tokens / found[name, new_tokens] for name in decoders}
    steps = {name: batch * (new_tokens - 1) / (found[name, new_tokens] - found[name, 1]) for name in decoders}
    rows = []
    for what, rate in (("whole call", whole), ("decode steps", steps)):
        best = max(("dynamic", "static"), key=rate.get)
        what = f"{what}, batch {batch}, context {context}, {new_tokens} tokens; transformers, {best} cache"
        rows.append(Row("decode", what, rate["ours"], rate[best], "tokens/s", rate["ours"] / rate[best], ">= 4"))
    return rows


@cache
def loaded_decoder(kind: str, folder: str, threads: int, dtype: torch.dtype = torch.float32) -> Decoder:
    """Load a decoder, once per process."""
    torch.set_num_threads(threads)
    return ours_decoder(folder, dtype) if kind == "ours" else transformers_decoder(folder, kind, dtype)


def warm_up(prompts: list[list[int]], *decoder) -> tuple[list[list[int]], float]:
    """Load a decoder in this process; return what it draws greedily, and the peak so far, which is forgotten."""
    greedy = loaded_decoder(*decoder)(prompts, 4, 0.0)
    peak = memory_status("VmHWM")
    forget_peak()
    return greedy, peak


def step_seconds(prompts: list[list[int]], new_tokens: int, *decoder) -> float:
    """Return the seconds of one decode step: a call less a call for one token."""
    sample = loaded_decoder(*decoder)
    short = seconds_of(lambda: sample(prompts, 1, 1.0))
    return (seconds_of(lambda: sample(prompts, new_tokens + 1, 1.0)) - short) / new_tokens


def decode_large(config: Qwen2Config = QWEN_05B, batch: int = 8, context: int = 16, new_tokens: int = 16,
                 threads: int = 2, repeats: int = 3) -> list[Row]:  # fmt: skip
    """Compare decode steps and peak memory at a shape where reading the weights rules; a process each, in turns."""
    prompts, kinds = random_prompts(config.vocab_size, batch, context), ("ours", "dynamic", "static")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        save_random(config, folder)
        pools = {kind: stack.enter_context(ProcessPoolExecutor(1, mp_context=get_context("spawn"))) for kind in kinds}

        def ask(kind: str, function: Callable, *arguments):
            return pools[kind].submit(function, *arguments).result()

        loading = {kind: pools[kind].submit(warm_up, prompts, kind, folder, threads) for kind in kinds}  # side by side
        warm = {kind: found.result() for kind, found in loading.items()}
        assert warm["ours"][0] == warm["dynamic"][0] == warm["static"][0], "not the same model"
        rounds = [{kind: ask(kind, step_seconds, prompts, new_tokens, kind, folder, threads) for kind in kinds}
                  for _ in range(repeats)]  # fmt: skip
        peaks = {kind: ask(kind, memory_status, "VmHWM") for kind in kinds}
    rate = {kind: batch / statistics.median(found[kind] for found in rounds) for kind in kinds}
    best = max(("dynamic", "static"), key=rate.get)
    what = f"D {config.hidden_size}, batch {batch}, context {context}, {threads} threads; transformers, {best} cache"
    ours, other = peaks["ours"], peaks[best]
    loaded = warm["ours"][1], warm[best][1]
    return [
        Row("decode", f"steps, {what}", rate["ours"], rate[best], "tokens/s", rate["ours"] / rate[best], ">= 1"),
        Row("decode", "  peak while sampling", ours, other, "MiB", ours / other, "<= 1"),
        Row("decode", "  peak until loaded and warm", *loaded, "MiB", loaded[0] / loaded[1], "<= 1"),
    ]


def save_random(config: Qwen2Config, folder: str) -> None:
    """Write a checkpoint of random weights."""
    save_pretrained(random_policy(config, seed=0), folder)


# ---------------------------------------------------------------------------------------------------------------------
# worlds to play in


@contextmanager
def slow_user(seconds: float) -> Iterator[str]:
    """Run the embedded user in a process of its own, each reply `seconds` late; gives its URL."""
    command = [sys.executable, "-m", "benchmarks.slow_user", str(seconds)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
    try:
        yield process.stdout.readline().split()[-1]
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


def bench_config(dialogues: int, turns: int, n: int = 4, **settings) -> Config:
    """Return the tiny checkpoint's settings with the published credit, rewards and KL, for one iteration."""
    settings = dict(credit="turn", reward_at="turn", kl_coef=0.01, num_personas=256, eval_dialogues=1) | settings
    sizes = dict(rollout_batch_size=dialogues, minibatch_size=min(4, dialogues), max_turns=turns, num_candidates=n)
    defaults = checkpoint_defaults(Path(TINY))
    return Config(**(defaults | settings | sizes | {"ckpt": TINY, "num_iterations": 1}))


@contextmanager
def world_of(config: Config, latency: float = 0.0) -> Iterator[tuple[State, Environment]]:
    """Open the world of a user that takes `latency` seconds, and set a fresh run up in it."""
    with slow_user(latency) as url:
        config = replace(config, simulator_url=url)
        with open_environment(config) as env:
            yield setup(config, env), env


def play(state: State) -> list[Dialogue]:
    """Play the dialogues of a state's next iteration."""
    dialogues, config = train_rlpa.persona_batch(state), state.config
    how = train_rlpa.Play(config.num_candidates, config.temperature, (config.seed, "train", state.iteration))
    train_rlpa.rollout(state.policy.model, state.chat, dialogues, how, config, state.env)
    return dialogues


def drawn(dialogues: list[Dialogue]) -> list:
    """Return all that was said, to compare."""
    return [[(t.user_text, t.chosen, [c.token_ids for c in t.candidates]) for t in d.turns] for d in dialogues]


# ---------------------------------------------------------------------------------------------------------------------
# update


def trained_samples(dialogue: Dialogue, p: Packed, config: Config) -> list:
    """Return the rows of a packed dialogue, with the statistics that were computed over its tree."""
    from benchmarks.published import samples_of

    samples = samples_of(dialogue, config)
    for sample, span in zip(samples, p.spans, strict=True):
        for name in ("old_logprobs", "values", "advantages", "returns"):
            setattr(sample, name, getattr(p, name)[span.start : span.stop])
    return samples


def per_turn_update(state: State, samples: list, count: float, most_tokens: int) -> None:
    """Take the step of `train_rlpa.minibatch_update` with the same models and kernels, fed padded rows."""
    from benchmarks.published import gathered, microbatches, right_padded, value_loss

    config, policy, critic = state.config, state.policy, state.critic
    for learner in (policy, critic):
        learner.optimizer.zero_grad()
    for batch in microbatches(samples, most_tokens):
        token_ids, rows, columns = right_padded(batch)
        hidden, targets = policy.model(token_ids)[rows, columns], token_ids[rows, columns + 1]
        known = [gathered(batch, name) for name in ("old_logprobs", "advantages", "old_logprobs")]
        losses = functools.partial(train_rlpa.token_losses, config=config)
        loss, _ = ppo_head(hidden, policy.model.head_weight, targets, losses, known, temperature=config.temperature)
        (loss / count).backward()
        values = critic.model(token_ids)[rows, columns]
        (value_loss(values, batch, config.value_clip) / count).backward()
    for learner in (policy, critic):
        train_rlpa.optimizer_step(learner, 0.0, config.max_grad_norm)


def gradients(state: State) -> list[Tensor]:
    """Copy the gradients of policy and critic."""
    return [p.grad.clone() for learner in (state.policy, state.critic) for p in learner.model.parameters()]


def relative_error(ours: list[Tensor], other: list[Tensor]) -> float:
    """Return the largest difference over the largest gradient."""
    largest = max(g.abs().max() for g in other)
    return float(max((a - b).abs().max() for a, b in zip(ours, other, strict=True)) / largest)


def update(dialogues: int = 4, turns: int = 10, n: int = 4, repeats: int = 3,
           row_tokens: tuple[int, ...] = (2048, 8192, 32768)) -> list[Row]:  # fmt: skip
    """Compare one optimizer step on one mini-batch; the rows' micro-batch size is the best of `row_tokens`."""
    # lr 0, no clipping: the weights stay, and the gradients can be compared
    config = bench_config(dialogues, turns, n, minibatch_size=dialogues, max_grad_norm=1e9)
    with world_of(config) as (state, _):
        played = [d for d in play(state) if d.dropped is None]
        config = state.config
        packed = [pack(d, config) for d in played]
        batches = make_batches(packed, config)  # one mini-batch
        train_rlpa.add_statistics(batches, state.policy.model, state.ref_policy, state.critic.model, config)
        for p in packed:
            train_rlpa.add_advantages(p, config)
        train_rlpa.whiten_advantages(packed)
        samples = [s for d, p in zip(played, packed, strict=True) for s in trained_samples(d, p, config)]
        count = float(sum(s.sampled for s in samples))

        def by_trees() -> None:
            arguments = state.policy, state.critic, batches[0], count, 0.0, config, True, state.ref_policy
            train_rlpa.minibatch_update(*arguments)

        works = {"trees": by_trees} | {size: lambda size=size: per_turn_update(state, samples, count, size)
                                       for size in row_tokens}  # fmt: skip
        computed = {}
        for name, work in works.items():  # a warm-up, too
            work()
            computed[name] = gradients(state)
        error = max(relative_error(computed["trees"], computed[size]) for size in row_tokens)
        assert error < 1e-5, f"gradients differ by {error:.1e}"
        found = interleaved(works, repeats)
    best = min(row_tokens, key=found.get)
    tokens = sum(len(p.token_ids) for p in packed), sum(len(s.token_ids) for s in samples)
    what = f"{dialogues} dialogues, {turns} turns, n = {n}"
    return [
        Row("update", f"tokens, {what}", *tokens, "tokens", tokens[1] / tokens[0], ">= 5"),
        Row("update", f"one step; rows in micro-batches of {best:,} tokens", found["trees"], found[best], "s",
            found[best] / found["trees"], ">= 4"),
        Row("update", "largest difference of gradients", error, 1e-5, "of the largest", error / 1e-5, "<= 1"),
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# iteration


PHASES = ("sampling", "waiting", "rewards", "statistics", "update")


def iteration(dialogues: int = 32, turns: int = 10, n: int = 4, latency: float = 0.0, bar: str = "",
              generate_rows: int = 128, most_tokens: int = 8192, **settings) -> list[Row]:  # fmt: skip
    """Compare one whole iteration, ours run before and after the published one.

    Replies are used as they come, so rounding may change a dialogue in some runs: then measure again. `settings` such
    as reply_steps=4 exclude that.
    """
    config = bench_config(dialogues, turns, n, **settings)
    with world_of(bench_config(2, 2, n)) as (state, _):
        train_rlpa.run_iteration(state)  # warm-up
    ours = []
    with world_of(config, latency) as (state, env):
        from benchmarks.published import Published

        published = Published(state, generate_rows, most_tokens)
        initial = state.critic.model.state_dict(), state.policy.model.state_dict()
        assert all(torch.equal(published.policy.state_dict()[k], v) for k, v in initial[1].items())
        ours.append(train_rlpa.run_iteration(state))
        theirs, played = published.run_iteration(ours[0][1])
        error = updated_difference(state, published, played)
    with world_of(config, latency) as (state, env):
        ours.append(train_rlpa.run_iteration(state))
    assert drawn(played) == drawn(ours[0][1]) == drawn(ours[1][1]), "not the same dialogues"
    metrics = {key: statistics.mean(found[key] for found, _ in ours) for key in ours[0][0]}
    assert theirs["action_tokens"] == metrics["action_tokens"], "not the same tokens trained on"
    assert error < 1e-3, f"the trained policies differ by {error:.1e} nats"
    for key in ("kl_ref", "policy_loss", "value_loss"):
        assert abs(theirs[key] - metrics[key]) < 1e-3, f"{key}: {theirs[key]} against {metrics[key]}"
    seconds = metrics["seconds"], theirs["seconds"]
    name, waits = "iteration", f", user {latency * 1e3:.0f} ms" if latency else ""
    what = f"{dialogues} dialogues, {turns} turns, n = {n}{waits}"
    rows = [Row(name, what, *seconds, "s", seconds[1] / seconds[0], bar)]
    for phase in PHASES:
        spent = metrics.get(f"seconds_{phase}", 0.0), published.seconds[phase]
        rows.append(Row(name, f"  {phase}", *spent, "s", spent[1] / spent[0] if spent[0] else float("nan")))
    tokens = metrics["tree_tokens"], float(theirs["tokens"])
    rows.append(Row(name, "  tokens per training pass", *tokens, "tokens", tokens[1] / tokens[0]))
    rows.append(Row(name, "  mean difference after the update", error, 1e-3, "nats", error / 1e-3))
    return rows


@torch.no_grad()
def updated_difference(state: State, published, played: list[Dialogue]) -> float:
    """Return the mean difference of the two trained policies' log-probs on one dialogue."""
    from benchmarks.published import right_padded, samples_of

    batch = samples_of(played[0], state.config)
    token_ids, rows, columns = right_padded(batch)
    logits = state.policy.model.logits(state.policy.model(token_ids)) / state.config.temperature
    ours = logits.log_softmax(-1)[rows, columns, token_ids[rows, columns + 1]]
    return (ours - published.logprobs(published.policy, batch)).abs().mean().item()


# ---------------------------------------------------------------------------------------------------------------------
# latency and growth


def latency(dialogues: int = 32, turns: int = 10, n: int = 4, seconds: float = LATENCY, repeats: int = 3,
            **settings) -> list[Row]:  # fmt: skip
    """Compare a rollout that waits with the larger of one that does not and one dialogue's chain of waiting.

    Rounding may change a dialogue, as in `iteration`.
    """
    config = bench_config(dialogues, turns, n, **settings)
    with world_of(config) as (quick, _), world_of(config, seconds) as (slow, _):
        assert drawn(play(quick)) == drawn(play(slow)), "latency changed the dialogues"
        found = interleaved({"quick": lambda: play(quick), "slow": lambda: play(slow)}, repeats)
    chain = (turns - bool(config.first_user_message)) * seconds
    floor = max(found["quick"], chain)
    what = f"rollout, {seconds * 1e3:.0f} ms; other: max(compute {found['quick']:.3g}, chain {chain:.3g})"
    return [Row("latency", what, found["slow"], floor, "s", found["slow"] / floor, "<= 1.25")]


def growth_child(dialogues: int, turns: int, n: int, most_tokens: int) -> dict[str, float]:
    """Run one iteration in this process; return its seconds, its split, and the memory before it and at its peak."""
    with world_of(bench_config(2, 2, n)) as (state, _):
        train_rlpa.run_iteration(state)  # warm-up
    with world_of(bench_config(dialogues, turns, n, max_new_tokens=most_tokens)) as (state, _):
        before = memory_status("VmRSS")
        forget_peak()
        metrics, played = train_rlpa.run_iteration(state)
        peak = memory_status("VmHWM")
    assert all(len(d.turns) == turns for d in played if d.dropped is None)
    return metrics | {"before": before, "peak": peak}


def growth(dialogues: int = 8, turns: tuple[int, ...] = (10, 40, 70), n: int = 4, most_tokens: int = 32) -> list[Row]:
    """Compare iterations of longer dialogues with the shortest; "other" is the shortest's.

    Replies are cut at `most_tokens`, so that all turns are about equally long: else they grow with the profile, and
    after some 30 turns the tiny checkpoint has no positions left.
    """
    short, *longer = turns
    base, rows = in_child(growth_child, dialogues, short, n, most_tokens), []
    for length in longer:
        found, bar = in_child(growth_child, dialogues, length, n, most_tokens), "<= 5" if length == 4 * short else ""
        what = f"{dialogues} dialogues, {length} turns against {short}, replies up to {most_tokens} tokens"
        rows.append(Row("growth", f"iteration, {what}", found["seconds"], base["seconds"], "s",
                        found["seconds"] / base["seconds"], bar))  # fmt: skip
        for phase in ("sampling", "statistics", "update"):
            spent = found[f"seconds_{phase}"], base[f"seconds_{phase}"]
            rows.append(Row("growth", f"  {phase}", *spent, "s", spent[0] / spent[1]))
        tokens = found["tree_tokens"], base["tree_tokens"]
        rows.append(Row("growth", "  tokens per training pass", *tokens, "tokens", tokens[0] / tokens[1]))
        peaks = found["peak"], base["peak"]
        rows.append(Row("growth", "  peak memory", *peaks, "MiB", peaks[0] / peaks[1], bar))
        beyond = peaks[0] - found["before"], max(1.0, peaks[1] - base["before"])  # it may fit in what was left over
        rows.append(Row("growth", "  peak beyond what it began with", *beyond, "MiB", beyond[0] / beyond[1]))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# command line


PARTS: dict[str, list[Callable[[], list[Row]]]] = {
    "decode": [decode, decode_large],
    "update": [update],
    "iteration": [lambda: iteration(bar=">= 8"), lambda: iteration(latency=LATENCY, bar=">= 12")],
    "latency": [latency],
    "growth": [growth],
}


def machine() -> str:
    """Say what was measured on, and how busy it was."""
    import transformers

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{versions}, {platform.machine()}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}"


def main() -> None:
    """Measure the parts that are asked for, print a table after each, and write all rows to --json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", default="all", choices=[*PARTS, "all"])
    parser.add_argument("--json", default="", help="file to write the figures to")
    options = parser.parse_args()
    records = []
    for part in PARTS if options.part == "all" else [options.part]:
        for measure in PARTS[part]:
            before, rows = machine(), measure()
            print(f"\n{before} (after: {os.getloadavg()[0]:.1f})\n{render(rows)}", flush=True)
            records += [row._asdict() | {"met": row.met(), "machine": before} for row in rows]
    if options.json:
        Path(options.json).write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
