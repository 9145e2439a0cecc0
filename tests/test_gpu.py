"""What the first hour on a GPU would hit, found without one: devices, launches, and the scripts that measure."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import fake_gpu, gpu_parts, gpu_train
from config import Config
from learners import processes
from simulator import open_environment

ROOT = Path(__file__).parents[1]


@pytest.fixture
def cards(monkeypatch) -> list:
    """Two GPUs; gives the order of what is done with them and with the processes."""
    done: list = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: done.append(number))
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: done.append("join"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    return done


def test_every_process_takes_its_gpu_before_it_joins(cards, monkeypatch):
    """Guards rank 1 without --shard: Triton launches on the current device, and that was GPU 0's for all."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    with processes.joined_processes(Config(ckpt="none")):
        pass
    assert cards == [1, "join"]


def test_more_processes_than_gpus(cards, monkeypatch):
    """Guards a CUDA traceback where one line says what to do."""
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="process 2 .* torch sees 2: start torchrun with --nproc-per-node 2"):
        with processes.joined_processes(Config(ckpt="none")):
            pass
    assert cards == []


# --------------------------------------------------------------------------------------------------- the fake GPU


@pytest.mark.slow
def test_a_dozen_iterations_on_a_gpu_that_is_not_there():
    """Guards every branch on CUDA: a tensor on the wrong device, an argument that no kernel has, an operator without
    a shape, a kernel that no iteration launches. Every two values of shape and settings meet in one of the cases."""
    pytest.importorskip("triton", reason="there is no Triton for this system")
    import aot

    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.fake_gpu", "--pairwise"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stdout.count("ok    ") == 14, done.stdout + done.stderr[-3000:]
    launched = set(re.findall(r"^  (\S+) \d+$", done.stdout, re.MULTILINE))
    assert launched == {"flex_attention"} | {
        f"{kernel.__module__.removeprefix('kernels.')}.{kernel.__name__}" for kernel in aot.all_kernels()
    }


def launch(x: object, y: object = 3, grid: tuple = (4, 2), row: int = 12, **options) -> None:
    """Launch a kernel of a pointer, the distance of its rows and a constant, on the fake GPU."""
    names = ["x", "X_ROW", "Y"]
    parameters = [SimpleNamespace(name=name, is_constexpr=name != "x") for name in names]
    kernel = SimpleNamespace(__name__="kernel", __module__="kernels.none", arg_names=names, params=parameters)
    fake_gpu.check_launch(kernel, x, row, y, grid=grid, warmup=False, **options)


@pytest.mark.parametrize("why, change", [
    ("is on cpu", lambda x: dict(x=x.cpu())),
    ("is on cuda:1", lambda x: dict(x=x.to("cuda:1"))),
    ("strides", lambda x: dict(x=x.transpose(0, 1))),
    ("strides", lambda x: dict(x=x.as_strided((2, 2, 4), (12, 4, 1)), row=8)),
    ("strides", lambda x: dict(x=x.as_strided((2, 3, 2), (12, 4, 1)))),
    ("got a tensor", lambda x: dict(y=x)),
    ("grid", lambda x: dict(grid=(4, 0))),
    ("grid", lambda x: dict(grid=(4, 65_536))),
    ("WIDTH", lambda x: dict(WIDTH=3)),
    ("given twice", lambda x: dict(Y=3)),
    ("is list", lambda x: dict(x=[1])),
    ("num_warps", lambda x: dict(num_warps=0)),
])  # fmt: skip
def test_a_wrong_launch_is_found(why, change):
    """Guards the guard: each kind of wrong launch fails on the fake GPU."""
    with FakeTensorMode():
        x = torch.empty(2, 3, 4, device="cuda:0")
        launch(x, num_warps=4)
        launch(x.as_strided((2, 2, 4), (12, 4, 1)))  # a part of wider rows
        with pytest.raises(AssertionError, match=why):
            launch(**{"x": x} | change(x))


# ---------------------------------------------------------------------------------------------------- whole iterations


def test_iterations_of_a_random_policy(tmp_path, capsys):
    """Guards what runs first on a card: ids that the tokenizer lacks, and a file that a kill leaves without figures."""
    out, config = tmp_path / "train.json", Config(ckpt="random", num_iterations=2, critic="shared", **gpu_train.SMALL)
    gpu_train.update_json(out, "before", {"iterations": []})
    with open_environment(config) as env:
        state = gpu_train.random_state(gpu_train.SHAPES["small"], config, env)
        assert state.chat.vocab_size < gpu_train.SHAPES["small"].vocab_size
        written = []
        env.timers.seconds.clear = lambda: written.append(out.read_text())  # an iteration begins
        gpu_train.iterate(state, "small", out)
    assert [len(json.loads(text).get("small", {}).get("iterations", [])) for text in written] == [0, 1]
    found = json.loads(out.read_text())
    first, second = found["small"]["iterations"]
    assert found["before"] == {"iterations": []} and first["action_tokens"] == 2 * 2 * 2 * 8
    assert {"seconds_sampling", "seconds_statistics", "seconds_update", "tree_tokens"} <= set(second)
    assert "small  action_tokens 64" in capsys.readouterr().out


