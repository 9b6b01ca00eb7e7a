"""Another host on this machine: a network namespace on a cable that can be cut.

    ours         a switch                    theirs
    card ════ ours [bridge] theirs ══════════ card
                                 the cable

Its processes share our files and our process table, but every byte between them and us takes that cable.
A cut takes the switch's port down: their card loses its carrier, ours does not, and packets end at the
switch: no reset, no answer, in neither direction. Needs root and iproute2. (The switch is a namespace, too,
as UCX uses no bridge as a card unless told to.)

What a killed test left of it goes with the next one that makes a host.
"""

from __future__ import annotations

import ipaddress
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

NETWORK = ipaddress.ip_network("198.18.0.0/15")
"""For tests between networks (RFC 2544): nobody's address."""
STOP_S = 10.0
_NAME = re.compile(r"\bkf(\d+)s?\b")


def why_not() -> str:
    """Why there can be none here; empty where there can."""
    if os.geteuid() != 0:
        return "needs root, for a network namespace"
    if shutil.which("ip") is None:
        return "needs ip (iproute2), for a network namespace"
    return ""


class Host:
    """Made by `host`. `address` is theirs, `gateway` ours, as they see us."""

    def __init__(self, name: str, gateway: str, address: str) -> None:
        self.name = name
        self.gateway = gateway
        self.address = address
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def switch(self) -> str:
        return f"{self.name}s"

    def cut(self) -> None:
        """The cable is out; idempotent, as `mend` is."""
        _ip("-n", self.switch, "link", "set", "theirs", "down")

    def mend(self) -> None:
        _ip("-n", self.switch, "link", "set", "theirs", "up")

    def command(self, *words: str) -> list[str]:
        """What runs these there."""
        return ["ip", "netns", "exec", self.name, *words]

    def start(self, words: Sequence[str], log: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Run this there, in a session of its own, until `stop`."""
        with log.open("ab") as out:
            process = subprocess.Popen(
                self.command(*words),
                env={**os.environ, **env}, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                start_new_session=True,
            )  # fmt: skip
        self._processes.append(process)
        return process

    def stop(self) -> None:
        """SIGTERM to all that was started there, and SIGKILL to what is left after STOP_S."""
        for process in self._processes:
            process.terminate()
        deadline_s = time.monotonic() + STOP_S
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self._processes.clear()


@contextmanager
def host() -> Iterator[Host]:
    """One at a time for each process. Nothing is left of it in the end, its processes included.

    Raises subprocess.CalledProcessError where the kernel has no namespaces, bridges or veths.
    """
    _sweep()
    name, pid = f"kf{os.getpid()}", os.getpid()
    first = int(NETWORK.network_address) + pid * 4 % NETWORK.num_addresses
    gateway, address = (str(ipaddress.ip_address(first + number)) for number in (1, 2))
    there = Host(name, gateway, address)
    switch = there.switch
    with ExitStack() as undo:
        undo.callback(_remove, name)
        for namespace in (name, switch):
            _ip("netns", "add", namespace)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _cable(name, (), "ours", switch)
        _cable("card", ("-n", name), "theirs", switch)
        _ip("address", "add", f"{gateway}/30", "dev", name)
        _ip("-n", name, "address", "add", f"{address}/30", "dev", "card")
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", switch, "link", "set", "bridge", "up")
        undo.callback(there.stop)
        yield there


def _cable(card: str, where: tuple[str, ...], port: str, switch: str) -> None:
    """From a card there to a port of the switch."""
    _ip(*where, "link", "add", card, "type", "veth", "peer", "name", port, "netns", switch)
    _ip("-n", switch, "link", "set", port, "master", "bridge", "up")
    _ip(*where, "link", "set", card, "up")


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=10).stdout


def _sweep() -> None:
    """Remove the hosts of processes that ended without doing so."""
    listed = _ip("netns", "list") + _ip("-brief", "link", "show")
    for pid in {int(number) for number in _NAME.findall(listed)}:
        if pid == os.getpid() or not psutil.pid_exists(pid):
            _remove(f"kf{pid}")


def _remove(name: str) -> None:
    """Whatever there is of it. Our card would go with the switch, but a moment later."""
    for words in (("link", "del", name), ("netns", "del", f"{name}s"), ("netns", "del", name)):
        subprocess.run(["ip", *words], check=False, capture_output=True, timeout=10)
