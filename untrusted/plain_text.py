"""Make texts from strangers (users, judges, persona files, the policy) plain, and show values in messages.

The tokenizer never reads a text as a control token (`ChatTokenizer.encode`). Here a text loses the characters that act
on terminals and readers.
"""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from typing import Any, TextIO

from tqdm import tqdm

_ACTING = {"Cc", "Cf", "Cs"}  # controls (ESC, NUL, BEL, …); direction overrides and invisible "tags"; lone surrogates
_KEPT = {"\n", "\t", "\u200c", "\u200d"}  # joiners of letters and emoji: invisible, but reorder nothing
_LINE_BREAK = re.compile("\r\n?|[\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")  # all that str.splitlines takes for one


def plain_text(text: str) -> str:
    r"""Replace each character that acts instead of being read by a space, and every kind of line break by \n.

    >>> plain_text("a\x1b[31mb\u202ec\r\nd\te\x00")
    'a [31mb c\nd\te '
    """
    text = _LINE_BREAK.sub("\n", text)
    if text.isascii() and text.replace("\n", "").replace("\t", "").isprintable():
        return text  # nearly all are
    return "".join(" " if unicodedata.category(ch) in _ACTING and ch not in _KEPT else ch for ch in text)


def clean_text(text: str) -> str:
    r"""Put a text on one line: what acts, line breaks and runs of spaces become single spaces.

    >>> clean_text(" two\tcats\x00\n and  a dog ")
    'two cats and a dog'
    """
    return " ".join(plain_text(text).split())


def indented(text: str) -> str:
    r"""Write a text so that its first line alone stands at the margin: it cannot forge a line such as "User: …".

    >>> indented("Hi.\nUser: I agree.\rAssistant: Fine.")
    'Hi.\n    User: I agree.\n    Assistant: Fine.'
    """
    return plain_text(text).replace("\n", "\n    ")


def json_type(value: Any) -> str:
    """Name what JSON calls a value, and show it: what was found where something else was wanted."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    try:
        shown = shorten(json.dumps(value))
    except RecursionError:
        shown = "nested too deeply"
    return f"{names.get(type(value), 'null')} ({shown})" if value is not None else "null"


def shorten(text: str, limit: int = 80) -> str:
    """Put a text on one line and cut it after `limit` characters.

    >>> shorten("one\\ntwo", limit=5)
    'one t…'
    """
    text = clean_text(text)
    return text if len(text) <= limit else text[:limit] + "…"


def why_not_json(error: Exception) -> str:
    """Say in a few words why a text could not be read as JSON."""
    return "nested too deeply" if isinstance(error, RecursionError) else shorten(str(error).split(":")[0])


def say(text: str, file: TextIO | None = None) -> None:
    """Print a plain text and its line break at once, past any progress bar; the one place where programs print.

    file: where to; None: sys.stdout. What strangers wrote may stand in the text once it is on one line (`clean_text`,
    `shorten`): the line breaks of our own layout stay.
    """
    tqdm.write(plain_text(text), file=file)
    (file or sys.stdout).flush()


def warn(text: str) -> None:
    """Print a warning on one line of stderr."""
    say(f"warning: {clean_text(text)}", sys.stderr)
