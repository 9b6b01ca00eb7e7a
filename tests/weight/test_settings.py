"""What a weight node follows of the cluster's settings, and that its engine does so while it runs."""

import argparse
import sys
from pathlib import Path

import msgspec
import pytest
from flume_common.config_schema import Values
from flume_weight import messages as m
from flume_weight.config import supervisor_flags
from flume_weight.settings import base, configure

sys.path.insert(0, str(Path(__file__).parent))
from test_engine import prompt, rig

READY = m.Ready(
    architecture="", vocab_size=1, context_tokens=1, num_layers=1, num_query_heads=1,
    num_kv_heads=1, head_dim=1, dtype="float32", block_tokens=16, max_step_tokens=192, max_step_sequences=64,
    kv_frame_bytes=1, load_s=0.0,
)  # fmt: skip


def test_its_flags_hold_where_nothing_is_set():
    args = supervisor_flags().parse_args(
        ["--model", "x", "--tail-margin-tokens", "7", "--step-timeout-s", "2", "--log-level", "debug"]
    )
    assert base(args) == Values(tail_margin_tokens=7, step_timeout_s=2.0, log_level="debug")


def test_a_flag_without_a_setting_is_not_asked_for():
    args = argparse.Namespace(
        log_level="info",
        tail_margin_tokens=1,
        mixed_prefill_tokens=2,
        step_timeout_s=3.0,
        microbatches="1",
        step_target_ms=250.0,
    )
    assert base(args).mixed_prefill_tokens == 2


@pytest.mark.parametrize("wanted, told", [(100, 100), (128, 128), (5000, 128)])
def test_a_step_never_becomes_larger_than_the_frames_that_carry_it(wanted, told):
    values = Values(mixed_prefill_tokens=wanted, tail_margin_tokens=9, step_timeout_s=4.0, microbatches="2")
    message = configure(msgspec.structs.replace(values, step_target_ms=250.0), READY)
    assert msgspec.structs.astuple(message) == (9, told, 4.0, "2", 250.0, values.unavailable_wait_s)


async def test_an_engine_moves_tails_by_a_margin_it_was_told_while_it_runs():
    async with rig(4096, 4096, args=["--tail-margin-tokens", "100000"]) as made:
        before = await made.generate("a", prompt(64), max_tokens=48)
        assert not any(isinstance(item, m.RouteChanged) and len(item.ranges) > 1 for item in made.said)
        made.weight.send(m.Configure(tail_margin_tokens=16, mixed_prefill_tokens=128, step_timeout_s=10.0))
        assert await made.generate("b", prompt(64), max_tokens=48) == before
        assert any(isinstance(item, m.RouteChanged) and len(item.ranges) > 1 for item in made.said)
