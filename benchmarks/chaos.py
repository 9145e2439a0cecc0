"""The embedded user as a bad service: `python benchmarks/chaos.py --port 8110 --down-at 60 --down-for 60`.

Of the requests 10 % get a 500, 10 % a malformed body and 5 % no answer at all, at random; and once it is down.
"""

from __future__ import annotations

import argparse
import random
import socket
import struct
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from http.server import ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import simulator  # noqa: E402

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


class Handler(simulator._Handler):
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
    server = simulator.make_server(port=port)
    server.RequestHandlerClass, server.chaos = Handler, chaos
    return server


def main() -> None:
    """Run from the command line until it is interrupted; the last line counts what befell requests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8110, help="port on 127.0.0.1; 0: any free one")
    parser.add_argument("--errors", type=float, default=0.10, help="share of requests that get a 500")
    parser.add_argument("--malformed", type=float, default=0.10, help="share that get a malformed body")
    parser.add_argument("--hanging", type=float, default=0.05, help="share that get nothing")
    parser.add_argument("--down-at", type=float, default=60.0, help="seconds from the first request until it is down")
    parser.add_argument("--down-for", type=float, default=0.0, help="seconds that it is down; 0: never")
    parser.add_argument("--seed", type=int, default=0, help="of what befalls whom")
    options = parser.parse_args()
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


if __name__ == "__main__":
    main()
