"""What no message, recording or dialogue may show: keys, in whatever form a server quotes them."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from urllib.parse import unquote, urlsplit

SHORTEST = 8  # characters; less is a word (none, test, EMPTY), which would be blotted out of what people say
_NAMED = {"&": "amp", "<": "lt", ">": "gt", '"': "quot", "'": "apos"}  # entities of HTML
_GAP = r"(?:\\[nr]|[\s\0])?"  # lines that are wrapped; UTF-16


def secret_pattern(secrets: Iterable[str]) -> re.Pattern[str]:
    r"""Match each secret in any case, %-escaped, in entities, in JSON's escapes, in base64 and in hexadecimal.

    >>> pattern = secret_pattern(["sk/Secret1", "none"])
    >>> pattern.sub("***", r"none SK\/SECRET1 sk%2Fsecret1 sk&#47;secret1 sk\u002fsecret1 QmVhcmVyIHNrL1NlY3JldDE=")
    'none *** *** *** *** QmVhcmVyIH***E='
    """
    forms = [form for secret in secrets if len(secret) >= SHORTEST for form in (secret, *_encoded(secret.encode()))]
    return re.compile("|".join(map(_spelled, forms)) or r"(?!)", re.IGNORECASE)


def url_secrets(urls: Iterable[str]) -> list[str]:
    """Return the values in the queries of addresses.

    >>> url_secrets(["https://h/v1?key=a%2Fb&token", "http://h/v1"])
    ['a/b', 'token']
    """
    parts = (part for url in urls for part in urlsplit(url).query.split("&") if part)
    return [unquote(part.partition("=")[2] or part) for part in parts]


def _encoded(raw: bytes) -> list[str]:
    """Return a secret in hexadecimal, and in base64 at any place of a longer text, but for characters it shares."""
    base64s = [base64.b64encode(b"\0" * n + raw).decode()[-(-n * 8 // 6) :] for n in range(3)]
    return [raw.hex(), *(text.rstrip("=")[:-1] if text.endswith("=") else text for text in base64s)]


def _spelled(text: str) -> str:
    """Return the pattern of a text, each of whose characters may be escaped in its own way."""
    return _GAP.join(map(_character, text))


def _character(ch: str) -> str:
    itself = {"+": "[+-]", "/": "[/_]"}.get(ch, re.escape(ch))  # base64 for addresses
    escaped = "".join(f"%(?:25){{0,3}}{byte:02x}" for byte in ch.encode("utf-8", "replace"))
    entity = rf"(?:&|\\{{1,4}}u0026)(?:#0{{0,5}}{ord(ch)}|#x0{{0,5}}{ord(ch):x}|{_NAMED.get(ch, '#')});"
    units = ch.encode("utf-16-be", "replace").hex()
    in_json = "".join(rf"\\{{1,4}}u{units[i : i + 4]}" for i in range(0, len(units), 4))
    return rf"\\{{0,4}}(?:{itself}|{escaped}|{entity}|{in_json})"  # bounded: linear time
