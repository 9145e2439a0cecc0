"""The trainer as a program: its flags, its run folder, resuming, and what it does when user or judge fail.

The policy is two random layers that write garbage, which every test but those of the judge is content with.
"""

from __future__ import annotations

import doctest
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from small_run import chat_server, records, running_user, write_checkpoint

import rewards
import sampler
import train_rlpa
from command_line.flags import parse_args, run_settings
from config import Config
from dialogue import ChatTokenizer, Dialogue, render_turn
from endpoints.client import ChatClient
from learners.weights import load_critic, load_policy
from model import Qwen2ForCausalLM
from packing import pack
from records.metrics import rates, tally
from records.state import newest_checkpoint
from sampler import Draw
from simulator import Environment
from train_rlpa import Play, rollout

ROOT = Path(train_rlpa.__file__).parent
SMALL = {
    "rollout_batch_size": 4, "minibatch_size": 2, "microbatch_tokens": 1000, "max_turns": 2, "num_candidates": 2,
    "max_new_tokens": 10, "num_personas": 20, "num_iterations": 2, "eval_every": 1, "eval_dialogues": 2,
    "episodes_every": 1, "save_every": 1, "lr": 3e-3, "critic_lr": 3e-3, "tensorboard": False,
}  # fmt: skip
CALLS = ("--max-retries", 1, "--request-timeout", 20)


# ------------------------------------------------------------------------------------------------------------- fixtures


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory) -> Path:
    """A checkpoint folder: a byte-level tokenizer, two random layers, and settings small enough for tests."""
    return write_checkpoint(tmp_path_factory.mktemp("random-policy"), SMALL)


@pytest.fixture(scope="module")
def user_url() -> Iterator[str]:
    """The embedded user, in a thread of this process."""
    with running_user() as url:
        yield url


def hearing(answer: Callable[[str], str | int]):
    """Serve chat completions: `answer` gets all messages as one text, and gives what to say or a status of failure."""
    return chat_server(lambda request: answer("\n".join(message["content"] for message in request["messages"])))


def personas_file(path: Path, names: list[str]) -> str:
    path.write_text(
        "".join(json.dumps({"id": name, "facts": [f"Occupation: {name}", "Age: 34"]}) + "\n" for name in names)
    )
    return str(path)


def go(*argv: object) -> None:
    """Run the trainer in this process; it must succeed."""
    assert train_rlpa.main([str(a) for a in (*CALLS, *argv)]) == 0


