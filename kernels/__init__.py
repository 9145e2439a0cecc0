"""The kernels of the trainer, one per file: equation, reference, Triton, launcher and one public function each."""

from kernels.backend import BACKENDS, set_backend
from kernels.linear_kl import linear_kl
from kernels.linear_logprob import linear_logprob
from kernels.ppo_head import ppo_head

__all__ = ["BACKENDS", "linear_kl", "linear_logprob", "ppo_head", "set_backend"]
