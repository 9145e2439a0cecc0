"""Talk to a checkpoint in the terminal, or serve it as an OpenAI-compatible endpoint.

    python chat.py --ckpt FOLDER                         what it has inferred of you stands beside each reply
    python chat.py --ckpt FOLDER --serve --port 8200     POST /v1/chat/completions, GET /v1/models

Both sample with the trainer's sampler; keys and values are kept from turn to turn. In the terminal, `/profile` shows
what the policy believes of you, `/forget TRAIT` takes it out of the history that the policy sees and keeps it out, and
`/reset` drops everything. docs/endpoints.md says what the endpoint takes and gives.
"""

from __future__ import annotations

import argparse
import itertools
import math
import queue
import random
import shutil
import sys
import textwrap
import time
import traceback
import unicodedata
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields, replace
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import rewards
import train_rlpa
import world
from command_line import exits
from command_line.flags import field_comments
from dialogue import SYSTEM_PROMPT, Candidate, ChatTokenizer, Dialogue, Turn, open_turn, render_turn
from evaluation.subjects import load_checkpoint
from model import Qwen2ForCausalLM, resolve_checkpoint
from plain_text import clean_text
from sampler import Draw, Sampler
from simulator import Message, RequestError, json_type, make_server, parse_request, read_key
from train_rlpa import Config, stream_seed

HELP = """\
/profile        what the policy has inferred of you, and since which turn
/forget TRAIT   take the lines with these words out of all profiles, and keep them out until /reset
/reset          drop the whole dialogue, and what was forgotten
/help           this text
/quit           end; so does the end of the input
Marks: + new, ~ changed, - no longer there."""
PASSED = (  # flags that are the trainer's; their help stands in train_rlpa.Config
    "max_new_tokens",
    "history_profile",
    "decode_batch_size",
    "kv_gib",
    "dtype",
    "kernels",
    "threads",
    "seed",
)

# ---------------------------------------------------------------------------------------------------------------------
# One dialogue


def make_sampler(
    policy: Qwen2ForCausalLM, chat: ChatTokenizer, config: Config, temperature: float, rows: int, kv_bytes: int
) -> Sampler:
    """Return a sampler of one candidate per turn, for so many dialogues."""
    return Sampler(
        policy,
        n=1,
        max_new_tokens=config.max_new_tokens,
        stop_ids=[chat.im_end],
        temperature=temperature,
        batch_size=rows,
        max_rows=rows,
        kv_bytes=kv_bytes,
    )


def read_turn(token_ids: list[int], stop_reason: str, chat: ChatTokenizer) -> Candidate:
    """Return a sampled turn with its text parsed."""
    text = chat.visible(token_ids)
    parsed = rewards.parse_turn(text, stop_reason)
    return Candidate(token_ids, [], stop_reason, text, parsed.profile, parsed.response, parsed.failure)


