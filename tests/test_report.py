"""The report: what it says of runs, and that nobody's text can act in it."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rewards
from dialogue import Candidate, Dialogue, Turn
from records.log import RunLog, episode_record
from report import __main__ as report
from worlds.first import generate_personas
from worlds.ledger import disclosed, told_by

FACTS = ("Age: 34", "Location: Oslo", "Gender: man", "Interests: chess")
HOSTILE = "</script><img src=x onerror=\"document.title='pwned'\"> <!--<script> \x1b[31mred \u202egnp.exe \u2028 \ud800"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (or google-chrome) to look at the page")


def candidate(profile: list[str], texts: list[str], response: str = "Hi there!", facts=FACTS, **changes) -> Candidate:
    """Make a scored candidate, as the trainer would leave it."""
    ledger = vars(rewards.score_profile(profile, facts, disclosed(facts, texts)))
    verdicts = dict.fromkeys(rewards.VERDICTS, True)
    made = Candidate(
        token_ids=[1, 2], logprobs=[-0.1, -0.3], stop_reason="stop", profile=profile, response=response,
        profile_tokens=1, verdicts=verdicts, ledger=ledger, parts={"profile": ledger["f1"], "response": 1.0},
        reward=ledger["f1"] + 1.0,
    )  # fmt: skip
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def played(index: int = 0, texts: tuple[str, ...] = ("Hello", "I moved to Oslo."), **changes) -> Dialogue:
    """Make a dialogue in which the profile first guesses Lima, and then has Oslo; two candidates a turn."""
    dialogue = Dialogue(index, f"heldout-{index}", FACTS)
    for t in range(len(texts)):
        said = list(texts[: t + 1])
        profile = ["Location: Lima"] if t == 0 else ["Location: Oslo"]
        nothing = {"parts": {"profile": 0.0, "response": 0.0}, "reward": 0.0}
        broken = candidate([], said, "oops", failure="unclosed", text="<profile>\noops", **nothing)
        dialogue.turns.append(Turn(texts[t], [7, 8], [broken, candidate(profile, said)], 1, told_by(FACTS, texts[t])))
    for name, value in changes.items():
        setattr(dialogue, name, value)
    return dialogue


def write_training(folder: Path, dialogues: dict[tuple[int, str], list[Dialogue]], iterations: int = 3) -> Path:
    """Write a training run's folder with the trainer's own log."""
    log = RunLog(str(folder), {}, tensorboard=False)
    for i in range(iterations):
        for kind in ("train", "heldout/sampled"):
            log.metrics(i, kind, {"recall": i / iterations, "response_reward": 0.5, "entropy": 1.0 / (i + 1)})
    for (iteration, kind), group in dialogues.items():
        log.episodes(iteration, kind, [episode_record(d) for d in group])
    (folder / "config.json").write_text(json.dumps({"seed": 0, "profile_weight": 1.0, "response_weight": 1.0}))
    return folder


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> Path:
    """Evaluate the tiny checkpoint twice, on three personas: the folder that it writes."""
    from evaluation import __main__ as evaluation  # slow to import: torch

    out = tmp_path_factory.mktemp("eval") / "ours"
    tiny = Path(__file__).parents[1] / "tiny"
    flags = ["--turns", "2", "--num-personas", "3", "--quiet", "--out", str(out)]
    assert evaluation.main([f"tiny={tiny}", f"again={tiny}", *flags]) == 0
    return out


def make_page(*folders: Path, **options) -> tuple[str, dict]:
    """Return the page of some folders and the data embedded in it, read as a browser would."""
    page = report.render(report.collect(folders, options.get("max_dialogues", 60)))
    return page, json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


# ---------------------------------------------------------------------------------------------------------------------
# Content


def test_profiles_are_marked_as_they_evolve():
    """A corrected trait that looked merely new, or a guess that looked supported, would tell a wrong story."""
    view = report.dialogue_view({"iteration": 1, "kind": "train", **as_json(played())})
    first, second = (turn["candidates"][turn["chosen"]] for turn in view["turns"])
    assert first["lines"] == [["Location: Lima", "wrong"]] and first["missing"] == []
    assert second["lines"] == [["Location: Oslo", "corrected"]]
    assert view["turns"][1]["candidates"][0]["missing"] == [["Location: Oslo", "missed"]]
    assert [turn["told"] for turn in view["turns"]] == [[], [1]]


def as_json(dialogue: Dialogue) -> dict:
    """Return a dialogue as it comes back from episodes.jsonl."""
    return json.loads(json.dumps(episode_record(dialogue)))


def test_changed_preferences_are_seen_from_their_turn_on():
    """With the last facts alone, what was right before a change would look wrong, and what is stale like a lie."""
    after = ("Age: 34", "Location: Lima", "Gender: man", "Interests: chess")
    dialogue = played(texts=("I live in Oslo.", "That has changed. I live in Lima."))
    dialogue.changes, dialogue.persona_facts = {0: FACTS, 1: after}, after
    for turn, city in zip(dialogue.turns, ("Oslo", "Oslo"), strict=True):
        turn.winner.profile = [f"Location: {city}"]
    view = report.dialogue_view({"iteration": 1, "kind": "x", **as_json(dialogue)})
    marks = [turn["candidates"][1]["lines"][0][1] for turn in view["turns"]]
    assert marks == ["new", "outdated"]
    assert [persona["from"] for persona in view["personas"]] == [1, 2]
    assert report.mark_profile(["Location: Lima"], after, [1], FACTS, ["Location: Oslo"])[0][0][1] == "corrected"


def test_the_ledger_is_what_a_record_says_and_of_older_ones_what_is_mentioned():
    """Guards pages of older runs in which nobody has told anything, and planned facts that are looked for in words."""
    new, old, other = ({"iteration": 1, "kind": "x", **as_json(played())} for _ in range(3))
    for turn in old["turns"]:
        del turn["told"]
    assert report.dialogue_view(old) == report.dialogue_view(new)
    other["turns"][1]["told"] = [FACTS[0]]
    assert [turn["told"] for turn in report.dialogue_view(other)["turns"]] == [[], [0]]
    other["turns"][1]["told"] = "Age: 34"
    with pytest.raises(ValueError, match="told"):
        report.dialogue_view(other)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_marks_agree_with_the_ledger(data):
    """Marks that count otherwise than rewards.score_profile would contradict the numbers beside them."""
    facts = data.draw(st.sampled_from(generate_personas(5, seed=0)))
    pool = [*facts, "Age: 99", "Location: Atlantis", facts[0].split(": ")[1]]
    lines, before = (data.draw(st.lists(st.sampled_from(pool), max_size=6)) for _ in range(2))
    texts = data.draw(st.lists(st.sampled_from([f.split(": ")[1] for f in facts]), max_size=5))
    told = disclosed(facts, texts)
    marked, missing = report.mark_profile(lines, facts, told, [], before)
    score = rewards.score_profile(lines, facts, told)
    supported = sum(mark in ("new", "kept", "corrected") for _, mark in marked)
    assert (supported, len(marked) - supported) == (score.n_recalled, score.n_unsupported)
    assert len(missing) == score.n_disclosed - score.n_recalled


def test_a_training_run_and_an_evaluation_stand_side_by_side(tmp_path, evaluated):
    """A field that trainer or evaluation renames would leave a part of the page empty without an error."""
    lost = played(1, dropped="judge: no verdict on any candidate")
    groups = {(0, "heldout/sampled"): [played()], (2, "heldout/sampled"): [played(), lost]}
    _, data = make_page(write_training(tmp_path / "run", groups), evaluated)
    training, evaluation = data["sources"]
    assert training["curves"]["train"]["recall"] == [[0, 0.0], [1, 0.333333], [2, 0.666667]]
    assert [(g["iteration"], g["dialogues"]) for g in training["turns"]] == [(0, 1), (2, 1)]
    assert training["turns"][0]["max"] == [[1, 0.0], [2, 0.4]] and training["turns"][0]["f1"] == [[1, 0.0], [2, 0.4]]
    assert (training["recorded"], training["dropped"]) == (3, 1)
    subject = evaluation["results"]["subjects"]["again"]
    assert subject["personas"] == 3 and {"value", "low", "high"} <= set(subject["figures"]["AVG"])
    assert len(subject["turns"]["AL"]) == len(subject["turns"]["evidence_f1"]) == len(subject["turns"]["max_f1"]) == 2
    assert "again - tiny" in evaluation["results"]["differences"] and evaluation["notes"] == []
    assert [d["source"] for d in data["dialogues"]] == [0] * 3 + [1] * 6


def test_the_page_names_all_figures_of_an_evaluation():
    """A figure that the evaluation adds would silently be absent from the page's tables."""
    from evaluation.results import LABELS

    template = report.TEMPLATE.read_text()
    assert [name for name in LABELS if f'"{name}"' not in template] == []
    assert [name for name in rewards.PARSE_FAILURES if f"{name}:" not in template] == []


