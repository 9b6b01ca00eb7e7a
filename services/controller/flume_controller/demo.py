"""`make demo`: a cluster on this machine, scaled 1 → 3 → 1 while it streams one answer.

Then the same request again, undisturbed: the text must be the same. Everything is real: the processes
are those of `flumectl up`, the answer comes over the OpenAI API, the picture from the admin API.
"""

from __future__ import annotations

import asyncio
import http.client
import itertools
import json
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from flume_common.etcd_binary import free_port
from flume_common.tasks import background
from flume_common.telemetry import configure_logging
from flume_protos.v1 import admin_pb2 as pb
from flume_protos.v1 import admin_pb2_grpc as rpc

from flume_controller.cluster_files import ClusterRecord
from flume_controller.demo_view import Scene, Screen, held_ranges
from flume_controller.foreground import REFUSALS
from flume_controller.local_cluster import ClusterConfig, local_cluster

PROMPT = "Tell me a bedtime story about a young fox who wants to count all the stars."
MAX_TOKENS = 360
PROMPT_TOKENS = 45  # about; only the length of the bars depends on it
SCALE_OUT_AT = 16  # tokens of the answer
SCALE_IN_AT = 250
SHARED_BY = 3
POLL_S = 0.12
CALL_S = 10.0
SCALED_S = 120.0


class DemoFailed(Exception):
    """The demo did not show what it says; one line."""


@dataclass(slots=True)
class Answer:
    """One streamed answer, as far as it has come. Filled by a thread, read by the others."""

    text: str = ""
    tokens: int = 0  # pieces that arrived; on the wire usually one token each
    first_s: float = 0.0  # monotonic
    last_s: float = 0.0
    longest_pause_s: float = 0.0
    finished: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, piece: str) -> None:
        now_s = time.monotonic()
        if self.tokens:
            self.longest_pause_s = max(self.longest_pause_s, now_s - self.last_s)
        else:
            self.first_s = now_s
        self.last_s = now_s
        self.tokens += 1
        self.text += piece

    @property
    def tokens_per_s(self) -> float:
        """After the first token, whose time is the prompt's."""
        elapsed_s = self.last_s - self.first_s
        return (self.tokens - 1) / elapsed_s if elapsed_s > 0 else 0.0


async def demo() -> None:
    """Raises DemoFailed, and what `local_cluster` raises."""
    print("KernelFlume: one model, its KV on as many attention nodes as you like, while it answers.\n")
    with tempfile.TemporaryDirectory(prefix="kernelflume-demo-") as folder:
        async with local_cluster(_config(Path(folder)), print) as cluster, _admin(cluster) as admin:
            print(f"\n  You: {PROMPT}\n")
            scaled = await _scaled_answer(cluster, admin)
            await _alone_again(admin)
            plain = await _plain_answer(cluster)
        _compare(scaled, plain)


def _config(folder: Path) -> ClusterConfig:
    return ClusterConfig(
        name="demo",
        data_dir=folder,
        http_port=free_port(),
        admin_port=free_port(),
        etcd_port=free_port(),
        # Sums in another order round differently; in float32 too little to ever choose another token.
        dtype="float32",
        kv_memory="256MiB",
        # Tails move sooner than they would in earnest, so that a short answer shows it.
        weight_args=("--tail-margin-tokens", "48"),
    )


@asynccontextmanager
async def _admin(cluster: ClusterRecord) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(cluster.admin_address) as channel:
        yield rpc.AdminStub(channel)  # type: ignore[no-untyped-call]


async def _scaled_answer(cluster: ClusterRecord, admin: Any) -> Answer:
    answer = Answer()
    scene = Scene("Which attention node holds which tokens", MAX_TOKENS + PROMPT_TOKENS)
    async with background(
        stream=_stream(cluster, answer),
        picture=_draw(admin, answer, scene),
        scaling=_scale(admin, answer, scene),
    ):
        await answer.finished.wait()
        await asyncio.sleep(2 * POLL_S)
    print(f"\n  scaled while it streamed: {_figures(answer)}")
    return answer


async def _plain_answer(cluster: ClusterRecord) -> Answer:
    answer = Answer()
    async with background(stream=_stream(cluster, answer)):
        await answer.finished.wait()
    print(f"  undisturbed, on one node: {_figures(answer)}")
    return answer


def _figures(answer: Answer) -> str:
    pause_ms = answer.longest_pause_s * 1000
    return f"{answer.tokens} tokens, {answer.tokens_per_s:.1f} tokens/s, longest pause {pause_ms:.0f} ms"


