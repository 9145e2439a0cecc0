"""The evaluation: published figures recomputed, every subject in the same record, failures that are never scored 0.

A scripted endpoint plays the subject: it is a scribe that knows all personas and notes exactly what the user has told.
"""

from __future__ import annotations

import csv
import doctest
import json
import math
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from small_run import chat_server, served

import train_rlpa
from command_line.flags import TINY_CHECKPOINT
from config import Config
from dialogue import SYSTEM_PROMPT, Dialogue, Turn
from endpoints.speech import parse_reply
from evaluation import __main__ as evaluation
from evaluation import figures, prompting, results, scenarios, subjects
from records.perplexity import read_texts
from rewards import VERDICTS, score_profile
from sampler import make_sampler
from scheduler import Scheduler
from simulator import complete, make_user_server, open_environment
from worlds import first, ledger
from worlds.personas import Persona

TINY, ROOT = str(TINY_CHECKPOINT), Path(evaluation.__file__).parents[1]
PUBLISHED = {  # RLPA's rows of the paper's tables 4 and 5: AL(k), then AVG, N-IR, N-R² (Extended: fitted again)
    "vanilla": ([62.16, 68.92, 70.27, 74.32, 72.97, 74.32, 75.68, 78.38, 77.03, 79.73], 73.38, 0.090, 0.855),
    "extended": ([49.32, 45.21, 46.58, 49.32, 52.05, 52.05, 53.42, 58.90, 53.42, 67.12], 52.74, 0.081, 0.706),
}


# ------------------------------------------------------------------------------------------------------ scripted world


@contextmanager
def subject_server(answer: Callable[[list[dict]], str | None], usage: int | None = 7) -> Iterator[str]:
    """Serve a subject: `answer` gets the messages and says something, or None for HTTP 400."""

    def said(request: dict) -> str | int:
        return 400 if (text := answer(request["messages"])) is None else text

    with chat_server(said, {"completion_tokens": usage} if usage else None) as url:
        yield f"{url}#scripted"


def scribe(messages: list[dict]) -> str:
    """Write down what the user has disclosed, as whichever held-out persona has disclosed most, and ask on."""
    told = [m["content"] for m in messages if m["role"] == "user"]
    people = first.generate_personas(8, 0, "heldout")
    facts = max(people, key=lambda facts: len(ledger.disclosed(facts, told)))
    known = [facts[i] for i in ledger.disclosed(facts, told)]
    profile = "\n".join(f"- {fact}" for fact in known)
    reply = f"Hello there, that is number {len(told)}. Where do you live?"
    if messages[0]["content"] == SYSTEM_PROMPT:
        return f"<profile>\n{profile}\n</profile>\n\n<response>\n{reply}\n</response>"
    return reply


def run(tmp_path, *argv: object) -> dict:
    """Run the program in this process, which must succeed, and return its results.json."""
    assert evaluation.main([*map(str, argv), "--quiet", "--out", str(tmp_path / "out")]) == 0
    return json.loads((tmp_path / "out" / "results.json").read_text())


def episodes(tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "out" / "episodes.jsonl").read_text().splitlines()]


# -------------------------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize("row", PUBLISHED)
def test_the_published_figures_follow_from_the_published_curves(row):
    """Guards the definitions: another fit, or another normalisation, would not give the paper's decimals."""
    curve, average, slope, fit = PUBLISHED[row]
    found = figures.alignment_figures(np.array(curve))
    assert found["AVG"] == pytest.approx(average, abs=0.005)
    assert found["N-IR"] == pytest.approx(slope, abs=0.0005) and found["N-R2"] == pytest.approx(fit, abs=0.0005)


def test_a_flat_curve_and_a_single_turn_have_figures():
    """Guards 0 ÷ 0: a subject that is right always, or asked once, has slope and fit 0, not NaN."""
    for curve in ([70.0] * 10, [0.1 + 0.2, 0.3, 0.3], [50.0]):
        found = figures.alignment_figures(np.array(curve))
        assert [float(found[name]) for name in ("IR", "R2", "N-IR", "N-R2")] == [0.0] * 4


