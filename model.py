"""Qwen-2.5 by hand: modules, a KV cache, its sampler, a critic, and Hugging Face safetensors in and out.

Parameter names and shapes are Hugging Face's: weights load without a map, and a save loads in `transformers` and vLLM.
Left out, and refused by name when a config asks for it: RoPE scaling, sliding windows, other activations. There is no
top-k or top-p: while training data is collected, the sampled distribution must be the policy itself.

Reading order: config, norm, rotary positions, attention, MLP, trunk, policy, critic, cache, sampler, checkpoints.
Shapes: B dialogues (rows), T padded tokens, S cache slots read, R = B*n sampled rows, D hidden, H/Hkv heads, Dh head
dim, V vocabulary. On a CPU everything is fp32. Tests: `pytest tests/test_model.py tests/test_sampler.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from copy import copy
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.backend import use_triton
from kernels.decode_attention import decode_attention
from kernels.prefix import Prefix, membership
from kernels.rmsnorm import rmsnorm
from kernels.rope import real_tokens, rope, rope_into_cache
from kernels.sample_head import draw_uniforms, sample_head
from kernels.swiglu import swiglu
from kernels.tree_attention import Tree, tree_attention

try:  # an optional extra for CUDA machines, never required
    from flash_attn import flash_attn_func
except ImportError:
    flash_attn_func = None


# ----------------------------------------------------------------------------------------------------------- config

IMPLEMENTED = {"model_type": "qwen2", "hidden_act": "silu", "use_sliding_window": False}


@dataclass(frozen=True)
class Qwen2Config:
    """Hold the fields of a Qwen-2.5 `config.json`, under their Hugging Face names.

    >>> Qwen2Config(1280, 96, 256, num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=1).head_dim
    32
    """

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # width of the MLP
    num_hidden_layers: int
    num_attention_heads: int  # H
    num_key_value_heads: int  # Hkv; each serves H / Hkv query heads
    max_position_embeddings: int = 32768  # tokens
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02  # standard deviation of freshly drawn weights
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        H, Hkv = self.num_attention_heads, self.num_key_value_heads
        if min(H, Hkv) < 1 or H % Hkv:
            raise ValueError(f"num_attention_heads is {H}; it must be a multiple of num_key_value_heads, {Hkv}")
        if self.hidden_size % (2 * H):
            raise ValueError(f"hidden_size is {self.hidden_size}; it must give {H} heads an even width each")

    @property
    def head_dim(self) -> int:
        """Give the width Dh of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, d: dict) -> Qwen2Config:
        """Read a parsed `config.json`; raise ValueError for what this file does not implement."""
        given = {"model_type": None, "rope_theta": 10_000.0}  # what Hugging Face assumes when they are absent
        given |= (d.get("rope_parameters") or {}) | d  # transformers >= 5 nests rope_theta and rope_type
        for name, value in {**IMPLEMENTED, "rope_scaling": None, "rope_type": "default"}.items():
            if given.get(name, value) != value:
                raise ValueError(f"{name} is {given[name]!r}; only {value!r} is implemented")
        try:
            config = cls(**{field.name: given[field.name] for field in fields(cls) if field.name in given})
        except TypeError as error:  # a key is absent or not a number
            raise ValueError(f"not a Qwen-2.5 config.json: {error}") from None
        if given.get("head_dim") not in (None, config.head_dim):
            raise ValueError(f"head_dim is {given['head_dim']}; only hidden_size / num_attention_heads is implemented")
        return config

    @classmethod
    def from_file(cls, path: str | Path) -> Qwen2Config:
        """Read `config.json` itself or the folder that holds it; raise ValueError naming the file."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(f"cannot read {path}: {error}") from None

    def to_dict(self) -> dict:
        """Give the content of a `config.json` that `transformers` and vLLM load."""
        return {**IMPLEMENTED, **asdict(self)}


# ------------------------------------------------------------------------------------------------------------ layers


class RMSNorm(nn.Module):
    """Add to the residual stream, and scale by the root mean square: y = weight * x / sqrt(mean(x^2) + eps)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Give the norm of x + delta (..., dim), and x + delta itself: the stream that goes on."""
        if delta is None:
            return rmsnorm(x, self.weight, self.eps), x
        return rmsnorm(delta, self.weight, self.eps, residual=x)


def rope_tables(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Give cos and sin of the rotation angles, (B, T, 1, Dh/2) fp32, one frequency per pair of channels.

    angle[p, i] = p * theta^(-2i / Dh)   (RoFormer, arXiv:2104.09864 eq. 15). Computed per forward: no table to store,
    no longest position to guess.
    """
    channels = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device)
    angles = position_ids[:, :, None, None].float() * (1.0 / theta ** (channels / head_dim))
    return angles.cos(), angles.sin()


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Tree | None) -> Tensor:
    """Attend with queries (B, H, T, Dh) to keys and values (B, Hkv, S, Dh); mask None is causal; give (B, H, T, Dh)."""
    if isinstance(mask, Tree):
        return tree_attention(q, k, v, mask)
    if flash_attn_func and mask is None and q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        return flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=True).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and Qwen's biases on q, k and v."""

    def __init__(self, config: Qwen2Config, layer_idx: int) -> None:
        super().__init__()
        D, kv_width = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(D, D)
        self.k_proj = nn.Linear(D, kv_width)
        self.v_proj = nn.Linear(D, kv_width)
        self.o_proj = nn.Linear(D, D, bias=False)
        self.head_dim, self.layer_idx = config.head_dim, layer_idx

    def forward(
        self, x: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor | Tree | None, cache: KVCache | None, slots: Slots
    ) -> Tensor:
        """Mix the tokens of x (B, T, D); with a cache, store the new keys and attend to all of the row's."""
        B, T, D = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)  # (B, T, H, Dh)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)  # (B, T, Hkv, Dh)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)
        if cache is None:
            q, k = rope(q, k, *tables)
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        else:
            q, k, v = cache.write(self.layer_idx, q, k, v, tables, slots)  # k, v (B, Hkv, S, Dh)
        if cache is not None and T == 1:
            out = decode_attention(q[:, 0], k, v, slots.lengths, cache.shared(self.layer_idx))  # (B, H, Dh)
        else:
            out = attend(q.transpose(1, 2), k, v, mask).transpose(1, 2)  # (B, T, H, Dh)
        return self.o_proj(out.reshape(B, T, D))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        D, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, inner, bias=False)
        self.up_proj = nn.Linear(D, inner, bias=False)
        self.down_proj = nn.Linear(inner, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (..., D)
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class DecoderLayer(nn.Module):
    """Attention, then the MLP, each fed a normed copy of the residual stream and added to it.

    An addition and the norm of its sum are one kernel, so what the MLP adds is handed on with the stream, unadded.
    """

    def __init__(self, config: Qwen2Config, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer_idx)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        delta: Tensor | None,
        tables: tuple[Tensor, Tensor],
        mask: Tensor | Tree | None,
        cache: KVCache | None,
        slots: Slots,
    ) -> tuple[Tensor, Tensor]:
        """Give the stream x (B, T, D) and the next delta to it; delta None: there is none yet."""
        normed, x = self.input_layernorm(x, delta)
        normed, x = self.post_attention_layernorm(x, self.self_attn(normed, tables, mask, cache, slots))
        return x, self.mlp(normed)


