"""Exact KL divergence of two language models' next-token distributions, straight from both models' hidden states.

    p = softmax(h Wᵀ / τ)  policy        r = softmax(h′ W′ᵀ / τ)  reference        gap δⱼ = log pⱼ − log rⱼ

    KL(p ‖ r) = Σⱼ pⱼ δⱼ          ∂/∂zⱼ = pⱼ (δⱼ − KL)

The usual estimates (KL_ESTIMATORS in `train_rlpa.py`) see only the sampled token. This sees the whole vocabulary, for
one more matrix product. Seven running numbers are updated tile by tile, as in `linear_logprob`; the last sums the gap:

    m, s, u, z_y of the policy        m′, s′ of the reference        c = Σ exp(z − m) ((z − m) − (z′ − m′))

so that KL = c/s − log s + log s′. For two close models the gap itself is summed, and not the difference of two large
sums. Log-prob and entropy of the policy come out of the same pass. 4NDV FLOP forward, 8NDV backward: both products
again, and the policy's two gradients.

Letters: N action tokens (the rows of the head), D hidden, V vocabulary; a tile has n of the N rows and v of the V ids.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import head
from kernels.backend import LOWEST, first_order, jit, tl, use_triton
from kernels.linear_logprob import finish, new_stats

TILE = dict(BLOCK=2048, num_warps=8)  # two logits for each column: half the columns of linear_logprob's tile


def reference_kl(hidden, weight, ref_hidden, ref_weight, targets, temperature=1.0):
    """Return what `linear_kl` returns, with all logits of both models at once."""
    dtype = head.sum_dtype(hidden)
    log_p = ((hidden @ weight.T).to(dtype) / temperature).log_softmax(-1)  # (N, V)
    log_r = ((ref_hidden @ ref_weight.T).to(dtype) / temperature).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_r)).sum(-1)
    return kl, log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


# ------------------------------------------------------------------------------------------------- the two row kernels


@jit(do_not_specialize=("first", "stats_stride"))
def fold_kl_kernel(
    logits, ref_logits, targets, stats, first, v, stride, stats_stride, inv_temperature,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Fold row `program_id` of two tiles into its m, s, u, z_y, m′, s′ and c."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    ref_logits += row * stride
    stats += row
    m, s, u = tl.load(stats), tl.load(stats + stats_stride), tl.load(stats + 2 * stats_stride)
    ref_m, ref_s = tl.load(stats + 4 * stats_stride), tl.load(stats + 5 * stats_stride)
    c = tl.load(stats + 6 * stats_stride)
    for start in range(0, v, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < v
        z = tl.load(logits + columns, mask=inside, other=float("-inf")) * inv_temperature
        ref_z = tl.load(ref_logits + columns, mask=inside, other=float("-inf")) * inv_temperature
        m_new, ref_m_new = tl.maximum(m, tl.max(z, 0)), tl.maximum(ref_m, tl.max(ref_z, 0))
        z, ref_z = z - m_new, ref_z - ref_m_new
        e, ref_e = tl.exp(z), tl.exp(ref_z)
        scale, ref_scale = tl.exp(m - m_new), tl.exp(ref_m - ref_m_new)
        moved = (m - m_new) - (ref_m - ref_m_new)  # the maxima moved: so did every gap that is summed already
        c = scale * (c + moved * s) + tl.sum(tl.where(inside, e * (z - ref_z), 0.0), 0)
        u = scale * (u + (m - m_new) * s) + tl.sum(tl.where(inside, e * z, 0.0), 0)
        s, ref_s = scale * s + tl.sum(e, 0), ref_scale * ref_s + tl.sum(ref_e, 0)
        m, ref_m = m_new, ref_m_new
    tl.store(stats, m)
    tl.store(stats + stats_stride, s)
    tl.store(stats + 2 * stats_stride, u)
    tl.store(stats + 4 * stats_stride, ref_m)
    tl.store(stats + 5 * stats_stride, ref_s)
    tl.store(stats + 6 * stats_stride, c)
    target = tl.load(targets + row) - first
    if (target >= 0) & (target < v):
        tl.store(stats + 3 * stats_stride, tl.load(logits + target) * inv_temperature)


@jit(do_not_specialize=("first", "rows_stride"))
def dlogits_kl_kernel(
    logits, ref_logits, out, targets, rows, first, v, stride, out_stride, rows_stride, inv_temperature,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write ∂/∂(h Wᵀ) of row `program_id`; `rows` holds m, log s, g, H, e, m′, log s′, KL and k of each row."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    ref_logits += row * stride
    out += row * out_stride
    rows += row
    m, log_s, g = tl.load(rows), tl.load(rows + rows_stride), tl.load(rows + 2 * rows_stride)
    entropy, e = tl.load(rows + 3 * rows_stride), tl.load(rows + 4 * rows_stride)
    ref_m, ref_log_s = tl.load(rows + 5 * rows_stride), tl.load(rows + 6 * rows_stride)
    kl, k = tl.load(rows + 7 * rows_stride), tl.load(rows + 8 * rows_stride)
    target = tl.load(targets + row) - first
    for start in range(0, v, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < v
        log_p = (tl.load(logits + columns, mask=inside, other=0.0) * inv_temperature - m) - log_s
        log_r = (tl.load(ref_logits + columns, mask=inside, other=0.0) * inv_temperature - ref_m) - ref_log_s
        p = tl.exp(log_p)
        dz = tl.where(columns == target, g, 0.0) - p * (g + e * (log_p + entropy))
        dz += k * p * (log_p - log_r - kl)
        tl.store(out + columns, (dz * inv_temperature).to(out.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------------ their launchers and their twins


def fold_kl(logits, ref_logits, targets, first: int, temperature: float, stats: Tensor) -> None:
    """Fold tiles (n, v) of both models, of ids [first, first + v), into stats (7, n)."""
    if use_triton(logits):
        strides = logits.stride(0), stats.stride(0)
        fold_kl_kernel[(len(logits),)](
            logits, ref_logits, targets, stats, first, logits.shape[1], *strides, 1 / temperature, **TILE,
        )  # fmt: skip
        return
    for block in head.row_blocks(logits):
        m, s, u, z_y, ref_m, ref_s, c = stats[:, block]
        z, ref_z = logits[block] / temperature, ref_logits[block] / temperature
        head.keep_targets(z, targets[block] - first, z_y)
        m_new, ref_m_new = torch.maximum(m, z.amax(1)), torch.maximum(ref_m, ref_z.amax(1))
        e, ref_e = z.sub_(m_new[:, None]).exp(), ref_z.sub_(ref_m_new[:, None]).exp()
        scale, ref_scale = (m - m_new).exp(), (ref_m - ref_m_new).exp()
        moved, gap = (m - m_new) - (ref_m - ref_m_new), ref_z.neg_().add_(z)
        c.copy_(scale * (c + moved * s) + gap.mul_(e).sum(1))
        u.copy_(scale * (u + (m - m_new) * s) + z.mul_(e).sum(1))
        s.copy_(scale * s + e.sum(1))
        ref_s.copy_(ref_scale * ref_s + ref_e.sum(1))
        m.copy_(m_new)
        ref_m.copy_(ref_m_new)


def dlogits_kl(logits, ref_logits, targets, first: int, temperature: float, rows, dtype) -> Tensor:
    """Turn the policy's tile into the gradient of h Wᵀ, in place if it has this dtype; rows (9, n) as in the kernel."""
    out = logits if logits.dtype == dtype else torch.empty_like(logits, dtype=dtype)
    if use_triton(logits):
        strides = logits.stride(0), out.stride(0), rows.stride(0)
        dlogits_kl_kernel[(len(logits),)](
            logits, ref_logits, out, targets, rows, first, logits.shape[1], *strides, 1 / temperature, **TILE,
        )  # fmt: skip
        return out
    for block in head.row_blocks(logits):
        m, log_s, g, entropy, e, ref_m, ref_log_s, kl, k = rows[:, block, None]  # (n, 1) each
        log_p = logits[block].div_(temperature).sub_(m).sub_(log_s)
        log_r = ref_logits[block].div_(temperature).sub_(ref_m).sub_(ref_log_s)
        p, slope = log_p.exp(), (log_p + entropy).mul_(e).add_(g)
        dz = log_p.sub_(log_r).sub_(kl).mul_(k).sub_(slope).mul_(p)
        head.add_at_targets(dz, targets[block] - first, g)
        out[block] = dz.div_(temperature)
    return out


