"""The header of a GGUF file (version 2 and 3, little endian): metadata and where each tensor lies.

Our own reader, as a weight node needs no token strings: it steps over them (the gguf package turns a
vocabulary of 128 000 tokens and its merges into a million arrays: seconds and hundreds of megabytes), and
it can say by name which part of a truncated file is missing. Format: ggml's docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from flume_weight.model.errors import DamagedFile, MissingFile, UnsupportedDtype

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
KEPT_ARRAY_ITEMS = 64  # longer arrays are token lists


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor: rows of quantised blocks."""

    name: str
    shape: tuple[int, ...]  # outermost first, as torch orders it
    kind: GGMLQuantizationType
    start: int  # byte in the file
    num_bytes: int


@dataclass(slots=True)
class GgufFile:
    """A GGUF file mapped into memory."""

    path: Path
    data: mmap.mmap
    fields: dict[str, object] = field(default_factory=dict)
    array_lengths: dict[str, int] = field(default_factory=dict)  # of every array, also those not kept
    tensors: dict[str, GgufTensor] = field(default_factory=dict)

    def rows(self, tensor: GgufTensor, first: int, last: int) -> NDArray[np.uint8]:
        """Raw bytes [last - first, bytes per row] of rows of the flattened outer dimensions."""
        row_bytes = tensor.num_bytes // math.prod(tensor.shape[:-1])
        flat = np.frombuffer(
            self.data, np.uint8, (last - first) * row_bytes, tensor.start + first * row_bytes
        )
        return flat.reshape(last - first, row_bytes)


def open_gguf(path: Path) -> GgufFile:
    """Raises MissingFile, DamagedFile or UnsupportedDtype."""
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise DamagedFile(path, "is not a GGUF file: it does not begin with 'GGUF'")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (FileNotFoundError, NotADirectoryError):
        raise MissingFile(path, "it was named as the model") from None
    return _Reader(path, data).read()


class _Reader:
    """A cursor over the header."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._file = GgufFile(path, data)
        self._at = len(MAGIC)
        self._reading = "the header"

    def read(self) -> GgufFile:
        version = self._integer("I")
        if version not in VERSIONS:
            raise self._damaged(f"is GGUF version {version}; known are {VERSIONS} (little endian)")
        num_tensors, num_fields = self._integer("Q"), self._integer("Q")
        for number in range(num_fields):
            self._reading = f"metadata field {number + 1} of {num_fields}"
            self._field()
        infos = []
        for number in range(num_tensors):
            self._reading = f"the entry of tensor {number + 1} of {num_tensors}"
            infos.append(self._info())
        self._place(infos)
        return self._file

    def _field(self) -> None:
        name = self._string()
        self._reading = f"metadata field {name}"
        kind = self._integer("I")
        if kind == ARRAY:
            self._array(name)
        else:
            self._file.fields[name] = self._value(kind)

    def _array(self, name: str) -> None:
        kind, length = self._integer("I"), self._integer("Q")
        self._file.array_lengths[name] = length
        if length <= KEPT_ARRAY_ITEMS:
            self._file.fields[name] = [self._value(kind) for _ in range(length)]
        elif kind == STRING:
            self._skip_strings(length)
        else:
            self._take(length * struct.calcsize("<" + self._code(kind)))

    def _skip_strings(self, count: int) -> None:
        unpack, data, at = struct.Struct("<Q").unpack_from, self._file.data, self._at
        try:
            for _ in range(count):
                at += 8 + unpack(data, at)[0]
        except (struct.error, OverflowError):
            raise self._ends_early(at) from None
        self._at = at

    def _info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        num_dims = self._integer("I")
        if not 1 <= num_dims <= 4:
            raise self._damaged(f"tensor {name} has {num_dims} dimensions; GGUF knows 1 to 4")
        dims = [self._integer("Q") for _ in range(num_dims)]
        return name, tuple(reversed(dims)), self._integer("I"), self._integer("Q")

    def _place(self, infos: list[tuple[str, tuple[int, ...], int, int]]) -> None:
        alignment = self._file.fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise self._damaged(f"general.alignment is {alignment!r}")
        base = -(-self._at // alignment) * alignment
        for name, shape, code, offset in infos:
            tensor = self._tensor(name, shape, code, base + offset)
            end, size = tensor.start + tensor.num_bytes, len(self._file.data)
            if end > size:
                raise self._damaged(f"tensor {name} should end at byte {end}, the file has {size}: truncated")
            self._file.tensors[name] = tensor

    def _tensor(self, name: str, shape: tuple[int, ...], code: int, start: int) -> GgufTensor:
        try:
            kind = GGMLQuantizationType(code)
            block, block_bytes = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise UnsupportedDtype(self._file.path, name, f"type {code}", "GGML's types") from None
        if shape[-1] % block or 0 in shape:
            raise self._damaged(
                f"tensor {name} of shape {list(shape)} is no multiple of {kind.name}'s block {block}"
            )
        return GgufTensor(name, shape, kind, start, math.prod(shape) // block * block_bytes)

    def _value(self, kind: int) -> object:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            raise self._damaged(f"{self._reading} is an array of arrays")
        return self._scalar(self._code(kind))

    def _code(self, kind: int) -> str:
        if kind not in SCALARS:
            raise self._damaged(f"{self._reading} has the unknown type {kind}")
        return SCALARS[kind]

    def _string(self) -> str:
        return self._take(self._integer("Q")).decode("utf-8", "replace")

    def _integer(self, code: str) -> int:
        return int(struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0])

    def _scalar(self, code: str) -> object:
        value: object = struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]
        return value

    def _take(self, num_bytes: int) -> bytes:
        end = self._at + num_bytes
        if end > len(self._file.data):
            raise self._ends_early(end)
        taken = self._file.data[self._at : end]
        self._at = end
        return taken

    def _ends_early(self, needed: int) -> DamagedFile:
        size = len(self._file.data)
        return self._damaged(
            f"ends inside {self._reading}: byte {needed} needed, the file has {size}: truncated"
        )

    def _damaged(self, reason: str) -> DamagedFile:
        return DamagedFile(self._file.path, reason)
