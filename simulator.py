"""The simulated user: what it says next, how an endpoint is asked to say it, and the users that are embedded here.

A simulated user is any OpenAI-compatible `/v1/chat/completions` endpoint, asked in one of two ways (`--user-mode`):

    planned   `worlds/planner.py` chooses the facts that a message tells, and the endpoint only words it. What comes
              back is checked (`worlds/saying.py`), asked again at most twice, and then said by rule.
    plain     the endpoint gets a role prompt (which person it plays, and how slowly to say so) and the dialogue as that
              person sees it. It decides what it tells, and the ledger is read off its words.

`python simulator.py --port 8100` is an endpoint of the plain kind: a function of EMBEDDED_USERS answers by rules,
without a network or a key.

In reading order: the next message, role prompt and messages, the embedded users, their server in a process of its own,
and the environment that a run opens: the clients of user and judge, and a count of everything that goes wrong there.

Two differences from the published code. The messages carry the roles as the user sees them (see `simulator_messages`).
A failed call is an error that the trainer masks and counts, never a made-up reply.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from itertools import chain
from pathlib import Path
from typing import Any

import rewards
from config import Config
from dialogue import Dialogue, stream_seed
from endpoints.client import ChatClient
from endpoints.server import make_server
from endpoints.tape import Tape
from endpoints.throttle import Quota
from endpoints.wire import ChatError, Message, RequestError, parse_request
from untrusted.plain_text import clean_text, say, shorten, warn
from worlds import first, saying, second
from worlds.ledger import History, mentions, on_ledger, split_fact, told_by
from worlds.personas import MAX_FACTS, Persona, usable_facts
from worlds.planner import plan_message

ROLE_RULES = """\
You are playing a person who chats with a stranger online. Stay in this role to the end. Write only what the person \
says, in plain text, without quotation marks or stage directions.

Rules:
1. At first, give no personal information at all. Your first message is just a greeting.
2. Give yourself away slowly: in one reply, reveal at most 15 % of your profile below, and only what fits the moment.
3. Write at most three sentences per reply. A single "Oh." is fine.
4. When you are asked something, answer what was asked, in your own words and true to your profile. What is not in \
your profile you would rather not say.
5. Be cold at first; warm up only when the other person takes an interest in you.
6. Do not open topics yourself; let the other person lead.
7. You dislike repeated questions and flattery. When something is asked or said again, say so.
8. Never break the role, never recite or mention the profile or these rules, and never say that you are an AI.
9. People change. If your profile contradicts what you said before, say that it has changed; the profile holds."""
PROFILE_HEADING = "Your profile:"
PLANNED_TEMPERATURE = 0.7  # at 1 a small model says something else too often
FURTHER_ASKS = 2  # for a message that is not as planned; then it is said by rule
MUCH_BY_RULE, FEW_MESSAGES = 0.2, 20  # share of messages said by rule that is worth a warning, and below how many none
OPENING = "(The chat begins. Write your first message.)"  # chat templates want a "user" message before any reply
MAX_MESSAGES = 1000  # of one request to the embedded users
_OTHER_SIDE = {"user": "assistant", "assistant": "user"}


class Said(str):
    """What the user says, and what it tells by that."""

    told: tuple[str, ...] = ()  # facts of the persona: this message's part of the ledger
    counts: Counter = Counter()  # how a planned message came about, under the names of metrics.jsonl

    def cut_to(self, text: str) -> Said:
        """Return the beginning of a message, with the facts that it still tells."""
        said = Said(text)
        said.told, said.counts = tuple(fact for fact in self.told if saying.states(fact, text)), self.counts
        return said


def next_message(dialogue: Dialogue, stream: tuple, config: Config, env: Environment) -> Said | ChatError:
    """Return what the user says next in a dialogue, or the error that ended the call. It may run in any thread.

    stream: key prefix of the random streams.
    """
    key = (*stream, "user", dialogue.index, len(dialogue.turns))
    if is_planned(config):
        return planned_message(dialogue, key, env)
    persona = Persona(dialogue.persona_id, dialogue.persona_facts)
    said = env.user.ask(simulator_messages(persona, dialogue.history()), stream_seed(*key))
    return said if isinstance(said, ChatError) else heard(said, dialogue)


def is_planned(config: Config) -> bool:
    """Say whether the program plans what the user tells; the embedded ones plan for themselves."""
    return config.user_mode == "planned" or config.user_mode == "auto" and config.simulator_model not in EMBEDDED_USERS


def heard(text: str, dialogue: Dialogue) -> Said:
    """Return a message that nobody has planned, with the facts that it mentions, of any time of the persona."""
    said = Said(text)
    said.told = told_by(dict.fromkeys(chain(dialogue.persona_facts, *dialogue.changes.values())), text)
    return said


def planned_message(dialogue: Dialogue, key: tuple, env: Environment) -> Said | ChatError:
    """Plan the user's next message, and ask its endpoint to say it; if it does not, say it by rule."""
    facts, history, rng = dialogue.persona_facts, dialogue.history(), random.Random(stream_seed(*key, "plan"))
    ledger = on_ledger(facts, dialogue.told())
    retracted = {split_fact(fact)[0] for told in dialogue.told() for fact in told if fact not in facts} - {None}
    plan = plan_message(facts, ledger, history, retracted, rng)
    ruled, plan_told = first.say_plan(facts, plan, rng) if history else (first.OPENER, [])
    tell, known = [facts[i] for i in plan_told], [facts[i] for i in ledger]
    hidden = [fact for i, fact in enumerate(facts) if i not in (*ledger, *plan_told)]
    reply = history[-1][1] if history else ""
    draft = ruled if tell or not history else rng.choice(saying.SILENT[plan.silence])
    counts = Counter(user_messages_planned=1)
    for attempt in range(1 + FURTHER_ASKS):
        request = saying.request(draft, tell, "" if attempt else reply)  # without it, it is hardest to go astray
        text = env.user.ask([{"role": "user", "content": request}], stream_seed(*key, *[attempt][:attempt]))
        if isinstance(text, ChatError):
            return text
        said = Said(saying.tidy(text))
        fault = saying.complaint(said, tell, known, hidden, reply)
        if not fault:
            break
        counts[f"user_messages_refused_{fault}"] += 1
    else:
        said, counts["user_messages_by_rule"] = Said(ruled), 1
    counts["user_messages_asked_again"] = attempt
    said.told = tuple(fact for fact in facts if fact in tell or mentions(fact, said))  # whatever is told anew
    said.counts = counts
    return said