def test_names_that_are_equal_are_told_apart(tmp_path):
    """Two runs in folders of one name would share a line in every legend."""
    runs = [write_training(tmp_path / seed / "run", {}) for seed in ("a", "b")]
    names = [source["name"] for source in make_page(*runs)[1]["sources"]]
    assert len(set(names)) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Sizes


def test_each_evaluation_and_dropped_dialogues_are_shown_within_the_cap(tmp_path):
    """The first N lines of the file would all be of one evaluation before training, with no failure among them."""
    groups = {(i, "heldout/sampled"): [played(n) for n in range(20)] for i in (0, 2)}
    groups[2, "heldout/sampled"][17].dropped = "simulator: timeout"
    run = write_training(tmp_path / "run", groups)
    _, data = make_page(run, max_dialogues=6)
    shown = [(d["iteration"], d["index"], d["dropped"]) for d in data["dialogues"]]
    assert [x[:2] for x in shown] == [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1), (2, 17)]
    assert shown[-1][2] == "simulator: timeout"
    assert any("6 of 40 recorded dialogues" in note for note in data["sources"][0]["notes"])
    assert data["sources"][0]["turns"][0]["dialogues"] == 20  # means are over all
    assert make_page(run, max_dialogues=0)[1]["dialogues"] == []


def test_long_curves_and_texts_are_cut_and_said(tmp_path):
    """A page of a long run would not open; points that were silently thinned out would hide a spike."""
    run = write_training(tmp_path / "run", {(0, "train"): [played(texts=("x" * 10**6,))]}, iterations=1001)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"iteration": 1001, "kind": "train", "entropy": 77.0}) + "\n")
    page, data = make_page(run)
    points = data["sources"][0]["curves"]["train"]["entropy"]
    assert len(points) <= report.MAX_POINTS and max(p[3] for p in points) == 77.0
    assert any("1002 records" in note for note in data["sources"][0]["notes"])
    assert "more characters left out" in data["dialogues"][0]["turns"][0]["user"] and len(page) < 400_000


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def test_damaged_lines_are_counted_not_fatal(tmp_path):
    """A run that was killed while it wrote, or one strange record, must not hide everything else."""
    run = write_training(tmp_path / "run", {(0, "train"): [played()]})
    with (run / "episodes.jsonl").open("ab") as file:
        strange = [{"kind": "train"}, {**as_json(played()), "kind": ["train"]}, {**as_json(played()), "kind": "train"}]
        strange[2]["turns"][0]["chosen"] = 9
        file.write(b"\xff\xfe\n[1]\n" + b"".join(json.dumps(x).encode() + b"\n" for x in strange) + b'{"cut": "sho')
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": NaN, "kind": "train"}\n{"iteration": 9, "kind": "train", "recall": 1e999}\nnull\n')
    page, data = make_page(run)
    notes = data["sources"][0]["notes"]
    assert "episodes.jsonl: 6 lines are damaged and left out." in notes
    assert "metrics.jsonl: 2 lines are damaged and left out." in notes
    assert len(data["dialogues"]) == 1 and "NaN" not in page.partition('id="data"')[2].partition("</script>")[0]


