"""Recording and replaying: a run against a random endpoint is repeated without it, bit for bit, and what it cost.

The endpoints here answer differently each time, whatever the seed, and after random delays.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_run import USAGE, chat_server, write_checkpoint
from test_simulator import ask_all

import rewards
import simulator
import train_rlpa
from config import Config
from endpoints.calls import calls_note, cost
from endpoints.client import ChatClient
from endpoints.tape import Tape
from endpoints.wire import ChatError
from evaluation import __main__ as evaluation
from rewards import VERDICTS

pytestmark = pytest.mark.slow

ASK = [{"role": "user", "content": "How are you?"}]
ROOT = Path(train_rlpa.__file__).parent
CALLS = itertools.count()
SMALL = {
    "rollout_batch_size": 4, "minibatch_size": 2, "microbatch_tokens": 1000, "max_turns": 3, "num_candidates": 2,
    "max_new_tokens": 12, "num_personas": 20, "num_iterations": 2, "eval_every": 1, "eval_dialogues": 2,
    "episodes_every": 1, "save_every": 1, "lr": 3e-3, "critic_lr": 3e-3, "tensorboard": False, "kv_gib": 0.1,
}  # fmt: skip


def whimsical(request: dict) -> str | int:
    """Play user, judge or subject by chance: nothing it says follows from the request; every tenth call fails."""
    time.sleep(random.random() / 50)
    if next(CALLS) % 10 == 9:
        return 500
    if "verdicts" in request["messages"][0]["content"]:
        return json.dumps({name: int(random.random() < 0.9) for name in VERDICTS})
    return f"I am {random.randrange(18, 80)} years old, or {random.random()}."


def nobody() -> str:
    """An address where nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{sock.getsockname()[1]}/v1"


@contextmanager
def client(url: str, path: Path, recording: bool, name: str = "user", **settings) -> Iterator[ChatClient]:
    """A client that records or replays."""
    with closing(Tape(path, recording)) as tape, closing(ChatClient(url, "m", tape=tape, name=name, **settings)) as one:
        yield one


# ----------------------------------------------------------------------------------------------------------------- tape


def told(clients: ChatClient, replies: list) -> tuple:
    """All that a caller can see of replies and counts, but for the time they took."""
    counts = {k: v for k, v in clients.counts.items() if k != "breaks"}
    return [(type(r), str(r), getattr(r, "tokens", 0), getattr(r, "reason", "")) for r in replies], counts


def test_a_recording_is_replayed_in_any_order_without_network_or_key(tmp_path, monkeypatch):
    """Guards replies handed out in the order of the file, and token counts, failures or retries that are lost."""
    monkeypatch.setenv("SOME_KEY", "secret-key")
    tape, seeds = tmp_path / "tape.jsonl", list(range(60))
    with chat_server(whimsical) as url, client(url, tape, True, max_retries=1, api_key_env="SOME_KEY") as recording:
        replies = ask_all(recording, [ASK] * 60, seeds)
        first = told(recording, replies)
        assert recording.counts["errors"]["http_5xx"] >= 6
    assert "secret" not in tape.read_text() and len(tape.read_text().splitlines()) == 60
    monkeypatch.delenv("SOME_KEY")
    random.Random(1).shuffle(seeds)
    with client(nobody(), tape, False, max_retries=1, api_key_env="SOME_KEY") as replaying:
        shuffled = dict(zip(seeds, ask_all(replaying, [ASK] * 60, seeds), strict=True))
        assert told(replaying, [shuffled[seed] for seed in range(60)]) == first


def test_an_unknown_request_is_an_error_that_names_it_and_no_call(tmp_path):
    """Guards a silent live call: other words, seed, model or temperature are another request."""
    tape = tmp_path / "tape.jsonl"
    calls = []
    with chat_server(lambda request: calls.append(request) or "Fine.") as url:
        with client(url, tape, True) as recording:
            assert recording.ask(ASK, 1) == "Fine."
        for messages, seed, name, settings in (
            ([{"role": "user", "content": "What now?"}], 1, "user", {}),
            (ASK, 2, "user", {}),
            (ASK, None, "user", {}),
            (ASK, 1, "judge", {}),
            (ASK, 1, "user", {"temperature": 0.5}),
            (ASK, 1, "user", {"max_tokens": 7}),
        ):
            with client(url, tape, False, name, **settings) as replaying:
                with pytest.raises(ValueError, match=r"--replay .*tape.jsonl holds no reply") as caught:
                    replaying.ask(messages, seed)
                assert messages[0]["content"] in str(caught.value) and "\n" not in str(caught.value)
    assert len(calls) == 1


