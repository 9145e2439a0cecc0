"""Many dialogues at once: a dialogue that waits is parked, and the others go on.

A dialogue is a generator (`train_rlpa.play_dialogue`). It yields what it waits for:

    Ask       a call, which runs in a thread; the generator is resumed with what the call returns
    Sample    candidates for a prompt; the generator is resumed once all of them have ended and been scored

`Scheduler` decodes the candidates of all dialogues together, one token a step, and uses the replies of the calls at
fixed steps, so that the result does not depend on how fast replies come.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, NamedTuple

from config import Config
from sampler import Draw, Sampler
from simulator import Environment, is_live

NEARLY_ALL, FEW = 0.9, 8  # share of turns cut at their limit that is worth a warning, and below how many turns none is
JOIN_EVERY = 8  # decode steps between two prefills: several prompts in one cost little more than one prompt
LOOK_EVERY = 0.2  # seconds between two looks at the signals, while nothing can be done but wait


class Ask(NamedTuple):
    """A dialogue waits for what `call` returns. `call` runs in a thread, and returns the errors that it expects."""

    call: Callable[[], object]


@dataclass
class Sample:
    """A dialogue waits for candidates that continue a prompt, one for each seed."""

    key: int  # of the dialogue; names its row in the KV cache
    prompt_ids: list[int]
    seeds: list[int]
    score: Callable[[Draw], Ask | None]  # takes each candidate as it ends; the dialogue waits for its Ask, too
    scored: int = 0  # candidates that need nothing more


Waits = Generator[Ask | Sample, Any, None]  # a dialogue, as the scheduler sees it


class Scheduler:
    """Play dialogues to their end, as many at once as the sampler has room for.

    Args:
        sampler: decodes the candidates; None where every dialogue only asks.
        config: --max-concurrency calls are made at once. A reply is used exactly --reply-steps decode steps after its
            request, in the order of the requests. So latencies do not change the result, to the last bit. 0: a reply is
            used when it arrives. That is faster with slow endpoints, and equal up to rounding. -1: 16, or 0 with live
            endpoints.
        env: its signals end the play; its timers take the time of sampling, scoring and waiting.
    """

    def __init__(self, sampler: Sampler | None, config: Config, env: Environment) -> None:
        self.steps = config.reply_steps if config.reply_steps >= 0 else 0 if is_live(config) or sampler is None else 16
        self.sampler, self.env = sampler, env
        self.pool = ThreadPoolExecutor(config.max_concurrency, thread_name_prefix="reply")
        self.calls: deque[tuple[int, Future, Callable]] = deque()  # due at this step; reply; what takes it
        self.ready: deque[tuple[Waits, Sample]] = deque()  # their prompts wait for room in the sampler
        self.sampling: dict[int, tuple[Waits, Sample]] = {}  # by key
        self.clock = 0  # decode steps so far
        self.ends: Counter = Counter()  # of the candidates, by stop reason

    def run(self, dialogues: Iterable[Waits]) -> None:
        """Play all dialogues to their end, unless a signal comes."""
        whole = False
        try:
            for dialogue in dialogues:
                self.resume(dialogue, None)
            while not self.env.signals and (self.ready or self.sampling or self.calls):
                self.use_replies(idle=not self.ready and not (self.sampler and self.sampler.running))
                if self.sampler:
                    self.decode(self.sampler)
            whole = not self.env.signals
            if self.sampler:
                self.warn_of_cut_turns(self.sampler)
        finally:
            if not whole:
                self.env.hang_up()  # else the pool's threads would wait for their replies
            self.pool.shutdown(cancel_futures=True)

    def resume(self, dialogue: Waits, reply: object) -> None:
        """Let a dialogue go on until it waits for something again, or is over."""
        try:
            wanted = dialogue.send(reply)
        except StopIteration:
            return
        if isinstance(wanted, Ask):
            self.request(wanted, lambda reply: self.resume(dialogue, reply))
        else:
            self.ready.append((dialogue, wanted))

    def request(self, ask: Ask, then: Callable[[object], None]) -> None:
        """Make a call in a thread; later, in this one, call `then` with what it returned."""
        self.calls.append((self.clock + self.steps, self.pool.submit(ask.call), then))

    def use_replies(self, idle: bool) -> None:
        """Hand out the replies that are due; when nothing else can be done (idle), wait for the next one."""
        found = self.due(idle) if self.steps else self.arrived(idle)
        for _, future, then in found if not self.env.signals else ():  # after a signal some replies may be missing
            then(future.result())

    def due(self, idle: bool) -> list[tuple[int, Future, Callable]]:
        """Take out the calls whose step has come, and wait for their replies."""
        if idle:  # the clock stands still while nothing decodes: put it on
            self.clock = max(self.clock, self.calls[0][0])
        found = []
        while self.calls and self.calls[0][0] <= self.clock:
            found.append(self.calls.popleft())
        self.wait_for([future for _, future, _ in found], ALL_COMPLETED)
        return found

    def arrived(self, idle: bool) -> list[tuple[int, Future, Callable]]:
        """Take out the calls whose replies have come."""
        if idle:
            self.wait_for([future for _, future, _ in self.calls], FIRST_COMPLETED)
        found = [item for item in self.calls if item[1].done()]
        self.calls = deque(item for item in self.calls if item not in found)
        return found

    def wait_for(self, futures: list[Future], how: str) -> None:
        """Wait for all futures or the first one, but no longer once a signal has come."""
        with self.env.timers("waiting"):
            done, missing = set(), futures
            while missing and not (done and how == FIRST_COMPLETED) and not self.env.signals:
                done, missing = wait(futures, timeout=LOOK_EVERY, return_when=how)

    def decode(self, sampler: Sampler) -> None:
        """Sample one token for every candidate, and score the candidates that end with it."""
        with self.env.timers("sampling"):
            if self.clock % JOIN_EVERY == 0 or not sampler.running:
                while self.ready:  # start as many as there is room for, in their order
                    wanted = self.ready[0][1]
                    if not sampler.start(wanted.key, wanted.prompt_ids, wanted.seeds):
                        break
                    self.sampling[wanted.key] = self.ready.popleft()
            ended = sampler.step()
            self.clock += 1
        with self.env.timers("rewards"):
            self.ends.update(draw.stop_reason for draw in ended)
            for draw in ended:
                asked = self.sampling[draw.key][1].score(draw)
                if asked:
                    self.request(asked, lambda _, key=draw.key: self.note_scored(key))
                else:
                    self.note_scored(draw.key)

    def warn_of_cut_turns(self, sampler: Sampler) -> None:
        """Warn once if nearly all turns ran to their limit: the model may end them with a token nobody declared."""
        cut, turns = self.ends["length"], self.ends.total()
        if turns >= FEW and cut >= NEARLY_ALL * turns:
            ids = ", ".join(map(str, sorted(sampler.stop_ids)))
            self.env.warn_once(
                "cut turns",
                f"{cut} of {turns} turns were cut at --max-new-tokens {sampler.max_new_tokens}. Turns end at ids {ids}"
                " (<|im_end|>, eos_token_id of config.json and generation_config.json); raise the limit, or declare"
                " the id with which this model ends turns",
            )

    def note_scored(self, key: int) -> None:
        """Resume a dialogue once the last of its candidates is scored."""
        dialogue, wanted = self.sampling[key]
        wanted.scored += 1
        if wanted.scored == len(wanted.seeds):
            del self.sampling[key]
            self.resume(dialogue, None)
