"""What a forward pass must know of a model, whatever kind of file it came from. Values only, no I/O."""

from __future__ import annotations

import math
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


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """Frequencies that turn seldom in the original context divided by a factor, those that turn often kept.

    Between the two lies a ramp over the pairs of a head: from the pair that turns `beta_fast` times in the
    original context to the one that turns `beta_slow` times (YaRN, arXiv 2309.00071).
    """

    factor: float
    original_context_tokens: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # the ends of the ramp are whole pairs


RopeScaling = LinearScaling | Llama3Scaling | DivisorScaling | YarnScaling


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """What YaRN multiplies queries and keys by, so that attention over more tokens is as peaked as before."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


@dataclass(frozen=True, slots=True)
class Rope:
    """How a model turns queries and keys, as read from its file."""

    theta: float
    scaling: RopeScaling | None
    attention_factor: float
    context_tokens: int  # with what the scaling adds


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
    rope_attention_factor: float = 1.0  # cosines and sines are multiplied by it
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
