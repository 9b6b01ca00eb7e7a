import io
import json
import logging

import pytest
import structlog
from flume_common.telemetry import LEVELS, configure_logging, level, set_level, version


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def restored_logging():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers, root.level = handlers, level
    structlog.reset_defaults()


def lines_of(stream):
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_away_from_a_terminal_a_line_is_json_with_the_event_the_fields_and_who_says_it():
    out = io.StringIO()
    configure_logging("weight", "w0", stream=out)
    structlog.get_logger("x").info("route_moved", sequence="s1", revision=7)
    (line,) = lines_of(out)
    assert line["timestamp"].endswith("Z")
    del line["timestamp"]
    assert line == {
        "service": "weight",
        "node": "w0",
        "event": "route_moved",
        "level": "info",
        "sequence": "s1",
        "revision": 7,
    }


def test_on_a_terminal_it_is_for_people():
    out = Terminal()
    configure_logging("weight", "w0", stream=out)
    structlog.get_logger("x").info("route_moved", sequence="s1")
    assert "route_moved" in out.getvalue()
    with pytest.raises(json.JSONDecodeError):
        json.loads(out.getvalue())


def test_loggers_made_before_and_the_standard_librarys_come_out_the_same_way():
    out = io.StringIO()
    early = structlog.get_logger("early")
    configure_logging("router", "r0", stream=out)
    early.warning("late_word")
    logging.getLogger("uvicorn").warning("from %s", "uvicorn")
    first, second = lines_of(out)
    assert (first["event"], first["level"]) == ("late_word", "warning")
    assert (second["event"], second["level"], second["service"]) == ("from uvicorn", "warning", "router")


def test_an_error_carries_its_traceback():
    out = io.StringIO()
    configure_logging("weight", "w0", stream=out)
    try:
        raise KeyError("gone")
    except KeyError:
        structlog.get_logger("x").exception("step_failed")
    (line,) = lines_of(out)
    assert "KeyError: 'gone'" in line["exception"]


@pytest.mark.parametrize("level, shown", [("debug", 2), ("info", 1), ("error", 0)])
def test_the_level_decides_what_is_said(level, shown):
    out = io.StringIO()
    configure_logging("weight", "w0", level=level, stream=out)
    structlog.get_logger("x").debug("fine")
    structlog.get_logger("x").info("known")
    assert len(lines_of(out)) == shown


def test_an_unknown_level_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="debug, info"):
        configure_logging("weight", "w0", level="loud")


def test_fields_bound_for_a_request_are_on_each_of_its_lines():
    out = io.StringIO()
    configure_logging("router", "r0", stream=out)
    with structlog.contextvars.bound_contextvars(request_id="q1"):
        structlog.get_logger("x").info("inside")
    structlog.get_logger("x").info("outside")
    inside, outside = lines_of(out)
    assert inside["request_id"] == "q1"
    assert "request_id" not in outside


def test_the_version_is_the_distributions():
    assert version().count(".") >= 1


@pytest.mark.parametrize("name", LEVELS)
def test_the_level_can_be_changed_and_asked_for(name):
    set_level(name)
    assert (logging.getLogger().level, level()) == (getattr(logging, name.upper()), name)
    with pytest.raises(ValueError, match="loud"):
        set_level("loud")
