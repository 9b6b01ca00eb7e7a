"""etcd in a container, where a Docker daemon answers (testcontainers).

The image is FLUME_TEST_ETCD_IMAGE if that is set (quay.io/coreos/etcd:v3.5.17, say); otherwise one is made
of the etcd binary at hand, so that no registry is needed.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CLIENT_PORT = 2379
_LOCAL_IMAGE = "kernelflume-test-etcd:local"


def docker_answers() -> bool:
    """Whether there is a daemon, asked for at most two seconds."""
    try:
        import docker

        return bool(docker.from_env(timeout=2).ping())
    except Exception:
        return False


@contextmanager
def etcd_container(binary: Path) -> Iterator[str]:
    """host:port of an etcd in a container while the body runs."""
    os.environ.setdefault("TESTCONTAINERS_RYUK_DISABLED", "true")  # its image would come from a registry
    from testcontainers.core.container import DockerContainer
    from testcontainers.core.wait_strategies import LogMessageWaitStrategy

    image = os.environ.get("FLUME_TEST_ETCD_IMAGE") or _image_of(binary)
    urls = f"http://0.0.0.0:{CLIENT_PORT}"
    container = (
        DockerContainer(image)
        .with_command(
            ["/etcd", "--listen-client-urls", urls, "--advertise-client-urls", urls, "--unsafe-no-fsync"]
        )
        .with_exposed_ports(CLIENT_PORT)
        .waiting_for(LogMessageWaitStrategy("ready to serve client requests").with_startup_timeout(20))
    )
    with container as running:
        yield f"{running.get_container_host_ip()}:{running.get_exposed_port(CLIENT_PORT)}"


def _image_of(binary: Path) -> str:
    """Import a static etcd binary as an image."""
    import docker

    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        tar.add(binary, arcname="etcd")
    docker.from_env().api.import_image_from_data(layer.getvalue(), *_LOCAL_IMAGE.split(":"))
    return _LOCAL_IMAGE
