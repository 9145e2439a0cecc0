"""`--merge`: an adapter added to the weights of its base, as a whole checkpoint for programs that know no adapters."""

from __future__ import annotations

from pathlib import Path

from config import Config
from dialogue import ChatTokenizer
from learners import lora
from learners.adapters import with_saved_adapter
from learners.folder import carried_files
from learners.loading import compute_dtype
from learners.weights import load_policy, save_pretrained
from records.checkpoints import unborn
from untrusted.plain_text import clean_text


def merge(config: Config) -> str:
    """Write --ckpt with --adapter added to it into the folder --merge, and say so; ValueError if it is not empty.

    The sum is made in fp32, and rounded once if --dtype says so: bfloat16 loses part of a small adapter.
    """
    folder = Path(config.merge)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"--merge {folder} exists already; name a new folder")
    base = load_policy(config.ckpt)
    lora.merge(with_saved_adapter(base, Path(config.adapter)))
    dtype, temporary = compute_dtype(config, "cpu"), unborn(folder)
    save_pretrained(base, temporary, dtype)
    chat = ChatTokenizer.from_folder(config.ckpt, base.config.vocab_size)
    for name, content in chat.chat_files(carried_files(Path(config.ckpt)), config.ckpt).items():
        (temporary / name).write_bytes(content)
    temporary.replace(folder)  # an empty one is replaced
    return clean_text(f"{config.ckpt} with {config.adapter}, in {dtype}: {folder}")
