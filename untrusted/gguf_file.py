"""A GGUF file, as llama.cpp keeps a model, read as the Hugging Face folder that it was made from.

    read_part      one of a checkpoint's small files: of a folder as it is, of a GGUF as its metadata tell it
    parts          all of them
    read_tensors   the weights one by one, in fp32, under their Hugging Face names

The format: magic, version, numbers of tensors and of metadata; the metadata as key, type and value; each tensor's name,
shape, type and place; the tensors. The `gguf` package, an extra, restores what is quantised. The header is read here: a
stranger wrote it, and the package's own reader waits for ever on some, and 8 s for Qwen's tokens and merges.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NamedTuple

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from untrusted.files import check_value, open_plain, read_bytes, refuse_pointer
from untrusted.plain_text import shorten

MAGIC, CONFIG = b"GGUF", "config.json"
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # by type
TEXT, ARRAY = 8, 9  # types of metadata, too
MOST, LONGEST = 10**7, 2**26  # items of a list; bytes of a text
FIELDS = {  # of config.json: what the metadata call them, behind the architecture's name
    "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length", "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length", "rope_theta": "rope.freq_base",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}  # fmt: skip
NEUTRAL = {  # what else they may say; other values, and other keys, would be another model
    "rope.scaling.type": "none", "rope.scaling.factor": 1.0, "rope.scale_linear": 1.0, "expert_count": 0,
    "expert_used_count": 0, "attention.causal": True,
}  # fmt: skip
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's
LATER = (  # its successor; `#` stands for the digits that make one word
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}#| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {  # by tokenizer.ggml.pre: how a text is cut into words, one expression after another
    "gpt-2": [WORDS], "smollm": [r"\p{N}", WORDS], "qwen2": [LATER.replace("#", "")],
    "llama-bpe": [LATER.replace("#", "{1,3}")], "default": [r"[\p{P}\$\+<=>\^~\|]+", WORDS, r"\p{N}+", "[0-9]{3}"],
}  # fmt: skip
UNUSED, ADDED, CONTROL = 5, (3, 4), 3  # types of a token
ENDS = ("eos", "eot", "eom")  # tokenizer.ggml.…_token_id: what ends a turn
NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
CHUNK = 2**22  # numbers that are restored at a time
COUNT = Annotated[int, (1, 10**7)]


class Place(NamedTuple):
    """Where a tensor lies in its file, and how."""

    shape: tuple[int, ...]  # as torch has it: rows first
    kind: Any  # gguf.GGMLQuantizationType
    start: int
    row_bytes: int


class Header(NamedTuple):
    """What stands before the tensors."""

    metadata: dict[str, Any]
    tensors: dict[str, Place]
    config: dict[str, Any]  # as a config.json


def read_part(checkpoint: Path, name: str) -> bytes | None:
    """Return a small file of a checkpoint, a folder or GGUF; None if it has no such file; ValueError if it is amiss."""
    if checkpoint.is_file():
        return parts(checkpoint).get(name)
    return read_bytes(checkpoint / name) if (checkpoint / name).exists() else None


def parts(path: Path) -> dict[str, bytes]:
    """Return the small files of the folder that a GGUF file was made from, as far as its metadata tell them."""
    status = path.stat()
    return _parts(path, (status.st_size, status.st_mtime_ns))


@lru_cache(maxsize=1)
def _parts(path: Path, stamp: tuple[int, int]) -> dict[str, bytes]:
    given, _, config = read_header(path)
    try:
        tokenizer = rebuild_tokenizer(given)
        ends = [given.get(f"tokenizer.ggml.{name}_token_id") for name in ENDS]
        ends += [tokenizer.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>")]  # as llama.cpp does
        check_value(ends, list[int | None], "tokenizer.ggml.eos_token_id, or eot or eom")
        generation = {"eos_token_id": sorted({token_id for token_id in ends if token_id is not None})}
        found = {CONFIG: json.dumps(config), "generation_config.json": json.dumps(generation)}
        found["tokenizer.json"] = tokenizer.to_str(pretty=True)
        if (template := given.get("tokenizer.chat_template")) is not None:
            check_value(template, str, "tokenizer.chat_template")
            found["chat_template.jinja"] = template
        return {name: text.encode() for name, text in found.items()}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


# ---------------------------------------------------------------------------------------------------------- the header


def read_header(path: Path) -> Header:
    """Read what stands before the tensors; ValueError for what is no GGUF, is cut short, or is beyond the limits."""
    with open_plain(path) as file:
        try:
            return parse_header(file, path.stat().st_size)
        except (ValueError, struct.error) as error:
            file.seek(0)
            refuse_pointer(path, start := file.read(64))
            kind = "a GGUF that is not read here" if start.startswith(MAGIC) else "a file, and no GGUF"
            advice = "" if start.startswith(MAGIC) else f"; give a folder with {CONFIG} and safetensors"
            raise ValueError(f"{path} is {kind}: {shorten(str(error), 200)}{advice}") from None


def parse_header(file: BinaryIO, size: int) -> Header:
    """Do what `read_header` does, of an open file of so many bytes."""
    magic, version, n_tensors, n_metadata = struct.unpack("<4sIQQ", take(file, 24))
    if magic != MAGIC or version not in (2, 3):
        raise ValueError(f"its version is {version}; 2 and 3, of little-endian machines, are read")
    if max(n_tensors, n_metadata) > 10**5:
        raise ValueError(f"it has {n_tensors:,} tensors and {n_metadata:,} metadata; at most 100,000 are taken")
    metadata: dict[str, Any] = {}
    for _ in range(n_metadata):
        key = take_text(file)
        if key in metadata:
            raise ValueError(f"it says {shorten(key)!r} twice")
        metadata[key] = take_value(file, *struct.unpack("<I", take(file, 4)))
    if (pieces := metadata.get("split.count", 1)) not in (0, 1):
        raise ValueError(f"it is one of {shorten(repr(pieces))} parts; join them: llama-gguf-split --merge")
    listed = [take_place(file) for _ in range(n_tensors)]
    check_value(step := metadata.get("general.alignment", 32), int, "general.alignment")
    if not 1 <= step <= 2**16:
        raise ValueError(f"general.alignment is {step}; it must lie in [1, {2**16}]")
    first = -(-file.tell() // step) * step
    tensors = {name: place_of(name, shape, kind, first + offset, size) for name, shape, kind, offset in listed}
    if len(tensors) < n_tensors:
        raise ValueError("it has two tensors of one name")
    return Header(metadata, tensors, config_of(metadata, tensors))


def take(file: BinaryIO, n: int) -> bytes:
    """Read n bytes; ValueError if that is beyond the limit or the file's end."""
    if n > LONGEST:
        raise ValueError(f"it has a text or list of {n:,} bytes; the most that is taken is {LONGEST:,}")
    raw = file.read(n)
    if len(raw) < n:
        raise ValueError("it ends within its header")
    return raw