# ------------------------------------------------------------------------------------------- trunk, policy and critic


class Qwen2Model(nn.Module):
    """The trunk that policy and critic share in kind: embedding, decoder layers, final norm."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.checkpointing = False  # keep each layer's input only, and compute the layer again in the backward

    def forward(
        self,
        token_ids: Tensor,
        position_ids: Tensor | None = None,
        tree: Tree | None = None,
        cache: KVCache | None = None,
        new_lengths: Tensor | None = None,
    ) -> Tensor:
        """Give hidden states after the final norm, (B, T, D), for token_ids (B, T) long.

        Rows are right-padded. Without a cache attention is causal, so that padding at the end of a row is harmless; or
        the one row (B = 1) holds token trees, and `tree` says who sees whom (then give position_ids (1, T) too). With a
        cache, row b's first new_lengths[b] tokens (default T) continue what the cache holds: their keys are stored and
        `cache.lengths` grows. Raises ValueError on other shapes or a full cache.
        """
        if token_ids.dim() != 2:
            raise ValueError(f"token_ids must be (B, T), got {tuple(token_ids.shape)}")
        B, T = token_ids.shape
        if tree is not None and (cache is not None or position_ids is None):
            raise ValueError("a tree needs position_ids, and excludes a cache: a cached row is a plain sequence")
        if position_ids is not None and position_ids.shape != (B, T):
            raise ValueError(f"position_ids must be {(B, T)}, got {tuple(position_ids.shape)}")

        slots = None if cache is None else cache.reserve(B, T, new_lengths)
        mask = tree if slots is None else slots.mask
        if position_ids is None:
            arange = torch.arange(T, device=token_ids.device).expand(B, T)
            position_ids = arange if slots is None else slots.position_ids
        tables = rope_tables(position_ids, self.config.head_dim, self.config.rope_theta)
        x, delta = self.embed_tokens(token_ids), None  # (B, T, D)
        again = self.checkpointing and torch.is_grad_enabled() and cache is None
        for layer in self.layers:
            inputs = (x, delta, tables, mask, cache, slots)
            x, delta = checkpoint(layer, *inputs, use_reentrant=False) if again else layer(*inputs)
        if cache is not None:
            cache.lengths = slots.lengths
        return self.norm(x, delta)[0]


class Qwen2ForCausalLM(nn.Module):
    """The policy: a trunk and a head, which is the embedding itself when `tie_word_embeddings`."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.config = config
        self.model = Qwen2Model(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, token_ids: Tensor, *args, **kwargs) -> Tensor:
        """Give hidden states (B, T, D), arguments as `Qwen2Model.forward`; the head is the caller's.

        Training never builds [tokens, V] logits, and sampling needs them for a row's last token only.
        """
        return self.model(token_ids, *args, **kwargs)

    @property
    def head_weight(self) -> Tensor:
        """Give the head's weight (V, D)."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Give logits (..., V) fp32 of hidden (..., D); half-precision products are not rounded on the way."""
        weight = self.head_weight
        if weight.dtype == torch.float32:
            return F.linear(hidden, weight)
        if not weight.is_cuda:
            return F.linear(hidden.float(), weight.float())
        flat = torch.mm(hidden.reshape(-1, hidden.shape[-1]), weight.T, out_dtype=torch.float32)
        return flat.view(*hidden.shape[:-1], -1)


