"""What goes wrong for a person at a terminal, in one line with a remedy. Exit codes: 1 here, 2 for usage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import click
import grpc


class CommandError(click.ClickException):
    """Printed as `Error: …` on stderr; exit code 1."""


def unreachable(server: str, what: str = "the controller", troubles: Sequence[str] = ()) -> CommandError:
    """`troubles`: what is known to be amiss with the cluster there."""
    why = "; ".join(troubles) or "start a cluster with `flumectl up`, or give --server"
    return CommandError(f"cannot reach {what} at {server}: {why}")


@contextmanager
def explained(
    server: str, what: str = "the controller", troubles: Callable[[], Sequence[str]] = tuple
) -> Iterator[None]:
    """Turn a failed call to `server` into one line that says what to do. `troubles` as for `unreachable`."""
    try:
        yield
    except grpc.RpcError as error:
        raise _explain(error, server, what, troubles) from error


def _explain(
    error: grpc.RpcError, server: str, what: str, troubles: Callable[[], Sequence[str]]
) -> CommandError:
    code, details = error.code(), error.details()
    match code:
        case grpc.StatusCode.UNAVAILABLE if _unreachable(details):
            return unreachable(server, what, troubles())
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.DEADLINE_EXCEEDED if said := troubles():
            return CommandError(f"{what} at {server} could not do it ({details}): {'; '.join(said)}")
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return CommandError(f"{what} at {server} did not answer in time")
        case grpc.StatusCode.UNIMPLEMENTED:
            return CommandError(
                f"{what} at {server} does not know this command: its version differs from flumectl's"
            )
        case _:
            return CommandError(f"{details} ({code.name})")


_OF_OUR_CONNECTION = (
    "failed to connect to all addresses",
    "connections to all backends failing",
    "connection reset",
    "connection closed",
    "connection refused",
    "connect failed",
    "socket closed",
    "recvmsg:",
    "sendmsg:",
    "dns resolution failed",
)
"""How gRPC's own words begin; what a server says may have them in its middle."""


def _unreachable(details: str | None) -> bool:
    return (details or "").lower().startswith(_OF_OUR_CONNECTION)
