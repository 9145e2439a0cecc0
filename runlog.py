"""What a run is judged by and leaves behind: metrics of dialogues, and the records in the run folder.

`tally` counts what happened in dialogues, `rates` turns the counts of all ranks into the metrics of the README's
glossary.
`claim_folder` keeps other runs out of the run folder; `RunLog` writes metrics.jsonl, TensorBoard events and
episodes.jsonl there, cuts them back to where a resumed run goes on, and draws the learning curve.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import rewards
from checkpoints import fsync, unborn
from dialogue import Candidate, Dialogue
from endpoints.plain_text import clean_text
from worlds.first import unseen_values
from worlds.ledger import asked_slots, content_words, disclosed, mentions, split_fact, words

# ---------------------------------------------------------------------------------------------------------------------
# Metrics of dialogues

# Guards against reward hacking: means over replies, then figures of all replies together. README, "Metrics".
PROFILE_GUARDS = ("unsupported_lines", "duplicate_lines", "lines_recited")  # a reply without a profile has none of them
GUARDS = ("reply_words", "reply_repeated", "question_repeated", "parroting", *PROFILE_GUARDS)
DISTINCT = (1, 2)  # lengths of the word n-grams of distinct-n


def tally(dialogues: list[Dialogue]) -> Counter:
    """Sum up what happened in dialogues, over all candidates; `rates` turns the sums of all ranks into metrics."""
    sums: Counter = Counter(dialogues=len(dialogues))
    for dialogue in dialogues:
        if dialogue.dropped is not None:
            sums["dropped"] += 1
            sums[f"dropped_{dialogue.dropped.partition(':')[0]}"] += 1
            continue
        for t, turn in enumerate(dialogue.turns):
            before = [earlier.winner.response for earlier in dialogue.turns[:t]]
            unseen = unseen_facts(dialogue, t)
            for candidate in turn.candidates:
                if candidate.judged:
                    sums.update(candidate_sums(candidate, t))
                    sums.update(guards(candidate, before, turn.user_text))
                    sums.update(ngram_counts(candidate.response))
                    sums.update(unseen_sums(candidate, unseen))
    return sums


def candidate_sums(candidate: Candidate, t: int) -> dict[str, float]:
    """Sum up one candidate of turn `t`, counted from 0."""
    ledger = candidate.ledger
    sums = {
        "candidates": 1,
        "valid": candidate.failure is None,
        "tokens": len(candidate.token_ids),
        "profile_reward": candidate.profile_reward,
        "response_reward": candidate.response_reward,
        "f1": ledger["f1"],
        "lines": ledger["n_lines"],
        "disclosed": ledger["n_disclosed"],
        "recalled": ledger["n_recalled"],
        f"evidence_f1_turn{t + 1}": ledger["evidence_f1"],
        f"max_f1_turn{t + 1}": ledger["max_f1"],
    }
    if candidate.failure:
        sums[f"failure_{candidate.failure}"] = 1
    return sums | {f"verdict_{name}": verdict for name, verdict in candidate.verdicts.items()}


def guards(candidate: Candidate, before: Sequence[str], user_text: str) -> dict[str, float]:
    """Measure in one reply what a policy may do to be paid for nothing; names as in GUARDS.

    Args:
        candidate: the reply, parsed and held against the ledger.
        before: the replies that the dialogue had already heard.
        user_text: the message that it answers.
    """
    response, asked_before = candidate.response, {slot for reply in before for slot in asked_slots(reply)}
    return {
        "reply_words": len(words(response)),
        "reply_repeated": response in before,
        "question_repeated": bool(asked_before & set(asked_slots(response))),
        "parroting": parroting(response, user_text),
        "unsupported_lines": candidate.ledger["n_unsupported"],
        "duplicate_lines": duplicate_lines(candidate.profile),
        "lines_recited": sum(mentions(line, response) for line in candidate.profile),
    }


def ngrams(text: str, n: int) -> list[str]:
    """List the word n-grams of a text.

    >>> ngrams("So you bake?", 2)
    ['so you', 'you bake']
    """
    said = words(text)
    return [" ".join(said[i : i + n]) for i in range(len(said) - n + 1)]


def parroting(reply: str, user_text: str) -> float:
    """Return the share of a reply's word trigrams that stand in the user's message too; 0 if it has no trigram.

    >>> parroting("You work as a baker? Nice.", "I work as a baker."), parroting("A baker! Since when?", "I bake.")
    (0.5, 0.0)
    """
    said, heard = ngrams(reply, 3), set(ngrams(user_text, 3))
    return sum(gram in heard for gram in said) / max(1, len(said))


def duplicate_lines(lines: Sequence[str]) -> int:
    """Count the profile lines that add nothing: all content words of their value stand in one earlier line's.

    >>> duplicate_lines(["Occupation: head nurse", "works as a nurse", "Others: the nurse", "Age: 34", "Age:"])
    2
    """
    values = [content_words(split_fact(line)[1]) for line in lines]
    return sum(not value or any(value <= earlier for earlier in values[:i]) for i, value in enumerate(values))


def ngram_counts(reply: str) -> Counter:
    """Count a reply's n-grams under names that no other count has; added up over replies they give `distinct`."""
    return Counter(f"{n}-gram {gram}" for n in DISTINCT for gram in ngrams(reply, n))


