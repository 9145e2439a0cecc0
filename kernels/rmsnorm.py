"""RMSNorm, together with the residual addition before it.

    h = x + residual        r = 1 / √(mean(h²) + ε)        y = w · h · r          (Zhang & Sennrich, arXiv:1910.07467)

    ∂/∂h = r (w g − h r · mean(w g · h r)) + d        ∂/∂w = Σ_rows g · h r       for gradients g on y and d on h

x is what attention or the MLP adds to the residual stream (N, D), h the new stream, and both outputs are wanted: y goes
into the next matrix product, h on to the next addition. ∂/∂h is the gradient of x and of the residual alike.

What it saves: memory-bound from end to end, so the count of bytes is the time. One row fits in registers, hence the
forward reads x and residual once and writes h and y: 4 N D elements, as does the backward (reads g, d and h, writes
∂/∂h). Plain operations in bf16 move about 21 N D, because every intermediate in fp32 is written and read, and keep
6 N D bytes for the backward where this keeps h, 2 N D. Floor at N = 8,192, D = 2,048 in bf16 and 3.35 TB/s: 134 MB,
40 µs each way. Without a residual (a first layer) it is 2 N D forward and 3 N D backward.

∂/∂w sums over rows. Each of a bounded number of programs sums its own rows in registers and writes one row of a
(programs, D) fp32 buffer, which torch then sums: no atomics, so that the same batch gives the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import cpu
from kernels.backend import first_order, jit, tl, use_triton

PROGRAMS = 512  # of the backward: what an H100 or H200 holds at a time at D <= 2,048, and not too many partial sums
LONGEST_ROW = 8192


def tile(D: int) -> dict[str, int]:
    """Choose the tile of a row of D: 8 numbers a thread, one 16-byte load in bf16; ptxas spills with 16.

    >>> tile(896), tile(3584)
    ({'BLOCK': 1024, 'num_warps': 4}, {'BLOCK': 4096, 'num_warps': 16})
    """
    BLOCK = 1 << (D - 1).bit_length()
    return dict(BLOCK=BLOCK, num_warps=max(1, BLOCK // 256))


def reference_rmsnorm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None):
    """Return what `rmsnorm` returns, by plain operations, rounding where Hugging Face does."""
    h = x if residual is None else x + residual
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    y = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(h.dtype)
    return y if residual is None else (y, h)


# ------------------------------------------------------------------------------------------------------------- kernels


@jit()
def forward_kernel(
    x,  # (N, D)
    residual,  # (N, D), or None
    weight,  # (D,)
    y,  # out (N, D)
    h,  # out (N, D): x + residual, or None
    rstd,  # out (N,) fp32: r
    eps,
    RESIDUAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Normalise row `program_id`."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    at = row * D + columns
    stream = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        stream += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        rounded = stream.to(h.dtype.element_ty)
        tl.store(h + at, rounded, mask=inside)
        stream = rounded.to(tl.float32)  # y is the norm of what is stored, which is what the backward reads
    r = tl.rsqrt(tl.sum(stream * stream, 0) / D + eps)
    tl.store(rstd + row, r)
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, (w * (stream * r)).to(y.dtype.element_ty), mask=inside)


@jit(do_not_specialize=("N",))
def backward_kernel(
    g,  # (N, D): gradient of y
    d,  # (N, D): gradient of h, or None
    h,  # (N, D)
    weight,  # (D,)
    rstd,  # (N,) fp32
    dh,  # out (N, D)
    dw,  # out (programs, D) fp32: one partial sum each
    N,
    ADD: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Differentiate rows program_id, program_id + programs, …"""
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    dw_sum = tl.zeros((BLOCK,), tl.float32)
    start = program.to(tl.int64) * D
    for row in range(program, N, programs):
        at = start + columns
        r = tl.load(rstd + row)
        unit = tl.load(h + at, mask=inside, other=0.0).to(tl.float32) * r
        g_row = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
        dw_sum += g_row * unit
        wg = w * g_row
        dh_row = r * (wg - unit * (tl.sum(wg * unit, 0) / D))
        if ADD:
            dh_row += tl.load(d + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dh + at, dh_row.to(dh.dtype.element_ty), mask=inside)
        start += programs * D
    tl.store(dw + program.to(tl.int64) * D + columns, dw_sum, mask=inside)


