"""Kernel benchmarks: each kernel at each size, plain torch, ours and each installed peer.

    pytest tests/ -k bench                                  real sizes, and one table at the end
    pytest tests/ -k "bench and ppo_head and not bar"       a part: by kernel, size, implementation or direction
    pytest tests/ -k bench --bench-json FILE                the same numbers as JSON, written anew after each
    pytest tests/ -k bench --bench-compile                  with what needs minutes of torch.compile
    pytest tests/ -k bench --bench-seconds 240              as much as begins in that time

Without "bench" in -k everything runs once at a tiny size, so that it cannot rot. What is measured, how, and against
what stands in `benchmarks/`. Nothing here fails on time: results must be finite, and ours as exact as plain torch.
"""

from __future__ import annotations

import statistics

import pytest
import torch

from benchmarks import cases
from benchmarks.measure import Clock, count_rounds, run_once
from benchmarks.peers import PEERS, installed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
ONCE = 4.0
COMPILED_ON_A_CPU = ("CCE", "CCE_exact")


def is_real(config) -> bool:
    """Say whether real sizes were asked for."""
    return "bench" in config.option.keyword


def implementations(kernel: str, slow: bool) -> list[str]:
    """Name what is measured for a kernel beside torch.compile."""
    peers = [name for name, (module, _) in PEERS[kernel].items() if installed(module)]
    return ["eager", "ours", *(name for name in peers if slow or DEVICE == "cuda" or name not in COMPILED_ON_A_CPU)]


def pytest_generate_tests(metafunc):
    """Make one test of each size, kernel, direction and implementation: a case's side by side, torch.compile last."""
    if "implementation" not in metafunc.fixturenames:
        return
    real, slow = is_real(metafunc.config), metafunc.config.getoption("--bench-compile")
    sizes = (cases.CUDA if DEVICE == "cuda" else cases.CPU) if real else (cases.TINY,)
    compiled = sizes if slow else sizes[: DEVICE == "cuda" and real]
    every = [
        (size, kernel, direction)
        for size in sizes
        for kernel, (_, directions) in cases.KERNELS.items()
        if size.kernels is None or kernel in size.kernels
        for direction in directions
    ]
    tests = [(*one, name) for one in every for name in implementations(one[1], slow)]
    tests += [(*one, "compile") for one in every if one[0] in compiled and one[1] != "sample_head"]
    metafunc.parametrize(
        ("size", "kernel", "direction", "implementation"),
        [pytest.param(*test, id="-".join((test[0].name, *test[1:]))) for test in tests],
    )


@pytest.fixture(scope="module")
def made() -> dict:
    """The case made last: two do not fit."""
    return {}


def case_of(made: dict, size: cases.Size, kernel: str) -> cases.Case:
    """Return the case, made anew if the last test had another."""
    if made.get("key") != (size, kernel):
        made.clear()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
        made |= dict(key=(size, kernel), case=cases.KERNELS[kernel][0](size, DTYPE, DEVICE))
    return made["case"]


def function_of(case: cases.Case, implementation: str):
    """Return what an implementation's name stands for."""
    if implementation == "compile":
        torch._dynamo.reset()
        return torch.compile(case.eager, dynamic=False)
    return getattr(case, implementation, None) or PEERS[case.kernel][implementation][1]


def relative_error(case: cases.Case, direction: str, result: dict, implementation: str) -> tuple[float | None, str]:
    """Return the largest error over eager's, and what is wrong with it.

    Ours must stay within twice eager's and a rounding of the dtype; a peer's error is only shown.
    """
    errors, eager = case.errors(result), case.eager_errors
    if direction not in eager:
        own = implementation == "eager"
        eager[direction] = errors if own else case.errors(case.call(case.eager, direction)())
    truth = case.expected(result) if case.expected else case.truth
    wrong = []
    for name in errors if implementation == "ours" else ():
        scale = truth[name].abs().max().item()
        eps = torch.finfo(DTYPE).eps * scale * (1 if DEVICE == "cuda" else 10)
        if not errors[name] <= 2 * eager[direction][name] + eps:
            wrong.append(f"{name} is {errors[name]:.3g} off, eager {eager[direction][name]:.3g}")
    known = [errors[name] / eager[direction][name] for name in errors if eager[direction].get(name)]
    return max(known, default=None), "; ".join(wrong)


