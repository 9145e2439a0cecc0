"""Log-probability, entropy and log-sum-exp of given tokens, straight from hidden states.

    z = h Wᵀ / τ      lse = log Σⱼ exp zⱼ      pⱼ = exp(zⱼ − lse)      log p(y) = z_y − lse      H = −Σⱼ pⱼ log pⱼ

    ∂/∂zⱼ = g (δⱼy − pⱼ) − e pⱼ (log pⱼ + H)        for upstream gradients g on log p(y) and e on H

What it saves: N tokens have N · V logits. At V = 151,936 and N = 8,192 those are 4.98 GB in fp32, and a softmax with
its gradient needs them three times. Here only one tile of them exists at a time, in a workspace of a set size. A tile
is a plain matrix product (of cuBLAS or MKL: nothing by hand is faster). It is in fp32, because rounding a logit to bf16
would change log p by as much. Then one row kernel updates four running numbers per token:

    m = max z        s = Σ exp(z − m)        u = Σ exp(z − m) (z − m)        z_y

    log p(y) = (z_y − m) − log s        H = log s − u / s        (differences of small numbers, also for large logits)

The backward computes each tile again and turns it into ∂/∂z in place; two more products give the gradients: 2NDV FLOP
forward, 6NDV backward. Floor: the matrix products. The row kernel moves 4 bytes a logit forward, 4 to 8 backward, out
of the L2 cache if the tile fits there. Where the loss is known beforehand, `ppo_head` does not compute logits twice.

Letters: N action tokens (the rows of the head), D hidden, V vocabulary; a tile has n of the N rows and v of the V ids.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import cpu, head
from kernels.backend import LOWEST, first_order, jit, tl, use_triton

TILE = dict(BLOCK=4096, num_warps=8)  # 16 logits a thread: enough loads in flight, and no spills


def reference_logprob(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0):
    """Return what `linear_logprob` returns, with all logits at once."""
    logits = (hidden @ weight.T).to(head.sum_dtype(hidden)) / temperature  # (N, V)
    log_softmax = logits.log_softmax(-1)
    entropy = -(log_softmax.exp() * log_softmax).sum(-1)
    return log_softmax.gather(-1, targets[:, None])[:, 0], entropy, logits.logsumexp(-1)


# ------------------------------------------------------------------------------------------------- the two row kernels


@jit(do_not_specialize=("first", "stats_stride"))
def fold_kernel(logits, targets, stats, first, v, logits_stride, stats_stride, inv_temperature, BLOCK: tl.constexpr):
    """Fold row `program_id` of a tile, the logits of ids [first, first + v), into its m, s, u and z_y."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    stats += row
    m, s, u = tl.load(stats), tl.load(stats + stats_stride), tl.load(stats + 2 * stats_stride)
    for start in range(0, v, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = tl.load(logits + columns, mask=columns < v, other=float("-inf")) * inv_temperature
        m_new = tl.maximum(m, tl.max(z, 0))
        e = tl.exp(z - m_new)
        scale = tl.exp(m - m_new)
        # beyond v, e is 0 and z is −∞: their product would be NaN
        u = scale * (u + (m - m_new) * s) + tl.sum(tl.where(columns < v, e * (z - m_new), 0.0), 0)
        s = scale * s + tl.sum(e, 0)
        m = m_new
    tl.store(stats, m)
    tl.store(stats + stats_stride, s)
    tl.store(stats + 2 * stats_stride, u)
    target = tl.load(targets + row) - first
    if (target >= 0) & (target < v):
        tl.store(stats + 3 * stats_stride, tl.load(logits + target) * inv_temperature)


@jit(do_not_specialize=("first", "rows_stride"))
def dlogits_kernel(
    logits, out, targets, rows, first, v, logits_stride, out_stride, rows_stride, inv_temperature,
    ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write ∂/∂(h Wᵀ) of row `program_id` of a tile; `rows` holds m, log s, g and, if ENTROPY, H and e of each row."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    out += row * out_stride
    rows += row
    m, log_s, g = tl.load(rows), tl.load(rows + rows_stride), tl.load(rows + 2 * rows_stride)
    target = tl.load(targets + row) - first
    for start in range(0, v, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        log_p = (tl.load(logits + columns, mask=columns < v, other=0.0) * inv_temperature - m) - log_s
        slope = g
        if ENTROPY:
            slope += tl.load(rows + 4 * rows_stride) * (log_p + tl.load(rows + 3 * rows_stride))
        dz = tl.where(columns == target, g, 0.0) - tl.exp(log_p) * slope
        tl.store(out + columns, (dz * inv_temperature).to(out.dtype.element_ty), mask=columns < v)


# ------------------------------------------------------------------------------------ their launchers and their twins


def fold(logits: Tensor, targets: Tensor, first: int, temperature: float, stats: Tensor) -> None:
    """Fold a tile of logits (n, v), of ids [first, first + v), into stats (4, n): m, s, u and z_y of each row."""
    if use_triton(logits):
        strides = logits.stride(0), stats.stride(0)
        fold_kernel[(len(logits),)](logits, targets, stats, first, logits.shape[1], *strides, 1 / temperature, **TILE)
        return
    if cpu.folds(logits):
        cpu.fold(logits, targets, first, temperature, stats)
        return
    for block in head.row_blocks(logits):
        m, s, u, z_y = stats[:, block]
        z = logits[block] / temperature
        head.keep_targets(z, targets[block] - first, z_y)
        m_new = torch.maximum(m, z.amax(1))
        e = z.sub_(m_new[:, None]).exp()
        scale = (m - m_new).exp()
        u.copy_(scale * (u + (m - m_new) * s) + e.mul(z).sum(1))
        s.copy_(scale * s + e.sum(1))
        m.copy_(m_new)


def dlogits(logits: Tensor, targets: Tensor, first: int, temperature: float, rows: Tensor, dtype: torch.dtype):
    """Turn a tile of logits into the gradient of h Wᵀ: in its own memory, or in a new tile where dtype is another.

    rows (3 or 5, n): m, log s, g and, where the entropy has a gradient, H and e of each row.
    """
    if cpu.folds(logits):
        return cpu.dlogits(logits, targets, first, temperature, rows, dtype == torch.bfloat16)
    out = logits if logits.dtype == dtype else torch.empty_like(logits, dtype=dtype)
    if use_triton(logits):
        strides = logits.stride(0), out.stride(0), rows.stride(0)
        dlogits_kernel[(len(logits),)](
            logits, out, targets, rows, first, logits.shape[1], *strides, 1 / temperature, len(rows) == 5, **TILE
        )
        return out
    for block in head.row_blocks(logits):
        m, log_s, g, *entropy_rows = rows[:, block, None]  # (n, 1) each
        log_p = logits[block].div_(temperature).sub_(m).sub_(log_s)  # one by one: m + log s would be rounded
        if entropy_rows:
            H, e = entropy_rows
            dz = (log_p + H).mul_(e).add_(g).mul_(log_p.exp_()).neg_()
        else:
            dz = log_p.exp_().mul_(-g)
        head.add_at_targets(dz, targets[block] - first, g)
        out[block] = dz.div_(temperature)
    return out


def new_stats(N: int, like: Tensor, numbers: int = 4) -> Tensor:
    """Return the running numbers (numbers, N) before the first tile: m is −∞, all others are 0."""
    stats = torch.zeros(numbers, N, dtype=head.sum_dtype(like), device=like.device)
    stats[0] = LOWEST
    return stats


def finish(stats: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return log p(y), H, m and log s (N,) from the finished running numbers."""
    m, s, u, z_y = stats
    log_s = s.log()
    return (z_y - m) - log_s, log_s - u / s, m, log_s


# ---------------------------------------------------------------------------------------------------- forward, backward


class LinearLogprob(torch.autograd.Function):
    """Tiles forward, and the same tiles again backward."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, workspace_bytes):
        stats, workspace = new_stats(len(hidden), hidden), head.new_workspace(workspace_bytes, hidden, len(weight))
        for rows, ids in head.tile_slices(len(hidden), len(weight), len(workspace)):
            logits = head.matmul(hidden[rows], weight[ids].T, workspace)
            fold(logits, targets[rows], ids.start, temperature, stats[:, rows])
        logprobs, entropy, m, log_s = finish(stats)
        ctx.save_for_backward(hidden, weight, targets, m, log_s, entropy)
        ctx.temperature, ctx.workspace_bytes = temperature, workspace_bytes
        ctx.set_materialize_grads(False)
        logsumexp = m + log_s
        ctx.mark_non_differentiable(logsumexp)
        return logprobs, entropy, logsumexp

    @staticmethod
    @first_order
    def backward(ctx, g, e, _):
        hidden, weight, targets, m, log_s, entropy = ctx.saved_tensors
        per_row = torch.stack([m, log_s, torch.zeros_like(m) if g is None else g] + ([] if e is None else [entropy, e]))
        workspace = head.new_workspace(ctx.workspace_bytes, hidden, len(weight))

        def tiles():
            for rows, ids in head.tile_slices(len(hidden), len(weight), len(workspace)):
                logits = head.matmul(hidden[rows], weight[ids].T, workspace)
                per_tile = targets[rows], ids.start, ctx.temperature, per_row[:, rows]
                yield rows, ids, dlogits(logits, *per_tile, hidden.dtype)

        return *head.sum_gradients(hidden, weight, tiles()), None, None, None


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    *,
    workspace_bytes: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log softmax(hidden @ weight.T / temperature)[targets], its entropy (nats) and its log-sum-exp.

    Args:
        hidden: (N, D) hidden states after the final norm.
        weight: (V, D) head weight, of the same dtype.
        targets: (N,) long, token ids in [0, V).
        temperature: > 0; divides the logits, as it did in sampling.
        workspace_bytes: bound on the logits that exist at one time; default `head.tile_bytes`.
    Returns:
        logprobs, entropy and logsumexp, (N,) fp32 each (fp64 for fp64); the first two differentiable, with any
        upstream gradients.
    Raises:
        ValueError: shapes that do not fit, or a temperature that is not positive.

    >>> logprobs, entropy, logsumexp = linear_logprob(torch.zeros(1, 2), torch.eye(2), torch.tensor([1]))
    >>> round(logprobs.item(), 4), round(entropy.item(), 4), round(logsumexp.item(), 4)
    (-0.6931, 0.6931, 0.6931)
    """
    head.check_head(hidden, weight, targets, temperature)
    return LinearLogprob.apply(hidden, weight, targets.contiguous(), temperature, workspace_bytes)
