"""Offline learning against slow references (losses row by row), and `studies.offline` as a program, on `tiny/`."""

from __future__ import annotations

import copy
import json
import math
import random
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from small_run import chat_server
from torch import Tensor

import train_rlpa
from command_line.flags import TINY_CHECKPOINT
from dialogue import Candidate, ChatTokenizer, Dialogue, Turn
from evaluation import __main__ as evaluation
from learners.learner import make_learner
from model import Qwen2Config, Qwen2ForCausalLM, random_policy
from studies import offline
from studies.offline import Offline, add_reference, epoch_batches, minibatch_step, pack_teachers, teachers
from untrusted.files import from_json

SHAPE = Qwen2Config(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, rope_theta=5000.0)  # fmt: skip
SMALL = {
    "num-iterations": 2, "rollout-batch-size": 4, "minibatch-size": 2, "num-personas": 20, "max-turns": 2,
    "num-candidates": 3, "eval-dialogues": 2, "num-epochs": 2, "lr": 1e-3,
}  # fmt: skip
LEARNING = ("minibatch-size", "eval-dialogues", "num-epochs", "lr")


def settings(method: str, **changes) -> Offline:
    return Offline(**{"ckpt": "x", "method": method, "rollout_batch_size": 4, "minibatch_size": 4, **changes})


