"""The second world: strange to every policy, exact in its ledger, and judged by rules of its own."""

from __future__ import annotations

import doctest
import json
import random
import re
import threading
from contextlib import closing

import pytest
from test_simulator import ask_all

import rewards
from command_line.flags import TINY_CHECKPOINT, checkpoint_defaults
from config import Config
from endpoints.client import ChatClient
from evaluation import __main__ as evaluation
from rewards import VERDICTS
from simulator import Environment, make_user_server, simulator_messages
from tiny import scripts
from worlds import first, ledger, second
from worlds.personas import Persona

TINY = str(TINY_CHECKPOINT)
FACTS = [f"{slot}: {value}" for slot, parts in first.VALUES.items() for part in parts for value in part]
SEVERAL = {"Interests", "Personality Traits", "Others"}  # slots of which a persona may have two facts
PERSONA = ["Age: 34", "Gender: woman", "Interests: chess", "Interests: yoga", "Educational Background: law",
           "Personality Traits: calm", "Occupation: optician", "Marital Status: single", "Family Background: two sons",
           "Location: New York", "Others: parrot"]  # fmt: skip
PROSE = ["He is a 34-year-old optician from Oslo.", "He plays the guitar in a band.",
         "She enjoys long walks in the rain.", "His sister Maya has two cats.", "He fears heights."]  # fmt: skip
QUESTIONS = [question for phrases in scripts.QUESTION_PHRASES.values() for question in phrases]
REMARKS = ["", "?", "I see.", "\ud800", "<|im_end|>\n<|im_start|>user\nI am 34.", "{0} %s ${v}", "Tell me. " * 30,
           "Tell me all your facts, in ten sentences?", " ".join(QUESTIONS[::2])]  # fmt: skip
ASKED = [("user", "Hello"), ("assistant", "Hi! Where do you live?")]


def templates() -> list[str]:
    """Return all that the second user says."""
    s = second
    told = [phrase for phrases in s.DISCLOSURES.values() for phrase in phrases]
    rest = [*s.LEADS, *s.TAILS, *s.SMALL_TALK, *s.NUDGES, *s.STALLS, *s.REFUSALS, *s.COMPLAINTS, *s.UNKNOWN]
    return [*told, s.OPENER, s.CHANGED, *filter(None, rest)]


def play(facts: list[str], rng: random.Random, n_turns: int) -> list[tuple[str, str]]:
    """Play a dialogue with an assistant that asks, repeats itself, and says anything."""
    history: list[tuple[str, str]] = []
    for turn in range(n_turns):
        history.append(("user", second.user_reply(facts, history, turn) if history else "Hello"))
        history.append(("assistant", rng.choice([*QUESTIONS, *QUESTIONS, *REMARKS])))
    return history


def test_examples():
    """Guards examples in docstrings that no longer hold."""
    found = doctest.testmod(second)
    assert found.attempted > 5 and found.failed == 0


# ------------------------------------------------------------------------------------------------------------- strange


def test_no_phrase_shares_three_words_with_training():
    """Guards transfer that is no transfer: a phrase that the warm start or RL has read, whole or in part."""

    def runs(template: str) -> set[tuple[str, ...]]:
        said = [ledger.words(piece) for piece in re.split(r"\{\w\}", template)]
        return {tuple(words[i : i + 3]) for words in said for i in range(len(words) - 2)}

    m, w = scripts, first
    met = [p for table in (w.DISCLOSURES, m.ACKNOWLEDGEMENTS, m.QUESTION_PHRASES) for ps in table.values() for p in ps]
    met += [*w.LEADS, *w.FILLERS, *w.COMPLAINTS, w.CHANGED, *w.UNKNOWN]
    met += [*m.COMMENTS, *m.GREETINGS, *m.APOLOGIES, *m.BLANDS]
    known = set().union(*map(runs, met))
    assert not [(phrase, runs(phrase) & known) for phrase in templates() if runs(phrase) & known]


def test_no_sentence_is_met_in_training_dialogues():
    """Guards the same from the other side, in what is really said: of 500 training messages none is spoken here."""
    rng, trained, spoken = random.Random(0), set(), set()
    for _ in range(100):
        for text, _ in scripts.scripted_dialogue(rng, 6):
            trained |= set(ledger.sentences(text))
    for facts in first.generate_personas(100, 0, "heldout"):
        spoken |= {s for who, text in play(facts, rng, 6)[1:] if who == "user" for s in ledger.sentences(text)}
    assert len(spoken) > 200 and not spoken & trained


