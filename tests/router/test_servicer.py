"""gRPC Generate: the same pipeline behind another door."""

import asyncio

import grpc
import pytest
from flume_common.failures import Failure
from flume_protos.v1 import router_pb2 as pb
from flume_protos.v1 import router_pb2_grpc as rpc
from flume_protos.v1 import weight_pb2
from flume_router import errors
from flume_router.http.errors import reply_of
from flume_router.servicer import STATUS_OF
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

SAID = "Hello there, wörld 🙂! The end."


@pytest.fixture
async def stub(router):
    async with grpc.aio.insecure_channel(router.grpc_address) as channel:
        yield rpc.RouterStub(channel)


async def collect(call):
    return [reply async for reply in call]


async def test_a_prompt_is_answered(stub, weight, text_model):
    replies = await collect(stub.Generate(pb.GenerateTextRequest(prompt="Hi")))
    assert "".join(reply.text for reply in replies) == SAID
    ids = [i for reply in replies for i in reply.token_ids]
    assert ids == text_model.tokenizer.encode_now(SAID, add_special_tokens=False)
    assert replies[-1].finish.reason == weight_pb2.STOP
    assert not any(reply.HasField("finish") for reply in replies[:-1])
    assert replies[-1].finish.prompt_tokens == 1
    assert {reply.request_id for reply in replies} == {weight.requests[0].request_id}


async def test_messages_are_rendered(stub, weight, text_model):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    request = pb.GenerateTextRequest(messages=[pb.ChatMessage(**message) for message in messages])
    await collect(stub.Generate(request))
    prompt = text_model.chat_template.render(messages)
    expected = text_model.tokenizer.encode_now(prompt, add_special_tokens=False)
    assert list(weight.requests[0].prompt_token_ids) == expected


async def test_sampling_is_passed_on_and_stop_strings_are_kept_back(stub, weight):
    sampling = weight_pb2.Sampling(temperature=0.5, seed=3, max_tokens=20)
    request = pb.GenerateTextRequest(prompt="Hi", sampling=sampling, stop=["the"])
    replies = await collect(stub.Generate(request))
    assert "".join(reply.text for reply in replies) == "Hello "
    sampling.eos_token_ids.append(2)  # the tokenizer's
    assert weight.requests[0].sampling == sampling


@pytest.mark.parametrize(
    "request_, code",
    [
        (pb.GenerateTextRequest(model="gpt-5", prompt="Hi"), grpc.StatusCode.NOT_FOUND),
        (pb.GenerateTextRequest(), grpc.StatusCode.INVALID_ARGUMENT),
        (
            pb.GenerateTextRequest(prompt="x", messages=[pb.ChatMessage(role="user", content="y")]),
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
        (
            pb.GenerateTextRequest(messages=[pb.ChatMessage(role="tool", content="y")]),
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
        (pb.GenerateTextRequest(prompt="x", stop=[""]), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.GenerateTextRequest(prompt="word " * 600), grpc.StatusCode.INVALID_ARGUMENT),
        (
            pb.GenerateTextRequest(prompt="x", sampling=weight_pb2.Sampling(stop_token_ids=[60_000])),
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
    ],
)
async def test_wrong_requests_have_a_status(stub, weight, request_, code):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(stub.Generate(request_))
    assert caught.value.code() is code
    assert caught.value.details()
    assert weight.requests == []


async def test_what_the_weight_node_refuses_is_passed_on(stub, weight):
    async def script(request, context):
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "needs 9 of 8 blocks")
        yield

    weight.script = script
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(stub.Generate(pb.GenerateTextRequest(prompt="x")))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert caught.value.details() == "needs 9 of 8 blocks"


async def test_cancelling_the_call_frees_the_kv(stub, weight, says, eventually):
    weight.script = says([100] * 500, pause_s=0.05)
    call = stub.Generate(pb.GenerateTextRequest(prompt="x"))
    async for _ in call:
        break
    call.cancel()
    assert await eventually(lambda: weight.running == 0) < 0.5


async def test_a_clients_deadline_frees_the_kv(stub, weight, says, eventually):
    weight.script = says([100] * 500, pause_s=0.05)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(stub.Generate(pb.GenerateTextRequest(prompt="x"), timeout=0.3))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert await eventually(lambda: weight.running == 0) < 0.5


async def test_health_says_whether_there_is_a_weight_node(start_router, start_weight, says, until):
    async with (
        start_router(wait_ready=False) as router,
        grpc.aio.insecure_channel(router.grpc_address) as channel,
    ):
        health = health_pb2_grpc.HealthStub(channel)

        async def status(service):
            return (await health.Check(health_pb2.HealthCheckRequest(service=service))).status

        assert await status("liveness") == health_pb2.HealthCheckResponse.SERVING
        assert await status("readiness") == health_pb2.HealthCheckResponse.NOT_SERVING

        async def serving():
            return await status("flume.v1.Router") == health_pb2.HealthCheckResponse.SERVING

        async with start_weight("a", says("a")):
            await until(serving)


async def test_reflection_knows_the_service(router):
    def services():
        with grpc.insecure_channel(router.grpc_address) as channel:
            return list(ProtoReflectionDescriptorDatabase(channel).get_services())

    assert "flume.v1.Router" in await asyncio.to_thread(services)


def all_errors(cls=errors.RouterError):
    return {cls} | {found for child in cls.__subclasses__() for found in all_errors(child)}


def test_every_router_error_has_a_status_at_both_doors():
    samples = [
        errors.BadRequest("x"),
        errors.ContextTooLong(5, 6, None, param="prompt"),
        errors.CapacityExceeded("x"),
        errors.ModelNotFound("a", "b"),
        errors.NoWeightNode("m"),
        errors.WeightNodeLost("n", "x"),
        errors.WeightNodeSilent("n", 5),
        errors.NoLane("n", "x"),
        errors.NotYet("n", "x"),
        errors.NotContinued("m", "x", 5),
        errors.ShuttingDown(),
        errors.DeadlineExceeded(5),
        errors.WeightNodeFailed("n", "x"),
        errors.SequenceFailed("n", Failure.MODEL_OUTPUT_INVALID, "x"),
        errors.EngineCrashed("n", "x"),
        errors.ReaderFailed("x"),
        errors.Overloaded("limit", "x"),
        errors.InternalError("This", ValueError("x")),
    ]
    assert {type(sample) for sample in samples} == all_errors() - {errors.RouterError, errors.Unavailable}
    for sample in samples:
        assert any(isinstance(sample, kind) for kind in STATUS_OF)
        assert 400 <= reply_of(sample).status < 600
