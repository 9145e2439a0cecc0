"""The records in a run's folder: metrics.jsonl, TensorBoard events, episodes.jsonl, curve.png, and what the end prints.

`claim_folder` keeps other runs out of the folder. `RunLog` writes the records, and cuts them back to the point from
which a resumed run goes on.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from command_line.exits import decorative
from config import RUN_FORMAT
from dialogue import Dialogue
from records.checkpoints import fsync, unborn
from records.plots import plot_curve
from untrusted.files import read_json
from untrusted.plain_text import clean_text, say, warn

RECORDS = ("metrics.jsonl", "episodes.jsonl")
FINISHED = "finished"  # an empty file, written last of all: a run without it was stopped or killed
RUN_FILES = ("checkpoints", "tensorboard", *RECORDS, "curve.png", FINISHED, "config.json")


@contextmanager
def claim_folder(path: str, resume: bool, overwrite: bool) -> Iterator[None]:
    """Make a run folder and keep every other run out of it while the block runs; if it stays empty, remove it again.

    Raises ValueError if another process is writing there; with `resume`, if a file of the run is a link; else if the
    folder holds anything; with `overwrite` a run that it holds is removed.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--run-dir {folder} cannot be made a folder: {error.strerror}") from None
    lock = os.open(folder, os.O_RDONLY)  # the kernel opens the lock when this process ends, killed or not
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # the folder is another run's, which may not have written anything yet: it stays
        os.close(lock)
        raise ValueError(f"--run-dir {folder} is in use: another process is writing there") from None
    try:
        if resume:
            refuse_links(folder)
        else:
            clear_folder(folder, overwrite)
        yield
    finally:
        os.close(lock)
        with suppress(OSError):  # not empty
            folder.rmdir()


def clear_folder(folder: Path, overwrite: bool) -> None:
    """Remove a run from its folder, if that is wanted; ValueError if not, or if the folder holds something else."""
    unborn(folder / "config.json").unlink(missing_ok=True)  # killed before its first file had its name
    if not any(folder.iterdir()):
        return
    if not is_run(folder):
        raise ValueError(f"--run-dir {folder} is not empty, and holds no run (its config.json lacks the mark"
                         f" {RUN_FORMAT!r}); choose another folder")  # fmt: skip
    begun = any((folder / name).exists() for name in ("checkpoints", *RECORDS))  # else it was refused before it did
    if begun and not overwrite:
        raise ValueError(
            f"--run-dir {folder} holds a run already; --resume or --overwrite it, or choose another folder"
        )
    for name in RUN_FILES:  # config.json last: killed in between, this is still a run
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            shutil.rmtree(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)


def is_run(folder: Path) -> bool:
    """Say whether `start_log` has marked a folder as a run: a model's has a config.json too."""
    try:
        return read_json(folder / "config.json").get("format") == RUN_FORMAT
    except ValueError:
        return False


def refuse_links(folder: Path) -> None:
    """Raise ValueError if one of a run's files is a link: what is appended or cut back could be anybody's file."""
    for path in (*(folder / name for name in RUN_FILES), *(folder / "tensorboard").glob("*")):
        if path.is_symlink():
            raise ValueError(f"{path} is a link; a run writes to files of its own only: put the file itself there")


def log_files(folder: Path) -> list[Path]:
    """List the files that a run appends to."""
    files = (*(folder / name for name in RECORDS), *sorted((folder / "tensorboard").glob("*")))
    return [file for file in files if file.is_file()]


def cut_back(folder: Path, position: dict[str, int]) -> None:
    """Cut a run's records back to what `RunLog.position` returned, and to whole lines; what is missing is a warning."""
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in log_files(folder)}
    for name, size in position.items():
        if sizes.get(name, 0) < size:
            warn(f"{folder / name} has lost records: {sizes.get(name, 0):,} of {size:,} bytes")
    for name, size in sizes.items():
        if name in position:
            os.truncate(folder / name, min(size, position[name]))
            if name in RECORDS:
                cut_half_line(folder / name)
        else:
            (folder / name).unlink()


