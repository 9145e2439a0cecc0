"""The sampler: it equals uncached sampling, whoever shares its batch and its memory, and leaves an honest cache behind.

The oracle of most tests is the same prompt, sampled alone by `generate`, which a full forward per token checks first.
"""

import contextlib
import os
import subprocess
import sys
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.overrides import TorchFunctionMode

import sampler as sampler_module
from config import Config
from kernels.sample_head import sample
from learners.loading import let_segments_grow
from model import Qwen2Config, Qwen2ForCausalLM, random_policy
from sampler import STEP, Draw, Sampler, generate, kv_budget

CONFIG = Qwen2Config(vocab_size=53, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, rope_theta=5000.0)  # fmt: skip
STOPS = {7, 11, 23}  # about one sampled id in eighteen
PROMPTS = [list(range(3, 3 + length)) for length in (4, 1, 9, 2, 17, 6, 12, 3)]
SLOT = 2 * 2 * 2 * 12 * 4  # bytes: keys and values, layers, heads, width, fp32


@pytest.fixture(scope="module")
def policy() -> Qwen2ForCausalLM:
    """A policy of random weights, large enough that each token's distribution depends on the whole row."""
    policy = random_policy(CONFIG, seed=0)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if parameter.dim() > 1 and "embed_tokens" not in name:
                parameter.mul_(8)
    return policy


def new_sampler(policy, **changes) -> Sampler:
    return Sampler(policy, **(dict(n=1, max_new_tokens=20, stop_ids=STOPS, batch_size=8, max_rows=8) | changes))


@torch.no_grad()
def logprobs_of(policy, prompt: list[int], sampled: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Log-probs of the sampled ids by one plain forward over prompt and sample."""
    hidden = policy(torch.tensor([prompt + sampled]))[0, len(prompt) - 1 : -1]
    return (policy.logits(hidden) / temperature).log_softmax(-1).gather(-1, torch.tensor(sampled)[:, None])[:, 0]


def ids_of(draws: list[Draw]) -> list[list[int]]:
    return [draw.token_ids for draw in draws]


def assert_same(ours: list[Draw], theirs: list[Draw]) -> None:
    """Same ids and reasons, log-probs to 1e-5."""
    assert ids_of(ours) == ids_of(theirs)
    assert [draw.stop_reason for draw in ours] == [draw.stop_reason for draw in theirs]
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=1e-5, rtol=0)


def finish(sampler: Sampler) -> list[Draw]:
    """Decode to the end, in the order of dialogues and candidates."""
    ended = []
    while sampler.running:
        ended += sampler.step()
    return sorted(ended, key=lambda draw: (draw.key, draw.candidate))


def stored(sampler: Sampler, key: int) -> torch.Tensor:
    """Keys and values of the ids that a dialogue's row is said to hold, (2L, Hkv, ids, Dh)."""
    index = sampler.index_of(key)
    used = len(sampler.rows[index].token_ids)
    return torch.stack([tensor[index, :, :used] for tensor in sampler.cache.keys + sampler.cache.values])


@torch.no_grad()
def computed(policy, token_ids: list[int]) -> torch.Tensor:
    """The same by one prefill in a cache of its own."""
    sampler = new_sampler(policy, max_new_tokens=1)
    sampler.start(0, token_ids, [0])
    sampler.step()
    return stored(sampler, 0)


# ------------------------------------------------------------------------------------------------- cached and batched


def test_cached_equals_uncached(policy):
    """Guards positions and masks while decoding: greedy by a full forward per token gives the same ids."""
    ours = generate(policy, PROMPTS, max_new_tokens=20, stop_ids=STOPS, temperature=0)
    for prompt, sampled in zip(PROMPTS, ids_of(ours), strict=True):
        expected: list[int] = []
        while len(expected) < 20 and not (expected and expected[-1] in STOPS):
            expected.append(int(policy.logits(policy(torch.tensor([prompt + expected]))[0, -1]).argmax()))
        assert sampled == expected
    assert len({token for draw in ours for token in draw.token_ids}) > 10  # not one token repeated


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 1.5])
def test_logprobs_equal_a_full_forward(policy, temperature):
    """Guards old log-probs: each is log softmax(logits / temperature) of the id at its own step (greedy: at 1)."""
    draws = generate(policy, PROMPTS, n=3, max_new_tokens=20, stop_ids=STOPS, temperature=temperature)
    assert [(draw.key, draw.candidate) for draw in draws] == [(b, c) for b in range(8) for c in range(3)]
    for draw in draws:
        expected = logprobs_of(policy, PROMPTS[draw.key], draw.token_ids, temperature or 1.0)
        torch.testing.assert_close(torch.tensor(draw.logprobs), expected, atol=1e-5, rtol=0)


