"""Adapters: a base that is held once, gradients and files of A and B alone, and runs that learn with them."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_run import records, run_arguments
from test_distributed import torchrun
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_rlpa
from benchmarks.invariance import (
    KINDS,
    dealt,
    difference,
    random_dialogue,
    run_case,
    run_cases,
    settings,
    write_policy,
)
from benchmarks.mutate import mutate_json, mutate_safetensors
from command_line.flags import parse_args
from config import Config
from kernels import linear_logprob, ppo_head
from learners import lora, processes, sharding
from learners.adapters import PREFIX, with_saved_adapter
from learners.folder import ADAPTER, ADAPTER_WEIGHTS
from learners.loading import load_models
from learners.weights import load_policy
from model import Qwen2Config, Qwen2ForCausalLM, random_policy
from packing import collate, pack
from sampler import generate

SHAPE = Qwen2Config(61, 32, 48, 2, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
SETTINGS = {
    "rollout_batch_size": 4, "minibatch_size": 2, "max_turns": 2, "num_candidates": 2, "max_new_tokens": 10,
    "num_personas": 20, "num_iterations": 2, "eval_every": 0, "eval_dialogues": 2, "save_every": 1, "lr": 1e-2,
    "critic_lr": 1e-2, "kl_coef": 0.01, "lora_rank": 4, "lora_alpha": 6.0, "reply_steps": 4,
    "tensorboard": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base with a tied head."""
    return write_policy(tmp_path_factory.mktemp("base"), SHAPE)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> Iterator[list[str]]:
    """A checkpoint that carries SETTINGS, and a running user."""
    with run_arguments(tmp_path_factory.mktemp("random-policy"), SETTINGS) as found:
        yield found


@pytest.fixture(scope="module")
def run(arguments, tmp_path_factory) -> Path:
    """A run of two iterations with policy, critic and reference on one base."""
    run = tmp_path_factory.mktemp("run") / "run"
    assert train_rlpa.main([*arguments, "--run-dir", str(run)]) == 0
    return run


def trained_adapter(run: Path) -> Path:
    """Return the folder of a run's last policy."""
    return run / "checkpoints" / "iteration_000002" / "policy"