def test_a_request_has_one_reply_whoever_asks(tmp_path):
    """Guards two dialogues of the same words and seed with different replies, which no replay could tell apart."""
    tape = tmp_path / "tape.jsonl"
    with chat_server(whimsical) as url, client(url, tape, True, max_retries=9) as recording:
        with ThreadPoolExecutor(8) as pool:
            replies = set(pool.map(lambda _: recording.ask(ASK, 5), range(24)))
    assert len(replies) == 1 and len(tape.read_text().splitlines()) == 1


def record(tape: Path, seeds: list[int], answer=lambda request: f"It is {request['seed']}.") -> list:
    with chat_server(answer) as url, client(url, tape, True, max_retries=0) as recording:
        return ask_all(recording, [ASK] * len(seeds), seeds)


@pytest.mark.parametrize("damage", [
    lambda line: line[:40] + b"\n",
    lambda line: line.replace(b"It is 1", b"It is 7"),
    lambda line: line.replace(b'"seed": 1', b'"seed": 3'),
    lambda line: b"\n",
    lambda line: b"[1]\n",
    lambda line: b'{"text": "hi"}\n',
    lambda line: b"\xff\xfe\n",
    lambda line: b"[" * 100_000 + b"\n",
])  # fmt: skip
def test_a_damaged_line_is_an_error_with_its_number(tmp_path, damage):
    """Guards a changed reply that is replayed as if it had been said, and a traceback."""
    tape = tmp_path / "tape.jsonl"
    record(tape, [0])
    record(tape, [1])
    record(tape, [2])
    lines = tape.read_bytes().splitlines(keepends=True)
    tape.write_bytes(lines[0] + damage(lines[1]) + lines[2])
    for recording in (False, True):
        with pytest.raises(ValueError, match=r"tape.jsonl, line 2: damaged") as caught:
            Tape(tape, recording)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_last_line_that_a_kill_cut_short_is_left_out_and_the_recording_goes_on(tmp_path):
    """Guards a killed run whose file cannot be used again, or that is damaged for good by what is written behind it."""
    tape = tmp_path / "tape.jsonl"
    first = record(tape, [0, 1])
    whole = tape.read_bytes()
    for cut in (1, 50, len(whole.splitlines()[1]) - 1):
        tape.write_bytes(whole[:-cut])
        with closing(Tape(tape, recording=False)) as replaying:
            assert "line 2, the last one, was cut short" in replaying.note and "1 recorded calls" in replaying.note
        assert tape.read_bytes() == whole[:-cut]  # a replay leaves the file as it is
        calls = []
        assert record(tape, [0, 1], lambda request: calls.append(request) or f"It is {request['seed']}.") == first  # noqa: B023
        assert len(calls) == 1 and sorted(tape.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_failures_are_replayed_but_asked_again_when_a_recording_goes_on(tmp_path):
    """Guards a replay that revives a lost dialogue, and a recording that keeps an outage for ever."""
    tape = tmp_path / "tape.jsonl"
    lost = record(tape, [0], lambda _: 404)[0]
    with client(nobody(), tape, False) as replaying:
        again = replaying.ask(ASK, 0)
        assert isinstance(again, ChatError) and (str(again), again.reason) == (str(lost), "http_4xx")
    assert record(tape, [0]) == ["It is 0."]
    with client(nobody(), tape, False) as replaying:
        assert replaying.ask(ASK, 0) == "It is 0."


def test_a_closed_client_records_no_failure(tmp_path):
    """Guards Ctrl-C that goes down in the file as an endpoint's failure."""
    tape = tmp_path / "tape.jsonl"
    asked, closed = threading.Event(), threading.Event()
    late = lambda _: asked.set() or closed.wait() and "Late."  # noqa: E731
    with chat_server(late) as url, client(url, tape, True) as recording:
        asking = threading.Thread(target=recording.ask, args=(ASK, 0))
        asking.start()
        asked.wait()
        recording.close()
        asking.join()
        closed.set()
    assert tape.read_text() == ""


def test_two_processes_record_into_one_file(tmp_path):
    """Guards lines that are torn, and a rank that cuts off what another has just written."""
    tape = tmp_path / "tape.jsonl"
    tape.write_bytes(b'{"endpoint": "simu')
    long = "word " * 5000
    with chat_server(lambda _: long) as url, client(url, tape, True) as one, client(url, tape, True) as two:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda seed: (one, two)[seed % 2].ask(ASK, seed), range(40)))
    with closing(Tape(tape, recording=False)) as replaying:
        assert "40 recorded calls" in replaying.note and "cut" not in replaying.note


