"""The prompting baselines of the paper (appendix D; recipes of PrefEval): ways to ask a chat model for its next reply.

A method is a generator. It is given the dialogue so far, yields the messages of one call after another, is sent what
the model answered, and returns the reply that the user gets to see. So the same method serves an endpoint, which
answers one call at a time, and a batched sampler, which answers those of all dialogues at once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Generator, Sequence

import numpy as np

from untrusted.plain_text import indented
from worlds import ledger

Message = dict[str, str]  # {"role": ..., "content": ...}
Method = Callable[[ledger.History], Generator[list[Message], str, str]]

CHAT = "You chat with a user. Write your next reply, as you would say it, and nothing else."
REMINDER = """In your reply, take into account what the user has told you earlier in this chat, and give an answer \
that fits the user's preferences."""
CRITIQUE = """Do not reply to the user yet. In two sentences, criticise your reply above: does it fit what the user \
has told you so far, and will the user want to go on talking?"""
REWRITE = "Now rewrite your reply in the light of that critique. Write the new reply and nothing else."
ANSWER_TAG = "<answer>"
THINK = f"""You chat with a user. Think step by step first: what has the user told you about themselves, what do they \
want now, and which reply fits them? Then write {ANSWER_TAG} and after it your reply to the user, and nothing else.

Example:
The user works nights as a nurse and sounds tired. Advice is not wanted; interest is. I take up the night shift and \
ask what comes after it.
{ANSWER_TAG} Night shifts as a nurse must wear you out. What do you do to unwind when you get home?"""
RETRIEVED = "Earlier exchanges of this chat that bear on the user's newest message, most fitting first:\n\n{exchanges}"
TOP_EXCHANGES = 5


def messages_of(system: str, history: ledger.History) -> list[Message]:
    """Write a dialogue as chat messages behind a system prompt."""
    return [{"role": "system", "content": system}, *({"role": role, "content": text} for role, text in history)]


def base(history: ledger.History, system: str = CHAT) -> Generator[list[Message], str, str]:
    """Ask once, with a plain system prompt."""
    return (yield messages_of(system, history))


def reminder(history: ledger.History) -> Generator[list[Message], str, str]:
    """Ask once, with a reminder of the user's preferences as the newest system message."""
    return (yield [*messages_of(CHAT, history), {"role": "system", "content": REMINDER}])


def self_critic(history: ledger.History) -> Generator[list[Message], str, str]:
    """Ask three times: a draft, a critique of two sentences, and the draft rewritten."""
    messages = messages_of(CHAT, history)
    for instruction in (CRITIQUE, REWRITE):
        answer = yield messages
        messages = [*messages, {"role": "assistant", "content": answer}, {"role": "user", "content": instruction}]
    return (yield messages)


def cot(history: ledger.History) -> Generator[list[Message], str, str]:
    """Ask once for thoughts and a reply; the user sees what follows the last tag, or all of it if there is none."""
    thoughts = yield messages_of(THINK, history)
    reply = thoughts.rpartition(ANSWER_TAG)[2].replace(ANSWER_TAG.replace("<", "</"), "").strip()
    return reply or thoughts


def rag(history: ledger.History) -> Generator[list[Message], str, str]:
    """Ask once, reminded of the five earlier exchanges that are most like the user's newest message."""
    earlier, newest = history[:-1], history[-1][1]
    exchanges = [
        f"User: {indented(said)}\nAssistant: {indented(reply)}"
        for (_, said), (_, reply) in zip(earlier[::2], earlier[1::2], strict=True)
    ]
    found = "\n\n".join(exchanges[i] for i in retrieve(newest, exchanges, TOP_EXCHANGES))
    system = f"{CHAT} {REMINDER}\n\n{RETRIEVED.format(exchanges=found)}" if found else CHAT
    return (yield messages_of(system, history))


METHODS: dict[str, Method] = {"base": base, "reminder": reminder, "self_critic": self_critic, "cot": cot, "rag": rag}


def retrieve(query: str, documents: Sequence[str], top: int, k1: float = 1.5, b: float = 0.75) -> list[int]:
    """Rank documents by BM25 (Robertson and Zaragoza, 2009) and return the `top` best, best first.

    score = Σ over words of the query: idf · tf (k1 + 1) / (tf + k1 (1 − b + b · length ÷ mean length)),
    idf = log(1 + (N − n + ½) / (n + ½)) with n of N documents holding the word. Ties: the newer document; what shares
    no word is ranked too, last, so that a short history is always given whole.

    >>> retrieve("Do you like chess?", ["I play chess a lot", "I live in Oslo", "Chess? Yes, chess!"], top=2)
    [2, 0]
    """
    counts = [Counter(stem for word in ledger.words(text) for stem in ledger.content_words(word)) for text in documents]
    if not counts:
        return []
    lengths = np.array([count.total() for count in counts])
    penalty = k1 * (1 - b + b * lengths / max(1.0, lengths.mean()))
    scores = np.zeros(len(counts))
    for word in ledger.content_words(query):
        tf = np.array([count[word] for count in counts])
        n = np.count_nonzero(tf)
        scores += math.log(1 + (len(counts) - n + 0.5) / (n + 0.5)) * tf * (k1 + 1) / (tf + penalty)
    newest_first = np.arange(len(counts))[::-1]
    return [int(i) for i in newest_first[np.argsort(-scores[::-1], kind="stable")]][:top]
