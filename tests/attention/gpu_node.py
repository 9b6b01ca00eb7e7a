"""An attention node with a GPU in a thread: real lanes, a device that is simulated where there is none."""

from __future__ import annotations

import random
import threading

import torch
from flume_attention.cuda.answers import Answers
from flume_attention.cuda.device_pool import DevicePool
from flume_attention.cuda.direct_answers import DirectAnswers
from flume_attention.cuda.direct_steps import DirectSteps
from flume_attention.cuda.lane_region import LaneRegion
from flume_attention.cuda.session import RINGS, GpuLaneSession, lane_buffers
from flume_attention.frame_tensors import FrameTensors
from flume_attention.messages import Attached
from flume_attention.node import Node
from flume_common.direct_region import DirectRegion
from flume_common.lanes import Port, Side
from flume_common.layout import KvLayout
from flume_kernels.gpu.watchdog import Watchdog
from reference_attention import ReferenceAttention
from simulated_device import SimulatedDevice

ON_GPU = torch.cuda.is_available()
LAYOUT = KvLayout(3, 4, 2, 64, "float32", 16) if ON_GPU else KvLayout(3, 4, 2, 16, "float32", 4)
WAIT_S = 20.0


def attention_device(layout):
    """(device, operations): a GPU if there is one, else a simulated device."""
    if not ON_GPU:
        device = SimulatedDevice()
        return device, ReferenceAttention(device)
    from flume_attention.cuda.ops import TritonAttention
    from flume_kernels.gpu.cuda_device import CudaDevice

    class Gpu(CudaDevice):
        """It moves on by itself."""

        def run_some(self, count):
            pass

    device = Gpu()
    return device, TritonAttention(layout, device.name)


class GpuNode:
    """One node with one lane. Memory that nothing was written to holds NaN."""

    def __init__(
        self, layout=LAYOUT, blocks=48, max_rows=8, max_length=None, query_timeout_s=WAIT_S, direct=False
    ):
        self.layout, self.blocks = layout, blocks
        self.max_rows, self.max_length = max_rows, max_length or blocks * layout.block_tokens
        self.query_timeout_s = query_timeout_s
        self.direct = direct  # with a region: see `region`
        self.random = random.Random(5)
        self.error = None
        self._ready, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run)

    def attach(self, weight_node):
        """The fake weight node's lane to this one."""
        self._request = weight_node.attach_request()
        self._thread.start()
        assert self._ready.wait(WAIT_S) and self.error is None, self.error
        weight_node.connect(self.attached)
        weight_node.plan()
        weight_node.await_credit(lambda credit: credit.granted_blocks >= weight_node.want)
        return weight_node

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._stop.set()
        if self._thread.ident:
            self._thread.join(WAIT_S)
        assert self.error is None or exception[0], self.error

    @property
    def steps(self):
        """The lane's captured steps."""
        return self._answers.steps

    @property
    def direct_steps(self):
        return self._direct.steps

    def _run(self):
        try:
            with torch.inference_mode(), Port(spin_s=0) as port, Watchdog() as self._watchdog:
                self._serve(port)
        except Exception as error:
            self.error = error
        finally:
            self._ready.set()

    def _serve(self, port):
        torch.set_num_threads(1)
        self.node = Node(self.blocks * self.layout.block_bytes)
        self.device, self._ops = attention_device(self.layout)
        session = self._session(port)
        self._ready.set()

        def work():
            self.device.run_some(self.random.randint(0, 3))
            return session.advance()

        while not self._stop.is_set():
            port.wait(work, 0.0 if session.under_way else 0.02)
            if self.node.grant() or session.changed:
                session.changed, session.credit_due = False, True
        session.close()

    def _session(self, port):
        request, node = self._request, self.node
        shape = node.admit(request)
        holdings = node.add(request.weight_node, shape)
        lane = port.connect(
            request.weight_node, request.worker_address, shape, Side.ATTENTION,
            send_lane=request.lane, receive_lane=1, allocate=self._allocate, rings=RINGS,
        )  # fmt: skip
        self.attached = Attached(
            request=request.request, worker_address=port.address, lane=1, capacity_blocks=self.blocks
        )
        pool = DevicePool(self.device, self._ops, self.layout, self.blocks)
        for layer in pool.layers:
            layer.kv.fill_(torch.nan)
        node.pool = pool
        buffers = lane_buffers(FrameTensors(self.layout), lane, shape.max_step_tokens)
        self._answers = Answers(
            self.device, self._ops, pool, buffers, max_rows=self.max_rows, max_length=self.max_length,
            watchdog=self._watchdog, query_timeout_s=self.query_timeout_s,
        )  # fmt: skip
        self._direct = self._make_direct(pool, shape.layout) if self.direct else None
        return GpuLaneSession(
            node, request.weight_node, request.epoch, lane, holdings,
            answers=self._answers, direct=self._direct,
        )  # fmt: skip

    def _make_direct(self, pool, layout):
        size = DirectRegion(layout, self.max_rows)
        self.memory = self.device.tensor(size.size_bytes, dtype=torch.uint8)
        region = LaneRegion.of(size, self.memory)
        steps = DirectSteps(self.device, self._ops, pool, region, self.max_length)
        return DirectAnswers(self.device, steps, watchdog=self._watchdog, timeout_s=self.query_timeout_s)

    def _allocate(self, size_bytes):
        return self.device.host_tensor(size_bytes, dtype=torch.uint8).numpy()
