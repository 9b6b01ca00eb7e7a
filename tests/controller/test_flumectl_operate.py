"""flumectl's verbs for operating a cluster, against FakeAdmin. `UPDATE_GOLDEN=1` rewrites golden files."""

# ruff: noqa: F811 # fixtures are imported, and named again by whoever takes them

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
import yaml
from click.testing import CliRunner
from flume_common.etcd_binary import free_port
from flume_controller.cluster_files import ClusterFiles
from flume_controller.flumectl import main
from flume_controller.flumectl.top import node_rates, request_rates
from flume_controller.processes import record_of
from flume_protos.v1 import admin_pb2 as pb

sys.path.insert(0, str(Path(__file__).parent))
import fake_admin
from flumectl_fixtures import fake, flumectl, matches_golden, process, server  # noqa: F401 # fixtures

TIMES = [(r"((?:first_s|last_s|set_at_s|last_transition_time_s)\"?: )[\d.]+", r"\1TIME")]


def progressing(status, reason, message=""):
    return fake_admin.condition("Progressing", status, reason, message)


@pytest.mark.parametrize("fmt", ["table", "wide", "json", "yaml"])
@pytest.mark.parametrize("words", ["events", "config get", "config history step_timeout_s", "config diff"])
def test_lists_are_what_the_golden_files_say(flumectl, fake, words, fmt):
    fake.changes = [pb.SettingChange(name="weight/step_timeout_s", before="10", after="3")]
    result = flumectl(*words.split(), "-o", fmt)
    assert matches_golden(f"{words.replace(' ', '-')}.{fmt}.txt", result.stdout, TIMES)
    assert result.exit_code == (1 if words == "config diff" else 0)


@pytest.mark.parametrize("fmt", ["text", "json", "yaml"])
@pytest.mark.parametrize(
    "words", ["node attention-1", "node weight-1", "route chatcmpl-1", "request chatcmpl-1", "cluster"]
)
def test_descriptions_are_what_the_golden_files_say(flumectl, words, fmt):
    result = flumectl("describe", *words.split(), "-o", fmt)
    assert (result.exit_code, result.stderr) == (0, "")
    volatile = [*TIMES, (r"\b1m\d+s\b", "1m15s")]
    assert matches_golden(f"describe-{words.replace(' ', '-')}.{fmt}.txt", result.stdout, volatile)


@pytest.mark.parametrize("fmt", ["table", "json"])
@pytest.mark.parametrize("kind", ["nodes", "requests"])
def test_top_is_what_the_golden_file_says(flumectl, kind, fmt):
    result = flumectl("top", kind, "--interval", "10ms", "-o", fmt)
    assert result.exit_code == 0
    assert matches_golden(f"top-{kind}.{fmt}.txt", result.stdout)


def test_what_is_not_there_can_not_be_described(flumectl):
    result = flumectl("describe", "node", "attention-9")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Error: there is no node 'attention-9' (NOT_FOUND)\n"


def test_events_are_chosen_by_object_and_type(flumectl):
    rows = json.loads(flumectl("events", "--for", "attention-2", "-o", "json").stdout)
    assert [row["reason"] for row in rows] == ["NodeLost"]
    rows = json.loads(flumectl("events", "--types", "Normal", "-o", "json").stdout)
    assert [row["reason"] for row in rows] == ["ScalingUp", "NodeReady"]


def test_no_events_is_said_beside_the_output(flumectl, fake):
    fake.events = []
    result = flumectl("events")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "No events found.\n")


def test_watched_events_come_one_json_document_per_line_until_ctrl_c(process, fake):
    fake.hold_watch = True
    child = process("events", "-w", "-o", "json")
    assert [json.loads(child.stdout.readline())["reason"] for _ in range(3)] == [
        "ScalingUp", "NodeLost", "NodeReady"
    ]  # fmt: skip
    child.send_signal(signal.SIGINT)
    assert child.wait(5) == 130


