"""The prediction of the published run: what must be conserved, what must not rise, and cases computed by hand."""

from __future__ import annotations

import dataclasses
import doctest
import json

import pytest

import benchmarks.published_run as run
from benchmarks.published_run import Assumptions, lockstep_rollout, parked_rollout, parse_args, predict
from dry_run.memory import calls
from model import Qwen2Config

TINY = Qwen2Config(10, 4, 6, 1, 1, 1, tie_word_embeddings=True)  # 200 parameters, 160 of them no embedding
FAST = dict(rollout_batch=32, flops=1e30, bandwidth=1e30, max_concurrency=10**9)  # computing costs nothing


def test_calls_are_conserved():
    """Guards a lost or doubled call: every candidate is judged, every turn but the first hears its user."""
    a = Assumptions(rollout_batch=24, turns=5, candidates=3)
    expected = sum(calls(24, 5, 3, a.judge_calls))
    assert parked_rollout(a, a.model(), 1, 50).requests == expected
    assert lockstep_rollout(a, a.model(), 1, 50, published=True).requests == expected
    assert 8 * parked_rollout(a, a.model(), 8, 50).requests == expected


def test_rule_judges_cost_no_calls():
    """Guards a run that waits for verdicts nobody was asked for."""
    a = Assumptions(rollout_batch=8, turns=3, judge_calls=0)
    assert parked_rollout(a, a.model(), 1, 50).requests == 8 * 2
    assert run.api_price(a) < run.api_price(dataclasses.replace(a, judge_calls=1))


@pytest.mark.parametrize("procedure", run.PROCEDURES)
def test_a_faster_simulator_never_costs_time(procedure):
    """Guards the sign of the queue."""
    a = Assumptions(rollout_batch=64)
    hours = [predict(a, 8, capacity, procedure).hours for capacity in (3, 10, 100, 1000, 10_000)]
    assert all(later <= earlier * 1.01 for earlier, later in zip(hours, hours[1:], strict=False))


@pytest.mark.parametrize("procedure", run.PROCEDURES)
def test_more_gpus_never_cost_time_where_links_are_free(procedure):
    """Guards work that is not shared out; with real links the sum of gradients may cost more than GPUs save."""
    a = Assumptions(rollout_batch=64, fast_link=1e18, slow_link=1e18)
    hours = [predict(a, gpus, 10_000, procedure).hours for gpus in (1, 2, 4, 16, 64)]
    assert all(later <= earlier * 1.01 for earlier, later in zip(hours, hours[1:], strict=False))


def test_the_bottleneck_switches_where_arithmetic_says():
    """Guards the label: below calls / training seconds the simulator rules, above it the update."""
    a = Assumptions()
    training = run.training_seconds(a, a.model(), 1, published=False)
    threshold = sum(calls(a.rollout_batch, a.turns, a.candidates)) / training
    assert predict(a, 1, 0.9 * threshold, "parked").bottleneck == "simulator"
    assert predict(a, 1, 1.1 * threshold, "parked").bottleneck == "update"
    assert predict(a, 8, 10_000, "parked").bottleneck == "update, mini-batch < GPUs"
    limited = dataclasses.replace(a, max_concurrency=1)
    assert predict(limited, 1, 10_000, "parked").bottleneck == "requests in flight"
    slow = dataclasses.replace(a, latency=300.0, max_concurrency=10**6)
    assert predict(slow, 1, 10_000, "parked").bottleneck == "latency"


def test_one_dialogue_by_hand(tmp_path):
    """Guards the clock: one dialogue, one candidate, two turns, computed on paper.

    Weights are 400 bytes, a token's keys and values 16; 1,000 bytes/s. A turn's row reads prefix + reply / 2 tokens at
    every step. Judges answer after 2 s, the second of the two calls 0.5 s later; then the user after 2 s.
    """
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_dict()))
    a = Assumptions(
        personas=1, turns=2, candidates=1, rollout_batch=1, config=str(tmp_path), system_tokens=5, user_tokens=2,
        seam_tokens=1, markup_tokens=1, response_tokens=3, facts=0, length_spread=0, flops=1e30, bandwidth=1e3,
        bandwidth_share=1, latency=2, judge_calls=2,
    )  # fmt: skip
    first, second = ((400 + 16 * (prefix + 4 / 2)) / 1e3 for prefix in (8, 8 + 4 + 3))
    by_hand = 4 * first + 2.5 + 2 + 4 * second + 2.5
    found = parked_rollout(a, TINY, 1, capacity=2)
    assert found.seconds == pytest.approx(by_hand) and found.busy == pytest.approx(4 * (first + second))
    assert found.requests == 5 and found.chain == 6


