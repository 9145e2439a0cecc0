"""The torch paths and references of the decoding kernels; the kernels themselves: tests/triton_decode_kernels.py."""

import math
from dataclasses import replace

import pytest
import torch

from kernels import rows as rows_module
from kernels.backend import set_backend
from kernels.decode_attention import decode_attention, reference_decode
from kernels.rows import Rows
from kernels.sample_head import (
    draw_uniforms,
    philox,
    reference_exponentials,
    reference_sample,
    sample,
    sample_head,
)


def running(prompt: list[int], lengths: list[int], runs: list[list[bool]], padding: int = 0) -> Rows:
    """Rows where candidate c of row b runs if runs[b][c], with so many queries of padding at the end."""
    runs = torch.tensor(runs)
    members = torch.where(runs, runs.flatten().cumsum(0).view_as(runs) - 1, -1)
    place = torch.cat((runs.flatten().nonzero()[:, 0], torch.full((padding,), -1)))
    return Rows(torch.tensor(prompt), torch.tensor(lengths), members, place)


ALL, SOME = "all candidates run, of rows about equally long", "candidates, rows and padding that do not run"


def some_rows(n: int, who: str, B: int = 5) -> Rows:
    """Ragged rows of n candidates, prompts of 4 to 8 tokens, and as many of each candidate, each at its own step."""
    prompt = [4 + b % 5 for b in range(B)]
    if who == ALL:
        return running(prompt, [18 + b % 3 for b in range(B)], [[True] * n] * B)
    lengths = [size + n * (1 + 3 * b % 5) for b, size in enumerate(prompt)]
    runs = [[b != 1 and (c + b) % 3 != 1 for c in range(n)] for b in range(B)]
    return running(prompt, lengths, runs, padding=2)


def case(rows: Rows, H: int = 4, Hkv: int = 2, S: int = 33, Dh: int = 8, dtype=torch.float64):
    """Random queries, keys and values for these rows."""
    generator = torch.Generator().manual_seed(0)
    R, B = len(rows.place), len(rows.members)
    shapes = (R, H, Dh), (B, Hkv, S, Dh), (B, Hkv, S, Dh)
    return *(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes), rows


# ----------------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("H, Hkv", [(1, 1), (4, 2), (7, 1), (8, 8)])
@pytest.mark.parametrize("who", [ALL, SOME])
@pytest.mark.parametrize("n", [1, 3, 4])
def test_torch_path_equals_the_loop(H, Hkv, n, who):
    """Guards masks, grouping and order in both branches of the torch path: every query by itself gives the same."""
    arguments = case(some_rows(n, who), H, Hkv)
    assert (len(arguments[-1].reads) == 1) == (who == ALL)
    torch.testing.assert_close(decode_attention(*arguments), reference_decode(*arguments))


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_together_equals_row_by_row(n, dtype, monkeypatch):
    """Guards the two branches against each other, and a mask of another dtype than the queries."""
    q, keys, values, rows = case(some_rows(n, ALL), dtype=dtype)
    alone = replace(rows)
    assert len(rows.reads) == 1  # cached
    monkeypatch.setattr(rows_module, "EVEN", 0)  # no rows are that even
    assert len(alone.reads) == 5
    together, one_by_one = decode_attention(q, keys, values, rows), decode_attention(q, keys, values, alone)
    assert together.dtype == one_by_one.dtype == dtype
    exact = reference_decode(*(x.double() for x in (q, keys, values)), rows)
    eps = torch.finfo(dtype).eps * exact.abs().max()
    for result in (together, one_by_one):
        assert (result.double() - exact).abs().max() <= 4 * eps


def test_the_visible_slots_by_hand():
    """Guards the reference itself: which slots of a row belong to whom, written out once, and one head's numbers."""
    q, keys, values, rows = case(running([3], [8], [[True, True]]))
    out = reference_decode(q, keys, values, rows)
    for candidate, slots in enumerate(([0, 1, 2, 3, 5, 7], [0, 1, 2, 4, 6])):
        k, v = keys[0, 1, slots], values[0, 1, slots]
        expected = ((q[candidate, 2] @ k.T) / math.sqrt(8)).softmax(0) @ v
        torch.testing.assert_close(out[candidate, 2], expected)


