"""What the next weight node is told, and when there is no next one."""

import pytest
from flume_protos.v1 import weight_pb2 as pb
from flume_router.progress import Progress, ResumeLimits, seeded


@pytest.fixture
def progress():
    first = pb.GenerateRequest(request_id="r", prompt_token_ids=[1, 2], sampling=pb.Sampling(max_tokens=9))
    return Progress(first, ResumeLimits(resume_s=10, fruitless=3))


def token(*ids):
    return pb.GenerateReply(token_ids=ids)


def test_the_first_attempt_gets_the_request_as_it_is(progress):
    assert progress.next_request() == pb.GenerateRequest(
        request_id="r", prompt_token_ids=[1, 2], sampling=pb.Sampling(max_tokens=9)
    )


def test_the_next_one_is_told_the_answer_so_far_and_who_had_it(progress):
    progress.took(token(5))
    progress.took(token(6, 7))
    progress.lost("a", "gone", 0.0)
    assert progress.next_request() == pb.GenerateRequest(
        request_id="r",
        prompt_token_ids=[1, 2],
        sampling=pb.Sampling(max_tokens=9),
        output_token_ids=[5, 6, 7],
        adopt_from="a",
    )
    progress.took(token(8))
    progress.lost("b", "gone", 0.0)
    assert progress.next_request().output_token_ids == [5, 6, 7, 8]
    assert progress.next_request().adopt_from == "b"


def test_time_counts_from_the_loss_and_anew_after_a_token(progress):
    assert progress.remaining_s(100.0) == 10
    progress.lost("a", "gone", 100.0)
    progress.not_yet("busy", 104.0)
    assert progress.remaining_s(106.0) == 4
    progress.took(token())  # says nothing
    assert progress.remaining_s(106.0) == 4
    progress.took(token(5))
    assert progress.remaining_s(200.0) == 10


def test_so_many_nodes_and_no_more_may_be_lost_without_a_token(progress):
    for _ in range(2):
        progress.lost("a", "gone", 0.0)
    progress.not_yet("busy", 0.0)
    assert progress.remaining_s(0.0) == 10
    progress.lost("a", "gone", 0.0)
    assert progress.remaining_s(0.0) == 0


def test_a_token_in_between_allows_as_many_again(progress):
    for _ in range(5):
        progress.lost("a", "gone", 0.0)
        progress.lost("b", "gone", 0.0)
        assert progress.remaining_s(0.0) > 0
        progress.took(token(5))


def test_chance_is_fixed_once_and_differs_between_sequences():
    hot = pb.Sampling(temperature=0.7, top_k=3)
    first, second = seeded(hot), seeded(hot)
    assert first.HasField("seed")
    assert first.seed != second.seed
    assert (first.temperature, first.top_k) == (hot.temperature, 3)
    assert not hot.HasField("seed")  # the caller's own stays as it was


@pytest.mark.parametrize("sampling", [pb.Sampling(), pb.Sampling(temperature=1, seed=0)])
def test_what_needs_no_seed_gets_none(sampling):
    assert seeded(sampling) == sampling


def test_time_in_which_a_node_worked_on_it_does_not_count(progress):
    progress.lost("a", "gone", 100.0)
    progress.lost("b", "gone", 180.0, worked_s=179.0)
    assert progress.remaining_s(181.0) == 8
    progress.not_yet("busy", 188.0)
    assert progress.remaining_s(190.0) == -1
