"""A run that is killed, stopped or damaged anywhere goes on and ends as if nothing had happened.

The policy is two random layers; the processes of `torchrun` run on this machine.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_run import records, run_arguments

import train_rlpa
from benchmarks import corrupt
from dialogue import stream_seed
from records import checkpoints
from records.log import claim_folder
from records.state import newest_checkpoint
from simulator import make_user_server

pytestmark = pytest.mark.slow

ROOT = Path(train_rlpa.__file__).parent
SETTINGS = {
    "rollout_batch_size": 4, "minibatch_size": 2, "microbatch_tokens": 1000, "max_turns": 2, "num_candidates": 2,
    "max_new_tokens": 10, "num_personas": 20, "num_iterations": 3, "eval_every": 1, "eval_dialogues": 2,
    "episodes_every": 1, "save_every": 1, "lr": 1e-3, "critic_lr": 1e-3, "reply_steps": 4, "tensorboard": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> Iterator[list[str]]:
    """A checkpoint that carries SETTINGS, and a running user that all processes share."""
    with run_arguments(tmp_path_factory.mktemp("random-policy"), SETTINGS) as found:
        yield found


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory) -> Path:
    """The undisturbed run, of one process, with its three checkpoints."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert train_rlpa.main([*arguments, "--tensorboard", "--run-dir", str(run)]) == 0
    return run


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    """A copy of the undisturbed run, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def tensors(run: Path, iteration: int = 3) -> dict[str, list]:
    folder = run / "checkpoints" / f"iteration_{iteration:06d}"
    found = {f"{f.relative_to(folder)}:{k}": v for f in folder.rglob("*.safetensors") for k, v in load_file(f).items()}
    return {name: tensor.tolist() for name, tensor in sorted(found.items())}


def assert_identical(run: Path, whole: Path) -> None:
    """Same records and same last checkpoint, bit for bit."""
    for name in ("metrics.jsonl", "episodes.jsonl"):
        assert records(run, name=name) == records(whole, name=name)
    assert len(tensors(run)) > 50 and tensors(run) == tensors(whole)


def assert_close(run: Path, whole: Path) -> None:
    """Same episodes, and metrics and weights that differ by the order of sums only."""
    key = lambda e: (e["iteration"], e["kind"], e["index"])  # noqa: E731 - ranks write theirs one after another
    texts = [[(key(e), [c["text"] for t in e["turns"] for c in t["candidates"]])
              for e in sorted(records(r, name="episodes.jsonl"), key=key)] for r in (run, whole)]  # fmt: skip
    assert texts[0] == texts[1]
    for ours, theirs in zip(records(run), records(whole), strict=True):
        assert ours.pop("kind") == theirs.pop("kind") and ours == pytest.approx(theirs, abs=1e-5, rel=1e-5)
    ours, theirs = (sum(v, []) for v in (list(flat(tensors(run))), list(flat(tensors(whole)))))
    assert math.dist(ours, theirs) / math.hypot(*theirs) < 1e-4


def flat(found: dict[str, list]) -> Iterator[list[float]]:
    """Give the numbers of the policy's weights."""
    for name, values in found.items():
        if name.startswith("policy/"):
            yield [x for row in values for x in (row if isinstance(row, list) else [row])]


# ---------------------------------------------------------------------------------------------------------- checkpoints


def test_every_damage_to_the_newest_checkpoint_falls_back(copy, capsys):
    """Guards a resume from garbage, or none at all: each file, SHA256SUMS too, truncated, emptied, flipped, removed."""
    newest = copy / "checkpoints" / "iteration_000003"
    tried = []
    for name, how in corrupt.damages(newest):
        assert newest_checkpoint(str(copy)).name == "iteration_000002", (name, how)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("warning: ") and (name in line or name == checkpoints.SUMS), line
        tried.append((name, how))
    assert len(tried) >= 40 and (checkpoints.SUMS, "flipped") in tried
    assert newest_checkpoint(str(copy)) == newest and capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["policy/pytorch_model.bin", "optimizer.pt", "state.pkl", "notes.md"])
def test_pickles_are_refused_by_name(copy, name, capsys):
    """Guards code that runs when a stranger's checkpoint is read, even one whose SHA256SUMS vouches for it."""
    newest = copy / "checkpoints" / "iteration_000003"
    (newest / name).write_bytes(b"\x80\x04.")
    with (newest / checkpoints.SUMS).open("a") as sums:
        sums.write(f"{checkpoints.sha256(newest / name)}  {name}\n")
    assert newest_checkpoint(str(copy)).name == "iteration_000002"
    assert f"{name} is refused" in capsys.readouterr().err
    (newest / name).rename(newest / "extra.json")
    assert "not listed" in checkpoints.damage(newest) or "missing" in checkpoints.damage(newest)


