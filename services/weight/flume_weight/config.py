"""Flags of a weight node. The supervisor and its engine share the second half; neither needs torch here."""

from __future__ import annotations

import argparse
import os
import socket

from flume_common.config_schema import MICROBATCHES, SETTINGS
from flume_common.direct_region import HOP_HELP, HOPS
from flume_common.etcd_flags import add_etcd_flags
from flume_common.gpu.visible import NoGpu, visible_gpu
from flume_common.metrics_page import METRICS_LISTEN, METRICS_LISTEN_HELP

from flume_weight.errors import ConfigRefused

_EXAMPLES = """examples:
  python -m flume_weight --etcd 127.0.0.1:2379 --model ./SmolLM2-135M-Instruct.gguf
  python -m flume_weight --etcd e1:2379,e2:2379 --model /models/Llama-3.2-1B --dtype float32
  python -m flume_weight --model smollm2-135m --metrics-listen 0.0.0.0:9201   # then: curl HOST:9201/metrics
"""


def supervisor_flags() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(
        prog="python -m flume_weight",
        description="A weight node: holds a model's parameters, runs its dense path and samples.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags.add_argument("--cluster", default="default", help="name under which etcd holds this cluster")
    flags.add_argument(
        "--node", default=f"weight-{socket.gethostname()}", help="this node's id, unique in it"
    )
    add_etcd_flags(flags.add_argument)
    flags.add_argument("--listen", default="127.0.0.1:0", help="gRPC address; port 0 takes a free one")
    flags.add_argument(
        "--metrics-listen", default=METRICS_LISTEN, metavar="HOST:PORT", help=METRICS_LISTEN_HELP
    )
    flags.add_argument("--advertise-host", default="", help="host that peers dial; default: that of --listen")
    flags.add_argument("--model-name", default="", help="name it is served under; default: that of --model")
    flags.add_argument("--lease-ttl-s", type=float, default=10.0, help="how long a silent node stays listed")
    flags.add_argument(
        "--engine-silence-s",
        type=float,
        default=15.0,
        help="an engine that makes no progress for so long is replaced, however long a step of one that does "
        "may last; default %(default)s",
    )
    flags.add_argument(
        "--step-target-ms",
        type=float,
        default=SETTINGS["step_target_ms"].default,
        help="how long a step with prompt tokens should last, by measured speed; 0: prompts are cut by "
        "tokens alone; default %(default)s",
    )
    flags.add_argument("--log-level", default="info")
    add_engine_flags(flags)
    return flags


def add_engine_flags(flags: argparse.ArgumentParser) -> None:
    """What the engine needs to know; the supervisor passes these on."""
    cores = os.cpu_count() or 1
    flags.add_argument(
        "--model", required=True, help="a Hugging Face directory, a .gguf file or smollm2-135m"
    )
    flags.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    flags.add_argument(
        "--device",
        default="cpu",
        choices=["cpu", "cuda"],
        help="cuda: the first GPU that this process sees (CUDA_VISIBLE_DEVICES)",
    )
    flags.add_argument("--hop", default="auto", choices=HOPS, help=HOP_HELP)
    flags.add_argument(
        "--microbatches",
        default="auto",
        choices=MICROBATCHES,
        help="parts of a decode step on a GPU, one in the dense path while the other is attended to; auto: "
        "what measures faster; 1 captures nothing else",
    )
    flags.add_argument("--block-tokens", type=int, default=16, help="tokens in one KV block")
    flags.add_argument("--max-sequences", type=int, default=64, help="most sequences in one step")
    flags.add_argument("--prefill-tokens", type=int, default=1024, help="prompt tokens of a step of its own")
    flags.add_argument(
        "--mixed-prefill-tokens", type=int, default=128, help="prompt tokens of a step that also decodes"
    )
    flags.add_argument(
        "--tail-margin-tokens",
        type=int,
        default=128,
        help="a tail moves to a node that holds this many tokens less, and no sooner than after as many",
    )
    flags.add_argument(
        "--step-timeout-s", type=float, default=10.0, help="an attention node silent for longer is lost"
    )
    flags.add_argument(
        "--lanes-host",
        default="",
        metavar="ADDRESS",
        help="lanes use only the network card that has this address; default: the host of --listen",
    )
    flags.add_argument("--decode-threads", type=int, default=1, help="threads of a step of few tokens")
    flags.add_argument("--prefill-threads", type=int, default=cores, help="threads of a step of many tokens")


_ENGINE_FLAGS = (
    "dtype", "device", "hop", "microbatches", "block_tokens", "max_sequences", "prefill_tokens",
    "mixed_prefill_tokens", "tail_margin_tokens", "step_timeout_s", "decode_threads", "prefill_threads",
)  # fmt: skip


def engine_args(args: argparse.Namespace, model_path: str) -> list[str]:
    """The engine's command line."""
    passed = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in _ENGINE_FLAGS]
    lanes_host = args.lanes_host or args.listen.rpartition(":")[0]
    return [f"--node={args.node}", f"--model={model_path}", f"--lanes-host={lanes_host}", *passed]


def check(args: argparse.Namespace) -> None:
    """Raises ConfigRefused naming the flag and its legal range."""
    at_least_one = (
        "block_tokens", "max_sequences", "prefill_tokens", "mixed_prefill_tokens", "tail_margin_tokens",
        "decode_threads", "prefill_threads",
    )  # fmt: skip
    for name in at_least_one:
        if getattr(args, name) < 1:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigRefused(f"{flag} must be at least 1, got {getattr(args, name)}")
    for name in ("step_timeout_s", "engine_silence_s", "lease_ttl_s"):
        if getattr(args, name) <= 0:
            raise ConfigRefused(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}")
    if args.step_target_ms < 0:
        raise ConfigRefused(f"--step-target-ms must not be negative, got {args.step_target_ms}")
    if args.device == "cpu" and args.microbatches == "2":
        raise ConfigRefused(
            "--microbatches 2 needs --device cuda: on a CPU a step runs whole, as auto and 1 have it"
        )
    if args.device == "cuda":
        try:
            visible_gpu()
        except NoGpu as error:
            raise ConfigRefused(str(error)) from error
