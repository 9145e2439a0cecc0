"""One self-contained page about training runs and evaluations: curves, tables, and dialogues to page through.

    python -m report runs/NAME                                 writes runs/NAME/report.html
    python -m report runs/seed0 runs/seed1 runs/evaluate_DATE --out both.html

A RUN is a folder of train_rlpa.py (metrics.jsonl, and if there: episodes.jsonl, config.json) or of evaluation
(results.json, episodes.jsonl). Several are overlaid. The page needs no network and forbids itself any; what users and
models wrote enters it as data only. Its look and its drawing are in report/report.html.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import html
import json
import math
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import rewards
from command_line import exits
from config import ProfileJudge
from records.checkpoints import write_text
from rewards import Matcher
from untrusted.files import check_value, parse_json, read_json, read_lines
from untrusted.plain_text import clean_text, say, shorten
from worlds.ledger import on_ledger, split_fact, told_by

TEMPLATE = Path(__file__).with_name("report.html")
MAX_POINTS = 200  # of a curve; a longer one is drawn as means of equal stretches with their extremes
MAX_TEXT = 4000  # characters of a single text
JOINERS = {"\u200c", "\u200d"}  # invisible, but part of words and of emoji; they reorder nothing
DAMAGED = (KeyError, IndexError, TypeError, AttributeError, ValueError)  # what a record of another shape raises
Record = dict[str, Any]
ESTIMATE = dict.fromkeys(("value", "low", "high"), float | str | None)  # as evaluation writes it
SUMMARY = {"personas": int, "figures": dict[str, ESTIMATE], "turns": dict[str, list[ESTIMATE]]}

# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_source(folder: Path, name: str, max_dialogues: int) -> tuple[Record, list[Record]]:
    """Read a run's folder: (what is known of the run, dialogues to show); ValueError if it is the folder of no run."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give folders of train_rlpa.py or evaluation")
    if (folder / "metrics.jsonl").is_file():
        source = read_training(folder)
    elif (folder / "results.json").is_file():
        source = read_evaluation(folder)
    else:
        raise ValueError(f"{folder} holds neither metrics.jsonl (of train_rlpa.py) nor results.json (of evaluation)")
    judge, user = (str(source["config"].get(name)) for name in ("profile_judge", "simulator_model"))
    matches = rewards.choose_matcher(judge, user) if judge in get_args(ProfileJudge) else rewards.line_matches_fact
    recorded, shown = read_episodes(folder / "episodes.jsonl", max_dialogues, source["notes"], matches)
    if source["type"] == "evaluation":
        recorded.pop("turns")  # results.json has those means, with intervals
    return source | recorded | {"name": name}, shown


def read_training(folder: Path) -> Record:
    """Read settings and curves of a training run."""
    notes: list[str] = []
    path = folder / "config.json"
    if not path.is_file():
        notes.append("config.json is missing: the settings of this run are not known.")
    config = read_json(path) if path.is_file() else {}
    curves, longest = read_curves(folder / "metrics.jsonl", notes)
    if longest > MAX_POINTS:
        notes.append(
            f"metrics.jsonl has up to {longest} records of a kind: its longer curves are drawn as means of stretches of"
            f" {math.ceil(longest / MAX_POINTS)} records or fewer, and the band around a curve spans their extremes."
        )
    return {"type": "training", "notes": notes, "config": config, "curves": curves}


def read_evaluation(folder: Path) -> Record:
    """Read settings, figures and curves of an evaluation; ValueError if results.json is not one."""
    path = folder / "results.json"
    results = read_json(path, dict.fromkeys(("settings", "subjects", "differences"), dict))
    for name, summary in [*results["subjects"].items(), *results["differences"].items()]:
        known = {key: item for key, item in summary.items() if key in SUMMARY} if isinstance(summary, dict) else summary
        check_value(known, SUMMARY, f"{path}: {shorten(name)!r}")
    return {"type": "evaluation", "notes": [], "config": results["settings"], "results": results}


def read_records(path: Path) -> Iterator[Record | None]:
    """Yield the objects of a JSONL file, None for a damaged line (a run that still goes on may have cut one short)."""
    for line in read_lines(path):
        try:
            found = parse_json(line, "")
        except ValueError:
            found = None
        yield found if isinstance(found, dict) else None


def note_damage(path: Path, damaged: int, notes: list[str]) -> None:
    """Say how many lines were left out."""
    if damaged:
        lines = "line is" if damaged == 1 else "lines are"
        notes.append(f"{path.name}: {damaged} {lines} damaged and left out.")


# ---------------------------------------------------------------------------------------------------------------------
# Curves


