"""Nodes as processes, on a GPU: they say the tokens that the model says by itself. No etcd, no gRPC.

    python bench/gpu_nodes.py --device cuda --attention 2 [--kill] [--dtype bfloat16] [--out nodes.json]

Starts the engines of one weight node and of some attention nodes, as supervisors would, and plays these.
Prompts of several lengths are decoded side by side, greedily. The reference reads each prompt with all that
was said after it in one pass in float32: the model's own code with all KV at hand or, with --reference
transformers, that library's. In float32 every token must be the one that the reference finds likeliest; in
bfloat16 the log-probabilities of the likeliest tokens may differ from the reference's by --tolerance.
Otherwise the exit code is 1. --kill ends an attention node on the way. `--model tiny` is made here, of random
weights; any other is a path or a name as nodes take it.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import struct
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from flume_attention import messages as a
from flume_common.direct_region import HOPS
from flume_common.engine_link import Engine, run_engine
from flume_common.layout import KvLayout
from flume_common.model_source import resolve_model
from flume_weight import messages as w
from flume_weight.model import LocalAttention, load_model
from flume_weight.model.huggingface import read_config
from flume_weight.model.weights import allocate, slots
from flume_weight.sampling import SamplingParams
from torch import Tensor

TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": 512,
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "max_position_embeddings": 2048, "eos_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
MARGIN_TOKENS = 32  # tails move often
COMPARED = 4  # likeliest tokens of each place
Reference = Callable[[list[int]], Tensor]  # ids -> logits float32 [ids, vocab], each after what is before it


def make_tiny(folder: Path) -> Path:
    """A model of random weights as a Hugging Face directory."""
    (folder / "config.json").write_text(json.dumps(TINY))
    places = slots(allocate(read_config(folder), torch.float32))
    generator = torch.Generator().manual_seed(0)
    header: dict[str, Any] = {}
    data = bytearray()
    for name, place in places.items():
        values = torch.empty(place.shape).normal_(1.0 if "norm" in name else 0.0, 0.1, generator=generator)
        end = len(data) + values.numel() * 4
        header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [len(data), end]}
        data += values.numpy().tobytes()
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return folder


@dataclass
class Nodes:
    """A weight engine and its attention engines; what the first has said, token by token with its time."""

    weight: Engine[Any]
    ready: w.Ready
    attention: dict[str, Engine[Any]] = field(default_factory=dict)
    said: dict[str, list[tuple[float, w.Token]]] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    async def attach(self, name: str, engine: Engine[Any]) -> None:
        ready = self.ready
        self.weight.send(w.OpenLane())
        while not isinstance(ours := await self.weight.receive(), w.LaneOpen):
            pass
        layout = KvLayout(
            ready.num_layers, ready.num_query_heads, ready.num_kv_heads, ready.head_dim, ready.dtype,
            ready.block_tokens,
        )  # fmt: skip
        engine.send(
            a.Attach(
                request=1, weight_node="weight-1", epoch=1, layout=layout, lane=ours.lane,
                worker_address=ours.worker_address, max_step_tokens=ready.max_step_tokens,
                max_step_sequences=ready.max_step_sequences, kv_frame_bytes=ready.kv_frame_bytes,
                direct=ready.direct,
            )
        )  # fmt: skip
        while not isinstance(reply := await engine.receive(), a.Attached):
            if isinstance(reply, a.Refused):
                raise SystemExit(f"{name} refused the lane: {reply.detail}")
        self.attention[name] = engine
        if reply.no_region:
            print(f"{name} offers no region: {reply.no_region}", flush=True)
        self.weight.send(
            w.Attach(
                name, reply.worker_address, reply.lane, ours.lane, reply.capacity_blocks,
                direct_region=reply.direct_region,
            )
        )  # fmt: skip

    def submit(self, name: str, prompt: list[int], tokens: int) -> None:
        self.said[name] = []
        greedy = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, logprobs=COMPARED)
        self.weight.send(w.Submit(name, prompt, greedy))

    async def listen(self) -> None:
        while True:
            match await self.weight.receive():
                case w.Produced(tokens=tokens):
                    for token in tokens:
                        self.said[token.sequence].append((time.perf_counter(), token))
                case w.Finished(sequence=sequence, reason=reason):
                    self.ended[sequence] = reason
                case w.Failed(sequence=sequence, message=message):
                    self.ended[sequence] = message
                case w.LaneUp(node=node, hop=hop, reason=reason):
                    print(f"lane to {node}: {hop} {reason}".rstrip(), flush=True)
                case w.LaneLost(node=node, reason=reason):
                    print(f"lane to {node} lost: {reason}", flush=True)
            self.news.set()

    async def until(self, found: Any, timeout_s: float) -> None:
        async with asyncio.timeout(timeout_s):
            while not found():
                self.news.clear()
                await self.news.wait()


@asynccontextmanager
async def started(args: argparse.Namespace, model: Path) -> AsyncIterator[Nodes]:
    flags = [
        *("--node", "weight-1", "--model", str(model), "--dtype", args.dtype, "--device", args.device),
        *("--max-sequences", str(args.max_sequences), "--prefill-tokens", "256"),
        *("--tail-margin-tokens", str(MARGIN_TOKENS), "--hop", args.hop),
    ]
    async with AsyncExitStack() as stack:
        began = time.perf_counter()
        weight = await stack.enter_async_context(
            run_engine("flume_weight.engine_process", flags, inbox=w.Outbound)
        )
        while not isinstance(ready := await weight.receive(), w.Ready):
            if isinstance(ready, w.Refused):
                raise SystemExit(f"the weight node refused: {ready.message}")
        print(f"weight node ready after {time.perf_counter() - began:.1f} s", flush=True)
        nodes = Nodes(weight, ready)
        weight.send(w.Epoch(1))
        for number in range(1, args.attention + 1):
            began = time.perf_counter()
            flags = ["--kv-bytes", str(args.kv_mib << 20), "--device", args.device]
            engine = await stack.enter_async_context(
                run_engine("flume_attention.engine", flags, inbox=a.FromEngine)
            )
            first = await engine.receive()
            if isinstance(first, a.CannotRun):
                raise SystemExit(f"attention-{number} cannot run: {first.reason}")
            up_s = time.perf_counter() - began
            await nodes.attach(f"attention-{number}", engine)
            print(
                f"attention-{number} started after {up_s:.1f} s, attached after"
                f" {time.perf_counter() - began:.1f} s",
                flush=True,
            )
        listening = asyncio.create_task(nodes.listen())
        yield nodes
        listening.cancel()


def own_reference(model: Path) -> Reference:
    """The same code as the weight node's, in one process."""
    transformer = load_model(model, torch.float32)

    def logits(ids: list[int]) -> Tensor:
        attention = LocalAttention(transformer.config.num_layers)
        attention.next_pass([("all", len(ids))])
        places = torch.arange(len(ids))
        return transformer.forward(torch.tensor(ids), places, attention, places)

    return logits


