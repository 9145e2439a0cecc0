"""Estimates of KL(policy ‖ reference) from sampled tokens alone (J. Schulman, "Approximating KL divergence", 2020).

With a token y sampled from the policy p and the gap δ = log p(y) − log r(y) to the reference r:

    k1 = δ                  unbiased, high variance, may be negative; its gradient is the score ∇log p, of mean zero:
                            as a loss it is noise, in the reward (where it is not differentiated) it is right
    k2 = δ²/2               biased, low variance; its gradient δ∇log p has, on-policy, the mean ∇KL(p ‖ r)
    k3 = exp(−δ) − 1 + δ    unbiased, ≥ 0, low variance while p ≈ r; as a loss its gradient (1 − r/p)∇log p has the
                            mean ∇KL(r ‖ p): the reverse direction

The KL itself, over the whole vocabulary, is `linear_kl`; `tests/test_head_kernels.py` shows these means.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kl_estimates(logprobs: Tensor, ref_logprobs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return k1, k2 and k3 of each sampled token, from its log-probs under policy and reference.

    The gap is clamped to ±20: beyond, exp(20) = 5·10⁸ would be the whole batch's loss.

    >>> [round(k.item(), 4) for k in kl_estimates(torch.tensor(-1.0), torch.tensor(-2.0))]
    [1.0, 0.5, 0.3679]
    """
    gap = (logprobs - ref_logprobs).clamp(-20, 20)
    return gap, gap**2 / 2, torch.expm1(-gap) + gap
