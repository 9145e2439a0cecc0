"""The hand-written Qwen-2.5 against `transformers`, its critic and its token trees."""

from pathlib import Path

import pytest
import torch

from kernels.prefill_attention import Chunk, Chunks
from kernels.tree_attention import Block, Tree
from learners.weights import load_critic, load_policy, save_pretrained
from model import Cached, Critic, KVCache, Qwen2Config, Qwen2ForCausalLM, join_products, joined, random_policy
from sampler import generate

transformers = pytest.importorskip("transformers", reason="the parity tests compare with transformers' Qwen2")
CONFIG_05B = Path(__file__).parents[1].parent / "shared" / "qwen2.5" / "config-0.5B-Instruct.json"


def tiny_config(**changes) -> Qwen2Config:
    """A config in which every width differs, so that a transposed or mixed-up one cannot pass."""
    fields = dict(vocab_size=61, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, rope_theta=5000.0, rms_norm_eps=1e-5, eos_token_id=60)  # fmt: skip
    return Qwen2Config(**(fields | changes))


def randomised(config: Qwen2Config, seed: int = 0) -> Qwen2ForCausalLM:
    """A policy whose norm weights and biases are random too: at 1 and 0 a forgotten one goes unnoticed."""
    policy = random_policy(config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
            elif "embed_tokens" not in name:
                parameter.mul_(8)  # attention far from uniform, and the last token does not simply predict itself
    return policy


def peer(policy: Qwen2ForCausalLM):
    """The same weights in `transformers`' Qwen2 or Llama, without a copy of them."""
    family = policy.config.model_type.capitalize()
    kinds = getattr(transformers, f"{family}Config"), getattr(transformers, f"{family}ForCausalLM")
    config = kinds[0].from_dict(policy.config.to_dict(), attn_implementation="sdpa")
    with torch.device("meta"):
        hf = kinds[1](config)
    hf.load_state_dict(policy.state_dict(), strict=not policy.config.tie_word_embeddings, assign=True)
    hf.tie_weights()
    hf.model.rotary_emb = type(hf.model.rotary_emb)(config)  # its frequencies are not part of the state
    return hf.eval()


def some_ids(config: Qwen2Config, *shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(policy: Qwen2ForCausalLM, token_ids: torch.Tensor, **kwargs) -> torch.Tensor:
    return policy.logits(policy(token_ids, **kwargs))


@torch.no_grad()
def peer_logits(hf, token_ids: torch.Tensor) -> torch.Tensor:
    return hf(token_ids).logits


# ------------------------------------------------------------------------------------------------------------ parity


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_logits_match_transformers(tied, kv_heads, family):
    """Guards the whole forward: norms, biases, rotary layout, head grouping, SwiGLU, head."""
    policy = randomised(tiny_config(tie_word_embeddings=tied, num_key_value_heads=kv_heads, model_type=family))
    assert ("model.layers.0.self_attn.q_proj.bias" in policy.state_dict()) == (family == "qwen2")
    token_ids = some_ids(policy.config, 3, 40)
    torch.testing.assert_close(
        logits_of(policy, token_ids), peer_logits(peer(policy), token_ids), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_matters(tied):
    """Guards a parity test that could not fail: a forgotten bias or norm would leave the logits as they are."""
    policy = randomised(tiny_config(tie_word_embeddings=tied))
    token_ids = some_ids(policy.config, 2, 20)
    expected = peer_logits(peer(policy), token_ids).clone()
    for name, parameter in policy.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)), alpha=0.05)
        assert (logits_of(policy, token_ids) - expected).abs().max() > 1e-4, name
        with torch.no_grad():
            parameter.copy_(kept)


