"""Sample many dialogues at once with a KV cache: candidates join and leave the batch at any step.

    start    a dialogue takes a row of the cache and queues its prompt; tokens that the row holds already are kept
    step     the queued prompts are prefilled, and every running candidate of every dialogue samples its next token
    adopt    the chosen candidate's keys and values stay in the row, behind the prompt; the others' are dropped

A dialogue that waits for its user keeps its row while others decode: it is parked. When memory is short, a parked
dialogue loses its row, and its whole prompt is computed again later. When every row is decoding, `start` returns False,
and the caller tries again later.

A candidate's tokens depend on its prompt and its seed, and neither on the other candidates nor on when it joined. There
is no top-k or top-p: while training data is collected, the sampled distribution must be the policy's own.

What the device knows of a running candidate is one column of seven integers, its lane: the token to feed next, that
token's position and slot, the number of tokens sampled, the cache row, row * n + candidate, and the seed.

Letters: B rows (dialogues) of the cache, n candidates of each, R running candidates (lanes), N packed tokens of a
prefill (all new tokens of the queued prompts), D hidden, V vocabulary.
"""

from __future__ import annotations

import math
import os
from collections import Counter, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from config import Config
from dialogue import ChatTokenizer
from kernels.backend import send, use_triton
from kernels.cpu import HEAD_DIMS, CachedTrunk, decodes
from kernels.prefill_attention import Chunk, Chunks
from kernels.rows import Rows
from kernels.sample_head import draw_uniforms, sample_head
from learners.lora import adapters
from learners.processes import world_size
from model import Cached, KVCache, Qwen2ForCausalLM, join_products, rope_tables

PREFILL_TOKENS = 8192  # most tokens of one prefill; a longer prompt goes alone
BUCKETS = (1, 2, 4, 8, *range(16, 1025, 16))  # numbers of candidates that a CUDA graph is captured for
NOT_FINITE = "the policy computes NaN or infinity: its weights are out of range; go on from an earlier checkpoint"
TOKEN, POSITION, SLOT, STEP, ROW, PLACE, SEED = range(7)  # the seven rows of `lanes`


@dataclass
class Draw:
    """One candidate: what it has sampled so far, and why it ended."""

    key: int  # its dialogue
    candidate: int
    token_ids: list[int] = field(default_factory=list)  # the stop id included
    logprobs: list[float] = field(default_factory=list)  # nats, of each sampled id
    stop_reason: str = ""  # "stop": it sampled a stop id; "length": it has max_new_tokens; "": it is still running


@dataclass
class Row:
    """What a row of the cache holds: the ids of a dialogue, and the candidates of its current turn."""

    key: int
    token_ids: list[int]  # their keys and values are stored, from slot 0 on; the candidates' lie behind them
    draws: list[Draw] = field(default_factory=list)

    @property
    def running(self) -> bool:
        """Say whether one of the candidates is still running."""
        return any(not draw.stop_reason for draw in self.draws)


class Sent(NamedTuple):
    """Tensors on their way to the host, and the event of their arrival; None: they are there."""

    tensors: list[Tensor]
    arrived: torch.cuda.Event | None


