"""What machines lack: a picture's library, room on a disk, a reader, an encoding; a run ends with its result anyway.

The policy is two random layers; every run stays in this process.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_run import records, running_user, write_checkpoint

import train_rlpa
from evaluation.__main__ import main as evaluate
from records.log import RunLog

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
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "silent" in line]
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
    (line,) = [line for line in said.err.splitlines() if "left out" in line]
    assert says in line and "warning: " in line and "\n" not in line and "run folder" in said.out


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