def transformers_reference(model: Path) -> Reference:
    """Another implementation of the model, reading the same files."""
    from transformers import AutoModelForCausalLM

    where, options = (model, {}) if model.is_dir() else (model.parent, {"gguf_file": model.name})
    other = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **options).eval()

    def logits(ids: list[int]) -> Tensor:
        with torch.inference_mode():
            found: Tensor = other(torch.tensor([ids])).logits[0]
        return found

    return logits


def compare(reference: Reference, prompt: list[int], said: list[w.Token]) -> tuple[int, float]:
    """Tokens before the first that is not the reference's; the largest difference of a log-probability."""
    ids = [token.token_id for token in said]
    logprobs = reference(prompt + ids[:-1])[len(prompt) - 1 :].log_softmax(-1)
    likeliest = logprobs.argmax(-1).tolist()
    same = next(
        (at for at, (one, other) in enumerate(zip(ids, likeliest, strict=True)) if one != other), len(ids)
    )
    differences = [
        abs(top.logprob - float(row[top.token_id]))
        for token, row in zip(said, logprobs, strict=True)
        for top in token.top
    ]
    return same, max(differences)


async def decode(args: argparse.Namespace, model: Path, prompts: dict[str, list[int]]) -> Nodes:
    async with started(args, model) as nodes:
        for name, prompt in prompts.items():
            nodes.submit(name, prompt, args.tokens)
        if args.kill:
            half = args.tokens // 2
            await nodes.until(lambda: any(len(said) > half for said in nodes.said.values()), args.timeout_s)
            nodes.attention.pop("attention-1").process.kill()
        await nodes.until(lambda: len(nodes.ended) == len(prompts), args.timeout_s)
        return nodes


def run(args: argparse.Namespace, model: Path) -> int:
    lengths = [int(length) for length in args.prompts.split(",")]
    vocabulary = 400  # below that of any model
    prompts = {
        f"prompt of {length}": [1 + (31 * length + 17 * at) % vocabulary for at in range(length)]
        for length in lengths
    }
    nodes = asyncio.run(decode(args, model, prompts))
    reference = (own_reference if args.reference == "own" else transformers_reference)(model)
    rows = []
    for name, said in nodes.said.items():
        times = [at for at, _ in said]
        gaps = sorted(later - earlier for earlier, later in itertools.pairwise(times))
        same, difference = compare(reference, prompts[name], [token for _, token in said])
        rows.append(
            {
                "prompt": name,
                "end": nodes.ended[name],
                "tokens": len(said),
                "same": same,
                "logprob_difference": difference,
                "gap_ms": 1e3 * gaps[len(gaps) // 2] if gaps else 0.0,
                "worst_gap_ms": 1e3 * max(gaps, default=0.0),
            }
        )
        print(
            "{prompt}: {end}, {same} of {tokens} tokens the reference's; log-probabilities differ by at most"
            " {logprob_difference:.2g}; a token every {gap_ms:.2f} ms, at worst {worst_gap_ms:.1f}".format(
                **rows[-1]
            ),
            flush=True,
        )
    whole = all(row["end"] == "length" and row["tokens"] == args.tokens for row in rows)
    exact = all(row["same"] == args.tokens for row in rows)
    near = all(row["logprob_difference"] <= args.tolerance for row in rows)
    if args.out:
        args.out.write_text(json.dumps({"device": args.device, "dtype": args.dtype, "rows": rows}, indent=1))
    return 0 if whole and (exact if args.dtype == "float32" else near) else 1


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--hop", choices=HOPS, default="auto")
    parser.add_argument("--attention", type=int, default=2)
    parser.add_argument("--kv-mib", type=int, default=256, help="Of each attention node.")
    parser.add_argument("--max-sequences", type=int, default=8)
    parser.add_argument("--prompts", default="5,60,300", help="Their lengths in tokens.")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--kill", action="store_true", help="End an attention node on the way.")
    parser.add_argument("--reference", choices=["own", "transformers"], default="own")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1.0,
        help="Of log-probabilities in bfloat16; SmolLM2 on CPUs: 0.2 to 0.6.",
    )
    parser.add_argument("--timeout-s", type=float, default=120.0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    if args.kill and args.attention < 2:
        parser.error("--kill needs another attention node to go on with: --attention 2")
    return args


def main() -> int:
    args = parse()
    if args.model != "tiny":
        return run(args, resolve_model(args.model).path)
    with tempfile.TemporaryDirectory() as folder:
        return run(args, make_tiny(Path(folder)))


if __name__ == "__main__":
    sys.exit(main())
