"""The published run on paper: hours, bottleneck, calls and price on 1, 8 and 64 GPUs and for simulators of any speed.

    python -m benchmarks.published_run                       3,821 personas x 10 turns x 4 candidates, Qwen2.5-3B
    python -m benchmarks.published_run --minibatch 64 --gpus 64 --capacities 1000

Nothing here is measured: it is arithmetic from the assumptions below, every one of them a flag. Three procedures:

    parked      each token once (token tree, KV kept over turns and shared by candidates); a dialogue that waits for
                the simulator or the judge is parked with its KV while others decode
    lock-step   the same tokens, but all dialogues decode, then all wait for verdicts, then all wait for their users
    published   lock-step, each prompt prefilled anew for each turn and candidate, and one row per candidate in training

One rollout batch is simulated on one GPU with its share of dialogues and of the simulator's capacity, parked event by
event; the run is as many of them. Work counts are those of `dry_run/memory.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import inspect
import math
import random
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.scaling_table import row_work
from command_line.exits import lasting_output
from dry_run.memory import Work, calls, policy_parameters, tree_work, trunk_flops, trunk_parameters
from model import Qwen2Config

QWEN_3B = Qwen2Config(151_936, 2048, 11_008, 36, 16, 2, tie_word_embeddings=True)


@dataclass
class Assumptions:
    """All that the prediction rests on, flat."""

    personas: int = 3821  # of the published training set (notes/paper.md 1.7)
    turns: int = 10  # per dialogue (published)
    candidates: int = 4  # per turn (published)
    rollout_batch: int = 256  # dialogues per iteration, over all GPUs (published)
    minibatch: int = 4  # dialogues per optimizer step, over all GPUs, of the tree: 160 samples
    published_minibatch: int = 128  # samples per optimizer step (published)
    config: str = ""  # folder with config.json of policy, critic and reference; empty: Qwen2.5-3B
    # tokens, by the Qwen-2.5 tokenizer
    system_tokens: int = 61  # dialogue.SYSTEM_PROMPT with its seams: counted
    user_tokens: int = 30  # a user message's text: at most three sentences; assumed
    seam_tokens: int = 9  # ChatML around a user message and before a reply: counted
    markup_tokens: int = 14  # tags of profile and response and the closing token: counted
    response_tokens: int = 60  # a reply's response: assumed
    facts: float = 12.5  # profile lines in the end; ALOE: 4.8 sentences of a profile, 7.7 of a personality
    line_tokens: float = 14.0  # per profile line; ALOE: 13.6 per sentence
    disclosed_share: float = 0.15  # of the facts per turn after the first (published)
    length_spread: float = 0.3  # standard deviation of a reply's log-length; assumed
    # GPU
    gpus: str = "1,8,64"  # GPU counts, one table each
    flops: float = 790e12  # dense bf16 FLOP/s that products reach (H100, H200: notes/kernels.md 2)
    mfu: float = 0.45  # share of it in prefill and training; assumed
    bandwidth: float = 4.3e12  # bytes/s that copies reach (H200; an H100 about 3.0e12)
    bandwidth_share: float = 0.6  # share of it in decoding; engines reach 0.5 to 0.7 (notes/kernels.md 3)
    decode_dialogues: int = 64  # dialogues whose candidates decode together on one GPU
    recompute: bool = True  # activation checkpointing: a second forward in the update
    node_gpus: int = 8  # GPUs joined by the fast link
    fast_link: float = 450e9  # bytes/s per GPU within a node
    slow_link: float = 50e9  # bytes/s per GPU between nodes
    # simulator and judge: one endpoint
    capacities: str = "10,100,1000,10000"  # replies/s of the endpoint, user and judge together; one row each
    latency: float = 1.0  # seconds from request to reply when nothing queues; assumed
    judge_calls: int = 2  # per candidate: profile and response (published); 0: judged by rule
    max_concurrency: int = 1024  # requests in flight per GPU's process (the trainer's default is 64)
    published_judge_batch: int = 16  # samples whose judge calls the published code makes at a time, per GPU
    published_user_threads: int = 64  # user replies that it asks for at a time
    user_prompt: int = 230  # role prompt without its facts: counted, as are the next four
    response_prompt: int = 186  # response judge's prompt without profile, dialogue and reply
    profile_prompt: int = 67  # profile judge's prompt without its two lists
    response_verdict: int = 37  # tokens of the five verdicts
    profile_verdict: int = 6  # tokens of the count
    price_in: float = 0.15  # dollars per million tokens read (GPT-4o-mini's list price)
    price_out: float = 0.60  # dollars per million tokens written
    seed: int = 0  # of the reply lengths

    def __post_init__(self):
        for name in ("personas", "turns", "candidates", "rollout_batch", "minibatch", "decode_dialogues", "latency"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be positive")

    def lines(self, turn: int) -> float:
        """Return the profile lines of turn 0, 1, …: what has been disclosed by then."""
        return min(1.0, self.disclosed_share * turn) * self.facts

    def reply(self, turn: int) -> int:
        """Return the mean tokens of one candidate of a turn.

        >>> [Assumptions().reply(turn) for turn in (0, 1, 9)]
        [74, 100, 249]
        """
        return round(self.markup_tokens + self.response_tokens + self.lines(turn) * self.line_tokens)

    def model(self) -> Qwen2Config:
        """Return the models' shape."""
        return Qwen2Config.from_file(self.config) if self.config else QWEN_3B


