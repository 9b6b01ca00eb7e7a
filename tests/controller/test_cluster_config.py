from pathlib import Path

import pytest
from flume_controller.cluster_config import (
    ClusterConfig,
    UnreadableConfig,
    as_flags,
    differences,
    recorded,
    resumed,
    to_keep,
)

CONFIG = ClusterConfig(
    name="x",
    data_dir=Path("/tmp/y"),
    model="/models/m",
    weights=2,
    attention=3,
    zygote=False,
    weight_args=("--a", "b"),
    set_attention=True,
    timeout_s=5,
)


def test_what_is_recorded_are_the_settings_that_are_not_the_defaults():
    assert recorded(CONFIG) == {
        "model": "/models/m", "weights": 2, "attention": 3, "zygote": False, "weight_args": ["--a", "b"],
    }  # fmt: skip
    assert recorded(ClusterConfig()) == {}


def test_what_is_given_now_goes_before_the_record_and_the_record_before_defaults():
    settings = {"name": "x", "data_dir": Path("/tmp/y"), "weights": 5, "model": "smollm2-135m"}
    config = resumed(settings, {"name", "weights"}, recorded(CONFIG))
    assert (config.name, config.weights, config.model) == ("x", 5, "/models/m")
    assert (config.attention, config.zygote, config.weight_args) == (3, False, ("--a", "b"))
    assert (config.set_attention, config.timeout_s) == (False, 120.0)


def test_a_record_of_another_version_is_understood_or_refused_by_its_field():
    settings = {"name": "x", "data_dir": Path("/tmp/y")}
    assert resumed(settings, (), {"from_the_future": 1}).weights == 1
    with pytest.raises(UnreadableConfig, match="weights"):
        resumed(settings, (), {"weights": "many"})


def test_only_what_was_given_and_differs_is_a_difference():
    asked = ClusterConfig(weights=1, dtype="float32", attention=9, timeout_s=3)
    given = {"weights", "dtype", "attention", "timeout_s", "name"}
    assert differences(asked, given, {"weights": 2}) == ["--weight", "--dtype"]
    assert differences(asked, given, {"dtype": "float32"}) == []
    assert differences(asked, (), {"weights": 2}) == []


def test_memory_that_was_measured_is_measured_again():
    config = ClusterConfig(kv_memory="100MiB", kv_measured=True)
    assert recorded(config) == {"kv_memory": "100MiB"} and to_keep(config) == {}


def test_a_record_reads_as_flags():
    assert as_flags(recorded(CONFIG)) == (
        "--model /models/m --weight 2 --attention 3 --no-zygote --weight-args --a --weight-args b"
    )
