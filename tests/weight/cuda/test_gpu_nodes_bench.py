"""bench/gpu_nodes.py as far as it needs no engine. All of it without a GPU:

NODES_DEVICE=cpu bash bench/gpu_check.sh RESULTS nodes
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture
def bench(monkeypatch):
    path = Path(__file__).parents[3] / "bench" / "gpu_nodes.py"
    spec = importlib.util.spec_from_file_location("gpu_nodes", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_nodes", module)
    spec.loader.exec_module(module)
    torch.set_num_threads(1)
    return module


def test_its_model_can_be_loaded_and_says_different_things_after_different_prompts(bench, tmp_path):
    model = bench.make_tiny(tmp_path)
    said = bench.reference(model, "float32", {"a": [1, 2, 3], "b": [4, 5], "again": [1, 2, 3]}, 8)
    assert said["a"] == said["again"] != said["b"] and len(said["a"]) == 8
    assert len(set(said["a"])) > 1


def test_tokens_agree_up_to_the_first_that_differs(bench):
    assert bench.agreed([1, 2, 3], [1, 2, 3]) == 3
    assert bench.agreed([1, 9, 3], [1, 2, 3]) == 1
    assert bench.agreed([1, 2], [1, 2, 3]) == 2


def test_a_node_can_be_killed_only_where_another_is_left(bench, capsys):
    assert bench.parse(["--kill"]).attention == 2
    with pytest.raises(SystemExit):
        bench.parse(["--kill", "--attention", "1"])
    assert "another attention node" in capsys.readouterr().err
