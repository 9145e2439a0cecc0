"""From the body of a chat completion to what was said: speech and nothing else.

In reading order: why there may be no speech, the parts of a content, the thoughts that servers leave in it.
"""

from __future__ import annotations

import re
from typing import Any

from endpoints.wire import ChatError, ChatReply, servers_words
from untrusted.files import parse_json
from untrusted.plain_text import json_type, plain_text, shorten

# What servers and gateways call the end of a text, in lower case. "stop" and all other names are a good end.
BROKEN_OFF = {"error", "abort", "aborted", "cancelled", "network_error", "insufficient_system_resource"}
FILTERED = {"content_filter", "refusal", "safety", "sensitive", "prohibited_content"}
CUT = {"length", "max_tokens", "model_length"}
# Tokens that end a turn in the templates of ChatML, Llama 2 and 3, Gemma, Phi, GLM and DeepSeek. Nobody types them.
TURN_ENDS = re.compile(
    r"<\|(?:im_end|im_start|endoftext|eot_id|end_of_text|start_header_id|user|assistant|system)\|>|</s>"
    r"|<(?:end|start)_of_turn>|<｜(?:end▁of▁sentence|User|Assistant)｜>"
)
# A further line that begins with a role is a turn that the model makes up; at the very start it is the speaker's own.
_WHO = "(?:User|Human|Assistant|System)"
_ROLE = rf"(?:#{{1,4}}[ \t]*)?\*{{0,2}}{_WHO}\*{{0,2}}[ \t]*:\*{{0,2}}|#{{1,4}}[ \t]*{_WHO}\b"
OWN_ROLE, NEXT_TURN = re.compile(rf"\A(?:{_ROLE})\s*"), re.compile(rf"(?m)^[ \t]*(?:{_ROLE})")
THOUGHT_PARTS = {"thinking", "reasoning", "redacted_thinking"}  # kinds of parts: Mistral, gateways to Claude


def parse_reply(raw: bytes, secrets: re.Pattern[str] | None = None, one_turn: bool = True) -> ChatReply:
    """Return what a chat completion says, stripped; ChatError, with a reason that names the cause, if it says nothing.

    The text is plain (`plain_text`), its thoughts are cut away, and what `secrets` matches is blotted out.
    one_turn: what a model makes up of later turns is cut away. The reply's
    `tokens` is usage.completion_tokens, which counts the thoughts too, and its `prompt_tokens` is usage.prompt_tokens.

    >>> parse_reply(b'{"choices": [{"message": {"content": "<think>A nurse.</think> Hi. "}}]}')
    'Hi.'
    """
    body = _read_body(raw)
    choice = _first_choice(body, raw)
    ended = str(choice.get("finish_reason")).lower()
    if (error := choice.get("error") or body.get("error")) or ended in BROKEN_OFF:
        raise ChatError("broken_off", f"the reply broke off: {servers_words(error or ended)}")
    spoken, thoughts = _content(choice.get("message"), ended, raw)
    spoken = spoken.encode("utf-8", "replace").decode()  # tokenizers crash at a lone surrogate
    speech, cut_away = split_thoughts(plain_text(secrets.sub("***", spoken) if secrets else spoken).strip())
    speech, *further = TURN_ENDS.split(speech, maxsplit=1)  # a server that knows no stop token lets the model run on
    if one_turn:
        speech, *turns = NEXT_TURN.split(OWN_ROLE.sub("", speech.strip()), maxsplit=1)
        further += turns
    speech = speech.strip()
    hint = "; it ended at max_tokens: switch thinking off in the server" if ended in CUT else ""
    if not speech and (thoughts or cut_away):
        raise ChatError("only_thoughts", f"the reply holds thoughts and nothing after them{hint}")
    if not speech:
        raise ChatError("empty", f"choices[0].message.content is blank{hint}")
    reply = ChatReply(speech)
    reply.cut, reply.thoughts, reply.ran_on = ended in CUT, bool(thoughts or cut_away), bool(further)
    reply.tokens, reply.prompt_tokens = _usage(body)
    return reply


def _read_body(raw: bytes) -> Any:
    if not raw.strip():
        raise ChatError("empty", "the reply has no body")
    try:
        return parse_json(raw, "the reply", any_number=True)
    except ValueError as error:
        streams = re.match(rb"\s*(?:data|event)?:", raw)  # server-sent events
        why = "the server streams its reply, which is not supported" if streams else error
        raise ChatError("bad_json", f"{why}: {_start_of(raw)}") from None


def _first_choice(body: Any, raw: bytes) -> dict[str, Any]:
    """Return choices[0]; ChatError "bad_schema", with the server's words if it sent an error, where there is none."""
    try:
        if isinstance(body["choices"][0], dict):
            return body["choices"][0]
    except (KeyError, IndexError, TypeError):
        pass
    if isinstance(body, dict) and body.get("error"):
        raise ChatError("bad_schema", f"the reply is an error with status 200: {servers_words(body)}")
    raise ChatError("bad_schema", f"the reply has no choices[0].message.content: {_start_of(raw)}")


