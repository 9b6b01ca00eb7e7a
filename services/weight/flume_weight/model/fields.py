"""Reading typed fields out of a model's metadata: each accessor says what it expected and what it found."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from flume_weight.model.errors import BadConfig

LARGEST = 2**31 - 1  # of any size or id; larger ones are damage, and would fill memory
NO_TOKEN = (-1, 2**32 - 1)  # how files say that there is no such token; the second where ids are unsigned


class Fields:
    """A mapping of untrusted values that belongs to one file. A null counts as absent.

    Every accessor raises BadConfig, naming the field, unless it has a default for an absent one.
    """

    def __init__(self, path: Path, values: Mapping[str, object], prefix: str = "") -> None:
        self.path = path
        self._values = values
        self._prefix = prefix

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def has(self, name: str) -> bool:
        """Whether it is there and not null; `in` asks only whether it is there."""
        return self._values.get(name) is not None

    def raw(self, name: str) -> object:
        return self._values.get(name)

    def name_of(self, name: str) -> str:
        return self._prefix + name

    def bad(self, name: str, expected: str) -> BadConfig:
        found = self._values.get(name, "nothing")
        return BadConfig(self.path, self.name_of(name), expected, found)

    def integer(
        self, name: str, default: int | None = None, *, minimum: int = 1, maximum: int = LARGEST
    ) -> int:
        value = self._values.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.bad(name, f"an integer of at least {minimum}")
        if value > maximum:
            raise self.bad(name, f"an integer of at most {maximum}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._values.get(name)
        if value is None and default is not None:
            return default
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not 0 < value <= sys.float_info.max
        ):
            raise self.bad(name, "a positive number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.bad(name, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._values.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self.bad(name, "a string")
        return value

    def token_ids(self, name: str) -> tuple[int, ...]:
        """One id, a list of ids, or nothing; -1 is none."""
        value = self._values.get(name)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        ids = [i for i in ids if i not in NO_TOKEN or isinstance(i, bool)]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise self.bad(name, "a token id or a list of them")
        return tuple(ids)

    def sub(self, name: str) -> Fields | None:
        """The fields of a nested object; None when it is absent."""
        value = self._values.get(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.bad(name, "an object")
        return Fields(self.path, value, f"{self.name_of(name)}.")
