"""What a request may ask of sampling: proto to value, and every illegal value by name."""

import math
import subprocess
import sys

import msgspec
import pytest
from flume_protos.v1 import weight_pb2 as pb
from flume_weight.sampling import InvalidSampling, SamplingParams


def test_an_empty_message_means_plain_greedy():
    assert SamplingParams.from_proto(pb.Sampling()) == SamplingParams()
    assert SamplingParams().temperature == 0
    assert SamplingParams().seed is None


def test_every_field_of_the_message_arrives():
    message = pb.Sampling(
        temperature=0.5,
        top_k=40,
        top_p=0.75,
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=2,
        seed=-7,
        stop_token_ids=[3, 4],
        ignore_eos=True,
        max_tokens=10,
        min_tokens=2,
        logprobs=5,
        has_logprobs=True,
        logit_bias={9: -100},
    )
    params = SamplingParams.from_proto(message, vocab_size=10)
    assert params == SamplingParams(
        temperature=0.5,
        top_k=40,
        top_p=0.75,
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=2,
        seed=-7,
        stop_token_ids=(3, 4),
        ignore_eos=True,
        max_tokens=10,
        min_tokens=2,
        logprobs=5,
        logit_bias={9: -100},
    )
    assert {field.name for field in pb.Sampling.DESCRIPTOR.fields} - {"has_logprobs"} == set(
        SamplingParams.__struct_fields__
    )


def test_a_seed_of_zero_is_a_seed():
    assert SamplingParams.from_proto(pb.Sampling(seed=0)).seed == 0


@pytest.mark.parametrize(
    "message, logprobs",
    [
        (pb.Sampling(logprobs=3), None),
        (pb.Sampling(has_logprobs=True), 0),
        (pb.Sampling(has_logprobs=True, logprobs=-1), None),
        (pb.Sampling(has_logprobs=True, logprobs=20), 20),
    ],
)
def test_logprobs_are_meant_only_when_said_so(message, logprobs):
    assert SamplingParams.from_proto(message).logprobs == logprobs


def test_minus_one_turns_top_k_off():
    assert SamplingParams.from_proto(pb.Sampling(top_k=-1)).top_k == 0


@pytest.mark.parametrize(
    "field, value, legal",
    [
        ("temperature", -0.1, "at least 0 and at most 2"),
        ("temperature", 2.5, "at least 0 and at most 2"),
        ("temperature", math.nan, "at least 0"),
        ("top_k", -2, "at least -1"),
        ("top_p", 0.0, "greater than 0 and at most 1"),
        ("top_p", 1.25, "at most 1"),
        ("min_p", -0.5, "at least 0"),
        ("min_p", 1.5, "at most 1"),
        ("repetition_penalty", 0.0, "greater than 0 and finite"),
        ("repetition_penalty", -1.0, "greater than 0"),
        ("repetition_penalty", math.inf, "finite"),
        ("presence_penalty", 2.5, "at least -2 and at most 2"),
        ("frequency_penalty", -2.5, "at least -2"),
        ("seed", 2**63, "a 64-bit integer"),
        ("max_tokens", -1, "at least 0"),
        ("min_tokens", -1, "at least 0"),
        ("logprobs", 21, "between 0 and 20"),
        ("logprobs", -2, "between 0 and 20"),
        ("stop_token_ids", (1, 100), "token ids in [0, 100)"),
        ("stop_token_ids", (-1,), "token ids in [0, 100)"),
        ("logit_bias", {100: 1.0}, "token ids in [0, 100)"),
        ("logit_bias", {1: 101.0}, "at least -100 and at most 100"),
        ("logit_bias", {1: math.nan}, "at least -100"),
    ],
)
def test_an_illegal_value_is_named_with_its_range(field, value, legal):
    params = SamplingParams(**{field: value})
    with pytest.raises(InvalidSampling) as caught:
        params.validate(vocab_size=100)
    assert caught.value.field == field
    assert legal in str(caught.value)
    assert str(caught.value).startswith(f"{field} is ")
    assert isinstance(caught.value, ValueError)


def test_an_illegal_message_is_refused_when_it_is_read():
    with pytest.raises(InvalidSampling, match=r"temperature is 3\.0; it must be at least 0 and at most 2"):
        SamplingParams.from_proto(pb.Sampling(temperature=3))


def test_more_least_than_most_tokens_is_refused():
    with pytest.raises(InvalidSampling, match="min_tokens is 6; it must be at most max_tokens 5"):
        SamplingParams(min_tokens=6, max_tokens=5).validate()
    SamplingParams(min_tokens=6).validate()


@pytest.mark.parametrize(
    "edge",
    [
        {"temperature": 2.0},
        {"top_p": 1.0},
        {"top_p": 1e-6},
        {"min_p": 1.0},
        {"presence_penalty": -2.0, "frequency_penalty": 2.0},
        {"seed": -(2**63)},
        {"logprobs": 20},
        {"logit_bias": {0: 100.0, 99: -100.0}},
        {"stop_token_ids": (0, 99)},
    ],
    ids=str,
)
def test_the_edges_are_legal(edge):
    params = SamplingParams(**edge)
    assert params.validate(vocab_size=100) is params


def test_it_travels_to_the_engine_and_back():
    params = SamplingParams(temperature=0.5, stop_token_ids=(1, 2), logit_bias={5: -1.5}, logprobs=0, seed=-1)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


def test_the_supervisor_can_import_it_without_torch():
    code = "import sys, flume_weight.sampling; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
