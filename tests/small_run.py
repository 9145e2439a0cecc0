"""What tests of whole runs share: a checkpoint of random weights, a user, an endpoint of their own, and the records."""

from __future__ import annotations

import functools
import json
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tokenizers import Tokenizer

from learners.weights import save_pretrained
from model import Qwen2Config, random_policy
from simulator import make_user_server
from tiny.make import train_tokenizer
from tiny.scripts import scripted_dialogue

USAGE = {"prompt_tokens": 40, "completion_tokens": 9}


@functools.cache
def small_tokenizer() -> Tokenizer:
    """Train a byte-level tokenizer of 400 ids, once per process."""
    rng = random.Random(0)
    return train_tokenizer([text for _ in range(50) for turn in scripted_dialogue(rng, 2) for text in turn], 400)


def write_checkpoint(folder: Path, settings: dict) -> Path:
    """Write a checkpoint: the small tokenizer, two random layers, and settings small enough for tests."""
    shape = Qwen2Config(small_tokenizer().get_vocab_size(), 32, 48, 2, num_attention_heads=2, num_key_value_heads=1)
    save_pretrained(random_policy(shape, seed=0), folder)
    small_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "rlpa.json").write_text(json.dumps(settings))
    return folder


@contextmanager
def served(server: ThreadingHTTPServer, path: str = "/v1") -> Iterator[str]:
    """Serve in a thread of this process; gives the URL."""
    threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}{path}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def run_arguments(folder: Path, settings: dict) -> Iterator[list[str]]:
    """Write a checkpoint that carries settings, and run a user, which all processes share; gives flags for both."""
    write_checkpoint(folder, settings)
    with running_user() as url:
        yield ["--ckpt", str(folder), "--simulator-url", url]


def running_user():
    """Run the embedded user; gives its URL."""
    return served(make_user_server(port=0))


def chat_server(answer: Callable[[dict], str | int], usage: dict | None = USAGE):
    """Serve chat completions: `answer` gets the request and gives what to say, or a status of failure."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            said = answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            body = {"choices": [{"message": {"content": said}}]} | ({"usage": usage} if usage else {})
            self.send_response(said if isinstance(said, int) else 200)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *args):
            pass

    return served(ThreadingHTTPServer(("127.0.0.1", 0), Handler))


def records(run: Path, kind: str = "", name: str = "metrics.jsonl") -> list[dict]:
    """Read a run's records, those of one kind if it is given, without what a clock says."""
    found = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [
        {k: v for k, v in r.items() if not k.startswith("seconds") and not k.endswith("_per_second")}
        for r in found if kind in ("", r["kind"])
    ]  # fmt: skip
