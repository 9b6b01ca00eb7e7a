"""Header of a GGUF file (versions 2 and 3, little endian): its metadata, and where each tensor lies.

Router and weight node share this reader. The `gguf` package makes one numpy array per string: 1.5 s for
the 98 000 tokens and merges of SmolLM2 (about 6 s for the 408 000 of Llama 3) against 0.06 s here, at
every start. A weight node needs no token strings and steps over them (`longest_array`).
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

* GgufError     not a GGUF file, an unknown version, a header that makes no sense or ends too early
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MAX_ARRAY_DEPTH = 4  # an array of arrays of ...; no known key has more than one
MAX_ARRAY_ITEMS = 1 << 24  # fifty times the largest vocabulary, so that a damaged count fills no memory
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32


class GgufError(Exception):
    """The header cannot be read."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor as the header lists it."""

    name: str
    shape: tuple[int, ...]  # outermost first, as torch orders it
    type_code: int  # of GGML
    offset_bytes: int  # from `Header.data_start`


@dataclass(slots=True)
class Header:
    """Everything before the tensors' bytes."""

    fields: dict[str, Any] = field(default_factory=dict)  # numbers, booleans, strings and lists of them
    array_lengths: dict[str, int] = field(default_factory=dict)  # of every array, also those stepped over
    tensors: list[TensorEntry] = field(default_factory=list)
    data_start: int = 0  # byte in the file


def map_file(path: Path) -> mmap.mmap:
    """Map a GGUF file into memory, for reading. Raises GgufError for another kind of file, OSError."""
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise GgufError(path, "is not a GGUF file: it does not begin with the letters GGUF")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def read_fields(path: Path) -> dict[str, Any]:
    """Read all metadata of a file, and none of its tensors. Raises GgufError, OSError."""
    with map_file(path) as data:
        return _Cursor(path, data, None).read(with_tensors=False).fields


def read_header(path: Path, data: mmap.mmap, *, longest_array: int) -> Header:
    """Read metadata and tensor entries; arrays of more items are stepped over. Raises GgufError."""
    return _Cursor(path, data, longest_array).read(with_tensors=True)


