"""`simulated_gpu_attention`, telling what its process imported, into the file that IMPORTS_FILE names.

Besides, it goes the way of a real GPU's engine as far as that leads without one.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path


def main():
    before = set(sys.modules)
    import simulated_gpu_attention

    _go_the_real_way()
    try:
        return simulated_gpu_attention.main()
    finally:
        Path(os.environ["IMPORTS_FILE"]).write_text(json.dumps(sorted(set(sys.modules) - before)))


def _go_the_real_way():
    import torch
    from flume_attention.cuda import backend, ops
    from flume_attention.errors import ConfigRefused
    from flume_common.layout import KvLayout

    if not torch.cuda.is_available():
        with suppress(ConfigRefused):
            backend.open_gpu()
        ops.TritonAttention(KvLayout(3, 4, 2, 64, "float32", 16), torch.device("cpu"))
