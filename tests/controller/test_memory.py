from dataclasses import replace

from flume_controller.memory import Memory, StartBackoff
from flume_controller.providers.base import Instance

RUNNING = Instance("attention-1", pid=1, started_at_s=0)
CRASHED = replace(RUNNING, running=False, exit_code=1)


def test_the_first_crash_is_made_good_at_once_and_further_ones_wait_longer():
    backoff = StartBackoff(first_s=0.5, cap_s=3)
    waits = []
    for _ in range(6):
        backoff.crashed(now_s=100)
        waits.append(backoff.wait_s(100))
    assert waits == [0, 0.5, 1, 2, 3, 3]
    assert backoff.wait_s(101) == 2 and backoff.wait_s(104) == 0


def test_nodes_that_stay_ready_end_the_series():
    backoff = StartBackoff(stable_s=10)
    backoff.crashed(0)
    backoff.crashed(1)
    backoff.all_ready(10)
    assert backoff.crashes == 2
    backoff.all_ready(11)
    assert backoff.crashes == 0


def test_a_crash_is_counted_once_however_often_it_is_seen():
    memory = Memory()
    for now_s in range(3):
        memory.note_processes([CRASHED], now_s)
    assert memory.backoff.crashes == 1
    assert [crash.node for crash in memory.crashes] == ["attention-1"]


def test_a_process_that_was_told_to_end_did_not_crash():
    memory = Memory()
    memory.note_processes([replace(CRASHED, stopping=True)], 1)
    assert memory.crashes == []


def test_crashes_of_one_node_are_one_entry_with_a_count():
    memory = Memory()
    for pid in (1, 2, 3):
        memory.note_processes([replace(CRASHED, pid=pid)], pid)
    (crash,) = memory.crashes
    assert str(crash) == "attention-1 exited with 1, 3 times so far"


def test_a_crash_is_made_good_once_as_many_are_ready_as_are_wanted():
    memory = Memory()
    memory.note_processes([CRASHED], 1)
    memory.all_ready(2)
    memory.note_processes([CRASHED], 3)
    assert memory.crashes == [], "its record lingers, and is no news"


def test_a_node_that_was_there_at_the_first_pass_is_taken_for_a_registered_one():
    memory = Memory()
    memory.note_processes([RUNNING], 5)
    memory.note_processes([RUNNING, replace(RUNNING, id="attention-2")], 6)
    assert memory.last_seen_s == {"attention-1": 5}


def test_an_id_that_is_used_again_begins_anew():
    memory = Memory()
    memory.note_processes([RUNNING], 5)
    memory.forget("attention-1")
    assert memory.last_seen_s == {}
