"""Compile every kernel ahead of time, in each configuration that ships, for GPUs that are not here.

    python tests/aot.py        prints a Markdown table: one row per kernel, configuration and architecture

No GPU and no driver is needed: `triton.compile` runs the ptxas of Triton's own wheel. Registers and spills come from
ptxas's log and from cuobjdump, shared memory from Triton. `tests/test_aot.py` demands what the table shows.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import kernels
from kernels.linear_kl import TILE as KL_TILE
from kernels.linear_kl import dlogits_kl_kernel, fold_kl_kernel
from kernels.linear_logprob import TILE as HEAD_TILE
from kernels.linear_logprob import dlogits_kernel, fold_kernel

# not "from kernels import rmsnorm": a package's attribute may be the function of that name
rmsnorm, rope, swiglu = (importlib.import_module(f"kernels.{name}") for name in ("rmsnorm", "rope", "swiglu"))
decode, prefill, sampling, rows = (
    importlib.import_module(f"kernels.{name}")
    for name in ("decode_attention", "prefill_attention", "sample_head", "rows")
)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program may have: A100, H100/H200, B200
FP32, BF16, INT64 = "*fp32", "*bf16", "*i64"


class Case(NamedTuple):
    """One configuration of one kernel: the types of its arguments, its constants, and how it is launched."""

    kernel: object
    types: dict[str, str]  # argument → Triton type; a pointer or an integer named in `aligned` is a multiple of 16
    constants: dict[str, object]
    num_warps: int
    num_stages: int = 3
    aligned: tuple[str, ...] = ()  # integers; pointers of torch's allocator always are

    @property
    def name(self) -> str:
        module = self.kernel.__module__.removeprefix("kernels.")
        shown = " ".join(f"{k}={v}" for k, v in self.constants.items() if v is not None)
        return f"{module}.{self.kernel.__name__} {'bf16' if BF16 in self.types.values() else 'fp32'} {shown}"


def with_tile(kernel, types: dict, tile: dict, aligned: tuple[str, ...], **constants) -> Case:
    """Make a case whose block sizes, warps and stages are the module's own."""
    blocks = {name: value for name, value in tile.items() if name not in ("num_warps", "num_stages")}
    launch = {name: tile[name] for name in ("num_warps", "num_stages") if name in tile}
    return Case(kernel, types, constants | blocks, **launch, aligned=aligned)


def head_cases() -> list[Case]:
    """List the row kernels of the three heads."""
    row = dict(targets=INT64, first="i32", v="i32", inv_temperature="fp32")
    one = row | dict(logits=FP32, logits_stride="i32")
    both = row | dict(logits=FP32, ref_logits=FP32, stride="i32")
    grads = dict(rows=FP32, out_stride="i32", rows_stride="i32")
    stats = dict(stats=FP32, stats_stride="i32")
    cases = [with_tile(fold_kernel, one | stats, HEAD_TILE, ("v", "logits_stride"))]
    for out in (BF16, FP32):
        for entropy in (False, True):
            types, aligned = one | grads | dict(out=out), ("v", "logits_stride", "out_stride")
            cases.append(with_tile(dlogits_kernel, types, HEAD_TILE, aligned, ENTROPY=entropy))
    cases.append(with_tile(fold_kl_kernel, both | stats, KL_TILE, ("v", "stride")))
    for out in (BF16, FP32):
        types, aligned = both | grads | dict(out=out), ("v", "stride", "out_stride")
        cases.append(with_tile(dlogits_kl_kernel, types, KL_TILE, aligned))
    return cases


class Model(NamedTuple):
    """The sizes of a Qwen-2.5 that kernels depend on, and the type of its tensors."""

    D: int
    H: int
    Hkv: int
    Dh: int
    width: int
    dtype: str = BF16


MODELS = [  # 0.5B, 1.5B, 3B, 7B, and one in fp32
    Model(896, 14, 2, 64, 4864),
    Model(1536, 12, 2, 128, 8960),
    Model(2048, 16, 2, 128, 11008),
    Model(3584, 28, 4, 128, 18944),
    Model(896, 14, 2, 64, 4864, FP32),
]


