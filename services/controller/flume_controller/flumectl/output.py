"""Rows as a table, JSON or YAML. A row is a dict of plain values: what JSON shows is what there is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
FORMATS = ("table", "wide", "json", "yaml")


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table."""

    title: str
    cell: Callable[[Row], str]
    wide: bool = False  # only with -o wide


def column(title: str, key: str, *, wide: bool = False) -> Column:
    """A column that shows a field as it is; empty ones as kubectl does."""
    return Column(title, lambda row: _plain(row[key]), wide)


def render(rows: Sequence[Row], columns: Sequence[Column], fmt: str) -> str:
    """All rows as one document, without the last newline."""
    if fmt == "json":
        return json.dumps(rows, indent=2, ensure_ascii=False)
    if fmt == "yaml":
        return to_yaml(list(rows))
    return "\n".join(Table(columns, wide=fmt == "wide").lines(rows))


def render_one(row: Row, columns: Sequence[Column], fmt: str, table: Table) -> str:
    """One row of a stream: a line of JSON, a YAML document, or a line of `table`."""
    if fmt == "json":
        return json.dumps(row, ensure_ascii=False)
    if fmt == "yaml":
        return "---\n" + to_yaml(row)
    return "\n".join(table.lines([row]))


def to_yaml(value: Any) -> str:
    import yaml  # slow, and seldom asked for

    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True)).rstrip("\n")


class Table:
    """Left-aligned columns three spaces apart. Widths only grow, so that a stream stays in line."""

    def __init__(self, columns: Sequence[Column], *, wide: bool) -> None:
        self._columns = [item for item in columns if wide or not item.wide]
        self._widths = [len(item.title) for item in self._columns]
        self._titled = False

    def lines(self, rows: Iterable[Row]) -> list[str]:
        """The rows as lines, below the titles the first time."""
        cells = [[item.cell(row) for item in self._columns] for row in rows]
        for line in cells:
            self._widths = [max(width, len(cell)) for width, cell in zip(self._widths, line, strict=True)]
        if not self._titled:
            cells.insert(0, [item.title for item in self._columns])
            self._titled = True
        return [self._line(line) for line in cells]

    def _line(self, cells: Sequence[str]) -> str:
        padded = (cell.ljust(width) for cell, width in zip(cells, self._widths, strict=True))
        return "   ".join(padded).rstrip()


def _plain(value: Any) -> str:
    return "<none>" if value in ("", None) else str(value)
