"""Show that two checkouts train to the same bits: python -m benchmarks.same_bits OLD NEW [--out DIR]

Each of 12 runs is made in both folders: gae with credit turn and dialogue, and grpo; KL estimator k1 and exact; one and
two processes. A run is three iterations with an evaluation after each. All metrics must be equal, except times and
those that --without names, and so must the SHA-256 of every file of weights and moments.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

METHODS = {
    "gae-turn": ["--advantage", "gae", "--credit", "turn"],
    "gae-dialogue": ["--advantage", "gae", "--credit", "dialogue"],
    "grpo-turn": ["--advantage", "grpo", "--credit", "turn"],
}
COMMON = (
    "--ckpt --num-iterations 3 --rollout-batch-size 8 --minibatch-size 4 --eval-every 1 --eval-dialogues 4"
    " --save-every 3 --kl-coef 0.02 --profile-weight 1 --response-weight 1 --dtype float32 --num-personas 64"
    " --no-tensorboard --overwrite"
).split()
TIMES = ("seconds", "sampled_tokens_per_second")


def train(checkout: Path, flags: list[str], processes: int, run_dir: Path) -> None:
    """Make one run in a checkout, with one thread per process."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    command = [*torchrun, "train_rlpa.py", *COMMON, *flags, "--run-dir", str(run_dir)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, encoding="utf-8", timeout=900)
    if done.returncode:
        sys.exit(f"{' '.join(command)} in {checkout} ended with {done.returncode}:\n{done.stderr[-3000:]}")


def metrics(run_dir: Path, without: list[str]) -> list[dict]:
    """Return a run's metrics, without times and the names that are left out."""
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [
        {name: value for name, value in record.items() if not name.startswith(TIMES) and name not in without}
        for record in records
    ]


def hashes(run_dir: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of tensors in a run's checkpoints."""
    files = sorted(run_dir.glob("checkpoints/**/*.safetensors"))
    return {str(file.relative_to(run_dir)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def differences(old: Path, new: Path, without: list[str]) -> list[str]:
    """List what differs between two runs."""
    found = []
    for one, other in itertools.zip_longest(metrics(old, without), metrics(new, without), fillvalue={}):
        where = f"{one.get('kind')} of iteration {one.get('iteration')}"
        for name in sorted(one.keys() | other.keys()):
            if one.get(name) != other.get(name):
                found.append(f"{where}: {name} {one.get(name)} -> {other.get(name)}")
    ours, theirs = hashes(old), hashes(new)
    found += [f"SHA-256 of {name} differs" for name in sorted(ours | theirs) if ours.get(name) != theirs.get(name)]
    return found if ours else [*found, "no weights were saved"]


def main() -> int:
    """Make the runs and compare them; returns 1 if any differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/same_bits"), help="folder of the runs")
    parser.add_argument("--without", nargs="*", default=[], metavar="METRIC", help="metrics that are not compared")
    parser.add_argument("--only", default="", help="make only the runs whose name holds this text")
    parser.add_argument("--reuse", action="store_true", help="keep the old checkout's runs that are in --out already")
    args = parser.parse_args()
    different = 0
    for (method, flags), kl, processes in itertools.product(METHODS.items(), ("k1", "exact"), (1, 2)):
        name = f"{method}-{kl}-{processes}"
        if args.only not in name:
            continue
        runs = {side: (args.out / side / name).resolve() for side in ("old", "new")}
        for side, run_dir in runs.items():
            if not (side == "old" and args.reuse and hashes(run_dir)):
                train(getattr(args, side).resolve(), [*flags, "--kl-estimator", kl], processes, run_dir)
        found = differences(runs["old"], runs["new"], args.without)
        different += bool(found)
        shown = found[:10] + [f"... and {len(found) - 10} more"] * (len(found) > 10)
        print(f"{name}: " + ("\n    ".join(["different", *shown]) if found else "the same bits"), flush=True)
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
