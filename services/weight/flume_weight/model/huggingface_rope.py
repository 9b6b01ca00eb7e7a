"""`rope_scaling` and `rope_theta` (transformers 4) or `rope_parameters` (transformers 5) -> Rope."""

from __future__ import annotations

from collections.abc import Mapping

from flume_weight.model.config import (
    LinearScaling,
    Llama3Scaling,
    Rope,
    YarnScaling,
    yarn_attention_factor,
)
from flume_weight.model.config_fields import ROPE_FIELDS
from flume_weight.model.errors import UnsupportedFeature
from flume_weight.model.fields import Fields

SPELLINGS = ("rope_scaling", "rope_parameters")


def read_rope(fields: Fields, context_tokens: int) -> tuple[Rope, list[str]]:
    """The config's RoPE, and the names of its fields that are in no list.

    Raises BadConfig or UnsupportedFeature, naming the field.
    """
    rotary = fields.number("partial_rotary_factor", 1.0)
    if rotary != 1.0:
        raise UnsupportedFeature(fields.path, "partial_rotary_factor", rotary, "1.0")
    found = [parameters for name in SPELLINGS if (parameters := fields.sub(name))]
    if not found:
        return Rope(fields.number("rope_theta", 10000.0), None, 1.0, context_tokens), []
    unknown = [name for parameters in found for name in _check(parameters)]
    ropes = [_read(parameters, fields, context_tokens) for parameters in found]
    if ropes[0] != ropes[-1]:
        raise fields.bad("rope_parameters", "what rope_scaling says, or only one of the two")
    return ropes[0], unknown


def _check(parameters: Fields) -> list[str]:
    for name in parameters:
        if isinstance(parameters.raw(name), Mapping):
            raise UnsupportedFeature(
                parameters.path, parameters.name_of(name), parameters.raw(name), "one RoPE for all layers"
            )
    kind = _kind(parameters)
    if kind not in ROPE_FIELDS:
        raise UnsupportedFeature(
            parameters.path, parameters.name_of("rope_type"), kind, ", ".join(ROPE_FIELDS)
        )
    rotary = parameters.number("partial_rotary_factor", 1.0)
    if rotary != 1.0:
        raise UnsupportedFeature(parameters.path, parameters.name_of("partial_rotary_factor"), rotary, "1.0")
    return ROPE_FIELDS[kind].check(parameters)


def _kind(parameters: Fields) -> str:
    return parameters.text("rope_type", parameters.text("type", "default"))


def _read(parameters: Fields, fields: Fields, context_tokens: int) -> Rope:
    theta = parameters.number("rope_theta", fields.number("rope_theta", 10000.0))
    match _kind(parameters):
        case "linear":
            return Rope(theta, LinearScaling(parameters.number("factor")), 1.0, context_tokens)
        case "llama3":
            return Rope(theta, _llama3(parameters, fields, context_tokens), 1.0, context_tokens)
        case "yarn":
            return _yarn(parameters, fields, theta, context_tokens)
    return Rope(theta, None, 1.0, context_tokens)


def _original_tokens(parameters: Fields, fields: Fields) -> int | None:
    """As transformers: the field beside rope_parameters goes before the one inside."""
    for where in (fields, parameters):
        if where.has("original_max_position_embeddings"):
            return where.integer("original_max_position_embeddings")
    return None


def _llama3(parameters: Fields, fields: Fields, context_tokens: int) -> Llama3Scaling:
    scaling = Llama3Scaling(
        factor=parameters.number("factor"),
        low_freq_factor=parameters.number("low_freq_factor"),
        high_freq_factor=parameters.number("high_freq_factor"),
        original_context_tokens=_original_tokens(parameters, fields) or context_tokens,
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise parameters.bad("high_freq_factor", f"more than low_freq_factor {scaling.low_freq_factor}")
    return scaling


def _yarn(parameters: Fields, fields: Fields, theta: float, context_tokens: int) -> Rope:
    original = _original_tokens(parameters, fields)
    trained_tokens = original or context_tokens
    # Without a factor it is what the config promises over what was trained, as in transformers.
    factor = parameters.number("factor", context_tokens / trained_tokens)
    scaling = YarnScaling(
        factor=factor,
        original_context_tokens=trained_tokens,
        beta_fast=parameters.number("beta_fast", 32.0),
        beta_slow=parameters.number("beta_slow", 1.0),
        truncate=parameters.flag("truncate", True),
    )
    if scaling.beta_fast <= scaling.beta_slow:
        raise parameters.bad("beta_fast", f"more than beta_slow {scaling.beta_slow}")
    if theta <= 1:
        raise parameters.bad("rope_theta", "a number above 1, as yarn divides by its logarithm")
    # Qwen's instructions add yarn and leave max_position_embeddings alone: the context grows all the same.
    grown = int(factor * original) if original else 0
    return Rope(theta, scaling, _attention_factor(parameters, factor), max(context_tokens, grown))


def _attention_factor(parameters: Fields, factor: float) -> float:
    if parameters.has("attention_factor"):
        return parameters.number("attention_factor")
    if parameters.has("mscale") and parameters.has("mscale_all_dim"):
        wanted, all_dims = parameters.number("mscale"), parameters.number("mscale_all_dim")
        return yarn_attention_factor(factor, wanted) / yarn_attention_factor(factor, all_dims)
    return yarn_attention_factor(factor)