def read_curves(path: Path, notes: list[str]) -> tuple[dict[str, dict[str, list]], int]:
    """Read metrics.jsonl: ({kind: {metric: points}}, records of the most frequent kind); see `decimate`."""
    series: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    damaged, records = 0, Counter[str]()
    for record in read_records(path):
        if record is None or not is_number(record.get("iteration")) or not isinstance(record.get("kind"), str):
            damaged += 1
            continue
        records[record["kind"]] += 1
        for name, value in record.items():
            if name != "iteration" and is_number(value):
                series[record["kind"]][name].append((record["iteration"], value))
    note_damage(path, damaged, notes)
    curves = {kind: {name: decimate(points) for name, points in metrics.items()} for kind, metrics in series.items()}
    return curves, max(records.values(), default=0)


def is_number(value: object) -> bool:
    """Tell a finite number from anything else that JSON can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def decimate(points: Sequence[tuple[float, float]], limit: int = MAX_POINTS) -> list[list[float]]:
    """Return points [x, y]; of more than `limit` the means of equal stretches and their extremes, [x, y, low, high].

    >>> decimate([(1, 5.0), (2, 7.0), (3, 1.0)], limit=2)
    [[1.5, 6.0, 5.0, 7.0], [3.0, 1.0, 1.0, 1.0]]
    """
    if len(points) <= limit:
        return [list(point) for point in points]
    size = math.ceil(len(points) / limit)
    means = []
    for start in range(0, len(points), size):
        xs, ys = zip(*points[start : start + size], strict=True)
        means.append([sum(xs) / len(xs), sum(ys) / len(ys), min(ys), max(ys)])
    return means


# ---------------------------------------------------------------------------------------------------------------------
# Dialogues


def read_episodes(
    path: Path, max_dialogues: int, notes: list[str], matches: Matcher = rewards.line_matches_fact
) -> tuple[Record, list[Record]]:
    """Read episodes.jsonl: counts and means per turn of all dialogues, and views of at most `max_dialogues`.

    Every (iteration, kind) is a group, the dropped dialogues of each are another; groups take turns, so that all are
    shown, and first dialogues go first, so that the same personas are met before and after training.
    """
    groups: dict[tuple, list[Record]] = defaultdict(list)
    counts, means, damaged = Counter[tuple](), defaultdict(Counter), 0
    if not path.is_file():
        notes.append("episodes.jsonl is missing: there are no dialogues to page through.")
        return {"recorded": 0, "dropped": 0, "turns": []}, []
    for record in read_records(path):
        try:
            key = group_of(record)
            sums = turn_sums(record)
            if counts[key] < max_dialogues:  # more of one group are never shown
                groups[key].append(dialogue_view(record, matches))
        except DAMAGED:
            damaged += 1
            continue
        counts[key] += 1
        means[key[:2]].update(sums)
    note_damage(path, damaged, notes)
    shown = [group[i] for i in range(max_dialogues) for group in groups.values() if i < len(group)][:max_dialogues]
    shown.sort(key=lambda view: (view["iteration"] or 0, view["kind"], view["index"]))
    if len(shown) < (total := sum(counts.values())):
        notes.append(
            f"{len(shown)} of {total} recorded dialogues are in this page (--max-dialogues {max_dialogues}): the first"
            " ones of each evaluation and of each recorded training iteration, dropped ones too. Means count all."
        )
    turns = [turn_means(iteration, kind, sums) for (iteration, kind), sums in sorted(means.items())]
    dropped = sum(n for (*_, lost), n in counts.items() if lost)
    return {"recorded": total, "dropped": dropped, "turns": turns}, shown


def group_of(record: Record) -> tuple[float, str, bool]:
    """Return iteration (0 in an evaluation), kind, and whether the dialogue was dropped; ValueError if it has none."""
    iteration, kind = record.get("iteration", 0), record["kind"]
    if not (is_number(iteration) and isinstance(kind, str) and is_number(record["index"])):
        raise ValueError("a dialogue without iteration, kind or index")
    return iteration, kind, record["dropped"] is not None


def turn_sums(record: Record) -> Counter:
    """Sum up, turn by turn, evidence F1 and honest maximum of the chosen candidates; nothing of a dropped dialogue."""
    sums: Counter = Counter()
    for t, turn in enumerate(record["turns"] if record["dropped"] is None else []):
        ledger = turn["candidates"][turn["chosen"]]["ledger"]
        if not (is_number(ledger["evidence_f1"]) and is_number(ledger["max_f1"])):
            raise ValueError("a turn without figures")
        sums.update({("n", t): 1, ("f1", t): ledger["evidence_f1"], ("max", t): ledger["max_f1"]})
    return sums


def turn_means(iteration: int, kind: str, sums: Counter) -> Record:
    """Turn the sums of one evaluation (or training iteration) into curves over turns, from 1."""
    turns = [t for t in range(1000) if sums["n", t]]
    curves = {name: [[t + 1, sums[name, t] / sums["n", t]] for t in turns] for name in ("f1", "max")}
    return {"iteration": iteration, "kind": kind, "dialogues": sums["n", 0], **curves}


def dialogue_view(record: Record, matches: Matcher = rewards.line_matches_fact) -> Record:
    """Return what the page shows of one record of episodes.jsonl."""
    versions = {int(turn): facts for turn, facts in (record.get("changes") or {}).items()}
    versions = versions or {0: record["persona_facts"]}
    starts = sorted(versions)
    turns, before = [], []
    for t, turn in enumerate(record["turns"]):
        version = max(i for i, start in enumerate(starts) if start <= t)
        facts, past = versions[starts[version]], [fact for start in starts[:version] for fact in versions[start]]
        told = on_ledger(facts, [told_in(earlier, facts) for earlier in record["turns"][: t + 1]])
        candidates = [candidate_view(c, facts, told, past, before, matches) for c in turn["candidates"]]
        turns.append({"user": turn["user_text"], "persona": version, "told": told, "candidates": candidates})
        turns[-1]["chosen"] = turn["chosen"]
        if candidates:
            if turn["chosen"] not in range(len(candidates)):
                raise ValueError("a turn whose chosen candidate is not there")
            before = turn["candidates"][turn["chosen"]]["profile"]
    kept = {key: record.get(key) for key in ("iteration", "kind", "index", "persona_id", "dropped")}
    personas = [{"from": start + 1, "facts": list(versions[start])} for start in starts]
    return kept | {"personas": personas, "turns": turns}


def told_in(turn: Record, facts: list) -> Sequence[str]:
    """Return the facts that the user's message tells; of records older than that field, those that it mentions."""
    if (told := turn.get("told")) is None:
        return told_by(facts, turn["user_text"])
    check_value(told, list[str], "told")
    return told


