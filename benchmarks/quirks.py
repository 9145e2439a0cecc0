"""The embedded user behind the habits of real servers, one at a time: what a training iteration makes of each.

    python -m benchmarks.quirks                             one iteration against each; prints a Markdown table
    python -m benchmarks.quirks --only think,null           … against some of them
    python -m benchmarks.quirks --serve think --port 8100   serves one, for your own commands

A server says what `simulator.complete` says, so that figures can be compared with those of the plain one.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import simulator
from endpoints.client import PING
from endpoints.server import Handler
from endpoints.wire import RequestError
from untrusted.plain_text import shorten

ROOT = Path(__file__).parents[1]
MARKER = "zebrafish"  # stands in all thoughts, and in nothing that is said
THOUGHTS = f"Let me be the {MARKER}. My profile: I am 55 and live in Austin. I must not say so."
FLAGS = (
    "--ckpt --num-iterations 1 --rollout-batch-size 8 --minibatch-size 4 --max-turns 4 --eval-dialogues 4"
    " --reply-steps 16 --kv-gib 0.5 --outage-budget 60 --episodes-every 1 --overwrite"
).split()


COUNTED = r"simulator_(error_\w+|length|thoughts)|dialogues_dropped"  # metrics


class Asked(NamedTuple):
    """A request, and when it came."""

    request: dict[str, Any]
    path: str
    headers: Any
    seconds: float  # since the server's first request
    url: str  # of the server


Answer = tuple[int, Any, dict[str, str]]  # status; body: bytes, or what becomes JSON; headers
Quirk = Callable[[Asked], Answer]


def plain(asked: Asked) -> Answer:
    """Answer as the embedded user does."""
    try:
        return 200, simulator.complete(json.dumps(asked.request).encode()), {}
    except RequestError as error:
        return refusal(error.status, str(error))


def refusal(status: int, words: str) -> Answer:
    """Refuse a request in OpenAI's form."""
    return status, {"error": {"message": words, "type": "invalid_request_error", "code": status}}, {}


def with_choice(change: Callable[[str], dict[str, Any]], one_in: int = 1) -> Quirk:
    """Change the choice of an answer, given what it says; `one_in`: for one seed in so many."""

    def quirk(asked: Asked) -> Answer:
        answer = plain(asked)
        if answer[0] == 200 and asked.request.get("seed", 0) % one_in == 0:
            choice = answer[1]["choices"][0]
            changed = change(choice["message"]["content"])
            choice["message"].update({k: v for k, v in changed.items() if k not in ("finish_reason", "error")})
            choice.update({k: v for k, v in changed.items() if k in ("finish_reason", "error")})
        return answer

    return quirk


def with_usage(usage: dict[str, Any] | None) -> Quirk:
    """Send other usage."""

    def quirk(asked: Asked) -> Answer:
        status, body, headers = plain(asked)
        return status, {k: v for k, v in body.items() if k != "usage"} | ({"usage": usage} if usage else {}), headers

    return quirk


def always(status: int, body: Any, **headers: str) -> Quirk:
    """Send the same, whatever is asked."""
    return lambda asked: (status, body, headers)


def refuses(part: str, words: str, status: int = 400) -> Quirk:
    """Refuse requests that hold a field."""
    return lambda asked: refusal(status, words) if part in asked.request else plain(asked)


def refuses_system(words: str, status: int) -> Quirk:
    """Refuse system messages, as some chat templates do; a role prompt in the first user message is understood."""

    def quirk(asked: Asked) -> Answer:
        first, *others = asked.request["messages"]
        if first["role"] == "system":
            return refusal(status, words)
        rules, heading, rest = first["content"].partition(simulator.PROFILE_HEADING)
        facts, _, said = rest.partition("\n\n")
        unfolded = [{"role": "system", "content": rules + heading + facts}, {"role": "user", "content": said}, *others]
        return plain(asked._replace(request=asked.request | {"messages": unfolded}))

    return quirk


def out_at_first(asked: Asked) -> Answer:
    """Be out for 2 s; then answer, a probe of one token with null, as a thinking model does."""
    if asked.seconds < 2:
        return refusal(503, "loading the model")
    if asked.request["messages"] == PING:
        message = {"role": "assistant", "content": None, "reasoning_content": THOUGHTS[:5]}
        return 200, {"choices": [{"index": 0, "message": message, "finish_reason": "length"}]}, {}
    return plain(asked)


