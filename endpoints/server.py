"""The HTTP server of chat completions: it refuses malformed requests and passes the others to a function.

`simulator.py` serves the embedded users with it, and the chat program a trained policy.
"""

from __future__ import annotations

import hmac
import io
import json
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from endpoints.wire import RequestError, is_loopback
from untrusted.plain_text import say, shorten

MAX_REQUEST_BYTES = 1 << 20
MAX_CONNECTIONS = 1024  # each has a thread, and a body in memory at most; further ones are sent away
LINGER = 2.0  # seconds in which the rest of a refused request is taken in
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
_PATHS = {"/v1/chat/completions": "POST", "/v1/models": "GET", "/health": "GET"}


class Incoming(io.RawIOBase):
    """The bytes of a connection: `seconds` of silence may pass before a request, and as many until it is whole.

    A socket's own time-out begins anew with each byte, so that a request of one byte now and then never ends.
    """

    def __init__(self, connection: socket.socket, seconds: float):
        self.connection, self.seconds = connection, seconds
        self.deadline: float | None = None  # of the request that has begun; None: none has

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def readinto(self, buffer: bytearray) -> int:
        """Read what is there, or wait for it; TimeoutError at the deadline."""
        left = self.seconds if self.deadline is None else self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.connection.settimeout(left)
        count = self.connection.recv_into(buffer)
        self.deadline = self.deadline or time.monotonic() + self.seconds
        return count


class Handler(BaseHTTPRequestHandler):
    """Speak HTTP/1.1 with keep-alive; every refusal is a JSON error in OpenAI's shape."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # buffered: one packet per reply
    timeout = 60  # seconds of silence until a connection is closed, and for a whole request from its first byte on

    def setup(self) -> None:
        """Read through `Incoming`."""
        super().setup()
        self.rfile.close()
        self.incoming = Incoming(self.connection, self.timeout)
        self.rfile = io.BufferedReader(self.incoming)

    def handle_one_request(self) -> None:
        """Start the clock anew for each request of a connection."""
        self.incoming.deadline = None
        super().handle_one_request()

    def do_POST(self) -> None:
        """Answer a request of any method."""
        try:
            self._check_access()
            self._send(200, self._reply(self._read_body()))
        except RequestError as error:
            self._refuse(error.status, str(error))
        except ConnectionError:
            raise  # the client has gone: nobody is left to answer
        except Exception as error:  # a bug of ours must not look like a dead server
            say(traceback.format_exc(), sys.stderr)
            self._refuse(500, f"internal error ({type(error).__name__})")

    do_GET = do_HEAD = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_POST

    def _read_body(self) -> bytes:
        """Read the whole body; until that is done the connection is not fit for another request."""
        self.close_connection, keep_alive = True, not self.close_connection
        length = self.headers.get("Content-Length", "0" if self.command != "POST" else "")
        if "Transfer-Encoding" in self.headers or not length:
            raise RequestError(411, "send the body with a Content-Length header, not chunked")
        if not re.fullmatch(r"[0-9]{1,18}", length):
            raise RequestError(400, f"Content-Length is {shorten(length)!r}, not a number")
        if int(length) > MAX_REQUEST_BYTES:
            raise RequestError(413, f"the body has {length} bytes; the limit is {MAX_REQUEST_BYTES}")
        raw = bytearray()  # grows as bytes come: who only announces them holds no memory
        try:
            while len(raw) < int(length) and (part := self.rfile.read1(int(length) - len(raw))):
                raw += part
        except TimeoutError:
            raise RequestError(408, f"the request did not arrive within {self.timeout} s") from None
        if len(raw) < int(length):
            raise RequestError(400, f"the body ended after {len(raw)} of {length} bytes")
        self.close_connection = not keep_alive
        return bytes(raw)

    def _reply(self, raw: bytes) -> dict[str, Any]:
        path = self.path.partition("?")[0]
        if path not in _PATHS:
            raise RequestError(404, f"there is no {shorten(path)!r} here, only {', '.join(_PATHS)}")
        if self.command != _PATHS[path]:
            raise RequestError(405, f"{path} takes {_PATHS[path]}, not {self.command}")
        if path == "/health":
            return {"status": "ok"}
        if path == "/v1/models":
            about = {"object": "model", "created": 0, "owned_by": "rlpa"}
            return {"object": "list", "data": [{"id": model} | about for model in self.server.models]}
        if self.headers.get_content_type() != "application/json" or "Content-Type" not in self.headers:
            raise RequestError(415, f"Content-Type is {self.headers.get('Content-Type')!r}; send application/json")
        return self.server.answer(raw)

    def _check_access(self) -> None:
        """Refuse, before the body is read, requests without the key, and those of web pages by a foreign host name."""
        keep_alive, self.close_connection = not self.close_connection, True
        scheme, _, key = self.headers.get("Authorization", "").partition(" ")
        known = scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), self.server.key.encode())
        if self.server.key and not known:
            raise RequestError(401, "no valid key; send it as Authorization: Bearer KEY")
        host = self.headers.get("Host", "localhost")  # only a browser can be made to send a foreign one
        name = re.sub(r":[0-9]*$", "", host.strip()).strip("[]").lower()
        if is_loopback(self.server.server_address[0]) and not is_loopback(name):
            raise RequestError(403, f"this server listens to localhost, not to the host {shorten(host)!r}")
        self.close_connection = not keep_alive

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse a request that http.server could not parse (its own errors are HTML)."""
        self.close_connection = True
        self.request_version = "HTTP/1.1"  # http.server leaves out the status line for what it takes for HTTP/0.9
        self._refuse(code, message or self.responses[code][0])

    def _refuse(self, status: int, message: str) -> None:
        kind = "server_error" if status >= 500 else "invalid_request_error"
        words = shorten(message, limit=300)
        self._send(status, {"error": {"message": words, "type": kind, "param": None, "code": status}})

    def _send(self, status: int, payload: dict[str, Any]) -> None:
        body = json.dumps(payload).encode()
        self.connection.settimeout(self.timeout)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status == 405:
            self.send_header("Allow", _PATHS[self.path.partition("?")[0]])
        if status == 401:
            self.send_header("WWW-Authenticate", "Bearer")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.wfile.flush()
        if self.close_connection:
            self._drain()

    def _drain(self) -> None:
        """Take in what the client still sends: closing on unread data resets the connection, and the reply is lost."""
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            until = time.monotonic() + LINGER
            while (left := until - time.monotonic()) > 0:
                self.connection.settimeout(left)
                if not self.connection.recv(65_536):
                    break

    def log_message(self, format: str, *args: Any) -> None:
        """Stay quiet: a training run sends thousands of requests."""


