"""Which personas an evaluation meets: the paper's settings, and what the embedded world makes of them.

    vanilla, efficiency   ten slots, as they stand in the file or are made by the world
    extended              free keys: half of the slots, the rest under Others
    conflict              what can change in a life changes in the middle of the dialogue, for user and ledger alike
    long                  vanilla, and many turns
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from dialogue import Dialogue
from worlds import first, ledger
from worlds.personas import Persona, load_personas

SCENARIOS = {
    "vanilla": "the personas as they are",
    "extended": "free keys: the embedded user knows ten slots, and all other keys go under Others",
    "conflict": "interests, traits, job, love, home and others change at --change-turn",
    "long": "70 turns; a dialogue that outgrows the model's positions ends early",
    "efficiency": "vanilla, drawn as tokens per turn against score",
}
CHANGEABLE = ("Interests", "Personality Traits", "Occupation", "Marital Status", "Location", "Others")


def choose_personas(path: str, split: str, number: int, scenario: str, embedded: bool, seed: int) -> list[Persona]:
    """Return the personas to meet.

    path: JSONL file; "" for synthetic ones of `split` ("heldout" or "unseen").
    number: the first so many; 0: the whole file, or 100 synthetic ones.
    embedded: the user is the embedded one, which knows no other keys than the ten slots.
    """
    if path:
        personas = load_personas(path)[: number or None]
    else:
        synthetic = first.generate_personas(number or 100, 0, split)  # of seed 0, as in the trainer's evaluation
        personas = [Persona(f"{split}-{i}", tuple(facts)) for i, facts in enumerate(synthetic)]
    if scenario == "conflict" and len(personas) < 2:
        raise ValueError("--scenario conflict needs two personas at least: each takes over the ways of the next one")
    if scenario != "extended" or (path and not embedded):  # a language model can play any key
        return personas
    if path:
        return [Persona(p.persona_id, tuple(dict.fromkeys(map(fit_slots, p.facts)))) for p in personas]
    return [Persona(p.persona_id, with_other_keys(p.facts, f"{seed}|{p.persona_id}")) for p in personas]


def fit_slots(fact: str) -> str:
    """Put a fact under a key that the embedded user knows; prose stays prose.

    >>> fit_slots("Pet: parrot"), fit_slots("Location: Oslo"), fit_slots("I ski.")
    ('Others: pet parrot', 'Location: Oslo', 'I ski.')
    """
    if ledger.split_fact(fact)[0] or ":" not in fact:
        return fact
    key, _, value = fact.partition(":")
    return f"Others: {key.strip().lower()} {value.strip()}"


def with_other_keys(facts: Sequence[str], seed: str) -> tuple[str, ...]:
    """Return a synthetic persona of as many facts that keeps half of them; what fills it up is under Others."""
    rng = random.Random(seed)
    kept = [facts[i] for i in sorted(rng.sample(range(len(facts)), len(facts) // 2))]
    pool = [fact for value in first.VALUES["Others"][0] if (fact := f"Others: {value}") not in kept]
    return (*kept, *rng.sample(pool, len(facts) - len(kept)))


def changed_facts(facts: Sequence[str], donor: Sequence[str]) -> tuple[str, ...]:
    """Return a persona after the change: another's values in all slots that can change; of prose, the second half.

    >>> changed_facts(["Age: 34", "Location: Oslo"], ["Age: 50", "Location: Lima"])
    ('Age: 34', 'Location: Lima')
    """
    slots = [ledger.split_fact(fact)[0] for fact in facts]
    can_change = set(slots) & set(CHANGEABLE)
    if not can_change:
        half = len(facts) // 2
        return (*facts[:half], *(fact for fact in donor[half:] if fact not in facts[:half]))
    fresh = [fact for fact in donor if ledger.split_fact(fact)[0] in can_change and fact not in facts]
    replaced = {ledger.split_fact(fact)[0] for fact in fresh}
    return (*(fact for fact, slot in zip(facts, slots, strict=True) if slot not in replaced), *fresh)


def make_dialogues(personas: Sequence[Persona], change_turn: int | None = None) -> list[Dialogue]:
    """Return a fresh dialogue per persona; with a change turn (from 1) each takes over the next one's ways there."""
    dialogues = [Dialogue(i, p.persona_id, p.facts) for i, p in enumerate(personas)]
    if change_turn:
        for dialogue, donor in zip(dialogues, [*personas[1:], personas[0]], strict=True):
            after = changed_facts(dialogue.persona_facts, donor.facts)
            dialogue.changes = {0: dialogue.persona_facts, change_turn - 1: after}  # the record shows both
    return dialogues
