"""What a turn is worth: parsing it, the Profile Reward and the Response Reward.

    reward of a turn = profile_weight · F1(inferred profile, persona) + response_weight · N · R · L · G · F

`score_candidate` computes it, and nothing else does: the choice of the best candidate, advantages, metrics, the best
checkpoint, the report and offline training read `candidate.reward` and `candidate.parts`. A new part is one function,
one entry in REWARD_PARTS and one setting, NAME_weight, in config.py.

The Profile Reward (RLPA eq. 2–3) is exact here and lies in [0, 1]: a deterministic matcher pairs each inferred line
with at most one fact, so that packing facts on a line or repeating lines gains nothing. The Response Reward is the
product of five binary verdicts: Naturalness, Relevance, Logical consistency, enGagement, inFormativeness. Rules give
them in the embedded world; for real models an LLM judge behind any OpenAI-compatible endpoint does.

A judge that fails for good yields None, never 0: the caller drops the candidate and counts it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple

from config import Config
from dialogue import Candidate, ChatTokenizer, Dialogue
from untrusted.plain_text import indented
from worlds.first import COMPLAINTS, value_pattern
from worlds.ledger import (
    History,
    Told,
    asked_slots,
    contains_phrase,
    content_words,
    mentions,
    on_ledger,
    sentences,
    split_fact,
    told_by,
    words,
)
from worlds.matching import load_encoder, states

VERDICTS = ("naturalness", "relevance", "logical_consistency", "engagement", "informativeness")
PARSE_FAILURES = (  # the most telling one first
    "truncated",
    "control_token",
    "duplicate_tag",
    "no_profile",
    "no_response",
    "unclosed",
    "outside_text",
    "empty_response",
)
PROFILE_TARGETS = {"persona": "f1", "evidence": "evidence_f1", "ledger": "ledger_f1"}  # name → field of ProfileScore
MAX_SENTENCES, MAX_WORDS = 4, 60  # what still counts as a natural chat reply for the rule judge
ARTICLES = {"a", "an", "the"}
Ask = Callable[[list[dict], int], str | Exception]
Matcher = Callable[[str, str], bool]  # (line, fact)

# ---------------------------------------------------------------------------------------------------------------------
# The reward of a candidate


class Judge(NamedTuple):
    """Who judges a candidate: an endpoint, or the rules of the embedded world."""

    ask: Ask | None  # asks the judge's endpoint; None: by rule
    rules: Callable[..., dict[str, bool]]  # (response, history, facts, told) → verdicts by name
    seed: int  # of the requests
    note: Callable[[str, bool], object] = lambda answer, read: None  # is told of each answer, and whether it was read


def read_candidate(
    token_ids: list[int], logprobs: list[float], stop_reason: str, dialogue: Dialogue, chat: ChatTokenizer,
    matches: Matcher | None = None,
) -> Candidate:  # fmt: skip
    """Decode and parse a sampled turn, and score its profile; by the exact rule, if no matcher is given."""
    text = chat.visible(token_ids)
    parsed, facts = parse_turn(text, stop_reason), dialogue.persona_facts
    ledger = on_ledger(facts, dialogue.told())
    return Candidate(
        token_ids=token_ids,
        logprobs=logprobs,
        stop_reason=stop_reason,
        text=text,
        profile=parsed.profile,
        response=parsed.response,
        failure=parsed.failure,
        profile_tokens=chat.tokens_until(token_ids, "</profile>"),
        verdicts=dict.fromkeys(VERDICTS, False),
        ledger=asdict(score_profile(parsed.profile, facts, ledger, matches or line_matches_fact)),
    )


def profile_reward(candidate: Candidate, dialogue: Dialogue, config: Config, judge: Judge) -> float | None:
    """Return the Profile Reward in [0, 1] (RLPA eq. 2–3), by the matcher or by an LLM's count of covered facts."""
    if config.profile_judge != "http":
        return candidate.ledger[PROFILE_TARGETS[config.profile_target]]
    request = profile_judge_messages(candidate.profile, dialogue.persona_facts)
    count = ask_judge(judge.ask, request, parse_covered, judge.seed, note=judge.note)
    return None if count is None else f1_score(count, len(candidate.profile), len(dialogue.persona_facts))


