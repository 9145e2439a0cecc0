"""What machines lack: a picture's library, room on a disk, a reader, an encoding; a run ends with its result anyway.

The policy is two random layers; every run stays in this process.
"""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from small_run import records, running_user, write_checkpoint

import train_rlpa
from evaluation.__main__ import main as evaluate
from learners import loading
from model import Qwen2Config
from records.log import RECORDS, RunLog
from studies.offline import main as offline

ROOT = Path(train_rlpa.__file__).parent
SETTINGS = {
    "rollout_batch_size": 2, "minibatch_size": 2, "max_turns": 2, "num_candidates": 2, "max_new_tokens": 8,
    "num_iterations": 1, "eval_every": 0, "eval_dialogues": 1, "save_every": 0, "reply_steps": 4,
}  # fmt: skip
PEOPLE = ["Ann lives in 北京 \N{CAT FACE}.", "Zoë naps.", "Łukasz rows."]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> Iterator[list[str]]:
    """A checkpoint, a running user, and personas that neither ASCII nor Latin-1 can write."""
    folder = write_checkpoint(tmp_path_factory.mktemp("random-policy"), SETTINGS)
    (folder / "people.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PEOPLE), encoding="utf-8")
    with running_user() as url:
        yield ["--ckpt", str(folder), "--simulator-url", url, "--personas", str(folder / "people.jsonl")]


def train(arguments: list[str], run: Path, *more: str) -> None:
    """Run to the end; what is the result must be there."""
    assert train_rlpa.main([*arguments, "--run-dir", str(run), *more]) == 0
    assert (run / "finished").exists() and len(records(run, "train")) == 1
    assert (run / "checkpoints" / "iteration_000001" / "policy" / "model.safetensors").is_file()


def warnings(text: str) -> list[str]:
    """Return the lines that warn of something, but of the policy's short turns."""
    return [line for line in text.splitlines() if "warning: " in line and "--max-new-tokens" not in line]


def without_reader() -> io.TextIOBase:
    """Return the writing end of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return open(writing, "w", encoding="utf-8")


STREAMS = {
    "full disk": lambda: open("/dev/full", "w", encoding="utf-8"),
    "no reader": without_reader,
    "closed": lambda: None,
    "ascii": lambda: io.TextIOWrapper(io.BytesIO(), encoding="ascii"),
    "gbk": lambda: io.TextIOWrapper(io.BytesIO(), encoding="gbk"),
}


@pytest.mark.parametrize("streams", [("stdout",), ("stderr",), ("stdout", "stderr")], ids="+".join)
@pytest.mark.parametrize("kind", STREAMS)
def test_a_run_ends_well_whatever_happens_to_its_output(arguments, tmp_path, monkeypatch, kind, streams):
    """Guards a run that trains to its end and dies because a line cannot be printed, or with the flush at exit."""
    opened = {name: STREAMS[kind]() for name in streams}
    with monkeypatch.context() as patch:
        for name, stream in opened.items():
            patch.setattr(sys, name, stream)
        train(arguments, tmp_path / "run", "--no-tensorboard")
    for name, stream in opened.items():
        assert getattr(sys, name) is not stream
        if stream is not None:
            stream.flush()  # as the interpreter does at exit
        if isinstance(stream, io.TextIOWrapper) and isinstance(stream.buffer, io.BytesIO) and name == "stdout":
            assert "run folder" in stream.buffer.getvalue().decode(stream.encoding)


def test_what_is_lost_of_the_output_is_said_once(arguments, tmp_path, monkeypatch, capsys):
    """Guards an output that breaks off without a word, or with a warning for every line."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", STREAMS["full disk"]())
        train(arguments, tmp_path / "run", "--no-tensorboard")
    (line,) = warnings(capsys.readouterr().err)
    assert "/dev/full is silent from here on: No space left on device" in line


def broken(*_: object, **__: object) -> None:
    """Fail as a library may that somebody else has installed."""
    raise TypeError("Descriptors cannot be created directly.\nIf this call came from …")


