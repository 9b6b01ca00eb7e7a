"""Forward passes that no captured step runs: prompts in chunks, sequences spread over many nodes.

The model's own forward pass with its tensors on a device. Attention within the chunk is computed there;
queries and keys go to the lanes, and partials come back, through host memory, layer by layer.
"""

from __future__ import annotations

import torch
from flume_kernels.gpu.causal_attention import causal_attention
from torch import Tensor

from flume_weight.batch import Batch
from flume_weight.errors import PeerLost
from flume_weight.model import Transformer
from flume_weight.peer import Peer
from flume_weight.range_attention import Exchange, Index, RangeAttention, merge_rows
from flume_weight.scores import Scores


class DeviceRangeAttention(RangeAttention):
    """The same over lanes, for q, k and v on any device."""

    def query(self, layer: int, q: Tensor) -> None:
        super().query(layer, q.cpu())

    def _local(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        tokens, heads, dim = q.shape
        grouped = q.view(tokens, k.shape[1], -1, dim)
        o = v.unsqueeze(2).expand_as(grouped).to(torch.float32, copy=True).view(tokens, heads, dim)
        lse = torch.matmul(grouped.float(), k.float().unsqueeze(-1)).view(tokens, heads) * self._scale
        for chunk in self._chunks:
            o[chunk], lse[chunk] = causal_attention(q[chunk], k[chunk], v[chunk], self._scale)
        return o, lse

    def _fold(self, exchange: Exchange, layer: int, o: Tensor, lse: Tensor) -> None:
        receiver, frame = self._await_partial(exchange.peer, layer)
        part_o, part_lse = self._views_of(exchange.peer).partial(frame, exchange.num_queries)
        there = part_o.to(o.device), part_lse.to(o.device)
        merge_rows(o, lse, *there, _on(exchange.queries, o.device))
        receiver.give_back(frame)


class EagerForward:
    """Takes every batch; the counterpart of `forward.CapturedForward`."""

    def __init__(self, model: Transformer, attention: RangeAttention) -> None:
        self._model = model
        self._attention = attention

    def takes(self, batch: Batch) -> bool:
        return True

    def forward(self, number: int, batch: Batch) -> Scores:
        """Step `number`: the scores of the batch's logit rows, on the device.

        Raises PeerLost and StepRefused.
        """
        self._attention.begin(number, batch.exchanges, batch.chunks)
        where = self._model.weights.embedding.device
        ids, positions, rows = (
            each.to(where) for each in (batch.token_ids, batch.positions, batch.logit_rows)
        )
        return Scores(self._model.forward(ids, positions, self._attention, rows))

    def finish(self) -> list[PeerLost]:
        """Send the last keys. A lane that fails here does not undo the step."""
        return self._attention.finish()

    def forget(self, peer: Peer) -> None:
        """The lane is closed: its frames are not ours any more."""
        self._attention.forget(peer)


def _on(rows: Index, where: torch.device) -> Index:
    return rows if isinstance(rows, slice) else rows.to(where)
