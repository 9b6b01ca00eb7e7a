"""The names of everything kept in etcd: `/flume/v1/<cluster>/…`. Names only; no I/O.

    incarnation/current     which history of etcd this is; epochs of another one are over
    spec/attention          what is wanted
    status/attention        what is, as the controller saw it
    members/<role>/<node>   who is there; bound to the member's lease
    routes/<sequence>       which node holds which tokens; bound to the owner's lease
    config/<scope>/<key>    settings
    config-history/<scope>/<key>   who changed a setting, and when
    election/controller/    candidates for leading
    events/                 what happened

Whatever names a group of keys is a prefix and ends in `/`, so that `weight/a` never matches `weight/ab`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote

ROOT = "/flume/v1"
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._:-]{0,126}[A-Za-z0-9])?")


def check_name(kind: str, name: str) -> str:
    """`name` itself, when it may be one segment of a key. Raises ValueError naming `kind` otherwise."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{kind} {name!r} must be 1 to 128 letters, digits, dots, colons, dashes or underscores, "
            "and begin and end with a letter or a digit"
        )
    return name


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one cluster. Raises ValueError for a name that can't be a segment of a key."""

    cluster: str

    def __post_init__(self) -> None:
        check_name("cluster", self.cluster)

    @property
    def root(self) -> str:
        return f"{ROOT}/{self.cluster}/"

    @property
    def incarnations(self) -> str:
        """Prefix of the one key below."""
        return f"{self.root}incarnation/"

    @property
    def incarnation(self) -> str:
        return f"{self.incarnations}current"

    @property
    def members(self) -> str:
        """Prefix of all members."""
        return f"{self.root}members/"

    def member(self, role: str, node: str) -> str:
        return f"{self.members}{check_name('role', role)}/{check_name('node', node)}"

    @property
    def routes(self) -> str:
        """Prefix of all routes."""
        return f"{self.root}routes/"

    def route(self, sequence: str) -> str:
        """Any text may name a sequence: what can't stand in a key is percent-encoded."""
        return self.routes + quote(sequence, safe=":")

    @property
    def spec_attention(self) -> str:
        return f"{self.root}spec/attention"

    @property
    def status_attention(self) -> str:
        return f"{self.root}status/attention"

    @property
    def config(self) -> str:
        """Prefix of all settings."""
        return f"{self.root}config/"

    def setting(self, scope: str, key: str) -> str:
        return f"{self.config}{check_name('scope', scope)}/{check_name('setting', key)}"

    @property
    def config_history(self) -> str:
        """Prefix of the histories of settings."""
        return f"{self.root}config-history/"

    def setting_history(self, scope: str, key: str) -> str:
        """The last changes of one setting, newest last."""
        return f"{self.config_history}{check_name('scope', scope)}/{check_name('setting', key)}"

    @property
    def election(self) -> str:
        """Prefix of the controllers that would lead."""
        return f"{self.root}election/controller/"

    @property
    def events(self) -> str:
        """Prefix of all events."""
        return f"{self.root}events/"
