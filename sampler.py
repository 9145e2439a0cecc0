"""Sample many dialogues at once with a KV cache: candidates join and leave the batch at any step.

    start    a dialogue takes a row of the cache; of its prompt, only what the row does not hold is computed
    step     what was started is prefilled, and every running candidate of every dialogue gets its next token
    adopt    the chosen candidate's keys and values are kept as part of the row, the others' are forgotten

A dialogue that waits for its user keeps its row ("parked") while others decode. When memory is short, a parked one
loses it, and its prompt is computed again later; when all rows decode, `start` says so, and the dialogue waits.

What a candidate samples depends on its prompt and its seed, not on its neighbours or on when it joined. There is no
top-k or top-p: while training data is collected, the sampled distribution must be the policy itself.

Shapes: B rows of the cache, n candidates each, R running candidates, N tokens of a prefill, D hidden, V vocabulary.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from config import Config
from dialogue import ChatTokenizer
from kernels.backend import use_triton
from kernels.cpu import HEAD_DIMS, CachedTrunk, is_small, use_cpu
from kernels.rows import Rows
from kernels.sample_head import draw_uniforms, sample_head
from learners.processes import world_size
from model import Cached, Chunk, KVCache, Qwen2ForCausalLM, rope_tables

PREFILL_TOKENS = 8192  # most tokens of one prefill; a longer prompt goes alone
BUCKETS = (1, 2, 4, 8, *range(16, 1025, 16))  # numbers of candidates that a CUDA graph is captured for
TOKEN, POSITION, SLOT, STEP, ROW, PLACE, SEED = range(7)  # what a lane knows of its candidate


@dataclass
class Draw:
    """One candidate: what was sampled so far, and why it ended."""

    key: int  # its dialogue
    candidate: int
    token_ids: list[int] = field(default_factory=list)  # the stop id included
    logprobs: list[float] = field(default_factory=list)  # nats, of each sampled id
    stop_reason: str = ""  # "stop": a stop id was sampled; "length": max_new_tokens were; "": it runs


@dataclass
class Row:
    """What a row of the cache holds: a dialogue's ids, and the candidates of its turn."""

    key: int
    token_ids: list[int]  # keys and values of these are stored, from slot 0 on
    draws: list[Draw] = field(default_factory=list)

    @property
    def running(self) -> bool:
        """Say whether a candidate is still being sampled."""
        return any(not draw.stop_reason for draw in self.draws)


