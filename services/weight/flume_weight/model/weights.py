"""The parameters of a model as the forward pass wants them: fused where one product serves two ends.

K and V are one matrix, gate and up another; Q stays alone, as it is computed and sent first. `slots`
names every place by the tensor name of a Hugging Face checkpoint: the loader fills them one by one,
so a model is never in memory twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flume_weight.model.config import ModelConfig


@dataclass(slots=True)
class Layer:
    """One decoder layer; matrices are [out, in]."""

    input_norm: Tensor
    query: Tensor
    query_bias: Tensor | None
    query_norm: Tensor | None  # [head_dim]
    kv: Tensor  # K's rows, then V's
    kv_bias: Tensor | None
    key_norm: Tensor | None  # [head_dim]
    output: Tensor
    output_bias: Tensor | None
    post_norm: Tensor
    gate_up: Tensor  # the gate's rows, then up's
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


@dataclass(slots=True)
class Weights:
    embedding: Tensor  # [vocab, hidden]
    layers: list[Layer]
    final_norm: Tensor
    head: Tensor  # [vocab, hidden]; the embedding itself where they are tied


def allocate(config: ModelConfig, dtype: torch.dtype) -> Weights:
    """Uninitialised parameters of the right shapes."""
    embedding = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype)
    return Weights(
        embedding=embedding,
        layers=[_layer(config, dtype) for _ in range(config.num_layers)],
        final_norm=torch.empty(config.hidden_size, dtype=dtype),
        head=embedding if config.tie_word_embeddings else torch.empty_like(embedding),
    )


def _layer(config: ModelConfig, dtype: torch.dtype) -> Layer:
    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def when(wanted: bool, size: int) -> Tensor | None:
        return new(size) if wanted else None

    hidden, inner = config.hidden_size, config.intermediate_size
    query, kv = config.query_size, config.kv_size
    return Layer(
        input_norm=new(hidden),
        query=new(query, hidden),
        query_bias=when(config.qkv_bias, query),
        query_norm=when(config.qk_norm, config.head_dim),
        kv=new(2 * kv, hidden),
        kv_bias=when(config.qkv_bias, 2 * kv),
        key_norm=when(config.qk_norm, config.head_dim),
        output=new(hidden, query),
        output_bias=when(config.output_bias, hidden),
        post_norm=new(hidden),
        gate_up=new(2 * inner, hidden),
        gate_up_bias=when(config.mlp_bias, 2 * inner),
        down=new(hidden, inner),
        down_bias=when(config.mlp_bias, hidden),
    )


def slots(weights: Weights) -> dict[str, Tensor]:
    """Checkpoint tensor name -> the view that its values belong into."""
    places = {"model.embed_tokens.weight": weights.embedding, "model.norm.weight": weights.final_norm}
    if weights.head is not weights.embedding:
        places["lm_head.weight"] = weights.head
    for number, layer in enumerate(weights.layers):
        places |= {f"model.layers.{number}.{name}": place for name, place in _layer_slots(layer).items()}
    return places


def _layer_slots(layer: Layer) -> dict[str, Tensor]:
    places: dict[str, Tensor | None] = {
        "input_layernorm.weight": layer.input_norm,
        "self_attn.q_proj.weight": layer.query,
        "self_attn.q_proj.bias": layer.query_bias,
        "self_attn.q_norm.weight": layer.query_norm,
        "self_attn.k_proj.weight": _half(layer.kv, 0),
        "self_attn.k_proj.bias": _half(layer.kv_bias, 0),
        "self_attn.k_norm.weight": layer.key_norm,
        "self_attn.v_proj.weight": _half(layer.kv, 1),
        "self_attn.v_proj.bias": _half(layer.kv_bias, 1),
        "self_attn.o_proj.weight": layer.output,
        "self_attn.o_proj.bias": layer.output_bias,
        "post_attention_layernorm.weight": layer.post_norm,
        "mlp.gate_proj.weight": _half(layer.gate_up, 0),
        "mlp.gate_proj.bias": _half(layer.gate_up_bias, 0),
        "mlp.up_proj.weight": _half(layer.gate_up, 1),
        "mlp.up_proj.bias": _half(layer.gate_up_bias, 1),
        "mlp.down_proj.weight": layer.down,
        "mlp.down_proj.bias": layer.down_bias,
    }
    return {name: place for name, place in places.items() if place is not None}


def _half(fused: Tensor | None, which: int) -> Tensor | None:
    return None if fused is None else fused.chunk(2, dim=0)[which]
