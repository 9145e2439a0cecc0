"""The user the policy talks to: personas, the role prompt, an HTTP client, and an embedded server.

A simulated user is any OpenAI-compatible `/v1/chat/completions` endpoint that is sent a role prompt (who it plays, and
how slowly to say so) and the dialogue seen from its own side. `python simulator.py --port 8100` is such an endpoint: it
gets the same messages as a real model and answers them by the rules of `world.py`, seeded, without a network or a key.

In reading order: personas (JSONL in) → role prompt and messages → `ChatClient` and its `Tape` → embedded server.

Against the published code: roles are not swapped in the user's history, every wait is bounded, and a call that fails is
a typed `ChatError` for the trainer to mask and count, never a made-up reply.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import hmac
import ipaddress
import itertools
import json
import math
import os
import re
import socket
import subprocess
import sys
import threading
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter

import second_world
import world
from plain_text import clean_text, plain_text
from throttle import Breaker, Quota, backoff

Message = dict[str, str]  # {"role": ..., "content": ...}, as in the OpenAI chat format


# ---------------------------------------------------------------------------------------------------------- personas
@dataclass(frozen=True)
class Persona:
    """A person to be played: an id that is unique in its file, and one-line facts such as "Occupation: baker"."""

    persona_id: str
    facts: tuple[str, ...]


ACCEPTED = 'an object with "facts" (list of strings) or "slots" (the ten of the paper), or a string of prose'


def load_personas(path: str | Path) -> list[Persona]:
    """Read personas from a JSONL file, in file order.

    Each line holds one or more JSON values back to back (line 6 of ALOE's `profile.jsonl` holds two). A value is
    {"facts": ["Age: 34", ...]} or {"slots": {"Age": 34, "Interests": ["chess", "opera"], ...}}, either with an optional
    "id", or a bare string of prose, which is split into facts by sentence.

    Raises ValueError, in one line with the path and the line number, for anything else.
    """
    personas = [
        _parse_persona(value, f"{Path(path).stem}:{line_id}", f"{path}, line {line_id.split('.')[0]}")
        for line_id, value in _json_values(path)
    ]
    if not personas:
        raise ValueError(f"{path} holds no personas; each line must be {ACCEPTED}")
    if repeated := [name for name, n in Counter(p.persona_id for p in personas).items() if n > 1]:
        raise ValueError(f'{path} uses the persona "id" {repeated[0]!r} more than once; ids must be unique')
    return personas


_BLANKS = re.compile(r"[ \t]*")


def _json_values(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Yield ("line" or "line.k" for the k-th value on it, value) for every JSON value of a JSONL file."""
    decoder = json.JSONDecoder()
    for number, line in enumerate(_read_text(path).split("\n"), start=1):  # not splitlines: U+2028 is legal in JSON
        line, at, count = line.strip(" \t\r"), 0, 0
        while at < len(line):
            try:
                value, at = decoder.raw_decode(line, at)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: {_shorten(line[at : at + 60])!r} is not JSON "
                                 f"({_reason(error)}); accepted: {ACCEPTED}") from None
            count += 1
            yield (str(number) if count == 1 else f"{number}.{count}"), value
            at = _BLANKS.match(line, at).end()


def _read_text(path: str | Path) -> str:
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"cannot read personas from {path}: {error.strerror}; give a JSONL file") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8; "
                         "save the file as UTF-8") from None


def _parse_persona(value: Any, default_id: str, where: str) -> Persona:
    """Turn one JSON value into a persona, or raise ValueError that begins with `where`."""
    if isinstance(value, str):
        persona_id, texts = default_id, split_sentences(clean_text(value))
    elif isinstance(value, dict):
        persona_id, texts = _parse_object(value, default_id, where)
    else:
        raise ValueError(f"{where}: found {json_type(value)}; accepted: {ACCEPTED}")
    facts = usable_facts(texts)
    if not facts:
        raise ValueError(f"{where}: no usable fact in {_shorten(json.dumps(value))}; a fact needs a letter or a digit")
    return Persona(persona_id, facts)


def _parse_object(value: dict[str, Any], default_id: str, where: str) -> tuple[str, list[str]]:
    if unknown := sorted(set(value) - {"id", "facts", "slots"}):
        raise ValueError(f'{where}: unknown key {_shorten(unknown[0])!r}; accepted keys: "id", "facts", "slots"')
    if ("facts" in value) == ("slots" in value):
        found = "both" if "facts" in value else "neither"
        raise ValueError(f'{where}: found {found} of "facts" and "slots"; accepted: one of them')
    persona_id = value.get("id", default_id)
    if type(persona_id) not in (str, int) or not clean_text(str(persona_id)):
        raise ValueError(f'{where}: "id" is {json_type(persona_id)}; accepted: a string or a whole number')
    texts = _list_facts(value["facts"], where) if "facts" in value else _slot_facts(value["slots"], where)
    return clean_text(str(persona_id)), texts


def _list_facts(facts: Any, where: str) -> list[str]:
    if not isinstance(facts, list):
        raise ValueError(f'{where}: "facts" is {json_type(facts)}; accepted: a list of strings')
    for i, fact in enumerate(facts):
        if not isinstance(fact, str):
            raise ValueError(f'{where}: "facts"[{i}] is {json_type(fact)}; accepted: a string')
    return facts


def _slot_facts(slots: Any, where: str) -> list[str]:
    """Render slots as "Slot: value" facts, one per element of a list value."""
    if not isinstance(slots, dict):
        raise ValueError(f'{where}: "slots" is {json_type(slots)}; accepted: an object')
    facts = []
    for slot, content in slots.items():
        if slot not in world.SLOTS:
            raise ValueError(f"{where}: unknown slot {_shorten(slot)!r}; accepted slots: {', '.join(world.SLOTS)}")
        for element in content if isinstance(content, list) else [content]:
            if type(element) not in (str, int):
                raise ValueError(f'{where}: slot "{slot}" holds {json_type(element)}; '
                                 "accepted: a string, a whole number or a list of them")
            facts.append(f"{slot}: {element}")
    return facts


def usable_facts(texts: Iterable[str]) -> tuple[str, ...]:
    """Clean facts and drop those without a letter or digit in their value, and repeated ones (whatever the case).

    >>> usable_facts(["Age: 34", "Location:", "age:  34", "plays\\nthe harp"])
    ('Age: 34', 'plays the harp')
    """
    kept: dict[str, str] = {}
    for fact in map(clean_text, texts):
        if any(ch.isalnum() for ch in world.split_fact(fact)[1]):
            kept.setdefault(fact.casefold(), fact)
    return tuple(kept.values())


