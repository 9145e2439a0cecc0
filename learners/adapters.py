"""Adapters in files: a folder in the layout of peft, which vLLM and others read too.

    adapter_model.safetensors   A and B of each linear layer in fp32, and a critic's value head; nothing of the base
    adapter_config.json         rank, α and the layers' names; the base's name is text for the reader, never followed
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors.torch import save_file
from torch import nn

from config import Positive
from learners.folder import ADAPTER, ADAPTER_WEIGHTS, inside
from learners.learner import Learner
from learners.lora import adapters, with_adapter
from learners.weights import read_tensors, save_pretrained
from model import Qwen2ForCausalLM
from untrusted.files import check_value, read_json
from untrusted.plain_text import shorten

PREFIX = "base_model.model."  # peft's, before each parameter's name
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# What peft may write of adapters that compute something else, and the values under which they do not.
IMPLEMENTED: dict[str, tuple] = {
    "peft_type": ("LORA",), "bias": ("none",), "use_dora": (False,), "lora_bias": (False,), "fan_in_fan_out": (False,),
    "rank_pattern": ({},), "alpha_pattern": ({},), "layers_to_transform": (), "layer_replication": (),
    "init_lora_weights": (True, False, "gaussian"),  # the others change the base
    "exclude_modules": (), "trainable_token_indices": (), "target_parameters": ([],), "use_qalora": (False,),
    **dict.fromkeys(("alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config"), ()),
}  # fmt: skip


def adapter_settings(folder: Path) -> dict[str, Any]:
    """Return the rank and α of an adapter, by the names of our settings; ValueError if it is none that is implemented.

    A rank-stabilised one has the factor α / √r, which is α √r / r.
    """
    found = read_settings(folder)
    rank, alpha = found["r"], found["lora_alpha"]
    return {"lora_rank": rank, "lora_alpha": alpha * rank**0.5 if found.get("use_rslora") else alpha}


def read_settings(folder: Path) -> dict[str, Any]:
    """Return what a folder's adapter_config.json holds; ValueError for what is not implemented."""
    file = folder / ADAPTER
    if not (file.is_file() and (folder / ADAPTER_WEIGHTS).is_file()):
        raise ValueError(f"{folder} is no adapter: it needs {ADAPTER} and {ADAPTER_WEIGHTS}")
    found = read_json(inside(folder, ADAPTER))
    for name, values in IMPLEMENTED.items():
        if found.get(name) is not None and found[name] not in values:
            wanted = " or ".join(map(repr, values)) or "none"
            raise ValueError(f"{file}: {name} is {shorten(repr(found[name]))}; only {wanted} is implemented")
    needed = {"r": Annotated[int, (1, 4096)], "lora_alpha": Positive, "target_modules": list[str]}
    for name, hint in (needed | {"use_rslora": bool | None, "modules_to_save": list[str] | None}).items():
        check_value(found.get(name), hint, f"{file}, {name!r}")
    if others := [name for name in found["target_modules"] if name not in LAYERS]:
        raise ValueError(f"{file}: target_modules names {shorten(repr(others[0]))}; only {', '.join(LAYERS)} have one")
    return found


@torch.no_grad()
def load_adapter(model: nn.Module, folder: Path) -> None:
    """Fill a model's adapters, and a critic's value head, from a folder; layers that it leaves out stay as they are.

    Raises ValueError that names the file and the tensor if one is missing, foreign, of another shape or not finite.
    """
    found, file = read_settings(folder), inside(folder, ADAPTER_WEIGHTS)
    wanted = {PREFIX + name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = {*found["target_modules"], *(found.get("modules_to_save") or ())}
    missing = {name for name in wanted if expected & set(name.split("."))}
    for name, tensor in read_tensors(file, {name: parameter.shape for name, parameter in wanted.items()}):
        if tensor.numel() and not all(map(math.isfinite, tensor.aminmax())):
            raise ValueError(f"{file}: {name} holds NaN or infinity: the file is damaged, or training diverged")
        wanted[name].copy_(tensor)
        missing.discard(name)
    if missing:
        raise ValueError(f"{file}: tensor {min(missing)} is missing")


def with_saved_adapter(base: Qwen2ForCausalLM, folder: Path) -> Qwen2ForCausalLM:
    """Return a model over a base's parameters with the adapter of a folder, frozen and in the base's dtype."""
    found = adapter_settings(folder)
    policy = with_adapter(base, found["lora_rank"], found["lora_alpha"], seed=0)
    load_adapter(policy, folder)
    return policy.to(base.head_weight.dtype).requires_grad_(False)


def save_adapter(learner: Learner, folder: Path, base: str) -> None:
    """Write a learner's adapters, and a critic's value head, in place of those that the folder had."""
    folder.mkdir(parents=True, exist_ok=True)
    layer = next(iter(adapters(learner.model).values()))
    alpha = int(layer.alpha) if layer.alpha == int(layer.alpha) else layer.alpha  # other readers want whole numbers
    others = {name.split(".")[-2] for name in learner.masters if ".lora_" not in name}
    config = {
        "peft_type": "LORA", "task_type": None if others else "CAUSAL_LM", "base_model_name_or_path": base,
        "r": layer.rank, "lora_alpha": alpha, "use_rslora": False, "lora_dropout": 0.0, "bias": "none",
        "target_modules": [*LAYERS], "modules_to_save": sorted(others) or None, "inference_mode": True,
    }  # fmt: skip
    tensors = {PREFIX + name: master.detach().cpu().contiguous() for name, master in learner.masters.items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, {"format": "pt"})
    (folder / ADAPTER).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def save_learned(learner: Learner, folder: Path, base: str) -> None:
    """Write what has been learned on a base: adapters where there are some, else whole fp32 weights."""
    if adapters(learner.model):
        save_adapter(learner, folder, base)
    else:
        save_pretrained(learner.model, folder, weights=learner.masters)