@pytest.mark.parametrize("who", [ALL, SOME])
def test_candidates_equal_rows_of_their_own(who):
    """Guards the layout: a candidate among n sees what it sees with prompt and tokens copied to a row of its own."""
    n = 4
    q, keys, values, rows = case(some_rows(n, who))
    alone = torch.zeros(2, len(q), *keys.shape[1:], dtype=q.dtype)
    lengths = torch.ones(len(q), dtype=torch.long)
    for r, place in enumerate(rows.place.tolist()):
        row, candidate = divmod(max(place, 0), n)
        prompt, used = int(rows.prompt[row]), int(rows.lengths[row])
        slots = [*range(prompt), *range(prompt + candidate, used, n)]
        lengths[r] = len(slots)
        alone[0, r, :, : len(slots)], alone[1, r, :, : len(slots)] = keys[row][:, slots], values[row][:, slots]
    place = torch.arange(len(q))
    plain = decode_attention(q, *alone, Rows(lengths, lengths, place[:, None], place))
    plain[rows.place < 0] = 0
    torch.testing.assert_close(decode_attention(q, keys, values, rows), plain)


def test_what_a_candidate_does_not_see_does_not_count():
    """Guards the mask: other candidates' slots, slots past the length and rows of others may hold anything finite."""
    for who in (ALL, SOME):
        q, keys, values, rows = case(some_rows(3, who))
        before = decode_attention(q, keys, values, rows)
        query, row, candidate = int(rows.members[2, 0]), 2, 0
        slot = torch.arange(keys.shape[2])
        own = (slot - rows.prompt[row]) % 3 == candidate
        seen = (slot < rows.lengths[row]) & ((slot < rows.prompt[row]) | own)
        other = torch.ones(keys.shape[0], keys.shape[2], dtype=torch.bool)
        other[row] = ~seen
        spoilt = [x.masked_fill(other[:, None, :, None], 1e4) for x in (keys, values)]
        assert torch.equal(decode_attention(q, *spoilt, rows)[query], before[query])


def test_many_rows():
    """Guards the row-by-row branch at a batch of hundreds, of several lengths."""
    rows = some_rows(4, SOME, B=300)
    arguments = case(rows, H=2, Hkv=1, Dh=4, S=30)
    torch.testing.assert_close(decode_attention(*arguments), reference_decode(*arguments))


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(q=torch.zeros(10, 4, 8).double()), "they must be of one dtype"),
        (dict(q=torch.zeros(0, 4, 8)), "with R > 0"),
        (dict(q=torch.zeros(10, 1, 4, 8)), r"q must be \(R, H, Dh\)"),
        (dict(q=torch.zeros(10, 3, 8)), "3 query heads must be a multiple of the 2 KV heads"),
        (dict(q=torch.zeros(9, 4, 8)), "for 10 candidates"),
        (dict(values=torch.zeros(5, 2, 8, 8)), r"must both be \(B, Hkv, capacity, 8\)"),
        (dict(keys=torch.zeros(5, 2, 8, 33).mT), "must be contiguous"),
        (dict(keys=torch.zeros(4, 2, 33, 8), values=torch.zeros(4, 2, 33, 8)), "4 cache rows"),
        (dict(rows=replace(some_rows(2, ALL), members=torch.arange(5))), r"members \(5, n\)"),
        (dict(rows=replace(some_rows(2, ALL), lengths=torch.arange(4))), r"lengths must be \(5,\)"),
    ],
)
def test_wrong_shapes_are_refused(change, words):
    """Guards a kernel that would read outside its tensors."""
    names = ("q", "keys", "values", "rows")
    with pytest.raises(ValueError, match=words):
        decode_attention(**dict(zip(names, case(some_rows(2, ALL), dtype=torch.float32), strict=True)) | change)


# --------------------------------------------------------------------------------------------------------- the noise