_SENTENCE_END = re.compile(r"""[.!?…]+["'”’)\]]*\s+|[。！？]+[”’」）]*\s*""")
_TITLE = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|Mt|Sr|Jr|Rev|Gen|vs|No|approx|e\.g|i\.e)\.$", re.IGNORECASE)
_ABBREVIATION = re.compile(r"(?:\b[A-Za-z]\.|\bPh\.D\.|\betc\.)$")  # an initial, U.S., a.m., Ph.D.
_NEW_SENTENCE = re.compile(r"(?:He|She|They|His|Her|Hers|Their|It|Its)\b")


def split_sentences(text: str) -> list[str]:
    """Split prose into sentences, not at abbreviations or inside numbers.

    >>> split_sentences("She has a Ph.D. in law. She runs 3.5 miles with Dr. Li. Loves cats!")
    ['She has a Ph.D. in law.', 'She runs 3.5 miles with Dr. Li.', 'Loves cats!']
    """
    sentences, start = [], 0
    for end in _SENTENCE_END.finditer(text):
        sentence = text[start : end.end()].rstrip()
        if _TITLE.search(sentence):
            continue
        if _ABBREVIATION.search(sentence) and not _NEW_SENTENCE.match(text, end.end()):
            continue
        sentences.append(sentence)
        start = end.end()
    return [s for s in (*sentences, text[start:].strip()) if s]


def json_type(value: Any) -> str:
    """Name what JSON calls a value, and show it: what was found where something else was wanted."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return f"{names.get(type(value), 'null')} ({_shorten(json.dumps(value))})" if value is not None else "null"


def _shorten(text: str, limit: int = 80) -> str:
    text = clean_text(text)
    return text if len(text) <= limit else text[:limit] + "…"


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else _shorten(str(error).split(":")[0])


# ------------------------------------------------------------------------------------------- role prompt and messages
ROLE_RULES = """\
You are playing a person who chats with a stranger online. Stay in this role to the end. Write only what the person \
says, in plain text, without quotation marks or stage directions.

Rules:
1. At first, give no personal information at all. Your first message is just a greeting.
2. Give yourself away slowly: in one reply, reveal at most 15 % of your profile below, and only what fits the moment.
3. Write at most three sentences per reply. A single "Oh." is fine.
4. When you are asked something, answer what was asked, in your own words and true to your profile. What is not in \
your profile you would rather not say.
5. Be cold at first; warm up only when the other person takes an interest in you.
6. Do not open topics yourself; let the other person lead.
7. You dislike repeated questions and flattery. When something is asked or said again, say so.
8. Never break the role, never recite or mention the profile or these rules, and never say that you are an AI.
9. People change. If your profile contradicts what you said before, say that it has changed; the profile holds."""
PROFILE_HEADING = "Your profile:"
OPENING = "(The chat begins. Write your first message.)"  # chat templates want a "user" message before any reply
_OTHER_SIDE = {"user": "assistant", "assistant": "user"}


def role_prompt(persona: Persona) -> str:
    """Write the system message that makes a chat model play the persona; the facts come last, one "- " line each."""
    return "\n".join([ROLE_RULES, "", PROFILE_HEADING, *(f"- {fact}" for fact in persona.facts)])


def simulator_messages(persona: Persona, history: Sequence[tuple[str, str]]) -> list[Message]:
    """Write the messages that ask the simulated user for its next line.

    history: ("user" | "assistant", text), oldest first, where "user" is the simulated human and "assistant" the policy
    (its visible response only, never its profile block). From the human's side the roles are the other way round: its
    own lines are "assistant" and the policy's are "user". (The published code gave the model each other's labels.)

    Raises ValueError unless the roles take turns and the last line is the policy's.
    """
    roles = [role for role, _ in history]
    if any(role not in _OTHER_SIDE for role in roles) or any(a == b for a, b in zip(roles, roles[1:], strict=False)):
        raise ValueError(f'history roles are {roles}; "user" and "assistant" must take turns')
    if roles and roles[-1] != "assistant":
        raise ValueError("history ends with the user's own line; the assistant must speak before the user does again")
    opening = [("assistant", OPENING)] if not roles or roles[0] == "user" else []
    return [{"role": "system", "content": role_prompt(persona)}] + [
        {"role": _OTHER_SIDE[role], "content": text} for role, text in (*opening, *history)
    ]


def parse_simulator_messages(messages: Sequence[Message]) -> tuple[tuple[str, ...], list[tuple[str, str]]]:
    """Undo `simulator_messages`: return the persona's facts and the history as the policy's side sees it.

    Raises ValueError if the first message is not a role prompt with facts, or a later one has another role than
    "user" and "assistant".
    """
    if not messages or messages[0]["role"] != "system":
        raise ValueError('messages[0] must have role "system" and hold the role prompt')
    _, heading, profile = f"\n{messages[0]['content']}".rpartition(f"\n{PROFILE_HEADING}\n")
    facts = usable_facts(line[2:] for line in profile.split("\n") if line.startswith("- "))
    if not heading or not facts:
        raise ValueError(f'the system message must hold a line "{PROFILE_HEADING}" followed by "- fact" lines')
    for i, message in enumerate(messages[1:], start=1):
        if message["role"] not in _OTHER_SIDE:
            raise ValueError(f'messages[{i}].role is {_shorten(message["role"])!r}; it must be "user" or "assistant"')
    turns = [(_OTHER_SIDE[m["role"]], m["content"]) for m in messages[1:]]
    return facts, turns[1:] if turns and turns[0] == ("assistant", OPENING) else turns


# -------------------------------------------------------------------------------------------------------- HTTP client
RETRIED_4XX = {408, 409, 425, 429}  # time-out, conflict, too early, too many requests; other 4xx are our own mistake
OWN_FAULT = {"http_4xx", "empty", "too_large"}  # say something about the request: the endpoint itself is alive
CLOSED = "the client was closed"
URL_FLAGS = {"simulator": "--simulator-url", "judge": "--judge-url"}  # by the name of the client
PING = [{"role": "user", "content": "ping"}]  # a probe: any answer will do, a refusal too
POLL = 0.1  # seconds between two looks at a breaker


class ChatReply(str):
    """A reply's text that knows how many tokens the endpoint says it took; None if it does not say."""

    tokens: int | None = None  # of the reply, thoughts included
    prompt_tokens: int | None = None


