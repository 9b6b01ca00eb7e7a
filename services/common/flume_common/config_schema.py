"""The settings of a cluster as one typed schema: type, range, unit, default, meaning, who reads it. Pure.

`Values` is the schema; `SETTINGS` says the same for those who list or validate. A setting that one
service reads lives under that service's scope; one that several read lives under `cluster`, and each
reader's own scope may override it. Not here: where settings are kept (`config_store.py`) and how a
service follows them (`config_watch.py`).

* ConfigError
  + UnknownSetting   no such setting, or not in that scope
  + InvalidValue     not of the setting's type, or outside its range
  + Contradiction    two settings that can't be true together
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta

from flume_common.telemetry import LEVELS, Level

Value = int | float | str
Microbatches = Literal["auto", "1", "2"]
MICROBATCHES: tuple[Microbatches, ...] = get_args(Microbatches)


class Scope(StrEnum):
    """Where a setting holds: everywhere, or for one service."""

    CLUSTER = "cluster"
    ATTENTION = "attention"
    WEIGHT = "weight"
    ROUTER = "router"
    CONTROLLER = "controller"


_EVERYONE = (Scope.ATTENTION, Scope.WEIGHT, Scope.ROUTER, Scope.CONTROLLER)


def _read_by(*readers: Scope, unit: str = "", choices: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"readers": readers, "unit": unit, "choices": choices}


class Values(msgspec.Struct, frozen=True, kw_only=True):
    """Every setting's value, as one service sees it."""

    log_level: Annotated[
        Level,
        Meta(
            description="Least important log line that is printed.",
            extra=_read_by(*_EVERYONE, choices=LEVELS),
        ),
    ] = "info"
    tpot_slo_ms: Annotated[
        float,
        Meta(
            ge=0,
            le=60_000,
            description="Time per output token that the autoscaler keeps; 0: it looks at memory alone.",
            extra=_read_by(Scope.CONTROLLER, unit="ms"),
        ),
    ] = 0.0
    watermark_ratio: Annotated[
        float,
        Meta(
            ge=0.05,
            le=1,
            description="Share of a node's budget at which the autoscaler counts it as full.",
            extra=_read_by(Scope.CONTROLLER, unit="ratio"),
        ),
    ] = 0.8
    min_replicas: Annotated[
        int,
        Meta(
            ge=1,
            le=64,
            description="Fewest attention nodes the autoscaler asks for, whatever `autoscale --min` says.",
            extra=_read_by(Scope.CONTROLLER, unit="nodes"),
        ),
    ] = 1
    max_replicas: Annotated[
        int,
        Meta(
            ge=1,
            le=64,
            description="Most attention nodes the autoscaler asks for, whatever `autoscale --max` says.",
            extra=_read_by(Scope.CONTROLLER, unit="nodes"),
        ),
    ] = 64
    cooldown_s: Annotated[
        float,
        Meta(
            ge=0,
            le=86_400,
            description="How long the autoscaler waits after a change before it scales down.",
            extra=_read_by(Scope.CONTROLLER, unit="s"),
        ),
    ] = 60.0
    tail_margin_tokens: Annotated[
        int,
        Meta(
            ge=1,
            le=1_000_000,
            description="A tail moves to a node that holds this many tokens less, once it is as long.",
            extra=_read_by(Scope.WEIGHT, unit="tokens"),
        ),
    ] = 128
    mixed_prefill_tokens: Annotated[
        int,
        Meta(
            ge=1,
            le=65_536,
            description="Prompt tokens of a step that also decodes, within what a node started with.",
            extra=_read_by(Scope.WEIGHT, unit="tokens"),
        ),
    ] = 128
    step_target_ms: Annotated[
        float,
        Meta(
            ge=0,
            le=60_000,
            description="How long a step with prompt tokens should last, by measured speed; 0: any time.",
            extra=_read_by(Scope.WEIGHT, unit="ms"),
        ),
    ] = 300.0
    microbatches: Annotated[
        Microbatches,
        Meta(
            description="Parts of a step on a GPU, within what a node started with; auto: what is faster.",
            extra=_read_by(Scope.WEIGHT, choices=MICROBATCHES),
        ),
    ] = "auto"
    request_deadline_s: Annotated[
        float,
        Meta(
            ge=1,
            le=86_400,
            description="A request that runs longer is ended with an error. Counts for new requests.",
            extra=_read_by(Scope.ROUTER, unit="s"),
        ),
    ] = 600.0
    max_waiting_requests: Annotated[
        int,
        Meta(
            ge=1,
            le=100_000,
            description="Requests of a router without a first token; more are refused with Retry-After.",
            extra=_read_by(Scope.ROUTER, unit="requests"),
        ),
    ] = 256
    unavailable_wait_s: Annotated[
        float,
        Meta(
            ge=0,
            le=600,
            description="How long a new request waits while no weight node can serve; then it is refused.",
            extra=_read_by(Scope.WEIGHT, Scope.ROUTER, unit="s"),
        ),
    ] = 5.0
    canary_interval_s: Annotated[
        float,
        Meta(
            ge=0,
            le=3600,
            description="How long a weight node may be idle before a router proves that it works; 0: never.",
            extra=_read_by(Scope.ROUTER, unit="s"),
        ),
    ] = 10.0
    step_timeout_s: Annotated[
        float,
        Meta(
            ge=0.1,
            le=600,
            description="An attention node that does not answer a step for so long is lost.",
            extra=_read_by(Scope.WEIGHT, unit="s"),
        ),
    ] = 10.0


