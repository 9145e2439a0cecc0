"""Time two checkouts against each other, run by run in turn: python -m benchmarks.pairs OLD NEW [--pairs 7]

Each run trains the tiny checkpoint for a few iterations of the same dialogues; the first iteration warms up. Decoding
is timed alone, too: a process per checkout, which take turns. Shown are the ratios NEW ÷ OLD: the mean of the pairs and
its 95 % interval (Student's t on the logarithms). Let nothing else run on the machine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from command_line.exits import lasting_output

FLAGS = (
    "--ckpt --rollout-batch-size 16 --minibatch-size 4 --eval-every 0 --eval-dialogues 1 --save-every 0"
    " --num-personas 64 --no-tensorboard --overwrite"
).split()
PARTS = ("seconds", "seconds_sampling", "seconds_update")
DECODE_PAIRS = 80
WORKER = """
import sys, time, torch
from sampler import generate
try:
    from learners.weights import load_policy
except ImportError:  # before the checkpoint's half of model.py moved
    from model import load_policy
torch.set_num_threads(1)
policy = load_policy("tiny").requires_grad_(False)
prompts = [[(7 * i + j) % 1000 + 5 for j in range(100)] for i in range(32)]
def decode():  # 128 candidates of 64 tokens
    start = time.perf_counter()
    generate(policy, prompts, n=4, max_new_tokens=64, stop_ids=[], seeds=list(range(128)))
    return time.perf_counter() - start
[decode() for _ in range(4)]
for _ in sys.stdin:
    print(decode(), flush=True)
"""
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201)  # by degrees of freedom, from 1


def run(checkout: Path, iterations: int, run_dir: str) -> dict[str, float]:
    """Train in a checkout and return the seconds of each part, summed over all iterations but the first."""
    command = [sys.executable, "train_rlpa.py", *FLAGS, "--num-iterations", str(iterations + 1), "--run-dir", run_dir]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=checkout, env=environment, check=True, capture_output=True, timeout=900)
    records = map(json.loads, (Path(run_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    timed = [record for record in records if record["kind"] == "train" and record["iteration"] > 1]
    return {part: sum(record[part] for record in timed) for part in PARTS}


def decode_pairs(checkouts: list[Path]) -> list[list[float]]:
    """Return the seconds of each checkout's decoding, the two in turn."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "encoding": "utf-8"}
    workers = [subprocess.Popen([sys.executable, "-c", WORKER], cwd=c, env=environment, **pipes) for c in checkouts]
    seconds: list[list[float]] = [[], []]
    for pair in range(DECODE_PAIRS):
        for side in (0, 1) if pair % 2 else (1, 0):
            print(file=workers[side].stdin, flush=True)
            seconds[side].append(float(workers[side].stdout.readline()))
    for worker in workers:
        worker.communicate()
    return seconds


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Return the geometric mean of ratios and the ends of its 95 % interval.

    >>> [round(x, 3) for x in interval([1.0, 1.0, 1.1])]
    [1.032, 0.9, 1.184]
    """
    logs = [math.log(ratio) for ratio in ratios]
    t = T95[len(logs) - 2] if len(logs) < len(T95) + 2 else 1.99
    mean, half = statistics.fmean(logs), t * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


@lasting_output()
def main() -> None:
    """Run the pairs, the order swapped in every other one, and print a row per part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--pairs", type=int, default=7, choices=range(2, len(T95) + 2))
    parser.add_argument("--iterations", type=int, default=3, help="timed iterations of a run")
    args = parser.parse_args()
    ratios: dict[str, list[float]] = {part: [] for part in PARTS}
    seconds: dict[str, list[float]] = {part: [] for part in PARTS}
    with tempfile.TemporaryDirectory() as folder:
        for pair in range(args.pairs):
            sides = [(args.old, "old"), (args.new, "new")][:: 1 if pair % 2 else -1]
            found = {side: run(checkout.resolve(), args.iterations, f"{folder}/{side}") for checkout, side in sides}
            for part in PARTS:
                ratios[part].append(found["new"][part] / found["old"][part])
                seconds[part].append(found["old"][part] / args.iterations)
    seconds["decode"], news = decode_pairs([args.old.resolve(), args.new.resolve()])
    ratios["decode"] = [new / old for old, new in zip(seconds["decode"], news, strict=True)]
    print(f"{args.pairs} pairs, {platform.processor() or platform.machine()}, {os.cpu_count()} cores, one process")
    for part in (*PARTS, "decode"):
        mean, low, high = interval(ratios[part])
        print(f"{part:18} old {statistics.median(seconds[part]):6.3f} s   new / old {mean:.3f} [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main()
