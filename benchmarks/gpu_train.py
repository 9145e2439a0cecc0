"""Iterations of a Qwen-2.5 shape, whole: rollout, statistics, update. Phase times, peak memory and MFU go to JSON.

    python -m benchmarks.gpu_train --out train.json [--shape 0.5B] [--critic shared] [--kernels torch]

The weights are random, drawn on the device: nothing is downloaded or saved. The tokenizer is the tiny checkpoint's. An
id of the shape's vocabulary that it lacks decodes to nothing. Such a policy hardly ever samples a stop id, so every
candidate has all its tokens, fails the format and earns 0. The work is the longest possible; nothing is learned. The
user is the embedded one. FILE is written anew after each iteration, so that a run that is cut short leaves what it has
measured. A run of other settings is added to what the file holds.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measure import versions
from command_line.flags import TINY_CHECKPOINT
from config import Config
from dialogue import ChatTokenizer
from kernels import set_backend
from learners.learner import make_learner
from learners.loading import (
    adapt,
    compute_dtype,
    keep_freed_memory,
    let_segments_grow,
    load_all_personas,
    load_or_make_critic,
    own_device,
    set_threads,
)
from learners.processes import take_device
from model import Qwen2Config, Qwen2ForCausalLM, ValueHead
from records import checkpoints
from records.state import State
from simulator import Environment, open_environment
from train_rlpa import run_iteration

V, INSTRUCT = 151_936, dict(max_position_embeddings=32_768, rms_norm_eps=1e-6)
SHAPES = {  # of the checkpoints on the Hub
    "0.5B": Qwen2Config(V, 896, 4864, 24, 14, 2, tie_word_embeddings=True, **INSTRUCT),
    "1.5B": Qwen2Config(V, 1536, 8960, 28, 12, 2, tie_word_embeddings=True, **INSTRUCT),
    "3B": Qwen2Config(V, 2048, 11_008, 36, 16, 2, tie_word_embeddings=True, **INSTRUCT),
    "7B": Qwen2Config(152_064, 3584, 18_944, 28, 28, 4, **INSTRUCT),
    "small": Qwen2Config(1000, 64, 128, 2, 4, 2, tie_word_embeddings=True),  # seconds on a CPU
}
WITH = ("numpy", "transformers")  # packages whose versions are noted, beside torch and triton
WHOLE = dict(rollout_batch_size=32, max_turns=4, max_new_tokens=256)
SMALL = dict(rollout_batch_size=2, minibatch_size=1, max_turns=2, num_candidates=2, max_new_tokens=8)


def random_weights(model: torch.nn.Module, config: Qwen2Config, device: torch.device) -> dict[str, Tensor]:
    """Draw a model's weights on a device, as `random_policy` does on a CPU: 0 for biases, 1 for norms."""
    torch.manual_seed(0)

    def draw(name: str, shape: torch.Size) -> Tensor:
        if len(shape) == 1:
            return (torch.zeros if name.endswith("bias") else torch.ones)(shape, device=device)
        return torch.empty(shape, device=device).normal_(0.0, config.initializer_range)

    return {name: draw(name, tensor.shape) for name, tensor in model.state_dict().items()}


def build(shape: Qwen2Config, weights: dict[str, Tensor]) -> Qwen2ForCausalLM:
    """Build a policy of a shape around these weights."""
    with torch.device("meta"):
        policy = Qwen2ForCausalLM(shape)
    policy.load_state_dict(weights, assign=True)
    return policy


def random_state(shape: Qwen2Config, config: Config, env: Environment) -> State:
    """Make what `records.state.setup` loads: policy, critic and reference of a shape, and the embedded world."""
    let_segments_grow()
    device = own_device()
    dtype = compute_dtype(config, device.type)
    with torch.device("meta"):
        weights = random_weights(Qwen2ForCausalLM(shape), shape, device)
    if config.lora_rank:
        models, ref_policy = adapt(build(shape, {n: w.to(dtype) for n, w in weights.items()}), config, None)
        policy, critic = models["policy"], models.get("critic")
        del weights
    else:
        policy, ref_policy = build(shape, weights), None
        if config.kl_coef:
            ref_policy = build(shape, {n: w.to(dtype, copy=True) for n, w in weights.items()}).requires_grad_(False)
        critic = load_or_make_critic(config, policy, None) if config.advantage == "gae" else None
    for model in (policy, critic):
        if model is not None and not isinstance(model, ValueHead):
            model.model.checkpointing = config.checkpointing
    learner = make_learner(policy, config.lr, config, dtype)
    critic = critic and make_learner(critic, config.critic_lr, config, dtype)
    set_threads(policy, config)
    keep_freed_memory()
    set_backend(config.kernels)
    chat = ChatTokenizer.from_folder(TINY_CHECKPOINT, shape.vocab_size)
    return State(config, chat, learner, critic, ref_policy, *load_all_personas(config), env)


def update_json(file: Path, name: str, found: dict) -> None:
    """Write what one run or part has found so far into a JSON file that holds others'."""
    held = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    checkpoints.write_text(file, json.dumps(held | {name: found}, indent=1) + "\n")  # whole, wherever one is killed


def peak_memory() -> dict[str, float]:
    """Return the peaks of a GPU's memory since the last call, in GiB; {} on a CPU."""
    if not torch.cuda.is_available():
        return {}
    peaks = dict(allocated=torch.cuda.max_memory_allocated(), reserved=torch.cuda.max_memory_reserved())
    torch.cuda.reset_peak_memory_stats()
    return {f"peak_{name}_gib": round(value / 2**30, 3) for name, value in peaks.items()}


def iterate(state: State, name: str, out: Path) -> dict:
    """Run the iterations; write metrics and peaks to `out` after each, and print the phases."""
    found = dict(machine=versions(*WITH), settings=vars(state.config), iterations=[])
    for _ in range(state.num_iterations):
        metrics, _ = run_iteration(state)
        metrics |= peak_memory()
        found["iterations"].append(metrics)
        update_json(out, name, found)
        shown = {k: v for k, v in metrics.items() if k.startswith(("seconds", "peak", "mfu", "tree_tokens", "action_"))}
        print(name, *(f"{key} {value:.4g}" for key, value in shown.items()), sep="  ", flush=True)
    return found


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON to write")
    parser.add_argument("--shape", choices=SHAPES, default="0.5B", help="[0.5B]; small: 2 layers, for a CPU")
    parser.add_argument("--iterations", type=int, default=3, metavar="N", help="[3]")
    parser.add_argument("--critic", choices=("separate", "shared"), default="separate", help="[separate]")
    parser.add_argument("--kernels", choices=("auto", "torch"), default="auto", help="torch: without Triton [auto]")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward")
    args = parser.parse_args()
    take_device()
    lengths = SMALL if args.shape == "small" else WHOLE
    config = Config(
        ckpt=f"random {args.shape}", num_iterations=args.iterations, critic=args.critic, kernels=args.kernels,
        checkpointing=args.checkpointing, **lengths,
    )  # fmt: skip
    name = " ".join([args.shape, args.critic, args.kernels, *["checkpointing"] * args.checkpointing])
    with open_environment(config) as env:
        start = time.perf_counter()
        state = random_state(SHAPES[args.shape], config, env)
        print(f"{name}: models drawn in {time.perf_counter() - start:.1f} s", flush=True)
        iterate(state, name, args.out)


if __name__ == "__main__":
    main()
