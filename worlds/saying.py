"""A plan in the words of a language model: the request that it says one, and the check that it did.

Small models that are told to play a person confuse the roles and take the assistant's part, and they leave facts out or
make them up. They rewrite a given message well. So a request is one message with a draft to rewrite. It holds the facts
to tell and no others, and the question that the assistant asked. Pure functions of text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from worlds.ledger import FUNCTION_WORDS, sentences, split_fact, words
from worlds.vocabulary import NUMBERS, TENS

REQUEST = """\
Rewrite a chat message in other words, as one short, natural sentence in the first person. Keep its meaning, add \
nothing, and ask nothing.

{context}The message: {draft}

The message in other words{keep}:"""
SILENT = {  # drafts of messages that tell nothing, by the reason of the plan; small models turn questions round
    "": [
        "I am fine with that.",
        "I need a moment to think about that.",
        "I see what you mean.",
        "I am not so sure.",
    ],
    "told": ["I have told you this already.", "I have said that before.", "I told you that a moment ago."],
    "unknown": ["I would rather not talk about that.", "I do not want to say that.", "I keep that to myself."],
    "later": ["I will come to that later.", "I will tell that another time.", "I am not ready to say that yet."],
    "echo": ["I have heard that from you before.", "I have heard these words already."],
}
CONTEXT = "The message answers this: {question}\n"
TOLD_SHARE = 0.55  # of the words of a sentence that is to be told
MOST_SENTENCES, MOST_WORDS = 3, 30  # of a message, beside the words of its facts
# What an assistant says, and no user.
ASSISTANT = re.compile(
    r"\b(?:(?:how|what) (?:can|could|may|else can) (?:i|we) (?:help|assist|do for)|(?:can|may|could) i (?:help|assist)"
    r"|as an? (?:ai|language|virtual|large)|language model|i(?:'m| am) (?:just )?an? (?:ai|assistant|chatbot"
    r"|virtual|computer|bot)\b|(?:here|happy|glad|ready) to (?:help|assist|answer|listen|chat)|assist you|help you"
    r"|feel free to|let me know|at your service|anything else (?:i|you)|would you like|do you (?:need|want|have any)"
    r"|thank you for|thanks for|nice to meet|tell me (?:more|about)|happy to|glad to|you(?:'re| are) welcome)\b",
    re.IGNORECASE,
)  # fmt: skip
PREFACE = re.compile(r"(?:\w+[,!.] )?here(?:'s| is)[^:\n]*:\s*(.+)", re.IGNORECASE)  # of models that like to explain
RECITED = re.compile(r"\b(?:the (?:person|assistant|message)|rewr\w+|chat message|first person)\b", re.IGNORECASE)
YOURS, MINE = re.compile(r"\byou(?:r|'ve|'re| have| are)\b", re.IGNORECASE), re.compile(r"\b(?:I|me|my|My)\b")
# What a message claims of its speaker: too much where nothing is to be told.
CLAIM = re.compile(
    r"\bmy name|\bcall me|\bI(?:'m| am) (?:from|in|at|an?|\d)|\bI (?:live|work|stud|have (?:an?\b|\d)|own|love|like)"
    r"|\bmy (?:job|work|wife|husband|kids|children|family|hobby|home|city|age|degree)",
    re.IGNORECASE,
)
DENIAL = {"not", "no", "never", "neither", "nor", "without", "cannot"}
UNITS = {word: i for i, word in enumerate(NUMBERS)}
TEN_TIMES = {word: 10 * i for i, word in enumerate(TENS, start=2)}


def request(draft: str, tell: Sequence[str], reply: str) -> str:
    """Write the message that asks a language model to say a draft in its own words.

    tell: the facts that the draft tells; their values must stay. reply: what the draft answers; may be empty. Only a
    question at its end is shown, and only if facts are told: a small model would rather answer by itself, and make
    facts up.
    """
    values = [value for slot, value in map(split_fact, tell) if slot]
    keep = f", with {' and '.join(map(repr, values))} in it" if values else ""
    question = (sentences(reply) or [""])[-1]
    context = CONTEXT.format(question=question) if tell and question.endswith("?") else ""
    return REQUEST.format(keep=keep, context=context, draft=draft)


def tidy(text: str) -> str:
    """Return a message without line breaks, quotation marks around it, and a preface that announces it.

    >>> tidy('"I live in Oslo." '), tidy("Sure, here's the message:\\n\\nI live in Oslo.\\n\\nIt is natural.")
    ('I live in Oslo.', 'I live in Oslo.')
    """
    announced = PREFACE.match(text.replace("’", "'").strip())
    text = " ".join((announced[1] if announced else text).split())
    quoted = re.fullmatch(r"[\"“”']([^\"“”]*)[\"“”']", text)
    return quoted[1].strip() if quoted else text


def complaint(text: str, tell: Sequence[str], known: Sequence[str], hidden: Sequence[str], reply: str) -> str:
    """Return what is wrong with a message: "role", "echo", "long", "missing", "leak" or "claim"; "" if nothing is.

    tell: the facts that it must tell. known: those that it may tell again. hidden: those that it must not tell.
    reply: what the assistant said last.

    >>> complaint("I moved to Oslo.", ["Location: Oslo"], [], ["Age: 34"], "Where do you live?")
    ''
    >>> complaint("I am 34 and live in Oslo.", ["Location: Oslo"], [], ["Age: 34"], "Where do you live?")
    'leak'
    """
    plain = text.replace("’", "'")
    turned = YOURS.search(plain) and (tell or not MINE.search(plain))  # it speaks of the assistant instead
    turned = turned or plain.lower().startswith("you ") and not (tell and MINE.search(plain))
    if turned or _asks(text) or ASSISTANT.search(plain) or RECITED.search(text):
        return "role"
    said = " ".join(split_fact(fact)[1] for fact in tell)
    if overlap(text, reply, said) > 0.5:
        return "echo"
    if len(sentences(text)) > MOST_SENTENCES or len(words(text)) > MOST_WORDS + sum(len(words(fact)) for fact in tell):
        return "long"
    if not all(states(fact, text, TOLD_SHARE) for fact in tell):
        return "missing"
    if any(states(fact, text) and not states(fact, said) for fact in hidden):  # one may lie within another
        return "leak"
    return "claim" if not tell and CLAIM.search(plain) and not any(states(fact, text) for fact in known) else ""


def _asks(text: str) -> bool:
    """Tell whether a message ends with a question, or asks the assistant; "My job? I am a nurse." does not."""
    questions = [sentence for sentence in sentences(text) if sentence.endswith("?")]
    return text.endswith("?") or any(re.search(r"\byour?\b", question, re.IGNORECASE) for question in questions)


def overlap(text: str, reply: str, own: str = "") -> float:
    """Return the share of a text's word trigrams that stand in a reply; those with a word of `own` do not count.

    >>> overlap("So you have a cat.", "So you have a cat."), overlap("I have a cat.", "So you have a cat.", "cat")
    (1.0, 0.0)
    """
    said, heard, mine = words(text), f" {' '.join(words(reply))} ", set(words(own))
    runs = [run for i in range(len(said) - 2) if not mine & set(run := said[i : i + 3])]
    return sum(f" {' '.join(run)} " in heard for run in runs) / max(1, len(runs))


def states(fact: str, text: str, share: float = 0.5) -> bool:
    """Tell whether a text states a fact, and does not deny it; endings, hyphens and number words may differ.

    A value of a slot must stand in one sentence with all its words, other ones in between; prose with a share of them.

    >>> states("Age: 34", "Thirty-four."), states("Family Background: two sons", "I have 2 grown sons.")
    (True, True)
    >>> states("Marital Status: single", "I'm not single."), states("Location: Oslo", "I live in Paris.")
    (False, False)
    """
    slot, value = split_fact(fact)
    if slot and len(words(value)) <= 4:
        wanted = _plain(value)
        return bool(wanted) and any(_holds(_plain(sentence), wanted) for sentence in sentences(text))
    wanted = set(_plain(value)) - FUNCTION_WORDS
    return bool(wanted) and len(wanted & set(_plain(text))) >= share * len(wanted)


def _holds(said: tuple[str, ...], wanted: tuple[str, ...]) -> bool:
    """Tell whether words hold all wanted ones, and no denial stands shortly before the first of them."""
    if not set(wanted) <= set(said):
        return False
    start = min(said.index(word) for word in wanted)
    return not any(word in DENIAL or word.endswith("n't") for word in said[max(0, start - 3) : start])


@lru_cache(maxsize=1 << 14)
def _plain(text: str) -> tuple[str, ...]:
    """List a text's words without articles, in lower case, without their endings, and numbers in digits.

    >>> _plain("Forty-two sets of Boxes"), _plain("rowing, skating") == _plain("I row and skate")[1::2]
    (('42', 'set', 'of', 'box'), True)
    """
    found: list[str] = []
    tens = 0
    for word in re.findall(r"\w+(?:['’]\w+)*", text.casefold().replace("’", "'")):
        if tens and 0 < UNITS.get(word, 0) < 10:
            found[-1], tens = str(tens + UNITS[word]), 0
            continue
        tens = TEN_TIMES.get(word, 0)
        number = UNITS.get(word, tens or None)
        if word not in ("a", "an", "the"):
            found.append(_stem(word) if number is None else str(number))
    return tuple(found)


def _stem(word: str) -> str:
    """Cut off a plural, an -ing, and the -e that it replaces, roughly."""
    if len(word) > 4 and word.endswith("ies"):
        return f"{word[:-3]}y"
    if word.endswith(("ches", "shes", "xes", "sses")):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    if len(word) > 5 and word.endswith("ing"):
        word = word[:-4] if word[-4] == word[-5] else word[:-3]  # knitting, rowing
    return word[:-1] if len(word) > 3 and word.endswith("e") else word
