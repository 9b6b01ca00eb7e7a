"""Load: how much a cluster takes, and what clients notice when it is scaled all the time at 70 % of that."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count, cycle, pairwise

import grpc
from clusters import Cluster
from flume_protos.v1 import admin_pb2, admin_pb2_grpc, router_pb2, router_pb2_grpc, weight_pb2
from rounds import ATTENTION, World

PROMPTS = (
    "1. apples\n2. pears\n3.",
    "Question: what is a lighthouse for?\nAnswer:",
    "Once upon a time there was a clockmaker who " * 6,
    "The harbour town woke early. Fishermen mended nets, children counted gulls. " * 10,
)
TOKENS = 48
CLIENTS = 16
"""Enough that more of them give no more tokens."""
WARM_UP_S = 10.0
CAPACITY_S = 30.0
STEADY_S = 60.0
LOAD = 0.7
EVERY_S = 15.0
SIZES = (3, 1, 4, 2, 1, 2)
REQUEST_S = 120.0
CLEAN_S = 60.0
ALLOWED_RATIO = 2.0
"""p99 ITL while scaling over that of a steady cluster."""


@dataclass
class Served:
    """What clients saw."""

    requests: int = 0
    failures: list[str] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)  # between the tokens of an answer
    first_s: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        gaps = " ".join(f"p{p} {1e3 * percentile(self.gaps_s, p):.0f}" for p in (50, 99, 99.9))
        return (
            f"{self.requests} requests, {len(self.failures)} failed, ITL {gaps} ms, "
            f"max {1e3 * max(self.gaps_s, default=0.0):.0f} ms, TTFT p99 {percentile(self.first_s, 99):.2f} s"
        )


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that so many are not above; NaN of none."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


class Client:
    def __init__(self, router: router_pb2_grpc.RouterStub, expected: dict[str, list[int]]) -> None:
        self._router = router
        self._expected = expected
        self.tokens = 0  # that came, of all requests

    async def ask(self, prompt: str, served: Served) -> None:
        """One answer, token by token, held against the right one."""
        served.requests += 1
        sampling = weight_pb2.Sampling(max_tokens=TOKENS, ignore_eos=True)
        request = router_pb2.GenerateTextRequest(prompt=prompt, sampling=sampling)
        began_s, at_s, tokens = time.monotonic(), [], []
        try:
            async for reply in self._router.Generate(request, timeout=REQUEST_S):
                at_s += [time.monotonic()] * len(reply.token_ids)
                tokens += reply.token_ids
                self.tokens += len(reply.token_ids)
        except grpc.aio.AioRpcError as error:
            served.failures.append(f"{error.code().name}: {error.details()}")
            return
        if tokens != self._expected.setdefault(prompt, tokens):
            served.failures.append(f"tokens differ: {prompt[:20]!r}")
        served.first_s += [at - began_s for at in at_s[:1]]
        served.gaps_s += [after - before for before, after in pairwise(at_s)]


async def at_rate(client: Client, rate: float, until: Callable[[], bool], rng: random.Random) -> Served:
    """Requests that arrive by chance, so many a second, whatever became of the earlier ones."""
    served = Served()
    prompts = cycle(PROMPTS)
    async with asyncio.TaskGroup() as tasks:
        due_s = time.monotonic()
        while not until():
            tasks.create_task(client.ask(next(prompts), served))
            due_s += rng.expovariate(rate)
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
    return served


async def capacity(client: Client) -> float:
    """Requests a second that the cluster answers to many clients who each ask one after the other."""
    served, prompts = Served(), cycle(PROMPTS)
    stop = asyncio.Event()

    async def keep_asking() -> None:
        while not stop.is_set():
            await client.ask(next(prompts), served)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(CLIENTS):
            tasks.create_task(keep_asking())
        await asyncio.sleep(WARM_UP_S)
        began_s, tokens = time.monotonic(), client.tokens
        await asyncio.sleep(CAPACITY_S)
        rate = (client.tokens - tokens) / TOKENS / (time.monotonic() - began_s)
        stop.set()
    assert not served.failures, served.failures[0]
    return rate


async def scale_for_ever(admin: admin_pb2_grpc.AdminStub, sizes: list[int]) -> None:
    """Every EVERY_S, without waiting for it to be done; the sizes asked for are added to `sizes`."""
    for number in count():
        size = SIZES[number % len(SIZES)]
        await admin.Scale(admin_pb2.ScaleRequest(replicas=size, actor="user"), timeout=10)
        sizes.append(size)
        await asyncio.sleep(EVERY_S)


def scaling(world: World, seconds: float, rng: random.Random) -> tuple[str, str]:
    """What went wrong, empty when nothing did, and the figures."""
    steady, scaled, note = asyncio.run(_scaling(world.cluster, seconds, rng))
    failures = [f"steady: {failure}" for failure in steady.failures] + scaled.failures
    ratio = percentile(scaled.gaps_s, 99) / percentile(steady.gaps_s, 99)
    if not ratio <= ALLOWED_RATIO:
        failures.append(f"p99 ITL is {ratio:.2f} times that of the steady cluster")
    world.cluster.scale(ATTENTION, "--wait-drained")
    failures += world.clean(ATTENTION, CLEAN_S)
    return "\n".join(failures[:20]), f"{note}; p99 ITL ratio {ratio:.2f}"


async def _scaling(cluster: Cluster, seconds: float, rng: random.Random) -> tuple[Served, Served, str]:
    async with _stubs(cluster) as (router, admin):
        client = Client(router, {})
        for prompt in PROMPTS:  # alone: what all others are held against
            await client.ask(prompt, Served())
        most = await capacity(client)
        rate = LOAD * most
        print(f"  at most {most:.2f} requests/s of {TOKENS} tokens; from here on {rate:.2f}", flush=True)
        steady = await at_rate(client, rate, _after(STEADY_S), rng)
        print(f"  steady: {steady}", flush=True)
        sizes: list[int] = []
        scaled = await _beside(scale_for_ever(admin, sizes), at_rate(client, rate, _after(seconds), rng))
        print(f"  scaled {len(sizes)} times: {scaled}", flush=True)
    return steady, scaled, f"{rate:.2f} requests/s; steady {steady}; scaled {len(sizes)} times {scaled}"


async def _beside(background: Awaitable[None], work: Awaitable[Served]) -> Served:
    """The result of `work`, while `background` runs. Raises what either does."""
    both = [asyncio.ensure_future(background), asyncio.ensure_future(work)]
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if both[0].done():
            both[0].result()
        return await both[1]
    finally:
        for task in both:
            task.cancel()


def _after(seconds: float) -> Callable[[], bool]:
    ends_s = time.monotonic() + seconds
    return lambda: time.monotonic() >= ends_s


@asynccontextmanager
async def _stubs(
    cluster: Cluster,
) -> AsyncIterator[tuple[router_pb2_grpc.RouterStub, admin_pb2_grpc.AdminStub]]:
    (node,) = cluster.nodes("router")
    async with (
        grpc.aio.insecure_channel(node.address) as router,
        grpc.aio.insecure_channel(f"127.0.0.1:{cluster.admin_port}") as admin,
    ):
        yield router_pb2_grpc.RouterStub(router), admin_pb2_grpc.AdminStub(admin)
