"""The parser, the profile F1, the five verdicts and the judge's answers: exact where they can be, and never fooled."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rewards
from config import Config
from dialogue import SYSTEM_PROMPT, Candidate, Dialogue, Turn
from rewards import VERDICTS, line_matches_fact, match_lines, parse_turn, rule_verdicts, score_profile
from worlds import first, ledger

FACTS = ["Age: 34", "Gender: woman", "Interests: chess", "Educational Background: law", "Personality Traits: calm",
         "Occupation: nurse", "Marital Status: single", "Family Background: two sons", "Location: New York",
         "Others: parrot"]
PROSE = ["He is a 34-year-old optician from Oslo.", "He plays the guitar in a band.", "He has a fear of heights."]
GOOD = "<profile>\n- Age: 34\n- likes tea\n</profile>\n\n<response>\nHi! How are you?\n</response>"


# -------------------------------------------------------------------------------------------------------------- parser
BROKEN = {
    "truncated": [(GOOD, "length"), ("<profile>\n- Age: 3", "length"), ("", "length")],
    "control_token": [(GOOD + "<|endoftext|>", "stop"), (GOOD.replace("tea", "<|im_start|>"), "stop"),
                      ("<|im_end|>", "stop")],
    "no_profile": [("Hi!", "stop"), ("", "stop"), ("<response>\nHi!\n</response>", "stop"),
                   (GOOD.replace("<profile>", ""), "stop")],
    "no_response": [("<profile>\n- Age: 34\n</profile>\nHi!", "stop"), (GOOD.replace("<response>", ""), "stop")],
    "unclosed": [(GOOD.replace("</profile>", ""), "stop"), (GOOD.replace("</response>", ""), "stop")],
    "duplicate_tag": [(GOOD + GOOD, "stop"), (GOOD.replace("Hi!", "Hi! </response>"), "stop"),
                      ("<profile>" + GOOD, "stop")],
    "outside_text": [("Sure: " + GOOD, "stop"), (GOOD + " Bye.", "stop"),
                     (GOOD.replace("</profile>", "</profile> so"), "stop"),
                     ("<response>Hi!</response><profile>- a</profile>", "stop")],
    "empty_response": [("<profile>\n- Age: 34\n</profile>\n<response>\n \n</response>", "stop")],
}


@pytest.mark.parametrize("failure", rewards.PARSE_FAILURES)
def test_every_failure_has_its_name_and_leaves_no_profile(failure):
    """Guards: a broken turn that still earns a Profile Reward, or is counted under another reason."""
    for text, stop_reason in BROKEN[failure]:
        parsed = parse_turn(text, stop_reason)
        assert (parsed.failure, parsed.profile) == (failure, []), text
        assert parsed.response and "<" not in parsed.response


def test_what_the_user_sees_of_a_broken_turn_has_no_profile_block():
    """Guards: the user answering to the policy's notes about itself."""
    for text in (GOOD.replace("</profile>", ""), GOOD.replace("</response>", ""), "<profile>\n- Age: 3", GOOD + GOOD,
                 GOOD + " Bye."):
        assert "Age" not in parse_turn(text).response, text
    assert parse_turn("<profile>\n- Age: 3", "length").response == "..."
    assert parse_turn(GOOD.replace("</response>", "<|im_start|>")).response == "Hi! How are you?"


def test_the_parser_is_tolerant_of_white_space_and_bullets_only():
    """Guards: a valid turn that is refused for its layout."""
    wanted = (["Age: 34", "likes tea"], "Hi! How are you?", None)
    for text in (GOOD, f"\n {GOOD}\n\n", GOOD.replace("\n", "\r\n"), GOOD.replace("- ", "* "), GOOD.replace("- ", ""),
                 GOOD.replace("- ", "  •  "), GOOD.replace("\n\n", ""), GOOD.replace("- likes", "\n\n \t\n-  likes ")):
        parsed = parse_turn(text)
        assert (parsed.profile, parsed.response, parsed.failure) == wanted, text
    assert parse_turn("<profile></profile><response>Hi</response>") == rewards.ParsedTurn([], "Hi")
    assert parse_turn("<profile>a < b, I <3 U</profile><response>{x} <b> & \\1</response>").response == "{x} <b> & \\1"


