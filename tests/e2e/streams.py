"""Greedy streams that run beside a test: by the router's gRPC, or by HTTP with a client that tries again."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import pairwise

import httpx
import openai
from flume_protos.v1 import router_pb2, router_pb2_grpc, weight_pb2


class Running(threading.Thread, ABC):
    """Begins at once; `pieces` grows as they come."""

    def __init__(self, prompt: str, tokens: int, timeout_s: float) -> None:
        super().__init__(daemon=True)
        self.prompt = prompt
        self.pieces: list[int] | list[str] = []
        self.times_s: list[float] = []
        self.request_id = ""
        self.attempts = 1
        self.error: Exception | None = None
        self._tokens = tokens
        self._timeout_s = timeout_s

    def run(self) -> None:
        try:
            for pieces in self._parts():
                self.pieces += pieces
                self.times_s += [time.monotonic()] * len(pieces)
        except Exception as error:
            self.error = error

    @abstractmethod
    def _parts(self) -> Iterator[list[int]] | Iterator[list[str]]:
        """What has come, each time something comes."""

    @property
    def longest_gap_s(self) -> float:
        return max((after - before for before, after in pairwise(self.times_s)), default=0.0)

    def wait_for(self, count: int) -> None:
        """Until this many pieces are there. Fails when the stream does, or after its timeout."""
        deadline_s = time.monotonic() + self._timeout_s
        while len(self.pieces) < count:
            assert self.error is None, self.error
            assert time.monotonic() < deadline_s, f"{len(self.pieces)} of {count}"
            time.sleep(0.01)

    def result(self) -> list[int] | list[str]:
        """All of it, once the stream has ended. Fails when it ended with an error, or not in time."""
        self.join(self._timeout_s)
        assert not self.is_alive(), f"still running after {self._timeout_s:g} s with {len(self.pieces)}"
        if self.error is not None:
            raise self.error
        return self.pieces


class Stream(Running):
    """Token ids."""

    def __init__(
        self, router: router_pb2_grpc.RouterStub, prompt: str, tokens: int, timeout_s: float = 180
    ) -> None:
        super().__init__(prompt, tokens, timeout_s)
        sampling = weight_pb2.Sampling(max_tokens=tokens, ignore_eos=True)
        request = router_pb2.GenerateTextRequest(prompt=prompt, sampling=sampling)
        self._replies = router.Generate(request, timeout=timeout_s)
        self.start()

    def _parts(self) -> Iterator[list[int]]:
        for reply in self._replies:
            self.request_id = reply.request_id
            yield list(reply.token_ids)


class RetryingStream(Running):
    """Pieces of text, by the openai package. Asks anew from the start when the router goes away."""

    PAUSE_S = 0.2

    def __init__(self, url: str, model: str, prompt: str, tokens: int, timeout_s: float = 180) -> None:
        super().__init__(prompt, tokens, timeout_s)
        self._model = model
        self._client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=timeout_s)
        self.start()

    def _parts(self) -> Iterator[list[str]]:
        deadline_s = time.monotonic() + self._timeout_s
        while True:
            try:
                yield from self._attempt()
                return
            except (openai.APIConnectionError, openai.InternalServerError, httpx.TransportError):
                if time.monotonic() > deadline_s:
                    raise
            self.attempts += 1
            self.pieces, self.times_s = [], []
            time.sleep(self.PAUSE_S)

    def _attempt(self) -> Iterator[list[str]]:
        reply = self._client.completions.create(
            model=self._model, prompt=self.prompt, max_tokens=self._tokens, temperature=0, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        finished = False
        for chunk in reply:
            self.request_id = chunk.id
            finished = finished or any(choice.finish_reason for choice in chunk.choices)
            yield [choice.text for choice in chunk.choices if choice.text]
        if not finished:
            raise httpx.RemoteProtocolError("the stream ended without a finish reason")
