"""What the soak's own judgements say: a growing process is seen, and so is a wrong token."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "e2e"))
sys.path.insert(0, str(Path(__file__).parent))
from load import percentile
from memory import Memory
from processes import MIB, Seen, kind_of, node_of
from rounds import difference


def sampled(*series_mib: float) -> Memory:
    memory = Memory()
    for rss in series_mib:
        memory.sample([Seen(7, "router", "router router-1", 7, int(rss * MIB), 1.0)])
    return memory


def test_a_process_that_grows_by_more_than_the_limit_is_a_leak():
    (growth,) = sampled(*range(100, 120)).growths()
    assert growth.is_leak and growth.grown_bytes == 14 * MIB
    assert str(growth) == "router router-1: 102.5 -> 116.5 MiB over 20 rounds (limit +12)"


def test_a_process_that_wavers_is_not_a_leak_nor_one_that_was_large_from_the_start():
    (growth,) = sampled(*[100, 110, 90] * 5).growths()
    assert not growth.is_leak
    (growth,) = sampled(*range(1000, 1020)).growths()
    assert not growth.is_leak


def test_a_process_that_was_started_anew_is_judged_anew():
    memory = sampled(*[100] * 9)
    for _ in range(9):
        memory.sample([Seen(8, "router", "router router-1", 8, 300 * MIB, 2.0)])
    assert [len(growth.series) for growth in memory.growths()] == [9, 9]
    assert not any(growth.is_leak for growth in memory.growths())


def test_the_difference_of_two_answers_says_where_they_part():
    assert difference([1, 2, 3], [1, 2, 4]) == "differs from 2 on: got [3], expected [4]"
    assert difference([1, 2], [1, 2, 4]) == "has 2 of 3"
    assert difference(["ab"], ["ac"]) == "differs from 1 on: got 'b', expected 'c'"


def test_processes_are_known_by_their_command_lines():
    node = ["/bin/python", "-m", "flume_weight", "--cluster", "c", "--node", "weight-1"]
    engine = ["/bin/python", "-m", "flume_weight.engine_process", "--node=weight-1", "--model=m"]
    forked = ["/bin/python -m flume_attention --cluster c --node attention-2"]  # one word: a title
    etcd = ["/x/etcd", "--name", "etcd-1", "--data-dir", "/d"]
    assert [(kind_of(words), node_of(words)) for words in (node, engine, forked, etcd)] == [
        ("weight supervisor", "weight-1"),
        ("weight engine", "weight-1"),
        ("attention supervisor", "attention-2"),
        ("etcd", "etcd-1"),
    ]


def test_a_percentile_is_a_value_that_so_many_are_not_above():
    values = [float(n) for n in range(1, 101)]
    assert [percentile(values, p) for p in (50, 99, 99.9)] == [50.0, 99.0, 100.0]
    assert percentile([3.0], 99) == 3.0 and percentile([], 99) != percentile([], 99)
