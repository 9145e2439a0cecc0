"""Checkpoints as GGUF: read as the folder that they were made from, or refused by their cause."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_run import small_tokenizer
from test_checkpoints import loading_peak, save_as_a_run_does
from test_lora import stirred
from test_model import logits_of, peer_logits, randomised, some_ids, tiny_config
from tokenizers import Regex, Tokenizer, pre_tokenizers

import train_rlpa
from benchmarks.throughput import in_child
from benchmarks.write_gguf import write_gguf
from command_line.flags import parse_args
from config import Config
from dialogue import CHAT_TEMPLATE, ChatTokenizer
from learners.adapters import save_adapter
from learners.folder import carried_files, resolve_checkpoint
from learners.learner import make_learner
from learners.weights import load_policy, save_pretrained
from model import Qwen2Config, random_policy
from records.state import fingerprint, setup
from simulator import Environment
from untrusted import gguf_file

gguf = pytest.importorskip("gguf", reason="an extra: it restores what GGUF holds")
transformers = pytest.importorskip("transformers", reason="the parity tests compare with transformers")
QWEN = Path(__file__).parents[1].parent / "shared" / "qwen2.5" / "tokenizer.json"
FAMILIES = pytest.mark.parametrize("family", ["qwen2", "llama"])
TEXTS = [
    "In 2024, 12,345.67 + 0007 = 42", "spaces at its end   \n and tabs\t\t\n\n\n end  ", "我住在北京，今年３４岁。",
    "🦜🦜 👨‍👩‍👧‍👦 🇳🇴", "I'm you're WE'LL 'S", "é e\u0301 ﬁ ½ ² Ⅳ ٣", "<|im_start|>user\nHi<|im_end|>\n",
    "a_b-c+d=e $5 `code` ~x^2 <tool_call>{}</tool_call>", "नमस्ते", "カタカナ", "",
    "\r\n\r\n x\r", "\u200b zero\u00a0nbsp\u3000wide", " ", "\n",
]  # fmt: skip


def make_folder(folder: Path, family: str = "qwen2", **changes) -> Path:
    """Write a random policy of two layers with the small tokenizer; widths are such that all of GGUF's types fit."""
    shape = dict(vocab_size=small_tokenizer().get_vocab_size(), hidden_size=64, intermediate_size=96)
    save_pretrained(randomised(tiny_config(model_type=family, eos_token_id=2, **shape, **changes)), folder)
    small_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("llama"), "llama")


# ------------------------------------------------------------------------------------------------------------- the same


@FAMILIES
@pytest.mark.parametrize("tied", [True, False])
def test_a_file_is_read_as_its_folder(tmp_path, family, tied):
    """Guards q and k permuted the wrong way, of the wrong family, or with the wrong heads: that loads, and babbles."""
    folder = make_folder(tmp_path, family, tie_word_embeddings=tied)
    path = write_gguf(folder, tmp_path / "model.gguf")
    policy, loaded = load_policy(folder), load_policy(resolve_checkpoint(path))
    assert loaded.config == policy.config
    assert all(torch.equal(tensor, policy.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    theirs = ChatTokenizer.from_folder(folder)
    ours = ChatTokenizer.from_folder(path, policy.config.vocab_size)
    assert ours.tokenizer.get_vocab() == theirs.tokenizer.get_vocab() and ours.stop_ids == {0, 2}
    for text in TEXTS:
        assert ours.message("user", text) == theirs.message("user", text)
        assert ours.tokenizer.encode(text).ids == theirs.tokenizer.encode(text).ids
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))


