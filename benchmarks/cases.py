"""What is measured: for each kernel its inputs, plain torch's version, ours, the work that counts and the floor.

The work is what the kernels' docstrings state: products of a head (2NDV FLOP each), or bytes that must move. The floor
is measured beside it: the same bare products, or a copy of the same bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Result, copy_seconds, product_seconds
from kernels.decode_attention import decode_attention
from kernels.linear_kl import linear_kl, reference_kl
from kernels.linear_logprob import linear_logprob, reference_logprob
from kernels.ppo_head import ppo_head
from kernels.rmsnorm import reference_rmsnorm, rmsnorm
from kernels.rope import reference_rope, rope
from kernels.rows import Rows
from kernels.sample_head import sample_head
from kernels.swiglu import reference_swiglu, swiglu
from train_rlpa import Config, token_losses

FORWARD, BOTH = "forward", "both"
PRODUCTS = {  # (kernel, direction): of logits, and of gradients of hidden and weight
    ("linear_logprob", FORWARD): (1, 0, 0),
    ("linear_logprob", BOTH): (2, 1, 1),
    ("linear_kl", FORWARD): (2, 0, 0),
    ("linear_kl", BOTH): (4, 1, 1),
    ("ppo_head", BOTH): (1, 1, 1),
    ("ppo_head_exact", BOTH): (2, 1, 1),
    ("sample_head", FORWARD): (1, 0, 0),
}
PPO = functools.partial(token_losses, config=Config(ckpt="none"))  # the trainer's loss of a token, as published
KL_COEF = 0.1  # of the exact KL


@dataclass(frozen=True)
class Size:
    """A model's widths, and how many tokens, rows and cached tokens are measured."""

    name: str
    N: int  # tokens of a head
    rows: int  # tokens of the model kernels
    D: int
    V: int
    H: int
    Hkv: int
    Dh: int
    inner: int
    R: int  # candidates in decoding
    S: int  # cached tokens that each sees
    kernels: tuple[str, ...] | None = None  # None: all
    truth: bool = True  # compare with fp64: minutes, for the largest


TINY = Size("tiny", 24, 24, 16, 640, 4, 2, 16, 48, 3, 20)
CPU = (
    Size("0.5B", 256, 2048, 896, 151_936, 14, 2, 64, 4864, 8, 512),
    Size("0.5B-bar", 2048, 2048, 896, 151_936, 14, 2, 64, 4864, 8, 512, ("ppo_head",), truth=False),
)
CUDA = (
    Size("3B", 8192, 8192, 2048, 151_936, 16, 2, 128, 11_008, 64, 2048),
    Size("0.5B", 8192, 8192, 896, 151_936, 14, 2, 64, 4864, 64, 2048),
    Size("7B", 8192, 8192, 3584, 152_064, 28, 4, 128, 18_944, 64, 2048),
)


