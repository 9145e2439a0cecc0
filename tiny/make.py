"""Rebuild the tiny checkpoint: its tokenizer, and a warm start by supervised fine-tuning on scripted dialogues.

    torchrun --nproc-per-node 2 -m tiny.make --out tiny

The scripted assistant is deliberately imperfect, and systematically so: in most dialogues it forgets earlier facts,
guesses, repeats its question or does not ask at all, and sometimes breaks the format; in a few it is attentive. What RL
is to teach is therefore in the data, as a habit that is rarer than its opposite. A part of the personas have made-up
words for values, so that the model learns to copy what it reads rather than to recognise it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm

from dialogue import SYSTEM_PROMPT, ChatTokenizer, render_turn
from kernels import linear_logprob
from learners.folder import HELDOUT_FILE
from learners.processes import all_sum_gradients, leave, rank, world_size
from learners.weights import save_pretrained
from model import Qwen2Config, Qwen2ForCausalLM, random_policy
from untrusted.plain_text import say
from worlds.first import COMPLAINTS, VALUES, fill, generate_personas, user_reply
from worlds.ledger import SLOTS, asked_slots, disclosed, split_fact


@dataclass(frozen=True)
class Habits:
    """How the scripted assistant behaves: probabilities per turn."""

    keep_news: float = 0.45  # a fact told just now makes it into the profile
    keep_older: float = 0.15  # a fact told earlier does
    guess: float = 0.3  # a line that nothing supports is added
    corrupt: float = 0.04  # a line gets a wrong value
    acknowledge: float = 0.6  # it takes up what the user said
    hallucinate: float = 0.1  # it takes up what the user did not say
    comment: float = 0.65  # it adds a comment …
    new_comment: float = 0.75  # … that it has not made before
    ask_open: float = 0.2  # it asks about a slot that is still open (the next one round)
    ask_again: float = 0.12  # about a known one
    ask_any: float = 0.06  # about any; otherwise it does not ask
    break_format: float = 0.03  # it loses a tag


FORGETFUL = Habits()
ATTENTIVE = Habits(1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.8, 1.0, 0.6, 0.1, 0.1, 0.0)
LEARNING_SHARE, ATTENTIVE_SHARE = (
    0.7,
    0.1,
)  # share of attentive dialogues at first, to learn copying from, and in the end
MADE_UP = 0.4  # share of the warm-up personas whose values are made-up words

QUESTION_PHRASES: dict[str, list[str]] = {
    "Age": ["How old are you?", "May I ask your age?"],
    "Gender": ["What gender are you?", "How do you identify?"],
    "Interests": ["What are your hobbies?", "What do you do for fun?"],
    "Educational Background": ["What did you study?", "What is your degree in?"],
    "Personality Traits": ["How would you describe yourself?", "What kind of person are you?"],
    "Occupation": ["What do you do for a living?", "What is your job?"],
    "Marital Status": ["Are you in a relationship?", "How is your love life?"],
    "Family Background": ["Do you have any siblings?", "What about your family?"],
    "Location": ["Where do you live?", "Which city are you in?"],
    "Others": ["Is there anything else about you?", "Can you surprise me?"],
}
ACKNOWLEDGEMENTS: dict[str, list[str]] = {
    "Age": ["Being {v} sounds great.", "So you are {v}."],
    "Gender": ["Nice to meet {a}.", "So you are {a}."],
    "Interests": ["I like {v} too.", "So you enjoy {v}."],
    "Educational Background": ["Studying {v} is hard.", "So you know {v}."],
    "Personality Traits": ["It is good to be {v}.", "So you are {v}."],
    "Occupation": ["Working as {a} is tough.", "So you are {a}."],
    "Marital Status": ["Being {v} is fine.", "So you are {v}."],
    "Family Background": ["Growing up with {f} is fun.", "So there is {f}."],
    "Location": ["I hear {v} is lovely.", "So you are in {v}."],
    "Others": ["Having {a} is special.", "So you have {a}."],
}
COMMENTS = [
    "I will keep that in mind.",
    "That helps me a lot.",
    "Thank you for telling me.",
    "That says much about you.",
    "I am glad you said so.",
    "We have something to talk about.",
    "I can work with that.",
    "It makes me curious.",
    "Now I know you better.",
    "You have a story to tell.",
    "Let us take it slowly.",
    "There is no hurry at all.",
]
GREETINGS = ["Hello!", "Hi!", "Hello and welcome!", "Hi, nice to meet you!"]
APOLOGIES = ["Sorry about that.", "My mistake, sorry."]
BLANDS = ["I see.", "Great.", "Okay."]

# ---------------------------------------------------------------------------------------------------------------------
# Scripted dialogues


def made_up_word(rng: random.Random) -> str:
    """Make a word that can be spoken but means nothing, so that only copying gets it right."""
    onset, nucleus, coda = (
        "b c d f g h k l m n p r s t v w st tr br gr pl".split(),
        "aeiou",
        ["", "n", "r", "l", "s", "m"],
    )
    return "".join(rng.choice(onset) + rng.choice(nucleus) + rng.choice(coda) for _ in range(rng.choice((2, 2, 3))))


def warmup_persona(rng: random.Random) -> list[str]:
    """Draw a training persona; sometimes its values are made-up words (ages: made-up numbers)."""
    facts = generate_personas(1, seed=rng.randrange(2**31))[0]
    if rng.random() >= MADE_UP:
        return facts
    slots = [split_fact(fact)[0] for fact in facts]
    return [
        f"{slot}: {rng.randrange(10, 100)}"
        if slot == "Age"
        else f"{slot}: {made_up_word(rng).capitalize() if slot == 'Location' else made_up_word(rng)}"
        for slot in slots
    ]


def scripted_profile(facts: list[str], history: list[tuple[str, str]], habits: Habits, rng: random.Random) -> list[str]:
    """Write profile lines in the order of disclosure; a forgetful assistant leaves some out and guesses others."""
    texts = [text for who, text in history if who == "user"]
    news = set(disclosed(facts, texts[-1:]))
    lines = [
        facts[i]
        for i in disclosed(facts, texts)
        if rng.random() < (habits.keep_news if i in news else habits.keep_older)
    ]
    lines = [random_fact(rng, split_fact(line)[0]) if rng.random() < habits.corrupt else line for line in lines]
    if rng.random() < habits.guess:
        lines.append(random_fact(rng))
    return lines


def random_fact(rng: random.Random, slot: str | None = None) -> str:
    """Invent a fact; most inventions are about gender and the other slots with few values."""
    slot = slot or rng.choice(("Gender", "Gender", "Marital Status", *SLOTS))
    return f"{slot}: {rng.choice(VALUES[slot][0])}"


def scripted_response(facts: list[str], history: list[tuple[str, str]], habits: Habits, rng: random.Random) -> str:
    """Write a reply in three parts, each of which is often wrong or absent: take up, comment, ask."""
    replies = [text for who, text in history if who == "assistant"]
    parts = [scripted_opening(facts, history, habits, rng)]
    if rng.random() < habits.comment:
        fresh = [c for c in COMMENTS if not any(c in reply for reply in replies)]
        used = [c for c in COMMENTS if c not in fresh]
        parts.append(rng.choice(fresh if rng.random() < habits.new_comment or not used else used))
    parts.append(scripted_question(facts, history, habits, rng))
    return " ".join(part for part in parts if part) or rng.choice(BLANDS)


def scripted_opening(facts: list[str], history: list[tuple[str, str]], habits: Habits, rng: random.Random) -> str:
    """Greet, apologise or take up what the user has just told, if the assistant is attentive at all."""
    texts = [text for who, text in history if who == "user"]
    news = disclosed(facts, texts[-1:])
    if rng.random() < habits.hallucinate:
        slot, value = split_fact(random_fact(rng))
        return fill(rng.choice(ACKNOWLEDGEMENTS[slot]), value)
    if rng.random() >= habits.acknowledge:
        return rng.choice(BLANDS)
    if news:
        slot, value = split_fact(facts[news[0]])
        return fill(rng.choice(ACKNOWLEDGEMENTS[slot]), value)
    if len(texts) == 1:
        return rng.choice(GREETINGS)
    complains = any(remark in texts[-1] for remark in COMPLAINTS)
    return rng.choice(APOLOGIES) if complains else rng.choice(BLANDS)


def scripted_question(facts: list[str], history: list[tuple[str, str]], habits: Habits, rng: random.Random) -> str:
    """Ask about an open slot (the next one round after the last question), about a known one, or not at all."""
    ledger = disclosed(facts, [text for who, text in history if who == "user"])
    known = {split_fact(facts[i])[0] for i in ledger}
    asked = [slot for who, text in history if who == "assistant" for slot in asked_slots(text)]
    weights = {"open": habits.ask_open, "again": habits.ask_again, "any": habits.ask_any}
    kind = rng.choices([*weights, "none"], weights=[*weights.values(), 1 - sum(weights.values())])[0]
    if kind == "none":
        return ""
    slot = rng.choice(SLOTS)
    if kind == "again" and (known or asked):
        slot = rng.choice(sorted(known | set(asked)))
    if kind == "open":
        at = SLOTS.index(asked[-1]) if asked else rng.randrange(len(SLOTS))
        round_trip = SLOTS[at + 1 :] + SLOTS[: at + 1]
        slot = next((s for s in round_trip if s not in known), slot)
    return rng.choice(QUESTION_PHRASES[slot])


def scripted_dialogue(rng: random.Random, n_turns: int, habits: Habits = FORGETFUL) -> list[tuple[str, str]]:
    """Play a whole dialogue; returns (user text, assistant text as the policy would have to write it) per turn."""
    facts, history, turns = warmup_persona(rng), [], []
    for _ in range(n_turns):
        user = user_reply(facts, history, seed=rng.randrange(2**31))
        history.append(("user", user))
        lines, response = scripted_profile(facts, history, habits, rng), scripted_response(facts, history, habits, rng)
        history.append(("assistant", response))
        text = render_turn(lines, response)
        if rng.random() < habits.break_format:
            text = text.replace(rng.choice(("</profile>\n\n", "<response>\n", "\n</response>", "<profile>\n")), "")
        turns.append((user, text))
    return turns


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
        "python -m tiny.make", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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
        (args.out / HELDOUT_FILE).write_text("".join(heldout_lines(args.seed, 32, args.max_turns)), encoding="utf-8")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
    leave(0)
