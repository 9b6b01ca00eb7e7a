"""RoPE and its scalings: YaRN against transformers, the keys of GGUF files as llama.cpp reads them."""

import json
import math
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from flume_weight.model import LocalAttention, errors, load_model  # noqa: E402
from flume_weight.model.config import LinearScaling, YarnScaling  # noqa: E402
from flume_weight.model.fields import Fields  # noqa: E402
from flume_weight.model.gguf_rope import read_rope as read_gguf_rope  # noqa: E402
from flume_weight.model.huggingface import read_config  # noqa: E402
from flume_weight.model.rope import cos_and_sin  # noqa: E402
from gguf_models import write  # noqa: E402
from step_fakes import small_config  # noqa: E402
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config  # noqa: E402

SIZES = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": None,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS = {
    "plain": {},
    "another theta": {"rope_theta": 1e6},
    "attention_factor": {"attention_factor": 1.3},
    "ramp": {"beta_fast": 16, "beta_slow": 2},
    "not truncated": {"truncate": False},
    "mscale": {"mscale": 1.0, "mscale_all_dim": 0.707},
    "mscale alone": {"mscale": 2.0},
    "factor below 1": {"factor": 0.5},
    "no factor": {"factor": None},
    "a ramp without length": {"original_max_position_embeddings": 8, "beta_fast": 2.0, "beta_slow": 1.9},
}
FAMILIES = {
    "llama": LlamaConfig,
    "mistral": lambda **sizes: MistralConfig(**sizes, sliding_window=None),
    "qwen2": Qwen2Config,
    "qwen3": lambda **sizes: Qwen3Config(**sizes, head_dim=32),
}


def prompt(length):
    return torch.randint(0, 211, (length,), generator=torch.Generator().manual_seed(1))


def logits(ours, ids):
    attention, rows = LocalAttention(ours.config.num_layers), torch.arange(len(ids))
    attention.next_pass([("s", len(ids))])
    return ours.forward(ids, rows, attention, rows)


@torch.inference_mode()
def agree(ours, theirs, length=250):
    """Logits are close and greedy tokens the same, far beyond the original context."""
    ids = prompt(length)
    got, want = logits(ours, ids), theirs(ids[None]).logits[0]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert (got.argmax(-1) == want.argmax(-1)).float().mean() > 0.99


@pytest.mark.parametrize("family", FAMILIES)
def test_yarn_gives_the_logits_of_transformers_in_every_family(family, save_random):
    directory, theirs = save_random(FAMILIES[family](**SIZES, rope_parameters=dict(YARN)))
    agree(load_model(directory, torch.float32), theirs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_field_of_yarn_is_applied_as_transformers_applies_it(variant, save_random):
    parameters = YARN | VARIANTS[variant]
    directory, theirs = save_random(LlamaConfig(**SIZES, rope_parameters=parameters))
    agree(load_model(directory, torch.float32), theirs)


def test_each_variant_of_yarn_turns_differently(save_random):
    """So that the comparison above could fail."""
    tables = set()
    for name, changes in VARIANTS.items():
        if name not in ("no factor", "mscale alone"):  # the same as plain
            directory = save_random(LlamaConfig(**SIZES, rope_parameters=YARN | changes))[0]
            cos, _ = cos_and_sin(read_config(directory))
            tables.add(cos[200].numpy().tobytes())
    assert len(tables) == len(VARIANTS) - 2


def old_spelling(directory: Path, scaling, **changes):
    """The config as transformers 4 wrote it."""
    path = directory / "config.json"
    fields = json.loads(path.read_text())
    theta = fields.pop("rope_parameters")["rope_theta"]
    path.write_text(json.dumps(fields | {"rope_theta": theta, "rope_scaling": scaling} | changes))


@pytest.mark.parametrize("name", ["type", "rope_type"])
def test_both_spellings_of_yarn_mean_the_same(name, save_random):
    directory = save_random(LlamaConfig(**SIZES, rope_parameters=dict(YARN)))[0]
    new = read_config(directory)
    old_spelling(directory, {name: "yarn", "factor": 4.0, "original_max_position_embeddings": 64})
    assert read_config(directory) == new
    assert new.rope_scaling == YarnScaling(4.0, 64)
    assert new.rope_attention_factor == pytest.approx(0.1 * math.log(4) + 1)


def test_qwens_instructions_add_yarn_and_the_context_grows(save_random):
    directory = save_random(Qwen2Config(**SIZES | {"max_position_embeddings": 64}))[0]
    old_spelling(directory, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64})
    assert read_config(directory).context_tokens == 256
    old_spelling_again = {"rope_scaling": {"type": "yarn", "factor": 4.0}}
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | old_spelling_again))
    found = read_config(directory)  # what was trained is not said: the config's length stays
    assert (found.context_tokens, found.rope_scaling) == (64, YarnScaling(4.0, 64))


