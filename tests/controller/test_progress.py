from flume_controller.progress import progress, returned
from flume_controller.spec import Actor, AttentionSpec, AttentionStatus, Deadline, GaveUp

DEADLINE_S = 60.0
GAVE_UP = GaveUp(generation=1, wanted=9, returned_to=3, at_s=1.0)


def status(ready, desired=3, generation=2, **fields):
    return AttentionStatus(
        observed_generation=generation, desired=desired, ready=ready, preparing=0, draining=0,
        progressed_at_s=100.0, **fields,
    )  # fmt: skip


def spec(desired=3, generation=2, **fields):
    return AttentionSpec(desired=desired, generation=generation, **fields)


def at(now_s, ready, previous, wanted=None):
    return progress(wanted or spec(), ready, previous, now_s, DEADLINE_S)


def test_the_time_runs_from_the_last_progress():
    assert not at(159.9, 1, status(1)).overdue
    assert at(160.0, 1, status(1)).overdue


def test_a_new_wish_one_more_ready_node_and_a_first_loss_begin_it_anew():
    assert at(500, 1, status(1, generation=1)).at_s == 500
    assert at(500, 2, status(1)).at_s == 500
    assert at(500, 2, status(3)).at_s == 500, "it was complete: what is missing has only begun to be"
    assert at(500, 1, status(2)).at_s == 100, "a further loss is no progress"
    assert at(500, 1, None).at_s == 500


def test_the_last_good_count_is_the_last_one_that_was_complete():
    assert at(101, 3, status(3, last_good=1)).last_good == 3
    assert at(101, 2, status(2, last_good=1)).last_good == 1
    assert at(101, 0, None).last_good is None


def test_a_complete_fleet_is_never_overdue():
    assert not at(9999, 3, status(3)).overdue


def test_only_a_scale_up_returns_and_never_below_the_minimum():
    late = at(500, 1, status(1, last_good=1))
    back, _ = returned(spec(scale_deadline=Deadline(within_s=5, by_s=505)), late, 500)
    assert (back.desired, back.scale_deadline) == (1, None), "who leaves now has all the time it needs"
    assert returned(spec(min=2), late, 500)[0].desired == 2
    assert returned(spec(min=3), late, 500) is None
    assert returned(spec(), at(500, 2, status(2, last_good=3)), 500) is None
    assert returned(spec(), at(500, 2, status(2)), 500) is None, "nothing was ever good"
    assert returned(spec(), at(120, 1, status(1, last_good=1)), 120) is None, "there is time left"


def test_that_it_gave_up_is_remembered_until_somebody_else_wants_something():
    previous = status(3, gave_up=GAVE_UP)
    assert at(500, 3, previous, spec(set_by=Actor.CONTROLLER)).gave_up == GAVE_UP
    assert at(500, 3, previous, spec(set_by=Actor.USER)).gave_up is None