def test_missing_parts_are_said_in_the_page(tmp_path):
    """A report without dialogues or settings must not look as if there had been none."""
    run = write_training(tmp_path / "run", {})
    (run / "config.json").unlink()
    notes = make_page(run)[1]["sources"][0]["notes"]
    assert any("config.json is missing" in n for n in notes) and any("episodes.jsonl is missing" in n for n in notes)


def test_errors_are_one_line_that_names_the_file(tmp_path, capsys):
    """A traceback, or a page overwriting something else, is no answer to a mistyped folder."""
    (tmp_path / "empty").mkdir()
    run, broken = write_training(tmp_path / "run", {}), tmp_path / "broken"
    broken.mkdir()
    for arguments, named in [
        ([tmp_path / "nowhere"], "nowhere"),
        ([tmp_path / "empty"], "neither metrics.jsonl"),
        ([run, run], "twice"),
        ([run, "--out", run / "config.json"], "config.json"),
        ([run, "--out", report.TEMPLATE], "template"),
        ([run, "--out", tmp_path / "no" / "page.html"], "page.html"),
        ([run, "--max-dialogues", "-1"], "--max-dialogues -1"),
        ([run, "--max-dialogues", "many"], "--max-dialogues"),
        ([], "RUN"),
    ]:
        assert report.main(list(map(str, arguments))) == 2
        error = capsys.readouterr().err
        assert named in error and error.count("\n") == 1
    for content in ("{", "[]", "{}", '{"settings": {}, "subjects": {"a": 1}, "differences": {}}'):
        (broken / "results.json").write_text(content)
        assert report.main([str(broken)]) == 2
        error = capsys.readouterr().err
        assert "results.json" in error and error.count("\n") == 1
    assert report.main([str(run)]) == 0 and (run / "report.html").is_file()


