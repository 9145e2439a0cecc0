"""How every program ends: at most one line on stderr, and an exit code.

0 done; 2 something that the user can mend; 130 Ctrl-C; 141 nobody reads the output any more (`… | head`).

What only shows a result decides neither: `lasting_output` for what is printed, `decorative` for pictures.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TextIO

from untrusted.plain_text import clean_text, say, shorten, warn


def run(program: str, work: Callable[[], int | None]) -> int:
    """Do a program's work and return its exit code, which is what `work` returns unless an error ends it."""
    try:
        with lasting_output(BrokenPipeError):
            try:
                return work() or 0
            except BrokenPipeError:
                raise
            except (ValueError, OSError) as error:  # an OSError names the file
                say(f"{program}: {clean_text(str(error))}", sys.stderr)
                return 2
            except KeyboardInterrupt:
                say(f"{program}: stopped by Ctrl-C", sys.stderr)
                return 128 + signal.SIGINT
    except BrokenPipeError:
        discard(sys.stdout)
        return 128 + signal.SIGPIPE


@contextmanager
def lasting_output(*passed: type[OSError]) -> Iterator[None]:
    """Let the block print whatever it wants, wherever it runs: what cannot be shown or written ends nothing.

    A character that the terminal's encoding lacks becomes an escape. A stream that was closed before the start is
    silent. One that fails (a full disk, a terminal that has gone) is silent from then on, after one warning, unless the
    error is one of `passed`.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (Lasting(stream or open(os.devnull, "w", encoding="utf-8"), passed) for stream in before)
    try:
        yield
    finally:
        try:
            sys.stdout.flush()  # here, and not at exit, where a pipe without a reader would end in a traceback
        finally:
            sys.stdout, sys.stderr = before


class Lasting:
    """An output stream as `lasting_output` describes it."""

    def __init__(self, stream: TextIO, passed: tuple[type[OSError], ...]) -> None:
        self.stream, self.passed = stream, passed
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write a text, or lose it."""
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Write what is still in the buffer, or lose it."""
        self.attempt(self.stream.flush)

    def attempt(self, action: Callable, *arguments: str) -> None:
        """Call `action`; if it fails, whatever comes is discarded."""
        try:
            action(*arguments)
        except OSError as error:
            if isinstance(error, self.passed):
                raise
            discard(self.stream)
            warn(f"{self.stream.name} is silent from here on: {error.strerror}")  # is it stderr: to nobody


def discard(stream: TextIO) -> None:
    """Send to nowhere what a stream still holds and gets, so that the flush at exit does not fail as well."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Let the block write a file or folder; ValueError that names it if that fails: an error of `write` names none."""
    try:
        yield
    except OSError as error:
        where, why = error.filename or path, error.strerror or error
        raise ValueError(f"{where} cannot be written: {why}; make room, or write elsewhere") from None


@contextmanager
def decorative(what: str) -> Iterator[None]:
    """Go on where the block fails, with a warning that names what is missing: it only shows a result.

    The block may draw and show, and nothing else. Ctrl-C ends it as ever.
    """
    try:
        yield
    except Exception as error:  # a library that is absent or broken, fonts, a full disk: the result stands without it
        warn(f"{what} is left out: {type(error).__name__}: {shorten(str(error), 200)}")


class Parser(argparse.ArgumentParser):
    """A parser that takes whole names of flags, and raises ValueError: one line, without the usage of all flags.

    may_be_empty: flags that mean something with "". Any other is refused then: a variable of the shell is not set.
    """

    may_be_empty: tuple[str, ...] = ("--first-user-message",)

    def __init__(self, prog: str | None = None, description: str = "") -> None:
        shown = {"description": description, "formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(prog, allow_abbrev=False, **shown)

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        raise ValueError(message)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse; ValueError for a flag that is given "" and cannot be empty."""
        words = sys.argv[1:] if args is None else list(args)
        for name, value in (*itertools.pairwise(words), *(word.partition("=")[::2] for word in words if "=" in word)):
            if name.startswith("--") and not value and name not in self.may_be_empty:
                raise ValueError(f'{name} is given "", as by a variable of the shell that is not set; leave it out')
        return super().parse_known_args(words, namespace)


def check_prices(price_in: float | None, price_out: float | None) -> None:
    """Raise ValueError if one price is given without the other, which would count as 0; None: not given."""
    if (price_in is None) != (price_out is None):
        given, missing = ("--price-in", "--price-out") if price_out is None else ("--price-out", "--price-in")
        price = price_in if price_out is None else price_out
        raise ValueError(f"{given} {price:g} needs {missing} too (dollars per million tokens; 0 if those are free)")


def tell(program: str, error: str) -> None:
    """Print an error as one line, and leave it for the report that torchrun ends with."""
    error = clean_text(error)
    say(f"{program}: {error}", sys.stderr)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        shown = {"message": error, "extraInfo": {"timestamp": int(time.time())}}
        Path(path).write_text(json.dumps({"message": shown}), encoding="utf-8")