BREAKS = {  # what fails → what is said of it
    "no matplotlib": (lambda patch: patch.setitem(sys.modules, "matplotlib", None), "curve.png"),
    "no font": (lambda patch: patch.setattr("matplotlib.figure.Figure.savefig", broken), "curve.png"),
    "backend": (lambda patch: patch.setattr("matplotlib.use", broken), "curve.png"),
    "no tensorboard": (lambda patch: patch.setitem(sys.modules, "torch.utils.tensorboard", None), "TensorBoard"),
    "tensorboard": (lambda patch: patch.setattr("torch.utils.tensorboard.SummaryWriter.__init__", broken), "TensorBoa"),
    "events": (lambda patch: patch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", broken), "TensorBoard"),
}


@pytest.mark.parametrize("what", BREAKS)
def test_a_run_ends_well_without_its_pictures(arguments, tmp_path, monkeypatch, capsys, what):
    """Guards a finished run that ends with an error, and without its last lines, because a decoration fails."""
    pytest.importorskip("tensorboard")
    break_it, says = BREAKS[what]
    with monkeypatch.context() as patch:
        break_it(patch)
        train(arguments, tmp_path / "run")
    said = capsys.readouterr()
    (line,) = warnings(said.err)
    assert says in line and "left out" in line and "\n" not in line and "run folder" in said.out


def test_an_evaluation_ends_well_without_its_picture(arguments, tmp_path, monkeypatch, capsys):
    """Guards results that are written, and an exit code that says they are not; and an unreadable table."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", broken)
    out = tmp_path / "out"
    flags = [f"it={arguments[1]}", "--turns", "1", "--num-personas", "2", "--quiet", *arguments[2:], "--out", str(out)]
    assert evaluate(flags) == 0
    assert "curves.png is left out" in capsys.readouterr().err
    assert {file.name for file in out.iterdir()} == {"results.json", "results.csv", "episodes.jsonl"}


def test_a_result_that_cannot_be_written_is_an_error(tmp_path):
    """Guards records that vanish as quietly as a picture may."""
    log = RunLog(str(tmp_path), {}, tensorboard=False)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(ValueError, match="metrics.jsonl cannot be written: No space left"):
        log.metrics(1, "train", {"reward": 1.0})


@pytest.mark.parametrize("lost", [1, 5, 40])
def test_half_a_record_is_cut_off_with_a_word(tmp_path, capsys, lost):
    """Guards a record that is glued to half a line after a crash, which spoils both for every reader."""
    log = RunLog(str(tmp_path), {}, tensorboard=False)
    for iteration in (1, 2):
        log.metrics(iteration, "train", {"reward": 1.0})
        log.episodes(iteration, "train", [{"said": "Hi."}])
    position = log.position()
    for name in RECORDS:
        os.truncate(tmp_path / name, position[name] - lost)
    again = RunLog(str(tmp_path), position, tensorboard=False)
    assert capsys.readouterr().err.count("ends within a line; its last") == 2
    again.metrics(3, "train", {"reward": 1.0})
    again.episodes(3, "train", [{"said": "Hi."}])
    assert [[r["iteration"] for r in records(tmp_path, name=name)] for name in RECORDS] == [[1, 3], [1, 3]]
    RunLog(str(tmp_path), again.position(), tensorboard=False)
    assert not capsys.readouterr().err


@contextmanager
def little_room(size: int) -> Iterator[None]:
    """Let no file grow beyond a size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_has_no_room_is_named_with_the_way_out(arguments, tmp_path, capsys):
    """Guards "[Errno 28] No space left on device", which names neither the file nor what to do."""
    out, small = tmp_path / "out", ["--turns", "2", "--num-personas", "2", "--quiet", *arguments[2:]]
    sft = ["--method", "sft", *arguments, "--run-dir", str(tmp_path / "sft"), "--num-iterations", "1"]
    tape = ["--record", str(tmp_path / "tape")]
    for size, program, flags, name in (
        (100, evaluate, [f"it={arguments[1]}", *small, "--out", str(out)], out / "results.json"),
        (100, evaluate, [f"it={arguments[1]}", *small, "--out", f"{out}2", *tape], f"--record {tmp_path / 'tape'}"),
        (100, train_rlpa.main, [*arguments, "--run-dir", str(tmp_path / "run")], tmp_path / "run" / "config.json"),
        (4000, offline, sft, tmp_path / "sft" / "dialogues.jsonl"),
    ):
        capsys.readouterr()
        with little_room(size):
            assert program(flags) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert f": {name} cannot be written: File too large; make room" in line


def test_two_starts_in_one_second_do_not_meet():
    """Guards two runs that fail, or two evaluations that write into one folder, because they began together."""
    code = "import time; time.strftime = lambda *_: 'now'; from command_line import flags; print(flags.new_folder())"
    names = {subprocess.check_output([sys.executable, "-c", code], cwd=ROOT) for _ in range(2)}
    assert len(names) == 2 and all(name.startswith(b"runs/now_") for name in names)


# ------------------------------------------------------------------------------------------------- folders that move


@pytest.fixture
def moved(arguments, tmp_path) -> tuple[Path, Path, Callable[..., int]]:
    """A run of one iteration that was moved, the folder that it began with, under another name too, and a function
    that goes on for a second iteration."""
    base = Path(shutil.copytree(arguments[1], tmp_path / "base"))
    argv = ["--ckpt", str(base), *arguments[2:4], "--personas", str(base / "people.jsonl"), "--no-tensorboard"]
    train(argv, tmp_path / "run")
    run = (tmp_path / "run").rename(tmp_path / "elsewhere")
    command = ["--resume", str(run), "--num-iterations", "2", *arguments[2:4]]
    return run, base.rename(tmp_path / "new base"), lambda *flags: train_rlpa.main([*command, *map(str, flags)])


def test_a_run_goes_on_where_everything_has_moved(moved, tmp_path, capsys):
    """Guards a run that ends for good because its folder, its base or its personas stand elsewhere now; a reference of
    other weights, or other personas, that nobody notices."""
    run, base, resume = moved

    def refused(*flags: object) -> str:
        assert resume(*flags) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    people = ("--personas", base / "people.jsonl")
    assert "--kl-coef 0.01 needs it" in (line := refused(*people)) and "--ckpt …" in line
    assert "--personas …" in (line := refused("--ckpt", base)) and "say where it is now" in line
    other = write_checkpoint(tmp_path / "other", SETTINGS)
    weights = load_file(base / "model.safetensors")
    save_file(weights | {"model.norm.weight": weights["model.norm.weight"] + 1}, other / "model.safetensors")
    assert f"--ckpt {other} is not what this run began with" in refused(*people, "--ckpt", other)
    changed = tmp_path / "people.jsonl"
    changed.write_text((base / "people.jsonl").read_text(encoding="utf-8") + '"Bo naps."\n', encoding="utf-8")
    assert f"{changed} is not what" in refused("--personas", changed, "--ckpt", base)
    assert "holds --eval-personas (none)" in refused("--eval-personas", changed)
    assert len(records(run, "train")) == 1
    save_torch_state_dict(load_file(base / "model.safetensors"), base, max_shard_size=20_000)  # cut in other files
    assert len(list(base.glob("*.safetensors"))) > 1
    assert resume(*people, "--ckpt", base) == 0 and len(records(run, "train")) == 2


def test_without_a_reference_the_base_is_not_needed(arguments, tmp_path):
    """Guards a tokenizer, settings or held-out text that are read from where the run began, and not from itself."""
    base = Path(shutil.copytree(arguments[1], tmp_path / "base"))
    (base / "sft_heldout.jsonl").write_text('{"text": "Some words."}\n')
    train(["--ckpt", str(base), *arguments[2:], "--kl-coef", "0"], tmp_path / "run", "--no-tensorboard")
    shutil.rmtree(base)
    assert train_rlpa.main(["--resume", str(tmp_path / "run"), "--num-iterations", "2", *arguments[2:4]]) == 0
    assert all("perplexity_sft" in r for r in records(tmp_path / "run", "heldout/sampled"))
    assert {"rlpa.json", "sft_heldout.jsonl", "tokenizer.json"} <= {
        file.name for file in (tmp_path / "run" / "checkpoints" / "iteration_000002" / "policy").iterdir()
    }


@pytest.mark.parametrize("rates, chosen", [((200e9, 90e9), "bfloat16"), ((0.5e9, 80e9), "float32"), (None, "auto")])
def test_low_precision_is_chosen_by_measuring(arguments, tmp_path, monkeypatch, capsys, rates, chosen):
    """Guards a run that takes hours because its CPU emulates bf16, and one that is resumed in another dtype."""
    measured = {}
    monkeypatch.setattr(loading, "product_rate", lambda shape, dtype: measured[dtype])
    if rates:  # else the model is too small for a measurement, and measuring would fail
        measured |= dict(zip((torch.bfloat16, torch.float32), rates, strict=True))
        monkeypatch.setattr(loading, "LARGE", 1)
    threads, run = torch.get_num_threads(), tmp_path / "run"
    train(arguments, run)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--dtype")]
    assert [line.split()[1].strip(":") for line in said] == ([chosen] if rates else [])
    measured |= {torch.bfloat16: 1.0, torch.float32: 1.0}  # whatever the next machine does
    url = arguments[arguments.index("--simulator-url") + 1]
    assert train_rlpa.main(["--resume", str(run), "--simulator-url", url, "--num-iterations", "2"]) == 0
    torch.set_num_threads(threads)
    assert json.loads((run / "config.json").read_text(encoding="utf-8"))["dtype"] == chosen


def test_a_measured_rate_is_one(monkeypatch):
    """Guards a measurement that never ends where products are slow, and one that counts other FLOP than it does."""
    clock = iter(range(10**6))
    monkeypatch.setattr(loading.time, "perf_counter", lambda: float(next(clock)))
    shape = Qwen2Config(10, 8, 6, 1, 1, 1)
    assert loading.product_rate(shape, torch.float32) == 2 * 16 * 8 * 6  # a second for 16 rows: no more are tried