SOUP = st.lists(
    st.sampled_from(["<profile>", "</profile>", "<response>", "</response>", "<", ">", "/", "<|im_end|>", "<|", "|>",
                     "- Age: 34", "\n", " ", "Hi!", "<pro", "file>", "im_end", "é\u2028", "\x00", "</", "profile",
                     "response"]), max_size=24,
).map("".join)
SHAPED = st.tuples(SOUP, SOUP).map(lambda s: f"<profile>{s[0]}</profile>\n<response>{s[1]}</response>")


@settings(max_examples=400, deadline=None)
@given(text=st.one_of(st.text(), SOUP, SHAPED), stop_reason=st.sampled_from(["stop", "length"]))
def test_no_text_breaks_the_parser(text, stop_reason):
    """Guards: an exception in the middle of a rollout, and tags that a user would get to see."""
    parsed = parse_turn(text, stop_reason)
    assert parsed.failure is None or (parsed.failure in rewards.PARSE_FAILURES and parsed.profile == [])
    assert (stop_reason == "length") == (parsed.failure == "truncated")
    assert parsed.response == parsed.response.strip() != ""
    for said in (parsed.response, *parsed.profile):
        assert not any(tag in said for tag in ("<profile>", "</profile>", "<response>", "</response>", "<|im_end|>"))
    assert all(line == line.strip() != "" and "\n" not in line for line in parsed.profile)


# ------------------------------------------------------------------------------------------------------ Profile Reward
@pytest.mark.parametrize("n", [1, 3, 10])
def test_a_perfect_profile_scores_one(n):
    """Guards: the published count is off by one: perfect profiles of 1, 3 and 10 lines score .667, .857 and .952."""
    block = "\n\n".join(f"- {fact}" for fact in FACTS[:n])  # a blank line between traits costs nothing
    lines = parse_turn(f"<profile>\n\n{block}\n\n</profile>\n<response>Hi.</response>").profile
    score = score_profile(lines, FACTS[:n], ledger.disclosed(FACTS[:n], [say_all(FACTS[:n])]))
    assert (score.f1, score.evidence_f1, score.max_f1, score.n_recalled, score.n_unsupported) == (1.0, 1.0, 1.0, n, 0)
    assert score_profile(PROSE, PROSE, range(len(PROSE))).evidence_f1 == 1.0


def say_all(facts: list[str]) -> str:
    return " ".join(first.fill(first.DISCLOSURES[slot][0], value) for slot, value in map(ledger.split_fact, facts))


@pytest.mark.parametrize("facts", [FACTS, FACTS[:3], PROSE])
def test_packing_all_facts_on_one_line_matches_at_most_one(facts):
    """Guards: the published F1 is unbounded: one dense line scores 1.67."""
    values = [ledger.split_fact(fact)[1] for fact in facts]
    for line in (", ".join(facts), "; ".join(values), " ".join(values), f"Age: {' '.join(values)}"):
        for lines in ([line], [line, line, f"{line}!"]):
            assert sum(match is not None for match in match_lines(lines, facts)) <= 1
            assert score_profile(lines, facts, range(len(facts))).f1 <= 2 / (1 + len(facts))


def test_lines_match_by_slot_and_value():
    """Guards: matches across slots, within words, and of a whole list against one word of it."""
    for line in ("Occupation: nurse", "occupation:  A Nurse.", "works as a nurse", "Nurse", "Job: nurse"):
        assert line_matches_fact(line, "Occupation: nurse"), line
    for line in ("Location: nurse", "Occupation: nurses", "Occupation: nurse, baker", "nursery", "Occupation:", "",
                 "a nurse, a baker, a pilot, a poet and a dentist"):
        assert not line_matches_fact(line, "Occupation: nurse"), line
    assert line_matches_fact("Plays guitar in a band", PROSE[1])
    assert line_matches_fact("Interests: plays the guitar", PROSE[1])
    assert not line_matches_fact("Plays", PROSE[0]) and not line_matches_fact("He is the one", PROSE[2])


