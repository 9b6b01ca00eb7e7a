"""flumectl against FakeAdmin: what it prints (golden files), where, and its exit codes.

`UPDATE_GOLDEN=1 pytest tests/controller/test_flumectl.py` rewrites the golden files.
"""

# ruff: noqa: F811 # fixtures are imported, and named again by whoever takes them

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import pytest
import yaml
from click.testing import CliRunner
from flume_common.etcd_binary import free_port
from flume_controller.flumectl import client, main

sys.path.insert(0, str(Path(__file__).parent))
import fake_admin
from flumectl_fixtures import fake, flumectl, matches_golden, process, server  # noqa: F401 # fixtures


@pytest.mark.parametrize("fmt", ["table", "wide", "json", "yaml"])
@pytest.mark.parametrize("kind", ["nodes", "routes", "requests"])
def test_get_prints_what_the_golden_file_says(flumectl, kind, fmt):
    result = flumectl("get", kind, "-o", fmt)
    assert (result.exit_code, result.stderr) == (0, "")
    assert matches_golden(f"get-{kind}.{fmt}.txt", result.stdout)


def test_json_rows_carry_the_promised_fields(flumectl):
    rows = json.loads(flumectl("get", "nodes", "-o", "json").stdout)
    for row in rows:
        assert {"id", "role", "state", "pid", "kv_capacity_tokens", "kv_used_tokens"} <= row.keys()
    (route,) = json.loads(flumectl("get", "routes", "-o", "json").stdout)
    assert route["ranges"] == [
        {"start": 0, "end": 128, "node": "attention-1"},
        {"start": 128, "end": None, "node": "attention-2"},
    ]
    assert {"sequence", "weight_node", "epoch"} <= route.keys()


@pytest.mark.parametrize("kind", ["nodes", "routes", "requests"])
def test_yaml_and_json_say_the_same(flumectl, kind):
    as_json = json.loads(flumectl("get", kind, "-o", "json").stdout)
    assert yaml.safe_load(flumectl("get", kind, "-o", "yaml").stdout) == as_json


def test_one_row_by_its_id_and_an_unknown_id_is_an_error(flumectl):
    assert [row["id"] for row in json.loads(flumectl("get", "node", "weight-1", "-o", "json").stdout)] == [
        "weight-1"
    ]
    result = flumectl("get", "nodes", "attention-9")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Error: no node 'attention-9': `flumectl get nodes` lists them\n"


def test_nothing_to_list_says_so_beside_the_output(flumectl, fake):
    fake.routes = []
    result = flumectl("get", "routes")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "No routes found.\n")
    assert flumectl("get", "routes", "-o", "json").stdout == "[]\n"


def test_watching_prints_one_json_document_per_line_and_only_what_changes(process, fake):
    child = process("get", "routes", "-o", "json", "-w")
    first = json.loads(child.stdout.readline())
    assert first["sequence"] == "chatcmpl-1"
    fake.routes[0].ranges[1].node = "attention-3"
    second = json.loads(child.stdout.readline())
    assert second["ranges"][1]["node"] == "attention-3"
    fake.routes = []
    assert json.loads(child.stdout.readline())["deleted"] is True
    child.send_signal(signal.SIGINT)
    assert child.wait(5) == 130


def test_watching_does_not_repeat_rows_that_only_grew_older(process, fake):
    child = process("get", "requests", "-o", "json", "-w")
    child.stdout.readline()
    for _ in range(3):
        time.sleep(0.4)
        fake.requests[0].age_s += 1
    fake.requests[0].completion_tokens += 1
    assert json.loads(child.stdout.readline())["completion_tokens"] == 121


@pytest.mark.parametrize("fmt", ["table", "json", "yaml"])
def test_status_prints_what_the_golden_file_says(flumectl, fmt):
    result = flumectl("status", "-o", fmt)
    assert result.exit_code == 0
    volatile = [(r"(last_transition_time_s\"?: )[\d.]+", r"\1TIME"), (r"\b1m\d+s", "1m15s")]
    assert matches_golden(f"status.{fmt}.txt", result.stdout, volatile)


