"""The chat client against hostile servers, the embedded server against hostile clients, and each against a stranger.

`hostile_server` is a raw socket server: it reads one request and lets a function of the request's JSON do what it likes
with the connection.
"""

from __future__ import annotations

import base64
import doctest
import gzip
import html
import http.client
import json
import os
import random
import select
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from email.utils import formatdate
from pathlib import Path
from urllib.parse import quote

import pytest
import requests
from hypothesis import given, settings
from hypothesis import strategies as st
from small_run import served

import simulator
from config import Config
from endpoints import secrets as endpoint_secrets
from endpoints import server as endpoint_server
from endpoints.client import ChatClient
from endpoints.secrets import secret_pattern
from endpoints.speech import parse_reply
from endpoints.tape import Tape
from endpoints.wire import UNSAID, ChatError, RequestError, parse_retry_after
from simulator import make_user_server, simulator_messages, start_embedded_server
from worlds import first
from worlds.personas import Persona

ROOT = Path(simulator.__file__).parent
ASK = [{"role": "user", "content": "hi"}]
FIRST = [{"role": "user", "content": "first"}]  # what is answered well: before any answer a client soon gives up
PERSONA = Persona("ann", ("Age: 34", "Location: Oslo", "Occupation: baker", "Others: parrot", "Interests: chess",
                          "Gender: woman", "Marital Status: single", "Educational Background: law"))
HISTORY = [("user", "Hello"), ("assistant", "Hi! Where do you live?")]


def completion(content) -> bytes:
    return json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": content}}]}).encode()


def http_reply(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Content-Type: application/json", *headers]
    return "\r\n".join([*head, "", ""]).encode() + body


def reply_of(client: ChatClient, messages: list, seed: int | None = None) -> str:
    """Return what an endpoint says, or raise the error that ended the call."""
    reply = client.ask(messages, seed)
    if isinstance(reply, ChatError):
        raise reply
    return reply


def ask_all(client: ChatClient, batch: list, seeds, threads: int = 64) -> list:
    """Return what became of many calls at once, in their order."""
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(client.ask, batch, seeds))