class ChatError(Exception):
    """A chat call that failed; the message is one line and never holds the key.

    reason: connect, timeout, http_4xx, http_5xx, rate_limited, bad_json, bad_schema, empty, too_large or outage.
    retryable: whether another attempt may help. retry_after: the seconds that the server asked for, 0 if it did not.
    """

    def __init__(self, reason: str, message: str, retryable: bool = True, retry_after: float = 0.0):
        super().__init__(f"{reason}: {message}")
        self.reason, self.retryable, self.retry_after = reason, retryable, retry_after


class Call(NamedTuple):
    """What became of a call: a reply or the error that ended it, and why attempts failed, in their order."""

    reply: ChatReply | ChatError
    failed: tuple[str, ...] = ()


class Tape:
    """A file of calls, so that a run with a paid or random endpoint can be repeated without it, bit for bit.

    JSONL, a call per line: the endpoint's name, a hash of that name and of all that was sent (model, messages, seed,
    temperature, max_tokens), the seed, and what came of it: text and usage, or the error. There are no keys in it.

    A request has one reply: while `recording`, one that is on file is not asked again, neither in the same run nor when
    a killed run goes on with its file (calls that failed in an earlier run are). When replaying, a request that is not
    on file is a ValueError. `note` says how much the file held, and if its last line was cut short, which is left out.
    Several processes may record into one file. Raises ValueError for a file that cannot be used or a damaged line.
    """

    def __init__(self, path: str | Path, recording: bool):
        self.path, self.recording = Path(path), recording
        self._calls: dict[str, Call] = {}
        self._lock = threading.Lock()
        try:
            self._file = self.path.open("ab" if recording else "rb", buffering=0)
        except OSError as error:
            flag = "--record" if recording else "--replay"
            raise ValueError(f"{flag} {path} cannot be opened: {error.strerror}") from None
        with self._alone():
            cut = self._load()
        held = f"{len(self._calls):,} recorded calls"
        self.note = f"{path}: {held}{', which are not made again' if recording and self._calls else ''}{cut}"

    def find(self, endpoint: str, request: dict[str, Any]) -> Call | None:
        """Return the call on file, None if it is to be made; ValueError for an unknown request when replaying."""
        call = self._calls.get(_fingerprint(endpoint, request))
        if call is None and not self.recording:
            start = _shorten(request["messages"][-1]["content"])
            raise ValueError(f"--replay {self.path} holds no reply of {endpoint or 'the endpoint'} to the request "
                             f"{start!r} (model {request['model']!r}, seed {request.get('seed')}); a replay needs the "
                             "flags, checkpoint and personas of the recording, and --reply-steps of 1 or more in both")
        return call

    def keep(self, endpoint: str, request: dict[str, Any], call: Call) -> Call:
        """Write a call that was made to the file; return the one that counts, for a thread may have been faster."""
        key = _fingerprint(endpoint, request)
        with self._lock:
            if key not in self._calls:
                self._calls[key] = call
                with self._alone():
                    self._file.write(_write_call(endpoint, key, request.get("seed"), call))
        return self._calls[key]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes out of the file."""
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def _load(self) -> str:
        """Read all calls, later lines over earlier ones; a last line that a kill cut short is dropped and told of."""
        size = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    if self.recording:
                        self._file.truncate(size)
                    return f"; line {number}, the last one, was cut short and is left out"
                size += len(line)
                key, call = _read_call(line, f"{self.path}, line {number}")
                if not (self.recording and isinstance(call.reply, ChatError)):
                    self._calls[key] = call
        return ""


def _fingerprint(endpoint: str, request: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([endpoint, request], sort_keys=True).encode()).hexdigest()[:32]


def _write_call(endpoint: str, key: str, seed: int | None, call: Call) -> bytes:
    """Write a call as one line that ends with its own checksum."""
    reply = call.reply
    line: dict[str, Any] = {"endpoint": endpoint, "request": key, "seed": seed, "failed": call.failed}
    if isinstance(reply, ChatError):
        line |= {"error": reply.reason, "message": str(reply).removeprefix(f"{reply.reason}: ")}
    else:
        line |= {"text": str(reply), "prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.tokens}
    return json.dumps(line | {"check": zlib.crc32(json.dumps(line).encode())}).encode() + b"\n"


def _read_call(line: bytes, where: str) -> tuple[str, Call]:
    """Read what `_write_call` wrote; ValueError that begins with `where` for anything else."""
    try:
        found = json.loads(line)
        if found.pop("check") != zlib.crc32(json.dumps(found).encode()):
            raise ValueError("its checksum is wrong")
        if "error" in found:
            reply: ChatReply | ChatError = ChatError(found["error"], found["message"])
        else:
            reply = ChatReply(found["text"])
            reply.tokens, reply.prompt_tokens = found["completion_tokens"], found["prompt_tokens"]
        return found["request"], Call(reply, tuple(found["failed"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{where}: damaged, or not a recorded call ({type(error).__name__}: {_shorten(str(error))}); "
                         "remove the line to lose that call alone") from None


class ChatClient:
    """Ask an OpenAI-compatible endpoint for chat completions, many at a time and within bounded time.

    All time-outs are in seconds. `total_timeout` bounds one call with all its retries, even against a server that sends
    one byte now and then; in `chat_many` it runs from the moment one of the `max_concurrency` workers takes the call.
    Retried are connection errors, time-outs, 408, 409, 425, 429, 5xx and malformed replies; any other status fails at
    once. The key is read from the environment variable `api_key_env` and shows in no message.

    `base_url` may hold several, with commas between: they are asked in turn, and one that fails is left out until it
    answers a probe (`Breaker`, after `breaker_failures` in a row). While none is left, calls wait, and that time is not
    theirs; after `outage_budget` seconds of it they fail with reason "outage", and `outage` says so. So no call is lost
    to an outage that is shorter; one whose attempts fail while others are answered is. A budget of 0: no breaker.
    `notify` gets a line when an endpoint is left out and when it answers again, from whichever thread sees it.
    `quota`: requests and tokens per minute, perhaps shared with other clients; waiting for it is not the call's time.

    With a `tape`, calls are recorded or replayed under `name`; a replay needs no key and opens no connection.

    Raises ValueError for a bad URL, a variable that is not set, and a limit below its minimum.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key_env: str | None = None,
        connect_timeout: float = 5.0,
        read_timeout: float = 60.0,
        total_timeout: float = 120.0,
        max_retries: int = 10,
        max_concurrency: int = 64,
        max_reply_bytes: int = 262_144,
        temperature: float = 1.0,
        max_tokens: int = 300,
        tape: Tape | None = None,
        name: str = "",
        outage_budget: float = 0.0,
        breaker_failures: int = 5,
        quota: Quota | None = None,
        notify: Callable[[str], object] = lambda line: None,
    ):
        _check_limits(connect_timeout=connect_timeout, read_timeout=read_timeout, total_timeout=total_timeout,
                      max_concurrency=max_concurrency, max_reply_bytes=max_reply_bytes, max_tokens=max_tokens,
                      breaker_failures=breaker_failures)
        _check_limits(zero=True, max_retries=max_retries, temperature=temperature, outage_budget=outage_budget)
        urls = dict.fromkeys(completions_url(url, name) for url in base_url.split(","))  # each once, in order
        self.breakers = {url: Breaker(breaker_failures) for url in urls}
        self._turns = itertools.count()
        self.outage_budget, self.quota, self.notify = outage_budget, quota or Quota(), notify
        self.outage = ""  # why calls were given up for an outage; empty: none was
        self.connect_timeout, self.read_timeout, self.total_timeout = connect_timeout, read_timeout, total_timeout
        self.max_retries, self.max_reply_bytes = max_retries, max_reply_bytes
        self._settings = {"model": model, "temperature": temperature, "max_tokens": max_tokens}
        self.tape, self.name, self._last_failure = tape, name, ""
        self._key = "" if tape and not tape.recording else read_key(api_key_env)
        self._tally: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._idle: dict[str, list[tuple[requests.Session, _Adapter]]] = {url: [] for url in urls}  # open connections
        self._in_flight: dict[int, tuple[_Adapter, float]] = {}  # thread id → its adapter and its deadline
        self._closed = threading.Event()
        self._workers = ThreadPoolExecutor(max_concurrency, thread_name_prefix="chat")
        self._probers = ThreadPoolExecutor(len(urls), thread_name_prefix="probe")
        threading.Thread(target=self._cut_off_late_replies, daemon=True).start()

    def chat(self, messages: list[Message], seed: int | None = None) -> str:
        """Return the reply's text (not blank, valid Unicode), or raise ChatError after the last retry."""
        reply = self.chat_many([messages], [seed])[0]
        if isinstance(reply, ChatError):
            raise reply
        return reply

    def chat_many(self, batch: Sequence[list[Message]], seeds: Sequence[int | None]) -> list[str | ChatError]:
        """Return, in order, for each list of messages a reply or the ChatError that ended it."""
        if len(batch) != len(seeds):
            raise ValueError(f"chat_many got {len(batch)} lists of messages but {len(seeds)} seeds")
        start = time.monotonic()
        replies = list(self._workers.map(self.ask, batch, seeds))
        with self._lock:
            self._tally["wait_seconds"] += time.monotonic() - start
        return replies

    @property
    def counts(self) -> dict[str, Any]:
        """Return totals: calls (requests), those of them answered from the tape (replayed), repeated attempts
        (retries), failed attempts (errors) and failed calls (failures) by reason, tokens of prompts and replies
        (prompt_tokens, completion_tokens; words, where the endpoint does not say: calls without_usage), how often a
        breaker opened (breaks), and the seconds that callers spent in `chat` and `chat_many` (wait_seconds)."""
        with self._lock:
            tally = dict(self._tally)
        by_reason = {kind: {key.partition(" ")[2]: n for key, n in tally.items() if key.startswith(f"{kind} ")}
                     for kind in ("errors", "failures")}
        totals = ("requests", "replayed", "retries", "prompt_tokens", "completion_tokens", "without_usage", "breaks")
        return {key: tally.get(key, 0) for key in (*totals, "wait_seconds")} | by_reason

    def close(self) -> None:
        """Cut off what is in flight and end the workers; the client cannot be used afterwards."""
        self._closed.set()
        for pool in (self._workers, self._probers):
            pool.shutdown(cancel_futures=True)
        for session, _ in itertools.chain(*self._idle.values()):
            session.close()

    def ask(self, messages: list[Message], seed: int | None = None) -> ChatReply | ChatError:
        """Return the reply's text, or the ChatError that ended the call; in the caller's own thread."""
        request = self._settings | {"messages": messages} | ({} if seed is None else {"seed": seed})
        call = self.tape.find(self.name, request) if self.tape else None
        replayed = call is not None
        if call is None:
            call = self._call(request)
            lost = self._closed.is_set() or getattr(call.reply, "reason", "") == "outage"
            if self.tape and not lost:  # these fail calls that the endpoint would have answered
                call = self.tape.keep(self.name, request, call)
        self._count_call(messages, call, replayed)
        return call.reply

    def _call(self, request: dict[str, Any]) -> Call:
        """Ask until there is a reply, or no further attempt is allowed or of use."""
        failed: list[str] = []
        deadline, first, spared = time.monotonic() + self.total_timeout, 0, False  # first: of the attempts that count
        while True:
            start = time.monotonic()
            try:
                url = self._admit(request)
                sent = time.monotonic()
                deadline += sent - start  # others' waiting time: an outage, a rate limit
                return Call(self._send(url, request, deadline), tuple(failed))
            except ChatError as error:
                failure = error
            failed.append(failure.reason)
            pause = max(backoff(len(failed) - first - 1), failure.retry_after * (not self.outage_budget))
            # A pause that outlasts the deadline is not begun: the call has failed already.
            exhausted = len(failed) - first > self.max_retries or time.monotonic() + pause >= deadline
            if not failure.retryable:
                break
            if exhausted and (spared or not self._may_be_out(failure, sent)):
                break
            if exhausted:  # nobody was answered meanwhile: wait as if for an outage, then try for a last time
                self._trip()
                deadline, first, spared = time.monotonic() + self.total_timeout, len(failed), True
            elif self._closed.wait(pause):
                break
            if failure.reason == "empty" and "seed" in request:  # a seeded server would say nothing again
                request = request | {"seed": request["seed"] + 1}
        return Call(failure, tuple(failed))

    def _may_be_out(self, failure: ChatError, since: float) -> bool:
        """Say whether a failure may be that of all endpoints: none has answered anybody since then."""
        unanswered = all(breaker.answered_at < since for breaker in self.breakers.values())
        return bool(self.outage_budget) and failure.reason not in OWN_FAULT and unanswered

    def _trip(self) -> None:
        opened = sum(breaker.failed(trip=True) for breaker in self.breakers.values())
        with self._lock:
            self._tally["breaks"] += opened
        if opened:
            self.notify(f"{self.name or 'endpoints'}: {self._last_failure}; left alone until a probe is answered")

    def _admit(self, request: dict[str, Any]) -> str:
        """Wait until a request may be sent, and return where to; ChatError "outage" when the budget is used up."""
        while True:
            for url, breaker in self.breakers.items():
                if breaker.claim_probe() and not self._closed.is_set():
                    self._probers.submit(self._probe, url)
            usable = [url for url, breaker in self.breakers.items() if not breaker.is_open]
            if usable:
                break
            down = time.monotonic() - max(breaker.failing_since for breaker in self.breakers.values())
            if down >= self.outage_budget:
                self.outage = f"no answer for {self.outage_budget:g} s; last: {self._last_failure}"
                raise ChatError("outage", self.outage, retryable=False)
            self._rest(POLL)
        self._rest(self.quota.reserve(_most_tokens(request)))
        return usable[next(self._turns) % len(usable)]

    def _rest(self, seconds: float) -> None:
        if self._closed.wait(seconds) if seconds else self._closed.is_set():
            raise ChatError("connect", CLOSED, retryable=False)

    def _send(self, url: str, request: dict[str, Any], deadline: float, probe: bool = False) -> ChatReply:
        """Send a request, and let breaker and quota know what came of it."""
        try:
            reply = self._attempt(url, json.dumps(request).encode(), deadline)
        except ChatError as error:
            error.args = (self._redact(str(error)),)  # the server may have quoted the key, in JSON escapes even
            self.quota.settle(-_most_tokens(request))
            self._judge_failure(url, error, probe)
            raise
        self._note_answer(url)
        if reply.tokens is not None and reply.prompt_tokens is not None:
            self.quota.settle(reply.tokens + reply.prompt_tokens - _most_tokens(request))
        return reply

    def _judge_failure(self, url: str, error: ChatError, probe: bool) -> None:
        """Tell the breaker of a failure that is the endpoint's, not the request's own."""
        if error.reason in OWN_FAULT:
            self._note_answer(url)
        elif self.outage_budget and not self._closed.is_set():
            opened = self.breakers[url].failed(error.retry_after, probe)
            with self._lock:
                self._tally["breaks"] += opened
                self._last_failure = str(error)
            if opened:
                self.notify(f"{self.name or url}: {error}; left alone until a probe is answered")

    def _note_answer(self, url: str) -> None:
        if self.breakers[url].answered():
            self.notify(f"{self.name or 'an endpoint'}: {url} answers again")

    def _probe(self, url: str) -> None:
        """Send a short request to an endpoint that is out, to see whether it answers again."""
        request = self._settings | {"messages": PING, "max_tokens": 1}
        self.quota.reserve(_most_tokens(request))
        with suppress(ChatError):  # counted by the breaker
            self._send(url, request, time.monotonic() + min(self.read_timeout, self.total_timeout), probe=True)

    def _count_call(self, messages: list[Message], call: Call, replayed: bool) -> None:
        """Count a call, made or replayed; where the endpoint told no tokens, words stand in for them."""
        reply, failed = call
        lost = isinstance(reply, ChatError)
        counts = Counter(f"errors {reason}" for reason in failed)
        counts.update(requests=1, replayed=int(replayed), retries=len(failed) - lost)
        if lost:
            counts[f"failures {reply.reason}"] += 1
        else:
            prompt, said = reply.prompt_tokens, reply.tokens
            counts["prompt_tokens"] = sum(len(m["content"].split()) for m in messages) if prompt is None else prompt
            counts["completion_tokens"] = len(reply.split()) if said is None else said
            counts["without_usage"] = int(prompt is None or said is None)
        with self._lock:
            self._tally.update(counts)

    def _attempt(self, url: str, body: bytes, deadline: float) -> ChatReply:
        """Send one request and return the text of its reply; whatever goes wrong is a ChatError."""
        remaining = max(0.001, deadline - time.monotonic())
        timeouts = (min(self.connect_timeout, remaining), min(self.read_timeout, remaining))
        with self._session(url, deadline) as session:
            try:
                with session.post(url, data=body, timeout=timeouts, stream=True, allow_redirects=False) as response:
                    raw = self._read_body(response, deadline)
            except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
                raise self._transport_error(url, error, deadline) from None
        if not 200 <= response.status_code < 300:
            raise self._status_error(url, response, raw)
        return parse_reply(raw, self._redact)

    def _redact(self, text: str) -> str:
        """Blot out the key; to be done before a text is shortened, or half of the key may stay."""
        return text.replace(self._key, "***") if self._key else text

    def _read_body(self, response: requests.Response, deadline: float) -> bytes:
        """Read the body as it arrives, up to `max_reply_bytes`, and blot out the key where it is quoted."""
        raw = bytearray()
        while piece := response.raw.read1(65_536, decode_content=True):
            raw += piece
            if len(raw) > self.max_reply_bytes:
                raise ChatError("too_large", f"the reply is longer than max_reply_bytes={self.max_reply_bytes}")
        if time.monotonic() >= deadline:  # cut off: the end of the data is not the end of the reply
            raise TimeoutError
        return bytes(raw).replace(self._key.encode(), b"***") if self._key else bytes(raw)

    def _transport_error(self, url: str, error: Exception, deadline: float) -> ChatError:
        if self._closed.is_set():
            return ChatError("connect", CLOSED, retryable=False)
        if time.monotonic() >= deadline:
            return ChatError("timeout", f"no whole reply from {url} within total_timeout={self.total_timeout:g} s")
        if isinstance(error, requests.Timeout | urllib3.exceptions.TimeoutError | TimeoutError):
            return ChatError("timeout", f"{url} was silent for connect_timeout={self.connect_timeout:g} s or "
                                        f"read_timeout={self.read_timeout:g} s")
        while error.__context__ is not None:
            error = error.__context__  # the innermost one says what happened, e.g. ConnectionRefusedError
        cause = f"{type(error).__name__}: {_shorten(self._redact(str(error)))}"
        return ChatError("connect", f"connection to {url} failed ({cause})")

    def _status_error(self, url: str, response: requests.Response, raw: bytes) -> ChatError:
        status = response.status_code
        reason = "rate_limited" if status == 429 else "http_5xx" if status >= 500 else "http_4xx"
        return ChatError(reason, f"HTTP {status} from {url}: {_servers_words(raw)}",
                         retryable=status >= 500 or status in RETRIED_4XX,
                         retry_after=parse_retry_after(response.headers.get("Retry-After", ""), time.time()))

    @contextmanager
    def _session(self, url: str, deadline: float) -> Iterator[requests.Session]:
        """Lend a session with an endpoint, for one request until its deadline; its connection stays open for the next.

        They belong to the client and not to its callers' threads, which come and go: theirs would stay open for ever.
        """
        with self._lock:
            if self._closed.is_set():
                raise ChatError("connect", CLOSED, retryable=False)
            session, adapter = self._idle[url].pop() if self._idle[url] else self._open_session(url)
            adapter.deadline = deadline
            self._in_flight[threading.get_ident()] = adapter, deadline
        try:
            yield session
        finally:
            with self._lock:
                del self._in_flight[threading.get_ident()]
                self._idle[url].append((session, adapter))

    def _open_session(self, url: str) -> tuple[requests.Session, _Adapter]:
        session, adapter = requests.Session(), _Adapter(pool_connections=1, pool_maxsize=1)
        session.mount("http://", adapter)
        session.mount("https://", adapter)
        session.headers.update({"Content-Type": "application/json", "Accept-Encoding": "identity"})
        session.auth = self._authorize  # also without a key: else requests looks for one in ~/.netrc
        session.trust_env = not _is_loopback(urlsplit(url).hostname)  # no proxy between us and this machine
        return session, adapter

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _cut_off_late_replies(self) -> None:
        """Watch the deadlines, because socket time-outs start anew with every byte of a slow drip."""
        while self._in_flight or not self._closed.is_set():
            time.sleep(0.05)
            with self._lock:  # so that a thread cannot go on to its next request in between
                for adapter, deadline in self._in_flight.values():
                    if time.monotonic() >= deadline or self._closed.is_set():
                        adapter.abort()