def test_drain_waits_until_the_node_is_gone(flumectl, fake):
    result = flumectl("drain", "attention-1", "--deadline", "1m30s")
    assert (result.exit_code, result.stdout) == (0, "attention-1 drained\n")
    (call,) = fake.calls
    assert (call.node, call.dry_run, call.deadline_s) == ("attention-1", False, 90)


def test_drain_gives_up_waiting_but_not_draining(flumectl, fake):
    fake.drains_at_once = False
    result = flumectl("drain", "attention-1", "--timeout", "300ms")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1] == (
        "Error: timed out after 0.3 s: attention-1 is READY and holds 1234 tokens; it goes on draining"
    )


def test_drain_can_leave_without_waiting_and_says_when_it_was_so_already(flumectl, fake):
    fake.drains_at_once = False
    assert flumectl("drain", "attention-1", "--timeout", "0").stdout == "attention-1 drains\n"
    fake.drained = {"attention-1"}
    assert flumectl("drain", "attention-1", "--timeout", "0").stdout == "attention-1 drains already\n"


def test_undrain_says_whether_the_node_was_still_there(flumectl):
    assert flumectl("undrain", "attention-1").stdout == "attention-1 is no longer drained\n"
    result = flumectl("undrain", "attention-9")
    assert result.exit_code == 0 and "is gone already" in result.stdout


@pytest.mark.parametrize(
    "words",
    [
        "scale attention --replicas 3",
        "drain attention-1",
        "undrain attention-1",
        "autoscale attention --min 1 --max 3",
        "autoscale off",
        "config set log_level=debug",
        "config unset log_level",
    ],
)
def test_a_dry_run_tells_the_controller_so_and_says_so_itself(flumectl, fake, words):
    fake.hold_watch = True  # a wait for anything would not end
    fake.changes = [pb.SettingChange(name="cluster/log_level", after="debug")]
    result = flumectl(*words.split(), "--dry-run")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.endswith("(dry run)\n")
    (call,) = fake.scaled or fake.calls
    assert call.dry_run


def test_rollout_status_waits_until_nothing_is_under_way(flumectl, fake):
    fake.statuses = [
        fake_admin.status(2, 2, generation=2, observed=1),
        fake_admin.status(2, 1, preparing=1, generation=2),
        fake_admin.status(2, 2, draining=1, generation=2),
        fake_admin.status(2, 2, generation=2),
    ]
    result = flumectl("rollout", "status")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        "waiting: 2 of 2 ready",
        "waiting: 1 of 2 ready, 1 preparing",
        "waiting: 2 of 2 ready, 1 draining",
        "attention rolled out: 2 of 2 ready",
    ]


def test_rollout_status_fails_when_the_controller_gave_up(flumectl, fake):
    gave_up = progressing("False", "ProgressDeadlineExceeded", "5 were wanted, returned to 1")
    fake.statuses = [fake_admin.status(1, 1, generation=3, progressing=gave_up)]
    result = flumectl("rollout", "status")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        "Error: the change exceeded its progress deadline: 5 were wanted, returned to 1\n"
    )


def test_rollout_status_ends_after_the_timeout_and_can_look_just_once(flumectl, fake):
    fake.statuses = [fake_admin.status(2, 1, preparing=1, generation=2)]
    fake.hold_watch = True
    result = flumectl("rollout", "status", "--timeout", "300ms")
    assert result.exit_code == 1
    assert result.stderr == "Error: timed out after 0.3 s: 1 of 2 ready, 1 preparing\n"
    result = flumectl("rollout", "status", "--no-watch")
    assert (result.exit_code, result.stdout) == (0, "waiting: 1 of 2 ready, 1 preparing\n")


def test_wait_ends_once_the_condition_is_so_for_the_present_wish(flumectl, fake):
    fake.statuses = [
        fake_admin.status(1, 1, generation=2, observed=1, progressing=progressing("False", "AsDesired")),
        fake_admin.status(1, 1, generation=2, progressing=progressing("True", "Scaling")),
        fake_admin.status(1, 1, generation=2, progressing=progressing("False", "AsDesired")),
    ]
    result = flumectl("wait", "--for=condition=progressing=false")
    assert (result.exit_code, result.stdout) == (0, "attention: condition Progressing is False\n")
    assert flumectl("wait", "--for=condition=Available", "--timeout", "5s").exit_code == 0


