"""Attention of one new query per candidate over its row of the KV cache: split-KV decoding, a prompt shared by all n.

    o = Σᵢ pᵢ vᵢ      pᵢ = softmaxᵢ(q·kᵢ / √Dh)      over the slots i that candidate c of row b sees:

    i < lengths[b]   and   (i < prompt[b]   or   (i − prompt[b]) mod n = c)      (rows.py)

A softmax is computed in pieces: a range of keys gives m = max z, s = Σ exp(z − m) and o = Σ exp(z − m) v, and pieces
merge by their log-sum-exp (flash-decoding; arXiv:1805.02867 for the running form):

    M = maxᵢ mᵢ      o = Σᵢ exp(mᵢ − M) oᵢ / Σᵢ exp(mᵢ − M) sᵢ

One program takes one KV head of one piece: a range of a cache row's slots. It reads K and V once for all queries that
want them, M at a time: the G = H/Hkv heads of the group, times the row's n candidates. The number of pieces P comes
from shapes alone: as many programs as the GPU holds at once. How the rows are cut follows from their lengths and from
who runs, both read on the device: all pieces have one size, the smallest at which there are at most P, so a row gets
pieces as it has slots. A kernel plans that once a step, for all layers. So no step waits for the host, and a CUDA graph
can hold it.

What the plan saves, by arithmetic: a launch ends with its largest piece. 64 rows on 132 SMs at four programs each, two
KV heads: P = 264. Rows of one length: four pieces each, as any even cut has. 56 rows of 200 slots and 8 of 2,000: cut
in four each, the largest piece is 512 slots; here it is 128, in 112 + 128 = 240 pieces. Lengths even from 200 to 2,000:
512 and 320. The plan is one launch of P small programs, about 4 µs of a step. Not measured.

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
from kernels.rows import Rows, check_cache

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


@jit(do_not_specialize=("B", "capacity", "most"))
def plan_kernel(
    lengths, members, pieces, spans, B, capacity, most,
    CANDIDATES: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Cut the rows with running candidates into at most `most` pieces of the smallest size that allows it.

    lengths (B,); members (B, CANDIDATES). Out: pieces (most, 3) int32, row, first slot and slot behind the last, the
    row −1 if there is no such piece; spans (B, 2) int32, each row's first piece and their number. Program `program_id`
    writes down that piece, and the first one the spans. ROWS is B rounded up to a power of 2.
    """
    piece, row = tl.program_id(0), tl.arange(0, ROWS)
    length = tl.minimum(tl.load(lengths + row, mask=row < B, other=0), capacity).to(tl.int32)
    runs = tl.zeros([ROWS], tl.int32)
    for candidate in range(CANDIDATES):
        member = tl.load(members + row * CANDIDATES + candidate, mask=row < B, other=-1)
        runs = tl.where(member >= 0, 1, runs)
    tiles = tl.where(runs > 0, tl.cdiv(length, BLOCK), 0)
    low, high = 1, tl.maximum(tl.max(tiles, 0), 1)  # tiles of a piece, by bisection
    while low < high:
        size = (low + high) // 2
        few = tl.sum(tl.cdiv(tiles, size), 0) <= most
        low, high = tl.where(few, low, size + 1), tl.where(few, size, high)
    count = tl.cdiv(tiles, low)
    ends = tl.cumsum(count, 0)
    if piece == 0:
        tl.store(spans + row * 2, ends - count, mask=row < B)
        tl.store(spans + row * 2 + 1, count, mask=row < B)
    own = (ends - count <= piece) & (piece < ends)  # one row, or none
    start = (piece - tl.sum(tl.where(own, ends - count, 0), 0)) * low * BLOCK
    stop = tl.minimum(start + low * BLOCK, tl.sum(tl.where(own, length, 0), 0))
    tl.store(pieces + piece * 3, tl.max(tl.where(own, row, -1), 0))
    tl.store(pieces + piece * 3 + 1, start)
    tl.store(pieces + piece * 3 + 2, stop)


