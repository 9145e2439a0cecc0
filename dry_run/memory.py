"""What a run needs before anything is loaded: bytes per device, and tokens and calls of the whole run.

Counted, not measured: parameters from the config, activations tensor by tensor as `model.py` keeps them for the
backward, caches and workspaces from their shapes. All arguments are plain numbers, so that a program can fill them from
its flags. What is counted are torch's tensors. An allocator needs more: on a CPU the process peaked some 14 % higher.

Reading order: parameters, cache, activations, head → phases of an iteration and their peak → tokens and calls → report.
Letters: N tokens of a packed forward, D hidden, V vocabulary, I width of the MLP, K = Hkv·Dh width of keys, L layers.
`tests/test_memory.py` holds the peak against the measured one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from model import Qwen2Config

# ------------------------------------------------------------------------------------------- parts, in bytes or numbers


def trunk_parameters(config: Qwen2Config) -> int:
    """Count the parameters of embedding, layers and final norm.

    >>> trunk_parameters(Qwen2Config(10, 4, 6, 1, 1, 1))   # 40 + (2·20 + 20 + 16) + 72 + 2·4 + 4
    200
    """
    D, I, K = config.hidden_size, config.intermediate_size, kv_width(config)  # noqa: E741
    bias = config.model_type == "qwen2"
    layer = D * (D + bias) + 2 * K * (D + bias) + D * D + 3 * D * I + 2 * D
    return config.vocab_size * D + config.num_hidden_layers * layer + D


def policy_parameters(config: Qwen2Config) -> int:
    """Count the parameters of trunk and head; a tied head is the embedding."""
    return trunk_parameters(config) + (0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size)


def adapter_parameters(config: Qwen2Config, rank: int) -> int:
    """Count the numbers of A and B (LoRA) in all linear layers: rank · (in + out) of each.

    >>> adapter_parameters(Qwen2Config(10, 4, 6, 1, 1, 1), 2)   # 2 · (4 x (4 + 4) + 3 x (4 + 6))
    124
    """
    D, I, K = config.hidden_size, config.intermediate_size, kv_width(config)  # noqa: E741
    return config.num_hidden_layers * rank * (4 * D + 2 * (D + K) + 3 * (D + I))


def root_parameters(config: Qwen2Config, head: bool) -> int:
    """Count the parameters outside of the layers, which sharding gathers as one: embedding, norm and, of a policy, an
    untied head."""
    matrices = 1 + (head and not config.tie_word_embeddings)
    return matrices * config.vocab_size * config.hidden_size + config.hidden_size


def layer_parameters(config: Qwen2Config) -> int:
    """Count the parameters of one layer.

    >>> config = Qwen2Config(10, 4, 6, 1, 1, 1)
    >>> layer_parameters(config) + root_parameters(config, head=False) == trunk_parameters(config)
    True
    """
    return (trunk_parameters(config) - root_parameters(config, head=False)) // config.num_hidden_layers


def kv_width(config: Qwen2Config) -> int:
    """Give the width K of a token's keys in one layer, and of its values."""
    return config.num_key_value_heads * config.head_dim


def kv_bytes(config: Qwen2Config, rows: int, capacity: int, itemsize: int = 4) -> int:
    """Give the bytes of a `KVCache` of so many rows and slots.

    >>> kv_bytes(Qwen2Config(151_936, 2048, 11_008, 36, 16, 2), rows=1, capacity=1, itemsize=2)
    36864
    """
    return 2 * config.num_hidden_layers * rows * capacity * kv_width(config) * itemsize