@dataclass
class Case:
    """One kernel at one size: inputs by name, functions from them to outputs by name, and what to compare with."""

    kernel: str
    shape: str
    inputs: dict[str, Tensor]
    eager: Callable[..., Result]
    ours: Callable[..., Result]
    work: dict[str, int]  # by direction: FLOP of a head, bytes of another kernel
    floor: Callable[[str], float]  # of a direction, in seconds
    wrt: tuple[str, ...] = ()  # inputs that get gradients
    upstream: Result = field(default_factory=dict)  # gradients of outputs; an output without one gets none
    shared: tuple[str, ...] = ("weight", "ref_weight")  # inputs without a row per token
    block: int = 512  # tokens at a time for the truth
    expected: Callable[[Result], Result] | None = None  # what a result should be, where that depends on a draw
    eager_errors: dict[str, dict[str, float]] = field(default_factory=dict)  # by direction, once known

    def call(self, function: Callable[..., Result], direction: str) -> Callable[[], Result]:
        """Return what is timed: outputs without gradients, or the gradients."""
        if direction == BOTH:
            return lambda: gradients(function, self.inputs, self.wrt, self.upstream)
        return lambda: without_gradients(function, self.inputs)

    def errors(self, result: Result) -> dict[str, float]:
        """Return the largest difference from the truth of each output or gradient that has one."""
        truth = self.expected(result) if self.expected else self.truth
        return {name: (x.double() - truth[name]).abs().max().item() for name, x in result.items() if name in truth}

    @functools.cached_property
    def truth(self) -> Result:
        """Outputs and gradients of plain torch in fp64, by blocks of tokens."""
        N = max(len(x) for name, x in self.inputs.items() if name not in self.shared)
        parts: dict[str, list[Tensor]] = {}
        for start in range(0, N, self.block):
            given = {name: self.part(name, x, start) for name, x in self.inputs.items()}
            upstream = {name: self.part(name, x, start) for name, x in self.upstream.items()}
            result = without_gradients(self.eager, given)
            if self.wrt:
                result |= gradients(self.eager, given, self.wrt, upstream)
            for name, x in result.items():
                total = x.dim() == 0 or name.removeprefix("d_") in self.shared
                if total and name in parts:
                    parts[name][0] += x
                else:
                    parts.setdefault(name, []).append(x)
        return {name: torch.cat(x) if x[0].dim() else x[0] for name, x in parts.items()}

    def part(self, name: str, x: Tensor, start: int) -> Tensor:
        """Return a block's rows of an input, or all of a shared one, in fp64."""
        x = x if name in self.shared or x.dim() == 0 else x[start : start + self.block]
        return x.double() if x.is_floating_point() else x


def without_gradients(function: Callable[..., Result], inputs: dict[str, Tensor]) -> Result:
    """Run forward alone."""
    with torch.no_grad():
        return function(**inputs)


def gradients(function: Callable[..., Result], inputs: dict[str, Tensor], wrt: tuple[str, ...], upstream: Result):
    """Run forward and backward; return the gradients, as d_<input>."""
    leaves = {name: x.detach().requires_grad_(name in wrt) for name, x in inputs.items()}
    outputs = function(**leaves)
    names = [name for name in outputs if name in upstream]
    found = torch.autograd.grad(
        [outputs[name] for name in names], [leaves[name] for name in wrt], [upstream[name] for name in names]
    )
    prefix = "other_d_" if "other" in outputs else "d_"
    return {prefix + name: x for name, x in zip(wrt, found, strict=True)}


# ------------------------------------------------------------------------------------------------------------- heads


@functools.lru_cache
def products(N: int, size: Size, dtype: torch.dtype, device: str) -> tuple[float, float, float]:
    """Time a head's three bare products once for all kernels that count them."""
    return product_seconds(N, size.D, size.V, dtype, device)


def head_work(kernel: str, N: int, size: Size, dtype: torch.dtype, device: str) -> dict:
    """Return work and floor of a head kernel."""
    counts = {direction: count for (name, direction), count in PRODUCTS.items() if name == kernel}

    def floor(direction: str) -> float:
        return sum(n * t for n, t in zip(counts[direction], products(N, size, dtype, device), strict=True))

    return dict(work={d: 2 * N * size.D * size.V * sum(count) for d, count in counts.items()}, floor=floor)


