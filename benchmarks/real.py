"""Prefill and decode of a real checkpoint against its peers: python -m benchmarks.real FOLDER [--llama BIN --gguf FILE]

ours            `generate` in bf16, by the path that the trainer takes
transformers    its `generate`, in fp32 and in bf16
llama.cpp       BIN is its `llama-batched-bench`, FILE the same weights as BF16 (`llama-quantize IN OUT BF16`)
floor           the counted bytes and FLOP of a step at the rates that torch reads and multiplies at here

Every side decodes --batch sequences of --context + --new tokens on --threads threads, in a process of its own, in
turns; of --rounds the best is printed, for what disturbs a busy machine only slows it down. Tokens/s.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.throughput import loaded_decoder, random_prompts, seconds_of
from model import Qwen2Config


def rates(kind: str, folder: str, threads: int, batch: int, context: int, new: int) -> tuple[float, float]:
    """Return tokens/s of prefill and of decode steps: a call less one for a single token."""
    dtype = torch.float32 if "fp32" in kind else torch.bfloat16
    sample = loaded_decoder("ours" if kind == "ours" else "dynamic", folder, threads, dtype)
    prompts = random_prompts(Qwen2Config.from_file(folder).vocab_size, batch, context)
    sample(prompts[:2], 2, 1.0)
    first = seconds_of(lambda: sample(prompts, 1, 1.0))
    return batch * context / first, batch * new / (seconds_of(lambda: sample(prompts, new + 1, 1.0)) - first)


def llama_rates(binary: str, gguf: str, threads: int, batch: int, context: int, new: int) -> tuple[float, float]:
    """Ask llama.cpp's own benchmark."""
    sizes = dict(m=gguf, c=batch * (context + new), npp=context, ntg=new, npl=batch, t=threads)
    command = [binary, *(f"{x}" for name, value in sizes.items() for x in (f"-{name}", value))]
    environment = os.environ | {"LD_LIBRARY_PATH": str(Path(binary).parent)}
    done = subprocess.run([*command, "--output-format", "jsonl"], env=environment, capture_output=True, check=True)
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith(b"{")))
    return found["speed_pp"], found["speed_tg"]


def machine_rates(threads: int) -> tuple[float, float]:
    """Return bytes/s that torch reads and FLOP/s of its bf16 products."""
    torch.set_num_threads(threads)
    numbers, a, b = torch.ones(2**27), torch.ones(1024, 1024).bfloat16(), torch.ones(1024, 4096).bfloat16()
    reading = min(seconds_of(numbers.sum) for _ in range(5))
    return numbers.nbytes / reading, 2 * a.numel() * b.shape[1] / min(seconds_of(lambda: a @ b) for _ in range(20))


def floors(folder: str, threads: int, batch: int, context: int, new: int) -> tuple[float, float]:
    """Return tokens/s that the machine's rates allow: products of a prefill; bytes or FLOP of a decode step."""
    c = Qwen2Config.from_file(folder)
    reading, products = machine_rates(threads)
    kv_width = c.head_dim * c.num_key_value_heads
    layers = c.num_hidden_layers * (
        2 * c.hidden_size * (c.hidden_size + kv_width) + 3 * c.hidden_size * c.intermediate_size
    )
    weights, seen = layers + c.hidden_size * c.vocab_size, context + new / 2
    pairs = 4 * c.num_hidden_layers * c.hidden_size  # FLOP of a query and a key
    step = 2 * weights + 4 * c.num_hidden_layers * kv_width * seen * batch  # bytes
    prefill = context * (2 * layers + pairs * context / 2)
    seconds = max(step / reading, batch * (2 * weights + pairs * seen) / products)
    print(f"reading {reading / 1e9:.1f} GB/s, bf16 products {products / 1e9:.0f} GFLOP/s, batch {batch}:"
          f" {step / 1e9:.2f} GB and {batch * 2 * weights / 1e9:.1f} GFLOP a step")  # fmt: skip
    return context / prefill * products, batch / seconds


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--llama", default="", help="path of llama-batched-bench")
    parser.add_argument("--gguf", default="")
    parser.add_argument(
        "--peers", default="transformers fp32,transformers bf16", help="others to measure; may be empty"
    )
    for name, value in dict(context=128, new=64, threads=2, rounds=3).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32])
    o = parser.parse_args()
    kinds = ["ours", *filter(None, o.peers.split(","))]
    print("| batch | | prefill | decode |\n|---:|---|---:|---:|")
    with ExitStack() as stack:
        pools = {k: stack.enter_context(ProcessPoolExecutor(1, mp_context=get_context("spawn"))) for k in kinds}
        for batch in o.batch:
            sizes, found = (o.threads, batch, o.context, o.new), {}
            for _ in range(o.rounds):
                measured = {k: pools[k].submit(rates, k, o.folder, *sizes).result() for k in kinds}
                measured |= {"llama.cpp bf16": llama_rates(o.llama, o.gguf, *sizes)} if o.llama else {}
                for kind, two in measured.items():
                    found[kind] = tuple(map(max, two, found.get(kind, (0.0, 0.0))))
            found["floor"] = floors(o.folder, *sizes)
            for kind, (prefill, decode) in found.items():
                print(f"| {batch} | {kind} | {prefill:,.0f} | {decode:,.1f} |", flush=True)


if __name__ == "__main__":
    main()
