"""How many threads a forward pass uses: few tokens are bound by memory, many by arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(slots=True)
class Threads:
    """Intra-op threads by the size of a step."""

    decode: int = 1
    prefill: int = 2
    from_tokens: int = 32  # a step of this many tokens counts as prefill
    _current: int = field(default=0, init=False)

    def set_for(self, tokens: int) -> None:
        wanted = self.prefill if tokens >= self.from_tokens else self.decode
        if wanted != self._current:
            torch.set_num_threads(wanted)
            self._current = wanted