@pytest.mark.parametrize("tied", [True, False])
def test_greedy_generation_matches_transformers(tied):
    """Guards positions and masks of cached decoding: a slip shows after the first sampled token only."""
    policy = randomised(tiny_config(tie_word_embeddings=tied, eos_token_id=None))
    hf = peer(policy)
    prompts = [some_ids(policy.config, length, seed=length).tolist() for length in (1, 5, 12, 30)]
    draws = generate(policy, prompts, max_new_tokens=24, stop_ids=[], temperature=0)
    for prompt, sampled in zip(prompts, [draw.token_ids for draw in draws], strict=True):
        row = torch.tensor([prompt])
        # With no mask given, generate() would take ids equal to pad_token_id for padding.
        theirs = hf.generate(row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=24)
        assert theirs[0, len(prompt) :].tolist() == sampled
    assert len({token for draw in draws for token in draw.token_ids}) > 10  # not just one token repeated


def test_half_a_billion_widths_match_transformers():
    """Guards what tiny shapes hide (14 heads on 2, V = 151,936, theta 1e6), at the 0.5B widths with 2 layers."""
    config = Qwen2Config(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=2,
                         num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True)  # fmt: skip
    policy = randomised(config)
    token_ids = some_ids(config, 2, 12)
    expected = peer_logits(peer(policy), token_ids)
    # Logits of std 3 at this width: 1e-5 is relative to their size.
    torch.testing.assert_close(logits_of(policy, token_ids), expected, atol=1e-5 * expected.std().item(), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not CONFIG_05B.is_file(), reason="../shared/qwen2.5 is not on this machine")
def test_true_half_a_billion_config_matches_transformers():
    """Guards the published config.json and vocabulary, whole (random weights, short sequence)."""
    policy = random_policy(Qwen2Config.from_file(CONFIG_05B), seed=0)
    token_ids = some_ids(policy.config, 1, 8)
    torch.testing.assert_close(
        logits_of(policy, token_ids), peer_logits(peer(policy), token_ids), atol=1e-5, rtol=1e-5
    )


# -------------------------------------------------------------------------------------------------- masks and batches


def test_right_padding_is_harmless():
    """Guards training batches: what stands behind a row's end must not change the row."""
    policy = randomised(tiny_config())
    token_ids = some_ids(policy.config, 2, 12)
    padded = torch.cat((token_ids, some_ids(policy.config, 2, 5, seed=9)), dim=1)
    torch.testing.assert_close(policy(padded)[:, :12], policy(token_ids), atol=1e-5, rtol=0)


