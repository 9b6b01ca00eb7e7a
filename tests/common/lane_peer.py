"""The attention end of lanes in a process of its own, driven by lines of JSON on stdin.

Answers PLAN with a CREDIT (step, sum of the words), QUERY with a PARTIAL of the same size (every byte
inverted) and KV with a CREDIT (step, CRC-32, bytes), in the order they arrive. Every command is answered
by one line of JSON. The end of stdin is the end of the process.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time
import zlib

import numpy as np
from flume_common.lanes import Frame, Lane, LaneDown, Port, Side
from flume_common.layout import KvLayout
from flume_common.wire import Header, Kind, LaneShape

LAYOUT = KvLayout(num_layers=4, num_query_heads=9, num_kv_heads=3, head_dim=64, dtype="float32")


class Peer:
    def __init__(self, port: Port) -> None:
        self.port = port
        self.lanes: dict[str, Lane] = {}
        self.holding = False  # leave KV messages where they are
        self.reader = os.fdopen(os.dup(0), "rb", buffering=0)

    def run(self) -> None:
        while True:
            try:
                self.port.wait(self.answer_all, 60.0, (self.reader.fileno(),))
            except LaneDown:
                self.drop_dead_lanes()
            if readable(self.reader.fileno()):
                line = self.reader.readline()
                if not line:
                    return
                print(json.dumps(self.obey(**json.loads(line))), flush=True)

    def drop_dead_lanes(self) -> None:
        for name, lane in list(self.lanes.items()):
            if not lane.alive:
                self.close(name)

    def answer_all(self) -> bool:
        for lane in list(self.lanes.values()):
            while self.answer(lane):
                pass
        return False

    def answer(self, lane: Lane) -> bool:
        """Take one message if its answer can be sent; False when there was none."""
        credits, partials = lane.sender(Kind.CREDIT), lane.sender(Kind.PARTIAL)
        credit, partial = credits.frame(), partials.frame()
        if credit is None or partial is None:
            return False
        if (query := lane.receiver(Kind.QUERY).poll()) is not None:
            size = int(query.header[Header.BODY_BYTES])
            np.subtract(255, query.body[:size], out=partial.body[:size])
            partial.header[Header.STEP] = query.header[Header.STEP]
            lane.receiver(Kind.QUERY).give_back(query)
            partials.send(partial, size)
            return True
        kinds = (Kind.PLAN,) if self.holding else (Kind.PLAN, Kind.KV)
        for kind in kinds:
            if (frame := lane.receiver(kind).poll()) is not None:
                credits.send(credit, self.digest(kind, frame, credit))
                lane.receiver(kind).give_back(frame)
                return True
        return False

    @staticmethod
    def digest(kind: Kind, frame: Frame, credit: Frame) -> int:
        size = int(frame.header[Header.BODY_BYTES])
        credit.words[0] = frame.header[Header.STEP]
        credit.words[1] = (
            frame.words[: size // 8].sum() if kind is Kind.PLAN else zlib.crc32(frame.body[:size])
        )
        credit.words[2] = size
        return 24

    def obey(self, do: str, **args: object) -> object:
        return getattr(self, do)(**args)

    def connect(
        self, name: str, address: str, send_lane: int, receive_lane: int, tokens: int, kv_bytes: int
    ) -> str:
        shape = LaneShape(LAYOUT, tokens, max_step_sequences=16, kv_frame_bytes=kv_bytes)
        self.lanes[name] = self.port.connect(
            name,
            bytes.fromhex(address),
            shape,
            Side.ATTENTION,
            send_lane=send_lane,
            receive_lane=receive_lane,
        )
        return "connected"

    def close(self, name: str) -> str:
        """The lane may have gone down before, when the other end closed it."""
        if (lane := self.lanes.pop(name, None)) is not None:
            lane.close()
        return "closed"

    def hold(self, on: bool) -> str:
        self.holding = on
        return "holding" if on else "answering"

    def compute(self, seconds: float) -> str:
        """Do not progress for a while."""
        time.sleep(seconds)
        return "computed"

    def unasked(self, kind: str, name: str, times: int, size: int) -> int:
        """Send messages nobody asked for; how many the lane took before it went down."""
        sender = self.lanes[name].sender(Kind[kind])
        for sent in range(times):
            try:
                assert self.port.wait(lambda: sender.frame() is not None, 5.0)
                frame = sender.frame()
                assert frame is not None
                sender.send(frame, size)
            except LaneDown:
                return sent
        return times


def readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


def main() -> None:
    tls, spin_s, host = sys.argv[1], float(sys.argv[2]), (*sys.argv[3:], "")[0]
    with Port(tls=tls, spin_s=spin_s, host=host) as port:
        print(port.address.hex(), flush=True)
        Peer(port).run()


if __name__ == "__main__":
    main()
