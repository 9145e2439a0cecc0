"""A Hugging Face checkpoint's weights in and out: safetensors, one file or numbered shards (`folder.py`); GGUF in.

    load_policy, load_critic, load_value_head      build a model and fill it, without ever holding two sets of weights
    save_pretrained                                write config.json and weights, for `transformers`, vLLM and ourselves

Nothing is unpickled. What is amiss with a checkpoint is a one-line ValueError that names the file and the tensor.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from learners.folder import CONFIG, INDEX, resolve_checkpoint, weight_files
from model import Critic, Qwen2Config, Qwen2ForCausalLM, ValueHead
from untrusted import gguf_file
from untrusted.files import refuse_pointer
from untrusted.plain_text import shorten

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
QUANTISED_DTYPES = (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2)
HARMLESS = re.compile(r"(.*\.)?rotary_emb\.inv_freq")  # some savers wrote what rope_theta says already
# Names by which bitsandbytes, GPTQ, AWQ, fp8, compressed-tensors and MLX store what restores the weights.
QUANTISED = re.compile(
    r".*\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*|SCB|weight_format|qweight|qzeros|scales|biases"
    r"|g_idx|weight_scale(_inv|_2)?|input_scale|k_scale|v_scale|weight_packed|weight_zero_point|weight_shape)"
)


def stored_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Give each tensor of a safetensors file, as a view of the file that holds until the next one is asked for.

    The file is opened anew for each: what was read through one mapping stays in memory until that is closed, and would
    double the peak. What a GGUF file holds is restored in fp32.
    """
    if file.suffix != ".safetensors":
        yield from ((name, torch.from_numpy(array)) for name, array in gguf_file.read_tensors(file))
        return
    with safe_open(file, "pt") as opened:
        names = list(opened.keys())
    for name in names:
        with safe_open(file, "pt") as opened:
            tensor = opened.get_tensor(name)
        yield name, tensor
        del tensor


def read_tensors(file: Path, shapes: dict[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
    """Give each tensor of a file as `stored_tensors` does.

    Raises ValueError for a tensor that `shapes` lacks, of another shape, or not floats.
    """
    try:
        with file.open("rb") as opened:
            refuse_pointer(file, opened.read(64))
        for name, tensor in stored_tensors(file):
            if not HARMLESS.fullmatch(name):
                check_tensor(name, tensor, shapes, file)
                yield name, tensor
            del tensor
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a whole safetensors file: {shorten(str(error), 200)}") from None


def check_tensor(name: str, tensor: Tensor, shapes: dict[str, torch.Size], file: Path) -> None:
    """Raise ValueError, which names tensor and file, unless a tensor is one of these shapes' and floats."""
    shown = shorten(name, 200)
    if QUANTISED.fullmatch(name) or name in shapes and tensor.dtype in QUANTISED_DTYPES:
        raise ValueError(
            f"{file}: tensor {shown} ({tensor.dtype}) belongs to quantised weights; only float32, bfloat16 and float16"
            " are read: give the model it was made from, or dequantise it"
        )
    if name not in shapes:
        raise ValueError(f"{file}: tensor {shown} is not part of the model")
    if tensor.shape != shapes[name]:
        raise ValueError(f"{file}: {shown} has shape {list(tensor.shape)}, not {list(shapes[name])}")
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{file}: {shown} is {tensor.dtype}, not float32, bfloat16 or float16")


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
    # On Hopper SDPA prefers cuDNN, which plans for each new shape, up to 400 ms; every rollout has thousands of them.
    torch.backends.cuda.enable_cudnn_sdp(False)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    allowed = dict(shapes)
    if isinstance(model, Qwen2ForCausalLM):
        allowed[HEAD] = shapes[EMBEDDING]  # some tools write a tied matrix twice, or under this name alone
    files = weight_files(folder)
    weights: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in read_tensors(file, allowed):
            if name in weights:
                raise ValueError(f"{file}: {name} is also in another file")
            # A copy: what the file's reader gives is a view of the file, which a later save may replace.
            weights[name] = part(tensor).to(device, dtype, copy=True)
            if weights[name].numel() and not all(map(math.isfinite, weights[name].aminmax())):  # isfinite makes a mask
                raise ValueError(f"{file}: {name} holds NaN or infinity: the file is damaged, or training diverged")
            del tensor
    share_head(weights, shapes, files)
    for name in shapes:
        if name not in weights:
            raise ValueError(f"{files[0] if len(files) == 1 else folder / INDEX}: tensor {name} is missing")
    if HEAD not in shapes and HEAD in weights and not torch.equal(weights.pop(HEAD), weights[EMBEDDING]):
        raise ValueError(f"{folder}: {HEAD} differs from {EMBEDDING}, but config.json ties them")
    return weights


def share_head(weights: dict[str, Tensor], shapes: dict[str, torch.Size], files: list[Path]) -> None:
    """Let embedding or head serve as the other, in place, where one is stored for both.

    That is so where config.json ties them, and where a file's metadata notes under which name the other one is kept.
    """
    for absent, stored in ((EMBEDDING, HEAD), (HEAD, EMBEDDING)):
        if absent in shapes and absent not in weights and stored in weights:
            if stored not in shapes:
                weights[absent] = weights.pop(stored)
            elif any(aliases(file).get(absent) == stored for file in files):
                weights[absent] = weights[stored].clone()


def aliases(file: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file: its savers note shared tensors there, as absent name → stored name."""
    if file.suffix != ".safetensors":
        return {}
    with safe_open(file, "pt") as opened:
        return opened.metadata() or {}


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
    """Load a Qwen-2.5 or Llama checkpoint from a folder or the hub; a one-line ValueError if anything is amiss."""
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
    # Parts of a storage (`model.join_products`) are copied: safetensors refuses them. What was on a GPU is a copy now.
    weights = {k: v if v.nbytes == v.untyped_storage().nbytes() else v.clone() for k, v in weights.items()}
    save_config(model, folder, next(iter(weights.values())).dtype)
    save_torch_state_dict(weights, folder, max_shard_size=int(max_shard_bytes))


def save_config(model: Qwen2ForCausalLM | Critic | ValueHead, folder: str | Path, dtype: torch.dtype) -> None:
    """Write the config.json of a model whose weights are saved in `dtype`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    name = next(kind.__name__ for kind in (Qwen2ForCausalLM, Critic, ValueHead) if isinstance(model, kind))
    name = name.replace("Qwen2", model.config.model_type.capitalize())
    config = {"architectures": [name], "torch_dtype": str(dtype).removeprefix("torch."), **model.config.to_dict()}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