@contextmanager
def hostile_server(behave, port: int = 0):
    """Serve `behave(sock, request_json, headers)` on a loopback port until it returns False; yield the URL."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            while self.rfile.readline():
                headers = http.client.parse_headers(self.rfile)
                request = json.loads(self.rfile.read(int(headers["Content-Length"])))
                try:
                    if behave(self.connection, request, headers) is False:
                        return
                except OSError:
                    return  # the client has hung up, as it should

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address, daemon_threads, request_queue_size = True, True, 256

        def handle_error(self, request, client_address):
            if not isinstance(sys.exception(), ConnectionError):
                super().handle_error(request, client_address)

    server = Server(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def scripted(*replies: bytes):
    """Behave by sending the replies one after another (the last one for ever); `.requests` holds what came in."""

    def behave(sock, request, headers):
        behave.requests.append((request, headers))
        sock.sendall(replies[min(len(behave.requests), len(replies)) - 1])

    behave.requests = []
    return behave


# ------------------------------------------------------------------------------------------------------ hostile replies
def reset(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
    return False


def drip(head: bytes):
    """Send a byte every 50 ms for as long as somebody waits: the read time-out never fires."""

    def behave(sock):
        sock.sendall(head)
        while True:
            sock.sendall(b"x")
            time.sleep(0.05)

    return behave


HTML = b"<html><body>Bad gateway</body></html>"
PROMPT_FAILURES = [  # (reason, what the server sends or does)
    ("empty", http_reply(b"")),
    ("empty", http_reply(b" \r\n ")),
    ("empty", http_reply(completion(""))),
    ("empty", http_reply(completion(" \n\t "))),
    ("too_large", http_reply(completion("x" * 5_000_000))),
    ("too_large", http_reply(gzip.compress(b" " * 5_000_000), "200 OK", "Content-Encoding: gzip")),
    ("bad_json", http_reply(HTML)),
    ("bad_json", http_reply(completion("hi")[:-9])),
    ("bad_json", http_reply(b"\xff\xfe\xfa")),
    ("bad_json", http_reply(b"[" * 50_000)),
    ("bad_schema", http_reply(b"9" * 5_000)),
    ("bad_json", http_reply(b"data: {}\n\ndata: [DONE]")),
    ("no_text", http_reply(completion(None))),
    ("bad_schema", http_reply(completion(7))),
    ("bad_schema", http_reply(completion({"text": "hi"}))),
    ("bad_schema", http_reply(completion(["hi"]))),
    ("bad_schema", http_reply(b'{"choices": []}')),
    ("bad_schema", http_reply(b'{"choices": {"0": {}}}')),
    ("bad_schema", http_reply(b'{"choices": ["hi"]}')),
    ("bad_schema", http_reply(b'{"choices": [{"message": "hi"}]}')),
    ("bad_schema", http_reply(b'{"error": {"message": "overloaded"}}')),
    ("bad_schema", http_reply(b"null")),
    ("bad_schema", http_reply(b'"hi"')),
    ("rate_limited", http_reply(b"{}", "429 Too Many Requests", "Retry-After: 1")),
    ("http_5xx", http_reply(b'{"detail": "boom"}', "500 Internal Server Error")),
    ("http_5xx", http_reply(HTML, "502 Bad Gateway")),
    ("http_4xx", http_reply(b'{"detail": []}', "404 Not Found")),
    ("http_4xx", http_reply(b"", "302 Found", "Location: http://127.0.0.1:1/")),
    ("connect", lambda sock: reset(sock)),
    ("connect", lambda sock: False),  # closes without a word
    ("connect", lambda sock: (sock.sendall(b"SMTP ready\r\n\r\n"), False)[1]),
    ("connect", lambda sock: (sock.sendall(http_reply(b"x" * 100)[:-50]), False)[1]),  # ends before Content-Length
    ("connect", lambda sock: (sock.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"), False)[1]),
    ("connect", lambda sock: (sock.sendall(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200), False)[1]),
]
SLOW_FAILURES = [
    ("timeout", drip(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")),
    ("timeout", drip(b"HTTP/1.1 200 OK\r\n\r\n")),  # no length: what came until the cut must not pass for the body
    ("timeout", drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n1;")),
    ("timeout", drip(b"HTTP/1.1 200 OK\r\nX-Header: ")),
    ("timeout", drip(b"")),
    ("timeout", lambda sock: time.sleep(3)),
]


def misbehave(cases):
    def behave(sock, request, headers):
        if request["messages"] == FIRST:
            return sock.sendall(http_reply(completion("ok")))
        action = cases[request["seed"] % len(cases)][1]
        return sock.sendall(action) if isinstance(action, bytes) else action(sock)

    return behave


def test_a_thousand_malformed_replies():
    """Guards: one odd reply crashes or hangs the run, or is not counted, or is counted as something else.

    The slow ones have short limits of their own, so that a busy machine does not turn another failure into a time-out.
    """
    def fail(cases, n, **limits):
        with hostile_server(misbehave(cases)) as url, closing(ChatClient(url, "m", max_retries=0, **limits)) as client:
            assert client.ask(FIRST, 0) == "ok"
            replies = ask_all(client, [ASK] * n, range(n))
            expected = [cases[i % len(cases)][0] for i in range(n)]
            assert [getattr(reply, "reason", reply) for reply in replies] == expected
            assert all("\n" not in str(reply) and len(str(reply)) < 500 for reply in replies)
            assert client.counts["errors"] == Counter(expected)
            assert (client.counts["requests"], client.counts["retries"]) == (n + 1, 0)

    fail(PROMPT_FAILURES, 900)
    fail(SLOW_FAILURES, 100, read_timeout=0.6, total_timeout=0.6)


def test_malformed_replies_are_retried_within_bounds_and_the_good_one_is_kept():
    """Guards: a retry that never ends, or a reply that is lost although the server had recovered."""
    cases = [case for case in PROMPT_FAILURES if case[0] not in {"http_4xx", "rate_limited"}]
    seen: Counter[str] = Counter()

    def behave(sock, request, headers):
        text = request["messages"][0]["content"]
        seen[text] += 1
        if seen[text] > 1:
            return sock.sendall(http_reply(completion(f"reply to {text}")))
        return misbehave(cases)(sock, request, headers)

    n = len(cases)
    with hostile_server(behave) as url, closing(ChatClient(url, "m")) as client:
        replies = ask_all(client, [[{"role": "user", "content": f"{i}"}] for i in range(n)], range(n))
        assert replies == [f"reply to {i}" for i in range(n)]
        assert client.counts["retries"] == n
        assert client.counts["errors"] == Counter(reason for reason, _ in cases)
    always_500 = scripted(http_reply(b"", "500 Oops"))
    with hostile_server(always_500) as url, closing(ChatClient(url, "m", max_retries=2)) as client:
        with pytest.raises(ChatError, match="http_5xx: HTTP 500"):
            reply_of(client, ASK)
        assert len(always_500.requests) == 3 and client.counts["errors"] == {"http_5xx": 3}


def test_a_blank_reply_is_retried_with_another_seed_and_nothing_else_is():
    """Guards: a seeded server repeats its blank reply until the dialogue is lost; a flaky network changes replies."""
    seeds = []

    def behave(sock, request, headers):
        seeds.append(request["seed"])
        replies = [http_reply(b"", "500 Oops"), http_reply(completion(" ")), http_reply(completion("ok"))]
        sock.sendall(replies[min(len(seeds), 3) - 1])

    with hostile_server(behave) as url, closing(ChatClient(url, "m")) as client:
        assert reply_of(client, ASK, seed=7) == "ok" and seeds == [7, 7, 8]


def test_ask_returns_what_became_of_the_call_from_any_thread():
    """Guards the rollout's own threads: a text or the error itself, never raised, whoever asks, and all are counted."""
    def behave(sock, request, headers):
        text = request["messages"][0]["content"]
        sock.sendall(http_reply(b"", "400 Bad Request") if text == "bad" else http_reply(completion(f"re: {text}")))

    with hostile_server(behave) as url, closing(ChatClient(url, "m")) as client:
        failure = client.ask([{"role": "user", "content": "bad"}], 3)
        assert isinstance(failure, ChatError) and failure.reason == "http_4xx" and "HTTP 400" in str(failure)
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(client.ask, [{"role": "user", "content": f"{i}"}], i) for i in range(40)]
            assert [call.result() for call in asked] == [f"re: {i}" for i in range(40)]
        assert client.ask(ASK).startswith("re: ")  # without a seed
        assert (client.counts["requests"], client.counts["errors"]) == (42, {"http_4xx": 1})
    late = client.ask(ASK, 1)
    assert isinstance(late, ChatError) and "the client was closed" in str(late)


@pytest.mark.slow
def test_server_that_dies_and_comes_back():
    """Guards: a restart of the simulator loses the dialogues that wait for it."""
    good = scripted(http_reply(completion("back")))
    with hostile_server(lambda sock, *_: (sock.sendall(http_reply(completion("first"))), False)[1]) as url:
        client = ChatClient(url, "m")
        assert reply_of(client, ASK) == "first"

    def restart():
        time.sleep(2)
        with hostile_server(good, port=int(url.rpartition(":")[2])):
            done.wait()

    done = threading.Event()
    thread = threading.Thread(target=restart)
    thread.start()
    with closing(client):
        assert ask_all(client, [ASK] * 8, range(8)) == ["back"] * 8
        assert client.counts["errors"]["connect"] >= 8
    done.set()
    thread.join()


def test_server_that_stays_dead_is_a_typed_failure():
    """Guards: retrying for ever when nobody listens; the error names neither the address nor the cause."""
    with closing(ChatClient("http://127.0.0.1:9", "m", max_retries=1)) as client:
        with pytest.raises(ChatError, match=r"connection to http://127.0.0.1:9/v1/.*ConnectionRefused"):
            reply_of(client, ASK)
        assert client.counts["errors"] == {"connect": 2} and client.counts["retries"] == 1


