"""Service discovery for Prometheus' `http_sd_configs`: every process that has metrics. Pure.

A node that came by a scale is scraped from the next refresh on, one that has gone no longer.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from flume_common.membership import Member

PATH = "/sd"


def targets(members: Iterable[Member], cluster: str) -> bytes:
    """JSON: [{"targets": [address], "labels": {...}}], one group a member, by role and id."""
    groups = [
        {
            "targets": [member.metrics_address],
            "labels": {"cluster": cluster, "role": str(member.role), "node": member.id},
        }
        for member in sorted(members, key=lambda member: (member.role, member.id))
        if member.metrics_address
    ]
    return msgspec.json.encode(groups)
