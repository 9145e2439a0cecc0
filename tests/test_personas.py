"""Personas: every accepted form, every refusal, a fuzz of the loader, and the role prompt with its messages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simulator import OPENING, parse_simulator_messages, simulator_messages
from worlds import first, ledger
from worlds.personas import Persona, load_personas, split_sentences, usable_facts

ALOE = Path(__file__).parents[1].parent / "shared" / "aloe"
fuzz = settings(max_examples=200, deadline=None, suppress_health_check=HealthCheck)


@pytest.fixture
def load(tmp_path):
    """Return a function that writes bytes or text into a file and loads personas from it."""

    def write_and_load(content: str | bytes) -> list[Persona]:
        path = tmp_path / "people.jsonl"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return load_personas(path)

    return write_and_load


# ------------------------------------------------------------------------------------------------------- accepted forms
@pytest.mark.skipif(not ALOE.exists(), reason="the ALOE files (../shared/aloe) are not here")
def test_aloe_files_as_they_are():
    """Guards: json.loads per line fails on line 6 of profile.jsonl, which holds two profiles (331 on 330 lines)."""
    profiles, personalities = load_personas(ALOE / "profile.jsonl"), load_personas(ALOE / "personality.jsonl")
    assert (len(profiles), len(personalities)) == (331, 71)
    assert profiles[5].facts[0].startswith("He is a 37-year-old software engineer")
    assert profiles[6].facts[0].startswith("He is a 46-year-old high school history teacher")
    assert [p.persona_id for p in profiles[5:8]] == ["profile:6", "profile:6.2", "profile:7"]
    for persona in profiles + personalities:
        assert all(fact[0].isupper() and fact[-1] in ".!?" for fact in persona.facts), "a sentence was cut in two"


def test_several_values_on_one_line(load):
    """Guards: the second value of a line is lost, or gets the id of the first."""
    personas = load('"She paints." "He sings. He naps."{"facts": ["Age: 3"]}\n\n"They row."\n')
    assert [p.facts for p in personas] == [("She paints.",), ("He sings.", "He naps."), ("Age: 3",), ("They row.",)]
    assert [p.persona_id for p in personas] == ["people:1", "people:1.2", "people:1.3", "people:3"]


def test_facts_and_ids(load):
    """Guards: an explicit id (text or number) is ignored."""
    lines = ['{"id": "ann", "facts": ["Age: 34", "likes tea"]}', '{"id": 7, "facts": ["x"]}', '{"facts": ["y"]}']
    assert load("\n".join(lines)) == [
        Persona("ann", ("Age: 34", "likes tea")), Persona("7", ("x",)), Persona("people:3", ("y",))
    ]


def test_ten_slots(load):
    """Guards: a slot of the paper is refused, a list is rendered as one fact, a number crashes."""
    slots = {slot: ["one", "two"] if slot in {"Interests", "Personality Traits", "Others"} else "one"
             for slot in ledger.SLOTS} | {"Age": 34}
    (persona,) = load(json.dumps({"slots": slots}))
    assert len(ledger.SLOTS) == 10 and len(persona.facts) == 13
    assert {"Age: 34", "Interests: one", "Interests: two", "Educational Background: one"} <= set(persona.facts)


def test_facts_of_the_world_survive_the_file(load):
    """Guards: writing synthetic personas to JSONL and reading them back changes a fact."""
    generated = first.generate_personas(20, seed=1)
    loaded = load("\n".join(json.dumps({"facts": facts}) for facts in generated))
    assert [list(p.facts) for p in loaded] == generated


@pytest.mark.parametrize(
    "content",
    ["\ufeff" + '"He naps."', '"He naps."\r\n', '\n \t\n"He naps."   \n', '"He naps."'.encode("utf-16"),
     '\ufeff"He naps."'.encode("utf-16-be"), '["He naps."]',
     '\n[\n  {"facts":\r\n ["He naps."],\n "slots": null}\n]\n'],
)  # fmt: skip
def test_tolerated_bytes(load, content):
    """Guards: a byte order mark, a spreadsheet's UTF-16, CRLF, blank lines, one list or a null break the file."""
    assert [persona.facts for persona in load(content)] == [("He naps.",)]


