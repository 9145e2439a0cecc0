"""The head kernels' Triton paths against fp64: interpreted on a CPU (`tests/test_triton.py`), native on CUDA.

The bound everywhere: the error is at most twice that of plain torch in the same dtype, plus rounding of the result.
"""

from __future__ import annotations

import functools

import pytest
import torch

from kernels import linear_kl, linear_logprob, ppo_head, set_backend
from kernels.backend import INTERPRETED
from kernels.linear_kl import reference_kl
from kernels.linear_logprob import fold_kernel, reference_logprob
from kernels.ppo_head import reference_ppo
from train_rlpa import Config, token_losses

CUDA = torch.cuda.is_available()
if not (CUDA or INTERPRETED):
    pytest.skip("needs CUDA, or TRITON_INTERPRET=1 set before Python starts", allow_module_level=True)
DEVICE = "cuda" if CUDA else "cpu"
V = 151_936
SMALL = [(1, 32, 300), (7, 64, 1000), (33, 48, 4100)]  # N, D, V: one row, ragged rows, one tile and a bit
TRUE = [(1031, D, V) for D in (896, 1536, 2048, 3584)]  # Qwen-2.5 0.5B, 1.5B, 3B, 7B
SHAPES = TRUE if CUDA else [*SMALL, (2, 16, V)]
DTYPES = [torch.float32, torch.bfloat16] if CUDA else [torch.float32]
WORKSPACE = 256 << 20 if CUDA else 4 << 17  # several tiles each


@pytest.fixture(autouse=True)
def triton_path():
    set_backend("triton")
    yield
    set_backend("auto")


