"""Simulator and judge as services that fail: breaker, quota, failover, quorum, exit code; and hostile texts.

`Clock` is a time that a test moves itself, so that nothing here passes or fails on a busy machine's account.
"""

from __future__ import annotations

import doctest
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_simulator import ASK, ask_all, completion, hostile_server, http_reply
from test_trainer import ckpt, go, identical, records, tensors, user_url  # noqa: F401

import rewards
import simulator
import train_rlpa
from benchmarks import chaos, fuzz_text
from dialogue import ChatTokenizer
from endpoints import client as endpoint_client
from endpoints import speech
from endpoints.client import ChatClient
from endpoints.tape import Tape
from endpoints.throttle import BACKOFF_CAP, Breaker, Quota, backoff
from records import log
from report import __main__ as report
from untrusted import plain_text
from worlds import personas

pytestmark = pytest.mark.slow

OK, BROKEN = http_reply(completion("ok")), http_reply(b"{}", "503 Busy")


class Clock:
    """A clock that stands still until a test moves it."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# --------------------------------------------------------------------------------------------------- breaker and quota


def test_a_breaker_opens_after_failures_in_a_row_and_lets_one_probe_through():
    """Guards a breaker that counts failures that were not in a row, never opens, or lets everybody probe at once."""
    clock = Clock()
    breaker = Breaker(3, clock)
    for _ in range(5):
        assert not breaker.failed() and not breaker.failed()
        breaker.answered()
    assert not breaker.is_open and not breaker.claim_probe()
    assert [breaker.failed() for _ in range(4)] == [False, False, True, False]
    assert breaker.is_open and not breaker.claim_probe()  # not yet due
    pauses = []
    for _ in range(8):
        start = clock.now
        while not breaker.claim_probe():
            clock.now += 0.01
        assert not breaker.claim_probe()  # one at a time
        pauses.append(clock.now - start)
        breaker.failed(probe=True)
    assert pauses[0] <= 0.26 and pauses[-1] >= BACKOFF_CAP / 2 and max(pauses) <= BACKOFF_CAP + 0.02
    breaker.answered()
    assert not breaker.is_open and not breaker.claim_probe()
    assert not breaker.failed(probe=True) and not breaker.is_open  # a probe that comes late says nothing new


def test_a_server_that_asks_for_patience_gets_it_from_everybody():
    """Guards Retry-After that only the thread obeys which was told: others go on to hammer the server."""
    clock = Clock()
    breaker = Breaker(5, clock)
    assert breaker.failed(patience=30.0) and breaker.is_open
    clock.now += 29.9
    assert not breaker.claim_probe()
    clock.now += 0.2
    assert breaker.claim_probe()


@given(st.integers(0, 10**6))
@settings(max_examples=30)
def test_a_backoff_is_bounded(failures):
    """Guards an overflow after a night of failures, and a pause of 0 or of days."""
    assert 0.1 < backoff(failures) <= BACKOFF_CAP


@given(per_minute=st.integers(1, 400), steps=st.lists(st.tuples(st.integers(1, 50), st.floats(0, 9)), min_size=2))
@settings(max_examples=60, deadline=None)
def test_a_quota_is_never_exceeded_in_any_minute(per_minute, steps):
    """Guards a burst on top of a full minute (requests and tokens), and a quota that lets nobody through."""
    for of_requests in (True, False):
        clock, sent = Clock(), []
        quota = Quota(per_minute, 0, clock) if of_requests else Quota(0, per_minute, clock)
        for amount, gap in steps:
            clock.now += gap
            sent.append((clock.now + quota.take(amount), 1 if of_requests else amount))
        most = per_minute + (0 if of_requests else max(amount for amount, _ in steps)) + 1e-6
        assert all(sum(n for at, n in sent if start <= at < start + 59.999) <= most for start, _ in sent)
        needed = 61 * sum(n for _, n in sent) / per_minute
        assert sent[-1][0] <= 100 + sum(gap for _, gap in steps) + needed + 1e-6


def test_tokens_that_were_not_used_are_given_back():
    """Guards a quota that charges max_tokens for replies of a few words."""
    quota = Quota(tokens=61, clock=Clock())
    assert quota.take(31) == pytest.approx(30)
    quota.take(-30, requests=0)
    assert quota.take(0) == pytest.approx(0)
    assert Quota().take(10**9) == 0


def test_a_client_keeps_to_its_quota_outside_the_time_of_its_calls(monkeypatch):
    """Guards --requests-per-minute and --tokens-per-minute that nobody asks, and calls that wait longer than they may
    live. The rests are counted, not slept."""
    rests: list[float] = []
    usage = {"usage": {"prompt_tokens": 3, "completion_tokens": 2}}
    body = json.dumps(json.loads(completion("ok")) | usage).encode()
    clock = Clock()
    quota = Quota(6, 6000, clock)
    take = quota.take

    def take_at_once(tokens: float, requests: int = 1) -> float:
        rests.append(take(tokens, requests) * requests)  # what is given back (0 requests) waits for nothing
        return 0.0

    monkeypatch.setattr(quota, "take", take_at_once)
    with hostile_server(lambda sock, *_: sock.sendall(http_reply(body))) as url:
        with closing(ChatClient(url, "m", total_timeout=30, quota=quota, max_tokens=100)) as client:
            assert [client.ask(ASK, i) for i in range(5)] == ["ok"] * 5
    assert [r for r in rests if r > 1] == pytest.approx([61 / 6 * i for i in range(1, 5)], rel=0.01)
    assert max(rests) > 40  # longer than a call may last


# -------------------------------------------------------------------------------------------------- outage and failover


class Switch:
    """A server's behaviour: fails (or hangs) while `down` is set, and counts what it was sent."""

    def __init__(self, failure: Callable = lambda sock: sock.sendall(BROKEN)):
        self.down, self.failure, self.counts, self.lock = threading.Event(), failure, Counter(), threading.Lock()

    def __call__(self, sock, request, headers):
        probe = request["messages"] == endpoint_client.PING
        with self.lock:
            self.counts["probe" if probe else "request"] += 1
        if self.down.is_set():
            return self.failure(sock)
        sock.sendall(OK)


