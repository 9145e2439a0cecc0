"""Smoke tests of benchmarks/throughput.py at tiny sizes. Each part asserts that both sides computed the same."""

import pytest
import torch

from benchmarks import published, throughput
from model import Qwen2Config
from simulator import heard

pytestmark = pytest.mark.slow


def by_what(rows: list[throughput.Row]) -> dict[str, throughput.Row]:
    return {row.what.strip(): row for row in rows}


def test_decode():
    """Guards a comparison of two different models: greedy ids are asserted equal, rates are of the same tokens."""
    rows = throughput.decode(batch=2, context=8, new_tokens=3, repeats=1)
    assert len(rows) == 2 and all(row.ratio == row.ours / row.other for row in rows)


def test_decode_of_another_model_is_refused(monkeypatch):
    """Guards the guard: a baseline whose ids differ must stop the benchmark."""
    right = throughput.transformers_decoder

    def wrong(folder, kind):
        sample = right(folder, kind)
        return lambda *arguments: [ids[::-1] for ids in sample(*arguments)]

    monkeypatch.setattr(throughput, "transformers_decoder", wrong)
    with pytest.raises(AssertionError, match="not the same model"):
        throughput.decode(batch=2, context=8, new_tokens=2, repeats=1)


def test_decode_large():
    """Guards the child processes: same ids from one saved checkpoint, peaks of the child and not of its parent."""
    config = Qwen2Config(300, 32, 64, 2, 2, 1, tie_word_embeddings=True)
    ballast = torch.ones(200 << 18)  # 200 MiB that no child has
    rows = throughput.decode_large(config, batch=2, context=4, new_tokens=2, threads=1, repeats=1)
    assert [row.unit for row in rows] == ["tokens/s", "MiB", "MiB"]
    assert 50 < rows[1].ours < throughput.memory_status("VmRSS")
    del ballast


def test_update():
    """Guards equal work: gradients from rows equal those of trees (asserted to 1e-5), and rows hold more tokens."""
    rows = throughput.update(dialogues=2, turns=3, n=2, repeats=1, row_tokens=(300, 4096))
    tokens, _, error = rows
    assert tokens.other > 2 * tokens.ours
    assert error.ours < 1e-5


def test_iteration():
    """Guards the baseline: same dialogues, same tokens trained on, same losses, and the same policy afterwards."""
    found = by_what(throughput.iteration(
        dialogues=3, turns=3, n=2, generate_rows=4, most_tokens=2048, latency=0.01, reply_steps=4
    ))
    assert found["mean difference after the update"].ours < 1e-3
    tokens = found["tokens per training pass"]
    assert tokens.other > tokens.ours > 0
    assert found["waiting"].other > 3 * 2 * 0.01  # three dialogues' two requests, one after another


def test_iteration_of_other_dialogues_is_refused(monkeypatch):
    """Guards the guard: a baseline that hears other users."""
    user_message = published.Published.user_message

    def another(self, dialogue, play):
        return heard(user_message(self, dialogue, play) + " Good to know.", dialogue)

    monkeypatch.setattr(published.Published, "user_message", another)
    with pytest.raises(AssertionError, match="not the same dialogues"):
        throughput.iteration(dialogues=1, turns=2, n=1)


def test_rows_are_the_published_samples():
    """Guards padding: every sampled id is predicted once, by the token before it, whatever the batches."""
    samples = [published.Sample(list(range(10, 10 + n)), first, 0) for n, first in ((5, 2), (9, 8), (3, 1), (7, 4))]
    batches = published.microbatches(samples, most_tokens=14)
    assert sorted(id(s) for batch in batches for s in batch) == sorted(map(id, samples))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(len(s.token_ids) for s in batch) <= 14
        token_ids, rows, columns = published.right_padded(batch)
        predicted = token_ids[rows, columns + 1].tolist()
        assert predicted == [i for s in batch for i in s.token_ids[s.first :]]
        assert (columns + 11 == torch.tensor(predicted)).all()


def test_latency():
    """Guards equal work: a slow user changes no dialogue (asserted), and the chain has no request for the opener."""
    (row,) = throughput.latency(dialogues=2, turns=3, n=2, seconds=0.01, repeats=1, reply_steps=4)
    assert "chain 0.02" in row.what
    assert row.ratio == row.ours / row.other


def test_growth():
    """Guards the comparison: longer dialogues are played to their end and hold more tokens."""
    found = by_what(throughput.growth(dialogues=1, turns=(1, 4), n=2))
    assert found["tokens per training pass"].ratio > 2
    assert found["peak memory"].other > 50


def test_bars():
    """Guards verdicts: bars hold of the ratio, in their own direction."""
    row = throughput.Row("p", "w", 2.0, 8.0, "s", 4.0, ">= 4")
    assert row.met() == "yes" and row._replace(bar="<= 3.9").met() == "NO" and row._replace(bar="").met() == ""
    assert "| 4 | >= 4 | yes |" in throughput.render([row])
