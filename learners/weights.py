"""Hugging Face checkpoints in and out: a folder or a hub id, safetensors only, one file or numbered shards.

    load_policy, load_critic, load_value_head      build a model and fill it, without ever holding two sets of weights
    save_pretrained                                write config.json and weights, for `transformers`, vLLM and ourselves

Nothing is unpickled. What is amiss with a checkpoint is a one-line ValueError that names the file and the tensor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from model import Critic, Qwen2Config, Qwen2ForCausalLM, ValueHead

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".distcp", ".metadata")  # the last two: torch's distributed checkpoints


def resolve_checkpoint(path_or_hub_id: str | Path) -> Path:
    """Give a checkpoint's folder: a local one as it is, or a hub id's `*.json` and `*.safetensors` after fetching them.

    Raises ValueError for what is neither, or cannot be fetched (offline, unknown, gated).
    """
    if Path(path_or_hub_id).is_dir():
        return Path(path_or_hub_id)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path_or_hub_id)):
        raise ValueError(f"--ckpt {path_or_hub_id}: no such folder, and not a hub id of the form owner/name")
    try:
        return Path(snapshot_download(str(path_or_hub_id), allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, ValueError) as error:  # the hub client's own errors are of these two kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"--ckpt {path_or_hub_id}: no such folder, and not fetched from the hub ({reason}); "
            f"give a folder with config.json and {SINGLE}"
        ) from None


def weight_files(folder: Path) -> list[Path]:
    """List a checkpoint's safetensors files; raise ValueError when there are none or a shard is absent."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        pickles = sorted(file.name for file in folder.iterdir() if (file.suffix or file.name) in PICKLES)
        hint = f"; {pickles[0]} is a pickle, which is never read: convert it to safetensors" if pickles else ""
        raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}{hint}")
    try:
        weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = [folder / name for name in sorted(set(weight_map.values()))]
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f"{folder / INDEX} is not an index of safetensors files") from None
    for file in files:
        if not file.is_file():
            raise ValueError(f"{folder / INDEX} names {file.name}, which is not there")
    return files


def stored_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Give each tensor of a safetensors file, as a view of the file that holds until the next one is asked for.

    The file is opened anew for each: what was read through one mapping stays in memory until that is closed, and would
    double the peak.
    """
    with safe_open(file, "pt") as opened:
        names = list(opened.keys())
    for name in names:
        with safe_open(file, "pt") as opened:
            tensor = opened.get_tensor(name)
        yield name, tensor
        del tensor


def read_tensors(file: Path, shapes: dict[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
    """Give each tensor of a safetensors file, as a view of the file that holds until the next one is asked for.

    Raises ValueError for a tensor that `shapes` lacks, of another shape, or not floats.
    """
    try:
        for name, tensor in stored_tensors(file):
            if name not in shapes:
                raise ValueError(f"{file}: tensor {name} is not part of the model")
            if tensor.shape != shapes[name]:
                raise ValueError(f"{file}: {name} has shape {list(tensor.shape)}, not {list(shapes[name])}")
            if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise ValueError(f"{file}: {name} is {tensor.dtype}, not float32, bfloat16 or float16")
            yield name, tensor
            del tensor
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from None


def load_weights(model: nn.Module, folder: Path, dtype: torch.dtype, device: str | torch.device) -> None:
    """Fill a model built on the meta device from a folder's safetensors; raise ValueError naming tensor and file."""
    model.load_state_dict(read_weights(model, folder, dtype, device), assign=True)


def read_weights(
    model: nn.Module,
    folder: Path,
    dtype: torch.dtype,
    device: str | torch.device,
    part: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> dict[str, Tensor]:
    """Read a model's weights by name, or the `part` of each that is wanted; raise ValueError naming tensor and file."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    allowed = dict(shapes)
    if isinstance(model, Qwen2ForCausalLM):
        allowed[head] = shapes[embedding]  # some tools write a tied matrix twice
    files = weight_files(folder)
    weights: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in read_tensors(file, allowed):
            if name in weights:
                raise ValueError(f"{file}: {name} is also in another file")
            # A copy: what the file's reader gives is a view of the file, which a later save may replace.
            weights[name] = part(tensor).to(device, dtype, copy=True)
            del tensor
    for name in shapes:
        if name not in weights:
            raise ValueError(f"{files[0] if len(files) == 1 else folder / INDEX}: tensor {name} is missing")
    if head not in shapes and head in weights and not torch.equal(weights.pop(head), weights[embedding]):
        raise ValueError(f"{folder}: {head} differs from {embedding}, but config.json ties them")
    return weights


def load_model(kind: type[nn.Module], path_or_hub_id: str | Path, dtype: torch.dtype, device: str | torch.device):
    """Build a model of this kind from a checkpoint, without ever holding two sets of weights."""
    folder = resolve_checkpoint(path_or_hub_id)
    config = Qwen2Config.from_file(folder)
    with torch.device("meta"):  # shapes only
        model = kind(config)
    load_weights(model, folder, dtype, device)
    return model


def load_policy(
    path_or_hub_id: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Qwen2ForCausalLM:
    """Load a Qwen-2.5 checkpoint from a folder or the hub; raise a one-line ValueError if anything is amiss."""
    return load_model(Qwen2ForCausalLM, path_or_hub_id, dtype, device)


def load_critic(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Critic:
    """Load a critic that `save_pretrained` wrote; ValueError for a policy's folder (see `Critic.from_policy`)."""
    return load_model(Critic, path, dtype, device)


def load_value_head(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> ValueHead:
    """Load a value head that `save_pretrained` wrote; ValueError for the folder of a policy or a whole critic."""
    return load_model(ValueHead, path, dtype, device)


def save_pretrained(
    model: Qwen2ForCausalLM | Critic | ValueHead,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: float = 5e9,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write config.json and the weights, cast to dtype (None: as they are), in place of the weights the folder had.

    One model.safetensors, or, above max_shard_bytes, numbered shards and model.safetensors.index.json. `weights` are
    written in place of the model's own: the fp32 masters of one that computes in bf16.
    """
    weights = {k: v.detach().to("cpu", dtype) for k, v in (weights or model.state_dict()).items()}
    save_config(model, folder, next(iter(weights.values())).dtype)
    save_torch_state_dict(weights, folder, max_shard_size=int(max_shard_bytes))


def save_config(model: Qwen2ForCausalLM | Critic | ValueHead, folder: str | Path, dtype: torch.dtype) -> None:
    """Write the config.json of a model whose weights are saved in `dtype`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kind = next(kind for kind in (Qwen2ForCausalLM, Critic, ValueHead) if isinstance(model, kind))
    precision = str(dtype).removeprefix("torch.")
    config = {"architectures": [kind.__name__], "torch_dtype": precision, **model.config.to_dict()}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