class Sampler:
    """Rows of a KV cache, and the candidates that are decoding in them.

    Args:
        policy: the model that samples; its weights must not change while the sampler is used.
        n: candidates per dialogue.
        max_new_tokens: most ids sampled per candidate, at least 1.
        stop_ids: ids that end a candidate.
        temperature: divides the logits; 0 is greedy.
        batch_size: most dialogues that decode at once; each has n candidates.
        max_rows: most rows of the cache, that is, dialogues that keep their keys and values.
        kv_bytes: most bytes of the cache; None: as many as max_rows need.
        lag: steps by which the host reads sampled tokens late: 1, so that a GPU never waits for the host, or 0; None: 1
            on CUDA, else 0.
    """

    def __init__(
        self,
        policy: Qwen2ForCausalLM,
        *,
        n: int,
        max_new_tokens: int,
        stop_ids: Collection[int],
        temperature: float = 1.0,
        batch_size: int,
        max_rows: int,
        kv_bytes: int | None = None,
        lag: int | None = None,
    ) -> None:
        if min(n, max_new_tokens, batch_size, max_rows) < 1 or temperature < 0:
            raise ValueError(
                f"{n=}, {max_new_tokens=}, {batch_size=} and {max_rows=} must be at least 1, {temperature=} at least 0"
            )
        if lag not in (None, 0, 1):  # a candidate that has ended runs on for `lag` steps, and has slots for one only
            raise ValueError(f"{lag=} must be 0 or 1")
        self.policy, self.n, self.max_new_tokens, self.temperature = policy, n, max_new_tokens, temperature
        self.stop_ids, self.batch_size, self.max_rows = frozenset(stop_ids), batch_size, max_rows
        self.turn_slots = n * max_new_tokens  # what a turn needs behind its prompt
        head = policy.head_weight
        self.device, self.kv_bytes = head.device, kv_bytes
        self.lag = lag if lag is not None else int(head.is_cuda)
        self.counts: Counter = Counter()
        self.cache = KVCache(policy.config, 0, 0, head.dtype, head.device)
        layers, heads = policy.config.num_hidden_layers, policy.config.num_key_value_heads
        self.bytes_per_slot = 2 * layers * heads * policy.config.head_dim * head.itemsize  # of keys and values
        self.rows: list[Row | None] = []
        self.queued: list[tuple[int, int, list[int], list[int]]] = []  # row, kept tokens, prompt, seeds
        self.draws: list[Draw] = []  # the running candidates, in the order of their lanes
        self.lanes = torch.zeros(7, 0, dtype=torch.long, device=self.device)  # (7, R)
        self.stride = torch.tensor([0, 1, n, 1, 0, 0, 0], device=self.device)[:, None]  # what each step adds to a lane
        self.padding = torch.tensor([0, 0, 0, 0, -1, -1, 0], device=self.device)[:, None]  # a lane of no candidate
        self.pending: deque[tuple[list[Draw], Sent]] = deque()  # sampled, but not read by the host yet
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}  # by bucket: graph, lanes, log-probs
        self.trunk = cached_trunk(policy)
        if self.device.type == "cuda":
            join_products(policy)
        self.resize([], 0, 0)

    # ------------------------------------------------------------------------------------------------------ dialogues

    @property
    def running(self) -> int:
        """Return the number of candidates that are running or wait for their prefill."""
        return len(self.draws) + self.n * len(self.queued)

    def start(self, key: int, prompt_ids: list[int], seeds: Sequence[int]) -> bool:
        """Start a turn of a dialogue: queue n candidates for its prompt, with one seed each.

        Returns False if there is no room now; try again after some steps. Raises ValueError for an id outside the
        vocabulary, and for a prompt that lacks positions, or memory even if it decodes alone.
        """
        if not prompt_ids or len(seeds) != self.n:
            raise ValueError(f"{len(prompt_ids)} ids and {len(seeds)} seeds; at least one id and {self.n} seeds needed")
        low, high = min(prompt_ids), max(prompt_ids)
        if low < 0 or high >= self.policy.config.vocab_size:
            raise ValueError(
                f"id {low if low < 0 else high} is outside the model's vocabulary of {self.policy.config.vocab_size}"
            )
        needed, longest = len(prompt_ids) + self.max_new_tokens, self.policy.config.max_position_embeddings
        if needed > longest:
            raise ValueError(
                f"a turn needs {needed} positions, the model has {longest}; lower --max-new-tokens or --max-user-tokens"
            )
        if self.running + self.n > self.batch_size * self.n:
            return False
        slots = len(prompt_ids) + self.turn_slots
        if slots > self.cache.shape[1] and not self.grow(key, slots):
            return False
        index = self.index_of(key)
        if index is None:
            index = self.rows.index(None) if None in self.rows else self.evict()
        if index is None:
            return False
        stored = self.rows[index].token_ids if self.rows[index] else []
        kept, most = 0, min(len(stored), len(prompt_ids) - 1)  # the last id is always computed: it predicts the next
        while kept < most and stored[kept] == prompt_ids[kept]:
            kept += 1
        self.counts.update(tokens_prefilled=len(prompt_ids) - kept, tokens_kept=kept)
        self.rows[index] = Row(key, prompt_ids, [Draw(key, c) for c in range(self.n)])
        self.queued.append((index, kept, prompt_ids, list(seeds)))
        return True

    def fits(self, length: int) -> bool:
        """Say whether the model has positions, and the whole cache memory, for a turn whose prompt has this length."""
        if length + self.max_new_tokens > self.policy.config.max_position_embeddings:
            return False
        return self.kv_bytes is None or (length + self.turn_slots) * self.bytes_per_slot <= self.kv_bytes

    def adopt(self, key: int, candidate: int) -> None:
        """Keep the keys and values of this candidate, and drop the others': the next prompt can continue from there."""
        index = self.index_of(key)
        if index is None:  # it lost its row while the candidates were judged: the next prompt is computed as a whole
            return
        row = self.rows[index]
        stored = row.draws[candidate].token_ids[:-1]  # the last sampled id was not fed, and has no key
        if self.n > 1 and stored:
            self.cache.adopt(index, len(row.token_ids), len(stored), candidate, self.n)
        row.token_ids, row.draws = row.token_ids + stored, []

    def forget(self, key: int) -> None:
        """Free the row of a dialogue, if it has one. It must not be decoding."""
        index = self.index_of(key)
        if index is not None:
            self.rows[index] = None

    def index_of(self, key: int) -> int | None:
        """Return the index of a dialogue's row, or None if it has none."""
        return next((i for i, row in enumerate(self.rows) if row is not None and row.key == key), None)

    # ------------------------------------------------------------------------------------------------- rows and memory

    def evict(self) -> int | None:
        """Free the row of the parked dialogue with the fewest tokens; return its index, or None if none is parked."""
        parked = [i for i, row in enumerate(self.rows) if not row.running]
        if not parked:
            return None
        index = min(parked, key=lambda i: len(self.rows[i].token_ids))
        self.rows[index] = None
        self.counts["kv_evictions"] += 1
        return index

    def grow(self, key: int, slots: int) -> bool:
        """Enlarge the rows to at least this many slots: by half, or less where memory allows no more.

        Longer rows can mean fewer rows, so parked dialogues may lose theirs. Returns False if too many rows are
        decoding. Raises ValueError if the budget is too small for one such row.
        """
        running = [i for i, row in enumerate(self.rows) if row is not None and row.running]
        for capacity in (max(slots, self.cache.shape[1] * 3 // 2), slots):
            rows = self.max_rows
            if self.kv_bytes is not None:
                rows = min(rows, self.kv_bytes // (self.bytes_per_slot * capacity))
            if rows > len(running):
                break
        else:
            if running:
                return False
            raise ValueError(
                f"one dialogue needs {slots:,} slots of the KV cache, {slots * self.bytes_per_slot / 2**30:.3g} GiB;"
                f" the budget is {self.kv_bytes / 2**30:.3g} GiB: raise --kv-gib, or lower --max-new-tokens,"
                + (" --num-candidates, --max-turns or --max-user-tokens" if self.n > 1 else " or shorten the dialogue")
            )
        parked = [i for i, row in enumerate(self.rows) if row is not None and not row.running]
        parked.sort(key=lambda i: (self.rows[i].key != key, -len(self.rows[i].token_ids)))
        kept = (running + parked)[:rows]
        self.counts["kv_evictions"] += len(running) + len(parked) - len(kept)
        self.resize(kept, rows, capacity)
        return True

    def resize(self, kept: list[int], rows: int, capacity: int) -> None:
        """Change the size of the cache; these rows are kept and become its first ones."""
        if self.cache.shape[0]:
            self.cache.move(kept, rows, capacity)
        else:
            head = self.policy.head_weight
            self.cache = KVCache(self.policy.config, rows, capacity, head.dtype, head.device)
        new_index = {old: new for new, old in enumerate(kept)}
        old_prompt, old_uniforms = (self.prompt, self.uniforms) if kept else (None, None)
        self.rows = [self.rows[old] for old in kept] + [None] * (rows - len(kept))
        self.prompt = torch.zeros(rows, dtype=torch.long, device=self.device)
        self.lengths, self.growth = torch.zeros_like(self.prompt), torch.zeros_like(self.prompt)
        self.members = torch.full((rows, self.n), -1, device=self.device)
        width = 0 if self.temperature == 0 or use_triton(self.policy.head_weight) else self.max_new_tokens + self.lag
        self.uniforms = torch.zeros(rows, self.n, width, device=self.device)  # for the torch path, drawn ahead of time
        if kept:
            index = torch.tensor(kept, device=self.device)
            self.prompt[: len(kept)], self.uniforms[: len(kept)] = old_prompt[index], old_uniforms[index]
            places = torch.full((int(index.max()) + 1,), -1, device=self.device)
            places[index] = torch.arange(len(kept), device=self.device)
            candidates = self.lanes[PLACE] % self.n
            self.lanes[ROW] = places[self.lanes[ROW]]
            self.lanes[PLACE] = self.lanes[ROW] * self.n + candidates
        self.queued = [(new_index[old], *rest) for old, *rest in self.queued]
        self.graphs.clear()  # they hold the addresses of the old cache
        self.use_lanes(self.lanes)

    # ------------------------------------------------------------------------------------------------------- one step

    @torch.no_grad()
    def step(self) -> list[Draw]:
        """Prefill the queued prompts and sample one token for every running candidate; return those that ended."""
        ended = []
        while self.queued:
            ended += self.prefill()
        if self.draws:
            token, logprob = self.replay() if self.uses_graphs else self.advance(self.lanes)
            ended += self.read(self.draws, token, logprob)
        return ended

    @property
    def uses_graphs(self) -> bool:
        """Say whether a step is a CUDA graph: the torch path reads numbers on the host, which a graph cannot."""
        return self.device.type == "cuda" and use_triton(self.policy.head_weight)

    def prefill(self) -> list[Draw]:
        """Compute the first queued prompts, at most PREFILL_TOKENS together, and sample each candidate's first token.

        Their N new tokens are packed one after another. The candidates join the lanes. Returns those that ended with
        their first token.
        """
        chunks, rows, slots, token_ids = [], [], [], []
        for row, kept, prompt, _ in self.queued:
            if chunks and len(token_ids) + len(prompt) - kept > PREFILL_TOKENS:
                break
            chunks.append(Chunk(row, len(token_ids), len(token_ids) + len(prompt) - kept, len(prompt)))
            rows += [row] * (len(prompt) - kept)
            slots += range(kept, len(prompt))
            token_ids += prompt[kept:]
        group, self.queued = self.queued[: len(chunks)], self.queued[len(chunks) :]
        token_ids, rows, slots = send([token_ids, rows, slots], self.device)  # (N,) each
        hidden = self.compute(token_ids, slots, Cached(self.cache, rows, slots, chunks=Chunks(chunks)))  # (N, D)
        last = hidden[send([chunk.last - 1 for chunk in chunks], self.device)]  # (prompts, D)
        lanes = [
            [0, len(prompt), len(prompt) + c, 0, row, row * self.n + c, seeds[c]]
            for row, _, prompt, seeds in group
            for c in range(self.n)
        ]
        lanes = send(lanes, self.device).T.contiguous()  # (7, prompts * n)
        joined = lanes[ROW, :: self.n]
        self.prompt[joined] = lanes[POSITION, :: self.n]
        if self.uniforms.shape[2]:
            seeds = [seed for *_, seeds in group for seed in seeds]
            drawn = draw_uniforms(seeds, self.uniforms.shape[2]).view(-1, *self.uniforms.shape[1:])
            self.uniforms[joined] = drawn.to(self.device)
        token, logprob = self.sample(last.repeat_interleave(self.n, 0), lanes)
        lanes[TOKEN], lanes[STEP] = token, 1
        draws = [draw for row, *_ in group for draw in self.rows[row].draws]
        self.draws = self.draws + draws
        self.use_lanes(torch.cat((self.lanes, lanes), 1))
        return self.read(draws, token, logprob)

    def compute(self, token_ids: Tensor, position_ids: Tensor, context: Cached) -> Tensor:
        """Return the hidden states (N, D) of tokens that continue rows of the cache."""
        if self.trunk is None:
            return self.policy(token_ids[None], position_ids[None], context)[0]
        where = context.rows, context.slots, self.cache.keys, self.cache.values, context.decoding
        return self.trunk(token_ids, position_ids, *where)

    def sample(self, hidden: Tensor, lanes: Tensor) -> tuple[Tensor, Tensor]:
        """Sample each lane's next id from hidden (R, D); return ids (R,) and log-probs (R,).

        Raises ValueError where a CPU sees that they are not finite; of the kernels `read` sees it, by the log-probs.
        """
        on_device = hidden.is_cuda or use_triton(hidden)
        if not on_device and not math.isfinite(hidden.sum()):  # the C++ draws from anything
            raise ValueError(NOT_FINITE)
        uniforms = None
        if self.uniforms.shape[2]:
            uniforms = self.uniforms.flatten(0, 1)[lanes[PLACE], lanes[STEP]]
        elif self.temperature == 0:
            uniforms = hidden.new_zeros(len(hidden))
        return sample_head(hidden, self.policy.head_weight, self.temperature, lanes[SEED], lanes[STEP], uniforms)

    def replay(self) -> tuple[Tensor, Tensor]:
        """Do what `advance` does for all lanes, by replaying a CUDA graph of it, which is a single launch."""
        bucket = next((size for size in BUCKETS if size >= len(self.draws)), len(self.draws))
        if bucket not in self.graphs:
            self.capture(bucket)
        graph, lanes, logprobs = self.graphs[bucket]
        R = len(self.draws)
        if self.lanes.data_ptr() != lanes.data_ptr():  # other candidates run than in the last replay
            lanes[:, :R], lanes[:, R:] = self.lanes, self.padding
            self.lanes = lanes[:, :R]
        graph.replay()
        return lanes[TOKEN, :R], logprobs[:R]  # the next replay overwrites them; `read` has sent them by then

    def capture(self, bucket: int) -> None:
        """Capture `advance` for this many lanes; excess lanes are padding, which belongs to no row."""
        lanes = self.padding.repeat(1, bucket)
        lengths = self.lengths.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # the first run compiles and tunes, which a capture cannot
            self.advance(lanes.clone())
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # All graphs compute in one pool of memory: one replays at a time, and what it returns has been sent by then.
        pool = next((other.pool() for other, *_ in self.graphs.values()), None)
        with torch.cuda.graph(graph, pool=pool):
            _, logprobs = self.advance(lanes)
        self.lengths.copy_(lengths)
        self.graphs[bucket] = graph, lanes, logprobs

    def advance(self, lanes: Tensor) -> tuple[Tensor, Tensor]:
        """Feed each lane's token and sample the next one, in lanes (7, R) in place; the host does not wait for it."""
        rows = Rows(self.prompt, self.lengths, self.members, lanes[PLACE])
        context = Cached(self.cache, lanes[ROW], lanes[SLOT], rows)
        hidden = self.compute(lanes[TOKEN], lanes[POSITION], context)  # (R, D)
        token, logprob = self.sample(hidden, lanes)
        lanes += self.stride
        lanes[TOKEN] = token
        self.lengths += self.growth
        return token, logprob

    def use_lanes(self, lanes: Tensor) -> None:
        """Run these lanes from here on: note which lane belongs to which candidate, and each row's slots in use."""
        self.lanes, rows, R = lanes, lanes[ROW], lanes.shape[1]
        self.members.fill_(-1)
        self.members.view(-1)[lanes[PLACE]] = torch.arange(R, device=self.device)
        self.growth.zero_()
        self.lengths[rows] = self.prompt[rows] + self.n * lanes[STEP]  # the token that is fed next included
        self.growth[rows] = self.n

    def to_host(self, *tensors: Tensor) -> Sent:
        """Copy tensors to the host behind what the device does now; the host does not wait for it."""
        if self.device.type != "cuda":
            return Sent([*tensors], None)
        copies = [x.to("cpu", non_blocking=True, copy=True) for x in tensors]  # into pinned memory: torch sees to it
        arrived = torch.cuda.Event()
        arrived.record()
        return Sent(copies, arrived)

    def read(self, draws: list[Draw], token: Tensor, logprob: Tensor) -> list[Draw]:
        """Append sampled tokens to their draws, up to `lag` steps late; candidates that ended leave the lanes.

        The host waits for the tokens of the older step alone: the GPU computes the newer one meanwhile. Returns the
        draws that ended.
        """
        self.pending.append((draws, self.to_host(token, logprob)))
        ended = []
        while len(self.pending) > self.lag:
            draws, sent = self.pending.popleft()
            if sent.arrived:
                sent.arrived.synchronize()
            token, logprob = sent.tensors
            for draw, token_id, value in zip(draws, token.tolist(), logprob.tolist(), strict=True):
                if draw.stop_reason:  # it ended in the step before, which the host has read only now
                    continue
                if not math.isfinite(value):
                    raise ValueError(NOT_FINITE)
                draw.token_ids.append(token_id)
                draw.logprobs.append(value)
                if token_id in self.stop_ids:
                    draw.stop_reason = "stop"
                elif len(draw.token_ids) == self.max_new_tokens:
                    draw.stop_reason = "length"
                if draw.stop_reason:
                    ended.append(draw)
        if ended:
            going = [i for i, draw in enumerate(self.draws) if not draw.stop_reason]
            self.draws = [self.draws[i] for i in going]
            self.use_lanes(self.lanes[:, send(going, self.device)])
        if not self.draws:
            self.pending.clear()
        return ended


def make_sampler(
    policy: Qwen2ForCausalLM, chat: ChatTokenizer, config: Config, n: int, temperature: float, max_rows: int,
    kv_bytes: int | None = None,
) -> Sampler:  # fmt: skip
    """Make a sampler as the settings say: n candidates for each of max_rows dialogues, until a stop id."""
    return Sampler(
        policy,
        n=n,
        max_new_tokens=config.max_new_tokens,
        stop_ids=chat.stop_ids,
        temperature=temperature,
        batch_size=config.decode_batch_size,
        max_rows=max_rows,
        kv_bytes=kv_bytes or kv_budget(config, policy.head_weight.device),
    )


def kv_budget(config: Config, device: torch.device) -> int:
    """Return the bytes that a process's KV cache may take: as asked for, or a share of what is free now."""
    if config.kv_gib:
        return int(config.kv_gib * 2**30)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # torch keeps what was freed; what it still keeps now are holes, too small for a cache
        return int(0.9 * torch.cuda.mem_get_info(device)[0])
    return int(0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") / world_size())


def cached_trunk(policy: Qwen2ForCausalLM) -> CachedTrunk | None:
    """Return a policy's trunk as one C++ call, or None where torch or Triton computes it."""
    config, found = policy.config, policy.model.named_parameters()  # state_dict() would cut what `gathered` has joined
    weights = {name.replace(".base_layer.", "."): x.detach() for name, x in found if ".lora_" not in name}
    low = {name: (x.lora_A.weight, x.lora_B.weight, x.scale) for name, x in adapters(policy.model).items()}
    if config.head_dim not in HEAD_DIMS or not decodes(weights.values()):
        return None
    positions = torch.arange(config.max_position_embeddings)
    cos, sin = (x[0, :, 0].contiguous() for x in rope_tables(positions[None], config.head_dim, config.rope_theta))
    heads = config.num_attention_heads, config.num_key_value_heads
    return CachedTrunk(weights, *heads, config.rms_norm_eps, cos, sin, low)


def generate(
    policy: Qwen2ForCausalLM,
    prompts: Sequence[list[int]],
    *,
    n: int = 1,
    max_new_tokens: int,
    stop_ids: Collection[int],
    temperature: float = 1.0,
    seeds: Sequence[int] | None = None,
) -> list[Draw]:
    """Sample n continuations of each prompt, without a conversation; candidate c of prompt b is draw b * n + c.

    seeds: one per draw; None: from torch's global generator. Greedy sampling (temperature 0) needs none.
    """
    if seeds is None:
        seeds = torch.randint(2**31, (len(prompts) * n,)).tolist() if temperature > 0 else [0] * (len(prompts) * n)
    if len(seeds) != len(prompts) * n:
        raise ValueError(f"{len(seeds)} seeds for {len(prompts) * n} draws; give one per draw")
    size = len(prompts)
    sampler = Sampler(
        policy, n=n, max_new_tokens=max_new_tokens, stop_ids=stop_ids, temperature=temperature, batch_size=size,
        max_rows=size,
    )  # fmt: skip
    for b in sorted(range(size), key=lambda b: -len(prompts[b])):  # the longest first, so that the cache need not grow
        sampler.start(b, prompts[b], seeds[b * n : b * n + n])
    ended = []
    while sampler.running:
        ended += sampler.step()
    return sorted(ended, key=lambda draw: (draw.key, draw.candidate))