class Talk:
    """One dialogue with the policy, and the traits that must not come back into its profile."""

    def __init__(self, policy: Qwen2ForCausalLM, chat: ChatTokenizer, config: Config, temperature: float):
        self.chat, self.config, self.longest = chat, config, policy.config.max_position_embeddings
        budget = train_rlpa.kv_budget(config, policy.head_weight.device)
        self.new_sampler = partial(make_sampler, policy, chat, config, temperature, 1, budget)
        self.sampler = self.new_sampler()
        self.reset()

    def reset(self) -> None:
        """Begin a new dialogue."""
        self.sampler.forget(0)
        self.dialogue = Dialogue(0, "you", ())
        self.forgotten: list[str] = []

    @property
    def turns(self) -> list[Turn]:
        """Give the turns so far."""
        return self.dialogue.turns

    def profile(self, turn: int = -1) -> list[str]:
        """Return the newest profile as of a turn; one that could not be read leaves the one before in force."""
        seen = self.turns[: turn % len(self.turns) + 1] if self.turns else []
        return next((t.winner.profile for t in reversed(seen) if t.winner.failure is None), [])

    def reply(self, text: str) -> Candidate:
        """Let the policy answer; ValueError if the message is, or the dialogue has become, too long for it.

        If it wrote a forgotten trait, the line is struck and the response is sampled again behind the profile without.
        """
        turn = open_turn(self.dialogue, text, self.chat, self.config.history_profile)
        try:
            reply = self.write(turn.prompt_ids, [])
            if reply.failure is None and any(map(self.is_forgotten, reply.profile)):
                kept = [line for line in reply.profile if not self.is_forgotten(line)]
                start = render_turn(kept, "").removesuffix("\n</response>")
                reply = self.write(turn.prompt_ids, self.chat.encode(start))
        except BaseException as error:
            self.turns.pop()  # a turn without an answer is no history
            if not isinstance(error, ValueError):
                self.sampler = self.new_sampler()  # Ctrl-C may have come in the middle of a step
            raise
        turn.candidates = [self.without_forgotten(reply)]
        return turn.winner

    def write(self, prompt_ids: list[int], start: list[int]) -> Candidate:
        """Sample a turn that begins with the ids `start`."""
        if len(prompt_ids) + len(start) + self.config.max_new_tokens > self.longest:
            raise ValueError(self.too_long())
        self.sampler.start(0, prompt_ids + start, [stream_seed(self.config.seed, "chat", len(self.turns), len(start))])
        ended: list[Draw] = []
        while not ended:
            ended = self.sampler.step()
        self.sampler.adopt(0, 0)
        return read_turn(start + ended[0].token_ids, ended[0].stop_reason, self.chat)

    def too_long(self) -> str:
        """Say why there are no positions for a reply to the newest message, and what makes room."""
        alone = Dialogue(0, "you", ())
        first = open_turn(alone, self.turns[-1].user_text, self.chat, self.config.history_profile)
        needed, reply = len(first.prompt_ids), self.config.max_new_tokens
        if needed + reply > self.longest:
            return (
                f"system prompt and message have {needed} tokens, a reply up to {reply}, and the model {self.longest}"
                f" positions: shorten the message, or start with a --max-new-tokens below {reply}"
            )
        return f"the dialogue has reached the model's {self.longest} positions; /reset begins a new one"

    def forget(self, trait: str) -> list[str]:
        """Strike all profile lines with these words, now and until `reset`; returns what was struck.

        Past turns are written anew without them, and what follows is computed again at the next reply.
        """
        self.forgotten.append(trait)
        struck = [line for turn in self.turns for line in turn.winner.profile if self.is_forgotten(line)]
        turns, self.dialogue.turns = self.turns, []
        for turn in turns:
            again = open_turn(self.dialogue, turn.user_text, self.chat, self.config.history_profile)
            again.candidates = [self.without_forgotten(turn.winner)]
        return list(dict.fromkeys(struck))

    def is_forgotten(self, text: str) -> bool:
        """Tell whether a text holds the words of a forgotten trait."""
        return any(world.contains_phrase(text, trait) for trait in self.forgotten)

    def without_forgotten(self, reply: Candidate) -> Candidate:
        """Return a turn without forgotten traits; one that could not be parsed is cut down to what the user saw."""
        if reply.failure and self.is_forgotten(reply.text):
            ids = self.chat.encode(reply.response)
            return replace(reply, token_ids=[*ids, self.chat.im_end], text=reply.response)
        kept = [line for line in reply.profile if not self.is_forgotten(line)]
        if kept == reply.profile:
            return reply
        return read_turn([*self.chat.encode(render_turn(kept, reply.response)), self.chat.im_end], "stop", self.chat)


# ---------------------------------------------------------------------------------------------------------------------
# Terminal


def harmless(text: str) -> str:
    """Show what could control a terminal or reorder its text as an escape sequence; line breaks stay.

    >>> print(harmless("Hi\\x1b[2J\\u202e!"))
    Hi\\x1b[2J\\u202e!
    """
    odd = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
    spared = "\n\u200c\u200d"  # the joiners of Persian words and of emoji
    return "".join(
        ch if ch in spared or unicodedata.category(ch) not in odd else ch.encode("unicode_escape").decode()
        for ch in text
    )