PACKED = [f"{a} {b}" for a, b in itertools.permutations(("nurse", "chess", "34", "parrot"), 2)]
LINES = st.lists(st.sampled_from([
    *FACTS, *(fact.lower() for fact in FACTS), *(ledger.split_fact(fact)[1] for fact in FACTS), *PACKED, "Age: 35",
    "Gender: man", "Location: Oslo", "Location: nurse", "likes chess, 34", "single calm nurse", "tea", "", "- ",
    "Occupation: nurse baker"]), max_size=7)


def largest_matching(lines: list[str], facts: list[str]) -> int:
    """Try everything: each line takes one of the free facts that it states, or none."""
    if not lines:
        return 0
    stated = [fact for fact in facts if line_matches_fact(lines[0], fact)]
    sizes = [1 + largest_matching(lines[1:], [f for f in facts if f != fact]) for fact in stated]
    return max([largest_matching(lines[1:], facts), *sizes])


@settings(max_examples=300, deadline=None)
@given(lines=LINES, facts=st.lists(st.sampled_from(FACTS), max_size=6, unique=True))
def test_the_matching_is_valid_and_as_large_as_any(lines, facts):
    """Guards: a greedy matcher, whose score depends on the order of the lines; one fact matched by two lines."""
    matches = match_lines(lines, facts)
    paired = [match for match in matches if match is not None]
    assert len(matches) == len(lines) and len(set(paired)) == len(paired)
    assert all(line_matches_fact(lines[i], facts[match]) for i, match in enumerate(matches) if match is not None)
    distinct = list({tuple(ledger.words(line)): line for line in lines}.values())
    assert len(paired) == largest_matching(distinct, facts)
    assert sum(match is not None for match in match_lines(lines[::-1], facts)) == len(paired)


def test_the_matching_rearranges_earlier_lines():
    """Guards: a greedy matcher: the first line takes the only fact that the second can have."""
    assert match_lines(["nurse, 34", "nurse"], ["Occupation: nurse", "Age: 34"]) == [1, 0]
    assert match_lines(["nurse", "34", "chess"], ["Interests: chess", "Age: 34", "Occupation: nurse"]) == [2, 1, 0]
    assert match_lines([], FACTS) == [] and match_lines(["Age: 34"], []) == [None]


@settings(max_examples=400, deadline=None)
@given(lines=LINES, line=LINES.filter(bool).map(lambda lines: lines[0]), at=st.integers(0, 7),
       told=st.lists(st.sampled_from(FACTS), max_size=6, unique=True))
def test_a_line_pays_only_if_it_states_a_told_fact_not_yet_stated(lines, line, at, told):
    """Guards: padding with guesses, repetition and packing, all of which paid under the published reward."""
    texts = ["Hello", *(say_all([fact]) for fact in told)]
    before, after = (score_profile(profile, FACTS, ledger.disclosed(FACTS, texts))
                     for profile in (lines, [*lines[:at], line, *lines[at:]]))
    for score in (before, after):
        assert 0 <= score.evidence_f1 <= score.f1 <= 1 and score.evidence_f1 <= score.max_f1 <= 1
        assert score.n_recalled + score.n_unsupported == score.n_lines
        assert score.n_recalled <= score.n_disclosed == len(told)
    stated_before = {tuple(ledger.words(earlier)) for earlier in lines}
    new = after.n_recalled - before.n_recalled
    assert new in (0, 1) and (new == 1) == (after.evidence_f1 > before.evidence_f1)
    if new:
        assert any(line_matches_fact(line, fact) for fact in told) and tuple(ledger.words(line)) not in stated_before
    else:
        assert after.evidence_f1 <= before.evidence_f1


def test_repeating_a_packed_line_gains_nothing():
    """Guards: "nurse, 34" written twice took two facts, one per copy."""
    one, two = (score_profile(["nurse, 34"] * n, FACTS, ledger.disclosed(FACTS, ["I'm 34, a nurse."])) for n in (1, 2))
    assert two.n_recalled == one.n_recalled == 1 and two.evidence_f1 < one.evidence_f1