@FAMILIES
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16", "BF16"])
def test_logits_match_transformers_on_the_same_file(tmp_path, monkeypatch, family, kind):
    """Guards rows of blocks that are restored piece by piece, and every name, against somebody else's reader."""
    write_gguf(make_folder(tmp_path / "model", family), tmp_path / "model.gguf", kind)
    monkeypatch.setattr(gguf_file, "CHUNK", 64 * 7)
    policy = load_policy(tmp_path / "model.gguf")
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    token_ids = some_ids(policy.config, 2, 20)
    torch.testing.assert_close(logits_of(policy, token_ids), peer_logits(hf, token_ids), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_loading_holds_one_set_of_weights(tmp_path):
    """Guards a peak of twice the weights: all that the file holds, restored before the first tensor is taken."""
    shape = Qwen2Config(small_tokenizer().get_vocab_size(), 512, 2048, 12, 8, 2, model_type="llama")
    save_pretrained(random_policy(shape, seed=0), tmp_path)
    small_tokenizer().save(str(tmp_path / "tokenizer.json"))
    peak, weights = in_child(loading_peak, str(write_gguf(tmp_path, tmp_path / "model.gguf", "Q8_0")))
    assert 100 < weights < peak < 1.5 * weights + 64  # the package itself, and a tensor


# ---------------------------------------------------------------------------------------------------------- tokenizers


@pytest.mark.skipif(not QWEN.is_file(), reason="../shared/qwen2.5 is not on this machine")
def test_qwens_own_tokenizer_comes_back(tmp_path):
    """Guards ids of Qwen-2.5's 151,665 tokens: added ones that are not special, and those that only fill up."""
    save_pretrained(random_policy(Qwen2Config(151_936, 8, 8, 1, 1, 1, tie_word_embeddings=True), 0), tmp_path)
    shutil.copy(QWEN, tmp_path / "tokenizer.json")
    path = write_gguf(tmp_path, tmp_path / "model.gguf")
    ours, theirs = ChatTokenizer.from_folder(path, 151_936), ChatTokenizer.from_folder(tmp_path, 151_936)
    assert ours.tokenizer.get_vocab() == theirs.tokenizer.get_vocab() and ours.vocab_size == 151_665
    assert str(ours.tokenizer.get_added_tokens_decoder()) == str(theirs.tokenizer.get_added_tokens_decoder())
    assert ours.stop_ids == {151_643, 151_645}
    for text in TEXTS:
        assert ours.message("user", text) == theirs.message("user", text)
        assert ours.tokenizer.encode(text).ids == theirs.tokenizer.encode(text).ids


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
PUBLISHED = {  # how the models' own tokenizer.json cut a text
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA_3), "isolated"),
                                          pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]),
}  # fmt: skip


@pytest.mark.parametrize("pre", PUBLISHED)
def test_words_are_cut_as_published(llama, tmp_path, pre):
    """Guards digits that are one token here and several there: the model reads other numbers than it learned."""
    path = write_gguf(llama, tmp_path / "model.gguf", tokenizer__ggml__pre=pre)
    ours = Tokenizer.from_buffer(gguf_file.read_part(path, "tokenizer.json"))
    for text in TEXTS:
        words = [word for word, _ in ours.pre_tokenizer.pre_tokenize_str(text)]
        assert words == [word for word, _ in PUBLISHED[pre].pre_tokenize_str(text)]
    assert ours.normalizer is None and ours.model.ignore_merges == (pre == "llama-bpe")


def test_words_are_cut_as_llama_cpp_does_by_default(llama, tmp_path):
    """Guards the tag `default`: digits by three from the left, each punctuation mark apart."""
    path = write_gguf(llama, tmp_path / "model.gguf", tokenizer__ggml__pre="default")
    ours = Tokenizer.from_buffer(gguf_file.read_part(path, "tokenizer.json"))
    words = [word for word, _ in ours.pre_tokenizer.pre_tokenize_str("It's 12345 (a+b).")]
    assert words == ["It", "'", "s", "Ġ", "123", "45", "Ġ", "(", "a", "+", "b", ")."]


@pytest.mark.parametrize(
    "changes, expected",
    [
        (dict(), {0, 2}),
        (dict(tokenizer__ggml__eos_token_id=7), {0, 2, 7}),
        (dict(tokenizer__ggml__eos_token_id=None), {0, 2}),
        (dict(tokenizer__ggml__eot_token_id=8, tokenizer__ggml__eom_token_id=9), {0, 2, 8, 9}),
        (dict(tokenizer__ggml__eot_token_id=400), "eos_token_id 400 is outside"),
        (dict(tokenizer__ggml__eot_token_id="8"), "'8'; it takes a whole number"),
        (dict(tokenizer__ggml__eos_token_id=[2, 3]), "it takes a whole number"),
    ],
)
def test_every_declared_end_is_kept(llama, tmp_path, changes, expected):
    """Guards turns that run to the limit, as the model ends them with a token that nobody looked for."""
    path = write_gguf(llama, tmp_path / "model.gguf", **changes)
    if isinstance(expected, set):
        assert ChatTokenizer.from_folder(path, 400).stop_ids == expected
        return
    with pytest.raises(ValueError, match=expected):
        ChatTokenizer.from_folder(path, 400)


# ------------------------------------------------------------------------------------------------------------- refused


def renamed(old: str, new: str):
    """Return what gives a tensor another name."""
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def added(name: str, array: np.ndarray):
    """Return what adds a tensor."""
    return lambda tensors: tensors.update({name: array.astype(np.float32)})


