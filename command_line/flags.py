"""Flags made from a class of settings: a field's name is the flag, its comment the `--help`, its group a heading.

`parse_args` reads the trainer's. Built-in defaults < the checkpoint's `rlpa.json` < flags. A checkpoint and a run are
data, which strangers may have made: a checkpoint sets `training_settings` alone; a run that is resumed brings its other
settings too, but no address, no key and no file that is written. Those come from the command line.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import os
import re
import shlex
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

from command_line.exits import Parser, check_prices
from config import HERE, Config, flag, refuse_ignored
from endpoints.wire import shown_url
from learners.adapters import adapter_settings
from learners.folder import resolve_checkpoint
from untrusted.files import check_value, read_json
from untrusted.plain_text import shorten

TINY_CHECKPOINT = Path(__file__).parent.parent / "tiny"
BARE = {"ckpt": str(TINY_CHECKPOINT), "dry_run": HERE}  # what these flags mean without a value
PATHS = ("adapter", "critic_ckpt", "personas", "eval_personas", "record", "replay")  # absolute: --resume from anywhere
TRAINING = ("rollout", "rewards", "advantages", "update", "evaluation, log, checkpoints")  # groups of `Config`
ASKED = ("simulator_url", "judge_url", "api_key_env", "record", "replay")  # from the command line alone, on resume too
OWN = ("resume", "overwrite", "run_dir", "dry_run", "merge")  # what a start does, and the next one does not
MOVED = ("ckpt", "adapter", "personas", "eval_personas")  # on resume: where these are now, unchanged
RESUMED = (  # flags that may be given beside --resume, for they leave the result alone
    *ASKED, *MOVED, "simulator_model", "judge_model", "request_timeout", "max_retries", "max_concurrency",
    "requests_per_minute", "tokens_per_minute", "breaker_failures", "outage_budget", "quorum", "quorum_retries",
    "price_in", "price_out", "num_iterations", "schedule_iterations", "threads", "eval_every", "save_every",
    "episodes_every", "keep_last", "collective_timeout",
    "shard",  # equal up to rounding
)  # fmt: skip


def parse_args(argv: Sequence[str] | None, description: str) -> Config:
    """Read the trainer's flags into a Config; ValueError if one is bad."""
    parser, words = make_parser(Config, description), sys.argv[1:] if argv is None else argv
    if any(word.startswith("--resume") for word in words):
        parser.may_be_empty += tuple(map(flag, ASKED))  # what is dropped on purpose
    given = vars(parser.parse_args(words))
    check_prices(given.get("price_in"), given.get("price_out"))
    given |= {name: str(Path(given[name]).resolve()) for name in PATHS if given.get(name)}
    if given.get("resume"):
        return resumed_config(given)
    if not given.get("ckpt"):
        raise ValueError("no checkpoint; give --ckpt FOLDER_OR_HUB_ID, or --ckpt without a value for the tiny one")
    folder = resolve_checkpoint(given["ckpt"])
    adapter = adapter_settings(Path(given["adapter"])) if given.get("adapter") else {}
    for name in adapter.keys() & given.keys():
        if given[name] != adapter[name]:
            raise ValueError(f"{flag(name)} {given[name]} is not that of --adapter {given['adapter']}, {adapter[name]}")
    config = Config(**{**checkpoint_defaults(folder), **adapter, **given, "ckpt": str(folder.resolve())})
    refuse_ignored(config, given)
    if config.critic_ckpt and not Path(config.critic_ckpt).is_dir():
        raise ValueError(f"--critic-ckpt {config.critic_ckpt}: no such folder")
    config.run_dir = config.run_dir or new_folder()
    return config


def new_folder(prefix: str = "") -> str:
    """Name a folder for results that no other start names, not even one in the same second."""
    return f"runs/{prefix}{time.strftime('%Y-%m-%d_%H-%M-%S')}_{os.getpid()}"


def make_parser(settings: type, description: str, names: Collection[str] = ()) -> Parser:
    """Make a parser with a flag for each setting, or for `names` alone; it raises ValueError where it refuses."""
    parser = Parser(description=description)
    add_flags(parser, settings, names)
    return parser


def add_flags(parser: argparse.ArgumentParser, settings: type, names: Collection[str] = ()) -> None:
    """Add a flag for each setting, or for `names` alone, in the groups of the class; one not given leaves no value."""
    comments, hints = field_comments(settings), get_type_hints(settings)
    groups: dict[str, argparse._ArgumentGroup] = {}
    for f in dataclasses.fields(settings):
        if names and f.name not in names:
            continue
        heading, comment = comments[f.name]
        group = groups.setdefault(heading, parser.add_argument_group(heading) if heading not in groups else None)
        shown = f"{comment} [{f.default}]".replace("%", "%%")
        kind, options = type(f.default), {"default": argparse.SUPPRESS, "help": shown}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            values = get_args(hints[f.name]) if get_origin(hints[f.name]) is Literal else ()
            options |= {"type": kind, "metavar": "|".join(values) or kind.__name__.upper()}
        if f.name in BARE:
            options |= {"nargs": "?", "const": BARE[f.name]}
        group.add_argument(flag(f.name), **options)


