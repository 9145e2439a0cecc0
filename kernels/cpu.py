"""C++ for a CPU: a decode step, whole, and attention over token trees.

**The decode step** (`cpu_decode.cpp`) is to a CPU what a CUDA graph is to a GPU. A step of a tiny model is a hundred
operations of a few microseconds: torch spends more time between them than in them, and its attention takes 50 µs for a
dialogue's four queries, whatever they read. Here all layers run in one call, 32 tokens at a time, in activations that
never leave the cache; the same call prefills, a token of a prompt being one more lane. Floor, for 32 rows of 256 slots
of the tiny checkpoint (4 layers, D 96): 0.3 ms for 33 MFLOP at 100 GFLOP/s, and 0.9 ms to read 25 MB of keys and
values.

Of a real model, whose weights no cache holds, reading them is the floor of a few lanes: Qwen2.5-0.5B in bf16 is 0.99 GB
a step, 26 to 36 ms at 28 to 38 GB/s. From some 16 lanes on it is arithmetic: 32 lanes are 32 GFLOP, 80 ms at 400
GFLOP/s. Both are reached only where bf16 weights are multiplied as they are stored, by all threads; torch casts the
head's to fp32 in every step, and its products of few rows run at half the rate.

**Tree attention** (`cpu_tree.cpp`): a tile of 16 queries, one to a lane of a vector, visits those tokens only that one
of them sees. Floor: a pair of query and key costs 2 Dh multiply-adds forward and 5 Dh backward.

**The head** (`cpu_head.cpp`): products of bf16 matrices with sums and results in fp32, as fast as torch's own, whose
results are bf16; and the row kernels of `linear_logprob.py`, for long rows.

**The passes between products** (`cpu_passes.cpp`): norm, rotation and gate for bf16, which torch widens, writes and
reads again and again.

All numbers are fp32 but where bf16 is named. The library is built by the machine's own C++ compiler when it is first
wanted (some 10 seconds), and kept in the user's cache folder under a hash of source, command and processor. Without a
compiler torch serves.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterable
from ctypes import POINTER, Structure, c_bool, c_float, c_int64
from ctypes import c_void_p as Pointer
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels import backend
from kernels.rows import Rows

SOURCES = [Path(__file__).with_name(f"cpu_{name}.cpp") for name in ("decode", "tree", "head", "passes")]
HEADERS = [Path(__file__).with_name(f"cpu_{name}.h") for name in ("vectors", "team")]
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC", "-pthread")
HEAD_DIMS = (16, 32, 64, 128)  # that they are compiled for
ROWS = 64  # as in cpu_passes.cpp: rows of a norm whose gradients of the weight are one partial sum
LONG = 8192  # logits of a row from which on torch's passes cost more than these


class Linear(Structure):
    """One linear layer: its weight (out, in), bias or null, and LoRA's A and B or null, as in cpu_decode.cpp."""

    _fields_ = [*((name, Pointer) for name in ("weight", "bias", "A", "B")), ("rank", c_int64), ("scale", c_float)]


