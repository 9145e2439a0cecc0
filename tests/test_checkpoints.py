"""Checkpoints in and out: what usual tools write is read, or refused by its cause; what is saved chats elsewhere."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file, save_model
from small_run import small_tokenizer
from test_model import logits_of, peer, peer_logits, randomised, some_ids, tiny_config

from benchmarks import fuzz_checkpoints
from benchmarks.throughput import forget_peak, in_child, memory_status
from config import Config
from dialogue import SYSTEM_PROMPT, ChatTokenizer, Dialogue
from learners import folder as folder_module
from learners.folder import INDEX, SINGLE, carried_files, resolve_checkpoint
from learners.weights import load_policy, save_pretrained
from model import Qwen2Config, random_policy
from records.state import setup
from sampler import generate, make_sampler
from simulator import Environment
from train_rlpa import Play, rollout

transformers = pytest.importorskip("transformers", reason="checkpoints go to and come from transformers")


# ------------------------------------------------------------------------------------------------------- round trips


FAMILIES = pytest.mark.parametrize("family", ["qwen2", "llama"])


@FAMILIES
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_bytes", [5e9, 20_000])
def test_our_save_loads_in_transformers(tmp_path, tied, shard_bytes, family):
    """Guards the output layout: names, shards, index and config.json, read by somebody else's loader."""
    policy = randomised(tiny_config(tie_word_embeddings=tied, model_type=family))
    save_pretrained(policy, tmp_path, max_shard_bytes=shard_bytes)
    assert (tmp_path / INDEX).is_file() == (shard_bytes < 5e9)
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    token_ids = some_ids(policy.config, 2, 20)
    torch.testing.assert_close(peer_logits(hf, token_ids), logits_of(policy, token_ids), atol=1e-5, rtol=0)
    assert hf.config.eos_token_id == 60 and hf.config.architectures == [type(hf).__name__]
    assert type(hf) is {"qwen2": transformers.Qwen2ForCausalLM, "llama": transformers.LlamaForCausalLM}[family]


@FAMILIES
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 20_000])
def test_transformers_save_loads_here(tmp_path, tied, shard_bytes, family):
    """Guards the input layout, with the newer config.json that nests rope_theta in rope_parameters."""
    policy = randomised(tiny_config(tie_word_embeddings=tied, model_type=family))
    peer(policy).save_pretrained(tmp_path, max_shard_size=shard_bytes)
    assert (tmp_path / INDEX).is_file() == (shard_bytes < 5e9)
    loaded = load_policy(tmp_path)
    assert loaded.config == policy.config
    token_ids = some_ids(policy.config, 2, 20)
    torch.testing.assert_close(logits_of(loaded, token_ids), logits_of(policy, token_ids), atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reads_and_writes_each_precision(tmp_path, dtype):
    """Guards a half-precision checkpoint on a CPU: it becomes fp32 exactly, and config.json says what is stored."""
    policy = randomised(tiny_config())
    save_pretrained(policy, tmp_path, dtype=dtype)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")
    for name, tensor in load_policy(tmp_path).state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, policy.state_dict()[name].to(dtype).float()), name


