"""What a service takes from the settings as they are written, good and bad. Pure.

A bad value never counts: the last good one at that place does, while its reader runs; a reader that
has seen none goes on as if nothing were set there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from flume_common.config_schema import (
    SETTINGS,
    ConfigError,
    Path,
    Scope,
    Value,
    Values,
    contradiction,
    parse,
    path_of,
)

Texts = Mapping[str, str]
"""What is written: the text by `<scope>/<key>`."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """The settings of one service, and what is wrong with what is written for it."""

    values: Values
    good: Mapping[Path, Value] = field(default_factory=dict)  # the last good value at each place in use
    errors: Mapping[str, str] = field(default_factory=dict)  # by `<scope>/<key>`


def resolve(scope: Scope, texts: Texts, base: Values, previous: Resolved | None = None) -> Resolved:
    """The settings that a service of `scope` follows; its own scope goes before `cluster`.

    `base` holds where nothing is written. `previous` is what this returned the last time.
    """
    good: dict[Path, Value] = {}
    errors: dict[str, str] = {}
    for name, text in texts.items():
        try:
            path = path_of(name)
            if path.scope in (scope, Scope.CLUSTER):
                good[path] = parse(path, text)
        except ConfigError as error:
            if _concerns(scope, name):
                errors[name] = str(error)
    kept = previous.good if previous else {}
    good |= {path: value for path, value in kept.items() if path.name in errors}
    values = chosen(scope, good, base)
    refused = contradiction(values)
    if refused is not None:
        before = previous.values if previous else base
        values = msgspec.structs.replace(values, **{key: getattr(before, key) for key in refused.keys})
        errors |= {name: str(refused) for name in texts if name.rpartition("/")[2] in refused.keys}
    return Resolved(values, good, errors)


def _concerns(scope: Scope, name: str) -> bool:
    return name.partition("/")[0] in (scope, Scope.CLUSTER)


def chosen(scope: Scope, good: Mapping[Path, Value], base: Values) -> Values:
    """`base` with what is set for `scope`, contradictions and all."""
    fields: dict[str, Any] = {}
    for setting in SETTINGS.values():
        for place in (Path(Scope.CLUSTER, setting.key), Path(scope, setting.key)):
            if place in good:
                fields[setting.key] = good[place]
    return msgspec.structs.replace(base, **fields)
