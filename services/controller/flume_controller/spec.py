"""What operators want and what the controller last saw, as the JSON values of etcd.

`spec/attention` is written by operators (through the admin API), `status/attention` by the controller
alone. Not here: reading or writing them (`desired.py`, `reconcile.py`).
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec

Count = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Revision = Annotated[int, msgspec.Meta(ge=0, le=2**53)]

MAX_ATTENTION_NODES = 64
"""Upper bound of a new spec: a typing error in a scale should not start ten thousand processes."""


class Actor(StrEnum):
    """Who set the desired count."""

    DEFAULT = "default"  # nobody yet: the controller's own start value
    USER = "user"
    AUTOSCALER = "autoscaler"
    KUBERNETES = "kubernetes"
    CONTROLLER = "controller"  # the return to the last good count after a scale that could not complete


class Autoscale(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the controller may set the desired count itself. Raises ValueError for crossed bounds."""

    enabled: bool = False
    min: Annotated[int, msgspec.Meta(ge=1)] = 1
    max: Annotated[int, msgspec.Meta(ge=1)] = MAX_ATTENTION_NODES
    paused: bool = False
    """Somebody has set the count by hand since, and it stays. Enabling it again ends this."""

    def __post_init__(self) -> None:
        if self.min > self.max:
            raise ValueError(f"autoscale bounds are {self.min} to {self.max}")

    @property
    def active(self) -> bool:
        return self.enabled and not self.paused


class Deadline(msgspec.Struct, frozen=True, kw_only=True):
    """How long nodes that leave may take; what they hold then is lost and computed again."""

    within_s: Annotated[float, msgspec.Meta(gt=0)]
    by_s: float
    """Unix time: `within_s` after the wish was made."""


class AttentionSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The desired number of attention nodes. Raises ValueError when it lies outside its own bounds."""

    desired: Count
    min: Count = 0
    max: Count = MAX_ATTENTION_NODES
    set_by: Actor = Actor.DEFAULT
    generation: Annotated[int, msgspec.Meta(ge=1, le=2**53)] = 1
    """Goes up by one with every change of the wish, and only then."""
    updated_at_s: float = 0.0
    """Unix time of that change."""
    autoscale: Autoscale = Autoscale()
    scale_deadline: Deadline | None = None
    """For nodes that leave because of the count. None: as long as their sequences take."""
    drained: tuple[str, ...] = ()
    """Nodes that operators want emptied and gone, whatever the count; the controller never edits it."""
    drain_deadlines: dict[str, Deadline] = {}
    """Of those of `drained` that have one."""

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
    observed_generation: Revision = 0
    """The spec generation this statement is about."""


class GaveUp(msgspec.Struct, frozen=True, kw_only=True):
    """A scale that could not complete in time; kept until somebody sets another count."""

    generation: Revision  # of the spec that asked for it
    wanted: Count
    returned_to: Count
    at_s: float  # Unix time


class Unready(msgspec.Struct, frozen=True):
    """Why a node that says READY is none."""

    state: str  # PREPARING or UNREACHABLE
    reason: str  # one CamelCase word


class AttentionStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What the controller saw at the end of its last pass."""

    observed_generation: Revision
    """The spec generation that pass acted on; older than the spec's means this status is stale."""
    desired: Count
    ready: Count
    preparing: Count
    draining: Count
    conditions: tuple[Condition, ...] = ()
    last_good: Count | None = None
    """The last desired count of which all nodes were ready; None before the first."""
    progressed_at_s: float = 0.0
    """Unix time of the last progress towards the desired count: a new generation, or one more ready node."""
    gave_up: GaveUp | None = None
    unready: dict[str, Unready] = {}
    """Attention nodes whose own record says READY and that do not count, by id."""
    leader: str = ""
    """Id of the controller that wrote this."""
    epoch: Revision = 0
    """Its fencing number: the create revision of its election key."""


def encode(value: AttentionSpec | AttentionStatus) -> bytes:
    return msgspec.json.encode(value)


def decode_spec(value: bytes) -> AttentionSpec:
    """Raises msgspec.ValidationError naming the field."""
    return msgspec.json.decode(value, type=AttentionSpec)


def decode_status(value: bytes) -> AttentionStatus:
    """Raises msgspec.ValidationError naming the field."""
    return msgspec.json.decode(value, type=AttentionStatus)
