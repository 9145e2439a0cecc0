"""How every program ends: at most one line on stderr, and an exit code.

0 done; 2 something that the user can mend; 130 Ctrl-C; 141 nobody reads the output any more (`… | head`).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from untrusted.plain_text import clean_text, say


def run(program: str, work: Callable[[], int | None]) -> int:
    """Do a program's work and return its exit code, which is what `work` returns unless an error ends it."""
    try:
        try:
            return work() or 0
        finally:
            sys.stdout.flush()  # here, and not at exit, where a pipe without a reader would end in a traceback
    except ValueError as error:
        say(f"{program}: {clean_text(str(error))}", sys.stderr)
        return 2
    except KeyboardInterrupt:
        say(f"{program}: stopped by Ctrl-C", sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
        return 128 + signal.SIGPIPE


def refuse(message: str) -> NoReturn:
    """Raise what argparse objects to as ValueError: one line, without the usage of all flags before it."""
    raise ValueError(message)


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
