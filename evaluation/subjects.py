"""Who is evaluated: a checkpoint played by our sampler, or a model that is asked in messages, here or at an endpoint.

    native    a checkpoint that writes <profile> and <response>: train_rlpa.rollout with one candidate (KV reused)
    asked     a method (`prompting.py`) asks in chat messages: an endpoint over HTTP, or a checkpoint by our sampler

Both leave the same record, a `Dialogue` with judged turns, so that nothing behind them knows who played. Random streams
depend on seed, persona and turn alone: all subjects meet the same users, which is what makes a paired comparison.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import rewards
import train_rlpa
from config import Config
from dialogue import SYSTEM_PROMPT, Candidate, ChatTokenizer, Dialogue, Turn, stream_seed
from endpoints.client import ChatClient
from endpoints.wire import ChatError, ChatReply, Message
from evaluation import prompting
from kernels import set_backend
from learners.loading import compute_dtype, keep_freed_memory, set_threads
from learners.weights import load_policy
from model import Qwen2ForCausalLM
from sampler import Draw, Sampler, kv_budget
from simulator import Environment, simulator_messages
from train_rlpa import Play
from worlds.personas import Persona

RLPA = "rlpa"  # the method with a profile: the system prompt of training, and replies that are parsed
METHODS: dict[str, prompting.Method] = {RLPA: partial(prompting.base, system=SYSTEM_PROMPT), **prompting.METHODS}
Call = tuple[list[Message], int]  # messages and seed
Player = Generator[Call, ChatReply | ChatError, None]  # a dialogue that goes on whenever its subject has answered


@dataclass
class Reply(Candidate):
    """A turn of a subject that was asked in messages: its tokens are counted by others, and it has no ids."""

    tokens: int = 0  # of all calls that made it
    counted_by: str = ""  # "usage": the endpoint said how many; "words": it did not, and these are words


def tokens_of(candidate: Candidate) -> int:
    """Return how many tokens a turn took to write, thoughts and drafts included."""
    return candidate.tokens if isinstance(candidate, Reply) else len(candidate.token_ids)


def counted_by(candidate: Candidate) -> str:
    """Return who counted a turn's tokens."""
    return candidate.counted_by if isinstance(candidate, Reply) else "sampled ids"


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def load_checkpoint(folder: Path, config: Config) -> tuple[Qwen2ForCausalLM, ChatTokenizer]:
    """Load a policy for sampling; ValueError in one line if folder or tokenizer is amiss."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = load_policy(folder, dtype=compute_dtype(config, device), device=device).requires_grad_(False)
    chat = ChatTokenizer.from_folder(folder)
    if chat.vocab_size > policy.config.vocab_size:
        raise ValueError(
            f"tokenizer of {folder} has {chat.vocab_size} ids, the model's embedding only {policy.config.vocab_size}"
        )
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
        train_rlpa.rollout(policy, chat, dialogues, play, config, env)
        return
    model = AskedPolicy(policy, chat, play, config, len(dialogues))
    players = {d.index: converse(d, method, play, config, env) for d in dialogues}
    answers: dict[int, ChatReply | ChatError | None] = dict.fromkeys(players)  # None starts a generator
    with dialogue_threads(config, env) as pool:  # users and judges may be slow: they are asked in threads
        while answers:
            asked = {i: pool.submit(advance, players[i], answer) for i, answer in answers.items()}
            first_error(asked.values())
            answers = model.answer({i: call for i, future in asked.items() if (call := future.result()) is not None})
    env.counts.update(model.sampler.counts)


@contextmanager
def dialogue_threads(config: Config, env: Environment, subject: ChatClient | None = None) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool of threads. An error in one of them, or Ctrl-C, ends all: requests under way are cut off."""
    with ThreadPoolExecutor(config.max_concurrency) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            env.hang_up()  # else threads would play their dialogues to the end, at the pace of their replies
            if subject is not None:
                subject.close()
            raise


def first_error(futures: Iterable[Future]) -> None:
    """Wait until all are done, or one has failed, whose exception is raised."""
    for future in wait(futures, return_when=FIRST_EXCEPTION).done:
        future.result()


def advance(player: Player, answer: ChatReply | ChatError | None) -> Call | None:
    """Go on with a dialogue until it asks its subject again; None at its end."""
    try:
        return player.send(answer)
    except StopIteration:
        return None


class AskedPolicy:
    """A checkpoint that is asked in messages; the calls of all dialogues decode together, each with its own KV row."""

    def __init__(self, policy: Qwen2ForCausalLM, chat: ChatTokenizer, play: Play, config: Config, size: int):
        self.chat, self.room = chat, policy.config.max_position_embeddings - config.max_new_tokens
        self.sampler = Sampler(
            policy,
            n=1,
            max_new_tokens=config.max_new_tokens,
            stop_ids=[chat.im_end],
            temperature=play.temperature,
            batch_size=config.decode_batch_size,
            max_rows=size,
            kv_bytes=kv_budget(config, policy.head_weight.device),
        )

    def answer(self, calls: dict[int, Call]) -> dict[int, ChatReply | ChatError]:
        """Answer one call of each dialogue; one that has outgrown the model's positions gets a ChatError."""
        prompts = {key: (self.prompt(messages), seed) for key, (messages, seed) in calls.items()}
        answers: dict[int, ChatReply | ChatError] = dict.fromkeys(calls, ChatError("too_large", "no more positions"))
        waiting = deque((key, ids, seed) for key, (ids, seed) in prompts.items() if len(ids) <= self.room)
        while waiting or self.sampler.running:
            while waiting and self.sampler.start(waiting[0][0], waiting[0][1], [waiting[0][2]]):
                waiting.popleft()
            for draw in self.sampler.step():
                self.sampler.adopt(draw.key, 0)
                answers[draw.key] = self.reply(draw)
        return answers

    def prompt(self, messages: list[Message]) -> list[int]:
        """Encode messages by the Qwen chat template."""
        closed = [self.chat.message(message["role"], message["content"]) for message in messages]
        return sum(closed, []) + self.chat.generation_header()

    def reply(self, draw: Draw) -> ChatReply:
        """Return what was sampled as a reply that knows its tokens."""
        reply = ChatReply(self.chat.visible(draw.token_ids).strip())
        reply.tokens = len(draw.token_ids)
        return reply


