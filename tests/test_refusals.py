"""What endpoints refuse, and what comes of it: another form of the request, a line and exit code 2, or patience."""

from __future__ import annotations

import doctest
import itertools
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from small_run import chat_server, served
from test_simulator import ASK, PERSONA, ask_all, completion, hostile_server, http_reply, scripted
from test_trainer import ckpt, go, records, user_url  # noqa: F401

import evaluation.__main__ as evaluation
import train_rlpa
from benchmarks import quirks
from endpoints import calls, refusals
from endpoints.client import PING, ChatClient
from endpoints.tape import Tape
from endpoints.wire import ChatError
from rewards import VERDICTS
from simulator import simulator_messages
from studies import offline

TINY = Path(train_rlpa.__file__).parent / "tiny"
OK = http_reply(completion("ok"))
SYSTEM = [{"role": "system", "content": "Be Ann."}, *ASK]


def quirk(name: str):
    """Serve a quirk; gives the URL."""
    return served(quirks.make_server(name), path="")


# ------------------------------------------------------------------------------------------ what a server does not take


@pytest.mark.parametrize(
    ("status", "words", "part"),
    [
        (400, "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'"
         " instead.", "max_tokens"),
        (400, "'max_tokens' or 'max_completion_tokens' is too large: 300. This model's context length is 256.", ""),
        (400, "Unsupported value: 'temperature' does not support 0.7 with this model. Only the default (1) value is"
         " supported.", "temperature"),
        (400, "Unsupported parameter: 'temperature' is not supported with this model.", "temperature"),
        (400, "The model returned: {\"message\":\"`temperature` is deprecated for this model.\"}", "temperature"),
        (400, "litellm.UnsupportedParamsError: gpt-5 doesn't support temperature=0.1 while", "temperature"),
        (400, "temperature must lie in [0, 2]", ""),
        (422, '[{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]',
         "seed"),
        (400, 'Invalid JSON payload received. Unknown name "seed": Cannot find field.', "seed"),
        (500, "ollama does not support parameters: {'seed': 1}, for model=llama3", "seed"),
        (400, "anthropic does not support parameters: ['seed'], for model=claude", "seed"),
        (400, "Torch XLA does not support per-request seed.", "seed"),
        (400, "System role not supported", "system role"),
        (500, "Jinja Exception: System role not supported", "system role"),
        (400, "Conversation roles must alternate user/assistant/user/assistant/...", "system role"),
        (400, "Only user and assistant roles are supported!", "system role"),
        (500, "Only user, system and assistant roles are supported, not tool", ""),
        (400, "Developer instruction is not enabled for models/gemma-3-27b-it", "system role"),
        (400, "Unsupported value: 'messages[0].role' does not support 'system' with this model.", "system role"),
        (400, "System message must be at the beginning.", "system role"),
        (400, "This model's maximum context length is 4096 tokens. However, you requested 4711 tokens.", ""),
        (404, "The model `seed` does not exist, or is not supported", ""),
        (503, "temperature is not supported", ""),
    ],
)  # fmt: skip
def test_words_are_understood(status, words, part):
    """Guards the table against wordings of real servers, and against refusals that are about something else."""
    assert refusals.refused_part(status, words) == part


def test_a_refused_part_is_changed_once_and_nothing_is_lost(tmp_path):
    """Guards calls that are lost to a field which one server does not take; a tape that depends on it; silence."""
    wanted = {"temperature", "max_tokens", "seed", "system"}

    def behave(sock, request, headers):
        system = request["messages"][0]["role"] == "system"
        has = sorted(wanted & {*request, *(["system"] if system else [])})
        if not has:
            return sock.sendall(http_reply(completion(json.dumps(request))))
        words = f"Unsupported parameter: '{has[0]}' is not supported with this model." if has[0] != "system" else \
            "System role not supported"
        sock.sendall(http_reply(json.dumps({"error": {"message": words}}).encode(), "400 Bad Request"))

    told: list[str] = []
    with hostile_server(behave) as url, closing(Tape(tmp_path / "tape", recording=True)) as tape:
        with closing(ChatClient(url, "m", tape=tape, notify=told.append, max_retries=0)) as client:
            said = ask_all(client, [SYSTEM] * 16, range(16))
            assert {json.dumps(json.loads(reply), sort_keys=True) for reply in said} == {json.dumps(
                {"model": "m", "max_completion_tokens": 300,
                 "messages": [{"role": "user", "content": "Be Ann.\n\nhi"}]}, sort_keys=True)}  # fmt: skip
            assert (client.counts["errors"], client.counts["requests"]) == ({}, 16)
            assert len(told) == 4 and all("from now on" in line and "HTTP 400" in line for line in told)
    with closing(Tape(tmp_path / "tape", recording=False)) as tape:  # by what was asked, not by what was sent
        with closing(ChatClient("http://gone.invalid", "m", tape=tape)) as client:
            assert [client.ask(SYSTEM, seed) for seed in range(16)] == said


