"""Hugging Face directories that are refused, and how the refusal says what is wrong and where."""

import json
import shutil
import struct

import pytest

torch = pytest.importorskip("torch")
from flume_weight.model import ModelError, errors, load_model  # noqa: E402
from flume_weight.model.config import Llama3Scaling  # noqa: E402
from flume_weight.model.huggingface import read_config  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config  # noqa: E402

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
}


@pytest.fixture(scope="module")
def originals(save_random):
    return {name: save_random(config)[0] for name, config in CONFIGS.items()}


@pytest.fixture
def copy_of(originals, tmp_path):
    def copy(family="llama"):
        return shutil.copytree(originals[family], tmp_path / "model")

    return copy


def edit(directory, changes, file="config.json"):
    """Changes fields of a JSON file; `...` takes one away."""
    path = directory / file
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not ...}))


def rewrite(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)


def refused(path, error, *words):
    with pytest.raises(ModelError) as caught:
        load_model(path, torch.float32)
    message = str(caught.value)
    assert type(caught.value) is error, message
    assert str(path) in message
    for word in words:
        assert word in message, message
    return caught.value


def test_an_untouched_copy_loads(copy_of):
    assert load_model(copy_of(), torch.float32).config.num_layers == 2


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0}
CONFIG_REFUSALS = [
    ("llama", {"model_type": "gemma3"}, errors.UnknownArchitecture, ["model_type is 'gemma3'", "qwen3"]),
    ("llama", {"model_type": ...}, errors.BadConfig, ["field model_type", "nothing"]),
    (
        "llama",
        {"architectures": ["LlamaForSequenceClassification"]},
        errors.UnknownArchitecture,
        ["'LlamaForSequenceClassification'", "LlamaForCausalLM"],
    ),
    ("llama", {"rope_parameters": LONGROPE}, errors.UnsupportedFeature, ["rope_type = 'longrope'"]),
    (
        "llama",
        {"rope_parameters": ..., "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        errors.UnsupportedFeature,
        ["rope_scaling.rope_type = 'dynamic'", "llama3"],
    ),
    (
        "qwen2",
        {"rope_parameters": ..., "rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
        errors.UnsupportedFeature,
        ["longrope"],
    ),
    (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
            }
        },
        errors.BadConfig,
        ["rope_parameters.high_freq_factor", "nothing"],
    ),
    (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8,
                "low_freq_factor": 4,
                "high_freq_factor": 4,
            }
        },
        errors.BadConfig,
        ["rope_parameters.high_freq_factor", "more than low_freq_factor 4.0"],
    ),
    (
        "llama",
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        errors.UnsupportedFeature,
        ["rope_parameters.full_attention"],
    ),
    (
        "llama",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        errors.UnsupportedFeature,
        ["rope_parameters.partial_rotary_factor = 0.5"],
    ),
    ("llama", {"partial_rotary_factor": 0.5}, errors.UnsupportedFeature, ["partial_rotary_factor = 0.5"]),
    ("llama", {"hidden_act": "gelu"}, errors.UnsupportedFeature, ["hidden_act = 'gelu'", "silu"]),
    (
        "llama",
        {"quantization_config": {"quant_method": "gptq"}},
        errors.UnsupportedFeature,
        ["quantization_config = 'gptq'"],
    ),
    ("mistral", {"sliding_window": 32}, errors.UnsupportedFeature, ["sliding_window = 32", "64"]),
    (
        "mistral",
        {"sliding_window": ..., "max_position_embeddings": 8192},
        errors.UnsupportedFeature,
        ["sliding_window = 4096", "8192"],
    ),
    (
        "mistral",  # transformers' class does not look at layer_types
        {"sliding_window": 32, "layer_types": ["full_attention", "full_attention"]},
        errors.UnsupportedFeature,
        ["sliding_window = 32"],
    ),
    (
        "llama",
        {"sliding_window": 32, "layer_types": ["full_attention", "sliding_attention"]},
        errors.UnsupportedFeature,
        ["sliding_window = 32"],
    ),
    (
        "qwen2",
        {"sliding_window": 32, "use_sliding_window": True, "layer_types": ..., "max_window_layers": 1},
        errors.UnsupportedFeature,
        ["sliding_window = 32"],
    ),
    (
        "qwen3",
        {
            "sliding_window": 32,
            "use_sliding_window": True,
            "layer_types": ["full_attention", "sliding_attention"],
        },
        errors.UnsupportedFeature,
        ["sliding_window = 32"],
    ),
    (
        "qwen3",
        {"layer_types": ["full_attention", "linear_attention"]},
        errors.UnsupportedFeature,
        ["layer_types = 'linear_attention'"],
    ),
    ("llama", {"hidden_size": ...}, errors.BadConfig, ["field hidden_size", "at least 1", "nothing"]),
    ("llama", {"hidden_size": "32"}, errors.BadConfig, ["field hidden_size", "'32'"]),
    ("llama", {"num_hidden_layers": 0}, errors.BadConfig, ["field num_hidden_layers", "found 0"]),
    ("llama", {"vocab_size": True}, errors.BadConfig, ["field vocab_size", "True"]),
    ("llama", {"rms_norm_eps": -1}, errors.BadConfig, ["field rms_norm_eps", "positive"]),
    ("llama", {"rms_norm_eps": float("nan")}, errors.BadConfig, ["field rms_norm_eps", "nan"]),
    ("llama", {"tie_word_embeddings": "no"}, errors.BadConfig, ["field tie_word_embeddings", "'no'"]),
    ("llama", {"rope_parameters": 3}, errors.BadConfig, ["field rope_parameters", "an object"]),
    ("llama", {"eos_token_id": [2, "x"]}, errors.BadConfig, ["field eos_token_id", "'x'"]),
    ("llama", {"eos_token_id": -2}, errors.BadConfig, ["field eos_token_id", "-2"]),
    ("llama", {"eos_token_id": 50}, errors.BadConfig, ["eos_token_id", "below the vocabulary size 50"]),
    ("llama", {"num_key_value_heads": 3}, errors.BadConfig, ["num_key_value_heads", "divisor", "4"]),
    ("qwen2", {"num_key_value_heads": ...}, errors.BadConfig, ["num_key_value_heads", "nothing"]),
    ("llama", {"head_dim": 7}, errors.BadConfig, ["head_dim", "even", "7"]),
    (
        "llama",
        {"vocab_size": 51},
        errors.TensorShape,
        ["model.embed_tokens.weight", "config says [51, 32]", "found [50, 32]"],
    ),
    ("llama", {"num_key_value_heads": 4}, errors.TensorShape, ["k_proj.weight", "[32, 32]", "[16, 32]"]),
    ("qwen3", {"head_dim": 16}, errors.TensorShape, ["q_proj.weight", "[64, 32]", "[32, 32]"]),
    (
        "llama",
        {"num_hidden_layers": 3},
        errors.MissingTensor,
        ["model.layers.2.input_layernorm.weight", "[32]"],
    ),
    ("llama", {"num_hidden_layers": 1}, errors.UnexpectedTensor, ["model.layers.1.", "llama"]),
    ("llama", {"attention_bias": True}, errors.MissingTensor, ["layers.0.self_attn.q_proj.bias", "[32]"]),
    ("llama", {"model_type": "qwen2"}, errors.MissingTensor, ["self_attn.q_proj.bias"]),
    ("qwen2", {"model_type": "llama"}, errors.UnexpectedTensor, ["self_attn.k_proj.bias", "llama"]),
    ("qwen3", {"model_type": "llama"}, errors.UnexpectedTensor, ["self_attn.k_norm.weight"]),
]


