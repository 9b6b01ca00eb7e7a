from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class NodeState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NODE_STATE_UNSPECIFIED: _ClassVar[NodeState]
    PREPARING: _ClassVar[NodeState]
    READY: _ClassVar[NodeState]
    DRAINING: _ClassVar[NodeState]
NODE_STATE_UNSPECIFIED: NodeState
PREPARING: NodeState
READY: NodeState
DRAINING: NodeState

class KvLayout(_message.Message):
    __slots__ = ("num_layers", "num_query_heads", "num_kv_heads", "head_dim", "dtype", "block_tokens", "hash")
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_QUERY_HEADS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HASH_FIELD_NUMBER: _ClassVar[int]
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    block_tokens: int
    hash: str
    def __init__(self, num_layers: _Optional[int] = ..., num_query_heads: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., dtype: _Optional[str] = ..., block_tokens: _Optional[int] = ..., hash: _Optional[str] = ...) -> None: ...

class TokenRange(_message.Message):
    __slots__ = ("start", "end", "node")
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    start: int
    end: int
    node: str
    def __init__(self, start: _Optional[int] = ..., end: _Optional[int] = ..., node: _Optional[str] = ...) -> None: ...

class Route(_message.Message):
    __slots__ = ("sequence", "weight_node", "epoch", "ranges")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_NODE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RANGES_FIELD_NUMBER: _ClassVar[int]
    sequence: str
    weight_node: str
    epoch: int
    ranges: _containers.RepeatedCompositeFieldContainer[TokenRange]
    def __init__(self, sequence: _Optional[str] = ..., weight_node: _Optional[str] = ..., epoch: _Optional[int] = ..., ranges: _Optional[_Iterable[_Union[TokenRange, _Mapping]]] = ...) -> None: ...

class Credentials(_message.Message):
    __slots__ = ("incarnation", "secret")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    incarnation: str
    secret: bytes
    def __init__(self, incarnation: _Optional[str] = ..., secret: _Optional[bytes] = ...) -> None: ...

class EngineActivity(_message.Message):
    __slots__ = ("activity", "activity_s", "quiet_s", "done", "total", "step", "prefill_tokens", "sequences", "awaits_node")
    ACTIVITY_FIELD_NUMBER: _ClassVar[int]
    ACTIVITY_S_FIELD_NUMBER: _ClassVar[int]
    QUIET_S_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    AWAITS_NODE_FIELD_NUMBER: _ClassVar[int]
    activity: str
    activity_s: float
    quiet_s: float
    done: int
    total: int
    step: int
    prefill_tokens: int
    sequences: int
    awaits_node: bool
    def __init__(self, activity: _Optional[str] = ..., activity_s: _Optional[float] = ..., quiet_s: _Optional[float] = ..., done: _Optional[int] = ..., total: _Optional[int] = ..., step: _Optional[int] = ..., prefill_tokens: _Optional[int] = ..., sequences: _Optional[int] = ..., awaits_node: _Optional[bool] = ...) -> None: ...