def layer_bytes(config: Qwen2Config, itemsize: int = 4, fused: bool = False, rank: int = 0) -> int:
    """Give the bytes per token that one layer keeps for its backward.

    Torch paths: a norm keeps the stream in fp32, the unit row and its output (the input of the projections); the turn
    of q and of k keeps cos and sin for all channels; SDPA keeps q, k, v, its output and a log-sum-exp per head; SwiGLU
    keeps gate, silu(gate), up and its output. `fused`, the kernels: a norm keeps stream and output, SwiGLU
    recomputes silu, and the turn keeps the tables that all layers share. Adapters of a `rank` keep A x of seven layers,
    and a frozen norm no unit row.
    """
    D, I = config.hidden_size, config.intermediate_size  # noqa: E741
    norm = 2 * D * itemsize + 4 if fused else 4 * D + (1 if rank else 2) * D * itemsize + 4
    attention = (2 * D + 2 * kv_width(config)) * itemsize + 4 * config.num_attention_heads
    attention += 0 if fused else 2 * 2 * 4 * config.head_dim
    return 2 * norm + attention + (3 if fused else 4) * I * itemsize + 7 * rank * itemsize


def block_bytes(config: Qwen2Config, blocks: Sequence[tuple[int, int | None]], itemsize: int = 4) -> tuple[int, int]:
    """Give what torch's tree attention on a CPU keeps beside `layer_bytes`: bytes per layer, and of all layers' masks.

    blocks: (tokens, tokens of the trunk they follow; None: a trunk itself), as `TokenTree.layout` gives them. Each
    branch block keeps a copy of its keys and values, and all outputs are copied into one row. C++ and CUDA: nothing.
    """
    keys = sum(size + prefix for size, prefix in blocks if prefix is not None)
    outputs = sum(size for size, _ in blocks) * config.hidden_size
    masks = sum(size * (size + prefix) for size, prefix in blocks if prefix is not None)
    return (2 * keys * kv_width(config) + outputs) * itemsize, masks * itemsize


class Activations(NamedTuple):
    """Bytes that one packed forward and backward need beside weights and gradients."""

    kept: int  # when the forward is over
    start: int  # in the backward of the last layer, which comes first
    end: int  # in the backward of the first layer


def activations(
    config: Qwen2Config,
    tokens: int,
    itemsize: int = 4,
    fused: bool = False,
    checkpointing: bool = False,
    blocks: Sequence[tuple[int, int | None]] = (),
    rank: int = 0,
) -> Activations:
    """Count what a trunk keeps of N tokens; `blocks` of a CPU's tree attention, if any; `rank` of adapters, or 0.

    With `checkpointing` a layer keeps its two inputs, and the backward computes one layer at a time again. The largest
    temporaries of a backward are gradients of the MLP's inner width: two beside the kept tensors.
    """
    D, L = config.hidden_size, config.num_hidden_layers
    per_layer, masks = block_bytes(config, blocks, itemsize) if blocks else (0, 0)
    layer = tokens * layer_bytes(config, itemsize, fused, rank) + per_layer
    norm = tokens * (D * itemsize if fused else 4 * D + D * itemsize * (not rank))
    tables = tokens * 4 * config.head_dim  # cos and sin, fp32
    transient = tokens * (2 * config.intermediate_size + D) * itemsize
    if checkpointing:
        kept = L * 2 * tokens * D * itemsize + norm + tables + masks
        return Activations(kept, kept + layer + transient, layer + transient + tables + masks)
    kept = L * layer + norm + tables + masks
    return Activations(kept, kept + transient, layer + transient + tables + masks)


class Head(NamedTuple):
    """Bytes of `ppo_head`: while it runs, and what it hands to the backward."""

    running: int
    kept: int