# ---------------------------------------------------------------------------------------------------- forward, backward


class RMSNormFunction(torch.autograd.Function):
    """The two kernels, by Triton or in C++, on contiguous rows (N, D); keeps the stream and one number a row."""

    @staticmethod
    def forward(ctx, x, weight, eps, residual):
        N, D = x.shape
        y, rstd = torch.empty_like(x), torch.empty(N, dtype=torch.float32, device=x.device)
        h = None if residual is None else torch.empty_like(x)
        if use_triton(x):
            forward_kernel[(N,)](x, residual, weight, y, h, rstd, eps, residual is not None, D, **tile(D))
        else:
            cpu.run_pass("norm_forward", (x, residual, weight, y, h, rstd), N, D, eps)
        ctx.save_for_backward(x if h is None else h, weight, rstd)
        ctx.set_materialize_grads(False)
        return y if h is None else (y, h)

    @staticmethod
    @first_order
    def backward(ctx, g, d=None):
        h, weight, rstd = ctx.saved_tensors
        if g is None:  # only the sum was used
            return d, None, None, d
        (N, D), programs = h.shape, min(len(h), PROGRAMS)
        g, d, dh = g.contiguous(), None if d is None else d.contiguous(), torch.empty_like(h)
        if use_triton(h):
            dw = torch.empty(programs, D, dtype=torch.float32, device=h.device)
            backward_kernel[(programs,)](g, d, h, weight, rstd, dh, dw, N, d is not None, D, **tile(D))
        else:
            dw = torch.zeros(-(-N // cpu.ROWS), D)
            cpu.run_pass("norm_backward", (g, d, h, weight, rstd, dh, dw), N, D)
        return dh, dw.sum(0).to(weight.dtype), None, dh if ctx.needs_input_grad[3] else None


def rmsnorm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """Return y = weight * h / sqrt(mean(h^2) + eps), statistics in fp32, and, given a residual, h = x + residual too.

    Args:
        x: (..., D), D up to 8,192 on the Triton path.
        weight: (D,) scale.
        eps: keeps a row of zeros finite.
        residual: (..., D), what to add x to; None: h is x.
    Returns:
        y (..., D), or y and h; differentiable in x, weight and residual, with any upstream gradients.
    Raises:
        ValueError: shapes that do not fit, or a longer row.

    >>> y, h = rmsnorm(torch.tensor([[1.0, 1.0]]), torch.ones(2), 0.0, residual=torch.tensor([[2.0, -4.0]]))
    >>> y, h
    (tensor([[ 1., -1.]]), tensor([[ 3., -3.]]))
    """
    D = x.shape[-1]
    if weight.shape != (D,) or weight.dtype != x.dtype or (residual is not None and residual.shape != x.shape):
        added = "" if residual is None else f" and residual {tuple(residual.shape)}"
        shapes = f"x {tuple(x.shape)}, weight {tuple(weight.shape)}{added}"
        raise ValueError(f"{shapes} must be (..., D), (D,) and (..., D), x and weight of one dtype")
    if not (use_triton(x) or cpu.passes(x, D)):
        return reference_rmsnorm(x, weight, eps, residual)
    if use_triton(x) and D > LONGEST_ROW:
        raise ValueError(f"rows of {D} numbers; the kernel holds at most {LONGEST_ROW} in registers (--kernels torch)")
    rows = x.reshape(-1, D).contiguous()
    if residual is None:
        return RMSNormFunction.apply(rows, weight.contiguous(), eps, None).view(x.shape)
    y, h = RMSNormFunction.apply(rows, weight.contiguous(), eps, residual.reshape(-1, D).contiguous())
    return y.view(x.shape), h.view(x.shape)