def test_work_by_hand():
    """Guards the FLOP of trunk and training against the formulas written out for the smallest model."""
    assert run.trunk_flops(TINY, tokens=3, pairs=6) == 2 * 160 * 3 + 4 * 4 * 6
    a = Assumptions(turns=1, candidates=2, system_tokens=5, user_tokens=2, seam_tokens=1, markup_tokens=1,
                    response_tokens=3, facts=0, recompute=False)  # fmt: skip
    work = run.work_of(a, published=False)
    assert (work.prefilled, work.decoded, work.trained) == (8, 8, 16)
    forward, product = 2 * 160 * 16 + 16 * work.train_pairs, 2 * 4 * 10 * 8
    assert run.training_flops(a, TINY, work, False) == (3 * forward + 2 * product, 2 * 3 * forward + 3 * product)


def test_parked_dialogues_hide_latency():
    """Guards the point of parking: with computing to do, waits cost nothing; without, one chain of latencies."""
    idle = Assumptions(**FAST)
    found = parked_rollout(idle, idle.model(), 1, 1e9)
    assert found.seconds == pytest.approx(found.chain, rel=0.02)
    busy = Assumptions(decode_dialogues=16)
    found = parked_rollout(busy, busy.model(), 1, 10_000)
    assert found.seconds < 1.05 * max(found.busy, found.chain)
    assert lockstep_rollout(busy, busy.model(), 1, 10_000, published=False).seconds > 1.04 * found.seconds


def test_a_queue_takes_as_long_as_its_calls():
    """Guards the endpoint: with free computing and no latency to speak of, the rollout is calls / capacity."""
    a = Assumptions(**FAST, latency=1e-6)
    requests = sum(calls(32, a.turns, a.candidates))
    assert parked_rollout(a, a.model(), 1, 40).seconds == pytest.approx(requests / 40, rel=0.05)


def test_price_by_hand():
    """Guards the price: two turns, one candidate, no facts: tokens read and written, written out."""
    a = Assumptions(personas=1000, turns=2, candidates=1, facts=0, price_in=1, price_out=10)
    exchange = 30 + 60 + 8
    read = (186 + exchange + 67) + (230 + exchange) + (186 + 2 * exchange + 67)
    written = 2 * (37 + 6) + 30
    assert run.api_price(a) == pytest.approx(1000 * (read + 10 * written) / 1e6)


def test_every_assumption_is_a_flag(capsys):
    """Guards a setting without help, and a bad one that goes through."""
    assert parse_args(["--mfu", "0.3", "--no-recompute"]) == Assumptions(mfu=0.3, recompute=False)
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    shown = capsys.readouterr().out
    assert all("--" + f.name.replace("_", "-") in shown for f in dataclasses.fields(Assumptions))
    with pytest.raises(SystemExit):
        parse_args(["--latency", "0"])
    assert "--latency is 0.0; it must be positive" in capsys.readouterr().err


def test_tables(capsys):
    """Guards the output: one table per GPU count, one row per capacity, finite numbers."""
    run.main(["--gpus", "1,8", "--capacities", "10,1000", "--rollout-batch", "64"])
    text = capsys.readouterr().out
    assert text.count("**1 GPU**") == text.count("**8 GPUs**") == 1
    rows = [line for line in text.splitlines() if line.startswith(("| 10 |", "| 1,000 |"))]
    assert len(rows) == 4 and all("340,069" in row for row in rows)
    assert "nan" not in text and "inf" not in text.replace("in flight", "")


def test_examples():
    """Guards the examples of the docstrings."""
    assert doctest.testmod(run).failed == 0
