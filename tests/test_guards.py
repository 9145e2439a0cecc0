"""Guards against reward hacking, and the perplexity of held-out text: each trick shows in its own figure."""

from __future__ import annotations

import doctest
import json
import math
import random
from contextlib import closing
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_rlpa
from command_line.flags import TINY_CHECKPOINT
from config import Config
from dialogue import Candidate, ChatTokenizer, Dialogue, Turn
from endpoints.client import ChatClient
from evaluation import __main__ as evaluation
from evaluation.figures import Estimate, estimate, perplexity_samples
from learners.folder import HELDOUT_FILE
from learners.weights import load_policy
from model import Qwen2ForCausalLM
from records import metrics, perplexity
from records.iteration import retention
from records.perplexity import encode_text, parse_texts, read_texts, text_scores
from records.state import newest_checkpoint
from rewards import VERDICTS, score_profile
from tiny import make, scripts
from worlds.ledger import disclosed, told_by

TINY = TINY_CHECKPOINT
FACTS = ("Occupation: nurse", "Location: Oslo", "Interests: chess", "Age: 34")
USER = ["Hello", "I work as a nurse at night.", "I live in Oslo."]
HONEST = [  # profile and reply per turn
    ([], "Hi there, tell me more. What is your job?"),
    (["Occupation: nurse"], "A nurse sees much. Where do you live?"),
    (["Occupation: nurse", "Location: Oslo"], "Oslo must be cold in winter. How old are you?"),
]


def dialogue(turns: list[tuple[list[str], str]], index: int = 0) -> Dialogue:
    """Return a judged dialogue with these profiles and replies."""
    played = Dialogue(index, str(index), FACTS)
    for t, (profile, reply) in enumerate(turns):
        ledger = asdict(score_profile(profile, FACTS, disclosed(FACTS, USER[: t + 1])))
        verdicts = dict.fromkeys(VERDICTS, True)
        reply = Candidate(
            token_ids=[1], logprobs=[0.0], stop_reason="stop", profile=profile, response=reply, verdicts=verdicts,
            ledger=ledger, parts={"profile": ledger["f1"], "response": 1.0},
        )  # fmt: skip
        played.turns.append(Turn(USER[t], [], [reply], told=told_by(FACTS, USER[t])))
    return played


def rates(*dialogues: Dialogue) -> dict[str, float]:
    return metrics.rates(metrics.tally(list(dialogues)))


@pytest.mark.parametrize("module", [metrics, perplexity])
def test_examples(module):
    """Guards examples in docstrings that no longer hold."""
    found = doctest.testmod(module)
    assert found.attempted > 0 and found.failed == 0


# -------------------------------------------------------------------------------------------------------------- guards


@pytest.mark.parametrize(
    ("guard", "profile", "reply"),
    [
        ("reply_words", HONEST[2][0], "Oslo must be cold, " + "so I have heard, " * 9 + "no? How old are you?"),
        ("reply_repeated", HONEST[2][0], HONEST[1][1]),
        ("question_repeated", HONEST[2][0], "Oslo must be cold in winter. Which city are you in?"),
        ("parroting", HONEST[2][0], "I live in Oslo. How old?"),
        ("unsupported_lines", [*HONEST[2][0], "Gender: woman", "Age: 35"], HONEST[2][1]),
        ("duplicate_lines", [*HONEST[2][0], "works as a nurse", "Location: oslo", "Others: Oslo"], HONEST[2][1]),
        ("lines_recited", HONEST[2][0], "Oslo must be cold for a nurse in winter. How old are you?"),
    ],
)
def test_a_trick_shows_in_its_guard(guard, profile, reply):
    """Guards blind guards: the honest dialogue has a low value, the trick in its last turn a higher one."""
    honest, hacked = rates(dialogue(HONEST)), rates(dialogue([*HONEST[:2], (profile, reply)]))
    assert hacked[guard] > honest[guard] + 0.1
    assert honest["reply_repeated"] == honest["question_repeated"] == honest["parroting"] == 0
    assert honest["unsupported_lines"] == honest["duplicate_lines"] == 0 and honest["lines_recited"] == 2 / 3


