"""The head kernels' torch paths: gradients in fp64, errors, masks, workspaces, and what the KL estimates estimate.

The Triton paths are held against these in `tests/triton_head_kernels.py`, which `tests/test_triton.py` runs.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from kernels import kl_estimates, linear_kl, linear_logprob, ppo_head
from kernels.head import tile_slices
from kernels.linear_kl import reference_kl
from kernels.linear_logprob import reference_logprob
from kernels.ppo_head import Settings, reference_ppo

V, D = 300, 6


def head(N: int, seed: int = 0, scale: float = 1.0, dtype=torch.float64):
    """Hidden states, head weight and targets, both tensors with gradients."""
    generator = torch.Generator().manual_seed(seed)
    hidden = scale * torch.randn(N, D, generator=generator, dtype=dtype)
    weight = torch.randn(V, D, generator=generator, dtype=dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(V, (N,), generator=generator)


def test_logprob_gradcheck():
    """Guards the hand-written backward: against finite differences, over several tiles in both directions."""
    hidden, weight, targets = head(5)
    assert torch.autograd.gradcheck(
        lambda h, W: linear_logprob(h, W, targets, 1.3, workspace_bytes=8 * 256)[:2], (hidden, weight), atol=1e-6
    )


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_kl_gradcheck(direction):
    """Guards the policy side of the KL's backward, together with log-prob and entropy, against finite differences."""
    hidden, weight, targets = head(4)
    ref_hidden, ref_weight, _ = (x.detach() for x in head(4, seed=1))
    assert torch.autograd.gradcheck(
        lambda h, W: linear_kl(
            h, W, ref_hidden, ref_weight, targets, 0.8, direction=direction, workspace_bytes=8 * 512
        ),
        (hidden, weight),
        atol=1e-6,
    )