def test_a_run_without_a_whole_checkpoint_is_one_error(arguments, copy, capsys):
    """Guards a silent new start over a damaged run: it says that none is whole, and what can be done."""
    for folder in checkpoints.published(copy / "checkpoints"):
        corrupt.flip(folder / "trainer.json")
    before = (copy / "metrics.jsonl").read_bytes()
    assert train_rlpa.main(["--resume", str(copy), *arguments[2:]]) == 2
    *warnings, error = capsys.readouterr().err.splitlines()
    assert len(warnings) == 3 and "none of 3 checkpoints" in error and "--overwrite" in error
    assert (copy / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("kept", ["policy", "nothing"])
def test_a_run_may_save_less_and_says_that_it_cannot_go_on(arguments, whole, tmp_path, kept, capsys):
    """Guards a disk filled by masters and moments that nobody wants, and a resume from what has none of them."""
    run = tmp_path / "run"
    assert train_rlpa.main([*arguments, "--save", kept, "--run-dir", str(run)]) == 0
    assert records(run) == records(whole)
    files = {str(f.relative_to(run / "checkpoints")) for f in run.rglob("*.safetensors")}
    assert ("policy: " in capsys.readouterr().out.splitlines()[-2]) == (kept == "policy")
    names = ["iteration_000001", "iteration_000002", "iteration_000003"] if kept == "policy" else []
    assert files == {f"{name}/policy/model.safetensors" for name in names}
    for name in names[2:]:
        ours, theirs = (load_file(r / "checkpoints" / name / "policy" / "model.safetensors") for r in (run, whole))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
        folder = run / "checkpoints" / name
        assert checkpoints.damage(folder) == "" and (folder / "policy" / "tokenizer.json").exists()
    assert train_rlpa.main(["--resume", str(run), *arguments[2:], "--num-iterations", "4"]) == 2
    assert capsys.readouterr().err.splitlines()[-1:] == [
        f"train_rlpa.py: --resume {run}: --save {kept} left nothing to go on from; start anew, with --save run"
    ]


def events(run: Path) -> list[tuple]:
    """Read what TensorBoard shows, without what a clock says."""
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader").EventFileLoader
    found = [e for f in sorted((run / "tensorboard").glob("*")) for e in loader(str(f)).Load()]
    values = [(e.step, v.tag, repr(v.tensor.float_val[0])) for e in found for v in e.summary.value]
    return [v for v in values if "seconds" not in v[1] and "per_second" not in v[1]]


def test_a_damaged_run_goes_on_from_the_checkpoint_before(arguments, copy, whole):
    """Guards records that stay behind the weights: all that came after the older checkpoint is cut off, and is made
    again bit for bit, in TensorBoard's files too; the damaged folder is replaced."""
    corrupt.cut(copy / "checkpoints" / "iteration_000003" / "critic" / "model.safetensors")
    (copy / "finished").unlink()
    for name in ("metrics.jsonl", "episodes.jsonl"):
        with (copy / name).open("a") as file:
            file.write('{"iteration": 3, "kind": "tr')  # a kill cut it short
    (copy / "tensorboard" / "events.out.tfevents.9").write_bytes(b"of a process that saved nothing")
    assert train_rlpa.main(["--resume", str(copy), *arguments[2:]]) == 0
    assert_identical(copy, whole)
    assert len(events(whole)) > 100 and events(copy) == events(whole)
    ours, theirs = (json.loads((run / "config.json").read_text()) for run in (copy, whole))
    assert ours == theirs | {"run_dir": str(copy)}


def test_more_iterations_do_not_stretch_the_schedule_unless_asked(arguments, copy, tmp_path, capsys):
    """Guards learning rates that jump up again where a finished run goes on, and a jump that no record shows."""
    stretched, rates = Path(shutil.copytree(copy, tmp_path / "stretched")), []
    for run, *more in ((copy,), (stretched, "--schedule-iterations", "0")):
        longer = ["--resume", str(run), *arguments[2:], "--num-iterations", "5", "--eval-every", "0", *more]
        assert train_rlpa.main(longer) == 0
        assert ("--schedule-iterations 0" in capsys.readouterr().out) == (run == copy)
        assert json.loads((run / "config.json").read_text())["schedule_iterations"] == (3 if run == copy else 5)
        rates.append([r["lr"] for r in records(run, "train")])
        assert rates[-1] == [r["critic_lr"] for r in records(run, "train")]  # SETTINGS give both the same peak
    held, longer = rates
    assert held[0] > held[1] > held[2] > held[3] == held[4] == pytest.approx(1e-4)
    assert longer[:3] == held[:3] and longer[3] > 2e-4 > longer[4]


class Killed(BaseException):
    """Stands in for SIGKILL."""


def test_a_save_killed_at_any_step_leaves_whole_checkpoints(tmp_path, monkeypatch):
    """Guards every gap between writing, publishing and removing: what is found is the old checkpoint or the new one,
    never neither, and the next save cleans up. One of them stands where a damaged one stood."""
    steps = {name: getattr(os, name) for name in ("fsync", "replace", "unlink", "rmdir", "mkdir")}
    countdown = math.inf

    def counted(name: str) -> Callable:
        def step(*args, **kwargs):
            nonlocal countdown
            countdown -= 1
            if countdown < 0:
                raise Killed
            return steps[name](*args, **kwargs)

        return step

    def save(root: Path, number: int) -> None:
        temporary = checkpoints.prepare(root / f"iteration_{number:06d}")
        (temporary / "policy").mkdir()
        (temporary / "policy" / "model.safetensors").write_text(f"weights {number}")
        (temporary / "trainer.json").write_text(str(number))
        checkpoints.publish(temporary, root / f"iteration_{number:06d}")
        checkpoints.prune(root / f"iteration_{number:06d}", 1)

    for name in steps:
        monkeypatch.setattr(os, name, counted(name))
    found, kills = [], 0
    while len(found) == kills:  # until a save is through
        root, countdown = tmp_path / f"killed{kills}", math.inf
        save(root, 1)
        (root / "iteration_000002").mkdir()  # damaged
        countdown = kills
        try:
            save(root, 2)
        except Killed:
            found.append(checkpoints.newest(root, lambda line: None).name)
        kills, countdown = kills + 1, math.inf
        save(root, 3)
        assert [folder.name for folder in root.iterdir()] == ["iteration_000003"]
    assert len(found) > 15 and found == sorted(found) and set(found) == {"iteration_000001", "iteration_000002"}


def test_a_full_disk_is_one_line(arguments, tmp_path):
    """Guards a traceback of safetensors, which has an error of its own, and half a checkpoint under its final name."""
    small = "import resource, sys, train_rlpa; resource.setrlimit(resource.RLIMIT_FSIZE, (64_000, 64_000));"
    argv = [*arguments, "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-c", f"{small} sys.exit(train_rlpa.main())", *argv],
        cwd=Path(train_rlpa.__file__).parent, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert "cannot be written" in done.stderr and "make room, or give another --run-dir" in done.stderr
    assert not checkpoints.published(tmp_path / "run" / "checkpoints")


def test_the_last_and_the_best_checkpoints_are_kept(tmp_path):
    """Guards --keep-last: off by one, the best removed, or a later, damaged one kept in place of a whole one."""
    for number in range(1, 7):
        (tmp_path / f"iteration_{number:06d}").mkdir()
    (tmp_path / "iteration_000005.stopped").mkdir()
    names = lambda: [folder.name.removeprefix("iteration_00000") for folder in checkpoints.published(tmp_path)]  # noqa: E731
    assert names() == ["1", "2", "3", "4", "5.stopped", "5", "6"]
    checkpoints.prune(tmp_path / "iteration_000005", 0)
    assert names() == ["1", "2", "3", "4", "5.stopped", "5"]
    checkpoints.prune(tmp_path / "iteration_000005", 2, "iteration_000002")
    assert names() == ["2", "5.stopped", "5"]


def test_the_best_checkpoint_is_the_one_with_most_held_out_reward(whole):
    """Guards a best one that is never noted, or is that of another iteration."""
    rewards = {r["iteration"]: r["reward"] for r in records(whole) if r["kind"] == "heldout/sampled" and r["iteration"]}
    best = max(rewards, key=rewards.get)  # the first of equals
    (noted,) = json.loads((whole / "checkpoints" / "iteration_000003" / "trainer.json").read_text())["best"].items()
    assert noted == (f"iteration_{best:06d}", pytest.approx(rewards[best], abs=1e-6))


# -------------------------------------------------------------------------------------------------------------- signals


def send_in(monkeypatch, where: str, number: int) -> None:
    """Send this process a signal in the middle of iteration 2: in its rollout, in its update or in its evaluation."""
    score, update = train_rlpa.score_candidate, train_rlpa.update
    stream = {"rollout": (0, "train", 1), "evaluation": (0, "eval", 2, 0.0)}.get(where)

    def scored(candidate, dialogue, config, judge):
        score(candidate, dialogue, config, judge)
        if stream and judge.seed == stream_seed(*stream, "judge", dialogue.index, len(dialogue.turns), 0):
            os.kill(os.getpid(), number)

    def updated(*args):
        if where == "update" and args[4][0] == 2:
            os.kill(os.getpid(), number)
        return update(*args)

    monkeypatch.setattr(train_rlpa, "score_candidate", scored)
    monkeypatch.setattr(train_rlpa, "update", updated)


@pytest.mark.parametrize(
    ("where", "number", "code", "saved"),
    [
        ("rollout", signal.SIGTERM, 0, "iteration_000001"),
        ("update", signal.SIGINT, 130, "iteration_000002.stopped"),
        ("evaluation", signal.SIGTERM, 0, "iteration_000002.stopped"),
    ],
)
def test_a_signal_saves_and_the_run_goes_on(arguments, whole, tmp_path, monkeypatch, capfd, where, number, code, saved):
    """Guards lost work, tracebacks, records of what was discarded, and an evaluation that is skipped or done twice."""
    run, before = tmp_path / "run", signal.getsignal(number)
    with monkeypatch.context() as patch:
        send_in(patch, where, number)
        assert train_rlpa.main([*arguments, "--run-dir", str(run), "--save-every", "0"]) == code
    assert [folder.name for folder in checkpoints.published(run / "checkpoints")] == [saved]
    assert signal.getsignal(number) == before
    said = capfd.readouterr()
    assert f"--resume {run}" in said.out.splitlines()[-1] and "Traceback" not in said.err
    assert train_rlpa.main(["--resume", str(run), *arguments[2:]]) == 0
    assert_identical(run, whole)


def test_a_hanging_user_does_not_delay_the_end(arguments, tmp_path):
    """Guards threads that wait for a reply: the signal comes while everything waits, and the reply never does."""
    done, waited = threading.Event(), []

    class Hanging(BaseHTTPRequestHandler):
        def do_POST(self):
            os.kill(os.getpid(), signal.SIGTERM)
            waited.append(done.wait(600))

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hanging)
    threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    assert train_rlpa.main([*arguments[:2], "--simulator-url", url, "--run-dir", str(tmp_path / "run")]) == 0
    assert not waited  # no request had ended, in one way or another
    done.set()
    server.shutdown()
    server.server_close()


