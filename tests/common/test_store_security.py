"""TLS and logins against a real etcd that asks for them."""

import asyncio
import shutil
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
import trustme
from flume_common.etcd_binary import embedded_etcd, find_etcd
from flume_common.store import StoreConfig, StoreRefused, StoreUnavailable, connect

sys.path.insert(0, str(Path(__file__).parent))
from tls_etcd import FAST, files_of, tls_etcd


async def test_mutual_tls_lets_in_whom_the_ca_signed_and_nobody_else(tmp_path):
    ca, foreign = trustme.CA(), trustme.CA()
    async with tls_etcd(tmp_path, ca) as etcd:
        ca_file, cert, key = files_of(tmp_path, "client", ca, "client")
        foreign_ca, foreign_cert, foreign_key = files_of(tmp_path, "foreign", foreign, "client")

        async with connect(StoreConfig((etcd.endpoint,), ca_file, cert, key)) as store:
            await store.put("/a", b"1")
            async with store.watch("/") as watch:
                await store.put("/b", b"1")
                assert (await anext(watch)).changes[0].kv.key == "/b"

        for refused in (
            StoreConfig((etcd.endpoint,), ca_file, timeout_s=0.4),
            StoreConfig((etcd.endpoint,), ca_file, foreign_cert, foreign_key, timeout_s=0.4),
            StoreConfig((etcd.endpoint,), foreign_ca, cert, key, timeout_s=0.4),
            StoreConfig((etcd.endpoint,), timeout_s=0.4),
        ):
            async with connect(refused) as store:
                with pytest.raises(StoreUnavailable):
                    await store.get("/a")


async def test_a_certificate_for_another_name_needs_the_name_told(tmp_path):
    ca = trustme.CA()
    async with tls_etcd(tmp_path, ca, name="etcd.example") as etcd:
        ca_file, cert, key = files_of(tmp_path, "client", ca, "client")
        async with connect(StoreConfig((etcd.endpoint,), ca_file, cert, key, timeout_s=0.4)) as store:
            with pytest.raises(StoreUnavailable):
                await store.get("/a")
        config = StoreConfig((f"https://{etcd.endpoint}",), ca_file, cert, key, server_name="etcd.example")
        async with connect(config) as store:
            assert await store.get("/a") is None


async def test_a_certificate_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.pem"):
        async with connect(StoreConfig(("127.0.0.1:1",), tmp_path / "missing.pem")):
            pass


def etcdctl(endpoint, *args):
    binary = shutil.which("etcdctl") or str(find_etcd().parent / "etcdctl")
    command = [binary, "--endpoints", endpoint, "--command-timeout=5s", *args]
    subprocess.run(command, check=True, capture_output=True, timeout=20)


@asynccontextmanager
async def guarded_etcd(tmp_path):
    """Users root (all) and flume (only below /flume/); a login lasts one second."""
    async with embedded_etcd(tmp_path, args=[*FAST, "--auth-token-ttl", "1"], stop_s=0) as etcd:
        steps = [
            "user add root:rootpw", "user grant-role root root",
            "user add flume:flumepw", "role add flume",
            "role grant-permission flume --prefix=true readwrite /flume/", "user grant-role flume flume",
            "auth enable",
        ]  # fmt: skip
        for step in steps:
            await asyncio.to_thread(etcdctl, etcd.endpoint, *step.split())
        yield etcd


async def test_a_login_lets_in_where_its_role_allows_and_is_renewed_when_it_runs_out(tmp_path):
    async with guarded_etcd(tmp_path) as etcd:
        flume = StoreConfig((etcd.endpoint,), user="flume", password="flumepw")
        async with connect(flume) as store:
            await store.put("/flume/a", b"1")
            with pytest.raises(StoreRefused, match="permission denied") as caught:
                await store.get("/elsewhere")
            assert caught.value.code is grpc.StatusCode.PERMISSION_DENIED
            with pytest.raises(StoreRefused):
                async with store.watch("/elsewhere/"):
                    pass

            async with store.watch("/flume/") as watch:
                await asyncio.sleep(
                    2.5
                )  # the login has run out for the calls, and for the watch when it opens
                assert await store.put("/flume/b", b"1") > 0
                assert (await asyncio.wait_for(anext(watch), 10)).changes[0].kv.key == "/flume/b"

        async with connect(StoreConfig((etcd.endpoint,), user="flume", password="wrong")) as store:
            with pytest.raises(StoreRefused, match="invalid user ID or password"):
                await store.get("/flume/a")
        async with connect(StoreConfig((etcd.endpoint,))) as store:
            with pytest.raises(StoreRefused, match="user name is empty"):
                await store.get("/flume/a")


async def test_a_login_that_nobody_asks_for_does_no_harm(etcd_endpoint, keys):
    async with connect(StoreConfig((etcd_endpoint,), user="flume", password="flumepw")) as store:
        assert await store.put(keys.root + "a", b"") > 0
