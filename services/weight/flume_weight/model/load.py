"""From a path to a Transformer: a Hugging Face directory or a GGUF file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import structlog
import torch

from flume_weight.model.config import ModelConfig
from flume_weight.model.errors import MissingFile
from flume_weight.model.gguf import GgufSource
from flume_weight.model.huggingface import read_config
from flume_weight.model.linear import Linear
from flume_weight.model.safetensors import SafetensorsSource
from flume_weight.model.source import Progress, TensorSource, check, fill
from flume_weight.model.transformer import Transformer
from flume_weight.model.weights import Weights, allocate, slots

DTYPES = (torch.float32, torch.bfloat16)
HEAD = "lm_head.weight"
log = structlog.get_logger()


def load_model(
    path: Path, dtype: torch.dtype, progress: Progress | None = None, *, pack: bool = True
) -> Transformer:
    """A directory with config.json and safetensors, or a .gguf file, in float32 or bfloat16.

    Whatever precision the file has is converted, one tensor at a time: at no time is the model in
    memory twice. `progress` is called after every tensor. `pack`: for this machine's CPU; no
    other device reads such weights. Raises a ModelError naming file and place;
    ValueError for another dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}; supported are {', '.join(map(str, DTYPES))}")
    config, source = _open(path)
    own_head = config.tie_word_embeddings and HEAD in source.tensors
    if own_head:
        config = replace(config, tie_word_embeddings=False)
    with torch.device("meta"):  # sizes that no tensor has are refused before memory is asked for
        check(source, slots(allocate(config, dtype)), config.architecture)
    weights = allocate(config, dtype)
    places = slots(weights)
    fill(source, places, progress)
    del places
    if own_head:
        config = _tie_again_if_equal(config, weights, path)
    if pack:
        weights.pack()
    return Transformer(config, weights)


def _tie_again_if_equal(config: ModelConfig, weights: Weights, path: Path) -> ModelConfig:
    """Settle a config that says tied beside a file that has both matrices: what differs is kept."""
    if torch.equal(weights.head.weight, weights.embedding):
        weights.head = Linear(weights.embedding)
        return replace(config, tie_word_embeddings=True)
    log.warning(
        "head_is_not_tied", model=str(path), tensor=HEAD,
        reason="tie_word_embeddings is true, but the file has a head that differs from the embedding: used "
        "as it is, as transformers 5 does",
    )  # fmt: skip
    return config


def _open(path: Path) -> tuple[ModelConfig, TensorSource]:
    if path.is_dir():
        return read_config(path), SafetensorsSource(path)
    if not path.exists():
        raise MissingFile(path, "it was named as the model")
    source = GgufSource(path)
    return source.config, source
