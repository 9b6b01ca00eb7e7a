"""Families and the page they are on; what the lint of pages finds."""

import asyncio
import contextlib
import socket
import threading
import time

import httpx
import pytest
from flume_common import metrics_page as module
from flume_common.membership import State
from flume_common.metrics import counter, epoch_rejected, gauge, node_state
from flume_common.metrics_page import MAX_REQUESTS, metrics_page
from flume_common.serving import CannotListen
from metrics_lint import problems, values

FREE = "127.0.0.1:0"


def get(page, path):
    return httpx.get(f"http://{page.address}{path}", timeout=5)


async def ask(page, path="/metrics"):
    return await asyncio.to_thread(get, page, path)


async def test_a_page_shows_what_is_true_when_it_is_asked():
    connected, held = True, {"a": 1, "b": 2}
    async with metrics_page(FREE, lambda: connected) as page:
        first = await ask(page)
        assert first.headers["content-type"].startswith("text/plain; version=")
        assert values(first.text)["flume_store_connected"] == 1
        page.show(lambda: [gauge("flume_things", "Things.", held, by="kind", side="left")], dict)
        connected, held["b"] = False, 7
        text = (await ask(page)).text
    assert problems(first.text) == problems(text) == []
    shown = values(text)
    assert shown["flume_store_connected"] == 0
    assert shown['flume_things{kind="b",side="left"}'] == 7
    assert shown["process_resident_memory_bytes"] > 1e6


async def test_a_service_is_ready_when_all_its_checks_hold_and_says_why_not():
    checks = {"engine": True, "not-draining": True}
    async with metrics_page(FREE, lambda: False) as page:
        starting = await ask(page, "/readyz")
        assert (starting.status_code, starting.text) == (503, "[-]started failed\nstore_connected: false")
        page.show(tuple, lambda: checks, lambda: {"leading": True})
        assert ((ready := await ask(page, "/readyz")).status_code, ready.text) == (200, "ok")
        said = (await ask(page, "/readyz?verbose")).text
        assert said == "[+]engine ok\n[+]not-draining ok\nleading: true\nstore_connected: false"
        checks["not-draining"] = False
        draining = await ask(page, "/readyz")
        assert draining.status_code == 503 and "[-]not-draining failed" in draining.text
        for path in ("/livez", "/healthz"):
            assert ((alive := await ask(page, path)).status_code, alive.text) == (200, "ok")


async def test_nothing_else_is_served():
    async with metrics_page(FREE, lambda: True) as page:
        for path in ("/", "/metrics/", "/debug", "/../etc/passwd"):
            assert (await ask(page, path)).status_code == 404, path
        posted = await asyncio.to_thread(httpx.post, f"http://{page.address}/metrics", content=b"x")
        assert posted.status_code == 501
        head = await asyncio.to_thread(httpx.head, f"http://{page.address}/livez")
        assert (head.status_code, head.headers["content-length"], head.text) == (200, "2", "")


async def test_a_busy_event_loop_does_not_hold_it_up():
    async with metrics_page(FREE, lambda: True) as page:
        answers = []
        threading.Thread(target=lambda: answers.append(get(page, "/livez").text), daemon=True).start()
        deadline_s = time.monotonic() + 5
        while not answers and time.monotonic() < deadline_s:
            time.sleep(0.01)  # noqa: ASYNC251 - this is what keeps the loop busy
        assert answers == ["ok"]


async def test_values_that_cannot_be_had_are_an_error_and_no_silence():
    def broken():
        raise KeyError("gone")

    async with metrics_page(FREE, lambda: True) as page:
        page.show(broken, dict)
        assert (await ask(page)).status_code == 500
        assert (await ask(page, "/livez")).status_code == 200


def connection(page):
    host, _, port = page.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=5)


async def test_those_who_ask_slowly_are_given_up_and_too_many_are_turned_away(monkeypatch):
    monkeypatch.setattr(module, "REQUEST_S", 0.5)
    async with metrics_page(FREE, lambda: True) as page:
        with contextlib.ExitStack() as stack:
            slow = [stack.enter_context(connection(page)) for _ in range(MAX_REQUESTS)]
            began_s = time.monotonic()
            with pytest.raises(httpx.HTTPError):
                await ask(page, "/livez")
            while time.monotonic() - began_s < 1.0:  # byte by byte gains no time
                for one in slow:
                    with contextlib.suppress(OSError):
                        one.send(b"G")
                await asyncio.sleep(0.1)
            assert (await ask(page, "/livez")).status_code == 200


async def test_its_end_is_at_once_and_leaves_no_thread():
    async with metrics_page(FREE, lambda: True) as page:
        waiting = connection(page)
        began_s = time.monotonic()
    assert time.monotonic() - began_s < 0.5
    with pytest.raises(OSError), connection(page):
        pass
    waiting.close()
    for thread in threading.enumerate():
        if thread.name == "metrics":
            thread.join(timeout=2)
            assert not thread.is_alive()


async def test_an_address_that_cannot_be_had_is_told():
    async with metrics_page(FREE, lambda: True) as page:
        with pytest.raises(CannotListen, match=page.address):
            async with metrics_page(page.address, lambda: True):
                pass
    with pytest.raises(CannotListen, match="nonsense"):
        async with metrics_page("nonsense", lambda: True):
            pass


async def test_the_address_is_one_that_others_can_dial():
    async with metrics_page("0.0.0.0:0", lambda: True) as page:
        assert not page.address.startswith("0.0.0.0")
    async with metrics_page("0.0.0.0:0", lambda: True, advertise_host="10.0.3.7") as page:
        assert page.address.startswith("10.0.3.7:") and not page.address.endswith(":0")


def samples(family):
    return {tuple(sample.labels.values()): sample.value for sample in family.samples}


def test_families_have_a_sample_for_every_value_of_their_label():
    assert samples(node_state(State.DRAINING)) == {("preparing",): 0, ("ready",): 0, ("draining",): 1}
    assert samples(epoch_rejected("weight", 3)) == {("weight",): 3}
    assert [sample.name for sample in counter("flume_x_total", "X.", 1).samples] == ["flume_x_total"]


GOOD = '# HELP flume_x_total X.\n# TYPE flume_x_total counter\nflume_x_total{cause="a"} 1\n'
BAD = {
    "no help": GOOD.replace("# HELP flume_x_total X.\n", ""),
    "an empty help": GOOD.replace(" X.\n", " \n"),
    "a counter without _total": GOOD.replace("_total", ""),
    "a gauge with _total": GOOD.replace("counter", "gauge"),
    "another prefix": GOOD.replace("flume_", "vllm_"),
    "a colon": GOOD.replace("flume_x", "flume:x"),
    "an upper-case name": GOOD.replace("flume_x", "flume_aB"),
    "milliseconds": GOOD.replace("flume_x", "flume_x_ms"),
    "percent": GOOD.replace("flume_x", "flume_percent"),
    "the type in the name": GOOD.replace("flume_x", "flume_counter_x"),
    "a suffix of histograms": GOOD.replace("flume_x_total counter", "flume_x_sum gauge"),
    "a series twice": GOOD + 'flume_x_total{cause="a"} 2\n',
    "a family twice": GOOD + GOOD.replace('"a"', '"b"'),
    "a sample of no family": GOOD + "flume_y 1\n",
    "a label in camel case": GOOD.replace("cause", "theCause"),
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_the_lint_finds(text):
    assert problems(GOOD) == []
    assert problems(text)
