"""`flumectl generate`: an answer to a prompt, printed as it comes."""

from __future__ import annotations

from typing import Any

import click
import grpc
from flume_protos.v1 import admin_pb2, router_pb2, router_pb2_grpc, weight_pb2

from flume_controller.flumectl.client import CALL_DEADLINE_S, Target, admin
from flume_controller.flumectl.duration import DURATION
from flume_controller.flumectl.errors import CommandError, explained
from flume_controller.flumectl.options import MAX_COUNT, target_options


@click.command()
@click.argument("prompt")
@click.option("--model", default="", help="The served model's name; by default the only one.")
@click.option(
    "--max-tokens",
    type=click.IntRange(1, MAX_COUNT),
    default=256,
    show_default=True,
    help="Length of the answer.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(0, 2),
    default=0.0,
    show_default=True,
    help="0 takes the most likely token each time.",
)
@click.option("--seed", type=click.IntRange(-(2**63), 2**63 - 1), help="Makes sampling repeatable.")
@click.option("--system", default="", help="A system message before the prompt.")
@click.option("--raw", is_flag=True, help="Continue the prompt as plain text: no chat template.")
@click.option("--router", metavar="HOST:PORT", help="The router's gRPC address; by default asked for.")
@click.option(
    "--timeout", "timeout_s", type=DURATION, default="10m", show_default=True, help="For the whole answer."
)
@target_options
def generate(
    target: Target,
    prompt: str,
    model: str,
    max_tokens: int,
    temperature: float,
    seed: int | None,
    system: str,
    raw: bool,
    router: str | None,
    timeout_s: float,
) -> None:
    """Stream an answer to PROMPT. Ctrl-C cancels it and frees what it holds.

    \b
    Examples:
      flumectl generate "Why is the sky blue?"
      flumectl generate --raw "Once upon a time" --max-tokens 50 --temperature 0.8 --seed 7
    """
    if raw and system:
        raise click.UsageError("--system needs the chat template that --raw leaves out")
    sampling = weight_pb2.Sampling(temperature=temperature, max_tokens=max_tokens, seed=seed)
    request = router_pb2.GenerateTextRequest(model=model, sampling=sampling)
    if raw:
        request.prompt = prompt
    else:
        if system:
            request.messages.add(role="system", content=system)
        request.messages.add(role="user", content=prompt)
    _stream(router or _router_of(target), request, timeout_s)


def _router_of(target: Target) -> str:
    with admin(target) as stub:
        reply = stub.ListNodes(admin_pb2.ListNodesRequest(), timeout=CALL_DEADLINE_S)
    routers = [node for node in reply.nodes if node.role == "router"]
    ready = [node.address for node in routers if node.state == "READY"]
    if not ready:
        raise CommandError("no router is ready: `flumectl get nodes` shows what is there")
    return str(ready[0])


def _stream(address: str, request: router_pb2.GenerateTextRequest, timeout_s: float) -> None:
    with explained(address, "the router"), grpc.insecure_channel(address) as channel:
        try:
            _print(
                router_pb2_grpc.RouterStub(channel).Generate(  # type: ignore[no-untyped-call]
                    request, timeout=timeout_s
                )
            )
        except KeyboardInterrupt:
            # Leaving the channel cancels the call, and so frees what the answer holds.
            click.echo()
            click.echo("cancelled", err=True)
            raise SystemExit(130) from None


def _print(replies: Any) -> None:
    finished = False
    for reply in replies:
        click.echo(reply.text, nl=False)
        finished = finished or reply.HasField("finish")
    click.echo()
    if not finished:
        raise CommandError("the stream ended without saying that it is finished")
