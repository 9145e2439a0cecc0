"""Profile lines in other words: does a line state a fact, although it is worded differently?

`states` reads top-down. Both texts become stems: numbers as digits, synonyms as one word. What would make another
statement of the same words is compared: negation, former times and wishes, numbers, what is preferred to what, whose it
is, which slot. Then each word of the fact must be found in the line: its stem, or with `similarity` a word left over
that a sentence encoder puts close enough. The encoder never decides alone: it accepts about half of all lines that name
the same slot with another value.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from worlds.ledger import FUNCTION_WORDS, SLOTS, split_fact

Similarity = Callable[[str, str], float]  # of two words or short phrases
MAY_MISS = 4  # of so many words of a fact one may be missing, if the line has no other in its place
CLOSE = 0.7  # similarity from which on two words mean the same (docs/evaluation.md has the table)

# ---------------------------------------------------------------------------------------------------------------------
# Words that mean the same

PHRASES = {  # pattern → what stands for it; applied in this order to the lower-case text
    r"[’']s\b|(?<=s)[’'](?= )": "",
    r"\bcan(?:[’']t|not)\b": "can not",
    r"n[’']t\b": " not",
    r"(?<=\w{2})our(?=s|ed|ing|ite|able|\b)": "or",  # colour, favourite
    r"\bnon-?(?=smok|drink)": "not ",
    r"\b(child|job)less\b": r"no \1",
    r"\bph\.?\s?d\b\.?|\bdoctorate\b": "phd",
    r"\bsci-?fi\b": "science fiction",
    r"\bb\.?(?:sc|a)\b\.?|\bbachelor of \w+\b": "bachelor degree",
    r"\bm\.?(?:sc|a)\b\.?|\bmaster of (?:science|arts)\b": "master degree",
    r"\bworks? (?:very |really )?hard\b|\bhard-working\b": "hardworking",
    r"\b(?:no|without) (?:any )?(?:siblings|brothers (?:or|and) sisters)\b": "only child",
    r"\b(?:no|without|not have)(?: any)? (?:children|kids|child)\b": "no child",
    r"\bout of (?:work|a job)\b|\b(?:no|without(?: a| any)?) job\b": "unemployed",
    r"\b(?:can not|no|unable to) (?:eat|digest|tolerate)\b|\ballergic to\b|\bintoleran(?:t|ce)(?: to| of)?\b": "allergy",
    r"\b(?:for|earns?) (?:a|his|her|their) living\b|\bby (?:trade|profession)\b": "job",
    r"\bspent (?:his|her|their) childhood\b": "grew up",
    r"\b(?:trouble|difficulty|problems) sleeping\b": "insomnia",
    r"\bno animal products\b": "vegan",
    r"\bnot interested in\b|\bno interest in\b|\bbor(?:ing|ed by)\b|\bcan not stand\b": "dislikes",
    r"\b(?:fan|fond) of\b|\bkeen on\b|\b(?:passionate|enthusiastic) about\b|\binterest(?:ed)? in\b": "likes",
    r"\b(?:gets?|is|wakes?) up early\b|\bmorning person\b": "early riser",
    r"\bnon-binary\b": "nonbinary",
    r"\b(?:free|spare|leisure) time\b": "hobby",
    r"\babstains? from\b": "not drink",
    # marital status
    r"\bno longer married\b|\bex-?(?:wife|husband|spouse)\b|\bdivorc[eé]e?\b": "divorced",
    r"\blost (?:his|her|their|a) (?:wife|husband|spouse)\b|\bwidow(?:er)?\b": "widowed",
    r"\bliv\w+ apart from (?:his|her|their) (?:wife|husband|spouse)\b": "separated",
    r"\bfianc[eé]e?\b|\bgetting married\b": "engaged",
    r"\bunmarried\b|\bno partner\b|\bnot (?:in a relationship|seeing anyone|dating anyone)\b": "single",
    r"\b(?:has|with) (?:a|his|her|their) (?:wife|husband|spouse)\b": "married",
    r"\bsteady\b": "long-term",
    r"\bha(?:s|s had|d) an? (?:([\w-]+) )?(?:partner|girlfriend|boyfriend)\b": r"\1 relationship",
}
SYNONYMS = """woman female|man male|father dad daddy|mother mom mum|child kid|grandfather granddad grandpa|son boy|daughter girl
grandmother grandma|parent folk|marry wed|house home|small little tiny|large big huge|movie film|food dish meal cuisine|own owner keep
like enjoy love fan enthusiast lover aficionado avid passion adore|hobby pastime|job work employ profession occupation|run operate
speak fluent|study learn|train educate|poem poetry|math maths mathematics|raise grow bring upbringing|year yr|day daily|near outside
reside live settle locate base dwell|fear afraid scare phobia|car automobile|begin start|buy purchase|help assist|sick ill
move relocate|travel tour|bicycle bike|photo photograph|picture photo|pain ache|lawyer attorney|cook chef|doctor physician
firefighter fireman|police policeman cop|programmer developer coder|teacher instructor|journalist reporter|veterinarian vet
trucker truck|sociable outgoing extroverted gregarious|shy timid bashful|cheerful happy|stubborn headstrong|calm easygoing relaxed
funny humorous witty|smart intelligent clever|inquisitive curious|honest truthful|generous giving|anxious nervous worried
ambitious driven|brave fearless courageous|organized tidy neat|modest humble|talkative chatty|hardworking diligent industrious
kind caring compassionate|creative imaginative|lazy idle|reliable dependable|frugal thrifty|moody temperamental
"""  # the words of a group have one stem from here on: the commonest words of the ten slots
IRREGULAR = """taught teach|wrote write|grew grow|grown grow|brought bring|broke break|broken break|drove drive|spoke speak
ran run|left leave|kept keep|made make|bought buy|sold sell|built build|children child|women woman|men man|wives wife
went go|gone go|learnt learn|swam swim|sang sing|slept sleep|does do|going go|got get|yrs year|knives knife"""
NUMBERS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
eighteen nineteen""".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()

