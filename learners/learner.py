"""A model with its optimizer: fp32 master weights, AdamW, and its moments in and out of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from config import Config
from learners import sharding
from learners.weights import stored_tensors


@dataclass
class Learner:
    """A model and the optimizer of its fp32 master weights, from which the model's own are rounded after each step.

    A step of 1e-6 is lost in a bf16 weight of 0.05, whose neighbours are 2e-4 away; in its master it adds up.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    peak_lr: float
    masters: dict[str, Tensor]  # fp32 weights by name; the parameters themselves if the model is fp32 or sharded
    sampled: nn.Module  # the model that samples: `model` itself or, if it is sharded, a whole copy of it


def make_learner(model: nn.Module, lr: float, config: Config, dtype: torch.dtype = torch.float32) -> Learner:
    """Wrap a model, whose trained parameters are fp32, with their AdamW (fp32, no weight decay).

    It computes in `dtype` from here on. What it has that needs no gradient, as the base of adapters, stays as it is.
    """
    masters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if dtype != torch.float32:
        masters = {name: nn.Parameter(parameter.detach().float()) for name, parameter in masters.items()}
        model.to(dtype)
        for parameter, master in zip(trained_parameters(model), masters.values(), strict=True):
            hand_gradients_to(master, parameter)
    optimizer = torch.optim.AdamW(
        masters.values(), lr=lr, betas=(config.adam_beta1, config.adam_beta2), weight_decay=0.0, fused=True
    )
    return Learner(model, optimizer, lr, masters, sampled=model)


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """List the parameters that have gradients: all, or adapters and value head on a frozen base."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def hand_gradients_to(master: Tensor, parameter: nn.Parameter) -> None:
    """Add each gradient of a bf16 parameter to its master's, in fp32 and while the backward runs, and free it."""

    def add(parameter: Tensor) -> None:
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad += parameter.grad
        parameter.grad = None

    parameter.register_post_accumulate_grad_hook(add)


def is_sharded(learner: Learner) -> bool:
    """Say whether every process holds only its rows of the model; a value head is never sharded."""
    return any(isinstance(master, DTensor) for master in learner.masters.values())


def optimizer_tensors(learner: Learner) -> dict[str, Tensor]:
    """Return AdamW's moments and step counts by parameter name: tensors only, so that they fit safetensors."""
    names = {master: name for name, master in learner.masters.items()}
    return {
        f"{names[p]}|{key}": torch.atleast_1d(value).contiguous()  # shards of a number are written as 0 in torch 2.13
        for p, moments in learner.optimizer.state.items()
        for key, value in moments.items()
    }


def load_optimizer(learner: Learner, path: Path) -> None:
    """Restore what `optimizer_tensors` returned; of a sharded model the own rows."""
    for key, value in stored_tensors(path):
        name, _, moment = key.rpartition("|")
        master = learner.masters[name]
        if moment == "step":
            value = value.reshape(()).to(master.device, copy=True)
        elif isinstance(master, DTensor):
            value = sharding.spread(value, master.device_mesh)
        else:
            value = value.to(master.device, copy=True)
        learner.optimizer.state[master][moment] = value
