"""What operators want and what the controller last saw, as the JSON values of etcd.

`spec/attention` is written by operators (through the admin API), `status/attention` by the controller
alone. Not here: reading or writing them (`desired.py`, `reconcile.py`).
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec

Count = Annotated[int, msgspec.Meta(ge=0)]

MAX_ATTENTION_NODES = 64
"""Upper bound of a new spec: a typing error in a scale should not start ten thousand processes."""


class Actor(StrEnum):
    """Who set the desired count."""

    DEFAULT = "default"  # nobody yet: the controller's own start value
    USER = "user"
    AUTOSCALER = "autoscaler"
    KUBERNETES = "kubernetes"


class AttentionSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The desired number of attention nodes. Raises ValueError when it lies outside its own bounds."""

    desired: Count
    min: Count = 0
    max: Count = MAX_ATTENTION_NODES
    set_by: Actor = Actor.DEFAULT
    generation: Annotated[int, msgspec.Meta(ge=1)] = 1
    """Goes up by one with every change of the wish, and only then."""
    updated_at_s: float = 0.0
    """Unix time of that change."""

    def __post_init__(self) -> None:
        if not self.min <= self.desired <= self.max:
            raise ValueError(f"desired is {self.desired}, the bounds are {self.min} to {self.max}")


class ConditionStatus(StrEnum):
    TRUE = "True"
    FALSE = "False"
    UNKNOWN = "Unknown"


class Condition(msgspec.Struct, frozen=True, kw_only=True):
    """One statement about the fleet, in the form Kubernetes operators know."""

    type: str
    """`Available`, `Progressing` or `Degraded`."""
    status: ConditionStatus
    reason: str
    """One CamelCase word."""
    message: str
    last_transition_time_s: float
    """Unix time at which `status` last changed; a new reason or message alone leaves it."""


class AttentionStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What the controller saw at the end of its last pass."""

    observed_generation: int
    """The spec generation that pass acted on; older than the spec's means this status is stale."""
    desired: Count
    ready: Count
    preparing: Count
    draining: Count
    conditions: tuple[Condition, ...] = ()


def encode(value: AttentionSpec | AttentionStatus) -> bytes:
    return msgspec.json.encode(value)


def decode_spec(value: bytes) -> AttentionSpec:
    """Raises msgspec.ValidationError naming the field."""
    return msgspec.json.decode(value, type=AttentionSpec)


def decode_status(value: bytes) -> AttentionStatus:
    """Raises msgspec.ValidationError naming the field."""
    return msgspec.json.decode(value, type=AttentionStatus)
