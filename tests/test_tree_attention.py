"""Attention over packed token trees: in blocks, against one dense mask, and the rule that flex_attention is given."""

from __future__ import annotations

import random

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from kernels.tree_attention import Block, make_tree, reference_tree_attention, sees, tree_attention
from packing import TokenTree


def some_trees(seed: int, block: int, dtype=torch.float64):
    """Three random trees in one row: shared starts, branches off branches, one of them a plain path."""
    rng = random.Random(seed)
    enter, leave, blocks, ancestors = [], [], [], []
    for number in range(3):
        tree, rows = TokenTree(), [[0] * 3]
        for _ in range(1 if number == 1 else 12):
            start = rng.choice(rows)
            rows.append(start[: rng.randint(1, len(start))] + [rng.randint(0, 3) for _ in range(rng.randint(1, 9))])
        paths = {node: path[: n + 1] for path in map(tree.insert, rows) for n, node in enumerate(path)}
        layout = tree.layout(block)
        offset = len(enter)
        ancestors += [{offset + layout.order.index(node) for node in paths[own]} for own in layout.order]
        enter += [offset + e for e in layout.enter]
        leave += [offset + e for e in layout.leave]
        blocks += [Block(*b) for b in layout.blocks]
    return make_tree(torch.tensor(enter), torch.tensor(leave), blocks, dtype), ancestors


def heads(N: int, H: int, Hkv: int, Dh: int, dtype=torch.float64):
    generator = torch.Generator().manual_seed(N)
    return [torch.randn(1, h, N, Dh, generator=generator, dtype=dtype).requires_grad_() for h in (H, Hkv, Hkv)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("block", [1, 8, 1000])
def test_blocks_equal_one_dense_mask(seed, block):
    """Guards a block that lacks keys or sees another tree's: outputs and all three gradients, grouped-query heads."""
    tree, ancestors = some_trees(seed, block)
    N = len(ancestors)
    q, k, v = heads(N, 4, 2, 8)
    ours, dense = tree_attention(q, k, v, tree), reference_tree_attention(q, k, v, tree)
    torch.testing.assert_close(ours, dense)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=ours.dtype)
    torch.testing.assert_close(*(torch.autograd.grad((x * weights).sum(), (q, k, v)) for x in (ours, dense)))
    places = torch.arange(N)
    for i, row in enumerate(sees(tree, places, places).tolist()):
        assert {j for j in range(N) if row[j]} == ancestors[i]
    if block == 1000:
        assert len(tree.blocks) <= 2 * 3  # a trunk and one block of branches each


def test_flex_attention_is_given_the_same_rule():
    """Guards the CUDA path's mask, as far as a CPU runs it: flex_attention forward with it equals the blocks."""
    tree, _ = some_trees(0, 8, torch.float32)
    q, k, v = (x.detach() for x in heads(len(tree.enter), 4, 2, 16, torch.float32))

    def ancestor(b, h, i, j):
        return (tree.enter[j] <= tree.enter[i]) & (tree.enter[i] < tree.leave[j])

    mask = create_block_mask(ancestor, None, None, len(tree.enter), len(tree.enter), device="cpu")
    flexed = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
    torch.testing.assert_close(flexed, tree_attention(q, k, v, tree), atol=1e-5, rtol=1e-5)


def test_misuse_is_named():
    """Guards blocks that do not cover the row, or begin with a branch of nothing."""
    places = torch.arange(4)
    for blocks in ([Block(3, None)], [Block(4, 2)]):
        with pytest.raises(ValueError, match="the first a trunk"):
            make_tree(places, places + 1, blocks, torch.float32)
    tree = make_tree(places, torch.full((4,), 4), [Block(4, None)], torch.float32)
    with pytest.raises(ValueError, match="one row of the tree's 4 tokens"):
        tree_attention(*heads(5, 2, 1, 8), tree)
