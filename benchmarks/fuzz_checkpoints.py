"""Damaged checkpoints: `python -m benchmarks.fuzz_checkpoints --number 2000` counts what went wrong (0, or exit 1).

A checkpoint of a few KB in two shards, one of whose files is damaged as benchmarks/mutate.py does it, is loaded, and
speaks three tokens. Right is: it loads, or one ValueError in one line ends it, in time, and nothing around the folder
is read or changed. Each file is damaged --number times, and so is the same checkpoint as GGUF.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benchmarks.mutate import mutate_gguf, mutate_json, mutate_safetensors
from benchmarks.write_gguf import write_gguf
from dialogue import ChatTokenizer
from learners.folder import CONFIG, INDEX, carried_files, resolve_checkpoint
from learners.weights import load_policy, save_pretrained
from model import Qwen2Config, random_policy
from sampler import generate

SECONDS = 20  # most that a case may take; the slowest took 0.3
OUTSIDE = "x"  # beside the folder: benchmarks/mutate.py puts "../x" in place of names
SHARD = "model-00001-of-00002.safetensors"
GGUF = "model.gguf"
MUTATORS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    CONFIG: mutate_json, "generation_config.json": mutate_json, "tokenizer.json": mutate_json,
    "tokenizer_config.json": mutate_json, "adapter_config.json": mutate_json, INDEX: mutate_json,
    SHARD: mutate_safetensors, GGUF: mutate_gguf,
}  # fmt: skip


class Hang(BaseException):
    """A case took too long; no `except Exception` on the way may keep it."""


def write_checkpoint(folder: Path) -> None:
    """Write a checkpoint of a few KB, with the files that others write beside it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({ch: i for i, ch in enumerate([*alphabet, "ab"])}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    size = tokenizer.get_vocab_size()
    config = Qwen2Config(size, 8, 8, 1, 2, 1, 64, 1e4, tie_word_embeddings=True, eos_token_id=size - 1)
    save_pretrained(random_policy(config, 0), folder, max_shard_bytes=4096)
    for name, content in ChatTokenizer(tokenizer, [size - 3]).chat_files({}).items():
        if name != "chat_template.jinja":  # so that tokenizer_config.json is looked into
            (folder / name).write_bytes(content)


def speak(folder: Path) -> None:
    """Load a checkpoint, all of it, and let it answer; `folder` may be a GGUF file."""
    policy = load_policy(resolve_checkpoint(folder))
    chat = ChatTokenizer.from_folder(folder, policy.config.vocab_size)
    chat.chat_files(carried_files(folder))
    prompt = [*chat.message("user", "a <|im_end|> b\n😀 12"), *chat.generation_header]
    chat.visible(generate(policy, [prompt], max_new_tokens=3, stop_ids=chat.stop_ids, seeds=[0])[0].token_ids)


def verdict(folder: Path) -> str:
    """Say what became of a checkpoint: "loaded", "refused", or, of what may not be, its kind and cause."""

    def ring(*_: object) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        speak(folder)
    except Hang:
        return f"hang, longer than {SECONDS} s"
    except ValueError as error:
        return "refused" if len(str(error).splitlines()) == 1 and str(error).isprintable() else f"not a line: {error!r}"
    except BaseException as error:  # PanicException of the Rust libraries is no Exception
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} in {Path(where.filename).name}:{where.lineno}: {str(error)[:200]}"
    finally:
        signal.alarm(0)
    return "loaded"


def around(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return what lies beside a folder: time of change and content, by name."""
    files = [path for path in folder.parent.iterdir() if path.is_file()]
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def fuzz(number: int, seed: int = 0, names: tuple[str, ...] = tuple(MUTATORS)) -> dict[str, Counter]:
    """Damage each of these files so many times; returns the verdicts counted by file."""
    found: dict[str, Counter] = {}
    with tempfile.TemporaryDirectory(prefix="fuzz-") as root:
        folder = Path(root) / "model"
        write_checkpoint(folder)
        shutil.copy(folder / SHARD, Path(root) / OUTSIDE)
        before = around(folder)
        for name in names:
            found[name], path = Counter(), folder / name
            if name == GGUF:
                write_gguf(folder, path)
            whole = path.read_bytes() if path.exists() else None
            example = whole or b'{"peft_type": "LORA", "r": 8, "base_model_name_or_path": "Qwen/Qwen2.5-0.5B"}'
            for i in range(number):
                path.write_bytes(MUTATORS[name](example, random.Random(f"{seed} {name} {i}")))
                found[name][verdict(path if name == GGUF else folder)] += 1
                if around(folder) != before:
                    found[name][f"touched what lies beside the folder (case {i})"] += 1
            path.unlink() if whole is None else path.write_bytes(whole)
    return found


def wrong(found: dict[str, Counter]) -> dict[str, int]:
    """Return the verdicts that may not be, with their numbers."""
    bad = {f"{name}: {what}": n for name, c in found.items() for what, n in c.items() if what not in RIGHT}
    return dict(sorted(bad.items(), key=lambda item: -item[1]))


RIGHT = ("loaded", "refused")


def main() -> int:
    """Print a row for each file; returns 1 if anything was not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=2000, help="damages of each file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--files", nargs="*", default=list(MUTATORS), choices=list(MUTATORS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    start, found = time.perf_counter(), {}
    for name in args.files:
        found |= fuzz(args.number, args.seed, (name,))
        print(name, json.dumps({what: found[name][what] for what in RIGHT}), flush=True)
    bad = wrong(found)
    for what, n in bad.items():
        print(f"{n} x {what}")
    print(f"{sum(bad.values())} of {args.number * len(found):,} wrong, {time.perf_counter() - start:.0f} s")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
