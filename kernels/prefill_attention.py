"""Attention of a prefill: the new tokens of many rows of the KV cache, packed one after another, in one launch.

    o = Σᵢ pᵢ vᵢ      pᵢ = softmaxᵢ(q·kᵢ / √Dh)      over the slots i of the token's row, up to the token's own

A row's new tokens are a chunk: they stand in the last of the row's used slots, and see those before them, which hold
tokens of an earlier turn. One program takes a query head and a tile of at most BLOCK_M tokens of one chunk, and runs
over the row's keys with a running softmax (flash attention, arXiv:2205.14135). Slots that all queries of the tile see
come first, without a mask; the last few steps mask. The host lists the tiles once per prefill, those with the most keys
first, so that no long one starts last.

What it saves: a call of attention per chunk and layer, each of which some backends plan anew for each new shape, and a
copy of the keys out of the cache. Floor: compute-bound from a few hundred tokens on, 4 Dh FLOP per query and key that
it sees, at the rate of a bare product; the steps on the diagonal waste half of their products.

Letters: N packed new tokens, H query heads, Hkv KV heads, G = H/Hkv, Dh width of a head, B rows of the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from kernels.backend import INTERPRETED, jit, send, tl, use_triton
from kernels.rows import check_cache

TILE = dict(BLOCK_M=128, BLOCK_N=32, num_warps=8, num_stages=3)  # 64 keys a step would spill on an A100 at Dh 128
FP32_TILE = dict(BLOCK_M=32, BLOCK_N=32, num_warps=4, num_stages=1)


class Chunk(NamedTuple):
    """Tokens [first, last) of a forward: the new tokens of one cache row, which then has `used` slots in use."""

    row: int
    first: int
    last: int
    used: int


@dataclass(frozen=True)
class Chunks:
    """The chunks of a prefill, in the order of its tokens, and the tiles that the kernel cuts them into."""

    chunks: Sequence[Chunk]
    kept: dict[int, Tensor] = field(default_factory=dict)  # tiles by their size, for all layers

    def cut(self, block: int) -> list[tuple[int, int, int, int]]:
        """Cut chunks into tiles of at most `block` tokens: (row, first token, end of its chunk, first token's slot).

        >>> Chunks([Chunk(3, 0, 5, 9)]).cut(4)
        [(3, 4, 5, 8), (3, 0, 5, 4)]
        """
        tiles = [
            (row, start, last, used - last + start)
            for row, first, last, used in self.chunks
            for start in range(first, last, block)
        ]
        return sorted(tiles, key=lambda tile: -tile[3])

    def tiles(self, block: int, device: torch.device) -> Tensor:
        """Return the tiles on a device, (tiles, 4) int32."""
        if block not in self.kept:
            self.kept[block] = send(self.cut(block), device).int()
        return self.kept[block]


@jit(do_not_specialize=("capacity",))
def prefill_kernel(
    q, keys, values, tiles, out, capacity, scale,
    HKV: tl.constexpr, G: tl.constexpr, DH: tl.constexpr, DIM: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attend with head `program_id` 0 of the queries of tile `program_id` 1 to the slots of its row.

    q, out (N, HKV * G, DH); keys, values (B, HKV, capacity, DH); tiles (…, 4). DIM is DH rounded up to a power of 2.
    """
    head = tl.program_id(0)
    tiles += tl.program_id(1) * 4
    row, first, end, slot = tl.load(tiles), tl.load(tiles + 1), tl.load(tiles + 2), tl.load(tiles + 3)
    query, offset, dim = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, DIM)
    real = (first + query < end)[:, None] & (dim < DH)[None, :]
    at = ((first + query).to(tl.int64) * (HKV * G) + head)[:, None] * DH + dim[None, :]
    x = tl.load(q + at, mask=real, other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    tile = (row.to(tl.int64) * HKV + head // G) * capacity * DH + offset[:, None] * DH + dim[None, :]
    keys += tile
    values += tile
    m = tl.full([BLOCK_M], -1e30, tl.float32)  # finite: −∞ − −∞ is NaN
    s = tl.zeros([BLOCK_M], tl.float32)
    o = tl.zeros([BLOCK_M, DIM], tl.float32)
    stop = slot + tl.minimum(end - first, BLOCK_M)  # behind the slot of the tile's last query
    for start in range(0, stop, BLOCK_N):
        inside = (start + offset < stop)[:, None] & (dim < DH)[None, :]  # what lies behind may be NaN, and 0 * NaN too
        k = tl.load(keys + start * DH, mask=inside, other=0.0)
        v = tl.load(values + start * DH, mask=inside, other=0.0)
        if UPCAST:
            k, v = k.to(tl.float32), v.to(tl.float32)
        z = tl.dot(x, tl.trans(k), input_precision="ieee") * scale
        z = tl.where((start + offset)[None, :] <= (slot + query)[:, None], z, float("-inf"))
        m_new = tl.maximum(m, tl.max(z, 1))
        p = tl.exp(z - m_new[:, None])
        shrink = tl.exp(m - m_new)
        s = s * shrink + tl.sum(p, 1)
        o = o * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        m = m_new
    tl.store(out + at, (o / s[:, None]).to(out.dtype.element_ty), mask=real)


def attend_chunks(q: Tensor, keys: Tensor, values: Tensor, chunks: Sequence[Chunk]) -> Tensor:
    """Attend on the torch path, chunk by chunk."""
    out = torch.empty_like(q)
    for row, first, last, used in chunks:
        seen = keys[row : row + 1, :, :used], values[row : row + 1, :, :used]  # (1, Hkv, S, Dh)
        mask = causal_lower_right(last - first, used)  # the new tokens stand in the last of the S slots
        new = q[None, first:last].transpose(1, 2)  # (1, H, T, Dh)
        out[first:last] = F.scaled_dot_product_attention(new, *seen, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)
    return out


def prefill_attention(q: Tensor, keys: Tensor, values: Tensor, chunks: Chunks) -> Tensor:
    """Return softmax(q·k/√Dh)·v of each new token over its row's slots up to its own, (N, H, Dh). Inference only.

    Args:
        q: (N, H, Dh), the new tokens' queries, chunk after chunk.
        keys, values: (B, Hkv, capacity, Dh), contiguous; the new tokens' own are stored already.
        chunks: which tokens of q continue which row; together they are all of q.
    Raises:
        ValueError: shapes that do not fit, or a cache that is not contiguous.

    >>> values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]]).view(1, 1, 3, 2)
    >>> prefill_attention(torch.zeros(2, 1, 2), torch.zeros(1, 1, 3, 2), values, Chunks([Chunk(0, 0, 2, 2)]))
    tensor([[[1., 2.]],
    <BLANKLINE>
            [[2., 3.]]])
    """
    if q.dim() != 3 or sum(chunk.last - chunk.first for chunk in chunks.chunks) != len(q):
        raise ValueError(f"q must be (N, H, Dh) of all chunks' tokens, got {tuple(q.shape)} for {list(chunks.chunks)}")
    check_cache(q, keys, values)
    if not use_triton(q):
        return attend_chunks(q, keys, values, chunks.chunks)
    tile = FP32_TILE if q.dtype == torch.float32 else TILE
    tiles = chunks.tiles(tile["BLOCK_M"], q.device)
    (_, H, Dh), (_, Hkv, capacity, _) = q.shape, keys.shape
    out, q = torch.empty_like(q, memory_format=torch.contiguous_format), q.contiguous()
    prefill_kernel[H, len(tiles)](
        q, keys, values, tiles, out, capacity, Dh**-0.5,
        Hkv, H // Hkv, Dh, max(16, 1 << (Dh - 1).bit_length()), INTERPRETED, **tile,
    )  # fmt: skip
    return out
