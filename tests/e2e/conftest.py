"""One cluster for all end-to-end tests, and the truth that its tokens are held against."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import oracle
from clusters import Cluster, running


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """SmolLM2 in float32; each test scales it to what it needs."""
    with running(tmp_path_factory.mktemp("cluster"), "--dtype", "float32", "--attention", "1") as cluster:
        yield cluster


@pytest.fixture(scope="session")
def truth(tmp_path_factory) -> Iterator[oracle.Computing]:
    """Being worked out by transformers."""
    with oracle.computing(tmp_path_factory.mktemp("oracle")) as computing:
        yield computing


@pytest.fixture(scope="session", autouse=True)
def begin_early(request) -> None:
    """The truth takes a minute: it is begun with the first test here, if any needs it."""
    if any("truth" in getattr(item, "fixturenames", ()) for item in request.session.items):
        request.getfixturevalue("truth")
