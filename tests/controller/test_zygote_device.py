"""What the zygote of a machine is made ready for: what its attention nodes are told to run on."""

import shlex

import pytest
from flume_common.store import StoreConfig
from flume_controller import processes
from flume_controller.config import ControllerConfig
from flume_controller.lead import attention_device
from flume_controller.processes import RecordDir
from flume_controller.providers.zygote import Zygote


@pytest.mark.parametrize(
    "words, device",
    [
        ("", "cpu"),
        ("--kv-memory 1GiB --device cuda --dtype bfloat16", "cuda"),
        ("--device=cuda", "cuda"),
        ("--device cuda --device cpu", "cpu"),
        ("--device quantum", "cpu"),
        ("--device", "cpu"),
    ],
)
def test_the_device_is_the_one_in_the_nodes_arguments(tmp_path, words, device):
    config = ControllerConfig(
        cluster="c", node="n", store=StoreConfig(("e:1",)), data_dir=tmp_path,
        attention_args=tuple(shlex.split(words)),
    )  # fmt: skip
    assert attention_device(config) == device


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_zygote_is_told_what_to_be_ready_for(tmp_path, monkeypatch, device):
    spawned = []

    def spawn(argv, log, **options):
        spawned.append(argv)
        raise OSError("that is enough")

    monkeypatch.setattr(processes, "spawn", spawn)
    assert Zygote(RecordDir(tmp_path), tmp_path, device).ensure() is None
    assert spawned[0][-2:] == ["--preload", device]