def test_a_second_interrupt_ends_at_once_and_a_second_sigterm_does_not():
    """Guards both: Ctrl-C twice in a run that saves for minutes, SIGTERM from the launcher and from its own boss."""
    code = (
        "import os, signal\nfrom learners.processes import catch_signals\n"
        "received = []\nwith catch_signals(received):\n"
        "    for s in (15, 15, 2):\n        os.kill(os.getpid(), s)\n    print(received, flush=True)\n"
        "    os.kill(os.getpid(), 2)\n    print('still here', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT and done.stdout == "[15, 15, 2]\n" and "Traceback" not in done.stderr


# ----------------------------------------------------------------------------------------------------------- run folder


def test_no_run_is_overwritten_unless_asked(arguments, tmp_path, capsys):
    """Guards runs that have recorded something, and folders that hold something else, --overwrite or not."""
    run, other = tmp_path / "run", tmp_path / "other"
    one = [*arguments, "--num-iterations", "1", "--eval-every", "0"]
    assert train_rlpa.main([*one, "--run-dir", str(run), "--personas", "absent.jsonl"]) == 2
    assert not run.exists()  # a run that did not begin does not take the folder
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"format": "rlpa run 1"}))
    (run / "metrics.jsonl").write_text("{}\n")
    other.mkdir()
    (other / ".config.json.tmp").write_text("{")  # killed before its first file had its name: nothing is lost
    assert train_rlpa.main([*one, "--run-dir", str(other)]) == 0
    assert not (other / ".config.json.tmp").exists()
    shutil.rmtree(other)
    assert train_rlpa.main([*one, "--run-dir", str(run)]) == 2 and "--overwrite" in capsys.readouterr().err
    assert train_rlpa.main([*one, "--run-dir", str(run), "--overwrite"]) == 0
    other.mkdir()
    (other / "thesis.tex").write_text("years")
    assert train_rlpa.main([*one, "--run-dir", str(other), "--overwrite"]) == 2
    assert "holds no run" in capsys.readouterr().err and (other / "thesis.tex").read_text() == "years"
    with claim_folder(str(run), resume=True, overwrite=False):
        assert train_rlpa.main(["--resume", str(run), *arguments[2:], "--num-iterations", "2"]) == 2
    assert "in use" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- two processes

