"""PPO against slow references: advantages, the token tree, the losses, and one whole update in fp64.

Most dialogues here are random ids: packing, advantages and losses never look at the text. Where the text matters
(seams, `history_profile latest`, the profile's last token) scripted dialogues are encoded by a real tokenizer.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
from dataclasses import dataclass, replace
from typing import Literal

import pytest
import torch
from small_run import small_tokenizer
from torch import Tensor

import records.iteration
import rewards
import train_rlpa
from command_line.flags import TINY_CHECKPOINT
from config import HERE, Amount, Config, flag
from dialogue import Candidate, ChatTokenizer, Dialogue, Turn, open_turn, render_turn
from dry_run import memory
from dry_run.plan import dry_run
from kernels.linear_logprob import linear_logprob, reference_logprob
from kernels.ppo_head import reference_ppo
from learners import loading
from learners.learner import Learner, make_learner
from learners.weights import load_policy, save_pretrained
from model import Critic, Qwen2Config, Qwen2ForCausalLM, ValueHead, random_policy
from packing import Batch, Packed, collate, critic_values, make_batches, microbatches, pack, policy_hidden
from records.metrics import rates, tally
from records.state import State
from rewards import Judge, ParsedTurn, read_candidate, score_candidate
from simulator import Environment
from tiny.scripts import scripted_dialogue
from train_rlpa import (
    KL_ESTIMATORS,
    Play,
    add_advantages,
    add_group_advantages,
    add_statistics,
    gae,
    lr_share,
    minibatch_update,
    policy_loss,
    rollout,
    run_iteration,
    token_rewards,
    update,
    value_loss,
    whiten_advantages,
)
from worlds.personas import Persona

FACTS = ("Age: 34", "Occupation: baker", "Location: Oslo")


def together(packed: list[Packed]) -> Batch:
    """One micro-batch of these dialogues, as a forward takes it."""
    return collate(packed).to(torch.zeros(0))


def settings(**changes) -> Config:
    """The published defaults at a size for tests; one dialogue per mini-batch, and no sampler's log-probs to trust."""
    small = {"ckpt": "x", "rollout_batch_size": 2, "minibatch_size": 1, "max_turns": 2, "num_candidates": 2}
    return Config(**{**small, "old_logprobs": "trainer", **changes})


def policy_logprobs(policy: Qwen2ForCausalLM, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of a micro-batch's action tokens."""
    return linear_logprob(policy_hidden(policy, batch), policy.head_weight, batch.targets, temperature)[:2]


def loss_of(policy: Qwen2ForCausalLM, reference: Qwen2ForCausalLM | None, batch: Batch, config: Config):
    """The policy's loss and its statistics from a fresh forward."""
    return policy_loss(policy_hidden(policy, batch), policy.head_weight, reference, batch, config)


@pytest.fixture(scope="module")
def chat() -> ChatTokenizer:
    """A byte-level tokenizer of about 400 ids with Qwen's control tokens."""
    return ChatTokenizer(small_tokenizer())


@pytest.fixture(scope="module")
def shape(chat) -> Qwen2Config:
    """Two layers, hidden 32, grouped heads and a head that is not tied to the embedding."""
    return Qwen2Config(vocab_size=chat.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                       num_attention_heads=4, num_key_value_heads=2, rope_theta=5000.0)  # fmt: skip


def lively(shape: Qwen2Config, seed: int) -> Qwen2ForCausalLM:
    """A policy of large random weights and biases, so that every token's distribution depends on all before it."""
    policy = random_policy(shape, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.3, generator=generator)
            elif parameter.dim() > 1:
                parameter.mul_(5)
    return policy


@pytest.fixture
def policy(shape) -> Qwen2ForCausalLM:
    return lively(shape, 0)


@pytest.fixture
def critic(shape) -> Critic:
    return Critic.from_policy(lively(shape, 10), seed=3)


def ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(320) for _ in range(count)]


def random_candidate(rng: random.Random, length: int) -> Candidate:
    """Random ids with random rewards; the profile ends somewhere inside."""
    candidate = sampled(ids(rng, length), profile_tokens=rng.randint(1, length))
    return earn(candidate, rng.random(), float(rng.random() < 0.5))


def sampled(token_ids: list[int], **fields) -> Candidate:
    """A candidate of these ids, about which nothing has been found out."""
    return Candidate(token_ids=token_ids, logprobs=[-1.0] * len(token_ids), stop_reason="stop", **fields)


def earn(candidate: Candidate, profile: float, response: float) -> Candidate:
    """Give a candidate its reward parts, and their sum as its reward."""
    candidate.parts, candidate.reward = {"profile": profile, "response": response}, profile + response
    return candidate


def random_dialogue(index: int, turns: list[list[int]], user_length: int = 4, seed: int = 0) -> Dialogue:
    """A dialogue of random ids; `turns` lists the lengths of each turn's candidates; a random one goes on."""
    rng = random.Random(f"{seed} {index}")
    dialogue, prompt = Dialogue(index, f"persona {index}", FACTS), ids(rng, 5)
    for lengths in turns:
        candidates = [random_candidate(rng, length) for length in lengths]
        dialogue.turns.append(Turn("", prompt, candidates, chosen=rng.randrange(len(lengths))))
        prompt = prompt + dialogue.turns[-1].winner.token_ids + [7] * user_length
    return dialogue


def scripted(chat: ChatTokenizer, index: int, n_turns: int, n: int, history_profile: str = "all") -> Dialogue:
    """A dialogue as a trained policy leads it; the last candidate of a turn was cut short, and sometimes goes on."""
    rng = random.Random(index)
    dialogue = Dialogue(index, f"persona {index}", FACTS)
    for _ in range(n_turns):
        scripts = [scripted_dialogue(rng, 1)[0] for _ in range(n)]
        turn = open_turn(dialogue, scripts[0][0], chat, history_profile)
        rows = [([*chat.encode(text), chat.im_end], "stop") for _, text in scripts]
        if n > 1:
            rows[-1] = rows[-1][0][:-9], "length"
        for token_ids, reason in rows:
            candidate = read_candidate(token_ids, [-1.0] * len(token_ids), reason, dialogue, chat)
            turn.candidates.append(earn(candidate, rng.random(), float(rng.random() < 0.5)))
        turn.chosen = rng.randrange(n)
    return dialogue


def rows(dialogue: Dialogue) -> list[tuple[list[int], list[int]]]:
    """What the published code would train on: each judged candidate with its whole history, (prompt, sampled)."""
    return [(turn.prompt_ids, c.token_ids) for turn in dialogue.turns for c in turn.candidates if c.judged]


def with_values(p: Packed, seed: int = 0) -> Packed:
    """Fill in random statistics, as if models had been asked."""
    generator = torch.Generator().manual_seed(seed)
    for name in ("old_logprobs", "ref_logprobs"):
        setattr(p, name, -5 * torch.rand(len(p.targets), generator=generator))
    p.values = torch.randn(len(p.targets), generator=generator)
    return p


def ready_to_train(dialogues, policy, ref_policy, critic, config) -> tuple[list[Packed], list]:
    """Pack dialogues and fill in statistics and whitened advantages, as an iteration does."""
    packed = [pack(d, config) for d in dialogues]
    batches = make_batches(packed, config)
    add_statistics(batches, policy, ref_policy, critic, config)
    for p in packed:
        add_advantages(p, config) if critic else add_group_advantages(p, config)
    whiten_advantages(packed, config.advantage)
    return packed, batches


def prepared(dialogues: list[Dialogue], policy: Qwen2ForCausalLM, critic: Critic, config: Config) -> list[Packed]:
    """Do so with a reference that differs from the policy."""
    return ready_to_train(dialogues, policy, lively(policy.config, 5), critic, config)[0]


# ----------------------------------------------------------------------------------------------------------- advantages


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.97, 0.9), (1.0, 1.0), (0.9, 0.0)])
def test_gae_equals_the_direct_sum(gamma, lam):
    """Guards the recursion: A_t = Σ_k (γλ)^k δ_{t+k}, δ_t = r_t + γ V_{t+1} − V_t, summed the slow way in fp64."""
    rng = random.Random(0)
    reward, value = ([rng.uniform(-1, 1) for _ in range(40)] for _ in range(2))
    delta = [r + gamma * v1 - v for r, v, v1 in zip(reward, value, [*value[1:], 0.0], strict=True)]
    expected = [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, 40)) for t in range(40)]
    assert gae(reward, value, 0.0, 0.0, gamma, lam) == pytest.approx(expected, abs=1e-12)


def test_gae_by_hand():
    """Guards off-by-one errors: three tokens worked out on paper, γ = ½, λ = ½, with something after the end.

    δ = (0 + ½·2 − 1, 0 + ½·4 − 2, 8 + 3 − 4) = (0, 0, 7); A_3 = 7 + ½·2 = 8; A_2 = ¼·8 = 2; A_1 = ¼·2 = ½.
    """
    assert gae([0.0, 0.0, 8.0], [1.0, 2.0, 4.0], 3.0, 2.0, gamma=0.5, lam=0.5) == [0.5, 2.0, 8.0]


def slow_advantages(
    dialogue: Dialogue, reward: list[list[float]], value: list[list[float]], config: Config
) -> list[list[float]]:
    """Advantages from the definition, one list per judged candidate: follow each candidate to the end of its path.

    A path is a list of (reward, value, discount to the next token's value, whether its advantage counts on).
    """
    gamma_turn = config.gamma_turn if config.credit == "dialogue" else 0.0
    spans = [(t, c) for t, turn in enumerate(dialogue.turns) for c, x in enumerate(turn.candidates) if x.judged]
    chosen = {t: s for s, (t, c) in enumerate(spans) if c == dialogue.turns[t].chosen}

    def path(s: int, goes_on: bool) -> list[tuple[float, float, float, bool]]:
        last = len(reward[s]) - 1
        return [
            (reward[s][i], value[s][i], config.gamma if i < last else gamma_turn, i < last or goes_on)
            for i in range(last + 1)
        ]

    advantages = []
    for s, (t, _) in enumerate(spans):
        steps = path(s, s == chosen[t])
        for later in range(t + 1, len(dialogue.turns)):
            steps += path(chosen[later], True)
        advantages.append([direct_sum(steps[i:], config.gae_lambda) for i in range(len(reward[s]))])
    return advantages


