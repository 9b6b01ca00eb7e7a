"""What the router and a worker process say to each other: length-prefixed MessagePack over pipes."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from typing import Any

import msgspec
from flume_common.model_source import Kind as ModelKind
from flume_protos.v1 import weight_pb2 as pb

from flume_router.errors import BadRequest, ModelNotFound, RouterError
from flume_router.http.errors import HttpError
from flume_router.http.job import Job
from flume_router.http.sampling import Common
from flume_router.prompts import ModelLimits

LENGTH = struct.Struct(">I")
_ID = "i"  # of array: int32, as token ids on the wire are


class Setup(msgspec.Struct, frozen=True, tag=True):
    """The first frame: the model whose text side the worker loads."""

    path: str
    kind: ModelKind
    name: str
    model: str
    """What clients call it."""
    identity: str
    """See `identity.py`; a worker that finds other files does not serve."""
    parse_control_tokens: bool = False


class Task(msgspec.Struct, frozen=True, tag=True):
    """A request to read. `kind`: of `job.Kind`, or "grpc" for a GenerateTextRequest."""

    kind: str
    limits: ModelLimits
    data: bytes


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The answer to Setup."""


class JobRead(msgspec.Struct, frozen=True, tag=True):
    """A request that is right."""

    common: Common
    prompts: tuple[bytes, ...]
    echoes: tuple[str, ...]


class PromptRead(msgspec.Struct, frozen=True, tag=True):
    """The prompt of a gRPC request."""

    prompt: bytes


class Refused(msgspec.Struct, frozen=True, tag=True):
    """A request that is wrong: a BadRequest."""

    message: str
    param: str | None
    code: str | None


class RefusedModel(msgspec.Struct, frozen=True, tag=True):
    """A ModelNotFound."""

    model: str
    served: str


class RefusedHttp(msgspec.Struct, frozen=True, tag=True):
    """An HttpError."""

    status: int
    message: str
    code: str | None


class Failed(msgspec.Struct, frozen=True, tag=True):
    """A defect, or the model's files are others than at the router's start."""

    why: str


Reply = Ready | JobRead | PromptRead | Refused | RefusedModel | RefusedHttp | Failed


def _to_wire(value: Any) -> Any:
    if isinstance(value, pb.Sampling):
        return value.SerializeToString()
    raise NotImplementedError(type(value))


def _from_wire(kind: type, value: Any) -> Any:
    if kind is pb.Sampling:
        return pb.Sampling.FromString(value)
    raise NotImplementedError(kind)


_encoder = msgspec.msgpack.Encoder(enc_hook=_to_wire)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply, dec_hook=_from_wire)
_orders: msgspec.msgpack.Decoder[Setup | Task] = msgspec.msgpack.Decoder(Setup | Task)


def encode(frame: Setup | Task | Reply) -> bytes:
    """A frame with its length before it."""
    data = _encoder.encode(frame)
    return LENGTH.pack(len(data)) + data


def decode_order(data: bytes) -> Setup | Task:
    return _orders.decode(data)


def decode_reply(data: bytes) -> Reply:
    return _replies.decode(data)


def job_read(job: Job) -> JobRead:
    return JobRead(job.common, tuple(map(pack_ids, job.prompts)), job.echoes)


def job_of(read: JobRead) -> Job:
    return Job(read.common, tuple(map(unpack_ids, read.prompts)), read.echoes)


def pack_ids(token_ids: Sequence[int]) -> bytes:
    return array(_ID, token_ids).tobytes()


def unpack_ids(data: bytes) -> Sequence[int]:
    ids = array(_ID)
    ids.frombytes(data)
    return ids


def refusal_of(error: RouterError | HttpError) -> Refused | RefusedModel | RefusedHttp:
    """How an error travels."""
    if isinstance(error, HttpError):
        return RefusedHttp(error.status, str(error), error.code)
    if isinstance(error, ModelNotFound):
        return RefusedModel(error.model, error.served)
    return Refused(error.message, error.param, error.code)


def error_of(refusal: Refused | RefusedModel | RefusedHttp) -> RouterError | HttpError:
    """The error that travelled. A ContextTooLong arrives as a BadRequest of the same words and code."""
    match refusal:
        case RefusedHttp():
            return HttpError(refusal.status, refusal.message, code=refusal.code)
        case RefusedModel():
            return ModelNotFound(refusal.model, refusal.served)
        case Refused():
            return BadRequest(refusal.message, param=refusal.param, code=refusal.code)
