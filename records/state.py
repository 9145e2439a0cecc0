"""The state of a run, and its checkpoints: what is saved, how a kill leaves it whole, and how a run goes on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.device_mesh import DeviceMesh

from command_line.flags import run_settings
from config import Config, Natural, flag
from dialogue import ChatTokenizer
from kernels import set_backend
from learners import sharding
from learners.adapters import save_adapter, save_learned
from learners.folder import ADAPTER_WEIGHTS, SINGLE, carried_files, weight_files
from learners.learner import Learner, is_sharded, optimizer_tensors
from learners.loading import (
    keep_freed_memory,
    let_segments_grow,
    load_all_personas,
    load_models,
    load_sharded,
    set_threads,
)
from learners.lora import adapters
from learners.processes import Result, on_rank_0, rank
from learners.weights import save_config, save_pretrained, stored_tensors
from model import Qwen2ForCausalLM
from records import checkpoints
from records.log import FINISHED, RunLog
from simulator import Environment
from untrusted.files import check_value, read_json
from untrusted.plain_text import clean_text, say, shorten, warn
from worlds.personas import Persona

PROGRESS = ("iteration", "updates", "evaluated", "best", "logs", "sources")  # what trainer.json holds of a State
READ = ("ckpt", "adapter", "critic_ckpt", "personas", "eval_personas")  # files that a run's own config.json may name
SOURCES = ("ckpt", "adapter", "personas", "eval_personas")  # those of them that a resumed run reads again
Size = Annotated[int, (0, 2**62)]  # bytes of a file


@dataclass
class State:
    """Everything a run needs and a checkpoint restores."""

    config: Config
    chat: ChatTokenizer
    policy: Learner
    critic: Learner | None  # none with --advantage rloo or grpo
    ref_policy: Qwen2ForCausalLM | None
    personas: list[Persona]
    eval_sets: dict[str, list[Persona]]
    env: Environment
    iteration: Natural = 0  # iterations done
    updates: Natural = 0  # optimizer steps scheduled so far, which is the place in the learning-rate schedule
    evaluated: bool = False  # what is due after the last iteration done has been evaluated
    reward: float = math.nan  # held-out reward of this iteration's policy, if it has been measured
    best: dict[str, float] = field(default_factory=dict)  # name of the best checkpoint, and its held-out reward
    logs: dict[str, Size] = field(default_factory=dict)  # sizes of the run's records at this point
    files: dict[str, bytes] = field(default_factory=dict)  # what is saved beside the policy's weights, by name
    sources: dict[str, str] = field(default_factory=dict)  # SHA-256 of each of SOURCES; rank 0 alone knows them
    saved: str = ""  # name of the checkpoint that this process loaded or wrote last

    def mark(self, log: RunLog | None, evaluated: bool) -> None:
        """Mark a point that a run can be continued from: the records up to here belong to it."""
        self.evaluated = evaluated
        if log:
            self.logs = log.position()

    @property
    def num_iterations(self) -> int:
        """Iterations of the whole run: as asked for, or one pass over the personas, a last partial batch included."""
        return self.config.num_iterations or math.ceil(len(self.personas) / self.config.rollout_batch_size)

    @property
    def schedule_iterations(self) -> int:
        """Iterations over which the learning rates rise and fall; later ones train at the lowest."""
        return self.config.schedule_iterations or self.num_iterations


def setup(config: Config, env: Environment, folder: Path | None = None, mesh: DeviceMesh | None = None) -> State:
    """Load personas, tokenizer and models, fresh or from a checkpoint's folder; with --shard over a mesh."""
    progress = read_progress(folder) if folder else {}
    if folder and rank() == 0:
        check_sources(config, progress["sources"])
    personas, eval_sets = load_all_personas(config)
    let_segments_grow()
    load = load_sharded if mesh and not config.lora_rank else load_models
    policy, critic, ref_policy = load(config, folder, mesh)
    set_threads(policy.model, config)
    keep_freed_memory()
    set_backend(config.kernels)
    source = folder / "policy" if folder else Path(config.ckpt)
    chat = ChatTokenizer.from_folder(source, policy.model.config.vocab_size)
    files = chat.chat_files(carried_files(source), source)  # now, since the folder may change or go while the run lasts
    state = State(config, chat, policy, critic, ref_policy, personas, eval_sets, env, files=files)
    if folder:
        state = replace(state, saved=folder.name, **progress)
        if (Path(config.run_dir) / FINISHED).exists() and state.evaluated and state.iteration >= state.num_iterations:
            raise ValueError(
                f"--resume {config.run_dir}: its {state.iteration} iterations are done; give a larger --num-iterations"
            )
        if state.iteration > state.num_iterations:  # it would never end
            raise ValueError(
                f"--resume {config.run_dir}: {folder.name} lies beyond its {state.num_iterations} iterations; give a"
                " larger --num-iterations"
            )
    elif rank() == 0:
        state.sources = {name: fingerprint(config, name) for name in SOURCES if getattr(config, name)}
    return state


