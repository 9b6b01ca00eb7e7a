"""The engine's process: `python -m flume_weight.engine_process`, started by the supervisor."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

import torch
from flume_common.engine_link import EngineLink
from flume_common.lanes import Port
from flume_common.wire import LaneShape
from flume_kernels.dtypes import DTYPES

from flume_weight import messages as m
from flume_weight.config import add_engine_flags
from flume_weight.engine import WeightEngine
from flume_weight.model import ModelError, Transformer, load_model
from flume_weight.placement import Balance
from flume_weight.scheduler import StepLimits
from flume_weight.threads import Threads

_MIN_KV_FRAME_BYTES = 4 << 20
_PROGRESS_EVERY_S = 0.5


def main(argv: list[str] | None = None) -> int:
    flags = argparse.ArgumentParser()
    flags.add_argument("--link-fd", type=int, required=True)
    flags.add_argument("--node", required=True)
    add_engine_flags(flags)
    args = flags.parse_args(argv)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor decides when we stop
    link: EngineLink[m.Inbound] = EngineLink(args.link_fd, m.Inbound)
    try:
        serve(link, args)
    except ModelError as error:
        link.send(m.Refused(str(error)))
        return 1
    return 0


def serve(link: EngineLink[m.Inbound], args: argparse.Namespace) -> None:
    """Load, say ready, run. Raises ModelError."""
    started = time.monotonic()
    limits = StepLimits(args.max_sequences, args.prefill_tokens, args.mixed_prefill_tokens)
    torch.set_num_threads(args.prefill_threads)
    model = load_model(Path(args.model), DTYPES[args.dtype], progress=_Progress(link))
    layout = model.layout(args.block_tokens)
    shape = LaneShape(
        layout=layout,
        max_step_tokens=limits.max_tokens,
        max_step_sequences=limits.max_sequences,
        kv_frame_bytes=max(_MIN_KV_FRAME_BYTES, limits.max_tokens * layout.layer_token_bytes),
    )
    with Port() as port:
        link.send(_ready(model, shape, port, time.monotonic() - started))
        WeightEngine(
            link,
            port,
            model,
            shape,
            node=args.node,
            limits=limits,
            balance=Balance(args.tail_margin_tokens),
            step_timeout_s=args.step_timeout_s,
            threads=Threads(args.decode_threads, args.prefill_threads),
        ).run()


def _ready(model: Transformer, shape: LaneShape, port: Port, load_s: float) -> m.Ready:
    layout, config = shape.layout, model.config
    return m.Ready(
        worker_address=port.address,
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
        now = time.monotonic()
        if now >= self._next_s:
            self._next_s = now + _PROGRESS_EVERY_S
            self._link.send(m.Loading(bytes_done, bytes_total))


if __name__ == "__main__":
    sys.exit(main())
