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
from flume_weight.model.linear import Linear


@dataclass(slots=True)
class Layer:
    """One decoder layer."""

    input_norm: Tensor
    query: Linear
    query_norm: Tensor | None  # [head_dim]
    kv: Linear  # K's rows, then V's
    key_norm: Tensor | None  # [head_dim]
    output: Linear
    post_norm: Tensor
    gate_up: Linear  # the gate's rows, then up's
    down: Linear

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.query, self.kv, self.output, self.gate_up, self.down


@dataclass(slots=True)
class Weights:
    embedding: Tensor  # [vocab, hidden]
    layers: list[Layer]
    final_norm: Tensor
    head: Linear  # [vocab, hidden]; its weight is the embedding itself where they are tied

    def pack(self) -> None:
        """Once all places are filled: each matrix, one by one, into the layout that computes fastest."""
        for layer in self.layers:
            for linear in layer.linears:
                linear.pack()
        self.head.pack()


def allocate(config: ModelConfig, dtype: torch.dtype) -> Weights:
    """Uninitialised parameters of the right shapes."""
    embedding = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype)
    return Weights(
        embedding=embedding,
        layers=[_layer(config, dtype) for _ in range(config.num_layers)],
        final_norm=torch.empty(config.hidden_size, dtype=dtype),
        head=Linear(embedding if config.tie_word_embeddings else torch.empty_like(embedding)),
    )


def _layer(config: ModelConfig, dtype: torch.dtype) -> Layer:
    def vector(size: int, wanted: bool) -> Tensor | None:
        return torch.empty(size, dtype=dtype) if wanted else None

    def linear(outputs: int, inputs: int, bias: bool) -> Linear:
        return Linear(torch.empty(outputs, inputs, dtype=dtype), vector(outputs, bias))

    hidden, inner = config.hidden_size, config.intermediate_size
    query, kv = config.query_size, config.kv_size
    return Layer(
        input_norm=torch.empty(hidden, dtype=dtype),
        query=linear(query, hidden, config.qkv_bias),
        query_norm=vector(config.head_dim, config.qk_norm),
        kv=linear(2 * kv, hidden, config.qkv_bias),
        key_norm=vector(config.head_dim, config.qk_norm),
        output=linear(hidden, query, config.output_bias),
        post_norm=torch.empty(hidden, dtype=dtype),
        gate_up=linear(2 * inner, hidden, config.mlp_bias),
        down=linear(hidden, inner, config.mlp_bias),
    )


def slots(weights: Weights) -> dict[str, Tensor]:
    """Checkpoint tensor name -> the view that its values belong into."""
    places = {"model.embed_tokens.weight": weights.embedding, "model.norm.weight": weights.final_norm}
    if weights.head.weight is not weights.embedding:
        places["lm_head.weight"] = weights.head.weight
    for number, layer in enumerate(weights.layers):
        places |= {f"model.layers.{number}.{name}": place for name, place in _layer_slots(layer).items()}
    return places


def _layer_slots(layer: Layer) -> dict[str, Tensor]:
    places: dict[str, Tensor | None] = {
        "input_layernorm.weight": layer.input_norm,
        "self_attn.q_proj.weight": layer.query.weight,
        "self_attn.q_proj.bias": layer.query.bias,
        "self_attn.q_norm.weight": layer.query_norm,
        "self_attn.k_proj.weight": _half(layer.kv.weight, 0),
        "self_attn.k_proj.bias": _half(layer.kv.bias, 0),
        "self_attn.k_norm.weight": layer.key_norm,
        "self_attn.v_proj.weight": _half(layer.kv.weight, 1),
        "self_attn.v_proj.bias": _half(layer.kv.bias, 1),
        "self_attn.o_proj.weight": layer.output.weight,
        "self_attn.o_proj.bias": layer.output.bias,
        "post_attention_layernorm.weight": layer.post_norm,
        "mlp.gate_proj.weight": _half(layer.gate_up.weight, 0),
        "mlp.gate_proj.bias": _half(layer.gate_up.bias, 0),
        "mlp.up_proj.weight": _half(layer.gate_up.weight, 1),
        "mlp.up_proj.bias": _half(layer.gate_up.bias, 1),
        "mlp.down_proj.weight": layer.down.weight,
        "mlp.down_proj.bias": layer.down.bias,
    }
    return {name: place for name, place in places.items() if place is not None}


def _half(fused: Tensor | None, which: int) -> Tensor | None:
    return None if fused is None else fused.chunk(2, dim=0)[which]