def take_text(file: BinaryIO) -> str:
    """Read a text: its length and UTF-8."""
    return take(file, *struct.unpack("<Q", take(file, 8))).decode()


def take_value(file: BinaryIO, kind: int) -> Any:
    """Read a value of metadata of this type."""
    if kind == TEXT:
        return take_text(file)
    if kind == ARRAY:
        kind, n = struct.unpack("<IQ", take(file, 12))
        if n > MOST or kind not in (TEXT, *SCALARS):
            raise ValueError(f"it has a list of {n:,} items of type {kind}; {MOST:,} are taken, and no lists in lists")
        if kind == TEXT:
            return [take_text(file) for _ in range(n)]
        return list(struct.unpack(form := f"<{n}{SCALARS[kind]}", take(file, struct.calcsize(form))))
    if kind not in SCALARS:
        raise ValueError(f"it has metadata of a type {kind}, which is unknown here")
    value = struct.unpack(form := "<" + SCALARS[kind], take(file, struct.calcsize(form)))[0]
    return float(str(np.float32(value))) if SCALARS[kind] == "f" else value  # 1e-05, not 9.999999747378752e-06


def take_place(file: BinaryIO) -> tuple[str, list[int], int, int]:
    """Read what the header tells of a tensor: name, shape, type, offset."""
    name, (n,) = take_text(file), struct.unpack("<I", take(file, 4))
    if not 1 <= n <= 4:
        raise ValueError(f"tensor {shorten(name)} has {n} dimensions")
    *shape, kind, offset = struct.unpack(f"<{n}QIQ", take(file, 8 * n + 12))
    return name, shape[::-1], kind, offset