def test_the_fit_equals_numpys_and_skips_absent_turns():
    """Guards the closed formulas, on several curves at once, and turns that nobody reached (long dialogues)."""
    curves = np.random.default_rng(0).uniform(0, 100, (5, 12))
    curves[2, 9:] = np.nan
    slopes, fits = figures.line_fit(curves)
    for curve, slope, fit in zip(curves, slopes, fits, strict=True):
        y = curve[np.isfinite(curve)]
        k = np.arange(1, len(y) + 1)
        line = np.polyval(np.polyfit(k, y, 1), k)
        assert slope == pytest.approx(np.polyfit(k, y, 1)[0])
        assert fit == pytest.approx(1 - ((y - line) ** 2).sum() / ((y - y.mean()) ** 2).sum())


def measured(al: np.ndarray) -> dict[str, np.ndarray]:
    """Return measurements (P, K) with these scores, and something for the rest."""
    rest = {name: np.where(np.isfinite(al), 0.5, np.nan) for name in ("f1", "evidence_f1", "max_f1", "tokens")}
    return {"AL": al, **rest}


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """Guards resampling turns or cells instead of personas: their scores hang together: too narrow."""
    rng, hits = np.random.default_rng(1), 0
    for seed in range(100):
        levels = rng.uniform(0, 100, (40, 1))  # of persons; the truth is 50
        hit = figures.summarize(measured(np.repeat(levels, 10, 1)), seed).figures["AVG"]
        hits += hit.low <= 50 <= hit.high
    assert 88 <= hits <= 100


def test_intervals_are_seeded():
    """Guards results that change when they are computed again."""
    al = np.random.default_rng(0).uniform(0, 100, (20, 10))
    one, same, other = (figures.summarize(measured(al), seed).figures["AVG"] for seed in (1, 1, 2))
    assert one == same and (one.low, one.high) != (other.low, other.high)


def test_a_comparison_is_paired_and_uses_shared_personas_only():
    """Guards unpaired intervals, and a subject that looks better because its hard personas were dropped."""
    al = np.random.default_rng(0).uniform(0, 80, (30, 10))
    better = al + 5
    better[:3] = np.nan
    al[3] = np.nan
    found = figures.compare(measured(better), measured(al), seed=0)
    assert found.personas == 26
    difference = found.figures["AVG"]
    assert difference.value == pytest.approx(5) and difference.high - difference.low < 1e-9
    alone = figures.summarize(measured(al), 0).figures["AVG"]
    assert alone.high - alone.low > 2


def test_dropped_personas_count_in_n_and_nowhere_else():
    """Guards a lost dialogue scored 0; with nobody left figures are NaN, not an error in numpy."""
    al = np.full((4, 3), 60.0)
    al[1] = np.nan
    found = figures.summarize(measured(al), 0)
    assert found.personas == 3 and found.figures["AVG"] == figures.Estimate(60, 60, 60)
    nobody = figures.summarize(measured(np.full((4, 3), np.nan)), 0)
    assert nobody.personas == 0 and math.isnan(nobody.figures["AVG"].value)


def test_f1_over_max_is_a_ratio_of_means():
    """Guards a mean of ratios, in which one person who said little weighs as much as all, and turn 1's 0 ÷ 0."""
    found = measured(np.full((2, 2), 50.0)) | {
        "evidence_f1": np.array([[0.0, 0.1], [0.0, 0.3]]),
        "max_f1": np.array([[0.0, 0.1], [0.0, 0.7]]),
    }
    summary = figures.summarize(found, 0)
    assert math.isnan(summary.curves["f1_over_max"][0].value)
    assert summary.curves["f1_over_max"][1].value == summary.figures["f1_over_max"].value == pytest.approx(0.5)


