"""What a server's refusal asks for: another form of the request (a table), or something that only the user can mend.

Servers that speak the same protocol take different parts of it. What one of them refuses, its words say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from endpoints.wire import URL_FLAGS, ChatError, Message

Request = dict[str, Any]  # the body of a chat completion request
REFUSING = {400, 422, 500}  # 500: llama.cpp and SGLang for chat templates, LiteLLM for parameters
_NO = r"unsupported|n[o']t (?:\w+ )?(?:support|permitted|allowed|accept)|unknown|unrecognized|_forbidden|deprecated"


class Change(NamedTuple):
    """One row of the table: how a refusal is recognised, and what is done about it."""

    words: str  # pattern of what the server says, in lower case
    done: str  # what the user is told
    apply: Callable[[Request], Request]


def _refuses(name: str) -> str:
    """Return the pattern of a sentence that refuses a parameter: its name and a "no" stand close together."""
    return rf"(?:{_NO})[^.]{{0,60}}\b{name}\b|\b{name}\b[^.]{{0,60}}(?:{_NO})"


def _leave_out(name: str) -> Callable[[Request], Request]:
    return lambda request: {key: value for key, value in request.items() if key != name}


def _rename_limit(request: Request) -> Request:
    return {{"max_tokens": "max_completion_tokens"}.get(key, key): value for key, value in request.items()}


def fold_system(messages: list[Message]) -> list[Message]:
    """Put the text of each system message before the next user message, or after the last one if none follows.

    >>> fold_system([{"role": "system", "content": "Be Ann."}, {"role": "user", "content": "Hi"}])
    [{'role': 'user', 'content': 'Be Ann.\\n\\nHi'}]
    """
    folded: list[Message] = []
    waiting: list[str] = []
    for message in messages:
        if message["role"] == "system":
            waiting.append(message["content"])
        elif message["role"] == "user":
            folded.append(message | {"content": "\n\n".join([*waiting, message["content"]])})
            waiting = []
        else:
            folded.append(message)
    if waiting and folded and folded[-1]["role"] == "user":
        waiting.insert(0, folded.pop()["content"])
    return [*folded, {"role": "user", "content": "\n\n".join(waiting)}] if waiting else folded


CHANGES = {
    # Mistral (extra_forbidden, in "loc"), Gemini ('Unknown name "seed": Cannot find field'), Azure's catalogue, vLLM on
    # TPUs ("does not support per-request seed"), LiteLLM before Anthropic ("does not support parameters: ['seed']").
    "seed": Change(_refuses("seed"), "left out, so that replies do not repeat", _leave_out("seed")),
    # OpenAI and Azure, o-series and GPT-5: "'max_tokens' is not supported with this model. Use …".
    "max_tokens": Change(_refuses("max_tokens"), "sent as max_completion_tokens", _rename_limit),
    # The same ("does not support 0.7 with this model"); Anthropic behind Bedrock ("`temperature` is deprecated").
    "temperature": Change(_refuses("temperature"), "left out, and the server's own holds", _leave_out("temperature")),
    # Chat templates, behind any server. Gemma 1 and 2: "System role not supported"; Mistral 7B: "Only user and
    # assistant roles are supported"; Gemma 3: "Conversation roles must alternate"; Qwen 3.5: "System message must be at
    # the beginning". Gemini's endpoint for Gemma: "Developer instruction is not enabled"; o1-mini: "does not support
    # 'system' with this model".
    "system role": Change(
        r"(?:system|developer) (?:role|message|instruction|prompt)s?[^.]{0,30} (?:not|must be)\b|roles must alternate"
        r"|only user and assistant roles|not support '?system\b",
        "put into the user message that follows",
        lambda request: request | {"messages": fold_system(request["messages"])},
    ),
}


def refused_part(status: int, words: str, changed: Collection[str] = ()) -> str:
    """Name the part of a request that a server refuses, as in CHANGES; "" if its words name none but the `changed`.

    >>> refused_part(400, "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead.")
    'max_tokens'
    >>> refused_part(400, "max_tokens is too large: the context holds 4096 tokens")
    ''
    """
    if status not in REFUSING:
        return ""
    refused = (part for part, change in CHANGES.items() if re.search(change.words, words.lower()))
    return next((part for part in refused if part not in changed), "")


def without(request: Request, parts: Collection[str]) -> Request:
    """Return a request as a server takes it that refuses these parts of CHANGES."""
    for part in parts:
        request = CHANGES[part].apply(request)
    return request


WRONG_FORMS = {"bad_json", "bad_schema", "too_large"}  # reasons: what came is no chat completion
FLAGS = {name: (url, f"--{name}-model", "--api-key-env") for name, url in URL_FLAGS.items()}  # address, model, key


def way_out(name: str, error: ChatError) -> str:
    """Name the flag that would mend a refusal of a client's requests, or "" if none would.

    >>> way_out("judge", ChatError("http_4xx", "HTTP 404: no such model", status=404))
    'check --judge-model and the address'
    """
    if error.reason == "certificate":
        return "REQUESTS_CA_BUNDLE can name a file with a server's authority"
    address, model, key = FLAGS.get(name, ("the address", "the model after #", "--subject-key-env"))
    if error.reason in ("no_verdict", "address"):
        return f"check {address}" if error.reason == "address" else f"check {model} and {address}"
    match error.status:
        case 401:
            return f"check {key}"
        case 403:  # the key's rights, or a wall that lets nobody in
            return f"check {key} and the address"
        case 400 | 422 if re.search(r"\bmodel\b", error.words, re.IGNORECASE):
            return f"check {model}"
        case 404 | 405:
            return f"check {model} and the address"
        case status if 300 <= status < 400:
            usable = error.words.endswith("/chat/completions")  # else it may be a page to log in
            return f"give that address as {address}" if usable else f"check {address}"
    return f"check {address}: chat completions in OpenAI's form must come back" if error.reason in WRONG_FORMS else ""
