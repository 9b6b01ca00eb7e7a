"""The memory a captured step works on: fixed addresses that every replay finds again.

What host and device share lies in host memory. All of it belongs to the device while a step runs, with two
exceptions that flags guard: the host reads `queries` between a signal and the opening of the gate that
answers it, and `keys` of a layer from the signal after; it writes `part_o` and `part_lse` before it opens
that gate. In a direct step those three are idle.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from flume_kernels.gpu.device import Device, Flags
from torch import Tensor

from flume_weight.cuda.buckets import StepSize
from flume_weight.cuda.direct_tables import DirectTables
from flume_weight.cuda.shortlist_buffers import ASK_WORDS, ShortlistBuffers
from flume_weight.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class MicrobatchBuffers:
    """One microbatch of b rows, P parts, L layers; all in host memory.

    queries [b, query_heads, head_dim]; keys [L, 2, b, kv_heads, head_dim], K before V; part_o [P, b,
    query_heads, head_dim]; part_lse float32 [P, b, query_heads], −∞ where a row has no such part.
    """

    rows: slice  # of the step's
    queries: Tensor
    keys: Tensor
    part_o: Tensor
    part_lse: Tensor

    @classmethod
    def allocate(
        cls, device: Device, config: ModelConfig, rows: slice, parts: int, dtype: torch.dtype
    ) -> MicrobatchBuffers:
        count, heads, dim = rows.stop - rows.start, config.num_query_heads, config.head_dim
        return cls(
            rows,
            queries=device.host_tensor(count, heads, dim, dtype=dtype),
            keys=device.host_tensor(config.num_layers, 2, count, config.num_kv_heads, dim, dtype=dtype),
            part_o=device.host_tensor(parts, count, heads, dim, dtype=dtype),
            part_lse=device.host_tensor(parts, count, heads, dtype=torch.float32),
        )


@dataclass(frozen=True, slots=True)
class StepBuffers:
    """A step of B rows. inputs int64 [2 + ASK_WORDS, B] in host memory, of which token_ids, positions and the
    shortlists' asks are parts, so that the device fetches them at once; logits float32 [B, vocab] on the
    device.

    The device waits at one gate per microbatch, for its partials. It signals, per microbatch, each layer's
    queries and at last the end of its keys; and once, with the highest number, the end of the step.
    """

    size: StepSize
    inputs: Tensor
    token_ids: Tensor
    positions: Tensor
    logits: Tensor
    shortlists: ShortlistBuffers
    microbatches: tuple[MicrobatchBuffers, ...]
    flags: Flags
    direct: DirectTables | None = None  # of a direct step, whose queries and partials lie elsewhere

    @classmethod
    def allocate(
        cls, device: Device, config: ModelConfig, size: StepSize, parts: int, dtype: torch.dtype
    ) -> StepBuffers:
        step = size.microbatch_rows
        slices = [slice(at, at + step) for at in range(0, size.rows, step)]
        buffers = [MicrobatchBuffers.allocate(device, config, rows, parts, dtype) for rows in slices]
        inputs = device.host_tensor(2 + ASK_WORDS, size.rows, dtype=torch.int64)
        return cls(
            size,
            inputs,
            token_ids=inputs[0],
            positions=inputs[1],
            logits=device.tensor(size.rows, config.vocab_size, dtype=torch.float32),
            shortlists=ShortlistBuffers.allocate(device, inputs[2:]),
            microbatches=tuple(buffers),
            flags=Flags(device, gates=size.microbatches, signals=size.microbatches + 1),
        )

    @property
    def parts(self) -> int:
        """Most attention nodes that one sequence may lie on."""
        return self.microbatches[0].part_o.shape[0]

    def for_direct(self, device: Device) -> StepBuffers:
        """The same memory for a direct step, with flags of its own: both kinds take their turns.

        Raises ValueError for several microbatches.
        """
        if self.size.microbatches > 1:
            raise ValueError(f"a direct step has one microbatch, not {self.size.microbatches}")
        tables = DirectTables.allocate(device, self.parts, self.size.rows)
        return replace(self, flags=Flags(device, gates=1, signals=2), direct=tables)

    def signal_of(self, microbatch: int) -> int:
        """The flag that it signals each layer's queries on."""
        return self.size.microbatches + microbatch

    def fill(self, token_ids: Tensor, positions: Tensor) -> None:
        """Set the next step's rows; those of the bucket beyond them become padding, with no past anywhere.
        Nothing is asked of their logits but the largest.

        token_ids and positions int64 [at most B], on the host. The step before must have ended.
        """
        count = len(token_ids)
        self.token_ids[:count], self.positions[:count] = token_ids, positions
        self.token_ids[count:], self.positions[count:] = 0, 0
        self.shortlists.asks.zero_()
        for microbatch in self.microbatches:
            microbatch.part_lse.fill_(-torch.inf)