def test_loaded_weights_survive_their_file(tmp_path):
    """Guards weights that are a view of the file: a save in its place would change the model under training."""
    policy = randomised(tiny_config())
    save_pretrained(policy, tmp_path)
    loaded = load_policy(tmp_path)
    with open(tmp_path / SINGLE, "r+b") as file:
        size = (tmp_path / SINGLE).stat().st_size
        file.seek(size // 2)
        file.write(b"\0" * (size - size // 2))
    assert all(torch.equal(tensor, policy.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def loading_peak(folder: str) -> tuple[float, float]:
    """Load a policy; return the MiB that the process grew by at its peak, and those of the weights."""
    before = memory_status("VmRSS")
    forget_peak()
    policy = load_policy(folder)
    return memory_status("VmHWM") - before, sum(p.nbytes for p in policy.parameters()) / 2**20


@pytest.mark.slow
def test_attention_is_never_planned_by_cudnn(saved):
    """Guards the prefill on Hopper, where cuDNN would plan anew for each of thousands of shapes."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    load_policy(saved)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_loading_holds_one_set_of_weights(tmp_path):
    """Guards a peak of twice the weights: the file's pages and their copy, which a large model does not fit in."""
    save_pretrained(random_policy(Qwen2Config(5_000, 512, 2048, 12, 8, 2), seed=0), tmp_path)
    peak, weights = in_child(loading_peak, str(tmp_path))
    assert 150 < weights < peak < 1.5 * weights


def test_a_save_replaces_the_older_one(tmp_path):
    """Guards stale shards: an earlier model.safetensors would be read in place of the new shards."""
    save_pretrained(randomised(tiny_config(), seed=1), tmp_path)
    new = randomised(tiny_config(), seed=2)
    save_pretrained(new, tmp_path, max_shard_bytes=20_000)
    assert torch.equal(load_policy(tmp_path).lm_head.weight, new.lm_head.weight)
    save_pretrained(new, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", SINGLE]


# ------------------------------------------------------------------------------------------------------ loader errors


@pytest.fixture
def saved(tmp_path) -> Path:
    """A folder with a good checkpoint, for a test to spoil."""
    save_pretrained(randomised(tiny_config()), tmp_path)
    return tmp_path


def edit_weights(folder: Path, **changes) -> None:
    """Rewrite the weights with tensors replaced, added or (None) left out; `__` in a key stands for a dot."""
    tensors = load_file(folder / SINGLE) | {key.replace("__", "."): tensor for key, tensor in changes.items()}
    tensors = {name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(model__norm__weight=None), "tensor model.norm.weight is missing"),
        (dict(model__layers__2__mlp__x=torch.zeros(2)), "tensor model.layers.2.mlp.x is not part of the model"),
        (dict(model__norm__weight=torch.ones(47)), r"model.norm.weight has shape \[47\], not \[48\]"),
        (dict(model__norm__weight=torch.ones(48, dtype=torch.int32)), "model.norm.weight is torch.int32"),
        (dict(model__norm__weight=torch.ones(48, dtype=torch.float64)), "model.norm.weight is torch.float64"),
    ],
)
def test_wrong_tensors_are_named(saved, changes, words):
    """Guards half-loaded models: one line that names the tensor and the file, whatever is wrong with it."""
    edit_weights(saved, **changes)
    with pytest.raises(ValueError, match=words) as error:
        load_policy(saved)
    assert SINGLE in str(error.value) and "\n" not in str(error.value)


def test_head_of_a_tied_checkpoint(tmp_path):
    """Guards tied checkpoints that ship the head as well: equal is accepted, different would change the model."""
    policy = randomised(tiny_config(tie_word_embeddings=True))
    save_pretrained(policy, tmp_path)
    edit_weights(tmp_path, lm_head__weight=policy.head_weight.detach())
    assert "lm_head.weight" not in load_policy(tmp_path).state_dict()
    edit_weights(tmp_path, lm_head__weight=policy.head_weight.detach() + 1)
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
        load_policy(tmp_path)


@pytest.mark.parametrize("cut", [0, 4, 100, -4])
def test_truncated_file(saved, cut):
    """Guards an interrupted copy: cut in the header's length, in the header, or in the last tensor."""
    content = (saved / SINGLE).read_bytes()
    (saved / SINGLE).write_bytes(content[:cut])
    with pytest.raises(ValueError, match=f"{SINGLE} is not a whole safetensors file"):
        load_policy(saved)


def test_pickles_are_refused_by_name(saved):
    """Guards against executing a downloaded pickle: it is named and not opened."""
    (saved / SINGLE).rename(saved / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin is a pickle"):
        load_policy(saved)


def test_shards_must_fit_their_index(tmp_path):
    """Guards a partly downloaded sharded checkpoint, a broken index, and one tensor in two shards."""
    save_pretrained(randomised(tiny_config()), tmp_path, max_shard_bytes=20_000)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    kept = shards[1].read_bytes()
    shards[1].unlink()
    with pytest.raises(ValueError, match=f"{INDEX} names {shards[1].name}, which is not there"):
        load_policy(tmp_path)
    shards[1].write_bytes(shards[0].read_bytes())
    with pytest.raises(ValueError, match="is also in another file"):
        load_policy(tmp_path)
    shards[1].write_bytes(kept)
    (tmp_path / INDEX).write_text('{"weight_map": []}')
    with pytest.raises(ValueError, match="'weight_map' is \\[\\]; it takes an object"):
        load_policy(tmp_path)


def test_absent_files_and_folders(saved, tmp_path_factory):
    """Guards a mistyped --ckpt: the message says what was looked for."""
    (saved / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json does not exist; a checkpoint is a folder with it"):
        load_policy(saved)
    with pytest.raises(ValueError, match="has neither model.safetensors nor"):
        folder = tmp_path_factory.mktemp("empty")
        (folder / "config.json").write_text(json.dumps(tiny_config().to_dict()))
        load_policy(folder)
    with pytest.raises(ValueError, match="no such folder, and not a hub id"):
        load_policy("/no/such/folder")


def test_hub_id_offline(monkeypatch, tmp_path):
    """Guards an endless wait or a page of traceback when the hub is out of reach."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="--ckpt no-such/model: no such folder, and not fetched") as error:
        resolve_checkpoint("no-such/model")
    assert "\n" not in str(error.value)


def test_hub_id_is_fetched_without_pickles(monkeypatch, tmp_path):
    """Guards the download: all that a checkpoint consists of is asked for, chat template included, and nothing else."""
    asked = {}

    def fake_download(repo_id, allow_patterns):
        asked.update(repo_id=repo_id, allow_patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(folder_module, "snapshot_download", fake_download)
    assert resolve_checkpoint("owner/name") == tmp_path
    assert asked["repo_id"] == "owner/name" and "*.safetensors" in asked["allow_patterns"]
    wanted = {"config.json", INDEX, "tokenizer.json", "chat_template.jinja", "merges.txt", "generation_config.json"}
    assert wanted <= set(asked["allow_patterns"]) and not any("bin" in name for name in asked["allow_patterns"])


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(model_type="llama"), "tensor model.layers.0.self_attn.k_proj.bias is not part of the model"),
        (dict(model_type="llama", attention_bias=True), "attention_bias is True; only False is implemented"),
        (dict(model_type="llama", mlp_bias=True), "mlp_bias is True"),
        (dict(model_type="llama", rope_scaling={"rope_type": "llama3", "factor": 8.0}), "rope_scaling is {'rope_type'"),
        (dict(model_type="llama", rope_interleaved=True), "rope_interleaved is True"),
        (dict(model_type="mistral"), "model_type is 'mistral'; only 'qwen2' and 'llama' are implemented"),
        (dict(model_type=["qwen2"]), "model_type is .'qwen2'.; only"),
        (dict(model_type="absent"), "model_type is None"),
        (dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
        (dict(use_sliding_window=True), "use_sliding_window is True"),
        (dict(rope_scaling={"type": "yarn", "factor": 4.0}), "rope_scaling is {'type': 'yarn'"),
        (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e6}), "rope_parameters is {'rope_type': 'yarn'"),
        (dict(rope_parameters={"full_attention": {"rope_theta": 1e6}}), "rope_parameters is {'full_attention'"),
        (dict(rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]}), "rope_scaling is {'type': 'mrope'"),
        (dict(rope_scaling="none"), "rope_scaling is 'none'; it takes an object"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
        (dict(layer_types=["full_attention", "sliding_attention"]), "layer_types names 'sliding_attention'"),
        (dict(quantization_config={"quant_method": "gptq", "bits": 4}), "quantised ..'quant_method': 'gptq'"),
        (dict(quantization={"group_size": 64, "bits": 4}), "quantization says that the weights are quantised"),
        (dict(head_dim=32), "head_dim is 32"),
        (dict(hidden_size="absent"), "hidden_size is missing"),
        (dict(hidden_size=None), "hidden_size is missing"),
        (dict(hidden_size="48"), "hidden_size is '48'; it takes a whole number"),
        (dict(hidden_size=10**11), "hidden_size is 100000000000; it must lie in"),
        (dict(num_hidden_layers=2.0), "num_hidden_layers is 2.0; it takes a whole number"),
        (dict(num_hidden_layers=10**9), "num_hidden_layers is 1000000000; it must lie in"),
        (dict(num_hidden_layers=100), "tensor model.layers.2.self_attn.q_proj.weight is missing"),
        (dict(tie_word_embeddings="no"), "tie_word_embeddings is 'no'; it takes true or false"),
        (dict(rms_norm_eps=-5), "rms_norm_eps is -5"),
        (dict(rms_norm_eps=0), "rms_norm_eps is 0"),
        (dict(rms_norm_eps=float("nan")), "NaN is no JSON number"),
        (dict(rope_theta=0), "rope_theta is 0"),
        (dict(rope_theta=-1), "rope_theta is -1"),
        (dict(initializer_range=float("inf")), "Infinity is no JSON number"),
        (dict(max_position_embeddings=10**12), "max_position_embeddings is"),
        (dict(eos_token_id="</s>"), "eos_token_id is '</s>'; it takes a whole number or a list or null"),
        (dict(hidden_size=50), "hidden_size is 50"),
        (dict(num_key_value_heads=3), "num_attention_heads is 4"),
        (dict(num_hidden_layers=0), "num_hidden_layers is 0"),
    ],
)
def test_unsupported_configs_are_refused(saved, changes, words):
    """Guards a checkpoint that would load and compute something else than its authors meant."""
    edit_config(saved, **changes)
    with pytest.raises(ValueError, match=words) as error:
        load_policy(saved)
    assert str(saved) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["config.json", INDEX, "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 100_000, '{"a": ' * 100_000, '{"a": 1e999}x',
                                  '{"a": {"b": 1, "b": 2}}'])  # fmt: skip
def test_json_that_is_none(saved, name, text):
    """Guards the parsers: an empty, foreign or deeply nested file is one line that names it."""
    small_tokenizer().save(str(saved / "tokenizer.json"))
    if name == INDEX:
        (saved / SINGLE).unlink()
    (saved / name).write_text(text)
    with pytest.raises(ValueError, match=name) as error:
        load_policy(saved)
        ChatTokenizer.from_folder(saved)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


# ----------------------------------------------------------------------------------------------------- others' habits

PLAIN = "default"
CONFIGS = {  # what a saver adds to, changes or ("absent") leaves out of the tiny config; none changes the model
    "transformers 4": dict(rope_scaling=None, sliding_window=None, max_window_layers=28, use_cache=True, head_dim=None,
                           attention_dropout=0.0, torch_dtype="bfloat16", transformers_version="4.46.1"),
    "transformers 5": dict(rope_theta="absent", rope_parameters={"rope_theta": 5000.0, "rope_type": PLAIN},
                           layer_types=["full_attention"] * 2, pad_token_id=None, dtype="float32"),
    "between": dict(rope_scaling={"rope_type": PLAIN}, layer_types=["full_attention"] * 2, head_dim=12),
    "older default": dict(rope_scaling={"type": PLAIN}, _name_or_path="x", _attn_implementation_autoset=True),
    "both spellings": dict(rope_scaling={"type": PLAIN, "rope_type": PLAIN, "rope_theta": 5000.0}, rope_theta=None),
    "Unsloth": dict(pad_token_id=60, unsloth_fixed=True, unsloth_version="2026.3.3", use_cache=False, rope_scaling={}),
    "LLaMA-Factory": dict(use_cache=False, sliding_window=4096, max_window_layers=2, use_mrope=False),
    "axolotl": dict(quantization_config=None, tie_word_embeddings=False, bos_token_id=None, eos_token_id=[59, 60]),
    "MLX": dict(rope_traditional=False, quantization=None, quantization_config=None, eos_token_id=[60]),
    "numbers": dict(rope_theta=5000, use_sliding_window=None, partial_rotary_factor=1.0, max_position_embeddings=32768),
}  # fmt: skip


@pytest.mark.parametrize("saver", CONFIGS)
def test_harmless_keys_are_ignored(saved, saver):
    """Guards checkpoints refused, or read otherwise, for a key that changes nothing."""
    before = load_policy(saved)
    edit_config(saved, **CONFIGS[saver])
    token_ids = some_ids(before.config, 1, 20)
    assert torch.equal(logits_of(load_policy(saved), token_ids), logits_of(before, token_ids))


def test_harmless_tensors_are_ignored(saved):
    """Guards checkpoints refused for frequencies that older savers wrote beside the weights."""
    before, inv_freq = load_policy(saved).state_dict(), torch.ones(6)
    names = ("model__layers__0__self_attn__rotary_emb__inv_freq", "model__rotary_emb__inv_freq")
    edit_weights(saved, **dict.fromkeys(names, inv_freq))
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_policy(saved).state_dict().items())


def test_tied_weights_under_the_other_name(tmp_path):
    """Guards a tied checkpoint refused because its one matrix is stored as `lm_head.weight`, as `save_model` does."""
    policy = randomised(tiny_config(tie_word_embeddings=True))
    save_pretrained(policy, tmp_path)
    save_model(peer(policy), str(tmp_path / SINGLE))
    with safe_open(tmp_path / SINGLE, "pt") as file:
        assert "model.embed_tokens.weight" not in file.keys() and "lm_head.weight" in file.keys()
        assert file.metadata() == {"model.embed_tokens.weight": "lm_head.weight"}
    loaded = load_policy(tmp_path)
    assert all(torch.equal(tensor, policy.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    tensors = load_file(tmp_path / SINGLE)
    save_file(tensors, tmp_path / SINGLE)  # without the note
    assert torch.equal(load_policy(tmp_path).head_weight, policy.head_weight)
    edit_config(tmp_path, tie_word_embeddings=False)
    with pytest.raises(ValueError, match="tensor model.embed_tokens.weight is missing"):
        load_policy(tmp_path)
    save_file(tensors, tmp_path / SINGLE, {"model.embed_tokens.weight": "lm_head.weight"})
    untied = load_policy(tmp_path)
    embedding = untied.model.embed_tokens.weight
    assert torch.equal(embedding, untied.lm_head.weight) and embedding.data_ptr() != untied.lm_head.weight.data_ptr()


# --------------------------------------------------------------------------------- refused by the cause, with a way out

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 988097824\n"


def adapter(folder: Path) -> None:
    """Make a LoRA folder, as peft saves it."""
    for file in ("config.json", SINGLE):
        (folder / file).unlink()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen2.5-0.5B"}')
    save_file({"base_model.model.q_proj.lora_A.weight": torch.ones(2)}, folder / "adapter_model.safetensors")


def only_gguf(folder: Path) -> None:
    """Make a folder that holds GGUF and nothing else."""
    for file in ("config.json", SINGLE, "tokenizer.json"):
        (folder / file).unlink()
    (folder / "model-q4_k_m.gguf").write_bytes(b"GGUF")


def secret_behind_a_link(folder: Path) -> None:
    """Put a link to somebody's secret in place of a file that a saved policy takes over."""
    (folder.parent / "id_rsa").write_text("secret")
    (folder / "chat_template.jinja").symlink_to(folder.parent / "id_rsa")


def linked_weights(folder: Path) -> None:
    """Put a link out of the folder in place of the weights."""
    (folder / SINGLE).rename(folder.parent / "elsewhere")
    (folder / SINGLE).symlink_to(folder.parent / "elsewhere")


def indexed(name: str):
    """Return what makes a folder whose index names this file, which has all weights."""

    def change(folder: Path) -> None:
        shutil.move(folder / SINGLE, folder.parent / "outside.safetensors")
        names = load_file(folder.parent / "outside.safetensors")
        weight_map = dict.fromkeys(names, name.format(parent=folder.parent))
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return change


def quantised(**tensors: torch.Tensor):
    """Return what makes a folder with these tensors of a quantised model."""
    return lambda folder: edit_weights(folder, **tensors)


Q = "model__layers__0__self_attn__q_proj"
CAUSES = {
    "pointer instead of weights": (
        lambda folder: (folder / SINGLE).write_text(POINTER), "model.safetensors is a Git-LFS pointer.*git lfs pull"),
    "pointer instead of the tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text(POINTER), "tokenizer.json is a Git-LFS pointer"),
    "pointer instead of the index": (
        lambda folder: ((folder / SINGLE).unlink(), (folder / INDEX).write_text(POINTER)), "Git-LFS pointer"),
    "bitsandbytes": (
        quantised(**{f"{Q}__weight": torch.ones(9, dtype=torch.uint8)}), "q_proj.weight .torch.uint8. belongs"),
    "bitsandbytes' state": (quantised(**{f"{Q}__weight__absmax": torch.ones(9)}), "weight.absmax .* quantised weights"),
    "GPTQ": (quantised(**{f"{Q}__qweight": torch.ones(9, dtype=torch.int32)}), "qweight .* to quantised weights"),
    "AWQ": (quantised(**{f"{Q}__qzeros": torch.ones(9, dtype=torch.int32)}), "qzeros .* to quantised weights"),
    "fp8": (
        quantised(**{f"{Q}__weight": torch.ones(48, 48).to(torch.float8_e4m3fn)}), "float8_e4m3fn. belongs"),
    "fp8's scale": (quantised(**{f"{Q}__weight_scale_inv": torch.ones(1)}), "weight_scale_inv .* quantised weights"),
    "an adapter": (adapter, "is an adapter .LoRA. alone; give its base .Qwen/Qwen2.5-0.5B. as --ckpt"),
    "an adapter beside weights": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"), "whole weights and adapter_config.json"),
    "GGUF beside a config": (
        lambda folder: (folder / SINGLE).rename(folder / "q4.gguf"), "holds GGUF; give the file itself: .*/q4.gguf"),
    "a run": (
        lambda folder: ((folder / "checkpoints").mkdir(), (folder / "metrics.jsonl").touch()),
        "model is a run; give .*/checkpoints/iteration_NUMBER/policy"),
    "a checkpoint of a run": (
        lambda folder: ((folder / "policy").mkdir(), (folder / "trainer.json").touch()), "give .*/model/policy"),
    "GGUF": (only_gguf, "holds GGUF; give the file itself: .*/model-q4_k_m.gguf"),
    "NaN": (quantised(model__norm__weight=torch.tensor([1.0] * 47 + [float("nan")])), "model.norm.weight holds NaN or"),
    "infinity": (
        quantised(model__norm__weight=torch.tensor([-float("inf")] * 48).bfloat16()), "model.norm.weight holds NaN or"),
    "an index that leads out": (indexed("../outside.safetensors"), "'../outside.safetensors' is refused"),
    "an absolute index": (indexed("{parent}/outside.safetensors"), "'/.* is refused: only files"),
    "a link out": (linked_weights, "model.safetensors is a link out of its folder"),
    "a secret": (secret_behind_a_link, "chat_template.jinja is a link out of its folder"),
    "a number in the index": (
        lambda folder: ((folder / SINGLE).unlink(), (folder / INDEX).write_text('{"weight_map": {"a": 1}}')),
        "'a' is 1; it takes a text"),
}  # fmt: skip


@pytest.mark.parametrize("cause", CAUSES)
def test_what_is_no_checkpoint_is_refused_by_its_cause(tmp_path, cause):
    """Guards a line that names a file or a tensor and leaves its reader to guess what the folder is."""
    folder = tmp_path / "model"
    save_pretrained(randomised(tiny_config()), folder)
    small_tokenizer().save(str(folder / "tokenizer.json"))
    change, words = CAUSES[cause]
    change(folder)
    with pytest.raises(ValueError, match=words) as error:
        load_policy(resolve_checkpoint(folder))
        ChatTokenizer.from_folder(folder, 500)
        carried_files(folder)
    assert "\n" not in str(error.value)


def test_a_file_is_no_folder(saved):
    """Guards "no such folder" for a file that is there, and is no GGUF (tests/test_gguf.py)."""
    (saved / "x.gguf").touch()
    (saved / "y.gguf").write_text(POINTER)
    for name, words in (("x.gguf", "is a file, and no GGUF.*; give a folder"), ("y.gguf", "git lfs pull"),
                        (SINGLE, "is a file, and no GGUF.*; give a folder")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            resolve_checkpoint(saved / name)


def test_the_hubs_cache_is_read(tmp_path):
    """Guards the refusal of links: a snapshot in the hub's cache consists of links into its blobs, and is read."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    save_pretrained(randomised(tiny_config()), snapshot)
    small_tokenizer().save(str(snapshot / "tokenizer.json"))
    blobs.mkdir()
    for file in list(snapshot.iterdir()):
        file.rename(blobs / file.name)
        file.symlink_to(Path("..", "..", "blobs", file.name))
    (tmp_path / "link").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "link"):
        load_policy(resolve_checkpoint(folder))
        assert carried_files(folder).keys() == {"tokenizer.json"}


# ------------------------------------------------------------------------------------------------ which ids end a turn


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory) -> Path:
    """A folder with a random policy, and a tokenizer: <|endoftext|> 0, <|im_start|> 1, <|im_end|> 2."""
    folder = tmp_path_factory.mktemp("chat")
    save_pretrained(random_policy(Qwen2Config(400, 32, 48, 2, 2, 1, max_position_embeddings=512), 0), folder)
    small_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(
    "config, generation, expected",
    [
        (None, "absent", {2}),
        (2, "absent", {2}),
        (0, "absent", {0, 2}),
        (0, None, {0, 2}),
        (2, [2, 0], {0, 2}),  # as Qwen2.5-Instruct declares them
        ([7, 8], 9, {2, 7, 8, 9}),
        (400, "absent", "config.json: eos_token_id 400 is outside the model's vocabulary of 400"),
        (2, [2, -1], "generation_config.json: eos_token_id -1 is outside"),
        (2, "2", "generation_config.json, eos_token_id is '2'; it takes a whole number or a list"),
        (2, [2, True], "generation_config.json, eos_token_id is"),
    ],
)
def test_every_declared_eos_ends_a_turn(chat_folder, tmp_path, config, generation, expected):
    """Guards a model that ends its turns with another token than <|im_end|>: every turn would run to the limit."""
    folder = shutil.copytree(chat_folder, tmp_path / "model")
    edit_config(folder, eos_token_id=config)
    if generation != "absent":
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    if isinstance(expected, set):
        chat = ChatTokenizer.from_folder(folder, 400)
        assert chat.stop_ids == expected
        settings = Config(ckpt=str(folder), max_new_tokens=5)
        assert make_sampler(load_policy(folder), chat, settings, 1, 1.0, 1).stop_ids == expected
        return
    with pytest.raises(ValueError, match=expected):
        ChatTokenizer.from_folder(folder, 400)


def test_turns_that_are_all_cut_are_told_once(chat_folder, capsys):
    """Guards silence over a model that ends its turns with an undeclared token: `failure_truncated` 1.0, exit 0."""
    policy, chat = load_policy(chat_folder), ChatTokenizer.from_folder(chat_folder, 400)
    env = Environment(SimpleNamespace(ask=lambda messages, seed: "Hi", counts={"errors": {}}), None)
    config = Config(ckpt=str(chat_folder), max_new_tokens=4, max_turns=2, first_user_message="Hello")
    for _ in range(2):
        rollout(policy, chat, [Dialogue(i, "p", ("Age: 34",)) for i in range(8)], Play(1, 1.0, (0,)), config, env)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert "of 16 turns were cut at --max-new-tokens 4. Turns end at ids 2 (<|im_end|>, eos_token_id of" in line


# ----------------------------------------------------------------------------------------------- chat models elsewhere


def save_as_a_run_does(source: Path, folder: Path) -> ChatTokenizer:
    """Load a checkpoint, and save it with all that belongs to it; returns its tokenizer."""
    policy = load_policy(source)
    chat = ChatTokenizer.from_folder(source, policy.config.vocab_size)
    save_pretrained(policy, folder)
    for name, content in chat.chat_files(carried_files(source)).items():
        (folder / name).write_bytes(content)
    return chat


@pytest.mark.parametrize("declared", [None, 0])
def test_a_saved_policy_chats_in_transformers(chat_folder, tmp_path, declared):
    """Guards a policy that elsewhere has no chat template, a wrong end of text, or talks on after its turn."""
    source = shutil.copytree(chat_folder, tmp_path / "source")
    edit_config(source, eos_token_id=declared)
    chat = save_as_a_run_does(source, tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert (theirs.eos_token, theirs.pad_token) == ("<|im_end|>", "<|endoftext|>")
    said = "\n\n I'm 34 <|im_end|>, in 12,345 … Grüße! 我住在北京 🦜  \n"
    said = said.replace("<|im_end|>", "")  # in transformers, control tokens in a text are control tokens
    messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": said}]
    ours = chat.message("system", SYSTEM_PROMPT) + chat.message("user", said) + chat.generation_header
    assert theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == ours
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    for end in chat.stop_ids:  # the head prefers this token
        with torch.no_grad():
            model.lm_head.weight.copy_(torch.zeros_like(model.lm_head.weight))
            model.lm_head.weight[end] = model.model(torch.tensor([ours])).last_hidden_state[0, -1]
        row = torch.tensor([ours])
        spoken = model.generate(row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=9)
        assert spoken[0, len(ours) :].tolist() == [end]


def test_what_a_checkpoint_brought_is_carried_over(chat_folder, tmp_path):
    """Guards files lost or written anew on the way through a run, and other files of the folder taken along."""
    source = shutil.copytree(chat_folder, tmp_path / "source")
    brought = {
        "tokenizer.json": (source / "tokenizer.json").read_bytes() + b"\n \n",
        "tokenizer_config.json": b'{"chat_template": "{{ x }}", "model_max_length": 1000000000000000019884624838656}',
        "generation_config.json": b'{"eos_token_id":[2, 0], "top_p": 0.8}',
        "special_tokens_map.json": b"{ }",
        "added_tokens.json": b"{  }",
        "vocab.json": b"{}\n",
        "merges.txt": b"#version: 0.2\n",
        "rlpa.json": b'{"max_turns": 3}',
        "system_prompt.txt": b"Ask.\r\n",
        "sft_heldout.jsonl": b"{}\n",
    }
    for name, content in brought.items() | {("notes.txt", b"private"), ("modeling_qwen.py", b"1 / 0")}:
        (source / name).write_bytes(content)
    save_as_a_run_does(source, tmp_path / "saved")
    found = {file.name: file.read_bytes() for file in (tmp_path / "saved").iterdir()}
    assert {name: found.pop(name) for name in brought} == brought
    assert found.keys() == {"config.json", SINGLE}  # no second chat template
    # What was saved is saved again as it is: a resumed run needs no other folder.
    save_as_a_run_does(tmp_path / "saved", tmp_path / "again")
    assert {file.name: file.read_bytes() for file in (tmp_path / "again").iterdir()} == {
        file.name: file.read_bytes() for file in (tmp_path / "saved").iterdir()
    }


def test_generation_config_ends_turns_where_the_policy_does(chat_folder, tmp_path):
    """Guards a base model's generation_config.json, whose only end is <|endoftext|>: its other settings stay."""
    source = shutil.copytree(chat_folder, tmp_path / "source")
    (source / "generation_config.json").write_text('{"eos_token_id": 0, "top_p": 0.8, "pad_token_id": 7}')
    save_as_a_run_does(source, tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert saved == {"eos_token_id": [2, 0], "top_p": 0.8, "pad_token_id": 7}


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_broken_companions_end_a_run_before_it_begins(chat_folder, tmp_path, name):
    """Guards a run that trains for hours and cannot save."""
    source = shutil.copytree(chat_folder, tmp_path / "source")
    (source / name).write_text('{"eos_token_id": ')
    with pytest.raises(ValueError, match=f"{source / name} is not JSON"):
        setup(Config(ckpt=str(source)), Environment(None, None))


# --------------------------------------------------------------------------------------------------- damaged at random


def test_logits_that_are_not_finite_end_the_sampling(chat_folder):
    """Guards an evaluation of 0.000 and exit 0: weights so large that the last norm is infinite."""
    policy = load_policy(chat_folder)
    with torch.no_grad():
        policy.model.norm.weight.fill_(3e38)
    for temperature in (0, 1.0):
        with pytest.raises(ValueError, match="the policy computes NaN or infinity"):
            generate(policy, [[5, 6, 7]], max_new_tokens=3, stop_ids=[2], temperature=temperature, seeds=[0])


@pytest.mark.parametrize("name", fuzz_checkpoints.MUTATORS)
def test_damaged_files_load_or_are_one_line(name):
    """Guards tracebacks, hangs, and reads outside the folder, from files that were damaged or made up."""
    if name == fuzz_checkpoints.GGUF:
        pytest.importorskip("gguf")
    assert fuzz_checkpoints.wrong(fuzz_checkpoints.fuzz(50, seed=1, names=(name,))) == {}
