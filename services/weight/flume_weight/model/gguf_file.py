"""A GGUF model mapped into memory: its metadata, and where each tensor lies, in one file or in several.

In a model of several parts the first has the metadata, and every part lists its own tensors.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from flume_common.gguf import GgufError, Header, TensorEntry, map_file, read_header
from flume_common.gguf_parts import MissingParts, part_paths
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from flume_weight.model.errors import DamagedFile, MissingFile, UnsupportedDtype

KEPT_ARRAY_ITEMS = 64  # longer arrays are token lists


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor: rows of quantised blocks."""

    path: Path  # the part it lies in
    name: str
    shape: tuple[int, ...]  # outermost first, as torch orders it
    kind: GGMLQuantizationType
    start: int  # byte in the file
    num_bytes: int
    data: mmap.mmap = field(repr=False, compare=False)

    def rows(self, first: int, last: int) -> NDArray[np.uint8]:
        """Raw bytes [last - first, bytes per row] of rows of the flattened outer dimensions."""
        row_bytes = self.num_bytes // math.prod(self.shape[:-1])
        flat = np.frombuffer(self.data, np.uint8, (last - first) * row_bytes, self.start + first * row_bytes)
        return flat.reshape(last - first, row_bytes)


@dataclass(slots=True)
class GgufFile:
    """A GGUF model: metadata of the first part, tensors of all parts."""

    path: Path
    fields: dict[str, object] = field(default_factory=dict)
    array_lengths: dict[str, int] = field(default_factory=dict)  # of every array, also those not kept
    tensors: dict[str, GgufTensor] = field(default_factory=dict)


def open_gguf(path: Path) -> GgufFile:
    """Open the model that `path` is, or is one part of.

    Raises MissingFile, DamagedFile or UnsupportedDtype.
    """
    paths = _part_paths(path)
    first, *others = (_Part.open(part) for part in paths)
    file = GgufFile(paths[0], first.header.fields, first.header.array_lengths)
    first.add_to(file, number=1, count=len(paths))
    for number, part in enumerate(others, start=2):
        part.add_to(file, number=number, count=len(paths))
    promised = file.fields.get("split.tensors.count")
    if len(paths) > 1 and promised is not None and promised != len(file.tensors):
        raise DamagedFile(
            file.path,
            f"split.tensors.count is {promised!r}, but the {len(paths)} parts have {len(file.tensors)} "
            "tensors: they are not of one model",
        )
    return file


def _part_paths(path: Path) -> tuple[Path, ...]:
    if not path.is_file():
        raise MissingFile(path, "it was named as the model")
    try:
        return part_paths(path)
    except MissingParts as error:
        raise MissingFile(error.missing[0], f"{path.name} is one part of a model: {error}") from None


@dataclass(frozen=True, slots=True)
class _Part:
    """One file, mapped."""

    path: Path
    data: mmap.mmap
    header: Header

    @classmethod
    def open(cls, path: Path) -> _Part:
        try:
            data = map_file(path)
            return cls(path, data, read_header(path, data, longest_array=KEPT_ARRAY_ITEMS))
        except GgufError as error:
            raise DamagedFile(path, error.reason) from error

    def add_to(self, file: GgufFile, *, number: int, count: int) -> None:
        """Add the tensors of part `number` of `count` to the model. Raises DamagedFile, UnsupportedDtype."""
        self._check_place(number, count)
        for entry in self.header.tensors:
            if entry.name in file.tensors:
                raise self._damaged(f"tensor {entry.name} is in {file.tensors[entry.name].path.name} already")
            file.tensors[entry.name] = self._tensor(entry)

    def _check_place(self, number: int, count: int) -> None:
        fields = self.header.fields
        named = "is the whole model" if count == 1 else f"is part {number} of {count}"
        if (fields.get("split.count") or 1) != count:  # 0: parts that were merged again
            raise self._damaged(
                f"split.count is {fields.get('split.count', 'absent')}, but by its name this {named}: "
                "parts are found by their names, which are to be like NAME-00001-of-00003.gguf"
            )
        if fields.get("split.no", 0) != number - 1:
            raise self._damaged(
                f"split.no is {fields.get('split.no', 'absent')}, but by its name this {named}, "
                f"split.no {number - 1}: parts were exchanged, or are of different models"
            )

    def _tensor(self, entry: TensorEntry) -> GgufTensor:
        name, shape = entry.name, entry.shape
        try:
            kind = GGMLQuantizationType(entry.type_code)
            block, block_bytes = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise UnsupportedDtype(self.path, name, f"type {entry.type_code}", "GGML's types") from None
        if shape[-1] % block or 0 in shape:
            raise self._damaged(
                f"tensor {name} of shape {list(shape)} is no multiple of {kind.name}'s block {block}"
            )
        start, size = self.header.data_start + entry.offset_bytes, len(self.data)
        num_bytes = math.prod(shape) // block * block_bytes
        end = start + num_bytes
        if end > size:
            raise self._damaged(f"tensor {name} should end at byte {end}, the file has {size}: truncated")
        return GgufTensor(self.path, name, shape, kind, start, num_bytes, self.data)

    def _damaged(self, reason: str) -> DamagedFile:
        return DamagedFile(self.path, reason)