def test_token_tree_equals_separate_rows():
    """Guards the trainer's trees: prompt and two branches in one row, masked, equal two plain rows."""
    policy = randomised(tiny_config())
    prompt, left, right = (some_ids(policy.config, length, seed=length) for length in (7, 4, 6))
    token_ids = torch.cat((prompt, left, right))[None]  # (1, 17)
    position_ids = torch.cat((torch.arange(11), torch.arange(7, 13)))[None]
    leave = torch.tensor([17] * 7 + [11] * 4 + [17] * 6)  # the right branch does not see the left one
    tree = Tree(torch.arange(17), leave, [Block(11, None), Block(6, 7)], torch.float32)
    hidden = policy(token_ids, position_ids, tree)[0]

    torch.testing.assert_close(hidden[:11], policy(torch.cat((prompt, left))[None])[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(hidden[11:], policy(torch.cat((prompt, right))[None])[0, 7:], atol=1e-5, rtol=0)
    unmasked = policy(token_ids, position_ids)[0]
    assert (unmasked[11:] - hidden[11:]).abs().max() > 1e-3  # the mask is not ignored


def cached_forward(policy: Qwen2ForCausalLM, cache: KVCache, parts: list[tuple[int, torch.Tensor, int]]):
    """One forward over new tokens of some rows, (row, ids, slots in use before), packed in this order."""
    chunks, slots, first = [], [], 0
    for row, ids, before in parts:
        chunks.append(Chunk(row, first, first + len(ids), before + len(ids)))
        slots += range(before, before + len(ids))
        first += len(ids)
    rows = torch.tensor([chunk.row for chunk in chunks for _ in range(chunk.first, chunk.last)])
    context = Cached(cache, rows, torch.tensor(slots), chunks=Chunks(chunks))
    return policy(torch.cat([ids for _, ids, _ in parts])[None], torch.tensor([slots]), context)[0]


@torch.no_grad()
def test_cached_chunks_equal_one_forward():
    """Guards the cache at model level: ragged chunks, packed with those of other rows, see what one forward sees.

    What stands in the cache from before, or behind the slots in use, is not seen.
    """
    policy = randomised(tiny_config())
    token_ids, cache = some_ids(policy.config, 3, 15), KVCache(policy.config, 4, 16)
    for stored in cache.keys + cache.values:
        stored.fill_(100.0)
    found: dict[int, list[torch.Tensor]] = {0: [], 1: [], 2: []}
    for spans in ([(2, 0, 9), (0, 0, 1), (1, 0, 4)], [(0, 1, 2), (2, 9, 14)], [(1, 4, 15), (0, 2, 15), (2, 14, 15)]):
        hidden = cached_forward(policy, cache, [(row + 1, token_ids[row, a:b], a) for row, a, b in spans])
        for (row, _, _), part in zip(spans, hidden.split([b - a for _, a, b in spans]), strict=True):
            found[row].append(part)
    expected = policy(token_ids)
    for row, parts in found.items():
        torch.testing.assert_close(torch.cat(parts), expected[row], atol=1e-5, rtol=0)
    for stored in cache.keys + cache.values:
        assert (stored[0] == 100.0).all() and (stored[:, :, 15] == 100.0).all()


# ------------------------------------------------------------------------------------------------- one product for all


def linears(policy: Qwen2ForCausalLM) -> list[list[torch.nn.Linear]]:
    """The layers that share an input, group by group."""
    groups = [((x.self_attn, "qkv"), (x.mlp, ("gate", "up"))) for x in policy.model.layers]
    return [[getattr(block, f"{n}_proj") for n in names] for layer in groups for block, names in layer]


def decoded(policy: Qwen2ForCausalLM) -> torch.Tensor:
    """The hidden states of two rows' tokens that continue a cache."""
    token_ids, cache = some_ids(policy.config, 2, 9), KVCache(policy.config, 2, 9, policy.head_weight.dtype)
    spans = [(0, 0, 4), (1, 0, 5)], [(0, 4, 5), (1, 5, 6)]
    with torch.no_grad():
        return torch.cat([cached_forward(policy, cache, [(r, token_ids[r, a:b], a) for r, a, b in x]) for x in spans])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_joined_products_are_the_same_numbers(dtype, bias, monkeypatch):
    """Guards parts of a product that are mixed up, a forgotten bias, and products that stay three."""
    policy = randomised(tiny_config()).to(dtype)
    for linear in (x for group in linears(policy) for x in group if not bias):
        linear.bias = None
    count, linear = [], torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *x: count.append(x) or linear(*x))
    token_ids, expected = some_ids(policy.config, 2, 9), decoded(policy)
    plain, apart = logits_of(policy, token_ids), len(count)
    join_products(policy)
    count.clear()
    torch.testing.assert_close(decoded(policy), expected)
    assert torch.equal(logits_of(policy, token_ids), plain)  # without a cache nothing rounds in another way
    assert len(count) == apart - 2 * 2 * 3  # forwards, layers; five products became two


def test_joined_parameters_are_trained_saved_and_loaded_as_before(tmp_path):
    """Guards a product of old weights: parameters that an update, a copy or a checkpoint moves out of their place."""
    policy, again = randomised(tiny_config()), randomised(tiny_config())
    join_products(policy)
    held, names = [joined([linear.weight for linear in group]) for group in linears(policy)], list(policy.state_dict())
    for one in (policy, again):
        optimizer = torch.optim.AdamW(one.parameters(), lr=1e-2, fused=True)  # its state is made, and used
        for seed in range(2):
            optimizer.zero_grad()
            one(some_ids(one.config, 2, 9, seed=seed)).pow(3).sum().backward()
            optimizer.step()
    assert all(map(torch.equal, policy.state_dict().values(), again.state_dict().values()))
    save_pretrained(policy, tmp_path)
    assert all(torch.equal(x, again.state_dict()[n]) for n, x in load_policy(tmp_path).state_dict().items())
    other = randomised(tiny_config(), seed=1)
    policy.load_state_dict(other.state_dict())
    torch.testing.assert_close(decoded(policy), decoded(other), atol=1e-5, rtol=0)
    with torch.no_grad():
        for parameter, value in zip(policy.parameters(), again.parameters(), strict=True):
            parameter.copy_(value)
    torch.testing.assert_close(decoded(policy), decoded(again), atol=1e-5, rtol=0)
    join_products(policy)  # a second sampler
    now = [joined([linear.weight for linear in group]) for group in linears(policy)]
    assert all(new.data_ptr() == old.data_ptr() for new, old in zip(now, held, strict=True))
    assert names == list(again.state_dict())


@pytest.mark.parametrize("change", ["dtype", "assign", "bias", "subclass"])
def test_weights_that_lie_apart_have_their_own_products(change):
    """Guards a product of weights that were joined once, and one that skips what a layer adds to its product."""
    policy, other = randomised(tiny_config()), randomised(tiny_config(), seed=1)
    join_products(policy)
    if change == "dtype":
        policy, other = policy.double(), randomised(tiny_config()).double()
    elif change == "assign":
        policy.load_state_dict(other.state_dict(), assign=True)
    else:
        for one in (policy, other := randomised(tiny_config())):
            if change == "bias":
                one.model.layers[0].self_attn.k_proj.bias = None
            else:
                one.model.layers[1].mlp.up_proj.__class__ = Doubled
    torch.testing.assert_close(decoded(policy), decoded(other), atol=1e-5, rtol=0)


class Doubled(torch.nn.Linear):
    """A layer that adds to its product, as an adapter does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_a_cpu_joins_nothing():
    """Guards the bits of training on a CPU."""
    policy = randomised(tiny_config())
    generate(policy, [[1, 2]], max_new_tokens=2, stop_ids=[], temperature=0)
    assert all(joined([linear.weight for linear in group]) is None for group in linears(policy))


def test_cache_size():
    """Guards the memory table: 2 * L * B * Hkv * capacity * Dh numbers."""
    cache = KVCache(tiny_config(), 5, 32)
    assert cache.shape == (5, 32) and sum(x.nbytes for x in cache.keys + cache.values) == 2 * 2 * 5 * 2 * 32 * 12 * 4
    assert KVCache(tiny_config(), 5, 32, torch.bfloat16, "meta").keys[0].nbytes == cache.keys[0].nbytes // 2


@pytest.mark.parametrize("capacity", [3, 5, 9])
def test_cache_moves(capacity):
    """Guards rows that change places when the cache is resized: each is itself up to the capacity, the rest is 0."""
    cache = KVCache(tiny_config(), 4, 5)
    for number, stored in enumerate(cache.keys + cache.values):
        stored.copy_(torch.randn(stored.shape, generator=torch.Generator().manual_seed(number)))
    before = cache.keys + cache.values
    cache.move([3, 1], 3, capacity)
    shared = min(5, capacity)
    assert cache.shape == (3, capacity)
    for old, new in zip(before, cache.keys + cache.values, strict=True):
        assert torch.equal(new[:2, :, :shared], old[[3, 1], :, :shared])
        assert not new[2].any() and not new[:, :, shared:].any()
    cache.move([], 1, 2)
    assert cache.shape == (1, 2) and not any(stored.any() for stored in cache.keys + cache.values)


@pytest.mark.parametrize("candidate", [0, 2])
def test_cache_adopts(candidate):
    """Guards the move of interleaved slots onto one another: every third one, in order, and no other row is touched."""
    cache, shape = KVCache(tiny_config(), 2, 14), (2, 2, 14, 12)
    slots = torch.arange(14.0).view(1, 1, 14, 1).expand(shape)
    for stored in cache.keys + cache.values:
        stored.copy_(slots)
    cache.adopt(1, 4, 3, candidate, 3)  # a prompt of 4 slots, 3 tokens of each of 3 candidates
    own = [4 + candidate, 7 + candidate, 10 + candidate]
    for stored in cache.keys + cache.values:
        assert stored[1, 0, :7, 0].tolist() == [0, 1, 2, 3, *own]
        assert torch.equal(stored[0], slots[0]) and (stored[1] == stored[1, :1, :, :1]).all()


PLAIN = Tree(torch.arange(4), torch.full((4,), 4), [Block(4, None)], torch.float32)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(token_ids=torch.zeros(4, dtype=torch.long)), "token_ids must be"),
        (dict(position_ids=torch.zeros(1, 4, dtype=torch.long)), "position_ids must be"),
        (dict(token_ids=torch.zeros(1, 4, dtype=torch.long), context=PLAIN), "one row of tokens, got 1, and position"),
        (dict(position_ids=torch.zeros(2, 4, dtype=torch.long), context=PLAIN), "one row of tokens, got 2"),
    ],
)
def test_forward_checks_its_shapes(arguments, words):
    """Guards silent broadcasting: a mask or positions of another batch would be spread over this one."""
    policy = random_policy(tiny_config(), 0)
    with pytest.raises(ValueError, match=words):
        policy(**(dict(token_ids=torch.zeros(2, 4, dtype=torch.long)) | arguments))


def test_half_precision_logits_are_fp32():
    """Guards log p against bf16 rounding of the logits: 8 bits of mantissa are an error of 0.03 at a logit of 8."""
    policy = randomised(tiny_config()).to(torch.bfloat16)
    hidden = policy(some_ids(policy.config, 1, 6)).detach()
    expected = hidden.double() @ policy.head_weight.detach().double().T
    assert policy.logits(hidden).dtype == torch.float32
    torch.testing.assert_close(policy.logits(hidden).detach().double(), expected, atol=1e-5, rtol=1e-5)


def test_random_policy_is_seeded():
    """Guards reproducible starts: the seed alone decides, not the global generator."""
    torch.manual_seed(1)
    first = random_policy(tiny_config(), 7).state_dict()
    torch.manual_seed(2)
    again, other = random_policy(tiny_config(), 7).state_dict(), random_policy(tiny_config(), 8).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


# ------------------------------------------------------------------------------------------------------------ critic


def test_critic_copies_the_trunk_and_shares_nothing():
    """Guards a critic whose updates move the policy, or whose first values are not near zero."""
    policy = randomised(tiny_config(tie_word_embeddings=True))
    critic, token_ids = Critic.from_policy(policy), some_ids(policy.config, 2, 9)
    torch.testing.assert_close(critic.model(token_ids), policy(token_ids), atol=0, rtol=0)
    values = critic(token_ids)
    assert values.shape == (2, 9) and values.dtype == torch.float32
    wide = random_policy(tiny_config(hidden_size=4096, num_hidden_layers=1), 0)
    assert Critic.from_policy(wide).value_head.weight.std().item() == pytest.approx(1 / 4097, rel=0.05)

    before = policy(token_ids).detach().clone()
    torch.optim.SGD(critic.parameters(), lr=1.0).step(lambda: values.sum().backward())
    assert not torch.allclose(critic(token_ids), values)
    assert torch.equal(policy(token_ids), before)


def test_critic_round_trip(tmp_path):
    """Guards resume: a saved critic comes back whole, and a policy's folder is not taken for one."""
    policy = randomised(tiny_config())
    critic, token_ids = Critic.from_policy(policy, seed=3), some_ids(policy.config, 2, 9)
    save_pretrained(critic, tmp_path / "critic")
    assert torch.equal(load_critic(tmp_path / "critic")(token_ids), critic(token_ids))
    save_pretrained(policy, tmp_path / "policy")
    with pytest.raises(ValueError, match="lm_head.weight is not part of the model"):
        load_critic(tmp_path / "policy")
