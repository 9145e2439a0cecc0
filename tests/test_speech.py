"""What endpoints are told and what they say: addresses, and completions that become speech."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest
from small_run import served

from benchmarks import fuzz_speech
from endpoints.client import ChatClient
from endpoints.server import make_server
from endpoints.speech import parse_reply, split_thoughts
from endpoints.tape import Tape
from endpoints.throttle import Quota
from endpoints.wire import (
    UNSAID,
    ChatError,
    RequestError,
    completions_url,
    completions_urls,
    parse_request,
    shown_url,
)

# ----------------------------------------------------------------------------------------------------------- addresses

ADDRESSES = [  # (what people paste, where the requests go)
    ("http://h:1", "http://h:1/v1/chat/completions"),
    ("http://h:1/", "http://h:1/v1/chat/completions"),
    (" http://h:1/v1/ \n", "http://h:1/v1/chat/completions"),
    ("HTTP://h/v1", "http://h/v1/chat/completions"),
    ("http://[::1]:8000", "http://[::1]:8000/v1/chat/completions"),
    ("https://h/openai/v1", "https://h/openai/v1/chat/completions"),
    ("https://h/v1beta/openai/", "https://h/v1beta/openai/chat/completions"),
    ("https://h/api", "https://h/api/chat/completions"),
    ("http://h:1/v1/chat/completions", "http://h:1/v1/chat/completions"),
    ("http://h:1/api/chat/completions/", "http://h:1/api/chat/completions"),
    ("http://h/chat/completions", "http://h/chat/completions"),
    ("https://h/deployments/m/chat/completions?api-version=2", "https://h/deployments/m/chat/completions?api-version=2"),
    ("https://h/deployments/m?api-version=2", "https://h/deployments/m/chat/completions?api-version=2"),
    ("https://h?key=a,b@c", "https://h/v1/chat/completions?key=a,b@c"),
]


def test_addresses_as_people_paste_them():
    """Guards a complete address, or a path without /v1, that is rewritten into one that no server answers."""
    assert [completions_url(base) for base, _ in ADDRESSES] == [url for _, url in ADDRESSES]
    assert completions_urls("http://a, http://b/v1,http://a/v1,https://c?x=1,2") == [
        "http://a/v1/chat/completions", "http://b/v1/chat/completions", "https://c/v1/chat/completions?x=1,2"]
    assert shown_url("https://h/v1?key=secret") == "https://h/v1?…" and shown_url("http://h/v1") == "http://h/v1"


@pytest.mark.parametrize(
    "base, why",
    [
        ("", "http://"), ("localhost:8000", "http://"), ("ftp://h", "http://"), ("h/v1?key=secret", "http://"),
        ("http://", "host"), ("http://h:port", "port"), ("http://h:99999", "port"), ("http://h:0", "port"),
        ("http://[::1", "IPv6"), ("http://u:secret@h", "password"), ("http://secret@h?x=1", "password"),
        ("u:secret@h", "http://"), ("http://h h", "blank"), ("http://h?a=@b\nsecret", "blank"),
        ("http://h/v1#secret", "fragment"), ("http://a,b", "comma"), ("http://h/v1?…", "query"),
        ("http://a:1,localhost:2", "port"),
    ],
)  # fmt: skip
def test_addresses_are_refused_by_their_cause(base, why):
    """Guards a typo in --simulator-url that shows as a connection error after two minutes; secrets that are echoed."""
    with pytest.raises(ValueError, match="base URL") as caught:
        ChatClient(base, "m", name="simulator")
    words = str(caught.value).partition("; it must look like")[0]
    assert words.startswith("--simulator-url: ") and why in words and "secret" not in words and "\n" not in words


# ---------------------------------------------------------------------------------------------- completions to speech


def completion(content, finish: str = "stop", usage: object = None, **message) -> bytes:
    """Write the body of a completion."""
    choice = {"message": {"role": "assistant", "content": content} | message, "finish_reason": finish}
    return json.dumps({"choices": [choice], "usage": usage}).encode()


def outcome(body: bytes) -> tuple[str, str, bool, bool]:
    """Return (text, reason, had thoughts, was cut) of a body."""
    try:
        reply = parse_reply(body)
    except ChatError as error:
        assert "SECRET" not in str(error) and "\n" not in str(error)
        return "", error.reason, False, False
    return str(reply), "", reply.thoughts, reply.cut


THINKING = {"type": "thinking", "thinking": [{"type": "text", "text": "SECRET"}]}  # a part, as Mistral writes it
THOUGHTS = [  # (content, what is said); each holds thoughts
    ("<think>SECRET</think>\n\nHi.", "Hi."),
    ("<think>\nSECRET\n</think>Hi.\n\nBye.", "Hi.\n\nBye."),
    ("SECRET\n</think>Hi.", "Hi."),
    ("The user typed <think>, SECRET.</think>Hi.", "Hi."),
    ("< Think >SECRET</ THINK >Hi.", "Hi."),
    ('<thinking mode="x">SECRET <think></thinking>Hi.', "Hi."),
    ("<think>SECRET `</think>` SECRET</think>Hi.", "Hi."),
    ("<think>SECRET <think>SECRET</think> SECRET</think>Hi.", "Hi."),
    ("Hi.\n<think>SECRET</think>\nBye.", "Hi.\nBye."),
    ("Hi. <think>SECRET</think> Bye.", "Hi.\nBye."),
    ("Oh, <think>SECRET</think>hi.", "hi."),
    ("<thought>SECRET</thought><thought>SECRET</thought>Hi.", "Hi."),
    ("<seed:think>SECRET</seed:think>Hi.", "Hi."),
    ("<longcat_think>SECRET</longcat_think>Hi.", "Hi."),
    ("<reasoning>SECRET</reasoning>\n<answer>\nHi.\n</answer>", "Hi."),
    ("<reflection>SECRET</reflection> Hi.", "Hi."),
    ("[THINK]SECRET[/THINK]Hi.", "Hi."),
    ("[think]SECRET[/think]Hi.", "Hi."),
    ("<|think|>SECRET<|/think|>Hi.", "Hi."),
    ("<cot>SECRET</cot>Hi.", "Hi."),
    ("<chain_of_thought>SECRET</chain_of_thought>Hi.", "Hi."),
    ("<reasoning_content>SECRET</reasoning_content>Hi.", "Hi."),
    ("<internal>SECRET</internal>Hi.", "Hi."),
    ("&lt;think&gt;SECRET&lt;/think&gt; Hi.", "Hi."),
    ("<think>SECRET</thinking>Hi.", "Hi."),
    ("<think>SECRET</thinking>SECRET</think>Hi.", "Hi."),
    ("<think>SECRET <reflection>SECRET</reflection> SECRET</think>Hi.", "Hi."),
    ("◁think▷SECRET◁/think▷Hi.", "Hi."),
    ("<|START_THINKING|>SECRET<|END_THINKING|><|START_RESPONSE|>Hi.<|END_RESPONSE|>", "Hi."),
    ("<|channel>thought\nSECRET<channel|>Hi.", "Hi."),
    ("<|channel|>analysis<|message|>SECRET<|end|><|start|>assistant<|channel|>final<|message|>Hi.<|return|>", "Hi."),
    ("SECRET<|end|><|start|>assistant<|channel|>final <|constrain|>json<|message|>{}", "{}"),
    ("analysisThe SECRET.assistantfinalHi.", "Hi."),
    ("Here is my thought process: SECRET\n\nHere is my response: Hi.", "Hi."),
    ('<details type="reasoning" done="true">\n<summary>Thought</summary>SECRET</details>\nHi.', "Hi."),
    ("SECRET\n[BEGIN FINAL RESPONSE]\nHi.\n[END FINAL RESPONSE]", "Hi."),
    ([THINKING, {"type": "text", "text": "Hi"}, {"type": "text", "text": "."}], "Hi."),
    ([{"type": "redacted_thinking", "data": "SECRET"}, {"type": "text", "text": "SECRET</think>Hi."}], "Hi."),
]
ORDINARY = [
    "Hi.", "I typed <think> and </think>.", "I typed <think>.", "In code: `<think>x</think>`, you see.", "`</think>`",
    "2 < 3 > 1 <b>x</b>", "[thinking] Well.", "<thoughtful>", "Here is my response: yes.", "analysis is my job",
    "<details><summary>More</summary>x</details>", "<profile>\n- Age: 3\n</profile>\n<response>\nHi.\n</response>",
]  # fmt: skip
UNSAYING = [  # (body, reason)
    (completion("<think>SECRET"), "only_thoughts"),
    (completion("<think>SECRET</think>\n", "length"), "only_thoughts"),
    (completion("SECRET</think>"), "only_thoughts"),
    (completion("Hi.\n<think>SECRET", "length"), "only_thoughts"),
    (completion("Oh, <think>SECRET"), "only_thoughts"),
    (completion("<think>SECRET <reflection>SECRET</reflection> SECRET", "length"), "only_thoughts"),
    (completion("<|channel|>analysis<|message|>SECRET", "length"), "only_thoughts"),
    (completion("analysisThe SECRET"), "only_thoughts"),
    (completion([{"type": "reasoning", "text": "SECRET"}]), "only_thoughts"),
    (completion(None), "no_text"),
    (completion(None, "length", reasoning_content="SECRET"), "no_text"),
    (completion(None, "tool_calls", tool_calls=[{"function": {}}]), "no_text"),
    (b'{"choices": [{"message": {}}]}', "no_text"),
    (completion(None, refusal="I cannot."), "refused"),
    (completion([{"type": "text", "text": "I"}, {"type": "refusal", "refusal": "I cannot."}]), "refused"),
    (completion("Half a", "content_filter"), "refused"),
    (completion("Half a", "error"), "broken_off"),
    (b'{"choices": [{"message": {"content": "Half a"}, "error": {"message": "lost"}}]}', "broken_off"),
    (b'{"choices": [{"error": {"message": "lost"}}]}', "broken_off"),
    (b'{"choices": [{"message": {"content": "Half a"}}], "error": "lost"}', "broken_off"),
    (completion(""), "empty"), (completion(" \n"), "empty"), (completion([]), "empty"), (b"", "empty"),
    (completion("<think>\n\n</think>"), "empty"),
    (completion([{"type": "image_url"}]), "bad_schema"), (completion(["Hi."]), "bad_schema"),
    (completion([{"text": "Hi."}]), "bad_schema"), (completion(7), "bad_schema"), (b'{"choices": []}', "bad_schema"),
    (b"[" * 300_000, "bad_json"), (b'"' + b'\\"' * 130_000, "bad_json"), (b"\xff", "bad_json"),
]  # fmt: skip


def test_thoughts_are_no_speech():
    """Guards a persona that its own user gives away: thoughts that a server leaves in the text, in any spelling."""
    found = [outcome(completion(content)) for content, _ in THOUGHTS]
    assert found == [(text, "", True, False) for _, text in THOUGHTS]


def test_ordinary_text_stays_as_it_is():
    """Guards words that are lost because they look like a mark of thoughts."""
    assert [outcome(completion(text, "length")) for text in ORDINARY] == [(text, "", False, True) for text in ORDINARY]
    assert outcome(completion("<think>\n\n</think>\n\nHi.")) == ("Hi.", "", False, False)  # none were thought


def test_replies_that_say_nothing_are_told_apart():
    """Guards half a sentence, or thoughts, that count as said; and a refusal that is taken for a broken server."""
    assert [outcome(body)[:2] for body, _ in UNSAYING] == [("", reason) for _, reason in UNSAYING]


@pytest.mark.parametrize(
    "body, words",
    [
        (b'{"error": {"message": "the model is loading"}}', "the model is loading"),
        (b'data: {"choices": [{"delta": {"content": "Hi"}}]}\n\ndata: [DONE]', "streams"),
        (completion([{"type": "image_url"}]), "image_url"),
        (completion(None, refusal="I cannot say that."), "I cannot say that."),
        (completion(None, "tool_calls", tool_calls=[{}]), "calls a tool"),
        (completion("<think>Hm", "length"), "max_tokens"),
        (b'{"choices": [{"message": {"content": "x"}, "error": {"message": "GPU lost"}}]}', "GPU lost"),
    ],
)
def test_what_is_no_speech_is_refused_by_its_cause(body, words):
    """Guards "the reply has no content" where the server said what is wrong."""
    with pytest.raises(ChatError, match=words):
        parse_reply(body)


def test_no_text_takes_the_parser_long():
    """Guards a reply of 256 KiB that keeps a run busy for hours: quadratic time does not end here."""
    for piece in ("<think>", "</think>", "a <think>b", "a <think> b</think>", "<think ", "< ", "`<think>`", "a:",
                  "<|channel|>analysis<|constrain|>", "</answer>", "<think x", "a\n<think>b</think>"):  # fmt: skip
        text = piece * (262_144 // len(piece))
        for whole in (text + "</think>", "<think>" + text):
            assert len(split_thoughts(whole)[0]) <= len(whole)


def test_fuzzed_completions_give_speech_and_nothing_else():
    """Guards thoughts that reach the policy or the ledger; and a fuzz that would not notice."""
    outcomes, wrong = fuzz_speech.run(200, seed=5)
    assert not wrong and {way for way, _ in outcomes} == {way(random.Random(0)).way for way in fuzz_speech.WAYS}
    leaky = fuzz_speech.Case("", completion("a zq1xv. I live in Oslo."), "a")
    assert fuzz_speech.faults(leaky) == ("speech", ["thought in speech", "speech lost", "fact in the ledger"])


# ------------------------------------------------------------------------------------------------- what the client does

ASK = [{"role": "user", "content": "Hello"}]


@contextmanager
def serving(*bodies: bytes) -> Iterator[tuple[str, list[dict]]]:
    """Serve the bodies one after another, the last one for ever; gives the URL and what was asked."""
    asked: list[dict] = []

    def answer(raw: bytes) -> dict:
        asked.append(json.loads(raw))
        return json.loads(bodies[min(len(asked), len(bodies)) - 1])

    with served(make_server(port=0, answer=answer)) as url:
        yield url, asked


@pytest.mark.parametrize("unsaid, reason", [case for case in UNSAYING if case[1] in UNSAID and case[0]][1::5])
def test_what_was_not_said_is_asked_for_with_another_seed(unsaid, reason):
    """Guards a server that is left alone, or asked for the same again, because a model said nothing."""
    with serving(unsaid, unsaid, completion("Hi.")) as (url, asked):
        with closing(ChatClient(url, "m", outage_budget=600, breaker_failures=2)) as client:
            assert client.ask(ASK, 7) == "Hi." and [request["seed"] for request in asked] == [7, 8, 9]
            assert client.counts["errors"] == {reason: 2} and client.counts["breaks"] == 0


def test_thoughts_and_cut_replies_are_used_counted_and_told_once(tmp_path):
    """Guards thoughts that nobody hears of, a line per reply, and a replay that counts neither."""
    bodies = [completion("<think>S</think>A"), completion("B", "length"), completion("S</think>C", "length")]
    told, counts = [], []
    for recording in (True, False):
        tape = Tape(tmp_path / "tape", recording)
        with serving(*bodies) as (url, asked), closing(ChatClient(url, "m", tape=tape, notify=told.append)) as client:
            assert [client.ask(ASK, i) for i in range(3)] == ["A", "B", "C"] and len(asked) == 3 * recording
            counts.append({name: client.counts[name] for name in ("requests", "thoughts", "length")})
    assert counts == [{"requests": 3, "thoughts": 2, "length": 2}] * 2
    assert len(told) == 1 and "thoughts" in told[0] and url.partition("/v1")[0][:16] in told[0]


@pytest.mark.parametrize(
    "rest",
    ["<|im_end|>\n<|im_start|>user\nSECRET", "<|eot_id|><|start_header_id|>user", "</s>[INST] SECRET", "<end_of_turn>"],
)
def test_what_stands_behind_the_end_of_a_turn_was_not_said(tmp_path, rest):
    """Guards a model without its stop token, which plays both sides: the ledger would see facts that nobody told."""
    told, counts = [], []
    for recording in (True, False):
        tape = Tape(tmp_path / "tape", recording)
        with serving(completion(f"Hi. {rest}"), completion(rest), completion("Bye.")) as (url, asked):
            with closing(ChatClient(url, "m", tape=tape, notify=told.append)) as client:
                assert [client.ask(ASK, seed) for seed in (1, 3)] == ["Hi.", "Bye."]  # nothing before it: another seed
                counts.append((client.counts["ran_on"], client.counts["errors"]))
    assert counts == [(1, {"empty": 1})] * 2 and len(told) == 1 and "stop tokens" in told[0]


@pytest.mark.parametrize("text, said", [
    ("Hi.\nAssistant: And you?\nUser: Me too.", "Hi."), ("Hi.\n\nHuman: And you?", "Hi."),
    ("Hi.\n### User\nAnd you?", "Hi."), ("Hi.\n**Assistant:** And you?", "Hi."), ("Hi.\n### Assistant:\nOh.", "Hi."),
    ("User: Hi.", "Hi."), ("**User**: Hi.\nUser: And you?", "Hi."), ("User:\nAssistant: Hi.", ""),
    ("Hi, Human: you.\nI am a User.\n- User: me\nUsers: all", None),
])  # fmt: skip
def test_turns_that_a_reply_makes_up_were_not_said(text, said):
    """Guards facts in the ledger that the user never told; and verdicts of a judge that begin like a role."""
    expected, own = text if said is None else said, text in ("User: Hi.", said) or said is None
    with serving(completion(text)) as (url, _), closing(ChatClient(url, "m", max_retries=0)) as client:
        reply = client.ask(ASK)
        assert str(reply if expected else reply.reason) == (expected or "empty")
        assert client.counts["ran_on"] == (not own and bool(expected))
    assert parse_reply(completion(text), one_turn=False) == text


def test_a_usage_that_cannot_be_is_not_believed():
    """Guards a count that stops the quota for a week, or a crash at a number of 400 digits."""
    for usage in (10**9, 10**400, -1, True, "9", None, [9], 1.5):
        body = completion("Hi there.", usage={"completion_tokens": usage, "prompt_tokens": usage})
        quota = Quota(tokens=61_000)
        with serving(body) as (url, _), closing(ChatClient(url, "m", quota=quota, max_tokens=10)) as client:
            assert client.ask(ASK) == "Hi there."
            told = {name: client.counts[name] for name in ("prompt_tokens", "completion_tokens", "without_usage")}
        assert told == {"prompt_tokens": 1, "completion_tokens": 2, "without_usage": 1} and quota.take(0) < 1
    for usage in (1, 9_000):  # what reasoning models take beyond max_tokens is believed
        with serving(completion("Hi.", usage={"completion_tokens": usage, "prompt_tokens": 9})) as (url, _):
            with closing(ChatClient(url, "m", max_tokens=10)) as client:
                assert client.ask(ASK).tokens == usage and client.counts["without_usage"] == 0


# ------------------------------------------------------------------------------------------------ what the server reads


@pytest.mark.parametrize(
    "content, found",
    [
        ("Hi.", "Hi."), ([{"type": "text", "text": "Hi."}], "Hi."), ([], ""),
        ([{"type": "text", "text": "Hi."}, {"type": "text", "text": "Bye."}], "Hi.\nBye."),
    ],
)  # fmt: skip
def test_a_request_may_hold_text_parts(content, found):
    """Guards a client of the server that sends a list of parts."""
    raw = json.dumps({"messages": [{"role": "user", "content": content}]}).encode()
    assert parse_request(raw)["messages"][0]["content"] == found


@pytest.mark.parametrize(
    "content, found",
    [
        ([{"type": "image_url"}], "of type 'image_url'"), ([{"type": "text"}], "of type 'text'"), (["Hi."], "a string"),
        ([{"text": "Hi."}], "an object"), (None, "null"), ({}, "an object"),
    ],
)  # fmt: skip
def test_a_request_of_other_parts_is_refused_by_name(content, found):
    """Guards a picture that is silently left out."""
    raw = json.dumps({"messages": [{"role": "user", "content": content}]}).encode()
    with pytest.raises(RequestError, match=re.escape(found)) as caught:
        parse_request(raw)
    assert caught.value.status == 422


@pytest.mark.parametrize("number", ["1" + "0" * 4000, "NaN", "-Infinity"])
def test_a_request_with_an_impossible_number_is_refused(number):
    """Guards a traceback and a 500 for `"temperature": 10**4000`."""
    with pytest.raises(RequestError) as caught:
        parse_request(b'{"messages": [{"role": "user", "content": "Hi."}], "temperature": %s}' % number.encode())
    assert caught.value.status == 400 and len(str(caught.value)) < 200