class Server(ThreadingHTTPServer):
    """Serve chat completions to a bounded number of connections, each in a thread of its own."""

    request_queue_size = 256  # the default of 5 makes simultaneous connections wait a second
    answer: Callable[[bytes], dict[str, Any]] | None  # body of a chat completion request → reply
    models: list[str]  # names that /v1/models lists
    key: str  # what clients must send; empty: none
    places: threading.BoundedSemaphore  # one for each connection that may be open

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread of its own, or send it away if too many are open."""
        if self.places.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        with suppress(OSError):
            request.setblocking(False)
            request.send(BUSY)
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection, and make its place free again."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report the bug of a handler on stderr, but not a client that has gone."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def make_server(
    host: str = "127.0.0.1",
    port: int = 8100,
    answer: Callable[[bytes], dict[str, Any]] | None = None,
    models: Iterable[str] = (),
    key: str = "",
) -> ThreadingHTTPServer:
    """Bind a server of chat completions (port 0: any free one); `serve_forever()` runs it.

    answer: turns the body of a request into the reply, or raises RequestError. None: the caller sets `server.answer`
        before it serves.
    models: the names that /v1/models lists.
    key: what clients must send as a bearer token. Empty: none.

    Raises ValueError for a host that is not loopback unless clients must send a key, and for a port that is not free.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"--port {port} must lie in [0, 65535]; 0 takes a free one")
    address = "127.0.0.1" if host == "localhost" else host
    if not is_loopback(address) and not key or ":" in address:
        raise ValueError(f"--host {host} is not an IPv4 loopback address; use --host 127.0.0.1"
                         " (others need a key: python -m chat --api-key-env)")
    try:
        server = Server((address, port), Handler)
    except OSError as error:
        why = error.strerror or error
        raise ValueError(f"--port {port} of {address} is not free ({why}); choose another (0: any free)") from None
    server.answer, server.models, server.key = answer, list(models), key
    server.places = threading.BoundedSemaphore(MAX_CONNECTIONS)
    return server