def candidate_view(
    candidate: Record, facts: list, told: list[int], past: list, before: list[str], matches: Matcher
) -> Record:
    """Return what the page shows of one candidate; its text as sampled only where it could not be parsed."""
    lines, missing = mark_profile(candidate["profile"], facts, told, past, before, matches)
    names = ("response", "failure", "reward", "ledger", "tokens", "mean_logprob")
    view = {name: candidate.get(name) for name in (*names, "stop_reason")}
    view |= {"lines": lines, "missing": missing, "judged": candidate.get("judged", True)}
    view["parts"] = candidate.get("parts", {})
    view["verdicts"] = [candidate["verdicts"].get(name) for name in rewards.VERDICTS]
    return view | ({"text": candidate["text"]} if candidate["failure"] else {})


def mark_profile(
    lines: Sequence[str], facts: Sequence[str], told: Sequence[int], past: Sequence[str], before: Sequence[str],
    matches: Matcher = rewards.line_matches_fact,
) -> tuple[list[list[str]], list[list[str]]]:
    """Mark each profile line, and each fact that was told and is not in the profile.

    Args:
        lines, before: the profile, and the one of the turn before.
        facts, told: the persona, and the indices of what it has disclosed so far.
        past: facts that were true of this persona earlier.
    Returns:
        [line, mark]: new, kept, corrected (in place of a line that no fact supports), guess (true, but never told),
        outdated, repeat or wrong; and [fact, mark]: forgotten (it was in the profile before) or missed.

    >>> facts = ["Age: 34", "Location: Oslo", "Gender: man"]
    >>> lines = ["Location: Oslo", "Gender: man", "Interests: chess"]
    >>> mark_profile(lines, facts, told=[1, 0], past=[], before=["Location: Lima", "Age: 34"])[0]
    [['Location: Oslo', 'corrected'], ['Gender: man', 'guess'], ['Interests: chess', 'wrong']]
    >>> mark_profile(lines, facts, told=[1, 0], past=[], before=["Location: Lima", "Age: 34"])[1]
    [['Age: 34', 'forgotten']]
    """
    open_facts = [facts[i] for i in told]
    evidence = rewards.match_lines(lines, open_facts, matches)  # as in the ledger of rewards.score_profile
    gone = [line for line in before if line not in lines and not states_any(line, facts, matches)]
    corrected_slots = {split_fact(line)[0] for line in gone} - {None}
    marked = []
    for line, i in zip(lines, evidence, strict=True):
        if i is None:
            mark = unsupported_mark(line, open_facts, facts, past, matches)
        elif any(matches(earlier, open_facts[i]) for earlier in before):
            mark = "kept"
        else:
            mark = "corrected" if split_fact(line)[0] in corrected_slots else "new"
        marked.append([line, mark])
    missing = [fact for i, fact in enumerate(open_facts) if i not in evidence]
    known = {fact: any(matches(line, fact) for line in before) for fact in missing}
    return marked, [[fact, "forgotten" if known[fact] else "missed"] for fact in missing]