def test_a_part_that_is_refused_again_is_a_refusal():
    """Guards a client that sends a request for ever because leaving a field out has changed nothing."""
    behave = scripted(*[http_reply(b'{"error": "temperature is not supported"}', "400 No")] * 9, OK)
    with hostile_server(behave) as url, closing(ChatClient(url, "m")) as client:
        assert client.ask(ASK).reason == "http_4xx" and len(behave.requests) == 2


def test_each_part_that_one_refusal_names_is_changed():
    """Guards a server that names two parts at once, of which only the first would ever be left out."""
    words = "Unrecognized request arguments supplied: seed, temperature"
    assert refusals.refused_part(400, words) == "seed" and refusals.refused_part(400, words, ["seed"]) == "temperature"
    assert refusals.refused_part(400, words, ["seed", "temperature"]) == ""


@pytest.mark.parametrize(
    ("status", "words", "way"),
    [
        (401, "bad key", "check --api-key-env"),
        (403, "<html>Attention Required!", "check --api-key-env and the address"),
        (422, "Model 'x' not loaded; available: y", "check --simulator-model"), (400, "context too long", ""),
    ],
)  # fmt: skip
def test_the_flag_that_mends_a_refusal_is_named(status, words, way):
    """Guards a line that sends its reader to the wrong flag."""
    assert refusals.way_out("simulator", ChatError("http_4xx", words, status=status, words=words)) == way


def test_an_address_that_cannot_be_ends_at_once(user_url, monkeypatch):  # noqa: F811
    """Guards half an hour of waiting for a host that nobody knows, or that is well and speaks another protocol."""
    unknown, real = socket.gaierror(socket.EAI_NONAME, "Name or service not known"), socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: real(host, *a, **k) if "x" not in host else fail())

    def fail() -> None:
        raise unknown

    for url, says in ((user_url.replace("http:", "https:"), "does not speak https; try http://"),
                      ("http://a..b", "the host of http://a..b/v1"), ("http://x", "not known")):  # fmt: skip
        with closing(ChatClient(url, "m", outage_budget=600, name="simulator")) as client:
            error = client.ask(ASK, 1)
            assert error.reason == "address" and says in str(error) and not error.retryable
            assert client.refusal.endswith("; check --simulator-url")
    unknown.errno = socket.EAI_AGAIN
    with closing(ChatClient("http://x", "m", outage_budget=0.1, max_retries=0)) as client:
        assert client.ask(ASK, 1).reason == "outage"  # the server of names may come back


def test_system_messages_are_folded_into_the_next_user_message():
    """Guards roles that do not take turns after folding, and texts that vanish."""
    def fold(*messages):
        return [(m["role"], m["content"]) for m in refusals.fold_system(
            [{"role": role, "content": text} for role, text in messages])]  # fmt: skip

    user, assistant, system = ("user", "u"), ("assistant", "a"), ("system", "s")
    assert fold(system, user, assistant, user) == [("user", "s\n\nu"), assistant, user]
    assert fold(user, assistant, user, system) == [user, assistant, ("user", "u\n\ns")]
    assert fold(system) == [("user", "s")] and fold(user, assistant) == [user, assistant]


# --------------------------------------------------------------------------------------------------------- alive or not


