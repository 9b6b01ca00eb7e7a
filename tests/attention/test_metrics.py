"""What an attention node's page says, for reports of an engine that is played."""

import asyncio

import httpx
from flume_attention.messages import LaneReport, Report
from flume_attention.metrics import blocks, families
from flume_attention.supervisor import Supervisor
from flume_common.metrics_page import metrics_page
from metrics_lint import problems, values


def lane(name, *, granted, held, sequences=1, ranges=1):
    return LaneReport(
        weight_node=name, epoch=1, granted_blocks=granted, held_blocks=held, sequences=sequences,
        ranges=ranges, steps=9,
    )  # fmt: skip


REPORT = Report(
    capacity_tokens=1600, used_tokens=333, capacity_blocks=100, used_blocks=40, epoch_rejected=3,
    orphan_tokens=17, pulled_tokens=64, pulls_refused=2,
    lanes=[lane("w1", granted=30, held=20, sequences=2, ranges=5), lane("w2", granted=10, held=10)],
)  # fmt: skip


async def shown(supervisor):
    async with metrics_page("127.0.0.1:0", lambda: True) as page:
        page.show(lambda: families(supervisor), dict)
        text = (await asyncio.to_thread(httpx.get, f"http://{page.address}/metrics")).text
    assert problems(text) == []
    found = values(text)
    return {name.removeprefix("flume_"): value for name, value in found.items() if "flume_" in name}


async def test_a_page_says_what_the_newest_report_says():
    supervisor = Supervisor([])
    supervisor.report = REPORT
    page = await shown(supervisor)
    assert (
        page.items()
        >= {
            "kv_capacity_tokens": 1600,
            "kv_used_tokens": 333,
            "kv_cache_usage_ratio": 0.4,
            'kv_blocks{state="used"}': 40,
            'kv_blocks{state="granted"}': 10,
            'kv_blocks{state="free"}': 50,
            "kv_orphan_tokens": 17,
            "lanes": 2,
            "sequences_held": 3,
            "ranges_held": 6,
            "kv_pulled_tokens_total": 64,
            "kv_pulls_refused_total": 2,
            'epoch_rejected_total{component="attention"}': 3,
        }.items()
    )


async def test_before_its_engine_is_up_a_node_prepares_and_every_counter_is_there_at_0():
    page = await shown(Supervisor([]))
    states = {name: value for name, value in page.items() if "node_state" in name}
    assert states == {
        'node_state{state="preparing"}': 1, 'node_state{state="ready"}': 0, 'node_state{state="draining"}': 0
    }  # fmt: skip
    assert {value for name, value in page.items() if "_total" in name} == {0}
    assert page["kv_cache_usage_ratio"] == 0


def test_blocks_of_all_states_are_all_blocks():
    assert sum(blocks(REPORT).values()) == REPORT.capacity_blocks