@pytest.mark.parametrize(
    "family, changes, error, words",
    CONFIG_REFUSALS,
    ids=[
        f"{family}: {json.dumps(changes, default=lambda _: 'gone')}"
        for family, changes, *_ in CONFIG_REFUSALS
    ],
)
def test_a_config_that_does_not_fit_is_named(family, changes, error, words, copy_of):
    directory = copy_of(family)
    edit(directory, changes)
    refused(directory, error, *words)


@pytest.mark.parametrize(
    "family, changes",
    [
        ("llama", {"sliding_window": 8}),
        ("mistral", {"sliding_window": 64}),
        ("qwen2", {"sliding_window": 32, "use_sliding_window": False}),
        ("qwen2", {"sliding_window": 32, "use_sliding_window": True}),  # its layer_types are all full
        (
            "qwen2",
            {"sliding_window": 32, "use_sliding_window": True, "layer_types": ..., "max_window_layers": 2},
        ),
        ("qwen3", {"sliding_window": 32, "use_sliding_window": True, "layer_types": ...}),  # from the 28th on
        ("llama", {"architectures": ...}),
        ("llama", {"num_key_value_heads": 2, "head_dim": None}),
        ("llama", {"dtype": ..., "torch_dtype": "bfloat16", "rope_parameters": ..., "rope_theta": 10000}),
    ],
    ids=str,
)
def test_a_setting_without_effect_is_no_reason_to_refuse(family, changes, copy_of):
    directory = copy_of(family)
    edit(directory, changes)
    load_model(directory, torch.float32)


