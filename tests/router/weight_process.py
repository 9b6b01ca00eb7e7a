"""A weight node without a model, as a process of its own that may be killed: `ADDRESS TOKEN_ID…`.

It says the given tokens one by one, from where a request says it is. Its first line is its address.
"""

import asyncio
import sys

from flume_common.serving import serve
from flume_protos.v1 import weight_pb2 as pb
from flume_protos.v1 import weight_pb2_grpc as rpc

PAUSE_S = 0.03


class Weight(rpc.WeightServicer):
    def __init__(self, ids):
        self.ids = ids

    async def Describe(self, request, context):
        return pb.DescribeReply(model="smollm2-135m", vocab_size=49152, context_tokens=512)

    async def ListSequences(self, request, context):
        return pb.ListSequencesReply()

    async def Generate(self, request, context):
        for token_id in self.ids[len(request.output_token_ids) :]:
            await asyncio.sleep(PAUSE_S)
            yield pb.GenerateReply(token_ids=[token_id])
        prompt, answer = len(request.prompt_token_ids), len(self.ids)
        yield pb.GenerateReply(
            finish=pb.Finish(reason=pb.STOP, prompt_tokens=prompt, completion_tokens=answer)
        )


async def main():
    weight = Weight([int(argument) for argument in sys.argv[2:]])
    async with serve(sys.argv[1], lambda server: rpc.add_WeightServicer_to_server(weight, server), []) as up:
        print(up.address, flush=True)
        await asyncio.Event().wait()


asyncio.run(main())
