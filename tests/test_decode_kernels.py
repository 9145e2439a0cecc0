"""The torch paths and references of the decoding kernels; the kernels themselves: tests/triton_decode_kernels.py."""

import math

import pytest
import torch

from kernels.decode_attention import decode_attention, reference_decode
from kernels.prefix import Prefix, membership
from kernels.sample_head import (
    draw_uniforms,
    philox,
    reference_exponentials,
    reference_sample,
    sample,
    sample_head,
)


def case(R=6, H=4, Hkv=2, S=9, Dh=8, n=None, P=5, dtype=torch.float64):
    """Random queries, keys and values with ragged lengths, and a prefix that every n rows share."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    lengths = torch.randint(1, S + 1, (R,), generator=generator)
    B, ranks = (R // n, torch.arange(R) // n) if n else (0, None)
    prefix = n and Prefix(draw(B, Hkv, P, Dh), draw(B, Hkv, P, Dh), torch.arange(B) % (P + 1), *membership(ranks, B, n))
    return draw(R, H, Dh), draw(R, Hkv, S, Dh), draw(R, Hkv, S, Dh), lengths, prefix


# ----------------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("H, Hkv", [(1, 1), (4, 2), (7, 1), (8, 8)])
@pytest.mark.parametrize("n", [None, 1, 3, 6])
def test_torch_path_equals_the_loop(H, Hkv, n):
    """Guards masks, grouping and the owner of each prefix: every row by itself gives the same numbers."""
    arguments = case(H=H, Hkv=Hkv, n=n)
    torch.testing.assert_close(decode_attention(*arguments), reference_decode(*arguments))


def test_a_prefix_equals_one_longer_row():
    """Guards the reference itself: prefix and own keys are one sequence, whatever the cut."""
    q, keys, values, _, _ = case(R=2)
    lengths = torch.tensor([9, 7])
    whole = reference_decode(q, keys, values, lengths)
    prefix = Prefix(keys[:, :, :4], values[:, :, :4], torch.tensor([4, 4]), *membership(torch.arange(2), 2, 1))
    cut = reference_decode(q, keys[:, :, 4:], values[:, :, 4:], lengths - 4, prefix)
    torch.testing.assert_close(cut, whole)
    k, v = keys[1, 0, :7], values[1, 0, :7]  # and one head by hand
    torch.testing.assert_close(whole[1, 1], ((q[1, 1] @ k.T) / math.sqrt(8)).softmax(0) @ v)


def test_rows_that_have_left():
    """Guards rows that finish: prefixes with fewer rows than others, and with none, are the same to the rest."""
    q, keys, values, lengths, prefix = case(n=3)
    kept = torch.tensor([0, 2, 4])
    whole = decode_attention(q, keys, values, lengths, prefix)
    left = prefix._replace(**dict(zip(("members", "place"), membership(torch.tensor([0, 0, 1]), 2, 3), strict=True)))
    few = decode_attention(q[kept], keys[kept], values[kept], lengths[kept], left)
    torch.testing.assert_close(few, whole[kept])
    torch.testing.assert_close(few, reference_decode(q[kept], keys[kept], values[kept], lengths[kept], left))
    last = prefix._replace(**dict(zip(("members", "place"), membership(torch.tensor([1]), 2, 3), strict=True)))
    torch.testing.assert_close(decode_attention(q[4:5], keys[4:5], values[4:5], lengths[4:5], last), whole[4:5])


def test_views_of_a_longer_cache():
    """Guards strides: the first S slots of a cache, as the model passes them."""
    q, keys, values, lengths, _ = case()
    expected = decode_attention(q, keys[:, :, :9].clone(), values[:, :, :9].clone(), lengths)
    longer = [torch.cat((x, x + 7), 2)[:, :, :9] for x in (keys, values)]
    torch.testing.assert_close(decode_attention(q, *longer, lengths), expected)


def foreign(B: int, Hkv: int) -> Prefix:
    """A prefix that does not belong to `case`."""
    keys = torch.zeros(B, Hkv, 5, 8)
    return Prefix(keys, keys, torch.ones(B).long(), *membership(torch.arange(3).repeat_interleave(2), 3, 2))


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(q=torch.zeros(6, 4, 8).double()), "they must be of one dtype"),
        (dict(q=torch.zeros(0, 4, 8)), "with R > 0"),
        (dict(q=torch.zeros(6, 1, 4, 8)), r"q must be \(R, H, Dh\)"),
        (dict(q=torch.zeros(6, 3, 8)), "3 query heads must be a multiple of the 2 KV heads"),
        (dict(q=torch.zeros(5, 4, 8)), r"must be \(5, Hkv, S, 8\)"),
        (dict(values=torch.zeros(6, 2, 8, 8)), r"must be \(6, Hkv, S, 8\) both"),
        (dict(lengths=torch.ones(6)), r"must be \(6,\) long"),
        (dict(keys=torch.zeros(6, 2, 8, 9).mT), "give views of slots"),
        (dict(prefix=foreign(4, 2)), "4 prefixes"),
        (dict(prefix=foreign(3, 1)), "of 1 KV heads"),
    ],
)
def test_wrong_shapes_are_refused(change, words):
    """Guards a kernel that would read outside its tensors."""
    names = ("q", "keys", "values", "lengths", "prefix")
    with pytest.raises(ValueError, match=words):
        decode_attention(**dict(zip(names, case(n=2, dtype=torch.float32), strict=True)) | change)


# --------------------------------------------------------------------------------------------------------- the noise


def test_philox_known_answer():
    """Guards the generator: the published words of Philox-4x32-10 at counter 0, key 0 (Random123, kat_vectors)."""
    words = philox(torch.tensor([0]), torch.tensor([0]), 0)[0, 0].tolist()
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_noise_is_exponential_and_independent():
    """Guards the noise: Kolmogorov's distance from Exp(1), and no correlation of ids, steps or seeds side by side."""
    E = reference_exponentials(torch.arange(100), 5, 1001)  # 100,100 numbers
    sorted_cdf = (-torch.expm1(-E.flatten())).sort().values
    ranks = torch.arange(1, len(sorted_cdf) + 1) / len(sorted_cdf)
    assert (sorted_cdf - ranks).abs().max() < 1.95 / math.sqrt(len(sorted_cdf))  # 99.9 % quantile
    u = torch.exp(-E)
    others = u[:, 1:], reference_exponentials(torch.arange(100), 6, 1001).neg().exp(), u.roll(1, 0)
    for other in others:
        pair = torch.stack((u[:, : other.shape[1]].flatten(), other.flatten()))
        assert torch.corrcoef(pair)[0, 1].abs() < 3.3 / math.sqrt(pair.shape[1])