class _Adapter(HTTPAdapter):
    """A `requests` adapter that remembers its newest socket, so that another thread can cut it off.

    Not its connection: `http.client` forgets the socket there as soon as a reply without a length begins.
    """

    sock: socket.socket | None = None
    deadline = math.inf  # of the request under way, time.monotonic()

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self._track(self.poolmanager)

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> urllib3.ProxyManager:
        manager = super().proxy_manager_for(*args, **kwargs)
        self._track(manager)
        return manager

    def _track(self, manager: urllib3.PoolManager) -> None:
        adapter = self

        def tracked(pool_class: type) -> type:
            class Connection(pool_class.ConnectionCls):
                def _new_conn(self) -> socket.socket:
                    where = self._dns_host, self.port
                    try:
                        sock = _connect(*where, self.timeout, adapter.deadline, self.socket_options)
                    except TimeoutError as error:
                        raise urllib3.exceptions.ConnectTimeoutError(self, "timed out") from error
                    except OSError as error:
                        raise urllib3.exceptions.NewConnectionError(self, str(error)) from error
                    adapter.sock = sock.dup()  # TLS takes the socket itself away while it shakes hands
                    return sock

                def connect(self) -> None:
                    try:
                        super().connect()
                    finally:
                        if adapter.sock is not None:
                            adapter.sock.close()
                        adapter.sock = self.sock

            return type(pool_class.__name__, (pool_class,), {"ConnectionCls": Connection})

        manager.pool_classes_by_scheme = {
            "http": tracked(urllib3.HTTPConnectionPool), "https": tracked(urllib3.HTTPSConnectionPool)
        }

    def abort(self) -> None:
        """Shut the socket down, which wakes the thread that waits for it."""
        sock = self.sock
        if sock is not None:
            with suppress(OSError):  # it may be closed already
                sock.shutdown(socket.SHUT_RDWR)


