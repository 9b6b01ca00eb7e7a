"""Chunks that attend to themselves in plain torch, against the definition, within 1e-5 of it."""

import pytest
import torch
from flume_kernels import reference
from flume_kernels.gpu.causal_attention import causal_attention


@pytest.mark.parametrize(
    "tokens, heads, kv_heads, block", [(1, 4, 2, 256), (7, 4, 2, 3), (9, 6, 1, 4), (5, 3, 3, 5)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_token_sees_itself_and_what_lies_before_it(tokens, heads, kv_heads, block, dtype):
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = (
        torch.randn(tokens, count, 16, generator=generator).to(dtype) for count in (heads, kv_heads, kv_heads)
    )
    o, lse = causal_attention(q, k, v, 0.25, block)
    want_o, want_lse = reference.causal_attention(q, k, v, 0.25)
    torch.testing.assert_close(o.double(), want_o, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-5)


def test_a_token_that_comes_later_changes_nothing_before_it():
    q, k, v = (torch.randn(6, 2, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    o, _ = causal_attention(q, k, v, 1.0)
    k[4:], v[4:] = 1e3, -1e3
    again, _ = causal_attention(q, k, v, 1.0)
    assert torch.equal(o[:4], again[:4])
