"""The planned user: what may be told, how a language model is asked to say it, and what becomes of what it says."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import simulator
from config import Config
from dialogue import Candidate, Dialogue, Turn
from endpoints.wire import ChatError
from rewards import score_profile
from tiny.scripts import QUESTION_PHRASES
from worlds import first, saying
from worlds.ledger import allowance, asked_slots, disclosed, on_ledger, split_fact
from worlds.planner import plan_message

PROSE = ["He is a 34-year-old optician from Oslo.", "He plays the guitar in a band.", "His sister Maya has two cats.",
         "She enjoys long walks in the rain.", "He has a fear of heights."]  # fmt: skip
QUESTIONS = [phrase for phrases in QUESTION_PHRASES.values() for phrase in phrases]
REPLIES = [*QUESTIONS, "I see.", "How nice!", "And what else?", "Where do you live? What is your job?"]
CONFIG = Config(simulator_url="http://127.0.0.1:1", simulator_model="some-llm")


def obedient(messages: list[dict], seed: int) -> str:
    """Say the draft as it stands."""
    return re.search("The message: (.*)", messages[-1]["content"])[1]


def play(facts: list[str], ask: Callable, seed: int = 0, turns: int = 8, changes: dict | None = None) -> Dialogue:
    """Play a dialogue with a planned user whose endpoint is `ask`; the assistant says something of REPLIES."""
    rng, env = random.Random(seed), simulator.Environment(SimpleNamespace(ask=ask), None)
    dialogue = Dialogue(seed, "p", tuple(facts), [Turn("Hello", [])], changes=changes or {})
    for _ in range(turns):
        reply = Candidate(token_ids=[], logprobs=[], stop_reason="stop", response=rng.choice(REPLIES))
        dialogue.turns[-1].candidates = [reply]
        dialogue.persona_facts = dialogue.changes.get(len(dialogue.turns), dialogue.persona_facts)
        said = simulator.next_message(dialogue, (seed, "test"), CONFIG, env)
        env.counts.update(said.counts)
        dialogue.turns.append(Turn(str(said), [], told=said.told))
    dialogue.dropped = dict(env.counts)  # the tests look at them
    return dialogue


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_plan_keeps_the_budget_and_answers_what_was_asked(data):
    """Guards a user who tells what nobody asked, tells it twice, or gives away more than its share in a turn."""
    pool = first.generate_personas(4, data.draw(st.integers(0, 50)), "unseen") + [PROSE]
    facts = list(dict.fromkeys(data.draw(st.lists(st.sampled_from(sum(pool, [])), min_size=1, max_size=30))))
    told = data.draw(st.lists(st.integers(0, len(facts) - 1), unique=True))
    said = data.draw(st.lists(st.sampled_from(REPLIES), min_size=1, max_size=5))
    history = [pair for reply in said for pair in (("user", "Hm."), ("assistant", reply))]
    plan = plan_message(facts, told, history, (), random.Random(data.draw(st.integers(0, 9))))
    budget, slots = allowance(len(facts), len(told), len(said)), asked_slots(said[-1])
    assert len(plan.tell) <= budget and not set(plan.tell) & set(told) and len(set(plan.tell)) == len(plan.tell)
    asked_for = [i for i, fact in enumerate(facts) if i not in told and split_fact(fact)[0] in slots]
    if slots and budget:
        assert all(split_fact(facts[i])[0] in (*slots, None) for i in plan.tell)
        assert bool(plan.tell) >= bool(asked_for) and not (plan.tell and plan.silence)
    elif "?" not in said[-1]:
        assert len(plan.tell) <= 1  # volunteered


def test_prose_is_told_by_topic():
    """Guards a user of prose that answers each question with its next sentence, whatever was asked."""
    for question, sentence in (("Do you play in a band?", 1), ("Do you have any siblings?", 2), ("Your job?", 0)):
        history = [("user", "Hello"), ("assistant", "Hi!"), ("user", "Hm."), ("assistant", question)]
        assert plan_message(PROSE, [], history, (), random.Random(0)).tell == [sentence], question


def test_a_request_holds_the_planned_facts_and_no_others():
    """Guards a model that is shown the whole persona, and so tells it: it can only say what it was given."""
    requests = []

    def ask(messages: list[dict], seed: int) -> str:
        assert [message["role"] for message in messages] == ["user"]
        requests.append(messages[0]["content"])
        return obedient(messages, seed)

    for seed, facts in enumerate(first.generate_personas(20, 3, "unseen")):
        requests.clear()
        dialogue = play(facts, ask, seed)
        assert dialogue.dropped == {"user_messages_planned": 8, "user_messages_asked_again": 0}
        for content, turn in zip(requests, dialogue.turns[1:], strict=True):
            assert [fact for fact in facts if saying.states(fact, content)] == sorted(turn.told, key=facts.index)
            assert disclosed(facts, [turn.user_text]) == [facts.index(fact) for fact in turn.told]


JOB, CITY, SONS, SINGLE = "Occupation: nurse", "Location: Oslo", "Family Background: two sons", "Marital Status: single"
ASKED = "It is a rainy day today. What do you do for a living?"
GOOD = [
    ("I work as a nurse.", [JOB]), ("Nurse, mostly at night.", [JOB]), ("I'm one of the nurses at the clinic.", [JOB]),
    ("Well, it is Oslo for me.", [CITY]), ("I have 2 grown sons.", [SONS]), ("Two sons. I am single.", [SONS, SINGLE]),
    ("My job? I am a nurse.", [JOB]), ("Thirty-four.", ["Age: 34"]), ("I'm a 34-year-old.", ["Age: 34"]),
    ("34, if you must know.", ["Age: 34"]), ("I told you so already.", []), ("I see what you're saying.", []),
    ("Fair enough.", []),    ("I would rather keep that to myself.", []), ("I play my guitar in a band.", PROSE[1:2]),
]  # fmt: skip
BAD = [
    ("How can I help you today?", [], "role"), ("As an AI, I have no job.", [], "role"),
    ("I am a nurse. What can I do for you?", [JOB], "role"), ("I'm happy to assist you with that.", [], "role"),
    ("As a language model I work as a nurse.", [JOB], "role"), ("I am a nurse. And you?", [JOB], "role"),
    ("Sure! The rewritten message: I am a nurse.", [JOB], "role"), ("Your job as a nurse is hard.", [JOB], "role"),
    ("You see what I mean.", [], "role"), ("I know you are a nurse.", [JOB], "role"),
    ("It is a rainy day today.", [], "echo"),
    ("I'm in healthcare.", [JOB], "missing"), ("Yes.", [SINGLE], "missing"),
    ("I'm not single.", [SINGLE], "missing"), ("I have three sons.", [SONS], "missing"),
    ("I am a nurse in Oslo.", [JOB], "leak"), ("I have two sons and a job as a nurse.", [JOB], "leak"),
    ("Fair enough, I am single.", [], "leak"), ("My name is Sarah.", [], "claim"), ("I live in Paris.", [], "claim"),
    ("I am a nurse. " + "It is hard work and it takes all of my time. " * 3, [JOB], "long"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "tell", "fault"), [*((text, tell, "") for text, tell in GOOD), *BAD])
def test_replies_are_told_apart(text, tell, fault):
    """Guards a check that lets an assistant's phrase or a secret pass, or refuses what any person might write."""
    hidden = [fact for fact in (JOB, CITY, SONS, SINGLE, "Age: 34") if fact not in tell]
    assert saying.complaint(text, tell, ["Others: parrot"], hidden, ASKED) == fault