class Layer(Structure):
    """Pointers to one layer's weights and cache, as in cpu_decode.cpp."""

    NORMS = ("input_layernorm", "post_attention_layernorm")
    LINEARS = (*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down")))
    _fields_ = [
        *((name, Pointer) for name in NORMS),
        *((name.split(".")[1], Linear) for name in LINEARS),
        *((name, Pointer) for name in ("keys", "values")),
    ]


class Model(Structure):
    """The model's sizes and the pointers that no layer has, as in cpu_decode.cpp."""

    _fields_ = [
        *((name, c_int64) for name in ("layers", "D", "H", "HKV", "DH", "inner", "V", "positions")),
        *((name, c_float) for name in ("eps", "unused")),
        *((name, Pointer) for name in ("embedding", "norm", "cos", "sin")),
    ]


class Tokens(Structure):
    """What one forward computes, as in cpu_decode.cpp."""

    _fields_ = [
        *((name, c_int64) for name in ("N", "B", "capacity", "n")),
        *((name, Pointer) for name in ("ids", "positions", "rows", "slots", "prompt", "hidden")),
    ]


class TreeTokens(Structure):
    """Where the tokens of token trees stand, as in cpu_tree.cpp."""

    _fields_ = [*((name, c_int64) for name in ("T", "H", "HKV")), ("enter", Pointer), ("leave", Pointer)]


# --------------------------------------------------------------------------------------------------------- the library


def processor() -> str:
    """Name the instructions of this machine: a cache folder may be shared with others that lack them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def compile_library(compiler: str) -> Path:
    """Build the sources unless that was done before; return the library. Raises OSError or CalledProcessError.

    Its SHA-256 stands beside it: a library that was cut short, as on a full disk, would end the process when loaded.
    """
    texts = [file.read_text(encoding="utf-8") for file in (*HEADERS, *SOURCES)]
    key = hashlib.sha256("\n".join([*texts, compiler, *FLAGS, processor()]).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlpa"
    library, checksum = folder / f"cpu-{key}.so", folder / f"cpu-{key}.sha256"
    if not is_whole(library, checksum):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # processes that build at once do not see each other
            built, digest = Path(scratch) / library.name, Path(scratch) / checksum.name
            command = [*shlex.split(compiler), *FLAGS, *map(str, SOURCES), "-o", str(built)]
            subprocess.run(command, check=True, capture_output=True, timeout=300)
            digest.write_text(hashlib.sha256(built.read_bytes()).hexdigest(), encoding="utf-8")
            built.replace(library)
            digest.replace(checksum)
    return library


def is_whole(library: Path, checksum: Path) -> bool:
    """Say whether a library is there as it was built."""
    if not (library.is_file() and checksum.is_file()):
        return False
    return checksum.read_text(encoding="utf-8") == hashlib.sha256(library.read_bytes()).hexdigest()


@cache
def load_library() -> tuple[ctypes.CDLL | None, str]:
    """Return the library, or None and the reason why there is none, of which a warning tells, too."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    try:
        if compiler is None:
            raise OSError("no C++ compiler: g++, clang++ or CXX")
        library = ctypes.CDLL(str(compile_library(compiler)))
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:  # RuntimeError: no home folder
        said = (getattr(error, "stderr", None) or str(error).encode()).decode(errors="replace").strip() or "no message"
        reason = f"{compiler or 'nothing'} cannot build the CPU kernels: {said.splitlines()[-1]}"
        warnings.warn(f"{reason}; torch serves, at half the speed", RuntimeWarning, stacklevel=2)
        return None, reason
    library.forward.argtypes = [POINTER(Model), POINTER(Layer), POINTER(Tokens), c_int64, c_int64]
    library.forward.restype = c_int64
    library.sample.argtypes = [Pointer, Pointer, c_int64, Pointer, c_float, *[c_int64] * 4, Pointer, Pointer]
    library.tree_forward.argtypes = [POINTER(TreeTokens), c_int64, c_int64, *[Pointer] * 5]
    library.tree_backward.argtypes = [POINTER(TreeTokens), c_int64, c_int64, *[Pointer] * 9]
    library.tree_forward_low.argtypes = library.tree_forward.argtypes
    library.tree_backward_low.argtypes = library.tree_backward.argtypes
    library.product.argtypes = [*[Pointer] * 5, c_int64, c_int64, c_int64, c_bool, c_int64]
    library.fold.argtypes = [Pointer, Pointer, c_int64, c_int64, c_int64, c_float, Pointer, c_int64, c_int64]
    library.gradients.argtypes = [*library.fold.argtypes[:-1], c_bool, c_bool, c_int64]
    library.norm_forward.argtypes = [*[Pointer] * 6, c_int64, c_int64, c_float, c_int64]
    library.norm_backward.argtypes = [*[Pointer] * 7, c_int64, c_int64, c_int64]
    library.rope.argtypes = [*[Pointer] * 4, c_int64, c_int64, c_int64, c_float, c_int64]
    library.swiglu_forward.argtypes = [*[Pointer] * 3, c_int64, c_int64, c_int64]
    library.swiglu_backward.argtypes = [*[Pointer] * 5, c_int64, c_int64, c_int64]
    for name in (
        "sample", "tree_forward", "tree_backward", "tree_forward_low", "tree_backward_low", "product", "fold",
        "gradients", "norm_forward", "norm_backward", "rope", "swiglu_forward", "swiglu_backward",
    ):  # fmt: skip
        getattr(library, name).restype = None
    return library, ""


def use_cpu(x: Tensor, low: bool = False) -> bool:
    """Say whether a call on this tensor runs in C++: fp32 on a CPU, `--kernels auto`, and a library that was built.

    low: bf16 is taken, too.
    """
    known = x.dtype == torch.float32 or low and x.dtype == torch.bfloat16
    return backend.chosen == "auto" and known and x.device.type == "cpu" and load_library()[0] is not None


def decodes(weights: Iterable[Tensor]) -> bool:
    """Say whether sampling with these weights, all of one type, runs in C++."""
    weights = [*weights]
    quads = all(weight.shape[-1] % 4 == 0 for weight in weights)  # of bf16 four features are multiplied at once
    return use_cpu(weights[0], low=True) and (quads or weights[0].dtype == torch.float32)


# ----------------------------------------------------------------------------------------------------------- functions


class CachedTrunk:
    """The trunk of one policy, to compute tokens that continue rows of a KV cache.

    Args:
        weights: the trunk's, all fp32 or all bf16, under their Hugging Face names without "model."; they must stay
            where they are. Biases may be missing.
        H, Hkv: heads of queries, and of keys and values.
        eps: of the norms.
        cos, sin: (positions, Dh/2) fp32, for each position that a token may have.
        adapters: LoRA's A (rank, in), B (out, rank) and factor, by their layers' names; copied where rank % 4.
    Raises:
        ValueError: a head dim that the library is not compiled for, weights of other or several types, or one that is
            not contiguous or not on the CPU; in bf16 widths that are no multiples of 4.
    """

    def __init__(
        self, weights: dict[str, Tensor], H: int, Hkv: int, eps: float, cos: Tensor, sin: Tensor,
        adapters: dict[str, tuple[Tensor, Tensor, float]] | None = None,
    ) -> None:  # fmt: skip
        L = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers."))
        embedding, inner = weights["embed_tokens.weight"], len(weights["layers.0.mlp.gate_proj.weight"])
        self.dtype, self.head_dim = embedding.dtype, 2 * cos.shape[1]
        low = {}  # a rank that is no multiple of 4 is filled up with zeros
        for name, (A, B, _) in (adapters or {}).items():
            more = -len(A) % 4
            low |= {f"{name}.A": pad(A, (0, 0, 0, more)), f"{name}.B": pad(B, (0, more))}
        for name, weight in (weights | low).items():
            if weight.dtype != self.dtype or not weight.is_contiguous() or weight.device.type != "cpu":
                needed = f"{self.dtype}, contiguous, on the CPU is needed"
                raise ValueError(f"{name} is {weight.dtype} on {weight.device}; {needed}")
        if not decodes(weights.values()):
            raise ValueError(f"C++ has no products of {self.dtype}, {embedding.shape[1]} and {inner} wide")
        if self.head_dim not in HEAD_DIMS:
            raise ValueError(f"head dim {self.head_dim} must be one of {HEAD_DIMS}")
        # Norms and biases are read as fp32; products as they are.
        self.kept = {name: x if x.dim() > 1 else x.float() for name, x in weights.items()}
        self.kept |= low | {"cos": cos, "sin": sin}
        V, self.D = embedding.shape
        pointers = map(self.address, ("embed_tokens.weight", "norm.weight", "cos", "sin"))
        self.model = Model(L, self.D, H, Hkv, self.head_dim, inner, V, len(cos), eps, 0.0, *pointers)
        self.layers = (Layer * L)()
        for i, layer in enumerate(self.layers):
            for name in Layer.NORMS:
                setattr(layer, name, self.address(f"layers.{i}.{name}.weight"))
            for name in Layer.LINEARS:
                whole = f"layers.{i}.{name}"
                linear = Linear(*(self.address(f"{whole}.{part}") for part in ("weight", "bias", "A", "B")))
                if linear.A:
                    linear.rank, linear.scale = len(self.kept[f"{whole}.A"]), adapters[whole][2]
                setattr(layer, name.split(".")[1], linear)

    def address(self, name: str) -> int | None:
        """Return where a tensor is kept; None: there is no such."""
        return self.kept[name].data_ptr() if name in self.kept else None

    def __call__(
        self, token_ids: Tensor, position_ids: Tensor, rows: Tensor, slots: Tensor, keys: list[Tensor],
        values: list[Tensor], decoding: Rows | None = None,
    ) -> Tensor:  # fmt: skip
        """Store the tokens' keys and values; return their hidden states after the final norm, (N, D), as the weights.

        Args:
            token_ids, position_ids, rows, slots: (N,) long; tokens of one row in the order of their slots.
            keys, values: per layer (B, Hkv, capacity, Dh), contiguous, of the weights' type; written in place.
            decoding: the tokens are one of each running candidate; None: each sees its row up to itself.
        Raises:
            ValueError: shapes that do not fit, or a token outside vocabulary, positions or cache.
        """
        (B, Hkv, capacity, Dh), N = keys[0].shape, len(token_ids)
        where = [x.contiguous() for x in (token_ids, position_ids, rows, slots)]
        if any(x.shape != (N,) or x.dtype != torch.long for x in where):
            raise ValueError(f"ids, positions, rows and slots {[tuple(x.shape) for x in where]} must be ({N},) long")
        if any(x.dtype != self.dtype for x in (*keys, *values)):
            raise ValueError(f"a cache of {keys[0].dtype} does not fit weights of {self.dtype}")
        if (Hkv, Dh) != (self.model.HKV, self.head_dim) or not len(keys) == len(values) == len(self.layers):
            raise ValueError(f"a cache of {len(keys)} x {tuple(keys[0].shape)} does not fit {len(self.layers)} layers"
                             f" of {self.model.HKV} x {self.head_dim}")  # fmt: skip
        for layer, k, v in zip(self.layers, keys, values, strict=True):
            layer.keys, layer.values = k.data_ptr(), v.data_ptr()
        hidden = torch.empty(N, self.D)
        n, prompt = (1, None) if decoding is None else (decoding.members.shape[1], decoding.prompt.data_ptr())
        tokens = Tokens(N, B, capacity, n, *(x.data_ptr() for x in where), prompt, hidden.data_ptr())
        how = int(self.dtype == torch.bfloat16), torch.get_num_threads()
        wrong = load_library()[0].forward(self.model, self.layers, tokens, *how)
        if wrong >= 0:
            names = zip(("id", "position", "row", "slot"), (int(x[wrong]) for x in where), strict=True)
            limits = f"{self.model.V} ids, {self.model.positions} positions or a cache of ({B}, {capacity})"
            raise ValueError(f"token {wrong} ({', '.join(f'{name} {x}' for name, x in names)}) is outside {limits}")
        return hidden.to(self.dtype)


def sample(hidden: Tensor, weight: Tensor, temperature: float, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `sample_head` returns on the torch path: ids (R,) long and log-probs (R,) fp32."""
    (R, D), V = hidden.shape, len(weight)
    hidden, weight, uniforms = hidden.float().contiguous(), weight.contiguous(), uniforms.contiguous()
    ids, logprobs = torch.empty(R, dtype=torch.long), torch.empty(R)
    half, threads = int(weight.dtype == torch.bfloat16), torch.get_num_threads()
    how = uniforms.data_ptr(), temperature, R, D, V, threads
    load_library()[0].sample(hidden.data_ptr(), weight.data_ptr(), half, *how, ids.data_ptr(), logprobs.data_ptr())
    return ids, logprobs


def tree_tokens(q: Tensor, k: Tensor, spans: Tensor) -> TreeTokens:
    """Describe trees to C++: spans (2, T) int32 are enter and leave of each token."""
    return TreeTokens(len(q), q.shape[1], k.shape[1], spans[0].data_ptr(), spans[1].data_ptr())


def tree_forward(q: Tensor, k: Tensor, v: Tensor, spans: Tensor) -> tuple[Tensor, Tensor]:
    """Attend with q (T, H, Dh) to k and v (T, Hkv, Dh), contiguous; return o (T, H, Dh) and each softmax's sum (H, T).

    The latter as its logarithm, of the scores q·k/√Dh, in fp32.
    """
    dtype, (q, k, v) = q.dtype, widened(q, k, v)
    out, lse = torch.empty_like(q), torch.empty(q.shape[1], len(q))
    pointers = (x.data_ptr() for x in (q, k, v, out, lse))
    by_dtype("tree_forward", q)(tree_tokens(q, k, spans), q.shape[2], torch.get_num_threads(), *pointers)
    return out.to(dtype), lse


def tree_backward(q: Tensor, k: Tensor, v: Tensor, spans: Tensor, out: Tensor, lse: Tensor, g: Tensor) -> list[Tensor]:
    """Return the gradients of q, k and v for an upstream gradient g (T, H, Dh), contiguous."""
    dtype, (q, k, v, out, g) = q.dtype, widened(q, k, v, out, g)
    found = [torch.empty_like(q), *(torch.zeros_like(x, dtype=torch.float32) for x in (k, v))]
    pointers = (x.data_ptr() for x in (q, k, v, out, lse, g, *found))
    by_dtype("tree_backward", q)(tree_tokens(q, k, spans), q.shape[2], torch.get_num_threads(), *pointers)
    return [x.to(dtype) for x in found]


def widened(*tensors: Tensor) -> Iterable[Tensor]:
    """Return bf16 tensors in fp32 where C++ has no products of bf16, and others as they are."""
    return tensors if load_library()[0].has_bf16() else [x.float() for x in tensors]


def by_dtype(name: str, x: Tensor) -> Callable[..., None]:
    """Return the library's function for tensors like x."""
    return getattr(load_library()[0], f"{name}_low" if x.dtype == torch.bfloat16 else name)


def multiplies(a: Tensor, b: Tensor, out: Tensor) -> bool:
    """Say whether `product` takes these matrices: bf16 on a CPU that has products of them, with an fp32 result."""
    low = a.dtype == b.dtype == torch.bfloat16 and out.dtype == torch.float32 and out.is_contiguous()
    return low and use_cpu(a, low=True) and bool(load_library()[0].has_bf16())


def product(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """Write a (M, K) @ b (K, N), bf16 with any strides, to out (M, N) fp32, contiguous, or add it there."""
    strides = [(c_int64 * 2)(*x.stride()) for x in (a, b)]
    sizes = *out.shape, a.shape[1], add, torch.get_num_threads()
    load_library()[0].product(a.data_ptr(), strides[0], b.data_ptr(), strides[1], out.data_ptr(), *sizes)


def folds(logits: Tensor) -> bool:
    """Say whether `fold` and `dlogits` take these logits: long rows, in fp32 on a CPU."""
    return logits.shape[1] >= LONG and use_cpu(logits) and logits.is_contiguous()


def fold(logits: Tensor, targets: Tensor, first: int, temperature: float, stats: Tensor) -> None:
    """Do what `linear_logprob.fold` does; a row of stats is contiguous."""
    pointers, strides = (logits.data_ptr(), targets.data_ptr()), (stats.data_ptr(), stats.stride(0))
    load_library()[0].fold(*pointers, *logits.shape, first, 1 / temperature, *strides, torch.get_num_threads())


def dlogits(logits: Tensor, targets: Tensor, first: int, temperature: float, rows: Tensor, low: bool) -> Tensor:
    """Do what `linear_logprob.dlogits` does, in place; low: as bf16 in the first half of each row's memory."""
    pointers, strides = (logits.data_ptr(), targets.data_ptr()), (rows.data_ptr(), rows.stride(0))
    sizes, kind = (*logits.shape, first, 1 / temperature), (len(rows) == 5, low, torch.get_num_threads())
    load_library()[0].gradients(*pointers, *sizes, *strides, *kind)
    return logits.view(torch.bfloat16)[:, : logits.shape[1]] if low else logits


def passes(x: Tensor, width: int) -> bool:
    """Say whether the passes below take x, whose rows are so wide: bf16 on a CPU. They are given contiguous tensors."""
    return x.dtype == torch.bfloat16 and width % 16 == 0 and use_cpu(x, low=True)


def run_pass(name: str, tensors: Iterable[Tensor | None], *sizes: float) -> None:
    """Call a function of cpu_passes.cpp."""
    pointers = (None if x is None else x.data_ptr() for x in tensors)
    getattr(load_library()[0], name)(*pointers, *sizes, torch.get_num_threads())
