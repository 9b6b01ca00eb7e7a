"""What the nodes say, made into the load that the autoscaler's policy reads. Pure but for `Pace`'s memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from flume_common.autoscale import NodeLoad
from flume_common.read_speed import ReadSums
from flume_protos.v1 import attention_pb2, weight_pb2

Sequences = Sequence[weight_pb2.SequenceInfo]
_KEEP = 0.95  # of older steps at every look, one a second: they fade over 20 s


@dataclass(slots=True)
class Pace:
    """The time per token of running sequences, measured between two looks at them."""

    _tokens: Mapping[str, int] = field(default_factory=dict)
    _at_s: float = 0.0

    def step_s(self, sequences: Sequences, now_s: float) -> float:
        """Mean seconds per token since the last look; 0 when nothing was generated."""
        before, elapsed_s = self._tokens, now_s - self._at_s
        self._tokens = {item.sequence: item.completion_tokens for item in sequences}
        self._at_s = now_s
        gained = [self._tokens[name] - before[name] for name in self._tokens.keys() & before.keys()]
        running = [tokens for tokens in gained if tokens > 0]
        return elapsed_s * len(running) / sum(running) if running and elapsed_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Reading:
    """How a node reads KV; both 0 where it is unknown."""

    bandwidth_bytes_per_s: float = 0.0
    step_s: float = 0.0  # of a mean step


_UNKNOWN = Reading()


@dataclass(slots=True)
class Readings:
    """How nodes read KV, from what they have summed up since the last look and, fading, before."""

    _last: dict[str, ReadSums] = field(default_factory=dict)
    _fading: dict[str, ReadSums] = field(default_factory=dict)
    _known: dict[str, Reading] = field(default_factory=dict)

    def look(self, stats: Sequence[attention_pb2.StatsReply]) -> dict[str, Reading]:
        """By node. What was known of one goes on being known while its steps do not tell."""
        for reply in stats:
            if reply.reads.steps:  # none: it has read nothing yet, or did not answer
                self._take(reply.node, _sums(reply.reads))
        for node in self._last.keys() - {reply.node for reply in stats}:
            self._last.pop(node)
            self._fading.pop(node)
            self._known.pop(node, None)
        return dict(self._known)

    def _take(self, node: str, sums: ReadSums) -> None:
        before = self._last.get(node, ReadSums())
        fresh = sums.plus(before, -1.0) if sums.steps >= before.steps else sums  # another engine by now
        recent = fresh.plus(self._fading.get(node, ReadSums()), _KEEP)
        self._last[node], self._fading[node] = sums, recent
        if bandwidth := recent.bandwidth_bytes_per_s():
            self._known[node] = Reading(bandwidth, recent.bytes / recent.steps / bandwidth)


def _sums(reads: attention_pb2.ReadSums) -> ReadSums:
    return ReadSums(*(getattr(reads, name) for name in ReadSums.__struct_fields__))


def rest_s(step_s: float, readings: Iterable[Reading]) -> float:
    """The part of a step that is not reading: nodes read side by side, so the slowest of them counts."""
    return max(step_s - max((reading.step_s for reading in readings), default=0.0), 0.0)


def waiting_tokens(sequences: Sequences) -> int:
    """Of prompts that nobody has begun on."""
    return sum(item.prompt_tokens for item in sequences if item.state == "WAITING")


def node_loads(
    stats: Iterable[attention_pb2.StatsReply],
    sequences: Sequences,
    readings: Mapping[str, Reading] = MappingProxyType({}),
) -> list[NodeLoad]:
    """One load per node that answered."""
    tails = Counter(item.route.ranges[-1].node for item in sequences if item.route.ranges)
    return [
        NodeLoad(
            capacity_tokens=reply.capacity_tokens,
            used_tokens=reply.used_tokens,
            open_tails=tails[reply.node],
            bytes_per_token=reply.kv_bytes / reply.capacity_tokens if reply.capacity_tokens else 0.0,
            bandwidth_bytes_per_s=readings.get(reply.node, _UNKNOWN).bandwidth_bytes_per_s,
        )
        for reply in stats
    ]
