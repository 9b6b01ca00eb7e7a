"""Every field that transformers and the gguf package know is used, harmless or refused, and by one list only.

A test that fails here after an upgrade asks a person to read what the new field means.
"""

import inspect
import json
from contextlib import suppress
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
import gguf.constants  # noqa: E402
import structlog  # noqa: E402
from flume_weight.model import errors  # noqa: E402
from flume_weight.model.config_fields import CONFIG_FIELDS, ROPE_FIELDS  # noqa: E402
from flume_weight.model.field_lists import FieldLists, Only, names  # noqa: E402
from flume_weight.model.fields import Fields  # noqa: E402
from flume_weight.model.gguf import ARCHITECTURES, config_of  # noqa: E402
from flume_weight.model.gguf_file import GgufFile  # noqa: E402
from flume_weight.model.gguf_keys import ARCHITECTURE_KEYS, OTHER_KEYS  # noqa: E402
from flume_weight.model.huggingface import read_config  # noqa: E402
from transformers import (  # noqa: E402
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.modeling_rope_utils import RopeParameters  # noqa: E402

CLASSES = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
# Written by transformers 4 and older, read from config.json by its versions to this day.
OLD_FIELDS = names(
    "torch_dtype rope_theta rope_scaling partial_rotary_factor is_decoder add_cross_attention pruned_heads "
    "tie_encoder_decoder cross_attention_hidden_size use_bfloat16 torchscript finetuning_task prefix "
    "tokenizer_class task_specific_params sep_token_id decoder_start_token_id num_labels auto_map "
    "_attn_implementation_autoset max_length top_k bad_words_ids exponential_decay_length_penalty"
)
LISTS = {
    **{f"config.json of {family}": lists for family, lists in CONFIG_FIELDS.items()},
    **{f"rope_parameters of type {kind}": lists for kind, lists in ROPE_FIELDS.items()},
    "keys of the architecture": ARCHITECTURE_KEYS,
    "other keys": OTHER_KEYS,
}
ODD = {"an": ["odd", "value"]}


@pytest.mark.parametrize("lists", LISTS.values(), ids=LISTS)
def test_no_field_is_in_two_lists_and_each_has_a_reason(lists):
    assert not set(lists.used) & set(lists.harmless)
    assert not set(lists.used) & set(lists.refused)
    assert not set(lists.harmless) & set(lists.refused)
    assert all(lists.harmless.values())
    assert all(rule.supported for rule in lists.refused.values())


@pytest.mark.parametrize("family", CLASSES)
def test_every_field_of_transformers_config_classes_is_in_a_list(family):
    cls, lists = CLASSES[family], CONFIG_FIELDS[family]
    fields = {*cls().to_dict(), *inspect.signature(cls.__init__).parameters, *cls.__dataclass_fields__}
    fields |= {*GenerationConfig().to_dict(), *OLD_FIELDS}
    assert {n for n in fields if lists.verdict(n) == "unknown"} <= {"self", "args", "kwargs"}


@pytest.mark.parametrize("family", CLASSES)
def test_every_field_of_the_other_families_is_in_a_list(family):
    """A config is often a copy of another family's."""
    fields = {name for cls in CLASSES.values() for name in cls().to_dict()}
    assert {n for n in fields if CONFIG_FIELDS[family].verdict(n) == "unknown"} == set()


@pytest.mark.parametrize("kind", ROPE_FIELDS)
def test_every_field_of_transformers_rope_parameters_is_in_a_list(kind):
    fields = RopeParameters.__annotations__
    assert {n for n in fields if ROPE_FIELDS[kind].verdict(n) == "unknown"} == set()


def all_gguf_keys(space=gguf.constants.Keys):
    for name, value in vars(space).items():
        if isinstance(value, type):
            yield from all_gguf_keys(value)
        elif isinstance(value, str) and not name.startswith("__"):
            yield value.format(arch="llama", id=0, name="tool_use", dense="dense_2", bid=0)


def test_every_key_of_the_gguf_package_is_in_a_list():
    keys = set(all_gguf_keys())
    assert len(keys) > 200
    verdicts = {
        key: ARCHITECTURE_KEYS.verdict(key.removeprefix("llama."))
        if key.startswith("llama.")
        else OTHER_KEYS.verdict(key)
        for key in keys
    }
    assert {key for key, verdict in verdicts.items() if verdict == "unknown"} == set()
    assert set(verdicts.values()) == {"used", "harmless", "refused"}


# What the lists say is what the loader does.


class Recording(dict):
    """Which fields were asked for."""

    def __init__(self, values):
        super().__init__(values)
        self.asked = set()

    def get(self, name, default=None):
        self.asked.add(name)
        return super().get(name, default)


BASE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "sliding_window": None,
}
BASE_KEYS = {
    "general.architecture": "llama",
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "llama.block_count": 2,
    "llama.feed_forward_length": 48,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.vocab_size": 50,
}


