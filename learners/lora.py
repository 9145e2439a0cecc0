"""LoRA by hand: one frozen model, and beside each of its linear layers two small matrices, which alone are trained.

    y = W x + b + (α / r) · B (A x)        A (r, in), B (out, r)        (arXiv 2106.09685, eq. 3)

B begins as 0, so the first step starts from the base. W is held **once**: policy, critic and reference are trees of
modules over the same frozen parameters.

    reference   the base itself                      policy   the base, and an adapter
    critic      the base, another adapter, and a value head

W + (α / r) B A is never formed while a run lasts. In bf16 most of a small B A would fall between W's neighbours, and
what is merged and taken out again does not come back. Here B A x is computed beside W x, and added to it inside the
second product (`addmm`), whose sums are fp32.

Why α / r and not the rank-stabilised α / √r: AdamW moves each number of B by about the learning rate, whatever its
gradient, and the first steps of the r parts of B A point the same way. So B A grows as r, and α / r makes a learning
rate good for any rank. Besides, every program that reads adapters knows α / r. Give α · √r for the other one.

The base computes in the dtype of products and so do A and B, as rounded copies of fp32 masters (`learner.py`): their
own rounding is .4 % of the difference to the base, not of the weight.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from model import Critic, Qwen2ForCausalLM, draw_value_head


class LoraLinear(nn.Module):
    """A frozen linear layer, shared with other models, and its adapter. Parameter names are peft's."""

    def __init__(self, base_layer: nn.Linear, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        self.base_layer, self.rank, self.alpha = base_layer, rank, alpha
        (width_out, width_in), device = base_layer.weight.shape, base_layer.weight.device
        bound = width_in**-0.5  # uniform in ± this, as peft draws it: A x is smaller than x by √3 on average
        A = torch.empty(rank, width_in).uniform_(-bound, bound, generator=generator)  # on a CPU: alike on all devices
        self.lora_A = matrix(A.to(device))
        self.lora_B = matrix(torch.zeros(width_out, rank, device=device))

    @property
    def scale(self) -> float:
        """Return the factor of B A x."""
        return self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out) for x (..., in)."""
        rows = x.flatten(0, -2)
        # In place: what a linear layer returns is not kept for its backward, and one tensor (rows, out) is saved.
        y = self.base_layer(rows).addmm_(self.lora_A(rows), self.lora_B.weight.T, alpha=self.scale)
        return y.view(*x.shape[:-1], -1)


def matrix(weight: Tensor) -> nn.Linear:
    """Return a linear layer without bias that has this weight."""
    linear = nn.Linear(*weight.shape[::-1], bias=False, device="meta")  # no draw from the global generator
    linear.weight = nn.Parameter(weight)
    return linear


def with_adapter(base: Qwen2ForCausalLM, rank: int, alpha: float, seed: int) -> Qwen2ForCausalLM:
    """Freeze a model, and return another over the same parameters that has adapters of its own in all linear layers.

    Embedding and head get none. Adapters are fp32, and the same seed gives the same ones.
    """
    base.requires_grad_(False)
    shared = {id(module): module for module in base.modules() if not list(module.children())}
    twin = copy.deepcopy(base, shared)  # new modules down to those that hold parameters, which stay as they are
    generator = torch.Generator().manual_seed(seed)
    for name, module in list(twin.model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            twin.model.layers.set_submodule(name, LoraLinear(module, rank, alpha, generator))
    return twin


def critic_with_adapter(base: Qwen2ForCausalLM, rank: int, alpha: float, seed: int) -> Critic:
    """Return a critic over a model's frozen parameters: adapters of its own, and a new random value head."""
    with torch.device("meta"):
        critic = Critic(base.config)
    critic.model = with_adapter(base, rank, alpha, seed + 1).model  # not the policy's A
    critic.value_head.weight = nn.Parameter(draw_value_head(base, seed).float())
    return critic


def adapters(model: nn.Module) -> dict[str, LoraLinear]:
    """Return a model's layers that have adapters, by name; {} for one without."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


@torch.no_grad()
def merge(policy: Qwen2ForCausalLM) -> None:
    """Add the adapters to the weights of the base that they share: once, in fp32, for a file. It is no base any more.

    Raises ValueError for a base in half precision, whose grid would swallow part of them.
    """
    for name, layer in adapters(policy).items():
        weight = layer.base_layer.weight
        if weight.dtype == torch.bfloat16 or weight.dtype == torch.float16:
            raise ValueError(f"{name} is {weight.dtype}; adapters are added in fp32")
        weight.addmm_(layer.lora_B.weight, layer.lora_A.weight, alpha=layer.scale)