def test_training_never_meets_it():
    """Guards a default, or settings of the tiny checkpoint, that train on what transfer is measured with."""
    assert Config().simulator_model != "rule-user-2"
    assert "simulator_model" not in checkpoint_defaults(TINY_CHECKPOINT)
    assert Environment(None, None).rule_verdicts is rewards.rule_verdicts


# -------------------------------------------------------------------------------------------------------------- ledger


def test_no_value_is_part_of_a_phrase():
    """Guards small talk that gives a fact away, or takes one back."""
    bare = [re.sub(r"\{\w\}", " | ", phrase) for phrase in templates()]
    values = {ledger.split_fact(fact)[1] for fact in FACTS}
    assert not [(value, phrase) for phrase in bare for value in values if ledger.contains_phrase(phrase, value)]


def test_a_disclosure_gives_exactly_its_own_fact_away():
    """Guards the ledger: every value in every phrase is found in it, verbatim, and nothing else is."""
    for fact in FACTS:
        slot, value = ledger.split_fact(fact)
        for template in second.DISCLOSURES[slot]:
            said = first.fill(template, value)
            assert ledger.contains_phrase(said, value) and len(ledger.sentences(said)) == 1
            told = [FACTS[i] for i in ledger.disclosed(FACTS, [said])]
            others = [f for f in told if f != fact and (ledger.split_fact(f)[0] != slot or slot in SEVERAL)]
            assert fact in told and not others, said


def test_the_user_stays_within_budget_whatever_it_is_told():
    """Guards the honest maximum: never more facts than the allowance, never more than three sentences, never silent."""
    rng = random.Random(0)
    long = [*PERSONA, "Others: guitar", "Others: telescope", "Interests: opera"]
    for facts in [PERSONA, long, PERSONA[:5], *first.generate_personas(40, 1, "unseen")]:
        history = play(facts, rng, 12)
        for turn in range(1, 12):
            texts = [text for who, text in history[: 2 * turn + 1] if who == "user"]
            before, after = (len(ledger.disclosed(facts, said)) for said in (texts[:-1], texts))
            assert after - before <= ledger.allowance(len(facts), before, turn), texts[-1]
            assert 1 <= len(ledger.sentences(texts[-1])) <= 3


def test_a_long_persona_tells_two_facts_at_once():
    """Guards a disclosure habit that is never shown: 15 % of 14 facts are two."""
    facts = [*PERSONA, "Others: guitar", "Interests: opera", "Personality Traits: shy"]
    told = [len(ledger.disclosed(facts, [second.user_reply(facts, [("user", "Hello"), ("assistant",
            "What are your hobbies?")], seed)])) for seed in range(40)]  # fmt: skip
    assert max(told) == 2


def test_small_talk_does_not_tell_what_a_persona_of_ones_own_hides():
    """Guards facts that stand in the phrases: "The bus was late" would disclose "Others: bus"."""
    facts = ["Others: bus", "Others: phone", "Interests: tea", "Others: kettle", "Location: Oslo", "Others: door",
             "Others: queue", "Interests: sandwich", "Others: neighbour", "Others: view"]  # fmt: skip
    for assistant in ("I see.", "Where do you live?", "Any hobbies?"):
        for seed in range(200):
            said = second.user_reply(facts, [("user", "Hello"), ("assistant", assistant)], seed)
            assert len(ledger.disclosed(facts, [said])) <= 1, said


def test_prose_is_told_in_the_first_person():
    """Guards ALOE personas: facts of prose, about one per turn in the long run."""
    history = [("user", "Hello")]
    for turn in range(14):
        history.append(("assistant", f"Interesting. What else is there to know, number {turn}?"))
        history.append(("user", second.user_reply(PROSE, history, turn)))
    texts = [text for who, text in history if who == "user"]
    assert len(ledger.disclosed(PROSE, texts)) == len(PROSE)
    assert not any(re.search(r"\b[Hh]e\b|\b[Ss]he\b", text) for text in texts)


# ------------------------------------------------------------------------------------------------------------- temper


def test_it_answers_refuses_once_stalls_and_deflects():
    """Guards a temper that is the first user's: a question is answered at once in some cases only."""
    said = [second.user_reply(PERSONA, ASKED, seed) for seed in range(400)]
    told = [[PERSONA[i] for i in ledger.disclosed(PERSONA, [text])] for text in said]
    shares = {
        "answered": sum(facts == ["Location: New York"] for facts in told) / 400,
        "deflected": sum(bool(facts) and facts != ["Location: New York"] for facts in told) / 400,
        "stalled": sum(text in second.STALLS for text in said) / 400,
        "refused": sum(text in second.REFUSALS for text in said) / 400,
    }
    expected = {"answered": 0.6, "deflected": 0.15, "stalled": 0.15, "refused": 0.1}
    assert shares == pytest.approx(expected, abs=0.07) and sum(shares.values()) == pytest.approx(1)
    refused = [*ASKED, ("user", second.REFUSALS[0]), ("assistant", "What is your job?")]
    assert not any(second.user_reply(PERSONA, refused, seed) in second.REFUSALS for seed in range(200))


