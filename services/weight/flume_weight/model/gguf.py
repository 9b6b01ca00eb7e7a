"""A GGUF model: its metadata -> ModelConfig, its tensors under Hugging Face names, dequantised.

llama.cpp stores the rows of Q and K of the `llama` architecture interleaved, for its own pairing of RoPE
(element 2i with 2i+1); they are put back to the pairing of halves. Qwen's are not interleaved.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import gguf.quants
import numpy as np
import torch
from torch import Tensor

from flume_weight.model.config import DivisorScaling, ModelConfig
from flume_weight.model.errors import BadConfig, UnknownArchitecture, UnsupportedDtype, UnsupportedFeature
from flume_weight.model.field_lists import Only
from flume_weight.model.fields import Fields
from flume_weight.model.gguf_file import GgufFile, GgufTensor, open_gguf
from flume_weight.model.gguf_keys import ARCHITECTURE_KEYS, OTHER_KEYS
from flume_weight.model.gguf_rope import read_rope
from flume_weight.model.huggingface import MAX_CONTEXT, MAX_LAYERS, require_consistent, warn_of_unknown
from flume_weight.model.source import Stored

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # Mistral calls itself llama here
INTERLEAVED = ("llama",)
ROPE_DIVISORS = "rope_freqs.weight"
CHUNK_BYTES = 64 << 20  # float32 of one dequantised piece
TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k": "self_attn.k_proj",
    "attn_k_norm": "self_attn.k_norm",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
END_TOKENS = ("eos", "eot", "eom")  # end of text, of a turn, of a message to a tool


class GgufSource:
    """The tensors of one model, in one file or in parts. Its config says how rows of Q and K are ordered."""

    def __init__(self, path: Path) -> None:
        self._file = open_gguf(path)
        self.path = self._file.path
        self.config = config_of(self._file)
        self._by_name = {
            _checkpoint_name(name): tensor
            for name, tensor in self._file.tensors.items()
            if name != ROPE_DIVISORS
        }
        self.tensors: Mapping[str, Stored] = {
            name: Stored(tensor.path, tensor.name, tensor.shape, tensor.num_bytes)
            for name, tensor in self._by_name.items()
        }

    def read(self, name: str, out: Tensor) -> None:
        tensor = self._by_name[name]
        rows = out.view(-1, out.shape[-1]) if out.dim() > 1 else out.view(1, -1)
        step = max(1, CHUNK_BYTES // (4 * rows.shape[-1]))
        for first in range(0, rows.shape[0], step):
            last = min(first + step, rows.shape[0])
            rows[first:last].copy_(_dequantise(tensor, first, last))
        heads = self._interleaved_heads(tensor.name)
        if heads:
            out.copy_(halves(out, heads))

    def _interleaved_heads(self, stored_name: str) -> int:
        """Heads whose rows are interleaved in this tensor; 0 where none are."""
        if self._file.fields["general.architecture"] not in INTERLEAVED:
            return 0
        if ".attn_q." in stored_name:
            return self.config.num_query_heads
        return self.config.num_kv_heads if ".attn_k." in stored_name else 0


def halves(interleaved: Tensor, heads: int) -> Tensor:
    """Rows [heads · (d/2 · 2), …], pairs side by side -> [heads · (2 · d/2), …], half a head apart."""
    pairs = interleaved.reshape(heads, -1, 2, *interleaved.shape[1:])
    return pairs.transpose(1, 2).reshape(interleaved.shape)


def _checkpoint_name(stored: str) -> str:
    """The Hugging Face name; a name without a counterpart stays, and is reported as unexpected."""
    match = LAYER_NAME.fullmatch(stored)
    if match and match[2] in LAYER_NAMES:
        return f"model.layers.{match[1]}.{LAYER_NAMES[match[2]]}.{match[3]}"
    return TOP_NAMES.get(stored, stored)


def _dequantise(tensor: GgufTensor, first: int, last: int) -> Tensor:
    """Float32, one row each of the flattened outer dimensions."""
    try:
        values = gguf.quants.dequantize(tensor.rows(first, last), tensor.kind)
    except NotImplementedError:
        supported = "the types that the gguf package can dequantise"
        raise UnsupportedDtype(tensor.path, tensor.name, tensor.kind.name, supported) from None
    # Float32 comes back as a view of the read-only file; torch wants memory that it could write to.
    return torch.from_numpy(np.require(values, requirements="W"))


def config_of(file: GgufFile) -> ModelConfig:
    """Raises a ModelError that names the key. Keys that cannot be judged are named in the log."""
    general = Fields(file.path, file.fields)
    architecture = general.text("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UnknownArchitecture(file.path, "general.architecture", architecture, ARCHITECTURES)
    prefix = f"{architecture}."
    own = {name.removeprefix(prefix): value for name, value in file.fields.items() if name.startswith(prefix)}
    fields = Fields(file.path, own, prefix)
    heads, hidden = fields.integer("attention.head_count"), fields.integer("embedding_length")
    head_dim = fields.integer("attention.key_length", max(1, hidden // heads))
    unknown = ARCHITECTURE_KEYS.check(fields) + OTHER_KEYS.check(
        general, [name for name in general if not name.startswith(prefix)]
    )
    rope = read_rope(fields, fields.integer("context_length", maximum=MAX_CONTEXT))
    _refuse_what_is_not_computed(fields, head_dim, hidden, rope.context_tokens)
    names = file.tensors.keys()
    config = ModelConfig(
        architecture=architecture,
        vocab_size=_vocabulary(file, fields),
        context_tokens=rope.context_tokens,
        eos_token_ids=_eos(general),
        hidden_size=hidden,
        intermediate_size=fields.integer("feed_forward_length"),
        num_layers=fields.integer("block_count", maximum=MAX_LAYERS),
        num_query_heads=heads,
        num_kv_heads=fields.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        rms_norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        rope_attention_factor=rope.attention_factor,
        tie_word_embeddings="output.weight" not in names,
        qkv_bias=architecture == "qwen2" or "blk.0.attn_q.bias" in names,
        output_bias="blk.0.attn_output.bias" in names,
        mlp_bias="blk.0.ffn_down.bias" in names,
        qk_norm=architecture == "qwen3",
    )
    require_consistent(
        fields, config, "attention.head_count", "attention.head_count_kv", "attention.key_length"
    )
    warn_of_unknown(general, unknown)
    return _with_divisors(file, config)


def _refuse_what_is_not_computed(fields: Fields, head_dim: int, hidden: int, context: int) -> None:
    path = fields.path
    for name, size in {
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "embedding_length_out": hidden,
    }.items():
        if fields.integer(name, size) != size:
            supported = f"the {'hidden' if size == hidden else 'head'} size {size}"
            raise UnsupportedFeature(path, fields.name_of(name), fields.raw(name), supported)
    usual = Only((0, head_dim**-0.5), f"{head_dim**-0.5:g}, as heads have {head_dim} elements")
    if fields.has("attention.scale") and not usual.allows(fields.raw("attention.scale")):
        raise UnsupportedFeature(
            path, fields.name_of("attention.scale"), fields.raw("attention.scale"), usual.supported
        )
    window = fields.integer("attention.sliding_window", 0, minimum=0)
    if 0 < window < context:
        supported = f"full attention (a window of at least context_length {context})"
        raise UnsupportedFeature(path, fields.name_of("attention.sliding_window"), window, supported)


def _vocabulary(file: GgufFile, fields: Fields) -> int:
    tokens = file.array_lengths.get("tokenizer.ggml.tokens")
    embedding = file.tensors.get("token_embd.weight")
    fallback = tokens or (embedding.shape[0] if embedding else None)
    return fields.integer("vocab_size", fallback)


def _with_divisors(file: GgufFile, config: ModelConfig) -> ModelConfig:
    """The llama3 scaling: llama.cpp stores what it divides each frequency by, as a tensor."""
    tensor = file.tensors.get(ROPE_DIVISORS)
    if tensor is None:
        return config
    if config.rope_scaling:
        supported = "no other scaling of RoPE beside it"
        raise UnsupportedFeature(tensor.path, ROPE_DIVISORS, config.rope_scaling, supported)
    pairs = config.head_dim // 2
    if math.prod(tensor.shape) != pairs:
        raise BadConfig(tensor.path, ROPE_DIVISORS, f"{pairs} numbers", list(tensor.shape))
    divisors = _dequantise(tensor, 0, 1).flatten().tolist()
    if not all(0 < divisor < math.inf for divisor in divisors):
        raise BadConfig(tensor.path, ROPE_DIVISORS, "positive numbers", divisors)
    return replace(config, rope_scaling=DivisorScaling(tuple(divisors)))


def _eos(general: Fields) -> tuple[int, ...]:
    ids = [token for kind in END_TOKENS for token in general.token_ids(f"tokenizer.ggml.{kind}_token_id")]
    return tuple(dict.fromkeys(ids))
