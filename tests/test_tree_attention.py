"""Attention over packed token trees: in blocks, against one dense mask, and the rule that flex_attention is given."""

from __future__ import annotations

import random

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from kernels.tree_attention import Block, Tree, reference_tree_attention, tree_attention
from packing import TokenTree


def random_trees(seed: int, block: int, dtype=torch.float64, sizes=(12, 1, 12), longest: int = 9, most: int = 3):
    """Random trees in one row, and each token's ancestors: shared starts, branches off branches, or a plain path.

    sizes: branches of each tree, of up to `longest` ids, the largest of them `most`.
    """
    rng = random.Random(seed)
    enter, leave, blocks, ancestors = [], [], [], []
    for size in sizes:
        tree, rows = TokenTree(), [[0] * 3]
        for _ in range(size):
            start, new = rng.choice(rows), rng.randint(1, longest)
            rows.append(start[: rng.randint(1, len(start))] + [rng.randint(0, most) for _ in range(new)])
        paths = {node: path[: n + 1] for path in map(tree.insert, rows) for n, node in enumerate(path)}
        layout = tree.layout(block)
        offset = len(enter)
        ancestors += [{offset + layout.order.index(node) for node in paths[own]} for own in layout.order]
        enter += [offset + e for e in layout.enter]
        leave += [offset + e for e in layout.leave]
        blocks += [Block(*b) for b in layout.blocks]
    return Tree(torch.tensor(enter), torch.tensor(leave), blocks, dtype), ancestors


def heads(N: int, H: int, Hkv: int, Dh: int, dtype=torch.float64):
    generator = torch.Generator().manual_seed(N)
    return [torch.randn(1, h, N, Dh, generator=generator, dtype=dtype).requires_grad_() for h in (H, Hkv, Hkv)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("block", [1, 8, 1000])
def test_blocks_equal_one_dense_mask(seed, block):
    """Guards a block that lacks keys or sees another tree's: outputs and all three gradients, grouped-query heads."""
    tree, ancestors = random_trees(seed, block)
    N = len(ancestors)
    q, k, v = heads(N, 4, 2, 8)
    ours, dense = tree_attention(q, k, v, tree), reference_tree_attention(q, k, v, tree)
    torch.testing.assert_close(ours, dense)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=ours.dtype)
    torch.testing.assert_close(*(torch.autograd.grad((x * weights).sum(), (q, k, v)) for x in (ours, dense)))
    flat = torch.zeros(1, 1, N, N, dtype=torch.float64)  # equal scores: a token's output names all that it sees
    for i, row in enumerate(tree_attention(flat, flat, torch.eye(N, dtype=torch.float64)[None, None], tree)[0, 0]):
        assert {j for j in range(N) if row[j]} == ancestors[i]
    if block == 1000:
        assert len(tree.blocks) <= 2 * 3  # a trunk and one block of branches each


def test_flex_attention_is_given_the_same_rule():
    """Guards the CUDA path's mask, as far as a CPU runs it: flex_attention forward with it equals the blocks."""
    tree, _ = random_trees(0, 8, torch.float32)
    q, k, v = (x.detach() for x in heads(len(tree.enter), 4, 2, 16, torch.float32))
    flexed = flex_attention(q, k, v, block_mask=tree.block_mask, enable_gqa=True)
    torch.testing.assert_close(flexed, tree_attention(q, k, v, tree), atol=1e-5, rtol=1e-5)


def test_misuse_is_named():
    """Guards blocks that do not cover the row, or begin with a branch of nothing."""
    places = torch.arange(4)
    for blocks in ([Block(3, None)], [Block(4, 2)]):
        with pytest.raises(ValueError, match="the first a trunk"):
            tree_attention(*heads(4, 2, 1, 8), Tree(places, places + 1, blocks))
    tree = Tree(places, torch.full((4,), 4), [Block(4, None)], torch.float32)
    with pytest.raises(ValueError, match="one row of the tree's 4 tokens"):
        tree_attention(*heads(5, 2, 1, 8), tree)
