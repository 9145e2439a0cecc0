"""A scripted assistant for the first embedded world: dialogues to fine-tune a checkpoint on before RL.

It is deliberately imperfect, and systematically so. A forgetful one drops earlier facts, guesses, repeats its question
or does not ask at all, and sometimes breaks the format. An attentive one does all this well. What RL is to teach is
therefore in the data, as a habit that is rarer than its opposite. A part of the personas have made-up words for values,
so that a model learns to copy what it reads rather than to recognise it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from dialogue import render_turn
from worlds.first import COMPLAINTS, VALUES, fill, generate_personas, user_reply
from worlds.ledger import SLOTS, asked_slots, disclosed, split_fact


@dataclass(frozen=True)
class Habits:
    """How the scripted assistant behaves: probabilities per turn."""

    keep_news: float = 0.45  # a fact told just now makes it into the profile
    keep_older: float = 0.15  # a fact told earlier does
    guess: float = 0.3  # a line that nothing supports is added
    corrupt: float = 0.04  # a line gets a wrong value
    acknowledge: float = 0.6  # it takes up what the user said
    hallucinate: float = 0.1  # it takes up what the user did not say
    comment: float = 0.65  # it adds a comment …
    new_comment: float = 0.75  # … that it has not made before
    ask_open: float = 0.2  # it asks about a slot that is still open (the next one round)
    ask_again: float = 0.12  # about a known one
    ask_any: float = 0.06  # about any; otherwise it does not ask
    break_format: float = 0.03  # it loses a tag


FORGETFUL = Habits()
ATTENTIVE = Habits(1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.8, 1.0, 0.6, 0.1, 0.1, 0.0)
MADE_UP = 0.4  # share of the warm-up personas whose values are made-up words

QUESTION_PHRASES: dict[str, list[str]] = {
    "Age": ["How old are you?", "May I ask your age?"],
    "Gender": ["What gender are you?", "How do you identify?"],
    "Interests": ["What are your hobbies?", "What do you do for fun?"],
    "Educational Background": ["What did you study?", "What is your degree in?"],
    "Personality Traits": ["How would you describe yourself?", "What kind of person are you?"],
    "Occupation": ["What do you do for a living?", "What is your job?"],
    "Marital Status": ["Are you in a relationship?", "How is your love life?"],
    "Family Background": ["Do you have any siblings?", "What about your family?"],
    "Location": ["Where do you live?", "Which city are you in?"],
    "Others": ["Is there anything else about you?", "Can you surprise me?"],
}
ACKNOWLEDGEMENTS: dict[str, list[str]] = {
    "Age": ["Being {v} sounds great.", "So you are {v}."],
    "Gender": ["Nice to meet {a}.", "So you are {a}."],
    "Interests": ["I like {v} too.", "So you enjoy {v}."],
    "Educational Background": ["Studying {v} is hard.", "So you know {v}."],
    "Personality Traits": ["It is good to be {v}.", "So you are {v}."],
    "Occupation": ["Working as {a} is tough.", "So you are {a}."],
    "Marital Status": ["Being {v} is fine.", "So you are {v}."],
    "Family Background": ["Growing up with {f} is fun.", "So there is {f}."],
    "Location": ["I hear {v} is lovely.", "So you are in {v}."],
    "Others": ["Having {a} is special.", "So you have {a}."],
}
COMMENTS = [
    "I will keep that in mind.",
    "That helps me a lot.",
    "Thank you for telling me.",
    "That says much about you.",
    "I am glad you said so.",
    "We have something to talk about.",
    "I can work with that.",
    "It makes me curious.",
    "Now I know you better.",
    "You have a story to tell.",
    "Let us take it slowly.",
    "There is no hurry at all.",
]
GREETINGS = ["Hello!", "Hi!", "Hello and welcome!", "Hi, nice to meet you!"]
APOLOGIES = ["Sorry about that.", "My mistake, sorry."]
BLANDS = ["I see.", "Great.", "Okay."]


def made_up_word(rng: random.Random) -> str:
    """Make a word that can be spoken but means nothing, so that only copying gets it right."""
    onset, nucleus, coda = (
        "b c d f g h k l m n p r s t v w st tr br gr pl".split(),
        "aeiou",
        ["", "n", "r", "l", "s", "m"],
    )
    return "".join(rng.choice(onset) + rng.choice(nucleus) + rng.choice(coda) for _ in range(rng.choice((2, 2, 3))))


def warmup_persona(rng: random.Random) -> list[str]:
    """Draw a training persona; sometimes its values are made-up words (ages: made-up numbers)."""
    facts = generate_personas(1, seed=rng.randrange(2**31))[0]
    if rng.random() >= MADE_UP:
        return facts
    slots = [split_fact(fact)[0] for fact in facts]
    return [
        f"{slot}: {rng.randrange(10, 100)}"
        if slot == "Age"
        else f"{slot}: {made_up_word(rng).capitalize() if slot == 'Location' else made_up_word(rng)}"
        for slot in slots
    ]


def scripted_profile(facts: list[str], history: list[tuple[str, str]], habits: Habits, rng: random.Random) -> list[str]:
    """Write profile lines in the order of disclosure; a forgetful assistant leaves some out and guesses others."""
    texts = [text for who, text in history if who == "user"]
    news = set(disclosed(facts, texts[-1:]))
    lines = [
        facts[i]
        for i in disclosed(facts, texts)
        if rng.random() < (habits.keep_news if i in news else habits.keep_older)
    ]
    lines = [random_fact(rng, split_fact(line)[0]) if rng.random() < habits.corrupt else line for line in lines]
    if rng.random() < habits.guess:
        lines.append(random_fact(rng))
    return lines


def random_fact(rng: random.Random, slot: str | None = None) -> str:
    """Invent a fact; most inventions are about gender and the other slots with few values."""
    slot = slot or rng.choice(("Gender", "Gender", "Marital Status", *SLOTS))
    return f"{slot}: {rng.choice(VALUES[slot][0])}"


def scripted_response(facts: list[str], history: list[tuple[str, str]], habits: Habits, rng: random.Random) -> str:
    """Write a reply in three parts, each of which is often wrong or absent: take up, comment, ask."""
    replies = [text for who, text in history if who == "assistant"]
    parts = [scripted_opening(facts, history, habits, rng)]
    if rng.random() < habits.comment:
        fresh = [c for c in COMMENTS if not any(c in reply for reply in replies)]
        used = [c for c in COMMENTS if c not in fresh]
        parts.append(rng.choice(fresh if rng.random() < habits.new_comment or not used else used))
    parts.append(scripted_question(facts, history, habits, rng))
    return " ".join(part for part in parts if part) or rng.choice(BLANDS)


def scripted_opening(facts: list[str], history: list[tuple[str, str]], habits: Habits, rng: random.Random) -> str:
    """Greet, apologise or take up what the user has just told, if the assistant is attentive at all."""
    texts = [text for who, text in history if who == "user"]
    news = disclosed(facts, texts[-1:])
    if rng.random() < habits.hallucinate:
        slot, value = split_fact(random_fact(rng))
        return fill(rng.choice(ACKNOWLEDGEMENTS[slot]), value)
    if rng.random() >= habits.acknowledge:
        return rng.choice(BLANDS)
    if news:
        slot, value = split_fact(facts[news[0]])
        return fill(rng.choice(ACKNOWLEDGEMENTS[slot]), value)
    if len(texts) == 1:
        return rng.choice(GREETINGS)
    complains = any(remark in texts[-1] for remark in COMPLAINTS)
    return rng.choice(APOLOGIES) if complains else rng.choice(BLANDS)


def scripted_question(facts: list[str], history: list[tuple[str, str]], habits: Habits, rng: random.Random) -> str:
    """Ask about an open slot (the next one round after the last question), about a known one, or not at all."""
    ledger = disclosed(facts, [text for who, text in history if who == "user"])
    known = {split_fact(facts[i])[0] for i in ledger}
    asked = [slot for who, text in history if who == "assistant" for slot in asked_slots(text)]
    weights = {"open": habits.ask_open, "again": habits.ask_again, "any": habits.ask_any}
    kind = rng.choices([*weights, "none"], weights=[*weights.values(), 1 - sum(weights.values())])[0]
    if kind == "none":
        return ""
    slot = rng.choice(SLOTS)
    if kind == "again" and (known or asked):
        slot = rng.choice(sorted(known | set(asked)))
    if kind == "open":
        at = SLOTS.index(asked[-1]) if asked else rng.randrange(len(SLOTS))
        round_trip = SLOTS[at + 1 :] + SLOTS[: at + 1]
        slot = next((s for s in round_trip if s not in known), slot)
    return rng.choice(QUESTION_PHRASES[slot])


def scripted_dialogue(rng: random.Random, n_turns: int, habits: Habits = FORGETFUL) -> list[tuple[str, str]]:
    """Play a whole dialogue; returns (user text, assistant text as the policy would have to write it) per turn."""
    facts, history, turns = warmup_persona(rng), [], []
    for _ in range(n_turns):
        user = user_reply(facts, history, seed=rng.randrange(2**31))
        history.append(("user", user))
        lines, response = scripted_profile(facts, history, habits, rng), scripted_response(facts, history, habits, rng)
        history.append(("assistant", response))
        text = render_turn(lines, response)
        if rng.random() < habits.break_format:
            text = text.replace(rng.choice(("</profile>\n\n", "<response>\n", "\n</response>", "<profile>\n")), "")
        turns.append((user, text))
    return turns
