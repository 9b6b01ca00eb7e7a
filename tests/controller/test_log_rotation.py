import pytest
from flume_controller import log_rotation
from flume_controller.logfiles import LineReader
from flume_controller.processes import open_log


@pytest.fixture
def log(tmp_path):
    return tmp_path / "weight-1.log"


def written(log):
    return {path.name: path.read_text() for path in sorted(log.parent.iterdir())}


def test_a_log_that_is_written_goes_on_at_its_beginning(log):
    with open_log(log) as writer:
        for generation in range(4):
            writer.write(b"%d" % generation * 20 + b"\n")
            writer.flush()
            assert log_rotation.rotate_large([log], max_bytes=10) == [log]
        writer.write(b"last\n")
        writer.flush()
    assert written(log) == {
        "weight-1.log": "last\n", "weight-1.log.1": "3" * 20 + "\n", "weight-1.log.2": "2" * 20 + "\n",
    }  # fmt: skip


def test_small_ones_and_those_that_are_gone_are_left(log):
    log.write_text("short\n")
    assert log_rotation.rotate_large([log, log.with_name("gone.log")], max_bytes=10) == []
    assert written(log) == {"weight-1.log": "short\n"}


def test_without_room_for_the_old_one_it_is_dropped(log, monkeypatch):
    def full(source, target):
        target.write_text("half")
        raise OSError(28, "No space left on device")

    log.write_text("long enough\n")
    monkeypatch.setattr(log_rotation.shutil, "copyfile", full)
    assert log_rotation.rotate_large([log], max_bytes=10) == [log]
    assert written(log) == {"weight-1.log": ""}


def test_logs_of_last_time_become_old_ones(log):
    for text in ("first\n", "second\n", ""):
        log.write_text(text)
        log_rotation.begin_anew([log])
    assert written(log) == {"weight-1.log": "", "weight-1.log.1": "second\n", "weight-1.log.2": "first\n"}


def test_who_follows_a_log_reads_on_after_it_was_emptied(log):
    with open_log(log) as writer:
        reader = LineReader(log)
        writer.write(b"one\ntwo\n")
        writer.flush()
        assert reader.lines() == ["one", "two"]
        log_rotation.rotate(log)
        writer.write(b"x\n")
        writer.flush()
        assert reader.lines() == ["x"]


def test_logs_are_our_users_alone(log):
    with open_log(log):
        assert log.stat().st_mode & 0o077 == 0