def wait_until(condition: Callable[[], object]) -> None:
    """Wait until something is so; the test's own time-out ends it if it never is."""
    while not condition():
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("calls", "retries", "failure"), [(1, 1, "refuses"), (24, 1, "refuses"), (8, 10, "refuses"), (4, 1, "hangs")]
)
def test_no_call_is_lost_to_an_outage(calls, retries, failure):
    """Guards dialogues that are dropped because the server was away for longer than their retries last.

    While it is out nothing but probes is sent, one at a time: a herd of retries would keep a weak server down.
    """
    release = threading.Event()
    switch = Switch() if failure == "refuses" else Switch(lambda sock: release.wait(600))
    switch.down.set()
    limits = {"total_timeout": 30, "read_timeout": 2} if failure == "hangs" else {"total_timeout": 200}
    with hostile_server(switch) as url:
        told: list[str] = []
        limits |= {"outage_budget": 600, "notify": told.append}
        with closing(ChatClient(url, "m", max_retries=retries, **limits)) as client:
            replies: list = []
            threading.Thread(target=lambda: replies.extend(ask_all(client, [ASK] * calls, range(calls)))).start()
            wait_until(lambda: switch.counts["probe"] >= 2)
            before = switch.counts["request"]
            wait_until(lambda: switch.counts["probe"] >= 3)
            assert switch.counts["request"] == before and before <= calls * (retries + 1)
            switch.down.clear()
            release.set()
            wait_until(lambda: replies)
            assert replies == ["ok"] * calls and client.counts["breaks"] >= 1 and not client.outage
            assert sum("asked again only after" in line for line in told) == client.counts["breaks"]
            assert "answers again" in told[-1]  # who looks on is told that it waits, and for whom


def test_an_outage_beyond_the_budget_is_a_typed_failure_of_all_calls():
    """Guards a wait for ever, calls that wait one budget after another, and a reason that says nothing."""
    switch = Switch()
    switch.down.set()
    with hostile_server(switch) as url, closing(ChatClient(url, "m", outage_budget=0.5)) as client:
        replies = ask_all(client, [ASK] * 20, range(20))
        assert {r.reason for r in replies} == {"outage"} and "HTTP 503" in client.outage
        assert "no answer for 0.5 s" in str(replies[0])
        before = switch.counts["request"]
        assert client.ask(ASK).reason == "outage" and switch.counts["request"] == before  # the budget is spent