def test_wait_does_not_take_a_stale_condition_for_the_present_one(flumectl, fake):
    fake.statuses = [fake_admin.status(1, 1, generation=2, observed=1)]
    fake.hold_watch = True
    assert flumectl("wait", "--for=condition=Available", "--timeout", "300ms").exit_code == 1


def test_wait_ends_after_the_timeout_with_what_is_so(flumectl, fake):
    fake.hold_watch = True
    result = flumectl("wait", "--for=condition=Degraded", "--timeout", "300ms")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: timed out waiting for Degraded=True: it is False (AsExpected")


def test_autoscale_sends_what_was_given_and_leaves_the_rest_as_it_is(flumectl, fake):
    result = flumectl("autoscale", "attention", "--max", "4", "--tpot-slo-ms", "80")
    assert result.stdout == "attention autoscaled between 1 and 4 nodes\n"
    assert flumectl("autoscale", "off").stdout == "attention no longer autoscaled\n"
    on, off = fake.calls
    assert (on.enabled, on.HasField("min"), on.max, on.tpot_slo_ms) == (True, False, 4, 80.0)
    assert (off.enabled, off.HasField("max"), off.HasField("tpot_slo_ms")) == (False, False, False)
    assert re.fullmatch(r"\S+@\S+", on.actor)


def test_an_invalid_setting_is_marked_and_explained_beside_the_output(flumectl):
    result = flumectl("config", "get", "tail_margin_tokens")
    assert "invalid" in result.stdout
    assert result.stderr == (
        "Warning: weight/tail_margin_tokens must be a whole number, got 'lots'; "
        "services keep the last good value\n"
    )


def test_config_set_sends_all_at_once_and_prints_what_changed(flumectl, fake, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("weight/step_timeout_s: 3\nrouter/log_level: null\n")
    fake.changes = [
        pb.SettingChange(name="cluster/log_level", after="debug"),
        pb.SettingChange(name="router/log_level", before="info"),
    ]
    result = flumectl("config", "set", "log_level=debug", "-f", str(file))
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "cluster/log_level: <not set> -> debug",
        "router/log_level: info -> <not set>",
    ]
    (call,) = fake.calls
    assert [(item.name, item.value if item.HasField("value") else None) for item in call.assignments] == [
        ("log_level", "debug"),
        ("weight/step_timeout_s", "3"),
        ("router/log_level", None),
    ]
    fake.changes = []
    assert flumectl("config", "set", "log_level=debug").stdout == "nothing to change\n"


def test_config_unset_sends_names_without_values(flumectl, fake):
    flumectl("config", "unset", "log_level", "weight/step_timeout_s")
    (call,) = fake.calls
    assert [(item.name, item.HasField("value")) for item in call.assignments] == [
        ("log_level", False), ("weight/step_timeout_s", False)
    ]  # fmt: skip


def test_a_file_that_is_no_mapping_is_wrong_usage(flumectl, tmp_path):
    file = tmp_path / "settings.yaml"
    for text in ("- a\n", "{", ""):
        file.write_text(text)
        assert flumectl("config", "set", "-f", str(file)).exit_code == 2


def test_config_diff_is_silent_and_0_where_nothing_differs(flumectl, fake):
    result = flumectl("config", "diff", "log_level=info")
    assert (result.exit_code, result.stdout) == (0, "")
    assert yaml.safe_load(flumectl("config", "diff", "-o", "yaml").stdout) == []


def test_a_refusal_is_one_line_and_exit_code_1(flumectl, fake):
    fake.refuse = (grpc.StatusCode.INVALID_ARGUMENT, "log_level must be one of debug, info")
    result = flumectl("config", "set", "log_level=loud")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Error: log_level must be one of debug, info (INVALID_ARGUMENT)\n"


def completions(line, server=None, shell="bash"):
    env = {
        "_FLUMECTL_COMPLETE": f"{shell}_complete",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split()) - 1),
        **({"FLUME_SERVER": server.address} if server else {}),
    }  # fmt: skip
    output = CliRunner(env=env).invoke(main, [], prog_name="flumectl").output
    return [item.partition(",")[2] for item in output.splitlines() if item]


