"""The torch dtype of each `flume_common.layout` dtype name. Importing it loads torch."""

from __future__ import annotations

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