def distinct(sums: Counter) -> dict[str, float]:
    """Return distinct-1 and distinct-2 of all replies counted: different n-grams ÷ n-grams (arXiv 1510.03055).

    Low values mean that all dialogues get the same words. They fall with the number of replies, too: compare samples
    of one size. NaN without any n-gram.

    >>> distinct(ngram_counts("Tell me more.") + ngram_counts("Tell me, then."))
    {'distinct_1': 0.6666666666666666, 'distinct_2': 0.75}
    """
    counts = {n: [count for name, count in sums.items() if name.startswith(f"{n}-gram ")] for n in DISTINCT}
    return {f"distinct_{n}": len(found) / (sum(found) or math.nan) for n, found in counts.items()}


def unseen_facts(dialogue: Dialogue, t: int) -> list[str]:
    """List the facts disclosed up to turn `t` whose value no training persona has (embedded world)."""
    texts = [turn.user_text for turn in dialogue.turns[: t + 1]]
    facts = [dialogue.persona_facts[i] for i in disclosed(dialogue.persona_facts, texts)]
    return [fact for fact in facts if fact in unseen_values()]


def unseen_sums(candidate: Candidate, unseen: list[str]) -> dict[str, float]:
    """Count the disclosed facts with unseen values and those of them that a profile recalls."""
    if not unseen:
        return {}
    recalled = sum(match is not None for match in rewards.match_lines(candidate.profile, unseen))
    return {"unseen_disclosed": len(unseen), "unseen_recalled": recalled}


def rates(sums: Counter) -> dict[str, float]:
    """Turn summed counts into metrics (README, "Metrics")."""
    n = sums["candidates"] or math.nan  # what nobody played was not measured: it is not 0
    turns = [t for t in range(1, 1000) if sums[f"max_f1_turn{t}"] > 0]
    metrics = {
        "reward": (sums["profile_reward"] + sums["response_reward"]) / n,
        "profile_reward": sums["profile_reward"] / n,
        "response_reward": sums["response_reward"] / n,
        "profile_f1": sums["f1"] / n,
        "recall": sums["recalled"] / (sums["disclosed"] or math.nan),
        "f1_over_max": sum(sums[f"evidence_f1_turn{t}"] for t in turns)
        / (sum(sums[f"max_f1_turn{t}"] for t in turns) or math.nan),
        "profile_lines": sums["lines"] / n,
        "disclosed_facts": sums["disclosed"] / n,
        "format_valid": sums["valid"] / n,
        "tokens_per_turn": sums["tokens"] / n,
        "dialogues": sums["dialogues"],
        "dialogues_dropped": sums["dropped"],
    }
    metrics |= {name: sums[name] / n for name in GUARDS} | distinct(sums)
    metrics |= {f"f1_over_max_turn{t}": sums[f"evidence_f1_turn{t}"] / sums[f"max_f1_turn{t}"] for t in turns}
    metrics |= {name: sums[f"verdict_{name}"] / n for name in rewards.VERDICTS}
    metrics |= {
        f"failure_{name}": sums[f"failure_{name}"] / n for name in rewards.PARSE_FAILURES if sums[f"failure_{name}"]
    }
    metrics |= {name: sums[name] for name in sums if name.startswith("dropped_")}
    if sums["unseen_disclosed"]:
        metrics["recall_unseen_values"] = sums["unseen_recalled"] / sums["unseen_disclosed"]
    return metrics


