"""The decoding kernels against fp64: on CUDA at Qwen-2.5's shapes, else interpreted (TRITON_INTERPRET=1) and small."""

import importlib
import math

import pytest
import torch

from kernels.backend import INTERPRETED, jit, set_backend, tl
from kernels.decode_attention import decode_attention, reference_decode
from kernels.prefix import Prefix, membership
from kernels.sample_head import exponential, reference_exponentials, reference_sample, sample_head

if not (torch.cuda.is_available() or INTERPRETED):
    pytest.skip("needs CUDA, or TRITON_INTERPRET=1", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CUDA = DEVICE == "cuda"
DTYPES = [torch.float32, torch.bfloat16] if CUDA else [torch.float32]


@pytest.fixture(autouse=True)
def triton_path():
    """Run every test on the kernels."""
    set_backend("triton")
    yield
    set_backend("auto")


def module(name: str):
    """Give a kernel's module, to change its constants."""
    return importlib.import_module(f"kernels.{name}")


def draw(*shape: int, dtype=torch.float32, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(DEVICE, dtype)


def assert_within(ours: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype) -> None:
    """|kernel − truth| is at most twice that of plain torch in the same dtype, plus one rounding of the largest."""
    eps = torch.finfo(dtype).eps * max(1.0, float(truth.abs().max()))
    assert ours.isfinite().all()
    assert (ours.double() - truth).abs().max() <= 2 * (plain.double() - truth).abs().max() + eps


# ----------------------------------------------------------------------------------------------------------- attention


def check_attention(q, keys, values, lengths, prefix=None) -> torch.Tensor:
    """Compare one call to fp64 and return what it gave; what lies beyond the lengths is NaN in the kernel's copy."""
    wide = [x.double() for x in (q, keys, values)]
    wide_prefix = prefix and prefix._replace(keys=prefix.keys.double(), values=prefix.values.double())
    truth = reference_decode(*wide, lengths, wide_prefix)
    plain = reference_decode(q, keys, values, lengths, prefix)
    ours = decode_attention(q, *spoil(keys, values, lengths), prefix and Prefix(*spoil(*prefix[:3]), *prefix[3:]))
    assert ours.dtype == q.dtype
    assert_within(ours, plain, truth, q.dtype)
    return ours


def spoil(keys, values, lengths):
    """Give views into longer caches that hold NaN in every slot that is not to be read."""
    B, Hkv, S, Dh = keys.shape
    beyond = torch.arange(S + 5, device=DEVICE) >= lengths[:, None]  # (B, S + 5)
    longer = [torch.cat((x, x.new_zeros(B, Hkv, 5, Dh)), 2) for x in (keys, values)]
    keys, values = (x.masked_fill_(beyond[:, None, :, None], math.nan)[:, :, :S] for x in longer)
    return keys, values, lengths


def attention_case(R, H, Hkv, Dh, S, dtype, scale=1.0):
    rows = (R, Hkv, S, Dh)
    return draw(R, H, Dh, dtype=dtype, scale=scale), draw(*rows, dtype=dtype, seed=1), draw(*rows, dtype=dtype, seed=2)


QWEN = [(14, 2, 64), (12, 2, 128), (16, 2, 128), (28, 4, 128)]
HEADS = QWEN if CUDA else [(1, 1, 32), (14, 2, 32), (8, 4, 12), (8, 1, 16)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H, Hkv, Dh", HEADS)
def test_attention_equals_fp64(H, Hkv, Dh, dtype):
    """Guards groups, padding of queries and channels, and ragged rows: one token, a few, all."""
    S = 1500 if CUDA else 75
    lengths = torch.tensor([S, 1, 2, S // 2, S - 1], device=DEVICE)
    check_attention(*attention_case(5, H, Hkv, Dh, S, dtype), lengths)


@pytest.mark.parametrize("splits", [1, 2, 3, 5])
def test_split_boundaries(splits, monkeypatch):
    """Guards the cut: lengths one below, at and one above every edge of a tile and of a split, and empty splits."""
    monkeypatch.setattr(module("decode_attention"), "split_count", lambda *_: splits)
    block = module("decode_attention").FP32_TILE["BLOCK"]
    edges = {block, 2 * block, splits * block, 2 * splits * block, 3 * splits * block}
    lengths = torch.tensor(sorted({1} | {e + d for e in edges for d in (-1, 0, 1)}), device=DEVICE)
    q, keys, values = attention_case(len(lengths), 2, 1, 32, int(lengths.max()), torch.float32)
    check_attention(q, keys, values, lengths)


def test_more_splits_than_a_merge_takes_at_once(monkeypatch):
    """Guards the merge's loop: more splits than its chunk, the best keys in the last of them, or all in one row."""
    monkeypatch.setattr(module("decode_attention"), "split_count", lambda *_: 21)
    block = module("decode_attention").FP32_TILE["BLOCK"]
    q, keys, values = attention_case(2, 1, 1, 16, 21 * block, torch.float32)
    keys[:, :, 18 * block :] += 3 * q[:, :, None]
    check_attention(q, keys, values, torch.tensor([21 * block, 5], device=DEVICE))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, B, H, Hkv", [(1, 3, 2, 1), (4, 2, 14, 2), (5, 1, 7, 1), (9, 1, 8, 2)])
def test_a_shared_prefix(n, B, H, Hkv, dtype):
    """Guards the prefix: its owner, n no power of 2, more queries than a program holds, no prefix, no own keys."""
    R, S, P, Dh = n * B, 40, 70, 64 if CUDA else 16
    q, keys, values = attention_case(R, H, Hkv, Dh, S, dtype)
    _, shared_keys, shared_values = attention_case(B, H, Hkv, Dh, P, dtype)
    lengths = (7 * torch.arange(R) % (S + 1)).to(DEVICE)  # row 0 has none
    prefix_lengths = torch.tensor([P, 0, 33][:B], device=DEVICE)
    owner = torch.arange(B, device=DEVICE).repeat_interleave(n)
    prefix = Prefix(-shared_keys, shared_values, prefix_lengths, *membership(owner, B, n))
    check_attention(q, keys, values, lengths, prefix)
    kept = torch.arange(0, R, 2, device=DEVICE)  # and after every second row has left
    left = Prefix(*prefix[:3], *membership(owner[kept], B, n))
    check_attention(q[kept], keys[kept], values[kept], lengths[kept], left)


def test_nothing_to_attend_to():
    """Guards 0 / 0: a row without any key gives zeros, its neighbour is not touched."""
    q, keys, values = attention_case(2, 2, 1, 16, 8, torch.float32)
    out = check_attention(q, keys, values, torch.tensor([0, 3], device=DEVICE))
    assert not out[0].any() and out[1].any()


@pytest.mark.parametrize("scale", [1e-4, 100.0])
def test_large_scores(scale):
    """Guards exp: scores of several hundred, where one key takes all, and scores that are all alike."""
    check_attention(*attention_case(2, 4, 2, 32, 70, torch.float32, scale), torch.tensor([70, 33], device=DEVICE))


# ------------------------------------------------------------------------------------------------------------ sampling


@jit()
def exponential_kernel(bits, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, exponential(tl.load(bits + at).to(tl.uint32)))


def test_noise_at_its_ends():
    """Guards log 0: no word gives E = 0 or infinity; small E keep fp32's relative precision, also at the seam."""
    seam = 1 << 26  # w = 1/64
    ends = [0, 1, 2, 1000, seam - 300, seam - 1, seam, seam + 300, 1 << 31, 2**32 - 300, 2**32 - 2, 2**32 - 1]
    bits = torch.tensor(ends + [(97 * i) << 20 & 0xFFFFFFFF for i in range(52)])
    out = torch.empty(64, device=DEVICE)
    exponential_kernel[(1,)](bits.to(DEVICE), out, 64)
    w = ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24).double()
    truth = -torch.log1p(-w)
    assert (out > 0).all() and out.isfinite().all()
    assert ((out.cpu().double() - truth).abs() / truth).max() < 5e-6


def check_sample(hidden, weight, temperature, seeds, step) -> torch.Tensor:
    """Compare one call to fp64: the very ids, but for ties to within rounding, and their log-probs; return the ids."""
    ids, logprobs = sample_head(hidden, weight, temperature, seeds, step)
    z = hidden.double() @ weight.double().T / (temperature or 1.0)
    keys = z - reference_exponentials(seeds, step, len(weight)).log() if temperature else z
    tolerance = 1e-5 * float(z.abs().max()) + 1e-5
    assert (keys.gather(1, ids[:, None])[:, 0] >= keys.amax(1) - tolerance).all()
    assert (ids != keys.argmax(1)).sum() <= len(ids) // 50  # ties are rare
    truth = z.log_softmax(-1).gather(1, ids[:, None])[:, 0]
    plain = (hidden.float() @ weight.float().T / (temperature or 1.0)).log_softmax(-1).gather(1, ids[:, None])[:, 0]
    assert logprobs.dtype == torch.float32 and ids.dtype == torch.long
    eps = torch.finfo(torch.float32).eps * max(1.0, float(z.abs().max()))
    assert (logprobs.double() - truth).abs().max() <= 2 * (plain.double() - truth).abs().max() + 4 * eps
    return ids


def some_seeds(R: int) -> torch.Tensor:
    """R seeds, one of them beyond 32 bits."""
    seeds = torch.randint(2**31, (R,), generator=torch.Generator().manual_seed(9))
    seeds[-1] = 2**45 + 12345
    return seeds.to(DEVICE)


SIZES = (
    [(64, 896, 151_936), (1, 1536, 151_936), (256, 2048, 151_936), (17, 3584, 152_064)]
    if CUDA
    else [(1, 8, 50), (5, 40, 300), (17, 64, 128), (70, 33, 129)]
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 2.5])
@pytest.mark.parametrize("R, D, V", SIZES)
def test_the_predicted_ids_are_drawn(R, D, V, temperature, dtype):
    """Guards counters, lanes, keys and edges: torch's own Philox foretells every id; log p is exact."""
    hidden, weight = draw(R, D, dtype=dtype), draw(V, D, dtype=dtype, seed=1, scale=2 / math.sqrt(D))
    check_sample(hidden, weight, temperature, some_seeds(R), 300)


@pytest.mark.parametrize("R", [1, 3])
def test_the_whole_vocabulary(R, monkeypatch):
    """Guards offsets at V = 151,936: flat logits draw from all of it, steps far apart differ."""
    if INTERPRETED:  # whose cost is by tile
        monkeypatch.setitem(module("sample_head").FP32_TILE, "BLOCK_V", 16384)
    weight = draw(151_936, 4, seed=1, scale=0.1)
    drawn = [check_sample(draw(R, 4), weight, 1.0, some_seeds(R), step) for step in (0, 2**31 - 1)]
    assert not torch.equal(*drawn)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_more_blocks_than_a_merge_takes_at_once(temperature, monkeypatch):
    """Guards the merge's loop: the best id in any of its rounds, and a sum over all of them."""
    monkeypatch.setitem(module("sample_head").MERGE, "BLOCK", 2)
    ids = check_sample(draw(12, 8), draw(700, 8, seed=1, scale=0.3), temperature, some_seeds(12), 2)
    assert len((ids // 128).unique()) > 3


def test_frequencies_match_softmax():
    """Guards the draw end to end: chi-square of many rows of one distribution, each with its seed."""
    R, V = 100_000 if CUDA else 700, 7
    hidden, weight = draw(1, 8).expand(R, -1), draw(V, 8, seed=1, scale=0.4)
    ids, _ = sample_head(hidden, weight, 1.3, torch.arange(R, device=DEVICE), 1)
    expected = R * (hidden[0] @ weight.T / 1.3).softmax(-1).double()
    chi_square = ((torch.bincount(ids, minlength=V) - expected) ** 2 / expected).sum()
    assert chi_square < 22.5  # 99.9 % quantile at 6 degrees of freedom


def test_a_row_does_not_depend_on_its_batch():
    """Guards reproducibility: a row of one seed and step draws the same alone, among others, anywhere in the batch."""
    hidden, weight, seeds = draw(40, 16), draw(200, 16, seed=1), some_seeds(40)
    ids, logprobs = sample_head(hidden, weight, 1.0, seeds, 4)
    order = torch.tensor([39, 0, 17], device=DEVICE)
    few, few_logprobs = sample_head(hidden[order], weight, 1.0, seeds[order], 4)
    assert torch.equal(few, ids[order])
    torch.testing.assert_close(few_logprobs, logprobs[order], atol=1e-5, rtol=0)


def test_seeds_and_steps_are_streams():
    """Guards rows that would share their noise: one distribution, other seeds or other steps, other ids."""
    hidden, weight = draw(1, 4).expand(30, -1), draw(300, 4, seed=1, scale=0.1)
    by_seed, _ = sample_head(hidden, weight, 1.0, torch.arange(30, device=DEVICE), 0)
    same, _ = sample_head(hidden, weight, 1.0, torch.full((30,), 5, device=DEVICE), 0)
    by_step = torch.cat([sample_head(hidden[:1], weight, 1.0, by_seed[:1], step)[0] for step in range(12)])
    assert len(by_seed.unique()) > 20 and len(same.unique()) == 1 and len(by_step.unique()) > 8


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_large_logits(temperature):
    """Guards exp: logits of several thousand of both signs, all below zero too."""
    hidden, weight = draw(6, 8, scale=1000.0), draw(150, 8, seed=1)
    weight[:, 0] = -weight[:, 0].abs() - 3
    hidden[3:] = 0
    hidden[3:, 0] = 2000.0
    check_sample(hidden, weight, temperature, some_seeds(6), 0)


@pytest.mark.skipif(not CUDA, reason="counts the GPU's memory")
def test_no_logits_in_memory():
    """Guards the point of it: far less than one (R, V) matrix is allocated."""
    hidden, weight = draw(64, 896, dtype=torch.bfloat16), draw(151_936, 896, dtype=torch.bfloat16)
    seeds = some_seeds(64)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sample_head(hidden, weight, 1.0, seeds, 0)
    assert torch.cuda.max_memory_allocated() - before < 64 * 151_936


# ------------------------------------------------------------------------------------------------------ the whole model


def test_generate_on_the_kernels():
    """Guards the wiring: lengths, seeds and steps through prefill, candidates and rows that leave the batch.

    A plain forward of each row and torch's own Philox foretell all ids.
    """
    from model import KVCache, Qwen2Config, generate, random_policy

    config = Qwen2Config(53, 64, 64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    policy = random_policy(config, seed=0).to(DEVICE)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    prompts, seeds, stops = [[3, 4, 5], [6]], [11, 12, 13, 2**31 - 1], set(range(12))
    cache = KVCache(config, 2, 16, device=DEVICE)
    samples = generate(policy, cache, prompts, n=2, max_new_tokens=6, stop_ids=stops, temperature=0.8, seeds=seeds)
    assert len(set(samples.lengths)) > 1
    set_backend("torch")
    for row, (drawn, seed) in enumerate(zip(samples.token_ids, seeds, strict=True)):
        ids = list(prompts[row // 2])
        for step, token in enumerate(drawn):
            with torch.no_grad():
                last = policy(torch.tensor([ids], device=DEVICE))[:, -1]
                expected, logprob = reference_sample(
                    last, policy.head_weight, 0.8, torch.tensor([seed], device=DEVICE), step
                )
            assert token == expected.item()
            assert abs(samples.logprobs[row][step] - logprob.item()) < 1e-4
            ids.append(token)
