"""What `flumectl up` was asked for, and how the next `up` of the same cluster takes it up again."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from flume_common.etcd_flags import store_config
from flume_common.store import StoreConfig

from flume_controller import own_etcd
from flume_controller.cluster_files import DEFAULT_DATA_DIR, DEFAULT_NAME, ClusterFiles

DEFAULT_MODEL = "smollm2-135m"
LOOPBACK = "127.0.0.1"

Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]


class ClusterConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What `flumectl up` was asked for."""

    name: str = DEFAULT_NAME
    data_dir: Path = DEFAULT_DATA_DIR
    model: str = DEFAULT_MODEL
    model_name: str = ""  # empty: the model's own
    weights: Annotated[int, msgspec.Meta(ge=1)] = 1
    attention: Annotated[int, msgspec.Meta(ge=0)] = 1
    set_attention: bool = False
    """Whether `attention` is to be set even where the cluster has a number of its own."""
    standby: Annotated[int, msgspec.Meta(ge=0)] = 0
    zygote: bool = True
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    device: Literal["cpu", "cuda"] = "cpu"
    hop: Literal["auto", "frames"] = "auto"  # as of a weight node
    kv_memory: str = ""  # empty: the attention node's default
    kv_measured: bool = False
    """Whether that was not asked for, but is a part of the GPU memory that was free."""
    weight_args: tuple[str, ...] = ()  # more options for every weight node
    host: str = LOOPBACK
    node_host: str = LOOPBACK  # where nodes listen for one another
    http_port: Port = 8000
    cors_origins: str = ""
    """Pages whose scripts may call the HTTP API; as of a router. Empty: none."""
    admin_port: Port = 9400
    metrics_port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0  # of the controller; 0: a free one
    etcd_port: Port = 2379
    etcd: str = ""  # endpoints of an existing one; empty: run our own
    etcd_ca: str = ""  # how to get in there; see flume_common.etcd_flags
    etcd_cert: str = ""
    etcd_key: str = ""
    etcd_user: str = ""
    timeout_s: float = 120.0

    @property
    def files(self) -> ClusterFiles:
        return ClusterFiles(self.data_dir, self.name)

    @property
    def endpoints(self) -> str:
        """Where its services reach etcd."""
        return self.etcd or own_etcd.endpoint(self.files)

    @property
    def store(self) -> StoreConfig:
        """Raises ValueError naming --etcd."""
        if not self.etcd:
            return StoreConfig.parse(self.endpoints)
        return store_config(msgspec.structs.asdict(self))

    @property
    def admin_address(self) -> str:
        return f"{LOOPBACK}:{self.admin_port}"

    @property
    def http_url(self) -> str:
        host = LOOPBACK if self.host in ("0.0.0.0", "::", "") else self.host
        return f"http://{host}:{self.http_port}"

    @property
    def ports(self) -> dict[str, tuple[str, int]]:
        """Where it listens, by the flag that says so: host and port."""
        own = {} if self.etcd else {"--etcd-port": (LOOPBACK, self.etcd_port)}
        return {
            "--http-port": (self.host, self.http_port),
            "--admin-port": (LOOPBACK, self.admin_port),
            **({"--metrics-port": (LOOPBACK, self.metrics_port)} if self.metrics_port else {}),
            **own,
        }


_NOT_RECORDED = frozenset({"name", "data_dir", "set_attention", "kv_measured", "timeout_s"})
"""Where the record is, and what is of one `up` only."""
_DEFAULTS = msgspec.structs.asdict(ClusterConfig())


class UnreadableConfig(Exception):
    """What the last `up` recorded is not to be read."""


def encode(config: ClusterConfig) -> str:
    return msgspec.json.encode(config, enc_hook=str).decode()


def decode(text: str) -> ClusterConfig:
    return msgspec.json.decode(text, type=ClusterConfig, dec_hook=lambda _, value: Path(value))


def recorded(config: ClusterConfig) -> dict[str, Any]:
    """What it runs with: the settings that are not the defaults, as JSON has them."""
    given = _as_json(config)
    return {
        name: value
        for name, value in given.items()
        if name not in _NOT_RECORDED and getattr(config, name) != _DEFAULTS[name]
    }


def to_keep(config: ClusterConfig) -> dict[str, Any]:
    """What an `up` takes up again once no process of this one runs any more."""
    kept = recorded(config)
    if config.kv_measured:
        kept.pop("kv_memory", None)
    return kept


def resumed(settings: Mapping[str, Any], given: Collection[str], record: Mapping[str, Any]) -> ClusterConfig:
    """The settings of which those not `given` now come from the record. Raises UnreadableConfig.

    What a record has of settings that this version does not know is passed over.
    """
    known = {
        name: value
        for name, value in record.items()
        if name in _DEFAULTS and name not in _NOT_RECORDED and name not in given
    }
    asked = _as_json(ClusterConfig(**settings))
    try:
        return msgspec.convert(asked | known, type=ClusterConfig, dec_hook=lambda _, value: Path(value))
    except msgspec.ValidationError as error:
        raise UnreadableConfig(str(error)) from error


def differences(config: ClusterConfig, given: Collection[str], record: Mapping[str, Any]) -> list[str]:
    """The flags given now that say something else than the record, but for those of one `up` only."""
    there = _as_json(ClusterConfig()) | dict(record)
    asked = _as_json(config)
    # The number of attention nodes can be changed while they run.
    fixed = set(given) - _NOT_RECORDED - {"attention"}
    return [flag_of(name) for name in _DEFAULTS if name in fixed and asked[name] != there[name]]


def _as_json(config: ClusterConfig) -> dict[str, Any]:
    return msgspec.json.decode(encode(config), type=dict[str, Any])


def flag_of(field: str) -> str:
    return "--weight" if field == "weights" else f"--{field.replace('_', '-')}"


def as_flags(record: Mapping[str, Any]) -> str:
    """A record as people would type it."""
    words = []
    for field, value in record.items():
        if isinstance(value, bool):
            words.append(flag_of(field) if value else flag_of(f"no_{field}"))
        elif isinstance(value, list):
            words += [f"{flag_of(field)} {item}" for item in value]
        else:
            words.append(f"{flag_of(field)} {value}")
    return " ".join(words)
