"""Weights that are shared out: the numbers are those of one whole model, however many processes hold it.

`benchmarks/invariance.py` has the cases, and prints how far they differ. Processes talk through gloo on this machine.
"""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.invariance import (
    KINDS,
    MICROBATCHES,
    SHAPE,
    UNTIED,
    VARIANTS,
    dealt,
    difference,
    run_case,
    run_cases,
    settings,
    write_policy,
)
from learners import sharding
from learners.weights import load_policy

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """One thread, as the spawned processes have: sums in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A policy with a tied head."""
    return write_policy(tmp_path_factory.mktemp("policy"), SHAPE)


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    """A policy with a head of its own."""
    return write_policy(tmp_path_factory.mktemp("untied"), UNTIED)


def assert_equal(found: dict, reference: dict, tolerance: float = 1e-5) -> None:
    """Every metric, gradient, weight and moment within a tolerance; and the copy that samples, exactly."""
    assert reference.keys() <= found.keys() and found.keys() - reference.keys() == replicas(found)
    for kind in KINDS:
        assert difference(found, reference, kind) < tolerance, kind
    for name in replicas(found):
        assert torch.equal(found[name], found[name.replace("replica", "weight policy")]), name


def replicas(found: dict) -> set[str]:
    """Names of the weights that sample."""
    return {name for name in found if name.startswith("replica")}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_cut_of_a_batch_does_not_matter(folder, size):
    """Guards sums that are means, a tied head whose gradient is lost, a copy that lags behind, moments of others' rows.

    With and without --shard, every dialogue alone in a micro-batch or all of them together.
    """
    cases = {
        f"{shard} {tokens}": (settings(folder, shard=shard, microbatch_tokens=tokens), dealt(size))
        for shard in (False, True) for tokens in (MICROBATCHES[0], MICROBATCHES[-1])
    }  # fmt: skip
    reference = run_case(settings(folder), range(8))
    for name, found in run_cases(size, cases).items():
        assert_equal(found, reference)
        if size == 1 and name.endswith(str(MICROBATCHES[-1])):
            assert all(torch.equal(found[key], value) for key, value in reference.items()), name


def test_unequal_shares_and_all_settings(folder, untied):
    """Guards forwards that only some processes run, which is a hang, and empty micro-batches that count.

    One process has 1 dialogue and the other 3, or none and all 4. Each dialogue is a micro-batch.
    """
    cases, wanted = {}, {}
    for i, (owned, changes, path) in enumerate(
        [([[], [0, 1, 2, 5]], {}, folder), ([[0, 1, 2, 5], []], {"critic": "shared"}, folder)]
        + [([[0], [1, 2, 5]], changes, untied) for changes in VARIANTS.values()]
    ):
        cases[str(i)] = settings(path, shard=True, microbatch_tokens=1, **changes), owned
        wanted[str(i)] = run_case(settings(path, **changes), [0, 1, 2, 5])
    for name, found in run_cases(2, cases).items():
        assert_equal(found, wanted[name])


def test_small_steps_add_up_beside_bf16_weights(folder):
    """Guards fp32 shards of a model that computes in bf16: 1e-6 is lost in a bf16 weight, in its master it is not."""
    changes = dict(dtype="bfloat16", lr=1e-6, num_epochs=2, warmup_share=0.0)
    cases = {"bf16": (settings(folder, shard=True, microbatch_tokens=60, **changes), dealt(2))}
    found, start = run_cases(2, cases)["bf16"], dict(load_policy(folder).named_parameters())
    weights = {name: found[f"weight policy {name}"] for name in start}
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    moved = torch.cat([(weights[name] - start[name]).abs().flatten() for name in start])
    assert 1e-6 < moved.max() < 5e-6 and (moved > 1e-7).float().mean() > 0.8
    for name, weight in weights.items():
        assert torch.equal(found[f"replica {name}"], weight.bfloat16()), name
    plain = run_case(settings(folder, **changes), range(8))
    gradients = [name for name in plain if name.startswith("gradient")]
    ours, theirs = (torch.cat([x[name].flatten() for name in gradients]) for x in (found, plain))
    assert (ours - theirs).norm() / theirs.norm() < 0.02


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "pytorch_model.bin", "policy.pt", "x.pth", "x.pkl"])
def test_pickles_are_refused_by_name(folder, tmp_path, name):
    """Guards against reading torch's own distributed checkpoints, which hold pickles, or any other pickle."""
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=f"{re.escape(name)} is a pickle, which is never read"):
        load_policy(tmp_path)


def test_a_process_keeps_its_rows_only():
    """Guards whole tensors that stay behind their rows: a part of a file's tensor is a view, what is kept is a copy."""
    tensor = torch.arange(10.0).view(5, 2)
    found = []
    for number in range(4):
        mesh = SimpleNamespace(size=lambda: 4, get_local_rank=lambda number=number: number)
        found.append(sharding.rows_of(tensor, mesh))
    assert [len(rows) for rows in found] == [2, 2, 1, 0] and torch.equal(torch.cat(found), tensor)


def test_examples():
    """Guards the examples of the docstrings."""
    assert doctest.testmod(sharding).failed == 0
