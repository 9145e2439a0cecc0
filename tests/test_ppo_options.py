"""PPO's later options, all off by default: clip-higher, dual clip, the sampler's correction, GAE over turns."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from test_ppo import (  # noqa: F401
    FACTS,
    chat,
    critic,
    earn,
    lively,
    loss_of,
    one_iteration,
    policy,
    prepared,
    random_dialogue,
    sampled,
    settings,
    shape,
    together,
    with_values,
)

import train_rlpa
from command_line.flags import parse_args
from config import Config
from dialogue import Dialogue, Turn
from kernels import cpu
from learners.weights import save_pretrained
from packing import pack, policy_hidden
from train_rlpa import add_advantages, correct_for_sampler, policy_loss, sampler_is_exact, token_losses, token_rewards

# ------------------------------------------------------------------------------------------------------------ the clips

WIDE = {"clip_eps": 0.2, "clip_eps_high": 0.28, "dual_clip": 3.0}


@pytest.mark.parametrize(
    ("changes", "advantage", "ratio", "loss", "slope", "clipped"),
    [
        (WIDE, 2.0, 0.5, -1.0, -1.0, 1), (WIDE, 2.0, 1.0, -2.0, -2.0, 0), (WIDE, 2.0, 1.25, -2.5, -2.5, 0),
        (WIDE, 2.0, 1.5, -2.56, 0.0, 1), (WIDE, 2.0, 4.0, -2.56, 0.0, 1),
        (WIDE, -2.0, 0.5, 1.6, 0.0, 1), (WIDE, -2.0, 1.0, 2.0, 2.0, 0), (WIDE, -2.0, 1.25, 2.5, 2.5, 0),
        (WIDE, -2.0, 1.5, 3.0, 3.0, 1), (WIDE, -2.0, 4.0, 6.0, 0.0, 1),
        ({}, 2.0, 1.25, -2.4, 0.0, 1), ({}, 2.0, 0.5, -1.0, -1.0, 1), ({}, -2.0, 0.5, 1.6, 0.0, 1),
        ({}, -2.0, 4.0, 8.0, 8.0, 1),
        ({"dual_clip": 1.0}, -2.0, 1.0, 2.0, 2.0, 0), ({"dual_clip": 1.0}, -2.0, 1.01, 2.0, 0.0, 0),
        (WIDE, 0.0, 4.0, 0.0, 0.0, 1),
    ],
)  # fmt: skip
def test_clips_by_hand(changes, advantage, ratio, loss, slope, clipped):
    """Guards sides and signs: loss and ∂loss/∂log π = −ρA where nothing is clipped, 0 where it is, worked out by hand.

    clip_frac counts ρ outside of [1 − ε, 1 + ε_high].
    """
    new = torch.tensor([math.log(ratio)], requires_grad=True)
    zero = torch.zeros(1)
    losses, statistics = token_losses(new, zero, torch.tensor([advantage]), zero, settings(**changes))
    (found,) = torch.autograd.grad(losses.sum(), new)
    assert (losses.item(), found.item()) == pytest.approx((loss, slope), rel=1e-5)
    assert statistics["clip_frac"].item() == clipped


def test_clips_that_cut_nothing_change_no_bit():
    """Guards the default: an upper clip equal to the lower, and a bound that is never reached, are the plain loss."""
    new, old, advantages, ref = torch.randn(4, 4000, generator=torch.Generator().manual_seed(0))
    plain, same = (
        token_losses(new, old, advantages, ref, settings(**changes))
        for changes in ({}, {"clip_eps_high": 0.2, "dual_clip": 1e9})
    )
    assert torch.equal(plain[0], same[0]) and all(torch.equal(plain[1][name], same[1][name]) for name in plain[1])


# -------------------------------------------------------------------------------------------- the sampler's correction


def test_weights_of_the_correction_by_hand():
    """Guards direction and truncation: π_old / π_sampler = ½, 1, 1½ and 5, of which the last counts as 2."""
    p = with_values(pack(random_dialogue(0, [[4]]), settings()))
    p.old_logprobs = p.sampler_logprobs + torch.tensor([0.5, 1.0, 1.5, 5.0]).log()
    p.advantages = torch.tensor([1.0, -1.0, 2.0, -2.0])
    metrics = correct_for_sampler([p], 2.0)
    torch.testing.assert_close(p.advantages, torch.tensor([0.5, -1.0, 3.0, -4.0]))
    assert metrics == pytest.approx({"sampler_weight": 1.25, "sampler_weight_truncated": 0.25})
    p.old_logprobs = p.sampler_logprobs + 1000  # exp would overflow
    correct_for_sampler([p], 2.0)
    assert p.advantages.isfinite().all()
    assert correct_for_sampler([], 2.0) == {"sampler_weight": 0.0, "sampler_weight_truncated": 0.0}


def test_the_correction_weighs_the_policy_loss_alone(policy, critic):  # noqa: F811
    """Guards loss and gradient: Σ w ℓ with w fixed, clipped tokens too; the KL in the loss keeps its weight of 1."""
    config = settings(kl_estimator="k3", kl_coef=0.3, dual_clip=1.2)
    (p,) = prepared([random_dialogue(0, [[5, 4], [3, 6]])], policy, critic, config)
    noise = torch.randn(2, len(p.targets), generator=torch.Generator().manual_seed(1))
    p.old_logprobs = p.old_logprobs + 0.3 * noise[0]  # as after some steps: some ratios are beyond the clip
    p.sampler_logprobs = p.old_logprobs - 0.7 * noise[1]
    weights = (0.7 * noise[1]).exp().clamp(max=1.5)
    assert 0 < (weights == 1.5).sum() < len(weights)
    hidden = policy_hidden(policy, together([p])).detach().requires_grad_()
    new = policy.logits(hidden).log_softmax(-1).gather(1, p.targets[:, None])[:, 0]
    known = p.old_logprobs, p.advantages, p.ref_logprobs
    plain = token_losses(new, *known, replace(config, kl_coef=0.0))[0]
    penalty = (token_losses(new, *known, config)[0] - plain).sum()
    expected = (weights * plain).sum() + penalty
    correct_for_sampler([p], 1.5)
    loss, _ = policy_loss(hidden, policy.head_weight, None, together([p]), config)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    ours, theirs = (torch.autograd.grad(x, hidden)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("advantage", "wrong_by", "weight", "truncated"), [
    ("gae", 0.0, 1.0, 0.0), ("gae", math.log(2), 0.5, 0.0), ("grpo", -math.log(4), 2.0, 1.0),
])  # fmt: skip
def test_the_correction_sees_the_gap(chat, shape, monkeypatch, advantage, wrong_by, weight, truncated):  # noqa: F811
    """Guards a correction with the sampler's own log-probs, which are always right: `auto` means the trainer's."""
    config = settings(max_new_tokens=6, kl_coef=0.0, old_logprobs="auto", sampler_correction=2.0, advantage=advantage)
    assert not sampler_is_exact(lively(shape, 0), config)
    assert sampler_is_exact(lively(shape, 0), replace(config, sampler_correction=0.0))

    def noted(dialogue, config):
        p = pack(dialogue, config)
        return replace(p, sampler_logprobs=p.sampler_logprobs + wrong_by)

    monkeypatch.setattr(train_rlpa, "pack", noted)
    metrics = one_iteration(lively(shape, 0), chat, config)
    assert metrics["sampler_weight"] == pytest.approx(weight, rel=1e-4)
    assert metrics["sampler_weight_truncated"] == truncated
    assert metrics["sampler_trainer_logprob_gap"] == pytest.approx(abs(wrong_by), abs=1e-4)


# ------------------------------------------------------------------------------------------------------ turns as steps


def test_two_turns_as_steps_by_hand():
    """Guards the turn as one step: λ = γ_turn = ½; A (chosen, two tokens) and B, then C and D (chosen, two tokens).

    V is ½ before the first turn and 1 before the second. D: 2 − 1 = 1.  C: 0 − 1 = −1.
    A: δ = 0 + ½·1 − ½ = 0, and ½·½·1 comes from D: ¼.     B: 1 + ½·1 − ½ = 1, and nothing comes after it.
    Values inside of a turn are not used, and every token's return is A + V of its turn.
    """

    def turn(prompt: list[int], chosen: int, *candidates: tuple[list[int], float, float]) -> Turn:
        return Turn("", prompt, [earn(sampled(t), p, r) for t, p, r in candidates], chosen)

    first = turn([1, 2], 0, ([3, 4], 0.0, 0.0), ([5], 1.0, 0.0))
    second = turn([1, 2, 3, 4, 6], 1, ([7], 0.0, 0.0), ([8, 9], 1.0, 1.0))
    config = settings(credit="dialogue", gae_level="turn", gae_lambda=0.5, gamma_turn=0.5, kl_coef=0.0)
    p = with_values(pack(Dialogue(0, "p", FACTS, [first, second]), config))
    p.values = torch.tensor([0.5, 99.0, 0.5, 1.0, 1.0, -99.0])
    add_advantages(p, config)
    assert p.advantages.tolist() == [0.25, 0.25, 1.0, -1.0, 1.0, 1.0]
    assert p.returns.tolist() == [0.75, 0.75, 1.5, 0.0, 2.0, 2.0]
    assert p.values.tolist() == [0.5, 99.0, 0.5, 1.0, 1.0, -99.0]  # the value loss clips around these


@pytest.mark.parametrize("changes", [
    {"credit": "turn"},
    {"credit": "dialogue"},
    {"credit": "dialogue", "gamma_turn": 0.7, "gae_lambda": 0.8, "reward_at": "segment"},
    {"credit": "dialogue", "kl_estimator": "k3"},
])  # fmt: skip
def test_turns_as_steps_equal_a_loop_over_turns(changes):
    """Guards sums, discounts and the chosen path: a ragged dialogue of three turns against a loop over its turns."""
    config = settings(gae_level="turn", **changes)
    p = with_values(pack(random_dialogue(0, [[3, 5, 1], [2, 2], [6, 1, 4]]), config))
    gamma = config.gamma_turn if config.credit == "dialogue" else 0.0
    advantages, returns, next_value, next_advantage = {}, {}, 0.0, 0.0
    for t in (2, 1, 0):
        for s in (s for s in p.spans if s.turn == t):
            value = p.values[s.start].item()
            delta = sum(token_rewards(s, p, config)) + gamma * next_value - value
            advantages[s.start] = delta + gamma * config.gae_lambda * next_advantage * s.chosen
            returns[s.start] = advantages[s.start] + value
        chosen = next(s.start for s in p.spans if s.turn == t and s.chosen)
        next_value, next_advantage = p.values[chosen].item(), advantages[chosen]
    add_advantages(p, config)
    for s in p.spans:
        assert p.advantages[s.start : s.stop].tolist() == pytest.approx([advantages[s.start]] * (s.stop - s.start))
        assert p.returns[s.start : s.stop].tolist() == pytest.approx([returns[s.start]] * (s.stop - s.start), abs=1e-6)


@pytest.mark.parametrize("credit", ["turn", "dialogue"])
def test_turns_of_one_token_are_tokens(credit):
    """Guards two kinds of GAE that drift apart: where every turn is one token, both levels agree to the last bit."""
    results = []
    for level in ("token", "turn"):
        config = settings(credit=credit, gae_level=level)
        p = with_values(pack(random_dialogue(0, [[1, 1], [1, 1, 1], [1]]), config))
        add_advantages(p, config)
        results.append((p.advantages, p.returns))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_candidates_of_a_turn_share_their_value(policy, critic):  # noqa: F811
    """Guards the baseline: V before a turn's first sampled token is one number, whatever the candidates say."""
    config = settings(gae_level="turn", credit="dialogue")
    (p,) = prepared([random_dialogue(0, [[3, 5, 1], [2, 2]])], policy, critic, config)
    for t in (0, 1):
        assert len({p.values[s.start].item() for s in p.spans if s.turn == t}) == 1


