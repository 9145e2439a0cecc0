"""A prefix of keys and values that several rows of queries share: who belongs to whom.

The n candidates of a turn continue one dialogue. Its keys and values are stored once, and `decode_attention` reads them
once for all candidates; rows leave as they finish, so that a prefix may have fewer members than others, or none.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Prefix(NamedTuple):
    """Keys and values that up to n rows of queries share."""

    keys: Tensor  # (B, Hkv, P, Dh), as are values
    values: Tensor
    lengths: Tensor  # (B,) long: tokens to attend to, of the P
    members: Tensor  # (B, n) long: the rows that share each of these; −1: none
    place: Tensor  # (R,) long: where each row stands among the B * n


def membership(owner: Tensor, B: int, n: int) -> tuple[Tensor, Tensor]:
    """Return members (B, n) and place (R,) of rows whose prefixes are owner (R,), ascending, up to n rows each.

    >>> membership(torch.tensor([0, 0, 2]), 3, 2)[0].tolist()
    [[0, 1], [-1, -1], [2, -1]]
    """
    if len(owner) and (bool((owner.diff() < 0).any()) or int(owner.bincount(minlength=B).max()) > n or owner[-1] >= B):
        raise ValueError(f"owner must ascend within [0, {B}), each at most {n} times: {owner.tolist()}")
    rows = torch.arange(len(owner), device=owner.device)
    place = owner * n + rows - torch.searchsorted(owner, owner)
    members = torch.full((B * n,), -1, device=owner.device)
    members[place] = rows
    return members.view(B, n), place