def test_lines_that_add_something_are_no_duplicates():
    """Guards two hobbies, one city in another's name, and family told twice: only what is covered whole counts."""
    lines = ["Interests: chess", "Interests: chess boxing", "Location: York", "Location: New York", "Others: two cats",
             "Family Background: two sons", "likes tea", "likes green tea"]  # fmt: skip
    assert metrics.duplicate_lines(lines) == 0
    assert metrics.duplicate_lines(lines[::-1]) == 3  # "chess", "York" and "likes tea" after what holds them


def test_mode_collapse_shows_in_distinct_n_alone():
    """Guards a policy that has one dialogue for everybody: within a dialogue nothing is repeated."""
    words = iter(f"word{i}" for i in range(10_000))
    various = [dialogue([([], " ".join(next(words) for _ in range(8)) + ".") for _ in USER], i) for i in range(10)]
    collapsed = [dialogue([(p, turn.winner.response) for p, turn in zip([[]] * 3, various[0].turns, strict=True)], i)
                 for i in range(10)]  # fmt: skip
    rich, poor = rates(*various), rates(*collapsed)
    assert rich["distinct_1"] == rich["distinct_2"] == 1 and poor["distinct_1"] == poor["distinct_2"] == 0.1
    assert poor["reply_repeated"] == rich["reply_repeated"] == 0


def test_distinct_n_of_ranks_is_that_of_all_replies():
    """Guards a mean of the ranks' figures: what both say is new to neither of them, but to all it is said twice."""
    one, other = dialogue(HONEST, 0), dialogue(HONEST, 1)
    halves = [metrics.tally([one]), metrics.tally([other])]
    assert metrics.rates(metrics.sum_counters(halves)) == rates(one, other)
    assert rates(one, other)["distinct_2"] == rates(one)["distinct_2"] / 2


def test_guards_of_nobody_are_not_measured():
    """Guards zeros, which look healthy, where all dialogues were dropped."""
    lost = dialogue([])
    lost.dropped = "simulator: timeout"
    found = rates(lost)
    assert all(math.isnan(found[name]) for name in (*metrics.GUARDS, "distinct_1", "distinct_2"))


def test_training_and_evaluation_measure_the_same(tmp_path):
    """Guards a second set of definitions: the evaluation's figures are `metrics.rates` of the dialogues it played."""
    flags = ["--num-personas", "5", "--turns", "4", "--quiet", "--out", str(tmp_path / "out")]
    (played,) = evaluation.evaluate(evaluation.parse_args([f"x={TINY}", *flags]))
    found, figures = rates(*played.dialogues), played.summary.figures
    for name in (*metrics.GUARDS, "distinct_1", "distinct_2"):
        assert figures[name].value == pytest.approx(found[name]), name
    assert figures["reply_words"].low < figures["reply_words"].high and math.isnan(figures["distinct_1"].low)
    assert str(Estimate(0.25, math.nan, math.nan)) == "0.250"


def test_a_method_without_a_profile_has_no_profile_guards():
    """Guards a prompting baseline that looks free of padding because it writes no profile at all."""
    found = evaluation.measure([dialogue(HONEST)], 3, writes_profile=False)
    for name in metrics.GUARDS:
        assert np.isnan(found[name]).all() == (name in metrics.PROFILE_GUARDS), name


# ---------------------------------------------------------------------------------------------------------- perplexity


@pytest.fixture(scope="module")
def tiny() -> tuple[Qwen2ForCausalLM, ChatTokenizer]:
    return load_policy(TINY).requires_grad_(False), ChatTokenizer.from_folder(TINY)


def test_scores_are_the_log_likelihood_of_the_assistants_turns(tiny):
    """Guards an off-by-one, and user or system tokens that are counted: held against logits and plain softmax."""
    policy, chat = tiny
    text = read_texts(TINY / HELDOUT_FILE)[0]
    ids, mask = encode_text(text, chat)
    logprobs = policy.logits(policy(torch.tensor([ids]))).log_softmax(-1)[0]
    expected = -sum(float(logprobs[t - 1, ids[t]]) for t in range(len(ids)) if mask[t])
    (nats, tokens), = text_scores(policy, chat, [text])
    assert nats == pytest.approx(expected, rel=1e-5) and tokens == sum(mask)
    spoken = [m["content"] for m in text if m["role"] == "assistant"]
    assert chat.decode([i for i, m in zip(ids, mask, strict=True) if m]) == "".join(f"{s}<|im_end|>" for s in spoken)


