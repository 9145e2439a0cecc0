"""Read JSON that somebody else may have written, within limits; what is amiss with it is a ValueError in one line.

    parse_json     bytes into a value: UTF-8, no NaN, no endless numbers, no deep nesting, no key twice
    read_json      the same for a whole file
    read_lines     the lines of a file one by one, none of them endless
    check_value    does a value have the type, the limits and the shape that a type hint names?
    from_json      a value as what a type hint names: an object as a dataclass, a list as a tuple
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, BinaryIO, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from untrusted.plain_text import shorten

MAX_JSON_BYTES = 64 * 2**20  # of a file that is read at once
MAX_DEPTH = 64  # of lists and objects within each other
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # what a clone without Git-LFS holds in place of a large file
MAX_DIGITS = 39  # of a whole number; transformers writes one of 31, "model_max_length" of 10^30
_NAMES = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false", dict: "an object",
          list: "a list", NoneType: "null"}  # fmt: skip
_TOKENS = re.compile(rb'(?s)"(?:[^"\\]|\\.)*+"?|[\[{]|[\]}]|(?<![\d.])\d{%d,}' % (MAX_DIGITS + 1))  # linear time


def parse_json(raw: bytes, where: str, any_number: bool = False) -> Any:
    """Return the JSON value in UTF-8 bytes; ValueError that begins with `where` for anything else.

    any_number: NaN, infinity, endless numbers and repeated keys are no reason to refuse the rest; the numbers become
    None, and the last of several values counts.

    >>> parse_json(b'{"lr": [1, 2.5]}', "settings"), parse_json(b"[NaN, 2]", "a reply", any_number=True)
    ({'lr': [1, 2.5]}, [None, 2])
    """
    depth = 0
    for token in _TOKENS.findall(raw):  # a text is skipped as a whole: brackets and digits in it are free
        depth += (token in (b"[", b"{")) - (token in (b"]", b"}"))
        endless = token[:1].isdigit() and not any_number
        if depth > MAX_DEPTH or endless:
            why = f"a number of {len(token)} digits" if endless else f"nested more than {MAX_DEPTH} deep"
            raise ValueError(f"{where} is refused: {why}")
    strict = {"parse_constant": _refuse_constant, "object_pairs_hook": without_twins}
    lenient = {"parse_constant": lambda name: None, "parse_int": _bounded}
    try:
        return json.loads(raw.decode("utf-8-sig"), **(lenient if any_number else strict))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8: byte 0x{raw[error.start]:02x} at {error.start}") from None
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {shorten(str(error))}") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its keys and values; ValueError for a repeated key, of which json would keep the last value."""
    if len(found := dict(pairs)) < len(pairs):
        keys = [key for key, _ in pairs]
        twin = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {shorten(twin, 40)!r} stands twice in one object")
    return found


def _bounded(digits: str) -> int | None:
    return int(digits) if len(digits.lstrip("-")) <= MAX_DIGITS else None


def read_json(path: str | Path, hint: Any = dict) -> Any:
    """Return the JSON value in a file if it fits a type hint; ValueError that begins with the path if it does not."""
    path = Path(path)
    value = parse_json(read_bytes(path), str(path))
    check_value(value, hint, str(path))
    return value


def read_bytes(path: Path, most: int = MAX_JSON_BYTES) -> bytes:
    """Return the bytes of a file; ValueError if it is none (a pipe, a device), cannot be read, or holds too many."""
    with open_plain(path) as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        raise ValueError(f"{path} is longer than {most:,} bytes, the most that is read")
    refuse_pointer(path, raw)
    return raw


def read_lines(path: Path, most: int = MAX_JSON_BYTES) -> Iterator[bytes]:
    """Yield the lines of a file, each with its line break; ValueError as `read_bytes`, and for a line above `most`."""
    with open_plain(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(most + 1), b""), start=1):
            if len(line) > most:
                raise ValueError(f"{path}, line {number} is longer than {most:,} bytes, the most that is read")
            yield line


