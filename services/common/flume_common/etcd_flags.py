"""How a service is told where etcd is and how to get in: the same flags and environment for all of them.

    --etcd HOST:PORT[,…]   FLUME_ETCD
    --etcd-ca FILE         FLUME_ETCD_CA
    --etcd-cert FILE       FLUME_ETCD_CERT
    --etcd-key FILE        FLUME_ETCD_KEY
    --etcd-user NAME       FLUME_ETCD_USER       with its password in FLUME_ETCD_PASSWORD alone: command
                                                 lines can be read by everybody

Who starts other services hands the environment on, and with it all that it does not name itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flume_common.store.config import StoreConfig

PASSWORD = "FLUME_ETCD_PASSWORD"


class Flag(NamedTuple):
    name: str
    metavar: str
    help: str

    @property
    def field(self) -> str:
        return self.name.removeprefix("--").replace("-", "_")

    @property
    def variable(self) -> str:
        return f"FLUME_{self.field.upper()}"


ENDPOINTS = Flag("--etcd", "HOST:PORT[,…]", "endpoints of etcd, comma-separated")
SECURITY = (
    Flag("--etcd-ca", "FILE", "trust etcd servers signed by this CA (PEM)"),
    Flag("--etcd-cert", "FILE", "client certificate for etcd (PEM)"),
    Flag("--etcd-key", "FILE", "its key (PEM)"),
    Flag("--etcd-user", "NAME", f"log in to etcd under this name; the password is taken from {PASSWORD}"),
)
VARIABLES = tuple(flag.variable for flag in (ENDPOINTS, *SECURITY))
DEFAULT_ENDPOINTS = "127.0.0.1:2379"


def add_etcd_flags(add: Callable[..., object], env: Mapping[str, str] = os.environ) -> None:
    """`add` is an argument parser's `add_argument`, or a group's."""
    for flag in (ENDPOINTS, *SECURITY):
        default = env.get(flag.variable) or (DEFAULT_ENDPOINTS if flag is ENDPOINTS else "")
        said = f"default: {DEFAULT_ENDPOINTS}; " if flag is ENDPOINTS else ""
        text = f"{flag.help} ({said}env: {flag.variable})"
        add(flag.name, default=default, metavar=flag.metavar, help=text)


def store_config(given: Mapping[str, Any], env: Mapping[str, str] = os.environ) -> StoreConfig:
    """From parsed flags by field; those that are missing are taken from the environment.

    Raises ValueError naming the flag.
    """

    def value(flag: Flag) -> str:
        return given.get(flag.field) or env.get(flag.variable, "")

    ca, cert, key, user = map(value, SECURITY)
    if user and PASSWORD not in env:
        raise ValueError(f"--etcd-user {user}: its password is missing from {PASSWORD}")
    endpoints = (value(ENDPOINTS) or DEFAULT_ENDPOINTS).split(",")
    try:
        return StoreConfig(
            tuple(part.strip() for part in endpoints if part.strip()),
            ca_file=Path(ca) if ca else None,
            cert_file=Path(cert) if cert else None,
            key_file=Path(key) if key else None,
            user=user or None,
            password=env.get(PASSWORD) if user else None,
        )
    except ValueError as error:
        raise ValueError(f"--etcd: {error}") from error


def etcd_arguments(store: StoreConfig) -> list[str]:
    """The command line of a service that is to use the same etcd; the password goes by the environment."""
    values = (",".join(store.endpoints), store.ca_file, store.cert_file, store.key_file, store.user)
    named = zip((ENDPOINTS, *SECURITY), values, strict=True)
    return [word for flag, value in named if value for word in (flag.name, str(value))]
