"""What a run loads before its first iteration: policy, critic and reference, whole or in shards, and the personas."""

from __future__ import annotations

import ctypes
import os
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from config import HERE, Config, has_own_trunk
from learners import sharding
from learners.adapters import load_adapter, with_saved_adapter
from learners.learner import Learner, is_sharded, load_optimizer, make_learner
from learners.lora import critic_with_adapter, with_adapter
from learners.processes import rank
from learners.weights import load_critic, load_policy, load_value_head
from model import Critic, Qwen2Config, Qwen2ForCausalLM, ValueHead, draw_value_head
from untrusted.plain_text import say, warn
from worlds.first import generate_personas
from worlds.personas import Persona, load_personas

TINY, LARGE = 10_000_000, 50_000_000  # parameters: below the first one thread, from the second on perhaps bf16


def load_models(
    config: Config, folder: Path | None, mesh: DeviceMesh | None = None
) -> tuple[Learner, Learner | None, Qwen2ForCausalLM | None]:
    """Load policy, critic and frozen reference, if any; the first two from a checkpoint's folder, if one is given.

    What is trained is fp32, for the masters. mesh: the processes that share out the base of adapters.
    """
    device = own_device()
    dtype = compute_dtype(config, device.type)
    if config.lora_rank:
        base = load_policy(config.ckpt, dtype=dtype, device=device).requires_grad_(False)
        models, ref_policy = adapt(sharding.shard_base(base, mesh) if mesh else base, config, folder)
    else:
        models = {"policy": load_policy(folder / "policy" if folder else config.ckpt, device=device)}
        if config.advantage == "gae":
            models["critic"] = load_or_make_critic(config, models["policy"], folder)
        ref_policy = load_policy(config.ckpt, dtype=dtype, device=device) if config.kl_coef else None
    if ref_policy:
        ref_policy.requires_grad_(False)
    learners = {}
    for (name, model), lr in zip(models.items(), (config.lr, config.critic_lr), strict=False):
        if not isinstance(model, ValueHead):
            model.model.checkpointing = config.checkpointing
        learners[name] = make_learner(model, lr, config, dtype)
        if folder:
            load_optimizer(learners[name], folder / f"{name}_optimizer.safetensors")
    return learners["policy"], learners.get("critic"), ref_policy


def adapt(
    base: Qwen2ForCausalLM, config: Config, folder: Path | None
) -> tuple[dict[str, nn.Module], Qwen2ForCausalLM | None]:
    """Put the adapters of policy and critic, if any, on a base, which is held once; return them and the reference.

    The reference is the base. Of a policy that came as an adapter (--adapter) it is the base with that adapter.
    """
    given = base, config.lora_rank, config.lora_alpha, config.seed
    models: dict[str, nn.Module] = {"policy": with_adapter(*given)}
    if has_own_trunk(config):
        models["critic"] = critic_with_adapter(*given)
    adapted = list(models)
    if config.critic == "shared" and config.advantage == "gae":
        models["critic"] = load_or_make_critic(config, base, folder)
    starts = {"policy": config.adapter, "critic": config.critic_ckpt or config.adapter}
    for name in adapted:
        if start := folder / name if folder else starts[name]:
            load_adapter(models[name], Path(start))
    if not config.kl_coef:
        return models, None
    return models, with_saved_adapter(base, Path(config.adapter)) if config.adapter else base


def load_sharded(
    config: Config, folder: Path | None, mesh: DeviceMesh
) -> tuple[Learner, Learner | None, Qwen2ForCausalLM | None]:
    """Do what `load_models` does, with the rows of this process alone, and a copy of the policy that samples."""
    device = own_device()
    dtype = compute_dtype(config, device.type)
    start = folder / "policy" if folder else config.ckpt
    policy = make_learner(sharding.load(Qwen2ForCausalLM, start, mesh, dtype=dtype), config.lr, config)
    policy.sampled = load_policy(start, dtype=dtype, device=device).requires_grad_(False)
    critic, ref_policy = None, None
    if has_own_trunk(config):
        critic = make_learner(load_sharded_critic(config, policy.model, folder, mesh, dtype), config.critic_lr, config)
    elif config.advantage == "gae":
        critic = make_learner(load_or_make_critic(config, policy.model, folder), config.critic_lr, config, dtype)
    for name, learner in (("policy", policy), ("critic", critic)):
        if learner and is_sharded(learner):
            learner.model.model.checkpointing = config.checkpointing
        if learner and folder:
            load_optimizer(learner, folder / f"{name}_optimizer.safetensors")
    if config.kl_coef:
        ref_policy = sharding.load(Qwen2ForCausalLM, config.ckpt, mesh, dtype=dtype, stored=dtype).requires_grad_(False)
    return policy, critic, ref_policy


def load_sharded_critic(
    config: Config, policy: Qwen2ForCausalLM, folder: Path | None, mesh: DeviceMesh, dtype: torch.dtype
) -> Critic:
    """Do what `load_or_make_critic` does for a critic with a trunk of its own."""
    if path := folder / "critic" if folder else config.critic_ckpt:
        return sharding.load(Critic, path, mesh, dtype=dtype)
    return sharding.critic_from_policy(policy, draw_value_head(policy, config.seed), mesh, dtype)


def own_device() -> torch.device:
    """Return the device of this process."""
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")


