"""The RoPE keys of a GGUF file, read as llama.cpp reads them -> Rope.

There a file without `rope.scaling.type` scales linearly, `rope.scale_linear` is the factor's old name, a
factor of 0 is none, and `rope.scaling.attn_factor` multiplies cosines and sines whatever the type.
"""

from __future__ import annotations

from flume_weight.model.config import (
    LinearScaling,
    Rope,
    RopeScaling,
    YarnScaling,
    yarn_attention_factor,
)
from flume_weight.model.errors import UnsupportedFeature
from flume_weight.model.field_lists import Only
from flume_weight.model.fields import Fields

TYPES = "none, linear, yarn"
NOT_SET = -1.0  # of yarn_ext_factor: as the type says


def read_rope(fields: Fields, context_tokens: int) -> Rope:
    """Raises BadConfig or UnsupportedFeature, naming the key."""
    theta = fields.number("rope.freq_base", 10000.0)
    factor = _factor(fields)
    attention_factor = fields.number("rope.scaling.attn_factor", 1.0)
    kind = fields.text("rope.scaling.type", "linear")
    match kind:
        case "none" | "linear":
            _require(fields, "rope.scaling.yarn_ext_factor", 0.0, NOT_SET)
            _require(fields, "rope.scaling.yarn_attn_factor", 1.0)
            scaling: RopeScaling | None = LinearScaling(factor) if kind == "linear" and factor != 1 else None
            return Rope(theta, scaling, attention_factor, context_tokens)
        case "yarn":
            return _yarn(fields, theta, factor, attention_factor, context_tokens)
    raise UnsupportedFeature(fields.path, fields.name_of("rope.scaling.type"), kind, TYPES)


def _factor(fields: Fields) -> float:
    name = "rope.scaling.factor" if fields.has("rope.scaling.factor") else "rope.scale_linear"
    return 1.0 if fields.raw(name) == 0 else fields.number(name, 1.0)


def _yarn(fields: Fields, theta: float, factor: float, attention_factor: float, context_tokens: int) -> Rope:
    usual = yarn_attention_factor(factor)
    _require(fields, "rope.scaling.yarn_ext_factor", 1.0, NOT_SET)
    # llama.cpp computes the factor itself for these families; a converter may have written the same number.
    _require(fields, "rope.scaling.yarn_attn_factor", 1.0, usual)
    name = "rope.scaling.original_context_length"
    original = fields.integer(name) if fields.has(name) else None
    scaling = YarnScaling(
        factor=factor,
        original_context_tokens=original or context_tokens,
        beta_fast=fields.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=fields.number("rope.scaling.yarn_beta_slow", 1.0),
    )
    if scaling.beta_fast <= scaling.beta_slow:
        raise fields.bad("rope.scaling.yarn_beta_fast", f"more than yarn_beta_slow {scaling.beta_slow}")
    if theta <= 1:
        raise fields.bad("rope.freq_base", "a number above 1, as yarn divides by its logarithm")
    grown = int(factor * original) if original else 0
    return Rope(theta, scaling, attention_factor * usual, max(context_tokens, grown))


def _require(fields: Fields, name: str, *values: float) -> None:
    """Raises UnsupportedFeature for a value that would be computed in another way."""
    rule = Only(values, " or ".join(f"{value:g}" for value in values))
    if fields.has(name) and not rule.allows(fields.raw(name)):
        raise UnsupportedFeature(fields.path, fields.name_of(name), fields.raw(name), rule.supported)
