"""Operating a real controller on real etcd, with fake attention nodes: by flumectl and by gRPC."""

import json
import time
import urllib.request

import grpc
import pytest
from click.testing import CliRunner
from flume_common.route_store import encode_route
from flume_common.routes import Route
from flume_controller.flumectl import main
from flume_protos.v1 import admin_pb2 as pb


@pytest.fixture
def flumectl(controller, tmp_path):
    """Run a command line against the controller; .exit_code, .stdout, .stderr."""

    def run(*words):
        env = {"FLUME_SERVER": controller.address, "FLUME_DATA_DIR": str(tmp_path), "FLUME_CLUSTER": ""}
        return CliRunner(env=env).invoke(main, list(words), prog_name="flumectl")

    return run


def refusal(call):
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()


async def test_a_bad_spec_is_said_and_a_scale_heals_it(controller, flumectl, store, keys):
    controller.until_states(a1="READY")
    before = await store.get(keys.spec_attention)
    for value in (b"{", b"{}", b'{"desired": -1}', b'{"desired": 1180591620717411303424}'):
        await store.put(keys.spec_attention, value)
        controller.until(lambda: controller.condition("Degraded").reason == "InvalidSpec")
        assert (controller.status().desired, controller.states()) == (1, {"attention-1": "READY"})
        assert flumectl("describe", "cluster").exit_code == 0
        refused = flumectl("drain", "attention-1")
        assert refused.exit_code == 1 and "flumectl scale attention --replicas N" in refused.stderr
        assert flumectl("scale", "attention", "--replicas", "1").exit_code == 0
        controller.until(lambda: controller.condition("Degraded").status == "False")
    assert (await store.get(keys.spec_attention)).create_revision == before.create_revision
    assert {"InvalidSpec", "ValidSpec"} <= set(flumectl("events").stdout.split())


async def test_a_status_that_somebody_overwrites_is_written_again(controller, store, keys):
    controller.until_states(a1="READY")
    controller.until(lambda: controller.status().ready == 1)
    good = json.loads((await store.get(keys.status_attention)).value)
    for bad in ({"desired": 2**70}, {"ready": -1}, {"conditions": 3}):
        await store.put(keys.status_attention, json.dumps({**good, **bad}).encode())
        controller.until(lambda: controller.status().ready == 1, timeout_s=3)


async def test_values_that_are_no_routes_are_left_out_and_named(controller, flumectl, store, keys):
    route = Route.start("seq-a", "weight-1", 3, "attention-1")
    await store.put(keys.route("seq-a"), encode_route(route))
    open_twice = {"start": 0, "end": None, "node": "attention-1"}
    bad = {
        "ghost": json.dumps(
            {"sequence": "ghost", "weight_node": "w", "epoch": 1, "ranges": [open_twice] * 2}
        ),
        "deep": "[" * 5000,
        "huge": json.dumps({"sequence": "h", "weight_node": "w", "epoch": 2**70, "ranges": [open_twice]}),
        "none": "null",
    }
    for name, value in bad.items():
        await store.put(keys.route(name), value.encode())
    listed = flumectl("get", "routes", "-o", "json")
    assert [item["sequence"] for item in json.loads(listed.stdout)] == ["seq-a"]
    warnings = listed.stderr.splitlines()
    assert len(warnings) == len(bad) and all(line.startswith("Warning: left out") for line in warnings)
    assert any("routes/ghost" in line and "exactly the last range is open" in line for line in warnings)
    for words in ("route seq-a", "node attention-1", "cluster"):
        assert flumectl("describe", *words.split()).exit_code == 0, words


def ready(controller):
    return {id for id, state in controller.states().items() if state == "READY"}


