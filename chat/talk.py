"""One dialogue with a policy, whose profile the user may read and edit: the terminal's side of `python -m chat`."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

from config import MANY, Config
from dialogue import Candidate, ChatTokenizer, Dialogue, Turn, open_turn, render_turn, stream_seed
from model import Qwen2ForCausalLM
from rewards import read_candidate
from sampler import Draw
from scheduler import Sample
from simulator import Environment, Said
from train_rlpa import Play, Speaker, play_dialogue
from worlds.ledger import contains_phrase


class ForgetfulSpeaker(Speaker):
    """The policy in one dialogue, and the traits that must not come back into its profile."""

    def __init__(self, policy: Qwen2ForCausalLM, chat: ChatTokenizer, config: Config, temperature: float) -> None:
        you = SimpleNamespace(ask=lambda messages, seed: "")  # Talk.reply brings what you say
        play = Play(1, temperature, (config.seed, "chat"))
        super().__init__(policy, chat, play, config, Environment(you, None), 1)
        self.forgotten: list[str] = []

    def answer(self, dialogue: Dialogue, said: Said) -> Generator[Sample, None, list[Candidate]]:
        """Open a turn and sample a reply; ValueError if the message or the dialogue is too long for the model.

        If it wrote a forgotten trait, the line is struck and the response is sampled again behind the profile without.
        """
        self.check_length(dialogue, said)
        (reply,) = yield from super().answer(dialogue, said)
        if reply.failure is None and any(map(self.is_forgotten, reply.profile)):
            kept = [line for line in reply.profile if not self.is_forgotten(line)]
            start = self.chat.encode(render_turn(kept, "").removesuffix("\n</response>"))
            if not self.sampler.fits(len(dialogue.turns[-1].prompt_ids) + len(start)):
                raise ValueError(self.no_room())
            seed = stream_seed(*self.play.stream, len(dialogue.turns), len(start))
            draws: list[Draw] = []
            yield Sample(dialogue.index, dialogue.turns[-1].prompt_ids + start, [seed], draws.append)
            reply = read_candidate(start + draws[0].token_ids, [], draws[0].stop_reason, dialogue, self.chat)
        return [self.without_forgotten(reply, dialogue)]

    def check_length(self, dialogue: Dialogue, said: str) -> None:
        """Raise ValueError, which says what makes room, if there are no positions for a reply to this message."""
        needed = len(open_turn(Dialogue(0, "you", ()), said, self.chat).prompt_ids)
        reply, longest = self.config.max_new_tokens, self.sampler.policy.config.max_position_embeddings
        if needed + reply > longest:
            raise ValueError(
                f"system prompt and message have {needed} tokens, a reply up to {reply}, and the model {longest}"
                f" positions: shorten the message, or start with a --max-new-tokens below {reply}"
            )
        again = replace(dialogue, turns=list(dialogue.turns))
        length = len(open_turn(again, said, self.chat, self.config.history_profile).prompt_ids)
        if dialogue.turns and not self.sampler.fits(length):
            raise ValueError(self.no_room())

    def no_room(self) -> str:
        """Say that the dialogue cannot go on."""
        longest = self.sampler.policy.config.max_position_embeddings
        return f"the dialogue has reached the model's {longest} positions, or --kv-gib; /reset begins a new one"

    def is_forgotten(self, text: str) -> bool:
        """Tell whether a text holds the words of a forgotten trait."""
        return any(contains_phrase(text, trait) for trait in self.forgotten)

    def without_forgotten(self, reply: Candidate, dialogue: Dialogue) -> Candidate:
        """Return a turn without forgotten traits; one that could not be parsed is cut down to what the user saw."""
        chat = self.chat
        if reply.failure and self.is_forgotten(reply.text):
            return replace(reply, token_ids=[*chat.encode(reply.response), chat.im_end], text=reply.response)
        kept = [line for line in reply.profile if not self.is_forgotten(line)]
        if kept == reply.profile:
            return reply
        token_ids = [*chat.encode(render_turn(kept, reply.response)), chat.im_end]
        return read_candidate(token_ids, [], "stop", dialogue, chat)


class Talk:
    """A dialogue that a person leads: `train_rlpa.play_dialogue`, which gets its user's messages from `reply`."""

    def __init__(self, policy: Qwen2ForCausalLM, chat: ChatTokenizer, config: Config, temperature: float) -> None:
        alone = {"first_user_message": "", "max_turns": 10_000, "max_user_tokens": MANY, "profile_judge": "rule"}
        self.config = replace(config, **alone)  # no message is cut, no endpoint asked
        self.new_speaker = partial(ForgetfulSpeaker, policy, chat, self.config, temperature)
        self.speaker = self.new_speaker()
        self.reset()

    def reset(self) -> None:
        """Begin a new dialogue."""
        self.speaker.forget(0)
        self.speaker.forgotten = []
        self.dialogue = Dialogue(0, "you", ())
        self.resume()

    def resume(self) -> None:
        """Go on with the dialogue from its turns so far, up to where it waits for the user's next message."""
        self.player = play_dialogue(self.dialogue, self.speaker)
        next(self.player)

    @property
    def turns(self) -> list[Turn]:
        """Give the turns so far."""
        return self.dialogue.turns

    @property
    def forgotten(self) -> list[str]:
        """Give the traits that were forgotten."""
        return self.speaker.forgotten

    def profile(self, turn: int = -1) -> list[str]:
        """Return the newest profile as of a turn; one that could not be read leaves the one before in force."""
        seen = self.turns[: turn % len(self.turns) + 1] if self.turns else []
        return next((t.winner.profile for t in reversed(seen) if t.winner.failure is None), [])

    def reply(self, text: str) -> Candidate:
        """Let the policy answer; ValueError if the message is, or the dialogue has become, too long for it."""
        try:
            wanted = self.player.send(Said(text))
            while isinstance(wanted, Sample):
                self.sample(wanted)
                wanted = self.player.send(None)
        except BaseException as error:
            self.dialogue.turns = [turn for turn in self.turns if turn.candidates]  # without an answer: no history
            if not isinstance(error, ValueError):  # Ctrl-C may have come in the middle of a step
                forgotten, self.speaker = self.forgotten, self.new_speaker()
                self.speaker.forgotten = forgotten
            self.resume()
            raise
        return self.turns[-1].winner

    def sample(self, wanted: Sample) -> None:
        """Sample what the dialogue waits for."""
        sampler = self.speaker.sampler
        sampler.start(wanted.key, wanted.prompt_ids, wanted.seeds)
        while sampler.running:
            for draw in sampler.step():
                wanted.score(draw)

    def forget(self, trait: str) -> list[str]:
        """Strike all profile lines with these words, now and until `reset`; returns what was struck.

        Past turns are written anew without them, and what follows is computed again at the next reply.
        """
        self.forgotten.append(trait)
        struck = [line for turn in self.turns for line in turn.winner.profile if self.speaker.is_forgotten(line)]
        turns, self.dialogue.turns = self.turns, []
        for turn in turns:
            again = open_turn(self.dialogue, turn.user_text, self.speaker.chat, self.config.history_profile)
            again.candidates = [self.speaker.without_forgotten(turn.winner, self.dialogue)]
        return list(dict.fromkeys(struck))
