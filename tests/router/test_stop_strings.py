"""No stop string, and no half of one, is ever shown."""

import itertools

import hypothesis.strategies as st
import pytest
from flume_router.stop_strings import StopStrings, first_stop
from hypothesis import given, settings

LETTERS = st.text("ab", max_size=20)
STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=4)


def run(pieces, stops):
    stopper = StopStrings(stops)
    shown = [stopper.push(piece) for piece in pieces]
    return stopper, shown


def shown_text(pieces, stops):
    stopper, shown = run(pieces, stops)
    return "".join(shown) + stopper.finish(), stopper.stopped


@settings(max_examples=300)
@given(text=LETTERS, stops=STOPS, data=st.data())
def test_where_the_text_is_cut_changes_nothing(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    edges = [0, *cuts, len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    assert shown_text(pieces, stops) == shown_text(list(text), stops)


@settings(max_examples=300)
@given(pieces=st.lists(st.text("ab", max_size=4)), stops=STOPS)
def test_the_answer_is_the_text_before_the_first_stop_string(pieces, stops):
    text = "".join(pieces)
    shown, stopped = shown_text(pieces, stops)
    assert text.startswith(shown)
    assert not any(stop in shown for stop in stops)
    assert stopped == any(stop in text for stop in stops)
    if stopped:
        assert any(text.startswith(stop, len(shown)) for stop in stops)
    else:
        assert shown == text


@settings(max_examples=200)
@given(pieces=st.lists(st.text("ab", max_size=4)), stops=STOPS, more=LETTERS)
def test_what_was_shown_is_never_part_of_a_later_stop_string(pieces, stops, more):
    """Whatever comes next, the final answer begins with what has been shown so far."""
    _, shown = run(pieces, stops)
    final, _ = shown_text([*pieces, *more], stops)
    assert final.startswith("".join(shown))


@pytest.mark.parametrize(
    "text, stops, cut",
    [
        ("abc", ["abcd", "bc"], 1),  # complete first
        ("xabc", ["abc", "c"], 1),  # complete together: the longest
        ("xx", ["y"], None),
        ("", ["y"], None),
    ],
)
def test_the_stop_string_that_is_complete_first_wins(text, stops, cut):
    assert first_stop(text, stops) == cut


def test_text_is_shown_as_soon_as_it_is_harmless():
    _, shown = run(["he", "l", "lo", " w", "or", "x"], ["lo world"])
    assert shown == ["he", "", "l", "", "", "lo worx"]


def test_without_stop_strings_nothing_is_held():
    _, shown = run(["a", "b"], [])
    assert shown == ["a", "b"]


def test_nothing_is_shown_after_the_end():
    stopper, shown = run(["a", "STOP", "b"], ["STOP"])
    assert shown == ["a", "", ""]
    assert stopper.finish() == ""


CONTROL = ["<|a|>", "<|b|>"]


def spelled(pieces, stops):
    """Pieces that are control tokens' texts are hidden."""
    stopper = StopStrings(stops, CONTROL)
    shown = [stopper.push(piece, hidden=piece in CONTROL) for piece in pieces]
    return shown, stopper.stopped, stopper.finish()


@pytest.mark.parametrize(
    "pieces, stops, shown, stopped",
    [
        (["x", "<|a|>", "y"], ["<|a|>"], ["x", "", ""], True),
        (["x", "<|b|>", "y"], ["<|a|>"], ["x", "", "y"], False),
        (["x", "\n", "<|a|>"], ["\n<|a|>"], ["x", "", ""], True),
        (["x", "\n", "<|b|>", "y"], ["\n<|a|>"], ["x", "", "", "\ny"], False),
        (["x", "<|a|>", "us", "er"], ["<|a|>user"], ["x", "", "", ""], True),
        (["x", "<|a|>", "us", "ed"], ["<|a|>user"], ["x", "", "", "used"], False),
        (["x", "<|a|>", "u"], [">"], ["x", "", "u"], False),  # no part of a hidden token's text
        (["a", "<|a|>", "b"], ["ab"], ["", "", ""], True),  # what is seen
        (["x<|", "a|>y"], ["<|a|>"], ["x", ""], True),  # spelled by ordinary tokens
        (["<|a|>", "z", "q"], ["<|a|>zz", "zq"], ["", "", ""], True),
    ],
)
def test_a_stop_string_may_have_a_control_token_in_it(pieces, stops, shown, stopped):
    assert spelled(pieces, stops) == (shown, stopped, "")


@settings(max_examples=300)
@given(
    pieces=st.lists(st.sampled_from(["a", "b", "ab", *CONTROL]), max_size=12),
    stops=st.lists(st.sampled_from(["<|a|>", "a<|a|>", "<|a|>b", "a<|a|>b", "<|a|><|b|>", "bb"]), max_size=3),
)
def test_hidden_texts_end_an_answer_where_they_would_if_they_were_shown(pieces, stops):
    shown, stopped, rest = spelled(pieces, stops)
    whole, visible = "".join(pieces), "".join(p for p in pieces if p not in CONTROL)
    seen = "".join(shown) + rest
    assert visible.startswith(seen)
    assert stopped == (any(stop in whole for stop in stops) or any(stop in visible for stop in stops))
    if not stopped:
        assert seen == visible
