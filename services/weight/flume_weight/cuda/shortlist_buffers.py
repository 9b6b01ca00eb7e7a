"""What the samplers of a step's rows ask, and what the device answers, in memory that both ends share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from flume_kernels.gpu.device import Device
from torch import Tensor

from flume_weight.sampling import CANDIDATES, Ask, Shortlist

ASK_WORDS = 3  # of int64: key, temperature as the bits of float64, whether candidates are wanted


@dataclass(frozen=True, slots=True)
class ShortlistBuffers:
    """Of B rows, all in host memory; `flume_kernels.gpu.shortlist` says what stands where.

    asks int64 [ASK_WORDS, B]; tokens int32 and values float32 [B, 1 + CANDIDATES]; sums float32 [B, 3].
    """

    asks: Tensor
    tokens: Tensor
    values: Tensor
    sums: Tensor

    @classmethod
    def allocate(cls, device: Device, asks: Tensor) -> ShortlistBuffers:
        rows = asks.shape[1]
        return cls(
            asks,
            tokens=device.host_tensor(rows, 1 + CANDIDATES, dtype=torch.int32),
            values=device.host_tensor(rows, 1 + CANDIDATES, dtype=torch.float32),
            sums=device.host_tensor(rows, 3, dtype=torch.float32),
        )

    def ask(self, rows: Iterable[int], asks: Iterable[Ask | None]) -> None:
        """Set what the next step answers of some rows. Where nothing is set it is the largest alone."""
        words = self.asks.numpy()
        temperatures = words[1].view(np.float64)
        for row, ask in zip(rows, asks, strict=True):
            if ask is not None:
                words.view(np.uint64)[0, row] = ask.key
                temperatures[row] = ask.temperature
                words[2, row] = ask.candidates

    def read(
        self, rows: Iterable[int], asks: Iterable[Ask | None], vocab_size: int
    ) -> Sequence[Shortlist | None]:
        """The answers, as they were asked for. They are views: the next step overwrites them."""
        tokens, values = self.tokens.numpy(), self.values.numpy()
        sums = self.sums.tolist()
        most = min(CANDIDATES, vocab_size)

        def answer(row: int, ask: Ask) -> Shortlist:
            end = 1 + (most if ask.candidates else 1)
            mass, scaled_mass, margin = sums[row]
            return Shortlist(
                tokens[row, 1:end], values[row, 1:end], vocab_size, mass, scaled_mass,
                best=int(tokens[row, 0]), best_logit=float(values[row, 0]), margin=margin,
            )  # fmt: skip

        return [None if ask is None else answer(row, ask) for row, ask in zip(rows, asks, strict=True)]
