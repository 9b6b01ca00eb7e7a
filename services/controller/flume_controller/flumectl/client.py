"""Finding the controller and talking to it. Synchronous: a command line does one thing at a time."""

from __future__ import annotations

import getpass
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from flume_protos.v1 import admin_pb2_grpc

from flume_controller.cluster_files import ClusterFiles
from flume_controller.flumectl.errors import CommandError, explained

CALL_DEADLINE_S = 10.0


@dataclass(frozen=True, slots=True)
class Target:
    """Which controller a command means: an address, or the cluster of this machine with that name."""

    server: str | None
    files: ClusterFiles

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
    with explained(address), grpc.insecure_channel(address) as channel:
        yield admin_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call]


def who() -> str:
    """Who asks, for histories: a claim, nothing checks it."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container may have no name for its user
        user = "unknown"
    return f"{user}@{socket.gethostname()}"
