"""The kernels of the trainer, one per file: equation, reference and one public function each."""

from kernels.linear_logprob import linear_logprob

__all__ = ["linear_logprob"]
