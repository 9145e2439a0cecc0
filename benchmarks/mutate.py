"""Damage JSON, JSON lines and safetensors in the ways in which strangers, tools and disks damage them: for the fuzzers.

    mutate_json          one file of JSON, damaged in one of the KINDS
    mutate_lines         one line of a file of JSON lines
    mutate_safetensors   the header, its length or the bytes of a safetensors file
    mutate_gguf          a number or a text in the header of a GGUF file, or its bytes

All take bytes and give bytes; the same `random.Random` gives the same damage.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

HOLE = "\ue000HOLE\ue000"  # stands in the JSON where text comes that `json.dumps` does not write
OTHER_TYPES = (
    None, True, False, 0, 1, -1, 3.0, 0.5, "", "text", "1", [], {}, [1, 2], ["text"], {"a": 1}, [[0]], {"a": {"b": []}},
    "../x", "/dev/zero", "\x1b[2Jx\ny\u202e", "é" * 300, "\ud800",
)  # fmt: skip
NUMBERS = (
    "1" + "0" * 400, "-1" + "0" * 400, "1e999", "-1e999", "1e308", "1e-320", "10000000000000000000", "100000000000",
    "1000000000", "2147483648", "4294967296", "-9223372036854775809", "-1", "0", "-0.0", "0.1", "1E+2",
)  # fmt: skip
CONSTANTS = ("NaN", "Infinity", "-Infinity", "nan", "undefined")
NEW_KEYS = ("x", "", "__class__", "a\nb", "\x1b[31m", "k" * 1000)
DEEP = ("[" * 100_000, "[" * 50_000 + "]" * 50_000, '{"a":' * 50_000 + "1" + "}" * 50_000, "[" * 60 + "]" * 60)


def places(value: Any) -> list[tuple[Any, Any]]:
    """List every place in a JSON value as (object or list, key or index).

    >>> places({"a": [1]})
    [({'a': [1]}, 'a'), ([1], 0)]
    """
    found: list[tuple[Any, Any]] = []
    for key, item in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else []):
        found += [(value, key), *places(item)]
    return found


def replaced(raw: bytes, rng: random.Random, text: Callable[[str], str]) -> bytes:
    """Replace the value at one place by a text; text(the JSON of the value that is there) gives it."""
    value = json.loads(raw)
    found = places(value)
    if not found:
        return text(json.dumps(value)).encode("utf-8", "replace")
    parent, key = rng.choice(found)
    old, parent[key] = parent[key], HOLE
    return json.dumps(value).replace(json.dumps(HOLE), text(json.dumps(old))).encode("utf-8", "replace")


def change_type(raw: bytes, rng: random.Random) -> bytes:
    """Put another type in place of one value."""
    return replaced(raw, rng, lambda _: json.dumps(rng.choice(OTHER_TYPES)))


def change_number(raw: bytes, rng: random.Random) -> bytes:
    """Put a huge, negative, tiny or odd number in place of one value."""
    return replaced(raw, rng, lambda _: rng.choice(NUMBERS))


def not_a_number(raw: bytes, rng: random.Random) -> bytes:
    """Put NaN, an infinity or another word that is not JSON in place of one value."""
    return replaced(raw, rng, lambda _: rng.choice(CONSTANTS))


def nest(raw: bytes, rng: random.Random) -> bytes:
    """Put lists or objects in place of one value, too deep within each other, or nearly."""
    return replaced(raw, rng, lambda _: rng.choice(DEEP))


def repeat(raw: bytes, rng: random.Random) -> bytes:
    """Put a list of many copies in place of one value."""
    return replaced(raw, rng, lambda old: f"[{', '.join([old[:200] if old[:1] in '0123456789' else '0'] * 10_000)}]")


def drop_key(raw: bytes, rng: random.Random) -> bytes:
    """Leave out one key of an object or one item of a list."""
    value = json.loads(raw)
    if found := places(value):
        parent, key = rng.choice(found)
        del parent[key]
    return json.dumps(value).encode()


def double_key(raw: bytes, rng: random.Random) -> bytes:
    """Write one key of an object twice, the second time with another value."""
    value = json.loads(raw)
    if found := [(parent, key) for parent, key in places(value) if isinstance(parent, dict)]:
        parent, key = rng.choice(found)
        old, parent[key] = parent[key], HOLE
        twice = f"{json.dumps(old)}, {json.dumps(key)}: {json.dumps(rng.choice(OTHER_TYPES))}"
        return json.dumps(value).replace(json.dumps(HOLE), twice).encode()
    return raw + raw


def add_key(raw: bytes, rng: random.Random) -> bytes:
    """Add a key that nobody knows to one object."""
    value = json.loads(raw)
    objects = [value, *(parent[key] for parent, key in places(value))]
    if objects := [item for item in objects if isinstance(item, dict)]:
        rng.choice(objects)[rng.choice(NEW_KEYS)] = rng.choice(OTHER_TYPES)
    return json.dumps(value).encode("utf-8", "replace")


def rewrap(raw: bytes, rng: random.Random) -> bytes:
    """Put the whole in a list, in a text, or something else in its place."""
    text = raw.decode("utf-8", "replace")
    return rng.choice((f"[{text}]", json.dumps(text), "null", "[]", "{}", "0", "", " \n", f"{text}{text}")).encode()


def cut(raw: bytes, rng: random.Random) -> bytes:
    """Leave out the end, or the beginning."""
    at = rng.randrange(len(raw) + 1)
    return raw[:at] if rng.random() < 0.8 else raw[at:]


def flip(raw: bytes, rng: random.Random) -> bytes:
    """Change up to eight bytes anywhere."""
    changed = bytearray(raw)
    for _ in range(rng.randint(1, 8) if raw else 0):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def encode_otherwise(raw: bytes, rng: random.Random) -> bytes:
    """Write the text in another encoding, or put bytes before it."""
    text = raw.decode("utf-8", "replace")
    return rng.choice((b"\xef\xbb\xbf" + raw, text.encode("utf-16"), b"\x00" + raw, b"\x1f\x8b" + raw, raw + b"\xff"))


KINDS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "type": change_type, "number": change_number, "nan": not_a_number, "deep": nest, "repeat": repeat,
    "drop": drop_key, "double": double_key, "add": add_key, "rewrap": rewrap, "cut": cut, "flip": flip,
    "encoding": encode_otherwise,
}  # fmt: skip


def mutate_json(raw: bytes, rng: random.Random, kind: str | None = None) -> bytes:
    """Damage a whole file of JSON in one of the KINDS; None: in any, chosen by `rng`.

    >>> mutate_json(b'{"a": 1}', random.Random(0), "drop")
    b'{}'
    """
    return KINDS[kind or rng.choice(list(KINDS))](raw, rng)


def mutate_lines(raw: bytes, rng: random.Random, kind: str | None = None) -> bytes:
    """Damage one line of a file of JSON lines as `mutate_json` does; None: or leave out, double, join or swap lines."""
    lines = raw.splitlines(keepends=True)
    at, how = rng.randrange(len(lines)), rng.random() if kind is None else 0.0
    if how < 0.8:
        lines[at] = mutate_json(lines[at].rstrip(b"\r\n"), rng, kind) + b"\n"
    else:
        lines[at] = rng.choice((b"", lines[at] * 2, lines[at].rstrip(b"\n"), lines[rng.randrange(len(lines))], b"\n"))
    return b"".join(lines)


def mutate_safetensors(raw: bytes, rng: random.Random) -> bytes:
    """Damage a safetensors file: its header as `mutate_json` does, the header's length, or the file as a whole."""
    size = int.from_bytes(raw[:8], "little")
    header, data, how = raw[8 : 8 + size], raw[8 + size :], rng.random()
    if how < 0.7:
        header = mutate_json(header, rng)
        right = rng.random() < 0.9
        return (len(header) if right else size).to_bytes(8, "little") + header + data
    if how < 0.8:
        size = rng.choice((0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1, 100_000_000))
        return size.to_bytes(8, "little") + header + data
    return cut(raw, rng) if how < 0.9 else flip(raw, rng)


def mutate_gguf(raw: bytes, rng: random.Random) -> bytes:
    """Damage a GGUF file: put a number anywhere, change one of its words, or damage the file as a whole."""
    how, at = rng.random(), rng.choice([*range(4, 24, 4), rng.randrange(24, len(raw))])
    if how < 0.5:
        number = rng.choice((0, 1, 2, 7, 8, 9, 255, 2**16, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1))
        width = rng.choice((1, 4, 8))
        return raw[:at] + (number % 256**width).to_bytes(width, "little") + raw[at + width :]
    if how < 0.7:
        old = rng.choice([b"qwen2", b"gpt2", b"block_count", b"tokens", b"token_embd", b"blk.0.attn_q", b"output_norm"])
        return raw.replace(old, bytes(rng.randrange(256) for _ in old), rng.choice((1, -1)))
    return cut(raw, rng) if how < 0.85 else flip(raw, rng)