def too_long_at_times(asked: Asked) -> Answer:
    """Refuse one seed in 40, as a server whose context is too small for some dialogues."""
    words = "This model's maximum context length is 4096 tokens. However, you requested 4711 tokens"
    return plain(asked) if asked.request["seed"] % 40 else refusal(400, words)


def takes_one_address(asked: Asked) -> Answer:
    """Answer at one address only, query and all."""
    if asked.path != "/openai/deployments/user/chat/completions?api-version=1":
        return refusal(404, "Resource not found")
    return plain(asked)


def redirects(asked: Asked) -> Answer:
    """Point to another address, with a token in its query."""
    return 307, b"", {"Location": f"{asked.url}/elsewhere/v1/chat/completions?token={MARKER}"}


SSE = b'data: {"choices": [{"delta": {"content": "Hi"}}]}\n\ndata: [DONE]\n\n'
QUIRKS: dict[str, tuple[str, Quirk]] = {
    "plain": ("the embedded user", plain),
    "think": ("thoughts in `content`, between tags", with_choice(
        lambda said: {"content": f"<think>\n{THOUGHTS}\n</think>\n\n{said}"})),
    "think-untagged": ("… without the opening tag", with_choice(
        lambda said: {"content": f"{THOUGHTS}\n</think>\n\n{said}"})),
    "think-open": ("… that never end, one seed in five", with_choice(
        lambda said: {"content": f"<think>\n{THOUGHTS}", "finish_reason": "length"}, 5)),
    "reasoning": ("thoughts in `reasoning_content`", with_choice(lambda said: {"reasoning_content": THOUGHTS})),
    "parts": ("`content` is a list of parts, one of them thoughts", with_choice(lambda said: {"content": [
        {"type": "thinking", "thinking": [{"type": "text", "text": THOUGHTS}]}, {"type": "text", "text": said}]})),
    "null": ("`content` is null, one seed in ten", with_choice(lambda said: {"content": None}, 10)),
    "blank": ("`content` is blank, one seed in ten", with_choice(lambda said: {"content": " \n"}, 10)),
    "refusal": ("null with `refusal`, one seed in ten", with_choice(
        lambda said: {"content": None, "refusal": "I cannot help with that."}, 10)),
    "broken-off": ("half a sentence, finish_reason error, one seed in ten", with_choice(
        lambda said: {"content": said[: len(said) // 2], "finish_reason": "error"}, 10)),
    "error-in-choice": ("half a sentence beside an `error`, one seed in ten", with_choice(
        lambda said: {"content": said[: len(said) // 2], "error": {"message": "upstream died"}}, 10)),
    "length": ("finish_reason length, one seed in ten", with_choice(lambda said: {"finish_reason": "length"}, 10)),
    "ran-on": ("goes on behind `<\\|im_end\\|>`, one seed in three", with_choice(
        lambda said: {"content": f"{said}<|im_end|>\n<|im_start|>user\n{THOUGHTS}"}, 3)),
    "details": ("thoughts as Open WebUI folds them", with_choice(lambda said: {
        "content": f'<details type="reasoning" done="true"><summary>Thought</summary>{THOUGHTS}</details>\n{said}'})),
    "no-usage": ("no `usage`", with_usage(None)),
    "usage-absurd": ("`usage` of 400 digits", with_usage({"prompt_tokens": 10**399, "completion_tokens": 10**9})),
    "seed": ("400: no `seed` (Mistral's words)", lambda asked: (422, {"detail": [
        {"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]}, {})
        if "seed" in asked.request else plain(asked)),
    "max_tokens": ("400: `max_completion_tokens` instead (OpenAI's)", refuses("max_tokens", "Unsupported parameter:"
        " 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.")),
    "temperature": ("400: no `temperature` (OpenAI's)", refuses("temperature", "Unsupported value: 'temperature' does"
        " not support 1.0 with this model. Only the default (1) value is supported.")),
    "system": ("400: no system role (Gemma's template in vLLM)", refuses_system("System role not supported", 400)),
    "system-500": ("… as llama.cpp says it", refuses_system("Jinja Exception: System role not supported", 500)),
    "context": ("400: too long, one seed in 40", too_long_at_times),
    "outage": ("503 for 2 s; then well, but a probe gets null", out_at_first),
    "address": ("one complete address with a query", takes_one_address),
    "error-200": ("200 with an error object", always(200, {"error": {"message": "overloaded"}})),
    "sse": ("server-sent events only", always(200, SSE)),
    "html": ("an HTML page", always(200, b"<html><body>Welcome to the gateway</body></html>")),
    "model-404": ("404: no such model", always(*refusal(404, "The model `rule-user` does not exist.")[:2])),
    "key-401": ("401: no key", always(*refusal(401, "Incorrect API key provided.")[:2])),
    "redirect": ("307 to another address", redirects),
}  # fmt: skip


class QuirkHandler(Handler):
    """The embedded server's handler, with a quirk."""

    def do_POST(self) -> None:
        """Answer, in the server's way."""
        request = json.loads(self._read_body())
        url = f"http://127.0.0.1:{self.server.server_address[1]}"
        asked = Asked(request, self.path, self.headers, time.monotonic() - self.server.first(), url)
        status, body, headers = self.server.quirk(asked)
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(raw)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw)
        self.wfile.flush()


def make_server(name: str, port: int = 0) -> ThreadingHTTPServer:
    """Bind the embedded user with a quirk of the table; port 0: any free one."""
    server = simulator.make_user_server(port=port)
    server.RequestHandlerClass, server.quirk = QuirkHandler, QUIRKS[name][1]
    server.first = functools.cache(time.monotonic)  # when the first request came
    return server


class Outcome(NamedTuple):
    """What a run has come to."""

    code: int
    figures: list[dict[str, Any]]  # of metrics.jsonl, without clocks and calls
    leaks: int  # files, and the output, that hold thoughts
    said: str  # the line it ended with, or what the calls were like


def train(name: str, folder: Path) -> Outcome:
    """Run one training iteration against a quirk."""
    server = make_server(name)
    threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    url += "/openai/deployments/user/chat/completions?api-version=1" * (name == "address")
    command = [sys.executable, "train_rlpa.py", *FLAGS, "--simulator-url", url, "--run-dir", folder / "run"]
    with closing(server.socket):
        command += ["--record", folder / "tape"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
        server.shutdown()
    written = [file.read_bytes() for file in folder.rglob("*") if file.is_file()]
    leaks = sum(MARKER.encode() in content for content in [*written, done.stdout.encode(), done.stderr.encode()])
    metrics = folder / "run" / "metrics.jsonl"
    written = metrics.read_text(encoding="utf-8") if metrics.exists() else ""
    records = [json.loads(line) for line in written.splitlines()]
    figures = [{k: v for k, v in r.items() if not k.startswith(("seconds", "simulator_")) and "per_second" not in k}
               for r in records]  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if line.startswith(("train_rlpa.py: ", "warning: "))]
    said = [*lines, calls_of(records)] if done.returncode == 0 else lines[-1:]
    return Outcome(done.returncode, figures, leaks, "; ".join(said).replace(url, "URL"))


def calls_of(records: list[dict[str, Any]]) -> str:
    """Say how many attempts failed, why, and how many dialogues were lost."""
    sums: Counter[str] = Counter()
    for record in records:
        sums.update({k: n for k, n in record.items() if re.fullmatch(COUNTED, k)})
    return ", ".join(f"{name.removeprefix('simulator_')} {n:g}" for name, n in sorted(sums.items()) if n)


def main() -> int:
    """Run from the command line; exit code 1 if thoughts were written, or a run ended with another code than 0 or 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", choices=QUIRKS, help="serve one until Ctrl-C, and train nothing")
    parser.add_argument("--port", type=int, default=8100, help="of --serve, on 127.0.0.1; 0: any free one")
    parser.add_argument("--only", default=",".join(QUIRKS), help="quirks to try, with commas between them")
    options = parser.parse_args()
    if options.serve:
        server = make_server(options.serve, options.port)
        print(f"{QUIRKS[options.serve][0]}: http://127.0.0.1:{server.server_address[1]}/v1", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever(poll_interval=0.1)
        return 0
    bad = 0
    print("| quirk | what it does | exit code | figures | leaks | what was said |\n|---|---|---:|---|---:|---|")
    with tempfile.TemporaryDirectory(prefix="quirks-") as root:
        outcomes = {"plain": train("plain", Path(root) / "plain")}
        for name in options.only.split(","):
            outcome = outcomes.get(name) or train(name, Path(root) / name)
            figures = "-" if outcome.code else "equal" if outcome.figures == outcomes["plain"].figures else "differ"
            said = shorten(outcome.said, limit=330).replace("|", r"\|")
            print(f"| {name} | {QUIRKS[name][0]} | {outcome.code} | {figures} | {outcome.leaks} | {said} |", flush=True)
            bad += outcome.leaks > 0 or outcome.code not in (0, 2)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
