"""The tokens are transformers' tokens: whatever the number of nodes, alone, in company, while scaling.

What needs no truth comes first: it is still being worked out then.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from flume_protos.v1 import router_pb2, weight_pb2

sys.path.insert(0, str(Path(__file__).parent))
import oracle

pytestmark = pytest.mark.e2e


def generate(cluster, prompt, max_tokens=oracle.NEW_TOKENS) -> list[int]:
    request = router_pb2.GenerateTextRequest(
        sampling=weight_pb2.Sampling(max_tokens=max_tokens, ignore_eos=True)
    )
    if isinstance(prompt, str):
        request.prompt = prompt
    else:
        request.messages.extend(router_pb2.ChatMessage(**message) for message in prompt)
    return [token for reply in cluster.router().Generate(request, timeout=120) for token in reply.token_ids]


PROMPTS = {**oracle.PLAIN, **oracle.CHAT}


def test_greedy_tokens_do_not_change_while_the_cluster_is_scaled(cluster):
    """1 -> 3 -> 1 -> 2 during generation, with sequences that are long enough to be moved."""
    cluster.scale(1)
    prompts = [oracle.PLAIN["a question"], oracle.PLAIN["500 tokens"], oracle.CHAT["turns"]]
    tokens = 200
    with ThreadPoolExecutor(len(prompts)) as pool:
        before = list(pool.map(lambda prompt: generate(cluster, prompt, tokens), prompts))
    with ThreadPoolExecutor(len(prompts)) as pool:
        streams = [pool.submit(generate, cluster, prompt, tokens) for prompt in prompts]
        cluster.scale(3)
        cluster.until(lambda: len(_nodes_in_routes(cluster)) > 1, 10, "a tail moved")
        for replicas in (1, 2):
            cluster.scale(replicas)
        assert not all(stream.done() for stream in streams), "too short to be scaled under way"
        during = [stream.result() for stream in streams]
    assert during == before


def _nodes_in_routes(cluster) -> set[str]:
    return {item.node for route in cluster.routes() for item in route.ranges}


@pytest.fixture(scope="module")
def expected(truth):
    return {name: item["answer"] for name, item in truth.answers().items()}


def test_the_prompts_span_five_to_3500_tokens(truth):
    lengths = sorted(len(item["prompt"]) for item in truth.answers().values())
    assert len(lengths) >= 12 and lengths[0] <= 5 and lengths[-1] >= 3400


@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_greedy_tokens_equal_transformers_alone_and_eight_at_a_time(cluster, expected, nodes):
    cluster.scale(nodes)
    for name, prompt in PROMPTS.items():
        assert generate(cluster, prompt) == expected[name], f"{name}, alone, {nodes} nodes"
    with ThreadPoolExecutor(8) as pool:
        together = dict(
            zip(PROMPTS, pool.map(lambda prompt: generate(cluster, prompt), PROMPTS.values()), strict=True)
        )
    wrong = [name for name in PROMPTS if together[name] != expected[name]]
    assert not wrong, f"{wrong}, together, {nodes} nodes"