def inputs(shape, dtype, scale: float = 1.0, seed: int = 0):
    """Hidden states and head weight of policy and reference, targets, and three upstream gradients."""
    N, D, vocabulary = shape
    generator = torch.Generator(DEVICE).manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator, device=DEVICE)  # noqa: E731
    hidden, weight = scale * draw(N, D), draw(vocabulary, D) / D**0.5
    ref_hidden, ref_weight = hidden + 0.1 * scale * draw(N, D), weight + 0.1 * draw(vocabulary, D) / D**0.5
    targets = torch.randint(vocabulary, (N,), generator=generator, device=DEVICE)
    targets[: N // 2] = (hidden @ weight.T).argmax(-1)[: N // 2]  # likely tokens, as training has them
    tensors = [x.to(dtype) for x in (hidden, weight, ref_hidden, ref_weight)]
    return tensors, targets, draw(3, N)


def evaluate(function, tensors, upstream):
    """Return a function's outputs, and the gradients of its first two arguments under these upstream gradients."""
    leaves = [x.detach().requires_grad_() for x in tensors[:2]]
    outputs = function(*leaves, *tensors[2:])
    total = sum((g.to(x) * x).sum() for x, g in zip(outputs, upstream, strict=True))
    return [x.detach() for x in outputs] + list(torch.autograd.grad(total, leaves))


def assert_as_exact_as_torch(ours, plain, truth):
    """Hold each result to twice plain torch's error (root mean square: a maximum of few is luck), plus rounding."""
    for number, (mine, torchs, exact) in enumerate(zip(ours, plain, truth, strict=True)):
        assert torch.isfinite(mine).all(), number
        error, bound, size = (x.pow(2).mean().sqrt().item() for x in (mine - exact, torchs - exact, exact))
        if mine.dim() < 2:  # nats: differences of numbers of size 1 and more, which are rounded first
            size = max(1.0, size)
        assert error <= 2 * bound + 4 * torch.finfo(mine.dtype).eps * size, (number, error, bound, size)


def compare(function, reference, tensors, upstream):
    ours = evaluate(function, tensors, upstream)
    plain = evaluate(reference, tensors, upstream)
    truth = evaluate(reference, [x.double() for x in tensors], upstream.double())
    assert_as_exact_as_torch(ours, plain, truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_logprob(shape, scale, dtype):
    """Guards masks at ragged edges, the merging of tiles, τ ≠ 1, upstream gradients ≠ 1, and large logits."""
    tensors, targets, upstream = inputs(shape, dtype, scale)
    compare(
        lambda h, W: linear_logprob(h, W, targets, 0.7, workspace_bytes=WORKSPACE)[:2],
        lambda h, W: reference_logprob(h, W, targets, 0.7)[:2],
        tensors[:2], upstream[:2],
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_kl(shape, scale, dtype):
    """Guards the gap's running sum over tiles, and the gradients of all three results."""
    tensors, targets, upstream = inputs(shape, dtype, scale)
    compare(
        lambda *four: linear_kl(*four, targets, 0.7, workspace_bytes=2 * WORKSPACE),
        lambda *four: reference_kl(*four, targets, 0.7),
        tensors, upstream,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kl", ["none", "k3", "exact"])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ppo_head(shape, entropy_coef, kl, dtype):
    """Guards the loop over chunks of every size, with the trainer's loss, clipped and unclipped."""
    tensors, targets, noise = inputs(shape, dtype)
    config = Config(ckpt="x", kl_estimator="k3" if kl == "k3" else "k1", kl_coef=0.3)
    losses = functools.partial(token_losses, config=config)
    settings = dict(temperature=0.7, entropy_coef=entropy_coef, kl_coef=0.3)
    logprobs = reference_logprob(*(x.double() for x in tensors[:2]), targets, 0.7)[0].float()
    old, advantages, ref = logprobs + 0.3 * noise[0], noise[1], logprobs + 0.5 * noise[2]
    old[0] += 30  # a ratio beyond the clamp: finite, and without a slope
    known = old, advantages, ref
    used = tensors if kl == "exact" else tensors[:2]
    workspace_bytes = 4 * shape[2] * max(1, shape[0] // 3) * (1 + (kl == "exact"))
    compare(
        lambda h, W, *r: ppo_head(
            h, W, targets, losses, known, reference=r or None, **settings, workspace_bytes=workspace_bytes
        )[:1],
        lambda h, W, *r: reference_ppo(
            h, W, targets, losses, [x.to(sum_of(h)) for x in known], reference=r or None, **settings
        )[:1],
        used, torch.full((1,), -1.5, device=DEVICE),
    )  # fmt: skip


def sum_of(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def test_ppo_statistics():
    """Guards the statistics that come out of the chunk loop: equal to the torch path's."""
    tensors, targets, noise = inputs((33, 32, 300), torch.float32)
    old = reference_logprob(*tensors[:2], targets)[0] + 0.3 * noise[0]
    results = []
    for backend in ("triton", "torch"):
        set_backend(backend)
        losses = functools.partial(token_losses, config=Config(ckpt="x"))
        known = old, noise[1], old
        results.append(ppo_head(*tensors[:2], targets, losses, known, reference=tensors[2:], kl_coef=0.1)[1])
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-4, atol=1e-5, msg=name)
    assert results[0]["clip_frac"].sum() > 0 and results[0]["kl_exact"].sum() > 0


def test_ppo_head_with_every_option_of_the_loss():
    """Guards a loss that only one path computes: clip-higher and dual clip by Triton and by torch, with gradients."""
    tensors, targets, noise = inputs((33, 32, 300), torch.float32)
    config = Config(ckpt="x", clip_eps_high=0.4, dual_clip=1.5)
    losses = functools.partial(token_losses, config=config)
    old = reference_logprob(*(x.double() for x in tensors[:2]), targets)[0].float() + noise[0]
    for backend in ("triton", "torch"):
        set_backend(backend)
        compare(
            lambda h, W: ppo_head(h, W, targets, losses, (old, noise[1], old), workspace_bytes=4 * 300 * 11)[:1],
            lambda h, W: reference_ppo(h, W, targets, losses, [x.to(sum_of(h)) for x in (old, noise[1], old)])[:1],
            tensors[:2], torch.full((1,), -1.5, device=DEVICE),
        )  # fmt: skip


def test_strided_inputs():
    """Guards pointers that assume a stride of 1: columns of a table, and one number for all rows."""
    (hidden, weight, *reference), targets, noise = inputs((7, 32, 300), torch.float32)
    table = torch.stack([targets, targets * 0], 1)[:, 0]
    wide = torch.stack([noise, -noise], 2)[..., 0]  # the same numbers, two apart
    assert not table.is_contiguous() and not wide[0].is_contiguous()
    reinforce = lambda new_logprobs, advantages: (-advantages * new_logprobs, {})  # noqa: E731
    for strided, plain in (
        (linear_logprob(hidden, weight, table), linear_logprob(hidden, weight, targets)),
        (linear_kl(hidden, weight, *reference, table), linear_kl(hidden, weight, *reference, targets)),
        (ppo_head(hidden, weight, table, reinforce, (wide[0],))[:1],
         ppo_head(hidden, weight, targets, reinforce, (noise[0],))[:1]),
        (linear_logprob(hidden, weight, targets[:1].expand(7)), linear_logprob(hidden, weight, targets[:1].repeat(7))),
    ):  # fmt: skip
        torch.testing.assert_close(strided, plain)


def test_no_tokens():
    """Guards launches of zero programs: no values, no gradients, no error."""
    tensors, targets, noise = inputs((5, 16, 130), torch.float32)
    hidden, weight, ref_hidden, ref_weight = tensors[0][:0], tensors[1], tensors[2][:0], tensors[3]
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    logprobs, entropy, _ = linear_logprob(hidden, weight, targets[:0])
    total = logprobs.sum() + entropy.sum()
    for reference in (None, (ref_hidden, ref_weight)):
        surprise = lambda new_logprobs: (-new_logprobs, {"p": new_logprobs.exp()})  # noqa: E731
        loss, statistics = ppo_head(hidden, weight, targets[:0], surprise, (), reference=reference, entropy_coef=0.1)
        assert loss.item() == 0 and statistics["p"].shape == (0,)
        total = total + loss
    total.backward()
    assert logprobs.shape == (0,) and not weight.grad.any()


@pytest.mark.skipif(not CUDA, reason="interpreted kernels are not compiled; tests/test_aot.py looks at the arguments")
def test_two_lengths_share_one_binary():
    """Guards against a compilation per batch: 1,000, 1,001 and 16 tokens run the same code."""
    tensors, targets, _ = inputs((1001, 64, 1280), torch.float32)
    counts = []
    for N in (1000, 1001, 16):
        linear_logprob(tensors[0][:N], tensors[1], targets[:N])
        counts.append(len(fold_kernel.device_caches[torch.cuda.current_device()][0]))
    assert counts[0] == counts[1] == counts[2]