def direct_sum(steps: list[tuple[float, float, float, bool]], lam: float) -> float:
    """Σ_k (Π_{j<k} d_j λ) (r_k + d_k V_{k+1} − V_k), up to the first token behind which nothing counts."""
    total, weight = 0.0, 1.0
    for k, (reward, value, discount, counts_on) in enumerate(steps):
        next_value = steps[k + 1][1] if k + 1 < len(steps) else 0.0
        total += weight * (reward + discount * next_value - value)
        weight *= discount * lam * counts_on
    return total


@pytest.mark.parametrize("changes", [
    {"credit": "turn"},
    {"credit": "dialogue"},
    {"credit": "dialogue", "gamma_turn": 0.7, "gamma": 0.98, "gae_lambda": 0.8},
    {"credit": "dialogue", "reward_at": "segment", "kl_estimator": "k3"},
])  # fmt: skip
def test_advantages_equal_the_direct_sum_along_the_chosen_path(changes):
    """Guards credit across turns: a ragged three-turn dialogue against Σ over the path that each token starts."""
    config = settings(**changes)
    dialogue = random_dialogue(0, [[3, 5, 1], [2, 2], [6, 1, 4]])
    p = with_values(pack(dialogue, config))
    reward = [token_rewards(span, p, config) for span in p.spans]
    value = [p.values[span.start : span.stop].tolist() for span in p.spans]
    expected = torch.tensor([a for part in slow_advantages(dialogue, reward, value, config) for a in part])
    add_advantages(p, config)
    torch.testing.assert_close(p.advantages, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(p.returns, expected + p.values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reward_at", ["turn", "segment"])
def test_gamma_turn_zero_is_credit_turn(reward_at):
    """Guards the promise that the published credit is the special case γ_turn = 0, to the last bit."""
    results = []
    for changes in ({"credit": "turn"}, {"credit": "dialogue", "gamma_turn": 0.0}, {"credit": "dialogue"}):
        config = settings(reward_at=reward_at, **changes)
        p = with_values(pack(random_dialogue(0, [[3, 5], [2, 4], [1, 3]]), config))
        add_advantages(p, config)
        results.append((p.advantages, p.returns))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], results[2][0])


def test_two_turns_by_hand():
    """Guards the chain between turns: γ = 1, λ = γ_turn = ½, A (chosen) and B, then C and D (chosen).

    D: δ = (−½, 1½), A = (¼, 1½).     C: δ = −1.
    A: its end sees ½·V_D = ½: δ = (−¼, ¼); A_2 = ¼ + ½·½·¼ = 5/16 (D's reward arrives); A_1 = −¼ + ½·5/16 = −3/32.
    B: the same ½·V_D and no later advantage: 1 + ½ − ½ = 1. It is not punished for not having been continued.
    """

    def turn(prompt: list[int], chosen: int, *candidates: tuple[list[int], float, float]) -> Turn:
        return Turn("", prompt, [earn(sampled(t), p, r) for t, p, r in candidates], chosen)

    first = turn([1, 2], 0, ([3, 4], 0.0, 0.0), ([5], 1.0, 0.0))
    second = turn([1, 2, 3, 4, 6], 1, ([7], 0.0, 0.0), ([8, 9], 1.0, 1.0))
    config = settings(credit="dialogue", gamma=1.0, gae_lambda=0.5, gamma_turn=0.5, kl_coef=0.0)
    p = with_values(pack(Dialogue(0, "p", FACTS, [first, second]), config))
    p.values = torch.tensor([0.5, 0.25, 0.5, 1.0, 1.0, 0.5])
    add_advantages(p, config)
    assert p.advantages.tolist() == [-0.09375, 0.3125, 1.0, -1.0, 0.25, 1.5]
    assert p.returns.tolist() == [0.40625, 0.5625, 1.5, 0.0, 1.25, 2.0]


def test_user_tokens_are_skipped():
    """Guards γλ per user token: what the user says has no reward and no advantage, and its length changes nothing."""
    config = settings(credit="dialogue", gamma=0.9, gae_lambda=0.9)
    short, long = (with_values(pack(random_dialogue(0, [[3, 2], [4, 2]], user_length=n), config)) for n in (1, 60))
    for p in (short, long):
        add_advantages(p, config)
        assert len(p.advantages) == len(p.returns) == len(p.targets) == 11
    assert len(long.token_ids) - len(short.token_ids) == 59
    assert torch.equal(short.advantages, long.advantages)


def test_unjudged_candidates_and_dropped_dialogues_are_not_trained_on():
    """Guards masking: tokens of a lost dialogue or an unjudged candidate are in no tensor at all."""
    config = settings()
    dialogue = random_dialogue(0, [[3, 5], [2, 4]])
    dialogue.turns[0].chosen, dialogue.turns[0].candidates[1].judged = 0, False
    p = pack(dialogue, config)
    assert p.targets.tolist() == [i for _, sampled in rows(dialogue) for i in sampled] and len(p.targets) == 9
    assert [span.chosen for span in p.spans if span.turn == 0] == [True]
    dialogue.dropped = "simulator: timeout"
    assert pack(dialogue, config) is None


# ------------------------------------------------------------------------------------------ advantages without a critic


def critic_free(advantage: str, **changes) -> Config:
    return settings(advantage=advantage, **changes)


def compared(rewards: list[float], kl: list[list[float]], config: Config) -> list[list[float]]:
    """Advantages of one turn whose candidates earned `rewards` and whose tokens have these log-ratios."""
    dialogue = random_dialogue(0, [[len(part) for part in kl]])
    for candidate, reward in zip(dialogue.turns[0].candidates, rewards, strict=True):
        earn(candidate, reward / 2, reward / 2)
    p = with_values(pack(dialogue, config))
    p.old_logprobs = p.ref_logprobs + torch.tensor([x for part in kl for x in part])
    p.values = None
    add_group_advantages(p, config)
    return [p.advantages[span.start : span.stop].tolist() for span in p.spans]


KL = [[0.25, 0.15], [0.1], [-0.1, 0.0, 0.2]]  # sums 0.4, 0.1 and 0.1


def test_rloo_by_hand():
    """Guards baseline and KL: R − β K = 1.8, 0.95, −0.05 for R = 2, 1, 0, each minus the mean of the other two."""
    found = compared([2.0, 1.0, 0.0], KL, critic_free("rloo", kl_coef=0.5))
    expected = [[1.8 - 0.45] * 2, [0.95 - 0.875], [-0.05 - 1.375] * 3]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)


def test_grpo_by_hand():
    """Guards mean, deviation and KL: (R − 1) / (√⅔ + 1e-4) for R = 2, 1, 0, less β K = 0.2, 0.05, 0.05 centred."""
    found = compared([2.0, 1.0, 0.0], KL, critic_free("grpo", kl_coef=0.5))
    unit = 1 / (math.sqrt(2 / 3) + 1e-4)
    expected = [[unit - 0.15] * 2, [0.075], [-unit + 0.075] * 3]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize("estimator", ["k3", "exact"])
@pytest.mark.parametrize("advantage", ["rloo", "grpo"])
def test_a_kl_in_the_loss_is_not_in_the_group_advantage(advantage, estimator):
    """Guards against counting the KL twice: with k3 and exact the advantages are those without any."""
    with_kl = compared([2.0, 1.0, 0.0], KL, critic_free(advantage, kl_coef=0.5, kl_estimator=estimator))
    assert with_kl == compared([2.0, 1.0, 0.0], KL, critic_free(advantage, kl_coef=0.0))


@pytest.mark.parametrize("advantage", ["rloo", "grpo"])
def test_equal_candidates_teach_nothing(advantage):
    """Guards a tiny KL blown up by grpo's deviation, and whitening that gives a turn of equals a direction."""
    (a, b, c) = compared([1.0] * 3, [[1e-6], [0.0], [-1e-6]], critic_free(advantage))
    assert max(abs(x) for part in (a, b, c) for x in part) < 1e-6
    assert compared([1.0] * 3, KL, critic_free(advantage, kl_coef=0.0)) == [[0.0] * 2, [0.0], [0.0] * 3]
    packed = [with_values(pack(random_dialogue(i, [[3, 2]]), settings())) for i in range(2)]
    packed[0].advantages, packed[1].advantages = torch.tensor([2.0, 2.0, 2.0, -1.0, -1.0]), torch.zeros(5)
    mean, std = whiten_advantages(packed, advantage).values()
    assert (mean, std) == pytest.approx((0.4, math.sqrt(1.4 - 0.16)))
    assert torch.equal(packed[1].advantages, torch.zeros(5))
    assert packed[0].advantages[0].item() == pytest.approx(2.0 if advantage == "grpo" else 2 / std)


def test_a_candidate_alone_has_no_advantage():
    """Guards a division by n − 1 = 0: where the others' verdicts were lost, there is nothing to compare with."""
    dialogue = random_dialogue(0, [[3, 5], [2, 4]])
    dialogue.turns[0].chosen, dialogue.turns[0].candidates[1].judged = 0, False
    for advantage in ("rloo", "grpo"):
        p = with_values(pack(dialogue, settings()))
        add_group_advantages(p, critic_free(advantage))
        assert p.advantages[:3].tolist() == [0.0] * 3 and p.advantages[3:].abs().min() > 0


