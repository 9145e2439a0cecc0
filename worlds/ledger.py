"""The ledger: what a fact is, and which facts and questions a text holds.

Pure functions of text, shared by both worlds, the rewards and the metrics. A persona is a list of facts such as
"Occupation: baker". A fact without a slot ("He plays the guitar.") is prose, as in the ALOE files.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache

SLOTS = (
    "Age", "Gender", "Interests", "Educational Background", "Personality Traits", "Occupation", "Marital Status",
    "Family Background", "Location", "Others",
)  # fmt: skip
DISCLOSURE_BUDGET = 0.15  # share of the persona's facts that may be disclosed per turn (RLPA, appendix C.4)
History = Sequence[tuple[str, str]]  # ("user" | "assistant", text), oldest first; "user" is the simulated human
Told = Sequence[Collection[str]]  # the facts that each of the user's messages tells, oldest first

# A question is about the slots whose pattern it matches.
QUESTION_PATTERNS: dict[str, re.Pattern[str]] = {
    slot: re.compile(rf"\b(?:{pattern})\b", re.IGNORECASE)
    for slot, pattern in {
        "Age": r"how old|your age|what age|birthday|year were you born",
        "Gender": r"gender|man or a woman|woman or a man|pronouns?|identify",
        "Interests": r"hobby|hobbies|interests?|interested in|free time|spare time|for fun|weekends?|like to do"
        r"|enjoy doing",
        "Educational Background": r"study|studied|degree|college|university|school|major|education|educated",
        "Personality Traits": r"personality|describe yourself|character|kind of person|temper|temperament",
        "Occupation": r"job|for a living|occupation|profession|career|work as|do you work|your work",
        "Marital Status": r"marital|partner|romance|love life|spouse|relationship|seeing anyone|husband|wife",
        "Family Background": r"family|siblings?|relatives|grow up with|grew up with|parents|folks|children|kids",
        "Location": r"live|located|based|city|hometown|your home|where are you|where do you come",
        "Others": r"anything else|something else|else about you|surprise me|special about you|more about you",
    }.items()
}

FUNCTION_WORDS = frozenset(
    """a an the and or but of to in on at for with as is are was were be been am i you he she it they we my your his
    her its their our me him them us this that these those has have had do does did not no so very who which what from
    by about also just into some than then there when will would can could should""".split()
)


@lru_cache(maxsize=1 << 14)  # each candidate of each turn is held against the same facts
def split_fact(fact: str) -> tuple[str | None, str]:
    """Split a fact into its slot (None for prose) and its value.

    >>> split_fact("Occupation: tour guide"), split_fact("He plays the guitar.")
    (('Occupation', 'tour guide'), (None, 'He plays the guitar.'))
    """
    slot, colon, value = fact.partition(":")
    for known in SLOTS:
        if colon and slot.strip().casefold() == known.casefold():
            return known, value.strip()
    return None, fact.strip()


def words(text: str) -> list[str]:
    """List the lower-case words of a text; hyphens and apostrophes stay inside words.

    >>> words("I'm a stand-up comic, aged 34.")
    ["i'm", 'a', 'stand-up', 'comic', 'aged', '34']
    """
    return re.findall(r"\w+(?:['’-]\w+)*", text.casefold())


def sentences(text: str) -> list[str]:
    """Split a text at sentence ends.

    >>> sentences("Nice. Where do you live?")
    ['Nice.', 'Where do you live?']
    """
    return [s.strip() for s in re.split(r"(?<=[.!?])\s+|\n+", text) if s.strip()]


def content_words(text: str) -> set[str]:
    """Return the words of a text that carry meaning, with a plural or verbal -s cut off.

    >>> sorted(content_words("She enjoys the long walks."))
    ['enjoy', 'long', 'walk']
    """
    found = (word for word in words(text) if word not in FUNCTION_WORDS)
    return {word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word for word in found}


def contains_phrase(text: str, phrase: str) -> bool:
    """Tell whether a text contains the phrase as whole words, whatever the case.

    >>> contains_phrase("Working in New York?", "new york"), contains_phrase("A lawyer.", "law")
    (True, False)
    """
    needle = words(phrase)
    return bool(needle) and f" {' '.join(needle)} " in f" {' '.join(words(text))} "


@lru_cache(maxsize=1 << 16)
def mentions(fact: str, text: str) -> bool:
    """Tell whether a text gives a fact away: a slot's value literally, prose by half of its content words.

    >>> mentions("Location: Oslo", "I moved to Oslo."), mentions("He plays the guitar.", "I play my guitar a lot.")
    (True, True)
    """
    slot, value = split_fact(fact)
    if slot and len(words(value)) <= 4:
        return contains_phrase(text, value)
    wanted = content_words(value)
    return bool(wanted) and len(wanted & content_words(text)) >= max(1, len(wanted) / 2)


def told_by(facts: Iterable[str], text: str) -> tuple[str, ...]:
    """Return those of the facts that a text gives away."""
    return tuple(fact for fact in facts if mentions(fact, text))


def on_ledger(facts: Sequence[str], told: Told) -> list[int]:
    """Keep the ledger: the indices of the facts that messages have told, in order of disclosure.

    A persona may have changed since; what is no fact of it any more is left out.

    >>> on_ledger(["Age: 34", "Location: Oslo"], [["Location: Oslo", "Others: parrot"], [], ["Age: 34"]])
    [1, 0]
    """
    ledger: list[int] = []
    for message in told:
        ledger += [i for i, fact in enumerate(facts) if i not in ledger and fact in message]
    return ledger


def disclosed(facts: Sequence[str], user_texts: Iterable[str]) -> list[int]:
    """Keep the ledger of messages by what they mention.

    >>> disclosed(["Age: 34", "Location: Oslo"], ["Hello", "I moved to Oslo.", "I'm 34."])
    [1, 0]
    """
    return on_ledger(facts, [told_by(facts, text) for text in user_texts])


def allowance(n_facts: int, n_disclosed: int, n_turns: int) -> int:
    """Return how many facts the user may disclose in its reply number `n_turns` (1 = the first after the opener).

    The budget is `DISCLOSURE_BUDGET` of the facts per turn. Where that is less than one fact (short personas), the
    share adds up over the turns until it pays for a whole one.

    >>> [allowance(12, 3, 4), allowance(14, 3, 4), allowance(5, 0, 1), allowance(5, 0, 2)]
    [1, 2, 0, 1]
    """
    share = DISCLOSURE_BUDGET * n_facts + 1e-9
    per_turn = int(share)
    return per_turn if per_turn >= 1 else max(0, min(1, int(share * n_turns) - n_disclosed))


def asked_slots(text: str) -> list[str]:
    """List the slots that the questions of a text are about, in slot order.

    >>> asked_slots("I live for jazz. Where do you live? And what do you do for a living?")
    ['Occupation', 'Location']
    """
    questions = " ".join(s for s in sentences(text) if s.endswith("?"))
    return [slot for slot, pattern in QUESTION_PATTERNS.items() if pattern.search(questions)]
