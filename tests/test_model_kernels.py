"""RMSNorm, rotary positions and SwiGLU: the torch paths, which every machine without a GPU trains on."""

import doctest
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

from kernels.rmsnorm import rmsnorm
from kernels.rope import rope, rope_into_cache
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


PACKED = [(0, 0), (0, 1), (2, 5), (0, 2), (1, 3), (2, 4)]  # row and slot: two prompts, and candidates out of order


def packed_case(H: int = 4, Hkv: int = 2, Dh: int = 4, B: int = 3, capacity: int = 6) -> list[torch.Tensor]:
    """Give the arguments of `rope_into_cache` for the tokens in PACKED, each at a position of its own."""
    rows, slots = torch.tensor(PACKED).T
    tokens = [draw(len(PACKED), heads, Dh, seed=i) for i, heads in enumerate((H, Hkv, Hkv))]
    cos, sin = (table[0] for table in tables(5 * slots[None] + rows, Dh))
    cache = [draw(B, Hkv, capacity, Dh, seed=3 + i) for i in range(2)]
    return [*tokens, cos, sin, *cache, rows, slots]


def test_rope_into_cache_stores_each_token_in_its_place_and_nothing_else():
    """Guards: rows and slots in each other's place, the values turned too, and a slot that nobody named overwritten."""
    q, k, v, cos, sin, keys, values, rows, slots = packed_case()
    expected_keys, expected_values = keys.clone(), values.clone()
    turned_q, turned_k = (x[0] for x in rope(q[None], k[None], cos[None], sin[None]))
    for token, (row, slot) in enumerate(PACKED):
        for head in range(2):
            expected_keys[row, head, slot] = turned_k[token, head]
            expected_values[row, head, slot] = v[token, head]
    assert torch.equal(rope_into_cache(q, k, v, cos, sin, keys, values, rows, slots), turned_q)
    assert torch.equal(keys, expected_keys) and torch.equal(values, expected_values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope_into_cache_keeps_the_dtype(dtype):
    """Guards: queries promoted to fp32 by the tables, which the next product would refuse."""
    q, k, v, cos, sin, keys, values, rows, slots = packed_case()
    q, k, v, keys, values = (x.to(dtype) for x in (q, k, v, keys, values))
    turned = rope_into_cache(q, k, v, cos, sin, keys, values, rows, slots)
    assert turned.dtype == dtype
    assert torch.equal(turned, rope(q[None], k[None], cos[None], sin[None])[0][0])


def test_rope_refuses_other_shapes():
    """Guards: a table of another batch that broadcasts."""
    q, k, (cos, sin) = draw(2, 3, 2, 4), draw(2, 3, 1, 4), tables(torch.arange(6).view(2, 3), 4)
    for arguments, words in (
        ((q, k[:, :2], cos, sin), "q .* must be"),
        ((q[0], k, cos, sin), r"q .* must be \(B, T, H, Dh\)"),
        ((q, k, cos[:1], sin[:1]), "cos .* must be"),
        ((q, k, cos[:, :, 0], sin[:, :, 0]), "cos .* must be"),
    ):
        with pytest.raises(ValueError, match=words):
            rope(*arguments)


@pytest.mark.parametrize(
    ("place", "change", "words"),
    [
        (0, lambda q: q[None], r"q .* must be \(N, H, Dh\)"),
        (1, lambda k: k[:5], "q .*, k .* must be"),
        (2, lambda v: v[:, :1], "v .* must be"),
        (3, lambda cos: cos[:1], "cos .* must be"),
        (5, lambda keys: keys[:, :, :5], "keys .* must be"),
        (5, lambda keys: keys.transpose(2, 3).contiguous().transpose(2, 3), "keys .* contiguous"),
        (6, lambda values: values[:, :1], "values .* must be"),
        (7, lambda rows: rows[:1], "rows .* must be"),
        (8, lambda slots: slots[:, None], "slots .* must be"),
    ],
)
def test_rope_into_cache_refuses_other_shapes(place, change, words):
    """Guards: a kernel that writes outside the cache, or into a contiguous copy of it."""
    arguments = packed_case()
    arguments[place] = change(arguments[place])
    with pytest.raises(ValueError, match=words):
        rope_into_cache(*arguments)


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
    [("kernels.rmsnorm", "backward_kernel", {"N"}), ("kernels.rope", "rope_kernel", {"capacity"})],
)
def test_a_count_of_tokens_is_never_specialized(module, name, counts):
    """Guards: a compilation of seconds in the middle of training, whenever a length becomes a multiple of 16."""
    kernel = getattr(import_module(module), name)
    if not hasattr(kernel, "params"):
        pytest.skip("the kernels are not compiled here (no Triton, or interpreted)")
    assert {p.name for p in kernel.params if p.do_not_specialize} == counts
