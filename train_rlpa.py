"""RLPA in one file: a chat model learns, by PPO against a simulated user, to infer who it is talking to.

    torchrun train_rlpa.py --ckpt                       the tiny checkpoint in the embedded world, on a CPU
    torchrun train_rlpa.py --ckpt Qwen/Qwen2.5-3B-Instruct --simulator-url URL --judge-url URL --personas FILE

One iteration, in the order of this file:

    rollout      every dialogue of the batch is played: user message (HTTP) → n candidate turns → rewards → best goes on
    pack         each dialogue becomes a tree of tokens, and each token is computed once
    statistics   old and reference log-probs and values, under the weights that sampled
    advantages   per-token rewards → GAE within a turn (credit "turn") or along the chosen path (credit "dialogue");
                 or, without a critic, each candidate against the others of its turn (advantage "rloo", "grpo")
    update       clipped PPO loss for the policy, clipped value loss for the critic, normalised by global token counts

Exit codes: 0 done, or saved after SIGTERM; 1 a process of the run is lost; 2 a bad flag, file or checkpoint; 75 user or
judge stayed away, or lost too many dialogues, and what was finished is saved; 130 saved after Ctrl-C. (torchrun turns
those of its processes into 1.)

Changed against the published code: README, "What differs from the paper". Letters: T tree tokens in a micro-batch, N
action tokens (sampled ids), D hidden, V vocabulary.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import hashlib
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import rewards
import sharding
import world
from command_line import exits
from command_line.flags import field_comments
from dialogue import HISTORY_PROFILES, Candidate, ChatTokenizer, Dialogue, TokenTree, open_turn
from dry_run import memory
from kernels import BACKENDS, linear_logprob, ppo_head, set_backend
from kernels.backend import use_triton
from kernels.ppo_head import WORKSPACE
from kernels.tree_attention import Block, Tree, make_tree
from model import (
    SINGLE,
    Critic,
    Qwen2Config,
    Qwen2ForCausalLM,
    ValueHead,
    draw_value_head,
    load_critic,
    load_policy,
    load_value_head,
    resolve_checkpoint,
    save_config,
    save_pretrained,
    stored_tensors,
)
from processes import (
    AgreedError,
    LostProcess,
    Result,
    agree,
    all_max,
    all_sum,
    all_sum_gradients,
    attempt,
    catch_signals,
    computing,
    gather,
    join_processes,
    launcher_store,
    on_rank_0,
    rank,
    together,
    wait_for_ranks,
    world_size,
)
from records import checkpoints
from records.log import FINISHED, RunLog, claim_folder, episode_record, show_transcripts
from records.metrics import rates, sum_counters, tally
from records.perplexity import HELDOUT_FILE, perplexity, read_texts, text_scores
from sampler import Draw, Sampler
from simulator import ChatClient, ChatError, Persona, Tape, load_personas, simulator_messages, start_embedded_server
from throttle import Quota

TINY_CHECKPOINT = Path(__file__).parent / "tiny"

# ---------------------------------------------------------------------------------------------------------------------
# Configuration


@dataclass
class Config:
    """All settings, flat. The defaults are the published ones; a checkpoint folder may bring its own in `rlpa.json`."""

    ckpt: str = ""  # policy to start from: a Hugging Face folder or hub id; bare --ckpt is the tiny checkpoint
    critic_ckpt: str = ""  # critic to start from; empty: a copy of the policy with a fresh value head
    run_dir: str = ""  # where everything is written; empty: runs/<date-time>
    overwrite: bool = False  # remove the run that --run-dir holds already
    resume: str = ""  # a run folder to go on with from its newest whole checkpoint; all other settings come from it
    seed: int = 0  # every random stream is derived from it and from what the stream is for
    # personas, user and judge
    personas: str = ""  # JSONL file of personas; empty: synthetic ones of the embedded world
    eval_personas: str = ""  # JSONL file for evaluation; empty: every tenth of --personas, or synthetic held-out ones
    num_personas: int = 4096  # how many synthetic training personas to make when --personas is not given
    simulator_url: str = ""  # OpenAI-compatible endpoint that plays the user, or several: URL,URL; empty: the embedded
    simulator_model: str = "rule-user"  # model name to ask it for
    judge_url: str = ""  # OpenAI-compatible endpoint that gives the five verdicts, or several; empty: by rule
    judge_model: str = "judge"  # model name to ask it for
    profile_judge: str = "rule"  # who counts matching profile lines: rule (deterministic) or http (the judge endpoint)
    api_key_env: str = ""  # environment variable that holds the endpoints' key; empty: none is sent
    request_timeout: float = 120.0  # seconds for one request, retries included; a third of it may pass in silence
    max_retries: int = 10  # tries after the first, for connection errors, 408, 409, 429 and 5xx
    max_concurrency: int = 64  # requests in flight per process
    requests_per_minute: float = 0.0  # most of them, to user and judge together, of all processes; 0: any number
    tokens_per_minute: float = 0.0  # most tokens of prompts and replies, likewise; 0: any number
    breaker_failures: int = 5  # failures in a row after which an endpoint is left alone, but for one probe at a time
    outage_budget: float = 1800.0  # seconds to wait for endpoints that all fail; then save, exit 75; 0: never wait
    quorum: float = 0.5  # share of a batch's dialogues that must survive; else the batch is discarded and played anew
    quorum_retries: int = 2  # times that a batch is played anew; then save, exit 75
    record: str = ""  # file that every reply of user and judge is written to, to be replayed; goes on if it exists
    replay: str = ""  # such a file, which gives the replies instead of user and judge: nothing is asked or paid
    price_in: float = 0.0  # dollars per million prompt tokens of the endpoints; with --price-out, costs are shown
    price_out: float = 0.0  # dollars per million tokens of their replies
    first_user_message: str = "Hello"  # fixed opener (published); empty: ask the simulator
    # rollout
    rollout_batch_size: int = 256  # dialogues per iteration, over all processes
    decode_batch_size: int = 64  # dialogues that decode at once in one process; the others wait, parked with their KV
    kv_gib: float = 0.0  # GiB for the KV cache of one process; 0: measured at the start of a rollout
    reply_steps: int = -1  # decode steps until a reply is used; 0: as it comes; -1: 16, or 0 with unrecorded endpoints
    max_turns: int = 10  # turns per dialogue
    num_candidates: int = 4  # candidates per turn; the best one continues the dialogue
    max_new_tokens: int = 1024  # tokens per sampled turn
    max_user_tokens: int = 512  # a longer user message is cut to so many tokens
    temperature: float = 1.0  # divides the logits in sampling and in every log-prob
    history_profile: str = "all"  # all: every <profile> block stays in the history; latest: only the newest (published)
    # rewards
    profile_weight: float = 1.0  # weight of the Profile Reward; 0 switches it off
    response_weight: float = 1.0  # weight of the Response Reward; 0 switches it off
    profile_target: str = "persona"  # F1 against persona (published), evidence (matches count once disclosed) or ledger
    reward_at: str = "turn"  # turn: both on the turn's last token (published); segment: the profile's where it ends
    # advantages
    advantage: str = "gae"  # gae: by a critic (published); rloo, grpo: against a turn's other candidates, without one
    credit: str = "turn"  # turn: each turn for itself (published); dialogue: GAE goes on along the chosen path
    gamma: float = 1.0  # discount per token
    gamma_turn: float = 1.0  # discount per turn boundary with --credit dialogue; 0 equals --credit turn
    gae_lambda: float = 0.95  # GAE's lambda per token
    kl_estimator: str = "k1"  # k1: in the per-token reward (published); k3: in the loss; exact: all of V, in the loss
    kl_coef: float = 0.01  # weight of the KL to the reference policy; 0 switches it off and saves its forward
    # update
    num_iterations: int = 0  # iterations to run; 0: one pass over the personas
    minibatch_size: int = 4  # dialogues per optimizer step, over all processes (x 10 turns x 4 candidates: 160)
    microbatch_tokens: int = 16384  # tree tokens per forward and backward in one process; one dialogue is never cut
    num_epochs: int = 1  # passes over a rollout batch
    old_logprobs: str = "auto"  # sampler: as noted in sampling; trainer: computed again; auto: sampler in fp32 on a CPU
    critic: str = "separate"  # separate: a trunk of its own (published); shared: a value head on the policy's trunk
    value_coef: float = 0.5  # weight of the value loss in the gradient of a shared trunk
    dtype: str = "auto"  # of products, beside fp32 master weights: float32, bfloat16, or auto: bfloat16 on CUDA alone
    shard: bool = False  # share weights, gradients and moments out over the processes (FSDP2); see docs/scaling.md
    checkpointing: bool = False  # keep only the layers' inputs for the backward: a third more work, far less memory
    lr: float = 5e-7  # policy's peak learning rate
    critic_lr: float = 9e-6  # critic's peak learning rate
    adam_beta1: float = 0.9  # AdamW
    adam_beta2: float = 0.95  # AdamW
    warmup_share: float = 0.03  # share of all updates with a rising learning rate
    min_lr_share: float = 0.1  # the cosine ends at this share of the peak
    max_grad_norm: float = 1.0  # global norm that gradients are clipped to
    clip_eps: float = 0.2  # ratio clip of the policy loss
    value_clip: float = 0.2  # clip of the value's move away from the old value
    entropy_coef: float = 0.0  # weight of an entropy bonus
    critic_warmup: int = 0  # first iterations that train the critic alone
    # evaluation, log, checkpoints
    eval_every: int = 10  # iterations between held-out evaluations; 0: only before and after
    eval_dialogues: int = 32  # held-out personas per evaluation, over all processes
    episodes_every: int = 10  # iterations between full records in episodes.jsonl
    save_every: int = 10  # iterations between checkpoints; 0: only the last
    keep_last: int = 3  # newest checkpoints that are kept, beside the best by held-out reward; 0: all
    tensorboard: bool = True  # write TensorBoard events beside metrics.jsonl
    dry_run: bool = False  # print memory per device, tokens and calls of the run, and stop before anything is loaded
    dry_run_gb: float = 0.0  # --dry-run plans for a CUDA device of so many GB (1e9 bytes); 0: for this machine
    dry_run_processes: int = 0  # --dry-run plans for so many; 0: for those that are running
    kernels: str = "auto"  # triton, torch, or auto: triton on CUDA, torch on a CPU
    collective_timeout: float = 1800.0  # seconds that a process waits for the others; longer than any rollout
    threads: int = 0  # CPU threads per process; 0: one for models below 10 M parameters, else all cores shared out

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, kind = getattr(self, f.name), type(f.default)
            if type(value) is not kind and (kind, type(value)) != (float, int):
                raise ValueError(f"{flag(f.name)} is {value!r}; it takes {kind.__name__}")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{flag(name)} is {getattr(self, name)!r}; it takes {' or '.join(allowed)}")
        for name, (low, high) in LIMITS.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{flag(name)} is {getattr(self, name)}; it must lie in [{low}, {high}]")
        if self.rollout_batch_size % self.minibatch_size:
            raise ValueError(
                f"--rollout-batch-size {self.rollout_batch_size} is not a multiple of"
                f" --minibatch-size {self.minibatch_size}"
            )
        if self.critic == "shared" and self.critic_ckpt:
            raise ValueError(f"--critic-ckpt {self.critic_ckpt} needs --critic separate: a shared one has no trunk")
        if self.critic == "separate" and self.value_coef != Config.value_coef:
            raise ValueError(f"--value-coef {self.value_coef} needs --critic shared: a separate one has its own step")
        if self.advantage != "gae":
            refuse_critic_flags(self)
        for name in ("dry_run_gb", "dry_run_processes"):
            if getattr(self, name) and not self.dry_run:
                raise ValueError(f"{flag(name)} {getattr(self, name)} needs --dry-run")
        if self.record and self.replay:
            raise ValueError(f"--record {self.record} and --replay {self.replay} exclude each other; leave out one")
        if self.profile_judge == "http" and not self.judge_url:
            raise ValueError("--profile-judge http needs --judge-url")
        if self.profile_judge == "http" and self.profile_target != "persona":
            raise ValueError(
                f"--profile-target {self.profile_target} needs --profile-judge rule:"
                " an LLM's count does not say which lines match"
            )


def refuse_critic_flags(config: Config) -> None:
    """Raise ValueError for what makes no sense without a critic."""
    if config.num_candidates == 1:
        raise ValueError(
            f"--num-candidates 1 leaves nobody to compare with; --advantage {config.advantage} needs 2 or more"
        )
    needed = {"credit": "turn", "critic": "separate", "critic_ckpt": "", "critic_warmup": 0}
    for name, without in needed.items():
        if getattr(config, name) != without:
            raise ValueError(
                f"{flag(name)} {getattr(config, name)} needs --advantage gae: {config.advantage} has no critic"
            )


MANY = 10**9
CHOICES = {
    "history_profile": HISTORY_PROFILES,
    "profile_target": rewards.PROFILE_TARGETS,
    "reward_at": ("turn", "segment"),
    "advantage": ("gae", "rloo", "grpo"),
    "credit": ("turn", "dialogue"),
    "kl_estimator": ("k1", "k3", "exact"),
    "old_logprobs": ("auto", "sampler", "trainer"),
    "critic": ("separate", "shared"),
    "dtype": ("auto", "float32", "bfloat16"),
    "kernels": BACKENDS,
    "profile_judge": ("rule", "http"),
}
LIMITS = {
    **dict.fromkeys(
        (
            "num_personas",
            "rollout_batch_size",
            "decode_batch_size",
            "max_new_tokens",
            "max_user_tokens",
            "minibatch_size",
            "microbatch_tokens",
            "num_epochs",
            "eval_dialogues",
            "max_concurrency",
            "breaker_failures",
        ),
        (1, MANY),
    ),
    **dict.fromkeys(
        (
            "seed",
            "num_iterations",
            "max_retries",
            "requests_per_minute",
            "tokens_per_minute",
            "outage_budget",
            "quorum_retries",
            "critic_warmup",
            "eval_every",
            "episodes_every",
            "save_every",
            "keep_last",
            "profile_weight",
            "response_weight",
            "kl_coef",
            "entropy_coef",
            "value_coef",
            "dry_run_gb",
            "dry_run_processes",
            "kv_gib",
            "price_in",
            "price_out",
            "lr",
            "critic_lr",
        ),
        (0, MANY),
    ),
    **dict.fromkeys(
        ("gamma", "gamma_turn", "gae_lambda", "adam_beta1", "adam_beta2", "warmup_share", "min_lr_share", "quorum"),
        (0, 1),
    ),
    **dict.fromkeys(("max_turns", "num_candidates"), (1, 10_000)),
    "threads": (0, 1024),
    "reply_steps": (-1, MANY),
    **dict.fromkeys(("temperature", "request_timeout", "max_grad_norm", "clip_eps", "value_clip"), (1e-6, MANY)),
    "collective_timeout": (1, 10**7),
}


def flag(name: str) -> str:
    """Return the command-line flag of a field."""
    return "--" + name.replace("_", "-")


def parse_args(argv: Sequence[str] | None = None) -> Config:
    """Read flags into a Config: built-in defaults < the checkpoint's `rlpa.json` < flags. ValueError if one is bad."""
    given = vars(make_parser(Config, __doc__).parse_args(argv))
    exits.check_prices(given.get("price_in"), given.get("price_out"))
    if given.get("resume"):
        return resumed_config(given)
    if not given.get("ckpt"):
        raise ValueError("no checkpoint; give --ckpt FOLDER_OR_HUB_ID, or a bare --ckpt for the tiny checkpoint")
    folder = resolve_checkpoint(given["ckpt"])
    config = Config(**{**checkpoint_defaults(folder), **given, "ckpt": str(folder.resolve())})
    if config.critic_ckpt and not Path(config.critic_ckpt).is_dir():
        raise ValueError(f"--critic-ckpt {config.critic_ckpt}: no such folder")
    for name in ("critic_ckpt", "personas", "eval_personas", "record", "replay"):  # absolute: --resume from anywhere
        if getattr(config, name):
            setattr(config, name, str(Path(getattr(config, name)).resolve()))
    config.run_dir = config.run_dir or f"runs/{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    return config