def test_status_says_when_the_store_is_away_and_when_it_is_stale(flumectl, fake):
    fake.statuses = [fake_admin.status(generation=3, observed=2)]
    fake.statuses[0].store_connected = False
    text = flumectl("status").stdout
    assert "unreachable, last known state shown" in text and "has yet to act" in text


def test_scale_waits_with_progress_on_stderr_and_then_says_scaled(flumectl, fake):
    fake.statuses = [
        fake_admin.status(1, 1, generation=1),
        fake_admin.status(3, 1, preparing=2, generation=2),
        fake_admin.status(3, 2, preparing=1, generation=2),
        fake_admin.status(3, 3, generation=2),
    ]
    words = ("--replicas", "3", "--current-replicas", "1", "--deadline", "30s")
    result = flumectl("scale", "attention", *words)
    assert (result.exit_code, result.stdout) == (0, "attention scaled (1 -> 3)\n")
    assert result.stderr.splitlines() == [
        "1 of 1 ready", "1 of 3 ready, 2 preparing", "2 of 3 ready, 1 preparing", "3 of 3 ready"
    ]  # fmt: skip
    (scaled,) = fake.scaled
    assert (scaled.replicas, scaled.actor, scaled.deadline_s) == (3, "user", 30)


def test_scale_is_not_done_before_the_controller_has_acted_on_it(flumectl, fake):
    fake.statuses = [fake_admin.status(1, 1, generation=2, observed=1)]
    fake.hold_watch = True
    result = flumectl("scale", "attention", "--replicas", "1", "--timeout", "300ms")
    assert result.exit_code == 1


def test_scale_does_not_wait_for_draining_nodes_unless_asked(flumectl, fake):
    fake.statuses = [fake_admin.status(1, 1, draining=2, generation=2)]
    fake.hold_watch = True
    assert flumectl("scale", "attention", "--replicas", "1").exit_code == 0
    result = flumectl("scale", "attention", "--replicas", "1", "--wait-drained", "--timeout", "300ms")
    assert result.exit_code == 1 and "2 draining" in result.stderr


def test_scale_gives_up_after_the_timeout_with_the_present_state(flumectl, fake):
    crashed = fake_admin.condition("Degraded", "True", "NodeCrashed", "attention-2 exited with 1")
    fake.statuses = [fake_admin.status(2, 1, preparing=1, generation=2, degraded=crashed)]
    fake.hold_watch = True
    result = flumectl("scale", "attention", "--replicas", "2", "--timeout", "300ms")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1] == (
        "Error: timed out after 0.3 s: 1 of 2 ready, 1 preparing; NodeCrashed: attention-2 exited with 1; "
        "the controller goes on, see `flumectl status`"
    )


def test_scale_notices_that_somebody_else_has_scaled_meanwhile(flumectl, fake):
    fake.statuses = [fake_admin.status(5, 1, generation=3)]
    result = flumectl("scale", "attention", "--replicas", "2")
    assert result.exit_code == 1 and "superseded: the desired number is 5 now" in result.stderr


def test_scale_notices_a_watch_that_ends_too_early(flumectl, fake):
    fake.statuses = [fake_admin.status(2, 1, generation=2)]
    result = flumectl("scale", "attention", "--replicas", "2", "--timeout", "30s")
    assert result.exit_code == 1 and "ended the watch" in result.stderr


def test_scale_can_leave_without_waiting(flumectl, fake):
    fake.statuses = [fake_admin.status(1, 0, generation=2)]
    result = flumectl("scale", "attention", "--replicas", "2", "--timeout", "0")
    assert (result.exit_code, result.stderr) == (0, "")


def test_a_precondition_that_does_not_hold_is_one_line_and_exit_code_1(flumectl):
    result = flumectl("scale", "attention", "--replicas", "2", "--current-replicas", "5")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Error: expected 5 current replicas, not 1 (FAILED_PRECONDITION)\n"


