"""The peak of memory of one process, measured beside counted (`dry_run/memory.py`), with whole models and with --shard.

    python -m benchmarks.scaling                 # 1, 2 and 4 processes, a random model of 41 M parameters, fp32, gloo

Measured is what a process's resident set grew by at its fullest, from before its models are loaded to after two
optimizer steps over four dialogues of 120 tokens, one a micro-batch; gloo's buffers included.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from collections.abc import Iterable
from pathlib import Path

from benchmarks import invariance
from benchmarks.scaling_table import tree_blocks
from config import Config
from dialogue import Candidate, Dialogue, Turn
from dry_run import memory
from kernels.cpu import HEAD_DIMS, use_cpu
from kernels.ppo_head import WORKSPACE
from learners import processes
from learners.weights import save_pretrained
from model import Qwen2Config, random_policy

SHAPE = Qwen2Config(20_000, 512, 2_048, 8, num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=True)
LENGTHS = (20, [10] * 2, [10] * 2, 4)  # system, user, reply, candidates
RANKS = (1, 2, 4)
CASE = {"microbatch_tokens": 1, "rollout_batch_size": 4, "num_epochs": 2}


def resident(key: str) -> int:
    """Return a figure of this process's memory in bytes: VmRSS now, VmHWM at its fullest."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def long_dialogue(index: int) -> Dialogue:
    """Make a dialogue of LENGTHS whose tokens do not repeat at a branch."""
    system, user, reply, n = LENGTHS
    fresh = iter(range(index, 10**6, 7))
    take = lambda count: [next(fresh) % SHAPE.vocab_size for _ in range(count)]  # noqa: E731
    dialogue, history = Dialogue(index, str(index), ()), take(system)
    for message, length in zip(user, reply, strict=True):
        history = history + take(message)
        candidates = [
            Candidate(token_ids=take(length), logprobs=[-10.0] * length, stop_reason="stop") for _ in range(n)
        ]
        dialogue.turns.append(Turn("", history, candidates))
        history = history + candidates[0].token_ids
    return dialogue


def measured(config: Config, owned: Iterable[int]) -> dict:
    """Run a case, and give every process's growth at its fullest, in bytes."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the fullest so far is what there is now
    before = resident("VmRSS")
    invariance.run_update(config, [long_dialogue(i) for i in owned])
    grown = processes.gather(resident("VmHWM") - before)
    return {"bytes": invariance.torch.tensor(grown)}


def predicted(ranks: int, shard: bool) -> float:
    """Return the counted peak in bytes."""
    work = memory.tree_work(*LENGTHS)
    policy = random_policy(Qwen2Config(64, 64, 64, 1, 1, 1), 0)
    in_cpp = use_cpu(policy.head_weight) and SHAPE.head_dim in HEAD_DIMS
    plan = memory.Plan(
        work.trained, work.decoded, () if in_cpp else tree_blocks(*LENGTHS), several_microbatches=ranks < 4,
        cache_tokens=0, workspace=WORKSPACE["cpu"], gradients_in_rollout=False, fused=False, head="torch",
        shards=ranks * shard,
    )  # fmt: skip
    return memory.peak(SHAPE, plan)[1]


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 18)  # glibc gives back what was freed: measured is what is used
    print(f"{memory.policy_parameters(SHAPE) / 1e6:.1f} M parameters, {platform.machine()}, {platform.system()}")
    print(f"{'processes':>9} {'shard':>5} {'counted MB':>10} {'measured MB, of each process'}")
    with tempfile.TemporaryDirectory() as name:
        save_pretrained(random_policy(SHAPE, seed=0), name)
        for ranks in RANKS:
            for shard in (False, True):
                config = invariance.settings(Path(name), shard=shard, **CASE)
                owners = [list(range(number, 4, ranks)) for number in range(ranks)]
                found = invariance.run_cases(ranks, {"case": (config, owners)}, measured)["case"]
                shown = " ".join(f"{x / 1e6:.0f}" for x in found["bytes"].tolist())
                counted = predicted(ranks, shard) / 1e6
                print(f"{ranks:9d} {'yes' if shard else 'no':>5} {counted:10.0f} {shown}", flush=True)


if __name__ == "__main__":
    main()