# -------------------------------------------------------------------------------------------------------------- methods


def steps(method: str, history: list[tuple[str, str]], *answers: str) -> tuple[list[list[dict]], str]:
    """Run a method against scripted answers; returns the messages of its calls and the reply shown."""
    calls, asked, waiting = [], prompting.METHODS[method](history), list(answers)
    try:
        calls.append(next(asked))
        while True:
            calls.append(asked.send(waiting.pop(0)))
    except StopIteration as end:
        assert not waiting
        return calls, end.value


TALK = [("user", "Hello"), ("assistant", "Hi! Any hobby?"), ("user", "I enjoy chess.")]


def test_self_critic_rewrites_its_own_draft():
    """Guards a critique that the model never gets to see, and a draft that is shown to the user."""
    calls, reply = steps("self_critic", TALK, "draft", "critique", "rewritten")
    assert reply == "rewritten" and [len(messages) for messages in calls] == [4, 6, 8]
    assert [m["content"] for m in calls[2][4::2]] == ["draft", "critique"]
    assert calls[2][-1] == {"role": "user", "content": prompting.REWRITE}


def test_thoughts_are_not_shown():
    """Guards the chain of thought that leaks into the dialogue; test_speech.py has models that think by themselves."""
    assert steps("cot", TALK, "He plays.\n<answer> Chess! Who taught you?</answer>")[1] == "Chess! Who taught you?"
    assert steps("cot", TALK, "Chess! Who taught you?")[1] == "Chess! Who taught you?"  # no tag: as it is


def test_the_reminder_is_the_newest_message_and_base_has_none():
    """Guards a reminder that is lost behind a long dialogue."""
    reminded, plain = (steps(name, TALK, "ok")[0][0] for name in ("reminder", "base"))
    assert reminded[:-1] == plain and reminded[-1] == {"role": "system", "content": prompting.REMINDER}


def test_retrieval_finds_five_earlier_exchanges():
    """Guards a retriever that finds the question itself, or the newest exchanges whatever they are about."""
    topics = ["chess", "Oslo", "opera", "nurses", "tea", "dogs", "rain", "bread"]
    history = [line for t in topics for line in (("user", f"I know about {t}."), ("assistant", f"Tell me of {t}."))]
    ((messages,), _) = steps("rag", [*history, ("user", "What about the opera and my dog?")], "ok")
    found = [line for line in messages[0]["content"].split("\n") if line.startswith("User: ")]
    assert len(found) == 5 and set(found[:2]) == {"User: I know about opera.", "User: I know about dogs."}
    assert messages[0]["content"].count("the opera and my dog") == 0
    assert steps("rag", TALK[:1], "ok")[0][0][0]["content"] == prompting.CHAT  # nothing to retrieve yet


def test_usage_is_read_and_its_absence_too():
    """Guards tokens that are made up: `usage` may be absent, null or no count."""
    reply = b'{"choices": [{"message": {"content": "Hi"}}], "usage": %s}'
    assert parse_reply(reply % b'{"completion_tokens": 9}').tokens == 9
    for usage in (b"null", b"{}", b'{"completion_tokens": "9"}', b"[]", b'{"completion_tokens": true}'):
        assert parse_reply(reply % usage).tokens is None


# ------------------------------------------------------------------------------------------------------------ scenarios


def test_what_can_change_changes_and_the_user_says_so():
    """Guards a change that only the ledger knows of: the user must hold to the new facts and take the old ones back."""
    people = first.generate_personas(30, 0, "heldout")
    for before, donor in zip(people, people[1:], strict=False):
        after = scenarios.changed_facts(before, donor)
        slots = [ledger.split_fact(fact)[0] for fact in set(before) - set(after)]
        assert slots and set(slots) <= set(scenarios.CHANGEABLE)
        old = next(fact for fact in before if fact not in after)
        history = [("user", first.say_fact(old, random.Random(0))), ("assistant", "How old are you?")]
        said = first.user_reply(after, history, seed=0)
        assert said.startswith(first.CHANGED)
        (told,) = ledger.disclosed(after, [said])
        assert ledger.split_fact(after[told])[0] == ledger.split_fact(old)[0] and after[told] in donor


