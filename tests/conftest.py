"""The report of the kernel benchmarks: `pytest tests/ -k bench` ends with one table (`benchmarks/table.py`)."""

from __future__ import annotations

import os
import platform
import signal
import time
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
from hypothesis import HealthCheck, settings

from benchmarks.peers import PACKAGES
from benchmarks.table import render

ROWS, NOTES = pytest.StashKey[list[dict]](), pytest.StashKey[dict[str, list[str]]]()
START = pytest.StashKey[float]()
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


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """Make room for the measurements, and let ours be the only table."""
    config.stash[ROWS], config.stash[NOTES], config.stash[START] = [], {}, time.monotonic()
    config.option.benchmark_quiet = True
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what is to run in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests of Ctrl-C, and their children, want it


@pytest.fixture
def report(request) -> tuple[list[dict], dict[str, list[str]]]:
    """Where measurements, and notes with the places where they hold, are collected; skip once the time is used up."""
    seconds = request.config.getoption("--bench-seconds")
    if time.monotonic() - request.config.stash[START] > seconds:
        request.config.stash[NOTES][f"some measurements left out after {seconds:.0f} s (--bench-seconds)"] = []
        pytest.skip("time is used up (--bench-seconds)")
    return request.config.stash[ROWS], request.config.stash[NOTES]


def package_version(name: str) -> str | None:
    """Return an installed package's version."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def noted(notes: dict[str, list[str]]) -> list[str]:
    """Return each note, and where it holds."""
    return [note + (f" ({', '.join(where)})" if where else "") for note, where in notes.items()]


def versions() -> dict[str, str | None]:
    """Return what was measured with, and on what."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    found = {name: package_version(name) for name in ("torch", "triton", *PACKAGES.values())}
    return dict(device=card, machine=platform.machine(), python=platform.python_version(), **found)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config, machine_info):
    """Write card and versions to the JSON of --benchmark-json."""
    machine_info.update(versions(), notes=noted(config.stash[NOTES]))


def pytest_terminal_summary(terminalreporter, config):
    """Print the table, if real sizes were measured."""
    rows = config.stash[ROWS]
    if not rows:
        return
    found = versions()
    absent = [name for name, number in found.items() if number is None]
    notes = [", ".join(f"{name} {number}" for name, number in found.items() if number)]
    notes[0] += f"; load average {os.getloadavg()[0]:.1f}"
    notes += [f"not installed: {', '.join(absent)}"] if absent else []
    terminalreporter.section("kernel benchmarks")
    terminalreporter.write_line(render(rows, [*notes, *noted(config.stash[NOTES])]))
