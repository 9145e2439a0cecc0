"""Damage a copy of a run's newest checkpoint in every way: `python -m benchmarks.corrupt runs/NAME`.

Each of its files is cut in half, emptied, gets one bit flipped, and is removed; each time the checkpoint before it must
be found, with one warning. Exit code 1 if it is not. The run needs two checkpoints.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from records import checkpoints


def cut(file: Path) -> None:
    """Keep the first half."""
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path) -> None:
    """Flip one bit, a third of the way in."""
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": cut, "emptied": lambda file: file.write_bytes(b""), "flipped": flip, "removed": Path.unlink
}  # fmt: skip


def damages(checkpoint: Path) -> Iterator[tuple[str, str]]:
    """Do each damage to each file, say which it is, and undo it."""
    for file in sorted(file for file in checkpoint.rglob("*") if file.is_file()):
        content = file.read_bytes()
        for how, damage in DAMAGES.items():
            damage(file)
            yield file.relative_to(checkpoint).as_posix(), how
            file.write_bytes(content)


def main() -> int:
    """Print what was found after each damage, and how many fell back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run with two checkpoints or more")
    before, newest = checkpoints.published(parser.parse_args().run / "checkpoints")[-2:]
    fell_back = total = 0
    with tempfile.TemporaryDirectory(prefix="corrupt-") as root:
        for folder in (before, newest):
            shutil.copytree(folder, Path(root) / folder.name)
        for name, how in damages(Path(root) / newest.name):
            warnings: list[str] = []
            found = checkpoints.newest(Path(root), warnings.append)
            total += 1
            fell_back += found.name == before.name and len(warnings) == 1
            print(f"{name} {how}: {found.name}; {warnings}")
    print(f"{fell_back} of {total} damages: fallback with one warning")
    return int(fell_back < total)


if __name__ == "__main__":
    sys.exit(main())
