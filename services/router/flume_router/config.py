"""Router settings: one frozen object, read once from the command line, passed down by hand."""

from __future__ import annotations

import argparse
import os
import re
import socket
from collections.abc import Sequence

import msgspec
from flume_common.etcd_flags import add_etcd_flags, store_config
from flume_common.store import StoreConfig
from flume_common.telemetry import LEVELS

_EXAMPLES = """\
examples:
  python -m flume_router --etcd 127.0.0.1:2379 --model smollm2-135m
      the built-in demo model, on http://0.0.0.0:8000
  python -m flume_router --etcd etcd-0:2379,etcd-1:2379 --model /models/Llama-3.1-8B --model-name llama-3.1-8b
      a Hugging Face directory (only its tokenizer and chat template are read), under a name of your choice
  curl http://127.0.0.1:8000/v1/chat/completions -H 'content-type: application/json' \\
      -d '{"model": "smollm2-135m", "messages": [{"role": "user", "content": "Hello"}], "stream": true}'

--model-name must be the one the weight nodes were started with.
"""

_POSITIVE = (
    "request_deadline_s",
    "silence_s",
    "lease_ttl_s",
    "max_waiting_requests",
    "body_limit_bytes",
    "body_budget_bytes",
    "header_timeout_s",
    "body_timeout_s",
    "idle_timeout_s",
    "write_timeout_s",
    "readers",
    "reading_timeout_s",
)


class RouterConfig(msgspec.Struct, frozen=True, kw_only=True):
    cluster: str
    node: str
    store: StoreConfig
    model: str
    model_name: str
    """Empty: as the model argument calls it."""
    listen_http: str
    listen_grpc: str
    advertise_host: str
    """Where others dial us; empty: as the listen addresses say."""

    request_deadline_s: float
    """A request still running after this is ended with an error, so that nothing hangs for ever."""

    resume_s: float
    """How long an answer may stand still, once its weight node failed, before it ends with an error."""

    silence_s: float
    """A weight node whose engine makes no progress for so long has failed, however long its steps last."""

    drain_s: float
    """How long open requests may run after SIGTERM. Keep below the pod's grace period."""

    lease_ttl_s: float
    """How long others count on a router that died without saying so."""

    max_waiting_requests: int
    """More requests than that without a first token are refused."""

    body_limit_bytes: int
    body_budget_bytes: int
    """Of all request bodies that are being received or read."""

    header_timeout_s: float
    body_timeout_s: float
    idle_timeout_s: float
    write_timeout_s: float
    max_connections: int
    """0: as many as the limit of open files allows, and not more than are sensible."""

    cors_origins: tuple[str, ...]
    parse_control_tokens: bool
    """Control tokens in the texts of chat messages are control tokens."""

    readers: int
    """Most processes that read large requests."""

    reading_timeout_s: float
    """Longest that such a process may take for one request."""

    log_level: str

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name.replace('_', '-')} must be above 0, got {getattr(self, name)}")
        for name in ("drain_s", "resume_s", "max_connections"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"--{name.replace('_', '-')} must not be negative, got {getattr(self, name)}"
                )
        for name in ("listen_http", "listen_grpc"):
            _require_address(name, getattr(self, name))


def _require_address(name: str, address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"--{name.replace('_', '-')} must be host:port, got {address!r}")


def parse(arguments: Sequence[str] | None = None) -> RouterConfig:
    """Raises ValueError naming the flag; argparse ends the process for what it finds itself."""
    given = _parser().parse_args(arguments)
    store = store_config(vars(given))
    plain = {name: value for name, value in vars(given).items() if not name.startswith("etcd")}
    return RouterConfig(store=store, **plain)


def _origins(text: str) -> tuple[str, ...]:
    origins = tuple(origin.strip().rstrip("/") for origin in text.split(",") if origin.strip())
    for origin in origins:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
            raise argparse.ArgumentTypeError(f"{origin!r} is no origin; write scheme://host[:port], or *")
    return origins


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flume_router",
        description="The router: an OpenAI-compatible HTTP API and a gRPC one in front of the weight nodes.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_cluster_flags(parser)
    _add_serving_flags(parser)
    _add_limit_flags(parser)
    return parser