def field_comments(settings: type) -> dict[str, tuple[str, str]]:
    """Return group and comment of each field of a class of settings, and of those that it inherits.

    Read from the file: `inspect.getsource` parses all of it, which in Python 3.11 fails now and then beside threads.
    """
    found: dict[str, tuple[str, str]] = {}
    for cls in reversed(settings.__mro__[:-1]):  # a subclass's comment counts
        module, heading = Path(inspect.getfile(cls)).read_text(encoding="utf-8"), cls.__name__.lower()
        source = re.search(rf"^class {cls.__name__}\b.*?(?=^\S|\Z)", module, re.MULTILINE | re.DOTALL)[0]
        for group, name, comment in re.findall(r"^    (?:# --- (.*)|(\w+): .*?  # (.*))$", source, re.MULTILINE):
            heading = group or heading
            if name:
                found[name] = heading, comment
    return found


def training_settings() -> set[str]:
    """Name what a checkpoint may set: numbers, switches and choices of training, and nothing that names a place."""
    return {"num_personas"} | {name for name, (group, _) in field_comments(Config).items() if group in TRAINING}


def checkpoint_defaults(folder: Path) -> dict:
    """Return the settings that a checkpoint carries for itself (`rlpa.json`); {} if it carries none."""
    path = folder / "rlpa.json"
    if not path.exists():
        return {}
    settings = read_json(path)
    if foreign := sorted({f.name for f in dataclasses.fields(Config)} & set(settings) - training_settings()):
        raise ValueError(f"{path} sets {foreign[0]!r}; a checkpoint may only set how it is trained:"
                         f" remove the line, and give {flag(foreign[0])} on the command line")  # fmt: skip
    return check_settings(settings, path)


def run_settings(folder: Path) -> dict:
    """Return the settings in a run's config.json; ValueError if it holds anything else."""
    settings = read_json(folder / "config.json")
    settings.pop("format", None)
    return check_settings(settings, folder / "config.json")


def check_settings(settings: dict, path: Path) -> dict:
    """Return settings that a file holds; ValueError that names the file and the setting if one is none, or is bad."""
    hints = get_type_hints(Config, include_extras=True)
    for name, value in settings.items():
        if name not in hints:
            is_model = "; it is a model's, not a run's" if "model_type" in settings else ""
            raise ValueError(f"{path} sets {shorten(name, 40)!r}, which is no setting of this trainer{is_model}")
        check_value(value, hints[name], f"{path}: {flag(name)}")
    return settings


def resumed_config(given: dict) -> Config:
    """Return the config of the run to resume; only the flags that leave the result alone may be given beside it."""
    run_dir = Path(given["resume"])
    path = run_dir / "config.json"
    if not path.is_file():
        raise ValueError(f"--resume {run_dir}: {path} does not exist; give a run folder")
    others = set(given) - {"resume", *RESUMED}
    if others:
        raise ValueError(
            f"--resume takes its settings from {path}; drop {', '.join(flag(name) for name in sorted(others))}"
        )
    settings = run_settings(run_dir)
    if (kept := settings.get("save", "run")) != "run":
        raise ValueError(f"--resume {run_dir}: --save {kept} left nothing to go on from; start anew, with --save run")
    for name in given.keys() & set(MOVED):
        if not (given[name] and settings.get(name)):
            raise ValueError(f"{path} holds {flag(name)} {settings.get(name) or '(none)'}; another one is another run")
    if given.get("ckpt"):
        given["ckpt"] = str(resolve_checkpoint(given["ckpt"]).resolve())
    if any(settings.get(name) and name not in given for name in ASKED):
        asked = {name: settings[name] for name in ASKED if settings.get(name)} | given
        del asked["resume"]
        raise ValueError(
            "addresses, the key's variable and files that are written come from the command line alone; if these of"
            f" {path} are right, go on with: {resume_command(given['resume'], asked)}"
        )
    kept = {name: value for name, value in settings.items() if name not in (*OWN, *ASKED)}
    config = Config(**{**kept, **given, "run_dir": given["resume"]})
    if not config.ckpt:
        raise ValueError(f"{path} names no ckpt; it is not as the run has written it")
    return config


def resume_command(run_dir: str, asked: dict) -> str:
    """Write the command that goes on with a run, complete but for the queries of addresses, which may hold a key.

    asked: settings that the run's config.json does not decide.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    words = ["torchrun", *(["--nproc-per-node", str(processes)] if processes > 1 else []), sys.argv[0]]
    words += ["--resume", run_dir]
    for name, value in asked.items():
        if isinstance(value, bool):
            words.append(flag(name) if value else flag(f"no_{name}"))
        else:
            words += [flag(name), shown_url(value) if name.endswith("_url") else str(value)]
    return shlex.join(words)
