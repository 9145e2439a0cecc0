"""Personas: the people that simulated users play, read from JSON files.

In reading order: a file into JSON values, a value into a persona, prose into sentences.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from untrusted.files import read_bytes, without_twins
from untrusted.plain_text import clean_text, json_type, shorten, warn, why_not_json
from worlds.ledger import SLOTS, split_fact


@dataclass(frozen=True)
class Persona:
    """A person to be played: an id that is unique in its file, and one-line facts such as "Occupation: baker"."""

    persona_id: str
    facts: tuple[str, ...]


ACCEPTED = 'an object with "facts" (list of strings) or "slots" (the ten of the paper), or a string of prose'
MAX_FACTS = 500  # of a persona; the work of the embedded users grows with facts × messages
MAX_BYTES = 2**30  # of a persona file: about two million personas; it is read at once


def load_personas(path: str | Path, warn: Callable[[str], None] = warn) -> list[Persona]:
    """Read personas from a JSON or JSONL file, in file order.

    The file holds JSON values back to back (line 6 of ALOE's `profile.jsonl` holds two), on lines of their own or not,
    or one list of them. A value is {"facts": ["Age: 34", ...]} or {"slots": {"Age": 34, "Interests": ["chess"], ...}},
    either with an optional "id", or a bare string of prose, which is split into facts by sentence. A null is taken for
    absent.

    Raises ValueError, in one line with the path and the line number, for anything else. What is left out (facts that
    are empty, null or repeated) is counted in one warning.
    """
    personas, lines, left_out = [], {}, []
    for line, k, value in _json_values(_read_text(path), path):
        where, default_id = f"{path}, line {line}", f"{Path(path).stem}:{line}" + (f".{k}" if k > 1 else "")
        persona, texts = _parse_persona(value, default_id, where)
        if first := lines.get(persona.persona_id):
            raise ValueError(f'{where}: "id" {shorten(persona.persona_id)!r} is that of line {first} already; '
                             "ids must be unique")
        lines[persona.persona_id] = line
        personas.append(persona)
        left_out += [len(texts) - len(persona.facts)] if len(texts) > len(persona.facts) else []
    if not personas:
        raise ValueError(f"{path} holds no personas; each line must be {ACCEPTED}")
    if left_out:
        warn(f"{path}: {sum(left_out)} facts of {len(left_out)} personas are left out: empty, null or repeated")
    if twins := len(personas) - len({persona.facts for persona in personas}):
        warn(f"{path}: {twins} of {len(personas)} personas have the same facts as an earlier one")
    return personas


_FULL_STOPS = (".", "!", "?", "…", "。", "！", "？")
_BLANKS = re.compile(r"[ \t\r\n]*")
_LINE_END = re.compile(r"\r\n?|\n")  # no others: U+2028 is legal in a JSON string


def _json_values(text: str, path: str | Path) -> Iterator[tuple[int, int, Any]]:
    """Yield (line, k, value) for every JSON value: it begins on that line, as the k-th one."""
    decoder = json.JSONDecoder(object_pairs_hook=without_twins, parse_float=_parse_float)
    at, end = _BLANKS.match(text).end(), len(text.rstrip())
    in_list = text.startswith("[", at)  # [persona, persona, …]
    if in_list and not text.endswith("]", at + 1, end):
        raise ValueError(f"{path} begins with a list that its last character does not close; accepted: {ACCEPTED}")
    line, counted, k, at, end, value = 1, 0, 0, at + in_list, end - in_list, ""
    while (at := _BLANKS.match(text, at).end()) < end:
        ends = len(_LINE_END.findall(text, counted, at))
        line, counted, k = line + ends, at, 1 if ends else k + 1
        try:
            if text[at - 1 : at + 1] == '""' and not value.rstrip().endswith(_FULL_STOPS):  # ALOE's line 6 ends so
                raise ValueError('two strings side by side; is "" the quotation mark of a CSV? JSON writes \\" for it')
            value, at = decoder.raw_decode(text, at)
            at = _BLANKS.match(text, at).end()
            if in_list and not text.startswith("," if at < end else "]", at):
                raise ValueError("a comma of the list is missing")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {line}: {shorten(text[at : at + 60])!r} cannot be used as JSON "
                             f"({why_not_json(error)}); accepted: {ACCEPTED}") from None
        at += in_list
        yield line, k, value


def _parse_float(digits: str) -> int | float:
    """Read 34.0 as 34: tables that lack some numbers write all of them so."""
    value = float(digits)
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


_ARCHIVES = {b"PK\x03\x04": "a spreadsheet (.xlsx), or another zip archive", b"\x1f\x8b": "compressed by gzip"}
_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def _read_text(path: str | Path) -> str:
    raw = read_bytes(Path(path), MAX_BYTES)
    for mark, kind in _ARCHIVES.items():
        if raw.startswith(mark):
            raise ValueError(f"{path} is {kind}; export it as text: one JSON value per line, in UTF-8")
    encoding = next((name for mark, name in _MARKS.items() if raw.startswith(mark)), "utf-8")
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = len(re.findall(rb"\r\n?|\n", raw[: error.start])) + 1
        raise ValueError(f"{path}, line {line}: byte 0x{raw[error.start]:02x} is not {error.encoding.upper()}; "
                         "save the file as UTF-8 text, one JSON value per line") from None


def _parse_persona(value: Any, default_id: str, where: str) -> tuple[Persona, list[str | None]]:
    """Turn one JSON value into a persona and the facts it was given, or raise ValueError that begins with `where`."""
    if isinstance(value, str):
        persona_id, texts = default_id, split_sentences(clean_text(value))
    elif isinstance(value, dict):
        persona_id, texts = _parse_object(value, default_id, where)
    else:
        raise ValueError(f"{where}: found {json_type(value)}; accepted: {ACCEPTED}")
    facts = usable_facts(text for text in texts if text is not None)
    if not facts:
        raise ValueError(f"{where}: no usable fact in {shorten(json.dumps(value))}; a fact needs a letter or a digit")
    if len(facts) > MAX_FACTS:
        raise ValueError(f"{where}: {len(facts):,} facts; a persona may have {MAX_FACTS}")
    return Persona(persona_id, facts), texts


def _parse_object(value: dict[str, Any], default_id: str, where: str) -> tuple[str, list[str | None]]:
    if unknown := sorted(set(value) - {"id", "facts", "slots"}):
        raise ValueError(f'{where}: unknown key {shorten(unknown[0])!r}; accepted keys: "id", "facts", "slots"')
    value = {key: item for key, item in value.items() if item is not None}
    if ("facts" in value) == ("slots" in value):
        found = "both" if "facts" in value else "neither"
        raise ValueError(f'{where}: found {found} of "facts" and "slots"; accepted: one of them')
    persona_id = value.get("id", default_id)
    if type(persona_id) not in (str, int) or not clean_text(str(persona_id)):
        raise ValueError(f'{where}: "id" is {json_type(persona_id)}; accepted: a string or a whole number')
    texts = _list_facts(value["facts"], where) if "facts" in value else _slot_facts(value["slots"], where)
    return clean_text(str(persona_id)), texts


def _list_facts(facts: Any, where: str) -> list[str | None]:
    if not isinstance(facts, list):
        raise ValueError(f'{where}: "facts" is {json_type(facts)}; accepted: a list of strings')
    for i, fact in enumerate(facts):
        if not isinstance(fact, str | None):
            raise ValueError(f'{where}: "facts"[{i}] is {json_type(fact)}; accepted: a string')
    return facts


def _slot_facts(slots: Any, where: str) -> list[str | None]:
    """Render slots as "Slot: value" facts, one per element of a list value; None for a null."""
    if not isinstance(slots, dict):
        raise ValueError(f'{where}: "slots" is {json_type(slots)}; accepted: an object')
    facts: list[str | None] = []
    for slot, content in slots.items():
        if slot not in SLOTS:
            raise ValueError(f"{where}: unknown slot {shorten(slot)!r}; accepted slots: {', '.join(SLOTS)}")
        for element in content if isinstance(content, list) else [content]:
            if element is not None and type(element) not in (str, int):
                raise ValueError(f'{where}: slot "{slot}" holds {json_type(element)}; '
                                 "accepted: a string, a whole number or a list of them")
            facts.append(None if element is None else f"{slot}: {element}")
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