def test_files_that_cannot_be_opened(tmp_path):
    """Guards a traceback, and a run that is found not to be recorded at its end."""
    for path, recording in ((tmp_path / "absent", False), (tmp_path / "no" / "such", True), (tmp_path, True)):
        with pytest.raises(ValueError, match="cannot be opened"):
            Tape(path, recording)
    with pytest.raises(ValueError, match="--record a and --replay b"):
        Config(ckpt="x", record="a", replay="b")


# ----------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory) -> Path:
    """A checkpoint of two random layers whose turns always parse."""
    return write_checkpoint(tmp_path_factory.mktemp("random-policy"), SMALL)


@pytest.fixture
def all_parse(monkeypatch):
    """Take any turn for a valid one, so that the judge is asked."""
    parsed = rewards.ParsedTurn
    valid = lambda text, reason="stop": parsed(["Age: 34"], text or "...")  # noqa: E731
    monkeypatch.setattr(rewards, "parse_turn", valid)


def records(run: Path, name: str = "metrics.jsonl") -> list[dict]:
    """Read a run's records, without what a clock says."""
    return [without_clock(json.loads(line)) for line in (run / name).read_text().splitlines()]


def without_clock(record: dict) -> dict:
    """Leave out what depends on when replies came: seconds, and how often a breaker opened."""
    return {
        k: v for k, v in record.items() if not k.startswith("seconds") and "per_second" not in k and "_breaks" not in k
    }


def weights(run: Path) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / "iteration_000002"
    return {f"{f.relative_to(folder)}:{k}": v for f in folder.rglob("*.safetensors") for k, v in load_file(f).items()}


@pytest.mark.parametrize("steps", [[], ["--reply-steps", "3"], ["--simulator-model", "planned"]])
def test_a_training_run_is_replayed_to_the_bit(ckpt, tmp_path, capfd, all_parse, steps):
    """Guards the promise: a run against random, failing user and judge gives the same metrics and weights for free."""
    tape = tmp_path / "tape.jsonl"
    argv = ["--ckpt", str(ckpt), "--price-in", "2", "--price-out", "8", *steps]
    with chat_server(whimsical) as url:
        live = ["--simulator-url", url, "--judge-url", url, "--record", str(tape), "--run-dir", str(tmp_path / "live")]
        assert train_rlpa.main([*argv, *live]) == 0
    url, said = nobody(), capfd.readouterr()
    assert f"{tape}: 0 recorded calls" in said.err
    again = ["--simulator-url", url, "--judge-url", url, "--replay", str(tape), "--run-dir", str(tmp_path / "again")]
    assert train_rlpa.main([*argv, *again]) == 0
    found = records(tmp_path / "live")
    assert records(tmp_path / "again") == found and len(found) == 12
    assert records(tmp_path / "again", "episodes.jsonl") == records(tmp_path / "live", "episodes.jsonl")
    live, again = weights(tmp_path / "live"), weights(tmp_path / "again")
    assert live.keys() == again.keys() and all(torch.equal(live[name], again[name]) for name in live)
    lines = [line for line in (said.out + capfd.readouterr().out).splitlines() if line.startswith("calls of the run")]
    assert lines[1] == lines[0] + " (replayed: nothing was asked)"
    assert sum(r.get("simulator_error_http_5xx", 0) + r.get("judge_error_http_5xx", 0) for r in found) > 0
    train = [r for r in found if r["kind"] == "train"][0]
    asked = [sum(r.get(f"{name}_{side}", 0) for name in ("simulator", "judge"))
             for side in ("prompt_tokens", "completion_tokens") for r in [train]]  # fmt: skip
    assert train["cost_dollars"] == pytest.approx((2 * asked[0] + 8 * asked[1]) / 1e6, abs=1e-6)
    planned, again = train.get("user_messages_planned", 0), train.get("user_messages_asked_again", 0)
    assert bool(planned and again) == ("planned" in steps) and train["simulator_requests"] >= planned + again


