"""RMSNorm, rotary positions and SwiGLU: the Triton kernels, on CUDA or interpreted (TRITON_INTERPRET=1)."""

from functools import partial

import pytest
import torch

from kernels.backend import INTERPRETED, set_backend
from kernels.rmsnorm import reference_rmsnorm, rmsnorm
from kernels.rope import reference_rope, reference_rope_into_cache, rope, rope_into_cache
from kernels.rows import Rows
from kernels.swiglu import reference_swiglu, swiglu

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float32, torch.bfloat16] if CUDA else [torch.float32]  # the interpreter truncates to bf16
pytestmark = pytest.mark.skipif(not (CUDA or INTERPRETED), reason="needs a CUDA device, or TRITON_INTERPRET=1")

NORMS = [(1, 896), (1031, 1536), (600, 2048), (257, 3584), (5, 8192)] if CUDA else [(1, 96), (11, 100), (7, 128)]
HEADS = [(14, 2, 64), (12, 2, 128), (16, 2, 128), (28, 4, 128)] if CUDA else [(3, 1, 32), (6, 3, 12)]
WIDTHS = [(1, 4864), (129, 8960), (64, 11008), (65, 18944)] if CUDA else [(1, 256), (5, 1500)]


@pytest.fixture(autouse=True)
def triton_backend():
    set_backend("triton")
    yield
    set_backend("auto")


def draw(*shape: int, seed: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE) * scale
    return x.to(DEVICE, dtype)


def gradients(function, inputs: list[torch.Tensor], upstream: list[torch.Tensor]) -> list[torch.Tensor]:
    """Give outputs and then gradients of function at inputs, for these upstream gradients (None: an unused output)."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    used = [(y, g.to(y.dtype)) for y, g in zip(outputs, upstream, strict=True) if g is not None]
    torch.autograd.backward([y for y, _ in used], [g for _, g in used])
    return [y.detach() for y in outputs] + [x.grad for x in leaves]


def assert_as_good_as_torch(function, reference, inputs: list[torch.Tensor], upstream: list[torch.Tensor]) -> None:
    """Compare both with the reference in fp64: the kernel may lose twice what plain torch loses in the same dtype."""
    ours = gradients(function, inputs, upstream)
    theirs = gradients(reference, inputs, upstream)
    truths = gradients(reference, [x.double() for x in inputs], upstream)
    eps = 1e-6 if inputs[0].dtype == torch.float32 else torch.finfo(torch.bfloat16).eps
    for i, (our, their, truth) in enumerate(zip(ours, theirs, truths, strict=True)):
        assert our.dtype == their.dtype and our.shape == their.shape
        error, honest = (our.double() - truth).abs().max(), (their.double() - truth).abs().max()
        assert error <= 2 * honest + eps * truth.abs().max(), f"result {i}: {error:.3e}, plain torch {honest:.3e}"


# ------------------------------------------------------------------------------------------------------------- rmsnorm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1e4, 1e-4])
@pytest.mark.parametrize(("N", "D"), NORMS)
def test_rmsnorm(N, D, scale, dtype):
    """Guards: a mean over the padded tile, eps lost at small rows, and rows that a program strides past."""
    inputs = [draw(N, D, seed=0, dtype=dtype, scale=scale), draw(D, seed=1, dtype=dtype)]
    upstream = [draw(N, D, seed=2, dtype=dtype)]
    assert_as_good_as_torch(partial(rmsnorm, eps=1e-6), partial(reference_rmsnorm, eps=1e-6), inputs, upstream)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("used", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(("N", "D"), NORMS)
def test_rmsnorm_with_a_residual(N, D, used, dtype, monkeypatch):
    """Guards: a gradient of the sum that is left out, or asked for after the last layer, where the sum is not used."""
    monkeypatch.setitem(rmsnorm.__globals__, "PROGRAMS", 4)  # so that a program has several rows
    x, residual = draw(N, D, seed=0, dtype=dtype), draw(N, D, seed=1, dtype=dtype, scale=30.0)
    weight = draw(D, seed=2, dtype=dtype)
    upstream = [draw(N, D, seed=3 + i, dtype=dtype) if used[i] else None for i in range(2)]

    def call(function):
        return lambda x, residual, w=weight: function(x, w.to(x.dtype), 1e-6, residual)

    inputs = [x, residual, weight] if used[0] else [x, residual]  # the sum alone has no gradient in the weight
    assert_as_good_as_torch(call(rmsnorm), call(reference_rmsnorm), inputs, upstream)


def test_rmsnorm_of_more_dimensions_strided_rows_and_an_expanded_gradient():
    """Guards: a kernel that reads a strided tensor as if it were contiguous."""
    f32 = torch.float32
    x, residual = draw(6, 2, 5, 64, seed=0, dtype=f32)[:, 1], draw(5, 6, 64, seed=4, dtype=f32).transpose(0, 1)
    upstream = [draw(64, seed=1 + i, dtype=f32).expand(6, 5, 64) for i in range(2)]
    inputs = [x, draw(64, seed=3, dtype=f32), residual]
    assert_as_good_as_torch(
        lambda x, w, r: rmsnorm(x, w, 1e-6, r), lambda x, w, r: reference_rmsnorm(x, w, 1e-6, r), inputs, upstream
    )


def test_rmsnorm_gradients_are_the_same_bits_every_time():
    """Guards: atomics in the sum over rows: a run that cannot be repeated."""
    inputs = [draw(*NORMS[1], seed=0, dtype=torch.float32), draw(NORMS[1][1], seed=1, dtype=torch.float32)]
    upstream = [draw(*NORMS[1], seed=2, dtype=torch.float32)]
    runs = [gradients(lambda x, w: rmsnorm(x, w, 1e-6), inputs, upstream) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_rmsnorm_refuses_a_row_that_does_not_fit():
    """Guards: a compilation of minutes that ends in spills."""
    with pytest.raises(ValueError, match="8192"):
        rmsnorm(torch.zeros(1, 8200, device=DEVICE), torch.ones(8200, device=DEVICE), 1e-6)


# ---------------------------------------------------------------------------------------------------------------- rope


def tables(position_ids: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = torch.arange(head_dim // 2, device=position_ids.device)
    angles = position_ids[:, :, None, None] * 1e6 ** (-pairs / (head_dim // 2))
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("H", "Hkv", "Dh"), HEADS)
@pytest.mark.parametrize("T", [1, 7])
def test_rope(T, H, Hkv, Dh, dtype):
    """Guards: heads and pairs rounded up to powers of 2 that are written too, and a backward that turns forward."""
    B = 2
    cos, sin = tables(torch.tensor([[3], [4000]], device=DEVICE) + torch.arange(T, device=DEVICE), Dh)
    inputs = [draw(B, T, H, Dh, seed=0, dtype=dtype), draw(B, T, Hkv, Dh, seed=1, dtype=dtype, scale=50.0)]
    upstream = [draw(B, T, H, Dh, seed=2, dtype=dtype), draw(B, T, Hkv, Dh, seed=3, dtype=dtype)]
    assert_as_good_as_torch(
        lambda q, k: rope(q, k, cos, sin),
        lambda q, k: (reference_rope(q, cos, sin), reference_rope(k, cos, sin)),
        inputs,
        upstream,
    )


def test_rope_of_strided_tensors_and_gradients():
    """Guards: attention's gradient, (B, H, T, Dh) in memory, read as (B, T, H, Dh)."""
    f32, (B, T, H, Hkv, Dh) = torch.float32, (2, 5, 4, 2, 16)
    cos, sin = tables(torch.arange(T, device=DEVICE).expand(B, T), Dh)
    k = draw(B, T, Hkv, 2 * Dh, seed=1, dtype=f32)[..., Dh:]
    inputs = [draw(B, H, T, Dh, seed=0, dtype=f32).transpose(1, 2), k]
    upstream = [draw(B, H, T, Dh, seed=2, dtype=f32).transpose(1, 2), draw(Dh, seed=3, dtype=f32).expand(B, T, Hkv, Dh)]
    assert_as_good_as_torch(
        lambda q, k: rope(q, k, cos, sin),
        lambda q, k: (reference_rope(q, cos, sin), reference_rope(k, cos, sin)),
        inputs,
        upstream,
    )