def test_a_lucky_guess_raises_f1_and_never_the_evidence():
    """Guards: an evidence target that pays for what nobody said."""
    texts = ["Hello", "I'm 34."]
    honest, lucky, unlucky = (score_profile(["Age: 34", *guess], FACTS, ledger.disclosed(FACTS, texts))
                              for guess in ([], ["Gender: woman"], ["Gender: man"]))
    assert honest.evidence_f1 == honest.f1 == honest.max_f1 == 2 / 11
    assert lucky.f1 == 4 / 12 > honest.f1 and lucky.evidence_f1 == unlucky.evidence_f1 == 2 / 12 < honest.evidence_f1
    assert (lucky.n_recalled, lucky.n_unsupported, unlucky.n_unsupported) == (1, 1, 1)
    assert score_profile(["Age: 34"], FACTS, []).evidence_f1 == 0.0


@given(n_matched=st.integers(-5, 50), n_inferred=st.integers(0, 20), n_facts=st.integers(0, 20))
def test_f1_is_clamped_to_the_unit_interval(n_matched, n_inferred, n_facts):
    """Guards: a judge that counts more matches than there are lines."""
    f1 = rewards.f1_score(n_matched, n_inferred, n_facts)
    assert 0 <= f1 <= 1 and f1 <= rewards.f1_score(min(n_inferred, n_facts), n_inferred, n_facts)
    assert rewards.f1_score(n_facts, n_facts, n_facts) == 1.0


# ------------------------------------------------------------------------------------------------------------ verdicts
WORK = [("user", "Hello"), ("assistant", "Hi! What do you do for a living?"), ("user", "I work as a nurse.")]
COMPLAINT = [*WORK, ("assistant", "So you are a nurse. What is your job?"), ("user", "I already told you that.")]
DODGED = [("user", "Hello"), ("assistant", "Hi! Where do you live?"), ("user", "Hm.")]
TWO_FACTS = ["Occupation: nurse", "Location: Oslo"]
PASSING = "Working as a nurse must be tough. Where do you live?"
ONE_VERDICT_APART = [  # (verdict, passing reply, failing reply, history)
    ("naturalness", PASSING, "working as a nurse must be tough. Where do you live?", WORK),
    ("naturalness", PASSING, "Working as a a nurse must be tough. Where do you live?", WORK),
    ("naturalness", PASSING, PASSING + " Where do you live?", WORK),
    ("naturalness", PASSING, PASSING + " Oslo", [*WORK[:2], ("user", "I work as a nurse, not in Oslo.")]),
    ("naturalness", PASSING, "Oh. I see. Well. " + PASSING, WORK),
    ("naturalness", PASSING, " ".join(f"word{i}" for i in range(60)).capitalize() + ". " + PASSING, WORK),
    ("relevance", PASSING, "That must be very tough. Where do you live?", WORK),
    ("relevance", "Oh, sorry about that one. Where do you live?", "Oh, I like that one. Where do you live?", COMPLAINT),
    ("relevance", "Hello and welcome to you! What is your job?", "There is no hurry at all! What is your job?",
     WORK[:1]),
    ("logical_consistency", PASSING, "Working as a nurse in Paris must be tough. Where do you live?", WORK),
    ("logical_consistency", PASSING, "Working as a nurse and baker must be tough. Where do you live?", WORK),
    ("engagement", PASSING, "Working as a nurse must be tough.", WORK),
    ("engagement", PASSING, "Working as a nurse must be tough. What is your job?", WORK),
    ("engagement", PASSING, "Working as a nurse must be tough. Is it?", WORK),
    ("engagement", "I am glad to hear it. What is your job?", "I am glad to hear it. Which city are you in?", DODGED),
    ("informativeness", PASSING, "A nurse! Where do you live?", WORK),
    ("informativeness", "Sorry, you are a nurse. Where do you live?", "Sorry. So you are a nurse. Where do you live?",
     COMPLAINT),
]


@pytest.mark.parametrize("verdict, passing, failing, history", ONE_VERDICT_APART)
def test_each_verdict_can_fail_alone(verdict, passing, failing, history):
    """Guards: a verdict that is always true, or that only repeats another one."""
    good, bad = rule_verdicts(passing, history, TWO_FACTS), rule_verdicts(failing, history, TWO_FACTS)
    assert tuple(good) == tuple(bad) == VERDICTS
    assert {name for name in VERDICTS if good[name] != bad[name]} == {verdict} and good[verdict]


