"""Time, memory and floors of one call, in the process that runs it.

Time: the median of several rounds. On CUDA by events, each round after a write of 1 GiB that empties the L2 cache and
gives the CPU the time to queue the call's launches; on a CPU by the wall clock.

Memory: the peak of the bytes that exist beyond the inputs and what the call returns (outputs or gradients). On a CPU
exactly, from the profiler's record of torch's allocations: scratch buffers inside a BLAS are not torch's, and not seen.
On CUDA `max_memory_allocated` less the bytes returned, which flatters a call that peaks before its gradients exist.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

Result = dict[str, Tensor]
SECONDS = 0.5  # of rounds for one number


def package_version(name: str) -> str | None:
    """Return an installed package's version."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def versions(*packages: str) -> dict[str, str | None]:
    """Return what is measured on, and with."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    found = {name: package_version(name) for name in ("torch", "triton", *packages)}
    return dict(device=card, machine=platform.machine(), python=platform.python_version(), **found)


def synchronize(device: str) -> None:
    """Wait for a device."""
    if device == "cuda":
        torch.cuda.synchronize()


def nbytes(result: Result) -> int:
    """Return the bytes of all tensors of a result."""
    return sum(x.nbytes for x in result.values())


def allocations(prof: profile) -> list[tuple[int, int]]:
    """Return address and size of every allocation (size > 0) and release (size < 0) on the CPU, in order of time."""
    found, todo = [], list(prof.profiler.kineto_results.experimental_event_tree())
    while todo:
        event = todo.pop()
        todo += event.children
        if event.tag == _EventType.Allocation:
            found.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    return [(address, size) for _, address, size in sorted(found, key=lambda event: event[0])]


def extra_peak(events: list[tuple[int, int]], returned: set[int]) -> int:
    """Return the peak of the bytes that exist, without the last allocation at each returned address.

    A release of what was there before the record began counts nothing: garbage may be collected at any moment.

    >>> extra_peak([(9, -500), (1, 100), (2, 40), (1, -100), (1, 7)], returned={1})
    140
    """
    last = {address: i for i, (address, size) in enumerate(events) if size > 0 and address in returned}
    alive: dict[int, int] = {}  # address: bytes
    extra = peak = 0
    for i, (address, size) in enumerate(events):
        if size < 0:
            extra -= alive.pop(address, 0)
        elif last.get(address) != i:
            alive[address] = size
            extra += size
            peak = max(peak, extra)
    return peak


def run_once(call: Callable[[], Result], device: str) -> tuple[Result, int, float]:
    """Run a call; return its result, its extra bytes and its seconds."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, start = torch.cuda.memory_allocated(), time.perf_counter()
        result = call()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return result, max(0, torch.cuda.max_memory_allocated() - before - nbytes(result)), seconds
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        start = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - start
    returned = {x.untyped_storage().data_ptr() for x in result.values()}
    return result, extra_peak(allocations(prof), returned), seconds


class Clock:
    """Time single calls on a device: `flush` before each, then `time`, which keeps the seconds that `now` tells."""

    def __init__(self, device: str, now: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: list[float] = []
        self.now = now
        self.flushed = torch.empty(1 << 30, dtype=torch.uint8, device=device) if device == "cuda" else None

    def flush(self) -> None:
        """Empty the L2 cache of a GPU, without waiting for it."""
        if self.flushed is not None:
            torch.cuda.synchronize()
            self.flushed.zero_()

    def time(self, call: Callable[[], object]) -> None:
        """Run the call to its end, and keep how long it took."""
        if self.flushed is None:
            start = self.now()
            call()
            self.seconds.append(self.now() - start)
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        self.seconds.append(start.elapsed_time(end) / 1e3)

    def median(self) -> float:
        """Return the median of the seconds kept."""
        return statistics.median(self.seconds)


def count_rounds(seconds: float, device: str) -> int:
    """Choose how often to time a call that takes about so many seconds: an odd number, where it is cheap."""
    fewest, most = (5, 51) if device == "cuda" else (1, 15)
    return max(fewest, min(most, int(SECONDS / max(seconds, 1e-6)))) | 1


def median_seconds(call: Callable[[], object], device: str, now: Callable[[], float] = time.perf_counter) -> float:
    """Return the median time of a call, after one that is not counted."""
    start = time.perf_counter()
    call()
    synchronize(device)
    clock = Clock(device, now)
    for _ in range(count_rounds(time.perf_counter() - start, device)):
        clock.flush()
        clock.time(call)
    return clock.median()


def product_seconds(
    N: int, D: int, V: int, dtype: torch.dtype, device: str, now: Callable[[], float] = time.perf_counter
) -> tuple[float, float, float]:
    """Time three bare products: outputs (N, V), gradients of inputs (N, D) and of the weight (V, D)."""
    hidden, weight = (torch.randn(rows, D, device=device).to(dtype) for rows in (N, V))
    logits = torch.empty(N, V, device=device, dtype=dtype)
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)
    products = (
        lambda: torch.mm(hidden, weight.T, out=logits),
        lambda: torch.mm(logits, weight, out=d_hidden),
        lambda: torch.mm(logits.T, hidden, out=d_weight),
    )
    return tuple(median_seconds(product, device, now) for product in products)


def copy_seconds(moved: int, device: str) -> float:
    """Return the time of a copy that reads and writes `moved` bytes in all."""
    source = torch.ones(moved // 8, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return median_seconds(lambda: target.copy_(source), device)