@pytest.mark.parametrize("advantage", ["rloo", "grpo"])
def test_without_a_critic_the_gradient_does_not_depend_on_the_microbatches(chat, policy, advantage):
    """Guards means per micro-batch or per candidate: gradients for 4, 2 and 1 micro-batches, and no value anywhere."""
    results = []
    for tokens in (1, 600, 100_000):
        config = critic_free(
            advantage, rollout_batch_size=4, minibatch_size=4, microbatch_tokens=tokens, max_grad_norm=1e9
        )
        model = copy.deepcopy(policy)
        dialogues = [scripted(chat, i, n_turns=1 + i, n=2) for i in range(4)]
        packed, (minibatch,) = ready_to_train(dialogues, model, lively(model.config, 5), None, config)
        assert all(p.values is None and p.returns is None for p in packed)
        sums = minibatch_update(
            make_learner(model, 1e-3, config), None, minibatch, sum(len(p.targets) for p in packed), 1.0, config, True
        )
        assert not any("value" in name or "critic" in name for name in sums) and sums["updates_skipped"] == 0
        results.append(torch.cat([q.grad.flatten() for q in model.parameters()]))
    for gradient in results[1:]:
        assert ((gradient - results[0]).norm() / results[0].norm()).item() < 1e-6


@pytest.mark.parametrize("advantage", ["rloo", "grpo"])
def test_the_policys_step_is_the_same_without_a_critic(policy, critic, advantage):
    """Guards a policy step that goes another way than with a critic: the same advantages give the same weights."""
    moved = []
    for other in (None, critic):
        config, model = critic_free(advantage), copy.deepcopy(policy)
        dialogues = [random_dialogue(i, [[3, 4], [2, 2]]) for i in range(2)]
        _, batches = ready_to_train(dialogues, model, lively(model.config, 5), None, config)
        for p in (p for minibatch in batches for batch in minibatch for p in batch.dialogues):
            p.values = p.returns = torch.zeros(len(p.targets))
        learners = make_learner(model, 1e-3, config), other and make_learner(other, 1e-3, config)
        metrics = update(*learners, batches, config, (0, 2), True)
        assert ("value_loss" in metrics) == ("critic_grad_norm" in metrics) == (other is not None)
        moved.append(weights_of(model))
    assert same(*moved) and not same(moved[0], weights_of(policy))


@pytest.mark.parametrize("changes", [
    {"num_candidates": 1},
    {"credit": "dialogue"},
    {"critic": "shared"},
    {"critic_ckpt": "somewhere"},
    {"critic_warmup": 2},
])  # fmt: skip
@pytest.mark.parametrize("advantage", ["rloo", "grpo"])
def test_what_makes_no_sense_without_a_critic_is_refused(advantage, changes):
    """Guards flags that would be ignored in silence: the message names value, flag and --advantage."""
    with pytest.raises(ValueError, match="--advantage") as error:
        critic_free(advantage, **changes)
    ((name, value),) = changes.items()
    assert f"{flag(name)} {value}" in str(error.value) and "\n" not in str(error.value)
    assert settings(**changes).advantage == "gae"


def test_a_run_without_a_critic_has_none(chat, shape, tmp_path, monkeypatch):
    """Guards a critic that is built, saved, restored or logged after all, from the first line to a resumed end."""
    monkeypatch.setattr(loading, "load_or_make_critic", lambda *_: pytest.fail("a critic was made"))
    save_pretrained(lively(shape, 0), tmp_path / "ckpt")
    chat.tokenizer.save(str(tmp_path / "ckpt" / "tokenizer.json"))
    run = tmp_path / "run"
    small = {
        "num-iterations": 1, "rollout-batch-size": 2, "minibatch-size": 1, "num-personas": 4, "max-turns": 2,
        "num-candidates": 2, "max-new-tokens": 6, "eval-dialogues": 1, "eval-every": 0, "lr": 1e-3,
    }  # fmt: skip
    flags = [text for name, value in small.items() for text in (f"--{name}", str(value))]
    arguments = ["--ckpt", str(tmp_path / "ckpt"), "--run-dir", str(run), "--advantage", "rloo", "--no-tensorboard"]
    assert train_rlpa.main([*arguments, *flags]) == 0
    assert train_rlpa.main(["--resume", str(run), "--num-iterations", "2"]) == 0
    folders = sorted((run / "checkpoints").iterdir())
    assert len(folders) == 2 and not [path for folder in folders for path in folder.glob("*critic*")]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [record for record in records if record["kind"] == "train"]
    assert [record["iteration"] for record in trained] == [1, 2]
    assert not {"value_loss", "critic_grad_norm", "explained_variance"} & set().union(*trained)
    assert all(record["policy_grad_norm"] >= 0 and "advantage_std" in record for record in trained)


def test_memory_without_a_critic(shape):
    """Guards --dry-run: nothing of a critic is counted, and what is left is what the models and AdamW hold."""
    plan = memory.Plan(tokens=100, actions=80, workspace=1 << 20, critic=False, separate_critic=False)
    learner = make_learner(lively(shape, 0), 1e-3, settings())
    train_rlpa.optimizer_step(learner, 1.0, 1.0)
    moments = [m for state in learner.optimizer.state.values() for m in state.values() if m.dim()]
    resident = plan.resident(shape)
    assert resident["critic"] == 0 and resident["optimizer"] == sum(m.nbytes for m in moments)
    assert not any("critic" in name for name in memory.phases(shape, plan))
    shared = replace(plan, critic=True)
    assert 0 < memory.peak(shape, shared)[1] - memory.peak(shape, plan)[1] < 100 * shape.hidden_size * 4
    reports = {}
    for advantage in ("gae", "rloo"):
        config = settings(
            ckpt=str(TINY_CHECKPOINT), advantage=advantage, dry_run=HERE, num_personas=4, max_new_tokens=16,
            max_user_tokens=16,
        )  # fmt: skip
        header, *lines = dry_run(config).splitlines()
        assert header.split()[-9:] == "critic reference optimizer gradients activations head KV cache total".split()
        reports[advantage] = [float(line.split()[-8]) for line in lines[:5]]
    assert reports["rloo"] == [0.0] * 5 and min(reports["gae"]) > 0


# -------------------------------------------------------------------------------------------------------- token rewards


def test_reward_placement(chat):
    """Guards where a reward is earned: both places give the same sum, `segment` pays the profile where it closes."""
    dialogue = Dialogue(0, "p", FACTS)
    turn = open_turn(dialogue, "Hello, I am 34.", chat)
    token_ids = [*chat.encode(render_turn(["Age: 34", "Location: Rome"], "Hi! Where do you live?")), chat.im_end]
    candidate = read_candidate(token_ids, [-1.0] * len(token_ids), "stop", dialogue, chat)
    turn.candidates = [earn(candidate, 0.5, 1.0)]
    at_end, at_segment = (
        token_rewards(p.spans[0], p, config)
        for config in (
            settings(reward_at=at, kl_coef=0.0, profile_weight=3.0, response_weight=0.25) for at in ("turn", "segment")
        )
        for p in [with_values(pack(dialogue, config))]
    )
    closes = turn.winner.profile_tokens
    assert "</profile>" in chat.decode(token_ids[:closes]) and "</profile>" not in chat.decode(token_ids[: closes - 1])
    assert at_end == [0.0] * (len(token_ids) - 1) + [1.75]
    assert at_segment[closes - 1] == 1.5 and at_segment[-1] == 0.25 and sum(at_segment) == sum(at_end)


def test_kl_is_in_the_reward_or_in_the_loss(policy, critic):
    """Guards against counting the KL twice or not at all: k1 in the reward of each token, k3 and exact in the loss."""
    reference = lively(policy.config, 9)
    losses, placed = {}, {}
    for estimator, coef in (("k1", 0.1), ("k3", 0.1), ("exact", 0.1), ("k3", 0.0)):
        config = settings(kl_estimator=estimator, kl_coef=coef, num_candidates=1)
        p = pack(random_dialogue(0, [[8]]), config)
        add_statistics([[collate([p])]], policy, reference, critic, config)
        p.advantages, candidate = torch.zeros(8), p.spans[0].candidate
        losses[estimator, coef] = loss_of(policy, reference, together([p]), config)[0].item()
        placed[estimator, coef] = torch.tensor(token_rewards(p.spans[0], p, config))
    end = torch.zeros(8)
    end[-1] = candidate.reward
    torch.testing.assert_close(placed["k1", 0.1], end - 0.1 * (p.old_logprobs - p.ref_logprobs))
    torch.testing.assert_close(placed["k3", 0.1], end)
    torch.testing.assert_close(placed["exact", 0.1], end)
    new, ref = (m.logits(policy_hidden(m, together([p]))).log_softmax(-1) for m in (policy, reference))
    gap = (new - ref).gather(1, p.targets[:, None])
    assert losses["k1", 0.1] == losses["k3", 0.0] == 0.0
    assert losses["k3", 0.1] == pytest.approx(0.1 * (torch.exp(-gap) - 1 + gap).sum().item(), rel=1e-4)
    assert losses["exact", 0.1] == pytest.approx(0.1 * (new.exp() * (new - ref)).sum().item(), rel=1e-4)


@dataclass
class WithBrevity(Config):
    """The settings of somebody who has added a third reward part."""

    brevity_weight: Amount = 2.0