PREFILL = [(0, 0), (0, 1), (0, 2), (2, 5), (2, 6), (3, 8)]  # row and slot: the new tokens of three prompts, packed
DECODE = [(3, 8), (0, 4), (0, 6), (2, 0)]  # candidates, two of them in one row
PADDED = [(1, 3), (-1, 3), (0, 9), (0, -1), (-1, 0), (3, 2)]  # four that are stored nowhere: the capacity is 9


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("H", "Hkv", "Dh"), HEADS)
@pytest.mark.parametrize("places", [PREFILL, DECODE, PADDED], ids=["prefill", "decode", "padded"])
def test_rope_into_cache(places, H, Hkv, Dh, dtype):
    """Guards: padding that overwrites the last row, a slot past the end (the next head's first), and values turned."""
    B, capacity = 4, 9
    rows, slots = torch.tensor(places, device=DEVICE).T  # strided, as a column of a larger table is
    cos, sin = (table[0] for table in tables(slots[None].abs() + 100, Dh))
    q, k, v = (draw(len(places), h, Dh, seed=i, dtype=dtype) for i, h in enumerate((H, Hkv, Hkv)))
    before = [draw(B, Hkv, capacity, Dh, seed=3 + i, dtype=dtype) for i in range(2)]
    stored = (rows >= 0) & (slots >= 0) & (slots < capacity)

    def run(function, dtype, kept=slice(None)):
        """Give all turned queries, and the cache after the kept tokens were stored."""
        caches = [x.to(dtype, copy=True) for x in before]
        tokens = [x.to(dtype)[kept] for x in (q, k, v)]
        q_out = function(*tokens, cos[kept], sin[kept], *caches, rows[kept], slots[kept])
        return q_out, *caches

    def reference(dtype):
        return reference_rope(q.to(dtype), cos, sin), *run(reference_rope_into_cache, dtype, stored)[1:]

    ours, theirs, truths = run(rope_into_cache, dtype), reference(dtype), reference(torch.float64)
    assert torch.equal(ours[2], theirs[2])  # values are copied, and nothing else is touched
    changed = torch.zeros(B, capacity, dtype=torch.bool, device=DEVICE)
    changed[rows[stored], slots[stored]] = True
    untouched = ~changed[:, None, :, None].expand_as(ours[1])
    assert torch.equal(ours[1][untouched], before[0][untouched])
    eps = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    for our, their, truth in zip(ours[:2], theirs[:2], truths[:2], strict=True):
        error, honest = (our.double() - truth).abs().max(), (their.double() - truth).abs().max()
        assert error <= 2 * honest + eps * truth.abs().max()