def test_both_spellings_of_rope_mean_the_same(copy_of):
    directory = copy_of()
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3["original_max_position_embeddings"] = 32
    edit(directory, {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5} | llama3})
    new = read_config(directory)
    old_scaling = {"rope_type": "llama3"} | llama3
    edit(directory, {"rope_parameters": ..., "rope_theta": 5e5, "rope_scaling": old_scaling})
    assert read_config(directory) == new
    assert (new.rope_theta, new.rope_scaling) == (5e5, Llama3Scaling(8.0, 1.0, 4.0, 32))


@pytest.mark.parametrize(
    "config, generation, ids",
    [
        (2, None, (2,)),
        (2, [3, 2, 4], (2, 3, 4)),
        ([5, 6], 7, (5, 6, 7)),
        (None, 9, (9,)),
        (None, None, ()),
        (-1, None, ()),
        ([-1, 3], -1, (3,)),
    ],
)
def test_end_tokens_come_from_both_configs(config, generation, ids, copy_of):
    directory = copy_of()
    edit(directory, {"eos_token_id": config})
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert read_config(directory).eos_token_ids == ids


def test_a_generation_config_is_optional(copy_of):
    directory = copy_of()
    (directory / "generation_config.json").unlink()
    edit(directory, {"eos_token_id": 3})
    assert read_config(directory).eos_token_ids == (3,)


def test_an_old_checkpoints_frequencies_are_passed_over(copy_of):
    directory = copy_of()
    inverse = torch.ones(4)
    rewrite(directory, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": inverse}))
    load_model(directory, torch.float32)


def test_a_missing_tensor_is_named(copy_of):
    directory = copy_of()
    rewrite(directory, lambda t: t.pop("model.norm.weight"))
    assert refused(directory, errors.MissingTensor, "model.norm.weight", "[32]").shape == (32,)


def test_a_head_is_needed_where_it_is_not_tied(copy_of):
    directory = copy_of()
    rewrite(directory, lambda t: t.pop("lm_head.weight"))
    refused(directory, errors.MissingTensor, "lm_head.weight", "[50, 32]")


def test_a_tensor_too_many_is_named_with_its_file(copy_of):
    directory = copy_of()
    rewrite(directory, lambda t: t.update({"score.weight": torch.ones(2, 32)}))
    refused(directory, errors.UnexpectedTensor, "model.safetensors", "score.weight", "[2, 32]")


@pytest.mark.parametrize("dtype, name", [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_a_storage_type_that_is_not_converted_is_named(dtype, name, copy_of):
    directory = copy_of()
    rewrite(directory, lambda t: t.update({"model.norm.weight": torch.ones(32).to(dtype)}))
    refused(directory, errors.UnsupportedDtype, "model.norm.weight", name, "BF16")


def test_a_truncated_file_says_how_long_it_should_be(copy_of):
    directory = copy_of()
    path = directory / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    refused(directory, errors.DamagedFile, f"has {len(whole) - 100} bytes", f"header says {len(whole)}")


@pytest.mark.parametrize("size", [0, 5, 8, 100])
def test_a_file_cut_inside_its_header_is_refused(size, copy_of):
    directory = copy_of()
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(directory, errors.DamagedFile, "model.safetensors", f"has {size} bytes", "header cannot be read")


@pytest.mark.parametrize("content", [b"[]", b"{}", b'{"a": 3}', b"\xff\xfe"])
def test_a_file_with_another_header_is_refused(content, copy_of):
    directory = copy_of()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(content)) + content + b"junk")
    refused(directory, errors.DamagedFile, "model.safetensors")


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_json_that_is_nested_too_deeply_is_refused(opening, copy_of):
    directory = copy_of()
    content = (opening * 100_000).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(content)) + content)
    refused(directory, errors.DamagedFile, "model.safetensors", "header cannot be read")
    (directory / "model.safetensors").rename(directory / "other.safetensors")
    (directory / "model.safetensors.index.json").write_bytes(content)
    refused(directory, errors.DamagedFile, "index.json", "nested too deeply")
    (directory / "config.json").write_bytes(content)
    refused(directory, errors.DamagedFile, "config.json", "nested too deeply")