def ppo_case(hidden, weight, targets, seed: int = 2) -> tuple[torch.Tensor, ...]:
    """Old and reference log-probs near the policy's, some beyond the clip, and advantages."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(3, len(targets), generator=generator, dtype=hidden.dtype)
    logprobs = reference_logprob(hidden.detach(), weight.detach(), targets, 0.7)[0]
    return logprobs + 0.3 * noise[0], noise[1], logprobs + 0.5 * noise[2]


@pytest.mark.parametrize("kl", ["none", "k3", "exact"])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
@pytest.mark.parametrize("workspace_bytes", [8 * V * 4, 1 << 20])
def test_ppo_head_is_the_eager_loss(kl, entropy_coef, workspace_bytes):
    """Guards loss and both gradients of the chunk loop, in fp64, scaled by an upstream gradient."""
    hidden, weight, targets = head(7)
    old, advantages, ref = ppo_case(hidden, weight, targets)
    reference = tuple(x.detach() for x in head(7, seed=1)[:2]) if kl == "exact" else None
    settings = Settings(0.7, 0.2, entropy_coef, 0.3 if kl != "none" else 0.0)
    ref = ref if kl == "k3" else None
    loss, statistics = ppo_head(
        hidden, weight, targets, old, advantages, ref_logprobs=ref, reference=reference,
        **settings._asdict(), workspace_bytes=workspace_bytes,
    )  # fmt: skip
    expected = reference_ppo(hidden, weight, targets, old, advantages, settings, ref, reference)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    ours, theirs = (torch.autograd.grad(-3 * x, (hidden, weight)) for x in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    logprobs, entropy, _ = reference_logprob(hidden, weight, targets, 0.7)
    ratio = (logprobs - old).exp()
    assert statistics["entropy"].item() == pytest.approx(entropy.sum().item())
    assert statistics["clip_frac"].item() == ((ratio - 1).abs() > 0.2).sum().item() > 0
    assert statistics["approx_kl"].item() == pytest.approx((ratio - 1 - ratio.log()).sum().item())
    assert (statistics["ratio_min"].item(), statistics["ratio_max"].item()) == pytest.approx(
        (ratio.min().item(), ratio.max().item())
    )
    if kl == "exact":
        kls = reference_kl(hidden, weight, *reference, targets, 0.7)[0]
        assert statistics["kl_exact"].item() == pytest.approx(kls.sum().item())


def test_a_second_backward_of_ppo_head_is_refused():
    """Guards the in-place scaling: a second backward would multiply by the upstream gradient twice, silently."""
    hidden, weight, targets = head(3)
    old, advantages, _ = ppo_case(hidden, weight, targets)
    loss, _ = ppo_head(hidden, weight, targets, old, advantages)
    (2 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("kept", [[True, False, True, True, False], [False] * 5])
def test_masked_rows_are_not_computed(kept):
    """Guards "computed and multiplied by zero": a masked row may hold NaN, and what is left equals a shorter batch."""
    hidden, weight, targets = head(5)
    mask = torch.tensor(kept)
    with torch.no_grad():
        hidden[~mask] = torch.nan
    ref_hidden, ref_weight, _ = (x.detach() for x in head(5, seed=1))
    old, advantages, _ = (torch.where(mask, x, torch.nan) for x in ppo_case(hidden, weight, targets))
    calls = {
        "logprob": lambda m, h, r, y, o, a: sum(x.sum() for x in linear_logprob(h, weight, y, action_mask=m)[:2]),
        "kl": lambda m, h, r, y, o, a: sum(
            x.sum() for x in linear_kl(h, weight, r, ref_weight, y, action_mask=m)
        ),
        "ppo": lambda m, h, r, y, o, a: ppo_head(h, weight, y, o, a, action_mask=m)[0],
        "exact": lambda m, h, r, y, o, a: ppo_head(
            h, weight, y, o, a, reference=(r, ref_weight), kl_coef=0.5, action_mask=m
        )[0],
    }  # fmt: skip
    for name, call in calls.items():
        whole = call(mask, hidden, ref_hidden, targets, old, advantages)
        part = call(None, *(x[mask] for x in (hidden, ref_hidden, targets, old, advantages)))
        ours, theirs = (torch.autograd.grad(x, (hidden, weight)) for x in (whole, part))
        torch.testing.assert_close((whole, *ours), (part, *theirs), msg=name)
        assert (ours[0][~mask] == 0).all(), name


def test_values_of_masked_rows_are_zero():
    """Guards the places of the kept rows: each value comes back at its own row, zeros elsewhere."""
    hidden, weight, targets = head(4)
    mask = torch.tensor([False, True, False, True])
    for whole, kept in (
        (linear_logprob(hidden, weight, targets), linear_logprob(hidden, weight, targets, action_mask=mask)),
        (linear_kl(hidden, weight, -hidden.detach(), weight.detach(), targets),
         linear_kl(hidden, weight, -hidden.detach(), weight.detach(), targets, action_mask=mask)),
    ):  # fmt: skip
        for x, y in zip(whole, kept, strict=True):
            torch.testing.assert_close(torch.where(mask, x, 0), y)


def test_tiles_cover_everything_once():
    """Guards gaps and overlaps of tiles, for ragged sizes, and the bound on their size."""
    for N, vocabulary, elements in itertools.product((1, 7, 5000), (1, 127, 128, 1000), (128, 1000, 10**6)):
        seen = torch.zeros(N, vocabulary, dtype=torch.uint8)
        for rows, ids in tile_slices(N, vocabulary, elements):
            seen[rows, ids] += 1
            assert (rows.stop - rows.start) * (ids.stop - ids.start) <= elements
        assert (seen == 1).all()
    assert list(tile_slices(0, 5, 128)) == []


@pytest.mark.parametrize("scale", [1.0, 300.0, 30_000.0])
def test_large_logits_stay_finite_and_exact(scale):
    """Guards overflow of exp and the cancellation of lse − E[z]: as exact in fp32 as torch, at logits of 10⁵ too."""
    hidden, weight, targets = head(40, scale=scale, dtype=torch.float32)
    ref_hidden = hidden.detach() + 0.1 * torch.randn(40, D, generator=torch.Generator().manual_seed(5))
    ref_weight = weight.detach()
    truth = reference_kl(*(x.double() for x in (hidden, weight, ref_hidden, ref_weight)), targets)
    ours = linear_kl(hidden, weight, ref_hidden, ref_weight, targets)
    plain = reference_kl(hidden, weight, ref_hidden, ref_weight, targets)
    for name, mine, torchs, exact in zip(("kl", "logprobs", "entropy"), ours, plain, truth, strict=True):
        error, bound = ((x.double() - exact).pow(2).mean().sqrt().item() for x in (mine, torchs))
        assert error <= 2 * bound + 1e-6, (name, error, bound)
    for mine, torchs, exact in zip(
        *(torch.autograd.grad(x[0].sum(), (hidden, weight), retain_graph=True) for x in (ours, plain, truth)),
        strict=True,
    ):  # fmt: skip
        error, bound = ((x.double() - exact).pow(2).mean().sqrt().item() for x in (mine, torchs))
        assert error <= 2 * bound + 1e-6 * exact.abs().max().item(), (error, bound)
    same = linear_logprob(hidden, weight, targets)
    torch.testing.assert_close(same[0], ours[1])
    torch.testing.assert_close(same[1], ours[2])


def test_the_kl_of_close_models_keeps_its_digits():
    """Guards the difference of two large sums: a KL of 10⁻⁵ between models whose entropies are about 5."""
    hidden, weight, targets = head(50, dtype=torch.float32)
    near = hidden.detach() + 0.002 * torch.randn(50, D, generator=torch.Generator().manual_seed(5))
    truth = reference_kl(*(x.double() for x in (hidden, weight, near, weight)), targets)[0]
    kl = linear_kl(hidden, weight, near, weight.detach(), targets)[0]
    assert truth.max().item() < 1e-4
    assert (kl.double() - truth).abs().max().item() < 1e-6
    assert linear_kl(hidden, weight, hidden.detach(), weight.detach(), targets)[0].abs().max().item() == 0.0


def test_what_the_kl_estimates_estimate():
    """Guards their documentation: means of k1 and k3 are the KL; of their gradients as losses 0, forward or reverse."""
    hidden, weight, _ = head(1)
    ref_hidden, ref_weight, _ = (x.detach() for x in head(1, seed=1))
    every = torch.arange(V)  # the expectation over y ~ p, exactly: each token with its probability
    logprobs = reference_logprob(hidden.expand(V, D), weight, every)[0]
    ref = reference_logprob(ref_hidden.expand(V, D), ref_weight, every)[0]
    p = logprobs.detach().exp()
    k1, k2, k3 = kl_estimates(logprobs, ref)
    forward, reverse = (
        linear_kl(hidden, weight, ref_hidden, ref_weight, every[:1], direction=d)[0] for d in ("forward", "reverse")
    )
    assert (p @ k1).item() == pytest.approx((p @ k3).item()) == pytest.approx(forward.item())
    assert (p @ k2).item() != pytest.approx(forward.item(), rel=0.05)
    slopes = [torch.autograd.grad(p @ k, hidden, retain_graph=True)[0] for k in (k1, k2, k3)]
    exact = [torch.autograd.grad(kl, hidden)[0] for kl in (forward, reverse)]
    torch.testing.assert_close(slopes[0], torch.zeros_like(hidden), atol=1e-9, rtol=0)
    torch.testing.assert_close(slopes[1], exact[0])
    torch.testing.assert_close(slopes[2], exact[1])


def test_the_kl_gradient_is_a_finite_difference():
    """Guards the KL's gradient once more, along the direction that a training step takes: through the head's weight."""
    hidden, weight, targets = head(6)
    ref_hidden, ref_weight, _ = (x.detach() for x in head(6, seed=1))

    def total(W):
        return linear_kl(hidden, W, ref_hidden, ref_weight, targets)[0].sum()

    (slope,) = torch.autograd.grad(total(weight), weight)
    step = 1e-6 * slope / slope.norm()
    with torch.no_grad():
        difference = (total(weight + step) - total(weight - step)) / 2e-6
    assert difference.item() == pytest.approx(slope.norm().item(), rel=1e-6)


def test_a_frozen_head_gets_no_gradient():
    """Guards needless work: a head that is not trained costs no (V, D) gradient."""
    hidden, weight, targets = head(3)
    weight = weight.detach()
    linear_logprob(hidden, weight, targets)[0].sum().backward()
    old, advantages, _ = ppo_case(hidden, weight, targets)
    ppo_head(hidden, weight, targets, old, advantages)[0].backward()
    assert weight.grad is None and hidden.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda h, W, y: linear_logprob(h[:, :5], W, y), r"must be \(N, D\), \(V, D\) and \(N,\)"),
        (lambda h, W, y: linear_logprob(h, W, y[:2]), r"must be \(N, D\)"),
        (lambda h, W, y: linear_logprob(h, W, y, 0.0), r"temperature is 0.0; it must be positive \(--temperature\)"),
        (lambda h, W, y: linear_logprob(h, W, y, action_mask=torch.ones(2, dtype=torch.bool)), r"must be \(3,\) bool"),
        (lambda h, W, y: linear_logprob(h, W, y, workspace_bytes=100), "a tile needs at least 128"),
        (lambda h, W, y: linear_kl(h, W, h, W[:9], y), r"long ids in \[0, 9\)"),
        (lambda h, W, y: linear_kl(h, W, h, W, y, direction="both"), "direction 'both'"),
        (lambda h, W, y: ppo_head(h, W, y, h[:, 0], h[:2, 0]), r"must be \(3,\) fp32, as targets"),
        (lambda h, W, y: ppo_head(h, W, y, h[:, 0], h[:, 0], ref_logprobs=h[:, 0], reference=(h, W)), "exclude each"),
        (lambda h, W, y: ppo_head(h, W, y, h[:, 0], h[:, 0], workspace_bytes=512), "one token's logits need 2400"),
        (lambda h, W, y: ppo_head(h, W, y, h[:, 0], h[:, 0], workspace_bytes=0), "one token's logits need 2400"),
        (lambda h, W, y: ppo_head(h, W, y, h[:, 0], h[:, 0], ref_logprobs=h[:1, 0]), r"must be \(3,\) fp32"),
        (lambda h, W, y: ppo_head(h, W, y, h[:, 0], h[:, 0], reference=(h[:2], W)), r"must be \(N, D\)"),
        (lambda h, W, y: ppo_head(h, W, y, h[:, 0], h[:, 0], reference=(h, W[:9])), "long ids in|heads of 300"),
        (lambda h, W, y: linear_logprob(h, W, y - 300), r"long ids in \[0, 300\); mask rows"),
        (lambda h, W, y: linear_logprob(h, W, y.int()), r"long ids in \[0, 300\)"),
        (lambda h, W, y: linear_logprob(h, W.float(), y), "weight is torch.float32 on cpu, hidden torch.float64"),
        (lambda h, W, y: linear_logprob(h, W[:0], y), r"must be \(N, D\), \(V, D\)"),
    ],
)  # fmt: skip
def test_misuse_is_named(call, message):
    """Guards silent broadcasting and cryptic errors from inside: each misuse is a ValueError that names it."""
    hidden, weight, targets = head(3)
    with pytest.raises(ValueError, match=message):
        call(hidden, weight, targets)


def test_bf16_keeps_its_sums_in_fp32():
    """Guards rounded logits and rounded partial sums: bf16 inputs over many tiles, more exact than plain bf16 torch."""
    hidden, weight, targets = (x.bfloat16() if x.is_floating_point() else x for x in head(64, dtype=torch.float32))
    leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    results = []
    for function, dtype in (
        (lambda h, W: linear_logprob(h, W, targets, workspace_bytes=4 * 1024), torch.bfloat16),
        (lambda h, W: reference_logprob(h, W, targets), torch.bfloat16),
        (lambda h, W: reference_logprob(h, W, targets), torch.float64),
    ):
        h, W = (x.detach().to(dtype).requires_grad_() for x in leaves)
        logprobs, entropy, _ = function(h, W)
        gradients = torch.autograd.grad(logprobs.sum() - entropy.sum(), (h, W))
        results.append([x.double() for x in (logprobs, entropy, *gradients)])
    for ours, plain, truth in zip(*results, strict=True):
        error, bound = ((x - truth).pow(2).mean().sqrt().item() for x in (ours, plain))
        assert error <= bound, (error, bound)
    assert (results[0][0] - results[2][0]).abs().max() < 1e-4 < (results[1][0] - results[2][0]).abs().max()


def test_a_second_derivative_is_refused():
    """Guards a penalty on gradients that would silently count as nothing."""
    hidden, weight, targets = head(3)
    old, advantages, _ = ppo_case(hidden, weight, targets)
    for value in (
        linear_logprob(hidden, weight, targets)[0].sum(),
        linear_kl(hidden, weight, -hidden.detach(), weight.detach(), targets)[0].sum(),
        ppo_head(hidden, weight, targets, old, advantages)[0],
    ):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(value, hidden, create_graph=True)
