"""A router as it really runs (etcd, gRPC, uvicorn), before a FakeWeight that says what a test wants."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import grpc
import httpx
import openai
import pytest
import pytest_asyncio
from flume_common.listening import bind
from flume_common.membership import Member, Role, State, register
from flume_common.model_source import resolve_model
from flume_common.serving import serve as grpc_serve
from flume_protos.v1 import common_pb2
from flume_protos.v1 import weight_pb2 as pb
from flume_protos.v1 import weight_pb2_grpc as rpc
from flume_router.config import parse
from flume_router.serve import serve
from flume_router.text_model import load_text_model

MODEL = "smollm2-135m"
CONTEXT_TOKENS = 512
Script = Callable[[pb.GenerateRequest, grpc.aio.ServicerContext], AsyncIterator[pb.GenerateReply]]


class FakeWeight(rpc.WeightServicer):
    """A weight node without a model: a real gRPC server whose answers are scripted."""

    def __init__(self, node: str, script: Script) -> None:
        self.node = node
        self.script = script
        self.requests: list[pb.GenerateRequest] = []
        self.metadata: list[dict[str, str]] = []
        self.cancelled_at: dict[str, float] = {}
        self.running = 0
        self.model = MODEL
        self.vocab_size = 49152
        self.not_yet = 0
        self.num_described = 0
        self.canary = (pb.CANARY_OK, "")
        """What a canary shows: verdict and reason, the status it ends with, or None for a node without."""
        self.num_canaries = 0
        self.silent = asyncio.Event()
        """Set: it answers no question."""
        self.quiet_s: float | None = None
        """Since its engine made progress, as its supervisor says; None: a version that says nothing of it."""

    async def Describe(self, request, context):
        self.num_described += 1
        if self.num_described <= self.not_yet:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "loading")
        return pb.DescribeReply(
            node=self.node, model=self.model, vocab_size=self.vocab_size, context_tokens=CONTEXT_TOKENS
        )

    async def Status(self, request, context):
        if self.quiet_s is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "unknown method")
        if self.silent.is_set():
            await asyncio.sleep(3600)
        return pb.WeightStatusReply(
            node=self.node, working=True, engine=common_pb2.EngineActivity(quiet_s=self.quiet_s)
        )

    async def ListSequences(self, request, context):
        if self.silent.is_set():
            await asyncio.sleep(3600)
        return pb.ListSequencesReply()

    async def Canary(self, request, context):
        self.num_canaries += 1
        if self.canary is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "of an older version")
        if isinstance(self.canary, grpc.StatusCode):
            await context.abort(self.canary, "its engine ended")
        verdict, reason = self.canary
        return pb.CanaryReply(node=self.node, verdict=verdict, reason=reason)

    async def Generate(self, request, context):
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.running += 1
        try:
            async for reply in self.script(request, context):
                yield reply
        except (asyncio.CancelledError, GeneratorExit):  # the second one when it was about to send
            self.cancelled_at[request.request_id] = time.monotonic()
            raise
        finally:
            self.running -= 1


def finish(request: pb.GenerateRequest, reason: int, completion_tokens: int) -> pb.GenerateReply:
    return pb.GenerateReply(
        finish=pb.Finish(
            reason=reason,
            prompt_tokens=len(request.prompt_token_ids),
            completion_tokens=completion_tokens,
        )
    )


def logprobs_of(token_id: int, num_top: int) -> pb.Logprobs:
    """Made up: the chosen token and its neighbours in the vocabulary."""
    entries = [pb.TokenLogprob(token_id=token_id + i, logprob=-0.5 - i) for i in range(num_top)]
    return pb.Logprobs(chosen=pb.TokenLogprob(token_id=token_id, logprob=-0.5), top=entries)


@pytest.fixture
def says(text_model):
    """A script: a text's tokens (or given ids) one by one, then STOP; LENGTH where max_tokens cuts it."""

    def make(said: str | Sequence[int], *, pause_s: float = 0.0) -> Script:
        ids = (
            text_model.tokenizer.encode_now(said, add_special_tokens=False) if isinstance(said, str) else said
        )

        async def script(request, context):
            limit = request.sampling.max_tokens or CONTEXT_TOKENS
            for token_id in ids[:limit]:
                reply = pb.GenerateReply(token_ids=[token_id])
                if request.sampling.has_logprobs:
                    reply.logprobs.append(logprobs_of(token_id, request.sampling.logprobs))
                yield reply
                await asyncio.sleep(pause_s)
            if limit < len(ids):
                yield finish(request, pb.LENGTH, limit)
            else:
                yield finish(request, pb.STOP, len(ids) + 1)

        return script

    return make


