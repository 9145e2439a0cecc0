"""The dialogue record: one RLPA episode as token ids.

ChatML in ids. The history is a list of ids; what the policy sampled is never decoded and encoded again, only the *new*
user text is tokenised:

    <|im_start|>system\\n…<|im_end|>\\n<|im_start|>user\\nHello<|im_end|>\\n<|im_start|>assistant\\n   context, turn 1
    <profile>…</response><|im_end|>                                                                sampled: action
    \\n<|im_start|>user\\n…<|im_end|>\\n<|im_start|>assistant\\n                                       context, turn 2

A checkpoint may declare other tokens that end a turn. They are actions, too, and the `<|im_end|>` behind such a turn is
context, as it is behind a turn that was cut at its limit.

A turn holds n sampled candidates. The best one continues the dialogue, and all of them are trained on. So a dialogue is
a tree of tokens; `packing.py` stores each token of it once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer

from untrusted.files import check_value, parse_json
from untrusted.gguf_file import read_part
from untrusted.plain_text import shorten

# Of some twenty texts, the one with which two real models kept to the form most often (docs/real.md).
SYSTEM_PROMPT = """Get to know the user while you talk. Write what you know of the user so far, one trait per line, \
then reply. Every message has both parts, the profile and the response:
<profile>
- trait
</profile>
<response>your reply</response>"""
PROMPT_FILE = "system_prompt.txt"  # of a checkpoint that brings its own
HISTORY_PROFILES = ("all", "latest")
MOST_IDS = 10**7  # `Tokenizer.to_str` takes a step for each number up to the largest id, which a file may set at will
# What `ChatTokenizer.message` does, for programs that render text: Jinja, as `transformers` and vLLM read it.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def stream_seed(*key: object) -> int:
    """Derive the seed of one random stream from what it is for; the same key gives the same stream on any rank.

    >>> stream_seed(0, "sample", 3, 1) == stream_seed(0, "sample", 3, 1) != stream_seed(0, "sample", 3, 2)
    True
    """
    digest = hashlib.blake2b("|".join(map(str, key)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1  # 31 bits: some servers take no larger seed


def render_turn(lines: Sequence[str], response: str) -> str:
    """Write a turn as the system prompt asks for it.

    >>> render_turn(["Age: 7"], "Hi!")
    '<profile>\\n- Age: 7\\n</profile>\\n\\n<response>\\nHi!\\n</response>'
    """
    block = "".join(f"- {line}\n" for line in lines)
    return f"<profile>\n{block}</profile>\n\n<response>\n{response}\n</response>"


class ChatTokenizer:
    """Encode text that may hold anything into ids that hold no control token, and lay ChatML seams around it.

    Args:
        tokenizer: a `tokenizers.Tokenizer` that knows `<|im_start|>` and `<|im_end|>`.
        stop_ids: ids that end a turn, beside that of `<|im_end|>`.
        system_prompt: what each dialogue begins with.
    Raises:
        ValueError: the tokenizer lacks one of those two, or has an id that no model has.
    """

    def __init__(self, tokenizer: Tokenizer, stop_ids: Iterable[int] = (), system_prompt: str = SYSTEM_PROMPT):
        for name in ("<|im_start|>", "<|im_end|>"):
            if tokenizer.token_to_id(name) is None:
                raise ValueError(f"the tokenizer has no {name}; --ckpt needs a ChatML model, as Qwen2.5 and SmolLM2")
        self.vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())  # ids may have gaps
        if self.vocab_size > MOST_IDS:
            raise ValueError(f"the tokenizer has an id {self.vocab_size - 1}; the most that is taken is {MOST_IDS - 1}")
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.tokenizer = tokenizer  # as it came: to decode with, and to save beside a checkpoint
        # Encoding needs a copy in which "<|im_end|>" inside text is ten characters. That switch spares only tokens
        # marked special, and Qwen's <tool_call> and <|fim_prefix|> are not, so all added tokens are marked first.
        self.plain = Tokenizer.from_str(tokenizer.to_str())
        self.plain.add_special_tokens([token.content for token in tokenizer.get_added_tokens_decoder().values()])
        self.plain.encode_special_tokens = True
        self.im_start, self.im_end = tokenizer.token_to_id("<|im_start|>"), tokenizer.token_to_id("<|im_end|>")
        self.pad = self.im_end if (end := tokenizer.token_to_id("<|endoftext|>")) is None else end
        self.stop_ids = frozenset({self.im_end, *stop_ids})
        self.system_prompt = system_prompt
        self.newline = self.encode("\n")
        self.generation_header = [self.im_start, *self.encode("assistant\n")]  # ids after which the policy speaks

    @classmethod
    def from_folder(cls, folder: str | Path, vocab_size: int | None = None) -> ChatTokenizer:
        """Load a checkpoint's tokenizer, from its folder or GGUF file, which ids end a turn, and its system prompt.

        Raises ValueError if it is absent or unreadable, or has more ids than the model's embedding, `vocab_size`.
        """
        path = Path(folder) / "tokenizer.json"
        if (raw := read_part(path.parent, path.name)) is None:
            raise ValueError(
                f"{path} does not exist; --ckpt needs a folder with config.json, tokenizer.json and safetensors"
            )
        parse_json(raw, str(path))  # the library takes the last of several values of a key
        try:
            chat = cls(Tokenizer.from_buffer(raw))
        except Exception as error:  # the Rust library raises plain Exception for any malformed file
            raise ValueError(f"{path} is refused: {shorten(str(error), 200)}") from None
        if vocab_size is not None and chat.vocab_size > vocab_size:
            raise ValueError(
                f"tokenizer of {folder} has {chat.vocab_size} ids, the model's embedding only {vocab_size}"
            )
        chat.stop_ids |= declared_stops(Path(folder), vocab_size or chat.vocab_size)
        if (raw := read_part(Path(folder), PROMPT_FILE)) is not None:
            try:
                chat.system_prompt = raw.decode().rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"{Path(folder) / PROMPT_FILE} is not UTF-8: {error}") from None
        return chat

    def encode(self, text: str) -> list[int]:
        """Encode text as plain characters: no control token can come out, whatever the text says."""
        return self.plain.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Decode ids, control tokens included as their names."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=False)

    def message(self, role: str, text: str) -> list[int]:
        """Encode one closed message, `<|im_start|>role\\ntext<|im_end|>\\n`.

        Role and text are encoded in one piece, as in the whole rendered template: a text that begins with a newline
        would otherwise merge differently.
        """
        return [self.im_start, *self.encode(f"{role}\n{text}"), self.im_end, *self.newline]

    def visible(self, token_ids: Sequence[int]) -> str:
        """Decode a sampled turn without the token that ended it."""
        ids = list(token_ids)
        return self.decode(ids[:-1] if ids and ids[-1] in self.stop_ids else ids)

    def tokens_until(self, token_ids: Sequence[int], text: str) -> int:
        """Count the ids needed until the decoded text contains `text`; all of them if it never does."""
        low, high = 1, len(token_ids)
        while low < high:  # the decoded prefix only grows, so this can be bisected
            middle = (low + high) // 2
            low, high = (low, middle) if text in self.decode(token_ids[:middle]) else (middle + 1, high)
        return high

    def chat_files(self, given: Mapping[str, bytes], folder: str | Path = "") -> dict[str, bytes]:
        """Complete the files of a checkpoint's folder so that other programs chat with it and end turns as we do.

        What is given stays as it is, byte for byte; but generation_config.json ends turns at all `stop_ids`.
        """
        tokens = {"eos_token": "<|im_end|>", "pad_token": self.tokenizer.id_to_token(self.pad)}
        tokens["tokenizer_class"] = "PreTrainedTokenizerFast"
        files = {"tokenizer.json": self.tokenizer.to_str(pretty=True).encode(), "tokenizer_config.json": _json(tokens)}
        files |= {PROMPT_FILE: f"{self.system_prompt}\n".encode()} | dict(given)
        given_config = _parsed(files, "tokenizer_config.json", folder)
        if "chat_template.jinja" not in files and not given_config.get("chat_template"):
            files["chat_template.jinja"] = CHAT_TEMPLATE.encode()
        generation = {"pad_token_id": self.pad} | _parsed(files, "generation_config.json", folder)
        if not self.stop_ids <= _ids(generation.get("eos_token_id")):
            stops = [self.im_end, *sorted(self.stop_ids - {self.im_end})]
            files["generation_config.json"] = _json(generation | {"eos_token_id": stops})
        return files


def declared_stops(folder: Path, vocab_size: int) -> set[int]:
    """Return the ids that a checkpoint's configs declare to end a turn; ValueError for one outside the vocabulary."""
    found = set()
    for path in (folder / "config.json", folder / "generation_config.json"):
        raw = read_part(folder, path.name)
        check_value(content := {} if raw is None else parse_json(raw, str(path)), dict, str(path))
        declared = content.get("eos_token_id")
        check_value(declared, int | list[int] | None, f"{path}, eos_token_id")
        for token_id in _ids(declared):
            if not 0 <= token_id < vocab_size:
                raise ValueError(f"{path}: eos_token_id {token_id} is outside the model's vocabulary of {vocab_size}")
        found |= _ids(declared)
    return found


