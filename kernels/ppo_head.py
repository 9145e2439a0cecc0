"""The PPO loss of sampled tokens straight from hidden states: loss and gradients in three head products, not four.

    ratio = exp(log p(y) − log p_old(y))                                                       clamped to exp(±20)
    loss  = Σ −min(ratio · A, clip(ratio, 1 − ε, 1 + ε) · A) − c_H · H + c_KL · KL             (arXiv 1707.06347, eq. 7)

KL to a reference is either k3 of the sampled token or exact over the vocabulary (`linear_kl`). A is constant.

What it saves: `linear_logprob` with a loss behind it computes the logits twice, since the loss's gradient comes only
after the last log-prob: 8NDV FLOP. But everything that this loss needs besides log p(y) is known before the forward.
So the loop over chunks of tokens does all of it while a chunk's logits exist: products, m, s, u, log p(y), loss and its
slope ∂loss/∂log p(y), gradient of the logits in place, and the two products of the gradient: 6NDV. The backward only
multiplies by the upstream gradient. With the exact KL it is 8NDV, for the reference's logits.

Memory: a chunk's logits (half as much again if the inputs are bf16: the operands of the gradient's products are too),
beside the gradients themselves. Larger chunks read and write the (V, D) gradient of the head less often.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels import head
from kernels.backend import first_order, jit, tl, use_triton
from kernels.kl_estimates import kl_estimates
from kernels.linear_kl import dlogits_kl, finish_kl, fold_kl, new_kl_stats, reference_kl
from kernels.linear_logprob import dlogits, finish, fold, new_stats, reference_logprob

WORKSPACE = {"cpu": 256 << 20, "cuda": 1 << 30}  # bytes of logits at one time: 1,766 tokens of 151,936 on CUDA
TILE = dict(BLOCK=256, num_warps=2)


class Settings(NamedTuple):
    """What `ppo_head` is told besides tensors."""

    temperature: float
    clip_eps: float
    entropy_coef: float
    kl_coef: float


def token_losses(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, ref_logprobs: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses (N,) of tokens from their log-probs, without entropy and exact KL; and ratio and log-ratio."""
    logratio = (logprobs - old_logprobs).clamp(-20, 20)
    ratio = logratio.exp()
    clipped = ratio.clamp(1 - settings.clip_eps, 1 + settings.clip_eps)
    losses = -torch.minimum(ratio * advantages, clipped * advantages)
    if ref_logprobs is not None:
        losses = losses + settings.kl_coef * kl_estimates(logprobs, ref_logprobs)[2]
    return losses, ratio, logratio


def reference_ppo(hidden, weight, targets, old_logprobs, advantages, settings, ref_logprobs=None, reference=None):
    """Return the loss of `ppo_head` with all logits at once; `reference` is (ref_hidden, ref_weight) for exact KL."""
    logprobs, entropy, _ = reference_logprob(hidden, weight, targets, settings.temperature)
    losses, _, _ = token_losses(logprobs, old_logprobs, advantages, ref_logprobs, settings)
    if settings.entropy_coef:
        losses = losses - settings.entropy_coef * entropy
    if reference is not None:
        losses = losses + settings.kl_coef * reference_kl(hidden, weight, *reference, targets, settings.temperature)[0]
    return losses.sum()


# ------------------------------------------------------------------------------------------ loss and slope, per token


