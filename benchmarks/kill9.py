"""Kill a run with SIGKILL, let it go on until it is complete, and compare it bit for bit with an undisturbed one.

    python -m benchmarks.kill9 --kills 100                       one process, at random moments
    python -m benchmarks.kill9 --kills 100 --ranks 2             a random process of two, or all at once
    python -m benchmarks.kill9 --kills 100 --at steps            before the i-th fsync, rename, truncation or removal
    python -m benchmarks.kill9 --kills 9 --ranks 2 --restarts 3  torchrun --max-restarts 3 restarts the processes itself

Equal must be: metrics.jsonl but for what a clock says, episodes.jsonl, and every tensor of the last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from learners.processes import leave

ROOT = Path(__file__).resolve().parents[1]
STEP = "KILL9_STEP"  # environment variable of a child: rank 0 kills itself before this step; 0: it only counts
STEPS = ("fsync", "replace", "truncate", "mkdir", "rmdir", "unlink")  # functions of os
SMALL = (
    "--num-iterations 3 --rollout-batch-size 4 --minibatch-size 2 --max-turns 2 --num-candidates 2"
    " --eval-dialogues 2 --eval-every 1 --episodes-every 1 --save-every 1 --keep-last 2 --no-tensorboard"
)


def child() -> int:
    """Run the trainer as a process that kills itself before one of its steps on disk."""
    import train_rlpa

    taken, last = 0, int(os.environ[STEP])

    def counted(step):
        def take(*args, **kwargs):
            nonlocal taken
            taken += 1
            if taken == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*args, **kwargs)

        return take

    if os.environ.get("RANK", "0") == "0":
        for name in STEPS:
            setattr(os, name, counted(getattr(os, name)))
    code = train_rlpa.main()
    if not last and os.environ.get("RANK", "0") == "0":
        print(f"{STEP} {taken}", flush=True)
    return code


class Trial:
    """A run in a folder, as one process or as several under torchrun."""

    def __init__(self, folder: Path, ranks: int, restarts: int, settings: list[str]):
        self.folder, self.ranks = folder, ranks
        self.start = ["--ckpt", *settings, "--run-dir", str(folder)]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        self.launcher = [*torchrun, "--max-restarts", str(restarts)] if ranks > 1 else [sys.executable]

    def launch(self, argv: list[str], step: int | None = None) -> subprocess.Popen:
        """Start the trainer, at the lowest priority."""
        program = ["train_rlpa.py"] if step is None else ["-m", "benchmarks.kill9"]
        env = {**os.environ, "OMP_NUM_THREADS": "1"} | ({} if step is None else {STEP: str(step)})
        log = (self.folder.parent / f"{self.folder.name}.log").open("ab")
        command = ["nice", "-n", "19", *self.launcher, *program, *argv]
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True)

    def complete(self) -> bool:
        """Let a killed run go on as its user would: from a checkpoint, or, without one, from the start."""
        begun = any((self.folder / "checkpoints").glob("iteration_*"))
        argv = ["--resume", str(self.folder)] if begun else [*self.start, "--overwrite"]
        code = self.launch(argv).wait()
        already = "iterations are done" in (self.folder.parent / f"{self.folder.name}.log").read_text(encoding="utf-8")
        return code == 0 or already

    def result(self) -> tuple:
        """Return all that must be equal."""
        from safetensors.torch import load_file

        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        metrics = [json.loads(line) for line in lines]
        clock = [{k: v for k, v in r.items() if not k.startswith("seconds") and "per_second" not in k} for r in metrics]
        last = max((self.folder / "checkpoints").glob("iteration_*"))
        tensors = {
            f"{file.relative_to(last)} {name}": tensor.numpy().tobytes()
            for file in sorted(last.rglob("*.safetensors"))
            for name, tensor in load_file(file).items()
        }
        return last.name, clock, (self.folder / "episodes.jsonl").read_bytes(), tensors


def workers(pid: int) -> list[int]:
    """List the trainer's processes below a launcher, without the embedded users, which end with them."""
    found = []
    for process in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split():
        command = Path(f"/proc/{process}/cmdline").read_bytes()
        found += [int(process)] if b"--run-dir" in command or b"--resume" in command else []
    return found


def kill_somebody(process: subprocess.Popen, ranks: int, rng: random.Random, restarts: int) -> str:
    """Send SIGKILL to the one process, or to a random one of several, or to all of them and their launcher."""
    try:
        below = workers(process.pid) if ranks > 1 else []
        victims = [rng.choice(below)] if below and (restarts or rng.random() < 0.5) else [*below, process.pid]
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
    except (ProcessLookupError, FileNotFoundError):
        return "nobody, it had ended"
    return f"{len(victims)} process(es)"


def main() -> int:
    """Run the trials and print how many ended as the undisturbed run did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5, help="runs to kill, each once")
    parser.add_argument("--ranks", type=int, default=1, help="processes of a run")
    parser.add_argument("--at", choices=("random", "steps"), default="random", help="moments, or steps on disk")
    parser.add_argument("--restarts", type=int, default=0, help="torchrun's --max-restarts; only one process is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("settings", nargs="*", default=SMALL.split(), help=f"flags of the trainer, after --; {SMALL}")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    root = Path(tempfile.mkdtemp(prefix="kill9-"))
    whole = Trial(root / "whole", args.ranks, 0, args.settings)
    begin = time.monotonic()
    if whole.launch(whole.start, 0).wait():
        raise SystemExit(f"the undisturbed run failed: see {root}/whole.log")
    seconds, expected = time.monotonic() - begin, whole.result()
    steps = int((root / "whole.log").read_text(encoding="utf-8").rpartition(f"{STEP} ")[2].split()[0])
    print(f"undisturbed: {seconds:.1f} s, {steps} steps on disk, {args.ranks} process(es)", flush=True)
    equal = 0
    for i in range(args.kills):
        trial = Trial(root / f"killed{i}", args.ranks, args.restarts, args.settings)
        if args.at == "steps":
            step = 1 + (steps * i // args.kills if args.kills < steps else i % steps)
            trial.launch(trial.start, step).wait()
            how = f"before step {step}"
        else:
            process, moment = trial.launch(trial.start), rng.uniform(0, seconds)
            time.sleep(moment)
            how = f"{kill_somebody(process, args.ranks, rng, args.restarts)} after {moment:.2f} s"
            code = process.wait()
            how += f", launcher ended with {code}" if args.restarts else ""
        saved = sorted(folder.name for folder in (trial.folder / "checkpoints").glob("iteration_*"))
        temporary = any((trial.folder / "checkpoints").glob(".iteration_*"))
        same = trial.complete() and trial.result() == expected
        equal += same
        where = f"{len(saved)} checkpoints{', one half-written' if temporary else ''}"
        print(f"killed {how}: {where}; {'identical' if same else 'DIFFERENT'}", flush=True)
        if same:
            shutil.rmtree(trial.folder)
    print(f"{equal} of {args.kills} identical ({args.ranks} process(es), {args.at})")
    if equal == args.kills:
        shutil.rmtree(root)
    return int(equal < args.kills)


if __name__ == "__main__":
    leave(child() if STEP in os.environ else main())
