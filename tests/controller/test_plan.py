from dataclasses import replace

import pytest
from flume_controller.observe import free_ids
from flume_controller.plan import Drain, NodeView, Phase, Start, Stop, Undrain, plan
from hypothesis import given
from hypothesis import strategies as st

STARTING, PREPARING, READY = Phase.STARTING, Phase.PREPARING, Phase.READY
DRAINING, STOPPING, LOST, STUCK, DEAD = (
    Phase.DRAINING,
    Phase.STOPPING,
    Phase.LOST,
    Phase.STUCK,
    Phase.DEAD,
)
UNREACHABLE = Phase.UNREACHABLE
COUNTS = (STARTING, PREPARING, READY)


def node(id, phase, held=0, safe=False, managed=True, **leaving):
    return NodeView(id, phase, held, safe, managed, **leaving)


@pytest.mark.parametrize(
    "desired, nodes, actions",
    [
        pytest.param(2, [node("a", READY), node("b", READY)], [], id="settled"),
        pytest.param(3, [node("a", READY)], [Start(2)], id="short by two"),
        pytest.param(2, [node("a", READY), node("b", STARTING)], [], id="a starting process counts"),
        pytest.param(2, [node("a", READY), node("b", PREPARING)], [], id="a preparing node counts"),
        pytest.param(2, [node("a", READY), node("b", STOPPING)], [Start(1)], id="a stopping one does not"),
        pytest.param(2, [node("a", READY), node("b", DEAD)], [Start(1)], id="nor does a dead one"),
        pytest.param(2, [node("a", READY), node("b", LOST)], [], id="a lost one is waited for"),
        pytest.param(
            1, [node("a", READY), node("b", LOST)], [], id="a lost one lets no ready one go, nor itself"
        ),
        pytest.param(
            2, [node("a", READY), node("b", STUCK)], [Start(1), Stop("b")], id="a stuck one is replaced"
        ),
        pytest.param(
            1, [node("a", READY, 9), node("b", READY, 5)], [Drain("b")], id="the one with least work leaves"
        ),
        pytest.param(
            1,
            [node("a", READY, 0), node("b", PREPARING, 7)],
            [Drain("b")],
            id="one that is not ready leaves before an idle ready one",
        ),
        pytest.param(
            1, [node("a", READY), node("b", STARTING)], [Stop("b")], id="an unregistered one is stopped"
        ),
        pytest.param(
            1,
            [node("attention-2", READY), node("attention-10", READY)],
            [Drain("attention-10")],
            id="among equals the newest leaves",
        ),
        pytest.param(
            2,
            [node("a", READY), node("b", DRAINING, 5), node("c", DRAINING, 9)],
            [Undrain("c")],
            id="the drain of the fullest is taken back rather than one started",
        ),
        pytest.param(
            3,
            [node("a", READY), node("b", DRAINING, 5, safe=True)],
            [Undrain("b"), Start(1)],
            id="what is taken back is not stopped although it was empty",
        ),
        pytest.param(
            1,
            [node("a", READY), node("b", DRAINING, safe=True), node("c", DRAINING, 4)],
            [Stop("b")],
            id="a drained node is stopped once it is empty, others wait",
        ),
        pytest.param(
            1,
            [node("a", READY), node("b", DRAINING, safe=True, managed=False)],
            [],
            id="somebody else's process is not stopped",
        ),
        pytest.param(
            1,
            [node("a", READY, 9), node("b", READY, managed=False)],
            [Drain("a")],
            id="somebody else's leaves last, as it would stay for nothing",
        ),
        pytest.param(
            1,
            [node("a", READY), node("b", PREPARING, managed=False)],
            [],
            id="somebody else's counts once it is ready",
        ),
        pytest.param(
            0, [node("a", READY), node("b", READY, 2)], [Drain("a"), Drain("b")], id="scale to zero"
        ),
        pytest.param(
            1,
            [node("a", READY, 9), node("b", READY, 5, leave_by_s=30.0)],
            [Drain("b", 30.0)],
            id="it is told by when",
        ),
        pytest.param(
            1,
            [node("a", READY), node("b", DRAINING, 5, leave_by_s=30.0, told=False)],
            [Drain("b", 30.0)],
            id="one that leaves already is told of a new deadline",
        ),
        pytest.param(
            1,
            [node("a", READY), node("b", DRAINING, 5, overdue=True)],
            [Stop("b", lost_tokens=5)],
            id="one that is past its deadline is stopped although it holds something",
        ),
        pytest.param(
            1,
            [node("a", READY), node("b", DRAINING, safe=True, overdue=True)],
            [Stop("b")],
            id="one that was empty in time loses nothing",
        ),
        pytest.param(
            1,
            [node("a", PREPARING), node("b", DRAINING, 5, overdue=True)],
            [],
            id="it is not stopped before somebody can take over",
        ),
        pytest.param(
            2,
            [
                node("a", READY, drained=True),
                node("b", DRAINING, 5, drained=True, overdue=True),
                node("c", STARTING),
                node("d", STARTING),
            ],
            [Drain("a")],
            id="who leaves now takes nothing over",
        ),
        pytest.param(
            2,
            [node("a", READY), node("b", DRAINING, 5, overdue=True)],
            [Undrain("b")],
            id="nor is one stopped that is wanted again",
        ),
    ],
)
def test_plan(desired, nodes, actions):
    assert plan(desired, nodes) == actions


