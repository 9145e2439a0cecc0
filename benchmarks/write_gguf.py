"""Write a Hugging Face folder as a GGUF file, as llama.cpp's converter does: for the tests and the fuzzer.

It needs the `gguf` package, an extra (requirements-dev.txt).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from untrusted.gguf_file import FIELDS, LAYER_NAMES, NAMES

METHODS = {str: "add_string", bool: "add_bool", int: "add_uint32", float: "add_float32", list: "add_array"}


def write_gguf(
    folder: Path,
    path: Path,
    quantise: str = "F32",
    edit: Callable[[dict[str, np.ndarray]], Any] = lambda tensors: None,
    **changes: Any,
) -> Path:
    """Write config, tokenizer and weights of a folder; returns the file.

    Args:
        quantise: the matrices' type, a name of gguf.GGMLQuantizationType.
        edit: changes the tensors by their GGUF names, in place, before they are written.
        changes: metadata to replace, add or (None) leave out; `__` in a key stands for a dot, `own__` for the
            architecture's name.
    """
    import gguf

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    family = config["model_type"]
    stored = (item for file in sorted(folder.glob("*.safetensors")) for item in load_file(file).items())
    tensors = {gguf_name(name): tensor.float().numpy() for name, tensor in stored}
    if family == "llama":
        for name, array in tensors.items():
            if (part := name.split(".")[-2]) in ("attn_q", "attn_k"):
                tensors[name] = permute(array, config[f"num_{'key_value' if part == 'attn_k' else 'attention'}_heads"])
    edit(tensors)
    given = {f"{family}.{key}": config[name] for name, key in FIELDS.items()} | vocabulary(folder)
    given |= {key.replace("own__", f"{family}__").replace("__", "."): value for key, value in changes.items()}
    writer = gguf.GGUFWriter(path, given.pop("general.architecture", family))
    for key, value in given.items():
        if value is not None:
            getattr(writer, METHODS[type(value)])(key, value)
    for name, array in tensors.items():
        kind = gguf.GGMLQuantizationType[quantise if array.ndim == 2 else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return path


def gguf_name(name: str) -> str:
    """Return a tensor's name in GGUF.

    >>> gguf_name("model.layers.3.self_attn.q_proj.bias"), gguf_name("model.norm.weight")
    ('blk.3.attn_q.bias', 'output_norm.weight')
    """
    whole, _, ending = name.rpartition(".")
    if whole.startswith("model.layers."):
        number, _, part = whole.removeprefix("model.layers.").partition(".")
        return f"blk.{number}.{next(key for key, value in LAYER_NAMES.items() if value == part)}.{ending}"
    return f"{next(key for key, value in NAMES.items() if value == whole)}.{ending}"


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of q or k so that those which turn together are neighbours."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def vocabulary(folder: Path) -> dict[str, Any]:
    """Return what GGUF tells of a folder's tokenizer, whose split is Qwen-2.5's."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    added = {token["id"]: token for token in content["added_tokens"]}
    ids = {id: text for text, id in content["model"]["vocab"].items()} | {id: t["content"] for id, t in added.items()}
    types = [(3 if added[i]["special"] else 4) if i in added else 1 if i in ids else 5 for i in range(max(ids) + 1)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [ids.get(i, f"[PAD{i}]") for i in range(max(ids) + 1)],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": next(id for id, text in ids.items() if text == "<|im_end|>"),
    }
