"""NVIDIA's Multi-Process Service: whether it runs, so that processes use a card at the same time.

Without it the card switches between processes, and a signal from one to the other waits for the turn of its
time slice.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

DAEMON = "nvidia-cuda-mps-control"
DEFAULT_PIPES = Path("/tmp/nvidia-mps")
PID_FILE = f"{DAEMON}.pid"


@dataclass(frozen=True, slots=True)
class Mps:
    installed: bool  # the daemon's program is on the path
    running: bool  # a daemon answers for the directory that programs started from here would use
    pipes: Path


def look(environment: dict[str, str] | None = None, processes: Path = Path("/proc")) -> Mps:
    """What a process started with this environment (by default ours) would find."""
    variables = dict(os.environ) if environment is None else environment
    pipes = Path(variables.get("CUDA_MPS_PIPE_DIRECTORY") or DEFAULT_PIPES)
    return Mps(
        installed=shutil.which(DAEMON, path=variables.get("PATH")) is not None,
        running=_daemon_of(pipes, processes),
        pipes=pipes,
    )


def _daemon_of(pipes: Path, processes: Path) -> bool:
    try:
        pid = int((pipes / PID_FILE).read_text())
        program = (processes / str(pid) / "comm").read_text().strip()
    except (OSError, ValueError):
        return False
    return bool(program) and DAEMON.startswith(program)  # the kernel keeps its first 15 letters
