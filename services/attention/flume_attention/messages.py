"""What supervisor and engine tell each other over `flume_common.engine_link`.

Requests carry a number that the answer repeats; everything else may come at any time. Epochs of weight nodes
are verified before they come here, and are `flume_common.epochs.epoch_of`: those of an incarnation that is
over are below all of the next one's.
"""

from __future__ import annotations

import msgspec
from flume_common.layout import KvLayout
from flume_common.read_speed import ReadSums


class Attach(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Set up a lane. Answered by Attached or Refused. Fields as in the AttachRequest of the API.

    `node_epoch` is this node's own fencing number, which its messages on the lane carry.
    """

    request: int
    weight_node: str
    epoch: int
    layout: KvLayout
    worker_address: bytes
    lane: int
    max_step_tokens: int
    max_step_sequences: int
    kv_frame_bytes: int
    node_epoch: int = 0
    direct: bool = False


class Renew(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """The weight node of a lane has this epoch now. Answered by Renewed, or Refused for an older one."""

    request: int
    weight_node: str
    epoch: int


class Detach(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """End a lane. Answered by Detached, also when there is none, or Refused for an older epoch."""

    request: int
    weight_node: str
    epoch: int


class Adopt(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """What is kept of this sequence, from now on for this weight node? Answered by Kept, or Refused.

    Fields as in AdoptRequest.
    """

    request: int
    weight_node: str
    epoch: int
    sequence: str
    lost_node: str = ""
    lost_below: int = 0


class SetDraining(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Stop granting credit, or start again. Answered by Report."""

    request: int
    draining: bool


class Lend(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Let another attention node pull ranges. Answered by Lent or Refused. Fields as in LendRequest."""

    request: int
    puller: str
    epoch: int
    layout: KvLayout
    worker_address: bytes
    lane: int
    chunk_bytes: int
    node_epoch: int = 0


class PreparePull(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """What a lender has to know. Answered by Prepared, or Refused where nothing can be pulled now."""

    request: int


class Pull(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Pull closed ranges, (sequence, start, tokens) each, for a weight node. Answered by Pulled or Refused.

    `lane` is the number that Prepared gave, the rest of the lane as Lent said.
    """

    request: int
    weight_node: str
    epoch: int
    lender: str
    lender_epoch: int
    lender_worker_address: bytes
    lender_lane: int
    lane: int
    ranges: list[tuple[str, int, int]]
    node_epoch: int = 0


class EndPull(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Nobody waits for the pull, or for what was prepared, of this request any more. Not answered."""

    request: int


class Ask(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """How are you? Answered by Report."""

    request: int


class Started(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """The engine is ready for Attach.

    `main_at_s` (monotonic): when its process had been made and all imported. What came then, by phase:
    `port` is the UCX worker; on a GPU `device` is its context, `kv_memory` all memory for KV, `first_kernel`
    what kernels and pinned memory take once. On a CPU pages of KV come with tokens.
    """

    main_at_s: float
    phases_ms: dict[str, float]


class Preparing(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """The answer to that request takes a while, kernels may have to be compiled: no sign of life before."""

    for_request: int


class CannotRun(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """In place of Started: there is no use in trying again."""

    reason: str


class Attached(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    request: int
    worker_address: bytes
    lane: int
    capacity_blocks: int
    direct_region: bytes = b""
    no_region: str = ""  # why there is none, if one was asked for


class Renewed(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    request: int
    attached: bool  # there is a lane


class Detached(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    request: int


class Kept(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Start and number of tokens of each range, in order. `in_use`: by a lane that is up."""

    request: int
    ranges: list[tuple[int, int]]
    in_use: bool


class Lent(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    request: int
    worker_address: bytes
    lane: int


class Prepared(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    request: int
    worker_address: bytes
    lane: int
    layout: KvLayout
    chunk_bytes: int


class Pulled(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Start and sequence key of the ranges that are here, whole, and wait to be taken."""

    request: int
    ranges: list[tuple[int, int]]
    reason: str = ""  # why others are not


class Refused(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """`field` is what of the request is to blame."""

    request: int
    field: str
    detail: str


class LaneReport(msgspec.Struct, frozen=True, kw_only=True):
    """One lane; fields as in LaneStats of the API."""

    weight_node: str
    epoch: int
    granted_blocks: int
    held_blocks: int
    sequences: int
    ranges: int
    steps: int
    direct: bool = False


class Report(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """State of the engine. `request` 0: sent unasked, after a change."""

    request: int = 0
    draining: bool = False
    capacity_tokens: int = 0
    used_tokens: int = 0
    capacity_blocks: int = 0
    used_blocks: int = 0
    epoch_rejected: int = 0
    orphan_tokens: int = 0
    pulled_tokens: int = 0
    pulls_refused: int = 0
    reads: ReadSums = msgspec.field(default_factory=ReadSums)
    lanes: list[LaneReport] = []


class LaneClosed(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """A lane ended, and what it held is freed."""

    weight_node: str
    epoch: int
    reason: str


class StepNotTaken(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """A step was refused; for the log."""

    weight_node: str
    step: int
    refusal: str
    detail: str


ToEngine = Attach | Renew | Detach | Adopt | SetDraining | Ask | Lend | PreparePull | Pull | EndPull
FromEngine = (
    Started
    | Preparing
    | CannotRun
    | Attached
    | Renewed
    | Detached
    | Kept
    | Lent
    | Prepared
    | Pulled
    | Refused
    | Report
    | LaneClosed
    | StepNotTaken
)