# ---------------------------------------------------------------------------------------------------------------------
# Endpoints


def play_endpoint(
    client: ChatClient, method: str, dialogues: list[Dialogue], play: Play, config: Config, env: Environment
) -> None:
    """Play dialogues with an OpenAI-compatible endpoint, each in a thread; fills in `turns` and `dropped`."""

    def run(dialogue: Dialogue) -> None:
        player, answer = converse(dialogue, method, play, config, env), None
        while (call := advance(player, answer)) is not None:
            answer = client.ask(*call)

    with dialogue_threads(config, env, client) as pool:
        first_error([pool.submit(run, dialogue) for dialogue in dialogues])


# ---------------------------------------------------------------------------------------------------------------------
# The dialogue loop for subjects that are asked in messages


def converse(dialogue: Dialogue, method: str, play: Play, config: Config, env: Environment) -> Player:
    """Play one dialogue; yields the calls that its subject is to answer, and ends when it is over or dropped.

    The loop of `train_rlpa.Stage` with one candidate: user message → reply → parsed and judged → next turn.
    """
    for t in range(config.max_turns):
        dialogue.change()
        said = user_message(dialogue, play, config, env)
        if isinstance(said, ChatError):
            dialogue.dropped = f"simulator: {said.reason}"
            return
        dialogue.turns.append(Turn(said, []))
        try:
            reply = yield from ask_subject(dialogue, method, play, config)
        except ChatError as error:
            dialogue.turns.pop()
            if error.reason != "too_large" or t == 0:  # one that is too long ends early, and its turns so far count
                dialogue.dropped = f"subject: {error.reason}"
            return
        dialogue.turns[-1].candidates.append(reply)
        seed = stream_seed(*play.stream, "judge", dialogue.index, len(dialogue.turns), 0)
        train_rlpa.judge(reply, dialogue, seed, config, env)
        if not reply.judged:
            dialogue.dropped = "judge: no verdict on any candidate"
            return


def user_message(dialogue: Dialogue, play: Play, config: Config, env: Environment) -> str | ChatError:
    """Return what the simulated user says next: the fixed opener, or a reply in the streams of the rollout."""
    if not dialogue.turns and config.first_user_message:
        return config.first_user_message
    messages = simulator_messages(Persona(dialogue.persona_id, dialogue.persona_facts), dialogue.history())
    return env.user.ask(messages, stream_seed(*play.stream, "user", dialogue.index, len(dialogue.turns)))


def ask_subject(dialogue: Dialogue, method: str, play: Play, config: Config) -> Generator[Call, ChatReply, Reply]:
    """Yield a method's calls for one turn and return the turn; raises the ChatError of a call that failed."""
    native = method == RLPA
    steps = METHODS[method](written_history(dialogue, config) if native else dialogue.history())
    answers: list[ChatReply] = []
    messages = next(steps)
    while True:
        stream = (*play.stream, "subject", dialogue.index, len(dialogue.turns), len(answers))
        answer = yield messages, stream_seed(*stream)
        if isinstance(answer, ChatError):
            raise answer
        answers.append(answer)
        try:
            messages = steps.send(prompting.without_thoughts(answer) or "...")
        except StopIteration as end:
            return read_reply(end.value, answers, dialogue, native)


def written_history(dialogue: Dialogue, config: Config) -> list[tuple[str, str]]:
    """Return the dialogue as the subject wrote it: profile blocks in all its turns, or with "latest" in the newest."""
    said: list[tuple[str, str]] = []
    for t, turn in enumerate(dialogue.turns):
        said.append(("user", turn.user_text))
        if turn.candidates:
            whole = config.history_profile == "all" or t == len(dialogue.turns) - 2
            said.append(("assistant", turn.winner.text if whole else turn.winner.response))
    return said


def read_reply(text: str, answers: Sequence[ChatReply], dialogue: Dialogue, native: bool) -> Reply:
    """Make a turn's record of its text: parsed if a profile was asked for, else a reply as it stands."""
    parsed = rewards.parse_turn(text) if native else rewards.ParsedTurn([], text)
    told = all(answer.tokens is not None for answer in answers)
    return Reply(
        [],
        [],
        "stop",
        text=text,
        profile=parsed.profile,
        response=parsed.response,
        failure=parsed.failure,
        verdicts=dict.fromkeys(rewards.VERDICTS, False),
        ledger=asdict(rewards.score_profile(parsed.profile, dialogue.persona_facts, dialogue.user_texts())),
        scored=True,
        tokens=sum(answer.tokens if told else len(answer.split()) for answer in answers),
        counted_by="usage" if told else "words",
    )


# ---------------------------------------------------------------------------------------------------------------------
# Progress


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
