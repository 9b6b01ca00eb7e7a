"""Whether a weight node is who it says, under the epoch it says: etcd is asked, the sender is not believed.

What was verified once is known and costs nothing again, so that everything that worked goes on while etcd
is away. An epoch that differs from the known one, higher or lower, is looked up by a linearizable read. No
token waits for any of this.

    etcd's record of the weight node    and the claim is
    of another incarnation              over, or of a store we have not heard of: `Incarnation.settle` decides
    none                                refused: it is not registered
    with a higher epoch                 refused: it was replaced, or has registered anew
    with a lower epoch                  refused: no such epoch was ever given out
    with this epoch, another secret     refused: it is another process
    with this epoch                     verified
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import structlog
from flume_common.epochs import epoch_of
from flume_common.incarnation import Incarnation, Record
from flume_common.keys import Keys
from flume_common.membership import Member, Role, digest_of
from flume_common.store import Get, KeyValue, Store, StoreError, StoreUnavailable

from flume_attention.errors import ClaimRefused, ClaimUnverified

log = structlog.get_logger()
K = TypeVar("K")
V = TypeVar("V")

REUSE_S = 0.1
"""A record that speaks against a claim is not read again sooner: claims may come as fast as one likes."""
PAUSE_S = 0.1
"""Between two questions to an etcd that is away."""
LOG_EVERY_S = 10.0
MOST_NAMES = 256
"""Names of weight nodes that are remembered at a time, as anybody can make some up."""
STALE = ("incarnation", "older", "ahead")
"""Reasons that concern the epoch, rather than who sent it."""
REASONS = (*STALE, "unregistered", "secret", "not_over", "unverified")


@dataclass(frozen=True, slots=True)
class Claim:
    """What a message says of its sender."""

    weight_node: str
    epoch: int
    incarnation: str  # empty: the present one
    secret: bytes


@dataclass(frozen=True, slots=True)
class Look:
    """What etcd had at one revision."""

    at_s: float  # monotonic
    incarnation: str
    member: Member | None
    revision: int


@dataclass(frozen=True, slots=True)
class Verified:
    """A claim that etcd has confirmed."""

    ordinal: int  # of the incarnation
    epoch: int
    digest: str
    life: int  # of the store's history


def against(claim: Claim, look: Look) -> tuple[str, str] | None:
    """The reason, in a word and for people, why etcd does not confirm the claim; None when it does. Pure."""
    name, member = claim.weight_node, look.member
    if claim.incarnation not in ("", look.incarnation):
        return "incarnation", f"epoch {claim.epoch} of {name} is of incarnation {claim.incarnation}, not this"
    if member is None:
        return "unregistered", f"{name} is not registered in etcd"
    if member.epoch > claim.epoch:
        return "older", f"epoch {claim.epoch} of {name} is older than {member.epoch}, which etcd has"
    if member.epoch < claim.epoch:
        return "ahead", f"epoch {claim.epoch} of {name} was never given out: etcd has {member.epoch}"
    if not _fits(claim.secret, member.secret_digest):
        return "secret", f"the message is not from the process that is registered as {name}"
    return None


def _fits(secret: bytes, digest: str) -> bool:
    """An empty digest fits everything: that process has no secret."""
    return not digest or hmac.compare_digest(digest_of(secret), digest)


class Claims:
    """The claims of all weight nodes to one attention node."""

    def __init__(self, store: Store, keys: Keys, incarnation: Incarnation) -> None:
        self.refused: Counter[str] = Counter(dict.fromkeys(REASONS, 0))
        self._store = store
        self._keys = keys
        self._incarnation = incarnation
        self._verified: dict[str, Verified] = {}
        self._looks: dict[str, Look] = {}
        self._looking = asyncio.Lock()
        self._logged_s: dict[tuple[str, str], float] = {}

    @property
    def stale(self) -> int:
        """Claims refused for their epoch."""
        return sum(self.refused[reason] for reason in STALE)

    async def require(self, claim: Claim, *, timeout_s: float) -> int:
        """The epoch for the engine. Raises ClaimRefused, ClaimUnverified, ValueError for what cannot be."""
        epoch_of(0, claim.epoch)
        known = self._verified.get(claim.weight_node)
        if known is None or not self._is_known(claim, known):
            known = await self._verify(claim, timeout_s)
        return epoch_of(known.ordinal, known.epoch)

    async def over_below(self, weight_node: str, below: int, incarnation: str, *, timeout_s: float) -> int:
        """The epoch below which this weight node's are over, as far as etcd says so, too; 0 if not at all.

        Never raises for what cannot be verified: then nothing is fenced off.
        """
        try:
            epoch_of(0, below)
            present = incarnation in ("", self._incarnation.id)
            known = self._verified.get(weight_node)
            if present and known and known.ordinal == self._incarnation.ordinal and below <= known.epoch:
                return epoch_of(known.ordinal, below)
            look = await self._look(weight_node, timeout_s)
        except (ClaimUnverified, ValueError) as error:
            self._note("unverified", weight_node, str(error))
            return 0
        last = look.member.epoch if look.member else look.revision + 1
        if incarnation not in ("", look.incarnation) or below > last:
            self._note("not_over", weight_node, f"epochs below {below} of {weight_node} are not over: {last}")
            return 0
        return epoch_of(self._incarnation.ordinal, below)

    def _is_known(self, claim: Claim, known: Verified) -> bool:
        present = claim.incarnation in ("", self._incarnation.id)
        same = known.ordinal == self._incarnation.ordinal and known.epoch == claim.epoch
        return present and same and _fits(claim.secret, known.digest)

    async def _verify(self, claim: Claim, timeout_s: float) -> Verified:
        try:
            look = await self._look(claim.weight_node, timeout_s, claim)
        except ClaimUnverified as error:
            self._note("unverified", claim.weight_node, str(error))
            raise ClaimUnverified(
                f"cannot verify epoch {claim.epoch} of {claim.weight_node}: {error}"
            ) from error
        if found := against(claim, look):
            reason, detail = found
            self._note(reason, claim.weight_node, detail)
            raise ClaimRefused(detail)
        assert look.member is not None
        verified = Verified(
            self._incarnation.ordinal, claim.epoch, look.member.secret_digest, self._store.history.life
        )
        self._verified.pop(claim.weight_node, None)
        self._verified[claim.weight_node] = verified
        _bound(self._verified)
        return verified

    async def _look(self, weight_node: str, timeout_s: float, claim: Claim | None = None) -> Look:
        """etcd's record, fresh, or one that is young and speaks against the claim. Raises ClaimUnverified."""
        key = self._keys.member(Role.WEIGHT, weight_node)
        try:
            async with asyncio.timeout(max(timeout_s, 0.0)), self._looking:
                young = self._looks.get(weight_node)
                if young and claim and time.monotonic() - young.at_s < REUSE_S and against(claim, young):
                    return young
                look = await self._read(weight_node, key)
        except TimeoutError:
            raise ClaimUnverified("etcd is away, or too slow") from None
        except StoreError as error:
            raise ClaimUnverified(str(error)) from error
        self._looks.pop(weight_node, None)
        self._looks[weight_node] = look
        _bound(self._looks)
        return look

    async def _read(self, weight_node: str, key: str) -> Look:
        """Both keys at one revision, once our incarnation is the one that is there, for as long as it takes.

        Raises StoreError for what waiting does not mend.
        """
        while True:
            try:
                result = await self._store.txn([], [Get(self._keys.incarnation), Get(key)])
            except StoreUnavailable:
                await asyncio.sleep(PAUSE_S)
                continue
            record, member = Record.of(result.kv(0)), _member_or_none(result.kv(1))
            self._require_growing(weight_node, member)
            present = record is not None and record.id == self._incarnation.id
            if record is not None and present and not self._store.history.pending:
                return Look(time.monotonic(), record.id, member, result.revision)
            with suppress(StoreUnavailable):
                await self._incarnation.settle()

    def _require_growing(self, weight_node: str, member: Member | None) -> None:
        """That etcd has not forgotten an epoch it had confirmed: it only does after a restore."""
        known = self._verified.get(weight_node)
        if known and member and known.ordinal == self._incarnation.ordinal and member.epoch < known.epoch:
            self._store.history.contradict("epoch_went_back", known.life, member.epoch)

    def _note(self, reason: str, weight_node: str, detail: str) -> None:
        """Count, and log not too often."""
        self.refused[reason] += 1
        now = time.monotonic()
        if now - self._logged_s.get((reason, weight_node), float("-inf")) >= LOG_EVERY_S:
            self._logged_s.pop((reason, weight_node), None)
            self._logged_s[reason, weight_node] = now
            _bound(self._logged_s)
            log.warning("claim_refused", weight_node=weight_node, reason=reason, detail=detail,
                        refused=self.refused[reason])  # fmt: skip


def _member_or_none(kv: KeyValue | None) -> Member | None:
    try:
        return Member.decode(kv) if kv else None
    except (ValueError, msgspec.DecodeError):
        return None


def _bound(kept: dict[K, V]) -> None:
    while len(kept) > MOST_NAMES:
        del kept[next(iter(kept))]
