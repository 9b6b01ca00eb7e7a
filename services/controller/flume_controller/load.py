"""What the nodes say, made into the load that the autoscaler's policy reads. Pure but for `Pace`'s memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from flume_common.autoscale import NodeLoad
from flume_protos.v1 import attention_pb2, weight_pb2

Sequences = Sequence[weight_pb2.SequenceInfo]


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


def waiting_tokens(sequences: Sequences) -> int:
    """Of prompts that nobody has begun on."""
    return sum(item.prompt_tokens for item in sequences if item.state == "WAITING")


def node_loads(stats: Iterable[attention_pb2.StatsReply], sequences: Sequences) -> list[NodeLoad]:
    """One load per node that answered."""
    tails = Counter(item.route.ranges[-1].node for item in sequences if item.route.ranges)
    return [
        NodeLoad(
            capacity_tokens=reply.capacity_tokens,
            used_tokens=reply.used_tokens,
            open_tails=tails[reply.node],
            bytes_per_token=reply.kv_bytes / reply.capacity_tokens if reply.capacity_tokens else 0.0,
        )
        for reply in stats
    ]
