"""Pictures of what was measured: one PNG beside each known JSON of a folder.

    python bench/plots.py RESULTS_FOLDER

kernels.json (bench/kernels.py)      share of the card's read bandwidth, kernel by kernel
step.json    (bench/gpu_step.py)     a decode step in one process and in two, and where its time goes
growth.json  (bench/gpu_growth.py)   a decode step as contexts grow and attention nodes join
poller.json  (bench/gpu_poller.py)   flag-to-send times of the driver
scale.json   (bench/scale_out.py --json)   the phases of a scale-out
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a file, not a window
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

Found = Any
BAR = 0.38
INCHES_PER_BAR = 0.28


def kernels(found: Found, axes: Axes) -> None:
    """Share of the measured read bandwidth; what reads nothing or failed is left out."""
    rows = [row for row in found["rows"] if row.get("bytes")]
    shares = [row["bytes"] / row["seconds"] / found["read_bytes_per_s"] for row in rows]
    _bars(axes, [f"{row['kernel']}, {row['shape']}" for row in rows], shares, "{:.0%}")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel(f"of {found['read_bytes_per_s'] / 1e12:.2f} TB/s read on {found['gpu']}")


def step(found: Found, axes: Axes) -> None:
    """Milliseconds; of the split step, the part from a query's signal to its answer is marked, and how long a
    direct step takes."""
    for at, row in enumerate(found):
        one, split = row["one"]["step"], row["split"]["step"]
        axes.barh(at - BAR / 2, one, BAR, color="tab:gray", label="one process" if not at else None)
        axes.barh(at + BAR / 2, split, BAR, color="tab:blue", label="split" if not at else None)
        waits = min(row["split"]["attention"], split)
        axes.barh(
            at + BAR / 2, waits, BAR, color="tab:orange", label="of it until answers came" if not at else None
        )
        if "direct" in row:
            axes.plot(
                [row["direct"]["step"]], [at + BAR / 2], "k|", ms=14, label="direct" if not at else None
            )
        axes.annotate(f" {row['ratio']:.2f} x", (split, at + BAR / 2), va="center")
    axes.set_yticks(range(len(found)), [f"{row['model']} {row['batch']} x {row['context']}" for row in found])
    axes.invert_yaxis()
    axes.set_xlabel("ms a step, median")
    axes.legend()


def growth(found: Found, axes: Axes) -> None:
    """Milliseconds a step over the context: measured, and what the models say of this card and of others."""
    stages = [row["stage"] for row in found["rows"]]
    contexts = [stage["context"] for stage in stages]
    axes.plot(contexts, [stage["p50"] for stage in stages], "o-", color="tab:blue", label="p50")
    axes.plot(contexts, [stage["p99"] for stage in stages], "o:", color="tab:blue", label="p99")
    for key, color in (("this_card", "tab:orange"), ("own_cards", "tab:green")):
        values = [row[key] for row in found["rows"]]
        axes.plot(contexts, values, "--", color=color, label=f"model, {key.replace('_', ' ')}")
    axes.set_xticks(contexts, [f"{stage['context']}\n{stage['nodes']} nodes" for stage in stages])
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"ms a step, {found['model']}, batch {found['batch']}")
    axes.legend()


def poller(found: Found, axes: Axes) -> None:
    """Microseconds, on a logarithmic scale: the tail is what matters."""
    names = [f"{name}, {key}" for name, numbers in found.items() for key in numbers]
    values = [value for numbers in found.values() for value in numbers.values()]
    _bars(axes, names, values, "{:.1f}")
    axes.set_xscale("log")
    axes.set_xlabel("µs")


def scale(found: Mapping[str, list[Mapping[str, float]]], axes: Axes) -> None:
    """When each phase was over, in milliseconds since the command: median, and the worst as a line."""
    names: list[str] = []
    medians: list[float] = []
    worst: list[float] = []
    for run, rounds in found.items():
        for phase in rounds[0]:
            times = [times[phase] for times in rounds if phase in times]
            names.append(f"{run}: {phase}")
            medians.append(statistics.median(times))
            worst.append(max(times))
    _bars(axes, names, medians, "{:.0f}")
    axes.hlines(range(len(names)), medians, worst, color="black", linewidth=0.8)
    axes.set_xlabel("ms since the command, median and worst")


def _bars(axes: Axes, names: Iterable[str], values: Iterable[float], label: str) -> None:
    values = list(values)
    bars = axes.barh(range(len(values)), values, color="tab:blue")
    axes.bar_label(bars, [label.format(value) for value in values], padding=3, fontsize=7)
    axes.set_yticks(range(len(values)), list(names), fontsize=7)
    axes.invert_yaxis()


PLOTS: Mapping[str, Callable[[Any, Axes], None]] = {
    "kernels": kernels, "step": step, "growth": growth, "poller": poller, "scale": scale,
}  # fmt: skip


def draw(source: Path) -> Path:
    """The picture of one JSON, beside it. Raises ValueError for what is none of ours."""
    found = json.loads(source.read_text())
    try:
        figure, axes = plt.subplots(layout="constrained")
        PLOTS[source.stem](found, axes)
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{source} is not as bench/ writes it: {error!r}") from error
    figure.set_size_inches(9, max(3.0, INCHES_PER_BAR * len(axes.get_yticks()) + 1))
    target = source.with_suffix(".png")
    figure.savefig(target, dpi=150)
    plt.close(figure)
    return target


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    sources = [path for name in PLOTS if (path := folder / f"{name}.json").exists()]
    if not sources:
        sys.stderr.write(f"none of {', '.join(f'{name}.json' for name in PLOTS)} in {folder}\n")
        return 2
    for source in sources:
        sys.stdout.write(f"{draw(source)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
