"""How the keys and values of one model lie in memory; what both ends of a lane must agree on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields

from flume_protos.v1 import common_pb2 as pb

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class LayoutMismatch(Exception):
    """Two ends of a lane disagree on a layout field, or on the hash of all of them."""

    def __init__(self, field: str, ours: object, theirs: object) -> None:
        super().__init__(f"KV layout differs in {field}: this node has {ours}, the peer has {theirs}")
        self.field = field
        self.ours = ours
        self.theirs = theirs


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Shape of one token's keys and values across the model."""

    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str  # a key of DTYPE_BYTES
    block_tokens: int = 16

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPE_BYTES)}")
        for field in ("num_layers", "num_query_heads", "num_kv_heads", "head_dim", "block_tokens"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        if self.num_query_heads % self.num_kv_heads:
            raise ValueError(
                f"num_query_heads {self.num_query_heads} is not a multiple of "
                f"num_kv_heads {self.num_kv_heads}"
            )

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return DTYPE_BYTES[self.dtype]

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.num_query_heads // self.num_kv_heads

    @property
    def layer_token_bytes(self) -> int:
        """Bytes of K and V of one token in one layer."""
        return 2 * self.num_kv_heads * self.head_dim * self.itemsize

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V of one token in all layers: 2 · L · H_kv · d · b."""
        return self.num_layers * self.layer_token_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of one KV block in all layers."""
        return self.block_tokens * self.token_bytes

    @property
    def hash(self) -> str:
        """16 hex digits that differ when any field does."""
        text = ";".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def blocks_of(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens of one range."""
        return -(-tokens // self.block_tokens)

    def require_same(self, theirs: KvLayout) -> None:
        """Raises LayoutMismatch naming the first field that differs."""
        for field in fields(self):
            ours, other = getattr(self, field.name), getattr(theirs, field.name)
            if ours != other:
                raise LayoutMismatch(field.name, ours, other)

    def to_proto(self) -> pb.KvLayout:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return pb.KvLayout(**values, hash=self.hash)

    @classmethod
    def from_proto(cls, message: pb.KvLayout) -> KvLayout:
        """Raises ValueError for impossible fields, LayoutMismatch when the sender's hash is another."""
        layout = cls(**{field.name: getattr(message, field.name) for field in fields(cls)})
        if message.hash != layout.hash:
            raise LayoutMismatch("hash", layout.hash, message.hash)
        return layout
