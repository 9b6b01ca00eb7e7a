from flume_protos.v1 import attention_pb2 as _attention_pb2
from flume_protos.v1 import common_pb2 as _common_pb2
from flume_protos.v1 import weight_pb2 as _weight_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ScaleRequest(_message.Message):
    __slots__ = ("replicas", "current_replicas", "actor", "dry_run", "revision", "deadline_s")
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    CURRENT_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    replicas: int
    current_replicas: int
    actor: str
    dry_run: bool
    revision: int
    deadline_s: float
    def __init__(self, replicas: _Optional[int] = ..., current_replicas: _Optional[int] = ..., actor: _Optional[str] = ..., dry_run: _Optional[bool] = ..., revision: _Optional[int] = ..., deadline_s: _Optional[float] = ...) -> None: ...

class ScaleReply(_message.Message):
    __slots__ = ("previous", "replicas", "generation")
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    previous: int
    replicas: int
    generation: int
    def __init__(self, previous: _Optional[int] = ..., replicas: _Optional[int] = ..., generation: _Optional[int] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ("watch",)
    WATCH_FIELD_NUMBER: _ClassVar[int]
    watch: bool
    def __init__(self, watch: _Optional[bool] = ...) -> None: ...

class Condition(_message.Message):
    __slots__ = ("type", "status", "reason", "message", "last_transition_time_s", "observed_generation")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    LAST_TRANSITION_TIME_S_FIELD_NUMBER: _ClassVar[int]
    OBSERVED_GENERATION_FIELD_NUMBER: _ClassVar[int]
    type: str
    status: str
    reason: str
    message: str
    last_transition_time_s: float
    observed_generation: int
    def __init__(self, type: _Optional[str] = ..., status: _Optional[str] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ..., last_transition_time_s: _Optional[float] = ..., observed_generation: _Optional[int] = ...) -> None: ...

class Autoscale(_message.Message):
    __slots__ = ("enabled", "paused", "min", "max")
    ENABLED_FIELD_NUMBER: _ClassVar[int]
    PAUSED_FIELD_NUMBER: _ClassVar[int]
    MIN_FIELD_NUMBER: _ClassVar[int]
    MAX_FIELD_NUMBER: _ClassVar[int]
    enabled: bool
    paused: bool
    min: int
    max: int
    def __init__(self, enabled: _Optional[bool] = ..., paused: _Optional[bool] = ..., min: _Optional[int] = ..., max: _Optional[int] = ...) -> None: ...

class Leaving(_message.Message):
    __slots__ = ("node", "by_s")
    NODE_FIELD_NUMBER: _ClassVar[int]
    BY_S_FIELD_NUMBER: _ClassVar[int]
    node: str
    by_s: float
    def __init__(self, node: _Optional[str] = ..., by_s: _Optional[float] = ...) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("cluster", "desired", "ready", "preparing", "draining", "generation", "observed_generation", "conditions", "weight_nodes", "routers", "store_connected", "model", "set_by", "min", "max", "autoscale", "leader", "drained", "leaving", "activity", "unanswered", "incarnation")
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    DESIRED_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    PREPARING_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    OBSERVED_GENERATION_FIELD_NUMBER: _ClassVar[int]
    CONDITIONS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_NODES_FIELD_NUMBER: _ClassVar[int]
    ROUTERS_FIELD_NUMBER: _ClassVar[int]
    STORE_CONNECTED_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SET_BY_FIELD_NUMBER: _ClassVar[int]
    MIN_FIELD_NUMBER: _ClassVar[int]
    MAX_FIELD_NUMBER: _ClassVar[int]
    AUTOSCALE_FIELD_NUMBER: _ClassVar[int]
    LEADER_FIELD_NUMBER: _ClassVar[int]
    DRAINED_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    ACTIVITY_FIELD_NUMBER: _ClassVar[int]
    UNANSWERED_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    cluster: str
    desired: int
    ready: int
    preparing: int
    draining: int
    generation: int
    observed_generation: int
    conditions: _containers.RepeatedCompositeFieldContainer[Condition]
    weight_nodes: int
    routers: int
    store_connected: bool
    model: str
    set_by: str
    min: int
    max: int
    autoscale: Autoscale
    leader: str
    drained: _containers.RepeatedScalarFieldContainer[str]
    leaving: _containers.RepeatedCompositeFieldContainer[Leaving]
    activity: _containers.RepeatedCompositeFieldContainer[_weight_pb2.WeightStatusReply]
    unanswered: _containers.RepeatedScalarFieldContainer[str]
    incarnation: StoreIncarnation
    def __init__(self, cluster: _Optional[str] = ..., desired: _Optional[int] = ..., ready: _Optional[int] = ..., preparing: _Optional[int] = ..., draining: _Optional[int] = ..., generation: _Optional[int] = ..., observed_generation: _Optional[int] = ..., conditions: _Optional[_Iterable[_Union[Condition, _Mapping]]] = ..., weight_nodes: _Optional[int] = ..., routers: _Optional[int] = ..., store_connected: _Optional[bool] = ..., model: _Optional[str] = ..., set_by: _Optional[str] = ..., min: _Optional[int] = ..., max: _Optional[int] = ..., autoscale: _Optional[_Union[Autoscale, _Mapping]] = ..., leader: _Optional[str] = ..., drained: _Optional[_Iterable[str]] = ..., leaving: _Optional[_Iterable[_Union[Leaving, _Mapping]]] = ..., activity: _Optional[_Iterable[_Union[_weight_pb2.WeightStatusReply, _Mapping]]] = ..., unanswered: _Optional[_Iterable[str]] = ..., incarnation: _Optional[_Union[StoreIncarnation, _Mapping]] = ...) -> None: ...

class StoreIncarnation(_message.Message):
    __slots__ = ("id", "since_s", "reason")
    ID_FIELD_NUMBER: _ClassVar[int]
    SINCE_S_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    id: str
    since_s: float
    reason: str
    def __init__(self, id: _Optional[str] = ..., since_s: _Optional[float] = ..., reason: _Optional[str] = ...) -> None: ...

class ListNodesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Node(_message.Message):
    __slots__ = ("id", "role", "state", "pid", "host", "address", "epoch", "kv_capacity_tokens", "kv_used_tokens", "age_s", "version", "sequences", "leave_by_s", "metrics_address", "engine_deaths", "last_engine_error", "last_engine_death_s", "model_failures", "last_model_failure", "reason")
    ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    KV_CAPACITY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_USED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    LEAVE_BY_S_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_DEATHS_FIELD_NUMBER: _ClassVar[int]
    LAST_ENGINE_ERROR_FIELD_NUMBER: _ClassVar[int]
    LAST_ENGINE_DEATH_S_FIELD_NUMBER: _ClassVar[int]
    MODEL_FAILURES_FIELD_NUMBER: _ClassVar[int]
    LAST_MODEL_FAILURE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    id: str
    role: str
    state: str
    pid: int
    host: str
    address: str
    epoch: int
    kv_capacity_tokens: int
    kv_used_tokens: int
    age_s: float
    version: str
    sequences: int
    leave_by_s: float
    metrics_address: str
    engine_deaths: int
    last_engine_error: str
    last_engine_death_s: float
    model_failures: int
    last_model_failure: str
    reason: str
    def __init__(self, id: _Optional[str] = ..., role: _Optional[str] = ..., state: _Optional[str] = ..., pid: _Optional[int] = ..., host: _Optional[str] = ..., address: _Optional[str] = ..., epoch: _Optional[int] = ..., kv_capacity_tokens: _Optional[int] = ..., kv_used_tokens: _Optional[int] = ..., age_s: _Optional[float] = ..., version: _Optional[str] = ..., sequences: _Optional[int] = ..., leave_by_s: _Optional[float] = ..., metrics_address: _Optional[str] = ..., engine_deaths: _Optional[int] = ..., last_engine_error: _Optional[str] = ..., last_engine_death_s: _Optional[float] = ..., model_failures: _Optional[int] = ..., last_model_failure: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class ListNodesReply(_message.Message):
    __slots__ = ("nodes", "revision")
    NODES_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    nodes: _containers.RepeatedCompositeFieldContainer[Node]
    revision: int
    def __init__(self, nodes: _Optional[_Iterable[_Union[Node, _Mapping]]] = ..., revision: _Optional[int] = ...) -> None: ...

class ListRoutesRequest(_message.Message):
    __slots__ = ("sequence",)
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    sequence: str
    def __init__(self, sequence: _Optional[str] = ...) -> None: ...

class ListRoutesReply(_message.Message):
    __slots__ = ("routes", "revision", "unreadable")
    ROUTES_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    UNREADABLE_FIELD_NUMBER: _ClassVar[int]
    routes: _containers.RepeatedCompositeFieldContainer[_common_pb2.Route]
    revision: int
    unreadable: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, routes: _Optional[_Iterable[_Union[_common_pb2.Route, _Mapping]]] = ..., revision: _Optional[int] = ..., unreadable: _Optional[_Iterable[str]] = ...) -> None: ...

class ListRequestsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Request(_message.Message):
    __slots__ = ("id", "weight_node", "state", "prompt_tokens", "completion_tokens", "age_s", "computed_tokens")
    ID_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_NODE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    id: str
    weight_node: str
    state: str
    prompt_tokens: int
    completion_tokens: int
    age_s: float
    computed_tokens: int
    def __init__(self, id: _Optional[str] = ..., weight_node: _Optional[str] = ..., state: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., age_s: _Optional[float] = ..., computed_tokens: _Optional[int] = ...) -> None: ...

class ListRequestsReply(_message.Message):
    __slots__ = ("requests", "unanswered")
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    UNANSWERED_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[Request]
    unanswered: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, requests: _Optional[_Iterable[_Union[Request, _Mapping]]] = ..., unanswered: _Optional[_Iterable[str]] = ...) -> None: ...