def test_total_timeout_spans_the_retries():
    """Guards: each retry gets the whole time-out anew; a back-off outlasts the deadline."""
    with hostile_server(lambda sock, *_: time.sleep(30)) as url:
        with closing(ChatClient(url, "m", read_timeout=0.2, total_timeout=1.0, max_retries=1000)) as client:
            with pytest.raises(ChatError) as caught:
                reply_of(client, ASK)
    assert caught.value.reason == "timeout" and client.counts["retries"] < 20


@pytest.mark.parametrize(
    "status, body, words",
    [
        ("400 Bad Request", b'{"error": {"message": "unknown model\\nm"}}', "unknown model m"),
        ("401 Unauthorized", b'{"error": "who are you"}', "who are you"),
        ("403 Forbidden", b"<h1>go away</h1>", "go away"),
        ("404 Not Found", b'{"detail": "Not Found"}', "Not Found"),
        ("422 Unprocessable", b'{"detail": [{"loc": ["body"]}]}', '"loc"'),
        ("413 Too Large", b"", "no explanation"),
    ],
)
def test_4xx_fails_at_once_with_the_servers_words(status, body, words):
    """Guards: a wrong key or model name is retried for minutes, or reported without what the server said about it."""
    behave = scripted(http_reply(body, status))
    with hostile_server(behave) as url, closing(ChatClient(url, "m")) as client:
        with pytest.raises(ChatError) as caught:
            reply_of(client, ASK)
    assert caught.value.reason == "http_4xx" and words in str(caught.value) and status[:3] in str(caught.value)
    assert len(behave.requests) == 1 and "\n" not in str(caught.value)


@pytest.mark.parametrize("status", ["408 Request Timeout", "409 Conflict", "425 Too Early", "429 Too Many", "503 Busy"])
def test_transient_statuses_are_retried(status):
    """Guards: a status that means "try again" drops the dialogue."""
    behave = scripted(http_reply(b"", status), http_reply(completion("ok")))
    with hostile_server(behave) as url, closing(ChatClient(url, "m")) as client:
        assert reply_of(client, ASK) == "ok" and len(behave.requests) == 2


@pytest.mark.slow
def test_retry_after_is_honoured_and_capped():
    """Guards: the client hammers a server that asked for patience, or sleeps for an hour because it was told to."""
    for wait, dated in ((1, False), (3, True)):
        start = int(time.time())  # a date has whole seconds
        until = formatdate(start + wait, usegmt=True) if dated else wait
        behave = scripted(http_reply(b"", "429 Slow Down", f"Retry-After: {until}"), http_reply(completion("ok")))
        with hostile_server(behave) as url, closing(ChatClient(url, "m")) as client:
            assert reply_of(client, ASK) == "ok" and time.time() >= start + wait
    behave = scripted(http_reply(b'{"error": {"message": "quota"}}', "429 Slow Down", "Retry-After: 3600"))
    with hostile_server(behave) as url, closing(ChatClient(url, "m")) as client:
        with pytest.raises(ChatError, match="rate_limited: .*quota"):
            reply_of(client, ASK)
        assert len(behave.requests) == 1


@given(header=st.text(max_size=40) | st.sampled_from(["nan", "-1", "9" * 400, "0\x1f", "Mon, 1 Jan 0001 00:00 -0000"]))
@settings(max_examples=300, deadline=None)
def test_any_retry_after_is_a_wait_of_zero_or_more(header):
    """Guards: NaN or a negative number reaches a sleep; an odd date crashes."""
    assert parse_retry_after(header, time.time()) >= 0


ANY_VALUE = st.none() | st.integers() | st.text(max_size=3) | st.lists(st.none(), max_size=1)
ANY_PART = st.dictionaries(st.sampled_from(["type", "text"]), ANY_VALUE | st.sampled_from(["text", "refusal"]))
ANY_MESSAGE = st.dictionaries(
    st.sampled_from(["content", "refusal", "error", "finish_reason", "tool_calls", "usage"]),
    ANY_VALUE | st.lists(ANY_PART, max_size=2),
)


@given(raw=st.binary(max_size=80) | st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2)
    | st.dictionaries(st.sampled_from(["choices", "message", "content"]), inner, max_size=2),
).map(lambda value: json.dumps(value).encode()) | ANY_MESSAGE.map(
    lambda message: json.dumps({"choices": [{"message": message} | message]} | message).encode()
))
@settings(max_examples=300, deadline=None)
def test_any_body_is_text_or_a_chat_error(raw):
    """Guards: KeyError, TypeError or UnicodeError from a body that nobody thought of."""
    try:
        assert parse_reply(raw).strip()
    except ChatError as error:
        assert error.reason in UNSAID | {"bad_json", "bad_schema"}


def test_reply_is_valid_unicode():
    """Guards: a lone surrogate, legal in JSON, crashes the tokenizer or the transcript writer."""
    assert parse_reply(b'{"choices": [{"message": {"content": "a \\ud83d b"}}]}') == "a ? b"


# ------------------------------------------------------------------------------------------------- the client's manners
def test_order_concurrency_and_request_body():
    """Guards: replies are swapped between dialogues, the bound on concurrency leaks, a setting is not sent."""
    active, peak, lock = set(), [0], threading.Lock()

    def behave(sock, request, headers):
        with lock:
            active.add(sock)
            peak[0] = max(peak[0], len(active))
        time.sleep(0.02 * (request.get("seed", 0) % 3))
        with lock:
            active.discard(sock)
        sock.sendall(http_reply(completion(json.dumps(request))))

    with hostile_server(behave) as url:
        with closing(ChatClient(url + "/v1/", "mm", temperature=0.5, max_tokens=9)) as client:
            sent = [json.loads(text) for text in ask_all(client, [ASK] * 24, range(24), threads=4)]
            unseeded = json.loads(reply_of(client, ASK))
    assert [r["seed"] for r in sent] == list(range(24)) and 1 < peak[0] <= 4
    assert unseeded == {"model": "mm", "temperature": 0.5, "max_tokens": 9, "messages": ASK}
    assert client.counts["requests"] == 25


