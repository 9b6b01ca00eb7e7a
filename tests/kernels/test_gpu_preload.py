"""A preloaded process, and one forked from it, up to where a device would be asked to load a kernel."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

LAUNCH = """
import json, os, sys, time
import torch
from flume_kernels.gpu import cuda_device, preload, signals
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

preload.preload(90)
threads = len(os.listdir("/proc/self/task"))
loaded = [line.split()[-1] for line in open("/proc/self/maps") if "libcuda.so" in line]
assert driver._active is None, "whoever comes next asks for the real one"
read, write = os.pipe()
if os.fork() == 0:
    class NoDevice:
        get_current_device = lambda self: 0
        get_current_stream = lambda self, device: 0
        get_current_target = lambda self: GPUTarget("cuda", 90, 32)

    driver.set_active(NoDevice())
    JITFunction.__getitem__ = lambda self, grid: lambda *a, **k: self.run(*a, grid=grid, warmup=True, **k)
    started, before = [], set(sys.modules)
    sys.addaudithook(lambda event, values: started.append(values[1]) if event == "subprocess.Popen" else None)
    words, counters = torch.zeros(2, 16, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    status = torch.zeros(1, dtype=torch.int64)
    began = time.perf_counter()
    signals.await_(words[0, :1], counters[0:1], status)
    signals.signal(words[1, :1], counters[1:2], status)
    took = time.perf_counter() - began
    new = sorted(set(sys.modules) - before)
    os.write(write, json.dumps({"new": new, "started": started, "ms": 1e3 * took}).encode())
    os._exit(0)
os.close(write)
said = json.loads(os.fdopen(read).read())
print(json.dumps(said | {"threads": threads, "loaded": loaded, "initialised": torch.cuda.is_initialized()}))
"""


def test_a_fork_of_a_preloaded_process_launches_without_importing_compiling_or_running_anything(tmp_path):
    env = {"TRITON_CACHE_DIR": str(tmp_path), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LAUNCH]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | env, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    print(f"the first two launches took {said['ms']:.1f} ms")
    assert said["new"] == [] and said["started"] == []
    assert said["threads"] == 1 and not said["initialised"] and said["loaded"] == []
