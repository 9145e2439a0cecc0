"""Attention over packed token trees: in blocks, against one dense mask, and the rule that flex_attention is given."""

from __future__ import annotations

import random

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.tree_attention import Block, Tree, reference_tree_attention, tree_attention
from model import Qwen2Config, random_policy
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


def visited(counts: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return the (rows, columns) blocks that a kernel visits: of each row's indices the first `counts`."""
    blocks = torch.zeros(indices.shape[-2:], dtype=torch.bool)
    for row, count in enumerate(counts[0, 0].tolist()):
        blocks[row, indices[0, 0, row, :count].long()] = True
    return blocks


@pytest.mark.parametrize(("sizes", "longest"), [((20, 1, 12), 60), ((1,), 400), ((9, 9, 9, 9), 20)])
def test_the_blocks_of_the_mask_are_those_of_the_dense_one(sizes, longest):
    """Guards a block that is skipped although seen, or seen whole although it is not, also in the backward's lists."""
    tree, _ = random_trees(0, 128, sizes=sizes, longest=longest, most=1000)
    enter, leave, T = tree.enter, tree.leave, len(tree.enter)
    seen = (enter <= enter[:, None]) & (enter[:, None] < leave)
    dense = create_block_mask(lambda b, h, i, j: seen[i, j], None, None, T, T, device="cpu")
    ours = tree.block_mask
    for name in ("", "full_"):
        kv, q = ((getattr(ours, f"{name}{x}_num_blocks"), getattr(ours, f"{name}{x}_indices")) for x in ("kv", "q"))
        expected = getattr(dense, f"{name}kv_num_blocks"), getattr(dense, f"{name}kv_indices")
        torch.testing.assert_close(visited(*kv), visited(*expected))
        torch.testing.assert_close(visited(*q).T, visited(*kv))
        assert [x.dtype for x in kv] == [x.dtype for x in expected]
    assert ours.shape == dense.shape and ours.BLOCK_SIZE == dense.BLOCK_SIZE


class Largest(TorchDispatchMode):
    """Notes the most numbers of any tensor that an operation returns."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.most = max(self.most, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)), 0)
        return out


def test_no_dense_mask_is_made():
    """Guards the memory of a mask on CUDA: no tensor of T² numbers, 2 GB of bools at 46,000 tokens."""
    T = 4000
    places = torch.arange(T)
    with Largest() as largest:
        _ = Tree(places, torch.full((T,), T), [Block(T, None)]).block_mask
    assert T * T / 256 < largest.most <= T * (T / 128 + 2)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_all_layers_share_one_mask(monkeypatch, checkpointing):
    """Guards a mask per layer, and a second one when checkpointing computes a layer again."""
    made = []
    make = BlockMask.from_kv_blocks
    monkeypatch.setattr(BlockMask, "from_kv_blocks", lambda *args, **kwargs: made.append(1) or make(*args, **kwargs))

    def on_cuda(q, k, v, tree):  # flex_attention has no backward on a CPU
        assert tree.block_mask is tree.block_mask
        return reference_tree_attention(q, k, v, tree)

    monkeypatch.setattr("model.tree_attention", on_cuda)
    policy = random_policy(Qwen2Config(32, 16, 16, 3, 2, 1), 0)
    policy.model.checkpointing = checkpointing
    places = torch.arange(5)
    tree = Tree(places, torch.full((5,), 5), [Block(5, None)])
    policy(places[None], places[None], tree).sum().backward()
    assert made == [1]


def test_misuse_is_named():
    """Guards blocks that do not cover the row, or begin with a branch of nothing."""
    places = torch.arange(4)
    for blocks in ([Block(3, None)], [Block(4, 2)]):
        with pytest.raises(ValueError, match="the first a trunk"):
            tree_attention(*heads(4, 2, 1, 8), Tree(places, places + 1, blocks))
    tree = Tree(places, torch.full((4,), 4), [Block(4, None)], torch.float32)
    with pytest.raises(ValueError, match="one row of the tree's 4 tokens"):
        tree_attention(*heads(5, 2, 1, 8), tree)