def unsupported_mark(
    line: str, open_facts: Sequence[str], facts: Sequence[str], past: Sequence[str], matches: Matcher
) -> str:
    """Say what is wrong with a line that is paired with no disclosed fact."""
    if states_any(line, open_facts, matches):
        return "repeat"
    if states_any(line, facts, matches):
        return "guess"
    return "outdated" if states_any(line, past, matches) else "wrong"


def states_any(line: str, facts: Sequence[str], matches: Matcher) -> bool:
    """Tell whether a line states any of the facts."""
    return any(matches(line, fact) for fact in facts)


# ---------------------------------------------------------------------------------------------------------------------
# The page


def visible(text: str, limit: int = MAX_TEXT) -> str:
    """Make characters visible that would otherwise act or hide: escapes, direction overrides, lone surrogates, …

    >>> visible("a\\x1b[31mb\\u202ec")
    'a⟨U+001B⟩[31mb⟨U+202E⟩c'
    """
    text = text if len(text) <= limit else f"{text[:limit]} […{len(text) - limit} more characters left out]"
    hidden = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    return "".join(
        f"⟨U+{ord(c):04X}⟩" if c not in "\n\t" and c not in JOINERS and unicodedata.category(c) in hidden else c
        for c in text
    )


def clean(value: Any) -> Any:
    """Return data that JSON.parse can read and that is safe to look at: visible texts, rounded finite numbers."""
    if isinstance(value, dict):
        return {visible(str(key)): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def embed(data: Record) -> str:
    """Write data as JSON that can stand in a <script>: nothing in it can end the element or start another.

    >>> embed({"said": "</script>"})
    '{"said":"\\\\u003c/script\\\\u003e"}'
    """
    text = json.dumps(clean(data), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&\u2028\u2029]", lambda match: f"\\u{ord(match[0]):04x}", text)


def render(data: Record) -> str:
    """Fill the template; its own script and style alone may run, by their hashes, and nothing may be fetched."""
    template = TEMPLATE.read_text(encoding="utf-8")
    policy = "; ".join(
        ["default-src 'none'", "base-uri 'none'", "form-action 'none'"]
        + [f"{tag}-src 'sha256-{digest(template, tag)}'" for tag in ("script", "style")]
    )
    parts = {"CSP": policy, "TITLE": html.escape(visible(data["title"])), "DATA": embed(data)}
    return re.sub(r"\{\{(CSP|TITLE|DATA)\}\}", lambda match: parts[match[1]], template)


def digest(template: str, tag: str) -> str:
    """Return the base64 SHA-256 of the template's one plain <script> or <style>."""
    content = re.search(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)[1]
    return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def collect(folders: Sequence[Path], max_dialogues: int) -> Record:
    """Read all runs into the data of one page."""
    names = [folder.resolve().name for folder in folders]
    names = [str(f) if names.count(name) > 1 else name for f, name in zip(folders, names, strict=True)]
    sources, dialogues = [], []
    for i, (folder, name) in enumerate(zip(folders, names, strict=True)):
        source, shown = read_source(folder, name, max_dialogues)
        sources.append(source)
        dialogues += [{"source": i, **view} for view in shown]
    title = f"RLPA: {', '.join(names)}"
    return {"title": title, "verdicts": rewards.VERDICTS, "sources": sources, "dialogues": dialogues}


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; ValueError if anything is amiss."""
    parser = exits.Parser("python -m report", __doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of train_rlpa.py or of evaluation")
    parser.add_argument("--out", type=Path, help="the page [report.html in the first folder]")
    parser.add_argument("--max-dialogues", type=int, default=60, help="dialogues per run in the page [60]")
    args = parser.parse_args(argv)
    args.out = args.out or args.runs[0] / "report.html"
    if args.max_dialogues < 0:
        raise ValueError(f"--max-dialogues {args.max_dialogues} must be at least 0")
    if args.out.suffix != ".html" or args.out.resolve() == TEMPLATE:
        raise ValueError(f"--out {args.out} must end in .html and be another file than the template {TEMPLATE.name}")
    places = [run.resolve() for run in args.runs]
    if twice := [run for run in args.runs if places.count(run.resolve()) > 1]:
        raise ValueError(f"{twice[0]} is given twice")
    return args


def run(argv: Sequence[str] | None) -> None:
    """Write the page, and say what it holds."""
    args = parse_args(argv)
    try:
        data = collect(args.runs, args.max_dialogues)
        page = render(data)
        write_text(args.out, page)
    except OSError as error:  # a file that cannot be read or written; it is named
        raise ValueError(str(error)) from None
    for source in data["sources"]:
        for note in source["notes"]:
            say(clean_text(f"{source['name']}: {note}"))
    say(f"{clean_text(str(args.out))}: {len(data['dialogues'])} dialogues, {len(page.encode()) / 1e6:.1f} MB")


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code (command_line/exits.py)."""
    return exits.run("report", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
