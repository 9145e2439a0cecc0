"""Turn prose personas, as in ALOE, into single facts, once, and store them as a persona file.

    python -m studies.split_facts IN.jsonl OUT.jsonl                    by rule (worlds/single_facts.py)
    python -m studies.split_facts IN.jsonl OUT.jsonl --url URL --model NAME     by an endpoint, and checked

A profile line can state one fact only, and "He plays the guitar, loves indie films and lives in Austin." is one fact to
the matcher. Facts with a slot ("Age: 34") are kept as they are. The output is read by --personas like any other file.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from command_line import exits
from command_line.exits import Parser
from endpoints.client import ChatClient
from records.checkpoints import write_text
from untrusted.plain_text import say
from worlds.ledger import content_words, split_fact
from worlds.personas import Persona, load_personas, usable_facts
from worlds.single_facts import single_facts

PROMPT = """Split this text about a person into single facts. Each line is one short sentence with one fact, in the
words of the text, that begins with He, She or They. Leave nothing out and add nothing. Answer with the lines alone.

Text: {text}"""
KEPT = 0.8  # share of the text's content words that an endpoint's facts must hold between them
Ask = Callable[[list[dict], int], str | Exception]


def split_persona(facts: Sequence[str], ask: Ask | None, counts: Counter) -> tuple[str, ...]:
    """Return a persona's single facts, and count how they were made."""
    prose = [fact for fact in facts if split_fact(fact)[0] is None]
    slots = [fact for fact in facts if split_fact(fact)[0] is not None]
    answer = ask([{"role": "user", "content": PROMPT.format(text=" ".join(prose))}], 0) if ask and prose else None
    lines = [line.strip(" -*•\t") for line in answer.splitlines()] if isinstance(answer, str) else []
    if faithful(lines, prose):
        counts["by the endpoint"] += 1
    else:
        counts["by rule"] += 1
        lines = [line for fact in prose for line in single_facts(fact)]
    return usable_facts([*slots, *lines])


def faithful(lines: Sequence[str], prose: Sequence[str]) -> bool:
    """Tell whether lines hold nearly all the content words of a text, and hardly any others.

    >>> faithful(["He plays chess.", "He lives in Rome."], ["He plays chess and lives in Rome."])
    True
    >>> faithful(["He plays chess.", "He hates Paris."], ["He plays chess and lives in Rome."])
    False
    """
    said, wanted = content_words("\n".join(lines)), content_words("\n".join(prose))
    return bool(wanted) and min(len(said & wanted) / len(wanted), len(said & wanted) / max(1, len(said))) >= KEPT


def run(argv: Sequence[str] | None) -> int:
    """Split the personas of a file as the command line says; returns the exit code."""
    parser = Parser("python -m studies.split_facts", __doc__)
    parser.add_argument("source", type=Path, help="persona file")
    parser.add_argument("target", type=Path, help="persona file to write")
    parser.add_argument("--url", default="", help="OpenAI-compatible endpoint that splits; empty: by rule")
    parser.add_argument("--model", default="splitter", help="model name to ask it for")
    parser.add_argument("--api-key-env", default="", help="environment variable that holds its key")
    options = parser.parse_args(argv)
    if options.target.exists():
        raise ValueError(f"{options.target} exists; it is not written over")
    key = options.api_key_env or None
    ask = ChatClient(options.url, options.model, key, temperature=0.01).ask if options.url else None
    counts, before = Counter(), load_personas(options.source)
    split = partial(split_persona, ask=ask, counts=counts)
    after = [Persona(persona.persona_id, split(persona.facts)) for persona in before]
    records = ({"id": persona.persona_id, "facts": persona.facts} for persona in after)
    write_text(options.target, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    n, m = (sum(len(persona.facts) for persona in people) for people in (before, after))
    how = ", ".join(f"{number} {way}" for way, number in sorted(counts.items()))
    say(f"{options.target}: {len(after)} personas ({how}), {n} facts before, {m} after")
    return os.EX_OK


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code (command_line/exits.py)."""
    return exits.run("studies.split_facts", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