CHILD = """
import os, sys
sys.path.insert(0, {root!r})
import train_rlpa
from dialogue import stream_seed
from learners import processes
score = train_rlpa.score_candidate
def scored(candidate, dialogue, config, judge):
    if judge.seed == stream_seed(0, "train", 1, "judge", dialogue.index, len(dialogue.turns), 0):
        if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), {number})
    score(candidate, dialogue, config, judge)
train_rlpa.score_candidate = scored
processes.leave(train_rlpa.main())
"""


def torchrun(tmp_path: Path, number: int, *argv: str) -> subprocess.CompletedProcess:
    """Run two processes, of which rank 1 sends itself a signal (0: none) in the rollout of iteration 2."""
    program = tmp_path / "child.py"
    program.write_text(CHILD.format(root=str(ROOT), number=int(number)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*launcher, "--max-restarts", "3", str(program), *argv],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_a_killed_process_restarts_them_all(arguments, whole, tmp_path):
    """Guards elastic restarts: the run goes on by itself, in the folder of an automatic name that it had, from its
    checkpoint, and is not held up by what the dead processes left in the launcher's store."""
    done = torchrun(tmp_path, signal.SIGKILL, *arguments, "--keep-last", "0")
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = (tmp_path / "runs").iterdir()
    assert done.stdout.count("RLPA: policy") == 2 and done.stdout.count("run folder:") == 1
    assert_close(run, whole)


def test_one_process_gets_sigterm_and_one_process_goes_on(arguments, whole, tmp_path):
    """Guards ranks that stop alone: rank 1 gets SIGTERM, both end with 0; then one process resumes what two began."""
    run = tmp_path / "run"
    done = torchrun(tmp_path, signal.SIGTERM, *arguments, "--run-dir", str(run))
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert "saved after iteration 1" in done.stdout and "--nproc-per-node 2" in done.stdout
    assert train_rlpa.main(["--resume", str(run), *arguments[2:]]) == 0
    assert_close(run, whole)


def test_two_processes_go_on_with_what_one_began(arguments, whole, tmp_path, monkeypatch):
    """Guards state that belongs to a rank: nothing in a checkpoint knows how many there were."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        send_in(patch, "rollout", signal.SIGTERM)
        assert train_rlpa.main([*arguments, "--run-dir", str(run)]) == 0
    done = torchrun(tmp_path, 0, "--resume", str(run), *arguments[2:])
    assert done.returncode == 0, done.stderr[-3000:]
    assert_close(run, whole)


def test_an_error_of_the_user_is_told_once(arguments, whole, tmp_path):
    """Guards a line per process, ranks that wait for one that has given up, torchrun's report without the reason."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "train_rlpa.py", *arguments, "--run-dir", str(whole)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.count("train_rlpa.py: --run-dir") == 1
    assert "traceback : --run-dir" in done.stderr.splitlines()[-2]


def test_a_silent_process_is_not_waited_for_without_end(tmp_path):
    """Guards collectives without a limit: a process that hangs ends the others with one line, not never."""
    code = (
        "import os\nfrom learners import processes\n"
        "try:\n    processes.join_processes(None, 3.0)\n"  # on a busy machine this may fail already, in the same words
        "    input() if os.environ['RANK'] == '1' else processes.gather(1)\n"
        "except processes.LostProcess as error:\n    print(error, flush=True)\n"
        "os._exit(0)\n"
    )
    with make_user_server(port=0) as free:
        port = free.server_address[1]
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    start = lambda rank: subprocess.Popen(  # noqa: E731
        [sys.executable, "-c", code], cwd=ROOT, env={**env, "RANK": rank}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    patient, silent = start("0"), start("1")
    assert "another process is lost, or has not answered in time" in patient.communicate()[0]
    silent.kill()
    silent.communicate()


def test_who_comes_second_leaves_the_folder_alone(tmp_path):
    """Guards a run that has written nothing yet: the one that is refused must not remove its empty folder."""
    with claim_folder(str(tmp_path / "run"), False, False):
        with pytest.raises(ValueError, match="is in use"):
            with claim_folder(str(tmp_path / "run"), False, False):
                pass
        assert (tmp_path / "run").is_dir()
    assert not (tmp_path / "run").exists()