def test_a_drained_node_is_replaced_kept_until_it_is_empty_and_can_be_taken_back(controller, flumectl):
    controller.until_states(a1="READY")
    controller.hold("attention-1", 7)
    assert flumectl("drain", "attention-1", "--dry-run").stdout == "attention-1 would be drained (dry run)\n"
    assert controller.states() == {"attention-1": "READY"}
    assert flumectl("drain", "attention-1", "--timeout", "0").exit_code == 0
    controller.until_states(a1="DRAINING", a2="READY")
    status = controller.status()
    assert (status.desired, list(status.drained)) == (1, ["attention-1"])
    # Taken back, the one that holds something stays, and its replacement goes.
    assert flumectl("undrain", "attention-1").stdout == "attention-1 is no longer drained\n"
    controller.until_states(a1="READY")
    code, _ = refusal(lambda: controller.stub.UndrainNode(pb.DrainNodeRequest(node="attention-1"), timeout=5))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert flumectl("drain", "attention-1", "--timeout", "0").exit_code == 0
    controller.until(lambda: ready(controller) == {"attention-2"})
    controller.hold("attention-1", 0)
    result = flumectl("drain", "attention-1", "--timeout", "10s")
    assert (result.exit_code, result.stdout) == (0, "attention-1 drained\n")
    # Its name is not given to a new node while it is still to be drained.
    controller.scale(2)
    controller.until_states(a2="READY", a3="READY")
    assert "is gone already" in flumectl("undrain", "attention-1").stdout
    assert list(controller.status().drained) == []


def test_nodes_that_leave_with_a_deadline_are_gone_by_then_whatever_they_hold(controller, flumectl):
    controller.scale(3)
    controller.until_states(a1="READY", a2="READY", a3="READY")
    for number, tokens in ((1, 90), (2, 50), (3, 70)):
        controller.hold(f"attention-{number}", tokens)
    assert (
        flumectl("scale", "attention", "--replicas", "2", "--deadline", "1h", "--timeout", "0").exit_code == 0
    )
    controller.until_states(a1="READY", a2="DRAINING", a3="READY")
    (row,) = json.loads(flumectl("get", "nodes", "attention-2", "-o", "json").stdout)
    assert 3500 < row["leave_by_s"] - time.time() < 3600
    assert "in 59m" in flumectl("describe", "node", "attention-2").stdout
    assert "Leaving:       attention-2 in 59m" in flumectl("status").stdout
    # A drain of the same node with another deadline is about this node alone.
    began_s = time.monotonic()
    assert flumectl("drain", "attention-2", "--deadline", "1s", "--timeout", "10s").exit_code == 0
    assert 0.9 < time.monotonic() - began_s < 6
    assert controller.states() == {"attention-1": "READY", "attention-3": "READY"}
    controller.until(lambda: "DrainDeadlineExceeded" in flumectl("events", "--for", "attention-2").stdout)
    (event,) = json.loads(flumectl("events", "--types", "Warning", "-o", "json").stdout)
    assert "50 tokens" in event["message"] and event["reason"] == "DrainDeadlineExceeded"
    for request, call in (
        (pb.ScaleRequest(replicas=1, deadline_s=-1), controller.stub.Scale),
        (pb.DrainNodeRequest(node="attention-1", deadline_s=float("nan")), controller.stub.DrainNode),
    ):
        assert refusal(lambda request=request, call=call: call(request, timeout=5))[0] is (
            grpc.StatusCode.INVALID_ARGUMENT
        )


def test_a_node_that_is_not_there_can_not_be_drained(flumectl):
    for verb in ("drain", "undrain"):
        result = flumectl(verb, "attention-9")
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr == "Error: there is no attention node 'attention-9' (NOT_FOUND)\n"


def test_a_scale_is_followed_checked_without_doing_it_and_told_as_events(controller, flumectl):
    controller.until_states(a1="READY")
    assert flumectl("scale", "attention", "--replicas", "2", "--dry-run").stdout == (
        "attention scaled (1 -> 2) (dry run)\n"
    )
    assert "must be 0 to 64" in flumectl("scale", "attention", "--replicas", "65", "--dry-run").stderr
    assert controller.status().desired == 1
    assert flumectl("scale", "attention", "--replicas", "2", "--timeout", "0").exit_code == 0
    assert flumectl("rollout", "status", "--timeout", "15s").exit_code == 0
    assert controller.status().ready == 2
    assert flumectl("wait", "--for=condition=Progressing=False", "--timeout", "5s").exit_code == 0
    controller.until(lambda: "NodeReady" in flumectl("events", "--for", "attention-2").stdout)
    reasons = [row["reason"] for row in json.loads(flumectl("events", "-o", "json").stdout)]
    assert {"LeaderElected", "ScalingUp"} <= set(reasons)


