"""Whole iterations on a GPU that is not there: every tensor has a device, a dtype and a shape, and no numbers.

    python -m benchmarks.fake_gpu                    every shape and setting, 288 cases: prints a line for each
    python -m benchmarks.fake_gpu --pairwise         14 of them, in which every pair of values occurs

A case has two layers of its shape, which differ in what surrounds them; `--layers 0` takes all.

Torch's FakeTensorMode runs `run_iteration` as it is: prefill, decoding with CUDA graphs, statistics, update. Operators
check devices, dtypes and shapes as on a card. Triton's launches are not run. Each is checked instead: its arguments
against the kernel's parameters, the device and contiguity of its tensors, the limits of its grid. What is read from the
device is made up: a random id, or 1.0. This finds tensors on the wrong device, arguments that no kernel has, and
branches that do not run at all. It does not find a wrong number. Compiled flex_attention is replaced by
`dense_attention`.

A build of torch without CUDA refuses streams and events. So `no_gpu.cpp`, which says yes to all of them, is compiled
and loaded before torch is; a C++ compiler is needed.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import itertools
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock


def load_device() -> None:
    """Compile and load the device that is not there; before torch is imported, which asks once whether there is one."""
    torch_folder = Path(importlib.util.find_spec("torch").origin).parent
    with tempfile.TemporaryDirectory() as folder:
        library, source = f"{folder}/no_gpu.so", Path(__file__).with_name("no_gpu.cpp")
        command = [os.environ.get("CXX", "g++"), "-std=c++20", "-shared", "-fPIC", f"-I{torch_folder}/include"]
        command += [str(source), "-o", library, f"-L{torch_folder}/lib", "-lc10", "-ltorch_cpu"]
        subprocess.run([*command, f"-Wl,-rpath,{torch_folder}/lib"], check=True)
        ctypes.CDLL(library)


if __name__ == "__main__" and "--help" not in sys.argv and "-h" not in sys.argv:
    load_device()

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402

from benchmarks.gpu_train import SHAPES, random_state  # noqa: E402
from config import Config  # noqa: E402
from kernels import tree_attention  # noqa: E402
from kernels.backend import triton  # noqa: E402
from model import joined  # noqa: E402
from simulator import Environment, open_environment  # noqa: E402
from train_rlpa import run_iteration  # noqa: E402

CARD, GRID = torch.device("cuda:0"), (2**31 - 1, 65_535, 65_535)  # most programs along each axis
VALUES = {  # of each setting that makes a branch; k1 … exact: --kl-estimator
    "shape": ("0.5B", "1.5B", "3B", "7B"),
    "kl": ("k1", "k3", "exact"),
    "critic": ("separate", "shared", "none"),  # none: --advantage grpo
    "checkpointing": (False, True),
    "dtype": ("bfloat16", "float32"),
    "lora": (0, 16),
}
LENGTHS = dict(
    rollout_batch_size=2, minibatch_size=2, decode_batch_size=1, max_turns=2, num_candidates=4, max_new_tokens=4,
    microbatch_tokens=400, num_personas=8,
)  # fmt: skip
STOPS = (2,)  # the id of <|im_end|> in tiny's tokenizer
seen: Counter = Counter()  # launches by kernel


# ----------------------------------------------------------------------------------------------------------- launches


def check_launch(kernel: triton.runtime.JITFunction, *args, grid, warmup: bool, **options) -> None:
    """Check one launch of a kernel instead of running it; AssertionError says what is wrong."""
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages") if name in options}
    given = dict(zip(kernel.arg_names, args, strict=False)) | options
    assert len(args) + len(options) == len(given), f"{kernel.__name__}: an argument is given twice"
    assert set(given) == set(kernel.arg_names), f"{kernel.__name__}: {set(given) ^ set(kernel.arg_names)}"
    grid = grid(given) if callable(grid) else grid
    fits = [isinstance(n, int) and 0 < n <= most for n, most in zip(grid, GRID[: len(grid)], strict=True)]
    assert fits and all(fits), f"{kernel.__name__}: grid {grid}"
    assert all(isinstance(value, int) and value > 0 for value in launch.values()), f"{kernel.__name__}: {launch}"
    for parameter in kernel.params:
        name, row = f"{kernel.__name__}({parameter.name})", given.get(f"{parameter.name.upper()}_ROW")
        check_argument(name, given[parameter.name], parameter.is_constexpr, row)
    seen[f"{kernel.__module__.removeprefix('kernels.')}.{kernel.__name__}"] += 1


def check_argument(name: str, value: object, constant: bool, row: int | None) -> None:
    """Check one argument: a tensor lies on the card, its elements as the kernel counts them; a number fits 32 bits.

    row: how far a tensor's rows are apart, if the kernel is told by a constant.
    """
    if isinstance(value, Tensor):
        assert not constant, f"{name} is a constant, and got a tensor"
        assert value.device == CARD, f"{name} is on {value.device}"
        rows = value.dim() == 2 if row is None else value.stride(0) == row  # its kernel gets the stride of a row
        rows = rows and value.narrow(0, 0, 1).is_contiguous()
        assert value.is_contiguous() or rows, f"{name} has shape {tuple(value.shape)}, strides {value.stride()}"
        return
    assert value is None or isinstance(value, bool | int | float), f"{name} is {type(value).__name__}"
    if isinstance(value, int):
        assert -(2**31) <= value < 2**31, f"{name} is {value}"


# ------------------------------------------------------------------------------------------------------ the fake card


class Readings(TorchFunctionMode):
    """Answer what the host reads from the device: ids at random, an end of turn among them, and 1.0."""

    def __init__(self) -> None:
        super().__init__()
        self.random = random.Random(0)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if func is torch.randperm:  # the order of personas: of real numbers, on the CPU
            with unset_fake_temporarily():
                return func(*args, **(kwargs or {}))
        if name == "data_ptr":  # by which the sampler knows the lanes of a graph
            return args[0].untyped_storage()._cdata + args[0].storage_offset()
        if name in ("item", "tolist", "__int__", "__index__", "__float__", "__bool__") and unknown(args[0]):
            x = args[0]
            if name != "tolist":
                return {"__bool__": bool, "__float__": float}.get(name, lambda value: value)(self.number(x))
            return nested(list(x.shape), lambda: self.number(x))
        return func(*args, **(kwargs or {}))

    def number(self, x: Tensor) -> float | int:
        """Make one number of a tensor's kind up."""
        if x.is_floating_point():
            return 1.0
        return self.random.choice(STOPS) if self.random.random() < 0.1 else self.random.randrange(3, 700)


