"""Fixtures of the tests of flumectl: a fake controller, command lines against it, golden files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from flume_controller.flumectl import main

sys.path.insert(0, str(Path(__file__).parent))
import fake_admin

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def server():
    serving = fake_admin.Serving()
    yield serving
    serving.close()


@pytest.fixture
def fake(server):
    return server.fake


@pytest.fixture
def flumectl(server, tmp_path):
    """Run a command line against the fake; .exit_code, .stdout, .stderr."""

    def run(*words, address=server.address):
        env = {"FLUME_SERVER": address, "FLUME_DATA_DIR": str(tmp_path), "FLUME_CLUSTER": ""}
        return CliRunner(env=env).invoke(main, list(words), prog_name="flumectl")

    return run


@pytest.fixture
def process(server, tmp_path):
    """The same as a process, for commands that do not end by themselves."""
    started = []

    def start(*words):
        env = {
            **os.environ,
            "FLUME_SERVER": server.address,
            "FLUME_DATA_DIR": str(tmp_path),
            "PYTHONUNBUFFERED": "1",
        }
        argv = [sys.executable, "-m", "flume_controller.flumectl", *words]
        child = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(child)
        return child

    yield start
    for child in started:
        child.kill()
        child.communicate()


def matches_golden(name, text, volatile=()):
    """Whether `text` is what the golden file says, the address of the fake aside."""
    for pattern, stand_in in (*volatile, (r"127\.0\.0\.1:(?!500)\d+", "ROUTER")):
        text = re.sub(pattern, stand_in, text)
    path = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return text == path.read_text()
