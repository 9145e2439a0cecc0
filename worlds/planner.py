"""The planner: which facts a simulated user may tell in its next message, whoever says them.

A plan follows from the facts, from those that have been told, and from what the assistant said last. `worlds/first.py`
says a plan by its phrases; of a language model `worlds/saying.py` asks that it says it. Pure functions of text.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

from worlds.ledger import History, allowance, asked_slots, content_words, split_fact

VOLUNTEER_PROB = 0.35  # how often a user who was not asked anything tells a fact of its own accord

# A sentence of prose is about the slots whose pattern it matches.
PROSE_TOPICS: dict[str, re.Pattern[str]] = {
    slot: re.compile(rf"\b(?:{pattern})\b", re.IGNORECASE)
    for slot, pattern in {
        "Age": r"\d+[- ]years?[- ]old|aged|in (?:his|her|their) \w+ies",
        "Gender": r"man|woman|male|female|boy|girl",
        "Interests": r"lov(?:es|ing)|enjoy\w*|likes?|play(?:s|ing)|collect\w*|hobb\w+|fan|passion\w*|interest\w*|avid",
        "Educational Background": r"stud(?:y|ies|ied|ying|ent)|degree|ph\.?d|college|university|school|major\w*",
        "Personality Traits": r"always|never|tends?|energetic|shy|calm|person|personality|known for|optimist\w*",
        "Occupation": r"works?|working|worked|job|career|retired|owns|runs|business|professional\w*|\w+(?:eer|ist)"
        r"|teacher|nurse|doctor|chef|coach|principal|librarian|designer|driver|officer|lawyer|writer",
        "Marital Status": r"married|single|divorced|widow\w*|engaged|partner|husband|wife|girlfriend|boyfriend",
        "Family Background": r"mother|father|parents?|child(?:ren)?|kids?|sons?|daughters?|brothers?|sisters?"
        r"|grand\w+|family|twins?",
        "Location": r"lives?|living|moved|city|town|countryside|apartment|house|farm",
        "Others": r"cats?|dogs?|pets?|allerg\w+|vegan|vegetarian|intolerant|owns|has",
    }.items()
}


class Plan(NamedTuple):
    """What a user's next message tells, and what to make of the assistant's reply where it tells nothing."""

    tell: list[int]  # facts, the most fitting first: not more than `allowance`
    changed: bool = False  # they replace what the user has said before
    silence: str = ""  # to a question: "told", "unknown", or "later" (over budget); to a reply heard before: "echo"


def plan_message(
    facts: Sequence[str], told: Collection[int], history: History, retracted: Collection[str], rng: random.Random
) -> Plan:
    """Choose what the user's next message tells.

    Args:
        facts: the persona.
        told: indices of the facts that the user has told.
        history: the dialogue so far.
        retracted: slots of which the user has told a value that is no fact any more; it says so before anything else.
        rng: decides what is left open, such as whether a user who was not asked tells something.

    >>> facts, asked = ["Age: 34"] * 9 + ["Location: Oslo"], [("user", "Hello"), ("assistant", "Where do you live?")]
    >>> plan_message(facts, [], asked, [], random.Random(0)).tell
    [9]
    >>> plan_message(facts, [9], asked, [], random.Random(0))
    Plan(tell=[], changed=False, silence='told')
    """
    replies = [text for who, text in history if who == "assistant"]
    reply, hidden = replies[-1] if replies else "", [i for i in range(len(facts)) if i not in told]
    wanted, silence = _wanted(facts, hidden, reply, rng)
    changed = replacing(facts, hidden, retracted)
    wanted = changed or wanted
    if reply and reply in replies[:-1] and not wanted:
        silence = "echo"
    budget = allowance(len(facts), len(told), sum(who == "user" for who, _ in history))
    if wanted and not budget and is_asked(facts, reply):
        silence = "later"
    return Plan(wanted[:budget], bool(changed), silence)


def _wanted(facts: Sequence[str], hidden: Sequence[int], reply: str, rng: random.Random) -> tuple[list[int], str]:
    """Return the hidden facts that fit a reply, most fitting first, and why there are none."""
    if is_asked(facts, reply):
        fitting = answers(facts, hidden, reply)
        return fitting, "" if fitting else "told" if has_answer(facts, reply) else "unknown"
    if hidden and rng.random() < VOLUNTEER_PROB:
        return [rng.choice(hidden)], ""
    return [], ""


def is_asked(facts: Sequence[str], reply: str) -> bool:
    """Tell whether a reply asks for facts: for a slot, or a persona of prose for anything."""
    return "?" in reply and bool(asked_slots(reply) or not any(split_fact(fact)[0] for fact in facts))


def has_answer(facts: Sequence[str], reply: str) -> bool:
    """Tell whether the persona has a fact, told or not, in a slot that a reply asks for."""
    slots = asked_slots(reply)
    return any(split_fact(fact)[0] in slots for fact in facts)


def answers(facts: Sequence[str], hidden: Sequence[int], reply: str) -> list[int]:
    """Return the hidden facts that answer a reply's questions, if it asks any; prose on the topic before other prose.

    >>> answers(["He has two cats.", "He works as a nurse.", "Age: 34"], [0, 1, 2], "What is your job?")
    [1, 0]
    """
    if not is_asked(facts, reply):
        return []
    slots = asked_slots(reply)
    fitting = [i for i in hidden if split_fact(facts[i])[0] in (*slots, None)]
    return sorted(fitting, key=lambda i: split_fact(facts[i])[0] is None and not _on_topic(facts[i], slots, reply))


def _on_topic(fact: str, slots: Sequence[str], question: str) -> bool:
    shared = content_words(fact) & content_words(question)
    return bool(shared) or any(PROSE_TOPICS[slot].search(fact) for slot in slots)


def replacing(facts: Sequence[str], hidden: Sequence[int], retracted: Collection[str]) -> list[int]:
    """Return the hidden facts that stand in the place of something that the user has told before."""
    return [i for i in hidden if split_fact(facts[i])[0] in retracted]