def test_a_scale_with_a_revision_is_refused_once_the_spec_was_written_since(controller):
    controller.until_states(a1="READY")
    stream = controller.stub.WatchEvents(pb.ListEventsRequest(object="fleet/attention"), timeout=15)
    described = controller.stub.Describe(pb.DescribeObjectRequest(kind="cluster"), timeout=5)
    assert controller.scale(2, revision=described.spec_revision).replicas == 2
    code, details = refusal(lambda: controller.scale(3, revision=described.spec_revision))
    assert code is grpc.StatusCode.ABORTED and str(described.spec_revision) in details
    event = next(event for event in stream if event.message.startswith("from 1 to 2"))
    assert event.reason == "ScalingUp"
    stream.cancel()


def test_autoscaling_is_turned_on_pinned_by_a_scale_and_turned_off(controller, flumectl):
    controller.until_states(a1="READY")
    words = ("autoscale", "attention", "--min", "1", "--max", "3", "--tpot-slo-ms", "80")
    assert flumectl(*words, "--dry-run").exit_code == 0
    assert not controller.status().autoscale.enabled
    assert flumectl(*words).stdout == "attention autoscaled between 1 and 3 nodes\n"
    on = controller.until(lambda: (s := controller.status()).autoscale.enabled and s).autoscale
    assert (on.min, on.max, on.paused) == (1, 3, False)
    assert "80" in flumectl("config", "get", "tpot_slo_ms").stdout
    controller.scale(2)
    controller.until(lambda: controller.status().autoscale.paused)
    assert flumectl(*words).exit_code == 0
    controller.until(lambda: not controller.status().autoscale.paused)
    assert flumectl("autoscale", "off").exit_code == 0
    controller.until(lambda: not controller.status().autoscale.enabled)


def test_the_autoscaler_follows_a_setting_while_it_runs(controller, flumectl):
    controller.until_states(a1="READY")
    assert flumectl("autoscale", "attention").exit_code == 0
    assert flumectl("config", "set", "min_replicas=2").exit_code == 0
    controller.until_states(a1="READY", a2="READY")
    assert controller.status().set_by == "autoscaler"


def test_what_can_not_be_is_refused_by_its_status_and_changes_nothing(controller):
    for bounds in ({"min": 4, "max": 3}, {"min": 0}, {"max": 65}):
        request = pb.SetAutoscaleRequest(enabled=True, tpot_slo_ms=70, **bounds)
        code, details = refusal(lambda request=request: controller.stub.SetAutoscale(request, timeout=5))
        assert code is grpc.StatusCode.INVALID_ARGUMENT and "bounds must be" in details
    (slo,) = controller.stub.GetConfig(pb.GetConfigRequest(name="tpot_slo_ms"), timeout=5).settings
    assert not slo.HasField("value") and not controller.status().autoscale.enabled
    for name, value, status in (
        ("step_timeout_s", "soon", grpc.StatusCode.INVALID_ARGUMENT),
        ("microbatches", "3", grpc.StatusCode.INVALID_ARGUMENT),
        ("colour", "blue", grpc.StatusCode.NOT_FOUND),
    ):
        request = pb.SetConfigRequest(assignments=[pb.Assignment(name=name, value=value)])
        code, _ = refusal(lambda request=request: controller.stub.SetConfig(request, timeout=5))
        assert code is status
    code, _ = refusal(lambda: controller.stub.Describe(pb.DescribeObjectRequest(kind="pod"), timeout=5))
    assert code is grpc.StatusCode.INVALID_ARGUMENT