class Dying:
    """A script for any number of nodes: one answer, told on from where the request says it is.

    `lives`: after how many tokens of its own each attempt ends as `end` says; afterwards they last.
    """

    def __init__(self, ids: Sequence[int], lives: Sequence[int], end: Script | None) -> None:
        self.ids = list(ids)
        self.lives = list(lives)
        self.end = end

    async def __call__(self, request, context):
        had, limit = len(request.output_token_ids), request.sampling.max_tokens or CONTEXT_TOKENS
        assert list(request.output_token_ids) == self.ids[:had]
        life = self.lives.pop(0) if self.lives else None
        for token_id in self.ids[had : limit if life is None else had + life]:
            reply = pb.GenerateReply(token_ids=[token_id])
            if request.sampling.has_logprobs:
                reply.logprobs.append(logprobs_of(token_id, request.sampling.logprobs))
            yield reply
        if life is not None:
            async for reply in (self.end or _unavailable)(request, context):
                yield reply
        elif limit < len(self.ids):
            yield finish(request, pb.LENGTH, limit)
        else:
            yield finish(request, pb.STOP, len(self.ids) + 1)


async def _unavailable(request, context):
    await context.abort(grpc.StatusCode.UNAVAILABLE, "its engine ended")
    yield


@pytest.fixture
def asks_often(monkeypatch):
    """A quiet weight node is asked for a sign of life at once, not after a second."""
    monkeypatch.setattr("flume_router.weight_node._ASK_EVERY_S", 0.1)
    monkeypatch.setattr("flume_router.weight_node._ASK_DEADLINE_S", 0.3)


@pytest.fixture
def dies(text_model):
    """`Dying` over a text."""

    def make(said: str, *lives: int, end: Script | None = None) -> Dying:
        return Dying(text_model.tokenizer.encode_now(said, add_special_tokens=False), lives, end)

    return make


@pytest.fixture(scope="session")
def text_model():
    return load_text_model(resolve_model(MODEL))


@pytest.fixture(scope="session")
def gguf_reader():
    """The GGUF as the gguf package reads it, which takes it seconds."""
    import gguf

    return gguf.GGUFReader(resolve_model(MODEL).path)


@pytest.fixture(scope="session")
def reference(gguf_reader):
    """The same GGUF as transformers reads it, but for its pre-tokenizer, which is SmolLM's own here."""
    from published_tokenizers import digits_then_gpt2
    from transformers import AutoTokenizer

    path = resolve_model(MODEL).path
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gguf.GGUFReader", lambda _path: gguf_reader)
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    tokenizer.backend_tokenizer.pre_tokenizer = digits_then_gpt2()
    return tokenizer


class Router:
    def __init__(self, http: str, grpc_address: str, stop: asyncio.Event, running: asyncio.Task) -> None:
        self.http = http
        self.grpc_address = grpc_address
        self.stop = stop
        self.running = running

    @property
    def port(self) -> int:
        return int(self.http.rsplit(":", 1)[1])


