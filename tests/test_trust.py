"""What strangers' files may bring about: a checkpoint, a run, a recording or a folder is data, and no command.

Servers that are misused: tests/test_simulator.py. Files that are damaged at random: benchmarks/fuzz_files.py.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import get_type_hints

import pytest
from small_run import chat_server

import train_rlpa
from benchmarks import fuzz_files
from chat import __main__ as chat
from command_line.exits import tell
from command_line.flags import ASKED, OWN, RESUMED, TINY_CHECKPOINT, parse_args, resume_command, training_settings
from config import RUN_FORMAT, Config, flag
from endpoints.tape import Tape
from endpoints.wire import Call, ChatReply
from evaluation import __main__ as evaluation
from records.checkpoints import write_text
from records.log import claim_folder
from records.progress import settings_record
from records.state import READ, newest_checkpoint
from report import __main__ as report
from studies import offline
from untrusted.plain_text import say

KEY = "RLPA_TEST_SECRET"
FOREIGN = (  # a setting that a checkpoint brings, each of which once worked
    {"simulator_url": "URL", "api_key_env": KEY}, {"judge_url": "URL"}, {"api_key_env": KEY}, {"record": "FILE"},
    {"replay": "FILE"}, {"run_dir": "FOLDER", "overwrite": True}, {"overwrite": True}, {"resume": "FOLDER"},
    {"ckpt": "FOLDER"}, {"critic_ckpt": "FOLDER"}, {"personas": "FILE"}, {"eval_personas": "FILE"}, {"dry_run": "here"},
    {"simulator_model": "rule-user-2"}, {"first_user_message": "Hi"}, {"max_retries": 9}, {"threads": 900},
)  # fmt: skip


@pytest.fixture
def stranger(tmp_path, monkeypatch) -> Path:
    """A copy of the tiny checkpoint, to be changed; what is written by mistake lands beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(KEY, "sk-secret")
    return Path(shutil.copytree(TINY_CHECKPOINT, tmp_path / "stranger"))


@pytest.fixture
def asked():
    """The requests that an endpoint got; its URL is `asked.url`."""

    class Asked(list):
        url = ""

    found = Asked()
    with chat_server(lambda request: found.append(request) or "Hi.") as found.url:
        yield found


def one_line(capsys) -> str:
    """What was told on stderr, which must be one line."""
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


# ------------------------------------------------------------------------------------------------ who may set what


def test_a_checkpoint_may_set_numbers_and_choices_alone():
    """Guards a new setting in an allowed group that names a file, an address or a variable."""
    hints = get_type_hints(Config)
    assert [name for name in training_settings() if hints[name] is str] == []
    tiny = json.loads((TINY_CHECKPOINT / "rlpa.json").read_text())
    assert set(tiny) <= training_settings() and not training_settings() & {*ASKED, *READ, *OWN}


