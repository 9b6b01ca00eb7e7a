"""Rotary position embedding: frequencies, the table of cosines and sines, and the rotation.

The pairing is the "half" one of Hugging Face checkpoints: element i turns with element i + d/2.
    q' = q · cos(pθ) + rotate_half(q) · sin(pθ),   θ_i = base^(−2i/d)

YaRN also scales attention: cosines and sines carry the factor, so that queries and keys both have it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flume_weight.model.config import (
    DivisorScaling,
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    YarnScaling,
)


class RopeTable:
    """cos and sin of every position of the context, in the model's dtype, computed in float32.

    Two tables [context, head_dim / 2] on `device`: 131 072 positions of 64 pairs take 34 MB in bfloat16.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        cos, sin = cos_and_sin(config)
        self._cos, self._sin = cos.to(device, dtype), sin.to(device, dtype)
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


def cos_and_sin(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Float32 [context, head_dim / 2] each, times the config's attention factor."""
    positions = torch.arange(config.context_tokens, dtype=torch.float32)
    angles = positions[:, None] * inverse_frequencies(config)
    return angles.cos() * config.rope_attention_factor, angles.sin() * config.rope_attention_factor


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Float32 [head_dim / 2], after the config's scaling."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    match config.rope_scaling:
        case LinearScaling(factor):
            return frequencies / factor
        case Llama3Scaling() as scaling:
            return _llama3(frequencies, scaling)
        case YarnScaling() as scaling:
            return _yarn(frequencies, scaling, config)
        case DivisorScaling(divisors):
            return frequencies / torch.tensor(divisors, dtype=torch.float32)
        case None:
            return frequencies


def _yarn(frequencies: Tensor, scaling: YarnScaling, config: ModelConfig) -> Tensor:
    """The YaRN rule: a ramp over pairs, from kept frequencies to divided ones."""
    low, high = yarn_ramp(scaling, config.rope_theta, config.head_dim)
    pairs = torch.arange(config.head_dim // 2, dtype=torch.float32)
    divided = ((pairs - low) / (high - low)).clamp(0, 1)
    return frequencies / scaling.factor * divided + frequencies * (1 - divided)


def yarn_ramp(scaling: YarnScaling, theta: float, head_dim: int) -> tuple[float, float]:
    """The pairs at which YaRN's ramp begins and ends."""

    def pair(turns: float) -> float:
        """The pair that turns so often in the original context."""
        return (
            head_dim
            * math.log(scaling.original_context_tokens / (turns * 2 * math.pi))
            / (2 * math.log(theta))
        )

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    return low, high + 0.001 if low == high else high  # a ramp without length is a step


def _llama3(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    """The Llama 3.1 rule: long waves stretched by `factor`, short ones kept, between them a blend."""
    wavelengths = 2 * math.pi / frequencies
    low, high, old = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_context_tokens
    stretched = torch.where(wavelengths > old / low, frequencies / scaling.factor, frequencies)
    blend = (old / wavelengths - low) / (high - low)
    blended = (1 - blend) * stretched / scaling.factor + blend * stretched
    medium = (wavelengths >= old / high) & (wavelengths <= old / low)
    return torch.where(medium, blended, stretched)