def unknown(x: Tensor) -> bool:
    """Say whether a fake tensor has no numbers; a few on the CPU have."""
    return isinstance(x, FakeTensor) and x.constant is None


def nested(shape: list[int], make):
    """Fill nested lists of a shape."""
    return [nested(shape[1:], make) for _ in range(shape[0])] if shape else make()


def convert(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Do what `module.to(dtype)` does, which swaps tensors that fake ones cannot be swapped for."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
    return module


def dense_attention(q: Tensor, k: Tensor, v: Tensor, block_mask, enable_gqa: bool, **options) -> Tensor:
    """Stand in for compiled flex_attention: check what it is given, and return what has its shape and gradients."""
    assert q.device == k.device == v.device == CARD and q.dtype == k.dtype == v.dtype
    assert block_mask.kv_num_blocks.device == CARD and block_mask.seq_lengths == (q.shape[2], k.shape[2])
    seen["flex_attention"] += 1
    return nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=enable_gqa)


class Stream:
    """A stream or an event on which nothing runs."""

    def __init__(self, *args, **kwargs) -> None: ...
    def wait_stream(self, stream) -> None: ...
    def wait_event(self, event) -> None: ...
    def record(self, stream=None) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        """Say that all is done."""
        return True


def card() -> dict[str, object]:
    """Return what `torch.cuda` says of an H200 on which nothing runs."""
    gib, hopper = 2**30, dict(major=9, minor=0)
    return dict(
        is_available=lambda: True, device_count=lambda: 1, get_device_name=lambda *_: "NVIDIA H200",
        set_device=lambda *_: None, synchronize=lambda *_: None, empty_cache=lambda: None,
        mem_get_info=lambda *_: (130 * gib, 140 * gib), memory_reserved=lambda *_: 0, memory_allocated=lambda *_: 0,
        get_device_properties=lambda *_: SimpleNamespace(multi_processor_count=132, L2_cache_size=50 << 20, **hopper),
        Stream=Stream, Event=Stream, current_stream=lambda *_: Stream(), stream=lambda *_: nullcontext(),
        CUDAGraph=lambda *_, **__: SimpleNamespace(replay=lambda: None), graph=lambda *_, **__: nullcontext(),
        graph_pool_handle=lambda: (0, 0), is_current_stream_capturing=lambda: False,
    )  # fmt: skip


