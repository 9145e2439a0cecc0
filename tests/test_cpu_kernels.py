"""The C++ kernels against torch, and both against fp64: a decode step, sampling, token trees, heads, passes in bf16."""

import os
import platform
import subprocess
from contextlib import contextmanager
from copy import deepcopy

import pytest
import torch
from test_tree_attention import random_trees

from kernels import cpu, head, ppo_head, set_backend
from kernels.ppo_head import reference_ppo
from kernels.prefill_attention import Chunk, Chunks
from kernels.rmsnorm import reference_rmsnorm, rmsnorm
from kernels.rope import reference_rope, rope
from kernels.rows import Rows
from kernels.sample_head import sample
from kernels.swiglu import reference_swiglu, swiglu
from kernels.tree_attention import reference_tree_attention, tree_attention
from learners.lora import adapters, with_adapter
from model import Cached, KVCache, Qwen2Config, random_policy
from sampler import Sampler, cached_trunk, generate

pytestmark = pytest.mark.skipif(cpu.load_library()[0] is None, reason=cpu.load_library()[1] or "there is a library")

SHAPES = [(96, 3, 3), (64, 4, 2), (128, 2, 1), (256, 2, 2)]  # D, H, Hkv: head dims 32, 16, 64 and 128
HIDDEN = 2.0**13  # what stands in slots that nobody may see; a bf16, too


def tiny_policy(D: int = 96, H: int = 3, Hkv: int = 3, tied: bool = True, family: str = "qwen2"):
    """A policy whose scores are large enough that a wrong one shows."""
    fixed = dict(tie_word_embeddings=tied, initializer_range=0.2, model_type=family)
    config = Qwen2Config(101, D, 72, 2, H, Hkv, 256, **fixed)
    policy = random_policy(config, seed=1)
    for name, parameter in policy.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, 0.0, 0.5, generator=torch.Generator().manual_seed(len(name)))
    return policy.requires_grad_(False)


@pytest.fixture
def torch_path():
    set_backend("torch")
    yield
    set_backend("auto")


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return (found.double() - truth).abs().max().item()


@contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(params=["fp32", "no biases", "LoRA", "bf16", "bf16 LoRA", "bf16 widened", "bf16 widened LoRA"])
def how(request, monkeypatch):
    """Guards each type of weights, and a library that knows no AVX-512 and widens bf16 in registers, as most do."""
    if "widened" in request.param:
        if platform.machine() != "x86_64":
            pytest.skip("there is no AVX-512 to leave out")
        monkeypatch.setenv("CXX", f"{os.environ.get('CXX') or 'g++'} -mno-avx512f")
        cpu.load_library.cache_clear()
    yield request.param
    if "widened" in request.param:
        monkeypatch.undo()
        cpu.load_library.cache_clear()


