"""Where a cluster of this machine keeps its files, and the one that says how to reach it.

<data dir>/<cluster>/cluster.json   what runs and where: ClusterRecord
                     config.json    settings of the last `up` that came up
                     nodes.json     attention nodes there were when it was last stopped
                     lock           held by the `up` that runs it
                     run/<id>.json  one per process: processes.ProcessRecord
                     logs/<id>.log  their output, with older ones beside it: log_rotation
                     up.out         that of a detached `up`
                     up.sock        where it says how its processes are: supervisor_link
                     etcd/          the embedded etcd's data
                     etcd.sock:0    where it listens: own_etcd

All of it is our user's alone.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec
from flume_common.keys import check_name
from flume_common.unix_socket import make_private, socket_directory

from flume_controller import processes
from flume_controller.processes import ProcessRecord, RecordDir

NAME_VARIABLE, DATA_DIR_VARIABLE = "FLUME_CLUSTER", "FLUME_DATA_DIR"
DEFAULT_NAME = "default"
LONGEST_SOCKET_NAME = "etcd.sock:0"
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
    config: dict[str, Any] = {}
    """The settings that it runs with: cluster_config.recorded."""

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
        self.output = self.directory / "up.out"
        self._record = self.directory / "cluster.json"
        self._config = self.directory / "config.json"
        self._nodes = self.directory / "nodes.json"

    @property
    def flags(self) -> str:
        """What a flumectl command of this environment needs to mean this cluster, with a space before it."""
        usual_name = os.environ.get(NAME_VARIABLE) or DEFAULT_NAME
        usual_dir = Path(os.environ.get(DATA_DIR_VARIABLE) or DEFAULT_DATA_DIR).expanduser()
        name = "" if self.name == usual_name else f" --name {self.name}"
        same_dir = self.data_dir.absolute() == usual_dir.absolute()
        return name if same_dir else f"{name} --data-dir {shlex.quote(str(self.data_dir))}"

    @property
    def sockets(self) -> Path:
        """The directory of its sockets: its own, unless that has too long a path."""
        return socket_directory(self.directory, LONGEST_SOCKET_NAME)

    @property
    def link(self) -> Path:
        return self.sockets / "up.sock"

    def make(self) -> None:
        """Create the directories, or make them ours alone. Raises NotPrivate, OSError."""
        for directory in (self.directory, self.sockets):
            make_private(directory)
        self.logs.mkdir(mode=0o700, exist_ok=True)

    def purge(self) -> None:
        """Remove all of it."""
        for directory in {self.directory, self.sockets}:
            shutil.rmtree(directory, ignore_errors=True)

    def read(self) -> ClusterRecord | None:
        """What is said to run; its processes may have crashed since."""
        with suppress(FileNotFoundError, NotADirectoryError, msgspec.DecodeError):
            return msgspec.json.decode(self._record.read_bytes(), type=ClusterRecord)
        return None

    def write(self, record: ClusterRecord) -> None:
        """Raises OSError."""
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        _write(self._record, msgspec.json.encode(record))

    def forget(self) -> None:
        self._record.unlink(missing_ok=True)

    def read_config(self) -> dict[str, Any] | None:
        """What the last `up` that came up was asked for, None without one.

        Raises ValueError for a file that is none.
        """
        with suppress(FileNotFoundError, NotADirectoryError):
            return msgspec.json.decode(self._config.read_bytes(), type=dict[str, Any])
        return None

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Raises OSError."""
        _write(self._config, msgspec.json.encode(config))

    def remember_nodes(self) -> None:
        """Keep the names of the attention nodes that run, or did when the machine went down."""
        nodes = [
            record.id
            for record in self.records.all()
            if record.role == "attention" and not record.ended and record.stopping_at_s is None
        ]
        if nodes:
            with suppress(OSError):  # they would have other names then
                _write(self._nodes, msgspec.json.encode(nodes))

    def remembered_nodes(self) -> list[str]:
        with suppress(FileNotFoundError, NotADirectoryError, msgspec.DecodeError):
            return msgspec.json.decode(self._nodes.read_bytes(), type=list[str])
        return []

    def leftovers(self) -> list[ProcessRecord]:
        """Processes of this cluster that run."""
        return [record for record in self.records.all() if processes.is_alive(record)]

    @contextmanager
    def lock(self) -> Iterator[bool]:
        """Whether we are the only `up` of this cluster; held while the body runs, gone with the process.

        Raises NotPrivate, OSError.
        """
        self.make()
        with (self.directory / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all, and for a machine that loses its power, too."""
    draft = path.with_suffix(".draft")
    with draft.open("wb") as file:
        file.write(msgspec.json.format(data))
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def known_names(data_dir: Path) -> list[str]:
    """Names of the clusters that keep anything there, running or not."""
    return sorted({path.parent.name for path in data_dir.expanduser().glob("*/c*.json")})


def clusters_of(data_dir: Path) -> list[ClusterRecord]:
    """All clusters of this machine that run and keep their files there."""
    found = []
    for path in data_dir.expanduser().glob("*/cluster.json"):
        with suppress(ValueError):  # a directory whose name is no cluster's
            found.append(ClusterFiles(data_dir, path.parent.name).read())
    return [record for record in found if record is not None and record.running]