def head_inputs(N: int, size: Size, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Draw hidden states, targets and a weight that makes logits of standard deviation 3, as a language model's are."""
    torch.manual_seed(0)
    hidden = torch.randn(N, size.D, device=device)
    weight = torch.randn(size.V, size.D, device=device).mul_(3 * size.D**-0.5).to(dtype)
    return dict(hidden=hidden.to(dtype), weight=weight, targets=torch.randint(size.V, (N,), device=device))


def with_reference(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add a reference model near the policy."""
    noise = {name: torch.randn_like(inputs[name]) for name in ("hidden", "weight")}
    ref_hidden = inputs["hidden"] + 0.1 * noise["hidden"]
    noise["weight"].mul_(0.3 * inputs["hidden"].shape[1] ** -0.5).add_(inputs["weight"])
    return inputs | dict(ref_hidden=ref_hidden, ref_weight=noise["weight"])


def head_shape(N: int, size: Size, dtype: torch.dtype) -> str:
    """Name a head's shape."""
    return f"{size.name} N={N:,} D={size.D} V={size.V:,} {short(dtype)}"


def short(dtype: torch.dtype) -> str:
    """Name a dtype."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def make_linear_logprob(size: Size, dtype: torch.dtype, device: str) -> Case:
    """Log-prob and entropy; the gradient comes through the log-prob, with another upstream value for every token."""
    inputs = head_inputs(size.N, size, dtype, device)

    def ours(**given: Tensor) -> Result:
        return dict(zip(("logprobs", "entropy"), linear_logprob(**given), strict=False))

    def eager(**given: Tensor) -> Result:
        return dict(zip(("logprobs", "entropy"), reference_logprob(**given), strict=False))

    return Case(
        "linear_logprob", head_shape(size.N, size, dtype), inputs, eager, ours, wrt=("hidden", "weight"),
        upstream=dict(logprobs=torch.randn(size.N, device=device) / size.N),
        **head_work("linear_logprob", size.N, size, dtype, device),
    )  # fmt: skip


def make_linear_kl(size: Size, dtype: torch.dtype, device: str) -> Case:
    """Exact KL, log-prob and entropy; the gradient is that of the mean KL."""
    inputs = with_reference(head_inputs(size.N, size, dtype, device))

    def ours(**given: Tensor) -> Result:
        return dict(zip(("kl", "logprobs", "entropy"), linear_kl(**given), strict=True))

    def eager(**given: Tensor) -> Result:
        return dict(zip(("kl", "logprobs", "entropy"), reference_kl(**given), strict=True))

    one = torch.ones((), device=device)
    return Case(
        "linear_kl", head_shape(size.N, size, dtype), inputs, eager, ours, wrt=("hidden", "weight"),
        upstream=dict(kl=(one / size.N).expand(size.N).contiguous(), kl_mean=one, other=one), block=256,
        **head_work("linear_kl", size.N, size, dtype, device),
    )  # fmt: skip


def eager_ppo(hidden, weight, targets, old_logprobs, advantages, ref_hidden=None, ref_weight=None) -> Result:
    """Compute the PPO loss from all logits, in the fewest plain operations."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    log_p = (hidden @ weight.T).to(wide).log_softmax(-1)
    losses = PPO(log_p.gather(1, targets[:, None])[:, 0], old_logprobs, advantages, old_logprobs)[0]
    if ref_hidden is not None:
        log_r = (ref_hidden @ ref_weight.T).to(wide).log_softmax(-1)
        losses = losses + KL_COEF * (log_p.exp() * (log_p - log_r)).sum(-1)
    return dict(loss=losses.sum())


def ours_ppo(
    hidden, weight, targets, old_logprobs, advantages, ref_hidden=None, ref_weight=None, workspace_bytes=None
) -> Result:
    """Compute the PPO loss in the chunk loop."""
    reference = None if ref_hidden is None else (ref_hidden, ref_weight)
    known = old_logprobs, advantages, old_logprobs  # the last for k3, which this loss does not have
    settings = dict(reference=reference, kl_coef=KL_COEF, workspace_bytes=workspace_bytes)
    return dict(loss=ppo_head(hidden, weight, targets, PPO, known, **settings)[0])


def make_ppo_head(size: Size, dtype: torch.dtype, device: str, exact: bool = False) -> Case:
    """The PPO loss without KL, or with the exact one.

    Peers have no such loss: they get its slope as upstream gradient of each log-prob (and KL), and so the same
    gradients to compute; what makes the slope is not in their time.
    """
    inputs = head_inputs(size.N, size, dtype, device)
    logprobs = linear_logprob(**inputs)[0]
    inputs |= dict(old_logprobs=logprobs + 0.1 * torch.randn_like(logprobs), advantages=torch.randn_like(logprobs))
    leaf = logprobs.clone().requires_grad_()
    losses = PPO(leaf, inputs["old_logprobs"], inputs["advantages"], inputs["old_logprobs"])[0]
    (slope,) = torch.autograd.grad(losses.sum(), leaf)
    kernel = "ppo_head_exact" if exact else "ppo_head"
    return Case(
        kernel, head_shape(size.N, size, dtype), with_reference(inputs) if exact else inputs, eager_ppo, ours_ppo,
        wrt=("hidden", "weight"), block=256,
        upstream=dict(loss=torch.ones((), device=device), logprobs=slope, kl=torch.full_like(slope, KL_COEF)),
        **head_work(kernel, size.N, size, dtype, device),
    )  # fmt: skip


def make_sample_head(size: Size, dtype: torch.dtype, device: str) -> Case:
    """Draw a token and its log-prob; the floor is the bare product of R rows, which reads the weight once."""
    inputs = head_inputs(size.R, size, dtype, device)
    seeds = steps = torch.arange(size.R, device=device)
    del inputs["targets"]

    def ours(hidden: Tensor, weight: Tensor) -> Result:
        return dict(zip(("ids", "logprobs"), sample_head(hidden, weight, 1.0, seeds, steps), strict=True))

    def eager(hidden: Tensor, weight: Tensor) -> Result:
        probs = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32)).softmax(-1)
        ids = probs.multinomial(1)
        return dict(ids=ids[:, 0], logprobs=probs.gather(1, ids)[:, 0].log())

    def expected(result: Result) -> Result:
        log_p = (inputs["hidden"].double() @ inputs["weight"].double().T).log_softmax(-1)
        return dict(logprobs=log_p.gather(1, result["ids"][:, None])[:, 0])

    shape = f"{size.name} R={size.R} D={size.D} V={size.V:,} {short(dtype)}"
    return Case(
        "sample_head", shape, inputs, eager, ours, expected=expected,
        **head_work("sample_head", size.R, size, dtype, device),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ model kernels


@functools.lru_cache
def copy(moved: int, device: str) -> float:
    """Time a copy of so many bytes once for all implementations."""
    return copy_seconds(moved, device)


def byte_work(device: str, **moved: int) -> dict:
    """Return work and floor of a kernel that moves so many bytes in a direction."""
    return dict(work=moved, floor=lambda direction: copy(moved[direction], device))


def make_rmsnorm(size: Size, dtype: torch.dtype, device: str) -> Case:
    """Residual addition and norm, gradients through both outputs: 4ND elements each way."""
    torch.manual_seed(0)
    x, residual, dy, dh = (torch.randn(size.rows, size.D, device=device).to(dtype) for _ in range(4))
    weight, moved = torch.rand(size.D, device=device).to(dtype), 4 * x.nbytes

    def ours(x: Tensor, residual: Tensor, weight: Tensor) -> Result:
        return dict(zip("yh", rmsnorm(x, weight, 1e-6, residual), strict=True))

    def eager(x: Tensor, residual: Tensor, weight: Tensor) -> Result:
        return dict(zip("yh", reference_rmsnorm(x, weight, 1e-6, residual), strict=True))

    return Case(
        "rmsnorm", f"{size.name} N={size.rows:,} D={size.D} {short(dtype)}",
        dict(x=x, residual=residual, weight=weight), eager, ours, wrt=("x", "residual", "weight"),
        upstream=dict(y=dy, h=dh), **byte_work(device, forward=moved, both=2 * moved),
    )  # fmt: skip


def make_rope(size: Size, dtype: torch.dtype, device: str) -> Case:
    """Turn queries and keys: 2N(H + Hkv)Dh elements each way."""
    torch.manual_seed(0)
    B, half = 8, size.Dh // 2
    T = size.rows // B
    q, dq = (torch.randn(B, T, size.H, size.Dh, device=device).to(dtype) for _ in range(2))
    k, dk = (torch.randn(B, T, size.Hkv, size.Dh, device=device).to(dtype) for _ in range(2))
    frequencies = 1e6 ** (-torch.arange(half, device=device) / half)
    angles = (torch.arange(T, device=device)[:, None] * frequencies).expand(B, T, half)[:, :, None]
    moved = 2 * (q.nbytes + k.nbytes)

    def ours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Result:
        return dict(zip("qk", rope(q, k, cos, sin), strict=True))

    def eager(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Result:
        return dict(q=reference_rope(q, cos, sin), k=reference_rope(k, cos, sin))

    return Case(
        "rope", f"{size.name} N={size.rows:,} H={size.H}/{size.Hkv} Dh={size.Dh} {short(dtype)}",
        dict(q=q, k=k, cos=angles.cos(), sin=angles.sin()), eager, ours, wrt=("q", "k"), upstream=dict(q=dq, k=dk),
        **byte_work(device, forward=moved, both=2 * moved),
    )  # fmt: skip


def make_swiglu(size: Size, dtype: torch.dtype, device: str) -> Case:
    """The gate of the MLP: 3NI elements forward, 5NI backward."""
    torch.manual_seed(0)
    gate, up, dy = (torch.randn(size.rows, size.inner, device=device).to(dtype) for _ in range(3))
    return Case(
        "swiglu", f"{size.name} N={size.rows:,} I={size.inner:,} {short(dtype)}", dict(gate=gate, up=up),
        lambda gate, up: dict(y=reference_swiglu(gate, up)), lambda gate, up: dict(y=swiglu(gate, up)),
        wrt=("gate", "up"), upstream=dict(y=dy), **byte_work(device, forward=3 * gate.nbytes, both=8 * gate.nbytes),
    )  # fmt: skip


def make_decode_attention(size: Size, dtype: torch.dtype, device: str, n: int = 1) -> Case:
    """One new query for each of R candidates, which all see S tokens: every slot's key and value once.

    With n candidates a row, the first 7/8 of those tokens are a prompt that all n share. Masks and `Rows` are not in
    anybody's time: a model makes them once for all its layers.
    """
    torch.manual_seed(0)
    B = max(1, size.R // n)
    own = size.S // 8 if n > 1 else 0
    prompt, slots = size.S - own, size.S + (n - 1) * own
    q = torch.randn(B * n, size.H, size.Dh, device=device).to(dtype)
    keys, values = (torch.randn(B, size.Hkv, slots, size.Dh, device=device).to(dtype) for _ in range(2))
    place = torch.arange(B * n, device=device)
    rows = Rows(*(torch.full((B,), x, device=device) for x in (prompt, slots)), place.view(B, n), place)
    slot = torch.arange(slots, device=device)
    sees = (slot < prompt) | ((slot - prompt) % n == torch.arange(n, device=device)[:, None])  # (n, slots)

    def eager(q: Tensor, keys: Tensor, values: Tensor) -> Result:
        x = q.view(B, n, size.H, size.Dh).transpose(1, 2)
        o = F.scaled_dot_product_attention(x, keys, values, sees, enable_gqa=True)
        return dict(o=o.transpose(1, 2).reshape(q.shape))

    def ours(q: Tensor, keys: Tensor, values: Tensor) -> Result:
        return dict(o=decode_attention(q, keys, values, rows))

    shape = f"{size.name} R={B * n} S={size.S:,}{f' n={n}' if n > 1 else ''} H={size.H}/{size.Hkv} Dh={size.Dh}"
    return Case(
        "decode_attention_shared" if n > 1 else "decode_attention", f"{shape} {short(dtype)}",
        dict(q=q, keys=keys, values=values), eager, ours,
        **byte_work(device, forward=keys.nbytes + values.nbytes + 2 * q.nbytes),
    )  # fmt: skip


KERNELS: dict[str, tuple[Callable[..., Case], tuple[str, ...]]] = {  # what makes the case, and the directions
    "linear_logprob": (make_linear_logprob, (FORWARD, BOTH)),
    "linear_kl": (make_linear_kl, (FORWARD, BOTH)),
    "ppo_head": (make_ppo_head, (BOTH,)),
    "ppo_head_exact": (functools.partial(make_ppo_head, exact=True), (BOTH,)),
    "rmsnorm": (make_rmsnorm, (FORWARD, BOTH)),
    "rope": (make_rope, (FORWARD, BOTH)),
    "swiglu": (make_swiglu, (FORWARD, BOTH)),
    "decode_attention": (make_decode_attention, (FORWARD,)),
    "decode_attention_shared": (functools.partial(make_decode_attention, n=4), (FORWARD,)),
    "sample_head": (make_sample_head, (FORWARD,)),
}