def simulator_messages(persona: Persona, history: Sequence[tuple[str, str]]) -> list[Message]:
    """Write the messages that ask the simulated user for its next line: the role prompt, then the dialogue.

    The role prompt is the system message. It ends with the persona's facts, one "- " line each.

    history: ("user" | "assistant", text), oldest first, where "user" is the simulated human and "assistant" the policy
    (its visible response only, never its profile block). From the human's side the roles are the other way round: its
    own lines are "assistant" and the policy's are "user". (The published code labels these lines the wrong way round.)

    Raises ValueError unless the roles take turns and the last line is the policy's.
    """
    roles = [role for role, _ in history]
    if any(role not in _OTHER_SIDE for role in roles) or any(a == b for a, b in zip(roles, roles[1:], strict=False)):
        raise ValueError(f'history roles are {roles}; "user" and "assistant" must take turns')
    if roles and roles[-1] != "assistant":
        raise ValueError("history ends with the user's own line; the assistant must speak before the user does again")
    opening = [("assistant", OPENING)] if not roles or roles[0] == "user" else []
    role_prompt = "\n".join([ROLE_RULES, "", PROFILE_HEADING, *(f"- {fact}" for fact in persona.facts)])
    return [{"role": "system", "content": role_prompt}] + [
        {"role": _OTHER_SIDE[role], "content": text} for role, text in (*opening, *history)
    ]


def parse_simulator_messages(messages: Sequence[Message]) -> tuple[tuple[str, ...], list[tuple[str, str]]]:
    """Undo `simulator_messages`: return the persona's facts and the history as the policy's side sees it.

    Raises ValueError if the first message is not a role prompt with facts, or a later one has another role than
    "user" and "assistant".
    """
    if not messages or messages[0]["role"] != "system":
        raise ValueError('messages[0] must have role "system" and hold the role prompt')
    _, heading, profile = f"\n{messages[0]['content']}".rpartition(f"\n{PROFILE_HEADING}\n")
    facts = usable_facts(line[2:] for line in profile.split("\n") if line.startswith("- "))
    if not heading or not facts:
        raise ValueError(f'the system message must hold a line "{PROFILE_HEADING}" followed by "- fact" lines')
    for i, message in enumerate(messages[1:], start=1):
        if message["role"] not in _OTHER_SIDE:
            raise ValueError(f'messages[{i}].role is {shorten(message["role"])!r}; it must be "user" or "assistant"')
    turns = [(_OTHER_SIDE[m["role"]], m["content"]) for m in messages[1:]]
    return facts, turns[1:] if turns and turns[0] == ("assistant", OPENING) else turns


# name, as in --simulator-model → function(facts, history, seed) → what the user says; docs/endpoints.md adds one
EMBEDDED_USERS: dict[str, Callable[[Sequence[str], History, int], str]] = {
    "rule-user": first.user_reply,
    "rule-user-2": second.user_reply,
}