def test_chats_are_encoded_as_in_fine_tuning(tiny):
    """Guards another template than the one the policy was tuned on."""
    turns = scripts.scripted_dialogue(random.Random(5), 3)
    messages = [{"role": "system", "content": make.SYSTEM_PROMPT}]
    for user, assistant in turns:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    assert encode_text(messages, tiny[1]) == make.encode_dialogue(turns, tiny[1])


@pytest.mark.parametrize("raw", [b"[" * 100_000, b'{"text": ' + b"[" * 900 + b"]" * 900 + b"}", b'{"text": NaN}',
                                 b"\xff", b'{"text": 1' + b"0" * 400 + b"}", b"null",
                                 b'{"messages": [[]]}', b"{"])  # fmt: skip
def test_strange_text_is_one_line(raw):
    """Guards a traceback from a file of somebody else: deep, endless, of other types, or in another encoding."""
    with pytest.raises(ValueError, match="^it.jsonl") as caught:
        parse_texts(b'{"text": "fine"}\n' + raw, "it.jsonl")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("raw", [b"{", b"", b'{"text": "a"}', b'{"text": "%s"}' % (b"far too long " * 9000)])
def test_a_checkpoints_own_text_is_named_when_it_is_amiss(tiny, raw):
    """Guards an error about --perplexity, a flag that the trainer lacks, and a file without its folder."""
    policy = SimpleNamespace(sampled=tiny[0])
    state = SimpleNamespace(config=Config(ckpt="base"), files={HELDOUT_FILE: raw}, policy=policy, chat=tiny[1])
    with pytest.raises(ValueError, match="^base/sft_heldout.jsonl") as caught:
        retention(state)
    assert "--perplexity" not in str(caught.value)


def test_a_policy_that_knows_nothing_has_the_vocabularys_perplexity(tiny):
    """Guards the formula: with equal logits it is V, whatever the text."""
    _, chat = tiny
    policy = load_policy(TINY).requires_grad_(False)
    policy.model.norm.weight.zero_()
    scores = text_scores(policy, chat, ["Some plain text.", "And more of it!"])
    assert perplexity.perplexity(scores) == pytest.approx(policy.config.vocab_size, rel=1e-5)
    assert scores[:, 1].tolist() == [len(chat.encode(text)) - 1 for text in ("Some plain text.", "And more of it!")]


def test_intervals_are_over_texts_and_paired(tiny):
    """Guards tokens that are resampled one by one (too narrow), and two subjects with other resamples each."""
    scores = text_scores(*tiny, read_texts(TINY / HELDOUT_FILE))
    found = estimate(perplexity_samples(scores, seed=0))
    assert found.value == pytest.approx(perplexity.perplexity(scores)) and found.low < found.value < found.high
    worse = perplexity_samples(scores * [2, 1], 0) - perplexity_samples(scores, 0)
    assert estimate(worse).low > 0
    many = np.repeat(scores, 4, 0)
    narrow = estimate(perplexity_samples(many, seed=0))
    assert narrow.high - narrow.low < 0.7 * (found.high - found.low)


def test_the_heldout_text_was_not_trained_on():
    """Guards text from a stream of the warm start: of its first steps no dialogue, and the file is what is built."""
    lines = (TINY / HELDOUT_FILE).read_text().splitlines(keepends=True)
    assert lines == make.heldout_lines(0, 32, 6)
    heldout = {tuple(m["content"] for m in text if m["role"] == "user") for text in read_texts(TINY / HELDOUT_FILE)}
    for rank in (0, 1):
        rng = random.Random(f"0|{rank}")  # as in make.fine_tune
        assert not heldout & {tuple(u for u, _ in scripts.scripted_dialogue(rng, 6)) for _ in range(100)}
    for text in read_texts(TINY / HELDOUT_FILE):
        assert len(text) == 13 and text[0]["role"] == "system"