@pytest.mark.parametrize("settings", FOREIGN, ids=lambda settings: "-".join(settings))
def test_a_checkpoint_sets_no_address_key_file_or_folder(stranger, asked, tmp_path, capsys, settings):
    """Guards a downloaded folder whose rlpa.json sends a variable of the environment away, or removes another run."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"format": RUN_FORMAT}))
    meant = {"URL": asked.url, "FILE": str(tmp_path / "file"), "FOLDER": str(run)}
    settings = {name: meant.get(value, value) for name, value in settings.items()}
    (stranger / "rlpa.json").write_text(json.dumps(settings))
    before = fuzz_files.everything(tmp_path)
    for main, argv in (
        (train_rlpa.main, ["--ckpt", str(stranger)]),
        (evaluation.main, [f"x={stranger}", "--quiet"]),
        (offline.main, ["--method", "sft", "--ckpt", str(stranger)]),
        (chat.main, ["--ckpt", str(stranger)]),
    ):
        capsys.readouterr()
        assert main(argv) == 2
        line = one_line(capsys)
        assert str(stranger / "rlpa.json") in line and any(repr(name) in line for name in settings)
    assert asked == [] and fuzz_files.everything(tmp_path) == before


def run_of(folder: Path, **settings) -> Path:
    """Write the settings of a run."""
    folder.mkdir(exist_ok=True)
    config = {"format": RUN_FORMAT, **asdict(Config(ckpt=str(TINY_CHECKPOINT), lr=0.25, max_retries=3)), **settings}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


ASKED_AGAIN = {"simulator_url": "http://a.invalid/v1", "judge_url": "http://b.invalid/v1", "api_key_env": KEY,
               "record": "/tmp/no such tape.jsonl"}  # fmt: skip


@pytest.mark.parametrize("name", [*ASKED_AGAIN, "replay"])
def test_a_run_that_is_resumed_brings_no_address_key_or_file(tmp_path, capsys, name):
    """Guards a run of somebody else whose config.json sends the key away: refused with the command to copy."""
    value = ASKED_AGAIN.get(name, "/tmp/tape")
    run = run_of(tmp_path / "run", **{name: value})
    assert train_rlpa.main(["--resume", str(run), "--num-iterations", "9", "--no-shard"]) == 2
    line = one_line(capsys)
    shown = f"'{value}'" if " " in value else value
    assert f"--resume {run} {flag(name)} {shown} --num-iterations 9 --no-shard" in line
    assert parse_args(["--resume", str(run), flag(name), value], "").lr == 0.25
    assert getattr(parse_args(["--resume", str(run), flag(name), ""], ""), name) == ""  # dropped on purpose


def test_a_query_is_in_no_file_and_no_command(tmp_path):
    """Guards a key in an address: config.json, and the command that goes on with the run, would show it."""
    config = Config(ckpt="x", simulator_url="http://a/v1?key=s3cret,http://b/v1?key=s3cret", judge_url="http://c/v1")
    record = settings_record(config)
    assert record["simulator_url"] == "http://a/v1?…,http://b/v1?…" and record["judge_url"] == "http://c/v1"
    command = resume_command("run", asdict(config))
    assert "s3cret" not in command and "http://c/v1" in command


def test_a_resumed_run_keeps_its_settings_and_takes_endpoint_flags(tmp_path):
    """Guards --resume that refuses another model or key, and settings that belong to one start going on for ever."""
    run = run_of(tmp_path / "run", overwrite=True, run_dir="x", dry_run="here", simulator_url="http://a.invalid")
    given = {"simulator_url": "http://h.invalid", "simulator_model": "m", "judge_url": "http://h.invalid",
             "judge_model": "j", "api_key_env": KEY, "request_timeout": "7.0", "max_retries": "2",
             "max_concurrency": "3", "requests_per_minute": "5.0", "record": "tape"}  # fmt: skip
    argv = [word for name, value in given.items() for word in (flag(name), value)]
    config = parse_args(["--resume", str(run), *argv], "")
    assert {name: str(getattr(config, name)) for name in given} == given | {"record": str(Path("tape").resolve())}
    assert (config.lr, config.run_dir, config.overwrite, config.dry_run) == (0.25, str(run), False, "")
    assert set(given) <= set(RESUMED)


def test_a_collection_sets_what_was_collected_alone(tmp_path, asked, capsys):
    """Guards a folder for --data that brings an address and a key."""
    fuzz_files.sound_folder(tmp_path)
    path = tmp_path / "data" / "collection.json"
    collection = json.loads(path.read_text())
    collection["settings"] |= {"simulator_url": asked.url, "api_key_env": KEY}
    path.write_text(json.dumps(collection))
    assert offline.main(["--method", "sft", "--data", str(tmp_path / "data"), "--run-dir", str(tmp_path / "new")]) == 2
    assert f"{path} sets 'api_key_env'" in one_line(capsys) and asked == []


@pytest.mark.parametrize("main, argv, says", [
    (train_rlpa.main, ["--ckpt", "--personas", ""], '--personas is given ""'),
    (train_rlpa.main, ["--ckpt", "--simulator-url=", "--no-shard"], '--simulator-url is given ""'),
    (train_rlpa.main, ["--resume", ""], '--resume is given ""'),
    (train_rlpa.main, ["--ckpt", ""], '--ckpt is given ""'),
    (evaluation.main, ["x=y", "--out", ""], '--out is given ""'), (chat.main, ["--ckpt", ""], '--ckpt is given ""'),
    (offline.main, ["--ckpt", "--api-key-env", ""], '--api-key-env is given ""'),
    (report.main, ["run", "--out", ""], '--out is given ""'),
    (train_rlpa.main, ["--ckpt", "--num-iteration", "3"], "unrecognized arguments: --num-iteration 3"),
    (evaluation.main, ["x=y", "--turn", "3"], "unrecognized arguments: --turn 3"),
    (chat.main, ["--ckpt", "--temp", "1"], "unrecognized arguments: --temp 1"),
    (offline.main, ["--meth", "sft"], "unrecognized arguments: --meth sft"),
    (report.main, ["run", "--max", "3"], "unrecognized arguments: --max 3"),
    (evaluation.main, ["x=HTTP://h/v1"], "subject 'x=HTTP://h/v1' names no model"),
    (train_rlpa.main, ["--ckpt", "--lr", "nan"], "--lr is nan; it takes a finite number"),
])  # fmt: skip
def test_flags_are_what_they_say(main, argv, says, capsys):
    """Guards a variable that is not set and passes for a choice, and a typo that is another flag's beginning."""
    assert main(argv) == 2 and says in one_line(capsys)
    assert parse_args(["--ckpt", "--first-user-message", ""], "").first_user_message == ""


