"""Rotary position embedding: frequencies, the table of cosines and sines, and the rotation.

The pairing is the "half" one of Hugging Face checkpoints: element i turns with element i + d/2.
    q' = q · cos(pθ) + rotate_half(q) · sin(pθ),   θ_i = base^(−2i/d)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flume_weight.model.config import DivisorScaling, LinearScaling, Llama3Scaling, ModelConfig


class RopeTable:
    """cos and sin of every position of the context, in the model's dtype, computed in float32.

    Two tables [context, head_dim / 2] on `device`: 131 072 positions of 64 pairs take 34 MB in bfloat16.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        positions = torch.arange(config.context_tokens, dtype=torch.float32)
        angles = positions[:, None] * inverse_frequencies(config)
        self._cos = angles.cos().to(device, dtype)
        self._sin = angles.sin().to(device, dtype)
        self._half = config.head_dim // 2

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions int64 [T] -> cos, signed sin, each [T, 1, head_dim].

        Raises IndexError for a position outside the context.
        """
        cos = self._cos.index_select(0, positions).unsqueeze(1)
        sin = self._sin.index_select(0, positions).unsqueeze(1)
        # The minus of rotate_half goes to the sines, so that it is a mere roll: (-a)·s = a·(-s) exactly.
        return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)

    def rotate(self, x: Tensor, at: tuple[Tensor, Tensor]) -> Tensor:
        """x [T, heads, head_dim] -> the same shape, turned."""
        cos, signed_sin = at
        return (x * cos).add_(x.roll(self._half, -1).mul_(signed_sin))


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Float32 [head_dim / 2], after the config's scaling."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    match config.rope_scaling:
        case LinearScaling(factor):
            return frequencies / factor
        case Llama3Scaling() as scaling:
            return _llama3(frequencies, scaling)
        case DivisorScaling(divisors):
            return frequencies / torch.tensor(divisors, dtype=torch.float32)
        case None:
            return frequencies


def _llama3(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    """The Llama 3.1 rule: long waves stretched by `factor`, short ones kept, between them a blend."""
    wavelengths = 2 * math.pi / frequencies
    low, high, old = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_context_tokens
    stretched = torch.where(wavelengths > old / low, frequencies / scaling.factor, frequencies)
    blend = (old / wavelengths - low) / (high - low)
    blended = (1 - blend) * stretched / scaling.factor + blend * stretched
    medium = (wavelengths >= old / high) & (wavelengths <= old / low)
    return torch.where(medium, blended, stretched)
