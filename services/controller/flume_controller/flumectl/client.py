"""Finding the controller and talking to it. Synchronous: a command line does one thing at a time."""

from __future__ import annotations

import getpass
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import click
import grpc
from flume_protos.v1 import admin_pb2_grpc

from flume_controller.cluster_files import ClusterFiles
from flume_controller.flumectl.errors import CommandError, explained, unreachable
from flume_controller.flumectl.local import LocalState, Supervision, local_state, not_running

CALL_DEADLINE_S = 10.0
REMOTE_PATIENCE_S = 3.0
QUIET_S = 1.0
"""A wait that is longer is announced."""
_RECONNECT = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)


@dataclass(frozen=True, slots=True)
class Target:
    """Which controller a command means: an address, or the cluster of this machine with that name."""

    server: str | None
    files: ClusterFiles

    @property
    def patience_s(self) -> float:
        """How long a controller that is not there is waited for: a local one is restarted by its `up`."""
        if self.server:
            return REMOTE_PATIENCE_S
        supervised = self.local().supervision is Supervision.SUPERVISED
        return CALL_DEADLINE_S if supervised else QUIET_S

    def local(self) -> LocalState:
        """What this machine tells of the cluster; for one that was named by --server nothing."""
        return LocalState(Supervision.NOT_RUNNING, None, []) if self.server else local_state(self.files)

    @property
    def address(self) -> str:
        """host:port. Raises CommandError when the cluster is not running here."""
        if self.server:
            return self.server
        record = self.files.read()
        if record is None or not (record.running or self.files.leftovers()):
            raise CommandError(not_running(self.files, record))
        return record.admin_address


@contextmanager
def admin(target: Target) -> Iterator[Any]:
    """A stub of the admin API; failed calls in the body become one line. Raises CommandError."""
    address = target.address
    with (
        explained(address, troubles=lambda: target.local().troubles),
        grpc.insecure_channel(address, options=_RECONNECT) as channel,
    ):
        _await_controller(channel, address, target)
        yield admin_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call]


def _await_controller(channel: grpc.Channel, address: str, target: Target) -> None:
    """Wait for a connection: a controller that has just died is back in a moment. Raises CommandError."""
    ready = grpc.channel_ready_future(channel)
    try:
        try:
            ready.result(timeout=QUIET_S)
        except grpc.FutureTimeoutError:
            patience_s = target.patience_s
            if patience_s > QUIET_S:
                click.echo(f"waiting for the controller at {address}", err=True)
            ready.result(timeout=max(0.0, patience_s - QUIET_S))
    except grpc.FutureTimeoutError:
        raise unreachable(address, troubles=target.local().troubles) from None
    finally:
        ready.cancel()


def who() -> str:
    """Who asks, for histories: a claim, nothing checks it."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container may have no name for its user
        user = "unknown"
    return f"{user}@{socket.gethostname()}"
