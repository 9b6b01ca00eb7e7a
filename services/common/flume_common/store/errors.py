"""What can go wrong between us and etcd, and what a failed call means.

* StoreError
  + StoreUnavailable   etcd was not reached or did not answer, and nothing was changed; trying again may help
  + OutcomeUnknown     a write may have happened or not; read back before doing it again
  + LeaseLost          etcd no longer knows the lease: its keys are gone
  + StoreRefused       etcd said no (permission, password, arguments, quota); trying again does not help
  + TxnTooLarge        more operations than etcd takes in one transaction; nothing was sent

An error of transport says little by itself, so `verdict` reads it once, here.
"""

from __future__ import annotations

from enum import Enum, auto

import grpc


class StoreError(Exception):
    """Base of every error the store raises on purpose."""


class StoreUnavailable(StoreError):
    """etcd did not answer in time, and the call changed nothing."""

    def __init__(self, call: str, detail: str) -> None:
        super().__init__(f"etcd unavailable for {call}: {detail}")
        self.call = call
        self.detail = detail


class OutcomeUnknown(StoreError):
    """The write was sent and no answer came: it may be applied already, later, or never."""

    def __init__(self, call: str, detail: str) -> None:
        super().__init__(f"etcd gave no answer to {call}, it may have happened: {detail}")
        self.call = call
        self.detail = detail


class LeaseLost(StoreError):
    """The lease expired or was revoked, and its keys with it."""

    def __init__(self, lease: int) -> None:
        super().__init__(f"etcd no longer knows lease {lease:x}")
        self.lease = lease


class StoreRefused(StoreError):
    """etcd answered with an error of ours to mend."""

    def __init__(self, call: str, code: grpc.StatusCode, detail: str) -> None:
        super().__init__(f"etcd refused {call}: {detail} ({code.name})")
        self.call = call
        self.code = code
        self.detail = detail


class TxnTooLarge(StoreError):
    """etcd's --max-txn-ops is 128 unless changed."""

    def __init__(self, operations: int, limit: int) -> None:
        super().__init__(f"a transaction of {operations} operations; etcd takes at most {limit}")
        self.operations = operations
        self.limit = limit


class Verdict(Enum):
    """What a failed call means for the caller."""

    NOT_DONE = auto()  # surely not applied: any call may be repeated
    UNKNOWN = auto()  # may have been applied: only a read may be repeated
    NEW_TOKEN = auto()  # not applied, our login has run out
    NO_LEASE = auto()
    REFUSED = auto()


# gRPC says the first when it never had a connection to send the call on; etcd says the others
# before it proposes anything to its log.
_NOT_DONE = (
    "failed to connect to all addresses",
    "etcdserver: no leader",
    "etcdserver: too many requests",
    "etcdserver: not leader",
    "etcdserver: rpc not supported for learner",
)
_NEW_TOKEN = ("etcdserver: invalid auth token", "etcdserver: revision of auth store is old")
_TRANSPORT = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.ABORTED,
}


def verdict(code: grpc.StatusCode, detail: str) -> Verdict:
    """Judge a failed call by its status. When in doubt it says UNKNOWN."""
    if detail.startswith(_NOT_DONE):
        return Verdict.NOT_DONE
    if detail.startswith(_NEW_TOKEN):
        return Verdict.NEW_TOKEN
    if "requested lease not found" in detail:
        return Verdict.NO_LEASE
    return Verdict.UNKNOWN if code in _TRANSPORT else Verdict.REFUSED
