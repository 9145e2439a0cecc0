"""Who is evaluated: a checkpoint played by our sampler, or a model that is asked in messages, here or at an endpoint.

    native    a checkpoint that writes <profile> and <response>: train_rlpa.rollout with one candidate (KV reused)
    asked     a method (`prompting.py`) asks in chat messages: an endpoint over HTTP, or a checkpoint by our sampler

Both are played by `train_rlpa.play_dialogue` and leave the same record, a `Dialogue` with judged turns. Random streams
depend on seed, persona and turn alone: all subjects meet the same users, so that they can be compared in pairs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import rewards
from config import Config
from dialogue import SYSTEM_PROMPT, Candidate, ChatTokenizer, Dialogue, Turn, stream_seed
from endpoints.client import ChatClient
from endpoints.speech import split_thoughts
from endpoints.wire import ChatError, ChatReply, Message
from evaluation import prompting
from kernels import set_backend
from learners.adapters import with_saved_adapter
from learners.loading import compute_dtype, keep_freed_memory, let_segments_grow, set_threads
from learners.weights import load_policy
from model import Qwen2ForCausalLM
from sampler import Draw, Sampler, make_sampler
from scheduler import Ask, Sample, Scheduler
from simulator import Environment, Said
from train_rlpa import Play, play_dialogue, rollout
from worlds.ledger import on_ledger

RLPA = "rlpa"  # the method with a profile: the system prompt of training, and replies that are parsed
METHODS: dict[str, prompting.Method] = {RLPA: partial(prompting.base, system=SYSTEM_PROMPT), **prompting.METHODS}
Answering = Generator[Ask | Sample, Any, ChatReply | ChatError]  # a call under way, as the scheduler sees it


@dataclass(kw_only=True)
class Reply(Candidate):
    """A turn of a subject that was asked in messages: it has no ids, and somebody else counts its tokens."""

    tokens: int = 0  # of all calls that made it
    counted_by: str = ""  # "usage": the endpoint said how many; "words": it did not, and these are words


def tokens_of(candidate: Candidate) -> int:
    """Return how many tokens a turn took to write, thoughts and drafts included."""
    return candidate.tokens if isinstance(candidate, Reply) else len(candidate.token_ids)


def counted_by(candidate: Candidate) -> str:
    """Return who counted a turn's tokens."""
    return candidate.counted_by if isinstance(candidate, Reply) else "sampled ids"


# ---------------------------------------------------------------------------------------------------- playing subjects


def load_checkpoint(folder: Path, config: Config, adapter: str = "") -> tuple[Qwen2ForCausalLM, ChatTokenizer]:
    """Load a policy, or a base with an adapter, for sampling; ValueError in one line if a folder is amiss."""
    let_segments_grow()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = load_policy(folder, dtype=compute_dtype(config, device), device=device).requires_grad_(False)
    policy = with_saved_adapter(policy, Path(adapter)) if adapter else policy
    chat = ChatTokenizer.from_folder(folder, policy.config.vocab_size)
    set_threads(policy, config)
    keep_freed_memory()
    set_backend(config.kernels)
    return policy, chat


def play_checkpoint(
    folder: Path, method: str, dialogues: list[Dialogue], play: Play, config: Config, env: Environment
) -> None:
    """Play dialogues with a checkpoint: natively, or by asking it in messages; fills in `turns` and `dropped`."""
    policy, chat = load_checkpoint(folder, config)
    if method == RLPA:
        rollout(policy, chat, dialogues, play, config, env)
        return
    sampler = make_sampler(policy, chat, config, 1, play.temperature, len(dialogues))
    speaker = AskedSpeaker(partial(ask_policy, sampler, chat), method, play, config, env)
    Scheduler(sampler, config, env).run(play_dialogue(dialogue, speaker) for dialogue in dialogues)
    env.counts.update(sampler.counts)


def play_endpoint(
    client: ChatClient, method: str, dialogues: list[Dialogue], play: Play, config: Config, env: Environment
) -> None:
    """Play dialogues with an OpenAI-compatible endpoint; fills in `turns` and `dropped`."""
    speaker = AskedSpeaker(partial(ask_endpoint, client), method, play, config, env)
    env.subject = client  # so that an error, or Ctrl-C, cuts off its calls, too
    Scheduler(None, config, env).run(play_dialogue(dialogue, speaker) for dialogue in dialogues)


def ask_endpoint(client: ChatClient, key: int, messages: list[Message], seed: int) -> Answering:
    """Ask an endpoint."""
    return (yield Ask(partial(client.ask, messages, seed)))