# ---------------------------------------------------------------------------------------------------------------------
# Nobody's text can act


class Elements(HTMLParser):
    """Collect the start tags of a page, and its references."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [value for name, value in attrs if name in ("src", "href", "srcset", "action")]


def hostile_run(folder: Path) -> Path:
    """Write a run in which user, model, persona, judge and folder names are all hostile."""
    dialogue = played(texts=("Hello", HOSTILE), persona_id=HOSTILE, persona_facts=(*FACTS[:3], f"Others: {HOSTILE}"))
    for turn in dialogue.turns:
        turn.winner.response, turn.winner.profile = HOSTILE, [f"Others: {HOSTILE}", "{{TITLE}} {{DATA}}"]
    lost = played(1, dropped=f"simulator: {HOSTILE}")
    lost.turns[1].candidates[1].judged = False
    return write_training(folder, {(0, "heldout/sampled"): [dialogue, lost], (0, HOSTILE): [played()]})


def test_hostile_text_is_data(tmp_path):
    """A simulated user that writes </script> could run code in the reader's browser, or end the data early."""
    page, data = make_page(hostile_run(tmp_path / "<img onerror=alert(1)>"))
    elements = Elements(page)
    assert elements.tags.count("script") == 2 and "img" not in elements.tags
    assert all(reference.startswith("#") for reference in elements.references)
    said = next(d for d in data["dialogues"] if d["kind"] == "heldout/sampled")["turns"][1]["user"]
    for shown in ("</script><img", "⟨U+001B⟩[31m", "⟨U+202E⟩", "⟨U+2028⟩", "⟨U+D800⟩"):
        assert shown in said
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069\u2028\u2029]", page)
    assert page.encode("utf-8") and "{{TITLE}} {{DATA}}" in page  # a placeholder in a text stays text


def test_hostile_names_of_subjects_are_data(tmp_path, evaluated):
    """A results.json of a stranger whose subjects, settings and counts are markup could run code, or hide text."""
    folder = tmp_path / "evaluation"
    shutil.copytree(evaluated, folder)
    results = json.loads((folder / "results.json").read_text())
    results["subjects"][HOSTILE] = results["subjects"].pop("again") | {"counts": {HOSTILE: 1}}
    results["settings"] |= {HOSTILE: HOSTILE, "scenario": HOSTILE}
    (folder / "results.json").write_text(json.dumps(results))
    page, data = make_page(folder)
    assert Elements(page).tags.count("script") == 2 and "img" not in Elements(page).tags
    assert any("⟨U+001B⟩[31m" in name for name in data["sources"][0]["results"]["subjects"])
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069\u2028\u2029]", page)


def test_joiners_of_words_and_emoji_are_kept():
    """Escaping every invisible character would break Persian words and emoji families."""
    assert report.visible("می‌خواهم 👩‍🔬 é 中\n\t") == "می‌خواهم 👩‍🔬 é 中\n\t"


def test_only_the_template_may_run_and_nothing_may_be_fetched():
    """A policy that does not name the very script of the page would stop it, or let another one in."""
    page = report.render({"title": "t", "verdicts": [], "sources": [], "dialogues": []})
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1]
    for tag in ("script", "style"):
        assert f"{tag}-src 'sha256-{report.digest(page, tag)}'" in policy
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    template = report.TEMPLATE.read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|\bfetch\(|style=\"", template)


# ---------------------------------------------------------------------------------------------------------------------
# In a browser


