"""Completions as servers really send them: `python -m benchmarks.fuzz_speech --number 10000`.

Each is built of known speech and known thoughts, in every spelling: whole, cut off, in parts, refused, broken. The sums
by outcome are printed. Exit code 1 if a thought came out as speech or reached the ledger of disclosed facts, if speech
was lost where nothing was wrong, or if an outcome has the wrong name.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from endpoints.speech import parse_reply
from endpoints.wire import ChatError
from worlds.ledger import disclosed

FACTS = ("Occupation: nurse", "Location: Oslo", "Age: 37", "Interests: chess", "Pets: two cats", "Education: PhD")
SPOKEN = (
    "Hello!", "I work as a nurse.", "I live in Oslo, you know.", "I'm 37.", "I enjoy chess...", "We have two cats.",
    "I typed <think> and </think> yesterday.", "In code it is `<think>`.", "My notes say [thinking] or <thought.",
    "Is 2 < 3 > 1?", "Really?\nYes.", "My analysis: fine.", "Here is my response: yes.", "\n- one\n- two", "Well —",
    "好的。",
)  # fmt: skip
THOUGHT = (
    "The user is a nurse.", "So: Oslo, I guess.", "37 years old", "chess is the hobby", "Two cats.", "A PhD, it says",
    "They typed <think> here.", "\n\nLet me see.\n", "`</think>` ends it.", "Hmm", "1. Greet\n2. Ask", '{"a": 1}',
    "I should say <b>hi</b>", "「嗯」",
)  # fmt: skip
SPELLED = (  # opening, closing, what may stand around the speech
    ("<think>", "</think>", ("", "")), ("<think>\n", "\n</think>\n\n", ("", "")), ("<THINK>", "</Think>", ("", "")),
    ("< think >", "</ think >", ("", "")), ("<thinking>", "</thinking>", ("<output>", "</output>")),
    ("<thought>", "</thought>", ("", "")), ("<reasoning>", "</reasoning>", ("<answer>\n", "\n</answer>")),
    ("<reflection>", "</reflection>", ("", "")), ("<seed:think>", "</seed:think>", ("", "")),
    ("<think>\n", "\n</think>\n\n", ("<response>\n", "\n</response>\n")), ("[THINK]", "[/THINK]", ("", "")),
    ("◁think▷", "◁/think▷", ("", "")), ("<|channel>thought\n", "<channel|>", ("", "")),
    ("<|START_THINKING|>", "<|END_THINKING|>", ("<|START_RESPONSE|>", "<|END_RESPONSE|>")),
    ("<|inner_prefix|>", "<|inner_suffix|>", ("", "")), ("<unused94>thought\n", "<unused95>", ("", "")),
    ("<|open|>think<|sep|>", "<|close|>think<|sep|>", ("<|open|>response<|sep|>", "<|close|>response<|sep|>")),
    ("<|begin_of_thought|>", "<|end_of_thought|>", ("<|begin_of_solution|>", "<|end_of_solution|>")),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>", ("", "<|return|>")),
    ("Here are my reasoning steps:\n", "\n[BEGIN FINAL RESPONSE]\n", ("", "\n[END FINAL RESPONSE]\n<|end|>")),
)  # fmt: skip
AT_THE_START = (*SPELLED, ("Here is my thought process:", "Here is my response:", ("", "")), ("analysisWe see. ",
                "assistantfinal", ("", "")))  # fmt: skip


class Case(NamedTuple):
    """A body, and what must come of it: speech, or an error with a reason."""

    way: str
    body: bytes
    speech: str
    reason: str = ""


def texts(rng: random.Random, pool: tuple[str, ...]) -> str:
    """Join a few texts of a pool into one."""
    return " ".join(rng.choices(pool, k=rng.randint(1, 4)))


def thoughts(rng: random.Random) -> str:
    """Make up thoughts that can be told from speech: each of their pieces holds a word that nobody says."""
    return " ".join(f"{part} zq{rng.randrange(1000)}xv." for part in rng.choices(THOUGHT, k=rng.randint(1, 4)))


def completion(content: Any, finish_reason: str = "stop", **message: Any) -> bytes:
    """Write a completion's body."""
    message = {"role": "assistant", "content": content} | message
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    usage = {"prompt_tokens": 9, "completion_tokens": 9}
    return json.dumps({"object": "chat.completion", "choices": [choice], "usage": usage}).encode()


def plain(rng: random.Random) -> Case:
    """Speech alone."""
    said = texts(rng, SPOKEN)
    return Case("plain", completion(said), said)


def at_the_start(rng: random.Random) -> Case:
    """Thoughts, then speech; perhaps in two blocks."""
    opening, closing, (before, after) = rng.choice(AT_THE_START)
    said, block = texts(rng, SPOKEN), opening + thoughts(rng) + closing
    if opening[0] != "H" and opening[0] != "a" and "channel|>" not in opening and rng.random() < 0.3:
        block += opening + thoughts(rng) + closing
    return Case("thoughts first", completion(block + before + said + after), said)


def in_the_middle(rng: random.Random) -> Case:
    """Thoughts that begin a line, between two lines of speech."""
    opening, closing, _ = rng.choice(SPELLED[:15])
    first, second = texts(rng, SPOKEN), texts(rng, SPOKEN)
    body = completion(f"{first}\n{opening}{thoughts(rng)}{closing}\n{second}")
    return Case("thoughts between", body, f"{first} {second}")


def no_opening(rng: random.Random) -> Case:
    """Thoughts whose opening mark stands in the prompt."""
    _, closing, (before, after) = rng.choice(SPELLED)
    said = texts(rng, SPOKEN)
    return Case("opening absent", completion(thoughts(rng) + closing + before + said + after), said)