def test_batch_equals_singles(policy):
    """Guards ragged batches: neighbours, and lanes that close up where a candidate has left, change nothing."""
    batch = generate(policy, PROMPTS, max_new_tokens=30, stop_ids=STOPS, seeds=range(8))
    assert len({len(draw.token_ids) for draw in batch}) > 4
    for row, prompt in enumerate(PROMPTS):
        assert_same(generate(policy, [prompt], max_new_tokens=30, stop_ids=STOPS, seeds=[row]), [batch[row]])


def test_streams_do_not_depend_on_the_batch(policy):
    """Guards seeded rows: the same prompt and stream sample the same ids in another company and order."""
    seeds = list(range(40, 48))
    batch = generate(policy, PROMPTS, max_new_tokens=20, stop_ids=STOPS, seeds=seeds)
    order = [6, 2, 5]
    few = generate(policy, [PROMPTS[i] for i in order], max_new_tokens=20, stop_ids=STOPS,
                   seeds=[seeds[i] for i in order])  # fmt: skip
    assert_same(few, [batch[i] for i in order])


def test_candidates_equal_repeats(policy):
    """Guards the shared prompt: n candidates off one prefill are what n copies of the prompt give, as b * n + c."""
    shared = generate(policy, PROMPTS[:3], n=4, max_new_tokens=20, stop_ids=STOPS, seeds=range(12))
    repeated = [prompt for prompt in PROMPTS[:3] for _ in range(4)]
    assert_same(shared, generate(policy, repeated, max_new_tokens=20, stop_ids=STOPS, seeds=range(12)))


def test_prefill_in_groups(policy, monkeypatch):
    """Guards the cut of a large prefill: a prompt beyond the limit goes alone, and nothing is lost or done twice."""
    whole = generate(policy, PROMPTS, n=2, max_new_tokens=12, stop_ids=STOPS, seeds=range(16))
    sizes = []
    compute = Sampler.compute

    def noted(self, token_ids, slots, context):
        if context.chunks:
            sizes.append([chunk.last - chunk.first for chunk in context.chunks.chunks])
        return compute(self, token_ids, slots, context)

    monkeypatch.setattr(Sampler, "compute", noted)
    monkeypatch.setattr(sampler_module, "PREFILL_TOKENS", 10)
    assert_same(generate(policy, PROMPTS, n=2, max_new_tokens=12, stop_ids=STOPS, seeds=range(16)), whole)
    assert len(sizes) > 4 and [17] in sizes
    assert all(sum(group) <= 10 or len(group) == 1 for group in sizes)
    assert sorted(size for group in sizes for size in group) == sorted(map(len, PROMPTS))


# -------------------------------------------------------------------------------------------------------------- seeds


