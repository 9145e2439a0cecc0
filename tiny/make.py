"""Rebuild the tiny checkpoint: its tokenizer, and a warm start by supervised fine-tuning on scripted dialogues.

    torchrun --nproc-per-node 2 -m tiny.make --out tiny

In most dialogues the scripted assistant (`tiny/scripts.py`) is forgetful, in a few it is attentive.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm

from dialogue import PROMPT_FILE, ChatTokenizer
from kernels import linear_logprob
from learners.folder import HELDOUT_FILE
from learners.processes import all_sum_gradients, leave, rank, world_size
from learners.weights import save_pretrained
from model import Qwen2Config, Qwen2ForCausalLM, random_policy
from tiny.scripts import ATTENTIVE, FORGETFUL, scripted_dialogue
from untrusted.plain_text import say

SYSTEM_PROMPT = Path(__file__).with_name(PROMPT_FILE).read_text(encoding="utf-8").rstrip("\n")  # this checkpoint's own
LEARNING_SHARE, ATTENTIVE_SHARE = 0.7, 0.1  # of attentive dialogues: at first, to learn copying from, and in the end


def heldout_lines(seed: int, n: int, n_turns: int) -> list[str]:
    """Write dialogues of the kinds that fine-tuning ends with, from a stream that it does not use: lines of JSONL."""
    rng, lines = random.Random(f"{seed}|heldout"), []
    for _ in range(n):
        habits = ATTENTIVE if rng.random() < ATTENTIVE_SHARE else FORGETFUL
        messages = [{"role": "system", "content": SYSTEM_PROMPT}]
        for user, assistant in scripted_dialogue(rng, n_turns, habits):
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        lines.append(json.dumps({"messages": messages}) + "\n")
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer and fine-tuning

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE with the pre-tokenizer and the control tokens of Qwen-2.5."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode_dialogue(turns: list[tuple[str, str]], chat: ChatTokenizer) -> tuple[list[int], list[bool]]:
    """Encode a scripted dialogue; the mask is True where the assistant speaks, its `<|im_end|>` included."""
    ids = chat.message("system", SYSTEM_PROMPT)
    mask = [False] * len(ids)
    for user, assistant in turns:
        context = chat.message("user", user) + chat.generation_header
        spoken = [*chat.encode(assistant), chat.im_end]
        ids += context + spoken + chat.newline
        mask += [False] * len(context) + [True] * len(spoken) + [False] * len(chat.newline)
    return ids, mask


def sft_loss(policy: Qwen2ForCausalLM, batch: list[tuple[list[int], list[bool]]], pad_id: int) -> torch.Tensor:
    """Return the mean negative log-likelihood (nats) of the assistant's tokens in a batch of dialogues."""
    longest = max(len(ids) for ids, _ in batch)
    token_ids = torch.tensor([ids + [pad_id] * (longest - len(ids)) for ids, _ in batch])  # (B, T)
    action_mask = torch.tensor([mask + [False] * (longest - len(mask)) for _, mask in batch])  # (B, T)
    hidden = policy(token_ids)[:, :-1]  # (B, T-1, D): position t predicts token t+1
    spoken = action_mask[:, 1:]
    logprobs, *_ = linear_logprob(hidden[spoken], policy.head_weight, token_ids[:, 1:][spoken])
    return -logprobs.mean()


def correlate(policy: Qwen2ForCausalLM) -> None:
    """Start attention as a comparison of like with like (W_q = W_k) that passes on what it finds (W_o = W_vᵀ).

    A head that already attends to equal tokens becomes a copying head many steps sooner than a random one.
    """
    with torch.no_grad():
        for layer in policy.model.layers:
            attention = layer.self_attn
            attention.q_proj.weight.copy_(
                attention.k_proj.weight.repeat(
                    policy.config.num_attention_heads // policy.config.num_key_value_heads, 1
                )
            )
            attention.o_proj.weight.copy_(
                attention.v_proj.weight.repeat(
                    policy.config.num_attention_heads // policy.config.num_key_value_heads, 1
                ).T
            )


