"""The memory of an update as torch allocates it, against what `--dry-run` counts: python -m benchmarks.memory_peak smol

    python -m benchmarks.memory_peak qwen05 --lora-rank 16 --checkpointing --dtype bfloat16

One dialogue of the given size is a micro-batch, --microbatches times, of an optimizer step of policy and critic, with
random weights. Measured is what torch allocates beside weights and moments, at its peak (its own record of
allocations); weights and moments are counted. The process (VmHWM) holds more: the interpreter, libraries, memory that
the allocator keeps, and the record itself.
"""

from __future__ import annotations

import argparse

import torch
from torch.profiler import ProfilerActivity, profile

import train_rlpa
from benchmarks.floor import SHAPES
from benchmarks.measure import allocations, extra_peak
from benchmarks.throughput import memory_status
from config import Config
from dry_run.memory import Plan, peak
from dry_run.plan import kernels
from kernels.cpu import HEAD_DIMS, use_cpu
from kernels.ppo_head import WORKSPACE
from kernels.tree_attention import Block
from learners.learner import make_learner
from learners.lora import critic_with_adapter, with_adapter
from model import Critic, Qwen2Config, ValueHead, random_policy
from packing import Packed, TokenTree, collate

Shape = tuple[int, list[int], list[int], int]  # tokens of system, user messages and replies; candidates


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


def make_packed(config: Qwen2Config, shape: Shape) -> tuple[Packed, TokenTree]:
    """Pack a dialogue of this shape, with statistics of any value, and return its tree."""
    tree, actions = grow_tree(*shape)
    layout, zeros = tree.layout(), torch.zeros(len(actions))
    return Packed(
        minibatch=0, token_ids=torch.tensor(tree.token_ids)[layout.order] % config.vocab_size,
        position_ids=torch.tensor(tree.positions)[layout.order], enter=torch.tensor(layout.enter),
        leave=torch.tensor(layout.leave), blocks=[Block(*block) for block in layout.blocks],
        predict=torch.tensor(actions) - 1, targets=torch.zeros(len(actions), dtype=torch.long), sampler_logprobs=zeros,
        spans=[], row_tokens=0, old_logprobs=zeros, ref_logprobs=zeros, values=zeros, advantages=zeros + 1,
        returns=zeros + 1,
    ), tree  # fmt: skip


def measured_step(
    config: Qwen2Config, shape: Shape, micro: int, checkpointing: bool, dtype: torch.dtype, shared: bool, rank: int = 0
) -> tuple[int, Plan]:
    """Run one update of the trainer; return the peak of its bytes without weights and moments, and its plan."""
    packed, tree = make_packed(config, shape)
    settings = Config(ckpt="x", kl_coef=0.0, critic="shared" if shared else "separate")
    policy = random_policy(config, 0)
    if rank:
        base = policy.to(dtype)
        policy, critic = (make(base, rank, 32.0, 0) for make in (with_adapter, critic_with_adapter))
        critic = ValueHead.from_policy(base) if shared else critic
    else:
        critic = ValueHead.from_policy(policy) if shared else Critic.from_policy(policy)
    learners = [make_learner(model, 1e-4, settings, dtype) for model in (policy, critic)]
    for model in (policy,) if shared else (policy, critic):
        model.model.checkpointing = checkpointing
    for learner in learners:  # the optimizers' state is made
        train_rlpa.optimizer_step(learner, 1.0, 1.0)
        learner.optimizer.zero_grad()
    batch = collate([packed])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        for _ in range(micro):
            on_device = batch.to(policy.head_weight)
            train_rlpa.add_gradients(policy, critic, on_device, 1.0, settings, True, None)
            del on_device
        for learner in learners:
            train_rlpa.optimizer_step(learner, 1.0, 1.0)
    in_cpp = use_cpu(policy.head_weight, low=True) and policy.config.head_dim in HEAD_DIMS
    blocks = () if in_cpp else tuple(packed.blocks)
    plan = Plan(
        tokens=len(tree), actions=len(packed.targets), blocks=blocks, several_microbatches=micro > 1,
        cache_tokens=0, workspace=WORKSPACE["cpu"], compute_bytes=dtype.itemsize, reference=False,
        separate_critic=not shared, gradients_in_rollout=False, checkpointing=checkpointing, lora_rank=rank,
        **kernels("cpu", dtype, config.vocab_size),
    )  # fmt: skip
    return extra_peak(allocations(prof), returned=set()), plan


def main() -> None:
    """Measure, and print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    sizes = dict(turns=4, user_tokens=30, reply_tokens=80, candidates=4, microbatches=2, lora_rank=0)
    for name, value in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--critic", choices=("separate", "shared"), default="separate")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--checkpointing", action="store_true")
    o = parser.parse_args()
    shape, dtype = (50, [o.user_tokens] * o.turns, [o.reply_tokens] * o.turns, o.candidates), getattr(torch, o.dtype)
    config = SHAPES[o.shape]
    given = shape, o.microbatches, o.checkpointing, dtype, o.critic == "shared", o.lora_rank
    measured, plan = measured_step(config, *given)
    resident = sum(plan.resident(config).values())
    phase, counted = peak(config, plan)
    total, GB = resident + measured, 1e9
    print(f"{o.shape}, {plan.tokens:,} tree tokens, {vars(o)}")
    print(f"weights and moments {resident / GB:.2f} GB; beside them counted {(counted - resident) / GB:.3f} ({phase}),"
          f" measured {measured / GB:.3f} GB; in all {counted / GB:.2f} / {total / GB:.2f} = {counted / total:.3f};"
          f" process (VmHWM) {memory_status('VmHWM') * 2**20 / GB:.2f} GB")  # fmt: skip


if __name__ == "__main__":
    main()
