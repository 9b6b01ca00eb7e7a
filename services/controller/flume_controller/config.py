"""Controller settings: one frozen object, read once at start, passed down by hand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from flume_common.election import Timing
from flume_common.metrics_page import METRICS_LISTEN
from flume_common.store import StoreConfig

STANDARD_COMMAND = (sys.executable, "-m", "flume_attention")
Positive = Annotated[float, msgspec.Meta(gt=0)]


class ControllerConfig(msgspec.Struct, frozen=True, kw_only=True):
    cluster: str
    node: str
    store: StoreConfig
    listen: str = "127.0.0.1:9400"
    metrics_listen: str = METRICS_LISTEN

    provider: Literal["local"] = "local"
    attention_command: tuple[str, ...] = STANDARD_COMMAND
    """What runs an attention node; something like `numactl` may come before it."""
    attention_args: tuple[str, ...] = ()
    """Added to the command line of every attention node."""
    zygote: bool = True
    """Fork attention nodes from a process that has all imported; only for the standard command."""
    standby: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Attention nodes kept started ahead of need. Each costs its processes' memory, and on a GPU that of its
    KV."""
    data_dir: Path
    """Records of the processes it starts and their output: a restarted controller finds them here."""
    initial_attention: Annotated[int, msgspec.Meta(ge=0)] = 1
    """The desired number where none has been set yet."""

    preferred_ids: tuple[str, ...] = ()
    """Ids that new attention nodes get before any other: those there were before the cluster was stopped."""

    lease_ttl_s: Positive = 10.0
    resync_s: Positive = 5.0
    """A pass runs at least this often, whatever was or was not heard."""
    progress_deadline_s: Positive = 600.0
    """A scale-up without progress for so long returns to the last good count."""
    election: Timing = Timing()
    """How long the others wait for a leader that died, and when one that can't renew stops."""
    attention_bandwidth_bytes_per_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """At which one attention node reads KV, for the autoscaler's latency limit; 0: as measured."""
    rest_of_step_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """Part of a step that is not reading KV, for the same limit; 0: as measured."""
    stop_grace_s: Positive = 10.0
    """How long an attention node may take to end after SIGTERM."""