def lively(seed: int) -> Qwen2ForCausalLM:
    """A policy of large random weights, so that every token's distribution depends on all before it."""
    policy = random_policy(SHAPE, seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return policy


def random_dialogue(index: int, lengths: list[list[int]]) -> Dialogue:
    """Random ids and rewards, no two alike; `lengths` of each turn's candidates; the best one goes on."""
    rng = random.Random(index)
    dialogue, prompt = Dialogue(index, f"persona {index}", ("Age: 34",)), [rng.randrange(64) for _ in range(5)]
    for turn_lengths in lengths:
        candidates = [
            Candidate(
                token_ids=[rng.randrange(64) for _ in range(n)], logprobs=[-1.0] * n, stop_reason="stop",
                reward=rng.random(),
            )
            for n in turn_lengths
        ]  # fmt: skip
        best = max(range(len(candidates)), key=lambda c: candidates[c].reward)
        dialogue.turns.append(Turn("", prompt, candidates, best))
        prompt = prompt + candidates[best].token_ids + [7] * 4
    return dialogue


def some_dialogues() -> list[Dialogue]:
    return [random_dialogue(i, lengths) for i, lengths in enumerate([[[3, 9, 1], [2, 4]], [[6, 2]], [[1, 1], [5, 7]]])]


def row_logprob(policy: Qwen2ForCausalLM, prompt: list[int], sampled: list[int], temperature: float) -> Tensor:
    """The log-prob of one candidate in a row of its own, all logits at once."""
    hidden = policy(torch.tensor([prompt + sampled]))[0, len(prompt) - 1 : -1]
    log_softmax = (policy.logits(hidden) / temperature).log_softmax(-1)
    return log_softmax.gather(-1, torch.tensor(sampled)[:, None]).sum()


def best_and_worst(turn: Turn) -> tuple[Candidate, Candidate]:
    ranked = sorted(turn.candidates, key=lambda c: c.reward)
    return ranked[-1], ranked[0]


def sums_of(policy: Qwen2ForCausalLM, dialogues: list[Dialogue], reference: Qwen2ForCausalLM, config: Offline) -> dict:
    """Sums of one mini-batch of all dialogues at learning rate 0; the gradients stay."""
    packed = [pack_teachers(dialogue, config) for dialogue in dialogues]
    add_reference(packed, reference, config)
    (minibatch,) = epoch_batches(packed, config, 0)
    return minibatch_step(make_learner(policy, 0.0, config), minibatch, config, 0.0)


def assert_close_gradients(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        scale = other.grad.abs().max().item()
        assert scale > 0 and (one.grad - other.grad).abs().max().item() <= 1e-5 * scale, name


# ---------------------------------------------------------------------------------------------------------- the losses


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("tokens", [1, 100_000])
def test_sft_is_the_cross_entropy_of_the_winners(tokens, temperature):
    """Guards which tokens are learned from, the tree, the temperature, and means per micro-batch: row by row."""
    config = settings("sft", microbatch_tokens=tokens, temperature=temperature, max_grad_norm=1e9)
    policy, dialogues = lively(0), some_dialogues()
    other = copy.deepcopy(policy)
    sums = sums_of(policy, dialogues, policy, config)
    winners = [(turn.prompt_ids, best_and_worst(turn)[0].token_ids) for d in dialogues for turn in d.turns]
    loss = -sum(row_logprob(other, prompt, sampled, temperature) for prompt, sampled in winners)
    count = sum(len(sampled) for _, sampled in winners)
    assert sums["count"] == count and sums["loss"] == pytest.approx(loss.item(), rel=1e-5)
    (loss / count).backward()
    assert_close_gradients(policy, other)


@pytest.mark.parametrize("tokens", [1, 100_000])
def test_dpo_is_the_published_loss_of_sibling_pairs(tokens):
    """Guards pairs, signs, reference and normalisation: −log σ(β(…)) of each turn's best and worst, row by row."""
    config = settings("dpo", beta=0.3, microbatch_tokens=tokens, max_grad_norm=1e9)
    policy, reference, dialogues = lively(0), lively(1), some_dialogues()
    other = copy.deepcopy(policy)
    sums = sums_of(policy, dialogues, reference, config)
    losses, margins = [], []
    for turn in (turn for d in dialogues for turn in d.turns):
        winner, loser = (
            row_logprob(other, turn.prompt_ids, c.token_ids, 1.0)
            - row_logprob(reference, turn.prompt_ids, c.token_ids, 1.0).detach()
            for c in best_and_worst(turn)
        )
        margins.append(0.3 * (winner - loser))
        losses.append((1 + (-margins[-1]).exp()).log())
    assert sums["count"] == len(losses) == 5
    assert sums["loss"] == pytest.approx(sum(losses).item(), rel=1e-5)
    assert sums["margin"] == pytest.approx(sum(margins).item(), rel=1e-4, abs=1e-4)
    assert 0 < sums["accuracy"] == sum(m.item() > 0 for m in margins) < 5
    (sum(losses) / 5).backward()
    assert_close_gradients(policy, other)


def test_dpo_starts_at_log_2():
    """Guards a reference that is not the starting policy, or is computed in another way than the policy."""
    policy = lively(0)
    sums = sums_of(policy, some_dialogues(), policy, settings("dpo"))
    assert sums["loss"] / sums["count"] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(sums["margin"]) < 1e-4


def test_what_is_learned_from(monkeypatch):
    """Guards dropped dialogues, lost verdicts, equal rewards and the threshold, none of which may teach."""
    (dialogue,) = some_dialogues()[:1]
    first, second = dialogue.turns
    first.candidates[0].reward, first.candidates[1].reward = 0.4, 0.1
    first.candidates[2].reward, first.candidates[2].judged = 0.0, False
    first.chosen = 0
    for candidate in second.candidates:
        candidate.reward = 0.25
    second.chosen = 0
    assert teachers(first, settings("sft")) == [first.candidates[0]]
    assert teachers(first, settings("dpo")) == first.candidates[:2]
    assert teachers(second, settings("sft")) == [second.candidates[0]] and teachers(second, settings("dpo")) == []
    strict = settings("sft", min_reward=0.3)
    assert teachers(first, strict) and teachers(second, strict) == []
    assert pack_teachers(dialogue, strict).targets.tolist() == first.candidates[0].token_ids
    assert pack_teachers(dialogue, settings("sft", min_reward=0.5)) is None
    assert pack_teachers(replace(dialogue, dropped="judge: lost"), settings("sft")) is None


def test_an_epoch_takes_every_dialogue_once_in_an_order_of_its_own():
    """Guards dialogues lost or repeated by the shuffle, a remainder left out, and the same order every time."""
    config = settings("sft", minibatch_size=2, num_epochs=2)
    packed = [pack_teachers(random_dialogue(i, [[3, 4]]), config) for i in range(7)]
    orders = [
        [[id(p) for batch in minibatch for p in batch.dialogues] for minibatch in epoch_batches(packed, config, epoch)]
        for epoch in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]
    for order in orders:
        assert [len(minibatch) for minibatch in order] == [2, 2, 2, 1]
        assert sorted(sum(order, [])) == sorted(map(id, packed))


@pytest.mark.parametrize("method", offline.METHODS)
def test_learning_goes_the_right_way(method):
    """Guards signs: winners become likelier by SFT; DPO parts winners from losers, of every pair."""
    config = settings(method)
    policy, dialogues = lively(0), some_dialogues()
    packed = [pack_teachers(dialogue, config) for dialogue in dialogues]
    add_reference(packed, policy, config)
    learner, (minibatch,) = make_learner(policy, 3e-3, config), epoch_batches(packed, config, 0)
    run = [minibatch_step(learner, minibatch, config, 1.0) for _ in range(30)]
    assert run[-1]["loss"] < 0.5 * run[0]["loss"]
    if method == "dpo":
        assert run[-1]["accuracy"] == run[-1]["count"] == 5 and run[-1]["margin"] > 5
        assert run[-1]["winner_logratio"] > run[-1]["loser_logratio"]


# --------------------------------------------------------------------------------------------------------- the program


def arguments(names: dict) -> list[str]:
    return [str(text) for name, value in names.items() for text in (f"--{name}", value)]


@pytest.fixture(scope="module")
def collected(tmp_path_factory) -> Path:
    """A run of SFT on the tiny checkpoint that collected its own dialogues."""
    run = tmp_path_factory.mktemp("offline") / "sft"
    assert offline.main(["--method", "sft", "--ckpt", "--run-dir", str(run), *arguments(SMALL)]) == 0
    return run


def records_of(run: Path, kind: str) -> list[dict]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


def test_a_run_leaves_dialogues_budget_metrics_and_a_checkpoint(collected):
    """Guards the run folder, and a budget that is not what was played: counted again from the dialogues."""
    dialogues = offline.load_dialogues(str(collected))
    candidates = [c for d in dialogues for turn in d.turns for c in turn.candidates]
    budget = json.loads((collected / "collection.json").read_text())["budget"]
    assert (budget["dialogues"], budget["turns"], budget["candidates"]) == (8, 16, len(candidates)) == (8, 16, 48)
    assert budget["sampled_tokens"] == sum(len(c.token_ids) for c in candidates)
    assert budget["simulator_requests"] == 8 and budget["dialogues_dropped"] == 0  # the opener asks nobody
    (cost,) = records_of(collected, "collection")
    assert cost["sampled_tokens"] == budget["sampled_tokens"]
    losses = [record["loss"] for record in records_of(collected, "sft")]
    assert len(losses) == 2 and losses[1] < losses[0]
    assert [record["iteration"] for record in records_of(collected, "heldout/sampled")] == [0, 1, 2]
    files = {path.name for path in (collected / "policy").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "rlpa.json"} <= files


def test_dialogues_survive_the_file():
    """Guards ids, rewards and verdicts on their way through JSON: what is read is what was written."""
    for dialogue in some_dialogues():
        assert from_json(json.loads(json.dumps(asdict(dialogue))), Dialogue, "it") == dialogue


@pytest.mark.slow
def test_the_dialogues_are_those_of_rlpas_first_iteration(collected, tmp_path):
    """Guards the comparison: same seed, same personas, same samples as long as RLPA has not learned."""
    names = {**SMALL, "num-iterations": 1, "episodes-every": 1, "eval-every": 0}
    names.pop("num-epochs")
    assert train_rlpa.main(["--ckpt", "--run-dir", str(tmp_path / "rlpa"), "--no-tensorboard", *arguments(names)]) == 0
    episodes = map(json.loads, (tmp_path / "rlpa" / "episodes.jsonl").read_text().splitlines())
    theirs = [episode for episode in episodes if episode["kind"] == "train"]
    ours = offline.load_dialogues(str(collected))[:4]
    assert [d["persona_id"] for d in theirs] == [d.persona_id for d in ours]
    for one, other in zip(theirs, ours, strict=True):
        texts = [[c["text"] for c in turn["candidates"]] for turn in one["turns"]]
        assert texts == [[c.text for c in turn.candidates] for turn in other.turns]


@pytest.mark.slow
def test_dpo_reuses_a_collection(collected, tmp_path, capsys):
    """Guards a second collection in secret: the same budget is said and recorded, and nothing else is played."""
    run, flags = tmp_path / "dpo", {name: SMALL[name] for name in LEARNING}
    assert offline.main(["--method", "dpo", "--data", str(collected), "--run-dir", str(run), *arguments(flags)]) == 0
    said = capsys.readouterr().out
    (theirs,), (ours,) = (records_of(folder, "collection") for folder in (collected, run))
    assert ours == theirs
    assert f"reused 8 dialogues (0 dropped), 48 candidates, {int(ours['sampled_tokens']):,} sampled tokens" in said
    assert not (run / "dialogues.jsonl").exists() and not (run / "collection.json").exists()
    first, second = records_of(run, "dpo")
    assert first["loss"] < math.log(2) + 0.05 and second["loss"] < first["loss"] and second["margin"] > first["margin"]
    config = offline.parse_args(["--method", "dpo", "--data", str(collected)])
    assert (config.max_turns, config.num_candidates, config.profile_target) == (2, 3, "ledger")
    pairs = [
        pair for d in offline.load_dialogues(str(collected)) for turn in d.turns if (pair := teachers(turn, config))
    ]
    assert pairs and all(best.reward > worst.reward for best, worst in pairs)
    refused = offline.main(["--method", "sft", "--data", str(run), "--run-dir", str(tmp_path / "next")])
    assert refused == 2 and "collection.json does not exist" in capsys.readouterr().err


def test_a_warmup_learns_what_the_script_says(tmp_path, capsys):
    """Guards a warm-up that asks the user, learns other ids than a dialogue would have, or cannot be learned from."""
    run, flags = tmp_path / "warmup", arguments({**SMALL, "eval-every": 0})
    assert offline.main(["--method", "warmup", "--ckpt", "--run-dir", str(run), *flags]) == 0
    chat, dialogues = ChatTokenizer.from_folder(TINY_CHECKPOINT), offline.load_dialogues(str(run))
    assert len(dialogues) == 8 and not records_of(run, "collection")[0].get("simulator_requests")
    for turn in (turn for dialogue in dialogues for turn in dialogue.turns):
        (candidate,) = turn.candidates
        assert candidate.token_ids == [*chat.encode(candidate.text), chat.im_end]
        assert turn.prompt_ids[-len(chat.generation_header) :] == chat.generation_header
    assert sum(turn.winner.failure is None for dialogue in dialogues for turn in dialogue.turns) >= 12  # of 16
    first, second = (record["loss"] for record in records_of(run, "warmup"))
    assert second < first
    assert offline.main(["--method", "warmup", "--data", str(run), "--run-dir", str(tmp_path / "next")]) == 2
    assert "needs --method sft or dpo" in capsys.readouterr().err


def test_evaluate_takes_the_checkpoint(collected, tmp_path):
    """Guards the layout: the evaluation plays base and tuned policy side by side."""
    subjects = [f"base={TINY_CHECKPOINT}", f"sft={collected / 'policy'}"]
    out = ["--turns", "1", "--num-personas", "2", "--quiet", "--out", str(tmp_path / "out")]
    assert evaluation.main([*subjects, *out]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results["subjects"]) == {"base", "sft"}


def test_a_collection_is_recorded_and_replayed(tmp_path, monkeypatch):
    """Guards --replay that asks, and pays, the real endpoint while it says that nothing was asked; and no recording."""
    monkeypatch.chdir(tmp_path)
    asked, common = [], ["--method", "sft", "--ckpt", *arguments({**SMALL, "num-iterations": 1, "num-epochs": 1})]
    with chat_server(lambda request: asked.append(1) or f"I am {len(asked)}.") as url:
        common += ["--simulator-url", url]
        assert offline.main([*common, "--record", "tape", "--run-dir", "live"]) == 0
        calls = len(asked)
        assert offline.main([*common, "--replay", "tape", "--run-dir", "again"]) == 0
    assert len(asked) == calls > 0 and Path("tape").read_bytes().count(b"\n") == calls
    assert Path("again/dialogues.jsonl").read_text() == Path("live/dialogues.jsonl").read_text()


@pytest.mark.parametrize(("given", "named"), [
    (["--ckpt"], ["--method", "sft or dpo or warmup"]),
    (["--method", "ppo", "--ckpt"], ["--method", "'ppo'"]),
    (["--method", "sft"], ["--ckpt"]),
    (["--method", "sft", "--ckpt", "--num-candidates", "1"], ["--num-candidates 1", "2 or more"]),
    (["--method", "sft", "--ckpt", "--beta", "0.2"], ["--beta 0.2", "--method dpo"]),
    (["--method", "dpo", "--ckpt", "--beta", "0"], ["--beta", "above 0"]),
    (["--method", "dpo", "--ckpt", "--min-reward", "1"], ["--min-reward 1", "--method sft"]),
    (["--method", "sft", "--ckpt", "--min-reward", "3"], ["--min-reward", "3", "2.0"]),
    (["--method", "sft", "--ckpt", "--clip-eps", "0.3"], ["--clip-eps"]),
    (["--method", "sft", "--ckpt", "--num-epochs", "0"], ["--num-epochs", "[1, "]),
    (["--method", "sft", "--ckpt", "--lr", "-1"], ["--lr", "[0, "]),
    (["--method", "sft", "--ckpt", "--eval-every", "-1"], ["--eval-every", "[0, "]),
    (["--method", "sft", "--ckpt", "--data", "/nowhere"], ["--data", "/nowhere"]),
    (["--method", "warmup", "--ckpt", "--min-reward", "1"], ["--min-reward 1", "--method sft"]),
])  # fmt: skip
def test_bad_flags(given, named, capsys, tmp_path, monkeypatch):
    """Guards tracebacks and flags ignored in silence: one line that names the value and what to change."""
    monkeypatch.chdir(tmp_path)  # what is not refused would write its run folder into the project
    assert offline.main(given) == 2
    error = capsys.readouterr().err
    assert error.startswith("studies.offline: ") and error.count("\n") == 1 and all(text in error for text in named)


def test_bad_collections(collected, tmp_path, capsys, monkeypatch):
    """Guards dialogues mixed up: other settings than the collection's, a line cut short, a run folder in use."""
    data = ["--method", "sft", "--data", str(collected)]
    assert offline.main([*data, "--max-turns", "5"]) == 2
    assert "--max-turns 5 differs from 2" in capsys.readouterr().err
    broken = tmp_path / "broken"
    broken.mkdir()
    lines = (collected / "dialogues.jsonl").read_text().splitlines()
    (broken / "dialogues.jsonl").write_text("\n".join([lines[0], lines[1][:-9]]))
    (broken / "collection.json").write_text((collected / "collection.json").read_text())
    assert offline.main([*data[:3], str(broken), "--run-dir", str(tmp_path / "x")]) == 2
    assert "line 2 of dialogues.jsonl" in capsys.readouterr().err
    assert offline.main([*data, "--run-dir", str(collected)]) == 2
    assert "--run-dir" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert offline.main(data) == 2
    assert "WORLD_SIZE is 2" in capsys.readouterr().err