VIEWS = st.lists(
    st.builds(
        lambda phase, held, empty, *leaving: (phase, 0 if empty else held, empty, *leaving),
        st.sampled_from(list(Phase)),
        st.integers(0, 1000),
        st.booleans(),
        st.booleans(),
        st.sampled_from(["no deadline", "not told", "told", "overdue"]),
    ),
    max_size=8,
).map(
    lambda items: [
        node(
            f"attention-{number}",
            phase,
            held,
            phase is DRAINING and empty,
            drained=drained,
            leave_by_s=0.0 if leaving == "no deadline" else 30.0,
            told=leaving != "not told" or phase is not DRAINING,
            overdue=leaving == "overdue" and phase is DRAINING,
            replaceable=leaving == "overdue" and phase is UNREACHABLE,
        )
        for number, (phase, held, empty, drained, leaving) in enumerate(items, 1)
    ]
)
DESIRED = st.integers(0, 6)


def do(actions, nodes):
    """The world after the actions, as the next pass sees it."""
    world = {view.id: view for view in nodes}
    for action in actions:
        match action:
            case Start(count):
                world |= {id: node(id, STARTING) for id in free_ids(count, world)}
            case Drain(id, leave_by_s):
                assert world[id].phase in (PREPARING, READY, DRAINING), "it takes somebody to tell"
                assert leave_by_s == world[id].leave_by_s
                world[id] = replace(world[id], phase=DRAINING, told=True)
            case Undrain(id):
                assert world[id].phase is DRAINING
                world[id] = replace(world[id], phase=READY, safe_to_delete=False, told=True, overdue=False)
            case Stop(id):
                world[id] = node(id, STOPPING, drained=world[id].drained)
    return list(world.values())


@given(DESIRED, VIEWS)
def test_doing_what_the_plan_says_settles_it(desired, nodes):
    """In two passes at most: a node taken back lets an overdue one go, which needs somebody to be ready."""
    for _ in range(2):
        nodes = do(plan(desired, nodes), nodes)
    assert plan(desired, nodes) == []


@given(DESIRED, VIEWS)
def test_as_many_stay_as_are_wanted_and_lost_ones_may_come_back(desired, nodes):
    after = do(plan(desired, nodes), nodes)
    staying = sum(view.phase in COUNTS and not view.drained for view in after)
    lost = sum(view.phase in (LOST, UNREACHABLE) and not view.drained for view in after)
    assert min(desired, desired - lost) <= staying <= desired


@given(DESIRED, VIEWS)
def test_no_ready_node_leaves_while_too_few_would_remain(desired, nodes):
    ready = {view.id for view in nodes if view.phase is READY and not view.drained}
    leaving = {action.node for action in plan(desired, nodes) if isinstance(action, Drain)} & ready
    if leaving:
        assert len(ready - leaving) >= desired


@given(DESIRED, VIEWS)
def test_nothing_that_holds_work_is_stopped_before_its_deadline(desired, nodes):
    views = {view.id: view for view in nodes}
    for action in plan(desired, nodes):
        if isinstance(action, Stop):
            view = views[action.node]
            assert view.safe_to_delete or view.overdue or view.phase in (STARTING, STUCK, UNREACHABLE)
            assert action.lost_tokens == (0 if view.safe_to_delete else view.held_tokens) or not view.overdue


@given(DESIRED, VIEWS)
def test_what_is_stopped_with_work_leaves_somebody_to_do_it(desired, nodes):
    actions = plan(desired, nodes)
    after = do(actions, nodes)
    if any(isinstance(action, Stop) and action.lost_tokens for action in actions):
        assert any(view.phase is READY and not view.drained for view in after)


@given(DESIRED, VIEWS)
def test_whoever_leaves_knows_by_when(desired, nodes):
    assert all(view.told for view in do(plan(desired, nodes), nodes) if view.phase is DRAINING)


@given(DESIRED, VIEWS)
def test_no_node_gets_two_orders(desired, nodes):
    named = [action.node for action in plan(desired, nodes) if not isinstance(action, Start)]
    assert len(named) == len(set(named))


@given(st.lists(DESIRED, min_size=1, max_size=6), VIEWS, st.data())
def test_whatever_happens_in_between_it_converges_once_the_wish_rests(wishes, nodes, data):
    world = nodes
    for desired in wishes:
        world = do(plan(desired, world), world)
        world = [_lives_on(view, data) for view in world]
    for _ in range(6):
        world = do(plan(desired, world), world)
        world = [settled for view in world if (settled := _rests(view)) is not None]
    assert sum(view.phase is READY for view in world) == desired
    assert all(view.phase is READY for view in world)


