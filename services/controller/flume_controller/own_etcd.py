"""The etcd that `flumectl up` runs: its command line, where it is reached, and what its end means.

It listens on sockets in the cluster's private directory and on no port, so that nobody but our user may
read or write it; `etcd_door` lets tools of our user in by a port. Its data outlives it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flume_common.etcd_binary import etcd_command, find_etcd
from flume_common.store.config import UNIX

from flume_controller.cluster_files import ClusterFiles

ID = ROLE = "etcd"
CLIENT_SOCKET, PEER_SOCKET = "etcd.sock:0", "peer.sock:0"
"""etcd takes only names of the form host:port, and understands them from its working directory."""

_BOUNDED = ("--max-wals=2", "--max-snapshots=2", "--snapshot-count=10000")
_ALONE = ("--heartbeat-interval=100", "--election-timeout=500")
"""It has nobody to wait for: twice as soon ready again as by default."""

_NO_SPACE = "no space left on device"
_UNREADABLE = (
    "crc mismatch",
    "checksum error",
    "walpb:",
    "wal: ",
    "snap: ",
    "failed to open WAL",
    "failed to read WAL",
    "failed to recover",
    "invalid database",
    "database file",
    "unexpected EOF",
    "freelist",
    "freepages",
)


def socket(files: ClusterFiles) -> Path:
    return files.sockets / CLIENT_SOCKET


def endpoint(files: ClusterFiles) -> str:
    return f"{UNIX}{socket(files)}"


def command(files: ClusterFiles) -> list[str]:
    """To be run in the directory of the cluster's sockets. Raises EtcdNotFound."""
    client, peer = f"{UNIX}{CLIENT_SOCKET}", f"{UNIX}{PEER_SOCKET}"
    data = files.etcd.resolve()
    return etcd_command(find_etcd(), data, client=client, peer=peer, args=(*_BOUNDED, *_ALONE))


def ran_out_of_space(last_lines: Sequence[str]) -> bool:
    """Whether the last lines of a log say that the disk was full."""
    return any(_NO_SPACE in line for line in last_lines)


def remedy(files: ClusterFiles, last_lines: Sequence[str]) -> str:
    """What to do about an etcd that ended with these lines; empty where they do not tell."""
    if ran_out_of_space(last_lines):
        return f"the disk of {files.directory} is full: free some space, then `flumectl up` again"
    if any(mark in line for line in last_lines for mark in _UNREADABLE):
        return (
            f"its data in {files.etcd} cannot be read: put a copy of it there, or forget what is in it "
            f"(number of nodes, settings, events) with `flumectl down --purge{files.flags}`"
        )
    return ""
