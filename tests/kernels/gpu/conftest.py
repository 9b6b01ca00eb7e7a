"""These tests run on a GPU, or under Triton's interpreter when TRITON_INTERPRET=1 is set before triton is
loaded.

The interpreter changes how triton is imported for the whole process, so a run without either collects
nothing here; `tests/kernels/test_gpu_interpreted.py` runs this folder in a process of its own.
"""

import os
import sys
from importlib.util import find_spec

import pytest
import torch

ON_GPU = torch.cuda.is_available()
RUNS = find_spec("triton") is not None and (ON_GPU or os.environ.get("TRITON_INTERPRET") == "1")
collect_ignore_glob = [] if RUNS else ["test_*.py"]


def pytest_report_header():
    return "kernels run " + (
        "on " + torch.cuda.get_device_name() if ON_GPU else "under the interpreter" if RUNS else "elsewhere"
    )


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    if not ON_GPU:
        assert "triton" in sys.modules


@pytest.fixture
def device():
    return "cuda" if ON_GPU else "cpu"
