"""What controllers' pages say: real processes, and counts of the loop beside them."""

import socket
import subprocess
import sys
from types import SimpleNamespace

import httpx
import pytest
from flume_common.keys import Keys
from flume_common.membership import Member, Role
from flume_common.metrics import registry_of
from flume_controller.metrics import families, reconciles, replicas, workqueue
from flume_controller.reconcile import Reconciler, Result, TerminalError
from flume_controller.spec import AttentionSpec
from flume_protos.v1 import admin_pb2
from metrics_lint import problems, values
from prometheus_client import generate_latest


async def page_of(store, keys: Keys, node: str) -> str:
    """Found as Prometheus would: by what the member says."""
    member = Member.decode(await store.get(keys.member(Role.CONTROLLER, node)))
    return f"http://{member.metrics_address}"


def ask(url):
    answer = httpx.get(url, timeout=5)
    assert answer.status_code == 200
    return answer.text


def shown(page):
    text = ask(f"{page}/metrics")
    assert problems(text) == []
    return values(text)


def attention(page):
    found = shown(page)
    states = ("desired", "actual", "ready", "draining")
    return [found.get(f'flume_attention_replicas{{state="{state}"}}') for state in states]


async def test_the_numbers_of_nodes_follow_a_scale(controller, store, keys):
    controller.until_states(a1="READY")
    page = await page_of(store, keys, "controller-1")
    controller.until(lambda: attention(page) == [1, 1, 1, 0])
    controller.scale(2)
    controller.until(lambda: attention(page) == [2, 2, 2, 0])
    for node in controller.nodes():  # whichever goes has to stay a while
        controller.hold(node, 5)
    controller.scale(1)
    controller.until(lambda: attention(page) == [1, 2, 1, 1])
    found = shown(page)
    assert found["flume_store_connected"] == 1
    assert found['leader_election_master_status{name="controller"}'] == 1
    said = ask(f"{page}/readyz?verbose")
    assert said == "[+]started ok\nleading: true\nstore_connected: true"
    assert found['controller_runtime_reconcile_total{controller="attention",result="success"}'] > 0
    assert found['workqueue_adds_total{controller="attention",name="attention"}'] > 0
    listed = controller.stub.ListNodes(admin_pb2.ListNodesRequest(), timeout=5).nodes
    assert [f"http://{node.metrics_address}" for node in listed if node.role == "controller"] == [page]


def test_a_controller_that_does_not_lead_has_every_counter_at_0():
    views = SimpleNamespace(spec=None, status=None)
    for leading in (True, False):
        candidate = SimpleNamespace(leading=leading, epoch_rejected=4)
        found = series(*families(candidate, SimpleNamespace(reconciler=None), views, views))
        assert found['leader_election_master_status{name="controller"}'] == leading
        assert found['flume_epoch_rejected_total{component="controller"}'] == 4
        assert found['controller_runtime_reconcile_total{controller="attention",result="error"}'] == 0
        assert found['workqueue_adds_total{controller="attention",name="attention"}'] == 0


def test_an_address_that_is_taken_is_told_in_one_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        words = ("--etcd", "127.0.0.1:1", "--data-dir", str(tmp_path), "--metrics-listen", address)
        argv = [sys.executable, "-m", "flume_controller", *words]
        ended = subprocess.run(argv, capture_output=True, text=True, timeout=20, check=False)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == f"Error: cannot listen on {address}: Address already in use"


def series(*found):
    text = generate_latest(registry_of(lambda: found)).decode()
    assert problems(text) == []
    return values(text)


@pytest.mark.parametrize(
    "outcome, result, also",
    [
        (Result(), "success", ""),
        (Result(requeue_after_s=9), "requeue_after", ""),
        (TerminalError("no"), "error", "terminal_reconcile_errors_total"),
        (KeyError("bug"), "error", "reconcile_panics_total"),
        (TimeoutError(), "error", "reconcile_timeouts_total"),
    ],
)
async def test_passes_are_counted_under_the_names_of_controller_runtime(outcome, result, also):
    async def reconcile(_key):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    reconciler = Reconciler(reconcile, ("attention",))
    before = series(*reconciles(reconciler), *workqueue(reconciler.queue))
    assert not any(
        value for name, value in before.items() if name.endswith("_total") and "process" not in name
    )
    await reconciler.run_once("attention")
    after = series(*reconciles(reconciler))
    passes = "controller_runtime_reconcile_time_seconds"
    changed = {
        name.removeprefix("controller_runtime_").split("{")[0]
        for name, value in after.items()
        if value != before[name] and "process_" not in name and passes not in name
    }
    errors = {"reconcile_errors_total", also} if result == "error" else set()
    assert changed == {"reconcile_total", *errors}
    labels = f'{{controller="attention",result="{result}"}}'
    assert after[f"controller_runtime_reconcile_total{labels}"] == 1
    assert after[f'{passes}_count{{controller="attention"}}'] == 1


async def test_histograms_are_cumulative_and_bounds_belong_to_the_bucket_below():
    queue = Reconciler(None, ()).queue
    for seconds in (0.5, 1.0, 1.5, 5e4):
        queue.work_duration_seconds.add(seconds)
    found = series(*workqueue(queue))
    name = "workqueue_work_duration_seconds"
    buckets = {le: found[f'{name}_bucket{{controller="attention",le="{le}",name="attention"}}']
               for le in ("0.1", "1.0", "10.0", "1000.0", "+Inf")}  # fmt: skip
    assert buckets == {"0.1": 0, "1.0": 2, "10.0": 3, "1000.0": 3, "+Inf": 4}
    assert found[f'{name}_count{{controller="attention",name="attention"}}'] == 4
    assert found[f'{name}_sum{{controller="attention",name="attention"}}'] == 50003.0


def test_what_is_not_known_yet_is_left_out():
    (family,) = replicas(None, None)
    assert family.samples == []
    (family,) = replicas(AttentionSpec(desired=3), None)
    assert [(sample.labels, sample.value) for sample in family.samples] == [({"state": "desired"}, 3)]