def load_or_make_critic(config: Config, policy: Qwen2ForCausalLM, folder: Path | None) -> Critic | ValueHead:
    """Load the critic of a checkpoint's folder or of --critic-ckpt; without either, make one from the policy."""
    path = folder / "critic" if folder else config.critic_ckpt
    device = policy.head_weight.device
    if config.critic == "shared":
        return load_value_head(path, device=device) if path else ValueHead.from_policy(policy, config.seed)
    return load_critic(path, device=device) if path else Critic.from_policy(policy, config.seed)


def compute_dtype(config: Config, device: str) -> torch.dtype:
    """Return the dtype of weights and products on a type of device; on a CPU `choose_dtype` may have decided before.

    >>> compute_dtype(Config(), "cpu"), compute_dtype(Config(), "cuda")
    (torch.float32, torch.bfloat16)
    """
    name = config.dtype if config.dtype != "auto" else {"cuda": "bfloat16", "cpu": "float32"}[device]
    return getattr(torch, name)


def choose_dtype(config: Config) -> Config:
    """Decide --dtype auto for a fresh run on a CPU by measuring, and say so; of a small model nothing changes.

    Some CPUs multiply in bf16 twice as fast as in fp32, some a hundred times as slowly. A resumed run keeps what its
    settings hold.
    """
    here = config.dry_run in ("", HERE) and not (config.merge or config.resume or torch.cuda.is_available())
    if config.dtype != "auto" or not here:
        return config
    shape = Qwen2Config.from_file(config.ckpt)
    with torch.device("meta"):
        size = sum(p.numel() for p in Qwen2ForCausalLM(shape).parameters())
    if size < LARGE:
        return config
    torch.set_num_threads(count_threads(size, config))
    rates = {dtype: product_rate(shape, dtype) / 1e9 for dtype in (torch.bfloat16, torch.float32)}
    low, wide = rates.values()
    name = "bfloat16" if low > 1.3 * wide else "float32"
    say(f"--dtype {name}: {torch.get_num_threads()} threads do {low:.3g} GFLOP/s in bf16 and {wide:.3g} in fp32")
    return replace(config, dtype=name)


def product_rate(shape: Qwen2Config, dtype: torch.dtype, seconds: float = 0.25) -> float:
    """Measure FLOP/s of products like an MLP's: the best of several, because other programs may run."""
    weight = torch.ones(shape.intermediate_size, shape.hidden_size, dtype=dtype)

    def took(rows: int) -> float:
        x, start = torch.ones(rows, shape.hidden_size, dtype=dtype), time.perf_counter()
        F.linear(x, weight)
        return time.perf_counter() - start

    end = time.perf_counter() + seconds
    rows, best = 16, min(took(16) for _ in range(4))  # few rows first: where products are very slow, that is enough
    if best * 32 < seconds:
        rows, best = 512, took(512)
        while time.perf_counter() < end:
            best = min(best, took(512))
    return 2 * rows * weight.numel() / best


def load_all_personas(config: Config) -> tuple[list[Persona], dict[str, list[Persona]]]:
    """Return training personas and named evaluation sets; only sets from --eval-personas may share some with them."""
    say = warn if rank() == 0 else lambda text: None  # all processes read the files, one of them tells
    if config.personas:
        personas = load_personas(config.personas, say)
    else:
        personas = synthetic_personas(config, "train", config.seed)
    if config.eval_personas:
        return personas, {"heldout": load_personas(config.eval_personas, say)}
    if not config.personas:  # the same for every --seed, so that runs can be compared
        return personas, {name: synthetic_personas(config, name, 0) for name in ("heldout", "unseen")}
    if len(personas) < 2:
        raise ValueError(
            f"{config.personas} holds one persona; give more, or --eval-personas to evaluate on another file"
        )
    heldout = personas[9::10] or personas[-1:]
    return [p for p in personas if p not in heldout], {"heldout": heldout}


def synthetic_personas(config: Config, split: str, seed: int) -> list[Persona]:
    """Make the personas of one split of the embedded world, as many as training or an evaluation needs."""
    n = config.num_personas if split == "train" else config.eval_dialogues
    return [Persona(f"{split}-{i}", tuple(facts)) for i, facts in enumerate(generate_personas(n, seed, split))]


def set_threads(policy: nn.Module, config: Config) -> None:
    """Choose CPU threads."""
    torch.set_num_threads(count_threads(sum(p.numel() for p in policy.parameters()), config))


def count_threads(size: int, config: Config) -> int:
    """Return the threads of a process whose model has so many parameters, by rule.

    With a tiny model a second thread costs more in waiting than it computes. A large one takes its share of the cores
    that this machine's processes may use: a thread more than there are cores would let all others wait for it.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return config.threads or (1 if size < TINY else max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def let_segments_grow() -> None:
    """Let torch's CUDA allocator map memory page by page, unless the environment says otherwise; call it before CUDA.

    Else what updates free lies in pieces, and no later KV cache fits into one of them.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        # Torch reads it once, when it first needs a setting of the allocator: later than at its import.
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks up to 32 MiB: given back, each of the next forward's temporaries is paged in anew.

    On a CPU that made a norm over 4,000 tokens 6 to 10 times as slow. Elsewhere than with glibc nothing is done.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD: free space at the heap's end that is kept
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: larger blocks come from the system one by one
