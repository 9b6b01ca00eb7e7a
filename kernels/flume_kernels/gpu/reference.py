"""Slow, obvious definitions of what the GPU kernels compute, in float64. Tests compare against these.

`merge_partials` and `attention` are those of `flume_kernels.reference`. Not for use in a service.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flume_kernels import reference
from flume_kernels.gpu.kv_pool import KvPool

merge_partials = reference.merge_partials


def gather(pool: KvPool, table: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """K and V of one row, float64 [kv_heads, length, head_dim] each, scales applied."""
    num_blocks = -(-length // pool.block_tokens)
    blocks = table[:num_blocks].long()
    kv = pool.kv[blocks].double()
    if pool.scales is not None:
        kv = kv * pool.scales[blocks].double()[..., None, None]
    # [blocks, 2, heads, tokens, dim] -> [2, heads, blocks · tokens, dim]
    flat = kv.permute(1, 2, 0, 3, 4).reshape(2, pool.num_kv_heads, -1, pool.head_dim)
    return flat[0, :, :length], flat[1, :, :length]


def paged_attention(
    q: Tensor, pool: KvPool, tables: Tensor, lengths: Tensor, query_starts: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """q [tokens, query_heads, head_dim] -> o like q, lse [tokens, query_heads], both float64; see
    `decode_attention`."""
    o = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float64, device=q.device)
    starts = query_starts.tolist() if query_starts is not None else list(range(len(lengths) + 1))
    for row, length in enumerate(lengths.tolist()):
        first, last = starts[row], starts[row + 1]
        if length and last > first:
            k, v = gather(pool, tables[row], length)
            o[first:last], lse[first:last] = reference.attention(q[first:last], k, v, scale)
    return o, lse


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., hidden] · weight / √(mean(x²) + eps), float64."""
    x = x.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.double()