@pytest.mark.parametrize("probe", [completion(None), completion(" "), b"{}", b"<html>", b"data: [DONE]\n\n"])
def test_any_answer_is_a_sign_of_life(probe):
    """Guards an endpoint that is healthy again, and stays left alone for what it says to a probe of one token."""
    down = threading.Event()
    down.set()

    def behave(sock, request, headers):
        if down.is_set():
            down.clear() if request["messages"] == PING else None
            return sock.sendall(http_reply(b"{}", "503 Loading"))
        sock.sendall(http_reply(probe) if request["messages"] == PING else OK)

    with hostile_server(behave) as url, closing(ChatClient(url, "m", outage_budget=60)) as client:
        assert ask_all(client, [ASK] * 8, range(8)) == ["ok"] * 8
        assert client.counts["breaks"] == 1 and not client.outage


@pytest.mark.parametrize("form", [completion(None), b"{}", b"<html>", b"data: [DONE]\n\n", b'{"error": "overloaded"}'])
def test_wrong_forms_open_no_breaker(form):
    """Guards a run that waits half an hour for the outage of an endpoint that answers, only not as it should."""
    def behave(sock, request, headers):
        sock.sendall(http_reply(form) if request["seed"] >= 7 else OK)

    with hostile_server(behave) as url:
        limits = {"outage_budget": 5, "breaker_failures": 2, "max_retries": 1}
        with closing(ChatClient(url, "m", **limits)) as client:
            replies = [client.ask(ASK, seed) for seed in (1, 7, 7, 7, 1)]
            assert replies[0] == replies[-1] == "ok" and all(isinstance(reply, ChatError) for reply in replies[1:-1])
            assert client.counts["breaks"] == 0 and sum(client.counts["errors"].values()) == 6


# ----------------------------------------------------------------------------------------------- refused from the start


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("key-401", "HTTP 401 from URL/v1/chat/completions: Incorrect API key provided.; check --api-key-env"),
        ("model-404", "HTTP 404 from URL/v1/chat/completions: The model `rule-user` does not exist.; check"
         " --simulator-model and the address"),
        ("redirect", "it redirects to URL/elsewhere/v1/chat/completions; give that address as --simulator-url"),
        ("error-200", "overloaded, from URL/v1/chat/completions; check --simulator-url: chat completions"),
        ("sse", "from URL/v1/chat/completions; check --simulator-url: chat completions"),
        ("html", "Welcome to the gateway"),
    ],
)  # fmt: skip
def test_a_client_that_is_refused_from_the_start_gives_up_and_says_why(name, says):
    """Guards a whole batch, with all its retries, against an address, a model or a key that cannot work."""
    with quirk(name) as url, closing(ChatClient(url, "m", outage_budget=600, name="simulator")) as client:
        messages = simulator_messages(PERSONA, [])
        assert all(isinstance(reply, ChatError) for reply in ask_all(client, [messages] * 8, range(8)))
        before = sum(client.counts["errors"].values())
        assert before <= 8 * 4 and client.counts["breaks"] == 0
        assert all(isinstance(reply, ChatError) for reply in ask_all(client, [messages] * 8, range(8)))
        assert sum(client.counts["errors"].values()) == before + 8  # nothing was sent any more, nor tried again
        assert says in client.refusal.replace(url, "URL") and client.refusal.startswith("--simulator-url: every")
        assert quirks.MARKER not in client.refusal and not client.answered


def test_a_refusal_among_good_answers_is_only_counted():
    """Guards a run that ends because a few dialogues are too long, or because its first answers were slow to come."""
    asked, release = threading.Semaphore(0), threading.Event()

    def behave(sock, request, headers):
        if request["seed"] < 5:
            return sock.sendall(http_reply(b'{"error": "context too long"}', "400 No"))
        asked.release()
        release.wait(60)
        sock.sendall(OK)

    with hostile_server(behave) as url, closing(ChatClient(url, "m")) as client:
        with ThreadPoolExecutor(2) as pool:
            slow = pool.submit(client.ask, ASK, 9)
            assert asked.acquire(timeout=60)
            assert {client.ask(ASK, seed).reason for seed in range(5)} == {"http_4xx"}
            later = pool.submit(client.ask, ASK, 6)
            assert asked.acquire(timeout=60)
            release.set()
            assert slow.result() == later.result() == "ok" and not client.refusal
        assert "HTTP 400" in client.complaint and "context too long" in client.complaint


