"""The embedded world: the values of its people, and the user who plays them by rules.

Plain data and pure functions of text: no torch, no HTTP, no state. `simulator.py` serves `user_reply` over HTTP, and
the demonstrations of the tiny checkpoint are written with the same phrases. `worlds/ledger.py` decides which facts a
text gives away.

The user says what `worlds/planner.py` plans. It opens with "Hello" and answers what it is asked. It
discloses at most 15 % of its facts per turn, or one fact where that is less than one. It complains when it is asked
again, and it never says more than three sentences.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterable, Sequence
from functools import lru_cache

from worlds.ledger import (
    History,
    contains_phrase,
    disclosed,
    sentences,
    split_fact,
)
from worlds.planner import Plan, plan_message

SPLITS = ("train", "heldout", "unseen")

# slot → (values met in training, values met only in evaluation). No value is a word of another slot or of a phrase.
VALUES: dict[str, tuple[list[str], list[str]]] = {
    "Age": (
        [str(age) for age in range(18, 80) if age % 7 != 3],
        [str(age) for age in range(18, 80) if age % 7 == 3],
    ),
    "Gender": (["woman", "man", "nonbinary"], []),
    "Interests": (
        """hiking, chess, painting, surfing, yoga, pottery, knitting, karate, gardening, sailing, archery, origami,
        juggling, astronomy, fishing, climbing, skating, birdwatching, calligraphy, boxing, rowing, camping,
        salsa dancing, board games, jazz piano, film photography, trail running, crossword puzzles, video games,
        model trains, opera, folk songs, street food, poetry, darts, fencing""".replace("\n", " ").split(", "),
        "kayaking, embroidery, snowboarding, stand-up comedy, drone racing, beekeeping".split(", "),
    ),
    "Educational Background": (
        """biology, law, history, physics, economics, philosophy, chemistry, geography, music theory, statistics,
        linguistics, architecture, theology, medicine, graphic design, computer science, marine science, art history,
        political science, veterinary science, accounting, sociology, anthropology, geology""".replace("\n", " ").split(
            ", "
        ),
        "psychology, robotics, food science, journalism".split(", "),
    ),
    "Personality Traits": (
        """shy, patient, stubborn, cheerful, inquisitive, calm, ambitious, honest, impulsive, thoughtful, sarcastic,
        generous, anxious, practical, dreamy, organized, playful, reserved, loyal, outgoing, moody, fearless,
        modest, punctual, restless, gentle, witty, skeptical""".replace("\n", " ").split(", "),
        "optimistic, cautious, messy, perfectionist, talkative".split(", "),
    ),
    "Occupation": (
        """nurse, plumber, baker, pilot, dentist, carpenter, florist, librarian, firefighter, mechanic, tailor, waiter,
        translator, electrician, butcher, barber, cashier, optician, taxi driver, bus driver, school teacher,
        truck driver, tour guide, web developer, farm worker, bank clerk, sound engineer, hotel manager, radio host,
        paramedic, postman, welder, sculptor, referee, beautician, gardener""".replace("\n", " ").split(", "),
        "blacksmith, locksmith, ship captain, museum guard, pharmacist, train conductor".split(", "),
    ),
    "Marital Status": (
        "single, married, divorced, engaged, separated, newlywed, happily unattached, dating someone".split(", "),
        ["widowed", "recently remarried"],
    ),
    "Family Background": (
        [
            f"{n} {who}"
            for n in ("two", "three", "four", "five")
            for who in ("sisters", "brothers", "sons", "daughters")
            if (n, who) not in {("three", "sons"), ("five", "sisters"), ("four", "brothers")}
        ]
        + ["twin sister", "twin brother", "only child", "big family", "adopted son", "baby daughter"],
        ["three sons", "five sisters", "four brothers", "seven cousins"],
    ),
    "Location": (
        """Paris, London, Madrid, Oslo, Lisbon, Vienna, Prague, Dublin, Boston, Chicago, Denver, Seattle, Toronto, Lima,
        Cairo, Nairobi, Mumbai, Delhi, Tokyo, Kyoto, Seoul, Sydney, Berlin, Hamburg, Milan, Naples, Athens, Warsaw,
        Helsinki, Dallas, Austin, Portland, Geneva, Bogota, Havana, Manila, Hanoi, Zurich, New York, Cape Town,
        San Diego, Hong Kong""".replace("\n", " ").split(", "),
        "Copenhagen, Melbourne, Santiago, Budapest, Casablanca, Buenos Aires, Salt Lake City".split(", "),
    ),
    "Others": (
        """parrot, nut allergy, vegan diet, motorbike, stamp collection, guitar, bad knee, wheelchair, houseboat,
        pet snake, black cat, old dog, food blog, night shift, sweet tooth, vintage car, secret recipe, green tattoo,
        gluten allergy, rooftop garden, telescope, camper van, pet rabbit, coffee habit, golden retriever, red bicycle,
        lake house, hearing aid, accordion, ukulele""".replace("\n", " ").split(", "),
        "pet turtle, dairy allergy, wooden leg, blue scooter, vinyl collection".split(", "),
    ),
}
VALUES = {slot: tuple([" ".join(v.split()) for v in part] for part in parts) for slot, parts in VALUES.items()}

# What the user says to disclose a fact; {v} is the value as it stands, {a} the value with its article.
DISCLOSURES: dict[str, list[str]] = {
    "Age": ["I am {v} years old.", "I turned {v} this year.", "I'm {v}.", "{v}, if you must know."],
    "Gender": ["I am {a}.", "I'm {a}, by the way.", "I see myself as {a}."],
    "Interests": ["I enjoy {v}.", "I am into {v}.", "I spend my weekends on {v}.", "My hobby is {v}."],
    "Educational Background": [
        "I studied {v}.",
        "My degree is in {v}.",
        "I majored in {v}.",
        "I went to college for {v}.",
    ],
    "Personality Traits": ["People say I am {v}.", "I would call myself {v}.", "I am quite {v}.", "I tend to be {v}."],
    "Occupation": ["I work as {a}.", "I am {a} by trade.", "I earn my living as {a}.", "My job? I am {a}."],
    "Marital Status": ["I am {v}.", "I'm {v}, actually.", "As for romance, I am {v}."],
    "Family Background": ["I grew up with {f}.", "At home there is {f}.", "My folks? Just {f}."],
    "Location": ["I live in {v}.", "My home is in {v}.", "I am based in {v}.", "I moved to {v}."],
    "Others": ["I have {a}.", "By the way, I have {a}.", "You should know that I have {a}."],
}
LEADS = ["", "", "Well.", "Sure.", "Okay.", "Hm."]
FILLERS = ["Oh.", "Okay.", "I see.", "Hm.", "Right."]
REPEATED = ["I already told you that.", "You asked me that before.", "We talked about that already."]
ECHO = "You said that before."  # to a reply that is the same as an earlier one
COMPLAINTS = [*REPEATED, ECHO]
OPENER = "Hello"
CHANGED = "That has changed."  # before a fact that replaces what was said earlier
UNKNOWN = ["I would rather not say.", "I don't know."]
REMARKS = {"told": REPEATED, "unknown": UNKNOWN, "echo": [ECHO]}  # by the reason of a plan that tells nothing


def with_article(value: str) -> str:
    """Put the indefinite article before a value.

    >>> with_article("optician"), with_article("nurse"), with_article("nonbinary")
    ('an optician', 'a nurse', 'nonbinary')
    """
    if value == "nonbinary":
        return value
    return ("an " if value[0].lower() in "aeiou" and not value.startswith("uku") else "a ") + value


def family_phrase(value: str) -> str:
    """Put an article before a family that is not counted ("twin sister" → "a twin sister", "two sons" stays)."""
    return value if value.split()[0] in {"two", "three", "four", "five", "seven"} else with_article(value)


def fill(template: str, value: str) -> str:
    """Fill a phrase with a value: {v} as it stands, {a} with its article, {f} as a family.

    >>> fill("I work as {a}.", "optician")
    'I work as an optician.'
    """
    return template.format(v=value, a=with_article(value), f=family_phrase(value))


def say_fact(fact: str, rng: random.Random) -> str:
    """Say a fact in the first person, in one of several phrasings; in prose, "he" and "she" become "I".

    >>> say_fact("She enjoys hiking and has two cats.", random.Random(0))
    'I enjoy hiking and have two cats.'
    """
    slot, value = split_fact(fact)
    if slot is None:
        return first_person(value)
    return fill(rng.choice(DISCLOSURES[slot]), value)


def first_person(sentence: str) -> str:
    """Turn a sentence about him or her into one about me (as far as a few rules go).

    >>> first_person("He is a nurse and often works at night; his cat adores him.")
    'I am a nurse and often work at night; my cat adores me.'
    """
    turned = re.sub(r"\b(?:he|she)(?:'s| is)\b", "I am", sentence, flags=re.IGNORECASE)
    turned = re.sub(rf"\b(?:he|she)\b(?P<adverb>{_ADVERB}) (?P<verb>\w+)", _my_verb, turned, flags=re.IGNORECASE)
    turned = re.sub(rf"\band(?P<adverb>{_ADVERB}) (?P<verb>{'|'.join(_VERBS)})\b", _my_verb, turned)
    for theirs, mine in _PRONOUNS.items():
        turned = re.sub(rf"\b{theirs}\b", mine, turned, flags=re.IGNORECASE)
    return turned[:1].upper() + turned[1:]


_ADVERB = r"(?: (?:often|also|always|usually|frequently|regularly|sometimes|never|currently|recently|really))?"
_PRONOUNS = {"his": "my", "her": "my", "him": "me", "hers": "mine", "he": "I", "she": "I", "himself": "myself",
             "herself": "myself"}  # fmt: skip
_VERBS = {"has": "have", "is": "am", "does": "do", "was": "was", "loves": "love", "enjoys": "enjoy", "likes": "like",
          "lives": "live", "works": "work", "collects": "collect", "plays": "play", "volunteers": "volunteer",
          "owns": "own", "makes": "make", "knits": "knit"}  # fmt: skip


def _my_verb(match: re.Match[str]) -> str:
    """Put a verb of the third person into the first, with "I" for "he" or "she"."""
    verb = match["verb"]
    subject = "and" if match[0].startswith("and") else "I"
    if verb in _VERBS:
        plain = _VERBS[verb]
    elif verb.endswith(("ches", "shes", "sses", "xes")):
        plain = verb[:-2]
    else:
        plain = verb[:-1] if verb.endswith("s") and not verb.endswith("ss") else verb
    return f"{subject}{match['adverb']} {plain}"


def user_reply(facts: Sequence[str], history: History, seed: int) -> str:
    """Say what the simulated user says next, given its facts and the dialogue so far.

    The same arguments give the same reply. Never more than three sentences, and never more facts than `allowance`.

    >>> user_reply(["Age: 34", "Location: Oslo"], [], seed=0)
    'Hello'
    >>> told = [("user", "Hello"), ("assistant", "Hi! Where do you live?")]
    >>> "Oslo" in user_reply(["Age: 34"] * 9 + ["Location: Oslo"], told, seed=0)
    True
    """
    if not history:
        return OPENER
    rng = random.Random(f"{seed}|{len(history)}|{history[-1][1]}".encode("utf-8", "replace"))  # JSON allows surrogates
    texts = [text for who, text in history if who == "user"]
    plan = plan_message(facts, disclosed(facts, texts), history, retracted_slots(facts, texts), rng)
    return say_plan(facts, plan, rng)[0]


def say_plan(facts: Sequence[str], plan: Plan, rng: random.Random) -> tuple[str, list[int]]:
    """Say what is planned, in at most three sentences; returns the text and the facts that it tells, two at most.

    >>> say_plan(["Location: Oslo"], Plan([0]), random.Random(0))
    ('Sure. I moved to Oslo.', [0])
    """
    remark = rng.choice(REMARKS[plan.silence]) if plan.silence in REMARKS else ""
    spoken = [say_fact(facts[i], rng) for i in plan.tell]
    if not spoken:
        return remark or rng.choice(FILLERS), []
    parts = [CHANGED if plan.changed else rng.choice(LEADS), *spoken[:2]]
    if len(sentences(" ".join(parts))) > 3:  # some phrases are two sentences
        parts = parts[:2]
    return " ".join(part for part in parts if part), plan.tell[: len(parts) - 1]


def retracted_slots(facts: Sequence[str], user_texts: Iterable[str]) -> set[str]:
    """Return the slots of which the user has said a value of the world that none of its facts holds (any more).

    Such a user has changed since, and says so before anything else. Ages and genders do not change.

    >>> retracted_slots(["Location: Oslo", "Others: parrot"], ["I live in Paris.", "I have a parrot."])
    {'Location'}
    """
    said = {match[0].casefold() for text in user_texts for match in value_pattern().finditer(text)}
    gone = {value for value in said if not any(contains_phrase(fact, value) for fact in facts)}
    return {slot for slot, parts in VALUES.items() if any(value.casefold() in gone for part in parts for value in part)}


@lru_cache(maxsize=1)
def value_pattern() -> re.Pattern[str]:
    """Return one pattern that finds any value of the world in a text (ages and genders left out), longest first."""
    values = sorted(
        {v for slot, parts in VALUES.items() if slot not in {"Age", "Gender"} for part in parts for v in part},
        key=len,
        reverse=True,
    )
    return re.compile(r"\b(?:" + "|".join(map(re.escape, values)) + r")\b", re.IGNORECASE)


@lru_cache(maxsize=1)
def unseen_values() -> frozenset[str]:
    """Return the facts ("Slot: value") that no training persona has.

    >>> "Location: Budapest" in unseen_values(), "Location: Oslo" in unseen_values()
    (True, False)
    """
    return frozenset(f"{slot}: {value}" for slot, (_, unseen) in VALUES.items() for value in unseen)


def generate_personas(n: int, seed: int, split: str = "train") -> list[list[str]]:
    """Make `n` ten-slot personas (10 to 13 facts) of one of three splits that share no persona.

    "train" and "heldout" use the same values in other combinations. In "unseen" every persona has values that no
    training persona has: each value is such a one with probability 0.3, and at least one is.

    >>> generate_personas(1, seed=0)[0][:3]
    ['Age: 20', 'Gender: woman', 'Interests: rowing']
    >>> any(fact in unseen_values() for fact in generate_personas(1, seed=0, split="unseen")[0])
    True
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
    rng = random.Random(f"{split}|{seed}")
    personas: list[list[str]] = []
    while len(personas) < n:
        facts = _one_persona(rng, unseen_share=0.3 if split == "unseen" else 0.0)
        if split_of(facts) == split:
            personas.append(facts)
    return personas


def split_of(facts: Sequence[str]) -> str:
    """Tell which split a synthetic persona belongs to: its facts alone decide, so that no two splits can overlap."""
    if any(fact in unseen_values() for fact in facts):
        return "unseen"
    return "heldout" if zlib.crc32("\n".join(facts).encode()) % 10 == 0 else "train"


def _one_persona(rng: random.Random, unseen_share: float) -> list[str]:
    several = {"Interests": rng.choice((1, 2)), "Personality Traits": rng.choice((1, 2)), "Others": rng.choice((1, 2))}
    facts: list[str] = []
    for slot, (seen, unseen) in VALUES.items():
        pools = [unseen if unseen and rng.random() < unseen_share else seen for _ in range(several.get(slot, 1))]
        while len(picked := {rng.choice(pool): None for pool in pools}) < len(pools):
            continue  # two equal values were drawn: draw both again
        facts += [f"{slot}: {value}" for value in picked]
    return facts
