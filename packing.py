"""From dialogues to tensors: one dialogue is one tree of tokens, and several trees lie in one row without padding.

    pack            a dialogue's turns and candidates become a tree: each distinct token is stored and computed once
    make_batches    dialogues are shared out to forwards of about --microbatch-tokens,
                    and the trees of a micro-batch are laid one after another

Attention follows the tree: a token sees its ancestors and itself. So gradients equal those of one row per candidate.
Letters: T tree tokens of a micro-batch, N action tokens (sampled ids), D hidden.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from config import Config
from dialogue import Candidate, Dialogue
from kernels.tree_attention import Block, Tree
from learners.processes import gather
from model import Critic, Qwen2ForCausalLM, ValueHead

BRANCH_BLOCK = 128  # tokens of branches whose attention is computed together


@dataclass
class Span:
    """Where the action tokens of one candidate lie in its dialogue's flat arrays: [start, stop)."""

    turn: int
    candidate: Candidate
    chosen: bool
    start: int
    stop: int


@dataclass
class Packed:
    """One dialogue as tensors: its token tree, and for each action token the node that predicts it.

    The action mask of the usual row layout is implied: action tokens are exactly those listed in `targets`, as sampled.
    """

    minibatch: int  # which optimizer step of an epoch it belongs to
    token_ids: Tensor  # (T,) long, in the order of the tree's layout
    position_ids: Tensor  # (T,) long
    enter: Tensor  # (T,) long: number in depth-first order; with `leave` it gives the attention mask
    leave: Tensor  # (T,) long
    blocks: list[Block]  # how the attention is cut
    predict: Tensor  # (N,) long: place of the token before each action token, whose hidden state predicts it
    targets: Tensor  # (N,) long: the sampled ids
    sampler_logprobs: Tensor  # (N,) fp32, nats
    spans: list[Span]
    row_tokens: int  # tokens of the same samples as separate rows, each with its whole history
    old_logprobs: Tensor | None = None  # (N,) log π_old: by the trainer, or the sampler's own (--old-logprobs)
    old_is_new: bool = False  # until the update has computed log π_old itself
    ref_logprobs: Tensor | None = None  # (N,) under the frozen reference
    ref_hidden: Tensor | None = None  # (N, D) of the reference, with --kl-estimator exact
    values: Tensor | None = None  # (N,) critic before each action token
    advantages: Tensor | None = None  # (N,)
    returns: Tensor | None = None  # (N,)


def pack(dialogue: Dialogue, config: Config) -> Packed | None:
    """Turn a dialogue into its token tree; None if it was dropped or holds nothing to train on."""
    tree, spans = TokenTree(), []
    predict: list[int] = []
    targets: list[int] = []
    sampled: list[float] = []
    for t, turn in enumerate(dialogue.turns):
        for c, candidate in enumerate(turn.candidates):
            if not candidate.judged:
                continue
            nodes = tree.insert(turn.prompt_ids + candidate.token_ids)
            first = len(turn.prompt_ids)
            spans.append(Span(t, candidate, c == turn.chosen, len(targets), len(targets) + len(candidate.token_ids)))
            predict += nodes[first - 1 : -1]  # logits at a token predict the next: from the prompt's last token on
            targets += candidate.token_ids
            sampled += candidate.logprobs
    if dialogue.dropped is not None or not targets:
        return None
    layout = tree.layout()
    place = torch.empty(len(layout.order), dtype=torch.long)
    place[layout.order] = torch.arange(len(layout.order))
    return Packed(
        minibatch=dialogue.index % config.rollout_batch_size // config.minibatch_size,
        token_ids=torch.tensor(tree.token_ids)[layout.order],
        position_ids=torch.tensor(tree.positions)[layout.order],
        enter=torch.tensor(layout.enter),
        leave=torch.tensor(layout.leave),
        blocks=[Block(*block) for block in layout.blocks],
        predict=place[predict],
        targets=torch.tensor(targets),
        sampler_logprobs=torch.tensor(sampled),
        spans=spans,
        row_tokens=sum(len(dialogue.turns[span.turn].prompt_ids) + span.stop - span.start for span in spans),
    )