def test_a_request_that_fails_alone_is_given_up():
    """Guards a breaker that takes one request's failure for an outage: the run would wait for ever, then end."""
    def behave(sock, request, headers):
        sock.sendall(BROKEN if "poison" in request["messages"][0]["content"] else OK)

    with hostile_server(behave) as url:
        for retries, failures in ((0, 5), (1, 2), (3, 2)):
            limits = {"max_retries": retries, "breaker_failures": failures, "outage_budget": 600}
            with closing(ChatClient(url, "m", **limits)) as one:
                assert one.ask([{"role": "user", "content": "poison"}]).reason == "http_5xx"
                assert one.ask(ASK) == "ok" and not one.outage


def test_a_refusal_is_no_outage():
    """Guards a breaker that a wrong key or a bad request opens: the endpoint is alive, and says what is wrong."""
    with hostile_server(lambda sock, *_: sock.sendall(http_reply(b"{}", "401 No"))) as url:
        with closing(ChatClient(url, "m", outage_budget=600, breaker_failures=2)) as client:
            assert {client.ask(ASK, i).reason for i in range(10)} == {"http_4xx"}
            assert client.counts["breaks"] == 0


def test_patience_is_kept_and_is_not_the_calls_time():
    """Guards a call that is dropped because the server asked for more patience than a call may last."""
    replies = [http_reply(b"{}", "429 Slow", "Retry-After: 1"), OK]
    seen = []

    def behave(sock, request, headers):
        seen.append(time.monotonic())
        sock.sendall(replies[min(len(seen), 2) - 1])

    with hostile_server(behave) as url:
        with closing(ChatClient(url, "m", total_timeout=0.9, read_timeout=0.9, outage_budget=600)) as client:
            assert client.ask(ASK) == "ok" and seen[1] - seen[0] >= 1


def test_several_endpoints_take_turns_and_stand_in_for_each_other():
    """Guards a list of which only the first is asked, and a dead one that costs calls or is never asked again."""
    one, two = Switch(), Switch()
    with hostile_server(one) as a, hostile_server(two) as b:
        with closing(ChatClient(f"{a}, {b}/v1,{a}", "m", outage_budget=600, breaker_failures=2)) as client:
            assert ask_all(client, [ASK] * 40, range(40)) == ["ok"] * 40
            assert one.counts["request"] == two.counts["request"] == 20
            one.down.set()
            assert ask_all(client, [ASK] * 40, range(40)) == ["ok"] * 40
            assert not client.outage
            wait_until(lambda: client.ask(ASK) == "ok" and one.counts["probe"])
            before = one.counts["request"]
            assert ask_all(client, [ASK] * 10, range(10)) == ["ok"] * 10 and one.counts["request"] == before
            one.down.clear()
            wait_until(lambda: client.ask(ASK) == "ok" and one.counts["request"] > before)


@contextmanager
def recorded(path: Path, recording: bool, url: str, budget: float) -> Iterator[ChatClient]:
    """A client with a tape."""
    with closing(Tape(path, recording)) as tape:
        with closing(ChatClient(url, "m", tape=tape, outage_budget=budget)) as client:
            yield client


def test_replies_on_tape_do_not_depend_on_the_endpoint(tmp_path):
    """Guards a recording that a move to another address, or a second endpoint, makes useless; and outages on tape."""
    path, ok, down = tmp_path / "tape", Switch(), Switch()
    down.down.set()
    with hostile_server(ok) as a, hostile_server(down) as b:
        with recorded(path, True, f"{a},{b}", 600) as client:
            assert ask_all(client, [ASK] * 6, range(6)) == ["ok"] * 6
        with recorded(path, True, b, 0.2) as client:
            assert client.ask(ASK, 3) == "ok" and client.ask(ASK, 99).reason == "outage"
    assert path.read_text().count("\n") == 6
    with recorded(path, False, "http://gone.invalid,http://too.invalid", 60) as client:
        assert [client.ask(ASK, i) for i in range(6)] == ["ok"] * 6


# ------------------------------------------------------------------------------------------------------ total deadline


def test_names_that_are_looked_up_for_ever_do_not_outlast_the_deadline(monkeypatch):
    """Guards a resolver that hangs: it knows no time-out, and no socket is there yet that could be cut off."""
    asked = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: asked.wait(1000) and [])
    with closing(ChatClient("http://some.example", "m", total_timeout=0.5, max_retries=5)) as client:
        assert client.ask(ASK).reason == "timeout" and not asked.is_set()
    asked.set()


