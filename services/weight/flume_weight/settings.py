"""Which of the cluster's settings a weight node follows, and what its engine is told. Pure."""

from __future__ import annotations

import argparse

from flume_common.config_schema import Values

from flume_weight import messages as m


def base(args: argparse.Namespace) -> Values:
    """What holds where nothing is set: our flags."""
    return Values(
        log_level=args.log_level,
        tail_margin_tokens=args.tail_margin_tokens,
        mixed_prefill_tokens=args.mixed_prefill_tokens,
        step_timeout_s=args.step_timeout_s,
        microbatches=args.microbatches,
        step_target_ms=args.step_target_ms,
    )


def configure(values: Values, ready: m.Ready) -> m.Configure:
    """For an engine whose frames were made when it started: a step can't become larger than they are."""
    room_tokens = max(1, ready.max_step_tokens - ready.max_step_sequences)
    return m.Configure(
        tail_margin_tokens=values.tail_margin_tokens,
        mixed_prefill_tokens=min(values.mixed_prefill_tokens, room_tokens),
        step_timeout_s=values.step_timeout_s,
        unavailable_wait_s=values.unavailable_wait_s,
        microbatches=values.microbatches,
        step_target_ms=values.step_target_ms,
    )
