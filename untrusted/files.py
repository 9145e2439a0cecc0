"""Read JSON that somebody else may have written, within limits; what is amiss with it is a ValueError in one line.

    parse_json     bytes into a value: UTF-8, no NaN, no endless numbers, no deep nesting
    read_json      the same for a whole file
    check_value    does a value have the type, the limits and the shape that a type hint names?
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

from untrusted.plain_text import shorten

MAX_JSON_BYTES = 64 * 2**20  # of a file that is read at once
MAX_DEPTH = 64  # of lists and objects within each other
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # what a clone without Git-LFS holds in place of a large file
# A number of 40 digits or more is refused; transformers writes one of 31, "model_max_length" of 10^30.
_TOKENS = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]|(?<![\d.])\d{40,}')


def parse_json(raw: bytes, where: str) -> Any:
    """Return the JSON value in UTF-8 bytes; ValueError that begins with `where` for anything else.

    >>> parse_json(b'{"lr": [1, 2.5]}', "settings")
    {'lr': [1, 2.5]}
    """
    depth = 0
    for token in _TOKENS.findall(raw):  # a text is skipped as a whole: brackets and digits in it are free
        depth += (token in (b"[", b"{")) - (token in (b"]", b"}"))
        if depth > MAX_DEPTH or token[:1].isdigit():
            why = f"nested more than {MAX_DEPTH} deep" if depth > MAX_DEPTH else f"a number of {len(token)} digits"
            raise ValueError(f"{where} is refused: {why}")
    try:
        return json.loads(raw.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {shorten(str(error))}") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def read_json(path: str | Path, hint: Any = dict) -> Any:
    """Return the JSON value in a file if it fits a type hint; ValueError that begins with the path if it does not."""
    path = Path(path)
    value = parse_json(read_bytes(path), str(path))
    check_value(value, hint, str(path))
    return value


def read_bytes(path: Path, most: int = MAX_JSON_BYTES) -> bytes:
    """Return the bytes of a file; ValueError if it is none (a pipe, a device), cannot be read, or holds too many."""
    try:
        if not path.is_file():
            raise ValueError(f"{path} {'is not a plain file' if path.exists() else 'does not exist'}")
        with path.open("rb") as file:
            raw = file.read(most + 1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    if len(raw) > most:
        raise ValueError(f"{path} is longer than {most:,} bytes, the most that is read")
    refuse_pointer(path, raw)
    return raw


def refuse_pointer(path: Path, raw: bytes) -> None:
    """Raise ValueError if a file, which begins with these bytes, only names the content that Git-LFS keeps for it."""
    if raw.startswith(LFS_POINTER):
        raise ValueError(f"{path} is a Git-LFS pointer, not the file itself; run `git lfs pull` in {path.parent}")


def check_value(value: Any, hint: Any, where: str) -> None:
    """Raise ValueError that begins with `where` unless a value has the type, limits and shape that a hint names.

    >>> check_value({"a": [1, 2]}, dict[str, list[int]], "it")
    >>> check_value(3, Annotated[int, (0, 2)], "--seed")
    Traceback (most recent call last):
        ...
    ValueError: --seed is 3; it must lie in [0, 2]
    """
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind is Annotated:
        kind, (low, high) = inner
        check_value(value, kind, where)
        if not low <= value <= high:
            raise ValueError(f"{where} is {value}; it must lie in [{low:g}, {high:g}]")
    elif kind is Literal:
        if value not in inner:
            raise ValueError(f"{where} is {value!r}; it takes {' or '.join(map(str, inner))}")
    elif kind in (Union, UnionType):
        if not any(fits(value, one) for one in inner):
            raise ValueError(f"{where} is {shorten(repr(value))}; it takes {' or '.join(map(_name, inner))}")
    elif kind is not Any and not _is_a(value, kind):
        raise ValueError(f"{where} is {shorten(repr(value))}; it takes {_name(kind)}")
    elif inner and kind in (dict, list):
        for key, item in value.items() if kind is dict else enumerate(value):
            check_value(item, inner[-1], f"{where}, {shorten(str(key), 40)!r}" if kind is dict else f"{where}[{key}]")


def fits(value: Any, hint: Any) -> bool:
    """Say whether a value has the type, limits and shape that a hint names."""
    try:
        check_value(value, hint, "")
    except ValueError:
        return False
    return True


def _is_a(value: Any, kind: type | None) -> bool:
    if kind is float:  # NaN and infinity are never a setting or a figure
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is (NoneType if kind is None else kind)


def _name(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind))
