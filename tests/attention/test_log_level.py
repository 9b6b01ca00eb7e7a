"""An attention node's log level follows its setting while it runs."""

import re
import subprocess
import sys
import time

import pytest
from flume_common.config_schema import path_of
from flume_common.config_store import set_values


@pytest.fixture
def log(etcd_endpoint, keys, tmp_path):
    """The log of a node that runs."""
    path = tmp_path / "log"
    argv = [
        *(sys.executable, "-m", "flume_attention", "--cluster", keys.cluster, "--node", "attention-1"),
        *("--etcd", etcd_endpoint, "--listen", "127.0.0.1:0", "--kv-memory", "1MiB"),
    ]
    with path.open("wb") as file:
        node = subprocess.Popen(argv, stdout=file, stderr=file)
    yield path
    node.terminate()
    assert node.wait(10) == 0


async def test_the_log_level_of_a_running_node_follows_the_setting(log, store, keys):
    until(log, '"registered"')
    await set_values(store, keys, {path_of("log_level"): "debug"}, by="test", now_s=1.0)
    until(log, r'"log_level": "debug".*settings_changed|settings_changed.*"log_level": "debug"')
    await store.put(keys.setting("attention", "log_level"), b"loud")
    until(log, "setting_refused")


def until(log, pattern, timeout_s=15.0):
    deadline_s = time.monotonic() + timeout_s
    while not re.search(pattern, log.read_text()):
        assert time.monotonic() < deadline_s, log.read_text()[-2000:]
        time.sleep(0.05)
