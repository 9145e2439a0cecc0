"""Qwen-2.5 by hand: modules, a critic and a KV cache.

Parameter names and shapes are Hugging Face's. So weights load without renaming, and what is saved loads in
`transformers` and vLLM (`learners/weights.py` reads and writes checkpoints). A Llama (SmolLM2, TinyLlama) is the same
model without biases on q, k and v. RoPE scaling, sliding windows and other activations are not implemented; a config
that asks for one is refused by name.

Reading order: config, norm, rotary positions, attention, MLP, trunk, policy, critic, KV cache. `sampler.py` decodes
with the cache. Tests: `pytest tests/test_model.py`.

Letters: B rows (dialogues), T tokens of a row, padding included (B = 1 where the token trees of a micro-batch are
packed into one row), N tokens packed without padding to continue rows of the cache, S cache slots, L layers, D hidden,
H query heads, Hkv key and value heads, Dh width of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Literal, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.decode_attention import decode_attention
from kernels.prefill_attention import Chunks, prefill_attention
from kernels.rmsnorm import rmsnorm
from kernels.rope import rope, rope_into_cache
from kernels.rows import Rows, adopt
from kernels.swiglu import swiglu
from kernels.tree_attention import Tree, tree_attention
from untrusted.files import check_value, parse_json
from untrusted.gguf_file import read_part
from untrusted.plain_text import shorten

try:  # an optional extra for CUDA machines, never required
    from flash_attn import flash_attn_func
except ImportError:
    flash_attn_func = None


# ----------------------------------------------------------------------------------------------------------- config

FAMILIES = {  # by model_type: what its config.json says of what is implemented
    "qwen2": {"hidden_act": "silu", "use_sliding_window": False},
    "llama": {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
}
NEUTRAL = {  # other savers' keys
    "partial_rotary_factor": 1.0, "rope_traditional": False, "rope_interleaved": False, "use_mrope": False,
}  # fmt: skip
# Far above any real model, and low enough that a stranger's config.json neither hangs nor fills the memory before the
# shapes of the weights are compared with it.
Width, Heads, Layers = Annotated[int, (1, 10**7)], Annotated[int, (1, 10_000)], Annotated[int, (1, 1000)]
Positions, Theta = Annotated[int, (1, 2 * 10**6)], Annotated[float, (1, 10**12)]
Epsilon, Deviation = Annotated[float, (1e-20, 1)], Annotated[float, (1e-10, 100)]


@dataclass(frozen=True)
class Qwen2Config:
    """Hold the fields of a Qwen-2.5 `config.json`, under their Hugging Face names; ValueError for one that cannot be.

    >>> Qwen2Config(1280, 96, 256, num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=1).head_dim
    32
    """

    vocab_size: Width  # V
    hidden_size: Width  # D
    intermediate_size: Width  # width of the MLP
    num_hidden_layers: Layers
    num_attention_heads: Heads  # H
    num_key_value_heads: Heads  # Hkv; each serves H / Hkv query heads
    max_position_embeddings: Positions = 32768  # tokens
    rope_theta: Theta = 1_000_000.0
    rms_norm_eps: Epsilon = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: Deviation = 0.02  # standard deviation of freshly drawn weights
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    model_type: Literal["qwen2", "llama"] = "qwen2"  # llama: q, k and v without biases

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            check_value(getattr(self, name), hint, name)
        H, Hkv = self.num_attention_heads, self.num_key_value_heads
        if H % Hkv:
            raise ValueError(f"num_attention_heads is {H}; it must be a multiple of num_key_value_heads, {Hkv}")
        if self.hidden_size % (2 * H):
            raise ValueError(f"hidden_size is {self.hidden_size}; it must give {H} heads an even width each")

    @property
    def head_dim(self) -> int:
        """Return the width Dh of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, d: dict) -> Qwen2Config:
        """Read a parsed `config.json`; raise ValueError for what this file does not implement.

        Keys that do not change what the model computes are ignored, and null counts as absent.
        """
        given = {"rope_theta": 10_000.0}  # what Hugging Face assumes when it is absent
        given |= plain_rope(d) | {name: value for name, value in d.items() if value is not None}
        refuse_what_is_not_implemented(given)
        for field in fields(cls):
            if field.name not in given and field.default is MISSING:
                raise ValueError(f"{field.name} is missing")
        config = cls(**{field.name: given[field.name] for field in fields(cls) if field.name in given})
        if given.get("head_dim", config.head_dim) != config.head_dim:
            head_dim = shorten(repr(given["head_dim"]))
            raise ValueError(f"head_dim is {head_dim}; only hidden_size / num_attention_heads is implemented")
        return config

    @classmethod
    def from_file(cls, path: str | Path) -> Qwen2Config:
        """Read `config.json` itself, or that of a folder or a GGUF file; raise ValueError naming the file."""
        path = Path(path)
        folder, path = (path.parent, path) if path.suffix == ".json" else (path, path / "config.json")
        if (raw := read_part(folder, path.name)) is None:
            raise ValueError(f"{path} does not exist; a checkpoint is a folder with it, tokenizer.json and safetensors")
        check_value(content := parse_json(raw, str(path)), dict, str(path))
        try:
            return cls.from_dict(content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_dict(self) -> dict:
        """Return the content of a `config.json` that `transformers` and vLLM load."""
        return {"model_type": self.model_type, **FAMILIES[self.model_type], **asdict(self)}


def plain_rope(d: dict) -> dict:
    """Return what a parsed config.json nests of plain rotary positions; ValueError if it asks for scaled ones.

    transformers >= 5 writes `rope_parameters`, with rope_theta inside; before, there was `rope_scaling`.
    """
    found = {}
    for name in ("rope_scaling", "rope_parameters"):
        check_value(rope := d.get(name) or {}, dict, name)
        kind = rope.get("rope_type", rope.get("type", "default"))  # "type" is the older spelling
        if kind != "default" or any(isinstance(value, dict) for value in rope.values()):
            raise ValueError(f"{name} is {shorten(repr(rope))}; only positions without scaling are implemented")
        names = ("rope_theta", "partial_rotary_factor")
        found |= {name: rope[name] for name in names if rope.get(name) is not None}
    return found


def refuse_what_is_not_implemented(given: dict) -> None:
    """Raise ValueError if a parsed config.json asks for another model than a Qwen-2.5 or a Llama, unquantised."""
    for name in ("quantization_config", "quantization"):  # the second is MLX's
        if settings := given.get(name):
            raise ValueError(
                f"{name} says that the weights are quantised ({shorten(repr(settings))}); only float32, bfloat16 and"
                " float16 are read: give the model it was made from, or dequantise it; if that is done, remove the key"
            )
    if (kind := given.get("model_type")) not in list(FAMILIES):  # a list: what is asked for may have no hash
        known = " and ".join(map(repr, FAMILIES))
        raise ValueError(f"model_type is {shorten(repr(kind))}; only {known} are implemented")
    for name, value in {**FAMILIES[kind], **NEUTRAL}.items():
        if given.get(name, value) != value:
            raise ValueError(f"{name} is {shorten(repr(given[name]))}; only {value!r} is implemented")
    check_value(kinds := given.get("layer_types", []), list, "layer_types")
    if others := [kind for kind in kinds if kind != "full_attention"]:
        raise ValueError(f"layer_types names {shorten(repr(others[0]))}; only 'full_attention' is implemented")


# ------------------------------------------------------------------------------------------------------------ layers


class RMSNorm(nn.Module):
    """Add to the residual stream, then normalise it: y = weight * x / sqrt(mean(x^2) + eps)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the norm of x + delta (..., dim), and x + delta itself, the residual stream from here on."""
        if delta is None:
            return rmsnorm(x, self.weight, self.eps), x
        return rmsnorm(delta, self.weight, self.eps, residual=x)


def rope_tables(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the rotation angles, (B, T, 1, Dh/2) fp32, one angle for each pair of channels.

    angle[p, i] = p * theta^(-2i / Dh)   (RoFormer, arXiv:2104.09864 eq. 15). Every forward computes its own, so that
    there is no table to store and no longest position to choose.
    """
    channels = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device)
    angles = position_ids[:, :, None, None].float() * (1.0 / theta ** (channels / head_dim))
    return angles.cos(), angles.sin()


def attend(q: Tensor, k: Tensor, v: Tensor, tree: Tree | None) -> Tensor:
    """Attend with queries (B, H, T, Dh) to k and v (B, Hkv, T, Dh), in a token tree or causally: (B, H, T, Dh)."""
    if tree is not None:
        return tree_attention(q, k, v, tree)
    if flash_attn_func and q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        return flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=True).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def join_products(policy: Qwen2ForCausalLM) -> None:
    """Let weights that share an input, q's, k's and v's, and gate's and up's, lie one behind another in memory.

    `products` then needs one product for them. Parameters stay what they are, under the names that they have: each
    becomes a view of its part, and is trained, saved and loaded as before. Layers that are not plain linear ones, as
    LoRA's, stay where they are.
    """
    for layer in policy.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for group in ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)):
            if not all(type(linear) is nn.Linear for linear in group):
                continue
            for name in ("weight", "bias"):
                parts = [getattr(linear, name) for linear in group]
                if None not in parts and joined(parts) is None:
                    whole = torch.cat([part.detach() for part in parts])
                    for part, own in zip(parts, whole.split([len(part) for part in parts]), strict=True):
                        part.data = own


def joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Return tensors that lie one behind another in one storage as one, without a copy, and None for others.

    >>> x = torch.arange(6)
    >>> joined((x[:2], x[2:5])), joined((x[:2], x[3:])), joined((x[:2], torch.arange(2, 5)))
    (tensor([0, 1, 2, 3, 4]), None, None)
    """
    first = parts[0]
    if first is None:
        return None
    end, storage = first.storage_offset(), first.untyped_storage().data_ptr()
    for part in parts:
        if part is None or part.untyped_storage().data_ptr() != storage or part.storage_offset() != end:
            return None
        end += part.numel()
    return first.detach().as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())


def products(x: Tensor, layers: Sequence[nn.Module], context: Tree | Cached | None) -> Sequence[Tensor]:
    """Return each layer's output of x (B, T, D); where tokens continue a cache, by one product if `joined` allows.

    A decode step is so short that launches count: on a GPU two of three, and one of two, are saved in each layer. Where
    gradients are wanted, or a forward must round as one with gradients does, each layer has its own product.
    """
    if isinstance(context, Cached) and all(type(layer) is nn.Linear for layer in layers):
        weight, biases = joined([layer.weight for layer in layers]), [layer.bias for layer in layers]
        bias = joined(biases)
        if weight is not None and (bias is not None or not any(b is not None for b in biases)):
            return F.linear(x, weight, bias).split([layer.out_features for layer in layers], -1)
    return [layer(x) for layer in layers]


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, and Qwen's biases on q, k and v."""

    def __init__(self, config: Qwen2Config, layer_idx: int) -> None:
        super().__init__()
        D, kv_width = config.hidden_size, config.num_key_value_heads * config.head_dim
        bias = config.model_type == "qwen2"
        self.q_proj = nn.Linear(D, D, bias)
        self.k_proj = nn.Linear(D, kv_width, bias)
        self.v_proj = nn.Linear(D, kv_width, bias)
        self.o_proj = nn.Linear(D, D, bias=False)
        self.head_dim, self.layer_idx = config.head_dim, layer_idx

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor], context: Tree | Cached | None) -> Tensor:
        """Return (B, T, D): what each token of x (B, T, D) reads from the tokens that it sees.

        context: a token tree or rows of a KV cache; None: a token sees itself and those before it in its row.
        """
        B, T, D = x.shape
        found = products(x, (self.q_proj, self.k_proj, self.v_proj), context)
        q, k, v = (y.view(B, T, -1, self.head_dim) for y in found)  # (B, T, H, Dh); k and v (B, T, Hkv, Dh)
        if isinstance(context, Cached):
            out = context.attend(self.layer_idx, q[0], k[0], v[0], tables)
        else:
            q, k = rope(q, k, *tables)
            out = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), context).transpose(1, 2)
        return self.o_proj(out.reshape(B, T, D))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        D, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, inner, bias=False)
        self.up_proj = nn.Linear(D, inner, bias=False)
        self.down_proj = nn.Linear(inner, D, bias=False)

    def forward(self, x: Tensor, context: Tree | Cached | None = None) -> Tensor:  # (B, T, D)
        return self.down_proj(swiglu(*products(x, (self.gate_proj, self.up_proj), context)))


