"""Rotary positions of queries and keys, and the write of keys and values into the cache.

    y₁ = x₁ cos θ − x₂ sin θ        y₂ = x₂ cos θ + x₁ sin θ         (RoFormer, arXiv:2104.09864 eq. 34)

for the channel pairs (i, i + Dh/2) of every head, Hugging Face's half-split layout, with the angle θ of a token's
position and the pair's frequency. A rotation's gradient is the rotation by −θ: backward is the same kernel with another
SIGN, and nothing but cos and sin is kept for it.

What it saves: memory-bound. One launch reads q and k once and writes them once, 2 N (H + Hkv) Dh elements; plain
operations move about nine times the bytes, since cos and sin promote every product to fp32. Floor at N = 8,192,
H = 16, Hkv = 2, Dh = 128 in bf16 and 3.35 TB/s: 75 MB, 23 µs. The tables (4 Dh bytes a token) are read once for all
heads, because one program takes all heads of one token.

With a cache, the same launch stores a token's rotated key and its value straight into their slots, instead of a rotated
copy, an index computation and two scattered copies: 2 N (H + 2 Hkv) Dh elements. In decoding, when N is a few dozen,
the bytes are nothing and it is the launches that count: one a layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import first_order, jit, tl, use_triton


def reference_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel pairs (i, i + Dh/2) of x (B, T, heads, Dh) by their angles, by plain operations."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


def real_tokens(position_ids: Tensor, new_lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return row, column and slot (N,) of every token of position_ids (B, T) that is not padding."""
    columns = torch.arange(position_ids.shape[1], device=position_ids.device)
    rows, columns = (columns < new_lengths[:, None]).nonzero(as_tuple=True)
    return rows, columns, position_ids[rows, columns]


def reference_rope_into_cache(q, k, v, cos, sin, keys, values, position_ids, new_lengths, real=None) -> Tensor:
    """Do what `rope_into_cache` does, by plain operations."""
    rows, columns, slots = real or real_tokens(position_ids, new_lengths)
    q, k = reference_rope(torch.cat((q, k), 2), cos, sin).split((q.shape[2], k.shape[2]), 2)  # one turn for both
    keys[rows, :, slots] = k[rows, columns]
    values[rows, :, slots] = v[rows, columns]
    return q


# -------------------------------------------------------------------------------------------------------------- kernel


@jit()
def turn(x, x_at, out, out_at, c, s, load, store, HALF: tl.constexpr):
    """Turn the heads of one token, whose first channels lie at x + x_at, into out + out_at."""
    x1 = tl.load(x + x_at, mask=load, other=0.0).to(tl.float32)
    x2 = tl.load(x + x_at + HALF, mask=load, other=0.0).to(tl.float32)
    tl.store(out + out_at, (x1 * c - x2 * s).to(out.dtype.element_ty), mask=store)
    tl.store(out + out_at + HALF, (x2 * c + x1 * s).to(out.dtype.element_ty), mask=store)