def test_a_killed_run_goes_on_with_its_recording_and_asks_nothing_twice(ckpt, tmp_path, all_parse):
    """Guards a resumed run that pays again, or meets other users than those that its metrics were made with."""
    run, asked = tmp_path / "run", []
    chance = lambda request: asked.append(request) or f"I am {random.randrange(18, 80)} years old."  # noqa: E731
    with chat_server(chance) as url:
        argv = ["--ckpt", str(ckpt), "--simulator-url", url, "--record", str(tmp_path / "tape.jsonl")]
        assert train_rlpa.main([*argv, "--run-dir", str(run)]) == 0
        found, calls, kept = records(run), len(asked), weights(run)
        shutil.rmtree(run / "checkpoints" / "iteration_000002")
        assert train_rlpa.main(["--resume", str(run), *argv[2:]]) == 0
    assert records(run) == found and len(asked) == calls
    assert all(torch.equal(tensor, kept[name]) for name, tensor in weights(run).items())


def test_the_embedded_user_is_recorded_too_and_not_started_for_a_replay(ckpt, tmp_path, monkeypatch):
    """Guards a replay that needs a server all the same."""
    tape = tmp_path / "tape.jsonl"
    assert train_rlpa.main(["--ckpt", str(ckpt), "--record", str(tape), "--run-dir", str(tmp_path / "live")]) == 0
    monkeypatch.setattr(simulator, "start_embedded_server", lambda: 1 / 0)
    assert train_rlpa.main(["--ckpt", str(ckpt), "--replay", str(tape), "--run-dir", str(tmp_path / "again")]) == 0
    assert records(tmp_path / "again") == records(tmp_path / "live")
    assert "cost_dollars" not in records(tmp_path / "live")[0]


def test_another_run_than_the_recorded_one_is_one_line(ckpt, tmp_path, capfd):
    """Guards a traceback out of a thread, a hang, or a dialogue that is dropped as if the user had failed."""
    tape = tmp_path / "tape.jsonl"
    assert train_rlpa.main(["--ckpt", str(ckpt), "--record", str(tape), "--run-dir", str(tmp_path / "live")]) == 0
    capfd.readouterr()
    argv = ["--ckpt", str(ckpt), "--replay", str(tape), "--run-dir", str(tmp_path / "again"), "--seed", "1"]
    assert train_rlpa.main(argv) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith(f"train_rlpa.py: --replay {tape} holds no reply of simulator")


def test_an_evaluation_is_replayed_to_the_bit_and_counts_its_calls(ckpt, tmp_path, capfd, all_parse):
    """Guards subjects with the same model name that get each other's replies, and calls that nobody counts."""
    tape = tmp_path / "tape.jsonl"

    def results(out: str, urls: list[str], *argv: str) -> dict:
        subjects = [f"ours={ckpt}", *(f"{name}={url}#same" for name, url in zip("ab", urls, strict=True))]
        ends = ["--simulator-url", urls[0], "--judge-url", urls[1], "--price-in", "1", "--price-out", "10"]
        folder = tmp_path / out
        assert evaluation.main(
            [*subjects, *ends, *argv, "--turns", "3", "--num-personas", "4", "--quiet", "--out", str(folder)]
        ) == 0  # fmt: skip
        found = json.loads((folder / "results.json").read_text())["subjects"]
        return {name: without_clock(one | {"calls": without_clock(one["calls"])}) for name, one in found.items()}

    with chat_server(whimsical) as one, chat_server(whimsical) as two:
        live = results("live", [one, two], "--record", str(tape))
    assert results("again", [nobody(), nobody()], "--replay", str(tape)) == live
    assert records(tmp_path / "again", "episodes.jsonl") == records(tmp_path / "live", "episodes.jsonl")
    calls = live["a"]["calls"]
    assert 4 <= calls["subject_requests"] <= 12 and "subject_requests" not in live["ours"]["calls"]
    assert calls["cost_dollars"] == pytest.approx(sum(
        tokens * price for side, price in (("prompt", 1e-6), ("completion", 1e-5))
        for name in ("subject", "simulator", "judge") for tokens in [calls[f"{name}_{side}_tokens"]]
    ))  # fmt: skip
    assert "a: simulator" in capfd.readouterr().out