def test_nobody_takes_back_what_still_holds():
    """Guards ordinary dialogues, which must stay as they were: a user whose facts stand never says they changed."""
    for facts in first.generate_personas(20, 3):
        history: list[tuple[str, str]] = []
        for turn in range(12):
            said = first.user_reply(facts, history, seed=turn)
            assert first.CHANGED not in said
            history += [("user", said), ("assistant", "Do you have a hobby? Where do you live? What is your job?")]
        assert not first.retracted_slots(facts, [text for who, text in history if who == "user"])


@pytest.mark.parametrize("by_endpoint", [False, True])
def test_conflict_changes_user_and_ledger_at_its_turn(tmp_path, by_endpoint):
    """Guards a change one turn early or late, in either of the two dialogue loops."""
    flags = ("--scenario", "conflict", "--num-personas", 2, "--turns", 4, "--change-turn", 3)
    with subject_server(scribe) as url:
        run(tmp_path, f"x={url if by_endpoint else TINY}", *flags)
    people = first.generate_personas(2, 0, "heldout")
    for episode in episodes(tmp_path):
        before, donor = people[episode["index"]], people[1 - episode["index"]]
        after = scenarios.changed_facts(before, donor)
        texts = [turn["user_text"] for turn in episode["turns"]]
        for t, turn in enumerate(episode["turns"]):
            facts = before if t < 2 else after
            score = turn["candidates"][0]["ledger"]
            assert score["max_f1"] == score_profile([], facts, ledger.disclosed(facts, texts[: t + 1])).max_f1
        assert tuple(episode["persona_facts"]) == after


def test_recovery_is_counted_from_the_change():
    """Guards recovery measured from the first turn, or found where the level never came back."""
    al = np.tile([40.0, 60.0, 20.0, 30.0, 60.0], (3, 1))
    found = figures.summarize(measured(al), 0, change_turn=3).figures
    assert found["recovery_AL"].value == found["recovery_AL"].high == 2
    never = figures.summarize(measured(al[:, :4]), 0, change_turn=3).figures["recovery_AL"]
    assert math.isinf(never.value) and str(never) == "never [never, never]"
    assert results.plain(never)["value"] == "never"


def test_other_keys_go_where_the_embedded_user_finds_them(tmp_path):
    """Guards personas with keys of their own: the embedded user would recite "Pet: parrot" as prose."""
    path = tmp_path / "free.jsonl"
    path.write_text(json.dumps({"facts": ["Pet: parrot", "Location: Oslo", "Dislikes: rain"]}) + "\n")
    (persona,) = scenarios.choose_personas(str(path), "heldout", 0, "extended", True, 0)
    assert persona.facts == ("Others: pet parrot", "Location: Oslo", "Others: dislikes rain")
    (left,) = scenarios.choose_personas(str(path), "heldout", 0, "extended", False, 0)
    assert left.facts[0] == "Pet: parrot"
    plain = scenarios.choose_personas("", "heldout", 20, "vanilla", True, 0)
    free = scenarios.choose_personas("", "heldout", 20, "extended", True, 0)
    for p, q in zip(plain, free, strict=True):
        assert len(p.facts) == len(q.facts) == len(set(q.facts)) and p.persona_id == q.persona_id
        assert sum(fact.startswith("Others") for fact in q.facts) >= len(q.facts) // 2


# ----------------------------------------------------------------------------------------------------------- as a whole


