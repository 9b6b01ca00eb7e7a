"""`flumectl up` in a directory of its own, with real etcd and controller and fake nodes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from flume_common.etcd_binary import free_port
from flume_controller import processes
from flume_controller.cluster_files import ClusterFiles
from flume_controller.supervise import kill_all

HERE = Path(__file__).parent


class Local:
    """A cluster in a directory and on ports of its own."""

    def __init__(self, folder):
        self.data_dir = folder / "data"
        self.state = folder / "state"
        self.state.mkdir()
        self.modules = folder / "modules"
        self._fake("flume_weight", "import fake_node; fake_node.run('weight')")
        self._fake("flume_router", "import fake_node; fake_node.run('router')")
        self._fake(
            "flume_attention",
            f"import runpy; runpy.run_path({str(HERE / 'fake_attention_node.py')!r}, run_name='__main__')",
        )
        self.ports = {flag: free_port() for flag in ("--http-port", "--admin-port", "--etcd-port")}
        self.files = ClusterFiles(self.data_dir, "default")

    def _fake(self, package, code):
        (self.modules / package).mkdir(parents=True)
        (self.modules / package / "__init__.py").touch()
        (self.modules / package / "__main__.py").write_text(code)

    def start(self, *words, **ports):
        """flumectl, not waited for."""
        flags = ["--data-dir", str(self.data_dir)] if words[0] in ("up", "down") else []
        if words[0] == "up":
            flags += [part for flag, port in {**self.ports, **ports}.items() for part in (flag, str(port))]
        path = os.pathsep.join([str(self.modules), str(HERE), os.environ.get("PYTHONPATH", "")])
        env = {
            **os.environ, "PYTHONPATH": path, "FAKE_STATE": str(self.state),
            "FLUME_DATA_DIR": str(self.data_dir), "PYTHONUNBUFFERED": "1",
        }  # fmt: skip
        return subprocess.Popen(
            [sys.executable, "-m", "flume_controller.flumectl", *words, *flags],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def flumectl(self, *words, **ports):
        child = self.start(*words, **ports)
        out, err = child.communicate(timeout=60)
        return subprocess.CompletedProcess(words, child.returncode, out, err)

    def up(self, *words):
        done = self.flumectl("up", "--detach", *words)
        assert done.returncode == 0, done.stdout + done.stderr

    def nodes(self):
        rows = json.loads(self.flumectl("get", "nodes", "-o", "json").stdout)
        return {row["id"]: row for row in rows}

    def running(self):
        """Processes that mention our directory or hold our ports."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                command = path.read_bytes().decode(errors="replace").replace("\0", " ")
            except (FileNotFoundError, ProcessLookupError):
                continue
            ours = str(self.data_dir) in command or any(
                f":{port} " in command for port in self.ports.values()
            )
            if ours and int(path.parent.name) != os.getpid():
                found.append(command)
        return found

    def close(self):
        record = self.files.read()
        if record and record.running:
            processes.kill_session(record.supervisor)
        kill_all(self.files.records)

    def pids(self):
        """Of what is recorded and runs, by id."""
        return {record.id: record.pid for record in self.files.leftovers()}

    def kill_up(self):
        """SIGKILL for what looks after the others, alone."""
        record = self.files.read()
        os.kill(record.supervisor.pid, signal.SIGKILL)
        until(lambda: not processes.is_alive(record.supervisor))

    def kill_everything(self):
        """As when the power goes: nothing has time for a word, and nothing restarts another."""
        record = self.files.read()
        pids = [record.supervisor.pid, *self.pids().values()]
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in pids:
                os.kill(pid, number)
        for found in self.files.records.all():
            processes.kill_session(found)
        until(lambda: not self.pids() and not processes.is_alive(record.supervisor))


def until(predicate, timeout_s=20.0):
    deadline_s = time.monotonic() + timeout_s
    while not (value := predicate()):
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s"
        time.sleep(0.05)
    return value
