"""One thing and what belongs to it, chosen from lists of everything. Pure.

* Unknown
  + UnknownKind   nothing of the kind can be described
  + NoSuchThing   there is none of that name
  + NotKnown      none was found, and not all answered
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from flume_protos.v1 import admin_pb2 as pb
from flume_protos.v1 import common_pb2


class Unknown(Exception):
    """Base of what can't be described."""


class UnknownKind(Unknown):
    def __init__(self, kind: str) -> None:
        super().__init__(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        self.kind = kind


class NoSuchThing(Unknown):
    def __init__(self, kind: str, name: str) -> None:
        super().__init__(f"there is no {kind} {name!r}")
        self.kind = kind
        self.name = name


class NotKnown(Unknown):
    """There may be one of that name: nodes that could tell did not answer in time."""

    def __init__(self, kind: str, name: str, unanswered: Sequence[str]) -> None:
        super().__init__(
            f"no {kind} {name!r} was found, and {', '.join(unanswered)} did not answer in time: try again"
        )
        self.kind = kind
        self.name = name


@dataclass(frozen=True, slots=True)
class Everything:
    """All there is, as the lists of the admin API give it."""

    nodes: Sequence[pb.Node] = ()
    routes: Sequence[common_pb2.Route] = ()
    requests: Sequence[pb.Request] = ()
    unanswered: Sequence[str] = ()
    """Weight nodes whose requests are unknown: they did not answer in time."""
    events: Sequence[pb.Event] = ()


def describe(kind: str, name: str, everything: Everything) -> pb.DescribeObjectReply:
    """Raises UnknownKind, NoSuchThing."""
    if kind not in KINDS:
        raise UnknownKind(kind)
    return KINDS[kind](name, everything)


def _node(name: str, everything: Everything) -> pb.DescribeObjectReply:
    found = [node for node in everything.nodes if node.id == name]
    if not found:
        raise NoSuchThing("node", name)
    return pb.DescribeObjectReply(
        nodes=found,
        routes=[route for route in everything.routes if name in (route.weight_node, *holders(route))],
        requests=[item for item in everything.requests if item.weight_node == name],
        unanswered=[node for node in everything.unanswered if node == name],
        events=_about(everything, name),
    )


def _route(name: str, everything: Everything) -> pb.DescribeObjectReply:
    found = [route for route in everything.routes if route.sequence == name]
    if not found:
        raise NoSuchThing("route", name)
    return _sequence(name, found, everything)


def _request(name: str, everything: Everything) -> pb.DescribeObjectReply:
    if not any(item.id == name for item in everything.requests):
        if everything.unanswered:
            raise NotKnown("request", name, everything.unanswered)
        raise NoSuchThing("request", name)
    return _sequence(name, [route for route in everything.routes if route.sequence == name], everything)


def _sequence(
    name: str, routes: Sequence[common_pb2.Route], everything: Everything
) -> pb.DescribeObjectReply:
    requests = [item for item in everything.requests if item.id == name]
    ids = {item.weight_node for item in requests}
    for route in routes:
        ids |= {route.weight_node, *holders(route)}
    return pb.DescribeObjectReply(
        nodes=[node for node in everything.nodes if node.id in ids],
        routes=routes,
        requests=requests,
        unanswered=everything.unanswered,
        events=_about(everything, name),
    )


def _cluster(name: str, everything: Everything) -> pb.DescribeObjectReply:
    return pb.DescribeObjectReply(nodes=everything.nodes, events=everything.events)


KINDS: Mapping[str, Callable[[str, Everything], pb.DescribeObjectReply]] = {
    "node": _node,
    "route": _route,
    "request": _request,
    "cluster": _cluster,
}


def holders(route: common_pb2.Route) -> list[str]:
    """The attention nodes that hold a part, each once, in order of their first token."""
    return list(dict.fromkeys(item.node for item in route.ranges))


def _about(everything: Everything, name: str) -> list[pb.Event]:
    return [event for event in everything.events if event.object.rpartition("/")[2] == name]
