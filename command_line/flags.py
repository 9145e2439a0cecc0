"""Command-line flags that are read off a class of settings: a field's trailing comment is its `--help`."""

from __future__ import annotations

import inspect
import re
from pathlib import Path


def field_comments(settings: type) -> dict[str, str]:
    """Return the comment that follows each field of a class of settings, and of those it inherits: its `--help`.

    Read from the file: `inspect.getsource` parses all of it, which in Python 3.11 fails now and then beside threads.
    """
    comments: dict[str, str] = {}
    for cls in reversed(settings.__mro__[:-1]):  # a subclass's comment counts
        module = Path(inspect.getfile(cls)).read_text()
        source = re.search(rf"^class {cls.__name__}\b.*?(?=^\S|\Z)", module, re.MULTILINE | re.DOTALL)[0]
        comments |= dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.MULTILINE))
    return comments
