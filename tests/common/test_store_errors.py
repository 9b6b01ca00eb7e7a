"""What a failed call means; judged from status and words alone."""

import grpc
import pytest
from flume_common.store.errors import Verdict, verdict

CODE = grpc.StatusCode


@pytest.mark.parametrize(
    "code, detail, judged",
    [
        (CODE.UNAVAILABLE, "failed to connect to all addresses; last error: refused", Verdict.NOT_DONE),
        (CODE.UNAVAILABLE, "etcdserver: no leader", Verdict.NOT_DONE),
        (CODE.RESOURCE_EXHAUSTED, "etcdserver: too many requests", Verdict.NOT_DONE),
        (CODE.UNAVAILABLE, "etcdserver: request timed out", Verdict.UNKNOWN),
        (CODE.UNAVAILABLE, "etcdserver: leader changed", Verdict.UNKNOWN),
        (CODE.UNAVAILABLE, "Socket closed", Verdict.UNKNOWN),
        (CODE.DEADLINE_EXCEEDED, "Deadline Exceeded", Verdict.UNKNOWN),
        (CODE.CANCELLED, "CANCELLED", Verdict.UNKNOWN),
        (CODE.UNKNOWN, "raft: stopped", Verdict.UNKNOWN),
        (CODE.UNAUTHENTICATED, "etcdserver: invalid auth token", Verdict.NEW_TOKEN),
        (CODE.NOT_FOUND, "etcdserver: requested lease not found", Verdict.NO_LEASE),
        (CODE.PERMISSION_DENIED, "etcdserver: permission denied", Verdict.REFUSED),
        (CODE.INVALID_ARGUMENT, "etcdserver: duplicate key given in txn request", Verdict.REFUSED),
        (CODE.RESOURCE_EXHAUSTED, "etcdserver: mvcc: database space exceeded", Verdict.REFUSED),
    ],
)
def test_only_what_surely_did_not_happen_may_be_repeated(code, detail, judged):
    assert verdict(code, detail) is judged
