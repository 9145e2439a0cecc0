"""The sampler on the kernels: exact, never waiting for the device while it decodes, and blind to padding."""

import importlib
from contextlib import contextmanager, nullcontext
from functools import partial
from unittest.mock import MagicMock

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from kernels.backend import INTERPRETED, set_backend
from model import Qwen2Config, Qwen2ForCausalLM, join_products, random_policy
from sampler import ROW, SLOT, STEP, Draw, Sampler, generate

if not (torch.cuda.is_available() or INTERPRETED):
    pytest.skip("needs CUDA, or TRITON_INTERPRET=1", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = Qwen2Config(53, 64, 64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
PROMPTS, STOPS = [[3, 4, 5, 6, 7], [8], [9, 10, 11]], set(range(8))  # one sampled id in seven ends a candidate


@pytest.fixture(scope="module")
def policy() -> Qwen2ForCausalLM:
    """One random layer, large enough that each token's distribution depends on the whole row."""
    policy = random_policy(CONFIG, seed=0).to(DEVICE)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    join_products(policy)  # as every sampler on CUDA does
    return policy


@contextmanager
def on(backend: str):
    set_backend(backend)
    try:
        yield
    finally:
        set_backend("auto")


def new_sampler(policy, **changes) -> Sampler:
    settings = dict(n=2, max_new_tokens=6, stop_ids=STOPS, temperature=0.8, batch_size=3, max_rows=3)
    return Sampler(policy, **(settings | changes))


def finish(sampler: Sampler) -> list[Draw]:
    ended = []
    while sampler.running:
        ended += sampler.step()
    return sorted(ended, key=lambda draw: (draw.key, draw.candidate))


def assert_logprobs(policy, prompts: list[list[int]], draws: list[Draw], temperature: float = 0.8) -> None:
    """Each log-prob is that of a plain forward over prompt and sample on the torch path."""
    with on("torch"), torch.no_grad():
        for draw in draws:
            ids, start = prompts[draw.key] + draw.token_ids, len(prompts[draw.key]) - 1
            hidden = policy(torch.tensor([ids], device=DEVICE))[0, start:-1]
            expected = (policy.logits(hidden) / temperature).log_softmax(-1)
            expected = expected.gather(-1, torch.tensor(draw.token_ids, device=DEVICE)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(draw.logprobs), expected.cpu(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("lag", [0, 1])
def test_turns_on_the_kernels(policy, lag):
    """Guards the wiring: two turns, one lane that joins late and a cache that grows: log-probs as by a full forward.

    And a candidate's ids do not depend on its company: alone it samples the same.
    """
    with on("triton"):
        sampler, seeds = new_sampler(policy, lag=lag), [[11, 12], [13, 2**31 - 1], [15, 16]]
        assert sampler.start(0, PROMPTS[0], seeds[0]) and sampler.start(1, PROMPTS[1], seeds[1])
        ended = sampler.step()
        assert sampler.start(2, PROMPTS[2] * 5, seeds[2])
        draws = sorted(ended + finish(sampler), key=lambda draw: (draw.key, draw.candidate))
        prompts = [*PROMPTS[:2], PROMPTS[2] * 5]
        alone = [generate(policy, [prompt], n=2, max_new_tokens=6, stop_ids=STOPS, temperature=0.8, seeds=seeds[key])
                 for key, prompt in enumerate(prompts)]  # fmt: skip
        assert [draw.token_ids for draw in draws] == [draw.token_ids for pair in alone for draw in pair]
        following = []
        for key, prompt in enumerate(prompts):
            sampler.adopt(key, 1)
            following.append(prompt + draws[2 * key + 1].token_ids + [20, 21])
            assert sampler.start(key, following[key], [key, key + 30])
        later = finish(sampler)
    assert sampler.counts["tokens_kept"] == sum(map(len, following)) - 3 * 3
    assert len({len(draw.token_ids) for draw in draws + later}) > 2
    assert_logprobs(policy, prompts, draws)
    assert_logprobs(policy, following, later)


# ---------------------------------------------------------------------------------------------------------- no waiting


WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::masked_select",
         "aten::lift_fresh"}  # the last one: a tensor made of numbers, which would be copied to the device  # fmt: skip
READS = {getattr(torch.Tensor, name) for name in ("tolist", "item", "numpy", "__bool__", "__int__", "__float__",
                                                  "__index__", "__array__")}  # fmt: skip


class NoWaitingOps(TorchDispatchMode):
    """Fail on an operator for which the host waits for the device, or copies to it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        by_mask = name in ("aten::index", "aten::index_put_") and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )  # how many there are, the host must know
        assert name not in WAITS and not by_mask, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


class NoReads(TorchFunctionMode):
    """Fail where Python reads a tensor's numbers: on a CPU, some of these reads pass no operator."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in READS, f"{func} reads from the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("temperature", [0.8, 0.0])
@pytest.mark.parametrize("n", [1, 2])
def test_a_step_does_not_wait_for_the_device(policy, n, temperature):
    """Guards CUDA graphs and the host's lead: nothing in `advance` reads a tensor, asks for a size, or copies.

    The torch path, which does read lengths on the host, is caught by the same guards.
    """
    for backend in ("triton", "torch"):
        with on(backend), torch.no_grad():
            sampler = new_sampler(policy, n=n, temperature=temperature, stop_ids=[])
            for key, prompt in enumerate(PROMPTS):
                assert sampler.start(key, prompt, range(n))
            sampler.step()
            before = sampler.lanes.clone()
            with NoWaitingOps(), NoReads():
                if backend == "torch":
                    with pytest.raises(AssertionError, match="device"):
                        sampler.advance(sampler.lanes)
                    continue
                sampler.advance(sampler.lanes)
            assert (sampler.lanes[STEP] == before[STEP] + 1).all() and (sampler.lanes[SLOT] == before[SLOT] + n).all()


@pytest.mark.parametrize("read", [lambda x: x[x > 1], lambda x: int(x.sum()), lambda x: x.tolist(),
                                  lambda x: bool(x.any()), lambda x: torch.tensor([1.0]), lambda x: x.max().item(),
                                  lambda x: torch.equal(x, x)])  # fmt: skip
def test_the_guards_catch_what_waits(read):
    """Guards the guards: each way to wait for the device fails under them."""
    x = torch.arange(3.0)
    with pytest.raises(AssertionError, match="device"), NoWaitingOps(), NoReads():
        read(x)


# -------------------------------------------------------------------------------------------------------- CUDA graphs


class Recording(TorchDispatchMode):
    """Note every operator, and what it gave, so that it can be computed again into the same memory."""

    def __init__(self, calls: list) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "empty" not in func._schema.name:  # nobody may rely on what such memory holds
            self.calls.append((func, args, kwargs or {}, out))
        return out


class Graph:
    """What `torch.cuda.CUDAGraph` does, on a CPU: the calls of a capture, again and again, in the same memory."""

    def __init__(self, *args, **kwargs) -> None:
        self.calls: list = []

    def pool(self) -> None:
        """Return no memory pool: a CPU has none."""

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            new = func(*args, **kwargs)
            for old, computed in zip(tree_leaves(out), tree_leaves(new), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != computed.data_ptr():  # neither view nor in place
                    old.copy_(computed)


@contextmanager
def emulated_graphs(monkeypatch):
    """Let captures record on a CPU; a launch of a kernel is one call."""
    function = type(importlib.import_module("kernels.rope").rope_kernel)
    launch, active = function.run, []

    def run(self, *args, **kwargs):
        if not active:
            return launch(self, *args, **kwargs)
        active[0].calls.append((partial(launch, self), args, kwargs, None))
        with _disable_current_modes():  # what the interpreter does with tensors is no part of the graph
            return launch(self, *args, **kwargs)

    @contextmanager
    def capture(graph, *args, **kwargs):
        active.append(graph)
        with Recording(graph.calls):
            yield
        active.pop()

    with monkeypatch.context() as patch:
        patch.setattr(function, "run", run)
        for name, value in dict(CUDAGraph=Graph, graph=capture, Stream=MagicMock, stream=MagicMock(),
                                current_stream=MagicMock(), graph_pool_handle=MagicMock()).items():  # fmt: skip
            patch.setattr(torch.cuda, name, value)
        yield


class Replaying(Sampler):
    """A sampler whose steps replay a graph, on a CPU too."""

    def advance(self, lanes):
        return self.replay() if lanes is self.lanes else super().advance(lanes)


class Direct(Sampler):
    """A sampler that has no graphs, on a GPU neither."""

    def replay(self):
        return self.advance(self.lanes)


def play(kind: type[Sampler], policy) -> tuple[list[Draw], Sampler]:
    """Two turns of three dialogues: one joins late, the cache grows, candidates end one by one."""
    settings = dict(n=2, max_new_tokens=4, stop_ids=STOPS, temperature=0.8, batch_size=3, max_rows=3)
    sampler, prompts = kind(policy, **settings), [*PROMPTS[:2], PROMPTS[2] * 5]
    assert sampler.start(0, prompts[0], [11, 12]) and sampler.start(1, prompts[1], [13, 2**31 - 1])
    ended = sampler.step() + sampler.step()
    assert sampler.start(2, prompts[2], [15, 16])
    draws = sorted(ended + finish(sampler), key=lambda draw: (draw.key, draw.candidate))
    for key, prompt in enumerate(prompts):
        sampler.adopt(key, 1)
        assert sampler.start(key, prompt + draws[2 * key + 1].token_ids + [20, 21], [key, key + 30])
    return draws + finish(sampler), sampler


def test_a_replayed_graph_is_the_direct_path(policy, monkeypatch):
    """Guards what a capture leaves out: a new tensor in place of a static one, lengths advanced twice, stale lanes."""
    with on("triton"):
        plain, _ = play(Direct, policy)
        with nullcontext() if torch.cuda.is_available() else emulated_graphs(monkeypatch):
            replayed, sampler = play(Sampler if torch.cuda.is_available() else Replaying, policy)
    assert sampler.graphs  # those that were captured since the cache grew last
    assert [draw.token_ids for draw in replayed] == [draw.token_ids for draw in plain]
    for one, other in zip(replayed, plain, strict=True):
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize("n", [1, 2])
def test_padding_changes_nothing(policy, n):
    """Guards a CUDA graph's bucket: lanes that are nobody's, behind the real ones, change nothing for those.

    Neither what is sampled, nor the cache, nor the rows' lengths; and they stay nobody's, step after step. (Up to the
    rounding of a matrix product of another size.)
    """
    with on("triton"), torch.no_grad():
        found = []
        for padding in (0, 3):
            sampler = new_sampler(policy, n=n, stop_ids=[])
            for key, prompt in enumerate(PROMPTS[:2]):  # of the three rows the last is empty
                assert sampler.start(key, prompt, range(40, 40 + n))
            sampler.step()
            R = sampler.lanes.shape[1]
            lanes = torch.cat((sampler.lanes, sampler.padding.repeat(1, padding)), 1)
            steps = [sampler.advance(lanes) for _ in range(3)]
            assert (lanes[ROW, R:] == -1).all() and lanes.shape == (7, 2 * n + padding)
            found.append([lanes[:, :R], sampler.lengths, *sampler.cache.keys, *sampler.cache.values]
                         + [x[:R] for step in steps for x in step])  # fmt: skip
        for bare, padded in zip(*found, strict=True):
            torch.testing.assert_close(padded, bare, atol=1e-5, rtol=0)
        assert torch.equal(found[0][0], found[1][0])
