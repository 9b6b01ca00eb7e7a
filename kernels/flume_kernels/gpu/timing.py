"""Time of work on a GPU, as it is inside a captured step: launches from a graph, not from Python."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch


def graph_seconds(run: Callable[[], object], calls: int = 8, replays: int = 11) -> float:
    """Seconds of one call: the median over replays of a captured graph of several, so launches cost what
    they do in a step."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        graph.replay()  # keeps the device busy until the timed one is queued
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / calls)
    return float(median(times))
