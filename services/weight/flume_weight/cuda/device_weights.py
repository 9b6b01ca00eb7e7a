"""A model's parameters in device memory."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch

from flume_weight.model.linear import Linear
from flume_weight.model.weights import Layer, Weights


def on_device(weights: Weights, device: torch.device) -> Weights:
    """A copy there; a head that shares the embedding's memory shares that of the copy.

    Raises ValueError for weights packed for a CPU, whose layout no other device reads.
    """
    embedding = weights.embedding.to(device)
    tied = weights.head.weight is weights.embedding
    return Weights(
        embedding=embedding,
        layers=[_layer(layer, device) for layer in weights.layers],
        final_norm=weights.final_norm.to(device),
        head=Linear(embedding) if tied else _moved(weights.head, device),
    )


def _layer(layer: Layer, device: torch.device) -> Layer:
    return Layer(**{field.name: _moved(getattr(layer, field.name), device) for field in fields(layer)})


def _moved(item: Any, device: torch.device) -> Any:
    """A tensor, a Linear or None."""
    if not isinstance(item, Linear):
        return None if item is None else item.to(device)
    if item.weight.is_mkldnn:
        raise ValueError("the weights are packed for a CPU: load them without packing")
    return Linear(item.weight.to(device), None if item.bias is None else item.bias.to(device))
