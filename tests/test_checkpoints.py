"""Checkpoints in and out: what usual tools write is read, or refused by its cause; what is saved chats elsewhere."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model import logits_of, peer, peer_logits, randomised, some_ids, tiny_config

from benchmarks.throughput import forget_peak, in_child, memory_status
from learners import folder as folder_module
from learners.folder import INDEX, SINGLE, resolve_checkpoint
from learners.weights import load_policy, save_pretrained
from model import Qwen2Config, random_policy

transformers = pytest.importorskip("transformers", reason="checkpoints go to and come from transformers")


# ------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_bytes", [5e9, 20_000])
def test_our_save_loads_in_transformers(tmp_path, tied, shard_bytes):
    """Guards the output layout: names, shards, index and config.json, read by somebody else's loader."""
    policy = randomised(tiny_config(tie_word_embeddings=tied))
    save_pretrained(policy, tmp_path, max_shard_bytes=shard_bytes)
    assert (tmp_path / INDEX).is_file() == (shard_bytes < 5e9)
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    token_ids = some_ids(policy.config, 2, 20)
    torch.testing.assert_close(peer_logits(hf, token_ids), logits_of(policy, token_ids), atol=1e-5, rtol=0)
    assert hf.config.eos_token_id == 60 and hf.config.architectures == ["Qwen2ForCausalLM"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 20_000])
def test_transformers_save_loads_here(tmp_path, tied, shard_bytes):
    """Guards the input layout, with the newer config.json that nests rope_theta in rope_parameters."""
    policy = randomised(tiny_config(tie_word_embeddings=tied))
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
    with pytest.raises(ValueError, match="is not an index of safetensors files"):
        load_policy(tmp_path)


def test_absent_files_and_folders(saved, tmp_path_factory):
    """Guards a mistyped --ckpt: the message says what was looked for."""
    (saved / "config.json").unlink()
    with pytest.raises(ValueError, match="cannot read .*config.json"):
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
    """Guards the download: only *.json and *.safetensors are asked for."""
    asked = {}

    def fake_download(repo_id, allow_patterns):
        asked.update(repo_id=repo_id, allow_patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(folder_module, "snapshot_download", fake_download)
    assert resolve_checkpoint("owner/name") == tmp_path
    assert asked == dict(repo_id="owner/name", allow_patterns=["*.json", "*.safetensors"])


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(model_type="llama"), "model_type is 'llama'"),
        (dict(model_type="absent"), "model_type is None"),
        (dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
        (dict(use_sliding_window=True), "use_sliding_window is True"),
        (dict(rope_scaling={"type": "yarn", "factor": 4.0}), "rope_scaling is {'type': 'yarn'"),
        (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e6}), "rope_type is 'yarn'"),
        (dict(head_dim=32), "head_dim is 32"),
        (dict(hidden_size="absent"), "hidden_size"),
        (dict(hidden_size="48"), "not a Qwen-2.5 config.json"),
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
    assert "config.json" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "null"])
def test_config_that_is_no_object(saved, text):
    """Guards the parser: an empty or foreign config.json is a one-line error too."""
    (saved / "config.json").write_text(text)
    with pytest.raises(ValueError, match="cannot read .*config.json"):
        load_policy(saved)
