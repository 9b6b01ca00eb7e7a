"""The key-value part of a GGUF file, and nothing behind it.

Our own reader, as the `gguf` package makes one numpy array per string: 1.5 s for SmolLM2's 98 000
tokens and merges (about 6 s for Llama 3's 408 000) against 0.06 s here, at every start of a router.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (little-endian, versions 2 and 3).

* GgufError     not a GGUF file, a version we do not know, or one that ends too early
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)


class GgufError(Exception):
    """The file's metadata cannot be read."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


def read_metadata(path: Path) -> dict[str, Any]:
    """Every metadata key: numbers, booleans, strings and lists of them. Raises GgufError, OSError."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise GgufError(path, "the file does not begin with the letters GGUF")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(path, data)


def _read(path: Path, data: mmap.mmap) -> dict[str, Any]:
    try:
        return _Cursor(data).metadata()
    except (struct.error, IndexError, MemoryError, OverflowError) as error:
        raise GgufError(path, "the file ends inside its metadata; is it whole?") from error
    except ValueError as error:
        raise GgufError(path, str(error)) from error


class _Cursor:
    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def metadata(self) -> dict[str, Any]:
        self._at = 4
        (version,) = self._take("<I")
        if version not in _VERSIONS:
            raise ValueError(f"GGUF version {version} is not supported (2 and 3 are)")
        _tensors, count = self._take("<QQ")
        return dict(self._pair() for _ in range(count))

    def _pair(self) -> tuple[str, Any]:
        key = self._string()
        (kind,) = self._take("<I")
        return key, self._value(kind)

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array()
        return self._take("<" + _scalar(kind))[0]

    def _array(self) -> list[Any]:
        kind, count = self._take("<IQ")
        if kind == _STRING:
            return self._strings(count)
        if kind == _ARRAY:
            return [self._array() for _ in range(count)]
        return list(self._take(f"<{count}{_scalar(kind)}"))

    def _strings(self, count: int) -> list[str]:
        # Written out flat: this loop is nearly all of the time.
        data, at, end, unpack = self._data, self._at, len(self._data), struct.Struct("<Q").unpack_from
        values = []
        for _ in range(count):
            start = at + 8
            at = start + unpack(data, at)[0]
            if at > end:  # a slice past the end is short, not an error
                raise IndexError(at)
            values.append(data[start:at].decode("utf-8"))
        self._at = at
        return values

    def _string(self) -> str:
        return self._strings(1)[0]

    def _take(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self._data, self._at)
        self._at += struct.calcsize(layout)
        return values


def _scalar(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"a metadata value has the unknown type {kind}")
    return _SCALARS[kind]
