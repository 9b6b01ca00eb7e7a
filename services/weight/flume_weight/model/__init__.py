"""What a weight node computes: loading a model's parameters, and the forward pass over them."""

from flume_weight.model.attention import Attention
from flume_weight.model.config import ModelConfig
from flume_weight.model.errors import ModelError
from flume_weight.model.load import load_model
from flume_weight.model.local import LocalAttention
from flume_weight.model.transformer import Transformer

__all__ = ["Attention", "LocalAttention", "ModelConfig", "ModelError", "Transformer", "load_model"]
