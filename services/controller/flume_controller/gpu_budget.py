"""How a local cluster's nodes share the memory of one GPU. Pure.

Every weight node holds the model; what is left goes to the attention nodes in equal parts, with a part kept
for one node more, so that the cluster can be scaled out. Estimates lean to the large side: whoever knows
better says --kv-memory.
"""

from __future__ import annotations

from pathlib import Path

from flume_common.gguf_parts import part_paths
from flume_common.model_source import ModelSource

NODE_BYTES = 1 << 30  # context, kernels and captured steps of a process
WEIGHT_NODE_BYTES = 3 << 30  # with logits, and the memory of chunks of prompts
KEPT_FREE = 0.05  # of the card
LEAST_KV_BYTES = 64 << 20
GGUF_GROWTH = 4  # from four bits to bfloat16


class TooLittleMemory(Exception):
    def __init__(self, free_bytes: int, weights: int, model_bytes: int, attention: int) -> None:
        super().__init__(
            f"{free_bytes >> 20} MiB of the GPU are free: no room for {weights} weight nodes of about "
            f"{model_bytes >> 20} MiB each and KV of {attention} attention nodes besides; "
            "--kv-memory says how much each of these gets, whatever is estimated"
        )


def kv_bytes(memory_bytes: int, free_bytes: int, model_bytes: int, *, weights: int, attention: int) -> int:
    """KV memory of each attention node, `attention` with standbys. Raises TooLittleMemory."""
    left = free_bytes - int(KEPT_FREE * memory_bytes) - weights * (model_bytes + WEIGHT_NODE_BYTES)
    nodes = attention + 1
    each = left // nodes - NODE_BYTES
    if each < LEAST_KV_BYTES:
        raise TooLittleMemory(free_bytes, weights, model_bytes, attention)
    return each >> 20 << 20


def model_bytes(source: ModelSource, dtype: str) -> int:
    """In device memory, at most, as its files tell."""
    wide = 2 if dtype == "float32" else 1
    if source.kind == "gguf":
        return sum(path.stat().st_size for path in part_paths(source.path)) * GGUF_GROWTH * wide
    return sum(path.stat().st_size for path in _weights(source.path)) * wide


def _weights(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))