@pytest.fixture
def start_router(etcd_endpoint, keys, store, text_model):
    """Runs a router of the test's own cluster; flags as on the command line."""

    @asynccontextmanager
    async def start(*flags: str, wait_ready: bool = True):
        here = f"--etcd {etcd_endpoint} --cluster {keys.cluster} --node router-a --listen-http 127.0.0.1:0"
        config = parse([*here.split(), "--model", MODEL, "--drain-s", "2", *flags])
        bound = bind(config.listen_http)
        serving, stop = asyncio.Event(), asyncio.Event()
        running = asyncio.create_task(
            serve(config, resolve_model(MODEL), text_model, bound, serving=serving, stop=stop)
        )
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        try:
            await asyncio.wait({running, asyncio.create_task(serving.wait())}, return_when="FIRST_COMPLETED")
            if running.done():
                running.result()
            member = Member.decode(await store.get(keys.member(Role.ROUTER, "router-a")))
            if wait_ready:
                await until_ready(url, 200)
            yield Router(url, member.address, stop, running)
        finally:
            stop.set()
            await running

    return start


async def poll(condition: Callable[[], Awaitable[bool]], within_s: float = 10.0) -> None:
    async with asyncio.timeout(within_s):
        while not await condition():  # noqa: ASYNC110 - what is watched is another process or a library
            await asyncio.sleep(0.01)


async def until_ready(url: str, status: int) -> None:
    async with httpx.AsyncClient() as client:

        async def is_so() -> bool:
            return (await client.get(f"{url}/readyz")).status_code == status

        await poll(is_so)


@pytest.fixture
def until():
    """Waits until an async condition holds."""
    return poll


@pytest.fixture
def readiness():
    """Waits until a router's /readyz has a status."""

    async def wait(router: Router, status: int) -> None:
        await until_ready(router.http, status)

    return wait


@pytest.fixture
def start_weight(store, keys):
    """A FakeWeight that is a member of the test's cluster."""

    @asynccontextmanager
    async def start(node: str, script: Script, *, ttl_s: float = 5.0, **attributes):
        fake = FakeWeight(node, script)
        for name, value in attributes.items():
            setattr(fake, name, value)
        async with grpc_serve(
            "127.0.0.1:0", lambda server: rpc.add_WeightServicer_to_server(fake, server), [], grace_s=0
        ) as server:
            member = Member(
                id=node,
                role=Role.WEIGHT,
                state=State.READY,
                address=server.address,
                host="here",
                pid=os.getpid(),
                version="0",
                protocol_version=1,
                started_at_s=time.time(),
                model=MODEL,
                context_tokens=CONTEXT_TOKENS,
            )
            async with register(store, keys, member, ttl_s=ttl_s) as registration:
                fake.registration = registration
                fake.server = server
                yield fake

    return start


@pytest_asyncio.fixture
async def weight(start_weight, says):
    async with start_weight("weight-a", says("Hello there, wörld 🙂! The end.")) as fake:
        yield fake


@pytest_asyncio.fixture
async def router(weight, start_router):
    async with start_router() as running:
        yield running


@pytest_asyncio.fixture
async def http(router):
    async with httpx.AsyncClient(base_url=router.http, timeout=10) as client:
        yield client


@pytest_asyncio.fixture
async def client(router):
    async with openai.AsyncOpenAI(
        base_url=f"{router.http}/v1", api_key="none", max_retries=0, timeout=10
    ) as opened:
        yield opened


@pytest.fixture
def eventually():
    """Waits until a condition holds; returns how long that took, in seconds."""

    async def wait(condition: Callable[[], bool], within_s: float = 2.0) -> float:
        began = time.monotonic()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while not condition():  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
        assert condition()
        return time.monotonic() - began

    return wait


@pytest.fixture
def sequence_finish():
    return finish


@pytest.fixture(scope="session")
def spellable(text_model):
    """Whether a vocabulary has every byte of a text: SmolLM2's lacks some that no alphabet uses."""
    known = {text_model.tokenizer.token_bytes(i) for i in range(49152)}
    return lambda text: all(bytes([byte]) in known for byte in text.encode())