@jit(do_not_specialize=("capacity",))
def decode_kernel(
    q, keys, values, prompt, members, pieces, sums, stats, capacity, scale,
    HKV: tl.constexpr, G: tl.constexpr, CANDIDATES: tl.constexpr, DH: tl.constexpr, M: tl.constexpr, DIM: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Attend with queries [block * M, ...) of the CANDIDATES * G of a row to piece `program_id` 0, a part of its slots.

    q (R, H, DH); keys, values (B, HKV, capacity, DH); prompt (B,); members (B, CANDIDATES); pieces (P, 3). Out, of
    running candidates only: sums (P, CANDIDATES, H, DH) and stats (P, CANDIDATES, H, 2). DIM is DH rounded up to a
    power of 2.
    """
    piece = tl.program_id(0).to(tl.int64)
    head, block = tl.program_id(1) % HKV, tl.program_id(1) // HKV
    row = tl.load(pieces + piece * 3).to(tl.int64)
    if row < 0:
        return
    query = block * M + tl.arange(0, M)  # candidate query // G, head query % G of the group
    member = tl.load(members + row * CANDIDATES + query // G, mask=query < CANDIDATES * G, other=-1).to(tl.int32)
    if tl.max(member, 0) < 0:
        return
    real = member >= 0
    which = member * (HKV * G) + head * G + query % G  # (M,) of the R * H
    at = (piece * CANDIDATES + query // G) * (HKV * G) + head * G + query % G
    start, stop = tl.load(pieces + piece * 3 + 1), tl.load(pieces + piece * 3 + 2)
    m = tl.full([M], -1e30, tl.float32)  # finite: −∞ − −∞ is NaN
    s = tl.zeros([M], tl.float32)
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


@jit()
def merge_pieces_kernel(
    sums, stats, place, spans, out,
    CANDIDATES: tl.constexpr, H: tl.constexpr, DH: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Merge the pieces of query `program_id` of the R * H into out (R, H, DH); padding's is 0, as without a key."""
    query = tl.program_id(0).to(tl.int64)
    at = tl.load(place + query // H)
    row = tl.maximum(at, 0) // CANDIDATES
    first_piece = tl.load(spans + row * 2).to(tl.int64)
    pieces = tl.where(at >= 0, tl.load(spans + row * 2 + 1), 0)  # nobody wrote the sums of padding
    dim, part = tl.arange(0, DIM), tl.arange(0, CHUNK)
    STEP: tl.constexpr = CANDIDATES * H  # from one piece's sum of a query to the next one's
    first_sum = first_piece * STEP + (tl.maximum(at, 0) % CANDIDATES) * H + query % H
    sums += (first_sum + part * STEP)[:, None] * DH + dim[None, :]
    stats += (first_sum + part * STEP) * 2
    m, s = -1e30, 0.0
    o = tl.zeros([DIM], tl.float32)
    for first in range(0, pieces, CHUNK):
        inside = first + part < pieces
        m_part = tl.load(stats + first * (2 * STEP), mask=inside, other=float("-inf"))
        s_part = tl.load(stats + first * (2 * STEP) + 1, mask=inside, other=0.0)
        o_part = tl.load(sums + first * (STEP * DH), mask=inside[:, None] & (dim < DH)[None, :], other=0.0)
        m_new = tl.maximum(m, tl.max(m_part, 0))
        weight = tl.exp(m_part - m_new)
        shrink = tl.exp(m - m_new)
        s = s * shrink + tl.sum(weight * s_part, 0)
        o = o * shrink + tl.sum(weight[:, None] * o_part, 0)
        m = m_new
    o = o / tl.where(s > 0, s, 1.0)
    tl.store(out + query * DH + dim, o.to(out.dtype.element_ty), mask=dim < DH)


def piece_count(heads: int, per_sm: int, rows: int, device: torch.device) -> int:
    """Choose how many pieces the rows may be cut into: their programs, `heads` each, fill the GPU once.

    Where rows alone nearly do, two for each, so that a long one can be cut. Those sums stay in the L2 cache.
    """
    sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
    return max(per_sm * sms // heads, 2 * rows)


def plan(rows: Rows, most: int, capacity: int, block: int) -> tuple[Tensor, Tensor]:
    """Return the pieces (most, 3) and each row's span of them (B, 2), int32, made once for all layers."""
    if (key := (most, capacity, block)) not in rows.kept:
        B, n = rows.members.shape
        lengths, members = rows.lengths.contiguous(), rows.members.contiguous()
        pieces, spans = (torch.empty(size, dtype=torch.int32, device=lengths.device) for size in ((most, 3), (B, 2)))
        plan_kernel[(most,)](lengths, members, pieces, spans, B, capacity, most, n, block, 1 << (B - 1).bit_length())
        rows.kept[key] = pieces, spans
    return rows.kept[key]


def launch(q: Tensor, keys: Tensor, values: Tensor, rows: Rows) -> Tensor:
    """Attend by pieces, and merge them."""
    (R, H, Dh), (B, Hkv, capacity, _), n = q.shape, keys.shape, rows.members.shape[1]
    G, DIM = H // Hkv, max(16, 1 << (Dh - 1).bit_length())
    tile, most = (FP32_TILE, FP32_QUERIES) if q.dtype == torch.float32 else (TILE, QUERIES)
    M = min(most, max(16, 1 << (n * G - 1).bit_length()))
    heads = Hkv * -(-n * G // M)  # times the blocks of queries
    wanted = piece_count(heads, PROGRAMS_PER_SM[M], min(B, -(-R // n)), q.device)  # rows, if all their candidates run
    most = min(max(wanted, min(B, R)), B * -(-capacity // tile["BLOCK"]))  # one for each row that may run, or more
    pieces, spans = plan(rows, most, capacity, tile["BLOCK"])
    sums = torch.empty(most, n, H, Dh, dtype=torch.float32, device=q.device)
    stats = torch.empty(most, n, H, 2, dtype=torch.float32, device=q.device)
    prompt, members, place = (x.contiguous() for x in (rows.prompt, rows.members, rows.place))
    decode_kernel[most, heads](
        q, keys, values, prompt, members, pieces, sums, stats, capacity, Dh**-0.5,
        Hkv, G, n, Dh, M, DIM, INTERPRETED, **tile,
    )  # fmt: skip
    out = torch.empty_like(q)
    merge_pieces_kernel[(R * H,)](sums, stats, place, spans, out, n, H, Dh, DIM, **MERGE)
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
    check_cache(q, keys, values)
    B = len(keys)
    if rows.members.dim() != 2 or not B == len(rows.prompt) == len(rows.lengths) == len(rows.members):
        raise ValueError(f"{B} cache rows; prompt and lengths must be ({B},), members ({B}, n)")
    if use_triton(q):
        return launch(q.contiguous(), keys, values, rows)
    return attend_rows(q, keys, values, rows)