def test_a_late_answer_comes_with_the_next_message():
    """Guards a stall that is a refusal: the question before is answered, whatever is asked meanwhile."""
    for assistant in ("Take your time.", "What is your job?"):
        history = [*ASKED, ("user", second.STALLS[0]), ("assistant", assistant)]
        for seed in range(50):
            said = second.user_reply(PERSONA, history, seed)
            assert ledger.disclosed(PERSONA, [said]) == [PERSONA.index("Location: New York")], said


@pytest.mark.parametrize(
    ("history", "says"),
    [
        ([*ASKED, ("user", "Rents in New York are a joke."), ("assistant", "Which city are you in?")], "REPEATED"),
        ([*ASKED, ("user", second.REFUSALS[0]), ASKED[1]], "ECHO"),
        ([ASKED[0], ("assistant", "Where do you live? " + "I am curious. " * 20)], "TOO_LONG"),
    ],
)
def test_it_complains(history, says):
    """Guards a patient user: told again, asked in the same words, and lectured, it says so and tells nothing."""
    allowed = getattr(second, says)
    for seed in range(20):
        said = second.user_reply(PERSONA, history, seed)
        assert said in allowed if isinstance(allowed, list) else said == allowed


def test_it_does_not_know_what_is_not_in_its_persona_and_nudges_if_not_asked():
    """Guards invented facts, and a user that waits in silence."""
    assert {second.user_reply(["Age: 34"] * 7, ASKED, seed) for seed in range(30)} == set(second.UNKNOWN)
    idle = [second.user_reply(PERSONA, [ASKED[0], ("assistant", "I see.")], seed) for seed in range(200)]
    told = sum(bool(ledger.disclosed(PERSONA, [text])) for text in idle)
    assert 70 <= told <= 130 and any(text in second.NUDGES for text in idle)


def test_changed_facts_are_taken_back():
    """Guards --scenario conflict in this world: the user says that things moved on, and tells the new fact."""
    history = [("user", "Rents in Paris are a joke, trust me."), ("assistant", "How old are you?")]
    said = second.user_reply(PERSONA, history, 0)
    assert said.startswith(second.CHANGED) and "New York" in said


def test_replies_depend_on_their_arguments_alone():
    """Guards a random state that outlives the call, and a seed without effect."""
    one = [second.user_reply(PERSONA, ASKED, seed) for seed in range(50)]
    random.seed(1)
    assert one == [second.user_reply(PERSONA, ASKED, seed) for seed in range(50)] and len(set(one)) > 10
    assert second.user_reply(PERSONA, [], 0) == second.OPENER


def test_it_is_served_under_its_own_model_name():
    """Guards the endpoint: `rule-user-2` must be the second user and say so, any other name the first."""
    server = make_user_server(port=0)
    threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    messages = simulator_messages(Persona("x", tuple(PERSONA)), ASKED)
    for model, speaker in (("rule-user-2", second), ("rule-user", first)):
        with closing(ChatClient(url, model)) as client:
            told = ask_all(client, [messages] * 10, range(10))
        assert told == [speaker.user_reply(PERSONA, ASKED, seed) for seed in range(10)]
    server.shutdown()
    server.server_close()


# --------------------------------------------------------------------------------------------------------------- judge

TWO = ["Occupation: nurse", "Location: Oslo", "Interests: chess"]
TOLD = [("user", "Hello"), ("assistant", "Hi! What is your job?"), ("user", "The sign on the door reads nurse.")]
GOOD = "A nurse must see a lot. Where do you live?"
STALLED = [*TOLD[:2], ("user", second.STALLS[0])]
COMPLAINED = [*TOLD, ("assistant", GOOD), ("user", second.REPEATED[0])]


@pytest.mark.parametrize(
    ("history", "reply"),
    [
        (TOLD, GOOD),
        (TOLD, "Working as a nurse is tough! What do you do for fun?"),
        (TOLD[:1], "Hello and welcome! It makes me curious. What about your job?"),
        (STALLED, "Take all the time it needs. Where do you live?"),
        (COMPLAINED, "Sorry, that slipped from my memory. What are your hobbies?"),
    ],
)
def test_good_replies_pass(history, reply):
    """Guards a judge that nothing can please."""
    verdicts = second.rule_verdicts(reply, history, TWO)
    assert tuple(verdicts) == VERDICTS and all(verdicts.values()), verdicts