@pytest.fixture
def config(tmp_path):
    def read(family="llama", **changes):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **BASE, **changes}))
        return read_config(tmp_path)

    return read


def gguf_config(**changes):
    return config_of(GgufFile(Path("m.gguf"), {**BASE_KEYS, **changes}))


def example(name):
    """A name that a pattern stands for."""
    return name.replace("*", "something")


def key_of(name):
    return f"llama.{example(name)}"


@pytest.mark.parametrize("family", CLASSES)
def test_every_used_field_is_asked_for(family, tmp_path, monkeypatch):
    record = Recording({"model_type": family, **BASE})
    monkeypatch.setattr(
        "flume_weight.model.huggingface.read_json", lambda path, _: Fields(tmp_path / "config.json", record)
    )
    lists = CONFIG_FIELDS[family]
    monkeypatch.setattr(FieldLists, "check", lambda *_: [])
    record |= {"rope_parameters": {"type": "llama3"} | dict.fromkeys(("factor", "low_freq_factor"), 1.0)}
    record["rope_parameters"]["high_freq_factor"] = 4.0
    if family in ("qwen2", "qwen3"):
        record["use_sliding_window"] = True
    read_config(tmp_path)
    assert lists.used <= record.asked


@pytest.mark.parametrize("kind", ROPE_FIELDS)
def test_every_used_field_of_rope_is_asked_for(kind, tmp_path, monkeypatch):
    from flume_weight.model import huggingface_rope

    monkeypatch.setattr(FieldLists, "check", lambda *_: [])
    values = {"rope_type": kind, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    record = Recording(values | {"mscale": 1.0, "mscale_all_dim": 1.0})
    huggingface_rope.read_rope(Fields(tmp_path, {"rope_parameters": record}), 64)
    assert ROPE_FIELDS[kind].used <= record.asked


def test_every_used_key_is_asked_for(monkeypatch):
    monkeypatch.setattr(FieldLists, "check", lambda *_: [])
    asked = set()
    plain_get = Fields.raw

    def spy(accessor):
        def read(fields, name, *args, **options):
            asked.add(fields.name_of(name))
            return accessor(fields, name, *args, **options)

        return read

    for accessor in ("integer", "number", "text", "flag", "token_ids", "has"):
        monkeypatch.setattr(Fields, accessor, spy(getattr(Fields, accessor)))
    monkeypatch.setattr(Fields, "raw", spy(plain_get))
    for changes in ({"llama.rope.scaling.factor": 2.0}, {"llama.rope.scaling.type": "yarn"}):
        gguf_config(**changes)
    assert {f"llama.{name}" for name in ARCHITECTURE_KEYS.used} <= asked
    read_elsewhere = {"general.alignment", "split.no", "split.count", "split.tensors.count"}
    assert OTHER_KEYS.used - read_elsewhere - {"tokenizer.ggml.tokens"} <= asked


@pytest.mark.parametrize("family", CLASSES)
def test_no_harmless_field_changes_the_model(family, config):
    plain = config(family)
    for name in CONFIG_FIELDS[family].harmless:
        assert config(family, **{example(name): ODD}) == plain, name


def test_no_harmless_key_changes_the_model():
    plain = gguf_config()
    for name in ARCHITECTURE_KEYS.harmless:
        assert gguf_config(**{key_of(name): ODD}) == plain, name
    for name in OTHER_KEYS.harmless:
        assert gguf_config(**{example(name): ODD}) == plain, name


@pytest.mark.parametrize("family", CLASSES)
def test_every_refused_field_is_refused_by_name_unless_it_changes_nothing(family, config):
    plain = config(family)
    for name, rule in CONFIG_FIELDS[family].refused.items():
        for value in (*rule.values, None):
            assert config(family, **{example(name): value}) == plain, name
        for value in (30.5, "odd", ODD, [3]):
            with pytest.raises(errors.UnsupportedFeature, match=rf"{example(name)} = .* is not supported"):
                config(family, **{example(name): value})


def test_every_refused_key_is_refused_by_name_unless_it_changes_nothing():
    plain = gguf_config()
    spellings = [(key_of(name), rule) for name, rule in ARCHITECTURE_KEYS.refused.items()]
    spellings += [(example(name), rule) for name, rule in OTHER_KEYS.refused.items()]
    for key, rule in spellings:
        for value in rule.values:
            assert gguf_config(**{key: value}) == plain, key
        for value in (30.5, "odd", [3]):
            with pytest.raises(errors.UnsupportedFeature, match=rf"{key} = .* is not supported"):
                gguf_config(**{key: value})


@pytest.mark.parametrize(
    "key, value",
    [
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("attention.clamp_kqv", 8.0),
        ("attention.causal", False),
        ("attention.max_alibi_bias", 8.0),
        ("attention.scale", 0.25),
        ("attention.value_length", 16),
        ("rope.dimension_count", 4),
        ("embedding_length_out", 16),
        ("attention.sliding_window", 32),
        ("logit_scale", 0.5),
        ("expert_count", 8),
        ("pooling_type", 3),
        ("tensor_data_layout", "other"),
    ],
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_keys_that_change_the_arithmetic_are_refused_in_every_family(architecture, key, value):
    keys = {name.replace("llama.", f"{architecture}."): of for name, of in BASE_KEYS.items()}
    keys |= {"general.architecture": architecture, f"{architecture}.{key}": value}
    with pytest.raises(errors.UnsupportedFeature) as caught:
        config_of(GgufFile(Path("m.gguf"), keys))
    assert f"{architecture}.{key} = {value!r}" in str(caught.value)


@pytest.mark.parametrize("value", [8**-0.5, 0.0, 0.35355338])
def test_the_usual_attention_scale_loads(value):
    assert gguf_config(**{"llama.attention.scale": value}) == gguf_config()


@pytest.mark.parametrize(
    "changes, refused",
    [
        ({"attention_multiplier": 8**-0.5}, False),
        ({"attention_multiplier": 0.0125}, True),
        ({"query_pre_attn_scalar": 8}, False),
        ({"query_pre_attn_scalar": 256}, True),
        ({"final_logit_softcapping": None}, False),
        ({"final_logit_softcapping": 30.0}, True),
        ({"is_causal": True}, False),
        ({"is_causal": False}, True),
        ({"clip_qkv": 8.0}, True),
        ({"num_local_experts": 8}, True),
        ({"attention_dropout": 0.1}, False),
        ({"pretraining_tp": 2}, False),
    ],
    ids=str,
)
def test_fields_by_which_other_families_change_the_arithmetic(changes, refused, config):
    if not refused:
        assert config(**changes) == config()
        return
    with pytest.raises(errors.UnsupportedFeature, match=f"{next(iter(changes))} = "):
        config(**changes)


def test_fields_in_no_list_are_named_in_the_log(config):
    with structlog.testing.capture_logs() as logs:
        config(my_new_trick=3, other=None, rope_scaling={"rope_type": "yarn", "factor": 2.0, "wobble": 1})
    assert [entry["event"] for entry in logs] == ["model_fields_unknown"]
    assert logs[0]["fields"] == ["my_new_trick", "rope_scaling.wobble"]
    assert logs[0]["log_level"] == "warning"
    with structlog.testing.capture_logs() as logs:
        gguf_config(**{"llama.attention.wobble": 1.0, "other.key": 2, "qwen2.block_count": 3})
    assert logs[0]["fields"] == ["llama.attention.wobble", "other.key", "qwen2.block_count"]
    with structlog.testing.capture_logs() as logs:
        config()
        gguf_config()
    assert logs == []


def test_numbers_are_compared_as_the_files_store_them():
    rule = Only((0.1, 0, False), "")
    assert [rule.allows(v) for v in (0.10000000149011612, 0.0, 0, False, 0.11, "0", None)] == [
        True, True, True, True, False, False, False,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"max_position_embeddings": 2**40},
        {"num_hidden_layers": 2**31},
        {"vocab_size": 2**63},
        {"hidden_size": 10**30},
        {"rms_norm_eps": 10**400},
    ],
    ids=str,
)
def test_sizes_beyond_reason_are_refused_by_field(changes, config):
    with pytest.raises(errors.BadConfig, match=f"field {next(iter(changes))}: expected "):
        config(**changes)


