"""The attention nodes' zygote (see `flume_common.zygote`): `python -m flume_attention.zygote`.

Two stages, so two processes: the first has imported what a supervisor needs and forks supervisors; the
second has torch and UCX besides and forks engines. A supervisor never has torch in memory, and the first
nodes of a machine start while torch is still being imported. With --preload cuda the second one is ready for
engines on GPUs, too: a child then imports nothing and only opens its device.
"""

from __future__ import annotations

import os

# numpy's BLAS starts threads when loaded, and what has threads cannot be forked. Nodes multiply with torch.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import argparse
import socket
from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

from flume_common.telemetry import configure_logging
from flume_common.zygote.server import Stage, run

from flume_attention.supervisor import ENGINE_ENV, ENGINE_MODULE

SUPERVISOR_MODULE = "flume_attention.__main__"


def main(argv: Sequence[str] | None = None) -> NoReturn:
    parser = argparse.ArgumentParser(prog="flume_attention.zygote", description=__doc__)
    parser.add_argument("--supervisors-fd", type=int, required=True, help="listening socket")
    parser.add_argument("--engines-fd", type=int, required=True, help="listening socket")
    parser.add_argument("--preload", choices=["cpu", "cuda"], default="cpu", help="what engines run on")
    args = parser.parse_args(argv)
    configure_logging("zygote", "zygote")
    # OpenMP reads them when torch is loaded.
    os.environ.update(ENGINE_ENV)
    engines = Stage(socket.socket(fileno=args.engines_fd), ENGINE_MODULE)
    if args.preload == "cuda":
        # Or torch, asked here whether there is a GPU, would initialise CUDA, and no child could use it.
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
        engines = replace(engines, prepare=_preload_cuda)
    run([Stage(socket.socket(fileno=args.supervisors_fd), SUPERVISOR_MODULE), engines])


def _preload_cuda() -> None:
    from flume_attention.cuda.preload import preload

    preload()


if __name__ == "__main__":
    main()
