"""A whole cluster on an etcd that lets in only who has a certificate: real services, from `flumectl up`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import trustme
from flume_common.etcd_binary import free_port

sys.path.insert(0, str(Path(__file__).parent.parent / "common"))
from tls_etcd import files_of, tls_etcd

FLUMECTL = (sys.executable, "-m", "flume_controller.flumectl")


@pytest.mark.e2e
async def test_every_service_gets_into_an_etcd_that_asks_for_certificates(tmp_path):
    ca = trustme.CA()
    async with tls_etcd(tmp_path, ca) as etcd:
        paths = files_of(tmp_path, "services", ca, "services")
        # Half by flags and half by the environment.
        env = {**os.environ, "FLUME_ETCD_CA": str(paths[0]), "FLUME_DATA_DIR": str(tmp_path / "data")}
        ports = {name: str(free_port()) for name in ("--http-port", "--admin-port")}
        env["FLUME_SERVER"] = f"127.0.0.1:{ports['--admin-port']}"

        def flumectl(*words):
            done = subprocess.run([*FLUMECTL, *words], env=env, capture_output=True, text=True, timeout=90)
            assert done.returncode == 0, done.stderr
            return done.stdout

        etcd_flags = ("--etcd", etcd.endpoint, "--etcd-cert", str(paths[1]), "--etcd-key", str(paths[2]))
        where = [word for item in ports.items() for word in item]
        flumectl("up", "--detach", *etcd_flags, *where, "--kv-memory", "64MiB")
        try:
            assert flumectl("generate", "Hello", "--max-tokens", "4")
            assert "Store:         connected" in flumectl("status")
        finally:
            flumectl("down")
