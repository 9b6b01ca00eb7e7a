"""UCXX, imported with the settings lanes need. The only module that imports it.

Each setting is an environment variable of UCX, and an operator's own value wins. They are set before
the import because UCXX fills in a few of its own otherwise (`UCX_RNDV_THRESH=8192` among them).
Times below are round trips between two processes with `bench/lane_hop.py` on two cores at 2.6 GHz.
"""

from __future__ import annotations

import os
from typing import Any, Final

from flume_common.network_cards import devices_of

DEFAULT_TLS: Final = "tcp,sm,self"
_OVER_CARDS: Final = frozenset(DEFAULT_TLS.split(","))

SETTINGS: Final = {
    # Without it UCX leaves shared memory out for endpoints that report their peer's death, and a lane
    # on one host runs over TCP: 18 µs instead of 10 for 2.4 KB, 1.2 ms instead of 60 µs for 1 MB.
    "UCX_MM_ERROR_HANDLING": "y",
    # How often shared memory endpoints look whether the peer's process exists; TCP needs no looking.
    "UCX_KEEPALIVE_INTERVAL": "200ms",
    # Up to here a message goes at once; above it waits at the sender until the receiver has posted a
    # buffer. That handshake costs a wake-up on each side: 64 KB between sleeping processes 126 µs with
    # it and 41 µs without. Sending everything at once would pile up KV frames at a node that is behind.
    "UCX_RNDV_THRESH": "128K",
    # 8 KB pieces by default. In pieces of 64 KB: 1 MB 1 320 → 540 µs, throughput 2.0 → 4.5 GB/s.
    "UCX_TCP_TX_SEG_SIZE": "64K",
    "UCX_TCP_RX_SEG_SIZE": "64K",
    # Otherwise `connect` to a host that does not answer holds the engine until the kernel gives up.
    "UCX_TCP_CONN_NB": "y",
    # UCX_MM_SEG_SIZE stays at 8 KB: at 64K transfers stall for good (UCX 1.21).
    "UCX_WARN_UNUSED_ENV_VARS": "n",  # UCXX sets one that a build without CUDA does not read
}

for _name, _value in SETTINGS.items():
    os.environ.setdefault(_name, _value)

import ucxx._lib.libucxx as lib  # noqa: E402
from ucxx._lib.arr import Array  # noqa: E402

NoDevice = lib.UCXNoDeviceError
OK: Final = 0  # ucs_status_t of a transfer that went well

__all__ = [
    "DEFAULT_TLS",
    "OK",
    "Array",
    "NoDevice",
    "Nowhere",
    "connect",
    "lib",
    "make_context",
    "make_worker",
    "reason_of",
]


def make_context(tls: str | None, host: str = "") -> Any:
    """What workers are made of. `tls` None: UCX_TLS or the default.

    TCP is offered on the cards of `host`'s address alone; empty: on all. UCX_NET_DEVICES goes before it,
    and transports other than the default ones name their devices in another way.
    Raises ValueError when no card has that address.
    """
    transports = tls or os.environ.get("UCX_TLS") or DEFAULT_TLS
    settings = {"TLS": transports}
    if host and set(transports.split(",")) <= _OVER_CARDS and "UCX_NET_DEVICES" not in os.environ:
        settings["NET_DEVICES"] = devices_of(host)
    return lib.UCXContext(settings, feature_flags=(lib.Feature.TAG, lib.Feature.WAKEUP))


def make_worker(context: Any) -> Any:
    """A UCXX worker for tagged messages that can be slept on."""
    worker = lib.UCXWorker(context)
    worker.init_blocking_progress_mode()
    return worker


class Nowhere:
    """Stands for the endpoint to a peer that was gone before there was one."""

    alive = False

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def raise_on_error(self) -> None:
        raise lib.UCXError(self._reason)

    def tag_send(self, *_: object) -> None: ...

    def tag_recv(self, *_: object) -> None: ...

    def close_blocking(self) -> None: ...


def connect(worker: Any, address: bytes) -> Any:
    """An endpoint to the worker with this address, not alive if UCX finds that nobody is there.

    Raises ValueError when it is no worker's address.
    """
    try:
        remote = lib.UCXAddress.create_from_buffer(address)
        return lib.UCXEndpoint.create_from_worker_address(worker, remote, endpoint_error_handling=True)
    except (lib.UCXInvalidParamError, lib.UCXInvalidAddrError) as error:
        raise ValueError(f"not the address of a port: {error}") from error
    except lib.UCXError as error:
        return Nowhere(f"no connection: {error}")


def reason_of(endpoint: Any) -> str:
    """Why an endpoint that is no longer alive is down, in UCX's words."""
    try:
        endpoint.raise_on_error()
    except lib.UCXError as error:
        return str(error).rpartition(" error: ")[2]
    return "closed"