@pytest.mark.parametrize("D, H, Hkv", SHAPES)
@pytest.mark.parametrize("n", [1, 3, 4])
def test_a_trunk_is_as_exact_as_torch(D, H, Hkv, n, how):
    """Guards each operation of a layer, lanes beyond one block, candidates that left, and slots that others wrote."""
    dtype = torch.bfloat16 if "bf16" in how else torch.float32
    policy = tiny_policy(D, H, Hkv, family="llama" if how == "no biases" else "qwen2").to(dtype)
    generator = torch.Generator().manual_seed(n)
    if "LoRA" in how:
        policy = with_adapter(policy, rank=6, alpha=9.0, seed=2).requires_grad_(False)
        for layer in adapters(policy).values():
            torch.nn.init.normal_(layer.lora_B.weight, 0.0, 0.2, generator=generator)
        policy.to(dtype)
    B, capacity = 7, 40 + 5 * n
    prompts = torch.tensor([1, 5, 17, 30, 33, 2, 40])
    ids = [torch.randint(101, (int(p),), generator=generator) for p in prompts]
    trunk = cached_trunk(policy)

    def compute(by, dtype):
        cache = KVCache(policy.config, B, capacity, dtype)
        for stored in cache.keys + cache.values:
            stored.fill_(HIDDEN)
        chunks, found, first = [], [], 0
        for row in range(B):
            chunks.append(Chunk(row, first, first + len(ids[row]), len(ids[row])))
            first += len(ids[row])
        rows = torch.repeat_interleave(torch.arange(B), prompts)
        slots = torch.cat([torch.arange(int(p)) for p in prompts])
        found.append(by(torch.cat(ids), slots, cache, rows, slots, Chunks(chunks), None))
        draw = torch.Generator().manual_seed(9)
        for step in range(3):
            place = torch.tensor([p for p in range(B * n) if step == 0 or p % 5])  # some have ended
            rows, candidates = place // n, place % n
            members = torch.full((B * n,), -1).index_put_((place,), torch.arange(len(place))).view(B, n)
            lengths = prompts + n * (step + 1)
            new = torch.randint(101, (len(place),), generator=draw)
            at = prompts[rows] + step * n + candidates
            decoding = Rows(prompts, lengths, members, place)
            found.append(by(new, prompts[rows] + step, cache, rows, at, None, decoding))
        return torch.cat(found)

    def by_torch(model):
        def by(new, positions, cache, rows, slots, chunks, decoding):
            for stored in cache.keys + cache.values:  # the torch path multiplies hidden slots by 0
                stored[stored == HIDDEN] = 0
            return model(new[None], positions[None], Cached(cache, rows, slots, decoding, chunks))[0]

        return by

    def by_cpu(new, positions, cache, rows, slots, chunks, decoding):
        return trunk(new, positions, rows, slots, cache.keys, cache.values, decoding)

    set_backend("torch")
    try:
        plain = compute(by_torch(policy), dtype)
        truth = compute(by_torch(deepcopy(policy).double()), torch.float64)
    finally:
        set_backend("auto")
    ours = compute(by_cpu, dtype)
    assert error(ours, truth) <= 2 * error(plain, truth) + 1e-6
    for count in (2, 3):
        with threads(count):
            assert torch.equal(compute(by_cpu, dtype), ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lanes_do_not_see_each_other(dtype):
    """Guards sums that depend on how many tokens are computed at once: a candidate's would depend on the others."""
    policy, N = tiny_policy().to(dtype), 37
    trunk, ids, rows = cached_trunk(policy), torch.arange(3, 40), torch.arange(N)

    def compute(some):
        cache = KVCache(policy.config, N, 2, dtype)
        zeros = torch.zeros(len(some), dtype=torch.long)
        return trunk(ids[some], zeros, rows[some], zeros, cache.keys, cache.values)

    whole = compute(rows)
    for some in (rows[:1], rows[5:13], rows[20:36]):
        assert torch.equal(compute(some), whole[some])


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("R, V", [(1, 2), (16, 101), (37, 800), (5, 2048), (8, 5001)])
def test_draws_are_those_of_torch(temperature, R, V, how):
    """Guards the inverse CDF in C++: ids equal, log-probs within fp32 rounding of the fp64 truth."""
    generator = torch.Generator().manual_seed(R)
    hidden, weight = torch.randn(R, 24, generator=generator), torch.randn(V, 24, generator=generator)
    if "bf16" in how:
        hidden, weight = hidden.bfloat16(), weight.bfloat16()
    uniforms = torch.rand(R, generator=generator)
    uniforms[0] = 0.0
    truth = sample(hidden.double() @ weight.double().T, temperature, uniforms.double())
    plain = sample(hidden.float() @ weight.float().T, temperature, uniforms)
    ids, logprobs = cpu.sample(hidden, weight, temperature, uniforms)
    with threads(3):
        again = cpu.sample(hidden, weight, temperature, uniforms)
    assert torch.equal(again[0], ids) and torch.equal(again[1], logprobs)
    assert torch.equal(ids, truth[0])
    assert error(logprobs, truth[1]) <= 2 * error(plain[1], truth[1]) + 1e-6


@pytest.mark.parametrize("between", [0, 4000])
def test_the_last_id_and_the_impossible_one(between):
    """Guards a uniform next to 1, which rounding could carry past the last id, and ids of probability 0."""
    hidden, weight = torch.ones(2, 1), torch.full((between + 4, 1), -1000.0)
    weight[1] = weight[-2] = 0.0
    ids, logprobs = cpu.sample(hidden, weight, 1.0, torch.tensor([0.0, 1 - 2**-24]))
    assert ids.tolist() == [1, between + 2]
    torch.testing.assert_close(logprobs, torch.tensor([0.5, 0.5]).log())


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_whole_calls_draw_the_same_ids(n, temperature, family):
    """Guards the sampler's choice of path: prompts of all lengths, a cache that grows, candidates that stop."""
    policy = tiny_policy(tied=False, family=family)
    prompts = [[3 + i % 50 for i in range(length)] for length in (1, 2, 31, 70, 33)]
    arguments = dict(n=n, max_new_tokens=24, stop_ids=[7, 8, 9], temperature=temperature, seeds=range(5 * n))
    ours = generate(policy, prompts, **arguments)
    set_backend("torch")
    try:
        plain = generate(policy, prompts, **arguments)
    finally:
        set_backend("auto")
    assert [draw.token_ids for draw in ours] == [draw.token_ids for draw in plain]
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a.logprobs, b.logprobs, atol=1e-4, rtol=1e-4)