def test_connections_are_kept():
    """Guards: every request pays for a new connection (and a TLS handshake)."""
    peers = set()

    def behave(sock, request, headers):
        peers.add(sock.getpeername())
        sock.sendall(http_reply(completion("ok")))

    with hostile_server(behave) as url, closing(ChatClient(url, "m")) as client:
        ask_all(client, [ASK] * 20, range(20), threads=2)
    assert len(peers) <= 2


def quotes(key: str) -> dict[str, str]:
    """Write a key in the forms in which servers quote it."""
    in_base64 = (base64.b64encode(text.encode()).decode() for text in (key, f"Bearer {key}", f"x{key}y"))
    return {
        "as it is": key, "upper": key.upper(), "lower": key.lower(), "%": quote(key, safe=""),
        "hex": key.encode().hex(), "all %": "".join(f"%{ord(ch):02X}" for ch in key),
        "entities": "".join(f"&#{ord(ch)};" for ch in key),
        "hex entities": "".join(f"&#x{ord(ch):x};" for ch in key), "named": html.escape(key),
        "JSON": json.dumps(key)[1:-1].replace("/", "\\/"), "JSON u": "".join(f"\\u{ord(ch):04x}" for ch in key),
        "wrapped": f"{key[:9]}\n{key[9:]}", **dict(zip(("base64", "Bearer", "within"), in_base64, strict=True)),
    }  # fmt: skip


@pytest.mark.parametrize("secret", ['sk-Very/s&cret"0123+456789', "query+S3cret/value"])
@pytest.mark.parametrize("form", quotes(""))
def test_a_secret_is_blotted_out_in_any_form(monkeypatch, tmp_path, form, secret):
    """Guards: a server that quotes the key, or its own address, in another spelling prints it, or half of it."""
    monkeypatch.setenv("RLPA_TEST_KEY", secret)
    quoted = quotes(secret)[form]
    error, target = json.dumps({"error": "p" * 285 + quoted}).encode(), quote(quoted.replace("\n", ""), safe="%&#;\\")
    page, good = http_reply(b"p" * 60 + quoted.encode()), http_reply(completion(f"Hi {quoted}"))
    behave = scripted(good, http_reply(error, "401 No"), page, http_reply(b"", "302 Go", f"Location: /{target}"))
    with hostile_server(behave) as url, closing(Tape(tmp_path / "tape", recording=True)) as tape:
        url, key = (url, "RLPA_TEST_KEY") if "&" in secret else (f"{url}?x=1&code={quote(secret, safe='')}", None)
        with closing(ChatClient(url, "m", key, tape=tape, max_retries=0)) as client:
            told = "\n".join([str(client.ask(ASK, seed)) for seed in range(4)] + [(tmp_path / "tape").read_text()])
    assert told.count("***") == 8, told
    inner = quoted.replace("\n", "")[4:-4].lower()  # base64 shares its ends with what stands beside it
    assert not any(inner[i : i + 9] in told.lower() for i in range(len(inner) - 8)), told


@pytest.mark.parametrize("charset", ["ISO-8859-1", '"windows-1252"', "utf-8", ""])
def test_a_reply_is_read_in_the_charset_it_declares(charset):
    """Guards: a lost reply, or broken letters, of a server that writes Latin-1 and says so."""
    body = completion("X").replace(b"X", "Zürich".encode(charset.strip('"') or "utf-8"))
    header = f"Content-Type: application/json; charset={charset}" if charset else "X-Charset: none"
    with hostile_server(scripted(http_reply(body, "200 OK", header))) as url, closing(ChatClient(url, "m")) as client:
        assert client.ask(ASK) == "Zürich"


def test_short_keys_are_words():
    """Guards: EMPTY, none or test, which local servers take for a key, vanish from what people say."""
    assert secret_pattern(["none", "EMPTY", "1234567", ""]).sub("***", "none empty 1234567") == "none empty 1234567"
    assert secret_pattern(["12345678"]).sub("***", "12345678") == "***"
    assert doctest.testmod(endpoint_secrets).failed == 0


def test_the_key_is_sent_and_never_shown(monkeypatch):
    """Guards: the key ends up in a log through the server's own words, a repr or a traceback."""
    key = "sk-very-secret-0123456789"
    monkeypatch.setenv("RLPA_TEST_KEY", key)
    echoes = [http_reply(json.dumps({"error": {"message": f"Incorrect API key: {key}"}}).encode(), "401 No"),
              http_reply(f"<html>{key}</html>".encode()), http_reply(completion({"key": key})),
              http_reply(b'{"error": "' + key.replace("-", "\\u002d").encode() + b'"}', "400 No"),
              b"HTTP/1.1 " + b"x" * 28 + key.encode() + b"\r\n\r\n",  # in the middle of what is shortened
              http_reply(b"y" * 290 + key.encode(), "400 No"),
              http_reply(completion(f"my key is {key}"))]
    unwanted = b'{"error": "temperature is not supported; ' + key.replace("-", "\\u002d").encode() + b'"}'
    behave = scripted(http_reply(unwanted, "400 No"), http_reply(completion("ok")), *echoes)
    told: list[str] = []
    with hostile_server(behave) as url:
        limits = {"max_retries": 0, "notify": told.append}
        with closing(ChatClient(url, "m", api_key_env="RLPA_TEST_KEY", **limits)) as client:
            assert reply_of(client, ASK) == "ok" and "temperature" in told[0]
            shown = [*told, repr(client), str(client.counts)]
            for _ in echoes[:-1]:
                with pytest.raises(ChatError) as caught:
                    reply_of(client, ASK)
                shown += [str(caught.value), repr(caught.value), "".join(traceback.format_exception(caught.value))]
            shown.append(reply_of(client, ASK))
    assert all(headers["Authorization"] == f"Bearer {key}" for _, headers in behave.requests)
    assert key[:10] not in "\n".join(shown) and "***" in shown[-1]


