"""One global batch, cut up in every way: how far losses, gradients and weights differ from those of one process.

    python -m benchmarks.invariance              # processes × micro-batches, plain and --shard, and which settings
    python -m benchmarks.invariance --ranks 2    # with 2 processes only

Eight random dialogues of different lengths, two optimizer steps, random weights of two layers, fp32, gloo. The
reference is one process without --shard, all dialogues of a step in one micro-batch. Gradients are those of the first
step, summed over all processes; weights and moments are taken after the second.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

import train_rlpa
from command_line.exits import lasting_output
from config import Config
from dialogue import Candidate, Dialogue, Turn
from learners import processes, sharding
from learners.learner import Learner, optimizer_tensors
from learners.loading import load_models, load_sharded
from learners.weights import save_pretrained
from model import Qwen2Config, random_policy
from packing import make_batches, pack

SHAPE = Qwen2Config(61, 32, 48, 2, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
UNTIED = dataclasses.replace(SHAPE, tie_word_embeddings=False)
MICROBATCHES = (1, 60, 100_000)  # --microbatch-tokens: every dialogue alone, some together, a whole step at once
VARIANTS = {  # settings beside the defaults of `settings`
    "": {},
    "--checkpointing": {"checkpointing": True},
    "--critic shared": {"critic": "shared"},
    "--advantage grpo": {"advantage": "grpo"},
    "--kl-estimator k3 --num-epochs 2": {"kl_estimator": "k3", "num_epochs": 2},
    "--kl-estimator exact": {"kl_estimator": "exact"},
    "--kl-coef 0 --old-logprobs sampler": {"kl_coef": 0.0, "old_logprobs": "sampler"},
}


def settings(folder: Path, **changes) -> Config:
    """Give the settings of a case; old log-probs are the trainer's, since nobody has sampled."""
    given = {"rollout_batch_size": 8, "minibatch_size": 4, "lr": 1e-4, "critic_lr": 1e-4, "old_logprobs": "trainer"}
    return Config(ckpt=str(folder), **given | {"kl_coef": 0.1, "entropy_coef": 0.01} | changes)


