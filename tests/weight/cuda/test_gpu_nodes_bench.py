"""bench/gpu_nodes.py as far as it needs no engine. All of it without a GPU:

NODES_DEVICE=cpu bash bench/gpu_check.sh RESULTS nodes
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from flume_weight.messages import Token, TopToken


@pytest.fixture
def bench(monkeypatch):
    path = Path(__file__).parents[3] / "bench" / "gpu_nodes.py"
    spec = importlib.util.spec_from_file_location("gpu_nodes", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_nodes", module)
    spec.loader.exec_module(module)
    torch.set_num_threads(1)
    return module


def greedy(reference, prompt, count):
    """What follows, the likeliest each time, with the two likeliest of each place."""
    ids, said = list(prompt), []
    for _ in range(count):
        logprobs, top = reference(ids)[-1].log_softmax(-1).topk(2)
        pairs = [TopToken(int(token), float(value)) for token, value in zip(top, logprobs, strict=True)]
        said.append(Token("s", pairs[0].token_id, pairs[0].logprob, pairs))
        ids.append(pairs[0].token_id)
    return said


@pytest.fixture
def reference(bench, tmp_path):
    return bench.own_reference(bench.make_tiny(tmp_path))


def test_its_model_says_different_things_after_different_prompts(reference):
    one, other = ([token.token_id for token in greedy(reference, ids, 8)] for ids in ([1, 2, 3], [4, 5]))
    assert one != other and len(set(one)) > 1


def test_what_a_reference_says_itself_agrees_with_it(bench, reference):
    same, difference = bench.compare(reference, [1, 2, 3], greedy(reference, [1, 2, 3], 8))
    assert same == 8 and difference < 1e-4


def test_a_token_that_is_not_the_likeliest_is_found_and_so_is_a_probability_that_is_off(bench, reference):
    said = greedy(reference, [1, 2, 3], 8)
    wrong = said[5].top[1].token_id
    said[5] = Token("s", wrong, said[5].logprob, said[5].top)
    assert bench.compare(reference, [1, 2, 3], said)[0] == 5
    said = greedy(reference, [1, 2, 3], 8)
    said[7].top[1].logprob += 0.25
    assert bench.compare(reference, [1, 2, 3], said)[1] == pytest.approx(0.25, abs=1e-3)


def test_a_node_can_be_killed_only_where_another_is_left(bench, capsys):
    assert bench.parse(["--kill"]).attention == 2
    with pytest.raises(SystemExit):
        bench.parse(["--kill", "--attention", "1"])
    assert "another attention node" in capsys.readouterr().err