@jit(do_not_specialize=("N", "stride"))
def ppo_kernel(
    logprobs, old_logprobs, advantages, ref_logprobs, out, N, stride, clip_eps, kl_coef,
    K3: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write loss, slope, approx_kl, clipped or not, |ratio − 1| and ratio of BLOCK tokens to the rows of out (6, N)."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < N
    logprob = tl.load(logprobs + token, mask=inside, other=0.0)
    advantage = tl.load(advantages + token, mask=inside, other=0.0)
    moved = logprob - tl.load(old_logprobs + token, mask=inside, other=0.0)
    logratio = tl.minimum(tl.maximum(moved, -20.0), 20.0)
    ratio = tl.exp(logratio)
    clipped = tl.minimum(tl.maximum(ratio, 1 - clip_eps), 1 + clip_eps)
    loss = -tl.minimum(ratio * advantage, clipped * advantage)
    # −A·ratio while the unclipped term is the smaller one; the clipped one is a constant where it differs
    slope = tl.where((ratio * advantage <= clipped * advantage) & (tl.abs(moved) <= 20.0), -ratio * advantage, 0.0)
    if K3:
        gap = logprob - tl.load(ref_logprobs + token, mask=inside, other=0.0)
        near = tl.abs(gap) <= 20.0
        gap = tl.minimum(tl.maximum(gap, -20.0), 20.0)
        loss += kl_coef * (tl.exp(-gap) - 1 + gap)
        slope += tl.where(near, kl_coef * (1 - tl.exp(-gap)), 0.0)
    out += token
    tl.store(out, loss, mask=inside)
    tl.store(out + stride, slope, mask=inside)
    tl.store(out + 2 * stride, ratio - 1 - logratio, mask=inside)
    tl.store(out + 3 * stride, (tl.abs(ratio - 1) > clip_eps).to(tl.float32), mask=inside)
    tl.store(out + 4 * stride, tl.abs(ratio - 1), mask=inside)
    tl.store(out + 5 * stride, ratio, mask=inside)


def ppo_rows(logprobs, old_logprobs, advantages, ref_logprobs, settings: Settings) -> Tensor:
    """Return (6, N): loss, its slope in log p, approx_kl (k3 of old ‖ new), clipped or not, |ratio − 1| and ratio."""
    if use_triton(logprobs):
        N = len(logprobs)
        out = torch.empty(6, N, dtype=logprobs.dtype, device=logprobs.device)
        ref = logprobs if ref_logprobs is None else ref_logprobs
        ppo_kernel[(-(-N // TILE["BLOCK"]),)](
            logprobs, old_logprobs, advantages, ref, out, N, N, settings.clip_eps, settings.kl_coef,
            ref_logprobs is not None, **TILE,
        )  # fmt: skip
        return out
    with torch.enable_grad():  # the loss is written once, above; its slope is autograd's
        logprobs = logprobs.detach().requires_grad_()
        losses, ratio, logratio = token_losses(logprobs, old_logprobs, advantages, ref_logprobs, settings)
        (slope,) = torch.autograd.grad(losses.sum(), logprobs)
    deviation = (ratio - 1).abs()
    rows = losses, slope, ratio - 1 - logratio, (deviation > settings.clip_eps).to(ratio.dtype), deviation, ratio
    return torch.stack(rows).detach()


# ------------------------------------------------------------------------------------------------------ the chunk loop


def chunk(logits: Tensor, targets: Tensor, known: list[Tensor | None], settings: Settings, dtype: torch.dtype):
    """Return the gradient of a chunk's logits (n, V) and its rows (8, n): those of `ppo_rows`, entropy and KL (0)."""
    stats = new_stats(len(logits), logits)
    fold(logits, targets, 0, settings.temperature, stats)
    logprobs, entropy, m, log_s = finish(stats)
    rows = ppo_rows(logprobs, *known, settings)
    per_row = [m, log_s, rows[1]]
    if settings.entropy_coef:  # not "times 0": the gradient of the entropy is more work on every logit
        per_row += [entropy, torch.full_like(entropy, -settings.entropy_coef)]
    dz = dlogits(logits, targets, 0, settings.temperature, torch.stack(per_row), dtype)
    return dz, torch.cat([rows, entropy[None], torch.zeros_like(entropy)[None]])


def chunk_exact(logits, ref_logits, targets: Tensor, known: list[Tensor | None], settings: Settings, dtype):
    """Do what `chunk` does, with the exact KL to the reference in loss and rows."""
    stats, side = new_kl_stats(len(logits), logits), (targets, 0, settings.temperature, "forward")
    fold_kl(logits, ref_logits, *side, stats)
    kl, logprobs, entropy, m, log_s, ref_m, ref_log_s = finish_kl(stats, "forward")
    rows = ppo_rows(logprobs, *known, settings)
    e, k = torch.full_like(entropy, -settings.entropy_coef), torch.full_like(kl, settings.kl_coef)
    per_row = torch.stack([m, log_s, rows[1], entropy, e, ref_m, ref_log_s, kl, k])
    return dlogits_kl(logits, ref_logits, *side, per_row, dtype), torch.cat([rows, entropy[None], kl[None]])


class PPOHead(torch.autograd.Function):
    """All the work forward; the backward multiplies by the upstream gradient, in place, and so runs once."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, known, reference, settings, workspace_bytes):
        N, V = len(hidden), len(weight)
        gradients = head.HeadGradients(hidden, weight)
        models = 1 if reference is None else 2
        spaces = [head.new_workspace(workspace_bytes // models, hidden, V) for _ in range(models)]
        most = len(spaces[0]) // V
        if N and most < 1:
            raise ValueError(f"workspace_bytes is {workspace_bytes}; one token's logits need {V * spaces[0].itemsize}")
        size = -(-N // -(-N // most)) if N else 1  # equal chunks: a small last one would add to all of (V, D) as well
        parts = [gradients.hidden.new_zeros(8, 0)]
        for start in range(0, N, size):
            rows = slice(start, min(N, start + size))
            logits = head.matmul(hidden[rows], weight.T, spaces[0])
            given = targets[rows], [None if x is None else x[rows] for x in known], settings, hidden.dtype
            if reference is None:
                dz, part = chunk(logits, *given)
            else:
                ref_logits = head.matmul(reference[0][rows], reference[1].T, spaces[1])
                dz, part = chunk_exact(logits, ref_logits, *given)
            gradients.add(rows, slice(0, V), dz)
            parts.append(part)
        rows = torch.cat(parts, 1)
        kl_coef = 0.0 if reference is None else settings.kl_coef
        loss = rows[0].sum() - settings.entropy_coef * rows[6].sum() + kl_coef * rows[7].sum()
        ctx.save_for_backward(gradients.hidden.to(hidden.dtype), gradients.weight)
        ctx.mark_non_differentiable(rows)
        return loss, rows

    @staticmethod
    @first_order
    def backward(ctx, upstream, _):
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden.mul_(upstream), None if d_weight is None else d_weight.mul_(upstream), *(None,) * 5


def ppo_head(
    hidden: Tensor, weight: Tensor, targets: Tensor, old_logprobs: Tensor, advantages: Tensor, *,
    ref_logprobs: Tensor | None = None, reference: tuple[Tensor, Tensor] | None = None, temperature: float = 1.0,
    clip_eps: float = 0.2, entropy_coef: float = 0.0, kl_coef: float = 0.0, action_mask: Tensor | None = None,
    workspace_bytes: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Return the summed PPO loss of N sampled tokens, its gradients computed already, and sums of its statistics.

    Args:
        hidden, weight, targets, temperature, action_mask: as for `linear_logprob`.
        old_logprobs, advantages: (N,) fp32.
        ref_logprobs: (N,) fp32, for k3 as the KL of the loss; or
        reference: ref_hidden (N, D′) and ref_weight (V, D′), for the exact KL(policy ‖ reference).
        clip_eps, entropy_coef, kl_coef: ε, c_H and c_KL above.
        workspace_bytes: bound on the logits that exist at one time; default `WORKSPACE`.
    Returns:
        the loss, a scalar: a sum, so that the caller can divide by a global count; its backward runs once only. And,
        without gradient, sums of approx_kl (k3 of old ‖ new), clip_frac, ratio_dev, entropy and kl_exact, and the
        extremes ratio_min and ratio_max.
    Raises:
        ValueError: shapes that do not fit, both kinds of KL at once, or a workspace too small for one token.

    >>> h, W = torch.zeros(1, 2, requires_grad=True), torch.eye(2)
    >>> loss, statistics = ppo_head(h, W, torch.tensor([0]), torch.tensor([-0.6931]), torch.tensor([2.0]))
    >>> loss.backward()
    >>> round(loss.item(), 3), [round(x, 3) for x in h.grad[0].tolist()]
    (-2.0, [-1.0, 1.0])
    """
    head.check_head(hidden, weight, targets, temperature, action_mask)
    known = [old_logprobs, advantages, ref_logprobs]
    if any(x is not None and (x.shape != targets.shape or x.dtype != head.sum_dtype(hidden)) for x in known):
        raise ValueError(f"old_logprobs, advantages and ref_logprobs must be {tuple(targets.shape)} fp32, as targets")
    if ref_logprobs is not None and reference is not None:
        raise ValueError("ref_logprobs (k3) and reference (exact KL) exclude each other")
    if reference is not None:
        head.check_head(*reference, targets, temperature, action_mask)
        if len(reference[1]) != len(weight):
            raise ValueError(f"heads of {len(weight)} and {len(reference[1])} ids")
    if action_mask is not None:
        hidden, targets = hidden[action_mask], targets[action_mask]
        known = [None if x is None else x[action_mask] for x in known]
        reference = reference and (reference[0][action_mask], reference[1])
    settings = Settings(temperature, clip_eps, entropy_coef, kl_coef)
    if workspace_bytes is None:
        workspace_bytes = WORKSPACE[hidden.device.type]
    targets, known = targets.contiguous(), [x if x is None else x.contiguous() for x in known]
    loss, rows = PPOHead.apply(hidden, weight, targets, known, reference, settings, workspace_bytes)
    _, _, approx_kl, clipped, deviation, ratio, entropy, kl = rows
    statistics = dict(approx_kl=approx_kl, clip_frac=clipped, ratio_dev=deviation, entropy=entropy, kl_exact=kl)
    statistics = {name: values.sum() for name, values in statistics.items()}
    extremes = dict(ratio_min=ratio.min(), ratio_max=ratio.max()) if len(ratio) else {}
    return loss, statistics | extremes