def test_a_directory_without_config_is_refused(copy_of):
    directory = copy_of()
    (directory / "config.json").unlink()
    refused(directory, errors.MissingFile, "config.json")


@pytest.mark.parametrize("text", ["{not json", "[1]", '"llama"', "\x00"])
def test_a_config_that_is_no_json_object_is_refused(text, copy_of):
    directory = copy_of()
    (directory / "config.json").write_text(text)
    refused(directory, errors.DamagedFile, "config.json", "JSON")


def test_a_directory_without_safetensors_says_what_it_found_instead(copy_of):
    directory = copy_of()
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    refused(directory, errors.MissingFile, "model.safetensors", "pytorch_model.bin")


def test_a_path_that_is_not_there_is_refused(tmp_path):
    refused(tmp_path / "nowhere", errors.MissingFile, "no such file")


@pytest.fixture
def sharded(save_random, tmp_path):
    directory = save_random(CONFIGS["llama"], max_shard_size="20KB")[0]
    return shutil.copytree(directory, tmp_path / "model")


def test_a_missing_shard_is_named(sharded):
    shard = sorted(sharded.glob("model-*"))[1]
    shard.unlink()
    refused(sharded, errors.MissingFile, shard.name, "model.safetensors.index.json lists it")


def test_a_truncated_shard_is_named(sharded):
    shard = sorted(sharded.glob("model-*"))[0]
    shard.write_bytes(shard.read_bytes()[:-4])
    refused(sharded, errors.DamagedFile, shard.name)


def test_an_index_that_names_a_tensor_its_shard_lacks_is_refused(sharded):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.ghost.weight"] = sorted(index["weight_map"].values())[0]
    path.write_text(json.dumps(index))
    refused(sharded, errors.DamagedFile, "model.ghost.weight", "index.json")


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": 3}}], ids=str)
def test_an_index_of_another_shape_is_refused(index, sharded):
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="weight_map"):
        load_model(sharded, torch.float32)


def test_a_shard_outside_the_directory_is_refused(sharded):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../elsewhere.safetensors")
    path.write_text(json.dumps(index))
    with pytest.raises(errors.BadConfig, match="elsewhere"):
        load_model(sharded, torch.float32)


def test_another_dtype_is_refused(copy_of):
    with pytest.raises(ValueError, match=r"float16.*float32.*bfloat16"):
        load_model(copy_of(), torch.float16)


def test_the_tree_in_the_docstring_is_the_tree_of_classes():
    drawn = {line.split()[1] for line in errors.__doc__.splitlines() if line.strip().startswith(("+", "*"))}
    classes = {c.__name__ for c in vars(errors).values() if isinstance(c, type) and issubclass(c, ModelError)}
    assert drawn == classes
