"""One dialogue with a policy, whose profile the user may read and edit: the terminal's side of `python -m chat`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import rewards
from dialogue import Candidate, ChatTokenizer, Dialogue, Turn, open_turn, render_turn
from model import Qwen2ForCausalLM
from sampler import Draw, Sampler, kv_budget
from train_rlpa import Config, stream_seed
from worlds.ledger import contains_phrase


def make_sampler(
    policy: Qwen2ForCausalLM, chat: ChatTokenizer, config: Config, temperature: float, rows: int, kv_bytes: int
) -> Sampler:
    """Return a sampler of one candidate per turn, for so many dialogues."""
    return Sampler(
        policy,
        n=1,
        max_new_tokens=config.max_new_tokens,
        stop_ids=[chat.im_end],
        temperature=temperature,
        batch_size=rows,
        max_rows=rows,
        kv_bytes=kv_bytes,
    )


def read_turn(token_ids: list[int], stop_reason: str, chat: ChatTokenizer) -> Candidate:
    """Return a sampled turn with its text parsed."""
    text = chat.visible(token_ids)
    parsed = rewards.parse_turn(text, stop_reason)
    return Candidate(token_ids, [], stop_reason, text, parsed.profile, parsed.response, parsed.failure)


class Talk:
    """One dialogue with the policy, and the traits that must not come back into its profile."""

    def __init__(self, policy: Qwen2ForCausalLM, chat: ChatTokenizer, config: Config, temperature: float):
        self.chat, self.config, self.longest = chat, config, policy.config.max_position_embeddings
        budget = kv_budget(config, policy.head_weight.device)
        self.new_sampler = partial(make_sampler, policy, chat, config, temperature, 1, budget)
        self.sampler = self.new_sampler()
        self.reset()

    def reset(self) -> None:
        """Begin a new dialogue."""
        self.sampler.forget(0)
        self.dialogue = Dialogue(0, "you", ())
        self.forgotten: list[str] = []

    @property
    def turns(self) -> list[Turn]:
        """Give the turns so far."""
        return self.dialogue.turns

    def profile(self, turn: int = -1) -> list[str]:
        """Return the newest profile as of a turn; one that could not be read leaves the one before in force."""
        seen = self.turns[: turn % len(self.turns) + 1] if self.turns else []
        return next((t.winner.profile for t in reversed(seen) if t.winner.failure is None), [])

    def reply(self, text: str) -> Candidate:
        """Let the policy answer; ValueError if the message is, or the dialogue has become, too long for it.

        If it wrote a forgotten trait, the line is struck and the response is sampled again behind the profile without.
        """
        turn = open_turn(self.dialogue, text, self.chat, self.config.history_profile)
        try:
            reply = self.write(turn.prompt_ids, [])
            if reply.failure is None and any(map(self.is_forgotten, reply.profile)):
                kept = [line for line in reply.profile if not self.is_forgotten(line)]
                start = render_turn(kept, "").removesuffix("\n</response>")
                reply = self.write(turn.prompt_ids, self.chat.encode(start))
        except BaseException as error:
            self.turns.pop()  # a turn without an answer is no history
            if not isinstance(error, ValueError):
                self.sampler = self.new_sampler()  # Ctrl-C may have come in the middle of a step
            raise
        turn.candidates = [self.without_forgotten(reply)]
        return turn.winner

    def write(self, prompt_ids: list[int], start: list[int]) -> Candidate:
        """Sample a turn that begins with the ids `start`."""
        if len(prompt_ids) + len(start) + self.config.max_new_tokens > self.longest:
            raise ValueError(self.too_long())
        self.sampler.start(0, prompt_ids + start, [stream_seed(self.config.seed, "chat", len(self.turns), len(start))])
        ended: list[Draw] = []
        while not ended:
            ended = self.sampler.step()
        self.sampler.adopt(0, 0)
        return read_turn(start + ended[0].token_ids, ended[0].stop_reason, self.chat)

    def too_long(self) -> str:
        """Say why there are no positions for a reply to the newest message, and what makes room."""
        alone = Dialogue(0, "you", ())
        first = open_turn(alone, self.turns[-1].user_text, self.chat, self.config.history_profile)
        needed, reply = len(first.prompt_ids), self.config.max_new_tokens
        if needed + reply > self.longest:
            return (
                f"system prompt and message have {needed} tokens, a reply up to {reply}, and the model {self.longest}"
                f" positions: shorten the message, or start with a --max-new-tokens below {reply}"
            )
        return f"the dialogue has reached the model's {self.longest} positions; /reset begins a new one"

    def forget(self, trait: str) -> list[str]:
        """Strike all profile lines with these words, now and until `reset`; returns what was struck.

        Past turns are written anew without them, and what follows is computed again at the next reply.
        """
        self.forgotten.append(trait)
        struck = [line for turn in self.turns for line in turn.winner.profile if self.is_forgotten(line)]
        turns, self.dialogue.turns = self.turns, []
        for turn in turns:
            again = open_turn(self.dialogue, turn.user_text, self.chat, self.config.history_profile)
            again.candidates = [self.without_forgotten(turn.winner)]
        return list(dict.fromkeys(struck))

    def is_forgotten(self, text: str) -> bool:
        """Tell whether a text holds the words of a forgotten trait."""
        return any(contains_phrase(text, trait) for trait in self.forgotten)

    def without_forgotten(self, reply: Candidate) -> Candidate:
        """Return a turn without forgotten traits; one that could not be parsed is cut down to what the user saw."""
        if reply.failure and self.is_forgotten(reply.text):
            ids = self.chat.encode(reply.response)
            return replace(reply, token_ids=[*ids, self.chat.im_end], text=reply.response)
        kept = [line for line in reply.profile if not self.is_forgotten(line)]
        if kept == reply.profile:
            return reply
        return read_turn([*self.chat.encode(render_turn(kept, reply.response)), self.chat.im_end], "stop", self.chat)
