"""Requests into sequences."""

from flume_protos.v1 import weight_pb2 as pb
from flume_router.sequence_request import SequenceRequest
from flume_router.service import sequences, wrapped


def test_sequences_count_their_ids_and_seeds_up():
    base = SequenceRequest("r", (), pb.Sampling(seed=2**63 - 1), ("x",), 1.0, {})
    made = list(sequences(base, [[1], [2]], 2))
    assert [one.id for one in made] == ["r-0", "r-1", "r-2", "r-3"]
    assert [list(one.prompt_token_ids) for one in made] == [[1], [1], [2], [2]]
    assert [one.sampling.seed for one in made] == [2**63 - 1, -(2**63)] * 2
    assert {one.stop for one in made} == {("x",)}


def test_a_single_sequence_keeps_the_requests_id():
    [one] = sequences(SequenceRequest("r", (), pb.Sampling(), (), 1.0, {}), [[1]], 1)
    assert one.id == "r"
    assert not one.sampling.HasField("seed")


def test_numbers_wrap_into_int64():
    assert [wrapped(n) for n in (0, -1, 2**63 - 1, 2**63, -(2**63))] == [0, -1, 2**63 - 1, -(2**63), -(2**63)]
