import io

import pytest
from flume_controller.demo_view import TEXT_LINES, Held, Scene, Screen, as_frame, bar, held_ranges, last_lines
from flume_protos.v1 import common_pb2 as pb

ROUTE = pb.Route(
    ranges=[
        pb.TokenRange(start=0, end=40, node="attention-1"),
        pb.TokenRange(start=40, end=80, node="attention-2"),
        pb.TokenRange(start=80, node="attention-1"),
    ]
)


def test_the_tail_reaches_to_the_length_of_the_sequence():
    assert held_ranges(ROUTE, 100) == [
        Held("attention-1", 0, 40, False),
        Held("attention-2", 40, 80, False),
        Held("attention-1", 80, 100, True),
    ]


def test_a_length_that_lags_behind_the_route_makes_an_empty_tail():
    assert held_ranges(ROUTE, 70)[-1] == Held("attention-1", 80, 80, True)


@pytest.mark.parametrize(
    "held, expected",
    [
        ([], "          "),
        ([Held("a", 0, 40, False)], "████      "),
        ([Held("a", 0, 40, False), Held("a", 80, 95, True)], "████    █▶"),
        ([Held("a", 80, 80, True)], "        ▶ "),
        ([Held("a", 90, 250, True)], "         ▶"),
    ],
    ids=["nothing", "the beginning", "two ranges", "an empty tail", "longer than expected"],
)
def test_a_bar_is_filled_where_the_node_holds_tokens(held, expected):
    assert bar(held, expected_tokens=100, cells=10) == expected


def test_a_frame_keeps_its_height_while_the_answer_grows_and_nodes_go():
    scene = Scene("title", 100)
    scene.saw_nodes({"attention-1": "READY", "attention-2": "READY"})
    before = as_frame(scene, 80)
    scene.text = "word " * 300
    scene.held = held_ranges(ROUTE, 100)
    scene.saw_nodes({"attention-1": "READY"})
    after = as_frame(scene, 80)
    assert len(before) == len(after)
    assert "GONE" in "".join(after)
    assert len(last_lines("", 40)) == len(last_lines("a\n" * 50, 40)) == TEXT_LINES


def test_elsewhere_than_on_a_terminal_only_changes_are_printed():
    out = io.StringIO()
    screen = Screen(out)
    scene = Scene("title", 100, length=90, held=held_ranges(ROUTE, 90))
    scene.saw_nodes({"attention-1": "READY", "attention-2": "READY"})
    screen.show(scene)
    scene.length = 91
    screen.show(scene)
    assert out.getvalue().count("attention-2 [40, 80), attention-1 [80, ∞)") == 1
    assert "\033" not in out.getvalue()
    scene.saw_nodes({"attention-1": "READY", "attention-2": "DRAINING"})
    screen.show(scene)
    assert out.getvalue().count("attention-1 [80, ∞)") == 2