def place_of(name: str, shape: list[int], kind: int, start: int, size: int) -> Place:
    """Check where a tensor lies in a file of so many bytes."""
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError:
        raise ValueError("the package that restores its weights is absent: pip install gguf==0.19.0") from None
    kind = GGMLQuantizationType(kind)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    row_bytes = shape[-1] // block * block_bytes
    if shape[-1] % block or not 0 < row_bytes * math.prod(shape[:-1]) <= size - start:
        raise ValueError(f"tensor {shorten(name)}, {shape} of {kind.name}, does not lie in the file's {size:,} bytes")
    return Place(tuple(shape), kind, start, row_bytes)


# ---------------------------------------------------------------------------------------------------- its config.json


def config_of(given: dict[str, Any], tensors: dict[str, Place]) -> dict[str, Any]:
    """Return config.json; ValueError, by name, for what the metadata ask for and is not implemented."""
    family = given.get("general.architecture")
    if family not in ("qwen2", "llama"):
        raise ValueError(f"general.architecture is {shorten(repr(family))}; only 'qwen2' and 'llama' are implemented")
    own = {key.removeprefix(f"{family}."): value for key, value in given.items() if key.startswith(f"{family}.")}
    if "token_embd.weight" not in tensors:
        raise ValueError("tensor token_embd.weight is missing")
    config: dict[str, Any] = {"model_type": family}
    for name, key in FIELDS.items():
        if key in own:
            check_value(own[key], float if name in ("rope_theta", "rms_norm_eps") else COUNT, f"{family}.{key}")
            config[name] = own[key]
    config.setdefault("num_key_value_heads", config.get("num_attention_heads"))
    head_dim = config.get("hidden_size", 0) // config.get("num_attention_heads", 1)
    same = dict.fromkeys(("rope.dimension_count", "attention.key_length", "attention.value_length"), head_dim)
    vocab_size = tensors["token_embd.weight"].shape[0]
    for key, value in (NEUTRAL | same | {"vocab_size": vocab_size}).items():
        if own.get(key, value) != value:
            raise ValueError(f"{family}.{key} is {shorten(repr(own[key]))}; only {value!r} is implemented")
    for key in own.keys() - NEUTRAL.keys() - same.keys() - {"vocab_size", *FIELDS.values()}:
        raise ValueError(f"{family}.{shorten(key)} is {shorten(repr(own[key]))}, which is not implemented")
    tied = "output.weight" not in tensors
    tokens = {f"{name}_token_id": given.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    return config | tokens | {"vocab_size": vocab_size, "tie_word_embeddings": tied}


# ------------------------------------------------------------------------------------------------------ its tokenizer


def rebuild_tokenizer(given: dict[str, Any]) -> Tokenizer:
    """Make the tokenizer from vocabulary, merges, types of tokens, and the name of the way in which words are cut."""
    listed = {"tokens": list[str], "merges": list[str], "token_type": list[int]}
    for name, hint in {"model": str, "pre": str, **listed}.items():
        check_value(given.get(f"tokenizer.ggml.{name}"), hint, f"tokenizer.ggml.{name}")
    model, pre, tokens, merges, types = (given[f"tokenizer.ggml.{x}"] for x in ("model", "pre", *listed))
    if model != "gpt2":
        raise ValueError(f"tokenizer.ggml.model is {shorten(repr(model))}; only 'gpt2', byte-level BPE, is rebuilt")
    if pre not in SPLITS:
        raise ValueError(f"tokenizer.ggml.pre is {shorten(repr(pre))}; only {', '.join(SPLITS)} are implemented")
    used = [i for i, kind in enumerate(types) if kind != UNUSED]  # those only fill the embedding up
    vocabulary = {tokens[i]: i for i in used} if len(types) == len(tokens) else {}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if not used or len(vocabulary) < len(used) or any(len(pair) != 2 for pair in pairs):
        numbers = f"{len(tokens):,} tokens, {len(types):,} types and {len(merges):,} merges"
        raise ValueError(f"tokenizer.ggml: {numbers} make no vocabulary")
    try:
        tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=pre == "llama-bpe"))
    except Exception as error:  # the Rust library raises plain Exception
        raise ValueError(f"tokenizer.ggml.merges are refused: {shorten(str(error), 200)}") from None
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    words = [pre_tokenizers.Split(Regex(split), "isolated") for split in SPLITS[pre]]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    for special in (False, True):
        added = [AddedToken(tokens[i], normalized=False, special=special)
                 for i in used if types[i] in ADDED and (types[i] == CONTROL) == special]  # fmt: skip
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    return tokenizer


