"""What a captured decode step is tested with: the kernels' definitions as its operations, a small random
model, and attention nodes that are a list of past keys and values.

Where there is a GPU the same tests run on it, with real graphs and kernels."""

from __future__ import annotations

import random
import time
from itertools import pairwise

import torch
from flume_kernels import reference as attention_reference
from flume_kernels.gpu import direct_reference, reference
from flume_weight.model.config import ModelConfig
from flume_weight.model.weights import allocate, slots
from simulated_device import SimulatedDevice

ON_GPU = torch.cuda.is_available()


def step_device():
    """(device, operations, where tensors lie): a GPU if there is one, else a simulated device."""
    if not ON_GPU:
        return SimulatedDevice(), ReferenceOps(), torch.device("cpu")
    from flume_kernels.gpu.cuda_device import CudaDevice
    from flume_weight.cuda.ops import TritonOps

    class Gpu(CudaDevice):
        """It moves on by itself."""

        captures = 0

        def capture(self, run):
            self.captures += 1
            return super().capture(run)

        def run_some(self, count):
            time.sleep(0)

    device = Gpu()
    return device, TritonOps(), device.name


# Operations that a capture sees as one each, as they read addresses anew in every replay.
_by_address = torch.library.Library("flume_by_address", "DEF")
_by_address.define("push(Tensor q, Tensor queries_at) -> ()")
_by_address.define("merge(Tensor q, Tensor k, Tensor v, Tensor o_at, Tensor lse_at, float scale) -> Tensor")
_by_address.impl("push", direct_reference.push, "CPU")
_by_address.impl("merge", direct_reference.direct_merge, "CPU")


class ReferenceOps:
    """`flume_weight.cuda.ops.Ops` by the definitions of the kernels."""

    def rms_norm(self, x, weight, eps):
        return reference.rms_norm(x, weight, eps).to(x.dtype)

    def linear(self, linear, x):
        return linear(self.rms_norm(x.x, x.weight, x.eps))

    def gate(self, linear, x):
        gate, up = self.linear(linear, x).chunk(2, -1)
        return reference.silu_mul(gate, up).to(gate.dtype)

    def linear_add(self, linear, x, to):
        to.add_(linear(x))

    def rope(self, x, positions, angles, out, also=None, addresses=None):
        out.copy_(reference.rope(x, positions, angles.cos, angles.sin))
        if also is not None:
            also.copy_(out)
        if addresses is not None:
            torch.ops.flume_by_address.push(out, addresses)

    def rope_keys(self, k, v, positions, angles, out, kv):
        self.rope(k, positions, angles, out, kv[0])
        kv[1].copy_(v)

    def merge(self, q, k, v, o, lse, scale):
        return reference.decode_merge(q, k, v, o, lse, scale).to(q.dtype)

    def direct_merge(self, q, k, v, o_at, lse_at, scale):
        return torch.ops.flume_by_address.merge(q, k, v, o_at, lse_at, scale).to(q.dtype)

    def shortlist(self, logits, asks, out):
        count = out.tokens.shape[1] - 1
        tokens, values, sums = reference.shortlist(logits, asks[0], asks[1].view(torch.float64), count)
        out.tokens.fill_(-1)  # what nobody asked for is nobody's
        wanted = (asks[2] != 0)[:, None] | (torch.arange(tokens.shape[1], device=asks.device) < 2)
        tokens, values = torch.where(wanted, tokens, -1), torch.where(wanted, values, torch.nan)
        out.tokens[:, : tokens.shape[1]].copy_(tokens)
        out.values[:, : values.shape[1]].copy_(values)
        out.sums.copy_(sums)


def small_config(**changes):
    fields = {
        "architecture": "llama", "vocab_size": 61, "context_tokens": 96, "eos_token_ids": (0,),
        "hidden_size": 24, "intermediate_size": 40, "num_layers": 3, "num_query_heads": 4,
        "num_kv_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
    }  # fmt: skip
    return ModelConfig(**fields | changes)


