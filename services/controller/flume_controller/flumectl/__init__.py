"""`flumectl`: run a cluster on this machine, and operate one anywhere. One module per verb."""

from __future__ import annotations

from typing import Any

import click

from flume_controller.flumectl.autoscale import autoscale
from flume_controller.flumectl.completion import completion
from flume_controller.flumectl.config import config
from flume_controller.flumectl.describe import describe
from flume_controller.flumectl.down import down
from flume_controller.flumectl.drain import drain, undrain
from flume_controller.flumectl.events import events
from flume_controller.flumectl.generate import generate
from flume_controller.flumectl.get import get
from flume_controller.flumectl.logs import logs
from flume_controller.flumectl.rollout import rollout
from flume_controller.flumectl.scale import scale
from flume_controller.flumectl.status import status
from flume_controller.flumectl.top import top
from flume_controller.flumectl.up import up
from flume_controller.flumectl.version import version
from flume_controller.flumectl.wait import wait


class Commands(click.Group):
    """A group whose commands end on Ctrl-C as programs do in a shell: silently, with 128 + SIGINT."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise SystemExit(130) from None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def main() -> None:
    """Run and operate KernelFlume: LLM serving whose unit of elasticity is KV capacity.

    \b
    First steps:
      flumectl up --detach
      flumectl generate "Why is the sky blue?"
      flumectl scale attention --replicas 3
      flumectl down
    """


for command in (
    *(up, down, generate, logs),
    *(status, get, describe, top, events),
    *(scale, autoscale, rollout, wait, drain, undrain, config),
    *(version, completion),
):
    main.add_command(command)