class Layout(NamedTuple):
    """A tree's T nodes in a row, and how their attention is cut (`kernels/tree_attention.py`).

    Place i holds an ancestor of the node at place j, or that node itself, iff enter[i] <= enter[j] < leave[i].
    """

    order: list[int]  # the node at each place: first the trunk, the longest path; then its branches
    enter: list[int]  # number of each place's node in depth-first order
    leave: list[int]  # first number behind its descendants
    blocks: list[tuple[int, int | None]]  # size, and tokens of the trunk that the block follows; None: the trunk itself


@dataclass
class TokenTree:
    """A prefix tree of token ids: every distinct token of a dialogue's prompts and candidates is stored once.

    Node i has an id, a parent (−1 for the first token) and a position (its depth). Rows that share a prefix share its
    nodes: turns of one dialogue, its candidates, and even the first tokens that two candidates have in common.

    >>> tree = TokenTree()
    >>> tree.insert([7, 8, 1]), tree.insert([7, 8, 2, 3]), len(tree)
    ([0, 1, 2], [0, 1, 3, 4], 5)
    >>> tree.layout().order   # 7, 8, 2, 3, then 1, which branches off
    [0, 1, 3, 4, 2]
    """

    token_ids: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    children: dict[tuple[int, int], int] = field(default_factory=dict)  # (parent, token id) → node

    def __len__(self) -> int:
        return len(self.token_ids)

    def insert(self, token_ids: Sequence[int]) -> list[int]:
        """Insert a row and return the node of each of its tokens."""
        nodes, parent = [], -1
        for depth, token_id in enumerate(token_ids):
            node = self.children.get((parent, token_id))
            if node is None:
                node = self.children[parent, token_id] = len(self.token_ids)
                self.token_ids.append(token_id)
                self.parents.append(parent)
                self.positions.append(depth)
            nodes.append(node)
            parent = node
        return nodes

    def layout(self, block: int = BRANCH_BLOCK) -> Layout:
        """Put the nodes in a row: the longest path, the trunk, then what branches off it, in the order of leaving it.

        Branches share a block of attention until it has `block` tokens: fewer blocks are fewer calls, smaller ones
        compute less that nobody sees.
        """
        count = len(self.token_ids)
        children: dict[int, list[int]] = {node: [] for node in range(-1, count)}  # -1: above the first tokens
        size = [1] * count  # of each node's subtree
        for node in reversed(range(count)):
            children[self.parents[node]].append(node)
            if self.parents[node] >= 0:
                size[self.parents[node]] += size[node]
        enter, depth_first, waiting = [0] * count, [], list(children[-1])
        while waiting:
            enter[waiting[-1]] = len(depth_first)
            depth_first.append(waiting.pop())
            waiting += children[depth_first[-1]]
        # The trunk: walk up from the deepest node.
        order, node = [], max(range(count), key=self.positions.__getitem__)
        while node >= 0:
            order.append(node)
            node = self.parents[node]
        order.reverse()
        # Then the branches, in the order in which they leave the trunk.
        blocks: list[tuple[int, int | None]] = [(len(order), None)]
        for depth, node in enumerate([-1, *order]):
            for branch in children[node]:
                if depth < blocks[0][0] and branch == order[depth]:
                    continue
                if len(blocks) == 1 or blocks[-1][0] + size[branch] > block:
                    blocks.append((0, 0))  # the open block is full
                blocks[-1] = (blocks[-1][0] + size[branch], depth)
                order += depth_first[enter[branch] : enter[branch] + size[branch]]
        return Layout(order, [enter[node] for node in order], [enter[node] + size[node] for node in order], blocks)


def microbatches(packed: Sequence[Packed], most_tokens: int) -> list[list[Packed]]:
    """Share dialogues out to as few micro-batches as most_tokens allows, with about equally many tokens in each."""
    count = max(1, math.ceil(sum(len(p.token_ids) for p in packed) / most_tokens))
    parts: list[list[Packed]] = [[] for _ in range(min(count, len(packed)))]
    loads = [0] * len(parts)
    for p in sorted(packed, key=lambda p: -len(p.token_ids)):  # the largest first, each to where there is least
        least = loads.index(min(loads))
        parts[least].append(p)
        loads[least] += len(p.token_ids)
    return parts