def numbers(text: str) -> list[float]:
    """Read a comma-separated flag.

    >>> numbers("1,8")
    [1.0, 8.0]
    """
    return [float(number) for number in text.split(",")]


def parse_args(argv: Sequence[str] | None = None) -> Assumptions:
    """Read flags into Assumptions; each field is a flag, and its comment the help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Assumptions), re.MULTILINE))
    for f in dataclasses.fields(Assumptions):
        kind = type(f.default)
        options = {"type": kind, "metavar": kind.__name__.upper()}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        shown = f"{comments[f.name]} [{f.default}]".replace("%", "%%")
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, help=shown, **options)
    try:
        return Assumptions(**vars(parser.parse_args(argv)))
    except ValueError as error:
        parser.error(str(error))


# ----------------------------------------------------------------------------------------------------------- arithmetic


def dialogue(a: Assumptions) -> tuple[int, list[int], list[int], int]:
    """Return system tokens, user tokens and reply tokens per turn, and candidates, as dry_run/memory.py does."""
    user = [a.user_tokens + a.seam_tokens] * a.turns
    return a.system_tokens, user, [a.reply(turn) for turn in range(a.turns)], a.candidates


def work_of(a: Assumptions, published: bool) -> Work:
    """Return the mean work of one dialogue; the published history keeps only the newest profile."""
    if published:
        return row_work(*dialogue(a), kept=[a.response_tokens] * a.turns)
    return tree_work(*dialogue(a))


def training_flops(a: Assumptions, config: Qwen2Config, work: Work, published: bool) -> tuple[float, float]:
    """Return FLOP per dialogue of statistics and of one update: trunks of policy, critic and reference, and heads.

    Statistics: three forwards, and the logits of policy and reference. Update: forward, backward (twice a forward) and,
    with checkpointing, a second forward, of policy and critic; three head products. The published code computes logits
    of all tokens of a row, this one of the sampled ones.
    """
    forward = trunk_flops(config, work.trained, work.train_pairs)
    product = 2 * config.hidden_size * config.vocab_size * (work.trained if published else work.decoded)
    return 3 * forward + 2 * product, 2 * (3 + a.recompute) * forward + 3 * product


def optimizer_seconds(a: Assumptions, config: Qwen2Config, gpus: int) -> float:
    """Return the seconds of one AdamW step of policy and critic (30 bytes a parameter) and of the sum of gradients."""
    parameters = policy_parameters(config) + trunk_parameters(config)
    link = a.fast_link if gpus <= a.node_gpus else a.slow_link
    exchange = 2 * 4 * parameters * (gpus - 1) / gpus / link  # ring all-reduce in fp32
    return 30 * parameters / (a.bandwidth * a.bandwidth_share) + exchange


def training_seconds(a: Assumptions, config: Qwen2Config, gpus: int, published: bool) -> float:
    """Return the seconds of statistics and update of one rollout batch; a mini-batch cannot use more GPUs than it has
    dialogues (published: rows)."""
    statistics, update = training_flops(a, config, work_of(a, published), published)
    rate, rows = a.flops * a.mfu, a.turns * a.candidates
    size, share = (a.published_minibatch, 1 / rows) if published else (a.minibatch, 1.0)  # share of a dialogue's work
    steps = math.ceil(a.rollout_batch / share / size)
    per_step = math.ceil(size / gpus) * share * update / rate + optimizer_seconds(a, config, gpus)
    return math.ceil(a.rollout_batch / gpus) * statistics / rate + steps * per_step


def decode_seconds(a: Assumptions, config: Qwen2Config, rows: int, kv_tokens: float) -> float:
    """Return the seconds of one decode step: weights once or their products, whichever is longer, and keys and values.

    >>> a = Assumptions(mfu=1, bandwidth_share=1)   # the floor of notes/kernels.md: 2.00 ms
    >>> round(1e3 * decode_seconds(a, QWEN_3B, 64, 64 * 1024), 2)
    2.0
    """
    weights = policy_parameters(config)
    kv_token = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # bytes, bf16
    bandwidth = a.bandwidth * a.bandwidth_share
    return max(2 * weights / bandwidth, 2 * weights * rows / (a.flops * a.mfu)) + kv_tokens * kv_token / bandwidth


def api_price(a: Assumptions) -> float:
    """Return the dollars of all simulator and judge calls of the run: tokens read and written, times their prices."""
    exchange = a.user_tokens + a.response_tokens + 8  # of visible dialogue, with the two messages' seams
    persona = a.facts * a.line_tokens
    read = written = 0.0
    for turn in range(a.turns):
        profile, n = a.lines(turn) * a.line_tokens, a.candidates
        if turn:
            read, written = read + a.user_prompt + persona + turn * exchange, written + a.user_tokens
        if a.judge_calls:
            read += n * (a.response_prompt + profile + (turn + 1) * exchange)
            written += n * a.response_verdict
        if a.judge_calls > 1:
            read += n * (a.profile_prompt + persona + profile)
            written += n * a.profile_verdict
    return a.personas * (read * a.price_in + written * a.price_out) / 1e6


# ---------------------------------------------------------------------------------------------- rollout, event by event


class Rollout(NamedTuple):
    """One rollout batch on one GPU."""

    seconds: float
    busy: float  # seconds in which the GPU computed
    chain: float  # seconds of latency one after another, were nothing to queue
    requests: int


class Endpoint:
    """Simulator and judge: replies in the order of requests, `rate` a second, each `latency` after its turn."""

    def __init__(self, rate: float, latency: float):
        self.rate, self.latency, self.free, self.requests = rate, latency, 0.0, 0

    def ask(self, now: float) -> float:
        """Send one request; return when its reply is there."""
        start = max(now, self.free)
        self.free, self.requests = start + 1 / self.rate, self.requests + 1
        return start + self.latency


def endpoint_rate(a: Assumptions, capacity: float, gpus: int) -> float:
    """Return the replies/s that one GPU's process can get: its share of the capacity, or what it may have in flight."""
    return min(capacity / gpus, a.max_concurrency / a.latency)