def attempt(call) -> tuple[dict, int, float] | Exception:
    """Run once; return the exception of a peer that fails instead of raising it into pytest-benchmark's statistics."""
    try:
        return run_once(call, DEVICE)
    except Exception as error:  # whatever a peer does, or eager out of memory, is reported and ends nothing else
        return error.with_traceback(None)  # its frames hold tensors


def measure(benchmark, call, real: bool) -> tuple[dict, int, list[float]]:
    """Return a call's result, its extra bytes and its times; a run of more than ONCE seconds is all there is.

    pytest-benchmark's own statistics are of the run that measures memory; our numbers are in its extra_info.
    """
    if DEVICE == "cuda":
        attempt(call)  # compiles and tunes
    first = benchmark.pedantic(attempt, args=(call,), rounds=1)
    if isinstance(first, Exception):
        raise first
    result, extra_bytes, seconds = first
    if not real or seconds > ONCE:
        return result, extra_bytes, [seconds]
    clock = Clock(DEVICE)
    for _ in range(count_rounds(seconds, DEVICE)):
        clock.flush()
        clock.time(call)
    return result, extra_bytes, clock.seconds


def load(kernel: str, implementation: str, direction: str) -> None:
    """Run an implementation at the tiny size, so that its imports are in nobody's time."""
    tiny = cases.KERNELS[kernel][0](cases.TINY, DTYPE, DEVICE)
    attempt(tiny.call(function_of(tiny, implementation), direction))


def test_bench_kernel(benchmark, made, report, request, size, kernel, direction, implementation):
    """Guards every implementation against rot, NaN and inexact results; measures, where real sizes are asked for."""
    real, notes = is_real(request.config), report.notes
    if DEVICE == "cpu" and real and not request.config.getoption("--bench-compile"):
        notes["left out on a CPU: torch.compile, CCE (--bench-compile)"] = []
    case = case_of(made, size, kernel)
    where = f"{kernel} {size.name} {direction}"
    call = case.call(function_of(case, implementation), direction)
    if real and DEVICE == "cpu":
        load(kernel, implementation, direction)
    try:
        result, extra_bytes, times = measure(benchmark, call, real)
    except Exception as error:
        if implementation == "ours":
            raise
        reason = " ".join(f"{implementation}: {type(error).__name__}: {error}".split())[:300]
        notes.setdefault(reason, []).append(where)
        pytest.skip(f"{where}, {reason}")
    finite = all(x.isfinite().all() for x in result.values())
    error, wrong = None, "" if finite else "not finite"
    if finite and size.truth:
        error, wrong = relative_error(case, direction, result, implementation)
    if wrong:
        notes.setdefault(f"{implementation}: {wrong}", []).append(where)
    del result
    if real:  # what was measured is kept, right or wrong
        keep(benchmark, report, case, direction, implementation, times, extra_bytes, error)
    assert not wrong or implementation != "ours", wrong


def keep(benchmark, report, case, direction, implementation, times, extra_bytes, error) -> None:
    """Add a measurement to the table and the JSON."""
    row = dict(
        kernel=case.kernel, shape=case.shape, direction=direction, implementation=implementation,
        seconds=statistics.median(times), times=times, work=case.work[direction],
        unit="FLOP" if (case.kernel, direction) in cases.PRODUCTS else "bytes",
        floor=case.floor(direction), extra_bytes=extra_bytes, error=error,
    )  # fmt: skip
    benchmark.group = f"{case.kernel} {case.shape} {direction}"
    benchmark.extra_info.update(row)
    report.keep(row)
