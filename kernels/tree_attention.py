"""Attention over token trees: every token sees its ancestors and itself, and each is computed once.

A dialogue with n candidates per turn is a tree: the longest path is its trunk, the other candidates branch off.
Several trees lie one after another in one row of N tokens, without padding. Number the tokens of all trees in
depth-first order, and let `enter` be a token's number and `leave` the first number behind its descendants. Then

    j is an ancestor of i, or i itself      ⟺      enter[j] ≤ enter[i] < leave[j]

two comparisons instead of an (N, N) mask, and no two trees ever see each other, since their numbers do not overlap.

What it saves: a dense (N, N) mask costs N² work and memory, and most of it is False: branches do not see each other,
nor the trunk behind them. Cut into blocks, a trunk of T tokens is plain causal attention (T²/2, and no mask at all),
and a block of q branch tokens that leave the trunk before token P costs q (P + q). For 10 turns of 4 candidates that is
about a quarter of the dense work, on a CPU too (by SDPA); on CUDA `flex_attention` skips blocks by the same rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MASKED = -torch.inf


class Block(NamedTuple):
    """Tokens whose attention is computed together; a trunk comes before its branches."""

    size: int  # tokens, one after another
    prefix: int | None  # they see this many tokens of the last trunk, at most, and each other; None: a trunk itself


class Tree(NamedTuple):
    """Where the tokens of one or more packed trees stand, and how their attention is cut."""

    enter: Tensor  # (N,) long
    leave: Tensor  # (N,) long
    blocks: Sequence[Block]  # their sizes add up to N
    masks: Sequence[Tensor | None]  # per block, (size, prefix + size) to add to the scores; None: causal. Empty on CUDA
    block_mask: object | None  # flex_attention's, on CUDA


def sees(tree: Tree, queries: Tensor, keys: Tensor) -> Tensor:
    """Return (q, k) bool: which tokens, by their places, are ancestors of which, or they themselves."""
    enter = tree.enter[queries][:, None]
    return (tree.enter[keys] <= enter) & (enter < tree.leave[keys])


def make_tree(enter: Tensor, leave: Tensor, blocks: Sequence[Block], dtype: torch.dtype) -> Tree:
    """Prepare the masks that all layers share, in the dtype of the queries; ValueError if the blocks do not add up."""
    N = len(enter)
    if leave.shape != (N,) or sum(block.size for block in blocks) != N or (blocks and blocks[0].prefix is not None):
        raise ValueError(f"blocks of {[b.size for b in blocks]} tokens, the first a trunk, must be the {N} of enter")
    tree = Tree(enter, leave, blocks, [], None)
    if enter.is_cuda:
        from torch.nn.attention.flex_attention import create_block_mask

        def ancestor(b, h, i, j):
            return (enter[j] <= enter[i]) & (enter[i] < leave[j])

        return tree._replace(block_mask=create_block_mask(ancestor, None, None, N, N, device=enter.device))
    start, trunk, masks = 0, 0, []
    for block in blocks:
        own = torch.arange(start, start + block.size)
        if block.prefix is None:
            trunk = start
            masks.append(None)
        else:
            keys = torch.cat((torch.arange(trunk, trunk + block.prefix), own))
            hidden = ~sees(tree, own, keys)
            masks.append(torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, MASKED))
        start += block.size
    return tree._replace(masks=masks)


def reference_tree_attention(q: Tensor, k: Tensor, v: Tensor, tree: Tree) -> Tensor:
    """Return what `tree_attention` returns, by one dense mask."""
    places = torch.arange(q.shape[2], device=q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=sees(tree, places, places), enable_gqa=True)


@cache
def compiled_flex_attention():
    """Compile flex_attention once, and only where it is used."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def tree_attention(q: Tensor, k: Tensor, v: Tensor, tree: Tree) -> Tensor:
    """Attend with queries (1, H, N, Dh) to the keys and values (1, Hkv, N, Dh) of each token's ancestors, and its own.

    Raises ValueError when the tree has another number of tokens, or more than one row is given.
    """
    N = len(tree.enter)
    if q.shape[0] != 1 or not q.shape[2] == k.shape[2] == v.shape[2] == N:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} must be one row of the tree's {N} tokens")
    if q.is_cuda:
        return compiled_flex_attention()(q, k, v, block_mask=tree.block_mask, enable_gqa=True)
    sizes = [block.size for block in tree.blocks]
    out = []
    for block, mask, q_own, k_own, v_own in zip(
        tree.blocks, tree.masks, q.split(sizes, 2), k.split(sizes, 2), v.split(sizes, 2), strict=True
    ):
        if block.prefix is None:
            trunk_k, trunk_v = k_own, v_own
            out.append(F.scaled_dot_product_attention(q_own, k_own, v_own, is_causal=True, enable_gqa=True))
            continue
        keys = torch.cat((trunk_k[:, :, : block.prefix], k_own), 2)
        values = torch.cat((trunk_v[:, :, : block.prefix], v_own), 2)
        out.append(F.scaled_dot_product_attention(q_own, keys, values, attn_mask=mask, enable_gqa=True))
    return torch.cat(out, 2)