# -------------------------------------------------------------------------------------------------------- its weights


def read_tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Give each tensor in fp32 under its Hugging Face name, one that has none under its own; ValueError if it is amiss.

    For the architecture llama the rows of q and k are put back: llama.cpp's turn of positions pairs neighbours there,
    and Hugging Face's pairs the halves of a head. The rows of a qwen2 are as they were.
    """
    _, tensors, config = read_header(path)
    heads = {"attn_q": config.get("num_attention_heads"), "attn_k": config["num_key_value_heads"]}
    heads = heads if config["model_type"] == "llama" else {}
    with open_plain(path) as file:
        for name, place in tensors.items():
            array = restore(file, place, f"{path}: tensor {shorten(name)}")
            whole, _, ending = name.rpartition(".")
            block, _, part = whole.rpartition(".")
            if name == "rope_freqs.weight":
                if not (array == 1).all():  # factors that Llama 3 divides its frequencies by
                    raise ValueError(f"{path}: rope_freqs.weight scales the positions, which is not implemented")
                continue
            if part in heads and len(array) % (2 * heads[part]) == 0:  # else its shape is refused
                array = array.reshape(heads[part], -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
            if block.startswith("blk.") and part in LAYER_NAMES:
                name = f"model.layers.{block.removeprefix('blk.')}.{LAYER_NAMES[part]}.{ending}"
            elif whole in NAMES:
                name = f"{NAMES[whole]}.{ending}"
            yield name, array
            del array


def restore(file: BinaryIO, place: Place, where: str) -> np.ndarray:
    """Read a tensor as fp32, some rows at a time: the package needs twice their size on top."""
    from gguf.quants import dequantize

    rows, width = math.prod(place.shape[:-1]), place.shape[-1]
    array = np.empty((rows, width), np.float32)
    step = max(1, CHUNK // width)
    file.seek(place.start)
    for first in range(0, rows, step):
        n = min(step, rows - first)
        raw = np.frombuffer(file.read(n * place.row_bytes), np.uint8)
        if raw.size < n * place.row_bytes:
            raise ValueError(f"{where} is cut short")
        try:
            with np.errstate(all="ignore"):  # NaN and infinity are refused where the weights are taken
                array[first : first + n] = dequantize(raw.reshape(n, -1), place.kind)
        except NotImplementedError:
            raise ValueError(f"{where} is {place.kind.name}, which the gguf package does not restore") from None
    return array.reshape(place.shape)
