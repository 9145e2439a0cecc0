"""Connections that can be cut off at a deadline: an adapter of `requests` that knows its socket, and a bounded connect.

The time-outs of `requests` begin anew with every byte, with every address of a host, and do not hold while a name is
looked up. The client promises a limit for the whole call, so it needs the socket itself.
"""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import urllib3
from requests.adapters import HTTPAdapter


class NoSuchHost(OSError):
    """A name that cannot be one, or that nobody knows; a server of names that does not answer is another error."""


class CuttableAdapter(HTTPAdapter):
    """A `requests` adapter that remembers its newest socket, so that another thread can cut it off.

    It remembers the socket and not the connection, because `http.client` takes the socket away from the connection when
    a reply without a length begins.
    """

    sock: socket.socket | None = None
    deadline = math.inf  # of the request under way, time.monotonic()

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self._track(self.poolmanager)

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> urllib3.ProxyManager:
        manager = super().proxy_manager_for(*args, **kwargs)
        self._track(manager)
        return manager

    def _track(self, manager: urllib3.PoolManager) -> None:
        """Make the manager's connections with `_connect`, and remember their sockets."""
        adapter = self

        def tracked(pool_class: type) -> type:
            class Connection(pool_class.ConnectionCls):
                def _new_conn(self) -> socket.socket:
                    where = self._dns_host, self.port
                    try:
                        sock = _connect(*where, self.timeout, adapter.deadline, self.socket_options)
                    except TimeoutError as error:
                        raise urllib3.exceptions.ConnectTimeoutError(self, "timed out") from error
                    except OSError as error:
                        raise urllib3.exceptions.NewConnectionError(self, str(error)) from error
                    adapter.sock = sock.dup()  # TLS takes the socket itself away while it shakes hands
                    return sock

                def connect(self) -> None:
                    try:
                        super().connect()
                    finally:
                        if adapter.sock is not None:
                            adapter.sock.close()
                        adapter.sock = self.sock

            return type(pool_class.__name__, (pool_class,), {"ConnectionCls": Connection})

        manager.pool_classes_by_scheme = {
            "http": tracked(urllib3.HTTPConnectionPool), "https": tracked(urllib3.HTTPSConnectionPool)
        }

    def abort(self) -> None:
        """Shut the socket down, which wakes the thread that waits for it."""
        sock = self.sock
        if sock is not None:
            with suppress(OSError):  # it may be closed already
                sock.shutdown(socket.SHUT_RDWR)


def _connect(host: str, port: int, timeout: float, deadline: float, options: Iterable[tuple]) -> socket.socket:
    """Connect to the first of a host's addresses that answers: `timeout` seconds for each, `deadline` for all.

    Names are looked up in a thread of their own: the system's resolver cannot be interrupted, and is left behind.
    """
    lookup: Future = Future()
    threading.Thread(target=_look_up, args=[lookup, host.strip("[]"), port], daemon=True).start()
    failure: OSError = OSError(f"no address of {host}")
    for family, kind, protocol, _, address in lookup.result(max(0.0, deadline - time.monotonic())):
        if (left := deadline - time.monotonic()) <= 0:
            break
        sock = socket.socket(family, kind, protocol)
        try:
            for option in options or ():
                sock.setsockopt(*option)
            sock.settimeout(min(timeout, left))
            sock.connect(address)
            return sock
        except OSError as error:
            sock.close()
            failure = error
    raise failure


def _look_up(lookup: Future, host: str, port: int) -> None:
    try:
        lookup.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    except (OSError, UnicodeError) as error:
        unknown = isinstance(error, UnicodeError) or error.errno == socket.EAI_NONAME
        lookup.set_exception((NoSuchHost if unknown else OSError)(str(error)))
