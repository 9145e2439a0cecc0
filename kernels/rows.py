"""How the candidates of a dialogue share one row of the KV cache: the prompt, then their tokens, interleaved.

    slot      0 … P−1     P … P+n−1            P+n … P+2n−1     …
    holds     prompt      each candidate's     each one's
                          first token          second

The n candidates of a turn start together, so token j of candidate c lies in slot P + j n + c. The prompt is stored once
and read once for all candidates. Behind it each candidate sees only its own slots. With n = 1 a row is a plain
sequence. Nothing is moved when a candidate ends. When a turn is over, `adopt` moves the winner's tokens next to one
another, in all layers by one launch: an array holds the addresses of the layers' keys and values.

Letters: B rows of the cache, n candidates of each, R running candidates with one query each, S slots that are read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.backend import jit, send, tl, use_triton

ADOPT = dict(BLOCK=32, num_warps=4)  # tokens a step
EVEN = 1.25  # rows are read in one call if padding them to the longest one reads at most this factor more


class Read(NamedTuple):
    """One call of attention: the running candidates of one row, or those of all rows, and the slots that they see."""

    queries: int  # so many of each row; padding is a row's, too
    rows: slice  # of the cache: one row, or all
    used: int  # slots [0, used) of each row are read; 0: padding, whose output is 0
    mask: Tensor | None  # (rows, 1, candidates, used) fp32: 0 where a candidate sees a slot, else −∞; None: sees all


@dataclass(frozen=True)
class Rows:
    """Which candidates decode in a cache of B rows: R running ones with one query each.

    The queries of one row stand together, in ascending order of their candidates.
    """

    prompt: Tensor  # (B,) long: the slots of each row that its prompt takes
    lengths: Tensor  # (B,) long: slots in use, including those of the tokens that are computed now
    members: Tensor  # (B, n) long: the query of each candidate of each row; −1: the candidate does not run
    place: Tensor  # (R,) long: row * n + candidate of each query; −1: padding, whose output is 0
    kept: dict = field(default_factory=dict, init=False, repr=False, compare=False)  # the kernel's plan, for all layers

    @cached_property
    def reads(self) -> list[Read]:
        """Return what the torch path reads, once for all layers: all rows in one call, or row by row.

        One call is faster if every candidate runs and the rows are about equally long.
        """
        B, n = self.members.shape
        place, lengths = self.place.tolist(), self.lengths.tolist()
        longest, total = max(lengths), sum(lengths)
        if place == list(range(B * n)) and longest * B <= EVEN * total:
            mask = None if n == 1 and longest * B == total else self.mask(list(range(B)))
            return [Read(n, slice(0, B), longest, mask)]
        groups = [(row, list(places)) for row, places in groupby(place, lambda at: at // n)]
        running = [row for row, _ in groups if row >= 0]
        masks = dict(zip(running, self.mask(running).split(1), strict=True)) if n > 1 and running else {}
        reads = []
        for row, places in groups:
            held, used = max(row, 0), lengths[row] if row >= 0 else 0
            mask = masks[row][..., :used] if row in masks else None
            if len(places) < n and mask is not None:
                mask = mask[:, :, [at % n for at in places]]
            reads.append(Read(len(places), slice(held, held + 1), used, mask))
        return reads

    def mask(self, rows: list[int]) -> Tensor:
        """Return (rows, 1, n, S) fp32, S the longest length: 0 where a candidate sees a slot of its row, else −∞.

        >>> one, candidates = torch.tensor([1]), torch.tensor([[0, 1]])
        >>> Rows(one, one + 4, candidates, candidates[0]).mask([0])[0, 0].isfinite().long().tolist()
        [[1, 1, 0, 1, 0], [1, 0, 1, 0, 1]]
        """
        prompt, length = (x[rows].view(-1, 1, 1, 1) for x in (self.prompt, self.lengths))
        n, slot = self.members.shape[1], torch.arange(int(length.max()), device=self.prompt.device)
        own = (slot - prompt) % n == torch.arange(n, device=slot.device)[:, None]
        return torch.where(((slot < prompt) | own) & (slot < length), 0.0, -torch.inf)


def check_cache(q: Tensor, keys: Tensor, values: Tensor) -> None:
    """Raise ValueError unless queries (N, H, Dh) can attend to keys and values (B, Hkv, capacity, Dh), contiguous."""
    if keys.dim() != 4 or keys.shape != values.shape or keys.shape[3] != q.shape[2]:
        shapes = f"keys {tuple(keys.shape)} and values {tuple(values.shape)}"
        raise ValueError(f"{shapes} must both be (B, Hkv, capacity, {q.shape[2]})")
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError("keys and values must be contiguous: give the whole cache, and not a part of each row")
    if not q.dtype == keys.dtype == values.dtype:
        raise ValueError(f"q is {q.dtype}, keys {keys.dtype}, values {values.dtype}; they must be of one dtype")
    if q.shape[1] % keys.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads must be a multiple of the {keys.shape[1]} KV heads")


# --------------------------------------------------------------------------------------------------------------- adopt


@jit(do_not_specialize=("row", "prompt", "tokens", "candidate", "capacity"))
def adopt_kernel(
    addresses, like, row, prompt, tokens, candidate, capacity,
    CANDIDATES: tl.constexpr, HKV: tl.constexpr, DH: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Move a candidate's tokens together in KV head `program_id` 1 of tensor `program_id` 0.

    addresses (tensors,) int64, each that of a contiguous (B, HKV, capacity, DH) of the type of `like`. Token i goes
    from slot prompt + candidate + i * CANDIDATES to prompt + i, which is never behind. So whoever goes upwards writes
    only where all has been read, provided that a step's reads are over before its writes: hence the barrier.
    """
    stored = tl.load(addresses + tl.program_id(0)).to(like.dtype)
    stored = tl.multiple_of(stored, 16)
    stored += ((row.to(tl.int64) * HKV + tl.program_id(1)) * capacity + prompt) * DH
    dim, offset = tl.arange(0, DIM)[None, :], tl.arange(0, BLOCK)[:, None]
    for first in range(0, tokens, BLOCK):
        token = first + offset
        inside = (token < tokens) & (dim < DH)
        own = tl.load(stored + (candidate + token * CANDIDATES) * DH + dim, mask=inside)
        tl.debug_barrier()
        tl.store(stored + token * DH + dim, own, mask=inside)


