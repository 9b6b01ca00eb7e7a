"""What this machine itself can tell of a cluster that runs on it, whether or not its controller answers."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from flume_controller import supervisor_link
from flume_controller.cluster_files import (
    DATA_DIR_VARIABLE,
    NAME_VARIABLE,
    ClusterFiles,
    ClusterRecord,
    clusters_of,
    known_names,
)


class Supervision(StrEnum):
    """Whether somebody looks after the processes of a local cluster."""

    SUPERVISED = "supervised"
    UNSUPERVISED = "unsupervised"  # they outlived their `up`
    NOT_RUNNING = "not running"


class LocalState(NamedTuple):
    supervision: Supervision
    pid: int | None
    """Of the `up` that looks after it."""
    troubles: list[str]
    """Sentences, each with what to do; [] when all is well."""


def local_state(files: ClusterFiles) -> LocalState:
    record = files.read()
    if record is not None and record.running:
        view = supervisor_link.ask(files.link)
        return LocalState(Supervision.SUPERVISED, record.supervisor.pid, view.troubles if view else [])
    if record is not None and files.leftovers():
        trouble = (
            f"unsupervised, as its `flumectl up` (pid {record.supervisor.pid}) is gone: "
            f"run `flumectl up{files.flags}` to take it over"
        )
        return LocalState(Supervision.UNSUPERVISED, None, [trouble])
    return LocalState(Supervision.NOT_RUNNING, None, [not_running(files, record)])


def not_running(files: ClusterFiles, record: ClusterRecord | None) -> str:
    """Why there is no such cluster here, and where else one may be meant to be."""
    if record is not None:
        return (
            f"cluster {files.name!r} is not running: all of its processes ended without `flumectl down`; "
            f"`flumectl up{files.flags}` brings it back as it was"
        )
    running = [other.name for other in clusters_of(files.data_dir)]
    known = [name for name in known_names(files.data_dir) if name not in running]
    there = "; ".join(
        f"{what}: {', '.join(names)}" for what, names in (("running", running), ("stopped", known)) if names
    )
    others = f"are {there}" if there else "is no cluster"
    return (
        f"cluster {files.name!r} is not running on this machine: start it with `flumectl up{files.flags}`, "
        f"or name another with --name ({NAME_VARIABLE}) and --data-dir ({DATA_DIR_VARIABLE}), or a "
        f"controller with --server HOST:PORT; in {files.data_dir} there {others}"
    )