Q = "blk.1.attn_q.weight"
CAUSES = {
    "another architecture": (dict(general__architecture="gemma3"), "general.architecture is 'gemma3'; only"),
    "yarn": (dict(own__rope__scaling__type="yarn"), "llama.rope.scaling.type is 'yarn'; only 'none'"),
    "linear": (dict(own__rope__scaling__factor=4.0), "llama.rope.scaling.factor is 4.0"),
    "experts": (dict(own__expert_count=8), "llama.expert_count is 8; only 0"),
    "another scale": (dict(own__logit_scale=0.5), "llama.logit_scale is 0.5, which is not implemented"),
    "a window": (dict(own__attention__sliding_window=64), "sliding_window is 64, which is not implemented"),
    "heads of their own width": (dict(own__attention__key_length=32), "key_length is 32; only 16"),
    "half a turn": (dict(own__rope__dimension_count=8), "rope.dimension_count is 8; only 16"),
    "another vocabulary": (dict(own__vocab_size=9), "llama.vocab_size is 9; only 400"),
    "widths in a list": (dict(own__feed_forward_length=[96, 96]), "length is .96, 96.; it takes a whole number"),
    "no heads": (dict(own__attention__head_count=0), "head_count is 0; it must lie in"),
    "heads that do not share": (dict(own__attention__head_count_kv=3), "num_attention_heads is 4; it must be"),
    "no width": (dict(own__embedding_length=None), "hidden_size is missing"),
    "no layers": (dict(own__block_count=None), "num_hidden_layers is missing"),
    "more layers": (dict(own__block_count=3), "tensor model.layers.2.self_attn.q_proj.weight is missing"),
    "eps of NaN": (dict(own__attention__layer_norm_rms_epsilon=float("nan")), "nan; it takes a finite number"),
    "one of several parts": (dict(split__count=3), "one of 3 parts; join them: llama-gguf-split --merge"),
    "SentencePiece": (dict(tokenizer__ggml__model="llama"), "tokenizer.ggml.model is 'llama'; only 'gpt2'"),
    "an unknown split": (dict(tokenizer__ggml__pre="tekken"), "tokenizer.ggml.pre is 'tekken'; only gpt-2, smollm"),
    "no split": (dict(tokenizer__ggml__pre=None), "tokenizer.ggml.pre is None"),
    "no merges": (dict(tokenizer__ggml__merges=None), "tokenizer.ggml.merges is None"),
    "merges of three": (dict(tokenizer__ggml__merges=["a b c"]), "and 1 merges make no vocabulary"),
    "merges of what is not there": (dict(tokenizer__ggml__merges=["Ġ 我"]), "tokenizer.ggml.merges are refused"),
    "too few types": (dict(tokenizer__ggml__token_type=[1]), "400 tokens, 1 types and"),
    "a token twice": (dict(tokenizer__ggml__tokens=["a"] * 400), "make no vocabulary"),
    "no ChatML": (dict(tokenizer__ggml__tokens=["x" * i for i in range(400)], tokenizer__ggml__merges=["x x"]),
                  "the tokenizer has no <.im_start.>"),
    "a template that is none": (dict(tokenizer__chat_template=3), "tokenizer.chat_template is 3; it takes a text"),
    "a tensor is missing": (dict(edit=renamed(Q, "blk.7.attn_q.weight")), "layers.7.self_attn.q_proj.weight is not"),
    "nobody asked for it": (dict(edit=renamed(Q, "blk.1.attn_qkv.weight")), "blk.1.attn_qkv.weight is not part"),
    "a bias of a Llama": (dict(edit=added("blk.0.attn_q.bias", np.ones(64))), "q_proj.bias is not part of the model"),
    "Llama 3's frequencies": (dict(edit=added("rope_freqs.weight", np.full(8, 8.0))), "rope_freqs.weight scales the"),
    "another shape": (dict(edit=added(Q, np.ones((63, 64)))), r"q_proj.weight has shape \[63, 64\], not \[64, 64\]"),
    "NaN": (dict(edit=added("output_norm.weight", np.full(64, np.nan))), "model.norm.weight holds NaN or infinity"),
    "no embedding": (dict(edit=renamed("token_embd.weight", "x.weight")), "token_embd.weight is missing"),
}  # fmt: skip


@pytest.mark.parametrize("cause", CAUSES)
def test_what_would_be_another_model_is_refused(llama, tmp_path, cause):
    """Guards a file that loads and computes something else than its authors meant."""
    changes, words = CAUSES[cause]
    path = write_gguf(llama, tmp_path / "model.gguf", **changes)
    with pytest.raises(ValueError, match=words) as error:
        load_policy(resolve_checkpoint(path))
        ChatTokenizer.from_folder(path, 400)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_frequencies_that_scale_nothing_are_ignored(llama, tmp_path):
    """Guards a file refused for factors of 1."""
    load_policy(write_gguf(llama, tmp_path / "model.gguf", edit=added("rope_freqs.weight", np.ones(8))))


