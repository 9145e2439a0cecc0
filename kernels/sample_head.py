"""Sampling straight from hidden states: the next token of each row and its log-probability, with no logits in memory.

    z = h Wᵀ / τ      token = argmaxᵥ (zᵥ − log Eᵥ),  Eᵥ ~ Exp(1)      log p(token) = z_token − log Σᵥ exp zᵥ

−log E is Gumbel noise, and the argmax of logits plus Gumbel noise is a draw from their softmax (Gumbel-max,
arXiv:1411.0030). An argmax, unlike an inverse CDF, needs one pass and splits: each program takes a block of the
vocabulary and keeps, per row, five numbers: the largest z, Σ exp(z − max), the best perturbed logit, its id and its z.
A second kernel merges the blocks, a softmax in pieces as in decode_attention.py. At τ = 0 there is no noise: the
likeliest token, with its log p at τ = 1.

The noise is a function, not a state: E of id v at a row's own step t is lane v mod 4 of Philox-4x32-10 (Salmon et al.,
2011) at the counter (v div 4, t, 0, 0), keyed by the row's seed. A row's draw does not depend on what shares its batch,
nor on when it joined.

    w = (bits + ½) / 2³²      E = −log(1 − w)      w in fp32, at most 1 − 2⁻²⁴: E is never 0 nor infinite

Not u = 1 − w in fp32 and E = −log u: the ids that win have small E, down to 1/V, where u has run out of digits.

What it saves: (R, V) fp32 logits, written and read three times by softmax, cumsum and search: at R = 256 and
V = 151,936 156 MB each time. The GEMM reads W once for up to 128 rows, 2 V D bytes in bf16 (3B: 622 MB, 0.19 ms at
3.35 TB/s: the floor), and 2 R V D FLOP. One Philox call gives the noise of four ids; 20 bytes a row and block go out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import cpu
from kernels.backend import INTERPRETED, jit, tl, use_triton
from kernels.head import matmul, sum_dtype

TILES = [  # the smallest that holds the rows; a deep pipeline, for what counts is the bytes of W in flight
    dict(BLOCK_R=16, BLOCK_V=128, BLOCK_D=128, num_warps=4, num_stages=4),
    dict(BLOCK_R=64, BLOCK_V=128, BLOCK_D=64, num_warps=8, num_stages=4),
    dict(BLOCK_R=128, BLOCK_V=128, BLOCK_D=64, num_warps=16, num_stages=3),  # the noise spills with half the warps
]
FP32_TILE = dict(BLOCK_R=32, BLOCK_V=64, BLOCK_D=32, num_warps=4, num_stages=2)
MERGE = dict(BLOCK=2048, num_warps=4)


# ----------------------------------------------------------------------------------------------------------- reference


def philox(seeds: Tensor, counter: Tensor, steps: Tensor) -> Tensor:
    """Return the four 32-bit words of Philox-4x32-10, (R, n, 4) long, for seeds and steps (R,) and counters (n,)."""
    low = 0xFFFFFFFF

    def product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:  # high and low word, by halves: int64 holds no 64 bits
        upper, lower = a * (b >> 16), a * (b & 0xFFFF)
        total = (upper & 0xFFFF) * 65536 + lower  # < 2**49
        return (upper >> 16) + (total >> 32), total & low

    k0, k1 = (seeds & low)[:, None], (seeds >> 32 & low)[:, None]
    c0 = counter.expand(len(seeds), -1)
    c1, c2, c3 = steps[:, None].expand_as(c0), torch.zeros_like(c0), torch.zeros_like(c0)
    for _ in range(10):
        (hi0, lo0), (hi1, lo1) = product(0xD2511F53, c0), product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return torch.stack((c0, c1, c2, c3), -1)


def reference_exponentials(seeds: Tensor, steps: Tensor, V: int) -> Tensor:
    """Return E (R, V) fp64, the kernel's noise."""
    bits = philox(seeds, torch.arange(-(-V // 4), device=seeds.device), steps).flatten(1)[:, :V]
    w = (bits.float() + 0.5) * 2.0**-32
    return -torch.log1p(-w.clamp(max=1 - 2.0**-24).double())


def reference_sample(hidden: Tensor, weight: Tensor, temperature: float, seeds: Tensor, steps: Tensor):
    """Return what the kernels of `sample_head` return, with all logits at once."""
    z = (hidden @ weight.T).to(sum_dtype(hidden)) / (temperature or 1.0)  # (R, V)
    keys = z - reference_exponentials(seeds, steps, len(weight)).log() if temperature else z
    ids = keys.argmax(-1)
    return ids, z.log_softmax(-1).gather(-1, ids[:, None])[:, 0]


# ------------------------------------------------------------------------------------------------------------- kernels


@jit()
def exponential(bits):
    """Turn 32 random bits into E ~ Exp(1); for small w by the series of −log(1 − w), for 1 − w would round."""
    w = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.9999999403953552)
    series = w * (1 + w * (0.5 + w * (0.3333333333 + w * 0.25)))
    return tl.where(w < 0.015625, series, -tl.log(1 - w))


@jit(do_not_specialize=("R",))
def sample_kernel(
    hidden, weight, seeds, steps, partial, winner, R, V, D, inv_temperature,
    SAMPLED: tl.constexpr, UPCAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute the logits of BLOCK_R rows and BLOCK_V ids, and reduce them to five numbers a row.

    partial (4, R, blocks): max z, Σ exp(z − max), the best key, its z. winner (R, blocks): its id.
    """
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    first = tl.program_id(1) * BLOCK_V
    ids = first + tl.arange(0, BLOCK_V)
    d = tl.arange(0, BLOCK_D)
    hidden += row.to(tl.int64)[:, None] * D + d[None, :]
    weight += ids.to(tl.int64)[None, :] * D + d[:, None]
    z = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
    for start in range(0, D, BLOCK_D):
        h = tl.load(hidden + start, mask=(row < R)[:, None] & (start + d < D)[None, :], other=0.0)
        w = tl.load(weight + start, mask=(ids < V)[None, :] & (start + d < D)[:, None], other=0.0)
        if UPCAST:
            h, w = h.to(tl.float32), w.to(tl.float32)
        z = tl.dot(h, w, z, input_precision="ieee")
    z = tl.where((ids < V)[None, :], z * inv_temperature, float("-inf"))
    m = tl.max(z, 1)
    s = tl.sum(tl.exp(z - m[:, None]), 1)
    keys, key = z, m  # a greedy key is the maximum that is known: to search for it again costs registers
    if SAMPLED:
        seed = tl.load(seeds + row, mask=row < R, other=0)
        step = tl.load(steps + row, mask=row < R, other=0).to(tl.uint32)
        counter = first // 4 + tl.arange(0, BLOCK_V // 4)
        c0 = (tl.zeros([BLOCK_R, 1], tl.int32) + counter[None, :]).to(tl.uint32)
        a, b, c, e = tl.philox(seed[:, None], c0, c0 * 0 + step[:, None], c0 * 0, c0 * 0)
        bits = tl.interleave(tl.interleave(a, c), tl.interleave(b, e))  # a b c e: lanes 0 to 3 of each counter
        keys = z - tl.log(exponential(bits))
        key = tl.max(keys, 1)
    best = tl.argmax(keys, 1)
    z_best = tl.max(tl.where(tl.arange(0, BLOCK_V)[None, :] == best[:, None], z, float("-inf")), 1)
    blocks = tl.num_programs(1)
    at = row.to(tl.int64) * blocks + tl.program_id(1)
    numbers = R.to(tl.int64) * blocks
    tl.store(partial + at, m, mask=row < R)
    tl.store(partial + at + numbers, s, mask=row < R)
    tl.store(partial + at + 2 * numbers, key, mask=row < R)
    tl.store(partial + at + 3 * numbers, z_best, mask=row < R)
    tl.store(winner + at, first + best, mask=row < R)


@jit(do_not_specialize=("R",))
def merge_blocks_kernel(partial, winner, ids, logprobs, R, blocks, BLOCK: tl.constexpr):
    """Merge the blocks of row `program_id`: the token of the best key, and its z less the log-sum-exp."""
    row = tl.program_id(0).to(tl.int64)
    numbers = R.to(tl.int64) * blocks
    partial += row * blocks
    m, s = -1e30, 0.0  # finite: −∞ − −∞ is NaN
    key, at = float("-inf"), 0
    for start in range(0, blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)
        inside = block < blocks
        m_block = tl.load(partial + block, mask=inside, other=float("-inf"))
        s_block = tl.load(partial + block + numbers, mask=inside, other=0.0)
        keys = tl.load(partial + block + 2 * numbers, mask=inside, other=float("-inf"))
        m_new = tl.maximum(m, tl.max(m_block, 0))
        s = s * tl.exp(m - m_new) + tl.sum(s_block * tl.exp(m_block - m_new), 0)
        m = m_new
        best = tl.max(keys, 0)
        at = tl.where(best > key, start + tl.argmax(keys, 0), at)
        key = tl.maximum(key, best)
    tl.store(ids + row, tl.load(winner + row * blocks + at).to(tl.int64))
    tl.store(logprobs + row, (tl.load(partial + 3 * numbers + at) - m) - tl.log(s))


def launch(hidden: Tensor, weight: Tensor, temperature: float, seeds: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Run the two kernels."""
    (R, D), V, device = hidden.shape, len(weight), hidden.device
    tile = next((tile for tile in TILES if R <= tile["BLOCK_R"]), TILES[-1])
    if hidden.dtype == torch.float32:
        tile = FP32_TILE
    row_blocks, blocks = -(-R // tile["BLOCK_R"]), -(-V // tile["BLOCK_V"])
    partial = torch.empty(4, R, blocks, dtype=torch.float32, device=device)
    winner = torch.empty(R, blocks, dtype=torch.int32, device=device)
    sample_kernel[(row_blocks, blocks)](  # neighbours share a block of W: the second finds it in the L2 cache
        hidden, weight, seeds, steps, partial, winner, R, V, D, 1 / (temperature or 1.0),
        temperature > 0, INTERPRETED, **tile,
    )  # fmt: skip
    ids = torch.empty(R, dtype=torch.long, device=device)
    logprobs = torch.empty(R, dtype=torch.float32, device=device)
    merge_blocks_kernel[(R,)](partial, winner, ids, logprobs, R, blocks, **MERGE)
    return ids, logprobs


# ------------------------------------------------------------------------------------------ torch path, public function


def sample(logits: Tensor, temperature: float, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one id per row of logits (R, V) fp32 by inverse CDF at uniforms (R,) in [0, 1); give ids, log-probs (R,).

    log p = log softmax(logits / temperature)[id]. Temperature 0 takes the likeliest id, with its log p at temperature
    1. On a CPU `torch.multinomial` takes ten times as long for the same draw, and V Gumbel numbers a row even longer.

    >>> sample(torch.tensor([[0.0, 0.0, -torch.inf]]), 1.0, torch.tensor([0.5]))
    (tensor([1]), tensor([-0.6931]))
    """
    probs = (logits / temperature if temperature > 0 else logits).softmax(dim=-1)  # (R, V)
    if temperature > 0:
        # The first id whose cdf *exceeds* the target has added to it: an id of probability 0 is never drawn, and as
        # u * total < total there always is one. In fp64, since a GPU's parallel sums in fp32 may step down on the way.
        cdf = probs.cumsum(dim=-1, dtype=torch.float64)
        ids = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True)  # (R, 1)
    else:
        ids = logits.argmax(dim=-1, keepdim=True)
    return ids[:, 0], probs.gather(-1, ids)[:, 0].log()


def draw_uniforms(seeds: Sequence[int], steps: int) -> Tensor:
    """Draw the torch path's uniforms of all steps ahead, (R, steps) fp32: each row is the stream of its seed."""
    return torch.stack([torch.rand(steps, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def sample_head(
    hidden: Tensor, weight: Tensor, temperature: float, seeds: Tensor, steps: Tensor, uniforms: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw one id per row from softmax(hidden @ weight.T / temperature); return ids (R,) long, log-probs (R,) fp32.

    Seed and step decide a row's draw, whatever the other rows are; the two paths draw differently from them. Nothing is
    differentiable.

    Args:
        hidden: (R, D) the last token's hidden states after the final norm.
        weight: (V, D) head weight, of the same dtype, contiguous.
        temperature: divides the logits; 0 takes the likeliest id, with its log-prob at temperature 1.
        seeds: (R,) long, at least 0, one stream each.
        steps: (R,) long, the number of each row's draw in its stream; rows that joined later are at an earlier one.
        uniforms: (R,) fp32, for the torch path: of each row column `steps` of `draw_uniforms(seeds, …)`; None: drawn
            here.
    Raises:
        ValueError: shapes that do not fit, or a negative temperature.

    >>> seeds, steps = torch.tensor([3, 4]), torch.tensor([0, 7])
    >>> ids, logprobs = sample_head(torch.ones(2, 1), torch.tensor([[0.0], [50.0]]), 1.0, seeds, steps)
    >>> ids.tolist(), logprobs.tolist()
    ([1, 1], [0.0, 0.0])
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be (R, D) and (V, D)")
    if not seeds.shape == steps.shape == hidden.shape[:1]:
        raise ValueError(f"seeds {tuple(seeds.shape)} and steps {tuple(steps.shape)} must be ({len(hidden)},) both")
    if not len(weight) or not len(hidden):
        raise ValueError(f"{len(hidden)} rows and {len(weight)} ids: nothing to sample")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; it must be at least 0 (--temperature)")
    if use_triton(hidden):
        return launch(hidden.contiguous(), weight.contiguous(), temperature, seeds.contiguous(), steps.contiguous())
    if uniforms is None:
        table = draw_uniforms(seeds.tolist(), int(steps.max()) + 1).to(hidden.device)
        uniforms = table.gather(1, steps[:, None])[:, 0]
    if cpu.decodes([weight]):
        return cpu.sample(hidden, weight, temperature, uniforms)
    logits = torch.empty(len(hidden), len(weight), dtype=sum_dtype(hidden), device=hidden.device)
    return sample(matmul(hidden, weight.T, logits), temperature, uniforms)
