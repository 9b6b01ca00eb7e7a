"""An etcd that asks for client certificates, and certificates for it."""

from contextlib import asynccontextmanager

from flume_common.etcd_binary import embedded_etcd, free_port
from flume_common.store import StoreConfig

FAST = ["--unsafe-no-fsync"]


def files_of(folder, name, ca, *identities):
    """Writes a certificate for `identities`; returns (ca file, certificate file, key file)."""
    folder.mkdir(exist_ok=True)
    leaf = ca.issue_cert(*identities)
    paths = tuple(folder / f"{name}-{part}.pem" for part in ("ca", "cert", "key"))
    ca.cert_pem.write_to_path(paths[0])
    leaf.cert_chain_pems[0].write_to_path(paths[1])
    leaf.private_key_pem.write_to_path(paths[2])
    return paths


@asynccontextmanager
async def tls_etcd(tmp_path, ca, name="127.0.0.1"):
    ca_file, cert, key = files_of(tmp_path, "server", ca, name)
    client_ca, client_cert, client_key = files_of(tmp_path, "probe", ca, "probe")
    args = [
        *FAST, "--client-cert-auth", "--trusted-ca-file", str(ca_file),
        "--cert-file", str(cert), "--key-file", str(key),
    ]  # fmt: skip
    port = free_port()
    ready = StoreConfig(
        (f"127.0.0.1:{port}",),
        client_ca,
        client_cert,
        client_key,
        server_name=name if name != "127.0.0.1" else None,
    )
    async with embedded_etcd(
        tmp_path / "etcd", client_port=port, scheme="https", ready=ready, args=args, stop_s=0
    ) as etcd:
        yield etcd
