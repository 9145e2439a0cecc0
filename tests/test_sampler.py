"""The KV-cached sampler: it equals uncached sampling, whatever shares its batch, and leaves an honest cache behind."""

import pytest
import torch

from kernels.sample_head import sample
from model import KVCache, Qwen2Config, Qwen2ForCausalLM, generate, random_policy

CONFIG = Qwen2Config(vocab_size=53, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, rope_theta=5000.0)  # fmt: skip
STOPS = {7, 11, 23}  # about one sampled id in eighteen
PROMPTS = [list(range(3, 3 + length)) for length in (4, 1, 9, 2, 17, 6, 12, 3)]


@pytest.fixture(scope="module")
def policy() -> Qwen2ForCausalLM:
    """A policy of random weights, large enough that each token's distribution depends on the whole row."""
    policy = random_policy(CONFIG, seed=0)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if parameter.dim() > 1 and "embed_tokens" not in name:
                parameter.mul_(8)
    return policy


def new_cache(rows: int, capacity: int = 64) -> KVCache:
    return KVCache(CONFIG, rows, capacity)


@torch.no_grad()
def logprobs_of(policy, prompt: list[int], sampled: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Log-probs of the sampled ids by one plain forward over prompt and sample."""
    hidden = policy(torch.tensor([prompt + sampled]))[0, len(prompt) - 1 : -1]
    return (policy.logits(hidden) / temperature).log_softmax(-1).gather(-1, torch.tensor(sampled)[:, None])[:, 0]


def stored(cache: KVCache, row: int) -> torch.Tensor:
    """Keys and values that a row holds, (2L, Hkv, length, Dh)."""
    return torch.stack([tensor[row, :, : cache.lengths[row]] for tensor in cache.keys + cache.values])


def assert_same(ours, theirs) -> None:
    """Same ids, lengths and reasons, log-probs to 1e-5."""
    assert ours.token_ids == theirs.token_ids
    assert (ours.lengths, ours.stop_reasons) == (theirs.lengths, theirs.stop_reasons)
    for one, other in zip(ours.logprobs, theirs.logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), atol=1e-5, rtol=0)


# --------------------------------------------------------------------------------------- cached, batched and extended


def test_cached_equals_uncached(policy):
    """Guards positions and masks while decoding: greedy by a full forward per token gives the same ids."""
    ours = generate(policy, new_cache(8), PROMPTS, max_new_tokens=20, stop_ids=STOPS, temperature=0)
    for prompt, sampled in zip(PROMPTS, ours.token_ids, strict=True):
        expected: list[int] = []
        while len(expected) < 20 and not (expected and expected[-1] in STOPS):
            expected.append(int(policy.logits(policy(torch.tensor([prompt + expected]))[0, -1]).argmax()))
        assert sampled == expected
    assert len({token for sampled in ours.token_ids for token in sampled}) > 10  # not one token repeated


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 1.5])
def test_logprobs_equal_a_full_forward(policy, temperature):
    """Guards old log-probs: each is log softmax(logits / temperature) of the id at its own step (greedy: at 1)."""
    samples = generate(policy, new_cache(8), PROMPTS, n=3, max_new_tokens=20, stop_ids=STOPS, temperature=temperature)
    for row, (sampled, logprobs) in enumerate(zip(samples.token_ids, samples.logprobs, strict=True)):
        expected = logprobs_of(policy, PROMPTS[row // 3], sampled, temperature or 1.0)
        torch.testing.assert_close(torch.tensor(logprobs), expected, atol=1e-5, rtol=0)


def test_batch_equals_singles(policy):
    """Guards ragged batches: padding, neighbours and the compaction of finished rows change nothing."""
    batch = generate(policy, new_cache(8), PROMPTS, max_new_tokens=30, stop_ids=STOPS, seeds=range(8))
    for row, prompt in enumerate(PROMPTS):
        single = generate(policy, new_cache(1), [prompt], max_new_tokens=30, stop_ids=STOPS, seeds=[row])
        assert single.token_ids[0] == batch.token_ids[row]
        assert single.stop_reasons[0] == batch.stop_reasons[row]
        torch.testing.assert_close(
            torch.tensor(single.logprobs[0]), torch.tensor(batch.logprobs[row]), atol=1e-5, rtol=0
        )


def test_streams_do_not_depend_on_the_batch(policy):
    """Guards seeded rows: the same prompt and stream sample the same ids in another company and order."""
    seeds = list(range(40, 48))
    batch = generate(policy, new_cache(8), PROMPTS, max_new_tokens=20, stop_ids=STOPS, seeds=seeds)
    order = [6, 2, 5]
    few = generate(policy, new_cache(3), [PROMPTS[i] for i in order], max_new_tokens=20, stop_ids=STOPS,
                   seeds=[seeds[i] for i in order])  # fmt: skip
    assert few.token_ids == [batch.token_ids[i] for i in order]


def test_without_seeds_rows_are_drawn_from_the_global_generator(policy):
    """Guards a run's reproducibility, and rows that would share one stream."""
    def draw(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return generate(policy, new_cache(1), [[5]], n=4, max_new_tokens=9, stop_ids=[]).token_ids

    assert draw(1) == draw(1) != draw(2)
    assert len(set(map(tuple, draw(1)))) == 4


def test_a_seed_is_one_generator_per_row(policy):
    """Guards the draws of earlier runs: step t of a row uses the t-th uniform of its seed's own stream."""
    samples = generate(policy, new_cache(2), [[5, 6], [9]], max_new_tokens=9, stop_ids=[], seeds=[7, 8])
    for prompt, seed, drawn in zip([[5, 6], [9]], [7, 8], samples.token_ids, strict=True):
        generator = torch.Generator().manual_seed(seed)
        for step, uniform in enumerate(torch.rand(9, generator=generator)):
            with torch.no_grad():
                logits = policy.logits(policy(torch.tensor([prompt + drawn[:step]]))[:, -1])
            assert sample(logits, 1.0, uniform[None])[0].item() == drawn[step]


def test_greedy_does_not_advance_the_generator(policy):
    """Guards training against evaluation: a greedy pass in between must not change what is sampled next."""
    before = torch.get_rng_state()
    generate(policy, new_cache(1), [[5]], max_new_tokens=4, stop_ids=[], temperature=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_candidates_equal_repeats(policy):
    """Guards the shared prompt: n candidates off one prefill are what n copies of the prompt give, at row b * n + c."""
    shared = generate(policy, new_cache(3), PROMPTS[:3], n=4, max_new_tokens=20, stop_ids=STOPS, seeds=range(12))
    repeated = [prompt for prompt in PROMPTS[:3] for _ in range(4)]
    apart = generate(policy, new_cache(12), repeated, max_new_tokens=20, stop_ids=STOPS, seeds=range(12))
    assert_same(shared, apart)


def test_three_turns_equal_one_prefill(policy):
    """Guards the cache across turns: best-of-n rows, the pending id and new text add up to the plain dialogue.

    The dialogue is kept as ids; after each turn one candidate per prompt goes on, and only what the cache lacks is
    computed.
    """
    dialogues, cache = [list(prompt) for prompt in PROMPTS[:4]], new_cache(4, capacity=128)
    new_ids = dialogues
    for turn in range(3):
        samples = generate(policy, cache, new_ids, n=2, max_new_tokens=12, stop_ids=STOPS,
                           seeds=range(8 * turn, 8 * turn + 8))  # fmt: skip
        winners = torch.tensor([0, 3, 5, 6])
        for dialogue, row in zip(dialogues, winners.tolist(), strict=True):
            expected = logprobs_of(policy, dialogue, samples.token_ids[row])
            torch.testing.assert_close(torch.tensor(samples.logprobs[row]), expected, atol=1e-5, rtol=0)
            dialogue += samples.token_ids[row] + [2, turn, 30 + row]
        cache.adopt(samples.branches, winners)
        new_ids = [ids[length:] for ids, length in zip(dialogues, cache.lengths.tolist(), strict=True)]
        assert all(len(ids) == 4 for ids in new_ids)  # the pending id and three new ones, nothing computed twice

    generate(policy, cache, new_ids, max_new_tokens=1, stop_ids=[])
    fresh = new_cache(4, capacity=128)
    generate(policy, fresh, dialogues, max_new_tokens=1, stop_ids=[])
    assert cache.lengths.tolist() == fresh.lengths.tolist() == [len(ids) for ids in dialogues]
    for row in range(4):
        torch.testing.assert_close(stored(cache, row), stored(fresh, row), atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------ stops and the cache


def test_stop_id_is_kept_and_ends_the_row(policy):
    """Guards the trained stop: the stop id is in the sample, once, last, with its log-prob; running out has none."""
    samples = generate(policy, new_cache(8), PROMPTS, n=4, max_new_tokens=16, stop_ids=STOPS, seeds=range(32))
    assert set(samples.stop_reasons) == {"stop", "length"}
    rows = zip(samples.token_ids, samples.logprobs, samples.lengths, samples.stop_reasons, strict=True)
    for ids, logprobs, length, reason in rows:
        assert len(ids) == len(logprobs) == length
        assert not STOPS & set(ids[:-1])
        assert (ids[-1] in STOPS) == (reason == "stop")
        assert reason == "stop" or length == 16


def test_stop_id_as_the_last_allowed_token(policy):
    """Guards the boundary: a stop id sampled at max_new_tokens is a stop, not a truncation."""
    free = generate(policy, new_cache(1), [[5, 6]], max_new_tokens=6, stop_ids=[], temperature=0).token_ids[0]
    last = free[-1]
    until = free.index(last) + 1
    cut = generate(policy, new_cache(1), [[5, 6]], max_new_tokens=until, stop_ids=[last], temperature=0)
    assert cut.token_ids == [free[:until]] and cut.stop_reasons == ["stop"]
    short = generate(policy, new_cache(1), [[5, 6]], max_new_tokens=3, stop_ids=[], temperature=0)
    assert short.token_ids == [free[:3]] and short.stop_reasons == ["length"]


def test_cache_holds_all_but_the_pending_id(policy):
    """Guards finished rows: they hold prompt and sample less the last id, exactly, and nothing beyond."""
    for n in (1, 2):
        cache = new_cache(8)
        samples = generate(policy, cache, PROMPTS, n=n, max_new_tokens=30, stop_ids=STOPS, seeds=range(8 * n))
        assert len(set(samples.lengths)) > 4
        if n == 2:  # the prompts are stored once; then the second candidates go on
            assert cache.lengths.tolist() == [len(prompt) for prompt in PROMPTS]
            assert samples.branches.lengths.tolist() == [length - 1 for length in samples.lengths]
            cache.adopt(samples.branches, torch.arange(1, 16, 2))
        for row, prompt in enumerate(PROMPTS):
            ids = prompt + samples.token_ids[n * row + n - 1][:-1]
            assert cache.lengths[row] == len(ids)
            alone = new_cache(1)
            with torch.no_grad():
                policy(torch.tensor([ids]), cache=alone)
            torch.testing.assert_close(stored(cache, row), stored(alone, 0), atol=1e-5, rtol=0)
            for tensor in cache.keys + cache.values:
                assert not tensor[row, :, len(ids) :].any()


def test_a_full_cache_adopts_nothing(policy):
    """Guards slots beyond the capacity: what does not fit is refused, and the row stays as it was."""
    cache = new_cache(1, capacity=12)
    samples = generate(policy, cache, [[5, 6, 7]], n=2, max_new_tokens=9, stop_ids=[], seeds=[1, 2])
    cache.capacity = 10
    with pytest.raises(ValueError, match="11 tokens are needed in a row, the KV cache's capacity is 10"):
        cache.adopt(samples.branches, torch.tensor([1]))
    assert cache.lengths.tolist() == [3]


def test_branches_take_one_token_at_a_time(policy):
    """Guards a chunk that would attend to its own row only, without the prefix."""
    branches = new_cache(2).branch(2, capacity=8)
    with torch.no_grad(), pytest.raises(ValueError, match="one at a time"):
        policy(torch.zeros(4, 3, dtype=torch.long), cache=branches)


def test_finished_rows_leave_the_batch(policy, monkeypatch):
    """Guards the compaction: decoding goes on with half the rows or fewer once half have stopped."""
    batches = []
    forward = policy.forward
    monkeypatch.setattr(policy, "forward", lambda ids, **kwargs: (batches.append(len(ids)), forward(ids, **kwargs))[1])
    samples = generate(policy, new_cache(8), PROMPTS, n=4, max_new_tokens=30, stop_ids=STOPS, seeds=range(32))
    for step, rows in enumerate(batches[1:], start=1):
        running = sum(length > step for length in samples.lengths)
        assert running <= rows < max(2 * running, 33)
    assert min(batches[1:]) < 8


def test_select_and_cut(policy):
    """Guards going back: rows reordered, repeated and cut to a prefix continue like that prefix."""
    cache = new_cache(8)
    generate(policy, cache, PROMPTS, max_new_tokens=10, stop_ids=[], seeds=range(8))
    cache.select(torch.tensor([4, 2, 4]), lengths=torch.tensor([16, 5, 3]))
    assert cache.lengths.tolist() == [16, 5, 3]
    prefixes = [PROMPTS[4][:16], PROMPTS[2][:5], PROMPTS[4][:3]]
    ours = generate(policy, cache, [[40], [41, 42], [43]], max_new_tokens=10, stop_ids=[], seeds=[1, 2, 3])
    whole = [prefix + new for prefix, new in zip(prefixes, [[40], [41, 42], [43]], strict=True)]
    assert_same(ours, generate(policy, new_cache(3), whole, max_new_tokens=10, stop_ids=[], seeds=[1, 2, 3]))
    with pytest.raises(ValueError, match="cannot cut rows of"):
        cache.select(torch.tensor([0]), lengths=torch.tensor([1000]))


def test_select_changes_the_capacity(policy):
    """Guards the next turn's longer rows: a regrown cache continues as if it had been that large from the start."""
    cache = new_cache(2, capacity=4)
    with torch.no_grad():
        policy(torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), cache=cache)
    with pytest.raises(ValueError, match="a kept row has 4 tokens, the capacity asked for is 3"):
        cache.select(torch.tensor([1, 0]), capacity=3)
    assert cache.capacity == 4 and cache.lengths.tolist() == [4, 4]
    cache.select(torch.tensor([1, 0]), torch.tensor([4, 0]), capacity=20)
    ours = generate(policy, cache, [[9], [9]], max_new_tokens=12, stop_ids=[], seeds=[1, 2])
    assert_same(ours, generate(policy, new_cache(2), [[5, 6, 7, 8, 9], [9]], max_new_tokens=12, stop_ids=[],
                               seeds=[1, 2]))  # fmt: skip
    cache.select(torch.tensor([], dtype=torch.long))
    assert cache.nbytes == 0


def test_cache_size_and_release():
    """Guards the memory table: 2 * L * B * Hkv * capacity * Dh numbers, none after free()."""
    cache = new_cache(5, capacity=32)
    assert cache.nbytes == 2 * 2 * 5 * 2 * 32 * 12 * 4
    cache.free()
    assert cache.nbytes == 0 and len(cache.lengths) == 0


def test_training_goes_on_after_sampling(policy):
    """Guards autograd: tensors left by the sampler's no-grad mode must not poison a later forward and backward."""
    cache = new_cache(1)
    generate(policy, cache, [[5, 6]], max_new_tokens=3, stop_ids=[])
    policy(torch.tensor([[5, 6, 7]])).sum().backward()
    assert policy.model.norm.weight.grad is not None
    policy.zero_grad()
    with torch.no_grad():
        policy(torch.tensor([[8]]), cache=cache)


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(max_new_tokens=50), "66 tokens are needed .* capacity is 64; lower --max-new-tokens or --max-turns"),
        (dict(new_ids=PROMPTS[:7]), "8 rows, the batch 7"),
        (dict(new_ids=[*PROMPTS[:7], []]), "at least one new id"),
        (dict(new_ids=[*PROMPTS[:7], [53]]), "id 53 is outside the model's vocabulary of 53"),
        (dict(new_ids=[*PROMPTS[:7], [-1]]), "id -1 is outside"),
        (dict(n=0), "n=0"),
        (dict(max_new_tokens=0), "max_new_tokens=0"),
        (dict(temperature=-1.0), "temperature=-1.0"),
        (dict(n=2, seeds=[1, 2, 3]), "3 seeds for 16 sampled rows"),
    ],
)
def test_bad_arguments_leave_the_cache_alone(policy, arguments, words):
    """Guards a half-extended cache: everything is checked before the first token is computed."""
    cache = new_cache(8)
    with pytest.raises(ValueError, match=words) as error:
        generate(policy, cache, **(dict(new_ids=PROMPTS, max_new_tokens=5, stop_ids=STOPS) | arguments))
    assert "\n" not in str(error.value)
    assert cache.lengths.tolist() == [0] * 8 and not any(tensor.any() for tensor in cache.keys)


def test_cache_may_be_filled_to_the_last_slot(policy):
    """Guards an off-by-one in the capacity check: prompt + max_new_tokens - 1 tokens are stored, no more."""
    cache = new_cache(1, capacity=8)
    assert generate(policy, cache, [[1, 2, 3]], max_new_tokens=6, stop_ids=[]).lengths == [6]
    assert cache.lengths.tolist() == [8]


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