def test_bad_keys_are_refused_without_showing_them(monkeypatch):
    """Guards: a variable that is not set sends no key and fails much later; a key with a line break forges a header."""
    monkeypatch.delenv("RLPA_TEST_KEY", raising=False)
    with pytest.raises(ValueError, match="RLPA_TEST_KEY is not set"):
        ChatClient("http://127.0.0.1:9", "m", api_key_env="RLPA_TEST_KEY")
    monkeypatch.setenv("RLPA_TEST_KEY", "sk-secret\r\nX-Evil: 1")
    with pytest.raises(ValueError, match="RLPA_TEST_KEY") as caught:
        ChatClient("http://127.0.0.1:9", "m", api_key_env="RLPA_TEST_KEY")
    assert "secret" not in str(caught.value)


def test_no_proxy_on_this_machine_and_no_netrc_anywhere(monkeypatch, tmp_path):
    """Guards: a company's HTTP_PROXY swallows requests to 127.0.0.1; requests replaces our key by a ~/.netrc entry."""
    (tmp_path / "netrc").write_text("default login ann password other\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    behave = scripted(http_reply(completion("ok")))
    with hostile_server(behave) as url:
        for proxy, base in (("http://127.0.0.1:9", url), (url, "http://hosted.invalid")):
            monkeypatch.setenv("http_proxy", proxy)
            with closing(ChatClient(base, "m")) as client:
                assert reply_of(client, ASK) == "ok"
    assert len(behave.requests) == 2 and all("Authorization" not in headers for _, headers in behave.requests)


def test_drip_through_a_proxy_is_cut_off(monkeypatch):
    """Guards: the deadline holds only for direct connections (a hosted endpoint is often behind a proxy)."""
    with hostile_server(lambda sock, *_: drip(b"HTTP/1.1 200 OK\r\nX: ")(sock)) as url:
        monkeypatch.setenv("http_proxy", url)
        with closing(ChatClient("http://hosted.invalid", "m", total_timeout=0.5)) as client:
            with pytest.raises(ChatError, match="timeout"):
                reply_of(client, ASK)


def test_close_ends_what_is_in_flight():
    """Guards: Ctrl-C waits for two minutes because the workers do."""
    with hostile_server(lambda sock, *_: time.sleep(60)) as url:
        client = ChatClient(url, "m")
        replies: list = []
        caller = threading.Thread(target=lambda: replies.extend(ask_all(client, [ASK] * 3, range(3))))
        caller.start()
        time.sleep(0.3)
        client.close()
        caller.join()
    assert [str(reply) for reply in replies] == ["connect: the client was closed"] * 3


def test_retries_leave_the_global_generator_alone():
    """Guards: a flaky network makes a seeded run irreproducible, because jitter draws from the global generator."""
    behave = scripted(http_reply(b"", "500 Oops"), http_reply(completion("ok")))
    with hostile_server(behave) as url, closing(ChatClient(url, "m")) as client:
        state = random.getstate()
        assert reply_of(client, ASK) == "ok" and random.getstate() == state


def test_programming_errors_escape():
    """Guards: a bug in the caller is counted as a flaky server."""
    with closing(ChatClient("http://127.0.0.1:9", "m")) as client:
        with pytest.raises(TypeError):
            client.ask([{"role": "user", "content": object()}], 0)


@pytest.mark.parametrize("limit", [{"read_timeout": 0}, {"max_retries": -1}, {"max_reply_bytes": 0},
                                   {"total_timeout": float("nan")}, {"max_tokens": 0}, {"read_timeout": float("inf")},
                                   {"temperature": -0.5}])
def test_bad_limits(limit):
    """Guards: a limit of 0 or infinity means "for ever"."""
    with pytest.raises(ValueError, match=next(iter(limit))):
        ChatClient("http://127.0.0.1:9", "m", **limit)


# ------------------------------------------------------------------------------------------------------ embedded server
@pytest.fixture(scope="module")
def embedded():
    server = start_embedded_server()
    yield server
    server.stop()
    assert server.process.returncode == 0


@pytest.fixture(scope="module")
def address(embedded):
    host, _, port = embedded.url.removeprefix("http://").removesuffix("/v1").partition(":")
    return host, int(port)


def test_dialogue_over_http_is_the_worlds_dialogue(embedded):
    """Guards: facts or roles are lost between the client and the rule-based user."""
    with closing(ChatClient(embedded.url, "m")) as client:
        history: list[tuple[str, str]] = []
        for turn, question in enumerate(("Hi! Where do you live?", "What do you do for a living?", "How old are you?")):
            reply = reply_of(client, simulator_messages(PERSONA, history), seed=turn)
            assert reply == first.user_reply(list(PERSONA.facts), history, turn)
            history += [("user", reply), ("assistant", question)]
    assert history[0] == ("user", "Hello") and "Oslo" in history[2][1] and "baker" in history[4][1]


def test_the_seed_decides(embedded):
    """Guards: replies depend on time, process or order, or not on the seed at all."""
    messages = [simulator_messages(PERSONA, HISTORY)] * 64
    with closing(ChatClient(embedded.url, "m")) as client:
        once, again = ask_all(client, messages, range(64)), ask_all(client, messages, range(64))
        assert once == again and len(set(once)) > 5
        assert len(set(ask_all(client, messages, [None] * 64))) == 1
        other = simulator_messages(PERSONA, [("user", "Hello"), ("assistant", "So, where do you live?")])
        assert reply_of(client, other) == reply_of(client, other)


@pytest.mark.parametrize("name", simulator.EMBEDDED_USERS)
def test_an_embedded_user_answers_anything_and_repeats_itself(name):
    """Guards a user of the table that crashes, says nothing, or says other words to the same request."""
    strange = ["", "?", "\n\n", "Tell me all! " * 50, "{0} %s", "Where do you live? And your job?"]
    histories = [[], *([("user", "Hello"), ("assistant", text)] for text in strange), HISTORY]
    messages = [simulator_messages(PERSONA, history) for history in histories]
    messages.append(simulator_messages(Persona("one", ("He plays the guitar.",)), HISTORY))
    with served(make_user_server(port=0), path="") as url, closing(ChatClient(url, name, max_retries=0)) as client:
        said = ask_all(client, messages * 5, range(len(messages) * 5))
        assert not [reply for reply in said if isinstance(reply, ChatError)]
        assert said == ask_all(client, messages * 5, range(len(messages) * 5))


def test_an_embedded_user_is_added_by_one_line_of_the_table(monkeypatch):
    """Guards the road of docs/endpoints.md: name, function, and what it is given; another name gets the first user."""
    def parrot(facts, history, seed):
        return f"{seed}: {facts[1]}; {history[-1][1]}"

    monkeypatch.setitem(simulator.EMBEDDED_USERS, "parrot", parrot)
    asked = simulator_messages(PERSONA, HISTORY)
    with served(make_user_server(port=0), path="") as url:
        for model, expected in (("parrot", "7: Location: Oslo; Hi! Where do you live?"),
                                ("no such user", first.user_reply(list(PERSONA.facts), HISTORY, 7))):
            with closing(ChatClient(url, model)) as client:
                assert reply_of(client, asked, 7) == expected
            body = {"model": model, "messages": asked}
            answer = requests.post(f"{url}/v1/chat/completions", json=body).json()
            assert answer["model"] == (model if model == "parrot" else "rule-user")
        listed = requests.get(f"{url}/v1/models").json()["data"]
        assert [entry["id"] for entry in listed] == list(simulator.EMBEDDED_USERS)


def test_sixty_four_requests_at_once(address):
    """Guards: a request waits for another one to finish."""
    body = json.dumps({"messages": simulator_messages(PERSONA, HISTORY), "seed": 1}).encode()
    connections = [http.client.HTTPConnection(*address) for _ in range(64)]
    for connection in connections:  # all 64 are inside the server before the first may finish
        connection.putrequest("POST", "/v1/chat/completions")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body[:50])
    for connection in reversed(connections):
        connection.send(body[50:])
        response = connection.getresponse()
        assert response.status == 200 and "Oslo" in json.loads(response.read())["choices"][0]["message"]["content"]
        connection.close()


