"""Flags made from a class of settings: a field's name is the flag, its comment the `--help`, its group a heading.

`parse_args` reads the trainer's. Built-in defaults < the checkpoint's `rlpa.json` < flags.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import os
import re
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

from command_line.exits import check_prices, refuse
from config import HERE, Config, flag
from learners.weights import resolve_checkpoint

TINY_CHECKPOINT = Path(__file__).parent.parent / "tiny"
BARE = {"ckpt": str(TINY_CHECKPOINT), "dry_run": HERE}  # what these flags mean without a value
PATHS = ("critic_ckpt", "personas", "eval_personas", "record", "replay")  # kept absolute: --resume from anywhere
RESUMED = (  # flags that leave the result alone, and so may be given beside --resume
    "num_iterations", "schedule_iterations", "threads", "eval_every", "save_every", "episodes_every", "keep_last",
    "collective_timeout", "simulator_url", "judge_url", "outage_budget", "requests_per_minute", "tokens_per_minute",
    "ckpt", "personas", "eval_personas",  # where they are now: they must be what the run began with
    "shard",  # equal up to rounding
)  # fmt: skip


def parse_args(argv: Sequence[str] | None, description: str) -> Config:
    """Read the trainer's flags into a Config; ValueError if one is bad."""
    given = vars(make_parser(Config, description).parse_args(argv))
    check_prices(given.get("price_in"), given.get("price_out"))
    if given.get("resume"):
        return resumed_config(given)
    if not given.get("ckpt"):
        raise ValueError("no checkpoint; give --ckpt FOLDER_OR_HUB_ID, or a bare --ckpt for the tiny checkpoint")
    folder = resolve_checkpoint(given["ckpt"])
    config = Config(**{**checkpoint_defaults(folder), **given, "ckpt": str(folder.resolve())})
    if config.critic_ckpt and not Path(config.critic_ckpt).is_dir():
        raise ValueError(f"--critic-ckpt {config.critic_ckpt}: no such folder")
    for name in PATHS:
        if getattr(config, name):
            setattr(config, name, str(Path(getattr(config, name)).resolve()))
    config.run_dir = config.run_dir or new_folder()
    return config


def new_folder(prefix: str = "") -> str:
    """Name a folder for results that no other start names, not even one in the same second."""
    return f"runs/{prefix}{time.strftime('%Y-%m-%d_%H-%M-%S')}_{os.getpid()}"


def make_parser(settings: type, description: str, names: Collection[str] = ()) -> argparse.ArgumentParser:
    """Make a parser with a flag for each setting, or for `names` alone; it raises ValueError where it refuses."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
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


def checkpoint_defaults(folder: Path) -> dict:
    """Return the settings that a checkpoint carries for itself (`rlpa.json`); {} if it carries none."""
    path = folder / "rlpa.json"
    return read_settings(path) if path.is_file() else {}


def read_settings(path: Path) -> dict:
    """Read settings from a JSON file; ValueError that names the file if it holds anything else."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds {type(settings).__name__}, not one JSON object of settings")
    unknown = set(settings) - {f.name for f in dataclasses.fields(Config)}
    if unknown:
        raise ValueError(f"{path} sets {sorted(unknown)}, which are no settings of this trainer")
    return settings


def resumed_config(given: dict) -> Config:
    """Return the config of the run to resume; only the flags that leave the result alone may be given beside it."""
    path = Path(given["resume"]) / "config.json"
    if not path.is_file():
        raise ValueError(f"--resume {given['resume']}: {path} does not exist; give a run folder")
    others = set(given) - {"resume", *RESUMED}
    if others:
        raise ValueError(
            f"--resume takes its settings from {path}; drop {', '.join(flag(name) for name in sorted(others))}"
        )
    settings = read_settings(path)
    for name in {"ckpt", "personas", "eval_personas"} & set(given):
        if not settings.get(name):
            raise ValueError(f"{path} names no {flag(name)}; drop it")
        found = resolve_checkpoint(given[name]) if name == "ckpt" else Path(given[name])
        given[name] = str(found.resolve())
    config = Config(**{**settings, **given, "run_dir": given["resume"]})
    if not config.ckpt:
        raise ValueError(f"{path} names no ckpt; it is not as the run has written it")
    return config