def _connect(host: str, port: int, timeout: float, deadline: float, options: Iterable[tuple]) -> socket.socket:
    """Connect to the first of a host's addresses that answers: `timeout` seconds for each, `deadline` for all.

    Names are looked up in a thread of their own: the system's resolver cannot be interrupted, and is left behind.
    """
    lookup: Future = Future()
    threading.Thread(target=_look_up, args=[lookup, host.strip("[]"), port], daemon=True).start()
    failure: OSError = OSError(f"no address of {host}")
    for family, kind, protocol, _, address in lookup.result(max(0.0, deadline - time.monotonic())):
        if (left := deadline - time.monotonic()) <= 0:
            break
        sock = socket.socket(family, kind, protocol)
        try:
            for option in options or ():
                sock.setsockopt(*option)
            sock.settimeout(min(timeout, left))
            sock.connect(address)
            return sock
        except OSError as error:
            sock.close()
            failure = error
    raise failure


def _look_up(lookup: Future, host: str, port: int) -> None:
    try:
        lookup.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    except (OSError, UnicodeError) as error:
        lookup.set_exception(OSError(str(error)))


def _most_tokens(request: dict[str, Any]) -> float:
    """Return what a request is taken to cost until its usage is known: a token per four characters, and max_tokens."""
    return sum(len(message["content"]) for message in request["messages"]) / 4 + request["max_tokens"]