def test_philox_known_answer():
    """Guards the generator: the published words of Philox-4x32-10 at counter 0, key 0 (Random123, kat_vectors)."""
    words = philox(torch.tensor([0]), torch.tensor([0]), torch.tensor([0]))[0, 0].tolist()
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_noise_is_exponential_and_independent():
    """Guards the noise: Kolmogorov's distance from Exp(1), and no correlation of ids, steps or seeds side by side."""
    seeds, step = torch.arange(100), torch.full((100,), 5)
    E = reference_exponentials(seeds, step, 1001)  # 100,100 numbers
    sorted_cdf = (-torch.expm1(-E.flatten())).sort().values
    ranks = torch.arange(1, len(sorted_cdf) + 1) / len(sorted_cdf)
    assert (sorted_cdf - ranks).abs().max() < 1.95 / math.sqrt(len(sorted_cdf))  # 99.9 % quantile
    u = torch.exp(-E)
    others = u[:, 1:], reference_exponentials(seeds, step + 1, 1001).neg().exp(), u.roll(1, 0)
    for other in others:
        pair = torch.stack((u[:, : other.shape[1]].flatten(), other.flatten()))
        assert torch.corrcoef(pair)[0, 1].abs() < 3.3 / math.sqrt(pair.shape[1])


def test_each_row_has_its_own_step():
    """Guards one step for all rows: rows of one seed at other steps are rows of that seed's stream."""
    seeds, steps = torch.full((4,), 7), torch.tensor([0, 9, 2, 9])
    rows = reference_exponentials(seeds, steps, 50)
    assert torch.equal(rows[1], rows[3]) and not torch.equal(rows[0], rows[1])
    for row, step in enumerate(steps):
        assert torch.equal(rows[row], reference_exponentials(seeds[:1], step[None], 50)[0])


def test_gumbel_max_draws_from_the_softmax():
    """Guards the method: chi-square of 50,000 draws by the reference against softmax(z / temperature)."""
    draws, hidden = 50_000, torch.tensor([[1.0, -0.5]])
    weight = torch.randn(11, 2, generator=torch.Generator().manual_seed(0))
    probs = (hidden @ weight.T / 0.7).softmax(-1)[0]
    streams = torch.arange(draws) * 7919, torch.arange(draws) % 5
    ids, logprobs = reference_sample(hidden.expand(draws, -1), weight, 0.7, *streams)
    counts = torch.bincount(ids, minlength=11)
    assert ((counts - draws * probs) ** 2 / (draws * probs)).sum() < 29.6  # 99.9 % quantile at 10 degrees of freedom
    torch.testing.assert_close(logprobs, probs.log()[ids])


# ------------------------------------------------------------------------------------------------------ the torch path


@pytest.fixture
def torch_path():
    set_backend("torch")
    yield
    set_backend("auto")


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_torch_path_is_the_inverse_cdf_of_the_logits(torch_path, temperature, dtype):
    """Guards the tiny results: the draws are those of `sample` at each row's own step of its seed's own stream."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 16, generator=generator).to(dtype)
    weight = torch.randn(50, 16, generator=generator).to(dtype)
    seeds, steps = [3, 1, 4, 1, 2**31 - 1], torch.tensor([6, 0, 7, 2, 6])
    table = draw_uniforms(seeds, 8)
    assert torch.equal(table[1], table[3]) and not torch.equal(table[0], table[1])
    assert torch.equal(table[0], torch.rand(8, generator=torch.Generator().manual_seed(3)))
    wide, own = torch.promote_types(dtype, torch.float32), table[torch.arange(5), steps]
    expected = sample(hidden.to(wide) @ weight.to(wide).T, temperature, own)
    for uniforms in (None, own):
        ids, logprobs = sample_head(hidden, weight, temperature, torch.tensor(seeds), steps, uniforms)
        assert torch.equal(ids, expected[0]) and torch.equal(logprobs, expected[1])


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(hidden=torch.zeros(2, 3)), r"must be \(R, D\) and \(V, D\)"),
        (dict(seeds=torch.zeros(3).long()), r"must be \(2,\) both"),
        (dict(steps=torch.tensor(0)), r"must be \(2,\) both"),
        (dict(temperature=-0.5), "temperature is -0.5; it must be at least 0"),
    ],
)
def test_bad_arguments_are_refused(change, words):
    """Guards a kernel that would read outside its tensors."""
    streams = dict(seeds=torch.arange(2), steps=torch.zeros(2).long())
    arguments = dict(hidden=torch.zeros(2, 4), weight=torch.zeros(9, 4), temperature=1.0) | streams
    with pytest.raises(ValueError, match=words):
        sample_head(**arguments | change)
