"""Rotary positions of queries and keys, and the write of keys and values into the cache.

    y₁ = x₁ cos θ − x₂ sin θ        y₂ = x₂ cos θ + x₁ sin θ         (RoFormer, arXiv:2104.09864 eq. 34)

for the channel pairs (i, i + Dh/2) of every head, Hugging Face's half-split layout, with the angle θ of a token's
position and the pair's frequency. A rotation's gradient is the rotation by −θ: backward is the same kernel with another
SIGN, and nothing but cos and sin is kept for it.

What it saves: memory-bound. One launch reads q and k once and writes them once, 2 N (H + Hkv) Dh elements; plain
operations move about nine times the bytes, since cos and sin promote every product to fp32. Floor at N = 8,192,
H = 16, Hkv = 2, Dh = 128 in bf16 and 3.35 TB/s: 75 MB, 23 µs. The tables (4 Dh bytes a token) are read once for all
heads, because one program takes all heads of one token.

With a cache, the same launch stores a token's rotated key and its value straight into their row and slot, instead of a
rotated copy and two scattered copies: 2 N (H + 2 Hkv) Dh elements. As every token names its row and slot, the new
tokens of several prompts come packed, without padding, and those of decoding too. There, when N is a few dozen, the
bytes are nothing and it is the launches that count: one a layer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels import cpu
from kernels.backend import contiguous_rows, first_order, jit, tl, use_triton


def reference_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel pairs (i, i + Dh/2) of x (…, heads, Dh) by their angles, by plain operations."""
    partner = x.roll(x.shape[-1] // 2, -1)  # x2 beside x1 and x1 beside x2
    return (x * torch.cat((cos, cos), -1) + partner * torch.cat((-sin, sin), -1)).to(x.dtype)


def reference_rope_into_cache(q, k, v, cos, sin, keys, values, rows, slots) -> Tensor:
    """Do what `rope_into_cache` does, by plain operations."""
    q, k = reference_rope(torch.cat((q, k), 1), cos, sin).split((q.shape[1], k.shape[1]), 1)  # one turn for both
    keys[rows, :, slots] = k
    values[rows, :, slots] = v
    return q


# -------------------------------------------------------------------------------------------------------------- kernel


@jit()
def turn(x, x_at, out, out_at, c, s, load, store, HALF: tl.constexpr):
    """Turn the heads of one token, whose first channels lie at x + x_at, into out + out_at."""
    x1 = tl.load(x + x_at, mask=load, other=0.0).to(tl.float32)
    x2 = tl.load(x + x_at + HALF, mask=load, other=0.0).to(tl.float32)
    tl.store(out + out_at, (x1 * c - x2 * s).to(out.dtype.element_ty), mask=store)
    tl.store(out + out_at + HALF, (x2 * c + x1 * s).to(out.dtype.element_ty), mask=store)


@jit(do_not_specialize=("capacity",))
def rope_kernel(
    q,  # (N, H, 2 HALF), a token's Q_ROW behind the one before
    k,  # (N, HKV, 2 HALF), K_ROW
    v,  # (N, HKV, 2 HALF), V_ROW; or None without a cache, as are those marked *
    cos,  # (N, HALF) fp32
    sin,  # (N, HALF) fp32
    q_out,  # out: (N, H, 2 HALF), contiguous
    k_out,  # out: (N, HKV, 2 HALF), or the cache's keys (B, HKV, capacity, 2 HALF)
    v_out,  # * out: the cache's values
    rows,  # * (N,) int64
    slots,  # * (N,) int64
    capacity,
    CACHED: tl.constexpr,
    SIGN: tl.constexpr,  # 1, or −1 to turn back
    Q_ROW: tl.constexpr,
    K_ROW: tl.constexpr,
    V_ROW: tl.constexpr,  # *
    H: tl.constexpr,
    HKV: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,  # H, HKV and HALF, rounded up to powers of 2
    KV_HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Turn all heads of token `program_id` of the N."""
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, PAIRS)[None, :]
    c = tl.load(cos + token * HALF + pair, mask=pair < HALF, other=0.0)
    s = tl.load(sin + token * HALF + pair, mask=pair < HALF, other=0.0) * SIGN

    head = tl.arange(0, HEADS)[:, None]
    inside = (head < H) & (pair < HALF)
    within = head * (2 * HALF) + pair
    turn(q, token * Q_ROW + within, q_out, token * (H * 2 * HALF) + within, c, s, inside, inside, HALF)

    head = tl.arange(0, KV_HEADS)[:, None]
    inside = (head < HKV) & (pair < HALF)
    within = head * (2 * HALF) + pair
    if CACHED:
        row, slot = tl.load(rows + token), tl.load(slots + token)
        real = (row >= 0) & (slot >= 0) & (slot < capacity)  # a slot past the end would be the next head's first
        slot_at = ((row * HKV + head) * capacity + slot) * (2 * HALF) + pair
        turn(k, token * K_ROW + within, k_out, slot_at, c, s, inside, inside & real, HALF)
        v += token * V_ROW
        v1 = tl.load(v + within, mask=inside & real, other=0.0)
        v2 = tl.load(v + within + HALF, mask=inside & real, other=0.0)
        tl.store(v_out + slot_at, v1, mask=inside & real)
        tl.store(v_out + slot_at + HALF, v2, mask=inside & real)
    else:
        turn(k, token * K_ROW + within, k_out, token * (HKV * 2 * HALF) + within, c, s, inside, inside, HALF)


# ------------------------------------------------------------------------------------------------------------ launchers


def tile(H: int, Hkv: int, Dh: int) -> dict[str, int]:
    """Choose the tile of one token: 8 channel pairs of q a thread, two 16-byte loads in bf16.

    >>> tile(14, 2, 64)["num_warps"], tile(28, 4, 128)["num_warps"]
    (2, 8)
    """
    HEADS, KV_HEADS, PAIRS = (1 << (size - 1).bit_length() for size in (H, Hkv, Dh // 2))
    sizes = dict(H=H, HKV=Hkv, HALF=Dh // 2, HEADS=HEADS, KV_HEADS=KV_HEADS, PAIRS=PAIRS)
    return sizes | dict(num_warps=min(8, max(1, HEADS * PAIRS // 256)))


def launch(q, k, cos, sin, k_out, v=None, v_out=None, rows=None, slots=None, *, sign: int = 1) -> Tensor:
    """Run the kernel on tensors of which each token's part is contiguous; return the turned q.

    Without Triton, and without a cache, C++ does it, for contiguous tensors.
    """
    (*tokens, H, Dh), Hkv = q.shape, k.shape[-2]
    q_out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if not use_triton(q):
        for x, out in ((q, q_out), (k, k_out)):
            cpu.run_pass("rope", (x, cos, sin, out), math.prod(tokens), x.shape[-2], Dh // 2, sign)
        return q_out
    Q_ROW, K_ROW, V_ROW = (0 if x is None else x.flatten(0, -3).stride(0) for x in (q, k, v))
    rope_kernel[(math.prod(tokens),)](
        q, k, v, cos, sin, q_out, k_out, v_out, rows, slots, k_out.shape[2],
        CACHED=v is not None, SIGN=sign, Q_ROW=Q_ROW, K_ROW=K_ROW, V_ROW=V_ROW, **tile(H, Hkv, Dh),
    )  # fmt: skip
    return q_out


class RopeFunction(torch.autograd.Function):
    """The kernel, and the kernel backwards."""

    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        k_out = torch.empty_like(k)
        return launch(q, k, cos, sin, k_out), k_out

    @staticmethod
    @first_order
    def backward(ctx, dq, dk):
        dk_out = torch.empty_like(dk, memory_format=torch.contiguous_format)
        dq_out = launch(dq.contiguous(), dk.contiguous(), *ctx.saved_tensors, dk_out, sign=-1)
        return dq_out, dk_out, None, None


def check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Raise ValueError unless q is (…, H, Dh), k (…, Hkv, Dh), and cos and sin are (…, 1, Dh/2) fp32."""
    *tokens, _, Dh = q.shape
    if k.dim() != q.dim() or [*k.shape[:-2]] != tokens or k.shape[-1] != Dh or Dh % 2:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} must be (…, H, Dh), (…, Hkv, Dh), Dh even")
    if cos.shape != (*tokens, 1, Dh // 2) or sin.shape != cos.shape:
        raise ValueError(f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must be {(*tokens, 1, Dh // 2)}")


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return q (B, T, H, Dh) and k (B, T, Hkv, Dh), turned; differentiable in both.

    cos and sin (B, T, 1, Dh/2) fp32 are those of each token's angles. Products in fp32, rounded once. Raises ValueError
    for other shapes.

    >>> q = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    >>> [x.tolist() for x in rope(q, 2 * q, torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1))]  # a quarter turn
    [[[[[0.0, 1.0]]]], [[[[0.0, 2.0]]]]]
    """
    if q.dim() != 4:
        raise ValueError(f"q is {tuple(q.shape)}; it must be (B, T, H, Dh)")
    check(q, k, cos, sin)
    if not (use_triton(q) or cpu.passes(q, q.shape[-1] // 2)):
        return reference_rope(q, cos, sin), reference_rope(k, cos, sin)
    return RopeFunction.apply(q.contiguous(), k.contiguous(), cos.contiguous(), sin.contiguous())


def rope_into_cache(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, rows: Tensor, slots: Tensor
) -> Tensor:
    """Return q, turned; store k, turned, and v in the cache. For inference: nothing is differentiable.

    Args:
        q, k, v: (N, H, Dh), (N, Hkv, Dh) and (N, Hkv, Dh), of N tokens.
        cos, sin: (N, 1, Dh/2) fp32.
        keys, values: (B, Hkv, capacity, Dh), contiguous; written in place.
        rows, slots: (N,) long, where each token's key and value go, no two to one place. The kernel stores nothing
            for row −1 or a slot outside the capacity; the torch path does not know such tokens.
    Raises:
        ValueError: shapes that do not fit, or a cache that is not contiguous.

    >>> keys, values, x, no_turn = *torch.zeros(2, 1, 1, 3, 2), torch.ones(1, 1, 2), torch.zeros(1, 1, 1)
    >>> row, slot = torch.tensor([0]), torch.tensor([1])
    >>> q = rope_into_cache(x, x, 5 * x, no_turn + 1, no_turn, keys, values, row, slot)
    >>> keys.tolist(), values.tolist()
    ([[[[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]]], [[[[0.0, 0.0], [5.0, 5.0], [0.0, 0.0]]]])
    """
    if q.dim() != 3:
        raise ValueError(f"q is {tuple(q.shape)}; it must be (N, H, Dh)")
    check(q, k, cos, sin)
    (N, _, Dh), Hkv = q.shape, k.shape[1]
    if v.shape != k.shape or not rows.shape == slots.shape == (N,):
        shapes = f"v {tuple(v.shape)}, rows {tuple(rows.shape)} and slots {tuple(slots.shape)}"
        raise ValueError(f"{shapes} must be {tuple(k.shape)}, ({N},) and ({N},)")
    fits = keys.dim() == 4 and keys.shape[1::2] == (Hkv, Dh) and keys.shape == values.shape
    if not (fits and keys.is_contiguous() and values.is_contiguous()):
        shapes = f"keys {tuple(keys.shape)} and values {tuple(values.shape)}"
        raise ValueError(f"{shapes} must be (B, {Hkv}, capacity, {Dh}), contiguous")
    if not use_triton(q):
        return reference_rope_into_cache(q, k, v, cos, sin, keys, values, rows, slots)
    cos, sin, rows, slots = (x.contiguous() for x in (cos, sin, rows, slots))
    q, k, v = contiguous_rows(q, k, v)
    return launch(q, k, cos, sin, keys, v, values, rows, slots)