def read_progress(folder: Path) -> dict[str, Any]:
    """Return what a checkpoint's trainer.json holds of a State; ValueError if it holds anything else."""
    hints = get_type_hints(State, include_extras=True)
    progress = {"sources": {}} | read_json(folder / "trainer.json")  # absent: of an earlier version
    check_value(progress, {name: hints[name] for name in PROGRESS}, str(folder / "trainer.json"))
    if len(progress["best"]) > 1:
        raise ValueError(f"{folder / 'trainer.json'}, 'best' names {len(progress['best'])} checkpoints; it names one")
    return progress


def check_sources(config: Config, before: dict[str, str]) -> None:
    """Raise ValueError if a file that a resumed run needs is gone, or another than the one that it began with.

    The checkpoint that it began with is needed for the reference alone, or as the base of adapters.
    """
    needs = {"ckpt": ("lora_rank", "kl_coef"), "adapter": ("kl_coef",)}
    why = {name: next((x for x in settings if getattr(config, x)), "") for name, settings in needs.items()}
    for name in (name for name in SOURCES if name in before and why.get(name, name)):
        path = getattr(config, name)
        try:
            digest = fingerprint(config, name)
        except (OSError, ValueError, SafetensorError) as error:
            needed = f"{flag(why[name])} {getattr(config, why[name]):g} needs it; " if name in why else ""
            raise ValueError(
                f"{flag(name)} {path} cannot be read ({getattr(error, 'strerror', None) or error}); {needed}say where"
                f" it is now: --resume {config.run_dir} {flag(name)} …"
            ) from None
        if digest != before[name]:
            raise ValueError(
                f"{flag(name)} {path} is not what this run began with: its SHA-256 is {digest[:16]}…, not"
                f" {shorten(before[name], 16)}; give the same content"
            )


def fingerprint(config: Config, name: str) -> str:
    """Return the SHA-256 of a persona file, or of the weights in --ckpt or --adapter, in any number of files."""
    path = Path(getattr(config, name))
    if name not in ("ckpt", "adapter"):
        return checkpoints.sha256(path)
    digests = {}
    for file in weight_files(path) if name == "ckpt" else [path / ADAPTER_WEIGHTS]:
        for tensor_name, tensor in stored_tensors(file):
            data = tensor.reshape(-1).view(torch.uint8).numpy()
            digests[tensor_name] = f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(data).hexdigest()}"
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def save_checkpoint(state: State) -> None:
    """Write what --save asks for, in Hugging Face layout, such that a kill anywhere leaves it whole or absent.

    Every rank calls it; rank 0 writes, and all write what is sharded. Raises ValueError on every rank if that fails.
    """
    if state.config.save == "nothing":
        return
    if state.evaluated and math.isfinite(state.reward) and all(state.reward > reward for reward in state.best.values()):
        state.best = {checkpoint_name(state): state.reward}
    folder = Path(state.config.run_dir) / "checkpoints" / checkpoint_name(state)
    whole = state.config.save == "run"

    def write() -> None:
        write_checkpoint(state, temporary) if whole else write_policy(state, temporary)
        checkpoints.publish(temporary, folder)
        checkpoints.prune(folder, state.config.keep_last, *state.best)

    temporary = on_rank_0(lambda: writing(folder, lambda: checkpoints.prepare(folder)))
    if whole:
        writing(folder, lambda: write_shards(state, temporary))
    on_rank_0(lambda: writing(folder, write))
    state.saved = folder.name