def new_kl_stats(N: int, like: Tensor) -> Tensor:
    """Return the running numbers (7, N) before the first tile."""
    stats = new_stats(N, like, numbers=7)
    stats[4] = LOWEST
    return stats


def finish_kl(stats: Tensor) -> tuple[Tensor, ...]:
    """Return KL, log p(y), H, m, log s, m′ and log s′ (N,) from the finished running numbers."""
    logprobs, entropy, m, log_s = finish(stats[:4])
    ref_m, ref_s, c = stats[4:]
    ref_log_s = ref_s.log()
    return c / stats[1] - log_s + ref_log_s, logprobs, entropy, m, log_s, ref_m, ref_log_s


# ---------------------------------------------------------------------------------------------------- forward, backward


def both_tiles(hidden, weight, ref_hidden, ref_weight, workspace_bytes: int | None):
    """Yield rows, ids and both models' logits of each tile."""
    space, ref_space = (head.new_workspace(workspace_bytes, hidden, len(weight), models=2) for _ in range(2))
    for rows, ids in head.tile_slices(len(hidden), len(weight), len(space)):
        logits = head.matmul(hidden[rows], weight[ids].T, space)
        yield rows, ids, logits, head.matmul(ref_hidden[rows], ref_weight[ids].T, ref_space)


