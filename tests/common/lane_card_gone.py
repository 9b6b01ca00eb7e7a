"""A port whose network card goes away, and a lane that is made then; in a process of its own, as UCX keeps
what it finds out about cards. Needs root and `ip`. Prints "carried" when a message came over that lane."""

from __future__ import annotations

import os
import subprocess

from flume_common.lanes import Port, Side
from flume_common.layout import KvLayout
from flume_common.wire import Kind, LaneShape

LAYOUT = KvLayout(num_layers=2, num_query_heads=4, num_kv_heads=4, head_dim=64, dtype="float32")
SHAPE = LaneShape(LAYOUT, max_step_tokens=8, max_step_sequences=8, kv_frame_bytes=4096)
CARD = f"kfgone{os.getpid() % 10**6}"


def ip(*words):
    subprocess.run(["ip", *words], check=True)


def main():
    ip("link", "add", CARD, "type", "veth", "peer", "name", f"{CARD}p")
    try:
        ip("address", "add", "10.247.9.1/30", "dev", CARD)
        for end in (CARD, f"{CARD}p"):
            ip("link", "set", end, "up")
        one, other = Port(), Port()
        for port in (one, other):
            port.berth(1)  # the one that was made with the port
    finally:
        ip("link", "delete", CARD)
    there, here = one.berth(3), other.berth(4)
    weight = one.connect("other", here, SHAPE, Side.WEIGHT, send_lane=4, receive_lane=3)
    attention = other.connect("one", there, SHAPE, Side.ATTENTION, send_lane=3, receive_lane=4)
    weight.sender(Kind.PLAN).send(weight.sender(Kind.PLAN).frame(), 8)
    came = other.wait(lambda: one.progress() or attention.receiver(Kind.PLAN).poll() is not None, 5.0)
    print("carried" if came else "lost")


if __name__ == "__main__":
    main()
