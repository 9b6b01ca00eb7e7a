"""Where etcd is and how to get in: one frozen value, read once at start."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc

# etcd answers pings closer together than 5 s with GOAWAY, and counts those without a stream too.
_KEEPALIVE_MS = 10_000
_KEEPALIVE_TIMEOUT_MS = 3_000

UNIX = "unix://"
"""Scheme of an endpoint that is a socket in the file system: whoever may open it may use that etcd."""


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """How to reach etcd. Raises ValueError for settings that contradict each other."""

    endpoints: tuple[str, ...]
    """`host:port`, also with `http://` or `https://`, or `unix:///PATH` of a socket on this machine.
    Hostnames are resolved again at every reconnect."""

    ca_file: Path | None = None
    """Trust only servers signed by this CA (PEM). With it, or with `https://`, the connection is TLS."""

    cert_file: Path | None = None
    key_file: Path | None = None
    """Our own certificate and key (PEM), where etcd asks for one."""

    server_name: str | None = None
    """The name the servers' certificates carry, where it is not the endpoint's host."""

    user: str | None = None
    password: str | None = None

    timeout_s: float = 5.0
    """The longest any single call may take, tries and waits included."""

    def __post_init__(self) -> None:
        if not self.endpoints:
            raise ValueError("no etcd endpoint given")
        for endpoint in self.endpoints:
            _require_address(endpoint)
        if len({endpoint.startswith("https://") for endpoint in self.endpoints}) > 1:
            raise ValueError(f"etcd endpoints mix https with plain: {', '.join(self.endpoints)}")
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("an etcd client certificate needs both cert_file and key_file")
        if (self.user is None) != (self.password is None):
            raise ValueError("etcd user and password go together")
        if self.timeout_s <= 0:
            raise ValueError(f"timeout_s must be above 0, got {self.timeout_s}")

    @classmethod
    def parse(cls, endpoints: str) -> StoreConfig:
        """From a comma-separated list, as command lines give it."""
        return cls(tuple(part.strip() for part in endpoints.split(",") if part.strip()))

    @property
    def addresses(self) -> tuple[str, ...]:
        """The endpoints as gRPC dials them: `host:port`, or `unix:PATH`."""
        return tuple(map(_address, self.endpoints))

    @property
    def tls(self) -> bool:
        return (
            self.ca_file is not None or self.cert_file is not None or self.endpoints[0].startswith("https://")
        )

    def channel(self, address: str) -> grpc.aio.Channel:
        """A channel to one endpoint. Raises OSError when a certificate can't be read."""
        options: list[tuple[str, int | str]] = [
            ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
            ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.initial_reconnect_backoff_ms", 100),
            # Also how long one attempt to connect may take.
            ("grpc.min_reconnect_backoff_ms", 1_000),
            ("grpc.max_reconnect_backoff_ms", 2_000),
            ("grpc.max_receive_message_length", -1),
            ("grpc.enable_retries", 0),
            # Two stores in one process must not share a connection, nor its back-off.
            ("grpc.use_local_subchannel_pool", 1),
        ]
        if not self.tls:
            return grpc.aio.insecure_channel(address, options=options)
        if self.server_name is not None:
            options.append(("grpc.ssl_target_name_override", self.server_name))
        return grpc.aio.secure_channel(address, self._credentials(), options=options)

    def _credentials(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(
            root_certificates=self.ca_file.read_bytes() if self.ca_file else None,
            private_key=self.key_file.read_bytes() if self.key_file else None,
            certificate_chain=self.cert_file.read_bytes() if self.cert_file else None,
        )


def _address(endpoint: str) -> str:
    if endpoint.startswith(UNIX):
        return f"unix:{endpoint.removeprefix(UNIX)}"
    return endpoint.split("://")[-1].rstrip("/")


def _require_address(endpoint: str) -> None:
    if endpoint.startswith(f"{UNIX}/"):
        return
    scheme, _, rest = endpoint.rpartition("://")
    host, _, port = rest.rstrip("/").rpartition(":")
    if scheme not in ("", "http", "https") or not host or not port.isdigit():
        raise ValueError(f"etcd endpoint {endpoint!r} is not host:port")
