"""A row of the KV cache is one dialogue: its prompt, then the tokens of its n candidates, interleaved.

    slot      0 … P−1     P … P+n−1            P+n … P+2n−1     …
    holds     prompt      each candidate's     each one's
                          first token          second

The n candidates of a turn start together, so candidate c's token j lies in slot P + j n + c. All candidates see the
prompt, which is stored once and read once for all; of the other slots each sees its own. With n = 1 a row is a plain
sequence. A dialogue that waits keeps its row, and nothing is moved when candidates finish.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

EVEN = 1.25  # rows are read together if padding them to the longest reads at most so much more


class Read(NamedTuple):
    """What the running candidates of one row attend to."""

    first: int  # their queries are [first, last)
    last: int
    row: int
    used: int  # slots [0, used) of the row
    mask: Tensor | None  # (1, 1, last − first, used) fp32: 0 where a candidate sees a slot, else −∞; None: sees all


@dataclass(frozen=True)
class Rows:
    """Who decodes in a cache of B rows: R running candidates with one query each.

    Those of one row stand together, in ascending order.
    """

    prompt: Tensor  # (B,) long: the slots of each row that its prompt takes
    lengths: Tensor  # (B,) long: slots in use, those of the tokens being computed included
    members: Tensor  # (B, n) long: the query of each candidate of each row; −1: it does not run
    place: Tensor  # (R,) long: row * n + candidate of each query; −1: padding, whose output is 0

    @cached_property
    def reads(self) -> list[Read]:
        """Give what the torch path reads row by row, worked out once for all layers."""
        n, found, first = self.members.shape[1], [], 0
        prompt, lengths, place = self.prompt.tolist(), self.lengths.tolist(), self.place.tolist()
        while first < len(place):
            row, last = place[first] // n, first + 1
            while last < len(place) and place[last] // n == row:
                last += 1
            mask = None
            if n > 1 and row >= 0:
                mask = visible(n, prompt[row], lengths[row], self.place.device)
                if last - first < n:
                    mask = mask[:, :, [at % n for at in place[first:last]]]
            found.append(Read(first, last, row, lengths[row], mask))
            first = last
        return found

    @cached_property
    def together(self) -> tuple[int, Tensor | None] | None:
        """Give the slots S to read of every row, and a mask (B, 1, n, S) bool, if all run and are about equally long.

        One call for all rows then beats one for each. None otherwise; the mask is None where nothing is hidden.
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


def visible(n: int, prompt: int, used: int, device: torch.device) -> Tensor:
    """Return (1, 1, n, used) fp32: 0 where candidate c sees a slot, else −∞. A view: many rows share one table.

    >>> visible(2, 1, 5, torch.device("cpu"))[0, 0].isfinite().long().tolist()
    [[1, 1, 0, 1, 0], [1, 0, 1, 0, 1]]
    """
    prompts, own = (1 << (max(1, size) - 1).bit_length() for size in (prompt, used - prompt))
    return visibility_table(n, prompts, own, device).narrow(3, prompts - prompt, used)


@lru_cache(maxsize=64)
def visibility_table(n: int, prompt: int, own: int, device: torch.device) -> Tensor:
    """Return (1, 1, n, prompt + own) fp32: 0 on the prompt and on a candidate's own slots, else −∞."""
    slot, candidate = torch.arange(prompt + own, device=device), torch.arange(n, device=device)[:, None]
    seen = (slot < prompt) | ((slot - prompt) % n == candidate)
    return torch.zeros(1, 1, n, prompt + own, device=device).masked_fill_(~seen, -torch.inf)
