"""The head kernels' torch paths: gradients in fp64, errors, workspaces, and what the KL estimators estimate.

The Triton paths are held against these in `tests/triton_head_kernels.py`, which `tests/test_triton.py` runs.
"""

from __future__ import annotations

import functools
import itertools
from types import SimpleNamespace

import pytest
import torch

from kernels import head as head_module
from kernels import linear_kl, linear_logprob, ppo_head
from kernels.head import tile_slices
from kernels.linear_kl import reference_kl
from kernels.linear_logprob import reference_logprob
from kernels.ppo_head import reference_ppo
from train_rlpa import KL_ESTIMATORS, Config, token_losses

V, D = 300, 6
SMALL = 260, 2  # for finite differences, whose work grows with the weight; three tiles of ids, as with V


def head(N: int, seed: int = 0, scale: float = 1.0, dtype=torch.float64, size: tuple[int, int] = (V, D)):
    """Hidden states, head weight and targets, both tensors with gradients."""
    generator = torch.Generator().manual_seed(seed)
    hidden = scale * torch.randn(N, size[1], generator=generator, dtype=dtype)
    weight = torch.randn(*size, generator=generator, dtype=dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(size[0], (N,), generator=generator)


def test_logprob_gradcheck():
    """Guards the hand-written backward: against finite differences, over several tiles in both directions."""
    hidden, weight, targets = head(5, size=SMALL)
    assert torch.autograd.gradcheck(
        lambda h, W: linear_logprob(h, W, targets, 1.3, workspace_bytes=8 * 256)[:2], (hidden, weight), atol=1e-6
    )


def test_kl_gradcheck():
    """Guards the policy side of the KL's backward, together with log-prob and entropy, against finite differences."""
    hidden, weight, targets = head(4, size=SMALL)
    ref_hidden, ref_weight, _ = (x.detach() for x in head(4, seed=1, size=SMALL))
    assert torch.autograd.gradcheck(
        lambda h, W: linear_kl(h, W, ref_hidden, ref_weight, targets, 0.8, workspace_bytes=8 * 512),
        (hidden, weight),
        atol=1e-6,
    )


def ppo_loss(kl: str = "none", kl_coef: float = 0.0):
    """The trainer's loss of a token, with this estimator of the KL; "none" and "exact" have no KL there."""
    config = Config(ckpt="x", kl_estimator="k1" if kl == "none" else kl, kl_coef=kl_coef)
    return functools.partial(token_losses, config=config)


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
    """Guards loss, both gradients and statistics of the chunk loop, in fp64, scaled by an upstream gradient."""
    hidden, weight, targets = head(7)
    known = ppo_case(hidden, weight, targets)
    settings = dict(temperature=0.7, entropy_coef=entropy_coef, kl_coef=0.3)
    if kl == "exact":
        settings["reference"] = tuple(x.detach() for x in head(7, seed=1)[:2])
    given = hidden, weight, targets, ppo_loss(kl, 0.3), known
    loss, statistics = ppo_head(*given, **settings, workspace_bytes=workspace_bytes)
    expected, expected_statistics = reference_ppo(*given, **settings)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    ours, theirs = (torch.autograd.grad(-3 * x, (hidden, weight)) for x in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(statistics, expected_statistics, rtol=1e-9, atol=1e-10)
    assert ("kl_exact" in statistics) == (kl == "exact")
    assert not any(values.requires_grad for values in statistics.values())
    logprobs, entropy, _ = reference_logprob(hidden, weight, targets, 0.7)
    ratio = (logprobs - known[0]).exp()
    torch.testing.assert_close(statistics["entropy"], entropy.detach())
    torch.testing.assert_close(statistics["ratio"], ratio.detach())
    assert statistics["clip_frac"].tolist() == ((ratio - 1).abs() > 0.2).double().tolist()
    assert statistics["clip_frac"].sum() > 0


def test_no_tokens():
    """Guards a rank that has no action token in a micro-batch: no loss, no gradient, and statistics of no token."""
    hidden, weight, targets = (x.detach()[:0] if x.shape[0] == 3 else x.detach() for x in head(3))
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    for kl in ("none", "exact"):
        reference = (hidden.detach(), weight.detach()) if kl == "exact" else None
        known = [hidden.detach()[:, 0]] * 3
        loss, statistics = ppo_head(hidden, weight, targets, ppo_loss(kl), known, reference=reference, entropy_coef=0.1)
        gradients = torch.autograd.grad(loss, (hidden, weight))
        assert loss.item() == 0 and not any(g.any() for g in gradients)
        assert statistics["ratio"].shape == statistics["entropy"].shape == (0,)
    logprobs, entropy, _ = linear_logprob(hidden, weight, targets)
    assert logprobs.shape == entropy.shape == (0,)


def test_a_second_backward_of_ppo_head_is_refused():
    """Guards the in-place scaling: a second backward would multiply by the upstream gradient twice, silently."""
    hidden, weight, targets = head(3)
    loss, _ = ppo_head(hidden, weight, targets, ppo_loss(), ppo_case(hidden, weight, targets))
    (2 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


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


def test_what_the_kl_estimators_estimate():
    """Guards their documentation: the means of k1 and k3 are the KL, and the mean gradients 0, forward and reverse."""
    hidden, weight, _ = head(1)
    ref_hidden, ref_weight, _ = (x.detach() for x in head(1, seed=1))
    every = torch.arange(V)  # the expectation over y ~ p, exactly: each token with its probability
    logprobs = reference_logprob(hidden.expand(V, D), weight, every)[0]
    ref = reference_logprob(ref_hidden.expand(V, D), ref_weight, every)[0]
    p = logprobs.detach().exp()
    k1, k2, k3 = (k(logprobs - ref) for k in (lambda gap: gap, lambda gap: gap**2 / 2, KL_ESTIMATORS["k3"]))
    forward = linear_kl(hidden, weight, ref_hidden, ref_weight, every[:1])[0]
    reverse = (ref.exp() * (ref - logprobs)).sum()
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
    ppo_head(hidden, weight, targets, ppo_loss(), ppo_case(hidden, weight, targets))[0].backward()
    assert weight.grad is None and hidden.grad.abs().sum() > 0


def surprise(new_logprobs, *_):
    """The smallest loss."""
    return -new_logprobs, {}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda h, W, y: linear_logprob(h[:, :5], W, y), r"must be \(N, D\), \(V, D\) and \(N,\)"),
        (lambda h, W, y: linear_logprob(h, W, y[:2]), r"must be \(N, D\)"),
        (lambda h, W, y: linear_logprob(h, W, y, 0.0), r"temperature is 0.0; it must be positive \(--temperature\)"),
        (lambda h, W, y: linear_logprob(h, W, y, workspace_bytes=100), "a tile needs at least 128"),
        (lambda h, W, y: linear_kl(h, W, h, W[:9], y), r"long ids in \[0, 9\)"),
        (lambda h, W, y: linear_kl(h, W, h, torch.cat((W, W)), y), "equally many ids, not 300 and 600"),
        (lambda h, W, y: ppo_head(h, W, y, surprise, (h[:, 0], h[:2, 0])), r"they must be \(3,\), as targets"),
        (lambda h, W, y: ppo_head(h, W, y, lambda x: (x.sum(), {}), ()), r"token_losses gave \(\) for \(3,\)"),
        (lambda h, W, y: ppo_head(h, W, y, surprise, (), workspace_bytes=512), "512; one token's logits need 2400"),
        (lambda h, W, y: ppo_head(h, W, y, surprise, (), workspace_bytes=0), "one token's logits need 2400"),
        (lambda h, W, y: ppo_head(h, W, y, surprise, (), reference=(h[:2], W)), r"must be \(N, D\)"),
        (lambda h, W, y: ppo_head(h, W, y, surprise, (), reference=(h, torch.cat((W, W)))), "ids, not 300 and 600"),
        (lambda h, W, y: linear_logprob(h, W, y - 300), r"long ids in \[0, 300\)"),
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
    for value in (
        linear_logprob(hidden, weight, targets)[0].sum(),
        linear_kl(hidden, weight, -hidden.detach(), weight.detach(), targets)[0].sum(),
        ppo_head(hidden, weight, targets, surprise, ())[0],
    ):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(value, hidden, create_graph=True)


def test_a_tile_is_half_of_the_l2_cache(monkeypatch):
    """Guards a tile that the row kernel reads from HBM, 64 MiB beside 50 MB of L2 on an H100, and one of no bytes."""
    cards = {"H100": SimpleNamespace(L2_cache_size=50 << 20), "untold": SimpleNamespace()}
    sizes = {}
    for name, card in cards.items():
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, card=card: card)
        sizes[name] = head_module.tile_bytes(torch.device("cuda"))
    assert sizes == {"H100": 25 << 20, "untold": 64 << 20} and head_module.tile_bytes(torch.device("cpu")) == 64 << 20
    monkeypatch.setattr(head_module, "tile_bytes", lambda device: 4 * 1024)
    one, two = (head_module.new_workspace(None, torch.zeros(64, 8), 512, models=n) for n in (1, 2))
    assert (len(one), len(two)) == (1024, 512)