def test_a_thousand_silent_addresses_do_not_outlast_the_deadline(monkeypatch):
    """Guards connect time-outs that start anew with each address of a name: 1,000 of 0.2 s here."""
    silent = socket.socket()
    silent.bind(("127.0.0.1", 0))
    silent.listen(0)
    full = [socket.socket() for _ in range(8)]  # its queue: what comes after them gets no answer
    for sock in full:
        sock.setblocking(False)
        sock.connect_ex(silent.getsockname())
    address = (socket.AF_INET, socket.SOCK_STREAM, 6, "", silent.getsockname())
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: [address] * 1000)
    with closing(ChatClient("http://some.example", "m", connect_timeout=0.2, total_timeout=0.7)) as client:
        assert client.ask(ASK).reason == "timeout"
    for sock in (silent, *full):
        sock.close()


def test_a_handshake_that_drips_does_not_outlast_the_deadline():
    """Guards TLS: its bytes reset the socket's time-out, and while it shakes hands nobody else knows the socket."""
    listening = socket.create_server(("127.0.0.1", 0))

    def drip():
        sock = listening.accept()[0]
        sock.sendall(b"\x16\x03\x03\x40\x00")  # a TLS record of 16 KiB begins
        while True:
            try:
                sock.sendall(b"\x02")
            except OSError:
                return
            time.sleep(0.1)

    threading.Thread(target=drip, daemon=True).start()
    url = f"https://127.0.0.1:{listening.getsockname()[1]}"
    with closing(ChatClient(url, "m", total_timeout=0.6, max_retries=3)) as client:
        assert client.ask(ASK).reason == "timeout"
    listening.close()


# -------------------------------------------------------------------------------------------------------- the trainer


@pytest.fixture
def stopped(capsys) -> Callable[..., str]:
    """A function that runs the trainer until it gives up, and returns its one line on stderr."""

    def run(*argv: object) -> str:
        capsys.readouterr()
        assert train_rlpa.main([str(a) for a in argv]) == 75
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train_rlpa.py: ")]
        assert len(lines) == 1
        return lines[0]

    return run


@contextmanager
def counted_user(behave: Callable[[int], bytes | None]) -> Iterator[str]:
    """The embedded user, unless `behave`, given how many requests there were, has something else to say."""
    asked, lock = [0], threading.Lock()

    def answer(sock, request, headers):
        with lock:
            asked[0] += 1
            said = behave(asked[0])
        raw = json.dumps(request).encode()
        if said is None and request["messages"] != endpoint_client.PING:
            said = http_reply(json.dumps(simulator.complete(raw)).encode())
        sock.sendall(said or OK)

    with hostile_server(answer) as url:
        yield url


FLAGS = ("--num-iterations", 2, "--save-every", 0, "--reply-steps", 4, "--kv-gib", 0.5)


@pytest.fixture(scope="module")
def whole(ckpt, user_url, tmp_path_factory) -> Path:  # noqa: F811
    """An undisturbed run."""
    run = tmp_path_factory.mktemp("whole") / "run"
    go("--ckpt", ckpt, *FLAGS, "--simulator-url", user_url, "--run-dir", run)
    return run


@pytest.mark.parametrize("when", ["before", "rollout", "evaluation"])
def test_an_outage_saves_what_is_finished(ckpt, user_url, whole, tmp_path, stopped, when):  # noqa: F811
    """Guards work that an outage costs: wherever it comes, what is saved and resumed equals the undisturbed run.

    At batch 4 and 2 turns, and 2 evaluation dialogues of which the embedded world has two sets sampled and greedy, the
    user is asked 8 times before training, 4 times in an iteration, and 4 times in an evaluation in between.
    """
    last, saved = {"before": (5, 0), "rollout": (8 + 4 + 4 + 2, 1), "evaluation": (8 + 4 + 2, 1)}[when]
    broken, flags = tmp_path / "broken", ("--ckpt", ckpt, *FLAGS)
    with counted_user(lambda n: None if n <= last else BROKEN) as url:
        line = stopped(*flags, "--simulator-url", url, "--run-dir", broken, "--outage-budget", 0.3)
    assert f"saved after iteration {saved}" in line and f"--resume {broken}" in line and "--simulator-url" in line
    assert [f.name for f in (broken / "checkpoints").iterdir()] == [
        f"iteration_{saved:06d}" + ("" if when == "rollout" else ".stopped")  # whose evaluation is still to come
    ]
    assert len(records(broken, "train")) == saved
    go("--resume", broken, "--simulator-url", user_url)
    assert identical(tensors(broken, 2), tensors(whole, 2))
    assert records(broken, name="episodes.jsonl") == records(whole, name="episodes.jsonl")
    assert records(broken) == records(whole)


