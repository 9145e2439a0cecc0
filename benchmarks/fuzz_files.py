"""Damaged files of every kind that is read: each is used, or refused in one line, and nothing else happens.

    python -m benchmarks.fuzz_files --number 2000

The damages are those of benchmarks/mutate.py. Counted as violations (exit code 1): any error but a ValueError of one
short line, more than a minute for one file, a change outside the folder that holds the file, and any connection.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import io
import json
import os
import random
import shutil
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from unittest import mock

from benchmarks.mutate import cut, flip, mutate_json, mutate_lines
from command_line.flags import ASKED, TINY_CHECKPOINT, parse_args
from config import RUN_FORMAT, Config, flag
from dialogue import ChatTokenizer, Dialogue, open_turn, render_turn
from endpoints.tape import Tape
from endpoints.wire import Call, ChatError, ChatReply
from learners.weights import load_policy
from records import checkpoints
from records.log import episode_record
from records.perplexity import read_texts, text_scores
from records.state import read_progress
from report import __main__ as report
from rewards import read_candidate
from studies import offline, summary
from untrusted.plain_text import clean_text
from worlds.personas import load_personas

SECONDS = 60  # for one file: what takes longer hangs
ELSEWHERE = "http://elsewhere.invalid/v1"  # an address that only a file names
LONGEST = 1500  # characters of a refusal
Mutate = Callable[[bytes, random.Random], bytes]


@cache
def loaded() -> tuple:
    """Return the tiny policy and its tokenizer."""
    return load_policy(TINY_CHECKPOINT), ChatTokenizer.from_folder(TINY_CHECKPOINT)


def dialogue() -> Dialogue:
    """Make a dialogue of two turns of two candidates."""
    made, chat = Dialogue(0, "one", ("Age: 34", "Location: Oslo")), loaded()[1]
    for said in ("Hello", "I am 34."):
        turn = open_turn(made, said, chat)
        for lines in (["Age: 34"], []):
            ids = [*chat.encode(render_turn(lines, "I see.")), chat.im_end]
            turn.candidates.append(read_candidate(ids, [-0.5] * len(ids), "stop", made, chat))
        turn.candidates[0].reward = 1.0
    return made


def sound_folder(folder: Path) -> None:
    """Write a sound file of each kind: a checkpoint, a run, a collection, an evaluation, a tape, personas, texts."""
    for name in ("config.json", "tokenizer.json", "model.safetensors", "rlpa.json"):
        shutil.copy(TINY_CHECKPOINT / name, folder)
    for name in ("run", "data", "evaluation", "checkpoints/iteration_000001"):
        (folder / name).mkdir(parents=True)

    def write(name: str, *records: object) -> None:
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")

    foreign = Config(ckpt=str(folder), simulator_url=ELSEWHERE, api_key_env="HOME", record=str(folder / "tape.jsonl"))
    write("run/config.json", {"format": RUN_FORMAT, **asdict(foreign)})
    write("run/metrics.jsonl", *({"iteration": i, "kind": "heldout/greedy", "recall": 0.5} for i in range(3)))
    write("run/episodes.jsonl", {"iteration": 1, "kind": "train", **episode_record(dialogue())})
    write("data/dialogues.jsonl", asdict(dialogue()), asdict(replace(dialogue(), index=1)))
    settings = {name: getattr(Config, name) for name in offline.COLLECTED} | {"ckpt": str(folder)}
    write("data/collection.json", {"settings": settings, "budget": offline.budget_of([dialogue()]) | {"seconds": 1.0}})
    estimate = {"value": 1.0, "low": 0.5, "high": None}
    figures = {"personas": 1, "figures": {"AVG": estimate}, "turns": {"AL": [estimate]}, "counts": {"dropped": 1}}
    write("evaluation/results.json", {"settings": {"turns": 2}, "subjects": {"a": figures}, "differences": {}})
    progress = {"iteration": 1, "updates": 2, "evaluated": True, "best": {"x": 0.5}, "logs": {"metrics.jsonl": 9}}
    write("checkpoints/iteration_000001/trainer.json", progress)
    trainer = folder / "checkpoints/iteration_000001/trainer.json"
    (trainer.parent / checkpoints.SUMS).write_text(f"{checkpoints.sha256(trainer)}  trainer.json\n", encoding="utf-8")
    tape, request = Tape(folder / "tape.jsonl", recording=True), {"model": "m", "messages": [{"content": "Hi"}]}
    for seed, reply in enumerate((ChatReply("I am 34."), ChatError("timeout", "nothing came"))):
        tape.keep("simulator", request | {"seed": seed}, Call(reply, ("http_5xx",)))
    tape.close()
    write("personas.jsonl", {"facts": ["Age: 34"]}, {"id": "b", "slots": {"Interests": ["chess"]}}, "He is a baker.")
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    write("texts.jsonl", {"text": "Two words."}, {"messages": chat})


def use_run(folder: Path) -> None:
    """Read a run's settings as --resume does; RuntimeError if one that the command line alone decides is the run's."""
    given = {"simulator_url": "http://here.invalid/v1", "judge_url": "", "api_key_env": "", "record": "", "replay": ""}
    argv = [word for name, value in given.items() for word in (flag(name), value)]
    config = parse_args(["--resume", str(folder / "run"), *argv], "")
    if {name: getattr(config, name) for name in ASKED} != given or config.run_dir != str(folder / "run"):
        raise RuntimeError(f"the run's own settings have come through: {config}")


def use_collection(folder: Path) -> None:
    """Read a collection as studies.offline does, and pack what is learned from it."""
    config = offline.parse_args(["--method", "sft", "--data", str(folder / "data"), "--run-dir", str(folder / "new")])
    dialogues = offline.load_dialogues(config.data)
    offline.check_tokens(dialogues, config, loaded()[0].config)
    for one in dialogues:
        offline.pack_teachers(one, config)


def use_checkpoint(folder: Path) -> None:
    """Read a checkpoint's progress, if it is whole."""
    if reason := checkpoints.damage(folder / "checkpoints" / "iteration_000001"):
        raise ValueError(reason)
    read_progress(folder / "checkpoints" / "iteration_000001")