# -------------------------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize(("changes", "words"), [
    ({"clip_eps": 0.2, "clip_eps_high": 0.1}, "--clip-eps-high is 0.1; give at least 0.2"),
    ({"dual_clip": 0.5}, "--dual-clip is 0.5; give at least 1"),
    ({"dual_clip": -1.0}, "--dual-clip is -1"),
    ({"sampler_correction": 0.9}, "--sampler-correction is 0.9; give at least 1"),
    ({"sampler_correction": 2.0, "old_logprobs": "sampler"}, "--old-logprobs trainer"),
    ({"gae_level": "turn", "advantage": "rloo"}, "--gae-level turn needs --advantage gae"),
    ({"gae_level": "turn", "gamma": 0.99}, "--gamma 0.99 needs --gae-level token"),
    ({"gamma_turn": 0.5}, "--gamma-turn 0.5 needs --credit dialogue"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(changes, words):
    """Guards settings that contradict one another or would be ignored: one line that names flag, value and limit."""
    with pytest.raises(ValueError, match=r"^--") as error:
        settings(**changes)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("flags", "words"), [
    ("--advantage grpo --gae-lambda 1", "--gae-lambda 1.0 needs --advantage gae"),
    ("--advantage rloo --gamma 0.9", "--gamma 0.9 needs --advantage gae"),
    ("--advantage rloo --reward-at turn", "--reward-at turn needs --advantage gae"),
    ("--advantage grpo --critic-lr 1", "--critic-lr 1.0 needs --advantage gae"),
    ("--advantage grpo --value-clip 1", "--value-clip 1.0 needs --advantage gae"),
    ("--gae-level turn --reward-at segment", "--reward-at segment needs --gae-level token"),
    ("--gae-level turn --gae-lambda 1", "--gae-lambda 1.0 needs --credit dialogue"),
    ("--gae-level turn --gae-lambda 1 --credit dialogue", ""),
    ("--advantage grpo", ""),
    ("--gae-level turn", ""),
])  # fmt: skip
def test_flags_without_effect_are_refused(flags, words):
    """Guards flags that are ignored in silence. The tiny checkpoint's own --gae-lambda and --reward-at may be idle."""
    if not words:
        assert parse_args(["--ckpt", *flags.split()], "").reward_at == "segment"
        return
    with pytest.raises(ValueError, match="needs") as error:
        parse_args(["--ckpt", *flags.split()], "")
    assert words in str(error.value)