@contextmanager
def fake_card() -> Iterator[None]:
    """Run the block on the fake card: launches are checked, reads made up."""
    patches = [mock.patch.object(torch.cuda, name, value, create=True) for name, value in card().items()]
    patches += [
        mock.patch.object(triton.runtime.JITFunction, "run", check_launch),
        mock.patch.object(nn.Module, "to", convert),
        mock.patch.object(FakeTensorMode, "avoid_device_init", True),
        mock.patch.object(tree_attention, "compiled_flex_attention", lambda: dense_attention),
    ]
    with FakeTensorMode(), Readings():
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()


# ------------------------------------------------------------------------------------------------------------- the run


def settings(case: dict) -> Config:
    """Turn a case into settings of the trainer."""
    critic = {"separate": {}, "shared": {"critic": "shared"}, "none": {"advantage": "grpo"}}[case["critic"]]
    rest = dict(kl_estimator=case["kl"], checkpointing=case["checkpointing"], dtype=case["dtype"])
    rest |= {"lora_rank": case["lora"]}
    return Config(ckpt="fake", num_iterations=1, **critic, **rest, **LENGTHS)


def run_case(case: dict, layers: int, env: Environment) -> Counter:
    """Run one iteration of a case on the fake card, with so many layers, or all (0); return its launches."""
    seen.clear()
    shape, config = SHAPES[case["shape"]], settings(case)
    shape = replace(shape, num_hidden_layers=layers) if layers else shape
    with fake_card():
        state = random_state(shape, config, env)
        assert state.policy.sampled.head_weight.device == CARD
        metrics, dialogues = run_iteration(state)
        assert all(len(dialogue.turns) == config.max_turns for dialogue in dialogues) and metrics["action_tokens"]
        assert config.lora_rank or all(map(is_joined, state.policy.sampled.model.layers))  # adapters are not joined
        assert all(master.grad is None and master.device == CARD for master in state.policy.masters.values())
    return Counter(seen)


def is_joined(layer: nn.Module) -> bool:
    """Say whether a layer's q, k and v lie one behind another, and its gate and up."""
    attention, mlp = layer.self_attn, layer.mlp
    groups = (attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)
    return all(joined([linear.weight for linear in group]) is not None for group in groups)


def every_case() -> list[dict]:
    """List the full cross."""
    return [dict(zip(VALUES, values, strict=True)) for values in itertools.product(*VALUES.values())]


def pairwise_cases() -> list[dict]:
    """Choose few cases in which every two values of different settings meet: each the one with the most new pairs.

    >>> len(pairwise_cases())
    14
    """
    missing, chosen, cases = {pair for case in every_case() for pair in pairs_of(case)}, [], every_case()
    while missing:
        chosen.append(max(cases, key=lambda case: len(missing & pairs_of(case))))
        missing -= pairs_of(chosen[-1])
    return chosen


def pairs_of(case: dict) -> set[tuple]:
    """Return the pairs of values of a case."""
    return set(itertools.combinations(case.items(), 2))


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairwise", action="store_true", help="14 cases [all 288]")
    parser.add_argument("--layers", type=int, default=2, metavar="N", help="layers of each shape [2; 0: all]")
    args = parser.parse_args()
    cases, failed, everything = pairwise_cases() if args.pairwise else every_case(), 0, Counter()
    with open_environment(Config(ckpt="fake")) as env:
        for case in cases:
            try:
                launches = run_case(case, args.layers, env)
                print("ok    ", *case.values(), f" {launches.total()} launches of {len(launches)} kernels", flush=True)
                everything += launches
            except Exception as error:  # whatever a case raises is its result, and the next one runs
                failed += 1
                print("FAILED", *case.values(), f" {type(error).__name__}: {error}"[:2000], flush=True)
    print("launches of all cases:", *(f"{name} {count}" for name, count in sorted(everything.items())), sep="\n  ")
    passed, layers = len(cases) - failed, args.layers or "all"
    print(f"{passed} of {len(cases)} cases ok, with {layers} layers, torch {torch.__version__}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