def look(page: str, folder: Path, fragment: str = "", width: int = 1200) -> tuple[str, list[str]]:
    """Return the page's elements after its script ran, and what the console says."""
    path = folder / "page.html"
    path.write_text(page, encoding="utf-8")
    flags = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
        --disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=4000 --dump-dom"""
    place = [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900"]
    run = [CHROMIUM, *flags.split(), *place, f"{path.as_uri()}{fragment}"]
    done = subprocess.run(run, capture_output=True, text=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def plain_text(dom: str) -> str:
    """Return what can be read of some elements."""
    return re.sub(r"<[^>]*>", "", dom)


@needs_browser
def test_a_link_opens_a_dialogue_at_a_turn(tmp_path, evaluated):
    """A page that stays empty after an error in its script, or opens another dialogue, passes all tests above."""
    groups = {(i, "heldout/sampled"): [played(n) for n in range(2)] for i in (0, 2)}
    page, _ = make_page(write_training(tmp_path / "run", groups), evaluated)
    dom, console = look(page, tmp_path, "#dialogue=4&turn=1&theme=dark")
    assert console == [] and 'data-ready="true"' in dom and 'data-theme="dark"' in dom
    assert '<output id="place" aria-live="polite">4 of 10</output>' in dom
    shown = plain_text(dom.partition('id="dialogue"')[2])
    assert "Persona heldout-1" in shown and "iteration 2" in shown and "After turn 1: 0 of 4 told" in shown
    assert "↻Location: Oslocorrected" in shown and "✕Location: Limawrong" in shown and "Could not be read" in shown
    assert "1 other candidate" in shown and dom.count('<details class="others"') == 2
    assert dom.count('<details class="others" open="">') == 1  # of the turn that the link names
    head = plain_text(dom.partition('id="dialogue"')[0])
    assert all(
        word in head for word in ("Facts in the profile", "again - tiny", "≈ 0.000", "Profile of again", "AL(k)")
    )
    assert dom.count('role="img"') > 8


@needs_browser
def test_hostile_text_is_inert_in_a_browser(tmp_path):
    """What Python escapes, the page's own script could still turn into markup; and a dropped dialogue must say so."""
    page, data = make_page(hostile_run(tmp_path / "run"))
    first, lost = (i for i, d in enumerate(data["dialogues"], 1) if d["kind"] == "heldout/sampled")
    for number in (first, lost):
        dom, console = look(page, tmp_path, f"#dialogue={number}", width=500)
        assert console == [] and 'data-ready="true"' in dom and "<img" not in dom and "<title>pwned" not in dom
        assert "&lt;/script&gt;&lt;img src=x" in dom and "⟨U+202E⟩gnp.exe" in dom
    assert "✕ Dropped: " in plain_text(dom) and "✕ Not judged: " in plain_text(dom)


@needs_browser
def test_the_policy_stops_a_foreign_script(tmp_path):
    """A policy with a typing error in it is ignored by browsers without a word."""
    page, _ = make_page(write_training(tmp_path / "run", {(0, "train"): [played()]}))
    foreign = "<script>document.title = 'ran'</script><img src=x onerror=\"document.title = 'ran'\">"
    dom, console = look(page.replace("</body>", f"{foreign}</body>"), tmp_path)
    assert 'data-ready="true"' in dom and "<title>ran" not in dom and "<title>RLPA: run</title>" in dom
    assert len(console) >= 2 and all("Content Security Policy" in line for line in console)


@needs_browser
def test_keys_buttons_and_filters_turn_over_dialogues(tmp_path, monkeypatch):
    """A listener on a name that is gone fails without a trace until somebody clicks."""
    keys = """
        const press = (target, key) => target.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
        const seen = [], look = () => seen.push(document.getElementById("place").textContent + location.hash);
        press(document.body, "ArrowRight"); look();
        document.getElementById("next").click(); look();
        press(document.body, "ArrowLeft"); look();
        press(document.querySelector("figure svg"), "ArrowLeft"); look();
        const filter = document.getElementById("filter-outcome");
        filter.value = "1"; filter.dispatchEvent(new Event("change")); look();
        document.querySelector(".turn header button").click();
        seen.push(...[".tip:not([hidden])", ".stepper"].map(name => document.querySelector(name).textContent));
        document.title = JSON.stringify(seen);
    </script>"""
    template = tmp_path / "template.html"
    template.write_text(keys.join(report.TEMPLATE.read_text().rsplit("</script>", 1)))
    monkeypatch.setattr(report, "TEMPLATE", template)
    lost = played(3, dropped="simulator: timeout")
    page, _ = make_page(write_training(tmp_path / "run", {(0, "train"): [*map(played, range(3)), lost]}))
    dom, console = look(page, tmp_path)
    places = ["2 of 4#dialogue=2", "3 of 4#dialogue=3", *["2 of 4#dialogue=2"] * 2, "1 of 1#dialogue=4"]
    tip, stepper = "iteration 2training personas, sampled: 0.67", "‹After turn 1: 0 of 4 told›"
    seen = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", dom)[1]))
    assert console == [] and seen[:5] == places and seen[5].startswith(tip) and seen[6] == stepper