def test_names_of_nodes_are_completed_from_the_cluster(server):
    assert completions("flumectl drain att", server) == ["attention-1", "attention-2"]
    assert completions("flumectl describe node w", server) == ["weight-1"]


def test_completion_is_quiet_where_there_is_no_cluster(tmp_path, monkeypatch):
    monkeypatch.setenv("FLUME_DATA_DIR", str(tmp_path))
    assert completions("flumectl drain att") == []


def test_names_of_settings_and_conditions_are_completed():
    assert completions("flumectl config get weight/step_ti") == ["weight/step_timeout_s"]
    assert completions("flumectl config get step_ti") == ["step_timeout_s"]
    assert completions("flumectl wait --for condition=A") == ["condition=Available"]


def test_rates_are_differences_over_time_and_unknown_for_what_is_new():
    before = {"a": pb.Node(id="a", kv_used_tokens=100, kv_capacity_tokens=1000)}
    now = {
        "a": pb.Node(id="a", kv_used_tokens=130, kv_capacity_tokens=1000),
        "b": pb.Node(id="b", kv_used_tokens=500, kv_capacity_tokens=1000),
    }
    rows = node_rates(before, now, 2.0)
    assert [(row["id"], row["kv_used_ratio"], row["tokens_per_s"]) for row in rows] == [
        ("b", 0.5, None),
        ("a", 0.13, 15.0),
    ]
    requests = request_rates(
        {"r": pb.Request(id="r", completion_tokens=10)},
        {"r": pb.Request(id="r", prompt_tokens=5, completion_tokens=30)}, 4.0,
    )  # fmt: skip
    assert [(row["tokens"], row["tokens_per_s"]) for row in requests] == [(35, 5.0)]


def test_down_says_what_it_would_stop_and_stops_nothing(flumectl, tmp_path):
    assert flumectl("down", "--dry-run").stdout == "cluster 'default' is not running (dry run)\n"
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        records = ClusterFiles(tmp_path, "default").records
        records.save(record_of(child.pid, id="weight-1", role="weight"))
        result = flumectl("down", "--dry-run")
        assert result.stdout == "cluster 'default' would be stopped: weight-1 (dry run)\n"
        assert child.poll() is None and records.load("weight-1")
        child.kill()


def test_up_says_what_it_would_run_after_all_checks_and_runs_nothing(flumectl, tmp_path):
    ports = {flag: str(free_port()) for flag in ("--http-port", "--admin-port", "--etcd-port")}
    words = ["up", "--dry-run", "--weight", "2", *(word for item in ports.items() for word in item)]
    result = flumectl(*words)
    assert (result.exit_code, result.stdout) == (
        0,
        f"cluster 'default' would serve smollm2-135m with an etcd on 127.0.0.1:{ports['--etcd-port']}, "
        f"a controller on 127.0.0.1:{ports['--admin-port']}, 2 weight and 1 attention nodes, "
        f"a router on http://127.0.0.1:{ports['--http-port']} (dry run)\n",
    )
    assert not (tmp_path / "default").exists()
    assert flumectl(*words, "--model", "/nowhere").exit_code == 1


def test_scale_fails_when_the_controller_gave_up_on_it(flumectl, fake):
    gave_up = progressing("False", "ProgressDeadlineExceeded", "5 were wanted, returned to 1")
    fake.statuses = [fake_admin.status(1, 1, generation=3, progressing=gave_up)]
    result = flumectl("scale", "attention", "--replicas", "5")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "the controller gave up: 5 were wanted, returned to 1" in result.stderr
