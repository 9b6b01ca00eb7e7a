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
        return REMOTE_PATIENCE_S if self.server else CALL_DEADLINE_S

    @property
    def address(self) -> str:
        """host:port. Raises CommandError when the cluster is not running here."""
        if self.server:
            return self.server
        record = self.files.read()
        if record is None:
            raise CommandError(
                f"cluster {self.files.name!r} is not running on this machine: "
                "start it with `flumectl up`, or name a controller with --server HOST:PORT"
            )
        return record.admin_address


@contextmanager
def admin(target: Target) -> Iterator[Any]:
    """A stub of the admin API; failed calls in the body become one line. Raises CommandError."""
    address = target.address
    with explained(address), grpc.insecure_channel(address, options=_RECONNECT) as channel:
        _await_controller(channel, address, target.patience_s)
        yield admin_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call]


def _await_controller(channel: grpc.Channel, address: str, patience_s: float) -> None:
    """Wait for a connection: a controller that has just died is back in a moment. Raises CommandError."""
    ready = grpc.channel_ready_future(channel)
    try:
        try:
            ready.result(timeout=min(QUIET_S, patience_s))
        except grpc.FutureTimeoutError:
            if patience_s > QUIET_S:
                click.echo(f"waiting for the controller at {address}", err=True)
            ready.result(timeout=max(0.0, patience_s - QUIET_S))
    except grpc.FutureTimeoutError:
        raise unreachable(address) from None
    finally:
        ready.cancel()


def who() -> str:
    """Who asks, for histories: a claim, nothing checks it."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container may have no name for its user
        user = "unknown"
    return f"{user}@{socket.gethostname()}"
