"""What else computes the same: one function per peer and kernel, used where its package is installed.

Each takes a case's inputs by name and returns its outputs by the case's names (see `benchmarks/cases.py`). A peer whose
loss is a mean returns it as `…_mean`, one whose outputs are not those of the case as `other`.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.ppo_head import WORKSPACE

PACKAGES = {  # module: package
    "liger_kernel": "liger-kernel",
    "trl": "trl",
    "cut_cross_entropy": "cut-cross-entropy",
    "fla": "fla-core",
}


def installed(module: str) -> bool:
    """Say whether a peer's module is there, or torch's function of that name."""
    return hasattr(F, module) or importlib.util.find_spec(module) is not None


# ------------------------------------------------------------------------------------------------ heads: one model's


def trl_logprob(hidden: Tensor, weight: Tensor, targets: Tensor, **_) -> dict[str, Tensor]:
    """Compute log-prob and entropy by tiles of the vocabulary, again in the backward."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    outputs = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32768, None, 1.0, ("entropy",))
    return dict(logprobs=outputs[0], entropy=outputs[1])


def liger_chunks(hidden: Tensor, weight: Tensor, targets: Tensor, **_) -> dict[str, Tensor]:
    """Compute log-prob and entropy by chunks of 512 tokens: Liger's path without CuTe DSL or cuTile."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import _FusedLinearPPOFallbackFunction

    nll, entropy = _FusedLinearPPOFallbackFunction.apply(hidden, weight, targets, 1.0, -100, True)[:2]
    return dict(logprobs=-nll, entropy=entropy)


def liger_flce(hidden: Tensor, weight: Tensor, targets: Tensor, **_) -> dict[str, Tensor]:
    """Compute per-token cross-entropy, its gradient's products added in fp32."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    settings = None, None, -100, 0.0, 0.0, "none", None, False, torch.float32
    return dict(logprobs=-LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, targets, *settings)[0])


def cut(filter_eps: str | None):
    """Make cut-cross-entropy's function: with its default filter of small gradients, or (None) exact."""

    def cut_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, **_) -> dict[str, Tensor]:
        """Compute per-token cross-entropy; `torch_compile` is what the package has for a CPU."""
        from cut_cross_entropy import linear_cross_entropy

        impl = "cce" if hidden.is_cuda else "torch_compile"
        settings = dict(reduction="none", impl=impl, filter_eps=filter_eps)
        return dict(logprobs=-linear_cross_entropy(hidden, weight, targets, **settings))

    return cut_cross_entropy


def torch_linear_ce(hidden: Tensor, weight: Tensor, targets: Tensor, **_) -> dict[str, Tensor]:
    """Compute per-token cross-entropy by torch's own chunks, in the workspace that ours has.

    Without options it has full logits. Its automatic chunks are N·D/V tokens, here one or a few: on 2 cores 47 s
    where a chunk of 256 takes 2 s.
    """
    tokens = max(1, WORKSPACE[hidden.device.type] // (4 * len(weight)))
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=min(tokens, len(hidden)))
    return dict(logprobs=-F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options))


# ----------------------------------------------------------------------------------------------- heads: two models'


def trl_kl(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, **_) -> dict[str, Tensor]:
    """Compute the per-token KL(policy ‖ reference) and the entropy."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    kl, entropy = ChunkedDivergenceFunction.apply(hidden, weight, None, ref_hidden, ref_weight, None, 1.0)
    return dict(kl=kl, entropy=entropy)


def trl_kl_and_logprob(**inputs: Tensor) -> dict[str, Tensor]:
    """Compute the per-token KL and, in a function of its own, the log-prob."""
    return dict(kl=trl_kl(**inputs)["kl"], logprobs=trl_logprob(**inputs)["logprobs"])


def liger_jsd(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, **_) -> dict[str, Tensor]:
    """Compute the mean KL(policy ‖ reference), beta 1 of the Jensen-Shannon divergence."""
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

    settings = None, 1.0, -100, 1.0, torch.float32
    return dict(kl_mean=LigerFusedLinearJSDFunction.apply(hidden, weight, ref_hidden, ref_weight, *settings))


def fla_kl(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, **_) -> dict[str, Tensor]:
    """Compute the mean KL(reference ‖ policy): the only direction it has, of as many products."""
    from fla.modules import FusedKLDivLoss

    return dict(other=FusedKLDivLoss()(hidden, ref_hidden, weight, ref_weight))


# --------------------------------------------------------------------------------------------------- model kernels


def torch_rmsnorm(x: Tensor, residual: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Add, then torch's own norm."""
    h = x + residual
    return dict(y=F.rms_norm(h, weight.shape, weight, 1e-6), h=h)