def test_gumbel_max_draws_from_the_softmax():
    """Guards the method: chi-square of 50,000 draws by the reference against softmax(z / temperature)."""
    draws, hidden = 50_000, torch.tensor([[1.0, -0.5]])
    weight = torch.randn(11, 2, generator=torch.Generator().manual_seed(0))
    probs = (hidden @ weight.T / 0.7).softmax(-1)[0]
    ids, logprobs = reference_sample(hidden.expand(draws, -1), weight, 0.7, torch.arange(draws) * 7919, 3)
    counts = torch.bincount(ids, minlength=11)
    assert ((counts - draws * probs) ** 2 / (draws * probs)).sum() < 29.6  # 99.9 % quantile at 10 degrees of freedom
    torch.testing.assert_close(logprobs, probs.log()[ids])


# ------------------------------------------------------------------------------------------------------ the torch path


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_torch_path_is_the_inverse_cdf_of_the_logits(temperature, dtype):
    """Guards the tiny results: the draws are those of `sample` at the seed's own stream, logits unrounded."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 16, generator=generator).to(dtype)
    weight = torch.randn(50, 16, generator=generator).to(dtype)
    seeds = [3, 1, 4, 1, 2**31 - 1]
    table = draw_uniforms(seeds, 8)
    assert torch.equal(table[1], table[3]) and not torch.equal(table[0], table[1])
    assert torch.equal(table[0], torch.rand(8, generator=torch.Generator().manual_seed(3)))
    wide = torch.promote_types(dtype, torch.float32)
    expected = sample(hidden.to(wide) @ weight.to(wide).T, temperature, table[:, 6])
    for uniforms in (None, table[:, 6]):
        ids, logprobs = sample_head(hidden, weight, temperature, torch.tensor(seeds), 6, uniforms)
        assert torch.equal(ids, expected[0]) and torch.equal(logprobs, expected[1])


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(hidden=torch.zeros(2, 3)), "must be"),
        (dict(seeds=torch.zeros(3).long()), "must be"),
        (dict(temperature=-0.5), "temperature is -0.5; it must be at least 0"),
    ],
)
def test_bad_arguments_are_refused(change, words):
    """Guards a kernel that would read outside its tensors."""
    arguments = dict(hidden=torch.zeros(2, 4), weight=torch.zeros(9, 4), temperature=1.0, seeds=torch.arange(2), step=0)
    with pytest.raises(ValueError, match=words):
        sample_head(**arguments | change)