def adopt(tensors: list[Tensor], row: int, prompt: int, tokens: int, candidate: int, n: int) -> None:
    """Keep one of a row's n candidates in tensors (B, Hkv, capacity, Dh) of one shape and type, each contiguous.

    The row then holds `prompt` slots of prompt and `tokens` of the candidate, one after another.

    >>> stored = torch.arange(8.0).view(1, 1, 8, 1)
    >>> adopt([stored], row=0, prompt=2, tokens=3, candidate=1, n=2)
    >>> stored.flatten().tolist()[:5]
    [0.0, 1.0, 3.0, 5.0, 7.0]
    """
    if use_triton(tensors[0]):
        # Asked for anew each time: addresses kept from before a resize would lead into freed memory.
        addresses = send([stored.data_ptr() for stored in tensors], tensors[0].device)
        _, Hkv, capacity, Dh = tensors[0].shape
        sizes = dict(CANDIDATES=n, HKV=Hkv, DH=Dh, DIM=1 << (Dh - 1).bit_length())
        grid = len(tensors), Hkv
        adopt_kernel[grid](addresses, tensors[0], row, prompt, tokens, candidate, capacity, **sizes, **ADOPT)
        return
    for stored in tensors:
        own = stored[row, :, prompt + candidate : prompt + n * tokens : n]
        stored[row, :, prompt : prompt + tokens] = own.clone()  # the two overlap
