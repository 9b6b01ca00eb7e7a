"""What a failed round prints: enough to find the cause, or to know where to look."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

from clusters import Cluster

LINES = 12
"""Of each log, since the round began."""
DULL = ("service", "node", "timestamp", "event", "level")


class Logs:
    """What the nodes of a cluster log from now on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._began = datetime.now(UTC)

    def since(self, event: str) -> list[dict[str, object]]:
        """Its lines, with their fields."""
        lines = [
            fields
            for log in sorted(self._folder.rglob("*.log"))
            for line in log.read_text(errors="replace").splitlines()
            if f'"{event}"' in line and _is_since(line, self._began) and (fields := _fields(line))
        ]
        return [fields for fields in lines if fields["event"] == event]


def failure_report(failure: str, cluster: Cluster, folder: Path, began: datetime, kept: Path) -> str:
    parts = [failure, f"began {began:%H:%M:%S.%f} UTC; all files kept in {kept}"]
    for what in ("nodes", "routes"):
        done = cluster.flumectl("get", what, check=False, timeout_s=30)
        parts.append(f"flumectl get {what}:\n{done.stdout}{done.stderr}".rstrip())
    for log in sorted(folder.rglob("*.log")):
        lines = [line for line in log.read_text(errors="replace").splitlines() if _is_since(line, began)]
        notable = [line for line in lines if '"info"' not in line and '"debug"' not in line]
        parts += [f"-- {log.relative_to(folder)}", *map(_short, (notable or lines)[-LINES:])]
    return "\n".join("    " + line for part in parts for line in part.splitlines())


def _is_since(line: str, began: datetime) -> bool:
    """Of a line without a time we say yes: a traceback has none."""
    fields = _fields(line)
    stamp = fields.get("timestamp") or fields.get("ts") if fields else None
    try:
        return datetime.fromisoformat(str(stamp)) >= began if stamp else True
    except (ValueError, TypeError):
        return True


def _short(line: str) -> str:
    fields = _fields(line)
    if not fields or "event" not in fields:
        return line[:300]
    rest = " ".join(f"{key}={value}" for key, value in fields.items() if key not in DULL)
    return f"{str(fields.get('timestamp', ''))[11:23]} {fields.get('level')} {fields['event']} {rest}"[:300]


def _fields(line: str) -> dict[str, object] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
