"""Server reflection under both of its names: `grpc.reflection.v1`, and v1alpha for older clients.

The two have the same messages. The library serves v1alpha only, so v1's calls go to the same servicer, and
its descriptors are v1alpha's under the other package.
"""

from __future__ import annotations

from collections.abc import Sequence

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_reflection.v1alpha import reflection, reflection_pb2
from grpc_reflection.v1alpha.reflection import aio

_V1, _V1ALPHA = "grpc.reflection.v1", "grpc.reflection.v1alpha"
_FILE = "grpc/reflection/v1/reflection.proto"
_SERVICE, _METHOD = "ServerReflection", "ServerReflectionInfo"
NAMES = (f"{_V1}.{_SERVICE}", f"{_V1ALPHA}.{_SERVICE}")


def enable(server: grpc.aio.Server, services: Sequence[str]) -> None:
    """Let clients list and describe `services` (full names) and reflection itself."""
    _describe_v1(descriptor_pool.Default())
    names = (*services, *NAMES)
    reflection.enable_server_reflection(names, server)
    handler = grpc.stream_stream_rpc_method_handler(
        aio.ReflectionServicer(names).ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(NAMES[0], {_METHOD: handler}),))


def _describe_v1(pool: descriptor_pool.DescriptorPool) -> None:
    file = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(file)
    file.name, file.package = _FILE, _V1
    file.ClearField("options")  # of other languages, and that v1alpha is deprecated
    for message in file.message_type:
        for field in message.field:
            if field.type_name:
                field.type_name = _renamed(field.type_name)
    for service in file.service:
        for method in service.method:
            method.input_type, method.output_type = _renamed(method.input_type), _renamed(method.output_type)
    pool.AddSerializedFile(file.SerializeToString())  # the same file twice is no error


def _renamed(type_name: str) -> str:
    return type_name.replace(f".{_V1ALPHA}.", f".{_V1}.", 1)