def _content(message: Any, ended: str, raw: bytes) -> tuple[str, bool]:
    """Return the text of a message, and whether parts of it were thoughts; ChatError if it has none."""
    if not isinstance(message, dict):
        raise ChatError("bad_schema", f"the reply has no choices[0].message.content: {_start_of(raw)}")
    content, thoughts, refusal = message.get("content"), False, message.get("refusal")
    if isinstance(content, list):
        content, thoughts, refused = _parts(content)
        refusal = refused or refusal
    if refusal or ended in FILTERED:
        raise ChatError("refused", f"the model refused: {servers_words(refusal or ended)}")
    if content is None:
        why = "it calls a tool" if message.get("tool_calls") else f"finish_reason: {shorten(ended)}"
        raise ChatError("no_text", f"choices[0].message.content is null ({why})")
    if not isinstance(content, str):
        raise ChatError("bad_schema", f"choices[0].message.content is {json_type(content)}, not a string")
    return content, thoughts


def _parts(content: list[Any]) -> tuple[str, bool, str]:
    """Join the text of a content's parts; also return whether some were thoughts, and the words of a refusal."""
    texts, thoughts, refusal = [], False, ""
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("text", "output_text") and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "refusal":
            refusal = part.get("refusal") or "without a word"
        elif str(kind) in THOUGHT_PARTS:
            thoughts = True
        else:
            what = f"of type {shorten(str(kind))!r}" if kind else json_type(part)
            raise ChatError("bad_schema", f"choices[0].message.content[{i}] is {what}, not a text")
    return "".join(texts), thoughts, refusal


def _usage(body: dict[str, Any]) -> list[int | None]:
    """Return the tokens of reply and prompt; None for what is no count."""
    usage = body.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    return [n if type(n) is int and n > 0 else None for n in map(counts.get, ("completion_tokens", "prompt_tokens"))]


def bound_usage(reply: ChatReply, expected: float) -> ChatReply:
    """Return a reply without counts of tokens that a request cannot have caused; one would stop a quota for days.

    expected: a token per four characters of the prompt, and max_tokens. A template may add some thousands to the
    prompt. Thoughts may exceed max_tokens by far.
    """
    if (reply.prompt_tokens or 0) > 16 * expected + 10_000:
        reply.prompt_tokens = None
    if (reply.tokens or 0) > 100 * expected + 10_000:
        reply.tokens = None
    return reply


def _start_of(raw: bytes) -> str:
    return repr(shorten(raw[:200].decode(errors="replace")))


# ------------------------------------------------------------------------------------------------------------ thoughts

_NAMES = (
    "think|thinking|thoughts?|reasoning|reasoning_content|reflection|scratchpad|analysis|monologue|antthinking|cot"
    "|chain_of_thought|internal"
)
_NAME = rf"(?:[a-z]{{1,16}}[:_])?(?:{_NAMES})(?::\w{{1,16}}|_process)?"
_OPEN, _CLOSE = "(?:<|&lt;)", "(?:>|&gt;)"
_TAG = rf"{_OPEN}\s{{0,3}}{_NAME}(?:\s[^<>=\n]{{0,40}}=[^<>\n]{{0,80}})?\s{{0,3}}{_CLOSE}"
# A tag may be talked about; a token is never typed by people; a phrase opens a reply only, and closes what it opened.
SPELLINGS = (  # (kind, opening mark, closing mark); a comment names the models whose servers leave it in the content
    ("tag", _TAG, rf"{_OPEN}\s{{0,3}}/\s{{0,3}}{_NAME}\s{{0,3}}{_CLOSE}"),
    #   <think>: DeepSeek-R1, Qwen3, GLM, MiniMax, ERNIE, Hunyuan; <thought>: Gemini, EXAONE; <seed:think>: Seed-OSS;
    #   <longcat_think>; <thinking>, <reflection>: others
    ("token", r"\[\s?think\s?\]", r"\[\s?/\s?think\s?\]"),  # Magistral, Ministral
    ("token", r"<\|think(?:ing)?\|>", r"<\|/\s?think(?:ing)?\|>"),  # fine-tunes
    ("token", r"◁\s?think\s?▷", r"◁\s?/\s?think\s?▷"),  # Kimi-VL, Kimi K2
    ("token", r"<\|open\|>think<\|sep\|>", r"<\|close\|>think<\|sep\|>"),  # Kimi K3
    ("token", r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),  # Sky-T1, OpenThinker
    ("token", r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),  # Command (Cohere)
    ("token", r"<\|inner_prefix\|>", r"<\|inner_suffix\|>"),  # Apertus
    ("token", r"<\|channel>\s?thought", r"<channel\|>"),  # Gemma 4
    ("token", r"<unused94>", r"<unused95>"),  # MedGemma
    ("token", r"<\|channel\|>\s?(?:analysis|commentary)(?:[^<]|<\|constrain\|>){0,80}<\|message\|>",
     r"<\|channel\|>\s?final(?:[^<]|<\|constrain\|>){0,80}<\|message\|>"),  # gpt-oss (harmony)
    ("phrase", r"(?-i:\A(?:assistant)?(?:analysis|commentary)(?=[A-Z]))", r"(?-i:assistantfinal)"),  # tokens lost
    ("phrase", r"\A<details\b[^<>]{0,80}type=.reasoning.[^<>]{0,80}>", r"</details>"),  # Open WebUI
    ("phrase", r"\AHere(?: is|'s) my thought process:", r"Here(?: is|'s) my response:"),  # Granite
    ("token", r"\AHere are my reasoning steps:", r"\[BEGIN FINAL RESPONSE\]"),  # Apriel
)  # fmt: skip
_MARKS = "|".join(f"(?P<o{i}>{o})|(?P<c{i}>{c})" for i, (_, o, c) in enumerate(SPELLINGS))
_MARK = re.compile(rf"(?=[<[◁&ah])(?:{_MARKS})", re.IGNORECASE)  # the first characters, for speed
# What the same models write around a reply that follows thoughts: control tokens, or an element.
_FRAME = re.compile(
    r"<\|(?:(?:start|end)_(?:response|text)|end_of_turn_token|(?:begin|end)_of_solution|end|return|call)\|>"
    r"|\[END FINAL RESPONSE\]"
    r"|<\|(?:open|close)\|>(?:response|message)<\|sep\|>"
    r"|\A<(?:answer|response|output)>|</(?:answer|response|output)>\Z",
    re.IGNORECASE,
)
_BEGINS = re.compile(r"""(?:\n|[.!?…。！？]["'”’)\]]{0,2})\Z""")  # a line or a sentence may begin after it
_BETWEEN = re.compile(r"\W*(?:\b(?:and|or|then|to|with|plus)\b\W*)?")  # two tags that are talked about


