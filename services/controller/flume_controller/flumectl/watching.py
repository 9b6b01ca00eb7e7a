"""Following the status of the cluster until something is so."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import grpc
from flume_protos.v1 import admin_pb2

from flume_controller.flumectl.errors import CommandError

DEADLINE_EXCEEDED = "ProgressDeadlineExceeded"


def statuses(stub: Any, timeout_s: float | None) -> Iterator[admin_pb2.StatusReply]:
    """Every status until the timeout; None: without end. Raises CommandError when the watch breaks off."""
    deadline_s = float("inf") if timeout_s is None else time.monotonic() + timeout_s
    try:
        yield from stub.Status(admin_pb2.StatusRequest(watch=True), timeout=timeout_s)
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
            raise
    # A watch that ends early must not make this look done, nor like a timeout before its time.
    if time.monotonic() < deadline_s - 0.5:
        raise CommandError("the controller ended the watch; it goes on by itself, see `flumectl status`")


def progress(status: admin_pb2.StatusReply) -> str:
    """One line for people. Pure."""
    parts = [f"{status.ready} of {status.desired} ready"]
    if status.preparing:
        parts.append(f"{status.preparing} preparing")
    if status.draining:
        parts.append(f"{status.draining} draining")
    trouble = [item for item in status.conditions if item.type == "Degraded" and item.status == "True"]
    return ", ".join(parts) + "".join(f"; {item.reason}: {item.message}" for item in trouble)


def given_up(status: admin_pb2.StatusReply) -> str:
    """What the controller says when it does not get there, else empty. Pure."""
    if status.observed_generation < status.generation:
        return ""  # about an earlier wish
    for item in status.conditions:
        if item.type == "Progressing" and item.reason == DEADLINE_EXCEEDED:
            return item.message or item.reason
    return ""
