"""How the candidates of a dialogue share one row of the KV cache: the prompt, then their tokens, interleaved.

    slot      0 … P−1     P … P+n−1            P+n … P+2n−1     …
    holds     prompt      each candidate's     each one's
                          first token          second

The n candidates of a turn start together, so token j of candidate c lies in slot P + j n + c. The prompt is stored once
and read once for all candidates. Behind it each candidate sees only its own slots. With n = 1 a row is a plain
sequence. Nothing is moved when a candidate ends.

Letters: B rows of the cache, n candidates of each, R running candidates with one query each, S slots that are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

EVEN = 1.25  # rows are read in one call if padding them to the longest one reads at most this factor more


class Read(NamedTuple):
    """One call of attention: the running candidates of one row, and the slots that they see."""

    first: int  # their queries are [first, last)
    last: int
    row: int
    used: int  # slots [0, used) of the row
    mask: Tensor | None  # (1, 1, last − first, used) fp32: 0 where a candidate sees a slot, else −∞; None: sees all


@dataclass(frozen=True)
class Rows:
    """Which candidates decode in a cache of B rows: R running ones with one query each.

    The queries of one row stand together, in ascending order of their candidates.
    """

    prompt: Tensor  # (B,) long: the slots of each row that its prompt takes
    lengths: Tensor  # (B,) long: slots in use, including those of the tokens that are computed now
    members: Tensor  # (B, n) long: the query of each candidate of each row; −1: the candidate does not run
    place: Tensor  # (R,) long: row * n + candidate of each query; −1: padding, whose output is 0

    @cached_property
    def reads(self) -> list[Read]:
        """Return what the torch path reads, row by row; made once for all layers."""
        n, found, first = self.members.shape[1], [], 0
        prompt, lengths, place = self.prompt.tolist(), self.lengths.tolist(), self.place.tolist()
        while first < len(place):
            row, last = place[first] // n, first + 1
            while last < len(place) and place[last] // n == row:
                last += 1
            mask = None
            if n > 1 and row >= 0:
                # A view of a cached table whose two parts are rounded up to powers of 2, so that many rows share one.
                own = 1 << (max(1, lengths[row] - prompt[row]) - 1).bit_length()
                shared = 1 << (max(1, prompt[row]) - 1).bit_length()
                table = visibility_table(n, shared, own, self.place.device)
                mask = table.narrow(3, shared - prompt[row], lengths[row])
                if last - first < n:
                    mask = mask[:, :, [at % n for at in place[first:last]]]
            found.append(Read(first, last, row, lengths[row], mask))
            first = last
        return found

    @cached_property
    def together(self) -> tuple[int, Tensor | None] | None:
        """Return S and a mask (B, 1, n, S) bool with which one call of attention reads the first S slots of all rows.

        One call is faster than one per row, if every candidate runs and the rows are about equally long; else None. The
        mask is None if every query sees all slots.
        """
        B, n = self.members.shape
        if len(self.place) < B * n or self.place[0] or not bool((self.place.diff() == 1).all()):
            return None
        longest, total = int(self.lengths.max()), int(self.lengths.sum())
        if longest * B > EVEN * total:
            return None
        if n == 1 and longest * B == total:
            return longest, None
        slot, prompt = torch.arange(longest, device=self.lengths.device), self.prompt.view(B, 1, 1, 1)
        own = (slot - prompt) % n == torch.arange(n, device=slot.device).view(n, 1)
        return longest, ((slot < prompt) | own) & (slot < self.lengths.view(B, 1, 1, 1))


@lru_cache(maxsize=64)
def visibility_table(n: int, prompt: int, own: int, device: torch.device) -> Tensor:
    """Return (1, 1, n, prompt + own) fp32: 0 on the prompt and on a candidate's own slots, else −∞.

    >>> visibility_table(2, 1, 4, torch.device("cpu"))[0, 0].isfinite().long().tolist()
    [[1, 1, 0, 1, 0], [1, 0, 1, 0, 1]]
    """
    slot, candidate = torch.arange(prompt + own, device=device), torch.arange(n, device=device)[:, None]
    seen = (slot < prompt) | ((slot - prompt) % n == candidate)
    return torch.zeros(1, 1, n, prompt + own, device=device).masked_fill_(~seen, -torch.inf)