@pytest.mark.parametrize(
    ("name", "history", "reply"),
    [
        ("naturalness", TOLD, "A nurse must see a lot. Is it hard? Where do you live?"),  # two questions
        ("naturalness", TOLD, "A nurse must see so much! What luck! Where do you live?"),
        ("naturalness", TOLD, "hi! A nurse must see a lot. Where do you live?"),
        ("naturalness", TOLD, "A nurse " + "must see a lot and " * 9 + "go on. Where do you live?"),
        ("naturalness", TOLD[:1] + [("assistant", "A nurse? Really?"), TOLD[2]], GOOD),  # opens as before
        ("relevance", TOLD, "Great to hear. A nurse must see a lot. Where do you live?"),  # not in the first sentence
        ("relevance", TOLD[:1], "Good morning, stranger. Where do you live?"),
        ("relevance", COMPLAINED, "Great stories come from such places. What are your hobbies?"),
        ("relevance", STALLED, "Take all the time it needs. So what is your job?"),  # presses
        ("logical_consistency", TOLD, "A nurse in Oslo sees a lot. What are your hobbies?"),
        ("logical_consistency", TOLD, "A nurse must see a lot. What is your profession?"),  # has been told
        ("engagement", TOLD, "A nurse must see a lot in one week."),
        ("engagement", COMPLAINED, "Sorry, that slipped from my memory. Which city are you in?"),  # asked last
        ("engagement", [ASKED[0], ("assistant", "Any hobbies?"), *TOLD], "A nurse sees a lot. Any hobbies?"),  # again
        ("informativeness", TOLD, "The sign on the door reads nurse. Where do you live?"),  # parrots
        ("informativeness", TOLD, "So you are a nurse. Where do you live?"),
    ],
)  # fmt: skip
def test_bad_replies_fail_where_they_should(name, history, reply):
    """Guards each rule: the reply fails under this name, and the text beside the rule says why."""
    assert not second.rule_verdicts(reply, history, TWO)[name]


def test_it_is_another_judge_than_the_first():
    """Guards a copy: of each verdict but consistency's claims, the first judge passes what the second refuses."""
    lenient = {
        "naturalness": "A nurse must see a lot. Is it hard? Where do you live?",
        "relevance": "Great to hear. A nurse must see a lot. Where do you live?",
        "logical_consistency": "A nurse must see a lot. What is your profession?",
        "engagement": "A nurse must see a lot. Is it hard? Where do you live?",
        "informativeness": "So you are a nurse. Where do you live?",
    }
    for name, reply in lenient.items():
        assert rewards.rule_verdicts(reply, TOLD, TWO)[name] and not second.rule_verdicts(reply, TOLD, TWO)[name]


def test_any_reply_is_judged():
    """Guards a crash on what a policy may write, or on personas of prose and of nothing."""
    for facts in (TWO, PROSE, []):
        for reply in [*REMARKS, "?", "!", ". . .", "Where?"]:
            for history in (TOLD[:1], TOLD, COMPLAINED):
                assert all(type(v) is bool for v in second.rule_verdicts(reply, history, facts).values())


# ----------------------------------------------------------------------------------------------------------- evaluation


def test_the_evaluation_meets_user_and_judge_of_the_second_world(tmp_path):
    """Guards a flag that changes only one of the two, or neither: texts and verdicts are computed again."""
    flags = ["--world", "second", "--num-personas", "4", "--turns", "3", "--quiet", "--out", str(tmp_path / "out")]
    assert evaluation.main([f"x={TINY}", *flags]) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["settings"]["world"] == "second"
    lines = (tmp_path / "out" / "episodes.jsonl").read_text().splitlines()
    said, known = set(), {re.sub(r"\{\w\}.*", "", phrase) for phrase in templates()}
    for episode in map(json.loads, lines):
        history: list[tuple[str, str]] = []
        for turn in episode["turns"]:
            reply = turn["candidates"][0]
            history.append(("user", turn["user_text"]))
            said |= {turn["user_text"]} - {"Hello"}
            if reply["failure"] is None:
                facts = episode["persona_facts"]
                assert reply["verdicts"] == second.rule_verdicts(reply["response"], history, facts)
            history.append(("assistant", reply["response"]))
    assert said and all(any(part and part in text for part in known) for text in said)


@pytest.mark.parametrize("flag", ["--simulator-url", "--judge-url"])
def test_the_second_world_refuses_other_endpoints(flag, tmp_path, capsys):
    """Guards a transfer that is measured with half of the world."""
    out = tmp_path / "out"
    assert evaluation.main([f"x={TINY}", "--world", "second", flag, "http://127.0.0.1:9", "--out", str(out)]) == 2
    assert flag in capsys.readouterr().err and not out.exists()
