"""How a run ends before its last iteration: a signal has come, or user and judge stay away."""

from __future__ import annotations

import signal
from collections import Counter

from command_line.flags import ASKED, resume_command
from config import Config, flag
from dialogue import Dialogue
from learners.processes import gather
from records.log import RunLog
from records.metrics import sum_counters
from records.state import State, checkpoint_name, save_checkpoint
from simulator import Environment
from untrusted.plain_text import say


class Stopped(Exception):
    """A signal has ended a rollout, on all ranks alike; its number is the argument."""


class Unavailable(RuntimeError):
    """User or judge are away, or lost too many dialogues. Raised on all ranks at once; the run can go on later."""


def check_batch(dialogues: list[Dialogue], config: Config, env: Environment) -> str:
    """Return what speaks against a batch, the same on all ranks; "" if enough of its dialogues survived.

    Raises Unavailable, on all ranks, if an endpoint was out of reach for longer than --outage-budget.
    """
    clients = {"simulator_url": env.user, "judge_url": env.judge}
    outages = [f"{flag(name)}: {client.outage}" for name, client in clients.items() if client and client.outage]
    parts = gather((len(dialogues), Counter(d.dropped for d in dialogues if d.dropped), outages))
    for outage in (outage for _, _, found in parts for outage in found):
        raise Unavailable(f"{outage} (--outage-budget)")
    size, lost = sum(n for n, _, _ in parts), sum_counters([causes for _, causes, _ in parts])
    if size - lost.total() >= config.quorum * size:
        return ""
    causes = ", ".join(f"{cause} {n}" for cause, n in lost.most_common())
    return f"{lost.total()} of {size} dialogues were lost ({causes}); --quorum {config.quorum:g} wants more"


def save_and_stop(end: Stopped | Unavailable, state: State, log: RunLog | None) -> int:
    """Save the state unless that has been done; returns the exit code after a signal, or raises Unavailable again."""
    if state.saved != checkpoint_name(state):
        save_checkpoint(state)
    if log:
        log.close()
    asked = {name: value for name in ASKED if (value := getattr(state.config, name))}
    hint = f"saved after iteration {state.iteration}; go on with: {resume_command(state.config.run_dir, asked)}"
    if isinstance(end, Unavailable):
        raise Unavailable(f"{end}; {hint}") from None
    if log:
        say(hint)
    return 0 if end.args[0] == signal.SIGTERM else 128 + end.args[0]