class Sampler:
    """Rows of a KV cache, and the candidates that are decoding in them.

    Args:
        policy: samples; its weights must not change while the sampler is used.
        n: candidates per dialogue.
        max_new_tokens: most ids sampled per candidate, at least 1.
        stop_ids: ids that end a candidate.
        temperature: divides the logits; 0 is greedy.
        batch_size: dialogues that decode at once: n times as many candidates.
        max_rows: dialogues that keep their keys and values.
        kv_bytes: bytes that the cache may take; None: as many as max_rows need.
        lag: 1: the host reads tokens one step late, so that a GPU never waits for it; 0: at once; None: 1 on CUDA.
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
        if lag not in (None, 0, 1):  # a row has no slots for more steps after its last
            raise ValueError(f"{lag=} must be 0 or 1")
        self.policy, self.n, self.max_new_tokens, self.temperature = policy, n, max_new_tokens, temperature
        self.stop_ids, self.batch_size, self.max_rows = frozenset(stop_ids), batch_size, max_rows
        head = policy.head_weight
        self.device, self.kv_bytes = head.device, kv_bytes
        self.lag = lag if lag is not None else int(head.is_cuda)
        self.counts: Counter = Counter()
        self.cache = KVCache(policy.config, 0, 0, head.dtype, head.device)
        self.bytes_per_slot = KVCache(policy.config, 1, 1, head.dtype, "meta").nbytes
        self.rows: list[Row | None] = []
        self.queued: list[tuple[int, int, list[int], list[int]]] = []  # row, kept tokens, prompt, seeds
        self.draws: list[Draw] = []  # of the lanes, in their order
        self.lanes = torch.zeros(7, 0, dtype=torch.long, device=self.device)  # (7, R)
        self.stride = torch.tensor([0, 1, n, 1, 0, 0, 0], device=self.device)[:, None]  # what a step adds to a lane
        self.padding = torch.tensor([0, 0, 0, 0, -1, -1, 0], device=self.device)[:, None]  # a lane that is nobody's
        self.pending: deque[tuple[list[Draw], Tensor, Tensor]] = deque()  # sampled, not yet read by the host
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}  # by bucket: graph, lanes, log-probs
        self.trunk = cached_trunk(policy)
        self.resize([], 0, 0)

    # ------------------------------------------------------------------------------------------------------ dialogues

    @property
    def running(self) -> int:
        """Give the number of candidates that are being sampled or wait for their prefill."""
        return len(self.draws) + self.n * len(self.queued)

    def start(self, key: int, prompt_ids: list[int], seeds: Sequence[int]) -> bool:
        """Begin a turn of a dialogue: n candidates for its prompt, one seed each. False: no room now, try again later.

        Raises ValueError for an id that is not in the vocabulary, and when the prompt could not even be decoded alone.
        """
        if not prompt_ids or len(seeds) != self.n:
            raise ValueError(f"{len(prompt_ids)} ids and {len(seeds)} seeds; at least one id and {self.n} seeds needed")
        low, high = min(prompt_ids), max(prompt_ids)
        if low < 0 or high >= self.policy.config.vocab_size:
            raise ValueError(
                f"id {low if low < 0 else high} is outside the model's vocabulary of {self.policy.config.vocab_size}"
            )
        if self.running + self.n > self.batch_size * self.n:
            return False
        index = self.find_row(key, self.slots_of(len(prompt_ids)))
        if index is None:
            return False
        row = self.rows[index]
        # The last id is always computed, for the next token is predicted from it.
        kept = min(common_prefix(row.token_ids, prompt_ids), len(prompt_ids) - 1)
        self.counts.update(tokens_prefilled=len(prompt_ids) - kept, tokens_kept=kept)
        row.token_ids, row.draws = prompt_ids, [Draw(key, c) for c in range(self.n)]
        self.queued.append((index, kept, prompt_ids, list(seeds)))
        return True

    def fits(self, length: int) -> bool:
        """Say whether a dialogue with a prompt of so many tokens can decode at all, with the whole cache for itself."""
        return self.kv_bytes is None or self.slots_of(length) * self.bytes_per_slot <= self.kv_bytes

    def slots_of(self, length: int) -> int:
        """Give the slots that a dialogue with a prompt of so many tokens needs while it decodes."""
        return length + self.n * self.max_new_tokens

    def adopt(self, key: int, candidate: int) -> None:
        """Keep what the row holds of this candidate behind its prompt; the next prompt may go on from there."""
        index = self.index_of(key)
        if index is None:  # the row was lost while its candidates were judged: the next prompt is computed whole
            return
        row = self.rows[index]
        stored = row.draws[candidate].token_ids[:-1]  # the last sampled id was never fed
        if self.n > 1 and stored:
            self.cache.adopt(index, len(row.token_ids), len(stored), candidate, self.n)
        row.token_ids, row.draws = row.token_ids + stored, []

    def forget(self, key: int) -> None:
        """Give up a dialogue's row, if it has one and does not decode."""
        index = self.index_of(key)
        if index is not None:
            self.rows[index] = None

    def index_of(self, key: int) -> int | None:
        """Give the row of a dialogue."""
        return next((i for i, row in enumerate(self.rows) if row is not None and row.key == key), None)

    # ------------------------------------------------------------------------------------------------- rows and memory

    def find_row(self, key: int, slots: int) -> int | None:
        """Give a dialogue's row, or an empty one for it, with so many slots; None if all memory is decoding."""
        if slots > self.cache.shape[1] and not self.grow(key, slots):
            return None
        index = self.index_of(key)
        if index is None:
            index = self.rows.index(None) if None in self.rows else self.evict()
        if index is not None and self.rows[index] is None:
            self.rows[index] = Row(key, [])
        return index

    def evict(self) -> int | None:
        """Empty the row of the parked dialogue that has the least to lose."""
        parked = [i for i, row in enumerate(self.rows) if not row.running]
        if not parked:
            return None
        index = min(parked, key=lambda i: len(self.rows[i].token_ids))
        self.rows[index] = None
        self.counts["kv_evictions"] += 1
        return index

    def grow(self, key: int, slots: int) -> bool:
        """Make rows of at least so many slots: by half at least, where memory allows. False: too much is decoding."""
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
        """Keep these rows as the first ones of a cache of another size."""
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
        self.uniforms = torch.zeros(rows, self.n, width, device=self.device)  # the torch path's, drawn ahead
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
        """Prefill what was started and sample one token for every running candidate; give those that ended."""
        ended = self.prefill() if self.queued else []
        if self.draws:
            token, logprob = self.decode()
            ended += self.read(self.draws, token, logprob)
        return ended

    def prefill(self) -> list[Draw]:
        """Compute what is new of the queued prompts, and sample each candidate's first token."""
        ended, group = [], []
        for job in self.queued:
            if group and sum(len(p) - kept for _, kept, p, _ in [*group, job]) > PREFILL_TOKENS:
                ended += self.prefill_group(group)
                group = []
            group.append(job)
        self.queued = []
        return ended + self.prefill_group(group)

    def prefill_group(self, group: list[tuple[int, int, list[int], list[int]]]) -> list[Draw]:
        """Compute new prompt tokens as one packed row of N, and let the candidates of these dialogues join."""
        chunks, rows, slots, token_ids = [], [], [], []
        for row, kept, prompt, _ in group:
            chunks.append(Chunk(row, len(token_ids), len(token_ids) + len(prompt) - kept, len(prompt)))
            rows += [row] * (len(prompt) - kept)
            slots += range(kept, len(prompt))
            token_ids += prompt[kept:]
        token_ids, rows, slots = torch.tensor([token_ids, rows, slots], device=self.device)  # (N,) each
        hidden = self.compute(token_ids, slots, Cached(self.cache, rows, slots, chunks=chunks))  # (N, D)
        last = hidden[torch.tensor([chunk.last - 1 for chunk in chunks], device=self.device)]  # (J, D)
        lanes = torch.tensor(
            [
                [0, len(prompt), len(prompt) + c, 0, row, row * self.n + c, seeds[c]]
                for row, _, prompt, seeds in group
                for c in range(self.n)
            ],
            device=self.device,
        ).T.contiguous()  # (7, J n)
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
        """Give the hidden states (N, D) of tokens that continue rows of the cache."""
        if self.trunk is None:
            return self.policy(token_ids[None], position_ids[None], context)[0]
        where = context.rows, context.slots, self.cache.keys, self.cache.values, context.decoding
        return self.trunk(token_ids, position_ids, *where)

    def sample(self, hidden: Tensor, lanes: Tensor) -> tuple[Tensor, Tensor]:
        """Draw each lane's next id from hidden (R, D); give ids (R,) and log-probs (R,)."""
        uniforms = None
        if self.uniforms.shape[2]:
            uniforms = self.uniforms.flatten(0, 1)[lanes[PLACE], lanes[STEP]]
        elif self.temperature == 0:
            uniforms = hidden.new_zeros(len(hidden))
        return sample_head(hidden, self.policy.head_weight, self.temperature, lanes[SEED], lanes[STEP], uniforms)

    def decode(self) -> tuple[Tensor, Tensor]:
        """Sample every lane's next token: on CUDA by replaying a graph, which the host only launches."""
        if self.device.type != "cuda" or not use_triton(self.policy.head_weight):  # the torch path reads on the host
            return self.advance(self.lanes)
        bucket = next((size for size in BUCKETS if size >= len(self.draws)), len(self.draws))
        if bucket not in self.graphs:
            self.capture(bucket)
        graph, lanes, logprobs = self.graphs[bucket]
        R = len(self.draws)
        if self.lanes.data_ptr() != lanes.data_ptr():  # who runs has changed
            lanes[:, :R], lanes[:, R:] = self.lanes, self.padding
            self.lanes = lanes[:, :R]
        graph.replay()
        return lanes[TOKEN, :R].clone(), logprobs[:R].clone()

    def capture(self, bucket: int) -> None:
        """Capture `advance` for so many lanes; those in excess are padding, which belongs to no row."""
        lanes = self.padding.repeat(1, bucket)
        lengths = self.lengths.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # a first run compiles kernels and chooses algorithms, which a capture cannot
            self.advance(lanes.clone())
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            _, logprobs = self.advance(lanes)
        self.lengths.copy_(lengths)
        self.graphs[bucket] = graph, lanes, logprobs

    def advance(self, lanes: Tensor) -> tuple[Tensor, Tensor]:
        """Feed each lane (7, R) its token and sample the next, in place; nothing here waits for the device."""
        rows = Rows(self.prompt, self.lengths, self.members, lanes[PLACE])
        context = Cached(self.cache, lanes[ROW], lanes[SLOT], rows)
        hidden = self.compute(lanes[TOKEN], lanes[POSITION], context)  # (R, D)
        token, logprob = self.sample(hidden, lanes)
        lanes += self.stride
        lanes[TOKEN] = token
        self.lengths += self.growth
        return token, logprob

    def use_lanes(self, lanes: Tensor) -> None:
        """Let these candidates run: say which lane is whose, and how many slots each row has in use."""
        self.lanes, rows, R = lanes, lanes[ROW], lanes.shape[1]
        self.members.fill_(-1)
        self.members.view(-1)[lanes[PLACE]] = torch.arange(R, device=self.device)
        self.growth.zero_()
        self.lengths[rows] = self.prompt[rows] + self.n * lanes[STEP]  # with the token that is fed next
        self.growth[rows] = self.n

    def read(self, draws: list[Draw], token: Tensor, logprob: Tensor) -> list[Draw]:
        """Note what was sampled, up to `lag` steps late; candidates that ended leave the lanes."""
        self.pending.append((draws, token, logprob))
        ended = []
        while len(self.pending) > self.lag:
            draws, token, logprob = self.pending.popleft()
            for draw, token_id, value in zip(draws, token.tolist(), logprob.tolist(), strict=True):
                if draw.stop_reason:  # it ended while this step was under way
                    continue
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
            self.use_lanes(self.lanes[:, torch.tensor(going, dtype=torch.long, device=self.device)])
        if not self.draws:
            self.pending.clear()
        return ended


