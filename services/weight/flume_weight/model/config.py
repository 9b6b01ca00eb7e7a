"""What a forward pass must know of a model, whatever kind of file it came from. Values only, no I/O."""

from __future__ import annotations

from dataclasses import dataclass

from flume_common.layout import KvLayout

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Every frequency divided by one factor."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Low frequencies divided by a factor, high ones kept, a smooth passage between (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context_tokens: int


@dataclass(frozen=True, slots=True)
class DivisorScaling:
    """Each frequency divided by its own number: how a GGUF file carries the llama3 scaling."""

    divisors: tuple[float, ...]  # head_dim / 2 of them


RopeScaling = LinearScaling | Llama3Scaling | DivisorScaling


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape and constants of one decoder of the Llama family.

    The families differ in four switches: `qkv_bias` (Qwen2), `qk_norm` (Qwen3), and the rarely
    used `output_bias` and `mlp_bias` of Llama.
    """

    architecture: str  # one of ARCHITECTURES
    vocab_size: int
    context_tokens: int
    eos_token_ids: tuple[int, ...]
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @property
    def query_size(self) -> int:
        """Elements of one token's queries, all heads."""
        return self.num_query_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Elements of one token's keys, all heads (its values are as many)."""
        return self.num_kv_heads * self.head_dim

    def layout(self, dtype: str, block_tokens: int = 16) -> KvLayout:
        """How this model's KV lies in memory; `dtype` is a key of `layout.DTYPE_BYTES`."""
        return KvLayout(
            num_layers=self.num_layers,
            num_query_heads=self.num_query_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=dtype,
            block_tokens=block_tokens,
        )
