"""The memory and work model against what torch allocates, and against the token tree itself."""

from __future__ import annotations

import dataclasses
import doctest
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import memory
from benchmarks.measure import allocations, extra_peak
from dialogue import TokenTree
from kernels import ppo_head
from kernels.tree_attention import Block, make_tree
from memory import Plan, advice, microbatch, peak, phases, report, row_work, tree_blocks, tree_work
from model import Critic, KVCache, Qwen2Config, Qwen2ForCausalLM, random_policy

SHARED = Path(__file__).parents[1].parent / "shared"
WORKSPACE = 16 << 20
LONG = (50, [30] * 6, [54] * 6, 4)  # system, user, reply, n: 1,526 tokens
MIDDLE, SHORT = (40, [20] * 4, [30] * 4, 4), (20, [10] * 2, [10] * 2, 4)  # 600 and 120


def make_config(D: int, I: int, L: int, H: int, tied: bool = True) -> Qwen2Config:  # noqa: E741
    """Make a config with V = 20,000 and two KV heads."""
    return Qwen2Config(20_000, D, I, L, H, 2, tie_word_embeddings=tied)


def grow_tree(system: int, user: list[int], reply: list[int], n: int) -> tuple[TokenTree, list[int]]:
    """Make a dialogue's token tree of ids that never repeat, so that nothing merges; and its action nodes."""
    tree, prompt, fresh, actions = TokenTree(), [], iter(range(10**6)), []
    for turn, (message, length) in enumerate(zip(user, reply, strict=True)):
        prompt = prompt + [next(fresh) for _ in range(message + (0 if turn else system))]
        candidates = [[next(fresh) for _ in range(length)] for _ in range(n)]
        for candidate in candidates:
            actions += tree.insert(prompt + candidate)[len(prompt) :]
        prompt = prompt + candidates[0]
    return tree, actions


def measured_step(config: Qwen2Config, shape: tuple, micro: int, checkpointing: bool) -> tuple[int, Plan]:
    """Run one update of policy and critic; return the peak of its bytes without weights and moments, and its plan."""
    tree, actions = grow_tree(*shape)
    layout = tree.layout()
    blocks = [Block(*block) for block in layout.blocks]
    mask = make_tree(torch.tensor(layout.enter), torch.tensor(layout.leave), blocks, torch.float32)
    token_ids = torch.tensor(tree.token_ids)[layout.order] % config.vocab_size
    inputs = token_ids[None], torch.tensor(tree.positions)[layout.order][None], mask
    predict, targets = torch.tensor(actions) - 1, torch.zeros(len(actions), dtype=torch.long)
    policy = random_policy(config, 0)
    critic = Critic.from_policy(policy)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-4, fused=True) for m in (policy, critic)]
    if checkpointing:
        for layer in [*policy.model.layers, *critic.model.layers]:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)

    def step(times: int) -> None:
        for _ in range(times):
            old, advantages = torch.zeros(len(actions)), torch.ones(len(actions))
            hidden = policy(*inputs)[0, predict]
            loss, _ = ppo_head(hidden, policy.head_weight, targets, old, advantages, workspace_bytes=WORKSPACE)
            loss.backward()
            critic(*inputs)[0, predict].square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()

    for model, optimizer in zip((policy, critic), optimizers, strict=True):  # the optimizers' state is made
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        step(micro)
    plan = Plan(
        tokens=len(tree), actions=len(actions), blocks=tuple(layout.blocks), several_microbatches=micro > 1,
        cache_tokens=0, workspace=WORKSPACE, reference=False, gradients_in_rollout=False, fused=False,
        checkpointing=checkpointing,
    )  # fmt: skip
    masks = sum(m.nbytes for m in mask.masks if m is not None)
    return extra_peak(allocations(prof), returned=set()) + masks, plan


@pytest.mark.parametrize(
    ("config", "shape", "micro", "checkpointing"),
    [
        (make_config(384, 1536, 6, 6), LONG, 1, False),  # 20.7 M parameters: activations rule
        (make_config(384, 1536, 6, 6), MIDDLE, 2, False),
        (make_config(640, 2560, 4, 10), MIDDLE, 1, False),  # 36.4 M
        (make_config(384, 1536, 6, 6), MIDDLE, 1, True),
        (make_config(256, 1024, 6, 4), MIDDLE, 2, True),
        (make_config(512, 1024, 2, 8), SHORT, 1, False),  # gradients rule
        (make_config(512, 1024, 2, 8), SHORT, 2, False),
        (make_config(512, 1024, 2, 8, tied=False), SHORT, 2, False),
    ],
)
def test_peak_of_an_update(config, shape, micro, checkpointing):
    """Guards a model that forgets a saved tensor, a gradient or the head's workspace.

    Weights and moments, which nobody miscounts, are left out of the comparison: they would hide errors.
    """
    measured, plan = measured_step(config, shape, micro, checkpointing)
    predicted = peak(config, plan)[1] - sum(plan.resident(config).values())
    assert predicted == pytest.approx(measured, rel=0.03)