class DecoderLayer(nn.Module):
    """Attention, then the MLP: each reads a normed copy of the residual stream, and its output is added to the stream.

    One kernel does an addition and the norm of the sum. So a layer returns the MLP's output beside the stream, and the
    first norm of the next layer adds it.
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
        context: Tree | Cached | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the stream (B, T, D) and the MLP's output, which is not added yet.

        delta: the previous layer's output, not added to x yet; None in the first layer.
        """
        normed, x = self.input_layernorm(x, delta)
        normed, x = self.post_attention_layernorm(x, self.self_attn(normed, tables, context))
        return x, self.mlp(normed, context)


# ------------------------------------------------------------------------------------------- trunk, policy and critic


class Qwen2Model(nn.Module):
    """The trunk: embedding, decoder layers, final norm. Policy and critic have one each."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.checkpointing = False  # True: keep only each layer's input, and compute the layer again in the backward

    def forward(
        self, token_ids: Tensor, position_ids: Tensor | None = None, context: Tree | Cached | None = None
    ) -> Tensor:
        """Return hidden states after the final norm, (B, T, D), for token_ids (B, T) long.

        Without a context attention is causal. Padding stands at the end of a row, so no real token sees it.
        With a context all tokens stand in one row (B = 1), and position_ids (1, T) are needed. The context is a `Tree`,
        for packed token trees, or `Cached`, for tokens that continue rows of a KV cache: their keys and values are
        stored there. Raises ValueError for other shapes.
        """
        if token_ids.dim() != 2:
            raise ValueError(f"token_ids must be (B, T), got {tuple(token_ids.shape)}")
        B, T = token_ids.shape
        if context is not None and (B != 1 or position_ids is None):
            raise ValueError(f"a context needs one row of tokens, got {B}, and position_ids")
        if position_ids is None:
            position_ids = torch.arange(T, device=token_ids.device).expand(B, T)
        elif position_ids.shape != (B, T):
            raise ValueError(f"position_ids must be {(B, T)}, got {tuple(position_ids.shape)}")
        tables = rope_tables(position_ids, self.config.head_dim, self.config.rope_theta)
        x, delta = self.embed_tokens(token_ids), None  # (B, T, D)
        recompute = self.checkpointing and torch.is_grad_enabled()
        for layer in self.layers:
            inputs = (x, delta, tables, context)
            x, delta = checkpoint(layer, *inputs, use_reentrant=False) if recompute else layer(*inputs)
        return self.norm(x, delta)[0]


class Qwen2ForCausalLM(nn.Module):
    """The policy: a trunk and a head. With `tie_word_embeddings` the embedding is the head."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.config = config
        self.model = Qwen2Model(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, token_ids: Tensor, *args, **kwargs) -> Tensor:
        """Return hidden states (B, T, D); arguments as for `Qwen2Model.forward`. The caller applies the head.

        Training never builds the logits of all tokens, and sampling needs those of a row's last token only.
        """
        return self.model(token_ids, *args, **kwargs)

    @property
    def head_weight(self) -> Tensor:
        """Return the head's weight (V, D)."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits (..., V) fp32 of hidden (..., D): products of half-precision numbers are summed in fp32."""
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
        """Return values (B, T) fp32, the return expected after each token; arguments as for `Qwen2Model.forward`."""
        hidden = self.model(token_ids, *args, **kwargs)
        values = F.linear(hidden.float(), self.value_head.weight.float()).squeeze(-1)
        return values.clone()  # sharding puts hooks on the output, which must not be a view

    @classmethod
    def from_policy(cls, policy: Qwen2ForCausalLM, seed: int = 0) -> Critic:
        """Make a critic: a copy of the policy's trunk, and a new random value head."""
        with torch.device("meta"):
            critic = cls(policy.config)
        critic.model.load_state_dict({k: v.detach().clone() for k, v in policy.model.state_dict().items()}, assign=True)
        critic.value_head.weight = draw_value_head(policy, seed)
        return critic