def model_cases(model: Model) -> list[Case]:
    """List the model's memory-bound kernels at one model's sizes."""
    cases, T = [], model.dtype
    for fused in (False, True):
        types = dict.fromkeys(("x", "residual", "weight", "y", "h"), T) | dict(rstd=FP32, eps="fp32")
        absent = {} if fused else dict(residual=None, h=None)
        constants, tile = dict(D=model.D), rmsnorm.tile(model.D)
        cases.append(with_tile(rmsnorm.forward_kernel, types, tile, (), RESIDUAL=fused, **constants, **absent))
        types = dict.fromkeys(("g", "d", "h", "weight", "dh"), T) | dict(rstd=FP32, dw=FP32, N="i32")
        absent = {} if fused else dict(d=None)
        cases.append(with_tile(rmsnorm.backward_kernel, types, tile, (), ADD=fused, **constants, **absent))
    for kernel, names in (
        (swiglu.forward_kernel, ("gate", "up", "y")),
        (swiglu.backward_kernel, ("g", "gate", "up", "d_gate", "d_up")),
    ):
        for row in (model.width, 2 * model.width):  # gate and up apart, and parts of one product
            sizes = dict(GATE_ROW=row, UP_ROW=row, WIDTH=model.width)
            cases.append(with_tile(kernel, dict.fromkeys(names, T), swiglu.TILE, (), **sizes))
    types = dict.fromkeys(("q", "k", "v", "q_out", "k_out", "v_out"), T) | dict(cos=FP32, sin=FP32)
    types |= dict(rows=INT64, slots=INT64, capacity="i32")
    q_row, kv_row, all_rows = model.H * model.Dh, model.Hkv * model.Dh, (model.H + 2 * model.Hkv) * model.Dh
    apart, together = (q_row, kv_row, kv_row), (all_rows,) * 3  # q, k and v: of three products, or parts of one
    for cached, sign, strides in ((False, 1, apart), (False, -1, apart), (True, 1, apart), (True, 1, together)):
        given = {} if cached else dict.fromkeys(("v", "v_out", "rows", "slots"))
        given |= rope.tile(model.H, model.Hkv, model.Dh) | dict(zip(("Q_ROW", "K_ROW", "V_ROW"), strides, strict=True))
        cases.append(with_tile(rope.rope_kernel, types, given, (), CACHED=cached, SIGN=sign))
    return cases


def decode_cases(model: Model) -> list[Case]:
    """List decode attention's kernels at one model's sizes, for rows of one candidate and of several."""
    fp32 = model.dtype == FP32
    tile, most = (decode.FP32_TILE, decode.FP32_QUERIES) if fp32 else (decode.TILE, decode.QUERIES)
    types = dict.fromkeys(("q", "keys", "values"), model.dtype) | dict.fromkeys(("sums", "stats"), FP32)
    types |= dict(prompt=INT64, members=INT64, pieces="*i32", capacity="i32", scale="fp32")
    G, cases = model.H // model.Hkv, []
    for n in (1, 4, 8):
        M = min(most, max(16, 1 << (n * G - 1).bit_length()))
        sizes = dict(HKV=model.Hkv, G=G, CANDIDATES=n, DH=model.Dh, M=M, DIM=model.Dh, UPCAST=False)
        cases.append(with_tile(decode.decode_kernel, types, tile, (), **sizes))
    types = dict(sums=FP32, stats=FP32, place=INT64, spans="*i32", out=model.dtype)
    sizes = dict(CANDIDATES=4, H=model.H, DH=model.Dh, DIM=model.Dh)
    return [*cases, with_tile(decode.merge_pieces_kernel, types, decode.MERGE, (), **sizes)]


def plan_cases() -> list[Case]:
    """List the kernel that cuts rows into pieces, for few rows and for many."""
    types = dict(lengths=INT64, members=INT64, pieces="*i32", spans="*i32")
    types |= dict.fromkeys(("B", "capacity", "most"), "i32")
    sizes = [dict(CANDIDATES=n, BLOCK=decode.TILE["BLOCK"], ROWS=rows) for n, rows in ((1, 64), (4, 1024))]
    return [Case(decode.plan_kernel, types, constants, num_warps=4) for constants in sizes]


