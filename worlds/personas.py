"""Personas: the people that simulated users play, read from JSONL files.

In reading order: a file into JSON values, a value into a persona, prose into sentences.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from untrusted.plain_text import clean_text, json_type, shorten, why_not_json
from worlds.ledger import SLOTS, split_fact


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
                raise ValueError(f"{path}, line {number}: {shorten(line[at : at + 60])!r} is not JSON "
                                 f"({why_not_json(error)}); accepted: {ACCEPTED}") from None
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
        raise ValueError(f"{where}: no usable fact in {shorten(json.dumps(value))}; a fact needs a letter or a digit")
    return Persona(persona_id, facts)


def _parse_object(value: dict[str, Any], default_id: str, where: str) -> tuple[str, list[str]]:
    if unknown := sorted(set(value) - {"id", "facts", "slots"}):
        raise ValueError(f'{where}: unknown key {shorten(unknown[0])!r}; accepted keys: "id", "facts", "slots"')
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
        if slot not in SLOTS:
            raise ValueError(f"{where}: unknown slot {shorten(slot)!r}; accepted slots: {', '.join(SLOTS)}")
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
        if any(ch.isalnum() for ch in split_fact(fact)[1]):
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