async def _scale(admin: Any, answer: Answer, scene: Scene) -> None:
    await _until(lambda: answer.tokens >= SCALE_OUT_AT)
    began_s = time.monotonic()
    scene.news = "flumectl scale attention --replicas 3"
    await admin.Scale(pb.ScaleRequest(replicas=SHARED_BY, actor="user"), timeout=CALL_S)
    await _settled(admin, SHARED_BY)
    scene.news = f"3 nodes ready after {time.monotonic() - began_s:.1f} s: new tokens spread, none moves"
    await _until(
        lambda: answer.tokens >= SCALE_IN_AT and len({item.node for item in scene.held}) == SHARED_BY
    )
    scene.news = "flumectl scale attention --replicas 1 (what is held stays until it ends)"
    await admin.Scale(pb.ScaleRequest(replicas=1, actor="user"), timeout=CALL_S)
    await asyncio.get_running_loop().create_future()


async def _alone_again(admin: Any) -> None:
    """Waits until one node is left."""
    await admin.Scale(pb.ScaleRequest(replicas=1, actor="user"), timeout=CALL_S)
    await _settled(admin, 1, drained=True)


async def _settled(admin: Any, replicas: int, *, drained: bool = False) -> None:
    async for status in admin.Status(pb.StatusRequest(watch=True), timeout=SCALED_S):
        acted = status.observed_generation >= status.generation
        if acted and status.ready == replicas and not (drained and status.draining):
            return


async def _until(predicate: Callable[[], bool]) -> None:
    while not predicate():  # noqa: ASYNC110  (looked at as often as it is drawn)
        await asyncio.sleep(POLL_S)


async def _draw(admin: Any, answer: Answer, scene: Scene) -> None:
    screen = Screen(sys.stdout)
    while True:
        await _look(admin, scene)
        scene.text, scene.tokens_per_s = answer.text, answer.tokens_per_s
        screen.show(scene)
        await asyncio.sleep(POLL_S)


async def _look(admin: Any, scene: Scene) -> None:
    """Bring `scene` up to date. A sequence that has ended is shown as it was last."""
    nodes, routes, requests = await asyncio.gather(
        admin.ListNodes(pb.ListNodesRequest(), timeout=CALL_S),
        admin.ListRoutes(pb.ListRoutesRequest(), timeout=CALL_S),
        admin.ListRequests(pb.ListRequestsRequest(), timeout=CALL_S),
    )
    scene.saw_nodes({node.id: node.state for node in nodes.nodes if node.role == "attention"})
    if routes.routes and requests.requests:
        request = requests.requests[0]
        scene.length = request.prompt_tokens + request.completion_tokens
        scene.held = held_ranges(routes.routes[0], scene.length)


async def _stream(cluster: ClusterRecord, answer: Answer) -> None:
    loop = asyncio.get_running_loop()
    await asyncio.to_thread(_chat, cluster, lambda piece: loop.call_soon_threadsafe(answer.add, piece))
    answer.finished.set()
    await loop.create_future()


def _chat(cluster: ClusterRecord, on_piece: Callable[[str], object]) -> None:
    """One streamed chat completion. Raises DemoFailed when it does not end as it should."""
    body = {
        "model": cluster.model_name,
        "messages": [{"role": "user", "content": PROMPT}],
        "temperature": 0,
        "repetition_penalty": 1.15,
        "max_tokens": MAX_TOKENS,
        "stream": True,
    }
    connection = http.client.HTTPConnection(cluster.http_url.removeprefix("http://"), timeout=SCALED_S)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise DemoFailed(f"the router answered {response.status}: {response.read().decode()}")
    for line in response:
        data = line.decode().removeprefix("data: ").strip()
        if data == "[DONE]":
            return
        if data:
            _deliver(json.loads(data), on_piece)
    raise DemoFailed("the stream broke off")


def _deliver(event: dict[str, Any], on_piece: Callable[[str], object]) -> None:
    if "error" in event:
        raise DemoFailed(f"the stream ended with an error: {event['error']['message']}")
    for choice in event["choices"]:
        if piece := choice["delta"].get("content"):
            on_piece(piece)


def _compare(scaled: Answer, plain: Answer) -> None:
    """Raises DemoFailed when the texts differ."""
    if scaled.text != plain.text:
        pairs = zip(scaled.text, plain.text, strict=False)
        same = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
        ours, theirs = scaled.text[same : same + 40], plain.text[same : same + 40]
        raise DemoFailed(f"the texts differ after {same} characters: {ours!r} while scaled, {theirs!r} alone")
    print(f"  the two texts are equal: {len(scaled.text)} characters, byte for byte.\n")
    print("Yours: `flumectl up`, then `flumectl generate` and `flumectl scale attention --replicas 3`.")


async def _until_signalled() -> None:
    running = asyncio.current_task()
    assert running is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
    await demo()


def main() -> None:
    configure_logging("demo", "demo", "error")
    try:
        asyncio.run(_until_signalled())
    except (DemoFailed, *REFUSALS) as error:
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    except (KeyboardInterrupt, asyncio.CancelledError):
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