class DescribeObjectRequest(_message.Message):
    __slots__ = ("kind", "name")
    KIND_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    kind: str
    name: str
    def __init__(self, kind: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class DescribeObjectReply(_message.Message):
    __slots__ = ("nodes", "routes", "requests", "events", "lanes", "status", "settings", "spec_revision", "unanswered", "activity")
    NODES_FIELD_NUMBER: _ClassVar[int]
    ROUTES_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    LANES_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    SPEC_REVISION_FIELD_NUMBER: _ClassVar[int]
    UNANSWERED_FIELD_NUMBER: _ClassVar[int]
    ACTIVITY_FIELD_NUMBER: _ClassVar[int]
    nodes: _containers.RepeatedCompositeFieldContainer[Node]
    routes: _containers.RepeatedCompositeFieldContainer[_common_pb2.Route]
    requests: _containers.RepeatedCompositeFieldContainer[Request]
    events: _containers.RepeatedCompositeFieldContainer[Event]
    lanes: _containers.RepeatedCompositeFieldContainer[_attention_pb2.LaneStats]
    status: StatusReply
    settings: _containers.RepeatedCompositeFieldContainer[Setting]
    spec_revision: int
    unanswered: _containers.RepeatedScalarFieldContainer[str]
    activity: _weight_pb2.WeightStatusReply
    def __init__(self, nodes: _Optional[_Iterable[_Union[Node, _Mapping]]] = ..., routes: _Optional[_Iterable[_Union[_common_pb2.Route, _Mapping]]] = ..., requests: _Optional[_Iterable[_Union[Request, _Mapping]]] = ..., events: _Optional[_Iterable[_Union[Event, _Mapping]]] = ..., lanes: _Optional[_Iterable[_Union[_attention_pb2.LaneStats, _Mapping]]] = ..., status: _Optional[_Union[StatusReply, _Mapping]] = ..., settings: _Optional[_Iterable[_Union[Setting, _Mapping]]] = ..., spec_revision: _Optional[int] = ..., unanswered: _Optional[_Iterable[str]] = ..., activity: _Optional[_Union[_weight_pb2.WeightStatusReply, _Mapping]] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("id", "object", "type", "reason", "message", "source", "count", "first_s", "last_s")
    ID_FIELD_NUMBER: _ClassVar[int]
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    FIRST_S_FIELD_NUMBER: _ClassVar[int]
    LAST_S_FIELD_NUMBER: _ClassVar[int]
    id: str
    object: str
    type: str
    reason: str
    message: str
    source: str
    count: int
    first_s: float
    last_s: float
    def __init__(self, id: _Optional[str] = ..., object: _Optional[str] = ..., type: _Optional[str] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ..., source: _Optional[str] = ..., count: _Optional[int] = ..., first_s: _Optional[float] = ..., last_s: _Optional[float] = ...) -> None: ...

class ListEventsRequest(_message.Message):
    __slots__ = ("object",)
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    object: str
    def __init__(self, object: _Optional[str] = ...) -> None: ...

class ListEventsReply(_message.Message):
    __slots__ = ("events",)
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    events: _containers.RepeatedCompositeFieldContainer[Event]
    def __init__(self, events: _Optional[_Iterable[_Union[Event, _Mapping]]] = ...) -> None: ...

class DrainNodeRequest(_message.Message):
    __slots__ = ("node", "dry_run", "deadline_s")
    NODE_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    node: str
    dry_run: bool
    deadline_s: float
    def __init__(self, node: _Optional[str] = ..., dry_run: _Optional[bool] = ..., deadline_s: _Optional[float] = ...) -> None: ...

class DrainNodeReply(_message.Message):
    __slots__ = ("changed", "generation")
    CHANGED_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    changed: bool
    generation: int
    def __init__(self, changed: _Optional[bool] = ..., generation: _Optional[int] = ...) -> None: ...

class SetAutoscaleRequest(_message.Message):
    __slots__ = ("enabled", "min", "max", "tpot_slo_ms", "actor", "dry_run")
    ENABLED_FIELD_NUMBER: _ClassVar[int]
    MIN_FIELD_NUMBER: _ClassVar[int]
    MAX_FIELD_NUMBER: _ClassVar[int]
    TPOT_SLO_MS_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    enabled: bool
    min: int
    max: int
    tpot_slo_ms: float
    actor: str
    dry_run: bool
    def __init__(self, enabled: _Optional[bool] = ..., min: _Optional[int] = ..., max: _Optional[int] = ..., tpot_slo_ms: _Optional[float] = ..., actor: _Optional[str] = ..., dry_run: _Optional[bool] = ...) -> None: ...

class SetAutoscaleReply(_message.Message):
    __slots__ = ("before", "after", "generation")
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    before: Autoscale
    after: Autoscale
    generation: int
    def __init__(self, before: _Optional[_Union[Autoscale, _Mapping]] = ..., after: _Optional[_Union[Autoscale, _Mapping]] = ..., generation: _Optional[int] = ...) -> None: ...

class Setting(_message.Message):
    __slots__ = ("name", "value", "error", "default", "type", "range", "unit", "description", "readers", "scopes", "revision", "set_by", "set_at_s")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    RANGE_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    READERS_FIELD_NUMBER: _ClassVar[int]
    SCOPES_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    SET_BY_FIELD_NUMBER: _ClassVar[int]
    SET_AT_S_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: str
    error: str
    default: str
    type: str
    range: str
    unit: str
    description: str
    readers: _containers.RepeatedScalarFieldContainer[str]
    scopes: _containers.RepeatedScalarFieldContainer[str]
    revision: int
    set_by: str
    set_at_s: float
    def __init__(self, name: _Optional[str] = ..., value: _Optional[str] = ..., error: _Optional[str] = ..., default: _Optional[str] = ..., type: _Optional[str] = ..., range: _Optional[str] = ..., unit: _Optional[str] = ..., description: _Optional[str] = ..., readers: _Optional[_Iterable[str]] = ..., scopes: _Optional[_Iterable[str]] = ..., revision: _Optional[int] = ..., set_by: _Optional[str] = ..., set_at_s: _Optional[float] = ...) -> None: ...

class GetConfigRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class GetConfigReply(_message.Message):
    __slots__ = ("settings",)
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    settings: _containers.RepeatedCompositeFieldContainer[Setting]
    def __init__(self, settings: _Optional[_Iterable[_Union[Setting, _Mapping]]] = ...) -> None: ...

class Assignment(_message.Message):
    __slots__ = ("name", "value")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: str
    def __init__(self, name: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...

class SetConfigRequest(_message.Message):
    __slots__ = ("assignments", "actor", "dry_run")
    ASSIGNMENTS_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    assignments: _containers.RepeatedCompositeFieldContainer[Assignment]
    actor: str
    dry_run: bool
    def __init__(self, assignments: _Optional[_Iterable[_Union[Assignment, _Mapping]]] = ..., actor: _Optional[str] = ..., dry_run: _Optional[bool] = ...) -> None: ...

class SettingChange(_message.Message):
    __slots__ = ("name", "before", "after")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    name: str
    before: str
    after: str
    def __init__(self, name: _Optional[str] = ..., before: _Optional[str] = ..., after: _Optional[str] = ...) -> None: ...

class SetConfigReply(_message.Message):
    __slots__ = ("changes",)
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    changes: _containers.RepeatedCompositeFieldContainer[SettingChange]
    def __init__(self, changes: _Optional[_Iterable[_Union[SettingChange, _Mapping]]] = ...) -> None: ...

class DiffConfigRequest(_message.Message):
    __slots__ = ("assignments",)
    ASSIGNMENTS_FIELD_NUMBER: _ClassVar[int]
    assignments: _containers.RepeatedCompositeFieldContainer[Assignment]
    def __init__(self, assignments: _Optional[_Iterable[_Union[Assignment, _Mapping]]] = ...) -> None: ...

class ConfigHistoryRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class ConfigRecord(_message.Message):
    __slots__ = ("value", "previous", "set_by", "set_at_s")
    VALUE_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    SET_BY_FIELD_NUMBER: _ClassVar[int]
    SET_AT_S_FIELD_NUMBER: _ClassVar[int]
    value: str
    previous: str
    set_by: str
    set_at_s: float
    def __init__(self, value: _Optional[str] = ..., previous: _Optional[str] = ..., set_by: _Optional[str] = ..., set_at_s: _Optional[float] = ...) -> None: ...

class ConfigHistoryReply(_message.Message):
    __slots__ = ("name", "records")
    NAME_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    name: str
    records: _containers.RepeatedCompositeFieldContainer[ConfigRecord]
    def __init__(self, name: _Optional[str] = ..., records: _Optional[_Iterable[_Union[ConfigRecord, _Mapping]]] = ...) -> None: ...
