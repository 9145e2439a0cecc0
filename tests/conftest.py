"""The report of the kernel benchmarks: `pytest tests/ -k bench` ends with one table (`benchmarks/table.py`)."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from benchmarks.measure import versions
from benchmarks.peers import PACKAGES
from benchmarks.table import render

REPORT, START = pytest.StashKey["Report"](), pytest.StashKey[float]()
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")  # no test fails because its machine is busy


def pytest_addoption(parser):
    """Add the options of the benchmarks."""
    parser.addoption(
        "--bench-compile",
        action="store_true",
        help="measure what needs minutes of torch.compile too: on a CPU torch.compile and cut-cross-entropy, on CUDA"
        " torch.compile at every size and not only the first",
    )
    parser.addoption(
        "--bench-seconds", type=float, default=float("inf"), help="begin no further measurement after so many seconds"
    )
    parser.addoption("--bench-json", type=Path, help="file to write all measurements to, anew after each of them")


def pytest_collection_modifyitems(items):
    """Begin with the file that takes longest, so that no worker is left alone with it in the end."""
    items.sort(key=lambda item: "test_triton.py" not in item.nodeid)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """Make room for the measurements, and let ours be the only table."""
    config.stash[REPORT] = Report(file=config.getoption("--bench-json"))
    config.stash[START] = time.monotonic()
    config.option.benchmark_quiet = True
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what is to run in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests of Ctrl-C, and their children, want it


@dataclass
class Report:
    """What has been measured, and notes with the places where they hold; in a file after each measurement."""

    rows: list[dict] = field(default_factory=list)
    notes: dict[str, list[str]] = field(default_factory=dict)
    file: Path | None = None

    def keep(self, row: dict) -> None:
        """Add a measurement, and write all of them: a run may be cut short at any time."""
        self.rows.append(row)
        if self.file:
            found = dict(machine=versions(*PACKAGES.values()), notes=noted(self.notes), rows=self.rows)
            self.file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


@pytest.fixture
def report(request) -> Report:
    """Where measurements are collected; skip once the time is used up."""
    seconds = request.config.getoption("--bench-seconds")
    if time.monotonic() - request.config.stash[START] > seconds:
        request.config.stash[REPORT].notes[f"some measurements left out after {seconds:.0f} s (--bench-seconds)"] = []
        pytest.skip("time is used up (--bench-seconds)")
    return request.config.stash[REPORT]


def noted(notes: dict[str, list[str]]) -> list[str]:
    """Return each note, and where it holds."""
    return [note + (f" ({', '.join(where)})" if where else "") for note, where in notes.items()]


def pytest_terminal_summary(terminalreporter, config):
    """Print the table, if real sizes were measured."""
    rows, kept = config.stash[REPORT].rows, config.stash[REPORT].notes
    if not rows:
        return
    found = versions(*PACKAGES.values())
    absent = [name for name, number in found.items() if number is None]
    notes = [", ".join(f"{name} {number}" for name, number in found.items() if number)]
    notes[0] += f"; load average {os.getloadavg()[0]:.1f}"
    notes += [f"not installed: {', '.join(absent)}"] if absent else []
    terminalreporter.section("kernel benchmarks")
    terminalreporter.write_line(render(rows, [*notes, *noted(kept)]))
