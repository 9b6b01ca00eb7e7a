"""The kernels of an attention node by their definitions, for tests without a GPU."""

from __future__ import annotations

from types import SimpleNamespace

from flume_kernels.gpu import reference


class ReferenceAttention:
    """`flume_attention.cuda.ops.AttentionOps` by the definitions of the kernels, queued as kernels are."""

    def __init__(self, device):
        self._device = device

    def plan(self, rows, tokens, max_length):
        return SimpleNamespace(most=(rows, tokens, max_length))

    def update(self, plan, lengths, query_starts=None):
        def run():
            assert lengths.numel() <= plan.most[0] and int(lengths.max()) <= plan.most[2]
            plan.lengths, plan.starts = lengths.clone(), query_starts

        self._device.call(run)

    def attend(self, plan, q, pool, tables, o, lse):
        def run():
            starts = plan.starts
            got = reference.paged_attention(q, pool, tables, plan.lengths, starts, q.shape[-1] ** -0.5)
            o.copy_(got[0])
            lse.copy_(got[1])

        self._device.call(run)

    def merge(self, o, lse, out, out_lse):
        got = reference.merge_partials(o, lse)
        out.copy_(got[0])
        out_lse.copy_(got[1])

    def append(self, pool, k, v, slots):
        pool.kv.copy_(reference.kv_append(pool, k, v, slots))