def split_thoughts(text: str) -> tuple[str, str]:
    r"""Return what is said in a reply and what is thought; all is thought if a block of thoughts is never closed.

    A block begins at an opening mark that begins a line or a sentence, and ends at its closing mark. All before a
    closing mark without such a block is thought, for many templates give the opening mark to the model. Tags that are
    talked about within a line stay. Takes linear time.

    >>> split_thoughts("<think>\nA nurse?\n</think>\n\nHow was your shift?")
    ('How was your shift?', 'A nurse?')
    >>> split_thoughts("A nurse? [/THINK] Hi."), split_thoughts("I typed <think> and </think>.")
    (('Hi.', 'A nurse?'), ('I typed <think> and </think>.', ''))
    """
    said, thought = [], []  # pieces of the text
    at = last = 0  # where the piece begins; where the mark before ended
    inside, nested = None, set()  # the name of the open block, and of those that are opened in it
    mention = doubt = None  # a tag that may be talked about; one that hardly is: its line ends, or a word is glued on
    cut = False
    for mark in _MARK.finditer(text):
        if _around(text, mark.start(), mark.end()) == "``":
            continue  # quoted
        index, opens = int(mark.lastgroup[1:]), mark.lastgroup[0] == "o"
        kind = SPELLINGS[index][0]
        name = re.search(r"[\w:]+", mark[0].lower().removeprefix("&lt;"))[0] if kind == "tag" else index
        gap, begun, last = text[last : mark.start()], last == at, mark.end()
        follows = text[last : last + 1]
        if inside is not None:
            nested |= {name} if opens else set()
            mixed = kind == "tag" and isinstance(inside, str) and name not in nested  # <think>…</thinking>
            if opens or name != inside and not mixed:
                continue  # a thought about marks
            thought.append(text[at : mark.start()])
        elif opens:
            if kind == "tag" and not _begins_a_block(gap, begun):
                mention = mark
                doubt = doubt or (mark if follows.isalnum() or follows == "\n" else None)
                continue
            said.append(text[at : mark.start()])
        elif kind == "phrase":
            continue  # ends nothing
        elif _talks_about(text, mention, mark):
            doubt = None if doubt is mention else doubt
            mention = None
            continue
        else:  # the opening mark stands in the prompt, or nowhere
            thought += [*said, text[at : mark.start()]]
            said, doubt = [], None
        inside, nested, at, mention, cut = name if opens else None, set(), last, None, True
    if inside is not None or doubt:
        return "", text
    if not cut:
        return text, ""
    pieces = (piece.strip() for piece in [*said, text[at:]])
    return _FRAME.sub("", "\n".join(piece for piece in pieces if piece)).strip(), "".join(thought).strip()


def _around(text: str, start: int, end: int) -> str:
    return text[max(0, start - 1) : start] + text[end : end + 1]


def _begins_a_block(gap: str, begun: bool) -> bool:
    """Say whether a tag opens a block: it begins a line or a sentence, after markup perhaps."""
    before = gap.rstrip(" \t*_#>-")
    return (begun and not before) or bool(_BEGINS.search(before[-3:]))


def _talks_about(text: str, mention: re.Match | None, mark: re.Match) -> bool:
    """Say whether a tag and the tag before it are talked about: in one line, with a word between, or as code."""
    if mention is None or mark.start() - mention.end() > 80:
        return False
    between = text[mention.end() : mark.start()]
    code = _around(text, mention.start(), mark.end()) == "``"
    return "\n" not in between and (code or bool(_BETWEEN.fullmatch(between)))
