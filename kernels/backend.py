"""The switch between Triton and torch.

Every public function of this package has two paths that compute the same thing. `triton` runs the kernels, on CUDA
tensors, or on CPU tensors when TRITON_INTERPRET=1 was set before Python started (slow: for tests). `torch` runs on
anything. `auto`, the default, is triton for CUDA tensors and torch for the rest.
"""

from __future__ import annotations

import os
from functools import wraps

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # there is no Triton for macOS: the torch paths serve
    triton = tl = None

BACKENDS = ("auto", "triton", "torch")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LOWEST = -1e30  # "−∞" before the first number of a running maximum, finite because −∞ − −∞ is NaN
chosen = "auto"  # what `set_backend` was told last


def set_backend(name: str) -> None:
    """Choose the path of every kernel call from here on; ValueError for an unknown one, or Triton where it cannot run.

    >>> set_backend("cuda")
    Traceback (most recent call last):
    ValueError: kernels 'cuda': choose auto, triton or torch (--kernels)
    """
    global chosen
    if name not in BACKENDS:
        raise ValueError(f"kernels {name!r}: choose auto, triton or torch (--kernels)")
    if name == "triton" and (triton is None or not (torch.cuda.is_available() or INTERPRETED)):
        raise ValueError("--kernels triton needs triton and a CUDA device; --kernels torch runs here")
    chosen = name


def use_triton(x: Tensor) -> bool:
    """Say whether a call on this tensor runs the Triton path."""
    return chosen == "triton" or chosen == "auto" and x.is_cuda and triton is not None


def send(numbers: list, device: torch.device) -> Tensor:
    """Return whole numbers as a long tensor on a device, without waiting for what the device does now.

    A copy from pinned memory stands in the device's queue like a kernel. One from other memory waits for all before it.
    """
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=torch.long, device=device)
    return torch.tensor(numbers, dtype=torch.long, pin_memory=True).to(device, non_blocking=True)


def contiguous_rows(*tensors: Tensor) -> list[Tensor]:
    """Return tensors of which every row x[i] is contiguous: parts of a wider product as they are, others as copies.

    >>> x = torch.zeros(2, 3, 4)
    >>> [found.data_ptr() == x.data_ptr() for found in contiguous_rows(x[:, :2], x[:, :, :2])]
    [True, False]
    """
    return [x if x[:1].is_contiguous() else x.contiguous() for x in tensors]


def jit(do_not_specialize: tuple[str, ...] = ()):
    """Make a Triton kernel of the decorated function.

    Triton compiles anew when an integer becomes 1 or a multiple of 16. Arguments that count tokens differ in every
    call: they are listed here, and two lengths share one binary.
    """
    return lambda fn: triton.jit(fn, do_not_specialize=do_not_specialize) if triton else fn


def first_order(backward):
    """Make a backward refuse create_graph=True: what it returns has no graph, and a penalty on it would count as 0."""

    @wraps(backward)
    def checked(ctx, *gradients):
        if torch.is_grad_enabled():
            raise RuntimeError("the kernels have no second derivative: create_graph=True does not go through them")
        return backward(ctx, *gradients)

    return checked
