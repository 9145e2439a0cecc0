"""One global batch, however it is cut up: two processes or one, large micro-batches or small, the numbers are the same.

Whole runs of the trainer; `test_sharding.py` has single updates. Both processes run on this machine, also where they
stand for two hosts, and talk through gloo; the policy is two random layers.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_run import records, running_user, write_checkpoint

import train_rlpa
from command_line.flags import run_settings
from config import Config
from learners import processes
from learners.learner import optimizer_tensors
from learners.loading import load_models
from records import checkpoints

pytestmark = pytest.mark.slow
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
    folder = write_checkpoint(tmp_path_factory.mktemp("random-policy"), SETTINGS)
    for name, n in (("train", 13), ("heldout", 1)):
        facts = [f'{{"facts": ["Age: {30 + i}", "Occupation: baker"]}}\n' for i in range(n)]
        (folder / f"{name}.jsonl").write_text("".join(facts))
    files = [str(folder / f"{n}.jsonl") for n in ("train", "heldout")]
    with running_user() as url:
        yield ["--ckpt", str(folder), "--simulator-url", url, "--personas", files[0], "--eval-personas", files[1]]



@pytest.fixture(scope="module")
def one_process(arguments, tmp_path_factory) -> Path:
    """The run that the others are compared with."""
    run = tmp_path_factory.mktemp("one") / "run"
    assert train_rlpa.main([*arguments, "--run-dir", str(run)]) == 0
    return run


@pytest.fixture(scope="module")
def runs_of_two(arguments, tmp_path_factory) -> Path:
    """Three runs by two processes, one after another: a launch takes longer than they do."""
    folder = tmp_path_factory.mktemp("two")
    flags = {"whole": REPEATABLE, "sharded": ("--shard", "--save-every", "1"), "shared": ("--critic", "shared")}
    runs = [[*arguments, *more, "--run-dir", str(folder / name)] for name, more in flags.items()]
    (folder / "runs.py").write_text(RUNS)
    done = torchrun(json.dumps(runs), program=str(folder / "runs.py"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("2 process(es)") == done.stdout.count("run folder:") == 3  # rank 0 alone reports
    return folder


@pytest.fixture(scope="module")
def two_processes(runs_of_two) -> Path:
    """The same run by two processes, with a schedule that repeats to the last bit."""
    return runs_of_two / "whole"


@pytest.fixture(scope="module")
def sharded(runs_of_two) -> Path:
    """The same run by two processes that share out the weights; it has a checkpoint of every iteration."""
    return runs_of_two / "sharded"


RUNS = """
import json, os, sys
import train_rlpa
from learners import processes
for number, argv in enumerate(json.loads(sys.argv[1])):
    os.environ["TORCHELASTIC_RUN_ID"] = str(number)  # a part of the launcher's store: else it passes for a restart
    if code := train_rlpa.main(argv):
        break