def sum_counters(counters: Sequence[Counter]) -> Counter:
    """Add counters up (negative counts are kept, unlike with +)."""
    total: Counter = Counter()
    for counter in counters:
        total.update(counter)
    return total


# ---------------------------------------------------------------------------------------------------------------------
# The run folder


RECORDS = ("metrics.jsonl", "episodes.jsonl")
FINISHED = "timeline.png"  # a run draws it last of all: without it, it has been killed
RUN_FILES = ("checkpoints", "tensorboard", *RECORDS, "curve.png", FINISHED, "config.json")


@contextmanager
def claim_folder(path: str, resume: bool, overwrite: bool) -> Iterator[None]:
    """Make a run folder and keep every other run out of it while the block runs; if it stays empty, remove it again.

    Raises ValueError if another process is writing there, or, unless `resume`, if the folder holds anything; with
    `overwrite` a run that it holds is removed.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--run-dir {folder} cannot be made a folder: {error.strerror}") from None
    lock = os.open(folder, os.O_RDONLY)  # the kernel opens the lock when this process ends, killed or not
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--run-dir {folder} is in use: another process is writing there") from None
        if not resume:
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
    if not (folder / "config.json").is_file():
        raise ValueError(f"--run-dir {folder} is not empty, and holds no run; choose another folder")
    if not overwrite:
        raise ValueError(
            f"--run-dir {folder} holds a run already; --resume or --overwrite it, or choose another folder"
        )
    for name in RUN_FILES:  # config.json last: killed in between, this is still a run
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)


def log_files(folder: Path) -> list[Path]:
    """List the files that a run appends to."""
    files = (*(folder / name for name in RECORDS), *sorted((folder / "tensorboard").glob("*")))
    return [file for file in files if file.is_file()]


def cut_back(folder: Path, position: dict[str, int]) -> None:
    """Cut a run's records back to what `RunLog.position` returned; what is missing there is a warning."""
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in log_files(folder)}
    for name, size in position.items():
        if sizes.get(name, 0) < size:
            print(f"{folder / name} has lost records: {sizes.get(name, 0):,} of {size:,} bytes", file=sys.stderr)
    for name, size in sizes.items():
        if name in position:
            os.truncate(folder / name, min(size, position[name]))
        else:
            (folder / name).unlink()


class RunLog:
    """Rank 0's records of a run: metrics.jsonl, TensorBoard events, episodes.jsonl and the learning curve."""

    def __init__(self, folder: str, position: dict[str, int], tensorboard: bool):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.writer = None
        self.intervals: list[tuple[str, float, float]] = []  # of the last iteration: phase, start, end
        cut_back(self.folder, position)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and optional

            self.writer = SummaryWriter(str(self.folder / "tensorboard"))

    def position(self) -> dict[str, int]:
        """Return the size in bytes of each file of records, once all of them are on disk."""
        if self.writer:
            self.writer.flush()
        for file in log_files(self.folder):
            fsync(file)
        return {str(file.relative_to(self.folder)): file.stat().st_size for file in log_files(self.folder)}

    def metrics(self, iteration: int, kind: str, values: dict[str, float]) -> None:
        """Append one record of a kind ("train", "heldout/greedy", …); numbers that are not finite are left out."""
        finite = {k: round(float(v), 6) for k, v in values.items() if math.isfinite(v)}
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"iteration": iteration, "kind": kind, **finite}) + "\n")
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(f"{kind}/{name}", value, iteration)

    def episodes(self, iteration: int, kind: str, dialogues: list[dict]) -> None:
        """Append whole dialogues: text, profile, each reward part, stop and failure reasons."""
        with (self.folder / "episodes.jsonl").open("a") as file:
            for dialogue in dialogues:
                file.write(json.dumps({"iteration": iteration, "kind": kind, **dialogue}) + "\n")

    def close(self) -> None:
        """Close the event file."""
        if self.writer:
            self.writer.close()

    def draw(self) -> None:
        """Draw the learning curve and the last iteration's timeline."""
        plot_curve(self.folder)
        plot_timeline(self.folder / FINISHED, self.intervals)