def draw_lengths(a: Assumptions, dialogues: int) -> list[list[list[int]]]:
    """Draw reply lengths [dialogue][turn][candidate], log-normal about the turn's mean."""
    rng, s = random.Random(a.seed), a.length_spread
    return [
        [
            [max(1, round(a.reply(t) * rng.lognormvariate(-s * s / 2, s))) for _ in range(a.candidates)]
            for t in range(a.turns)
        ]
        for _ in range(dialogues)
    ]


def parked_rollout(a: Assumptions, config: Qwen2Config, gpus: int, capacity: float) -> Rollout:
    """Play one GPU's dialogues; whoever waits for a reply is parked, and the GPU decodes what is ready.

    All active rows take one token per step, so a row that begins at step s ends at step s + its length. A candidate's
    judge calls go out when it is finished, the next user's call when all verdicts are there.
    """
    dialogues = math.ceil(a.rollout_batch / gpus)
    lengths, endpoint = draw_lengths(a, dialogues), Endpoint(endpoint_rate(a, capacity, gpus), a.latency)
    grown = a.user_tokens + a.seam_tokens
    turn, missing, prefix = [0] * dialogues, [0] * dialogues, [a.system_tokens] * dialogues  # per dialogue
    running = [0] * dialogues  # candidates that still decode
    ready, replies, ends = deque(range(dialogues)), [], []  # (time, dialogue, is user), (step, dialogue)
    now, busy, step, done, active, kv_prefix = 0.0, 0.0, 0, 0, 0, 0

    def take(reply: tuple[float, int, bool]) -> int:
        """Take in a reply; return 1 if it was the last of its dialogue."""
        _, d, is_user = reply
        if is_user:
            ready.append(d)
            return 0
        missing[d] -= 1
        return 0 if missing[d] else next_turn(d)

    def next_turn(d: int) -> int:
        """Ask the user for the next message; return 1 if the dialogue is over."""
        prefix[d] += sum(lengths[d][turn[d]]) // a.candidates
        turn[d] += 1
        if turn[d] == a.turns:
            return 1
        heapq.heappush(replies, (endpoint.ask(now), d, True))
        return 0

    while done < dialogues:
        while replies and replies[0][0] <= now:
            done += take(heapq.heappop(replies))
        while ready and active < a.decode_dialogues:
            d = ready.popleft()
            new = grown + (0 if turn[d] else a.system_tokens)
            flops = trunk_flops(config, new, new * (prefix[d] + new / 2))
            now, busy = now + flops / (a.flops * a.mfu), busy + flops / (a.flops * a.mfu)
            prefix[d] += grown
            active, kv_prefix, running[d] = active + 1, kv_prefix + prefix[d], a.candidates
            missing[d] = a.candidates * a.judge_calls
            for length in lengths[d][turn[d]]:
                heapq.heappush(ends, (step + length, d))
        if not ends:
            now = replies[0][0] if replies else now  # all wait
            continue
        own = len(ends) * a.reply(a.turns // 2) / 2  # a row is on average half grown
        seconds = decode_seconds(a, config, len(ends), kv_prefix + own)
        steps = ends[0][0] - step
        if replies and replies[0][0] < now + steps * seconds:  # stop where a reply comes in
            steps = min(steps, max(1, math.ceil((replies[0][0] - now) / seconds)))
        step, now, busy = step + steps, now + steps * seconds, busy + steps * seconds
        while ends and ends[0][0] == step:
            _, d = heapq.heappop(ends)
            running[d] -= 1
            for _ in range(a.judge_calls):
                heapq.heappush(replies, (endpoint.ask(now), d, False))
            if not running[d]:
                active, kv_prefix = active - 1, kv_prefix - prefix[d]
                if not a.judge_calls:
                    done += next_turn(d)
    chain = (a.turns - 1 + a.turns * (a.judge_calls > 0)) * a.latency
    return Rollout(now, busy, chain, endpoint.requests)


def burst_seconds(a: Assumptions, config: Qwen2Config, rows: Sequence[tuple[int, int]], shared: bool) -> float:
    """Return the seconds to decode (prefix, length) rows, as many at a time as fit, until the longest has ended.

    `shared`: candidates read their common prefix once.
    """
    slots, waiting, ends = a.decode_dialogues * a.candidates, deque(rows), []
    seconds, step, kv = 0.0, 0, 0.0
    while waiting or ends:
        while waiting and len(ends) < slots:
            prefix, length = waiting.popleft()
            read = prefix / (a.candidates if shared else 1) + length / 2
            heapq.heappush(ends, (step + length, read))
            kv += read
        end, read = heapq.heappop(ends)
        seconds += (end - step) * decode_seconds(a, config, len(ends) + 1, kv)
        step, kv = end, kv - read
    return seconds


def lockstep_rollout(a: Assumptions, config: Qwen2Config, gpus: int, capacity: float, published: bool) -> Rollout:
    """Play one GPU's dialogues turn by turn: all decode, all are judged, all hear their users; the slowest rules.

    A wait lasts as long as its calls at the endpoint's rate, or as its rounds of simultaneous calls, if that is more.
    """
    dialogues, n = math.ceil(a.rollout_batch / gpus), a.candidates
    lengths, rate = draw_lengths(a, dialogues), endpoint_rate(a, capacity, gpus)
    judges, users = a.max_concurrency, a.max_concurrency  # calls at a time
    if published:  # its two judges are asked one after the other: a sample has one call in flight
        judges, users = a.published_judge_batch, a.published_user_threads / gpus
    seconds = busy = chain = requests = 0.0
    whole = work_of(a, published)
    prefill = dialogues * trunk_flops(config, whole.prefilled, whole.prefill_pairs) / (a.flops * a.mfu) / a.turns
    for t in range(a.turns):
        history = sum(a.response_tokens if published else a.reply(earlier) for earlier in range(t))
        prefix = a.system_tokens + (t + 1) * (a.user_tokens + a.seam_tokens) + history
        rows = [(prefix, length) for d in range(dialogues) for length in lengths[d][t]]
        compute = prefill + burst_seconds(a, config, rows, shared=not published)
        judged, heard = dialogues * n * a.judge_calls, dialogues * (t + 1 < a.turns)
        rounds = [math.ceil(judged / judges) * a.latency, math.ceil(heard / users) * a.latency]
        wait = max(judged / rate, rounds[0]) + max(heard / rate, rounds[1])
        seconds, busy, chain = seconds + compute + wait, busy + compute, chain + sum(rounds)
        requests += judged + heard
    return Rollout(seconds, busy, chain, int(requests))


# --------------------------------------------------------------------------------------------------------------- tables


class Prediction(NamedTuple):
    """One procedure on so many GPUs, with an endpoint of some capacity: the whole run."""

    hours: float
    bottleneck: str
    waiting: float  # share of the run in which GPUs wait for the endpoint


PROCEDURES = ("parked", "lock-step", "published")


def predict(a: Assumptions, gpus: int, capacity: float, procedure: str) -> Prediction:
    """Predict a run. The bottleneck is what would take longest if it were alone: the endpoint's rate, or how many
    requests may be in flight; a chain of latencies; sampling; or training, whose mini-batch may be too small to share.
    """
    config, published = a.model(), procedure == "published"
    if procedure == "parked":
        rollout = parked_rollout(a, config, gpus, capacity)
    else:
        rollout = lockstep_rollout(a, config, gpus, capacity, published)
    training = training_seconds(a, config, gpus, published)
    rate = endpoint_rate(a, capacity, gpus)
    small = (a.published_minibatch if published else a.minibatch) < gpus
    times = {
        "simulator" if rate == capacity / gpus else "requests in flight": rollout.requests / rate,
        "latency": rollout.chain,
        "sampling": rollout.busy,
        "update, mini-batch < GPUs" if small else "update": training,
    }
    total = rollout.seconds + training
    hours = a.personas / a.rollout_batch * total / 3600
    return Prediction(hours, max(times, key=times.get), (rollout.seconds - rollout.busy) / total)


def table(a: Assumptions, gpus: int) -> str:
    """Write the Markdown table of one GPU count."""
    simulator, judge = calls(a.personas, a.turns, a.candidates, a.judge_calls)
    lines = [
        f"**{gpus} GPU{'s' * (gpus > 1)}**\n",
        "| replies/s | hours | bottleneck | waiting | GPU-hours | lock-step, hours | published, hours | bottleneck"
        " | published ÷ parked | calls | price |",
        "|---:|---:|---|---:|---:|---:|---:|---|---:|---:|---:|",
    ]
    for capacity in numbers(a.capacities):
        ours, lock, theirs = (predict(a, gpus, capacity, procedure) for procedure in PROCEDURES)
        lines.append(
            f"| {capacity:,.0f} | {ours.hours:.2f} | {ours.bottleneck} | {ours.waiting:.0%} | {gpus * ours.hours:.1f}"
            f" | {lock.hours:.2f} | {theirs.hours:.2f} | {theirs.bottleneck} | {theirs.hours / ours.hours:.1f}"
            f" | {simulator + judge:,} | ${api_price(a):.0f} |"
        )
    return "\n".join(lines)


def work_table(a: Assumptions) -> str:
    """Write tokens and GPU-hours of each kind of work: the tree, the same dialogues as rows, and the published rows."""
    config, rate = a.model(), a.flops * a.mfu * 3600
    columns = []
    for work, published in ((work_of(a, False), False), (row_work(*dialogue(a)), True), (work_of(a, True), True)):
        statistics, update = (a.personas * x / rate for x in training_flops(a, config, work, published))
        prefill = a.personas * trunk_flops(config, work.prefilled, work.prefill_pairs) / rate
        columns.append([*(a.personas * n / 1e6 for n in work[:3]), prefill, statistics, update])
    names = [f"{name}, M tokens" for name in ("prefilled", "decoded", "trained")]
    names += [f"{name}, GPU-hours" for name in ("prefill", "statistics", "update")]
    lines = ["| | tree | rows | published | rows ÷ tree | published ÷ tree |", "|---|---:|---:|---:|---:|---:|"]
    for name, tree, rows, published in zip(names, *columns, strict=True):
        ratios = f"{rows / tree:.1f} | {published / tree:.1f}"
        lines.append(f"| {name} | {tree:.2f} | {rows:.2f} | {published:.2f} | {ratios} |")
    return "\n".join(lines)


@lasting_output()
def main(argv: Sequence[str] | None = None) -> None:
    """Print the work, then one table per GPU count."""
    a = parse_args(argv)
    print(work_table(a))
    for gpus in numbers(a.gpus):
        print(f"\n{table(a, int(gpus))}")


if __name__ == "__main__":
    main()