def test_the_original_length_beside_the_scaling_goes_before_the_one_inside(save_random):
    directory, _ = save_random(LlamaConfig(**SIZES, rope_parameters=dict(YARN)))
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"original_max_position_embeddings": 32}))
    assert read_config(directory).rope_scaling == YarnScaling(4.0, 32)


@pytest.mark.parametrize(
    "scaling, error, words",
    [
        ({"type": "dynamic", "factor": 2.0}, errors.UnsupportedFeature, ["rope_type = 'dynamic'", "yarn"]),
        ({"type": "longrope", "factor": 2.0}, errors.UnsupportedFeature, ["rope_type = 'longrope'"]),
        ({"type": "su"}, errors.UnsupportedFeature, ["rope_type = 'su'"]),
        ({"type": "mrope", "mrope_section": [8, 4, 4]}, errors.UnsupportedFeature, ["'mrope'"]),
        ({"rope_type": "proportional"}, errors.UnsupportedFeature, ["'proportional'"]),
        ({"rope_type": "axial"}, errors.UnsupportedFeature, ["'axial'"]),
        (
            {"type": "default", "mrope_section": [8, 4, 4]},
            errors.UnsupportedFeature,
            ["rope_scaling.mrope_section = [8, 4, 4]"],
        ),
        ({"type": "default", "factor": 4.0}, errors.UnsupportedFeature, ["rope_scaling.factor = 4.0"]),
        (
            {"type": "linear", "factor": 4.0, "attention_factor": 1.2},
            errors.UnsupportedFeature,
            ["rope_scaling.attention_factor = 1.2", "rope_type linear without it"],
        ),
        (
            {"type": "yarn", "factor": 4.0, "attn_factor": 1.2},
            errors.UnsupportedFeature,
            ["rope_scaling.attn_factor = 1.2"],
        ),
        (
            {"type": "yarn", "factor": 4.0, "extrapolation_factor": 0.5},
            errors.UnsupportedFeature,
            ["rope_scaling.extrapolation_factor = 0.5"],
        ),
        ({"type": "yarn", "factor": 4.0, "short_factor": [1.0]}, errors.UnsupportedFeature, ["short_factor"]),
        ({"type": "linear"}, errors.BadConfig, ["rope_scaling.factor", "'nothing'"]),
        ({"type": "yarn", "factor": "4"}, errors.BadConfig, ["rope_scaling.factor", "'4'"]),
        ({"type": "yarn", "factor": 4.0, "truncate": 1}, errors.BadConfig, ["rope_scaling.truncate"]),
        (
            {"type": "yarn", "factor": 4.0, "beta_fast": 1, "beta_slow": 2},
            errors.BadConfig,
            ["rope_scaling.beta_fast", "more than beta_slow 2.0"],
        ),
        ({"type": "yarn", "factor": 4.0, "rope_theta": 1.0}, errors.BadConfig, ["rope_theta", "above 1"]),
    ],
    ids=str,
)
def test_a_scaling_that_is_not_computed_is_refused_by_field(scaling, error, words, save_random):
    directory = save_random(LlamaConfig(**SIZES))[0]
    old_spelling(directory, scaling)
    with pytest.raises(error) as caught:
        read_config(directory)
    for word in words:
        assert word in str(caught.value), caught.value