class ConfigError(ValueError):
    """Base of what can be wrong with a setting."""


class UnknownSetting(ConfigError):
    def __init__(self, name: str, known: tuple[str, ...]) -> None:
        super().__init__(f"there is no setting {name!r}; there are: {', '.join(known)}")
        self.name = name
        self.known = known


class InvalidValue(ConfigError):
    def __init__(self, path: Path, text: str, expected: str) -> None:
        super().__init__(f"{path.name} must be {expected}, got {text!r}")
        self.path = path
        self.text = text


class Contradiction(ConfigError):
    def __init__(self, message: str, keys: frozenset[str]) -> None:
        super().__init__(message)
        self.keys = keys


@dataclass(frozen=True, slots=True, order=True)
class Path:
    """One place for a value: `config/<scope>/<key>`."""

    scope: Scope
    key: str

    @property
    def name(self) -> str:
        return f"{self.scope}/{self.key}"


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting of the schema."""

    key: str
    type: type[Any]
    default: Value
    description: str
    unit: str
    readers: tuple[Scope, ...]
    choices: tuple[str, ...] = ()
    least: float = 0.0
    most: float = 0.0

    @property
    def scopes(self) -> tuple[Scope, ...]:
        """Where it may be set; the first is where it is set unless another one is named."""
        return (Scope.CLUSTER, *self.readers) if len(self.readers) > 1 else self.readers

    @property
    def range(self) -> str:
        """What is allowed, for people."""
        if self.choices:
            return ", ".join(self.choices)
        return f"{format_value(self.least)} to {format_value(self.most)}"

    @property
    def expected(self) -> str:
        """The type and the range, for the end of `must be`."""
        if self.choices:
            return f"one of {self.range}"
        kind = "a whole number" if self.type is int else "a number"
        unit = f" {self.unit}" if self.unit not in ("", "ratio") else ""
        return f"{kind} from {self.range}{unit}"


def _setting(field: msgspec.inspect.Field) -> Setting:
    meta = field.type
    assert isinstance(meta, msgspec.inspect.Metadata) and meta.extra is not None, field
    kind = meta.type
    return Setting(
        key=field.name,
        type=type(field.default),
        default=field.default,
        description=str((meta.extra_json_schema or {})["description"]),
        unit=meta.extra["unit"],
        readers=meta.extra["readers"],
        choices=meta.extra["choices"],
        least=getattr(kind, "ge", 0),
        most=getattr(kind, "le", 0),
    )


def _settings() -> dict[str, Setting]:
    schema = msgspec.inspect.type_info(Values)
    assert isinstance(schema, msgspec.inspect.StructType)
    return {field.name: _setting(field) for field in schema.fields}


SETTINGS: Mapping[str, Setting] = _settings()
"""By key, in the order of `Values`."""


def path_of(name: str) -> Path:
    """`weight/step_timeout_s`, or `step_timeout_s` where it is set by default. Raises UnknownSetting."""
    scope, _, key = name.rpartition("/")
    setting = SETTINGS.get(key)
    if setting is None or scope not in ("", *setting.scopes):
        known = tuple(Path(place, item.key).name for item in SETTINGS.values() for place in item.scopes)
        raise UnknownSetting(name, known)
    return Path(Scope(scope) if scope else setting.scopes[0], key)


def parse(path: Path, text: str) -> Value:
    """The value that `text` says. Raises InvalidValue."""
    setting = SETTINGS[path.key]
    value = _read(setting, text.strip())
    if value is None:
        raise InvalidValue(path, text, setting.expected)
    return value


def _read(setting: Setting, text: str) -> Value | None:
    if setting.choices:
        return text if text in setting.choices else None
    try:
        number = int(text) if setting.type is int else float(text)
    except ValueError:
        return None
    return number if setting.least <= number <= setting.most else None


def format_value(value: Value) -> str:
    """As it is stored and shown: 2 rather than 2.0."""
    return f"{value:.15g}" if isinstance(value, float) else str(value)


def contradiction(values: Values) -> Contradiction | None:
    """What can't be true together."""
    if values.min_replicas > values.max_replicas:
        return Contradiction(
            f"min_replicas is {values.min_replicas}, above max_replicas, which is {values.max_replicas}",
            frozenset({"min_replicas", "max_replicas"}),
        )
    return None
