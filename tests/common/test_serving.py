"""A real gRPC server: its health, its end, its signals."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from contextlib import AsyncExitStack, asynccontextmanager

import grpc
import pytest
from flume_common.serving import CannotListen, channel, serve, status_errors
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

NAME = "test.Slow"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Odd(Exception):
    pass


class Odder(Odd):
    pass


def add_slow(server):
    """Sleeps for as many milliseconds as the request has bytes; `x…` raises."""

    async def call(request: bytes, context) -> bytes:
        async with status_errors(
            context, {Odder: grpc.StatusCode.NOT_FOUND, Odd: grpc.StatusCode.FAILED_PRECONDITION}
        ):
            if request.startswith(b"odder"):
                raise Odder("the odder one")
            if request.startswith(b"odd"):
                raise Odd("the odd one")
            if request.startswith(b"bug"):
                raise KeyError("bug")
            await asyncio.sleep(len(request) / 1000)
        return b"done"

    handler = grpc.unary_unary_rpc_method_handler(call)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(NAME, {"Call": handler}),))


async def call(opened, request=b"", timeout_s=5.0):
    return await opened.unary_unary(f"/{NAME}/Call")(request, timeout=timeout_s)


async def health(opened, name):
    stub = health_pb2_grpc.HealthStub(opened)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)).status


async def test_health_tells_readiness_under_every_name_and_liveness_apart():
    async with serve("127.0.0.1:0", add_slow, [NAME]) as server, channel(server.address) as opened:
        for name in ("", NAME, "readiness"):
            assert await health(opened, name) == NOT_SERVING
        assert await health(opened, "liveness") == SERVING
        server.set_ready(True)
        for name in ("", NAME, "readiness", "liveness"):
            assert await health(opened, name) == SERVING
        server.set_ready(False)
        assert await health(opened, NAME) == NOT_SERVING
        assert await health(opened, "liveness") == SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health(opened, "unknown")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_whoever_watches_health_is_told_at_once():
    async with serve("127.0.0.1:0", add_slow, [NAME]) as server, channel(server.address) as opened:
        stub = health_pb2_grpc.HealthStub(opened)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=NAME), timeout=10)
        assert (await watch.read()).status == NOT_SERVING
        server.set_ready(True)
        assert (await watch.read()).status == SERVING
        watch.cancel()


async def reflected(opened, version, **request):
    """The reply of `grpc.reflection.<version>`, whose messages are those of v1alpha."""
    ask = opened.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    return await ask(iter([reflection_pb2.ServerReflectionRequest(**request)]), timeout=5).read()


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_lists_and_describes_what_is_served(version):
    itself = f"grpc.reflection.{version}.ServerReflection"
    async with serve("127.0.0.1:0", add_slow, [NAME]) as server, channel(server.address) as opened:
        listing = await reflected(opened, version, list_services="")
        described = await reflected(opened, version, file_containing_symbol=itself)
    listed = {service.name for service in listing.list_services_response.service}
    assert {NAME, "grpc.health.v1.Health", itself} <= listed
    [file] = map(
        descriptor_pb2.FileDescriptorProto.FromString,
        described.file_descriptor_response.file_descriptor_proto,
    )
    assert file.package == f"grpc.reflection.{version}"
    assert file.service[0].method[0].input_type == f".grpc.reflection.{version}.ServerReflectionRequest"


async def test_a_taken_port_is_told_and_not_shared():
    async with serve("127.0.0.1:0", add_slow, [NAME]) as server:
        with pytest.raises(CannotListen, match=str(server.port)):
            async with serve(f"127.0.0.1:{server.port}", add_slow, [NAME]):
                pass


async def test_the_address_is_one_that_others_can_dial():
    async with serve("127.0.0.1:0", add_slow, [NAME]) as server:
        assert server.address == f"127.0.0.1:{server.port}"
    async with serve("0.0.0.0:0", add_slow, [NAME]) as server:
        assert not server.address.startswith("0.0.0.0")


@asynccontextmanager
async def serve_until_stopped(grace_s=5.0):
    """A server, a channel to it, and the function that ends the server's block."""
    stack = AsyncExitStack()
    server = await stack.enter_async_context(serve("127.0.0.1:0", add_slow, [NAME], grace_s=grace_s))
    async with channel(server.address) as opened:
        yield server, opened, stack.aclose


async def test_at_the_end_open_calls_finish_new_ones_are_refused_and_health_says_so_first():
    async with serve_until_stopped() as (server, opened, stop):
        server.set_ready(True)
        watch = health_pb2_grpc.HealthStub(opened).Watch(
            health_pb2.HealthCheckRequest(service=NAME), timeout=10
        )
        assert (await watch.read()).status == SERVING
        slow = asyncio.create_task(call(opened, b"." * 400))
        await asyncio.sleep(0.1)
        stopping = asyncio.create_task(stop())
        assert (await watch.read()).status == NOT_SERVING
        assert not slow.done()
        await asyncio.sleep(0.1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(opened, timeout_s=1)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert await slow == b"done"
        started_s = time.monotonic()
        await stopping
        # A health watch is no work: it must not hold up the end for the whole grace.
        assert time.monotonic() - started_s < 1


async def test_calls_longer_than_the_grace_are_cut():
    async with serve_until_stopped(grace_s=0.2) as (_, opened, stop):
        slow = asyncio.create_task(call(opened, b"." * 4000))
        await asyncio.sleep(0.1)
        started_s = time.monotonic()
        await stop()
        assert time.monotonic() - started_s < 2
        with pytest.raises(grpc.aio.AioRpcError):
            await slow


@pytest.mark.parametrize(
    "request_, code, words",
    [
        (b"odd", grpc.StatusCode.FAILED_PRECONDITION, "the odd one"),
        (b"odder", grpc.StatusCode.NOT_FOUND, "the odder one"),
        (b"bug", grpc.StatusCode.UNKNOWN, "bug"),
    ],
)
async def test_errors_become_the_status_they_are_mapped_to(request_, code, words):
    async with serve("127.0.0.1:0", add_slow, [NAME]) as server, channel(server.address) as opened:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(opened, request_)
    assert caught.value.code() is code
    assert words in caught.value.details()


SIGNALLED = """
import asyncio
from flume_common.serving import until_signalled

async def main():
    asyncio.get_running_loop().call_soon(lambda: print("ready", flush=True))
    await until_signalled()
    print("stopping", flush=True)
    await asyncio.sleep(%s)
    print("stopped", flush=True)

asyncio.run(main())
"""


def signalled(stop_takes_s):
    child = subprocess.Popen(
        [sys.executable, "-c", SIGNALLED % stop_takes_s], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "ready\n"
    return child


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_starts_an_orderly_end(number):
    child = signalled(0.05)
    os.kill(child.pid, number)
    out, _ = child.communicate(timeout=10)
    assert out == "stopping\nstopped\n"
    assert child.returncode == 0


def test_a_second_signal_ends_the_process_now():
    child = signalled(30)
    os.kill(child.pid, signal.SIGTERM)
    assert child.stdout.readline() == "stopping\n"
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait(timeout=10) == 128 + signal.SIGTERM
