"""From a path to a Transformer: a Hugging Face directory or a GGUF file."""

from __future__ import annotations

from pathlib import Path

import torch

from flume_weight.model.config import ModelConfig
from flume_weight.model.errors import MissingFile
from flume_weight.model.gguf import GgufSource
from flume_weight.model.huggingface import read_config
from flume_weight.model.safetensors import SafetensorsSource
from flume_weight.model.source import Progress, TensorSource, check, fill
from flume_weight.model.transformer import Transformer
from flume_weight.model.weights import allocate, slots

DTYPES = (torch.float32, torch.bfloat16)


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
    weights = allocate(config, dtype)
    places = slots(weights)
    check(source, places, config.architecture)
    fill(source, places, progress)
    del places
    if pack:
        weights.pack()
    return Transformer(config, weights)


def _open(path: Path) -> tuple[ModelConfig, TensorSource]:
    if path.is_dir():
        return read_config(path), SafetensorsSource(path)
    if not path.exists():
        raise MissingFile(path, "it was named as the model")
    source = GgufSource(path)
    return source.config, source