class ValueHead(nn.Module):
    """A critic without a trunk: a linear map from the policy's hidden states to values."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.config = config
        self.value_head = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return values (...) fp32 of the policy's hidden states (..., D)."""
        return F.linear(hidden.float(), self.value_head.weight.float()).squeeze(-1)

    @classmethod
    def from_policy(cls, policy: Qwen2ForCausalLM, seed: int = 0) -> ValueHead:
        """Make a new random value head for the policy's trunk."""
        with torch.device("meta"):
            critic = cls(policy.config)
        critic.value_head.weight = draw_value_head(policy, seed)
        return critic


def draw_value_head(policy: Qwen2ForCausalLM, seed: int) -> nn.Parameter:
    """Draw a value head (1, D) from N(0, std 1 / (D + 1)), so that the first values are near 0."""
    D, like = policy.config.hidden_size, policy.head_weight
    head = torch.randn(1, D, generator=torch.Generator().manual_seed(seed)) / (D + 1)
    return nn.Parameter(head.to(like.device, like.dtype))


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


class KVCache:
    """Keys and values of B rows, per layer (B, Hkv, capacity, Dh), all on one device.

    It is storage only. The sampler knows which dialogue a row belongs to, and how many of its slots are in use. The
    other slots hold old numbers, which no query reads.
    """

    def __init__(
        self,
        config: Qwen2Config,
        rows: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        self.shape = rows, capacity  # B and slots of each row
        shape = (rows, config.num_key_value_heads, capacity, config.head_dim)
        # Zeros, not empty: a masked slot has weight 0, but 0 * NaN would be NaN.
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]

    def move(self, kept: list[int], rows: int, capacity: int) -> None:
        """Change the size: new row i is a copy of old row kept[i], cut or padded to capacity; the others are 0."""
        shared, self.shape = min(capacity, self.shape[1]), (rows, capacity)
        index = torch.tensor(kept, dtype=torch.long, device=self.keys[0].device)
        for tensors in (self.keys, self.values):
            for layer_idx, old in enumerate(tensors):  # layer by layer: each old tensor is freed before the next
                tensors[layer_idx] = old.new_zeros(rows, old.shape[1], capacity, old.shape[3])
                torch.index_select(old[:, :, :shared], 0, index, out=tensors[layer_idx][: len(kept), :, :shared])

    def adopt(self, row: int, prompt: int, tokens: int, candidate: int, n: int) -> None:
        """Keep one of a row's n candidates: move its tokens, which lie n slots apart, next to one another.

        The row then holds `prompt` slots of prompt and `tokens` of the candidate, one after another.
        """
        adopt(self.keys + self.values, row, prompt, tokens, candidate, n)


@dataclass(frozen=True)
class Cached:
    """What N packed tokens attend to: rows of a KV cache, where their own keys and values are stored first.

    The tokens are either one new token of each running candidate (`decoding`), or several new tokens of each of some
    rows, one row after another (`chunks`).
    """

    cache: KVCache
    rows: Tensor  # (N,) long: where each token's key and value go
    slots: Tensor  # (N,) long
    decoding: Rows | None = None
    chunks: Chunks | None = None

    def attend(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """Store k and v (N, Hkv, Dh) in the cache, then attend with q (N, H, Dh) to its rows; return (N, H, Dh)."""
        keys, values = self.cache.keys[layer_idx], self.cache.values[layer_idx]
        cos, sin = tables[0][0], tables[1][0]  # (N, 1, Dh/2)
        q = rope_into_cache(q, k, v, cos, sin, keys, values, self.rows, self.slots)
        if self.decoding is not None:
            return decode_attention(q, keys, values, self.decoding)
        return prefill_attention(q, keys, values, self.chunks)
