"""The second embedded world: another user and a stricter judge, to measure transfer. No training meets it.

The people, the questions that are understood, the ledger and the disclosure budget are those of the first world
(`worlds/first.py`, `worlds/ledger.py`). All else differs. The first user is terse and obliging. The second one is
chatty and impatient: it wraps facts in small talk and often hints at them. Now and then it answers a question one turn
late, or tells something that nobody asked for. It refuses once, and it complains about long and about repeated replies.
None of its phrases is used in training, and none of its judge's five rules is one of `rewards.py`.

`simulator.py` serves `user_reply` under the model name `rule-user-2`; the evaluation's `--world second` plays against
user and judge. The user never says more than three sentences, and never more facts than `allowance`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Sequence

from worlds.first import fill, first_person, retracted_slots, value_pattern
from worlds.ledger import (
    History,
    Told,
    allowance,
    asked_slots,
    contains_phrase,
    content_words,
    disclosed,
    mentions,
    on_ledger,
    sentences,
    split_fact,
    told_by,
    words,
)
from worlds.planner import answers, has_answer, is_asked, replacing

VOLUNTEER_PROB = 0.5  # it tells a fact though nobody asked for one
REFUSE_PROB, LATE_PROB, DEFLECT_PROB = 0.1, 0.15, 0.15  # when asked: it refuses (once), is late, tells another fact
PATIENCE = 40  # words; a longer reply is not read
MAX_SENTENCES, MAX_WORDS = 3, 35  # of a reply that the second judge calls natural

# ---------------------------------------------------------------------------------------------------------------------
# The second user

# What it says to disclose a fact, placeholders as in `fill`; each phrase is one sentence.
DISCLOSURES: dict[str, list[str]] = {
    "Age": [
        "My last birthday cake carried {v} candles.",
        "Nobody believes it at the door, but {v} it is.",
        "Count the rings and you get to {v}.",
    ],
    "Gender": [
        "Put {v} on the form and be done with it.",
        "My passport says {v}, if that settles it.",
        "Doctors tick the box marked {v}.",
    ],
    "Interests": [
        "Give me a free Sunday and it goes into {v}.",
        "Nothing beats a bit of {v}.",
        "Half my wages vanish into {v}.",
    ],
    "Educational Background": [
        "They made me cram {v} for years.",
        "A diploma in {v} hangs over the sofa.",
        "All those textbooks about {v} still gather dust here.",
    ],
    "Personality Traits": [
        "Friends roll their eyes at how {v} one can get.",
        "Ask my mother, she raised someone {v}.",
        "My ex had one word for me, and that was {v}.",
    ],
    "Occupation": [
        "The sign on the door reads {v}.",
        "Bills get paid because somebody here plays {v} all week.",
        "Each morning the alarm turns me back into {a}.",
    ],
    "Marital Status": [
        "My aunt keeps nagging, and the answer stays {v}.",
        "Love report, short version, still {v}.",
        "On that front the box to tick reads {v}.",
    ],
    "Family Background": [
        "You cannot hear yourself think around {f}.",
        "Picture Sunday dinner with {f} at one table.",
        "Blame {f} for my manners.",
    ],
    "Location": [
        "Rents in {v} are a joke, trust me.",
        "The view from this window is pure {v}.",
        "Come to {v} and the first drink is free.",
    ],
    "Others": [
        "Somewhere in this mess there is {a} with my name on it.",
        "Do not laugh, but {a} comes with the package.",
        "What nobody expects from me is {a}.",
    ],
}
OPENER = "Hey, anyone around?"
LEADS = ["", "Ooh, straight to the point!", "Phew, what an afternoon.", "Ha, funny, my neighbour wanted that too.",
         "Fine, since it will not leave you in peace."]  # fmt: skip
TAILS = ["", "But enough about that.", "Quick, next one.", "And keep that between the two of us, will you?"]
SMALL_TALK = ["The bus was late again and my tea went cold.", "This phone will not stop buzzing today.",
              "You should have seen the queue at the shop."]  # fmt: skip
NUDGES = ["Come on, ask something before I fall asleep.", "Tick tock, there are better things to do.",
          "So what is it that you want?"]  # fmt: skip
STALLS = ["Hang on, somebody is at the door.", "One moment, the kettle is whistling.",
          "Wait, let me finish this sandwich first."]  # fmt: skip
REFUSALS = ["Too early for that, try again later.", "Not so fast, we hardly met."]
REPEATED = ["Seriously, that again?", "Are you even listening?", "My answer is still the same as last time."]
ECHO = "You sound like a broken record."  # to a reply that is the same as an earlier one
TOO_LONG = "Too long, did not read."
COMPLAINTS = [*REPEATED, ECHO, TOO_LONG]
CHANGED = "Forget what you heard before, things moved on."  # before a fact that replaces what was said earlier
UNKNOWN = ["No comment.", "Pass on that one."]


def user_reply(facts: Sequence[str], history: History, seed: int) -> str:
    """Say what the second user says next, given its facts and the dialogue so far; arguments as in `worlds/first.py`.

    >>> user_reply(["Location: Oslo"] + ["Age: 34"] * 9, [("user", "Hello"), ("assistant", "Where do you live?")], 11)
    'Phew, what an afternoon. Come to Oslo and the first drink is free. But enough about that.'
    """
    if not history:
        return OPENER
    rng = random.Random(f"second|{seed}|{len(history)}|{history[-1][1]}".encode("utf-8", "replace"))
    texts = [text for who, text in history if who == "user"]
    told = disclosed(facts, texts)
    hidden = [i for i in range(len(facts)) if i not in told]
    wanted, remarks = _what_to_tell(facts, hidden, history, rng)
    changed = replacing(facts, hidden, retracted_slots(facts, texts))
    chosen = (changed or wanted)[: min(2, allowance(len(facts), len(told), len(texts)))]
    if not chosen:
        return pick(remarks or SMALL_TALK, facts, told, rng)
    spoken = [say_fact(facts, i, told, rng) for i in chosen]
    lead = CHANGED if changed else pick(LEADS, facts, told, rng)
    tail = pick(TAILS, facts, told, rng) if len(spoken) == 1 else ""
    whole = " ".join(part for part in (lead, *spoken, tail) if part)
    return whole if len(sentences(whole)) <= 3 else spoken[0]  # prose may be long by itself


def _what_to_tell(
    facts: Sequence[str], hidden: list[int], history: History, rng: random.Random
) -> tuple[list[int], list[str]]:
    """Choose the hidden facts to tell now, most pressing first, and what may be said where there is none to tell."""
    texts = [text for who, text in history if who == "user"]
    replies = [text for who, text in history if who == "assistant"]
    reply = replies[-1] if replies else ""
    if len(words(reply)) > PATIENCE:
        return [], [TOO_LONG]
    if reply and reply in replies[:-1]:
        return [], [ECHO]
    stalled = bool(texts) and texts[-1] in STALLS
    owed = answers(facts, hidden, replies[-2]) if stalled and len(replies) > 1 else []
    fitting = answers(facts, hidden, reply)
    if owed:
        return list(dict.fromkeys([*owed, *fitting])), []
    if not is_asked(facts, reply):
        return ([rng.choice(hidden)] if hidden and rng.random() < VOLUNTEER_PROB else []), NUDGES + SMALL_TALK
    if not fitting:
        return [], REPEATED if has_answer(facts, reply) else UNKNOWN
    mood = rng.random()
    if mood < REFUSE_PROB and not any(text in REFUSALS for text in texts):
        return [], REFUSALS
    if REFUSE_PROB <= mood < REFUSE_PROB + LATE_PROB and not stalled:
        return [], STALLS
    others = [i for i in hidden if i not in fitting]
    return ([rng.choice(others)] if others and mood > 1 - DEFLECT_PROB else fitting), []


def pick(phrases: Sequence[str], facts: Sequence[str], may_tell: Collection[int], rng: random.Random) -> str:
    """Choose a phrase that gives away no other facts than those: small talk must not disclose what its user hides.

    >>> pick(["The bus was late.", "My phone buzzes."], ["Others: bus"], may_tell=[], rng=random.Random(0))
    'My phone buzzes.'
    """
    safe = [phrase for phrase in phrases if set(disclosed(facts, [phrase])) <= set(may_tell)]
    return rng.choice(safe or list(phrases))


def say_fact(facts: Sequence[str], i: int, told: Sequence[int], rng: random.Random) -> str:
    """Say fact i, its value as it stands, in a phrase that gives away no other fact that is still hidden.

    >>> say_fact(["Occupation: nurse"], 0, [], random.Random(0))
    'Bills get paid because somebody here plays nurse all week.'
    """
    slot, value = split_fact(facts[i])
    if slot is None:
        return f"Between you and me: {first_person(value)}"
    return pick([fill(phrase, value) for phrase in DISCLOSURES[slot]], facts, [*told, i], rng)


# ---------------------------------------------------------------------------------------------------------------------
# The second judge


def rule_verdicts(
    response: str, history: History, facts: Sequence[str], told: Told | None = None
) -> dict[str, bool]:
    """Judge a reply to the last user message of `history` by five rules, stricter than those of `rewards.py`.

    told: the facts that each user message tells; None: those that it mentions.

    naturalness          1–3 sentences, at most 35 words, capitalised and ended, at most one question and one "!", and
                         its first two words are not those of the reply before
    relevance            its first sentence takes up a fact just disclosed, apologises if the user complains, or greets
                         if the user greets; a user who stalls or refuses is not asked for the same again; else it asks
    logical_consistency  claims no value of the world that the user has not said, and asks for nothing the user has told
    engagement           one question, about something open, not in words that it has used before, and not about what
                         either of its last two replies asked
    informativeness      its statements hold two content words that neither its earlier replies nor the message had

    >>> told = [("user", "Hello"), ("assistant", "Hi! Your job?"), ("user", "The sign on the door reads nurse.")]
    >>> reply = "Working as a nurse must be tough. Where do you live?"
    >>> all(rule_verdicts(reply, told, ["Occupation: nurse", "Location: Oslo"]).values())
    True
    >>> parrot = "The sign reads nurse. Where do you live?"
    >>> [name for name, ok in rule_verdicts(parrot, told, ["Occupation: nurse", "Location: Oslo"]).items() if not ok]
    ['informativeness']
    """
    user_texts = [text for who, text in history if who == "user"]
    replies = [text for who, text in history if who == "assistant"]
    told = [told_by(facts, text) for text in user_texts] if told is None else told
    ledger = on_ledger(facts, told)
    known = {split_fact(facts[i])[0] for i in ledger}
    open_slots = {split_fact(fact)[0] for i, fact in enumerate(facts) if i not in ledger}  # None: prose
    return {
        "naturalness": _is_natural(response, replies),
        "relevance": _is_relevant(response, user_texts, replies, [fact for fact in facts if fact in told[-1]]),
        "logical_consistency": _is_consistent(response, user_texts, known - open_slots),
        "engagement": _is_engaging(response, open_slots, replies),
        "informativeness": _is_informative(response, user_texts, replies),
    }


def _questions(text: str) -> list[str]:
    return [sentence.casefold() for sentence in sentences(text) if sentence.endswith("?")]


def _is_natural(response: str, replies: Sequence[str]) -> bool:
    said = words(response)
    short = 1 <= len(sentences(response)) <= MAX_SENTENCES and 1 <= len(said) <= MAX_WORDS
    shaped = response[:1].isupper() and response[-1:] in (".", "!", "?")
    calm = len(_questions(response)) <= 1 and response.count("!") <= 1
    return short and shaped and calm and not (replies and said[:2] == words(replies[-1])[:2])


def _is_relevant(response: str, user_texts: Sequence[str], replies: Sequence[str], news: Sequence[str]) -> bool:
    latest, first = user_texts[-1], (sentences(response) or [""])[0]
    if news:
        return any(mentions(fact, first) for fact in news)
    if any(remark in latest for remark in COMPLAINTS):
        return bool(re.search(r"\b(?:sorry|apolog\w+|my mistake|forgive)\b", first, re.IGNORECASE))
    if len(user_texts) == 1:
        return bool(re.search(r"\b(?:hello|hi|hey|welcome|nice to meet)\b", first, re.IGNORECASE))
    if latest in (*STALLS, *REFUSALS):
        return not set(asked_slots(response)) & set(asked_slots(replies[-1]))
    return bool(_questions(response))


def _is_consistent(response: str, user_texts: Sequence[str], all_told: Collection[str | None]) -> bool:
    heard = "\n".join(user_texts)
    claims = (match[0] for match in value_pattern().finditer(response))
    asked_in_vain = set(asked_slots(response)) & set(all_told)
    return not asked_in_vain and all(contains_phrase(heard, claim) for claim in claims)


def _is_engaging(response: str, open_slots: set[str | None], replies: Sequence[str]) -> bool:
    questions = _questions(response)
    if len(questions) != 1 or any(questions[0] in _questions(reply) for reply in replies):
        return False
    if open_slots <= {None}:  # all told, or prose: any question that is new
        return True
    asked = set(asked_slots(response))
    lately = {slot for reply in replies[-2:] for slot in asked_slots(reply)}
    return bool(asked) and asked <= open_slots and not asked & lately


def _is_informative(response: str, user_texts: Sequence[str], replies: Sequence[str]) -> bool:
    statements = " ".join(s for s in sentences(response) if not s.endswith("?"))
    return len(content_words(statements) - content_words(" ".join([user_texts[-1], *replies]))) >= 2