# ---------------------------------------------------------------------------------------------------------------------
# What makes another statement of the same words

NEGATION = r"\b(?:not?|never|nor|neither|without|nothing|hates?|dislikes?|unable|lacks?|avoids?)\b"
ENDED = (
    r"\b(?:former(?:ly)?|ex|used to|no longer|once|retired|retiring|gave up|quit|stopped|sold|ended|broke off|moved away"
    r"|dropped out|in the past)\b"
)
WISHED = r"\b(?:wants?|would like to|dreams?|plan(?:s|ning) to|hopes?|wish(?:es)?|some ?day|will)\b"
PAST = r"\b(?:was|were|had|worked|lived|taught|grew up|(?:as|in) (?:a child|childhood))\b"
LESS = re.compile(r"\b(?:over|than|instead of|(?:prefer|rather)\w* .* to)\b(?! *\d)(.*)")  # what something is preferred to
FROM = re.compile(r"\bfrom (\w+)")
OPPOSITES = """introverted extroverted|shy outgoing|old young|older younger|oldest youngest|left right|early late
liberal conservative|optimistic pessimistic|morning evening|day night|rural urban|vegan vegetarian|lazy hardworking
summer winter|indoor outdoor|calm anxious|tidy messy|small big|married divorced single widowed separated engaged|full-time part-time
Monday Tuesday Wednesday Thursday Friday Saturday Sunday"""  # what an encoder takes for the same
KIN = """brother sister father mother parent wife husband friend boyfriend girlfriend uncle aunt cousin grandfather
grandmother son daughter boss ancestor"""
LIGHT = """user person people someone individual currently now today very really quite often usually regularly always also even still
already just only ever up out off away self own like job year yet say s t re ve d ll m one lot much many more most such way while each
every all any during before after when because since though another both other etc go do get become feel make take put use play try
need start want dream hope plan wish prefer rather over than instead degree consider identify describe him himself herself themselves
themself myself name call able good great well kind type thing sort part regular"""  # words that need not be found, and add nothing
CUES = {  # slot → words that may stand around its value, and words that by themselves speak of that slot
    "Age": ("age old turn birthday yr y o early late twenties thirties sixties", "birthday"),
    "Gender": ("gender identify pronoun", ""),
    "Interests": ("hobby interest weekend into game play spend watch listen read go practice", "like hobby"),
    "Educational Background": (
        "educational education background degree study graduate school university college major train hold earn complete "
        "diploma finish receive attend go level",
        "study degree university graduate school major train attend",
    ),
    "Personality Traits": ("personality trait describe see nature show value tend consider", ""),
    "Occupation": ("office practice", "job retire teach sell"),
    "Marital Status": ("marital status relationship spouse husband wife last recent happy ago", "marry divorce"),
    "Family Background": ("family background relative grow home sibling child come", ""),
    "Location": ("location reside home city country town current move", "reside"),
    "Others": ("suffer follow diet pet around condition use need", ""),
}
MOST_EXTRA = {"Age": 0, "Gender": 0, "Marital Status": 1}  # words of a line that are neither the value nor around it


class Statement(NamedTuple):
    """What a text says, in the parts that are compared."""

    slot: str | None  # that it names by a label, as in "Age: 34"
    words: dict[str, str]  # stem → the word as it stood, in order
    turns: tuple[bool, bool, bool]  # negated, over, only wished for
    past: bool
    less: frozenset[str]  # stems of what something else is preferred to
    origin: frozenset[str]  # where something comes from


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
    found = _find(said.words, wanted.words, similarity)
    return found is not None and not _strays(said, wanted, found)


