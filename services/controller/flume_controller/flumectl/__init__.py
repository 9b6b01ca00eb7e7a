"""`flumectl`: run a cluster on this machine, and operate one anywhere. One module per verb.

A verb's module is imported when it is asked for: a scale should not wait for what only `up` needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click

MODULES = {name: name for name in (
    *("up", "down", "generate", "logs"),
    *("status", "get", "describe", "top", "events"),
    *("scale", "autoscale", "rollout", "wait", "drain", "config"),
    *("doctor", "version", "completion"),
)} | {"undrain": "drain"}  # fmt: skip
"""Where each command is; it is called there as it is here."""


class Commands(click.Group):
    """A group whose commands end on Ctrl-C as programs do in a shell: silently, with 128 + SIGINT."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in MODULES:
            return None
        found = getattr(import_module(f"{__name__}.{MODULES[cmd_name]}"), cmd_name)
        assert isinstance(found, click.Command)
        return found

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
