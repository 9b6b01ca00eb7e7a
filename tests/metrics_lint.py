"""What `promtool check metrics` would say of a page, and stricter: names of ours, units, labels."""

from __future__ import annotations

import re
from collections import Counter

from prometheus_client.parser import text_string_to_metric_families

STANDARD = ("process_", "controller_runtime_", "workqueue_", "leader_election_")
NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
ODD_UNITS = (
    *("ms", "us", "ns", "milliseconds", "microseconds", "nanoseconds", "minutes", "hours", "days"),
    *("kb", "mb", "gb", "kib", "mib", "gib", "kilobytes", "megabytes", "gigabytes", "percent"),
)
TYPES = ("gauge", "counter", "histogram", "summary")


def values(text: str) -> dict[str, float]:
    """Samples by name, with labels as on the page but sorted: `flume_node_state{state="ready"}`."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


def problems(text: str) -> list[str]:
    """What is wrong with a page; nothing when all is well."""
    types = dict(line.split(" ", 3)[2:] for line in text.splitlines() if line.startswith("# TYPE "))
    helps = {line.split(" ", 3)[2]: line.split(" ", 3)[3:] for line in text.splitlines() if "# HELP " in line}
    found = [f"{name}: no help" for name in types if not "".join(helps.get(name, [])).strip()]
    found += [f"{name}: said twice" for name, n in _heads(text).items() if n > 1]
    found += [f"{line}: twice" for line, n in _series(text).items() if n > 1]
    for name, kind in types.items():
        found += [f"{name}: {problem}" for problem in _of_name(name, kind)]
    owned = {f"{name}{suffix}" for name in types for suffix in ("", "_bucket", "_sum", "_count")}
    found += [f"{name}: of no family" for name in {_name(line) for line in _series(text)} - owned]
    labels = {label for line in _series(text) for label in re.findall(r'([^\s{,]+)="', line)} - {"le"}
    found += [f"label {label}: not snake_case" for label in labels if not NAME.fullmatch(label)]
    return sorted(found)


def _heads(text: str) -> Counter[str]:
    return Counter(" ".join(line.split()[1:3]) for line in text.splitlines() if line.startswith("#"))


def _series(text: str) -> Counter[str]:
    lines = (line for line in text.splitlines() if line and not line.startswith("#"))
    return Counter(line.rpartition(" ")[0] for line in lines)


def _name(series: str) -> str:
    return series.partition("{")[0]


def _of_name(name: str, kind: str) -> list[str]:
    words = name.split("_")
    found = []
    if not NAME.fullmatch(name):
        found.append("not snake_case")
    if not name.startswith(("flume_", *STANDARD)):
        found.append("neither ours nor a standard one")
    if (kind == "counter") != name.endswith("_total"):
        found.append("counters, and only they, end in _total")
    if name.endswith(("_count", "_sum", "_bucket")):
        found.append("a suffix of histograms")
    found += [f"the unit {word}" for word in words if word in ODD_UNITS]
    found += [f"the type {word} in its name" for word in words if word in TYPES]
    return found