def response_reward(candidate: Candidate, dialogue: Dialogue, config: Config, judge: Judge) -> float | None:
    """Fill in the five verdicts and return their product, the Response Reward."""
    if judge.ask is None:
        verdicts = judge.rules(candidate.response, dialogue.history(), dialogue.persona_facts, dialogue.told())
    else:
        request = response_judge_messages(candidate.response, dialogue.history(), candidate.profile)
        verdicts = ask_judge(judge.ask, request, parse_verdicts, judge.seed, note=judge.note)
    candidate.verdicts = verdicts or candidate.verdicts
    return None if verdicts is None else float(all(verdicts.values()))


# Each part takes a turn that could be parsed, in a dialogue that ends with the user's message. It gives a number in
# [0, 1], which is earned on the turn's last token, or None if the judge failed for good.
REWARD_PARTS = {"profile": profile_reward, "response": response_reward}


def score_candidate(candidate: Candidate, dialogue: Dialogue, config: Config, judge: Judge) -> None:
    """Fill in a candidate's reward parts and its reward, the weighted sum of them.

    A turn that could not be parsed earns nothing. If the judge of a part that counts failed, the turn is marked as not
    judged; it is never scored 0.
    """
    failed = candidate.failure is not None
    found = {name: 0.0 if failed else part(candidate, dialogue, config, judge) for name, part in REWARD_PARTS.items()}
    weights = {name: getattr(config, f"{name}_weight") for name in found}
    candidate.judged = all(value is not None or not weights[name] for name, value in found.items())
    candidate.parts = {name: value or 0.0 for name, value in found.items()}
    candidate.reward = sum(weights[name] * value for name, value in candidate.parts.items())


# ---------------------------------------------------------------------------------------------------------------------
# Parsing


@dataclass(frozen=True)
class ParsedTurn:
    """A turn's parts; `failure` names why it could not be read (one of PARSE_FAILURES), None if it could.

    A turn that failed has no profile, and as response whatever the user would still see of it.
    """

    profile: list[str]
    response: str
    failure: str | None = None


def parse_turn(text: str, stop_reason: str = "stop") -> ParsedTurn:
    """Parse `<profile>` lines and `<response>`: strict on tags, tolerant of white space. Never raises.

    >>> parse_turn("<profile>\\n- Age: 34\\n</profile>\\n\\n<response>\\nHi!\\n</response>")
    ParsedTurn(profile=['Age: 34'], response='Hi!', failure=None)
    >>> parse_turn("<profile>\\n- Age: 34\\n<response>\\nHi!\\n</response>").failure
    'unclosed'
    """
    match = re.fullmatch(r"\s*<profile>(.*)</profile>\s*<response>(.*)</response>\s*", text, re.DOTALL)
    counts = {tag: text.count(tag) for tag in ("<profile>", "</profile>", "<response>", "</response>")}
    reasons = {
        "truncated": stop_reason == "length",
        "control_token": re.search(r"<\|\w+\|>", text) is not None,
        "duplicate_tag": any(count > 1 for count in counts.values()),
        "no_profile": not counts["<profile>"],
        "no_response": not counts["<response>"],
        "unclosed": not (counts["</profile>"] and counts["</response>"]),
        "outside_text": match is None,
        "empty_response": match is not None and not match[2].strip(),
    }
    for name in PARSE_FAILURES:
        if reasons[name]:
            return ParsedTurn([], _visible_text(text), name)
    return ParsedTurn(profile_lines(match[1]), match[2].strip())


def _visible_text(text: str) -> str:
    """Return what a user would see of a broken turn: everything but profile block, tags and control tokens."""
    text = re.sub(r"<profile>.*?(?:</profile>|(?=<response>)|$)", " ", text, flags=re.DOTALL)
    return " ".join(re.sub(r"</?(?:profile|response)>|<\|\w+\|>", " ", text).split()) or "..."


def profile_lines(block: str) -> list[str]:
    """List the traits of a profile block: bullets and white space stripped, empty lines skipped.

    >>> profile_lines("\\n- Age: 34\\n\\n * likes  tea\\n")
    ['Age: 34', 'likes tea']
    """
    lines = (" ".join(re.sub(r"^\s*[-*•]", "", line).split()) for line in block.splitlines())
    return [line for line in lines if line]


# ---------------------------------------------------------------------------------------------------------------------
# Profile Reward