def test_a_checkpoint_against_itself_differs_by_nothing(tmp_path):
    """Guards streams that depend on the subject's place or name: a paired comparison would compare different users."""
    results = run(tmp_path, f"a={TINY}", f"b={TINY}", "--num-personas", 4, "--turns", 3)
    (difference,) = results["differences"].values()
    assert all(e["value"] in (0, None) and e["low"] == e["high"] for e in difference["figures"].values())
    assert results["subjects"]["a"]["figures"] == results["subjects"]["b"]["figures"]
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000


def test_a_checkpoint_is_measured_as_the_trainer_measures_it(tmp_path):
    """Guards a second set of definitions: F1 ÷ maximum, validity and verdicts equal those of `records.metrics`."""
    results = run(tmp_path, f"a={TINY}", "--num-personas", 6, "--turns", 4)["subjects"]["a"]["figures"]
    replies = [turn["candidates"][0] for e in episodes(tmp_path) for turn in e["turns"]]
    assert len(replies) == 24
    ledgers = [reply["ledger"] for reply in replies]
    over = sum(x["evidence_f1"] for x in ledgers) / sum(x["max_f1"] for x in ledgers)
    assert results["f1_over_max"]["value"] == pytest.approx(over, abs=1e-5)
    for name in VERDICTS:
        assert results[name]["value"] == pytest.approx(np.mean([r["verdicts"][name] for r in replies]), abs=1e-5)
    assert results["valid"]["value"] == pytest.approx(np.mean([r["failure"] is None for r in replies]), abs=1e-5)
    assert results["AVG"]["value"] == pytest.approx(100 * np.mean([r["parts"]["response"] for r in replies]), abs=1e-4)
    assert results["tokens"]["value"] == pytest.approx(np.mean([r["tokens"] for r in replies]), abs=1e-4)


