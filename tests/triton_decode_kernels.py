"""The decoding kernels against fp64: on CUDA at Qwen-2.5's shapes, else interpreted (TRITON_INTERPRET=1) and small."""

import importlib
import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from test_decode_kernels import running

from kernels.backend import INTERPRETED, jit, set_backend, tl
from kernels.decode_attention import decode_attention, reference_decode
from kernels.prefill_attention import Chunk, Chunks, attend_chunks, prefill_attention
from kernels.rows import Rows, adopt
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
    """Draw normals on the device: a CPU takes minutes for those of all tests at Qwen's sizes."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, device=DEVICE)).to(dtype)


def assert_within(ours: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype) -> None:
    """|kernel − truth| is at most twice that of plain torch in the same dtype, plus one rounding of the largest."""
    eps = torch.finfo(dtype).eps * max(1.0, float(truth.abs().max()))
    assert ours.isfinite().all()
    assert (ours.double() - truth).abs().max() <= 2 * (plain.double() - truth).abs().max() + eps


# ----------------------------------------------------------------------------------------------------------- attention


@contextmanager
def spoilt_memory():
    """Let what `torch.empty` gives be NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def on_device(rows: Rows) -> Rows:
    return Rows(*(x.to(DEVICE) for x in (rows.prompt, rows.lengths, rows.members, rows.place)))


def spoil(keys: torch.Tensor, values: torch.Tensor, rows: Rows) -> list[torch.Tensor]:
    """Give longer caches that hold NaN in every slot beyond a row's length, and all over rows that nobody reads."""
    B, Hkv, S, Dh = keys.shape
    lengths = torch.where((rows.members >= 0).any(1), rows.lengths, 0)
    beyond = torch.arange(S + 5, device=DEVICE) >= lengths[:, None]  # (B, S + 5)
    longer = [torch.cat((x, x.new_zeros(B, Hkv, 5, Dh)), 2) for x in (keys, values)]
    return [x.masked_fill_(beyond[:, None, :, None], math.nan) for x in longer]


def check_attention(q, keys, values, rows: Rows) -> torch.Tensor:
    """Compare one call to fp64 and return what it gave; slots that are not to be read, and buffers, are NaN before."""
    rows = on_device(rows)
    truth = reference_decode(*(x.double() for x in (q, keys, values)), rows)
    plain = reference_decode(q, keys, values, rows)
    with spoilt_memory():
        ours = decode_attention(q, *spoil(keys, values, rows), rows)
    assert ours.dtype == q.dtype
    assert not ours[rows.place < 0].any()
    assert_within(ours, plain, truth, q.dtype)
    return ours


def plain_rows(lengths: list[int]) -> Rows:
    """Rows of one candidate each; all slots count as prompt in every other row: with n = 1 it makes no difference."""
    return running([length * (b % 2) for b, length in enumerate(lengths)], lengths, [[True]] * len(lengths))


def attention_case(R, B, H, Hkv, Dh, S, dtype, scale=1.0):
    cache = (B, Hkv, S, Dh)
    return (
        draw(R, H, Dh, dtype=dtype, scale=scale),
        draw(*cache, dtype=dtype, seed=1),
        draw(*cache, dtype=dtype, seed=2),
    )


