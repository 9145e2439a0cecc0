"""Attention of one new query per candidate over its row of the KV cache: split-KV decoding, a prompt shared by all n.

    o = Σᵢ pᵢ vᵢ      pᵢ = softmaxᵢ(q·kᵢ / √Dh)      over the slots i that candidate c of row b sees:

    i < lengths[b]   and   (i < prompt[b]   or   (i − prompt[b]) mod n = c)      (rows.py)

A softmax is computed in pieces: a range of keys gives m = max z, s = Σ exp(z − m) and o = Σ exp(z − m) v, and pieces
merge by their log-sum-exp (flash-decoding; arXiv:1805.02867 for the running form):

    M = maxᵢ mᵢ      o = Σᵢ exp(mᵢ − M) oᵢ / Σᵢ exp(mᵢ − M) sᵢ

One program takes one piece: a cache row, a KV head and a split of the row's slots. It reads K and V once for all
queries that want them, M at a time: the G = H/Hkv heads of the group, times the row's n candidates. A row's slots are
cut evenly into `splits`, a number that fills the GPU and comes from shapes alone; where a split lies follows from the
row's length, and who runs from `members`, both read on the device. So no step waits for the host, and a CUDA graph can
hold it.

What it saves: memory-bound. Each K and V is read once: 2 S Hkv Dh elements a row of S slots, and q and o. An attention
that repeats the KV heads reads H/Hkv times that; one with a row per candidate reads (and stores) the prompt n times. At
n = 4, 1,792 tokens of prompt and 256 of each candidate, S = 2,816 slots replace 8,192. Floor: these bytes at copy
bandwidth. Qwen-2.5 3B in bf16, 64 rows of 1,024 slots: 67 MB a layer, 20 µs at 3.35 TB/s. Arithmetic: 4 FLOP per slot,
channel and query are n G FLOP a byte, a tenth of what tensor cores could do at n = 4: it hides. So does what is wasted:
every candidate multiplies with the slots of all n and masks those of the others, whose bytes are needed anyway.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import INTERPRETED, jit, tl, use_triton
from kernels.rows import Rows

TILE = dict(BLOCK=32, num_warps=4, num_stages=4)  # slots a step: at Dh 128 K and V are 16 KiB, three steps in flight
FP32_TILE = dict(BLOCK=32, num_warps=4, num_stages=2)
QUERIES, FP32_QUERIES = 64, 16  # most queries a program holds: their sums and scores live in registers
MERGE = dict(CHUNK=16, num_warps=4)
PROGRAMS_PER_SM = {16: 4, 32: 3, 64: 2}  # of so many queries: at Dh 128 an H100 has memory and registers for no more


def reference_decode(q: Tensor, keys: Tensor, values: Tensor, rows: Rows) -> Tensor:
    """Return what `decode_attention` returns, query by query."""
    out, n = torch.zeros_like(q), rows.members.shape[1]
    for r, place in enumerate(rows.place.tolist()):
        row, candidate = divmod(place, n)
        prompt, used = int(rows.prompt[row]), int(rows.lengths[row])
        seen = [slot for slot in range(used) if slot < prompt or (slot - prompt) % n == candidate]
        if place >= 0 and seen:
            k, v = keys[row, :, seen], values[row, :, seen]  # (Hkv, S, Dh)
            z = q[r].view(len(k), -1, q.shape[2]) @ k.mT / q.shape[2] ** 0.5  # (Hkv, G, S)
            out[r] = (z.softmax(-1) @ v).view(-1, q.shape[2])
    return out


# ------------------------------------------------------------------------------------------------------------- kernels


@jit(do_not_specialize=("capacity", "splits"))
def decode_kernel(
    q, keys, values, prompt, lengths, members, sums, stats, capacity, splits, scale,
    HKV: tl.constexpr, G: tl.constexpr, CANDIDATES: tl.constexpr, DH: tl.constexpr, M: tl.constexpr, DIM: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Attend with queries [block * M, ...) of the CANDIDATES * G of row `program_id` 0 to one split of the row's slots.

    q (R, H, DH); keys, values (B, HKV, capacity, DH); prompt, lengths (B,); members (B, CANDIDATES). Out, of running
    candidates only: sums (R, H, splits, DH), unless the split is empty, and stats (R, H, splits, 2). DIM is DH rounded
    up to a power of 2.
    """
    row = tl.program_id(0).to(tl.int64)
    head, block = tl.program_id(1) % HKV, tl.program_id(1) // HKV
    split = tl.program_id(2)
    query = block * M + tl.arange(0, M)  # candidate query // G, head query % G of the group
    member = tl.load(members + row * CANDIDATES + query // G, mask=query < CANDIDATES * G, other=-1).to(tl.int32)
    if tl.max(member, 0) < 0:
        return
    real = member >= 0
    which = member * (HKV * G) + head * G + query % G  # (M,) of the R * H
    at = which.to(tl.int64) * splits + split

    length = tl.minimum(tl.load(lengths + row), capacity).to(tl.int32)
    size = tl.cdiv(tl.cdiv(length, splits), BLOCK) * BLOCK
    start, stop = split * size, tl.minimum(split * size + size, length)
    m = tl.full([M], -1e30, tl.float32)  # finite: −∞ − −∞ is NaN
    s = tl.zeros([M], tl.float32)
    if start >= length:
        tl.store(stats + at * 2, m, mask=real)
        tl.store(stats + at * 2 + 1, s, mask=real)
        return

    dim, offset = tl.arange(0, DIM), tl.arange(0, BLOCK)
    q += which.to(tl.int64)[:, None] * DH + dim[None, :]
    x = tl.load(q, mask=real[:, None] & (dim < DH)[None, :], other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    tile = (row * HKV + head) * capacity * DH + offset[:, None] * DH + dim[None, :]
    keys += tile
    values += tile
    shared = tl.load(prompt + row).to(tl.int32)
    o = tl.zeros([M, DIM], tl.float32)
    for first in range(start, stop, BLOCK):
        slot = first + offset
        inside = (slot < stop)[:, None] & (dim < DH)[None, :]  # beyond a row's length may lie NaN, and 0 * NaN is NaN
        k = tl.load(keys + first * DH, mask=inside, other=0.0)
        v = tl.load(values + first * DH, mask=inside, other=0.0)
        if UPCAST:
            k, v = k.to(tl.float32), v.to(tl.float32)
        seen = (slot < stop)[None, :]
        if CANDIDATES > 1:
            own = (slot - shared) % CANDIDATES
            seen &= (slot < shared)[None, :] | (own[None, :] == (query // G)[:, None])
        z = tl.where(seen, tl.dot(x, tl.trans(k), input_precision="ieee") * scale, float("-inf"))
        m_new = tl.maximum(m, tl.max(z, 1))
        p = tl.exp(z - m_new[:, None])
        shrink = tl.exp(m - m_new)
        s = s * shrink + tl.sum(p, 1)
        o = o * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        m = m_new
    tl.store(stats + at * 2, m, mask=real)
    tl.store(stats + at * 2 + 1, s, mask=real)
    tl.store(sums + at[:, None] * DH + dim[None, :], o, mask=real[:, None] & (dim < DH)[None, :])


@jit(do_not_specialize=("splits",))
def merge_splits_kernel(
    sums, stats, place, out, splits, H: tl.constexpr, DH: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr
):
    """Merge the splits of query `program_id` of the R * H into out (R, H, DH); padding's is 0, as without a key."""
    query = tl.program_id(0).to(tl.int64)
    real = tl.load(place + query // H) >= 0  # nobody wrote the sums of padding
    dim, part = tl.arange(0, DIM), tl.arange(0, CHUNK)
    sums += query * splits * DH + part[:, None] * DH + dim[None, :]
    stats += (query * splits + part) * 2
    m, s = -1e30, 0.0
    o = tl.zeros([DIM], tl.float32)
    for first in range(0, splits, CHUNK):
        inside = (first + part < splits) & real
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


def split_count(programs: int, per_sm: int, S: int, block: int, device: torch.device) -> int:
    """Choose into how many splits S slots are cut: so many programs, times the splits, fill the GPU once."""
    sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
    return max(1, min(per_sm * sms // programs, -(-S // block)))


def launch(q: Tensor, keys: Tensor, values: Tensor, rows: Rows) -> Tensor:
    """Attend by splits, and merge them."""
    (R, H, Dh), (B, Hkv, capacity, _), n = q.shape, keys.shape, rows.members.shape[1]
    G, DIM = H // Hkv, max(16, 1 << (Dh - 1).bit_length())
    tile, most = (FP32_TILE, FP32_QUERIES) if q.dtype == torch.float32 else (TILE, QUERIES)
    M = min(most, max(16, 1 << (n * G - 1).bit_length()))
    heads = Hkv * -(-n * G // M)  # times the blocks of queries
    busy = min(B, -(-R // n))  # rows, if all their candidates run
    splits = split_count(busy * heads, PROGRAMS_PER_SM[M], capacity, tile["BLOCK"], q.device)
    sums = torch.empty(R, H, splits, Dh, dtype=torch.float32, device=q.device)
    stats = torch.empty(R, H, splits, 2, dtype=torch.float32, device=q.device)
    prompt, lengths, members, place = (x.contiguous() for x in (rows.prompt, rows.lengths, rows.members, rows.place))
    decode_kernel[B, heads, splits](
        q, keys, values, prompt, lengths, members, sums, stats, capacity, splits, Dh**-0.5,
        Hkv, G, n, Dh, M, DIM, INTERPRETED, **tile,
    )  # fmt: skip
    out = torch.empty_like(q)
    merge_splits_kernel[(R * H,)](sums, stats, place, out, splits, H, Dh, DIM, **MERGE)
    return out


# ------------------------------------------------------------------------------------ the torch path, public function


def attend_rows(q: Tensor, keys: Tensor, values: Tensor, rows: Rows) -> Tensor:
    """Attend on the torch path, by the calls that `Rows.reads` lists."""
    (R, H, Dh), Hkv, reads = q.shape, keys.shape[1], rows.reads
    G, B = H // Hkv, len(keys[reads[0].rows])  # B: rows of each call
    x = q.view(B, -1, Hkv, G, Dh).transpose(1, 2).reshape(B, Hkv, -1, Dh)  # a group's queries become query rows
    found = []
    for (_, held, used, mask), own in zip(reads, x.split([G * read.queries for read in reads], 2), strict=True):
        if mask is not None:
            mask = (mask if G == 1 else mask.repeat_interleave(G, 2)).to(q.dtype)
        k, v = keys[held, :, :used], values[held, :, :used]  # (B, Hkv, used, Dh)
        found.append(F.scaled_dot_product_attention(own, k, v, mask) if used else torch.zeros_like(own))
    return torch.cat(found, 2).view(B, Hkv, -1, G, Dh).transpose(1, 2).reshape(R, H, Dh)


def decode_attention(q: Tensor, keys: Tensor, values: Tensor, rows: Rows) -> Tensor:
    """Return softmax(q·k/√Dh)·v of one query per running candidate over the slots that it sees, (R, H, Dh).

    Inference only.

    Args:
        q: (R, H, Dh), the new tokens' queries.
        keys, values: (B, Hkv, capacity, Dh), contiguous; a row's slots below its length must be finite, whoever sees
            them, and on the torch path all.
        rows: who sees which slots.
    Raises:
        ValueError: shapes that do not fit, or a cache that is not contiguous.

    >>> values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]]).view(1, 1, 3, 2)
    >>> rows = Rows(torch.tensor([1]), torch.tensor([3]), torch.tensor([[0, -1]]), torch.tensor([0]))
    >>> decode_attention(torch.zeros(1, 1, 2), torch.zeros(1, 1, 3, 2), values, rows)  # candidate 0: slots 0 and 1
    tensor([[[2., 3.]]])
    """
    if q.dim() != 3 or not len(q) or rows.place.shape != (len(q),):
        raise ValueError(f"q must be (R, H, Dh) with R > 0, got {tuple(q.shape)} for {len(rows.place)} candidates")
    if keys.dim() != 4 or keys.shape != values.shape or keys.shape[3] != q.shape[2]:
        shapes = f"keys {tuple(keys.shape)} and values {tuple(values.shape)}"
        raise ValueError(f"{shapes} must both be (B, Hkv, capacity, {q.shape[2]})")
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError("keys and values must be contiguous: give the whole cache, and not a part of each row")
    if not q.dtype == keys.dtype == values.dtype:
        raise ValueError(f"q is {q.dtype}, keys {keys.dtype}, values {values.dtype}; they must be of one dtype")
    if q.shape[1] % keys.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads must be a multiple of the {keys.shape[1]} KV heads")
    B = len(keys)
    if rows.members.dim() != 2 or not B == len(rows.prompt) == len(rows.lengths) == len(rows.members):
        raise ValueError(f"{B} cache rows; prompt and lengths must be ({B},), members ({B}, n)")
    if use_triton(q):
        return launch(q.contiguous(), keys, values, rows)
    return attend_rows(q, keys, values, rows)
