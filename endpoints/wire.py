"""What goes over the wire: requests, replies and their errors in the OpenAI chat format.

In reading order: what a call returns, addresses, what the client reads of errors (`speech.py` reads replies), what the
server reads.
"""

from __future__ import annotations

import ipaddress
import json
import re
from contextlib import suppress
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

from untrusted.files import parse_json
from untrusted.plain_text import json_type, shorten

Message = dict[str, str]  # {"role": ..., "content": ...}, as in the OpenAI chat format
URL_FLAGS = {"simulator": "--simulator-url", "judge": "--judge-url"}  # by the name of the client


# The endpoint is alive and the request was sound, but nothing was said: content null, or blank; a refusal; a reply that
# broke off; thoughts alone. Another seed may help.
UNSAID = {"no_text", "empty", "refused", "broken_off", "only_thoughts"}


class ChatReply(str):
    """A reply's text that knows how many tokens the endpoint says it took; None if it does not say."""

    tokens: int | None = None  # of the reply, thoughts included
    prompt_tokens: int | None = None
    cut: bool = False  # it ended at max_tokens
    thoughts: bool = False  # its text held thoughts, which are cut away
    ran_on: bool = False  # its text went on behind a token that ends a turn; what stood there is cut away


class ChatError(Exception):
    """A chat call that failed; the message is one line, in which keys are blotted out.

    reason: connect, timeout, address, certificate, http_4xx, http_5xx, rate_limited, bad_json, bad_schema, too_large,
    outage; or one of UNSAID. Of a judge's answer without a verdict: no_verdict.
    retryable: whether another attempt may help. retry_after: the seconds that the server asked for, 0 if it did not.
    status: the HTTP status that is the cause, 0 if none is. words: what the server said with it.
    """

    def __init__(
        self, reason: str, message: str, retryable: bool = True, retry_after: float = 0.0, status: int = 0,
        words: str = "",
    ):  # fmt: skip
        super().__init__(f"{reason}: {message}")
        self.reason, self.retryable, self.retry_after = reason, retryable, retry_after
        self.status, self.words = status, words

    @property
    def message(self) -> str:
        """Return the text without the reason."""
        return str(self).removeprefix(f"{self.reason}: ")


class Call(NamedTuple):
    """What became of a call: a reply or the error that ended it, and why attempts failed, in their order."""

    reply: ChatReply | ChatError
    failed: tuple[str, ...] = ()


def completions_urls(base_urls: str, name: str = "") -> list[str]:
    """Return the addresses of the chat completions of base URLs with commas between them, each once."""
    urls = re.split(r",\s*(?=https?://|\Z)", base_urls, flags=re.IGNORECASE)  # a query may hold a comma
    return list(dict.fromkeys(completions_url(url, name) for url in urls))


def completions_url(base_url: str, name: str = "") -> str:
    """Return the address of the chat completions of a base URL as people paste it; `name`: whose, for errors.

    A complete address stays as it is. /v1 is added only where there is no path. A query stays, at the end.

    >>> completions_url("http://127.0.0.1:8100"), completions_url("https://host/api/v4/?api-version=1")
    ('http://127.0.0.1:8100/v1/chat/completions', 'https://host/api/v4/chat/completions?api-version=1')
    """
    base_url = base_url.strip()
    parts, why = _split_url(base_url)
    if why:
        whose = f"{URL_FLAGS.get(name, name)}: " if name else ""
        shown = "…" if "@" in base_url else shorten(re.split("[?#]", base_url)[0])  # no password, no key
        raise ValueError(f"{whose}base URL {shown!r} {why}; it must look like http://host:port or https://host/v1")
    path = parts.path.rstrip("/")
    if not path.endswith("/chat/completions"):
        path = f"{path or '/v1'}/chat/completions"
    return parts._replace(path=path).geturl()


def shown_url(url: str) -> str:
    """Return an address, or several, as messages and files may show it: without its query, which may hold a key.

    >>> shown_url("https://host/v1/chat/completions?key=s3cret,http://b/v1"), shown_url("http://h/v1?key=s3cret#model")
    ('https://host/v1/chat/completions?…,http://b/v1', 'http://h/v1?…#model')
    """
    return re.sub(r"(?s)\?.*?(?=,https?://|#|\Z)", "?…", url)


def _split_url(base_url: str) -> tuple[SplitResult, str]:
    """Return the parts of an address, and why it cannot be used (empty: it can)."""
    try:
        parts = urlsplit(base_url)
        host = parts.hostname if parts.port != 0 else None
    except ValueError:
        return SplitResult("", "", "", "", ""), "has a port that is no number, or a broken IPv6 address"
    reasons = {
        "holds a blank or a control character": not base_url.isprintable() or " " in base_url,
        "does not begin with http:// or https://": parts.scheme not in ("http", "https"),
        "holds a user name or password (put the key into an environment variable)": "@" in parts.netloc,
        "holds … in place of its query, as messages show it: put the query in": parts.query == "…",
        "holds a fragment (#…)": "#" in base_url,
        "names no host": not parts.hostname,
        "names the port 0": host is None,
        "holds a comma (each of several URLs begins with http:// or https://)": "," in parts.netloc + parts.path,
    }
    return parts, next((why for why, true in reasons.items() if true), "")


def is_loopback(host: str | None) -> bool:
    """Return whether a host is this machine: "localhost" or a loopback address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


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


def servers_words(said: Any) -> str:
    """Return what an error says, in one line: OpenAI's error.message, FastAPI's detail, or the body (bytes) itself."""
    if isinstance(said, bytes):
        words = said.decode(errors="replace")
        with suppress(ValueError):
            said = parse_json(said, "", any_number=True)
        said = words if isinstance(said, bytes) else said
    if isinstance(said, dict):
        said = said.get("error") or said.get("detail") or said.get("message") or said
    if isinstance(said, dict):
        said = said.get("message", said)
    return shorten(said if isinstance(said, str) else json.dumps(said), limit=300) or "(no explanation)"


class RequestError(Exception):
    """A request that the server refuses, with the HTTP status to send."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def parse_request(raw: bytes) -> dict[str, Any]:
    """Read the body of a chat completion request; RequestError unless its messages, seed, n and stream are sound.

    A content that is a list of text parts becomes one text.
    """
    try:
        request = parse_json(raw, "the body")
    except ValueError as error:
        raise RequestError(400, str(error)) from None
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
        if isinstance(message.get("content"), list):
            message["content"] = _joined_parts(message["content"], f"messages[{i}].content")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise RequestError(422, f"messages[{i}].{key} is {json_type(message.get(key))}, not a string")
    return request


def _joined_parts(parts: list[Any], where: str) -> str:
    """Join the text parts of a message by line breaks; RequestError for any other kind."""
    for i, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            found = f"of type {shorten(str(kind))!r}" if kind else json_type(part)
            raise RequestError(422, f'{where}[{i}] is {found}; only {{"type": "text", "text": …}} is taken here')
    return "\n".join(part["text"] for part in parts)
