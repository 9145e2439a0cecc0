"""A loss of sampled tokens straight from hidden states: the loss and its gradients in three head products, not four.

    loss = Σ_tokens ℓ(log p(y)) − c_H · H + c_KL · KL(policy ‖ reference)        ℓ: the caller's loss of one token

The trainer's ℓ is PPO's clipped objective (`token_losses` in `train_rlpa.py`). Entropy H and exact KL are the head's
own, because only the head sees the whole vocabulary.

What it saves: `linear_logprob` with a loss behind it computes the logits twice, because the gradient of the loss comes
only after the last log-prob: 8NDV FLOP. But each token's loss depends on that token's log-prob alone, and everything
else in it is known before the forward. So one loop over chunks of tokens does all work while a chunk's logits exist:

    logits    one product (n, V), and for the exact KL a second one for the reference
    log p(y)  and the entropy, by one pass of a row kernel (`linear_logprob`)
    loss      of these n tokens, and its slope ∂ℓ/∂log p(y), by autograd on (n,) numbers
    gradient  of the logits, written over them, and the two products that give the gradients of hidden and weight

That is 6NDV, or 8NDV with the exact KL. The backward only multiplies the finished gradients by the upstream one.

Memory: the logits of a chunk (half as much again if the inputs are bf16, since the products of the gradients need bf16
operands), beside the gradients themselves. Larger chunks read and write the (V, D) gradient of the head less often.

Letters: N action tokens (the rows of the head), n of them in a chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import head
from kernels.backend import first_order
from kernels.linear_kl import dlogits_kl, finish_kl, fold_kl, new_kl_stats, reference_kl
from kernels.linear_logprob import dlogits, finish, fold, new_stats, reference_logprob

# Bytes of logits at one time: 1,766 tokens of 151,936 on CUDA. Not of the L2, as the tiles of the other heads: every
# chunk reads and writes the whole (V, D) gradient, which costs more than logits that miss the cache.
WORKSPACE = {"cpu": 256 << 20, "cuda": 1 << 30}

Statistics = dict[str, Tensor]  # name → (n,) of n tokens
TokenLosses = Callable[..., tuple[Tensor, Statistics]]


class Loss(NamedTuple):
    """What the loss consists of: the caller's loss of each token, and what the head adds to it."""

    token_losses: TokenLosses
    temperature: float
    entropy_coef: float
    kl_coef: float


def reference_ppo(
    hidden, weight, targets, token_losses: TokenLosses, per_token, *, reference=None, temperature=1.0,
    entropy_coef=0.0, kl_coef=0.0,
) -> tuple[Tensor, Statistics]:  # fmt: skip
    """Return what `ppo_head` returns, with all logits at once and autograd for all of it."""
    logprobs, entropy, _ = reference_logprob(hidden, weight, targets, temperature)
    losses, statistics = token_losses(logprobs, *per_token)
    statistics = statistics | {"entropy": entropy}
    if entropy_coef:
        losses = losses - entropy_coef * entropy
    if reference is not None:
        statistics["kl_exact"] = reference_kl(hidden, weight, *reference, targets, temperature)[0]
        losses = losses + kl_coef * statistics["kl_exact"]
    return losses.sum(), {name: values.detach() for name, values in statistics.items()}


# ------------------------------------------------------------------------------------------------------ the chunk loop


def with_slopes(token_losses: TokenLosses, logprobs: Tensor, per_token: list[Tensor]):
    """Return the losses of n tokens, their slopes ∂ℓ/∂log p(y), (n,) each, and their statistics, without gradient."""
    with torch.enable_grad():
        logprobs = logprobs.detach().requires_grad_()
        losses, statistics = token_losses(logprobs, *per_token)
        if losses.shape != logprobs.shape:
            raise ValueError(f"token_losses gave {tuple(losses.shape)} for {tuple(logprobs.shape)} log-probs")
        (slopes,) = torch.autograd.grad(losses.sum(), logprobs)
    return losses.detach(), slopes, {name: values.detach() for name, values in statistics.items()}


def chunk(logits: Tensor, targets: Tensor, per_token: list[Tensor], loss: Loss, dtype: torch.dtype):
    """Return the gradient (n, V) of a chunk's logits in `dtype`, and the losses (n,) and statistics of its tokens."""
    stats = new_stats(len(logits), logits)
    fold(logits, targets, 0, loss.temperature, stats)
    logprobs, entropy, m, log_s = finish(stats)
    losses, slopes, statistics = with_slopes(loss.token_losses, logprobs, per_token)
    rows = [m, log_s, slopes]
    if loss.entropy_coef:  # not "times 0": the gradient of the entropy is more work on every logit
        rows += [entropy, torch.full_like(entropy, -loss.entropy_coef)]
    dz = dlogits(logits, targets, 0, loss.temperature, torch.stack(rows), dtype)
    return dz, losses, statistics | {"entropy": entropy}


def chunk_exact(logits, ref_logits, targets: Tensor, per_token: list[Tensor], loss: Loss, dtype: torch.dtype):
    """Do what `chunk` does, with the exact KL to the reference in gradient and statistics."""
    stats = new_kl_stats(len(logits), logits)
    fold_kl(logits, ref_logits, targets, 0, loss.temperature, stats)
    kl, logprobs, entropy, m, log_s, ref_m, ref_log_s = finish_kl(stats)
    losses, slopes, statistics = with_slopes(loss.token_losses, logprobs, per_token)
    e, k = torch.full_like(entropy, -loss.entropy_coef), torch.full_like(kl, loss.kl_coef)
    rows = torch.stack([m, log_s, slopes, entropy, e, ref_m, ref_log_s, kl, k])
    dz = dlogits_kl(logits, ref_logits, targets, 0, loss.temperature, rows, dtype)
    return dz, losses, statistics | {"entropy": entropy, "kl_exact": kl}