def test_after_an_empty_remark_only_a_question_is_relevant():
    """Guards: a reply to "Hm." that ends the dialogue."""
    asking = rule_verdicts("I see. What is your job?", DODGED, TWO_FACTS)
    silent = rule_verdicts("Let us take it slowly.", DODGED, TWO_FACTS)
    assert asking["relevance"] and not silent["relevance"] and not silent["engagement"]


def test_all_five_verdicts_pass_on_a_good_reply_at_every_stage():
    """Guards: a stage of the dialogue at which the Response Reward cannot be had."""
    told = [*WORK, ("assistant", PASSING), ("user", "I moved to Oslo.")]
    for reply, history in (("Hello, it is nice to meet you! What is your job?", WORK[:1]), (PASSING, WORK),
                           ("I am sorry about that. Where do you live?", COMPLAINT),
                           ("There is no hurry at all. What is your job?", DODGED),
                           ("I hear Oslo is lovely. Shall we talk some more?", told)):
        assert all(rule_verdicts(reply, history, TWO_FACTS).values()), reply


def test_with_prose_the_same_question_twice_does_not_engage():
    """Guards: the last question was compared with a list, so that repeating it always passed."""
    history = [("user", "Hello"), ("assistant", "Hi! How was your day?"), ("user", "I play the guitar in a band.")]
    same, new = "A guitar in a band sounds good. How was your day?", "A guitar in a band sounds good. Since when?"
    assert rule_verdicts(new, history, PROSE)["engagement"] and not rule_verdicts(same, history, PROSE)["engagement"]
    assert rule_verdicts(same, history[:1], PROSE)["engagement"]


@settings(max_examples=150, deadline=None)
@given(response=st.text(min_size=1), latest=st.text(min_size=1), facts=st.sampled_from([TWO_FACTS, PROSE, []]))
def test_no_reply_breaks_the_rule_judge(response, latest, facts):
    """Guards: an exception in the middle of a rollout on text without a single word or sentence."""
    for history in ([("user", latest)], [("user", "Hello"), ("assistant", response), ("user", latest)]):
        assert all(type(verdict) is bool for verdict in rule_verdicts(response, history, facts).values())


# --------------------------------------------------------------------------------------------------------- HTTP judges
def test_the_judge_sees_named_roles_and_no_system_prompt():
    """Guards: the published judge gets the policy's own instructions, and the roles the wrong way round."""
    braces = "{0} {response} {{}} } %s <profile>"
    message, = rewards.response_judge_messages(f"Nice. {braces}", [*WORK[:2], ("user", braces)], ["Age: 34", braces])
    assert message["role"] == "user" and f"Nice. {braces}" in message["content"] and f"- {braces}" in message["content"]
    assert f"User: Hello\nAssistant: Hi! What do you do for a living?\nUser: {braces}\n" in message["content"]
    empty = rewards.response_judge_messages("Hi.", WORK, [])[0]["content"]
    assert not any(line in empty for line in SYSTEM_PROMPT.splitlines() if line) and "(nothing)" in empty
    for name in VERDICTS:
        assert f"- {name}:" in empty and f'"{name}": ' in empty
    message, = rewards.profile_judge_messages(["Age: 34", braces], [*FACTS, braces])
    assert all(f"- {fact}\n" in message["content"] for fact in [*FACTS, braces])
    assert '{"covered": 2}' in message["content"]


VERDICT_JSON = '{"naturalness": 1, "relevance": 0, "logical_consistency": 1, "engagement": 1, "informativeness": 0}'


@pytest.mark.parametrize("wrapping", ["%s", "```json\n%s\n```", "Here you are:\n\n%s\nI hope this helps.",
                                      '{"verdicts": %s}'])
def test_judges_may_wrap_their_json(wrapping):
    """Guards: a code fence or a friendly sentence that costs a verdict."""
    verdicts = rewards.parse_verdicts(wrapping.replace("%s", VERDICT_JSON))
    assert list(verdicts.items()) == list(zip(VERDICTS, (True, False, True, True, False), strict=True))
    assert rewards.parse_covered(wrapping.replace("%s", '{"covered": 7}')) == 7