def marked(before: Sequence[str], now: Sequence[str]) -> list[str]:
    """Mark what is new (+), changed (~, another value in a slot that had one) and gone (-) in a profile.

    >>> marked(["Age: 34", "Location: Oslo"], ["Age: 35", "Interests: chess"])
    ['~ Age: 35 (was 34)', '+ Interests: chess', '- Location: Oslo']
    """
    gone = [line for line in before if line not in now]
    lines = []
    for line in now:
        slot = world.split_fact(line)[0]
        old = next((g for g in gone if slot and world.split_fact(g)[0] == slot), None)
        if line in before:
            lines.append(f"  {line}")
        elif old is None:
            lines.append(f"+ {line}")
        else:
            gone.remove(old)
            lines.append(f"~ {line} (was {world.split_fact(old)[1]})")
    return lines + [f"- {line}" for line in gone]


def show_turn(talk: Talk, columns: int) -> str:
    """Write the newest turn: the profile beside the reply, or above it in fewer than 80 columns."""
    reply = talk.turns[-1].winner
    before = talk.profile(-2) if len(talk.turns) > 1 else []
    profile = marked(before, talk.profile()) or ["  (nothing yet)"]
    if reply.failure:
        profile = [f"  (no readable profile in this turn: {reply.failure})"]
    if columns < 80:
        return "\n".join([*profile, "", reply.response, ""])
    left = columns // 3
    profile = [part for line in profile for part in textwrap.wrap(line, left - 3, subsequent_indent="    ")]
    said = [part for line in reply.response.split("\n") for part in textwrap.wrap(line, columns - left) or [""]]
    rows = itertools.zip_longest(profile, said, fillvalue="")
    return "\n".join(f"{a:{left - 2}}| {b}" for a, b in rows) + "\n"


def show_profile(talk: Talk) -> str:
    """Write the profile in force, since when each line has stood in it, and what must stay out."""
    profiles = [talk.profile(t) for t in range(len(talk.turns))]
    lines = []
    for line in talk.profile():
        absent = [t for t, profile in enumerate(profiles, 1) if line not in profile]
        lines.append(f"  {line}   (since turn {max(absent, default=0) + 1})")
    lines = lines or ["  (nothing yet)"]
    return "\n".join(lines + [f"  forgotten until /reset: {trait}" for trait in talk.forgotten])


def forget(talk: Talk, trait: str) -> str:
    """Forget a trait, and say what that did and what it did not do."""
    if not world.words(trait):
        return "/forget takes words of a trait, for example /forget Age, or /forget chess"
    struck = talk.forget(trait)
    values = [trait, *(world.split_fact(line)[1] for line in struck)]
    said = sum(any(world.contains_phrase(text, value) for value in values) for _, text in talk.dialogue.history())
    lines = [f"  struck: {line}" for line in struck] or ["  no profile has such a line"]
    lines += [f'  Profile lines with "{trait}" stay out until /reset.']
    lines += [f"  Messages and replies stay as they are, and the policy still reads them: {said} mention it."]
    return "\n".join(lines + ["  /reset drops them too."] * bool(said))


def respond(talk: Talk, line: str, columns: int) -> str | None:
    """Return what to print after a line of input; None ends the talk."""
    command, _, rest = line.strip().partition(" ")
    match command:
        case "":
            return ""
        case "/quit":
            return None
        case "/help":
            return HELP
        case "/profile":
            return show_profile(talk)
        case "/forget":
            return forget(talk, rest.strip())
        case "/reset":
            talk.reset()
            return "  The dialogue is dropped; the policy knows nothing of it."
        case _ if command.startswith("/"):
            return f"  There is no {command}; /help lists the commands."
    try:
        talk.reply(line.strip())
    except ValueError as error:
        return f"  {error}"
    return show_turn(talk, columns)


def converse(talk: Talk) -> None:
    """Talk until /quit, the end of the input or Ctrl-C; beside a terminal, input may come from a pipe.

    In a terminal, Ctrl-C while the policy writes stops its reply alone.
    """
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        import readline  # noqa: F401  (gives `input` line editing and a history)

        print("Say something; /help lists the commands.")
    sys.stdin.reconfigure(errors="replace")
    while (line := next_line(terminal)) is not None:
        try:
            answer = respond(talk, line, shutil.get_terminal_size().columns if terminal else 0)
        except KeyboardInterrupt:
            if not terminal:
                raise
            answer = "\n  Stopped: the dialogue goes on without that message. Ctrl-C once more ends it."
        if answer is None:
            break
        print(harmless(answer), flush=True)


