"""Studies: what is run for which row, means over seeds, and what is written."""

import json
import shlex
import shutil
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from command_line import flags
from studies import __main__ as studies
from studies import offline
from studies.__main__ import (
    OFFLINE,
    PROMPTED,
    ROOT,
    RUNS,
    STUDIES,
    command_of,
    over_seeds,
    policy_of,
    run_study,
    train,
    train_all,
)

pytestmark = pytest.mark.slow

TINY = ROOT / "tiny"


def arguments(folder, *more: str):
    where = ["--runs", str(folder / "runs"), "--out", str(folder / "out")]
    return studies.parse_args(["credit", *where, "--seeds", "0", "1", "--num-iterations", "2", *more])


def test_every_row_can_be_made():
    """Guards a study that names a run which nobody trains, and flags that the programs do not know."""
    args = studies.parse_args(["all"])
    known = {studies.BASE, *RUNS, *OFFLINE, *PROMPTED}
    for study in STUDIES.values():
        assert set(study.rows) <= known
    for run in RUNS:
        flags.parse_args(command_of(run, 0, args)[2:], "")
    offline.parse_args(command_of("sft", 0, args)[3:])


def test_a_run_is_made_once_and_a_broken_one_is_named(tmp_path, monkeypatch):
    """Guards hours that are spent twice, a half-made run that counts as made, and a failure that nobody sees."""
    args, calls = arguments(tmp_path), []

    def start(command, **_):
        calls.append(command)
        policy_of("rlpa", 0, args).mkdir(parents=True)
        return SimpleNamespace(returncode=0, poll=lambda: 0)

    monkeypatch.setattr(studies.subprocess, "Popen", start)
    half = studies.folder_of("rlpa", 0, args)
    half.mkdir(parents=True)
    (half / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="rlpa_0 was not begun here"):  # it may be anybody's
        train([("rlpa", 0)], args)
    half.with_suffix(".log").touch()
    train([("rlpa", 0)], args)
    train([("rlpa", 0)], args)
    assert len(calls) == 1 and not (half / "metrics.jsonl").exists()
    with pytest.raises(ValueError, match="rlpa_0 was made with other settings"):
        train([("rlpa", 0)], arguments(tmp_path, "--num-iterations", "3"))
    monkeypatch.undo()
    monkeypatch.setattr(studies, "command_of", lambda *_: [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(ValueError, match=r"rloo, seed 1, ended with exit code 3; see .*rloo_1.log"):
        train([("rloo", 1)], args)


def test_what_ends_a_study_ends_its_runs(tmp_path, monkeypatch):
    """Guards processes that go on for hours after Ctrl-C, and one that does not listen."""
    args, started = arguments(tmp_path, "--jobs", "2"), []
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    monkeypatch.setattr(studies, "command_of", lambda run, *_: [sys.executable, "-c", deaf])
    monkeypatch.setattr(studies, "begin", lambda *job, begin=studies.begin: started.append(begin(*job)) or started[-1])
    monkeypatch.setattr(studies, "stop", lambda processes, stop=studies.stop: stop(processes, patience=0.5))

    def interrupt(_):
        if all(one.folder.with_suffix(".log").read_text() for one in started):  # they do not listen any more
            raise KeyboardInterrupt

    clock = {"monotonic": time.monotonic, "perf_counter": time.perf_counter}
    monkeypatch.setattr(studies, "time", SimpleNamespace(sleep=interrupt, **clock))
    with pytest.raises(KeyboardInterrupt):
        train([("rlpa", 0), ("rlpa", 1), ("rloo", 0)], args)
    assert [one.process.poll() for one in started] == [-9, -9]


def test_a_page_names_the_command_that_makes_it():
    """Guards figures that nobody can get again, because flags are missing from the page."""
    shown = studies.shown_command
    assert shown("kl", studies.parse_args(["kl", "--jobs", "1", "--seeds", "0", "1", "2"])) == "python -m studies kl"
    flags = ["--seeds", "3", "--num-iterations", "2", "--evaluate", "--turns", "4", "--personas", "a file.jsonl"]
    command = shown("kl", studies.parse_args(["kl", "--ckpt", ".", *flags]))
    assert command == f"python -m studies kl --ckpt . {' '.join(flags[:-1])} 'a file.jsonl'"
    assert shown("kl", studies.parse_args(shlex.split(command)[3:])) == command


@pytest.mark.parametrize(("flags", "says"), [
    (["--jobs", "0"], "--jobs 0"), (["--seeds", "1", "-2"], "--seeds -2"), (["--num-iterations", "0"], "--num-iter"),
    (["--ckpt", "nowhere"], "nowhere"), (["--evaluate", "--turns", "0"], "--turns 0"), (["--jobs", "x"], "--jobs"),
    (["--evaluate", "--scenario", "conflict", "--turns", "3"], "--turns 6 or more"),
])  # fmt: skip
def test_bad_flags_are_one_line_before_anything_is_trained(flags, says, capsys, monkeypatch):
    """Guards a flag of the evaluation that is found to be wrong after hours of training."""
    monkeypatch.setattr(studies, "train_all", lambda *_: pytest.fail("trained"))
    assert studies.main(["credit", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("studies: ") and error.count("\n") == 1 and says in error


def test_dpo_learns_from_sft_dialogues(tmp_path, monkeypatch):
    """Guards DPO that starts before its data are there, or on a budget of its own."""
    args, made = arguments(tmp_path), []
    monkeypatch.setattr(studies, "train", lambda jobs, args: made.extend(jobs))
    train_all(["methods"], args)
    assert made[-2:] == [("dpo", 0), ("dpo", 1)]
    assert set(made) == {(row, seed) for row in ("sft", "rlpa", "dpo") for seed in (0, 1)}
    assert command_of("dpo", 1, args)[command_of("dpo", 1, args).index("--data") + 1].endswith("runs/sft_1")


def test_means_over_seeds_leave_out_what_is_absent():
    """Guards a dialogue that one seed dropped and that would count as 0, or drop the persona for all seeds."""
    nan = float("nan")
    measured = [[0.0, 50.0], [nan, nan]], [[100.0, nan], [nan, nan]]
    seeds = [SimpleNamespace(measurements={"AL": np.array(x)}) for x in measured]
    np.testing.assert_array_equal(over_seeds(seeds)["AL"], [[50.0, 50.0], [nan, nan]])


def test_a_study_is_written(tmp_path):
    """Guards table, figure and record, end to end, on untrained policies: rows that are equal differ by nothing."""
    args = arguments(tmp_path, "--evaluate", "--num-personas", "3")
    for row in STUDIES["credit"].rows:
        for seed in args.seeds:
            shutil.copytree(TINY, policy_of(row, seed, args))
    run_study("credit", args)
    text = (args.out / "credit.md").read_text()
    assert "3 held-out personas, 6 turns, seeds 0, 1, 2 iterations of the tiny checkpoint" in text
    assert "`python -m studies credit --seeds 0 1 --num-iterations 2 --evaluate --num-personas 3`" in text
    assert "| AVG − rlpa's |  | 0.000 [0.000, 0.000] |" in text and "| perplexity | 1.4" in text
    record = json.loads((args.out / "credit.json").read_text())
    assert record["rlpa"]["figures"] == record["credit dialogue"]["figures"]
    assert len(set(record["rlpa"]["AVG of seeds"])) == 1
    assert (args.out / "credit.png").stat().st_size > 10_000


def test_runs_of_several_seeds_are_summed_up(tmp_path, capsys):
    """Guards `studies summary`: means and spread of first and last evaluation, a picture, and one line if mistyped."""
    for run, last in (("one", 0.6), ("two", 0.8)):
        (tmp_path / run).mkdir()
        records = [{"kind": "heldout/sampled", "iteration": i, "recall": x} for i, x in enumerate((0.5, 0.1, last))]
        (tmp_path / run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    runs = [str(tmp_path / run) for run in ("one", "two")]
    assert studies.main(["summary", *runs, "--curve", str(tmp_path / "both.png")]) == 0
    assert "| recall of revealed facts | 0.500 ± 0.000 → 0.700 ± 0.141 |" in capsys.readouterr().out
    assert (tmp_path / "both.png").stat().st_size > 10_000
    assert studies.main(["summary", str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("studies: ") and error.count("\n") == 1 and "nowhere" in error
