"""The controller as a process, on real etcd, with fake attention nodes as real processes."""

import itertools
import os
import signal
import time

import grpc
import pytest
from flume_protos.v1 import admin_pb2 as pb
from grpc_health.v1 import health_pb2, health_pb2_grpc


def refusal(call):
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()


def test_it_starts_what_is_wanted_scales_up_and_scales_down(controller):
    controller.until_states(a1="READY")
    reply = controller.scale(3)
    assert (reply.previous, reply.replicas, reply.generation) == (1, 3, 2)
    controller.until_states(a1="READY", a2="READY", a3="READY")
    controller.hold("attention-2", 10)
    controller.scale(1)
    controller.until_states(a2="READY")
    assert controller.nodes()["attention-2"].kv_used_tokens == 10, "the one that held work stays"
    status = controller.until(lambda: (s := controller.status()).draining == 0 and s)
    assert (status.desired, status.ready, status.observed_generation) == (1, 1, 3)


def test_a_draining_node_stays_until_it_is_empty_and_then_goes(controller):
    controller.until_states(a1="READY")
    controller.hold("attention-1", 99)
    controller.scale(2)
    controller.until_states(a1="READY", a2="READY")
    controller.hold("attention-2", 5)
    controller.scale(1)
    controller.until_states(a1="READY", a2="DRAINING")
    time.sleep(0.8)  # longer than the controller's polls of draining nodes
    assert controller.states() == {"attention-1": "READY", "attention-2": "DRAINING"}
    assert controller.condition("Progressing").reason == "Draining"
    controller.hold("attention-2", 0)
    controller.until_states(a1="READY")


def test_scaling_up_again_takes_a_drain_back(controller):
    controller.scale(2)
    controller.until_states(a1="READY", a2="READY")
    pids = {id: node.pid for id, node in controller.nodes().items()}
    controller.hold("attention-1", 5)
    controller.hold("attention-2", 5)
    controller.scale(0)
    controller.until_states(a1="DRAINING", a2="DRAINING")
    controller.scale(2)
    controller.until_states(a1="READY", a2="READY")
    assert {id: node.pid for id, node in controller.nodes().items()} == pids


def test_a_node_that_is_killed_is_replaced_under_an_id_that_is_free(controller):
    controller.until_states(a1="READY")
    os.kill(controller.nodes()["attention-1"].pid, signal.SIGKILL)
    # Its lease has yet to run out, and no longer counts.
    controller.until(lambda: "attention-1" not in controller.states(), timeout_s=1.0)
    controller.until_states(a2="READY")
    controller.until(lambda: controller.condition("Degraded").status == "False")


def test_a_restarted_controller_adopts_its_nodes_and_disturbs_none(controller):
    controller.scale(2)
    controller.until_states(a1="READY", a2="READY")
    before = {id: (node.pid, node.epoch) for id, node in controller.nodes().items()}
    controller.end(signal.SIGKILL)
    controller.start()
    time.sleep(1.0)
    assert {id: (node.pid, node.epoch) for id, node in controller.nodes().items()} == before
    controller.scale(1)
    controller.until_states(a1="READY")


def test_a_node_that_died_while_no_controller_ran_is_replaced(controller):
    controller.until_states(a1="READY")
    pid = controller.nodes()["attention-1"].pid
    controller.end()
    os.kill(pid, signal.SIGKILL)
    controller.start()
    controller.until(
        lambda: (
            "READY" in controller.states().values()
            and pid not in {node.pid for node in controller.nodes().values()}
        )
    )


def test_a_controller_that_is_asked_to_end_leaves_its_nodes_running(controller):
    controller.until_states(a1="READY")
    pid = controller.nodes()["attention-1"].pid
    assert controller.end(signal.SIGTERM) == 0
    os.kill(pid, 0)


def test_nodes_that_crash_at_start_are_retried_more_and_more_slowly(controller):
    controller.until_states(a1="READY")
    (controller.state / "crash").touch()
    controller.scale(2)
    degraded = controller.until(lambda: (c := controller.condition("Degraded")).status == "True" and c)
    assert degraded.reason == "NodeCrashed"
    assert "exited with 1" in degraded.message and "attention-2.log" in degraded.message
    time.sleep(3.0)
    assert controller.log().count("node_started") <= 6
    (controller.state / "crash").unlink()
    controller.until_states(a1="READY", a2="READY")
    controller.until(lambda: controller.condition("Degraded").status == "False")


def test_a_replicas_number_out_of_bounds_is_refused(controller):
    code, details = refusal(lambda: controller.scale(65))
    assert (code, details) == (grpc.StatusCode.INVALID_ARGUMENT, "replicas must be 0 to 64, got 65")


def test_a_precondition_that_does_not_hold_is_refused(controller):
    controller.until_states(a1="READY")
    code, details = refusal(lambda: controller.scale(3, current_replicas=2))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert details == "expected 2 current replicas, the desired number is 1"


def test_an_actor_nobody_knows_is_refused(controller):
    code, details = refusal(lambda: controller.scale(3, actor="mallory"))
    assert code is grpc.StatusCode.INVALID_ARGUMENT and "mallory" in details


def test_a_watched_status_follows_a_scale_to_its_end(controller):
    controller.until_states(a1="READY")
    stream = controller.stub.Status(pb.StatusRequest(watch=True), timeout=15)
    generation = controller.scale(2).generation
    seen = []
    for status in stream:
        seen.append(status)
        if status.observed_generation >= generation and status.ready == status.desired:
            break
    stream.cancel()
    assert (seen[-1].desired, seen[-1].ready) == (2, 2)
    assert all(before != after for before, after in itertools.pairwise(seen)), "only changes are sent"


def test_health_says_serving_and_the_controller_lists_itself(controller):
    health = health_pb2_grpc.HealthStub(controller._channel)
    for service in ("", "flume.v1.Admin", "liveness", "readiness"):
        reply = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
    reply = controller.stub.ListNodes(pb.ListNodesRequest(), timeout=5)
    assert [node.id for node in reply.nodes if node.role == "controller"] == ["controller-1"]


async def test_routes_are_listed_as_the_weight_nodes_wrote_them(controller, store, keys):
    from flume_common.route_store import encode_route
    from flume_common.routes import Route

    route = Route.start("seq-a", "weight-1", 5, "attention-1").move_tail(40, "attention-2")
    await store.put(keys.route("seq-a"), encode_route(route))
    await store.put(keys.route("seq-b"), encode_route(Route.start("seq-b", "weight-1", 5, "attention-1")))
    reply = controller.stub.ListRoutes(pb.ListRoutesRequest(), timeout=5)
    assert [Route.from_proto(item).sequence for item in reply.routes] == ["seq-a", "seq-b"]
    reply = controller.stub.ListRoutes(pb.ListRoutesRequest(sequence="seq-a"), timeout=5)
    assert [Route.from_proto(item) for item in reply.routes] == [route]


async def test_a_spec_that_was_broken_by_hand_stops_nothing_and_is_picked_up_once_mended(
    controller, store, keys
):
    controller.until_states(a1="READY")
    await store.put(keys.spec_attention, b"two, please")
    drain = pb.DrainNodeRequest(node="attention-1")
    code, details = refusal(lambda: controller.stub.DrainNode(drain, timeout=5))
    assert code is grpc.StatusCode.FAILED_PRECONDITION and "not a valid spec" in details
    await store.put(keys.spec_attention, b'{"desired": 2, "generation": 9}')
    controller.until_states(a1="READY", a2="READY")
    assert controller.status().observed_generation == 9
