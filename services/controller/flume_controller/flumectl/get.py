"""`flumectl get`: what is there now, or with -w every change to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import click
from flume_protos.v1 import admin_pb2

from flume_controller.flumectl.client import CALL_DEADLINE_S, Target, admin
from flume_controller.flumectl.errors import CommandError
from flume_controller.flumectl.options import output_option, target_options
from flume_controller.flumectl.output import Column, Row, Table, render, render_one
from flume_controller.flumectl.rows import (
    NODE_COLUMNS,
    REQUEST_COLUMNS,
    ROUTE_COLUMNS,
    node_row,
    request_row,
    route_row,
)

WATCH_POLL_S = 0.5
_AGEING = "age_s"  # always changes, and so says nothing


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of thing that can be listed."""

    name: str
    key: str  # the field that names a row
    columns: Sequence[Column]
    fetch: Callable[[Any], Listing]


@dataclass(frozen=True, slots=True)
class Listing:
    """What was found, and which nodes did not answer in time: what they would have added is unknown."""

    rows: list[Row]
    unanswered: Sequence[str] = ()
    unreadable: Sequence[str] = ()
    """Keys of values in etcd that could not be read, and why; they are left out."""


def _nodes(stub: Any) -> Listing:
    reply = stub.ListNodes(admin_pb2.ListNodesRequest(), timeout=CALL_DEADLINE_S)
    return Listing([node_row(node) for node in reply.nodes])


def _routes(stub: Any) -> Listing:
    reply = stub.ListRoutes(admin_pb2.ListRoutesRequest(), timeout=CALL_DEADLINE_S)
    return Listing([route_row(route) for route in reply.routes], unreadable=reply.unreadable)


def _requests(stub: Any) -> Listing:
    reply = stub.ListRequests(admin_pb2.ListRequestsRequest(), timeout=CALL_DEADLINE_S)
    return Listing([request_row(request) for request in reply.requests], reply.unanswered)


KINDS = {
    kind.name: kind
    for kind in (
        Kind("nodes", "id", NODE_COLUMNS, _nodes),
        Kind("routes", "sequence", ROUTE_COLUMNS, _routes),
        Kind("requests", "id", REQUEST_COLUMNS, _requests),
    )
}


class KindParam(click.ParamType[Kind]):
    """`nodes`, and as kubectl allows also `node`."""

    name = "kind"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Kind:
        text = str(value)
        kind = KINDS.get(text) or KINDS.get(f"{text}s")
        if kind is None:
            self.fail(f"{text!r} is not one of {', '.join(KINDS)}", param, ctx)
        return kind

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[click.shell_completion.CompletionItem]:
        return [click.shell_completion.CompletionItem(name) for name in KINDS if name.startswith(incomplete)]

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "{" + "|".join(KINDS) + "}"


@click.command()
@click.argument("kind", type=KindParam())
@click.argument("id", required=False)
@output_option
@click.option("-w", "--watch", is_flag=True, help="Go on and print every row that changes.")
@target_options
def get(target: Target, kind: Kind, id: str | None, fmt: str, watch: bool) -> None:
    """List nodes, routes (which node holds which tokens) or requests, all or the one named ID.

    \b
    Examples:
      flumectl get nodes
      flumectl get nodes attention-1 -o yaml
      flumectl get routes -w
      flumectl get nodes -o json | jq '.[].kv_used_tokens'
    """
    with admin(target) as stub:
        listing = kind.fetch(stub)
        for what in listing.unreadable:
            click.echo(f"Warning: left out, as it is not a {kind.name[:-1]}: {what}", err=True)
        rows = _select(kind, listing, id)
        if watch:
            _watch(kind, stub, rows, id, fmt)
        elif rows or fmt in ("json", "yaml"):
            click.echo(render(rows, kind.columns, fmt))
        elif not listing.unanswered:
            click.echo(f"No {kind.name} found.", err=True)
    if listing.unanswered and id is None:
        raise CommandError(
            f"{', '.join(listing.unanswered)} did not answer in time: what runs there is unknown"
        )


def _select(kind: Kind, listing: Listing, id: str | None) -> list[Row]:
    if id is None:
        return listing.rows
    found = [row for row in listing.rows if row[kind.key] == id]
    if not found and listing.unanswered:
        unanswered = ", ".join(listing.unanswered)
        raise CommandError(f"no {kind.name[:-1]} {id!r} was found, but {unanswered} did not answer in time")
    if not found:
        raise CommandError(f"no {kind.name[:-1]} {id!r}: `flumectl get {kind.name}` lists them")
    return found


def _watch(kind: Kind, stub: Any, rows: list[Row], id: str | None, fmt: str) -> None:
    table = Table(kind.columns, wide=fmt == "wide")
    known: dict[str, Row] = {}
    unanswered: Sequence[str] = ()
    while True:
        if unanswered:  # neither gone nor changed: not known just now
            rows = [*rows, *(row for row in known.values() if row.get("weight_node") in unanswered)]
        now = {row[kind.key]: row for row in rows if id in (None, row[kind.key])}
        for row in changes(known, now):
            click.echo(render_one(row, kind.columns, fmt, table))
        known = now
        time.sleep(WATCH_POLL_S)
        listing = kind.fetch(stub)
        rows, unanswered = listing.rows, listing.unanswered


def changes(known: dict[str, Row], now: dict[str, Row]) -> list[Row]:
    """Rows that are new or differ; those that are gone once more, with `deleted`. Pure."""
    gone = [{**row, "deleted": True} for key, row in known.items() if key not in now]
    written = [row for key, row in now.items() if key not in known or _differ(known[key], row)]
    return [*gone, *written]


def _differ(before: Row, after: Row) -> bool:
    return {**before, _AGEING: None} != {**after, _AGEING: None}
