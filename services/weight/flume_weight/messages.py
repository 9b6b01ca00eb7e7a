"""What the supervisor and the engine of a weight node say to each other over the engine link."""

from __future__ import annotations

from enum import StrEnum

import msgspec
from flume_common.config_schema import Microbatches
from flume_common.failures import Failure

from flume_weight.sampling import SamplingParams


class Stage(StrEnum):
    """What a live sequence does. These are the states that the API shows."""

    QUEUED = "QUEUED"  # nothing of it has been computed
    WAITING = "WAITING"  # for KV memory
    PREFILLING = "PREFILLING"
    DECODING = "DECODING"
    PAUSED = "PAUSED"  # it is computed again, or has said something and waits for memory


class KeptRange(msgspec.Struct, array_like=True):
    """A range that an attention node keeps for us since its weight node died."""

    node: str
    start: int
    tokens: int


class Submit(msgspec.Struct, tag=True):
    """Generate for one sequence.

    `output_token_ids` is what of its answer was said already, elsewhere; `kept` is where KV of it is left.
    """

    sequence: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    output_token_ids: list[int] = []
    kept: list[KeptRange] = []
    suspect: bool = False  # an engine has ended in a step of it: it gets steps of its own at first
    canary: bool = False  # never counted or listed, and ended rather than in another sequence's way


class Cancel(msgspec.Struct, tag=True):
    """Stop a sequence and free its KV; unknown names are ignored (it may just have ended)."""

    sequence: str


class OpenLane(msgspec.Struct, tag=True):
    """Make ready for another lane. Answered by LaneOpen."""


class CloseLane(msgspec.Struct, tag=True):
    """Nothing came of this lane."""

    lane: int


class Attach(msgspec.Struct, tag=True):
    """Open a lane to an attention node whose engine has already opened its end."""

    node: str
    worker_address: bytes
    send_lane: int
    receive_lane: int  # from LaneOpen
    capacity_blocks: int
    epoch: int = 0  # the node's; older messages are ignored
    direct_region: bytes = b""  # RegionHandle of device memory to be mapped, if there is one


class Detach(msgspec.Struct, tag=True):
    """The attention node is gone, or goes: close the lane and recover its sequences elsewhere."""

    node: str
    reason: str


class NodeDraining(msgspec.Struct, tag=True):
    """An attention node takes no new tails (or takes them again).

    `evacuating`: its closed ranges are to go to other nodes, too, rather than live on until they end.
    """

    node: str
    draining: bool
    evacuating: bool = False


class MovedRange(msgspec.Struct, array_like=True):
    """A closed range of a sequence."""

    sequence: str
    start: int
    tokens: int


class RangesMoved(msgspec.Struct, tag=True):
    """The answer to MoveRanges: those of its ranges that are on the target, whole, to be taken."""

    source: str
    target: str
    ranges: list[MovedRange]


class Epoch(msgspec.Struct, tag=True):
    """The weight node's fencing number, carried by every lane message from now on."""

    epoch: int


class Configure(msgspec.Struct, tag=True):
    """Settings that hold from the next step on."""

    tail_margin_tokens: int
    mixed_prefill_tokens: int
    step_timeout_s: float
    microbatches: Microbatches = "auto"
    step_target_ms: float = 0.0  # 0: chunks of prompts are as large as steps may be
    unavailable_wait_s: float = 5.0  # how long sequences wait for a lane where there is none


Inbound = (
    Submit | Cancel | OpenLane | CloseLane | Attach | Detach | NodeDraining | RangesMoved | Epoch | Configure
)


class Loading(msgspec.Struct, tag=True):
    """Progress of reading the model."""

    bytes_done: int
    bytes_total: int


class Ready(msgspec.Struct, tag=True):
    """The model is loaded and UCX is up."""

    architecture: str
    vocab_size: int
    context_tokens: int
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    block_tokens: int
    max_step_tokens: int
    max_step_sequences: int
    kv_frame_bytes: int
    load_s: float
    direct: bool = False  # regions of device memory can be mapped


class Refused(msgspec.Struct, tag=True):
    """The engine cannot start: a configuration or model error worth showing to a person."""

    message: str


class LaneOpen(msgspec.Struct, tag=True):
    """What an attention node needs for its end of a lane."""

    lane: int
    worker_address: bytes


class LaneUp(msgspec.Struct, tag=True):
    """The lane answered: the node is a candidate for tails. `hop`: how decode steps ask there."""

    node: str
    hop: str = "frames"  # or direct
    reason: str = ""  # why not direct, though a region was offered