@jit(do_not_specialize=("T", "capacity"))
def rope_kernel(
    q,  # (B, T, H, 2 HALF)
    k,  # (B, T, HKV, 2 HALF)
    v,  # (B, T, HKV, 2 HALF), or None without a cache, as are those marked *
    cos,  # (B, T, HALF) fp32
    sin,  # (B, T, HALF) fp32
    q_out,  # out, as q
    k_out,  # out: as k, or the cache's keys (B, HKV, capacity, 2 HALF)
    v_out,  # * out: the cache's values
    position_ids,  # * (B, T) int64
    new_lengths,  # * (B,) int64
    T,
    capacity,
    CACHED: tl.constexpr,
    SIGN: tl.constexpr,  # 1, or −1 to turn back
    H: tl.constexpr,
    HKV: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,  # H, HKV and HALF, rounded up to powers of 2
    KV_HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Turn all heads of token `program_id` of the B * T."""
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, PAIRS)[None, :]
    c = tl.load(cos + token * HALF + pair, mask=pair < HALF, other=0.0)
    s = tl.load(sin + token * HALF + pair, mask=pair < HALF, other=0.0) * SIGN

    head = tl.arange(0, HEADS)[:, None]
    inside = (head < H) & (pair < HALF)
    at = (token * H + head) * (2 * HALF) + pair
    turn(q, at, q_out, at, c, s, inside, inside, HALF)

    head = tl.arange(0, KV_HEADS)[:, None]
    inside = (head < HKV) & (pair < HALF)
    at = (token * HKV + head) * (2 * HALF) + pair
    if CACHED:
        row = token // T
        slot = tl.load(position_ids + token)
        # a padding column's slot may be another token's later, or lie past the row's end: it stores nothing
        real = (token - row * T < tl.load(new_lengths + row)) & (slot >= 0) & (slot < capacity)
        slot_at = ((row * HKV + head) * capacity + slot) * (2 * HALF) + pair
        turn(k, at, k_out, slot_at, c, s, inside, inside & real, HALF)
        v1 = tl.load(v + at, mask=inside & real, other=0.0)
        v2 = tl.load(v + at + HALF, mask=inside & real, other=0.0)
        tl.store(v_out + slot_at, v1, mask=inside & real)
        tl.store(v_out + slot_at + HALF, v2, mask=inside & real)
    else:
        turn(k, at, k_out, at, c, s, inside, inside, HALF)


# ------------------------------------------------------------------------------------------------------------ launchers


def tile(H: int, Hkv: int, Dh: int) -> dict[str, int]:
    """Choose the tile of one token: 8 channel pairs of q a thread, two 16-byte loads in bf16.

    >>> tile(14, 2, 64)["num_warps"], tile(28, 4, 128)["num_warps"]
    (2, 8)
    """
    HEADS, KV_HEADS, PAIRS = (1 << (size - 1).bit_length() for size in (H, Hkv, Dh // 2))
    sizes = dict(H=H, HKV=Hkv, HALF=Dh // 2, HEADS=HEADS, KV_HEADS=KV_HEADS, PAIRS=PAIRS)
    return sizes | dict(num_warps=min(8, max(1, HEADS * PAIRS // 256)))


def launch(q, k, cos, sin, k_out, v=None, v_out=None, position_ids=None, new_lengths=None, *, sign: int = 1) -> Tensor:
    """Run the kernel on contiguous tensors; return the turned q."""
    (B, T, H, Dh), Hkv, q_out = q.shape, k.shape[2], torch.empty_like(q)
    rope_kernel[(B * T,)](
        q, k, v, cos, sin, q_out, k_out, v_out, position_ids, new_lengths, T, k_out.shape[2],
        CACHED=v is not None, SIGN=sign, **tile(H, Hkv, Dh),
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
    """Raise ValueError unless q is (B, T, H, Dh), k (B, T, Hkv, Dh), and cos and sin are (B, T, 1, Dh/2) fp32."""
    B, T, _, Dh = q.shape
    if k.dim() != 4 or k.shape[:2] != (B, T) or k.shape[3] != Dh or Dh % 2:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} must be (B, T, H, Dh), (B, T, Hkv, Dh), Dh even")
    if cos.shape != (B, T, 1, Dh // 2) or sin.shape != cos.shape:
        raise ValueError(f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must be {(B, T, 1, Dh // 2)}")


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return q (B, T, H, Dh) and k (B, T, Hkv, Dh), turned; differentiable in both.

    cos and sin (B, T, 1, Dh/2) fp32 are those of each token's angles. Products in fp32, rounded once. Raises ValueError
    for other shapes.

    >>> q = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    >>> [x.tolist() for x in rope(q, 2 * q, torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1))]  # a quarter turn
    [[[[[0.0, 1.0]]]], [[[[0.0, 2.0]]]]]
    """
    check(q, k, cos, sin)
    if not use_triton(q):
        return reference_rope(q, cos, sin), reference_rope(k, cos, sin)
    return RopeFunction.apply(q.contiguous(), k.contiguous(), cos.contiguous(), sin.contiguous())


def rope_into_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    position_ids: Tensor,
    new_lengths: Tensor,
    real: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Return q, turned; store k, turned, and v in the cache. For inference: nothing is differentiable.

    Args:
        q, k, v: (B, T, H, Dh), (B, T, Hkv, Dh) and (B, T, Hkv, Dh).
        cos, sin: (B, T, 1, Dh/2) fp32.
        keys, values: (B, Hkv, capacity, Dh), contiguous; written in place.
        position_ids: (B, T) long, the slot of each token.
        new_lengths: (B,) long; the columns of row b from new_lengths[b] on are padding, of which nothing is stored.
        real: `real_tokens(position_ids, new_lengths)`, which the torch path needs in every layer; the kernel does not.
    Raises:
        ValueError: shapes that do not fit, or a cache that is not contiguous.
    """
    check(q, k, cos, sin)
    (B, T, Hkv, Dh), rows = k.shape, keys.shape[0:2] + keys.shape[3:]
    if v.shape != k.shape or keys.shape != values.shape or rows != (B, Hkv, Dh):
        shapes = f"v {tuple(v.shape)}, keys {tuple(keys.shape)} and values {tuple(values.shape)}"
        raise ValueError(f"{shapes} must be (B, T, Hkv, Dh) and (B, Hkv, capacity, Dh) twice; k is {tuple(k.shape)}")
    if position_ids.shape != (B, T) or new_lengths.shape != (B,):
        shapes = f"position_ids {tuple(position_ids.shape)} and new_lengths {tuple(new_lengths.shape)}"
        raise ValueError(f"{shapes} must be {(B, T)} and {(B,)}")
    if not use_triton(q):
        return reference_rope_into_cache(q, k, v, cos, sin, keys, values, position_ids, new_lengths, real)
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError("keys and values must be contiguous: they are written in place")
    contiguous = (x.contiguous() for x in (q, k, cos, sin))
    return launch(*contiguous, keys, v.contiguous(), values, position_ids.contiguous(), new_lengths.contiguous())