def test_an_outage_in_the_last_evaluation_is_made_up_for(ckpt, user_url, tmp_path, stopped):  # noqa: F811
    """Guards a run that is trained, but cannot be resumed because nothing is left to train."""
    flags = ("--ckpt", ckpt, "--num-iterations", 1, "--reply-steps", 4)
    with counted_user(lambda n: None if n <= 8 + 4 + 5 else BROKEN) as url:
        stopped(*flags, "--simulator-url", url, "--run-dir", tmp_path, "--outage-budget", 0.3)
    go("--resume", tmp_path, "--simulator-url", user_url)
    assert [r["kind"] for r in records(tmp_path) if r["iteration"] == 1] == [
        "train", *(f"{name}/{how}" for name in ("heldout", "unseen") for how in ("sampled", "greedy"))
    ]


def test_a_batch_below_the_quorum_is_discarded_and_played_anew(ckpt, tmp_path):  # noqa: F811
    """Guards updates on the few dialogues that a failing user has left over, and batches that vanish uncounted."""
    refusal = http_reply(b"{}", "400 No")
    with counted_user(lambda n: refusal if 8 < n <= 8 + 3 else None) as url:  # three of the first batch's four
        go("--ckpt", ckpt, "--run-dir", tmp_path, "--simulator-url", url, "--num-iterations", 2, "--eval-every", 0,
           "--reply-steps", 4)  # fmt: skip
    first, second = records(tmp_path, "train")
    assert (first["batches_discarded"], first["dialogues_dropped"], first["dialogues"]) == (1, 0, 4)
    assert "batches_discarded" not in second and first["simulator_error_http_4xx"] == 3
    kept = [e for e in records(tmp_path, "train", "episodes.jsonl") if e["iteration"] == 1]
    assert len(kept) == 4 and first["action_tokens"] == sum(
        c["tokens"] for e in kept for t in e["turns"] for c in t["candidates"]
    )


def test_batches_that_stay_below_the_quorum_end_the_run(ckpt, tmp_path, stopped):  # noqa: F811
    """Guards the silent run: every dialogue lost, every metric absent, weights that never move, and exit code 0."""
    asked = []

    def refuse(n: int) -> bytes | None:
        asked.append(n)
        return None if n <= 8 else http_reply(b"{}", "403 No quota")

    with counted_user(refuse) as url:
        line = stopped("--ckpt", ckpt, "--run-dir", tmp_path, "--simulator-url", url, "--quorum-retries", 3)
    assert "4 of 4 dialogues were lost (simulator: http_4xx 4)" in line and "--quorum 0.5" in line
    assert len(asked) == 8 + 4 * 4 and "saved after iteration 0" in line


def test_two_ranks_stop_as_one(ckpt, tmp_path):  # noqa: F811
    """Guards one rank that raises alone while the other waits in a collective: the user fails rank 1's persona only."""
    personas = "".join(json.dumps({"facts": [f"Occupation: {job}", "Age: 34"]}) + "\n" for job in ("baker", "pilot"))
    (tmp_path / "p.jsonl").write_text(personas)

    def behave(sock, request, headers):
        sock.sendall(http_reply(b"{}", "403 No") if "pilot" in request["messages"][0]["content"] else OK)

    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train_rlpa.py"]
    file = str(tmp_path / "p.jsonl")
    flags = ["--personas", file, "--eval-personas", file, "--rollout-batch-size", "2", "--eval-dialogues", "2"]
    with hostile_server(behave) as url:
        done = subprocess.run(
            [*launcher, "--ckpt", str(ckpt), "--simulator-url", url, "--run-dir", str(tmp_path / "run"), *flags,
             "--quorum", "0.6", "--quorum-retries", "0"],
            cwd=Path(train_rlpa.__file__).parent, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
            text=True,
        )  # fmt: skip
    assert done.returncode == 1, done.stderr[-3000:]
    assert done.stderr.count("train_rlpa.py: 1 of 2 dialogues were lost") == 1, done.stderr[-3000:]
    assert "exitcode  : 75" in done.stderr, done.stderr[-3000:]  # of whom torchrun saw end first