def line_matches_fact(line: str, fact: str) -> bool:
    """Decide whether one inferred line states one fact.

    A slot's fact needs the same value in the same slot, or without a slot the value among at most three other content
    words; prose needs a content-word F1 of at least one half.

    >>> [line_matches_fact(line, "Occupation: nurse") for line in ("occupation: Nurse.", "works as a nurse")]
    [True, True]
    >>> line_matches_fact("Location: nurse", "Occupation: nurse")
    False
    >>> line_matches_fact("Plays guitar", "He plays the guitar.")
    True
    """
    (line_slot, line_value), (slot, value) = split_fact(line), split_fact(fact)
    if slot and line_slot:
        said, wanted = ([word for word in words(v) if word not in ARTICLES] for v in (line_value, value))
        return slot == line_slot and said == wanted
    said, wanted = content_words(line_value), content_words(value)
    if slot and len(wanted) <= 4:
        return contains_phrase(line_value, value) and len(said) <= len(wanted) + 3
    common = len(said & wanted)
    return bool(common) and 2 * common / (len(said) + len(wanted)) >= 0.5


def choose_matcher(profile_judge: str, user_model: str) -> Matcher:
    """Return what decides whether a line states a fact, by --profile-judge; ValueError if its encoder is not there.

    auto: the exact rule for the embedded users, whose phrases it was made for, and words for a language model. So it is
    with http, too: an LLM's count does not say which lines match, and the ledger needs that.
    """
    by = profile_judge
    if by in ("auto", "http"):
        by = "rule" if user_model.startswith("rule-user") else "words"
    similarity = load_encoder() if by == "encoder" else None
    return line_matches_fact if by == "rule" else partial(states, similarity=similarity)


def match_lines(
    lines: Sequence[str], facts: Sequence[str], matches: Matcher = line_matches_fact
) -> list[int | None]:
    """Pair each line with at most one fact, and each fact with at most one line, so that most lines are paired.

    Maximum bipartite matching by augmenting paths: how many are paired does not depend on the order of the lines.

    >>> match_lines(["Age: 34", "Age: 34", "Location: Oslo"], ["Location: Oslo", "Age: 34"])
    [1, None, 0]
    """
    said = [words(line) for line in lines]
    fits = [
        [f for f, fact in enumerate(facts) if said[i] not in said[:i] and matches(line, fact)]
        for i, line in enumerate(lines)
    ]  # a repeated line states nothing new, even if it packs two facts
    owner: dict[int, int] = {}

    def claim(line: int, tried: set[int]) -> bool:
        for fact in fits[line]:
            if fact not in tried:
                tried.add(fact)
                if fact not in owner or claim(owner[fact], tried):
                    owner[fact] = line
                    return True
        return False

    for line in range(len(lines)):
        claim(line, set())
    paired = {line: fact for fact, line in owner.items()}
    return [paired.get(line) for line in range(len(lines))]


def f1_score(n_matched: int, n_inferred: int, n_facts: int) -> float:
    """Return 2 |P̂ ∩ P| / (|P̂| + |P|) (RLPA eq. 2–3) in [0, 1]; 1 if both are empty.

    The count is clamped, because an LLM matcher may claim more matches than there are lines.

    >>> f1_score(3, 3, 3), f1_score(5, 3, 9), f1_score(0, 0, 4)
    (1.0, 0.5, 0.0)
    """
    n_matched = max(0, min(n_matched, n_inferred, n_facts))
    return 2 * n_matched / (n_inferred + n_facts) if n_inferred + n_facts else 1.0


@dataclass(frozen=True)
class ProfileScore:
    """How an inferred profile compares with the persona and with what the user has disclosed so far (the ledger)."""

    f1: float  # against the whole persona, as published: a lucky guess counts
    evidence_f1: float  # the same, but a match counts only if the dialogue has disclosed that fact
    ledger_f1: float  # against what the dialogue has disclosed, and nothing else: 1 is always within reach
    max_f1: float  # of the best honest profile: all disclosed facts and nothing else
    n_lines: int
    n_disclosed: int
    n_recalled: int  # disclosed facts that the profile states
    n_unsupported: int  # lines that match nothing the user has disclosed