def cut_half_line(path: Path) -> None:
    """Cut a file back to its last whole line, with a warning: the next record would be glued to half a one."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - 1))
        if file.read() in (b"", b"\n"):
            return
    half = size - (path.read_bytes().rfind(b"\n") + 1)
    warn(f"{path} ends within a line; its last {half:,} bytes are cut off")
    os.truncate(path, size - half)


class RunLog:
    """Rank 0's records of a run: metrics.jsonl, TensorBoard events, episodes.jsonl and the learning curve."""

    def __init__(self, folder: str, position: dict[str, int], tensorboard: bool):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.writer = None
        cut_back(self.folder, position)
        if tensorboard:
            with decorative("TensorBoard (--no-tensorboard)"):
                from torch.utils.tensorboard import SummaryWriter  # slow to import, and optional

                self.writer = SummaryWriter(str(self.folder / "tensorboard"))

    def show(self, action: Callable[[Any], None]) -> None:
        """Call `action` with TensorBoard's writer, if there is one and as long as it works."""
        if writer := self.writer:
            self.writer = None
            with decorative("TensorBoard (--no-tensorboard)"):
                action(writer)
                self.writer = writer

    def position(self) -> dict[str, int]:
        """Return the size in bytes of each file of records, once all of them are on disk."""
        self.show(lambda writer: writer.flush())
        for file in log_files(self.folder):
            fsync(file)
        return {str(file.relative_to(self.folder)): file.stat().st_size for file in log_files(self.folder)}

    def metrics(self, iteration: int, kind: str, values: dict[str, float]) -> None:
        """Append one record of a kind ("train", "heldout/greedy", …); numbers that are not finite are left out."""
        finite = {k: rounded(float(v)) for k, v in values.items() if math.isfinite(v)}
        self.append("metrics.jsonl", [{"iteration": iteration, "kind": kind, **finite}])
        self.show(lambda writer: [writer.add_scalar(f"{kind}/{name}", x, iteration) for name, x in values.items()])

    def episodes(self, iteration: int, kind: str, dialogues: list[dict]) -> None:
        """Append whole dialogues: text, profile, each reward part, stop and failure reasons."""
        self.append("episodes.jsonl", [{"iteration": iteration, "kind": kind, **dialogue} for dialogue in dialogues])

    def append(self, name: str, records: list[dict]) -> None:
        """Append records to one of the files; ValueError if they cannot be written: they are the run's result."""
        try:
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
        except OSError as error:
            raise ValueError(f"{self.folder / name} cannot be written: {error.strerror}; --resume goes on") from None

    def close(self) -> None:
        """Close the event file."""
        self.show(lambda writer: writer.close())

    def draw(self) -> None:
        """Draw the learning curve; then, last of all, mark the run as finished."""
        with decorative(str(self.folder / "curve.png")):
            plot_curve(self.folder / "curve.png", self.folder)
        (self.folder / FINISHED).touch()


def rounded(value: float) -> float:
    """Round to 6 decimals, and what is small to 6 digits: learning rates are.

    >>> rounded(12345.67890123), rounded(5.123456789e-7)
    (12345.678901, 5.12346e-07)
    """
    return round(value, 6) if abs(value) >= 1e-3 else float(f"{value:.6g}")


def episode_record(dialogue: Dialogue) -> dict:
    """Return a dialogue as plain data for episodes.jsonl, without the prompts' ids, which only repeat the history."""
    record = asdict(dialogue)
    for turn in record["turns"]:
        turn["prompt_tokens"] = len(turn.pop("prompt_ids"))
        for candidate in turn["candidates"]:
            candidate["mean_logprob"] = round(sum(candidate.pop("logprobs")) / max(1, len(candidate["token_ids"])), 4)
            candidate["tokens"] = len(candidate.pop("token_ids"))
    return record


def show_transcripts(before: dict[str, list[Dialogue]], after: dict[str, list[Dialogue]]) -> None:
    """Print one held-out dialogue as the policy led it before and after training."""
    for when, played in (("before", before), ("after", after)):
        for dialogue in played.get("heldout/sampled", [])[:1]:
            say("\n" + "\n".join(transcript(dialogue, when)))
    say("")


def transcript(dialogue: Dialogue, when: str) -> list[str]:
    """Write a dialogue in lines, three per turn; nothing that was said begins a line or acts on a terminal."""
    facts = clean_text("; ".join(dialogue.persona_facts))
    lines = [f"===== {when}: persona {clean_text(dialogue.persona_id)} ({facts})"]
    for turn in dialogue.turns:
        scores = ", ".join(f"{name} {value:.2f}" for name, value in turn.winner.parts.items())
        lines.append(f"  user      {clean_text(turn.user_text)}")
        lines.append(f"  profile   {clean_text('; '.join(turn.winner.profile)) or '-'}   [{scores}]")
        lines.append(f"  assistant {clean_text(turn.winner.response)}")
    return lines
