"""One global batch, however it is cut up: two processes or one, large micro-batches or small, the numbers are the same.

Both processes run on this machine and talk through gloo; the policy is two random layers.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_rlpa
from make_tiny import scripted_dialogue, train_tokenizer
from model import Qwen2Config, random_policy, save_pretrained
from simulator import make_server

ROOT = Path(train_rlpa.__file__).parent
SETTINGS = {
    "rollout_batch_size": 6, "minibatch_size": 3, "microbatch_tokens": 1000, "decode_batch_size": 2, "max_turns": 3,
    "num_candidates": 2, "max_new_tokens": 12, "num_iterations": 0, "eval_every": 0,
    "eval_dialogues": 3, "episodes_every": 1, "save_every": 0, "lr": 1e-3, "critic_lr": 1e-3, "credit": "dialogue",
    "tensorboard": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> Iterator[list[str]]:
    """A checkpoint that carries SETTINGS, a running user that all processes share, and 13 + 1 personas.

    They make batches of 6, 6 and 1 dialogues: in the last one, and in every evaluation, a second process has none.
    """
    folder = tmp_path_factory.mktemp("random-policy")
    rng = random.Random(0)
    tokenizer = train_tokenizer([text for _ in range(50) for turn in scripted_dialogue(rng, 2) for text in turn], 400)
    shape = Qwen2Config(tokenizer.get_vocab_size(), 32, 48, 2, num_attention_heads=2, num_key_value_heads=1)
    save_pretrained(random_policy(shape, seed=0), folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "rlpa.json").write_text(json.dumps(SETTINGS))
    for name, n in (("train", 13), ("heldout", 1)):
        facts = [f'{{"facts": ["Age: {30 + i}", "Occupation: baker"]}}\n' for i in range(n)]
        (folder / f"{name}.jsonl").write_text("".join(facts))
    server = make_server(port=0)
    threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
    url, files = (
        f"http://127.0.0.1:{server.server_address[1]}",
        [str(folder / f"{n}.jsonl") for n in ("train", "heldout")],
    )
    yield ["--ckpt", str(folder), "--simulator-url", url, "--personas", files[0], "--eval-personas", files[1]]
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def one_process(arguments, tmp_path_factory) -> Path:
    """The run that the others are compared with."""
    run = tmp_path_factory.mktemp("one") / "run"
    assert train_rlpa.main([*arguments, "--run-dir", str(run)]) == 0
    return run


def torchrun(*argv: str) -> subprocess.CompletedProcess:
    """Run the trainer as two processes, one thread each."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train_rlpa.py"]
    return subprocess.run(
        [*launcher, *argv],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )


def records(run: Path) -> list[dict]:
    """Read metrics.jsonl, without what a clock says."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith("seconds") and "per_second" not in k} for r in found]


def said(run: Path) -> dict[tuple, list]:
    """What was sampled: (iteration, kind, place in the batch) → texts of all candidates, and whether it was dropped."""
    found = [json.loads(line) for line in (run / "episodes.jsonl").read_text().splitlines()]
    return {
        (e["iteration"], e["kind"], e["index"]): [c["text"] for t in e["turns"] for c in t["candidates"]]
        + [e["dropped"]]
        for e in found
    }


def assert_same_run(run: Path, reference: Path) -> None:
    """Same dialogues, every metric within 1e-5, and the same final weights but for the order of sums."""
    assert said(run) == said(reference)
    ours, theirs = records(run), records(reference)
    assert [(r["iteration"], r["kind"]) for r in ours] == [(r["iteration"], r["kind"]) for r in theirs]
    assert [r["dialogues"] for r in ours if r["kind"] == "train"] == [6, 6, 1]
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"kind"}:
            assert one[name] == pytest.approx(other[name], abs=1e-5, rel=1e-5), (one["iteration"], one["kind"], name)
    for model in ("policy", "critic"):
        file = Path("checkpoints", "iteration_000003", model, "model.safetensors")
        weights, expected = load_file(run / file), load_file(reference / file)
        assert weights.keys() == expected.keys()
        ours, theirs = (torch.cat([w[k].flatten() for k in expected]) for w in (weights, expected))
        assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-4


def test_two_processes_equal_one(arguments, one_process, tmp_path):
    """Guards means per rank, streams per rank, duties of rank 0, and collectives that an idle rank skips (a hang)."""
    done = torchrun(*arguments, "--run-dir", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 process(es)" in done.stdout and done.stdout.count("run folder:") == 1  # rank 0 alone reports
    assert_same_run(tmp_path / "two", one_process)


def test_two_processes_share_a_trunk(arguments, tmp_path):
    """Guards the joint backward of a shared trunk where a rank has no tokens, and sums that are taken per rank."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert train_rlpa.main([*arguments, "--critic", "shared", "--run-dir", str(one)]) == 0
    done = torchrun(*arguments, "--critic", "shared", "--run-dir", str(two))
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(two, one)


@pytest.mark.parametrize("sizes", [(1, 6), (100_000, 1)])
def test_microbatches_do_not_matter(arguments, one_process, tmp_path, sizes):
    """Guards losses that are means of means: other sizes of update and decode batches give the same run."""
    microbatch, decode = map(str, sizes)
    run = tmp_path / "run"
    flags = ["--microbatch-tokens", microbatch, "--decode-batch-size", decode, "--run-dir", str(run)]
    assert train_rlpa.main([*arguments, *flags]) == 0
    assert_same_run(run, one_process)


def test_without_torchrun_everything_is_local():
    """Guards the single process against collectives: sums and gathers are what they are given."""
    assert (train_rlpa.rank(), train_rlpa.world_size()) == (0, 1)
    assert train_rlpa.gather("x") == ["x"] and torch.equal(train_rlpa.all_sum(torch.ones(2)), torch.ones(2))