def test_connections_do_not_pile_up_with_threads_that_come_and_go():
    """Guards a session per thread: each rollout has threads of its own, and theirs stayed open, 4 per iteration."""
    connections = set()

    def behave(sock, request, headers):
        connections.add(sock.getpeername())
        sock.sendall(OK)

    with hostile_server(behave) as url, closing(ChatClient(url, "m")) as client:
        for _ in range(12):
            asking = [threading.Thread(target=client.ask, args=[ASK, 1]) for _ in range(2)]
            for step in (threading.Thread.start, threading.Thread.join):
                for thread in asking:
                    step(thread)
        assert client.counts["requests"] == 24 and len(connections) <= 2


def test_a_run_against_chaos_scores_nothing_wrongly(ckpt, tmp_path):  # noqa: F811
    """Guards rewards, losses and counts against a user that fails in every way at once: 500s, bodies that are no
    replies, connections that hang, and a time in which it is down."""
    bad = chaos.Chaos(errors=0.10, malformed=0.10, hanging=0.05, seed=1)
    server = chaos.make_server(bad)
    threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
    url, run = f"http://127.0.0.1:{server.server_address[1]}", tmp_path / "run"

    def be_down():
        wait_until(lambda: bad.counts.total() > 20)
        bad.down.set()
        wait_until(lambda: bad.counts["down"] > 3)  # on a busy machine no request may come for a while
        bad.down.clear()

    outage = threading.Thread(target=be_down)
    outage.start()
    go("--ckpt", ckpt, "--run-dir", run, "--simulator-url", url, "--rollout-batch-size", 8, "--max-turns", 3,
       "--num-iterations", 2, "--eval-every", 0, "--request-timeout", 5, "--max-retries", 6)  # fmt: skip
    outage.join()
    bad.ended.set()
    server.shutdown()
    server.server_close()
    assert min(bad.counts[fate] for fate in ("answer", "error", "malformed", "hang", "down")) > 0
    found = chaos.wrong(run)
    assert found["counts of dialogues"] == 2 and found["messages of the user"] > 10 and found["profile scores"] > 50
    assert {name: n for name, n in found.items() if name.startswith("wrong") and n} == {}
    text = (run / "episodes.jsonl").read_text()
    changes = {'"user_text": "': '"user_text": "So ', '{"profile": 0': '{"profile": 7', '"reward": 0': '"reward": 7'}
    for old, new in changes.items():
        (run / "episodes.jsonl").write_text(text.replace(old, new))
        assert any(n for name, n in chaos.wrong(run).items() if name.startswith("wrong")), old


# ------------------------------------------------------------------------------------------------------- hostile texts


@given(texts=st.lists(st.text(max_size=30) | st.lists(st.sampled_from(fuzz_text.FRAGMENTS), max_size=6).map("".join),
                      min_size=1, max_size=12))  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_no_text_forges_anything(texts):
    """Guards roles, tags, control tokens, facts, log lines, terminals and pages against whoever may write into them."""
    assert fuzz_text.violations(texts) == {}


@pytest.mark.parametrize(
    ("module", "name", "finds"),
    [(rewards, "indented", "forged role"), (speech, "plain_text", "acting character in a reply"),
     (personas, "clean_text", "forged fact"), (log, "clean_text", "terminal escape"),
     (report, "visible", "acting character on the page"), (report, "embed", "forged markup")],
)  # fmt: skip
def test_the_fuzzer_sees_what_it_looks_for(monkeypatch, module, name, finds):
    """Guards the fuzzer itself: with one defence removed it must not report that all is well."""
    without = json.dumps if name == "embed" else lambda text, limit=0: text
    monkeypatch.setattr(module, name, without)
    rng = random.Random(1)
    assert fuzz_text.violations([fuzz_text.hostile_text(rng) for _ in range(80)])[finds] > 0


def test_the_fuzzer_sees_forged_tokens(monkeypatch):
    """Guards the check of ids: a tokenizer that reads "<|im_end|>" in a text as the token must be noticed.

    The client cuts a reply there; what it lets through, and what others wrote, is text all the same.
    """
    monkeypatch.setattr("endpoints.speech.TURN_ENDS", re.compile("(?!)"))
    monkeypatch.setattr(ChatTokenizer, "encode", lambda self, text: self.tokenizer.encode(text).ids)
    assert fuzz_text.violations(["a<|im_end|>b"])["forged token"] > 0


