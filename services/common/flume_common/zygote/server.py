"""The zygote itself: import, then fork on request. One thread and a selector, nothing that forks badly."""

from __future__ import annotations

import gc
import importlib
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import msgspec
import structlog

from flume_common.zygote.child import become, join_group
from flume_common.zygote.protocol import (
    MAX_FDS,
    MAX_PACKET_BYTES,
    Answer,
    Ended,
    Fork,
    Forked,
    Refused,
    is_ours,
)

log = structlog.get_logger()

TIED_GRACE_S = 5.0
"""How long a tied child may take to end by itself once whoever asked for it is gone."""
DEVICE_FILES = "/dev/nvidia-uvm"
"""What CUDA has open once it is initialised, and the driver's management library has not."""


@dataclass(frozen=True, slots=True)
class Stage:
    """What to import, and then to call, before requests on `listener` are served."""

    listener: socket.socket
    module: str
    prepare: Callable[[], None] = lambda: None


def run(stages: Sequence[Stage], parent_fd: int = -1) -> NoReturn:
    """Serve the first stage here and the others in a child that goes on importing.

    So a child of an early stage has nothing in memory that only later ones need. If one ends, all do.
    """
    began_s, env = time.monotonic(), dict(os.environ)
    stage, *later = stages
    importlib.import_module(stage.module)
    stage.prepare()
    # Libraries read some of what modules set while being imported only later, in the child.
    server = Server(stage.listener, {k: v for k, v in os.environ.items() if env.get(k) != v})
    if parent_fd >= 0:
        server.end_with(parent_fd, "the earlier stage")
    if later:
        read, write = os.pipe()
        if (pid := os.fork()) == 0:
            os.close(write)
            server.close()
            run(later, read)
        os.close(read)
        for other in later:
            other.listener.close()
        server.own(write)
        server.end_with(os.pidfd_open(pid), "the later stage")
    _require_forkable(stage.module)
    gc.collect()
    gc.freeze()  # or the children's collector would touch, and so copy, every page
    log.info("zygote_ready", module=stage.module, elapsed_ms=round(1e3 * (time.monotonic() - began_s)))
    server.serve()


def _require_forkable(module: str) -> None:
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads > 1:
        # Their locks would be held for ever in a child.
        log.error("zygote_has_threads", module=module, threads=threads)
        os._exit(1)
    # A driver that is initialised in a parent does not work in its children.
    if devices := sorted({path for path in _open_files() if path.startswith(DEVICE_FILES)}):
        log.error("zygote_has_device", module=module, files=devices)
        os._exit(1)


def _open_files() -> Iterator[str]:
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # that of the listing itself
            yield str(link.readlink())


@dataclass(slots=True)
class _Child:
    pid: int
    pidfd: int
    connection: socket.socket | None  # None once whoever asked for it is gone
    tied: bool
    kill_at_s: float | None = None


