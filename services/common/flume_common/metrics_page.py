"""`/metrics` and the probes of a service that has no HTTP server of its own, from a thread of their own.

    /metrics            for Prometheus
    /livez, /healthz    the process runs; depends on nothing else
    /readyz             whether new work should come here; ?verbose lists the checks

A busy event loop does not hold it up, so what is asked for values must be safe to read from another
thread. Some requests at a time, each within a deadline; more are turned away.
"""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import BaseServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs

import structlog
from prometheus_client import CONTENT_TYPE_LATEST, Metric, generate_latest

from flume_common.listening import bind, reachable_address
from flume_common.metrics import Collect, common, registry_of
from flume_common.readiness import Check, readiness

log = structlog.get_logger(__name__)

METRICS_LISTEN = "127.0.0.1:0"
"""Default of --metrics-listen."""
METRICS_LISTEN_HELP = (
    "HTTP address of /metrics, /livez and /readyz; port 0 takes a free one, shown by"
    " `flumectl get nodes -o wide`; default %(default)s"
)
REQUEST_S = 5.0
MAX_REQUESTS = 16
MAX_HEAD_BYTES = 16 << 10

Checks = Callable[[], Mapping[str, Check]]
Facts = Callable[[], Mapping[str, bool]]


class Answer(NamedTuple):
    status: int
    body: bytes
    content_type: str = "text/plain; charset=utf-8"


class MetricsPage:
    """What is served. Before `show` the service is not ready, and its families are those that all have."""

    def __init__(self, store_connected: Callable[[], bool]) -> None:
        self.address = ""  # what others may dial
        self.incarnations: Callable[[], int] = lambda: 0  # of etcd, as `common` says
        self._store_connected = store_connected
        self._collect: Collect = tuple
        self._checks: Checks = lambda: {"started": False}
        self._facts: Facts = dict
        self._pages: dict[str, Callable[[], Answer]] = {}
        self._registry = registry_of(self._families)

    def show(self, collect: Collect, checks: Checks, facts: Facts = dict) -> None:
        """From now on: the service's families, what its readiness depends on, and what is told beside it."""
        self._collect, self._checks, self._facts = collect, checks, facts

    def add(self, path: str, page: Callable[[], Answer]) -> None:
        """Serve `page` at `path`, too. It is called on other threads than this."""
        self._pages[path] = page

    def answer(self, target: str) -> Answer:
        """To a GET of this path and query."""
        path, _, query = target.partition("?")
        match path:
            case "/metrics":
                return Answer(200, generate_latest(self._registry), CONTENT_TYPE_LATEST)
            case "/livez" | "/healthz":
                return Answer(200, b"ok")
            case "/readyz":
                return self._ready(verbose="verbose" in parse_qs(query, keep_blank_values=True))
        if path in self._pages:
            return self._pages[path]()
        known = ", ".join(("/metrics", "/livez", "/healthz", "/readyz", *self._pages))
        return Answer(404, f"there are {known}".encode())

    def _ready(self, *, verbose: bool) -> Answer:
        facts = {**self._facts(), "store_connected": self._store_connected()}
        said = readiness(self._checks(), facts, verbose=verbose)
        return Answer(said.status, said.text.encode())

    def _families(self) -> Iterator[Metric]:
        yield from common(self._store_connected(), self.incarnations())
        yield from self._collect()


@asynccontextmanager
async def metrics_page(
    address: str, store_connected: Callable[[], bool], *, advertise_host: str = ""
) -> AsyncIterator[MetricsPage]:
    """Serve on `address` (`host:port`, port 0 takes a free one) while the body runs. Raises CannotListen."""
    bound = bind(address)
    page = MetricsPage(store_connected)
    page.address = reachable_address(address, bound, advertise_host)
    server = _Server(bound, page)
    threading.Thread(target=server.serve_forever, args=(_FOREVER_S,), name="metrics", daemon=True).start()
    try:
        yield page
    finally:
        server.stop()


_FOREVER_S = 86400.0  # between two looks at nothing; an end is told by the socket


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, bound: socket.socket, page: MetricsPage) -> None:
        super().__init__(bound.getsockname(), _Handler, bind_and_activate=False)
        self.socket.close()  # the one it made itself
        self.socket = bound
        self.page = page
        self._room = threading.BoundedSemaphore(MAX_REQUESTS)

    def stop(self) -> None:
        """Returns at once; whoever is being answered may lose the connection."""
        self.socket.shutdown(socket.SHUT_RDWR)  # wakes `serve_forever`
        self.shutdown()
        self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started
            self._room.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("metrics_request_failed", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    timeout = REQUEST_S  # of the socket; sending a whole answer counts as one operation
    server_version, sys_version = "flume", ""

    def __init__(self, request: socket.socket, client_address: Any, server: BaseServer) -> None:
        assert isinstance(server, _Server)
        self._page = server.page
        super().__init__(request, client_address, server)

    def setup(self) -> None:
        super().setup()
        # Whole or not at all: byte by byte it could be had for ever.
        self.rfile = io.BufferedReader(io.BytesIO(_head(self.connection)))

    def do_GET(self) -> None:
        try:
            answer = self._page.answer(self.path)
        except Exception:
            log.exception("metrics_page_failed", path=self.path)
            answer = Answer(500, b"this went wrong; the log says how")
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(answer.body)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Probes come all the time."""


def _head(connection: socket.socket) -> bytes:
    """A request up to its empty line; empty when it does not come in time or is too long."""
    head = bytearray()
    ends_s = time.monotonic() + REQUEST_S
    while b"\r\n\r\n" not in head:
        left_s = ends_s - time.monotonic()
        if left_s <= 0 or len(head) > MAX_HEAD_BYTES:
            return b""
        connection.settimeout(left_s)
        try:
            more = connection.recv(4096)
        except OSError:
            return b""
        if not more:
            return b""
        head += more
    connection.settimeout(REQUEST_S)
    return bytes(head)