def _contradicts(said: Statement, wanted: Statement) -> bool:
    """Tell whether the line says the same words of another time, with or without "not", or the other way round."""
    swapped = bool(wanted.less) and not said.less & wanted.less
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
    if slot is None:
        extra = words - found - _stems(LIGHT)
        return len(extra) > 2 + len(wanted.words) // 4 or any(word.isdigit() for word in extra)
    around, _ = CUES[slot]
    extra = words - found - _stems(LIGHT) - _stems(around)
    if any(word.isdigit() for word in extra) and slot != "Marital Status":
        return True
    own = any(words & _stems(strong) for other, (_, strong) in CUES.items() if other == slot) or said.slot
    foreign = any((words - found) & _stems(strong) for other, (_, strong) in CUES.items() if other != slot)
    return len(extra) > MOST_EXTRA.get(slot, 2) or foreign and not own


def _find(said: dict[str, str], wanted: dict[str, str], similarity: Similarity | None) -> set[str] | None:
    """Return the stems of the line that say what the fact says, None if a word of the fact is not there."""
    needed = {stem: word for stem, word in wanted.items() if stem not in _stems(LIGHT)} or wanted
    found = set(needed) & set(said) | _compounds(said, needed)
    missing = [word for stem, word in needed.items() if stem not in found]
    left = {stem: word for stem, word in said.items() if stem not in found and stem not in _stems(LIGHT)}
    if missing and not left and len(missing) <= len(needed) // MAY_MISS and not any(map(str.isdigit, missing)):
        return found | (set(wanted) & set(said))  # a long fact, told in fewer words, and nothing else in their place
    if missing and (similarity is None or len(missing) > max(1, len(needed) // 2)):
        return None
    for word in missing:
        likely = [(similarity(word.casefold(), other.casefold()), stem) for stem, other in left.items() if _may_mean(word, other)]
        if not likely or max(likely)[0] < CLOSE:
            return None
        found.add(max(likely)[1])
    return found | (set(wanted) & set(said))


def _compounds(said: dict[str, str], needed: dict[str, str]) -> set[str]:
    """Return the stems of both that are one word here and two words there ("easy-going", "birdwatching")."""
    found = set()
    for one, two in ((said, needed), (needed, said)):
        for (first, a), (second, b) in itertools.pairwise(two.items()):
            if (whole := stem((a + b).casefold())) in one:
                found |= {whole, first, second}
    return found


def _may_mean(word: str, other: str) -> bool:
    """Tell whether two words can mean the same: no names, numbers or opposites."""
    pair = {stem(word.casefold()), stem(other.casefold())}
    opposed = any(len(pair & _stems(group)) == 2 for group in OPPOSITES.split("\n") for group in group.split("|"))
    return word.islower() and other[1:].islower() and not opposed and not pair & _stems(KIN)


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
    capitals = {word.casefold(): word for word in re.findall(r"\w+", value)}
    words = {stem(word): capitals.get(word, word) for word in _tokens(plain) if word not in FUNCTION_WORDS}
    turns = tuple(bool(re.search(pattern, plain)) for pattern in (NEGATION, ENDED, WISHED))
    less, origin = (frozenset(map(stem, _tokens(found[1]))) if (found := x.search(plain)) else frozenset() for x in (LESS, FROM))
    return Statement(slot, words, turns, bool(re.search(PAST, plain)), less, origin)


LABELS = {  # stem of a label's first word → slot
    "ag": "Age", "gender": "Gender",
}


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
    r"(?:(?<=\w{3})(?:ers?|ings?|ed|es|s|ly|e|y|i)"
    r"|(?<=\w{4})(?:istry|ists?|ors?|ity|ions?|at|[ae]nce|[ae]nts?|ments?|ous|ics?|al|ful))$"
)


@lru_cache(maxsize=1 << 14)
def stem(word: str) -> str:
    """Cut a word down to what it shares with its relatives, and put one for all its synonyms.

    >>> [stem(word) for word in ("baking", "baker", "children", "kids", "allergies", "allergic")]
    ['bak', 'bak', 'child', 'child', 'allerg', 'allerg']
    """
    return _synonyms().get(_cut(word), _cut(word))


def _cut(word: str) -> str:
    word = dict(pair.split() for pair in re.split(r"[|\n]", IRREGULAR)).get(word, word)
    while (shorter := _SUFFIX.sub("", word)) != word:
        word = re.sub(r"([bdgklmnprt])\1$", r"\1", shorter)
    return word


@lru_cache(maxsize=1)
def _synonyms() -> dict[str, str]:
    groups = [[_cut(word) for word in group.split()] for group in re.split(r"[|\n]", SYNONYMS)]
    return {word: group[0] for group in groups for word in group}


@lru_cache(maxsize=256)
def _stems(text: str) -> frozenset[str]:
    return frozenset(stem(word) for word in re.findall(r"[^\W\d_]+", text.casefold()))
