"""`config.json` and `generation_config.json` of a Hugging Face directory -> ModelConfig.

Whatever the forward pass does not compute is refused by name here, before a weight is read: each field is
in one of the lists of `config_fields`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import structlog

from flume_weight.model.config import ARCHITECTURES, ModelConfig
from flume_weight.model.config_fields import CONFIG_FIELDS
from flume_weight.model.errors import (
    BadConfig,
    DamagedFile,
    MissingFile,
    UnknownArchitecture,
    UnsupportedFeature,
)
from flume_weight.model.fields import Fields
from flume_weight.model.huggingface_rope import read_rope

CLASSES = tuple(f"{name}ForCausalLM" for name in ("Llama", "Mistral", "Qwen2", "Qwen3"))
DEFAULT_WINDOW = 4096  # of transformers' Mistral and Qwen configs
FIRST_WINDOW_LAYER = 28  # what max_window_layers defaults to in transformers' Qwen configs
MAX_CONTEXT = 1 << 24  # tokens; cosines and sines of every position are kept
MAX_LAYERS = 10_000
log = structlog.get_logger()


def read_config(directory: Path) -> ModelConfig:
    """Raises a ModelError that names the field. Fields that cannot be judged are named in the log."""
    fields = read_json(directory / "config.json", "a Hugging Face model directory has one")
    architecture = _architecture(fields)
    unknown = CONFIG_FIELDS[architecture].check(fields)
    _refuse_what_is_not_computed(fields)
    heads = fields.integer("num_attention_heads")
    hidden = fields.integer("hidden_size")
    layers = fields.integer("num_hidden_layers", maximum=MAX_LAYERS)
    rope, unknown_rope = read_rope(fields, fields.integer("max_position_embeddings", maximum=MAX_CONTEXT))
    _refuse_sliding_window(fields, architecture, layers, rope.context_tokens)
    bias = fields.flag("attention_bias", False) if architecture in ("llama", "qwen3") else False
    config = ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        context_tokens=rope.context_tokens,
        eos_token_ids=_eos(fields, directory),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=layers,
        num_query_heads=heads,
        num_kv_heads=_kv_heads(fields, architecture, heads),
        head_dim=fields.integer("head_dim", _head_dim(architecture, hidden, heads)),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        rope_attention_factor=rope.attention_factor,
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        qkv_bias=bias or architecture == "qwen2",
        output_bias=bias,
        mlp_bias=architecture == "llama" and fields.flag("mlp_bias", False),
        qk_norm=architecture == "qwen3",
    )
    require_consistent(fields, config, "num_attention_heads", "num_key_value_heads", "head_dim")
    _require_usual_scale(fields, config.head_dim)
    warn_of_unknown(fields, unknown + unknown_rope)
    return config


def read_json(path: Path, wanted_by: str) -> Fields:
    """Raises MissingFile or DamagedFile."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise MissingFile(path, wanted_by) from None
    except ValueError as error:
        raise DamagedFile(path, f"is not JSON: {error}") from error
    except RecursionError:
        raise DamagedFile(path, "is JSON that is nested too deeply") from None
    if not isinstance(values, dict):
        raise DamagedFile(path, f"is not a JSON object but a {type(values).__name__}")
    return Fields(path, values)


def require_consistent(fields: Fields, config: ModelConfig, heads: str, kv_heads: str, head_dim: str) -> None:
    """Raises BadConfig when the heads do not fit together; the last three name the file's fields."""
    if config.num_query_heads % config.num_kv_heads:
        expected = f"a divisor of {fields.name_of(heads)} {config.num_query_heads}"
        raise BadConfig(fields.path, fields.name_of(kv_heads), expected, config.num_kv_heads)
    if config.head_dim % 2:
        raise BadConfig(fields.path, fields.name_of(head_dim), "an even number", config.head_dim)
    for token in config.eos_token_ids:
        if token >= config.vocab_size:
            expected = f"token ids below the vocabulary size {config.vocab_size}"
            raise BadConfig(fields.path, "eos_token_id", expected, token)


