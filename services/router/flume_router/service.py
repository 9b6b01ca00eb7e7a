"""What both front doors share: the served model, how requests are read, answered and counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import msgspec
from flume_protos.v1 import weight_pb2 as pb

from flume_router.byte_budget import ByteBudget
from flume_router.errors import ModelNotFound
from flume_router.generation import Generation
from flume_router.http.door import Door
from flume_router.in_flight import InFlight
from flume_router.prompts import ModelLimits
from flume_router.reading.reader import RequestReader
from flume_router.sequence_request import SequenceRequest
from flume_router.text_model import TextModel
from flume_router.weight_pool import WeightPool

_INT64_SPAN = 2**64
_INT64_MAX = 2**63 - 1


class Service(msgspec.Struct, frozen=True):
    model: str
    text: TextModel
    pool: WeightPool
    generation: Generation
    in_flight: InFlight
    bodies: ByteBudget
    reader: RequestReader
    door: Door
    started_at_s: float  # Unix time
    incarnations: Callable[[], int] = lambda: 0  # of etcd, seen by us

    @property
    def ready(self) -> bool:
        """Whether new requests have a chance."""
        return self.pool.ready and not self.in_flight.draining

    def require_model(self, model: str) -> None:
        if model != self.model:
            raise ModelNotFound(model, self.model)

    @property
    def limits(self) -> ModelLimits:
        """Raises NoWeightNode."""
        return self.pool.limits


def sequences(base: SequenceRequest, prompts: Sequence[Sequence[int]], n: int) -> Iterator[SequenceRequest]:
    """`n` sequences for each prompt, prompt by prompt; ids and seeds count up, so that answers differ."""
    total = len(prompts) * n
    for index in range(total):
        sampling = pb.Sampling()
        sampling.CopyFrom(base.sampling)
        if sampling.HasField("seed"):
            sampling.seed = wrapped(sampling.seed + index % n)
        yield msgspec.structs.replace(
            base,
            id=base.id if total == 1 else f"{base.id}-{index}",
            prompt_token_ids=prompts[index // n],
            sampling=sampling,
        )


def wrapped(number: int) -> int:
    """Into the int64 range, as overflow does."""
    return (number + _INT64_MAX + 1) % _INT64_SPAN - _INT64_MAX - 1