def test_a_token_outside_is_named():
    """Guards C++ that would write outside the cache."""
    policy = tiny_policy()
    trunk, cache, one = cached_trunk(policy), KVCache(policy.config, 2, 8), torch.ones(1, dtype=torch.long)
    for wrong in (dict(row=2), dict(slot=8), dict(position=256), dict(id=101), dict(id=-1), dict(row=-1)):
        what = {"id": 1, "position": 1, "row": 1, "slot": 1} | wrong
        with pytest.raises(ValueError, match="is outside 101 ids, 256 positions or a cache of"):
            trunk(*(one * x for x in what.values()), cache.keys, cache.values)
    with pytest.raises(ValueError, match="does not fit 2 layers of 3 x 32"):
        trunk(one, one, one, one, cache.keys[:1], cache.values[:1])
    half = KVCache(policy.config, 2, 8, torch.bfloat16)
    with pytest.raises(ValueError, match="a cache of torch.bfloat16 does not fit weights of torch.float32"):
        trunk(one, one, one, one, half.keys, half.values)


@pytest.mark.parametrize("change", ["fp16", "torch", "head dim", "width"])
def test_torch_computes_what_cpp_does_not(change):
    """Guards a silent change of precision, a `--kernels torch` that is not, and shapes that C++ would misread."""
    policy = tiny_policy(*{"head dim": (72, 3, 3), "width": (30, 1, 1)}.get(change, (96, 3, 3)))
    dtype = {"fp16": torch.float16, "width": torch.bfloat16}.get(change, torch.float32)
    set_backend("torch" if change == "torch" else "auto")
    try:
        sampler = Sampler(policy.to(dtype), n=1, max_new_tokens=1, stop_ids=[], batch_size=1, max_rows=1)
        assert sampler.trunk is None
    finally:
        set_backend("auto")