processes.leave(code)
"""
REPEATABLE = ("--reply-steps", "4")
LAUNCHER = [sys.executable, "-m", "torch.distributed.run"]
START = {"cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, "text": True}


def torchrun(*argv: str, processes: int = 2, program: str = "train_rlpa.py") -> subprocess.CompletedProcess:
    """Run the trainer, or another program, as several processes, one thread each."""
    launcher = [*LAUNCHER, "--standalone", "--nproc-per-node", str(processes), program]
    return subprocess.run([*launcher, *argv], capture_output=True, **START)


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


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


def test_two_processes_equal_one(two_processes, one_process):
    """Guards means per rank, streams per rank, duties of rank 0, and collectives that an idle rank skips (a hang)."""
    assert_same_run(two_processes, one_process)


def test_two_hosts_equal_one(arguments, two_processes, tmp_path):
    """Guards duties of a host's first process, and a rendezvous that does not come about: two launchers of one process
    each play the part of two hosts, and end with what one launcher of two processes ends with, bit for bit."""
    run, place = tmp_path / "run", ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}")
    hosts = [*LAUNCHER, *place, "--nnodes", "2", "--nproc-per-node", "1", "--local-addr", "127.0.0.1", "train_rlpa.py"]
    argv = [*hosts, *arguments, *REPEATABLE, "--run-dir", str(run)]
    agents = [subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **START) for _ in range(2)]
    try:
        told = [agent.communicate()[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], told[0][-3000:] + told[1][-3000:]
    assert sorted(("run folder:" in text) for text in told) == [False, True]
    assert said(run) == said(two_processes) and records(run) == records(two_processes)
    files = sorted(file.relative_to(run) for file in run.rglob("*.safetensors"))
    assert len(files) == 4 and all((run / f).read_bytes() == (two_processes / f).read_bytes() for f in files)


def test_shards_equal_whole_models(sharded, one_process):
    """Guards every part of a run that meets sharded weights: sampling, statistics, update, evaluation, checkpoints."""
    assert_same_run(sharded, one_process)


def test_four_processes_equal_one(arguments, one_process, tmp_path):
    """Guards tokens that depend on the number of processes, and shards where three of four have no dialogue."""
    done = torchrun(*arguments, "--shard", "--run-dir", str(tmp_path / "four"), processes=4)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(tmp_path / "four", one_process)


def test_a_checkpoint_of_shards_is_one_of_whole_models(sharded, one_process):
    """Guards rows of one process that pass for a whole tensor, numbers that torch's writer loses, and files left over.

    What two processes wrote holds the same files and tensors as what one process with whole models writes, and one
    with whole models loads weights and moments from it as they are.
    """
    folder, other = (run / "checkpoints" / "iteration_000003" for run in (sharded, one_process))
    assert checkpoints.damage(folder) == "" and checkpoints.damage(other) == ""
    names = [sorted(f.relative_to(x).as_posix() for x in [path] for f in path.rglob("*")) for path in (folder, other)]
    assert names[0] == names[1] and not list((sharded / "checkpoints").glob(".*"))
    config = Config(**run_settings(sharded) | {"shard": False})
    policy, critic, _ = load_models(config, folder)
    for name, learner in (("policy", policy), ("critic", critic)):
        weights, file = load_file(folder / name / "model.safetensors"), f"{name}_optimizer.safetensors"
        assert all(torch.equal(weights[key], master) for key, master in learner.masters.items())
        loaded = optimizer_tensors(learner)
        moments, expected = load_file(folder / file), load_file(other / file)
        assert moments.keys() == loaded.keys() == expected.keys()
        for key, value in loaded.items():
            assert torch.equal(value, moments[key]) and value.shape == expected[key].shape, key
            assert torch.allclose(value, expected[key], rtol=1e-3, atol=1e-6), key
        assert {v.item() for key, v in moments.items() if key.endswith("step")} == {5.0}  # 2 + 2 + 1 mini-batches


@pytest.mark.parametrize("how", ["one process, whole", "two processes, sharded"])
def test_shards_go_on(sharded, arguments, one_process, tmp_path, how):
    """Guards moments and masters that are not restored: with whole models or shards, a run goes on and ends alike."""
    run = Path(shutil.copytree(sharded, tmp_path / "run"))
    for iteration in (2, 3):
        shutil.rmtree(run / "checkpoints" / f"iteration_{iteration:06d}")
    if how.startswith("one"):
        assert train_rlpa.main(["--resume", str(run), *arguments[2:4], "--no-shard"]) == 0
    else:
        done = torchrun("--resume", str(run), *arguments[2:4])
        assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(run, one_process)


def test_whole_models_go_on_as_shards(arguments, one_process, tmp_path):
    """Guards the other direction, and a group of one process: from a checkpoint of whole models on with --shard."""
    run = tmp_path / "run"
    assert train_rlpa.main([*arguments, "--save-every", "1", "--run-dir", str(run)]) == 0
    for iteration in (2, 3):
        shutil.rmtree(run / "checkpoints" / f"iteration_{iteration:06d}")
    assert train_rlpa.main(["--resume", str(run), *arguments[2:4], "--shard"]) == 0
    assert_same_run(run, one_process)


def test_a_lost_process_is_one_line(arguments, tmp_path):
    """Guards a traceback, or a wait without end, where a process dies while shards are gathered for a forward."""
    code = (
        "import os, sys, train_rlpa\nwhole = train_rlpa.add_gradients\n"
        "def dying(*args):\n    os._exit(9) if os.environ['RANK'] == '1' else None\n    return whole(*args)\n"
        "train_rlpa.add_gradients = dying\ntrain_rlpa.processes.leave(train_rlpa.main(sys.argv[1:]))\n"
    )
    argv = [sys.executable, "-c", code, *arguments, "--shard", "--run-dir", str(tmp_path / "run")]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    both = [
        subprocess.Popen(argv, stderr=subprocess.PIPE, **START | {"env": START["env"] | place | {"RANK": number}})
        for number in "01"
    ]
    told = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [1, 9]
    assert told[0].splitlines()[-1].startswith("train_rlpa.py: another process is lost") and "Traceback" not in told[0]


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "2"}, {}], ids=["one of two", "alone"])
def test_a_process_of_several_leaves_at_once(environment):
    """Guards runs that are finished and then reported as failed: a thread of gloo that still frees a tensor while the
    interpreter is finalised aborts the process, which only a busy machine shows."""
    code = (
        "import atexit\nfrom learners.processes import leave\natexit.register(print, 'finalised')\n"
        "print('said', end=' ')\nleave(3)\n"
    )
    start = START | {"env": START["env"] | environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, **start)
    assert (done.returncode, done.stdout.split()) == (3, ["said"] if environment else ["said", "finalised"])


def test_two_processes_share_a_trunk(arguments, runs_of_two, tmp_path):
    """Guards the joint backward of a shared trunk where a rank has no tokens, and sums that are taken per rank."""
    assert train_rlpa.main([*arguments, "--critic", "shared", "--run-dir", str(tmp_path / "one")]) == 0
    assert_same_run(runs_of_two / "shared", tmp_path / "one")


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
    assert (processes.rank(), processes.world_size()) == (0, 1)
    assert processes.gather("x") == ["x"] and torch.equal(processes.all_sum(torch.ones(2)), torch.ones(2))