class Critic(nn.Module):
    """The value function: a trunk of its own and a bias-free head from D to one value per token."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.config = config
        self.model = Qwen2Model(config)
        self.value_head = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, token_ids: Tensor, *args, **kwargs) -> Tensor:
        """Give values (B, T) fp32: the return expected after each token; arguments as `Qwen2Model.forward`."""
        hidden = self.model(token_ids, *args, **kwargs)  # (B, T, D)
        return F.linear(hidden.float(), self.value_head.weight.float()).squeeze(-1)

    @classmethod
    def from_policy(cls, policy: Qwen2ForCausalLM, seed: int = 0) -> Critic:
        """Copy the policy's trunk; draw the value head from N(0, std 1 / (D + 1)), so that first values are near 0."""
        with torch.device("meta"):
            critic = cls(policy.config)
        critic.model.load_state_dict({k: v.detach().clone() for k, v in policy.model.state_dict().items()}, assign=True)
        D, like = policy.config.hidden_size, policy.head_weight
        head = torch.randn(1, D, generator=torch.Generator().manual_seed(seed)) / (D + 1)
        critic.value_head.weight = nn.Parameter(head.to(like.device, like.dtype))
        return critic


def random_policy(config: Qwen2Config, seed: int) -> Qwen2ForCausalLM:
    """Draw a fresh policy: weights N(0, initializer_range), biases 0, norms 1; the same seed gives the same weights."""
    with torch.device("meta"):
        policy = Qwen2ForCausalLM(config)
    policy.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 1:  # a norm's scale
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, config.initializer_range, generator=generator)
    return policy