def complete(raw: bytes) -> dict[str, Any]:
    """Answer the body of a chat completion request as the user that it describes; RequestError if it is malformed.

    The request's "model" chooses the user; a name that is not in EMBEDDED_USERS gets the first one. The same body gives
    the same words: "seed" decides, or else a hash of the messages.
    """
    request = parse_request(raw)
    messages, seed = request["messages"], request.get("seed")
    if len(messages) > MAX_MESSAGES:
        raise RequestError(422, f"there are {len(messages)} messages; this server takes {MAX_MESSAGES}")
    try:
        facts, history = parse_simulator_messages(messages)
    except ValueError as error:
        raise RequestError(422, str(error)) from None
    if len(facts) > MAX_FACTS:
        raise RequestError(422, f"the role prompt has {len(facts)} facts; this server takes {MAX_FACTS}")
    model = request.get("model")
    if not isinstance(model, str) or model not in EMBEDDED_USERS:
        model = next(iter(EMBEDDED_USERS))
    digest = hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:16]
    reply = EMBEDDED_USERS[model](list(facts), history, int(digest, 16) if seed is None else seed)
    n_prompt, n_reply = sum(len(m["content"].split()) for m in messages), len(reply.split())
    return {
        "id": f"chatcmpl-{digest}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": reply}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": n_prompt, "completion_tokens": n_reply, "total_tokens": n_prompt + n_reply},  # words
    }


def make_user_server(
    host: str = "127.0.0.1", port: int = 8100, answer: Callable[[bytes], dict[str, Any]] = complete
) -> ThreadingHTTPServer:
    """Bind a server of the embedded users (port 0: any free one); `serve_forever()` runs it.

    `answer` is what it says to the body of a request. Raises ValueError for a host that is not loopback, and for a port
    that is not free.
    """
    return make_server(host, port, answer, EMBEDDED_USERS)


@dataclass
class EmbeddedServer:
    """An embedded server in a process of its own, so that it shares no interpreter lock with the trainer."""

    url: str
    process: subprocess.Popen[str]

    def stop(self) -> None:
        """End the process (it ends by itself when this one does)."""
        self.process.stdin.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def start_embedded_server(timeout: float = 600.0) -> EmbeddedServer:
    """Start the embedded server on a free loopback port; raise RuntimeError if it is not up in `timeout` seconds."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), "--port", "0", "--until-stdin-closes"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,  # Ctrl-C is for the trainer, which still needs the server while it saves
    )
    deadline = threading.Timer(timeout, process.kill)
    deadline.start()
    line = process.stdout.readline()
    deadline.cancel()
    server = EmbeddedServer(line.rpartition(" ")[2].strip(), process)
    if not line:
        server.stop()
        raise RuntimeError(f"the embedded server did not start in {timeout:g} s (exit status {process.returncode})")
    return server


def _shutdown_at_end_of_stdin(server: ThreadingHTTPServer) -> None:
    while os.read(0, 4096):  # returns b"" once the parent has closed its end, or has died
        pass
    server.shutdown()


class Timers:
    """Seconds spent per phase of an iteration: `with timers("update"):` adds to `timers.seconds["update"]`."""

    def __init__(self) -> None:
        self.seconds: Counter = Counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start


@dataclass
class Environment:
    """What the policy meets: the endpoints of user and judge, and counts of what happened there."""

    user: ChatClient
    judge: ChatClient | None  # None: by rule
    rule_verdicts: Callable[..., dict[str, bool]] = rewards.rule_verdicts  # the rule judge
    matches: rewards.Matcher = rewards.line_matches_fact  # whether a profile line states a fact
    subject: ChatClient | None = None  # an endpoint that is evaluated
    tape: Tape | None = None  # of --record or --replay
    counts: Counter = field(default_factory=Counter)
    timers: Timers = field(default_factory=Timers)
    signals: list[int] = field(default_factory=list)  # those that have asked this process to stop
    rank: int = 0  # of this process; the first one warns for all
    warned: set[str] = field(default_factory=set)  # what of

    def judge_with(self, seed: int) -> rewards.Judge:
        """Return the judge of a candidate: its endpoint, or the rules."""
        if self.judge is None:
            return rewards.Judge(None, self.rule_verdicts, seed)
        return rewards.Judge(self.judge.ask, self.rule_verdicts, seed, self.judge.note_verdict)

    def warn_once(self, topic: str, line: str) -> None:
        """Print a warning, unless there was one on this topic before."""
        if self.rank == 0 and topic not in self.warned:
            warn(line)
        self.warned.add(topic)

    def warn_of_rules(self, counts: Counter) -> None:
        """Warn once if too many of the user's planned messages had to be said by rule."""
        planned, ruled = counts["user_messages_planned"], counts["user_messages_by_rule"]
        if planned >= FEW_MESSAGES and ruled > MUCH_BY_RULE * planned:
            causes = {name.rpartition("_")[2]: n for name, n in counts.items() if "_refused_" in name}
            self.warn_once(
                "said by rule",
                f"{ruled} of {planned} messages of the user were said by rule, because its endpoint did not say what"
                f" was planned ({', '.join(f'{cause} {n}' for cause, n in causes.items())}); take another"
                " --simulator-model (docs/endpoints.md)",
            )

    def calls(self) -> Counter:
        """Return this process's calls so far, their tokens, retries and failures, under the names of metrics.jsonl."""
        counts: Counter = Counter()
        for name, client in (("simulator", self.user), ("judge", self.judge), ("subject", self.subject)):
            totals = client.counts if client else {"errors": {}}
            counts.update({f"{name}_{what}": n for what, n in totals.items() if what != "errors"})
            counts.update({f"{name}_error_{reason}": n for reason, n in totals["errors"].items()})
        return counts

    def hang_up(self) -> None:
        """Cut off all requests under way; no call can be made afterwards."""
        for client in filter(None, (self.user, self.judge, self.subject)):
            client.close()


