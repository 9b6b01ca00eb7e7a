"""Triton kernels of the GPU data path, each with a slow definition in `reference`.

    attention_plan     which program attends to which keys: made once per step, on the device
    decode_attention   attention over paged KV, split over the chip, with log-sum-exp
    merge_partials     one answer from the partials of several ranges
    decode_merge       the same, with each token's attention to itself
    direct             queries, flags and partials by address, in memory that two devices share
    causal_attention   a chunk's attention to itself, in plain torch
    kv_append          new keys and values into their blocks
    skinny_linear      the dense path's products for few rows, with what stands beside them
    rms_norm, rope, silu_mul, sampling     its small parts
    shortlist          what the host needs of each row of logits to choose its token
    signals            flags between the device, the host and peers: the device's end
    flags, watchdog    the host's end of them, and a deadline for what waits there
    shared_memory    device memory that two processes map
    device, cuda_device    what captured steps ask of a device, and the real one
    preload             Triton made ready in a process that opens no device

Importing this package loads neither torch nor triton; `flags` and `watchdog` need neither, `device` needs
torch, the others both. A node on a CPU never imports them. Ways of running a kernel that depend on the card
are in `tuning`, which remembers them on disk; `decode_tuning` and `linear_tuning` measure them.
"""

from __future__ import annotations

from importlib.util import find_spec


def has_triton() -> bool:
    """Whether the modules of this package can be imported here. Says nothing about a device."""
    return find_spec("triton") is not None
