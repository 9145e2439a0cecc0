"""Parts of an iteration on a GPU that no kernel benchmark shows: each figure goes to JSON as soon as it is known.

    python -m benchmarks.gpu_parts --out parts.json card          rates of copies and bare products, and their errors
    python -m benchmarks.gpu_parts --out parts.json decode        a whole decode step, replayed from its graph, against
                                                                  its floor and, where installed, `transformers`
    python -m benchmarks.gpu_parts --out parts.json tree          attention over token trees, forward and backward
    python -m benchmarks.gpu_parts --out parts.json workspace     log-prob heads with 16 to 256 MiB of logits

On a CPU everything runs at a tiny size, to test itself; those figures mean nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu_train import SHAPES, WITH, build, random_weights, update_json
from benchmarks.measure import copy_seconds, median_seconds, synchronize, versions
from benchmarks.peers import installed
from config import Config
from dialogue import Candidate, Dialogue, Turn
from kernels.linear_logprob import linear_logprob
from kernels.tree_attention import Tree, tree_attention
from learners.loading import own_device
from model import Qwen2Config, Qwen2ForCausalLM
from packing import collate, pack
from sampler import Sampler

DEVICE = own_device()
CUDA = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if CUDA else torch.float32
SHAPE = SHAPES["3B" if CUDA else "small"]
Found = Iterator[tuple[str, object]]  # what a part measures: a name and a number, or a dict of them


def timed(call: Callable[[], object]) -> float:
    """Return the median milliseconds of a call."""
    return 1e3 * median_seconds(call, DEVICE.type)


def normal(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    """Draw standard normals on the device."""
    return torch.randn(shape, device=DEVICE).to(dtype)


def card() -> Found:
    """Measure copies and bare products, and what fp32 output of a bf16 product costs and gains."""
    n, rows, width = (8192, 4096, 2048) if CUDA else (256, 128, 64)
    moved = 1 << (31 if CUDA else 21)
    yield "copy GB/s", 1e-9 * moved / copy_seconds(moved, DEVICE.type)
    a, b = normal(n, n), normal(n, n)
    yield f"product {n}³ TFLOP/s", 2e-9 * n**3 / timed(lambda: a @ b)
    a, b = normal(rows, width), normal(width, rows)
    outputs = {"of its dtype": {}} | ({"fp32": dict(out_dtype=torch.float32)} if CUDA else {})  # CUDA's alone
    for name, how in outputs.items():
        milliseconds = timed(lambda how=how: torch.mm(a, b, **how))
        yield f"product {rows}×{width}×{rows}, output {name}", dict(
            ms=milliseconds, error=float((torch.mm(a, b, **how).double() - a.double() @ b.double()).abs().max())
        )
    sums = normal(rows, rows, dtype=torch.float32)
    truth = sums.double() + a.double() @ b.double()
    for name, how in outputs.items():
        found = torch.addmm(sums if how else sums.to(DTYPE), a, b, **how)
        yield f"addmm, output {name}, error", float((found.double() - truth).abs().max())


def decode() -> Found:
    """Measure decode steps at batch 64 and a context of 1,024, from a CUDA graph, and `transformers`' beside them."""
    batch, context, steps = (64, 1024, 200) if CUDA else (2, 16, 4)
    shape = replace(SHAPE, max_position_embeddings=8192)
    with torch.device("meta"):
        weights = random_weights(Qwen2ForCausalLM(shape), shape, DEVICE)
    policy = build(shape, {name: weight.to(DTYPE) for name, weight in weights.items()}).requires_grad_(False)
    del weights
    prompts = torch.randint(3, shape.vocab_size, (batch, context)).tolist()
    settings = dict(max_new_tokens=steps + 8, stop_ids=[], batch_size=batch, max_rows=batch)
    sampler = Sampler(policy, n=1, **settings)
    for key, prompt in enumerate(prompts):
        assert sampler.start(key, prompt, [key])
    start = time.perf_counter()
    sampler.step()
    synchronize(DEVICE.type)
    yield f"prefill of {batch * context:,} tokens and first step, cold, ms", 1e3 * (time.perf_counter() - start)
    for _ in range(4):
        sampler.step()
    synchronize(DEVICE.type)
    start = time.perf_counter()
    for _ in range(steps):
        sampler.step()
    synchronize(DEVICE.type)
    ms = 1e3 * (time.perf_counter() - start) / steps
    read = sum(p.nbytes for p in policy.parameters()) + batch * (context + steps // 2) * sampler.bytes_per_slot
    moved = min(read, 1 << 31)
    floor = 1e3 * copy_seconds(moved, DEVICE.type) * read / moved
    yield f"decode step, batch {batch}, context {context}", dict(ms=ms, floor_ms=floor, of_floor=floor / ms)
    del sampler
    if installed("transformers"):
        yield from transformers_steps(policy, shape, prompts, steps)


def transformers_steps(policy: Qwen2ForCausalLM, shape: Qwen2Config, prompts: list[list[int]], steps: int) -> Found:
    """Measure the decode steps of `transformers` with the same weights: a call less a call for one token."""
    from transformers import AutoModelForCausalLM
    from transformers import Qwen2Config as TheirConfig

    with torch.device(DEVICE):  # drawn there, and then replaced
        peer = AutoModelForCausalLM.from_config(TheirConfig(**shape.to_dict()), dtype=DTYPE)
    held = policy.state_dict()
    peer.load_state_dict(held | {"lm_head.weight": policy.head_weight})
    token_ids = torch.tensor(prompts, device=DEVICE)
    how = dict(do_sample=True, top_k=0, top_p=1.0, eos_token_id=None, pad_token_id=0)
    for kind in ("dynamic", "static"):
        cache = {"cache_implementation": "static"} if kind == "static" else {}

        def seconds(new: int, cache=cache) -> float:
            start = time.perf_counter()
            counts = dict(max_new_tokens=new, min_new_tokens=new)
            peer.generate(input_ids=token_ids, attention_mask=torch.ones_like(token_ids), **how, **cache, **counts)
            synchronize(DEVICE.type)
            return time.perf_counter() - start

        few = max(2, steps // 4)
        seconds(few + 1)  # compiles
        yield f"transformers, {kind} cache, decode step, ms", 1e3 * (seconds(few + 1) - seconds(1)) / few


def random_dialogue(turns: int, n: int, tokens: int) -> Dialogue:
    """Make a dialogue of random ids: so many turns, candidates a turn, and tokens a candidate."""
    dialogue, history = Dialogue(0, "", ()), []
    for _ in range(turns):
        prompt = history + torch.randint(3, 700, (40,)).tolist()
        candidates = []
        for _ in range(n):
            ids = torch.randint(3, 700, (tokens,)).tolist()
            candidates.append(Candidate(token_ids=ids, logprobs=[0.0] * tokens, stop_reason="length"))
        dialogue.turns.append(Turn("", prompt, candidates, chosen=0))
        history = prompt + candidates[0].token_ids
    return dialogue


def tree() -> Found:
    """Measure attention over the trees of a micro-batch, against a bare product of the FLOP that it cannot avoid."""
    config = Config(ckpt="none")
    packed = [pack(random_dialogue(*((4, 4, 240) if CUDA else (2, 2, 5))), config) for _ in range(4)]
    row = collate(packed).inputs[2]
    T, pairs = len(row.enter), sum(int((p.position_ids + 1).sum()) for p in packed)
    given = Tree(row.enter.to(DEVICE), row.leave.to(DEVICE), row.blocks, DTYPE)
    H, Hkv, Dh = SHAPE.num_attention_heads, SHAPE.num_key_value_heads, SHAPE.head_dim
    q, k, v = (normal(1, heads, T, Dh).requires_grad_() for heads in (H, Hkv, Hkv))
    start = time.perf_counter()
    out = tree_attention(q, k, v, given)
    gradient = torch.randn_like(out)
    torch.autograd.grad(out, (q, k, v), gradient)
    synchronize(DEVICE.type)
    yield f"tree of {T:,} tokens, {pairs:,} pairs: mask and compilation, s", time.perf_counter() - start
    both = timed(lambda: torch.autograd.grad(tree_attention(q, k, v, given), (q, k, v), gradient))
    with torch.no_grad():
        forward = timed(lambda: tree_attention(q, k, v, given))
    work = 4 * pairs * H * Dh
    for name, ms, flop in (("forward", forward, work), ("forward and backward", both, 3.5 * work)):
        yield f"tree attention, {name}", {"ms": ms, "TFLOP/s of pairs that see each other": 1e-9 * flop / ms}


def workspace() -> Found:
    """Measure log-prob and entropy of a whole batch, forward, with logits of several sizes at a time."""
    N, D, V = (8192, SHAPE.hidden_size, SHAPE.vocab_size) if CUDA else (24, 64, 1000)
    hidden, weight, targets = normal(N, D), normal(V, D), torch.randint(V, (N,), device=DEVICE)
    with torch.no_grad():
        for mib in (16, 32, 64, 128, 256):
            ms = timed(lambda mib=mib: linear_logprob(hidden, weight, targets, workspace_bytes=mib << 20))
            yield f"linear_logprob forward, {mib} MiB", dict(ms=ms, tflops=2e-9 * N * D * V / ms)


PARTS = {part.__name__: part for part in (card, decode, tree, workspace)}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON to write; other parts' stay")
    parser.add_argument("part", choices=PARTS)
    args = parser.parse_args()
    found: dict[str, object] = {"machine": versions(*WITH)}
    for name, value in PARTS[args.part]():
        found[name] = value
        update_json(args.out, args.part, found)
        print(f"{args.part}: {name}: {value}", flush=True)


if __name__ == "__main__":
    main()