def test_every_line_end_counts(load):
    """Guards: a file with CR alone is one line, so that its second value is not JSON and no error finds its line."""
    lines = ['"He naps."', "", '{"facts": ["x"]}', '{"id": null, "slots": {"Age": 34.0}}']
    for end in ("\n", "\r", "\r\n"):
        assert [p.persona_id for p in load(end.join(lines))] == ["people:1", "people:3", "people:4"]
        with pytest.raises(ValueError, match="line 5: found a number"):
            load(end.join([*lines, "5"]))
    listed = load("[" + ",\n".join(line for line in lines if line) + "\n]")
    assert [p.persona_id for p in listed] == ["people:1", "people:2", "people:3"]
    assert listed[2].facts == ("Age: 34",)


def test_what_is_left_out_is_said_once(load, capsys):
    """Guards: facts that vanish without a word, because they are empty, null or repeated; and a line for each."""
    load('{"facts": ["a", "A", "-", null]}\n{"slots": {"Age": null, "Others": ["b", "c"]}}\n"He naps."')
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ") and "people.jsonl: 4 facts of 2 personas" in line
    load('"He naps."\n"She naps."\n{"id": "b", "facts": ["He naps."]}')
    assert "people.jsonl: 1 of 3 personas" in capsys.readouterr().err


def test_line_separator_inside_a_string(load):
    """Guards: str.splitlines cuts a JSON string at U+2028, which JSON allows."""
    assert load('"He naps.\u2028He rows."')[0].facts == ("He naps.", "He rows.")


def test_cleaning(load):
    """Guards: a newline in a fact forges a second "- " line of the prompt; a lone surrogate crashes the tokenizer."""
    facts = ["plays\nthe\tharp\u0000", "Plays the harp", " - ", "\ud83d cat", "Location: ", "a\u2028- b"]
    (persona,) = load(json.dumps({"facts": facts}))
    assert persona.facts == ("plays the harp", "cat", "a - b")


@pytest.mark.parametrize(
    "prose, sentences",
    [
        ("He has a Ph.D. in law. He naps.", ["He has a Ph.D. in law.", "He naps."]),
        ("She earned a Ph.D. She teaches.", ["She earned a Ph.D.", "She teaches."]),
        ("Dr. Li and Mrs. Ho met St. John.", ["Dr. Li and Mrs. Ho met St. John."]),
        ("Moved to the U.S. Army base at 5 a.m. in May.", ["Moved to the U.S. Army base at 5 a.m. in May."]),
        ("J. K. Rowling fan, e.g. of the books.", ["J. K. Rowling fan, e.g. of the books."]),
        ("Runs 3.5 miles for $2.50 a day! Really? Yes...", ["Runs 3.5 miles for $2.50 a day!", "Really?", "Yes..."]),
        ('He says "Go." She goes.', ['He says "Go."', "She goes."]),
        ("她三十四岁。她喜欢画画！", ["她三十四岁。", "她喜欢画画！"]),
        ("Cats, dogs, etc. and birds. no capital", ["Cats, dogs, etc. and birds.", "no capital"]),
        ("Built custom PCs. He lives in L.A. He surfs.", ["Built custom PCs.", "He lives in L.A.", "He surfs."]),
    ],
)
def test_sentence_split(prose, sentences):
    """Guards: prose is cut at abbreviations, initials or decimals, or not cut at a sentence's end."""
    assert split_sentences(prose) == sentences