def test_an_endpoint_that_notes_everything_reaches_the_maximum(tmp_path):
    """Guards the endpoint's dialogue loop: roles, parsing, ledger and tokens of a subject whose score is known."""
    with subject_server(scribe) as url:
        results = run(tmp_path, f"scribe={url}", "--num-personas", 8, "--turns", 5)
    found = results["subjects"]["scribe"]
    assert found["personas"] == 8 and found["counts"] == {}
    assert found["figures"]["f1_over_max"]["value"] == found["figures"]["valid"]["value"] == 1
    assert found["figures"]["f1"]["value"] == found["figures"]["max_f1"]["value"] > 0.1
    assert found["figures"]["tokens"]["value"] == 7
    with (tmp_path / "out" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {r["value"] for r in rows if r["metric"] == "f1_over_max" and r["turn"] in ("1", "3")} == {"", "1.0"}


def test_a_subject_keeps_its_profiles_in_the_history(tmp_path):
    """Guards a history without the subject's own profile blocks, which no trained policy has learned from."""
    seen: list[list[dict]] = []

    def answer(messages):
        seen.append(messages)
        return scribe(messages)

    with subject_server(answer) as url:
        run(tmp_path, f"x={url}", "--num-personas", 1, "--turns", 3)
        last = max(seen, key=len)
        assert [m["role"] for m in last] == ["system", "user", "assistant", "user", "assistant", "user"]
        assert ["<profile>" in m["content"] for m in last if m["role"] == "assistant"] == [True, True]
    dialogue = Dialogue(0, "x", ())
    for text in ("one", "two"):
        reply = subjects.Reply(
            token_ids=[], logprobs=[], stop_reason="stop", text=f"<profile>{text}", response=text
        )
        dialogue.turns.append(Turn("said", [], [reply]))
    dialogue.turns.append(Turn("said", []))
    latest = subjects.written_history(dialogue, Config(history_profile="latest"))
    assert [text for role, text in latest if role == "assistant"] == ["one", "<profile>two"]


def test_prompting_methods_have_no_profile_figures(tmp_path):
    """Guards a baseline without a profile that is scored F1 0, and tokens of drafts that are forgotten."""
    with subject_server(scribe, usage=None) as url:
        results = run(tmp_path, f"x={url}", "--method", "base", "self_critic", "--num-personas", 2, "--turns", 2)
    base, critic = (results["subjects"][f"x/{name}"] for name in ("base", "self_critic"))
    assert base["figures"]["f1"]["value"] is base["figures"]["valid"]["value"] is None
    words = np.mean([len(scribe([{"role": "user", "content": "x"}] * n).split()) for n in (1, 2)])
    assert base["figures"]["tokens"]["value"] == words and critic["figures"]["tokens"]["value"] == 3 * words
    assert [name for name in base["counts"] if "words" in name]


def test_a_checkpoint_can_be_prompted_too(monkeypatch, tmp_path):
    """Guards the methods on our own sampler: asked in messages with the training prompt it plays as in the rollout."""
    personas = [Persona(f"p{i}", tuple(facts)) for i, facts in enumerate(first.generate_personas(3, 0, "heldout"))]
    config = Config(ckpt=TINY, max_turns=3, max_new_tokens=128)
    play, told = train_rlpa.Play(1, 0.0, (0, "evaluate")), []
    with open_environment(config) as env:
        policy, chat = subjects.load_checkpoint(TINY_CHECKPOINT, config)
        trained_on = partial(prompting.base, system=chat.system_prompt)
        monkeypatch.setitem(subjects.METHODS, subjects.RLPA, trained_on)
        native, asked = scenarios.make_dialogues(personas), scenarios.make_dialogues(personas)
        train_rlpa.rollout(policy, chat, native, play, config, env)
        sampler = make_sampler(policy, chat, config, 1, play.temperature, 3)
        speaker = subjects.AskedSpeaker(partial(subjects.ask_policy, sampler, chat), subjects.RLPA, play, config, env)
        Scheduler(sampler, config, env).run(train_rlpa.play_dialogue(dialogue, speaker) for dialogue in asked)
        for dialogues in (native, asked):
            told.append([turn.winner.text.strip() for d in dialogues for turn in d.turns])
    assert told[0] == told[1] and len(told[0]) == 9
    assert sampler.counts["tokens_kept"] > 200  # the rows' keys and values were used
    results = run(tmp_path, f"t={TINY}", "--method", "rag", "--num-personas", 3, "--turns", 2)
    assert results["subjects"]["t"]["personas"] == 3


@pytest.mark.parametrize("method", ["rlpa", "base"])
def test_dialogues_too_long_for_the_model_end_early_and_are_counted(tmp_path, method):
    """Guards 70 turns with a model of few positions: the turns that were played count, the others are absent."""
    flags = ("--turns", 4, "--num-personas", 2, "--max-new-tokens", 3960, "--method", method, "--temperature", 0)
    results = run(tmp_path, f"a={TINY}", *flags)["subjects"]["a"]
    assert results["counts"] == {"ended early (no more positions)": 2} and results["personas"] == 2
    assert results["turns"]["AL"][0]["value"] is not None and results["turns"]["AL"][3]["value"] is None


def test_an_outage_is_told_from_an_error_by_its_exit_code(tmp_path, capsys):
    """Guards scripts that shall come back later: a user who is away is 75, as in training, and not a bad flag's 2."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        away = ["--simulator-url", f"http://127.0.0.1:{nobody.getsockname()[1]}", "--outage-budget", "0.3"]
        flags = ["--num-personas", "2", "--turns", "2", "--quiet", "--out", str(tmp_path / "none")]
        assert evaluation.main([f"a={TINY}", *away, *flags]) == os.EX_TEMPFAIL
    assert "dropped (simulator: outage)" in capsys.readouterr().err


def test_a_subject_that_fails_is_dropped_and_never_scored_0(tmp_path, capsys):
    """Guards failures: a lost dialogue lowers n and not the mean; where all are lost the program says so and fails."""

    def moody(messages):
        told = " ".join(m["content"] for m in messages if m["role"] == "user")
        return None if told.count(" ") > 0 and "I" in told.split() and len(told) % 2 else scribe(messages)

    with subject_server(moody) as url:
        found = run(tmp_path, f"x={url}", "--num-personas", 8, "--turns", 4)["subjects"]["x"]
    dropped = found["counts"].get("dropped (subject: http_4xx)", 0)
    assert 0 < dropped < 8 and found["personas"] == 8 - dropped and found["figures"]["valid"]["value"] == 1
    with subject_server(lambda messages: None) as url:
        flags = [f"x={url}", "--num-personas", "2", "--quiet", "--out", str(tmp_path / "none")]
        assert evaluation.main(flags) == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0 and "evaluation: subject x: all dialogues failed, " in error and "http_4xx" in error
    assert json.loads((tmp_path / "none" / "results.json").read_text())["subjects"]["x"]["personas"] == 0


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["x"], "NAME=FOLDER"),
        (["x=http://127.0.0.1:1/v1"], "#MODEL"),
        (["x=no/such/folder"], "no such folder"),
        (["x=ftp://host#m"], "no such folder"),
        (["x=http://u:p@host/v1#m"], "password"),
        ([f"x={TINY}", f"x={TINY}"], "more than once"),
        ([f"x={TINY}", "--turns", "0"], "--turns 0 must be at least 1"),
        ([f"x={TINY}", "--turns", "many"], "--turns"),
        ([f"x={TINY}", "--temperature", "nan"], "--temperature nan"),
        ([f"x={TINY}", "--judge-url", "notaurl"], "--judge-url: base URL 'notaurl'"),
        ([f"x={TINY}", "--simulator-url", "notaurl"], "--simulator-url: base URL"),
        (["x=notaurl#m"], "subject x=notaurl#m"),
        (["x=http://#m"], "subject x: base URL"),
        ([f"a\x1b[2J\nb={TINY}"], r"'a\x1b[2J\nb'"),
        ([f"x={TINY}", "--price-in", "1"], "--price-in 1 needs --price-out"),
        ([f"x={TINY}", "--price-out", "0"], "--price-out 0 needs --price-in"),
        ([f"x={TINY}", "--scenario", "conflict", "--turns", "3"], "--turns 6 or more, or a --change-turn from 2 to 3"),
        ([f"x={TINY}", "--scenario", "conflict", "--turns", "1"], "give --turns 2 or more"),
        ([f"x={TINY}", "--scenario", "conflict", "--change-turn", "11"], "--change-turn"),
        ([f"x={TINY}", "--scenario", "conflict", "--num-personas", "1"], "two personas"),
        ([f"x={TINY}", "--personas", "absent.jsonl"], "absent.jsonl"),
        ([f"x={TINY}", "--method", "magic"], "magic"),
        ([f"x={TINY}", "--world", "third"], "third"),
        ([f"x={TINY}", "--perplexity", "absent.txt"], "absent.txt"),
        ([f"x={TINY}", "--subject-key-env", "NOT_SET_ANYWHERE", "y=http://127.0.0.1:1#m"], "NOT_SET_ANYWHERE"),
    ],
)
def test_a_bad_flag_is_one_line_and_exit_code_2(argv, says, capsys, tmp_path):
    """Guards tracebacks, and mistakes that show only after the first subject has played for an hour."""
    assert evaluation.main([*argv, "--quiet", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("evaluation: ") and "\n" not in error and says in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", evaluation.OWN_FILES)
def test_results_are_not_overwritten(tmp_path, capsys, name):
    """Guards an hour's results from the next command, and a training run's dialogues."""
    (tmp_path / name).write_text("{}")
    assert evaluation.main([f"x={TINY}", "--out", str(tmp_path)]) == 2
    assert f"holds {name} already" in capsys.readouterr().err


@pytest.mark.parametrize("module", [figures, prompting, scenarios])
def test_examples(module):
    """Guards examples in docstrings that no longer hold."""
    assert doctest.testmod(module).failed == 0


def test_a_user_that_thinks_aloud_gives_nothing_away(tmp_path):
    """Guards the whole persona in the user's thoughts, which the policy reads and the ledger counts as disclosed."""

    def aloud(raw: bytes) -> dict:
        reply = complete(raw)
        message = reply["choices"][0]["message"]
        message["content"] = f"<think>SECRET {raw.decode()}</think>\n\n{message['content']}"
        return reply

    flags = [f"x={TINY}", "--num-personas", 2, "--turns", 3, "--simulator-model", "rule-user", "--simulator-url"]
    for name, answer in (("plain", complete), ("aloud", aloud)):
        with served(make_user_server(port=0, answer=answer)) as url:
            run(tmp_path / name, *flags, url)
    assert episodes(tmp_path / "plain") == episodes(tmp_path / "aloud") and len(episodes(tmp_path / "aloud")) == 2
    written = [path.read_bytes() for path in (tmp_path / "aloud").rglob("*") if path.is_file()]
    assert len(written) > 3 and not any(b"SECRET" in part for part in written)


def test_a_subject_that_thinks_is_heard_without_its_thoughts(tmp_path):
    """Guards thoughts, or an empty message that endpoints refuse, in the history; a subject that only thinks once."""
    said = iter(["<think>Hm.</think>", "<think>Hm.</think>Fine.", "Hm.</think>\n\nWell."])
    with subject_server(lambda messages: next(said)) as url:
        run(tmp_path, f"x={url}", "--method", "base", "--num-personas", 1, "--turns", 2)
    (episode,) = episodes(tmp_path)
    assert [turn["candidates"][0]["response"] for turn in episode["turns"]] == ["Fine.", "Well."]


@pytest.mark.slow
def test_a_reader_that_goes_away_costs_neither_results_nor_a_traceback(tmp_path):
    """Guards `… | head`: an hour of dialogues that is lost with a BrokenPipeError, and --help alike."""
    out = tmp_path / "out"
    flags = [f"a$b_$c={TINY}", "--turns", "1", "--num-personas", "2", "--quiet", "--out", str(out)]
    for argv, codes in ((flags, {141}), (["--help"], {0, 141})):  # argparse may have swallowed it
        reading, writing = os.pipe()
        os.close(reading)
        command = [sys.executable, "-m", "evaluation", *argv]
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, cwd=ROOT)
        os.close(writing)
        assert done.returncode in codes and done.stderr == b""
    assert json.loads((out / "results.json").read_text())["subjects"] and (out / "curves.png").is_file()