def make_parser(settings: type[Config], description: str, names: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Make a flag of each field of a dataclass of settings, or of `names` alone; its comment is the help."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = exits.refuse
    comments = field_comments(settings)
    for f in dataclasses.fields(settings):
        if names and f.name not in names:
            continue
        kind = type(f.default)
        options = (
            {"action": argparse.BooleanOptionalAction}
            if kind is bool
            else {"type": kind, "metavar": kind.__name__.upper()}
        )
        if f.name == "ckpt":
            options |= {"nargs": "?", "const": str(TINY_CHECKPOINT)}
        shown = f"{comments[f.name]} [{f.default}]".replace("%", "%%")
        parser.add_argument(flag(f.name), default=argparse.SUPPRESS, help=shown, **options)
    return parser


def checkpoint_defaults(folder: Path) -> dict:
    """Return the settings that a checkpoint carries for itself (`rlpa.json`); {} if it carries none."""
    path = folder / "rlpa.json"
    return read_settings(path) if path.is_file() else {}


def read_settings(path: Path) -> dict:
    """Read settings from a JSON file; ValueError that names the file if it holds anything else."""
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds {type(settings).__name__}, not one JSON object of settings")
    unknown = set(settings) - {f.name for f in dataclasses.fields(Config)}
    if unknown:
        raise ValueError(f"{path} sets {sorted(unknown)}, which are no settings of this trainer")
    return settings


RESUMED = (
    "num_iterations",
    "threads",
    "eval_every",
    "save_every",
    "episodes_every",
    "keep_last",
    "collective_timeout",
    "simulator_url",
    "judge_url",
    "outage_budget",
    "requests_per_minute",
    "tokens_per_minute",
    "shard",  # equal up to rounding
)


def resumed_config(given: dict) -> Config:
    """Return the config of the run to resume; only the flags that leave the result alone may be given beside it."""
    path = Path(given["resume"]) / "config.json"
    if not path.is_file():
        raise ValueError(f"--resume {given['resume']}: {path} does not exist; give a run folder")
    others = set(given) - {"resume", *RESUMED}
    if others:
        raise ValueError(
            f"--resume takes its settings from {path}; drop {', '.join(flag(name) for name in sorted(others))}"
        )
    config = Config(**{**read_settings(path), **given, "run_dir": given["resume"]})
    if not config.ckpt:
        raise ValueError(f"{path} names no ckpt; it is not as the run has written it")
    return config


def stream_seed(*key: object) -> int:
    """Derive the seed of one random stream from what it is for; the same key gives the same stream on any rank.

    >>> stream_seed(0, "sample", 3, 1) == stream_seed(0, "sample", 3, 1) != stream_seed(0, "sample", 3, 2)
    True
    """
    digest = hashlib.blake2b("|".join(map(str, key)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1  # 31 bits: some servers take no larger seed


# ---------------------------------------------------------------------------------------------------------------------
# Rollout


class Timers:
    """Seconds spent per phase of an iteration, and when."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self.intervals: list[tuple[str, float, float]] = []  # phase, start and end, for the timeline

    def clear(self) -> None:
        """Forget the last iteration."""
        self.seconds.clear()
        self.intervals.clear()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.note(phase, start, time.perf_counter())

    def note(self, phase: str, start: float, end: float) -> None:
        """Add a stretch of time to a phase."""
        self.seconds[phase] += end - start
        self.intervals.append((phase, start, end))


@dataclass
class World:
    """What the policy meets: the user's and the judge's endpoints, and a count of everything that went wrong there."""

    user: ChatClient
    judge: ChatClient | None  # None: by rule
    rule_verdicts: Callable[..., dict[str, bool]] = rewards.rule_verdicts  # the rule judge
    counts: Counter = field(default_factory=Counter)
    timers: Timers = field(default_factory=Timers)
    signals: list[int] = field(default_factory=list)  # those that have asked this process to stop

    def hang_up(self) -> None:
        """Cut off all requests under way; nobody can be asked afterwards."""
        for client in filter(None, (self.user, self.judge)):
            client.close()


class Stopped(Exception):
    """A signal has ended a rollout, on all ranks alike; its number is the argument."""


@dataclass
class Play:
    """How dialogues are played: training samples n candidates, evaluation one."""

    num_candidates: int
    temperature: float
    stream: tuple  # key prefix of the random streams


def rollout(
    policy: Qwen2ForCausalLM, chat: ChatTokenizer, dialogues: list[Dialogue], play: Play, config: Config, env: World
) -> None:
    """Play dialogues, if any, to their end; fills in `turns` and `dropped`.

    Raises Stopped on every rank if a signal has come to any: what was played is discarded, and no weight has changed.
    """
    outcome = attempt(lambda: play_dialogues(policy, chat, dialogues, play, config, env))
    wait_for_ranks(config.outage_budget + config.collective_timeout, env.signals)
    agree(outcome)
    if number := max(gather(max(env.signals, default=0))):
        raise Stopped(number)


def play_dialogues(
    policy: Qwen2ForCausalLM, chat: ChatTokenizer, dialogues: list[Dialogue], play: Play, config: Config, env: World
) -> None:
    """Play this rank's dialogues, unless a signal comes.

    Each goes round by itself: user message (HTTP) → prompt prefilled, n candidates decoded → each scored as it ends
    (HTTP) → the best adopted. Whoever waits for a reply is parked with its KV cache, and the others decode meanwhile.
    """
    if not dialogues:  # more ranks than dialogues
        return
    with Replies(config, env) as replies:
        stage = Stage(policy, chat, play, config, env, replies, len(dialogues))
        for dialogue in dialogues:
            stage.next_turn(dialogue)
        while not env.signals and (stage.ready or stage.sampler.running or replies.waiting):
            replies.hand_out(idle=not stage.sampler.running and not stage.ready)
            with env.timers("sampling"):
                if replies.clock % JOIN_EVERY == 0 or not stage.sampler.running:
                    stage.start_ready()
                ended = stage.sampler.step()
                replies.clock += 1
            with env.timers("rewards"):
                for draw in ended:
                    stage.score(draw)
        env.counts.update(stage.sampler.counts)


class Unavailable(RuntimeError):
    """User or judge are away, or lost too many dialogues. Raised on all ranks at once; the run can go on later."""


def play_batch(
    policy: Qwen2ForCausalLM,
    chat: ChatTokenizer,
    batch: Callable[[], list[Dialogue]],
    play: Play,
    config: Config,
    env: World,
) -> list[Dialogue]:
    """Play this rank's dialogues of a batch, anew while too few of all survive; Unavailable if that does not help."""
    for trial in range(config.quorum_retries + 1):
        dialogues = batch()
        stream = (*play.stream, "again", trial) if trial else play.stream  # else replies on tape fail once more
        rollout(policy, chat, dialogues, replace(play, stream=stream), config, env)
        outage, complaint = check_batch(dialogues, config, env)
        if outage or not complaint:
            break
        env.counts["batches_discarded"] += rank() == 0
    if complaint:
        raise Unavailable(complaint)
    return dialogues


def check_batch(dialogues: list[Dialogue], config: Config, env: World) -> tuple[bool, str]:
    """Return whether there is an outage, and what speaks against a batch, "" if nothing does: the same on all ranks."""
    clients = {"--simulator-url": env.user, "--judge-url": env.judge}
    outages = [f"{flag_}: {client.outage}" for flag_, client in clients.items() if client and client.outage]
    parts = gather((len(dialogues), Counter(d.dropped for d in dialogues if d.dropped), outages))
    outages = [outage for _, _, found in parts for outage in found]
    if outages:
        return True, f"{outages[0]} (--outage-budget)"
    size, lost = sum(n for n, _, _ in parts), sum_counters([causes for _, causes, _ in parts])
    if size - lost.total() >= config.quorum * size:
        return False, ""
    causes = ", ".join(f"{cause} {n}" for cause, n in lost.most_common())
    return False, f"{lost.total()} of {size} dialogues were lost ({causes}); --quorum {config.quorum:g} wants more"


JOIN_EVERY = 8  # decode steps: a prefill for several dialogues costs little more than for one


class Replies:
    """Requests under way, and what is to be done with their replies.

    A reply is handed out `reply_steps` decode steps after its request, neither earlier nor later, in the order of the
    requests: so what happens does not depend on how fast replies come, to the last bit. With `reply_steps` 0 it is
    handed out as soon as it is there: better where replies are slow and uneven, and equal up to rounding.
    """

    def __init__(self, config: Config, env: World):
        as_they_come = bool(config.simulator_url or config.judge_url) and not (config.record or config.replay)
        self.steps = config.reply_steps if config.reply_steps >= 0 else 0 if as_they_come else 16
        self.env, self.timers = env, env.timers
        self.pool = ThreadPoolExecutor(config.max_concurrency, thread_name_prefix="reply")
        self.waiting: deque[tuple[int, Future, Callable]] = deque()  # due at this step; reply; what takes it
        self.clock = 0  # decode steps so far

    def __enter__(self) -> Replies:
        return self

    def __exit__(self, *error) -> None:
        if error[0] is not None or self.env.signals:
            self.env.hang_up()  # else the pool's threads would wait for their replies
        self.pool.shutdown(cancel_futures=True)

    def request(self, ask: Callable[[], object], then: Callable[[object], None]) -> None:
        """Call `ask` in a thread; later, in this one, `then` with what it returned."""
        self.waiting.append((self.clock + self.steps, self.pool.submit(timed, ask), then))

    def hand_out(self, idle: bool) -> None:
        """Hand out the replies that are due; when nothing else can be done (idle), wait for the next one."""
        found = self.arrived(idle) if self.steps == 0 else self.due(idle)
        if self.env.signals:  # some replies may not be there, and none is needed any more
            return
        for _, future, then in found:
            reply, start, end = future.result()
            self.timers.note("requests", start, end)
            then(reply)

    def due(self, idle: bool) -> list[tuple[int, Future, Callable]]:
        """Take out the requests whose time has come, and wait for their replies."""
        if idle:  # the clock stands still while nothing decodes: put it on
            self.clock = max(self.clock, self.waiting[0][0])
        found = []
        while self.waiting and self.waiting[0][0] <= self.clock:
            found.append(self.waiting.popleft())
        if late := [future for _, future, _ in found if not future.done()]:
            self.wait_for(late, ALL_COMPLETED)
        return found

    def arrived(self, idle: bool) -> list[tuple[int, Future, Callable]]:
        """Take out the requests whose replies are there."""
        if idle:
            self.wait_for([future for _, future, _ in self.waiting], FIRST_COMPLETED)
        found = [item for item in self.waiting if item[1].done()]
        self.waiting = deque(item for item in self.waiting if item not in found)
        return found

    def wait_for(self, futures: list[Future], how: str) -> None:
        """Wait for all futures or the first one, but no longer once a signal has come."""
        with self.timers("waiting"):
            while not self.env.signals:
                done, missing = wait(futures, timeout=0.2, return_when=how)  # seconds between looks at the signals
                if not missing or done and how == FIRST_COMPLETED:
                    return


def timed(ask: Callable[[], object]) -> tuple[object, float, float]:
    """Return what `ask` returns, and when it began and ended."""
    start = time.perf_counter()
    reply = ask()
    return reply, start, time.perf_counter()


class Stage:
    """The dialogues of a rollout and the sampler that plays in them: what happens to each, from turn to turn."""

    def __init__(
        self,
        policy: Qwen2ForCausalLM,
        chat: ChatTokenizer,
        play: Play,
        config: Config,
        env: World,
        replies: Replies,
        size: int,
    ):
        self.chat, self.play, self.config, self.env, self.replies = chat, play, config, env, replies
        self.dialogues: dict[int, Dialogue] = {}  # by index
        self.ready: deque[Dialogue] = deque()  # their prompts wait for a place in the sampler
        self.longest = policy.config.max_position_embeddings
        self.sampler = Sampler(
            policy,
            n=play.num_candidates,
            max_new_tokens=config.max_new_tokens,
            stop_ids=[chat.im_end],
            temperature=play.temperature,
            batch_size=config.decode_batch_size,
            max_rows=size,
            kv_bytes=kv_budget(config, policy.head_weight.device),
        )

    def next_turn(self, dialogue: Dialogue) -> None:
        """Ask the user for the next message; after the last turn, the dialogue's keys and values are forgotten."""
        self.dialogues[dialogue.index] = dialogue
        dialogue.change()
        if dialogue.dropped is not None or len(dialogue.turns) == self.config.max_turns:
            self.sampler.forget(dialogue.index)
        elif not dialogue.turns and self.config.first_user_message:
            self.hear(dialogue, self.config.first_user_message)
        else:
            messages = simulator_messages(Persona(dialogue.persona_id, dialogue.persona_facts), dialogue.history())
            seed = stream_seed(*self.play.stream, "user", dialogue.index, len(dialogue.turns))
            self.replies.request(lambda: self.env.user.ask(messages, seed), lambda reply: self.hear(dialogue, reply))

    def hear(self, dialogue: Dialogue, reply: str | ChatError) -> None:
        """Open a turn with the user's message; a dialogue whose user is lost is dropped, one too long ends here."""
        if isinstance(reply, ChatError):
            dialogue.dropped = f"simulator: {reply.reason}"
            return self.next_turn(dialogue)
        ids = self.chat.encode(reply)
        if len(ids) > self.config.max_user_tokens:
            self.env.counts["user_messages_cut"] += 1
            reply = self.chat.decode(ids[: self.config.max_user_tokens]).rstrip("\ufffd")
        open_turn(dialogue, reply, self.chat, self.config.history_profile)
        length = len(dialogue.turns[-1].prompt_ids)
        too_long = length + self.config.max_new_tokens > self.longest
        if too_long or len(dialogue.turns) > 1 and not self.sampler.fits(length):
            self.end_early(dialogue)
        else:
            self.ready.append(dialogue)

    def end_early(self, dialogue: Dialogue) -> None:
        """Close a dialogue that would outgrow the model's positions or the KV cache; its turns so far count."""
        needed = len(dialogue.turns.pop().prompt_ids) + self.config.max_new_tokens
        if not dialogue.turns:
            raise ValueError(
                f"a first turn needs {needed} positions, the model has {self.longest};"
                " lower --max-new-tokens or --max-user-tokens"
            )
        self.env.counts["dialogues_ended_early"] += 1
        self.sampler.forget(dialogue.index)

    def start_ready(self) -> None:
        """Begin as many of the turns that are ready as the sampler has room for, in their order."""
        while self.ready:
            dialogue = self.ready[0]
            stream = (*self.play.stream, "sample", dialogue.index, len(dialogue.turns))
            seeds = [stream_seed(*stream, c) for c in range(self.play.num_candidates)]
            if not self.sampler.start(dialogue.index, dialogue.turns[-1].prompt_ids, seeds):
                return
            dialogue.turns[-1].candidates = [Candidate([], [], "") for _ in seeds]
            self.ready.popleft()

    def score(self, draw: Draw) -> None:
        """Parse a candidate that has ended, and get its rewards: by rule at once, or from the judge's endpoint."""
        dialogue = self.dialogues[draw.key]
        candidate = dialogue.turns[-1].candidates[draw.candidate]
        candidate.token_ids, candidate.logprobs = draw.token_ids, draw.logprobs
        candidate.stop_reason = draw.stop_reason
        read_candidate(candidate, dialogue, self.chat)
        seed = stream_seed(*self.play.stream, "judge", dialogue.index, len(dialogue.turns), draw.candidate)
        if candidate.failure is None and self.env.judge is not None:
            self.replies.request(
                lambda: judge(candidate, dialogue, seed, self.config, self.env),
                lambda _: self.choose(dialogue, candidate),
            )
        else:
            judge(candidate, dialogue, seed, self.config, self.env)
            self.choose(dialogue, candidate)

    def choose(self, dialogue: Dialogue, candidate: Candidate) -> None:
        """Once the last candidate of a turn is scored, go on with the best one (ties: lowest index)."""
        turn = dialogue.turns[-1]
        candidate.scored = True
        if not all(candidate.scored for candidate in turn.candidates):
            return
        judged = [c for c in range(len(turn.candidates)) if turn.candidates[c].judged]
        self.env.counts["candidates_unjudged"] += len(turn.candidates) - len(judged)
        if judged:
            # max keeps the first of equals
            turn.chosen = max(judged, key=lambda c: turn_reward(turn.candidates[c], self.config))
            self.sampler.adopt(dialogue.index, turn.chosen)
        else:
            dialogue.dropped = "judge: no verdict on any candidate"
        self.next_turn(dialogue)


def kv_budget(config: Config, device: torch.device) -> int:
    """Return the bytes that a process's KV cache may take: as asked for, or a share of what is free now."""
    if config.kv_gib:
        return int(config.kv_gib * 2**30)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch keeps what was freed
        return int(0.9 * (torch.cuda.mem_get_info(device)[0] + unused))
    return int(0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") / world_size())


# ---------------------------------------------------------------------------------------------------------------------
# Rewards


def read_candidate(candidate: Candidate, dialogue: Dialogue, chat: ChatTokenizer) -> None:
    """Decode and parse a candidate and hold its profile against persona and ledger."""
    candidate.text = chat.visible(candidate.token_ids)
    parsed = rewards.parse_turn(candidate.text, candidate.stop_reason)
    candidate.profile, candidate.response, candidate.failure = parsed.profile, parsed.response, parsed.failure
    candidate.profile_tokens = chat.tokens_until(candidate.token_ids, "</profile>")
    candidate.verdicts = dict.fromkeys(rewards.VERDICTS, False)
    candidate.ledger = asdict(rewards.score_profile(parsed.profile, dialogue.persona_facts, dialogue.user_texts()))


def turn_reward(candidate: Candidate, config: Config) -> float:
    """Return profile_weight · Profile Reward + response_weight · Response Reward; a format failure earns neither."""
    return config.profile_weight * candidate.profile_reward + config.response_weight * candidate.response_reward


def judge(candidate: Candidate, dialogue: Dialogue, seed: int, config: Config, env: World) -> None:
    """Fill in a candidate's verdicts and rewards; one that could not be parsed has none."""
    if candidate.failure is None:
        judge_response(candidate, dialogue, seed, env)
        judge_profile(candidate, dialogue, seed, config, env)


def judge_response(candidate: Candidate, dialogue: Dialogue, seed: int, env: World) -> None:
    """Fill in the five verdicts and the Response Reward, their product."""
    asked = dialogue.history()[: 2 * len(dialogue.turns) - 1]  # up to the message that is answered
    if env.judge is None:
        verdicts = env.rule_verdicts(candidate.response, asked, dialogue.persona_facts)
    else:
        request = rewards.response_judge_messages(candidate.response, asked, candidate.profile)
        verdicts = rewards.ask_judge(env.judge.ask, request, rewards.parse_verdicts, seed)
    candidate.judged = verdicts is not None
    candidate.verdicts = verdicts or candidate.verdicts
    candidate.response_reward = float(all(candidate.verdicts.values()))


def judge_profile(candidate: Candidate, dialogue: Dialogue, seed: int, config: Config, env: World) -> None:
    """Fill in the Profile Reward."""
    if config.profile_judge == "rule":
        candidate.profile_reward = candidate.ledger[rewards.PROFILE_TARGETS[config.profile_target]]
        return
    request = rewards.profile_judge_messages(candidate.profile, dialogue.persona_facts)
    count = rewards.ask_judge(env.judge.ask, request, rewards.parse_covered, seed)
    candidate.judged &= count is not None
    candidate.profile_reward = rewards.f1_score(count or 0, len(candidate.profile), len(dialogue.persona_facts))


# ---------------------------------------------------------------------------------------------------------------------
# Packing: one dialogue, one tree


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
    enter: Tensor  # (T,) long: who sees whom, `kernels/tree_attention.py`
    leave: Tensor  # (T,) long
    blocks: list[Block]  # how the attention is cut
    predict: Tensor  # (N,) long: place of the token before each action token, whose hidden state predicts it
    targets: Tensor  # (N,) long: the sampled ids
    sampler_logprobs: Tensor  # (N,) fp32, nats
    spans: list[Span]
    row_tokens: int  # tokens of the same samples as separate rows, each with its whole history
    old_logprobs: Tensor | None = None  # (N,) under the policy that sampled, by the trainer
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
            predict += nodes[first - 1 : -1]
            targets += candidate.token_ids
            sampled += candidate.logprobs
    if dialogue.dropped is not None or not targets:
        return None
    layout = tree.layout()
    place = torch.empty(len(tree), dtype=torch.long)
    place[layout.order] = torch.arange(len(tree))
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


def microbatches(packed: Sequence[Packed], most_tokens: int) -> list[list[Packed]]:
    """Share dialogues out to as few micro-batches as most_tokens allows, about equally many tokens in each."""
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
        tree = make_tree(tree.enter.to(like.device), tree.leave.to(like.device), tree.blocks, like.dtype)
        inputs = (token_ids.to(like.device), position_ids.to(like.device), tree)
        return replace(self, inputs=inputs, predict=self.predict.to(like.device), targets=self.targets.to(like.device))

    def gather(self, name: str) -> Tensor:
        """Return one of the dialogues' fields of statistics, (N,) or (N, D)."""
        return torch.cat([getattr(p, name) for p in self.dialogues]).to(self.targets.device)


def collate(dialogues: list[Packed]) -> Batch:
    """Make a micro-batch in the CPU's memory, without masks: small integers, kept while statistics and update run."""
    lengths = [len(p.token_ids) for p in dialogues]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]

    def row(name: str, shifted: bool) -> Tensor:
        parts = [getattr(p, name) + start * shifted for p, start in zip(dialogues, starts, strict=True)]
        return torch.cat(parts)

    blocks = [block for p in dialogues for block in p.blocks]
    tree = Tree(row("enter", True), row("leave", True), blocks, torch.float32)
    inputs = (row("token_ids", False)[None], row("position_ids", False)[None], tree)
    return Batch(dialogues, inputs, row("predict", True), row("targets", False))


def make_batches(packed: Sequence[Packed], config: Config) -> list[list[Batch]]:
    """Return the micro-batches of each mini-batch of an epoch; statistics and update go through the same ones.

    With --shard every process gets equally many, for a forward is a conversation of all: who has fewer adds empty ones.
    """
    minibatches = [[p for p in packed if p.minibatch == m] for m in range(minibatches_per_epoch(config))]
    parts = [microbatches(minibatch, config.microbatch_tokens) for minibatch in minibatches]
    if config.shard:
        most = all_max(torch.tensor([len(part) for part in parts])).tolist()
        parts = [part + [[nothing()]] * (n - len(part)) for part, n in zip(parts, most, strict=True)]
    return [[collate(part) for part in minibatch] for minibatch in parts]


def nothing() -> Packed:
    """Return a dialogue of one token, none of them an action: its loss is an empty sum, and all its gradients are 0."""
    zero, none = torch.zeros(1, dtype=torch.long), torch.zeros(0)
    tree = dict(token_ids=zero, position_ids=zero, enter=zero, leave=zero + 1, blocks=[Block(1, None)])
    actions = dict(predict=none.long(), targets=none.long(), sampler_logprobs=none, advantages=none, returns=none)
    return Packed(minibatch=0, **tree, **actions, spans=[], row_tokens=0)


def minibatches_per_epoch(config: Config) -> int:
    """Return the optimizer steps of one pass over a rollout batch."""
    return config.rollout_batch_size // config.minibatch_size


def policy_hidden(policy: Qwen2ForCausalLM, batch: Batch) -> Tensor:
    """Return the hidden states (N, D) that predict a micro-batch's action tokens."""
    return policy(*batch.inputs)[0, batch.predict]


def critic_values(critic: Critic | ValueHead, batch: Batch, hidden: Tensor | None) -> Tensor:
    """Return values (N,) of the states in which action tokens were sampled: by a trunk, or from the policy's hidden."""
    return critic(hidden) if isinstance(critic, ValueHead) else critic(*batch.inputs)[0, batch.predict]


# ---------------------------------------------------------------------------------------------------------------------
# Statistics and advantages


@torch.no_grad()
def add_statistics(
    batches: list[list[Batch]],
    policy: Qwen2ForCausalLM,
    ref_policy: Qwen2ForCausalLM | None,
    critic: Critic | ValueHead | None,
    config: Config,
    sampled: Qwen2ForCausalLM | None = None,
) -> None:
    """Fill in old log-probs, reference log-probs and values, each computed once, under the weights that sampled.

    sampled: the copy of a sharded policy that did; else it is the policy.
    """
    sampled = sampled or policy
    exact = sampler_is_exact(sampled, config)
    for batch in (batch for minibatch in batches for batch in minibatch):
        found = statistics_of(batch.to(sampled.head_weight), policy, ref_policy, critic, config, exact)
        sizes = [len(p.targets) for p in batch.dialogues]
        for name, values in found.items():
            for p, part in zip(batch.dialogues, values.cpu().split(sizes), strict=True):
                setattr(p, name, part)


def statistics_of(
    batch: Batch,
    policy: Qwen2ForCausalLM,
    ref_policy: Qwen2ForCausalLM | None,
    critic: Critic | ValueHead | None,
    config: Config,
    by_sampler: bool,
) -> dict[str, Tensor]:
    """Return a micro-batch's statistics by their names in `Packed`; no trunk runs whose output nobody reads.

    by_sampler: old log-probs are those that the sampler noted.
    """
    hidden = None if by_sampler and not isinstance(critic, ValueHead) else policy_hidden(policy, batch)
    if by_sampler:
        old_logprobs = batch.gather("sampler_logprobs")
    else:
        old_logprobs = linear_logprob(hidden, policy.head_weight, batch.targets, config.temperature)[0]
    found = {"old_logprobs": old_logprobs, "ref_logprobs": old_logprobs}
    if critic:
        found["values"] = critic_values(critic, batch, hidden)
    if ref_policy:
        ref_hidden, head = policy_hidden(ref_policy, batch), ref_policy.head_weight
        found["ref_logprobs"] = linear_logprob(ref_hidden, head, batch.targets, config.temperature)[0]
        if config.kl_estimator == "exact":  # all that the update needs of the reference's trunk: it runs once
            found["ref_hidden"] = ref_hidden
    return found


def sampler_is_exact(policy: Qwen2ForCausalLM, config: Config) -> bool:
    """Say whether the sampler's log-probs serve as old ones: same weights and temperature, so only kernels may differ.

    In fp32 by torch they agree to 1e-6. In bf16 sampler and trainer round differently, and the ratio would not be 1.
    """
    if config.old_logprobs != "auto":
        return config.old_logprobs == "sampler"
    return policy.head_weight.dtype == torch.float32 and not use_triton(policy.head_weight)


def token_rewards(span: Span, p: Packed, config: Config) -> list[float]:
    """Place a candidate's rewards on its tokens: −kl_coef · k1 everywhere, the rest on the last token, or, with
    `reward_at segment`, the Profile Reward on the token that closes the profile."""
    kl = (
        config.kl_coef * (p.old_logprobs - p.ref_logprobs)[span.start : span.stop]
        if config.kl_estimator == "k1"
        else None
    )
    placed = (-kl).tolist() if kl is not None else [0.0] * (span.stop - span.start)
    profile_at = span.candidate.profile_tokens - 1 if config.reward_at == "segment" else -1
    placed[profile_at] += config.profile_weight * span.candidate.profile_reward
    placed[-1] += config.response_weight * span.candidate.response_reward
    return placed


def gae(
    token_reward: Sequence[float],
    values: Sequence[float],
    next_value: float,
    next_advantage: float,
    gamma: float,
    lam: float,
) -> list[float]:
    """Return generalised advantage estimates (arXiv 1506.02438, eq. 16) of one run of tokens.

    δ_t = r_t + γ V_{t+1} − V_t and A_t = δ_t + γ λ A_{t+1}. After the last token come `next_value` and
    `next_advantage`, which the caller has discounted already; 0 and 0 at an end.

    >>> gae([0.0, 1.0], [0.5, 0.5], 0.0, 0.0, gamma=1.0, lam=1.0)
    [0.5, 0.5]
    >>> gae([0.0, 1.0], [0.5, 0.25], 0.0, 0.0, gamma=1.0, lam=0.0)
    [-0.25, 0.75]
    """
    advantages = [0.0] * len(values)
    ahead_value, ahead_advantage = next_value, lam * next_advantage
    for t in reversed(range(len(values))):
        delta = token_reward[t] + ahead_value - values[t]
        advantages[t] = delta + ahead_advantage
        ahead_value, ahead_advantage = gamma * values[t], gamma * lam * advantages[t]
    return advantages


def add_advantages(p: Packed, config: Config) -> None:
    """Fill in advantages and returns of one dialogue by GAE, last turn first; `add_group_advantages` needs no critic.

    A turn's last token is an end with credit "turn". With "dialogue" the chosen candidate is followed by the first
    token of the next turn's chosen one: user tokens are skipped, γ_turn is the discount across. The others were not
    continued; they are valued by the same next value, since ending them there would punish them for not being chosen.
    """
    gamma_turn = config.gamma_turn if config.credit == "dialogue" else 0.0
    values = p.values.tolist()
    advantages = [0.0] * len(values)
    next_value, next_advantage = 0.0, 0.0
    for t in sorted({span.turn for span in p.spans}, reverse=True):
        first_of_chosen = 0
        for span in (s for s in p.spans if s.turn == t):
            tail = gamma_turn * next_advantage if span.chosen else 0.0
            advantages[span.start : span.stop] = gae(
                token_rewards(span, p, config),
                values[span.start : span.stop],
                gamma_turn * next_value,
                tail,
                config.gamma,
                config.gae_lambda,
            )
            first_of_chosen = span.start if span.chosen else first_of_chosen
        next_value, next_advantage = values[first_of_chosen], advantages[first_of_chosen]
    p.advantages = torch.tensor(advantages)
    p.returns = p.advantages + p.values


def against_others(x: Tensor) -> Tensor:
    """Return each element minus the mean of the others; 0 for one that is alone.

    >>> against_others(torch.tensor([3.0, 0.0, 0.0])).tolist()
    [3.0, -1.5, -1.5]
    """
    return len(x) / max(1, len(x) - 1) * (x - x.mean())


def add_group_advantages(p: Packed, config: Config) -> None:
    """Fill in advantages of one dialogue without a critic: a turn's candidates are each other's baseline.

    R is a turn's reward, wherever `reward_at` would place it, K = Σ_t (log π − log π_ref) over its tokens with k1 (k3
    and exact are in the loss). All tokens of candidate c share

        rloo   A_c = (R_c − β K_c) − mean over the other candidates       (arXiv 2402.14740)
        grpo   A_c = (R_c − mean R) / (std R + 1e-4) − β (K_c − mean K over the others)       (arXiv 2402.03300)

    The KL stays outside grpo's division: where all candidates earn the same, std would be that of the KL alone, and
    its smallest difference would count like a reward.
    """
    kl = config.kl_coef * (p.old_logprobs - p.ref_logprobs) * (config.kl_estimator == "k1")
    p.advantages = torch.zeros(len(p.targets))
    for _, turn in itertools.groupby(p.spans, key=lambda span: span.turn):
        spans = list(turn)
        reward = torch.tensor([turn_reward(span.candidate, config) for span in spans], dtype=torch.double)
        penalty = against_others(torch.stack([kl[span.start : span.stop].double().sum() for span in spans]))
        if config.advantage == "rloo":
            reward = against_others(reward)
        else:
            reward = (reward - reward.mean()) / (reward.std(correction=0) + 1e-4)
        for span, advantage in zip(spans, reward - penalty, strict=True):
            p.advantages[span.start : span.stop] = advantage


def whiten_advantages(packed: list[Packed], advantage: str = "gae") -> tuple[float, float]:
    """Give all action tokens of the global batch mean 0 and standard deviation 1; returns what these were before.

    rloo keeps its zero, so that a turn whose candidates earned the same teaches nothing, and takes the scale alone;
    grpo has been scaled turn by turn, and is only measured.
    """
    flat = torch.cat([p.advantages for p in packed]).double() if packed else torch.zeros(0, dtype=torch.double)
    count, total, squares = all_sum(
        torch.stack([torch.tensor(float(len(flat))).double(), flat.sum(), (flat**2).sum()])
    ).tolist()
    mean = total / max(1, count)
    std = math.sqrt(max(0.0, squares / max(1, count) - mean**2))
    zero, unit = mean if advantage == "gae" else 0.0, 1.0 if advantage == "grpo" else std + 1e-8
    for p in packed:
        p.advantages = (p.advantages - zero) / unit
    return mean, std


# ---------------------------------------------------------------------------------------------------------------------
# Losses and update


def policy_loss(
    hidden: Tensor, head: Tensor, ref_policy: Qwen2ForCausalLM | None, batch: Batch, config: Config
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the summed PPO loss of a micro-batch's action tokens and its statistics (`kernels/ppo_head.py`).

    hidden: (N, D), by `policy_hidden`; head: the policy's head weight (V, D).
    The sum, not the mean: the caller divides by the global count of action tokens in the mini-batch, so that neither
    micro-batch size nor the number of ranks changes the gradient.
    """
    kl: dict = {}
    if config.kl_estimator == "k3" and config.kl_coef:
        kl = {"ref_logprobs": batch.gather("ref_logprobs")}
    if config.kl_estimator == "exact" and config.kl_coef:
        kl = {"reference": (batch.gather("ref_hidden"), ref_policy.head_weight)}
    return ppo_head(
        hidden,
        head,
        batch.targets,
        batch.gather("old_logprobs"),
        batch.gather("advantages"),
        **kl,
        temperature=config.temperature,
        clip_eps=config.clip_eps,
        entropy_coef=config.entropy_coef,
        kl_coef=config.kl_coef,
    )


def value_loss(new_values: Tensor, batch: Batch, config: Config) -> Tensor:
    """Return the summed clipped value loss, ½ max((V − R)², (clip(V) − R)²), of a micro-batch's action tokens."""
    old_values, returns = batch.gather("values"), batch.gather("returns")
    clipped = old_values + (new_values - old_values).clamp(-config.value_clip, config.value_clip)
    return 0.5 * torch.maximum((new_values - returns) ** 2, (clipped - returns) ** 2).sum()


@dataclass
class Learner:
    """A model and the optimizer of its fp32 master weights, from which the model's own are rounded after each step.

    A step of 1e-6 is lost in a bf16 weight of 0.05, whose neighbours are 2e-4 away; in its master it adds up.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    peak_lr: float
    masters: dict[str, Tensor]  # by name; in fp32, and of a sharded model, its parameters themselves
    replica: nn.Module | None = None  # of a sharded policy: all its weights in the dtype of products, for sampling

    @property
    def sampled(self) -> nn.Module:
        """Return the model that samples, which needs no other process for it."""
        return self.replica or self.model


def make_learner(model: nn.Module, lr: float, config: Config, dtype: torch.dtype = torch.float32) -> Learner:
    """Wrap an fp32 model with AdamW (fp32, no weight decay); it computes in `dtype` from here on."""
    masters = dict(model.named_parameters())
    if dtype != torch.float32:
        masters = {name: nn.Parameter(parameter.detach()) for name, parameter in masters.items()}
        model.to(dtype)
        for parameter, master in zip(model.parameters(), masters.values(), strict=True):
            hand_gradients_to(master, parameter)
    optimizer = torch.optim.AdamW(
        masters.values(), lr=lr, betas=(config.adam_beta1, config.adam_beta2), weight_decay=0.0, fused=True
    )
    return Learner(model, optimizer, lr, masters)


def hand_gradients_to(master: Tensor, parameter: nn.Parameter) -> None:
    """Add each gradient of a bf16 parameter to its master's, in fp32 and while the backward runs, and free it."""

    def add(parameter: Tensor) -> None:
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad += parameter.grad
        parameter.grad = None

    parameter.register_post_accumulate_grad_hook(add)


def lr_share(update: int, num_updates: int, config: Config) -> float:
    """Return the share of the peak learning rate at an update: linear warm-up, then a cosine to `min_lr_share`.

    >>> [round(lr_share(u, 100, Config(ckpt="x")), 3) for u in (0, 2, 3, 99)]
    [0.333, 1.0, 1.0, 0.1]
    """
    warmup = math.ceil(config.warmup_share * num_updates)
    if update < warmup:
        return (update + 1) / warmup
    progress = (update - warmup) / max(1, num_updates - 1 - warmup)
    return config.min_lr_share + (1 - config.min_lr_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def optimizer_step(learner: Learner, share: float, max_grad_norm: float) -> tuple[float, bool]:
    """Sum gradients over ranks, clip and step; a non-finite norm skips the step on every rank alike.

    Returns the gradient norm before clipping and whether the step was taken.
    """
    masters = learner.masters.values()
    all_sum_gradients(master for master in masters if not isinstance(master, DTensor))  # those are sums already
    norm = torch.nn.utils.clip_grad_norm_(masters, max_grad_norm)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    if not math.isfinite(norm):  # the summed gradient is the same everywhere, and so is this decision
        return norm, False
    for group in learner.optimizer.param_groups:
        group["lr"] = learner.peak_lr * share
    learner.optimizer.step()
    with torch.no_grad():
        for parameter, master in zip(learner.model.parameters(), masters, strict=True):
            if parameter is not master:
                parameter.copy_(master)
    return norm, True


def update(
    policy: Learner,
    critic: Learner | None,
    batches: list[list[Batch]],
    config: Config,
    progress: tuple[int, int],
    train_policy: bool,
    ref_policy: Qwen2ForCausalLM | None = None,
) -> dict:
    """Run PPO over one rollout batch; `progress` is (updates done so far, updates of the whole run). Gives metrics."""
    totals: Counter = Counter()
    first: dict[str, float] = {}
    ratios: list[float] = []
    done, num_updates = progress
    for epoch in range(config.num_epochs):
        for m, minibatch in enumerate(batches):
            count = all_sum(torch.tensor(float(sum(len(batch.targets) for batch in minibatch)))).item()
            if not count:  # the last, partial batch, or everything dropped
                continue
            share = lr_share(done + epoch * len(batches) + m, num_updates, config)
            sums = minibatch_update(policy, critic, minibatch, count, share, config, train_policy, ref_policy)
            ratios += [sums.pop("ratio_min"), sums.pop("ratio_max")]
            totals.update(sums)
            first = first or {"ratio_dev_first": sums["ratio_dev"] / sums["tokens"]}
    tokens = max(1.0, totals.pop("tokens", 0.0))
    steps = max(1.0, totals.pop("steps", 0.0))
    per_step = ("policy_grad_norm", "critic_grad_norm")
    counted = ("updates_skipped",)
    for learner in filter(None, (policy, critic)):  # the next rollout can use the memory
        learner.optimizer.zero_grad()
    if policy.replica:
        sharding.refresh(policy.replica, policy.masters)
    if ratios:
        first |= {"ratio_min": min(ratios), "ratio_max": max(ratios)}
    return first | {k: v / steps if k in per_step else v if k in counted else v / tokens for k, v in totals.items()}


def add_gradients(
    policy: Qwen2ForCausalLM,
    critic: Critic | ValueHead | None,
    batch: Batch,
    count: float,
    config: Config,
    train_policy: bool,
    ref_policy: Qwen2ForCausalLM | None,
) -> dict[str, Tensor]:
    """Add a micro-batch's gradients of (policy loss, value loss) ÷ count; returns its sums and extreme ratios.

    A trunk that is shared has one backward, of policy loss + value_coef · value loss. Two trunks have one each, so that
    only one's activations exist at a time.
    """
    with torch.set_grad_enabled(train_policy):  # else the critic learns alone, and a shared trunk stands still
        hidden = policy_hidden(policy, batch)
        loss, statistics = policy_loss(hidden, policy.head_weight, ref_policy, batch, config)
    if not isinstance(critic, ValueHead) and train_policy:
        (loss / count).backward()
    if critic is None:
        return statistics | {"policy_loss": loss.detach()}
    vf_loss = value_loss(critic_values(critic, batch, hidden), batch, config)
    total = vf_loss if isinstance(critic, Critic) else loss + config.value_coef * vf_loss
    (total / count).backward()
    return statistics | {"policy_loss": loss.detach(), "value_loss": vf_loss.detach()}


def minibatch_update(
    policy: Learner,
    critic: Learner | None,
    minibatch: list[Batch],
    count: float,
    share: float,
    config: Config,
    train_policy: bool,
    ref_policy: Qwen2ForCausalLM | None = None,
) -> dict[str, float]:
    """Take one optimizer step of policy and critic on one mini-batch; returns all ranks' sums and extreme ratios."""
    for learner in filter(None, (policy, critic)):
        learner.optimizer.zero_grad()
    losses = ("policy_loss", "value_loss") if critic else ("policy_loss",)
    names = (*losses, "approx_kl", "clip_frac", "entropy", "ratio_dev")
    sums = dict.fromkeys((*names, "kl_exact") if config.kl_estimator == "exact" else names, 0.0)
    low, high = math.inf, -math.inf
    for batch in minibatch:
        batch = batch.to(policy.sampled.head_weight)
        models = policy.model, critic and critic.model
        statistics = add_gradients(*models, batch, count, config, train_policy, ref_policy)
        for name in sums:
            sums[name] += statistics[name].item()
        if len(batch.targets):
            low, high = min(low, statistics["ratio_min"].item()), max(high, statistics["ratio_max"].item())
    result = dict(zip(sums, all_sum(torch.tensor(list(sums.values()), dtype=torch.double)).tolist(), strict=True))
    low, high = all_max(torch.tensor([-low, high], dtype=torch.double)).tolist()
    result |= {"ratio_min": -low, "ratio_max": high}
    finite = all(math.isfinite(result[name]) for name in losses)
    norms = {"policy_grad_norm": (0.0, not train_policy)} | ({"critic_grad_norm": (0.0, False)} if critic else {})
    if finite:
        if critic:
            norms["critic_grad_norm"] = optimizer_step(critic, share, config.max_grad_norm)
        if train_policy:
            norms["policy_grad_norm"] = optimizer_step(policy, share, config.max_grad_norm)
    skipped = sum(not taken for _, taken in norms.values())
    return (
        result | {"tokens": count, "steps": 1, "updates_skipped": skipped} | {k: norm for k, (norm, _) in norms.items()}
    )


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def batch_statistics(packed: list[Packed]) -> dict[str, float]:
    """Return statistics of a batch's tokens: their number, KL to the reference, sampler's gap."""
    sums = torch.zeros(3, dtype=torch.double)
    for p in packed:
        kl, gap = (p.old_logprobs - p.ref_logprobs).sum(), (p.old_logprobs - p.sampler_logprobs).abs().sum()
        sums += torch.tensor([len(p.targets), kl.item(), gap.item()], dtype=torch.double)
    count, kl, gap = all_sum(sums).tolist()
    n = count or math.nan
    return {"kl_ref": kl / n, "sampler_trainer_logprob_gap": gap / n, "action_tokens": count}


def explained_variance(packed: list[Packed]) -> float:
    """Return 1 − Var(R − V) / Var(R) of the critic over a batch's tokens."""
    sums = torch.zeros(5, dtype=torch.double)
    for p in packed:
        error = p.returns - p.values
        parts = (len(p.targets), error.sum(), (error**2).sum(), p.returns.sum(), (p.returns**2).sum())
        sums += torch.tensor([float(part) for part in parts], dtype=torch.double)
    count, error, error2, returns, returns2 = all_sum(sums).tolist()
    n = count or math.nan
    variance = returns2 / n - (returns / n) ** 2
    return 1 - (error2 / n - (error / n) ** 2) / variance if variance > 1e-12 else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def evaluate(
    policy: Qwen2ForCausalLM,
    chat: ChatTokenizer,
    personas: list[Persona],
    config: Config,
    env: World,
    iteration: int,
    temperature: float,
) -> tuple[dict[str, float], list[Dialogue]]:
    """Play held-out personas, one candidate per turn; returns metrics over all ranks and this rank's dialogues."""
    chosen = personas[: config.eval_dialogues]

    def batch() -> list[Dialogue]:
        return [Dialogue(i, p.persona_id, p.facts) for i, p in enumerate(chosen) if i % world_size() == rank()]

    play = Play(1, temperature, (config.seed, "eval", iteration, temperature))
    calls_before = endpoint_counts(env)
    dialogues = play_batch(policy, chat, batch, play, config, env)
    calls = sum_counters(gather(endpoint_counts(env) - calls_before))
    return rates(sum_counters(gather(tally(dialogues)))) | calls | cost(calls, config), dialogues


# ---------------------------------------------------------------------------------------------------------------------
# Run folder: metrics, episodes, curve, checkpoints


def save_checkpoint(state: State) -> None:
    """Write models in Hugging Face layout and the trainer's state, such that a kill anywhere leaves it whole or absent.

    Every rank calls it; rank 0 writes, and all write what is sharded. Raises ValueError on every rank if that fails.
    """
    if state.evaluated and math.isfinite(state.reward) and all(state.reward > reward for reward in state.best.values()):
        state.best = {checkpoint_name(state): state.reward}
    folder = Path(state.config.run_dir) / "checkpoints" / checkpoint_name(state)

    def write() -> None:
        write_checkpoint(state, temporary)
        checkpoints.publish(temporary, folder)
        checkpoints.prune(folder, state.config.keep_last, *state.best)

    temporary = on_rank_0(lambda: writing(folder, lambda: checkpoints.prepare(folder)))
    writing(folder, lambda: write_shards(state, temporary))
    on_rank_0(lambda: writing(folder, write))
    state.saved = folder.name


def writing(folder: Path, action: Callable[[], Result]) -> Result:
    """Call `action`; where it cannot write, raise a ValueError that tells of the checkpoint."""
    try:
        return action()
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{folder} cannot be written: {reason}; those before it are kept") from error


def checkpoint_name(state: State) -> str:
    """Return the name of the checkpoint of this state; `.stopped` if the iteration's evaluation is still to come."""
    return f"iteration_{state.iteration:06d}" + ("" if state.evaluated else ".stopped")


PROGRESS = ("iteration", "updates", "evaluated", "best", "logs")  # what trainer.json holds of a State


def write_checkpoint(state: State, folder: Path) -> None:
    """Write all that a run is continued from: models, optimizers and the place where it stands.

    Random streams need no state: each is derived from the seed and from what it is for (`stream_seed`).
    """
    for name, learner in learners(state).items():
        if is_sharded(learner):
            save_config(learner.model, folder / name, torch.float32)
        else:
            save_pretrained(learner.model, folder / name, weights=learner.masters)
            save_file(optimizer_tensors(learner), folder / f"{name}_optimizer.safetensors")
    save_texts(state, folder / "policy")
    progress = {name: getattr(state, name) for name in PROGRESS}
    (folder / "trainer.json").write_text(json.dumps(progress) + "\n")


def write_shards(state: State, folder: Path) -> None:
    """Write the weights and moments that are sharded, in the files that `write_checkpoint` writes of whole ones."""
    for name, learner in learners(state).items():
        if is_sharded(learner):
            sharding.save(learner.masters, folder / name)
            moments = folder / f".{name}_optimizer"
            sharding.save(optimizer_tensors(learner), moments, math.inf)
            if rank() == 0:
                (moments / SINGLE).rename(folder / f"{name}_optimizer.safetensors")
                moments.rmdir()


def learners(state: State) -> dict[str, Learner]:
    """Return what is trained, by its name in a checkpoint."""
    return {"policy": state.policy} | ({"critic": state.critic} if state.critic else {})


def is_sharded(learner: Learner) -> bool:
    """Say whether every process holds only its rows of the model; a value head is never sharded."""
    return any(isinstance(master, DTensor) for master in learner.masters.values())


def save_texts(state: State, folder: Path) -> None:
    """Write the tokenizer, and the settings and held-out text of this model, if it brought some."""
    state.chat.tokenizer.save(str(folder / "tokenizer.json"))
    for name in ("rlpa.json", HELDOUT_FILE):
        if (Path(state.config.ckpt) / name).is_file():
            shutil.copy(Path(state.config.ckpt) / name, folder)


def optimizer_tensors(learner: Learner) -> dict[str, Tensor]:
    """Return AdamW's moments and step counts by parameter name: tensors only, so that they fit safetensors."""
    names = {master: name for name, master in learner.masters.items()}
    return {
        f"{names[p]}|{key}": torch.atleast_1d(value).contiguous()  # shards of a number are written as 0 in torch 2.13
        for p, moments in learner.optimizer.state.items()
        for key, value in moments.items()
    }


def load_optimizer(learner: Learner, path: Path) -> None:
    """Restore what `optimizer_tensors` returned; of a sharded model the own rows."""
    for key, value in stored_tensors(path):
        name, _, moment = key.rpartition("|")
        master = learner.masters[name]
        if moment == "step":
            value = value.reshape(()).to(master.device, copy=True)
        elif isinstance(master, DTensor):
            value = sharding.spread(value, master.device_mesh)
        else:
            value = value.to(master.device, copy=True)
        learner.optimizer.state[master][moment] = value


def newest_checkpoint(run_dir: str) -> Path:
    """Return a run's newest whole checkpoint, warning of damaged ones in one line each; ValueError if there is none."""

    def warn(line: str) -> None:
        print(f"warning: {line}", file=sys.stderr)

    try:
        return checkpoints.newest(Path(run_dir) / "checkpoints", warn)
    except ValueError as error:
        raise ValueError(f"--resume {run_dir}: {error}; start the run anew with --run-dir and --overwrite") from None


# ---------------------------------------------------------------------------------------------------------------------
# The run


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
    env: World
    iteration: int = 0  # iterations done
    updates: int = 0  # optimizer steps scheduled so far, which is the place in the learning-rate schedule
    evaluated: bool = False  # what is due after the last iteration done has been evaluated
    reward: float = math.nan  # held-out reward of this iteration's policy, if it has been measured
    best: dict[str, float] = field(default_factory=dict)  # name of the best checkpoint, and its held-out reward
    logs: dict[str, int] = field(default_factory=dict)  # sizes of the run's records at this point
    saved: str = ""  # name of the checkpoint that this process loaded or wrote last

    @property
    def num_iterations(self) -> int:
        """Iterations of the whole run: as asked for, or one pass over the personas, a last partial batch included."""
        return self.config.num_iterations or math.ceil(len(self.personas) / self.config.rollout_batch_size)


def setup(config: Config, env: World, folder: Path | None = None, mesh: DeviceMesh | None = None) -> State:
    """Load personas, tokenizer and models, fresh or from a checkpoint's folder; with --shard over a mesh."""
    personas, eval_sets = load_all_personas(config)
    policy, critic, ref_policy = load_sharded(config, folder, mesh) if mesh else load_models(config, folder)
    set_threads(policy.model, config)
    keep_freed_memory()
    set_backend(config.kernels)
    chat = ChatTokenizer.from_folder(config.ckpt)
    if chat.vocab_size > policy.model.config.vocab_size:
        raise ValueError(
            f"tokenizer of {config.ckpt} has {chat.vocab_size} ids, the model's embedding only"
            f" {policy.model.config.vocab_size}"
        )
    state = State(config, chat, policy, critic, ref_policy, personas, eval_sets, env)
    if folder:
        progress = json.loads((folder / "trainer.json").read_text())
        state = replace(state, saved=folder.name, **{name: progress[name] for name in PROGRESS})
        if (Path(config.run_dir) / FINISHED).exists() and state.evaluated and state.iteration >= state.num_iterations:
            raise ValueError(
                f"--resume {config.run_dir}: its {state.iteration} iterations are done; give a larger --num-iterations"
            )
    return state


def load_models(config: Config, folder: Path | None) -> tuple[Learner, Learner | None, Qwen2ForCausalLM | None]:
    """Load policy, critic and frozen reference, if any; the first two from a checkpoint's folder, if one is given.

    What is trained is loaded in fp32, for the masters.
    """
    device = own_device()
    dtype = compute_dtype(config, device.type)
    policy = load_policy(folder / "policy" if folder else config.ckpt, device=device)
    models = {"policy": policy}
    if config.advantage == "gae":
        models["critic"] = load_or_make_critic(config, policy, folder)
    learners = {}
    for (name, model), lr in zip(models.items(), (config.lr, config.critic_lr), strict=False):
        if not isinstance(model, ValueHead):
            model.model.checkpointing = config.checkpointing
        learners[name] = make_learner(model, lr, config, dtype)
        if folder:
            load_optimizer(learners[name], folder / f"{name}_optimizer.safetensors")
    ref_policy = load_policy(config.ckpt, dtype=dtype, device=device).requires_grad_(False) if config.kl_coef else None
    return learners["policy"], learners.get("critic"), ref_policy


def load_sharded(
    config: Config, folder: Path | None, mesh: DeviceMesh
) -> tuple[Learner, Learner | None, Qwen2ForCausalLM | None]:
    """Do what `load_models` does, with the rows of this process alone, and a copy of the policy that samples."""
    device = own_device()
    dtype = compute_dtype(config, device.type)
    start = folder / "policy" if folder else config.ckpt
    policy = make_learner(sharding.load(Qwen2ForCausalLM, start, mesh, dtype=dtype), config.lr, config)
    policy.replica = load_policy(start, dtype=dtype, device=device).requires_grad_(False)
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


def has_own_trunk(config: Config) -> bool:
    """Say whether there is a critic, and it has a trunk of its own."""
    return config.advantage == "gae" and config.critic == "separate"


def compute_dtype(config: Config, device: str) -> torch.dtype:
    """Return the dtype of weights and products on a type of device.

    >>> compute_dtype(Config(), "cpu"), compute_dtype(Config(), "cuda")
    (torch.float32, torch.bfloat16)
    """
    name = config.dtype if config.dtype != "auto" else {"cuda": "bfloat16", "cpu": "float32"}[device]
    return getattr(torch, name)


def load_all_personas(config: Config) -> tuple[list[Persona], dict[str, list[Persona]]]:
    """Return training personas and named evaluation sets; only sets from --eval-personas may share some with them."""
    personas = load_personas(config.personas) if config.personas else synthetic_personas(config, "train", config.seed)
    if config.eval_personas:
        return personas, {"heldout": load_personas(config.eval_personas)}
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
    return [Persona(f"{split}-{i}", tuple(facts)) for i, facts in enumerate(world.generate_personas(n, seed, split))]


def set_threads(policy: nn.Module, config: Config) -> None:
    """Choose CPU threads: with a tiny model a second thread costs more in waiting than it computes."""
    tiny = sum(p.numel() for p in policy.parameters()) < 10_000_000
    torch.set_num_threads(config.threads or (1 if tiny else max(1, (os.cpu_count() or 1) // world_size())))


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks up to 32 MiB: given back, each of the next forward's temporaries is paged in anew.

    On a CPU that made a norm over 4,000 tokens 6 to 10 times as slow. Elsewhere than with glibc nothing is done.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD: free space at the heap's end that is kept
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: larger blocks come from the system one by one


def persona_batch(state: State) -> list[Dialogue]:
    """Return this rank's dialogues of the iteration: personas in an order shuffled anew for each pass.

    Dialogue i of the global batch goes to rank i mod world size, so the batch does not depend on the number of ranks.
    """
    config, n = state.config, len(state.personas)
    first = state.iteration * config.rollout_batch_size  # this batch's place in the endless row of shuffled passes
    size = config.rollout_batch_size if config.num_iterations else min(config.rollout_batch_size, n - first)
    orders = {p: persona_order(state, p) for p in range(first // n, (first + size - 1) // n + 1)}
    dialogues = []
    for i in range(rank(), size, world_size()):
        persona = state.personas[orders[(first + i) // n][(first + i) % n]]
        dialogues.append(Dialogue(i, persona.persona_id, persona.facts))
    return dialogues


def persona_order(state: State, number: int) -> list[int]:
    """Return the order in which pass `number` goes through the personas."""
    generator = torch.Generator().manual_seed(stream_seed(state.config.seed, "order", number))
    return torch.randperm(len(state.personas), generator=generator).tolist()


def run_iteration(state: State) -> tuple[dict[str, float], list[Dialogue]]:
    """Run one iteration: rollout, pack, statistics, advantages, update. Returns metrics and this rank's dialogues."""
    config, env = state.config, state.env
    env.timers.clear()
    env.counts.clear()
    calls_before = endpoint_counts(env)
    start = time.perf_counter()
    play = Play(config.num_candidates, config.temperature, (config.seed, "train", state.iteration))
    dialogues = play_batch(state.policy.sampled, state.chat, lambda: persona_batch(state), play, config, env)
    with env.timers("statistics"), computing():
        packed = [p for p in (pack(d, config) for d in dialogues) if p is not None]
        batches = make_batches(packed, config)
        models = state.policy.model, state.ref_policy, state.critic and state.critic.model
        add_statistics(batches, *models, config, state.policy.sampled)
        for p in packed:
            add_advantages(p, config) if state.critic else add_group_advantages(p, config)
        advantage_mean, advantage_std = whiten_advantages(packed, config.advantage)
    with env.timers("update"), computing():
        per_iteration = config.num_epochs * minibatches_per_epoch(config)
        progress = (state.updates, state.num_iterations * per_iteration)
        train_policy = state.iteration >= config.critic_warmup
        metrics = update(state.policy, state.critic, batches, config, progress, train_policy, state.ref_policy)
    state.iteration += 1
    state.updates += per_iteration
    metrics |= rates(sum_counters(gather(tally(dialogues)))) | batch_statistics(packed)
    metrics |= {"advantage_mean": advantage_mean, "advantage_std": advantage_std}
    if state.critic:
        metrics["explained_variance"] = explained_variance(packed)
    if sampler_is_exact(state.policy.sampled, config):  # the first mini-batch met the weights that sampled
        metrics["sampler_trainer_logprob_gap"] = metrics.get("ratio_dev_first", math.nan)
    calls = sum_counters(gather(endpoint_counts(env) - calls_before))
    metrics |= sum_counters(gather(env.counts)) | calls | cost(calls, config)
    pairs = sum(int((p.position_ids + 1).sum()) for p in packed)  # a token attends to its ancestors and itself
    sizes = [sum(len(p.token_ids) for p in packed), sum(p.row_tokens for p in packed), pairs]
    tree_tokens, row_tokens, pairs = all_sum(torch.tensor(sizes, dtype=torch.double)).tolist()
    seconds = time.perf_counter() - start
    metrics |= {
        "tree_tokens": tree_tokens,
        "tree_saving": row_tokens / max(1, tree_tokens),
        "seconds": seconds,
        "sampled_tokens_per_second": metrics["action_tokens"] / seconds,
    }
    if train_policy and (peak := memory.peak_flops(card_name())):
        flops = config.num_epochs * memory.update_flops(
            state.policy.model.config, tree_tokens, metrics["action_tokens"], pairs, has_own_trunk(config)
        )
        metrics["mfu"] = flops / (env.timers.seconds["update"] * peak * world_size())
    metrics |= {f"seconds_{k}": v for k, v in env.timers.seconds.items()}
    return metrics | {"seconds_hidden": hidden_seconds(env.timers.intervals)}, dialogues


def hidden_seconds(intervals: list[tuple[str, float, float]]) -> float:
    """Return for how long requests were under way without anybody waiting for them.

    >>> hidden_seconds([("requests", 0.0, 3.0), ("requests", 1.0, 4.0), ("waiting", 3.0, 3.5)])
    3.5
    """
    union, end = 0.0, -math.inf
    for start, stop in sorted((start, stop) for name, start, stop in intervals if name == "requests"):
        union += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return max(0.0, union - sum(stop - start for name, start, stop in intervals if name == "waiting"))


def card_name() -> str:
    """Return the CUDA device's name; "" without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


ENDPOINTS = ("simulator_", "judge_", "subject_")
COUNTED = ("requests", "retries", "prompt_tokens", "completion_tokens", "without_usage", "breaks")  # of its calls


def endpoint_counts(env: World) -> Counter:
    """Return this process's calls so far, their tokens, retries and failed attempts by reason, per endpoint."""
    counts: Counter = Counter()
    for name, client in (("simulator", env.user), ("judge", env.judge)):
        if client is not None:
            counts.update(client_counts(name, client))
    return counts


def client_counts(name: str, client: ChatClient) -> dict[str, int]:
    """Return an endpoint's counts under the names of metrics.jsonl."""
    totals = client.counts
    counts = {f"{name}_{what}": totals[what] for what in COUNTED}
    return counts | {f"{name}_error_{reason}": n for reason, n in totals["errors"].items()}


def cost(calls: dict[str, float], config: Config) -> dict[str, float]:
    """Return {"cost_dollars": …}, what the calls cost or, replayed, would have; {} without prices.

    The embedded user costs nothing.
    """
    paid = ["judge", "subject"] + ["simulator"] * bool(config.simulator_url)
    tokens = [sum(calls.get(f"{name}_{side}_tokens", 0) for name in paid) for side in ("prompt", "completion")]
    if not (config.price_in or config.price_out):
        return {}
    return {"cost_dollars": (tokens[0] * config.price_in + tokens[1] * config.price_out) / 1e6}


def calls_note(calls: dict[str, float], config: Config) -> str:
    """Write calls, tokens and costs in one line.

    >>> calls = {"judge_requests": 1000, "judge_prompt_tokens": 200000, "judge_completion_tokens": 30000}
    >>> calls_note(calls, Config(price_in=1.0, price_out=4.0))
    'judge 1,000 calls, 200,000 + 30,000 tokens; 0.32 dollars'
    """
    parts = []
    for name in ("simulator", "judge", "subject"):
        n, prompt, said, estimated = (
            int(calls.get(f"{name}_{what}", 0))
            for what in ("requests", "prompt_tokens", "completion_tokens", "without_usage")
        )
        words = f" (no usage from {estimated:,} calls: words are counted)" if estimated else ""
        parts += [f"{name} {n:,} calls, {prompt:,} + {said:,} tokens{words}"] if n else []
    parts += [f"{dollars:.2f} dollars" for dollars in cost(calls, config).values()]
    return "; ".join(parts) + (" (replayed: nothing was asked)" if config.replay else "")


def lost_note(m: dict[str, float]) -> str:
    """Say how many dialogues were dropped and who failed; nothing if none was."""
    if not m["dialogues_dropped"]:
        return ""
    who = ", ".join(f"{name.removeprefix('dropped_')} {n:.0f}" for name, n in m.items() if name.startswith("dropped_"))
    advice = "; nothing left, check --simulator-url and --judge-url" if m["dialogues_dropped"] == m["dialogues"] else ""
    return f" | dropped {m['dialogues_dropped']:.0f} of {m['dialogues']:.0f} dialogues ({who}{advice})"


def progress_line(state: State, m: dict[str, float]) -> str:
    """Write an iteration in one readable line."""
    split = " ".join(
        f"{k} {m.get(f'seconds_{k}', 0):.1f}" for k in ("sampling", "waiting", "rewards", "statistics", "update")
    )
    kept, prefilled = m.get("tokens_kept", 0), m.get("tokens_prefilled", 0)  # absent: none
    reused = kept / max(1, kept + prefilled)
    mfu = f" mfu {m['mfu']:.2f}" if "mfu" in m else ""
    ev = f" ev {m['explained_variance']:.2f}" if "explained_variance" in m else ""
    return (
        f"{state.iteration:4d}/{state.num_iterations} reward {m['reward']:.3f} (profile {m['profile_reward']:.3f}"
        f" response {m['response_reward']:.3f}) recall {m['recall']:.2f} f1/max {m['f1_over_max']:.2f}"
        f" unsupported {m['unsupported_lines']:.2f} valid {m['format_valid']:.2f} | kl {m['kl_ref']:.3f}"
        f" clip {m.get('clip_frac', 0):.3f}{ev} | {m['seconds']:.1f}s ({split}, replies"
        f" hidden {m['seconds_hidden']:.1f}) {m['sampled_tokens_per_second']:.0f} tok/s, saved by tree"
        f" x{m['tree_saving']:.1f}, KV {reused:.0%}{mfu}{lost_note(m)}"
    )


def retention(state: State) -> dict[str, float]:
    """Return the policy's perplexity on the text that the checkpoint brought along; {} if it brought none."""
    path = Path(state.config.ckpt) / HELDOUT_FILE
    if not path.is_file():
        return {}
    return {"perplexity_sft": perplexity(text_scores(state.policy.sampled, state.chat, read_texts(path)))}


def run_evaluation(state: State, log: RunLog | None, ends: bool) -> dict[str, list[Dialogue]]:
    """Evaluate on the held-out set, at temperature 1 and greedily; at both `ends` of a run on every set."""
    played, retained = {}, retention(state) if log else {}
    for name, personas in state.eval_sets.items():
        if name != "heldout" and not ends:
            continue
        for how, temperature in (("sampled", 1.0), ("greedy", 0.0)):
            metrics, dialogues = evaluate(
                state.policy.sampled, state.chat, personas, state.config, state.env, state.iteration, temperature
            )
            played[f"{name}/{how}"] = dialogues
            if (name, how) == ("heldout", "sampled"):
                state.reward = metrics["reward"]
            if log:
                log.metrics(state.iteration, f"{name}/{how}", metrics | (retained if name == "heldout" else {}))
                tqdm.write(
                    f"     {name + '/' + how:16s} recall {metrics['recall']:.3f} f1/max {metrics['f1_over_max']:.3f}"
                    f" unsupported {metrics['unsupported_lines']:.2f} response {metrics['response_reward']:.3f}"
                    f" valid {metrics['format_valid']:.3f}{lost_note(metrics)}"
                )
    return played


def train(config: Config, env: World) -> int:
    """Run the whole training, fresh or from a checkpoint on; returns the exit code.

    A signal, or user and judge that stay away, discard the rollout under way; an update that has begun is finished.
    Then the state is saved.
    """
    folder = on_rank_0(lambda: newest_checkpoint(config.run_dir)) if config.resume else None
    mesh = sharding.make_mesh() if config.shard else None
    state = together(lambda: setup(config, env, folder, mesh))
    log = together(lambda: start_log(state) if rank() == 0 else None)
    try:
        before, after = run(state, log)
    except (Stopped, Unavailable) as end:
        if state.saved != checkpoint_name(state):
            save_checkpoint(state)
        if log:
            log.close()
        hint = f"saved after iteration {state.iteration}; go on with: {resume_command(config)}"
        if isinstance(end, Unavailable):
            raise Unavailable(f"{end}; {hint}") from None
        if log:
            print(hint)
        return 0 if end.args[0] == signal.SIGTERM else 128 + end.args[0]
    if log:
        finish(state, log, before, after)
    return 0


def start_log(state: State) -> RunLog:
    """Say what is about to run, write its settings, and open its records."""
    announce(state)
    settings = asdict(replace(state.config, resume="", overwrite=False))  # as if it had never been interrupted
    (Path(state.config.run_dir) / FINISHED).unlink(missing_ok=True)
    checkpoints.write_text(Path(state.config.run_dir) / "config.json", json.dumps(settings, indent=1) + "\n")
    return RunLog(state.config.run_dir, state.logs, state.config.tensorboard)


Played = dict[str, list[Dialogue]]


def run(state: State, log: RunLog | None) -> tuple[Played, Played]:
    """Run iterations up to the last one; returns the evaluations before the first and after it.

    At the head of the loop, and between its two steps, a checkpoint can be taken.
    """
    before, played = {}, {}
    with tqdm(
        total=state.num_iterations, initial=state.iteration, desc="iterations", disable=rank() != 0, unit="it"
    ) as bar:
        while True:
            if not state.evaluated:
                played = conclude_iteration(state, log)
                before = before if state.iteration else played
            if state.iteration == state.num_iterations:
                return before, played
            next_iteration(state, log)
            bar.update()


def next_iteration(state: State, log: RunLog | None) -> None:
    """Run one iteration and write its records."""
    metrics, dialogues = run_iteration(state)
    if log:
        log.metrics(state.iteration, "train", metrics)
        log.intervals = list(state.env.timers.intervals)
        tqdm.write(progress_line(state, metrics))
    if state.config.episodes_every and state.iteration % state.config.episodes_every == 0:
        record_episodes(state, log, {"train": dialogues})
    settle(state, log, evaluated=False)


def conclude_iteration(state: State, log: RunLog | None) -> Played:
    """Evaluate and save, if that is due after an iteration or before the first; returns what a run's ends play."""
    i, config = state.iteration, state.config
    last, ends = i == state.num_iterations, i in (0, state.num_iterations)
    played, state.reward = {}, math.nan
    if ends or config.eval_every and i % config.eval_every == 0:
        played = run_evaluation(state, log, ends)
    played = played if ends else {}
    record_episodes(state, log, played)
    settle(state, log, evaluated=True)
    if last or i and config.save_every and i % config.save_every == 0:
        save_checkpoint(state)
    return played


def settle(state: State, log: RunLog | None, evaluated: bool) -> None:
    """Mark a point that a run can be continued from: the records up to here belong to it."""
    state.evaluated = evaluated
    if log:
        state.logs = log.position()


def finish(state: State, log: RunLog, before: Played, after: Played) -> None:
    """Draw the curves of a finished run, and show what it has come to."""
    log.close()
    log.draw()
    show_transcripts(before, after)
    policy = log.folder / "checkpoints" / state.saved / "policy"
    print(f"run folder: {log.folder}   curve: {log.folder / 'curve.png'}   policy: {policy}")
    records = map(json.loads, (log.folder / "metrics.jsonl").read_text().splitlines())
    calls = sum_counters([Counter({k: v for k, v in r.items() if k.startswith(ENDPOINTS)}) for r in records])
    print(f"calls of the run: {calls_note(calls, state.config)}")


def resume_command(config: Config) -> str:
    """Write the command that goes on with a run."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    several = ["--nproc-per-node", str(processes)] if processes > 1 else []
    return shlex.join(["torchrun", *several, sys.argv[0], "--resume", config.run_dir])


def record_episodes(state: State, log: RunLog | None, played: dict[str, list[Dialogue]]) -> None:
    """Write dialogues of all ranks to episodes.jsonl."""
    for kind, dialogues in played.items():
        records = [record for part in gather([episode_record(d) for d in dialogues]) for record in part]
        if log:
            log.episodes(state.iteration, kind, records)


def announce(state: State) -> None:
    """Say what is about to run."""
    config, millions = state.config, sum(p.numel() for p in state.policy.model.parameters()) / 1e6
    critic = "and a critic of that size" if has_own_trunk(config) else "the critic is a head on them"
    critic = critic if state.critic else f"{config.advantage}: no critic"
    sets = ", ".join(f"{len(personas)} {name}" for name, personas in state.eval_sets.items())
    batch = f"{config.rollout_batch_size} dialogues x {config.max_turns} turns x {config.num_candidates} candidates"
    lines = (
        f"RLPA: policy {config.ckpt} ({millions:.2f} M parameters, {critic})",
        f"{world_size()} process(es), {torch.get_num_threads()} thread(s) each",
        f"{len(state.personas)} training personas, {sets}",
        f"user {config.simulator_url or 'embedded'}, judge {config.judge_url or 'by rule'}",
        f"{state.num_iterations} iterations x {batch} -> {config.run_dir}",
    )
    print("\n      ".join(lines), flush=True)


def dry_run(config: Config) -> str:
    """Say what the run would need: bytes per device in each phase, tokens and calls. Nothing is loaded.

    Lengths are the longest that the flags allow: every user message and every sampled turn at its limit.
    """
    model = Qwen2Config.from_file(config.ckpt)
    device = "cuda" if torch.cuda.is_available() or config.dry_run_gb else "cpu"
    turns, n, processes = config.max_turns, config.num_candidates, config.dry_run_processes or world_size()
    work = memory.tree_work(50, [config.max_user_tokens + 9] * turns, [config.max_new_tokens] * turns, n)
    per_rank = max(1, config.minibatch_size // processes)
    tokens, actions, several = memory.microbatch(work, config.microbatch_tokens, per_rank)
    rows = min(config.decode_batch_size, -(-config.rollout_batch_size // processes))  # parked ones take what is left
    longest = 50 + turns * (config.max_user_tokens + 9 + config.max_new_tokens)
    slots = rows * (longest + n * config.max_new_tokens)
    if config.kv_gib:
        per_slot = memory.kv_bytes(model, 1, 1, compute_dtype(config, device).itemsize)
        slots = min(slots, int(config.kv_gib * 2**30) // per_slot)
    plan = memory.Plan(
        tokens,
        actions,
        several_microbatches=several,
        cache_tokens=slots,
        workspace=WORKSPACE[device],
        reference=bool(config.kl_coef),
        compute_bytes=compute_dtype(config, device).itemsize,
        critic=config.advantage == "gae",
        separate_critic=has_own_trunk(config),
        gradients_in_rollout=False,
        fused=device == "cuda",
        checkpointing=config.checkpointing,
        shards=processes * config.shard,
    )
    if config.dry_run_gb:
        room = config.dry_run_gb * 1e9
    elif device == "cuda":
        room = torch.cuda.get_device_properties(0).total_memory
    else:
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / processes
    personas = len(load_all_personas(config)[0])
    dialogues = config.num_iterations * config.rollout_batch_size or personas
    judge_calls = bool(config.judge_url) + (config.profile_judge == "http")
    calls = memory.calls(dialogues, turns, n, judge_calls, bool(config.first_user_message))
    return memory.report(model, plan, room, work, dialogues, calls)


REPLAYED = "http://replayed.invalid"  # stands for the embedded user's address where nobody is asked


@contextmanager
def open_tape(config: Config) -> Iterator[Tape | None]:
    """Open the file of --record or --replay, and say what it holds; None without either."""
    path = config.record or config.replay
    tape = Tape(path, recording=bool(config.record)) if path else None
    if tape and rank() == 0:
        print(tape.note, file=sys.stderr)
    try:
        yield tape
    finally:
        if tape:
            tape.close()


@contextmanager
def open_world(config: Config, tape: Tape | None = None) -> Iterator[World]:
    """Open the clients of user and judge, with a tape if there is one.

    Without --simulator-url the embedded user is started for this process, unless its replies are replayed.
    """

    def client(url: str, model: str, name: str) -> ChatClient:
        return ChatClient(
            url,
            model,
            config.api_key_env or None,
            read_timeout=config.request_timeout / 3,
            total_timeout=config.request_timeout,
            max_retries=config.max_retries,
            max_concurrency=config.max_concurrency,
            tape=tape,
            name=name,
            outage_budget=config.outage_budget,
            breaker_failures=config.breaker_failures,
            quota=quota,
            notify=lambda line: tqdm.write(f"warning: {line}", file=sys.stderr),
        )

    quota = Quota(config.requests_per_minute / world_size(), config.tokens_per_minute / world_size())
    server = None if config.simulator_url or config.replay else start_embedded_server()
    user = client(config.simulator_url or (server.url if server else REPLAYED), config.simulator_model, "simulator")
    judge = client(config.judge_url, config.judge_model, "judge") if config.judge_url else None
    env = World(user, judge)
    try:
        yield env
    finally:
        env.hang_up()
        if server:
            server.stop()


def go_on_after_restart(config: Config, store: dist.Store | None) -> Config:
    """Return the settings with which processes go on that torchrun has restarted: in the run folder that they had.

    From its newest checkpoint, or, as long as there was none, from the start.
    """
    if store is None or not store.check(["run_dir"]):
        return config
    run_dir = store.get("run_dir").decode()
    begun = bool(checkpoints.published(Path(run_dir) / "checkpoints"))
    return replace(config, run_dir=run_dir, resume=run_dir if begun else "", overwrite=not begun)


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line and return the exit code (see the top of the file); an error is one line on stderr."""
    received: list[int] = []
    parsed = attempt(lambda: parse_args(argv))
    try:
        with catch_signals(received):
            timeout = getattr(parsed, "collective_timeout", Config.collective_timeout)
            store = launcher_store(timeout)
            join_processes(store, timeout, alone=getattr(parsed, "shard", False))
            return launch(together(lambda: parsed), store if rank() == 0 else None, received)
    except (ValueError, LostProcess, Unavailable) as error:
        if not isinstance(error, AgreedError | Unavailable) or os.environ.get("RANK", "0") == "0":
            tell(str(error))
        return {LostProcess: 1, Unavailable: os.EX_TEMPFAIL}.get(type(error), 2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def launch(config: Config, store: dist.Store | None, received: list[int]) -> int:
    """Open what a run needs and train; returns the exit code. Rank 0 has the launcher's store, if there is one."""
    config = on_rank_0(lambda: go_on_after_restart(config, store))
    if config.dry_run:
        print(dry_run(config))
        return 0
    with ExitStack() as stack:
        claim = claim_folder(config.run_dir, bool(config.resume), config.overwrite)
        together(lambda: stack.enter_context(claim) if rank() == 0 else None)
        if store:
            store.set("run_dir", config.run_dir)
        tape = together(lambda: stack.enter_context(open_tape(config)))
        env = together(lambda: stack.enter_context(open_world(config, tape)))
        env.signals = received
        return train(config, env)


def tell(error: str) -> None:
    """Print an error as one line, and leave it for the report that torchrun ends with."""
    print(f"train_rlpa.py: {error}", file=sys.stderr)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        shown = {"message": error, "extraInfo": {"timestamp": int(time.time())}}
        Path(path).write_text(json.dumps({"message": shown}))


if __name__ == "__main__":
    sys.exit(main())
