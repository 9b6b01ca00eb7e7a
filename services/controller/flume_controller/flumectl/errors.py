"""What goes wrong for a person at a terminal, in one line with a remedy. Exit codes: 1 here, 2 for usage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click
import grpc


class CommandError(click.ClickException):
    """Printed as `Error: …` on stderr; exit code 1."""


def unreachable(server: str, what: str = "the controller") -> CommandError:
    return CommandError(
        f"cannot reach {what} at {server}: start a cluster with `flumectl up`, or give --server"
    )


@contextmanager
def explained(server: str, what: str = "the controller") -> Iterator[None]:
    """Turn a failed call to `server` into one line that says what to do."""
    try:
        yield
    except grpc.RpcError as error:
        raise _explain(error, server, what) from error


def _explain(error: grpc.RpcError, server: str, what: str) -> CommandError:
    code, details = error.code(), error.details()
    match code:
        case grpc.StatusCode.UNAVAILABLE if _unreachable(details):
            return unreachable(server, what)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return CommandError(f"{what} at {server} did not answer in time")
        case grpc.StatusCode.UNIMPLEMENTED:
            return CommandError(
                f"{what} at {server} does not know this command: its version differs from flumectl's"
            )
        case _:
            return CommandError(f"{details} ({code.name})")


def _unreachable(details: str | None) -> bool:
    return "connect" in (details or "").lower() or "connection" in (details or "").lower()