def ended(capsys, code: int, program, *argv: object) -> str:
    """Run a program that must end with a code; returns its last line on stderr."""
    capsys.readouterr()
    assert program([str(a) for a in argv]) == code
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_programs_end_at_once_with_the_servers_words(ckpt, user_url, tmp_path, capsys):  # noqa: F811
    """Guards exit code 75, a hint that cannot help, and hours of an evaluation, for a wrong model or key."""
    with quirk("model-404") as url:
        says = f"HTTP 404 from {url}/v1/chat/completions: The model `rule-user` does not exist."
        for _ in range(2):  # a run that has recorded nothing leaves its folder free for the next try
            flags = "--ckpt", ckpt, "--simulator-url", url, "--run-dir", tmp_path / "t"
            line = ended(capsys, 2, train_rlpa.main, *flags)
            assert line == f"train_rlpa.py: --simulator-url: every request failed; last: {says};" \
                " check --simulator-model and the address"
        out = ["--out", tmp_path / "o", "--num-personas", 4, "--turns", 2, "--quiet"]
        line = ended(capsys, 2, evaluation.main, f"x={ckpt}", "--simulator-url", url, *out)
        assert line.startswith("evaluation: --simulator-url: every request failed") and says in line
        line = ended(capsys, 2, evaluation.main, f"x={TINY}", "--judge-url", url, *out)
        assert line.startswith("evaluation: --judge-url: every request failed") and "--judge-model" in line
        line = ended(capsys, 2, evaluation.main, f"x={url}#m", "--simulator-url", user_url, *out)
        assert line.startswith("evaluation: subject x: all dialogues failed, ") and says in line and "after #" in line
        line = ended(capsys, 2, offline.main, "--method", "sft", "--ckpt", ckpt, "--simulator-url", url,
                     "--run-dir", tmp_path / "s", "--num-iterations", 1)  # fmt: skip
        assert line.startswith("studies.offline: --simulator-url: every request failed") and says in line


GOOD = json.dumps(dict.fromkeys(VERDICTS, 1))


def test_a_judge_that_answers_prose_ends_every_program(tmp_path, capsys):
    """Guards "--quorum wants more, --resume" for a model that will never judge; and a line without its words."""
    asked = itertools.count()
    train = ["--ckpt", TINY, "--num-iterations", 1, "--rollout-batch-size", 4, "--num-candidates", 2, "--max-turns", 1]
    played = f"x={TINY}", "--num-personas", 2, "--turns", 1, "--quiet"
    with chat_server(lambda request: "I would say yes\nto all of them.") as url:
        says = f"no verdict in 'I would say yes to all of them.', from {url}/chat/completions; check --judge-model and"
        for program, *flags in ((train_rlpa.main, *train, "--run-dir", tmp_path / "t"),
                                (evaluation.main, *played, "--out", tmp_path / "o"),
                                (offline.main, "--method", "sft", *train, "--run-dir", tmp_path / "s")):  # fmt: skip
            line = ended(capsys, 2, program, *flags, "--judge-url", url)
            assert f": --judge-url: no answer was a verdict; last: {says} --judge-url" in line
    with chat_server(lambda request: GOOD if next(asked) < 1 else "Yes!") as url:
        flags = *train, "--quorum-retries", 0, "--judge-url", url, "--run-dir", tmp_path / "q"
        line = ended(capsys, os.EX_TEMPFAIL, train_rlpa.main, *flags)
    assert " candidates got no verdict; last: no verdict in 'Yes!', from" in line and "check --judge-model" in line