@pytest.mark.parametrize("H, Hkv, Dh", [(3, 3, 32), (4, 2, 16), (7, 1, 64), (2, 2, 128)])
@pytest.mark.parametrize("seed, size, threads", [(0, 12, 1), (1, 0, 1), (2, 20, 2), (3, 20, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trees_are_as_exact_as_torch(H, Hkv, Dh, seed, size, threads, dtype):
    """Guards a token that sees a stranger or misses an ancestor, tiles that are not full, grouped heads, threads."""
    tree, _ = random_trees(seed, 64, torch.float32, [size] * 3, longest=40, most=9)
    N, generator = len(tree.enter), torch.Generator().manual_seed(seed)
    q, k, v, g = (torch.randn(1, N, heads, Dh, generator=generator).transpose(1, 2) for heads in (H, Hkv, Hkv, H))

    def dense(q, k, v):
        return reference_tree_attention(q, k, v, tree)

    def differentiated(attention, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out = attention(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, g.to(dtype))]

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = differentiated(lambda *x: tree_attention(*x, tree), dtype)
    finally:
        torch.set_num_threads(before)
    q, k, v, g = (x.to(dtype) for x in (q, k, v, g))
    truth, plain = differentiated(dense, torch.float64), differentiated(dense, dtype)
    for a, b, exact in zip(ours, plain, truth, strict=True):
        assert error(a, exact) <= 2 * error(b, exact) + 1e-6
    again = differentiated(lambda *x: tree_attention(*x, tree), dtype)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))  # the same bits on any number of threads


@pytest.mark.parametrize("M, K, N", [(1, 1, 1), (7, 9, 70), (200, 2051, 33), (13, 64, 300)])
@pytest.mark.parametrize("strides", ["ab", "aT", "bT", "half"])
def test_products_of_bf16_are_summed_in_fp32(M, K, N, strides):
    """Guards a product that is rounded to bf16, an odd number of terms, a last block that is not full, and strides."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, generator=generator).bfloat16() for size in ((M, K), (K, N)))
    a = a.T.contiguous().T if strides == "aT" else torch.stack((a, a), 1)[:, 0] if strides == "half" else a
    b = b.T.contiguous().T if strides == "bT" else b
    out = torch.randn(M, N, generator=generator)
    if not cpu.multiplies(a, b, out):
        pytest.skip("no bf16 products here")
    before, exact = out.double(), a.double() @ b.double()
    assert error(head.matmul(a, b, out, add=True), before + exact) < 1e-4
    assert error(head.matmul(a, b, out), exact) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_long_rows_are_as_exact_as_torch(dtype, entropy_coef):
    """Guards the row kernels in C++: the last logits of a row, gradients that are written over what is still read."""
    N, D, V, generator = 21, 32, cpu.LONG + 21, torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, generator=generator).to(dtype) for size in ((N, D), (V, D)))
    targets, advantages = torch.randint(V, (N,), generator=generator), torch.randn(N, generator=generator)
    targets[:2] = torch.tensor([0, V - 1])

    def losses(logprobs, advantages):
        return advantages * logprobs.exp() - logprobs, {"logprobs": logprobs}

    def differentiated(function, dtype, **options):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight)]
        options |= dict(temperature=0.7, entropy_coef=entropy_coef)
        loss, statistics = function(*leaves, targets, losses, (advantages.to(head.sum_dtype(leaves[0])),), **options)
        loss.backward()
        return statistics | {"hidden": leaves[0].grad, "weight": leaves[1].grad}

    assert cpu.folds(torch.empty(N, V))
    truth, plain = differentiated(reference_ppo, torch.float64), differentiated(reference_ppo, dtype)
    ours = differentiated(ppo_head, dtype, workspace_bytes=8 * 4 * V)
    for name, exact in truth.items():
        assert error(ours[name], exact) <= 2 * error(plain[name], exact) + 2e-6, name


@pytest.mark.parametrize("rows", [1, 64, 200])
@pytest.mark.parametrize("name", ["norm", "first norm", "rope", "swiglu"])
def test_passes_in_bf16_are_as_exact_as_torch(rows, name):
    """Guards a gradient that the passes in C++ forget or round twice, and blocks of rows that are not full."""
    generator = torch.Generator().manual_seed(rows)
    angles = torch.rand(1, rows, 1, 16, generator=generator) * 6

    def turned(function, q, k):
        return torch.cat([x.flatten(2) for x in function(q, k, angles.cos(), angles.sin())], 2)

    def by_parts(q, k, cos, sin):
        return reference_rope(q, cos.to(q.dtype), sin.to(q.dtype)), reference_rope(k, cos.to(q.dtype), sin.to(q.dtype))

    shapes, ours, plain = {
        "norm": ([(rows, 48), (48,), (rows, 48)], lambda x, w, r: torch.cat(rmsnorm(x, w, 1e-6, r), 1),
                 lambda x, w, r: torch.cat(reference_rmsnorm(x, w, 1e-6, r), 1)),
        "first norm": ([(rows, 48), (48,)], lambda x, w: rmsnorm(x, w, 1e-6),
                       lambda x, w: reference_rmsnorm(x, w, 1e-6)),
        "rope": ([(1, rows, 3, 32), (1, rows, 1, 32)], lambda q, k: turned(rope, q, k),
                 lambda q, k: turned(by_parts, q, k)),
        "swiglu": ([(rows, 80), (rows, 80)], swiglu, reference_swiglu),
    }[name]  # fmt: skip
    inputs = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    g = torch.randn(ours(*inputs).shape, generator=generator).bfloat16()

    def differentiated(function, dtype):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, g.to(out.dtype))]

    found = differentiated(ours, torch.bfloat16), differentiated(plain, torch.bfloat16)
    for a, b, exact in zip(*found, differentiated(plain, torch.float64), strict=True):
        assert a.dtype == torch.bfloat16 and error(a, exact) <= 2 * error(b, exact) + 1e-6


def test_gradients_have_no_graph():
    """Guards a gradient penalty that would silently count as 0."""
    tree, _ = random_trees(0, 64, torch.float32, [3] * 3)
    q = torch.randn(1, 2, len(tree.enter), 16, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(tree_attention(q, q, q, tree).sum(), q, create_graph=True)


@pytest.mark.parametrize("compiler, words", [("/no/such/compiler", "No such file"), ("false", "cannot build")])
def test_without_a_compiler_torch_serves(compiler, words, monkeypatch, tmp_path):
    """Guards a machine without a working compiler: a reason, not a crash."""
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.warns(RuntimeWarning, match="torch serves"):
        library, reason = cpu.load_library.__wrapped__()
    assert library is None and words in reason


def test_without_a_home_torch_serves(monkeypatch):
    """Guards a container whose user has no home: the cache folder is then nowhere."""

    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(cpu.Path, "home", nowhere)
    with pytest.warns(RuntimeWarning, match="home directory"):
        assert cpu.load_library.__wrapped__()[0] is None


def test_a_library_is_built_once(monkeypatch, tmp_path):
    """Guards a build at every start, and a half-written library that another process would load."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []

    def build(command, **_):
        calls.append(command)
        with open(command[-1], "w") as file:
            file.write("whole")

    monkeypatch.setattr(subprocess, "run", build)
    first = cpu.compile_library("g++")
    assert cpu.compile_library("g++") == first and len(calls) == 1
    assert sorted(first.parent.iterdir()) == [first.with_suffix(".sha256"), first]
    first.write_text("who")  # cut short: loading it would end the process
    assert cpu.compile_library("g++") == first and first.read_text() == "whole" and len(calls) == 2
    assert cpu.compile_library("ccache g++ -O2") != first and calls[-1][:3] == ["ccache", "g++", "-O2"]