def completions_url(base_url: str, name: str = "") -> str:
    """Return the address of the chat completions of a base URL, with or without its /v1; `name`: whose, for errors.

    >>> completions_url("http://127.0.0.1:8100"), completions_url("https://host/api/v4/")
    ('http://127.0.0.1:8100/v1/chat/completions', 'https://host/api/v4/chat/completions')
    """
    parts = _split_url(base_url.strip(), f"{URL_FLAGS.get(name, name)}: " if name else "")
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    if not re.search(r"/v\d[^/]*(?:/|$)", path):
        path += "/v1"
    return f"{parts.scheme}://{parts.netloc}{path}/chat/completions"


def _split_url(base_url: str, whose: str) -> SplitResult:
    try:
        parts = urlsplit(base_url)
        valid = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, a broken IPv6 address
        valid = False
    if valid and (parts.username is not None or parts.password is not None):
        raise ValueError(
            f"{whose}the base URL holds a user name or password; put the key into an environment variable instead")
    if not valid or parts.query or parts.fragment or not base_url.isprintable() or " " in base_url:
        shown = re.sub("//.*@|[?#].*", "…", base_url)  # not what may be a password or a key
        raise ValueError(f"{whose}base URL {_shorten(shown)!r} is not of the form http://host:port or https://host/v1")
    return parts


def parse_reply(raw: bytes, redact: Callable[[str], str] = str) -> ChatReply:
    """Return choices[0].message.content of a chat completion, stripped; raise ChatError if it is not text.

    The text is plain (`plain_text`), and `redact` has blotted out what nobody shall see.
    `tokens` is usage.completion_tokens, which counts what a reasoning model thought too, and `prompt_tokens` its twin.

    >>> parse_reply(b'{"choices": [{"message": {"role": "assistant", "content": " Hi. "}}]}')
    'Hi.'
    """
    if not raw.strip():
        raise ChatError("empty", "the reply has no body")
    start = repr(_shorten(raw[:200].decode(errors="replace")))
    try:
        content = body = json.loads(raw)
    except (ValueError, RecursionError):
        raise ChatError("bad_json", f"the reply is not JSON: {start}") from None
    try:
        for key in ("choices", 0, "message", "content"):
            content = content[key]
    except (KeyError, IndexError, TypeError):
        raise ChatError("bad_schema", f"the reply has no choices[0].message.content: {start}") from None
    if not isinstance(content, str):
        raise ChatError("bad_schema", f"choices[0].message.content is {json_type(content)}, not a string")
    text = plain_text(redact(content.encode("utf-8", "replace").decode())).strip()  # a lone surrogate: tokenizers crash
    if not text:
        raise ChatError("empty", "choices[0].message.content is blank")
    reply = ChatReply(text)
    usage = body.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    reply.tokens, reply.prompt_tokens = (
        n if type(n) is int and n > 0 else None for n in map(counts.get, ("completion_tokens", "prompt_tokens"))
    )
    return reply