def prefill_case(model: Model) -> Case:
    """Make the case of prefill attention at one model's sizes."""
    tile = prefill.FP32_TILE if model.dtype == FP32 else prefill.TILE
    types = dict.fromkeys(("q", "keys", "values", "out"), model.dtype)
    types |= dict(tiles="*i32", capacity="i32", scale="fp32")
    sizes = dict(HKV=model.Hkv, G=model.H // model.Hkv, DH=model.Dh, DIM=model.Dh, UPCAST=False)
    return with_tile(prefill.prefill_kernel, types, tile, (), **sizes)


def adopt_case(model: Model) -> Case:
    """Make the case of a candidate's adoption at one model's sizes."""
    types = dict(addresses=INT64, like=model.dtype)
    types |= dict.fromkeys(("row", "prompt", "tokens", "candidate", "capacity"), "i32")
    sizes = dict(CANDIDATES=4, HKV=model.Hkv, DH=model.Dh, DIM=model.Dh)
    return with_tile(rows.adopt_kernel, types, rows.ADOPT, (), **sizes)


def sampling_cases() -> list[Case]:
    """List the two kernels of sampling from the head, at each number of rows that has a tile of its own."""
    cases = []
    for dtype, tiles in ((BF16, sampling.TILES), (FP32, [sampling.FP32_TILE])):
        types = dict(hidden=dtype, weight=dtype, seeds=INT64, steps=INT64, partial=FP32, winner="*i32")
        types |= dict.fromkeys(("R", "V", "D"), "i32") | dict(inv_temperature="fp32")
        for tile in tiles:
            for sampled in (False, True):
                constants = dict(SAMPLED=sampled, UPCAST=False)
                cases.append(with_tile(sampling.sample_kernel, types, tile, ("V", "D"), **constants))
    types = dict(partial=FP32, logprobs=FP32, winner="*i32", ids=INT64, R="i32", blocks="i32")
    return [*cases, with_tile(sampling.merge_blocks_kernel, types, sampling.MERGE, ())]


CASES = [*head_cases(), *sampling_cases(), *plan_cases(), *map(prefill_case, MODELS)]
CASES += [adopt_case(m) for m in MODELS if m.H != 12]  # 1.5B has 3B's KV heads
CASES += [case for m in MODELS for case in model_cases(m) + decode_cases(m)]
MODEL_SIZES = ("blocks",)  # the vocabulary's: the same in every call of a run


def all_kernels() -> set[object]:
    """Find every Triton kernel of the package, without the functions that kernels call."""
    modules = [importlib.import_module(f"kernels.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)]
    found = {v for module in modules for v in vars(module).values() if isinstance(v, triton.runtime.JITFunction)}
    return {kernel for kernel in found if kernel.__name__.endswith("_kernel")}


def compile_ahead(case: Case, arch: int) -> dict[str, int | float]:
    """Compile a case for sm_<arch>; give registers, bytes of stack, spills and shared memory, and the seconds taken."""
    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else case.types[name] for name in names}
    aligned = [name for name in names if signature[name].startswith("*") or name in case.aligned]
    source = ASTSource(
        fn=case.kernel,
        signature=signature,
        constexprs=case.constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    log, start = io.StringIO(), time.perf_counter()
    with contextlib.redirect_stdout(log), triton.knobs.nvidia.scope(), triton.knobs.compilation.scope():
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True  # a cached kernel has no ptxas log
        options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    seconds = time.perf_counter() - start
    spills = [int(re.search(rf"(\d+) bytes spill {kind}", log.getvalue())[1]) for kind in ("stores", "loads")]
    wide = re.findall(r"(?:ld|st)\.global[.\w:]*\.v4\.[bf]32", compiled.asm["ptx"])
    return resources(compiled.asm["cubin"]) | {
        "wide": len(wide),  # loads and stores of 16 bytes a thread
        "spills": sum(spills),
        "shared": compiled.metadata.shared,
        "seconds": seconds,
    }


def resources(cubin: bytes) -> dict[str, int]:
    """Read registers, stack and local bytes off a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
        shown = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", shown).groups()
    return {"registers": int(registers), "stack": int(stack), "local": int(local)}


def main() -> None:
    """Print the table."""
    print(f"triton {triton.__version__}; shared memory in bytes; stack, local memory and spills are 0 unless shown\n")
    print("| kernel and constants | warps | stages | sm | registers | shared | spills | 16-byte accesses | seconds |")
    print("|---|---|---|---|---|---|---|---|---|")
    for case in CASES:
        for arch in SHARED_LIMIT:
            r = compile_ahead(case, arch)
            spilled = r["spills"] + r["stack"] + r["local"]
            print(
                f"| {case.name} | {case.num_warps} | {case.num_stages} | {arch} | {r['registers']} | {r['shared']}"
                f" | {spilled} | {r['wide']} | {r['seconds']:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
