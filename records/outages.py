"""How a run ends before its last iteration: a signal has come, or user and judge do not answer."""

from __future__ import annotations

import signal
from collections import Counter

from command_line.flags import ASKED, resume_command
from config import Config
from dialogue import Dialogue
from endpoints.client import ChatClient
from endpoints.wire import URL_FLAGS
from learners.processes import AgreedError, gather
from records.log import RunLog
from records.metrics import sum_counters
from records.state import State, checkpoint_name, save_checkpoint
from simulator import Environment
from untrusted.plain_text import clean_text, say


class Stopped(Exception):
    """A signal has ended a rollout, on all ranks alike; its number is the argument."""


class Unavailable(RuntimeError):
    """User or judge are away, or lost too many dialogues. Raised on all ranks at once; the run can go on later."""


def check_refusals(env: Environment, verdicts: bool = True) -> None:
    """Raise AgreedError, on all ranks, if user or judge is alive but has refused every call of every rank so far,
    or, where `verdicts` are wanted, if the judge has answered, and never with one.

    Nobody need come back later: an address, a model, a key or a server must be changed.
    """
    for client in clients_of(env).values():
        reports = gather((client.useful if verdicts else client.answered, client.refusal))
        refusals = [refusal for _, refusal in reports if refusal]
        if refusals and not any(useful for useful, _ in reports):
            raise AgreedError(refusals[0])


def check_batch(dialogues: list[Dialogue], config: Config, env: Environment) -> str:
    """Return what speaks against a batch, the same on all ranks; "" if enough of its dialogues survived.

    Raises, on all ranks, Unavailable if an endpoint was out of reach for longer than --outage-budget, and AgreedError
    if one has refused everything.
    """
    check_refusals(env, verdicts=False)
    clients = clients_of(env)
    outages = [f"{URL_FLAGS[name]}: {client.outage}" for name, client in clients.items() if client.outage]
    failures = {name: client.complaint for name, client in clients.items() if client.last_failure}
    lost = Counter(d.dropped for d in dialogues if d.dropped)
    unjudged = sum(not c.judged for d in dialogues for turn in d.turns for c in turn.candidates)
    parts = gather((len(dialogues), lost, unjudged, outages, failures))
    for outage in (outage for *_, found, _ in parts for outage in found):
        raise Unavailable(f"{outage} (--outage-budget)")
    size, lost, unjudged = sum(n for n, *_ in parts), sum_counters([p[1] for p in parts]), sum(p[2] for p in parts)
    if size - lost.total() >= config.quorum * size:
        return ""
    check_refusals(env)
    causes = ", ".join(f"{cause} {n}" for cause, n in lost.most_common())
    worst = lost.most_common(1)[0][0].partition(":")[0]  # whose last words are told
    last = next((f"; {found[worst]}" for *_, found in parts if worst in found), "")
    last = (f"; {unjudged} candidates got no verdict" if worst == "judge" else "") + last
    return f"{lost.total()} of {size} dialogues were lost ({causes}); --quorum {config.quorum:g} wants more{last}"


def clients_of(env: Environment) -> dict[str, ChatClient]:
    """Return the clients of user and, if it is an endpoint, judge by their names."""
    return {client.name: client for client in (env.user, env.judge) if client}


def save_and_stop(end: Stopped | Unavailable, state: State, log: RunLog | None) -> int:
    """Save the state unless that has been done; returns the exit code after a signal, or raises Unavailable again."""
    if state.saved != checkpoint_name(state):
        save_checkpoint(state)
    if log:
        log.close()
    asked = {name: value for name in ASKED if (value := getattr(state.config, name))}
    hint = f"saved after iteration {state.iteration}; go on with: {resume_command(state.config.run_dir, asked)}"
    if (kept := state.config.save) != "run":
        hint = f"ended after iteration {state.iteration}; it cannot go on, because --save {kept} was given"
    if isinstance(end, Unavailable):
        raise Unavailable(f"{end}; {hint}") from None
    if log:
        say(clean_text(hint))
    return 0 if end.args[0] == signal.SIGTERM else 128 + end.args[0]