@pytest.mark.parametrize(
    "scaling",
    [
        {},
        {"type": "default"},
        {"type": "default", "factor": 1.0, "attention_factor": None, "partial_rotary_factor": 1.0},
        {"type": "default", "finetuned": True, "original_max_position_embeddings": 64},
    ],
    ids=str,
)
def test_a_scaling_that_scales_nothing_loads(scaling, save_random):
    directory = save_random(LlamaConfig(**SIZES))[0]
    plain = read_config(directory)
    old_spelling(directory, scaling)
    assert read_config(directory) == plain


def test_two_spellings_that_disagree_are_refused(save_random):
    directory = save_random(LlamaConfig(**SIZES))[0]
    path = directory / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"rope_scaling": {"type": "linear", "factor": 2.0}}))
    with pytest.raises(errors.BadConfig, match="what rope_scaling says, or only one of the two"):
        read_config(directory)
    path.write_text(json.dumps(fields | {"rope_scaling": {"rope_type": "default"}}))
    read_config(directory)


# GGUF


YARN_KEYS = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64,
}


def gguf_rope(context_tokens=256, **keys):
    keys = {name.replace("__", "."): value for name, value in keys.items()}
    return read_gguf_rope(Fields(Path("m.gguf"), keys, "llama."), context_tokens)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_yarn_in_a_gguf_gives_the_logits_of_transformers(family, save_random, tmp_path):
    theirs = save_random(FAMILIES[family](**SIZES, rope_parameters=dict(YARN)))[1]
    path = write(tmp_path / "m.gguf", theirs, fields=YARN_KEYS)
    agree(load_model(path, torch.float32), theirs)


@pytest.mark.parametrize(
    "keys, parameters",
    [
        ({"rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 2.0}, VARIANTS["ramp"]),
        (
            {"rope.scaling.attn_factor": 1.25},
            {"attention_factor": 1.25 * (0.1 * math.log(4) + 1)},
        ),
        ({"rope.freq_base": 1e6}, VARIANTS["another theta"]),
    ],
    ids=str,
)
def test_every_key_of_yarn_in_a_gguf_is_applied(keys, parameters, save_random, tmp_path):
    theirs = save_random(LlamaConfig(**SIZES, rope_parameters=YARN | parameters))[1]
    agree(load_model(write(tmp_path / "m.gguf", theirs, fields=YARN_KEYS | keys), torch.float32), theirs)


@pytest.mark.parametrize(
    "keys",
    [
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        {"rope.scaling.factor": 4.0},
        {"rope.scale_linear": 4.0},
        {"rope.scale_linear": 2.0, "rope.scaling.factor": 4.0, "rope.scaling.finetuned": True},
    ],
    ids=str,
)
def test_linear_scaling_without_a_type_and_by_its_old_name(keys, save_random, tmp_path):
    linear = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    theirs = save_random(LlamaConfig(**SIZES, rope_parameters=linear))[1]
    agree(load_model(write(tmp_path / "m.gguf", theirs, fields=keys), torch.float32), theirs)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"rope.scaling.type": "none", "rope.scaling.factor": 4.0},
        {"rope.scaling.type": "linear"},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 0.0},
        {"rope.scaling.factor": 1.0},
        {"rope.scaling.type": "linear", "rope.scaling.yarn_ext_factor": -1.0},
    ],
    ids=str,
)
def test_keys_that_scale_nothing(keys):
    assert gguf_rope(**keys).scaling is None


