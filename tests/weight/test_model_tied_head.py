"""A config that says tied, beside files that have a head of their own or none."""

import json

import pytest

torch = pytest.importorskip("torch")
import structlog  # noqa: E402
from flume_weight.model import LocalAttention, load_model  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config  # noqa: E402

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
IDS = torch.arange(40)


def logits(ours):
    attention = LocalAttention(2)
    attention.next_pass([("s", 40)])
    return ours.forward(IDS, IDS, attention, IDS)


def with_head(directory, head):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": head(tensors)}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config, lambda **s: Qwen3Config(**s, head_dim=8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_head_that_differs_is_used_as_in_transformers(dtype, config, save_random):
    directory = save_random(config(**SIZES))[0]
    generator = torch.Generator().manual_seed(3)
    with_head(directory, lambda tensors: torch.randn(50, 32, generator=generator))
    with structlog.testing.capture_logs() as logs:
        ours = load_model(directory, dtype)
    assert [(entry["event"], entry["tensor"]) for entry in logs] == [("head_is_not_tied", "lm_head.weight")]
    assert not ours.config.tie_word_embeddings
    if dtype is torch.float32:
        theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
        with torch.inference_mode():
            torch.testing.assert_close(logits(ours), theirs(IDS[None]).logits[0], atol=2e-5, rtol=2e-5)


def test_a_head_that_is_the_embedding_takes_no_memory_of_its_own(save_random):
    directory, theirs = save_random(LlamaConfig(**SIZES))
    with_head(directory, lambda tensors: tensors["model.embed_tokens.weight"].clone())
    with structlog.testing.capture_logs() as logs:
        ours = load_model(directory, torch.float32, pack=False)
    assert logs == []
    assert ours.config.tie_word_embeddings
    assert ours.weights.head.weight is ours.weights.embedding
    with torch.inference_mode():
        torch.testing.assert_close(logits(ours), theirs(IDS[None]).logits[0], atol=2e-5, rtol=2e-5)


def test_progress_counts_a_head_that_is_read(save_random):
    directory, _ = save_random(LlamaConfig(**SIZES))
    with_head(directory, lambda tensors: tensors["model.embed_tokens.weight"] + 1)
    seen = []
    load_model(directory, torch.float32, lambda *progress: seen.append(progress))
    total = sum(tensor.numel() * 4 for tensor in load_file(directory / "model.safetensors").values())
    assert seen[-1] == (total, total)


def test_a_size_that_no_tensor_has_is_refused_before_memory_is_asked_for(save_random):
    from flume_weight.model.errors import TensorShape

    directory, _ = save_random(LlamaConfig(**SIZES))
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 2**31 - 1}))
    with pytest.raises(TensorShape, match=r"embed_tokens.*\[2147483647, 32\]"):
        load_model(directory, torch.float32)
