"""Weights, gradients and moments shared out over the processes (FSDP2), for models that do not fit one device.

    load      build a model of which every process reads and keeps its own rows of each parameter only
    refresh   write the whole weights into a copy in the dtype of products, which samples by itself
    save      write plain safetensors from everybody's rows
    shard_base, gathered   with adapters: cut the frozen base, and gather it for a rollout

Each decoder layer is a group of parameters, and the rest, embedding, last norm and head, one more: the root. A group is
gathered just before it computes, in the dtype of products; its gradients are summed over the processes in fp32 and cut
into rows again as soon as they exist. So every forward and every backward of a sharded model is a conversation of all
processes: they must run equally many, in one order (`train_rlpa.make_batches` sees to that).

Shards are rows: parameter (R, ...) is cut as by `torch.chunk` along its first axis; some processes may hold none.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from learners.folder import INDEX, SINGLE, resolve_checkpoint
from learners.processes import collective, rank, world_size
from learners.weights import read_weights
from model import Critic, Qwen2Config, Qwen2ForCausalLM


def make_mesh() -> DeviceMesh:
    """Make the row of all processes that parameters are cut along; all of them must call it."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    return init_device_mesh(kind, (world_size(),))


def shard(model: Qwen2ForCausalLM | Critic, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Cut a model's parameters into rows, in place; it computes in `dtype`, and sums gradients in fp32."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*model.model.layers, model):
        # The root stays whole from its forward until its backward is through: in between the loss reads the head.
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=module is not model)
        module.set_gradient_divide_factor(1.0)  # sums, not means: losses are divided by global counts already
        module.set_force_sum_reduction_for_comms(True)  # else a factor needs NCCL, which gloo is not


def shard_base(base: Qwen2ForCausalLM, mesh: DeviceMesh) -> Qwen2ForCausalLM:
    """Cut the layers of a frozen model, which adapters are put on, into rows, in place; they have no gradients.

    Each linear layer is a group of its own, because several trees of modules share it and nothing larger. Embedding,
    norms and head stay whole, since losses read the head's weight.
    """
    for module in base.model.layers.modules():
        if isinstance(module, nn.Linear):
            fully_shard(module, mesh=mesh)
    return base


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Hold the layers that `shard_base` has cut whole for a while, in which a process may sample by itself.

    Every process must enter and leave; without such layers nothing happens.
    """
    layers = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for layer in layers:
        layer.set_reshard_after_forward(False)
        layer.unshard()
    yield
    for layer in layers:  # not after an error: it ends the run on all processes
        layer.set_reshard_after_forward(True)
        layer.reshard()


def load(
    kind: type[Qwen2ForCausalLM | Critic],
    path_or_hub_id: str | Path,
    mesh: DeviceMesh,
    *,
    dtype: torch.dtype,
    stored: torch.dtype = torch.float32,
) -> Qwen2ForCausalLM | Critic:
    """Build a sharded model from a checkpoint, one tensor at a time; its rows are `stored`, its products in `dtype`.

    Nobody is talked to. Raises ValueError as `weights.load_policy` does.
    """
    folder = resolve_checkpoint(path_or_hub_id)
    with torch.device("meta"):
        model = kind(Qwen2Config.from_file(folder))
    shard(model, mesh, dtype)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    rows = read_weights(model, folder, stored, mesh.device_type, lambda tensor: rows_of(tensor, mesh))
    adopt(model, {name: joined(rows[name], shape, mesh) for name, shape in shapes.items()})
    return model


def critic_from_policy(policy: Qwen2ForCausalLM, value_head: Tensor, mesh: DeviceMesh, dtype: torch.dtype) -> Critic:
    """Build a sharded critic: a copy of the rows of a sharded policy's trunk, and a value head (1, D)."""
    with torch.device("meta"):
        critic = Critic(policy.config)
    shard(critic, mesh, dtype)
    weights = {f"model.{name}": tensor.detach().clone() for name, tensor in policy.model.state_dict().items()}
    adopt(critic, weights | {"value_head.weight": spread(value_head.detach(), mesh)})
    return critic


def adopt(model: nn.Module, weights: dict[str, DTensor]) -> None:
    """Give a sharded model its weights."""
    model.load_state_dict(weights, assign=True)


def rows_of(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """Give the rows of a whole tensor that this process keeps, as a view."""
    parts, number = tensor.chunk(mesh.size()), mesh.get_local_rank()
    return parts[number] if number < len(parts) else tensor[:0]


def joined(rows: Tensor, shape: torch.Size, mesh: DeviceMesh) -> DTensor:
    """Give the tensor of this shape of which every process holds its rows."""
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def spread(tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    """Cut a tensor that every process holds as a whole; each keeps a copy of its rows."""
    rows = rows_of(tensor, mesh).to(mesh.device_type, copy=True)
    return joined(rows, tensor.shape, mesh)


@torch.no_grad()
def refresh(replica: nn.Module, masters: dict[str, DTensor]) -> None:
    """Write the whole weights into a replica, gathered one by one in its dtype: every process must call it."""
    with collective():
        for name, parameter in replica.named_parameters():
            parameter.copy_(masters[name].detach().to(parameter.dtype).full_tensor())


def save(tensors: dict[str, Tensor], folder: Path, max_file_bytes: float = 5e9) -> None:
    """Write tensors, whole or sharded, as one model.safetensors, or as numbered ones with an index; all must call it.

    Every process writes its rows into `folder`/sharded, which rank 0 puts together and removes: a disk that all share.
    Raises OSError if somebody cannot write.
    """
    writer = HuggingFaceStorageWriter(
        str(folder), file_numbers(tensors, max_file_bytes), save_distributed=True, enable_consolidation=True
    )
    try:
        with collective():
            dcp.save(tensors, storage_writer=writer)
    except dcp.api.CheckpointException as error:
        failure = next(iter(error.failures.values()))[0]
        raise OSError(getattr(failure, "errno", None), getattr(failure, "strerror", None) or str(failure)) from error
    if rank() == 0:
        shutil.rmtree(folder / "sharded")
        if len(files := list(folder.glob("*.safetensors"))) == 1:
            files[0].rename(folder / SINGLE)
            (folder / INDEX).unlink()


def file_numbers(tensors: dict[str, Tensor], most: float) -> dict[str, int]:
    """Share tensors out over files, from 1, in their order; a file takes up to `most` bytes, or one larger tensor.

    >>> file_numbers({"a": torch.zeros(2), "b": torch.zeros(1), "c": torch.zeros(3)}, most=12)
    {'a': 1, 'b': 1, 'c': 2}
    """
    numbers, number, size = {}, 1, 0
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * tensor.itemsize
        if size and size + nbytes > most:
            number, size = number + 1, 0
        numbers[name], size = number, size + nbytes
    return numbers
