"""The checkpoint that ships with the project: small, plain, loadable elsewhere, and teachable."""

import json

import pytest
import torch

import train_rlpa
from command_line.flags import TINY_CHECKPOINT
from dialogue import ChatTokenizer
from learners.weights import load_policy
from studies.summary import read_records, table

TINY = TINY_CHECKPOINT


def test_the_checkpoint_is_small_and_holds_nothing_to_unpickle():
    """Guards: a repository that grows by every rebuild, and weights that run code when loaded."""
    code = {".py", ".pyc"}  # of make.py, which lives beside what it makes
    files = [path for path in TINY.rglob("*") if path.is_file() and path.suffix not in code]
    assert sum(path.stat().st_size for path in files) <= 5_000_000
    assert {path.suffix for path in files} == {".json", ".jsonl", ".safetensors", ".txt"}


def test_the_checkpoint_loads_in_transformers_with_equal_logits():
    """Guards: a checkpoint that only its own code can read."""
    transformers = pytest.importorskip("transformers")
    ours, theirs = load_policy(TINY), transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    chat = ChatTokenizer.from_folder(TINY)
    token_ids = torch.tensor([chat.message("user", "Hello") + chat.generation_header])
    with torch.no_grad():
        difference = ours.logits(ours(token_ids)) - theirs(token_ids).logits
    assert difference.abs().max() < 1e-4
    assert chat.vocab_size == ours.config.vocab_size
    assert 500_000 <= sum(parameter.numel() for parameter in ours.parameters()) <= 1_000_000


def test_the_checkpoint_knows_the_output_format_and_every_slot():
    """Guards: a tokenizer trained on a corpus that misses a part of the world."""
    chat = ChatTokenizer.from_folder(TINY)
    assert len(chat.encode("<profile>\n- Educational Background: law\n</profile>\n\n<response>\n")) <= 16


@pytest.mark.slow
def test_ppo_mends_the_checkpoint_within_a_few_iterations(tmp_path):
    """Guards the whole loop: persona → simulator → sampler → rewards → PPO → a policy that remembers more."""
    flags = ["--ckpt", str(TINY), "--run-dir", str(tmp_path), "--num-iterations", "3", "--rollout-batch-size", "16"]
    flags += ["--minibatch-size", "4", "--eval-dialogues", "16", "--eval-every", "0", "--no-tensorboard"]
    assert train_rlpa.main(flags) == 0
    records = read_records(tmp_path)
    sampled = [record for record in records if record["kind"] == "heldout/sampled"]
    assert sampled[0]["recall"] < 0.5 and sampled[-1]["recall"] > sampled[0]["recall"] + 0.15
    assert sampled[-1]["response_reward"] > sampled[0]["response_reward"] + 0.1
    first = next(record for record in records if record["kind"] == "train")
    assert first["ratio_dev_first"] < 1e-4 and first["sampler_trainer_logprob_gap"] < 1e-4
    assert "recall of revealed facts" in table([records])
    assert json.loads((tmp_path / "config.json").read_text())["profile_target"] == "ledger"
