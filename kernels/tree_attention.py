"""Attention over token trees: every token sees its ancestors and itself, and each is computed once.

A dialogue with n candidates per turn is a tree: the longest path is its trunk, the other candidates branch off.
Several trees lie one after another in one row of T tokens, without padding. Number the tokens of all trees in
depth-first order, and let `enter` be a token's number and `leave` the first number behind its descendants. Then

    j is an ancestor of i, or i itself      ⟺      enter[j] ≤ enter[i] < leave[j]

two comparisons instead of a (T, T) mask. No tree sees another one, because their numbers do not overlap.

What it saves: a dense (T, T) mask costs T² work and memory, and most of it is False: branches do not see each other,
nor the part of the trunk behind them. Cut into blocks, a trunk of p tokens is plain causal attention (p²/2, and no mask
at all), and a block of q branch tokens that leave the trunk before its token P costs q (P + q). For 10 turns of 4
candidates that is about a quarter of the dense work by SDPA. On CUDA `flex_attention` skips blocks by the same rule. On
a CPU `cpu_tree.cpp` skips single tokens: a tile of 16 queries visits only tokens that one of them sees.

Letters: T tokens of the packed trees, H query heads, Hkv key and value heads, Dh width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from kernels import cpu
from kernels.backend import first_order

MASKED = -torch.inf
BLOCK = 128  # tokens of a block that flex_attention visits or skips: its own default, which its tiles divide
NOWHERE = 2**62  # above all numbers of tokens

# By the card's capability, the width of a head and the bytes of a number: what replaces flex_attention's own choices
# where registers would spill to memory (torch 2.11 to 2.13). Others keep the defaults.
FLEX_OPTIONS = {
    ((9, 0), 64, 2): {"fwd_num_warps": 8},
    ((9, 0), 128, 2): dict(
        bwd_BLOCK_M1=32, bwd_BLOCK_N1=128, bwd_BLOCK_M2=128, bwd_BLOCK_N2=32, bwd_num_warps=8, bwd_num_stages=2
    ),
}


class Block(NamedTuple):
    """Tokens whose attention is computed together; a trunk comes before its branches."""

    size: int  # tokens, one after another
    prefix: int | None  # they see this many tokens of the last trunk, at most, and each other; None: a trunk itself


@dataclass(frozen=True)
class Tree:
    """Where the tokens of one or more packed trees stand, and how their attention is cut."""

    enter: Tensor  # (T,) long
    leave: Tensor  # (T,) long
    blocks: Sequence[Block]  # their sizes add up to T
    dtype: torch.dtype = torch.float32  # of the queries

    @cached_property
    def masks(self) -> list[Tensor | None]:
        """Return the torch path's masks, once for all layers: per block (size, prefix + size), to add to the scores.

        None for a trunk: causal.
        """
        start, trunk, masks = 0, 0, []
        for block in self.blocks:
            own = torch.arange(start, start + block.size)
            if block.prefix is None:
                trunk = start
                masks.append(None)
            else:
                keys = torch.cat((torch.arange(trunk, trunk + block.prefix), own))
                enter = self.enter[own, None]
                seen = (self.enter[keys] <= enter) & (enter < self.leave[keys])
                masks.append(torch.zeros(seen.shape, dtype=self.dtype).masked_fill_(~seen, MASKED))
            start += block.size
        return masks

    @cached_property
    def spans(self) -> Tensor:
        """Return enter and leave as (2, T) int32, for C++."""
        return torch.stack((self.enter, self.leave)).int()

    @cached_property
    def block_mask(self) -> BlockMask:
        """Return the mask of flex_attention, once for all layers, for CUDA: which blocks it skips, masks or sees whole.

        For each block of queries and each key it counts the queries that see the key: those that are numbered in
        [enter, leave). That is T² / BLOCK numbers, where a dense mask has T².
        """
        T, enter, leave = len(self.enter), self.enter, self.leave
        fill = (0, -T % BLOCK)  # to whole blocks, with queries that see nothing and keys that nobody sees
        queries = F.pad(enter, fill, value=NOWHERE).view(-1, BLOCK).sort(dim=1).values

        def below(numbers: Tensor) -> Tensor:
            return torch.searchsorted(queries, numbers.repeat(len(queries), 1), out_int32=True)

        def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
            order = blocks.int().argsort(dim=1, descending=True, stable=True)
            return blocks.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]

        def ancestor(b, h, i, j):
            return (enter[j] <= enter[i]) & (enter[i] < leave[j])

        counts = F.pad(below(leave) - below(enter), fill).view(len(queries), len(queries), BLOCK)
        whole = counts.amin(2) == BLOCK
        masked = (counts.amax(2) > 0) & ~whole
        return BlockMask.from_kv_blocks(*listed(masked), *listed(whole), BLOCK, ancestor, seq_lengths=(T, T))


def reference_tree_attention(q: Tensor, k: Tensor, v: Tensor, tree: Tree) -> Tensor:
    """Return what `tree_attention` returns, by one dense mask."""
    enter = tree.enter[:, None]
    seen = (tree.enter <= enter) & (enter < tree.leave)  # (T, T): the rows are queries
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)


@cache
def compiled_flex_attention():
    """Compile flex_attention once, and only where it is used."""
    return torch.compile(flex_attention, dynamic=True)


class TileAttention(torch.autograd.Function):
    """The tiles of cpu_tree.cpp, for q (T, H, Dh), k and v (T, Hkv, Dh); keeps the outputs and each softmax's sum."""

    @staticmethod
    def forward(ctx, q, k, v, spans):
        out, lse = cpu.tree_forward(q, k, v, spans)
        ctx.save_for_backward(q, k, v, spans, out, lse)
        return out

    @staticmethod
    @first_order
    def backward(ctx, g):
        return *cpu.tree_backward(*ctx.saved_tensors, g.contiguous()), None


def tree_attention(q: Tensor, k: Tensor, v: Tensor, tree: Tree) -> Tensor:
    """Attend with queries (1, H, T, Dh) to the keys and values (1, Hkv, T, Dh) of each token's ancestors, and its own.

    Raises ValueError when the tree has another number of tokens, its blocks do not add up, or more than one row is
    given.
    """
    T, sizes = len(tree.enter), [block.size for block in tree.blocks]
    if q.shape[0] != 1 or not q.shape[2] == k.shape[2] == v.shape[2] == T:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} must be one row of the tree's {T} tokens")
    if len(tree.leave) != T or sum(sizes) != T or (sizes and tree.blocks[0].prefix is not None):
        raise ValueError(f"blocks of {sizes} tokens, the first a trunk, must be the {T} of enter")
    if q.is_cuda and T <= BLOCK:  # nothing to skip; and torch.compile would make a kernel of its own for one block
        return reference_tree_attention(q, k, v, tree)
    if q.is_cuda:
        options = FLEX_OPTIONS.get((torch.cuda.get_device_capability(q.device), q.shape[3], q.dtype.itemsize))
        flex = compiled_flex_attention()
        return flex(q, k, v, block_mask=tree.block_mask, enable_gqa=True, kernel_options=options)
    if cpu.use_cpu(q, low=True) and q.shape[3] in cpu.HEAD_DIMS:
        rows = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))  # (T, H, Dh): as the projections wrote them
        return TileAttention.apply(*rows, tree.spans).transpose(0, 1)[None]
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