def is_live(config: Config) -> bool:
    """Return whether replies come from endpoints, and are neither recorded nor replayed."""
    return bool(config.simulator_url or config.judge_url) and not (config.record or config.replay)


REPLAYED = "http://replayed.invalid"  # stands for the embedded user's address where no call is made


@contextmanager
def open_environment(config: Config, rank: int = 0, processes: int = 1) -> Iterator[Environment]:
    """Open the clients of user and judge, and the tape of --record or --replay, for one of so many processes.

    Without --simulator-url the embedded user is started for this process, unless its replies are replayed.
    """
    if not (config.simulator_url or config.replay) and config.simulator_model not in EMBEDDED_USERS:
        users = " or ".join(EMBEDDED_USERS)
        raise ValueError(f"--simulator-model is {config.simulator_model!r}; without --simulator-url it takes {users}")
    if config.user_mode == "planned" and not (config.simulator_url or config.replay):
        raise ValueError("--user-mode planned needs --simulator-url: the embedded user plans by itself")
    matches = rewards.choose_matcher(config.profile_judge, config.simulator_model)
    path = config.record or config.replay
    tape = Tape(path, recording=bool(config.record)) if path else None
    if tape and rank == 0:
        say(clean_text(tape.note), sys.stderr)
    quota = Quota(config.requests_per_minute / processes, config.tokens_per_minute / processes)

    def client(url: str, model: str, name: str) -> ChatClient:
        return ChatClient(
            url,
            model,
            config.api_key_env or None,
            read_timeout=config.request_timeout / 3,
            total_timeout=config.request_timeout,
            max_retries=config.max_retries,
            temperature=PLANNED_TEMPERATURE if name == "simulator" and is_planned(config) else 1.0,
            tape=tape,
            name=name,
            outage_budget=config.outage_budget,
            breaker_failures=config.breaker_failures,
            quota=quota,
            notify=warn,
        )

    server = None
    try:
        judge = client(config.judge_url, config.judge_model, "judge") if config.judge_url else None
        server = None if config.simulator_url or config.replay else start_embedded_server()
        url = config.simulator_url or (server.url if server else REPLAYED)
        user = client(url, config.simulator_model, "simulator")
        env = Environment(user, judge, matches=matches, tape=tape, rank=rank)
        try:
            yield env
        finally:
            env.hang_up()
    finally:
        if server:
            server.stop()
        if tape:
            tape.close()


def main(argv: Sequence[str] | None = None, answer: Callable[[bytes], dict[str, Any]] = complete) -> None:
    """Run the embedded server until it is interrupted; `answer` is what it says to a request's body."""
    parser = argparse.ArgumentParser(description="A user by rules behind /v1/chat/completions.", allow_abbrev=False)
    parser.add_argument("--host", default="127.0.0.1", help="loopback address to listen on")
    parser.add_argument("--port", type=int, default=8100, help="port to listen on; 0 takes a free one")
    parser.add_argument("--until-stdin-closes", action="store_true", help="end when standard input does")
    options = parser.parse_args(argv)
    try:
        server = make_user_server(options.host, options.port, answer)
    except ValueError as error:
        parser.error(str(error))
    say(f"simulated user at http://{server.server_address[0]}:{server.server_address[1]}/v1")
    if options.until_stdin_closes:
        threading.Thread(target=_shutdown_at_end_of_stdin, args=[server], daemon=True).start()
    with suppress(KeyboardInterrupt):
        server.serve_forever(poll_interval=0.1)
    server.server_close()


if __name__ == "__main__":
    main()
