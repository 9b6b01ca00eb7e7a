"""Faults, many times over, against a real cluster: `make soak ARGS="--rounds 20 --only scale"`.

Each round of a fault runs greedy streams on a cluster of its own kind, does the fault while they run and
holds the tokens against an undisturbed run; afterwards nothing may be held, listed or running that should
not be. Prints a line per round and a table of counts, and exits with 1 when any round failed.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "e2e"))
from conftest import Cluster, running
from streams import Stream

PROMPTS = [
    "The harbour town woke early. " * 20,
    "Question: what is a lighthouse for?\nAnswer:",
    "1. apples\n2. pears\n3.",
    "Once upon a time there was a clockmaker who " * 6,
]
TOKENS = 200


def scale(cluster: Cluster) -> None:
    """1 -> 4 -> 1."""
    cluster.scale(4)
    cluster.scale(1)


def kill(role: str) -> Callable[[Cluster], None]:
    def fault(cluster: Cluster) -> None:
        os.kill(cluster.pid_in_use(role), signal.SIGKILL)

    return fault


def stop(role: str, seconds: float) -> Callable[[Cluster], None]:
    def fault(cluster: Cluster) -> None:
        pid = cluster.pid_in_use(role)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(pid, signal.SIGCONT)

    return fault


FAULTS: dict[str, Callable[[Cluster], None]] = {
    "scale": scale,
    "kill attention": kill("attention"),
    "kill weight": kill("weight"),
    "kill controller": kill("controller"),
    "stop attention": stop("attention", 20),
    "stop controller": stop("controller", 20),
}


def one_round(cluster: Cluster, fault: Callable[[Cluster], None], expected: list[list[int]]) -> str:
    """What went wrong; empty when nothing did."""
    streams = [Stream(cluster, prompt, TOKENS) for prompt in PROMPTS]
    for stream in streams:
        stream.wait_for(5)
    fault(cluster)
    wrong = [number for number, stream in enumerate(streams) if stream.result() != expected[number]]
    cluster.until(lambda: cluster.held_blocks() == 0, 15, "every block free")
    cluster.until(lambda: cluster.get("routes") == [], 15, "no route left")
    cluster.until(cluster.settled, 60, "as many nodes as desired")
    return f"streams {wrong} differ" if wrong else ""


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--rounds", type=int, default=20, help="of each fault")
    flags.add_argument("--only", nargs="*", default=list(FAULTS), choices=list(FAULTS), metavar="FAULT")
    args = flags.parse_args()
    counts: dict[str, list[str]] = {name: [] for name in args.only}
    with (
        tempfile.TemporaryDirectory() as folder,
        running(Path(folder), "--dtype", "float32", "--attention", "2", "--weight", "2") as cluster,
    ):
        expected = [Stream(cluster, prompt, TOKENS).result() for prompt in PROMPTS]
        for name in args.only:
            for number in range(1, args.rounds + 1):
                cluster.scale(1 if name == "scale" else 2, "--wait-drained")
                started_s = time.monotonic()
                try:
                    failure = one_round(cluster, FAULTS[name], expected)
                except Exception as error:
                    failure = f"{type(error).__name__}: {error}"
                counts[name].append(failure)
                took_s = time.monotonic() - started_s
                print(f"{name} {number}/{args.rounds}: {failure or 'ok'} ({took_s:.1f} s)", flush=True)
    print(f"\n{'fault':<20}{'rounds':>8}{'failed':>8}")
    for name, failures in counts.items():
        print(f"{name:<20}{len(failures):>8}{sum(map(bool, failures)):>8}")
    return int(any(any(failures) for failures in counts.values()))


if __name__ == "__main__":
    raise SystemExit(main())