def test_without_seeds_draws_come_from_the_global_generator(policy):
    """Guards a run's reproducibility, and candidates that would share one stream."""
    def draw(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return ids_of(generate(policy, [[5]], n=4, max_new_tokens=9, stop_ids=[]))

    assert draw(1) == draw(1) != draw(2)
    assert len(set(map(tuple, draw(1)))) == 4


def test_a_seed_is_one_generator_per_draw(policy):
    """Guards the draws of earlier runs: step t of a candidate uses the t-th uniform of its seed's own stream."""
    draws = generate(policy, [[5, 6], [9]], max_new_tokens=9, stop_ids=[], seeds=[7, 8])
    for prompt, seed, drawn in zip([[5, 6], [9]], [7, 8], ids_of(draws), strict=True):
        generator = torch.Generator().manual_seed(seed)
        for step, uniform in enumerate(torch.rand(9, generator=generator)):
            with torch.no_grad():
                logits = policy.logits(policy(torch.tensor([prompt + drawn[:step]]))[:, -1])
            assert sample(logits, 1.0, uniform[None])[0].item() == drawn[step]


def test_greedy_does_not_advance_the_generator(policy):
    """Guards training against evaluation: a greedy pass in between must not change what is sampled next."""
    before = torch.get_rng_state()
    generate(policy, [[5]], max_new_tokens=4, stop_ids=[], temperature=0)
    generate(policy, [[5]], max_new_tokens=4, stop_ids=[], seeds=[1])
    assert torch.equal(torch.get_rng_state(), before)


# -------------------------------------------------------------------------------------------------------------- stops


def test_stop_id_is_kept_and_ends_the_candidate(policy):
    """Guards the trained stop: the stop id is in the sample, once, last, with its log-prob; running out has none."""
    draws = generate(policy, PROMPTS, n=4, max_new_tokens=16, stop_ids=STOPS, seeds=range(32))
    assert {draw.stop_reason for draw in draws} == {"stop", "length"}
    for draw in draws:
        assert len(draw.token_ids) == len(draw.logprobs)
        assert not STOPS & set(draw.token_ids[:-1])
        assert (draw.token_ids[-1] in STOPS) == (draw.stop_reason == "stop")
        assert draw.stop_reason == "stop" or len(draw.token_ids) == 16


def test_stop_id_as_the_last_allowed_token(policy):
    """Guards the boundary: a stop id sampled at max_new_tokens is a stop, not a truncation."""
    free = generate(policy, [[5, 6]], max_new_tokens=6, stop_ids=[], temperature=0)[0].token_ids
    last = free[-1]
    until = free.index(last) + 1
    (cut,) = generate(policy, [[5, 6]], max_new_tokens=until, stop_ids=[last], temperature=0)
    assert cut.token_ids == free[:until] and cut.stop_reason == "stop"
    (short,) = generate(policy, [[5, 6]], max_new_tokens=3, stop_ids=[], temperature=0)
    assert short.token_ids == free[:3] and short.stop_reason == "length"


@pytest.mark.parametrize("lag", [0, 1])
def test_one_token_and_a_stop_in_the_prefill(policy, lag):
    """Guards candidates that end before they ever decode: by max_new_tokens 1, or by a stop id as the first one."""
    expected = generate(policy, PROMPTS, n=2, max_new_tokens=8, stop_ids=[], seeds=range(16))
    firsts = [draw.token_ids[0] for draw in expected]
    for changes in (dict(max_new_tokens=1, stop_ids=[]), dict(max_new_tokens=8, stop_ids=set(firsts[:3]))):
        sampler = new_sampler(policy, n=2, lag=lag, **changes)
        for b, prompt in enumerate(PROMPTS):
            assert sampler.start(b, prompt, [2 * b, 2 * b + 1])
        for draw, whole in zip(finish(sampler), expected, strict=True):
            assert draw.token_ids == whole.token_ids[: len(draw.token_ids)]
            assert len(draw.token_ids) == 1 or not {*changes["stop_ids"]} & {*draw.token_ids[:-1]}
        assert sampler.running == 0 and not sampler.pending and sampler.lanes.shape == (7, 0)


# ------------------------------------------------------------------------------------------- dialogues of many turns


def next_prompt(prompt: list[int], reply: list[int], key: int, turn: int) -> list[int]:
    """What the trainer's next prompt is: all so far, the reply as sampled, and the user's words, of any length."""
    return prompt + reply + [2, turn + 30, *range(40, 41 + key % 4)]


def rewritten(prompt: list[int], reply: list[int], key: int, turn: int) -> list[int]:
    """The same where history is rewritten: the last reply loses ids in its middle, and so does the prompt."""
    return prompt[: len(prompt) // 2] + prompt[len(prompt) // 2 + 1 :] + reply[2:] + [2, turn + 30]


def play(
    sampler: Sampler, prompts: list[list[int]], turns: int = 3, follow: Callable = next_prompt,
    watch: Callable[[Sampler], None] = lambda sampler: None,
) -> list[tuple[list[int], list[int], list[Draw]]]:
    """Play dialogues as the trainer does: whoever has ended goes on as soon as there is room. Check lanes and memory.

    Returns each turn's prompt, seeds and draws, in the order of dialogues and turns.
    """
    n, history = sampler.n, {key: list(prompt) for key, prompt in enumerate(prompts)}
    ready, ended, played = deque(history), defaultdict(list), defaultdict(list)
    while ready or sampler.running:
        while ready:
            key = ready[0]
            seeds = [1000 * len(played[key]) + 10 * key + c for c in range(n)]
            if not sampler.start(key, history[key], seeds):
                break
            played[key].append((history[key], seeds))
            ready.popleft()
        for draw in sampler.step():
            ended[draw.key].append(draw)
            if len(ended[draw.key]) == n:
                key, draws = draw.key, sorted(ended.pop(draw.key), key=lambda draw: draw.candidate)
                winner, turn = (key + len(played[key])) % n, len(played[key])
                played[key][-1] += (draws,)
                sampler.adopt(key, winner)
                history[key] = follow(history[key], draws[winner].token_ids, key, turn)
                if turn < turns:
                    ready.append(key)
                else:
                    sampler.forget(key)
        running = sum(not draw.stop_reason for row in sampler.rows if row for draw in row.draws)
        assert len(sampler.draws) == sampler.lanes.shape[1] == (sampler.members >= 0).sum() == running
        assert running <= n * sampler.batch_size and len(sampler.rows) <= sampler.max_rows
        stored = sum(x.nbytes for x in sampler.cache.keys + sampler.cache.values)
        assert sampler.kv_bytes is None or stored <= sampler.kv_bytes
        watch(sampler)
    assert all(len(played[key]) == turns for key in history)
    return [turn for key in history for turn in played[key]]


@pytest.fixture(scope="module")
def assert_exact(policy) -> Callable:
    """A check that each turn of a play is what its prompt gives alone, from a fresh prefill."""
    known: dict[tuple, list[Draw]] = {}

    def check(sampler: Sampler, played: list[tuple[list[int], list[int], list[Draw]]]) -> None:
        settings = dict(max_new_tokens=sampler.max_new_tokens, stop_ids=sampler.stop_ids, n=sampler.n)
        for prompt, seeds, draws in played:
            key = (*prompt, -1, *seeds, *map(str, settings.items()))
            if key not in known:
                known[key] = generate(policy, [prompt], seeds=seeds, **settings)
            assert_same(draws, known[key])

    return check


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("lag", [0, 1])
def test_turns_equal_fresh_prefills(policy, assert_exact, n, lag):
    """Guards the cache across turns: adopted candidates, the id that was never fed, and new text are the dialogue.

    And with lag 1, as on CUDA: a step too many, computed for those that had ended, leaves no trace.
    """
    sampler = new_sampler(policy, n=n, lag=lag)
    assert_exact(sampler, played := play(sampler, PROMPTS))
    stopped = {len(draw.token_ids) for _, _, draws in played for draw in draws}
    assert {1, 2, 3, 20} <= stopped or n == 1  # ends at many steps, the first and the last among them


@pytest.mark.parametrize("n", [1, 4])
def test_the_row_holds_what_it_says(policy, n):
    """Guards the cache itself: after each turn it holds keys and values of prompt and winner, all but the last id."""
    sampler, prompts = new_sampler(policy, n=n), [list(prompt) for prompt in PROMPTS[:3]]
    for turn in range(3):
        for key, prompt in enumerate(prompts):
            assert sampler.start(key, prompt, [100 * turn + 10 * key + c for c in range(n)])
        draws = finish(sampler)
        for key, prompt in enumerate(prompts):
            winner = draws[key * n + (key + turn) % n]
            sampler.adopt(key, winner.candidate)
            assert sampler.rows[sampler.index_of(key)].token_ids == prompt + winner.token_ids[:-1]
            expected = computed(policy, prompt + winner.token_ids[:-1])
            torch.testing.assert_close(stored(sampler, key), expected, atol=1e-5, rtol=0)
            prompts[key] = next_prompt(prompt, winner.token_ids, key, turn)


@pytest.mark.parametrize("lag", [0, 1])
def test_only_new_ids_are_computed(policy, monkeypatch, lag):
    """Guards the saving: of the next turn's prompt, all that was fed before is kept, and the rest computed once."""
    forwards, forward = [], policy.forward
    monkeypatch.setattr(policy, "forward", lambda ids, *a: (forwards.append(ids.shape[1]), forward(ids, *a))[1])
    sampler = new_sampler(policy, n=4, lag=lag)
    assert sampler.start(0, PROMPTS[4], range(4))
    first = finish(sampler)
    assert (sampler.counts["tokens_prefilled"], sampler.counts["tokens_kept"], forwards[0]) == (17, 0, 17)
    sampler.adopt(0, 2)
    prompt = next_prompt(PROMPTS[4], first[2].token_ids, 0, 0)
    forwards.clear()
    assert sampler.start(0, prompt, range(4))
    finish(sampler)
    kept = 17 + len(first[2].token_ids) - 1
    assert (sampler.counts["tokens_kept"], forwards[0]) == (kept, len(prompt) - kept)
    assert sampler.counts["tokens_prefilled"] == 17 + len(prompt) - kept
    sampler.adopt(0, 0)
    assert sampler.start(0, prompt[:5], range(4))  # all of it is there; the last one is fed again, to predict from
    assert_same(finish(sampler), generate(policy, [prompt[:5]], n=4, max_new_tokens=20, stop_ids=STOPS, seeds=range(4)))
    assert sampler.counts["tokens_kept"] == kept + 4


@pytest.mark.parametrize("n", [1, 4])
def test_a_rewritten_history_is_exact(policy, assert_exact, n):
    """Guards --history-profile latest: a prompt that departs from the cached ids is computed from there on, only."""
    sampler = new_sampler(policy, n=n, batch_size=3)
    assert_exact(sampler, play(sampler, PROMPTS, follow=rewritten))
    assert sampler.counts["tokens_kept"] > 20


# ----------------------------------------------------------------------------------------------- continuous batching


@pytest.mark.parametrize(("n", "batch_size"), [(1, 1), (1, 3), (4, 2), (2, 5)])
def test_dialogues_join_and_leave_in_mid_flight(policy, assert_exact, n, batch_size):
    """Guards joins beside others that decode: every turn is as if it were alone, and batch_size bounds who runs.

    `play` asserts at each step that there is one lane for each running candidate, and none else.
    """
    sampler = new_sampler(policy, n=n, batch_size=batch_size)
    ages: list[set[int]] = []  # of those that decode together
    assert_exact(sampler, play(sampler, PROMPTS, watch=lambda sampler: ages.append(set(sampler.lanes[STEP].tolist()))))
    assert batch_size == 1 or max(map(len, ages)) > 1
    assert sampler.counts["kv_evictions"] == 0  # parked dialogues keep their rows: a turn's old ids are never computed
    assert sampler.counts["tokens_prefilled"] < sampler.counts["tokens_kept"] + sum(map(len, PROMPTS))


def test_a_full_sampler_says_so(policy):
    """Guards start() beyond batch_size: False, and nothing is changed by it, until a dialogue has ended."""
    sampler = new_sampler(policy, n=2, batch_size=2, stop_ids=[], max_new_tokens=5)
    assert sampler.start(0, [5, 6], [1, 2]) and sampler.start(1, [9], [3, 4])
    for _ in range(4):  # the prefill gives the first token, and each step one more
        counts = dict(sampler.counts)
        assert not sampler.start(2, [8], [5, 6])
        assert dict(sampler.counts) == counts and sampler.index_of(2) is None
        sampler.step()
    assert sampler.running == 0 and sampler.start(2, [8], [5, 6])


def test_a_parked_dialogue_keeps_its_row(policy):
    """Guards a row that others overwrite while its dialogue waits: the next turn computes only its new ids."""
    sampler = new_sampler(policy, n=2)
    assert sampler.start(0, PROMPTS[2], [1, 2])
    first = finish(sampler)
    sampler.adopt(0, 1)
    before = stored(sampler, 0).clone()
    for key in range(1, 6):
        assert sampler.start(key, PROMPTS[key], [10 * key, 10 * key + 1])
        sampler.step()
    finish(sampler)
    assert torch.equal(stored(sampler, 0), before)
    prompt, kept = next_prompt(PROMPTS[2], first[1].token_ids, 0, 0), sampler.counts["tokens_kept"]
    assert sampler.start(0, prompt, [3, 4])
    assert sampler.counts["tokens_kept"] == kept + len(PROMPTS[2]) + len(first[1].token_ids) - 1
    assert_same(finish(sampler), generate(policy, [prompt], n=2, max_new_tokens=20, stop_ids=STOPS, seeds=[3, 4]))


# ------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(("n", "rows"), [(1, 1), (1, 2), (4, 1), (4, 2)])
@pytest.mark.parametrize("lag", [0, 1])
def test_a_small_budget_gives_the_same_samples(policy, assert_exact, n, rows, lag):
    """Guards the budget: dialogues queue, lose their rows and are computed again, and all sample the very same.

    `play` asserts at each step that the cache is within the budget.
    """
    longest = 17 + 2 * (20 + 3) + n * 20  # slots of the last turn of the longest dialogue
    sampler = new_sampler(policy, n=n, lag=lag, kv_bytes=rows * longest * SLOT)
    assert_exact(sampler, play(sampler, PROMPTS))
    assert sampler.bytes_per_slot == SLOT and sampler.counts["kv_evictions"] > 0
    roomy = new_sampler(policy, n=n)
    play(roomy, PROMPTS)
    assert sampler.counts["tokens_prefilled"] > roomy.counts["tokens_prefilled"]
    assert sum(sampler.counts[name] for name in ("tokens_prefilled", "tokens_kept")) == sum(
        roomy.counts[name] for name in ("tokens_prefilled", "tokens_kept")
    )


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("lag", [0, 1])
def test_growth_in_mid_run_is_exact(policy, n, lag):
    """Guards the move to a larger cache while others decode, wait parked, and are started but not prefilled."""
    sampler, seeds = new_sampler(policy, n=n, lag=lag, stop_ids=[], max_rows=5), [range(k, k + n) for k in range(6)]
    settings = dict(n=n, max_new_tokens=20, stop_ids=[])
    assert sampler.start(0, PROMPTS[0], seeds[0]) and sampler.start(1, PROMPTS[2], seeds[1])
    finish(sampler)
    sampler.forget(0)
    sampler.adopt(1, n - 1)  # row 1 of the cache is parked
    parked, capacity = stored(sampler, 1).clone(), sampler.cache.shape[1]
    assert sampler.start(2, PROMPTS[1], seeds[2])
    ended = [draw for _ in range(5) for draw in sampler.step()]  # row 0 decodes
    assert sampler.start(3, PROMPTS[3], seeds[3])  # waits for its prefill
    assert sampler.cache.shape[1] == capacity
    assert sampler.start(4, PROMPTS[4] * 4, seeds[4]) and sampler.cache.shape[1] > capacity
    assert torch.equal(stored(sampler, 1), parked) and ended == []
    ended += [draw for _ in range(3) for draw in sampler.step()]
    assert sampler.start(5, PROMPTS[4] * 9, seeds[5])  # again, and now three decode
    ended = sorted(ended + finish(sampler), key=lambda draw: (draw.key, draw.candidate))
    expected = [PROMPTS[1], PROMPTS[3], PROMPTS[4] * 4, PROMPTS[4] * 9]
    alone = [generate(policy, [prompt], seeds=seeds[key + 2], **settings) for key, prompt in enumerate(expected)]
    assert_same(ended, [draw for draws in alone for draw in draws])
    assert torch.equal(stored(sampler, 1), parked)


def test_growth_within_a_budget_waits_for_those_that_decode(policy):
    """Guards a candidate that loses its row: a longer dialogue that needs all memory is told to wait, and then fits."""
    sampler = new_sampler(policy, n=1, stop_ids=[], kv_bytes=100 * SLOT, max_rows=4)
    assert sampler.start(0, [5] * 10, [1]) and sampler.start(1, [6] * 12, [2])  # 30 and 32 slots: two rows at most
    assert not sampler.start(2, [7] * 60, [3])  # 80 slots
    first = finish(sampler)
    assert sampler.start(2, [7] * 60, [3]) and sampler.cache.shape == (1, 80)
    assert sampler.counts["kv_evictions"] == 2
    for key, prompt in ((0, [5] * 10), (1, [6] * 12)):
        assert_same([first[key]], generate(policy, [prompt], max_new_tokens=20, stop_ids=[], seeds=[key + 1]))
    assert_same(finish(sampler), generate(policy, [[7] * 60], max_new_tokens=20, stop_ids=[], seeds=[3]))


def test_growth_keeps_its_own_row_and_the_longest(policy):
    """Guards what is lost where a larger cache has fewer rows: neither the dialogue that grows, nor the dearest one."""
    sampler = new_sampler(policy, stop_ids=[], kv_bytes=120 * SLOT)
    for key, length in ((1, 10), (0, 7), (2, 5), (3, 8)):  # four rows of 30 slots
        assert sampler.start(key, [5] * length, [key])
    for draw in finish(sampler):
        sampler.adopt(draw.key, 0)
    assert sampler.cache.shape == (4, 30)
    own = sampler.rows[sampler.index_of(2)].token_ids
    assert sampler.start(2, own + [6] * 16, [9])
    assert sampler.cache.shape == (2, 60) and {row.key for row in sampler.rows} == {1, 2}
    assert (sampler.counts["kv_evictions"], sampler.counts["tokens_kept"]) == (2, len(own))


def test_the_shortest_parked_dialogue_is_evicted(policy):
    """Guards the choice of the victim: the one whose prompt is computed again most cheaply, never one that decodes."""
    sampler = new_sampler(policy, max_rows=3)
    for key, length in enumerate((9, 3, 6)):
        assert sampler.start(key, [5] * length, [key])
    finish(sampler)
    for key in range(3):
        sampler.adopt(key, 0)
    sizes = {key: len(sampler.rows[sampler.index_of(key)].token_ids) for key in range(3)}
    assert sampler.start(min(sizes, key=sizes.get), [5] * 3, [9])  # the shortest of all decodes now
    rest = sorted(set(sizes) - {min(sizes, key=sizes.get)}, key=sizes.get)
    assert sampler.start(7, [8], [3]) and sampler.counts["kv_evictions"] == 1
    assert sampler.index_of(rest[0]) is None and sampler.index_of(rest[1]) is not None


def test_a_row_lost_before_its_winner_is_known(policy, assert_exact):
    """Guards adopt() of a dialogue that waited for its judge and was evicted: its next turn is computed anew."""
    sampler = new_sampler(policy, n=2, max_rows=1)
    assert sampler.start(0, PROMPTS[0], [1, 2])
    first = finish(sampler)
    assert sampler.start(1, PROMPTS[1], [3, 4])
    finish(sampler)
    sampler.adopt(0, 1)
    sampler.adopt(1, 0)
    prompt = next_prompt(PROMPTS[0], first[1].token_ids, 0, 0)
    assert sampler.start(0, prompt, [5, 6])
    assert_exact(sampler, [(prompt, [5, 6], finish(sampler))])
    assert (sampler.counts["kv_evictions"], sampler.counts["tokens_kept"]) == (2, 0)


@pytest.mark.parametrize("decoding", [False, True])
def test_an_impossible_budget_is_one_line(policy, decoding):
    """Guards an endless wait for memory that no end of others can free: the flags to change are named."""
    sampler = new_sampler(policy, n=2, kv_bytes=60 * SLOT)
    if decoding:
        assert sampler.start(0, [5] * 20, [1, 2])  # 60 slots: just enough
        assert not sampler.start(1, [5] * 21, [3, 4])
        finish(sampler)
    with pytest.raises(ValueError, match="needs 61 slots of the KV cache.*--kv-gib.*--max-new-tokens") as error:
        sampler.start(1, [5] * 21, [3, 4])
    assert "\n" not in str(error.value)


def test_the_cache_may_be_filled_to_the_last_slot(policy):
    """Guards an off-by-one in the capacity: a row that fits to the slot decodes to the last token, exactly."""
    for n in (1, 3):
        sampler = new_sampler(policy, n=n, stop_ids=[], lag=1, kv_bytes=(9 + 20 * n) * SLOT)
        assert sampler.start(0, PROMPTS[2], range(n)) and sampler.cache.shape == (1, 9 + 20 * n)
        expected = generate(policy, [PROMPTS[2]], n=n, max_new_tokens=20, stop_ids=[], seeds=range(n))
        assert_same(finish(sampler), expected)


def test_the_budget_on_cuda_is_what_is_free_in_whole(monkeypatch):
    """Guards out of memory in a later rollout: what torch keeps in pieces is given back first, and counts as taken."""
    free = {"bytes": 1000}
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: free.update(bytes=5000))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free["bytes"], 10_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3000)  # 1000 of it in holes
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2000)
    assert kv_budget(Config(), torch.device("cuda")) == 4500