def within(seconds: float, work: Callable[[], object]) -> object:
    """What `work` returns; a failure, and no test that never ends, if that takes longer."""
    found: Future = Future()
    threading.Thread(target=lambda: found.set_result(work()), daemon=True).start()
    return found.result(seconds)


def test_a_request_that_is_not_on_file_ends_an_evaluation_whoever_asks(ckpt, tmp_path, capfd, all_parse):
    """Guards dialogues that wait for ever for one whose thread has ended in an error, in the middle of a batch."""
    tape, count = tmp_path / "tape.jsonl", itertools.count()

    def play(subject: str, *argv: str) -> int:
        ends = ["--simulator-url", url, "--judge-url", url, "--turns", "2", "--num-personas", "6", "--quiet"]
        return evaluation.main([subject, *ends, *argv, "--out", str(tmp_path / f"out{next(count)}")])

    for method, who in (("rlpa", f"x={ckpt}"), ("base", f"x={ckpt}"), ("base", "x={url}#m")):
        tape.unlink(missing_ok=True)
        with chat_server(whimsical) as url:
            assert within(60, lambda: play(who.format(url=url), "--method", method, "--record", str(tape))) == 0  # noqa: B023
        whole, url = tape.read_bytes().splitlines(keepends=True), nobody()
        endpoints = [json.loads(line)["endpoint"] for line in whole]
        for asked in dict.fromkeys(endpoints):
            lines = [i for i, name in enumerate(endpoints) if name == asked]
            missing = lines[len(lines) // 2]
            tape.write_bytes(b"".join(whole[:missing] + whole[missing + 1 :]))
            capfd.readouterr()
            assert within(60, lambda: play(who.format(url=url), "--method", method, "--replay", str(tape))) == 2  # noqa: B023
            assert f"holds no reply of {asked}" in capfd.readouterr().err
    assert not [t.name for t in threading.enumerate() if t.name.startswith(("reply", "chat"))]


@pytest.mark.parametrize("who", ["x={url}#m", "x={ckpt}"])
def test_ctrl_c_ends_an_evaluation_that_waits(ckpt, tmp_path, who):
    """Guards a traceback, and an evaluation that goes on until endpoints have answered or given up."""
    asked, answered = threading.Event(), threading.Event()

    def silent(_: dict) -> str:
        asked.set()
        answered.wait()
        return "Late."

    with chat_server(silent) as url:
        command = [sys.executable, "-m", "evaluation", who.format(url=url, ckpt=ckpt), "--simulator-url", url]
        command += ["--request-timeout", "600", "--quiet", "--reply-steps", "0", "--out", tmp_path / "out"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        assert asked.wait()
        process.send_signal(signal.SIGINT)
        said = process.communicate()[1]
        answered.set()
    assert process.returncode == 130 and said == "evaluation: stopped by Ctrl-C\n"


# ---------------------------------------------------------------------------------------------------------------- costs


def test_tokens_are_the_endpoints_or_else_words_and_that_is_said(tmp_path):
    """Guards estimated tokens that pass for counted ones, and lost calls that are paid for."""
    for usage, expected in (
        (USAGE, (40, 9, 0)),
        (None, (3, 2, 1)),
        ({"completion_tokens": 9}, (3, 9, 1)),
        ({"prompt_tokens": "40", "completion_tokens": True}, (3, 2, 1)),
    ):
        with chat_server(lambda request: 404 if request["seed"] else "Very well.", usage) as url:
            with closing(ChatClient(url, "m")) as client:
                ask_all(client, [ASK, ASK], [0, 1])
                counts = client.counts
        names = ("prompt_tokens", "completion_tokens", "without_usage")
        assert tuple(counts[name] for name in names) == expected and counts["requests"] == 2
        note = calls_note({f"judge_{name}": counts[name] for name in ("requests", *names)}, Config())
        assert ("words are counted" in note) == (expected[2] > 0)


def test_the_embedded_user_costs_nothing():
    """Guards dollars for what runs on this machine."""
    calls = {"simulator_prompt_tokens": 10**6, "judge_prompt_tokens": 10**6, "judge_completion_tokens": 10**6}
    prices = {"price_in": 3.0, "price_out": 5.0, "judge_url": "http://h"}
    assert cost(calls, Config(**prices)) == {"cost_dollars": 8.0}
    assert cost(calls, Config(**prices, simulator_url="http://h")) == {"cost_dollars": 11.0}
    assert cost(calls, Config()) == {}