class LinearKL(torch.autograd.Function):
    """Tiles of both models forward, and the same tiles again backward."""

    @staticmethod
    def forward(ctx, hidden, weight, ref_hidden, ref_weight, targets, temperature, workspace_bytes):
        stats = new_kl_stats(len(hidden), hidden)
        for rows, ids, *both in both_tiles(hidden, weight, ref_hidden, ref_weight, workspace_bytes):
            fold_kl(*both, targets[rows], ids.start, temperature, stats[:, rows])
        kl, logprobs, entropy, *numbers = finish_kl(stats)
        ctx.save_for_backward(hidden, weight, ref_hidden, ref_weight, targets, kl, entropy, *numbers)
        ctx.settings = temperature, workspace_bytes
        return kl, logprobs, entropy

    @staticmethod
    @first_order
    def backward(ctx, k, g, e):
        hidden, weight, ref_hidden, ref_weight, targets, kl, entropy, m, log_s, ref_m, ref_log_s = ctx.saved_tensors
        temperature, workspace_bytes = ctx.settings
        per_row = torch.stack([m, log_s, g, entropy, e, ref_m, ref_log_s, kl, k])
        tiles = (
            (rows, ids, dlogits_kl(*both, targets[rows], ids.start, temperature, per_row[:, rows], hidden.dtype))
            for rows, ids, *both in both_tiles(hidden, weight, ref_hidden, ref_weight, workspace_bytes)
        )
        return *head.sum_gradients(hidden, weight, tiles), *(None,) * 5


def linear_kl(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, targets: Tensor, temperature: float = 1.0,
    *, workspace_bytes: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the exact KL of each token's two distributions, and log p(target) and entropy of the policy.

    Args:
        hidden, ref_hidden: (N, D) and (N, D′) hidden states of policy and reference after their final norms.
        weight, ref_weight: (V, D) and (V, D′) their head weights.
        targets, temperature, workspace_bytes: as for `linear_logprob`; the tiles of both models share the bytes.
    Returns:
        kl (KL(policy ‖ reference)), logprobs and entropy, (N,) fp32 each, in nats. They are differentiable in hidden
        and weight; the reference is a constant.
    Raises:
        ValueError: shapes that do not fit, or a temperature that is not positive.

    >>> h, W = torch.zeros(1, 2), torch.eye(2)
    >>> [round(x.item(), 4) for x in linear_kl(h, W, torch.tensor([[1.0, 0.0]]), W, torch.tensor([0]))]
    [0.1201, -0.6931, 0.6931]
    """
    head.check_head(hidden, weight, targets, temperature)
    head.check_head(ref_hidden, ref_weight, targets, temperature)
    if len(weight) != len(ref_weight):
        raise ValueError(f"policy and reference must have equally many ids, not {len(weight)} and {len(ref_weight)}")
    tensors = hidden, weight, ref_hidden, ref_weight, targets.contiguous()
    return LinearKL.apply(*tensors, temperature, workspace_bytes)