def next_line(terminal: bool) -> str | None:
    """Read a line; None at the end of the input, and in a terminal at Ctrl-C."""
    try:
        return input("you> " if terminal else "")
    except EOFError:
        return None
    except KeyboardInterrupt:
        if not terminal:
            raise
        print()
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Endpoint

MAX_SAMPLERS = 4  # temperatures that are served at once; a fifth takes the place of one that is idle
MAX_WAITING = 256  # requests that may wait for a place; more are sent away
TEMPERATURES = (0.01, 100.0)  # allowed beside 0
HOT = "[{:g}, {:g}]".format(*TEMPERATURES)
NEUTRAL = {  # fields that are not supported, and the values with which they change nothing
    "stop": (None, []),
    "tools": (None, []),
    "logprobs": (None, False),
    "response_format": (None, {"type": "text"}),
    "top_p": (None, 1),
    "top_k": (None, -1, 0),
    "min_p": (None, 0),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "repetition_penalty": (None, 1),
}


@dataclass
class Job:
    """A turn that somebody waits for."""

    prompt_ids: list[int]
    temperature: float
    seed: int
    draw: Future[Draw]


class Service:
    """Answers chat completion requests: threads read them and wait, one thread samples for all of them together.

    Nothing is remembered of a client. But where a prompt continues what a row of the cache holds to the last id, as in
    a dialogue that goes on, the row's keys and values are used again.
    """

    def __init__(self, policy: Qwen2ForCausalLM, chat: ChatTokenizer, config: Config, model: str, temperature: float):
        self.policy, self.chat, self.config, self.model, self.temperature = policy, chat, config, model, temperature
        self.kv_bytes = train_rlpa.kv_budget(config, policy.head_weight.device) // MAX_SAMPLERS
        self.samplers: dict[float, Sampler] = {}
        self.asked: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self.waiting: deque[Job] = deque()  # taken from `asked`, not yet started
        self.running: dict[int, Job] = {}  # by the key of their row
        self.keys = itertools.count()
        Thread(target=self.work, daemon=True).start()

    # ------------------------------------------------------------------------------------ in the threads of the server

    def answer(self, raw: bytes) -> dict:
        """Answer the body of a chat completion request; RequestError if it cannot be."""
        request = parse_request(raw)
        temperature, limit = self.read_settings(request)
        prompt_ids, whole = self.read_messages(request["messages"])
        if len(prompt_ids) + self.config.max_new_tokens > (longest := self.policy.config.max_position_embeddings):
            room = longest - self.config.max_new_tokens
            raise RequestError(400, f"the dialogue has {len(prompt_ids)} tokens; with a reply, {room} have room")
        if self.asked.qsize() + len(self.waiting) >= MAX_WAITING:
            raise RequestError(503, f"{MAX_WAITING} requests wait already; try again later")
        seed = request.get("seed")
        seed = random.SystemRandom().getrandbits(31) if seed is None else stream_seed("serve", seed)
        job = Job(prompt_ids, temperature, seed, Future())
        self.asked.put(job)
        try:
            draw = job.draw.result()
        except ValueError as error:  # the cache has no room for it, ever
            flags = f"the flags are the server's, whose {MAX_SAMPLERS} temperatures share --kv-gib"
            raise RequestError(400, f"{error}; {flags}") from None
        cut = len(draw.token_ids) > limit
        reply = read_turn(draw.token_ids[:limit], "length" if cut else draw.stop_reason, self.chat)
        return self.completion(reply, len(prompt_ids), whole)

    def read_settings(self, request: dict) -> tuple[float, int]:
        """Return a request's temperature and most tokens; RequestError for what this server cannot do."""
        for name, neutral in NEUTRAL.items():
            if (value := request.get(name)) not in neutral:
                raise RequestError(422, f'"{name}" is {json_type(value)}; that is not supported here; leave it out')
        temperature = request.get("temperature")
        temperature = self.temperature if temperature is None else temperature
        if type(temperature) not in (int, float) or not is_temperature(temperature):
            raise RequestError(422, f'"temperature" is {json_type(temperature)}; it must be 0 or lie in {HOT}')
        most = self.config.max_new_tokens
        names = ("max_completion_tokens", "max_tokens")
        name, limit = next(((name, request[name]) for name in names if request.get(name) is not None), ("", most))
        if type(limit) is not int or limit < 1:
            raise RequestError(
                422,
                f'"{name}" is {json_type(limit)}; it must be a whole number from 1; above {most} (the server\'s'
                f" --max-new-tokens) it counts as {most}",
            )
        return float(temperature), min(limit, most)

    def read_messages(self, messages: list[Message]) -> tuple[list[int], bool]:
        """Return the policy's prompt, and whether the client speaks in whole turns, profile blocks included.

        It does if it sends the system prompt of training. Else an assistant message is a response, and its profile is
        the list in its "profile" field; without one the history has no profile block there, as an older turn with
        --history-profile latest.
        """
        whole = messages[0]["role"] == "system"
        if whole and messages[0]["content"].strip() != SYSTEM_PROMPT:
            raise RequestError(422, "the policy knows one system prompt, its own; send no system message")
        said = messages[whole:]
        if len(said) % 2 == 0 or any(m["role"] != ("user", "assistant")[i % 2] for i, m in enumerate(said)):
            raise RequestError(422, '"user" and "assistant" messages must take turns, and the first and last be "user"')
        ids = self.chat.message("system", SYSTEM_PROMPT)
        for i, message in enumerate(said):
            told = not whole and (self.config.history_profile == "all" or i == len(said) - 2)
            text = as_written(message, i + whole) if told else message["content"]
            ids += self.chat.message(message["role"], valid_unicode(text))
        return ids + self.chat.generation_header(), whole

    def completion(self, reply: Candidate, n_prompt: int, whole: bool) -> dict:
        """Write a reply in OpenAI's shape, with the profile, and why it could not be read if so, beside the content."""
        n_reply = len(reply.token_ids)
        message = {"role": "assistant", "content": reply.text if whole else reply.response, "profile": reply.profile}
        return {
            "id": f"chatcmpl-{random.SystemRandom().getrandbits(64):016x}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self.model,
            "choices": [
                {
                    "index": 0,
                    "message": message | ({"failure": reply.failure} if reply.failure else {}),
                    "finish_reason": reply.stop_reason,
                }
            ],
            "usage": {"prompt_tokens": n_prompt, "completion_tokens": n_reply, "total_tokens": n_prompt + n_reply},
        }

    # ----------------------------------------------------------------------------------------- in the sampler's thread

    def work(self) -> None:
        """Start what was asked, and take one step for all that run, for ever."""
        while True:
            try:
                self.start_waiting()
                for sampler in self.samplers.values():
                    for draw in sampler.step() if sampler.running else ():
                        sampler.adopt(draw.key, 0)
                        self.running.pop(draw.key).draw.set_result(draw)
            except Exception as error:  # out of memory, or a bug: those who wait must hear of it, and others be served
                traceback.print_exc()
                for job in (*self.running.values(), *self.waiting):
                    job.draw.set_exception(RuntimeError(str(error)))
                self.samplers.clear()
                self.running.clear()
                self.waiting.clear()

    def start_waiting(self) -> None:
        """Take in new requests, waiting for one if nothing runs, and start as many as there is room for, in order."""
        if not self.running and not self.waiting:
            self.waiting.append(self.asked.get())
        while not self.asked.empty():
            self.waiting.append(self.asked.get())
        while self.waiting:
            job = self.waiting[0]
            sampler = self.sampler_of(job.temperature)
            if sampler is None:
                return
            key = self.row_key(sampler, job.prompt_ids)
            try:
                if not sampler.start(key, job.prompt_ids, [job.seed]):
                    return
            except ValueError as error:
                job.draw.set_exception(error)
            else:
                self.running[key] = job
            self.waiting.popleft()

    def sampler_of(self, temperature: float) -> Sampler | None:
        """Return the sampler of a temperature; None if all there may be are busy with others."""
        if temperature not in self.samplers and len(self.samplers) == MAX_SAMPLERS:
            idle = next((t for t, sampler in self.samplers.items() if not sampler.running), None)
            if idle is None:
                return None
            del self.samplers[idle]
        if temperature not in self.samplers:
            self.samplers[temperature] = make_sampler(
                self.policy, self.chat, self.config, temperature, self.config.decode_batch_size, self.kv_bytes
            )
        return self.samplers[temperature]

    def row_key(self, sampler: Sampler, prompt_ids: list[int]) -> int:
        """Return the key of the parked dialogue that this prompt continues, or a new one."""
        parked = [row for row in sampler.rows if row is not None and not row.running]
        continued = [row for row in parked if prompt_ids[: len(row.token_ids)] == row.token_ids]
        return max(continued, key=lambda row: len(row.token_ids)).key if continued else next(self.keys)