@dataclass
class Batch:
    """A micro-batch: the trees of its dialogues one after another in one row, without padding."""

    dialogues: list[Packed]
    inputs: tuple[Tensor, Tensor, Tree]  # token_ids (1, T), position_ids (1, T) and who sees whom
    predict: Tensor  # (N,) long into T
    targets: Tensor  # (N,) long

    def to(self, like: Tensor) -> Batch:
        """Return a copy for a forward: on the device of `like`, with attention masks in its dtype.

        Made anew for each use: a mask is below 1 % of a forward's work, but those of a whole rollout fill a memory.
        """
        token_ids, position_ids, tree = self.inputs
        tree = Tree(tree.enter.to(like.device), tree.leave.to(like.device), tree.blocks, like.dtype)
        inputs = (token_ids.to(like.device), position_ids.to(like.device), tree)
        return replace(self, inputs=inputs, predict=self.predict.to(like.device), targets=self.targets.to(like.device))

    def column(self, name: str) -> Tensor:
        """Return one of the dialogues' fields of statistics, (N,) or (N, D)."""
        return torch.cat([getattr(p, name) for p in self.dialogues]).to(self.targets.device)

    def fill(self, name: str, values: Tensor) -> None:
        """Set such a field: there is no padding to mask."""
        for p, part in zip(self.dialogues, values.cpu().split([len(p.targets) for p in self.dialogues]), strict=True):
            setattr(p, name, part)


def collate(dialogues: list[Packed]) -> Batch:
    """Make a micro-batch in the CPU's memory, without masks: small integers, kept while statistics and update run."""
    rows: dict[str, list[Tensor]] = defaultdict(list)
    start = 0
    for p in dialogues:
        for name in ("token_ids", "position_ids", "targets"):
            rows[name].append(getattr(p, name))
        for name in ("enter", "leave", "predict"):  # places in a dialogue become places in the row
            rows[name].append(getattr(p, name) + start)
        start += len(p.token_ids)
    row = {name: torch.cat(parts) for name, parts in rows.items()}
    tree = Tree(row["enter"], row["leave"], [block for p in dialogues for block in p.blocks])
    return Batch(dialogues, (row["token_ids"][None], row["position_ids"][None], tree), row["predict"], row["targets"])


def make_batches(packed: Sequence[Packed], config: Config) -> list[list[Batch]]:
    """Return the micro-batches of each mini-batch of an epoch; statistics and update go through the same ones.

    With --shard a forward is a collective call, so all ranks need equally many micro-batches. Ranks with fewer are
    padded with empty ones.
    """
    per_epoch = config.rollout_batch_size // config.minibatch_size
    minibatches = [[p for p in packed if p.minibatch == m] for m in range(per_epoch)]
    parts = [microbatches(minibatch, config.microbatch_tokens) for minibatch in minibatches]
    if config.shard:
        most = [max(counts) for counts in zip(*gather([len(part) for part in parts]), strict=True)]
        parts = [part + [[no_dialogue()]] * (n - len(part)) for part, n in zip(parts, most, strict=True)]
    return [[collate(part) for part in minibatch] for minibatch in parts]


def no_dialogue() -> Packed:
    """Return a dialogue of one token, none of them an action: its loss is an empty sum, and all its gradients are 0."""
    zero, none = torch.zeros(1, dtype=torch.long), torch.zeros(0)
    tree = dict(token_ids=zero, position_ids=zero, enter=zero, leave=zero + 1, blocks=[Block(1, None)])
    actions = dict(predict=none.long(), targets=none.long(), sampler_logprobs=none, advantages=none, returns=none)
    return Packed(minibatch=0, **tree, **actions, spans=[], row_tokens=0)


def policy_hidden(policy: Qwen2ForCausalLM, batch: Batch) -> Tensor:
    """Return the hidden states (N, D) that predict a micro-batch's action tokens."""
    return policy(*batch.inputs)[0, batch.predict]


def critic_values(critic: Critic | ValueHead, batch: Batch, hidden: Tensor | None) -> Tensor:
    """Return values (N,) of the states in which action tokens were sampled: by a trunk, or from the policy's hidden."""
    return critic(hidden) if isinstance(critic, ValueHead) else critic(*batch.inputs)[0, batch.predict]
