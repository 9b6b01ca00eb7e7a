"""FakeAdmin: the admin and router APIs over real gRPC with canned answers, for tests of flumectl."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
from flume_protos.v1 import admin_pb2 as pb
from flume_protos.v1 import admin_pb2_grpc as rpc
from flume_protos.v1 import attention_pb2, common_pb2, router_pb2, router_pb2_grpc, weight_pb2

DAY_S = 86400.0  # ages in days stay the same while a test runs


def condition(kind, status="False", reason="AsExpected", message="", age_s=75):
    return pb.Condition(
        type=kind,
        status=status,
        reason=reason,
        message=message,
        last_transition_time_s=time.time() - age_s,
    )


def status(
    desired=1, ready=1, preparing=0, draining=0, generation=1, observed=None, degraded=None, progressing=None
):
    return pb.StatusReply(
        cluster="default", model="smollm2-135m", desired=desired, ready=ready, preparing=preparing,
        draining=draining, generation=generation, weight_nodes=1, routers=1, store_connected=True,
        observed_generation=generation if observed is None else observed,
        set_by="user", min=0, max=64, autoscale=pb.Autoscale(min=1, max=64), leader="controller-1",
        conditions=[
            condition("Available", "True", "EnoughNodes", "1 ready, at least 1 needed"),
            progressing or condition("Progressing"),
            degraded or condition("Degraded"),
        ],
    )  # fmt: skip


def nodes():
    common = {"host": "here", "version": "0.1.0", "state": "READY"}
    return [
        pb.Node(id="weight-1", role="weight", pid=11, address="127.0.0.1:5001", epoch=7, age_s=3725.25,
                sequences=2, **common),
        pb.Node(id="attention-1", role="attention", pid=12, address="127.0.0.1:5002", epoch=8, age_s=65,
                kv_capacity_tokens=4096, kv_used_tokens=1234, sequences=2,
                metrics_address="127.0.0.1:5003", **common),
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


def event(id, object, reason, message, *, type="Normal", count=1, age_s=2 * DAY_S, over_s=0):
    now_s = time.time()
    return pb.Event(
        id=id, object=object, type=type, reason=reason, message=message, source="controller-1", count=count,
        first_s=now_s - age_s - over_s, last_s=now_s - age_s,
    )  # fmt: skip


def events():
    return [
        event(
            "1", "fleet/attention", "ScalingUp", "from 1 to 2 attention nodes, set by user", age_s=3 * DAY_S
        ),
        event("2", "attention/attention-2", "NodeLost", "has ended", type="Warning", count=3, over_s=DAY_S),
        event("3", "attention/attention-1", "NodeReady", "is ready", age_s=DAY_S),
    ]


def settings():
    return [
        pb.Setting(name="cluster/log_level", default="info", type="str", range="debug, info, warning, error",
                   description="Least important log line.", readers=["attention", "weight"],
                   scopes=["cluster", "attention", "weight"]),
        pb.Setting(name="weight/step_timeout_s", value="3", default="10", type="float", range="0.1 to 600",
                   unit="s", description="A silent node is lost.", readers=["weight"], scopes=["weight"],
                   revision=12, set_by="ann@here", set_at_s=time.time() - 2 * DAY_S),
        pb.Setting(name="weight/tail_margin_tokens", value="lots", default="128", type="int",
                   range="1 to 1000000", unit="tokens", description="When tails move.", readers=["weight"],
                   scopes=["weight"], revision=13,
                   error="weight/tail_margin_tokens must be a whole number, got 'lots'"),
    ]  # fmt: skip


class FakeAdmin(rpc.AdminServicer, router_pb2_grpc.RouterServicer):
    """Answers from its attributes; `scaled` and `asked` are what it was told."""

    def __init__(self):
        self.nodes = nodes()
        self.routes = routes()
        self.requests = requests()
        self.unanswered = []
        self.statuses = [status()]
        self.hold_watch = False  # keep a watch open after its last status
        self.desired = 1
        self.refuse = None  # (code, details) for every call
        self.events = events()
        self.settings = settings()
        self.changes = []  # what SetConfig and DiffConfig answer
        self.drained = set()
        self.drains_at_once = True
        self.calls = []  # every request that may change something
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
        return pb.ListRequestsReply(requests=self.requests, unanswered=self.unanswered)

    def ListEvents(self, request, context):
        self._check(context)
        found = [item for item in self.events if item.object.endswith(request.object)]
        return pb.ListEventsReply(events=found)

    def WatchEvents(self, request, context):
        self._check(context)
        yield from self.events
        while self.hold_watch and context.is_active():
            time.sleep(0.02)

    def Describe(self, request, context):
        self._check(context)
        lanes = [attention_pb2.LaneStats(weight_node="weight-1", epoch=7, granted_blocks=90, held_blocks=78,
                                         sequences=2, ranges=2, steps=41, direct=True)]  # fmt: skip
        if request.kind == "cluster":
            return pb.DescribeObjectReply(nodes=self.nodes[:3], events=self.events, status=self.statuses[0],
                                          settings=self.settings[1:], spec_revision=9)  # fmt: skip
        if request.kind == "node":
            nodes = [node for node in self.nodes if node.id == request.name]
            if not nodes:
                context.abort(grpc.StatusCode.NOT_FOUND, f"there is no node {request.name!r}")
            return pb.DescribeObjectReply(
                nodes=nodes, lanes=lanes, routes=self.routes, events=self.events[2:]
            )
        return pb.DescribeObjectReply(
            nodes=self.nodes[:2],
            routes=self.routes,
            requests=self.requests if request.kind == "request" else (),
        )

    def DrainNode(self, request, context):
        self._check(context)
        self.calls.append(request)
        if not request.dry_run and self.drains_at_once:
            self.nodes = [node for node in self.nodes if node.id != request.node]
        changed = request.node not in self.drained
        return pb.DrainNodeReply(changed=changed, generation=2)

    def UndrainNode(self, request, context):
        self._check(context)
        self.calls.append(request)
        return pb.DrainNodeReply(changed=True, generation=3)

    def SetAutoscale(self, request, context):
        self._check(context)
        self.calls.append(request)
        after = pb.Autoscale(enabled=request.enabled, min=request.min or 1, max=request.max or 64)
        return pb.SetAutoscaleReply(after=after, generation=4)

    def GetConfig(self, request, context):
        self._check(context)
        found = [item for item in self.settings if request.name in item.name]
        return pb.GetConfigReply(settings=found)

    def SetConfig(self, request, context):
        self._check(context)
        self.calls.append(request)
        return pb.SetConfigReply(changes=self.changes)

    def DiffConfig(self, request, context):
        self._check(context)
        self.calls.append(request)
        return pb.SetConfigReply(changes=self.changes)

    def ConfigHistory(self, request, context):
        self._check(context)
        records = [
            pb.ConfigRecord(value="5", set_by="ann@here", set_at_s=time.time() - 3 * DAY_S),
            pb.ConfigRecord(value="3", previous="5", set_by="bob@there", set_at_s=time.time() - 2 * DAY_S),
            pb.ConfigRecord(previous="3", set_by="bob@there", set_at_s=time.time() - DAY_S),
        ]
        return pb.ConfigHistoryReply(name="weight/step_timeout_s", records=records)

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
    """A FakeAdmin on a port of its own, or at `address`."""

    def __init__(self, address="127.0.0.1:0"):
        self.fake = FakeAdmin()
        self._server = grpc.server(ThreadPoolExecutor(8))
        rpc.add_AdminServicer_to_server(self.fake, self._server)
        router_pb2_grpc.add_RouterServicer_to_server(self.fake, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port(address)}"
        self._server.start()
        self.fake.nodes.append(
            pb.Node(id="router-1", role="router", state="READY", pid=14, address=self.address, age_s=9)
        )

    def close(self):
        self._server.stop(None).wait()