def tensors(run: Path, iteration: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: weights of both models and both optimizers."""
    folder = run / "checkpoints" / f"iteration_{iteration:06d}"
    return {f"{f.relative_to(folder)}:{k}": v for f in folder.rglob("*.safetensors") for k, v in load_file(f).items()}


def identical(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# ---------------------------------------------------------------------------------------------------------------- flags


@pytest.fixture
def refused(capsys, monkeypatch) -> Callable[..., str]:
    """A function that runs the trainer with bad arguments and returns its one line on stderr."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*argv: object) -> str:
        capsys.readouterr()
        assert train_rlpa.main([str(a) for a in argv]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("train_rlpa.py: "), lines
        return lines[0]

    return run


@pytest.mark.parametrize(
    "bad",
    [
        ("--credit", "token"), ("--kl-estimator", "k9"), ("--reward-at", "start"), ("--history-profile", "none"),
        ("--profile-target", "x"), ("--profile-judge", "llm"), ("--lr", "-0.001"), ("--lr", "fast"), ("--lr", "nan"),
        ("--lr", "inf"), ("--num-candidates", "0"), ("--max-turns", "-1"), ("--max-turns", "2.5"),
        ("--temperature", "0"), ("--gamma", "1.5"), ("--gae-lambda", "-0.1"), ("--clip-eps", "0"), ("--seed", "-1"),
        ("--max-grad-norm", "0"), ("--seed", "99999999999999999999"), ("--rollout-batch-size", "5"),
        ("--minibatch-size", "3"), ("--num-iterations", "-2"), ("--personas", "absent.jsonl"),
        ("--eval-personas", "absent.jsonl"),
        ("--simulator-url", "ftp://x"), ("--judge-url", "not a url"), ("--api-key-env", "NO_SUCH_KEY_IS_SET"),
        ("--critic-ckpt", "no-such-critic"), ("--run-dir", "/dev/null/run"), ("--old-logprobs", "none"),
        ("--critic", "both"), ("--dtype", "float16"), ("--value-coef", "-1"), ("--decode-batch-size", "0"),
        ("--kv-gib", "-1"), ("--reply-steps", "-2"), ("--max-concurrency", "0"), ("--quorum", "1.5"),
        ("--outage-budget", "-1"), ("--requests-per-minute", "-1"), ("--breaker-failures", "0"),
    ],
)  # fmt: skip
def test_a_bad_value_is_one_line(ckpt, user_url, tmp_path, refused, bad):
    """Guards tracebacks and late failures: the line names value and flag, and nothing has been trained."""
    name, value = bad
    more = ["--personas", personas_file(tmp_path / "p.jsonl", ["a", "b"])] if name == "--eval-personas" else []
    url = [] if name == "--simulator-url" else ["--simulator-url", user_url]
    line = refused("--ckpt", ckpt, "--run-dir", tmp_path / "run", *url, *more, *bad)
    assert value in line
    if name not in ("--personas", "--eval-personas", "--simulator-url", "--judge-url", "--api-key-env"):
        assert name in line  # those five are refused by who uses them, with the file, the URL or the variable
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_bad_combinations_are_one_line(ckpt, refused, tmp_path):
    """Guards flags that are fine alone: no checkpoint at all, an unknown flag, judges that contradict one another."""
    assert "--ckpt" in refused()
    assert "--ckpt" in refused("--lr", "1e-3")
    assert "--learning-rate" in refused("--ckpt", ckpt, "--learning-rate", "1")
    assert "--lr" in refused("--ckpt", ckpt, "--lr")
    assert "--judge-url" in refused("--ckpt", ckpt, "--profile-judge", "http")
    both = ("--profile-judge", "http", "--judge-url", "http://127.0.0.1:9", "--profile-target", "evidence")
    assert "--profile-target" in refused("--ckpt", ckpt, *both)
    shared = refused("--ckpt", ckpt, "--critic", "shared", "--critic-ckpt", tmp_path)
    assert "--critic-ckpt" in shared and "--critic separate" in shared
    assert "--critic shared" in refused("--ckpt", ckpt, "--value-coef", "0.1")
    assert "--dry-run is '8x'; it takes GB" in refused("--ckpt", ckpt, "--dry-run", "8x")


def damaged(ckpt: Path, folder: Path, name: str, text: str | None) -> Path:
    """Copy a checkpoint with one file replaced, or left out."""
    folder.mkdir()
    for file in ckpt.iterdir():
        if file.name != name:
            (folder / file.name).write_bytes(file.read_bytes())
    if text is not None:
        (folder / name).write_text(text, errors="surrogateescape")
    return folder


@pytest.mark.parametrize(
    ("name", "text", "needle"),
    [
        ("tokenizer.json", None, "tokenizer.json"), ("tokenizer.json", "{}", "tokenizer.json"),
        ("config.json", None, "config.json"),
        ("config.json", "[", "config.json"), ("model.safetensors", None, "model.safetensors"),
        ("model.safetensors", "junk", "model.safetensors"), ("rlpa.json", "{'lr': 1}", "rlpa.json"),
        ("rlpa.json", "[1]", "rlpa.json"), ("rlpa.json", "\udcff", "rlpa.json"),
        ("rlpa.json", '{"learning_rate": 1}', "learning_rate"), ("rlpa.json", '{"lr": "fast"}', "--lr is 'fast'"),
        ("rlpa.json", '{"max_turns": 2.5}', "--max-turns is 2.5"),
        ("rlpa.json", '{"max_turns": true}', "--max-turns is True"),
        ("rlpa.json", '{"tensorboard": 0}', "--tensorboard is 0"), ("rlpa.json", '{"credit": "x"}', "--credit is 'x'"),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_one_line(ckpt, user_url, tmp_path, refused, name, text, needle):
    """Guards tracebacks from JSON, safetensors and comparisons of a text with a number."""
    folder = damaged(ckpt, tmp_path / "ckpt", name, text)
    assert needle in refused("--ckpt", folder, "--simulator-url", user_url, "--run-dir", tmp_path / "run")


def test_absent_checkpoints_are_one_line(tmp_path, refused):
    """Guards a hang or a traceback on a mistyped folder and on a hub id without a network."""
    for value in (tmp_path / "absent", "absent/absent"):
        line = refused("--ckpt", value)
        assert "--ckpt" in line and str(value) in line


def test_bad_personas_are_one_line(ckpt, user_url, tmp_path, refused):
    """Guards a bad persona deep in a file: the line names file and line number."""
    path = tmp_path / "personas.jsonl"
    path.write_text('{"facts": ["Age: 34"]}\n{"facts": [1]}\n')
    arguments = ("--ckpt", ckpt, "--simulator-url", user_url, "--personas", path)
    assert f"{path}, line 2" in refused(*arguments)
    path.write_text('{"facts": ["Age: 34"]}\n')
    assert "--eval-personas" in refused(*arguments)  # one persona cannot be split


def test_bad_resumes_are_one_line(ckpt, tmp_path, refused):
    """Guards --resume of what is no run, of a run that saved nothing, of a damaged one, and flags that clash."""
    assert str(tmp_path) in refused("--resume", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(asdict(Config(ckpt=str(ckpt), **SMALL))))
    assert "no checkpoint" in refused("--resume", tmp_path)
    assert "--lr" in refused("--resume", tmp_path, "--lr", "1")
    (tmp_path / "config.json").write_text('{"ckpt": "x", "from_the_future": 1}')
    assert "from_the_future" in refused("--resume", tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "config.json" in refused("--resume", tmp_path)


@pytest.mark.slow
def test_the_exit_code_of_the_program(ckpt):
    """Guards `sys.exit(main())`: a shell sees 2 and one line, no traceback and no usage text."""
    command = [sys.executable, "train_rlpa.py", "--ckpt", str(ckpt), "--credit", "token"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1 and "--credit" in done.stderr and "token" in done.stderr


def test_settings_of_the_checkpoint_yield_to_flags(ckpt):
    """Guards precedence, built-in < rlpa.json < flags, and booleans, of which "False" would be true as a text."""

    def parsed(*more: str) -> Config:
        return parse_args(["--ckpt", str(ckpt), *more], "")

    config = parsed("--max-turns", "3", "--lr", "1")
    assert (config.max_turns, config.lr) == (3, 1.0)  # flags
    assert (config.rollout_batch_size, config.tensorboard) == (SMALL["rollout_batch_size"], False)  # the checkpoint's
    assert config.gae_lambda == Config.gae_lambda  # built in
    assert config.ckpt == str(ckpt.resolve()) and config.run_dir
    assert parsed("--tensorboard").tensorboard is True
    assert parsed("--no-tensorboard").tensorboard is False


# ----------------------------------------------------------------------------------------------------------- run folder


def test_a_run_writes_its_folder(ckpt, tmp_path, capsys):
    """Guards the run folder, with the embedded user in its own process: every file is there, whole and of this run."""
    run = tmp_path / "run"
    go("--ckpt", ckpt, "--run-dir", run, "--tensorboard")
    written = json.loads((run / "config.json").read_text())
    assert written["num_iterations"] == 2 and written["run_dir"] == str(run) and Config(**run_settings(run))
    train = records(run, "train")
    assert [r["iteration"] for r in train] == [1, 2]
    for name in ("reward", "recall", "kl_ref", "approx_kl", "clip_frac", "entropy", "explained_variance", "policy_loss",
                 "value_loss", "policy_grad_norm", "ratio_dev_first", "sampler_trainer_logprob_gap"):  # fmt: skip
        assert all(isinstance(r[name], float) for r in train), name
    assert all(r["ratio_dev_first"] < 1e-5 and r["sampler_trainer_logprob_gap"] < 1e-5 for r in train)
    assert all(r["dialogues"] == 4 and r["dialogues_dropped"] == 0 and r["updates_skipped"] == 0 for r in train)
    assert {0, 1, 2} == {r["iteration"] for r in records(run, "heldout/greedy")}
    episodes = records(run, "train", "episodes.jsonl")
    assert [(e["iteration"], e["index"]) for e in episodes] == [(i, d) for i in (1, 2) for d in range(4)]
    turn = episodes[0]["turns"][1]
    assert len(episodes[0]["turns"]) == 2 and len(turn["candidates"]) == 2 and turn["user_text"]
    for name in ("text", "profile", "parts", "reward", "verdicts", "stop_reason", "failure"):
        assert name in turn["candidates"][0]
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert [f for f in (run / "tensorboard").iterdir() if "tfevents" in f.name and f.stat().st_size > 1000]
    printed = capsys.readouterr().out
    assert "before" in printed and "after" in printed and str(run) in printed


def test_checkpoints_are_in_hugging_face_layout(ckpt, user_url, tmp_path):
    """Guards what a run is for: its policy loads in transformers with our logits, and starts another run as it is."""
    transformers = pytest.importorskip("transformers")
    go("--ckpt", ckpt, "--run-dir", tmp_path / "run", "--simulator-url", user_url, "--num-iterations", 1)
    folder = newest_checkpoint(str(tmp_path / "run")) / "policy"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours, token_ids = load_policy(folder), torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(token_ids)), theirs(token_ids).logits, atol=1e-5, rtol=1e-5)
    start = load_policy(ckpt)
    assert any(not torch.equal(a, b) for a, b in zip(ours.parameters(), start.parameters(), strict=True))
    one, other = (ChatTokenizer.from_folder(f).encode("Hello, I am 34.") for f in (folder, ckpt))
    assert one == other
    load_critic(folder.parent / "critic")
    (folder / "rlpa.json").write_text(json.dumps(SMALL))
    go("--ckpt", folder, "--critic-ckpt", folder.parent / "critic", "--run-dir", tmp_path / "next",
       "--simulator-url", user_url, "--num-iterations", 1)  # fmt: skip


def test_a_run_in_bf16_saves_its_masters_and_a_shared_critic_its_head(ckpt, user_url, tmp_path):
    """Guards checkpoints that round the masters or hold the trunk twice: fp32 that bf16 cannot hold, and (1, D)."""
    run = tmp_path / "run"
    go("--ckpt", ckpt, "--run-dir", run, "--simulator-url", user_url, "--num-iterations", 1, "--dtype", "bfloat16",
       "--critic", "shared")  # fmt: skip
    (train,) = records(run, "train")
    assert train["updates_skipped"] == 0 and train["ratio_dev_first"] < 1e-4
    folder = newest_checkpoint(str(run))
    policy, critic = (load_file(folder / name / "model.safetensors") for name in ("policy", "critic"))
    assert {name: tuple(x.shape) for name, x in critic.items()} == {"value_head.weight": (1, 32)}
    for weights in (policy, critic):
        assert all(x.dtype == torch.float32 and not torch.equal(x, x.bfloat16().float()) for x in weights.values())


@pytest.mark.parametrize("n", [10, 1])
def test_any_number_of_personas(ckpt, user_url, tmp_path, n):
    """Guards the partial last batch that the published code crashes on: 10 personas make batches of 4, 4 and 2."""
    run, heldout = tmp_path / "run", personas_file(tmp_path / "heldout.jsonl", ["judge"])
    personas = personas_file(tmp_path / "train.jsonl", [f"baker{i}" for i in range(n)])
    go("--ckpt", ckpt, "--run-dir", run, "--simulator-url", user_url, "--personas", personas,
       "--eval-personas", heldout, "--num-iterations", 0)  # fmt: skip
    assert [r["dialogues"] for r in records(run, "train")] == {10: [4, 4, 2], 1: [1]}[n]
    episodes = records(run, "train", "episodes.jsonl")
    assert sorted(e["persona_id"] for e in episodes) == sorted(f"baker{i}" for i in range(n))  # each one once
    assert all(r["dialogues"] == 1 for r in records(run, "heldout/sampled"))


def test_personas_are_split_without_overlap(ckpt, user_url, tmp_path):
    """Guards evaluation on training personas when one file serves both: of a few, the last is held out."""
    run = tmp_path / "run"
    go("--ckpt", ckpt, "--run-dir", run, "--simulator-url", user_url, "--num-iterations", 0,
       "--personas", personas_file(tmp_path / "train.jsonl", ["ann", "bob", "cyd"]))  # fmt: skip
    trained = {e["persona_id"] for e in records(run, "train", "episodes.jsonl")}
    assert trained == {"ann", "bob"} and {
        e["persona_id"] for e in records(run, "heldout/greedy", "episodes.jsonl")
    } == {"cyd"}


# --------------------------------------------------------------------------------------------------------------- resume


class Killed(Exception):
    """Stands in for a power cut."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--credit", "dialogue", "--reward-at", "segment", "--history-profile", "latest"),
        ("--critic", "shared", "--dtype", "bfloat16"),
    ],
)
def test_resume_equals_the_uninterrupted_run(ckpt, user_url, tmp_path, monkeypatch, refused, more):
    """Guards every hidden state: killed while iteration 4 runs and resumed from 2, a run ends bit for bit the same.

    What iteration 3 left in the logs must be forgotten, what 1 and 2 left must be kept, and the half-written last line
    and half-written checkpoint must not be in the way.
    """
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    arguments = ("--ckpt", ckpt, "--simulator-url", user_url, "--num-iterations", 4, "--save-every", 2,
                 "--reply-steps", 4, *more)  # fmt: skip
    go(*arguments, "--run-dir", whole)

    run_iteration = train_rlpa.run_iteration

    def power_cut(state):
        if state.iteration == 3:
            raise Killed
        return run_iteration(state)

    monkeypatch.setattr(train_rlpa, "run_iteration", power_cut)
    with pytest.raises(Killed):
        go(*arguments, "--run-dir", broken)
    monkeypatch.setattr(train_rlpa, "run_iteration", run_iteration)
    assert len(records(broken, "train")) == 3
    with (broken / "episodes.jsonl").open("a") as file:
        file.write('{"iteration": 4, "kind": "train", "turns": [{"user')
    (broken / "checkpoints" / ".iteration_000004.tmp").mkdir()
    go("--resume", broken, "--simulator-url", user_url)

    assert identical(tensors(broken, 2), tensors(whole, 2))
    assert len(tensors(whole, 4)) > 50 and identical(tensors(broken, 4), tensors(whole, 4))
    assert not identical(tensors(broken, 2), tensors(broken, 4))
    for name in ("metrics.jsonl", "episodes.jsonl"):
        assert records(broken, name=name) == records(whole, name=name)
    assert "--num-iterations" in refused("--resume", broken, "--simulator-url", user_url)  # it is complete now
    (broken / "finished").unlink()
    assert "beyond its 3 iterations" in refused("--resume", broken, "--num-iterations", 3, "--simulator-url", user_url)
    go("--resume", broken, "--num-iterations", 5, "--simulator-url", user_url)
    assert [r["iteration"] for r in records(broken, "train")] == [1, 2, 3, 4, 5]


def test_a_run_is_reproducible_and_depends_on_its_seed(ckpt, user_url, tmp_path):
    """Guards unseeded streams: the same seed gives the same run, bit for bit, and another seed another one.

    With an endpoint of one's own that takes --reply-steps; with the embedded user it is the default.
    """
    a, b, c = (tmp_path / name for name in "abc")
    arguments = ("--ckpt", ckpt, "--simulator-url", user_url, "--num-iterations", 1, "--reply-steps", 4)
    for run, seed in ((a, 1), (b, 1), (c, 2)):
        go(*arguments, "--run-dir", run, "--seed", seed)
    assert records(a) == records(b) and identical(tensors(a, 1), tensors(b, 1))
    assert records(a) != records(c)


def test_every_candidate_has_a_stream_of_its_own(ckpt, user_url, tmp_path):
    """Guards noise that repeats: one persona and a policy that stands still never write the same turn twice."""
    run, heldout = tmp_path / "run", personas_file(tmp_path / "heldout.jsonl", ["judge"])
    go("--ckpt", ckpt, "--run-dir", run, "--simulator-url", user_url, "--eval-personas", heldout,
       "--personas", personas_file(tmp_path / "one.jsonl", ["baker"]),
       "--rollout-batch-size", 2, "--lr", 0)  # fmt: skip
    episodes = records(run, "train", "episodes.jsonl")
    texts = [c["text"] for e in episodes for turn in e["turns"] for c in turn["candidates"]]
    assert len(texts) == len(set(texts)) == 2 * 2 * 2 * 2  # iterations, dialogues, turns, candidates


# ---------------------------------------------------------------------------------------------- faults: the user's side


def polite(text: str) -> str:
    return "Nice weather."


def test_a_lost_user_drops_its_dialogues_only(ckpt, tmp_path, monkeypatch):
    """Guards the loss and the metrics against dialogues without an end: masked, counted, and never a reward of 0."""
    batches = []
    update = train_rlpa.update
    monkeypatch.setattr(train_rlpa, "update", lambda *args: batches.append(args[2]) or update(*args))

    def half_broken(text: str) -> str | int:
        return 500 if "pilot" in text else polite(text)

    run, personas = tmp_path / "run", personas_file(tmp_path / "p.jsonl", ["baker", "pilot1", "nurse", "pilot2"])
    heldout = personas_file(tmp_path / "h.jsonl", ["pilot3", "judge"])
    with hearing(half_broken) as url:
        go("--ckpt", ckpt, "--run-dir", run, "--simulator-url", url, "--personas", personas, "--eval-personas", heldout,
           "--num-iterations", 1, "--max-retries", 0)  # fmt: skip
    (train,) = records(run, "train")
    assert (train["dialogues"], train["dialogues_dropped"], train["dropped_simulator"]) == (4, 2, 2)
    episodes = records(run, "train", "episodes.jsonl")
    assert {e["persona_id"]: e["dropped"] for e in episodes} == {
        "baker": None, "nurse": None, "pilot1": "simulator: http_5xx", "pilot2": "simulator: http_5xx"
    }  # fmt: skip
    tokens = [sum(c["tokens"] for turn in e["turns"] for c in turn["candidates"]) for e in episodes]
    kept = sum(n for n, e in zip(tokens, episodes, strict=True) if e["dropped"] is None)
    trained = sum(len(batch.targets) for minibatch in batches[0] for batch in minibatch)
    assert train["action_tokens"] == kept == trained < sum(tokens)
    assert all(r["dialogues_dropped"] == 1 for r in records(run, "heldout/sampled"))


def test_an_iteration_without_any_dialogue(ckpt, tmp_path):
    """Guards divisions by zero: a user that refuses everybody (4xx) leaves the weights alone, and is counted.

    That is so with --quorum 0 only: with any other the run ends (test_reliability.py).
    """
    asked = []

    def refuse(text: str) -> int:
        asked.append(text)
        return 403 if len(asked) > 1 else "Hi."  # if nothing was ever answered, the run would end at once

    run = tmp_path / "run"
    with hearing(refuse) as url:
        go("--ckpt", ckpt, "--run-dir", run, "--simulator-url", url, "--num-iterations", 2, "--eval-every", 0,
           "--quorum", 0)  # fmt: skip
    train = records(run, "train")
    assert [(r["dialogues"], r["dialogues_dropped"], r["dropped_simulator"]) for r in train] == [(4, 4, 4)] * 2
    assert all(r["action_tokens"] == 0 for r in train)
    assert not any(name in r for r in train for name in ("reward", "recall", "kl_ref", "policy_loss"))  # not measured
    episodes = records(run, "train", "episodes.jsonl")
    assert {e["dropped"] for e in episodes} == {"simulator: http_4xx"}
    evaluated = 2 * 4 * SMALL["eval_dialogues"]  # before and after, two sets, sampled and greedy
    assert len(asked) == 2 * 4 + evaluated  # none was asked again
    assert (run / "curve.png").exists()
    saved = load_policy(run / "checkpoints" / "iteration_000002" / "policy")
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), load_policy(ckpt).parameters(), strict=True))
    # An optimizer that never stepped has no state to restore; nobody is there to be waited for.
    go("--resume", run, "--num-iterations", 3, "--outage-budget", 0, "--simulator-url", url)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def start_user(port: int) -> subprocess.Popen:
    """Start the embedded user as a program of its own and wait until it listens."""
    command = [sys.executable, str(ROOT / "simulator.py"), "--port", str(port), "--until-stdin-closes"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    return process


@pytest.mark.slow
def test_a_user_that_dies_and_comes_back(ckpt, tmp_path, monkeypatch):
    """Guards crashes and lost dialogues: killed between two iterations and down for two seconds, nothing is dropped."""
    port, run_iteration, retries = free_port(), train_rlpa.run_iteration, []
    users = [start_user(port)]

    def revive():
        time.sleep(2)
        users.append(start_user(port))

    def outage(state):
        if state.iteration == 1:
            users[0].kill()
            users[0].wait()
            revival = threading.Thread(target=revive)
            revival.start()
        result = run_iteration(state)
        retries.append(state.env.user.counts["retries"])
        if len(retries) == 2:
            revival.join()
        return result

    monkeypatch.setattr(train_rlpa, "run_iteration", outage)
    try:
        go("--ckpt", ckpt, "--run-dir", tmp_path / "run", "--simulator-url", f"http://127.0.0.1:{port}",
           "--max-retries", 10, "--request-timeout", 100, "--eval-every", 0)  # fmt: skip
    finally:
        for process in users:
            process.kill()
            process.communicate()
    assert [r["dialogues_dropped"] for r in records(tmp_path / "run", "train")] == [0, 0]
    assert retries[0] == 0 < retries[1]


def test_a_long_user_message_is_cut_and_counted(ckpt, tmp_path):
    """Guards the memory of the rollout against a user that never stops, and history against the uncut text."""
    run = tmp_path / "run"
    with hearing(lambda text: "So much to say. " * 500) as url:
        go("--ckpt", ckpt, "--run-dir", run, "--simulator-url", url, "--num-iterations", 1, "--max-user-tokens", 9,
           "--eval-every", 0)  # fmt: skip
    (train,) = records(run, "train")
    assert train["user_messages_cut"] == 4 and train["dialogues_dropped"] == 0
    assert [r["user_messages_cut"] for r in records(run, "heldout/greedy")] == [2, 2]  # and of an evaluation, too
    chat = ChatTokenizer.from_folder(ckpt)
    assert all(len(chat.encode(e["turns"][1]["user_text"])) <= 9 for e in records(run, "train", "episodes.jsonl"))


# --------------------------------------------------------------------------------------------- faults: the judge's side

GOOD = '{"naturalness": 1, "relevance": 1, "logical_consistency": 1, "engagement": 1, "informativeness": 1}'
POOR = GOOD.replace('"engagement": 1', '"engagement": 0')


class ScriptedSampler:
    """Stands in for the sampler: in every turn the candidates write these texts."""

    def __init__(self, policy: Qwen2ForCausalLM, chat: ChatTokenizer, texts: list[str], n: int):
        self.policy = policy
        self.script = [[*chat.encode(text), chat.im_end] for text in texts[:n]]
        self.started, self.counts = [], {}

    @property
    def running(self) -> int:
        return len(self.started)

    def fits(self, length: int) -> bool:
        return True

    def start(self, key: int, prompt_ids: list[int], seeds: list[int]) -> bool:
        self.started.append(key)
        return True

    def step(self) -> list[Draw]:
        keys, self.started = self.started, []
        return [Draw(k, c, ids, [-1.0] * len(ids), "stop") for k in keys for c, ids in enumerate(self.script)]

    def adopt(self, key: int, candidate: int) -> None:
        pass

    def forget(self, key: int) -> None:
        pass


@contextmanager
def scripted(chat: ChatTokenizer, replies: list[str]) -> Iterator[None]:
    """Let the candidates of every turn be valid turns with these replies."""
    texts = [render_turn(["Age: 34"], reply) for reply in replies]
    with mock.patch.object(sampler, "Sampler", lambda policy, *, n, **_: ScriptedSampler(policy, chat, texts, n)):
        yield


def judged(
    ckpt: Path, answer: Callable[[str], str | int], replies: list[str], **changes
) -> tuple[Dialogue, Environment]:
    """Play one turn whose candidates are valid turns with these replies, before a judge that answers so."""
    changes |= {"max_turns": 1, "first_user_message": "Hello, I am 34."}
    chat, config = ChatTokenizer.from_folder(ckpt), Config(ckpt=str(ckpt), **{**SMALL, **changes})
    dialogue, play = Dialogue(0, "p", ("Age: 34", "Occupation: baker")), Play(len(replies), 1.0, (0, "test"))
    with hearing(answer) as url, scripted(chat, replies):
        client = ChatClient(url, "judge", max_retries=1, total_timeout=20)
        env = Environment(None, client)
        rollout(load_policy(ckpt), chat, [dialogue], play, config, env)
        client.close()
    return dialogue, env


def test_the_best_candidate_goes_on(ckpt):
    """Guards the choice: highest reward, the first of equals; a format failure has earned 0 and no verdict is asked."""
    asked = []

    def answer(text: str) -> str:
        asked.append(text)
        return GOOD if "lovely" in text else POOR

    dialogue, env = judged(ckpt, answer, ["How dull.", "How lovely.", "So lovely.", "</response> lovely"])
    candidates = dialogue.turns[0].candidates
    assert dialogue.turns[0].chosen == 1 and dialogue.dropped is None and len(asked) == 3
    assert [c.parts["response"] for c in candidates] == [0.0, 1.0, 1.0, 0.0]
    assert [c.parts["profile"] > 0 for c in candidates] == [True, True, True, False]
    assert candidates[0].verdicts["engagement"] is False and candidates[0].verdicts["relevance"] is True
    assert all(c.judged for c in candidates) and candidates[3].failure and env.counts["candidates_unjudged"] == 0


@pytest.mark.parametrize("bad", ["I like it!", GOOD.replace("1}", "7}"), 400, 500])
def test_a_verdict_that_cannot_be_had_is_not_a_verdict(ckpt, bad):
    """Guards silent zeros: the candidate is neither trained on nor chosen, and counted; the others are as ever."""
    dialogue, env = judged(ckpt, lambda text: bad if "lovely" in text else POOR, ["How lovely.", "How dull."])
    lost, kept = dialogue.turns[0].candidates
    assert (lost.judged, kept.judged) == (False, True) and env.counts["candidates_unjudged"] == 1
    assert dialogue.turns[0].chosen == 1 and dialogue.dropped is None
    p = pack(dialogue, Config(ckpt="x", **SMALL))
    assert p.targets.tolist() == kept.token_ids


def test_a_judge_that_always_fails_drops_the_dialogue(ckpt):
    """Guards a choice among candidates nobody judged: the dialogue is dropped with its reason and counted."""
    dialogue, env = judged(ckpt, lambda text: "?", ["How lovely.", "How dull."])
    assert dialogue.dropped.startswith("judge") and env.counts["candidates_unjudged"] == 2
    assert pack(dialogue, Config(ckpt="x", **SMALL)) is None
    counted = rates(tally([dialogue]))
    assert (counted["dialogues_dropped"], counted["dropped_judge"]) == (1, 1)


def test_the_profile_judge(ckpt):
    """Guards the LLM's count: it is clamped to the lines there are, and an absurd one is no count."""

    def answer(text: str) -> str:
        return GOOD if "verdicts" in text else '{"covered": 99}'

    dialogue, _ = judged(ckpt, answer, ["Hi."], profile_judge="http", judge_url="http://127.0.0.1:9")
    assert dialogue.turns[0].winner.parts["profile"] == pytest.approx(2 / 3)  # one line, two facts
    dialogue, env = judged(ckpt, lambda text: GOOD if "verdicts" in text else '{"covered": "all"}', ["Hi."],
                           profile_judge="http", judge_url="http://127.0.0.1:9")  # fmt: skip
    assert dialogue.turns[0].winner.judged is False and env.counts["candidates_unjudged"] == 1


def test_weights_and_targets_of_the_rewards(ckpt):
    """Guards the switches: a weight of 0 takes a reward out of choice and loss, another one scales it."""

    def answer(text: str) -> str:
        return GOOD if "lovely" in text else POOR

    dialogue, _ = judged(ckpt, answer, ["How dull.", "How lovely."], response_weight=0.0)
    assert dialogue.turns[0].chosen == 0
    config = Config(ckpt="x", **{**SMALL, "response_weight": 0.0, "profile_weight": 2.0, "kl_coef": 0.0})
    p = pack(dialogue, config)
    p.old_logprobs = p.ref_logprobs = torch.zeros(len(p.targets))
    assert sum(train_rlpa.token_rewards(p.spans[1], p, config)) == 2 * p.spans[1].candidate.parts["profile"] > 0


def test_metrics_and_the_best_checkpoint_follow_the_weights(ckpt, user_url, tmp_path, monkeypatch):
    """Guards the weights: reward is the mean of the weighted sums, and the best checkpoint is the one with most of it.

    Iteration 1 earns by its profiles, 2 by its responses: with unit weights 2 would be the best, with these it is 1.
    """
    begun, run, run_iteration = [], tmp_path / "run", train_rlpa.run_iteration
    monkeypatch.setattr(train_rlpa, "run_iteration", lambda state: begun.append(1) or run_iteration(state))

    def part(levels: tuple[float, ...]):
        return lambda candidate, *_: levels[len(begun)] / (1 if "lovely" in candidate.response else 4)

    monkeypatch.setitem(rewards.REWARD_PARTS, "profile", part((0.9, 0.6, 0.1)))
    monkeypatch.setitem(rewards.REWARD_PARTS, "response", part((0.9, 0.2, 0.8)))
    with scripted(ChatTokenizer.from_folder(ckpt), ["How lovely.", "How dull."]):
        go("--ckpt", ckpt, "--run-dir", run, "--simulator-url", user_url, "--num-iterations", 2, "--keep-last", 1,
           "--profile-weight", 2, "--response-weight", 0.5, "--max-new-tokens", 100)  # fmt: skip
    for r in records(run, "train"):
        episodes = [e for e in records(run, "train", "episodes.jsonl") if e["iteration"] == r["iteration"]]
        candidates = [c for e in episodes for turn in e["turns"] for c in turn["candidates"]]
        earned = [2 * c["parts"]["profile"] + 0.5 * c["parts"]["response"] for c in candidates]
        assert len(earned) == 4 * 2 * 2 and [c["reward"] for c in candidates] == pytest.approx(earned)
        assert r["reward"] == pytest.approx(sum(earned) / len(earned))
        assert r["reward"] == pytest.approx(2 * r["profile_reward"] + 0.5 * r["response_reward"])
    heldout = {r["iteration"]: r["reward"] for r in records(run, "heldout/sampled")}
    assert heldout == pytest.approx({0: 2.25, 1: 1.3, 2: 0.6})
    newest = run / "checkpoints" / "iteration_000002"
    assert json.loads((newest / "trainer.json").read_text())["best"] == {"iteration_000001": heldout[1]}
    assert sorted(newest.parent.iterdir()) == [newest.with_name("iteration_000001"), newest]


def test_a_run_with_a_judge_that_often_fails(ckpt, user_url, tmp_path):
    """Guards the whole loop against half-judged turns: unjudged candidates are in the count, not in loss or reward,
    and a dialogue that is dropped (in the evaluation all are) plays no further turn."""
    chat = ChatTokenizer.from_folder(ckpt)
    dull = [*chat.encode(render_turn(["Age: 34"], "How dull.")), chat.im_end]
    run, judge = tmp_path / "run", hearing(lambda text: "well..." if "lovely" in text else GOOD)
    with judge as url, scripted(chat, ["How lovely.", "How dull."]):
        go("--ckpt", ckpt, "--run-dir", run, "--simulator-url", user_url, "--judge-url", url, "--max-turns", 2,
           "--num-iterations", 1, "--max-new-tokens", 100, "--quorum", 0)  # fmt: skip
    (train,) = records(run, "train")
    assert (train["candidates_unjudged"], train["dialogues_dropped"]) == (8, 0)
    assert (train["response_reward"], train["format_valid"]) == (1, 1)
    assert train["action_tokens"] == 8 * len(dull)
    assert all(r["dropped_judge"] == SMALL["eval_dialogues"] for r in records(run, "heldout/greedy"))


def test_a_run_folder_is_not_overwritten(ckpt, user_url, tmp_path, capsys):
    """Guards a finished run against a second one with the same --run-dir."""
    run = tmp_path / "run"
    go("--ckpt", ckpt, "--run-dir", run, "--simulator-url", user_url, "--num-iterations", 1)
    before = (run / "metrics.jsonl").read_bytes()
    assert train_rlpa.main(["--ckpt", str(ckpt), "--run-dir", str(run)]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == before


# ---------------------------------------------------------------------------------------------------------- small print


def test_a_dry_run_loads_nothing(ckpt, tmp_path, capsys):
    """Guards its promise: bytes, tokens and calls of the run from config.json alone, and no run folder."""
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((Path(ckpt) / "config.json").read_text())
    run = tmp_path / "run"
    assert train_rlpa.main(["--ckpt", str(bare), "--dry-run", "--run-dir", str(run), "--num-iterations", "3",
                            "--rollout-batch-size", "8", "--minibatch-size", "4", "--max-turns", "4"]) == 0  # fmt: skip
    shown = capsys.readouterr().out
    assert "fits" in shown and "KV cache" in shown and not run.exists()
    assert f"calls of the run: {3 * 8 * 3} to the simulator, 0 to the judge" in shown


def test_help_explains_every_flag(capsys):
    """Guards flags without a word of explanation, and a percent sign that breaks the help."""
    with pytest.raises(SystemExit) as end:
        train_rlpa.main(["--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0 and all(
        f"--{name.replace('_', '-')} " in shown for name in SMALL if name != "tensorboard"
    )


def test_doctests_of_the_trainer():
    """Guards examples that were never run."""
    assert doctest.testmod(train_rlpa).failed == 0