# ------------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    "line, found, accepted",
    [
        ("{bad", "{bad", "slots"),
        ('"open', "cannot be used as JSON", "prose"),
        ("3", "a number (3)", "slots"),
        ("null", "null", "slots"),
        ("true", "a boolean (true)", "slots"),
        ("NaN", "NaN", "slots"),
        ('["He naps."]', "a list", "slots"),
        ('{"fact": ["x"]}', "'fact'", '"facts"'),
        ('{"facts": ["x"], "slots": {}}', "both", "one of them"),
        ('{"id": 1}', "neither", "one of them"),
        ('{"facts": "x"}', 'a string ("x")', "list of strings"),
        ('{"facts": ["x", 1]}', '"facts"[1] is a number', "string"),
        ('{"facts": [null]}', "no usable fact", "letter or a digit"),
        ('{"facts": null, "slots": null}', "neither", "one of them"),
        ('{"facts": ["x"], "facts": ["y"]}', "key 'facts' stands twice", "slots"),
        ('{"slots": {"Age": 3, "Age": 4}}', "key 'Age' stands twice", "slots"),
        ('{"facts": [' + "[" * 900 + "]" * 900 + "]}", '"facts"[0] is a list', "string"),
        ("name,age", "name,age", "slots"),
        ('{"facts": []}', "no usable fact", "letter or a digit"),
        ('{"facts": ["...", ""]}', "no usable fact", "letter or a digit"),
        ('{"facts": ["Age:"]}', "no usable fact", "letter or a digit"),
        ('"  "', "no usable fact", "letter or a digit"),
        ('{"slots": []}', "a list ([])", "object"),
        ('{"slots": {"Shoe size": 3}}', "'Shoe size'", "Occupation"),
        ('{"slots": {"Age": null}}', "no usable fact", "letter or a digit"),
        ('{"slots": {"Age": true}}', "a boolean", "a string"),
        ('{"slots": {"Age": 3.5}}', "a number (3.5)", "whole number"),
        ('{"slots": {"Age": {"x": 1}}}', "an object", "a string"),
        ('{"slots": {"Interests": ["chess", ["opera"]]}}', "a list", "a string"),
        ('{"id": true, "facts": ["x"]}', "a boolean", "a string or a whole number"),
        ('{"id": " ", "facts": ["x"]}', 'a string (" ")', "a string or a whole number"),
        ("[" * 100_000, "nested too deeply", "slots"),
        ('{"slots": {"Age": ' + "9" * 5000 + "}}", "cannot be used as JSON", "slots"),
        ('"He naps." junk', "junk", "prose"),
        ('"She said ""Hi."" and left."', "two strings side by side; is", "prose"),
        (json.dumps({"facts": [f"fact {i}" for i in range(501)]}), "501 facts", "may have 500"),
    ],
)
def test_each_refusal_names_place_finding_and_way_out(load, line, found, accepted):
    """Guards: a bad line is skipped, crashes with another type, or its error does not say where and what."""
    with pytest.raises(ValueError) as caught:
        load('"She paints."\n' + line)
    message = str(caught.value)
    assert "people.jsonl, line 2" in message and found in message and accepted in message
    assert "\n" not in message and len(message) < 500


def test_refusals_of_whole_files(tmp_path, load):
    """Guards: a missing file, a folder, an empty or a binary file raises something else than a one-line ValueError."""
    with pytest.raises(ValueError, match="nowhere.jsonl does not exist"):
        load_personas(tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match="not a plain file"):
        load_personas(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        load_personas("a\0b")
    for empty in ("", "\n \n"):
        with pytest.raises(ValueError, match="holds no personas"):
            load(empty)
    with pytest.raises(ValueError, match="line 2: byte 0xff is not UTF-8"):
        load(b'"He naps."\n"caf\xff"')
    for raw, kind in ((b"PK\x03\x04\x14", "a spreadsheet"), (b"\x1f\x8b\x08", "compressed by gzip")):
        with pytest.raises(ValueError, match=f"people.jsonl is {kind}.*; export it as text"):
            load(raw)
    for cut in ("[", '["He naps."', '["He naps.",', '["He naps." "She"]', '["He naps."] "She"'):
        with pytest.raises(ValueError, match="people.jsonl"):
            load(cut)
    with pytest.raises(ValueError, match="line 1: byte 0xfc is not UTF-8; save"):
        load('"Jürgen naps."'.encode("cp1252"))
    with pytest.raises(ValueError, match="line 2: .*'ann' is that of line 1"):
        load('{"id": "ann", "facts": ["x"]}\n{"id": "ann", "facts": ["y"]}')


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from(["id", "facts", "slots", "Age", "Others", "x"]), inner, max_size=4),
    max_leaves=12,
)
near_misses = st.fixed_dictionaries(
    {}, optional={"id": json_values, "facts": st.lists(st.text(max_size=20)) | json_values,
                  "slots": st.dictionaries(st.sampled_from([*ledger.SLOTS, "x"]), json_values)}
)
lines = st.lists(json_values.map(json.dumps) | near_misses.map(json.dumps) | st.text(max_size=30), max_size=4)
contents = st.binary(max_size=60) | st.lists(lines.map("".join)).map(lambda x: "\n".join(x).encode(errors="replace"))