@pytest.mark.parametrize("kl_estimator", ["k1", "k3"])
@pytest.mark.parametrize("reward_at", ["turn", "segment"])
def test_tokens_get_the_whole_reward(chat, monkeypatch, reward_at, kl_estimator):
    """Guards a reward part that the choice knows and the loss does not: the tokens' sum is the candidate's reward.

    A third part is one function, one entry and one setting, and stands in metrics, too.
    """
    monkeypatch.setitem(rewards.REWARD_PARTS, "brevity", lambda candidate, *_: 1 / len(candidate.response))
    small = {"ckpt": "x", "profile_weight": 3.0, "response_weight": 0.25, "kl_coef": 0.0, "num_candidates": 3}
    config = WithBrevity(**small, reward_at=reward_at, kl_estimator=kl_estimator)
    dialogue = Dialogue(0, "p", FACTS)
    turn, candidates = open_turn(dialogue, "Hello, I am 34.", chat), []
    replies = "Hi! Being 34 is fine. Where do you live?", "Oh."
    for text in (*(render_turn(["Age: 34"], reply) for reply in replies), "no turn"):
        token_ids = [*chat.encode(text), chat.im_end]
        candidates.append(read_candidate(token_ids, [-1.0] * len(token_ids), "stop", dialogue, chat))
        score_candidate(candidates[-1], dialogue, config, Judge(None, rewards.rule_verdicts, 0))
    turn.candidates = candidates
    p = with_values(pack(dialogue, config))
    for span in p.spans:
        profile, response, brevity = (span.candidate.parts[name] for name in ("profile", "response", "brevity"))
        expected = 3 * profile + 0.25 * response + 2 * brevity
        assert span.candidate.reward == pytest.approx(expected, abs=1e-12)
        placed = token_rewards(span, p, config)
        assert sum(placed) == pytest.approx(expected, abs=1e-12)
        at_profile = reward_at == "segment" and profile > 0
        assert sum(x != 0 for x in placed) == (0 if expected == 0 else 1 + at_profile)
    good, short, bad = candidates
    assert good.parts["response"] == 1 and min(good.parts.values()) > 0 and bad.reward == 0
    assert short.parts["response"] == 0 and short.parts["brevity"] == 1 / 3
    metrics = rates(tally([dialogue]))
    assert metrics["brevity_reward"] == pytest.approx((good.parts["brevity"] + 1 / 3) / 3)
    assert metrics["reward"] == pytest.approx((good.reward + short.reward) / 3)


@dataclass
class WithK2(Config):
    """The settings of somebody who has added an estimator of the KL."""

    kl_estimator: Literal["k1", "k2", "k3", "exact"] = "k2"


def test_a_new_kl_estimator_is_one_line(policy, critic, monkeypatch):
    """Guards estimators written in two places: one entry, k2 = gap² / 2, is in loss and gradient, and in no reward."""
    monkeypatch.setitem(KL_ESTIMATORS, "k2", lambda gap: gap**2 / 2)
    config = WithK2(ckpt="x", rollout_batch_size=2, minibatch_size=1, kl_coef=0.3, old_logprobs="trainer")
    p = pack(random_dialogue(0, [[8, 5]]), config)
    add_statistics([[collate([p])]], policy, lively(policy.config, 9), critic, config)
    assert all(sum(token_rewards(span, p, config)) == span.candidate.reward for span in p.spans)
    p.advantages = torch.randn(13, generator=torch.Generator().manual_seed(0))
    batch = together([p])
    hidden = policy_hidden(policy, batch).detach().requires_grad_()
    losses = [policy_loss(hidden, policy.head_weight, None, batch, replace(config, kl_coef=c))[0] for c in (0.3, 0.0)]
    logprobs = policy.logits(hidden).log_softmax(-1).gather(1, p.targets[:, None])[:, 0]
    penalty = 0.3 * ((logprobs - p.ref_logprobs) ** 2 / 2).sum()
    assert penalty.item() > 0.1 and (losses[0] - losses[1]).item() == pytest.approx(penalty.item(), rel=1e-4)
    ours, plain, expected = (torch.autograd.grad(loss, hidden)[0] for loss in (*losses, penalty))
    torch.testing.assert_close(ours - plain, expected, atol=1e-5, rtol=1e-4)


def test_whitening_is_over_all_action_tokens():
    """Guards whitening per dialogue or per turn: mean 0 and standard deviation 1 over the tokens of the whole batch."""
    packed = []
    for i, turns in enumerate([[[2, 9]], [[30, 1], [4, 4]], [[1, 1]]]):
        p = with_values(pack(random_dialogue(i, turns), settings()))
        p.advantages = 3 * i + torch.randn(len(p.targets), generator=torch.Generator().manual_seed(i))
        packed.append(p)
    before = torch.cat([p.advantages for p in packed])
    mean, std = whiten_advantages(packed).values()
    after = torch.cat([p.advantages for p in packed])
    assert (mean, std) == pytest.approx((before.mean().item(), before.std(correction=0).item()), rel=1e-5)
    torch.testing.assert_close(after, (before - before.mean()) / before.std(correction=0))
    assert abs(after.mean().item()) < 1e-6 and after.std(correction=0).item() == pytest.approx(1, abs=1e-5)


# ------------------------------------------------------------------------------------------------------------- the tree


def assert_close_gradients(ours: torch.nn.Module, theirs: torch.nn.Module, tolerance: float) -> None:
    """Compare gradients, relative to the largest one of each tensor."""
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        scale = other.grad.abs().max().item()
        assert scale > 0, name
        assert (one.grad - other.grad).abs().max().item() <= tolerance * scale, name


def unjudged(dialogue: Dialogue) -> Dialogue:
    """Lose the verdict on one candidate of each turn that did not go on."""
    for turn in dialogue.turns:
        turn.candidates[turn.chosen - 1].judged = False
    return dialogue


TREES = {
    "ragged": lambda chat: [random_dialogue(0, [[3, 9, 1], [2], [6, 1, 4, 4]]), random_dialogue(1, [[1, 1]])],
    "one candidate": lambda chat: [random_dialogue(0, [[5], [3], [4]])],
    "same first tokens": lambda chat: [shared_start(random_dialogue(0, [[6, 7, 6], [4, 5]]))],
    "unjudged": lambda chat: [unjudged(random_dialogue(i, [[3, 4, 2], [5, 2]])) for i in range(2)],
    "scripted": lambda chat: [scripted(chat, i, n_turns=3, n=3) for i in range(2)],
    "latest": lambda chat: [scripted(chat, i, n_turns=4, n=2, history_profile="latest") for i in range(2)],
}


def shared_start(dialogue: Dialogue) -> Dialogue:
    """Let all candidates of a turn begin alike and two be the same."""
    for turn in dialogue.turns:
        for candidate in turn.candidates:
            candidate.token_ids[:3] = turn.candidates[0].token_ids[:3]
        turn.candidates[-1].token_ids[:] = turn.candidates[0].token_ids[: len(turn.candidates[-1].token_ids)]
    first, second = dialogue.turns
    second.prompt_ids = first.prompt_ids + first.winner.token_ids + [7, 7]
    return dialogue


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("case", TREES)
def test_the_tree_gives_the_logprobs_and_gradients_of_plain_rows(chat, policy, case, temperature):
    """Guards mask, positions and node numbers: every candidate computed once in a tree equals its own causal row."""
    dialogues = TREES[case](chat)
    other = copy.deepcopy(policy)
    logprobs, entropy = policy_logprobs(policy, together([pack(d, settings()) for d in dialogues]), temperature)
    expected, expected_entropy = [], []
    for prompt, sampled in (row for d in dialogues for row in rows(d)):
        hidden = other(torch.tensor([prompt + sampled]))[0, len(prompt) - 1 : -1]  # causal, one row at a time
        log_softmax = (other.logits(hidden) / temperature).log_softmax(-1)
        expected.append(log_softmax.gather(-1, torch.tensor(sampled)[:, None])[:, 0])
        expected_entropy.append(-(log_softmax.exp() * log_softmax).sum(-1))
    torch.testing.assert_close(logprobs, torch.cat(expected), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, torch.cat(expected_entropy), atol=1e-5, rtol=1e-5)
    weights = torch.randn(2, len(logprobs), generator=torch.Generator().manual_seed(1))
    (weights[0] @ logprobs + weights[1] @ entropy).backward()
    (weights[0] @ torch.cat(expected) + weights[1] @ torch.cat(expected_entropy)).backward()
    assert_close_gradients(policy, other, 1e-5)


@pytest.mark.parametrize("case", TREES)
def test_the_tree_gives_the_values_of_plain_rows(chat, critic, case):
    """Guards the critic's half of the same: the value before each action token, and its gradient."""
    dialogues = TREES[case](chat)
    other = copy.deepcopy(critic)
    values = critic_values(critic, together([pack(d, settings()) for d in dialogues]), None)
    expected = torch.cat([
        other(torch.tensor([prompt + sampled]))[0, len(prompt) - 1 : -1]
        for d in dialogues for prompt, sampled in rows(d)
    ])  # fmt: skip
    torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn(len(values), generator=torch.Generator().manual_seed(1))
    (weights @ values).backward()
    (weights @ expected).backward()
    assert_close_gradients(critic, other, 1e-5)


def test_a_tree_stores_each_token_once(chat):
    """Guards the saving: three turns of four candidates are no more tokens than the last prompt and all candidates."""
    dialogue = scripted(chat, 0, n_turns=3, n=4)
    p = pack(dialogue, settings())
    assert len(p.token_ids) <= len(dialogue.turns[-1].prompt_ids) + len(p.targets)
    assert len(p.token_ids) < sum(len(prompt) + len(sampled) for prompt, sampled in rows(dialogue)) / 3


# ---------------------------------------------------------------------------------------------------------- the rollout


class Talker:
    """A user that always has something to say; it stands in for the HTTP client."""

    counts = {"requests": 0, "errors": {}}
    name, outage, refusal, last_failure, answered, useful = "simulator", "", "", "", True, True

    def ask(self, messages, seed):
        return f"I am {seed % 90} years old. <|im_end|>"


def play(policy: Qwen2ForCausalLM, chat: ChatTokenizer, config: Config) -> list[Dialogue]:
    dialogues = [Dialogue(i, f"persona {i}", FACTS) for i in range(config.rollout_batch_size)]
    how = Play(config.num_candidates, config.temperature, (0, "test"))
    rollout(policy, chat, dialogues, how, config, Environment(Talker(), None))
    return dialogues


