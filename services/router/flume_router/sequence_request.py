"""What one sequence asks for: token ids in, whatever front door it came through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
from flume_protos.v1 import weight_pb2 as pb


class SequenceRequest(msgspec.Struct, frozen=True):
    id: str
    prompt_token_ids: Sequence[int]
    sampling: pb.Sampling
    stop: tuple[str, ...]
    deadline_at: float
    """Loop time; the weight node is given what remains."""
    metadata: Mapping[str, str]
    """gRPC metadata of the call."""
    skip_special_tokens: bool = True
    """False: control tokens are shown in the answer's text."""
