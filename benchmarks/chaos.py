"""The embedded user as a bad service: `python -m benchmarks.chaos --port 8110 --down-at 60 --down-for 60`.

Of the requests 10 % get a 500, 10 % a malformed body and 5 % no answer at all, at random; and once it is down.
`python -m benchmarks.chaos --check RUN` then recomputes messages, rewards and counts from a run's episodes (all of them
with `--episodes-every 1`): what an undisturbed user says, and what its words are worth. Exit code 1 if any is wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from http.server import ThreadingHTTPServer
from pathlib import Path

import rewards
import simulator
from command_line.flags import run_settings
from config import Config
from dialogue import stream_seed
from endpoints.server import Handler
from worlds import first
from worlds.ledger import disclosed
from worlds.personas import Persona

MALFORMED = (b"{", b"<html>Bad gateway</html>", b'{"choices": []}', b'{"choices": [{"message": "hi"}]}', b"\xff")


class Chaos:
    """Decides what befalls each request, and counts it."""

    def __init__(self, errors: float, malformed: float, hanging: float, seed: int = 0):
        self.fates, self.weights = ("error", "malformed", "hang", "answer"), (errors, malformed, hanging)
        self.counts: Counter[str] = Counter()
        self.down, self.ended = threading.Event(), threading.Event()
        self._random, self._lock = random.Random(seed), threading.Lock()

    def fate(self) -> str:
        """Draw what befalls the next request."""
        with self._lock:
            weights = (*self.weights, 1 - sum(self.weights))
            fate = "down" if self.down.is_set() else self._random.choices(self.fates, weights)[0]
            self.counts[fate] += 1
            return fate

    def body(self) -> bytes:
        """Draw a malformed body."""
        with self._lock:
            return self._random.choice(MALFORMED)

    def outage(self, at: float, seconds: float) -> None:
        """Be down for so many seconds, at so many seconds from now."""
        self.ended.wait(at)
        self.down.set()
        self.ended.wait(seconds)
        self.down.clear()


class ChaosHandler(Handler):
    """The embedded server's handler, whom chaos befalls."""

    def do_POST(self) -> None:
        """Answer, or not."""
        chaos = self.server.chaos
        match chaos.fate():
            case "answer":
                super().do_POST()
            case "down":  # a reset, as a client sees that of a machine that has just lost its server
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                self.connection.close()
            case "hang":
                self.close_connection = True
                chaos.ended.wait(300)
            case "error":
                self._read_body()
                self._refuse(500, "chaos")
            case "malformed":
                self._read_body()
                body = chaos.body()
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
                self.wfile.flush()


def make_server(chaos: Chaos, port: int = 0) -> ThreadingHTTPServer:
    """Bind the embedded user behind chaos."""
    server = simulator.make_user_server(port=port)
    server.RequestHandlerClass, server.chaos = ChaosHandler, chaos
    return server


def wrong(run: Path) -> Counter[str]:
    """Count what was checked in a run's training iterations and, with "wrong" before it, what is not as it must be."""
    config = Config(**run_settings(run))
    found: Counter[str] = Counter()

    def check(name: str, is_right: bool) -> None:
        found[name] += 1
        found[f"wrong {name}"] += not is_right

    episodes: dict[int, list[dict]] = {}
    for line in (run / "episodes.jsonl").read_text(encoding="utf-8").splitlines():
        if (episode := json.loads(line))["kind"] == "train":
            episodes.setdefault(episode["iteration"], []).append(episode)
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["kind"] != "train" or record["iteration"] not in episodes:
            continue
        played = episodes[record["iteration"]]
        whole = [episode for episode in played if episode["dropped"] is None]
        scored = [c for episode in whole for turn in episode["turns"] for c in turn["candidates"]]
        found["dropped dialogues"] += len(played) - len(whole)
        check("counts of dialogues", record["dialogues"] == len(played) == config.rollout_batch_size)
        check("counts of dropped dialogues", record["dialogues_dropped"] == len(played) - len(whole))
        check("counts of action tokens", record["action_tokens"] == sum(c["tokens"] for c in scored))
        mean = sum(c["reward"] for c in scored) / max(1, len(scored))
        check("mean rewards", math.isclose(record["reward"], mean, abs_tol=1e-6))
        for episode in whole:
            check("lengths", len(episode["turns"]) == config.max_turns)
            check_turns(episode, config, check)
    return found


def check_turns(episode: dict, config: Config, check: Callable[[str, bool], None]) -> None:
    """Check a dialogue's messages against the undisturbed user's, and its rewards against their words."""
    stream = (config.seed, "train", episode["iteration"] - 1)
    history: list[tuple[str, str]] = []
    persona = Persona(episode["persona_id"], tuple(episode["persona_facts"]))
    for t, turn in enumerate(episode["turns"]):
        if t:
            facts, heard = simulator.parse_simulator_messages(simulator.simulator_messages(persona, history))
            seed = stream_seed(*stream, "user", episode["index"], t)
            check("messages of the user", turn["user_text"] == first.user_reply(list(facts), heard, seed))
        history.append(("user", turn["user_text"]))
        said = [text for role, text in history if role == "user"]
        for c in turn["candidates"]:
            ledger = vars(rewards.score_profile(c["profile"], persona.facts, disclosed(persona.facts, said)))
            check("profile scores", c["judged"] and c["ledger"] == ledger)
            earned = ledger[rewards.PROFILE_TARGETS[config.profile_target]] if c["failure"] is None else 0
            check("profile rewards", c["parts"]["profile"] == earned)
            parts = sum(getattr(config, f"{name}_weight") * value for name, value in c["parts"].items())
            check("rewards", math.isclose(c["reward"], parts, abs_tol=1e-9))
        history.append(("assistant", turn["candidates"][turn["chosen"]]["response"]))


def main() -> int:
    """Run from the command line until it is interrupted; the last line counts what befell requests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8110, help="port on 127.0.0.1; 0: any free one")
    parser.add_argument("--errors", type=float, default=0.10, help="share of requests that get a 500")
    parser.add_argument("--malformed", type=float, default=0.10, help="share that get a malformed body")
    parser.add_argument("--hanging", type=float, default=0.05, help="share that get nothing")
    parser.add_argument("--down-at", type=float, default=60.0, help="seconds from the first request until it is down")
    parser.add_argument("--down-for", type=float, default=0.0, help="seconds that it is down; 0: never")
    parser.add_argument("--seed", type=int, default=0, help="of what befalls whom")
    parser.add_argument("--check", type=Path, metavar="RUN", help="serve nothing; check the episodes of a run")
    options = parser.parse_args()
    if options.check:
        found = wrong(options.check)
        print("\n".join(f"{n:>8,} {name}" for name, n in sorted(found.items())))
        return int(any(n for name, n in found.items() if name.startswith("wrong")) or not found["profile scores"])
    chaos = Chaos(options.errors, options.malformed, options.hanging, options.seed)
    server = make_server(chaos, options.port)
    print(f"chaos at http://127.0.0.1:{server.server_address[1]}", flush=True)

    def be_down() -> None:
        while not chaos.counts:
            time.sleep(0.1)
        chaos.outage(options.down_at, options.down_for)

    if options.down_for:
        threading.Thread(target=be_down, daemon=True).start()
    with suppress(KeyboardInterrupt):
        server.serve_forever(poll_interval=0.1)
    chaos.ended.set()
    server.server_close()
    print(f"chaos: {dict(chaos.counts)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