async def test_settings_are_set_shown_compared_and_remembered(controller, flumectl, store, keys):
    assert flumectl("config", "diff").exit_code == 0
    result = flumectl("config", "set", "cooldown_s=30", "log_level=debug")
    assert result.stdout.splitlines() == [
        "controller/cooldown_s: <not set> -> 30",
        "cluster/log_level: <not set> -> debug",
    ]
    result = flumectl("config", "diff", "cooldown_s=20")
    assert result.exit_code == 1 and "controller/cooldown_s   30       20" in result.stdout
    flumectl("config", "unset", "cooldown_s")
    records = json.loads(flumectl("config", "history", "cooldown_s", "-o", "json").stdout)
    assert [(record["previous"], record["value"]) for record in records] == [(None, "30"), ("30", None)]
    controller.until(lambda: '"log_level": "debug"' in controller.log(), timeout_s=5)
    # Written by hand, it is shown as wrong, and the controller keeps what it had.
    await store.put(keys.setting("cluster", "log_level"), b"loud")
    row = json.loads(flumectl("config", "get", "log_level", "-o", "json").stdout)[0]
    assert row["value"] == "loud" and "must be one of" in row["error"]
    controller.until(lambda: "setting_refused" in controller.log(), timeout_s=5)
    assert '"log_level": "info"' not in controller.log().partition("setting_refused")[2]


async def test_what_is_no_setting_is_shown_and_can_be_unset_and_nothing_else(
    controller, flumectl, store, keys
):
    for name in ("weight/step_timeout", "zzz/yyy"):
        await store.put(f"{keys.config}{name}", b"7")
    assert "weight/step_timeout" in flumectl("config", "get").stdout
    words = ("config", "unset", "weight/step_timeout", "zzz/yyy")
    assert flumectl(*words, "--dry-run").stdout.count("7 -> <not set> (dry run)") == 2
    assert flumectl(*words, "nonsense").exit_code == 1
    assert await store.get(f"{keys.config}zzz/yyy"), "all of it is checked before any is removed"
    assert flumectl(*words).stdout == ("weight/step_timeout: 7 -> <not set>\nzzz/yyy: 7 -> <not set>\n")
    assert not (await store.range(keys.config)).items
    result = flumectl("config", "unset", "zzz/yyy")
    assert result.exit_code == 1 and "zzz/yyy" in result.stderr


def test_prometheus_finds_every_process_and_forgets_those_that_went(controller):
    def found():
        address = next(node.metrics_address for node in all_nodes(controller) if node.role == "controller")
        with urllib.request.urlopen(f"http://{address}/sd", timeout=5) as answer:
            assert answer.headers["Content-Type"] == "application/json"
            groups = json.loads(answer.read())
        assert all(group["targets"] and group["labels"]["cluster"] for group in groups)
        return {group["labels"]["node"] for group in groups}

    controller.until(lambda: found() == {"controller-1", "attention-1"})
    controller.scale(2)
    controller.until(lambda: found() == {"controller-1", "attention-1", "attention-2"})
    controller.scale(1)
    controller.until(lambda: found() == {"controller-1", "attention-1"})


def all_nodes(controller):
    return controller.stub.ListNodes(pb.ListNodesRequest(), timeout=5).nodes


async def test_a_node_is_described_with_its_lanes_routes_and_events(controller, flumectl, store, keys):
    controller.until_states(a1="READY")
    controller.hold("attention-1", 5)
    await store.put(keys.route("seq-a"), encode_route(Route.start("seq-a", "weight-1", 5, "attention-1")))
    row = json.loads(flumectl("describe", "node", "attention-1", "-o", "json").stdout)
    assert [item["kv_used_tokens"] for item in row["nodes"]] == [5]
    assert [item["weight_node"] for item in row["lanes"]] == ["weight-1"]
    assert [item["sequence"] for item in row["routes"]] == ["seq-a"]
    route = json.loads(flumectl("describe", "route", "seq-a", "-o", "json").stdout)
    assert [item["id"] for item in route["nodes"]] == ["attention-1"]
    for words in (("node", "attention-9"), ("route", "seq-b"), ("request", "seq-b")):
        result = flumectl("describe", *words)
        assert result.exit_code == 1 and "NOT_FOUND" in result.stderr