def test_the_listen_backlog_takes_sixty_four_connections():
    """Guards: of simultaneous connections all but the first 5 (http.server's backlog) wait for a second SYN."""
    with closing(make_user_server(port=0).socket) as listening:  # nobody accepts, so a full backlog stays full
        connections = [socket.create_connection(listening.getsockname()) for _ in range(64)]
    for connection in connections:
        connection.close()


def test_ctrl_c_is_for_the_trainer_alone(embedded):
    """Guards: Ctrl-C in the terminal kills the server that the trainer still talks to."""
    assert os.getpgid(embedded.process.pid) != os.getpgid(0)


def test_official_openai_client(embedded):
    """Guards: a reply that our own client takes but the official one does not."""
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=embedded.url, api_key="unused", max_retries=0) as client:
        model = client.models.list().data[0].id
        messages = simulator_messages(PERSONA, HISTORY)
        reply = client.chat.completions.create(model=model, messages=messages, seed=3, temperature=1.0, max_tokens=50)
        text = first.user_reply(list(PERSONA.facts), HISTORY, 3)
        assert reply.choices[0].message.content == text and reply.choices[0].finish_reason == "stop"
        assert reply.usage.completion_tokens == len(text.split())
        with pytest.raises(openai.BadRequestError, match="stream"):
            client.chat.completions.create(model=model, messages=messages, stream=True)
        with pytest.raises(openai.UnprocessableEntityError, match="role prompt"):
            client.chat.completions.create(model=model, messages=ASK)


GOOD = json.dumps({"messages": simulator_messages(PERSONA, HISTORY), "seed": 1})
JSON_TYPE = {"Content-Type": "application/json"}
CHAT = "/v1/chat/completions"


def exchange(connection, method, path, body=None, headers=JSON_TYPE):
    connection.request(method, path, body, dict(headers))
    response = connection.getresponse()
    return response, response.read()


@pytest.mark.parametrize(
    "status, method, path, body, headers",
    [
        (400, "POST", CHAT, "{", JSON_TYPE),
        (400, "POST", CHAT, "", JSON_TYPE),
        (400, "POST", CHAT, b"\xff\xff", JSON_TYPE),
        (400, "POST", CHAT, "[" * 100_000, JSON_TYPE),
        (400, "POST", CHAT, GOOD[:-1] + ', "stream": true}', JSON_TYPE),
        (404, "POST", "/v1/completions", GOOD, JSON_TYPE),
        (404, "GET", "/", None, {}),
        (404, "GET", "/../../etc/passwd", None, {}),
        (405, "GET", CHAT, None, {}),
        (405, "PUT", CHAT, GOOD, JSON_TYPE),
        (405, "DELETE", CHAT, None, {}),
        (405, "OPTIONS", CHAT, None, {}),
        (405, "HEAD", CHAT, None, {}),
        (405, "POST", "/v1/models", "{}", JSON_TYPE),
        (415, "POST", CHAT, GOOD, {"Content-Type": "text/plain"}),
        (415, "POST", CHAT, GOOD, {}),
        (422, "POST", CHAT, "[]", JSON_TYPE),
        (422, "POST", CHAT, "{}", JSON_TYPE),
        (422, "POST", CHAT, '{"messages": []}', JSON_TYPE),
        (422, "POST", CHAT, '{"messages": {"role": "user"}}', JSON_TYPE),
        (422, "POST", CHAT, '{"messages": [1]}', JSON_TYPE),
        (422, "POST", CHAT, '{"messages": [{"role": "system"}]}', JSON_TYPE),
        (422, "POST", CHAT, '{"messages": [{"role": "system", "content": null}]}', JSON_TYPE),
        (422, "POST", CHAT, '{"messages": [{"role": ["system"], "content": "x"}]}', JSON_TYPE),
        (422, "POST", CHAT, json.dumps({"messages": ASK}), JSON_TYPE),
        (422, "POST", CHAT, GOOD.replace('"seed": 1', '"seed": "x"'), JSON_TYPE),
        (422, "POST", CHAT, GOOD.replace('"seed": 1', '"seed": true'), JSON_TYPE),
        (422, "POST", CHAT, GOOD[:-1] + ', "n": 4}', JSON_TYPE),
        (200, "POST", CHAT + "?api-version=1", GOOD, {"Content-Type": "application/json; charset=utf-8"}),
        (200, "POST", CHAT, GOOD.replace('"seed": 1', '"seed": null, "n": 1, "stream": false, "tools": []'), JSON_TYPE),
        (200, "GET", "/v1/models", None, {}),
        (200, "GET", "/health", None, {}),
    ],
)
def test_status_of_each_request_and_the_connection_lives_on(address, status, method, path, body, headers):
    """Guards: a traceback, a dropped connection or the wrong status; unread bytes of one request taken for the next."""
    with closing(http.client.HTTPConnection(*address)) as connection:
        response, reply = exchange(connection, method, path, body, headers)
        assert response.status == status and response.headers["Content-Type"] == "application/json"
        assert not response.will_close and (status != 405 or response.headers["Allow"] in {"GET", "POST"})
        if status != 200 and method != "HEAD":
            error = json.loads(reply)["error"]
            assert error["code"] == status and error["type"] == "invalid_request_error"
            assert error["message"] and "\n" not in error["message"] and len(error["message"]) < 400
        sock = connection.sock
        response, reply = exchange(connection, "POST", CHAT, GOOD)
        assert response.status == 200 and "Oslo" in reply.decode() and connection.sock is sock