@pytest.mark.parametrize("facts", [first.generate_personas(1, 5)[0], PROSE])
def test_nonsense_is_asked_again_twice_and_then_said_by_rule(facts):
    """Guards a ledger that believes what was planned though nobody said it, and endless asking."""
    seeds = []
    dialogue = play(facts, lambda messages, seed: seeds.append(seed) or "How can I help you today?")
    assert len(set(seeds)) == len(seeds) == 8 * (1 + simulator.FURTHER_ASKS)
    assert dialogue.dropped == {"user_messages_planned": 8, "user_messages_by_rule": 8,
                                "user_messages_asked_again": 16, "user_messages_refused_role": 24}  # fmt: skip
    obeyed = play(facts, obedient)
    assert dialogue.told() == obeyed.told() and any(dialogue.told())
    for turn in dialogue.turns[1:]:
        assert disclosed(facts, [turn.user_text]) == [facts.index(fact) for fact in turn.told]


def test_an_endpoint_that_tells_too_much_discloses_nothing_too_early():
    """Guards a budget that a talkative model breaks, and a reward for facts that the ledger does not have."""
    for seed, facts in enumerate([*first.generate_personas(10, 8), PROSE]):
        everything = " ".join(first.say_fact(fact, random.Random(0)) for fact in facts)
        for words in (everything, *(f"{first.say_fact(fact, random.Random(0))} Nice." for fact in facts[:3])):
            dialogue = play(facts, lambda messages, seed, words=words: words, seed)
            for t in range(1, len(dialogue.turns)):
                before, after = (on_ledger(facts, dialogue.told()[:end]) for end in (t, t + 1))
                assert len(after) - len(before) <= allowance(len(facts), len(before), t)
                assert len(disclosed(facts, [turn.user_text for turn in dialogue.turns[: t + 1]])) == len(after)


