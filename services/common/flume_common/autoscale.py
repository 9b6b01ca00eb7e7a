"""How many attention nodes a load needs. Pure: a load and the time in, a count out; simulators import it.

    budget of a node    = min(memory, latency limit)                    tokens
    latency limit       = (TPOT SLO - time outside of attention) x bandwidth / bytes per token
    growth              = open tails / time per token                   tokens per second: only tails grow
    demand              = held + waiting + growth x prepare time        tokens once a new node is ready

A node is started when the demand passes the watermark of all budgets together, which is when it would be
full before a further node could be ready. One is let go when what is left would stand below a much lower
mark for a whole cooldown; the gap between the marks is what keeps a steady load from flapping.
Source of the formulas: KernelFlume (arXiv 2606.29207), section 4.2; the latency limit follows from reading
KV being bound by memory bandwidth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Settings:
    """What the operator wants. Raises ValueError for what can't be."""

    min: int = 1
    max: int = 64
    watermark: float = 0.8
    """Share of the budget at which a fleet counts as full."""
    shrink_ratio: float = 0.6
    """A node goes when the others would stay below this share of the watermark. Lower: fewer changes."""
    cooldown_s: float = 60.0
    """How long after any change, and for how long of low load, before a node goes."""
    cooldown_up_s: float = 2.0
    """Between a change and the next node more."""
    tpot_slo_s: float = 0.0
    """Time per output token to keep; 0: memory alone counts."""
    rest_s: float = 0.0
    """Part of a step that does not grow with the KV that is read; 0: as measured."""
    bandwidth_bytes_per_s: float = 0.0
    """At which an attention node reads KV; 0: as measured, and where that is unknown memory alone counts."""
    prepare_s: float = 5.0
    """From start to READY, where none has been measured yet."""

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.max:
            raise ValueError(f"bounds must be 1 <= min <= max, got {self.min} to {self.max}")
        if not 0 < self.watermark <= 1:
            raise ValueError(f"watermark must be above 0 and at most 1, got {self.watermark}")
        if not 0 < self.shrink_ratio < 1:
            raise ValueError(f"shrink_ratio must lie between 0 and 1, got {self.shrink_ratio}")


@dataclass(frozen=True, slots=True)
class NodeLoad:
    """One attention node that is ready."""

    capacity_tokens: int
    used_tokens: int
    open_tails: int = 0
    bytes_per_token: float = 0.0  # 0: unknown
    bandwidth_bytes_per_s: float = 0.0  # measured; 0: unknown


@dataclass(frozen=True, slots=True)
class FleetLoad:
    """All of them, and what is on its way."""

    nodes: Sequence[NodeLoad]
    desired: int  # now, nodes that still prepare included
    changed_at_s: float  # when `desired` last changed, same clock as `now_s`
    waiting_tokens: int = 0  # of sequences that have not been admitted
    step_s: float = 0.0  # measured time per token; 0: nothing is being generated
    rest_s: float = 0.0  # measured: the part of `step_s` that is not reading KV
    prepare_s: float | None = None  # measured
    gave_up: bool = False  # the last change was the return from a scale that could not complete


@dataclass(frozen=True, slots=True)
class Decision:
    """`desired` is the count to set; `low_since_s` goes into the next decision."""

    desired: int
    reason: str
    low_since_s: float | None = None


def budget_tokens(settings: Settings, node: NodeLoad, rest_s: float = 0.0) -> float:
    """What a node may hold so that it neither runs out of memory nor makes steps longer than the SLO.

    `rest_s` is measured; what the settings say counts more. An SLO that the rest of a step already breaks
    is no limit: no number of nodes would keep it.
    """
    read_s = settings.tpot_slo_s - (settings.rest_s or rest_s)
    bandwidth = settings.bandwidth_bytes_per_s or node.bandwidth_bytes_per_s
    if bandwidth <= 0 or node.bytes_per_token <= 0 or read_s <= 0:
        return float(node.capacity_tokens)
    return min(float(node.capacity_tokens), read_s * bandwidth / node.bytes_per_token)


def demand_tokens(settings: Settings, load: FleetLoad) -> float:
    """What the fleet would hold when a node started now becomes ready."""
    held = sum(node.used_tokens for node in load.nodes) + load.waiting_tokens
    prepare_s = settings.prepare_s if load.prepare_s is None else load.prepare_s
    return held + growth_tokens_per_s(load) * prepare_s


def growth_tokens_per_s(load: FleetLoad) -> float:
    return sum(node.open_tails for node in load.nodes) / load.step_s if load.step_s > 0 else 0.0


def decide(settings: Settings, load: FleetLoad, low_since_s: float | None, now_s: float) -> Decision:
    """The count that `load` needs. Always within the bounds, which alone are kept at once.

    `low_since_s`: what the last decision gave, None at first.
    """
    bounded = _clamp(settings, load.desired)
    budget = sum(budget_tokens(settings, node, load.rest_s) for node in load.nodes) / max(len(load.nodes), 1)
    if bounded != load.desired:
        return Decision(bounded, f"bounds are {settings.min} to {settings.max}")
    if budget <= 0:
        return Decision(bounded, "no node is ready, the load is not known")
    demand = demand_tokens(settings, load)
    wanted = _clamp(settings, math.ceil(demand / (settings.watermark * budget)))
    if wanted > bounded:
        return _more(settings, load, wanted, _expected(load, demand, budget), now_s)
    spare = _clamp(settings, math.ceil(demand / (settings.watermark * settings.shrink_ratio * budget)))
    if spare >= bounded:
        return Decision(bounded, "as needed")
    expected = _expected(load, demand, budget)
    return _fewer(settings, load, expected, now_s if low_since_s is None else low_since_s, now_s)


def _more(settings: Settings, load: FleetLoad, wanted: int, expected: str, now_s: float) -> Decision:
    pause_s = settings.cooldown_s if load.gave_up else settings.cooldown_up_s
    if now_s - load.changed_at_s < pause_s:
        return Decision(load.desired, f"{wanted} needed, cooling down")
    return Decision(wanted, f"{expected}, above the watermark")


def _fewer(settings: Settings, load: FleetLoad, expected: str, low_since_s: float, now_s: float) -> Decision:
    """One at a time: what the next one less means is seen before it goes."""
    if now_s - max(low_since_s, load.changed_at_s) < settings.cooldown_s:
        return Decision(load.desired, "low, cooling down", low_since_s)
    return Decision(load.desired - 1, f"{expected}, for {settings.cooldown_s:g} s", low_since_s)


def _expected(load: FleetLoad, demand: float, budget: float) -> str:
    share = demand / (budget * max(load.desired, 1))
    memory = sum(node.capacity_tokens for node in load.nodes) / len(load.nodes)
    limit = f" of {budget:.0f} tokens each, which the SLO allows" if budget < memory else ""
    return f"{share:.0%} of {load.desired} nodes' budget{limit} expected"


def _clamp(settings: Settings, count: int) -> int:
    return min(max(count, settings.min), settings.max)