def use_tape(folder: Path) -> None:
    """Replay a tape, then go on recording it."""
    for recording in (False, True):
        Tape(folder / "tape.jsonl", recording).close()


def use_metrics(folder: Path) -> None:
    """Make a run's page, and the table of docs/results/learning.md."""
    reported(folder / "run")
    summary.table([summary.read_records(folder / "run")])


def raw_bytes(raw: bytes, rng: random.Random) -> bytes:
    """Damage what is no JSON."""
    return rng.choice((cut, flip))(raw, rng)


def reported(folder: Path) -> object:
    """Make the page of a run."""
    return report.render(report.collect([folder], 10))


FILES: dict[str, tuple[Mutate, Callable[[Path], object]]] = {  # file → how it is damaged, how it is used
    "rlpa.json": (mutate_json, lambda folder: parse_args(["--ckpt", str(folder)], "")),
    "run/config.json": (mutate_json, use_run),
    "checkpoints/iteration_000001/trainer.json": (
        mutate_json, lambda folder: read_progress(folder / "checkpoints/iteration_000001")),
    "checkpoints/iteration_000001/SHA256SUMS": (raw_bytes, use_checkpoint),
    "data/collection.json": (mutate_json, use_collection),
    "data/dialogues.jsonl": (mutate_lines, use_collection),
    "tape.jsonl": (mutate_lines, use_tape),
    "personas.jsonl": (mutate_lines, lambda folder: load_personas(folder / "personas.jsonl")),
    "run/metrics.jsonl": (mutate_lines, use_metrics),
    "run/episodes.jsonl": (mutate_lines, lambda folder: reported(folder / "run")),
    "evaluation/results.json": (mutate_json, lambda folder: reported(folder / "evaluation")),
    "texts.jsonl": (mutate_lines, lambda folder: text_scores(*loaded(), read_texts(folder / "texts.jsonl"))),
}  # fmt: skip


def outcome(use: Callable[[Path], object], folder: Path) -> str:
    """Use a file, and say what became of it."""
    faulthandler.dump_traceback_later(SECONDS, exit=True, file=sys.__stderr__)
    try:
        with redirect_stderr(io.StringIO()):  # warnings
            use(folder)
        return "used"
    except ValueError as error:
        line = clean_text(str(error))  # as it is printed
        return "refused" if 0 < len(line) <= LONGEST else f"no short line: {line[:200]!r}"
    except Exception:
        return traceback.format_exc(limit=-1)
    finally:
        faulthandler.cancel_dump_traceback_later()


def everything(root: Path) -> dict[str, str]:
    """Return a hash of each file below a folder."""
    return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(root.rglob("*")) if f.is_file()}


@contextmanager
def watched(root: Path) -> Iterator[Counter]:
    """Count, while the block runs, connections that are tried and changes in home, canary and working folder."""
    found: Counter = Counter()
    places = [root / "home", root / "canary", root / "cwd"]
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
        (place / "notes.txt").write_text("years", encoding="utf-8")
    before, cwd = {place: everything(place) for place in places}, os.getcwd()

    def connect(_: socket.socket, address: object) -> None:
        found[f"connection to {address}"] += 1
        raise OSError("no connections here")

    os.chdir(root / "cwd")
    try:
        with mock.patch.object(socket.socket, "connect", connect), mock.patch.dict(os.environ, HOME=str(places[0])):
            yield found
    finally:
        os.chdir(cwd)
    found.update(f"{place.name} has changed" for place in places if everything(place) != before[place])


def fuzz(name: str, number: int, seed: int, root: Path) -> tuple[Counter, Counter]:
    """Damage one of the FILES so many times; returns how often what became of it, and violations."""
    folder, rng = Path(tempfile.mkdtemp(dir=root)), random.Random(f"{seed} {name}")
    sound_folder(folder)
    mutate, use = FILES[name]
    sound, outcomes, seconds = (folder / name).read_bytes(), Counter(), 0.0
    if (first := outcome(use, folder)) != "used":
        raise RuntimeError(f"the sound {name} is not used: {first}")
    with watched(root) as violations:
        for _ in range(number):
            (folder / name).write_bytes(mutate(sound, rng))
            start = time.perf_counter()
            outcomes[outcome(use, folder)] += 1
            seconds = max(seconds, time.perf_counter() - start)
    violations.update({what: n for what, n in outcomes.items() if what not in ("used", "refused")})
    return outcomes + Counter({"slowest, ms": round(1000 * seconds)}), violations


def main() -> int:
    """Print what became of the files; 1 if anything happened that should not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=2000, help="of damaged files of each kind [2000]")
    parser.add_argument("--seed", type=int, default=0, help="of the damages [0]")
    parser.add_argument("--only", default="", help="files whose name holds this text")
    args = parser.parse_args()
    wrong: Counter = Counter()
    with tempfile.TemporaryDirectory(prefix="fuzz-files-") as root:
        for name in (name for name in FILES if args.only in name):
            outcomes, violations = fuzz(name, args.number, args.seed, Path(root))
            kept = {what: outcomes[what] for what in ("used", "refused", "slowest, ms")}
            print(f"{name:42} {kept}, violations {violations.total()}", flush=True)
            wrong += violations
    for what, n in wrong.most_common(20):
        print(f"{n} x {what}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