def stirred(base: Qwen2ForCausalLM, seed: int = 1) -> Qwen2ForCausalLM:
    """Put adapters on a model whose B is not 0 any more."""
    policy = lora.with_adapter(base, rank=4, alpha=6.0, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora.adapters(policy).values():
            layer.lora_B.weight.normal_(0, 0.1, generator=generator)
    return policy


def adapted(base: Path, adapter: Path) -> Qwen2ForCausalLM:
    """Load a base with an adapter."""
    return with_saved_adapter(load_policy(base), adapter)


def logits_of(policy: Qwen2ForCausalLM, token_ids: Tensor) -> Tensor:
    with torch.no_grad():
        return policy.logits(policy(token_ids))


# ------------------------------------------------------------------------------------------------------------ one base


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_the_base_is_held_once(folder, dtype, critic):
    """Guards a second copy of anything frozen, in any dtype; counted are the bytes of all distinct storages."""
    config = settings(folder, lora_rank=4, dtype=dtype, critic=critic)
    policy, value, reference = load_models(config, None)
    models = [policy.model, value.model, reference]
    frozen = [{n.replace(".base_layer", ""): p for n, p in m.named_parameters() if not p.requires_grad} for m in models]
    for name, parameter in frozen[2].items():
        assert parameter.dtype == getattr(torch, dtype)
        assert all(held[name].data_ptr() == parameter.data_ptr() for held in frozen[: 1 + (critic == "separate")])
    tensors = [p for m in models for p in m.parameters()] + [*policy.masters.values(), *value.masters.values()]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    D, inner, K = SHAPE.hidden_size, SHAPE.intermediate_size, 16
    adapter = 2 * 4 * (2 * (D + D) + 2 * (D + K) + 3 * (D + inner))
    itemsize, trained = getattr(torch, dtype).itemsize, adapter * (1 + (critic == "separate")) + D
    base = sum(p.numel() for p in random_policy(SHAPE, 0).parameters())
    assert sum(held.values()) == base * itemsize + trained * (4 if itemsize == 4 else 6)
    assert sum(m.numel() for x in (policy, value) for m in x.masters.values()) == trained
    assert all(m.dtype == torch.float32 for x in (policy, value) for m in x.masters.values())


def test_policy_starts_as_its_base(folder):
    """Guards an adapter that changes the model before the first step, and one that never does."""
    base, token_ids = load_policy(folder), torch.arange(3, 40)[None]
    policy = lora.with_adapter(base, rank=4, alpha=6.0, seed=0)
    assert torch.equal(logits_of(policy, token_ids), logits_of(base, token_ids))
    assert not torch.allclose(logits_of(stirred(base), token_ids), logits_of(base, token_ids), atol=0.1)
    names = {name.rpartition(".")[2] for name in lora.adapters(policy)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(lora.adapters(policy)) == 7 * SHAPE.num_hidden_layers and not lora.adapters(base)


# ----------------------------------------------------------------------------------------------------------- gradients


def test_gradients_are_those_of_all_weights_projected():
    """Guards a wrong factor, a transposed matrix, a gradient that misses a layer: with W' = W + s B A, s = α / r,
    ∂/∂B = s ∂/∂W' Aᵀ and ∂/∂A = s Bᵀ ∂/∂W', in fp64."""
    base = random_policy(SHAPE, 0).double()
    policy, token_ids = stirred(base).double(), torch.arange(3, 40)[None]
    whole = random_policy(SHAPE, 0).double()
    with torch.no_grad():
        for name, layer in lora.adapters(policy).items():
            whole.get_submodule(name).weight.add_(1.5 * layer.lora_B.weight @ layer.lora_A.weight)
    slope = torch.randn(1, 37, SHAPE.hidden_size, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    for model in (policy, whole):
        (model(token_ids) * slope).sum().backward()
    for name, layer in lora.adapters(policy).items():
        dW = whole.get_submodule(name).weight.grad
        torch.testing.assert_close(layer.lora_B.weight.grad, 1.5 * dW @ layer.lora_A.weight.T)
        torch.testing.assert_close(layer.lora_A.weight.grad, 1.5 * layer.lora_B.weight.T @ dW)
        assert dW.abs().max() > 1e-3
    assert all(p.grad is None for p in base.parameters())
    layer, x = lora.adapters(policy)["model.layers.1.mlp.up_proj"], torch.randn(2, 3, 32).double().requires_grad_()
    weights = layer.lora_A.weight, layer.lora_B.weight

    def function(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"lora_A.weight": A, "lora_B.weight": B}, (x,))

    assert torch.autograd.gradcheck(function, (x, *weights))


class Shapes(TorchDispatchMode):
    """The shapes of all tensors that are computed; a view of an old tensor is none."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result, given = func(*args, **kwargs or {}), [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        old = {x.untyped_storage().data_ptr() for x in given}
        new = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.found |= {tuple(x.shape) for x in new if x.untyped_storage().data_ptr() not in old}
        return result


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kl_estimator", ["k1", "exact"])
def test_no_gradient_of_the_heads_size(folder, checkpointing, kl_estimator):
    """Guards a (V, D) gradient of a head, or of an embedding, that nobody trains; without adapters there is one."""
    found = []
    for rank in (4, 0):
        config = settings(folder, lora_rank=rank, kl_estimator=kl_estimator, checkpointing=checkpointing)
        policy, critic, reference = load_models(config, None)
        packed = [pack(random_dialogue(i), config) for i in range(2)]
        batch = collate(packed)
        train_rlpa.add_statistics([[batch]], policy.model, reference, critic.model, config)
        for p in packed:
            train_rlpa.add_advantages(p, config)
        with Shapes() as shapes:
            batch = batch.to(policy.model.head_weight)
            train_rlpa.add_gradients(policy.model, critic.model, batch, 10.0, config, True, reference)
        found.append({shape for shape in shapes.found if set(shape) == {61, 32}})
        assert all((m.grad is not None) for learner in (policy, critic) for m in learner.masters.values())
    assert found[0] == set() and (61, 32) in found[1]


@pytest.mark.parametrize("head", [linear_logprob, partial(ppo_head, token_losses=lambda x: (x, {}), per_token=())])
def test_a_frozen_head_costs_no_second_product(head):
    """Guards heads that compute the gradient of a weight which needs none, and drop it."""
    hidden, weight = torch.randn(5, 32, requires_grad=True), torch.randn(200, 32)
    with Shapes() as shapes:
        head(hidden, weight, torch.arange(5))[0].sum().backward()
    assert hidden.grad is not None and (200, 32) not in shapes.found


# ------------------------------------------------------------------------------------------------------------ sampling


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampler_applies_adapters(folder, dtype):
    """Guards a sampler that decodes with the base, or with a copy that was merged and rounded."""
    policy = stirred(load_policy(folder, dtype=dtype)).to(dtype)
    before = [p.clone() for p in policy.parameters()]
    draw = generate(policy, [[3, 4, 5]], max_new_tokens=12, stop_ids=(), seeds=[7])[0]
    ids = torch.tensor([[3, 4, 5, *draw.token_ids]])
    with torch.no_grad():
        logprobs = linear_logprob(policy(ids)[0, 2:-1], policy.head_weight, ids[0, 3:])[0]
    difference = (logprobs - torch.tensor(draw.logprobs)).abs().max()
    assert difference < (1e-5 if dtype == torch.float32 else 0.1)
    assert all(torch.equal(p, q) for p, q in zip(before, policy.parameters(), strict=True))


# --------------------------------------------------------------------------------------------------------------- files


def test_a_run_learns_and_saves_adapters_alone(run, arguments):
    """Guards an α in the file that was not used, an embedding or a head in it, a base that has moved, and a sampler
    that applies other adapters than the trainer."""
    train = records(run, "train")
    assert all(r["sampler_trainer_logprob_gap"] < 1e-5 and r["policy_grad_norm"] > 0 for r in train)
    for name, extra in (("policy", set()), ("critic", {PREFIX + "value_head.weight"})):
        saved = trained_adapter(run).with_name(name)
        found = json.loads((saved / ADAPTER).read_text())
        assert (found["r"], found["lora_alpha"], found["use_rslora"]) == (4, 6, False)
        weights = load_file(saved / ADAPTER_WEIGHTS)
        assert {key for key in weights if ".lora_A." not in key and ".lora_B." not in key} == extra
        assert len(weights) == 7 * 2 * 2 + len(extra) and not (saved / "model.safetensors").exists()
        assert all(w.dtype == torch.float32 and w.abs().max() > 0 for w in weights.values())
    config = parse_args([*arguments, "--adapter", str(trained_adapter(run))], "")
    assert (config.lora_rank, config.lora_alpha) == (4, 6)


def test_peft_loads_what_is_saved(run, arguments):
    """Guards names, factor and shapes of a file that others are to read."""
    peft = pytest.importorskip("peft")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(arguments[1], dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, trained_adapter(run))
    ours, token_ids = adapted(Path(arguments[1]), trained_adapter(run)), torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(logits_of(ours, token_ids), theirs(token_ids).logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits_of(ours, token_ids), logits_of(load_policy(arguments[1]), token_ids), atol=1e-2)


@pytest.mark.parametrize("stabilised", [False, True])
def test_what_peft_saves_is_loaded(arguments, tmp_path, stabilised):
    """Guards layers that an adapter leaves out, and the rank-stabilised factor, which is another number of ours."""
    peft = pytest.importorskip("peft")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(arguments[1], dtype=torch.float32)
    given = dict(r=9, lora_alpha=6, use_rslora=stabilised, target_modules=["q_proj", "down_proj"])
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**given, init_lora_weights=False))
    theirs.save_pretrained(tmp_path)
    ours, token_ids = adapted(Path(arguments[1]), tmp_path), torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(logits_of(ours, token_ids), theirs(token_ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--critic", "shared"], ["--dtype", "bfloat16"]])
def test_a_run_goes_on_to_the_bit(run, arguments, tmp_path, flags):
    """Guards a moment, an adapter of the critic, or an fp32 master that a checkpoint forgets."""
    whole = run
    if flags:
        whole = tmp_path / "whole"
        assert train_rlpa.main([*arguments, *flags, "--run-dir", str(whole)]) == 0
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))
    shutil.rmtree(copy / "checkpoints" / "iteration_000002")
    assert train_rlpa.main(["--resume", str(copy), *arguments[2:]]) == 0
    assert records(copy) == records(whole)
    files = sorted(file.relative_to(whole) for file in whole.rglob("iteration_000002/**/*.safetensors"))
    assert len(files) == 4 and all((copy / file).read_bytes() == (whole / file).read_bytes() for file in files)


def test_another_base_is_refused(run, arguments, tmp_path, capsys):
    """Guards adapters that go on with other weights than they were trained on; a path in their file is never read."""
    run = Path(shutil.copytree(run, tmp_path / "run"))
    other = Path(shutil.copytree(arguments[1], tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    save_file({name: w + 1e-3 for name, w in weights.items()}, other / "model.safetensors", {"format": "pt"})
    resumed = ["--resume", str(run), *arguments[2:], "--num-iterations", "3"]
    assert train_rlpa.main([*resumed, "--ckpt", str(other)]) == 2
    assert "is not what this run began with" in capsys.readouterr().err
    assert train_rlpa.main([*resumed, "--ckpt", str(trained_adapter(run))]) == 2
    assert "is an adapter (LoRA) alone; give its base" in capsys.readouterr().err


def test_adapter_given_is_the_reference_too(run, arguments, tmp_path):
    """Guards a KL to the bare base where the policy came as an adapter, and a base that the adapter's file names."""
    adapter = Path(shutil.copytree(trained_adapter(run), tmp_path / "adapter"))
    found = json.loads((adapter / ADAPTER).read_text()) | {"base_model_name_or_path": str(tmp_path / "no such base")}
    (adapter / ADAPTER).write_text(json.dumps(found))
    config = parse_args([*arguments, "--adapter", str(adapter)], "")
    (policy, critic, reference), token_ids = load_models(config, None), torch.arange(3, 40)[None]
    expected = logits_of(adapted(Path(arguments[1]), adapter), token_ids)
    for model in (policy.model, reference):
        assert torch.equal(logits_of(model, token_ids), expected)
    assert torch.equal(critic.model.model(token_ids), policy.model(token_ids))
    with torch.no_grad():
        next(iter(policy.masters.values())).add_(1)
    assert torch.equal(logits_of(reference, token_ids), expected)
    assert not torch.equal(logits_of(policy.model, token_ids), expected)
    assert reference.head_weight.data_ptr() == policy.model.head_weight.data_ptr()
    assert train_rlpa.main([*arguments, "--adapter", str(adapter), "--run-dir", str(tmp_path / "next")]) == 0
    assert records(tmp_path / "next", "train")[0]["kl_ref"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_is_added_in_fp32_and_rounded_once(run, arguments, tmp_path, dtype):
    """Guards a sum in half precision, a base on the disk that is changed, and a folder that lacks the tokenizer."""
    base, out = Path(arguments[1]), tmp_path / "merged"
    before = (base / "model.safetensors").read_bytes()
    given = [*arguments[:2], "--adapter", str(trained_adapter(run)), "--merge", str(out), "--dtype", dtype]
    assert train_rlpa.main(given) == 0 and (base / "model.safetensors").read_bytes() == before
    weights, adapter = load_file(out / "model.safetensors"), load_file(trained_adapter(run) / ADAPTER_WEIGHTS)
    for name, weight in load_file(base / "model.safetensors").items():
        pair = [adapter.get(f"{PREFIX}{name.removesuffix('weight')}lora_{x}.weight") for x in "BA"]
        if pair[0] is not None:
            weight = torch.addmm(weight, *pair, alpha=6 / 4)
        assert torch.equal(weights[name], weight.to(getattr(torch, dtype))), name
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    ours, token_ids = adapted(base, trained_adapter(run)), torch.arange(3, 40)[None]
    if dtype == "float32":
        torch.testing.assert_close(logits_of(load_policy(out), token_ids), logits_of(ours, token_ids))
    assert train_rlpa.main(given) == 2  # the folder is not empty


def test_the_grid_of_bf16_swallows_what_is_merged():
    """Guards the reason for adapters that are not merged: a difference of .08 % of the weight, merged in bf16, is wrong
    by 84 % of itself; A and B rounded to bf16 give it to .24 %."""
    generator = torch.Generator().manual_seed(0)
    W = (torch.randn(896, 896, generator=generator) * 0.02).bfloat16()
    A = torch.empty(16, 896).uniform_(-1 / 30, 1 / 30, generator=generator)
    B = torch.randn(896, 16, generator=generator) * 1e-4
    delta = 2 * B @ A
    merged, apart = (W + delta).bfloat16().float() - W.float(), 2 * B.bfloat16().float() @ A.bfloat16().float()
    assert delta.norm() / W.float().norm() == pytest.approx(8e-4, rel=0.1)
    errors = [((found - delta).norm() / delta.norm()).item() for found in (merged, apart)]
    assert errors == pytest.approx([0.84, 0.0024], rel=0.1)


def test_merge_refuses_half_precision(folder):
    """Guards a sum on the grid of bf16, which swallows most of a small adapter."""
    with pytest.raises(ValueError, match="is torch.bfloat16; adapters are added in fp32"):
        lora.merge(stirred(load_policy(folder, dtype=torch.bfloat16)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora is True; only False is implemented"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern is"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"target_modules": "all-linear"}, "'target_modules'"),
        ({"target_modules": ["lm_head"]}, "target_modules names 'lm_head'"),
        ({"r": 0}, "'r' is 0; it must lie in"),
        ({"r": 10**9}, "'r' is 1000000000; it must lie in"),
        ({"r": 3}, "has shape"),
        ({"lora_alpha": None}, "'lora_alpha'"),
    ],
)
def test_adapters_that_mean_something_else_are_refused(run, folder, tmp_path, changes, message):
    """Guards adapters of other kinds that load without a word and compute something else."""
    adapter = Path(shutil.copytree(trained_adapter(run), tmp_path / "adapter"))
    (adapter / ADAPTER).write_text(json.dumps(json.loads((adapter / ADAPTER).read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        adapted(folder, adapter)


def test_damaged_adapters_are_refused(run, arguments, tmp_path):
    """Guards layers without their part of an adapter, and numbers that are none."""
    base, adapter = Path(arguments[1]), Path(shutil.copytree(trained_adapter(run), tmp_path / "adapter"))
    weights = load_file(adapter / ADAPTER_WEIGHTS)
    first = min(weights)
    for changed, message in (
        ({k: w for k, w in weights.items() if k != first}, f"tensor {first} is missing"),
        (weights | {first: weights[first] * torch.nan}, "holds NaN or infinity"),
        (weights | {PREFIX + "lm_head.weight": torch.ones(2)}, "lm_head.weight is not part of the model"),
    ):
        save_file(changed, adapter / ADAPTER_WEIGHTS)
        with pytest.raises(ValueError, match=message):
            adapted(base, adapter)


@pytest.mark.parametrize(("name", "mutate"), [(ADAPTER, mutate_json), (ADAPTER_WEIGHTS, mutate_safetensors)])
def test_damaged_folders_load_or_are_one_line(run, arguments, tmp_path, name, mutate):
    """Guards tracebacks and endless memory from files that were damaged or made up."""
    base, adapter = load_policy(arguments[1]), Path(shutil.copytree(trained_adapter(run), tmp_path / "adapter"))
    whole, refused = (adapter / name).read_bytes(), 0
    for i in range(60):
        (adapter / name).write_bytes(mutate(whole, random.Random(i)))
        try:
            with_saved_adapter(base, adapter)
        except ValueError as error:
            refused += 1
            assert str(error).isprintable() and "adapter" in str(error)
    assert refused > 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merge": "x"}, "--merge x needs --adapter"),
        ({"adapter": "x"}, "--adapter x needs its --lora-rank"),
    ],
)
def test_flags_that_do_not_go_together(changes, message):
    """Guards settings without effect."""
    with pytest.raises(ValueError, match=message):
        Config(ckpt="x", **changes)


# ------------------------------------------------------------------------------------------------------------ --shard


VARIANTS = {"": {}, "shared": {"critic": "shared"}, "checkpointing": {"checkpointing": True, "kl_estimator": "exact"}}


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_a_sharded_base_gives_the_same_numbers(folder, size):
    """Guards layers that are gathered by some processes only, which is a hang, and adapters that are not summed."""
    cases, wanted = {}, {}
    for name, changes in VARIANTS.items():
        given = settings(folder, lora_rank=4, **changes)
        cases[f"case {name}"] = settings(folder, lora_rank=4, shard=True, microbatch_tokens=60, **changes), dealt(size)
        wanted[f"case {name}"] = run_case(given, range(8))
    for name, found in run_cases(size, cases).items():
        assert wanted[name].keys() == found.keys()
        for kind in KINDS:
            assert difference(found, wanted[name], kind) < 1e-5, (name, kind)


def held_rows(config: Config, owned: list[int]) -> dict[str, Tensor]:
    """Give what a process holds of the base: before, while and after it is gathered."""
    policy, critic, reference = load_models(config, None, sharding.make_mesh())
    base = [p for n, p in reference.model.layers.named_parameters() if n.endswith("proj.weight")]
    rows, every = sum(p.to_local().numel() for p in base), sum(p.numel() for p in base)
    found = {"rows": torch.tensor(rows), "all": torch.tensor(every)}
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad(), sharding.gathered(policy.sampled):
        if processes.rank() == 0:  # alone
            found["logits"] = policy.sampled.logits(policy.sampled(ids))
    with torch.no_grad():
        found["again"] = policy.sampled.logits(policy.sampled(ids))
    after = [p for n, p in reference.model.layers.named_parameters() if n.endswith("proj.weight")]
    return found | {"after": torch.tensor(sum(p.to_local().numel() for p in after))}


@pytest.mark.slow
def test_a_sharded_base_is_whole_for_a_rollout_alone(folder):
    """Guards a process that waits for others at each layer while it samples, and a base that stays whole after it."""
    config = settings(folder, lora_rank=4, shard=True)
    found = run_cases(2, {"case": (config, [[], []])}, held_rows)["case"]
    assert found["rows"] == found["after"] == found["all"] / 2
    expected = logits_of(load_policy(folder), torch.tensor([[3, 4, 5, 6]]))
    assert torch.equal(found["logits"], expected) and torch.equal(found["again"], expected)


@pytest.mark.slow
def test_two_processes_with_a_sharded_base_equal_one(run, arguments, tmp_path):
    """Guards evaluations and checkpoints that one process computes alone, and adapters that each draws for itself."""
    done = torchrun(*arguments, "--shard", "--run-dir", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr[-3000:]
    for ours, theirs in zip(records(tmp_path / "two"), records(run), strict=True):
        assert ours.pop("kind") == theirs.pop("kind")
        assert ours == pytest.approx(theirs, abs=1e-4, rel=1e-4, nan_ok=True)
    for name in ("policy", "critic"):
        folders = [trained_adapter(x).with_name(name) for x in (tmp_path / "two", run)]
        ours, theirs = (load_file(folder / ADAPTER_WEIGHTS) for folder in folders)
        for key, weight in theirs.items():
            torch.testing.assert_close(ours[key], weight, atol=1e-4, rtol=1e-3)
