"""Watch a long run from outside: `python -m benchmarks.hygiene 500` prints what its process holds every 50 iterations.

Memory (RSS less what is mapped from files), threads, open files and sockets of the trainer and of its embedded user;
the largest of each over 50 iterations, seen 20 times a second. The first 100 iterations warm up. Exit code 1 if the
last window holds more than the most of those before it: 2 % of memory, or one thread, file or socket.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from command_line.exits import lasting_output

ROOT = Path(__file__).resolve().parents[1]
WINDOW = 50  # iterations
SMALL = (
    "--rollout-batch-size 4 --minibatch-size 2 --max-turns 2 --num-candidates 2 --eval-dialogues 4 --eval-every 50"
    " --episodes-every 10 --save-every 25 --keep-last 2"
)
HELD = ("memory", "threads", "files", "sockets")
Holding = dict[str, int]


def holding(pid: int) -> Holding:
    """Return what a process holds now: bytes of memory, threads, open files, and those of them that are sockets."""
    process = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (process / "status").read_text(encoding="utf-8").splitlines())
    files = []
    for entry in os.listdir(process / "fd"):
        with suppress(FileNotFoundError):  # closed since it was listed
            files.append(os.readlink(process / "fd" / entry))
    sockets = sum(file.startswith("socket:") for file in files)
    held = 1024 * int(status["RssAnon"].split()[0]), int(status["Threads"]), len(files), sockets
    return dict(zip(HELD, held, strict=True))


def children(pid: int) -> list[int]:
    """List the processes that a process has started, in all of its threads."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            found += map(int, (task / "children").read_text(encoding="utf-8").split())
    return found


def iterations(metrics: Path) -> int:
    """Return the iterations that a run has written down."""
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    return sum('"kind": "train"' in line for line in lines)


def most(a: Holding, b: Holding) -> Holding:
    """Return the larger of each."""
    return {name: max(a.get(name, 0), b[name]) for name in HELD}


def watch(process: subprocess.Popen, metrics: Path) -> list[dict[str, Holding]]:
    """Return, per window of iterations, the most that trainer and user have held."""
    windows: list[dict[str, Holding]] = []
    while process.poll() is None:
        number = iterations(metrics) // WINDOW
        windows += [{} for _ in range(number + 1 - len(windows))]
        for name, pids in (("trainer", [process.pid]), ("user", children(process.pid))):
            for pid in pids:
                with suppress(FileNotFoundError, ProcessLookupError, KeyError):  # it has just ended
                    windows[number][name] = most(windows[number].get(name, {}), holding(pid))
        time.sleep(0.05)
    return windows


def grown(early: Holding, late: Holding) -> list[str]:
    """Name what has grown."""
    return [name for name in HELD if late[name] > early[name] * (1.02 if name == "memory" else 1)]


@lasting_output()
def main() -> int:
    """Run, print a table, and say what has grown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("iterations", type=int, nargs="?", default=500, help="of the run [500]")
    num_iterations = parser.parse_args().iterations
    with tempfile.TemporaryDirectory(prefix="hygiene-") as root:
        command = [sys.executable, "train_rlpa.py", "--ckpt", "--run-dir", f"{root}/run"]
        command += ["--num-iterations", str(num_iterations), *SMALL.split()]
        with open(f"{root}/log", "w+", encoding="utf-8") as log:
            start = time.monotonic()
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=env)
            windows = watch(process, Path(root) / "run" / "metrics.jsonl")
            if process.returncode:
                log.seek(0)
                raise SystemExit(f"the run ended with {process.returncode}:\n{log.read()[-3000:]}")
        done = iterations(Path(root) / "run" / "metrics.jsonl")
    print(f"{done} iterations in {time.monotonic() - start:.0f} s: {' '.join(command[1:4])} … {SMALL}")
    print(f"{'iterations':>12} " + " ".join(f"{who + ' ' + name:>15}" for who in windows[0] for name in HELD))
    windows = windows[: done // WINDOW]  # what follows the last iteration draws and shows
    for i, window in enumerate(windows):
        held = [(name, window[who][name]) for who in window for name in HELD]
        cells = [f"{n / 2**20:>11.1f} MiB" if name == "memory" else f"{n:>15}" for name, n in held]
        print(f"{i * WINDOW:>5} to {(i + 1) * WINDOW:>3} " + " ".join(cells))
    growth = {who: grown(most(windows[0][who], held), windows[-1][who]) for who, held in windows[1].items()}
    print(f"grown since iteration {2 * WINDOW}: {json.dumps(growth)}")
    return int(any(growth.values()))


if __name__ == "__main__":
    sys.exit(main())
