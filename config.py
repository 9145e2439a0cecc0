"""All settings of a run. A field's type holds its limits, and its comment is its `--help`.

Defaults are the published ones (arXiv 2505.15456), except --history-profile. A checkpoint may bring its own in
`rlpa.json`, as far as they say how it is trained. Flags override both.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Literal, get_type_hints

from untrusted.files import check_value

MANY, HERE = 10**9, "here"  # HERE: what a bare --dry-run plans for
RUN_FORMAT = "rlpa run 1"  # "format" in a run's config.json: the mark by which a folder is a run, and so ours to remove
Natural, Count, Small = Annotated[int, (0, MANY)], Annotated[int, (1, MANY)], Annotated[int, (1, 10_000)]
OrMinusOne, Threads = Annotated[int, (-1, MANY)], Annotated[int, (0, 1024)]
Amount, Positive, Share = Annotated[float, (0, MANY)], Annotated[float, (1e-6, MANY)], Annotated[float, (0, 1)]
Rank = Annotated[int, (0, 4096)]
Patience = Annotated[float, (1, 10**7)]
UserMode = Literal["auto", "planned", "plain"]
ProfileJudge = Literal["auto", "rule", "words", "encoder", "http"]  # auto: rule, or words if an LLM plays the user
ProfileTarget = Literal["persona", "evidence", "ledger"]


@dataclass
class Config:
    """The settings, flat; `--help` shows them in these groups. Raises ValueError, in one line, for a bad value."""

    # --- checkpoint and run folder
    ckpt: str = ""  # policy to start from: a Hugging Face folder, hub id or GGUF file; bare: the tiny checkpoint
    adapter: str = ""  # LoRA folder, in peft's layout, to start from on --ckpt; the reference has it, too
    merge: str = ""  # only write --ckpt with --adapter added to its weights into this folder: a whole checkpoint
    critic_ckpt: str = ""  # critic to start from; empty: a copy of the policy with a fresh value head
    run_dir: str = ""  # where everything is written; empty: runs/<date-time>_<process>
    overwrite: bool = False  # remove the run that --run-dir holds already
    save: Literal["run", "policy", "nothing"] = "run"  # run: all that --resume needs; policy: its weights, in --dtype
    resume: str = ""  # a run folder to go on with from its newest checkpoint; addresses and key are given anew
    seed: Natural = 0  # every random stream is derived from it and from what the stream is for

    # --- personas, user and judge
    personas: str = ""  # JSONL file of personas; empty: synthetic ones of the embedded world
    eval_personas: str = ""  # JSONL file for evaluation; empty: every tenth of --personas, or synthetic held-out ones
    num_personas: Count = 4096  # how many synthetic training personas to make when --personas is not given
    simulator_url: str = ""  # OpenAI-compatible endpoint that plays the user, or several: URL,URL; empty: the embedded
    simulator_model: str = "rule-user"  # model name to ask it for; without a URL: rule-user or rule-user-2
    user_mode: UserMode = "auto"  # planned: the program chooses what an LLM user tells; plain: the LLM; auto: planned
    judge_url: str = ""  # OpenAI-compatible endpoint that gives the five verdicts, or several; empty: by rule
    judge_model: str = "judge"  # model name to ask it for
    profile_judge: ProfileJudge = "auto"  # matches profile lines: exact rule, words, encoder, or http: judge endpoint
    first_user_message: str = "Hello"  # fixed opener (published); empty: ask the simulator

    # --- calls to endpoints
    api_key_env: str = ""  # environment variable that holds the endpoints' key; empty: none is sent
    request_timeout: Positive = 120.0  # seconds for one request, retries included; a third of it may pass in silence
    max_retries: Natural = 10  # tries after the first, for connection errors, 408, 409, 429 and 5xx
    max_concurrency: Count = 64  # requests in flight per process
    requests_per_minute: Amount = 0.0  # most of them, to user and judge together, of all processes; 0: any number
    tokens_per_minute: Amount = 0.0  # most tokens of prompts and replies, likewise; 0: any number
    breaker_failures: Count = 5  # failures in a row after which an endpoint gets one probe at a time and no other call
    outage_budget: Amount = 1800.0  # seconds to wait for endpoints that all fail; then save, exit 75; 0: never wait
    quorum: Share = 0.5  # share of a batch's dialogues that must survive; else the batch is discarded and replayed
    quorum_retries: Natural = 2  # times that a batch is replayed; then save, exit 75
    record: str = ""  # file that every reply of user and judge is written to, to be replayed; goes on if it exists
    replay: str = ""  # such a file, which gives the replies instead of user and judge: nothing is asked or paid
    price_in: Amount = 0.0  # dollars per million prompt tokens of the endpoints; with --price-out, costs are shown
    price_out: Amount = 0.0  # dollars per million tokens of their replies

    # --- rollout
    rollout_batch_size: Count = 256  # dialogues per iteration, over all processes
    decode_batch_size: Count = 64  # dialogues that decode at once in one process; the others are parked with their KV
    kv_gib: Amount = 0.0  # GiB for the KV cache of one process; 0: measured at the start of a rollout
    reply_steps: OrMinusOne = -1  # decode steps until a reply is used; 0: as it comes; -1: 16, or 0 with live endpoints
    max_turns: Small = 10  # turns per dialogue
    num_candidates: Small = 4  # candidates per turn; the best one continues the dialogue
    max_new_tokens: Count = 1024  # tokens per sampled turn
    max_user_tokens: Count = 512  # a longer user message is cut to so many tokens
    temperature: Positive = 1.0  # divides the logits in sampling and in every log-prob
    history_profile: Literal["all", "latest"] = "all"  # <profile> blocks that stay in the history; latest is published

    # --- rewards
    profile_weight: Amount = 1.0  # weight of the Profile Reward; 0: it is measured, but earns nothing
    response_weight: Amount = 1.0  # weight of the Response Reward; 0: it is measured, but earns nothing
    profile_target: ProfileTarget = "persona"  # F1 against persona (published), evidence (once disclosed) or ledger
    reward_at: Literal["turn", "segment"] = "turn"  # turn: on its last token (published); segment: at </profile>

    # --- advantages
    advantage: Literal["gae", "rloo", "grpo"] = "gae"  # by a critic (published), or against a turn's other candidates
    credit: Literal["turn", "dialogue"] = "turn"  # dialogue: GAE goes on along the chosen path; turn is published
    gae_level: Literal["token", "turn"] = "token"  # GAE's step: a token (published), or a whole turn
    gamma: Share = 1.0  # discount per token; with --gae-level turn it must be 1
    gamma_turn: Share = 1.0  # discount per turn boundary with --credit dialogue; 0 equals --credit turn
    gae_lambda: Share = 0.95  # GAE's lambda per step
    kl_estimator: Literal["k1", "k3", "exact"] = "k1"  # k1: in the reward (published); k3, or exact over V: in the loss
    kl_coef: Amount = 0.01  # weight of the KL to the reference policy; 0 switches it off and saves its forward

    # --- update
    num_iterations: Natural = 0  # iterations to run; 0: one pass over the personas
    minibatch_size: Count = 4  # dialogues per optimizer step, over all processes (x 10 turns x 4 candidates: 160)
    microbatch_tokens: Count = 16384  # tree tokens per forward and backward in one process; one dialogue is never cut
    num_epochs: Count = 1  # passes over a rollout batch
    lora_rank: Rank = 0  # train adapters (LoRA) of this rank on a frozen base; they want about 5 x the --lr; 0: off
    lora_alpha: Positive = 32.0  # adapters are weighed by alpha / rank
    lr: Amount = 5e-7  # policy's peak learning rate
    critic_lr: Amount = 9e-6  # critic's peak learning rate
    adam_beta1: Share = 0.9  # AdamW
    adam_beta2: Share = 0.95  # AdamW
    warmup_share: Share = 0.03  # share of all updates with a rising learning rate
    min_lr_share: Share = 0.1  # the cosine ends at this share of the peak
    schedule_iterations: Natural = 0  # iterations until the cosine ends; 0: all; a resumed run keeps what it began with
    max_grad_norm: Positive = 1.0  # global norm that gradients are clipped to
    clip_eps: Positive = 0.2  # ratio clip of the policy loss
    clip_eps_high: Amount = 0.0  # its upper side, at least --clip-eps ("clip-higher"); 0: the same
    dual_clip: Amount = 0.0  # c >= 1: with an advantage A < 0 the loss is at most c |A|; 0: no bound
    sampler_correction: Amount = 0.0  # C >= 1: weigh each token's policy loss by min(C, p_trainer / p_sampler); 0: off
    value_clip: Positive = 0.2  # clip of the value's move away from the old value
    entropy_coef: Amount = 0.0  # weight of an entropy bonus
    critic: Literal["separate", "shared"] = "separate"  # its own trunk (published), or a head on the policy's trunk
    value_coef: Amount = 0.5  # weight of the value loss in the gradient of a shared trunk
    critic_warmup: Natural = 0  # first iterations that train the critic alone
    old_logprobs: Literal["auto", "sampler", "trainer"] = "auto"  # whose are used; auto: sampler's in fp32, no Triton

    # --- machine
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of products; auto: bfloat16 on CUDA; on a CPU measured
    kernels: Literal["auto", "triton", "torch"] = "auto"  # auto: triton on CUDA, torch on a CPU
    shard: bool = False  # share weights, gradients and moments out over the processes (FSDP2); see docs/scaling.md
    checkpointing: bool = False  # keep only the layers' inputs for the backward: a third more work, far less memory
    threads: Threads = 0  # CPU threads per process; 0: one for models below 10 M parameters, else all cores shared out
    collective_timeout: Patience = 1800.0  # seconds that a process waits for the others; longer than any rollout
    dry_run: str = ""  # only print memory, tokens and calls: bare for this machine, 8x80 for 8 GPUs of 80 GB

    # --- evaluation, log, checkpoints
    eval_every: Natural = 10  # iterations between held-out evaluations; 0: only before and after
    eval_dialogues: Count = 32  # held-out personas per evaluation, over all processes
    episodes_every: Natural = 10  # iterations between full records in episodes.jsonl
    save_every: Natural = 10  # iterations between checkpoints; 0: only the last
    keep_last: Natural = 3  # newest checkpoints that are kept, beside the best by held-out reward; 0: all
    tensorboard: bool = True  # write TensorBoard events beside metrics.jsonl

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            check_value(getattr(self, name), hint, flag(name))
        if self.rollout_batch_size % self.minibatch_size:
            raise ValueError(
                f"--rollout-batch-size {self.rollout_batch_size} is not a multiple of"
                f" --minibatch-size {self.minibatch_size}"
            )
        if self.critic == "shared" and self.critic_ckpt:
            raise ValueError(f"--critic-ckpt {self.critic_ckpt} needs --critic separate: a shared one has no trunk")
        check_adapters(self)
        if self.critic == "separate" and self.value_coef != Config.value_coef:
            raise ValueError(f"--value-coef {self.value_coef} needs --critic shared: a separate one has its own step")
        if self.advantage != "gae":
            refuse_critic_flags(self)
        check_credit(self)
        check_clips(self)
        if self.dry_run and self.dry_run != HERE:
            dry_run_devices(self)
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
            f"--num-candidates 1 leaves nothing to compare with; --advantage {config.advantage} needs 2 or more"
        )
    needed = {"credit": "turn", "gae_level": "token", "critic": "separate", "critic_ckpt": "", "critic_warmup": 0}
    for name, without in needed.items():
        if getattr(config, name) != without:
            raise ValueError(
                f"{flag(name)} {getattr(config, name)} needs --advantage gae: {config.advantage} has no critic"
            )


def check_adapters(config: Config) -> None:
    """Raise ValueError for adapters without a rank, and for what does not work with them."""
    if config.adapter and not config.lora_rank:
        raise ValueError(f"--adapter {config.adapter} needs its --lora-rank")
    if config.merge and not config.adapter:
        raise ValueError(f"--merge {config.merge} needs --adapter: the one to add to the weights of --ckpt")


def check_credit(config: Config) -> None:
    """Raise ValueError for discounts of steps that do not exist."""
    if config.credit == "turn" and config.gamma_turn != Config.gamma_turn:
        raise ValueError(f"--gamma-turn {config.gamma_turn} needs --credit dialogue: with turn, no later turn counts")
    if config.gae_level == "turn" and config.gamma != 1:
        raise ValueError(f"--gamma {config.gamma} needs --gae-level token: a turn is one step; see --gamma-turn")


def check_clips(config: Config) -> None:
    """Raise ValueError for limits that would cut where nothing has changed yet, and for one without effect."""
    for name, least in {"clip_eps_high": config.clip_eps, "dual_clip": 1.0, "sampler_correction": 1.0}.items():
        if 0 < getattr(config, name) < least:
            raise ValueError(f"{flag(name)} is {getattr(config, name)}; give at least {least}, or 0 to switch it off")
    if config.sampler_correction and config.old_logprobs == "sampler":
        raise ValueError(
            f"--sampler-correction {config.sampler_correction} needs --old-logprobs trainer (or auto):"
            " the sampler's own leave nothing to correct"
        )


def refuse_ignored(config: Config, given: Collection[str]) -> None:
    """Raise ValueError for a flag that was given and has no effect; what a checkpoint brings along may have none."""
    ignored = {} if config.lora_rank else {"lora_alpha": "--lora-rank"}
    if config.advantage != "gae":
        names = ("gamma", "gae_lambda", "reward_at", "critic_lr", "value_clip")
        ignored |= dict.fromkeys(names, f"--advantage gae: {config.advantage} has no critic")
    elif config.gae_level == "turn":
        ignored["reward_at"] = "--gae-level token: a turn's rewards are summed"
        if config.credit == "turn":
            ignored["gae_lambda"] = "--credit dialogue: with --gae-level turn, a turn alone is one step"
    for name, needed in ignored.items():
        if name in given:
            raise ValueError(f"{flag(name)} {getattr(config, name)} needs {needed}")


def dry_run_devices(config: Config) -> tuple[int, float]:
    """Return the number of CUDA devices (0: not given) and the GB of each that --dry-run plans for."""
    match = re.fullmatch(r"(?:([1-9]\d{0,5})x)?(\d{1,6}(?:\.\d+)?)", config.dry_run)
    if not match or not float(match[2]):
        raise ValueError(f"--dry-run is {config.dry_run!r}; it takes GB, or DEVICESxGB such as 8x80, or no value")
    return int(match[1] or 0), float(match[2])


def flag(name: str) -> str:
    """Return the command-line flag of a field."""
    return "--" + name.replace("_", "-")


def has_own_trunk(config: Config) -> bool:
    """Say whether there is a critic, and it has a trunk of its own."""
    return config.advantage == "gae" and config.critic == "separate"