def test_rope_into_cache_of_parts_of_one_product():
    """Guards: q, k and v as views of one projection, read as if contiguous."""
    f32, H, Hkv, Dh = torch.float32, 4, 2, 8
    q, k, v = draw(3, H + 2 * Hkv, Dh, seed=0, dtype=f32).split((H, Hkv, Hkv), 1)
    rows, slots = torch.tensor([[1, 0, 1], [2, 4, 3]], device=DEVICE)
    cos, sin = (table[0] for table in tables(slots[None], Dh))
    caches = [[torch.zeros(2, Hkv, 5, Dh, device=DEVICE) for _ in range(2)] for _ in range(2)]
    ours = rope_into_cache(q, k, v, cos, sin, *caches[0], rows, slots)
    theirs = reference_rope_into_cache(q, k, v, cos, sin, *caches[1], rows, slots)
    for our, their in zip((ours, *caches[0]), (theirs, *caches[1]), strict=True):
        torch.testing.assert_close(our, their, rtol=1e-6, atol=1e-6)


# -------------------------------------------------------------------------------------------------------------- swiglu


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's, at a gate of −100: σ is 0
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize(("N", "width"), WIDTHS)
def test_swiglu(N, width, scale, dtype):
    """Guards: the last, ragged tile, an infinite exp(−a), and the sigmoid's gradient left out."""
    inputs = [draw(N, width, seed=0, dtype=dtype, scale=scale), draw(N, width, seed=1, dtype=dtype)]
    assert_as_good_as_torch(swiglu, reference_swiglu, inputs, [draw(N, width, seed=2, dtype=dtype)])


def test_swiglu_of_strided_tensors():
    """Guards: gate and up as two halves of one product, read as if contiguous."""
    both = draw(2, 3, 2 * 40, seed=0, dtype=torch.float32)
    upstream = [draw(40, seed=1, dtype=torch.float32).expand(2, 3, 40)]
    assert_as_good_as_torch(swiglu, reference_swiglu, list(both.chunk(2, -1)), upstream)


# ------------------------------------------------------------------------------------------------------------ the model


def test_the_model_is_as_exact_on_the_triton_path():
    """Guards the wiring: a delta that is added twice or not at all, a cache that differs from a forward, and parts of
    joined products that are read as if they were whole."""
    from kernels.prefill_attention import Chunk, Chunks
    from model import Cached, KVCache, Qwen2Config, join_products, random_policy

    policy = random_policy(Qwen2Config(50, 32, 40, 2, 4, 2, initializer_range=0.3), seed=0)
    token_ids = torch.randint(0, 50, (2, 5), generator=torch.Generator().manual_seed(0)).to(DEVICE)

    @torch.no_grad()
    def by_cache(cache: KVCache) -> torch.Tensor:
        """Give the hidden states of two rows, of three tokens at once and of two one by one."""
        found = []
        for first, last in ((0, 3), (3, 4), (4, 5)):
            rows = torch.arange(2, device=DEVICE).repeat_interleave(last - first)
            slots = torch.arange(first, last, device=DEVICE).repeat(2)
            if first:
                each = torch.arange(2, device=DEVICE)
                lengths = torch.full((2,), last, device=DEVICE)
                context = Cached(cache, rows, slots, decoding=Rows(lengths, lengths, each[:, None], each))
            else:
                context = Cached(cache, rows, slots, chunks=Chunks([Chunk(0, 0, 3, 3), Chunk(1, 3, 6, 3)]))
            hidden = policy(token_ids[:, first:last].reshape(1, -1), slots[None], context)
            found.append(hidden.view(2, last - first, -1))
        return torch.cat(found, 1)

    def run(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        """Give hidden states with and without a cache, and the gradients of all parameters."""
        set_backend(backend)
        policy.to(DEVICE, dtype).zero_grad()
        if backend == "triton":
            join_products(policy)
        hidden = policy(token_ids)
        hidden.pow(3).sum().backward()
        cached = by_cache(KVCache(policy.config, 2, 8, dtype, DEVICE))
        return [hidden.detach(), cached] + [parameter.grad.clone() for parameter in policy.model.parameters()]

    truths = run("torch", torch.float64)
    for our, their, truth in zip(run("triton", torch.float32), run("torch", torch.float32), truths, strict=True):
        error, honest = (our.double() - truth).abs().max(), (their.double() - truth).abs().max()
        assert error <= 2 * honest + 1e-6 * truth.abs().max()
