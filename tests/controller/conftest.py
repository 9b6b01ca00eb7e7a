"""Controllers as processes, on the shared etcd, with fake attention nodes."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import grpc
import pytest
from flume_common.etcd_binary import free_port
from flume_controller.processes import RecordDir
from flume_controller.supervise import kill_all
from flume_protos.v1 import admin_pb2 as pb
from flume_protos.v1 import admin_pb2_grpc as rpc

sys.path.insert(0, str(Path(__file__).parent))
from election_timing import QUICK_ELECTION

FAKE_NODE = Path(__file__).parent / "fake_attention_node.py"


class ControllerProcess:
    """A controller of its own, and a client of it."""

    def __init__(self, endpoint, cluster, directory, node="controller-1", options=()):
        self.directory = directory
        self.node = node
        self.state = directory / "state"
        self.records = RecordDir(directory / "run")
        self.address = f"127.0.0.1:{free_port()}"
        self._argv = [
            *(sys.executable, "-m", "flume_controller", "--cluster", cluster, "--etcd", endpoint),
            *("--listen", self.address, "--data-dir", str(directory), "--attention", "1"),
            *("--attention-command", shlex.join([sys.executable, str(FAKE_NODE)])),
            *("--attention-args", shlex.join(["--state", str(self.state)]), "--node", node, *options),
        ]
        self.state.mkdir(exist_ok=True)
        self._process = None
        self._channel = grpc.insecure_channel(
            self.address,
            options=[("grpc.max_reconnect_backoff_ms", 200), ("grpc.min_reconnect_backoff_ms", 100)],
        )
        self.stub = rpc.AdminStub(self._channel)

    def start(self):
        log = (self.directory / f"{self.node}.log").open("ab")
        self._process = subprocess.Popen(self._argv, stdout=log, stderr=log, start_new_session=True)
        grpc.channel_ready_future(self._channel).result(timeout=15)

    def send(self, signal_number):
        self._process.send_signal(signal_number)

    def end(self, how=signal.SIGTERM):
        self.send(how)
        return self._process.wait(timeout=15)

    def close(self):
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        kill_all(self.records)
        self._channel.close()

    def hold(self, node, tokens):
        (self.state / f"{node}.held").write_text(str(tokens))

    def scale(self, replicas, **options):
        return self.stub.Scale(pb.ScaleRequest(replicas=replicas, **options), timeout=5)

    def status(self):
        (reply,) = self.stub.Status(pb.StatusRequest(), timeout=5)
        return reply

    def nodes(self):
        """Attention nodes by id."""
        reply = self.stub.ListNodes(pb.ListNodesRequest(), timeout=5)
        return {node.id: node for node in reply.nodes if node.role == "attention"}

    def states(self):
        return {id: node.state for id, node in self.nodes().items()}

    def until(self, predicate, timeout_s=15.0):
        """Poll until it is true; the value. Fails with what it was last and the end of the log."""
        deadline_s = time.monotonic() + timeout_s
        while not (value := predicate()):
            assert time.monotonic() < deadline_s, f"last: {value!r}, {self.states()}\n{self.log()[-3000:]}"
            time.sleep(0.05)
        return value

    def until_states(self, **expected):
        """`a1="READY"` means attention-1."""
        wanted = {f"attention-{name[1:]}": state for name, state in expected.items()}
        self.until(lambda: self.states() == wanted)

    def condition(self, kind):
        return next(item for item in self.status().conditions if item.type == kind)

    def log(self):
        return (self.directory / f"{self.node}.log").read_text()


@pytest.fixture
def controller(etcd_endpoint, keys, tmp_path):
    """A running controller with one fake attention node wanted."""
    made = ControllerProcess(etcd_endpoint, keys.cluster, tmp_path)
    try:
        made.start()
        yield made
    finally:
        made.close()


@pytest.fixture
def start_controller(keys, tmp_path):
    """Starts controllers, with quick elections unless told otherwise, on one machine and data directory."""
    made = []

    def start(endpoint, node="controller-1", options=QUICK_ELECTION):
        controller = ControllerProcess(endpoint, keys.cluster, tmp_path, node, options)
        made.append(controller)
        controller.start()
        controller.until(lambda: "READY" in controller.states().values())
        return controller

    yield start
    for controller in made:
        controller.close()


@pytest.fixture
def two_controllers(etcd_endpoint, start_controller):
    """The leader and its standby."""
    return [start_controller(etcd_endpoint, node) for node in ("controller-1", "controller-2")]