# ---------------------------------------------------------------------------------------------------------- KV cache


class Slots(NamedTuple):
    """Where one forward's tokens go in the cache, worked out once for all layers."""

    new_lengths: Tensor  # (B,) long: real tokens per row; the rest is padding
    lengths: Tensor  # (B,) long: tokens stored per row afterwards
    position_ids: Tensor  # (B, T) long: a token's position in its dialogue
    slot_ids: Tensor  # (B, T) long: its slot in the row; the position, less the tokens of a shared prefix
    mask: Tensor | None  # (B, 1, T, S) bool: True = may attend; None: causal
    real: tuple[Tensor, Tensor, Tensor]  # row, column and slot (N,) of each token that is not padding
    longest: int  # S: slots in use in the longest row afterwards


class KVCache:
    """Keys and values of B right-padded rows, per layer (B, Hkv, capacity, Dh).

    `lengths` (B,) long counts the tokens stored per row, one after another from slot 0. Slots past a row's length may
    hold stale numbers: masks hide them, later tokens overwrite them.

    `branch` gives a second cache for n candidates of each row: it holds their own tokens, and the row itself, stored
    once, is their prefix. `adopt` appends a candidate's tokens to the row, and the others are forgotten.
    """

    prefix: KVCache | None = None  # the cache whose rows this one's continue
    owner: Tensor | None = None  # (B,) long, ascending: which of them

    def __init__(
        self,
        config: Qwen2Config,
        batch_size: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        shape = (batch_size, config.num_key_value_heads, capacity, config.head_dim)
        # Zeros, not empty: a masked slot has weight 0, but 0 * NaN would be NaN.
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.capacity = capacity

    @property
    def nbytes(self) -> int:
        """Give the bytes held by keys and values."""
        return sum(t.nbytes for t in self.keys + self.values)

    def room_for(self, new_lengths: Tensor, later: int = 0) -> int:
        """Give the tokens of the longest row after new_lengths (B,) and `later` more; ValueError if it does not fit."""
        if len(new_lengths) != len(self.lengths):
            raise ValueError(f"the KV cache has {len(self.lengths)} rows, the batch {len(new_lengths)}")
        longest = int((self.lengths + new_lengths).max()) + later
        if longest > self.capacity:
            raise ValueError(
                f"{longest} tokens are needed in a row, the KV cache's capacity is {self.capacity}; "
                f"lower --max-new-tokens or --max-turns, or build the cache larger"
            )
        return longest

    def reserve(self, B: int, T: int, new_lengths: Tensor | None) -> Slots:
        """Place T more columns behind what each row holds; row b uses the first new_lengths[b] of them (default T)."""
        device = self.lengths.device
        if new_lengths is None:
            new_lengths = torch.full((B,), T, device=device)
        longest = self.room_for(new_lengths)
        columns = torch.arange(T, device=device)
        slot_ids = position_ids = self.lengths[:, None] + columns  # (B, T)
        if self.prefix is not None:
            if T > 1:
                raise ValueError(f"{T} tokens at once for rows with a shared prefix; they take one at a time")
            position_ids = slot_ids + self.prefix.lengths[self.owner][:, None]
        mask = None  # causal: one token has nothing to hide, and a first chunk is a plain sequence
        if T > 1 and self.lengths.any():
            mask = torch.arange(longest, device=device) <= slot_ids[:, None, :, None]  # (B, 1, T, S)
        lengths, real = self.lengths + new_lengths, real_tokens(slot_ids, new_lengths)
        return Slots(new_lengths, lengths, position_ids, slot_ids, mask, real, longest)

    def write(
        self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, tables: tuple[Tensor, Tensor], slots: Slots
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Store the real tokens of k and v (B, T, Hkv, Dh), k turned by the tables' angles.

        Give q (B, T, H, Dh), turned too, and views (B, Hkv, S, Dh) of all keys and values that are stored.
        """
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        q = rope_into_cache(q, k, v, *tables, keys, values, slots.slot_ids, slots.new_lengths, slots.real)
        return q, keys[:, :, : slots.longest], values[:, :, : slots.longest]

    def branch(self, n: int, capacity: int) -> KVCache:
        """Give an empty cache for n continuations of each row, candidate c of row b at b * n + c."""
        B, Hkv, _, Dh = self.keys[0].shape
        branches = copy(self)
        branches.keys = [keys.new_zeros(n * B, Hkv, capacity, Dh) for keys in self.keys]
        branches.values = [values.new_zeros(n * B, Hkv, capacity, Dh) for values in self.values]
        branches.lengths, branches.capacity = self.lengths.new_zeros(n * B), capacity
        branches.follow(self, torch.arange(B, device=self.lengths.device).repeat_interleave(n), n)
        return branches

    def follow(self, prefix: KVCache, owner: Tensor, n: int) -> None:
        """Make row r a continuation of row owner[r] of the prefix, which has at most n."""
        self.prefix, self.owner = prefix, owner
        self.membership = membership(owner, len(prefix.lengths), n)
        self.prefix_longest = int(prefix.lengths.max())  # once: the host waits for it

    def shared(self, layer_idx: int) -> Prefix | None:
        """Give what the rows share in this layer; None without a prefix."""
        if self.prefix is None:
            return None
        keys, values = self.prefix.keys[layer_idx], self.prefix.values[layer_idx]
        S = self.prefix_longest
        return Prefix(keys[:, :, :S], values[:, :, :S], self.prefix.lengths, *self.membership)

    def adopt(self, branches: KVCache, rows: Tensor) -> None:
        """Append to each row b what row rows[b] of its branches holds; ValueError if it does not fit."""
        counts = branches.lengths[rows]
        self.room_for(counts)
        slot_ids = self.lengths[:, None] + torch.arange(int(counts.max()), device=rows.device)
        to, columns, slots = real_tokens(slot_ids, counts)  # (N,) each
        for mine, theirs in zip(self.keys + self.values, branches.keys + branches.values, strict=True):
            mine[to, :, slots] = theirs[rows[to], :, columns]
        self.lengths = self.lengths + counts

    def select(self, rows: Tensor, lengths: Tensor | None = None, capacity: int | None = None) -> None:
        """Keep these rows (R,), in this order; all of them, in their own order, are kept without being copied.

        `lengths` (R,) cuts each kept row to so many tokens; ValueError if a row holds fewer. `capacity` makes the cache
        that large at least; ValueError if a kept row does not fit.
        """
        kept = self.lengths[rows]
        if lengths is not None and bool(((lengths < 0) | (lengths > kept)).any()):
            raise ValueError(f"cannot cut rows of {kept.tolist()} tokens to {lengths.tolist()}")
        lengths = kept if lengths is None else lengths.to(kept)
        longest, capacity = max(lengths.tolist(), default=0), capacity or self.capacity
        if longest > capacity:
            raise ValueError(f"a kept row has {longest} tokens, the capacity asked for is {capacity}")
        everything = torch.arange(len(self.lengths), device=rows.device)
        if capacity <= self.capacity and torch.equal(rows, everything):
            self.lengths = lengths
            return
        self.lengths, self.capacity = lengths, capacity
        for tensors in (self.keys, self.values):
            for layer_idx, old in enumerate(tensors):  # layer by layer: the old tensor is released before the next
                tensors[layer_idx] = old.new_zeros(len(rows), old.shape[1], capacity, old.shape[3])
                torch.index_select(old[:, :, :longest], 0, rows, out=tensors[layer_idx][:, :, :longest])

    def take(self, rows: Tensor) -> KVCache:
        """Give a second cache that holds copies of these rows; of a prefix too once half of its rows are not needed."""
        taken = copy(self)
        taken.keys, taken.values = list(self.keys), list(self.values)
        taken.select(rows)
        if self.prefix is not None:
            alive, owner = self.owner[rows].unique(return_inverse=True)
            n = self.membership[0].shape[1]
            if 2 * len(alive) <= len(self.prefix.lengths):
                taken.follow(self.prefix.take(alive), owner, n)
            else:
                taken.follow(self.prefix, self.owner[rows], n)
        return taken

    def put(self, rows: Tensor, other: KVCache) -> None:
        """Overwrite these rows by those of another cache."""
        longest = int(other.lengths.max())
        for mine, theirs in zip(self.keys + self.values, other.keys + other.values, strict=True):
            mine[:, :, :longest].index_copy_(0, rows, theirs[:, :, :longest])
        self.lengths[rows] = other.lengths

    def free(self) -> None:
        """Release the memory; the cache then has no rows."""
        self.keys, self.values, self.lengths = [], [], self.lengths[:0]


# ----------------------------------------------------------------------------------------------------------- sampler


@dataclass
class Samples:
    """What `generate` sampled, one entry per row; candidate c of prompt b is row b * n + c."""

    token_ids: list[list[int]]  # sampled ids, the stop id included
    logprobs: list[list[float]]  # nats, of each sampled id
    lengths: list[int]  # sampled tokens
    stop_reasons: list[str]  # "stop": a stop id was sampled; "length": max_new_tokens were
    branches: KVCache | None  # with n > 1, the candidates' own tokens, for `KVCache.adopt`


def row_seeds(rows: int, seeds: Sequence[int] | None) -> list[int]:
    """Give one seed per row: those given, or new ones off torch's global generator; ValueError for another number."""
    if seeds is None:
        return torch.randint(2**31, (rows,)).tolist()
    if len(seeds) != rows:
        raise ValueError(f"{len(seeds)} seeds for {rows} sampled rows; give one per row, B * n in all")
    return list(seeds)


def pad(rows: list[list[int]], vocab_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-pad id lists into (B, T) long and their lengths (B,); ValueError for an empty row or a foreign id."""
    if not rows or not all(rows):
        raise ValueError("every row needs at least one new id: the next token is predicted from the last one")
    low, high = min(map(min, rows)), max(map(max, rows))
    if low < 0 or high >= vocab_size:
        raise ValueError(f"id {low if low < 0 else high} is outside the model's vocabulary of {vocab_size}")
    token_ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for row, ids in zip(token_ids, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return token_ids.to(device), torch.tensor([len(ids) for ids in rows], device=device)


@torch.no_grad()
def generate(
    model: Qwen2ForCausalLM,
    cache: KVCache,
    new_ids: list[list[int]],
    *,
    n: int = 1,
    max_new_tokens: int,
    stop_ids: Collection[int],
    temperature: float = 1.0,
    seeds: Sequence[int] | None = None,
) -> Samples:
    """Extend a cache of B rows by new_ids, then sample n continuations of each row.

    Only new_ids are computed: the cache keeps what earlier turns stored. Candidate c of prompt b is sampled row
    b * n + c. With n > 1 the candidates share the prompt's row and have their own tokens in `branches`; with n = 1 they
    are stored in the row itself. `cache.lengths` counts the tokens whose keys are stored; a row's last sampled id is
    not among them. So with the whole dialogue's ids at hand, the next turn is

        cache.adopt(samples.branches, chosen rows); new_ids = [ids[b][cache.lengths[b]:] for b ...]

    `seeds` are one per row (B * n): a row's samples do not depend on its neighbours. The kernels and the torch path
    draw differently from a seed. Temperature 0 is greedy. Raises ValueError when the rows could outgrow the cache.
    """
    if n < 1 or max_new_tokens < 1 or temperature < 0:
        raise ValueError(f"{n=} and {max_new_tokens=} must be at least 1, {temperature=} at least 0")
    device, R = cache.lengths.device, len(new_ids) * n
    token_ids, new_lengths = pad(new_ids, model.config.vocab_size, device)  # (B, T), (B,)
    cache.room_for(new_lengths, later=max_new_tokens - 1)  # the last sampled id is never stored
    # Greedy sampling draws nothing: an evaluation in between does not change what training samples next.
    seeds = row_seeds(R, seeds) if temperature > 0 else [0] * R
    uniforms = torch.zeros(R, max_new_tokens)  # the torch path alone needs them, and not when it is greedy
    if temperature > 0 and not use_triton(model.head_weight):
        uniforms = draw_uniforms(seeds, max_new_tokens)
    seeds, uniforms = torch.tensor(seeds, device=device), uniforms.to(device)

    hidden = model(token_ids, cache=cache, new_lengths=new_lengths)  # (B, T, D)
    prompt = torch.arange(len(new_ids), device=device).repeat_interleave(n)  # (R,): the prompt of each candidate
    last = hidden[prompt, new_lengths[prompt] - 1]  # (R, D)
    branches = cache.branch(n, max_new_tokens) if n > 1 else cache

    ids = torch.zeros(R, max_new_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(R, max_new_tokens, device=device)
    lengths = torch.zeros(R, dtype=torch.long, device=device)
    stop = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
    work, rows = branches, torch.arange(R, device=device)  # the cache that is decoded in, and its rows' places in R
    active = torch.ones(R, dtype=torch.bool, device=device)  # which rows of `work` go on
    for step in range(max_new_tokens):
        token, logprob = sample_head(last, model.head_weight, temperature, seeds[rows], step, uniforms[rows, step])
        ids[rows, step], logprobs[rows, step] = token, logprob
        lengths[rows] += active  # what a finished row draws lies beyond its length
        active = active & ~torch.isin(token, stop)
        remaining = int(active.sum())
        if remaining == 0 or step + 1 == max_new_tokens:
            break
        if 2 * remaining <= len(rows):  # go on with a copy of the running rows; halving bounds the copying
            if work is not branches:
                branches.put(rows, work)
            rows, token = rows[active], token[active]
            work, active = branches.take(rows), active[active]
        last = model(token[:, None], cache=work, new_lengths=active.long())[:, 0]
    if work is not branches:
        branches.put(rows, work)
    return collect(ids, logprobs, lengths, stop_ids, branches if n > 1 else None)


def collect(
    ids: Tensor, logprobs: Tensor, lengths: Tensor, stop_ids: Collection[int], branches: KVCache | None
) -> Samples:
    """Cut the padded draws (R, max_new_tokens) to lists and say why each row ended."""
    counts = lengths.tolist()
    token_ids = [row[:count] for row, count in zip(ids.tolist(), counts, strict=True)]
    return Samples(
        token_ids=token_ids,
        logprobs=[row[:count] for row, count in zip(logprobs.tolist(), counts, strict=True)],
        lengths=counts,
        stop_reasons=["stop" if row[-1] in stop_ids else "length" for row in token_ids],
        branches=branches,
    )


# ------------------------------------------------------------------------------------------------------- checkpoints

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def resolve_checkpoint(path_or_hub_id: str | Path) -> Path:
    """Give a checkpoint's folder: a local one as it is, or a hub id's `*.json` and `*.safetensors` after fetching them.

    Raises ValueError for what is neither, or cannot be fetched (offline, unknown, gated).
    """
    if Path(path_or_hub_id).is_dir():
        return Path(path_or_hub_id)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path_or_hub_id)):
        raise ValueError(f"--ckpt {path_or_hub_id}: no such folder, and not a hub id of the form owner/name")
    try:
        return Path(snapshot_download(str(path_or_hub_id), allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, ValueError) as error:  # the hub client's own errors are of these two kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"--ckpt {path_or_hub_id}: no such folder, and not fetched from the hub ({reason}); "
            f"give a folder with config.json and {SINGLE}"
        ) from None


def weight_files(folder: Path) -> list[Path]:
    """List a checkpoint's safetensors files; raise ValueError when there are none or a shard is absent."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".pkl"))
        hint = f"; {pickles[0]} is a pickle, which is never read: convert it to safetensors" if pickles else ""
        raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}{hint}")
    try:
        weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = [folder / name for name in sorted(set(weight_map.values()))]
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f"{folder / INDEX} is not an index of safetensors files") from None
    for file in files:
        if not file.is_file():
            raise ValueError(f"{folder / INDEX} names {file.name}, which is not there")
    return files


def read_tensors(file: Path, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Read one safetensors file; raise ValueError for a tensor that `shapes` lacks, of another shape, or not floats."""
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from None
    for name, tensor in tensors.items():
        if name not in shapes:
            raise ValueError(f"{file}: tensor {name} is not part of the model")
        if tensor.shape != shapes[name]:
            raise ValueError(f"{file}: {name} has shape {list(tensor.shape)}, not {list(shapes[name])}")
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{file}: {name} is {tensor.dtype}, not float32, bfloat16 or float16")
    return tensors


def load_weights(model: nn.Module, folder: Path, dtype: torch.dtype, device: str | torch.device) -> None:
    """Fill a model built on the meta device from a folder's safetensors; raise ValueError naming tensor and file."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    allowed = dict(shapes)
    if isinstance(model, Qwen2ForCausalLM):
        allowed[head] = shapes[embedding]  # some tools write a tied matrix twice
    files = weight_files(folder)
    weights: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in read_tensors(file, allowed).items():
            if name in weights:
                raise ValueError(f"{file}: {name} is also in another file")
            # A copy: what the file's reader gives is a view of the file, which a later save may replace.
            weights[name] = tensor.to(device, dtype, copy=True)
    for name in shapes:
        if name not in weights:
            raise ValueError(f"{files[0] if len(files) == 1 else folder / INDEX}: tensor {name} is missing")
    if head not in shapes and head in weights and not torch.equal(weights.pop(head), weights[embedding]):
        raise ValueError(f"{folder}: {head} differs from {embedding}, but config.json ties them")
    model.load_state_dict(weights, assign=True)


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
    """Load a Qwen-2.5 checkpoint from a folder or the hub; raise a one-line ValueError if anything is amiss."""
    return load_model(Qwen2ForCausalLM, path_or_hub_id, dtype, device)


def load_critic(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Critic:
    """Load a critic that `save_pretrained` wrote; ValueError for a policy's folder (see `Critic.from_policy`)."""
    return load_model(Critic, path, dtype, device)


def save_pretrained(
    model: Qwen2ForCausalLM | Critic, folder: str | Path, dtype: torch.dtype | None = None, max_shard_bytes: float = 5e9
) -> None:
    """Write config.json and the weights, cast to dtype (None: as they are), in place of the weights the folder had.

    One model.safetensors, or, above max_shard_bytes, numbered shards and model.safetensors.index.json.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().to("cpu", dtype) for name, tensor in model.state_dict().items()}
    save_torch_state_dict(weights, folder, max_shard_size=int(max_shard_bytes))
    precision = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    config = {"architectures": [type(model).__name__], "torch_dtype": precision, **model.config.to_dict()}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
