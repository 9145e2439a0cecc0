"""What a run would need, worked out from its settings alone: `--dry-run`."""

from __future__ import annotations

import os

import torch

from config import HERE, Config, dry_run_devices, has_own_trunk
from dry_run import memory
from kernels import cpu
from kernels.ppo_head import WORKSPACE
from learners.loading import compute_dtype, load_all_personas
from learners.processes import world_size
from model import Qwen2Config


def dry_run(config: Config) -> str:
    """Say what the run would need (`memory.py`): bytes per device in each phase, tokens and calls. Nothing is loaded.

    Lengths are the longest that the flags allow: every user message and every sampled turn at its limit.
    """
    model, here = Qwen2Config.from_file(config.ckpt), config.dry_run == HERE
    devices, gigabytes = (0, 0.0) if here else dry_run_devices(config)
    processes = devices or world_size()
    device = "cuda" if torch.cuda.is_available() or not here else "cpu"
    turns, n = config.max_turns, config.num_candidates
    work = memory.tree_work(50, [config.max_user_tokens + 9] * turns, [config.max_new_tokens] * turns, n)
    per_rank = max(1, config.minibatch_size // processes)
    tokens, actions, several = memory.microbatch(work, config.microbatch_tokens, per_rank)
    dtype = compute_dtype(config, device)
    plan = memory.Plan(
        tokens,
        actions,
        several_microbatches=several,
        cache_tokens=cache_slots(config, model, processes, dtype.itemsize),
        workspace=WORKSPACE[device],
        reference=bool(config.kl_coef),
        compute_bytes=dtype.itemsize,
        critic=config.advantage == "gae",
        separate_critic=has_own_trunk(config),
        gradients_in_rollout=False,
        **kernels(device, dtype, model.vocab_size),
        checkpointing=config.checkpointing,
        lora_rank=config.lora_rank,
        shards=processes * config.shard,
    )
    if not here:
        room = gigabytes * 1e9
    elif device == "cuda":
        room = torch.cuda.get_device_properties(0).total_memory
    else:
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / processes
    personas, _ = load_all_personas(config)  # a bad file is told here, before anything is paid for
    dialogues = config.num_iterations * config.rollout_batch_size or len(personas)
    judge_calls = bool(config.judge_url) + (config.profile_judge == "http")
    calls = memory.calls(dialogues, turns, n, judge_calls, bool(config.first_user_message))
    return memory.report(model, plan, room, work, dialogues, calls)


def kernels(device: str, dtype: torch.dtype, V: int) -> dict[str, bool | str]:
    """Say by what layers and head are computed, as `Plan` names it."""
    if device == "cuda":
        return dict(fused=True, head="cuda")
    low = torch.zeros(16, 16, dtype=dtype)
    products = cpu.multiplies(low, low, low.float())
    return dict(fused=cpu.passes(low, 16), head="torch" if not products else "in place" if V >= cpu.LONG else "cuda")


def cache_slots(config: Config, model: Qwen2Config, processes: int, itemsize: int) -> int:
    """Count the slots of one process's KV cache: those of the dialogues that decode, or what --kv-gib allows."""
    rows = min(config.decode_batch_size, -(-config.rollout_batch_size // processes))  # parked ones take what is left
    longest = 50 + config.max_turns * (config.max_user_tokens + 9 + config.max_new_tokens)
    slots = rows * (longest + config.num_candidates * config.max_new_tokens)
    if config.kv_gib:
        slots = min(slots, int(config.kv_gib * 2**30) // memory.kv_bytes(model, 1, 1, itemsize))
    return slots