def test_text_is_read_from_jsonl_and_from_plain_files(tmp_path):
    """Guards a format that the documentation names and the reader does not know."""
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
    jsonl, plain = tmp_path / "a.jsonl", tmp_path / "b.txt"
    jsonl.write_text(json.dumps(chat) + "\n\n" + json.dumps({"text": "Plain.", "url": "x"}) + "\n")
    plain.write_text("One passage\nof two lines.\n\n\nAnother.\n")
    assert read_texts(jsonl) == [chat["messages"], "Plain."]
    assert [" ".join(passage.split()) for passage in read_texts(plain)] == ["One passage of two lines.", "Another."]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.jsonl", "{oops\n", "line 1 is not JSON"),
        ("a.jsonl", '{"text": "x"}\n{"messages": [{"role": "user"}]}\n', "line 2"),
        ("a.jsonl", "[1]\n", "line 1"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "x"}]}\n', "assistant"),
        ("a.jsonl", "\n", "holds no text"),
        ("a.txt", "", "holds no text"),
        ("a.txt", "a b " * 5000, "4096 positions"),
        ("a.txt", "a", "no token"),
    ],
)
def test_bad_text_is_one_line_before_anything_is_played(name, text, says, tmp_path, capsys):
    """Guards tracebacks, 0 ÷ 0, and an hour of dialogues before a file is found to be amiss."""
    (tmp_path / name).write_text(text)
    out = tmp_path / "out"
    flags = ["--perplexity", str(tmp_path / name), "--quiet", "--num-personas", "1", "--turns", "1", "--out", str(out)]
    assert evaluation.main([f"x={TINY}", *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("evaluation: ") and "\n" not in error and says in error and not out.exists()


def test_the_evaluation_reports_perplexity_of_checkpoints(tmp_path, capsys):
    """Guards a figure that is lost on its way to the table, JSON or the differences; endpoints have none."""
    out = tmp_path / "out"
    flags = ["--perplexity", str(TINY / HELDOUT_FILE), "--num-personas", "2", "--turns", "1", "--quiet"]
    assert evaluation.main([f"a={TINY}", f"b={TINY}", *flags, "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    found = results["subjects"]["a"]["figures"]["perplexity"]
    assert 1.2 < found["low"] < found["value"] < found["high"] < 1.7
    assert set(results["differences"]["b - a"]["figures"]["perplexity"].values()) == {0.0}
    assert "\nperplexity  " in capsys.readouterr().out
    with closing(ChatClient("http://127.0.0.1:9", "m")) as client:
        texts = read_texts(TINY / HELDOUT_FILE)
        assert np.isnan(evaluation.perplexities_of(client, Config(), texts, 0)).all()


def test_the_trainer_logs_the_perplexity_of_what_its_checkpoint_brought(tmp_path):
    """Guards capability that is lost unseen: before and after training, on the held-out set, and in the checkpoint."""
    flags = ["--num-iterations", "1", "--rollout-batch-size", "4", "--max-turns", "1", "--eval-dialogues", "2"]
    flags += ["--eval-every", "0", "--no-tensorboard", "--lr", "0.003", "--run-dir", str(tmp_path / "run")]
    assert train_rlpa.main(["--ckpt", str(TINY), *flags]) == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = {(r["kind"], r["iteration"]): r["perplexity_sft"] for r in records if "perplexity_sft" in r}
    assert set(logged) == {(f"heldout/{how}", i) for how in ("sampled", "greedy") for i in (0, 1)}
    assert logged["heldout/greedy", 0] == logged["heldout/sampled", 0] != logged["heldout/greedy", 1]
    assert all(name in records[0] for name in (*metrics.GUARDS, "distinct_1", "distinct_2"))
    policy = newest_checkpoint(str(tmp_path / "run")) / "policy"
    assert (policy / HELDOUT_FILE).read_bytes() == (TINY / HELDOUT_FILE).read_bytes()