@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>"])
@pytest.mark.parametrize("history_profile", ["all", "latest"])
def test_action_tokens_are_the_sampled_ids(shape, history_profile, end):
    """Guards token-in, token-out: what was sampled is trained on, a turn's end too; `\\n` and the user are not.

    A turn that ended with another declared token than `<|im_end|>` keeps it, and gets `<|im_end|>` as context.
    """
    config = settings(max_new_tokens=40, history_profile=history_profile, num_candidates=3, rollout_batch_size=4)
    token_id = small_tokenizer().token_to_id(end)
    policy, chat = lively(shape, 0), ChatTokenizer(small_tokenizer(), [token_id])
    with torch.no_grad():
        policy.lm_head.weight[token_id] *= 3  # so that some turns end by themselves
    dialogues = play(policy, chat, config)
    candidates = [c for d in dialogues for turn in d.turns for c in turn.candidates]
    assert {c.stop_reason for c in candidates} == {"stop", "length"}
    assert token_id in {c.token_ids[-1] for c in candidates}
    assert all((c.token_ids[-1] in chat.stop_ids) == (c.stop_reason == "stop") for c in candidates)
    for dialogue in dialogues:
        for before, after in itertools.pairwise(dialogue.turns):
            sampled = before.winner.token_ids
            behind = after.prompt_ids[: -len(chat.message("user", after.user_text) + chat.generation_header)]
            closed = sampled if sampled[-1] == chat.im_end else [*sampled, chat.im_end]
            assert behind[-len(closed) - 1 :] == [*closed, *chat.newline]
        p = pack(dialogue, config)
        assert p.targets.tolist() == [i for _, sampled in rows(dialogue) for i in sampled]
        before = [(prompt + sampled)[len(prompt) - 1 : -1] for prompt, sampled in rows(dialogue)]
        assert p.token_ids[p.predict].tolist() == [i for part in before for i in part]
        old_logprobs = policy_logprobs(policy, together([p]), config.temperature)[0]
        torch.testing.assert_close(p.sampler_logprobs, old_logprobs.detach(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("microbatch_tokens", [1, 400, 10_000])
def test_the_first_ratio_is_one(chat, policy, critic, microbatch_tokens):
    """Guards dropout, temperature, masks and padding that differ between the statistics and the update."""
    config = settings(rollout_batch_size=4, minibatch_size=4, microbatch_tokens=microbatch_tokens, temperature=0.8)
    packed = prepared([scripted(chat, i, n_turns=1 + i, n=2) for i in range(4)], policy, critic, config)
    for dialogues in microbatches(packed, microbatch_tokens):
        batch = together(dialogues)
        ratio = (policy_logprobs(policy, batch, 0.8)[0] - batch.column("old_logprobs")).exp()
        assert (ratio - 1).abs().max().item() < 1e-5
    learners = make_learner(policy, 1e-3, config), make_learner(critic, 1e-3, config)
    metrics = update(*learners, make_batches(packed, config), config, (0, 10), True)
    assert metrics["ratio_dev_first"] < 1e-5 and metrics["updates_skipped"] == 0


# ----------------------------------------------------------------------------------------------------------- the losses


def test_clipped_loss_against_a_loop(policy):
    """Guards sign and clipping: the loss token by token, and no gradient where the clip holds against the advantage."""
    config = settings(entropy_coef=0.01, kl_coef=0.0)
    p = pack(random_dialogue(0, [[60, 60]]), config)
    hidden = policy_hidden(policy, together([p])).detach().requires_grad_()
    new, entropy = (x.detach() for x in policy_logprobs(policy, together([p]), config.temperature))
    generator = torch.Generator().manual_seed(4)
    p.advantages = torch.randn(120, generator=generator)
    p.old_logprobs = p.ref_logprobs = new + 0.6 * torch.randn(120, generator=generator)
    loss, statistics = policy_loss(hidden, policy.head_weight, None, together([p]), config)
    loss.backward()
    plain, _ = policy_loss(hidden, policy.head_weight, None, together([p]), replace(config, entropy_coef=0.0))
    no_entropy = torch.autograd.grad(plain, hidden)[0]
    expected, held, ratios = 0.0, [], []
    for n, o, a, h in zip(new.tolist(), p.old_logprobs.tolist(), p.advantages.tolist(), entropy.tolist(), strict=True):
        ratios.append(math.exp(n - o))
        clipped = min(max(ratios[-1], 0.8), 1.2)
        expected -= min(ratios[-1] * a, clipped * a) + 0.01 * h
        held.append(clipped * a < ratios[-1] * a)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert statistics["clip_frac"].item() == sum(abs(ratio - 1) > 0.2 for ratio in ratios)
    assert statistics["ratio_min"].item() == pytest.approx(min(ratios), rel=1e-4)
    assert statistics["ratio_max"].item() == pytest.approx(max(ratios), rel=1e-4)
    assert 10 < sum(held) < 110 and (no_entropy == 0).all(1).tolist() == held
    assert not (hidden.grad == 0).all(1).any()  # the entropy pushes every token


def test_value_clip_by_hand():
    """Guards the pessimistic maximum: a value that moved too far towards its return stops being pulled.

    V_old = 0, clip 0.2, so ½ max((V − R)², (clip(V) − R)²): R = 1, V = ½: ½·0.64; R = 0.1, V = 1: ½·0.81; V = R: 0.
    """
    p = with_values(pack(random_dialogue(0, [[1, 2]]), settings()))
    p.values, p.returns = torch.zeros(3), torch.tensor([1.0, 0.1, 0.15])
    values = torch.tensor([0.5, 1.0, 0.15], requires_grad=True)
    loss = value_loss(values, together([p]), settings(value_clip=0.2))
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * (0.64 + 0.81), rel=1e-6)
    assert values.grad.tolist() == pytest.approx([0.0, 0.9, 0.0])


def test_the_gradient_does_not_depend_on_the_microbatches(chat, policy, critic):
    """Guards means per micro-batch, which weigh short dialogues more: gradients for 4, 2 and 1 micro-batches."""
    results, parts = [], []
    for tokens in (1, 600, 100_000):
        config = settings(
            rollout_batch_size=4, minibatch_size=4, microbatch_tokens=tokens, max_grad_norm=1e9, entropy_coef=0.01
        )
        models = copy.deepcopy(policy), copy.deepcopy(critic)
        dialogues = [scripted(chat, i, n_turns=1 + i, n=2) for i in range(4)]
        packed = prepared(dialogues, *models, settings(rollout_batch_size=4, minibatch_size=4))
        learners = [make_learner(model, 1e-3, config) for model in models]
        parts.append(len(microbatches(packed, tokens)))
        (minibatch,) = make_batches(packed, config)
        sums = minibatch_update(*learners, minibatch, sum(len(p.targets) for p in packed), 1.0, config, True)
        results.append((sums, [torch.cat([q.grad.flatten() for q in model.parameters()]) for model in models]))
    for sums, gradients in results[1:]:
        for ours, reference in zip(gradients, results[0][1], strict=True):
            assert ((ours - reference).norm() / reference.norm()).item() < 1e-6
        for name in ("policy_loss", "value_loss", "entropy"):
            assert sums[name] == pytest.approx(results[0][0][name], rel=1e-5, abs=1e-5)
    assert parts[0] == 4 > parts[1] > parts[2] == 1


def test_checkpointing_changes_memory_only(chat, policy, critic):
    """Guards the flag: the same gradients, from fewer bytes kept for the backward."""
    kept, gradients = [], []
    packed = prepared([scripted(chat, i, n_turns=2, n=2) for i in range(2)], policy, critic, settings())
    for checkpointing in (False, True):
        model, sizes = copy.deepcopy(policy), {}
        model.model.checkpointing = checkpointing

        def keep(x, sizes=sizes):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss, _ = loss_of(model, None, together(packed), settings(kl_coef=0.0))
        loss.backward()
        kept.append(sum(sizes.values()))
        gradients.append([q.grad for q in model.parameters()])
    torch.testing.assert_close(*gradients)
    assert kept[1] < kept[0] / 2


def test_microbatches_are_balanced(chat):
    """Guards one micro-batch full and the last nearly empty, a dialogue lost or doubled, and more than are needed."""
    packed = [pack(random_dialogue(i, [[3 + 7 * (i % 5)] * 2] * 2), settings()) for i in range(9)]
    parts = microbatches(packed, 150)
    loads = [sum(len(p.token_ids) for p in part) for part in parts]
    assert sorted(id(p) for part in parts for p in part) == sorted(map(id, packed))
    assert len(parts) == math.ceil(sum(loads) / 150) > 1
    assert max(loads) - min(loads) <= max(len(p.token_ids) for p in packed)
    assert microbatches([], 150) == []


# ----------------------------------------------------------------------------------------------------------- the update


def weights_of(*models: torch.nn.Module) -> list[Tensor]:
    return [q.detach().clone() for model in models for q in model.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", ["advantages", "returns"])
def test_a_loss_that_is_not_finite_skips_the_update(policy, critic, name):
    """Guards poisoned weights: NaN in either loss leaves both models as they were, and the next mini-batch trains."""
    config = settings(lr=1e-3, critic_lr=1e-3)
    packed = prepared([random_dialogue(i, [[3, 4], [2, 2]]) for i in range(2)], policy, critic, config)
    getattr(packed[0], name)[1] = math.nan
    learners = make_learner(policy, 1e-3, config), make_learner(critic, 1e-3, config)
    before = weights_of(policy, critic)
    sums = minibatch_update(*learners, make_batches(packed, config)[0], 11, 1.0, config, True)
    assert sums["updates_skipped"] == 2 and same(before, weights_of(policy, critic))
    metrics = update(*learners, make_batches(packed, config), config, (0, 2), True)
    assert metrics["updates_skipped"] == 2 and not same(before, weights_of(policy, critic))
    assert all(q.isfinite().all() for q in weights_of(policy, critic))


def test_a_gradient_that_is_not_finite_skips_that_model(policy, critic):
    """Guards clip_grad_norm_, which turns one infinite gradient into NaN everywhere: the critic alone trains."""
    config = settings()
    packed = prepared([random_dialogue(i, [[3, 4], [2, 2]]) for i in range(2)], policy, critic, config)
    learners = make_learner(policy, 1e-3, config), make_learner(critic, 1e-3, config)
    handle = policy.model.norm.weight.register_hook(lambda grad: grad * math.inf)
    before, both = (weights_of(policy), weights_of(critic)), [collate(packed)]
    sums = minibatch_update(*learners, both, 22, 1.0, config, True)
    assert sums["updates_skipped"] == 1 and not math.isfinite(sums["policy_grad_norm"])
    assert same(before[0], weights_of(policy)) and not same(before[1], weights_of(critic))
    handle.remove()
    assert minibatch_update(*learners, both, 22, 1.0, config, True)["updates_skipped"] == 0
    assert not same(before[0], weights_of(policy)) and all(q.isfinite().all() for q in weights_of(policy))


def test_critic_warm_up_leaves_the_policy_alone(policy, critic):
    """Guards --critic-warmup: the critic trains, the policy stays bit-identical, and that is no skipped update."""
    config = settings()
    packed = prepared([random_dialogue(i, [[3, 4]]) for i in range(2)], policy, critic, config)
    learners = make_learner(policy, 1e-3, config), make_learner(critic, 1e-3, config)
    before = weights_of(policy), weights_of(critic)
    metrics = update(*learners, make_batches(packed, config), config, (0, 2), False)
    assert same(before[0], weights_of(policy)) and not same(before[1], weights_of(critic))
    assert metrics["updates_skipped"] == 0 and metrics["critic_lr"] > 0 and "lr" not in metrics


def test_learning_rate_schedule():
    """Guards warm-up and cosine: linear to the peak, down to the last share, and what the optimizer is really given."""
    config = settings(warmup_share=0.1, min_lr_share=0.2)
    shares = [lr_share(u, 50, config) for u in range(50)]
    assert shares[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and shares[-1] == pytest.approx(0.2)
    expected = [0.2 + 0.8 * (1 + math.cos(math.pi * (u - 5) / 44)) / 2 for u in range(5, 50)]
    assert shares[5:] == pytest.approx(expected)
    assert lr_share(0, 1, settings(warmup_share=0.0)) == 1.0
    assert lr_share(60, 50, config) == pytest.approx(0.2)  # beyond the end, as after a resume with fewer iterations


def test_the_schedule_reaches_the_optimizers(policy, critic):
    """Guards a schedule that is computed and not applied, and epochs that do not advance it."""
    config = settings(num_epochs=2, warmup_share=0.0, min_lr_share=0.0)
    packed = prepared([random_dialogue(i, [[3, 4]]) for i in range(2)], policy, critic, config)
    learners = make_learner(policy, 1e-3, config), make_learner(critic, 1e-2, config)
    metrics = update(*learners, make_batches(packed, config), config, (4, 20), True)
    mean = sum(0.5 * (1 + math.cos(math.pi * u / 19)) for u in (4, 5, 6, 7)) / 4
    assert (metrics["lr"], metrics["critic_lr"]) == pytest.approx((1e-3 * mean, 1e-2 * mean))
    share = 0.5 * (1 + math.cos(math.pi * 7 / 19))  # updates 4, 5, 6 and 7 were taken
    assert [learner.optimizer.param_groups[0]["lr"] for learner in learners] == pytest.approx(
        [1e-3 * share, 1e-2 * share]
    )


# ------------------------------------------------------------------------------------ one whole update in fp64, by hand


def plain_forward(weights: dict[str, Tensor], token_ids: list[int], shape: Qwen2Config) -> Tensor:
    """One row through Qwen-2.5 in fp64, written from the equations: no tree, no batch, no cache. Gives (T, D)."""
    T, Dh = len(token_ids), shape.head_dim
    angle = torch.arange(T).double()[:, None] / shape.rope_theta ** (torch.arange(0, Dh, 2).double() / Dh)  # (T, Dh/2)
    causal = torch.ones(T, T).tril().log().double()

    def norm(x: Tensor, name: str) -> Tensor:
        return weights[f"{name}.weight"] * x / (x.pow(2).mean(-1, keepdim=True) + shape.rms_norm_eps).sqrt()

    def heads(x: Tensor, name: str, n: int) -> Tensor:
        return (x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]).view(T, n, Dh).transpose(0, 1)  # (n, T, Dh)

    def rotated(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)

    x = weights["model.embed_tokens.weight"][token_ids]
    for i in range(shape.num_hidden_layers):
        layer, groups = f"model.layers.{i}", shape.num_attention_heads // shape.num_key_value_heads
        h = norm(x, f"{layer}.input_layernorm")
        q = rotated(heads(h, f"{layer}.self_attn.q_proj", shape.num_attention_heads))
        k = rotated(heads(h, f"{layer}.self_attn.k_proj", shape.num_key_value_heads)).repeat_interleave(groups, 0)
        v = heads(h, f"{layer}.self_attn.v_proj", shape.num_key_value_heads).repeat_interleave(groups, 0)
        mixed = (q @ k.transpose(1, 2) / math.sqrt(Dh) + causal).softmax(-1) @ v
        x = x + mixed.transpose(0, 1).reshape(T, -1) @ weights[f"{layer}.self_attn.o_proj.weight"].T
        h = norm(x, f"{layer}.post_attention_layernorm")
        gate, up = h @ weights[f"{layer}.mlp.gate_proj.weight"].T, h @ weights[f"{layer}.mlp.up_proj.weight"].T
        x = x + (gate * gate.sigmoid() * up) @ weights[f"{layer}.mlp.down_proj.weight"].T
    return norm(x, "model.norm")


def plain_statistics(
    weights: dict[str, Tensor], dialogue: Dialogue, shape: Qwen2Config, head: str
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Log-probs, entropies and log softmax (head "lm_head"), or values (head "value_head"), a tensor per candidate."""
    first, second, whole = [], [], []
    for prompt, sampled in rows(dialogue):
        out = plain_forward(weights, prompt + sampled, shape)[len(prompt) - 1 : -1] @ weights[f"{head}.weight"].T
        log_softmax = out.log_softmax(-1)
        first.append(out[:, 0] if head == "value_head" else log_softmax[range(len(sampled)), sampled])
        second.append(-(log_softmax.exp() * log_softmax).sum(-1))
        whole.append(log_softmax)
    return first, second, whole


def adam_step(
    weights: dict[str, Tensor], moments: dict[str, list[Tensor]], loss: Tensor, step: int, lr: float, config: Config
) -> float:
    """Clip the gradient and take one Adam step, as published; returns the norm before clipping."""
    gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
    norm = math.sqrt(sum(g.pow(2).sum().item() for g in gradients.values()))
    b1, b2 = config.adam_beta1, config.adam_beta2
    for name, g in gradients.items():
        g = g * min(1.0, config.max_grad_norm / norm)
        m, v = moments.setdefault(name, [torch.zeros_like(g), torch.zeros_like(g)])
        moments[name] = [b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2]
        m, v = moments[name][0] / (1 - b1**step), moments[name][1] / (1 - b2**step)
        weights[name] = (weights[name].detach() - lr * m / (v.sqrt() + 1e-8)).requires_grad_()
    return norm


def fp64(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: q.detach().double().requires_grad_() for name, q in model.named_parameters()}


@pytest.mark.parametrize(
    "changes",
    [
        {"credit": "turn"},
        {"credit": "dialogue", "kl_estimator": "k3", "gamma_turn": 0.8, "reward_at": "segment"},
        {"kl_estimator": "exact"},
    ],
)
def test_a_whole_update_in_fp64(policy, critic, shape, changes):
    """Guards the whole chain at once: statistics, rewards, GAE, whitening, both losses, clipping, AdamW, four steps."""
    config = settings(num_epochs=2, lr=4e-3, critic_lr=4e-3, entropy_coef=0.02, kl_coef=0.05, max_grad_norm=0.7,
                      warmup_share=0.0, min_lr_share=1.0, **changes)  # fmt: skip
    dialogues = [random_dialogue(0, [[3, 2], [4, 1]]), random_dialogue(1, [[2, 5, 3], [3, 3]])]
    ref_policy = lively(shape, 5)
    theirs, reference, their_critic = fp64(policy), fp64(ref_policy), fp64(critic)
    start = theirs, their_critic = dict(theirs), dict(their_critic)
    start = [{name: w.detach() for name, w in weights.items()} for weights in start]

    packed = prepared(dialogues, policy, critic, config)
    metrics = update(
        make_learner(policy, config.lr, config),
        make_learner(critic, config.critic_lr, config),
        make_batches(packed, config),
        config,
        (0, 4),
        True,
        ref_policy,
    )

    fixed = []  # per dialogue: old log-probs, reference log-probs, old values, advantages, returns
    for dialogue, p in zip(dialogues, packed, strict=True):
        old, ref = (torch.cat(plain_statistics(w, dialogue, shape, "lm_head")[0]).detach() for w in (theirs, reference))
        values = [v.tolist() for v in plain_statistics(their_critic, dialogue, shape, "value_head")[0]]
        reward = [
            [-0.05 * kl * (config.kl_estimator == "k1") for kl in (old - ref)[s.start : s.stop].tolist()]
            for s in p.spans
        ]
        for placed, span in zip(reward, p.spans, strict=True):
            at_profile = span.candidate.profile_tokens - 1 if config.reward_at == "segment" else -1
            placed[at_profile] += span.candidate.parts["profile"]
            placed[-1] += span.candidate.parts["response"]
        advantages = torch.tensor(sum(slow_advantages(dialogue, reward, values, config), []), dtype=torch.double)
        old_values = torch.tensor(sum(values, []), dtype=torch.double)
        fixed.append([old, ref, old_values, advantages, advantages + old_values])
    everything = torch.cat([f[3] for f in fixed])
    moments: list[dict] = [{}, {}]
    expected = dict.fromkeys(("policy_loss", "value_loss", "clip_frac", "policy_grad_norm", "critic_grad_norm"), 0.0)
    for step in range(4):
        dialogue, (old, ref, old_values, advantages, returns) = dialogues[step % 2], fixed[step % 2]
        advantages = (advantages - everything.mean()) / everything.std(correction=0)
        new, entropy, log_p = (torch.cat(x) for x in plain_statistics(theirs, dialogue, shape, "lm_head"))
        ratio = (new - old).exp()
        loss = torch.maximum(-ratio * advantages, -ratio.clamp(0.8, 1.2) * advantages) - 0.02 * entropy
        if config.kl_estimator == "k3":
            loss = loss + 0.05 * ((ref - new).exp() - (ref - new) - 1)
        if config.kl_estimator == "exact":
            log_r = torch.cat(plain_statistics(reference, dialogue, shape, "lm_head")[2]).detach()
            loss = loss + 0.05 * (log_p.exp() * (log_p - log_r)).sum(-1)
        values = torch.cat(plain_statistics(their_critic, dialogue, shape, "value_head")[0])
        near = old_values + (values - old_values).clamp(-0.2, 0.2)
        vf_loss = torch.maximum((values - returns) ** 2, (near - returns) ** 2) / 2
        for name, part in (("policy_loss", loss), ("value_loss", vf_loss), ("clip_frac", (ratio - 1).abs() > 0.2)):
            expected[name] += part.sum().item() / (2 * len(everything))
        expected["policy_grad_norm"] += adam_step(theirs, moments[0], loss.mean(), step + 1, 4e-3, config) / 4
        expected["critic_grad_norm"] += adam_step(their_critic, moments[1], vf_loss.mean(), step + 1, 4e-3, config) / 4

    assert expected["clip_frac"] > 0 and expected["policy_grad_norm"] > 0.7  # else less is tested than promised
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    for model, weights, first in ((policy, theirs, start[0]), (critic, their_critic, start[1])):
        ours = torch.cat([q.detach().double().flatten() for q in model.parameters()])
        reached, begun = (
            torch.cat([w[name].detach().flatten() for name, _ in model.named_parameters()]) for w in (weights, first)
        )
        # The norm of all moves, not each: Adam makes a full step of a gradient that is zero but for rounding.
        assert ((ours - reached).norm() / (reached - begun).norm()).item() < 1e-4


def play_with_varied_rewards(policy, chat, config) -> list:
    """Dialogues whose candidates' rewards differ, whatever they say."""
    dialogues = play(policy, chat, config)
    for number, candidate in enumerate(c for d in dialogues for turn in d.turns for c in turn.candidates):
        earn(candidate, (number % 5) / 4, float(number % 3 == 0))
    return dialogues


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["k1", "k3", "exact"])
def test_twenty_updates_with_all_logits_at_once(chat, monkeypatch, estimator):
    """Guards the kernels inside training: the shipped checkpoint, 20 updates, losses as with eager logits to 1e-5."""
    config = settings(
        ckpt=str(TINY_CHECKPOINT), rollout_batch_size=4, minibatch_size=2, num_epochs=10,
        max_new_tokens=24, lr=3e-4, critic_lr=1e-3, kl_coef=0.05, entropy_coef=0.01, kl_estimator=estimator,
    )  # fmt: skip
    chat = ChatTokenizer.from_folder(config.ckpt)
    losses = []
    for eager in (False, True):
        policy, ref_policy = load_policy(config.ckpt), load_policy(config.ckpt)
        with torch.no_grad():  # a reference that differs, as it does after the first updates of a run
            ref_policy.head_weight.mul_(1.02)
        critic = Critic.from_policy(policy)
        if not losses:
            dialogues = play_with_varied_rewards(policy, chat, config)
        if eager:
            monkeypatch.setattr(train_rlpa, "linear_logprob", reference_logprob)
            monkeypatch.setattr(train_rlpa, "ppo_head", reference_ppo)
        packed, batches = ready_to_train(dialogues, policy, ref_policy, critic, config)
        learners = make_learner(policy, config.lr, config), make_learner(critic, config.critic_lr, config)
        run = []
        for step in range(20):
            minibatch = batches[step % 2]
            count = sum(len(batch.targets) for batch in minibatch)
            run.append(minibatch_update(*learners, minibatch, count, 1.0, config, True, ref_policy))
        losses.append(run)
    for ours, theirs in zip(*losses, strict=True):
        for name in ("policy_loss", "value_loss", "approx_kl", "entropy", "policy_grad_norm"):
            size = ours["tokens"] if name == "policy_loss" else 0  # a sum over tokens of mixed signs, each about 1
            assert abs(ours[name] - theirs[name]) <= 1e-5 * max(abs(theirs[name]), size, 1e-3), name
    assert losses[0][-1]["approx_kl"] > 0 and losses[0][-1]["clip_frac"] > 0  # it moved


# ------------------------------------------------------------------------------------- old log-probs from the sampler


def test_the_samplers_logprobs_save_a_forward(chat, policy, critic, monkeypatch):
    """Guards the saving and what it rests on: no forward of the policy in fp32, and the log-probs are the trainer's."""
    config = settings(max_new_tokens=12, temperature=0.8)
    packed = [pack(d, config) for d in play(policy, chat, config)]
    found, forwards = [], []
    monkeypatch.setattr(train_rlpa, "policy_hidden", lambda *args: forwards.append(args[0]) or policy_hidden(*args))
    for source in ("trainer", "auto"):
        again = replace(config, old_logprobs=source)
        add_statistics(make_batches(packed, again), policy, None, critic, again)
        found.append(torch.cat([p.old_logprobs for p in packed]))
    assert len(forwards) == 2  # the trainer's, one per micro-batch
    torch.testing.assert_close(*found, atol=2e-5, rtol=0)
    assert train_rlpa.sampler_is_exact(policy, replace(config, old_logprobs="auto"))
    assert not train_rlpa.sampler_is_exact(copy.deepcopy(policy).bfloat16(), replace(config, old_logprobs="auto"))


@pytest.mark.parametrize("advantage", ["grpo", "gae"])
def test_the_first_update_saves_a_forward(chat, shape, monkeypatch, advantage):
    """Guards the saving: what the first mini-batch's own update finds is log π_old, and it learns the same from it."""
    config, found = settings(max_new_tokens=6, kl_coef=0.0, advantage=advantage, rollout_batch_size=8, lr=1e-3), []
    monkeypatch.setattr(train_rlpa, "sampler_is_exact", lambda policy, config: False)
    monkeypatch.setattr(train_rlpa, "make_batches", lambda packed, c: found.append(packed) or make_batches(packed, c))
    computed: list[int] = []
    monkeypatch.setattr(train_rlpa, "linear_logprob", lambda *a: computed.append(len(a[0])) or linear_logprob(*a))
    metrics, counts = [], []
    for source in ("trainer", "auto"):
        metrics.append(one_iteration(lively(shape, 0), chat, replace(config, old_logprobs=source)))
        counts.append(sum(computed) - sum(counts))
    first = sum(len(p.targets) for p in found[1] if p.minibatch == 0)
    assert 0 < first == counts[0] - counts[1] < counts[0]  # the others still need their own
    old = [torch.cat([p.old_logprobs for p in packed]) for packed in found]
    torch.testing.assert_close(*old, atol=1e-5, rtol=0)
    for name in ("approx_kl", "ratio_dev", "sampler_trainer_logprob_gap", "policy_loss", "policy_grad_norm"):
        assert metrics[0][name] == pytest.approx(metrics[1][name], abs=1e-5), name


def one_iteration(
    policy: Qwen2ForCausalLM, chat: ChatTokenizer, config: Config, dtype: torch.dtype = torch.float32
) -> dict[str, float]:
    """Metrics of one iteration with random rewards."""
    critic = Critic.from_policy(policy)
    learners = make_learner(policy, config.lr, config, dtype), make_learner(critic, 1e-4, config, dtype)
    personas = [Persona(str(i), FACTS) for i in range(8)]
    return run_iteration(State(config, chat, *learners, None, personas, {}, Environment(Talker(), None)))[0]


@pytest.mark.parametrize("source", ["sampler", "trainer"])
def test_the_gap_between_sampler_and_trainer_is_seen(chat, shape, monkeypatch, source):
    """Guards a gap that is 0 by construction: log-probs that the sampler notes wrongly by 0.01 show as 0.01."""
    config = settings(max_new_tokens=6, kl_coef=0.0, old_logprobs=source)
    assert one_iteration(lively(shape, 0), chat, config)["sampler_trainer_logprob_gap"] < 1e-5

    def wrong(dialogue, config):
        p = pack(dialogue, config)
        return replace(p, sampler_logprobs=p.sampler_logprobs + 0.01)

    monkeypatch.setattr(train_rlpa, "pack", wrong)
    gap = one_iteration(lively(shape, 0), chat, config)["sampler_trainer_logprob_gap"]
    assert gap == pytest.approx(0.01, rel=0.01)


def test_mfu_is_the_model_flops_over_the_cards(chat, shape, monkeypatch):
    """Guards the metric: absent where the card's peak is unknown, and else the counted FLOP over time and peak."""
    config, seen = settings(max_new_tokens=6, kl_coef=0.0, num_epochs=2), []
    assert "mfu" not in one_iteration(lively(shape, 0), chat, config)
    monkeypatch.setattr(records.iteration, "peak_flops", lambda card: 989e12)
    monkeypatch.setattr(train_rlpa, "make_batches", lambda packed, c: seen.extend(packed) or make_batches(packed, c))
    m = one_iteration(lively(shape, 0), chat, config)
    masks = [(p.enter <= p.enter[:, None]) & (p.enter[:, None] < p.leave) for p in seen]  # who sees whom, densely
    pairs = sum(int(mask.sum()) for mask in masks)
    flops = 2 * memory.update_flops(shape, m["tree_tokens"], m["action_tokens"], pairs, True)
    assert m["mfu"] * 989e12 * m["seconds_update"] == pytest.approx(flops)


# -------------------------------------------------------------------------------------------- bf16 with fp32 masters


def bf16_learners(*models: torch.nn.Module, lr: float = 1e-3) -> list[Learner]:
    return [make_learner(copy.deepcopy(model), lr, settings(), torch.bfloat16) for model in models]


def test_bf16_gradients_are_summed_in_fp32(policy, critic):
    """Guards sums in bf16, which drop what is 256 times smaller: each micro-batch is added to the masters exactly.

    And the sum is the fp32 gradient of the same weights, to the rounding of bf16.
    """
    config = settings(rollout_batch_size=8, minibatch_size=8, microbatch_tokens=1, kl_coef=0.0)
    packed = prepared([random_dialogue(i, [[3 + i, 5], [4, 2]]) for i in range(8)], policy, critic, config)
    (minibatch,) = make_batches(packed, config)
    learners, whole = bf16_learners(policy, critic), [make_learner(m, 1e-3, config) for m in (policy, critic)]
    with torch.no_grad():  # the same weights in both
        for rounded, learner in zip(learners, whole, strict=True):
            for q, master in zip(rounded.model.parameters(), learner.masters.values(), strict=True):
                master.copy_(q)

    def gradients(one: Learner, other: Learner, batches: list) -> list[Tensor]:
        for learner in (one, other):
            learner.optimizer.zero_grad()
        for batch in batches:
            batch = batch.to(one.model.head_weight)
            train_rlpa.add_gradients(one.model, other.model, batch, 8.0, config, True, None)
        return [q.grad for learner in (one, other) for q in learner.masters.values()]

    alone = [gradients(*learners, [batch]) for batch in minibatch]
    assert all(torch.equal(g, g.bfloat16().float()) for g in alone[0])
    sums = [sum(parts[1:], parts[0].clone()) for parts in zip(*alone, strict=True)]
    ours = gradients(*learners, minibatch)
    assert same(ours, sums) and len(minibatch) == 8
    assert all(q.grad is None and q.dtype == torch.bfloat16 for x in learners for q in x.model.parameters())
    for g, expected in zip(ours, gradients(*whole, minibatch), strict=True):
        assert ((g - expected).norm() / expected.norm()).item() < 2**-5


def test_small_steps_reach_bf16_weights():
    """Guards updates lost to rounding: 1e-6 a step on 0.05, of which bf16 has no neighbour nearer than 2.4e-4."""
    model = torch.nn.Linear(4, 4, bias=False)
    torch.nn.init.constant_(model.weight, 0.05)
    learner = make_learner(model, 1e-6, settings(), torch.bfloat16)
    start, moved = model.weight.detach().clone(), []
    for _ in range(300):
        learner.optimizer.zero_grad()
        (-model(torch.ones(4, dtype=torch.bfloat16)).sum()).backward()
        assert train_rlpa.optimizer_step(learner, 1.0, 1e9)[1]
        moved.append(bool((model.weight != start).all()))
    assert learner.masters["weight"].mean().item() == pytest.approx(0.05 + 300e-6, rel=1e-3)
    assert not any(moved[:50]) and moved[-1]
    assert torch.equal(model.weight, learner.masters["weight"].bfloat16())


def test_fp32_has_no_second_copy(policy):
    """Guards the float32 mode: the masters are the parameters themselves, and no hook touches their gradients."""
    learner = make_learner(policy, 1e-3, settings())
    assert all(q is learner.masters[name] for name, q in policy.named_parameters())
    assert not any(q._post_accumulate_grad_hooks for q in policy.parameters())


def test_an_update_in_bf16_follows_fp32(policy, critic):
    """Guards the whole chain in bf16: statistics and update agree (the first ratio is 1), and weights go the same way.

    Adam's step has the size of the rate whatever the gradient's, so directions are compared, over all weights.
    """
    config = settings(rollout_batch_size=4, minibatch_size=4, kl_coef=0.0)
    dialogues = [random_dialogue(i, [[9, 5], [4, 7]]) for i in range(4)]
    start, moves = torch.cat([q.flatten() for q in weights_of(policy)]), []
    for learners in (bf16_learners(policy, critic), [make_learner(m, 1e-3, config) for m in (policy, critic)]):
        models = [learner.model for learner in learners]
        _, batches = ready_to_train(dialogues, models[0], None, models[1], config)
        metrics = update(*learners, batches, config, (0, 10), True)
        assert metrics["ratio_dev_first"] < 1e-4 and metrics["updates_skipped"] == 0
        moves.append(torch.cat([q.detach().flatten() for q in learners[0].masters.values()]) - start)
    assert torch.nn.functional.cosine_similarity(*moves, dim=0) > 0.9


# --------------------------------------------------------------------------------------------------- a shared trunk


def test_a_shared_trunk_gets_the_sum_of_both_gradients(policy, critic):
    """Guards the joint backward: policy's gradient plus value_coef times the value's, and the head's of its own."""
    config = settings(critic="shared", value_coef=0.3, kl_coef=0.0, entropy_coef=0.01)
    packed = prepared([random_dialogue(i, [[9, 5], [4, 7]]) for i in range(2)], policy, critic, config)
    batch, head = together(packed), ValueHead.from_policy(policy, seed=1)
    alone, other_head = copy.deepcopy(policy), copy.deepcopy(head)
    statistics = train_rlpa.add_gradients(policy, head, batch, 7.0, config, True, None)
    hidden = policy_hidden(alone, batch)
    loss, _ = policy_loss(hidden, alone.head_weight, None, batch, config)
    vf_loss = value_loss(other_head(hidden), batch, config)
    assert (statistics["policy_loss"].item(), statistics["value_loss"].item()) == (loss.item(), vf_loss.item())
    (loss / 7).backward(retain_graph=True)
    (0.3 * vf_loss / 7).backward()
    assert_close_gradients(policy, alone, 1e-5)
    assert_close_gradients(head, other_head, 1e-5)


def test_one_forward_serves_policy_and_values(policy, critic, monkeypatch):
    """Guards the saving of a shared trunk: one forward a micro-batch in the statistics, and one in the update."""
    config = settings(critic="shared", kl_coef=0.0)
    packed = prepared([random_dialogue(i, [[3, 4]]) for i in range(2)], policy, critic, config)
    batches, head, forwards = make_batches(packed, config), ValueHead.from_policy(policy), []
    policy.register_forward_hook(lambda *_: forwards.append(1))
    add_statistics(batches, policy, None, head, config)
    assert len(forwards) == 2
    learners = make_learner(policy, 1e-3, config), make_learner(head, 1e-3, config)
    update(*learners, batches, config, (0, 2), True)
    assert len(forwards) == 4


def test_warm_up_of_a_shared_trunk_trains_the_head_alone(policy, critic):
    """Guards the value loss against the trunk that samples: in the warm-up it stands still, bit for bit."""
    config = settings(critic="shared")
    packed = prepared([random_dialogue(i, [[3, 4]]) for i in range(2)], policy, critic, config)
    head = ValueHead.from_policy(policy)
    learners, before = [make_learner(m, 1e-3, config) for m in (policy, head)], (weights_of(policy), weights_of(head))
    metrics = update(*learners, make_batches(packed, config), config, (0, 2), False)
    assert same(before[0], weights_of(policy)) and not same(before[1], weights_of(head))
    assert metrics["updates_skipped"] == 0 and all(q.grad is None for q in policy.parameters())


def test_a_shared_trunk_learns_values_and_policy():
    """Guards signs and learning rates of the joint step: on the shipped checkpoint both losses fall."""
    config = settings(
        ckpt=str(TINY_CHECKPOINT), critic="shared", rollout_batch_size=4, minibatch_size=4, num_epochs=12,
        max_new_tokens=24, lr=1e-3, critic_lr=1e-2, kl_coef=0.0, value_clip=10.0, old_logprobs="sampler",
    )  # fmt: skip
    policy, chat = load_policy(config.ckpt), ChatTokenizer.from_folder(config.ckpt)
    head = ValueHead.from_policy(policy)
    dialogues = play_with_varied_rewards(policy, chat, config)
    packed, batches = ready_to_train(dialogues, policy, None, head, config)
    learners = make_learner(policy, config.lr, config), make_learner(head, config.critic_lr, config)
    count = sum(len(p.targets) for p in packed)
    run = [minibatch_update(*learners, batches[0], count, 1.0, config, True) for _ in range(12)]
    for name in ("policy_loss", "value_loss"):
        assert run[-1][name] / count < run[0][name] / count - 0.02, name


# ------------------------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("advantage", ["gae", "rloo", "grpo"])
def test_ppo_learns_a_bandit(chat, shape, monkeypatch, advantage):
    """Guards the sign of everything together: sampled ids that are rewarded become likely, from ½ to above 0.8."""
    config = settings(advantage=advantage, rollout_batch_size=8, minibatch_size=4, max_turns=1, num_candidates=8,
                      max_new_tokens=1, num_iterations=16, lr=1.5e-2, critic_lr=1.5e-2, kl_coef=0.0)  # fmt: skip

    monkeypatch.setitem(rewards.REWARD_PARTS, "response", lambda candidate, *_: float(candidate.token_ids[0] % 2 == 0))
    monkeypatch.setattr(rewards, "parse_turn", lambda text, reason: ParsedTurn([], text or "..."))
    policy = random_policy(shape, 0)
    critic = make_learner(Critic.from_policy(policy), config.critic_lr, config) if advantage == "gae" else None
    personas = [Persona(str(i), FACTS) for i in range(8)]
    learner = make_learner(policy, config.lr, config)
    state = State(config, chat, learner, critic, None, personas, {}, Environment(Talker(), None))
    prompt = open_turn(Dialogue(0, "p", FACTS), config.first_user_message, chat).prompt_ids

    def even() -> float:
        with torch.no_grad():
            return policy.logits(policy(torch.tensor([prompt]))[0, -1]).softmax(-1)[::2].sum().item()

    assert 0.4 < even() < 0.6
    history = [run_iteration(state)[0]["response_reward"] for _ in range(config.num_iterations)]
    assert even() > 0.8 and sum(history[-3:]) > sum(history[:3])