def head_bytes(
    config: Qwen2Config, actions: int, workspace: int, itemsize: int = 4, how: str = "torch", frozen: bool = False
) -> Head:
    """Count `ppo_head` on N action tokens: workspace of logits, hidden states, and both gradients; `frozen`: of hidden.

    Sums are fp32; with half-precision inputs a second (V, D) sum and the operands of the products, half a workspace,
    come on top. `how`: by "torch" on a CPU, fp32 copies of the operands and, from the second chunk on, of the weight,
    too; "in place", in C++, the operands lie where the logits were; "cuda", neither. A `frozen` head has no gradient
    and no sum, so that the first chunk's copy of the weight counts.
    """
    V, D = config.vocab_size, config.hidden_size
    kept = (actions * D + V * D * (not frozen)) * itemsize
    logits = 4 * actions * (-(-V // 128) * 128)
    chunks, workspace = logits / workspace, min(workspace, logits)
    chunk = logits / max(1, math.ceil(chunks))  # of equal chunks; the last bytes of the workspace may be unused
    half = 4 * V * D * (not frozen) + (0 if how == "in place" else chunk // 2)
    half += 4 * V * D * (chunks > 1 or frozen) + chunk if how == "torch" else 0
    half *= itemsize != 4
    return Head(kept + half + workspace + actions * D * (4 + (0 if itemsize == 4 else itemsize)), kept)


# ------------------------------------------------------------------------------------------------ phases and their peak


@dataclass(frozen=True)
class Plan:
    """What the bytes on one device depend on, besides the model's config."""

    tokens: int = 16_384  # T: tree tokens of one forward and backward (--microbatch-tokens, or one larger dialogue)
    actions: int = 14_000  # N: sampled ids among them
    blocks: tuple[tuple[int, int | None], ...] = ()  # of torch's tree attention on a CPU; () in C++ and on CUDA
    several_microbatches: bool = True  # gradients of earlier micro-batches are there already
    cache_tokens: int = 256 * 4096  # slots of the KV cache: rows x capacity
    workspace: int = 1 << 30  # kernels.ppo_head.WORKSPACE
    compute_bytes: int = 4  # of weights and activations in products; 2 (bf16) adds a copy of the fp32 master weights
    reference: bool = True  # a frozen policy is held (--kl-coef above 0), in compute_bytes
    critic: bool = True  # False: none (--advantage rloo or grpo); neither is separate_critic then
    separate_critic: bool = True  # False: a value head on the policy's trunk
    gradients_in_rollout: bool = True  # False: the trainer frees them before it samples, as train_rlpa.py does
    fused: bool = True  # Triton kernels, or C++ for bf16
    head: str = "cuda"  # or "torch" or "in place": see `head_bytes`
    checkpointing: bool = False
    lora_rank: int = 0  # of adapters on a base that is held once, in compute_bytes; 0: all weights are trained
    shards: int = 0  # processes that share out weights, gradients and moments (--shard); 0: each holds all of them

    def resident(self, config: Qwen2Config) -> dict[str, float]:
        """Return what is there from the first optimizer step to the last."""
        policy, critic = policy_parameters(config), self.critic_parameters(config)
        if self.shards and not self.lora_rank:
            reference = policy / self.shards + root_parameters(config, head=True)  # its root stays gathered
            return {
                "policy": 4 * policy / self.shards,
                "replica": policy * self.compute_bytes,
                "critic": 4 * critic / self.shards,
                "reference": reference * self.compute_bytes * self.reference,
                "optimizer": (policy + critic) * 8 / self.shards,
            }
        copies = 4 if self.compute_bytes == 4 else 4 + self.compute_bytes
        base, (own, critic) = policy * self.compute_bytes, self.trained_parameters(config)
        if self.shards:
            base -= self.compute_bytes * layers_elsewhere(config, self.shards)
        return {
            "policy": own * copies + base * bool(self.lora_rank),
            "critic": critic * copies,
            "reference": base * self.reference * (not self.lora_rank),
            "optimizer": (own + critic) * 8,  # AdamW's two moments in fp32
        }

    def trained_parameters(self, config: Qwen2Config) -> tuple[int, int]:
        """Count the numbers that policy and critic train."""
        if not self.lora_rank:
            return policy_parameters(config), self.critic_parameters(config)
        adapter = adapter_parameters(config, self.lora_rank)
        return adapter, adapter * self.separate_critic + config.hidden_size * self.critic

    def critic_parameters(self, config: Qwen2Config) -> int:
        """Count the critic's own parameters."""
        return config.hidden_size * self.critic + (trunk_parameters(config) if self.separate_critic else 0)

    def value_bytes(self, config: Qwen2Config) -> int:
        """Count the fp32 copy of hidden states that the value head keeps if they are bf16: of all tokens by a trunk of
        its own, of action tokens by a shared one."""
        rows = self.tokens if self.separate_critic else self.actions * self.critic
        return 4 * rows * config.hidden_size * (self.compute_bytes != 4)


def layers_elsewhere(config: Qwen2Config, shards: int) -> float:
    """Count the numbers of all layers that a process has not, of `shards` that share them out."""
    return config.num_hidden_layers * layer_parameters(config) * (1 - 1 / shards)


def phases(config: Qwen2Config, plan: Plan) -> dict[str, dict[str, float]]:
    """Return the bytes of each phase of an iteration at its fullest moment, part by part.

    A backward is fullest at its start (all activations, no gradients yet) or in its last layer (all gradients); in
    between the sum moves evenly from one to the other. Or at its very end, when the embedding's gradient comes on top
    of one that is there already: a tied head's, an earlier micro-batch's. Gradients are summed in fp32.
    """
    if plan.shards and not plan.lora_rank:
        return sharded_phases(config, plan)
    resident, c, earlier = plan.resident(config), plan.compute_bytes, plan.several_microbatches
    policy, critic = (4 * n for n in plan.trained_parameters(config))
    kept, start, end = activations(config, plan.tokens, c, plan.fused, plan.checkpointing, plan.blocks, plan.lora_rank)
    head = head_bytes(config, plan.actions, plan.workspace, c, plan.head, frozen=bool(plan.lora_rank))
    values, tied = plan.value_bytes(config), config.tie_word_embeddings
    embedding = config.vocab_size * config.hidden_size * (not plan.lora_rank)  # whose gradient there is
    cache = kv_bytes(config, 1, plan.cache_tokens, c)
    late = 4 * embedding * (not earlier)  # a gradient that does not exist before the very end
    both = policy + critic
    before, policys = both * earlier, policy + critic * earlier
    moved = (4 - c) * embedding * (not earlier and not tied)  # an untied head's gradient is summed at once
    on_trunk = 0 if plan.separate_critic else values
    phase = {
        "rollout": {"gradients": both * plan.gradients_in_rollout, "KV cache": cache},
        "policy's head": {"gradients": before, "activations": kept, "head": head.running},
        "policy's last layer": {"gradients": before + moved, "activations": start + on_trunk, "head": head.kept},
        "policy's first layer": {"gradients": policys - late, "activations": end, "head": c * embedding * tied},
        "policy's gradients": {"gradients": policys, "head": embedding_sums(embedding, c, earlier, tied)},
    }
    if plan.separate_critic:
        phase["critic's last layer"] = {"gradients": policys, "activations": start + values}
        phase["critic's first layer"] = {"gradients": both - late, "activations": end}
        phase["critic's gradients"] = {"gradients": both, "head": embedding_sums(embedding, c, earlier, False)}
    phase["optimizer's step"] = {"gradients": both}
    if plan.shards:  # of adapters' base one matrix at a time is gathered, and for a rollout all of it
        one = dict.fromkeys(phase, c * config.hidden_size * config.intermediate_size)
        for name, nbytes in (one | {"rollout": c * layers_elsewhere(config, plan.shards)}).items():
            phase[name]["gathered"] = nbytes
    return {name: resident | parts for name, parts in phase.items()}


def sharded_phases(config: Qwen2Config, plan: Plan) -> dict[str, dict[str, float]]:
    """Return what `phases` does, of models that are shared out.

    Gathered are: the root of the trunk that works, from its forward to the end of its backward; in a backward two
    layers, of which one is fetched ahead, and the gradients of one, once more in fp32 on their way to its owners; at
    the end the root's gradients likewise. While the replica is refreshed, one matrix.
    """
    resident, c, earlier, W = plan.resident(config), plan.compute_bytes, plan.several_microbatches, plan.shards
    policy, critic = (4 * n / W for n in (policy_parameters(config), plan.critic_parameters(config)))
    kept, start, end = activations(config, plan.tokens, c, plan.fused, plan.checkpointing, plan.blocks)
    head, values = head_bytes(config, plan.actions, plan.workspace, c, plan.head), plan.value_bytes(config)
    root, critic_root = c * root_parameters(config, head=True), c * root_parameters(config, head=False)
    embedding = config.vocab_size * config.hidden_size
    layers = layer_parameters(config) * (2 * c + c + 4)
    before, policys, both = (policy + critic) * earlier, policy + critic * earlier, policy + critic
    head_gradient = c * embedding  # kept from the loss to the end of the backward
    on_trunk = 0 if plan.separate_critic else values

    def end_of(root: float) -> float:
        return root + root + root / c * 4 + head_gradient

    phase = {
        "rollout": {"KV cache": kv_bytes(config, 1, plan.cache_tokens, c)},
        "policy's head": {"gradients": before, "activations": kept, "head": head.running, "gathered": root},
        "policy's last layer": {
            "gradients": before, "activations": start + on_trunk, "head": head.kept, "gathered": root + layers,
        },
        "policy's first layer": {
            "gradients": policys, "activations": end, "head": head_gradient, "gathered": root + layers,
        },
        "policy's gradients": {"gradients": policys, "gathered": end_of(root)},
    }  # fmt: skip
    if plan.separate_critic:
        phase["critic's last layer"] = {
            "gradients": policys, "activations": start + values, "gathered": critic_root + layers,
        }  # fmt: skip
        phase["critic's first layer"] = {"gradients": both, "activations": end, "gathered": critic_root + layers}
        phase["critic's gradients"] = {"gradients": both, "gathered": end_of(critic_root)}
    phase["optimizer's step"] = {"gradients": both}
    phase["replica's refresh"] = {"gathered": c * embedding * (1 + 1 / W)}
    return {name: resident | parts for name, parts in phase.items()}


def embedding_sums(elements: int, itemsize: int, earlier: bool, tied: bool) -> int:
    """Give the bytes beside all gradients while the embedding's is summed: its lookup's and a tied head's, an earlier
    micro-batch's. In fp32 the first one becomes the gradient itself; in half precision it is copied to fp32."""
    return elements * itemsize * (tied + earlier if itemsize == 4 else 1 + (tied and earlier))


def peak(config: Qwen2Config, plan: Plan) -> tuple[str, float]:
    """Return the fullest phase and its bytes."""
    sums = {name: sum(parts.values()) for name, parts in phases(config, plan).items()}
    return max(sums.items(), key=lambda item: item[1])


# ---------------------------------------------------------------------------------------------------- tokens and calls


def causal_pairs(start: int, length: int) -> int:
    """Count (query, key) pairs of `length` tokens that follow `start` others: each sees those, itself and its own past.

    >>> causal_pairs(2, 3)
    12
    """
    return length * start + length * (length + 1) // 2


class Work(NamedTuple):
    """Tokens of one dialogue, and (query, key) pairs of its attention."""

    prefilled: int  # computed before sampling
    decoded: int  # sampled
    trained: int  # in one forward of the update
    prefill_pairs: int
    decode_pairs: int
    train_pairs: int


def tree_work(system: int, user: Sequence[int], reply: Sequence[int], n: int) -> Work:
    """Count a dialogue whose every token is computed once: KV kept over turns, candidates as branches of one tree.

    system: tokens before the first user message. user, reply: per turn, tokens that the prompt grows by (message and
    ChatML seams) and tokens of one sampled candidate. A winner's last id is prefilled with the next message.

    >>> tree_work(10, [5, 5], [20, 30], n=4)[:3]   # 10 + 5 + (1 + 5); 4·50; 10 + 10 + 200
    (21, 200, 220)
    """
    prefilled = decoded = prefill_pairs = decode_pairs = 0
    depth, new = 0, system
    for message, length in zip(user, reply, strict=True):
        new += message
        prefilled, prefill_pairs = prefilled + new, prefill_pairs + causal_pairs(depth, new)
        depth += new
        decoded, decode_pairs = decoded + n * length, decode_pairs + n * causal_pairs(depth, length)
        depth, new = depth + length - 1, 1
    prompt = system + sum(user)
    # The update's forward sees what sampling saw, but a winner's last id once, not twice.
    again = sum(causal_pairs(system + sum(user[: t + 1]) + sum(reply[: t + 1]) - 1, 1) for t in range(len(user) - 1))
    pairs = prefill_pairs + decode_pairs - again
    return Work(prefilled, decoded, prompt + decoded, prefill_pairs, decode_pairs, pairs)


def trunk_flops(config: Qwen2Config, tokens: float, pairs: float) -> float:
    """Return the FLOP of a trunk's forward: 2 per weight and token, and 4D per layer and pair of its attention."""
    D, L = config.hidden_size, config.num_hidden_layers
    return 2 * (trunk_parameters(config) - config.vocab_size * D) * tokens + 4 * L * D * pairs


def update_flops(config: Qwen2Config, tokens: float, actions: float, pairs: float, separate_critic: bool) -> float:
    """Return the model's FLOP of one epoch's update: forward and backward, three times a forward, of all trunks, and
    the head's on action tokens. What checkpointing computes again does not count.

    >>> update_flops(Qwen2Config(10, 4, 6, 1, 1, 1), 1, 0, 0, False)   # 6 x (200 parameters - the embedding's 40)
    960
    >>> update_flops(Qwen2Config(10, 4, 6, 1, 1, 1), 1, 1, 1, True)   # 2 x (960 + 12 x 4) + 6 x 40
    2256
    """
    head = 2 * config.vocab_size * config.hidden_size * actions
    return 3 * ((1 + separate_critic) * trunk_flops(config, tokens, pairs) + head)


PEAK_FLOPS = {  # dense bf16 FLOP/s of makers' data sheets, by part of torch's device name; the first match holds
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def peak_flops(card: str) -> float | None:
    """Return a card's peak rate in bf16 products; None if it is not in the table.

    >>> peak_flops("NVIDIA H100 80GB HBM3"), peak_flops("NVIDIA H100 PCIe"), peak_flops("")
    (989000000000000.0, 756000000000000.0, None)
    """
    return next((peak for name, peak in PEAK_FLOPS.items() if name in card), None)


def calls(personas: int, turns: int, n: int, judge_calls: int = 2, fixed_opener: bool = True) -> tuple[int, int]:
    """Count the replies asked of the simulator and of the judge in one pass over the personas.

    judge_calls: per candidate (published: profile and response; 0: by rule). A fixed opener asks nobody.

    >>> calls(3821, 10, 4)
    (34389, 305680)
    """
    return personas * (turns - fixed_opener), personas * turns * n * judge_calls


# --------------------------------------------------------------------------------------------------------------- report

ADVICE = {
    "KV cache": "lower --decode-batch-size (or --max-new-tokens, --max-turns)",
    "activations": "lower --microbatch-tokens (one dialogue is never cut: or --max-new-tokens, --max-turns)",
    "head": "lower --microbatch-tokens",
    "reference": "--kl-coef 0 drops the reference policy",
    "policy": "take a smaller --ckpt",
}


def remedy(part: str, plan: Plan) -> str:
    """Say which flag makes a part smaller.

    >>> remedy("optimizer", Plan()), remedy("optimizer", Plan(separate_critic=False))
    ("--critic shared drops the critic's trunk", '--lora-rank 16, --shard over several GPUs, or a smaller --ckpt')
    """
    if part == "activations" and not plan.checkpointing:
        return "give --checkpointing, or lower --microbatch-tokens"
    if part in ("optimizer", "gradients", "critic") and plan.separate_critic and not plan.lora_rank:
        return "--critic shared drops the critic's trunk"
    if part in ("policy", "critic", "optimizer", "gradients") and plan.shards:
        return "--nproc-per-node with more GPUs makes each one's share smaller"
    if part in ("policy", "critic", "optimizer", "gradients") and not plan.lora_rank:
        return "--lora-rank 16, --shard over several GPUs, or a smaller --ckpt"
    return ADVICE.get(part, ADVICE["policy"])


def shown(nbytes: float) -> str:
    """Write bytes in GB, or in MB where there is less than one.

    >>> shown(2.34e9), shown(5e6)
    ('2.3 GB', '5.0 MB')
    """
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def advice(config: Qwen2Config, plan: Plan, memory: float, margin: float = 0.1) -> str:
    """Say in one sentence whether the plan fits into `memory` bytes, and what to change if not.

    margin: what the allocator and the device's context take on top, as a share of the peak.
    """
    name, need = peak(config, plan)
    if need * (1 + margin) <= memory:
        return f"fits {shown(memory)}: the peak is {shown(need)}, in {name}"
    parts, room = phases(config, plan)[name], memory / (1 + margin)
    flexible = {"KV cache", "activations"} & parts.keys()
    # a batch size can only give back what it takes: where the rest is too much already, it is no help
    helps = [part for part in flexible if need - parts[part] < room]
    part = max(helps or parts.keys() - flexible, key=lambda key: parts[key])
    needs = f"{shown(need)} and {margin:.0%} for the allocator, {shown(parts[part])} of it {part}"
    return f"does not fit {shown(memory)}: {name} needs {needs}; {remedy(part, plan)}"


def table(rows: dict[str, dict[str, float]], columns: Sequence[str]) -> str:
    """Lay out rows of bytes under named columns, aligned, with a total."""
    totals = {name: sum(parts.values()) for name, parts in rows.items()}
    unit, size = ("GB", 1e9) if max(totals.values()) >= 1e9 else ("MB", 1e6)
    lines = [f"{unit + ' per device':20s}" + "".join(f"{column:>12s}" for column in (*columns, "total"))]
    for name, parts in rows.items():
        cells = [parts.get(column, 0) for column in columns] + [totals[name]]
        lines.append(f"{name:20s}" + "".join(f"{cell / size:12.2f}" for cell in cells))
    return "\n".join(lines)


def report(
    config: Qwen2Config,
    plan: Plan,
    memory: float,
    work: Work | None = None,
    personas: int = 0,
    call_counts: tuple[int, int] = (0, 0),
) -> str:
    """Write bytes per phase, whether they fit, and, given a dialogue's work, tokens and calls of the run."""
    columns = ["policy", "critic", "reference", "optimizer", "gradients", "activations", "head", "KV cache"]
    columns += ["replica", "gathered"] if plan.shards else []
    lines = [table(phases(config, plan), columns), advice(config, plan, memory)]
    if work:
        counts = {name: personas * getattr(work, name) for name in ("prefilled", "decoded", "trained")}
        lines.append("tokens of the run: " + ", ".join(f"{count:,} {name}" for name, count in counts.items()))
        lines.append(f"calls of the run: {call_counts[0]:,} to the simulator, {call_counts[1]:,} to the judge")
    return "\n".join(lines)


def microbatch(work: Work, microbatch_tokens: int, minibatch: int) -> tuple[int, int, bool]:
    """Return tokens and actions of the largest micro-batch, and whether a mini-batch of dialogues has several.

    >>> microbatch(Work(0, 7000, 8000, 0, 0, 0), microbatch_tokens=16_384, minibatch=4)
    (16000, 14000, True)
    """
    dialogues = math.ceil(minibatch / math.ceil(minibatch * work.trained / microbatch_tokens))
    return dialogues * work.trained, dialogues * work.decoded, dialogues < minibatch