def score_profile(
    lines: Sequence[str], facts: Sequence[str], ledger: Sequence[int], matches: Matcher = line_matches_fact
) -> ProfileScore:
    """Score a profile by the deterministic matcher. ledger: the indices of the facts that the user has disclosed.

    Under the published F1 a guess pays as soon as it is right with a probability above half the current F1 (gender:
    one in two), which teaches padding. `evidence_f1` takes that away without changing anything else: a guess can only
    lengthen |P̂|, and an honest profile scores what it scored before. But early on it is nearly free: with 0 facts
    disclosed it costs nothing, with 1 of 12 a hundredth. `ledger_f1` compares with the disclosed facts alone, so that a
    guess costs a third of the score beside one fact, and everything when there is none.

    >>> score = score_profile(["Age: 34", "Gender: woman"], ["Age: 34", "Gender: woman"], ledger=[0])
    >>> (score.f1, score.evidence_f1, round(score.ledger_f1, 3), round(score.max_f1, 3), score.n_unsupported)
    (1.0, 0.5, 0.667, 0.667, 1)
    """
    supported = match_lines(lines, [facts[i] for i in ledger], matches)
    n_recalled = sum(match is not None for match in supported)
    n_matched = sum(match is not None for match in match_lines(lines, facts, matches))
    return ProfileScore(
        f1=f1_score(n_matched, len(lines), len(facts)),
        evidence_f1=f1_score(n_recalled, len(lines), len(facts)),
        ledger_f1=f1_score(n_recalled, len(lines), len(ledger)),
        max_f1=f1_score(len(ledger), len(ledger), len(facts)),
        n_lines=len(lines),
        n_disclosed=len(ledger),
        n_recalled=n_recalled,
        n_unsupported=len(lines) - n_recalled,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Response Reward by rule (the embedded world)


def rule_verdicts(
    response: str, history: History, facts: Sequence[str], told: Told | None = None
) -> dict[str, bool]:
    """Judge a reply to the last user message of `history` by five rules, and name each verdict.

    told: the facts that each user message tells; None: those that it mentions.

    naturalness          1–4 sentences, at most 60 words, capitalised, ended, and no sentence or word said twice running
    relevance            takes up a fact just disclosed, apologises if the user complains, greets if the user greets
    logical_consistency  claims no value of the world that the user has not said
    engagement           asks about something the user has not told yet, and not what it asked last
    informativeness      has a statement of four or more words that it has not made before

    >>> told = [("user", "Hello"), ("assistant", "Hi! What do you do?"), ("user", "I work as a nurse.")]
    >>> reply = "Working as a nurse must be tough. Where do you live?"
    >>> rule_verdicts(reply, told, ["Occupation: nurse", "Location: Oslo"])
    {'naturalness': True, 'relevance': True, 'logical_consistency': True, 'engagement': True, 'informativeness': True}
    """
    user_texts = [text for who, text in history if who == "user"]
    replies = [text for who, text in history if who == "assistant"]
    told = [told_by(facts, text) for text in user_texts] if told is None else told
    spoken, heard = sentences(response), "\n".join(user_texts)
    statements = [s for s in spoken if not s.endswith("?") and len(words(s)) >= 4]
    earlier = {sentence.casefold() for reply in replies for sentence in sentences(reply)}
    return {
        "naturalness": _is_natural(response, spoken),
        "relevance": _is_relevant(response, user_texts, [fact for fact in facts if fact in told[-1]]),
        "logical_consistency": all(contains_phrase(heard, claim[0]) for claim in value_pattern().finditer(response)),
        "engagement": _is_engaging(response, on_ledger(facts, told), replies, facts),
        "informativeness": any(statement.casefold() not in earlier for statement in statements),
    }


def _is_natural(response: str, spoken: Sequence[str]) -> bool:
    said = words(response)
    stutters = any(a == b for a, b in zip(said, said[1:], strict=False)) or len({s.casefold() for s in spoken}) < len(
        spoken
    )
    shaped = response[:1].isupper() and response[-1:] in ".!?"
    return shaped and not stutters and 1 <= len(spoken) <= MAX_SENTENCES and 1 <= len(said) <= MAX_WORDS


def _is_relevant(response: str, user_texts: Sequence[str], news: Sequence[str]) -> bool:
    latest = user_texts[-1]
    if news:
        return any(mentions(fact, response) for fact in news)
    if any(remark in latest for remark in COMPLAINTS):
        return bool(re.search(r"\b(?:sorry|apolog\w+|my mistake|forgive)\b", response, re.IGNORECASE))
    if len(user_texts) == 1:
        return bool(re.search(r"\b(?:hello|hi|hey|welcome|nice to meet)\b", response, re.IGNORECASE))
    return "?" in response  # the user said next to nothing: ask on


def _is_engaging(response: str, ledger: Sequence[int], replies: Sequence[str], facts: Sequence[str]) -> bool:
    if "?" not in response:
        return False
    slots = [split_fact(fact)[0] for fact in facts]
    open_slots = {slot for i, slot in enumerate(slots) if i not in ledger}
    if not open_slots or open_slots == {None}:  # all told, or prose: any question that is not the last one again
        return not replies or sentences(response)[-1:] != sentences(replies[-1])[-1:]
    asked = asked_slots(response)
    return (
        bool(asked) and set(asked) <= open_slots and not (replies and set(asked) & set(asked_slots(replies[-1])))
    )


# ---------------------------------------------------------------------------------------------------------------------
# Rewards by an LLM judge over HTTP

RESPONSE_JUDGE_PROMPT = """You judge one reply of an assistant in a chat with a user.

What the assistant believes about the user:
{profile}

The dialogue so far:
{history}

The assistant's reply to judge:
{response}

Give five verdicts, each 1 (yes) or 0 (no):
- naturalness: it reads as a human chat reply, neither stilted nor repetitive
- relevance: it takes up what the user just said
- logical_consistency: it contradicts neither the dialogue nor what is known about the user
- engagement: it makes the user want to go on talking
- informativeness: it offers something new and useful to this user

Answer with one JSON object and nothing else, for example
{{"naturalness": 1, "relevance": 1, "logical_consistency": 1, "engagement": 0, "informativeness": 1}}"""

PROFILE_JUDGE_PROMPT = """Compare two descriptions of the same person.

Hidden facts, one per line:
{facts}

Inferred traits, one per line:
{lines}

How many of the hidden facts does the inferred list state? One trait may count for one fact only.
Answer with one JSON object and nothing else, for example {{"covered": 2}}"""


def response_judge_messages(response: str, history: History, profile: Sequence[str]) -> list[dict]:
    """Build the judge's messages: roles by their names, and without the policy's system prompt."""
    dialogue = "\n".join(f"{'User' if who == 'user' else 'Assistant'}: {indented(text)}" for who, text in history)
    prompt = RESPONSE_JUDGE_PROMPT.format(profile=_bullets(profile), history=dialogue, response=indented(response))
    return [{"role": "user", "content": prompt}]


def profile_judge_messages(lines: Sequence[str], facts: Sequence[str]) -> list[dict]:
    """Build the messages that ask an LLM how many facts the inferred lines cover."""
    return [{"role": "user", "content": PROFILE_JUDGE_PROMPT.format(facts=_bullets(facts), lines=_bullets(lines))}]


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {indented(line)}" for line in lines) or "(nothing)"


def parse_verdicts(text: str) -> dict[str, bool]:
    """Read the five verdicts; ValueError if one is absent or not 0 or 1 (a judge that hedges has not judged).

    >>> answer = '{"naturalness": 1, "relevance": 1, "logical_consistency": 0, "engagement": 1, "informativeness": 1}'
    >>> parse_verdicts(answer)["logical_consistency"]
    False
    """
    found = _json_object(text)
    if set(VERDICTS) - set(found) or any(found[name] not in (0, 1) for name in VERDICTS):
        raise ValueError(f"verdicts are not five 0/1 values: {text[:200]!r}")
    return {name: bool(found[name]) for name in VERDICTS}


def parse_covered(text: str) -> int:
    """Read the number of covered facts; ValueError if it is absent or no count."""
    covered = _json_object(text).get("covered")
    if isinstance(covered, bool) or not isinstance(covered, int) or covered < 0:
        raise ValueError(f"'covered' is not a count: {text[:200]!r}")
    return covered


def _json_object(text: str) -> dict:
    """Return the one JSON object in a text; models like to wrap it in a code fence or a sentence."""
    objects = set(re.findall(r"\{[^{}]*\}", text))  # two different ones are a hedge
    try:
        found = json.loads(objects.pop()) if len(objects) == 1 else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"no JSON object in {text[:200]!r}")
    return found


def ask_judge(
    ask: Ask, request: list[dict], parse: Callable[[str], object], seed: int, n_tries: int = 3,
    note: Callable[[str, bool], object] = lambda answer, read: None,
) -> object | None:  # fmt: skip
    """Send a request to a judge and parse its answer; an answer that cannot be parsed is asked for again.

    Args:
        ask: sends a message list with a seed, returns a text or an exception (`ChatClient.ask`).
        request: the message list.
        parse: text → verdict, ValueError if it holds none.
        seed: of the first try; each further one gets another, so that a deterministic judge can answer differently.
        n_tries: how often an unparsable answer is asked for in all.
        note: is told of each answer, and whether it could be parsed (`ChatClient.note_verdict`).
    Returns:
        the verdict, None where the judge failed for good.
    """
    for attempt in range(n_tries):
        answer = ask(request, seed + attempt)
        if isinstance(answer, Exception):  # the client has retried already; asking again would only double that
            return None
        try:
            verdict = parse(answer)
        except ValueError:
            note(answer, False)
        else:
            note(answer, True)
            return verdict
    return None
