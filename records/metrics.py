"""The metrics of dialogues: `tally` counts what happened, `rates` turns the counts of all ranks into metrics.

docs/metrics.md says what each metric means.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import rewards
from dialogue import Candidate, Dialogue
from worlds.first import unseen_values
from worlds.ledger import asked_slots, content_words, mentions, on_ledger, split_fact, words

# Guards against reward hacking: means over replies, then figures of all replies together. See docs/metrics.md.
PROFILE_GUARDS = ("unsupported_lines", "duplicate_lines", "lines_recited")  # a reply without a profile has none of them
GUARDS = ("reply_words", "reply_repeated", "question_repeated", "parroting", *PROFILE_GUARDS)
DISTINCT = (1, 2)  # lengths of the word n-grams of distinct-n


def tally(dialogues: list[Dialogue]) -> Counter:
    """Sum up what happened in dialogues, over all candidates; `rates` turns the sums of all ranks into metrics."""
    sums: Counter = Counter(dialogues=len(dialogues))
    for dialogue in dialogues:
        if dialogue.dropped is not None:
            sums["dropped"] += 1
            sums[f"dropped_{dialogue.dropped.partition(':')[0]}"] += 1
            continue
        for t, turn in enumerate(dialogue.turns):
            before = [earlier.winner.response for earlier in dialogue.turns[:t]]
            sums.update(unseen_sums(dialogue, t))
            for candidate in turn.candidates:
                if candidate.judged:
                    sums.update(candidate_sums(candidate, t))
                    sums.update(guards(candidate, before, turn.user_text))
                    sums.update(f"{n}-gram {gram}" for n in DISTINCT for gram in ngrams(candidate.response, n))
    return sums


def candidate_sums(candidate: Candidate, t: int) -> dict[str, float]:
    """Sum up one candidate of turn `t`, counted from 0."""
    ledger = candidate.ledger
    sums = {
        "candidates": 1,
        "valid": candidate.failure is None,
        "tokens": len(candidate.token_ids),
        "reward": candidate.reward,
        "f1": ledger["f1"],
        "lines": ledger["n_lines"],
        "disclosed": ledger["n_disclosed"],
        "recalled": ledger["n_recalled"],
        f"evidence_f1_turn{t + 1}": ledger["evidence_f1"],
        f"max_f1_turn{t + 1}": ledger["max_f1"],
    }
    sums |= {f"{name}_reward": value for name, value in candidate.parts.items()}
    if candidate.failure:
        sums[f"failure_{candidate.failure}"] = 1
    return sums | {f"verdict_{name}": verdict for name, verdict in candidate.verdicts.items()}


def guards(candidate: Candidate, before: Sequence[str], user_text: str) -> dict[str, float]:
    """Measure in one reply what a policy may do to be paid for nothing; names as in GUARDS.

    Args:
        candidate: the reply, parsed and held against the ledger.
        before: the replies that the dialogue had already heard.
        user_text: the message that it answers.
    """
    response, asked_before = candidate.response, {slot for reply in before for slot in asked_slots(reply)}
    said, heard = ngrams(response, 3), set(ngrams(user_text, 3))
    return {
        "reply_words": len(words(response)),
        "reply_repeated": response in before,
        "question_repeated": bool(asked_before & set(asked_slots(response))),
        "parroting": sum(gram in heard for gram in said) / max(1, len(said)),  # share of word trigrams taken over
        "unsupported_lines": candidate.ledger["n_unsupported"],
        "duplicate_lines": duplicate_lines(candidate.profile),
        "lines_recited": sum(mentions(line, response) for line in candidate.profile),
    }


def ngrams(text: str, n: int) -> list[str]:
    """List the word n-grams of a text.

    >>> ngrams("So you bake?", 2)
    ['so you', 'you bake']
    """
    said = words(text)
    return [" ".join(said[i : i + n]) for i in range(len(said) - n + 1)]


def duplicate_lines(lines: Sequence[str]) -> int:
    """Count the profile lines that add nothing: all content words of their value stand in one earlier line's.

    >>> duplicate_lines(["Occupation: head nurse", "works as a nurse", "Others: the nurse", "Age: 34", "Age:"])
    2
    """
    values = [content_words(split_fact(line)[1]) for line in lines]
    return sum(not value or any(value <= earlier for earlier in values[:i]) for i, value in enumerate(values))


def unseen_sums(dialogue: Dialogue, t: int) -> Counter:
    """Count the facts disclosed up to turn `t` whose value no training persona has, and those that profiles recall.

    Summed over the judged candidates of the turn; empty if there is no such fact.
    """
    sums, ledger = Counter(), on_ledger(dialogue.persona_facts, dialogue.told()[: t + 1])
    facts = [dialogue.persona_facts[i] for i in ledger]
    unseen = [fact for fact in facts if fact in unseen_values()]
    for candidate in dialogue.turns[t].candidates if unseen else ():
        if candidate.judged:
            matches = rewards.match_lines(candidate.profile, unseen)
            recalled = sum(match is not None for match in matches)
            sums.update(unseen_disclosed=len(unseen), unseen_recalled=recalled)
    return sums


def rates(sums: Counter) -> dict[str, float]:
    """Turn summed counts into metrics (docs/metrics.md)."""
    n = sums["candidates"] or math.nan  # what nobody played was not measured: it is not 0
    turns = [t for t in range(1, 1000) if sums[f"max_f1_turn{t}"] > 0]
    metrics = {
        "reward": sums["reward"] / n,
        "profile_f1": sums["f1"] / n,
        "recall": sums["recalled"] / (sums["disclosed"] or math.nan),
        "f1_over_max": sum(sums[f"evidence_f1_turn{t}"] for t in turns)
        / (sum(sums[f"max_f1_turn{t}"] for t in turns) or math.nan),
        "profile_lines": sums["lines"] / n,
        "disclosed_facts": sums["disclosed"] / n,
        "format_valid": sums["valid"] / n,
        "tokens_per_turn": sums["tokens"] / n,
        "dialogues": sums["dialogues"],
        "dialogues_dropped": sums["dropped"],
    }
    metrics |= {f"{name}_reward": sums[f"{name}_reward"] / n for name in rewards.REWARD_PARTS}
    metrics |= {name: sums[name] / n for name in GUARDS}
    for size in DISTINCT:  # different n-grams ÷ n-grams of all replies: arXiv 1510.03055
        counts = [count for name, count in sums.items() if name.startswith(f"{size}-gram ")]
        metrics[f"distinct_{size}"] = len(counts) / (sum(counts) or math.nan)
    metrics |= {f"f1_over_max_turn{t}": sums[f"evidence_f1_turn{t}"] / sums[f"max_f1_turn{t}"] for t in turns}
    metrics |= {name: sums[f"verdict_{name}"] / n for name in rewards.VERDICTS}
    metrics |= {
        f"failure_{name}": sums[f"failure_{name}"] / n for name in rewards.PARSE_FAILURES if sums[f"failure_{name}"]
    }
    metrics |= {name: sums[name] for name in sums if name.startswith("dropped_")}
    if sums["unseen_disclosed"]:
        metrics["recall_unseen_values"] = sums["unseen_recalled"] / sums["unseen_disclosed"]
    return metrics


def sum_counters(counters: Sequence[Counter]) -> Counter:
    """Add counters up (negative counts are kept, unlike with +)."""
    total: Counter = Counter()
    for counter in counters:
        total.update(counter)
    return total