def _ids(declared: int | list[int] | None) -> set[int]:
    return set() if declared is None else set(declared) if isinstance(declared, list) else {declared}


def _json(value: dict) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _parsed(files: Mapping[str, bytes], name: str, folder: str | Path) -> dict:
    value = parse_json(files.get(name, b"{}"), where := str(Path(folder) / name))
    check_value(value, dict, where)
    return value


@dataclass(kw_only=True)
class Candidate:
    """One sampled turn of the policy: ids as sampled, and everything that was found out about it."""

    token_ids: list[int]  # as sampled, the closing <|im_end|> or other stop id included
    logprobs: list[float]  # the sampler's, nats, one per id
    stop_reason: str  # "stop" (sampled <|im_end|> or another stop id) or "length"
    text: str = ""
    profile: list[str] = field(default_factory=list)
    response: str = ""  # what the user sees, even of a turn that could not be parsed
    failure: str | None = None  # why the text could not be parsed; None = format-valid
    profile_tokens: int = 0  # how many ids make up the profile block: the last of them may earn the Profile Reward
    verdicts: dict[str, bool] = field(default_factory=dict)
    ledger: dict[str, float] = field(default_factory=dict)  # rewards.ProfileScore of this profile
    parts: dict[str, float] = field(default_factory=dict)  # reward parts by name, before their weights
    reward: float = 0.0  # the weighted sum of the parts: rewards.score_candidate
    judged: bool = True  # False: the judge failed for good; it is neither trained on nor chosen


