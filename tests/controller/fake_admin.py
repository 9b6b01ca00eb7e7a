"""FakeAdmin: the admin and router APIs over real gRPC with canned answers, for tests of flumectl."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
from flume_protos.v1 import admin_pb2 as pb
from flume_protos.v1 import admin_pb2_grpc as rpc
from flume_protos.v1 import common_pb2, router_pb2, router_pb2_grpc, weight_pb2


def condition(kind, status="False", reason="AsExpected", message="", age_s=75):
    return pb.Condition(
        type=kind,
        status=status,
        reason=reason,
        message=message,
        last_transition_time_s=time.time() - age_s,
    )


def status(desired=1, ready=1, preparing=0, draining=0, generation=1, observed=None, degraded=None):
    return pb.StatusReply(
        cluster="default", model="smollm2-135m", desired=desired, ready=ready, preparing=preparing,
        draining=draining, generation=generation, weight_nodes=1, routers=1, store_connected=True,
        observed_generation=generation if observed is None else observed,
        conditions=[
            condition("Available", "True", "EnoughNodes", "1 ready, at least 1 needed"),
            condition("Progressing"),
            degraded or condition("Degraded"),
        ],
    )  # fmt: skip


def nodes():
    common = {"host": "here", "version": "0.1.0", "state": "READY"}
    return [
        pb.Node(id="weight-1", role="weight", pid=11, address="127.0.0.1:5001", epoch=7, age_s=3725.25,
                sequences=2, **common),
        pb.Node(id="attention-1", role="attention", pid=12, address="127.0.0.1:5002", epoch=8, age_s=65,
                kv_capacity_tokens=4096, kv_used_tokens=1234, sequences=2, **common),
        pb.Node(id="attention-2", role="attention", pid=13, age_s=0.5, state="PREPARING"),
    ]  # fmt: skip


def routes():
    ranges = [
        common_pb2.TokenRange(start=0, end=128, node="attention-1"),
        common_pb2.TokenRange(start=128, node="attention-2"),
    ]
    return [common_pb2.Route(sequence="chatcmpl-1", weight_node="weight-1", epoch=7, ranges=ranges)]


def requests():
    return [
        pb.Request(id="chatcmpl-1", weight_node="weight-1", state="DECODING", prompt_tokens=12,
                   completion_tokens=120, age_s=4.2),
    ]  # fmt: skip


class FakeAdmin(rpc.AdminServicer, router_pb2_grpc.RouterServicer):
    """Answers from its attributes; `scaled` and `asked` are what it was told."""

    def __init__(self):
        self.nodes = nodes()
        self.routes = routes()
        self.requests = requests()
        self.statuses = [status()]
        self.hold_watch = False  # keep a watch open after its last status
        self.desired = 1
        self.refuse = None  # (code, details) for every call
        self.scaled = []
        self.asked = []
        self.cancelled = threading.Event()
        self.text = ["The sky ", "is blue: ", "Rayleigh.\n"]
        self.finish = True

    def _check(self, context):
        if self.refuse:
            context.abort(*self.refuse)

    def Scale(self, request, context):
        self._check(context)
        if request.HasField("current_replicas") and request.current_replicas != self.desired:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "expected 5 current replicas, not 1")
        self.scaled.append(request)
        return pb.ScaleReply(previous=self.desired, replicas=request.replicas, generation=2)

    def Status(self, request, context):
        self._check(context)
        if not request.watch:
            yield self.statuses[0]
            return
        yield from self.statuses
        while self.hold_watch and context.is_active():
            time.sleep(0.02)

    def ListNodes(self, request, context):
        self._check(context)
        return pb.ListNodesReply(nodes=self.nodes, revision=9)

    def ListRoutes(self, request, context):
        self._check(context)
        return pb.ListRoutesReply(routes=self.routes, revision=9)

    def ListRequests(self, request, context):
        self._check(context)
        return pb.ListRequestsReply(requests=self.requests)

    def Generate(self, request, context):
        self._check(context)
        self.asked.append(request)
        context.add_callback(self.cancelled.set)
        for text in self.text:
            yield router_pb2.GenerateTextReply(text=text, request_id="r1")
        while self.finish == "never" and context.is_active():
            time.sleep(0.02)
        if self.finish is True:
            finish = weight_pb2.Finish(reason=weight_pb2.STOP, completion_tokens=3)
            yield router_pb2.GenerateTextReply(finish=finish, request_id="r1")


class Serving:
    """A FakeAdmin on a port of its own."""

    def __init__(self):
        self.fake = FakeAdmin()
        self._server = grpc.server(ThreadPoolExecutor(8))
        rpc.add_AdminServicer_to_server(self.fake, self._server)
        router_pb2_grpc.add_RouterServicer_to_server(self.fake, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()
        self.fake.nodes.append(
            pb.Node(id="router-1", role="router", state="READY", pid=14, address=self.address, age_s=9)
        )

    def close(self):
        self._server.stop(None).wait()