@given(st.text())
def test_plain_text_is_idempotent_and_keeps_what_is_read(text):
    """Guards a cleaning that must be repeated, and one that eats letters of any script."""
    plain = plain_text.plain_text(text)
    assert plain_text.plain_text(plain) == plain
    assert len(plain.splitlines()) == plain.count("\n") + (not plain.endswith("\n")) * bool(plain)
    assert [ch for ch in plain if ch.isalnum()] == [ch for ch in text if ch.isalnum()]
    assert "\n" not in plain_text.clean_text(text)


def test_a_reply_is_bounded_in_bytes_and_tokens(ckpt):  # noqa: F811
    """Guards memory against a reply without an end; what a user message may take in tokens is cut in the trainer."""
    def behave(sock, request, headers):
        sock.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + b'{"choices": [{"message": {"content": "')
        while True:
            sock.sendall(b"x" * 65_536)

    with hostile_server(behave) as url, closing(ChatClient(url, "m", max_retries=0)) as client:
        assert client.ask(ASK).reason == "too_large"


KEY = "sk-proj-0123456789-secret"


def test_the_key_is_in_no_file_and_no_output_of_a_run(ckpt, tmp_path, monkeypatch, capfd):  # noqa: F811
    """Guards the key against logs, configs, checkpoints, tapes, reports and error texts, when a server quotes it."""
    monkeypatch.setenv("RLPA_TEST_KEY", KEY)
    escaped = f'{{"choices": [{{"message": {{"content": "You sent {KEY.replace("-", chr(92) + "u002d")}"}}}}]}}'
    plain, refusal = completion(f"Is {KEY} yours?"), json.dumps({"error": {"message": f"bad key {KEY}"}}).encode()
    sent, lock = [], threading.Lock()

    def behave(sock, request, headers):
        with lock:
            sent.append(headers["Authorization"])
        refusals = http_reply(refusal, "401 No"), http_reply(refusal, "500 No")
        bodies = http_reply(escaped.encode()), http_reply(plain), *refusals
        sock.sendall(bodies[min(request.get("seed", 0) % 5, 3)] if len(sent) < 40 else refusals[1])

    run = tmp_path / "run"
    with hostile_server(behave) as url:
        flags = ("--run-dir", run, "--simulator-url", url, "--quorum", 0, "--api-key-env", "RLPA_TEST_KEY", "--record",
                 tmp_path / "tape", "--eval-every", 0, "--outage-budget", 0.5, "--num-iterations", 9, "--tensorboard")
        assert train_rlpa.main(["--ckpt", str(ckpt), *map(str, flags)]) == 75
    report.main([str(run)])
    assert set(sent) == {f"Bearer {KEY}"} and (tmp_path / "tape").stat().st_size > 100
    assert (run / "report.html").exists()
    shown = capfd.readouterr()
    everything = [shown.out.encode(), shown.err.encode(), *(f.read_bytes() for f in tmp_path.rglob("*") if f.is_file())]
    core = KEY.removeprefix("sk-proj-").removesuffix("-secret").encode()  # however its dashes are written
    assert len(everything) > 10 and not any(core in text for text in everything)
    assert b"***" in b"".join(everything)


def test_a_key_in_the_wrong_place_is_not_shown():
    """Guards the two common mistakes: the key itself given as the variable's name, and a key inside the URL."""
    for name in (KEY, KEY.replace("-", "_")):
        with pytest.raises(ValueError) as caught:
            endpoint_client.read_key(name)
        assert "0123456789" not in str(caught.value) and "NAME" in str(caught.value)
    with closing(ChatClient(f"http://127.0.0.1:9/v1?key={KEY}", "m", max_retries=0)) as client:
        assert "0123456789" not in str(client.ask(ASK)) + client.complaint and "http://127.0.0.1:9/" in client.complaint
    for url in (f"https://host/v1#{KEY}", f"https://user:{KEY}@host/v1", f"https://user:{KEY}@host:port/v1"):
        with pytest.raises(ValueError) as caught:
            ChatClient(url, "m")
        assert "0123456789" not in str(caught.value)


def test_doctests():
    """Guards examples that were never run."""
    assert doctest.testmod(plain_text).failed == 0
