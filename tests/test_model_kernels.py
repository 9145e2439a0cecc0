"""RMSNorm, rotary positions and SwiGLU: the torch paths, which every machine without a GPU trains on."""

import doctest
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

from kernels.rmsnorm import rmsnorm
from kernels.rope import real_tokens, rope, rope_into_cache
from kernels.swiglu import swiglu


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tables(position_ids: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = position_ids[:, :, None, None] * 100.0 ** (-torch.arange(head_dim // 2) / (head_dim // 2))
    return angles.cos(), angles.sin()  # fp32


@pytest.mark.parametrize("module", ["kernels.rmsnorm", "kernels.rope", "kernels.swiglu"])
def test_docstring_examples(module):
    """Guards: examples that never ran."""
    result = doctest.testmod(import_module(module))
    assert result.attempted and not result.failed


# ------------------------------------------------------------------------------------------------------------- rmsnorm


@pytest.mark.parametrize("added", [False, True])
def test_rmsnorm_is_the_equation(added):
    """Guards: eps outside the root, a mean that is a sum, and a stream that loses what is added to it."""
    x, residual, weight = draw(3, 5, 7), draw(3, 5, 7, seed=1), draw(7, seed=2)
    h = x + residual if added else x
    expected = F.rms_norm(h, (7,), weight, eps=0.1)
    result = rmsnorm(x, weight, 0.1, residual if added else None)
    y = result[0] if added else result
    assert torch.allclose(y, expected, rtol=1e-12, atol=0)
    assert not added or torch.equal(result[1], h)


def test_rmsnorm_gradients():
    """Guards: a gradient that reaches the delta but not the residual, or leaves out the one on the sum."""
    shapes = (2, 3, 5), (2, 3, 5), (5,)
    x, residual, weight = (draw(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes))
    assert torch.autograd.gradcheck(lambda x, w: rmsnorm(x, w, 1e-3), (x, weight))
    assert torch.autograd.gradcheck(lambda x, w, r: rmsnorm(x, w, 1e-3, r), (x, weight, residual))


def test_rmsnorm_keeps_its_statistics_in_fp32():
    """Guards: squares summed in bf16, which stand still once the sum is 256 times a term."""
    x = torch.ones(1, 4096, dtype=torch.bfloat16)
    assert torch.equal(rmsnorm(x, torch.ones(4096, dtype=torch.bfloat16), 0.0), x)


@pytest.mark.parametrize(("weight", "residual"), [((4,), None), ((5,), (1, 5))])
def test_rmsnorm_refuses_other_shapes(weight, residual):
    """Guards: broadcasting where a caller made a mistake."""
    with pytest.raises(ValueError, match="must be"):
        rmsnorm(draw(3, 5), draw(*weight), 1e-6, None if residual is None else draw(*residual))


# ---------------------------------------------------------------------------------------------------------------- rope


def test_rope_turns_pairs_as_complex_numbers():
    """Guards: neighbouring pairs (GPT-J's layout) in place of the half-split, and a turn the wrong way round."""
    position_ids = torch.tensor([[0, 1, 2], [7, 8, 9]])
    q, k, (cos, sin) = draw(2, 3, 4, 6), draw(2, 3, 2, 6, seed=1), tables(position_ids, 6)
    turn = torch.complex(cos.double(), sin.double())  # (B, T, 1, 3)
    for x, y in zip((q, k), rope(q, k, cos, sin), strict=True):
        expected = torch.complex(*x.chunk(2, -1)) * turn
        assert torch.allclose(torch.complex(*y.chunk(2, -1)), expected, rtol=1e-12, atol=1e-12)


def test_rope_scores_depend_on_the_distance_only():
    """Guards: q and k turned by different tables."""
    q, k = draw(1, 1, 1, 8).expand(1, 9, 1, 8), draw(1, 1, 1, 8, seed=1).expand(1, 9, 1, 8)
    q, k = rope(q, k, *tables(torch.arange(9)[None], 8))
    scores = (q[0, :, 0] @ k[0, :, 0].T)[2:, :-2].diagonal()  # all at a distance of two
    assert torch.allclose(scores, scores[:1].expand(7), rtol=1e-5)


def test_rope_gradients():
    """Guards: a backward that turns forward again."""
    q, k = draw(2, 3, 2, 4).requires_grad_(), draw(2, 3, 1, 4, seed=1).requires_grad_()
    cos, sin = tables(torch.arange(6).view(2, 3), 4)
    assert torch.autograd.gradcheck(lambda q, k: rope(q, k, cos, sin), (q, k))


@pytest.mark.parametrize("given", [False, True])
def test_rope_into_cache_stores_the_real_tokens_and_nothing_else(given):
    """Guards: padding that overwrites a neighbour's or a later token's slot, or falls off a full row."""
    B, T, Hkv, Dh, capacity = 3, 3, 2, 4, 6
    lengths, new_lengths = torch.tensor([0, 2, 5]), torch.tensor([3, 0, 1])  # row 2 is full: its padding is at 6, 7
    position_ids = lengths[:, None] + torch.arange(T)
    q, k, v = draw(B, T, 4, Dh), draw(B, T, Hkv, Dh, seed=1), draw(B, T, Hkv, Dh, seed=2)
    cos, sin = tables(position_ids, Dh)
    keys, values = draw(B, Hkv, capacity, Dh, seed=3), draw(B, Hkv, capacity, Dh, seed=4)
    expected_keys, expected_values = keys.clone(), values.clone()
    turned_q, turned_k = rope(q, k, cos, sin)
    for b in range(B):
        for t in range(int(new_lengths[b])):
            expected_keys[b, :, lengths[b] + t] = turned_k[b, t]
            expected_values[b, :, lengths[b] + t] = v[b, t]
    real = real_tokens(position_ids, new_lengths) if given else None
    assert torch.equal(rope_into_cache(q, k, v, cos, sin, keys, values, position_ids, new_lengths, real), turned_q)
    assert torch.equal(keys, expected_keys) and torch.equal(values, expected_values)


def test_rope_refuses_other_shapes():
    """Guards: a table of another batch that broadcasts, and a cache laid out otherwise."""
    q, k, (cos, sin) = draw(2, 3, 2, 4), draw(2, 3, 1, 4), tables(torch.arange(6).view(2, 3), 4)
    cache, positions, lengths = draw(2, 1, 5, 4), torch.arange(6).view(2, 3), torch.tensor([3, 3])
    with pytest.raises(ValueError, match="q .* must be"):
        rope(q, k[:, :2], cos, sin)
    with pytest.raises(ValueError, match="cos .* must be"):
        rope(q, k, cos[:1], sin[:1])
    with pytest.raises(ValueError, match="keys .* must be"):
        rope_into_cache(q, k, k, cos, sin, cache.transpose(1, 2), cache.transpose(1, 2), positions, lengths)
    with pytest.raises(ValueError, match="position_ids .* must be"):
        rope_into_cache(q, k, k, cos, sin, cache, cache, positions[:, :1], lengths)


# -------------------------------------------------------------------------------------------------------------- swiglu


def test_swiglu_is_the_equation_and_finite_at_large_numbers():
    """Guards: gate and up in each other's place, and exp(100) in a quotient."""
    gate, up = torch.tensor([-1e4, -100.0, 0.0, 2.0, 100.0, 1e4]), torch.full((6,), 3.0)
    expected = 3 * gate.double() * torch.sigmoid(gate.double())
    assert torch.allclose(swiglu(gate, up).double(), expected, rtol=1e-6, atol=1e-30)


def test_swiglu_gradients():
    """Guards: the gradient of the sigmoid left out of the gate's."""
    gate, up = draw(2, 3, 5).requires_grad_(), draw(2, 3, 5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(swiglu, (gate, up))


def test_swiglu_refuses_two_shapes_or_two_dtypes():
    """Guards: broadcasting where a caller made a mistake."""
    with pytest.raises(ValueError, match="must be alike"):
        swiglu(draw(2, 3), draw(1, 3))
    with pytest.raises(ValueError, match="must be alike"):
        swiglu(draw(2, 3), draw(2, 3, dtype=torch.float32))


# ----------------------------------------------------------------------------------------------------------- recompiles


@pytest.mark.parametrize(
    ("module", "name", "counts"),
    [("kernels.rmsnorm", "backward_kernel", {"N"}), ("kernels.rope", "rope_kernel", {"T", "capacity"})],
)
def test_a_count_of_tokens_is_never_specialized(module, name, counts):
    """Guards: a compilation of seconds in the middle of training, whenever a length becomes a multiple of 16."""
    kernel = getattr(import_module(module), name)
    if not hasattr(kernel, "params"):
        pytest.skip("the kernels are not compiled here (no Triton, or interpreted)")
    assert {p.name for p in kernel.params if p.do_not_specialize} == counts
