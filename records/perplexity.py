"""Capability retention: how well a policy still predicts text that it was fine-tuned on the like of.

    perplexity = exp(− Σ log p(token | all before it) ÷ number of predicted tokens)

Of a chat the assistant's turns are predicted, each with its `<|im_end|>`; of plain text every token but the first. The
text is a file: JSONL with {"messages": [{"role": …, "content": …}, …]} or {"text": …} on a line (it ends in .jsonl, or
a line begins like an object), or plain text whose passages are parted by blank lines. A checkpoint may bring its own,
`sft_heldout.jsonl`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dialogue import ChatTokenizer
from kernels import linear_logprob
from model import Qwen2ForCausalLM
from untrusted.files import parse_json, read_bytes

OBJECT_START = re.compile(r"\A\s*[{]|^\s*[{]\s*\"", re.MULTILINE)  # a file that begins with one, or a line with its key
Text = str | list[dict[str, str]]  # plain text, or the messages of a chat


def read_texts(path: Path) -> list[Text]:
    """Read chats and passages from a file; ValueError, in one line with path and line number, if it is damaged."""
    return parse_texts(read_bytes(path), str(path))


def parse_texts(raw: bytes, path: str) -> list[Text]:
    """Return the chats and passages that a file of this name holds."""
    try:
        whole = raw.decode("utf-8-sig")
    except ValueError as error:
        raise ValueError(f"{path} is not UTF-8: {error}; accepted: JSONL or plain text") from None
    if path.endswith(".jsonl") or OBJECT_START.search(whole):  # damaged JSONL must not pass for prose
        lines = enumerate(whole.split("\n"), 1)
        texts = [_read_line(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    else:
        texts = [passage for passage in re.split(r"\n\s*\n", whole) if passage.strip()]
    if not texts:
        raise ValueError(f"{path} holds no text; accepted: JSONL or plain text")
    return texts


def _read_line(line: str, where: str) -> Text:
    try:
        found = parse_json(line.encode("utf-8", "replace"), where)
    except ValueError as error:
        raise ValueError(f"{error}; a file with a line that begins like a JSON object is read as JSONL") from None
    if isinstance(found, dict) and isinstance(found.get("text"), str):  # further keys, such as a source, are welcome
        return _encodable(found["text"])
    messages = found.get("messages") if isinstance(found, dict) else None
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise ValueError(f'{where}: accepted are {{"messages": [{{"role": …, "content": …}}, …]}} and {{"text": …}}')
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{where}: no message has the role assistant, so nothing is to be predicted")
    return [{key: _encodable(message[key]) for key in ("role", "content")} for message in messages]


def _encodable(text: str) -> str:
    """Replace lone surrogates, which JSON can hold and a tokenizer cannot."""
    return text.encode("utf-8", "replace").decode()


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def encode_text(text: Text, chat: ChatTokenizer) -> tuple[list[int], list[bool]]:
    """Return a text's ids, and which of them are to be predicted. No system message is added to a chat."""
    if isinstance(text, str):
        ids = chat.encode(text)
        return ids, [False] * min(1, len(ids)) + [True] * (len(ids) - 1)
    ids, mask = [], []
    for message in text:
        if message["role"] == "assistant":
            header, spoken = chat.generation_header, [*chat.encode(message["content"]), chat.im_end]
        else:
            header, spoken = chat.message(message["role"], message["content"])[: -len(chat.newline)], []
        ids += header + spoken + chat.newline
        mask += [False] * len(header) + [True] * len(spoken) + [False] * len(chat.newline)
    return ids, mask


@torch.no_grad()
def text_scores(
    policy: Qwen2ForCausalLM, chat: ChatTokenizer, texts: Sequence[Text], where: str = "--perplexity"
) -> NDArray[np.float64]:
    """Return for each text the nats of its predicted tokens and their number, (N, 2), one forward per text.

    Raises ValueError, which begins with `where`, for a text that is longer than the model's positions, and where
    nothing is to be predicted.
    """
    device, limit = policy.head_weight.device, policy.config.max_position_embeddings
    scores = []
    for number, text in enumerate(texts, 1):
        ids, mask = encode_text(text, chat)
        if len(ids) > limit:
            raise ValueError(f"{where}: text {number} has {len(ids)} tokens, the model {limit} positions; cut it")
        token_ids = torch.tensor([ids], dtype=torch.long, device=device)  # (1, T)
        predicted = torch.tensor(mask[1:], dtype=torch.bool, device=device)  # (T-1,): position t predicts token t+1
        if not predicted.any():
            scores.append((0.0, 0))  # a passage of one token
            continue
        hidden = policy(token_ids)[0, :-1][predicted]  # (N, D)
        logprobs, *_ = linear_logprob(hidden, policy.head_weight, token_ids[0, 1:][predicted])
        scores.append((-float(logprobs.double().sum()), len(hidden)))
    if not any(tokens for _, tokens in scores):
        raise ValueError(f"{where}: no token of the text can be predicted; passages need two tokens")
    return np.array(scores)


def perplexity(scores: NDArray[np.float64]) -> float:
    """Return the perplexity of all texts together, by the scores (N, 2) of `text_scores`.

    >>> round(perplexity(np.array([[2 * math.log(8), 2], [0.0, 2]])), 3)
    2.828
    """
    nats, tokens = scores.sum(0)
    return math.exp(nats / tokens)