NO_JSON = ["", "1", "yes", "{}", "[1, 1, 1, 1, 1]", "null", "{'covered': 1}", "{covered: 1}", '{"covered": 1', "}{",
           "\x00", '{"a": ' + "[" * 100_000 + "}"]


def short(text: str) -> str:
    return ascii(text[-30:])


@pytest.mark.parametrize("text", [
    *NO_JSON, *(VERDICT_JSON.replace('"engagement": 1', f'"engagement": {hedge}')
                for hedge in ("0.5", '"1"', "null", "2", "-1", "[1]")),
    VERDICT_JSON.replace('"engagement": 1, ', ""), VERDICT_JSON.replace("engagement", "engaging"),
    f"{VERDICT_JSON} or rather {VERDICT_JSON.replace('0', '1')}", VERDICT_JSON.replace("1", "NaN", 1)], ids=short)
def test_a_judge_that_hedges_has_not_judged(text):
    """Guards: a doubtful verdict scored as 0 or 1 by mistake; deep nesting that raises RecursionError."""
    with pytest.raises(ValueError):
        rewards.parse_verdicts(text)


@pytest.mark.parametrize("text", [*NO_JSON, *(f'{{"covered": {count}}}' for count in (
    "true", "false", "-1", "2.0", "2.5", '"2"', "null", "[2]", "NaN", "1e999", "9" * 5000)),
    '{"count": 2}', '{"covered": 2} or {"covered": 3}'], ids=short)
def test_only_a_count_is_a_count(text):
    """Guards: true read as 1, a negative or fractional count, the first of two answers."""
    with pytest.raises(ValueError):
        rewards.parse_covered(text)
    assert rewards.parse_covered('{"covered": 0}') == 0


class ScriptedJudge:
    """Give these answers, one each time it is asked, and note the seeds."""

    def __init__(self, *answers: str | Exception):
        self.answers, self.seeds = list(answers), []

    def ask(self, messages, seed):
        assert messages == [{"role": "user", "content": "judge this"}]
        self.seeds.append(seed)
        return self.answers.pop(0)


@pytest.mark.parametrize(("answers", "verdict"), [
    (['{"covered": 2}'], 2), (['{"covered": 0}'], 0), (["?", '{"covered": 1}'], 1), (["?", "!", '{"covered": 1}'], 1),
    (["?"] * 3, None), ([TimeoutError("late")], None), (["?", ConnectionError("gone")], None)])
def test_unparsable_answers_are_asked_again_and_failures_are_not(answers, verdict):
    """Guards: a lost verdict scored 0, an endless retry, a retry with the same seed, a 0 that passes for no verdict."""
    judge = ScriptedJudge(*answers)
    request = [{"role": "user", "content": "judge this"}]
    assert rewards.ask_judge(judge.ask, request, rewards.parse_covered, seed=40) == verdict
    assert judge.seeds == [40, 41, 42][: len(answers)] and judge.answers == []


def test_the_number_of_tries_is_a_limit():
    """Guards: n_tries that is ignored, or counts only the tries after the first."""
    judge = ScriptedJudge("?", "?", '{"covered": 1}')
    request = [{"role": "user", "content": "judge this"}]
    assert rewards.ask_judge(judge.ask, request, rewards.parse_covered, 7, n_tries=2) is None
    assert judge.seeds == [7, 8]


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_part_without_weight_costs_no_candidate(weight):
    """Guards --response-weight 0: a judge that fails must not throw away what a reward of weight 0 would earn."""
    ledger = {"f1": 0.5}
    candidate = Candidate(token_ids=[1], logprobs=[0.0], stop_reason="stop", response="Hi!", ledger=ledger)
    judge = rewards.Judge(lambda messages, seed: ConnectionError("away"), rule_verdicts, 0)
    config = Config(ckpt="x", response_weight=weight, profile_weight=2.0)
    rewards.score_candidate(candidate, Dialogue(0, "p", ("Age: 34",), [Turn("Hello", [])]), config, judge)
    assert candidate.judged == (weight == 0.0)
    assert (candidate.reward, candidate.parts["profile"], candidate.parts["response"]) == (1.0, 0.5, 0.0)