@pytest.mark.slow
def test_two_ranks_are_refused_as_one(ckpt, tmp_path):  # noqa: F811
    """Guards one rank that raises alone, and two that print the same."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train_rlpa.py"]
    with quirk("key-401") as url:
        done = subprocess.run(
            [*launcher, "--ckpt", str(ckpt), "--simulator-url", url, "--run-dir", str(tmp_path / "run")],
            cwd=Path(train_rlpa.__file__).parent, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
            text=True,
        )  # fmt: skip
    assert done.stderr.count("train_rlpa.py: --simulator-url: every request failed") == 1, done.stderr[-3000:]
    assert "exitcode  : 2" in done.stderr and "check --api-key-env" in done.stderr, done.stderr[-3000:]


@pytest.mark.slow
def test_a_run_against_a_server_with_habits_equals_the_plain_one(ckpt, user_url, tmp_path):  # noqa: F811
    """Guards figures that depend on how a server wants to be asked, or on how it was found out."""
    def figures(url: str, folder: Path) -> list[dict]:
        go("--ckpt", ckpt, "--simulator-url", url, "--run-dir", folder, "--reply-steps", 4, "--kv-gib", 0.5,
           "--num-iterations", 1)  # fmt: skip
        return [{k: v for k, v in r.items() if not k.startswith("simulator_")} for r in records(folder)]

    plain = figures(user_url, tmp_path / "plain")
    for name in ("think", "parts", "system-500", "max_tokens", "outage"):
        with quirk(name) as url:
            assert figures(url, tmp_path / name) == plain, name
    written = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert len(written) > 50 and not any(quirks.MARKER.encode() in content for content in written)


def test_live_endpoints_change_reply_steps_aloud(ckpt, user_url, tmp_path, capsys):  # noqa: F811
    """Guards a run that silently no longer repeats because a user's address was given."""
    go("--ckpt", ckpt, "--simulator-url", user_url, "--run-dir", tmp_path / "live", "--num-iterations", 1)
    assert capsys.readouterr().out.count("--reply-steps is 0") == 1
    go("--ckpt", ckpt, "--simulator-url", user_url, "--run-dir", tmp_path / "set", "--num-iterations", 1,
       "--reply-steps", 4)  # fmt: skip
    go("--ckpt", ckpt, "--run-dir", tmp_path / "own", "--num-iterations", 1)
    assert "--reply-steps" not in capsys.readouterr().out


# --------------------------------------------------------------------------------------------- certificates and proxies


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1 that its own key has signed, and that key."""
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=here", "-addext",
         "subjectAltName=IP:127.0.0.1", "-keyout", folder / "key.pem", "-out", folder / "cert.pem"],
        check=True, capture_output=True,
    )  # fmt: skip
    return folder / "cert.pem", folder / "key.pem"


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_an_own_authority_is_trusted_when_it_is_named(authority, monkeypatch, variable):
    """Guards a private certificate on this machine, where no other variable of the environment counts."""
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority)
    server = quirks.make_server("plain")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
    url, messages = f"https://127.0.0.1:{server.server_address[1]}", simulator_messages(PERSONA, [])
    with closing(ChatClient(url, "m", outage_budget=600)) as client:
        refused = client.ask(messages, 1)
        assert refused.reason == "certificate" and "REQUESTS_CA_BUNDLE" in client.refusal  # no outage to wait for
    monkeypatch.setenv(variable, str(authority[0]))
    with closing(ChatClient(url, "m")) as client:
        assert client.ask(messages, 1) == "Hello"
    monkeypatch.setenv(variable, "/no/such/file")
    with pytest.raises(ValueError, match=f"{variable} names '/no/such/file'"):
        ChatClient(url, "m")
    server.shutdown()
    server.server_close()


def test_proxies_are_for_other_machines(monkeypatch):
    """Guards NO_PROXY, and requests to this machine that a proxy would get to see."""
    proxy = scripted(OK)
    with hostile_server(proxy) as address:
        monkeypatch.setenv("http_proxy", address)
        with hostile_server(scripted(OK)) as here:
            for url in (here, here.replace("127.0.0.1", "localhost"), "http://hosted.invalid"):
                with closing(ChatClient(url, "m", max_retries=0)) as client:
                    assert client.ask(ASK) == "ok"
        assert len(proxy.requests) == 1
        monkeypatch.setenv("no_proxy", ".invalid")
        with closing(ChatClient("http://hosted.invalid", "m", max_retries=0)) as client:
            assert client.ask(ASK).reason == "address" and len(proxy.requests) == 1


def test_doctests():
    """Guards examples that were never run, and a run without calls that ends in a blank."""
    assert doctest.testmod(refusals).failed == doctest.testmod(calls).failed == 0
