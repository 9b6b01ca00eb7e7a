"""A real etcd for every test that wants one: `store` and `keys`, each test in a cluster of its own."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import hypothesis
import pytest
import pytest_asyncio
from flume_common.etcd_binary import embedded_etcd, find_etcd
from flume_common.keys import Keys
from flume_common.store import StoreConfig, connect
from flume_common.zygote import ENGINE_ZYGOTE, abstract_name, bind

sys.path.insert(0, str(Path(__file__).parent))
import beside
from etcd_container import docker_answers, etcd_container

os.environ.setdefault("OMP_NUM_THREADS", "1")
# An example that takes long says that the machine is busy, and nothing of the code.
hypothesis.settings.register_profile("flume", deadline=None)
hypothesis.settings.load_profile("flume")


@pytest.fixture(scope="session")
def etcd_endpoint(tmp_path_factory):
    """host:port of an etcd shared by the whole run. Don't stop it, don't compact it.

    In a container where a Docker daemon answers, otherwise the binary.
    """
    if docker_answers():
        with etcd_container(find_etcd()) as endpoint:
            yield endpoint
        return
    # Its own loop: those of the tests come and go.
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="shared-etcd", daemon=True)
    thread.start()

    def wait_for(coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(timeout=30)

    scope = embedded_etcd(tmp_path_factory.mktemp("etcd"), args=["--unsafe-no-fsync"], stop_s=0)
    etcd = wait_for(scope.__aenter__())
    yield etcd.endpoint
    wait_for(scope.__aexit__(None, None, None))
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest_asyncio.fixture
async def store(etcd_endpoint):
    async with connect(StoreConfig((etcd_endpoint,))) as opened:
        yield opened


@pytest.fixture(scope="module")
def engine_zygote(tmp_path_factory):
    """Forks attention engines in milliseconds, as on a real machine, for who looks at ENGINE_ZYGOTE."""
    folder = tmp_path_factory.mktemp("zygote")
    supervisors, engines = (abstract_name(kind, folder) for kind in ("supervisors", "engines"))
    with bind(supervisors) as one, bind(engines) as other:
        fds = one.fileno(), other.fileno()
        flags = ["--supervisors-fd", str(fds[0]), "--engines-fd", str(fds[1])]
        process = subprocess.Popen(
            [sys.executable, "-m", "flume_attention.zygote", *flags], pass_fds=fds, env=beside.environment()
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENGINE_ZYGOTE, engines)
        yield
    process.terminate()
    process.wait(timeout=10)


@pytest.fixture
def keys():
    """The keys of a cluster nobody else uses."""
    return Keys(f"test-{uuid.uuid4().hex[:12]}")
