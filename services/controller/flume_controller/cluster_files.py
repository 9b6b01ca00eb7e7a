"""Where a cluster of this machine keeps its files, and the one that says how to reach it.

<data dir>/<cluster>/cluster.json   what runs and where: ClusterRecord
                     lock           held by the `up` that runs it
                     run/<id>.json  one per process: processes.ProcessRecord
                     logs/<id>.log  their output
                     etcd/          the embedded etcd's data
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path

import msgspec
from flume_common.keys import check_name

from flume_controller import processes
from flume_controller.processes import ProcessRecord, RecordDir

DEFAULT_NAME = "default"
DEFAULT_DATA_DIR = Path("~/.local/share/kernelflume").expanduser()


class ClusterState(StrEnum):
    STARTING = "STARTING"
    READY = "READY"
    STOPPING = "STOPPING"


class ClusterRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A cluster that `flumectl up` runs, as others on this machine find it."""

    name: str
    state: ClusterState
    supervisor: ProcessRecord
    admin_address: str  # host:port
    http_url: str
    etcd_endpoints: str  # comma separated
    model_name: str
    ports: dict[str, int]
    """Ports of this machine it listens on, by the flag that sets them."""

    @property
    def running(self) -> bool:
        """Whether the process that runs it is alive; its children may outlive a crash."""
        return processes.is_alive(self.supervisor)


class ClusterFiles:
    """The files of one cluster. Raises ValueError for a name that can't be one."""

    def __init__(self, data_dir: Path, name: str) -> None:
        self.name = check_name("cluster", name)
        self.data_dir = data_dir.expanduser()
        self.directory = self.data_dir / name
        self.logs = self.directory / "logs"
        self.etcd = self.directory / "etcd"
        self.records = RecordDir(self.directory / "run")
        self._record = self.directory / "cluster.json"

    def read(self) -> ClusterRecord | None:
        """What is said to run; its processes may have crashed since."""
        with suppress(FileNotFoundError, NotADirectoryError, msgspec.DecodeError):
            return msgspec.json.decode(self._record.read_bytes(), type=ClusterRecord)
        return None

    def write(self, record: ClusterRecord) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        draft = self._record.with_suffix(".draft")
        draft.write_bytes(msgspec.json.format(msgspec.json.encode(record)))
        draft.replace(self._record)

    def forget(self) -> None:
        self._record.unlink(missing_ok=True)

    def leftovers(self) -> list[ProcessRecord]:
        """Processes of this cluster that run."""
        return [record for record in self.records.all() if processes.is_alive(record)]

    @contextmanager
    def lock(self) -> Iterator[bool]:
        """Whether we are the only `up` of this cluster; held while the body runs, gone with the process."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True


def clusters_of(data_dir: Path) -> list[ClusterRecord]:
    """All clusters of this machine that run and keep their files there."""
    found = []
    for path in data_dir.expanduser().glob("*/cluster.json"):
        with suppress(ValueError):  # a directory whose name is no cluster's
            found.append(ClusterFiles(data_dir, path.parent.name).read())
    return [record for record in found if record is not None and record.running]