@pytest.mark.parametrize(
    "status, raw",
    [
        (411, b"POST /v1/chat/completions HTTP/1.1\r\n\r\n"),
        (411, b"POST /v1/chat/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"),
        (400, b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: two\r\n\r\n{}"),
        (400, b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n{}"),
        (400, b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 99\r\n\r\n{}"),
        (413, b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n{}"),
        (413, b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 5000000\r\n\r\n" + b"x" * 5_000_000),
        (400, b"rubbish\r\n\r\n"),
        (400, b"GET / HTTP/x.y\r\n\r\n"),
        (414, b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n"),
        (431, b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n"),
        (431, b"GET / HTTP/1.1\r\nX: " + b"y" * 70_000 + b"\r\n\r\n"),
        (501, b"BREW /v1/chat/completions HTTP/1.1\r\n\r\n"),
        (505, b"GET / HTTP/3.0\r\n\r\n"),
        (400, b"\x16\x03\x01\x02\x00\x01\r\n\r\n"),  # a TLS client hello
    ],
)
def test_requests_that_are_not_quite_http(address, status, raw):
    """Guards: http.server's HTML errors, a reset that swallows the status, no status line for a seeming HTTP/0.9."""
    with closing(socket.create_connection(address)) as sock:
        sock.sendall(raw)
        sock.shutdown(socket.SHUT_WR)
        reply = b"".join(iter(lambda: sock.recv(65_536), b""))
    head, _, body = reply.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status) and b"Connection: close" in head
    assert json.loads(body)["error"]["code"] == status


@given(raw=st.binary(max_size=60) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(
        st.sampled_from(["messages", "role", "content", "seed", "n", "stream"]), inner, max_size=3),
).map(lambda value: json.dumps(value).encode()))
@settings(max_examples=300, deadline=None)
def test_any_request_body_is_answered_or_refused(raw):
    """Guards: a 500 from a body that nobody thought of."""
    try:
        simulator.complete(raw)
    except RequestError as error:
        assert error.status in {400, 422}


@contextmanager
def in_process(server):
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield http.client.HTTPConnection(*server.server_address)
    finally:
        server.shutdown()
        server.server_close()


def test_a_bug_behind_the_server_is_a_500(monkeypatch, capfd):
    """Guards: an exception in the world drops the connection, or shows the client a traceback."""
    monkeypatch.setitem(simulator.EMBEDDED_USERS, "rule-user", lambda *_: 1 / 0)
    with in_process(make_user_server(port=0)) as connection:
        response, reply = exchange(connection, "POST", CHAT, GOOD)
        assert response.status == 500 and json.loads(reply)["error"]["type"] == "server_error"
        assert b"Traceback" not in reply and "ZeroDivisionError" in capfd.readouterr().err
        assert exchange(connection, "GET", "/health")[0].status == 200


def test_a_body_that_never_comes_is_a_408(monkeypatch):
    """Guards: a client that stalls holds a thread for ever, or is dropped without a status."""
    monkeypatch.setattr(endpoint_server.Handler, "timeout", 0.2)
    server = make_user_server(port=0)
    with closing(http.client.HTTPConnection(*server.server_address)) as connection:
        connection.putrequest("POST", CHAT)
        connection.putheader("Content-Length", "10")
        connection.endheaders(b"{")
        with in_process(server):  # only now: a request that is there already is not late, however busy the machine
            assert connection.getresponse().status == 408


def test_a_body_that_drips_is_a_408(monkeypatch):
    """Guards a thread that is held for ever by one byte now and then: each byte would begin a time-out anew."""
    monkeypatch.setattr(endpoint_server.Handler, "timeout", 0.3)
    with in_process(make_user_server(port=0)) as connection:
        connection.putrequest("POST", CHAT)
        connection.putheader("Content-Length", "1000000")
        connection.endheaders()
        sent = 0
        while sent < 500 and not select.select([connection.sock], [], [], 0.02)[0]:
            connection.send(b"x")
            sent += 1
        assert 1 < sent < 500 and connection.getresponse().status == 408


def test_connections_beyond_the_bound_are_sent_away_and_places_come_back():
    """Guards a thread, and a body in memory, for everybody who opens a connection and says nothing."""
    server = make_user_server(port=0)
    server.places = threading.BoundedSemaphore(2)
    with in_process(server) as connection:
        open_ones = [http.client.HTTPConnection(*server.server_address, timeout=30) for _ in range(2)]
        for one in open_ones:
            assert exchange(one, "GET", "/health")[0].status == 200
        with suppress(ConnectionError):  # nothing was read of it, so that the reply may be lost
            assert exchange(connection, "GET", "/health")[0].status == 503
        connection.close()
        open_ones[0].close()
        assert server.places.acquire(timeout=30)  # free again
        server.places.release()
        assert exchange(connection, "GET", "/health")[0].status == 200


def test_the_key_is_checked_before_the_body_is_waited_for():
    """Guards 1 MiB of memory, and a wait, for each request of a client without a key."""
    with in_process(endpoint_server.make_server(port=0, answer=lambda raw: {}, key="right")) as connection:
        connection.putrequest("POST", CHAT)
        connection.putheader("Authorization", "Bearer wrong")
        connection.putheader("Content-Length", "1000000")  # and no byte of it
        connection.endheaders()
        assert connection.getresponse().status == 401


@pytest.mark.parametrize(("facts", "turns", "limit"), [(501, 1, "500"), (1, 501, "1000"), (1000, 3000, "1000")])
def test_more_facts_and_turns_than_a_server_has_time_for(facts, turns, limit):
    """Guards a request of 400 KB that costs 45 s of CPU: the work grows with facts x turns."""
    persona = Persona("x", tuple(f"Interests: thing {i}" for i in range(facts)))
    history = [line for i in range(turns) for line in (("user", f"I like thing {i}."), ("assistant", "And now?"))]
    with pytest.raises(RequestError, match=f"takes {limit}") as refusal:
        simulator.complete(json.dumps({"messages": simulator_messages(persona, history)}).encode())
    assert refusal.value.status == 422


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.1", "::", "::1", "example.com", ""])
def test_only_loopback(host):
    """Guards: a server without access control is open to the network."""
    with pytest.raises(ValueError, match="use --host 127.0.0.1"):
        make_user_server(host, 0)


@pytest.mark.parametrize("port", ["taken", "99999", "-1", "x"])
def test_bad_ports_are_one_line_errors(port, address):
    """Guards: a traceback for a port that is taken or out of range."""
    port = str(address[1]) if port == "taken" else port
    command = [sys.executable, ROOT / "simulator.py", f"--port={port}"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2 and "Traceback" not in run.stderr and run.stderr.splitlines()[-1].count("--port") == 1


def test_embedded_server_dies_with_its_parent():
    """Guards: a killed trainer leaves a server behind, for good."""
    code = """import simulator, time
server = simulator.start_embedded_server()
print(server.url, flush=True)
time.sleep(60)"""
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    url = parent.stdout.readline().strip()
    assert requests.get(url + "/models").status_code == 200
    parent.kill()
    parent.wait()
    parent.stdout.close()
    while True:
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", int(url.removesuffix("/v1").rpartition(":")[2]))):
                return
        time.sleep(0.05)


def test_embedded_server_that_cannot_start(monkeypatch, tmp_path):
    """Guards: the trainer waits for ever for a server that has crashed or says nothing."""
    monkeypatch.setattr(simulator, "__file__", str(tmp_path / "missing.py"))
    with pytest.raises(RuntimeError, match="did not start.*exit status 2"):
        start_embedded_server()
    (tmp_path / "missing.py").write_text("import time; time.sleep(60)")
    with pytest.raises(RuntimeError, match="did not start in 0.3 s"):
        start_embedded_server(timeout=0.3)


def test_stop_twice():
    """Guards: cleaning up after an error stops the server a second time and hides the first error."""
    server = start_embedded_server()
    server.stop()
    server.stop()
    assert server.process.returncode == 0


# ------------------------------------------------------------------------------------------------ a server of others
def make_checkpoint(folder: Path) -> None:
    """Save a random two-layer Qwen-2, which says at least four tokens, with a tokenizer and a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(["hello there, how are you?"], trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|im_end|>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(fast), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=4096, eos_token_id=0, pad_token_id=0))
    model.generation_config.min_new_tokens = 4  # a random model may well begin with <|im_end|>
    model.save_pretrained(folder)


@pytest.mark.slow
def test_our_client_talks_to_transformers_serve(tmp_path):
    """Guards: we understand only our own server."""
    for package in ("transformers", "fastapi", "uvicorn"):
        pytest.importorskip(package, reason=f"`transformers serve` needs {package} (transformers[serving])")
    make_checkpoint(tmp_path / "tiny")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [Path(sys.executable).with_name("transformers"), "serve", tmp_path / "tiny", "--host", "127.0.0.1",
               "--port", str(port), "--device", "cpu"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    log = (tmp_path / "log").open("w+")
    with subprocess.Popen(command, env=environment, stdout=log, stderr=log) as server:
        try:
            base = f"http://127.0.0.1:{port}"
            limits = {"max_tokens": 8, "total_timeout": 90.0, "max_retries": 60}
            with closing(ChatClient(base, str(tmp_path / "tiny"), **limits)) as client:
                replies = ask_all(client, [simulator_messages(PERSONA, HISTORY)] * 3, range(3))  # waits until it is up
                assert all(isinstance(reply, str) for reply in replies), (replies, (tmp_path / "log").read_text())
            with closing(ChatClient(base, str(tmp_path / "no-such-model"))) as client:
                with pytest.raises(ChatError) as caught:
                    reply_of(client, ASK)
                assert caught.value.reason in {"http_4xx", "http_5xx"} and len(str(caught.value)) > 40
        finally:
            server.kill()


def test_a_misspelt_embedded_user_is_refused():
    """Guards a run against another user than the one that was asked for: the server answers any name as the first."""
    with pytest.raises(ValueError, match="'rule-usr'; without --simulator-url it takes rule-user or rule-user-2"):
        with simulator.open_environment(Config(ckpt="x", simulator_model="rule-usr")):
            pass
