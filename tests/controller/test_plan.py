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
COUNTS = (STARTING, PREPARING, READY)


def node(id, phase, held=0, safe=False, managed=True):
    return NodeView(id, phase, held, safe, managed)


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
            0, [node("a", READY), node("b", READY, 2)], [Drain("a"), Drain("b")], id="scale to zero"
        ),
    ],
)
def test_plan(desired, nodes, actions):
    assert plan(desired, nodes) == actions


VIEWS = st.lists(
    st.builds(
        lambda phase, held, empty: (phase, 0 if empty else held, empty),
        st.sampled_from(list(Phase)),
        st.integers(0, 1000),
        st.booleans(),
    ),
    max_size=8,
).map(
    lambda items: [
        node(f"attention-{number}", phase, held, phase is DRAINING and empty)
        for number, (phase, held, empty) in enumerate(items, 1)
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
            case Drain(id):
                assert world[id].phase in (PREPARING, READY), "only what is registered can be drained"
                world[id] = node(id, DRAINING, world[id].held_tokens)
            case Undrain(id):
                assert world[id].phase is DRAINING
                world[id] = node(id, READY, world[id].held_tokens)
            case Stop(id):
                world[id] = node(id, STOPPING)
    return list(world.values())


@given(DESIRED, VIEWS)
def test_doing_what_the_plan_says_settles_it(desired, nodes):
    assert plan(desired, do(plan(desired, nodes), nodes)) == []


@given(DESIRED, VIEWS)
def test_as_many_stay_as_are_wanted_and_lost_ones_may_come_back(desired, nodes):
    after = do(plan(desired, nodes), nodes)
    staying = sum(view.phase in COUNTS for view in after)
    lost = sum(view.phase is LOST for view in after)
    assert min(desired, desired - lost) <= staying <= desired


@given(DESIRED, VIEWS)
def test_no_ready_node_leaves_while_too_few_would_remain(desired, nodes):
    ready = {view.id for view in nodes if view.phase is READY}
    leaving = {action.node for action in plan(desired, nodes) if isinstance(action, Drain)} & ready
    if leaving:
        assert len(ready - leaving) >= desired


@given(DESIRED, VIEWS)
def test_nothing_that_holds_work_is_stopped(desired, nodes):
    views = {view.id: view for view in nodes}
    for action in plan(desired, nodes):
        if isinstance(action, Stop):
            view = views[action.node]
            assert view.safe_to_delete or view.phase in (STARTING, STUCK)


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
    return node(view.id, phase, view.held_tokens)


def _rests(view):
    """The same without accidents: starts succeed, sequences end, leases run out."""
    if view.phase in (STOPPING, DEAD):
        return None
    if view.phase is DRAINING:
        return node(view.id, DRAINING, 0, safe=True)
    return view if view.phase is STUCK else node(view.id, READY, view.held_tokens)


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
