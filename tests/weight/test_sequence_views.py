"""What a supervisor knows of sequences without asking its engine."""

from flume_weight import messages as m
from flume_weight.messages import Stage
from flume_weight.sampling import SamplingParams
from flume_weight.sequence_views import SequenceViews
from hypothesis import given
from hypothesis import strategies as st


def submit(name, prompt=10, said=0):
    return m.Submit(name, list(range(prompt)), SamplingParams(max_tokens=8), list(range(said)))


def views_of(*messages):
    views = SequenceViews()
    for message in messages:
        views.submitted(message, 0.0)
    return views


def test_a_sequence_is_queued_from_its_submission_on():
    views = views_of(submit("a"), submit("b", said=3))
    assert [(view.sequence, view.stage, view.total_tokens) for view in views] == [
        ("a", Stage.QUEUED, 10),
        ("b", Stage.QUEUED, 13),
    ]
    assert views.count()[Stage.QUEUED] == 2


def test_what_the_engine_reports_shows_how_far_prompts_are():
    views = views_of(submit("a", 5600), submit("b", 100), submit("c", 4))
    views.reported([m.SequenceState("a", Stage.PREFILLING, 3200), m.SequenceState("c", Stage.DECODING, 4)])
    assert views.prefill() == (3200, 5700)
    assert dict(views.count()) == {Stage.PREFILLING: 1, Stage.QUEUED: 1, Stage.DECODING: 1}


def test_a_token_means_decoding_with_all_before_it_stored():
    views = views_of(submit("a", 10))
    views.produced([m.Token("a", 7), m.Token("gone", 7)])
    views.produced([m.Token("a", 8)])
    (view,) = views
    assert (view.stage, view.completion_tokens, view.computed_tokens) == (Stage.DECODING, 2, 11)
    assert view.pending_tokens == 1


def test_routes_and_ends():
    views = views_of(submit("a"), submit("b"))
    views.routed("a", [m.RangeInfo(0, None, "attention-1")])
    views.routed("gone", [m.RangeInfo(0, None, "attention-1")])
    views.ended("b")
    views.ended("gone")
    assert [(view.sequence, len(view.ranges)) for view in views] == [("a", 1)]
    views.clear()
    assert not len(views) and views.prefill() == (0, 0)


names = st.sampled_from("abc")
events = st.one_of(
    st.tuples(st.just("submitted"), names),
    st.tuples(st.just("produced"), names),
    st.tuples(st.just("ended"), names),
    st.tuples(st.just("reported"), names, st.sampled_from(Stage), st.integers(0, 10)),
)


@given(st.lists(events, max_size=40))
def test_every_live_sequence_is_at_one_stage_and_none_is_told_twice(happened):
    views, live = SequenceViews(), set()
    for what, name, *rest in happened:
        if what == "submitted":
            views.submitted(submit(name), 0.0)
            live.add(name)
        elif what == "produced":
            views.produced([m.Token(name, 1)])
        elif what == "ended":
            views.ended(name)
            live.discard(name)
        else:
            views.reported([m.SequenceState(name, *rest)])
    assert {view.sequence for view in views} == live and len(views) == len(live)
    assert views.count().total() == len(live)
    computed, total = views.prefill()
    assert 0 <= computed <= total