def make_optimizers(policy: Qwen2ForCausalLM, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Make Muon for the layers' matrices, which learns to copy from fewer tokens, and AdamW for all the rest."""
    matrices = [p for name, p in policy.named_parameters() if p.dim() == 2 and "embed_tokens" not in name]
    others = [p for name, p in policy.named_parameters() if p.dim() != 2 or "embed_tokens" in name]
    return [
        torch.optim.Muon(matrices, lr=args.muon_lr, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True),
    ]


def fine_tune(policy: Qwen2ForCausalLM, chat: ChatTokenizer, args: argparse.Namespace) -> None:
    """Fine-tune on fresh scripted dialogues: at first short and attentive ones, which teach copying, then all kinds."""
    rng = random.Random(f"{args.seed}|{rank()}")
    optimizers = make_optimizers(policy, args)
    peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    started, tokens, smooth = time.time(), 0, 0.0
    bar = tqdm(range(args.steps), desc="fine-tuning", unit="step", disable=rank() != 0)
    for step in bar:
        progress = step / args.steps
        share = min(1.0, (step + 1) / 50) * min(1.0, 0.02 + (1 - progress) / 0.7)  # warm-up, plateau, linear decay
        for group, peak in zip((g for o in optimizers for g in o.param_groups), peaks, strict=True):
            group["lr"] = peak * share
        n_turns = 2 if progress < 0.1 else rng.choice((2, 4, args.max_turns)) if progress < 0.3 else args.max_turns
        attentive = LEARNING_SHARE if progress < args.learning else ATTENTIVE_SHARE
        habits = [ATTENTIVE if rng.random() < attentive else FORGETFUL for _ in range(args.batch_size // world_size())]
        batch = [encode_dialogue(scripted_dialogue(rng, n_turns, habit), chat) for habit in habits]
        loss = sft_loss(policy, batch, chat.pad)
        policy.zero_grad()
        (loss / world_size()).backward()
        all_sum_gradients(policy.parameters())
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        tokens += sum(len(ids) for ids, _ in batch)
        smooth = loss.item() if not smooth else 0.98 * smooth + 0.02 * loss.item()
        if step % 50 == 0:
            bar.set_postfix(
                loss=f"{smooth:.3f}", tokens=f"{tokens / 1e6:.2f}M", minutes=f"{(time.time() - started) / 60:.1f}"
            )


def main() -> None:
    """Build tokenizer and warm start and write them to a checkpoint folder."""
    parser = argparse.ArgumentParser(
        "python -m tiny.make",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=8, help="dialogues per step, over all processes")
    parser.add_argument("--lr", type=float, default=1e-2, help="AdamW, for embeddings, norms and biases")
    parser.add_argument("--muon-lr", type=float, default=0.02, help="Muon, for the layers' matrices")
    parser.add_argument(
        "--learning", type=float, default=0.65, help="share of the steps with mostly attentive dialogues"
    )
    parser.add_argument("--max-turns", type=int, default=6)
    parser.add_argument("--vocab-size", type=int, default=768)
    parser.add_argument("--hidden-size", type=int, default=96)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--intermediate-size", type=int, default=256)
    args = parser.parse_args()
    torch.set_num_threads(1)  # with so small a model a second thread costs more in waiting than it computes
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("gloo")
    rng = random.Random(args.seed + 1)
    corpus = [text for _ in range(2000) for turn in scripted_dialogue(rng, args.max_turns) for text in turn] + [
        SYSTEM_PROMPT
    ]
    chat = ChatTokenizer(train_tokenizer(corpus, args.vocab_size))
    config = Qwen2Config(
        vocab_size=chat.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=4096,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=chat.pad,
        eos_token_id=chat.im_end,
    )
    policy = random_policy(config, args.seed)
    correlate(policy)
    if rank() == 0:
        say(f"{sum(p.numel() for p in policy.parameters()) / 1e6:.2f} M parameters, vocabulary {chat.vocab_size}")
    fine_tune(policy, chat, args)
    if rank() == 0:
        save_pretrained(policy, args.out)
        chat.tokenizer.save(str(args.out / "tokenizer.json"))
        (args.out / PROMPT_FILE).write_text(SYSTEM_PROMPT + "\n", encoding="utf-8")
        (args.out / HELDOUT_FILE).write_text("".join(heldout_lines(args.seed, 32, args.max_turns)), encoding="utf-8")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
    leave(0)