def test_a_run_with_all_options_resumes(chat, shape, tmp_path):  # noqa: F811
    """Guards the options together, from flags to checkpoint: all finite, and a resumed run gives the same metrics."""
    save_pretrained(lively(shape, 0), tmp_path / "ckpt")
    chat.tokenizer.save(str(tmp_path / "ckpt" / "tokenizer.json"))
    small = {
        "ckpt": tmp_path / "ckpt", "rollout-batch-size": 2, "minibatch-size": 1, "num-personas": 4, "max-turns": 2,
        "num-candidates": 2, "max-new-tokens": 6, "eval-dialogues": 1, "eval-every": 0, "lr": 1e-3, "save-every": 1,
        "schedule-iterations": 2, "num-epochs": 2, "credit": "dialogue", "gamma-turn": 0.9, "gae-level": "turn",
        "clip-eps-high": 0.28, "dual-clip": 3, "sampler-correction": 2,
    }  # fmt: skip
    flags = [text for name, value in small.items() for text in (f"--{name}", str(value))]

    def trained(run: str) -> list[dict]:
        records = map(json.loads, (tmp_path / run / "metrics.jsonl").read_text().splitlines())
        timed = ("seconds", "sampled_tokens")
        return [{k: v for k, v in r.items() if not k.startswith(timed)} for r in records if r["kind"] == "train"]

    def go(run: str, iterations: int, *more: str) -> int:
        return train_rlpa.main([*more, "--num-iterations", str(iterations)] + (
            [] if more else ["--run-dir", str(tmp_path / run), "--no-tensorboard", *flags]))  # fmt: skip

    assert go("whole", 2) == go("cut", 1) == go("cut", 2, "--resume", str(tmp_path / "cut")) == 0
    assert trained("whole") == trained("cut") and len(trained("whole")) == 2
    for record in trained("whole"):
        assert all(math.isfinite(value) for value in record.values() if isinstance(value, float))
        assert record["sampler_weight"] == pytest.approx(1, abs=1e-4) and record["updates_skipped"] == 0
        assert record["ratio_dev_first"] < 1e-4 and record["sampler_weight_truncated"] == 0
        assert record["policy_grad_norm"] > 0
    kept = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert kept.items() >= {"gae_level": "turn", "dual_clip": 3.0, "clip_eps_high": 0.28}.items()
    assert set(asdict(Config(ckpt="x"))) <= set(kept)


@pytest.mark.skipif(cpu.load_library()[0] is None, reason="no C++ compiler")
def test_in_bf16_cpp_samples_and_the_trainer_corrects(chat, shape, monkeypatch):  # noqa: F811
    """Guards ratios that start at the gap between C++ and torch in bf16, a gap that is hidden, and one uncorrected."""
    calls, computed = [], cpu.CachedTrunk.__call__
    monkeypatch.setattr(cpu.CachedTrunk, "__call__", lambda *x, **y: calls.append(x[0].dtype) or computed(*x, **y))
    config = settings(max_new_tokens=6, kl_coef=0.0, old_logprobs="auto", sampler_correction=2.0)
    wide = lively(replace(shape, num_attention_heads=2, num_key_value_heads=1), 0)  # heads of a width that C++ has
    metrics = one_iteration(wide, chat, config, torch.bfloat16)
    assert calls and set(calls) == {torch.bfloat16}
    assert metrics["ratio_dev_first"] < 1e-5  # of the trainer's own log-probs
    assert 1e-4 < metrics["sampler_trainer_logprob_gap"] < 0.1
    assert metrics["sampler_weight"] != 1 and metrics["sampler_weight"] == pytest.approx(1, abs=0.1)