def rope(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [tokens, heads, head_dim], tables [positions, head_dim / 2]: the halves of a head are the two
    coordinates."""
    c, s = cos[positions.long()].double().unsqueeze(1), sin[positions.long()].double().unsqueeze(1)
    a, b = x.double().chunk(2, -1)
    return torch.cat([a * c - b * s, b * c + a * s], -1)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """gate · σ(gate) · up, float64."""
    return torch.nn.functional.silu(gate.double()) * up.double()


def skinny_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
) -> Tensor:
    """x [rows, inner], or its norm, · weightᵀ + bias, gate · silu of the halves when gated; float64."""
    x = x.double() if norm is None else rms_norm(x, norm, eps)
    y = x @ weight.double().T
    if bias is not None:
        y = y + bias.double()
    return silu_mul(*y.chunk(2, -1)) if gated else y


def decode_merge(q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float) -> Tensor:
    """Attention of each token to itself and to what P partials cover, float64 [tokens, heads, head_dim].

    q [tokens, heads, head_dim], k, v [tokens, kv_heads, head_dim], o [P, tokens, heads, head_dim], lse
    [P, tokens, heads].
    """
    group = q.shape[1] // k.shape[1]
    keys, values = (x.double().repeat_interleave(group, 1) for x in (k, v))
    own_lse = scale * (q.double() * keys).sum(-1)
    merged, _ = reference.merge_partials(
        torch.cat([values[None], o.double()]), torch.cat([own_lse[None], lse.double()])
    )
    return merged


def kv_append(pool: KvPool, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
    """The pool's `kv` after token i of k, v [tokens, kv_heads, head_dim] went to slots[i]; negative slots
    go nowhere."""
    kv = pool.kv.clone()
    limit = torch.finfo(kv.dtype).max
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        block, offset = divmod(slot, pool.block_tokens)
        both = torch.stack([k[token], v[token]]).float()
        if pool.scales is not None:
            both = (both / pool.scales[block][..., None]).clamp(-limit, limit)
        kv[block, :, :, offset] = both.to(kv.dtype)
    return kv


PHILOX_ROUNDS = 10
PHILOX_KEYS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
PHILOX_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
LOW, HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox(seed: int, counters: tuple[np.ndarray, int, int, int]) -> list[np.ndarray]:
    """Philox 4×32-10 (Salmon et al., SC'11): four arrays of 32-bit words, as uint64, for each counter."""
    key0, key1 = np.uint64(seed & 0xFFFFFFFF), np.uint64((seed >> 32) & 0xFFFFFFFF)
    c0 = counters[0].astype(np.uint64)
    c1, c2, c3 = (np.full_like(c0, counter) for counter in counters[1:])
    for _ in range(PHILOX_ROUNDS):
        a, b = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (b >> HALF) ^ c1 ^ key0, b & LOW, (a >> HALF) ^ c3 ^ key1, a & LOW
        key0, key1 = (key0 + PHILOX_KEYS[0]) & LOW, (key1 + PHILOX_KEYS[1]) & LOW
    return [c0, c1, c2, c3]


def gumbel_noise(seed: int, position: int, vocabulary: int, lanes: int) -> Tensor:
    """float64 [vocabulary]: −ln(−ln u), u = (word >> 9 + ½) / 2²³; token i takes word (i // lanes) % 4 of
    counter i − (i // lanes) % 4 · lanes."""
    tokens = np.arange(vocabulary)
    quarter = (tokens // lanes) % 4
    words = np.stack(philox(seed, (tokens - quarter * lanes, position, 0, 0)))
    word = words[quarter, tokens]
    uniform = ((word >> np.uint64(9)).astype(np.float64) + 0.5) / 2.0**23
    return torch.from_numpy(-np.log(-np.log(uniform)))


def kept(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Which tokens of logits [vocabulary] may be drawn, bool. Ties at either edge are all kept.

    top_k > 0: logits of at least the k-th largest; then top_p < 1: the fewest of the most probable among
    these whose probability reaches top_p of theirs together.
    """
    keep = torch.ones_like(logits, dtype=torch.bool)
    if 0 < top_k < logits.numel():
        keep = logits >= torch.topk(logits, top_k).values[-1]
    if top_p < 1:
        weights = torch.where(keep, torch.exp((logits - logits.max()).double() / temperature), 0.0)
        ordered, order = torch.sort(weights, descending=True, stable=True)
        needed = int(torch.searchsorted(ordered.cumsum(0), top_p * ordered.sum()))
        keep &= logits >= logits[order[min(needed, logits.numel() - 1)]]
    return keep


def sample(
    logits: Tensor, temperature: float, top_k: int, top_p: float, seed: int, position: int, lanes: int
) -> int:
    """The token `sampling.sample` draws for one row of logits [vocabulary]."""
    if temperature == 0:
        return int(torch.argmax(logits))
    noise = gumbel_noise(seed, position, logits.numel(), lanes).to(logits.device)
    drawn = logits.double() / temperature + noise
    drawn = drawn.masked_fill(~kept(logits, temperature, top_k, top_p), -torch.inf)
    return int(torch.argmax(drawn))


def draw_noise(keys: Tensor, vocabulary: int) -> Tensor:
    """float64 [rows, vocabulary]: standard Gumbel noise of each token under keys int64 [rows], the noise of
    `flume_weight.sampling.noise`; of torch operations alone, none of which waits for a device."""
    x = torch.arange(vocabulary, device=keys.device) * 0x9E3779B1
    x = _mixed(x + keys[:, None])
    x = _mixed(x ^ (keys[:, None] >> 32))
    u = (x.float() * 2.0**-32).clamp(2.0**-33, 1 - 2.0**-24).double()  # rounded as the sampler does
    return -torch.log(-torch.log1p(-u))


def _mixed(x: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser of the lower halves of int64."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)


def shortlist(
    logits: Tensor, keys: Tensor, temperatures: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens int64, values float64 [rows, 1 + n], sums float64 [rows, 3]) of `shortlist.shortlist`,
    where n ≤ count are the tokens there are; what a temperature of 0 leaves out is nan, and its token −1."""
    x = logits.double()
    ordered, order = torch.sort(x, dim=-1, descending=True, stable=True)
    ordered, order = ordered[:, :count], order[:, :count]
    below = x - ordered[:, :1]
    draws = (temperatures > 0)[:, None]
    scaled = below / torch.where(draws, temperatures[:, None], 1.0)
    scores, best = torch.topk(scaled + draw_noise(keys, x.shape[1]), 2)
    drawn, margin = best[:, :1], scores[:, :1] - scores[:, 1:]
    mass, scaled_mass = (each.exp().sum(-1, keepdim=True) for each in (below, scaled))
    return (
        torch.cat([torch.where(draws, drawn, -1), order], 1),
        torch.cat([torch.where(draws, x.gather(1, drawn), torch.nan), ordered], 1),
        torch.cat([mass, torch.where(draws, torch.cat([scaled_mass, margin], 1), torch.nan)], 1),
    )
