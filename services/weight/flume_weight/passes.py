"""How an engine computes its steps, on whatever device.

`Backend` is all that the engine's process asks for; `CpuBackend` is the CPU's, `cuda.backend.GpuBackend` the
GPU's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from flume_common.lanes import Port
from flume_common.layout import KvLayout

from flume_weight.batch import Batch
from flume_weight.cuda.microbatching import Microbatching
from flume_weight.errors import PeerLost
from flume_weight.mapped_region import MappedRegion
from flume_weight.model import Transformer
from flume_weight.peer import Peer
from flume_weight.range_attention import RangeAttention
from flume_weight.scheduler import StepLimits
from flume_weight.scores import Scores
from flume_weight.threads import Threads


class Pass(Protocol):
    """One way to run a step: `forward`, then `finish`, which commits it on the attention nodes."""

    def takes(self, batch: Batch) -> bool: ...

    def forward(self, number: int, batch: Batch) -> Scores:
        """Step `number`: the scores of the batch's logit rows, on any device.

        Raises PeerLost or PeerSilent.
        """
        ...

    def finish(self) -> list[PeerLost]:
        """Send the last keys. A lane that fails here does not undo the step."""
        ...

    def forget(self, peer: Peer) -> None:
        """The lane is closed: its frames are not ours any more."""


@dataclass(frozen=True, slots=True)
class Passes:
    """`attention` sends the PLANs, also of no step. The first of `kinds` that takes a batch runs it."""

    attention: RangeAttention
    kinds: Sequence[Pass]
    microbatching: Microbatching | None = None  # where steps can be cut
    map_region: Callable[[bytes], MappedRegion] | None = None
    """From a RegionHandle, where steps can be asked about in such a region. Raises MappingFailed."""
    containable: bool = False  # after an exception in one step the next may run

    def of(self, batch: Batch) -> Pass:
        return next(kind for kind in self.kinds if kind.takes(batch))

    def forget(self, peer: Peer) -> None:
        for kind in self.kinds:
            kind.forget(peer)


class Backend(Protocol):
    packs: bool  # whether the model's weights are packed for oneDNN

    def passes(
        self, model: Transformer, port: Port, layout: KvLayout, limits: StepLimits, timeout_s: float
    ) -> AbstractContextManager[Passes]:
        """All that is needed before the first step is made here, as nothing runs yet."""
        ...


class CpuBackend:
    """The model's own pass, in the engine's thread."""

    packs = True

    def __init__(self, threads: Threads) -> None:
        self._threads = threads

    @contextmanager
    def passes(
        self, model: Transformer, port: Port, layout: KvLayout, limits: StepLimits, timeout_s: float
    ) -> Iterator[Passes]:
        attention = RangeAttention(port, layout, layout.head_dim**-0.5, timeout_s)
        yield Passes(attention, (CpuPass(model, attention, self._threads),), containable=True)


class CpuPass:
    """Takes every batch."""

    def __init__(self, model: Transformer, attention: RangeAttention, threads: Threads) -> None:
        self._model = model
        self._attention = attention
        self._threads = threads

    def takes(self, batch: Batch) -> bool:
        return True

    def forward(self, number: int, batch: Batch) -> Scores:
        self._threads.set_for(len(batch.token_ids))
        self._attention.begin(number, batch.exchanges, batch.chunks)
        return Scores(
            self._model.forward(batch.token_ids, batch.positions, self._attention, batch.logit_rows)
        )

    def finish(self) -> list[PeerLost]:
        return self._attention.finish()

    def forget(self, peer: Peer) -> None:
        self._attention.forget(peer)