def open_plain(path: Path) -> BinaryIO:
    """Open a file to read its bytes; ValueError, and no wait, for a pipe, a device, or what cannot be read."""
    try:
        if not path.is_file():
            raise ValueError(f"{path} {'is not a plain file' if path.exists() else 'does not exist'}")
        return path.open("rb")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def refuse_pointer(path: Path, raw: bytes) -> None:
    """Raise ValueError if a file, which begins with these bytes, only names the content that Git-LFS keeps for it."""
    if raw.startswith(LFS_POINTER):
        raise ValueError(f"{path} is a Git-LFS pointer, not the file itself; run `git lfs pull` in {path.parent}")


def check_value(value: Any, hint: Any, where: str) -> None:
    """Raise ValueError that begins with `where` unless a value has the type, limits and shape that a hint names.

    A dict of hints stands for an object with these keys and no others.

    >>> check_value({"a": [1, 2]}, dict[str, list[int]], "it")
    >>> check_value({"a": [1, 2]}, {"a": list[int]}, "it")
    >>> check_value(3, Annotated[int, (0, 2)], "--seed")
    Traceback (most recent call last):
        ...
    ValueError: --seed is 3; it must lie in [0, 2]
    """
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if isinstance(hint, dict):
        _check_keys(value, hint, set(hint), where)
        for key, item in value.items():
            check_value(item, hint[key], f"{where}, {key!r}")
    elif kind is Annotated:
        kind, (low, high) = inner
        check_value(value, kind, where)
        if not low <= value <= high:
            raise ValueError(f"{where} is {value}; it must lie in [{low:g}, {high:g}]")
    elif kind is Literal:
        if value not in inner:
            raise ValueError(f"{where} is {shorten(repr(value))}; it takes {' or '.join(map(str, inner))}")
    elif kind in (Union, UnionType):
        if not any(fits(value, one) for one in inner):
            raise ValueError(f"{where} is {shorten(repr(value))}; it takes {' or '.join(map(_name, inner))}")
    elif kind is not Any and not _is_a(value, kind):
        raise ValueError(f"{where} is {shorten(repr(value))}; it takes {_name(kind)}")
    elif inner and kind in (dict, list):
        items = value.values() if kind is dict else value
        if isinstance(inner[-1], type) and all(_is_a(item, inner[-1]) for item in items):
            return  # nearly always: lists of ids are long
        for key, item in value.items() if kind is dict else enumerate(value):
            check_value(item, inner[-1], f"{where}, {shorten(str(key), 40)!r}" if kind is dict else f"{where}[{key}]")


def _check_keys(value: Any, known: dict[str, Any], needed: set[str], where: str) -> None:
    """Raise ValueError unless a value is an object that has the needed keys and knows no others than `known`."""
    check_value(value, dict, where)
    if lacking := sorted(needed - value.keys()):
        raise ValueError(f"{where} lacks {lacking[0]!r}")
    if unknown := [key for key in value if key not in known]:
        raise ValueError(f"{where} has a key that is unknown here, {shorten(unknown[0], 40)!r}")


def from_json(value: Any, hint: Any, where: str) -> Any:
    """Return a JSON value as what a type hint names: an object as a dataclass, a list as a tuple.

    Raises ValueError that begins with `where` if it does not fit.

    >>> from_json({"2": ["a"]}, dict[int, tuple[str, ...]], "it")
    {2: ('a',)}
    """
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if is_dataclass(kind):
        hints = get_type_hints(kind, include_extras=True)
        needed = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
        _check_keys(value, hints, needed, where)
        return kind(**{key: from_json(item, hints[key], f"{where}, {key!r}") for key, item in value.items()})
    if kind is tuple or kind is list and is_dataclass(inner[0]):
        check_value(value, list, where)
        return kind(from_json(item, inner[0], f"{where}[{i}]") for i, item in enumerate(value))
    if kind is dict and inner[0] is int:
        check_value(value, dict, where)
        if odd := [key for key in value if not re.fullmatch("[0-9]{1,9}", key)]:
            raise ValueError(f"{where} has the key {shorten(odd[0], 40)!r}, which is not a whole number")
        return {int(key): from_json(item, inner[1], f"{where}, {key!r}") for key, item in value.items()}
    check_value(value, hint, where)
    return value


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
    kind = get_origin(kind) or kind
    return _NAMES.get(kind, str(kind))