def test_the_attention_factor_counts_whatever_the_type(save_random, tmp_path):
    assert gguf_rope(**{"rope.scaling.attn_factor": 1.5}).attention_factor == 1.5
    assert gguf_rope(**{"rope.scaling.type": "none", "rope.scaling.attn_factor": 1.5}).attention_factor == 1.5
    found = gguf_rope(**{"rope.scaling.factor": 2.0, "rope.scaling.attn_factor": 1.5})
    assert (found.scaling, found.attention_factor) == (LinearScaling(2.0), 1.5)
    # Queries and keys have it: attention is as sharp as with queries larger by its square.
    theirs = save_random(LlamaConfig(**SIZES))[1]
    path = write(tmp_path / "m.gguf", theirs, fields={"rope.scaling.attn_factor": 1.5})
    with torch.no_grad():
        for layer in theirs.model.layers:
            layer.self_attn.q_proj.weight.mul_(1.5**2)
    agree(load_model(path, torch.float32), theirs)


def test_the_context_of_yarn_is_what_it_was_stretched_to():
    assert gguf_rope(64, **YARN_KEYS).context_tokens == 256
    assert gguf_rope(512, **YARN_KEYS).context_tokens == 512
    assert gguf_rope(64, **{"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}).context_tokens == 64


@pytest.mark.parametrize("value", [1.0, 0.1 * math.log(4) + 1])
def test_a_yarn_attn_factor_that_is_computed_anyway_loads(value):
    assert gguf_rope(**YARN_KEYS, **{"rope.scaling.yarn_attn_factor": value}) == gguf_rope(**YARN_KEYS)
    assert gguf_rope(**YARN_KEYS, **{"rope.scaling.yarn_ext_factor": 1.0}) == gguf_rope(**YARN_KEYS)


@pytest.mark.parametrize(
    "keys, error, words",
    [
        (
            {"rope.scaling.type": "longrope"},
            errors.UnsupportedFeature,
            ["= 'longrope'", "none, linear, yarn"],
        ),
        ({"rope.scaling.type": "dynamic"}, errors.UnsupportedFeature, ["= 'dynamic'"]),
        (
            YARN_KEYS | {"rope.scaling.yarn_ext_factor": 0.5},
            errors.UnsupportedFeature,
            ["yarn_ext_factor = 0.5"],
        ),
        ({"rope.scaling.yarn_ext_factor": 1.0}, errors.UnsupportedFeature, ["yarn_ext_factor = 1.0"]),
        (
            YARN_KEYS | {"rope.scaling.yarn_attn_factor": 1.5},
            errors.UnsupportedFeature,
            ["yarn_attn_factor = 1.5"],
        ),
        ({"rope.scaling.yarn_attn_factor": 1.5}, errors.UnsupportedFeature, ["yarn_attn_factor = 1.5"]),
        ({"rope.scaling.factor": -2.0}, errors.BadConfig, ["rope.scaling.factor", "-2.0"]),
        ({"rope.scale_linear": "4"}, errors.BadConfig, ["rope.scale_linear", "'4'"]),
        ({"rope.scaling.attn_factor": 0.0}, errors.BadConfig, ["rope.scaling.attn_factor"]),
        (YARN_KEYS | {"rope.scaling.yarn_beta_slow": 40.0}, errors.BadConfig, ["yarn_beta_fast", "40.0"]),
        (YARN_KEYS | {"rope.freq_base": 1.0}, errors.BadConfig, ["rope.freq_base", "above 1"]),
    ],
    ids=str,
)
def test_keys_that_are_not_computed_are_refused(keys, error, words):
    with pytest.raises(error) as caught:
        gguf_rope(**keys)
    for word in (*words, "llama.rope."):
        assert word in str(caught.value), caught.value


def test_cosines_and_sines_carry_the_attention_factor():
    plain, scaled = (cos_and_sin(small_config(rope_attention_factor=f)) for f in (1.0, 1.25))
    for one, other in zip(plain, scaled, strict=True):
        torch.testing.assert_close(one * 1.25, other)
