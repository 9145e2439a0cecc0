"""When a request may be sent: a circuit breaker per endpoint, and a quota of requests and tokens; no HTTP in here."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

BACKOFF_FIRST, BACKOFF_CAP = 0.25, 8.0  # seconds: 0.25, 0.5, 1, … 8, times a jitter of 0.5 to 1
_jitter = random.Random()  # its own, so that no retry disturbs a seeded global generator


def backoff(failures: int) -> float:
    """Return the seconds to wait after so many failures in a row, from 0: doubled each time, capped, with jitter."""
    return min(BACKOFF_CAP, BACKOFF_FIRST * 2 ** min(failures, 30)) * _jitter.uniform(0.5, 1.0)


class Breaker:
    """Whether an endpoint answers, for all threads that ask it (M. Nygard, "Release It!", 2007: circuit breaker).

    While it is closed, requests are sent. `threshold` failures in a row open it, or one failure that asks for patience
    (Retry-After). While it is open, one probe at a time is sent, after pauses that grow (`backoff`), until one is
    answered.
    """

    def __init__(self, threshold: int, clock: Callable[[], float] = time.monotonic):
        self.threshold, self.clock = threshold, clock
        self.is_open = False
        self.failing_since = self.answered_at = self._probe_at = clock()  # the first of the failures in a row
        self._failures = self._probes = 0  # in a row; failed since it opened
        self._probing = False
        self._lock = threading.Lock()

    def answered(self) -> bool:
        """Note an answer: requests may go out again. Returns True if this has closed the breaker."""
        with self._lock:
            was_open = self.is_open
            self.answered_at = self.clock()
            self._failures = self._probes = 0
            self.is_open = self._probing = False
            return was_open

    def failed(self, patience: float = 0.0, probe: bool = False, trip: bool = False) -> bool:
        """Note a failure after which nothing shall be sent for `patience` seconds; `trip` opens at once.

        Only a probe's failure makes the pause longer. Returns True if this failure has opened the breaker.
        """
        with self._lock:
            now = self.clock()
            if not self._failures:
                self.failing_since = now
            self._failures += 1
            opens = not self.is_open and (trip or patience > 0 or self._failures >= self.threshold)
            if opens or probe and self.is_open:
                self._probes = 0 if opens else self._probes + 1
                self._probe_at = now + max(patience, backoff(self._probes))
                self.is_open, self._probing = True, False
            return opens

    def claim_probe(self) -> bool:
        """Return whether a probe is due; the caller must then send it."""
        with self._lock:
            due = self.is_open and not self._probing and self.clock() >= self._probe_at
            self._probing |= due
            return due


class Quota:
    """A limit of requests and tokens in any 60 seconds, for all clients that share it; 0: no limit.

    Each is a bucket that fills at 1/61 of the limit per second and holds what one second brings, so that the burst and
    a minute's flow together keep to the limit. A call that takes more than the bucket holds must wait until that has
    flowed in. Tokens may exceed their limit by those of one request.
    """

    def __init__(self, requests: float = 0.0, tokens: float = 0.0, clock: Callable[[], float] = time.monotonic):
        self.rates = [requests / 61, tokens / 61]  # per second
        self.clock, self._lock = clock, threading.Lock()
        self._levels, self._at = [max(1.0, self.rates[0]), self.rates[1]], clock()

    def take(self, tokens: float, requests: int = 1) -> float:
        """Take a request and the tokens it may cost; return the seconds to wait before it is sent.

        Once the cost is known, take the difference with `requests=0`; a negative one is given back.
        """
        with self._lock:
            now = self.clock()
            waits = [0.0]
            for i, (amount, hold) in enumerate(((requests, max(1.0, self.rates[0])), (tokens, self.rates[1]))):
                if self.rates[i]:
                    self._levels[i] = min(hold, self._levels[i] + (now - self._at) * self.rates[i]) - amount
                    waits.append(-self._levels[i] / self.rates[i])
            self._at = now
            return max(waits)
