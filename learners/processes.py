"""The processes of a run: how they find one another, sum, agree, and end together.

torchrun starts them; rank 0 tells and writes. Without torchrun everything is local: sums and gathers are what they are
given. An error of one rank is raised on all (`together`, `on_rank_0`), so that nobody waits for who has left; and
every wait is bounded.

Reading order: ranks, collectives, agreement, waiting, signals, joining and joining again after a restart, leaving.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from config import Config

Result = TypeVar("Result")


def rank() -> int:
    """Return this process's number, 0 without torch.distributed."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes, 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_initialized() else 1


class LostProcess(Exception):
    """Another process of the run has ended or does not answer."""


@contextmanager
def collective() -> Iterator[None]:
    """Say what it means when processes cannot talk to one another."""
    try:
        yield
    except RuntimeError as error:
        reason = re.sub(r"\[\S*\.cc:\d+\] ", "", str(error)).partition(". ")[0]
        raise LostProcess(f"another process is lost, or has not answered in time ({reason})") from error


@contextmanager
def computing() -> Iterator[None]:
    """Say so where processes that compute together cannot talk; other errors of a computation stay what they are."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or re.match(r"\[\S*gloo\S*:\d+\]", str(error))):
            raise
        with collective():
            raise


def all_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place."""
    if dist.is_initialized():
        with collective():
            dist.all_reduce(tensor)
    return tensor


def gather(item: object) -> list:
    """Collect one picklable object of our own from every rank, in rank order, on every rank."""
    if not dist.is_initialized():
        return [item]
    items: list = [None] * world_size()
    with collective():
        dist.all_gather_object(items, item)
    return items


class AgreedError(ValueError):
    """A ValueError of one rank, raised on all: rank 0 tells of it."""


def attempt(action: Callable[[], Result]) -> Result | AgreedError:
    """Return what `action` returns, or its ValueError."""
    try:
        return action()
    except ValueError as error:
        return AgreedError(str(error))


def agree(outcome: Result | AgreedError) -> Result:
    """Return the outcome of an `attempt`, unless that of any rank is an error, which is raised on all."""
    for failure in gather(outcome if isinstance(outcome, AgreedError) else None):
        if failure:
            raise failure
    return outcome


def together(action: Callable[[], Result]) -> Result:
    """Call `action`, which must not talk to other ranks, on every rank; a ValueError of any is raised on all."""
    return agree(attempt(action))


def on_rank_0(action: Callable[[], Result]) -> Result:
    """Call `action` on rank 0 alone; what it returns or raises, all ranks return or raise."""
    return gather(together(lambda: action() if rank() == 0 else None))[0]


def wait_for_ranks(seconds: float, signals: list[int]) -> None:
    """Wait until every rank is here, or a signal comes: no collective shall wait for somebody's HTTP.

    It asks a key of the store, again and again, so that a signal is seen. Raises LostProcess after `seconds`.
    """
    if not dist.is_initialized():
        return
    with collective():
        store = dist.distributed_c10d._get_default_store()
        number = store.add(f"arrivals of {rank()}", 1)
        here = store.add(f"arrived {number}", 1)
        deadline = time.monotonic() + seconds
        while here < world_size() and not signals:
            if time.monotonic() > deadline:
                raise LostProcess(f"after {seconds:g} s only {here} of {world_size()} processes have played their part")
            time.sleep(0.02)
            here = store.add(f"arrived {number}", 0)


def all_sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Sum the gradients over all ranks, in place: one flat message would copy them all. No gradient counts as 0."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        all_sum(parameter.grad)


@contextmanager
def catch_signals(received: list[int]) -> Iterator[None]:
    """Note SIGTERM and SIGINT (Ctrl-C) in a list while the block runs; a second Ctrl-C ends the process at once."""

    def note(number: int, frame: object) -> None:
        if number == signal.SIGINT in received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not received:  # print is not safe here
            os.write(2, b"\nstopping: a checkpoint is saved first (a second Ctrl-C stops at once)\n")
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def joined_processes(config: Config | AgreedError) -> Iterator[dist.Store | None]:
    """Join the processes that torchrun has started, and part from them at the end.

    config: settings; --collective-timeout bounds every wait, and --shard needs a group even of one process. A process
    whose settings are bad joins, too: the others must hear of it. Yields torchrun's store on rank 0, if there is one.
    """
    settings = Config() if isinstance(config, AgreedError) else config
    take_device()
    store = launcher_store(settings.collective_timeout)
    try:
        join_processes(store, settings.collective_timeout, settings.shard)
        yield store if rank() == 0 else None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def take_device() -> None:
    """Make this process's own GPU the current one: Triton, FSDP and NCCL use it, wherever the tensors are.

    Raises ValueError if the machine has fewer GPUs than processes.
    """
    number, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        if number >= count:
            raise ValueError(f"process {number} of this machine needs a GPU of its own; torch sees {count}: start"
                             f" torchrun with --nproc-per-node {count}")  # fmt: skip
        torch.cuda.set_device(number)


def join_processes(store: dist.Store | None, timeout: float, alone: bool = False) -> None:
    """Join the processes that torchrun has started, if there are several."""
    if (size := int(os.environ.get("WORLD_SIZE", 1))) == 1 and not alone:
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with collective():
        place = {}
        if size == 1:
            place = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        elif store:
            number = int(os.environ["RANK"])
            place = {"store": fresh_store(store, number, size, timeout), "rank": number, "world_size": size}
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout), **place)


def launcher_store(timeout: float) -> dist.Store | None:
    """Return torchrun's key-value store, which outlives the processes that it restarts; None where there is none."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(*address, is_master=False, timeout=timedelta(seconds=timeout))
    return dist.PrefixStore(f"rlpa/{os.environ['TORCHELASTIC_RUN_ID']}", store)


def fresh_store(store: dist.Store, number: int, size: int, timeout: float) -> dist.Store:
    """Return a part of the launcher's store that processes which ended before a restart have not written into.

    In torch 2.13 restarted processes find the addresses of the dead ones and wait for them. Machines count restarts
    each for itself, so rank 0 draws a name; the others cannot tell it from that of an earlier start until it has
    answered what they have just drawn themselves.
    """
    mine = uuid.uuid4().hex
    if number == 0:
        store.set("start", mine)
        store.set(f"{mine}/answer", b" ".join(store.get(f"{mine}/{other}") for other in range(1, size)))
        return dist.PrefixStore(mine, store)
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        start = store.get("start").decode()
        store.set(f"{start}/{number}", mine)
        if store.check([f"{start}/answer"]) and mine.encode() in store.get(f"{start}/answer"):
            return dist.PrefixStore(start, store)
        time.sleep(0.02)
    raise RuntimeError(f"rank 0 did not start within {timeout:g} s")


def leave(code: int) -> NoReturn:
    """End a process with an exit code; one of several ends at once, without the interpreter's finalisation.

    A thread of gloo may still free the tensor of the last collective. It needs the interpreter for that, and aborts the
    process if it meets one that is being finalised ("terminate called without an active exception"). On a busy machine
    this happened, and torchrun reported a run as failed that had been finished.
    """
    if "WORLD_SIZE" not in os.environ:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
