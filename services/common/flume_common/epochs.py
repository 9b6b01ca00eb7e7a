"""Epochs as one number that a process can compare: fencing tokens over several incarnations. Pure.

An epoch is a pair, the cluster's incarnation and a revision of etcd within it (`incarnation.py`). As
incarnations have no order, each process counts those it has seen; its numbers mean nothing to another one.

    bits 48 and up: how many incarnations this process has seen before    bits 0 to 47: revision of etcd
"""

from __future__ import annotations

REVISION_BITS = 48


def epoch_of(ordinal: int, revision: int) -> int:
    """The epoch of a revision in the incarnation of that ordinal. Raises ValueError for no revision."""
    if not 0 <= revision < 1 << REVISION_BITS:
        raise ValueError(f"epoch {revision} is no revision of etcd")
    return ordinal << REVISION_BITS | revision


def revision_of(epoch: int) -> int:
    """What people call the epoch: the revision of etcd."""
    return epoch & ((1 << REVISION_BITS) - 1)