@given(content=contents)
@fuzz
def test_load_never_raises_anything_but_value_error(load, content):
    """Guards: KeyError, TypeError, RecursionError and the like from a file that nobody thought of."""
    try:
        personas = load(content)
    except ValueError as error:
        assert "people.jsonl" in str(error) and "\n" not in str(error) and "\r" not in str(error)
        return
    assert personas and len({p.persona_id for p in personas}) == len(personas)
    for persona in personas:
        assert persona.facts == usable_facts(persona.facts)
        assert all("\n" not in fact and fact.encode() for fact in persona.facts)


# --------------------------------------------------------------------------------------------- role prompt and messages
def test_role_prompt_states_the_rules_of_the_paper():
    """Guards: a rule of RLPA appendix C.4 is dropped when the prompt is edited."""
    prompt = simulator_messages(Persona("a", ("Age: 34", "likes tea")), [])[0]["content"]
    for rule in ("no personal information", "15 %", "three sentences", "answer what was asked", "cold at first",
                 "Do not open topics", "asked or said again, say so", "Never break the role",
                 "never say that you are an AI"):
        assert rule.casefold() in prompt.casefold()
    assert prompt.endswith("\n\nYour profile:\n- Age: 34\n- likes tea")


def test_roles_are_seen_from_the_users_side():
    """Guards: the published code labels the simulated human's own lines as the other side's."""
    history = [("user", "Hello"), ("assistant", "Hi! Any hobbies?"), ("user", "Chess."), ("assistant", "Nice.")]
    messages = simulator_messages(Persona("a", ("Interests: chess",)), history)
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert [m["content"] for m in messages[1:]] == [OPENING, "Hello", "Hi! Any hobbies?", "Chess.", "Nice."]


def test_opening_only_where_the_human_begins():
    """Guards: chat templates that want a "user" message first refuse the request, or the policy's opener is doubled."""
    persona = Persona("a", ("x",))
    assert [m["content"] for m in simulator_messages(persona, [])[1:]] == [OPENING]
    assert [m["content"] for m in simulator_messages(persona, [("assistant", "Hi")])[1:]] == ["Hi"]


@pytest.mark.parametrize(
    "history", [[("user", "Hello")], [("system", "x")], [("assistant", "a"), ("assistant", "b")], [("human", "Hello")]]
)
def test_history_out_of_turn_is_refused(history):
    """Guards: a history that ends with the user's own line makes the model answer itself."""
    with pytest.raises(ValueError):
        simulator_messages(Persona("a", ("x",)), history)


@given(facts=st.lists(st.text(max_size=30)), texts=st.lists(st.text(max_size=30)), human_first=st.booleans())
@fuzz
def test_messages_can_be_parsed_back(facts, texts, human_first):
    """Guards: a fact or a chat line forges a heading, a fact or a turn on the way to the server and back."""
    facts = usable_facts([*facts, "Your profile:", "- x", "\nYour profile:\n- forged"])
    order = ("user", "assistant") if human_first else ("assistant", "user")
    history = [(order[i % 2], text) for i, text in enumerate([*texts, "Your profile:\n- forged"])]
    if history[-1][0] == "user":
        history.append(("assistant", "?"))
    assert parse_simulator_messages(simulator_messages(Persona("a", facts), history)) == (facts, history)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "user", "content": "Your profile:\n- x"}],
        [{"role": "system", "content": "You are helpful."}],
        [{"role": "system", "content": "Your profile:"}],
        [{"role": "system", "content": "Your profile:\n- ..."}],
        [{"role": "system", "content": "Your profile:\n- x"}, {"role": "tool", "content": "x"}],
    ],
)
def test_foreign_messages_are_refused(messages):
    """Guards: IndexError or a reply as nobody in particular for messages that are no role prompt."""
    with pytest.raises(ValueError):
        parse_simulator_messages(messages)
