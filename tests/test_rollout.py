"""The rollout: what is sampled depends on seeds alone, not on latencies, batches or memory, and nobody waits in vain.

The policy is random and ends its turns at any step; user and judge answer by seed, from threads, whenever they like.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from small_run import small_tokenizer

import rewards
import sampler
import scheduler
from config import Config
from dialogue import ChatTokenizer, Dialogue, stream_seed
from endpoints.wire import ChatError
from model import Qwen2Config, Qwen2ForCausalLM, random_policy
from rewards import VERDICTS, ParsedTurn
from sampler import Sampler
from scheduler import Ask, Scheduler, Waits
from simulator import Environment
from train_rlpa import Play, rollout

GOOD, POOR = ("{" + ", ".join(f'"{name}": {bit}' for name in VERDICTS) + "}" for bit in (1, 0))
STREAM = (0, "test")
SIZE, TURNS, N = 5, 3, 3


@pytest.fixture(scope="module")
def chat() -> ChatTokenizer:
    """A byte-level tokenizer of about 400 ids."""
    return ChatTokenizer(small_tokenizer())


@pytest.fixture(scope="module")
def policy(chat) -> Qwen2ForCausalLM:
    """Two random layers, large enough that each token's distribution depends on all before it."""
    shape = Qwen2Config(chat.vocab_size, 32, 48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    policy = random_policy(shape, seed=0)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return policy


def stop_often(chat: ChatTokenizer, patch: pytest.MonkeyPatch) -> list[Sampler]:
    """Let a turn end at every tenth id, and be valid whatever it says; return all samplers that will be made."""
    made: list[Sampler] = []

    def new(policy, **settings):
        made.append(Sampler(policy, **(settings | {"stop_ids": range(3, chat.vocab_size, 10)})))
        return made[-1]

    patch.setattr(sampler, "Sampler", new)
    patch.setattr(rewards, "parse_turn", lambda text, reason: ParsedTurn([], text or "..."))
    return made


@pytest.fixture(autouse=True)
def samplers(chat, monkeypatch) -> list[Sampler]:
    """The samplers that the test has made."""
    return stop_often(chat, monkeypatch)


class Endpoint:
    """Stands in for a `ChatClient`: what it says depends on the seed alone, when it does on nothing."""

    def __init__(self, answer: Callable[[int], str | ChatError], pauses: tuple[float, ...] = (0.0,)):
        self.answer, self.pauses, self.random = answer, pauses, random.Random()

    def ask(self, messages: list[dict], seed: int) -> str | ChatError:
        time.sleep(self.random.choice(self.pauses))
        return self.answer(seed)

    def note_verdict(self, answer: str, read: bool) -> None:
        """A verdict that fails is counted by the candidate."""

    def close(self) -> None:
        """Nothing is under way that could be cut off."""


def say(seed: int) -> str:
    return f"I am {seed % 90} years old." + " Well." * (seed % 4)


def verdict(seed: int) -> str:
    return GOOD if seed % 3 == 0 else POOR


def seeds_of(kind: str, index: int, turn: int) -> list[int]:
    """The seeds that the judge gets for a turn's candidates, or the one that the user gets for its message."""
    if kind == "user":
        return [stream_seed(*STREAM, "user", index, turn - 1)]
    return [stream_seed(*STREAM, "judge", index, turn, c) for c in range(N)]


def play(policy, chat, *, user=None, judge=None, size: int = SIZE, **changes) -> tuple[list[Dialogue], Environment]:
    """Play dialogues with n candidates a turn."""
    settings = dict(ckpt="x", max_turns=TURNS, num_candidates=N, max_new_tokens=12, reply_steps=0, kv_gib=1.0)
    config = Config(**(settings | changes))
    env = Environment(user or Endpoint(say), judge or Endpoint(verdict))
    dialogues = [Dialogue(i, f"persona {i}", ("Age: 34", "Occupation: baker")) for i in range(size)]
    rollout(policy, chat, dialogues, Play(N, 1.0, STREAM), config, env)
    return dialogues, env


def what(dialogue: Dialogue, logprobs: bool = False) -> list:
    """All that happened in a dialogue."""
    turns = []
    for turn in dialogue.turns:
        scores = [(c.token_ids, c.stop_reason, c.parts, c.verdicts, c.judged) for c in turn.candidates]
        noted = [c.logprobs for c in turn.candidates] if logprobs else []
        turns.append((turn.user_text, turn.prompt_ids, turn.chosen, scores, noted))
    return [dialogue.index, dialogue.dropped, turns]


@pytest.fixture(scope="module")
def plain(policy, chat) -> list:
    """What happens in each dialogue when it is played alone, without a pause."""
    with pytest.MonkeyPatch.context() as patch:
        stop_often(chat, patch)
        dialogues, env = play(policy, chat, decode_batch_size=1, max_concurrency=1)
    lengths = {len(c.token_ids) for d in dialogues for turn in d.turns for c in turn.candidates}
    assert len(lengths) > 6 and all(len(d.turns) == TURNS and d.dropped is None for d in dialogues)
    assert len({turn.chosen for d in dialogues for turn in d.turns}) == N
    assert sum(env.counts[name] for name in ("kv_evictions", "dialogues_ended_early", "candidates_unjudged")) == 0
    return [what(dialogue) for dialogue in dialogues]


# ------------------------------------------------------------------------------------------------ latencies and batches


@pytest.mark.parametrize(("decode_batch_size", "max_concurrency"), [(64, 64), (2, 3), (3, 1)])
@pytest.mark.parametrize("reply_steps", [0, 5])
def test_latencies_do_not_matter(policy, chat, plain, reply_steps, decode_batch_size, max_concurrency):
    """Guards reproducibility: however long user and judge take, the same seed samples the same dialogues.

    With reply_steps, who decodes beside whom is the same too, and so is the last bit of every log-prob. And all that
    was fed once is kept: the chosen candidate's keys and values are those that go on.
    """
    runs, before = [], [turn for _, _, turns in plain for turn in turns[:-1]]
    fed = sum(len(prompt) + len(scores[chosen][0]) - 1 for _, prompt, chosen, scores, _ in before)
    for _ in range(2):
        user, judge = (Endpoint(answer, (0.0, 0.0, 0.0, 0.005, 0.05)) for answer in (say, verdict))
        dialogues, env = play(
            policy, chat, user=user, judge=judge, reply_steps=reply_steps, decode_batch_size=decode_batch_size,
            max_concurrency=max_concurrency,
        )  # fmt: skip
        assert [what(dialogue) for dialogue in dialogues] == plain
        assert (env.counts["tokens_kept"], env.counts["kv_evictions"]) == (fed, 0)
        assert env.counts["tokens_prefilled"] == sum(len(p) for _, _, turns in plain for _, p, *_ in turns) - fed
        runs.append([what(dialogue, logprobs=True) for dialogue in dialogues])
    assert reply_steps == 0 or runs[0] == runs[1]


@pytest.mark.parametrize("reply_steps", [0, 5])
def test_a_small_budget_does_not_matter(policy, chat, plain, samplers, reply_steps):
    """Guards --kv-gib: with memory for one dialogue, rows are lost while user and judge take their time, also before
    the best candidate is known; the dialogues are the same."""
    slots = max(len(prompt) for _, _, turns in plain for _, prompt, *_ in turns) + N * 12
    judge = Endpoint(verdict, (0.0, 0.02))
    budget = slots * slot_bytes(policy)
    dialogues, env = play(policy, chat, judge=judge, reply_steps=reply_steps, kv_gib=budget / 2**30)
    assert [what(dialogue) for dialogue in dialogues] == plain
    assert env.counts["kv_evictions"] > 0 and math.prod(samplers[0].cache.shape) * slot_bytes(policy) <= budget


def slot_bytes(policy: Qwen2ForCausalLM) -> int:
    """Bytes of one slot of the KV cache, in fp32."""
    config = policy.config
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4


def test_an_impossible_budget_is_one_line(policy, chat):
    """Guards an endless wait: memory that not even one first turn fits in is refused with the flags to change."""
    with pytest.raises(ValueError, match="--kv-gib.*--max-new-tokens") as error:
        play(policy, chat, kv_gib=1e-5)
    assert "\n" not in str(error.value)


def test_batches_are_bounded_and_rows_given_back(policy, chat, plain, samplers, monkeypatch):
    """Guards --decode-batch-size, and keys and values of finished dialogues that would fill the cache for ever."""
    most, step = [], Sampler.step

    def noted(self):
        most.append(self.running)
        return step(self)

    monkeypatch.setattr(Sampler, "step", noted)
    for batch in (1, 2, 4):
        most.clear()
        dialogues, _ = play(policy, chat, decode_batch_size=batch)
        assert [what(dialogue) for dialogue in dialogues] == plain
        assert max(most) == N * batch
        assert samplers[-1].rows and not any(samplers[-1].rows)


def test_turns_join_together(policy, chat, monkeypatch):
    """Guards the cost of prefills: those that are ready within a few steps of one another share one, and only start
    sooner where nobody decodes."""
    prefills, prefill = [], Sampler.prefill
    monkeypatch.setattr(Sampler, "prefill", lambda self: (prefills.append(len(self.draws)), prefill(self))[1])
    found, played = [], []
    for every in (1, 8):
        prefills.clear()
        monkeypatch.setattr(scheduler, "JOIN_EVERY", every)
        dialogues, _ = play(policy, chat, reply_steps=3, size=8, max_new_tokens=40)
        played.append([what(dialogue) for dialogue in dialogues])
        found.append(len(prefills))
    assert played[0] == played[1] and found[1] < found[0] <= 8 * TURNS, found


# ------------------------------------------------------------------------------------------------------------- overlap


@pytest.mark.parametrize("reply_steps", [0, 5])
def test_early_candidates_are_judged_while_late_ones_decode(policy, chat, monkeypatch, reply_steps):
    """Guards the overlap: the judge has the first request before the turn's last candidate has ended.

    The judge answers only after a further decode step: a rollout that waited for it would never come to that.
    """
    asked, decoded, waits, step = threading.Event(), threading.Event(), [], Sampler.step

    def patient(seed: int) -> str:
        asked.set()
        waits.append(decoded.wait(1000))
        return verdict(seed)

    def watched(self):
        if self.draws and len(self.draws) < N:  # the turn's first has ended
            assert asked.wait(1000)
        late = asked.is_set() and bool(self.draws)
        ended = step(self)
        if late:
            decoded.set()
        return ended

    monkeypatch.setattr(Sampler, "step", watched)
    dialogues, _ = play(policy, chat, judge=Endpoint(patient), size=1, reply_steps=reply_steps)
    lengths = sorted(len(c.token_ids) for c in dialogues[0].turns[0].candidates)
    assert lengths[0] < lengths[-1] - 1 and all(waits) and len(waits) == N * TURNS


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_nothing_is_chosen_before_all_are_scored(policy, chat, plain, monkeypatch, order):
    """Guards the choice: in whatever order verdicts arrive, the best of all candidates is adopted, once, at the end."""
    places = {
        seed: (d, turn, order.index(c)) for d in range(SIZE) for turn in range(1, TURNS + 1)
        for c, seed in enumerate(seeds_of("judge", d, turn))
    }  # fmt: skip
    taken, condition, adopted = Counter(), threading.Condition(), []
    note_scored, adopt = Scheduler.note_scored, Sampler.adopt

    def in_order(seed: int) -> str:
        d, turn, place = places[seed]
        with condition:  # until those before it have not only answered, but been taken note of
            assert condition.wait_for(lambda: taken[d, turn] == place, 60)
        return verdict(seed)

    def noted(self, key):
        turn = sum(d == key for d, _ in adopted) + 1
        with condition:
            taken[key, turn] += 1
            condition.notify_all()
        note_scored(self, key)
        assert ((key, turn) in adopted) == (taken[key, turn] == N)

    def watched(self, key, candidate):
        turn = sum(d == key for d, _ in adopted) + 1
        assert taken[key, turn] == N
        adopted.append((key, turn))
        adopt(self, key, candidate)

    monkeypatch.setattr(Scheduler, "note_scored", noted)
    monkeypatch.setattr(Sampler, "adopt", watched)
    dialogues, _ = play(policy, chat, judge=Endpoint(in_order))
    assert [what(dialogue) for dialogue in dialogues] == plain
    assert len(adopted) == len(set(adopted)) == SIZE * TURNS
    for dialogue in dialogues:
        for turn in dialogue.turns:
            found = [c.reward for c in turn.candidates]
            assert turn.chosen == found.index(max(found))


# -------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("reply_steps", [0, 5])
def test_a_lost_user_or_judge_drops_its_dialogue_only(policy, chat, plain, samplers, reply_steps):
    """Guards the others: a user lost in turn 2 and a judge lost for a whole turn end one dialogue each, with reason.

    A judge lost for one candidate costs that candidate alone.
    """
    lost_user, lost_turn = seeds_of("user", 1, 2), seeds_of("judge", 2, 2)
    chosen = plain[3][2][2][2]  # dialogue 3, last turn
    lost_candidate = (chosen + 1) % N
    lost = {*lost_turn, seeds_of("judge", 3, TURNS)[lost_candidate]}
    user = Endpoint(lambda seed: ChatError("timeout", "gone") if seed in lost_user else say(seed))
    judge = Endpoint(lambda seed: ChatError("http_5xx", "gone") if seed in lost else verdict(seed))
    dialogues, env = play(policy, chat, user=user, judge=judge, reply_steps=reply_steps)
    reasons = [None, "simulator: timeout", "judge: no verdict on any candidate", None, None]
    assert [d.dropped for d in dialogues] == reasons
    assert [len(d.turns) for d in dialogues] == [TURNS, 1, 2, TURNS, TURNS]
    assert what(dialogues[0]) == plain[0] and what(dialogues[4]) == plain[4]
    assert what(dialogues[1])[2] == plain[1][2][:1]
    turn = dialogues[3].turns[-1]
    assert [c.judged for c in turn.candidates] == [c != lost_candidate for c in range(N)] and turn.chosen == chosen
    assert env.counts["candidates_unjudged"] == N + 1
    assert not any(samplers[0].rows)


@pytest.mark.parametrize("reply_steps", [0, 5])
def test_a_dialogue_that_outgrows_the_model_ends_early(policy, chat, plain, samplers, monkeypatch, reply_steps):
    """Guards positions that the model was never trained on: the turn that does not fit is not begun, and counted."""
    sizes = [[len(prompt) + 12 for _, prompt, *_ in turns] for _, _, turns in plain]
    last = sorted(size[-1] for size in sizes)
    assert last[0] < last[2] and max(size[1] for size in sizes) <= last[2]
    monkeypatch.setattr(policy, "config", replace(policy.config, max_position_embeddings=last[2]))
    dialogues, env = play(policy, chat, reply_steps=reply_steps)
    expected = [what[:2] + [what[2][: sum(size <= last[2] for size in row)]]
                for what, row in zip(plain, sizes, strict=True)]  # fmt: skip
    assert [what(dialogue) for dialogue in dialogues] == expected
    assert env.counts["dialogues_ended_early"] == sum(size[-1] > last[2] for size in sizes) > 0
    assert all(dialogue.dropped is None for dialogue in dialogues) and not any(samplers[0].rows)
    monkeypatch.setattr(policy, "config", replace(policy.config, max_position_embeddings=sizes[0][0] - 1))
    words = f"needs {sizes[0][0]} positions.*--max-new-tokens.*--max-user-tokens"
    with pytest.raises(ValueError, match=words) as error:
        play(policy, chat, reply_steps=reply_steps)
    assert "\n" not in str(error.value)


def test_a_dialogue_that_outgrows_the_budget_ends_early(policy, chat, plain, samplers):
    """Guards a long run: a dialogue that grows too long for --kv-gib ends alone, as one without positions does."""
    slots = [[len(prompt) + N * 12 for _, prompt, *_ in turns] for _, _, turns in plain]
    room = sorted(row[-1] for row in slots)[2]
    assert min(row[-1] for row in slots) < room and max(row[1] for row in slots) <= room
    per_slot = slot_bytes(policy)
    dialogues, env = play(policy, chat, kv_gib=room * per_slot / 2**30)
    expected = [what[:2] + [what[2][: sum(size <= room for size in row)]]
                for what, row in zip(plain, slots, strict=True)]  # fmt: skip
    assert [what(dialogue) for dialogue in dialogues] == expected
    assert env.counts["dialogues_ended_early"] == sum(row[-1] > room for row in slots) > 0
    assert math.prod(samplers[0].cache.shape) <= room
    with pytest.raises(ValueError, match="raise --kv-gib, or lower --max-new-tokens"):
        play(policy, chat, kv_gib=(slots[0][0] - 1) * per_slot / 2**30)


def broken(seed: int) -> str:
    raise RuntimeError("a bug in a thread")


@pytest.mark.parametrize("reply_steps", [0, 5])
@pytest.mark.parametrize("who", ["user", "judge", "sampler"])
def test_exceptions_end_the_rollout(policy, chat, monkeypatch, who, reply_steps):
    """Guards a hang, and a bug that passes for a lost reply: what a thread raised reaches the caller, and no
    thread stays."""
    slow = Endpoint(say, (0.0, 0.02))
    if who == "sampler":
        monkeypatch.setattr(Sampler, "adopt", lambda *_: broken(0))
    user, judge = (Endpoint(broken) if who == name else slow for name in ("user", "judge"))
    judge = Endpoint(verdict) if who != "judge" else judge
    with pytest.raises(RuntimeError, match="a bug in a thread"):
        play(policy, chat, user=user, judge=judge, reply_steps=reply_steps, first_user_message="", max_concurrency=2)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("reply")]