def make_sampler(
    policy: Qwen2ForCausalLM, chat: ChatTokenizer, config: Config, n: int, temperature: float, max_rows: int,
    kv_bytes: int | None = None,
) -> Sampler:  # fmt: skip
    """Make a sampler as the settings say: n candidates for each of max_rows dialogues, until `<|im_end|>`."""
    return Sampler(
        policy,
        n=n,
        max_new_tokens=config.max_new_tokens,
        stop_ids=[chat.im_end],
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
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch keeps what was freed
        return int(0.9 * (torch.cuda.mem_get_info(device)[0] + unused))
    return int(0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") / world_size())


def cached_trunk(policy: Qwen2ForCausalLM) -> CachedTrunk | None:
    """Give a policy's trunk as one C++ call, or None where torch or Triton computes it."""
    config, weights = policy.config, policy.model.state_dict()
    if config.head_dim not in HEAD_DIMS or not use_cpu(policy.head_weight) or not is_small(weights.values()):
        return None
    positions = torch.arange(config.max_position_embeddings)
    cos, sin = (x[0, :, 0].contiguous() for x in rope_tables(positions[None], config.head_dim, config.rope_theta))
    heads = config.num_attention_heads, config.num_key_value_heads
    return CachedTrunk(weights, *heads, config.rms_norm_eps, cos, sin)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Count the leading ids that two rows share.

    >>> common_prefix([1, 2, 3], [1, 2, 4, 5])
    2
    """
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


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
    """Sample n continuations of each prompt; candidate c of prompt b is draw b * n + c.

    `seeds` are one per draw; None: new ones off torch's global generator, or none where greedy sampling draws nothing.
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
    for b in sorted(range(size), key=lambda b: -len(prompts[b])):  # the longest first: the cache need not grow
        sampler.start(b, prompts[b], seeds[b * n : b * n + n])
    ended = []
    while sampler.running:
        ended += sampler.step()
    return sorted(ended, key=lambda draw: (draw.key, draw.candidate))