def parse_retry_after(header: str, now: float) -> float:
    """Return the seconds that a Retry-After header asks for: a number, or an HTTP date after `now` (Unix seconds).

    >>> parse_retry_after("2", now=0.0), parse_retry_after("Thu, 01 Jan 1970 00:00:05 GMT", now=1.0)
    (2.0, 4.0)
    """
    if number := re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*", header):
        return float(number[1])
    try:
        moment = parsedate_to_datetime(header)
    except (TypeError, ValueError, IndexError, OverflowError):
        return 0.0  # absent or not understood
    return max(0.0, (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() - now)


def _servers_words(raw: bytes) -> str:
    """Return what an error body says, in one line: OpenAI's error.message, FastAPI's detail, or the body itself."""
    words: Any = raw.decode(errors="replace")
    with suppress(ValueError, RecursionError):
        body = json.loads(raw)
        if isinstance(body, dict):
            error = body.get("error") or body.get("detail") or body.get("message") or body
            words = error.get("message", error) if isinstance(error, dict) else error
    return _shorten(words if isinstance(words, str) else json.dumps(words), limit=300) or "(no explanation)"


def read_key(api_key_env: str | None) -> str:
    """Return the key in an environment variable, "" if none is named; ValueError, without it, if it is no key."""
    if api_key_env is None:
        return ""
    key = os.environ.get(api_key_env, "").strip()
    looks_like_a_name = re.fullmatch("[A-Z_][A-Z0-9_]*", api_key_env)
    shown = api_key_env if looks_like_a_name else "*** (not shown: give a variable's NAME, not the key)"
    if not key:
        raise ValueError(f"the environment variable {shown} is not set; export it with the endpoint's API key")
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"the environment variable {shown} holds characters that no HTTP header can carry")
    return key


def _check_limits(zero: bool = False, **limits: float) -> None:
    for name, value in limits.items():
        if not (value >= 0 if zero else value > 0) or not math.isfinite(value):
            raise ValueError(f"{name} is {value}; it must be {'0 or more' if zero else 'above 0'}, and finite")


def _is_loopback(host: str | None) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


# ----------------------------------------------------------------------------------------------------- embedded server
MODEL_NAME = "embedded-user"
MAX_REQUEST_BYTES = 1 << 20
_PATHS = {"/v1/chat/completions": "POST", "/v1/models": "GET", "/health": "GET"}


