"""What the parts of the admin API share: what they read, and the status of errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc
from flume_common.incarnation import Incarnation
from flume_common.keys import Keys
from flume_common.membership import Members
from flume_common.store import Store, StoreError, StoreRefused

from flume_controller.desired import InvalidSpec, NotCurrent, OutOfBounds, RevisionChanged, SpecConflict
from flume_controller.event_store import Events
from flume_controller.lead import LedProvider
from flume_controller.nodes import GrpcNodes
from flume_controller.views import Report, Wish

STORE_STATUS_OF: dict[type[Exception], grpc.StatusCode] = {
    StoreRefused: grpc.StatusCode.FAILED_PRECONDITION,
    StoreError: grpc.StatusCode.UNAVAILABLE,
}
SPEC_STATUS_OF: dict[type[Exception], grpc.StatusCode] = {
    OutOfBounds: grpc.StatusCode.INVALID_ARGUMENT,
    NotCurrent: grpc.StatusCode.FAILED_PRECONDITION,
    InvalidSpec: grpc.StatusCode.FAILED_PRECONDITION,
    RevisionChanged: grpc.StatusCode.ABORTED,
    SpecConflict: grpc.StatusCode.ABORTED,
    **STORE_STATUS_OF,
}
"""The first entry that an error is an instance of counts."""

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class Sources:
    """Everything the admin API reads."""

    store: Store
    keys: Keys
    members: Members
    wish: Wish
    report: Report
    provider: LedProvider
    nodes: GrpcNodes
    events: Events
    incarnation: Incarnation
