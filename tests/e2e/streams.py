"""A greedy stream that runs beside the test, by the router's gRPC."""

from __future__ import annotations

import threading
import time

from flume_protos.v1 import router_pb2, weight_pb2


class Stream(threading.Thread):
    """Begins at once; `tokens` grows as they come."""

    def __init__(self, cluster, prompt: str, tokens: int, timeout_s: float = 180) -> None:
        super().__init__(daemon=True)
        self.tokens: list[int] = []
        self.times_s: list[float] = []
        self.error: Exception | None = None
        self._timeout_s = timeout_s
        sampling = weight_pb2.Sampling(max_tokens=tokens, ignore_eos=True)
        request = router_pb2.GenerateTextRequest(prompt=prompt, sampling=sampling)
        self._replies = cluster.router().Generate(request, timeout=timeout_s)
        self.start()

    def run(self) -> None:
        try:
            for reply in self._replies:
                self.tokens += reply.token_ids
                self.times_s += [time.monotonic()] * len(reply.token_ids)
        except Exception as error:
            self.error = error

    def wait_for(self, count: int) -> None:
        """Until this many tokens are there. Fails when the stream does, or after its timeout."""
        deadline = time.monotonic() + self._timeout_s
        while len(self.tokens) < count:
            assert self.error is None, self.error
            assert time.monotonic() < deadline, f"{len(self.tokens)} of {count} tokens"
            time.sleep(0.01)

    def result(self) -> list[int]:
        """All tokens, once the stream has ended. Fails when it ended with an error."""
        self.join(self._timeout_s)
        assert self.error is None, self.error
        return self.tokens
