"""Attention of one new query per row over its cached keys and values: split-KV decoding, with a prefix shared by rows.

    o = Σⱼ pⱼ vⱼ      pⱼ = softmaxⱼ(q·kⱼ / √Dh)      over the prefix's tokens, then the row's own

A softmax is computed in pieces: a range of keys gives m = max z, s = Σ exp(z − m) and o = Σ exp(z − m) v, and pieces
merge by their log-sum-exp (flash-decoding; arXiv:1805.02867 for the running form):

    M = maxᵢ mᵢ      o = Σᵢ exp(mᵢ − M) oᵢ / Σᵢ exp(mᵢ − M) sᵢ

One program takes one piece: a cache row, a KV head and a split of the row's keys. It reads K and V once for all queries
that want them, M at a time: the G = H/Hkv heads of the group, times the n candidates where the row is a shared prefix.
A row's keys are cut evenly into `splits`, a number that fills the GPU and comes from shapes alone; where a split lies
follows from the row's length, read on the device. So no step waits for the host, and a CUDA graph can hold it.

What it saves: memory-bound. Each K and V is read once: 2 S Hkv Dh elements a row, and q and o; an attention that
repeats the KV heads reads H/Hkv times that. Floor: these bytes at copy bandwidth. Qwen-2.5 3B in bf16, 64 rows of 1,024
tokens: 67 MB a layer, 20 µs at 3.35 TB/s. Arithmetic, 4 FLOP per key, channel and query, is G FLOP a byte: it hides.
With a prefix of P tokens shared by n candidates, P is read once instead of n times, and stored once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import INTERPRETED, LOWEST, jit, tl, use_triton
from kernels.prefix import Prefix

TILE = dict(BLOCK=32, num_warps=4, num_stages=4)  # keys a step: at Dh 128 K and V are 16 KiB, three steps in flight
FP32_TILE = dict(BLOCK=32, num_warps=4, num_stages=2)
QUERIES, FP32_QUERIES = 64, 16  # most queries a program holds: their sums and scores live in registers
MERGE = dict(CHUNK=16, num_warps=4)
PROGRAMS_PER_SM = 4  # that many fit an H100: 54 KiB of shared memory each, at Dh 128


def reference_decode(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, prefix: Prefix | None = None) -> Tensor:
    """Return what `decode_attention` returns, row by row."""
    out = torch.zeros_like(q)
    for r, own in enumerate(lengths.tolist()):
        k, v = keys[r, :, :own], values[r, :, :own]
        if prefix:
            owner = int(prefix.place[r]) // prefix.members.shape[1]
            shared = int(prefix.lengths[owner])
            k = torch.cat((prefix.keys[owner, :, :shared], k), 1)
            v = torch.cat((prefix.values[owner, :, :shared], v), 1)
        Hkv, S, Dh = k.shape
        if S:
            z = q[r].view(Hkv, -1, Dh) @ k.mT / Dh**0.5  # (Hkv, G, S)
            out[r] = (z.softmax(-1) @ v).view(-1, Dh)
    return out


# ------------------------------------------------------------------------------------------------------------- kernels


@jit(do_not_specialize=("S", "splits", "first_split", "all_splits", "key_row", "key_head", "value_row", "value_head"))
def decode_kernel(
    q, keys, values, lengths, members, sums, stats, S, splits, first_split, all_splits,
    key_row, key_head, value_row, value_head, scale,
    HKV: tl.constexpr, G: tl.constexpr, N: tl.constexpr, DH: tl.constexpr, M: tl.constexpr, DIM: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Attend with queries [block * M, ...) of the N * G of row `program_id` 0 to one split of the row's keys.

    q (R, H, DH); keys, values (rows, HKV, S, DH), strides in tokens: times DH, they are known to be aligned; members
    (rows, N), or None: row r's only query is r. Out, from first_split on: sums (R, H, all_splits, DH), stats (…, 2).
    DIM is DH rounded up to a power of 2.
    """
    row = tl.program_id(0).to(tl.int64)
    head, block = tl.program_id(1) % HKV, tl.program_id(1) // HKV
    split = tl.program_id(2)
    query = block * M + tl.arange(0, M)  # candidate query // G, head query % G of the group
    real = query < N * G
    member = row + query * 0
    if members is not None:
        member = tl.load(members + row * N + query // G, mask=real, other=-1)
        real = member >= 0
    at = member * (HKV * G) + head * G + query % G  # (M,) int64: its place among R * H

    length = tl.minimum(tl.load(lengths + row), S).to(tl.int32)
    size = tl.cdiv(tl.cdiv(length, splits), BLOCK) * BLOCK
    start, stop = split * size, tl.minimum(split * size + size, length)
    stats += (at * all_splits + first_split + split) * 2
    if start >= length:
        tl.store(stats, tl.full([M], float("-inf"), tl.float32), mask=real)
        tl.store(stats + 1, tl.zeros([M], tl.float32), mask=real)
        return

    dim, offset = tl.arange(0, DIM), tl.arange(0, BLOCK)
    x = tl.load(q + at[:, None] * DH + dim[None, :], mask=real[:, None] & (dim < DH)[None, :], other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    tile = offset[:, None] * DH + dim[None, :]
    keys += (row * key_row + head * key_head) * DH + tile
    values += (row * value_row + head * value_head) * DH + tile
    m = tl.full([M], float("-inf"), tl.float32)
    s = tl.zeros([M], tl.float32)
    o = tl.zeros([M, DIM], tl.float32)
    for first in range(start, stop, BLOCK):
        seen = first + offset < stop
        inside = seen[:, None] & (dim < DH)[None, :]  # what lies beyond a row's length may be NaN, and 0 * NaN is NaN
        k = tl.load(keys + first * DH, mask=inside, other=0.0)
        v = tl.load(values + first * DH, mask=inside, other=0.0)
        if UPCAST:
            k, v = k.to(tl.float32), v.to(tl.float32)
        z = tl.where(seen[None, :], tl.dot(x, tl.trans(k), input_precision="ieee") * scale, float("-inf"))
        m_new = tl.maximum(m, tl.max(z, 1))
        p = tl.exp(z - m_new[:, None])
        shrink = tl.exp(m - m_new)
        s = s * shrink + tl.sum(p, 1)
        o = o * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        m = m_new
    tl.store(stats, m, mask=real)
    tl.store(stats + 1, s, mask=real)
    sums += (at[:, None] * all_splits + first_split + split) * DH + dim[None, :]
    tl.store(sums, o, mask=real[:, None] & (dim < DH)[None, :])


@jit(do_not_specialize=("all_splits",))
def merge_splits_kernel(sums, stats, out, all_splits, DH: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr):
    """Merge the splits of query `program_id` of the R * H into out (R, H, DH); without any key it is 0."""
    query = tl.program_id(0).to(tl.int64)
    dim, part = tl.arange(0, DIM), tl.arange(0, CHUNK)
    sums += query * all_splits * DH + part[:, None] * DH + dim[None, :]
    stats += (query * all_splits + part) * 2
    m, s = -1e30, 0.0  # finite: −∞ − −∞ is NaN
    o = tl.zeros([DIM], tl.float32)
    for first in range(0, all_splits, CHUNK):
        inside = first + part < all_splits
        m_part = tl.load(stats + first * 2, mask=inside, other=float("-inf"))
        s_part = tl.load(stats + first * 2 + 1, mask=inside, other=0.0)
        filled = (s_part > 0)[:, None] & (dim < DH)[None, :]  # an empty split wrote no sums
        o_part = tl.load(sums + first * DH, mask=filled, other=0.0)
        m_new = tl.maximum(m, tl.max(m_part, 0))
        weight = tl.exp(m_part - m_new)
        shrink = tl.exp(m - m_new)
        s = s * shrink + tl.sum(weight * s_part, 0)
        o = o * shrink + tl.sum(weight[:, None] * o_part, 0)
        m = m_new
    o = o / tl.where(s > 0, s, 1.0)
    tl.store(out + query * DH + dim, o.to(out.dtype.element_ty), mask=dim < DH)


def split_count(programs: int, S: int, block: int, device: torch.device) -> int:
    """Choose into how many splits S slots are cut, so that so many programs, times the splits, fill the GPU."""
    cuda = device.type == "cuda"
    wanted = PROGRAMS_PER_SM * (torch.cuda.get_device_properties(device).multi_processor_count if cuda else 4)
    return max(1, min(-(-wanted // programs), -(-S // block)))


def launch(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, prefix: Prefix | None) -> Tensor:
    """Attend to the prefix, then to the rows' own keys, and merge."""
    (R, H, Dh), Hkv = q.shape, keys.shape[1]
    G, DIM = H // Hkv, max(16, 1 << (Dh - 1).bit_length())
    tile, most = (FP32_TILE, FP32_QUERIES) if q.dtype == torch.float32 else (TILE, QUERIES)
    parts, all_splits = [], 0
    for cache in ([prefix] if prefix else []) + [Prefix(keys, values, lengths, None, None)]:
        rows, S = len(cache.lengths), cache.keys.shape[2]
        n = 1 if cache.members is None else cache.members.shape[1]
        M = min(most, max(16, 1 << (n * G - 1).bit_length()))
        blocks = -(-n * G // M)
        splits = split_count(rows * Hkv * blocks, S, tile["BLOCK"], q.device)
        parts.append((cache, n, M, (rows, Hkv * blocks, splits), all_splits))
        all_splits += splits
    sums = torch.empty(R, H, all_splits, Dh, dtype=torch.float32, device=q.device)
    stats = torch.empty(R, H, all_splits, 2, dtype=torch.float32, device=q.device)
    for (k, v, cached, members, _), n, M, grid, first_split in parts:
        decode_kernel[grid](
            q, k, v, cached, members, sums, stats, k.shape[2], grid[2], first_split, all_splits,
            *(stride // Dh for x in (k, v) for stride in x.stride()[:2]),
            Dh**-0.5, Hkv, G, n, Dh, M, DIM, INTERPRETED, **tile,
        )  # fmt: skip
    out = torch.empty_like(q)
    merge_splits_kernel[(R * H,)](sums, stats, out, all_splits, Dh, DIM, **MERGE)
    return out


# ------------------------------------------------------------------------------------------------- the public function


def check(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, rows: int) -> None:
    """Raise ValueError unless keys and values are (rows, Hkv, S, Dh), tokens contiguous, and lengths (rows,) long."""
    if keys.dim() != 4 or keys.shape != values.shape or keys.shape[0] != rows or keys.shape[3] != q.shape[2]:
        raise ValueError(f"keys {[*keys.shape]}, values {[*values.shape]} must be ({rows}, Hkv, S, {q.shape[2]}) both")
    if not q.dtype == keys.dtype == values.dtype:
        raise ValueError(f"q is {q.dtype}, keys {keys.dtype}, values {values.dtype}; they must be of one dtype")
    if q.shape[1] % keys.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads must be a multiple of the {keys.shape[1]} KV heads")
    if lengths.shape != (rows,) or lengths.dtype != torch.long:
        raise ValueError(f"lengths is {tuple(lengths.shape)} {lengths.dtype}; it must be ({rows},) long")
    if keys.shape[2] and any(x.stride()[2:] != (keys.shape[3], 1) for x in (keys, values)):
        raise ValueError("keys and values must hold a row's tokens one after another: give views of slots [:S] only")


def decode_attention(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, prefix: Prefix | None = None) -> Tensor:
    """Return softmax(q·k/√Dh)·v of one query per row over its prefix and its own keys, (R, H, Dh). Inference only.

    Args:
        q: (R, H, Dh), the new token's queries.
        keys, values: (R, Hkv, S, Dh), or views of the first S slots of a longer cache; slots from a row's length on
            are never read by the kernel, and must be finite on the torch path.
        lengths: (R,) long, tokens to attend to, the new one included, at most S.
        prefix: B rows that up to n of the R share, and attend to before their own keys.
    Raises:
        ValueError: shapes that do not fit.

    >>> values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]]).view(1, 1, 3, 2)
    >>> decode_attention(torch.zeros(1, 2, 2), torch.zeros(1, 1, 3, 2), values, torch.tensor([2]))  # two heads
    tensor([[[2., 3.],
             [2., 3.]]])
    """
    if q.dim() != 3 or not len(q):
        raise ValueError(f"q must be (R, H, Dh) with R > 0, got {tuple(q.shape)}")
    R = len(q)
    check(q, keys, values, lengths, rows=R)
    if prefix:
        B = len(prefix.lengths)
        check(q, *prefix[:3], rows=B)
        if prefix.keys.shape[1] != keys.shape[1] or len(prefix.members) != B or prefix.place.shape != (R,):
            raise ValueError(f"{B} prefixes of {prefix.keys.shape[1]} KV heads for {R} rows of {keys.shape[1]}")
    if use_triton(q):
        shared = prefix and prefix._replace(lengths=prefix.lengths.contiguous(), members=prefix.members.contiguous())
        return launch(q.contiguous(), keys, values, lengths.contiguous(), shared)
    own = torch.arange(keys.shape[2], device=q.device) < lengths.view(R, 1, 1, 1)  # (R, 1, 1, S)
    grouped = q.reshape(R, keys.shape[1], -1, q.shape[2])  # a group's queries become query rows: K and V are read once
    if prefix is None:
        return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=own).view(q.shape)
    shared = torch.arange(prefix.keys.shape[2], device=q.device) < prefix.lengths.view(B, 1, 1, 1)
    gathered = grouped[prefix.members.clamp(0)].transpose(1, 2).flatten(2, 3)  # (B, Hkv, n * G, Dh)
    parts = [piece(grouped, keys, values, own), piece(gathered, prefix.keys, prefix.values, shared)]
    n, G = prefix.members.shape[1], grouped.shape[2]
    parts[1] = [x.unflatten(2, (n, G)).transpose(1, 2).flatten(0, 1)[prefix.place] for x in parts[1]]
    (m, s, o), (m_shared, s_shared, o_shared) = parts
    highest = torch.maximum(m, m_shared)
    weight, weight_shared = (m - highest).exp(), (m_shared - highest).exp()
    total = weight * s + weight_shared * s_shared
    return ((weight * o + weight_shared * o_shared) / total.masked_fill_(total == 0, 1)).view(q.shape)


def piece(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> list[Tensor]:
    """Return m, s (..., 1) and o (..., Dh) of the queries over some of their keys; nothing to see gives s = 0."""
    z = (q @ keys.mT).mul_(q.shape[-1] ** -0.5).masked_fill_(~mask, -torch.inf)
    m = z.amax(-1, keepdim=True).clamp(min=LOWEST) if z.shape[-1] else q.new_full((*q.shape[:-1], 1), LOWEST)
    weights = z.sub_(m).exp_()
    return [m, weights.sum(-1, keepdim=True), weights @ values]