class _Cursor:
    """A position in the header, and what is being read there, for errors."""

    def __init__(self, path: Path, data: mmap.mmap, longest_array: int | None) -> None:
        self._path = path
        self._data = data
        self._size = len(data)
        self._longest_array = longest_array
        self._at = len(MAGIC)
        self._reading = "the header"
        self._header = Header()

    def read(self, *, with_tensors: bool) -> Header:
        version = self._integer("I")
        if version not in VERSIONS:
            raise self._bad(f"is GGUF version {version}; supported are {VERSIONS} (little endian)")
        num_tensors, num_fields = self._integer("Q"), self._integer("Q")
        for number in range(num_fields):
            self._reading = f"metadata field {number + 1} of {num_fields}"
            self._field()
        if with_tensors:
            for number in range(num_tensors):
                self._reading = f"the entry of tensor {number + 1} of {num_tensors}"
                self._header.tensors.append(self._tensor())
            self._header.data_start = self._aligned(self._at)
        return self._header

    def _field(self) -> None:
        name = self._string()
        self._reading = f"metadata field {name}"
        kind = self._integer("I")
        if kind != ARRAY:
            self._header.fields[name] = self._value(kind)
            return
        kind, length = self._array_head()
        self._header.array_lengths[name] = length
        if self._longest_array is None or length <= self._longest_array:
            self._header.fields[name] = self._items(kind, length, depth=1)
        else:
            self._skip_items(kind, length)

    def _value(self, kind: int) -> Any:
        return self._string() if kind == STRING else self._scalars(kind, 1)[0]

    def _array_head(self) -> tuple[int, int]:
        kind, length = self._integer("I"), self._integer("Q")
        if length > MAX_ARRAY_ITEMS and length > self._size - self._at:
            raise self._ends_early(self._at + length)
        if length > MAX_ARRAY_ITEMS:
            raise self._bad(f"{self._reading} has {length} items; at most {MAX_ARRAY_ITEMS} are read")
        return kind, length

    def _items(self, kind: int, length: int, depth: int) -> list[Any]:
        if kind == STRING:
            return self._strings(length)
        if kind != ARRAY:
            return list(self._scalars(kind, length))
        if depth == MAX_ARRAY_DEPTH:
            raise self._bad(f"{self._reading} has arrays nested more than {MAX_ARRAY_DEPTH} deep")
        return [self._items(*self._array_head(), depth=depth + 1) for _ in range(length)]

    def _skip_items(self, kind: int, length: int) -> None:
        if kind == STRING:
            self._skip_strings(length)
        elif kind == ARRAY:
            self._items(kind, length, depth=1)
        else:
            self._take(length * struct.calcsize("<" + self._code(kind)))

    def _strings(self, count: int) -> list[str]:
        # Written out flat: this loop is nearly all of the time.
        data, at, end, unpack = self._data, self._at, self._size, struct.Struct("<Q").unpack_from
        values = []
        try:
            for _ in range(count):
                start = at + 8
                at = start + unpack(data, at)[0]
                if at > end:  # a slice past the end is short, not an error
                    raise self._ends_early(at)
                values.append(data[start:at].decode("utf-8"))
        except (struct.error, OverflowError):
            raise self._ends_early(at + 8) from None
        except UnicodeDecodeError as error:
            raise self._bad(f"{self._reading} has a string that is not UTF-8: {error}") from None
        self._at = at
        return values

    def _skip_strings(self, count: int) -> None:
        unpack, data, at = struct.Struct("<Q").unpack_from, self._data, self._at
        try:
            for _ in range(count):
                at += 8 + unpack(data, at)[0]
        except (struct.error, OverflowError):
            raise self._ends_early(at + 8) from None
        if at > self._size:
            raise self._ends_early(at)
        self._at = at

    def _string(self) -> str:
        return self._strings(1)[0]

    def _tensor(self) -> TensorEntry:
        name = self._string()
        num_dims = self._integer("I")
        if not 1 <= num_dims <= MAX_DIMENSIONS:
            raise self._bad(f"tensor {name} has {num_dims} dimensions; GGUF knows 1 to {MAX_DIMENSIONS}")
        dims = [self._integer("Q") for _ in range(num_dims)]
        return TensorEntry(name, tuple(reversed(dims)), self._integer("I"), self._integer("Q"))

    def _aligned(self, at: int) -> int:
        alignment = self._header.fields.get("general.alignment", DEFAULT_ALIGNMENT)
        if isinstance(alignment, bool) or not isinstance(alignment, int) or alignment < 1:
            raise self._bad(f"general.alignment is {alignment!r}")
        return -(-at // alignment) * alignment

    def _integer(self, code: str) -> int:
        return int(self._take_as("<" + code)[0])

    def _scalars(self, kind: int, count: int) -> tuple[Any, ...]:
        return self._take_as(f"<{count}{self._code(kind)}")

    def _code(self, kind: int) -> str:
        if kind not in SCALARS:
            raise self._bad(f"{self._reading} has the unknown type {kind}")
        return SCALARS[kind]

    def _take_as(self, layout: str) -> tuple[Any, ...]:
        start = self._take(struct.calcsize(layout))
        return struct.unpack_from(layout, self._data, start)

    def _take(self, num_bytes: int) -> int:
        """Step over `num_bytes`; returns where they begin."""
        start, end = self._at, self._at + num_bytes
        if end > self._size:
            raise self._ends_early(end)
        self._at = end
        return start

    def _ends_early(self, needed: int) -> GgufError:
        return self._bad(
            f"ends inside {self._reading}: byte {needed} needed, the file has {self._size}: "
            "truncated; is it whole?"
        )

    def _bad(self, reason: str) -> GgufError:
        return GgufError(self._path, reason)
