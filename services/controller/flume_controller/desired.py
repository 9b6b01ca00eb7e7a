"""Reading and changing the desired count in etcd. Every change compares the revision it was decided at.

* SpecError
  + OutOfBounds      the count lies outside the spec's own bounds
  + NotCurrent       the caller's `current` is not the desired count now
  + SpecConflict     others kept changing it at the same time
  + InvalidSpec      what is in etcd can't be read
"""

from __future__ import annotations

import msgspec
from flume_common.keys import Keys
from flume_common.store import Get, Put, Store, mod_revision

from flume_controller.spec import Actor, AttentionSpec, decode_spec, encode

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


class SpecConflict(SpecError):
    def __init__(self) -> None:
        super().__init__(f"the desired number changed {_ATTEMPTS} times while it was being set; try again")


class InvalidSpec(SpecError):
    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key} is not a valid spec: {reason}")
        self.key = key
        self.reason = reason


async def read(store: Store, keys: Keys) -> tuple[AttentionSpec | None, int]:
    """The spec and the revision it was last written at; (None, 0) when there is none."""
    found = await store.get(keys.spec_attention)
    if found is None:
        return None, 0
    return _decode(keys, found.value), found.mod_revision


async def ensure(store: Store, keys: Keys, initial: AttentionSpec) -> AttentionSpec:
    """The spec, created as `initial` where there is none yet."""
    spec, _ = await read(store, keys)
    if spec is not None:
        return spec
    result = await store.txn(
        [mod_revision(keys.spec_attention, 0)],
        [Put(keys.spec_attention, encode(initial))],
        [Get(keys.spec_attention)],
    )
    if result.succeeded:
        return initial
    written = result.kv(0)
    return initial if written is None else _decode(keys, written.value)


async def set_desired(
    store: Store, keys: Keys, replicas: int, *, actor: Actor, current: int | None, now_s: float
) -> tuple[AttentionSpec, AttentionSpec]:
    """Set the desired count; the spec before and after. Setting it to what it is changes nothing.

    Raises OutOfBounds, NotCurrent (`current` is a precondition), SpecConflict, InvalidSpec, StoreError.
    """
    for _ in range(_ATTEMPTS):
        before, revision = await read(store, keys)
        before = before or AttentionSpec(desired=0, generation=1)
        after = changed(before, replicas, actor=actor, current=current, now_s=now_s)
        if after == before:
            return before, before
        write = Put(keys.spec_attention, encode(after))
        result = await store.txn([mod_revision(keys.spec_attention, revision)], [write])
        if result.succeeded:
            return before, after
    raise SpecConflict


def changed(
    spec: AttentionSpec, replicas: int, *, actor: Actor, current: int | None, now_s: float
) -> AttentionSpec:
    """The next generation of `spec`, or `spec` itself when it asks for nothing new. Pure."""
    if current is not None and current != spec.desired:
        raise NotCurrent(current, spec.desired)
    if not spec.min <= replicas <= spec.max:
        raise OutOfBounds(replicas, spec)
    if replicas == spec.desired:
        return spec
    return msgspec.structs.replace(
        spec, desired=replicas, set_by=actor, generation=spec.generation + 1, updated_at_s=now_s
    )


def _decode(keys: Keys, value: bytes) -> AttentionSpec:
    try:
        return decode_spec(value)
    except (msgspec.DecodeError, ValueError) as error:
        raise InvalidSpec(keys.spec_attention, str(error)) from error
