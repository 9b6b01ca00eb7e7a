"""etcd for the control plane: one thin asyncio client, and what is built on it.

    client     keys, transactions, leases; every call with a deadline
    watch      a prefix and all changes to it, without a gap
    lease      a lease renewed while a block runs
    view       decoded values under a prefix, kept up to date
    values     keys, conditions, operations: values only
    transport  endpoints, retries that are safe, login
    errors     what a failed call means

No token path waits for anything here.
"""

from flume_common.store.client import LeaseGrant, Store, StoreStatus, connect
from flume_common.store.config import StoreConfig
from flume_common.store.errors import (
    LeaseLost,
    OutcomeUnknown,
    StoreError,
    StoreRefused,
    StoreUnavailable,
    TxnTooLarge,
)
from flume_common.store.lease import HeldLease, hold_lease
from flume_common.store.values import (
    MAX_TXN_OPS,
    Compare,
    Delete,
    DeletePrefix,
    Get,
    GetPrefix,
    KeyValue,
    Op,
    OpResult,
    Put,
    Snapshot,
    TxnResult,
    absent,
    create_revision,
    mod_revision,
    value,
    version,
)
from flume_common.store.view import View, live
from flume_common.store.watch import Added, Batch, Change, Changed, Removed, Watch

__all__ = [
    "MAX_TXN_OPS",
    "Added",
    "Batch",
    "Change",
    "Changed",
    "Compare",
    "Delete",
    "DeletePrefix",
    "Get",
    "GetPrefix",
    "HeldLease",
    "KeyValue",
    "LeaseGrant",
    "LeaseLost",
    "Op",
    "OpResult",
    "OutcomeUnknown",
    "Put",
    "Removed",
    "Snapshot",
    "Store",
    "StoreConfig",
    "StoreError",
    "StoreRefused",
    "StoreStatus",
    "StoreUnavailable",
    "TxnResult",
    "TxnTooLarge",
    "View",
    "Watch",
    "absent",
    "connect",
    "create_revision",
    "hold_lease",
    "live",
    "mod_revision",
    "value",
    "version",
]