def never_closed(rng: random.Random) -> Case:
    """Thoughts that are cut off, perhaps after speech, or that nothing follows."""
    opening, closing, _ = rng.choice(AT_THE_START)
    first = f"{texts(rng, SPOKEN)}\n" if rng.random() < 0.3 and (opening, closing, _) in SPELLED[:15] else ""
    closed = not first and rng.random() < 0.3
    body = completion(f"{first}{opening}{thoughts(rng)}{closing * closed}", rng.choice(("length", "stop")))
    return Case("never closed", body, "", "only_thoughts")


def in_parts(rng: random.Random) -> Case:
    """A list of parts: thinking in its own, or in the text; or one that is no speech at all."""
    said = texts(rng, SPOKEN)
    thinking = rng.choice((
        {"type": "thinking", "thinking": [{"type": "text", "text": thoughts(rng)}]},
        {"type": "reasoning", "text": thoughts(rng)}, {"type": "redacted_thinking", "data": thoughts(rng)},
    ))  # fmt: skip
    at = rng.randrange(len(said))
    content = [thinking, {"type": "text", "text": said[:at]}, {"type": "text", "text": said[at:]}]
    match rng.randrange(5):
        case 0:
            return Case("parts", completion(content[:1]), "", "only_thoughts")
        case 1:
            return Case("parts", completion([*content, {"type": "refusal", "refusal": thoughts(rng)}]), "", "refused")
        case 2:
            return Case("parts", completion([*content, {"type": "image_url", "url": "x"}]), "", "bad_schema")
        case 3:
            content[1]["text"] = f"<think>{thoughts(rng)}</think>{said[:at]}"
    return Case("parts", completion(content), said)


def unsaid(rng: random.Random) -> Case:
    """Nothing, a refusal, or a reply that broke off."""
    said, private = texts(rng, SPOKEN), thoughts(rng)
    return Case("unsaid", *rng.choice((
        (completion(None, "length", reasoning_content=private), "", "no_text"),
        (completion(None, "tool_calls", tool_calls=[{"function": {"arguments": private}}]), "", "no_text"),
        (completion(rng.choice(("", " \n", [])), reasoning=private), "", "empty"), (b" ", "", "empty"),
        (completion(None, refusal=private), "", "refused"), (completion(private, "content_filter"), "", "refused"),
        (completion(private, rng.choice(("error", "abort"))), "", "broken_off"),
        (completion(said).replace(b'"index"', b'"error": {"message": "lost"}, "index"'), "", "broken_off"),
    )))  # fmt: skip


def cut_off(rng: random.Random) -> Case:
    """Speech that ends at max_tokens, after thoughts perhaps."""
    said = texts(rng, SPOKEN)
    said = said[: rng.randint(1, len(said))].rstrip("< `\n") or "Hm"
    block = rng.choice(("", f"<think>{thoughts(rng)}</think>"))
    return Case("length", completion(block + said, "length"), said)


def malformed(rng: random.Random) -> Case:
    """What is no completion."""
    whole = completion(f"<think>{thoughts(rng)}</think>{texts(rng, SPOKEN)}")
    return Case("malformed", *rng.choice((
        (whole[: rng.randrange(1, len(whole))], "", "bad_json"),
        (b"data: " + whole + b"\n\ndata: [DONE]\n", "", "bad_json"),
        (b'{"error": {"message": "overloaded"}}', "", "bad_schema"), (b'{"choices": []}', "", "bad_schema"),
        (completion(7), "", "bad_schema"), (b"[" * 5000, "", "bad_json"),
    )))  # fmt: skip


WAYS: tuple[Callable[[random.Random], Case], ...] = (
    plain, at_the_start, in_the_middle, no_opening, never_closed, in_parts, unsaid, cut_off, malformed,
)  # fmt: skip


def faults(case: Case) -> tuple[str, list[str]]:
    """Return the outcome of a case, and what is wrong with it."""
    try:
        reply = parse_reply(case.body)
    except ChatError as error:
        leaked = "xv." in str(error) and case.reason in ("no_text", "empty", "only_thoughts", "broken_off")
        return error.reason, ["reason"] * (error.reason != case.reason) + ["thought in an error"] * leaked
    found = ["no error"] * bool(case.reason) + ["thought in speech"] * ("zq" in reply or "xv" in reply)
    found += ["speech lost"] * (not case.reason and reply.split() != case.speech.split())
    found += ["fact in the ledger"] * (not disclosed(FACTS, [reply]) <= disclosed(FACTS, [case.speech]))
    return "length" if reply.cut else "thoughts cut" if reply.thoughts else "speech", found


def run(number: int, seed: int = 0, show: int = 5) -> tuple[Counter[tuple[str, str]], Counter[str]]:
    """Try so many cases; return how many had which outcome by their way, and how many faults were found."""
    rng, outcomes, wrong = random.Random(seed), Counter(), Counter()
    for i in range(number):
        case = WAYS[i % len(WAYS)](rng)
        outcome, found = faults(case)
        outcomes[case.way, outcome] += 1
        wrong.update(found)
        if found and wrong.total() <= show:
            print(f"{case.way}: {found}\n  {case.body!r}\n  wanted {case.speech or case.reason!r}", file=sys.stderr)
    return outcomes, wrong


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=10_000, help="completions")
    parser.add_argument("--seed", type=int, default=0, help="of what they hold")
    options = parser.parse_args()
    start = time.perf_counter()
    outcomes, wrong = run(options.number, options.seed)
    for (way, outcome), n in sorted(outcomes.items()):
        print(f"{n:>8,}  {way:<18}{outcome}")
    took = f"seed {options.seed}, {time.perf_counter() - start:.1f} s"
    print(f"{options.number:,} completions, {took}: {wrong.total()} faults{f' {dict(wrong)}' if wrong else ''}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