QWEN = [(14, 2, 64), (12, 2, 128), (16, 2, 128), (28, 4, 128)]
HEADS = QWEN if CUDA else [(1, 1, 32), (14, 2, 32), (8, 4, 12), (8, 1, 16)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("H, Hkv, Dh", HEADS)
def test_attention_equals_fp64(H, Hkv, Dh, n, dtype):
    """Guards groups, padding of queries and channels, and ragged rows: one slot a candidate, a few, all."""
    S = 1500 if CUDA else 75
    lengths = [S, n, 2 * n, S // 2, S - 1]
    rows = running([S // 2, 0, n, S // 2 - n, 1], lengths, [[True] * n] * 5)
    check_attention(*attention_case(5 * n, 5, H, Hkv, Dh, S, dtype), rows)


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("splits", [1, 2, 3, 5])
def test_split_boundaries(splits, n, monkeypatch):
    """Guards the cut: lengths one below, at and one above every edge of a tile, in rows of one piece to many."""
    monkeypatch.setattr(module("decode_attention"), "piece_count", lambda heads, per_sm, rows, device: splits * rows)
    block = module("decode_attention").FP32_TILE["BLOCK"]
    edges = {block, 2 * block, splits * block, 2 * splits * block, 3 * splits * block}
    lengths = sorted({n} | {e + d for e in edges for d in (-1, 0, 1)})
    B = len(lengths)
    if n == 1:
        rows = plain_rows(lengths)
    else:
        prompt = [max(0, min(length - n, (7 * b, block, block + 1)[b % 3])) for b, length in enumerate(lengths)]
        rows = running(prompt, lengths, [[True] * n] * B)
    check_attention(*attention_case(B * n, B, 2, 1, 32, max(lengths), torch.float32), rows)


def test_more_pieces_than_a_merge_takes_at_once(monkeypatch):
    """Guards the merge's loop: more pieces than its chunk, the best keys in the last of them, or all in one row."""
    monkeypatch.setattr(module("decode_attention"), "piece_count", lambda *_: 22)
    block = module("decode_attention").FP32_TILE["BLOCK"]
    q, keys, values = attention_case(2, 2, 1, 1, 16, 21 * block, torch.float32)
    keys[:, :, 18 * block :] += 3 * q[:, :, None]
    check_attention(q, keys, values, plain_rows([21 * block, 5]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("n, H, Hkv", [(1, 2, 1), (4, 14, 2), (5, 7, 1), (9, 8, 2)])
def test_candidates_that_run_and_those_that_do_not(n, H, Hkv, padding, dtype):
    """Guards the mask and who writes what: finished candidates, rows of none, padding, n that is no power of 2, more
    queries than a program holds (some of whose blocks have no query at all), and no prompt."""
    prompt, B, Dh = [33, 70, 0, 64, 10], 5, 64 if CUDA else 16
    lengths = [33 + 2 * n, 70 + n, 5 * n, 64 + n, 10 + 3 * n]
    runs = [[True] * n, [False] * n, [c % 2 == 0 for c in range(n)], [c == n - 1 for c in range(n)], [True] * n]
    rows = running(prompt, lengths, runs, padding)
    out = check_attention(*attention_case(len(rows.place), B, H, Hkv, Dh, max(lengths), dtype), rows)
    assert out[rows.place.to(DEVICE) >= 0].any(-1).all()


def test_the_same_candidate_wherever_it_stands():
    """Guards members and place: which query is whose follows from them, and not from the order of rows."""
    rows = running([9, 5, 20], [17, 29, 40], [[True] * 4, [False] * 4, [True, False, True, True]])
    q, keys, values = attention_case(7, 3, 4, 2, 16, 40, torch.float32)
    straight = check_attention(q, keys, values, rows)
    turned = Rows(
        rows.prompt.flip(0), rows.lengths.flip(0), rows.members.flip(0), (2 - rows.place // 4) * 4 + rows.place % 4
    )
    with spoilt_memory():
        out = decode_attention(q, keys.flip(0), values.flip(0), on_device(turned))
    torch.testing.assert_close(out, straight)


def test_a_tile_in_which_a_candidate_sees_nothing(monkeypatch):
    """Guards −∞ − −∞: more candidates than slots in a tile, so that whole tiles and pieces are hidden from some."""
    for most in (2, 8):
        monkeypatch.setattr(module("decode_attention"), "piece_count", lambda *_, most=most: most)
        rows = running([0, 3], [70, 73], [[True] * 70, [c > 60 for c in range(70)]])
        check_attention(*attention_case(79, 2, 1, 1, 16, 80, torch.float32), rows)


LENGTHS = {
    "equal": [320] * 6, "one much longer": [33, 64, 640, 1, 40, 40], "even": [64, 128, 192, 256, 320, 384],
    "who waits counts for nothing": [900, 70, 900, 300, 40, 900], "some empty": [0, 95, 0, 96, 97, 0],
}  # fmt: skip


@pytest.mark.parametrize("most", [6, 7, 12, 40])
@pytest.mark.parametrize("case", LENGTHS)
def test_the_plan(case, most):
    """Guards the cut: each slot of a row that runs lies in one piece, and no smaller size would give few enough."""
    lengths, block = LENGTHS[case], 32
    runs = [[False, not (case.startswith("who") and length == 900)] for length in lengths]
    rows = on_device(running([0] * 6, lengths, runs))
    pieces, spans = (x.tolist() for x in module("decode_attention").plan(rows, most, 800, block))
    tiles = [-(-min(length, 800) // block) if any(run) else 0 for length, run in zip(lengths, runs, strict=True)]
    size = next(size for size in range(1, 26) if sum(-(-count // size) for count in tiles) <= most) * block
    expected, expected_spans = [], []
    for row, count in enumerate(tiles):
        end = min(lengths[row], 800) if count else 0
        expected_spans.append([len(expected), -(-end // size)])
        expected += [[row, start, min(start + size, end)] for start in range(0, end, size)]
    assert spans == expected_spans and pieces[: len(expected)] == expected
    assert all(row == -1 for row, *_ in pieces[len(expected) :])


def test_the_plan_is_made_once_a_step(monkeypatch):
    """Guards what the cut costs: one launch for all layers."""
    plans, kernel = [], module("decode_attention").plan_kernel

    class Kernel:
        def __getitem__(self, grid):
            plans.append(grid)
            return kernel[grid]

    monkeypatch.setattr(module("decode_attention"), "plan_kernel", Kernel())
    rows = on_device(plain_rows([9, 40]))
    for _ in range(3):  # layers
        decode_attention(*attention_case(2, 2, 2, 1, 16, 40, torch.float32), rows)
    assert len(plans) == 1


def test_nothing_to_attend_to():
    """Guards 0 / 0: a row without any key gives zeros, its neighbour is not touched."""
    out = check_attention(*attention_case(2, 2, 2, 1, 16, 8, torch.float32), plain_rows([0, 3]))
    assert not out[0].any() and out[1].any()


@pytest.mark.parametrize("scale", [1e-4, 100.0])
def test_large_scores(scale):
    """Guards exp: scores of several hundred, where one key takes all, and scores that are all alike."""
    check_attention(*attention_case(2, 2, 4, 2, 32, 70, torch.float32, scale), plain_rows([70, 33]))
    rows = running([33, 20], [61, 60], [[True] * 4, [False, True, True, False]])
    check_attention(*attention_case(6, 2, 4, 2, 32, 70, torch.float32, scale), rows)


def test_many_rows():
    """Guards offsets and the grid: hundreds of rows, most of which wait."""
    B = 3000 if CUDA else 300
    runs = [[b % 7 == 0, b % 35 == 0] for b in range(B)]
    rows = running([3 + b % 4 for b in range(B)], [7 + b % 11 for b in range(B)], runs, padding=5)
    check_attention(*attention_case(len(rows.place), B, 1, 1, 16, 18, torch.float32), rows)


@pytest.mark.skipif(not CUDA, reason="needs CUDA graphs")
def test_a_graph_holds_a_step():
    """Guards against a host that waits, and a shape that depends on data: one capture serves other lengths and rows."""
    shape, n = (8, 3, 14, 2, 64, 600, torch.bfloat16), 4
    steps = [
        running([500, 3, 0], [508, 7, 4], [[True] * n, [True, False, False, True], [False] * n], 2),
        running([200, 30, 70], [600, 34, 110], [[False] * n, [True] * n, [False, True, True, False]], 2),
    ]
    q, keys, values = attention_case(*shape)
    static = on_device(steps[0])
    decode_attention(q, keys, values, static)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(q, keys, values, replace(static))  # a step's own, which plans anew
    for step in steps:
        for name in ("prompt", "lengths", "members", "place"):
            getattr(static, name).copy_(getattr(step, name))
        graph.replay()
        torch.testing.assert_close(out, decode_attention(q, keys, values, on_device(step)))


# --------------------------------------------------------------------------------------------------------------- adopt


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, candidate, tokens", [(2, 0, 80), (2, 1, 1), (4, 3, 33), (3, 0, 32), (5, 2, 65)])
def test_adopt_equals_copies(n, candidate, tokens, dtype):
    """Guards slots that overlap, offsets and edges of steps: each tensor is as after a copy, all else untouched."""
    B, Hkv, Dh, prompt, layers = 3, 2, 128 if CUDA else 12, 7, 36 if CUDA else 2
    tensors = [draw(B, Hkv, prompt + n * tokens + 3, Dh, dtype=dtype, seed=seed) for seed in range(2 * layers)]
    expected = [stored.clone() for stored in tensors]
    for stored in expected:
        stored[1, :, prompt : prompt + tokens] = stored[1, :, prompt + candidate : prompt + n * tokens : n].clone()
    adopt(tensors, 1, prompt, tokens, candidate, n)
    assert all(map(torch.equal, tensors, expected))


def test_adopt_is_one_launch(monkeypatch):
    """Guards what a turn costs: two launches for each layer's keys, and for its values."""
    launches = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda addresses, *args, **options: launches.append((grid, addresses.tolist()))

    monkeypatch.setattr(module("rows"), "adopt_kernel", Kernel())
    tensors = [draw(1, 2, 9, 16, seed=seed) for seed in range(6)]
    adopt(tensors, 0, 1, 3, 1, 2)
    assert launches == [((6, 2), [stored.data_ptr() for stored in tensors])]


# ------------------------------------------------------------------------------------------------------------- prefill


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H, Hkv, Dh", HEADS)
def test_prefill_equals_fp64(H, Hkv, Dh, dtype):
    """Guards tiles: chunks below, at and above their edges, that begin a row or continue it, in any order of rows."""
    block = module("prefill_attention").FP32_TILE["BLOCK_M"]
    sizes = [(block, 0), (1, 0), (block - 1, 2 * block + 5), (1, block), (2 * block + 1, 3)]  # new tokens, stored ones
    B, S, chunks, first = len(sizes), 4 * block, [], 0
    for row, (new, stored) in zip((2, 0, 4, 1, 3), sizes, strict=True):
        chunks.append(Chunk(row, first, first + new, stored + new))
        first += new
    q, keys, values = attention_case(first, B, H, Hkv, Dh, S, dtype)
    truth = attend_chunks(*(x.double() for x in (q, keys, values)), chunks)
    plain = attend_chunks(q, keys, values, chunks)
    for row, _, _, used in chunks:
        keys[row, :, used:], values[row, :, used:] = math.nan, math.nan
    with spoilt_memory():
        ours = prefill_attention(q, keys, values, Chunks(chunks))
    assert ours.dtype == q.dtype
    assert_within(ours, plain, truth, dtype)


def test_a_prefill_is_one_launch_and_its_tiles_are_cut_once(monkeypatch):
    """Guards what a prefill costs: a call for each chunk and layer, or tiles that are sent to the device for each."""
    chunks = Chunks([Chunk(0, 0, 3, 3), Chunk(1, 3, 8, 9)])
    launches = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: launches.append((grid, args[3]))

    monkeypatch.setattr(module("prefill_attention"), "prefill_kernel", Kernel())
    for _ in range(3):  # layers
        prefill_attention(*attention_case(8, 2, 4, 2, 16, 12, torch.float32), chunks)
    assert [grid for grid, _ in launches] == [(4, 2)] * 3 and len({id(tiles) for _, tiles in launches}) == 1


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


def product(hidden, weight) -> torch.Tensor:
    """Return logits as plain torch has them: of bf16 inputs summed in fp32 by tensor cores, as the kernel's are."""
    if CUDA and hidden.dtype == torch.bfloat16:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return hidden.float() @ weight.float().T


def check_sample(hidden, weight, temperature, seeds, steps) -> torch.Tensor:
    """Compare one call to fp64: the very ids, but for ties to within rounding, and their log-probs; return the ids."""
    ids, logprobs = sample_head(hidden, weight, temperature, seeds, steps)
    z = hidden.double() @ weight.double().T / (temperature or 1.0)
    keys = z - reference_exponentials(seeds, steps, len(weight)).log() if temperature else z
    tolerance = 1e-5 * float(z.abs().max()) + 1e-5
    assert (keys.gather(1, ids[:, None])[:, 0] >= keys.amax(1) - tolerance).all()
    assert (ids != keys.argmax(1)).sum() <= len(ids) // 50  # ties are rare
    truth = z.log_softmax(-1).gather(1, ids[:, None])[:, 0]
    plain = (product(hidden, weight) / (temperature or 1.0)).log_softmax(-1).gather(1, ids[:, None])[:, 0]
    assert logprobs.dtype == torch.float32 and ids.dtype == torch.long
    eps = torch.finfo(torch.float32).eps * max(1.0, float(z.abs().max()))
    assert (logprobs.double() - truth).abs().max() <= 2 * (plain.double() - truth).abs().max() + 4 * eps
    return ids


def some_seeds(R: int) -> torch.Tensor:
    """R seeds, one of them beyond 32 bits."""
    seeds = torch.randint(2**31, (R,), generator=torch.Generator().manual_seed(9))
    seeds[-1] = 2**45 + 12345
    return seeds.to(DEVICE)


def some_steps(R: int, first: int = 0) -> torch.Tensor:
    """R steps, of rows that joined at different times."""
    return first + 3 * torch.arange(R, device=DEVICE) % 41


def same_step(R: int, step: int) -> torch.Tensor:
    return torch.full((R,), step, device=DEVICE)


SIZES = (
    [(64, 896, 151_936), (1, 1536, 151_936), (256, 2048, 151_936), (17, 3584, 152_064)]
    if CUDA
    else [(1, 8, 50), (5, 40, 300), (17, 64, 128), (70, 33, 129)]
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 2.5])
@pytest.mark.parametrize("R, D, V", SIZES)
def test_the_predicted_ids_are_drawn(R, D, V, temperature, dtype):
    """Guards counters, lanes, keys, edges and each row's step: torch's own Philox foretells all ids; log p is exact."""
    hidden, weight = draw(R, D, dtype=dtype), draw(V, D, dtype=dtype, seed=1, scale=2 / math.sqrt(D))
    check_sample(hidden, weight, temperature, some_seeds(R), some_steps(R, 300))


@pytest.mark.parametrize("R", [1, 3])
def test_the_whole_vocabulary(R, monkeypatch):
    """Guards offsets at V = 151,936: flat logits draw from all of it, steps far apart differ."""
    if INTERPRETED:  # whose cost is by tile
        monkeypatch.setitem(module("sample_head").FP32_TILE, "BLOCK_V", 16384)
    weight = draw(151_936, 4, seed=1, scale=0.1)
    drawn = [check_sample(draw(R, 4), weight, 1.0, some_seeds(R), same_step(R, step)) for step in (0, 2**31 - 1)]
    assert not torch.equal(*drawn)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_more_blocks_than_a_merge_takes_at_once(temperature, monkeypatch):
    """Guards the merge's loop: the best id in any of its rounds, and a sum over all of them."""
    monkeypatch.setitem(module("sample_head").MERGE, "BLOCK", 2)
    ids = check_sample(draw(12, 8), draw(700, 8, seed=1, scale=0.3), temperature, some_seeds(12), some_steps(12))
    assert len((ids // 128).unique()) > 3


def test_frequencies_match_softmax():
    """Guards the draw end to end: chi-square of many rows of one distribution, each with its seed."""
    R, V = 100_000 if CUDA else 700, 7
    hidden, weight = draw(1, 8).expand(R, -1), draw(V, 8, seed=1, scale=0.4)
    ids, _ = sample_head(hidden, weight, 1.3, torch.arange(R, device=DEVICE), some_steps(R))
    expected = R * (hidden[0] @ weight.T / 1.3).softmax(-1).double()
    chi_square = ((torch.bincount(ids, minlength=V) - expected) ** 2 / expected).sum()
    assert chi_square < 22.5  # 99.9 % quantile at 6 degrees of freedom


def test_a_row_does_not_depend_on_its_batch():
    """Guards reproducibility: a row of one seed and step draws the same alone, among others, anywhere in the batch."""
    hidden, weight, seeds, steps = draw(40, 16), draw(200, 16, seed=1), some_seeds(40), some_steps(40)
    ids, logprobs = sample_head(hidden, weight, 1.0, seeds, steps)
    order = torch.tensor([39, 0, 17], device=DEVICE)
    few, few_logprobs = sample_head(hidden[order], weight, 1.0, seeds[order], steps[order])
    assert torch.equal(few, ids[order])
    torch.testing.assert_close(few_logprobs, logprobs[order], atol=1e-5, rtol=0)


def test_seeds_and_steps_are_streams():
    """Guards rows that would share their noise: one distribution, other seeds or other steps, other ids."""
    hidden, weight = draw(1, 4).expand(30, -1), draw(300, 4, seed=1, scale=0.1)
    seeds, fives, zeros = torch.arange(30, device=DEVICE), same_step(30, 5), same_step(30, 0)
    by_seed, _ = sample_head(hidden, weight, 1.0, seeds, zeros)
    same, _ = sample_head(hidden, weight, 1.0, fives, zeros)
    by_step, _ = sample_head(hidden, weight, 1.0, fives, seeds)
    assert len(by_seed.unique()) > 20 and len(same.unique()) == 1 and len(by_step.unique()) > 20


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_large_logits(temperature):
    """Guards exp: logits of several thousand of both signs, all below zero too."""
    hidden, weight = draw(6, 8, scale=1000.0), draw(150, 8, seed=1)
    weight[:, 0] = -weight[:, 0].abs() - 3
    hidden[3:] = 0
    hidden[3:, 0] = 2000.0
    check_sample(hidden, weight, temperature, some_seeds(6), some_steps(6))


@pytest.mark.skipif(not CUDA, reason="counts the GPU's memory")
def test_no_logits_in_memory():
    """Guards the point of it: far less than one (R, V) matrix is allocated."""
    hidden, weight = draw(64, 896, dtype=torch.bfloat16), draw(151_936, 896, dtype=torch.bfloat16)
    seeds, steps = some_seeds(64), some_steps(64)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sample_head(hidden, weight, 1.0, seeds, steps)
    assert torch.cuda.max_memory_allocated() - before < 64 * 151_936


# ------------------------------------------------------------------------------------------------------ the whole model


def test_generate_on_the_kernels():
    """Guards the wiring: lengths, seeds and steps through prefill, candidates and rows that leave the batch.

    A plain forward of each row and torch's own Philox foretell all ids.
    """
    from model import Qwen2Config, random_policy
    from sampler import generate

    config = Qwen2Config(53, 64, 64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    policy = random_policy(config, seed=0).to(DEVICE)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    prompts, seeds, stops = [[3, 4, 5], [6]], [11, 12, 13, 2**31 - 1], set(range(12))
    draws = generate(policy, prompts, n=2, max_new_tokens=6, stop_ids=stops, temperature=0.8, seeds=seeds)
    assert len({len(sampled.token_ids) for sampled in draws}) > 1
    set_backend("torch")
    for sampled, seed in zip(draws, seeds, strict=True):
        ids = list(prompts[sampled.key])
        for step, (token, found) in enumerate(zip(sampled.token_ids, sampled.logprobs, strict=True)):
            with torch.no_grad():
                last = policy(torch.tensor([ids], device=DEVICE))[:, -1]
                expected, logprob = reference_sample(
                    last, policy.head_weight, 0.8, torch.tensor([seed], device=DEVICE), same_step(1, step)
                )
            assert token == expected.item()
            assert abs(found - logprob.item()) < 1e-4
            ids.append(token)
