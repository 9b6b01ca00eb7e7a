"""Reading and changing the desired count in etcd. Every change compares the revision it was decided at.

* SpecError
  + OutOfBounds      the count lies outside the spec's own bounds
  + NotCurrent       the caller's `current` is not the desired count now
  + RevisionChanged  the spec is not at the revision the caller decided at
  + SpecConflict     others kept changing it at the same time
  + InvalidSpec      what is in etcd can't be read
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from flume_common.keys import Keys
from flume_common.store import Put, Store, mod_revision

from flume_controller.spec import Actor, AttentionSpec, Autoscale, Deadline, decode_spec, encode

_ATTEMPTS = 5


class SpecError(Exception):
    """Base of every refusal to change the desired count."""


class OutOfBounds(SpecError):
    def __init__(self, replicas: int, spec: AttentionSpec) -> None:
        super().__init__(f"replicas must be {spec.min} to {spec.max}, got {replicas}")
        self.replicas = replicas
        self.min = spec.min
        self.max = spec.max


class NotCurrent(SpecError):
    def __init__(self, expected: int, actual: int) -> None:
        super().__init__(f"expected {expected} current replicas, the desired number is {actual}")
        self.expected = expected
        self.actual = actual


class RevisionChanged(SpecError):
    def __init__(self, expected: int, actual: int) -> None:
        super().__init__(f"expected the spec at revision {expected}, it is at {actual}")
        self.expected = expected
        self.actual = actual


class SpecConflict(SpecError):
    def __init__(self) -> None:
        super().__init__(f"the desired number changed {_ATTEMPTS} times while it was being set; try again")


class InvalidSpec(SpecError):
    def __init__(self, key: str, reason: str, value: bytes = b"", revision: int = 0) -> None:
        """`value`: as it is in etcd, last written at `revision`."""
        super().__init__(
            f"{key} is not a valid spec: {reason}; `flumectl scale attention --replicas N` writes it anew"
        )
        self.key = key
        self.reason = reason
        self.value = value
        self.revision = revision


async def read(store: Store, keys: Keys) -> tuple[AttentionSpec | None, int]:
    """The spec and the revision it was last written at; (None, 0) when there is none."""
    found = await store.get(keys.spec_attention)
    if found is None:
        return None, 0
    try:
        return decode_spec(found.value), found.mod_revision
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise InvalidSpec(keys.spec_attention, str(error), found.value, found.mod_revision) from error


async def set_desired(
    store: Store,
    keys: Keys,
    replicas: int,
    *,
    actor: Actor,
    current: int | None,
    revision: int | None = None,
    deadline_s: float = 0.0,
    now_s: float,
) -> tuple[AttentionSpec, AttentionSpec]:
    """Set the desired count; the spec before and after. See `changed`.

    `current` and `revision` (of the spec's key) are preconditions. While another scale is under way the
    new count takes its place. Raises OutOfBounds, NotCurrent, RevisionChanged, SpecConflict,
    InvalidSpec, StoreError.
    """
    return await edit(
        store,
        keys,
        lambda spec: changed(
            spec, replicas, actor=actor, current=current, deadline_s=deadline_s, now_s=now_s
        ),
        revision=revision,
    )


async def set_autoscale(
    store: Store, keys: Keys, autoscale: Autoscale, *, revision: int | None = None, now_s: float
) -> tuple[AttentionSpec, AttentionSpec]:
    """Turn the autoscaler on or off; the spec before and after. Raises as `set_desired`.

    Turning it on ends the pause that a count set by hand began.
    """
    return await edit(
        store, keys, lambda spec: with_autoscale(spec, autoscale, now_s=now_s), revision=revision
    )


async def edit(
    store: Store,
    keys: Keys,
    change: Callable[[AttentionSpec], AttentionSpec],
    *,
    revision: int | None = None,
    repair: Callable[[InvalidSpec], AttentionSpec] | None = None,
    dry_run: bool = False,
) -> tuple[AttentionSpec, AttentionSpec]:
    """Replace the spec by what `change` makes of it; before and after. `change` may run several times.

    `repair` gives the spec to begin from where the one in etcd can't be read; what follows is written
    even if it asks for nothing new. With `dry_run` nothing is.
    """
    for _ in range(_ATTEMPTS):
        broken = False
        try:
            before, found = await read(store, keys)
        except InvalidSpec as error:
            if repair is None:
                raise
            before, found, broken = repair(error), error.revision, True
        if revision is not None and revision != found:
            raise RevisionChanged(revision, found)
        before = before or AttentionSpec(desired=0, generation=1)
        after = change(before)
        if broken and after == before:
            after = msgspec.structs.replace(before, generation=before.generation + 1)
        if dry_run or after == before:
            return before, after
        write = Put(keys.spec_attention, encode(after))
        result = await store.txn([mod_revision(keys.spec_attention, found)], [write])
        if result.succeeded:
            return before, after
    raise SpecConflict


def changed(
    spec: AttentionSpec,
    replicas: int,
    *,
    actor: Actor,
    current: int | None,
    deadline_s: float = 0.0,
    now_s: float,
) -> AttentionSpec:
    """The next generation of `spec`, or `spec` itself when it asks for nothing new. Pure.

    `deadline_s` is for the nodes that leave, those that do so already included; 0: they have none.
    Setting the count to what it is changes nothing without one.
    """
    if current is not None and current != spec.desired:
        raise NotCurrent(current, spec.desired)
    if not spec.min <= replicas <= spec.max:
        raise OutOfBounds(replicas, spec)
    autoscale = _pinned(spec.autoscale) if actor is not Actor.AUTOSCALER else spec.autoscale
    if (replicas, autoscale, deadline_s) == (spec.desired, spec.autoscale, 0.0):
        return spec
    return msgspec.structs.replace(
        spec,
        desired=replicas,
        scale_deadline=deadline_from(deadline_s, now_s),
        autoscale=autoscale,
        set_by=actor,
        generation=spec.generation + 1,
        updated_at_s=now_s,
    )


def deadline_from(deadline_s: float, now_s: float) -> Deadline | None:
    """None for 0."""
    return Deadline(within_s=deadline_s, by_s=now_s + deadline_s) if deadline_s else None


def with_autoscale(spec: AttentionSpec, autoscale: Autoscale, *, now_s: float) -> AttentionSpec:
    """The next generation of `spec`, or `spec` itself when it asks for nothing new. Pure."""
    if autoscale == spec.autoscale:
        return spec
    return msgspec.structs.replace(
        spec, autoscale=autoscale, generation=spec.generation + 1, updated_at_s=now_s
    )


def _pinned(autoscale: Autoscale) -> Autoscale:
    """A count set by hand stays: the autoscaler pauses until it is turned on again."""
    return msgspec.structs.replace(autoscale, paused=True) if autoscale.active else autoscale