@pytest.mark.parametrize(
    "words",
    [
        ["get", "pods"],
        ["get", "nodes", "-o", "xml"],
        ["scale", "attention"],
        ["scale", "attention", "--replicas", "-1"],
        ["scale", "attention", "--replicas", "1", "--timeout", "soon"],
        ["generate"],
        ["generate", "x", "--raw", "--system", "y"],
        ["frobnicate"],
        ["up", "--weight", "0"],
        ["wait", "--for=condition=Splendid"],
        ["wait", "--for=delete"],
        ["config", "set", "log_level"],
        ["config", "set"],
        ["config", "unset"],
        ["autoscale", "attention", "--min", "0"],
        ["describe", "pod", "x"],
        ["events", "--types", "Odd"],
        ["get", "nodes", "--name", "a/b"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2(flumectl, words):
    result = flumectl(*words)
    assert result.exit_code == 2 and "Error: " in result.stderr and result.stdout == ""


@pytest.mark.parametrize("words", [["get", "nodes"], ["status"], ["scale", "attention", "--replicas", "2"]])
def test_a_controller_that_is_not_there_is_one_line_with_a_remedy(flumectl, words, monkeypatch):
    monkeypatch.setattr(client, "REMOTE_PATIENCE_S", 0.1)
    address = f"127.0.0.1:{free_port()}"
    result = flumectl(*words, address=address)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        f"Error: cannot reach the controller at {address}: "
        "start a cluster with `flumectl up`, or give --server\n"
    )


def test_a_controller_that_comes_back_soon_is_waited_for(flumectl, monkeypatch):
    monkeypatch.setattr(client, "QUIET_S", 0.1)
    address = f"127.0.0.1:{free_port()}"
    comes = threading.Timer(0.7, lambda: servers.append(fake_admin.Serving(address)))
    servers = []
    comes.start()
    try:
        result = flumectl("get", "nodes", "-o", "json", address=address)
    finally:
        comes.join()
        servers[0].close()
    assert (result.exit_code, result.stderr) == (0, f"waiting for the controller at {address}\n")
    assert [row["id"] for row in json.loads(result.stdout)]


def test_requests_of_a_node_that_did_not_answer_are_unknown_and_not_none(flumectl, fake):
    fake.requests, fake.unanswered = [], ["weight-1"]
    result = flumectl("get", "requests")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Error: weight-1 did not answer in time: what runs there is unknown\n"
    assert "weight-1 did not answer in time" in flumectl("get", "requests", "chatcmpl-9").stderr
    assert "weight-1 did not answer in time" in flumectl("top", "requests", "--interval", "10ms").stderr


@pytest.mark.parametrize(
    "words",
    [
        ["scale", "attention", "--replicas", "4294967296"],
        ["scale", "attention", "--replicas", "1", "--current-replicas", "99999999999"],
        ["autoscale", "attention", "--max", "4294967296"],
        ["generate", "x", "--max-tokens", "4294967296"],
        ["generate", "x", "--seed", "9223372036854775808"],
    ],
    ids=" ".join,
)
def test_a_number_that_no_message_can_carry_is_wrong_usage(flumectl, words):
    result = flumectl(*words)
    assert result.exit_code == 2 and "is not in the range" in result.stderr


def test_without_a_server_the_local_cluster_is_looked_for(flumectl):
    result = flumectl("get", "nodes", address="")
    assert result.exit_code == 1
    assert "cluster 'default' is not running on this machine: start it with `flumectl up`" in result.stderr


def test_an_error_of_the_controller_is_shown_as_it_is(flumectl, fake):
    fake.refuse = (grpc.StatusCode.UNAVAILABLE, "etcd unavailable for Range: no leader")
    result = flumectl("get", "nodes")
    assert result.exit_code == 1
    assert result.stderr == "Error: etcd unavailable for Range: no leader (UNAVAILABLE)\n"


def test_generate_streams_the_answer(flumectl, fake):
    result = flumectl(
        "generate", "why?", "--system", "be brief", "--seed", "7", "--temperature", "0.5", "--max-tokens", "9"
    )
    assert (result.exit_code, result.stdout) == (0, "The sky is blue: Rayleigh.\n\n")
    (asked,) = fake.asked
    assert [(m.role, m.content) for m in asked.messages] == [("system", "be brief"), ("user", "why?")]
    sampling = asked.sampling
    assert (sampling.seed, sampling.temperature, sampling.max_tokens) == (7, 0.5, 9)


def test_generate_raw_sends_a_prompt_and_no_seed_unless_given(flumectl, fake):
    assert flumectl("generate", "--raw", "Once").exit_code == 0
    (asked,) = fake.asked
    assert (asked.prompt, len(asked.messages), asked.sampling.HasField("seed")) == ("Once", 0, False)


def test_an_answer_that_breaks_off_is_an_error(flumectl, fake):
    fake.finish = False
    result = flumectl("generate", "why?")
    assert result.exit_code == 1 and "ended without saying that it is finished" in result.stderr


def test_generate_without_a_router_says_what_to_look_at(flumectl, fake):
    fake.nodes = fake.nodes[:-1]
    result = flumectl("generate", "why?")
    assert result.exit_code == 1 and "no router is ready" in result.stderr


def test_ctrl_c_cancels_the_answer(process, fake):
    fake.finish = "never"
    child = process("generate", "why?")
    assert child.stdout.read(8) == "The sky "
    child.send_signal(signal.SIGINT)
    assert child.wait(5) == 130
    assert fake.cancelled.wait(5), "the router was not told"


def test_logs_prints_one_node_or_all_with_their_names(flumectl, tmp_path):
    logs = tmp_path / "default" / "logs"
    logs.mkdir(parents=True)
    (logs / "weight-1.log").write_text("one\ntwo\nthree\n")
    (logs / "router-1.log").write_text("four\n")
    assert flumectl("logs", "weight-1", "--tail", "2").stdout == "two\nthree\n"
    assert flumectl("logs", "--tail", "1").stdout == "[router-1] four\n[weight-1] three\n"
    assert flumectl("logs", "weight-1", "--tail", "0").stdout == ""
    result = flumectl("logs", "weight-2")
    assert result.exit_code == 1 and "there are: router-1, weight-1" in result.stderr


def test_logs_follows_what_comes(process, tmp_path):
    log = tmp_path / "default" / "logs" / "weight-1.log"
    log.parent.mkdir(parents=True)
    log.write_text("old\n")
    child = process("logs", "-f", "weight-1")
    assert child.stdout.readline() == "old\n"
    with log.open("a") as file:
        file.write("half")
        file.flush()
        time.sleep(0.5)
        file.write(" and whole\n")
    assert child.stdout.readline() == "half and whole\n"


def test_version_asks_the_controller_where_there_is_one(flumectl, fake):
    fake.nodes.append(fake_admin.pb.Node(id="controller-1", role="controller", version="9.9", state="READY"))
    assert flumectl("version").stdout.splitlines()[1] == "controller: 9.9"
    assert json.loads(flumectl("version", "--client", "-o", "json").stdout).keys() == {"client"}
    assert flumectl("version", address=f"127.0.0.1:{free_port()}").stdout.splitlines()[1] == (
        "controller: not reachable"
    )


def test_every_verb_has_help_with_examples():
    for name, command in main.commands.items():
        result = CliRunner().invoke(main, [name, "--help"])
        subcommands = getattr(command, "commands", None)
        assert result.exit_code == 0 and ("Examples:" in result.stdout or subcommands), name
        for inner in subcommands or ():
            assert "Examples:" in CliRunner().invoke(main, [name, inner, "--help"]).stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell):
    result = CliRunner().invoke(main, ["completion", shell])
    assert result.exit_code == 0 and "_FLUMECTL_COMPLETE" in result.stdout


def test_a_scale_does_not_wait_for_what_it_does_not_use():
    code = "import sys, flume_controller.flumectl.scale as _; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()
    unused = {"structlog", "rich", "yaml", "flume_common.store", "flume_controller.local_cluster"}
    assert "grpc" in loaded and not unused & set(loaded)