class PPOHead(torch.autograd.Function):
    """All the work forward; the backward multiplies by the upstream gradient, in place, and so runs once."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, per_token, reference, loss, workspace_bytes):
        N, V = len(hidden), len(weight)
        models = 1 if reference is None else 2
        spaces = [head.new_workspace(workspace_bytes, hidden, V, models) for _ in range(models)]
        most, parts = len(spaces[0]) // V, []
        if N and most < 1:
            raise ValueError(f"workspace_bytes is {workspace_bytes}; one token's logits need {V * spaces[0].itemsize}")
        chunks = max(1, -(-N // most)) if N else 1
        size = max(1, -(-N // chunks))  # equal chunks: a small last one would cost a whole pass over (V, D), too
        wide = spaces[0].dtype  # fp32: rounding each chunk's part to bf16 would bias the sums
        empty = torch.empty_like if N else torch.zeros_like  # without tokens no product writes to them
        d_hidden, d_weight = empty(hidden, dtype=wide), empty(weight) if weight.requires_grad else None
        for start in range(0, max(N, 1), size):  # without tokens, one empty chunk: its statistics have names
            rows = slice(start, min(N, start + size))
            logits = head.matmul(hidden[rows], weight.T, spaces[0])
            given = targets[rows], [x[rows] for x in per_token], loss, hidden.dtype
            if reference is None:
                dz, *part = chunk(logits, *given)
            else:
                ref_logits = head.matmul(reference[0][rows], reference[1].T, spaces[1])
                dz, *part = chunk_exact(logits, ref_logits, *given)
            head.matmul(dz, weight, d_hidden[rows])
            if d_weight is not None:
                if start == 0:  # not before: a CPU's first product has a wide copy of the weight
                    sums = d_weight if d_weight.dtype == wide else empty(weight, dtype=wide)
                head.matmul(dz.T, hidden[rows], sums, add=start > 0)
            parts.append(part)
        losses = torch.cat([losses for losses, _ in parts])
        statistics = {name: torch.cat([part[name] for _, part in parts]) for name in parts[0][1]}
        total = losses.sum() - loss.entropy_coef * statistics["entropy"].sum()
        if reference is not None:
            total = total + loss.kl_coef * statistics["kl_exact"].sum()
        if d_weight is not None and sums is not d_weight:
            d_weight.copy_(sums)
        ctx.save_for_backward(d_hidden.to(hidden.dtype), d_weight)
        return total, statistics

    @staticmethod
    @first_order
    def backward(ctx, upstream, _):
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden.mul_(upstream), None if d_weight is None else d_weight.mul_(upstream), *(None,) * 5


def ppo_head(
    hidden: Tensor, weight: Tensor, targets: Tensor, token_losses: TokenLosses, per_token: tuple[Tensor, ...], *,
    reference: tuple[Tensor, Tensor] | None = None, temperature: float = 1.0, entropy_coef: float = 0.0,
    kl_coef: float = 0.0, workspace_bytes: int | None = None,
) -> tuple[Tensor, Statistics]:  # fmt: skip
    """Return the summed loss of N sampled tokens, whose gradients are computed already, and each token's statistics.

    Args:
        hidden, weight, targets, temperature: as for `linear_logprob`.
        token_losses: the loss of n tokens, written in plain torch: token_losses(new_logprobs, *per_token) returns their
            losses (n,) and a dict of statistics by name, (n,) each. The head calls it once per chunk, under
            `enable_grad`, and differentiates it by autograd with respect to new_logprobs. A token's loss must depend on
            that token alone: which tokens share a call follows from `workspace_bytes`.
        per_token: (N,) tensors, what `token_losses` wants to know of each token; they are cut as the tokens are.
        reference: ref_hidden (N, D′) and ref_weight (V, D′), for the exact KL(policy ‖ reference); None: no KL.
        entropy_coef, kl_coef: c_H and c_KL above; kl_coef matters with `reference` only.
        workspace_bytes: bound on the logits that exist at one time; default `WORKSPACE`.
    Returns:
        The loss, a scalar. It is a sum, so that the caller can divide by a global count; its backward runs once only.
        And the statistics of all tokens by name, (N,) each, without gradient: those of `token_losses`, the entropy and,
        with `reference`, kl_exact.
    Raises:
        ValueError: shapes that do not fit, or a workspace too small for the logits of one token.

    >>> h, W = torch.zeros(1, 2, requires_grad=True), torch.eye(2)
    >>> def reinforce(new_logprobs, advantages):
    ...     return -advantages * new_logprobs, {"p": new_logprobs.exp()}
    >>> loss, statistics = ppo_head(h, W, torch.tensor([0]), reinforce, (torch.tensor([2.0]),))
    >>> loss.backward()
    >>> round(loss.item(), 3), h.grad[0].tolist(), statistics["p"].tolist()
    (1.386, [-1.0, 1.0], [0.5])
    """
    head.check_head(hidden, weight, targets, temperature)
    if any(x.shape != targets.shape for x in per_token):
        shapes = [tuple(x.shape) for x in per_token]
        raise ValueError(f"the tensors of per_token are {shapes}; they must be {tuple(targets.shape)}, as targets")
    if reference is not None:
        head.check_head(*reference, targets, temperature)
        if len(reference[1]) != (V := len(weight)):
            raise ValueError(f"policy and reference must have equally many ids, not {V} and {len(reference[1])}")
    if workspace_bytes is None:
        workspace_bytes = WORKSPACE[hidden.device.type]
    loss = Loss(token_losses, temperature, entropy_coef, kl_coef)
    return PPOHead.apply(hidden, weight, targets.contiguous(), per_token, reference, loss, workspace_bytes)
