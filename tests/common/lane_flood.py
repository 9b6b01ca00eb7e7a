"""Processes that send PLANs as fast as they can until they are killed; one for each line on stdin.

A line is {"address": hex, "send_lane": n, "bytes": n}; the answer says the pid and the address. The end of
stdin is the end of the process. It has no UCX worker of its own, so that its children can be forked.
"""

from __future__ import annotations

import json
import os
import signal
import sys

from flume_common.lanes import Port, Side
from flume_common.layout import KvLayout
from flume_common.wire import Kind, LaneShape

SHAPE = LaneShape(
    KvLayout(2, 4, 4, 64, "float32"), max_step_tokens=8, max_step_sequences=8, kv_frame_bytes=4096
)


def flood(port: Port, address: str, send_lane: int, size: int) -> None:
    lane = port.connect(
        "flooded", bytes.fromhex(address), SHAPE, Side.WEIGHT, send_lane=send_lane, receive_lane=1
    )
    plans = lane.sender(Kind.PLAN)
    while True:
        frame = plans.frame()
        if frame is not None:
            plans.send(frame, size)
        port.progress()


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    for line in sys.stdin:
        wanted = json.loads(line)
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            with Port() as port:
                os.write(writing, port.address)
                os.close(writing)
                flood(port, wanted["address"], wanted["send_lane"], wanted["bytes"])
        os.close(writing)
        address = b""
        while part := os.read(reading, 4096):
            address += part
        os.close(reading)
        print(json.dumps({"pid": pid, "address": address.hex()}), flush=True)


if __name__ == "__main__":
    main()
