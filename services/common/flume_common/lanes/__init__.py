"""Lanes: fixed buffers and tagged messages between a weight node and an attention node, over UCX.

`wire` says what the messages mean; this package only moves them. It knows no tensors and no asyncio:

    with Port() as port:
        lane = port.connect(peer, address, shape, Side.WEIGHT, send_lane=1, receive_lane=2)
        frame = lane.sender(Kind.QUERY).frame()
        ...
        lane.sender(Kind.QUERY).send(frame, body_bytes)
        port.wait(lambda: (reply := lane.receiver(Kind.PARTIAL).poll()) is not None, timeout_s=1.0)
"""

from flume_common.lanes.channel import Receiver, Sender
from flume_common.lanes.errors import LaneDown
from flume_common.lanes.frames import Frame
from flume_common.lanes.lane import Lane
from flume_common.lanes.port import Port, port_of
from flume_common.lanes.tags import Side

__all__ = ["Frame", "Lane", "LaneDown", "Port", "Receiver", "Sender", "Side", "port_of"]
