"""Prose personas as single facts, by rule: "He plays the guitar and lives in Austin." holds two of them.

A profile line can state one fact only, so that a sentence with five facts in it could never be stated.
"""

from __future__ import annotations

import re

VERBS = """is has enjoys loves likes plays works lives collects owns runs makes knits builds volunteers writes
speaks teaches studies practices prefers hates dislikes drives rides grew grows bakes cooks paints reads sings
dances travels keeps wants dreams hopes follows suffers suffered spends was moved holds got does can cannot tends
values believes participates gives graduated majored retired listens watches dropped started struggles raises
coaches organizes""".split()
ADVERBS = (
    r"(?:also |often |always |usually |frequently |regularly |sometimes |never |currently |recently |really |now )*"
)
LISTS = r"(?:enjoys|loves|likes|hates|dislikes|collects|plays|practices|speaks|is interested in|is passionate about)"
WORKING = {"working": "works", "living": "lives", "studying": "studies", "running": "runs", "raising": "raises"}
_CLAUSE = re.compile(rf"(?:,? (?:and|but)|,) (?:s?he |they )?(?={ADVERBS}(?:{'|'.join(VERBS)})\b)")
_PARTICIPLE = re.compile(rf", ({'|'.join(WORKING)})\b")


def single_facts(sentence: str) -> list[str]:
    """Split a sentence about him or her into sentences of one fact each; any other sentence is returned as it is.

    >>> single_facts("He plays the guitar and lives in Austin.")
    ['He plays the guitar.', 'He lives in Austin.']
    >>> single_facts("She is a 29-year-old baker who enjoys chess, hot yoga, and reading.")[:3]
    ['She is 29 years old.', 'She is a baker.', 'She enjoys chess.']
    >>> single_facts("She has a twin sister who lives in Spain.")
    ['She has a twin sister who lives in Spain.']
    """
    match = re.fullmatch(r"(s?he|they)(?:['’]s)? (.+?)[.!]*", sentence.strip(), re.IGNORECASE)
    if not match:
        return [sentence]
    subject = match[1].capitalize()
    predicate = match[2] if sentence.strip()[len(subject)] == " " else f"is {match[2]}"
    return [f"{subject} {fact}." for clause in _clauses(predicate) for fact in _list(clause) if fact]


def _clauses(predicate: str) -> list[str]:
    """Split a predicate at the verbs that share its subject; an age comes first."""
    age = re.match(r"is an? (\d+)[- ]years?[- ]old(?: (?P<rest>.+))?$", predicate)
    if age:
        rest = re.sub(r"^(?=[^,])", "is a ", age["rest"] or "")
        rest = re.sub(r"^is a (?=[aeio])", "is an ", re.sub(r"^is a (who|and|,)\b ?", "", rest))
        return [f"is {age[1]} years old", *(_clauses(rest) if rest else [])]
    predicate = _PARTICIPLE.sub(lambda found: f", {WORKING[found[1]]}", predicate)
    if predicate.startswith("is a"):  # only there it is the person who …
        predicate = re.sub(rf",? who (?={ADVERBS}(?:{'|'.join(VERBS)})\b)", ", ", predicate, count=1)
        predicate = re.sub(r",(?: and)? (?=an? )", ", is ", predicate)
    return [clause.strip(" ,") for clause in _CLAUSE.split(predicate)]


def _list(clause: str) -> list[str]:
    """Split what is enjoyed, played or collected into one clause each, where the parts are short."""
    match = re.fullmatch(rf"({ADVERBS}{LISTS}) (.+)", clause)
    parts = re.split(r",? and |, ", match[2]) if match else []
    bound = re.compile(r"\b(?:with|of|between|his|her|their)\b")  # "camping with his wife and children" is one fact
    short = all(0 < len(part.split()) <= 3 and not bound.search(part) for part in parts)
    return [f"{match[1]} {part}" for part in parts] if len(parts) > 1 and short else [clause]
