"""Talk to a checkpoint in the terminal, or serve it as an OpenAI-compatible endpoint.

    python -m chat --ckpt FOLDER                         what it has inferred of you stands beside each reply
    python -m chat --ckpt FOLDER --serve --port 8200     POST /v1/chat/completions, GET /v1/models

Both sample with the trainer's sampler; keys and values are kept from turn to turn. In the terminal, `/profile` shows
what the policy believes of you, `/forget TRAIT` takes it out of the history that the policy sees and keeps it out, and
`/reset` drops everything. docs/endpoints.md says what the endpoint takes and gives.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from chat.service import HOT, Service, is_temperature, serve
from chat.talk import Talk
from command_line import exits
from command_line.flags import TINY_CHECKPOINT, add_flags, checkpoint_defaults
from config import Config
from endpoints.client import read_key
from endpoints.server import make_server
from evaluation.subjects import load_checkpoint
from learners.folder import resolve_checkpoint
from untrusted.plain_text import say
from worlds import ledger

HELP = """\
/profile        what the policy has inferred of you, and since which turn
/forget TRAIT   take the lines with these words out of all profiles, and keep them out until /reset
/reset          drop the whole dialogue, and what was forgotten
/help           this text
/quit           end; so does the end of the input
Marks: + new, ~ changed, - no longer there."""
PASSED = (  # flags that are the trainer's; their help stands in config.py
    "max_new_tokens", "history_profile", "decode_batch_size", "kv_gib", "dtype", "kernels", "threads", "seed",
)  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# Terminal


def marked(before: Sequence[str], now: Sequence[str]) -> list[str]:
    """Mark what is new (+), changed (~, another value in a slot that had one) and gone (-) in a profile.

    >>> marked(["Age: 34", "Location: Oslo"], ["Age: 35", "Interests: chess"])
    ['~ Age: 35 (was 34)', '+ Interests: chess', '- Location: Oslo']
    """
    gone = [line for line in before if line not in now]
    lines = []
    for line in now:
        slot = ledger.split_fact(line)[0]
        old = next((g for g in gone if slot and ledger.split_fact(g)[0] == slot), None)
        if line in before:
            lines.append(f"  {line}")
        elif old is None:
            lines.append(f"+ {line}")
        else:
            gone.remove(old)
            lines.append(f"~ {line} (was {ledger.split_fact(old)[1]})")
    return lines + [f"- {line}" for line in gone]


def show_turn(talk: Talk, columns: int) -> str:
    """Write the newest turn: the profile beside the reply, or above it in fewer than 80 columns."""
    reply = talk.turns[-1].winner
    before = talk.profile(-2) if len(talk.turns) > 1 else []
    profile = marked(before, talk.profile()) or ["  (nothing yet)"]
    if reply.failure:
        profile = [f"  (no readable profile in this turn: {reply.failure})"]
    if columns < 80:
        return "\n".join([*profile, "", reply.response, ""])
    left = columns // 3
    profile = [part for line in profile for part in textwrap.wrap(line, left - 3, subsequent_indent="    ")]
    said = [part for line in reply.response.split("\n") for part in textwrap.wrap(line, columns - left) or [""]]
    rows = itertools.zip_longest(profile, said, fillvalue="")
    return "\n".join(f"{a:{left - 2}}| {b}" for a, b in rows) + "\n"


def show_profile(talk: Talk) -> str:
    """Write the profile in force, since when each line has stood in it, and what must stay out."""
    profiles = [talk.profile(t) for t in range(len(talk.turns))]
    lines = []
    for line in talk.profile():
        absent = [t for t, profile in enumerate(profiles, 1) if line not in profile]
        lines.append(f"  {line}   (since turn {max(absent, default=0) + 1})")
    lines = lines or ["  (nothing yet)"]
    return "\n".join(lines + [f"  forgotten until /reset: {trait}" for trait in talk.forgotten])


def forget(talk: Talk, trait: str) -> str:
    """Forget a trait, and say what that did and what it did not do."""
    if not ledger.words(trait):
        return "/forget takes words of a trait, for example /forget Age, or /forget chess"
    struck = talk.forget(trait)
    values = [trait, *(ledger.split_fact(line)[1] for line in struck)]
    said = sum(any(ledger.contains_phrase(text, value) for value in values) for _, text in talk.dialogue.history())
    lines = [f"  struck: {line}" for line in struck] or ["  no profile has such a line"]
    lines += [f'  Profile lines with "{trait}" stay out until /reset.']
    lines += [f"  Messages and replies stay as they are, and the policy still reads them: {said} mention it."]
    return "\n".join(lines + ["  /reset drops them too."] * bool(said))


def respond(talk: Talk, line: str, columns: int) -> str | None:
    """Return what to print after a line of input; None ends the talk."""
    command, _, rest = line.strip().partition(" ")
    match command:
        case "":
            return ""
        case "/quit":
            return None
        case "/help":
            return HELP
        case "/profile":
            return show_profile(talk)
        case "/forget":
            return forget(talk, rest.strip())
        case "/reset":
            talk.reset()
            return "  The dialogue is dropped; the policy knows nothing of it."
        case _ if command.startswith("/"):
            return f"  There is no {command}; /help lists the commands."
    try:
        talk.reply(line.strip())
    except ValueError as error:
        return f"  {error}"
    return show_turn(talk, columns)


def converse(talk: Talk) -> None:
    """Talk until /quit, the end of the input or Ctrl-C; beside a terminal, input may come from a pipe.

    In a terminal, Ctrl-C while the policy writes stops its reply alone.
    """
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        import readline  # noqa: F401  (gives `input` line editing and a history)

        say("Say something; /help lists the commands.")
    sys.stdin.reconfigure(errors="replace")
    while (line := next_line(terminal)) is not None:
        try:
            answer = respond(talk, line, shutil.get_terminal_size().columns if terminal else 0)
        except KeyboardInterrupt:
            if not terminal:
                raise
            answer = "\n  Stopped: the dialogue goes on without that message. Ctrl-C once more ends it."
        if answer is None:
            break
        say(answer)


def next_line(terminal: bool) -> str | None:
    """Read a line; None at the end of the input, and in a terminal at Ctrl-C."""
    try:
        return input("you> " if terminal else "")
    except EOFError:
        return None
    except KeyboardInterrupt:
        if not terminal:
            raise
        say("")
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; ValueError if anything is amiss."""
    parser = exits.Parser("python -m chat", __doc__)
    tiny = str(TINY_CHECKPOINT)
    parser.add_argument("--ckpt", nargs="?", const=tiny, required=True, help="folder or hub id; bare: the tiny one")
    parser.add_argument("--adapter", default="", help="LoRA folder on --ckpt, as a run with --lora-rank saves it")
    parser.add_argument("--temperature", type=float, default=0.0, help="divides the logits; 0 is greedy [0]")
    parser.add_argument("--serve", action="store_true", help="be an OpenAI-compatible endpoint")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at; any but loopback needs a key")
    parser.add_argument("--port", type=int, default=8200, help="port to serve at; 0 takes a free one [8200]")
    parser.add_argument("--api-key-env", default="", help="environment variable with the key that clients must send")
    add_flags(parser, Config, PASSED)  # absent if not given, so that a checkpoint's own setting holds
    args = parser.parse_args(argv)
    if not is_temperature(args.temperature):
        raise ValueError(f"--temperature {args.temperature} must be 0 or lie in {HOT}")
    return args


def run(argv: Sequence[str] | None) -> None:
    """Talk or serve, as the command line says."""
    args = parse_args(argv)
    key = read_key(args.api_key_env or None)
    folder = resolve_checkpoint(args.ckpt)
    model = Path(folder).resolve().name
    server = make_server(args.host, args.port, models=[model], key=key) if args.serve else None  # before the slow load
    given = {name: value for name, value in vars(args).items() if name in PASSED}
    config = Config(**{**checkpoint_defaults(folder), **given})
    policy, chat = load_checkpoint(folder, config, args.adapter)
    if server is not None:
        serve(server, Service(policy, chat, config, model, args.temperature))
    else:
        converse(Talk(policy, chat, config, args.temperature))


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code (command_line/exits.py)."""
    return exits.run("chat", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
