"""Which program attends to which keys: the split of one step's attention over the chip, made on the device.

All layers of a step ask about the same rows and lengths, so the split is worked out once and every layer
reads it. A captured
graph holds the planning kernel too: lengths live in device memory, and nothing but their upper bounds is
fixed at capture.

Words: a *row* is one sequence of the step and its queries. Its queries × group are cut into *query tiles*,
its keys into *key tiles*. An *item* is one query tile over a run of key tiles, for one KV head at a time; a
query tile with several items has its partials merged afterwards. Programs take items until none is left.

How many items (after Flash-Decoding's heuristic): with `slots` programs resident at once, for each number
of waves w the shortest run of key tiles is found that needs at most w·slots items over all KV heads. Its
cost in key tiles is

    max(run + overhead, ceil(items · kv_heads / slots) · (tiles / items + overhead))

that is, the longest item or the waves of average ones. The cheapest w wins. A batch that fills the chip by
itself is not split; a single long sequence is cut into exactly as many runs as the chip has slots for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

ITEM_WORDS = (
    8  # row, first query, query rows, first query row of the tile, first key, end key, splits, unused
)
TILE_WORDS = 8  # first item, splits, first query, query rows, first query row of the tile, unused × 3
MAX_WAVES = 8
OVERHEAD_TILES = 1.5  # what starting and ending an item costs, in key tiles


@triton.jit
def _items_of(query_tiles, key_tiles, run):
    return query_tiles * tl.maximum((key_tiles + run - 1) // run, 1)


@triton.jit
def _run_length(query_tiles, key_tiles, slots, kv_heads, run_bits, least_run, overhead, WAVES: tl.constexpr):
    # Bisection for all numbers of waves at once: [WAVES, ROWS].
    waves = tl.arange(0, WAVES)
    room = (waves + 1) * slots
    longest = tl.maximum(tl.max(key_tiles, 0), 1)
    low = tl.full([WAVES], 1, tl.int32)
    high = tl.zeros([WAVES], tl.int32) + longest
    for _ in range(run_bits):
        run = (low + high) // 2
        items = tl.sum(_items_of(query_tiles[None, :], key_tiles[None, :], run[:, None]), 1)
        fits = items * kv_heads <= room
        high = tl.where(fits, run, high)
        low = tl.where(fits, low, tl.minimum(run + 1, high))

    items = tl.sum(_items_of(query_tiles[None, :], key_tiles[None, :], high[:, None]), 1)
    tiles = tl.sum(query_tiles * key_tiles, 0)
    mean = tiles / tl.maximum(items, 1).to(tl.float32)
    used_waves = (items * kv_heads + slots - 1) // slots
    cost = tl.maximum(high + overhead, used_waves * (mean + overhead))
    best = tl.argmin(cost, 0)
    return tl.maximum(tl.sum(tl.where(waves == best, high, 0), 0), least_run)


@triton.jit
def _plan_kernel(
    lengths_ptr,  # [rows] int32
    starts_ptr,  # [rows + 1] int32, or the lengths again when every row has one query
    items_ptr,  # [max_items, ITEM_WORDS] int32
    tiles_ptr,  # [max_tiles, TILE_WORDS] int32
    counts_ptr,  # [3] int32: items, query tiles, items taken beyond the first of each program
    num_rows,
    slots,
    kv_heads,
    run_bits,
    least_run,
    overhead,
    GROUP: tl.constexpr,
    TILE_ROWS: tl.constexpr,  # query rows of a query tile
    TILE_KEYS: tl.constexpr,
    ONE_QUERY: tl.constexpr,
    ROWS: tl.constexpr,  # next power of two >= num_rows
    WAVES: tl.constexpr,
    LANES: tl.constexpr,
    ITEM: tl.constexpr,
    TILE: tl.constexpr,
):
    # One program per row; each works out the whole split, then writes its own row's part of it.
    row = tl.program_id(0)
    rows = tl.arange(0, ROWS)
    real = rows < num_rows
    lengths = tl.load(lengths_ptr + rows, mask=real, other=0)
    if ONE_QUERY:
        first = rows
        query_rows = tl.where(real, GROUP, 0)
    else:
        first = tl.load(starts_ptr + rows, mask=real, other=0)
        query_rows = (tl.load(starts_ptr + rows + 1, mask=real, other=0) - first) * GROUP
    query_tiles = (query_rows + TILE_ROWS - 1) // TILE_ROWS
    key_tiles = (lengths + TILE_KEYS - 1) // TILE_KEYS
    run = _run_length(query_tiles, key_tiles, slots, kv_heads, run_bits, least_run, overhead, WAVES)
    items = _items_of(query_tiles, key_tiles, run)

    mine = rows == row
    before = rows < row
    item_at = tl.sum(tl.where(before, items, 0), 0)
    tile_at = tl.sum(tl.where(before, query_tiles, 0), 0)
    my_length = tl.sum(tl.where(mine, lengths, 0), 0)
    my_first = tl.sum(tl.where(mine, first, 0), 0)
    my_query_rows = tl.sum(tl.where(mine, query_rows, 0), 0)
    my_query_tiles = tl.sum(tl.where(mine, query_tiles, 0), 0)
    my_key_tiles = tl.sum(tl.where(mine, key_tiles, 0), 0)
    splits = tl.maximum((my_key_tiles + run - 1) // run, 1)
    if row == 0:
        tl.store(counts_ptr, tl.sum(items, 0))
        tl.store(counts_ptr + 1, tl.sum(query_tiles, 0))
        tl.store(counts_ptr + 2, 0)

    lanes = tl.arange(0, LANES)
    for base in range(0, my_query_tiles * splits, LANES):
        index = base + lanes
        tile = index // splits
        split = index % splits
        # Even runs, the longer ones first: no item of a row with keys is empty.
        even = my_key_tiles // splits
        longer = my_key_tiles % splits
        begin = split * even + tl.minimum(split, longer)
        end = begin + even + tl.where(split < longer, 1, 0)
        out = items_ptr + (item_at + index) * ITEM
        inside = index < my_query_tiles * splits
        tl.store(out, tl.zeros([LANES], tl.int32) + row, mask=inside)
        tl.store(out + 1, tl.zeros([LANES], tl.int32) + my_first, mask=inside)
        tl.store(out + 2, tl.zeros([LANES], tl.int32) + my_query_rows, mask=inside)
        tl.store(out + 3, tile * TILE_ROWS, mask=inside)
        tl.store(out + 4, begin * TILE_KEYS, mask=inside)
        tl.store(out + 5, tl.minimum(end * TILE_KEYS, my_length), mask=inside)
        tl.store(out + 6, tl.zeros([LANES], tl.int32) + splits, mask=inside)
    for base in range(0, my_query_tiles, LANES):
        tile = base + lanes
        out = tiles_ptr + (tile_at + tile) * TILE
        inside = tile < my_query_tiles
        tl.store(out, item_at + tile * splits, mask=inside)
        tl.store(out + 1, tl.zeros([LANES], tl.int32) + splits, mask=inside)
        tl.store(out + 2, tl.zeros([LANES], tl.int32) + my_first, mask=inside)
        tl.store(out + 3, tl.zeros([LANES], tl.int32) + my_query_rows, mask=inside)
        tl.store(out + 4, tile * TILE_ROWS, mask=inside)


@dataclass(frozen=True, slots=True)
class PlanShape:
    """Upper bounds of a step and how its attention is tiled; everything a captured plan cannot change.

    Raises ValueError for sizes that are not positive or tiles that are no powers of two.
    """

    max_rows: int
    max_tokens: int  # queries of all rows together; equal to max_rows when every row has one query
    max_length: int  # keys of one row
    num_query_heads: int
    num_kv_heads: int
    tile_rows: int = 16  # queries × group in one query tile
    tile_keys: int = 64
    slots: int = 264  # programs resident on the device at once

    def __post_init__(self) -> None:
        for name in ("max_rows", "max_tokens", "max_length", "num_kv_heads", "slots"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_query_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_query_heads} query heads are no multiple of {self.num_kv_heads} KV heads"
            )
        for name in ("tile_rows", "tile_keys"):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                raise ValueError(f"{name} must be a power of two of at least 16, got {size}")

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.num_query_heads // self.num_kv_heads

    @property
    def one_query(self) -> bool:
        """Whether every row has exactly one query, as in decode."""
        return self.max_tokens == self.max_rows

    @property
    def max_tiles(self) -> int:
        """Query tiles of the largest step: every row may leave one unfilled."""
        whole = (self.max_tokens * self.group) // self.tile_rows
        return self.max_rows if self.one_query and self.group <= self.tile_rows else whole + self.max_rows

    @property
    def max_items(self) -> int:
        """Items of the largest step: one per query tile, or what fills the most waves."""
        return self.max_tiles + MAX_WAVES * self.slots // self.num_kv_heads

    @property
    def run_bits(self) -> int:
        """Bisection steps that pin down a run of at most `max_length` keys."""
        return (-(-self.max_length // self.tile_keys)).bit_length() + 1


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Device memory for the split of one step; `update` fills it, `decode_attention` reads it.

    items int32 [max_items, 8], tiles int32 [max_tiles, 8], counts int32 [3]; partial float32
    [max_items, kv_heads, tile_rows, head_dim] and partial_lse [max_items, kv_heads, tile_rows] (base 2) hold
    what split query tiles leave for the merge, and are written only for those. One plan serves one stream.
    """

    shape: PlanShape
    items: Tensor
    tiles: Tensor
    counts: Tensor
    partial: Tensor
    partial_lse: Tensor

    @classmethod
    def allocate(
        cls, shape: PlanShape, head_dim: int, device: torch.device | str, lender: AttentionPlan | None = None
    ) -> AttentionPlan:
        """`lender`: another plan of the same stream; its partials serve this one, too, if they are enough."""

        def words(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        heads = (shape.num_kv_heads, shape.tile_rows)
        partial, partial_lse = None, None
        if lender is not None and lender.partial.shape[1:] == (*heads, head_dim):
            partial, partial_lse = lender.partial[: shape.max_items], lender.partial_lse[: shape.max_items]
        if partial is None or partial_lse is None or len(partial) < shape.max_items:
            partial = torch.empty(shape.max_items, *heads, head_dim, dtype=torch.float32, device=device)
            partial_lse = torch.empty(shape.max_items, *heads, dtype=torch.float32, device=device)
        return cls(
            shape,
            items=words(shape.max_items, ITEM_WORDS),
            tiles=words(shape.max_tiles, TILE_WORDS),
            counts=words(3),
            partial=partial,
            partial_lse=partial_lse,
        )

    def update(self, lengths: Tensor, query_starts: Tensor | None = None) -> None:
        """Work out the split for these rows. Queues kernels on the current stream; reads nothing on the host.

        lengths int32 [rows <= max_rows], keys of each row, 0 allowed; query_starts int32 [rows + 1] rising
        from 0, the queries of row r being [query_starts[r], query_starts[r + 1]); without it row r has
        query r. Raises ValueError for shapes, dtypes or more rows than the plan was allocated for.
        """
        shape = self.shape
        rows = lengths.numel()
        if lengths.dtype is not torch.int32 or not 1 <= rows <= shape.max_rows:
            raise ValueError(f"lengths must be int32 [1..{shape.max_rows}], got {lengths.dtype} [{rows}]")
        if query_starts is None:
            starts = lengths
        else:
            starts = query_starts
            if starts.dtype is not torch.int32 or starts.shape != (rows + 1,):
                raise ValueError(
                    f"query_starts must be int32 [{rows + 1}], got {starts.dtype} {starts.shape}"
                )
        _plan_kernel[(rows,)](
            lengths, starts, self.items, self.tiles, self.counts,
            rows, shape.slots, shape.num_kv_heads, shape.run_bits,
            triton.cdiv(256, shape.tile_keys), OVERHEAD_TILES,
            GROUP=shape.group, TILE_ROWS=shape.tile_rows, TILE_KEYS=shape.tile_keys,
            ONE_QUERY=query_starts is None, ROWS=triton.next_power_of_2(rows), WAVES=MAX_WAVES, LANES=64,
            ITEM=ITEM_WORDS, TILE=TILE_WORDS, num_warps=4,
        )  # fmt: skip
