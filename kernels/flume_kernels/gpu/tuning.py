"""How kernels run best on a card: measured once, remembered on disk, never measured when a node starts.

A result is kept under (GPU name, triton version, hash of the kernels' source, bucket): any of these
changing makes it unknown. What is known is looked up in the user's file, then in the results that ship with
this package. Measuring is a command of its own: `decode_tuning` for attention, `linear_tuning` for the dense
path's products.

The file is JSON, replaced as a whole and atomically; two processes that tune at once may lose one result,
never the file.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton

Config = TypeVar("Config")
SHIPPED = Path(__file__).parent / "tuned.json"
Numbers = dict[str, int]


@dataclass(frozen=True, slots=True)
class Key:
    """What a result holds for."""

    gpu: str
    triton_version: str
    kernel_hash: str
    bucket: str

    @property
    def text(self) -> str:
        return " | ".join((self.gpu, self.triton_version, self.kernel_hash, self.bucket))


def kernel_hash(kernels: Iterable[Any]) -> str:
    """16 hex digits that differ when the source of any kernel does, comments included."""
    digest = hashlib.sha256()
    for kernel in kernels:
        digest.update(inspect.getsource(kernel.fn).encode())
    return digest.hexdigest()[:16]


def default_path() -> Path:
    """$FLUME_TUNING_FILE, or kernelflume/tuning.json in the user's cache directory."""
    if path := os.environ.get("FLUME_TUNING_FILE"):
        return Path(path)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "kernelflume" / "tuning.json"


class TuningCache:
    """Results on disk. A file that is missing or not readable as JSON counts as empty, as it can be
    measured again."""

    def __init__(self, path: Path, shipped: Path = SHIPPED) -> None:
        self._path = path
        self._shipped = shipped

    def get(self, key: Key) -> Numbers | None:
        """The numbers kept under `key`, the user's before the shipped ones."""
        for path in (self._path, self._shipped):
            found = _read(path).get(key.text)
            if found is not None:
                return dict(found["config"])
        return None

    def put(self, key: Key, config: Numbers, seconds: float) -> None:
        """Keep a result and the time it was chosen for."""
        results = _read(self._path)
        results[key.text] = {"config": config, "seconds": seconds}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=self._path.parent, delete=False) as file:
            json.dump(results, file, indent=1, sort_keys=True)
        Path(file.name).replace(self._path)


def _read(path: Path) -> dict[str, Any]:
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return results if isinstance(results, dict) else {}


def choose(candidates: Iterable[Config], measure: Callable[[Config], float]) -> tuple[Config, float]:
    """The candidate with the least time. One that does not run counts as infinitely slow.

    Raises RuntimeError when none runs.
    """
    best: tuple[Config, float] | None = None
    for candidate in candidates:
        try:
            seconds = measure(candidate)
        except (triton.runtime.errors.OutOfResources, torch.cuda.OutOfMemoryError):
            continue
        if best is None or seconds < best[1]:
            best = candidate, seconds
    if best is None:
        raise RuntimeError("no candidate runs on this device")
    return best