def _lives_on(view, data):
    """One random step in a node's life."""
    steps = {
        STARTING: [STARTING, PREPARING, DEAD],
        PREPARING: [PREPARING, READY, DEAD],
        READY: [READY, LOST, DEAD],
        LOST: [LOST, READY, STUCK, DEAD],
        DRAINING: [DRAINING, DEAD],
    }
    phase = data.draw(st.sampled_from(steps.get(view.phase, [view.phase])))
    overdue = phase is DRAINING and view.leave_by_s > 0 and data.draw(st.booleans())
    return node(view.id, phase, view.held_tokens, leave_by_s=view.leave_by_s, overdue=overdue)


def _rests(view):
    """The same without accidents: starts succeed, sequences end, leases run out."""
    if view.phase in (STOPPING, DEAD):
        return None
    if view.phase is DRAINING:
        return node(view.id, DRAINING, 0, safe=True)
    return view if view.phase is STUCK else node(view.id, READY, view.held_tokens)


@given(DESIRED, VIEWS)
def test_a_node_that_nobody_reaches_is_stopped_only_while_another_one_serves(desired, nodes):
    actions = plan(desired, nodes)
    cut_off = {view.id for view in nodes if view.phase is UNREACHABLE}
    if cut_off & {action.node for action in actions if isinstance(action, Stop)}:
        assert any(view.phase is READY for view in do(actions, nodes))


@given(DESIRED, VIEWS)
def test_not_more_than_one_node_that_nobody_reaches_is_replaced_at_a_time(desired, nodes):
    """Should weight nodes be at fault, the next one will not be reached either."""
    cut_off = [view for view in nodes if view.phase is UNREACHABLE and not view.drained]
    waited_for = plan(desired, [replace(view, replaceable=False) for view in nodes])
    started = sum(action.count for action in plan(desired, nodes) if isinstance(action, Start))
    assert started - sum(a.count for a in waited_for if isinstance(a, Start)) <= min(len(cut_off), 1)


@pytest.mark.parametrize(
    "desired, nodes, actions",
    [
        pytest.param(
            1, [node("a", READY), node("g", UNREACHABLE, managed=False)], [], id="a ghost counts for nothing"
        ),
        pytest.param(
            2,
            [node("a", READY), node("g", UNREACHABLE, managed=False)],
            [Start(1)],
            id="nor for a missing one",
        ),
        pytest.param(1, [node("a", UNREACHABLE)], [], id="one of ours is waited for"),
        pytest.param(2, [node("a", READY), node("b", UNREACHABLE)], [], id="beside another, too"),
        pytest.param(
            1, [node("a", READY, 0), node("b", UNREACHABLE, 99)], [Stop("b")], id="of too many it goes first"
        ),
        pytest.param(
            2,
            [node("a", READY), node("b", UNREACHABLE, replaceable=True)],
            [Start(1)],
            id="after long, another one is started",
        ),
        pytest.param(
            2,
            [node("a", READY), node("b", UNREACHABLE, replaceable=True), node("c", PREPARING)],
            [Stop("b")],
            id="and it is stopped, as another serves",
        ),
        pytest.param(
            1, [node("a", UNREACHABLE, replaceable=True)], [Start(1)], id="the only one is replaced, too"
        ),
        pytest.param(
            1,
            [node("a", UNREACHABLE, replaceable=True), node("b", PREPARING)],
            [],
            id="but not stopped before the new one is reached",
        ),
        pytest.param(
            1,
            [node("a", UNREACHABLE, replaceable=True), node("b", READY)],
            [Stop("a")],
            id="and then it is",
        ),
        pytest.param(
            3,
            [node(name, UNREACHABLE, replaceable=True) for name in "abc"],
            [Start(1)],
            id="where none is reached, one try is made",
        ),
        pytest.param(
            3,
            [*(node(name, UNREACHABLE, replaceable=True) for name in "abc"), node("d", UNREACHABLE)],
            [],
            id="and not another one",
        ),
        pytest.param(
            1,
            [node("a", UNREACHABLE, drained=True), node("b", READY)],
            [Stop("a")],
            id="one that an operator drains goes",
        ),
        pytest.param(
            1,
            [node("g", DRAINING, 9, managed=False, reached=False)],
            [Start(1)],
            id="the drain of a ghost is not taken back",
        ),
    ],
)
def test_a_node_that_no_weight_node_reaches(desired, nodes, actions):
    assert plan(desired, nodes) == actions


def test_a_node_that_an_operator_drains_goes_and_another_comes():
    nodes = [NodeView("attention-1", Phase.READY, drained=True), NodeView("attention-2", Phase.READY)]
    assert plan(2, nodes) == [Start(1), Drain("attention-1")]


def test_a_drain_that_an_operator_asked_for_is_not_taken_back():
    nodes = [NodeView("attention-1", Phase.DRAINING, held_tokens=9, drained=True)]
    assert plan(1, nodes) == [Start(1)]


def test_a_lost_node_that_was_to_go_is_not_waited_for():
    assert plan(1, [NodeView("attention-1", Phase.LOST, drained=True)]) == [Start(1)]


def test_draining_one_of_too_many_starts_nothing():
    nodes = [NodeView("attention-1", Phase.READY, drained=True), NodeView("attention-2", Phase.READY)]
    assert plan(1, nodes) == [Drain("attention-1")]
