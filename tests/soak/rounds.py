"""One round of a fault: streams, the fault while they run, and what they gave."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import processes
from clusters import Cluster
from etcd_members import Etcds
from flume_protos.v1 import router_pb2_grpc
from hosts import Host
from leaks import Leaks
from report import Logs
from streams import RetryingStream, Running, Stream

MODEL = "smollm2-135m"
WEIGHTS = 2
ATTENTION = 2
FAR = "far-1"
TOKENS = 110
SHORT_TOKENS = 24

_HARBOUR = "The harbour town woke early. Fishermen mended nets, children counted gulls. "
# The long ones have more KV in one pass than UCX sends eagerly in one message: 128 KiB, 85 tokens.
PROMPTS = (
    _HARBOUR * 18,
    "Question: what is a lighthouse for?\nAnswer:",
    "1. apples\n2. pears\n3.",
    "Once upon a time there was a clockmaker who " * 16,
)
LATE = "In the square an old clockmaker argued with the baker about the price of bread. " * 12
SHORT = "A ferry is a boat that"

Client = Literal["grpc", "http"]
Key = tuple[Client, str, int]
Pieces = list[int] | list[str]


@dataclass
class World:
    """A cluster of two weight nodes with three etcds, and what undisturbed streams give."""

    cluster: Cluster
    etcds: Etcds
    expected: dict[Key, Pieces]
    there: Host | None = None
    """Where the attention node FAR runs, which the controller did not start, in place of one of its own."""
    leaks: Leaks = field(init=False)

    def __post_init__(self) -> None:
        self.leaks = Leaks(self.cluster, self.etcds, WEIGHTS)

    def learn(self, client: Client) -> None:
        """What each stream gives when nothing happens; alone, so that company counts as a disturbance."""
        router = self.cluster.router()
        for prompt, tokens in [*((prompt, TOKENS) for prompt in (*PROMPTS, LATE)), (SHORT, SHORT_TOKENS)]:
            if (client, prompt, tokens) not in self.expected:
                got = self.stream(client, router, prompt, tokens).result()
                self.expected[client, prompt, tokens] = joined(got) if client == "http" else got

    def stream(self, client: Client, router: router_pb2_grpc.RouterStub, prompt: str, tokens: int) -> Running:
        if client == "grpc":
            return Stream(router, prompt, tokens)
        return RetryingStream(self.cluster.url, MODEL, prompt, tokens)

    def clean(self, attention: int, timeout_s: float, **how: bool) -> list[str]:
        """What is left when nothing should be, once it has had time to go."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                left = self.leaks.found(attention, **how)
            except Exception as error:  # somebody does not answer yet
                left = [f"{type(error).__name__}: {error}"]
            if not left or time.monotonic() > deadline_s:
                return left
            time.sleep(0.2)


@dataclass
class Round:
    """What a fault sees of its round."""

    world: World
    number: int
    rng: random.Random
    client: Client
    streams: list[tuple[Key, Running]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    logs: Logs = field(init=False)
    _router: router_pb2_grpc.RouterStub | None = None

    def __post_init__(self) -> None:
        self.logs = Logs(self.cluster.data_dir)

    @property
    def cluster(self) -> Cluster:
        return self.world.cluster

    def begin(self) -> None:
        """The four streams that are running when the fault comes."""
        self._router = self.cluster.router()  # now: the controller may be what stops
        for prompt in PROMPTS:
            self.stream(prompt)
        for _, stream in self.streams:
            stream.wait_for(5)

    def late(self) -> None:
        """One that begins when the fault is there."""
        self.stream(LATE)

    def fresh(self) -> None:
        """A short one; ended when this returns."""
        self.stream(SHORT, SHORT_TOKENS)
        _, stream = self.streams[-1]
        stream.join()

    def stream(self, prompt: str, tokens: int = TOKENS) -> None:
        assert self._router is not None, "begin() comes first"
        stream = self.world.stream(self.client, self._router, prompt, tokens)
        self.streams.append(((self.client, prompt, tokens), stream))

    def wrong(self) -> list[str]:
        """What is wrong with the streams, once they have ended."""
        found = []
        for index, (key, stream) in enumerate(self.streams):
            try:
                got = stream.result()
            except Exception as error:
                found.append(f"{_named(index, stream)}: {type(error).__name__}: {error}")
                continue
            if key[0] == "http":
                got = joined(got)
            if got != self.world.expected[key]:
                found.append(f"{_named(index, stream)}: {difference(got, self.world.expected[key])}")
        return found

    @property
    def longest_gap_s(self) -> float:
        return max((stream.longest_gap_s for _, stream in self.streams), default=0.0)


@dataclass(frozen=True)
class Fault:
    name: str
    act: Callable[[Round], None]
    about: str
    check: Callable[[Round], list[str]] = lambda round: []
    """What else must hold once the streams have ended; what is wrong."""
    attention: int = ATTENTION
    """Nodes before and after it."""
    client: Client = "grpc"
    far: bool = False
    """One of these nodes runs on another host, see `World.there`."""


def joined(pieces: Pieces) -> list[str]:
    """Text as one piece: how it is cut is no promise."""
    return ["".join(map(str, pieces))]


def difference(got: Sequence[object], expected: Sequence[object]) -> str:
    """Where two answers part."""
    if got and isinstance(got[0], str):
        got, expected = str(got[0]), str(expected[0])
    at = next((i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), None)
    if at is None:
        return f"has {len(got)} of {len(expected)}"
    return f"differs from {at} on: got {got[at : at + 8]!r}, expected {expected[at : at + 8]!r}"


def _named(index: int, stream: Running) -> str:
    return (
        f"stream {index} ({stream.prompt[:24]!r}, request {stream.request_id}, {len(stream.pieces)} pieces, "
        f"{stream.attempts} attempts, longest gap {stream.longest_gap_s:.1f} s)"
    )


def group_of(pid: int) -> list[processes.Seen]:
    """A node's processes: its supervisor and its engine share a process group."""
    return [item for item in processes.everything() if item.group == pid]