@dataclass
class Turn:
    """One exchange: what the user said, what the policy's candidates answered, and which one went on."""

    user_text: str
    prompt_ids: list[int]  # everything the policy saw before this turn's first sampled id
    candidates: list[Candidate] = field(default_factory=list)
    chosen: int = 0
    told: tuple[str, ...] = ()  # facts of the persona that the user's text tells: this turn's part of the ledger

    @property
    def winner(self) -> Candidate:
        return self.candidates[self.chosen]


@dataclass
class Dialogue:
    """One episode with one persona; `index` is its place in the global rollout batch and seeds its random streams."""

    index: int
    persona_id: str
    persona_facts: tuple[str, ...]
    turns: list[Turn] = field(default_factory=list)
    dropped: str | None = None  # why simulator or judge gave up; a dropped dialogue is masked out and counted
    changes: dict[int, tuple[str, ...]] = field(default_factory=dict)  # turn, from 0 → the persona's facts from then on

    def history(self) -> list[tuple[str, str]]:
        """Return the visible dialogue as ("user" | "assistant", text) pairs: no system prompt, no profile blocks."""
        said: list[tuple[str, str]] = []
        for turn in self.turns:
            said.append(("user", turn.user_text))
            if turn.candidates:
                said.append(("assistant", turn.winner.response))
        return said

    def told(self) -> list[tuple[str, ...]]:
        """Return the facts that each of the user's messages tells: all that the ledger may count as evidence."""
        return [turn.told for turn in self.turns]


def open_turn(
    dialogue: Dialogue, user_text: str, tokenizer: ChatTokenizer, history_profile: str = "all", told: Sequence[str] = ()
) -> Turn:
    """Append a turn that holds the user's text, the facts that it tells, and the ids the policy will see.

    With history_profile "all" the prompt is the last prompt, the winner's ids as sampled, and the new text: it only
    ever grows. "latest" (as published) keeps the profile block of the newest reply alone; older replies are rewritten
    to their bare response, so the prompt does not extend the last one.
    """
    if history_profile not in HISTORY_PROFILES:
        raise ValueError(
            f"history_profile is {history_profile!r}; --history-profile takes {' or '.join(HISTORY_PROFILES)}"
        )
    prompt = tokenizer.message("system", tokenizer.system_prompt)
    if dialogue.turns:
        last = dialogue.turns[-1]
        reply = list(last.winner.token_ids)  # as sampled; the "\n" behind it is context, not action
        if reply[-1:] != [tokenizer.im_end]:  # the sampler ran out of tokens, or another stop id ended the turn
            reply.append(tokenizer.im_end)
        reply += tokenizer.newline
    if dialogue.turns and history_profile == "all":
        prompt = last.prompt_ids + reply
    elif dialogue.turns:
        for turn in dialogue.turns[:-1]:
            prompt += tokenizer.message("user", turn.user_text)
            prompt += tokenizer.message("assistant", turn.winner.response)
        prompt += tokenizer.message("user", last.user_text) + tokenizer.generation_header + reply
    prompt = prompt + tokenizer.message("user", user_text) + tokenizer.generation_header
    dialogue.turns.append(Turn(user_text, prompt, told=tuple(told)))
    return dialogue.turns[-1]
