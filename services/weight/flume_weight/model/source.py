"""Where a model's tensors come from: files that can name their tensors and convert one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from flume_weight.model.errors import MissingTensor, TensorShape, UnexpectedTensor

FREQUENCIES = ".rotary_emb.inv_freq"  # old checkpoints carry them without need
Progress = Callable[[int, int], None]  # bytes read so far, bytes to read


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor in a file."""

    path: Path
    name: str  # as the file calls it
    shape: tuple[int, ...]
    num_bytes: int


class TensorSource(Protocol):
    path: Path
    tensors: Mapping[str, Stored]  # by the name that a Hugging Face checkpoint uses

    def read(self, name: str, out: Tensor) -> None:
        """Converts one tensor into `out`. Raises DamagedFile or UnsupportedDtype."""


def check(source: TensorSource, slots: Mapping[str, Tensor], architecture: str) -> None:
    """Raises the first disagreement between what files have and what the config asks for."""
    for name, place in slots.items():
        stored = source.tensors.get(name)
        if stored is None:
            raise MissingTensor(source.path, name, place.shape)
        if stored.shape != tuple(place.shape):
            raise TensorShape(stored.path, stored.name, place.shape, stored.shape)
    for name, stored in source.tensors.items():
        if name not in slots and not name.endswith(FREQUENCIES):
            raise UnexpectedTensor(stored.path, stored.name, stored.shape, architecture)


def fill(source: TensorSource, slots: Mapping[str, Tensor], progress: Progress | None) -> None:
    """Reads every tensor into its place, one after the other."""
    total = sum(source.tensors[name].num_bytes for name in slots)
    done = 0
    for name, place in slots.items():
        source.read(name, place)
        done += source.tensors[name].num_bytes
        if progress:
            progress(done, total)