@pytest.mark.parametrize("given", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_segments_grow_unless_told_otherwise(monkeypatch, given):
    """Guards the same, and a user's own settings of the allocator."""
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "max_split_size_mb:64")  # restored at the end
        if name != given:
            monkeypatch.delenv(name)
    let_segments_grow()
    found = {name: os.environ[name] for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF") if name in os.environ}
    assert found == ({given: "max_split_size_mb:64"} if given else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})


@pytest.mark.skipif(
    not hasattr(torch._C, "_accelerator_getAllocatorSettings"), reason="this torch (2.11) does not tell its settings"
)
def test_torch_reads_the_setting_after_its_import():
    """Guards a setting that comes too late: torch's allocators, on a CPU too, read their settings once."""
    program = "import torch; from learners.loading import let_segments_grow as grow; grow();"
    program += "print(torch._C._accelerator_getAllocatorSettings())"
    bare = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    command, root = [sys.executable, "-c", program], Path(__file__).parents[1]
    done = subprocess.run(command, env=bare, cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "expandable_segments:True", done.stderr


# ---------------------------------------------------------------------------------------------------------------- lag


@pytest.mark.parametrize("n", [1, 4])
def test_reading_late_changes_nothing(policy, n):
    """Guards the host's lag on a GPU: for stops at any step the same draws come, as exact, one step late."""
    def decoded(lag: int):
        sampler, ended, steps = new_sampler(policy, n=n, lag=lag), [], 0
        for key, prompt in enumerate(PROMPTS):
            assert sampler.start(key, prompt, [10 * key + c for c in range(n)])
        while sampler.running:
            steps += 1
            ended += [(draw.key, draw.candidate, draw, steps) for draw in sampler.step()]
        return zip(*[(draw, step) for _, _, draw, step in sorted(ended, key=lambda item: item[:2])], strict=True)

    (on_time, steps), (late, late_steps) = decoded(0), decoded(1)
    assert_same(late, on_time)
    lengths = [len(draw.token_ids) for draw in on_time]
    assert {1, 2, 20} <= set(lengths) if n == 4 else 20 in lengths
    # The first step gives two tokens, the prefill's and a decoded one.
    assert list(steps) == [max(1, length - 1) for length in lengths] and list(late_steps) == lengths


class CudaInName(str):
    """A device's name that says it were CUDA, where all is computed on a CPU."""

    type = "cuda"


class Calls(TorchFunctionMode):
    """Note what a CUDA machine would queue or wait for: copies that do not wait, events, replays, pinned tensors."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.seen, calls = [], self

        class Event:
            def record(self):
                self.number = sum(call.startswith("record") for call in calls.seen) + 1
                calls.seen.append(f"record {self.number}")

            def synchronize(self):
                calls.seen.append(f"wait {self.number}")

        def replay(sampler):
            calls.seen.append("replay")
            return sampler.advance(sampler.lanes)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(Sampler, "replay", replay)
        monkeypatch.setattr(Sampler, "uses_graphs", True)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.to and kwargs.get("non_blocking") and kwargs.get("copy"):
            self.seen.append("copy")
        elif func is torch.tensor:
            assert kwargs.pop("pin_memory", False), "a copy from memory that is not pinned waits for the device"
        return func(*args, **kwargs)


def test_all_graphs_share_one_pool(policy, monkeypatch):
    """Guards memory: a private pool for each number of lanes, up to 65 of them; and a pool that died in a resize."""
    pools, done = [], contextlib.nullcontext()

    class Graph:
        def pool(self):
            return f"of graph {self.number}"

    def graph(graph, pool=None):
        graph.number = len(pools)
        pools.append(pool)
        return done

    for name, stand_in in (("Stream", mock.Mock), ("current_stream", mock.Mock), ("stream", lambda side: done),
                           ("CUDAGraph", Graph), ("graph", graph)):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(Sampler, "advance", lambda sampler, lanes: (None, lanes))
    sampler = new_sampler(policy)
    for bucket in (8, 4, 2):
        sampler.capture(bucket)
    sampler.resize([], 1, 10)
    sampler.capture(4)
    assert pools == [None, "of graph 0", "of graph 0", None]


def test_the_host_waits_for_the_older_step_only(policy, monkeypatch):
    """Guards the lag of a GPU: step t's copy and event are queued behind its replay, and then t - 1's are waited for.

    And lists of numbers go to the device pinned, so that closing up the lanes does not wait for step t either.
    """
    expected = generate(policy, PROMPTS[:3], n=4, max_new_tokens=5, stop_ids=STOPS, seeds=range(12))
    sampler = new_sampler(policy, n=4, max_new_tokens=5, lag=1)
    for key in range(3):
        assert sampler.start(key, PROMPTS[key], range(4 * key, 4 * key + 4))
    sampler.device = CudaInName("cpu")
    with Calls(monkeypatch) as calls:
        draws = finish(sampler)
    assert_same(draws, expected)
    assert len({len(draw.token_ids) for draw in draws}) > 1  # lanes close up in between
    seen, steps = ["copy", "copy", "record 1"], calls.seen.count("replay")
    for step in range(2, steps + 2):
        seen += ["replay", "copy", "copy", f"record {step}", f"wait {step - 1}"]
    assert calls.seen == seen and steps == 5


# ------------------------------------------------------------------------------------------------- errors, small print


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(prompts=[*PROMPTS[:7], []]), "0 ids and 1 seeds; at least one id and 1 seeds"),
        (dict(prompts=[*PROMPTS[:7], [53]]), "id 53 is outside the model's vocabulary of 53"),
        (dict(prompts=[*PROMPTS[:7], [-1, 60]]), "id -1 is outside"),
        (dict(n=0), "n=0"),
        (dict(max_new_tokens=0), "max_new_tokens=0"),
        (dict(temperature=-1.0), "temperature=-1.0"),
        (dict(n=2, seeds=[1, 2, 3]), "3 seeds for 16 draws"),
    ],
)
def test_bad_arguments_are_refused(policy, arguments, words):
    """Guards a CUDA assertion deep in a kernel: what cannot be sampled is one line that names the number."""
    with pytest.raises(ValueError, match=words) as error:
        generate(policy, **(dict(prompts=PROMPTS, max_new_tokens=5, stop_ids=STOPS) | arguments))
    assert "\n" not in str(error.value)


def test_a_refused_dialogue_leaves_the_others_alone(policy):
    """Guards a half-started dialogue: bad ids and seeds are refused before any row or counter is touched."""
    sampler = new_sampler(policy, n=2)
    assert sampler.start(0, PROMPTS[0], [1, 2])
    for prompt, seeds in (([53], [3, 4]), ([], [3, 4]), ([5], [3])):
        with pytest.raises(ValueError):
            sampler.start(1, prompt, seeds)
    assert sampler.running == 2 and sampler.index_of(1) is None and sampler.counts["tokens_prefilled"] == 4
    assert_same(finish(sampler), generate(policy, PROMPTS[:1], n=2, max_new_tokens=20, stop_ids=STOPS, seeds=[1, 2]))


def test_training_goes_on_after_sampling(policy):
    """Guards autograd: tensors left by the sampler's no-grad mode must not poison a later forward and backward."""
    sampler = new_sampler(policy)
    sampler.start(0, [5, 6], [1])
    sampler.step()
    policy(torch.tensor([[5, 6, 7]])).sum().backward()
    assert policy.model.norm.weight.grad is not None
    policy.zero_grad()
    finish(sampler)


# ------------------------------------------------------------------------------------------------------------ sample()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_match_softmax(temperature):
    """Guards the inverse CDF: chi-square of 40,000 draws against softmax(logits / temperature), fixed seed."""
    logits = torch.tensor([2.0, -1.0, 0.5, 0.0, -torch.inf, 1.2, -3.0])
    draws, probs = 40_000, (logits / temperature).softmax(-1)
    uniforms = torch.rand(draws, generator=torch.Generator().manual_seed(0))
    ids, logprobs = sample(logits.expand(draws, -1), temperature, uniforms)
    counts = torch.bincount(ids, minlength=7)
    assert counts[4] == 0
    kept = probs > 0
    chi_square = ((counts - draws * probs)[kept] ** 2 / (draws * probs)[kept]).sum()
    assert chi_square < 20.5  # 99.9 % quantile at 5 degrees of freedom
    torch.testing.assert_close(logprobs, probs.log()[ids], atol=1e-6, rtol=0)


def test_impossible_ids_are_never_drawn():
    """Guards the ends of the CDF: u = 0 before leading zeros, the largest u < 1 past a rounded-down total."""
    V = 20_000
    logits = torch.randn(V, generator=torch.Generator().manual_seed(0))
    logits[:100] = logits[-100:] = -torch.inf
    logits[::3] = -200.0  # underflows to probability 0
    uniforms = torch.cat((torch.tensor([0.0, 1.0 - 2.0**-24]), torch.linspace(0, 1 - 2.0**-24, 500)))
    ids, logprobs = sample(logits.expand(len(uniforms), -1), 1.0, uniforms)
    assert (logits[ids] > -100).all() and logprobs.isfinite().all()
    possible = (logits > -100).nonzero()
    assert ids[0] == possible[0] and ids[1] == possible[-1]


def test_temperature_zero_takes_the_likeliest():
    """Guards greedy decoding against a division by zero; its log-prob is that of temperature 1."""
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, -1.0]])
    ids, logprobs = sample(logits, 0.0, torch.zeros(2))
    assert ids.tolist() == [1, 0]
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[[0, 1], [1, 0]])