class RequestError(Exception):
    """A request that the server refuses, with the HTTP status to send."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def complete(raw: bytes) -> dict[str, Any]:
    """Answer the body of a chat completion request as the user it describes; raise RequestError if it is malformed.

    The same body gives the same words: `seed` decides, or else a hash of the messages. The model `rule-user-2` speaks
    as the user of `second_world.py`, any other name as that of `world.py`.
    """
    request = parse_request(raw)
    second = request.get("model") == second_world.MODEL_NAME
    messages, seed = request["messages"], request.get("seed")
    try:
        facts, history = parse_simulator_messages(messages)
    except ValueError as error:
        raise RequestError(422, str(error)) from None
    digest = hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:16]
    speaker = second_world if second else world
    reply = speaker.user_reply(list(facts), history, int(digest, 16) if seed is None else seed)
    n_prompt, n_reply = sum(len(m["content"].split()) for m in messages), len(reply.split())
    return {
        "id": f"chatcmpl-{digest}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": second_world.MODEL_NAME if second else MODEL_NAME,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": reply}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": n_prompt, "completion_tokens": n_reply, "total_tokens": n_prompt + n_reply},  # words
    }


def parse_request(raw: bytes) -> dict[str, Any]:
    """Read the body of a chat completion request; RequestError unless its messages, seed, n and stream are sound."""
    try:
        request = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is not JSON ({_reason(error)})") from None
    if not isinstance(request, dict):
        raise RequestError(422, f"the body is {json_type(request)}, not an object")
    if request.get("stream"):
        raise RequestError(400, '"stream": true is not supported by this server; leave it out')
    if request.get("n") not in (None, 1):
        raise RequestError(422, f'"n" is {json_type(request["n"])}; this server gives one choice per request')
    seed = request.get("seed")
    if type(seed) not in (int, type(None)):
        raise RequestError(422, f'"seed" is {json_type(seed)}, not a whole number')
    messages = request.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError(422, f'"messages" is {json_type(messages)}, not a list with at least one message')
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise RequestError(422, f"messages[{i}] is {json_type(message)}, not an object")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise RequestError(422, f"messages[{i}].{key} is {json_type(message.get(key))}, not a string")
    return request


class _Handler(BaseHTTPRequestHandler):
    """Speak HTTP/1.1 with keep-alive; every refusal is a JSON error in OpenAI's shape."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # buffered: one packet per reply
    timeout = 60  # seconds of silence until a connection is closed

    def do_POST(self) -> None:
        """Answer a request of any method."""
        try:
            self._send(200, self._reply(self._read_body()))
        except RequestError as error:
            self._refuse(error.status, str(error))
        except ConnectionError:
            raise  # the client has gone: nobody is left to answer
        except Exception as error:  # a bug of ours must not look like a dead server
            traceback.print_exc()
            self._refuse(500, f"internal error ({type(error).__name__})")

    do_GET = do_HEAD = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_POST

    def _read_body(self) -> bytes:
        """Read the whole body; until that is done the connection is not fit for another request."""
        self.close_connection, keep_alive = True, not self.close_connection
        length = self.headers.get("Content-Length", "0" if self.command != "POST" else "")
        if "Transfer-Encoding" in self.headers or not length:
            raise RequestError(411, "send the body with a Content-Length header, not chunked")
        if not re.fullmatch(r"[0-9]{1,18}", length):
            raise RequestError(400, f"Content-Length is {_shorten(length)!r}, not a number")
        if int(length) > MAX_REQUEST_BYTES:
            raise RequestError(413, f"the body has {length} bytes; the limit is {MAX_REQUEST_BYTES}")
        try:
            raw = self.rfile.read(int(length))
        except TimeoutError:
            raise RequestError(408, f"the body did not arrive within {self.timeout} s") from None
        if len(raw) < int(length):
            raise RequestError(400, f"the body ended after {len(raw)} of {length} bytes")
        self.close_connection = not keep_alive
        return raw

    def _reply(self, raw: bytes) -> dict[str, Any]:
        self._check_access()
        path = self.path.partition("?")[0]
        if path not in _PATHS:
            raise RequestError(404, f"there is no {_shorten(path)!r} here, only {', '.join(_PATHS)}")
        if self.command != _PATHS[path]:
            raise RequestError(405, f"{path} takes {_PATHS[path]}, not {self.command}")
        if path == "/health":
            return {"status": "ok"}
        if path == "/v1/models":
            model = {"id": self.server.model, "object": "model", "created": 0, "owned_by": "rlpa"}
            return {"object": "list", "data": [model]}
        if self.headers.get_content_type() != "application/json" or "Content-Type" not in self.headers:
            raise RequestError(415, f"Content-Type is {self.headers.get('Content-Type')!r}; send application/json")
        return self.server.answer(raw)

    def _check_access(self) -> None:
        """Refuse who does not have the key, and web pages that reach this machine under a name of their own."""
        scheme, _, key = self.headers.get("Authorization", "").partition(" ")
        known = scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), self.server.key.encode())
        if self.server.key and not known:
            raise RequestError(401, "no valid key; send it as Authorization: Bearer KEY")
        host = self.headers.get("Host", "localhost")  # only a browser can be made to send a foreign one
        name = re.sub(r":[0-9]*$", "", host.strip()).strip("[]").lower()
        if _is_loopback(self.server.server_address[0]) and not _is_loopback(name):
            raise RequestError(403, f"this server listens to localhost, not to the host {_shorten(host)!r}")

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse a request that http.server could not parse (its own errors are HTML)."""
        self.close_connection = True
        self.request_version = "HTTP/1.1"  # http.server leaves out the status line for what it takes for HTTP/0.9
        self._refuse(code, message or self.responses[code][0])

    def _refuse(self, status: int, message: str) -> None:
        kind = "server_error" if status >= 500 else "invalid_request_error"
        words = _shorten(message, limit=300)
        self._send(status, {"error": {"message": words, "type": kind, "param": None, "code": status}})

    def _send(self, status: int, payload: dict[str, Any]) -> None:
        body = json.dumps(payload).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status == 405:
            self.send_header("Allow", _PATHS[self.path.partition("?")[0]])
        if status == 401:
            self.send_header("WWW-Authenticate", "Bearer")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.wfile.flush()
        if self.close_connection:
            self._drain()

    def _drain(self) -> None:
        """Take in what the client still sends: closing on unread data resets the connection, and the reply is lost."""
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(1.0)
            for _ in range(1024):
                if not self.connection.recv(65_536):
                    break

    def log_message(self, format: str, *args: Any) -> None:
        """Stay quiet: a training run sends thousands of requests."""


class _Server(ThreadingHTTPServer):
    request_queue_size = 256  # the default of 5 makes simultaneous connections wait a second
    answer: Callable[[bytes], dict[str, Any]]  # body of a chat completion request → reply
    model: str
    key: str  # that clients must send; empty: none

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report the bug of a handler on stderr, but not a client that has gone."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def make_server(
    host: str = "127.0.0.1",
    port: int = 8100,
    answer: Callable[[bytes], dict[str, Any]] = complete,
    model: str = MODEL_NAME,
    key: str = "",
) -> ThreadingHTTPServer:
    """Bind a server of chat completions, the embedded user by default (port 0: any free); `serve_forever()` runs it.

    Raises ValueError for a host that is not loopback unless clients must send a key, and a port that is not free.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"--port {port} must lie in [0, 65535]; 0 takes a free one")
    address = "127.0.0.1" if host == "localhost" else host
    if not _is_loopback(address) and not key or ":" in address:
        raise ValueError(f"--host {host} is not an IPv4 loopback address; use --host 127.0.0.1"
                         " (others need a key: chat.py --api-key-env)")
    try:
        server = _Server((address, port), _Handler)
        server.answer, server.model, server.key = answer, model, key
        return server
    except OSError as error:
        why = error.strerror or error
        raise ValueError(f"--port {port} of {address} is not to be had ({why}); choose another (0: any free)") from None


@dataclass
class EmbeddedServer:
    """An embedded server in a process of its own, so that it shares no interpreter lock with the trainer."""

    url: str
    process: subprocess.Popen[str]

    def stop(self) -> None:
        """End the process (it ends by itself when this one does)."""
        self.process.stdin.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def start_embedded_server(timeout: float = 60.0) -> EmbeddedServer:
    """Start the embedded server on a free loopback port; raise RuntimeError if it is not up in `timeout` seconds."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), "--port", "0", "--until-stdin-closes"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for the trainer, which still needs the server while it saves
    )
    deadline = threading.Timer(timeout, process.kill)
    deadline.start()
    line = process.stdout.readline()
    deadline.cancel()
    server = EmbeddedServer(line.rpartition(" ")[2].strip(), process)
    if not line:
        server.stop()
        raise RuntimeError(f"the embedded server did not start in {timeout:g} s (exit status {process.returncode})")
    return server


def _shutdown_at_end_of_stdin(server: ThreadingHTTPServer) -> None:
    while os.read(0, 4096):  # returns b"" once the parent has closed its end, or has died
        pass
    server.shutdown()


def main(argv: Sequence[str] | None = None, answer: Callable[[bytes], dict[str, Any]] = complete) -> None:
    """Run the embedded server until it is interrupted; `answer` is what it says to a request's body."""
    parser = argparse.ArgumentParser(description="A rule-based simulated user behind /v1/chat/completions.")
    parser.add_argument("--host", default="127.0.0.1", help="loopback address to listen on")
    parser.add_argument("--port", type=int, default=8100, help="port to listen on; 0 takes a free one")
    parser.add_argument("--until-stdin-closes", action="store_true", help="end when standard input does")
    options = parser.parse_args(argv)
    try:
        server = make_server(options.host, options.port, answer)
    except ValueError as error:
        parser.error(str(error))
    print(f"simulated user at http://{server.server_address[0]}:{server.server_address[1]}/v1", flush=True)
    if options.until_stdin_closes:
        threading.Thread(target=_shutdown_at_end_of_stdin, args=[server], daemon=True).start()
    with suppress(KeyboardInterrupt):
        server.serve_forever(poll_interval=0.1)
    server.server_close()


if __name__ == "__main__":
    main()