@pytest.mark.parametrize("name", gpu_parts.PARTS)
def test_parts_run(name, tmp_path, monkeypatch):
    """Guards a part that has never run anywhere before it runs on a card; each figure is written when it is known."""
    monkeypatch.setattr(gpu_parts, "installed", lambda package: None)  # transformers: seconds of imports
    monkeypatch.setattr(sys, "argv", ["gpu_parts", "--out", str(tmp_path / "parts.json"), name])
    gpu_parts.main()
    found = json.loads((tmp_path / "parts.json").read_text())[name]
    assert len(found) > 1 and found["machine"]["torch"] == torch.__version__


# ------------------------------------------------------------------------------------------------------------- gpu.sh

STUB = """#!/usr/bin/env bash
case "$*" in
    *is_available*) echo "$CUDA" ;;
    *distributions*) echo python ;;
    *) echo "$PYTHONPATH $CUDA_LAUNCH_BLOCKING $*" >> "$CALLS"; echo "output of $*"
       case "$*" in $FAILS) exit 9 ;; $HANGS) exec sleep 60 ;; esac ;;
esac
"""


def run_script(folder: Path, *options: str, **environment: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """Run gpu.sh with a Python that only notes what it is called with; gives the calls."""
    (folder / "python").write_text(STUB)
    (folder / "python").chmod(0o755)
    given = dict(PYTHON=str(folder / "python"), CALLS=str(folder / "calls"), PYTHONPATH="/peers", FAILS="-", HANGS="-")
    command = ["bash", str(ROOT / "benchmarks/gpu.sh"), str(folder / "out"), *options]
    done = subprocess.run(command, env=os.environ | given | {"CUDA": "1"} | environment, capture_output=True, text=True)
    return done, (folder / "calls").read_text().splitlines()


def test_gpu_script_survives_a_failing_step(tmp_path):
    """Guards results that are lost to a failure before them: all steps run, and the last line names those that failed.

    Also guards carried peers, which an own PYTHONPATH would hide, and more files than a lent machine gives back.
    """
    done, calls = run_script(tmp_path, FAILS="*triton_sampler*")
    assert done.returncode == 1, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert last == "FAILED: triton_sampler.py;triton_sampler.py again, launches one by one"
    assert all(call.startswith(".:/peers ") for call in calls)
    order = ["gpu_parts", "train_rlpa.py --ckpt", "0.5B", "kernels torch", "1.5B", "3B", "triton_", "gpu_parts",
             "bench-3B", "bench-0.5B"]  # fmt: skip
    places = [next(i for i, call in enumerate(calls) if word in call) for word in order[:7]]
    assert places == sorted(places) and "bench-0.5B" in calls[-1] and "bench-3B" in calls[-2]
    again = [call for call in calls if "triton_sampler" in call]
    assert len(again) == 2 and " 1 -m pytest" in again[1] and "--tb=short" in again[0]
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["log.txt", "steps.txt", "versions.txt"]  # and train, parts and two of bench: 7 in all
    assert "output of -m benchmarks.gpu_parts" in (tmp_path / "out/log.txt").read_text()
    assert run_script(tmp_path)[0].returncode == 0
    more, calls = run_script(tmp_path, "more")
    assert more.returncode == 0 and "--bench-compile" in calls[-3] and "--shape 7B" in calls[-1]


def test_gpu_script_without_a_gpu(tmp_path):
    """Guards a run on a CPU that passes for a GPU's."""
    done, calls = run_script(tmp_path, CUDA="0")
    assert done.returncode == 3 and "no CUDA device: no figure here is a GPU's" in done.stdout
    assert not any("--shape 3B" in call for call in calls) and sum("--shape small" in call for call in calls) == 4


@pytest.mark.slow
def test_gpu_script_ends_what_hangs(tmp_path):
    """Guards a lent machine's limit: a step that hangs is interrupted, and what comes too late is left out by name."""
    done, calls = run_script(tmp_path, HANGS="*train_rlpa.py*", TOTAL="22")
    assert done.returncode == 1 and "train_rlpa.py --ckpt: exit code 1" in (tmp_path / "out/steps.txt").read_text()
    assert done.stdout.splitlines()[-1].startswith("FAILED: train_rlpa.py --ckpt;iterations --shape 0.5B (left out);")
    assert "bench-0.5B" not in calls[-1]


@pytest.mark.slow
def test_a_timing_is_kept_though_the_result_is_wrong(tmp_path):
    """Guards a measurement of minutes that an assert on its accuracy drops."""
    (tmp_path / "wrong.py").write_text(
        "from benchmarks import cases\n"
        "cases.CPU = (cases.TINY,)\n"
        "make = cases.KERNELS['swiglu'][0]\n"
        "def wrong(*size):\n"
        "    case = make(*size)\n"
        "    right, case.ours = case.ours, lambda **given: {k: 1.1 * x for k, x in right(**given).items()}\n"
        "    return case\n"
        "cases.KERNELS['swiglu'] = wrong, ('forward',)\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "wrong", "-p", "no:cacheprovider", "tests/test_bench_kernels.py"]
    command += ["-k", "bench and swiglu and ours", "--bench-json", str(tmp_path / "bench.json")]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:."}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "y is" in done.stdout and "kernel benchmarks" in done.stdout, done.stdout
    (row,) = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert row["seconds"] > 0 and row["error"] > 2