def test_the_ledger_is_what_was_recorded():
    """Guards scores that are read off the words once more: a model says "2 grown sons" and the ledger has nothing."""
    facts = [SONS, *(f"Others: thing{i}" for i in range(9))]
    dialogue = Dialogue(0, "p", tuple(facts), [Turn("I have 2 grown sons.", [], told=(SONS,))])
    assert score_profile([SONS], facts, on_ledger(facts, dialogue.told())).n_recalled == 1
    dialogue.persona_facts = tuple(facts[1:])  # it has changed since
    assert on_ledger(dialogue.persona_facts, dialogue.told()) == []


def test_a_changed_person_says_so_first():
    """Guards a persona that changes in the middle of the dialogue and goes on as if nothing had been said."""
    before, after = [f"Location: {city}" for city in ("Oslo", "Lima")]
    rest = [f"Others: thing{i}" for i in range(9)]
    dialogue = play([before, *rest], obedient, turns=20, changes={10: (after, *rest)})
    if before in sum(dialogue.told()[:10], ()):
        assert dialogue.turns[10].told == (after,) and first.CHANGED in dialogue.turns[10].user_text


def test_a_failed_call_is_an_error_and_the_embedded_user_is_never_planned():
    """Guards a made-up reply in the place of a lost dialogue, and requests that the embedded server cannot read."""
    lost = ChatError("timeout", "away")
    env = simulator.Environment(SimpleNamespace(ask=lambda messages, seed: lost), None)
    dialogue = Dialogue(0, "p", tuple(PROSE), [])
    assert simulator.next_message(dialogue, (), CONFIG, env) is lost
    assert [simulator.is_planned(Config(simulator_model=name, user_mode=mode)) for name, mode in (
        ("rule-user", "auto"), ("some-llm", "auto"), ("some-llm", "plain"), ("rule-user", "planned"),
    )] == [False, True, False, True]  # fmt: skip
    with pytest.raises(ValueError, match="--user-mode planned needs --simulator-url"):
        with simulator.open_environment(Config(user_mode="planned")):
            pass


def test_many_messages_by_rule_are_told_of_once(capsys):
    """Guards a run whose user is the program's phrases and not the model that is paid for."""
    env = simulator.Environment(SimpleNamespace(ask=None), None)
    for ruled in (1, 30, 40):
        env.warn_of_rules(Counter(user_messages_planned=100, user_messages_by_rule=ruled, user_messages_refused_role=9))
    assert capsys.readouterr().err.count("messages of the user were said by rule") == 1