def ask_policy(sampler: Sampler, chat: ChatTokenizer, key: int, messages: list[Message], seed: int) -> Answering:
    """Ask a checkpoint, in the Qwen chat template; a ChatError if there are no positions left for its reply."""
    closed = [chat.message(message["role"], message["content"]) for message in messages]
    prompt_ids = [*sum(closed, []), *chat.generation_header]
    if not sampler.fits(len(prompt_ids)):
        return ChatError("too_large", "no more positions")
    draws: list[Draw] = []
    yield Sample(key, prompt_ids, [seed], draws.append)
    sampler.adopt(key, 0)
    speech, _ = split_thoughts(chat.visible(draws[0].token_ids).strip())
    reply = ChatReply(speech or "...")  # who says nothing is judged for it
    reply.tokens = len(draws[0].token_ids)
    return reply


class AskedSpeaker:
    """A model that answers the user because it is asked in messages, by a method's prompts."""

    def __init__(
        self, ask: Callable[[int, list[Message], int], Answering], method: str, play: Play, config: Config,
        env: Environment,
    ) -> None:  # fmt: skip
        self.ask, self.method, self.play, self.config, self.env = ask, method, play, config, env

    def answer(self, dialogue: Dialogue, said: Said) -> Generator[Ask | Sample, Any, list[Candidate]]:
        """Open a turn and let a method's calls make its only candidate; [] if one of them failed."""
        dialogue.turns.append(Turn(said, [], told=said.told))
        reply = yield from self.converse(dialogue)
        if isinstance(reply, ChatError):
            dialogue.turns.pop()
            if reply.reason != "too_large" or not dialogue.turns:  # one that is too long ends early: its turns count
                dialogue.dropped = f"subject: {reply.reason}"
            return []
        seed = stream_seed(*self.play.stream, "judge", dialogue.index, len(dialogue.turns), 0)
        judge = self.env.judge_with(seed)
        yield Ask(partial(rewards.score_candidate, reply, dialogue, self.config, judge))
        return [reply]

    def converse(self, dialogue: Dialogue) -> Generator[Ask | Sample, Any, Reply | ChatError]:
        """Make a method's calls for one turn; returns the turn, or the error of a call that failed."""
        native = self.method == RLPA
        steps = METHODS[self.method](written_history(dialogue, self.config) if native else dialogue.history())
        answers: list[ChatReply] = []
        messages = next(steps)
        while True:
            stream = (*self.play.stream, "subject", dialogue.index, len(dialogue.turns), len(answers))
            answer = yield from self.ask(dialogue.index, messages, stream_seed(*stream))
            if isinstance(answer, ChatError):
                return answer
            answers.append(answer)
            try:
                messages = steps.send(answer)
            except StopIteration as end:
                return read_reply(end.value, answers, dialogue, native, self.env.matches)

    def adopt(self, key: int, candidate: int) -> None:
        """Keep nothing: the next messages are sent whole."""

    def forget(self, key: int) -> None:
        """Keep nothing."""


def written_history(dialogue: Dialogue, config: Config) -> list[tuple[str, str]]:
    """Return the dialogue as the subject wrote it: profile blocks in all its turns, or with "latest" in the newest."""
    said: list[tuple[str, str]] = []
    for t, turn in enumerate(dialogue.turns):
        said.append(("user", turn.user_text))
        if turn.candidates:
            whole = config.history_profile == "all" or t == len(dialogue.turns) - 2
            said.append(("assistant", turn.winner.text if whole else turn.winner.response))
    return said


def read_reply(
    text: str, answers: Sequence[ChatReply], dialogue: Dialogue, native: bool, matches: rewards.Matcher
) -> Reply:
    """Make a turn's record of its text: parsed if a profile was asked for, else a reply as it stands."""
    parsed = rewards.parse_turn(text) if native else rewards.ParsedTurn([], text)
    facts, metered = dialogue.persona_facts, all(answer.tokens is not None for answer in answers)
    return Reply(
        token_ids=[],
        logprobs=[],
        stop_reason="stop",
        text=text,
        profile=parsed.profile,
        response=parsed.response,
        failure=parsed.failure,
        verdicts=dict.fromkeys(rewards.VERDICTS, False),
        ledger=asdict(rewards.score_profile(parsed.profile, facts, on_ledger(facts, dialogue.told()), matches)),
        tokens=sum(answer.tokens if metered else len(answer.split()) for answer in answers),
        counted_by="usage" if metered else "words",
    )


# ------------------------------------------------------------------------------------------------------------ progress


@contextmanager
def progress(dialogues: list[Dialogue], max_turns: int, name: str, show: bool) -> Iterator[None]:
    """Show a bar of the turns that were played, by looking at the dialogues twice a second from a thread."""
    over = threading.Event()
    bar = tqdm(total=len(dialogues) * max_turns, desc=name, unit="turn", disable=not show)

    def look() -> None:
        while not over.wait(0.5):
            bar.update(sum(len(d.turns) for d in dialogues) - bar.n)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        bar.update(sum(len(d.turns) for d in dialogues) - bar.n)
        bar.close()
