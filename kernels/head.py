"""What the three head kernels share: fp32 matrix products in a bounded workspace, tiles, and sums of gradients.

Letters: N rows of a head, one per action token; D hidden, V vocabulary. A tile of the (N, V) logits has n of the rows
and v of the ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from kernels import cpu

CACHED_ELEMENTS = 1 << 18  # 1 MiB of fp32: what a core's cache holds
TILE_BYTES = 64 << 20  # of logits that exist at one time, where no L2 cache is known: on a CPU


def sum_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that sums over x are kept in: fp32, or fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def tile_bytes(device: torch.device) -> int:
    """Return the bytes of logits that exist at one time: on CUDA half of the L2 cache, whose rest the operands need."""
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) if device.type == "cuda" else 0
    return cache // 2 or TILE_BYTES


def new_workspace(nbytes: int | None, hidden: Tensor, V: int, models: int = 1) -> Tensor:
    """Return one of `models` flat buffers that share nbytes (None: `tile_bytes`) for logits, in the dtype of sums.

    It is smaller if all (N, V) need fewer.
    """
    nbytes = (tile_bytes(hidden.device) if nbytes is None else nbytes) // models
    dtype = sum_dtype(hidden)
    everything = len(hidden) * (-(-V // 128) * 128)  # whole tiles
    return torch.empty(min(nbytes // dtype.itemsize, max(128, everything)), dtype=dtype, device=hidden.device)


def matmul(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """Write a @ b to out in fp32, or add it to what out holds; return the product (n, v), or the sum.

    out: (n, v), or a flat workspace, whose first n * v numbers are used. Nothing is rounded to half precision.
    """
    if out.dim() == 1:
        out = out[: len(a) * b.shape[1]].view(len(a), b.shape[1])
    if cpu.multiplies(a, b, out):
        cpu.product(a, b, out, add)
        return out
    if a.dtype != out.dtype and not a.is_cuda:
        a, b = a.to(out.dtype), b.to(out.dtype)  # on a CPU torch has no product of half-precision matrices that does
    dtype = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    return torch.addmm(out, a, b, out=out, **dtype) if add else torch.mm(a, b, out=out, **dtype)


def sum_gradients(hidden: Tensor, weight: Tensor, tiles: Iterable[tuple[slice, slice, Tensor]]):
    """Return the gradients of hidden (N, D) and weight (V, D), summed over tiles of the gradient of hidden @ weight.T.

    Sums are fp32 for inputs of any dtype, because rounding the part of each tile to bf16 would bias them.

    tiles: rows, ids and gradient (n, v) of each tile, in the order of `tile_slices`.
    """
    empty = torch.empty_like if len(hidden) else torch.zeros_like  # without rows there is no tile that fills them
    d_hidden = empty(hidden, dtype=sum_dtype(hidden))
    d_weight = empty(weight) if weight.requires_grad else None
    for rows, ids, dz in tiles:
        matmul(dz, weight[ids], d_hidden[rows], add=ids.start > 0)
        if d_weight is None:
            continue
        if rows.start == 0:  # the sums of these ids, in a buffer of their own where the gradient itself is not fp32
            same = d_weight.dtype == d_hidden.dtype
            sums = d_weight[ids] if same else torch.empty_like(weight[ids], dtype=d_hidden.dtype)
        matmul(dz.T, hidden[rows], sums, add=rows.start > 0)
        if not same and rows.stop == len(hidden):
            d_weight[ids] = sums
    return d_hidden.to(hidden.dtype), d_weight


def row_blocks(x: Tensor) -> list[slice]:
    """Cut the rows of x (n, v) into blocks that fit in a core's cache, for several passes each; one block on CUDA."""
    rows = len(x) if x.is_cuda else max(1, CACHED_ELEMENTS // x.shape[1])
    return [slice(start, start + rows) for start in range(0, len(x), rows)]


def tile_slices(N: int, V: int, elements: int) -> Iterator[tuple[slice, slice]]:
    """Cut (N, V) into tiles of at most `elements` logits; yield the rows and ids of each, all rows before the next ids.

    >>> [(rows.stop, ids.stop) for rows, ids in tile_slices(3, 300, 512)]
    [(3, 128), (3, 256), (3, 300)]
    """
    if elements < 128:
        raise ValueError(f"workspace_bytes makes {elements} logits; a tile needs at least 128")
    height = max(1, min(N, 4096, elements // 128))
    width = min(V, elements // height // 128 * 128)
    for first in range(0, V, width):
        for start in range(0, N, height):
            yield slice(start, min(N, start + height)), slice(first, min(V, first + width))


def check_head(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> None:
    """Check the inputs of a head: hidden (N, D), weight (V, D), targets (N,) long in [0, V), temperature > 0.

    On CUDA the range of the targets is not checked, because the host would have to wait for the device. Raises
    ValueError for everything else.
    """
    N, V = hidden.shape[:1], len(weight)
    if hidden.dim() != 2 or weight.dim() != 2 or not V or hidden.shape[1] != weight.shape[1] or targets.shape != N:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and targets {tuple(targets.shape)}"
            " must be (N, D), (V, D) and (N,)"
        )
    if weight.dtype != hidden.dtype or not hidden.device == weight.device == targets.device:
        raise ValueError(f"weight is {weight.dtype} on {weight.device}, hidden {hidden.dtype} on {hidden.device}")
    if targets.dtype != torch.long or not targets.is_cuda and bool(((targets < 0) | (targets >= V)).any()):
        raise ValueError(f"targets must be long ids in [0, {V})")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be positive (--temperature)")


def keep_targets(z: Tensor, columns: Tensor, z_y: Tensor) -> None:
    """Copy each target's logit from tile z (n, v) to z_y (n,), for rows whose target column is in the tile."""
    inside = (columns >= 0) & (columns < z.shape[1])
    z_y.copy_(torch.where(inside, z.gather(1, (columns * inside)[:, None])[:, 0], z_y))


def add_at_targets(dz: Tensor, columns: Tensor, g: Tensor) -> None:
    """Add g (n, 1) to the target's element of each row of tile dz (n, v), for rows whose target is in the tile."""
    inside = (columns >= 0) & (columns < dz.shape[1])
    dz.scatter_add_(1, (columns * inside)[:, None], g * inside[:, None])