def writing(folder: Path, action: Callable[[], Result]) -> Result:
    """Call `action`; where it cannot write, raise a ValueError that tells of the checkpoint."""
    try:
        return action()
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        before = "; those before it are kept" if checkpoints.published(folder.parent) else ", or give another --run-dir"
        raise ValueError(f"{folder} cannot be written: {reason}; make room{before}") from error


def checkpoint_name(state: State) -> str:
    """Return the name of the checkpoint of this state; `.stopped` if the iteration's evaluation is still to come."""
    return f"iteration_{state.iteration:06d}" + ("" if state.evaluated else ".stopped")


def write_checkpoint(state: State, folder: Path) -> None:
    """Write all that a run is continued from: models, optimizers and the place where it stands.

    Random streams need no state: each is derived from the seed and from what it is for (`stream_seed`).
    """
    for name, learner in trained(state).items():
        if is_sharded(learner):
            save_config(learner.model, folder / name, torch.float32)
        else:
            save_learned(learner, folder / name, state.config.ckpt)
            save_file(optimizer_tensors(learner), folder / f"{name}_optimizer.safetensors")
    save_texts(state, folder / "policy")
    progress = {name: getattr(state, name) for name in PROGRESS}
    (folder / "trainer.json").write_text(json.dumps(progress) + "\n", encoding="utf-8")


def write_policy(state: State, folder: Path) -> None:
    """Write the policy alone, as it samples: no fp32 masters but of adapters, and no run goes on from it."""
    if adapters(state.policy.model):
        save_adapter(state.policy, folder / "policy", state.config.ckpt)
    else:
        save_pretrained(state.policy.sampled, folder / "policy")
    save_texts(state, folder / "policy")


def write_shards(state: State, folder: Path) -> None:
    """Write the weights and moments that are sharded, in the files that `write_checkpoint` writes of whole ones."""
    for name, learner in trained(state).items():
        if is_sharded(learner):
            sharding.save(learner.masters, folder / name)
            moments = folder / f".{name}_optimizer"
            sharding.save(optimizer_tensors(learner), moments, math.inf)
            if rank() == 0:
                (moments / SINGLE).rename(folder / f"{name}_optimizer.safetensors")
                moments.rmdir()


def trained(state: State) -> dict[str, Learner]:
    """Return what is trained, by its name in a checkpoint."""
    return {"policy": state.policy} | ({"critic": state.critic} if state.critic else {})


def save_texts(state: State, folder: Path) -> None:
    """Write what makes a saved policy a chat model elsewhere: what its folder brought, and what was missing."""
    for name, content in state.files.items():
        (folder / name).write_bytes(content)


def newest_checkpoint(run_dir: str) -> Path:
    """Return a run's newest whole checkpoint, warning of damaged ones in one line each; ValueError if there is none."""
    try:
        return checkpoints.newest(Path(run_dir) / "checkpoints", warn)
    except ValueError as error:
        raise ValueError(f"--resume {run_dir}: {error}; start the run anew with --run-dir and --overwrite") from None


def resume_point(config: Config) -> Path:
    """Return the checkpoint that a resumed run goes on from, and say so, with the files that are read beside it."""
    folder = newest_checkpoint(config.run_dir)
    named = [(name, getattr(config, name)) for name in READ]
    files = ", ".join(f"{flag(name)} {clean_text(path)}" for name, path in named if path)
    say(f"going on from {clean_text(str(folder))}; read, as the run's config.json names them: {files}")
    return folder


def go_on_after_restart(config: Config, store: dist.Store | None) -> Config:
    """Return the settings with which processes go on that torchrun has restarted: in the run folder that they had.

    From its newest checkpoint, or, as long as there was none to go on from (--save), from the start.
    """
    if store is None or not store.check(["run_dir"]):
        return config
    run_dir = store.get("run_dir").decode()
    begun = config.save == "run" and bool(checkpoints.published(Path(run_dir) / "checkpoints"))
    dtype = run_settings(Path(run_dir))["dtype"] if begun else config.dtype  # as it was chosen then
    return replace(config, run_dir=run_dir, resume=run_dir if begun else "", overwrite=not begun, dtype=dtype)