class Server:
    """Forks, reaps, and tells."""

    def __init__(self, listener: socket.socket, env: Mapping[str, str]) -> None:
        """`env`: what children have in theirs unless the request says otherwise."""
        self._listener = listener
        self._env = env
        self._selector = selectors.DefaultSelector()
        self._children: dict[int, _Child] = {}  # by pid
        self._connections: set[socket.socket] = set()
        self._owned: set[int] = set()
        self._watch(listener.fileno(), self._accept)

    def own(self, fd: int) -> None:
        """A descriptor that children must not have."""
        self._owned.add(fd)

    def end_with(self, fd: int, what: str) -> None:
        """End once `fd` becomes readable."""
        self.own(fd)
        self._watch(fd, lambda: _end(what))

    def close(self) -> None:
        """All descriptors of its own: for a child, which has copies of them."""
        self._selector.close()
        self._listener.close()
        for connection in self._connections:
            connection.close()
        for fd in (*self._owned, *(child.pidfd for child in self._children.values())):
            os.close(fd)

    def serve(self) -> NoReturn:
        while True:
            for key, _ in self._selector.select(self._patience_s()):
                key.data()
            self._kill_overdue()

    def _watch(self, fd: int, then: Callable[[], None]) -> None:
        self._selector.register(fd, selectors.EVENT_READ, then)

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        if not is_ours(connection):
            connection.close()
            return
        self._connections.add(connection)
        self._watch(connection.fileno(), lambda: self._hear(connection))

    def _hear(self, connection: socket.socket) -> None:
        """The request of a new connection."""
        try:
            data, fds, _, _ = socket.recv_fds(connection, MAX_PACKET_BYTES, MAX_FDS)
        except OSError:
            data, fds = b"", []
        try:
            self._selector.unregister(connection.fileno())
            if not data:
                self._drop(connection)
                return
            self._fork(connection, msgspec.msgpack.decode(data, type=Fork), fds)
        except (OSError, msgspec.MsgspecError) as error:
            log.error("fork_refused", reason=str(error))
            _say(connection, Refused(str(error)))
            self._drop(connection)
        finally:
            for fd in fds:
                os.close(fd)

    def _fork(self, connection: socket.socket, request: Fork, fds: list[int]) -> None:
        if _is_gone(connection):  # it waited too long for us, and did without
            self._drop(connection)
            return
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            self.close()
            become(request, fds, self._env)
        # Here, too, so that it has happened before anybody hears of the child.
        with suppress(ProcessLookupError):
            join_group(pid, request.group)
        child = _Child(pid, os.pidfd_open(pid), connection, request.tied)
        self._children[pid] = child
        self._watch(child.pidfd, lambda: self._reap(child))
        self._watch(connection.fileno(), lambda: self._abandoned(child))
        if not _say(connection, Forked(pid), child.pidfd):
            self._kill(child)
        log.info("forked", pid=pid, module=request.module)

    def _reap(self, child: _Child) -> None:
        _, status = os.waitpid(child.pid, 0)
        del self._children[child.pid]
        self._selector.unregister(child.pidfd)
        os.close(child.pidfd)
        exit_code = os.waitstatus_to_exitcode(status)
        log.info("child_ended", pid=child.pid, exit_code=exit_code)
        if child.connection is not None:
            _say(child.connection, Ended(exit_code))
            self._selector.unregister(child.connection.fileno())
            self._drop(child.connection)

    def _abandoned(self, child: _Child) -> None:
        """Whoever asked for it is gone; without having read that there is a child, as an error tells."""
        connection = child.connection
        if connection is None or child.pid not in self._children:
            return  # reaped in the same turn
        try:
            unread = False
            connection.recv(1)
        except ConnectionResetError:
            unread = True
        child.connection = None
        self._selector.unregister(connection.fileno())
        self._drop(connection)
        if unread:
            self._kill(child)
        elif child.tied:
            child.kill_at_s = time.monotonic() + TIED_GRACE_S

    def _drop(self, connection: socket.socket) -> None:
        self._connections.discard(connection)
        connection.close()

    def _patience_s(self) -> float | None:
        deadlines_s = [child.kill_at_s for child in self._children.values() if child.kill_at_s is not None]
        return max(min(deadlines_s) - time.monotonic(), 0.0) if deadlines_s else None

    def _kill_overdue(self) -> None:
        now_s = time.monotonic()
        for child in self._children.values():
            if child.kill_at_s is not None and now_s >= child.kill_at_s:
                log.warning("child_killed", pid=child.pid, reason="whoever asked for it is gone")
                child.kill_at_s = None
                self._kill(child)

    def _kill(self, child: _Child) -> None:
        os.kill(child.pid, signal.SIGKILL)  # not reaped yet, so the number is still its own


def _say(connection: socket.socket, answer: Answer, *fds: int) -> bool:
    try:
        socket.send_fds(connection, [msgspec.msgpack.encode(answer)], fds)
    except OSError:
        return False
    return True


def _is_gone(connection: socket.socket) -> bool:
    try:
        return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _end(what: str) -> NoReturn:
    log.info("zygote_ends", reason=f"{what} ended")
    os._exit(1)
