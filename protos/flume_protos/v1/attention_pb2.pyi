from flume_protos.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AttachRequest(_message.Message):
    __slots__ = ("weight_node", "epoch", "protocol_version", "layout", "worker_address", "lane", "max_step_tokens", "max_step_sequences", "kv_frame_bytes", "direct", "credentials", "node")
    WEIGHT_NODE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    WORKER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    LANE_FIELD_NUMBER: _ClassVar[int]
    MAX_STEP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_STEP_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    KV_FRAME_BYTES_FIELD_NUMBER: _ClassVar[int]
    DIRECT_FIELD_NUMBER: _ClassVar[int]
    CREDENTIALS_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    weight_node: str
    epoch: int
    protocol_version: int
    layout: _common_pb2.KvLayout
    worker_address: bytes
    lane: int
    max_step_tokens: int
    max_step_sequences: int
    kv_frame_bytes: int
    direct: bool
    credentials: _common_pb2.Credentials
    node: str
    def __init__(self, weight_node: _Optional[str] = ..., epoch: _Optional[int] = ..., protocol_version: _Optional[int] = ..., layout: _Optional[_Union[_common_pb2.KvLayout, _Mapping]] = ..., worker_address: _Optional[bytes] = ..., lane: _Optional[int] = ..., max_step_tokens: _Optional[int] = ..., max_step_sequences: _Optional[int] = ..., kv_frame_bytes: _Optional[int] = ..., direct: _Optional[bool] = ..., credentials: _Optional[_Union[_common_pb2.Credentials, _Mapping]] = ..., node: _Optional[str] = ...) -> None: ...