def is_temperature(value: float) -> bool:
    """Tell whether a policy can be sampled at a temperature: 0, which is greedy, or neither tiny nor huge."""
    return value == 0 or math.isfinite(value) and TEMPERATURES[0] <= value <= TEMPERATURES[1]


def as_written(message: dict, i: int) -> str:
    """Return messages[i] as the policy wrote or read it: an assistant's with its profile block, if that was sent."""
    content, profile = message["content"], message.get("profile")
    if message["role"] == "user" or profile is None:
        return content
    if not isinstance(profile, list) or not all(isinstance(line, str) for line in profile):
        raise RequestError(422, f"messages[{i}].profile is {json_type(profile)}, not a list of strings")
    return render_turn([line for line in map(clean_text, profile) if line], content)


def valid_unicode(text: str) -> str:
    """Replace lone surrogates, which JSON can hold and a tokenizer cannot."""
    return text.encode("utf-8", "replace").decode()


def serve(server: ThreadingHTTPServer, service: Service) -> None:
    """Let a server answer for a policy until Ctrl-C."""
    server.answer = service.answer
    address = f"http://{server.server_address[0]}:{server.server_address[1]}/v1"
    print(f"{server.model} at {address}{' (with a key)' if server.key else ''}", flush=True)
    with server:
        server.serve_forever(poll_interval=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; ValueError if anything is amiss."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = exits.refuse
    tiny = str(train_rlpa.TINY_CHECKPOINT)
    parser.add_argument("--ckpt", nargs="?", const=tiny, required=True, help="folder or hub id; bare: the tiny one")
    parser.add_argument("--temperature", type=float, default=0.0, help="divides the logits; 0 is greedy [0]")
    parser.add_argument("--serve", action="store_true", help="be an OpenAI-compatible endpoint")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at; any but loopback needs a key")
    parser.add_argument("--port", type=int, default=8200, help="port to serve at; 0 takes a free one [8200]")
    parser.add_argument("--api-key-env", default="", help="environment variable with the key that clients must send")
    comments = field_comments(Config)
    defaults = {f.name: f.default for f in fields(Config)}
    for name in PASSED:  # absent if not given, so that a checkpoint's own setting holds
        text = f"{comments[name]} [{defaults[name]}]".replace("%", "%%")
        kind = type(defaults[name])
        parser.add_argument(train_rlpa.flag(name), type=kind, default=argparse.SUPPRESS, help=text)
    args = parser.parse_args(argv)
    if not is_temperature(args.temperature):
        raise ValueError(f"--temperature {args.temperature} must be 0 or lie in {HOT}")
    return args


def run(argv: Sequence[str] | None) -> None:
    """Talk or serve, as the command line says."""
    args = parse_args(argv)
    key = read_key(args.api_key_env or None)
    folder = resolve_checkpoint(args.ckpt)
    model = Path(folder).resolve().name
    server = make_server(args.host, args.port, model=model, key=key) if args.serve else None  # before the slow loading
    given = {name: value for name, value in vars(args).items() if name in PASSED}
    config = Config(**{**train_rlpa.checkpoint_defaults(folder), **given})
    policy, chat = load_checkpoint(folder, config)
    if server is not None:
        serve(server, Service(policy, chat, config, model, args.temperature))
    else:
        converse(Talk(policy, chat, config, args.temperature))


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code (command_line/exits.py)."""
    return exits.run("chat.py", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
