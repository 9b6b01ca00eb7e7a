"""Captured steps by size: each is captured once, and from then on replayed whatever the routes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from flume_kernels.gpu.device import Device, Graph, capture

from flume_weight.cuda.buckets import StepSize
from flume_weight.cuda.decode_step import DecodeStep
from flume_weight.cuda.ops import Angles, Ops
from flume_weight.cuda.step_buffers import StepBuffers
from flume_weight.model.config import ModelConfig
from flume_weight.model.weights import Weights

DEFAULT_PARTS = 4  # attention nodes of one sequence that a captured step merges


@dataclass(slots=True)
class CapturedStep:
    """One graph and the memory it works on."""

    buffers: StepBuffers
    graph: Graph
    num_layers: int
    replays: int = 0

    def launch(self) -> None:
        """Queue a replay. The last one must have ended."""
        self.replays += 1
        self.graph.launch()


class CapturedSteps:
    """`captures` counts for good: more than one of each size and kind would mean that it was done again."""

    def __init__(
        self, device: Device, ops: Ops, config: ModelConfig, weights: Weights, parts: int = DEFAULT_PARTS
    ) -> None:
        self._device = device
        self._ops = ops
        self._config = config
        self._weights = weights
        self.parts = parts  # attention nodes of one sequence that a step merges
        self._angles = Angles.of(config, weights.embedding.device)
        self._steps: dict[tuple[StepSize, bool], CapturedStep] = {}
        self.captures = 0

    def prepare(self, sizes: Iterable[StepSize], direct: bool = False) -> None:
        """Capture these now, so that no request waits for it. Nothing may run."""
        for size in sizes:
            self.of(size, direct)

    def of(self, size: StepSize, direct: bool = False) -> CapturedStep:
        """The step of this size, over frames or direct; captured if it is the first, when nothing may run."""
        step = self._steps.get((size, direct))
        if step is None:
            step = self._steps[size, direct] = self._capture(self._buffers(size, direct))
        return step

    @property
    def replays(self) -> int:
        return sum(step.replays for step in self._steps.values())

    def _buffers(self, size: StepSize, direct: bool) -> StepBuffers:
        if direct:
            return self.of(size).buffers.for_direct(self._device)
        dtype = self._weights.embedding.dtype
        buffers = StepBuffers.allocate(self._device, self._config, size, self.parts, dtype)
        # Padding until the first real step: no part weighs anything.
        buffers.fill(buffers.token_ids[:0], buffers.positions[:0])
        return buffers

    def _capture(self, buffers: StepBuffers) -> CapturedStep:
        step = DecodeStep(self._device, self._ops, self._config, self._weights, self._angles, buffers)
        graph = capture(self._device, buffers.flags, step)
        self.captures += 1
        return CapturedStep(buffers, graph, self._config.num_layers)