def random_weights(config, dtype=torch.float32, seed=0):
    """Large enough that attention is far from uniform, and norms and biases matter."""
    weights = allocate(config, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for name, place in slots(weights).items():
        mean = 1.0 if "norm" in name else 0.0
        place.normal_(mean, 0.3, generator=generator)
    if dtype is torch.float32:
        return weights
    cast = allocate(config, dtype)
    for target, source in zip(slots(cast).values(), slots(weights).values(), strict=True):
        target.copy_(source)
    return cast


class HeldPast:
    """The attention nodes of some sequences: ranges of past K and V per node, cut anew whenever asked.

    A `StepExchange` for steps of a `StepBuffers`. Partials take a random while to come; meanwhile, and in
    every round of the driver's loop, the device does a random number of operations.
    """

    def __init__(self, device, config, nodes, seed=0, most_operations=16):
        self.random = random.Random(seed)
        self._device = device
        self._config = config
        self._nodes = nodes
        self._most_operations = most_operations
        self._past = {}  # (sequence, layer) -> [(k, v) of each node, [n, kv_heads, head_dim]]
        self.queries = 0
        self.stall = None  # called in place of every answer, when set

    def begin(self, sequences, buffers):
        """The next step: row r is a token of sequences[r]."""
        self._sequences = sequences
        self._buffers = buffers
        self._late = {}
        self._new = []  # (sequence, layer, k, v) of this step, kept only if it is finished

    def hold(self, sequence, layers):
        """A sequence's (k, v) of each layer, cut into ranges over the nodes at random."""
        tokens = len(layers[0][0])
        cuts = sorted(self.random.randint(0, tokens) for _ in range(self._nodes - 1))
        for layer, (k, v) in enumerate(layers):
            self._past[sequence, layer] = [
                (k[start:end].clone(), v[start:end].clone()) for start, end in pairwise([0, *cuts, tokens])
            ]

    def recut(self):
        """Every range elsewhere: what no graph may notice."""
        for sequence in {sequence for sequence, _ in self._past}:
            layers = [self._past[sequence, layer] for layer in range(self._config.num_layers)]
            self.hold(sequence, [tuple(map(torch.cat, zip(*parts, strict=True))) for parts in layers])

    def progress(self):
        self._device.run_some(self.random.randint(0, self._most_operations))

    def query(self, microbatch, layer):
        self.queries += 1
        self._late[microbatch] = self.random.randint(0, 10)

    def arrived(self, microbatch, layer):
        if self.stall is not None:
            return self.stall()
        if self._late[microbatch]:
            self._late[microbatch] -= 1
            return False
        buffers = self._buffers.microbatches[microbatch]
        for row, sequence in self._rows(buffers):
            q = buffers.queries[row : row + 1]
            part = 0
            for k, v in self._past[sequence, layer]:
                if len(k):
                    o, lse = attention_reference.attention(
                        q, k.transpose(0, 1), v.transpose(0, 1), self._config.head_dim**-0.5
                    )
                    buffers.part_o[part, row], buffers.part_lse[part, row] = o[0], lse[0]
                    part += 1
            buffers.part_o[part:, row] = torch.nan  # nobody's
        return True

    def keys(self, microbatch, layer):
        buffers = self._buffers.microbatches[microbatch]
        for row, sequence in self._rows(buffers):
            k, v = buffers.keys[layer, :, row : row + 1].clone()
            self._new.append((sequence, layer, k, v))

    def finish(self):
        """The step went well: its tokens are held, each on some node."""
        tails = {sequence: self.random.randrange(self._nodes) for sequence in self._sequences}
        assert len(self._new) == len(self._sequences) * self._config.num_layers
        for sequence, layer, k, v in self._new:
            parts = self._past[sequence, layer]
            old_k, old_v = parts[tails[sequence]]
            parts[tails[sequence]] = torch.cat([old_k, k]), torch.cat([old_v, v])

    def _rows(self, buffers):
        rows = range(buffers.rows.start, min(buffers.rows.stop, len(self._sequences)))
        return [(at, self._sequences[row]) for at, row in enumerate(rows)]
