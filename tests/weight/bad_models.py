"""A small model that is damaged: some tokens' embeddings are no numbers."""

from __future__ import annotations

from faulty_weight_engine import KILLS, RAISES
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

VOCAB = 256
NAN, INFINITE = 200, 201  # token ids: their embeddings
NAN_LOGIT = 202  # a token id: its row of the head is NaN, so that each step's logits have one NaN


def config(**changes):
    shape = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
        "eos_token_id": 2,
    }  # fmt: skip
    return LlamaConfig(**shape | changes)


def damage(directory, *, head=False):
    """Overwrite rows of the saved model; with `head` also one of the head, so that it never answers."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    embedding = tensors["model.embed_tokens.weight"]
    embedding[NAN] = float("nan")
    embedding[INFINITE] = float("inf")
    tensors["lm_head.weight"][[NAN, INFINITE, RAISES, KILLS]] = 0.0  # never the largest logit
    if head:
        tensors["lm_head.weight"][NAN_LOGIT] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    return directory