def test_resident_bytes():
    """Guards the bytes of weights and moments, against a real optimizer's."""
    config = make_config(64, 128, 2, 2)
    policy = random_policy(config, 0)
    models = policy, Critic.from_policy(policy)
    resident = Plan(reference=True).resident(config)
    weights = [sum(p.nbytes for p in model.parameters()) for model in models]
    assert [resident["policy"], resident["critic"]] == weights and resident["reference"] == weights[0]
    optimizers = [torch.optim.AdamW(m.parameters(), fused=True) for m in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    moments = [m for o in optimizers for state in o.state.values() for m in state.values() if m.dim()]
    assert resident["optimizer"] == sum(m.nbytes for m in moments)


def test_kv_cache_exactly():
    """Guards a forgotten factor: keys and values, layers, KV heads."""
    config = make_config(64, 128, 3, 4)
    assert memory.kv_bytes(config, 5, 17) == KVCache(config, 5, 17).nbytes
    assert memory.kv_bytes(config, 5, 17, 2) == KVCache(config, 5, 17, torch.bfloat16).nbytes


@pytest.mark.parametrize("size", ["0.5B", "1.5B", "3B", "7B"])
def test_parameters_of_qwen(size):
    """Guards the parameter count at the real shapes, against the modules built without memory."""
    path = SHARED / "qwen2.5" / f"config-{size}-Instruct.json"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    config = Qwen2Config.from_file(path)
    with torch.device("meta"):
        models = Qwen2ForCausalLM(config), Critic(config)
    counts = [sum(p.numel() for p in model.parameters()) for model in models]
    assert counts == [memory.policy_parameters(config), Plan().critic_parameters(config)]


def test_work_is_that_of_the_tree():
    """Guards the closed forms against a real token tree: nodes, actions, and ancestors of all nodes."""
    shape = (12, [5, 7, 3], [11, 4, 9], 3)
    tree, actions = grow_tree(*shape)
    work = tree_work(*shape)
    assert (work.trained, work.decoded) == (len(tree), len(actions))
    assert work.train_pairs == sum(position + 1 for position in tree.positions)
    assert tree_blocks(*shape) == tuple(tree.layout().blocks)


def test_rows_of_the_published_procedure():
    """Guards the per-turn rows: lengths and causal pairs written out, with older replies cut to their response."""
    work = row_work(10, [5, 5, 5], [20, 30, 40], n=2, kept=[8, 9, 9])
    prompts, rows = (15, 40, 63), (35, 70, 103)  # 10+5; 15+20+5; 10+15+8+30
    assert work.prefilled == 2 * sum(prompts) and work.trained == 2 * sum(rows)
    assert work.train_pairs == 2 * sum(length * (length + 1) // 2 for length in rows)


def test_one_candidate_and_one_turn_save_nothing_but_the_seam():
    """Guards an advantage that is claimed where there is none."""
    assert tree_work(10, [5], [20], 1)[:3] == row_work(10, [5], [20], 1)[:3]


def test_advice_names_what_can_be_changed():
    """Guards a message that sends the user to a flag that cannot help."""
    config = make_config(64, 128, 2, 2)
    resident = sum(Plan().resident(config).values())
    roomy = Plan(tokens=100, actions=10, cache_tokens=10, workspace=1 << 20)
    assert advice(config, roomy, 80e9).startswith("fits 80.0 GB")
    wide = dataclasses.replace(roomy, cache_tokens=10**8)
    assert "--decode-batch-size" in advice(config, wide, 1e9)
    long = dataclasses.replace(roomy, tokens=10**6)
    assert "--microbatch-tokens" in advice(config, long, 1e9)
    assert "does not fit" in advice(config, roomy, resident / 2)
    assert "--microbatch-tokens" not in advice(config, long, resident / 2)


def test_smaller_settings_need_less():
    """Guards a sign: each switch that saves memory does."""
    config, plan = make_config(256, 1024, 8, 4), Plan(tokens=4000, actions=3000, cache_tokens=800)
    full = peak(config, plan)[1]
    for saving in (
        dict(separate_critic=False), dict(reference=False), dict(moment_bytes=2), dict(checkpointing=True),
        dict(tokens=2000, actions=1500), dict(several_microbatches=False),
    ):  # fmt: skip
        assert peak(config, dataclasses.replace(plan, **saving))[1] < full, saving


def test_report_of_qwen_3b(capsys):
    """Guards the figures of docs/performance.md: 3B fits one card as the issue says, and the table is aligned."""
    path = SHARED / "qwen2.5" / "config-3B-Instruct.json"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    config = Qwen2Config.from_file(path)
    work = tree_work(50, [39] * 10, [190] * 10, 4)
    tokens, actions, several = microbatch(work, 16_384, 4)
    separate = Plan(
        tokens, actions, (), several, cache_tokens=64 * 2000 + 256 * 400, cache_copies=0, compute_bytes=2,
        gradients_in_rollout=False, checkpointing=True,
    )  # fmt: skip
    shared = dataclasses.replace(separate, separate_critic=False, moment_bytes=2)
    with capsys.disabled():
        for plan, gb in ((separate, 141), (shared, 80)):
            text = report(config, plan, gb * 1e9, work, 3821, memory.calls(3821, 10, 4))
            print(f"\n{text}")
            assert len({len(line) for line in text.splitlines()[: len(phases(config, plan)) + 1]}) == 1
    assert "does not fit" in report(config, separate, 80e9)
    assert "does not fit" not in report(config, shared, 80e9)


def test_examples():
    """Guards the examples of the docstrings."""
    assert doctest.testmod(memory).failed == 0