def _add_cluster_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("cluster").add_argument
    add("--cluster", default="default", help="cluster name, part of every etcd key (default: %(default)s)")
    add("--node", default=f"router-{socket.gethostname()}", help="this router's id (default: %(default)s)")
    add_etcd_flags(add)
    add("--lease-ttl-s", type=float, default=10.0, help="membership lease, seconds (default: %(default)s)")


def _add_serving_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("serving").add_argument
    add("--model", required=True, help="Hugging Face directory, .gguf file or smollm2-135m")
    add("--model-name", default="", help="what clients call it (default: the directory's or file's name)")
    add("--listen-http", default="0.0.0.0:8000", metavar="HOST:PORT", help="(default: %(default)s)")
    add(
        "--listen-grpc",
        default="127.0.0.1:0",
        metavar="HOST:PORT",
        help="port 0: a free one (default: %(default)s)",
    )
    add("--advertise-host", default="", help="host that others dial; default: that of the listen addresses")
    add(
        "--request-deadline-s",
        type=float,
        default=600.0,
        help="longest a request may take (default: %(default)s)",
    )
    add(
        "--resume-s",
        type=float,
        default=60.0,
        help="time to find another weight node for an answer whose own failed (default: %(default)s)",
    )
    add(
        "--silence-s",
        type=float,
        default=10.0,
        help="a weight node that makes no progress for so long has failed, however long its steps last "
        "(default: %(default)s)",
    )
    add(
        "--drain-s",
        type=float,
        default=30.0,
        help="time for open requests after SIGTERM (default: %(default)s)",
    )
    add(
        "--parse-control-tokens",
        action=argparse.BooleanOptionalAction,
        default=os.environ.get("FLUME_PARSE_CONTROL_TOKENS", "") not in ("", "0", "false"),
        help="control tokens in the texts of chat messages are control tokens, so that a user can forge "
        "turns; without it they are text (default: FLUME_PARSE_CONTROL_TOKENS, off)",
    )
    add(
        "--cors-origins",
        type=_origins,
        default=(),
        metavar="ORIGIN[,ORIGIN…]",
        help="pages whose scripts may call the API: https://chat.example,…; * for any (default: none)",
    )
    add("--log-level", choices=LEVELS, default="info", help="(default: %(default)s)")


def _add_limit_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("limits, beyond which a client is refused").add_argument
    add(
        "--max-waiting-requests",
        type=int,
        default=256,
        help="requests without a first token; more get 503 and Retry-After (default: %(default)s)",
    )
    add("--body-limit-bytes", type=int, default=4 << 20, help="largest request body (default: %(default)s)")
    add(
        "--body-budget-bytes",
        type=int,
        default=64 << 20,
        help="bodies of all requests that are being read (default: %(default)s)",
    )
    add(
        "--body-timeout-s",
        type=float,
        default=60.0,
        help="time for a request body to arrive (default: %(default)s)",
    )
    add(
        "--header-timeout-s",
        type=float,
        default=20.0,
        help="time for the first byte, and for the headers of a request (default: %(default)s)",
    )
    add(
        "--idle-timeout-s",
        type=float,
        default=75.0,
        help="a connection between two requests is closed after so long (default: %(default)s)",
    )
    add(
        "--write-timeout-s",
        type=float,
        default=60.0,
        help="a client that does not read its answer for so long is cut off (default: %(default)s)",
    )
    add(
        "--max-connections",
        type=int,
        default=0,
        help="HTTP connections; 0: up to 4096, as the limit of open files allows (default: %(default)s)",
    )
    add(
        "--readers",
        type=int,
        default=max(1, min(4, (os.cpu_count() or 1) // 2)),
        help="processes that read requests of 16 KiB and more (default here: %(default)s)",
    )
    add(
        "--reading-timeout-s",
        type=float,
        default=60.0,
        help="longest such a process may take for one request (default: %(default)s)",
    )
