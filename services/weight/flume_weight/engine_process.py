"""The engine's process: `python -m flume_weight.engine_process`, started by the supervisor."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

import torch
from flume_common.engine_link import EngineLink
from flume_common.engine_progress import Activity
from flume_common.lanes import Port
from flume_common.telemetry import configure_logging
from flume_common.wire import LaneShape
from flume_kernels.dtypes import DTYPES

from flume_weight import messages as m
from flume_weight.config import add_engine_flags
from flume_weight.cuda.errors import StepError
from flume_weight.engine import WeightEngine
from flume_weight.errors import ConfigRefused
from flume_weight.model import ModelConfig, ModelError, load_model
from flume_weight.passes import Backend, CpuBackend
from flume_weight.placement import Balance
from flume_weight.scheduler import StepLimits
from flume_weight.threads import Threads

_MIN_KV_FRAME_BYTES = 4 << 20
_PROGRESS_EVERY_S = 0.5
DEVICE_FAILED = 3  # exit code


def main(argv: list[str] | None = None) -> int:
    flags = argparse.ArgumentParser()
    flags.add_argument("--link-fd", type=int, required=True)
    flags.add_argument("--node", required=True)
    add_engine_flags(flags)
    args = flags.parse_args(argv)
    configure_logging("weight", args.node)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor decides when we stop
    link: EngineLink[m.Inbound] = EngineLink(args.link_fd, m.Inbound)
    try:
        serve(link, args)
    except (ModelError, ConfigRefused) as error:
        link.send(m.Refused(str(error)))
        return 1
    except StepError as error:
        # At once: to free memory that the device uses would wait for it.
        sys.stderr.write(f"Error: {error}\n")
        sys.stderr.flush()
        os._exit(DEVICE_FAILED)
    return 0


def serve(link: EngineLink[m.Inbound], args: argparse.Namespace) -> None:
    """Load, say ready, run. Raises ModelError, ConfigRefused, StepError."""
    started = time.monotonic()
    limits = StepLimits(args.max_sequences, args.prefill_tokens, args.mixed_prefill_tokens)
    torch.set_num_threads(args.prefill_threads)
    backend = open_backend(args)
    link.progress.begin(Activity.LOADING)
    model = load_model(Path(args.model), DTYPES[args.dtype], progress=_Progress(link), pack=backend.packs)
    link.progress.begin(Activity.PREPARING)
    layout = model.layout(args.block_tokens)
    shape = LaneShape(
        layout=layout,
        max_step_tokens=limits.max_tokens,
        max_step_sequences=limits.max_sequences,
        kv_frame_bytes=max(_MIN_KV_FRAME_BYTES, limits.max_tokens * layout.layer_token_bytes),
    )
    with (
        open_port(args.lanes_host) as port,
        backend.passes(model, port, layout, limits, args.step_timeout_s) as passes,
    ):
        config = model.config
        del model  # on a device there is a copy
        ready = _ready(config, shape, time.monotonic() - started)
        ready.direct = passes.map_region is not None
        link.progress.idle()
        link.send(ready)
        WeightEngine(
            link,
            port,
            config,
            passes,
            shape,
            node=args.node,
            limits=limits,
            balance=Balance(args.tail_margin_tokens),
        ).run()


def open_port(lanes_host: str) -> Port:
    """Raises ConfigRefused when no network card of this machine has that address."""
    try:
        return Port(host=lanes_host)
    except ValueError as error:
        raise ConfigRefused(f"--lanes-host: {error}") from error


def open_backend(args: argparse.Namespace) -> Backend:
    """Raises ConfigRefused for a device that cannot be used."""
    if args.device == "cpu":
        return CpuBackend(Threads(args.decode_threads, args.prefill_threads))
    from flume_weight.cuda import backend

    return backend.open_gpu(direct=args.hop == "auto", microbatches=args.microbatches)


def _ready(config: ModelConfig, shape: LaneShape, load_s: float) -> m.Ready:
    layout = shape.layout
    return m.Ready(
        architecture=config.architecture,
        vocab_size=config.vocab_size,
        context_tokens=config.context_tokens,
        num_layers=layout.num_layers,
        num_query_heads=layout.num_query_heads,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        dtype=layout.dtype,
        block_tokens=layout.block_tokens,
        max_step_tokens=shape.max_step_tokens,
        max_step_sequences=shape.max_step_sequences,
        kv_frame_bytes=shape.kv_frame_bytes,
        load_s=load_s,
    )


class _Progress:
    """Tells the supervisor how far loading is, not more often than a person reads."""

    def __init__(self, link: EngineLink[m.Inbound]) -> None:
        self._link = link
        self._next_s = 0.0

    def __call__(self, bytes_done: int, bytes_total: int) -> None:
        self._link.progress.reached(bytes_done, bytes_total)
        now = time.monotonic()
        if now >= self._next_s:
            self._next_s = now + _PROGRESS_EVERY_S
            self._link.send(m.Loading(bytes_done, bytes_total))


if __name__ == "__main__":
    sys.exit(main())