def test_no_dialogue_is_no_rollout(policy, chat, samplers):
    """Guards a rank without dialogues: an empty batch makes no sampler, whose batch would be of size 0."""
    assert play(policy, chat, size=0)[0] == [] and samplers == []


# ------------------------------------------------------------------------------------------------------------- replies


class Decoding:
    """Stands in for a sampler that decodes for so many steps, and in which no candidate ever ends."""

    def __init__(self, steps: int):
        self.running = steps

    def step(self) -> list:
        self.running = max(0, self.running - 1)
        return []


def ask_in_turn(scheduler: Scheduler, taken: list, *calls: Callable) -> Waits:
    """Play a dialogue that makes one call after another, and note when it was resumed with which reply."""
    for call in calls:
        reply = yield Ask(call)
        taken.append((scheduler.clock, reply))


def test_reply_steps_of_its_own_choice():
    """Guards the default: bit for bit with the embedded user, as they come with endpoints of any other kind."""
    def steps(**settings) -> int:
        return Scheduler(Decoding(0), Config(ckpt="x", **settings), Environment(None, None)).steps

    url = "http://127.0.0.1:9"
    assert (steps(), steps(simulator_url=url), steps(judge_url=url)) == (16, 0, 0)
    assert (steps(reply_steps=0), steps(reply_steps=3, simulator_url=url)) == (0, 3)


def test_replies_wait_for_their_step():
    """Guards --reply-steps: in the order of requests, neither before their step, however fast, nor after it."""
    slow, taken = threading.Event(), []
    scheduler = Scheduler(Decoding(7), Config(ckpt="x", reply_steps=5), Environment(None, None))
    threading.Timer(0.1, slow.set).start()
    one = ask_in_turn(scheduler, taken, lambda: slow.wait(1000) and "a", lambda: "b")
    other = ask_in_turn(scheduler, taken, lambda: "c")
    scheduler.run([one, other])
    assert taken == [(5, "a"), (5, "c"), (10, "b")]  # from step 7 on nothing decodes: the clock is put on


def test_replies_as_they_come():
    """Guards --reply-steps 0 against one slow reply that holds up all others; when idle, it waits for the next one."""
    slow, taken = threading.Event(), []
    scheduler = Scheduler(Decoding(0), Config(ckpt="x", reply_steps=0), Environment(None, None))
    one = ask_in_turn(scheduler, taken, lambda: slow.wait(1000) and "slow")
    other = ask_in_turn(scheduler, taken, lambda: "fast", lambda: slow.set())
    scheduler.run([one, other])
    assert [reply for _, reply in taken if reply] == ["fast", "slow"]
