"""The HTTP client of an OpenAI-compatible endpoint: retries, deadlines, outages, quotas and the tape.

The road of one call: `ask` looks on the tape, `_call` makes attempts until one succeeds, `_admit` waits until a request
may be sent, `_send` sends it and tells the quota and the breaker what came of it, `_attempt` does the HTTP.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
import urllib3

from endpoints.refusals import CHANGES, refused_part, way_out, without
from endpoints.secrets import secret_pattern, url_secrets
from endpoints.sockets import CuttableAdapter, NoSuchHost
from endpoints.speech import bound_usage, parse_reply
from endpoints.tape import Tape
from endpoints.throttle import Breaker, Quota, backoff
from endpoints.wire import (
    UNSAID,
    URL_FLAGS,
    Call,
    ChatError,
    ChatReply,
    Message,
    completions_urls,
    is_loopback,
    parse_retry_after,
    servers_words,
    shown_url,
)
from untrusted.plain_text import shorten

RETRIED_4XX = {408, 409, 425, 429}  # time-out, conflict, too early, too many requests; other 4xx are our own mistake
AWAY = {"connect", "timeout", "http_5xx", "rate_limited", "outage"}  # any other answer shows that the endpoint is alive
FIRST_ATTEMPTS = 4  # of a call, while no call was ever answered: an endpoint that is alive but useless stays so
FIRST_REFUSALS = 3  # calls, while none was ever answered: then there is no use in further ones
PLAIN_HTTP = {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"}  # what OpenSSL calls a reply without encryption
LATIN = re.compile(r"charset=.?(?:iso-8859-1|latin-?1|windows-1252)\b", re.IGNORECASE)  # of a body; else UTF-8
CLOSED = "the client was closed"
PING = [{"role": "user", "content": "ping"}]  # a probe: any answer will do, a refusal too
PING_TOKENS = 2  # of a probe and its answer
ASIDE = "asked again only after it answers a test request"
THINKS = "sends thoughts in its text"
POLL = 0.1  # seconds between two looks at a breaker


class ChatClient:
    """Ask an OpenAI-compatible endpoint for chat completions, in bounded time and from many threads at once.

    All time-outs are in seconds. `total_timeout` bounds one call with all its retries, even against a server that sends
    one byte now and then. Connection errors, time-outs, 408, 409, 425, 429, 5xx and malformed replies are retried; any
    other status fails at once. The key is read from the environment variable `api_key_env`. It is blotted out of what a
    server says, and so are the values in the addresses' queries (`secrets.secret_pattern`).

    `base_url` may hold several URLs with commas between them. They are asked in turn. One that fails
    `breaker_failures` times in a row is left out until it answers a probe (`Breaker`). While none is left, calls wait,
    and this time does not count as theirs. After `outage_budget` seconds of it they fail with reason "outage", and
    `outage` says why. So no call is lost to a shorter outage; a call is lost if its attempts fail while others are
    answered. A budget of 0 turns the breakers off. Any answer is a sign of life, whatever it says.
    `notify` gets a line when an endpoint is left out, when it answers again, and when a part of the requests is sent in
    another form because the endpoint refuses it (`refusals.CHANGES`); any thread may call it.
    If the endpoints refuse the first calls, no more are sent, and `refusal` says why.
    `quota`: requests and tokens per minute, perhaps shared with other clients. Waiting for it is not the call's time.

    With a `tape`, calls are recorded or replayed under `name`. A replay needs no key and opens no connection.

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
        check_limits(connect_timeout=connect_timeout, read_timeout=read_timeout, total_timeout=total_timeout,
                     max_reply_bytes=max_reply_bytes, max_tokens=max_tokens, breaker_failures=breaker_failures)
        check_limits(zero=True, max_retries=max_retries, temperature=temperature, outage_budget=outage_budget)
        urls = completions_urls(base_url, name)
        if any(url.startswith("https:") for url in urls):
            ca_bundle()
        self.breakers = {url: Breaker(breaker_failures) for url in urls}
        self._turns = itertools.count()
        self.outage_budget, self.quota, self.notify = outage_budget, quota or Quota(), notify
        self.outage = ""  # why calls were given up for an outage; empty: none was
        self.answered = False  # whether any call ever was
        self.understood: bool | None = None  # of a judge: whether any answer held a verdict; None: none was read yet
        self.last_failure: ChatError | None = None
        self._refusals, self._given_up = 0, False  # calls in a row that were refused; whether no more are sent for it
        self._changed: dict[str, list[str]] = {url: [] for url in urls}  # parts of requests that an endpoint refuses
        self.connect_timeout, self.read_timeout, self.total_timeout = connect_timeout, read_timeout, total_timeout
        self.max_retries, self.max_reply_bytes = max_retries, max_reply_bytes
        self._settings = {"model": model, "temperature": temperature, "max_tokens": max_tokens}
        self.tape, self.name = tape, name
        self._key = "" if tape and not tape.recording else read_key(api_key_env)
        self._secrets = secret_pattern([self._key, *url_secrets(urls)])
        self._tally: Counter[str] = Counter()
        self._told: set[tuple[str, str]] = set()  # (endpoint, habit) that was told of
        self._lock = threading.Lock()
        self._idle: dict[str, list[tuple[requests.Session, CuttableAdapter]]] = {url: [] for url in urls}  # open
        self._in_flight: dict[int, tuple[CuttableAdapter, float]] = {}  # thread id → its adapter and its deadline
        self._closed = threading.Event()
        self._probers = ThreadPoolExecutor(len(urls), thread_name_prefix="probe")
        threading.Thread(target=self._cut_off_late_replies, daemon=True).start()

    def ask(self, messages: list[Message], seed: int | None = None) -> ChatReply | ChatError:
        """Return the reply's text, or the ChatError that ended the call; it runs in the caller's own thread."""
        request = self._settings | {"messages": messages} | ({} if seed is None else {"seed": seed})
        call = self.tape.find(self.name, request) if self.tape else None
        if call is None:
            call = self._call(request)
            gone = self._closed.is_set() or self._given_up and not self.answered
            lost = gone or getattr(call.reply, "reason", "") == "outage"
            if self.tape and not lost:  # these fail calls that the endpoint would have answered
                call = self.tape.keep(self.name, request, call)
        reply, failed = call
        answered = isinstance(reply, ChatReply)
        if answered:
            self.answered = True
        else:
            self.last_failure = reply
        counts = Counter(f"errors {reason}" for reason in failed)
        counts.update(requests=1, retries=len(failed) - (not answered))
        if answered:  # where the endpoint tells no tokens, words stand in for them
            prompt, said = reply.prompt_tokens, reply.tokens
            counts["prompt_tokens"] = sum(len(m["content"].split()) for m in messages) if prompt is None else prompt
            counts["completion_tokens"] = len(reply.split()) if said is None else said
            counts.update(without_usage=prompt is None or said is None, length=reply.cut, thoughts=reply.thoughts,
                          ran_on=reply.ran_on)
        with self._lock:
            self._tally.update(counts)
        return reply

    def _call(self, request: dict[str, Any]) -> Call:
        """Ask until there is a reply, or no further attempt is allowed or of use."""
        failed: list[str] = []
        # What the request is taken to cost until its usage is known: a token per four characters, and max_tokens.
        most_tokens = sum(len(m["content"]) for m in request["messages"]) / 4 + request["max_tokens"]
        deadline, first, spared = time.monotonic() + self.total_timeout, 0, False  # first: of the attempts that count
        while True:
            start = time.monotonic()
            try:
                url = self._admit(most_tokens)
                sent = time.monotonic()
                deadline += sent - start  # others' waiting time: an outage, a rate limit
                return Call(self._send(url, request, deadline, most_tokens), tuple(failed))
            except ChatError as error:
                failure = error
            failed.append(failure.reason)
            pause = max(backoff(len(failed) - first - 1), failure.retry_after * (not self.outage_budget))
            pause *= failure.reason not in UNSAID  # the server is well: another seed need not wait
            # A pause that outlasts the deadline is not begun: the call has failed already.
            exhausted = len(failed) - first > self.max_retries or time.monotonic() + pause >= deadline
            useless = self._is_refusal(failure) and not self.answered and len(failed) >= FIRST_ATTEMPTS
            if not failure.retryable or useless:
                break
            if exhausted and (spared or not self._may_be_out(failure, sent)):
                break
            if exhausted:  # nobody was answered meanwhile: wait as if for an outage, then try for a last time
                self._trip()
                deadline, first, spared = time.monotonic() + self.total_timeout, len(failed), True
            elif self._closed.wait(pause):
                break
            if failure.reason in UNSAID and "seed" in request:  # a seeded server would say nothing again
                request = request | {"seed": request["seed"] + 1}
        self._note_lost(failure)
        return Call(failure, tuple(failed))

    def _admit(self, most_tokens: float) -> str:
        """Wait until a request may be sent, and return where to; ChatError "outage" when the budget is used up."""
        while not self._closed.is_set():
            if self._given_up and not self.answered:
                was = self.last_failure
                raise ChatError(was.reason, was.message, retryable=False, status=was.status, words=was.words)
            for url, breaker in self.breakers.items():
                if breaker.is_open and breaker.claim_probe():
                    self._probers.submit(self._probe, url)
            usable = [url for url, breaker in self.breakers.items() if not breaker.is_open]
            if usable:
                break
            down = time.monotonic() - max(breaker.failing_since for breaker in self.breakers.values())
            if down >= self.outage_budget:
                self.outage = self.outage or f"no answer for {self.outage_budget:g} s; last: {self.last_failure}"
                raise ChatError("outage", self.outage, retryable=False)
            self._closed.wait(POLL)
        if self._closed.wait(self.quota.take(most_tokens)):
            raise ChatError("connect", CLOSED, retryable=False)
        return usable[next(self._turns) % len(usable)]

    def _send(
        self, url: str, request: dict[str, Any], deadline: float, most_tokens: float, probe: bool = False
    ) -> ChatReply:
        """Send a request, and let the quota and the endpoint's breaker know what came of it."""
        used, failure = most_tokens, None  # where the endpoint does not say
        try:
            reply = bound_usage(self._attempt_as_taken(url, request, deadline), most_tokens)
            if reply.thoughts:
                self._tell_once(url, THINKS)
            if reply.ran_on:
                self._tell_once(url, "does not stop where a turn ends (its stop tokens are wrong)")
            if reply.tokens is not None and reply.prompt_tokens is not None:
                used = reply.tokens + reply.prompt_tokens
        except ChatError as error:
            self.last_failure = failure = error
            used = 0
            if error.reason == "only_thoughts":
                self._tell_once(url, THINKS)
        self.quota.take(used - most_tokens, requests=0)
        if failure and failure.reason in AWAY:
            self._note_failure(url, failure, probe)
        elif self.breakers[url].answered():
            self.notify(f"{self.name or 'an endpoint'}: {shown_url(url)} answers again")
        if failure:
            raise failure
        return reply

    def _attempt_as_taken(self, url: str, request: dict[str, Any], deadline: float) -> ChatReply:
        """Send a request without the parts that an endpoint is known to refuse; again, whenever another one shows."""
        while True:
            changed = tuple(self._changed[url])
            try:
                return self._attempt(url, json.dumps(without(request, changed)).encode(), deadline)
            except ChatError as error:
                part = refused_part(error.status, error.words, changed)
                if not part:
                    raise
                failure = error
            with self._lock:
                is_new = part not in self._changed[url]
                self._changed[url] += [part] * is_new
            if is_new:
                done = f"from now on {part} is {CHANGES[part].done}"
                self.notify(f"{self.name or 'an endpoint'}: {failure.message}; {done}")

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
        try:
            return parse_reply(raw, self._secrets, one_turn=self.name != "judge")
        except ChatError as error:
            raise ChatError(error.reason, f"{error.message}, from {shown_url(url)}", error.retryable) from None

    @contextmanager
    def _session(self, url: str, deadline: float) -> Iterator[requests.Session]:
        """Lend a session with an endpoint for one request until its deadline; its connection stays open for the next.

        Sessions belong to the client and not to the threads that call it. Those come and go, and their connections
        would stay open for ever.
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

    def _open_session(self, url: str) -> tuple[requests.Session, CuttableAdapter]:
        session, adapter = requests.Session(), CuttableAdapter(pool_connections=1, pool_maxsize=1)
        session.mount("http://", adapter)
        session.mount("https://", adapter)
        session.headers.update({"Content-Type": "application/json", "Accept-Encoding": "identity"})
        if self._key:
            session.headers["Authorization"] = f"Bearer {self._key}"
        session.auth = lambda request: request  # changes nothing; without it, requests looks for a key in ~/.netrc
        session.trust_env = not is_loopback(urlsplit(url).hostname)  # no proxy between us and this machine
        session.verify = ca_bundle()
        return session, adapter

    def _read_body(self, response: requests.Response, deadline: float) -> bytes:
        """Read the body as it arrives, up to `max_reply_bytes`, and blot out the secrets that it quotes."""
        raw = bytearray()
        while piece := response.raw.read1(65_536, decode_content=True):
            raw += piece
            if len(raw) > self.max_reply_bytes:
                raise ChatError("too_large", f"the reply is longer than max_reply_bytes={self.max_reply_bytes}")
        if time.monotonic() >= deadline:  # cut off: the end of the data is not the end of the reply
            raise TimeoutError
        latin = LATIN.search(response.headers.get("Content-Type", ""))
        text = raw.decode("cp1252" if latin else "utf-8", "surrogateescape")
        return self._redact(text).encode(errors="surrogateescape")

    @property
    def counts(self) -> dict[str, Any]:
        """Return totals of all calls so far.

        requests (calls, made or replayed), retries (repeated attempts), errors (failed attempts by reason),
        prompt_tokens and completion_tokens (words, where the endpoint does not say), without_usage (calls for which it
        did not say), length (replies that ended at max_tokens), thoughts (replies that held some), ran_on (replies that
        went on behind the end of their turn) and breaks (how often a breaker opened).
        """
        with self._lock:
            tally = dict(self._tally)
        totals = ("requests", "retries", "prompt_tokens", "completion_tokens", "without_usage", "length", "thoughts",
                  "ran_on", "breaks")
        errors = {key.removeprefix("errors "): n for key, n in tally.items() if key.startswith("errors ")}
        return {key: tally.get(key, 0) for key in totals} | {"errors": errors}

    def close(self) -> None:
        """Cut off what is in flight; the client cannot be used afterwards."""
        self._closed.set()
        self._probers.shutdown(cancel_futures=True)
        for session, _ in itertools.chain(*self._idle.values()):
            session.close()

    # ---------------------------------------------------------------------------------------------- when a call fails
    def _transport_error(self, url: str, error: Exception, deadline: float) -> ChatError:
        if self._closed.is_set():
            return ChatError("connect", CLOSED, retryable=False)
        shown = shown_url(url)
        if time.monotonic() >= deadline:
            return ChatError("timeout", f"no whole reply from {shown} within total_timeout={self.total_timeout:g} s")
        if isinstance(error, requests.Timeout | urllib3.exceptions.TimeoutError | TimeoutError):
            return ChatError("timeout", f"{shown} was silent for connect_timeout={self.connect_timeout:g} s or "
                                        f"read_timeout={self.read_timeout:g} s")
        while error.__context__ is not None:
            error = error.__context__  # the innermost one says what happened, e.g. ConnectionRefusedError
        cause = f"{type(error).__name__}: {shorten(self._redact(str(error)))}"
        if isinstance(error, ssl.SSLCertVerificationError):  # no patience changes it
            return ChatError("certificate", f"the certificate of {shown} is not trusted ({cause})", retryable=False)
        if isinstance(error, ssl.SSLError) and error.reason in PLAIN_HTTP:
            return ChatError("address", f"{shown} does not speak https; try http:// ({cause})", retryable=False)
        if isinstance(error, NoSuchHost) and not self.answered:  # later it is an outage
            return ChatError("address", f"the host of {shown} does not exist ({cause})", len(self.breakers) > 1)
        return ChatError("connect", f"connection to {shown} failed ({cause})")

    def _status_error(self, url: str, response: requests.Response, raw: bytes) -> ChatError:
        status, words = response.status_code, servers_words(raw)
        reason = "rate_limited" if status == 429 else "http_5xx" if status >= 500 else "http_4xx"
        if target := response.headers.get("Location", "") if status < 400 else "":
            target = re.sub(r"(?<=//)[^/]*@|[?#].*", "", urljoin(url, self._redact(target)))  # no password, no token
            words = f"it redirects to {shorten(target, limit=200)}"
        return ChatError(reason, f"HTTP {status} from {shown_url(url)}: {words}",
                         retryable=status >= 500 or status in RETRIED_4XX,
                         retry_after=parse_retry_after(response.headers.get("Retry-After", ""), time.time()),
                         status=status, words=words)

    def _redact(self, text: str) -> str:
        """Blot out the secrets. Do this before a text is shortened, or half of the key may stay."""
        return self._secrets.sub("***", text)

    @staticmethod
    def _is_refusal(failure: ChatError) -> bool:
        """Say whether an endpoint that is alive would not answer, and asked for no patience."""
        return failure.reason not in AWAY and failure.status not in RETRIED_4XX

    def _note_lost(self, failure: ChatError) -> None:
        """Note how a call was lost; if the first ones were all refused, and no other is under way, send no more."""
        with self._lock:
            self._refusals = self._refusals + 1 if self._is_refusal(failure) else 0
            alone = not self._in_flight  # a slow good answer may still be on its way
            self._given_up |= self._refusals >= FIRST_REFUSALS and alone and not self.answered

    def note_verdict(self, answer: str, read: bool) -> None:
        """Note whether an answer of a judge held a verdict."""
        with self._lock:
            self.understood = self.understood or read
        if not read:
            where = shown_url(",".join(self.breakers))
            self.last_failure = ChatError("no_verdict", f"no verdict in {shorten(answer, 200)!r}, from {where}")

    @property
    def useful(self) -> bool:
        """Say whether any call has brought what it was made for."""
        return self.answered and self.understood is not False

    @property
    def refusal(self) -> str:
        """Say in one line why every call has failed so far though the endpoints are alive; "" if that is not so."""
        whose = URL_FLAGS.get(self.name, self.name or "the endpoint")
        if self.understood is False:
            return f"{whose}: no answer was a verdict; {self.complaint}"
        return f"{whose}: every request failed; {self.complaint}" if self._refusals and not self.answered else ""

    @property
    def complaint(self) -> str:
        """Say in one line what came last instead of a reply, and which flag would mend it; "" if nothing has failed."""
        if self.last_failure is None:
            return ""
        hint = way_out(self.name, self.last_failure) if self._is_refusal(self.last_failure) else ""
        return f"last: {self.last_failure.message}" + (f"; {hint}" if hint else "")

    def _note_failure(self, url: str, error: ChatError, probe: bool) -> None:
        """Tell the breaker of a failure that is the endpoint's, not the request's own."""
        if not self.outage_budget or self._closed.is_set():
            return
        opened = self.breakers[url].failed(error.retry_after, probe)
        with self._lock:
            self._tally["breaks"] += opened
        if opened:
            self.notify(f"{self.name or 'an endpoint'}: {error}; {ASIDE}")

    def _tell_once(self, url: str, habit: str) -> None:
        """Say once per endpoint what it does to its text."""
        with self._lock:
            new = (url, habit) not in self._told
            self._told.add((url, habit))
        if new:
            self.notify(f"{self.name or 'an endpoint'}: {shown_url(url)} {habit}; that is cut away")

    def _may_be_out(self, failure: ChatError, since: float) -> bool:
        """Say whether a failure may be that of all endpoints: none has answered anybody since then."""
        unanswered = all(breaker.answered_at < since for breaker in self.breakers.values())
        return bool(self.outage_budget) and failure.reason in AWAY and unanswered

    def _trip(self) -> None:
        """Open all breakers, as if for an outage."""
        opened = sum(breaker.failed(trip=True) for breaker in self.breakers.values())
        with self._lock:
            self._tally["breaks"] += opened
        if opened:
            self.notify(f"{self.name or 'endpoints'}: {self.last_failure}; {ASIDE}")

    def _probe(self, url: str) -> None:
        """Send a short request to an endpoint that is out, to see whether it answers again."""
        request = self._settings | {"messages": PING, "max_tokens": 1}
        self.quota.take(PING_TOKENS)
        deadline = time.monotonic() + min(self.read_timeout, self.total_timeout)
        with suppress(ChatError):  # counted by the breaker
            self._send(url, request, deadline, PING_TOKENS, probe=True)

    def _cut_off_late_replies(self) -> None:
        """Watch the deadlines, because socket time-outs start anew with every byte of a slow drip."""
        while self._in_flight or not self._closed.is_set():
            time.sleep(0.05)
            with self._lock:  # so that a thread cannot go on to its next request in between
                for adapter, deadline in self._in_flight.values():
                    if time.monotonic() >= deadline or self._closed.is_set():
                        adapter.abort()


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


def ca_bundle() -> str | bool:
    """Return the certificates to trust, as `requests` finds them but on this machine too; ValueError for a bad path."""
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        if path := os.environ.get(name):
            if not os.path.exists(path):
                raise ValueError(f"the environment variable {name} names {shorten(path)!r}, which does not exist")
            return path
    return True


def check_limits(zero: bool = False, **limits: float) -> None:
    """Raise ValueError for a limit that is not finite and above 0; with `zero`, 0 is allowed, too."""
    for name, value in limits.items():
        if not (value >= 0 if zero else value > 0) or not math.isfinite(value):
            raise ValueError(f"{name} is {value}; it must be {'0 or more' if zero else 'above 0'}, and finite")