def test_the_namespace_of_another_architecture_means_nothing():
    assert gguf_config(**{"qwen2.attn_logit_softcapping": 30.0}) == gguf_config()


JUNK = [
    "",
    "x",
    [],
    [None],
    [[1]],
    {},
    {"a": {}},
    True,
    False,
    0,
    -1,
    0.0,
    1.5,
    -0.5,
    2**70,
    1e400,
    "inf",
    [{}],
]


@pytest.mark.parametrize("family", CLASSES)
def test_no_value_of_a_used_field_is_anything_but_read_or_refused(family, config):
    for name in CONFIG_FIELDS[family].used:
        for value in (*JUNK, float("nan")):
            with suppress(errors.ModelError):
                config(family, **{name: value})
    for kind, lists in ROPE_FIELDS.items():
        for name in lists.used:
            for value in JUNK:
                with suppress(errors.ModelError):
                    config(family, rope_parameters={"rope_type": kind, "factor": 2.0, name: value})


def test_no_value_of_a_used_key_is_anything_but_read_or_refused():
    names = [f"llama.{name}" for name in ARCHITECTURE_KEYS.used] + list(OTHER_KEYS.used)
    for name in names:
        for value in (*JUNK, float("nan")):
            for more in ({}, {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0}):
                with suppress(errors.ModelError):
                    gguf_config(**more | {name: value})