def write_policy(folder: Path, shape: Qwen2Config) -> Path:
    """Write a policy of large random weights, so that every token counts."""
    policy = random_policy(shape, seed=0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    save_pretrained(policy, folder)
    return folder


def random_dialogue(index: int) -> Dialogue:
    """Make a dialogue of random ids with random rewards: 2 to 3 turns of 2 candidates."""
    rng = random.Random(index)
    dialogue, history = Dialogue(index, str(index), ()), []
    for _ in range(rng.randint(2, 3)):
        history = history + [rng.randrange(60) for _ in range(rng.randint(2, 5))]
        candidates = []
        for _ in range(2):
            ids = [rng.randrange(60) for _ in range(rng.randint(2, 9))]
            logprobs = [-4.0 - rng.random() / 10 for _ in ids]
            parts = {"profile": rng.random(), "response": float(rng.random() < 0.5)}
            candidates.append(Candidate(
                token_ids=ids, logprobs=logprobs, stop_reason="stop", profile_tokens=1, parts=parts,
                reward=sum(parts.values()),
            ))  # fmt: skip
        dialogue.turns.append(Turn("", history, candidates, chosen=rng.randrange(2)))
        history = history + candidates[dialogue.turns[-1].chosen].token_ids
    return dialogue


def whole(tensor: Tensor) -> Tensor:
    """Give a copy of a tensor, gathered if it is sharded."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


class Trained(NamedTuple):
    """What an update leaves."""

    learners: dict[str, Learner]
    gradients: dict[str, Tensor]  # of the first step, by name
    metrics: dict[str, float]


def run_update(config: Config, dialogues: list[Dialogue], gradients: bool = False) -> Trained:
    """Train once on the dialogues that this process owns."""
    mesh = sharding.make_mesh() if config.shard else None
    load = load_sharded if mesh and not config.lora_rank else load_models
    policy, critic, ref_policy = load(config, None, mesh)
    learners = {"policy": policy} | ({"critic": critic} if critic else {})
    packed = [pack(dialogue, config) for dialogue in dialogues]
    batches = make_batches(packed, config)
    models = policy.model, ref_policy, critic and critic.model
    train_rlpa.add_statistics(batches, *models, config, policy.sampled)
    for p in packed:
        train_rlpa.add_advantages(p, config) if critic else train_rlpa.add_group_advantages(p, config)
    train_rlpa.whiten_advantages(packed, config.advantage)
    found = first_gradients(learners, batches[0], config, ref_policy) if gradients else {}
    return Trained(learners, found, train_rlpa.update(policy, critic, batches, config, (2, 10), True, ref_policy))


def run_case(config: Config, owned: Sequence[int]) -> dict[str, Tensor]:
    """Train once on some of the dialogues; give metrics, gradients, weights and moments by name."""
    learners, found, metrics = run_update(config, [random_dialogue(i) for i in owned], gradients=True)
    found |= {f"metric {name}": torch.tensor(float(value)) for name, value in metrics.items()}
    for name, learner in learners.items():
        found |= {f"weight {name} {key}": whole(master) for key, master in learner.masters.items()}
        found |= {f"moment {name} {key}": whole(x) for key, x in optimizer_tensors(learner).items()}
    if (replica := learners["policy"].sampled) is not learners["policy"].model:
        found |= {f"replica {key}": whole(weight) for key, weight in replica.named_parameters()}
    return found


def first_gradients(learners: dict[str, Learner], minibatch: list, config: Config, ref_policy) -> dict[str, Tensor]:
    """Give the gradients of the first step, summed over all processes, and drop them again."""
    policy, critic = learners["policy"], learners.get("critic")
    for batch in minibatch:
        batch = batch.to(policy.sampled.head_weight)
        train_rlpa.add_gradients(policy.model, critic and critic.model, batch, 100.0, config, True, ref_policy)
    found = {}
    for name, learner in learners.items():
        processes.all_sum_gradients(p for p in learner.masters.values() if not isinstance(p, DTensor))
        found |= {f"gradient {name} {key}": whole(master.grad) for key, master in learner.masters.items()}
        learner.optimizer.zero_grad()
    return found


Cases = dict[str, tuple[Config, list[list[int]]]]  # by name: settings, and who owns which dialogues
Run = Callable[[Config, Sequence[int]], dict[str, Tensor]]


def work(number: int, size: int, folder: Path, cases: Cases, run: Run) -> None:
    """Run cases as one of several processes; rank 0 writes what was found."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=size)
    try:
        for name, (config, owners) in cases.items():
            found = run(config, owners[number])
            if number == 0:
                save_file(found, folder / f"{name}.safetensors")
    finally:
        torch.distributed.destroy_process_group()


def run_cases(size: int, cases: Cases, run: Run = run_case) -> dict[str, dict[str, Tensor]]:
    """Run cases in `size` processes; give what rank 0 found."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        multiprocessing.set_forkserver_preload(["train_rlpa", "learners.sharding"])  # imported once for all processes
        mp.start_processes(work, (size, folder, cases, run), nprocs=size, start_method="forkserver")
        return {name: load_file(folder / f"{name}.safetensors") for name in cases}


def dealt(size: int) -> list[list[int]]:
    """Deal the eight dialogues out as `train_rlpa.persona_batch` does."""
    return [list(range(number, 8, size)) for number in range(size)]


def difference(found: dict[str, Tensor], reference: dict[str, Tensor], kind: str) -> float:
    """Give the largest absolute difference among values of a kind."""
    names = [name for name in reference if name.startswith(kind)]
    return max((found[name].double() - reference[name].double()).abs().max().item() for name in names)


KINDS = ("metric", "gradient", "weight", "moment")


@lasting_output()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4], help="numbers of processes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = write_policy(Path(name), SHAPE)
        references = {v: run_case(settings(folder, **changes), range(8)) for v, changes in VARIANTS.items()}
        columns = f"{'processes':>9} {'shard':>5} {'micro-batch':>11} "
        print(columns + " ".join(f"{kind:>9}" for kind in KINDS) + "  settings")
        for size in args.ranks:
            cases = {
                f"{shard:d}|{tokens}|{v}": (settings(folder, shard=shard, microbatch_tokens=tokens, **c), dealt(size))
                for shard in (False, True) for v, c in VARIANTS.items() for tokens in (MICROBATCHES if not v else (60,))
            }  # fmt: skip
            for name, found in run_cases(size, cases).items():
                shard, tokens, variant = name.split("|")
                cells = " ".join(f"{difference(found, references[variant], kind):9.1e}" for kind in KINDS)
                print(f"{size:9d} {'yes' if shard == '1' else 'no':>5} {tokens:>11} {cells}  {variant}", flush=True)


if __name__ == "__main__":
    main()