def test_a_file_cut_anywhere_is_one_line(llama, tmp_path):
    """Guards a traceback from, or a wait for, a download that stopped."""
    raw = write_gguf(llama, tmp_path / "model.gguf").read_bytes()
    header = gguf_file.read_header(tmp_path / "model.gguf").tensors["output_norm.weight"].start
    for at in [*range(0, 200), *range(200, header, 997), *range(header, len(raw), 50_021), len(raw) - 1]:
        (tmp_path / "cut.gguf").write_bytes(raw[:at])
        with pytest.raises(ValueError, match="cut.gguf") as error:
            resolve_checkpoint(tmp_path / "cut.gguf")
        assert "\n" not in str(error.value)


def test_without_the_package_the_way_out_is_named(llama, tmp_path, monkeypatch):
    """Guards an ImportError in place of a sentence."""
    path = write_gguf(llama, tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="pip install gguf"):
        resolve_checkpoint(path)


# ------------------------------------------------------------------------------------------------------------ in a run


@FAMILIES
def test_what_a_run_saves_is_a_whole_folder(tmp_path, family):
    """Guards a run that began from one file, and ends with weights that nobody else can talk to."""
    template = "{# its own #}" + CHAT_TEMPLATE
    folder = make_folder(tmp_path / "folder", family)
    path = write_gguf(folder, tmp_path / "model.gguf", tokenizer__chat_template=template)
    chat = save_as_a_run_does(path, tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert (theirs.eos_token, theirs.pad_token) == ("<|im_end|>", "<|endoftext|>")
    ours = chat.message("user", TEXTS[0] + TEXTS[2]) + chat.generation_header
    messages = [{"role": "user", "content": TEXTS[0] + TEXTS[2]}]
    assert theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == ours
    assert (tmp_path / "saved" / "chat_template.jinja").read_text() == template
    assert json.loads((tmp_path / "saved" / "generation_config.json").read_text())["eos_token_id"] == [0, 2]
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert hf.config.model_type == family
    token_ids = torch.tensor([ours])
    torch.testing.assert_close(peer_logits(hf, token_ids), logits_of(load_policy(path), token_ids), atol=1e-5, rtol=0)
    before, after = (load_file(where / "model.safetensors") for where in (folder, tmp_path / "saved"))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_run_begins_from_a_file_and_knows_it_again(llama, tmp_path):
    """Guards a resumed run that does not find its reference, and another file in its place."""
    path = write_gguf(llama, tmp_path / "model.gguf")
    config = parse_args(["--ckpt", str(path), "--num-personas", "4", "--eval-dialogues", "1"], "")
    assert config.ckpt == str(path)
    state = setup(config, Environment(None, None))
    written = {"tokenizer_config.json", "chat_template.jinja", "system_prompt.txt"}
    assert state.files.keys() == {"tokenizer.json", "generation_config.json"} | written
    assert state.sources == {"ckpt": fingerprint(config, "ckpt")}
    assert fingerprint(Config(ckpt=str(llama)), "ckpt") == state.sources["ckpt"]  # the same weights, unquantised
    other = write_gguf(llama, tmp_path / "other.gguf", edit=added("output_norm.weight", np.ones(64)))
    assert fingerprint(Config(ckpt=str(other)), "ckpt") != state.sources["ckpt"]
    assert carried_files(path).keys() == {"tokenizer.json", "generation_config.json"}


def test_an_adapter_is_merged_onto_a_file(llama, tmp_path):
    """Guards a merge that looks for its base's folder, and leaves the tokenizer of a file behind."""
    path, adapter, merged = write_gguf(llama, tmp_path / "model.gguf"), tmp_path / "adapter", tmp_path / "merged"
    policy, token_ids = stirred(load_policy(path)), torch.tensor([[3, 4, 5, 6]])
    save_adapter(make_learner(policy, 1e-3, Config(ckpt="x"), torch.float32), adapter, str(path))
    assert train_rlpa.main(["--ckpt", str(path), "--adapter", str(adapter), "--merge", str(merged)]) == 0
    expected = logits_of(policy, token_ids)
    torch.testing.assert_close(logits_of(load_policy(merged), token_ids), expected, atol=1e-5, rtol=1e-5)
    assert ChatTokenizer.from_folder(merged, policy.config.vocab_size).encode(TEXTS[0])
