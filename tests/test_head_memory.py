"""The memory bar of the PPO head on a CPU: a tenth of what plain torch needs beyond inputs and their gradients.

At 2,048 tokens of the 0.5B head it is measured by `pytest tests/ -k "bench and bar"` (about two minutes), here at a
sixteenth of the logits and of the workspace.
"""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks.cases import BOTH, Size, make_ppo_head, ours_ppo
from benchmarks.measure import run_once
from kernels.ppo_head import WORKSPACE

SIZE = Size("bar/16", 512, 512, 224, 37_984, 14, 2, 16, 64, 1, 1)


def test_what_the_memory_measure_counts():
    """Guards a measure that is blind, or that counts what is returned: two temporaries of 4 MB at a time, of three."""
    x = torch.ones(1_000_000)

    def call():
        a = x + 1
        b = a * 2
        del a
        return dict(sum=(b + b).add_(1))

    _, extra, _ = run_once(call, "cpu")
    assert extra == pytest.approx(8_000_000, rel=0.01)


def test_ppo_head_needs_a_tenth_of_eagers_memory():
    """Guards the point of the kernel: a temporary as large as the logits would show at once."""
    case = make_ppo_head(SIZE, torch.float32, "cpu")
    workspace_bytes = WORKSPACE["cpu"] // 16
    ours = functools.partial(ours_ppo, workspace_bytes=workspace_bytes)
    _, eager_bytes, _ = run_once(case.call(case.eager, BOTH), "cpu")
    _, our_bytes, _ = run_once(case.call(ours, BOTH), "cpu")
    logits = SIZE.N * SIZE.V * 4
    assert eager_bytes >= 2 * logits
    assert workspace_bytes / 2 <= our_bytes <= eager_bytes / 10, (our_bytes, eager_bytes)
