"""What a format's fields mean to the forward pass: each field is used, harmless or refused.

A field that is in none of the lists cannot be judged: its name is returned, for a warning in the log. Tests
compare the lists with all fields that transformers and the gguf package know, so that a new one is put
into a list before it meets a user.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from flume_weight.model.errors import UnsupportedFeature
from flume_weight.model.fields import Fields

Verdict = Literal["used", "harmless", "refused", "unknown"]


@dataclass(frozen=True, slots=True)
class Only:
    """A field whose only supported values are those that change nothing."""

    values: tuple[object, ...]
    supported: str  # in words, for the refusal

    def allows(self, value: object) -> bool:
        return any(_same(value, allowed) for allowed in self.values)


@dataclass(frozen=True)
class FieldLists:
    """The three lists of one format and model family. Names may have the wildcard `*`."""

    used: frozenset[str]  # read by the loader, which refuses what it cannot compute
    harmless: Mapping[str, str]  # whatever the value: with the reason
    refused: Mapping[str, Only]
    _patterns: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        patterns = tuple(name for names in (self.harmless, self.refused) for name in names if "*" in name)
        object.__setattr__(self, "_patterns", patterns)

    def verdict(self, name: str) -> Verdict:
        """The list that a field is in."""
        if name in self.used:
            return "used"
        entry = self._entry(name)
        if entry in self.harmless:
            return "harmless"
        return "refused" if entry in self.refused else "unknown"

    def check(self, fields: Fields, only: Iterable[str] | None = None) -> list[str]:
        """Returns the fields, of all or of `only`, that are in no list. A null counts as absent.

        Raises UnsupportedFeature for a refused field with a value that would change the arithmetic.
        """
        unknown = []
        for name in fields if only is None else only:
            if not fields.has(name):
                continue
            verdict = self.verdict(name)
            if verdict == "unknown":
                unknown.append(fields.name_of(name))
            elif verdict == "refused":
                self._require_neutral(fields, name)
        return unknown

    def _require_neutral(self, fields: Fields, name: str) -> None:
        rule = self.refused[self._entry(name)]
        if not rule.allows(fields.raw(name)):
            raise UnsupportedFeature(fields.path, fields.name_of(name), fields.raw(name), rule.supported)

    def _entry(self, name: str) -> str:
        if name in self.harmless or name in self.refused:
            return name
        return next((pattern for pattern in self._patterns if fnmatchcase(name, pattern)), name)


def names(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


def _same(value: object, allowed: object) -> bool:
    if isinstance(value, float) and isinstance(allowed, int | float):
        return math.isclose(value, allowed, rel_tol=1e-6, abs_tol=1e-12)  # GGUF has float32
    return value == allowed