# -------------------------------------------------------------------------------------------- what is ours to overwrite


@pytest.mark.parametrize("content", [b"ghp_token", b"ghp_token\n", b'{"a": 1}', b"x" * 5_000_000, b"\n"])
def test_a_file_that_is_no_recording_is_left_alone(tmp_path, content):
    """Guards --record FILE, or --replay FILE, with somebody's one-line file: it was taken for a tape cut short."""
    path = tmp_path / "token"
    path.write_bytes(content)
    for recording in (True, False):
        with pytest.raises(ValueError, match="is not a recording"):
            Tape(path, recording)
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", [b"", b'{"endp', b'{"endpoint": "simulator", "requ'])
def test_a_recording_that_was_cut_short_goes_on(tmp_path, content):
    """Guards the other side: a kill in the middle of the first line does not make the file unusable."""
    path = tmp_path / "tape"
    path.write_bytes(content)
    tape = Tape(path, recording=True)
    tape.keep("simulator", {"messages": []}, Call(ChatReply("Hi.")))
    tape.close()
    assert path.read_bytes().startswith(b'{"endpoint": "simulator"') and path.read_bytes().count(b"\n") == 1


def test_a_pipe_is_no_recording(tmp_path):
    """Guards a wait for ever for somebody who writes to it, or reads."""
    os.mkfifo(tmp_path / "pipe")
    for recording in (True, False):
        with pytest.raises(ValueError, match="not a plain file"):
            Tape(tmp_path / "pipe", recording)


@pytest.mark.parametrize("mark", [None, 1, "rlpa", ["rlpa run 1"]])
def test_overwrite_removes_a_marked_run_alone(stranger, capsys, mark):
    """Guards a model folder that has a config.json and checkpoints/ too."""
    (stranger / "checkpoints").mkdir()
    (stranger / "checkpoints" / "weights").write_text("years")
    model = json.loads((stranger / "config.json").read_text()) | ({"format": mark} if mark else {})
    (stranger / "config.json").write_text(json.dumps(model))
    before = fuzz_files.everything(stranger)
    assert train_rlpa.main(["--ckpt", "--overwrite", "--run-dir", str(stranger)]) == 2
    assert "holds no run" in one_line(capsys) and fuzz_files.everything(stranger) == before


def test_overwrite_removes_links_and_not_what_they_lead_to(tmp_path):
    """Guards a run folder whose checkpoints/ is a link to another folder, or a traceback there."""
    run, other = run_of(tmp_path / "run"), tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years")
    (run / "checkpoints").symlink_to(other)
    with claim_folder(str(run), resume=False, overwrite=True):
        assert list(run.iterdir()) == []
    assert (other / "thesis.tex").read_text() == "years"


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints", "tensorboard/events"])
def test_a_run_of_links_is_not_resumed(tmp_path, name):
    """Guards records that are appended to, and cut back in, a file that a stranger's run folder links to."""
    run, target = run_of(tmp_path / "run"), tmp_path / "target"
    target.write_text("years")
    (run / "tensorboard").mkdir()
    (run / name).symlink_to(target)
    with pytest.raises(ValueError, match="is a link"), claim_folder(str(run), resume=True, overwrite=False):
        pass
    assert target.read_text() == "years"


def test_what_is_written_replaces_links(tmp_path, capsys):
    """Guards the target of RUN/report.html, and of the file beside it that a page is written to first."""
    fuzz_files.sound_folder(tmp_path)
    target, page = tmp_path / "target", tmp_path / "run" / "report.html"
    target.write_text("years")
    page.symlink_to(target)
    (page.parent / ".report.html.tmp").symlink_to(target)
    assert report.main([str(tmp_path / "run")]) == 0
    assert target.read_text() == "years" and not page.is_symlink() and "<title>" in page.read_text()
    write_text(page, "new")
    assert page.read_text() == "new" and not list(page.parent.glob(".*.tmp"))


@pytest.mark.parametrize("name", evaluation.OWN_FILES)
def test_an_evaluation_writes_through_no_link(tmp_path, name, capsys):
    """Guards a file elsewhere that a link in --out leads to, even one that is not there yet."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to(tmp_path / "absent")
    assert evaluation.main([f"x={TINY_CHECKPOINT}", "--out", str(tmp_path / "out")]) == 2
    assert f"holds {name} already" in one_line(capsys) and not (tmp_path / "absent").exists()


# ------------------------------------------------------------------------------------------------------ what is printed

EVIL = "a\x1b[2J\x9b31m\u202e\nforged: line\r\x00"


def test_names_and_messages_reach_a_terminal_plain(tmp_path, capsys, monkeypatch):
    """Guards escape sequences and forged lines in errors, warnings, and names of files and folders."""
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    tell("program", EVIL)
    folder = tmp_path / "checkpoints" / "iteration_000001"
    folder.mkdir(parents=True)
    (folder / "SHA256SUMS").write_text("")
    (folder / "a\x1b[2J\nwarning: forged.pt").write_text("")
    with pytest.raises(ValueError, match="none of 1"):
        newest_checkpoint(str(tmp_path))
    run = tmp_path / "run\x1b[2J\nforged"
    (tmp_path / "files").mkdir()
    fuzz_files.sound_folder(tmp_path / "files")
    (tmp_path / "files" / "run").rename(run)
    (run / "episodes.jsonl").unlink()
    assert report.main([str(run)]) == 0
    found = capsys.readouterr()
    lines = (found.out + found.err).splitlines()
    assert len(lines) == 4 and not any(set(line) & set("\x1b\x9b\u202e\r\x00") for line in lines)
    assert not any(line.startswith(("forged", "warning: forged")) for line in lines)


def test_what_is_said_keeps_its_layout(capsys):
    """Guards tables that are put on one line, and escapes in them."""
    say("a  b\n\n  c\x1b[2J")
    assert capsys.readouterr().out == "a  b\n\n  c [2J\n"


# ------------------------------------------------------------------------------------------------- what is damaged


@pytest.mark.parametrize("name", fuzz_files.FILES)
def test_damaged_files_are_used_or_refused_in_one_line(tmp_path, name):
    """Guards tracebacks, hangs, writes elsewhere and connections, whatever stands in a file."""
    outcomes, violations = fuzz_files.fuzz(name, 50, 1, tmp_path)
    assert violations == {} and outcomes["used"] + outcomes["refused"] == 50


def test_the_fuzzer_finds_what_it_looks_for(tmp_path, monkeypatch):
    """Guards a fuzzer that sees nothing: a connection, a change elsewhere and a traceback are each counted."""

    def bad(folder: Path) -> None:
        if not (folder / "rlpa.json").read_bytes().startswith(b"{"):
            Path("notes.txt").write_text("changed")
            with pytest.raises(OSError, match="no connections"):
                fuzz_files.socket.create_connection(("127.0.0.1", 9))
            raise KeyError("x")

    monkeypatch.setitem(fuzz_files.FILES, "rlpa.json", (fuzz_files.mutate_json, bad))
    found = " ".join(fuzz_files.fuzz("rlpa.json", 50, 1, tmp_path)[1])
    assert "connection to" in found and "cwd has changed" in found and "KeyError" in found