def warn_of_unknown(fields: Fields, names: Sequence[str]) -> None:
    """Name in the log the fields that are in no list: they may change the model's arithmetic, or nothing."""
    if names:
        log.warning("model_fields_unknown", file=str(fields.path), fields=list(names))


def _require_usual_scale(fields: Fields, head_dim: int) -> None:
    """Raises UnsupportedFeature where attention would be scaled by something else than head_dim^-0.5."""
    usual = {"attention_multiplier": head_dim**-0.5, "query_pre_attn_scalar": float(head_dim)}
    for name, value in usual.items():
        if not math.isclose(fields.number(name, value), value, rel_tol=1e-4):
            raise UnsupportedFeature(
                fields.path, name, fields.raw(name), f"{value:g}, as head_dim is {head_dim}"
            )


def _architecture(fields: Fields) -> str:
    found = fields.text("model_type")
    if found not in ARCHITECTURES:
        raise UnknownArchitecture(fields.path, "model_type", found, ARCHITECTURES)
    for name in _list(fields, "architectures"):
        if name not in CLASSES:
            raise UnknownArchitecture(fields.path, "architectures", name, CLASSES)
    return found


def _list(fields: Fields, name: str) -> list[object]:
    value = fields.raw(name)
    if value is None:
        return []
    if not isinstance(value, list):
        raise fields.bad(name, "a list")
    return value


def _refuse_what_is_not_computed(fields: Fields) -> None:
    if fields.has("quantization_config"):
        quantization = fields.sub("quantization_config")
        method = quantization.raw("quant_method") if quantization else None
        raise UnsupportedFeature(fields.path, "quantization_config", method, "float32, float16, bfloat16")
    activation = fields.text("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedFeature(fields.path, "hidden_act", activation, "silu")


def _refuse_sliding_window(fields: Fields, architecture: str, layers: int, context: int) -> None:
    """Windows need masks at range edges. A window that no position can leave is no window."""
    kinds = _list(fields, "layer_types")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedFeature(fields.path, "layer_types", kind, "full_attention")
    match architecture:
        case "llama":
            windowed = "sliding_attention" in kinds
        case "mistral":
            windowed = True  # this class has a window in every layer, whatever layer_types says
        case _:
            windowed = fields.flag("use_sliding_window", False) and (
                "sliding_attention" in kinds
                if kinds
                else fields.integer("max_window_layers", FIRST_WINDOW_LAYER, minimum=0) < layers
            )
    window = _window(fields)
    if windowed and window < context:
        supported = f"full attention (a window of at least max_position_embeddings {context})"
        raise UnsupportedFeature(fields.path, "sliding_window", window, supported)


def _window(fields: Fields) -> float:
    """Tokens; null is none at all, but a config that does not speak of it means the classes' default."""
    if "sliding_window" in fields and not fields.has("sliding_window"):
        return math.inf
    return fields.integer("sliding_window", DEFAULT_WINDOW)


def _kv_heads(fields: Fields, architecture: str, heads: int) -> int:
    # Absent means as many as query heads for Llama only; the others' classes default to a number.
    optional = architecture == "llama" or "num_key_value_heads" in fields
    return fields.integer("num_key_value_heads", heads if optional else None)


def _head_dim(architecture: str, hidden: int, heads: int) -> int:
    # Qwen3's head size is independent of the hidden size; 128 is what its config defaults to.
    return 128 if architecture == "qwen3" else max(1, hidden // heads)


def _eos(fields: Fields, directory: Path) -> tuple[int, ...]:
    ids = fields.token_ids("eos_token_id")
    path = directory / "generation_config.json"
    if path.exists():
        ids += read_json(path, "").token_ids("eos_token_id")
    return tuple(dict.fromkeys(ids))
