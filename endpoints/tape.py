"""A tape: a file of calls, to record a run with an endpoint and to replay it without."""

from __future__ import annotations

import fcntl
import hashlib
import json
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from endpoints.wire import Call, ChatError, ChatReply
from untrusted.files import check_value, parse_json, read_lines
from untrusted.plain_text import shorten

START = b'{"endpoint": "'  # of every line, and so of the file: the mark by which a file is a tape, and ours to write to
MAX_LINE = 8 << 20  # bytes of a call: a reply of 256 KiB, each character of which may take six bytes, and its errors
CALL = {"endpoint": str, "request": str, "seed": int | None, "failed": list[str], "check": int}  # fields of each line
REPLY = {"text": str, "prompt_tokens": int | None, "completion_tokens": int | None}
NOTES = ("cut", "thoughts", "ran_on")  # attributes of a reply that are written where they are true
FAILURE = {"error": str, "message": str}


class Tape:
    """A file of calls. With it, a run with a paid or random endpoint can be repeated bit for bit without the endpoint.

    The file is JSONL with one call per line: the endpoint's name, a hash of that name and of all that was sent (model,
    messages, seed, temperature, max_tokens), the seed, and the outcome: text and usage, or the error. It holds no keys.

    A request has one reply. While `recording`, a request that is on file is not sent again, neither in the same run nor
    when a killed run is resumed with its file; calls that failed in an earlier run are made again. When replaying, a
    request that is not on file is a ValueError. `note` says how many calls the file held, and whether its last line was
    cut short and left out. Several processes may record into one file.

    Raises ValueError for a file that cannot be used, and for a damaged line.
    """

    def __init__(self, path: str | Path, recording: bool):
        self.path, self.recording = Path(path), recording
        self._calls: dict[str, Call] = {}
        self._lock = threading.Lock()
        flag = "--record" if recording else "--replay"
        if self.path.exists() and not self.path.is_file():  # a pipe would be waited for
            raise ValueError(f"{flag} {path} cannot be opened: it is not a plain file")
        try:
            self._file = self.path.open("ab" if recording else "rb", buffering=0)
        except OSError as error:
            raise ValueError(f"{flag} {path} cannot be opened: {error.strerror}") from None
        with self._alone():
            cut = self._load()
        held = f"{len(self._calls):,} recorded calls"
        self.note = f"{path}: {held}{', which are not made again' if recording and self._calls else ''}{cut}"

    def find(self, endpoint: str, request: dict[str, Any]) -> Call | None:
        """Return the call on file, None if it is to be made; ValueError for an unknown request when replaying."""
        call = self._calls.get(_fingerprint(endpoint, request))
        if call is None and not self.recording:
            start = shorten(request["messages"][-1]["content"])
            raise ValueError(f"--replay {self.path} holds no reply of {endpoint or 'the endpoint'} to the request "
                             f"{start!r} (model {request['model']!r}, seed {request.get('seed')}); a replay needs the "
                             "flags, checkpoint and personas of the recording, and --reply-steps of 1 or more in both")
        return call

    def keep(self, endpoint: str, request: dict[str, Any], call: Call) -> Call:
        """Write a call to the file; return the call that counts: the first one, if another thread was faster."""
        key = _fingerprint(endpoint, request)
        with self._lock:
            if key not in self._calls:
                self._calls[key] = call
                line = _write_call(endpoint, key, request.get("seed"), call)
                try:
                    with self._alone():
                        while line:  # a disk that fills up takes a part
                            line = line[self._file.write(line) :]
                except OSError as error:
                    raise ValueError(f"--record {self.path} cannot be written: {error.strerror}; make room, and go on"
                                     " with the same file") from None
        return self._calls[key]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes out of the file."""
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def _load(self) -> str:
        """Read all calls (later lines win); drop a last line that a kill cut short, and return a note about it."""
        size = 0
        for number, line in enumerate(read_lines(self.path, MAX_LINE), start=1):
            if number == 1 and line[: len(START)] != START[: len(line)]:  # a tape that was cut short begins so, too
                raise ValueError(f"{'--record' if self.recording else '--replay'} {self.path} is not a recording: its"
                                 f" first line does not begin with {START.decode()}; choose another file")
            if not line.endswith(b"\n"):
                if self.recording:
                    self._file.truncate(size)
                return f"; line {number}, the last one, was cut short and is left out"
            size += len(line)
            key, call = _read_call(line, f"{self.path}, line {number}")
            if not (self.recording and isinstance(call.reply, ChatError)):
                self._calls[key] = call
        return ""


def _fingerprint(endpoint: str, request: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([endpoint, request], sort_keys=True).encode()).hexdigest()[:32]


def _write_call(endpoint: str, key: str, seed: int | None, call: Call) -> bytes:
    """Write a call as one line that ends with its own checksum."""
    reply = call.reply
    line: dict[str, Any] = {"endpoint": endpoint, "request": key, "seed": seed, "failed": call.failed}
    if isinstance(reply, ChatError):
        line |= {"error": reply.reason, "message": str(reply).removeprefix(f"{reply.reason}: ")}
    else:
        line |= {"text": str(reply), "prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.tokens}
        line |= {what: True for what in NOTES if getattr(reply, what)}
    return json.dumps(line | {"check": zlib.crc32(json.dumps(line).encode())}).encode() + b"\n"


def _read_call(line: bytes, where: str) -> tuple[str, Call]:
    """Read what `_write_call` wrote; ValueError that begins with `where` for anything else."""
    try:
        found = parse_json(line, "it")
        check_value(found, dict, "it")
        notes = {what: bool for what in NOTES if what in found}
        check_value(found, CALL | (FAILURE if "error" in found else REPLY | notes), "it")
        if found.pop("check") != zlib.crc32(json.dumps(found).encode()):
            raise ValueError("its checksum is wrong")
    except ValueError as error:
        raise ValueError(f"{where}: damaged, or not a recorded call ({shorten(str(error), 200)}); "
                         "remove the line to lose that call alone") from None
    if "error" in found:
        return found["request"], Call(ChatError(found["error"], found["message"]), tuple(found["failed"]))
    reply = ChatReply(found["text"])
    reply.tokens, reply.prompt_tokens = found["completion_tokens"], found["prompt_tokens"]
    reply.cut, reply.thoughts, reply.ran_on = (found.get(what, False) for what in NOTES)
    return found["request"], Call(reply, tuple(found["failed"]))