class AttachReply(_message.Message):
    __slots__ = ("node", "epoch", "worker_address", "lane", "capacity_blocks", "direct_region")
    NODE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    WORKER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    LANE_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DIRECT_REGION_FIELD_NUMBER: _ClassVar[int]
    node: str
    epoch: int
    worker_address: bytes
    lane: int
    capacity_blocks: int
    direct_region: bytes
    def __init__(self, node: _Optional[str] = ..., epoch: _Optional[int] = ..., worker_address: _Optional[bytes] = ..., lane: _Optional[int] = ..., capacity_blocks: _Optional[int] = ..., direct_region: _Optional[bytes] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("weight_node", "epoch", "credentials")
    WEIGHT_NODE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CREDENTIALS_FIELD_NUMBER: _ClassVar[int]
    weight_node: str
    epoch: int
    credentials: _common_pb2.Credentials
    def __init__(self, weight_node: _Optional[str] = ..., epoch: _Optional[int] = ..., credentials: _Optional[_Union[_common_pb2.Credentials, _Mapping]] = ...) -> None: ...

class RenewReply(_message.Message):
    __slots__ = ("attached",)
    ATTACHED_FIELD_NUMBER: _ClassVar[int]
    attached: bool
    def __init__(self, attached: _Optional[bool] = ...) -> None: ...

class DetachRequest(_message.Message):
    __slots__ = ("weight_node", "epoch", "credentials")
    WEIGHT_NODE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CREDENTIALS_FIELD_NUMBER: _ClassVar[int]
    weight_node: str
    epoch: int
    credentials: _common_pb2.Credentials
    def __init__(self, weight_node: _Optional[str] = ..., epoch: _Optional[int] = ..., credentials: _Optional[_Union[_common_pb2.Credentials, _Mapping]] = ...) -> None: ...

class DetachReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AdoptRequest(_message.Message):
    __slots__ = ("weight_node", "epoch", "sequence", "lost_node", "lost_below", "credentials")
    WEIGHT_NODE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    LOST_NODE_FIELD_NUMBER: _ClassVar[int]
    LOST_BELOW_FIELD_NUMBER: _ClassVar[int]
    CREDENTIALS_FIELD_NUMBER: _ClassVar[int]
    weight_node: str
    epoch: int
    sequence: str
    lost_node: str
    lost_below: int
    credentials: _common_pb2.Credentials
    def __init__(self, weight_node: _Optional[str] = ..., epoch: _Optional[int] = ..., sequence: _Optional[str] = ..., lost_node: _Optional[str] = ..., lost_below: _Optional[int] = ..., credentials: _Optional[_Union[_common_pb2.Credentials, _Mapping]] = ...) -> None: ...

class HeldRange(_message.Message):
    __slots__ = ("start", "tokens")
    START_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    start: int
    tokens: int
    def __init__(self, start: _Optional[int] = ..., tokens: _Optional[int] = ...) -> None: ...

class AdoptReply(_message.Message):
    __slots__ = ("ranges", "in_use")
    RANGES_FIELD_NUMBER: _ClassVar[int]
    IN_USE_FIELD_NUMBER: _ClassVar[int]
    ranges: _containers.RepeatedCompositeFieldContainer[HeldRange]
    in_use: bool
    def __init__(self, ranges: _Optional[_Iterable[_Union[HeldRange, _Mapping]]] = ..., in_use: _Optional[bool] = ...) -> None: ...

class PulledRange(_message.Message):
    __slots__ = ("sequence", "start", "tokens")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    sequence: str
    start: int
    tokens: int
    def __init__(self, sequence: _Optional[str] = ..., start: _Optional[int] = ..., tokens: _Optional[int] = ...) -> None: ...

class PullRequest(_message.Message):
    __slots__ = ("weight_node", "epoch", "lender", "lender_address", "ranges", "credentials")
    WEIGHT_NODE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LENDER_FIELD_NUMBER: _ClassVar[int]
    LENDER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    RANGES_FIELD_NUMBER: _ClassVar[int]
    CREDENTIALS_FIELD_NUMBER: _ClassVar[int]
    weight_node: str
    epoch: int
    lender: str
    lender_address: str
    ranges: _containers.RepeatedCompositeFieldContainer[PulledRange]
    credentials: _common_pb2.Credentials
    def __init__(self, weight_node: _Optional[str] = ..., epoch: _Optional[int] = ..., lender: _Optional[str] = ..., lender_address: _Optional[str] = ..., ranges: _Optional[_Iterable[_Union[PulledRange, _Mapping]]] = ..., credentials: _Optional[_Union[_common_pb2.Credentials, _Mapping]] = ...) -> None: ...

class PullReply(_message.Message):
    __slots__ = ("ranges", "reason")
    RANGES_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ranges: _containers.RepeatedCompositeFieldContainer[PulledRange]
    reason: str
    def __init__(self, ranges: _Optional[_Iterable[_Union[PulledRange, _Mapping]]] = ..., reason: _Optional[str] = ...) -> None: ...

class LendRequest(_message.Message):
    __slots__ = ("puller", "epoch", "protocol_version", "layout", "worker_address", "lane", "chunk_bytes")
    PULLER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    WORKER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    LANE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    puller: str
    epoch: int
    protocol_version: int
    layout: _common_pb2.KvLayout
    worker_address: bytes
    lane: int
    chunk_bytes: int
    def __init__(self, puller: _Optional[str] = ..., epoch: _Optional[int] = ..., protocol_version: _Optional[int] = ..., layout: _Optional[_Union[_common_pb2.KvLayout, _Mapping]] = ..., worker_address: _Optional[bytes] = ..., lane: _Optional[int] = ..., chunk_bytes: _Optional[int] = ...) -> None: ...

class LendReply(_message.Message):
    __slots__ = ("epoch", "worker_address", "lane")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    WORKER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    LANE_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    worker_address: bytes
    lane: int
    def __init__(self, epoch: _Optional[int] = ..., worker_address: _Optional[bytes] = ..., lane: _Optional[int] = ...) -> None: ...

class StatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LaneStats(_message.Message):
    __slots__ = ("weight_node", "epoch", "granted_blocks", "held_blocks", "sequences", "ranges", "steps", "direct")
    WEIGHT_NODE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    GRANTED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HELD_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    RANGES_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    DIRECT_FIELD_NUMBER: _ClassVar[int]
    weight_node: str
    epoch: int
    granted_blocks: int
    held_blocks: int
    sequences: int
    ranges: int
    steps: int
    direct: bool
    def __init__(self, weight_node: _Optional[str] = ..., epoch: _Optional[int] = ..., granted_blocks: _Optional[int] = ..., held_blocks: _Optional[int] = ..., sequences: _Optional[int] = ..., ranges: _Optional[int] = ..., steps: _Optional[int] = ..., direct: _Optional[bool] = ...) -> None: ...

class StatsReply(_message.Message):
    __slots__ = ("node", "state", "capacity_tokens", "used_tokens", "capacity_blocks", "used_blocks", "kv_bytes", "epoch_rejected", "lanes", "safe_to_delete", "orphan_tokens", "pulled_tokens", "pulls_refused", "reads", "engine")
    NODE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    USED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    USED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    EPOCH_REJECTED_FIELD_NUMBER: _ClassVar[int]
    LANES_FIELD_NUMBER: _ClassVar[int]
    SAFE_TO_DELETE_FIELD_NUMBER: _ClassVar[int]
    ORPHAN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PULLED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PULLS_REFUSED_FIELD_NUMBER: _ClassVar[int]
    READS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    node: str
    state: _common_pb2.NodeState
    capacity_tokens: int
    used_tokens: int
    capacity_blocks: int
    used_blocks: int
    kv_bytes: int
    epoch_rejected: int
    lanes: _containers.RepeatedCompositeFieldContainer[LaneStats]
    safe_to_delete: bool
    orphan_tokens: int
    pulled_tokens: int
    pulls_refused: int
    reads: ReadSums
    engine: _common_pb2.EngineActivity
    def __init__(self, node: _Optional[str] = ..., state: _Optional[_Union[_common_pb2.NodeState, str]] = ..., capacity_tokens: _Optional[int] = ..., used_tokens: _Optional[int] = ..., capacity_blocks: _Optional[int] = ..., used_blocks: _Optional[int] = ..., kv_bytes: _Optional[int] = ..., epoch_rejected: _Optional[int] = ..., lanes: _Optional[_Iterable[_Union[LaneStats, _Mapping]]] = ..., safe_to_delete: _Optional[bool] = ..., orphan_tokens: _Optional[int] = ..., pulled_tokens: _Optional[int] = ..., pulls_refused: _Optional[int] = ..., reads: _Optional[_Union[ReadSums, _Mapping]] = ..., engine: _Optional[_Union[_common_pb2.EngineActivity, _Mapping]] = ...) -> None: ...

class ReadSums(_message.Message):
    __slots__ = ("steps", "bytes", "seconds", "bytes_squared", "seconds_squared", "bytes_seconds")
    STEPS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    BYTES_SQUARED_FIELD_NUMBER: _ClassVar[int]
    SECONDS_SQUARED_FIELD_NUMBER: _ClassVar[int]
    BYTES_SECONDS_FIELD_NUMBER: _ClassVar[int]
    steps: float
    bytes: float
    seconds: float
    bytes_squared: float
    seconds_squared: float
    bytes_seconds: float
    def __init__(self, steps: _Optional[float] = ..., bytes: _Optional[float] = ..., seconds: _Optional[float] = ..., bytes_squared: _Optional[float] = ..., seconds_squared: _Optional[float] = ..., bytes_seconds: _Optional[float] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("deadline_s", "node")
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    deadline_s: float
    node: str
    def __init__(self, deadline_s: _Optional[float] = ..., node: _Optional[str] = ...) -> None: ...

class DrainReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class UndrainRequest(_message.Message):
    __slots__ = ("node",)
    NODE_FIELD_NUMBER: _ClassVar[int]
    node: str
    def __init__(self, node: _Optional[str] = ...) -> None: ...

class UndrainReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
