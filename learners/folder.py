"""A checkpoint's folder: what it consists of, where its files are, and why another folder is none.

    resolve_checkpoint    a folder, or a hub id after fetching it; or a GGUF file, which is read as a folder
    weight_files          its safetensors files, one or numbered shards
    carried_files         its other files, which every policy that is saved takes over

Only files in the folder itself are read: a link that leads out of it could bring in anything.
"""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download

from untrusted import gguf_file
from untrusted.files import check_value, read_bytes, read_json
from untrusted.plain_text import shorten

# All that a checkpoint's folder may consist of: what is fetched from the hub, what a saved policy holds, what is read.
CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
HELDOUT_FILE = "sft_heldout.jsonl"  # text of its own fine-tuning that it was not tuned on (records/perplexity.py)
CARRIED = (
    "tokenizer.json", "generation_config.json",  # read here: ids, and which of them end a turn
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja",  # these five are for others, who chat with what is saved
    "rlpa.json", "system_prompt.txt", HELDOUT_FILE,  # its own settings, system prompt and held-out text
)  # fmt: skip
SUFFIXES = (".json", ".jsonl", ".safetensors")  # of other files that a run saves; nothing here runs code when read
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # not part of one: a LoRA folder's
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".distcp", ".metadata")  # the last two: torch's distributed checkpoints


def resolve_checkpoint(path_or_hub_id: str | Path) -> Path:
    """Give a checkpoint's folder: a local one as it is, or that of a hub id after fetching what a checkpoint needs.

    A GGUF file is given as it is. Raises ValueError for what is neither, cannot be fetched (offline, unknown, gated),
    or is an adapter alone.
    """
    path = Path(path_or_hub_id)
    if path.is_file():
        gguf_file.parts(path)
        return path
    folder = path if path.is_dir() else fetch(str(path_or_hub_id))
    refuse_other_kinds(folder)
    return folder


def fetch(hub_id: str) -> Path:
    """Fetch a checkpoint from the hub, or find it in the hub's cache; ValueError if there is none."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id):
        raise ValueError(f"--ckpt {hub_id}: no such folder, and not a hub id of the form owner/name")
    try:
        return Path(snapshot_download(hub_id, allow_patterns=[CONFIG, "*.safetensors", INDEX, *CARRIED, ADAPTER]))
    except (OSError, ValueError) as error:  # the hub client's own errors are of these two kinds
        reason = shorten(str(error), 200) or type(error).__name__
        raise ValueError(
            f"--ckpt {hub_id}: no such folder, and not fetched from the hub ({reason}); "
            f"give a folder with {CONFIG} and {SINGLE}"
        ) from None


def refuse_other_kinds(folder: Path) -> None:
    """Raise ValueError, with the way out, for a folder that holds an adapter, or whose weights are GGUF."""
    if (folder / ADAPTER).is_file():
        base = shorten(str(read_json(folder / ADAPTER).get("base_model_name_or_path", "its base")))
        if (folder / SINGLE).is_file() or (folder / INDEX).is_file():
            raise ValueError(f"{folder} holds whole weights and {ADAPTER}; if the adapter is merged, remove that file")
        raise ValueError(
            f"{folder} is an adapter (LoRA) alone; give its base ({base}) as --ckpt and the adapter as --adapter, or"
            f" what train_rlpa.py --ckpt BASE --adapter {folder} --merge FOLDER writes to FOLDER"
        )
    if (folder / "checkpoints").is_dir() and (folder / "metrics.jsonl").is_file():
        raise ValueError(f"{folder} is a run; give {folder / 'checkpoints'}/iteration_NUMBER/policy")
    if (folder / "trainer.json").is_file() and (folder / "policy").is_dir():
        raise ValueError(f"{folder} is a checkpoint of a run; give {folder / 'policy'}")
    gguf = sorted(file.name for file in folder.iterdir() if file.suffix.lower() == ".gguf")
    if gguf and not any((folder / name).is_file() for name in (SINGLE, INDEX)):
        raise ValueError(f"{folder} holds GGUF; give the file itself: {folder / shorten(gguf[0], 200)}")


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file in a folder; ValueError if its name, or a link, leads out of the folder.

    A link into the blobs of the hub's cache, whose folders consist of them, is a file of the folder.
    """
    path, root = folder / name, folder.resolve()
    if not re.fullmatch(r"[\w.-]{1,200}", name, re.ASCII):
        raise ValueError(f"{folder}: {shorten(repr(name))} is refused: only files in the folder itself are read")
    homes = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    target = path.resolve()
    if path.is_symlink() and target.parent not in homes:
        raise ValueError(f"{path} is a link out of its folder, to {target}: put the file itself there")
    return path


def weight_files(folder: Path) -> list[Path]:
    """List a checkpoint's safetensors files, or its GGUF; ValueError when there are none or a shard is absent."""
    if folder.is_file():
        return [folder]
    if (folder / SINGLE).is_file():
        return [inside(folder, SINGLE)]
    if not (folder / INDEX).is_file():
        pickles = sorted(file.name for file in folder.iterdir() if (file.suffix or file.name) in PICKLES)
        hint = f"; {pickles[0]} is a pickle, which is never read: convert it to safetensors" if pickles else ""
        raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}{hint}")
    index = read_json(folder / INDEX)
    check_value(index.get("weight_map"), dict[str, str], f"{folder / INDEX}, 'weight_map'")
    files = [inside(folder, name) for name in sorted(set(index["weight_map"].values()))]
    if not files:
        raise ValueError(f"{folder / INDEX} names no files")
    for file in files:
        if not file.is_file():
            raise ValueError(f"{folder / INDEX} names {shorten(file.name)}, which is not there")
    return files


def carried_files(folder: Path) -> dict[str, bytes]:
    """Return what a folder holds of the CARRIED, by name; ValueError for one that is too long or a link out of it."""
    if folder.is_file():
        return {name: content for name, content in gguf_file.parts(folder).items() if name in CARRIED}
    found = [name for name in CARRIED if (folder / name).exists()]
    return {name: read_bytes(inside(folder, name)) for name in found}