@pytest.mark.parametrize(("name", "text", "says"), [
    ("x.jsonl", '{"text": "a b"}\nprose\n', "line 2"),
    ("x.txt", '{"text": "a b"}\n{"text": "c\n', "line 2"),
    ("x.txt", 'Some prose.\n\n  {"messages": [\n', "line 1"),
    ("x.txt", '{messages: []}\n', "line 1"),
    ("x.txt", '{"text": "a b"}\n"role": "user"}\n', "line 2"),
])  # fmt: skip
def test_damaged_jsonl_is_not_taken_for_prose(tmp_path, name, text, says):
    """Guards a perplexity of brackets and quotation marks."""
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}, {says}"):
        read_texts(tmp_path / name)
    (tmp_path / "prose.txt").write_text('"Well," she said.\n\nThen { x }.\n')
    assert read_texts(tmp_path / "prose.txt") == ['"Well," she said.', "Then { x }.\n"]


def test_why_a_dialogue_was_dropped_steers_no_terminal():
    """Guards a reason out of a replayed file that clears the screen, or forges a line of the report."""
    lost = Dialogue(0, "x", ("Age: 34",), dropped="simulator: \x1b[2J\u202ex\ntrained: 1.0 s")
    (count,) = evaluation.counts_of([lost], 2)
    assert count == "dropped (simulator: [2J x trained: 1.0 s)"