def episode_record(dialogue: Dialogue) -> dict:
    """Return a dialogue as plain data for episodes.jsonl, without the prompts' ids, which only repeat the history."""
    record = asdict(dialogue)
    for turn in record["turns"]:
        turn["prompt_tokens"] = len(turn.pop("prompt_ids"))
        for candidate in turn["candidates"]:
            candidate["mean_logprob"] = round(sum(candidate.pop("logprobs")) / max(1, len(candidate["token_ids"])), 4)
            candidate["tokens"] = len(candidate.pop("token_ids"))
    return record


CURVES = [
    (
        "What is revealed gets into the profile",
        {"recall": "recall of revealed facts", "f1_over_max": "F1 ÷ honest maximum"},
    ),
    (
        "Replies that pass all five verdicts",
        {"response_reward": "response reward", "engagement": "engagement", "relevance": "relevance"},
    ),
    ("Lines per profile that nothing supports", {"unsupported_lines": "unsupported lines"}),
    (
        "Guards",
        {
            "format_valid": "format valid",
            "reply_repeated": "replies repeated",
            "question_repeated": "questions repeated",
            "parroting": "parroting",
        },
    ),
]


def plot_timeline(path: Path, intervals: list[tuple[str, float, float]]) -> None:
    """Draw when one iteration was in which phase: a row per phase, a bar per interval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    phases = list(dict.fromkeys(phase for phase, _, _ in intervals))
    first = min((start for _, start, _ in intervals), default=0.0)
    figure, axis = plt.subplots(figsize=(11, 1 + 0.45 * len(phases)), constrained_layout=True)
    for row, phase in enumerate(phases):
        bars = [(start - first, end - start) for name, start, end in intervals if name == phase]
        axis.broken_barh(bars, (row - 0.4, 0.8), color=f"C{row}", linewidth=0)
        axis.text(sum(bars[-1]), row, f"  {sum(width for _, width in bars):.1f} s", va="center", fontsize=8)
    axis.set(title="One iteration", xlabel="seconds", yticks=range(len(phases)), yticklabels=phases)
    axis.invert_yaxis()
    axis.margins(x=0.08)
    axis.grid(axis="x", alpha=0.25)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_curve(folder: Path) -> None:
    """Draw curve.png from metrics.jsonl: training (all candidates, sampled) and held-out evaluations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), constrained_layout=True)
    styles = {"train": ("-", 0.35), "heldout/sampled": ("o-", 1.0), "heldout/greedy": ("s--", 0.8)}
    for axis, (title, names) in zip(axes.flat, CURVES, strict=True):
        for color, (name, label) in enumerate(names.items()):
            for kind, (style, alpha) in styles.items():
                points = [(r["iteration"], r[name]) for r in records if r["kind"] == kind and name in r]
                if points:
                    axis.plot(
                        *zip(*points, strict=True),
                        style,
                        color=f"C{color}",
                        alpha=alpha,
                        markersize=3.5,
                        label=f"{label}, {kind}",
                    )
        axis.set(title=title, xlabel="iteration", ylim=(0, None))
        axis.grid(alpha=0.25)
        if axis.lines:
            axis.legend(fontsize=7)
    figure.suptitle(f"RLPA: {folder.name}")
    figure.savefig(folder / "curve.png", dpi=120)
    plt.close(figure)


def show_transcripts(before: dict[str, list[Dialogue]], after: dict[str, list[Dialogue]]) -> None:
    """Print one held-out dialogue as the policy led it before and after training."""
    for when, played in (("before", before), ("after", after)):
        for dialogue in played.get("heldout/sampled", [])[:1]:
            print("\n" + "\n".join(transcript(dialogue, when)))
    print()


def transcript(dialogue: Dialogue, when: str) -> list[str]:
    """Write a dialogue in lines, three per turn; nothing that was said begins a line or acts on a terminal."""
    facts = clean_text("; ".join(dialogue.persona_facts))
    lines = [f"===== {when}: persona {clean_text(dialogue.persona_id)} ({facts})"]
    for turn in dialogue.turns:
        scores = f"profile {turn.winner.profile_reward:.2f}, response {turn.winner.response_reward:.0f}"
        lines.append(f"  user      {clean_text(turn.user_text)}")
        lines.append(f"  profile   {clean_text('; '.join(turn.winner.profile)) or '-'}   [{scores}]")
        lines.append(f"  assistant {clean_text(turn.winner.response)}")
    return lines
