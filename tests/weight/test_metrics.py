"""What a weight node's page says after what its engine said."""

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
from flume_common.failures import Failure
from flume_common.metrics import registry_of
from flume_weight import messages as m
from flume_weight.metrics import families
from flume_weight.supervisor import Supervisor
from metrics_lint import problems, values
from prometheus_client import generate_latest


async def accept(**_):
    pass


@pytest.fixture
def supervisor():
    args = Namespace(node="w1", model_name="m")
    made = Supervisor(args, SimpleNamespace(name="m", path=Path("m")), None, None)
    made._registration = SimpleNamespace(update=accept, epoch=1)
    made._routes = SimpleNamespace(pending=4, refused=5, taken_over=6, removed=9, end_all=lambda: None)
    return made


def shown(supervisor):
    text = generate_latest(registry_of(lambda: families(supervisor, supervisor._routes))).decode()
    assert problems(text) == []
    found = values(text)
    return {name.removeprefix("flume_"): value for name, value in found.items() if "flume_" in name}


def live(supervisor, **stages):
    """So many sequences at each stage."""
    names = [(f"{stage}-{at}", stage) for stage, count in stages.items() for at in range(count)]
    for name, _ in names:
        supervisor.sequences.submitted(m.Submit(name, [1, 2], m.SamplingParams()), 0.0)
    supervisor.sequences.reported([m.SequenceState(name, m.Stage[stage], 0) for name, stage in names])


async def test_a_page_says_what_the_engine_said_last(supervisor):
    await supervisor._hear(m.Capacity(capacity_tokens=900, running=3, waiting=2))
    live(supervisor, QUEUED=4, WAITING=2, PREFILLING=1, DECODING=1)
    await supervisor._hear(m.Failed("a", "INTERNAL", "NaN", Failure.MODEL_OUTPUT_INVALID))
    await supervisor._hear(m.Failed("b", "RESOURCE_EXHAUSTED", "too long"))
    await supervisor._hear(m.Recomputed(node_lost=10, preempted=20, weight_node_lost=30))
    await supervisor._hear(m.EpochRejected(messages=7))
    await supervisor._hear(m.LogitRowsRead(rows=8))
    assert shown(supervisor) == {
        'node_state{state="preparing"}': 1, 'node_state{state="ready"}': 0, 'node_state{state="draining"}': 0,
        "requests_running": 2, "requests_waiting": 6, 'requests{state="queued"}': 4,
        'requests{state="waiting"}': 2, 'requests{state="prefilling"}': 1, 'requests{state="decoding"}': 1,
        'requests{state="paused"}': 0, "engine_restarts_total": 0,
        'requests_failed_total{reason="model_output_invalid"}': 1,
        'requests_failed_total{reason="resource_exhausted"}': 1,
        "stray_routes_removed_total": 9, "kv_capacity_tokens": 900, "lanes": 0,
        'kv_recomputed_tokens_total{cause="node_lost"}': 10,
        'kv_recomputed_tokens_total{cause="preempted"}': 20,
        'kv_recomputed_tokens_total{cause="weight_node_lost"}': 30,
        'epoch_rejected_total{component="weight"}': 7, "logit_rows_read_total": 8,
        "routes_pending": 4, "route_writes_refused_total": 5, "routes_taken_over_total": 6,
    }  # fmt: skip


async def test_a_node_on_a_gpu_says_in_how_many_microbatches_steps_run_and_how_far_off_their_model_is(
    supervisor,
):
    await supervisor._hear(
        m.StepModel(2, comparisons=5, error_ratio=0.1, bias_ratio=-0.05, worst_error_ratio=1)
    )
    page = shown(supervisor)
    assert page["step_microbatches"] == 2 and page["step_model_comparisons_total"] == 5
    assert (page["step_model_error_ratio"], page["step_model_bias_ratio"]) == (0.1, -0.05)
    await supervisor._engine_gone(died=True)
    assert "step_microbatches" not in shown(supervisor)


async def test_without_an_engine_nothing_runs_and_its_counters_begin_again(supervisor):
    await supervisor._hear(m.Capacity(capacity_tokens=900, running=3, waiting=2))
    live(supervisor, QUEUED=1, DECODING=1)
    await supervisor._hear(m.Recomputed(node_lost=10))
    supervisor._attachments = SimpleNamespace(up=["a1", "a2"], close=lambda: None)
    assert shown(supervisor)["lanes"] == 2
    await supervisor._engine_gone(died=True)
    page = shown(supervisor)
    engine = ("requests_running", "requests_waiting", "kv_capacity_tokens", "lanes")
    assert [page[name] for name in engine] == [0, 0, 0, 0]
    assert page['kv_recomputed_tokens_total{cause="node_lost"}'] == 0
    assert page["engine_restarts_total"] == 1