def liger_rmsnorm(x: Tensor, residual: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Add and norm in one kernel."""
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    y, h = LigerFusedAddRMSNormFunction.apply(x, residual, weight, 1e-6)
    return dict(y=y, h=h)


def fla_rmsnorm(x: Tensor, residual: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Add and norm in one kernel."""
    from fla.modules.norm.layernorm import rms_norm

    y, h = rms_norm(x, weight, None, residual=residual, eps=1e-6, prenorm=True)
    return dict(y=y, h=h)


def liger_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> dict[str, Tensor]:
    """Turn copies of q and k, for it turns in place."""
    from liger_kernel.ops.rope import LigerRopeFunction

    cos, sin = (torch.cat((x, x), -1)[:, :, 0] for x in (cos, sin))  # (B, T, Dh)
    q, k = LigerRopeFunction.apply(q.clone().transpose(1, 2), k.clone().transpose(1, 2), cos, sin)
    return dict(q=q.transpose(1, 2), k=k.transpose(1, 2))


def liger_swiglu(gate: Tensor, up: Tensor) -> dict[str, Tensor]:
    """Gate copies, for its backward writes the gradients over its inputs."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return dict(y=LigerSiLUMulFunction.apply(gate.clone(), up.clone()))


def fla_swiglu(gate: Tensor, up: Tensor) -> dict[str, Tensor]:
    """Gate in one kernel."""
    from fla.modules.activations import swiglu

    return dict(y=swiglu(gate, up))


def unmasked_attention(q: Tensor, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
    """Attend to all S slots without a mask, which flash kernels allow: right because all are full."""
    o = F.scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=True)
    return dict(o=o[:, :, 0])


# ------------------------------------------------------------------------------------------------------------ the list

LOGPROB = {  # name: (module, function)
    "TRL": ("trl", trl_logprob),
    "Liger_chunks": ("liger_kernel", liger_chunks),
    "Liger_FLCE": ("liger_kernel", liger_flce),
    "CCE": ("cut_cross_entropy", cut("high")),
    "CCE_exact": ("cut_cross_entropy", cut(None)),
    "F.linear_ce": ("linear_cross_entropy", torch_linear_ce),
}
PEERS = {
    "linear_logprob": LOGPROB,
    "linear_kl": {
        "TRL": ("trl", trl_kl),
        "Liger_JSD": ("liger_kernel", liger_jsd),
        "fla": ("fla", fla_kl),
    },
    "ppo_head": LOGPROB,
    "ppo_head_exact": {"TRL": ("trl", trl_kl_and_logprob)},
    "rmsnorm": {
        "F.rms_norm": ("rms_norm", torch_rmsnorm),
        "Liger": ("liger_kernel", liger_rmsnorm),
        "fla": ("fla", fla_rmsnorm),
    },
    "rope": {"Liger": ("liger_kernel", liger_rope)},
    "swiglu": {"Liger": ("liger_kernel", liger_swiglu), "fla": ("fla", fla_swiglu)},
    "decode_attention": {"SDPA_unmasked": ("scaled_dot_product_attention", unmasked_attention)},
    "decode_attention_shared": {},  # a peer has a row for each candidate: its line above, at the same R and S
    "sample_head": {},
}