class LaneLost(msgspec.Struct, tag=True):
    """The lane is down; `sequences` that had a part there are being recovered."""

    node: str
    reason: str
    sequences: int
    lost_tokens: int
    replaced: bool = False  # by another one, to what is another process of that node now


class NodeSilent(msgspec.Struct, tag=True):
    """An attention node left a step waiting: so many sequences wait for it now, others go on."""

    node: str
    sequences: int


class MoveRanges(msgspec.Struct, tag=True):
    """Have the target pull these ranges from the source. Answered by RangesMoved."""

    source: str
    target: str
    ranges: list[MovedRange]


class Recovered(msgspec.Struct, tag=True):
    """A sequence is where it was before it lost something. `cause` as in Recomputed."""

    sequence: str
    cause: str
    recomputed_tokens: int
    elapsed_s: float


class Adopted(msgspec.Struct, tag=True):
    """A sequence goes on from what its former weight node had stored: `tokens` taken over."""

    sequence: str
    tokens: int


class Recomputed(msgspec.Struct, tag=True):
    """Tokens computed again since the engine started, by cause; sent when that changes."""

    node_lost: int = 0
    preempted: int = 0
    weight_node_lost: int = 0


class EpochRejected(msgspec.Struct, tag=True):
    """Messages of attention nodes ignored for an older epoch, since the engine started; when that changes."""

    messages: int


class StepModel(msgspec.Struct, tag=True):
    """In how many microbatches the last decode step ran, and how far off predictions of two were whenever
    both were measured; on a GPU, when that changes. Errors are shares of what was measured; the bias is
    positive where predictions were too long."""

    microbatches: int
    comparisons: int
    error_ratio: float  # mean of absolute errors
    bias_ratio: float
    worst_error_ratio: float


class LogitRowsRead(msgspec.Struct, tag=True):
    """Rows whose logits the host had to read, in steps that sample on the device, since the engine started;
    when that changes."""

    rows: int


class TopToken(msgspec.Struct, array_like=True):
    """A token id and its natural-log probability."""

    token_id: int
    logprob: float


class Token(msgspec.Struct, array_like=True):
    """One new token of one sequence."""

    sequence: str
    token_id: int
    logprob: float | None = None
    top: list[TopToken] = []


class Produced(msgspec.Struct, tag=True):
    """All tokens of one step."""

    tokens: list[Token]


class Finished(msgspec.Struct, tag=True):
    """A sequence ended well: reason is "stop", "length" or "abort"."""

    sequence: str
    reason: str
    prompt_tokens: int
    completion_tokens: int
    stop_token_id: int = 0


class Failed(msgspec.Struct, tag=True):
    """A sequence ended with an error: code is a gRPC status name."""

    sequence: str
    code: str
    message: str
    failure: Failure | None = None


class StepSequences(msgspec.Struct, tag=True):
    """The sequences of the steps from now on; sent before a step whenever they change."""

    sequences: list[str]


class Contained(msgspec.Struct, tag=True):
    """An exception that ended no more than these sequences, or the lane to this node. For the log."""

    event: str
    traceback: str
    sequences: list[str]
    attention_node: str = ""


class EngineFailed(msgspec.Struct, tag=True):
    """The last words of an engine that ends by an exception, and the sequences of the step it ended in."""

    error: str
    sequences: list[str]


class RangeInfo(msgspec.Struct, array_like=True):
    """Tokens [start, end) on a node; end is None for the tail."""

    start: int
    end: int | None
    node: str


class RouteChanged(msgspec.Struct, tag=True):
    """A sequence's route is now this; no ranges: the sequence has ended."""

    sequence: str
    ranges: list[RangeInfo]


class SequenceState(msgspec.Struct, array_like=True):
    """One live sequence: its stage, and how many of its tokens have their KV stored."""

    sequence: str
    stage: Stage
    computed_tokens: int


class Sequences(msgspec.Struct, tag=True):
    """Every live sequence; sent after a step that computed prompts, and when one changes its stage."""

    sequences: list[SequenceState]


class Capacity(msgspec.Struct, tag=True):
    """KV capacity of all attached attention nodes, in tokens; sent when it changes."""

    capacity_tokens: int
    running: int
    waiting: int


Outbound = (
    Loading
    | Ready
    | Refused
    | LaneOpen
    | LaneUp
    | LaneLost
    | MoveRanges
    | Recovered
    | Adopted
    | NodeSilent
    | Recomputed
    | EpochRejected
    | StepModel
    | LogitRowsRead
    | Produced
    | Finished
    | Failed
    | StepSequences
    | Contained
    | EngineFailed
    | RouteChanged
    | Sequences
    | Capacity
)
